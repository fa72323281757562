//! The picture of an ablation: accuracy of every seed of every variant, and how the share of oscillating
//! weights runs over the steps. One SVG file that stands alone.

use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

use super::Row;
use crate::report::series::{range, thin, Point};
use crate::report::svg::ticks;
use crate::report::text::escape;
use crate::{files, Result};

/// Colours that people with the usual forms of colour blindness tell apart (Okabe and Ito 2008), darkened
/// where they would be faint on white.
pub(super) const COLOURS: [&str; 8] =
    ["#444444", "#0072b2", "#009e73", "#b58900", "#d55e00", "#a8327a", "#2f9bd0", "#6b4fbb"];

/// How everything in a picture looks.
pub(super) const STYLE: &str =
    "text{font:12px system-ui,sans-serif;fill:#333}.h{font-size:15px;font-weight:600}.t{fill:#667}\
     .e{text-anchor:end}.m{text-anchor:middle}.g{stroke:#e3e6ea;fill:none}.l{fill:none;stroke-width:1.8}";

const WIDTH: f64 = 920.0;
const ROW: f64 = 24.0;
const NAMES: f64 = 230.0;
const PLOT: f64 = 240.0;
const MARGIN: f64 = 24.0;

/// The share of oscillating weights at each logged step of a run, in percent.
fn oscillation(dir: &Path) -> Result<Vec<Point>> {
    let text = files::read_text(&dir.join("metrics.jsonl"))?;
    let mut points = Vec::new();
    for line in text.lines() {
        // A run that is being written to can end in the middle of a line.
        let Ok(line) = serde_json::from_str::<Value>(line) else { continue };
        let number = |key: &str| line.get(key).and_then(Value::as_f64);
        if line.get("split").and_then(Value::as_str) == Some("train") {
            points.extend(number("step").zip(number("oscillation")));
        }
    }
    Ok(points)
}

/// The mean over runs at the steps that all of them logged.
fn mean(runs: &[Vec<Point>]) -> Vec<Point> {
    let Some((first, rest)) = runs.split_first() else { return Vec::new() };
    let at = |run: &Vec<Point>, step: f64| run.iter().find(|p| p.0 == step).map(|p| p.1);
    let mut points = Vec::new();
    for &(step, value) in first {
        let others: Option<Vec<f64>> = rest.iter().map(|run| at(run, step)).collect();
        if let Some(others) = others {
            points.push((step, (value + others.iter().sum::<f64>()) / runs.len() as f64));
        }
    }
    points
}

/// Draws the finished runs of `rows`; nothing where there are none.
pub fn svg(rows: &[Row]) -> Result<Option<String>> {
    let mut widths: Vec<u8> = rows.iter().filter(|r| !r.top1.is_empty()).map(|r| r.bits).collect();
    widths.dedup();
    if widths.is_empty() {
        return Ok(None);
    }
    let mut body = String::new();
    let mut y = MARGIN;
    for bits in widths {
        let rows: Vec<&Row> = rows.iter().filter(|r| r.bits == bits && !r.top1.is_empty()).collect();
        let _ = write!(
            body,
            "<text class=\"h\" x=\"{MARGIN}\" y=\"{:.1}\">{bits}-bit weights and activations</text>",
            y + 14.0
        );
        accuracy(&mut body, &rows, y + 30.0);
        y += 30.0 + ROW * rows.len() as f64 + 44.0;
        curves(&mut body, &rows, y)?;
        y += PLOT + 56.0;
    }
    Ok(Some(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {y:.0}\" width=\"{WIDTH}\" height=\"{y:.0}\">\
         <style>{STYLE}</style><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>{body}</svg>\n"
    )))
}

/// A row for each variant: a dot for each seed, a stroke at their mean.
fn accuracy(body: &mut String, rows: &[&Row], top: f64) {
    let Some((low, high)) = range(rows.iter().flat_map(|r| r.top1.iter().copied())) else { return };
    let pad = ((high - low) * 0.12).max(0.1);
    let (low, high) = (low - pad, high + pad);
    let x = |value: f64| NAMES + (value - low) / (high - low) * (WIDTH - NAMES - MARGIN);
    let bottom = top + ROW * rows.len() as f64;
    let (marks, _) = ticks(low, high, 7);
    for mark in marks {
        let at = x(mark);
        let _ = write!(body, "<path class=\"g\" d=\"M{at:.1} {top:.1}V{bottom:.1}\"/>");
        let _ =
            write!(body, "<text class=\"t m\" x=\"{at:.1}\" y=\"{:.1}\">{mark:.1} %</text>", bottom + 16.0);
    }
    let _ = write!(
        body,
        "<text class=\"t e\" x=\"{:.1}\" y=\"{:.1}\">top-1 of the packed model, each seed and their mean</text>",
        WIDTH - MARGIN,
        top - 8.0
    );
    for (i, row) in rows.iter().enumerate() {
        let (y, colour) = (top + ROW * (i as f64 + 0.5), COLOURS[i % COLOURS.len()]);
        let name = escape(&row.variant);
        let _ =
            write!(body, "<text class=\"e\" x=\"{:.1}\" y=\"{:.1}\">{name}</text>", NAMES - 12.0, y + 4.0);
        for value in &row.top1 {
            let _ = write!(
                body,
                "<circle cx=\"{:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{colour}\" fill-opacity=\".55\"/>",
                x(*value)
            );
        }
        let at = x(row.top1.iter().sum::<f64>() / row.top1.len() as f64);
        let _ =
            write!(body, "<path d=\"M{at:.1} {:.1}v18\" stroke=\"{colour}\" stroke-width=\"3\"/>", y - 9.0);
    }
}

