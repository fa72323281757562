//! MiSS, and its mini form: one block that all slices of a weight's inputs share.
//!
//! ```text
//! W'[o, i] = W[o, i] + D[i mod r, o]     W [O, I], D [r, O]
//! mini: D = a block [r, m], repeated along the outputs, m a divisor of O
//! ```
//!
//! arXiv 2409.15371, the form that shares along the inputs; where r does not divide I the last slice takes
//! the first rows of D. No scale. It is LoRA with a fixed A of ones and zeros, see [`Miss::to_lora`].

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};

use super::dropout::{
    active, base, base_matmul, detached, frozen_rows, held, moved, only, plain, seen, Dropout,
};
use crate::random::Random;
use crate::weights::{Role, Transform, Weight};
use crate::{kernels, Error, Result};

/// How the block of [`Miss`] starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissInit {
    /// Zeros: the adapter changes nothing at first.
    Zeros,
    /// Uniform within `±1/sqrt(O)`.
    Uniform,
}

/// The additive adapter: `D [r, O]`.
#[derive(Clone, Debug)]
pub struct Miss {
    block: Tensor,
    shape: (usize, usize),
    dropout: Option<Dropout>,
}

/// The additive adapter with a block `[r, m]` that repeats along the outputs.
#[derive(Clone, Debug)]
pub struct Mini {
    block: Tensor,
    shape: (usize, usize),
    dropout: Option<Dropout>,
}

fn check_rank(kind: &str, r: usize, (outputs, inputs): (usize, usize)) -> Result<()> {
    if r == 0 || r > inputs {
        return Err(Error::usage(format!(
            "{kind}: rank {r} for a weight of {outputs} outputs and {inputs} inputs: expected 1 to {inputs}"
        )));
    }
    Ok(())
}

/// `x W'^T` without W' where the base is a frozen leaf.
fn product(
    kind: &str,
    x: &Tensor,
    inputs: &[Weight],
    d: &Tensor,
    shape: (usize, usize),
    dropout: Option<&Dropout>,
) -> Result<Tensor> {
    let w = only(kind, inputs)?;
    let wide = seen(x)?;
    let y = match (frozen_rows(kind, w, shape)?, dropout) {
        (Some(rows), None) => kernels::shared_block(&wide, &rows, d)?,
        (_, dropout) => {
            let dropped = dropout.map(|dropout| dropout.apply(&wide)).transpose()?;
            let change = kernels::shared_block_change(dropped.as_ref().unwrap_or(&wide), d)?;
            (base_matmul(&wide, w)? + change)?
        }
    };
    Ok(y.to_dtype(x.dtype())?)
}

/// `A [r, I]` with a one where `i mod r = j`.
fn slots(r: usize, inputs: usize) -> Result<Tensor> {
    let mut a = vec![0f32; r * inputs];
    for i in 0..inputs {
        a[i % r * inputs + i] = 1.0;
    }
    Ok(Tensor::from_vec(a, (r, inputs), &Device::Cpu)?)
}

impl Miss {
    /// With the block `[r, O]` for a weight of shape (O, I); r at most I.
    pub fn new(
        block: &Tensor,
        shape: (usize, usize),
        dropout: Option<Dropout>,
        trainable: bool,
    ) -> Result<Self> {
        match block.dims() {
            [r, outputs] if *outputs == shape.0 => check_rank("miss", *r, shape)?,
            other => {
                let message = format!("found {other:?}, expected [rank, {}]", shape.0);
                return Err(Error::tensor("miss_block", message));
            }
        }
        Ok(Miss { block: held(block, trainable)?, shape, dropout: active(dropout)? })
    }

    /// A trainable adapter of rank `r` for a weight of shape (O, I).
    pub fn start(
        r: usize,
        shape: (usize, usize),
        init: MissInit,
        dropout: Option<Dropout>,
        random: &mut Random,
    ) -> Result<Self> {
        check_rank("miss", r, shape)?;
        let bound = 1.0 / (shape.0.max(1) as f32).sqrt();
        let values: Vec<f32> = match init {
            MissInit::Zeros => vec![0.0; r * shape.0],
            MissInit::Uniform => (0..r * shape.0).map(|_| random.range(-bound, bound)).collect(),
        };
        Self::new(&Tensor::from_vec(values, (r, shape.0), &Device::Cpu)?, shape, dropout, true)
    }

    /// The same adapter with its tensors on `device`, trainable where they were.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Miss { block: moved(&self.block, device)?, ..self.clone() })
    }

    /// The same change as LoRA of scale 1: `A [r, I]` of ones and zeros, `B = D^T [O, r]`.
    pub fn to_lora(&self) -> Result<(Tensor, Tensor)> {
        let b = self.block.detach().t()?.contiguous()?;
        Ok((slots(self.block.dim(0)?, self.shape.1)?.to_device(b.device())?, b))
    }
}

impl Transform for Miss {
    fn kind(&self) -> &'static str {
        "miss"
    }

    fn apply(&self, inputs: &[Tensor]) -> Result<Tensor> {
        Ok(kernels::shared_block_merged(&base("miss", inputs, self.shape)?, &self.block)?)
    }

    fn matmul(&self, x: &Tensor, inputs: &[Weight]) -> Result<Tensor> {
        product("miss", x, inputs, &self.block, self.shape, self.dropout.as_ref())
    }

    fn params(&self) -> Vec<(&'static str, Var, Role)> {
        plain(&[("miss_block", self.block.clone())])
    }

    fn tensors(&self) -> Vec<(&'static str, Tensor)> {
        detached(vec![("miss_block", self.block.clone())])
    }

    fn frozen(&self) -> Result<Arc<dyn Transform>> {
        Ok(Arc::new(Self::new(&self.block, self.shape, None, false)?))
    }
}

