//! The phases of a run: what each needs in place, the optimizer it goes on with, its teacher, annealing.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device};

use super::{calibrate, lay_quantizers, qkr, trained, untrained_quantization, write_model, Start};
use crate::data::Preprocess;
use crate::models::{self, open_model_with, VisionConfig, VisionModel};
use crate::optim::Optimizer;
use crate::recipe::{CalmQk, DistillKind, PhaseConfig, Recipe, When};
use crate::train::supply::Supply;
use crate::train::{
    phase_steps, resume, signal, Average, Classify, Images, Phase, Progress, Quiet, Recordings, Tracker,
    Trainer,
};
use crate::transform::ActQuant;
use crate::weights::{Pickle, Weights};
use crate::{hub, Error, Result};

/// The trained, still trainable student and the tracks of its weights.
pub(super) struct Trained {
    pub weights: Weights,
    pub tracker: Tracker,
}

fn float_dir(dir: &Path) -> PathBuf {
    dir.join("checkpoints").join("float")
}

/// Runs the recipe's phases from where the run stands.
pub(super) fn train_phases(
    trainer: &mut Trainer<'_, Images<'_>>,
    start: &Start,
    saved: Option<resume::Saved>,
    device: &Device,
) -> Result<Trained> {
    let recipe = trainer.recipe;
    let samples = trainer.supply.samples();
    // What was trained is not fitted again.
    let untrained = untrained_quantization(recipe, start, samples) && start.quantizers.is_none();
    let mut weights = start.weights.trainable()?;
    let mut tracker = Tracker::default();
    let mut quantized = false;
    let mut resumed = saved;
    let first = trainer.state.phase;
    let mut carried: Option<Box<dyn Optimizer>> = None;
    for (index, phase) in recipe.phase.iter().enumerate() {
        let skip = phase.when == When::Untrained && !start.untrained;
        let steps = if skip { 0 } else { phase_steps(recipe, phase, samples) };
        // A product that an earlier phase made a weight of its own stays one, on a resumed run too.
        let unfactor = |weights: Weights| match phase.calm_qk {
            CalmQk::Hold if steps > 0 => weights.unfactored(),
            _ => Ok(weights),
        };
        if index < first && (quantized || !phase.quantize) {
            weights = unfactor(weights)?;
            continue;
        }
        // What a phase needs to be in place, made once and read again on resume.
        if phase.quantize && !quantized {
            if index <= first && resumed.is_some() && trainer.state.full_precision.is_some() {
                if let Some(saved) = &resumed {
                    hang_saved(&mut weights, saved, device)?;
                    if untrained {
                        // Steps of least squared error belong to the weights that were trained: they go back
                        // into the variables, through a store of the saved form, before the steps are fitted.
                        let mut form = weights.clone();
                        lay_quantizers(recipe, start, &mut form, false, &Quiet)?;
                        saved.restore(&form.params(), device)?;
                    }
                }
                lay_quantizers(recipe, start, &mut weights, !untrained, &Quiet)?;
            } else {
                begin_quantization(trainer, start, &mut weights, untrained)?;
            }
            quantized = true;
        }
        weights = unfactor(weights)?;
        if index < first {
            continue;
        }
        if skip && !(index == first && resumed.is_some()) {
            trainer.progress.note(&format!("phase {}: skipped, the model is trained", phase.name));
            continue;
        }
        // Annealing, for one, goes on from the optimizer's state of the phase before it.
        // So does the memory of a rule that has one.
        let goes_on = phase.calm.is_some() || phase.continue_optimizer || recipe.optimizer.remembers();
        let saved = resumed.take().filter(|_| index == first);
        let mut optimizer = match carried.take().filter(|_| goes_on) {
            Some(carried) => carried,
            // What the run began with is in its checkpoint.
            None if saved.is_some() || skip => recipe.optimizer.build(),
            None => trainer.begin_optimizer(&weights.params())?,
        };
        optimizer.retain(&weights.params());
        let restored = match saved {
            Some(saved) => {
                let params = weights.params();
                saved.restore(&params, device)?;
                if saved.has_optimizer() {
                    let known = saved.with_state(&params);
                    optimizer.restore(&known, &|name| saved.optimizer(name, device))?;
                    let decay = if phase.calm.is_some() { 0.0 } else { recipe.train.ema };
                    let midway = trainer.state.phase_step > 0 && trainer.state.phase_step < steps;
                    if decay > 0.0 && midway {
                        let read = |name: &str| saved.optimizer(name, device);
                        trainer.average = Some(Average::restore(&params, decay, &read)?);
                    }
                }
                tracker = Tracker::restore(&trainer.state.tracked, &|name| saved.oscillation(name))?;
                true
            }
            None => false,
        };
        if skip {
            trainer.progress.note(&format!("phase {}: skipped, the model is trained", phase.name));
            continue;
        }
        if !restored {
            trainer.state.phase = index;
            trainer.state.phase_step = 0;
            trainer.state.best = None;
            trainer.state.stale = 0;
            trainer.save(&weights, optimizer.as_ref(), &mut tracker)?;
        }
        run_phase(trainer, start, index, &weights, &mut tracker, optimizer.as_mut())?;
        carried = (phase.quantize || recipe.optimizer.remembers()).then_some(optimizer);
    }
    if let Some(optimizer) = &carried {
        trainer.leave_optimizer(optimizer.as_ref(), &weights.params())?;
    }
    Ok(Trained { weights, tracker })
}

