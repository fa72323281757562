//! Language models under the trainer: samples that share a row, threads, runs that are killed, the packed
//! base, dropout, what is refused.

use std::path::Path;
use std::process::Command;

use candle_core::{DType, Device};
use qtune::language::{batch_loss, run, tiny};
use qtune::models::Llama;
use qtune::recipe::{put, Recipe};
use qtune::train::Quiet;

/// The built-in task, short.
fn recipe(changes: &[(&str, toml::Value)]) -> Recipe {
    let mut table = Recipe::table("sorting").unwrap();
    let short = [
        ("phase.0.steps", toml::Value::Integer(8)),
        ("phase.0.warmup", toml::Value::Integer(2)),
        ("text.limit_train", toml::Value::Integer(300)),
        ("text.limit_eval", toml::Value::Integer(20)),
        ("train.log_steps", toml::Value::Integer(1)),
        ("train.checkpoint_steps", toml::Value::Integer(3)),
    ];
    for (key, value) in short.iter().chain(changes) {
        put(&mut table, key, value.clone()).unwrap();
    }
    Recipe::resolve(table).unwrap()
}

fn trained(changes: &[(&str, toml::Value)]) -> (serde_json::Value, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let summary = run(&recipe(changes), dir.path(), &Device::Cpu, &Quiet).unwrap();
    let adapter = std::fs::read(dir.path().join("adapter/adapter_model.safetensors")).unwrap_or_default();
    (summary, adapter)
}

fn kind(name: &str) -> (&'static str, toml::Value) {
    ("adapter.kind", name.into())
}

/// Samples packed into rows lose together what they lose each in a row of its own.
#[test]
fn packed_rows_lose_what_their_samples_do() {
    let start = tiny(&Device::Cpu).unwrap();
    let model = Llama::new(&start.config, &start.weights, DType::F32).unwrap();
    let loss = |pack: bool| {
        let text =
            qtune::data::text::TextConfig { seq_len: 128, pack, limit_eval: Some(40), ..Default::default() };
        let data = text.open(&start.tokenizer, 0).unwrap();
        let epoch = data.eval.epoch(0, 0, false);
        let (mut sum, mut count) = (0.0, 0);
        for row in 0..epoch.rows() {
            let (loss, targets) =
                batch_loss(&model, &epoch.batch(row..row + 1).unwrap(), &Device::Cpu).unwrap();
            sum += loss;
            count += targets;
        }
        (sum, count, epoch.rows())
    };
    let (apart, together) = (loss(false), loss(true));
    assert_eq!(apart.1, together.1);
    assert!(together.2 * 2 < apart.2, "{} rows of {}", together.2, apart.2);
    assert!((apart.0 - together.0).abs() < 1e-4 * apart.0, "{} {}", apart.0, together.0);
}

/// Every method learns, leaves the base alone, and what is read back is what was trained.
#[test]
fn every_method_learns() {
    for method in ["bone", "miss", "mini", "lora", "rslora", "dora", "pissa"] {
        let (summary, _) = trained(&[kind(method), ("adapter.rank", toml::Value::Integer(8))]);
        let number = |key: &str| summary[key].as_f64().unwrap();
        assert!(number("final_loss") < number("base_loss") - 0.5, "{method}: {summary}");
        assert!(number("params_trainable") < number("params_total") / 2.0, "{method}");
        assert_eq!(summary["selected"].as_array().unwrap().len(), 21, "{method}");
    }
}

/// Block-wise recomputation, dropout included, gives the same adapter up to rounding, and the same loss.
#[test]
fn checkpointing_sees_the_same_dropout() {
    let run = |checkpointing: bool| {
        let dropout = ("adapter.dropout", toml::Value::Float(0.3));
        let (summary, _) =
            trained(&[kind("miss"), dropout, ("train.checkpointing", toml::Value::Boolean(checkpointing))]);
        summary["final_loss"].as_f64().unwrap()
    };
    let (plain, again) = (run(false), run(true));
    // The same masks: without them the losses differ in the second digit.
    assert!((plain - again).abs() < 1e-4, "{plain} {again}");
}

