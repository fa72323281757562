//! Merging on a tiny model of our own: heads that share a table, packed bases, half precision, and what is
//! refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use qtune::adapter::{merge, unmerge, Merge, Onto, Record};
use qtune::models::open_weights;
use qtune::random::Random;
use qtune::transform::OnGrid;
use qtune::weights::checkpoint::save;
use qtune::weights::format::{stored_tensors, QuantizationConfig};
use qtune::weights::{Centering, Checkpoint, Grid, Weights};
use serde_json::{json, Value};

const Q: &str = "model.layers.0.self_attn.q_proj";
const DOWN: &str = "model.layers.0.mlp.down_proj";
const TABLE: &str = "model.embed_tokens";

fn random(name: &str, shape: &[usize]) -> Tensor {
    let mut random = Random::new(5, name, &[]);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.normal()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn values(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn json_of(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// A model with one layer: its folder's tensors by name.
fn base_tensors(tied: bool, dtype: DType) -> Vec<(String, Tensor)> {
    let shapes: [(&str, &[usize]); 5] =
        [(TABLE, &[16, 8]), (Q, &[8, 8]), (DOWN, &[8, 12]), ("model.norm", &[8]), ("lm_head", &[16, 8])];
    let mut tensors: Vec<(String, Tensor)> = shapes
        .iter()
        .filter(|(name, _)| !(tied && *name == "lm_head"))
        .map(|(name, shape)| {
            let name = format!("{name}.weight");
            let tensor = random(&name, shape).to_dtype(dtype).unwrap();
            (name, tensor)
        })
        .collect();
    tensors.push((format!("{Q}.bias"), random("bias", &[8]).to_dtype(dtype).unwrap()));
    tensors
}

fn config(tied: bool) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 16,
        "tie_word_embeddings": tied, "rms_norm_eps": 1e-5, "dtype": "float32",
    })
}

fn write(dir: &Path, config: &Value, tensors: &[(String, Tensor)]) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), serde_json::to_vec_pretty(config).unwrap()).unwrap();
    save(&dir.join("model.safetensors"), tensors, &BTreeMap::new()).unwrap();
}

fn write_adapter(dir: &Path, config: &Value, tensors: &[(&str, Tensor)]) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let name = |name: &str| format!("base_model.model.{name}");
    let tensors: Vec<_> = tensors.iter().map(|(n, t)| (name(n), t.clone())).collect();
    save(&dir.join("adapter_model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
}

/// Additive blocks on the layer's two weights, as large as `by`.
fn blocks(dir: &Path, by: f64) {
    let config = json!({"peft_type": "MISS", "r": 4, "target_modules": ["q_proj", "down_proj"]});
    let block = |name: &str| (random(name, &[4, 8]) * by).unwrap();
    let names = [format!("{Q}.miss_block"), format!("{DOWN}.miss_block")];
    write_adapter(dir, &config, &[(&names[0], block("a")), (&names[1], block("b"))]);
}

/// One temporary folder with a base and additive blocks.
fn setting(tied: bool, dtype: DType) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    write(&dir.path().join("base"), &config(tied), &base_tensors(tied, dtype));
    blocks(&dir.path().join("blocks"), 0.1);
    let path = dir.path().to_path_buf();
    (dir, path)
}

fn with(adapters: &[&Path]) -> Merge {
    Merge { adapters: adapters.iter().map(|a| (a.to_path_buf(), None)).collect(), ..Merge::default() }
}

fn refused(base: &Path, out: &Path, how: &Merge, parts: &[&str]) {
    let error = merge(base, out, how).unwrap_err().to_string();
    parts.iter().for_each(|part| assert!(error.contains(part), "{error:?} lacks {part:?}"));
    assert!(!error.contains('\n') && !out.exists());
}

fn tensor(dir: &Path, name: &str) -> Tensor {
    Checkpoint::open(dir).unwrap().tensor(name, &Device::Cpu).unwrap()
}

