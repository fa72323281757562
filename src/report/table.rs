//! The layer table: what each quantized weight is, takes and does.

use std::fmt::Write;

use super::collect::{Row, Run};
use super::series::range;
use super::text::{escape, number};

/// A column: its heading, what it means, its value, and whether a bar behind the value shows its size.
struct Column {
    head: &'static str,
    about: &'static str,
    value: fn(&Row) -> Option<f64>,
    bar: bool,
}

fn figure(row: &Row, key: &str) -> Option<f64> {
    row.last.as_ref()?.figure(key)
}

const COLUMNS: &[Column] = &[
    Column { head: "bits", about: "bits a weight", value: |r| r.bits, bar: false },
    Column { head: "codes", about: "number of weights", value: |r| r.codes, bar: false },
    Column { head: "bytes", about: "bytes of codes and scales in the file", value: |r| r.bytes, bar: false },
    Column {
        head: "oscillation %",
        about: "percent of weights whose code keeps turning back",
        value: |r| figure(r, "oscillation"),
        bar: true,
    },
    Column {
        head: "flip rate",
        about: "share of codes that changed at the last step",
        value: |r| figure(r, "flip_rate"),
        bar: false,
    },
    Column {
        head: "near 0.005",
        about: "share of weights within 0.005 steps of their nearest threshold",
        value: |r| r.last.as_ref()?.near("0.005"),
        bar: false,
    },
    Column {
        head: "entropy",
        about: "bits of information a code carries",
        value: |r| figure(r, "entropy"),
        bar: false,
    },
    Column {
        head: "frozen %",
        about: "percent of weights that annealing holds still",
        value: |r| figure(r, "frozen"),
        bar: false,
    },
    Column {
        head: "sensitivity",
        about: "points of top-1 lost when this weight alone is quantized",
        value: |r| r.sensitivity,
        bar: true,
    },
];

/// The table as HTML; nothing where no weight is known.
pub fn html(run: &Run) -> String {
    let rows = &run.rows;
    let mut out = String::new();
    if rows.is_empty() {
        return out;
    }
    let annealed = rows.iter().any(|row| figure(row, "frozen").is_some());
    let trained = rows.iter().any(|row| row.last.is_some());
    // Columns that training alone fills are not there where nothing was trained.
    let wanted = |column: &&Column| match column.head {
        "frozen %" => annealed,
        "oscillation %" | "flip rate" | "near 0.005" | "entropy" => trained,
        _ => true,
    };
    let columns: Vec<&Column> = COLUMNS.iter().filter(wanted).collect();
    out += "<div class=\"scroll\"><table class=\"sort\"><thead><tr><th>name</th><th>shape</th>";
    for column in &columns {
        let _ = write!(out, "<th title=\"{}\">{}</th>", column.about, column.head);
    }
    out += "</tr></thead><tbody>\n";
    let most: Vec<f64> = columns
        .iter()
        .map(|column| range(rows.iter().filter_map(column.value)).map_or(0.0, |(_, high)| high))
        .collect();
    for row in rows {
        let shape: Vec<String> = row.shape.iter().map(usize::to_string).collect();
        let shape = if shape.is_empty() { "–".to_string() } else { shape.join(" × ") };
        let _ = write!(out, "<tr><td>{}</td><td>{shape}</td>", escape(&row.name));
        for (column, most) in columns.iter().zip(&most) {
            let value = (column.value)(row);
            let text = value.map_or("–".to_string(), number);
            let share = value.filter(|v| column.bar && *v > 0.0).map(|v| 100.0 * v / most);
            let _ = match share {
                Some(share) => write!(out, "<td class=\"part\" style=\"--p:{share:.0}%\">{text}</td>"),
                None => write!(out, "<td>{text}</td>"),
            };
        }
        out += "</tr>\n";
    }
    out += "</tbody>";
    let sum = |value: fn(&Row) -> Option<f64>| rows.iter().filter_map(value).sum::<f64>();
    let (codes, bytes) = (sum(|r| r.codes), sum(|r| r.bytes));
    let blank = "<td></td>".repeat(columns.len() - 3);
    let mean = if codes > 0.0 { number(8.0 * bytes / codes) } else { "–".into() };
    let _ = write!(
        out,
        "<tfoot><tr><td>{} quantized weights</td><td></td><td title=\"with the scales\">{mean}</td><td>{}</td>\
         <td>{}</td>{blank}</tr>",
        rows.len(),
        number(codes),
        number(bytes)
    );
    let (tensors, size) = run.rest;
    if tensors > 0 {
        let _ = write!(
            out,
            "<tr><td>{tensors} other tensors: norms, biases, embeddings</td><td></td><td></td><td></td>\
             <td>{size}</td>{blank}</tr>"
        );
    }
    out += "</tfoot></table></div>\n";
    out
}
