//! The road of `qtune finetune`: a frozen model, an adapter beside it or all of it trained, the adapter
//! written as PEFT has it, read back and measured.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device};
use serde_json::{json, Value};

use super::choice::{choice, Choice};
use super::generate::{generate, Limits, Sampling};
use super::phases::{train, Training};
use super::supply::{evaluate_text, Texts};
use super::{open, open_text, source, summary_head, write_language_model, write_summary, Start};
use crate::adapter::{self, Adapter, AdapterConfig, Attach, Modules, Save};
use crate::data::text::TextSet;
use crate::models::{held, Llama};
use crate::recipe::{AdapterKind, AdapterSlot, BaseConfig, Recipe};
use crate::select::kappa::{file, low_rank_for};
use crate::train::{resume, signal, Accuracy, Metrics, Progress, Trainer};
use crate::transform::Bat;
use crate::weights::{Centering, Expr, Grid, Weights};
use crate::{files, Error, Result};

/// A model made ready for training: what is frozen is packed, what is trained is in place.
pub(super) struct Ready {
    /// The store that is trained.
    pub weights: Weights,
    /// What is frozen, without the adapter.
    pub base: Weights,
    /// The adapter's configuration, where there is one.
    pub config: Option<AdapterConfig>,
    /// PiSSA's factors at the start, which were taken out of the base.
    pub factors: Option<Adapter>,
    /// The modules that are trained.
    pub selected: Vec<String>,
    /// The number that dropout draws by.
    pub pass: Arc<AtomicU64>,
    /// What `[kappa]` chose.
    pub choice: Option<Choice>,
}

/// Names of the weights that `[base]` packs: the matrices of all blocks, and an output embedding of its
/// own stays as it is.
pub(super) fn packable(start: &Start) -> Vec<String> {
    let shapes = start.config.shapes();
    let inside = |name: &str| name.starts_with("model.layers.");
    shapes
        .into_iter()
        .filter(|(name, shape)| shape.len() == 2 && inside(name))
        .map(|(name, _)| name)
        .collect()
}

/// The rank of an adapter, and what to say of it.
pub(super) fn rank_of(slot: &AdapterSlot, modules: &Modules) -> Result<(usize, Option<String>)> {
    let usual = if slot.is_block() { 64 } else { 16 };
    if let Some(params) = slot.match_params {
        let targets = slot.peft(1, "").targets(modules)?;
        let sizes: Vec<(usize, usize)> = targets.into_iter().map(|(_, (out, inner))| (inner, out)).collect();
        let rank = low_rank_for(&sizes, params)?;
        return Ok((rank, Some(format!("rank {rank}: the largest with at most {params} parameters in all"))));
    }
    match slot.rank {
        Some(rank) => Ok((rank, None)),
        None if slot.kind != AdapterKind::Bone => Ok((usual, None)),
        None => {
            let targets = slot.peft(1, "").targets(modules)?;
            let sizes: Vec<(usize, usize)> = targets.into_iter().map(|(_, size)| size).collect();
            let rank = Bat::rank_for(&sizes, usual);
            let note = format!("rank {rank}: the largest divisor of every adapted size up to {usual}");
            Ok((rank, (rank != usual).then_some(note)))
        }
    }
}

/// Packs the weights of `[base]` from where they lie.
fn pack(base: BaseConfig, start: &Start, weights: &mut Weights, progress: &dyn Progress) -> Result<()> {
    let grid = Grid::new(base.bits, if base.bits == 2 { Centering::MidRise } else { Centering::Signed })?;
    let names = packable(start);
    let (mut worst, mut done) = (0f64, 0usize);
    progress.start("packing", names.len());
    weights.pack_frozen(&names, grid, Some(base.group_size), |name, fit| {
        worst = worst.max(fit.relative());
        done += 1;
        progress.tick(done, name);
    })?;
    progress.finish();
    progress.note(&format!(
        "{done} weights packed to {} bits in groups of {}, relative error at most {worst:.3}",
        base.bits, base.group_size
    ));
    Ok(())
}

