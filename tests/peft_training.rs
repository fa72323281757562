//! PEFT's adapters trained: logits, loss, every gradient, three optimizer steps, the merged weights and
//! single layers, for every case of `adapters/index.json`, each within the tolerance that the case states.
//!
//! The folder comes from `QTUNE_GOLDEN`, else it is `tests/golden`, else `../shared/golden`.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use qtune::adapter::{Adapter, Attach, Modules, Part, Training};
use qtune::data::text::{TextBatch, NO_TARGET};
use qtune::kernels;
use qtune::language::{Predict, Rows};
use qtune::models::{held, import_model, open_llama, Llama, Places, VisionConfig, Want};
use qtune::optim::adamw::AdamWConfig;
use qtune::optim::OptimizerConfig;
use qtune::transform::pissa::pissa;
use qtune::weights::{Checkpoint, Param, Weights};
use serde_json::Value;

fn golden() -> Option<(PathBuf, Value)> {
    let asked = std::env::var_os("QTUNE_GOLDEN").map(PathBuf::from);
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let places = asked.into_iter().chain([own.join("tests/golden"), own.join("../shared/golden")]);
    let root = places.map(|place| place.join("adapters")).find(|place| place.join("index.json").exists());
    let Some(root) = root else {
        eprintln!("skipped: no adapters/index.json under QTUNE_GOLDEN");
        return None;
    };
    let text = std::fs::read_to_string(root.join("index.json")).unwrap();
    Some((root, serde_json::from_str(&text).unwrap()))
}

/// A case with its model, its adapter attached to be trained.
struct Case<'a> {
    name: &'a str,
    root: &'a Path,
    entry: &'a Value,
    index: &'a Value,
    io: Checkpoint,
    weights: Weights,
}

fn values(t: &Tensor) -> Vec<f32> {
    t.detach().to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

impl Case<'_> {
    fn read(&self, file: &str) -> Checkpoint {
        let path = self.entry["files"][file].as_str().unwrap_or_else(|| panic!("{}: no {file}", self.name));
        Checkpoint::open(&self.root.join(path)).unwrap()
    }

    fn tolerance(&self, key: &str) -> Option<f64> {
        self.entry["tolerance"][key].as_f64()
    }

    fn close(&self, what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
        assert_eq!(got.dims(), want.dims(), "{}: {what}", self.name);
        for (i, (g, w)) in values(got).iter().zip(values(want)).enumerate() {
            let gap = f64::from((g - w).abs());
            assert!(
                gap <= tolerance,
                "{}: {what}: element {i}: got {g}, want {w} within {tolerance:e}",
                self.name
            );
        }
    }

    fn tensor(&self, file: &Checkpoint, name: &str) -> Tensor {
        file.tensor(name, &Device::Cpu).unwrap()
    }

    /// The checkpoint's path of a module that the adapter's file calls `path`.
    fn checkpoint_path(&self, path: &str) -> String {
        let Some(table) =
            self.index["vit_module_to_checkpoint"].as_object().filter(|_| path.starts_with("vit."))
        else {
            return path.to_string();
        };
        let number = path.split('.').find(|s| s.parse::<usize>().is_ok()).unwrap_or_default();
        let renamed = table.iter().find(|(new, _)| new.replace("{i}", number) == path);
        renamed.map_or(path.to_string(), |(_, old)| old.as_str().unwrap().replace("{i}", number))
    }

    /// The store's name of the parameter that the adapter's file calls `key`.
    fn param(&self, key: &str) -> String {
        let (path, part) = Part::parse(key).unwrap_or_else(|| panic!("{}: {key}", self.name));
        let path = self.checkpoint_path(&path);
        match (part.suffix(), &part) {
            (Some(suffix), _) => format!("{path}.weight.{suffix}"),
            (None, Part::Own(leaf) | Part::Base(leaf)) => format!("{path}.{leaf}"),
            (None, other) => panic!("{}: {other:?}", self.name),
        }
    }

    fn of_file<'p>(&self, params: &'p [Param], key: &str) -> &'p Param {
        let name = self.param(key);
        params.iter().find(|p| p.name == name).unwrap_or_else(|| panic!("{}: no parameter {name}", self.name))
    }
}

