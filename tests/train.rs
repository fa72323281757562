//! What training promises: exact resume, the same bytes from the same seed, gradients that do not
//! depend on how a batch is split, and nothing silent.

use std::path::Path;
use std::sync::Mutex;

use candle_core::{Device, Tensor, Var};
use qtune::data::{Augment, Batch, DataConfig, Loader, Preprocess, Training};
use qtune::models::{open_model, VisionConfig};
use qtune::optim::adamw::AdamWConfig;
use qtune::optim::sgd::SgdConfig;
use qtune::optim::{Optimizer, OptimizerConfig};
use qtune::quantize;
use qtune::random::Random;
use qtune::recipe::{set, CalmQk, DistillKind, QkrBias, QkrConfig, Recipe};
use qtune::train::{signal, step, Classify, Progress, Quiet};
use qtune::transform::WeightQuant;
use qtune::weights::{Checkpoint, Weights};
use qtune::Error;

/// A run of a few seconds: 300 glyphs, a tiny model, both phases.
fn recipe(changes: &[&str]) -> Recipe {
    let mut table = Recipe::table("glyphs").unwrap();
    let small = [
        "data.glyphs.train=300",
        "data.glyphs.eval=100",
        "model.hidden=16",
        "model.layers=2",
        "model.heads=2",
        "model.mlp=24",
        "train.batch_size=20",
        "train.log_steps=1",
        "train.checkpoint_steps=4",
        "phase.0.steps=7",
        "phase.1.steps=9",
    ];
    for change in small.iter().chain(changes) {
        set(&mut table, change).unwrap();
    }
    Recipe::resolve(table).unwrap()
}

/// Asks for a stop when the given phase has come to the given step.
struct StopAt {
    phase: &'static str,
    step: usize,
    now: Mutex<String>,
}

impl Progress for StopAt {
    fn note(&self, _line: &str) {}
    fn start(&self, what: &str, _total: usize) {
        *self.now.lock().unwrap() = what.to_string();
    }
    fn tick(&self, done: usize, _message: &str) {
        if *self.now.lock().unwrap() == self.phase && done == self.step {
            signal::ask(2);
        }
    }
    fn finish(&self) {}
}

/// The signal is one for the whole process: tests that ask for it or train take turns.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> std::sync::MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(|e| e.into_inner())
}

/// metrics.jsonl without times and memory.
fn metrics(dir: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let strip = |line: &str| {
        let mut value: serde_json::Value = serde_json::from_str(line).unwrap();
        if value["split"] != "layers" {
            for key in ["samples_per_s", "peak_rss_bytes"] {
                value.as_object_mut().unwrap().remove(key).unwrap();
            }
        }
        value
    };
    text.lines().map(strip).collect()
}

fn model_bytes(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("model/model.safetensors")).unwrap()
}

#[test]
fn stopped_and_resumed_is_the_run_that_never_stopped() {
    let _turn = turn();
    let published = [
        "augment.crop_pad=0",
        "augment.resized_crop=true",
        "augment.rand_augment=rand-m9-mstd0.5-inc1",
        "augment.erase=0.25",
        "augment.mixup=0.8",
        "augment.cutmix=1.0",
        "augment.label_smoothing=0.1",
        "augment.repeats=3",
        "distill.kind=pld",
        "phase.1.steps=20", // into a second epoch
    ];
    let learned = ["activation.bits=2", "transform.0.kind=\"lsq\"", "train.accumulate=2"];
    for changes in [&[][..], &learned, &published] {
        let recipe = recipe(changes);
        let whole = tempfile::tempdir().unwrap();
        quantize::run(&recipe, whole.path(), &Device::Cpu, &Quiet).unwrap();
        for (phase, step) in [
            ("float", 3),
            ("float", 7),
            ("quantized", 1),
            ("quantized", 6),
            ("quantized", 9),
            ("quantized", 17),
        ] {
            if phase == "quantized" && Some(step) > recipe.phase[1].steps {
                continue;
            }
            let dir = tempfile::tempdir().unwrap();
            let stop = StopAt { phase, step, now: Mutex::default() };
            let stopped = quantize::run(&recipe, dir.path(), &Device::Cpu, &stop);
            signal::ask(0);
            match stopped {
                Err(Error::Stopped { signal: 2, resume: Some(resume) }) => assert_eq!(resume, dir.path()),
                other => panic!("{phase} {step}: {other:?}"),
            }
            assert!(!dir.path().join("model").exists());
            quantize::run(&recipe, dir.path(), &Device::Cpu, &Quiet).unwrap();
            assert_eq!(metrics(dir.path()), metrics(whole.path()), "{phase} {step} {changes:?}");
            assert_eq!(model_bytes(dir.path()), model_bytes(whole.path()), "{phase} {step} {changes:?}");
        }
    }
}

