//! A model as a plain Hugging Face directory: packed weights as the values that they stand for, in any
//! floating-point dtype. Written tensor by tensor; what does not change is copied byte for byte.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use serde_json::{json, Value};

use crate::files::{write_bytes, Staging};
use crate::models::read_config;
use crate::weights::checkpoint::{check_finite, save_model_pieces, Dtype, Piece, Planned};
use crate::weights::format::QuantizationConfig;
use crate::weights::{Checkpoint, Weight, Weights};
use crate::{Error, On, Result};

/// Bytes of a shard, at most.
const SHARD: u64 = 5_000_000_000;
/// Extensions of files that hold weights in one form or another: those of the old form stay behind.
const WEIGHTS: [&str; 9] = ["safetensors", "bin", "pt", "pth", "ckpt", "gguf", "h5", "msgpack", "onnx"];

/// What was written.
#[derive(Clone, Debug)]
pub struct Plain {
    /// The folder.
    pub dir: PathBuf,
    /// Tensors of the model.
    pub tensors: usize,
    /// How many of them were packed before.
    pub unpacked: usize,
    /// Bytes of its safetensors files.
    pub bytes: u64,
}

/// Writes the model in the folder `dir` as the plain folder `out`, which must not exist, whole or not at
/// all. `dtype`: of all floating-point tensors; `None` keeps each one's own, f32 of what was packed.
///
/// Errs on what a plain model has no place for: activation quantizers, and query and key stored as their
/// product; and on values that `dtype` cannot hold.
pub fn export_plain(dir: &Path, out: &Path, dtype: Option<DType>) -> Result<Plain> {
    let (config_path, config) = read_config(dir)?;
    let checkpoint = Checkpoint::open(dir)?;
    let quantization = QuantizationConfig::read(&config_path, &config)?;
    let (mut packed, mut hidden) = (Weights::default(), Vec::new());
    if let Some(quantization) = &quantization {
        if let Some(tap) = quantization.activations.keys().next() {
            let message = format!("the activations at {tap} are quantized, which a plain model cannot say");
            return Err(Error::input(dir, message));
        }
        if let Some(product) = quantization.weights.keys().find(|name| name.ends_with(".qk.weight")) {
            let message = format!(
                "{product} is a product of query and key, for which a plain model has no tensor: pack without --qkr"
            );
            return Err(Error::input(dir, message));
        }
        let refuse =
            |name: &str, _: &Value, _: &dyn Fn(&str) -> Result<Option<candle_core::Tensor>>| -> Result<_> {
                Err(Error::tensor(name, "found a rule on activations, expected none"))
            };
        packed = quantization.open(&checkpoint, &Device::Cpu, &refuse)?;
        hidden =
            quantization.weights.keys().flat_map(|n| [format!("{n}.codes"), format!("{n}.scale")]).collect();
    }
    let unpacked = |name: &str| -> Option<&Weight> {
        let is = quantization.as_ref().is_some_and(|q| q.weights.contains_key(name));
        is.then(|| packed.get(name).ok()).flatten()
    };
    let plan = plan(&checkpoint, quantization.as_ref(), &hidden, dtype)?;
    let staging = Staging::new(out)?;
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let mut piece = |at: usize| -> Result<Piece<'_>> {
        let planned = &plan[at];
        let name = planned.name.as_str();
        if unpacked(name).is_none() && checkpoint.dtype(name) == Some(planned.dtype) {
            return Ok(Piece::Bytes(checkpoint.raw(name)?));
        }
        let tensor = match unpacked(name) {
            Some(weight) => weight.tensor()?.detach(),
            None => checkpoint.tensor(name, &Device::Cpu)?,
        };
        let tensor = tensor.to_dtype(of_file(planned.dtype)).on(name)?;
        // A value beyond f16 would become an infinity that no reader takes.
        check_finite(name, &tensor)?;
        Ok(Piece::Tensor(tensor))
    };
    let bytes = save_model_pieces(staging.path(), &plan, &metadata, SHARD, &mut piece)?;
    let changed = plain_config(&config, quantization.is_some(), dtype);
    let text = serde_json::to_vec_pretty(&changed).map_err(|e| Error::Run(format!("config.json: {e}")))?;
    write_bytes(&staging.path().join("config.json"), &text)?;
    copy_beside(dir, staging.path())?;
    let unpacked = quantization.map_or(0, |q| q.weights.len());
    Ok(Plain { dir: staging.commit()?, tensors: plan.len(), unpacked, bytes })
}

