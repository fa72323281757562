//! The Llama family as a trainable model: pre-norm blocks of grouped-query attention with rotary positions
//! and a SwiGLU MLP (Touvron et al. 2023), in the tensor names of Hugging Face's `LlamaForCausalLM` and its
//! kin.
//!
//! Every op has a backward. A pass can be run block by block, so that a trainer may keep only the blocks'
//! inputs and compute the rest again ([`Llama::block`]), and token by token over a [`Cache`].

use std::path::Path;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use super::llama_config::{expect_language_model, LlamaConfig, RopeScaling};
use super::nn::{Embedding, Linear, RmsNorm};
use super::{open_weights, read_config};
use crate::kernels::{self, Rotations};
use crate::weights::{Expr, Weight, Weights};
use crate::{Error, On, Result};

/// Where the tokens of a batch stand and what they see.
#[derive(Clone, Debug)]
pub struct Places {
    positions: Arc<[u32]>,
    /// The first key that each token sees.
    starts: Arc<[u32]>,
    batch: usize,
    len: usize,
    /// Keys before the first token, in a cache.
    past: usize,
}

impl Places {
    /// `batch` rows of `len` tokens at `positions`; a token sees those before it in its own segment.
    /// Segments are runs of one number; 0 is padding, which sees itself alone.
    pub fn new(batch: usize, len: usize, positions: &[u32], segments: &[u32]) -> Self {
        let mut starts = Vec::with_capacity(batch * len);
        for row in segments.chunks_exact(len.max(1)) {
            let mut start = 0;
            for (t, segment) in row.iter().enumerate() {
                if t > 0 && (*segment != row[t - 1] || *segment == 0) {
                    start = t as u32;
                }
                starts.push(start);
            }
        }
        Places { positions: positions.into(), starts: starts.into(), batch, len, past: 0 }
    }

    /// `batch` rows of one text each, from position 0.
    pub fn plain(batch: usize, len: usize) -> Self {
        let positions: Vec<u32> = (0..batch).flat_map(|_| 0..len as u32).collect();
        Places::new(batch, len, &positions, &vec![1; batch * len])
    }

    /// `batch` rows of `len` tokens each, behind `past` others.
    pub fn behind(batch: usize, past: usize, len: usize) -> Self {
        let positions: Arc<[u32]> = (0..batch).flat_map(|_| past as u32..(past + len) as u32).collect();
        Places { positions, starts: vec![0; batch * len].into(), batch, len, past }
    }

    /// The first keys seen, where a window of so many tokens slides along.
    fn within(&self, window: Option<usize>) -> Arc<[u32]> {
        let Some(window) = window else { return self.starts.clone() };
        let of = |(i, &start): (usize, &u32)| {
            let own = i % self.len + self.past;
            start.max((own + 1).saturating_sub(window) as u32)
        };
        self.starts.iter().enumerate().map(of).collect()
    }

    /// The largest position, plus one.
    fn reach(&self) -> usize {
        self.positions.iter().max().map_or(0, |p| *p as usize + 1)
    }
}

/// Keys and values of the tokens that rows of equal length have seen.
#[derive(Debug)]
pub struct Cache {
    blocks: Vec<Option<(Tensor, Tensor)>>,
    room: usize,
    len: usize,
}

impl Cache {
    /// For up to `room` tokens through `layers` blocks.
    pub fn new(layers: usize, room: usize) -> Self {
        Cache { blocks: vec![None; layers], room, len: 0 }
    }

    /// Tokens seen.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none were.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends the keys and values of a block, `[batch, T, C]`, and gives all of them.
    fn append(&mut self, block: usize, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (b, t, c) = k.dims3()?;
        if self.len + t > self.room {
            return Err(Error::Run(format!(
                "the cache holds {} tokens and was asked for {}",
                self.room,
                self.len + t
            )));
        }
        let slot = &mut self.blocks[block];
        if slot.is_none() {
            let empty = Tensor::zeros((b, self.room, c), k.dtype(), k.device())?;
            *slot = Some((empty.clone(), empty.copy()?));
        }
        let Some((keys, values)) = slot else { return Ok((k.clone(), v.clone())) };
        if keys.dim(0)? != b {
            let found = keys.dim(0)?;
            return Err(Error::Run(format!("the cache holds {found} rows and was asked for {b}")));
        }
        keys.slice_set(&k.contiguous()?, 1, self.len)?;
        values.slice_set(&v.contiguous()?, 1, self.len)?;
        // Of one row a view, of several a copy: attention reads keys without gaps between rows.
        let seen = |x: &Tensor| x.narrow(1, 0, self.len + t)?.contiguous();
        Ok((seen(keys)?, seen(values)?))
    }
}