/// The whole of OFQ: the product of query and key, and a phase that anneals.
fn ofq(changes: &[&str], product: CalmQk) -> Recipe {
    let mut recipe = recipe(changes);
    recipe.qkr = Some(QkrConfig { targets: vec!["*".into()], bias: QkrBias::KeepQ });
    let mut phase = recipe.phase[1].clone();
    (phase.name, phase.steps) = ("annealed".into(), Some(6));
    (phase.calm, phase.calm_qk) = (Some(0.05), product);
    recipe.phase.push(phase);
    recipe.check().unwrap();
    recipe
}

#[test]
fn annealing_is_resumed_exactly() {
    let _turn = turn();
    let averaged = ["activation.bits=2", "train.ema=0.9", "train.drop_path=0.2", "train.layer_decay=0.8"];
    let sgd = ["optimizer={kind=\"sgd\", momentum=0.9, weight_decay=0.1}"];
    for (changes, product) in
        [(&averaged[..], CalmQk::Hold), (&sgd, CalmQk::Off), (&["activation.bits=4"], CalmQk::MaskGrad)]
    {
        let recipe = ofq(changes, product);
        let whole = tempfile::tempdir().unwrap();
        let summary = quantize::run(&recipe, whole.path(), &Device::Cpu, &Quiet).unwrap();
        assert!(summary["frozen"].as_f64().unwrap() > 30.0, "{summary}");
        for (phase, step) in [("quantized", 5), ("quantized", 9), ("annealed", 1), ("annealed", 5)] {
            let dir = tempfile::tempdir().unwrap();
            let stop = StopAt { phase, step, now: Mutex::default() };
            let stopped = quantize::run(&recipe, dir.path(), &Device::Cpu, &stop);
            signal::ask(0);
            assert!(matches!(stopped, Err(Error::Stopped { .. })), "{phase} {step}: {stopped:?}");
            if (phase, step) == ("annealed", 1) {
                // Killed before the phase's first step: what is left is the checkpoint that begins it.
                let last = dir.path().join("checkpoints/step-00000017-p2");
                std::fs::remove_dir_all(last).unwrap();
            }
            quantize::run(&recipe, dir.path(), &Device::Cpu, &Quiet).unwrap();
            assert_eq!(metrics(dir.path()), metrics(whole.path()), "{phase} {step} {changes:?}");
            assert!(model_bytes(dir.path()) == model_bytes(whole.path()), "{phase} {step} {changes:?}");
        }
    }
}

#[test]
fn a_recipe_that_anneals_packs_without_training() {
    let _turn = turn();
    let mut recipe = ofq(&["phase.1.steps=0"], CalmQk::Hold);
    recipe.phase[2].steps = Some(0);
    let dir = tempfile::tempdir().unwrap();
    let summary = quantize::run(&recipe, dir.path(), &Device::Cpu, &Quiet).unwrap();
    assert_eq!((&summary["steps"], &summary["frozen"]), (&7.into(), &0.0.into()));
    assert_eq!(summary["q_top1"], summary["fake_quant_top1"]);
}

