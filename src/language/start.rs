//! What a run over text starts from: a model, its tokenizer, the text.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde_json::Value;

use crate::adapter::{Adapter, Attach, Modules};
use crate::data::text::{TextConfig, TextData, Tokenizer};
use crate::models::{held, model_dir, open_llama, LlamaConfig, OpenedLlama};
use crate::random::Random;
use crate::recipe::{Format, LlamaSource, ModelConfig, NewLlama, Recipe};
use crate::weights::Weights;
use crate::{hub, Error, On, Result};

/// The model that the program carries: trained by the recipe `tiny-llama`.
const TINY: &[u8] = include_bytes!("../../recipes/tiny-llama.safetensors");

/// A model to start from.
#[derive(Debug)]
pub struct Start {
    /// Its sizes.
    pub config: LlamaConfig,
    /// Its config.json.
    pub json: Value,
    /// Its weights, frozen.
    pub weights: Weights,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// What to call it.
    pub name: String,
    /// Its folder, where it has one.
    pub dir: Option<PathBuf>,
    /// Bytes of its parameters in its files.
    pub bytes: u64,
    /// What is worth a line.
    pub notes: Vec<String>,
}

/// The source of a recipe for language models; an error where the recipe is for images.
pub fn source(recipe: &Recipe) -> Result<&LlamaSource> {
    match &recipe.model {
        ModelConfig::Llama(source) => Ok(source),
        _ => Err(Error::usage("model.kind: expected llama, the recipe is for a vision transformer")),
    }
}

/// Opens the model that a recipe names, its weights brought to memory.
pub fn start(recipe: &Recipe, device: &Device) -> Result<Start> {
    let mut start = open(recipe, device)?;
    start.weights = held(&start.config, &start.weights, source(recipe)?.dtype.dtype())?;
    Ok(start)
}

/// Opens the model that a recipe names; what lies in a file stays there until it is read.
pub fn open(recipe: &Recipe, device: &Device) -> Result<Start> {
    let source = source(recipe)?;
    let mut start = match (&source.path, source.new) {
        (Some(path), _) => open_at(path, device)?,
        (None, Some(sizes)) => random(sizes, recipe.seed, device)?,
        (None, None) => tiny(device)?,
    };
    if !source.adapters.is_empty() {
        start.weights = held(&start.config, &start.weights, Format::F32.dtype())?;
        for adapter in &source.adapters {
            let notes = attach(&mut start, adapter, None)?;
            start.notes.extend(notes);
        }
        start.weights = start.weights.folded()?;
    }
    Ok(start)
}

/// Puts the adapter in the folder `dir` on a model, not to be trained, `scale` times.
pub fn attach(start: &mut Start, dir: &Path, scale: Option<f64>) -> Result<Vec<String>> {
    let dir = match dir.join("adapter").join("adapter_config.json").exists() {
        // A run folder of ours.
        true => dir.join("adapter"),
        false => dir.to_path_buf(),
    };
    let adapter = Adapter::open(&dir)?;
    let modules = Modules::of(&start.json, &start.weights)?;
    let attached = adapter.attach(&mut start.weights, &modules, &Attach { scale, ..Attach::default() })?;
    Ok(adapter.notes().iter().cloned().chain(attached.notes).collect())
}

/// Opens a model by path or hub name.
pub fn open_at(path: &Path, device: &Device) -> Result<Start> {
    let dir = model_dir(&hub::resolve(&path.to_string_lossy())?);
    let OpenedLlama { config, json, weights, notes } = open_llama(&dir, device)?;
    let tokenizer = Tokenizer::open(&dir, Some(config.vocab))?;
    let mut bytes = 0;
    for entry in std::fs::read_dir(&dir).map_err(|e| Error::io(&dir, e))? {
        let path = entry.map_err(|e| Error::io(&dir, e))?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            bytes += std::fs::metadata(&path).map_err(|e| Error::io(&path, e))?.len();
        }
    }
    let name = path.display().to_string();
    Ok(Start { config, json, weights, tokenizer, name, dir: Some(dir), bytes, notes })
}

