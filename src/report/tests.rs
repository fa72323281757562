//! The page of a made-up run, whole and in pieces.

use serde_json::{json, Value};

use super::*;

const RECIPE: &str = "name = \"<b>made up</b>\"\nseed = 7\n[model]\nkind = \"vit\"\n[[transform]]\nkind = \"statsq\"\nbits = 2\n";

/// Lines of a run of `steps` logged steps over `weights` weights.
fn metrics(steps: usize, weights: usize) -> String {
    let mut text = String::new();
    for i in 1..=steps {
        let (step, phase) = (10 * i, if i * 3 < steps { "float" } else { "quantized" });
        let wave = (i as f64 * 0.7).sin();
        let train = json!({"step": step, "split": "train", "phase": phase, "epoch": 0.1, "loss": 2.0 + wave,
            "top1": 50.0 + wave, "lr": 1e-3, "grad_norm": 1.0 + wave.abs() * 50.0, "oscillation": 3.0,
            "osc_ema_mean": 1e-4, "flip_rate": 0.01, "frozen": 12.0, "samples_per_s": 900.0,
            "peak_rss_bytes": 1u64 << 28, "novel_key": wave});
        let layers: Vec<Value> = (0..weights)
            .map(|w| {
                json!({"name": format!("vit.encoder.layer.{w}.output.dense.weight"), "bits": 2, "codes": 18432,
                    "oscillation": 4.0 + wave + w as f64, "osc_ema_mean": 0.0004, "flip_rate": 0.001,
                    "near_threshold": {"0.003": 0.004, "0.005": 0.007}, "grad_flip_rate": null, "frozen": 97.3,
                    "scale_rows": [0, 31, 63, 95], "scales": [0.11 + wave, 0.12, 0.1 + wave, 0.09],
                    "levels": [0.21, 0.29, 0.29, 0.21], "entropy": 1.98, "distance": vec![0.05; 20]})
            })
            .collect();
        let layers = json!({"step": step, "split": "layers", "phase": phase, "layers": layers});
        text += &format!("{train}\n{layers}\n");
    }
    let eval =
        json!({"step": 10 * steps, "split": "eval", "what": "packed & read", "loss": 1.0, "top1": 60.0});
    text + &format!("{eval}\n")
}

fn page_of(files: &[(&str, &str)]) -> String {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    write(dir.path()).unwrap();
    std::fs::read_to_string(dir.path().join(FILE_NAME)).unwrap()
}

#[test]
fn every_section_of_a_finished_run() {
    let summary = json!({"command": "quantize", "model": "</script>", "seed": 7, "bits": 2, "act_bits": 32,
        "q_top1": 97.85, "fp_top1": 97.75, "packed_bytes": 77824, "commit": "abc", "wall_s": 57.0, "steps": 40});
    let sensitivity =
        r#"{"layers":[{"name":"vit.encoder.layer.1.output.dense.weight","drop":1.25,"top1":96.0}]}"#;
    let page = page_of(&[
        ("recipe.toml", RECIPE),
        ("metrics.jsonl", &metrics(40, 3)),
        ("summary.json", &summary.to_string()),
        ("sensitivity.json", sensitivity),
    ]);
    for part in [
        "&lt;b&gt;made up&lt;/b&gt; <small class=\"\">finished",
        "command <b>quantize</b>",
        "model <b>&lt;/script&gt;</b>",
        "weights <b>2 bits</b>",
        "activations <b>float</b>",
        "seed <b>7</b>",
        "commit <b>abc</b>",
        "<b>97.85 %</b><em>full precision 97.75 %",
        "<b>76.0 KiB</b>",
        "<b>Loss</b>",
        "<b>Top-1</b> <span class=\"unit\">%",
        "<b>Learning rate</b>",
        "<b>Gradient norm</b>",
        "<b>Throughput</b>",
        "<b>Peak memory</b> <span class=\"unit\">MiB",
        "<b>novel_key</b>",
        "eval 60 at step 400 packed &amp; read",
        "<b>Oscillating weights</b>",
        "<b>Frozen weights</b>",
        "within 0.005 steps",
        "vit.encoder.layer.2.output.dense.weight: last",
        "id=\"Scales\"",
        "row 63: last",
        "21 %, 29 %, 29 %, 21 %",
        "id=\"Thresholds\"",
        "<td class=\"part\" style=\"--p:100%\">1.25</td>",
        "<td>vit.encoder.layer.0.output.dense.weight</td><td>–</td><td>2</td><td>18432</td><td>4608</td>",
        "recipe.toml, as it was resolved",
        "name = &quot;&lt;b&gt;made up&lt;/b&gt;&quot;",
        "prefers-color-scheme:dark",
    ] {
        assert!(page.contains(part), "no {part:?} in the page");
    }
    for foreign in ["http:", "https:", "<b>made", "url(", "@import", "src="] {
        assert!(!page.contains(foreign), "{foreign:?} in the page");
    }
    let (drawn, _) = page.split_once("<script>").unwrap();
    assert!(!drawn.contains("NaN") && !drawn.contains("inf "));
    assert_eq!(page.matches("</script>").count(), 1);
    for tag in ["figure", "svg", "section", "div", "table", "details", "g"] {
        let opened = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
        assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "{tag}");
    }
}

#[test]
fn a_run_in_the_middle_of_a_line_has_its_page() {
    let mut text = metrics(5, 1);
    text.truncate(text.len() - 20);
    let page = page_of(&[("recipe.toml", RECIPE), ("metrics.jsonl", &text)]);
    for part in [
        "class=\"running\">running",
        "command <b>quantize</b>",
        "<span>Step</span><b>50</b>",
        "id=\"Layers\"",
    ] {
        assert!(page.contains(part), "no {part:?}");
    }
    assert!(!page.contains("could not be read"));
    let spoiled = page_of(&[("metrics.jsonl", "what\n{\"step\":1,\"split\":\"train\",\"loss\":1}\n")]);
    assert!(spoiled.contains("1 lines of metrics.jsonl could not be read"));
    assert!(page_of(&[]).contains("id=\"Recipe\""));
}

#[test]
fn long_runs_of_large_models_stay_small() {
    let page = page_of(&[("recipe.toml", RECIPE), ("metrics.jsonl", &metrics(1500, 74))]);
    assert!(page.len() < 1_000_000, "{} bytes", page.len());
    let wide = page_of(&[("recipe.toml", RECIPE), ("metrics.jsonl", &metrics(40, 400))]);
    assert!(wide.len() < 1_000_000, "{} bytes", wide.len());
    assert!(wide.contains("240 more are in the table"));
}

#[test]
fn the_summary_of_a_run_that_ends_comes_before_its_file() {
    let dir = tempfile::tempdir().unwrap();
    finish(dir.path(), &json!({"command": "quantize", "q_top1": 12.5})).unwrap();
    let page = std::fs::read_to_string(dir.path().join(FILE_NAME)).unwrap();
    assert!(page.contains("finished") && page.contains("12.50 %"));
}
