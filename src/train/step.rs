//! One optimizer step: loss, backward, accumulation, checks, clipping, update.

use candle_core::{DType, Device, Tensor};

use super::figure::Figure;
use super::task::Task;
use crate::optim::{Move, Optimizer, OptimizerConfig};
use crate::weights::{Param, Role, Weights};
use crate::{Error, Result};

/// What a step did. Figures of a step on a CUDA device stay there until they are read.
#[derive(Debug)]
pub struct Step {
    /// Mean loss over the samples of the step.
    pub loss: Figure,
    /// Percent of predictions that were right, before the update.
    pub top1: Figure,
    /// Samples, or tokens of text.
    pub counted: usize,
    /// The gradient of each parameter, before clipping.
    pub grads: Vec<Option<Tensor>>,
    /// How the parameters moved.
    pub moved: Moved,
}

/// How parameters moved.
#[derive(Debug, Default)]
pub struct Moved {
    /// Norm of the gradient of all parameters together, before clipping. Where it turns out not to be finite, nothing
    /// moved.
    pub norm: Figure,
    /// On a CUDA device the same and then the norm of each parameter's gradient, f32.
    pub norms: Option<Tensor>,
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
    let (mut loss, mut right) = (Figure::Known(0.0), Figure::Known(0.0));
    for batch in batches {
        let share = T::predictions(batch) as f64 / total.max(1) as f64;
        let pass = task.learn(batch, params, device)?;
        loss = loss.plus(&pass.loss, share)?;
        right = right.plus(&pass.right, 1.0)?;
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
    let top1 = Figure::Known(0.0).plus(&right, 100.0 / total.max(1) as f64)?;
    let counted = batches.iter().map(T::counted).sum();
    Ok(Step { loss, top1, counted, grads: sums, moved: Moved::default() })
}

fn squared_norm(grad: &Tensor) -> Result<f64> {
    let sum = grad.sqr()?.sum_all()?.to_dtype(DType::F64)?;
    Ok(sum.to_scalar::<f64>()?)
}

/// A gradient that cannot be followed.
fn not_finite(name: &str) -> Error {
    Error::NotFinite(format!("the gradient of {name} is not finite"))
}

/// Whether a parameter stands where it stood `before`.
fn stands(param: &Param, before: &Tensor) -> Result<bool> {
    let moved = (param.var.as_detached_tensor() - before)?.abs()?.sum_all()?;
    Ok(moved.to_dtype(DType::F32)?.to_scalar::<f32>()? == 0.0)
}

/// Moves `params` along `grads`: norm, clipping, update, then what annealing holds goes back to where it
/// was, so that neither weight decay nor momentum moves it. Errs where a gradient is not finite, on a CUDA device at a
/// first step only: at others nothing moves then, which the norm tells whoever reads it.
pub fn update(params: &[Param], grads: &[Option<Tensor>], rule: &mut Rule<'_>) -> Result<Moved> {
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
    if let Some(moved) = update_all(params, grads, rule)? {
        return Ok(moved);
    }
    let mut norms = Vec::with_capacity(params.len());
    for (param, grad) in params.iter().zip(grads) {
        let norm = grad.as_ref().map(squared_norm).transpose()?.unwrap_or(0.0);
        if !norm.is_finite() {
            return Err(not_finite(&param.name));
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
        if rule.first && (norms[i] == 0.0 || stands(param, &before)?) {
            still.push(param.name.clone());
        }
    }
    Ok(Moved { norm: Figure::Known(norm), norms: None, still })
}

/// [`update`] in one launch, where the rule has one for these tensors.
fn update_all(params: &[Param], grads: &[Option<Tensor>], rule: &mut Rule<'_>) -> Result<Option<Moved>> {
    let mut moves = Vec::with_capacity(params.len());
    for (i, (param, grad)) in params.iter().zip(grads).enumerate() {
        let Some(grad) = grad.as_ref().filter(|grad| grad.device().is_cuda()) else { continue };
        let lr = rule.lr * rule.factors.get(i).copied().unwrap_or(1.0);
        let free = rule.free.get(i).and_then(Option::as_ref);
        moves.push(Move { param, grad, lr, decay: rule.config.decays(param), free });
    }
    if moves.is_empty() {
        return Ok(None);
    }
    let before = match rule.first {
        true => moves.iter().map(|m| Ok(m.param.var.as_tensor().copy()?.detach())).collect::<Result<_>>()?,
        false => Vec::new(),
    };
    let Some(norms) = rule.optimizer.update_all(&moves, rule.clip)? else { return Ok(None) };
    let mut still = Vec::new();
    if rule.first {
        let each = norms.to_vec1::<f32>()?;
        for ((moved, norm), before) in moves.iter().zip(&each[1..]).zip(&before) {
            if !norm.is_finite() {
                return Err(not_finite(&moved.param.name));
            }
            if *norm == 0.0 || stands(moved.param, before)? {
                still.push(moved.param.name.clone());
            }
        }
    }
    Ok(Some(Moved { norm: Figure::of(&norms.get(0)?)?, norms: Some(norms), still }))
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
    step.moved = update(params, &step.grads, rule)?;
    Ok(step)
}
