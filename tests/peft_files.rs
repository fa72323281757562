//! PEFT's own files: read, written, put on their bases and merged, against what PEFT computed.
//!
//! The cases are in `adapters/` under `QTUNE_GOLDEN`, `tests/golden` or `../shared/golden`; without them
//! these tests say so and pass.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use qtune::adapter::{merge, unmerge, Adapter, Attach, Merge, Method, Modules, Residual, Save, Training};
use qtune::weights::{Checkpoint, Weights};
use serde_json::Value;

/// The folder of the cases and their index.
fn golden() -> Option<(PathBuf, Value)> {
    let asked = std::env::var_os("QTUNE_GOLDEN").map(PathBuf::from);
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let places = asked.into_iter().chain([own.join("tests/golden"), own.join("../shared/golden")]);
    let root = places.map(|place| place.join("adapters")).find(|place| place.join("index.json").exists());
    let Some(root) = root else {
        eprintln!("skipped: no adapters/index.json under QTUNE_GOLDEN");
        return None;
    };
    let index = json(&root.join("index.json"));
    Some((root, index))
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap()
}

/// Every case: its name, its folder, its base, its entry in the index.
fn cases(mut each: impl FnMut(&str, &Path, &Path, &Value)) {
    let Some((root, index)) = golden() else { return };
    let cases = index["cases"].as_array().unwrap();
    assert!(cases.len() >= 15);
    for case in cases {
        let name = text(case, "name");
        each(name, &root.join("cases").join(name), &root.join(text(case, "base")), case);
    }
}

fn base(dir: &Path) -> (Weights, Modules) {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let weights = Weights::from_checkpoint(Arc::new(checkpoint), &Device::Cpu);
    let modules = Modules::of(&json(&dir.join("config.json")), &weights).unwrap();
    (weights, modules)
}

fn values(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn gap(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    values(a).iter().zip(values(b)).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max)
}

/// The checkpoint's name of a ViT module's tensor.
fn in_checkpoint(index: &Value, name: &str) -> String {
    let Some((head, rest)) = name.split_once(".layers.").filter(|(head, _)| *head == "vit") else {
        return name.to_string();
    };
    let (layer, part) = rest.split_once('.').unwrap();
    let (module, leaf) = part.rsplit_once('.').unwrap();
    let key = format!("{head}.layers.{{i}}.{module}");
    let old = index["vit_module_to_checkpoint"][key.as_str()].as_str().unwrap();
    format!("{}.{leaf}", old.replace("{i}", layer))
}

#[test]
fn reading_and_writing_keeps_everything() {
    let out = tempfile::tempdir().unwrap();
    cases(|name, dir, _, _| {
        let adapter = Adapter::open(&dir.join("adapter")).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(adapter.notes().is_empty(), "{name}: {:?}", adapter.notes());
        let path = out.path().join(name);
        adapter.save(&path, &Save::default()).unwrap();
        let (was, is) =
            (json(&dir.join("adapter/adapter_config.json")), json(&path.join("adapter_config.json")));
        for (key, value) in is.as_object().unwrap() {
            assert_eq!(value, &was[key], "{name}: {key}");
        }
        // What is not written is nothing, or where it came from.
        for (key, value) in was.as_object().unwrap() {
            let nothing = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Object(keys) => keys.is_empty(),
                _ => ["peft_version", "megatron_core", "qalora_group_size"].contains(&key.as_str()),
            };
            assert!(nothing || is.get(key) == Some(value), "{name}: {key}");
        }
        let (was, is) = (tensors(&dir.join("adapter")), tensors(&path));
        assert_eq!(was.len(), is.len(), "{name}");
        for ((a, was), (b, is)) in was.iter().zip(&is) {
            assert_eq!(a, b, "{name}");
            assert_eq!((was.dtype(), was.dims()), (is.dtype(), is.dims()), "{name}: {a}");
            assert_eq!(values(was), values(is), "{name}: {a}");
        }
        assert_eq!(Adapter::open(&path).unwrap().config, adapter.config, "{name}");
    });
}

/// The tensors of an adapter's file by name.
fn tensors(dir: &Path) -> Vec<(String, Tensor)> {
    let file = Checkpoint::open(&dir.join("adapter_model.safetensors")).unwrap();
    assert_eq!(file.metadata().get("format").map(String::as_str), Some("pt"));
    let mut names: Vec<String> = file.names().map(str::to_string).collect();
    names.sort();
    names.into_iter().map(|name| (name.clone(), file.tensor(&name, &Device::Cpu).unwrap())).collect()
}