/// Packs the base of an opened model as a recipe's `[base]` says.
pub fn pack_base(recipe: &Recipe, start: &mut Start, progress: &dyn Progress) -> Result<()> {
    let Some(base) = recipe.base else { return Ok(()) };
    let mut weights = start.weights.clone();
    pack(base, start, &mut weights, progress)?;
    start.weights = weights;
    Ok(())
}

/// Packs what `[base]` says and lays the adapter over it, or makes what is tuned trainable: every weight, or
/// those that `[kappa]` chooses. `dir`: the run's folder.
pub(super) fn ready(recipe: &Recipe, start: &Start, dir: &Path, progress: &dyn Progress) -> Result<Ready> {
    let pass = Arc::new(AtomicU64::new(0));
    // Condition numbers are those of the best copy at hand: packing moves the small singular values.
    let choice = choice(recipe, start, Some(dir), progress)?;
    let Some(slot) = choice.as_ref().and_then(|c| c.slot.as_ref()).or(recipe.adapter.as_ref()) else {
        let (weights, selected) = match (&choice, &recipe.kappa) {
            (Some(choice), Some(config)) => {
                let base = held(&start.config, &start.weights, source(recipe)?.dtype.dtype())?;
                (choice.latent(config, start, &base)?, choice.modules())
            }
            _ => {
                let weights = held(&start.config, &start.weights, DType::F32)?.trainable()?;
                let selected = weights.iter().map(|(name, _)| name.to_string()).collect();
                (weights, selected)
            }
        };
        let base = Weights::default();
        return Ok(Ready { weights, base, config: None, factors: None, selected, pass, choice });
    };
    let mut weights = start.weights.clone();
    if let Some(base) = recipe.base {
        if slot.kind == AdapterKind::Pissa {
            return Err(Error::usage(
                "base and adapter.kind = \"pissa\": its base is a residual that packing would change",
            ));
        }
        pack(base, start, &mut weights, progress)?;
    }
    // Packed from where they lie: the rest alone comes to memory as it is.
    let base = held(&start.config, &weights, source(recipe)?.dtype.dtype())?;
    let mut weights = base.clone();
    let modules = Modules::of_shapes(&start.json, &start.config.shapes());
    let (rank, note) = rank_of(slot, &modules)?;
    note.iter().for_each(|note| progress.note(note));
    let config = slot.peft(rank, &start.name);
    let training = adapter::Training { seed: recipe.seed, pass: pass.clone() };
    let started = config.start(&mut weights, &modules, &training)?;
    started.attached.notes.iter().for_each(|note| progress.note(note));
    let all = started.attached.wrapped.iter().chain(&started.attached.replaced);
    let selected = all.map(|name| name.strip_suffix(".weight").unwrap_or(name).to_string()).collect();
    let factors = started.start;
    Ok(Ready { weights, base, config: Some(config), factors, selected, pass, choice })
}

/// The model as it was, with what was trained in its place.
fn tuned(start: &Start, ready: &Ready) -> Result<Weights> {
    let mut weights = start.weights.clone();
    for (name, weight) in ready.weights.iter().filter(|(_, w)| matches!(w.expr(), Expr::Latent(_))) {
        weights.insert(name, weight.folded()?);
    }
    Ok(weights)
}

