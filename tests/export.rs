//! Models in other forms, read back by the program that others read them with: candle's GGUF reader and
//! its quantized models; and the commands around them.
//!
//! The trained model comes from `QTUNE_DATA` or `../shared/data`; without it its test is skipped.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use candle_core::quantized::gguf_file::Content;
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use candle_transformers::models::{quantized_llama, quantized_qwen2, quantized_qwen3};
use qtune::adapter::{merge, Merge};
use qtune::export::{export_gguf, export_plain, Encoding, GgufOptions, Header, Kind, Value as Entry};
use qtune::models::{open_llama, open_weights, Llama, LlamaConfig, Places};
use qtune::random::Random;
use qtune::transform::OnGrid;
use qtune::weights::checkpoint::save;
use qtune::weights::format::{stored_tensors, QuantizationConfig};
use qtune::weights::{Centering, Checkpoint, Grid, Weights};
use serde_json::{json, Value};

const TOKENS: [u32; 9] = [1, 40, 7, 7, 33, 2, 19, 50, 11];

fn random(name: &str, shape: &[usize], around: f32) -> Tensor {
    let mut random = Random::new(11, name, &[]);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| around + 0.3 * random.normal()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn values(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn gap(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// A model of random numbers in the folder `dir`: grouped queries, a width of the MLP that 32 divides.
fn model(dir: &Path, model_type: &str, tied: bool) -> Vec<(String, Tensor)> {
    let config = json!({
        "model_type": model_type, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 60,
        "max_position_embeddings": 128, "tie_word_embeddings": tied, "rms_norm_eps": 1e-5,
    });
    let config = LlamaConfig::from_hf(Path::new("config.json"), &config).unwrap();
    let shapes = config.shapes();
    let tensors: Vec<(String, Tensor)> = shapes
        .iter()
        .map(|(name, shape)| {
            (name.clone(), random(name, shape, if name.contains("norm") { 1.0 } else { 0.0 }))
        })
        .collect();
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), config.to_hf().to_string()).unwrap();
    save(&dir.join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    tensors
}

/// The logits of the last of `tokens`.
fn ours(dir: &Path, tokens: &[u32]) -> Vec<f32> {
    let opened = open_llama(dir, &Device::Cpu).unwrap();
    let model = Llama::new(&opened.config, &opened.weights, DType::F32).unwrap();
    let logits = model.forward(tokens, &Places::plain(1, tokens.len()), &Device::Cpu).unwrap();
    let all = values(&logits);
    all[all.len() - all.len() / tokens.len()..].to_vec()
}

fn theirs(path: &Path, tokens: &[u32]) -> Vec<f32> {
    let mut file = File::open(path).unwrap();
    let content = Content::read(&mut file).unwrap();
    let arch = content.metadata["general.architecture"].to_string().unwrap().clone();
    let x = Tensor::from_slice(tokens, (1, tokens.len()), &Device::Cpu).unwrap();
    let logits = match arch.as_str() {
        "qwen2" => {
            quantized_qwen2::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap().forward(&x, 0)
        }
        "qwen3" => {
            quantized_qwen3::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap().forward(&x, 0)
        }
        _ => {
            quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap().forward(&x, 0)
        }
    };
    values(&logits.unwrap())
}

fn header(path: &Path) -> Header {
    let bytes = fs::read(path).unwrap();
    Header::parse(path, &bytes, bytes.len() as u64).unwrap()
}

fn options(encoding: Encoding) -> GgufOptions {
    GgufOptions { encoding, ..GgufOptions::default() }
}

/// Names, biases, norms of heads, tied tables and the order of rows: any mistake moves the logits by as
/// much as they are.
#[test]
fn candle_computes_the_same_from_the_file() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, tied) in
        [("llama", false), ("llama", true), ("mistral", false), ("qwen2", true), ("qwen3", false)]
    {
        let base = dir.path().join(format!("{kind}-{tied}"));
        model(&base, kind, tied);
        let out = dir.path().join(format!("{kind}-{tied}.gguf"));
        let gguf = export_gguf(&base, &out, &options(Encoding::F32)).unwrap();
        assert_eq!(gguf.bytes, fs::metadata(&out).unwrap().len());
        let has_output = header(&out).tensors.iter().any(|t| t.name == "output.weight");
        assert_eq!(has_output, !tied, "{kind}");
        for tokens in [&TOKENS[..1], &TOKENS[..]] {
            let (a, b) = (ours(&base, tokens), theirs(&out, tokens));
            let size = a.iter().fold(0f32, |m, v| m.max(v.abs()));
            assert!(size > 1.0, "{kind}: {size}");
            // candle rounds Qwen3's rotary frequencies to f16, which shows from the second token on.
            let within = if kind == "qwen3" && tokens.len() > 1 { 1e-3 } else { 1e-4 };
            assert!(gap(&a, &b) < within * size, "{kind}, tied {tied}: {} of {size}", gap(&a, &b));
        }
    }
}

