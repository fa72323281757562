//! A Swin goes every road that a ViT goes: trained from nothing, read from a folder, quantized with
//! products of query and key, packed and read back.

use std::path::Path;

use candle_core::{Device, Tensor};
use qtune::models::{open_model, VisionConfig};
use qtune::quantize;
use qtune::random::Random;
use qtune::recipe::{set, Recipe};
use qtune::train::Quiet;
use qtune::weights::Weights;
use serde_json::Value;

fn recipe(name: &str, changes: &[&str]) -> Recipe {
    let mut table = Recipe::table(name).unwrap();
    let small = ["data.glyphs.train=300", "data.glyphs.eval=60", "train.batch_size=20", "train.log_steps=1"];
    for change in small.iter().chain(changes) {
        set(&mut table, change).unwrap();
    }
    Recipe::resolve(table).unwrap()
}

const SMALL: [&str; 4] = ["model.kind=swin", "model.embed=12", "model.depths=[2,2]", "model.mlp_ratio=1.5"];

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Mean loss of the first and of the last ten steps of a phase.
fn losses(run: &Path, phase: &str) -> (f64, f64) {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let of: Vec<f64> = lines.filter(|l| l["phase"] == phase).filter_map(|l| l["loss"].as_f64()).collect();
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    (mean(&of[..10]), mean(&of[of.len() - 10..]))
}

/// Top-1 of the packed model and of the fake-quantized one, on 60 images: at most one falls on the other
/// side.
fn same_accuracy(summary: &Value) {
    let number = |key: &str| summary[key].as_f64().unwrap_or_else(|| panic!("{key}: {summary}"));
    assert!((number("q_top1") - number("fake_quant_top1")).abs() <= 1.7, "{summary}");
}

/// The packed model in `run` against the same weights as the dense values they stand for, behind the same
/// activation quantizers: the share of images whose logits agree, and as a measure of it the share of images whose
/// logits stay where they were when every dense weight moves by one rounding.
fn agreement(run: &Path) -> (f64, f64) {
    let packed = open_model(&run.join("model"), &Device::Cpu).unwrap();
    assert!(packed.quantization.is_some());
    let tensors = packed.weights.iter().map(|(name, w)| (name.to_string(), w.tensor().unwrap()));
    let mut dense = Weights::from_tensors(tensors.collect::<Vec<_>>());
    packed.weights.taps().for_each(|(name, rule)| dense.hang(name, rule.clone()));
    let ((rows, cols), n) = (packed.config.image_size(), 40);
    let mut random = Random::new(9, "images", &[]);
    let pixels: Vec<f32> = (0..n * rows * cols).map(|_| random.normal()).collect();
    let images = Tensor::from_vec(pixels, (n, 1, rows, cols), &Device::Cpu).unwrap();
    let tensors = dense.iter().map(|(name, w)| {
        let w = w.tensor().unwrap();
        (name.to_string(), w.affine(1.0 + f64::from(f32::EPSILON), 0.0).unwrap())
    });
    let mut moved = Weights::from_tensors(tensors.collect::<Vec<_>>());
    dense.taps().for_each(|(name, rule)| moved.hang(name, rule.clone()));
    let logits =
        |w: &Weights| values(&packed.config.build(w).unwrap().forward(&images).unwrap().logits().unwrap());
    let (a, b) = (logits(&packed.weights), logits(&dense));
    let largest = b.iter().fold(0f32, |m, v| m.max(v.abs()));
    assert!(largest > 0.1, "logits too small to tell anything: {largest}");
    let classes = packed.config.classes().len();
    let share = |a: &[f32]| {
        let pairs = a.chunks(classes).zip(b.chunks(classes));
        let same = pairs.filter(|(a, b)| a.iter().zip(*b).all(|(a, b)| (a - b).abs() <= 1e-4 * largest));
        same.count() as f64 / n as f64
    };
    (share(&a), share(&logits(&moved)))
}