/// Runs the recipe. See [`super::run`].
pub(super) fn run(
    recipe: &Recipe,
    dir: &Path,
    device: &Device,
    progress: &dyn Progress,
    started: Instant,
) -> Result<Value> {
    let saved = resume::latest(dir)?;
    let state = saved.as_ref().map(|s| s.state.clone()).unwrap_or_default();
    let start = open(recipe, device)?;
    start.notes.iter().for_each(|note| progress.note(note));
    let data = open_text(recipe, &start)?;
    data.notes.iter().for_each(|note| progress.note(note));
    if let Some(signal) = signal::asked() {
        return Err(Error::Stopped { signal, resume: Some(dir.to_path_buf()) });
    }
    let ready = ready(recipe, &start, dir, progress)?;
    let metrics = Metrics::open(&dir.join("metrics.jsonl"), state.metrics_lines)?;
    if let Some(saved) = &saved {
        saved.say(device, progress);
    }
    let config = start.config.clone();
    let dtype = source(recipe)?.dtype.dtype();
    let texts = Texts { recipe, data: &data, model: &config, dtype, device };
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
    let base = match trainer.state.full_precision {
        Some(base) => base,
        None => {
            let base = trainer.evaluate(&ready.weights.settled()?, "base", true)?;
            trainer.state.full_precision = Some(base);
            trainer.state.measured = None;
            base
        }
    };
    progress.note(&format!("before: loss {:.4}, perplexity {:.2}", base.loss, base.loss.exp()));
    let control = match (control_of(recipe, &start)?, trainer.state.control) {
        (None, _) => None,
        (Some(set), Some(loss)) => Some((set, loss)),
        (Some(set), None) => {
            let loss = control_loss(&trainer, &set, &ready.weights.settled()?)?;
            trainer.state.control = Some(loss);
            Some((set, loss))
        }
    };
    let training = Training {
        weights: &ready.weights,
        teacher: None,
        pass: ready.pass.clone(),
        untrained: source(recipe)?.new.is_some(),
    };
    train(&mut trainer, &training, saved)?;
    finish(&mut trainer, &start, &ready, base, control)
}

/// The text that is not to be forgotten, where the recipe has one.
fn control_of(recipe: &Recipe, start: &Start) -> Result<Option<TextSet>> {
    match &recipe.text {
        Some(text) => text.open_control(&start.tokenizer),
        None => Ok(None),
    }
}

/// Mean loss in nats a token on the control text.
fn control_loss(trainer: &Trainer<'_, Texts<'_>>, set: &TextSet, weights: &Weights) -> Result<f64> {
    let model = Llama::new(trainer.supply.model, weights, trainer.supply.dtype)?;
    let size = trainer.recipe.train.eval_batch_size;
    Ok(evaluate_text(&model, set, size, trainer.device, trainer.progress, true)?.loss)
}

/// Writes the result, reads it back, measures and sums up.
fn finish(
    trainer: &mut Trainer<'_, Texts<'_>>,
    start: &Start,
    ready: &Ready,
    base: Accuracy,
    control: Option<(TextSet, f64)>,
) -> Result<Value> {
    let (recipe, device) = (trainer.recipe, trainer.device);
    let (written, bytes, read_back) = match &ready.config {
        None => {
            let dir = trainer.dir.join("model");
            let bytes = write_language_model(&dir, start, &tuned(start, ready)?)?;
            let opened = super::open_at(&dir, device)?;
            (dir, bytes, held(&start.config, &opened.weights, trainer.supply.dtype)?)
        }
        Some(config) => save_adapter(trainer, start, ready, config)?,
    };
    let got = trainer.evaluate(&read_back, "final", true)?;
    let control = match control {
        Some((set, before)) => Some((before, control_loss(trainer, &set, &read_back)?)),
        None => None,
    };
    trainer.state.measured = None;
    let params = ready.weights.params();
    let trainable: usize = params.iter().map(|p| p.var.elem_count()).sum();
    let adapter = recipe.adapter.as_ref().map(|slot| format!("{:?}", slot.kind).to_lowercase());
    let method = match (&ready.choice, &adapter) {
        (Some(_), _) => "kappatune",
        (None, Some(kind)) => kind,
        (None, None) => "full",
    };
    let mut summary = summary_head(recipe, "finetune", method, start, trainer.wall_s(), device);
    let mut put = |key: &str, value: Value| summary.insert(key.to_string(), value);
    put("steps", json!(trainer.state.step));
    put("params_trainable", json!(trainable));
    put("base_loss", json!(base.loss));
    put("final_loss", json!(got.loss));
    put("base_ppl", json!(base.loss.exp()));
    put("final_ppl", json!(got.loss.exp()));
    if let Some((before, after)) = control {
        put("control_base_loss", json!(before));
        put("control_final_loss", json!(after));
        put("control_forgetting", json!(after - before));
        put("control_ppl_ratio", json!((after - before).exp()));
    }
    put("eval_tokens", json!(got.samples));
    let rate = trainer.state.samples_per_s;
    put("tokens_per_s", if rate > 0.0 { json!(rate) } else { Value::Null });
    put("adapter_bytes", if ready.config.is_some() { json!(bytes) } else { Value::Null });
    put("selected", json!(ready.selected));
    if let Some(Choice { selection, .. }) = &ready.choice {
        put("adapter", json!(adapter));
        put("model_hash", json!(selection.model_hash));
        put("selected_params", json!(selection.selected_params));
    }
    put("base_bits", json!(recipe.base.map(|base| base.bits)));
    put("skipped_steps", json!(trainer.state.skipped));
    put("output", json!(written.display().to_string()));
    if let Some((before, after)) = samples(trainer, start, ready, &read_back)? {
        put("sample_before", json!(before));
        put("sample_after", json!(after));
    }
    write_summary(trainer.dir, summary, trainer.progress)
}

