//! Bone's block-affine rule ("bat"): each block of rows turned by a small matrix of its own.
//!
//! ```text
//! W'_pq = W_pq + W_pq B_p + B_p     W [O, I] in blocks [r, r], B [O/r, r, r], p < O/r, q < I/r
//! ```
//!
//! arXiv 2409.15371, versions 1 to 3, where this form is called Bone; r divides O and I. No scale, and no
//! LoRA form: the change has full rank.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};

use super::dropout::{base, detached, frozen_rows, held, moved, only, plain, seen};
use crate::weights::{Role, Transform, Weight};
use crate::{kernels, Error, Result};

/// The block-affine adapter: `B [O/r, r, r]`.
#[derive(Clone, Debug)]
pub struct Bat {
    block: Tensor,
    shape: (usize, usize),
}

fn check_rank(r: usize, (outputs, inputs): (usize, usize)) -> Result<()> {
    if r == 0 || !outputs.is_multiple_of(r) || !inputs.is_multiple_of(r) {
        return Err(Error::usage(format!(
            "bat: rank {r} for a weight of {outputs} outputs and {inputs} inputs: expected a divisor of both"
        )));
    }
    Ok(())
}

impl Bat {
    /// With the blocks `[O/r, r, r]` for a weight of shape (O, I); r divides both.
    pub fn new(block: &Tensor, shape: (usize, usize), trainable: bool) -> Result<Self> {
        let r = block.dims().last().copied().unwrap_or(0);
        if block.rank() != 3 {
            let message = format!("found {:?}, expected [outputs / rank, rank, rank]", block.dims());
            return Err(Error::tensor("miss_block", message));
        }
        check_rank(r, shape)?;
        if block.dims() != [shape.0 / r, r, r] {
            let message = format!("found {:?}, expected [{}, {r}, {r}]", block.dims(), shape.0 / r);
            return Err(Error::tensor("miss_block", message));
        }
        Ok(Bat { block: held(block, trainable)?, shape })
    }

    /// A trainable adapter of rank `r`, zeros, for a weight of shape (O, I).
    pub fn start(r: usize, shape: (usize, usize)) -> Result<Self> {
        check_rank(r, shape)?;
        Self::new(&Tensor::zeros((shape.0 / r, r, r), DType::F32, &Device::Cpu)?, shape, true)
    }

    /// The same adapter with its tensors on `device`, trainable where they were.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Bat { block: moved(&self.block, device)?, shape: self.shape })
    }

    /// The largest rank up to `up_to` that divides every size of the `shapes` (O, I); 1 where there is none
    /// above it.
    pub fn rank_for(shapes: &[(usize, usize)], up_to: usize) -> usize {
        let divides = |r: usize| shapes.iter().all(|(o, i)| o.is_multiple_of(r) && i.is_multiple_of(r));
        (1..=up_to).rev().find(|&r| divides(r)).unwrap_or(1)
    }
}

impl Transform for Bat {
    fn kind(&self) -> &'static str {
        "bat"
    }

    fn apply(&self, inputs: &[Tensor]) -> Result<Tensor> {
        Ok(kernels::block_affine_merged(&base("bat", inputs, self.shape)?, &self.block)?)
    }

    fn matmul(&self, x: &Tensor, inputs: &[Weight]) -> Result<Tensor> {
        let w = only("bat", inputs)?;
        let y = match frozen_rows("bat", w, self.shape)? {
            Some(rows) => kernels::block_affine(&seen(x)?, &rows, &self.block)?,
            None => kernels::linear(&x.to_dtype(DType::F32)?, &self.apply(&[w.tensor()?])?, None)?,
        };
        Ok(y.to_dtype(x.dtype())?)
    }

    fn params(&self) -> Vec<(&'static str, Var, Role)> {
        plain(&[("miss_block", self.block.clone())])
    }

    fn tensors(&self) -> Vec<(&'static str, Tensor)> {
        detached(vec![("miss_block", self.block.clone())])
    }

    fn frozen(&self) -> Result<Arc<dyn Transform>> {
        Ok(Arc::new(Self::new(&self.block, self.shape, false)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn element_by_element() {
        let (o, i, r) = (4, 6, 2);
        let of = |n: usize, f: &dyn Fn(usize) -> f32| (0..n).map(f).collect::<Vec<f32>>();
        let (w, b) = (of(o * i, &|k| (k % 7) as f32 - 3.0), of(o * r, &|k| (k % 5) as f32 - 2.0));
        let tensor = |v: &[f32], s: &[usize]| Tensor::from_slice(v, s, &Device::Cpu).unwrap();
        let bat = Bat::new(&tensor(&b, &[o / r, r, r]), (o, i), true).unwrap();
        let merged = bat.apply(&[tensor(&w, &[o, i])]).unwrap().to_vec2::<f32>().unwrap();
        for (p, q) in (0..o / r).flat_map(|p| (0..i / r).map(move |q| (p, q))) {
            for (a, d) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                let row = p * r + a;
                let turned: f32 = (0..r).map(|k| w[row * i + q * r + k] * b[p * r * r + k * r + d]).sum();
                let want = w[row * i + q * r + d] + turned + b[p * r * r + a * r + d];
                assert_eq!(merged[row][q * r + d], want);
            }
        }
    }

    #[test]
    fn ranks_that_divide() {
        assert_eq!(Bat::rank_for(&[(64, 64), (172, 64), (64, 172)], 64), 4);
        assert_eq!(Bat::rank_for(&[(4096, 4096), (11008, 4096)], 64), 64);
        assert_eq!(Bat::rank_for(&[(7, 5)], 64), 1);
        let error = Bat::start(64, (172, 64)).unwrap_err().to_string();
        assert!(error.contains("rank 64 for a weight of 172 outputs and 64 inputs"), "{error}");
        let block = Tensor::zeros((3, 2, 2), DType::F32, &Device::Cpu).unwrap();
        let error = Bat::new(&block, (4, 6), true).unwrap_err().to_string();
        assert_eq!(error, "tensor miss_block: found [3, 2, 2], expected [2, 2, 2]");
    }
}
