//! The layers that models are made of: they hold [`Weight`]s, so whatever a weight is made of, the
//! layer's code is the same.

use std::sync::OnceLock;

use candle_core::{DType, Tensor};

use crate::kernels::packed::{CodeMatrix, Isa};
use crate::weights::{half_on_cuda, Activation, Expr, Granularity, Packed, Weight, Weights};
use crate::{kernels, Error, On, Result};

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

    /// A layer without a bias over a weight that is another layer's too.
    pub fn of(name: &str, weight: Weight) -> Self {
        Linear { name: name.to_string(), weight, bias: None, folded_bias: OnceLock::new() }
    }

    /// Whether there is a trainable in its weight.
    pub fn trains(&self) -> bool {
        !self.weight.params().is_empty()
    }

    /// The operands of the layer's product on `x`, both of the weight's type, where it is one with a dense matrix and
    /// nothing else.
    pub fn dense_product(&self, x: &Tensor) -> Result<Option<(Tensor, Tensor)>> {
        if self.bias.is_some() {
            return Ok(None);
        }
        Ok(match self.weight.expr() {
            Expr::Dense(w) if w.rank() == 2 && w.dtype() == x.dtype() => Some((x.clone(), w.detach())),
            Expr::Latent(w) if w.rank() == 2 => Some((x.to_dtype(w.dtype())?, w.as_tensor().clone())),
            _ => None,
        })
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
        let whole = match self.weight.expr() {
            Expr::Latent(_) => true,
            // An adapter has a product of its own; a quantizer builds its weight.
            Expr::Node { .. } => self.weight.grid().is_some() || self.weight.shape()?.len() != 2,
            _ => false,
        };
        if whole {
            // A weight of more than two axes (a convolution over patches) is a matrix row by row.
            let w = self.weight.tensor()?;
            let w = if w.rank() == 2 { w } else { w.flatten_from(1)? };
            // What is trained is held in f32, whatever the activations are.
            let dtype = if half_on_cuda(x) { x.dtype() } else { w.dtype() };
            let (w, bias) = (w.to_dtype(dtype)?, bias.map(|bias| bias.to_dtype(dtype)).transpose()?);
            let y = kernels::linear(&x.to_dtype(dtype)?, &w, bias.as_ref()).on(&self.name)?;
            return Ok(y.to_dtype(x.dtype())?);
        }
        let y = match self.weight.expr() {
            Expr::Dense(w) if w.rank() != 2 => {
                kernels::frozen_matmul(x, &w.flatten_from(1)?.to_dtype(x.dtype())?).on(&self.name)?
            }
            _ => self.weight.matmul(x)?,
        };
        match bias {
            Some(bias) => kernels::add_bias(&y, &bias.to_dtype(y.dtype())?).on(&self.name),
            None => Ok(y),
        }
    }

    /// The integer product, where the activation is codes whose step stays out of the sum.
    fn on_codes(&self, x: &Activation, packed: &Packed) -> Result<Option<Tensor>> {
        if let Some(y) = self.rounded(x, packed)? {
            return Ok(Some(y));
        }
        let Some(codes) = x.codes()? else { return Ok(None) };
        let token_axis = codes.codes.rank().checked_sub(2);
        if codes.axis.is_some() && codes.axis != token_axis {
            return Ok(None);
        }
        let levels = codes.grid.levels();
        let bound = levels.lo.unsigned_abs().max(levels.hi.unsigned_abs());
        let y =
            kernels::packed_codes_matmul(&codes.codes, bound, &codes.step, packed.rows()).on(&self.name)?;
        let y = match self.folded(x, packed)? {
            Some(bias) => kernels::add_bias(&y, &bias).on(&self.name)?,
            None => y,
        };
        Ok(Some(y.to_dtype(x.seen().dtype())?))
    }

    /// The same, the activation rounded on the way into the product.
    fn rounded(&self, x: &Activation, packed: &Packed) -> Result<Option<Tensor>> {
        let Some(rule) = x.grid_rule()? else { return Ok(None) };
        let by_token = matches!(rule.granularity, Granularity::Token | Granularity::Tensor);
        if !by_token || rule.groups != 1 || x.seen().rank() < 2 {
            return Ok(None);
        }
        // Another number of tokens is refused where the quantizer itself runs.
        let tokens = x.seen().dim(x.seen().rank() - 2)?;
        if rule.granularity == Granularity::Token && rule.step.elem_count() != tokens {
            return Ok(None);
        }
        let rounding =
            kernels::Rounding { step: rule.step, shift: rule.shift_in, levels: rule.grid.levels() };
        let bias = self.folded(x, packed)?;
        kernels::packed_quantized_matmul(x.seen(), rounding, packed.rows(), bias.as_ref()).on(&self.name)
    }

    /// The bias, with what the quantizer before the layer adds behind its codes.
    fn folded(&self, x: &Activation, packed: &Packed) -> Result<Option<Tensor>> {
        if let Some(bias) = self.folded_bias.get() {
            return Ok(bias.clone());
        }
        let bias = self.fold_bias(x.shift_out(), packed)?;
        Ok(self.folded_bias.get_or_init(|| bias).clone())
    }

    /// The codes of a packed weight, for activations with codes in a range, and the layer's bias, what a quantizer before it adds behind its codes
    /// folded in; none where the weight is not packed, or not for integer products, or the bias is trained.
    pub(super) fn on_integers(
        &self,
        shift_out: Option<&[f32]>,
        codes: (i32, i32),
        isa: Isa,
    ) -> Result<Option<(CodeMatrix, Vec<f32>)>> {
        let Expr::Packed(packed) = self.weight.expr() else { return Ok(None) };
        let matrix = CodeMatrix::packed(packed.rows(), codes, isa);
        let fits = |shift: &[f32]| shift.len() == packed.rows().cols;
        let trained = self.bias.as_ref().is_some_and(|bias| !bias.params().is_empty());
        let (Some(matrix), true, false) =
            (matrix, packed.device().is_cpu() && shift_out.is_none_or(fits), trained)
        else {
            return Ok(None);
        };
        let shift = shift_out.map(|s| Tensor::from_slice(s, s.len(), packed.device())).transpose()?;
        let bias = match self.fold_bias(shift, packed)? {
            Some(bias) => bias.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?,
            None => vec![0.0; matrix.rows()],
        };
        Ok(Some((matrix, bias)))
    }

    fn fold_bias(&self, shift_out: Option<Tensor>, packed: &Packed) -> Result<Option<Tensor>> {
        let bias = self.bias.as_ref().map(Weight::tensor).transpose()?;
        let Some(shift) = shift_out else { return Ok(bias) };
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

    /// Weight, bias and what is added to the variance.
    pub(super) fn parts(&self) -> (&Weight, &Weight, f64) {
        (&self.weight, &self.bias, self.eps)
    }

    /// Runs the layer, in the number format of `x`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (w, b) = (self.weight.tensor()?.to_dtype(x.dtype())?, self.bias.tensor()?.to_dtype(x.dtype())?);
        kernels::layer_norm(x, &w, &b, self.eps).on(&self.name)
    }
}