/// One block.
#[derive(Debug)]
struct Block {
    norm_before: RmsNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    query_norm: Option<RmsNorm>,
    key_norm: Option<RmsNorm>,
    output: Linear,
    norm_after: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
    window: Option<usize>,
}

impl Block {
    fn new(weights: &Weights, config: &LlamaConfig, i: usize) -> Result<Self> {
        let name = config.block(i);
        let linear = |part: &str, bias: bool| Linear::new(weights, &format!("{name}.{part}"), bias);
        let norm = |part: &str| RmsNorm::new(weights, &format!("{name}.{part}"), config.eps);
        let head_norm = |part: &str| config.qk_norm.then(|| norm(part)).transpose();
        Ok(Block {
            norm_before: norm("input_layernorm")?,
            query: linear("self_attn.q_proj", config.qkv_bias)?,
            key: linear("self_attn.k_proj", config.qkv_bias)?,
            value: linear("self_attn.v_proj", config.qkv_bias)?,
            query_norm: head_norm("self_attn.q_norm")?,
            key_norm: head_norm("self_attn.k_norm")?,
            output: linear("self_attn.o_proj", config.output_bias)?,
            norm_after: norm("post_attention_layernorm")?,
            gate: linear("mlp.gate_proj", config.mlp_bias)?,
            up: linear("mlp.up_proj", config.mlp_bias)?,
            down: linear("mlp.down_proj", config.mlp_bias)?,
            window: config.windows.get(i).copied().flatten(),
        })
    }
}

/// A causal language model.
#[derive(Debug)]
pub struct Llama {
    config: LlamaConfig,
    dtype: DType,
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Linear,
    rotations: Mutex<Option<(usize, Rotations)>>,
}

impl Llama {
    /// The model over a store. Activations are of `dtype` between the layers, but on the CPU in f32 where it is half
    /// precision.
    pub fn new(config: &LlamaConfig, weights: &Weights, dtype: DType) -> Result<Self> {
        // An adapted or trained output embedding of a tied model is a weight of its own.
        let head = match weights.contains("lm_head.weight") || !config.tied {
            true => Linear::new(weights, "lm_head", false)?,
            false => Linear::of("model.embed_tokens", weights.get("model.embed_tokens.weight")?.clone()),
        };
        Ok(Llama {
            config: config.clone(),
            dtype,
            embedding: Embedding::new(weights, "model.embed_tokens")?,
            blocks: (0..config.layers).map(|i| Block::new(weights, config, i)).collect::<Result<_>>()?,
            norm: RmsNorm::new(weights, "model.norm", config.eps)?,
            head,
            rotations: Mutex::new(None),
        })
    }

    /// Its sizes.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Cosines and sines for positions below `reach`; made once for the longest text seen, of the dynamic
    /// kind once for each length, which its frequencies follow.
    fn rotations(&self, reach: usize) -> Rotations {
        let dynamic = match self.config.rope_scaling {
            RopeScaling::Dynamic { original, .. } => Some(reach.max(original)),
            _ => None,
        };
        let mut slot = self.rotations.lock().unwrap_or_else(|e| e.into_inner());
        let fits = |count: usize| dynamic.map_or(count >= reach, |length| count == length);
        match slot.as_ref() {
            Some((count, rotations)) if fits(*count) => rotations.clone(),
            _ => {
                let count = dynamic.unwrap_or(reach.next_power_of_two().max(64));
                let rotations = Rotations::new(&self.config.frequencies(count), count, 1.0);
                *slot = Some((count, rotations.clone()));
                rotations
            }
        }
    }

    /// The embeddings of `tokens` (`batch * len` of them), `[batch, len, hidden]`.
    pub fn embed(&self, tokens: &[u32], places: &Places, device: &Device) -> Result<Tensor> {
        // Where they can be looked at without waiting for a device.
        let ids = Tensor::from_slice(tokens, (places.batch, places.len), &Device::Cpu)?;
        // On the CPU half precision is for what is held: between the ops it would cost a conversion at each.
        let half = matches!(self.dtype, DType::F16 | DType::BF16);
        let dtype = if device.is_cpu() && half { DType::F32 } else { self.dtype };
        Ok(self.embedding.forward(&ids)?.to_dtype(dtype)?)
    }

