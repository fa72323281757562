//! `[model]`: a pretrained model, or the sizes of a new one.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::LlamaSource;
use crate::models::Reading;
use crate::{Error, Result};

/// `[model]`: where to start from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum ModelConfig {
    /// A vision transformer.
    Vit(VitSource),
    /// A Swin transformer.
    Swin(SwinSource),
    /// The small convolutional classifier, to learn on with.
    Conv(ConvSource),
    /// A perceptron of one-bit weights.
    Binary(BinarySource),
    /// A language model of the Llama family.
    Llama(LlamaSource),
}

impl ModelConfig {
    /// The pretrained model, where there is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            ModelConfig::Vit(vit) => vit.path.as_deref(),
            ModelConfig::Swin(swin) => swin.path.as_deref(),
            ModelConfig::Conv(conv) => conv.path.as_deref(),
            ModelConfig::Binary(binary) => binary.path.as_deref(),
            ModelConfig::Llama(llama) => llama.path.as_deref(),
        }
    }

    /// Whether it may be a file that PyTorch pickled.
    pub fn allow_pickle(&self) -> bool {
        match self {
            ModelConfig::Vit(vit) => vit.allow_pickle,
            ModelConfig::Swin(swin) => swin.allow_pickle,
            ModelConfig::Conv(_) | ModelConfig::Binary(_) | ModelConfig::Llama(_) => false,
        }
    }

    /// The same path, to be changed.
    pub fn path_mut(&mut self) -> &mut Option<PathBuf> {
        match self {
            ModelConfig::Vit(vit) => &mut vit.path,
            ModelConfig::Swin(swin) => &mut swin.path,
            ModelConfig::Conv(conv) => &mut conv.path,
            ModelConfig::Binary(binary) => &mut binary.path,
            ModelConfig::Llama(llama) => &mut llama.path,
        }
    }

    /// Pixels on a side that images are brought to, where the recipe says so.
    pub fn image_size(&self) -> Option<usize> {
        match self {
            ModelConfig::Vit(vit) => vit.image_size,
            ModelConfig::Swin(swin) => swin.image_size,
            ModelConfig::Conv(conv) => conv.image_size,
            ModelConfig::Binary(binary) => binary.image_size,
            ModelConfig::Llama(_) => None,
        }
    }

    /// What types cannot hold.
    pub(super) fn check(&self) -> Result<()> {
        match self {
            ModelConfig::Vit(vit) => vit.check(),
            ModelConfig::Swin(swin) => swin.check(),
            ModelConfig::Conv(conv) => conv.check(),
            ModelConfig::Binary(binary) => binary.check(),
            ModelConfig::Llama(llama) => match (&llama.path, llama.new) {
                (Some(_), Some(_)) => Err(Error::usage("model.path and model.new: expected one of them")),
                (_, Some(new)) => new.check(),
                _ => Ok(()),
            },
        }
    }
}

/// A pretrained ViT, or the sizes of a new one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VitSource {
    /// A pretrained model: a folder, or a hub name. None: a new model of the sizes below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Whether a pretrained model or teacher may be a file that PyTorch pickled. It is read as data and
    /// nothing in it is run.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub allow_pickle: bool,
    /// Pixels on a side that images are brought to. None: the pretrained model's, or, for a new model,
    /// that of the data where it is one size of at most 64, else 64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_size: Option<usize>,
    /// Pixels on a side of a patch of a new model. None: an eighth of the image, at least 4.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patch_size: Option<usize>,
    /// Channels of the blocks of a new model.
    pub hidden: usize,
    /// Blocks of a new model.
    pub layers: usize,
    /// Attention heads of a new model.
    pub heads: usize,
    /// Channels inside the MLP of a new model.
    pub mlp: usize,
}

impl Default for VitSource {
    fn default() -> Self {
        VitSource {
            path: None,
            allow_pickle: false,
            image_size: None,
            patch_size: None,
            hidden: 96,
            layers: 6,
            heads: 4,
            mlp: 192,
        }
    }
}

impl VitSource {
    fn check(&self) -> Result<()> {
        let sizes =
            [("hidden", self.hidden), ("layers", self.layers), ("heads", self.heads), ("mlp", self.mlp)];
        if let Some((key, _)) = sizes.iter().find(|(_, n)| *n == 0) {
            return Err(Error::usage(format!("model.{key} = 0: expected at least 1")));
        }
        if !self.hidden.is_multiple_of(self.heads) {
            return Err(Error::usage(format!(
                "model.heads = {} does not divide model.hidden = {}",
                self.heads, self.hidden
            )));
        }
        Ok(())
    }
}

/// A pretrained Swin, or the sizes of a new one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SwinSource {
    /// A pretrained model: a folder, or a hub name. None: a new model of the sizes below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Whether a pretrained model or teacher may be a file that PyTorch pickled, as for a ViT.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub allow_pickle: bool,
    /// Pixels on a side that images are brought to. None: the pretrained model's, or, for a new model,
    /// that of the data where it is one size of at most 64, else 64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_size: Option<usize>,
    /// Pixels on a side of a patch of a new model. None: a sixteenth of the image, at least 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patch_size: Option<usize>,
    /// Channels of the first stage of a new model; each stage has twice those of the one before.
    pub embed: usize,
    /// Blocks of each stage of a new model.
    pub depths: Vec<usize>,
    /// Attention heads of each stage of a new model.
    pub heads: Vec<usize>,
    /// Patches on a side of an attention window of a new model. None: 4 to 8, whatever divides the map.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
    /// Channels inside the MLP of a new model over those of its stage.
    pub mlp_ratio: f64,
}

