//! One-bit weights in the shared trainer: both readings learn, the prior holds what an earlier task is
//! certain of, and a run is the same to the bit when it is made again.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{Device, Tensor};
use qtune::continual::field::FieldPrior;
use qtune::data::{Batch, Dataset};
use qtune::models::{preprocess_of, VisionConfig};
use qtune::quantize;
use qtune::recipe::{set, DistillKind, Recipe};
use qtune::train::{
    Accuracy, Batches, Classify, Images, Metrics, Pass, Phase, Progress, Quiet, State, Supply, Task, Tracker,
    Trainer,
};
use qtune::weights::{Param, Weights};

/// Classification under a prior.
struct Remembering {
    learn: Classify,
    prior: Option<FieldPrior>,
}

impl Task for Remembering {
    type Batch = Batch;

    fn learn(&self, batch: &Batch, params: &[Param], device: &Device) -> qtune::Result<Pass> {
        let mut pass = self.learn.learn(batch, params, device)?;
        if let Some(prior) = &self.prior {
            prior.add(params, &mut pass)?;
        }
        Ok(pass)
    }

    fn predictions(batch: &Batch) -> usize {
        Classify::predictions(batch)
    }

    fn counted(batch: &Batch) -> usize {
        Classify::counted(batch)
    }

    fn samples(batch: &Batch) -> Vec<u32> {
        Classify::samples(batch)
    }
}

/// Images for that task.
struct Remembered<'a>(Images<'a>);

impl Supply for Remembered<'_> {
    type Task = Remembering;

    fn samples(&self) -> usize {
        self.0.samples()
    }

    fn batches(&self, epoch: u64, skip: usize) -> qtune::Result<Batches<'_, Batch>> {
        self.0.batches(epoch, skip)
    }

    fn evaluate(
        &self,
        weights: &Weights,
        progress: &dyn Progress,
        stoppable: bool,
    ) -> qtune::Result<Accuracy> {
        self.0.evaluate(weights, progress, stoppable)
    }

    fn score(&self, figures: &Accuracy) -> f64 {
        self.0.score(figures)
    }

    fn figures(&self, figures: &Accuracy) -> serde_json::Map<String, serde_json::Value> {
        self.0.figures(figures)
    }

    fn unit(&self) -> (&'static str, &'static str) {
        self.0.unit()
    }

    fn left_out(&self) -> Vec<String> {
        self.0.left_out()
    }

    fn depth(&self, name: &str) -> (usize, usize) {
        self.0.depth(name)
    }
}

/// A recipe of one phase for a network of this reading.
fn recipe(reading: &str, lr: f64, changes: &[&str]) -> Recipe {
    let mut table = Recipe::table("glyphs").unwrap();
    let model = format!("kind = \"binary\"\nhidden = [40, 30]\nreading = \"{reading}\"");
    table.insert("model".into(), toml::Value::Table(model.parse().unwrap()));
    let own = [
        "data.glyphs.train=1000".to_string(),
        "data.glyphs.eval=300".to_string(),
        "optimizer.weight_decay=0.0".to_string(),
        "augment.crop_pad=0".to_string(),
        "train.batch_size=50".to_string(),
        "train.clip=0.0".to_string(),
        "phase.0.warmup_epochs=0.0".to_string(),
        "phase.0.schedule=constant".to_string(),
        format!("phase.0.lr={lr:?}"),
    ];
    for change in own.iter().map(String::as_str).chain(changes.iter().copied()) {
        set(&mut table, change).unwrap();
    }
    Recipe::resolve(table).unwrap()
}

/// Trains `weights` on `dataset` by the shared trainer and measures what comes of it.
fn train(
    recipe: &Recipe,
    model: &VisionConfig,
    weights: &Weights,
    dataset: &Dataset,
    prior: Option<FieldPrior>,
    dir: &Path,
) -> Accuracy {
    let device = &Device::Cpu;
    let preprocess = Arc::new(preprocess_of(model));
    let supply = Remembered(Images { recipe, dataset, preprocess, model, device });
    let mut trainer = Trainer {
        recipe,
        dir,
        supply: &supply,
        device,
        progress: &Quiet,
        metrics: Metrics::open(&dir.join("metrics.jsonl"), 0).unwrap(),
        state: State::default(),
        seen: None,
        average: None,
        started: Instant::now(),
        earlier_s: 0.0,
    };
    let learn = Classify {
        model: model.build(weights).unwrap(),
        teacher: None,
        distill: DistillKind::None,
        drop_path: None,
        heads: None,
        recordings: None,
    };
    let task = Remembering { learn, prior };
    let mut optimizer = recipe.optimizer.build();
    let phase = Phase {
        config: &recipe.phase[0],
        weights,
        task: &task,
        optimizer: optimizer.as_mut(),
        tracker: &mut Tracker::default(),
    };
    trainer.run(phase).unwrap();
    trainer.measure(&weights.settled().unwrap(), "test").unwrap()
}

