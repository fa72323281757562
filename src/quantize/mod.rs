//! The road of `qtune quantize`: a model, trained or read; quantizers laid over it; training with them;
//! packed, written, read back and measured.

mod phases;
mod plan;
pub mod qkr;
pub mod sensitivity;
mod start;
mod trained;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{Device, Tensor};
use indexmap::IndexMap;
use serde_json::{json, Map, Value};

use crate::data::Preprocess;
use crate::models::{open_model, VisionConfig};
use crate::recipe::{PhaseConfig, Recipe, When};
use crate::select::select;
use crate::train::{
    peak_rss_bytes, phase_steps, resume, signal, Accuracy, Images, Metrics, Progress, Trainer,
};
use crate::transform::{ActQuant, WeightQuant};
use crate::weights::format::{stored_tensors, QuantizationConfig};
use crate::weights::{checkpoint, Calibration, Expr, Weights};
use crate::{files, kernels, report, Error, Result};

use phases::{teacher, train_phases, Trained};

pub use plan::{plan, Plan};
pub use start::{open_data, start, Start};

/// What is for a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The index of the `[[transform]]`.
    pub transform: usize,
    /// Its bits, or those of `[select]`.
    pub bits: u8,
}

/// What each weight becomes, by its name, in the store's order within each transform.
pub fn targets(recipe: &Recipe, weights: &Weights) -> Result<IndexMap<String, Target>> {
    let names: Vec<&str> = weights.iter().map(|(name, _)| name).collect();
    let mut chosen: IndexMap<String, Target> = IndexMap::new();
    for (index, transform) in recipe.transform.iter().enumerate() {
        for name in select(&transform.targets, &names)? {
            let target = Target { transform: index, bits: transform.bits };
            if let Some(Target { transform: other, .. }) = chosen.insert(name.to_string(), target) {
                return Err(Error::usage(format!(
                    "{name}: both transform.{other} and transform.{index} match it"
                )));
            }
            let rank = weights.get(name)?.shape()?.len();
            if rank < 2 {
                return Err(Error::usage(format!(
                    "{name}: found a tensor of rank {rank}, a weight quantizer needs a matrix"
                )));
            }
        }
    }
    if let Some(rule) = &recipe.select {
        let layers: Vec<&str> =
            chosen.iter().filter(|(_, t)| t.transform == 0).map(|(name, _)| name.as_str()).collect();
        for name in rule.pick(&layers)? {
            if let Some(target) = chosen.get_mut(&name) {
                target.bits = rule.bits;
            }
        }
    }
    Ok(chosen)
}

/// Lays the recipe's weight quantizers over a store: those that the model was trained with, or new ones
/// for training, or, without training, with the steps of least squared error.
fn lay_quantizers(
    recipe: &Recipe,
    start: &Start,
    weights: &mut Weights,
    training: bool,
    progress: &dyn Progress,
) -> Result<()> {
    let trained = start.quantizers.as_ref();
    let (mut zero_rows, mut rows) = (0usize, 0usize);
    for (index, transform) in recipe.transform.iter().enumerate() {
        let selected = recipe.select.as_ref().filter(|_| index == 0).map_or(0, |select| select.bits);
        let bits = transform.bits.max(selected);
        if transform.kind == WeightQuant::Statsq && bits > 4 && training {
            progress.note(&format!(
                "transform.{index}: StatsQ at {bits} bits clips at twice the mean magnitude, as at 2 bits; lsq has \
                 no such bound"
            ));
        }
    }
    let mut chosen = targets(recipe, weights)?;
    qkr::reparameterize(recipe, &start.config, trained.is_some(), weights, &mut chosen)?;
    for (name, Target { transform, bits }) in chosen {
        let config = &recipe.transform[transform];
        let w = weights.get(&name)?.tensor()?.detach();
        checkpoint::check_finite(&name, &w)?;
        let sums = w.abs()?.flatten_from(1)?.sum(1)?.to_vec1::<f32>()?;
        zero_rows += sums.iter().filter(|s| **s == 0.0).count();
        rows += sums.len();
        let rule = match (trained, training) {
            (Some(trained), _) => trained::weight_rule(config.kind, bits, &name, &w, trained)?,
            (None, true) => config.kind.training(bits, config.group, &w)?,
            (None, false) => config.kind.untrained(bits, config.group, &w)?,
        };
        weights.wrap(&name, rule)?;
    }
    if zero_rows > 0 {
        progress.note(&format!("{zero_rows} of {rows} weight rows are all zero and stay zero"));
    }
    Ok(())
}