/// Ends the full-precision part: evaluates and writes the model that quantization starts from, then
/// lays the quantizers over it.
fn begin_quantization(
    trainer: &mut Trainer<'_, Images<'_>>,
    start: &Start,
    weights: &mut Weights,
    untrained: bool,
) -> Result<()> {
    let folded = weights.folded()?;
    let path = float_dir(trainer.dir);
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(|e| Error::io(parent, e))?;
    }
    trainer.state.fp_bytes = write_model(&path, &start.config, &start.preprocess, &folded)?;
    let accuracy = trainer.measure(&folded, "full precision")?;
    trainer.progress.note(&format!("full precision: top-1 {:.2} %", accuracy.top1));
    trainer.state.full_precision = Some(accuracy);
    if trainer.recipe.qkr.is_some() && start.quantizers.is_none() {
        let images = trainer.first_batch()?.images;
        qkr::say_moved(trainer.recipe, &start.config, weights, &images, trainer.progress)?;
    }
    lay_quantizers(trainer.recipe, start, weights, !untrained, trainer.progress)?;
    if trainer.recipe.activation.bits != 32 {
        let images = trainer.first_batch()?.images;
        match &start.quantizers {
            Some(trained) => trained::hang(trainer.recipe, &start.config, weights, &images, trained)?,
            None => calibrate(trainer.recipe, &start.config, weights, &images, !untrained, trainer.progress)?,
        }
    }
    // What was measured is the model without quantizers.
    trainer.state.measured = None;
    Ok(())
}

/// Hangs the rules of a checkpoint on their taps, trainable.
fn hang_saved(weights: &mut Weights, saved: &resume::Saved, device: &Device) -> Result<()> {
    for (name, description) in &saved.state.taps {
        let read = |suffix: &str| saved.tensor(&format!("{name}.{suffix}"), device);
        weights.hang(name.clone(), Arc::new(ActQuant::revive(name, description, &read, true)?));
    }
    Ok(())
}

