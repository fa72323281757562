//! The page: head, curves, pictures of the quantized weights, their table, the recipe.

use std::fmt::Write;

use serde_json::Value;

use super::bars::Bars;
use super::collect::{Run, Series};
use super::heat::Heat;
use super::series::{smooth, Point};
use super::svg::{Chart, Line};
use super::text::{bytes, escape, number, seconds, short_names};
use super::{table, tasks};

/// Weights that have pictures of their own; beyond them only the table names every weight.
const PICTURES: usize = 160;
/// Points of all the small curves together.
const SMALL_POINTS: usize = 26_000;

/// The whole page.
pub fn page(run: &Run) -> String {
    let mut body = String::new();
    head(&mut body, run);
    let sections = [
        ("Tasks", tasks::html(run)),
        ("Curves", curves(run)),
        ("Oscillation", oscillation(run)),
        ("Scales", scales(run)),
        ("Levels", levels(run)),
        ("Thresholds", distances(run)),
        ("Layers", layers(run)),
    ];
    body += "<nav>";
    for (name, _) in sections.iter().filter(|(_, html)| !html.is_empty()) {
        let _ = write!(body, "<a href=\"#{name}\">{name}</a>");
    }
    body += "<a href=\"#Recipe\">Recipe</a></nav>\n</header>\n";
    for (name, html) in sections.iter().filter(|(_, html)| !html.is_empty()) {
        let _ = write!(body, "<section>\n<h2 id=\"{name}\">{name}</h2>\n{html}</section>\n");
    }
    recipe(&mut body, run);
    let name = escape(&title(run));
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n\
         <link rel=\"icon\" href=\"data:,\">\n<title>{name}: qtune</title>\n<style>\n{}</style>\n</head>\n\
         <body>\n{body}<footer>qtune {} (commit {}). This page needs no network.</footer>\n\
         <script>\n{}</script>\n</body>\n</html>\n",
        include_str!("style.css"),
        env!("CARGO_PKG_VERSION"),
        escape(env!("QTUNE_COMMIT")),
        include_str!("page.js"),
    )
}

fn title(run: &Run) -> String {
    let name = run.recipe.1.get("name").and_then(toml::Value::as_str).unwrap_or_default();
    if name.is_empty() {
        run.folder.clone()
    } else {
        name.to_string()
    }
}

/// A figure of summary.json as people read it.
fn shown(key: &str, value: f64) -> String {
    match key {
        _ if key.ends_with("_bytes") => bytes(value),
        "wall_s" => seconds(value),
        "compression" => format!("{} times", number((value * 10.0).round() / 10.0)),
        "average_accuracy" | "forgetting" => format!("{value:.2}"),
        "oscillation" | "frozen" => format!("{} %", number((value * 100.0).round() / 100.0)),
        _ if key.contains("top1") || key.contains("top5") => format!("{value:.2} %"),
        _ if key.ends_with("_per_s") || key.contains("_per_s_") => format!("{value:.0}/s"),
        _ => number(value),
    }
}

/// The large figures at the head of a finished run: key and name, then the figure it is to be read beside.
const TILES: &[(&str, &str, &str, &str)] = &[
    ("q_top1", "Top-1, packed", "fp_top1", "full precision"),
    ("final_loss", "Loss, held out", "base_loss", "before"),
    ("average_accuracy", "Average accuracy", "forgetting", "forgetting"),
    ("packed_bytes", "Packed file", "fp_bytes", "full precision"),
    ("adapter_bytes", "Adapter", "params_trainable", "trainable"),
    ("compression", "Smaller by", "params_total", "parameters:"),
    ("oscillation", "Oscillating weights", "frozen", "frozen"),
    ("steps", "Steps", "wall_s", "in"),
    ("train_samples_per_s", "Training", "infer_samples_per_s_packed", "packed inference"),
    ("tokens_per_s", "Training, tokens", "", ""),
    ("peak_rss_bytes", "Peak memory", "threads", "threads:"),
];

