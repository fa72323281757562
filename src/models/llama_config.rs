//! The Llama family's sizes: Llama 2 and 3, Mistral, Qwen 2 and 3, SmolLM, TinyLlama, read from Hugging
//! Face's config.json of transformers 4 or 5.

use std::path::Path;

use serde_json::{json, Value};

use super::keys::Keys;
use crate::{Error, Result};

/// The model types that are known.
pub const KNOWN: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

/// How the frequencies of rotary positions are stretched over longer texts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// The base grows with the text once it is longer than `original` tokens.
    Dynamic {
        /// The factor.
        factor: f64,
        /// Tokens that the model was made for.
        original: usize,
    },
    /// Llama 3.1's: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        /// The factor of low frequencies.
        factor: f64,
        /// Wavelengths above `original / low` are low frequencies.
        low: f64,
        /// Wavelengths below `original / high` are high frequencies.
        high: f64,
        /// Tokens that the model was first made for.
        original: usize,
    },
}

/// The sizes of a model of the Llama family.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// `llama`, `mistral`, `qwen2` or `qwen3`.
    pub model_type: String,
    /// Channels of the blocks.
    pub hidden: usize,
    /// Channels inside the MLP.
    pub mlp: usize,
    /// Blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Channels of a head, even.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Tokens that the model was made for.
    pub max_positions: usize,
    /// Added to the mean square in norms.
    pub eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Their scaling.
    pub rope_scaling: RopeScaling,
    /// Whether query, key and value have biases.
    pub qkv_bias: bool,
    /// Whether the attention's output has one.
    pub output_bias: bool,
    /// Whether the MLP's layers have biases.
    pub mlp_bias: bool,
    /// Whether queries and keys are normalized head by head.
    pub qk_norm: bool,
    /// Whether the output embedding is the input embedding.
    pub tied: bool,
    /// Tokens of the sliding window, for each block that has one.
    pub windows: Vec<Option<usize>>,
}

