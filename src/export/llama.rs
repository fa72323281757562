//! The Llama family as GGUF knows it: architecture, sizes, names, and the order of rows that its rotary
//! positions expect.

use candle_core::Tensor;

use super::header::Value;
use crate::models::llama_config::RopeScaling;
use crate::models::LlamaConfig;
use crate::{Error, On, Result};

/// The architecture's name: Mistral's models are Llama's there.
pub(super) fn architecture(config: &LlamaConfig) -> &'static str {
    match config.model_type.as_str() {
        "qwen2" => "qwen2",
        "qwen3" => "qwen3",
        _ => "llama",
    }
}

/// Whether rotary positions turn neighbouring channels (0, 1), not those half a head apart (0, d / 2).
fn interleaved(config: &LlamaConfig) -> bool {
    architecture(config) == "llama"
}

/// The sizes, each under the architecture's name. `vocab` counts the rows of the table of tokens.
pub(super) fn metadata(config: &LlamaConfig, vocab: usize) -> Result<Vec<(String, Value)>> {
    let arch = architecture(config);
    let mut entries = Vec::new();
    let mut put = |key: &str, value: Value| entries.push((format!("{arch}.{key}"), value));
    put("vocab_size", count("vocab_size", vocab)?);
    put("context_length", count("max_position_embeddings", config.max_positions)?);
    put("embedding_length", count("hidden_size", config.hidden)?);
    put("block_count", count("num_hidden_layers", config.layers)?);
    put("feed_forward_length", count("intermediate_size", config.mlp)?);
    put("attention.head_count", count("num_attention_heads", config.heads)?);
    put("attention.head_count_kv", count("num_key_value_heads", config.kv_heads)?);
    put("attention.key_length", count("head_dim", config.head_dim)?);
    put("attention.value_length", count("head_dim", config.head_dim)?);
    put("attention.layer_norm_rms_epsilon", Value::F32(config.eps as f32));
    put("rope.dimension_count", count("head_dim", config.head_dim)?);
    put("rope.freq_base", Value::F32(config.rope_theta as f32));
    if let RopeScaling::Linear { factor } = config.rope_scaling {
        put("rope.scaling.type", Value::Text("linear".into()));
        put("rope.scaling.factor", Value::F32(factor as f32));
    }
    Ok(entries)
}

fn count(key: &str, n: usize) -> Result<Value> {
    let message = || Error::usage(format!("{key}: found {n}, more than GGUF counts"));
    u32::try_from(n).map(Value::U32).map_err(|_| message())
}

/// What the file cannot say of the model, a line each.
pub(super) fn left_out(config: &LlamaConfig) -> Vec<String> {
    let mut notes = Vec::new();
    if let RopeScaling::Dynamic { original, .. } = config.rope_scaling {
        notes.push(format!(
            "rope scaling dynamic: GGUF has no such kind, left out: the model is the same up to {original} tokens"
        ));
    }
    if let Some(window) = config.windows.iter().flatten().min() {
        notes.push(format!(
            "sliding window: llama.cpp has none for this architecture, left out: the model is the same up to {window} tokens"
        ));
    }
    notes
}

/// `rope_freqs.weight`: by how much each rotary frequency is divided, `[head_dim / 2]`, where Llama 3.1's
/// scaling is in use.
pub(super) fn rope_factors(config: &LlamaConfig) -> Option<Vec<f32>> {
    let RopeScaling::Llama3 { .. } = config.rope_scaling else { return None };
    let plain = LlamaConfig { rope_scaling: RopeScaling::None, ..config.clone() };
    let pairs = plain.frequencies(1).into_iter().zip(config.frequencies(1));
    Some(pairs.map(|(plain, scaled)| (plain / scaled) as f32).collect())
}

/// The name in GGUF of a checkpoint's tensor. Errs on one that the family does not have.
pub(super) fn renamed(name: &str) -> Result<String> {
    let strange = || Error::tensor(name, "GGUF has no name for it in this architecture");
    let whole = match name {
        "model.embed_tokens.weight" => Some("token_embd.weight"),
        "model.norm.weight" => Some("output_norm.weight"),
        "lm_head.weight" => Some("output.weight"),
        _ => None,
    };
    if let Some(whole) = whole {
        return Ok(whole.to_string());
    }
    let (layer, rest) =
        name.strip_prefix("model.layers.").and_then(|n| n.split_once('.')).ok_or_else(strange)?;
    let (module, leaf) = rest.rsplit_once('.').ok_or_else(strange)?;
    let module = match module {
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" => "ffn_norm",
        _ => return Err(strange()),
    };
    let known = ["weight", "bias"].contains(&leaf) && layer.bytes().all(|b| b.is_ascii_digit());
    match known && !layer.is_empty() {
        true => Ok(format!("blk.{layer}.{module}.{leaf}")),
        false => Err(strange()),
    }
}

