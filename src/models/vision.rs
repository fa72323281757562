//! A vision model of any architecture: what the rest of the program knows of it.

use std::path::Path;

use candle_core::Tensor;
use serde_json::Value;

use super::attention::AttentionPlace;
use super::binary::Binary;
use super::binary_config::{is_binary, BinaryConfig};
use super::convnet::ConvNet;
use super::convnet_config::{is_conv, ConvConfig};
use super::drop_path::DropPath;
use super::swin::Swin;
use super::swin_config::SwinConfig;
use super::vit::Vit;
use super::vit_config::VitConfig;
use crate::weights::Weights;
use crate::Result;

/// Sizes and labels of a vision model.
#[derive(Clone, Debug, PartialEq)]
pub enum VisionConfig {
    /// ViT or DeiT.
    Vit(VitConfig),
    /// Swin.
    Swin(SwinConfig),
    /// The convolutional classifier.
    Conv(ConvConfig),
    /// A perceptron of one-bit weights.
    Binary(BinaryConfig),
}

impl VisionConfig {
    /// Reads a Hugging Face configuration by its model type. `path` is for error messages.
    ///
    /// Errs as the architecture's own reading does.
    pub fn from_hf(path: &Path, json: &Value) -> Result<Self> {
        if is_conv(json) {
            return ConvConfig::from_hf(path, json).map(VisionConfig::Conv);
        }
        if is_binary(json) {
            return BinaryConfig::from_hf(path, json).map(VisionConfig::Binary);
        }
        match is_swin(json) {
            true => SwinConfig::from_hf(path, json).map(VisionConfig::Swin),
            false => VitConfig::from_hf(path, json).map(VisionConfig::Vit),
        }
    }

    /// The configuration as transformers reads it.
    pub fn to_hf(&self) -> Value {
        match self {
            VisionConfig::Vit(vit) => vit.to_hf(),
            VisionConfig::Swin(swin) => swin.to_hf(),
            VisionConfig::Conv(conv) => conv.to_hf(),
            VisionConfig::Binary(binary) => binary.to_hf(),
        }
    }

    /// The label of each class id.
    pub fn classes(&self) -> &[String] {
        match self {
            VisionConfig::Vit(vit) => &vit.classes,
            VisionConfig::Swin(swin) => &swin.classes,
            VisionConfig::Conv(conv) => &conv.classes,
            VisionConfig::Binary(binary) => &binary.classes,
        }
    }

    /// Height and width of the input, in pixels.
    pub fn image_size(&self) -> (usize, usize) {
        match self {
            VisionConfig::Vit(vit) => vit.image_size,
            VisionConfig::Swin(swin) => swin.image_size,
            VisionConfig::Conv(conv) => conv.image_size,
            VisionConfig::Binary(binary) => binary.image_size,
        }
    }

    /// Channels of the input: 3 for RGB.
    pub fn channels(&self) -> usize {
        match self {
            VisionConfig::Vit(vit) => vit.channels,
            VisionConfig::Swin(swin) => swin.channels,
            VisionConfig::Conv(conv) => conv.channels,
            VisionConfig::Binary(binary) => binary.channels,
        }
    }

    /// Every tensor the model needs, by canonical name and shape, in order from input to output.
    pub fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        match self {
            VisionConfig::Vit(vit) => vit.shapes(),
            VisionConfig::Swin(swin) => swin.shapes(),
            VisionConfig::Conv(conv) => conv.shapes(),
            VisionConfig::Binary(binary) => binary.shapes(),
        }
    }

    /// Parameters of the model.
    pub fn params(&self) -> usize {
        self.shapes().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }

    /// How deep the parameter called `name` lies, and how deep the classifier does: 0 is the embedding, then
    /// come the blocks in order, then everything behind them. Patch merging is as deep as the block before.
    pub fn depth(&self, name: &str) -> (usize, usize) {
        let (modules, embedding): (Vec<(String, usize)>, String) = match self {
            VisionConfig::Vit(vit) => {
                let prefix = vit.prefix();
                let block = |i| (format!("{prefix}.encoder.layer.{i}."), i + 1);
                ((0..vit.layers).map(block).collect(), format!("{prefix}.embeddings."))
            }
            VisionConfig::Swin(swin) => {
                let (mut modules, mut depth) = (Vec::new(), 0);
                for (s, blocks) in swin.depths.iter().enumerate() {
                    let stage = format!("swin.encoder.layers.{s}");
                    modules.extend((0..*blocks).map(|b| (format!("{stage}.blocks.{b}."), depth + b + 1)));
                    depth += blocks;
                    modules.push((format!("{stage}.downsample."), depth));
                }
                (modules, "swin.embeddings.".into())
            }
            // The first convolution is the embedding, the hidden layer the last block.
            VisionConfig::Conv(conv) => {
                let layers = conv.widths.len();
                let mut modules: Vec<_> = (1..layers).map(|i| (format!("conv.{i}."), i)).collect();
                modules.push(("fc.".into(), layers));
                (modules, "conv.0.".into())
            }
            VisionConfig::Binary(binary) => {
                let layers = 1..binary.hidden.len();
                (layers.map(|i| (format!("layers.{i}."), i)).collect(), "layers.0.".into())
            }
        };
        let last = 1 + modules.iter().map(|module| module.1).max().unwrap_or(0);
        let within = modules.iter().find(|module| name.starts_with(&module.0)).map(|module| module.1);
        (within.unwrap_or(if name.starts_with(&embedding) { 0 } else { last }), last)
    }

    /// The attentions of all blocks, from input to output.
    pub fn attentions(&self) -> Vec<AttentionPlace> {
        match self {
            VisionConfig::Vit(vit) => vit.attentions(),
            VisionConfig::Swin(swin) => swin.attentions(),
            VisionConfig::Conv(_) => Vec::new(),
            VisionConfig::Binary(_) => Vec::new(),
        }
    }

    /// The names of the taps of the model over `weights`.
    pub fn taps(&self, weights: &Weights) -> Vec<String> {
        match self {
            VisionConfig::Vit(vit) => Vit::taps(vit, weights),
            VisionConfig::Swin(swin) => Swin::taps(swin, weights),
            VisionConfig::Conv(_) => Vec::new(),
            VisionConfig::Binary(_) => Vec::new(),
        }
    }

    /// Builds the model over `weights`.
    pub fn build(&self, weights: &Weights) -> Result<VisionModel> {
        match self {
            VisionConfig::Vit(vit) => Vit::new(vit, weights).map(VisionModel::Vit),
            VisionConfig::Swin(swin) => Swin::new(swin, weights).map(VisionModel::Swin),
            VisionConfig::Conv(conv) => ConvNet::new(conv, weights).map(VisionModel::Conv),
            VisionConfig::Binary(binary) => Binary::new(binary, weights).map(VisionModel::Binary),
        }
    }
}