impl LlamaConfig {
    /// Reads config.json. `path` is for error messages.
    ///
    /// Errs on an unknown architecture (listing the known ones), on a missing size, on sizes that do not
    /// divide and on a kind of rope scaling that is not known.
    pub fn from_hf(path: &Path, json: &Value) -> Result<Self> {
        let keys = Keys::of(path, json)?;
        let known = KNOWN.join(", ");
        let Some(model_type) = keys.model_type() else {
            return Err(keys.error("model_type", &format!("found none, expected one of {known}")));
        };
        if !KNOWN.contains(&model_type) {
            return Err(keys.error("model_type", &format!("found {model_type}, known are {known}")));
        }
        let needed = |key: &str| match keys.size(key, 0)? {
            0 => Err(keys.error(key, "found none or 0, expected a size of at least 1")),
            n => Ok(n),
        };
        let (hidden, heads) = (needed("hidden_size")?, needed("num_attention_heads")?);
        let layers = needed("num_hidden_layers")?;
        let kv_heads = keys.size("num_key_value_heads", if model_type == "qwen3" { 32 } else { heads })?;
        let head_dim = match keys.size("head_dim", 0)? {
            0 if model_type == "qwen3" => 128,
            0 => hidden / heads,
            n => n,
        };
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            let message = format!("found {kv_heads}, expected a divisor of {heads} heads");
            return Err(keys.error("num_key_value_heads", &message));
        }
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(keys.error("head_dim", &format!("found {head_dim}, expected an even size")));
        }
        let activation = json.get("hidden_act").filter(|v| !v.is_null());
        if let Some(found) = activation.filter(|v| v.as_str() != Some("silu")) {
            return Err(keys.error("hidden_act", &format!("found {found}, expected \"silu\"")));
        }
        let max_positions = keys.size("max_position_embeddings", 2048)?.max(1);
        let qwen2 = model_type == "qwen2";
        let attention_bias = keys.truth("attention_bias", qwen2)?;
        let (rope_theta, rope_scaling) = rope(&keys, json, max_positions)?;
        Ok(LlamaConfig {
            model_type: model_type.into(),
            hidden,
            mlp: needed("intermediate_size")?,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocab: needed("vocab_size")?,
            max_positions,
            eps: keys.number("rms_norm_eps", 1e-6)?,
            rope_theta,
            rope_scaling,
            qkv_bias: attention_bias,
            output_bias: attention_bias && !qwen2,
            mlp_bias: keys.truth("mlp_bias", false)?,
            qk_norm: model_type == "qwen3",
            tied: keys.truth("tie_word_embeddings", false)?,
            windows: windows(&keys, json, model_type, layers)?,
        })
    }

    /// The configuration as transformers 4 and 5 read it.
    pub fn to_hf(&self) -> Value {
        let class = match self.model_type.as_str() {
            "mistral" => "MistralForCausalLM",
            "qwen2" => "Qwen2ForCausalLM",
            "qwen3" => "Qwen3ForCausalLM",
            _ => "LlamaForCausalLM",
        };
        let mut rope = match self.rope_scaling {
            RopeScaling::None => json!({ "rope_type": "default" }),
            RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
            RopeScaling::Dynamic { factor, original } => json!({
                "rope_type": "dynamic", "factor": factor, "original_max_position_embeddings": original,
            }),
            RopeScaling::Llama3 { factor, low, high, original } => json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }),
        };
        let scaling = if self.rope_scaling == RopeScaling::None { Value::Null } else { rope.clone() };
        if let Some(object) = rope.as_object_mut() {
            object.insert("rope_theta".into(), json!(self.rope_theta));
        }
        let window = self.windows.iter().flatten().next();
        let mut value = json!({
            "architectures": [class],
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "vocab_size": self.vocab,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": rope,
            "attention_bias": self.qkv_bias,
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "float32",
        });
        if let (Some(window), Some(object)) = (window, value.as_object_mut()) {
            object.insert("sliding_window".into(), json!(window));
            let kinds = self.windows.iter().map(|w| match w {
                Some(_) => "sliding_attention",
                None => "full_attention",
            });
            object.insert("layer_types".into(), kinds.collect());
            object.insert("use_sliding_window".into(), json!(true));
        }
        value
    }

    /// The name of block `i`.
    pub fn block(&self, i: usize) -> String {
        format!("model.layers.{i}")
    }

    /// Every tensor of the model, by checkpoint name and shape, from input to output. The output embedding
    /// is among them where it is not tied.
    pub fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (c, q, kv) = (self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut shapes = vec![("model.embed_tokens.weight".to_string(), vec![self.vocab, c])];
        for i in 0..self.layers {
            let block = self.block(i);
            let mut linear = |name: &str, out: usize, of: usize, bias: bool| {
                shapes.push((format!("{block}.{name}.weight"), vec![out, of]));
                if bias {
                    shapes.push((format!("{block}.{name}.bias"), vec![out]));
                }
            };
            linear("self_attn.q_proj", q, c, self.qkv_bias);
            linear("self_attn.k_proj", kv, c, self.qkv_bias);
            linear("self_attn.v_proj", kv, c, self.qkv_bias);
            linear("self_attn.o_proj", c, q, self.output_bias);
            linear("mlp.gate_proj", self.mlp, c, self.mlp_bias);
            linear("mlp.up_proj", self.mlp, c, self.mlp_bias);
            linear("mlp.down_proj", c, self.mlp, self.mlp_bias);
            if self.qk_norm {
                shapes.push((format!("{block}.self_attn.q_norm.weight"), vec![self.head_dim]));
                shapes.push((format!("{block}.self_attn.k_norm.weight"), vec![self.head_dim]));
            }
            shapes.push((format!("{block}.input_layernorm.weight"), vec![c]));
            shapes.push((format!("{block}.post_attention_layernorm.weight"), vec![c]));
        }
        shapes.push(("model.norm.weight".into(), vec![c]));
        if !self.tied {
            shapes.push(("lm_head.weight".into(), vec![self.vocab, c]));
        }
        shapes
    }

    /// Parameters of the model, a tied embedding once.
    pub fn params(&self) -> usize {
        self.shapes().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }

    /// The rotary frequencies for texts of `len` tokens, in radians a position, `head_dim / 2` of them.
    pub fn frequencies(&self, len: usize) -> Vec<f64> {
        let d = self.head_dim as f64;
        let of = |theta: f64| (0..self.head_dim / 2).map(move |i| theta.powf(-2.0 * i as f64 / d));
        match self.rope_scaling {
            RopeScaling::None => of(self.rope_theta).collect(),
            RopeScaling::Linear { factor } => of(self.rope_theta).map(|f| f / factor).collect(),
            RopeScaling::Dynamic { factor, original } => {
                let stretch = (factor * len.max(original) as f64 / original as f64) - (factor - 1.0);
                of(self.rope_theta * stretch.powf(d / (d - 2.0))).collect()
            }
            RopeScaling::Llama3 { factor, low, high, original } => of(self.rope_theta)
                .map(|f| {
                    let wavelength = std::f64::consts::TAU / f;
                    let turns = original as f64 / wavelength;
                    match turns {
                        t if t > high => f,
                        t if t < low => f / factor,
                        t => {
                            let smooth = (t - low) / (high - low);
                            (1.0 - smooth) * f / factor + smooth * f
                        }
                    }
                })
                .collect(),
        }
    }
}