/// What a model computes of a case: logits as the file has them, and a pass.
trait Model {
    fn logits(&self, weights: &Weights) -> Tensor;
    fn learn(&self, weights: &Weights, params: &[Param]) -> (f64, Vec<Option<Tensor>>);
}

struct Text {
    config: qtune::models::LlamaConfig,
    dtype: DType,
    batch: TextBatch,
}

impl Model for Text {
    fn logits(&self, weights: &Weights) -> Tensor {
        let model = Llama::new(&self.config, weights, self.dtype).unwrap();
        let places = Places::plain(self.batch.batch, self.batch.len);
        model.forward(&self.batch.tokens, &places, &Device::Cpu).unwrap()
    }

    fn learn(&self, weights: &Weights, params: &[Param]) -> (f64, Vec<Option<Tensor>>) {
        use qtune::train::Task;
        let task = |checkpointing: bool| Predict {
            model: Llama::new(&self.config, weights, self.dtype).unwrap(),
            teacher: None,
            checkpointing,
            pass: Arc::new(AtomicU64::new(0)),
        };
        let rows = Rows { batch: self.batch.clone(), number: 0 };
        let plain = task(false).learn(&rows, params, &Device::Cpu).unwrap();
        // Computed again block by block, the gradients are the same.
        let again = task(true).learn(&rows, params, &Device::Cpu).unwrap();
        for ((a, b), param) in plain.grads.iter().zip(&again.grads).zip(params) {
            let (a, b) = (values(a.as_ref().unwrap()), values(b.as_ref().unwrap()));
            let scale = a.iter().fold(0f32, |m, v| m.max(v.abs()));
            let near = a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 1e-5 * scale);
            assert!(near || self.dtype != DType::F32, "{}: checkpointing changes the gradient", param.name);
        }
        (plain.loss.read().unwrap(), plain.grads)
    }
}

struct Images {
    config: VisionConfig,
    pixels: Tensor,
    labels: Tensor,
}

impl Model for Images {
    fn logits(&self, weights: &Weights) -> Tensor {
        self.config.build(weights).unwrap().forward(&self.pixels).unwrap().logits().unwrap()
    }

    fn learn(&self, weights: &Weights, params: &[Param]) -> (f64, Vec<Option<Tensor>>) {
        let loss = kernels::cross_entropy(&self.logits(weights), &self.labels).unwrap();
        let grads = loss.backward().unwrap();
        let grads = params.iter().map(|p| grads.get(p.var.as_tensor()).cloned()).collect();
        (f64::from(loss.to_scalar::<f32>().unwrap()), grads)
    }
}

/// Every target but the first of each row, as a language model's loss takes them.
fn text_batch(io: &Checkpoint) -> TextBatch {
    let read = |name: &str| io.tensor(name, &Device::Cpu).unwrap();
    let (batch, len) = read("input_ids").dims2().unwrap();
    let whole = |t: Tensor| t.flatten_all().unwrap().to_vec1::<i64>().unwrap();
    let tokens: Vec<u32> = whole(read("input_ids")).iter().map(|id| *id as u32).collect();
    let labels = whole(read("labels"));
    let target = |at: usize| match at % len == len - 1 {
        true => NO_TARGET,
        false => u32::try_from(labels[at + 1]).unwrap_or(NO_TARGET),
    };
    let targets: Vec<u32> = (0..batch * len).map(target).collect();
    let trained = targets.iter().filter(|t| **t != NO_TARGET).count();
    TextBatch {
        tokens,
        batch,
        len,
        targets,
        positions: (0..batch).flat_map(|_| 0..len as u32).collect(),
        segments: vec![1; batch * len],
        samples: (0..batch as u32).collect(),
        trained,
    }
}

