//! Self-attention as the models share it, with the taps of ofq.md 2.4, in two forms.
//!
//! Where the store has a query and a key, logits are the product of both, each with its quantizer. Where
//! it has their product `qk.weight` (query-key reparameterization, ofq.md 3), the logits of query token n
//! and key token m are `x_n . t_m,h` with `t = x W_qkᵀ`, and where it has a `qk.bias` `[heads * in]`, the
//! query's bias seen from the key side adds `x_m . r_h`.

use candle_core::Tensor;

use super::nn::Linear;
use crate::weights::{Granularity, Shifts, Signedness, Site, Tap, Weight, Weights};
use crate::{kernels, On, Result};

/// A site inside the blocks.
pub(super) const fn site(granularity: Granularity, signedness: Signedness, shifts: Shifts) -> Site {
    Site { granularity, signedness, shifts, groups: 1, edge: false }
}

/// Input of a linear layer and query: a step for each token.
pub(super) const TOKEN: Site = site(Granularity::Token, Signedness::Signed, Shifts::InOut);
/// Key: as query, but a shift after it would add the same number to all logits of a query, which the
/// softmax removes: there is none to train. The same holds for the reparameterized key.
const KEY: Site = site(Granularity::Token, Signedness::Signed, Shifts::In);
/// Value: a step for each channel, so that it stays out of the sum over tokens.
const VALUE: Site = site(Granularity::Channel, Signedness::Signed, Shifts::InOut);
/// Softmax output: a step for each query token, nothing negative, no shift.
const SOFTMAX: Site = site(Granularity::Token, Signedness::Unsigned, Shifts::None);

/// Where the parts of an attention are in a store, and its sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttentionPlace {
    /// Beneath it lie `query`, `key`, `value`, and what is made of them.
    pub inner: String,
    /// The output projection.
    pub output: String,
    /// Width of the input and of query, key and value.
    pub width: usize,
    /// Heads, which share the width evenly.
    pub heads: usize,
    /// Whether query, key and value have biases.
    pub qkv_bias: bool,
}

impl AttentionPlace {
    /// The name of the product of query and key.
    pub fn product(&self) -> String {
        format!("{}.qk.weight", self.inner)
    }

    /// The names of query's and key's weights.
    pub fn factors(&self) -> [String; 2] {
        ["query", "key"].map(|part| format!("{}.{part}.weight", self.inner))
    }

    /// The taps of the attention, where `product` tells whether query and key are one.
    pub fn taps(&self, product: bool) -> Vec<String> {
        let parts: &[&str] = match product {
            true => &["input", "qk", "value", "softmax"],
            false => &["input", "query", "key", "value", "softmax"],
        };
        let mut taps: Vec<String> = parts.iter().map(|p| format!("{}.{p}_quant", self.inner)).collect();
        taps.push(format!("{}.input_quant", self.output));
        taps
    }
}

/// How logits come about.
#[derive(Debug)]
pub(super) enum Scores {
    Separate { query: Box<Linear>, key: Box<Linear>, query_out: Tap, key_out: Tap },
    Product { qk: Box<Linear>, out: Tap, bias: Option<Weight> },
}

/// Self-attention of a block, without its norm and residual.
#[derive(Debug)]
pub struct Attention {
    name: String,
    pub(super) input: Tap,
    pub(super) scores: Scores,
    pub(super) value: Linear,
    pub(super) value_out: Tap,
    pub(super) softmax_out: Tap,
    pub(super) context: Tap,
    pub(super) output: Linear,
    pub(super) heads: usize,
    pub(super) scale: f64,
}

impl Attention {
    /// The attention at `place`.
    pub fn new(weights: &Weights, place: &AttentionPlace) -> Result<Self> {
        let AttentionPlace { inner, output, width, heads, qkv_bias } = place;
        let projection = |part: &str| Linear::new(weights, &format!("{inner}.{part}"), *qkv_bias);
        let tap = |part: &str, site: Site| weights.tap(format!("{inner}.{part}_quant"), site);
        let bias = format!("{inner}.qk.bias");
        let scores = match weights.contains(&place.product()) {
            true => Scores::Product {
                qk: Box::new(Linear::new(weights, &format!("{inner}.qk"), false)?),
                // A step for each token and head.
                out: tap("qk", Site { groups: *heads, ..KEY }),
                bias: weights.contains(&bias).then(|| weights.get(&bias).cloned()).transpose()?,
            },
            false => Scores::Separate {
                query: Box::new(projection("query")?),
                key: Box::new(projection("key")?),
                query_out: tap("query", TOKEN),
                key_out: tap("key", KEY),
            },
        };
        Ok(Attention {
            name: inner.clone(),
            input: tap("input", TOKEN),
            scores,
            value: projection("value")?,
            value_out: tap("value", VALUE),
            softmax_out: tap("softmax", SOFTMAX),
            context: weights.tap(format!("{output}.input_quant"), TOKEN),
            output: Linear::new(weights, output, true)?,
            heads: *heads,
            // The head's size, also where logits are sums over the whole width.
            scale: ((width / heads) as f64).powf(-0.5),
        })
    }