/// A tensor with its rows in the order that the file's rotary positions expect.
///
/// Hugging Face turns channel i of a head with i + d / 2, ggml's Llama 2 i with 2 i + 1: within each head of
/// a query or key, row `h d / 2 + i` becomes row `2 i + h`. The products of queries and keys stay.
pub(super) fn ordered(config: &LlamaConfig, name: &str, tensor: &Tensor) -> Result<Tensor> {
    let of = |module: &str| name.contains(&format!("self_attn.{module}."));
    let heads = match (of("q_proj"), of("k_proj")) {
        (true, _) => config.heads,
        (_, true) => config.kv_heads,
        _ => return Ok(tensor.clone()),
    };
    if !interleaved(config) {
        return Ok(tensor.clone());
    }
    let shape = tensor.dims().to_vec();
    let turned = || -> candle_core::Result<Tensor> {
        let split = (heads, 2, config.head_dim / 2, ());
        tensor.reshape(split)?.transpose(1, 2)?.contiguous()?.reshape(shape.as_slice())
    };
    turned().on(name)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::Device;
    use serde_json::json;

    use super::*;

    fn config(model_type: &str, more: serde_json::Value) -> LlamaConfig {
        let mut value = json!({
            "model_type": model_type, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 16,
        });
        value.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        LlamaConfig::from_hf(Path::new("config.json"), &value).unwrap()
    }

    #[test]
    fn rows_of_each_head_by_hand() {
        let llama = config("llama", json!({}));
        let rows = |n: i64| Tensor::arange(0, n, &Device::Cpu).unwrap().reshape((n as usize, 1)).unwrap();
        let flat = |t: Tensor| t.flatten_all().unwrap().to_vec1::<i64>().unwrap();
        let q = ordered(&llama, "model.layers.0.self_attn.q_proj.weight", &rows(8)).unwrap();
        assert_eq!(q.dims(), [8, 1]);
        assert_eq!(flat(q), [0, 2, 1, 3, 4, 6, 5, 7]);
        let bias = rows(4).flatten_all().unwrap();
        let k = ordered(&llama, "model.layers.0.self_attn.k_proj.bias", &bias).unwrap();
        assert_eq!(flat(k), [0, 2, 1, 3]);
        let v = ordered(&llama, "model.layers.0.self_attn.v_proj.weight", &rows(4)).unwrap();
        assert_eq!(flat(v), [0, 1, 2, 3]);
        let q = ordered(&config("qwen2", json!({})), "model.layers.0.self_attn.q_proj.weight", &rows(8));
        assert_eq!(flat(q.unwrap()), [0, 1, 2, 3, 4, 5, 6, 7]);
        // Rows that do not make heads are an error with the tensor's name.
        let odd = ordered(&llama, "model.layers.0.self_attn.q_proj.weight", &rows(7)).unwrap_err();
        assert!(odd.to_string().contains("q_proj"), "{odd}");
    }

    /// A turn of the pairs that ggml makes of ordered rows is that of Hugging Face, so products agree.
    #[test]
    fn scores_stay_under_either_rotation() {
        let (d, angles) = (4usize, [0.3f64, 1.1]);
        let q = [0.5, -1.0, 2.0, 0.25];
        let k = [1.5, 0.75, -0.5, 1.0];
        let turn = |x: &[f64], pair: &dyn Fn(usize) -> (usize, usize), by: f64| {
            let mut out = x.to_vec();
            for (i, angle) in angles.iter().enumerate() {
                let (a, b) = pair(i);
                let (sin, cos) = (angle * by).sin_cos();
                (out[a], out[b]) = (x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos);
            }
            out
        };
        let halves = |i: usize| (i, i + d / 2);
        let neighbours = |i: usize| (2 * i, 2 * i + 1);
        let reorder = |x: &[f64]| vec![x[0], x[2], x[1], x[3]];
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let ours = dot(&turn(&q, &halves, 3.0), &turn(&k, &halves, 1.0));
        let theirs = dot(&turn(&reorder(&q), &neighbours, 3.0), &turn(&reorder(&k), &neighbours, 1.0));
        assert!((ours - theirs).abs() < 1e-12);
        // Rows as they were would not do.
        let as_they_were = dot(&turn(&q, &neighbours, 3.0), &turn(&k, &neighbours, 1.0));
        assert!((ours - as_they_were).abs() > 0.1);
    }

    #[test]
    fn every_tensor_of_the_family_has_a_name() {
        let mut names = std::collections::HashSet::new();
        for (kind, more) in
            [("llama", json!({"attention_bias": true, "mlp_bias": true})), ("qwen3", json!({}))]
        {
            for (name, _) in config(kind, more).shapes() {
                names.insert(renamed(&name).unwrap());
            }
        }
        for name in ["token_embd.weight", "output.weight", "blk.1.attn_k.bias", "blk.0.attn_q_norm.weight"] {
            assert!(names.contains(name), "{name}");
        }
        for name in
            ["model.layers.x.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.codes", "vit.norm.weight"]
        {
            let error = renamed(name).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn scaling_is_said_or_told() {
        let linear = config("llama", json!({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}));
        let said = metadata(&linear, 20).unwrap();
        let of = |key: &str| said.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone());
        assert_eq!(of("llama.rope.scaling.factor"), Some(Value::F32(4.0)));
        assert_eq!(of("llama.vocab_size"), Some(Value::U32(20)));
        assert_eq!(of("llama.attention.head_count_kv"), Some(Value::U32(1)));
        assert_eq!(rope_factors(&linear), None);

        let dynamic =
            json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64});
        assert!(left_out(&config("llama", dynamic))[0].contains("up to 64 tokens"));
        assert!(left_out(&linear).is_empty());

        // Wavelengths of 2 pi and 628 tokens: the short one stays, the long one is stretched by 8.
        let three = json!({"rope_theta": 10000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}});
        assert_eq!(rope_factors(&config("llama", three)), Some(vec![1.0, 8.0]));
    }
}
