//! The road of `qtune quantize` for a language model: quantizers laid over its weights, trained against the
//! text and the full-precision model, packed, written, read back and measured; or packed as it is, tensor by
//! tensor.

use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device};
use serde_json::{json, Map, Value};

use super::phases::{train, Training};
use super::supply::{evaluate_text, Texts};
use super::{open, open_at, open_text, source, summary_head, write_language_model, write_summary, Start};
use crate::data::text::TextData;
use crate::models::{held, Llama};
use crate::quantize::{targets, Target};
use crate::recipe::{Fit, Recipe, When};
use crate::train::{phase_steps, resume, signal, Accuracy, Metrics, Progress, Trainer};
use crate::weights::{checkpoint, Packed, Weights};
use crate::{Error, Result};

/// Steps of all phases that this run takes.
pub(super) fn steps(recipe: &Recipe, samples: usize) -> usize {
    let untrained = source(recipe).is_ok_and(|source| source.new.is_some());
    let runs = recipe.phase.iter().filter(|phase| phase.when == When::Always || untrained);
    runs.map(|phase| phase_steps(recipe, phase, samples)).sum()
}

/// Whether the recipe trains at all, whatever the text.
fn trains(recipe: &Recipe) -> bool {
    steps(recipe, 1 << 20) > 0
}

/// Runs the recipe. See [`super::run`].
pub(super) fn run(
    recipe: &Recipe,
    dir: &Path,
    device: &Device,
    progress: &dyn Progress,
    started: Instant,
) -> Result<Value> {
    let start = open(recipe, device)?;
    start.notes.iter().for_each(|note| progress.note(note));
    let named = recipe.text.as_ref().is_some_and(|text| text.path.is_some());
    let data = match named || trains(recipe) || start.dir.is_none() {
        true => Some(open_text(recipe, &start)?),
        false => None,
    };
    data.iter().flat_map(|data| &data.notes).for_each(|note| progress.note(note));
    match data.filter(|_| trains(recipe)) {
        Some(data) => trained(recipe, dir, &start, &data, progress, started, device),
        None => {
            let data = match named || start.dir.is_none() {
                true => Some(open_text(recipe, &start)?),
                false => None,
            };
            untrained(recipe, dir, &start, data.as_ref(), progress, started)
        }
    }
}

/// Packs tensor by tensor: one dense tensor is in memory at a time.
fn untrained(
    recipe: &Recipe,
    dir: &Path,
    start: &Start,
    data: Option<&TextData>,
    progress: &dyn Progress,
    started: Instant,
) -> Result<Value> {
    let device = Device::Cpu;
    let measure = |weights: &Weights| -> Result<Option<Accuracy>> {
        let Some(data) = data else { return Ok(None) };
        let dtype = source(recipe)?.dtype.dtype();
        let weights = held(&start.config, weights, dtype)?;
        let model = Llama::new(&start.config, &weights, dtype)?;
        let batch = recipe.train.eval_batch_size;
        evaluate_text(&model, &data.eval, batch, &device, progress, true).map(Some)
    };
    let before = measure(&start.weights)?;
    let mut weights = start.weights.clone();
    let chosen = targets(recipe, &weights)?;
    let (mut error, mut power) = (0f64, 0f64);
    progress.start("packing", chosen.len());
    for (done, (name, Target { transform, bits })) in chosen.iter().enumerate() {
        if let Some(signal) = signal::asked() {
            return Err(Error::Stopped { signal, resume: None });
        }
        let config = &recipe.transform[*transform];
        let w = weights.get(name)?.tensor()?;
        checkpoint::check_finite(name, &w)?;
        let grid = config.kind.grid(*bits)?;
        let (packed, fit) = match config.fit {
            Fit::Best => Packed::fit(&w, grid, config.group)?,
            Fit::Nearest => Packed::nearest(&w, grid, config.group)?,
        };
        let count = w.elem_count() as f64;
        error += fit.mse * count;
        power += w.to_dtype(DType::F32)?.sqr()?.mean_all()?.to_scalar::<f32>()? as f64 * count;
        weights.insert(name.clone(), crate::weights::Expr::Packed(packed).into());
        progress.tick(done + 1, name);
    }
    progress.finish();
    let out = dir.join("model");
    let packed_bytes = write_language_model(&out, start, &weights)?;
    let after = match data {
        Some(_) => measure(&open_at(&out, &device)?.weights)?,
        None => None,
    };
    let mut summary = head(recipe, start, started.elapsed().as_secs_f64(), &device);
    put_losses(&mut summary, before, after);
    put_sizes(&mut summary, start, packed_bytes);
    let mut put = |key: &str, value: Value| summary.insert(key.to_string(), value);
    put("steps", json!(0));
    put("params_trainable", json!(0));
    put("relative_error", json!((error / power.max(f64::MIN_POSITIVE)).sqrt()));
    put("oscillation", json!(0.0));
    put("frozen", json!(0.0));
    write_summary(dir, summary, progress)
}

