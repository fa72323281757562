//! Swin transformers (Liu et al. 2021): attention within windows that every second block shifts, with a
//! bias for the offset of two patches; maps of half the sides and twice the channels from stage to stage.
//!
//! Tensor names are those of Hugging Face's `SwinForImageClassification` before transformers 5. Taps stand
//! where ofq.md 2.3 and 2.4 place them: inside the attention a step for each place in the window, before
//! the MLP's layers and a reduction one for each column of the map, `[B, rows, columns, channels]`.

use candle_core::Tensor;

use super::attention::{Attention, TOKEN};
use super::nn::{finite, LayerNorm, Linear};
use super::patches::PatchEmbedding;
use super::swin_config::{Stage, SwinConfig};
use super::vision::VisionOutput;
use super::vit::{Head, Mlp};
use super::windows::{relative_positions, Windows};
use crate::weights::{Tap, Weight, Weights};
use crate::Result;

/// Of the norms behind the patch embedding and in patch merging, which no configuration sets.
const EPS: f64 = 1e-5;

const PATCHES: &str = "swin.embeddings.patch_embeddings.projection";

/// What is added to the attention logits: a learned number for each head and offset of two patches, and,
/// in shifted blocks, the mask.
#[derive(Debug)]
struct PositionBias {
    table: Weight,
    positions: Tensor,
    mask: Option<Tensor>,
    patches: usize,
}

impl PositionBias {
    fn new(weights: &Weights, name: &str, stage: &Stage, windows: &Windows) -> Result<Self> {
        let table = weights.get(&format!("{name}.relative_position_bias_table"))?.clone();
        let device = table.tensor()?.device().clone();
        let positions = Tensor::new(relative_positions(stage.window), &device)?;
        Ok(PositionBias { table, positions, mask: windows.mask(&device)?, patches: windows.patches() })
    }

    /// `[windows of an image or 1, heads, patches, patches]`.
    fn tensor(&self) -> Result<Tensor> {
        let table = self.table.tensor()?;
        let (n, heads) = (self.patches, table.dim(1)?);
        let bias = table.index_select(&self.positions, 0)?.reshape((n, n, heads))?;
        let bias = bias.permute((2, 0, 1))?.contiguous()?.unsqueeze(0)?;
        match &self.mask {
            Some(mask) => Ok(bias.broadcast_add(mask)?),
            None => Ok(bias),
        }
    }
}

#[derive(Debug)]
struct Block {
    norm_before: LayerNorm,
    windows: Windows,
    bias: PositionBias,
    attention: Attention,
    norm_after: LayerNorm,
    mlp: Mlp,
}

impl Block {
    fn new(weights: &Weights, config: &SwinConfig, stage: &Stage, name: &str, index: usize) -> Result<Self> {
        let windows = stage.windows(index);
        let place = config.attention(stage, name);
        Ok(Block {
            norm_before: LayerNorm::new(weights, &format!("{name}.layernorm_before"), config.eps)?,
            bias: PositionBias::new(weights, &place.inner, stage, &windows)?,
            attention: Attention::new(weights, &place)?,
            windows,
            norm_after: LayerNorm::new(weights, &format!("{name}.layernorm_after"), config.eps)?,
            mlp: Mlp::new(weights, name)?,
        })
    }

    /// `h: [batch, rows, columns, channels]`.
    fn forward(&self, h: &Tensor) -> Result<Tensor> {
        let x = self.windows.partition(&self.norm_before.forward(h)?)?;
        let x = self.attention.forward(&x, Some(&self.bias.tensor()?))?;
        let h = (h + self.windows.merge(&x)?)?;
        Ok((&h + self.mlp.forward(&self.norm_after.forward(&h)?)?)?)
    }
}

/// Patch merging: four neighbours side by side, normalised, reduced to twice the channels of one.
#[derive(Debug)]
struct Merging {
    norm: LayerNorm,
    input: Tap,
    reduction: Linear,
}

impl Merging {
    fn new(weights: &Weights, name: &str) -> Result<Self> {
        let reduction = format!("{name}.reduction");
        Ok(Merging {
            norm: LayerNorm::new(weights, &format!("{name}.norm"), EPS)?,
            input: weights.tap(format!("{reduction}.input_quant"), TOKEN),
            reduction: Linear::new(weights, &reduction, false)?,
        })
    }

    /// `[batch, rows, columns, channels]` to `[batch, rows / 2, columns / 2, 2 channels]`; odd sides are
    /// padded with zeros.
    fn forward(&self, h: &Tensor) -> Result<Tensor> {
        self.reduction.forward(&self.input.forward(&self.norm.forward(&neighbours(h)?)?)?)
    }
}

