//! Lion (Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2).
//!
//! `u = sign(beta1 m + (1 - beta1) g)`, `w -= lr (u + decay w)`, then `m = beta2 m + (1 - beta2) g`; the sign
//! of 0 is 0.

use candle_core::{DType, Tensor};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

#[cfg(feature = "cuda")]
use super::{one_launch, Move};
use super::{own, stored, tokens, Optimizer};
#[cfg(feature = "cuda")]
use crate::kernels::cuda::{floats, Moved, Rule, Together};
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
    #[cfg(feature = "cuda")]
    together: Together,
}

impl Lion {
    /// With zero momenta.
    pub fn new(config: LionConfig) -> Self {
        Lion {
            config,
            momenta: IndexMap::new(),
            #[cfg(feature = "cuda")]
            together: Together::default(),
        }
    }

    /// A step of all of `moves`, which one launch takes.
    #[cfg(feature = "cuda")]
    fn launch(&mut self, moves: &[Move<'_>], clip: Option<f64>) -> Result<Option<Tensor>> {
        for Move { param, .. } in moves {
            if !self.momenta.contains_key(&param.name) {
                let zeros = Tensor::zeros(param.var.shape(), DType::F32, param.var.device())?;
                self.momenta.insert(param.name.clone(), zeros);
            }
        }
        let LionConfig { beta1, beta2, weight_decay, .. } = self.config;
        let (mut moved, mut factors) = (Vec::with_capacity(moves.len()), Vec::with_capacity(3 * moves.len()));
        for Move { param, grad, lr, decay, free } in moves {
            let keep = if *decay && weight_decay > 0.0 { 1.0 - lr * weight_decay } else { 1.0 };
            factors.extend([floats(beta1, 1.0 - beta1), floats(beta2, 1.0 - beta2), floats(*lr, keep)]);
            let state = [self.momenta.get(&param.name), None];
            moved.push(Moved { weight: param.var.as_tensor(), grad, state, free: *free });
        }
        Ok(self.together.run(Rule::Lion, &moved, &factors, clip)?.norms)
    }
}

impl Optimizer for Lion {
    fn update(&mut self, param: &Param, grad: &Tensor, lr: f64, decay: bool) -> Result<()> {
        #[cfg(feature = "cuda")]
        {
            let alone = [Move { param, grad, lr, decay, free: None }];
            if one_launch(&alone) {
                return self.launch(&alone, None).map(drop);
            }
        }
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

    #[cfg(feature = "cuda")]
    fn update_all(&mut self, moves: &[Move<'_>], clip: f64) -> Result<Option<Tensor>> {
        match one_launch(moves) {
            true => self.launch(moves, Some(clip)),
            false => Ok(None),
        }
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        self.momenta.iter().map(|(name, m)| Ok((format!("{name}#m"), stored(m)?))).collect()
    }

    fn retain(&mut self, params: &[Param]) {
        self.momenta.retain(|name, _| params.iter().any(|p| p.name == *name));
    }

    fn restore(&mut self, params: &[Param], read: &dyn Fn(&str) -> Result<Tensor>) -> Result<()> {
        for param in params {
            let momentum = own(&read(&format!("{}#m", param.name))?, param)?;
            self.momenta.insert(param.name.clone(), momentum);
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
