//! Tables and pictures of sweeps in which something is learned and something is lost: tasks one after
//! another, or a text learned beside one that is not to be forgotten.

use std::fmt::Write;

use serde::Serialize;
use serde_json::Value;

use super::picture::{COLOURS, STYLE};
use super::{diverged, Ablation, Cell};
use crate::report::series::range;
use crate::report::svg::ticks;
use crate::report::text::escape;
use crate::{quantize, Error, Result};

/// A figure of each run: its key in the table, how it is read off summary.json.
struct Figure {
    key: &'static str,
    title: &'static str,
    read: fn(&Value) -> Option<f64>,
}

fn number(summary: &Value, key: &str) -> Option<f64> {
    summary.get(key).and_then(Value::as_f64)
}

/// What is shown of a run over several tasks, in percent.
const TASKS: &[Figure] = &[
    Figure { key: "average_accuracy", title: "average accuracy", read: |s| number(s, "average_accuracy") },
    Figure {
        key: "first_task",
        title: "first task at the end",
        read: |s| s.get("accuracy")?.as_array()?.last()?.get(0)?.as_f64(),
    },
    Figure {
        key: "learned",
        title: "learned (each task right after it)",
        read: |s| number(s, "learning_accuracy"),
    },
    Figure { key: "forgetting", title: "forgetting", read: |s| number(s, "forgetting") },
    Figure { key: "state_bytes", title: "bytes kept between tasks", read: |s| number(s, "state_bytes") },
];

/// What is shown of a language model that is adapted, in nats a token.
const TEXT: &[Figure] = &[
    Figure { key: "final_loss", title: "loss", read: |s| number(s, "final_loss") },
    Figure {
        key: "learned",
        title: "gained on the target",
        read: |s| Some(number(s, "base_loss")? - number(s, "final_loss")?),
    },
    Figure { key: "forgetting", title: "lost on the control", read: |s| number(s, "control_forgetting") },
    Figure { key: "trained", title: "parameters trained", read: |s| number(s, "params_trainable") },
];

/// The figures of the finished runs of one variant.
#[derive(Clone, Debug, Serialize)]
pub struct Trade {
    /// The variant's name.
    pub variant: String,
    /// The grid that it is of, where it is of one.
    pub family: Option<String>,
    /// Each figure's values, one for each finished seed.
    pub figures: Vec<(String, Vec<f64>)>,
    #[serde(skip)]
    titles: Vec<&'static str>,
}

impl Trade {
    fn values(&self, key: &str) -> &[f64] {
        self.figures.iter().find(|(k, _)| k == key).map_or(&[], |(_, values)| values)
    }
}

/// Mean and, of two values and more, half the width of its 95 % interval (Student's t).
fn interval(values: &[f64]) -> Option<(f64, Option<f64>)> {
    const T: [f64; 10] = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228];
    let n = values.len();
    let mean = values.iter().sum::<f64>() / n as f64;
    match n {
        0 => None,
        1 => Some((mean, None)),
        _ => {
            let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1) as f64;
            let t = T.get(n - 2).copied().unwrap_or(1.96);
            Some((mean, Some(t * (variance / n as f64).sqrt())))
        }
    }
}

/// The rows of the table: the figures of those of `cells` that are finished.
pub fn rows(ablation: &Ablation, cells: &[Cell]) -> Result<Vec<Trade>> {
    let tasks = cells.iter().any(|cell| cell.recipe.continual.is_some());
    let figures = if tasks { TASKS } else { TEXT };
    let mut rows = Vec::new();
    for variant in &ablation.variant {
        let named = figures.iter().map(|figure| (figure.key.to_string(), Vec::new())).collect();
        let titles = figures.iter().map(|figure| figure.title).collect();
        let (name, family) = (variant.name.clone(), variant.family.clone());
        let mut row = Trade { variant: name, family, figures: named, titles };
        for cell in cells.iter().filter(|cell| cell.variant == variant.name) {
            if diverged(&cell.dir) {
                row.figures.iter_mut().for_each(|(_, values)| values.push(f64::NAN));
            }
            let Some(summary) = quantize::finished(&cell.dir)? else { continue };
            for (figure, (_, values)) in figures.iter().zip(&mut row.figures) {
                let path = cell.dir.join("summary.json");
                let value = (figure.read)(&summary);
                // A run without a control text has lost nothing that was measured.
                let value = value.or((figure.key == "forgetting").then_some(f64::NAN));
                values.push(value.ok_or_else(|| Error::input(path, format!("{}: not found", figure.key)))?);
            }
        }
        rows.push(row);
    }
    Ok(rows)
}

