//! Text as what a run trains on and is measured by.

use candle_core::{DType, Device};
use serde_json::{json, Map, Value};

use super::task::{batch_loss, Predict, Rows};
use crate::data::text::{TextData, TextSet};
use crate::models::{Llama, LlamaConfig};
use crate::recipe::Recipe;
use crate::train::{signal, Accuracy, Batches, Progress, Supply};
use crate::weights::Weights;
use crate::{Error, Result};

/// Text under a language model.
pub struct Texts<'a> {
    /// The resolved recipe.
    pub recipe: &'a Recipe,
    /// The text.
    pub data: &'a TextData,
    /// The model's sizes.
    pub model: &'a LlamaConfig,
    /// What activations are held in.
    pub dtype: DType,
    /// Where tensors live.
    pub device: &'a Device,
}

/// Mean loss of `model` over all targets of `set`, in rows order. `top1` and `top5` are not measured and 0;
/// `samples` counts targets and `samples_per_s` tokens. Where `stoppable`, a signal ends it.
pub fn evaluate_text(
    model: &Llama,
    set: &TextSet,
    batch_size: usize,
    device: &Device,
    progress: &dyn Progress,
    stoppable: bool,
) -> Result<Accuracy> {
    let started = std::time::Instant::now();
    let epoch = set.epoch(0, 0, false);
    let total = epoch.rows();
    let (mut sum, mut count, mut tokens) = (0f64, 0usize, 0usize);
    progress.start("evaluating", total);
    for from in (0..total).step_by(batch_size.max(1)) {
        if let Some(signal) = signal::asked().filter(|_| stoppable) {
            return Err(Error::Stopped { signal, resume: None });
        }
        let to = (from + batch_size.max(1)).min(total);
        let batch = epoch.batch(from..to)?;
        let (loss, predicted) = batch_loss(model, &batch, device)?;
        sum += loss;
        count += predicted;
        tokens += batch.tokens.len();
        progress.tick(to, &format!("loss {:.4}", sum / count.max(1) as f64));
    }
    progress.finish();
    if count == 0 {
        return Err(Error::Run("evaluation: found no token to predict".into()));
    }
    Ok(Accuracy {
        top1: 0.0,
        top5: 0.0,
        loss: sum / count as f64,
        samples: count,
        samples_per_s: tokens as f64 / started.elapsed().as_secs_f64().max(1e-9),
    })
}

/// The figures of text as JSON has them.
pub fn text_figures(figures: &Accuracy) -> Map<String, Value> {
    let line = json!({
        "loss": figures.loss,
        "ppl": figures.loss.exp(),
        "tokens": figures.samples,
        "tokens_per_s": figures.samples_per_s,
    });
    line.as_object().cloned().unwrap_or_default()
}

impl Supply for Texts<'_> {
    type Task = Predict;

    fn samples(&self) -> usize {
        self.data.train.rows()
    }

    fn batches(&self, epoch: u64, skip: usize) -> Result<Batches<'_, Rows>> {
        let rows = self.data.train.epoch(self.recipe.seed, epoch, true);
        let (total, size) = (rows.rows(), self.recipe.train.batch_size);
        let batch = move |from: usize| {
            let batch = rows.batch(from..(from + size).min(total))?;
            Ok(Rows { batch, number: (epoch << 24) ^ from as u64 })
        };
        Ok(Box::new((skip.min(total)..total).step_by(size).map(batch)))
    }

    fn evaluate(&self, weights: &Weights, progress: &dyn Progress, stoppable: bool) -> Result<Accuracy> {
        let model = Llama::new(self.model, weights, self.dtype)?;
        let size = self.recipe.train.eval_batch_size;
        evaluate_text(&model, &self.data.eval, size, self.device, progress, stoppable)
    }

    fn score(&self, figures: &Accuracy) -> f64 {
        -figures.loss
    }

    fn figures(&self, figures: &Accuracy) -> Map<String, Value> {
        text_figures(figures)
    }

    fn unit(&self) -> (&'static str, &'static str) {
        ("tokens_per_s", "tokens/s")
    }

    fn counts_right(&self) -> bool {
        false
    }

    fn left_out(&self) -> Vec<String> {
        Vec::new()
    }

    fn depth(&self, name: &str) -> (usize, usize) {
        let last = self.model.layers + 1;
        let block = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next());
        let block = block.and_then(|i| i.parse::<usize>().ok()).map(|i| i + 1);
        (block.unwrap_or(if name.starts_with("model.embed_tokens.") { 0 } else { last }), last)
    }
}
