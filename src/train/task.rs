//! What is learned: the loss of a batch and the figures of an evaluation.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, D};
use serde::{Deserialize, Serialize};

use crate::data::{Batch, Loader, Preprocess, Source};
use crate::kernels::tape;
use crate::models::{DropPath, VisionModel, VisionOutput};
use crate::recipe::DistillKind;
use crate::weights::Param;
use crate::{kernels, Error, Result};

use super::{signal, Figure, Heads, Progress, Recordings};

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

/// What one forward and backward pass gave.
#[derive(Debug)]
pub struct Pass {
    /// Mean loss over what was predicted.
    pub loss: Figure,
    /// How many of the predictions were right.
    pub right: Figure,
    /// The gradient of the mean loss for each parameter; `None` where none arrived.
    pub grads: Vec<Option<Tensor>>,
}

/// What is learned of a batch.
pub trait Task {
    /// Several samples.
    type Batch;

    /// One forward and backward pass. Errs with [`Error::NotFinite`] where the loss is not finite, naming
    /// the first layer where it shows.
    fn learn(&self, batch: &Self::Batch, params: &[Param], device: &Device) -> Result<Pass>;

    /// Predictions in a batch: the weight of its mean among others.
    fn predictions(batch: &Self::Batch) -> usize;

    /// Samples or tokens in a batch, for figures of speed.
    fn counted(batch: &Self::Batch) -> usize;

    /// The samples of a batch, for messages.
    fn samples(batch: &Self::Batch) -> Vec<u32>;
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
    /// What is left out of the model in training: the rate of stochastic depth at the deepest layer, and the
    /// seed, of a model's own dropout too. None: nothing is left out.
    pub drop_path: Option<(f64, u64)>,
    /// The classes of each task, where an image's task is known: the class head answers among its own.
    pub heads: Option<Heads>,
    /// Where passes on a CUDA device are recorded; nothing: each is launched step by step.
    pub recordings: Option<Recordings>,
}

/// The loss of a batch (mean over its samples, with its graph) and how many of its answers are right.
#[derive(Debug)]
pub struct Loss {
    /// The scalar to go backward from.
    pub loss: Tensor,
    /// Its value.
    pub value: Figure,
    /// Samples whose label has the largest logit.
    pub right: Figure,
}

/// Training loss on logits (Liu et al. 2023 as released; ofq.md 6.1): cross-entropy with the labels,
/// or with the soft `targets [batch, classes]` of mixed images, plus, with a teacher, the soft
/// cross-entropy against the teacher's class head. A model with two heads learns the labels with the
/// class head and the teacher with the other.
///
/// Under [`DistillKind::Pld`] the student learns the teacher's ranking, which begins with the label and so
/// takes the place of both terms; of two heads the class head still learns the labels. The ranking of
/// a mixed image begins with its primary label, whatever its soft targets.
///
/// Of logits of a `variance` v the cross-entropy is an expectation, which is bounded from above as
/// [`crate::models::binary`] says: it is that of `class + v / 2`, and half the variance of the label more.
pub fn distillation_loss(
    output: &VisionOutput,
    labels: &Tensor,
    targets: Option<&Tensor>,
    teacher_class_logits: Option<(&Tensor, DistillKind)>,
) -> Result<Tensor> {
    let certain = |logits: &Tensor| match targets {
        Some(targets) => kernels::soft_cross_entropy(logits, targets),
        None => kernels::cross_entropy(logits, labels),
    };
    let hard = |logits: &Tensor| {
        let Some(variance) = &output.variance else { return certain(logits) };
        let of_label = match targets {
            Some(targets) => (variance * targets)?.sum(D::Minus1)?,
            None => variance.gather(&labels.unsqueeze(1)?, 1)?,
        };
        certain(&(logits + (variance * 0.5)?)?)? + (of_label.mean_all()? * 0.5)?
    };
    let Some((teacher, kind)) = teacher_class_logits.filter(|(_, kind)| *kind != DistillKind::None) else {
        return match &output.distillation {
            None => Ok(hard(&output.class)?),
            // Without a teacher both heads learn the labels.
            Some(distillation) => Ok(((hard(&output.class)? + hard(distillation)?)? * 0.5)?),
        };
    };
    let probs = kernels::softmax(&teacher.detach())?;
    let student = output.distillation.as_ref().unwrap_or(&output.class);
    let soft = match kind {
        DistillKind::Pld => kernels::plackett_luce(student, &probs, labels)?,
        DistillKind::Soft | DistillKind::None => kernels::soft_cross_entropy(student, &probs)?,
    };
    match (kind, &output.distillation) {
        (DistillKind::Pld, None) => Ok(soft),
        _ => Ok((hard(&output.class)? + soft)?),
    }
}