#[test]
fn matrices_as_asked_and_vectors_in_f32() {
    let dir = tempfile::tempdir().unwrap();
    model(&dir.path().join("base"), "llama", false);
    let exact = ours(&dir.path().join("base"), &TOKENS);
    let size = exact.iter().fold(0f32, |m, v| m.max(v.abs()));
    // Seen, relative to the largest logit: f16 0.0009, bf16 0.011, q8_0 0.027, q4_0 0.35.
    for (encoding, kind, within) in [
        (Encoding::F16, Kind::F16, 0.005),
        (Encoding::Bf16, Kind::Bf16, 0.03),
        (Encoding::Q8_0, Kind::Q8_0, 0.05),
        (Encoding::Q4_0, Kind::Q4_0, 0.6),
    ] {
        let out = dir.path().join(format!("{}.gguf", kind.name()));
        let gguf = export_gguf(&dir.path().join("base"), &out, &options(encoding)).unwrap();
        for info in header(&out).tensors {
            let expected = if info.shape.len() == 1 { Kind::F32 } else { kind };
            assert_eq!(info.kind, expected, "{}", info.name);
        }
        let off = gap(&exact, &theirs(&out, &TOKENS)) / size;
        assert!(off < within, "{}: {off}", kind.name());
        assert_eq!(gguf.notes.len(), 1, "{:?}", gguf.notes);
        assert!(gguf.notes[0].contains("no tokenizer"), "{:?}", gguf.notes);
    }
}

fn stories() -> Option<PathBuf> {
    let root = std::env::var_os("QTUNE_DATA").map(PathBuf::from);
    let root = root.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data"));
    let dir = root.join("models/stories260K-hf");
    if !dir.is_dir() {
        println!("skipped: {} is not there", dir.display());
    }
    dir.is_dir().then_some(dir)
}

#[test]
fn a_trained_model_with_its_tokenizer() {
    let Some(base) = stories() else { return };
    let dir = tempfile::tempdir().unwrap();
    let tokens = [1u32, 403, 407, 261, 378];
    let exact = ours(&base, &tokens);
    // Seen, of logits up to 18: f32 6e-6, f16 0.007, q8_0 0.23, q4_0 3.0.
    for (encoding, within) in
        [(Encoding::F32, 2e-3), (Encoding::F16, 2e-2), (Encoding::Q8_0, 1.0), (Encoding::Q4_0, 12.0)]
    {
        let out = dir.path().join(format!("{encoding:?}.gguf"));
        let gguf = export_gguf(&base, &out, &options(encoding)).unwrap();
        let off = gap(&exact, &theirs(&out, &tokens));
        assert!(off < within, "{encoding:?}: {off}");
        let content = Content::read(&mut File::open(&out).unwrap()).unwrap();
        // 172 columns make no blocks of 32.
        let odd = matches!(encoding, Encoding::Q8_0 | Encoding::Q4_0);
        assert_eq!(gguf.notes.len(), usize::from(odd), "{:?}", gguf.notes);
        if odd {
            assert!(gguf.notes[0].contains("blk.0.ffn_down.weight"), "{:?}", gguf.notes);
            assert_eq!(content.tensor_infos["blk.4.ffn_down.weight"].ggml_dtype, GgmlDType::F16);
        }
        let of = |key: &str| &content.metadata[&format!("tokenizer.ggml.{key}")];
        assert_eq!(of("model").to_string().unwrap(), "llama");
        let (listed, scores) = (of("tokens").to_vec().unwrap(), of("scores").to_vec().unwrap());
        assert_eq!((listed.len(), scores.len(), of("token_type").to_vec().unwrap().len()), (512, 512, 512));
        assert_eq!(listed[259].to_string().unwrap(), "▁t");
        // The first merge makes ▁t, the second he.
        assert_eq!((scores[259].to_f32().unwrap(), scores[260].to_f32().unwrap()), (0.0, -1.0));
        assert_eq!((of("bos_token_id").to_u32().unwrap(), of("eos_token_id").to_u32().unwrap()), (1, 2));
        assert!(of("add_bos_token").to_bool().unwrap() && !of("add_eos_token").to_bool().unwrap());
    }
}