#[test]
fn what_annealing_freezes_does_not_move_by_a_bit() {
    let _turn = turn();
    let rules = [
        OptimizerConfig::Adamw(AdamWConfig { weight_decay: 0.5, ..Default::default() }),
        OptimizerConfig::Sgd(SgdConfig { momentum: 0.9, weight_decay: 0.5, ..Default::default() }),
    ];
    for config in rules {
        let (_, weights, batches, _, model) = task(32, WeightQuant::Statsq);
        let mut optimizer = config.build();
        let params = weights.params();
        let step = |weights: &Weights, optimizer: &mut dyn Optimizer, anneal: bool, at: usize| {
            let model = model.build(weights).unwrap();
            let task = Classify {
                model,
                teacher: None,
                distill: DistillKind::None,
                drop_path: None,
                heads: None,
                recordings: None,
            };
            let free = if anneal { step::free(weights, &params).unwrap() } else { Vec::new() };
            let mut rule = step::Rule { lr: 0.02, free: &free, first: false, ..plain(optimizer, &config) };
            let batch = &batches[at % batches.len()..][..1];
            step::take(&task, batch, &params, &mut rule, &Device::Cpu).unwrap();
            free
        };
        let bits = |v: &Var| v.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        // Momentum first, then annealing.
        (0..3).for_each(|at| drop(step(&weights, optimizer.as_mut(), false, at)));
        let (calm, reached) = weights.calmed(Some(0.02), false);
        assert!(reached > 0);
        let (mut frozen, mut moved) = (0usize, 0usize);
        for at in 0..6 {
            let before: Vec<Vec<f32>> = params.iter().map(|p| bits(&p.var)).collect();
            let free = step(&calm, optimizer.as_mut(), true, at);
            for ((param, free), before) in params.iter().zip(&free).zip(&before) {
                let Some(free) = free else { continue };
                let free = free.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                for ((free, a), b) in free.iter().zip(before).zip(bits(&param.var)) {
                    let same = a.to_bits() == b.to_bits();
                    assert!(*free == 1.0 || same, "{}: a frozen entry moved at step {at}", param.name);
                    frozen += usize::from(*free == 0.0);
                    moved += usize::from(!same);
                }
            }
        }
        assert!(frozen > 1000 && moved > 10, "{frozen} frozen, {moved} moved: nothing to tell");
    }
}

#[test]
fn packed_and_fake_quantized_accuracy_agree_with_products() {
    let _turn = turn();
    for (changes, product) in [(&[][..], CalmQk::Off), (&["activation.bits=2"], CalmQk::Hold)] {
        let dir = tempfile::tempdir().unwrap();
        let summary = quantize::run(&ofq(changes, product), dir.path(), &Device::Cpu, &Quiet).unwrap();
        let number = |key: &str| summary[key].as_f64().unwrap_or_else(|| panic!("{key}: {summary}"));
        // 100 images: at most one falls on the other side.
        assert!((number("q_top1") - number("fake_quant_top1")).abs() <= 1.0, "{summary}");
        let packed = open_model(&dir.path().join("model"), &Device::Cpu).unwrap();
        let inner = "vit.encoder.layer.0.attention.attention";
        let qk = packed.weights.get(&format!("{inner}.qk.weight")).unwrap();
        assert_eq!((qk.shape().unwrap(), qk.grid().unwrap().bits), (vec![32, 16], 2));
        assert!(!packed.weights.contains(&format!("{inner}.query.weight")));
    }
}

#[test]
fn packed_and_fake_quantized_accuracy_agree_and_the_packed_one_is_reported() {
    let _turn = turn();
    for changes in [&[][..], &["activation.bits=4"], &["activation.bits=2"], &["transform.0.bits=3"]] {
        let dir = tempfile::tempdir().unwrap();
        let summary = quantize::run(&recipe(changes), dir.path(), &Device::Cpu, &Quiet).unwrap();
        let number = |key: &str| summary[key].as_f64().unwrap_or_else(|| panic!("{key}: {summary}"));
        // 100 images: at most one falls on the other side.
        assert!((number("q_top1") - number("fake_quant_top1")).abs() <= 1.0, "{summary}");
        // The steps and shifts of activations weigh more than a model this small.
        assert!(changes.iter().any(|c| c.starts_with("act")) || number("compression") > 1.5, "{summary}");
        assert_eq!(number("steps"), 16.0);
        let saved: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(dir.path().join("summary.json")).unwrap()).unwrap();
        assert_eq!(saved, summary);
    }
}