/// Hangs activation quantizers on every tap of the model, from what `images` give there: where training
/// follows with the steps that it starts from, else with those of least squared error.
pub fn calibrate(
    recipe: &Recipe,
    config: &VisionConfig,
    weights: &mut Weights,
    images: &Tensor,
    training: bool,
    progress: &dyn Progress,
) -> Result<()> {
    let activation = recipe.activation;
    if activation.bits == 32 {
        return Ok(());
    }
    let silent = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = silent.clone();
    let calibration = Calibration::new(Box::new(move |name, site, x| {
        let bits = if site.edge { activation.edge_bits } else { activation.bits };
        let (rule, zero) =
            if training { ActQuant::start(bits, site, x) } else { ActQuant::fit(bits, site, x) }?;
        if let (true, Ok(mut seen)) = (zero, seen.lock()) {
            seen.push(name.to_string());
        }
        Ok(Some(Arc::new(rule)))
    }));
    let store = weights.folded()?.calibrating(calibration.clone());
    config.build(&store)?.forward(images)?;
    for (name, rule) in calibration.rules()? {
        weights.hang(name, rule);
    }
    if let Ok(names) = silent.lock() {
        for name in names.iter() {
            progress.note(&format!("{name}: zero throughout at calibration, its step starts at 1e-5"));
        }
    }
    Ok(())
}

/// Models above this are written in shards, as Hugging Face does.
const SHARD_BYTES: u64 = 5_000_000_000;

/// Writes a model folder: config.json, model.safetensors or its shards, preprocessor_config.json. Returns
/// the bytes of the weights' files.
pub fn write_model(
    dir: &Path,
    config: &VisionConfig,
    preprocess: &Preprocess,
    weights: &Weights,
) -> Result<u64> {
    if dir.exists() {
        files::discard(dir)?;
    }
    let staging = files::Staging::new(dir)?;
    let mut json = config.to_hf();
    let quantization = QuantizationConfig::of(weights);
    if !quantization.weights.is_empty() {
        if let Some(object) = json.as_object_mut() {
            let value = serde_json::to_value(&quantization)
                .map_err(|e| Error::Run(format!("quantization_config: {e}")))?;
            object.insert("quantization_config".into(), value);
        }
    }
    let pretty =
        |value: &Value| serde_json::to_vec_pretty(value).map_err(|e| Error::Run(format!("config.json: {e}")));
    let metadata = [("format".to_string(), "pt".to_string())].into();
    let bytes = checkpoint::save_model(staging.path(), &stored_tensors(weights)?, &metadata, SHARD_BYTES)?;
    files::write_bytes(&staging.path().join("config.json"), &pretty(&json)?)?;
    let processor = staging.path().join("preprocessor_config.json");
    files::write_bytes(&processor, &pretty(&preprocess.to_json())?)?;
    staging.commit()?;
    Ok(bytes)
}

/// Whether the recipe quantizes without any training.
fn untrained_quantization(recipe: &Recipe, start: &Start, samples: usize) -> bool {
    let runs = |p: &&PhaseConfig| p.quantize && (p.when == When::Always || start.untrained);
    recipe.phase.iter().filter(runs).all(|p| phase_steps(recipe, p, samples) == 0)
}