/// The table in Markdown: mean and 95 % interval of the mean over the seeds that are finished; of each grid
/// its best by average accuracy, or by loss, is said below.
pub fn markdown(rows: &[Trade]) -> String {
    let Some(first) = rows.first() else { return String::new() };
    let mut text = format!("| variant | {} | seeds |\n", first.titles.join(" | "));
    text += &format!("|{}\n", " --- |".repeat(first.titles.len() + 2));
    for row in rows {
        let _ = write!(text, "| {} |", row.variant.replace('|', "\\|"));
        for (key, values) in &row.figures {
            let whole = key == "state_bytes" || key == "trained";
            let _ = match interval(values).filter(|(mean, _)| mean.is_finite()) {
                None if values.is_empty() => write!(text, " not run |"),
                None if key == "forgetting" => write!(text, " not measured |"),
                None => write!(text, " diverged |"),
                Some((mean, _)) if whole => write!(text, " {mean:.0} |"),
                Some((mean, None)) => write!(text, " {mean:.3} |"),
                Some((mean, Some(half))) => write!(text, " {mean:.3} \u{b1} {half:.3} |"),
            };
        }
        let _ = writeln!(text, " {} |", row.figures.first().map_or(0, |(_, values)| values.len()));
    }
    let mut families: Vec<&String> = rows.iter().filter_map(|row| row.family.as_ref()).collect();
    families.dedup();
    for family in families {
        let of = rows.iter().filter(|row| row.family.as_ref() == Some(family));
        let scored = of.filter_map(|row| {
            let (key, sign) = if row.values("average_accuracy").is_empty() {
                ("final_loss", -1.0)
            } else {
                ("average_accuracy", 1.0)
            };
            interval(row.values(key))
                .map(|(mean, _)| (sign * mean, row))
                .filter(|(score, _)| score.is_finite())
        });
        if let Some((_, best)) = scored.max_by(|a, b| a.0.total_cmp(&b.0)) {
            let _ = write!(text, "\nbest of {family}: {}\n", best.variant);
        }
    }
    text
}

