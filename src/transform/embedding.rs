//! LoRA on an embedding: a change of low rank to a table of rows.
//!
//! ```text
//! E' = E + s (B A)^T     rows: E[ids] + s A[:, ids]^T B^T     E [V, D], A [r, V], B [D, r]
//! ```
//!
//! Hu et al. 2021, equation 3, with the table's transpose as the weight.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};

use super::dropout::{base, base_matmul, detached, held, moved, only, plain, seen};
use super::lora::{branch, check_rank, merged, shape_of};
use crate::random::Random;
use crate::weights::{Role, Transform, Weight};
use crate::{kernels, Result};

/// The low-rank adapter of a table: `A [r, V]`, `B [D, r]`.
#[derive(Clone, Debug)]
pub struct EmbeddingLora {
    a: Tensor,
    b: Tensor,
    scale: f64,
}

impl EmbeddingLora {
    /// With `a: [r, V]` and `b: [D, r]`.
    pub fn new(a: &Tensor, b: &Tensor, scale: f64, trainable: bool) -> Result<Self> {
        shape_of(["lora_embedding_A", "lora_embedding_B"], a, b)?;
        Ok(EmbeddingLora { a: held(a, trainable)?, b: held(b, trainable)?, scale })
    }

    /// A trainable adapter of rank `r` for a table of shape (V, D): A zero, B standard normal.
    pub fn start(r: usize, (rows, width): (usize, usize), scale: f64, random: &mut Random) -> Result<Self> {
        check_rank("embedding lora", r)?;
        let a = Tensor::zeros((r, rows), DType::F32, &Device::Cpu)?;
        let b: Vec<f32> = (0..width * r).map(|_| random.normal()).collect();
        Self::new(&a, &Tensor::from_vec(b, (width, r), &Device::Cpu)?, scale, true)
    }

    /// The same adapter with its tensors on `device`, trainable where they were.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(EmbeddingLora { a: moved(&self.a, device)?, b: moved(&self.b, device)?, scale: self.scale })
    }

    fn list(&self) -> Vec<(&'static str, Tensor)> {
        vec![("lora_embedding_A", self.a.clone()), ("lora_embedding_B", self.b.clone())]
    }

    fn shape(&self) -> Result<(usize, usize)> {
        Ok((self.a.dim(1)?, self.b.dim(0)?))
    }
}

impl Transform for EmbeddingLora {
    fn kind(&self) -> &'static str {
        "embedding_lora"
    }

    fn apply(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let e = base("embedding_lora", inputs, self.shape()?)?;
        merged(&e, &self.b.t()?, &self.a.t()?, self.scale)
    }

    /// `x E'^T`, as an output layer that shares the table needs it.
    fn matmul(&self, x: &Tensor, inputs: &[Weight]) -> Result<Tensor> {
        let e = only("embedding_lora", inputs)?;
        let wide = seen(x)?;
        let change = branch(&wide, &self.b.t()?, &self.a.t()?, self.scale)?;
        Ok((base_matmul(&wide, e)? + change)?.to_dtype(x.dtype())?)
    }

    /// The rows in f32, whatever the table's dtype.
    fn rows(&self, ids: &Tensor, inputs: &[Weight]) -> Result<Tensor> {
        let e = only("embedding_lora", inputs)?.rows(ids)?.to_dtype(DType::F32)?;
        let (flat, width) = (ids.flatten_all()?.to_dtype(DType::U32)?, self.b.dim(0)?);
        let flat = flat.to_device(self.a.device())?;
        let picked = kernels::pick_rows(&self.a.t()?, &flat)?; // [ids, r]
        let change = (kernels::linear(&picked, &self.b, None)? * self.scale)?;
        Ok((e.reshape(((), width))? + change)?.reshape(e.shape())?)
    }

    fn params(&self) -> Vec<(&'static str, Var, Role)> {
        plain(&self.list())
    }

    fn tensors(&self) -> Vec<(&'static str, Tensor)> {
        detached(self.list())
    }

    fn frozen(&self) -> Result<Arc<dyn Transform>> {
        Ok(Arc::new(Self::new(&self.a, &self.b, self.scale, false)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let cpu = &Device::Cpu;
        let e = Tensor::new(&[[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]], cpu).unwrap();
        let a = Tensor::new(&[[0f32, 2.0, -2.0]], cpu).unwrap();
        let b = Tensor::new(&[[10f32], [1.0]], cpu).unwrap();
        let lora = EmbeddingLora::new(&a, &b, 0.5, true).unwrap();
        let table = lora.apply(std::slice::from_ref(&e)).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(table, [[1.0, 2.0], [13.0, 5.0], [-5.0, 5.0]]);
        let ids = Tensor::new(&[[2u32, 0]], cpu).unwrap();
        let rows = lora.rows(&ids, &[Weight::dense(e)]).unwrap().to_vec3::<f32>().unwrap();
        assert_eq!(rows, [[[-5.0, 5.0], [1.0, 2.0]]]);
    }
}
