//! What is learned: the loss of a batch and the figures of an evaluation.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, D};
use serde::{Deserialize, Serialize};

use crate::data::{Batch, Loader, Preprocess, Source};
use crate::models::{DropPath, VisionModel, VisionOutput};
use crate::recipe::DistillKind;
use crate::{kernels, Error, Result};

use super::{signal, Progress};

/// The figures of an evaluation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// Percent of samples whose label has the largest logit.
    pub top1: f64,
    /// Percent of samples whose label is among the five largest logits.
    pub top5: f64,
    /// Mean cross-entropy in nats.
    pub loss: f64,
    /// Samples seen.
    pub samples: usize,
    /// Samples a second, data included.
    pub samples_per_s: f64,
}

/// Image classification, with or without a teacher.
#[derive(Debug)]
pub struct Classify {
    /// The student.
    pub model: VisionModel,
    /// A frozen teacher in full precision.
    pub teacher: Option<VisionModel>,
    /// What the student learns from it.
    pub distill: DistillKind,
    /// Stochastic depth: the rate of the deepest layer and the seed.
    pub drop_path: Option<(f64, u64)>,
}

/// The loss of a batch (mean over its samples, with its graph) and how many of its answers are right.
#[derive(Debug)]
pub struct Loss {
    /// The scalar to go backward from.
    pub loss: Tensor,
    /// Samples whose label has the largest logit.
    pub right: usize,
}

/// Training loss on logits (Liu et al. 2023 as released; ofq.md 6.1): cross-entropy with the labels,
/// plus, with a teacher, the soft cross-entropy against the teacher's class head. A model with two
/// heads learns the labels with the class head and the teacher with the other.
pub fn distillation_loss(
    output: &VisionOutput,
    labels: &Tensor,
    teacher_class_logits: Option<&Tensor>,
) -> Result<Tensor> {
    let hard = kernels::cross_entropy(&output.class, labels)?;
    match (teacher_class_logits, &output.distillation) {
        (Some(teacher), distillation) => {
            let target = kernels::softmax(&teacher.detach())?;
            let student = distillation.as_ref().unwrap_or(&output.class);
            Ok((hard + kernels::soft_cross_entropy(student, &target)?)?)
        }
        (None, None) => Ok(hard),
        // Without a teacher both heads learn the labels.
        (None, Some(distillation)) => Ok(((hard + kernels::cross_entropy(distillation, labels)?)? * 0.5)?),
    }
}

impl Classify {
    /// The loss of `batch`.
    pub fn loss(&self, batch: &Batch, device: &Device) -> Result<Loss> {
        let labels = Tensor::from_slice(&batch.labels, batch.labels.len(), device)?;
        let drop = self.drop_path.map(|(rate, seed)| {
            let samples = batch.indices.clone();
            DropPath { rate, seed, epoch: batch.epoch, samples }
        });
        let output = self.model.train(&batch.images, drop.as_ref())?;
        let teacher = match (&self.teacher, self.distill) {
            (Some(teacher), DistillKind::Soft) => Some(teacher.forward(&batch.images)?.class.detach()),
            _ => None,
        };
        let loss = distillation_loss(&output, &labels, teacher.as_ref())?;
        let value = loss.to_dtype(DType::F32)?.to_scalar::<f32>()?;
        if !value.is_finite() {
            let place = self.model.not_finite(&batch.images)?;
            let place = place.map(|layer| format!("; first seen behind {layer}")).unwrap_or_default();
            return Err(Error::Run(format!("the loss is {value}, expected a finite number{place}")));
        }
        let logits = output.logits()?.detach().to_vec2::<f32>()?;
        let right = logits.iter().zip(&batch.labels).filter(|(row, label)| rank(row, **label) == 0).count();
        Ok(Loss { loss, right })
    }
}

/// How many classes come before `label`: larger logits, and equal ones of smaller index. A row with
/// NaN in it puts the label last.
fn rank(logits: &[f32], label: u32) -> usize {
    let label = label as usize;
    let Some(&own) = logits.get(label).filter(|_| logits.iter().all(|l| !l.is_nan())) else {
        return usize::MAX;
    };
    logits.iter().enumerate().filter(|(i, &l)| l > own || (l == own && *i < label)).count()
}

/// Evaluates `model` on every sample of `source`, in order. Where `stoppable`, a signal ends it.
pub fn evaluate(
    model: &VisionModel,
    source: Arc<dyn Source>,
    preprocess: Arc<Preprocess>,
    batch_size: usize,
    device: &Device,
    progress: &dyn Progress,
    stoppable: bool,
) -> Result<Accuracy> {
    let started = std::time::Instant::now();
    let total = source.len();
    let order: Vec<u32> = (0..total as u32).collect();
    let workers = rayon::current_num_threads().clamp(1, 4);
    let loader = Loader::new(source, preprocess, None, order, batch_size, 0, 0, workers, device);
    let (mut first, mut five, mut samples, mut loss) = (0usize, 0usize, 0usize, 0f64);
    progress.start("evaluating", total);
    for batch in loader {
        if let Some(signal) = signal::asked().filter(|_| stoppable) {
            return Err(Error::Stopped { signal, resume: None });
        }
        let batch = batch?;
        let logits = model.forward(&batch.images)?.logits()?;
        let labels = Tensor::from_slice(&batch.labels, batch.labels.len(), device)?;
        let log_p = candle_nn::ops::log_softmax(&logits, D::Minus1)?;
        let picked = log_p.gather(&labels.unsqueeze(1)?, 1)?.flatten_all()?.to_vec1::<f32>()?;
        loss -= picked.iter().map(|&p| f64::from(p)).sum::<f64>();
        for (row, &label) in logits.to_vec2::<f32>()?.iter().zip(&batch.labels) {
            let rank = rank(row, label);
            first += usize::from(rank == 0);
            five += usize::from(rank < 5);
        }
        samples += batch.labels.len();
        progress.tick(samples, &format!("top-1 {:.2} %", 100.0 * first as f64 / samples as f64));
    }
    progress.finish();
    if samples == 0 {
        return Err(Error::Run("evaluation: found no samples".into()));
    }
    let percent = |count: usize| 100.0 * count as f64 / samples as f64;
    Ok(Accuracy {
        top1: percent(first),
        top5: percent(five),
        loss: loss / samples as f64,
        samples,
        samples_per_s: samples as f64 / started.elapsed().as_secs_f64().max(1e-9),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_by_hand() {
        let row = [0.5, 2.0, 2.0, -1.0];
        assert_eq!([rank(&row, 0), rank(&row, 1), rank(&row, 2), rank(&row, 3)], [2, 0, 1, 3]);
        assert_eq!(rank(&row, 9), usize::MAX);
        assert_eq!(rank(&[1.0, f32::NAN], 0), usize::MAX);
    }
}
