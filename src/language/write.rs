//! A language model as a folder that transformers and this program load.

use std::path::Path;

use serde_json::{json, Value};

use super::start::Start;
use crate::weights::format::{stored_tensors, QuantizationConfig};
use crate::weights::{checkpoint, Weights};
use crate::{files, Error, Result};

/// Models above this are written in shards, as Hugging Face does.
const SHARD_BYTES: u64 = 5_000_000_000;

/// The files beside the weights that are copied byte for byte.
const BESIDE: [&str; 11] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "tokenizer.bin",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "README.md",
];

fn copy_beside(from: &Path, to: &Path) -> Result<()> {
    for name in BESIDE {
        let path = from.join(name);
        if path.exists() {
            let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
            files::write_bytes(&to.join(name), &bytes)?;
        }
    }
    Ok(())
}

/// Writes `weights` as the model that `start` was: config.json as it stood, but for what changed, the
/// weights, the tokenizer's files. Returns the bytes of the weights' files.
pub fn write_language_model(dir: &Path, start: &Start, weights: &Weights) -> Result<u64> {
    if dir.exists() {
        files::discard(dir)?;
    }
    let staging = files::Staging::new(dir)?;
    let mut json = start.json.clone();
    let quantization = QuantizationConfig::of(weights);
    let untied = start.config.tied && weights.contains("lm_head.weight");
    if let Some(object) = json.as_object_mut() {
        match quantization.weights.is_empty() {
            true => drop(object.remove("quantization_config")),
            false => {
                let value = serde_json::to_value(&quantization)
                    .map_err(|e| Error::Run(format!("quantization_config: {e}")))?;
                object.insert("quantization_config".into(), value);
            }
        }
        if untied {
            object.insert("tie_word_embeddings".into(), json!(false));
        }
    }
    let metadata = [("format".to_string(), "pt".to_string())].into();
    let bytes = checkpoint::save_model(staging.path(), &stored_tensors(weights)?, &metadata, SHARD_BYTES)?;
    files::write_bytes(&staging.path().join("config.json"), &pretty(&json)?)?;
    match &start.dir {
        Some(from) => copy_beside(from, staging.path())?,
        None => start.tokenizer.save(staging.path())?,
    }
    staging.commit()?;
    Ok(bytes)
}

fn pretty(value: &Value) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(value).map_err(|e| Error::Run(format!("config.json: {e}")))
}
