//! LoRA: a change of low rank, as a product of two thin matrices.
//!
//! ```text
//! y = x W^T + s x A^T B^T     W' = W + s B A     W [O, I], A [r, I], B [O, r], s = alpha / r
//! ```
//!
//! Hu et al. 2021, equation 3. Dropout falls on the x of the branch alone.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};

use super::dropout::{
    active, base, base_matmul, detached, frozen_rows, held, moved, only, plain, seen, Dropout,
};
use crate::random::Random;
use crate::weights::{Role, Transform, Weight};
use crate::{kernels, Error, Result};

/// How A starts; B starts at zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoraInit {
    /// Uniform within `±1/sqrt(I)`.
    Kaiming,
    /// Normal with standard deviation `1/r`.
    Gaussian,
}

impl LoraInit {
    /// A of shape `[r, inputs]`.
    pub(super) fn draw(self, r: usize, inputs: usize, random: &mut Random) -> Result<Tensor> {
        let bound = 1.0 / (inputs.max(1) as f32).sqrt();
        let draw = |_| match self {
            LoraInit::Kaiming => random.range(-bound, bound),
            LoraInit::Gaussian => random.normal() / r as f32,
        };
        let values: Vec<f32> = (0..r * inputs).map(draw).collect();
        Ok(Tensor::from_vec(values, (r, inputs), &Device::Cpu)?)
    }
}

/// The low-rank adapter: `A [r, I]`, `B [O, r]`, a scale, and perhaps a bias `[O]` of the branch.
#[derive(Clone, Debug)]
pub struct Lora {
    a: Tensor,
    b: Tensor,
    scale: f64,
    bias: Option<Tensor>,
    dropout: Option<Dropout>,
}

/// (O, I) of a weight for `a [r, I]` and `b [O, r]`.
pub(super) fn shape_of(names: [&str; 2], a: &Tensor, b: &Tensor) -> Result<(usize, usize)> {
    match (a.dims(), b.dims()) {
        ([r, inputs], [outputs, s]) if r == s && *r > 0 => Ok((*outputs, *inputs)),
        ([r, _], found) => Err(Error::tensor(
            names[1],
            format!("found {found:?}, expected [outputs, {r}] as the rank is {r}"),
        )),
        (found, _) => Err(Error::tensor(names[0], format!("found {found:?}, expected [rank, inputs]"))),
    }
}

/// The error of a rank that no weight can have.
pub(super) fn check_rank(kind: &str, r: usize) -> Result<()> {
    match r {
        0 => Err(Error::usage(format!("{kind}: rank 0: expected 1 or more"))),
        _ => Ok(()),
    }
}

/// `W + s B A`.
pub(super) fn merged(w: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    Ok(kernels::low_rank_merged(w, a, b, scale)?)
}

/// `s x A^T B^T`.
pub(super) fn branch(x: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    Ok(kernels::low_rank_change(x, a, b, scale)?)
}

impl Lora {
    /// With `a: [r, I]`, `b: [O, r]` and, where the branch has one, `bias: [O]`, which is scaled too.
    pub fn new(
        a: &Tensor,
        b: &Tensor,
        scale: f64,
        bias: Option<&Tensor>,
        dropout: Option<Dropout>,
        trainable: bool,
    ) -> Result<Self> {
        let (outputs, _) = shape_of(["lora_A", "lora_B"], a, b)?;
        if let Some(bias) = bias.filter(|bias| bias.dims() != [outputs]) {
            return Err(Error::tensor("lora_bias", format!("found {:?}, expected [{outputs}]", bias.dims())));
        }
        Ok(Lora {
            a: held(a, trainable)?,
            b: held(b, trainable)?,
            scale,
            bias: bias.map(|bias| held(bias, trainable)).transpose()?,
            dropout: active(dropout)?,
        })
    }

    /// A trainable adapter of rank `r` without a bias for a weight of shape (O, I).
    pub fn start(
        r: usize,
        (outputs, inputs): (usize, usize),
        scale: f64,
        init: LoraInit,
        dropout: Option<Dropout>,
        random: &mut Random,
    ) -> Result<Self> {
        check_rank("lora", r)?;
        let a = init.draw(r, inputs, random)?;
        let b = Tensor::zeros((outputs, r), DType::F32, &Device::Cpu)?;
        Self::new(&a, &b, scale, None, dropout, true)
    }

    /// What the branch adds to the layer's bias, `[O]`: whoever folds the weight has to fold this too.
    pub fn bias_change(&self) -> Result<Option<Tensor>> {
        Ok(self.bias.as_ref().map(|bias| bias * self.scale).transpose()?)
    }

