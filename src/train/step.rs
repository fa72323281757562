//! One optimizer step: loss, backward, accumulation, checks, clipping, update.

use candle_core::{Device, Tensor};

use super::task::Classify;
use crate::data::Batch;
use crate::optim::{Optimizer, OptimizerConfig};
use crate::weights::{Param, Role};
use crate::{Error, Result};

/// What a step did.
#[derive(Debug)]
pub struct Step {
    /// Mean loss over the samples of the step.
    pub loss: f64,
    /// Percent of samples answered right, before the update.
    pub top1: f64,
    /// Samples.
    pub samples: usize,
    /// Norm of the gradient of all trainables together, before clipping.
    pub grad_norm: f64,
}

/// The mean gradient over all samples of `batches`, one tensor for each parameter; `None` where no
/// gradient arrived. Splitting a batch into several gives the same gradient up to rounding.
fn gradients(
    task: &Classify,
    batches: &[Batch],
    params: &[Param],
    device: &Device,
) -> Result<(Vec<Option<Tensor>>, Step)> {
    let total: usize = batches.iter().map(|b| b.labels.len()).sum();
    let mut sums: Vec<Option<Tensor>> = vec![None; params.len()];
    let (mut loss, mut right) = (0f64, 0usize);
    for batch in batches {
        let share = batch.labels.len() as f64 / total as f64;
        let out = task.loss(batch, device)?;
        let value = f64::from(out.loss.to_scalar::<f32>()?);
        loss += value * share;
        right += out.right;
        let grads = out.loss.backward()?;
        for (sum, param) in sums.iter_mut().zip(params) {
            let Some(grad) = grads.get(param.var.as_tensor()) else { continue };
            // LSQ divides by the root of the samples of the pass: over a share of the step's samples
            // the division comes out too small by the root of the share.
            let weight = match param.role {
                Role::Plain => share,
                Role::ActivationStep => share * share.sqrt(),
            };
            let grad = if batches.len() == 1 { grad.clone() } else { (grad * weight)? };
            *sum = Some(match sum.take() {
                Some(sum) => (sum + grad)?,
                None => grad,
            });
        }
    }
    let top1 = 100.0 * right as f64 / total as f64;
    Ok((sums, Step { loss, top1, samples: total, grad_norm: 0.0 }))
}

fn squared_norm(grad: &Tensor) -> Result<f64> {
    let sum = grad.sqr()?.sum_all()?.to_dtype(candle_core::DType::F64)?;
    Ok(sum.to_scalar::<f64>()?)
}

/// Takes one step over `batches`. `first` makes the checks of a phase's first step: every trainable
/// must receive a gradient; what comes back with it are the names of those whose gradient was exactly
/// zero or that did not move.
#[allow(clippy::too_many_arguments)]
pub fn take(
    task: &Classify,
    batches: &[Batch],
    params: &[Param],
    optimizer: &mut dyn Optimizer,
    config: &OptimizerConfig,
    lr: f64,
    clip: f64,
    first: bool,
    device: &Device,
) -> Result<(Step, Vec<String>)> {
    let (grads, mut step) = gradients(task, batches, params, device)?;
    if first {
        let silent: Vec<&str> =
            params.iter().zip(&grads).filter(|(_, g)| g.is_none()).map(|(p, _)| p.name.as_str()).collect();
        if !silent.is_empty() {
            return Err(Error::Run(format!(
                "no gradient reached {} of {} trainables: {}",
                silent.len(),
                params.len(),
                silent.join(", ")
            )));
        }
    }
    let mut norms = Vec::with_capacity(params.len());
    for (param, grad) in params.iter().zip(&grads) {
        let norm = grad.as_ref().map(squared_norm).transpose()?.unwrap_or(0.0);
        if !norm.is_finite() {
            return Err(Error::Run(format!("the gradient of {} is not finite", param.name)));
        }
        norms.push(norm);
    }
    step.grad_norm = norms.iter().sum::<f64>().sqrt();
    let scale = if clip > 0.0 && step.grad_norm > clip { Some(clip / step.grad_norm) } else { None };
    let mut still = Vec::new();
    for ((param, grad), norm) in params.iter().zip(grads).zip(norms) {
        let Some(grad) = grad else { continue };
        let grad = match scale {
            Some(scale) => (grad * scale)?,
            None => grad,
        };
        let before = if first { Some(param.var.as_tensor().copy()?) } else { None };
        optimizer.update(param, &grad, lr, config.decays(param))?;
        if let Some(before) = before {
            let moved = (param.var.as_detached_tensor() - before)?.abs()?.sum_all()?;
            if norm == 0.0 || moved.to_dtype(candle_core::DType::F32)?.to_scalar::<f32>()? == 0.0 {
                still.push(param.name.clone());
            }
        }
    }
    Ok((step, still))
}
