//! A vision model of any architecture: what the rest of the program knows of it.

use std::path::Path;

use candle_core::Tensor;
use serde_json::Value;

use super::attention::AttentionPlace;
use super::drop_path::DropPath;
use super::vit::Vit;
use super::vit_config::VitConfig;
use crate::weights::Weights;
use crate::Result;

/// Sizes and labels of a vision model.
#[derive(Clone, Debug, PartialEq)]
pub enum VisionConfig {
    /// ViT or DeiT.
    Vit(VitConfig),
}

impl VisionConfig {
    /// Reads a Hugging Face configuration by its model type. `path` is for error messages.
    ///
    /// Errs as the architecture's own reading does.
    pub fn from_hf(path: &Path, json: &Value) -> Result<Self> {
        VitConfig::from_hf(path, json).map(VisionConfig::Vit)
    }

    /// The configuration as transformers reads it.
    pub fn to_hf(&self) -> Value {
        match self {
            VisionConfig::Vit(vit) => vit.to_hf(),
        }
    }

    /// The label of each class id.
    pub fn classes(&self) -> &[String] {
        match self {
            VisionConfig::Vit(vit) => &vit.classes,
        }
    }

    /// Height and width of the input, in pixels.
    pub fn image_size(&self) -> (usize, usize) {
        match self {
            VisionConfig::Vit(vit) => vit.image_size,
        }
    }

    /// Channels of the input: 3 for RGB.
    pub fn channels(&self) -> usize {
        match self {
            VisionConfig::Vit(vit) => vit.channels,
        }
    }

    /// Every tensor the model needs, by canonical name and shape, in order from input to output.
    pub fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        match self {
            VisionConfig::Vit(vit) => vit.shapes(),
        }
    }

    /// Parameters of the model.
    pub fn params(&self) -> usize {
        self.shapes().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }

    /// How deep the parameter called `name` lies, and how deep the classifier does: 0 is the embedding, then
    /// come the blocks in order, then everything behind them.
    pub fn depth(&self, name: &str) -> (usize, usize) {
        let (blocks, embedding): (Vec<String>, String) = match self {
            VisionConfig::Vit(vit) => {
                let prefix = vit.prefix();
                let block = |i| format!("{prefix}.encoder.layer.{i}.");
                ((0..vit.layers).map(block).collect(), format!("{prefix}.embeddings."))
            }
        };
        let last = blocks.len() + 1;
        let block = blocks.iter().position(|block| name.starts_with(block.as_str()));
        (block.map(|i| i + 1).unwrap_or(if name.starts_with(&embedding) { 0 } else { last }), last)
    }

    /// The attentions of all blocks, from input to output.
    pub fn attentions(&self) -> Vec<AttentionPlace> {
        match self {
            VisionConfig::Vit(vit) => vit.attentions(),
        }
    }

    /// The names of the taps of the model over `weights`.
    pub fn taps(&self, weights: &Weights) -> Vec<String> {
        match self {
            VisionConfig::Vit(vit) => Vit::taps(vit, weights),
        }
    }

    /// Builds the model over `weights`.
    pub fn build(&self, weights: &Weights) -> Result<VisionModel> {
        match self {
            VisionConfig::Vit(vit) => Vit::new(vit, weights).map(VisionModel::Vit),
        }
    }
}

/// What a model says of a batch: logits `[batch, classes]`.
#[derive(Debug)]
pub struct VisionOutput {
    /// Of the class token, or of the mean over the image where there is none.
    pub class: Tensor,
    /// Of the distillation token, where the model has a head for it.
    pub distillation: Option<Tensor>,
}

impl VisionOutput {
    /// The answer at inference: the mean of the heads.
    pub fn logits(&self) -> Result<Tensor> {
        match &self.distillation {
            None => Ok(self.class.clone()),
            Some(distillation) => Ok(((&self.class + distillation)? * 0.5)?),
        }
    }
}

/// A vision model with its classifier.
#[derive(Debug)]
pub enum VisionModel {
    /// ViT or DeiT.
    Vit(Vit),
}

impl VisionModel {
    /// Runs the model on `images [batch, channels, height, width]`, normalised. Another image size than
    /// the model's is an error.
    pub fn forward(&self, images: &Tensor) -> Result<VisionOutput> {
        match self {
            VisionModel::Vit(vit) => vit.forward(images),
        }
    }

    /// As [`VisionModel::forward`], in training: residual branches are left out as `drop` draws it.
    pub fn train(&self, images: &Tensor, drop: Option<&DropPath>) -> Result<VisionOutput> {
        match self {
            VisionModel::Vit(vit) => vit.train(images, drop),
        }
    }

    /// The first stage of the model whose output on `images` is not finite.
    pub fn not_finite(&self, images: &Tensor) -> Result<Option<String>> {
        match self {
            VisionModel::Vit(vit) => vit.not_finite(images),
        }
    }
}