impl Classify {
    /// The loss of `batch`.
    pub fn loss(&self, batch: &Batch, device: &Device) -> Result<Loss> {
        let labels = Tensor::from_slice(&batch.labels, batch.labels.len(), device)?;
        self.loss_of(batch, (&batch.images, &labels, batch.targets.as_ref()))
    }

    /// The same of a batch whose images, labels and soft targets lie at these places.
    fn loss_of(
        &self,
        batch: &Batch,
        (images, labels, targets): (&Tensor, &Tensor, Option<&Tensor>),
    ) -> Result<Loss> {
        let drop = self.drop_path.map(|(rate, seed)| {
            let samples = batch.indices.clone();
            DropPath { rate, seed, epoch: batch.epoch, samples }
        });
        let mut output = self.model.train(images, drop.as_ref())?;
        if let Some(heads) = &self.heads {
            output.class = heads.open(&output.class, &batch.labels)?;
            if let Some(other) = &output.distillation {
                output.distillation = Some(heads.open(other, &batch.labels)?);
            }
        }
        let teacher = match (&self.teacher, self.distill) {
            (None, _) | (_, DistillKind::None) => None,
            (Some(teacher), DistillKind::Soft | DistillKind::Pld) => {
                Some(teacher.forward(images)?.class.detach())
            }
        };
        let taught = teacher.as_ref().map(|logits| (logits, self.distill));
        let loss = distillation_loss(&output, labels, targets, taught)?;
        let value = Figure::of(&loss)?;
        if value.known_broken() {
            let value = value.read()?;
            let place = self.model.not_finite(images)?;
            let place = place.map(|layer| format!("; first seen behind {layer}")).unwrap_or_default();
            return Err(Error::NotFinite(format!("the loss is {value}, expected a finite number{place}")));
        }
        let logits = output.logits()?.detach();
        let right = match logits.device().is_cpu() {
            false => Figure::of(&logits.argmax(D::Minus1)?.eq(labels)?.to_dtype(DType::F32)?.sum_all()?)?,
            true => {
                let logits = logits.to_vec2::<f32>()?;
                let right = logits.iter().zip(&batch.labels).filter(|(row, label)| rank(row, **label) == 0);
                Figure::Known(right.count() as f64)
            }
        };
        Ok(Loss { loss, value, right })
    }
}

impl Classify {
    /// Forward and backward over a batch whose images, labels and soft targets lie at these places.
    pub(super) fn pass(
        &self,
        batch: &Batch,
        places: (&Tensor, &Tensor, Option<&Tensor>),
        params: &[Param],
    ) -> Result<Pass> {
        let (out, tape) = tape::record(|| self.loss_of(batch, places))?;
        let wanted: Vec<&Tensor> = params.iter().map(|p| p.var.as_tensor()).collect();
        let mut grads = tape.backward(&out.loss, &wanted)?;
        let grads = wanted.iter().map(|x| grads.remove(x)).collect();
        Ok(Pass { loss: out.value, right: out.right, grads })
    }
}

impl Task for Classify {
    type Batch = Batch;

    fn learn(&self, batch: &Batch, params: &[Param], device: &Device) -> Result<Pass> {
        #[cfg(feature = "cuda")]
        if let (Some(recordings), true) = (&self.recordings, device.is_cuda()) {
            return recordings.learn(self, batch, params, device);
        }
        let labels = Tensor::from_slice(&batch.labels, batch.labels.len(), device)?;
        self.pass(batch, (&batch.images, &labels, batch.targets.as_ref()), params)
    }

    fn predictions(batch: &Batch) -> usize {
        batch.labels.len()
    }

    fn counted(batch: &Batch) -> usize {
        batch.labels.len()
    }

    fn samples(batch: &Batch) -> Vec<u32> {
        batch.indices.clone()
    }
}

/// How many classes come before `label`: larger logits, and equal ones of smaller index. A row with
/// NaN in it puts the label last.
pub(crate) fn rank(logits: &[f32], label: u32) -> usize {
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
    let answer = |batch: &Batch| model.forward(&batch.images)?.logits();
    evaluate_with(&answer, source, preprocess, batch_size, device, progress, stoppable)
}