/// Runs a recipe in the folder `dir`, which exists and holds the resolved recipe; from its latest
/// checkpoint where it has one. Returns what summary.json holds.
pub fn run(recipe: &Recipe, dir: &Path, device: &Device, progress: &dyn Progress) -> Result<Value> {
    kernels::set_arithmetic(recipe.train.products);
    let started = Instant::now();
    let saved = resume::latest(dir)?;
    let state = saved.as_ref().map(|s| s.state.clone()).unwrap_or_default();
    let dataset = open_data(recipe)?;
    let (start, dataset) = start::prepare(recipe, dataset, device)?;
    let notes = dataset.iter().flat_map(|d| &d.notes).chain(&start.notes);
    notes.for_each(|note| progress.note(note));
    let Some(dataset) = dataset else {
        return without_data(recipe, dir, start, started, device, progress);
    };
    if let Some(signal) = signal::asked() {
        return Err(Error::Stopped { signal, resume: Some(dir.to_path_buf()) });
    }
    let metrics = Metrics::open(&dir.join("metrics.jsonl"), state.metrics_lines)?;
    if let Some(saved) = &saved {
        saved.say(device, progress);
    }
    let preprocess = Arc::new(start.preprocess.clone());
    let images = Images { recipe, dataset: &dataset, preprocess, model: &start.config, device };
    let mut trainer = Trainer {
        recipe,
        dir,
        supply: &images,
        device,
        progress,
        metrics,
        seen: None,
        average: None,
        earlier_s: state.wall_s,
        state,
        started,
    };
    let done = train_phases(&mut trainer, &start, saved, device)?;
    finish(&mut trainer, &start, done)
}

/// Packs, writes, reads back, measures, sums up.
fn finish(trainer: &mut Trainer<'_, Images<'_>>, start: &Start, trained: Trained) -> Result<Value> {
    let Trained { weights, tracker } = trained;
    let recipe = trainer.recipe;
    let fake = trainer.measure(&weights.folded()?, "fake-quantized")?;
    let packed = weights.packed()?;
    say_products(&start.config, &packed, trainer.progress)?;
    let dir = trainer.dir.join("model");
    let packed_bytes = write_model(&dir, &start.config, &start.preprocess, &packed)?;
    let read_back = open_model(&dir, trainer.device)?;
    let got = trainer.evaluate(&read_back.weights, "packed", true)?;
    let fp = trainer.state.full_precision.unwrap_or_default();
    let params = weights.params();
    let trainable: usize = params.iter().map(|p| p.var.elem_count()).sum();
    let mut summary = summary_head(recipe, start, trainer.wall_s(), trainer.device);
    let mut put = |key: &str, value: Value| summary.insert(key.to_string(), value);
    put("steps", json!(trainer.state.step));
    put("params_trainable", json!(trainable));
    put("fp_top1", json!(fp.top1));
    put("fp_top5", json!(fp.top5));
    put("q_top1", json!(got.top1));
    put("q_top5", json!(got.top5));
    put("fake_quant_top1", json!(fake.top1));
    put("eval_samples", json!(got.samples));
    put("fp_bytes", json!(trainer.state.fp_bytes));
    put("packed_bytes", json!(packed_bytes));
    put("compression", json!(trainer.state.fp_bytes as f64 / packed_bytes.max(1) as f64));
    let coarse = crate::train::coarse(&weights);
    put("oscillation", json!(tracker.figures(|name| coarse.contains(name))?.percent));
    put("frozen", json!(trainer.state.frozen));
    let rate = trainer.state.samples_per_s;
    put("train_samples_per_s", if rate > 0.0 { json!(rate) } else { Value::Null });
    put("infer_samples_per_s_fp", json!(fp.samples_per_s));
    put("infer_samples_per_s_packed", json!(got.samples_per_s));
    write_summary(trainer.dir, summary, trainer.progress)
}

/// Warns where the product of query and key takes more room than both would.
fn say_products(config: &VisionConfig, packed: &Weights, progress: &dyn Progress) -> Result<()> {
    let places = qkr::held(config, packed);
    let bits = |name: &str| match packed.get(name).ok()?.expr() {
        Expr::Packed(packed) => Some(packed.grid().bits),
        _ => None,
    };
    qkr::notes(&places, bits)?.iter().for_each(|note| progress.note(note));
    Ok(())
}

