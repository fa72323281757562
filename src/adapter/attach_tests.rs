//! Attaching by hand: what is added, what is refused.

use candle_core::{DType, Device, Tensor};
use serde_json::json;

use super::attach::*;
use super::files::tests::{adapter, ramp};
use super::files::Adapter;
use super::method::{LoraConfig, Method, MissConfig, Variant};
use super::modules::tests::{llama, llama_shapes};
use super::names::{Form, Part};
use super::place::Ranks;
use crate::weights::Weights;

const Q: &str = "model.layers.0.self_attn.q_proj";

fn store(tied: bool) -> Weights {
    Weights::from_tensors(llama_shapes(tied).into_iter().map(|(name, shape)| (name, ramp(&shape))))
}

fn lora(r: usize) -> LoraConfig {
    LoraConfig { r, alpha: 2.0 * r as f64, ..LoraConfig::default() }
}

/// LoRA of rank 2 on one layer's query.
fn query(config: LoraConfig) -> Adapter {
    let (a, b) = (ramp(&[2, 8]), ramp(&[8, 2]));
    adapter(Method::Lora(config), &[Q], &[(Q, Part::LoraA, a), (Q, Part::LoraB, b)])
}

fn miss(variant: Variant, block: &[usize]) -> Adapter {
    let config = MissConfig { r: 2, mini_r: 4, variant, ..MissConfig::default() };
    adapter(Method::Miss(config), &[Q], &[(Q, Part::Block, ramp(block))])
}

fn value(weights: &Weights, name: &str) -> Vec<Vec<f32>> {
    weights.get(&format!("{name}.weight")).unwrap().tensor().unwrap().to_vec2().unwrap()
}

#[track_caller]
fn refused(adapter: &Adapter, parts: &[&str]) {
    let mut weights = store(false);
    let error = adapter.attach(&mut weights, &llama(false), &Attach::default()).unwrap_err().to_string();
    parts.iter().for_each(|part| assert!(error.contains(part), "{error:?} lacks {part:?}"));
    assert_eq!(value(&weights, Q), value(&store(false), Q));
}

#[test]
fn lora_scales_and_adds() {
    let (mut weights, before) = (store(false), store(false));
    let adapter = query(lora(2));
    let half = Attach { scale: Some(0.5), ..Attach::default() };
    let attached = adapter.attach(&mut weights, &llama(false), &half).unwrap();
    assert_eq!(attached.wrapped, [format!("{Q}.weight")]);
    let (a, b) = (ramp(&[2, 8]).to_vec2::<f32>().unwrap(), ramp(&[8, 2]).to_vec2::<f32>().unwrap());
    let (w, got) = (value(&before, Q), value(&weights, Q));
    for o in 0..8 {
        for i in 0..8 {
            // alpha / r = 2, halved.
            let want = w[o][i] + b[o][0] * a[0][i] + b[o][1] * a[1][i];
            assert!((got[o][i] - want).abs() < 1e-6);
        }
    }
    // On top of itself, and the other way round taken off again.
    let minus = Attach { scale: Some(-0.5), ..Attach::default() };
    adapter.attach(&mut weights, &llama(false), &minus).unwrap();
    for (got, want) in value(&weights, Q).concat().iter().zip(w.concat()) {
        assert!((got - want).abs() < 1e-6);
    }
}

#[test]
fn zero_adapters_and_scale_zero_change_no_bit() {
    for variant in [Variant::Additive, Variant::Bat, Variant::Mini] {
        let shape: &[usize] = match variant {
            Variant::Bat => &[4, 2, 2],
            Variant::Mini => &[2, 4],
            _ => &[2, 8],
        };
        let full = miss(variant, shape);
        let config = full.config.method.clone();
        let zeros = Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let zero = adapter(config, &[Q], &[(Q, Part::Block, zeros)]);
        let none = Attach { scale: Some(0.0), ..Attach::default() };
        for (adapter, how) in [(&zero, Attach::default()), (&full, none)] {
            let mut weights = store(false);
            adapter.attach(&mut weights, &llama(false), &how).unwrap();
            assert_eq!(value(&weights, Q), value(&store(false), Q), "{variant:?}");
        }
        let mut weights = store(false);
        full.attach(&mut weights, &llama(false), &Attach::default()).unwrap();
        assert_ne!(value(&weights, Q), value(&store(false), Q), "{variant:?}");
    }
}