/// Theta and scaling, of `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4).
fn rope(keys: &Keys<'_>, json: &Value, max_positions: usize) -> Result<(f64, RopeScaling)> {
    let table = |key: &str| json.get(key).filter(|v| !v.is_null());
    let (name, found) = match (table("rope_parameters"), table("rope_scaling")) {
        (Some(new), _) => ("rope_parameters", Some(new)),
        (None, old) => ("rope_scaling", old),
    };
    let theta = match found.and_then(|t| t.get("rope_theta")).filter(|v| !v.is_null()) {
        Some(value) => value
            .as_f64()
            .ok_or_else(|| keys.error(name, &format!("rope_theta: found {value}, expected a number")))?,
        None => keys.number("rope_theta", 10_000.0)?,
    };
    if !(theta.is_finite() && theta > 0.0) {
        return Err(keys.error("rope_theta", &format!("found {theta}, expected more than 0")));
    }
    let Some(table) = found else { return Ok((theta, RopeScaling::None)) };
    let kind = table.get("rope_type").or_else(|| table.get("type")).and_then(Value::as_str);
    let number = |key: &str, default: Option<f64>| {
        let value = table.get(key).and_then(Value::as_f64).or(default);
        let value = value.filter(|v| v.is_finite() && *v > 0.0);
        value.ok_or_else(|| keys.error(name, &format!("{key}: found none, expected a number above 0")))
    };
    let original = number("original_max_position_embeddings", Some(max_positions as f64));
    let scaling = match kind.unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: number("factor", None)? },
        "dynamic" => RopeScaling::Dynamic { factor: number("factor", None)?, original: original? as usize },
        "llama3" => RopeScaling::Llama3 {
            factor: number("factor", None)?,
            low: number("low_freq_factor", None)?,
            high: number("high_freq_factor", None)?,
            original: original? as usize,
        },
        other => {
            let message = format!("rope_type: found {other}, known are default, linear, dynamic, llama3");
            return Err(keys.error(name, &message));
        }
    };
    Ok((theta, scaling))
}

/// The sliding window of each block.
fn windows(keys: &Keys<'_>, json: &Value, model_type: &str, layers: usize) -> Result<Vec<Option<usize>>> {
    let window = keys.size("sliding_window", 0)?;
    let used = match model_type {
        "mistral" => true,
        "qwen2" | "qwen3" => keys.truth("use_sliding_window", false)?,
        _ => false,
    };
    if window == 0 || !used {
        return Ok(vec![None; layers]);
    }
    if let Some(kinds) = json.get("layer_types").and_then(Value::as_array) {
        if kinds.len() != layers {
            let message = format!("found {} entries, expected {layers}", kinds.len());
            return Err(keys.error("layer_types", &message));
        }
        let of = |kind: &Value| (kind.as_str() == Some("sliding_attention")).then_some(window);
        return Ok(kinds.iter().map(of).collect());
    }
    // Qwen: the blocks from `max_window_layers` on.
    let from = if model_type == "mistral" { 0 } else { keys.size("max_window_layers", 28)? };
    Ok((0..layers).map(|i| (i >= from).then_some(window)).collect())
}

/// Whether a configuration is of a language model, known here or not, rather than of a vision model.
pub fn is_language_model(json: &Value) -> bool {
    let known = json.get("model_type").and_then(Value::as_str).is_some_and(|t| KNOWN.contains(&t));
    let class = json.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str);
    known || class.is_some_and(|name| name.ends_with("ForCausalLM"))
}