fn run_phase(
    trainer: &mut Trainer<'_, Images<'_>>,
    start: &Start,
    index: usize,
    weights: &Weights,
    tracker: &mut Tracker,
    optimizer: &mut dyn Optimizer,
) -> Result<()> {
    let recipe = trainer.recipe;
    let config = &recipe.phase[index];
    let teacher = match (config.quantize, recipe.distill.kind) {
        (false, _) | (_, DistillKind::None) => None,
        (true, _) if phase_steps(recipe, config, trainer.supply.samples()) == 0 => None,
        (true, DistillKind::Soft | DistillKind::Pld) => {
            Some(teacher(recipe, trainer.dir, start, trainer.device)?)
        }
    };
    let runs = phase_steps(recipe, config, trainer.supply.samples()) > 0;
    let calm = if runs { annealed(config, weights, trainer.progress)? } else { None };
    let weights = calm.as_ref().unwrap_or(weights);
    let model = start.config.build(weights)?;
    let drop_path = Some((recipe.train.drop_path, recipe.seed));
    let recordings = recipe.train.graphs.then(Recordings::default);
    let task = Classify { model, teacher, distill: recipe.distill.kind, drop_path, heads: None, recordings };
    let phase = Phase { config, weights, task: &task, optimizer, tracker };
    let before = trainer.state.phase_step;
    trainer.run(phase)?;
    if trainer.state.phase_step != before {
        trainer.save(weights, optimizer, tracker)?;
    }
    match signal::asked() {
        Some(signal) => Err(Error::Stopped { signal, resume: Some(trainer.dir.to_path_buf()) }),
        None => Ok(()),
    }
}

/// The store with its quantizers annealed, where the phase says so. A band that reaches no weight is an
/// error; one that leaves nothing free is worth a line.
fn annealed(phase: &PhaseConfig, weights: &Weights, progress: &dyn Progress) -> Result<Option<Weights>> {
    let Some(band) = phase.calm else { return Ok(None) };
    let (calm, reached) = weights.calmed(Some(band), phase.calm_qk != CalmQk::Off);
    if reached == 0 {
        let message = format!("phase {}: calm = {band} reaches no weight", phase.name);
        return Err(Error::usage(format!("{message}, expected weights quantized by statsq")));
    }
    let (mut free, mut count) = (0f64, 0usize);
    for (_, gate) in calm.gates()? {
        free += gate.free.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
        count += gate.free.elem_count();
    }
    let percent = 100.0 * free / count.max(1) as f64;
    let name = &phase.name;
    progress.note(&match free == 0.0 {
        true => format!("phase {name}: no weight lies within {band} steps of a threshold, all are frozen"),
        false => format!("phase {name}: {percent:.2} % of the weights of {reached} layers are free to move"),
    });
    Ok(Some(calm))
}

/// The teacher: the model at the start of quantization, or the one that the recipe names, which must
/// see the same images and know the same classes as the student.
pub(super) fn teacher(recipe: &Recipe, run: &Path, start: &Start, device: &Device) -> Result<VisionModel> {
    let dir = match &recipe.distill.teacher {
        Some(path) => models::model_dir(&hub::resolve(&path.to_string_lossy())?),
        None => float_dir(run),
    };
    let opened = open_model_with(&dir, Pickle::when(recipe.model.allow_pickle()), device)?;
    let differ = |what: &str, found: String, expected: String| {
        Err(Error::input(&dir, format!("the teacher's {what}: found {found}, the student's is {expected}")))
    };
    let (found, expected) = (&opened.config, &start.config);
    if found.classes().len() != expected.classes().len() {
        let (a, b) = (found.classes().len(), expected.classes().len());
        return differ("number of classes", a.to_string(), b.to_string());
    }
    let known =
        |c: &VisionConfig| c.classes().iter().cloned().collect::<std::collections::BTreeSet<String>>();
    if known(found) == known(expected) && found.classes() != expected.classes() {
        return differ("order of classes", found.classes().join(", "), expected.classes().join(", "));
    }
    let input = |c: &VisionConfig| format!("{} x {:?}", c.channels(), c.image_size());
    if input(found) != input(expected) {
        return differ("image size", input(found), input(expected));
    }
    let normal = |p: &Preprocess| format!("mean {:?}, std {:?}, scale {}", p.mean, p.std, p.rescale);
    if normal(&opened.preprocess) != normal(&start.preprocess) {
        return differ("normalisation", normal(&opened.preprocess), normal(&start.preprocess));
    }
    opened.config.build(&opened.weights)
}
