//! The layers that models are made of: they hold [`Weight`]s, so whatever a weight is made of, the
//! layer's code is the same.

use std::sync::OnceLock;

use candle_core::{DType, Tensor};

use crate::weights::{Activation, Expr, Packed, Weight, Weights};
use crate::{kernels, On, Result};

/// `y = x Wᵀ + b`, `x [.., in]`, `W [out, in]` (or any shape with `in` elements a row), `y [.., out]`.
#[derive(Debug)]
pub struct Linear {
    name: String,
    weight: Weight,
    bias: Option<Weight>,
    /// `W shift_out + b` of a packed weight behind quantized activations, made once.
    folded_bias: OnceLock<Option<Tensor>>,
}

impl Linear {
    /// The layer called `name`: `name.weight` and, where the store has it or `bias` demands it,
    /// `name.bias`.
    pub fn new(weights: &Weights, name: &str, bias: bool) -> Result<Self> {
        let weight = weights.get(&format!("{name}.weight"))?.clone();
        let bias = bias.then(|| weights.get(&format!("{name}.bias")).cloned()).transpose()?;
        Ok(Linear { name: name.to_string(), weight, bias, folded_bias: OnceLock::new() })
    }

    /// Runs the layer. Codes on a packed weight are multiplied as integers, anything else as floats.
    pub fn forward(&self, x: &Activation) -> Result<Tensor> {
        if let Expr::Packed(packed) = self.weight.expr() {
            if let Some(y) = self.on_codes(x, packed)? {
                return Ok(y);
            }
        }
        self.forward_float(&x.tensor()?)
    }

    /// Runs the layer on plain floats.
    pub fn forward_float(&self, x: &Tensor) -> Result<Tensor> {
        let bias = self.bias.as_ref().map(Weight::tensor).transpose()?;
        if let Expr::Latent(_) | Expr::Node { .. } = self.weight.expr() {
            // A weight of more than two axes (a convolution over patches) is a matrix row by row.
            let w = self.weight.tensor()?;
            let w = if w.rank() == 2 { w } else { w.flatten_from(1)? };
            return kernels::linear(x, &w, bias.as_ref()).on(&self.name);
        }
        let y = match self.weight.expr() {
            Expr::Dense(w) if w.rank() != 2 => {
                kernels::frozen_matmul(x, &w.flatten_from(1)?).on(&self.name)?
            }
            _ => self.weight.matmul(x)?,
        };
        match bias {
            Some(bias) => kernels::add_bias(&y, &bias).on(&self.name),
            None => Ok(y),
        }
    }

    /// The integer product, where the activation is codes whose step stays out of the sum.
    fn on_codes(&self, x: &Activation, packed: &Packed) -> Result<Option<Tensor>> {
        let Some(codes) = x.codes()? else { return Ok(None) };
        let token_axis = codes.codes.rank().checked_sub(2);
        if codes.axis.is_some() && codes.axis != token_axis {
            return Ok(None);
        }
        let levels = codes.grid.levels();
        let bound = levels.lo.unsigned_abs().max(levels.hi.unsigned_abs());
        let y =
            kernels::packed_codes_matmul(&codes.codes, bound, &codes.step, packed.rows()).on(&self.name)?;
        let bias = match self.folded_bias.get() {
            Some(bias) => bias.clone(),
            None => {
                let bias = self.fold_bias(x, packed)?;
                self.folded_bias.get_or_init(|| bias).clone()
            }
        };
        match bias {
            Some(bias) => kernels::add_bias(&y, &bias).on(&self.name).map(Some),
            None => Ok(Some(y)),
        }
    }

    fn fold_bias(&self, x: &Activation, packed: &Packed) -> Result<Option<Tensor>> {
        let bias = self.bias.as_ref().map(Weight::tensor).transpose()?;
        let Some(shift) = x.shift_out() else { return Ok(bias) };
        let shifted = kernels::packed_matmul(&shift.detach().unsqueeze(0)?, packed.rows())?.squeeze(0)?;
        Ok(Some(match bias {
            Some(bias) => (shifted + bias)?,
            None => shifted,
        }))
    }
}

/// `y = (x - mean) / sqrt(variance + eps) w + b` over the last axis.
#[derive(Debug)]
pub struct LayerNorm {
    name: String,
    weight: Weight,
    bias: Weight,
    eps: f64,
}

impl LayerNorm {
    /// The layer called `name`: `name.weight` and `name.bias`, both `[channels]`.
    pub fn new(weights: &Weights, name: &str, eps: f64) -> Result<Self> {
        let weight = weights.get(&format!("{name}.weight"))?.clone();
        let bias = weights.get(&format!("{name}.bias"))?.clone();
        Ok(LayerNorm { name: name.to_string(), weight, bias, eps })
    }

    /// Runs the layer.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        kernels::layer_norm(x, &self.weight.tensor()?, &self.bias.tensor()?, self.eps).on(&self.name)
    }
}

/// Whether every element of an activation is finite.
pub fn finite(x: &Tensor) -> Result<bool> {
    let sum = x.detach().to_dtype(DType::F64)?.abs()?.sum_all()?.to_scalar::<f64>()?;
    Ok(sum.is_finite())
}
