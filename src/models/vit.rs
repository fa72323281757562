//! Vision transformers: ViT (Dosovitskiy et al. 2021) and DeiT (Touvron et al. 2021), pre-norm blocks,
//! a class token and, in distilled DeiT, a distillation token.
//!
//! Tensor names are those of Hugging Face's `ViTForImageClassification` and `DeiTForImageClassification`.
//! Taps stand where ofq.md 2.4 places activation quantizers.

use std::sync::OnceLock;

use candle_core::{DType, Device, Storage, Tensor};

use super::attention::{site, Attention, TOKEN};
use super::drop_path::DropPath;
use super::integer::IntegerBlock;
use super::nn::{finite, LayerNorm, Linear};
use super::patches::PatchEmbedding;
use super::vision::VisionOutput;
use super::vit_config::VitConfig;
use crate::kernels::packed::Isa;
use crate::weights::{Granularity, Shifts, Signedness, Site, Tap, Weight, Weights};
use crate::{kernels, Result};

/// GELU output: unsigned, what is negative clips unless the shift lifts it.
const GELU: Site = site(Granularity::Token, Signedness::Unsigned, Shifts::InOut);
/// Input of a classifier: one step.
const HEAD: Site = Site { edge: true, ..site(Granularity::Tensor, Signedness::Signed, Shifts::InOut) };

/// A classifier with the tap of its input.
#[derive(Debug)]
pub(super) struct Head {
    input: Tap,
    linear: Linear,
}

impl Head {
    pub(super) fn new(weights: &Weights, name: &str) -> Result<Self> {
        Ok(Head {
            input: weights.tap(format!("{name}.input_quant"), HEAD),
            linear: Linear::new(weights, name, true)?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.linear.forward(&self.input.forward(x)?)?.to_dtype(DType::F32)?)
    }
}

/// The MLP of a block, without its norm and residual.
#[derive(Debug)]
pub struct Mlp {
    pub(super) up_in: Tap,
    pub(super) up: Linear,
    pub(super) down_in: Tap,
    pub(super) down: Linear,
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
pub(super) struct Block {
    pub(super) norm_before: LayerNorm,
    pub(super) attention: Attention,
    pub(super) norm_after: LayerNorm,
    pub(super) mlp: Mlp,
    width: usize,
    /// The block on integers, where it is one; made when first asked for.
    integer: OnceLock<Option<IntegerBlock>>,
}

impl Block {
    fn new(weights: &Weights, config: &VitConfig, name: &str) -> Result<Self> {
        Ok(Block {
            norm_before: LayerNorm::new(weights, &format!("{name}.layernorm_before"), config.eps)?,
            attention: Attention::new(weights, &config.attention(name))?,
            norm_after: LayerNorm::new(weights, &format!("{name}.layernorm_after"), config.eps)?,
            mlp: Mlp::new(weights, name)?,
            width: config.hidden,
            integer: OnceLock::new(),
        })
    }

    /// The block on integers, where all of it can be, for so many tokens: of a frozen, packed model with quantized
    /// activations.
    fn on_integers(&self, tokens: usize) -> Result<Option<&IntegerBlock>> {
        let block = match self.integer.get() {
            Some(block) => block,
            None => {
                let norms = [&self.norm_before, &self.norm_after];
                let made = IntegerBlock::of(norms, &self.attention, &self.mlp, self.width, Isa::best())?;
                self.integer.get_or_init(|| made)
            }
        };
        Ok(block.as_ref().filter(|block| block.takes(tokens)))
    }

