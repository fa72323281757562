//! What the examples have in common: their arguments, small random models with adapters where there are
//! none, and a few numbers printed.

// Each example uses a part of it.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use qtune::adapter::{
    Adapter, AdapterConfig, LoraConfig, Method, MissConfig, Modules, Save, Selection, Targets, Training,
    Variant,
};
use qtune::data::text::Tokenizer;
use qtune::models::{open_weights, read_config};
use qtune::random::Random;
use qtune::weights::checkpoint::save;
use qtune::Result;
use serde::de::DeserializeOwned;
use serde_json::{json, Value};

/// The models of candle-transformers that are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Llama,
    Mistral,
    Qwen2,
    Bert,
    Vit,
}

/// Runs `forward` (a model's folder and adapters to logits or hidden states, their last dimension printed)
/// for `MODEL_DIR [ADAPTER_DIR...]` of the command line; without them for a small random model as it is
/// and with each of three adapters.
pub fn run(kind: Kind, forward: impl Fn(&Path, &[&Path]) -> anyhow::Result<Tensor>) -> anyhow::Result<()> {
    let given: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    if let Some((model, adapters)) = given.split_first() {
        let adapters: Vec<&Path> = adapters.iter().map(PathBuf::as_path).collect();
        return print("", &forward(model, &adapters)?);
    }
    let dir = tempfile::tempdir()?;
    let model = dir.path().join("model");
    write_model(kind, &model, &config_of(kind))?;
    println!("a small random model, for want of MODEL_DIR [ADAPTER_DIR...]");
    print("base", &forward(&model, &[])?)?;
    for (name, method) in [("lora", lora()), ("miss", miss(Variant::Additive)), ("bat", miss(Variant::Bat))] {
        let adapter = dir.path().join(name);
        write_adapter(kind, &model, &adapter, method)?;
        print(name, &forward(&model, &[&adapter])?)?;
    }
    Ok(())
}

/// Prints the five largest values of the last row, with their places.
fn print(name: &str, values: &Tensor) -> anyhow::Result<()> {
    let width = values.dim(candle_core::D::Minus1)?;
    let rows = values.to_dtype(DType::F32)?.reshape(((), width))?;
    let mut row: Vec<(usize, f32)> = rows.get(rows.dim(0)? - 1)?.to_vec1()?.into_iter().enumerate().collect();
    row.sort_by(|a, b| b.1.total_cmp(&a.1));
    let top: Vec<String> = row.iter().take(5).map(|(place, value)| format!("{place}: {value:.4}")).collect();
    println!("{name:>6}  {}", top.join("  "));
    Ok(())
}

/// config.json of a model as candle-transformers' type for it.
pub fn config<T: DeserializeOwned>(dir: &Path) -> anyhow::Result<T> {
    Ok(serde_json::from_value(read_config(dir)?.1)?)
}

/// Tokens of a sentence, `[1, len]`; numbers where the folder holds no tokenizer.
pub fn prompt(dir: &Path) -> anyhow::Result<Tensor> {
    let ids = match dir.join("tokenizer.json").exists() {
        true => Tokenizer::open(dir, None)?.encode("The capital of France is", true)?,
        false => vec![1, 5, 9, 13, 17, 21],
    };
    Ok(Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?)
}

/// Normal numbers.
pub fn normal(name: &str, shape: &[usize], std: f32) -> Result<Tensor> {
    let mut random = Random::new(7, name, &[]);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.normal() * std).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// A LoRA of rank 4.
pub fn lora() -> Method {
    Method::Lora(LoraConfig { r: 4, alpha: 8.0, ..LoraConfig::default() })
}

/// A shared block of rank 8.
pub fn miss(variant: Variant) -> Method {
    Method::Miss(MissConfig { r: 8, mini_r: 4, variant, ..MissConfig::default() })
}