/// Saves the adapter as PEFT has it and puts what was read back on the base again.
fn save_adapter(
    trainer: &Trainer<'_, Texts<'_>>,
    start: &Start,
    ready: &Ready,
    config: &AdapterConfig,
) -> Result<(PathBuf, u64, Weights)> {
    let recipe = trainer.recipe;
    let dir = trainer.dir.join("adapter");
    let modules = Modules::of_shapes(&start.json, &start.config.shapes());
    // What is read back goes on the base that it was trained on.
    let base = ready.base.clone();
    let mut adapter = Adapter::of(config, &ready.weights, &modules)?;
    if let Some(factors) = &ready.factors {
        adapter = adapter.converted(factors)?;
    }
    if dir.exists() {
        files::discard(&dir)?;
    }
    let bytes = adapter.save(&dir, &Save::default())?;
    if let Some(Choice { selection, .. }) = &ready.choice {
        // What it was chosen by goes where the adapter goes.
        selection.write(&dir.join(file::FILE_NAME))?;
    }
    if recipe.adapter.as_ref().is_some_and(|slot| slot.as_lora) {
        let lora = trainer.dir.join("adapter-lora");
        if lora.exists() {
            files::discard(&lora)?;
        }
        let (plain, notes) = adapter.as_lora(&base, &modules)?;
        notes.iter().for_each(|note| trainer.progress.note(note));
        plain.save(&lora, &Save::default())?;
    }
    let mut read_back = base;
    Adapter::open(&dir)?.attach(&mut read_back, &modules, &Attach::default())?;
    Ok((dir, bytes, read_back))
}

/// Tokens of a sample.
const SAMPLE: usize = 48;

/// How the model goes on from the first evaluation text, before and after.
fn samples(
    trainer: &Trainer<'_, Texts<'_>>,
    start: &Start,
    ready: &Ready,
    after: &Weights,
) -> Result<Option<(String, String)>> {
    let (config, dtype) = (trainer.supply.model, trainer.supply.dtype);
    let data = trainer.supply.data;
    let prompt: Vec<u32> = match data.eval.samples().first() {
        Some(sample) => {
            let asked = sample.train.iter().position(|t| *t).unwrap_or(1).max(1);
            // Of a text without a prompt its first tokens.
            let asked = if asked < 4 { 12.min(sample.tokens.len()) } else { asked };
            sample.tokens[..asked].to_vec()
        }
        None => data.eval.stream().map(|s| s[..16.min(s.len())].to_vec()).unwrap_or_default(),
    };
    if prompt.is_empty() || prompt.len() >= config.max_positions {
        return Ok(None);
    }
    let before = match ready.config {
        Some(_) => ready.base.clone(),
        None => held(config, &start.weights, dtype)?,
    };
    let asked = start.tokenizer.decode(&prompt)?;
    let limits = Limits { tokens: SAMPLE, stop: vec!["\n".into()], ignore_eos: false };
    let answer = |weights: &Weights| -> Result<String> {
        let model = Llama::new(config, weights, dtype)?;
        let sampling = Sampling::default();
        let device = trainer.device;
        let answer =
            generate(&model, &start.tokenizer, &prompt, &sampling, &limits, device, &mut |_| Ok(()))?;
        Ok(format!("{asked}{}", answer.text))
    };
    Ok(Some((answer(&before)?, answer(after)?)))
}
