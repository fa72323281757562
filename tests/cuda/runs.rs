//! Whole runs on the device: they follow those on the CPU, go on where a CPU stopped and the other way round, and are the
//! same when they are recorded.

use std::path::Path;
use std::sync::Mutex;

use candle_core::Device;
use qtune::models::open_model;
use qtune::recipe::{set, Recipe};
use qtune::train::{signal, Progress, Quiet};
use qtune::weights::Checkpoint;
use qtune::{continual, language, quantize, Error};

use crate::device::device;

/// The arithmetic is one for the whole process, and so is the signal.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> std::sync::MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(|e| e.into_inner())
}

fn recipe(name: &str, changes: &[&str]) -> Recipe {
    let mut table = Recipe::table(name).unwrap();
    for change in changes {
        set(&mut table, change).unwrap();
    }
    Recipe::resolve(table).unwrap()
}

/// A run of a few steps: 32 glyphs, a tiny model, both phases.
fn vision(changes: &[&str]) -> Recipe {
    let small = [
        "data.glyphs.train=32",
        "data.glyphs.eval=16",
        "model.hidden=16",
        "model.layers=2",
        "model.heads=2",
        "model.mlp=24",
        "train.batch_size=8",
        "train.eval_batch_size=16",
        "train.log_steps=1",
        "train.checkpoint_steps=1",
        "train.keep=20",
        "phase.0.steps=2",
        "phase.1.steps=4",
    ];
    recipe("glyphs", &[&small, changes].concat())
}

/// The losses of the training lines of metrics.jsonl.
fn losses(dir: &Path) -> Vec<f64> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    lines.filter(|line| line["split"] == "train").map(|line| line["loss"].as_f64().unwrap()).collect()
}

#[track_caller]
fn near(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(
            (got - want).abs() <= tolerance * (1.0 + want.abs()),
            "{what}: line {i}: got {got}, want {want}"
        );
    }
}

/// Roundings of f32 in sums of another order, over a few steps of training.
const F32: f64 = 2e-3;
/// The same of activations in bf16.
const BF16: f64 = 3e-2;

#[test]
fn quantization_follows_the_cpu() {
    let (Some(device), _turn) = (device(), turn()) else { return };
    let ofq = ["activation.bits=2", "qkr.bias=keep_q", "phase.1.calm=0.05", "optimizer.weight_decay=0.1"];
    let learned =
        ["activation.bits=4", "transform.0.kind=\"lsq\"", "train.accumulate=2", "distill.kind=soft"];
    for changes in [&[][..], &ofq, &learned, &["optimizer.kind=\"lion\"", "train.ema=0.5"]] {
        let [here, there] = [(); 2].map(|_| tempfile::tempdir().unwrap());
        let recipe = vision(changes);
        quantize::run(&recipe, here.path(), &Device::Cpu, &Quiet).unwrap();
        let summary = quantize::run(&recipe, there.path(), &device, &Quiet).unwrap();
        near(&format!("{changes:?}"), &losses(there.path()), &losses(here.path()), F32);
        assert_eq!(summary["device"], "cuda:0");
        assert!(summary["peak_device_bytes"].as_u64().is_some_and(|bytes| bytes > 1 << 16), "{summary}");
        // What it left is a packed model that both devices read.
        let path = there.path().join("model");
        let images = crate::device::values(&[3, 1, 28, 28], 5);
        let logits = |device: &Device| {
            let model = open_model(&path, device).unwrap();
            let model = model.config.build(&model.weights).unwrap();
            model.forward(&images.to_device(device).unwrap()).unwrap().logits().unwrap()
        };
        crate::device::close(&format!("{changes:?}: logits"), &logits(&device), &logits(&Device::Cpu), F32);
    }
}

#[test]
fn halves_follow_too() {
    let (Some(device), _turn) = (device(), turn()) else { return };
    let [here, there] = [(); 2].map(|_| tempfile::tempdir().unwrap());
    let changes = ["activation.bits=4"];
    quantize::run(&vision(&changes), here.path(), &Device::Cpu, &Quiet).unwrap();
    let recipe = vision(&[&changes[..], &["train.products=\"bf16\""]].concat());
    quantize::run(&recipe, there.path(), &device, &Quiet).unwrap();
    near("bf16", &losses(there.path()), &losses(here.path()), BF16);
    qtune::kernels::set_arithmetic(qtune::kernels::Arithmetic::F32);
}

#[test]
fn recorded_passes_are_the_same() {
    let (Some(device), _turn) = (device(), turn()) else { return };
    let [plain, recorded] = [(); 2].map(|_| tempfile::tempdir().unwrap());
    let changes = ["activation.bits=4", "phase.1.steps=7"];
    quantize::run(&vision(&changes), plain.path(), &device, &Quiet).unwrap();
    let recipe = vision(&[&changes[..], &["train.graphs=true"]].concat());
    quantize::run(&recipe, recorded.path(), &device, &Quiet).unwrap();
    assert_eq!(losses(recorded.path()), losses(plain.path()));
    let bytes = |dir: &Path| std::fs::read(dir.join("model/model.safetensors")).unwrap();
    assert!(bytes(recorded.path()) == bytes(plain.path()));
}

