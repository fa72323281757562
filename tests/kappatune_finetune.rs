//! KappaTune under the trainer: what is frozen stays to the bit, a resumed run is the run, adapters go on exactly the
//! chosen modules, and the methods compose.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use candle_core::Device;
use qtune::language::{plan, run, tiny};
use qtune::recipe::{put, Recipe};
use qtune::train::Quiet;
use qtune::weights::Checkpoint;
use serde_json::Value;

type Change<'a> = (&'a str, toml::Value);

/// A recipe on the built-in task, short.
fn recipe(name: &str, changes: &[Change]) -> Recipe {
    let mut table = Recipe::table(name).unwrap();
    let short = [
        ("text", toml::Value::Table("builtin = \"sorting\"\nseq_len = 128\npack = true".parse().unwrap())),
        ("text.limit_train", toml::Value::Integer(300)),
        ("text.limit_eval", toml::Value::Integer(20)),
        ("train.batch_size", toml::Value::Integer(16)),
        ("train.accumulate", toml::Value::Integer(1)),
        ("train.log_steps", toml::Value::Integer(1)),
        ("train.checkpoint_steps", toml::Value::Integer(3)),
        ("train.keep", toml::Value::Integer(9)),
        ("phase.0.steps", toml::Value::Integer(8)),
    ];
    for (key, value) in short.iter().chain(changes) {
        put(&mut table, key, value.clone()).unwrap();
    }
    Recipe::resolve(table).unwrap()
}

fn table(text: &str) -> toml::Value {
    toml::Value::Table(text.parse().unwrap())
}

fn number(value: f64) -> toml::Value {
    toml::Value::Float(value)
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// The chosen modules, from the file that a run leaves.
fn chosen(dir: &Path) -> Vec<String> {
    let selection = json(&dir.join("selection.json"));
    let entries = selection["tensors"].as_array().unwrap().iter();
    let names = entries.filter(|e| e["selected"] == true).map(|e| e["param"].as_str().unwrap());
    names.map(|name| name.strip_suffix(".weight").unwrap().to_string()).collect()
}

fn strings(value: &Value) -> Vec<String> {
    value.as_array().unwrap().iter().map(|v| v.as_str().unwrap().to_string()).collect()
}

fn sorted(mut names: Vec<String>) -> Vec<String> {
    names.sort();
    names
}

/// A model's tensors as bits.
fn bits(dir: &Path) -> BTreeMap<String, Vec<u32>> {
    let stored = Checkpoint::open(dir).unwrap();
    let of = |name: &str| {
        let tensor = stored.tensor(name, &Device::Cpu).unwrap();
        let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        (name.to_string(), values.into_iter().map(f32::to_bits).collect())
    };
    stored.names().map(of).collect()
}

#[test]
fn the_chosen_tensors_move_and_the_others_stay_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    let changes = [("kappa", table("tensors = 5")), ("phase.0.lr", number(2e-3))];
    let recipe = recipe("kappatune", &changes);
    let summary = run(&recipe, dir.path(), &Device::Cpu, &Quiet).unwrap();
    assert_eq!(summary["method"], "kappatune");
    let modules = chosen(dir.path());
    assert_eq!(strings(&summary["selected"]), modules);
    assert_eq!(modules.len(), 5);
    let after = bits(&dir.path().join("model"));
    let start = tiny(&Device::Cpu).unwrap();
    let mut trained = 0;
    for (name, weight) in start.weights.iter() {
        let before = weight.tensor().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let before: Vec<u32> = before.into_iter().map(f32::to_bits).collect();
        let moves = modules.iter().any(|module| name == format!("{module}.weight"));
        trained += if moves { before.len() } else { 0 };
        assert_eq!(before != after[name], moves, "{name}");
    }
    assert_eq!(summary["params_trainable"], trained);
    assert_eq!(summary["selected_params"], trained);
    assert!(
        summary["final_loss"].as_f64().unwrap() < summary["base_loss"].as_f64().unwrap() - 0.05,
        "{summary}"
    );

    // Cut after its first checkpoint and resumed: the same model, and the selection that lies there.
    let again = tempfile::tempdir().unwrap();
    let cut = again.path().join("run");
    std::fs::create_dir_all(cut.join("checkpoints")).unwrap();
    for name in ["selection.json", "metrics.jsonl"] {
        std::fs::copy(dir.path().join(name), cut.join(name)).unwrap();
    }
    let checkpoint = |at: &Path| at.join("checkpoints").join("step-00000003-p0");
    std::fs::create_dir(checkpoint(&cut)).unwrap();
    for entry in std::fs::read_dir(checkpoint(dir.path())).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), checkpoint(&cut).join(entry.file_name())).unwrap();
    }
    run(&recipe, &cut, &Device::Cpu, &Quiet).unwrap();
    assert_eq!(after, bits(&cut.join("model")));
    assert_eq!(json(&cut.join("selection.json")), json(&dir.path().join("selection.json")));
}

#[test]
fn a_plan_counts_what_would_be_trained() {
    let direct = recipe("kappatune", &[("kappa", table("tensors = 5"))]);
    let dir = tempfile::tempdir().unwrap();
    let summary = run(&direct, dir.path(), &Device::Cpu, &Quiet).unwrap();
    let planned = plan::plan(&direct, &Device::Cpu).unwrap();
    assert_eq!(planned.trainable as u64, summary["params_trainable"].as_u64().unwrap());
    let trained: Vec<String> =
        planned.tensors.iter().filter(|t| t.2 == "trained").map(|t| t.0.clone()).collect();
    let names = chosen(dir.path()).into_iter().map(|module| format!("{module}.weight")).collect();
    assert_eq!(sorted(trained), sorted(names));
    assert!(planned.notes.iter().any(|note| note.contains("5 of 21 matrices")), "{:?}", planned.notes);
}