fn fields(weights: &Weights) -> Vec<f32> {
    let flat = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    weights.params().iter().flat_map(|p| flat(p.var.as_detached_tensor())).collect()
}

#[test]
fn both_readings_learn_and_a_run_repeats_itself() {
    for (reading, lr) in [("field", 0.05), ("sign", 0.003)] {
        let recipe = recipe(reading, lr, &["phase.0.epochs=5.0"]);
        let dataset = quantize::open_data(&recipe).unwrap().unwrap();
        let start = quantize::start(&recipe, Some(&dataset), &Device::Cpu).unwrap();
        assert_eq!(start.preprocess, preprocess_of(&start.config));
        let run = || {
            let weights = start.weights.trainable().unwrap();
            let dir = tempfile::tempdir().unwrap();
            let got = train(&recipe, &start.config, &weights, &dataset, None, dir.path());
            (got, fields(&weights))
        };
        let ((got, theta), (again, same)) = (run(), run());
        // Guessing is right once in ten.
        assert!(got.top1 > 60.0, "{reading}: {got:?}");
        assert_eq!((got.top1, got.loss), (again.top1, again.loss));
        assert!(theta.iter().zip(&same).all(|(a, b)| a.to_bits() == b.to_bits()), "{reading}");
    }
}

/// A prior that counts for more holds more of what was learned.
#[test]
fn a_prior_holds_what_was_learned() {
    let recipe = recipe("field", 0.05, &["phase.0.epochs=5.0"]);
    let dataset = quantize::open_data(&recipe).unwrap().unwrap();
    let start = quantize::start(&recipe, Some(&dataset), &Device::Cpu).unwrap();
    let weights = start.weights.trainable().unwrap();
    let dir = tempfile::tempdir().unwrap();
    train(&recipe, &start.config, &weights, &dataset, None, dir.path());
    let learned = weights.folded().unwrap();
    let before = fields(&weights);
    // The next task: the same images in the labels of their neighbours.
    let names = dataset.classes.iter().cycle().skip(1);
    let turned: Vec<String> = names.take(dataset.classes.len()).cloned().collect();
    let next = dataset.clone().under_labels(&turned).unwrap();
    let moved = |weight: f64| {
        let weights = learned.trainable().unwrap();
        let prior = FieldPrior::posterior(&weights.params(), weight, next.train.len()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let got = train(&recipe, &start.config, &weights, &next, Some(prior), dir.path());
        let after = fields(&weights);
        let turned = before.iter().zip(&after).filter(|(b, a)| (**b >= 0.0) != (**a >= 0.0)).count();
        (turned, got.top1)
    };
    let ((free, learned), (held, kept)) = (moved(0.0), moved(10.0));
    assert!(held * 3 < free, "{free} of {} weights turned without a prior, {held} with", before.len());
    // What is held does not learn to contradict itself.
    assert!(kept < learned, "{kept} {learned}");
}

#[test]
fn what_a_recipe_cannot_mean_is_said() {
    for (change, expected) in [
        ("model.hidden=[]", "model.hidden = []: expected at least one layer"),
        (
            "model.hidden=[20, 0]",
            "model.hidden = [20, 0]: expected at least one layer, of at least 1 unit each",
        ),
        ("model.reading=mean", "unknown variant `mean`"),
        ("model.heads=4", "unknown field `heads`"),
    ] {
        let mut table = Recipe::table("glyphs").unwrap();
        table.insert("model".into(), toml::Value::Table("kind = \"binary\"".parse().unwrap()));
        set(&mut table, change).unwrap();
        let error = Recipe::resolve(table).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(expected), "{error}");
    }
}
