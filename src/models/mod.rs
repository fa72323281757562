//! Models, and how they are opened: plain, packed, ours or somebody else's.

pub mod attention;
pub mod binary;
pub mod binary_config;
pub mod convnet;
pub mod convnet_config;
pub mod drop_path;
pub mod import;
mod integer;
mod keys;
pub mod llama;
pub mod llama_config;
pub mod names;
pub mod nn;
pub mod patches;
pub mod swin;
pub mod swin_config;
mod swin_names;
pub mod vision;
pub mod vit;
pub mod vit_config;
pub mod windows;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;
use serde_json::Value;

pub use binary::Binary;
pub use binary_config::{BinaryConfig, Reading};
pub use convnet::ConvNet;
pub use convnet_config::ConvConfig;
pub use drop_path::DropPath;
pub use import::{import_model, Imported, Want};
pub use llama::{held, open_llama, Cache, Llama, OpenedLlama, Places};
pub use llama_config::LlamaConfig;
pub use swin::Swin;
pub use swin_config::SwinConfig;
pub use vision::{VisionConfig, VisionModel, VisionOutput};
pub use vit::Vit;
pub use vit_config::VitConfig;

use crate::data::{Filter, Preprocess, Resize};
use crate::transform::ActQuant;
use crate::weights::format::QuantizationConfig;
use crate::weights::{Checkpoint, Pickle, Transform, Weights};
use crate::{files, Error, Result};

/// A model read from a folder.
#[derive(Debug)]
pub struct Opened {
    /// Sizes and labels.
    pub config: VisionConfig,
    /// Its weights, dense or packed, and the rules on its taps.
    pub weights: Weights,
    /// What the file says of the quantization, where it is quantized.
    pub quantization: Option<QuantizationConfig>,
    /// How images become tensors.
    pub preprocess: Preprocess,
    /// What is worth a line.
    pub notes: Vec<String>,
}

/// The folder of a model that a user named: the folder itself, or `model/` of a run folder.
pub fn model_dir(path: &Path) -> PathBuf {
    let inner = path.join("model");
    match !path.join("config.json").exists() && inner.join("config.json").exists() {
        true => inner,
        false => path.to_path_buf(),
    }
}

/// config.json of a model folder.
pub fn read_config(dir: &Path) -> Result<(PathBuf, Value)> {
    let path = dir.join("config.json");
    let text = files::read_text(&path)?;
    let value = serde_json::from_str(&text).map_err(|e| Error::input(&path, e.to_string()))?;
    Ok((path, value))
}

/// The weights of a model folder, dense or packed, for any model: `open_weights(dir, device)?.var_builder(dtype, device)`.
pub fn open_weights(dir: &Path, device: &Device) -> Result<Weights> {
    let (path, config) = read_config(dir)?;
    let checkpoint = Checkpoint::open(dir)?;
    match QuantizationConfig::read(&path, &config)? {
        Some(quantization) => quantization.open(&checkpoint, device, &revive),
        None => Ok(Weights::from_checkpoint(Arc::new(checkpoint), device)),
    }
}

fn revive(
    name: &str,
    description: &Value,
    read: &dyn Fn(&str) -> Result<Option<candle_core::Tensor>>,
) -> Result<Arc<dyn Transform>> {
    Ok(Arc::new(ActQuant::revive(name, description, read, false)?))
}

/// Opens a vision model, full precision or packed, for evaluation.
pub fn open_model(dir: &Path, device: &Device) -> Result<Opened> {
    open_model_with(dir, Pickle::Refused, device)
}

