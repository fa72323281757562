//! Update rules for one tensor; walking, clipping and schedules live in the trainer.

pub mod adamw;
pub mod classp;
pub mod lion;
pub mod schedule;
pub mod sgd;
pub mod state;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

pub use schedule::{Rate, Schedule};

use crate::select::matches;
use crate::weights::Param;
use crate::{Error, Result};

/// A parameter that a step moves, and how.
#[derive(Clone, Copy, Debug)]
pub struct Move<'a> {
    /// The parameter.
    pub param: &'a Param,
    /// Its gradient, of its shape.
    pub grad: &'a Tensor,
    /// Its learning rate.
    pub lr: f64,
    /// Whether weight decay acts on it.
    pub decay: bool,
    /// Of its shape: entries at 0 keep their weight bit for bit, their state goes on; `None`: all move.
    pub free: Option<&'a Tensor>,
}

/// An update rule and its state, one entry for each parameter that it has seen.
pub trait Optimizer: Send {
    /// Moves `param` in place along `grad` at learning rate `lr`; `decay` tells whether weight decay
    /// acts on it.
    fn update(&mut self, param: &Param, grad: &Tensor, lr: f64, decay: bool) -> Result<()>;

    /// Moves all of `moves` in place, each parameter at most once, in one launch on their device, without waiting for
    /// it: along their gradients, which are clipped to the norm `clip` of all of them together (0: not).
    ///
    /// Gives, on the device, f32 `[1 + moves]`: that norm before it was clipped, then the norm of each gradient. Where
    /// the norm is not a finite f32 every weight and all state stay as they are, which [`Optimizer::left_out`] is to
    /// be told of. `None`: the rule has no such launch for these tensors, and nothing was done; [`Optimizer::update`]
    /// takes them one by one. There is one for f32 parameters on one CUDA device with gradients in f32, f16 or bf16.
    fn update_all(&mut self, _moves: &[Move<'_>], _clip: f64) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// Hears that an [`Optimizer::update_all`] of these parameters moved nothing, its norm not being finite: that step
    /// does not count.
    fn left_out(&mut self, _params: &[Param]) {}

    /// The state as named tensors on the CPU, `PARAMETER#PART`, in the order in which parameters were first seen.
    fn state(&self) -> Result<Vec<(String, Tensor)>>;

    /// Drops the state of every parameter that is not among `params`.
    fn retain(&mut self, params: &[Param]);

    /// Takes back what [`Optimizer::state`] gave for `params`.
    fn restore(&mut self, params: &[Param], read: &dyn Fn(&str) -> Result<Tensor>) -> Result<()>;

    /// Hears that another task begins.
    fn next_task(&mut self) {}

    /// What the rule says of itself, for metrics.jsonl.
    fn figures(&self) -> Vec<(&'static str, f64)> {
        Vec::new()
    }
}

/// `[optimizer]` in a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum OptimizerConfig {
    /// Adam with decoupled weight decay.
    Adamw(adamw::AdamWConfig),
    /// Large gradients only, with steps that shrink the more an entry was moved; power 2 and threshold 0:
    /// AdaGrad.
    Classp(classp::ClasspConfig),
    /// The sign of a momentum, with decoupled weight decay.
    Lion(lion::LionConfig),
    /// Stochastic gradient descent with momentum.
    Sgd(sgd::SgdConfig),
}

impl OptimizerConfig {
    /// The rule, with empty state.
    pub fn build(&self) -> Box<dyn Optimizer> {
        match self {
            OptimizerConfig::Adamw(config) => Box::new(adamw::AdamW::new(config.clone())),
            OptimizerConfig::Classp(config) => Box::new(classp::Classp::new(config.clone())),
            OptimizerConfig::Lion(config) => Box::new(lion::Lion::new(config.clone())),
            OptimizerConfig::Sgd(config) => Box::new(sgd::Sgd::new(config.clone())),
        }
    }