#[test]
fn a_packed_base_is_trained_over() {
    for (bits, most) in [(8, 0.2), (4, 0.5), (2, 4.0)] {
        let base = [("base.bits", toml::Value::Integer(bits)), ("base.group_size", toml::Value::Integer(32))];
        let (summary, _) = trained(&[kind("miss"), base[0].clone(), base[1].clone()]);
        let number = |key: &str| summary[key].as_f64().unwrap();
        let (plain, _) = trained(&[kind("miss")]);
        assert!(number("final_loss") < number("base_loss") - 0.5, "{bits}: {summary}");
        let worse = number("final_loss") - plain["final_loss"].as_f64().unwrap();
        assert!(worse.abs() < most, "{bits} bits: {worse} worse");
    }
}

fn qtune(args: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_qtune")).args(args).output().unwrap()
}

fn losses(run: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        format!("{} {} {}", value["step"], value["split"], value["loss"])
    };
    text.lines().map(line).collect()
}

const SHORT: [&str; 10] = [
    "finetune",
    "-q",
    "--steps",
    "12",
    "--set",
    "train.log_steps=1",
    "--set",
    "text.limit_train=300",
    "--checkpoint-steps",
    "2",
];

/// One thread or two, killed and resumed: the same losses and the same adapter, to the byte.
#[test]
fn threads_and_a_kill_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let adapter =
        |name: &str| std::fs::read(dir.path().join(name).join("adapter/adapter_model.safetensors")).unwrap();
    for (name, threads) in [("one", "1"), ("two", "2")] {
        let out = path(name);
        let done = qtune(&[&SHORT[..], &["--threads", threads, "--out", &out]].concat());
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
    assert_eq!(losses(&dir.path().join("one")), losses(&dir.path().join("two")));
    assert_eq!(adapter("one"), adapter("two"));
    // Killed once a checkpoint of some steps lies there.
    let out = path("killed");
    let mut child = Command::new(env!("CARGO_BIN_EXE_qtune"))
        .args([&SHORT[..], &["--threads", "2", "--out", &out]].concat())
        .spawn()
        .unwrap();
    let checkpoints = dir.path().join("killed/checkpoints");
    let late = || {
        let entries = std::fs::read_dir(&checkpoints).ok()?;
        let names = entries.filter_map(|e| Some(e.ok()?.file_name().to_string_lossy().into_owned()));
        names.filter(|n| n.starts_with("step-")).max().filter(|n| n.as_str() > "step-00000001")
    };
    while late().is_none() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let done = qtune(&["finetune", "-q", "--threads", "1", "--resume", &out]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(losses(&dir.path().join("one")), losses(&dir.path().join("killed")));
    assert_eq!(adapter("one"), adapter("killed"));
}

/// Wrong use and wrong input: one line, the right code, no run folder left.
#[test]
fn refusals_name_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        std::fs::write(dir.path().join(name), text).unwrap();
        dir.path().join(name).display().to_string()
    };
    let model = dir.path().join("model");
    let start = tiny(&Device::Cpu).unwrap();
    qtune::language::write_language_model(&model, &start, &start.weights).unwrap();
    let model = model.display().to_string();
    let broken = write("broken.jsonl", "{\"text\": \"a b c\"}\n{\"text\": \n");
    let lacking = write("lacking.jsonl", "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \"a\"}\n");
    let text = write("plain.txt", &"one two three. ".repeat(200));
    let unknown = dir.path().join("unknown");
    std::fs::create_dir(&unknown).unwrap();
    std::fs::write(unknown.join("config.json"), "{\"model_type\": \"gpt9\"}").unwrap();
    let unknown = unknown.display().to_string();
    let out = dir.path().join("out").display().to_string();
    let cases: [(&[&str], i32, &[&str]); 9] = [
        (&["--model", &model, "--data", &broken], 4, &["broken.jsonl", "line 2"]),
        (&["--model", &model, "--data", &lacking], 4, &["lacking.jsonl", "line 2", "completion"]),
        (&["--model", &unknown, "--data", &text], 4, &["gpt9", "llama"]),
        (&["--model", &model, "--data", &text, "--targets", "q_porj"], 2, &["q_porj", "q_proj"]),
        (
            &["--model", &model, "--data", &text, "--method", "bone", "--rank", "7"],
            2,
            &["7", "model.layers.0"],
        ),
        (&["--model", &model, "--data", &text, "--method", "full", "--rank", "7"], 2, &["--rank", "full"]),
        (&["--model", &model, "--data", &text, "--method", "bone", "--dropout", "0.1"], 2, &["dropout"]),
        (&["--model", &model, "--data", &text, "--seq-len", "100000"], 2, &["seq_len", "256"]),
        (
            &["--model", &model, "--data", &text, "--lr", "1e30", "--steps", "4", "--clip", "0"],
            1,
            &["step", "samples"],
        ),
    ];
    for (args, code, parts) in cases {
        let short: &[&str] = if args.contains(&"--seq-len") { &[] } else { &["--seq-len", "64"] };
        let done = qtune(&[&["finetune", "-q", "--out", &out], short, args].concat());
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(code), "{args:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{args:?}: {said}");
        assert!(parts.iter().all(|part| said.contains(part)), "{args:?}: {said}");
        let _ = std::fs::remove_dir_all(&out);
    }
}

