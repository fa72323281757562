//! The picture of a selection: every unit by its layer and its score on a logarithmic axis, in a page that needs
//! nothing but itself, with the share that each role got.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::config::Score;
use super::file::{Entry, Selection};
use crate::report::text::{escape, number};

/// Colours that people with the usual forms of colour blindness tell apart (Okabe and Ito 2008), darkened
/// where they would be faint on white.
const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#b58900", "#a8327a", "#2f9bd0", "#6b4fbb", "#444444"];
const WIDTH: f64 = 920.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 40.0;

/// The number of the layer in a name, its first segment that is one (of 16 bits: a larger one counts something
/// else), and what comes behind it.
fn place(entry: &Entry) -> (Option<usize>, String) {
    let path = entry.param.strip_suffix(".weight").unwrap_or(&entry.param);
    let segments: Vec<&str> = path.split('.').collect();
    let layer = segments.iter().position(|s| s.parse::<u16>().is_ok());
    // An expert that is a tensor of its own has a number too; experts share a name.
    let behind = layer.map_or(0, |at| at + 1);
    let rest: Vec<&str> = segments[behind..].iter().copied().filter(|s| s.parse::<u16>().is_err()).collect();
    let name = match rest.last() {
        Some(last) if entry.role == super::Role::Experts => format!("experts {last}"),
        Some(_) => rest[rest.len().saturating_sub(2)..].join("."),
        None => path.to_string(),
    };
    (layer.and_then(|at| segments[at].parse::<u16>().ok()).map(usize::from), name)
}

/// What is drawn of an entry: its score, where the ranking is by one, else its condition number.
fn height(entry: &Entry) -> Option<f64> {
    entry.score.filter(|v| *v > 0.0 && v.is_finite())
}

