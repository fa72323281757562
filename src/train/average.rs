//! An exponential average of the trainables over the steps of a phase (Polyak and Juditsky 1992, as
//! vision recipes use it): `a = a + (1 - decay) (w - a)`. Written so that an entry that stands still has
//! itself as its average, to the bit.
//!
//! While it runs, evaluations see the averages; at the end of the phase they take the place of the
//! trainables. A phase that anneals is not averaged.

use candle_core::Tensor;

use crate::weights::Param;
use crate::{Error, On, Result};

/// The averages, in the order of the trainables.
#[derive(Debug)]
pub struct Average {
    decay: f64,
    values: Vec<(String, Tensor)>,
}

impl Average {
    /// Starts from the values of now.
    pub fn new(params: &[Param], decay: f64) -> Result<Self> {
        let copy = |p: &Param| Ok((p.name.clone(), p.var.as_tensor().copy()?.detach()));
        Ok(Average { decay, values: params.iter().map(copy).collect::<Result<_>>()? })
    }

    /// Takes in the values after a step.
    pub fn update(&mut self, params: &[Param]) -> Result<()> {
        for ((name, value), param) in self.values.iter_mut().zip(params) {
            let way = ((param.var.as_detached_tensor() - &*value)? * (1.0 - self.decay))?;
            *value = (&*value + way).on(name.as_str())?;
        }
        Ok(())
    }

    /// Puts the averages in the place of the trainables, and these in the place of the averages: a second
    /// call takes it back.
    pub fn swap(&mut self, params: &[Param]) -> Result<()> {
        for ((name, value), param) in self.values.iter_mut().zip(params) {
            let own = param.var.as_tensor().copy()?.detach();
            param.var.set(value).on(name.as_str())?;
            *value = own;
        }
        Ok(())
    }

    /// The averages as named tensors, `PARAMETER#average`.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        self.values.iter().map(|(name, value)| (format!("{name}#average"), value.clone())).collect()
    }

    /// Takes back what [`Average::state`] gave for `params`.
    pub fn restore(params: &[Param], decay: f64, read: &dyn Fn(&str) -> Result<Tensor>) -> Result<Self> {
        let mut values = Vec::with_capacity(params.len());
        for param in params {
            let value = read(&format!("{}#average", param.name))?;
            if value.dims() != param.var.dims() {
                let (found, expected) = (value.dims(), param.var.dims());
                let message = format!("average: found shape {found:?}, expected {expected:?}");
                return Err(Error::tensor(&param.name, message));
            }
            values.push((param.name.clone(), value));
        }
        Ok(Average { decay, values })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::weights::Role;

    #[test]
    fn by_hand_and_still_entries_stay_to_the_bit() {
        let var = Var::new(&[0.1f32, 1.0], &Device::Cpu).unwrap();
        let params = [Param { name: "w".into(), var: var.clone(), role: Role::Plain }];
        let mut average = Average::new(&params, 0.9).unwrap();
        for step in 1..=2 {
            var.set(&Tensor::new(&[0.1f32, 1.0 + step as f32], &Device::Cpu).unwrap()).unwrap();
            average.update(&params).unwrap();
        }
        // 1, 1.1, 1.1 + 0.1 * 1.9
        average.swap(&params).unwrap();
        let values = var.to_vec1::<f32>().unwrap();
        assert!((values[1] - 1.29).abs() < 1e-6 && values[0].to_bits() == 0.1f32.to_bits(), "{values:?}");
        average.swap(&params).unwrap();
        assert_eq!(var.to_vec1::<f32>().unwrap(), [0.1, 3.0]);
        let state: std::collections::HashMap<String, Tensor> = average.state().into_iter().collect();
        let read = |name: &str| Ok(state[name].clone());
        let back = Average::restore(&params, 0.9, &read).unwrap();
        assert_eq!(back.values[0].1.to_vec1::<f32>().unwrap(), average.values[0].1.to_vec1::<f32>().unwrap());
    }
}