/// A missing shard and an index that lies.
#[test]
fn broken_shards_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let start = tiny(&Device::Cpu).unwrap();
    let model = dir.path().join("model");
    qtune::language::write_language_model(&model, &start, &start.weights).unwrap();
    std::fs::remove_file(model.join("model.safetensors")).unwrap();
    let index = r#"{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}"#;
    std::fs::write(model.join("model.safetensors.index.json"), index).unwrap();
    let model = model.display().to_string();
    let done = qtune(&["generate", &model, "--prompt", "a"]);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(4), "{said}");
    assert!(said.contains("model-00001-of-00002.safetensors"), "{said}");
}

/// A language model quantized: without training in the memory of a tensor, and trained, better than rounding.
#[test]
fn language_models_are_quantized() {
    let quantized = |changes: &[(&str, toml::Value)]| {
        let mut table = Recipe::table("llama-w2").unwrap();
        let short = [
            ("text.limit_train", toml::Value::Integer(300)),
            ("text.limit_eval", toml::Value::Integer(20)),
            ("text.builtin", "grammar".into()),
            ("text.seq_len", toml::Value::Integer(128)),
            ("phase.0.steps", toml::Value::Integer(0)),
        ];
        for (key, value) in short.iter().chain(changes) {
            put(&mut table, key, value.clone()).unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        let recipe = Recipe::resolve(table).unwrap();
        let summary = run(&recipe, dir.path(), &Device::Cpu, &Quiet).unwrap();
        (summary["fp_loss"].as_f64().unwrap(), summary["q_loss"].as_f64().unwrap(), summary)
    };
    let (full, nearest, _) = quantized(&[("transform.0.fit", "nearest".into())]);
    let (_, best, summary) = quantized(&[]);
    assert!(best < nearest, "{best} {nearest}");
    assert!(summary["compression"].as_f64().unwrap() > 1.0, "{summary}");
    let (_, trained, summary) = quantized(&[("phase.0.steps", toml::Value::Integer(60))]);
    assert!(trained - full < 0.5 * (nearest - full), "{full} {nearest} {trained}");
    let fake = summary["fake_quant_loss"].as_f64().unwrap();
    assert!((fake - trained).abs() < 1e-4, "packed {trained}, fake-quantized {fake}");
    let (_, four, _) = quantized(&[("transform.0.bits", toml::Value::Integer(4))]);
    assert!(four < best, "{four} {best}");
}