#[test]
fn everything_beside_the_weights_goes_along() {
    let (_keep, dir) = setting(false, DType::F32);
    let base = dir.join("base");
    for (name, bytes) in [("tokenizer.json", "{}"), ("chat_template.jinja", "{{x}}\n"), ("merges.txt", "a b")]
    {
        fs::write(base.join(name), bytes).unwrap();
    }
    fs::write(base.join("pytorch_model.bin"), "pickle").unwrap();
    fs::write(base.join(".hidden"), "").unwrap();
    let out = dir.join("out");
    let merged = merge(&base, &out, &with(&[&dir.join("blocks")])).unwrap();
    assert_eq!((merged.tensors, merged.changes.tensors), (6, 2));
    let mut names: Vec<String> =
        fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let expected = [
        "chat_template.jinja",
        "config.json",
        "merges.txt",
        "model.safetensors",
        "qtune_merge.json",
        "tokenizer.json",
    ];
    assert_eq!(names, expected);
    assert_eq!(fs::read_to_string(out.join("chat_template.jinja")).unwrap(), "{{x}}\n");
    // The largest change is an entry of a block.
    let blocks = Checkpoint::open(&dir.join("blocks/adapter_model.safetensors")).unwrap();
    let largest = blocks.names().flat_map(|n| values(&blocks.tensor(n, &Device::Cpu).unwrap()));
    let largest = largest.fold(0f32, |m, v| m.max(v.abs()));
    assert!((merged.changes.largest.0 - f64::from(largest)).abs() < 1e-6, "{:?}", merged.changes);
    // Nothing is overwritten.
    assert!(merge(&base, &out, &with(&[&dir.join("blocks")])).is_err());
}

#[test]
fn merging_is_remembered_and_undone() {
    let (_keep, dir) = setting(false, DType::F32);
    let (base, one, two) = (dir.join("base"), dir.join("one"), dir.join("two"));
    blocks(&dir.join("more"), 0.2);
    merge(&base, &one, &with(&[&dir.join("blocks")])).unwrap();
    merge(&one, &two, &with(&[&dir.join("more")])).unwrap();
    for again in ["blocks", "more"] {
        refused(&two, &dir.join("x"), &with(&[&dir.join(again)]), &["merged into this model already", again]);
    }
    let both = [dir.join("blocks"), dir.join("blocks")];
    refused(&base, &dir.join("x"), &with(&[&both[0], &both[1]]), &["given twice"]);
    let record = Record::read(&two).unwrap().unwrap();
    assert_eq!((record.adapters.len(), record.before.len()), (1, 1));
    unmerge(&two, None, &dir.join("back")).unwrap();
    let read = |d: &str| fs::read(dir.join(d).join("model.safetensors")).unwrap();
    assert_eq!(read("back"), read("one"));
    unmerge(&dir.join("back"), None, &dir.join("further")).unwrap();
    assert_eq!(read("further"), read("base"));
    // A base that has changed, or moved.
    fs::rename(&base, dir.join("moved")).unwrap();
    let error = unmerge(&one, None, &dir.join("x")).unwrap_err().to_string();
    assert!(error.contains("not there any more"), "{error}");
    unmerge(&one, Some(&dir.join("moved")), &dir.join("found")).unwrap();
    assert_eq!(read("found"), read("moved"));
    let error = unmerge(&one, Some(&two), &dir.join("x")).unwrap_err().to_string();
    assert!(error.contains("not the base of"), "{error}");
}

#[test]
fn zeros_and_changes_below_rounding_are_errors() {
    let (_keep, dir) = setting(false, DType::BF16);
    blocks(&dir.join("zero"), 0.0);
    blocks(&dir.join("tiny"), 1e-6);
    for name in ["zero", "tiny"] {
        refused(&dir.join("base"), &dir.join("x"), &with(&[&dir.join(name)]), &["no tensor of", "changed"]);
    }
    refused(&dir.join("base"), &dir.join("x"), &with(&[]), &["no adapter"]);
    let off = Merge { adapters: vec![(dir.join("blocks"), Some(0.0))], ..Merge::default() };
    refused(&dir.join("base"), &dir.join("x"), &off, &["no tensor of"]);
}