#[test]
fn what_does_not_add_up_has_no_scale() {
    let half = Attach { scale: Some(0.5), ..Attach::default() };
    let refuse = |adapter: &Adapter, how: &Attach| {
        adapter.attach(&mut store(false), &llama(false), how).unwrap_err().to_string()
    };
    assert!(refuse(&miss(Variant::Bat, &[4, 2, 2]), &half).contains("block affine"));
    let mut dora = query(LoraConfig { dora: true, ..lora(2) });
    dora = adapter(
        dora.config.method.clone(),
        &[Q],
        &[(Q, Part::LoraA, ramp(&[2, 8])), (Q, Part::LoraB, ramp(&[8, 2])), (Q, Part::Magnitude, ramp(&[8]))],
    );
    assert!(refuse(&dora, &half).contains("DoRA"));
    let training = Attach { training: Some(Training::new(0)), ..half };
    assert!(refuse(&miss(Variant::Mini, &[2, 4]), &training).contains("own scale"));
    let nan = Attach { scale: Some(f64::NAN), ..Attach::default() };
    assert!(refuse(&query(lora(2)), &nan).contains("finite"));
}

#[test]
fn every_mismatch_is_named() {
    let wrong = |shape_a: &[usize], shape_b: &[usize], config| {
        adapter(
            Method::Lora(config),
            &[Q],
            &[(Q, Part::LoraA, ramp(shape_a)), (Q, Part::LoraB, ramp(shape_b))],
        )
    };
    refused(&query(lora(4)), &["lora_A.weight", "found rank 2, expected 4"]);
    refused(&wrong(&[2, 9], &[8, 2], lora(2)), &["lora_A", "[2, 9]", "[2, 8]", Q, "another base"]);
    refused(&wrong(&[2, 8], &[8, 3], lora(2)), &["lora_B", "[8, 3]", "[8, 2]"]);
    refused(&query(LoraConfig { dora: true, ..lora(2) }), &["lora_magnitude_vector", "not in the file"]);
    refused(&query(LoraConfig { bias: true, ..lora(2) }), &["lora_B.bias", "not in the file"]);
    refused(&miss(Variant::Additive, &[3, 8]), &["miss_block", "found rank 3", "expected 2"]);
    refused(&miss(Variant::Additive, &[2, 9]), &["miss_block", "[2, 9]", "[2, 8]"]);
    refused(&miss(Variant::Bat, &[2, 4, 4]), &["miss_block", "[4, 2, 2]"]);
    let extra = |path: &str, part: Part, shape: &[usize]| {
        let (a, b) = (ramp(&[2, 8]), ramp(&[8, 2]));
        let tensors = [(Q, Part::LoraA, a), (Q, Part::LoraB, b), (path, part, ramp(shape))];
        adapter(Method::Lora(lora(2)), &[Q], &tensors)
    };
    refused(&extra("model.layers.9.q", Part::LoraA, &[2, 8]), &["layers.9.q", "no module"]);
    refused(&extra("model.layers.1.self_attn.q_proj", Part::LoraA, &[2, 8]), &["does not choose"]);
    refused(&extra(Q, Part::Magnitude, &[8]), &["lora_magnitude_vector", "asks for no such part"]);
    refused(
        &extra("model.norm", Part::Own("weight".into()), &[8]),
        &["model.norm.weight", "modules_to_save"],
    );
    refused(&extra(Q, Part::Base("bias".into()), &[8]), &["base_layer.bias", "bias"]);
    let mut two = query(lora(2));
    two.config.selection.targets = super::Targets::List(vec!["q_proj".into()]);
    refused(&two, &["layers.1.self_attn.q_proj", "not in the file"]);
    two.config.selection.modules_to_save = vec!["norm".into()];
    two.config.selection.targets = super::Targets::List(vec![Q.into()]);
    refused(&two, &["model.norm.weight", "modules_to_save"]);
}