/// A configuration of two small blocks.
pub fn config_of(kind: Kind) -> Value {
    let mut json = json!({
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 40, "max_position_embeddings": 32,
    });
    let own = match kind {
        Kind::Bert => json!({
            "model_type": "bert", "architectures": ["BertModel"], "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0, "type_vocab_size": 2, "initializer_range": 0.02,
            "layer_norm_eps": 1e-12, "pad_token_id": 0,
        }),
        Kind::Vit => json!({
            "model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_act": "gelu",
            "layer_norm_eps": 1e-12, "image_size": 16, "patch_size": 4, "num_channels": 3, "qkv_bias": true,
            "id2label": {"0": "cat", "1": "dog", "2": "hen", "3": "cow", "4": "pig"},
            "label2id": {"cat": 0, "dog": 1, "hen": 2, "cow": 3, "pig": 4},
        }),
        language => {
            let (model_type, architecture) = match language {
                Kind::Mistral => ("mistral", "MistralForCausalLM"),
                Kind::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
                _ => ("llama", "LlamaForCausalLM"),
            };
            json!({
                "model_type": model_type, "architectures": [architecture], "hidden_act": "silu",
                "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
                "tie_word_embeddings": false, "sliding_window": 32, "use_sliding_window": false,
                "max_window_layers": 2,
            })
        }
    };
    if let (Value::Object(json), Value::Object(own)) = (&mut json, own) {
        json.extend(own);
    }
    json
}

/// Names and shapes of the tensors of a model, as published files have them.
fn shapes_of(kind: Kind, config: &Value) -> Vec<(String, Vec<usize>)> {
    let size = |key: &str| config[key].as_u64().unwrap_or_default() as usize;
    let (hidden, mlp, vocab) = (size("hidden_size"), size("intermediate_size"), size("vocab_size"));
    let mut shapes: Vec<(String, Vec<usize>)> = Vec::new();
    let mut add = |name: String, shape: &[usize], bias: bool| {
        shapes.push((format!("{name}.weight"), shape.to_vec()));
        if bias {
            shapes.push((format!("{name}.bias"), vec![shape[0]]));
        }
    };
    let layers = 0..size("num_hidden_layers");
    match kind {
        Kind::Bert => {
            for (name, rows) in [
                ("word", vocab),
                ("position", size("max_position_embeddings")),
                ("token_type", size("type_vocab_size")),
            ] {
                add(format!("bert.embeddings.{name}_embeddings"), &[rows, hidden], false);
            }
            add("bert.embeddings.LayerNorm".into(), &[hidden], true);
            for block in layers.map(|i| format!("bert.encoder.layer.{i}")) {
                for name in ["self.query", "self.key", "self.value", "output.dense"] {
                    add(format!("{block}.attention.{name}"), &[hidden, hidden], true);
                }
                add(format!("{block}.attention.output.LayerNorm"), &[hidden], true);
                add(format!("{block}.intermediate.dense"), &[mlp, hidden], true);
                add(format!("{block}.output.dense"), &[hidden, mlp], true);
                add(format!("{block}.output.LayerNorm"), &[hidden], true);
            }
        }
        Kind::Vit => {
            let (patch, channels) = (size("patch_size"), size("num_channels"));
            let patches = (size("image_size") / patch).pow(2);
            let embeddings = "vit.embeddings";
            add(format!("{embeddings}.patch_embeddings.projection"), &[hidden, channels, patch, patch], true);
            for block in layers.map(|i| format!("vit.encoder.layer.{i}")) {
                for name in ["attention.query", "attention.key", "attention.value", "output.dense"] {
                    add(format!("{block}.attention.{name}"), &[hidden, hidden], true);
                }
                add(format!("{block}.intermediate.dense"), &[mlp, hidden], true);
                add(format!("{block}.output.dense"), &[hidden, mlp], true);
                add(format!("{block}.layernorm_before"), &[hidden], true);
                add(format!("{block}.layernorm_after"), &[hidden], true);
            }
            add("vit.layernorm".into(), &[hidden], true);
            let classes = config["id2label"].as_object().map_or(0, |labels| labels.len());
            add("classifier".into(), &[classes, hidden], true);
            shapes.push((format!("{embeddings}.cls_token"), vec![1, 1, hidden]));
            shapes.push((format!("{embeddings}.position_embeddings"), vec![1, patches + 1, hidden]));
        }
        Kind::Llama | Kind::Mistral | Kind::Qwen2 => {
            let values = hidden / size("num_attention_heads") * size("num_key_value_heads");
            let bias = kind == Kind::Qwen2;
            add("model.embed_tokens".into(), &[vocab, hidden], false);
            for block in layers.map(|i| format!("model.layers.{i}")) {
                add(format!("{block}.input_layernorm"), &[hidden], false);
                add(format!("{block}.self_attn.q_proj"), &[hidden, hidden], bias);
                add(format!("{block}.self_attn.k_proj"), &[values, hidden], bias);
                add(format!("{block}.self_attn.v_proj"), &[values, hidden], bias);
                add(format!("{block}.self_attn.o_proj"), &[hidden, hidden], false);
                add(format!("{block}.post_attention_layernorm"), &[hidden], false);
                add(format!("{block}.mlp.gate_proj"), &[mlp, hidden], false);
                add(format!("{block}.mlp.up_proj"), &[mlp, hidden], false);
                add(format!("{block}.mlp.down_proj"), &[hidden, mlp], false);
            }
            add("model.norm".into(), &[hidden], false);
            if config["tie_word_embeddings"] != json!(true) {
                add("lm_head".into(), &[vocab, hidden], false);
            }
        }
    }
    shapes
}

