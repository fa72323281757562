//! One task's stretch of training: its batches, what is added to its loss, and an evaluation on all tasks.

use std::sync::{Arc, Mutex};

use candle_core::Device;
use serde_json::{json, Map, Value};

use super::ewc::Ewc;
use super::field::FieldPrior;
use super::tasks::{Joined, Tasks};
use crate::data::{epoch_order, Batch, Loader, Preprocess, Source, Training};
use crate::models::VisionConfig;
use crate::random::Random;
use crate::recipe::{Recipe, ReplayConfig};
use crate::train::{evaluate_with, Accuracy, Batches, Classify, Pass, Progress, Supply, Task as Learned};
use crate::weights::{Param, Weights};
use crate::{Error, Result};

/// What is added to the loss of a later task.
pub enum Penalty {
    /// Nothing.
    None,
    /// The distance from where earlier tasks left the weights, times lambda.
    Ewc(Ewc, f64),
    /// The divergence from the posterior of the tasks before.
    Field(FieldPrior),
}

/// Classification under a penalty.
pub struct Protected {
    /// The task itself.
    pub classify: Classify,
    /// What is added to its loss.
    pub penalty: Penalty,
}

impl Learned for Protected {
    type Batch = Batch;

    fn learn(&self, batch: &Batch, params: &[Param], device: &Device) -> Result<Pass> {
        let mut pass = self.classify.learn(batch, params, device)?;
        match &self.penalty {
            Penalty::None => {}
            Penalty::Ewc(ewc, lambda) => ewc.add(params, *lambda, &mut pass)?,
            Penalty::Field(prior) => prior.add(params, &mut pass)?,
        }
        if pass.loss.known_broken() {
            return Err(Error::NotFinite(format!("the loss with its penalty is {}", pass.loss.read()?)));
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

/// A task of several, as what the trainer trains on and is measured by.
pub struct Stretch<'a> {
    /// The resolved recipe.
    pub recipe: &'a Recipe,
    /// All tasks.
    pub tasks: &'a Tasks,
    /// Which of them is learned.
    pub at: usize,
    /// Its images, and behind them those that are kept of earlier tasks.
    source: Arc<dyn Source>,
    /// The share of kept images in an epoch.
    share: f64,
    /// How images become tensors.
    pub preprocess: Arc<Preprocess>,
    /// The model's sizes.
    pub model: &'a VisionConfig,
    /// Where tensors live.
    pub device: &'a Device,
    /// Top-1 on every task at the last evaluation.
    seen: Mutex<Option<Vec<f64>>>,
}

/// The training images that are kept of task `task`, as indices.
pub fn kept(seed: u64, task: usize, len: usize, samples: usize) -> Vec<u32> {
    let mut kept = Random::new(seed, "replay samples", &[task as u64]).permutation(len);
    kept.truncate(samples);
    kept
}

impl<'a> Stretch<'a> {
    /// The stretch of task `at`. With `replay` earlier tasks' kept images are among its own.
    pub fn new(
        recipe: &'a Recipe,
        tasks: &'a Tasks,
        at: usize,
        replay: Option<&ReplayConfig>,
        preprocess: Arc<Preprocess>,
        model: &'a VisionConfig,
        device: &'a Device,
    ) -> Self {
        let own = tasks.list[at].train.clone();
        let (source, share): (Arc<dyn Source>, f64) = match replay.filter(|_| at > 0) {
            None => (own, 0.0),
            Some(replay) => {
                let all = (0..own.len() as u32).collect();
                let earlier = tasks.list[..at].iter().enumerate().map(|(i, task)| {
                    (task.train.clone(), kept(recipe.seed, i, task.train.len(), replay.samples))
                });
                (Arc::new(Joined::new(std::iter::once((own, all)).chain(earlier).collect())), replay.share)
            }
        };
        let seen = Mutex::new(None);
        Stretch { recipe, tasks, at, source, share, preprocess, model, device, seen }
    }

    /// Top-1 in percent on every task at the last evaluation, once.
    pub fn take_seen(&self) -> Option<Vec<f64>> {
        self.seen.lock().unwrap_or_else(|e| e.into_inner()).take()
    }

    /// The images of an epoch, as places in the source.
    fn order(&self, epoch: u64) -> Vec<u32> {
        let (seed, own) = (self.recipe.seed, self.tasks.list[self.at].train.len());
        let kept = self.source.len() - own;
        let new = epoch_order(own, self.recipe.augment.repeats, seed, epoch);
        if kept == 0 {
            return new;
        }
        let old = ((own as f64 * self.share).round() as usize).min(own);
        let rounds = (0..old.div_ceil(kept) as u64)
            .flat_map(|round| Random::new(seed, "replay order", &[epoch, round]).permutation(kept));
        let mut both: Vec<u32> = new[..own - old].to_vec();
        both.extend(rounds.take(old).map(|i| own as u32 + i));
        let mixed = Random::new(seed, "replay mix", &[epoch]).permutation(both.len());
        mixed.into_iter().map(|i| both[i as usize]).collect()
    }
}

impl Supply for Stretch<'_> {
    type Task = Protected;

    fn samples(&self) -> usize {
        self.tasks.list[self.at].train.len()
    }

    fn batches(&self, epoch: u64, skip: usize) -> Result<Batches<'_, Batch>> {
        let order = self.order(epoch);
        let done = skip.min(order.len());
        let augment = self.recipe.augment.clone();
        let (seed, classes) = (self.recipe.seed, self.tasks.classes.len());
        Ok(Box::new(Loader::new(
            self.source.clone(),
            self.preprocess.clone(),
            order[done..].to_vec(),
            self.recipe.train.batch_size,
            Some(Training { augment, classes, seed, epoch, done }),
            rayon::current_num_threads().clamp(1, 4),
            self.device,
        )))
    }

