//! Tasks that are learned one after another: the accuracy on each over time, and the matrix of what was
//! known after which.

use std::fmt::Write;

use serde_json::Value;

use super::collect::Run;
use super::svg::{Chart, Line};
use super::text::escape;

/// What the key of a task's accuracy begins with.
pub const PREFIX: &str = "task/";

/// The section; nothing where a run has one task.
pub fn html(run: &Run) -> String {
    let lines: Vec<Line> = run
        .series
        .iter()
        .filter_map(|((split, key), series)| Some((split, key.strip_prefix(PREFIX)?, series)))
        .filter(|(split, _, _)| *split == "eval")
        .enumerate()
        .map(|(colour, (_, name, series))| Line {
            name: name.to_string(),
            points: series.points.clone(),
            labels: series.labels.clone(),
            colour,
            faint: false,
        })
        .collect();
    let chart = Chart {
        title: "Top-1 on each task".into(),
        unit: "%".into(),
        lines,
        marks: run.phases.clone(),
        ..Chart::default()
    };
    let picture = chart.html();
    let table = matrix(run).unwrap_or_default();
    match picture.is_empty() && table.is_empty() {
        true => String::new(),
        false => format!("<div class=\"grid\">\n{picture}</div>\n{table}"),
    }
}

/// Accuracy after each task (rows) on each task (columns).
fn matrix(run: &Run) -> Option<String> {
    let summary = run.summary.as_ref()?;
    let rows = summary.get("accuracy")?.as_array()?;
    let tasks: Vec<&str> = summary.get("tasks")?.as_array()?.iter().filter_map(Value::as_str).collect();
    let mut html = String::from("<table><thead><tr><th>Top-1 in percent</th>");
    for task in &tasks {
        let _ = write!(html, "<th>{}</th>", escape(task));
    }
    html += "</tr></thead><tbody>\n";
    let mut row = |name: String, figures: &Value| {
        let _ = write!(html, "<tr><td>{}</td>", escape(&name));
        for figure in figures.as_array().into_iter().flatten() {
            let _ = write!(html, "<td>{:.2}</td>", figure.as_f64().unwrap_or(f64::NAN));
        }
        html += "</tr>\n";
    };
    if let Some(before) = summary.get("accuracy_before").filter(|before| before.is_array()) {
        row("before".into(), before);
    }
    for (task, figures) in tasks.iter().zip(rows) {
        row(format!("after {task}"), figures);
    }
    html += "</tbody></table>\n";
    Some(html)
}
