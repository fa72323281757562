//! Vision transformers: ViT (Dosovitskiy et al. 2021) and DeiT (Touvron et al. 2021), pre-norm blocks,
//! a class token and, in distilled DeiT, a distillation token.
//!
//! Tensor names are those of Hugging Face's `ViTForImageClassification` and `DeiTForImageClassification`.
//! Taps stand where ofq.md 2.4 places activation quantizers, without query-key reparameterization.

use candle_core::Tensor;

use super::nn::{finite, LayerNorm, Linear};
use super::vision::VisionOutput;
use super::vit_config::VitConfig;
use crate::weights::{Granularity, Shifts, Signedness, Site, Tap, Weight, Weights};
use crate::{kernels, Error, On, Result};

const fn site(granularity: Granularity, signedness: Signedness, shifts: Shifts, edge: bool) -> Site {
    Site { granularity, signedness, shifts, edge }
}

/// Input of a linear layer and query: a step for each token.
const TOKEN: Site = site(Granularity::Token, Signedness::Signed, Shifts::InOut, false);
/// Key: as query, but a shift after it would add the same number to all logits of a query, which the
/// softmax removes: there is none to train.
const KEY: Site = site(Granularity::Token, Signedness::Signed, Shifts::In, false);
/// Value: a step for each channel, so that it stays out of the sum over tokens.
const VALUE: Site = site(Granularity::Channel, Signedness::Signed, Shifts::InOut, false);
/// Softmax output: a step for each query token, nothing negative, no shift.
const SOFTMAX: Site = site(Granularity::Token, Signedness::Unsigned, Shifts::None, false);
/// GELU output: unsigned, what is negative clips unless the shift lifts it.
const GELU: Site = site(Granularity::Token, Signedness::Unsigned, Shifts::InOut, false);
/// The image: a step for each colour, shifts for each pixel.
const IMAGE: Site = site(Granularity::Token, Signedness::Data, Shifts::InOut, true);
/// Input of a classifier: one step.
const HEAD: Site = site(Granularity::Tensor, Signedness::Signed, Shifts::InOut, true);

#[derive(Debug)]
struct Head {
    input: Tap,
    linear: Linear,
}

impl Head {
    fn new(weights: &Weights, name: &str) -> Result<Self> {
        Ok(Head {
            input: weights.tap(format!("{name}.input_quant"), HEAD),
            linear: Linear::new(weights, name, true)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.linear.forward(&self.input.forward(x)?)
    }
}

/// Self-attention of a block, without its norm and residual.
#[derive(Debug)]
pub struct Attention {
    input: Tap,
    query: Linear,
    key: Linear,
    value: Linear,
    query_out: Tap,
    key_out: Tap,
    value_out: Tap,
    softmax_out: Tap,
    context: Tap,
    output: Linear,
    heads: usize,
    scale: f64,
}

impl Attention {
    /// The attention of the block called `block` (`vit.encoder.layer.0`).
    pub fn new(weights: &Weights, config: &VitConfig, block: &str) -> Result<Self> {
        let inner = format!("{block}.attention.attention");
        let projection = |part: &str| Linear::new(weights, &format!("{inner}.{part}"), config.qkv_bias);
        let output = format!("{block}.attention.output.dense");
        Ok(Attention {
            input: weights.tap(format!("{inner}.input_quant"), TOKEN),
            query: projection("query")?,
            key: projection("key")?,
            value: projection("value")?,
            query_out: weights.tap(format!("{inner}.query_quant"), TOKEN),
            key_out: weights.tap(format!("{inner}.key_quant"), KEY),
            value_out: weights.tap(format!("{inner}.value_quant"), VALUE),
            softmax_out: weights.tap(format!("{inner}.softmax_quant"), SOFTMAX),
            context: weights.tap(format!("{output}.input_quant"), TOKEN),
            output: Linear::new(weights, &output, true)?,
            heads: config.heads,
            scale: ((config.hidden / config.heads) as f64).powf(-0.5),
        })
    }

    /// `x: [batch, tokens, channels]`, and so the result.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.input.forward(x)?;
        let q = self.query_out.forward(&self.query.forward(&x)?)?.tensor()?;
        let k = self.key_out.forward(&self.key.forward(&x)?)?.tensor()?;
        let v = self.value_out.forward(&self.value.forward(&x)?)?.tensor()?;
        let p = kernels::attention_probs(&q, &k, self.heads, self.scale)?;
        let p = self.softmax_out.forward(&p)?.tensor()?; // [batch, heads, tokens, tokens]
        self.output.forward(&self.context.forward(&kernels::attention_mix(&p, &v, self.heads)?)?)
    }
}

/// The MLP of a block, without its norm and residual.
#[derive(Debug)]
pub struct Mlp {
    up_in: Tap,
    up: Linear,
    down_in: Tap,
    down: Linear,
}

impl Mlp {
    /// The MLP of the block called `block`.
    pub fn new(weights: &Weights, block: &str) -> Result<Self> {
        let (up, down) = (format!("{block}.intermediate.dense"), format!("{block}.output.dense"));
        Ok(Mlp {
            up_in: weights.tap(format!("{up}.input_quant"), TOKEN),
            up: Linear::new(weights, &up, true)?,
            down_in: weights.tap(format!("{down}.input_quant"), GELU),
            down: Linear::new(weights, &down, true)?,
        })
    }