/// What is learned over what is forgotten: a dot for each seed, a cross at their mean, a line through the means of
/// a grid. Nothing where there are no finished runs.
pub fn svg(rows: &[Trade]) -> Option<String> {
    const LEFT: f64 = 72.0;
    const PLOT: (f64, f64) = (560.0, 420.0);
    const TOP: f64 = 24.0;
    let points = |row: &Trade| -> Vec<(f64, f64)> {
        let pairs = row.values("forgetting").iter().copied().zip(row.values("learned").iter().copied());
        pairs.filter(|(x, y)| x.is_finite() && y.is_finite()).collect()
    };
    let shown: Vec<(&Trade, Vec<(f64, f64)>)> =
        rows.iter().map(|row| (row, points(row))).filter(|(_, points)| !points.is_empty()).collect();
    let all = || shown.iter().flat_map(|(_, points)| points.iter().copied());
    let padded = |(low, high): (f64, f64)| {
        let pad = ((high - low) * 0.08).max(1e-3);
        (low - pad, high + pad)
    };
    let (x0, x1) = padded(range(all().map(|p| p.0))?);
    let (y0, y1) = padded(range(all().map(|p| p.1))?);
    let x = |v: f64| LEFT + (v - x0) / (x1 - x0) * PLOT.0;
    let y = |v: f64| TOP + PLOT.1 - (v - y0) / (y1 - y0) * PLOT.1;
    let mut body = String::new();
    let (bottom, right) = (TOP + PLOT.1, LEFT + PLOT.0);
    for mark in ticks(x0, x1, 7).0 {
        let at = x(mark);
        let _ = write!(body, "<path class=\"g\" d=\"M{at:.1} {TOP}V{bottom}\"/>");
        let _ = write!(
            body,
            "<text class=\"t m\" x=\"{at:.1}\" y=\"{:.1}\">{}</text>",
            bottom + 16.0,
            rounded(mark)
        );
    }
    for mark in ticks(y0, y1, 7).0 {
        let at = y(mark);
        let _ = write!(body, "<path class=\"g\" d=\"M{LEFT} {at:.1}H{right}\"/>");
        let _ = write!(
            body,
            "<text class=\"t e\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            LEFT - 6.0,
            at + 4.0,
            rounded(mark)
        );
    }
    let title = |key: &str| {
        let row = rows.first()?;
        let at = row.figures.iter().position(|(k, _)| k == key)?;
        row.titles.get(at).copied()
    };
    let (across, up) = (title("forgetting").unwrap_or_default(), title("learned").unwrap_or_default());
    let _ = write!(body, "<text class=\"t e\" x=\"{right}\" y=\"{:.1}\">{across}</text>", bottom + 34.0);
    let _ = write!(body, "<text class=\"t\" x=\"{LEFT}\" y=\"{:.1}\">{up}</text>", TOP - 8.0);
    // One colour and one line in the legend for each grid, or for a variant that is of none.
    let name = |row: &Trade| row.family.clone().unwrap_or_else(|| row.variant.clone());
    let mut names: Vec<String> = shown.iter().map(|(row, _)| name(row)).collect();
    names.dedup();
    for (i, of) in names.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        // Beyond as many as there are colours, hollow.
        let fill = if i < COLOURS.len() { colour } else { "#fff" };
        let mut means = Vec::new();
        for (_, points) in shown.iter().filter(|(row, _)| name(row) == *of) {
            for (px, py) in points {
                let _ = write!(
                    body,
                    "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\" fill=\"{fill}\" stroke=\"{colour}\" opacity=\".5\"/>",
                    x(*px),
                    y(*py)
                );
            }
            let n = points.len() as f64;
            let mean = points.iter().fold((0.0, 0.0), |sum, p| (sum.0 + p.0 / n, sum.1 + p.1 / n));
            means.push((x(mean.0), y(mean.1)));
        }
        for (mx, my) in &means {
            let _ = write!(
                body,
                "<path d=\"M{:.1} {my:.1}h14m-7 -7v14\" stroke=\"{colour}\" stroke-width=\"2.5\"/>",
                mx - 7.0
            );
        }
        if means.len() > 1 {
            let path: Vec<String> = means.iter().map(|(mx, my)| format!("{mx:.1} {my:.1}")).collect();
            let dashes = if i < COLOURS.len() { "none" } else { "4 3" };
            let _ = write!(
                body,
                "<path class=\"l\" stroke=\"{colour}\" stroke-dasharray=\"{dashes}\" d=\"M{}\"/>",
                path.join("L")
            );
        }
        let line = TOP + 14.0 + 20.0 * i as f64;
        let _ = write!(
            body,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"5\" fill=\"{fill}\" stroke=\"{colour}\"/><text x=\"{:.1}\" y=\"{line:.1}\">{}</text>",
            right + 24.0,
            line - 4.0,
            right + 36.0,
            escape(of)
        );
    }
    let (width, height) = (right + 300.0, (bottom + 48.0).max(TOP + 30.0 + 20.0 * names.len() as f64));
    Some(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" height=\"{height:.0}\">\
         <style>{STYLE}</style><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>{body}</svg>\n"
    ))
}

/// A mark without the digits that repeated addition leaves.
fn rounded(mark: f64) -> f64 {
    (mark * 1e6).round() / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(variant: &str, family: Option<&str>, learned: &[f64], forgetting: &[f64]) -> Trade {
        let figures = vec![
            ("average_accuracy".to_string(), learned.to_vec()),
            ("learned".to_string(), learned.to_vec()),
            ("forgetting".to_string(), forgetting.to_vec()),
        ];
        let titles = vec!["average accuracy", "learned", "forgetting"];
        Trade { variant: variant.into(), family: family.map(String::from), figures, titles }
    }

    #[test]
    fn means_intervals_and_the_best_of_a_grid() {
        // Mean 2, deviation 1, n = 3: 4.303 / sqrt(3).
        let (mean, half) = interval(&[1.0, 2.0, 3.0]).unwrap();
        assert!((mean - 2.0).abs() < 1e-12 && (half.unwrap() - 4.303 / 3f64.sqrt()).abs() < 1e-9);
        assert_eq!(interval(&[5.0]), Some((5.0, None)));
        let rows = [
            row("a", Some("g"), &[80.0, 82.0], &[1.0, 2.0]),
            row("b|c", Some("g"), &[90.0], &[3.0]),
            row("d", None, &[], &[]),
        ];
        let text = markdown(&rows);
        assert!(
            text.contains("| a | 81.000 \u{b1} 12.706 | 81.000 \u{b1} 12.706 | 1.500 \u{b1} 6.353 | 2 |"),
            "{text}"
        );
        assert!(text.contains("| d | not run |") && text.contains("best of g: b|c"), "{text}");
        let picture = svg(&rows).unwrap();
        // Three seeds, and a mark in the legend for their grid, whose two means a line joins.
        assert_eq!(picture.matches("<circle").count(), 4);
        assert_eq!(picture.matches("class=\"l\"").count(), 1);
        assert!(svg(&rows[2..]).is_none());
    }
}
