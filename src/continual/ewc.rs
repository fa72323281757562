//! Elastic weight consolidation (Kirkpatrick et al. 2017): weights that mattered for an earlier task are
//! held near where that task left them.
//!
//! ```text
//! F_i = mean over samples of (d log p(y | x) / d w_i)^2      penalty = lambda / 2 sum_i F_i (w_i - w*_i)^2
//! ```
//!
//! F and the anchor w* are those of the very network that learned the task, at its end, sample by sample,
//! y drawn from what the model says (or the data's label). The penalty acts from the first step of the next
//! task. Online EWC (Schwarz et al. 2018) keeps one anchor and `F = keep F + F_new`.

use std::sync::Arc;

use candle_core::{Device, Tensor, D};

use crate::data::{Loader, Preprocess, Source};
use crate::models::VisionModel;
use crate::random::Random;
use crate::recipe::{EwcConfig, FisherLabels};
use crate::train::{signal, Figure, Heads, Pass, Progress};
use crate::weights::Param;
use crate::{kernels, Error, Result};

/// What one task holds of one weight.
#[derive(Clone, Debug)]
pub struct Held {
    /// The parameter's name.
    pub name: String,
    /// Its Fisher information, in its shape.
    pub fisher: Tensor,
    /// Its value at the end of the task.
    pub anchor: Tensor,
}

/// The anchors of the tasks that were learned.
#[derive(Clone, Debug, Default)]
pub struct Ewc {
    /// For each anchor its weights.
    pub tasks: Vec<Vec<Held>>,
}

/// What Fisher information is measured on.
pub struct Sample<'a> {
    /// The network at the end of a task.
    pub model: &'a VisionModel,
    /// The task's training images.
    pub source: Arc<dyn Source>,
    /// How they become tensors.
    pub preprocess: Arc<Preprocess>,
    /// The outputs of each task, where an image's task is known.
    pub heads: Option<&'a Heads>,
    /// The run's seed and the task's number.
    pub seed: (u64, u64),
    /// Where tensors live.
    pub device: &'a Device,
}

/// The diagonal of the Fisher information of `params`, in their shapes.
pub fn fisher(
    sample: &Sample<'_>,
    params: &[Param],
    config: &EwcConfig,
    progress: &dyn Progress,
) -> Result<Vec<Tensor>> {
    let (seed, task) = sample.seed;
    let count = config.samples.min(sample.source.len());
    let mut order = Random::new(seed, "fisher samples", &[task]).permutation(sample.source.len());
    order.truncate(count);
    let (source, preprocess) = (sample.source.clone(), sample.preprocess.clone());
    let loader = Loader::new(source, preprocess, order, 1, None, 1, sample.device);
    let mut sums: Vec<Option<Tensor>> = vec![None; params.len()];
    progress.start("Fisher information", count);
    for (i, batch) in loader.enumerate() {
        if let Some(signal) = signal::asked() {
            return Err(Error::Stopped { signal, resume: None });
        }
        let batch = batch?;
        let mut logits = sample.model.forward(&batch.images)?.logits()?;
        if let Some(heads) = sample.heads {
            logits = heads.open(&logits, &batch.labels)?;
        }
        let label = match config.labels {
            FisherLabels::Data => batch.labels.first().copied().unwrap_or(0),
            FisherLabels::Model => {
                let probs = candle_nn::ops::softmax(&logits.detach(), D::Minus1)?;
                let probs = probs.flatten_all()?.to_vec1::<f32>()?;
                let draw = Random::new(seed, "fisher labels", &[task, i as u64]).uniform();
                drawn(&probs, draw)
            }
        };
        let labels = Tensor::from_slice(&[label], 1, sample.device)?;
        let grads = kernels::cross_entropy(&logits, &labels)?.backward()?;
        for (sum, param) in sums.iter_mut().zip(params) {
            let Some(grad) = grads.get(param.var.as_tensor()) else { continue };
            let square = grad.sqr()?;
            *sum = Some(match sum.take() {
                Some(sum) => (sum + square)?,
                None => square,
            });
        }
        progress.tick(i + 1, "");
    }
    progress.finish();
    let mean = |(sum, param): (Option<Tensor>, &Param)| match sum {
        Some(sum) => Ok((sum / count.max(1) as f64)?.detach()),
        None => Ok(param.var.as_tensor().zeros_like()?),
    };
    sums.into_iter().zip(params).map(mean).collect()
}