#[test]
fn without_steps_a_trained_model_is_packed_as_it_is() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(&["phase.1.steps=0", "phase.0.steps=60", "transform.0.bits=4"]);
    let summary = quantize::run(&recipe, dir.path(), &Device::Cpu, &Quiet).unwrap();
    let float = open_model(&dir.path().join("checkpoints/float"), &Device::Cpu).unwrap();
    let packed = open_model(&dir.path().join("model"), &Device::Cpu).unwrap();
    let name = "vit.encoder.layer.0.intermediate.dense.weight";
    let (a, b) = (float.weights.get(name).unwrap(), packed.weights.get(name).unwrap());
    let (a, b) = (a.tensor().unwrap(), b.tensor().unwrap());
    let error = (&a - b).unwrap().sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
    let power = a.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
    // A uniform 4-bit grid of least squares leaves about 1.2 % of a Gaussian's power.
    assert!(error / power < 0.02, "{}", error / power);
    assert_eq!(summary["steps"], 60);
}

/// Asks for a stop when so many evaluations have begun.
struct StopAtEvaluation(Mutex<usize>);

impl Progress for StopAtEvaluation {
    fn note(&self, _line: &str) {}
    fn start(&self, what: &str, _total: usize) {
        if what == "evaluating" {
            let mut left = self.0.lock().unwrap();
            *left -= 1;
            if *left == 0 {
                signal::ask(2);
            }
        }
    }
    fn tick(&self, _done: usize, _message: &str) {}
    fn finish(&self) {}
}

#[test]
fn untrained_packing_is_resumed_with_the_steps_that_were_fitted() {
    let _turn = turn();
    for change in ["activation.edge_bits=8", "qkr.bias=keep_q"] {
        untrained_packing_resumes(&recipe(&["phase.1.steps=0", "activation.bits=4", change]));
    }
}

fn untrained_packing_resumes(recipe: &Recipe) {
    let whole = tempfile::tempdir().unwrap();
    quantize::run(recipe, whole.path(), &Device::Cpu, &Quiet).unwrap();
    // The second evaluation, of the fake-quantized model, comes after the quantized phase's checkpoint.
    let dir = tempfile::tempdir().unwrap();
    let stop = StopAtEvaluation(Mutex::new(2));
    let stopped = quantize::run(recipe, dir.path(), &Device::Cpu, &stop);
    signal::ask(0);
    assert!(matches!(stopped, Err(Error::Stopped { .. })), "{stopped:?}");
    assert!(dir.path().join("checkpoints/step-00000007-p1").exists());
    quantize::run(recipe, dir.path(), &Device::Cpu, &Quiet).unwrap();
    assert_eq!(metrics(dir.path()), metrics(whole.path()));
    assert!(model_bytes(dir.path()) == model_bytes(whole.path()));
}