#[test]
fn a_new_swin_is_trained_quantized_packed_and_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let changes = [
        &SMALL[..],
        &[
            "phase.0.steps=80",
            "phase.0.lr=6e-3",
            "phase.1.steps=10",
            "augment.flip=false",
            "augment.crop_pad=0",
        ][..],
    ]
    .concat();
    let summary = quantize::run(&recipe("vit-w2a2", &changes), dir.path(), &Device::Cpu, &Quiet).unwrap();
    // That a gradient reaches every trainable is what the trainer's first step checks.
    let (first, last) = losses(dir.path(), "float");
    assert!(last < first - 0.15, "{first} {last}");
    // The f32 steps and shifts of the activations weigh more than a model this small.
    assert!(summary["compression"].as_f64().unwrap() > 1.0, "{summary}");
    same_accuracy(&summary);
    let packed = open_model(&dir.path().join("model"), &Device::Cpu).unwrap();
    let VisionConfig::Swin(config) = &packed.config else { panic!("found a {:?}", packed.config) };
    assert_eq!((config.image_size, config.patch_size, config.window), ((28, 28), 2, 7));
    let weights = packed.quantization.unwrap().weights;
    // Six layers a block, the reduction, and the two edges.
    assert_eq!(weights.len(), 4 * 6 + 1 + 2);
    let bits = |name: &str| weights[name].grid.bits;
    assert_eq!(bits("swin.encoder.layers.0.downsample.reduction.weight"), 2);
    assert_eq!(bits("swin.embeddings.patch_embeddings.projection.weight"), 8);
    assert_eq!(packed.weights.taps().count(), 4 * 8 + 1 + 2);
    // Sums in another order can put a value on the other side of a threshold, rarely.
    let (same, moved) = agreement(dir.path());
    assert!(same >= 0.5 && same >= moved - 0.1, "{same} {moved}");

    // The float start is a Swin in a folder: a recipe for ViTs takes it as it is.
    let path = format!("model.path={:?}", dir.path().join("checkpoints/float").display());
    let again = tempfile::tempdir().unwrap();
    let changes = [path.as_str(), "phase.1.steps=0", "transform.0.bits=4", "qkr.bias=keep_q"];
    let summary = quantize::run(&recipe("vit-w2a32", &changes), again.path(), &Device::Cpu, &Quiet).unwrap();
    assert_eq!(summary["steps"], 0);
    let packed = open_model(&again.path().join("model"), &Device::Cpu).unwrap();
    assert!(packed.weights.contains("swin.encoder.layers.1.blocks.1.attention.self.qk.weight"));
    assert_eq!(agreement(again.path()).0, 1.0);
}

#[test]
fn products_of_query_and_key_train_in_windows() {
    let dir = tempfile::tempdir().unwrap();
    let changes = [
        &SMALL[..],
        &["phase.0.steps=20", "phase.1.steps=12", "activation.bits=4", "transform.0.bits=4"],
        &["qkr.bias=keep_q", "qkr.targets=[\"*.layers.0.*\"]"],
    ]
    .concat();
    let summary = quantize::run(&recipe("vit-w2a2", &changes), dir.path(), &Device::Cpu, &Quiet).unwrap();
    same_accuracy(&summary);
    let packed = open_model(&dir.path().join("model"), &Device::Cpu).unwrap();
    let has = |name: &str| packed.weights.contains(&format!("swin.encoder.layers.{name}.weight"));
    assert!(has("0.blocks.1.attention.self.qk") && !has("0.blocks.1.attention.self.query"));
    assert!(has("1.blocks.1.attention.self.query"));
    // As above; more thresholds at 4 bits and behind the sums over the whole width.
    let (same, moved) = agreement(dir.path());
    assert!(same >= 0.5 && same >= moved - 0.1, "{same} {moved}");
}

#[test]
fn sizes_of_a_new_swin_are_checked() {
    for (change, expected) in [
        ("model.depths=[2]", "model.depths has 1 stages and model.heads 2"),
        ("model.heads=[5, 4]", "model.heads = 5 does not divide the 12 channels of stage 0"),
        ("model.depths=[2, 0]", "a size of 0"),
        ("model.mlp_ratio=-1", "model.mlp_ratio = -1"),
        ("model.hidden=64", "hidden"),
    ] {
        let mut table = Recipe::table("vit-w2a2").unwrap();
        SMALL.iter().chain([&change]).for_each(|c| set(&mut table, c).unwrap());
        let error = Recipe::resolve(table).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
}
