//! Numbers that a pass finds: on the CPU known at once, on another device left there until somebody asks, since to
//! wait for one is to wait for all work before it.

use candle_core::{DType, Tensor};

use crate::Result;

/// A number that is known, or still on the device that computes it.
#[derive(Clone, Debug)]
pub enum Figure {
    /// Its value.
    Known(f64),
    /// A scalar of f32 that holds it.
    There(Tensor),
}

impl Default for Figure {
    fn default() -> Self {
        Figure::Known(f64::NAN)
    }
}

impl Figure {
    /// The value of a scalar.
    pub fn of(scalar: &Tensor) -> Result<Self> {
        let scalar = scalar.detach().to_dtype(DType::F32)?;
        match scalar.device().is_cpu() {
            true => Ok(Figure::Known(f64::from(scalar.to_scalar::<f32>()?))),
            false => Ok(Figure::There(scalar)),
        }
    }

    /// Whether it is known not to be finite.
    pub fn known_broken(&self) -> bool {
        matches!(self, Figure::Known(value) if !value.is_finite())
    }

    /// `self + factor * other`.
    pub fn plus(&self, other: &Figure, factor: f64) -> Result<Self> {
        Ok(match (self, other) {
            (Figure::Known(a), Figure::Known(b)) => Figure::Known(a + factor * b),
            (Figure::Known(a), Figure::There(b)) => Figure::There(b.affine(factor, *a)?),
            (Figure::There(a), Figure::Known(b)) => Figure::There(a.affine(1.0, factor * b)?),
            (Figure::There(a), Figure::There(b)) => Figure::There((a + b.affine(factor, 0.0)?)?),
        })
    }

    /// Its value; waits for the device.
    pub fn read(&self) -> Result<f64> {
        match self {
            Figure::Known(value) => Ok(*value),
            Figure::There(scalar) => Ok(f64::from(scalar.to_scalar::<f32>()?)),
        }
    }
}

/// The values of many figures, waiting for the device once.
pub fn read_all(figures: &[&Figure]) -> Result<Vec<f64>> {
    let there: Vec<Tensor> = figures
        .iter()
        .filter_map(|figure| match figure {
            Figure::There(scalar) => Some(scalar.reshape(1)),
            Figure::Known(_) => None,
        })
        .collect::<candle_core::Result<_>>()?;
    let mut read = match there.is_empty() {
        true => Vec::new(),
        false => Tensor::cat(&there, 0)?.to_vec1::<f32>()?,
    }
    .into_iter();
    let value = |figure: &&Figure| match figure {
        Figure::Known(value) => *value,
        Figure::There(_) => read.next().map_or(f64::NAN, f64::from),
    };
    Ok(figures.iter().map(value).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn sums_and_values_whether_known_or_not() {
        let there = |x: f32| Figure::There(Tensor::new(x, &Device::Cpu).unwrap());
        let known = Figure::Known;
        for (a, b) in [
            (known(1.0), known(2.0)),
            (known(1.0), there(2.0)),
            (there(1.0), known(2.0)),
            (there(1.0), there(2.0)),
        ] {
            let sum = a.plus(&b, 0.5).unwrap();
            assert_eq!((sum.read().unwrap(), read_all(&[&a, &sum, &b]).unwrap()), (2.0, vec![1.0, 2.0, 2.0]));
        }
        assert!(known(f64::NAN).known_broken() && !there(f32::NAN).known_broken());
        assert!(matches!(Figure::of(&Tensor::new(3f32, &Device::Cpu).unwrap()).unwrap(), Figure::Known(3.0)));
    }
}