fn check(case: &Case<'_>, model: &dyn Model, modules: &Modules, adapter: &Adapter) {
    let logits = case.tensor(&case.io, "logits");
    case.close("logits", &model.logits(&case.weights), &logits, case.tolerance("logits_abs").unwrap());
    let params = case.weights.params();
    let (loss, grads) = model.learn(&case.weights, &params);
    let want = case.entry["loss"].as_f64().unwrap();
    let gap = (loss - want).abs();
    assert!(gap <= case.tolerance("loss_abs").unwrap(), "{}: loss {loss}, want {want}", case.name);
    // Gradients: every key of the file, and no parameter without one.
    let file = case.read("grads");
    assert_eq!(file.len(), params.len(), "{}: trainables", case.name);
    if let Some(tolerance) = case.tolerance("grads_abs") {
        for key in file.names() {
            let at = params.iter().position(|p| p.name == case.param(key));
            let at = at.unwrap_or_else(|| panic!("{}: no parameter {key}", case.name));
            let grad = grads[at].as_ref().unwrap_or_else(|| panic!("{}: no gradient for {key}", case.name));
            case.close(key, grad, &case.tensor(&file, key), tolerance);
        }
    }
    // The two readings of single layers, and their gradients.
    let io = case.read("layer_io");
    for module in case.entry["checked_modules"].as_array().unwrap().iter().map(|m| m.as_str().unwrap()) {
        let path = case.checkpoint_path(module);
        let weight = case.weights.get(&format!("{path}.weight")).unwrap();
        let input = case.tensor(&io, &format!("{module}.input"));
        let merged = case.tensor(&case.read("merged"), &format!("{module}.weight"));
        let tolerance = case.tolerance("merged_abs").unwrap();
        case.close("merged", &weight.tensor().unwrap(), &merged, tolerance);
        let Some(tolerance) = case.tolerance("layer_io_abs") else { continue };
        let output = case.tensor(&io, &format!("{module}.output"));
        let y = match input.dtype() {
            DType::I64 => weight.rows(&input.to_dtype(DType::U32).unwrap()).unwrap(),
            _ => {
                let y = weight.matmul(&input).unwrap();
                match case.weights.get(&format!("{path}.bias")) {
                    Ok(bias) => y.broadcast_add(&bias.tensor().unwrap()).unwrap(),
                    Err(_) => y,
                }
            }
        };
        case.close(module, &y, &output, tolerance);
        let grad = case.tensor(&io, &format!("{module}.grad_output"));
        let found = (y * grad).unwrap().sum_all().unwrap().backward().unwrap();
        for key in file.names().filter(|key| key.contains(&format!(".{module}."))) {
            let param = case.of_file(&params, key);
            let got = found.get(param.var.as_tensor()).unwrap_or_else(|| panic!("{}: {key}", case.name));
            case.close(key, got, &case.tensor(&file, key), case.tolerance("grads_abs").unwrap());
        }
    }
    // The merged model answers as the adapted one did in PEFT.
    let merged = case.tensor(&case.io, "merged_logits");
    let folded = case.weights.folded().unwrap();
    case.close("merged logits", &model.logits(&folded), &merged, case.tolerance("logits_abs").unwrap());
    // Three steps of AdamW.
    let train = &case.entry["train"];
    let config = OptimizerConfig::Adamw(AdamWConfig {
        beta1: train["beta1"].as_f64().unwrap(),
        beta2: train["beta2"].as_f64().unwrap(),
        eps: train["eps"].as_f64().unwrap(),
        weight_decay: train["weight_decay"].as_f64().unwrap(),
        no_decay: Vec::new(),
    });
    let mut optimizer = config.build();
    let losses = train["losses_before_each_step_then_after"].as_array().unwrap();
    for (step, want) in losses.iter().enumerate() {
        let (loss, grads) = model.learn(&case.weights, &params);
        let gap = (loss - want.as_f64().unwrap()).abs();
        assert!(gap <= case.tolerance("loss_abs").unwrap(), "{}: step {step}: {loss} {want}", case.name);
        if step < train["steps"].as_u64().unwrap() as usize {
            for (param, grad) in params.iter().zip(&grads) {
                let lr = train["lr"].as_f64().unwrap();
                optimizer.update(param, grad.as_ref().unwrap(), lr, false).unwrap();
            }
        }
    }
    if let Some(tolerance) = case.tolerance("after3_abs") {
        let after = case.read("after3");
        for key in file.names() {
            let param = case.of_file(&params, key);
            case.close(key, param.var.as_tensor(), &case.tensor(&after, key), tolerance);
        }
    }
    // What is collected is what was trained.
    let collected = Adapter::of(&adapter.config, &case.weights, modules).unwrap();
    assert!(collected.tensors().count() >= params.len(), "{}", case.name);
}

