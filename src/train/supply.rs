//! What a run trains on and is measured by, whatever it is made of: images or text.

use std::sync::Arc;

use candle_core::Device;
use serde_json::{json, Map, Value};

use super::task::{evaluate, Accuracy, Classify, Task};
use super::Progress;
use crate::data::{epoch_order, Batch, Dataset, Loader, Preprocess, Training};
use crate::models::VisionConfig;
use crate::recipe::Recipe;
use crate::weights::Weights;
use crate::Result;

/// The batches of an epoch, in order.
pub type Batches<'a, B> = Box<dyn Iterator<Item = Result<B>> + 'a>;

/// Training batches, and how a model is measured.
pub trait Supply {
    /// What is learned of each batch.
    type Task: Task;

    /// Samples of one epoch.
    fn samples(&self) -> usize;

    /// The batches of the epoch numbered `epoch` (its number addresses the random streams), the first
    /// `skip` samples left out.
    fn batches(&self, epoch: u64, skip: usize) -> Result<Batches<'_, <Self::Task as Task>::Batch>>;

    /// The figures of a frozen store. Where `stoppable`, a signal ends it.
    fn evaluate(&self, weights: &Weights, progress: &dyn Progress, stoppable: bool) -> Result<Accuracy>;

    /// What makes one evaluation better than another: more is better.
    fn score(&self, figures: &Accuracy) -> f64;

    /// The figures as a line of metrics.jsonl holds them.
    fn figures(&self, figures: &Accuracy) -> Map<String, Value>;

    /// What is counted a second: its key in metrics.jsonl and its name in messages.
    fn unit(&self) -> (&'static str, &'static str);

    /// Whether training counts right answers.
    fn counts_right(&self) -> bool {
        true
    }

    /// What could not be read so far, one line each.
    fn left_out(&self) -> Vec<String>;

    /// How deep the parameter called `name` lies, and how deep the output does (see
    /// [`VisionConfig::depth`]).
    fn depth(&self, name: &str) -> (usize, usize);
}

/// Labelled images.
pub struct Images<'a> {
    /// The resolved recipe.
    pub recipe: &'a Recipe,
    /// The images.
    pub dataset: &'a Dataset,
    /// How images become tensors.
    pub preprocess: Arc<Preprocess>,
    /// The model's sizes.
    pub model: &'a VisionConfig,
    /// Where tensors live.
    pub device: &'a Device,
}

impl Images<'_> {
    fn loader(&self, epoch: u64, skip: usize) -> Loader {
        let augment = self.recipe.augment.clone();
        let seed = self.recipe.seed;
        let order = epoch_order(self.dataset.train.len(), augment.repeats, seed, epoch);
        let done = skip.min(order.len());
        let classes = self.dataset.classes.len();
        Loader::new(
            self.dataset.train.clone(),
            self.preprocess.clone(),
            order[done..].to_vec(),
            self.recipe.train.batch_size,
            Some(Training { augment, classes, seed, epoch, done }),
            rayon::current_num_threads().clamp(1, 4),
            self.device,
        )
    }
}

impl Supply for Images<'_> {
    type Task = Classify;

    fn samples(&self) -> usize {
        self.dataset.train.len()
    }

    fn batches(&self, epoch: u64, skip: usize) -> Result<Batches<'_, Batch>> {
        Ok(Box::new(self.loader(epoch, skip)))
    }

    fn evaluate(&self, weights: &Weights, progress: &dyn Progress, stoppable: bool) -> Result<Accuracy> {
        let model = self.model.build(weights)?;
        let batch = self.recipe.train.eval_batch_size;
        let (eval, preprocess) = (self.dataset.eval.clone(), self.preprocess.clone());
        evaluate(&model, eval, preprocess, batch, self.device, progress, stoppable)
    }

    fn score(&self, figures: &Accuracy) -> f64 {
        figures.top1
    }

    fn figures(&self, figures: &Accuracy) -> Map<String, Value> {
        let line = json!({
            "loss": figures.loss,
            "top1": figures.top1,
            "top5": figures.top5,
            "samples": figures.samples,
            "samples_per_s": figures.samples_per_s,
        });
        line.as_object().cloned().unwrap_or_default()
    }

    fn unit(&self) -> (&'static str, &'static str) {
        ("samples_per_s", "images/s")
    }

    fn left_out(&self) -> Vec<String> {
        let sources = [&self.dataset.train, &self.dataset.eval];
        sources.into_iter().flat_map(|source| source.left_out()).collect()
    }

    fn depth(&self, name: &str) -> (usize, usize) {
        self.model.depth(name)
    }
}