/// The picture alone, as an SVG file; nothing where no unit has a score.
pub fn svg(selection: &Selection) -> Option<String> {
    let drawn: Vec<(&Entry, f64)> =
        selection.tensors.iter().filter_map(|entry| Some((entry, height(entry)?))).collect();
    let (low, high) = drawn
        .iter()
        .fold((f64::INFINITY, 0f64), |(low, high), (_, value)| (low.min(*value), high.max(*value)));
    if drawn.is_empty() {
        return None;
    }
    let (low, high) = ((low / 1.3).log10(), (high * 1.3).log10());
    let last = drawn.iter().filter_map(|(entry, _)| place(entry).0).max().unwrap_or(0);
    let outside = drawn.iter().any(|(entry, _)| place(entry).0.is_none());
    let columns = (last + 1 + usize::from(outside)) as f64;
    let x = |layer: Option<usize>| {
        LEFT + (layer.unwrap_or(last + 1) as f64 + 0.5) / columns * (WIDTH - LEFT - RIGHT)
    };
    let mut names: BTreeMap<String, usize> = BTreeMap::new();
    for (entry, _) in &drawn {
        let next = names.len();
        names.entry(place(entry).1).or_insert(next);
    }
    let rows = names.len().div_ceil(5) as f64;
    let (top, bottom) = (TOP + 18.0 * rows, HEIGHT - BOTTOM + 18.0 * rows);
    let y = |value: f64| bottom - (value.log10() - low) / (high - low).max(1e-9) * (bottom - top);
    let mut body = String::new();
    let what = match selection.options.score {
        Score::Kappa => "condition number",
        Score::Logvol => "deficit of log-volume",
    };
    let _ = write!(body, "<text class=\"h\" x=\"{LEFT}\" y=\"22\">{what} by layer; filled: selected</text>");
    for (name, i) in &names {
        let (at, row) = (LEFT + (i % 5) as f64 * 168.0, (i / 5) as f64);
        let line = TOP + 18.0 * row;
        let colour = COLOURS[i % COLOURS.len()];
        let _ = write!(
            body,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\" fill=\"{colour}\"/>",
            at + 4.0,
            line - 4.0
        );
        let _ = write!(body, "<text x=\"{:.1}\" y=\"{line:.1}\">{}</text>", at + 13.0, escape(name));
    }
    let span = high.ceil() as i32 - low.floor() as i32;
    let every = (span / 8).max(1);
    for exponent in (low.floor() as i32)..=(high.ceil() as i32) {
        for (mantissa, main) in [(1.0, true), (2.0, false), (5.0, false)] {
            let value = mantissa * 10f64.powi(exponent);
            let level = value.log10();
            let shown = if main { exponent.rem_euclid(every) == 0 } else { span <= 2 };
            if level >= low && level <= high && shown {
                let at = y(value);
                let _ = write!(body, "<path class=\"g\" d=\"M{LEFT} {at:.1}H{}\"/>", WIDTH - RIGHT);
                let text = number(value);
                let _ = write!(
                    body,
                    "<text class=\"t e\" x=\"{}\" y=\"{:.1}\">{text}</text>",
                    LEFT - 8.0,
                    at + 4.0
                );
            }
        }
    }
    let step = (last / 16 + 1).max(1);
    for layer in (0..=last).step_by(step) {
        let at = x(Some(layer));
        let _ = write!(body, "<text class=\"t m\" x=\"{at:.1}\" y=\"{:.1}\">{layer}</text>", bottom + 18.0);
    }
    if outside {
        let at = x(None);
        let _ = write!(body, "<text class=\"t m\" x=\"{at:.1}\" y=\"{:.1}\">other</text>", bottom + 18.0);
    }
    for (entry, value) in &drawn {
        let (layer, name) = place(entry);
        let i = names.get(&name).copied().unwrap_or(0);
        // Kinds stand beside one another, so that equal values do not hide.
        let aside = (i as f64 + 0.5) / names.len() as f64 - 0.5;
        let at = x(layer) + aside * (0.7 * (WIDTH - LEFT - RIGHT) / columns).min(26.0);
        let colour = COLOURS[i % COLOURS.len()];
        let fill = if entry.selected { colour } else { "#fff" };
        let rank = entry.rank.map(|r| format!(", place {r}")).unwrap_or_default();
        let _ = write!(
            body,
            "<circle cx=\"{at:.1}\" cy=\"{:.1}\" r=\"3.4\" fill=\"{fill}\" stroke=\"{colour}\"><title>{} {}{rank}</title></circle>",
            y(*value),
            escape(&entry.name),
            number(*value)
        );
    }
    let tall = bottom + BOTTOM;
    let style =
        "text{font:12px system-ui,sans-serif;fill:#333}.h{font-size:15px;font-weight:600}.t{fill:#667}\
                 .e{text-anchor:end}.m{text-anchor:middle}.g{stroke:#e3e6ea;fill:none}";
    Some(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {tall:.0}\" width=\"{WIDTH}\" height=\"{tall:.0}\">\
         <style>{style}</style><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>{body}</svg>\n"
    ))
}

/// The page: the picture, the share of each role, the ranking. It needs no network.
pub fn page(selection: &Selection, model: &str) -> String {
    let mut body = String::new();
    let total = selection.total_params.max(1) as f64;
    let _ = writeln!(
        body,
        "<header><h1>{}</h1><p>{} of {} units selected, {} of {} parameters ({:.2} %)</p></header>",
        escape(model),
        selection.selected().count(),
        selection.tensors.len(),
        selection.selected_params,
        selection.total_params,
        100.0 * selection.selected_params as f64 / total
    );
    body += &svg(selection).unwrap_or_default();
    body += "<h2>Roles</h2>\n<table><tr><th>role</th><th>selected</th><th>units</th><th>parameters</th><th>share of the selection</th></tr>";
    let chosen = selection.selected_params.max(1) as f64;
    for (role, selected, units, numel) in selection.shares() {
        let share = 100.0 * numel as f64 / chosen;
        let _ = write!(
            body,
            "<tr><td>{}</td><td>{selected}</td><td>{units}</td><td>{numel}</td><td>{share:.1} %</td></tr>",
            role.name()
        );
    }
    body += "</table>\n<h2>Ranking</h2>\n<table><tr><th>place</th><th>kappa</th><th>score</th><th>shape</th><th>status</th><th>name</th></tr>";
    for entry in &selection.tensors {
        let figure = |value: Option<f64>| value.map(number).unwrap_or_else(|| "–".into());
        let place = entry.rank.map(|r| r.to_string()).unwrap_or_else(|| "–".into());
        let [rows, cols] = entry.shape;
        let class = if entry.selected { " class=\"s\"" } else { "" };
        let _ = write!(
            body,
            "<tr{class}><td>{place}</td><td>{}</td><td>{}</td><td>{rows} × {cols}</td><td>{}</td><td>{}</td></tr>",
            figure(entry.kappa),
            figure(entry.score),
            entry.status.name(),
            escape(&entry.name)
        );
    }
    body += "</table>\n";
    let style = "body{font:14px system-ui,sans-serif;color:#222;max-width:960px;margin:24px auto;padding:0 16px}\
                 svg{max-width:100%;height:auto}table{border-collapse:collapse}td,th{padding:3px 10px;text-align:right;\
                 border-bottom:1px solid #e3e6ea}td:last-child,th:last-child{text-align:left}.s{background:#eef4fa;font-weight:600}";
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width,initial-scale=1\">\n<link rel=\"icon\" href=\"data:,\">\n<title>{}: condition numbers: \
         qtune</title>\n<style>{style}</style>\n</head>\n<body>\n{body}<footer>qtune {} (commit {}). This page needs no \
         network.</footer>\n</body>\n</html>\n",
        escape(model),
        env!("CARGO_PKG_VERSION"),
        escape(env!("QTUNE_COMMIT")),
    )
}

