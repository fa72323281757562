//! The models that are trained: their sizes, random weights where speed does not depend on them, a batch.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use qtune::adapter::{AdapterConfig, Modules, Training};
use qtune::data::text::TextBatch;
use qtune::data::Batch;
use qtune::kernels::{self, Arithmetic};
use qtune::language::{Predict, Rows};
use qtune::models::{held, open_llama, Llama, LlamaConfig, VisionConfig, VitConfig};
use qtune::optim::adamw::AdamWConfig;
use qtune::optim::OptimizerConfig;
use qtune::quantize;
use qtune::random::Random;
use qtune::recipe::{set, DistillKind, Recipe};
use qtune::train::{step, Classify, Quiet, Recordings, Task};
use qtune::weights::{Param, Weights};

use super::Failure;

/// Every case. One that ends in `-bf16` multiplies in bfloat16.
pub const ALL: [&str; 26] = [
    "deit-tiny",
    "deit-tiny-bf16",
    "vit-fashion",
    "llama-15m",
    "llama-15m-bf16",
    "smol-miss-64",
    "smol-bone-64",
    "smol-lora-16",
    "stories-full-0",
    "stories-lora-8",
    "stories-miss-16",
    "stories-bone-4",
    "vit-fashion-w2a32",
    "vit-fashion-w2a2",
    "vit-fashion-w2a2-qkr",
    "deit-tiny-w2a32",
    "deit-tiny-w2a2",
    "deit-tiny-w2a2-qkr",
    "infer-deit-tiny-1-w2a2",
    "infer-deit-tiny-1-w2a2-qkr",
    "infer-deit-tiny-8-w2a2",
    "infer-deit-tiny-8-w2a2-qkr",
    "infer-vit-fashion-1-w2a2",
    "infer-vit-fashion-1-w2a2-qkr",
    "infer-vit-fashion-8-w2a2",
    "infer-vit-fashion-8-w2a2-qkr",
];

/// A step on the same batch as the one before it.
pub type Step = Box<dyn FnMut() -> Result<(), Failure>>;

/// What is run in Python beside a case, and under which name there.
pub fn peers(case: &str) -> Vec<(&'static str, String)> {
    let plain = plain(case).unwrap_or(case);
    match (case.starts_with("infer-"), plain == case) {
        (true, _) => vec![("PyTorch f32", plain.to_string()), ("onnxruntime int8", format!("{plain}-int8"))],
        (false, true) => vec![("PyTorch", case.to_string())],
        (false, false) => Vec::new(),
    }
}

/// The plain case that a quantized one is measured against.
pub fn plain(case: &str) -> Option<&str> {
    case.split_once("-w2").map(|(plain, _)| plain)
}

/// Turns that count.
pub fn turns(case: &str) -> usize {
    match case.split('-').next() {
        Some("stories") => 25,
        Some("smol") => 5,
        Some("infer") => 15,
        _ => 9,
    }
}

/// The step of a case on a device. What `benches/gpu.rs` times beside those of [`ALL`]: `deit-small`, `llama-1b-METHOD-RANK`
/// and, for a try of the bench itself, `deit-mini` and `llama-mini-METHOD-RANK`; images that end in `-graph` are recorded.
pub fn step(case: &str, data: &str, device: &Device) -> Result<Step, Failure> {
    let name = match case.strip_suffix("-bf16") {
        Some(name) => {
            kernels::set_arithmetic(Arithmetic::Bf16);
            name
        }
        None => case,
    };
    let parts: Vec<&str> = name.split('-').collect();
    match parts.as_slice() {
        ["deit", "tiny", rest @ ..] => vision(deit_tiny(), 8, rest, false, device),
        ["deit", "small", rest @ ..] => vision(deit_small(), 128, rest, false, device),
        ["deit", "mini", rest @ ..] => vision(deit_mini(), 2, rest, false, device),
        ["vit", "fashion", rest @ ..] => vision(vit_fashion(), 100, rest, false, device),
        ["infer", "deit", "tiny", batch, rest @ ..] => {
            vision(deit_tiny(), batch.parse()?, rest, true, device)
        }
        ["infer", "vit", "fashion", batch, rest @ ..] => {
            vision(vit_fashion(), batch.parse()?, rest, true, device)
        }
        ["llama", "15m"] => {
            let config = llama(32000, 288, 768, 6, (6, 6), 256)?;
            language(config, None, (4, 256), ("full", 0), DType::F32, device)
        }
        ["smol", method, rank] => {
            let config = llama(49152, 576, 1536, 30, (9, 3), 256)?;
            language(config, None, (1, 256), (method, rank.parse()?), DType::F32, device)
        }
        ["stories", method, rank] => {
            let opened = open_llama(&Path::new(data).join("models/stories260K-hf"), device)?;
            let weights = held(&opened.config, &opened.weights, DType::F32)?;
            let (model, adapter) = ((opened.config, opened.json), (*method, rank.parse()?));
            language(model, Some(weights), (8, 256), adapter, DType::F32, device)
        }
        // The shape of TinyLlama.
        ["llama", "1b", method, rank] => {
            let config = llama(32000, 2048, 5632, 22, (32, 4), 512)?;
            language(config, None, (4, 512), (method, rank.parse()?), DType::BF16, device)
        }
        ["llama", "mini", method, rank] => {
            let config = llama(64, 32, 64, 2, (4, 2), 16)?;
            language(config, None, (2, 16), (method, rank.parse()?), DType::BF16, device)
        }
        _ => Err(format!("no case {case}").into()),
    }
}