fn write_adapter(dir: &Path, config: &Value, tensors: &[(&str, Tensor)]) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let name = |name: &str| format!("base_model.model.{name}");
    let tensors: Vec<_> = tensors.iter().map(|(n, t)| (name(n), t.clone())).collect();
    save(&dir.join("adapter_model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
}

/// Additive blocks on two weights.
fn blocks(dir: &Path) {
    let config = json!({
        "peft_type": "MISS", "r": 4, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0],
        "base_model_name_or_path": "org/none",
    });
    let block = |name: &str| random(name, &[4, 64], 0.0);
    let (q, down) = ("model.layers.0.self_attn.q_proj.miss_block", "model.layers.0.mlp.down_proj.miss_block");
    write_adapter(dir, &config, &[(q, block("a")), (down, block("b"))]);
}

fn with(adapter: &Path) -> Merge {
    Merge { adapters: vec![(adapter.to_path_buf(), None)], ..Merge::default() }
}

#[test]
fn an_adapter_folded_in_is_the_merged_model() {
    let dir = tempfile::tempdir().unwrap();
    let (base, adapter) = (dir.path().join("base"), dir.path().join("blocks"));
    model(&base, "llama", false);
    blocks(&adapter);
    let merged = dir.path().join("merged");
    merge(&base, &merged, &with(&adapter)).unwrap();
    let name = Some("m".to_string());
    let whole = GgufOptions { name: name.clone(), ..options(Encoding::F32) };
    let folded = GgufOptions { adapters: vec![(adapter, None)], name, ..options(Encoding::F32) };
    let (a, b) = (dir.path().join("a.gguf"), dir.path().join("b.gguf"));
    export_gguf(&merged, &a, &whole).unwrap();
    export_gguf(&base, &b, &folded).unwrap();
    assert!(fs::read(&a).unwrap() == fs::read(&b).unwrap());
    let (a, base) = (ours(&merged, &TOKENS), ours(&base, &TOKENS));
    assert!(gap(&a, &base) > 0.1, "the adapter does nothing");
}

/// Packs the matrices of the model in `dir` to 4 bits, in place.
fn pack(dir: &Path, tensors: &[(String, Tensor)]) -> Weights {
    let mut weights = Weights::from_tensors(tensors.to_vec());
    for (name, tensor) in tensors.iter().filter(|(name, _)| name.ends_with("_proj.weight")) {
        let grid = Grid::new(4, Centering::Signed).unwrap();
        weights.wrap(name, std::sync::Arc::new(OnGrid::fit(grid, None, tensor).unwrap())).unwrap();
    }
    let packed = weights.packed().unwrap();
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config["quantization_config"] = serde_json::to_value(QuantizationConfig::of(&packed)).unwrap();
    fs::write(&path, config.to_string()).unwrap();
    save(&dir.join("model.safetensors"), &stored_tensors(&packed).unwrap(), &BTreeMap::new()).unwrap();
    packed
}

#[test]
fn packed_weights_become_their_values() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    let tensors = model(&base, "llama", false);
    let packed = pack(&base, &tensors);
    fs::write(base.join("tokenizer.json"), "{}").unwrap();
    fs::write(base.join("pytorch_model.bin"), "x").unwrap();
    let out = dir.path().join("plain");
    let plain = export_plain(&base, &out, None).unwrap();
    assert_eq!((plain.tensors, plain.unpacked), (tensors.len(), 14));
    let read = Checkpoint::open(&out).unwrap();
    for (name, was) in &tensors {
        let expected = values(&packed.get(name).unwrap().tensor().unwrap());
        assert_eq!(values(&read.tensor(name, &Device::Cpu).unwrap()), expected, "{name}");
        assert_eq!(expected == values(was), !name.ends_with("_proj.weight"), "{name}");
    }
    let config: Value = serde_json::from_str(&fs::read_to_string(out.join("config.json")).unwrap()).unwrap();
    assert_eq!(config.get("quantization_config"), None);
    assert_eq!(read.metadata().get("format").map(String::as_str), Some("pt"));
    assert_eq!(fs::read_to_string(out.join("tokenizer.json")).unwrap(), "{}");
    assert!(!out.join("pytorch_model.bin").exists());
    fs::remove_file(base.join("tokenizer.json")).unwrap();
    assert_eq!(ours(&out, &TOKENS).len(), 60);
    // The same model from either.
    let name = Some("m".to_string());
    let how = GgufOptions { name, ..options(Encoding::F32) };
    fs::remove_file(out.join("tokenizer.json")).unwrap();
    export_gguf(&base, &dir.path().join("a.gguf"), &how).unwrap();
    export_gguf(&out, &dir.path().join("b.gguf"), &how).unwrap();
    assert!(fs::read(dir.path().join("a.gguf")).unwrap() == fs::read(dir.path().join("b.gguf")).unwrap());
}

