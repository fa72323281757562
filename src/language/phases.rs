//! The phases of a run over text: each with its optimizer, resumed where the run stands.

use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::Arc;

use super::supply::Texts;
use super::task::Predict;
use crate::models::Llama;
use crate::optim::Optimizer;
use crate::recipe::When;
use crate::train::{phase_steps, resume, signal, Average, Phase, Supply, Tracker, Trainer};
use crate::weights::{Param, Weights};
use crate::{Error, Result};

/// What all phases of a run share.
pub(super) struct Training<'a> {
    /// The trainable store.
    pub weights: &'a Weights,
    /// A frozen store that is learned from.
    pub teacher: Option<&'a Weights>,
    /// The number that dropout draws by.
    pub pass: Arc<AtomicU64>,
    /// Whether the model starts from random numbers.
    pub untrained: bool,
}

/// Runs the recipe's phases from where the run stands, and gives the tracks of quantized weights.
pub(super) fn train(
    trainer: &mut Trainer<'_, Texts<'_>>,
    training: &Training<'_>,
    saved: Option<resume::Saved>,
) -> Result<Tracker> {
    let (recipe, device) = (trainer.recipe, trainer.device);
    let samples = trainer.supply.samples();
    let params = training.weights.params();
    let mut tracker = Tracker::default();
    let (mut resumed, first) = (saved, trainer.state.phase);
    let mut carried: Option<Box<dyn Optimizer>> = None;
    for (index, phase) in recipe.phase.iter().enumerate().skip(first) {
        if phase.when == When::Untrained && !training.untrained {
            continue;
        }
        let goes_on = phase.calm.is_some() || phase.continue_optimizer || recipe.optimizer.remembers();
        let restored = resumed.take().filter(|_| index == first);
        let mut optimizer = match carried.take().filter(|_| goes_on) {
            Some(carried) => carried,
            // What the run began with is in its checkpoint.
            None if restored.is_some() => recipe.optimizer.build(),
            None => trainer.begin_optimizer(&params)?,
        };
        match restored {
            Some(saved) => {
                saved.restore(&params, device)?;
                if saved.has_optimizer() {
                    let known = saved.with_state(&params);
                    optimizer.restore(&known, &|name| saved.optimizer(name, device))?;
                    let steps = phase_steps(recipe, phase, samples);
                    let midway = trainer.state.phase_step > 0 && trainer.state.phase_step < steps;
                    if recipe.train.ema > 0.0 && phase.calm.is_none() && midway {
                        let read = |name: &str| saved.optimizer(name, device);
                        trainer.average = Some(Average::restore(&params, recipe.train.ema, &read)?);
                    }
                }
                tracker = Tracker::restore(&trainer.state.tracked, &|name| saved.oscillation(name))?;
            }
            None => {
                trainer.state.phase = index;
                trainer.state.phase_step = 0;
                trainer.state.best = None;
                trainer.state.stale = 0;
                trainer.save(training.weights, optimizer.as_ref(), &mut tracker)?;
            }
        }
        run_phase(trainer, training, index, &mut tracker, optimizer.as_mut(), &params)?;
        carried = Some(optimizer);
    }
    if let Some(optimizer) = &carried {
        trainer.leave_optimizer(optimizer.as_ref(), &params)?;
    }
    Ok(tracker)
}

fn run_phase(
    trainer: &mut Trainer<'_, Texts<'_>>,
    training: &Training<'_>,
    index: usize,
    tracker: &mut Tracker,
    optimizer: &mut dyn Optimizer,
    params: &[Param],
) -> Result<()> {
    let recipe = trainer.recipe;
    let config = &recipe.phase[index];
    if params.is_empty() {
        return Err(Error::Run("nothing is trained: found no trainable parameter".into()));
    }
    let calm = config.calm.map(|band| training.weights.calmed(Some(band), false).0);
    let weights = calm.as_ref().unwrap_or(training.weights);
    let (model, dtype) = (trainer.supply.model, trainer.supply.dtype);
    let task = Predict {
        model: Llama::new(model, weights, dtype)?,
        teacher: training.teacher.map(|weights| Llama::new(model, weights, dtype)).transpose()?,
        checkpointing: recipe.train.checkpointing,
        pass: training.pass.clone(),
    };
    let before = trainer.state.phase_step;
    trainer.run(Phase { config, weights, task: &task, optimizer, tracker })?;
    if trainer.state.phase_step != before {
        trainer.save(weights, optimizer, tracker)?;
    }
    match signal::asked() {
        Some(signal) => Err(Error::Stopped { signal, resume: Some(PathBuf::from(trainer.dir)) }),
        None => Ok(()),
    }
}