    /// `x: [batch, tokens, channels]`, and so the result.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = kernels::gelu(&self.up.forward(&self.up_in.forward(x)?)?)?;
        self.down.forward(&self.down_in.forward(&x)?)
    }
}

#[derive(Debug)]
struct Block {
    norm_before: LayerNorm,
    attention: Attention,
    norm_after: LayerNorm,
    mlp: Mlp,
}

impl Block {
    fn new(weights: &Weights, config: &VitConfig, name: &str) -> Result<Self> {
        Ok(Block {
            norm_before: LayerNorm::new(weights, &format!("{name}.layernorm_before"), config.eps)?,
            attention: Attention::new(weights, config, name)?,
            norm_after: LayerNorm::new(weights, &format!("{name}.layernorm_after"), config.eps)?,
            mlp: Mlp::new(weights, name)?,
        })
    }

    /// `h: [batch, tokens, channels]`.
    fn forward(&self, h: &Tensor) -> Result<Tensor> {
        let h = (h + self.attention.forward(&self.norm_before.forward(h)?)?)?;
        Ok((&h + self.mlp.forward(&self.norm_after.forward(&h)?)?)?)
    }
}

/// A vision transformer with its classifier.
#[derive(Debug)]
pub struct Vit {
    config: VitConfig,
    image: Tap,
    projection: Linear,
    class_token: Weight,
    distillation_token: Option<Weight>,
    positions: Weight,
    blocks: Vec<Block>,
    norm: LayerNorm,
    head: Head,
    distillation_head: Option<Head>,
}

impl Vit {
    /// Builds the model over `weights`, under Hugging Face's names.
    pub fn new(config: &VitConfig, weights: &Weights) -> Result<Self> {
        config.check()?;
        let prefix = config.prefix();
        let embeddings = format!("{prefix}.embeddings");
        let projection = format!("{embeddings}.patch_embeddings.projection");
        let token = |name: &str| weights.get(&format!("{embeddings}.{name}")).cloned();
        let block = |i| Block::new(weights, config, &format!("{prefix}.encoder.layer.{i}"));
        let head = if config.two_heads { "cls_classifier" } else { "classifier" };
        let distillation_head = config.two_heads.then(|| Head::new(weights, "distillation_classifier"));
        Ok(Vit {
            image: weights.tap(format!("{projection}.input_quant"), IMAGE),
            projection: Linear::new(weights, &projection, true)?,
            class_token: token("cls_token")?,
            distillation_token: config.distilled.then(|| token("distillation_token")).transpose()?,
            positions: token("position_embeddings")?,
            blocks: (0..config.layers).map(block).collect::<Result<_>>()?,
            norm: LayerNorm::new(weights, &format!("{prefix}.layernorm"), config.eps)?,
            head: Head::new(weights, head)?,
            distillation_head: distillation_head.transpose()?,
            config: config.clone(),
        })
    }