#[test]
fn attached_and_collected_again_is_the_same() {
    cases(|name, dir, base_dir, _| {
        let adapter = Adapter::open(&dir.join("adapter")).unwrap();
        let (mut weights, modules) = base(base_dir);
        let how = Attach { training: Some(Training::new(0)), ..Attach::default() };
        let attached = adapter.attach(&mut weights, &modules, &how).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(attached.notes.is_empty() && !attached.untied, "{name}: {attached:?}");
        let grads = Checkpoint::open(&dir.join("grads.safetensors")).unwrap();
        assert_eq!(weights.params().len(), grads.len(), "{name}: what trains");
        let back = Adapter::of(&adapter.config, &weights, &modules).unwrap();
        let out = tempfile::tempdir().unwrap();
        back.save(&out.path().join("a"), &Save::default()).unwrap();
        let (was, is) = (tensors(&dir.join("adapter")), tensors(&out.path().join("a")));
        // PEFT adds a copy of the base's table, which does not train.
        let was: Vec<_> = was.into_iter().filter(|(n, _)| !n.contains("base_layer.weight")).collect();
        assert_eq!(was.len(), is.len(), "{name}");
        for ((a, was), (b, is)) in was.iter().zip(&is) {
            assert_eq!((a, values(was)), (b, values(is)), "{name}");
        }
    });
}

#[test]
fn merged_weights_are_pefts() {
    let Some((_, index)) = golden() else { return };
    cases(|name, dir, base_dir, case| {
        let adapter = Adapter::open(&dir.join("adapter")).unwrap();
        let (mut weights, modules) = base(base_dir);
        adapter.attach(&mut weights, &modules, &Attach::default()).unwrap();
        let merged = Checkpoint::open(&dir.join("merged.safetensors")).unwrap();
        let tolerance = case["tolerance"]["merged_abs"].as_f64().unwrap();
        for tensor in merged.names() {
            let want = merged.tensor(tensor, &Device::Cpu).unwrap();
            let got = weights.get(&in_checkpoint(&index, tensor)).unwrap().tensor().unwrap();
            let got = got.to_dtype(want.dtype()).unwrap();
            assert!(gap(&got, &want) <= tolerance, "{name}: {tensor}: {}", gap(&got, &want));
            if want.dtype() == DType::BF16 {
                // At most the neighbouring number.
                for (g, w) in values(&got).iter().zip(values(&want)) {
                    assert!((g - w).abs() <= w.abs() / 128.0, "{name}: {tensor}: {g} {w}");
                }
            }
        }
    });
}

#[test]
fn merged_directories_are_pefts() {
    let Some((root, index)) = golden() else { return };
    let out = tempfile::tempdir().unwrap();
    cases(|name, dir, base_dir, case| {
        let how = Merge { adapters: vec![(dir.join("adapter"), None)], ..Merge::default() };
        let to = out.path().join(name);
        let merged = merge(base_dir, &to, &how).unwrap_or_else(|e| panic!("{name}: {e}"));
        let (is, was) = (Checkpoint::open(&to).unwrap(), Checkpoint::open(base_dir).unwrap());
        assert_eq!(is.metadata().get("format").map(String::as_str), Some("pt"));
        let names = |c: &Checkpoint| {
            let mut names: Vec<String> = c.names().map(str::to_string).collect();
            names.sort();
            names
        };
        assert_eq!(names(&is), names(&was), "{name}");
        assert_eq!(merged.tensors, is.len());
        let adapter = Adapter::open(&dir.join("adapter")).unwrap();
        let changed = names(&was).iter().filter(|n| is.raw(n).unwrap() != was.raw(n).unwrap()).count();
        assert_eq!(changed, merged.changes.tensors, "{name}");
        assert!(changed > 0 && changed <= adapter.tensors().count());
        assert!(merged.changes.largest.0 > 0.0 && merged.changes.relative.0 > 0.0);
        for tensor in names(&was) {
            assert_eq!(is.dtype(&tensor), was.dtype(&tensor), "{name}: {tensor}");
        }
        assert_eq!(
            fs::read(to.join("config.json")).unwrap(),
            fs::read(base_dir.join("config.json")).unwrap()
        );
        assert_eq!(
            to.join("generation_config.json").exists(),
            base_dir.join("generation_config.json").exists()
        );
        if let Some(model) = case["files"].get("merged_model").and_then(Value::as_str) {
            let want = Checkpoint::open(&root.join(model)).unwrap();
            assert_eq!(names(&is), names(&want), "{name}");
            for tensor in names(&want) {
                let (a, b) =
                    (is.tensor(&tensor, &Device::Cpu).unwrap(), want.tensor(&tensor, &Device::Cpu).unwrap());
                assert!(gap(&a, &b) <= 1e-6, "{name}: {tensor}");
            }
            assert_eq!(json(&to.join("config.json")), json(&root.join(model).join("config.json")), "{name}");
        }
        let want = Checkpoint::open(&dir.join("merged.safetensors")).unwrap();
        for tensor in want.names() {
            let got = is.tensor(&in_checkpoint(&index, tensor), &Device::Cpu).unwrap();
            let tolerance = case["tolerance"]["merged_abs"].as_f64().unwrap();
            assert!(gap(&got, &want.tensor(tensor, &Device::Cpu).unwrap()) <= tolerance, "{name}: {tensor}");
        }
        // Once more is an error, and the base comes back byte for byte.
        let error = merge(&to, &out.path().join("twice"), &how).unwrap_err().to_string();
        assert!(error.contains("merged into this model already"), "{error}");
        let back = out.path().join(format!("{name}-back"));
        unmerge(&to, None, &back).unwrap();
        for entry in fs::read_dir(base_dir).unwrap() {
            let path = entry.unwrap().path();
            let same = fs::read(&path).unwrap() == fs::read(back.join(path.file_name().unwrap())).unwrap();
            assert!(same, "{name}: {}", path.display());
        }
    });
}