fn classes(count: usize) -> Vec<String> {
    (0..count).map(|i| i.to_string()).collect()
}

fn deit_tiny() -> VitConfig {
    VitConfig {
        image_size: (224, 224),
        patch_size: 16,
        channels: 3,
        hidden: 192,
        layers: 12,
        heads: 3,
        mlp: 768,
        eps: 1e-6,
        qkv_bias: true,
        distilled: false,
        two_heads: false,
        classes: classes(1000),
    }
}

fn deit_small() -> VitConfig {
    VitConfig { hidden: 384, heads: 6, mlp: 1536, ..deit_tiny() }
}

fn deit_mini() -> VitConfig {
    VitConfig {
        image_size: (32, 32),
        hidden: 32,
        layers: 2,
        heads: 2,
        mlp: 64,
        classes: classes(10),
        ..deit_tiny()
    }
}

fn vit_fashion() -> VitConfig {
    VitConfig {
        image_size: (28, 28),
        patch_size: 4,
        channels: 1,
        hidden: 96,
        layers: 6,
        heads: 4,
        mlp: 192,
        classes: classes(10),
        ..deit_tiny()
    }
}

/// Random tensors of these shapes: norms one, biases zero.
fn fresh(shapes: &[(String, Vec<usize>)], dtype: DType, device: &Device) -> Result<Weights, Failure> {
    let mut tensors = Vec::new();
    for (name, shape) in shapes {
        // A thousand million normals are drawn where they stay.
        if device.is_cuda() && shape.len() > 1 {
            let drawn = Tensor::randn(0f32, 0.02, shape.as_slice(), device)?.to_dtype(dtype)?;
            tensors.push((name.clone(), drawn));
            continue;
        }
        let mut random = Random::new(0, name, &[]);
        let fixed = match (name.ends_with(".bias"), shape.len()) {
            (true, _) => Some(0.0),
            (false, 1) => Some(1.0),
            _ => None,
        };
        let count = shape.iter().product();
        let values =
            (0..count).map(|_| fixed.unwrap_or_else(|| 0.02 * random.normal())).collect::<Vec<f32>>();
        let made = Tensor::from_vec(values, shape.as_slice(), device)?.to_dtype(dtype)?;
        tensors.push((name.clone(), made));
    }
    Ok(Weights::from_tensors(tensors))
}

/// A step of `task` on `batch` under AdamW.
fn stepping<T: Task + 'static>(task: T, batch: T::Batch, params: Vec<Param>, device: &Device) -> Step
where
    T::Batch: 'static,
{
    let config = OptimizerConfig::Adamw(AdamWConfig::default());
    let mut optimizer = config.build();
    let (batches, device) = ([batch], device.clone());
    Box::new(move || {
        let mut rule = step::Rule {
            optimizer: optimizer.as_mut(),
            config: &config,
            lr: 1e-4,
            factors: &[],
            clip: 0.0,
            free: &[],
            first: false,
        };
        step::take(&task, &batches, &params, &mut rule, &device)?;
        Ok(())
    })
}