/// PiSSA's factors are right up to signs: their product and the residual are compared.
fn check_pissa(case: &Case<'_>, base: &Weights) {
    let file = case.read("pissa_init");
    let asked = &case.entry["requested"];
    let r = asked["r"].as_u64().unwrap() as usize;
    let scale = asked["lora_alpha"].as_f64().unwrap() / r as f64;
    for module in case.entry["checked_modules"].as_array().unwrap().iter().map(|m| m.as_str().unwrap()) {
        let w = base.get(&format!("{module}.weight")).unwrap().tensor().unwrap();
        let made = pissa(&w, r, scale).unwrap();
        let product = (made.b.matmul(&made.a).unwrap() * scale).unwrap();
        case.close("product", &product, &case.tensor(&file, &format!("{module}.scaled_product")), 1e-5);
        case.close("residual", &made.residual, &case.tensor(&file, &format!("{module}.residual")), 1e-5);
    }
}

#[test]
fn every_case_trains_as_in_peft() {
    let Some((root, index)) = golden() else { return };
    let mut seen = 0;
    for entry in index["cases"].as_array().unwrap() {
        let name = entry["name"].as_str().unwrap();
        let dir = root.join(entry["base"].as_str().unwrap());
        let io = Checkpoint::open(&root.join(entry["files"]["io"].as_str().unwrap())).unwrap();
        let adapter = Adapter::open(&root.join(entry["adapter"].as_str().unwrap())).unwrap();
        let how = Attach { training: Some(Training::new(0)), ..Attach::default() };
        let case = |weights: Weights, io| Case { name, root: &root, entry, index: &index, io, weights };
        if entry["model"] == "vit" {
            let imported = import_model(&dir, &Want::default(), &Device::Cpu).unwrap();
            let json: Value =
                serde_json::from_str(&std::fs::read_to_string(dir.join("config.json")).unwrap()).unwrap();
            let mut weights = Weights::from_tensors(imported.tensors);
            let modules = Modules::of(&json, &weights).unwrap();
            adapter.attach(&mut weights, &modules, &how).unwrap();
            let pixels = io.tensor("pixel_values", &Device::Cpu).unwrap();
            let labels = io.tensor("labels", &Device::Cpu).unwrap().to_dtype(DType::U32).unwrap();
            let model = Images { config: imported.config, pixels, labels };
            check(&case(weights, io), &model, &modules, &adapter);
        } else {
            let opened = open_llama(&dir, &Device::Cpu).unwrap();
            let dtype = if entry["base_dtype"] == "bf16" { DType::BF16 } else { DType::F32 };
            let base = held(&opened.config, &opened.weights, dtype).unwrap();
            let mut weights = base.clone();
            let modules = Modules::of(&opened.json, &weights).unwrap();
            adapter.attach(&mut weights, &modules, &how).unwrap();
            let model = Text { config: opened.config, dtype, batch: text_batch(&io) };
            let case = case(weights, io);
            check(&case, &model, &modules, &adapter);
            if entry["files"].get("pissa_init").is_some() {
                check_pissa(&case, &base);
            }
        }
        seen += 1;
    }
    assert!(seen > 0);
    eprintln!("{seen} cases of adapters, all of them as in PEFT");
}
