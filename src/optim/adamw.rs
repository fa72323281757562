//! AdamW (Loshchilov and Hutter 2019, algorithm 2); the arithmetic is [`kernels::adamw_step`].

use candle_core::Tensor;
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

#[cfg(feature = "cuda")]
use super::{one_launch, Move};
use super::{stored, tokens, Optimizer};
#[cfg(feature = "cuda")]
use crate::kernels::cuda::{Moved, Rule, Together};
use crate::kernels::{self, AdamWParams, Moments};
use crate::weights::Param;
use crate::{On, Result};

/// Settings of [`AdamW`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, per step and per unit of learning rate.
    pub weight_decay: f64,
    /// Patterns of parameters without weight decay.
    pub no_decay: Vec<String>,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        AdamWConfig { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, no_decay: tokens() }
    }
}

/// The rule: moments of each parameter, and how often it was moved.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    moments: IndexMap<String, (Moments, u64)>,
    #[cfg(feature = "cuda")]
    together: Together,
}

impl AdamW {
    /// With zero moments.
    pub fn new(config: AdamWConfig) -> Self {
        AdamW {
            config,
            moments: IndexMap::new(),
            #[cfg(feature = "cuda")]
            together: Together::default(),
        }
    }

    /// Sees that there are moments.
    fn begin(&mut self, param: &Param) -> Result<()> {
        if !self.moments.contains_key(&param.name) {
            let moments = Moments::zeros(param.var.shape(), param.var.device())?;
            self.moments.insert(param.name.clone(), (moments, 0));
        }
        Ok(())
    }

    fn settings(&self, lr: f64, decay: bool) -> AdamWParams {
        let AdamWConfig { beta1, beta2, eps, weight_decay, .. } = self.config;
        let weight_decay = if decay { weight_decay } else { 0.0 };
        AdamWParams { lr, beta1, beta2, eps, weight_decay }
    }
}

impl Optimizer for AdamW {
    fn update(&mut self, param: &Param, grad: &Tensor, lr: f64, decay: bool) -> Result<()> {
        self.begin(param)?;
        let settings = self.settings(lr, decay);
        if let Some((moments, steps)) = self.moments.get_mut(&param.name) {
            *steps += 1;
            kernels::adamw_step(param.var.as_tensor(), grad, moments, *steps, &settings).on(&param.name)?;
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn update_all(&mut self, moves: &[Move<'_>], clip: f64) -> Result<Option<Tensor>> {
        if !one_launch(moves) {
            return Ok(None);
        }
        let (mut moved, mut factors) = (Vec::with_capacity(moves.len()), Vec::with_capacity(4 * moves.len()));
        for m in moves {
            self.begin(m.param)?;
        }
        for Move { param, grad, lr, decay, free } in moves {
            let Some((moments, steps)) = self.moments.get(&param.name) else { return Ok(None) };
            let Some(state) = moments.on_device() else { return Ok(None) };
            factors.extend(self.settings(*lr, *decay).words(steps + 1));
            moved.push(Moved { weight: param.var.as_tensor(), grad, state: state.map(Some), free: *free });
        }
        let left = self.together.run(Rule::AdamW, &moved, &factors, Some(clip))?;
        for m in moves {
            if let Some((_, steps)) = self.moments.get_mut(&m.param.name) {
                *steps += 1;
            }
        }
        Ok(left.norms)
    }

    fn left_out(&mut self, params: &[Param]) {
        for param in params {
            if let Some((_, steps)) = self.moments.get_mut(&param.name) {
                *steps = steps.saturating_sub(1);
            }
        }
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = Vec::with_capacity(3 * self.moments.len());
        for (name, (moments, steps)) in &self.moments {
            let (m, v) = moments.export()?;
            let steps = Tensor::new(&[*steps as u32], &candle_core::Device::Cpu)?;
            tensors.extend([
                (format!("{name}#m"), stored(&m)?),
                (format!("{name}#v"), stored(&v)?),
                (format!("{name}#steps"), steps),
            ]);
        }
        Ok(tensors)
    }

    fn retain(&mut self, params: &[Param]) {
        self.moments.retain(|name, _| params.iter().any(|p| p.name == *name));
    }

    fn restore(&mut self, params: &[Param], read: &dyn Fn(&str) -> Result<Tensor>) -> Result<()> {
        for Param { name, var, .. } in params {
            let read = |part: &str| -> Result<Tensor> {
                Ok(read(&format!("{name}#{part}"))?.to_device(var.device())?)
            };
            let moments = Moments::import(&read("m")?, &read("v")?)?;
            let steps = read("steps")?.flatten_all()?.get(0)?.to_scalar::<u32>()?;
            self.moments.insert(name.clone(), (moments, u64::from(steps)));
        }
        Ok(())
    }
}