/// Writes a model of random numbers into the folder `dir`: norms near one, all else near zero.
pub fn write_model(kind: Kind, dir: &Path, config: &Value) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir)?;
    std::fs::write(dir.join("config.json"), serde_json::to_vec_pretty(config)?)?;
    let mut tensors = Vec::new();
    for (name, shape) in shapes_of(kind, config) {
        let values = normal(&name, &shape, 0.2)?;
        let is_norm = name.to_ascii_lowercase().contains("norm") && name.ends_with(".weight");
        let values = if is_norm { (values + 1.0)? } else { values };
        tensors.push((name, values));
    }
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    save(&dir.join("model.safetensors"), &tensors, &metadata)?;
    Ok(())
}

/// Writes an adapter for the model in the folder `model`, its numbers random as if trained.
pub fn write_adapter(kind: Kind, model: &Path, dir: &Path, method: Method) -> anyhow::Result<()> {
    let targets = match kind {
        Kind::Bert | Kind::Vit => vec!["query", "value", "intermediate.dense"],
        _ => vec!["q_proj", "v_proj", "down_proj"],
    };
    let task = matches!(kind, Kind::Llama | Kind::Mistral | Kind::Qwen2).then(|| "CAUSAL_LM".to_string());
    let targets = Targets::List(targets.into_iter().map(str::to_string).collect());
    let config = AdapterConfig {
        method,
        task_type: task,
        base: None,
        revision: None,
        auto_mapping: None,
        selection: Selection { targets, ..Selection::default() },
    };
    let mut weights = open_weights(model, &Device::Cpu)?;
    let modules = Modules::of(&read_config(model)?.1, &weights)?;
    let started = config.start(&mut weights, &modules, &Training::new(7))?;
    for param in weights.params() {
        let step = normal(&param.name, param.var.dims(), 0.1)?;
        param.var.set(&(param.var.as_tensor() + step)?)?;
    }
    let mut adapter = Adapter::of(&config, &weights, &modules)?;
    if let Some(start) = started.start {
        // PiSSA, as LoRA on the model as it was.
        adapter = adapter.converted(&start)?;
    }
    adapter.save(dir, &Save::default())?;
    Ok(())
}
