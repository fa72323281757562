//! Stochastic gradient descent with momentum: `v = μ v + g`, `w = w (1 - lr λ) - lr v`.

use candle_core::Tensor;
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

#[cfg(feature = "cuda")]
use super::{one_launch, Move};
use super::{own, stored, tokens, Optimizer};
#[cfg(feature = "cuda")]
use crate::kernels::cuda::{floats, Moved, Rule, Together};
use crate::weights::Param;
use crate::Result;

/// Settings of [`Sgd`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SgdConfig {
    /// Share of the velocity that a step keeps; 0: none is stored.
    pub momentum: f64,
    /// Decoupled weight decay, per step and per unit of learning rate.
    pub weight_decay: f64,
    /// Patterns of parameters without weight decay.
    pub no_decay: Vec<String>,
}

impl Default for SgdConfig {
    fn default() -> Self {
        SgdConfig { momentum: 0.9, weight_decay: 0.0, no_decay: tokens() }
    }
}

/// The rule.
#[derive(Debug)]
pub struct Sgd {
    config: SgdConfig,
    velocity: IndexMap<String, Tensor>,
    #[cfg(feature = "cuda")]
    together: Together,
}

impl Sgd {
    /// With zero velocity.
    pub fn new(config: SgdConfig) -> Self {
        Sgd {
            config,
            velocity: IndexMap::new(),
            #[cfg(feature = "cuda")]
            together: Together::default(),
        }
    }

    fn keep(&self, lr: f64, decay: bool) -> f64 {
        if decay {
            1.0 - lr * self.config.weight_decay
        } else {
            1.0
        }
    }

    /// A step of all of `moves`, which one launch takes.
    #[cfg(feature = "cuda")]
    fn launch(&mut self, moves: &[Move<'_>], clip: Option<f64>) -> Result<Option<Tensor>> {
        let momentum = self.config.momentum;
        for Move { param, .. } in moves.iter().filter(|_| momentum != 0.0) {
            if !self.velocity.contains_key(&param.name) {
                let (shape, device) = (param.var.shape(), param.var.device());
                let zeros = Tensor::zeros(shape, candle_core::DType::F32, device)?;
                self.velocity.insert(param.name.clone(), zeros);
            }
        }
        let (mut moved, mut factors) = (Vec::with_capacity(moves.len()), Vec::with_capacity(2 * moves.len()));
        for Move { param, grad, lr, decay, free } in moves {
            factors.extend([floats(momentum, *lr), floats(self.keep(*lr, *decay), 0.0)]);
            let state = [self.velocity.get(&param.name), None];
            moved.push(Moved { weight: param.var.as_tensor(), grad, state, free: *free });
        }
        let rule = if momentum == 0.0 { Rule::SgdPlain } else { Rule::Sgd };
        Ok(self.together.run(rule, &moved, &factors, clip)?.norms)
    }
}

impl Optimizer for Sgd {
    fn update(&mut self, param: &Param, grad: &Tensor, lr: f64, decay: bool) -> Result<()> {
        #[cfg(feature = "cuda")]
        {
            let alone = [Move { param, grad, lr, decay, free: None }];
            if one_launch(&alone) {
                return self.launch(&alone, None).map(drop);
            }
        }
        let mut direction = grad.detach();
        if self.config.momentum != 0.0 {
            if let Some(velocity) = self.velocity.get(&param.name) {
                direction = (direction + (velocity * self.config.momentum)?)?;
            }
            self.velocity.insert(param.name.clone(), direction.clone());
        }
        let w = param.var.as_detached_tensor();
        let keep = self.keep(lr, decay);
        param.var.set(&((w * keep)? - (direction * lr)?)?)?;
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn update_all(&mut self, moves: &[Move<'_>], clip: f64) -> Result<Option<Tensor>> {
        match one_launch(moves) {
            true => self.launch(moves, Some(clip)),
            false => Ok(None),
        }
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        self.velocity.iter().map(|(name, v)| Ok((format!("{name}#velocity"), stored(v)?))).collect()
    }

    fn retain(&mut self, params: &[Param]) {
        self.velocity.retain(|name, _| params.iter().any(|p| p.name == *name));
    }

    fn restore(&mut self, params: &[Param], read: &dyn Fn(&str) -> Result<Tensor>) -> Result<()> {
        if self.config.momentum != 0.0 {
            for param in params {
                let velocity = own(&read(&format!("{}#velocity", param.name))?, param)?;
                self.velocity.insert(param.name.clone(), velocity);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::weights::Role;

    #[test]
    fn two_steps_by_hand() {
        let var = Var::new(&[1f32, 2.0], &Device::Cpu).unwrap();
        let param = Param { name: "w".into(), var: var.clone(), role: Role::Plain };
        let config = SgdConfig { momentum: 0.5, weight_decay: 0.1, no_decay: Vec::new() };
        let mut rule = Sgd::new(config);
        let g = Tensor::new(&[1f32, -1.0], &Device::Cpu).unwrap();
        rule.update(&param, &g, 0.1, true).unwrap();
        // w = w * 0.99 - 0.1 g
        let close = |want: [f32; 2]| {
            let got = var.to_vec1::<f32>().unwrap();
            assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-6), "{got:?} {want:?}");
        };
        close([0.89, 2.08]);
        rule.update(&param, &g, 0.1, false).unwrap();
        close([0.89 - 0.15, 2.08 + 0.15]); // v = 0.5 g + g
    }
}