#[test]
fn shards_merge_as_one_file_does() {
    let Some((root, _)) = golden() else { return };
    let out = tempfile::tempdir().unwrap();
    let adapter = root.join("cases/miss_bat/adapter");
    let of = |base: &str, to: &str, shard: u64| {
        let how = Merge { adapters: vec![(adapter.clone(), None)], shard, ..Merge::default() };
        merge(&root.join("base").join(base), &out.path().join(to), &how).unwrap();
        Checkpoint::open(&out.path().join(to)).unwrap()
    };
    let (one, joined, cut) =
        (of("llama", "a", u64::MAX), of("llama_sharded", "b", u64::MAX), of("llama", "c", 60_000));
    assert_eq!((one.files().len(), joined.files().len()), (1, 1));
    assert!(cut.files().len() > 3 && out.path().join("c/model.safetensors.index.json").exists());
    assert!(!out.path().join("b/model.safetensors.index.json").exists());
    for name in one.names() {
        assert_eq!(one.raw(name).unwrap(), joined.raw(name).unwrap(), "{name}");
        assert_eq!(one.raw(name).unwrap(), cut.raw(name).unwrap(), "{name}");
    }
}

#[test]
fn raw_pissa_is_refused_rebuilt_or_converted() {
    let Some((root, _)) = golden() else { return };
    let case = root.join("cases/lora_pissa");
    let raw = Adapter::open(&case.join("adapter_pissa_raw")).unwrap();
    let want = Checkpoint::open(&case.join("merged.safetensors")).unwrap();
    let (weights, modules) = base(&root.join("base/llama"));
    let error = raw.attach(&mut weights.clone(), &modules, &Attach::default()).unwrap_err().to_string();
    assert!(error.contains("pissa"), "{error}");
    // The residual is rebuilt exactly.
    let mut rebuilt = weights.clone();
    raw.attach(&mut rebuilt, &modules, &Attach { residual: Residual::Rebuild, ..Attach::default() }).unwrap();
    for name in want.names() {
        let (got, want) =
            (rebuilt.get(name).unwrap().tensor().unwrap(), want.tensor(name, &Device::Cpu).unwrap());
        assert!(gap(&got, &want) <= 1e-5, "{name}: {}", gap(&got, &want));
    }
    // And PEFT's own conversion is ours, tensor by tensor.
    let plain = raw.converted(&Adapter::open(&case.join("initial")).unwrap()).unwrap();
    let converted = Adapter::open(&case.join("adapter")).unwrap();
    assert_eq!(plain.config.method, converted.config.method);
    assert!(matches!(plain.config.method, Method::Lora(_)));
    for (path, part, tensor) in converted.tensors() {
        assert_eq!(values(plain.tensor(path, part).unwrap()), values(tensor), "{path} {part:?}");
    }
}