/// A quantized student and batches for it.
fn task(act_bits: u8, kind: WeightQuant) -> (Classify, Weights, Vec<Batch>, OptimizerConfig, VisionConfig) {
    let recipe = recipe(&[&format!("activation.bits={act_bits}")]);
    let dataset = DataConfig { ..recipe.data.clone() }.open(0).unwrap();
    let dir = tempfile::tempdir().unwrap();
    // An untouched start, quantizers in place: the state of the first checkpoint of the second phase.
    let mut short = recipe.clone();
    short.phase[0].steps = Some(1);
    short.phase[1].steps = Some(1);
    quantize::run(&short, dir.path(), &Device::Cpu, &Quiet).unwrap();
    let start = open_model(&dir.path().join("checkpoints/float"), &Device::Cpu).unwrap();
    let mut weights = start.weights.trainable().unwrap();
    for (name, _) in quantize::targets(&recipe, &weights).unwrap() {
        let w = weights.get(&name).unwrap().tensor().unwrap().detach();
        weights.wrap(&name, kind.training(4, None, &w).unwrap()).unwrap();
    }
    let preprocess = std::sync::Arc::new(Preprocess::default_for(28, 28, 1));
    let load = |order: Vec<u32>, size: usize| -> Vec<Batch> {
        let augment = Augment { crop_pad: 1, ..Default::default() };
        let training = Training { augment, classes: dataset.classes.len(), seed: 0, epoch: 0, done: 0 };
        let train = dataset.train.clone();
        Loader::new(train, preprocess.clone(), order, size, Some(training), 1, &Device::Cpu)
            .map(|b| b.unwrap())
            .collect()
    };
    let whole = load((0..24).collect(), 24);
    quantize::calibrate(&recipe, &start.config, &mut weights, &whole[0].images, true, &Quiet).unwrap();
    let model = start.config.build(&weights).unwrap();
    let batches = [whole, load((0..24).collect(), 7)].concat_batches();
    (
        Classify {
            model,
            teacher: None,
            distill: DistillKind::None,
            drop_path: None,
            heads: None,
            recordings: None,
        },
        weights,
        batches,
        recipe.optimizer,
        start.config,
    )
}

trait Concat {
    fn concat_batches(self) -> Vec<Batch>;
}

impl Concat for [Vec<Batch>; 2] {
    fn concat_batches(self) -> Vec<Batch> {
        self.into_iter().flatten().collect()
    }
}

/// An update rule that only remembers the gradients.
#[derive(Default)]
struct Remember(Vec<(String, Vec<f32>)>);

impl Optimizer for Remember {
    fn update(
        &mut self,
        param: &qtune::weights::Param,
        grad: &Tensor,
        _lr: f64,
        _decay: bool,
    ) -> qtune::Result<()> {
        self.0.push((param.name.clone(), grad.flatten_all()?.to_vec1()?));
        Ok(())
    }
    fn state(&self) -> qtune::Result<Vec<(String, Tensor)>> {
        Ok(Vec::new())
    }
    fn retain(&mut self, _params: &[qtune::weights::Param]) {}
    fn restore(
        &mut self,
        _params: &[qtune::weights::Param],
        _read: &dyn Fn(&str) -> qtune::Result<Tensor>,
    ) -> qtune::Result<()> {
        Ok(())
    }
}

/// A first step at rate 0.1, without clipping.
fn plain<'a>(optimizer: &'a mut dyn Optimizer, config: &'a OptimizerConfig) -> step::Rule<'a> {
    step::Rule { optimizer, config, lr: 0.1, factors: &[], clip: 0.0, free: &[], first: true }
}

#[test]
fn any_split_of_a_batch_gives_the_same_gradient() {
    let _turn = turn();
    for act_bits in [32, 4] {
        let (task, weights, batches, config, _) = task(act_bits, WeightQuant::Lsq);
        let params = weights.params();
        let gradient = |batches: &[Batch]| {
            let mut rule = Remember::default();
            let device = &Device::Cpu;
            let step = step::take(&task, batches, &params, &mut plain(&mut rule, &config), device).unwrap();
            (rule.0, step.loss.read().unwrap())
        };
        let (whole, loss) = gradient(&batches[..1]);
        let (split, split_loss) = gradient(&batches[1..]); // 7, 7, 7 and 3 samples
        assert_eq!(batches[1..].iter().map(|b| b.labels.len()).collect::<Vec<_>>(), [7, 7, 7, 3]);
        assert!((loss - split_loss).abs() < 1e-5 * loss.abs());
        for ((name, a), (_, b)) in whole.iter().zip(&split) {
            let size = a.iter().fold(0f32, |m, v| m.max(v.abs()));
            for (x, y) in a.iter().zip(b) {
                // f32 sums in another order, relative to the tensor's largest entry.
                assert!((x - y).abs() <= 1e-4 * size + 1e-7, "{name} at {act_bits} bits: {x} {y}");
            }
        }
    }
}

