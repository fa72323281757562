//! Lion (Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2).
//!
//! `u = sign(beta1 m + (1 - beta1) g)`, `w -= lr (u + decay w)`, then `m = beta2 m + (1 - beta2) g`; the sign
//! of 0 is 0.

use candle_core::{DType, Tensor};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use super::{tokens, Optimizer};
use crate::weights::Param;
use crate::{On, Result};

/// Settings of [`Lion`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LionConfig {
    /// Weight of the momentum in the update.
    pub beta1: f64,
    /// Decay of the momentum.
    pub beta2: f64,
    /// Decoupled weight decay, per step and per unit of learning rate.
    pub weight_decay: f64,
    /// Patterns of parameters without weight decay.
    pub no_decay: Vec<String>,
}

impl Default for LionConfig {
    fn default() -> Self {
        LionConfig { beta1: 0.9, beta2: 0.99, weight_decay: 0.0, no_decay: tokens() }
    }
}

/// The rule: the momentum of each parameter.
#[derive(Debug)]
pub struct Lion {
    config: LionConfig,
    momenta: IndexMap<String, Tensor>,
}

impl Lion {
    /// With zero momenta.
    pub fn new(config: LionConfig) -> Self {
        Lion { config, momenta: IndexMap::new() }
    }
}

impl Optimizer for Lion {
    fn update(&mut self, param: &Param, grad: &Tensor, lr: f64, decay: bool) -> Result<()> {
        let LionConfig { beta1, beta2, weight_decay, .. } = self.config;
        let grad = grad.to_dtype(DType::F32)?;
        let momentum = match self.momenta.get(&param.name) {
            Some(momentum) => momentum.clone(),
            None => grad.zeros_like()?,
        };
        let blend = |beta: f64| (&momentum * beta)? + (&grad * (1.0 - beta))?;
        let direction = blend(beta1).and_then(|u| u.sign()).on(&param.name)?;
        let w = param.var.as_detached_tensor();
        let kept = if decay && weight_decay > 0.0 { (&w * (1.0 - lr * weight_decay))? } else { w.clone() };
        let moved = (kept.to_dtype(DType::F32)? - (direction * lr)?)?;
        param.var.set(&moved.to_dtype(w.dtype())?)?;
        let next = blend(beta2).on(&param.name)?.detach();
        self.momenta.insert(param.name.clone(), next);
        Ok(())
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        Ok(self.momenta.iter().map(|(name, m)| (format!("{name}#m"), m.clone())).collect())
    }

    fn retain(&mut self, params: &[Param]) {
        self.momenta.retain(|name, _| params.iter().any(|p| p.name == *name));
    }

    fn restore(&mut self, params: &[Param], read: &dyn Fn(&str) -> Result<Tensor>) -> Result<()> {
        for Param { name, var, .. } in params {
            let momentum = read(&format!("{name}#m"))?.to_device(var.device())?;
            self.momenta.insert(name.clone(), momentum);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::Role;
    use candle_core::{Device, Var};

    #[test]
    fn two_steps_by_hand() {
        let var = Var::new(&[[1f32, -2.0, 3.0]], &Device::Cpu).unwrap();
        let param = Param { name: "w".into(), var: var.clone(), role: Role::Plain };
        let config = LionConfig { beta1: 0.5, beta2: 0.5, weight_decay: 0.1, ..LionConfig::default() };
        let mut lion = Lion::new(config);
        let step = |lion: &mut Lion, g: [f32; 3]| {
            lion.update(&param, &Tensor::new(&[g], &Device::Cpu).unwrap(), 1.0, true).unwrap();
            var.to_vec2::<f32>().unwrap().remove(0)
        };
        // 0.9 w - sign(g / 2); momenta 2, -1, 0.
        let close = |got: Vec<f32>, want: [f32; 3]| {
            assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-6), "{got:?} {want:?}");
        };
        close(step(&mut lion, [4.0, -2.0, 0.0]), [-0.1, -0.8, 2.7]);
        // sign(m / 2 + g / 2) of 2 - 3, -1 + 5 and 0 + 0.
        close(step(&mut lion, [-3.0, 5.0, 0.0]), [0.91, -1.72, 2.43]);
    }

    #[test]
    fn its_state_comes_back() {
        let var = Var::new(&[1f32, -2.0], &Device::Cpu).unwrap();
        let param = Param { name: "w".into(), var, role: Role::Plain };
        let mut lion = Lion::new(LionConfig::default());
        lion.update(&param, &Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap(), 0.1, false).unwrap();
        let state = lion.state().unwrap();
        let mut other = Lion::new(LionConfig::default());
        other
            .restore(std::slice::from_ref(&param), &|name| {
                Ok(state.iter().find(|(n, _)| n == name).unwrap().1.clone())
            })
            .unwrap();
        let values = |lion: &Lion| lion.state().unwrap()[0].1.to_vec1::<f32>().unwrap();
        assert_eq!(values(&lion), values(&other));
        other.retain(&[]);
        assert!(other.state().unwrap().is_empty());
    }
}