/// Name, dtype and shape of every tensor, those of the file in its order with packed ones in their places.
fn plan(
    checkpoint: &Checkpoint,
    quantization: Option<&QuantizationConfig>,
    hidden: &[String],
    dtype: Option<DType>,
) -> Result<Vec<Planned>> {
    let asked = dtype.map(spelled).transpose()?;
    let hidden: std::collections::HashSet<&str> = hidden.iter().map(String::as_str).collect();
    let mut plan = Vec::new();
    for name in checkpoint.names() {
        let weight = name.strip_suffix(".codes").filter(|_| hidden.contains(name));
        let entry = weight.and_then(|weight| Some((weight, quantization?.weights.get(weight)?)));
        if let Some((weight, entry)) = entry {
            let dtype = asked.unwrap_or(Dtype::F32);
            plan.push(Planned { name: weight.to_string(), dtype, shape: entry.shape.clone() });
            continue;
        }
        let (Some(stored), Some(shape)) = (checkpoint.dtype(name), checkpoint.shape(name)) else { continue };
        if hidden.contains(name) {
            continue;
        }
        let float = matches!(stored, Dtype::F64 | Dtype::F32 | Dtype::BF16 | Dtype::F16);
        let dtype = asked.filter(|_| float).unwrap_or(stored);
        plan.push(Planned { name: name.to_string(), dtype, shape: shape.to_vec() });
    }
    Ok(plan)
}

/// config.json of the plain model: not quantized, of the dtype that was asked for.
fn plain_config(config: &Value, packed: bool, dtype: Option<DType>) -> Value {
    let mut config = config.clone();
    let Some(keys) = config.as_object_mut() else { return config };
    keys.remove("quantization_config");
    if !packed && dtype.is_none() {
        return config;
    }
    let name = match dtype {
        Some(DType::BF16) => "bfloat16",
        Some(DType::F16) => "float16",
        _ => "float32",
    };
    let known: Vec<&str> =
        ["dtype", "torch_dtype"].into_iter().filter(|key| keys.contains_key(*key)).collect();
    match known.is_empty() {
        true => drop(keys.insert("torch_dtype".into(), json!(name))),
        false => known.iter().for_each(|key| drop(keys.insert((*key).into(), json!(name)))),
    }
    config
}

/// Copies what lies beside the weights: tokenizer, templates, preprocessing.
fn copy_beside(dir: &Path, out: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let path = entry.map_err(|e| Error::io(dir, e))?.path();
        let Some(name) = path.file_name().map(|name| name.to_string_lossy().into_owned()) else { continue };
        let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
        // llama2.c's tokenizers are .bin files too.
        let weights = WEIGHTS.contains(&extension.as_str()) && !name.starts_with("tok");
        let left = weights || name.starts_with('.') || name == "config.json" || name.ends_with(".index.json");
        if !left && path.is_file() {
            std::fs::copy(&path, out.join(&name)).map_err(|e| Error::io(&path, e))?;
        }
    }
    Ok(())
}

fn spelled(dtype: DType) -> Result<Dtype> {
    match dtype {
        DType::F32 => Ok(Dtype::F32),
        DType::BF16 => Ok(Dtype::BF16),
        DType::F16 => Ok(Dtype::F16),
        other => Err(Error::usage(format!("--type {}: expected f32, bf16 or f16", other.as_str()))),
    }
}

fn of_file(dtype: Dtype) -> DType {
    match dtype {
        Dtype::BF16 => DType::BF16,
        Dtype::F16 => DType::F16,
        _ => DType::F32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_says_what_is_there() {
        let packed = json!({"dtype": "float32", "quantization_config": {"quant_method": "qtune"}, "x": 1});
        assert_eq!(plain_config(&packed, true, None), json!({"dtype": "float32", "x": 1}));
        let half = plain_config(&packed, true, Some(DType::BF16));
        assert_eq!(half, json!({"dtype": "bfloat16", "x": 1}));
        assert_eq!(plain_config(&json!({}), false, Some(DType::F16)), json!({"torch_dtype": "float16"}));
        assert_eq!(plain_config(&json!({"a": 2}), false, None), json!({"a": 2}));
    }
}