    /// The same adapter with its tensors on `device`, trainable where they were.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Lora {
            a: moved(&self.a, device)?,
            b: moved(&self.b, device)?,
            bias: self.bias.as_ref().map(|bias| moved(bias, device)).transpose()?,
            ..self.clone()
        })
    }

    fn shape(&self) -> Result<(usize, usize)> {
        Ok((self.b.dim(0)?, self.a.dim(1)?))
    }

    fn list(&self) -> Vec<(&'static str, Tensor)> {
        let mut list = vec![("lora_A", self.a.clone()), ("lora_B", self.b.clone())];
        list.extend(self.bias.iter().map(|bias| ("lora_bias", bias.clone())));
        list
    }
}

impl Transform for Lora {
    fn kind(&self) -> &'static str {
        "lora"
    }

    fn apply(&self, inputs: &[Tensor]) -> Result<Tensor> {
        merged(&base("lora", inputs, self.shape()?)?, &self.a, &self.b, self.scale)
    }

    fn matmul(&self, x: &Tensor, inputs: &[Weight]) -> Result<Tensor> {
        let w = only("lora", inputs)?;
        let wide = seen(x)?;
        let mut y = match (frozen_rows("lora", w, self.shape()?)?, &self.dropout) {
            (Some(rows), None) => kernels::low_rank(&wide, &rows, &self.a, &self.b, self.scale)?,
            (_, dropout) => {
                let dropped = dropout.as_ref().map(|dropout| dropout.apply(&wide)).transpose()?;
                let x = dropped.as_ref().unwrap_or(&wide);
                (base_matmul(&wide, w)? + branch(x, &self.a, &self.b, self.scale)?)?
            }
        };
        if let Some(bias) = self.bias_change()? {
            y = kernels::add_bias(&y, &bias.to_dtype(y.dtype())?)?;
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
        Ok(Arc::new(Self::new(&self.a, &self.b, self.scale, self.bias.as_ref(), None, false)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let cpu = &Device::Cpu;
        let w = Tensor::new(&[[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]], cpu).unwrap();
        let a = Tensor::new(&[[1f32, -1.0]], cpu).unwrap();
        let b = Tensor::new(&[[2f32], [0.0], [4.0]], cpu).unwrap();
        let bias = Tensor::new(&[10f32, 20.0, 30.0], cpu).unwrap();
        let lora = Lora::new(&a, &b, 0.5, Some(&bias), None, true).unwrap();
        let merged = lora.apply(std::slice::from_ref(&w)).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(merged, [[2.0, 1.0], [3.0, 4.0], [7.0, 4.0]]);
        let x = Tensor::new(&[[1f32, 1.0]], cpu).unwrap();
        let y = lora.matmul(&x, &[Weight::dense(w)]).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(y, [[3.0 + 5.0, 7.0 + 10.0, 11.0 + 15.0]]);
        assert_eq!(lora.params().iter().map(|p| p.0).collect::<Vec<_>>(), ["lora_A", "lora_B", "lora_bias"]);
    }

    #[test]
    fn starts_have_their_spread() {
        let mut random = Random::new(1, "lora", &[]);
        let kaiming = LoraInit::Kaiming.draw(8, 100, &mut random).unwrap();
        let values = kaiming.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(values.iter().all(|v| v.abs() <= 0.1) && values.iter().any(|v| v.abs() > 0.09));
        let gaussian = LoraInit::Gaussian.draw(8, 1000, &mut random).unwrap();
        let square = gaussian.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
        // The variance of 8000 draws is within 5 % of 1/64.
        assert!((square * 64.0 - 1.0).abs() < 0.05, "{square}");
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let of = |s: &[usize]| Tensor::zeros(s, DType::F32, &Device::Cpu).unwrap();
        let new = |a: &[usize], b: &[usize], bias: Option<&Tensor>| {
            Lora::new(&of(a), &of(b), 1.0, bias, None, true).unwrap_err().to_string()
        };
        assert_eq!(
            new(&[2, 5], &[4, 3], None),
            "tensor lora_B: found [4, 3], expected [outputs, 2] as the rank is 2"
        );
        assert_eq!(new(&[5], &[4, 3], None), "tensor lora_A: found [5], expected [rank, inputs]");
        assert_eq!(new(&[2, 5], &[4, 2], Some(&of(&[3]))), "tensor lora_bias: found [3], expected [4]");
        let mut random = Random::new(1, "lora", &[]);
        let error = Lora::start(0, (4, 5), 1.0, LoraInit::Kaiming, None, &mut random).unwrap_err();
        assert_eq!(error.to_string(), "lora: rank 0: expected 1 or more");
    }
}
