//! One optimizer step: loss, backward, accumulation, checks, clipping, update.

use candle_core::{DType, Device, Tensor};

use super::task::Task;
use crate::optim::{Optimizer, OptimizerConfig};
use crate::weights::{Param, Role, Weights};
use crate::{Error, Result};

/// What a step did.
#[derive(Debug)]
pub struct Step {
    /// Mean loss over the samples of the step.
    pub loss: f64,
    /// Percent of predictions that were right, before the update.
    pub top1: f64,
    /// Samples, or tokens of text.
    pub counted: usize,
    /// Norm of the gradient of all trainables together, before clipping.
    pub grad_norm: f64,
    /// The gradient of each parameter, before clipping.
    pub grads: Vec<Option<Tensor>>,
    /// At a phase's first step: the parameters whose gradient was exactly zero or that did not move.
    pub still: Vec<String>,
}

/// How parameters are moved along their gradients.
pub struct Rule<'a> {
    /// The update rule of each parameter.
    pub optimizer: &'a mut dyn Optimizer,
    /// Its settings.
    pub config: &'a OptimizerConfig,
    /// The learning rate of the step.
    pub lr: f64,
    /// A factor on it for each parameter; empty: 1 for all.
    pub factors: &'a [f64],
    /// Largest norm of the gradient of all parameters together; 0: no clipping.
    pub clip: f64,
    /// For each parameter which entries may move (1) or are held still bit for bit (0); `None`: all may.
    /// Empty: all of all.
    pub free: &'a [Option<Tensor>],
    /// Whether this is a phase's first step, which checks that every parameter is reached.
    pub first: bool,
}

/// The entries that annealing leaves free of each of `params`, from the weights as they are now: to be
/// asked for before a step (ofq.md 4).
pub fn free(weights: &Weights, params: &[Param]) -> Result<Vec<Option<Tensor>>> {
    let mut free = vec![None; params.len()];
    for (name, gate) in weights.gates()?.into_iter().filter(|(_, gate)| gate.held) {
        let at = params.iter().position(|p| p.name == name);
        let at = at.ok_or_else(|| Error::tensor(&name, "annealed, but not among the trainables"))?;
        free[at] = Some(gate.free);
    }
    Ok(free)
}

/// The mean gradient over all predictions of `batches`, one tensor for each parameter; `None` where no
/// gradient arrived. Splitting a batch into several gives the same gradient up to rounding.
fn gradients<T: Task>(task: &T, batches: &[T::Batch], params: &[Param], device: &Device) -> Result<Step> {
    let total: usize = batches.iter().map(T::predictions).sum();
    let mut sums: Vec<Option<Tensor>> = vec![None; params.len()];
    let (mut loss, mut right) = (0f64, 0usize);
    for batch in batches {
        let share = T::predictions(batch) as f64 / total.max(1) as f64;
        let pass = task.learn(batch, params, device)?;
        loss += pass.loss * share;
        right += pass.right;
        for ((sum, param), grad) in sums.iter_mut().zip(params).zip(pass.grads) {
            let Some(grad) = grad else { continue };
            // LSQ divides by the root of the samples of the pass: over a share of the step's samples
            // the division comes out too small by the root of the share.
            let weight = match param.role {
                Role::Plain => share,
                Role::ActivationStep => share * share.sqrt(),
            };
            let grad = if batches.len() == 1 { grad } else { (grad * weight)? };
            *sum = Some(match sum.take() {
                Some(sum) => (sum + grad)?,
                None => grad,
            });
        }
    }
    let top1 = 100.0 * right as f64 / total.max(1) as f64;
    let counted = batches.iter().map(T::counted).sum();
    Ok(Step { loss, top1, counted, grad_norm: 0.0, grads: sums, still: Vec::new() })
}

fn squared_norm(grad: &Tensor) -> Result<f64> {
    let sum = grad.sqr()?.sum_all()?.to_dtype(DType::F64)?;
    Ok(sum.to_scalar::<f64>()?)
}

/// Moves `params` along `grads`: norm, clipping, update, then what annealing holds goes back to where it
/// was, so that neither weight decay nor momentum moves it. Returns the norm before clipping and, at a
/// first step, the names of the parameters whose gradient was exactly zero or that did not move.
pub fn update(params: &[Param], grads: &[Option<Tensor>], rule: &mut Rule<'_>) -> Result<(f64, Vec<String>)> {
    if rule.first {
        let silent: Vec<&str> =
            params.iter().zip(grads).filter(|(_, g)| g.is_none()).map(|(p, _)| p.name.as_str()).collect();
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
    for (param, grad) in params.iter().zip(grads) {
        let norm = grad.as_ref().map(squared_norm).transpose()?.unwrap_or(0.0);
        if !norm.is_finite() {
            return Err(Error::NotFinite(format!("the gradient of {} is not finite", param.name)));
        }
        norms.push(norm);
    }
    let norm = norms.iter().sum::<f64>().sqrt();
    let scale = if rule.clip > 0.0 && norm > rule.clip { Some(rule.clip / norm) } else { None };
    let mut still = Vec::new();
    for (i, (param, grad)) in params.iter().zip(grads).enumerate() {
        let Some(grad) = grad else { continue };
        let grad = match scale {
            Some(scale) => (grad * scale)?,
            None => grad.clone(),
        };
        let free = rule.free.get(i).and_then(Option::as_ref);
        // Copied: the update moves a variable in place.
        let before =
            if rule.first || free.is_some() { Some(param.var.as_tensor().copy()?.detach()) } else { None };
        let lr = rule.lr * rule.factors.get(i).copied().unwrap_or(1.0);
        rule.optimizer.update(param, &grad, lr, rule.config.decays(param))?;
        let Some(before) = before else { continue };
        if let Some(free) = free {
            let moved = param.var.as_detached_tensor();
            param.var.set(&free.ne(0.0)?.where_cond(&moved, &before)?)?;
        }
        if rule.first {
            let moved = (param.var.as_detached_tensor() - before)?.abs()?.sum_all()?;
            if norms[i] == 0.0 || moved.to_dtype(DType::F32)?.to_scalar::<f32>()? == 0.0 {
                still.push(param.name.clone());
            }
        }
    }
    Ok((norm, still))
}

/// Takes one step over `batches`. A phase's first step errs where a trainable receives no gradient.
pub fn take<T: Task>(
    task: &T,
    batches: &[T::Batch],
    params: &[Param],
    rule: &mut Rule<'_>,
    device: &Device,
) -> Result<Step> {
    let mut step = gradients(task, batches, params, device)?;
    (step.grad_norm, step.still) = update(params, &step.grads, rule)?;
    Ok(step)
}