#[test]
fn half_precision_is_rounded_once() {
    let (_keep, dir) = setting(false, DType::BF16);
    let (base, out) = (dir.join("base"), dir.join("out"));
    merge(&base, &out, &with(&[&dir.join("blocks")])).unwrap();
    let name = format!("{Q}.weight");
    let (w, got) = (tensor(&base, &name), tensor(&out, &name));
    assert_eq!(got.dtype(), DType::BF16);
    let (w, block) = (values(&w), values(&(random("a", &[4, 8]) * 0.1).unwrap()));
    let exact: Vec<f32> = (0..64).map(|i| w[i] + block[(i % 8) % 4 * 8 + i / 8]).collect();
    let want = Tensor::new(exact, &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
    assert_eq!(values(&got), values(&want));
    // Asked for in f32, everything is, and the configuration says so.
    let wide = Merge { dtype: Some(DType::F32), ..with(&[&dir.join("blocks")]) };
    merge(&base, &dir.join("wide"), &wide).unwrap();
    assert_eq!(tensor(&dir.join("wide"), "model.norm.weight").dtype(), DType::F32);
    assert_eq!(
        values(&tensor(&dir.join("wide"), "model.norm.weight")),
        values(&tensor(&base, "model.norm.weight"))
    );
    let half = Merge { dtype: Some(DType::F16), ..with(&[&dir.join("blocks")]) };
    merge(&base, &dir.join("half"), &half).unwrap();
    assert_eq!(json_of(&dir.join("half/config.json"))["dtype"], "float16");
}

#[test]
fn a_shared_table_comes_apart_where_it_has_to() {
    let (_keep, dir) = setting(true, DType::F32);
    let base = dir.join("base");
    merge(&base, &dir.join("plain"), &with(&[&dir.join("blocks")])).unwrap();
    assert_eq!(fs::read(dir.join("plain/config.json")).unwrap(), fs::read(base.join("config.json")).unwrap());
    assert!(!Checkpoint::open(&dir.join("plain")).unwrap().contains("lm_head.weight"));

    let config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["embed_tokens"]});
    let (a, b) = (format!("{TABLE}.lora_embedding_A"), format!("{TABLE}.lora_embedding_B"));
    write_adapter(&dir.join("table"), &config, &[(&a, random("a", &[2, 16])), (&b, random("b", &[8, 2]))]);
    let out = dir.join("apart");
    merge(&base, &out, &with(&[&dir.join("table")])).unwrap();
    let table = format!("{TABLE}.weight");
    assert_eq!(values(&tensor(&out, "lm_head.weight")), values(&tensor(&base, &table)));
    assert_ne!(values(&tensor(&out, &table)), values(&tensor(&base, &table)));
    let mut expected = json_of(&base.join("config.json"));
    expected["tie_word_embeddings"] = json!(false);
    assert_eq!(json_of(&out.join("config.json")), expected);

    let config = json!({"peft_type": "LORA", "r": 2, "target_modules": ["lm_head"]});
    let tensors =
        [("lm_head.lora_A.weight", random("a", &[2, 8])), ("lm_head.lora_B.weight", random("b", &[16, 2]))];
    write_adapter(&dir.join("head"), &config, &tensors);
    let out = dir.join("headed");
    merge(&base, &out, &with(&[&dir.join("head")])).unwrap();
    assert_eq!(values(&tensor(&out, &table)), values(&tensor(&base, &table)));
    assert_ne!(values(&tensor(&out, "lm_head.weight")), values(&tensor(&base, &table)));
    assert_eq!(json_of(&out.join("config.json"))["tie_word_embeddings"], false);
}

#[test]
fn a_larger_vocabulary_is_written_down() {
    let (_keep, dir) = setting(false, DType::F32);
    let base = dir.join("base");
    let config = json!({
        "peft_type": "MISS", "r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"],
    });
    let block = format!("{Q}.miss_block");
    let of = |rows: usize, head: usize| {
        let table = format!("{TABLE}.weight");
        let to = dir.join(format!("vocab-{rows}-{head}"));
        let tensors = [
            (block.as_str(), random("a", &[4, 8])),
            (table.as_str(), random("t", &[rows, 8])),
            ("lm_head.weight", random("h", &[head, 8])),
        ];
        write_adapter(&to, &config, &tensors);
        to
    };
    merge(&base, &dir.join("out"), &with(&[&of(18, 18)])).unwrap();
    assert_eq!(json_of(&dir.join("out/config.json"))["vocab_size"], 18);
    assert_eq!(tensor(&dir.join("out"), "lm_head.weight").dims(), [18, 8]);
    refused(&base, &dir.join("x"), &with(&[&of(18, 17)]), &["18 rows", "17"]);
}

