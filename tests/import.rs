//! candle-transformers' models, their code unchanged, over our store: with every kind of adapter they give
//! what our own models give, and what a merged model gives.

#[path = "../examples/shared/mod.rs"]
mod shared;

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_transformers::models::{bert, llama, mistral, qwen2, vit};
use qtune::adapter::{Adapter, Attach, LoraConfig, Method, Modules, Variant};
use qtune::models::{open_llama, Llama, OpenedLlama, Places};
use qtune::weights::{checkpoint, Grid};
use serde_json::{json, Value};
use shared::{config, config_of, lora, miss, normal, write_adapter, write_model, Kind};

/// Logits of f32 models of two blocks whose sums run in another order.
const LOGITS: f32 = 1e-4;

const LANGUAGE: [Kind; 3] = [Kind::Llama, Kind::Mistral, Kind::Qwen2];

/// Every kind of adapter, with a name for each.
fn methods() -> Vec<(&'static str, Method)> {
    let of = |own: LoraConfig| Method::Lora(LoraConfig { r: 4, alpha: 8.0, ..own });
    vec![
        ("lora", lora()),
        ("rslora", of(LoraConfig { rslora: true, ..LoraConfig::default() })),
        ("dora", of(LoraConfig { dora: true, ..LoraConfig::default() })),
        ("pissa", of(LoraConfig { init: json!("pissa"), ..LoraConfig::default() })),
        ("miss", miss(Variant::Additive)),
        ("uniform", miss(Variant::AdditiveUniform)),
        ("bat", miss(Variant::Bat)),
        ("mini", miss(Variant::Mini)),
    ]
}

fn cpu(values: Tensor) -> Vec<f32> {
    values.flatten_all().unwrap().to_vec1().unwrap()
}

/// Logits of the last of `tokens`, of candle-transformers' model.
fn theirs(kind: Kind, model: &Path, adapters: &[&Path], tokens: &[u32]) -> Vec<f32> {
    let vb = qtune::var_builder(model, adapters, DType::F32, &Device::Cpu).unwrap();
    let ids = Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    cpu(match kind {
        Kind::Llama => {
            let config = config::<llama::LlamaConfig>(model).unwrap().into_config(false);
            let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu).unwrap();
            llama::Llama::load(vb, &config).unwrap().forward(&ids, 0, &mut cache).unwrap()
        }
        Kind::Mistral => mistral::Model::new(&config(model).unwrap(), vb).unwrap().forward(&ids, 0).unwrap(),
        Kind::Qwen2 => {
            qwen2::ModelForCausalLM::new(&config(model).unwrap(), vb).unwrap().forward(&ids, 0).unwrap()
        }
        Kind::Bert => {
            let bert = bert::BertModel::load(vb, &config(model).unwrap()).unwrap();
            let hidden = bert.forward(&ids, &ids.zeros_like().unwrap(), None).unwrap();
            hidden.narrow(1, tokens.len() - 1, 1).unwrap()
        }
        Kind::Vit => {
            let image = normal("image", &[1, 3, 16, 16], 1.0).unwrap();
            vit::Model::new(&config(model).unwrap(), 5, vb).unwrap().forward(&image).unwrap()
        }
    })
}

/// The same of our own model, the adapters beside their weights.
fn ours(model: &Path, adapters: &[&Path], tokens: &[u32]) -> Vec<f32> {
    let OpenedLlama { config, json, mut weights, .. } = open_llama(model, &Device::Cpu).unwrap();
    let modules = Modules::of(&json, &weights).unwrap();
    for adapter in adapters {
        let adapter = Adapter::open(adapter).unwrap();
        adapter.attach(&mut weights, &modules, &Attach::default()).unwrap();
    }
    let llama = Llama::new(&config, &weights, DType::F32).unwrap();
    let logits = llama.forward(tokens, &Places::plain(1, tokens.len()), &Device::Cpu).unwrap();
    cpu(logits.narrow(1, tokens.len() - 1, 1).unwrap())
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0f32, |m, v| m.max(v.abs()))
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs()))
}

fn assert_near(a: &[f32], b: &[f32], what: &str) {
    let size = largest(b);
    assert!(size > 0.1, "{what}: logits too small to tell anything: {size}");
    let off = apart(a, b);
    assert!(off <= LOGITS * size.max(1.0), "{what}: {off} apart of {size}");
}

/// A model of this kind in a folder, its configuration changed.
fn model_in(dir: &Path, kind: Kind, change: impl Fn(&mut Value)) -> PathBuf {
    let mut json = config_of(kind);
    change(&mut json);
    let path = dir.join("model");
    write_model(kind, &path, &json).unwrap();
    path
}

