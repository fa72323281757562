//! A language model under each adapter, and trained whole: loss and gradients as on the CPU.

use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use qtune::adapter::{Adapter, AdapterConfig, Attach, Modules, Save, Training};
use qtune::data::text::{TextBatch, NO_TARGET};
use qtune::language::{batch_loss, tiny, Predict, Rows, Start};
use qtune::models::{Llama, Places};
use qtune::random::Random;
use qtune::train::Task;
use qtune::weights::{Weight, Weights};

use crate::device::{close, device, flat, F32};

/// Two rows of fourteen tokens, some of which are asked for nothing.
fn batch() -> TextBatch {
    let (batch, len) = (2, 14);
    let tokens: Vec<u32> = (0..batch * len).map(|i| (i * 7 % 50 + 40) as u32).collect();
    let target = |i: usize| if i % 5 == 3 || i % len == len - 1 { NO_TARGET } else { tokens[i + 1] };
    let targets: Vec<u32> = (0..batch * len).map(target).collect();
    let trained = targets.iter().filter(|t| **t != NO_TARGET).count();
    TextBatch {
        batch,
        len,
        targets,
        positions: (0..batch).flat_map(|_| 0..len as u32).collect(),
        segments: vec![1; batch * len],
        samples: (0..batch as u32).collect(),
        trained,
        tokens,
    }
}

fn config(text: &str) -> AdapterConfig {
    let text = format!("{{{text}, \"base_model_name_or_path\": \"tiny\", \"task_type\": \"CAUSAL_LM\"}}");
    AdapterConfig::parse(Path::new("adapter_config.json"), &text, &mut Vec::new()).unwrap()
}

/// Every adapter that is started here; dropout is drawn alike on both sides.
fn adapters() -> Vec<(&'static str, AdapterConfig)> {
    let targets = "\"target_modules\": [\"q_proj\", \"down_proj\"]";
    let table = "\"target_modules\": [\"v_proj\", \"embed_tokens\"]";
    let lora = "\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8";
    let miss = "\"peft_type\": \"MISS\", \"r\": 4";
    vec![
        ("lora", config(&format!("{lora}, {targets}"))),
        ("lora with dropout", config(&format!("{lora}, \"lora_dropout\": 0.2, {targets}"))),
        ("lora of the table", config(&format!("{lora}, {table}"))),
        ("dora", config(&format!("{lora}, \"use_dora\": true, {targets}"))),
        ("pissa", config(&format!("{lora}, \"init_lora_weights\": \"pissa\", {targets}"))),
        ("miss", config(&format!("{miss}, \"init_weights\": true, {targets}"))),
        ("mini", config(&format!("{miss}, \"mini_r\": 4, \"init_weights\": \"mini\", {targets}"))),
        ("bat", config(&format!("{miss}, \"init_weights\": \"bat\", {targets}"))),
    ]
}

/// The tiny model in a type, and its modules.
fn model(device: &Device, dtype: DType) -> (Start, Modules) {
    let mut start = tiny(device).unwrap();
    let cast = |w: &Weight| w.tensor().unwrap().to_dtype(dtype).unwrap();
    let all: Vec<_> = start.weights.iter().map(|(name, w)| (name.to_string(), cast(w))).collect();
    start.weights = Weights::from_tensors(all);
    let modules = Modules::of_shapes(&start.json, &start.config.shapes());
    (start, modules)
}

/// Moves every trainable from where it started, alike on all devices.
fn stir(weights: &Weights) {
    for param in weights.params() {
        let mut random = Random::new(3, &param.name, &[]);
        let by: Vec<f32> = (0..param.var.elem_count()).map(|_| 0.05 * random.normal()).collect();
        let by = Tensor::from_vec(by, param.var.shape(), param.var.device()).unwrap();
        param.var.set(&(param.var.as_tensor() + by).unwrap()).unwrap();
    }
}

/// The loss and the gradients by name.
fn learn(
    start: &Start,
    weights: &Weights,
    dtype: DType,
    how: (bool, &Device),
) -> (f64, Vec<(String, Tensor)>) {
    let (checkpointing, device) = how;
    let model = Llama::new(&start.config, weights, dtype).unwrap();
    let task = Predict { model, teacher: None, checkpointing, pass: Arc::new(AtomicU64::new(0)) };
    let params = weights.params();
    let pass = task.learn(&Rows { batch: batch(), number: 0 }, &params, device).unwrap();
    let named = params.iter().zip(pass.grads).map(|(p, grad)| (p.name.clone(), grad.expect("a gradient")));
    (pass.loss.read().unwrap(), named.collect())
}