fn trained(
    recipe: &Recipe,
    dir: &Path,
    start: &Start,
    data: &TextData,
    progress: &dyn Progress,
    started: Instant,
    device: &Device,
) -> Result<Value> {
    let saved = resume::latest(dir)?;
    let state = saved.as_ref().map(|s| s.state.clone()).unwrap_or_default();
    let metrics = Metrics::open(&dir.join("metrics.jsonl"), state.metrics_lines)?;
    if let Some(saved) = &saved {
        saved.say(device, progress);
    }
    let teacher = held(&start.config, &start.weights, DType::F32)?;
    let mut weights = teacher.trainable()?;
    for (name, Target { transform, bits }) in targets(recipe, &weights)? {
        let config = &recipe.transform[transform];
        let w = weights.get(&name)?.tensor()?.detach();
        checkpoint::check_finite(&name, &w)?;
        let rule = config.kind.training(bits, config.group, &w)?;
        weights.wrap(&name, rule)?;
    }
    let texts = Texts { recipe, data, model: &start.config, dtype: DType::F32, device };
    let mut trainer = Trainer {
        recipe,
        dir,
        supply: &texts,
        device,
        progress,
        metrics,
        seen: None,
        average: None,
        earlier_s: state.wall_s,
        state,
        started,
    };
    let before = match trainer.state.full_precision {
        Some(before) => before,
        None => {
            let before = trainer.evaluate(&teacher, "full precision", true)?;
            trainer.state.full_precision = Some(before);
            trainer.state.measured = None;
            before
        }
    };
    progress.note(&format!("full precision: loss {:.4}", before.loss));
    let training = Training {
        weights: &weights,
        teacher: (recipe.distill.kind != crate::recipe::DistillKind::None).then_some(&teacher),
        pass: Arc::new(AtomicU64::new(0)),
        untrained: source(recipe)?.new.is_some(),
    };
    let tracker = train(&mut trainer, &training, saved)?;
    let fake = trainer.measure(&weights.settled()?, "fake-quantized")?;
    let out = dir.join("model");
    let packed_bytes = write_language_model(&out, start, &weights.packed()?)?;
    let read_back = held(&start.config, &open_at(&out, device)?.weights, DType::F32)?;
    let after = trainer.evaluate(&read_back, "packed", true)?;
    let trainable: usize = weights.params().iter().map(|p| p.var.elem_count()).sum();
    let mut summary = head(recipe, start, trainer.wall_s(), device);
    put_losses(&mut summary, Some(before), Some(after));
    put_sizes(&mut summary, start, packed_bytes);
    let coarse = crate::train::coarse(&weights);
    let rate = trainer.state.samples_per_s;
    let mut put = |key: &str, value: Value| summary.insert(key.to_string(), value);
    put("steps", json!(trainer.state.step));
    put("params_trainable", json!(trainable));
    put("fake_quant_loss", json!(fake.loss));
    put("oscillation", json!(tracker.figures(|name| coarse.contains(name))?.percent));
    put("frozen", json!(trainer.state.frozen));
    put("train_tokens_per_s", if rate > 0.0 { json!(rate) } else { Value::Null });
    write_summary(dir, summary, progress)
}

fn head(recipe: &Recipe, start: &Start, wall_s: f64, device: &Device) -> Map<String, Value> {
    let first = recipe.transform.first();
    let kind = first.map(|t| serde_json::to_value(t.kind).unwrap_or_default());
    let method = kind.as_ref().and_then(Value::as_str).unwrap_or("statsq").to_string();
    let mut summary = summary_head(recipe, "quantize", &method, start, wall_s, device);
    summary.insert("bits".into(), json!(first.map(|t| t.bits)));
    summary.insert("group_size".into(), json!(first.and_then(|t| t.group)));
    summary.insert("act_bits".into(), json!(32));
    summary
}

fn put_losses(summary: &mut Map<String, Value>, before: Option<Accuracy>, after: Option<Accuracy>) {
    let mut put = |key: &str, value: Option<f64>| summary.insert(key.to_string(), json!(value));
    put("fp_loss", before.map(|f| f.loss));
    put("fp_ppl", before.map(|f| f.loss.exp()));
    put("q_loss", after.map(|f| f.loss));
    put("q_ppl", after.map(|f| f.loss.exp()));
    put("infer_tokens_per_s_fp", before.map(|f| f.samples_per_s));
    put("infer_tokens_per_s_packed", after.map(|f| f.samples_per_s));
    summary.insert("eval_tokens".into(), json!(after.map(|f| f.samples)));
}

fn put_sizes(summary: &mut Map<String, Value>, start: &Start, packed_bytes: u64) {
    summary.insert("fp_bytes".into(), json!(start.bytes));
    summary.insert("packed_bytes".into(), json!(packed_bytes));
    summary.insert("compression".into(), json!(start.bytes as f64 / packed_bytes.max(1) as f64));
}