fn head(out: &mut String, run: &Run) {
    let summary = run.summary.as_ref();
    let recipe = &run.recipe.1;
    let (class, state) = if summary.is_some() { ("", "finished") } else { ("running", "running") };
    let _ =
        write!(out, "<header>\n<h1>{} <small class=\"{class}\">{state}</small></h1>\n", escape(&title(run)));
    if let Some(about) = recipe.get("about").and_then(toml::Value::as_str).filter(|a| !a.is_empty()) {
        let _ = writeln!(out, "<p>{}</p>", escape(about));
    }
    out.push_str("<div class=\"facts\">");
    for (name, value) in facts(run) {
        let _ = write!(out, "<span>{name} <b>{}</b></span>", escape(&value));
    }
    out.push_str("</div>\n<div class=\"tiles\">");
    let mut tile = |name: &str, value: String, beside: String| {
        let _ = write!(out, "<div><span>{name}</span><b>{value}</b><em>{beside}</em></div>");
    };
    if let Some(summary) = summary {
        let figure = |key: &str| summary.get(key).and_then(Value::as_f64).map(|v| shown(key, v));
        for (key, name, other, words) in TILES {
            if let Some(value) = figure(key) {
                let beside = figure(other).map(|v| format!("{words} {v}")).unwrap_or_default();
                tile(name, value, beside);
            }
        }
    } else {
        let last = run.series.values().filter_map(|s| s.points.last()).map(|p| p.0).fold(0.0, f64::max);
        tile("Step", number(last), run.phases.last().map(|p| escape(&p.1)).unwrap_or_default());
        let keys = [
            ("train", "loss", "Training loss"),
            ("eval", "loss", "Loss, held out"),
            ("eval", "top1", "Top-1"),
        ];
        for (split, key, name) in keys.into_iter().chain([("train", "oscillation", "Oscillating weights")]) {
            if let Some(value) = run.last(split, key) {
                tile(name, shown(key, value), "last".into());
            }
        }
    }
    out.push_str("</div>\n");
    if run.spoiled > 0 {
        let _ = writeln!(out, "<p>{} lines of metrics.jsonl could not be read.</p>", run.spoiled);
    }
}

/// What kind of run it is: from its summary, or, while it runs, from its recipe.
fn facts(run: &Run) -> Vec<(&'static str, String)> {
    let recipe = &run.recipe.1;
    let said = |key: &str| match run.summary.as_ref()?.get(key)? {
        Value::String(text) => Some(text.clone()),
        Value::Null => None,
        other => Some(other.to_string()),
    };
    let first = |table: &str| recipe.get(table).and_then(|t| t.get(0)).or(recipe.get(table));
    let plain = |value: Option<&toml::Value>| {
        value.map(|v| v.as_str().map(str::to_string).unwrap_or_else(|| v.to_string()))
    };
    let model = recipe.get("model");
    let quantizes = first("transform").and_then(|t| t.get("bits")).is_some();
    let fresh = || plain(model.and_then(|m| m.get("kind"))).map(|kind| format!("new {kind}"));
    let bits = |n: String| if n == "32" { "float".to_string() } else { format!("{n} bits") };
    let facts = [
        ("command", said("command").or_else(|| quantizes.then(|| "quantize".to_string()))),
        ("method", said("method").or_else(|| plain(first("transform").and_then(|t| t.get("kind"))))),
        ("model", said("model").or_else(|| plain(model.and_then(|m| m.get("path")))).or_else(fresh)),
        ("weights", said("bits").or_else(|| plain(first("transform").and_then(|t| t.get("bits")))).map(bits)),
        (
            "activations",
            said("act_bits")
                .or_else(|| plain(recipe.get("activation").and_then(|a| a.get("bits"))))
                .map(bits),
        ),
        ("seed", said("seed").or_else(|| plain(recipe.get("seed")))),
        ("device", said("device")),
        ("commit", said("commit").or_else(|| Some(env!("QTUNE_COMMIT").to_string()))),
        ("folder", Some(run.folder.clone()).filter(|f| !f.is_empty())),
    ];
    facts.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
}

/// How a key of metrics is shown.
struct Key {
    key: &'static str,
    title: &'static str,
    unit: &'static str,
    log: bool,
    /// Noisy from step to step: its mean is drawn over it.
    noisy: bool,
    /// Units of the key in one of what is shown.
    per: f64,
}

const fn key(key: &'static str, title: &'static str, unit: &'static str) -> Key {
    Key { key, title, unit, log: false, noisy: false, per: 1.0 }
}

const CURVES: &[Key] = &[
    Key { noisy: true, ..key("loss", "Loss", "") },
    Key { noisy: true, ..key("top1", "Top-1", "%") },
    key("top5", "Top-5", "%"),
    key("lr", "Learning rate", "a step"),
    Key { noisy: true, log: true, ..key("grad_norm", "Gradient norm", "") },
    key("samples_per_s", "Throughput", "samples/s"),
    key("tokens_per_s", "Throughput", "tokens/s"),
    Key { per: 1_048_576.0, ..key("peak_rss_bytes", "Peak memory", "MiB") },
];

const OSCILLATION: &[Key] = &[
    key("oscillation", "Oscillating weights", "%"),
    key("frozen", "Frozen weights", "%"),
    key("osc_ema_mean", "Mean of the exponential means of turns", ""),
    Key { noisy: true, ..key("flip_rate", "Codes changed at a step", "share") },
];