#[test]
fn another_dtype_and_what_it_cannot_hold() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    let mut tensors = model(&base, "llama", true);
    let half = dir.path().join("half");
    export_plain(&base, &half, Some(DType::BF16)).unwrap();
    let weights = open_weights(&half, &Device::Cpu).unwrap();
    for (name, was) in &tensors {
        let now = weights.get(name).unwrap().tensor().unwrap();
        assert_eq!(now.dtype(), DType::BF16, "{name}");
        assert_eq!(values(&now), values(&was.to_dtype(DType::BF16).unwrap()), "{name}");
    }
    let config: Value = serde_json::from_str(&fs::read_to_string(half.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["torch_dtype"], "bfloat16");
    tensors[0].1 = (&tensors[0].1 * 1e6).unwrap();
    save(&base.join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    let out = dir.path().join("out");
    let error = export_plain(&base, &out, Some(DType::F16)).unwrap_err().to_string();
    assert!(error.contains("model.embed_tokens.weight"), "{error}");
    let error = export_gguf(&base, &out, &options(Encoding::F16)).unwrap_err().to_string();
    assert!(error.contains("token_embd.weight") && error.contains("beyond f16"), "{error}");
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

fn qtune(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qtune"));
    command
        .current_dir(dir)
        .stdin(Stdio::null())
        .env("HF_HOME", dir.join("no-hub"))
        .env("HF_HUB_OFFLINE", "1");
    command.args(args).output().unwrap()
}

fn said(output: &Output) -> Value {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {error}"))
}

/// A command that must fail with `code`, nothing on stdout and one line that holds all of `words`.
fn fails(dir: &Path, args: &[&str], code: i32, words: &[&str]) {
    let output = qtune(dir, args);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
    assert!(output.stdout.is_empty(), "{args:?}");
    assert_eq!(error.lines().filter(|l| l.starts_with("qtune: ")).count(), 1, "{args:?}: {error}");
    words.iter().for_each(|word| assert!(error.contains(word), "{args:?}: no {word:?} in {error}"));
}

#[test]
fn merged_looked_at_and_taken_out_again() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    model(&here.join("base"), "llama", false);
    // As a run folder holds it.
    blocks(&here.join("run/adapter"));
    let merged = said(&qtune(here, &["merge", "base", "--adapter", "run=0.5", "--out", "merged", "--json"]));
    assert_eq!((&merged["changed"], &merged["packed_error"]), (&json!(2), &Value::Null));
    assert_eq!(merged["adapters"][0]["scale"], 0.5);
    assert!(merged["largest_change"]["value"].as_f64().unwrap() > 0.0);
    let looked = said(&qtune(here, &["inspect", "merged", "--json"]));
    assert_eq!(looked["merged"]["adapters"][0]["scale"], 0.5);
    let back = qtune(here, &["merge", "merged", "--unmerge", "--out", "back"]);
    assert!(back.status.success());
    let file = |name: &str| fs::read(here.join(name).join("model.safetensors")).unwrap();
    assert!(file("back") == file("base") && file("merged") != file("base"));

    fails(here, &["merge", "base", "--out", "x"], 2, &["--adapter"]);
    fails(here, &["merge", "base", "--adapter", "run=half", "--out", "x"], 2, &["half", "expected a number"]);
    fails(
        here,
        &["merge", "merged", "--adapter", "run", "--out", "x"],
        4,
        &["merged into this model already"],
    );
    fails(here, &["merge", "base", "--unmerge", "--out", "x"], 4, &["qtune_merge.json"]);
    fails(here, &["merge", "base", "--adapter", "run", "--out", "back"], 1, &["back"]);
}

#[test]
fn adapters_as_plain_lora() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    model(&here.join("base"), "llama", false);
    blocks(&here.join("blocks"));
    let args = ["export", "blocks", "--as", "lora", "--base", "base", "--out", "lora", "--json"];
    assert_eq!(said(&qtune(here, &args))["tensors"], 4);
    for (adapter, out) in [("blocks", "a"), ("lora", "b")] {
        merge(&here.join("base"), &here.join(out), &with(&here.join(adapter))).unwrap();
    }
    let (a, b) = (ours(&here.join("a"), &TOKENS), ours(&here.join("b"), &TOKENS));
    assert!(gap(&a, &b) < 1e-4, "{}", gap(&a, &b));
    let looked = said(&qtune(here, &["inspect", "lora", "--json"]));
    assert_eq!((&looked["peft_type"], &looked["method"]), (&json!("LORA"), &json!("lora")));
    assert_eq!(
        (&looked["ranks"], &looked["alpha"], &looked["tensors"]),
        (&json!([4]), &json!(4.0), &json!(4))
    );
    // Of q, 4 x 64 and 64 x 4: A is a tiled identity, of norm 8.
    let down = &looked["modules"][0];
    assert_eq!(down["module"], "model.layers.0.mlp.down_proj");
    let q = &looked["modules"][1]["tensors"][0];
    assert_eq!((&q["part"], &q["shape"]), (&json!("lora_A"), &json!([4, 64])));
    assert!((q["norm"].as_f64().unwrap() - 8.0).abs() < 1e-6, "{q}");
    let blocks = said(&qtune(here, &["inspect", "blocks", "--json"]));
    assert_eq!(
        (&blocks["peft_type"], &blocks["method"], &blocks["base"]),
        (&json!("MISS"), &json!("miss"), &json!("org/none"))
    );

    fails(here, &["export", "blocks", "--as", "lora", "--out", "x"], 4, &["org/none", "--base"]);
    fails(
        here,
        &["export", "blocks", "--as", "lora", "--to", "gguf", "--out", "x"],
        2,
        &["--as lora --to gguf"],
    );
    fails(here, &["export", "blocks", "--to", "gguf", "--out", "x"], 2, &["found an adapter", "--as lora"]);
}