/// Asks for a stop behind so many steps in all, and keeps what was said.
struct StopAt {
    steps: usize,
    said: Mutex<(usize, Vec<String>)>,
}

impl Progress for StopAt {
    fn note(&self, line: &str) {
        self.said.lock().unwrap().1.push(line.to_string());
    }
    fn start(&self, what: &str, _total: usize) {
        if what == "evaluating" {
            self.said.lock().unwrap().0 += 1000;
        }
    }
    fn tick(&self, _done: usize, _message: &str) {
        let mut said = self.said.lock().unwrap();
        if said.0 >= 1000 {
            return;
        }
        said.0 += 1;
        if said.0 == self.steps {
            signal::ask(2);
        }
    }
    fn finish(&self) {
        let mut said = self.said.lock().unwrap();
        said.0 = said.0.saturating_sub(1000);
    }
}

#[test]
fn a_run_goes_on_on_another_device() {
    let (Some(device), _turn) = (device(), turn()) else { return };
    let recipe = vision(&["activation.bits=4", "phase.1.steps=6"]);
    let whole = tempfile::tempdir().unwrap();
    quantize::run(&recipe, whole.path(), &Device::Cpu, &Quiet).unwrap();
    for (first, second) in [(&Device::Cpu, &device), (&device, &Device::Cpu)] {
        let dir = tempfile::tempdir().unwrap();
        let stop = StopAt { steps: 5, said: Mutex::default() };
        let stopped = quantize::run(&recipe, dir.path(), first, &stop);
        signal::ask(0);
        assert!(matches!(stopped, Err(Error::Stopped { signal: 2, .. })), "{stopped:?}");
        let listen = StopAt { steps: usize::MAX, said: Mutex::default() };
        quantize::run(&recipe, dir.path(), second, &listen).unwrap();
        near("resumed", &losses(dir.path()), &losses(whole.path()), F32);
        let said = listen.said.into_inner().unwrap().1;
        assert!(said.iter().any(|line| line.contains("exactness ends here")), "{said:?}");
    }
}

#[test]
fn a_loss_that_breaks_is_told_with_its_step() {
    let (Some(device), _turn) = (device(), turn()) else { return };
    let dir = tempfile::tempdir().unwrap();
    // The weights leave the range of numbers at the first step; the losses after it are read at the fourth.
    let recipe = vision(&["phase.0.lr=1e38", "phase.0.warmup=0", "phase.0.steps=4", "train.log_steps=4"]);
    let recipe = Recipe {
        train: qtune::recipe::TrainConfig { checkpoint_steps: 0, ..recipe.train.clone() },
        ..recipe
    };
    let error = quantize::run(&recipe, dir.path(), &device, &Quiet).unwrap_err().to_string();
    assert!(error.contains("phase float, step 1") && error.contains("samples"), "{error}");
}

#[test]
fn adapters_follow_the_cpu() {
    let (Some(device), _turn) = (device(), turn()) else { return };
    for kind in ["bone", "miss", "lora", "dora"] {
        let [here, there] = [(); 2].map(|_| tempfile::tempdir().unwrap());
        let changes = [
            format!("adapter.kind=\"{kind}\""),
            "train.batch_size=2".into(),
            "text.seq_len=24".into(),
            "text.limit_train=8".into(),
            "text.limit_eval=4".into(),
            "train.log_steps=1".into(),
            "phase.0.steps=3".into(),
        ];
        let recipe = recipe("sorting", &changes.each_ref().map(String::as_str));
        language::run(&recipe, here.path(), &Device::Cpu, &Quiet).unwrap();
        language::run(&recipe, there.path(), &device, &Quiet).unwrap();
        near(kind, &losses(there.path()), &losses(here.path()), F32);
        assert!(Checkpoint::open(&there.path().join("adapter/adapter_model.safetensors")).is_ok(), "{kind}");
    }
}

#[test]
fn tasks_follow_the_cpu() {
    let (Some(device), _turn) = (device(), turn()) else { return };
    for method in ["classp", "ewc"] {
        let [here, there] = [(); 2].map(|_| tempfile::tempdir().unwrap());
        let method = format!("continual.method=\"{method}\"");
        let changes = [
            "model.widths=[8]",
            "model.hidden=24",
            "data.limit_train=32",
            "data.limit_eval=16",
            "train.batch_size=8",
            "train.log_steps=1",
            "phase.0.steps=2",
        ];
        let recipe = recipe("continual-glyphs", &[&changes[..], &[&method]].concat());
        continual::run(&recipe, here.path(), &Device::Cpu, &Quiet).unwrap();
        continual::run(&recipe, there.path(), &device, &Quiet).unwrap();
        near(&method, &losses(there.path()), &losses(here.path()), F32);
    }
}