    /// `h: [batch, tokens, channels]`; `drop` acts on what each branch adds.
    pub(super) fn forward(&self, h: &Tensor, drop: impl Fn(Tensor, u64) -> Result<Tensor>) -> Result<Tensor> {
        let h = kernels::add(h, &drop(self.attention.forward(&self.norm_before.forward(h)?, None)?, 0)?)?;
        let branch = drop(self.mlp.forward(&self.norm_after.forward(&h)?)?, 1)?;
        Ok(kernels::add(&h, &branch)?)
    }
}

/// A vision transformer with its classifier.
#[derive(Debug)]
pub struct Vit {
    config: VitConfig,
    patches: PatchEmbedding,
    class_token: Weight,
    distillation_token: Option<Weight>,
    positions: Weight,
    pub(super) blocks: Vec<Block>,
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
        let patches = format!("{embeddings}.patch_embeddings.projection");
        let (size, channels, patch) = (config.image_size, config.channels, config.patch_size);
        let token = |name: &str| weights.get(&format!("{embeddings}.{name}")).cloned();
        let block = |i| Block::new(weights, config, &format!("{prefix}.encoder.layer.{i}"));
        let head = if config.two_heads { "cls_classifier" } else { "classifier" };
        let distillation_head = config.two_heads.then(|| Head::new(weights, "distillation_classifier"));
        Ok(Vit {
            patches: PatchEmbedding::new(weights, &patches, size, channels, patch)?,
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
        // On a thread of the pool: from outside of it each of the many short parallel parts would wake it anew.
        let walk = || self.walk(images, None, true, &mut |_, _| Ok(()));
        match images.device().is_cpu() {
            true => rayon::scope(|_| walk()),
            false => walk(),
        }
    }

    /// As [`Vit::forward`], in training: residual branches are left out as `drop` draws it.
    pub fn train(&self, images: &Tensor, drop: Option<&DropPath>) -> Result<VisionOutput> {
        self.walk(images, drop, false, &mut |_, _| Ok(()))
    }

    /// The first stage of the model whose output on `images` is not finite.
    pub fn not_finite(&self, images: &Tensor) -> Result<Option<String>> {
        let mut found = None;
        self.walk(images, None, false, &mut |stage, h| {
            if found.is_none() && !finite(h)? {
                found = Some(stage.to_string());
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// The names of the taps of a model of these sizes over `weights`.
    pub fn taps(config: &VitConfig, weights: &Weights) -> Vec<String> {
        let prefix = config.prefix();
        let mut names =
            vec![PatchEmbedding::tap(&format!("{prefix}.embeddings.patch_embeddings.projection"))];
        for (layer, place) in config.attentions().iter().enumerate() {
            names.extend(place.taps(weights.contains(&place.product())));
            let block = format!("{prefix}.encoder.layer.{layer}");
            names.extend(["intermediate", "output"].map(|part| format!("{block}.{part}.dense.input_quant")));
        }
        names.extend(config.heads_of_classes().iter().map(|head| format!("{head}.input_quant")));
        names
    }

    /// As many blocks from `first` on as can go on integers, and their output for `h: [batch, tokens, channels]`; none
    /// where not one can.
    fn on_integers(&self, first: usize, h: &Tensor) -> Result<Option<(usize, Tensor)>> {
        if h.dtype() != DType::F32 || !h.device().is_cpu() || h.track_op() {
            return Ok(None);
        }
        let (_, tokens, _) = h.dims3()?;
        let mut blocks = Vec::new();
        for block in &self.blocks[first..] {
            let Some(block) = block.on_integers(tokens)? else { break };
            blocks.push(block);
        }
        let h = h.contiguous()?;
        let (storage, layout) = h.storage_and_layout();
        let (false, Storage::Cpu(storage), Some((from, to))) =
            (blocks.is_empty(), &*storage, layout.contiguous_offsets())
        else {
            return Ok(None);
        };
        let x = &storage.as_slice::<f32>()?[from..to];
        // Codes have no NaN: what is not a number shows on the road of floats. It stays in the residual stream to the end.
        let finite = |values: &[f32]| values.iter().all(|v| v.is_finite());
        if !finite(x) {
            return Ok(None);
        }
        let y = IntegerBlock::forward(&blocks, x, tokens, &|_, _, _| {});
        if !finite(&y) {
            return Ok(None);
        }
        Ok(Some((blocks.len(), Tensor::from_vec(y, layout.shape(), &Device::Cpu)?)))
    }

    /// The forward pass, each stage's output shown to `see` under the stage's name; blocks that can be go on
    /// integers where `integers` says so.
    fn walk(
        &self,
        images: &Tensor,
        drop: Option<&DropPath>,
        integers: bool,
        see: &mut dyn FnMut(&str, &Tensor) -> Result<()>,
    ) -> Result<VisionOutput> {
        let patches = self.patches.forward(images)?;
        let batch = patches.dim(0)?;
        let hidden = self.config.hidden;
        let token = |w: &Weight| -> Result<Tensor> {
            let w = w.tensor()?.to_dtype(patches.dtype())?;
            Ok(w.reshape((1, 1, hidden))?.broadcast_as((batch, 1, hidden))?)
        };
        let mut parts = vec![token(&self.class_token)?];
        if let Some(distillation) = &self.distillation_token {
            parts.push(token(distillation)?);
        }
        let positions = self.positions.tensor()?.to_dtype(patches.dtype())?;
        let positions = positions.reshape((self.config.tokens(), hidden))?;
        parts.push(patches);
        let mut h = kernels::add_bias(&Tensor::cat(&parts, 1)?, &positions)?;
        let prefix = self.config.prefix();
        see(&format!("{prefix}.embeddings"), &h)?;
        let mut i = 0;
        while i < self.blocks.len() {
            match if integers { self.on_integers(i, &h)? } else { None } {
                Some((count, out)) => (i, h) = (i + count, out),
                None => {
                    h = self.blocks[i].forward(&h, |x, branch| match drop {
                        None => Ok(x),
                        Some(drop) => drop.apply(&x, i, self.blocks.len(), branch),
                    })?;
                    i += 1;
                }
            }
            see(&format!("{prefix}.encoder.layer.{}", i - 1), &h)?;
        }
        // The norm acts on each token alone, so only the tokens that are read go through it.
        let read = h.narrow(1, 0, 1 + usize::from(self.config.two_heads))?.contiguous()?;
        let read = self.norm.forward(&read)?;
        see(&format!("{prefix}.layernorm"), &read)?;
        let at = |i: usize| -> Result<Tensor> { Ok(read.narrow(1, i, 1)?.squeeze(1)?.contiguous()?) };
        let class = self.head.forward(&at(0)?)?;
        see("the classifier", &class)?;
        let second = self.distillation_head.as_ref();
        let distillation = second.map(|head| head.forward(&at(1)?)).transpose()?;
        Ok(VisionOutput { class, distillation, variance: None })
    }
}
