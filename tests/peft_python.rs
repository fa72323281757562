//! Adapters that are trained and saved here, loaded by PEFT; merged directories, loaded by transformers: the
//! same logits. Runs where `QTUNE_PYTHON`, or else `python3`, has peft, and says so where it has not.

use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::{Device, Tensor};
use qtune::adapter::{merge, Merge};
use qtune::language::{attach, open_at, run};
use qtune::models::{held, Llama, Places};
use qtune::recipe::{put, Recipe};
use qtune::train::Quiet;
use qtune::weights::Checkpoint;

fn python() -> Option<String> {
    let python = std::env::var("QTUNE_PYTHON").unwrap_or("python3".into());
    let found = Command::new(&python).args(["-c", "import peft, transformers, torch"]).output();
    match found.is_ok_and(|out| out.status.success()) {
        true => Some(python),
        false => {
            eprintln!("skipped: {python} has no peft; name one that has it by QTUNE_PYTHON");
            None
        }
    }
}

fn gap(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// The model that the program carries, as a folder that transformers reads.
fn base(dir: &Path) -> PathBuf {
    let start = qtune::language::tiny(&Device::Cpu).unwrap();
    let base = dir.join("base");
    qtune::language::write_language_model(&base, &start, &start.weights).unwrap();
    base
}

#[test]
fn peft_and_transformers_compute_the_same() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path());
    let ids: Vec<u32> = (0..96).map(|i| (i * 37 + 11) % 256).collect();
    let tokens = dir.path().join("tokens.safetensors");
    let as_i64: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
    let tensor = Tensor::from_vec(as_i64, (2, 48), &Device::Cpu).unwrap();
    qtune::weights::checkpoint::save(&tokens, &[("tokens".into(), tensor)], &Default::default()).unwrap();
    for method in ["bone", "miss", "mini", "lora", "rslora", "dora", "pissa"] {
        let mut table = Recipe::table("sorting").unwrap();
        let set = |table: &mut toml::Table, key: &str, value: toml::Value| put(table, key, value).unwrap();
        set(&mut table, "adapter.kind", method.into());
        set(&mut table, "model.path", base.display().to_string().into());
        set(&mut table, "adapter.rank", toml::Value::Integer(8));
        set(&mut table, "phase.0.steps", toml::Value::Integer(12));
        set(&mut table, "text.limit_train", toml::Value::Integer(200));
        set(&mut table, "text.limit_eval", toml::Value::Integer(20));
        let recipe = Recipe::resolve(table).unwrap();
        let out = dir.path().join(method);
        std::fs::create_dir(&out).unwrap();
        run(&recipe, &out, &Device::Cpu, &Quiet).unwrap();
        let adapter = out.join("adapter");
        let merged = out.join("merged");
        let how = Merge { adapters: vec![(adapter.clone(), None)], ..Merge::default() };
        merge(&base, &merged, &how).unwrap();
        let mut start = open_at(&base, &Device::Cpu).unwrap();
        start.weights = held(&start.config, &start.weights, candle_core::DType::F32).unwrap();
        attach(&mut start, &adapter, None).unwrap();
        let model = Llama::new(&start.config, &start.weights, candle_core::DType::F32).unwrap();
        let ours = model.forward(&ids, &Places::plain(2, 48), &Device::Cpu).unwrap();
        let theirs = out.join("logits.safetensors");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peft_logits.py");
        let paths = [&script, &base, &adapter, &merged, &tokens, &theirs];
        let done = Command::new(&python).args(paths).output().unwrap();
        assert!(done.status.success(), "{method}: {}", String::from_utf8_lossy(&done.stderr));
        let theirs = Checkpoint::open(&theirs).unwrap();
        let read = |name: &str| theirs.tensor(name, &Device::Cpu).unwrap();
        let (adapted, merged) = (gap(&ours, &read("adapted")), gap(&ours, &read("merged")));
        let moved = gap(&read("plain"), &read("adapted"));
        eprintln!("{method}: PEFT within {adapted:.1e}, transformers on the merged within {merged:.1e}, moved {moved:.1e}");
        assert!(adapted < 1e-4 && merged < 1e-4, "{method}: {adapted} {merged}");
        assert!(moved > 1e-2, "{method}: the adapter does nothing ({moved})");
    }
}
