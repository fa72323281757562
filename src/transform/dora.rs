//! DoRA: LoRA for the direction of each row of a weight, and a magnitude for its length.
//!
//! ```text
//! V = W + s B A     n[o] = |V[o, :]|     W' = diag(m / n) V     m [O], m = n at the start
//! y = x W^T + (m/n - 1) x_d W^T + (m/n) s x_d A^T B^T     x_d: x under dropout
//! ```
//!
//! Liu et al. 2024, equations 5 and 11: n is a constant in the backward pass. Rows are outputs.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};

use super::dropout::{
    active, base, base_matmul, detached, frozen_rows, held, moved, only, plain, seen, Dropout,
};
use super::lora::{branch, check_rank, merged, shape_of, LoraInit};
use crate::kernels::FrozenRows;
use crate::random::Random;
use crate::weights::{Role, Transform, Weight};
use crate::{kernels, Error, Result};

/// The adapter of direction and magnitude: `A [r, I]`, `B [O, r]`, `m [O]`.
#[derive(Clone, Debug)]
pub struct Dora {
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    scale: f64,
    dropout: Option<Dropout>,
}

impl Dora {
    /// With `a: [r, I]`, `b: [O, r]` and `magnitude: [O]`.
    pub fn new(
        a: &Tensor,
        b: &Tensor,
        magnitude: &Tensor,
        scale: f64,
        dropout: Option<Dropout>,
        trainable: bool,
    ) -> Result<Self> {
        let (outputs, _) = shape_of(["lora_A", "lora_B"], a, b)?;
        if magnitude.dims() != [outputs] {
            let message = format!("found {:?}, expected [{outputs}]", magnitude.dims());
            return Err(Error::tensor("lora_magnitude_vector", message));
        }
        Ok(Dora {
            a: held(a, trainable)?,
            b: held(b, trainable)?,
            magnitude: held(magnitude, trainable)?,
            scale,
            dropout: active(dropout)?,
        })
    }

    /// A trainable adapter of rank `r` whose magnitudes are the lengths of the rows of `weight` `[O, I]`, read
    /// panel by panel where it is a frozen leaf.
    pub fn start(
        r: usize,
        weight: &Weight,
        scale: f64,
        init: LoraInit,
        dropout: Option<Dropout>,
        random: &mut Random,
    ) -> Result<Self> {
        check_rank("dora", r)?;
        let shape = weight.shape()?;
        let [outputs, inputs] = *shape else {
            return Err(Error::Run(format!("dora: found a weight {shape:?}, expected [out, in]")));
        };
        let device = weight.device();
        let a = init.draw(r, inputs, random)?.to_device(&device)?;
        let b = Tensor::zeros((outputs, r), DType::F32, &device)?;
        let rows = rows_of(weight, (outputs, inputs))?;
        let magnitude = kernels::row_norms(&rows, &a, &b, scale)?;
        Self::new(&a, &b, &magnitude, scale, dropout, true)
    }

    /// The same adapter with its tensors on `device`, trainable where they were.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Dora {
            a: moved(&self.a, device)?,
            b: moved(&self.b, device)?,
            magnitude: moved(&self.magnitude, device)?,
            ..self.clone()
        })
    }

    fn shape(&self) -> Result<(usize, usize)> {
        Ok((self.b.dim(0)?, self.a.dim(1)?))
    }

    fn list(&self) -> Vec<(&'static str, Tensor)> {
        vec![
            ("lora_A", self.a.clone()),
            ("lora_B", self.b.clone()),
            ("lora_magnitude_vector", self.magnitude.clone()),
        ]
    }
}

/// The rows of any weight, whatever its expression; detached.
fn rows_of(weight: &Weight, shape: (usize, usize)) -> Result<FrozenRows> {
    match frozen_rows("dora", weight, shape)? {
        Some(rows) => Ok(rows),
        None => Ok(FrozenRows::dense(&weight.tensor()?)?),
    }
}