/// Relative to the largest entry, as gradients of whole models are.
#[track_caller]
fn alike(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    let scale = flat(want).iter().fold(0f64, |m, v| m.max(v.abs())).max(1e-12);
    close(what, &(got / scale).unwrap(), &(want / scale).unwrap(), tolerance);
}

#[test]
fn adapters_learn_as_on_the_cpu() {
    let Some(device) = device() else { return };
    // Sums of f32 through two layers and back; the same of activations in bf16.
    for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::BF16, 0.1)] {
        for (kind, config) in adapters() {
            let of = |device: &Device, dtype: DType| {
                let (start, modules) = model(device, dtype);
                let mut weights = start.weights.clone();
                config.start(&mut weights, &modules, &Training::new(5)).unwrap();
                assert!(weights.params().iter().all(|p| p.var.device().same_device(device)), "{kind}");
                stir(&weights);
                (start, weights, modules)
            };
            // The numbers of the CPU are those of weights rounded alike, in f32.
            let (here, weights, _) = of(&Device::Cpu, dtype);
            let (want, grads) = learn(&here, &weights, DType::F32, (false, &Device::Cpu));
            let (there, weights, modules) = of(&device, dtype);
            for checkpointing in [false, true] {
                let (got, found) = learn(&there, &weights, dtype, (checkpointing, &device));
                assert!(
                    (got - want).abs() <= tolerance * 0.3 * want,
                    "{kind}, {dtype:?}: {got}, want {want}"
                );
                for ((name, got), (_, want)) in found.iter().zip(&grads) {
                    assert_eq!(got.dtype(), DType::F32, "{kind}, {name}");
                    alike(&format!("{kind}, {dtype:?}, {name}"), got, want, tolerance);
                }
            }
            // What is written can be read and put on the model again, wherever that lies.
            if dtype == DType::F32 && kind != "pissa" {
                let dir = tempfile::tempdir().unwrap();
                let adapter = Adapter::of(&config, &weights, &modules).unwrap();
                adapter.save(&dir.path().join("a"), &Save::default()).unwrap();
                let mut again = there.weights.clone();
                let read = Adapter::open(&dir.path().join("a")).unwrap();
                read.attach(&mut again, &modules, &Attach::default()).unwrap();
                let loss = |weights: &Weights| {
                    let model = Llama::new(&there.config, weights, DType::F32).unwrap();
                    batch_loss(&model, &batch(), &device).unwrap()
                };
                let ((a, n), (b, m)) = (loss(&again), loss(&weights.settled().unwrap()));
                assert!(n == m && (a - b).abs() < 1e-4 * b, "{kind}: {a} {b}");
            }
        }
    }
}

/// All weights trained, the tied table among them: it gets its rows' gradient and the classifier's.
#[test]
fn a_whole_model_learns_as_on_the_cpu() {
    let Some(device) = device() else { return };
    let of = |device: &Device| {
        let (start, _) = model(device, DType::F32);
        let weights = start.weights.trainable().unwrap();
        (start, weights)
    };
    let (here, weights) = of(&Device::Cpu);
    let (want, grads) = learn(&here, &weights, DType::F32, (false, &Device::Cpu));
    let (there, weights) = of(&device);
    for checkpointing in [false, true] {
        let (got, found) = learn(&there, &weights, DType::F32, (checkpointing, &device));
        assert!((got - want).abs() < 1e-4 * want, "{got} {want}");
        for ((name, got), (_, want)) in found.iter().zip(&grads) {
            alike(name, got, want, 1e-4);
        }
    }
}

#[test]
fn ids_that_are_none_are_named() {
    let Some(device) = device() else { return };
    let (start, _) = model(&device, DType::F32);
    let llama = Llama::new(&start.config, &start.weights, DType::F32).unwrap();
    let vocab = start.config.vocab as u32;
    let x = llama.hidden(&[40, 41, 42], &Places::plain(1, 3), &device).unwrap().flatten(0, 1).unwrap();
    let want = llama.loss(&x, &[1, 2, 3]).unwrap();
    assert!(flat(&want)[0].is_finite());
    let said = llama.loss(&x, &[1, vocab, 3]).unwrap_err().to_string();
    assert!(said.contains(&format!("found token {vocab}, expected one below {vocab}")), "{said}");
    let said = llama.embed(&[40, vocab], &Places::plain(1, 2), &device).unwrap_err().to_string();
    assert!(said.contains(&vocab.to_string()), "{said}");
    // The loss is that of all logits.
    let logits = llama.head(&x).unwrap();
    let ids = Tensor::new(&[1u32, 2, 3], &device).unwrap();
    close("loss", &want, &qtune::kernels::cross_entropy(&logits, &ids).unwrap(), F32);
}