/// As [`open_model`], and a full-precision one that PyTorch pickled where `pickle` allows it.
pub fn open_model_with(dir: &Path, pickle: Pickle, device: &Device) -> Result<Opened> {
    let (path, json) = if dir.join("config.json").exists() {
        read_config(dir)?
    } else {
        (dir.join("config.json"), Value::Null)
    };
    let Some(quantization) = QuantizationConfig::read(&path, &json)? else {
        let want = Want { pickle, ..Want::default() };
        let Imported { config, tensors, quantizers, notes, new_head } = import_model(dir, &want, device)?;
        if new_head {
            return Err(Error::input(
                dir,
                "the model has no classifier: train one with qtune quantize --data",
            ));
        }
        if quantizers.is_some() {
            return Err(Error::usage(format!(
                "{}: found a model trained with quantizers, whose bits are not in the file: pack it first, with \
                 qtune quantize --model {} --bits B --act-bits A --steps 0 --data PATH",
                dir.display(),
                dir.display()
            )));
        }
        let preprocess = preprocess_for(dir, &config)?;
        let weights = Weights::from_tensors(tensors);
        return Ok(Opened { config, weights, quantization: None, preprocess, notes });
    };
    let config = VisionConfig::from_hf(&path, &json)?;
    let checkpoint = Checkpoint::open(dir)?;
    let weights = quantization.open(&checkpoint, device, &revive)?;
    let mut expected = std::collections::HashSet::new();
    let shapes = attention::with_products(config.shapes(), &config.attentions(), &weights);
    for (name, shape) in shapes {
        let found = weights.get(&name)?.shape()?;
        if found != shape {
            return Err(Error::tensor(&name, format!("found shape {found:?}, expected {shape:?}")));
        }
        expected.insert(name);
    }
    let extra = weights.iter().find(|(name, _)| !expected.contains(*name)).map(|(name, _)| name.to_string());
    if let Some(name) = extra {
        return Err(Error::tensor(
            name,
            format!("found in {}, but the model has no such tensor", dir.display()),
        ));
    }
    let taps = config.taps(&weights);
    let stranger =
        weights.taps().find(|(name, _)| !taps.iter().any(|t| t == name)).map(|(n, _)| n.to_string());
    if let Some(name) = stranger {
        return Err(Error::tensor(name, "an activation quantizer for a place that the model does not have"));
    }
    let preprocess = preprocess_for(dir, &config)?;
    Ok(Opened { config, weights, quantization: Some(quantization), preprocess, notes: Vec::new() })
}

/// How the images of a model become tensors: its preprocessor_config.json, what timm says, or
/// (x / 255 - 0.5) / 0.5, for a Swin that of torchvision; for a single file, those beside it. Where the model
/// runs at another size than its
/// file says, the size that images have before the center is cropped out follows.
pub fn preprocess_for(dir: &Path, config: &VisionConfig) -> Result<Preprocess> {
    let (height, width) = config.image_size();
    let beside = dir.parent().filter(|_| dir.is_file());
    let dir = beside.unwrap_or(dir);
    let mut found = match Preprocess::load(dir, height, width, config.channels())? {
        Some(found) => found,
        None => timm_or_plain(dir, config)?,
    };
    let own = match dir.join("config.json").exists() {
        true => read_config(dir)?.1.get("image_size").and_then(Value::as_u64).map(|n| n as usize),
        false => None,
    };
    if let Some(own) = own.filter(|own| *own > 0 && *own != height) {
        let follow = |n: usize| (n * height).div_ceil(own);
        found.resize = match found.resize {
            Resize::ShortestEdge(n) => Resize::ShortestEdge(follow(n)),
            Resize::Through(h, w) => Resize::Through(follow(h), follow(w)),
            other => other,
        };
    }
    Ok(found)
}

/// How the images of a new model become tensors: (x / 255 - 0.5) / 0.5, but x / 255 for a network of one-bit
/// weights, so that what is empty in an image adds nothing to a sum and teaches nothing.
pub fn preprocess_of(config: &VisionConfig) -> Preprocess {
    let (height, width) = config.image_size();
    let mut plain = Preprocess::default_for(height, width, config.channels());
    if let VisionConfig::Binary(_) = config {
        (plain.mean, plain.std) = (vec![0.0; config.channels()], vec![1.0; config.channels()]);
    }
    plain
}

fn timm_or_plain(dir: &Path, config: &VisionConfig) -> Result<Preprocess> {
    let (height, _) = config.image_size();
    let mut plain = preprocess_of(config);
    if let (VisionConfig::Swin(_), 3) = (config, config.channels()) {
        // As torchvision's swin_t, whose files say nothing of it: 224 pixels out of 232.
        (plain.mean, plain.std) = (vec![0.485, 0.456, 0.406], vec![0.229, 0.224, 0.225]);
        plain.resize = Resize::ShortestEdge((height * 232).div_ceil(224));
        plain.filter = Filter::Bicubic;
    }
    let Some(timm) = import::timm_preprocess(dir)? else { return Ok(plain) };
    if timm.mean.len() == config.channels() && timm.std.len() == config.channels() {
        plain.mean = timm.mean.iter().map(|&v| v as f32).collect();
        plain.std = timm.std.iter().map(|&v| v as f32).collect();
    }
    if timm.crop_pct > 0.0 && timm.crop_pct <= 1.0 {
        // timm takes the whole part of size / crop_pct.
        plain.resize = Resize::ShortestEdge((height as f64 / timm.crop_pct) as usize);
    }
    plain.filter = match timm.interpolation.as_str() {
        "nearest" => Filter::Nearest,
        "bilinear" => Filter::Bilinear,
        "lanczos" => Filter::Lanczos,
        _ => Filter::Bicubic,
    };
    Ok(plain)
}