    /// Evaluates on every task; the figures are those of the one that is learned.
    fn evaluate(&self, weights: &Weights, progress: &dyn Progress, stoppable: bool) -> Result<Accuracy> {
        let model = self.model.build(weights)?;
        let answer = |batch: &Batch| {
            let logits = model.forward(&batch.images)?.logits()?;
            match &self.tasks.heads {
                Some(heads) => heads.open(&logits, &batch.labels),
                None => Ok(logits),
            }
        };
        let mut all = Vec::with_capacity(self.tasks.list.len());
        let mut own = Accuracy::default();
        for (i, task) in self.tasks.list.iter().enumerate() {
            let (eval, preprocess) = (task.eval.clone(), self.preprocess.clone());
            let size = self.recipe.train.eval_batch_size;
            let got = evaluate_with(&answer, eval, preprocess, size, self.device, progress, stoppable)?;
            all.push(got.top1);
            if i == self.at {
                own = got;
            }
        }
        *self.seen.lock().unwrap_or_else(|e| e.into_inner()) = Some(all);
        Ok(own)
    }

    fn score(&self, figures: &Accuracy) -> f64 {
        figures.top1
    }

    fn figures(&self, figures: &Accuracy) -> Map<String, Value> {
        let mut line = Map::new();
        line.insert("task".into(), json!(self.tasks.list[self.at].name));
        line.insert("loss".into(), json!(figures.loss));
        line.insert("samples".into(), json!(figures.samples));
        line.insert("samples_per_s".into(), json!(figures.samples_per_s));
        let seen = self.seen.lock().unwrap_or_else(|e| e.into_inner());
        for (task, top1) in self.tasks.list.iter().zip(seen.iter().flatten()) {
            line.insert(format!("task/{}", task.name), json!(top1));
        }
        line
    }

    fn unit(&self) -> (&'static str, &'static str) {
        ("samples_per_s", "images/s")
    }

    fn left_out(&self) -> Vec<String> {
        self.source.left_out()
    }

    fn depth(&self, name: &str) -> (usize, usize) {
        self.model.depth(name)
    }
}