impl Transform for Dora {
    fn kind(&self) -> &'static str {
        "dora"
    }

    fn apply(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let w = base("dora", inputs, self.shape()?)?;
        let n = kernels::row_norms(&FrozenRows::dense(&w)?, &self.a, &self.b, self.scale)?;
        let v = merged(&w, &self.a, &self.b, self.scale)?;
        Ok(v.broadcast_mul(&(&self.magnitude / n)?.unsqueeze(1)?)?)
    }

    fn matmul(&self, x: &Tensor, inputs: &[Weight]) -> Result<Tensor> {
        let w = only("dora", inputs)?;
        let wide = seen(x)?;
        let leaf = frozen_rows("dora", w, self.shape()?)?;
        let rows = match &leaf {
            Some(rows) => rows.clone(),
            None => FrozenRows::dense(&w.tensor()?)?,
        };
        let n = kernels::row_norms(&rows, &self.a, &self.b, self.scale)?;
        let dropped = self.dropout.as_ref().map(|dropout| dropout.apply(&wide)).transpose()?;
        let seen = dropped.as_ref().unwrap_or(&wide);
        let turned = match leaf {
            Some(rows) => kernels::low_rank(seen, &rows, &self.a, &self.b, self.scale)?,
            None => (base_matmul(seen, w)? + branch(seen, &self.a, &self.b, self.scale)?)?,
        };
        let mut y = kernels::scale_columns(&turned, &self.magnitude, &n)?;
        if dropped.is_some() {
            // x W^T - x_d W^T in one product: what dropout took from the base term.
            y = (y + base_matmul(&(&wide - seen)?, w)?)?;
        }
        Ok(y.to_dtype(x.dtype())?)
    }

    fn params(&self) -> Vec<(&'static str, Var, Role)> {
        plain(&self.list())
    }

    fn tensors(&self) -> Vec<(&'static str, Tensor)> {
        detached(self.list())
    }

    fn frozen(&self) -> Result<Arc<dyn Transform>> {
        Ok(Arc::new(Self::new(&self.a, &self.b, &self.magnitude, self.scale, None, false)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let cpu = &Device::Cpu;
        let w = Tensor::new(&[[3f32, 0.0], [0.0, 1.0]], cpu).unwrap();
        let a = Tensor::new(&[[0f32, 2.0]], cpu).unwrap();
        let b = Tensor::new(&[[4f32], [0.0]], cpu).unwrap();
        let m = Tensor::new(&[10f32, 3.0], cpu).unwrap();
        // V = [[3, 4], [0, 1]], lengths 5 and 1.
        let dora = Dora::new(&a, &b, &m, 0.5, None, true).unwrap();
        let merged = dora.apply(&[w]).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(merged, [[6.0, 8.0], [0.0, 3.0]]);
    }

    #[test]
    fn a_start_takes_the_lengths_of_rows() {
        let w = Tensor::new(&[[3f32, 4.0], [0.0, 0.0]], &Device::Cpu).unwrap();
        let mut random = Random::new(1, "dora", &[]);
        let weight = Weight::dense(w.clone());
        let dora = Dora::start(1, &weight, 2.0, LoraInit::Kaiming, None, &mut random).unwrap();
        assert_eq!(dora.magnitude.to_vec1::<f32>().unwrap(), [5.0, 1.0]);
        assert_eq!(dora.apply(&[w]).unwrap().to_vec2::<f32>().unwrap(), [[3.0, 4.0], [0.0, 0.0]]);
        let of = |s: &[usize]| Tensor::zeros(s, DType::F32, &Device::Cpu).unwrap();
        let error = Dora::new(&of(&[1, 2]), &of(&[3, 1]), &of(&[2]), 1.0, None, true).unwrap_err();
        assert_eq!(error.to_string(), "tensor lora_magnitude_vector: found [2], expected [3]");
    }
}