impl Default for SwinSource {
    fn default() -> Self {
        SwinSource {
            path: None,
            allow_pickle: false,
            image_size: None,
            patch_size: None,
            embed: 48,
            depths: vec![2, 4],
            heads: vec![2, 4],
            window: None,
            mlp_ratio: 2.0,
        }
    }
}

impl SwinSource {
    fn check(&self) -> Result<()> {
        let (stages, heads) = (self.depths.len(), self.heads.len());
        if !(1..=8).contains(&stages) || heads != stages {
            return Err(Error::usage(format!(
                "model.depths has {stages} stages and model.heads {heads}: expected as many, 1 to 8"
            )));
        }
        let all = self.depths.iter().chain(&self.heads).chain([&self.embed]).chain(&self.window);
        if all.into_iter().any(|n| *n == 0) {
            return Err(Error::usage("model: found a size of 0, expected at least 1"));
        }
        for (stage, heads) in self.heads.iter().enumerate() {
            let channels = self.embed.saturating_mul(1 << stage);
            if !channels.is_multiple_of(*heads) {
                return Err(Error::usage(format!(
                    "model.heads = {heads} does not divide the {channels} channels of stage {stage}"
                )));
            }
        }
        if !(self.mlp_ratio.is_finite() && self.mlp_ratio > 0.0) {
            return Err(Error::usage(format!("model.mlp_ratio = {}: expected more than 0", self.mlp_ratio)));
        }
        Ok(())
    }
}

/// A convolutional classifier that was trained before, or the sizes of a new one: by default those of the
/// network that CLASSP was published with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConvSource {
    /// A trained model: a folder, or a hub name. None: a new model of the sizes below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Pixels on a side that images are brought to. None: the trained model's, or, for a new model, that of
    /// the data where it is one size of at most 64, else 64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_size: Option<usize>,
    /// Channels behind each convolution of a new model.
    pub widths: Vec<usize>,
    /// Pixels on a side of the windows of a new model.
    pub kernel: usize,
    /// Channels of the layer before the classifier of a new model.
    pub hidden: usize,
    /// In training, the share of the last map's channels and of the hidden layer's elements that are dropped,
    /// for a new model.
    pub dropout: (f64, f64),
}

impl Default for ConvSource {
    fn default() -> Self {
        ConvSource {
            path: None,
            image_size: None,
            widths: vec![32, 64],
            kernel: 3,
            hidden: 128,
            dropout: (0.25, 0.5),
        }
    }
}

impl ConvSource {
    fn check(&self) -> Result<()> {
        if self.widths.is_empty() {
            return Err(Error::usage("model.widths: found none, expected the channels of each convolution"));
        }
        if self.widths.iter().chain([&self.kernel, &self.hidden]).any(|n| *n == 0) {
            return Err(Error::usage("model: found a size of 0, expected at least 1"));
        }
        let (channel, element) = self.dropout;
        if let Some(p) = [channel, element].into_iter().find(|p| !(0.0..1.0).contains(p)) {
            return Err(Error::usage(format!("model.dropout = {p}: expected 0 or more and less than 1")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conv(text: &str) -> Result<ConvSource> {
        let source: ConvSource = toml::from_str(text).map_err(|e| Error::usage(e.message()))?;
        source.check().map(|()| source)
    }

    #[test]
    fn a_convolutional_model_defaults_to_the_published_sizes_and_says_what_is_wrong() {
        let kind: ModelConfig = toml::from_str("kind = \"conv\"").unwrap();
        assert_eq!(kind, ModelConfig::Conv(ConvSource::default()));
        let small = conv("widths = [4]\nkernel = 5\nhidden = 8\ndropout = [0.0, 0.1]").unwrap();
        assert_eq!((small.widths, small.kernel, small.hidden, small.dropout), (vec![4], 5, 8, (0.0, 0.1)));
        for (text, expected) in [
            ("widths = []", "model.widths: found none"),
            ("kernel = 0", "found a size of 0"),
            ("widths = [4, 0]", "found a size of 0"),
            ("dropout = [0.25, 1.0]", "model.dropout = 1: expected 0 or more"),
            ("dropout = [-0.5, 0.0]", "model.dropout = -0.5"),
            ("depths = [2]", "unknown field `depths`"),
        ] {
            let error = conv(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}

/// A perceptron of one-bit weights ([`crate::models::Binary`]), or the sizes of a new one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BinarySource {
    /// A trained model: a folder. None: a new model of the sizes below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Pixels on a side that images are brought to. None: the trained model's, or, for a new model, that of
    /// the data where it is one size of at most 64, else 64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_size: Option<usize>,
    /// Units of each hidden layer of a new model.
    pub hidden: Vec<usize>,
    /// How the fields behind the signs are trained: `field`, as distributions, or `sign`, straight through.
    pub reading: Reading,
}

impl Default for BinarySource {
    fn default() -> Self {
        BinarySource { path: None, image_size: None, hidden: vec![200, 200], reading: Reading::Field }
    }
}

impl BinarySource {
    fn check(&self) -> Result<()> {
        if self.hidden.is_empty() || self.hidden.contains(&0) {
            return Err(Error::usage(format!(
                "model.hidden = {:?}: expected at least one layer, of at least 1 unit each",
                self.hidden
            )));
        }
        Ok(())
    }
}