impl Mini {
    /// With the block `[r, m]` for a weight of shape (O, I); r at most I, m a divisor of O.
    pub fn new(
        block: &Tensor,
        shape: (usize, usize),
        dropout: Option<Dropout>,
        trainable: bool,
    ) -> Result<Self> {
        let [r, m] = *block.dims() else {
            let message = format!("found {:?}, expected [rank, mini_r]", block.dims());
            return Err(Error::tensor("miss_block", message));
        };
        check_rank("mini", r, shape)?;
        if m == 0 || !shape.0.is_multiple_of(m) {
            return Err(Error::usage(format!(
                "mini: mini_r {m} for a weight of {} outputs and {} inputs: expected a divisor of {}",
                shape.0, shape.1, shape.0
            )));
        }
        Ok(Mini { block: held(block, trainable)?, shape, dropout: active(dropout)? })
    }

    /// A trainable adapter of rank `r` and `m` block outputs, zeros, for a weight of shape (O, I).
    pub fn start(r: usize, m: usize, shape: (usize, usize), dropout: Option<Dropout>) -> Result<Self> {
        Self::new(&Tensor::zeros((r, m), DType::F32, &Device::Cpu)?, shape, dropout, true)
    }

    /// The same adapter with its tensors on `device`, trainable where they were.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Mini { block: moved(&self.block, device)?, ..self.clone() })
    }

    /// The block over all outputs, `[r, O]`: column o is column `o mod m`.
    fn repeated(&self) -> Result<Tensor> {
        let (r, m) = self.block.dims2()?;
        let times = self.shape.0 / m;
        Ok(self.block.unsqueeze(1)?.broadcast_as((r, times, m))?.reshape((r, self.shape.0))?)
    }

    /// The same change as LoRA of scale 1: `A [r, I]` of ones and zeros, `B [O, r]`.
    pub fn to_lora(&self) -> Result<(Tensor, Tensor)> {
        let b = self.repeated()?.detach().t()?.contiguous()?;
        Ok((slots(self.block.dim(0)?, self.shape.1)?.to_device(b.device())?, b))
    }
}

impl Transform for Mini {
    fn kind(&self) -> &'static str {
        "mini"
    }

    fn apply(&self, inputs: &[Tensor]) -> Result<Tensor> {
        Ok(kernels::shared_block_merged(&base("mini", inputs, self.shape)?, &self.repeated()?)?)
    }

    fn matmul(&self, x: &Tensor, inputs: &[Weight]) -> Result<Tensor> {
        product("mini", x, inputs, &self.repeated()?, self.shape, self.dropout.as_ref())
    }

    fn params(&self) -> Vec<(&'static str, Var, Role)> {
        plain(&[("miss_block", self.block.clone())])
    }

    fn tensors(&self) -> Vec<(&'static str, Tensor)> {
        detached(vec![("miss_block", self.block.clone())])
    }

    fn frozen(&self) -> Result<Arc<dyn Transform>> {
        Ok(Arc::new(Self::new(&self.block, self.shape, None, false)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        // O = 2, I = 3, r = 2: the last slice takes the first row of the block alone.
        let cpu = &Device::Cpu;
        let w = Tensor::new(&[[1f32, 2.0, 3.0], [4.0, 5.0, 6.0]], cpu).unwrap();
        let miss = Miss::new(&Tensor::new(&[[0.5f32, -1.0], [10.0, 20.0]], cpu).unwrap(), (2, 3), None, true);
        let merged = miss.unwrap().apply(std::slice::from_ref(&w)).unwrap();
        assert_eq!(merged.to_vec2::<f32>().unwrap(), [[1.5, 12.0, 3.5], [3.0, 25.0, 5.0]]);
        let mini = Mini::new(&Tensor::new(&[[0.5f32], [10.0]], cpu).unwrap(), (2, 3), None, true).unwrap();
        let merged = mini.apply(&[w]).unwrap();
        assert_eq!(merged.to_vec2::<f32>().unwrap(), [[1.5, 12.0, 3.5], [4.5, 15.0, 6.5]]);
        let (a, b) = mini.to_lora().unwrap();
        assert_eq!(a.to_vec2::<f32>().unwrap(), [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]);
        assert_eq!(b.to_vec2::<f32>().unwrap(), [[0.5, 10.0], [0.5, 10.0]]);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let mut random = Random::new(1, "m", &[]);
        let error = Miss::start(7, (4, 6), MissInit::Zeros, None, &mut random).unwrap_err().to_string();
        assert_eq!(error, "miss: rank 7 for a weight of 4 outputs and 6 inputs: expected 1 to 6");
        let error = Mini::start(2, 3, (4, 6), None).unwrap_err().to_string();
        assert!(error.contains("mini_r 3") && error.contains("divisor of 4"), "{error}");
        let block = Tensor::zeros((2, 5), DType::F32, &Device::Cpu).unwrap();
        let error = Miss::new(&block, (4, 6), None, true).unwrap_err().to_string();
        assert_eq!(error, "tensor miss_block: found [2, 5], expected [rank, 4]");
        let miss = Miss::start(2, (4, 6), MissInit::Zeros, None, &mut random).unwrap();
        let error = miss.apply(&[block]).unwrap_err().to_string();
        assert_eq!(error, "miss: found a weight [2, 5], expected [4, 6]");
    }

    #[test]
    fn a_uniform_start_stays_in_its_bounds() {
        let mut random = Random::new(1, "m", &[]);
        let miss = Miss::start(5, (16, 40), MissInit::Uniform, None, &mut random).unwrap();
        let values = miss.block.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(values.iter().all(|v| v.abs() <= 0.25) && values.iter().any(|v| v.abs() > 0.2));
    }
}