#[test]
fn biases_of_branches_are_folded_into_those_of_layers() {
    let (_keep, dir) = setting(false, DType::F32);
    let config = |target: &str| json!({"peft_type": "LORA", "r": 2, "lora_alpha": 6, "lora_bias": true, "target_modules": [target]});
    let of = |name: &str, target: &str, path: &str, cols: usize| {
        let names = ["lora_A.weight", "lora_B.weight", "lora_B.bias"].map(|part| format!("{path}.{part}"));
        let tensors = [random("a", &[2, cols]), random("b", &[8, 2]), random("c", &[8])];
        let tensors: Vec<_> = names.iter().map(String::as_str).zip(tensors).collect();
        write_adapter(&dir.join(name), &config(target), &tensors);
        dir.join(name)
    };
    merge(&dir.join("base"), &dir.join("out"), &with(&[&of("q", "q_proj", Q, 8)])).unwrap();
    let name = format!("{Q}.bias");
    let (was, is) = (values(&tensor(&dir.join("base"), &name)), values(&tensor(&dir.join("out"), &name)));
    for ((was, is), c) in was.iter().zip(is).zip(values(&random("c", &[8]))) {
        assert!((is - was - 3.0 * c).abs() < 1e-5);
    }
    let down = of("down", "down_proj", DOWN, 12);
    refused(&dir.join("base"), &dir.join("x"), &with(&[&down]), &["down_proj.lora_B.bias", "does not have"]);
}

/// The base with its two layers packed to four bits.
fn pack(dir: &Path) {
    let mut weights = Weights::from_tensors(base_tensors(false, DType::F32));
    for path in [Q, DOWN] {
        let name = format!("{path}.weight");
        let w = weights.get(&name).unwrap().tensor().unwrap();
        let rule = OnGrid::fit(Grid::new(4, Centering::MidRise).unwrap(), None, &w).unwrap();
        weights.wrap(&name, std::sync::Arc::new(rule)).unwrap();
    }
    let packed = weights.packed().unwrap();
    let mut config = config(false);
    config["quantization_config"] = serde_json::to_value(QuantizationConfig::of(&packed)).unwrap();
    write(dir, &config, &stored_tensors(&packed).unwrap());
}

#[test]
fn a_packed_base_becomes_dense_or_is_packed_again() {
    let (_keep, dir) = setting(false, DType::F32);
    let base = dir.join("packed");
    pack(&base);
    let dense = merge(&base, &dir.join("dense"), &with(&[&dir.join("blocks")])).unwrap();
    assert!(dense.notes.iter().any(|n| n.contains("packed base")) && dense.rounding.is_none());
    assert!(json_of(&dir.join("dense/config.json")).get("quantization_config").is_none());
    let (from, name) = (open_weights(&base, &Device::Cpu).unwrap(), format!("{Q}.weight"));
    let block = values(&(random("a", &[4, 8]) * 0.1).unwrap());
    let was = values(&from.get(&name).unwrap().tensor().unwrap());
    let exact = tensor(&dir.join("dense"), &name);
    for (i, (is, was)) in values(&exact).iter().zip(was).enumerate() {
        assert!((is - was - block[(i % 8) % 4 * 8 + i / 8]).abs() < 1e-6);
    }

    let again = Merge { onto: Onto::Requantize, ..with(&[&dir.join("blocks")]) };
    let merged = merge(&base, &dir.join("again"), &again).unwrap();
    let rounding = merged.rounding.unwrap();
    let opened = open_weights(&dir.join("again"), &Device::Cpu).unwrap();
    let got = opened.get(&name).unwrap();
    assert_eq!(got.grid(), from.get(&name).unwrap().grid());
    let gaps = values(&got.tensor().unwrap())
        .iter()
        .zip(values(&exact))
        .map(|(a, b)| (a - b).abs())
        .collect::<Vec<_>>();
    let largest = gaps.iter().fold(0f32, |m, g| m.max(*g));
    assert!(f64::from(largest) <= rounding.largest.0 + 1e-7 && largest > 0.0);
    assert!(rounding.mean > 0.0 && rounding.change > 0.0);
    assert_eq!(Record::read(&dir.join("again")).unwrap().unwrap().onto, "requantize");
    // A change far below the steps is said to be lost.
    blocks(&dir.join("small"), 0.002);
    let small = Merge { onto: Onto::Requantize, ..with(&[&dir.join("small")]) };
    let merged = merge(&base, &dir.join("lost"), &small);
    match merged {
        Ok(merged) => {
            assert!(merged.notes.iter().any(|n| n.contains("packing again lost")), "{:?}", merged.notes)
        }
        Err(error) => assert!(error.to_string().contains("no tensor"), "{error}"),
    }
}

#[test]
fn quantized_activations_belong_to_their_weights() {
    let (_keep, dir) = setting(false, DType::F32);
    let base = dir.join("packed");
    pack(&base);
    let mut config = json_of(&base.join("config.json"));
    config["quantization_config"]["activations"] = json!({"model.tap": {"kind": "act"}});
    fs::write(base.join("config.json"), config.to_string()).unwrap();
    refused(&base, &dir.join("x"), &with(&[&dir.join("blocks")]), &["quantizes activations"]);
}