/// Squares of four patches, their channels in the order top left, bottom left, top right, bottom right.
fn neighbours(h: &Tensor) -> Result<Tensor> {
    let (_, rows, cols, _) = h.dims4()?;
    let h = h.pad_with_zeros(1, 0, rows % 2)?.pad_with_zeros(2, 0, cols % 2)?;
    let (batch, rows, cols, channels) = h.dims4()?;
    let h = h.reshape(&[batch, rows / 2, 2, cols / 2, 2, channels][..])?;
    let h = h.permute(vec![0, 1, 3, 4, 2, 5])?.contiguous()?; // [batch, rows, columns, right, below, channels]
    Ok(h.reshape((batch, rows / 2, cols / 2, 4 * channels))?)
}

/// A Swin transformer with its classifier.
#[derive(Debug)]
pub struct Swin {
    config: SwinConfig,
    patches: PatchEmbedding,
    norm: LayerNorm,
    stages: Vec<(Vec<Block>, Option<Merging>)>,
    last_norm: LayerNorm,
    head: Head,
}

impl Swin {
    /// Builds the model over `weights`, under Hugging Face's names.
    pub fn new(config: &SwinConfig, weights: &Weights) -> Result<Self> {
        config.check()?;
        let sizes = config.stages();
        let mut stages = Vec::with_capacity(sizes.len());
        for (s, stage) in sizes.iter().enumerate() {
            let name = format!("swin.encoder.layers.{s}");
            let block = |b| Block::new(weights, config, stage, &format!("{name}.blocks.{b}"), b);
            let blocks = (0..stage.blocks).map(block).collect::<Result<_>>()?;
            let last = s + 1 == sizes.len();
            let merging = (!last).then(|| Merging::new(weights, &format!("{name}.downsample")));
            stages.push((blocks, merging.transpose()?));
        }
        let (size, channels, patch) = (config.image_size, config.channels, config.patch_size);
        Ok(Swin {
            patches: PatchEmbedding::new(weights, PATCHES, size, channels, patch)?,
            norm: LayerNorm::new(weights, "swin.embeddings.norm", EPS)?,
            stages,
            last_norm: LayerNorm::new(weights, "swin.layernorm", config.eps)?,
            head: Head::new(weights, "classifier")?,
            config: config.clone(),
        })
    }

    /// The model's sizes.
    pub fn config(&self) -> &SwinConfig {
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

    /// The names of the taps of a model of these sizes over `weights`.
    pub fn taps(config: &SwinConfig, weights: &Weights) -> Vec<String> {
        let mut names = vec![PatchEmbedding::tap(PATCHES)];
        let stages = config.stages();
        for (s, stage) in stages.iter().enumerate() {
            for b in 0..stage.blocks {
                let block = format!("swin.encoder.layers.{s}.blocks.{b}");
                let place = config.attention(stage, &block);
                names.extend(place.taps(weights.contains(&place.product())));
                names.extend(
                    ["intermediate", "output"].map(|part| format!("{block}.{part}.dense.input_quant")),
                );
            }
            if s + 1 < stages.len() {
                names.push(format!("swin.encoder.layers.{s}.downsample.reduction.input_quant"));
            }
        }
        names.push("classifier.input_quant".into());
        names
    }

    /// The forward pass, each stage's output shown to `see` under the stage's name.
    fn walk(
        &self,
        images: &Tensor,
        see: &mut dyn FnMut(&str, &Tensor) -> Result<()>,
    ) -> Result<VisionOutput> {
        let patches = self.patches.forward(images)?;
        let (batch, _, embed) = patches.dims3()?;
        let (height, width) = self.config.image_size;
        let side = self.config.patch_size;
        let mut h = self.norm.forward(&patches)?.reshape((batch, height / side, width / side, embed))?;
        see("swin.embeddings", &h)?;
        for (s, (blocks, merging)) in self.stages.iter().enumerate() {
            for (b, block) in blocks.iter().enumerate() {
                let name = format!("swin.encoder.layers.{s}.blocks.{b}");
                h = block.forward(&h)?;
                see(&name, &h)?;
            }
            if let Some(merging) = merging {
                h = merging.forward(&h)?;
                see(&format!("swin.encoder.layers.{s}.downsample"), &h)?;
            }
        }
        let h = self.last_norm.forward(&h)?;
        see("swin.layernorm", &h)?;
        let class = self.head.forward(&h.flatten(1, 2)?.mean(1)?)?;
        see("the classifier", &class)?;
        Ok(VisionOutput { class, distillation: None })
    }
}