/// Packs a pretrained model as it is, where there is no data to train or measure with.
fn without_data(
    recipe: &Recipe,
    dir: &Path,
    start: Start,
    started: Instant,
    device: &Device,
    progress: &dyn Progress,
) -> Result<Value> {
    let fp_bytes = 4 * start.config.params();
    let mut weights = start.weights.clone();
    lay_quantizers(recipe, &start, &mut weights, false, progress)?;
    let packed = weights.packed()?;
    say_products(&start.config, &packed, progress)?;
    let packed_bytes = write_model(&dir.join("model"), &start.config, &start.preprocess, &packed)?;
    let mut summary = summary_head(recipe, &start, started.elapsed().as_secs_f64(), device);
    let mut put = |key: &str, value: Value| summary.insert(key.to_string(), value);
    for key in ["fp_top1", "fp_top5", "q_top1", "q_top5", "train_samples_per_s"] {
        put(key, Value::Null);
    }
    for key in ["infer_samples_per_s_fp", "infer_samples_per_s_packed"] {
        put(key, Value::Null);
    }
    put("steps", json!(0));
    put("params_trainable", json!(0));
    put("fp_bytes", json!(fp_bytes));
    put("packed_bytes", json!(packed_bytes));
    put("compression", json!(fp_bytes as f64 / packed_bytes.max(1) as f64));
    put("oscillation", json!(0.0));
    put("frozen", json!(0.0));
    write_summary(dir, summary, progress)
}

/// The figures that every summary.json of a vision model has.
pub(crate) fn summary_head(
    recipe: &Recipe,
    start: &Start,
    wall_s: f64,
    device: &Device,
) -> Map<String, Value> {
    let head = json!({
        "command": "quantize",
        "method": match recipe.transform.first().map(|t| t.kind) {
            Some(WeightQuant::Lsq) => "lsq",
            _ => "statsq",
        },
        "recipe": recipe.name,
        "model": start.name,
        "seed": recipe.seed,
        "device": crate::device::name(device),
        "threads": rayon::current_num_threads(),
        "wall_s": wall_s,
        "peak_rss_bytes": peak_rss_bytes(),
        "params_total": start.config.params(),
        "version": env!("CARGO_PKG_VERSION"),
        "commit": env!("QTUNE_COMMIT"),
        "bits": recipe.transform.first().map(|t| t.bits),
        "act_bits": recipe.activation.bits,
    });
    let mut head = head.as_object().cloned().unwrap_or_default();
    head.extend(
        crate::device::peak_bytes(device).map(|bytes| ("peak_device_bytes".to_string(), json!(bytes))),
    );
    head
}

/// Writes summary.json, and the report with its figures before it.
pub(crate) fn write_summary(
    dir: &Path,
    summary: Map<String, Value>,
    progress: &dyn Progress,
) -> Result<Value> {
    let summary = Value::Object(summary);
    report::finish(dir, &summary).unwrap_or_else(|e| progress.note(&format!("report: {e}")));
    let text = serde_json::to_vec_pretty(&summary).map_err(|e| Error::Run(format!("summary.json: {e}")))?;
    files::write_bytes(&dir.join("summary.json"), &text)?;
    Ok(summary)
}

/// Tells whether a finished run lies in `dir`, and gives its summary.
pub fn finished(dir: &Path) -> Result<Option<Value>> {
    let path = dir.join("summary.json");
    if !path.exists() {
        return Ok(None);
    }
    let text = files::read_text(&path)?;
    serde_json::from_str(&text).map(Some).map_err(|e| Error::input(&path, e.to_string()))
}

/// The figures of an evaluation as summary keys.
pub fn accuracy_json(accuracy: &Accuracy) -> Map<String, Value> {
    let value = json!({
        "top1": accuracy.top1,
        "top5": accuracy.top5,
        "loss": accuracy.loss,
        "samples": accuracy.samples,
        "samples_per_s": accuracy.samples_per_s,
    });
    value.as_object().cloned().unwrap_or_default()
}