    /// The model's sizes.
    pub fn config(&self) -> &VitConfig {
        &self.config
    }

    /// Runs the model on `images [batch, channels, height, width]`, normalised. Another image size than
    /// the model's is an error.
    pub fn forward(&self, images: &Tensor) -> Result<VisionOutput> {
        self.walk(images, &mut |_, _| Ok(()))
    }

    /// The first stage of the model whose output on `images` is not finite.
    pub fn not_finite(&self, images: &Tensor) -> Result<Option<String>> {
        let mut found = None;
        self.walk(images, &mut |stage, h| {
            if found.is_none() && !finite(h)? {
                found = Some(stage.to_string());
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// The names of the taps of a model of these sizes.
    pub fn taps(config: &VitConfig) -> Vec<String> {
        let prefix = config.prefix();
        let mut names = vec![format!("{prefix}.embeddings.patch_embeddings.projection.input_quant")];
        for layer in 0..config.layers {
            let block = format!("{prefix}.encoder.layer.{layer}");
            let inner = ["input", "query", "key", "value", "softmax"];
            names.extend(inner.iter().map(|part| format!("{block}.attention.attention.{part}_quant")));
            let dense = ["attention.output", "intermediate", "output"];
            names.extend(dense.iter().map(|part| format!("{block}.{part}.dense.input_quant")));
        }
        names.extend(config.heads_of_classes().iter().map(|head| format!("{head}.input_quant")));
        names
    }

    /// The forward pass, each stage's output shown to `see` under the stage's name.
    fn walk(
        &self,
        images: &Tensor,
        see: &mut dyn FnMut(&str, &Tensor) -> Result<()>,
    ) -> Result<VisionOutput> {
        let (batch, channels, height, width) = images.dims4().on("images")?;
        let (rows, cols) = self.config.image_size;
        if (channels, height, width) != (self.config.channels, rows, cols) {
            return Err(Error::Run(format!(
                "images: found {channels} x {height} x {width}, expected {} x {rows} x {cols}",
                self.config.channels
            )));
        }
        // A step for each colour and a shift for each pixel: [batch, colours, pixels].
        let flat = images.reshape((batch, channels, height * width))?;
        let images = self.image.forward(&flat)?.tensor()?.reshape(images.shape())?;
        let patches = kernels::patchify(&images, self.config.patch_size)?;
        let patches = self.projection.forward_float(&patches)?;
        let hidden = self.config.hidden;
        let token = |w: &Weight| -> Result<Tensor> {
            Ok(w.tensor()?.reshape((1, 1, hidden))?.broadcast_as((batch, 1, hidden))?)
        };
        let mut parts = vec![token(&self.class_token)?];
        if let Some(distillation) = &self.distillation_token {
            parts.push(token(distillation)?);
        }
        parts.push(patches);
        let positions = self.positions.tensor()?.reshape((self.config.tokens(), hidden))?;
        let mut h = kernels::add_bias(&Tensor::cat(&parts, 1)?, &positions)?;
        let prefix = self.config.prefix();
        see(&format!("{prefix}.embeddings"), &h)?;
        for (i, block) in self.blocks.iter().enumerate() {
            h = block.forward(&h)?;
            see(&format!("{prefix}.encoder.layer.{i}"), &h)?;
        }
        // The norm acts on each token alone, so only the tokens that are read go through it.
        let read = h.narrow(1, 0, 1 + usize::from(self.config.two_heads))?.contiguous()?;
        let read = self.norm.forward(&read)?;
        see(&format!("{prefix}.layernorm"), &read)?;
        let at = |i: usize| -> Result<Tensor> { Ok(read.narrow(1, i, 1)?.squeeze(1)?.contiguous()?) };
        let class = self.head.forward(&at(0)?)?;
        see("the classifier", &class)?;
        let second = self.distillation_head.as_ref();
        Ok(VisionOutput { class, distillation: second.map(|head| head.forward(&at(1)?)).transpose()? })
    }
}