/// Whether a Hugging Face configuration is a Swin's, of any version: an error then says what of it does
/// not fit.
pub(super) fn is_swin(json: &Value) -> bool {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_lowercase();
    let kind = text(json.get("model_type"));
    let architecture = text(json.get("architectures").and_then(|a| a.get(0)));
    kind.starts_with("swin") || (kind.is_empty() && architecture.starts_with("swin"))
}

/// What a model says of a batch: logits `[batch, classes]`.
#[derive(Debug)]
pub struct VisionOutput {
    /// Of the class token, or of the mean over the image where there is none.
    pub class: Tensor,
    /// Of the distillation token, where the model has a head for it.
    pub distillation: Option<Tensor>,
    /// Variance of `class` in a model that learns the distribution of its weights.
    pub variance: Option<Tensor>,
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
    /// Swin.
    Swin(Swin),
    /// The convolutional classifier.
    Conv(ConvNet),
    /// A perceptron of one-bit weights.
    Binary(Binary),
}

impl VisionModel {
    /// Runs the model on `images [batch, channels, height, width]`, normalised. Another image size than
    /// the model's is an error.
    pub fn forward(&self, images: &Tensor) -> Result<VisionOutput> {
        match self {
            VisionModel::Vit(vit) => vit.forward(images),
            VisionModel::Swin(swin) => swin.forward(images),
            VisionModel::Conv(conv) => conv.forward(images),
            VisionModel::Binary(binary) => binary.forward(images),
        }
    }

    /// As [`VisionModel::forward`], in training: residual branches are left out, and elements dropped, as
    /// `drop` draws it; without it nothing is.
    pub fn train(&self, images: &Tensor, drop: Option<&DropPath>) -> Result<VisionOutput> {
        match self {
            VisionModel::Vit(vit) => vit.train(images, drop),
            VisionModel::Swin(swin) => swin.train(images, drop),
            VisionModel::Conv(conv) => conv.train(images, drop),
            VisionModel::Binary(binary) => binary.train(images),
        }
    }

    /// The first stage of the model whose output on `images` is not finite.
    pub fn not_finite(&self, images: &Tensor) -> Result<Option<String>> {
        match self {
            VisionModel::Vit(vit) => vit.not_finite(images),
            VisionModel::Swin(swin) => swin.not_finite(images),
            VisionModel::Conv(conv) => conv.not_finite(images),
            VisionModel::Binary(binary) => binary.not_finite(images),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn architectures_are_told_by_their_configuration_and_depth_by_names() {
        let read = |json: Value| VisionConfig::from_hf(Path::new("config.json"), &json);
        let vit = read(json!({"model_type": "vit", "num_hidden_layers": 4})).unwrap();
        let swin = read(json!({"architectures": ["SwinForImageClassification"], "depths": [2, 3],
            "num_heads": [3, 6]}));
        let swin = swin.unwrap();
        assert!(matches!((&vit, &swin), (VisionConfig::Vit(_), VisionConfig::Swin(_))));
        let conv = read(json!({"model_type": "qtune_conv"})).unwrap();
        let error = read(json!({"model_type": "swinv2"})).unwrap_err().to_string();
        assert!(error.contains("found \"swinv2\", expected swin"), "{error}");
        for (model, name, depth) in [
            (&vit, "vit.embeddings.cls_token", (0, 5)),
            (&vit, "vit.encoder.layer.3.output.dense.weight", (4, 5)),
            (&vit, "classifier.bias", (5, 5)),
            (&swin, "swin.embeddings.norm.weight", (0, 6)),
            (&swin, "swin.encoder.layers.0.blocks.1.output.dense.weight", (2, 6)),
            (&swin, "swin.encoder.layers.0.downsample.reduction.weight", (2, 6)),
            (&swin, "swin.encoder.layers.1.blocks.2.layernorm_before.bias", (5, 6)),
            (&swin, "swin.layernorm.weight", (6, 6)),
            (&conv, "conv.0.bias", (0, 3)),
            (&conv, "conv.1.weight", (1, 3)),
            (&conv, "fc.weight", (2, 3)),
            (&conv, "classifier.bias", (3, 3)),
        ] {
            assert_eq!(model.depth(name), depth, "{name}");
        }
    }
}