/// The configuration of a new model over the byte-level tokenizer.
fn sizes_of(sizes: NewLlama, tokenizer: &Tokenizer) -> Result<(LlamaConfig, Value)> {
    let NewLlama { hidden, mlp, layers, heads, kv_heads, positions } = sizes;
    let json = serde_json::json!({
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": tokenizer.vocab_size(),
        "max_position_embeddings": positions, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
    });
    let config = LlamaConfig::from_hf(Path::new("model.new"), &json)?;
    let mut json = config.to_hf();
    if let Some(object) = json.as_object_mut() {
        object.insert("bos_token_id".into(), serde_json::json!(tokenizer.bos()));
        object.insert("eos_token_id".into(), serde_json::json!(tokenizer.eos().first()));
    }
    Ok((config, json))
}

/// A new model: normal numbers of deviation 0.02 (and less by the root of twice the depth where a block
/// adds to the stream, as GPT-2 has it), norms of ones, biases of zeros.
fn random(sizes: NewLlama, seed: u64, device: &Device) -> Result<Start> {
    let tokenizer = Tokenizer::bytes()?;
    let (config, json) = sizes_of(sizes, &tokenizer)?;
    let mut tensors = Vec::new();
    for (name, shape) in config.shapes() {
        let count: usize = shape.iter().product();
        let adds = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
        let std = 0.02 / if adds { (2.0 * config.layers as f32).sqrt() } else { 1.0 };
        let mut random = Random::new(seed, &name, &[]);
        let values: Vec<f32> = match shape.len() {
            1 if name.ends_with("norm.weight") => vec![1.0; count],
            1 => vec![0.0; count],
            _ => (0..count).map(|_| random.normal() * std).collect(),
        };
        tensors.push((name, Tensor::from_vec(values, shape, device)?));
    }
    let weights = Weights::from_tensors(tensors);
    let bytes = 4 * config.params() as u64;
    Ok(Start { config, json, weights, tokenizer, name: "new".into(), dir: None, bytes, notes: Vec::new() })
}

/// The model that the program carries.
pub fn tiny(device: &Device) -> Result<Start> {
    let recipe = Recipe::resolve(Recipe::table("tiny-llama")?)?;
    let sizes =
        source(&recipe)?.new.ok_or_else(|| Error::usage("recipe tiny-llama: model.new: found none"))?;
    let tokenizer = Tokenizer::bytes()?;
    let (config, json) = sizes_of(sizes, &tokenizer)?;
    let mut stored = candle_core::safetensors::load_buffer(TINY, device).on("tiny-llama")?;
    let mut tensors = Vec::new();
    for (name, shape) in config.shapes() {
        let tensor = stored.remove(&name).filter(|t| t.dims() == shape);
        let tensor =
            tensor.ok_or_else(|| Error::tensor(&name, format!("not in tiny-llama, expected {shape:?}")))?;
        tensors.push((name, tensor.to_dtype(candle_core::DType::F32)?));
    }
    let weights = Weights::from_tensors(tensors);
    let bytes = TINY.len() as u64;
    Ok(Start {
        config,
        json,
        weights,
        tokenizer,
        name: "tiny-llama".into(),
        dir: None,
        bytes,
        notes: Vec::new(),
    })
}

/// The text of a recipe, as tokens.
pub fn open_text(recipe: &Recipe, start: &Start) -> Result<TextData> {
    let config: TextConfig = recipe.text.clone().unwrap_or_default();
    let data = config.open(&start.tokenizer, recipe.seed)?;
    if config.seq_len > start.config.max_positions {
        let (found, most) = (config.seq_len, start.config.max_positions);
        let message =
            format!("text.seq_len = {found}: longer than the {most} tokens that the model was made for");
        return Err(Error::usage(message));
    }
    Ok(data)
}