#[cfg(test)]
mod tests {
    use super::super::spectrum::{Route, Status};
    use super::super::{KappaConfig, Role};
    use super::*;

    fn entry(name: &str, kappa: f64, rank: usize) -> Entry {
        Entry {
            name: name.into(),
            param: name.into(),
            index: None,
            role: Role::Linear,
            shape: [4, 2],
            kappa: Some(kappa),
            score: Some(kappa),
            rank: Some(rank),
            selected: rank == 1,
            status: Status::Ok,
            route: Route::Direct,
            bound: 0.0,
            sigma_max: kappa,
            sigma_min: 1.0,
            log_sum: 0.0,
            frobenius: 1.0,
            source: "f32".into(),
            hash: String::new(),
            aliases: Vec::new(),
        }
    }

    fn selection(tensors: Vec<Entry>) -> Selection {
        Selection {
            format: String::new(),
            model_hash: String::new(),
            seed: 0,
            options: KappaConfig::default(),
            total_params: 32,
            selected_params: 8,
            tensors,
        }
    }

    #[test]
    fn a_page_holds_every_unit_once_and_no_foreign_markup() {
        let selection = selection(vec![
            entry("model.layers.0.self_attn.k_proj.weight", 3.0, 1),
            entry("model.layers.1.self_attn.k_proj.weight", 5e4, 2),
            entry("head<b>.weight", 1.0, 3),
        ]);
        let page = page(&selection, "a<model>");
        assert_eq!(page.matches("r=\"3.4\"").count(), 3);
        assert_eq!(page.matches(" r=\"3.4\" fill=\"#fff\"").count(), 2);
        for part in
            ["a&lt;model&gt;", "head&lt;b&gt;", "8 of 32 parameters (25.00 %)", "self_attn.k_proj", "other"]
        {
            assert!(page.contains(part), "no {part:?}");
        }
        assert!(!page.contains("NaN") && !page.contains("<model>") && !page.contains("<b>"));
    }

    #[test]
    fn numbers_too_large_for_a_layer_are_none() {
        for huge in [u64::MAX.to_string(), "99999999999999999999999".into(), "65536".into()] {
            let name = format!("model.layers.{huge}.up_proj.weight");
            let plain = entry("model.layers.3.up_proj.weight", 2.0, 2);
            assert_eq!(place(&plain), (Some(3), "up_proj".into()));
            assert_eq!(place(&entry(&name, 1.0, 1)), (None, format!("{huge}.up_proj")));
            let drawn = svg(&selection(vec![entry(&name, 1.0, 1), plain])).unwrap();
            assert!(drawn.contains(">other</text>") && !drawn.contains("NaN"), "{drawn}");
        }
        let last = svg(&selection(vec![entry("layers.65535.w", 1.0, 1)])).unwrap();
        assert!(last.contains(">61440</text>"), "{last}");
    }

    #[test]
    fn nothing_to_draw_and_one_value() {
        assert!(svg(&selection(Vec::new())).is_none());
        let one = svg(&selection(vec![entry("w", 1.0, 1)])).unwrap();
        assert!(!one.contains("NaN") && !one.contains("inf"), "{one}");
    }
}