    /// What the types cannot hold: rates of decay below 1, everything finite.
    pub fn check(&self) -> Result<()> {
        let (shares, positive, decay) = match self {
            OptimizerConfig::Adamw(c) => {
                (vec![("beta1", c.beta1), ("beta2", c.beta2)], Some(("eps", c.eps)), c.weight_decay)
            }
            OptimizerConfig::Classp(c) => {
                c.check()?;
                (Vec::new(), None, c.weight_decay)
            }
            OptimizerConfig::Lion(c) => (vec![("beta1", c.beta1), ("beta2", c.beta2)], None, c.weight_decay),
            OptimizerConfig::Sgd(c) => (vec![("momentum", c.momentum)], None, c.weight_decay),
        };
        let bad = |key: &str, value: f64, what: &str| {
            Err(Error::usage(format!("optimizer.{key} = {value}: expected {what}")))
        };
        if let Some((key, value)) = shares.into_iter().find(|(_, v)| !(0.0..1.0).contains(v)) {
            return bad(key, value, "0 or more and less than 1");
        }
        if let Some((key, value)) = positive.filter(|(_, v)| !(v.is_finite() && *v > 0.0)) {
            return bad(key, value, "more than 0");
        }
        if !(decay.is_finite() && decay >= 0.0) {
            return bad("weight_decay", decay, "0 or more");
        }
        Ok(())
    }

    /// Errs where the rule cannot take steps of the learning rate `lr`.
    pub fn check_rate(&self, lr: f64) -> Result<()> {
        match self {
            OptimizerConfig::Classp(c) => c.check_rate(lr),
            _ => Ok(()),
        }
    }

    /// Its name on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            OptimizerConfig::Adamw(_) => "adamw",
            OptimizerConfig::Classp(_) => "classp",
            OptimizerConfig::Lion(_) => "lion",
            OptimizerConfig::Sgd(_) => "sgd",
        }
    }

    fn no_decay(&self) -> &[String] {
        match self {
            OptimizerConfig::Adamw(config) => &config.no_decay,
            OptimizerConfig::Classp(config) => &config.no_decay,
            OptimizerConfig::Lion(config) => &config.no_decay,
            OptimizerConfig::Sgd(config) => &config.no_decay,
        }
    }

    /// Bytes of state that the rule keeps for each f32 element.
    pub fn state_bytes(&self) -> usize {
        match self {
            OptimizerConfig::Adamw(_) => 8,
            OptimizerConfig::Classp(_) | OptimizerConfig::Lion(_) => 4,
            OptimizerConfig::Sgd(config) if config.momentum == 0.0 => 0,
            OptimizerConfig::Sgd(_) => 4,
        }
    }

    /// Whether the state is what remembers earlier tasks: it goes from phase to phase, and from run to run
    /// (see [`state`]).
    pub fn remembers(&self) -> bool {
        matches!(self, OptimizerConfig::Classp(_))
    }

    /// Whether weight decay acts on `param`: not on anything of one axis (biases, norms, steps,
    /// shifts), nor on what `no_decay` names.
    pub fn decays(&self, param: &Param) -> bool {
        param.var.rank() > 1 && !self.no_decay().iter().any(|pattern| matches(pattern, &param.name))
    }
}

/// Whether one launch takes all of `moves`.
#[cfg(feature = "cuda")]
fn one_launch(moves: &[Move<'_>]) -> bool {
    use candle_core::DType;
    let Some(first) = moves.first() else { return false };
    let (device, dtype) = (first.param.var.device(), first.grad.dtype());
    let there = |t: &Tensor, of: &Tensor| t.device().same_device(device) && t.dims() == of.dims();
    let takes = |m: &Move<'_>| {
        let w = m.param.var.as_tensor();
        w.dtype() == DType::F32
            && w.is_contiguous()
            && there(w, w)
            && m.grad.dtype() == dtype
            && there(m.grad, w)
            && m.free.is_none_or(|free| there(free, w))
    };
    let mut names = std::collections::HashSet::with_capacity(moves.len());
    device.is_cuda()
        && matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
        && moves.iter().all(|m| takes(m) && names.insert(m.param.name.as_str()))
}

/// A stored tensor as the state of `param`: on its device, where a step may move it in place.
fn own(stored: &Tensor, param: &Param) -> Result<Tensor> {
    let device = param.var.device();
    Ok(match device.is_cpu() {
        true => stored.to_device(device)?,
        false => stored.to_device(device)?.force_contiguous()?,
    })
}

/// State as it is stored.
fn stored(state: &Tensor) -> Result<Tensor> {
    Ok(state.to_device(&Device::Cpu)?)
}

/// Tokens and position embeddings: no weight decay, as in DeiT.
fn tokens() -> Vec<String> {
    ["*cls_token", "*distillation_token", "*position_embeddings"].map(String::from).to_vec()
}
