//! `qtune bench` as a user meets it: what stands side by side, the keys of its JSON, what it refuses. No figure of time is
//! asserted.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use candle_core::Device;
use qtune::language::{tiny, write_language_model};
use qtune::recipe::{set, Recipe};
use qtune::train::Quiet;
use serde_json::Value;

fn qtune(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qtune"));
    command.current_dir(dir).stdin(Stdio::null()).env("TMPDIR", dir);
    for name in ["HF_HOME", "HF_HUB_CACHE"] {
        command.env(name, dir.join("no-hub"));
    }
    command.arg("bench").args(args).output().unwrap()
}

fn json(out: &Output) -> Value {
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}");
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {said}"))
}

fn refused(out: &Output, words: &[&str]) {
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(2), "{said}");
    let last = said.lines().last().unwrap_or_default();
    assert!(last.starts_with("qtune: ") && words.iter().all(|word| last.contains(word)), "{said}");
}

/// A run folder of a tiny ViT whose weights have two bits and whose activations have `act_bits`.
fn vision(dir: &Path, act_bits: &str) {
    let mut table = Recipe::table("glyphs").unwrap();
    for change in [
        "data.glyphs.train=100",
        "data.glyphs.eval=20",
        "model.hidden=16",
        "model.layers=1",
        "model.heads=2",
        "model.mlp=24",
        "train.batch_size=20",
        "phase.0.steps=3",
        "phase.1.steps=3",
        &format!("activation.bits={act_bits}"),
    ] {
        set(&mut table, change).unwrap();
    }
    std::fs::create_dir(dir).unwrap();
    qtune::quantize::run(&Recipe::resolve(table).unwrap(), dir, &Device::Cpu, &Quiet).unwrap();
}

fn copies_left(dir: &Path) -> usize {
    let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().starts_with("qtune-bench-")).count()
}

/// The keys that every side has, and those of its batches.
fn check(value: &Value, sides: &[&str], batches: &[u64], keys: &[&str]) {
    assert_eq!(value["command"], "bench");
    for key in ["model", "device", "threads", "runs", "params_total", "version", "commit"] {
        assert!(!value[key].is_null(), "{key}: {value}");
    }
    let found: Vec<&str> =
        value["sides"].as_array().unwrap().iter().map(|side| side["name"].as_str().unwrap()).collect();
    assert_eq!(found, sides);
    for side in value["sides"].as_array().unwrap() {
        for key in ["bits", "weights_bytes", "load_s", "first_s", "load_peak_rss_bytes"] {
            assert!(side[key].as_f64().is_some_and(|v| v > 0.0), "{key}: {side}");
        }
        let found: Vec<u64> =
            side["batches"].as_array().unwrap().iter().map(|b| b["batch_size"].as_u64().unwrap()).collect();
        assert_eq!(found, batches);
        for batch in side["batches"].as_array().unwrap() {
            for key in keys.iter().chain(&["peak_rss_bytes", "speedup"]) {
                assert!(batch[*key].as_f64().is_some_and(|v| v > 0.0), "{key}: {batch}");
            }
        }
    }
    assert_eq!(value["sides"][0]["batches"][0]["speedup"], 1.0);
}

const VISION: &[&str] = &["samples_per_s", "ms"];
const LANGUAGE: &[&str] =
    &["prefill_tokens_per_s", "prefill_speedup", "first_token_s", "decode_tokens_per_s", "decode_ms"];

#[test]
fn a_packed_vision_model_stands_beside_its_own_dense_values() {
    let dir = tempfile::tempdir().unwrap();
    // With activations as codes too, which full precision does without.
    for (run, act_bits) in [("float", "32"), ("codes", "4")] {
        vision(&dir.path().join(run), act_bits);
        let value = json(&qtune(dir.path(), &[run, "--runs", "1", "--batch-size", "3,1", "--json", "-q"]));
        assert_eq!(value["kind"], "vision");
        check(&value, &["full precision", "packed"], &[1, 3], VISION);
        let (full, packed) = (&value["sides"][0], &value["sides"][1]);
        assert_eq!((&full["bits"], &packed["bits"]), (&32.into(), &2.into()));
        assert!(full["file_bytes"].is_null() && packed["file_bytes"].as_u64().unwrap() > 0);
        assert!(full["weights_bytes"].as_u64() > packed["weights_bytes"].as_u64());
    }
    refused(&qtune(dir.path(), &["float", "--bits", "4"]), &["--bits", "packed already"]);
    refused(&qtune(dir.path(), &["float", "--seq-len", "4"]), &["--seq-len", "language"]);
    refused(&qtune(dir.path(), &["float", "--batch-size", "0"]), &["--batch-size 0"]);
    refused(&qtune(dir.path(), &["float", "--runs", "0"]), &["--runs 0"]);

    // The full-precision start of the run is packed on the way.
    let args =
        ["float/checkpoints/float", "--runs", "1", "--batch-size", "1", "--bits", "8,2", "--json", "-q"];
    let value = json(&qtune(dir.path(), &args));
    check(&value, &["full precision", "packed, 8 bits", "packed, 2 bits"], &[1], VISION);
    assert_eq!(copies_left(dir.path()), 0);
}

#[test]
fn a_language_model_reads_and_writes_on_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let start = tiny(&Device::Cpu).unwrap();
    write_language_model(&dir.path().join("dense"), &start, &start.weights).unwrap();
    let asked = ["--runs", "1", "--seq-len", "12", "--tokens", "4", "--json", "-q"];
    let value = json(&qtune(dir.path(), &[&["dense", "--bits", "4"], &asked[..]].concat()));
    assert_eq!(value["kind"], "language");
    assert_eq!((&value["seq_len"], &value["tokens"]), (&12.into(), &4.into()));
    check(&value, &["full precision", "packed, 4 bits"], &[1, 8], LANGUAGE);

    let mut table = Recipe::table("llama-w2").unwrap();
    set(&mut table, "phase.0.steps=0").unwrap();
    set(&mut table, "text.limit_eval=4").unwrap();
    let path = dir.path().join("dense");
    qtune::recipe::put(&mut table, "model.path", path.to_string_lossy().into_owned().into()).unwrap();
    let run = dir.path().join("run");
    std::fs::create_dir(&run).unwrap();
    qtune::language::run(&Recipe::resolve(table).unwrap(), &run, &Device::Cpu, &Quiet).unwrap();
    let value = json(&qtune(dir.path(), &[&["run", "--batch-size", "2"], &asked[..]].concat()));
    check(&value, &["full precision", "packed"], &[2], LANGUAGE);
    assert_eq!((&value["sides"][0]["bits"], &value["sides"][1]["bits"]), (&32.into(), &2.into()));
    assert_eq!(copies_left(dir.path()), 0);

    // For people: a line for each side and batch size under a head.
    let out = qtune(dir.path(), &["run", "--runs", "1", "--seq-len", "8", "--tokens", "2", "-q"]);
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert_eq!(said.lines().count(), 6, "{said}");
    assert!(said.contains("full precision") && said.contains("decode tok/s"), "{said}");

    refused(&qtune(dir.path(), &["dense", "--seq-len", "100000"]), &["--seq-len 100000"]);
    refused(&qtune(dir.path(), &["dense", "--tokens", "1"]), &["--tokens 1"]);
}