    /// `x: [batch, tokens, channels]`, and so the result; `bias` as in [`kernels::attention_probs`],
    /// `[groups, heads, tokens, tokens]`, is added to the logits.
    pub fn forward(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let x = self.input.forward(x)?;
        let (q, k, own) = match &self.scores {
            Scores::Separate { query, key, query_out, key_out } => {
                let q = query_out.forward(&query.forward(&x)?)?.tensor()?;
                (q, key_out.forward(&key.forward(&x)?)?.tensor()?, None)
            }
            Scores::Product { qk, out, bias } => {
                let t = out.forward(&qk.forward(&x)?)?.tensor()?;
                let x = x.tensor()?;
                let own = bias.as_ref().map(|r| self.key_bias(&x, &r.tensor()?)).transpose()?;
                (x, t, own)
            }
        };
        let v = self.value_out.forward(&self.value.forward(&x)?)?.tensor()?;
        let bias = match (bias, own) {
            (Some(bias), Some(own)) => Some(joined(bias, &own)?),
            (bias, own) => own.or(bias.cloned()),
        };
        let (heads, scale, bias) = (self.heads, self.scale, bias.as_ref());
        let mixed = match self.softmax_out.is_open() {
            true => kernels::attention(&q, &k, &v, heads, scale, bias).on(&self.name)?,
            false => {
                let p = kernels::attention_probs(&q, &k, heads, scale, bias).on(&self.name)?;
                let p = self.softmax_out.forward(&p)?.tensor()?; // [batch, heads, tokens, tokens]
                kernels::attention_mix(&p, &v, heads)?
            }
        };
        self.output.forward(&self.context.forward(&mixed)?)
    }

    /// `scale x_m . r_h` as a bias `[batch, heads, 1, tokens]`.
    fn key_bias(&self, x: &Tensor, r: &Tensor) -> Result<Tensor> {
        let (batch, tokens, width) = x.dims3().on(&self.name)?;
        let r = (r.reshape((self.heads, width)).on(&self.name)? * self.scale)?.to_dtype(x.dtype())?;
        let term = kernels::linear(x, &r, None).on(&self.name)?; // [batch, tokens, heads]
        Ok(term.transpose(1, 2)?.reshape((batch, self.heads, 1, tokens))?)
    }
}

/// A bias of windows and one of batch entries together: `[batch, heads, tokens, tokens]`.
fn joined(windows: &Tensor, entries: &Tensor) -> Result<Tensor> {
    let (groups, heads, n, m) = windows.dims4()?;
    let batch = entries.dim(0)?;
    let entries = entries.reshape((batch / groups.max(1), groups, heads, 1, m))?;
    Ok(entries.broadcast_add(&windows.unsqueeze(0)?)?.reshape((batch, heads, n, m))?)
}

/// The tensors of a model, those of `shapes` with query and key of `places` replaced by their product
/// where `weights` has it.
pub fn with_products(
    shapes: Vec<(String, Vec<usize>)>,
    places: &[AttentionPlace],
    weights: &Weights,
) -> Vec<(String, Vec<usize>)> {
    let reparameterized: Vec<&AttentionPlace> =
        places.iter().filter(|place| weights.contains(&place.product())).collect();
    let factor = |name: &str| {
        let module = name.rsplit_once('.').map(|(module, _)| module).unwrap_or(name);
        reparameterized.iter().any(|place| {
            module.strip_prefix(place.inner.as_str()).is_some_and(|part| part == ".query" || part == ".key")
        })
    };
    let mut kept: Vec<_> = shapes.into_iter().filter(|(name, _)| !factor(name)).collect();
    for place in reparameterized {
        let rows = place.heads * place.width;
        kept.push((place.product(), vec![rows, place.width]));
        let bias = format!("{}.qk.bias", place.inner);
        if weights.contains(&bias) {
            kept.push((bias, vec![rows]));
        }
    }
    kept
}