/// Oscillation over the steps, on a logarithmic axis; shares below its foot lie on it.
fn curves(body: &mut String, rows: &[&Row], top: f64) -> Result<()> {
    const FOOT: f64 = 1e-3;
    let mut lines = Vec::new();
    for row in rows {
        let runs: Vec<Vec<Point>> = row.dirs.iter().map(|dir| oscillation(dir)).collect::<Result<_>>()?;
        lines.push(thin(&mean(&runs), 300));
    }
    let points = || lines.iter().flatten();
    let (Some((from, to)), Some((_, most))) = (range(points().map(|p| p.0)), range(points().map(|p| p.1)))
    else {
        return Ok(());
    };
    let most = most.max(FOOT * 10.0);
    let (left, right, bottom) = (MARGIN + 56.0, WIDTH - MARGIN, top + PLOT);
    let x = |step: f64| left + (step - from) / (to - from).max(1.0) * (right - left);
    let y = |value: f64| bottom - (value.max(FOOT) / FOOT).ln() / (most / FOOT).ln() * PLOT;
    let _ = write!(
        body,
        "<text class=\"t\" x=\"{MARGIN}\" y=\"{:.1}\">weights that oscillate, mean of the seeds</text>",
        top - 8.0
    );
    let mut mark = FOOT;
    while mark <= most {
        let at = y(mark);
        let _ = write!(body, "<path class=\"g\" d=\"M{left:.1} {at:.1}H{right:.1}\"/>");
        let below = if mark == FOOT { "&#8804; " } else { "" };
        // Powers of ten, written without the digits that repeated multiplication leaves.
        let shown = (mark * 1e3).round() / 1e3;
        let _ = write!(
            body,
            "<text class=\"t e\" x=\"{:.1}\" y=\"{:.1}\">{below}{shown} %</text>",
            left - 6.0,
            at + 4.0
        );
        mark *= 10.0;
    }
    for step in ticks(from, to, 8).0 {
        let _ =
            write!(body, "<text class=\"t m\" x=\"{:.1}\" y=\"{:.1}\">{step}</text>", x(step), bottom + 16.0);
    }
    let _ = write!(body, "<text class=\"t e\" x=\"{right:.1}\" y=\"{:.1}\">step</text>", bottom + 32.0);
    for (i, line) in lines.iter().enumerate() {
        let path: Vec<String> = line.iter().map(|p| format!("{:.1} {:.1}", x(p.0), y(p.1))).collect();
        let (name, colour) = (escape(&rows[i].variant), COLOURS[i % COLOURS.len()]);
        let _ = write!(
            body,
            "<path class=\"l\" stroke=\"{colour}\" d=\"M{}\"><title>{name}</title></path>",
            path.join("L")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_over_steps_that_all_logged() {
        let runs = [vec![(1.0, 2.0), (2.0, 4.0), (3.0, 9.0)], vec![(1.0, 4.0), (2.0, 0.0)]];
        assert_eq!(mean(&runs), [(1.0, 3.0), (2.0, 2.0)]);
        assert!(mean(&[]).is_empty());
    }

    #[test]
    fn a_picture_of_two_runs() {
        let dir = tempfile::tempdir().unwrap();
        let line = |step: usize, osc: f64| {
            format!("{{\"split\":\"train\",\"step\":{step},\"oscillation\":{osc}}}\n")
        };
        let text = (0..50).map(|s| line(s, 3.0 / (s + 1) as f64)).collect::<String>() + "{\"cut";
        std::fs::write(dir.path().join("metrics.jsonl"), text).unwrap();
        let row = Row {
            variant: "a<b".into(),
            bits: 2,
            top1: vec![80.0, 81.5],
            oscillation: vec![1.0, 2.0],
            frozen: vec![0.0, 0.0],
            dirs: vec![dir.path().to_path_buf(), dir.path().to_path_buf()],
        };
        let empty = Row { variant: "c".into(), top1: vec![], dirs: vec![], ..row.clone() };
        let picture = svg(&[row, empty.clone()]).unwrap().unwrap();
        assert_eq!(picture.matches("<circle").count(), 2);
        assert!(picture.contains("a&lt;b") && !picture.contains("a<b") && !picture.contains("NaN"));
        assert!(svg(&[empty]).unwrap().is_none());
    }
}