/// As [`evaluate`], with whatever makes logits `[batch, classes]` of a batch.
pub fn evaluate_with(
    answer: &dyn Fn(&Batch) -> Result<Tensor>,
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
    let loader = Loader::new(source, preprocess, order, batch_size, None, workers, device);
    let (mut first, mut five, mut samples, mut loss) = (0usize, 0usize, 0usize, 0f64);
    progress.start("evaluating", total);
    for batch in loader {
        if let Some(signal) = signal::asked().filter(|_| stoppable) {
            return Err(Error::Stopped { signal, resume: None });
        }
        let batch = batch?;
        let logits = answer(&batch)?;
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

    /// Logits of 0 and ln 3, so probabilities 1/4 and 3/4, the label 0, the teacher indifferent.
    #[test]
    fn losses_by_hand() {
        let device = &Device::Cpu;
        let logits = |a: f32, b: f32| Tensor::new(&[[a.ln(), b.ln()]], device).unwrap();
        let one = VisionOutput { class: logits(1.0, 3.0), distillation: None, variance: None };
        let two =
            VisionOutput { class: logits(1.0, 3.0), distillation: Some(logits(1.0, 1.0)), variance: None };
        let (labels, teacher) = (Tensor::new(&[0u32], device).unwrap(), logits(7.0, 7.0));
        let mixed = Tensor::new(&[[0.5f32, 0.5]], device).unwrap();
        let loss = |output: &VisionOutput, targets: Option<&Tensor>, kind: DistillKind| {
            let taught = Some((&teacher, kind));
            distillation_loss(output, &labels, targets, taught).unwrap().to_scalar::<f32>().unwrap()
        };
        let (hard, soft, pld) = (4f32.ln(), 0.5 * 4f32.ln() + 0.5 * (4f32 / 3.0).ln(), 0.5 * 4f32.ln());
        let half = 2f32.ln(); // any loss of the indifferent second head, but for a ranking
        let cases = [
            (loss(&one, None, DistillKind::None), hard),
            (loss(&two, None, DistillKind::None), 0.5 * (hard + half)),
            (loss(&one, Some(&mixed), DistillKind::None), soft),
            (loss(&two, Some(&mixed), DistillKind::None), 0.5 * (soft + half)),
            (loss(&one, None, DistillKind::Soft), hard + soft),
            (loss(&one, Some(&mixed), DistillKind::Soft), soft + soft),
            (loss(&two, Some(&mixed), DistillKind::Soft), soft + half),
            (loss(&one, None, DistillKind::Pld), pld),
            (loss(&one, Some(&mixed), DistillKind::Pld), pld),
            (loss(&two, None, DistillKind::Pld), hard + 0.5 * half),
        ];
        for (i, (got, want)) in cases.into_iter().enumerate() {
            assert!((got - want).abs() < 1e-5, "case {i}: {got} {want}");
        }
    }

    /// Logits of means 0 and ln 3 and variances 2 ln 2 and 2 ln 5: E e^z is 2 and 15, and the label's mean 0.
    #[test]
    fn uncertain_logits_cost_their_variance() {
        let device = &Device::Cpu;
        let class = Tensor::new(&[[0f32, 3f32.ln()]], device).unwrap();
        let variance = Tensor::new(&[[2.0 * 2f32.ln(), 2.0 * 5f32.ln()]], device).unwrap();
        let labels = Tensor::new(&[0u32], device).unwrap();
        let mixed = Tensor::new(&[[0.25f32, 0.75]], device).unwrap();
        let output = VisionOutput { class, distillation: None, variance: Some(variance) };
        let loss = |targets: Option<&Tensor>| {
            distillation_loss(&output, &labels, targets, None).unwrap().to_scalar::<f32>().unwrap()
        };
        assert!((loss(None) - 17f32.ln()).abs() < 1e-6, "{}", loss(None));
        let expected = 17f32.ln() - 0.75 * 3f32.ln();
        assert!((loss(Some(&mixed)) - expected).abs() < 1e-6, "{}", loss(Some(&mixed)));
    }

    #[test]
    fn ranks_by_hand() {
        let row = [0.5, 2.0, 2.0, -1.0];
        assert_eq!([rank(&row, 0), rank(&row, 1), rank(&row, 2), rank(&row, 3)], [2, 0, 1, 3]);
        assert_eq!(rank(&row, 9), usize::MAX);
        assert_eq!(rank(&[1.0, f32::NAN], 0), usize::MAX);
    }
}