#[test]
fn a_trainable_that_no_gradient_reaches_is_an_error_that_names_it() {
    let _turn = turn();
    let (task, mut weights, batches, config, _) = task(32, WeightQuant::Lsq);
    weights.insert(
        "stranger.weight",
        qtune::weights::Weight::latent(
            &Tensor::zeros((2, 2), candle_core::DType::F32, &Device::Cpu).unwrap(),
        )
        .unwrap(),
    );
    let params = weights.params();
    let mut rule = Remember::default();
    let taken = step::take(&task, &batches[..1], &params, &mut plain(&mut rule, &config), &Device::Cpu);
    let error = taken.unwrap_err().to_string();
    assert!(error.contains("no gradient reached 1 of") && error.contains("stranger.weight"), "{error}");
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run() {
    let _turn = turn();
    let (task, weights, batches, config, _) = task(32, WeightQuant::Lsq);
    let params = weights.params();
    let bias = params.iter().find(|p| p.name == "classifier.bias").unwrap();
    let poison = vec![f32::NAN; bias.var.elem_count()];
    bias.var.set(&Tensor::new(&poison[..], &Device::Cpu).unwrap()).unwrap();
    let mut rule = config.build();
    let mut rule = plain(rule.as_mut(), &config);
    let taken = step::take(&task, &batches[..1], &params, &mut rule, &Device::Cpu);
    let error = taken.unwrap_err();
    assert!(error.to_string().contains("the loss is NaN"), "{error}");
    assert_eq!(error.exit_code(), 1);
}

#[test]
fn the_loss_falls_on_glyphs() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let changes = [
        "data.glyphs.train=1500",
        "model.hidden=48",
        "model.heads=4",
        "model.mlp=96",
        "train.batch_size=50",
        "phase.0.steps=150",
        "phase.0.lr=3e-3",
        "phase.1.steps=20",
    ];
    let summary = quantize::run(&recipe(&changes), dir.path(), &Device::Cpu, &Quiet).unwrap();
    let lines = metrics(dir.path());
    let losses: Vec<f64> = lines
        .iter()
        .filter(|l| l["phase"] == "float" && l["split"] == "train")
        .map(|l| l["loss"].as_f64().unwrap())
        .collect();
    assert_eq!(losses.len(), 150);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    assert!(mean(&losses[140..]) < 0.6 * mean(&losses[..10]), "{losses:?}");
    // Ten classes: far above a guess, and so after quantization.
    assert!(summary["fp_top1"].as_f64().unwrap() > 30.0, "{summary}");
    assert!(summary["q_top1"].as_f64().unwrap() > 30.0, "{summary}");
}

#[test]
fn a_checkpoint_of_another_recipe_is_refused_by_name() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let stop = StopAt { phase: "float", step: 5, now: Mutex::default() };
    quantize::run(&recipe(&[]), dir.path(), &Device::Cpu, &stop).unwrap_err();
    signal::ask(0);
    let other = quantize::run(&recipe(&["model.mlp=25"]), dir.path(), &Device::Cpu, &Quiet).unwrap_err();
    assert!(other.to_string().contains("intermediate.dense.weight"), "{other}");
    assert!(other.to_string().contains("[24, 16]") && other.to_string().contains("[25, 16]"), "{other}");
}

#[test]
fn seeds_differ() {
    let _turn = turn();
    let run = |seed: &str| {
        let dir = tempfile::tempdir().unwrap();
        quantize::run(&recipe(&[seed]), dir.path(), &Device::Cpu, &Quiet).unwrap();
        let file = Checkpoint::open(&dir.path().join("model")).unwrap();
        let tensor = file.tensor("vit.layernorm.bias", &Device::Cpu).unwrap();
        tensor.to_vec1::<f32>().unwrap()
    };
    assert_ne!(run("seed=1"), run("seed=2"));
    assert_ne!(Random::new(1, "a", &[]).bits(), Random::new(2, "a", &[]).bits());
}
