//! Other people's models over our store: candle-transformers' ViT, its code unchanged.

use candle_core::{DType, Device, Tensor};
use candle_transformers::models::vit;
use qtune::models::{open_model, open_weights};
use qtune::quantize;
use qtune::random::Random;
use qtune::recipe::{set, Recipe};
use qtune::train::Quiet;

/// Logits of f32 models of two blocks whose sums run in another order.
const LOGITS: f32 = 1e-4;

#[test]
fn candle_transformers_vit_over_a_packed_folder_gives_our_logits() {
    let mut table = Recipe::table("glyphs").unwrap();
    for change in [
        "data.glyphs.train=200",
        "data.glyphs.eval=20",
        "model.hidden=32",
        "model.layers=2",
        "phase.0.steps=20",
        "phase.1.steps=10",
    ] {
        set(&mut table, change).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let recipe = Recipe::resolve(table).unwrap();
    quantize::run(&recipe, dir.path(), &Device::Cpu, &Quiet).unwrap();
    let model = dir.path().join("model");

    let opened = open_model(&model, &Device::Cpu).unwrap();
    assert!(opened.quantization.is_some());
    let ours = opened.config.build(&opened.weights).unwrap();

    let text = std::fs::read_to_string(model.join("config.json")).unwrap();
    let config: vit::Config = serde_json::from_str(&text).unwrap();
    let store = open_weights(&model, &Device::Cpu).unwrap();
    let classes = opened.config.classes().len();
    let theirs = vit::Model::new(&config, classes, store.var_builder(DType::F32, &Device::Cpu)).unwrap();

    let mut random = Random::new(5, "images", &[]);
    let pixels: Vec<f32> = (0..3 * 28 * 28).map(|_| random.normal()).collect();
    let images = Tensor::from_vec(pixels, (3, 1, 28, 28), &Device::Cpu).unwrap();
    let a = ours.forward(&images).unwrap().logits().unwrap().to_vec2::<f32>().unwrap();
    let b = theirs.forward(&images).unwrap().to_vec2::<f32>().unwrap();
    let largest = b.iter().flatten().fold(0f32, |m, v| m.max(v.abs()));
    assert!(largest > 0.1, "logits too small to tell anything: {largest}");
    for (a, b) in a.iter().flatten().zip(b.iter().flatten()) {
        assert!((a - b).abs() <= LOGITS * largest, "{a} {b}");
    }
}

#[test]
fn a_shape_that_a_model_does_not_expect_is_named() {
    let store = qtune::weights::Weights::from_tensors([(
        "a.weight".to_string(),
        Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap(),
    )]);
    let vb = store.var_builder(DType::F32, &Device::Cpu);
    assert!(vb.get((2, 3), "a.weight").is_ok());
    let error = vb.get((3, 2), "a.weight").unwrap_err().to_string();
    assert!(error.contains("a.weight") && error.contains("[2, 3]") && error.contains("[3, 2]"), "{error}");
    let error = vb.get((3, 2), "a.wieght").unwrap_err().to_string();
    assert!(error.contains("nearest: a.weight"), "{error}");
}