/// Keys that are no curve: an axis of their own, or always the same.
const LEFT_OUT: &[&str] = &["epoch", "samples"];

fn curves(run: &Run) -> String {
    let mut html = String::new();
    for shown in CURVES {
        html += &curve(run, shown.key, shown).html();
    }
    let known = |k: &str| {
        CURVES.iter().chain(OSCILLATION).any(|known| known.key == k)
            || LEFT_OUT.contains(&k)
            || k.starts_with(tasks::PREFIX)
    };
    let mut others: Vec<&str> = run.series.keys().map(|(_, k)| k.as_str()).filter(|k| !known(k)).collect();
    others.sort_unstable();
    others.dedup();
    for other in others {
        let mut chart = curve(run, other, &key("", "", ""));
        chart.title = other.to_string();
        html += &chart.html();
    }
    grid(html, "")
}

/// The chart of one key: a curve for each split that has it.
fn curve(run: &Run, name: &str, shown: &Key) -> Chart {
    let mut lines = Vec::new();
    let found = run.series.iter().filter(|((_, k), _)| k == name);
    for (i, ((split, _), Series { points, labels })) in found.enumerate() {
        // The colour of a split is the same in every chart.
        let colour = match split.as_str() {
            "train" => 0,
            "eval" => 1,
            _ => 2 + i,
        };
        let points: Vec<Point> = points.iter().map(|p| (p.0, p.1 / shown.per)).collect();
        let smoothed = shown.noisy && labels.is_empty() && points.len() > 30;
        let line = |points, faint| Line { name: split.clone(), points, labels: Vec::new(), colour, faint };
        if smoothed {
            lines.push(line(points.clone(), true));
            lines.push(line(smooth_phases(&points, &run.phases), false));
        } else {
            lines.push(Line { labels: labels.clone(), ..line(points, false) });
        }
    }
    Chart {
        title: shown.title.into(),
        unit: shown.unit.into(),
        lines,
        marks: run.phases.clone(),
        log: shown.log,
        ..Chart::default()
    }
}

/// Each phase smoothed by itself: its loss may be another one.
fn smooth_phases(points: &[Point], phases: &[(f64, String)]) -> Vec<Point> {
    let mut out = Vec::with_capacity(points.len());
    let mut rest = points;
    for (step, _) in phases {
        let (before, after) = rest.split_at(rest.partition_point(|p| p.0 <= *step));
        out.extend(smooth(before));
        rest = after;
    }
    out.extend(smooth(rest));
    out
}

fn grid(html: String, class: &str) -> String {
    wrapped(html, format!("grid {class}").trim())
}

fn wrapped(html: String, class: &str) -> String {
    match html.is_empty() {
        true => html,
        false => format!("<div class=\"{class}\">\n{html}</div>\n"),
    }
}

fn said(words: &str, html: String) -> String {
    if html.is_empty() {
        html
    } else {
        format!("<p>{words}</p>\n{html}")
    }
}

fn oscillation(run: &Run) -> String {
    let mut html = String::new();
    for shown in OSCILLATION {
        html += &curve(run, shown.key, shown).html();
    }
    let mean = |key: &str, name: &str, colour: usize, per: f64| {
        let points = run.means.get(key).into_iter().flatten().map(|p| (p.0, p.1 / per)).collect();
        Line { name: name.to_string(), points, colour, ..Line::default() }
    };
    let near: Vec<Line> = run
        .means
        .keys()
        .filter_map(|key| Some((key, key.strip_prefix("near_threshold/")?)))
        .enumerate()
        .map(|(i, (key, distance))| mean(key, &format!("within {distance} steps"), i, 0.01))
        .collect();
    let chart = |title: &str, unit: &str, lines| Chart {
        title: title.into(),
        unit: unit.into(),
        lines,
        marks: run.phases.clone(),
        ..Chart::default()
    };
    html += &chart("Weights near a threshold", "%", near).html();
    let flips = vec![mean("grad_flip_rate", "all weights", 0, 0.01)];
    html += &chart("Gradient signs flipped within 0.005 steps of a threshold", "%", flips).html();
    let entropy = vec![mean("entropy", "all weights", 0, 1.0)];
    html += &chart("Entropy of the codes", "bits", entropy).html();
    let names: Vec<&str> = run.layers.keys().map(String::as_str).collect();
    let named = run.layers.values().zip(&names).zip(short_names(&names));
    let rows = named
        .filter(|((layer, _), _)| !layer.oscillation.is_empty())
        .map(|((layer, name), short)| (short, name.to_string(), layer.oscillation.clone()))
        .take(PICTURES)
        .collect();
    let heat = Heat { unit: "%".into(), rows }.html("Oscillating weights, layer by layer");
    let html = grid(html, "") + &heat;
    said(
        "A weight turns when its code changes against the direction of its last change; it oscillates when the \
         exponential mean of its turns (momentum 0.01) lies above 0.005.",
        html,
    )
}