#[test]
fn adapters_go_on_exactly_the_chosen_modules() {
    for (kind, rank) in [("bone", "rank = 8"), ("miss", "rank = 8"), ("lora", "match_params = 4000")] {
        let adapter = table(&format!("kind = \"{kind}\"\n{rank}"));
        let changes = [("kappa", table("tensors = 4")), ("adapter", adapter), ("phase.0.lr", number(5e-3))];
        let dir = tempfile::tempdir().unwrap();
        let recipe = recipe("kappatune", &changes);
        let summary = run(&recipe, dir.path(), &Device::Cpu, &Quiet).unwrap();
        let modules = chosen(dir.path());
        assert_eq!(modules.len(), 4, "{kind}");
        assert_eq!(sorted(strings(&summary["selected"])), sorted(modules.clone()), "{kind}");
        let config = json(&dir.path().join("adapter/adapter_config.json"));
        assert_eq!(sorted(strings(&config["target_modules"])), sorted(modules), "{kind}");
        let kept = json(&dir.path().join("adapter/selection.json"));
        assert_eq!(kept["model_hash"], summary["model_hash"], "{kind}");
        assert_eq!((&summary["method"], &summary["adapter"]), (&"kappatune".into(), &kind.into()));
        assert!(
            summary["final_loss"].as_f64().unwrap() < summary["base_loss"].as_f64().unwrap(),
            "{summary}"
        );
        if kind == "lora" {
            // The largest rank: one more would be too many.
            let trained = summary["params_trainable"].as_u64().unwrap();
            let each = trained / config["r"].as_u64().unwrap();
            assert!(trained <= 4000 && trained + each > 4000, "{trained} {each}");
        }
        let planned = plan::plan(&recipe, &Device::Cpu).unwrap();
        assert_eq!(planned.trainable as u64, summary["params_trainable"].as_u64().unwrap(), "{kind}");
    }
}

/// Selection, adapter, packed base and CLASSP as one recipe.
#[test]
fn the_methods_compose() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe("kappa-bone-classp", &[("phase.0.steps", toml::Value::Integer(20))]);
    let summary = run(&recipe, dir.path(), &Device::Cpu, &Quiet).unwrap();
    assert_eq!((summary["base_bits"].as_u64(), strings(&summary["selected"]).len()), (Some(4), 10));
    let (base, last) = (summary["base_loss"].as_f64().unwrap(), summary["final_loss"].as_f64().unwrap());
    assert!(last < base - 0.1, "{summary}");
    let metrics = std::fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let steps: Vec<&Value> = lines.iter().filter(|line| line["split"] == "train").collect();
    assert_eq!(steps.len(), 20);
    let figure = |line: &Value, key: &str| line[key].as_f64().unwrap();
    assert!(steps.iter().all(|line| figure(line, "passing") > 0.0 && figure(line, "touched") > 0.0));
    let sums: Vec<f64> = steps.iter().map(|line| figure(line, "mean_grad_sum")).collect();
    assert!(sums.windows(2).all(|pair| pair[0] < pair[1]), "{sums:?}");
    assert!(dir.path().join("optimizer/optimizer.safetensors").is_file());
    // What an adapter cannot be combined with is said before anything is computed.
    let with = |key: &str, value: &str| {
        let mut table = Recipe::table("kappa-bone-classp").unwrap();
        let value: toml::Value = format!("v = {value}").parse::<toml::Table>().unwrap()["v"].clone();
        put(&mut table, key, value).unwrap();
        Recipe::resolve(table).unwrap_err().to_string()
    };
    assert!(with("kappa.train_norms", "true").contains("modules_to_save"));
    assert!(with("kappa.tensors", "3").contains("tensors and fraction"));
    assert!(with("adapter.match_params", "100").contains("match_params = 100"));
    assert!(with("kappa.budget", "3").contains("budget"));
}

#[test]
fn the_command_line_takes_a_budget() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run").display().to_string();
    let short = ["finetune", "-q", "--steps", "2", "--set", "text.limit_train=100", "--limit-eval", "10"];
    let qtune = |args: &[&str]| {
        let args: Vec<&str> = short.iter().chain(args).copied().collect();
        Command::new(env!("CARGO_BIN_EXE_qtune")).args(args).output().unwrap()
    };
    let done = qtune(&["--method", "kappatune", "--budget", "3", "--json", "--out", &out]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let summary: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!((&summary["method"], strings(&summary["selected"]).len()), (&"kappatune".into(), 3));
    let out = dir.path().join("bone").display().to_string();
    let done =
        qtune(&["--method", "bone", "--rank", "8", "--budget", "fraction:0.2", "--json", "--out", &out]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let summary: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!((&summary["adapter"], strings(&summary["selected"]).len()), (&"bone".into(), 4));
    for (args, parts) in [
        (
            &["--method", "kappatune", "--budget", "share:0.0001"] as &[&str],
            &["share = 0.0001", "at least"] as &[&str],
        ),
        (&["--method", "kappatune", "--rank", "8"], &["--rank", "kappatune"]),
        (&["--method", "kappatune", "--budget", "0"], &["budget", "at least 1"]),
    ] {
        let out = dir.path().join("refused").display().to_string();
        let done = qtune(&[args, &["--out", &out]].concat());
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(2), "{args:?}: {said}");
        assert!(parts.iter().all(|part| said.contains(part)), "{args:?}: {said}");
        assert!(!dir.path().join("refused").exists(), "{args:?}");
    }
}