#[test]
fn additive_and_mini_are_plain_lora_too() {
    let Some((root, index)) = golden() else { return };
    for case in ["miss_true", "miss_mini", "bone_true", "lora_rslora", "lora_embed", "lora_alpha"] {
        let dir = root.join("cases").join(case);
        let adapter = Adapter::open(&dir.join("adapter")).unwrap();
        let (mut weights, modules) = base(&root.join("base/llama"));
        let (plain, _) = adapter.as_lora(&weights, &modules).unwrap();
        let out = tempfile::tempdir().unwrap();
        plain.save(&out.path().join("a"), &Save::default()).unwrap();
        let plain = Adapter::open(&out.path().join("a")).unwrap();
        plain.attach(&mut weights, &modules, &Attach::default()).unwrap();
        let want = Checkpoint::open(&dir.join("merged.safetensors")).unwrap();
        for name in want.names() {
            let got = weights.get(&in_checkpoint(&index, name)).unwrap().tensor().unwrap();
            assert!(gap(&got, &want.tensor(name, &Device::Cpu).unwrap()) <= 2e-6, "{case}: {name}");
        }
    }
    for case in ["miss_bat", "lora_dora", "vit_miss_true"] {
        let adapter = Adapter::open(&root.join("cases").join(case).join("adapter")).unwrap();
        let (weights, modules) =
            base(&root.join(if case.starts_with("vit") { "base/vit" } else { "base/llama" }));
        assert!(adapter.as_lora(&weights, &modules).unwrap_err().to_string().contains("merge"), "{case}");
    }
}

#[test]
fn bone_and_miss_are_one_adapter_under_two_names() {
    let Some((root, _)) = golden() else { return };
    let out = tempfile::tempdir().unwrap();
    let mut adapter = Adapter::open(&root.join("cases/bone_bat/adapter")).unwrap();
    adapter.call_bone(false).unwrap();
    adapter.save(&out.path().join("miss"), &Save::default()).unwrap();
    let config = json(&out.path().join("miss/adapter_config.json"));
    assert_eq!((text(&config, "peft_type"), text(&config, "init_weights")), ("MISS", "bat"));
    assert!(tensors(&out.path().join("miss")).iter().all(|(name, _)| name.ends_with(".miss_block")));
    let mut mini = Adapter::open(&root.join("cases/miss_mini/adapter")).unwrap();
    assert!(mini.call_bone(true).unwrap_err().to_string().contains("mini"));
}

#[test]
fn an_adapter_of_another_base_is_refused_with_both_shapes() {
    let Some((root, _)) = golden() else { return };
    let adapter = Adapter::open(&root.join("cases/lora_rslora/adapter")).unwrap();
    let shapes = [("q_proj", [64, 48]), ("k_proj", [32, 64])];
    let of = |(name, shape): (&str, [usize; 2])| {
        (
            format!("model.layers.0.self_attn.{name}.weight"),
            Tensor::zeros(&shape, DType::F32, &Device::Cpu).unwrap(),
        )
    };
    let mut weights = Weights::from_tensors(shapes.map(of));
    let modules = Modules::of(&serde_json::json!({"model_type": "llama"}), &weights).unwrap();
    let error = adapter.attach(&mut weights, &modules, &Attach::default()).unwrap_err().to_string();
    assert!(error.contains("down_proj") || error.contains("o_proj"), "{error}");
    let vit = Adapter::open(&root.join("cases/vit_lora/adapter")).unwrap();
    let (mut weights, modules) = base(&root.join("base/llama"));
    let error = vit.attach(&mut weights, &modules, &Attach::default()).unwrap_err();
    assert!(error.exit_code() == 2 || error.exit_code() == 4, "{error}");
}

#[test]
fn old_and_new_names_of_vit_are_read_and_written() {
    let Some((root, _)) = golden() else { return };
    let out = tempfile::tempdir().unwrap();
    let adapter = Adapter::open(&root.join("cases/vit_lora/adapter")).unwrap();
    let old = out.path().join("old");
    adapter.save(&old, &Save { old_names: true, ..Save::default() }).unwrap();
    let names: Vec<String> = tensors(&old).into_iter().map(|(name, _)| name).collect();
    assert!(
        names.iter().any(|n| n.contains("vit.encoder.layer.0.attention.attention.query.lora_A")),
        "{names:?}"
    );
    assert!(names.iter().all(|n| !n.contains("q_proj") && !n.contains("fc2")));
    let merged = |adapter: &Adapter| {
        let (mut weights, modules) = base(&root.join("base/vit"));
        adapter.attach(&mut weights, &modules, &Attach::default()).unwrap();
        weights.iter().map(|(_, w)| values(&w.tensor().unwrap())).collect::<Vec<_>>()
    };
    let back = Adapter::open(&old).unwrap();
    assert_eq!(merged(&back), merged(&adapter));
    back.save(&out.path().join("new"), &Save::default()).unwrap();
    let new = Adapter::open(&out.path().join("new")).unwrap();
    assert_eq!(merged(&new), merged(&adapter));
    assert!(tensors(&out.path().join("new")).iter().all(|(name, _)| !name.contains("encoder")));
}