/// The class that a uniform number in [0, 1) picks.
fn drawn(probs: &[f32], draw: f32) -> u32 {
    let mut sum = 0.0;
    for (class, p) in probs.iter().enumerate() {
        sum += p;
        if draw < sum {
            return class as u32;
        }
    }
    // What rounding left of one.
    probs.len().saturating_sub(1) as u32
}

impl Ewc {
    /// Takes up a task that has just been learned.
    pub fn learned(&mut self, params: &[Param], fisher: Vec<Tensor>, config: &EwcConfig) -> Result<()> {
        let mut held = Vec::with_capacity(params.len());
        for (param, fisher) in params.iter().zip(fisher) {
            let anchor = param.var.as_tensor().copy()?.detach();
            held.push(Held { name: param.name.clone(), fisher, anchor });
        }
        if let Some(keep) = config.online {
            let before = self.tasks.pop().unwrap_or_default();
            for new in &mut held {
                if let Some(old) = before.iter().find(|old| old.name == new.name) {
                    new.fisher = ((&old.fisher * keep)? + &new.fisher)?;
                }
            }
        }
        self.tasks.push(held);
        Ok(())
    }

    /// Adds the penalty and its gradient to a pass over `params`.
    pub fn add(&self, params: &[Param], lambda: f64, pass: &mut Pass) -> Result<()> {
        for held in self.tasks.iter().flatten() {
            let Some(at) = params.iter().position(|p| p.name == held.name) else { continue };
            let away = (params[at].var.as_detached_tensor() - &held.anchor)?;
            let pull = (&held.fisher * &away)?;
            let value = Figure::of(&(&pull * &away)?.sum_all()?)?;
            pass.loss = pass.loss.plus(&value, 0.5 * lambda)?;
            let pull = (pull * lambda)?;
            pass.grads[at] = Some(match pass.grads[at].take() {
                Some(grad) => (grad + pull)?,
                None => pull,
            });
        }
        Ok(())
    }

    /// Bytes that it keeps between tasks.
    pub fn bytes(&self) -> usize {
        let of = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        self.tasks.iter().flatten().map(|held| of(&held.fisher) + of(&held.anchor)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::Role;
    use candle_core::Var;

    fn param(name: &str, values: &[f32]) -> Param {
        Param { name: name.into(), var: Var::new(values, &Device::Cpu).unwrap(), role: Role::Plain }
    }

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    #[test]
    fn the_penalty_by_hand() {
        let params = [param("a", &[1.0, 2.0]), param("b", &[3.0])];
        let config = EwcConfig::default();
        let mut ewc = Ewc::default();
        ewc.learned(&params, vec![tensor(&[2.0, 0.5]), tensor(&[1.0])], &config).unwrap();
        params[0].var.set(&tensor(&[2.0, 4.0])).unwrap();
        let mut pass = Pass {
            loss: Figure::Known(1.0),
            right: Figure::Known(0.0),
            grads: vec![Some(tensor(&[10.0, 10.0])), None],
        };
        ewc.add(&params, 3.0, &mut pass).unwrap();
        // 3/2 (2 * 1 + 0.5 * 4)
        assert!((pass.loss.read().unwrap() - 7.0).abs() < 1e-9, "{:?}", pass.loss);
        assert_eq!(pass.grads[0].as_ref().unwrap().to_vec1::<f32>().unwrap(), [16.0, 13.0]);
        assert_eq!(pass.grads[1].as_ref().unwrap().to_vec1::<f32>().unwrap(), [0.0]);
        assert_eq!(ewc.bytes(), 24);
        // Another task of its own, or merged into one anchor.
        let mut online = ewc.clone();
        ewc.learned(&params, vec![tensor(&[1.0, 1.0]), tensor(&[4.0])], &config).unwrap();
        assert_eq!((ewc.tasks.len(), ewc.bytes()), (2, 48));
        let merged = EwcConfig { online: Some(0.5), ..config };
        online.learned(&params, vec![tensor(&[1.0, 1.0]), tensor(&[4.0])], &merged).unwrap();
        assert_eq!(online.tasks.len(), 1);
        assert_eq!(online.tasks[0][0].fisher.to_vec1::<f32>().unwrap(), [2.0, 1.25]);
        assert_eq!(online.tasks[0][0].anchor.to_vec1::<f32>().unwrap(), [2.0, 4.0]);
    }

    #[test]
    fn labels_are_drawn_by_their_probability() {
        let probs = [0.2, 0.0, 0.5, 0.3];
        assert_eq!([0.0, 0.19, 0.2, 0.69, 0.71, 1.0].map(|u| drawn(&probs, u)), [0, 0, 2, 2, 3, 3]);
    }
}