#[test]
fn language_models_with_every_kind_of_adapter_give_our_logits() {
    for kind in LANGUAGE {
        let dir = tempfile::tempdir().unwrap();
        let model = model_in(dir.path(), kind, |_| ());
        let mut adapters = vec![("base", Vec::new())];
        for (name, method) in methods() {
            let path = dir.path().join(name);
            write_adapter(kind, &model, &path, method).unwrap();
            adapters.push((name, vec![path]));
        }
        // Two at once: their changes add.
        adapters.push(("both", vec![dir.path().join("lora"), dir.path().join("miss")]));
        let mut base = Vec::new();
        for (name, paths) in &adapters {
            let paths: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
            for length in [1, 2, 7] {
                let tokens: Vec<u32> = (0..length).map(|i| (i * 11 + 3) % 40).collect();
                let what = format!("{kind:?} {name} {length}");
                let found = theirs(kind, &model, &paths, &tokens);
                assert_near(&found, &ours(&model, &paths, &tokens), &what);
                match (*name, length) {
                    ("base", 7) => base = found,
                    (_, 7) => assert!(apart(&found, &base) > 0.01, "{what}: nothing changed"),
                    _ => {}
                }
            }
        }
    }
}

#[test]
fn bert_and_vit_change_with_each_adapter() {
    for kind in [Kind::Bert, Kind::Vit] {
        let dir = tempfile::tempdir().unwrap();
        let model = model_in(dir.path(), kind, |_| ());
        let tokens = [1, 5, 9];
        let base = theirs(kind, &model, &[], &tokens);
        for (name, method) in methods() {
            let path = dir.path().join(name);
            write_adapter(kind, &model, &path, method).unwrap();
            let found = theirs(kind, &model, &[&path], &tokens);
            assert!(found.iter().all(|v| v.is_finite()));
            assert!(apart(&found, &base) > 0.01, "{kind:?} {name}: nothing changed");
        }
        // On a store whose names lack the first segment, as the base classes are published.
        if kind == Kind::Bert {
            let headless = dir.path().join("headless");
            let bare = checkpoint::Checkpoint::open(&model).unwrap();
            let tensors: Vec<(String, Tensor)> = bare
                .names()
                .map(|n| (n.trim_start_matches("bert.").into(), bare.tensor(n, &Device::Cpu).unwrap()))
                .collect();
            std::fs::create_dir(&headless).unwrap();
            std::fs::copy(model.join("config.json"), headless.join("config.json")).unwrap();
            checkpoint::save(&headless.join("model.safetensors"), &tensors, &Default::default()).unwrap();
            let adapter = dir.path().join("dora");
            let (with, without) =
                (theirs(kind, &model, &[&adapter], &tokens), theirs(kind, &headless, &[&adapter], &tokens));
            assert_eq!(with, without);
        }
    }
}

#[test]
fn vit_adapters_by_either_spelling_and_the_arithmetic_by_hand() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path(), Kind::Vit, |_| ());
    let path = dir.path().join("lora");
    write_adapter(Kind::Vit, &model, &path, lora()).unwrap();
    // In the file, modules are called as transformers 5 calls them.
    let file = checkpoint::Checkpoint::open(&path.join("adapter_model.safetensors")).unwrap();
    let stem = "base_model.model.vit.layers.1.attention.q_proj";
    let read = |part: &str| file.tensor(&format!("{stem}.{part}.weight"), &Device::Cpu).unwrap();
    let change = (read("lora_B").matmul(&read("lora_A")).unwrap() * 2.0).unwrap();
    let name = "vit.encoder.layer.1.attention.attention.query.weight";
    let of = |adapters: &[&Path]| {
        qtune::var_builder(&model, adapters, DType::F32, &Device::Cpu).unwrap().get((32, 32), name).unwrap()
    };
    let expected = cpu((of(&[]) + change).unwrap());
    assert!(apart(&cpu(of(&[&path])), &expected) < 1e-6);
    let older = dir.path().join("older");
    let how = qtune::adapter::Save { old_names: true, ..Default::default() };
    Adapter::open(&path).unwrap().save(&older, &how).unwrap();
    assert_eq!(cpu(of(&[&older])), cpu(of(&[&path])));
}

#[test]
fn tied_heads_are_found_under_both_names_and_come_apart() {
    for kind in LANGUAGE {
        let dir = tempfile::tempdir().unwrap();
        let tie = |json: &mut Value| json["tie_word_embeddings"] = json!(true);
        let model = model_in(dir.path(), kind, tie);
        let tokens = [3, 14, 25];
        assert_near(&theirs(kind, &model, &[], &tokens), &ours(&model, &[], &tokens), "tied");
        let vb = qtune::var_builder(&model, &[], DType::F32, &Device::Cpu).unwrap();
        assert!(!vb.contains_tensor("lm_head.weight"));
        // An adapter on the head gives it a table of its own, for those who look.
        let adapter = dir.path().join("head");
        write_adapter(kind, &model, &adapter, lora()).unwrap();
        let head = |part: &str, shape: &[usize]| {
            (format!("base_model.model.lm_head.lora_{part}.weight"), normal(part, shape, 0.2).unwrap())
        };
        let tensors = [head("A", &[4, 32]), head("B", &[40, 4])];
        checkpoint::save(&adapter.join("adapter_model.safetensors"), &tensors, &Default::default()).unwrap();
        let path = adapter.join("adapter_config.json");
        let mut json: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        json["target_modules"] = json!(["lm_head"]);
        std::fs::write(&path, json.to_string()).unwrap();
        let vb = qtune::var_builder(&model, &[&adapter], DType::F32, &Device::Cpu).unwrap();
        assert!(vb.contains_tensor("lm_head.weight"));
        if kind == Kind::Llama {
            // It goes by its configuration, which has to be told.
            let path = model.join("config.json");
            let text = std::fs::read_to_string(&path).unwrap();
            let mut json: Value = serde_json::from_str(&text).unwrap();
            let untied = ours(&model, &[&adapter], &tokens);
            json["tie_word_embeddings"] = json!(false);
            let config: llama::LlamaConfig = serde_json::from_value(json).unwrap();
            let config = config.into_config(false);
            let ids = Tensor::new(&[tokens], &Device::Cpu).unwrap();
            let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu).unwrap();
            let logits = llama::Llama::load(vb, &config).unwrap().forward(&ids, 0, &mut cache).unwrap();
            assert_near(&cpu(logits), &untied, "untied");
        } else {
            assert_near(
                &theirs(kind, &model, &[&adapter], &tokens),
                &ours(&model, &[&adapter], &tokens),
                "untied",
            );
        }
    }
}