fn vision(
    config: VitConfig,
    batch: usize,
    how: &[&str],
    infer: bool,
    device: &Device,
) -> Result<Step, Failure> {
    let (quantized, recordings) = match how {
        [how @ .., "graph"] => (how, Some(Recordings::default())),
        how => (how, None),
    };
    let (count, channels, (height, width)) = (config.classes.len(), config.channels, config.image_size);
    let config = VisionConfig::Vit(config);
    let mut random = Random::new(0, "images", &[]);
    let pixels: Vec<f32> = (0..batch * channels * height * width).map(|_| random.normal()).collect();
    let images = Tensor::from_vec(pixels, (batch, channels, height, width), device)?;
    let mut weights = fresh(&config.shapes(), DType::F32, device)?.trainable()?;
    if let [bits, rest @ ..] = quantized {
        let mut table = Recipe::table("vit-w2a32")?;
        if *bits == "w2a2" {
            set(&mut table, "activation.bits=2")?;
        }
        if rest == ["qkr"] {
            set(&mut table, "qkr.bias=\"keep_q\"")?;
        }
        let recipe = Recipe::resolve(table)?;
        let mut chosen = quantize::targets(&recipe, &weights)?;
        quantize::qkr::reparameterize(&recipe, &config, false, &mut weights, &mut chosen)?;
        for (name, target) in chosen {
            let w = weights.get(&name)?.tensor()?.detach();
            let rule = recipe.transform[target.transform].kind.training(target.bits, None, &w)?;
            weights.wrap(&name, rule)?;
        }
        quantize::calibrate(&recipe, &config, &mut weights, &images, true, &Quiet)?;
    }
    if infer {
        // As a packed model is read: its codes, and what training held is gone.
        let settled = if quantized.is_empty() { weights.settled()? } else { weights.packed()? };
        drop(weights);
        let model = config.build(&settled)?;
        return Ok(Box::new(move || {
            model.forward(&images)?.logits()?;
            Ok(())
        }));
    }
    let labels = (0..batch).map(|i| (i % count) as u32).collect();
    let indices = (0..batch as u32).collect();
    let batch = Batch { images, labels, targets: None, indices, epoch: 0 };
    let model = config.build(&weights)?;
    let task = Classify {
        model,
        teacher: None,
        distill: DistillKind::None,
        drop_path: None,
        heads: None,
        recordings,
    };
    Ok(stepping(task, batch, weights.params(), device))
}

fn llama(
    vocab: usize,
    hidden: usize,
    mlp: usize,
    layers: usize,
    (heads, groups): (usize, usize),
    positions: usize,
) -> Result<(LlamaConfig, serde_json::Value), Failure> {
    let json = serde_json::json!({
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocab,
        "max_position_embeddings": positions, "rms_norm_eps": 1e-5,
        // Only small models tie the two.
        "tie_word_embeddings": hidden < 1024,
    });
    Ok((LlamaConfig::from_hf(Path::new("bench"), &json)?, json))
}

fn language(
    (config, json): (LlamaConfig, serde_json::Value),
    weights: Option<Weights>,
    (batch, len): (usize, usize),
    (method, rank): (&str, usize),
    dtype: DType,
    device: &Device,
) -> Result<Step, Failure> {
    let mut weights = match weights {
        Some(weights) => weights,
        None => fresh(&config.shapes(), dtype, device)?,
    };
    let training = Training::new(0);
    if method == "full" {
        weights = weights.trainable()?;
    } else {
        let (kind, init) = match method {
            "lora" => ("LORA", "\"init_lora_weights\": true"),
            "bone" => ("MISS", "\"init_weights\": \"bat\""),
            _ => ("MISS", "\"init_weights\": true"),
        };
        let text = format!(
            "{{\"peft_type\": \"{kind}\", \"task_type\": \"CAUSAL_LM\", \"r\": {rank}, {init}, \
             \"target_modules\": \"all-linear\"}}"
        );
        let modules = Modules::of_shapes(&json, &config.shapes());
        let adapter = AdapterConfig::parse(Path::new("bench"), &text, &mut Vec::new())?;
        adapter.start(&mut weights, &modules, &training)?;
    }
    let count = batch * len;
    let token = |i: usize| (i * 7919 % config.vocab) as u32;
    let text = TextBatch {
        tokens: (0..count).map(token).collect(),
        batch,
        len,
        targets: (1..=count).map(token).collect(),
        positions: (0..batch).flat_map(|_| 0..len as u32).collect(),
        segments: vec![1; count],
        samples: (0..batch as u32).collect(),
        trained: count,
    };
    let model = Llama::new(&config, &weights, dtype)?;
    let task = Predict { model, teacher: None, checkpointing: false, pass: Arc::clone(&training.pass) };
    Ok(stepping(task, Rows { batch: text, number: 0 }, weights.params(), device))
}