/// `y = x / sqrt(mean x^2 + eps) w` over the last axis.
#[derive(Debug)]
pub struct RmsNorm {
    name: String,
    weight: Weight,
    eps: f64,
}

impl RmsNorm {
    /// The layer called `name`: `name.weight`, `[channels]`.
    pub fn new(weights: &Weights, name: &str, eps: f64) -> Result<Self> {
        let weight = weights.get(&format!("{name}.weight"))?.clone();
        Ok(RmsNorm { name: name.to_string(), weight, eps })
    }

    /// Runs the layer: in the wider of the two number formats, the result in that of `x`. On a CUDA device in that of
    /// `x`, of which the kernel computes in f32.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let w = self.weight.tensor()?;
        if w.dtype() == x.dtype() || half_on_cuda(x) {
            return kernels::rms_norm(x, &w.to_dtype(x.dtype())?, self.eps).on(&self.name);
        }
        let y = kernels::rms_norm(&x.to_dtype(DType::F32)?, &w.to_dtype(DType::F32)?, self.eps);
        Ok(y.on(&self.name)?.to_dtype(x.dtype())?)
    }
}

/// Rows of a table by token.
#[derive(Debug)]
pub struct Embedding {
    name: String,
    weight: Weight,
}

impl Embedding {
    /// The table called `name`: `name.weight`, `[tokens, channels]`.
    pub fn new(weights: &Weights, name: &str) -> Result<Self> {
        let weight = weights.get(&format!("{name}.weight"))?.clone();
        Ok(Embedding { name: name.to_string(), weight })
    }

    /// The rows of `ids` (u32, any shape), `[.., channels]`.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        self.weight.rows(ids).map_err(|e| match e {
            Error::Candle(source) => Error::On { name: self.name.clone(), source },
            other => other,
        })
    }
}

/// What a model is given, in the number format of its activations: bf16 on a CUDA device where products are, else as it
/// is. Weights, their gradients and the loss stay f32.
pub fn activations(x: &Tensor) -> Result<Tensor> {
    match x.device().is_cuda() && kernels::arithmetic() == kernels::Arithmetic::Bf16 {
        true => Ok(x.to_dtype(DType::BF16)?),
        false => Ok(x.clone()),
    }
}

/// Whether every element of an activation is finite.
pub fn finite(x: &Tensor) -> Result<bool> {
    let sum = x.detach().to_dtype(DType::F64)?.abs()?.sum_all()?.to_scalar::<f64>()?;
    Ok(sum.is_finite())
}
