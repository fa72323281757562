//! Dropout on the input of an adapter, and what adapters share.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};

use super::lsq::trainable;
use crate::kernels::{self, DropoutMask, FrozenRows};
use crate::weights::{Expr, Role, Weight};
use crate::{Error, Result};

/// Dropout whose mask follows from seed, name and pass alone, so that a forward pass that is done again
/// sees the same mask. Whoever trains counts `pass` up before each forward pass.
#[derive(Clone, Debug)]
pub struct Dropout {
    /// The share of elements that are dropped, in `[0, 1)`.
    pub p: f64,
    /// The run's seed.
    pub seed: u64,
    /// The layer's name.
    pub name: String,
    /// The number of the forward pass, shared by all layers.
    pub pass: Arc<AtomicU64>,
}

impl Dropout {
    /// Dropout of a share `p`; outside `[0, 1)` an error.
    pub fn new(p: f64, seed: u64, name: impl Into<String>, pass: Arc<AtomicU64>) -> Result<Self> {
        let dropout = Dropout { p, seed, name: name.into(), pass };
        dropout.check()?;
        Ok(dropout)
    }

    fn check(&self) -> Result<()> {
        if !(0.0..1.0).contains(&self.p) {
            let (p, name) = (self.p, &self.name);
            return Err(Error::usage(format!("dropout = {p} for {name}: expected 0 to below 1")));
        }
        Ok(())
    }

    /// `x` with some elements dropped and the others scaled up.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let Dropout { p, seed, ref name, ref pass } = *self;
        let pass = pass.load(Ordering::Relaxed);
        Ok(kernels::dropout(x, DropoutMask { p, seed, name: name.clone(), pass })?)
    }
}

/// The dropout where it drops anything.
pub(super) fn active(dropout: Option<Dropout>) -> Result<Option<Dropout>> {
    dropout.as_ref().map_or(Ok(()), Dropout::check)?;
    Ok(dropout.filter(|d| d.p > 0.0))
}

/// A copy of `tensor` in f32, behind a variable where it is to be trained.
pub(super) fn held(tensor: &Tensor, train: bool) -> Result<Tensor> {
    let copy = tensor.detach().to_dtype(DType::F32)?.contiguous()?.copy()?;
    Ok(match train {
        true => Var::from_tensor(&copy)?.as_tensor().clone(),
        false => copy,
    })
}

/// `tensor` on `device`: itself where it is there, else a copy, behind a variable where it is one.
pub(super) fn moved(tensor: &Tensor, device: &Device) -> Result<Tensor> {
    match tensor.device().same_device(device) {
        true => Ok(tensor.clone()),
        false => held(&tensor.detach().to_device(device)?, tensor.is_variable()),
    }
}

/// `x` in the type that adapters multiply in: f32, but on a CUDA device halves as they are.
pub(super) fn seen(x: &Tensor) -> Result<Tensor> {
    match x.device().is_cuda() && matches!(x.dtype(), DType::F16 | DType::BF16) {
        true => Ok(x.clone()),
        false => Ok(x.to_dtype(DType::F32)?),
    }
}

/// The trainables among an adapter's tensors.
pub(super) fn plain(tensors: &[(&'static str, Tensor)]) -> Vec<(&'static str, Var, Role)> {
    tensors.iter().filter_map(|(suffix, tensor)| trainable(suffix, tensor, Role::Plain)).collect()
}

/// The tensors without the graph behind them.
pub(super) fn detached(tensors: Vec<(&'static str, Tensor)>) -> Vec<(&'static str, Tensor)> {
    tensors.into_iter().map(|(suffix, tensor)| (suffix, tensor.detach())).collect()
}

/// The one weight that an adapter stands on.
pub(super) fn only<'a, T>(kind: &str, inputs: &'a [T]) -> Result<&'a T> {
    match inputs {
        [one] => Ok(one),
        _ => Err(Error::Run(format!("{kind}: found {} weights, expected one", inputs.len()))),
    }
}

/// The base in f32, of the shape that the adapter was made for.
pub(super) fn base(kind: &str, inputs: &[Tensor], (rows, cols): (usize, usize)) -> Result<Tensor> {
    let w = only(kind, inputs)?;
    if w.dims() != [rows, cols] {
        return Err(unfit(kind, w.dims(), (rows, cols)));
    }
    Ok(w.to_dtype(DType::F32)?)
}

/// The error of a weight of another shape than the adapter's.
pub(super) fn unfit(kind: &str, found: &[usize], (rows, cols): (usize, usize)) -> Error {
    Error::Run(format!("{kind}: found a weight {found:?}, expected [{rows}, {cols}]"))
}

/// The rows of a frozen leaf of the shape that the adapter was made for; `None` for other expressions.
pub(super) fn frozen_rows(kind: &str, w: &Weight, shape: (usize, usize)) -> Result<Option<FrozenRows>> {
    let rows = match w.expr() {
        Expr::Dense(w) => FrozenRows::dense(w)?,
        Expr::Stored { .. } => FrozenRows::dense(&w.tensor()?)?,
        Expr::Packed(packed) if packed.shape().len() == 2 => FrozenRows::packed(packed.rows().clone()),
        _ => return Ok(None),
    };
    match (rows.rows(), rows.cols()) == shape {
        true => Ok(Some(rows)),
        false => Err(unfit(kind, &[rows.rows(), rows.cols()], shape)),
    }
}

/// `x W^T` in the type of an `x` that was [`seen`].
pub(super) fn base_matmul(x: &Tensor, w: &Weight) -> Result<Tensor> {
    match w.expr() {
        // A weight in another format is never whole in that of x on a device.
        Expr::Dense(_) | Expr::Stored { .. } if x.device().is_cuda() => w.matmul(x),
        Expr::Dense(_) | Expr::Stored { .. } => {
            Ok(kernels::frozen_matmul(x, &w.tensor()?.to_dtype(DType::F32)?)?)
        }
        Expr::Latent(var) => {
            let wide = x.to_dtype(DType::F32)?;
            let y = kernels::linear(&wide, &var.as_tensor().to_dtype(DType::F32)?, None)?;
            Ok(y.to_dtype(x.dtype())?)
        }
        Expr::Packed(_) | Expr::Node { .. } => Ok(w.matmul(x)?.to_dtype(x.dtype())?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_out_of_range_are_refused_and_the_pass_decides() {
        let pass = Arc::new(AtomicU64::new(0));
        let error = Dropout::new(1.0, 1, "q", pass.clone()).unwrap_err();
        assert_eq!(error.to_string(), "dropout = 1 for q: expected 0 to below 1");
        let dropout = Dropout::new(0.5, 1, "q", pass.clone()).unwrap();
        let x = Tensor::ones(64, DType::F32, &candle_core::Device::Cpu).unwrap();
        let draw = || dropout.apply(&x).unwrap().to_vec1::<f32>().unwrap();
        let first = draw();
        assert_eq!(draw(), first);
        pass.store(1, Ordering::Relaxed);
        assert_ne!(draw(), first);
        pass.store(0, Ordering::Relaxed);
        assert_eq!(draw(), first);
    }
}