#[test]
fn bases_in_half_precision_and_in_shards() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path(), Kind::Llama, |_| ());
    let adapter = dir.path().join("bat");
    write_adapter(Kind::Llama, &model, &adapter, miss(Variant::Bat)).unwrap();
    let whole = checkpoint::Checkpoint::open(&model).unwrap();
    let sharded = dir.path().join("sharded");
    std::fs::create_dir(&sharded).unwrap();
    std::fs::copy(model.join("config.json"), sharded.join("config.json")).unwrap();
    let mut shards: [Vec<(String, Tensor)>; 2] = Default::default();
    let mut map = serde_json::Map::new();
    for (i, name) in whole.names().enumerate() {
        let half = whole.tensor(name, &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
        shards[i % 2].push((name.to_string(), half));
        map.insert(name.to_string(), json!(format!("model-0000{}-of-00002.safetensors", i % 2 + 1)));
    }
    for (i, tensors) in shards.iter().enumerate() {
        let file = format!("model-0000{}-of-00002.safetensors", i + 1);
        checkpoint::save(&sharded.join(file), tensors, &Default::default()).unwrap();
    }
    let index = json!({"metadata": {}, "weight_map": map}).to_string();
    std::fs::write(sharded.join("model.safetensors.index.json"), index).unwrap();
    let tokens = [3, 14, 25, 36];
    let found = theirs(Kind::Llama, &sharded, &[&adapter], &tokens);
    assert_near(&found, &ours(&sharded, &[&adapter], &tokens), "sharded");
    let vb = qtune::var_builder(&sharded, &[&adapter], DType::F16, &Device::Cpu).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    assert_eq!(vb.get((32, 32), name).unwrap().dtype(), DType::F16);
}

#[test]
fn packed_bases_are_unpacked_under_the_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path(), Kind::Llama, |_| ());
    let adapter = dir.path().join("miss");
    write_adapter(Kind::Llama, &model, &adapter, miss(Variant::Additive)).unwrap();
    let OpenedLlama { config, json, mut weights, .. } = open_llama(&model, &Device::Cpu).unwrap();
    let names: Vec<String> =
        weights.iter().map(|(n, _)| n.to_string()).filter(|n| n.ends_with("_proj.weight")).collect();
    let grid = Grid::new(4, qtune::weights::Centering::MidRise).unwrap();
    weights.pack_frozen(&names, grid, Some(16), |_, _| ()).unwrap();
    let packed = dir.path().join("packed");
    let start = qtune::language::Start {
        config,
        json,
        weights: weights.clone(),
        tokenizer: qtune::data::text::Tokenizer::bytes().unwrap(),
        name: "small".into(),
        dir: None,
        bytes: 0,
        notes: Vec::new(),
    };
    qtune::language::write_language_model(&packed, &start, &weights).unwrap();
    let tokens = [3, 14, 25, 36];
    let found = theirs(Kind::Llama, &packed, &[&adapter], &tokens);
    assert_near(&found, &ours(&packed, &[&adapter], &tokens), "packed");
    assert!(apart(&found, &theirs(Kind::Llama, &model, &[&adapter], &tokens)) > 0.01);
}

#[test]
fn what_does_not_fit_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let model = model_in(dir.path(), Kind::Llama, |_| ());
    let bert = dir.path().join("other");
    write_model(Kind::Bert, &bert, &config_of(Kind::Bert)).unwrap();
    let adapter = dir.path().join("bert-lora");
    write_adapter(Kind::Bert, &bert, &adapter, lora()).unwrap();
    let of = |model: &Path, adapters: &[&Path]| {
        qtune::var_builder(model, adapters, DType::F32, &Device::Cpu).err().unwrap()
    };
    assert_eq!(of(&dir.path().join("none"), &[]).exit_code(), 4);
    assert_eq!(of(&model, &[&dir.path().join("none")]).exit_code(), 4);
    let error = of(&model, &[&adapter]).to_string();
    assert!(error.contains("query") && !error.contains('\n'), "{error}");
}