    /// Block `i` on `x: [batch, len, hidden]`.
    pub fn block(&self, i: usize, x: &Tensor, places: &Places, cache: Option<&mut Cache>) -> Result<Tensor> {
        let block = &self.blocks[i];
        let h = block.norm_before.forward(x)?;
        let x = kernels::add(x, &self.attention(i, &h, places, cache)?)?;
        let h = block.norm_after.forward(&x)?;
        let inner = kernels::swiglu(&block.gate.forward_float(&h)?, &block.up.forward_float(&h)?)?;
        Ok(kernels::add(&x, &block.down.forward_float(&inner)?)?)
    }

    fn attention(&self, i: usize, h: &Tensor, places: &Places, cache: Option<&mut Cache>) -> Result<Tensor> {
        let (block, config) = (&self.blocks[i], &self.config);
        let (heads, groups) = (config.heads, config.kv_heads);
        let rotations = self.rotations(places.reach());
        let turned = |x: Tensor, norm: &Option<RmsNorm>, heads: usize| {
            let x = match norm {
                None => x,
                Some(norm) => {
                    let by_head = x.reshape((places.batch, places.len, heads, config.head_dim))?;
                    norm.forward(&by_head)?.reshape(x.shape())?
                }
            };
            kernels::rope(&x, heads, &places.positions, &rotations).on(config.block(i))
        };
        let q = turned(block.query.forward_float(h)?, &block.query_norm, heads)?;
        let k = turned(block.key.forward_float(h)?, &block.key_norm, groups)?;
        let v = block.value.forward_float(h)?;
        let (k, v) = match cache {
            Some(cache) => cache.append(i, &k, &v)?,
            None => (k, v),
        };
        let scale = 1.0 / (config.head_dim as f64).sqrt();
        let starts = places.within(block.window);
        let o = kernels::causal_attention(&q, &k, &v, (heads, groups), scale, &starts).on(config.block(i))?;
        block.output.forward_float(&o)
    }

    /// The last norm.
    pub fn finish(&self, x: &Tensor) -> Result<Tensor> {
        self.norm.forward(x)
    }

    /// Whether the output embedding is trained, as it is or through what is put on it.
    pub fn trains_head(&self) -> bool {
        self.head.trains()
    }

    /// Logits in f32 of finished hidden states, `[.., hidden]` to `[.., vocab]`.
    pub fn head(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.head.forward_float(x)?.to_dtype(DType::F32)?)
    }

    /// Finished hidden states of all tokens, `[batch, len, hidden]`.
    pub fn hidden(&self, tokens: &[u32], places: &Places, device: &Device) -> Result<Tensor> {
        let mut x = self.embed(tokens, places, device)?;
        for i in 0..self.blocks.len() {
            x = self.block(i, &x, places, None)?;
        }
        self.finish(&x)
    }

    /// Errs where an id is beyond the vocabulary: on a device nobody looks at them.
    pub fn check_ids(&self, ids: &[u32]) -> Result<()> {
        match ids.iter().find(|&&id| id as usize >= self.config.vocab) {
            Some(id) => {
                let vocab = self.config.vocab;
                Err(Error::Run(format!(
                    "found token {id}, expected one below {vocab}, the size of the vocabulary"
                )))
            }
            None => Ok(()),
        }
    }

    /// The mean cross-entropy of the logits of finished hidden states `x: [n, hidden]` against `labels` (as many), in
    /// f32. A label that the vocabulary does not have is an error.
    pub fn loss(&self, x: &Tensor, labels: &[u32]) -> Result<Tensor> {
        self.check_ids(labels)?;
        let ids = Tensor::from_slice(labels, labels.len(), x.device())?;
        Ok(match self.head.dense_product(x)? {
            Some((x, w)) => kernels::classifier_cross_entropy(&x, &w, &ids).on("lm_head")?,
            None => kernels::cross_entropy(&self.head(x)?, &ids)?,
        })
    }

    /// Whether [`Llama::loss`] has all logits of its states `x` in memory at once.
    pub fn holds_logits(&self, x: &Tensor) -> Result<bool> {
        Ok(!x.device().is_cuda() || self.head.dense_product(x)?.is_none())
    }

    /// Logits of all tokens, `[batch, len, vocab]`.
    pub fn forward(&self, tokens: &[u32], places: &Places, device: &Device) -> Result<Tensor> {
        self.head(&self.hidden(tokens, places, device)?)
    }

    /// Takes `tokens` behind those of the cache and gives the logits of the last one, `[vocab]`.
    pub fn step(&self, tokens: &[u32], cache: &mut Cache, device: &Device) -> Result<Tensor> {
        Ok(self.step_rows(tokens, 1, cache, device)?.flatten_all()?)
    }

    /// As [`Llama::step`] for `batch` rows at once, of as many tokens each, one row after another; `[batch,
    /// vocab]`.
    pub fn step_rows(
        &self,
        tokens: &[u32],
        batch: usize,
        cache: &mut Cache,
        device: &Device,
    ) -> Result<Tensor> {
        let len = tokens.len() / batch.max(1);
        if len == 0 || len * batch != tokens.len() {
            let found = tokens.len();
            return Err(Error::Run(format!("{batch} rows of as many tokens each: found {found} tokens")));
        }
        let places = Places::behind(batch, cache.len, len);
        let mut x = self.embed(tokens, &places, device)?;
        for i in 0..self.blocks.len() {
            x = self.block(i, &x, &places, Some(cache))?;
        }
        cache.len += len;
        let last = self.finish(&x.narrow(1, len - 1, 1)?.contiguous()?)?;
        Ok(self.head(&last)?.flatten_to(1)?)
    }

    /// The first layer whose output is not finite on `tokens`, where there is one.
    pub fn not_finite(&self, tokens: &[u32], places: &Places, device: &Device) -> Result<Option<String>> {
        let mut x = self.embed(tokens, places, device)?.detach();
        if !super::nn::finite(&x)? {
            return Ok(Some("model.embed_tokens".into()));
        }
        for i in 0..self.blocks.len() {
            x = self.block(i, &x, places, None)?.detach();
            if !super::nn::finite(&x)? {
                return Ok(Some(self.config.block(i)));
            }
        }
        let logits = self.head(&self.finish(&x)?)?;
        Ok((!super::nn::finite(&logits)?).then(|| "lm_head".into()))
    }
}