/// An error where a configuration is not of a language model.
pub fn expect_language_model(path: &Path, json: &Value) -> Result<()> {
    match is_language_model(json) {
        true => Ok(()),
        false => {
            let found = json.get("model_type").and_then(Value::as_str).unwrap_or("none");
            let message =
                format!("model_type: found {found}, expected a language model: {}", KNOWN.join(", "));
            Err(Error::input(path, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain() -> Value {
        json!({
            "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 10,
        })
    }

    fn read(json: &Value) -> Result<LlamaConfig> {
        LlamaConfig::from_hf(Path::new("config.json"), json)
    }

    fn with(key: &str, value: Value) -> Value {
        let mut json = plain();
        json[key] = value;
        json
    }

    #[test]
    fn both_styles_of_rope_are_read() {
        let old = read(&with("rope_theta", json!(500000.0))).unwrap();
        let new = read(&with("rope_parameters", json!({"rope_theta": 500000.0, "rope_type": "default"})));
        assert_eq!(old, new.unwrap());
        assert_eq!(read(&plain()).unwrap().rope_theta, 10_000.0);
        let scaling = json!({"type": "linear", "factor": 2.0});
        let linear = read(&with("rope_scaling", scaling)).unwrap();
        assert_eq!(linear.rope_scaling, RopeScaling::Linear { factor: 2.0 });
        assert_eq!(linear.frequencies(9), [0.5]);
        let error = read(&with("rope_scaling", json!({"type": "yarn"}))).unwrap_err().to_string();
        assert!(
            error.contains("rope_scaling") && error.contains("yarn") && error.contains("llama3"),
            "{error}"
        );
        let error = read(&with("rope_scaling", json!({"type": "linear"}))).unwrap_err().to_string();
        assert!(error.contains("factor"), "{error}");
    }

    #[test]
    fn frequencies_by_hand() {
        let mut config = read(&with("head_dim", json!(4))).unwrap();
        assert_eq!(config.frequencies(1), [1.0, 0.01]);
        // Wavelengths 6.28 and 628: with 100 tokens the first turns 15.9 times, the second 0.16.
        config.rope_scaling = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 100 };
        assert_eq!(config.frequencies(1), [1.0, 0.01 / 8.0]);
        // With 2000 tokens the second turns 3.18 times: between.
        config.rope_scaling = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 2000 };
        let smooth = (2000.0 * 0.01 / std::f64::consts::TAU - 1.0) / 3.0;
        let want = (1.0 - smooth) * 0.01 / 8.0 + smooth * 0.01;
        assert!((config.frequencies(1)[1] - want).abs() < 1e-12);
        // Twice as long at factor 2: the base grows by 3^(4/2).
        config.rope_scaling = RopeScaling::Dynamic { factor: 2.0, original: 50 };
        assert_eq!(config.frequencies(50), [1.0, 0.01]);
        let long = config.frequencies(100)[1];
        assert!((long - (10_000.0 * 9.0f64).powf(-0.5)).abs() < 1e-12, "{long}");
    }

    #[test]
    fn what_is_missing_or_unknown_is_named() {
        let mut json = plain();
        json.as_object_mut().unwrap().remove("hidden_size");
        assert!(read(&json).unwrap_err().to_string().contains("hidden_size"));
        let error = read(&with("model_type", json!("gpt2"))).unwrap_err().to_string();
        assert!(error.contains("gpt2") && error.contains("qwen3"), "{error}");
        let error = read(&with("num_key_value_heads", json!(3))).unwrap_err().to_string();
        assert!(error.contains("num_key_value_heads") && error.contains('3'), "{error}");
        assert!(read(&with("hidden_act", json!("gelu"))).unwrap_err().to_string().contains("silu"));
    }

    #[test]
    fn what_is_written_is_read_again() {
        for (key, value) in [
            ("tie_word_embeddings", json!(true)),
            ("model_type", json!("qwen3")),
            ("model_type", json!("qwen2")),
            ("attention_bias", json!(true)),
            (
                "rope_parameters",
                json!({"rope_theta": 7.0, "rope_type": "llama3", "factor": 8.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 99}),
            ),
        ] {
            let mut json = with(key, value);
            json["num_key_value_heads"] = json!(2);
            let config = read(&json).unwrap();
            assert_eq!(read(&config.to_hf()).unwrap(), config, "{key}");
        }
        let mut json = with("sliding_window", json!(3));
        json["model_type"] = json!("mistral");
        let config = read(&json).unwrap();
        assert_eq!(config.windows, [Some(3), Some(3)]);
        assert_eq!(read(&config.to_hf()).unwrap(), config);
    }
}