fn scales(run: &Run) -> String {
    let names: Vec<&str> = run.layers.keys().map(String::as_str).collect();
    let curves: usize = run.layers.values().take(PICTURES).map(|layer| layer.scales.len()).sum();
    let most = (SMALL_POINTS / curves.max(1)).clamp(16, 100);
    let mut html = String::new();
    for ((layer, name), short) in run.layers.values().zip(&names).zip(short_names(&names)).take(PICTURES) {
        let rows = layer.scales.iter().enumerate();
        let lines = rows
            .map(|(i, (row, points))| Line {
                name: format!("row {row}"),
                points: points.clone(),
                colour: i,
                ..Line::default()
            })
            .collect();
        let chart =
            Chart { title: short, hint: name.to_string(), lines, small: true, most, ..Chart::default() };
        html += &chart.html();
    }
    let rows = run.layers.values().map(|layer| layer.scales.len()).max().unwrap_or(0);
    let mut legend = String::new();
    for i in (0..rows).filter(|_| rows > 1) {
        let name = match i {
            0 => "first of these rows".to_string(),
            i if i + 1 == rows => "last".to_string(),
            i => (i + 1).to_string(),
        };
        let _ = write!(legend, "<span class=\"c{}\"><i></i>{name}</span>", i % 8);
    }
    let words = format!(
        "The scales of a few rows of each weight over the steps: what one code stands for.{}",
        more(run)
    );
    said(&words, wrapped(legend, "legend head") + &grid(html, "many"))
}

fn more(run: &Run) -> String {
    match run.rows.len().saturating_sub(PICTURES) {
        0 => String::new(),
        n => format!(" The first {PICTURES} weights; {n} more are in the table."),
    }
}

/// Bars for every weight that `shares` gives some of.
fn pictures<'a>(
    run: &'a Run,
    shares: impl Fn(&'a super::layers::Layer) -> &'a [f64],
    ends: (&str, &str),
    colour: usize,
) -> String {
    let names: Vec<&str> = run.rows.iter().map(|row| row.name.as_str()).collect();
    let mut html = String::new();
    for (row, short) in run.rows.iter().zip(short_names(&names)).take(PICTURES) {
        let Some(layer) = &row.last else { continue };
        let shares = shares(layer).to_vec();
        let ends = (ends.0.to_string(), ends.1.to_string());
        html += &Bars { title: short, hint: row.name.clone(), shares, ends, colour }.html();
    }
    grid(html, "many")
}

fn at_step(run: &Run) -> String {
    run.layers_step.map(|step| format!(" At step {}.", number(step))).unwrap_or_default()
}

fn levels(run: &Run) -> String {
    let html = pictures(run, |layer| &layer.levels, ("lowest level", "highest"), 0);
    said(&format!("The share of weights on each level.{}{}", at_step(run), more(run)), html)
}

fn distances(run: &Run) -> String {
    let html = pictures(run, |layer| &layer.distance, ("0 steps", "0.5 or more"), 2);
    said(
        &format!(
            "The share of weights by the distance to their nearest threshold, in steps: those at the left may \
             change their code at any moment.{}{}",
            at_step(run),
            more(run)
        ),
        html,
    )
}

fn layers(run: &Run) -> String {
    let measured = run.rows.iter().any(|row| row.sensitivity.is_some());
    let words = match measured {
        true => "Sensitivity: points of top-1 lost when this weight alone is quantized.",
        false => "Sensitivity was not measured in this run.",
    };
    said(&format!("Every quantized weight.{} {words}", at_step(run)), table::html(run))
}

fn recipe(out: &mut String, run: &Run) {
    out.push_str("<section>\n<h2 id=\"Recipe\">Recipe</h2>\n");
    let _ = writeln!(
        out,
        "<details><summary>recipe.toml, as it was resolved</summary><pre>{}</pre></details>",
        escape(&run.recipe.0)
    );
    if let Some(summary) = &run.summary {
        let text = serde_json::to_string_pretty(summary).unwrap_or_default();
        let _ = writeln!(
            out,
            "<details><summary>summary.json, every figure</summary><pre>{}</pre></details>",
            escape(&text)
        );
    }
    out.push_str("</section>\n");
}