/// A language model read from a folder: every weight still in its file.
#[derive(Debug)]
pub struct OpenedLlama {
    /// Its sizes.
    pub config: LlamaConfig,
    /// config.json as it stands.
    pub json: Value,
    /// Its weights, dense (in their files) or packed.
    pub weights: Weights,
    /// What is worth a line.
    pub notes: Vec<String>,
}

/// Opens a language model of the Llama family, dense or packed.
///
/// Errs on an unknown architecture, a tensor that is missing or has another shape, and one that the model
/// does not have.
pub fn open_llama(dir: &Path, device: &Device) -> Result<OpenedLlama> {
    let (path, json) = read_config(dir)?;
    expect_language_model(&path, &json)?;
    let config = LlamaConfig::from_hf(&path, &json)?;
    let all = open_weights(dir, device)?;
    let (mut weights, mut notes) = (Weights::default(), Vec::new());
    let shapes = config.shapes();
    for (name, shape) in &shapes {
        let weight = all.get(name)?;
        let found = weight.shape()?;
        if found != *shape {
            return Err(Error::tensor(name, format!("found shape {found:?}, expected {shape:?}")));
        }
        weights.insert(name.clone(), weight.clone());
    }
    let known = |name: &str| weights.contains(name) || name.ends_with(".rotary_emb.inv_freq");
    for (name, _) in all.iter().filter(|(name, _)| !known(name)) {
        match name {
            "lm_head.weight" => notes.push(format!(
                "{name}: left aside, tie_word_embeddings makes the embedding the output's too"
            )),
            _ => {
                let message = format!("found in {}, but the model has no such tensor", dir.display());
                return Err(Error::tensor(name, message));
            }
        }
    }
    Ok(OpenedLlama { config, json, weights, notes })
}

/// Every weight that is still in its file brought to memory in `dtype`, but for an input embedding on the CPU that is
/// no output's too: its rows are read as they are asked for.
pub fn held(config: &LlamaConfig, weights: &Weights, dtype: DType) -> Result<Weights> {
    let mut held = weights.clone();
    let on_disk = |name: &str, weight: &Weight| {
        let rows_only = name == "model.embed_tokens.weight" && !config.tied && weight.device().is_cpu();
        matches!(weight.expr(), Expr::Stored { .. }) && !rows_only
    };
    for (name, weight) in weights.iter().filter(|(name, weight)| on_disk(name, weight)) {
        held.insert(name, Weight::dense(weight.tensor()?.to_dtype(dtype)?));
    }
    Ok(held)
}