#[test]
fn ranks_and_alphas_by_pattern() {
    let config = |ranks: &[(&str, usize)], alphas: &[(&str, f64)]| LoraConfig {
        rank_pattern: ranks.iter().map(|(p, r)| (p.to_string(), *r)).collect(),
        alpha_pattern: alphas.iter().map(|(p, a)| (p.to_string(), *a)).collect(),
        ..lora(8)
    };
    let scale =
        |config: &LoraConfig| Ranks::new(config).unwrap().scale(config, &Form::Same.spellings(Q), "t", 2);
    assert_eq!(scale(&config(&[("q_proj", 2)], &[])).unwrap(), 8.0);
    assert_eq!(scale(&config(&[("q_proj", 2)], &[("q", 3.0), (".*attn.q_proj", 5.0)])).unwrap(), 2.5);
    let rslora = LoraConfig { rslora: true, ..config(&[("q_proj", 2)], &[("q_proj", 2.0)]) };
    assert!((scale(&rslora).unwrap() - 2f64.sqrt()).abs() < 1e-12);
    // Sorting put another pattern first: the tensor is believed.
    assert!(scale(&config(&[("layers.0.*q_proj", 4), ("q_proj", 2)], &[])).is_ok());
    let error = scale(&config(&[("q_proj", 4)], &[])).unwrap_err().to_string();
    assert!(error.contains("found rank 2, expected 4"), "{error}");
}

#[test]
fn whole_modules_and_biases_take_the_place_of_the_bases() {
    let norm = Tensor::ones(8, DType::F32, &Device::Cpu).unwrap();
    let mut adapter = adapter(
        Method::Lora(lora(2)),
        &[Q],
        &[
            (Q, Part::LoraA, ramp(&[2, 8])),
            (Q, Part::LoraB, ramp(&[8, 2])),
            ("model.norm", Part::Own("weight".into()), norm),
        ],
    );
    adapter.config.selection.modules_to_save = vec!["norm".into()];
    let mut weights = store(false);
    let how = Attach { training: Some(Training::new(1)), ..Attach::default() };
    let attached = adapter.attach(&mut weights, &llama(false), &how).unwrap();
    assert_eq!(attached.replaced, ["model.norm.weight"]);
    let mut names: Vec<String> = weights.params().into_iter().map(|p| p.name).collect();
    names.sort();
    let q = format!("{Q}.weight");
    assert_eq!(names, [format!("{q}.lora_A"), format!("{q}.lora_B"), "model.norm.weight".to_string()]);
    let mut frozen = store(false);
    adapter.attach(&mut frozen, &llama(false), &Attach::default()).unwrap();
    assert!(frozen.params().is_empty());
    let ones = frozen.get("model.norm.weight").unwrap().tensor().unwrap();
    assert_eq!(ones.to_vec1::<f32>().unwrap(), [1.0; 8]);
}

#[test]
fn tied_heads_come_apart_where_the_table_changes() {
    let table = "model.embed_tokens";
    let tensors = [(table, Part::EmbeddingA, ramp(&[2, 16])), (table, Part::EmbeddingB, ramp(&[8, 2]))];
    let mut weights = store(true);
    let embed = adapter(Method::Lora(lora(2)), &["embed_tokens"], &tensors);
    let attached = embed.attach(&mut weights, &llama(true), &Attach::default()).unwrap();
    assert!(attached.untied);
    assert_eq!(value(&weights, "lm_head"), value(&store(true), table));
    assert_ne!(value(&weights, table), value(&store(true), table));
    // Nothing of it where neither is touched.
    let mut weights = store(true);
    assert!(!query(lora(2)).attach(&mut weights, &llama(true), &Attach::default()).unwrap().untied);
    assert!(!weights.contains("lm_head.weight"));
}

#[test]
fn headless_adapters_are_recognised() {
    let path = "layers.0.self_attn.q_proj";
    let tensors = [(path, Part::LoraA, ramp(&[2, 8])), (path, Part::LoraB, ramp(&[8, 2]))];
    let adapter = adapter(Method::Lora(lora(2)), &[path], &tensors);
    let attached = adapter.attach(&mut store(false), &llama(false), &Attach::default()).unwrap();
    assert_eq!(attached.wrapped, [format!("{Q}.weight")]);
    assert!(attached.notes[0].contains("without its head"), "{:?}", attached.notes);
}

#[test]
fn a_start_taken_out_of_the_base_needs_that_base() {
    let raw = query(LoraConfig { init: json!("pissa"), ..lora(2) });
    refused(&raw, &["pissa", "plain LoRA"]);
    let stored = Attach { residual: Residual::Stored, ..Attach::default() };
    raw.attach(&mut store(false), &llama(false), &stored).unwrap();
    let rebuild = Attach { residual: Residual::Rebuild, ..Attach::default() };
    raw.attach(&mut store(false), &llama(false), &rebuild).unwrap();
    let other = query(LoraConfig { init: json!("olora"), ..lora(2) });
    assert!(other.attach(&mut store(false), &llama(false), &rebuild).is_err());
}