#[test]
fn export_by_its_command() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    model(&here.join("base"), "qwen2", false);
    blocks(&here.join("blocks"));
    let args = [
        "export",
        "base",
        "--to",
        "gguf",
        "--type",
        "q8_0",
        "--adapter",
        "blocks",
        "--out",
        "m.gguf",
        "--json",
    ];
    let done = said(&qtune(here, &args));
    assert_eq!(done["bytes"], fs::metadata(here.join("m.gguf")).unwrap().len());
    let read = header(&here.join("m.gguf"));
    let of = |key: &str| read.metadata.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone());
    assert_eq!(of("general.name"), Some(Entry::Text("base".into())));
    assert_eq!(of("general.file_type"), Some(Entry::U32(7)));
    assert_eq!(of("tokenizer.ggml.model"), Some(Entry::Text("none".into())));
    fails(here, &args, 1, &["m.gguf"]);
    fails(here, &["export", "base", "--type", "q4_0", "--out", "x"], 2, &["q4_0", "--to gguf"]);
    fails(here, &["export", "nowhere", "--out", "x"], 4, &["nowhere"]);
    let plain = said(&qtune(here, &["export", "base", "--type", "bf16", "--out", "plain", "--json"]));
    assert_eq!(plain["to"], "safetensors");
    let folded = qtune(here, &["export", "base", "--adapter", "blocks", "--out", "folded"]);
    assert!(String::from_utf8(folded.stdout).unwrap().contains("2 tensors changed by adapters"));
}

#[test]
fn the_carried_recipes_are_listed() {
    let dir = tempfile::tempdir().unwrap();
    let listed = said(&qtune(dir.path(), &["inspect", "--recipes", "--json"]));
    let recipes = listed["recipes"].as_array().unwrap();
    assert!(recipes.iter().any(|recipe| recipe["name"] == "bone"));
    assert!(recipes.iter().all(|recipe| !recipe["about"].as_str().unwrap().is_empty()), "{recipes:?}");
    fails(dir.path(), &["inspect"], 2, &["PATH"]);
}
