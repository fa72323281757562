//! Checkpoints of a run: everything that a run needs to go on as if it had never stopped.
//!
//! `checkpoints/step-N-pP/` (after step N, in phase P) holds the trainables (`model.safetensors`), the optimizer's state
//! (`optimizer.safetensors`), the oscillation tracks (`oscillation.safetensors`) and `state.json`. Random
//! numbers and the order of the data are functions of seed, epoch and sample, so their state is the
//! step's number.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::task::Accuracy;
use super::Progress;
use crate::weights::{checkpoint, Checkpoint, Param, Weights};
use crate::{files, Error, Result};

/// The version of state.json that this program writes and reads.
const STATE_VERSION: u64 = 1;

/// Where a run stands.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    /// The version of this file.
    pub version: u64,
    /// The device of the steps up to here; of an older checkpoint nothing.
    #[serde(default)]
    pub device: String,
    /// Index of the phase in the recipe.
    pub phase: usize,
    /// Steps of that phase that are done.
    pub phase_step: usize,
    /// Steps of all phases that are done.
    pub step: usize,
    /// Lines of metrics.jsonl that belong to it.
    pub metrics_lines: usize,
    /// Seconds that the run took up to here, over all its processes.
    pub wall_s: f64,
    /// The evaluation of the full-precision model that quantization starts from.
    pub full_precision: Option<Accuracy>,
    /// The loss of the model that is adapted on the control text.
    #[serde(default)]
    pub control: Option<f64>,
    /// Top-1 on every task after a step, of a run over several tasks.
    #[serde(default)]
    pub row: Option<(usize, Vec<f64>)>,
    /// Bytes of that model's file.
    pub fp_bytes: u64,
    /// Samples a second of the last phase's training; 0 where nothing was trained.
    pub samples_per_s: f64,
    /// Percent of the quantized weights that annealing held still at the last logged step.
    #[serde(default)]
    pub frozen: f64,
    /// The last evaluation, and the step after which it was made.
    pub measured: Option<(usize, Accuracy)>,
    /// Best score of the phase (top-1, or minus the loss of text), and the step that reached it.
    pub best: Option<(f64, usize)>,
    /// Evaluations of the phase since the best one.
    #[serde(default)]
    pub stale: usize,
    /// Steps left out because something was not finite.
    #[serde(default)]
    pub skipped: usize,
    /// The rules on taps as they describe themselves, in the order in which the model came by them:
    /// sums over all trainables follow it.
    pub taps: Vec<(String, Value)>,
    /// Names of the weights whose oscillation is tracked.
    pub tracked: Vec<String>,
}

impl Default for State {
    fn default() -> Self {
        State {
            version: STATE_VERSION,
            device: String::new(),
            phase: 0,
            phase_step: 0,
            step: 0,
            metrics_lines: 0,
            wall_s: 0.0,
            full_precision: None,
            control: None,
            row: None,
            fp_bytes: 0,
            samples_per_s: 0.0,
            frozen: 0.0,
            measured: None,
            best: None,
            stale: 0,
            skipped: 0,
            taps: Vec::new(),
            tracked: Vec::new(),
        }
    }
}

/// A saved state and its tensors.
#[derive(Debug)]
pub struct Saved {
    /// Where it lies.
    pub dir: PathBuf,
    /// Where the run stood.
    pub state: State,
    model: Checkpoint,
    optimizer: Checkpoint,
    oscillation: Checkpoint,
}

fn folder(run: &Path) -> PathBuf {
    run.join("checkpoints")
}

/// The checkpoints of a run by step and phase, in order.
fn steps(run: &Path) -> Result<Vec<((usize, usize), PathBuf)>> {
    let dir = folder(run);
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&dir).map_err(|e| Error::io(&dir, e))? {
        let entry = entry.map_err(|e| Error::io(&dir, e))?;
        let name = entry.file_name();
        let at = name.to_str().and_then(|n| n.strip_prefix("step-")).and_then(|n| n.split_once("-p"));
        let at = at.and_then(|(step, phase)| Some((step.parse().ok()?, phase.parse().ok()?)));
        found.extend(at.map(|at| (at, entry.path())));
    }
    found.sort_unstable();
    Ok(found)
}

/// Saves a checkpoint: written under a temporary name, synced, renamed. Then older ones beyond `keep`
/// are removed, the best one apart.
pub fn save(
    run: &Path,
    state: &State,
    weights: &Weights,
    optimizer: Vec<(String, Tensor)>,
    oscillation: Vec<(String, Tensor)>,
    keep: usize,
) -> Result<()> {
    let dir = folder(run);
    std::fs::create_dir_all(&dir).map_err(|e| Error::io(&dir, e))?;
    // A phase begins where another ended: the phase is part of the name.
    let target = dir.join(format!("step-{:08}-p{}", state.step, state.phase));
    if target.exists() {
        files::discard(&target)?;
    }
    let params = weights.params();
    let model: Vec<(String, Tensor)> =
        params.iter().map(|p| (p.name.clone(), p.var.as_detached_tensor())).collect();
    let staging = files::Staging::new(&target)?;
    let at = |name: &str| staging.path().join(name);
    let none = BTreeMap::new();
    checkpoint::save(&at("model.safetensors"), &model, &none)?;
    checkpoint::save(&at("optimizer.safetensors"), &optimizer, &none)?;
    checkpoint::save(&at("oscillation.safetensors"), &oscillation, &none)?;
    let text = serde_json::to_vec_pretty(state).map_err(|e| Error::Run(format!("state.json: {e}")))?;
    files::write_bytes(&at("state.json"), &text)?;
    staging.commit()?;
    let best = state.best.map(|(_, step)| step);
    let older: Vec<_> = steps(run)?.into_iter().rev().skip(keep).collect();
    for ((step, _), path) in older {
        if Some(step) != best {
            files::discard(&path)?;
        }
    }
    Ok(())
}

/// The latest checkpoint of a run, after what killed processes left behind was swept away; `None`
/// where there is none yet.
pub fn latest(run: &Path) -> Result<Option<Saved>> {
    files::sweep(run)?;
    if folder(run).is_dir() {
        files::sweep(&folder(run))?;
    }
    match steps(run)?.pop() {
        Some((_, dir)) => read(dir).map(Some),
        None => Ok(None),
    }
}

/// The checkpoint after step `step` of phase `phase`, where it is kept.
pub fn at_step(run: &Path, step: usize, phase: usize) -> Result<Option<Saved>> {
    match steps(run)?.into_iter().find(|(at, _)| *at == (step, phase)) {
        Some((_, dir)) => read(dir).map(Some),
        None => Ok(None),
    }
}

fn read(dir: PathBuf) -> Result<Saved> {
    let path = dir.join("state.json");
    let text = files::read_text(&path)?;
    let state: State = serde_json::from_str(&text).map_err(|e| Error::input(&path, e.to_string()))?;
    if state.version != STATE_VERSION {
        let message = format!("version: found {}, expected {STATE_VERSION}", state.version);
        return Err(Error::input(&path, message));
    }
    Ok(Saved {
        model: Checkpoint::open(&dir.join("model.safetensors"))?,
        optimizer: Checkpoint::open(&dir.join("optimizer.safetensors"))?,
        oscillation: Checkpoint::open(&dir.join("oscillation.safetensors"))?,
        dir,
        state,
    })
}

impl Saved {
    /// Says where the run goes on, and where on another device than before.
    pub fn say(&self, device: &Device, progress: &dyn Progress) {
        progress.note(&format!("continuing from step {} ({})", self.state.step, self.dir.display()));
        let now = crate::device::name(device);
        if !self.state.device.is_empty() && self.state.device != now {
            progress.note(&format!(
                "the steps before were taken on {}, those from here on {now}: exactness ends here",
                self.state.device
            ));
        }
    }

    /// Sets every parameter to its saved value. A missing one, a different shape and a saved one that
    /// nobody wants are errors.
    pub fn restore(&self, params: &[Param], device: &Device) -> Result<()> {
        for param in params {
            let value = self.model.tensor(&param.name, device)?;
            if value.dims() != param.var.dims() {
                let message = format!("found shape {:?}, expected {:?}", value.dims(), param.var.dims());
                return Err(Error::tensor(&param.name, message));
            }
            param.var.set(&value)?;
        }
        let unused = self.model.names().find(|name| !params.iter().any(|p| p.name == **name));
        match unused {
            Some(name) => Err(Error::tensor(name, "in the checkpoint, but the recipe has no such trainable")),
            None => Ok(()),
        }
    }

    /// A tensor of the saved model.
    pub fn tensor(&self, name: &str, device: &Device) -> Result<Option<Tensor>> {
        match self.model.contains(name) {
            true => self.model.tensor(name, device).map(Some),
            false => Ok(None),
        }
    }

    /// A tensor of the optimizer's state.
    pub fn optimizer(&self, name: &str, device: &Device) -> Result<Tensor> {
        self.optimizer.tensor(name, device)
    }

    /// Whether the optimizer had been at work: a phase's first checkpoint comes before its first step.
    pub fn has_optimizer(&self) -> bool {
        !self.optimizer.is_empty()
    }

    /// Whether a running average of the parameters was saved.
    pub fn has_state_of_average(&self) -> bool {
        self.optimizer.names().any(|stored| stored.ends_with("#average"))
    }

    /// Whether the optimizer's state of the parameter called `name` was saved.
    pub fn has_state_of(&self, name: &str) -> bool {
        self.optimizer
            .names()
            .any(|stored| stored.strip_prefix(name).is_some_and(|rest| rest.starts_with('#')))
    }

    /// Those of `params` whose optimizer state is expected: before a phase's first step, and where steps were
    /// left out, a parameter may have none yet.
    pub fn with_state(&self, params: &[Param]) -> Vec<Param> {
        let may_lack = self.state.phase_step == 0 || self.state.skipped > 0;
        params.iter().filter(|p| !may_lack || self.has_state_of(&p.name)).cloned().collect()
    }

    /// A tensor of the oscillation tracks.
    pub fn oscillation(&self, name: &str) -> Result<Option<Tensor>> {
        match self.oscillation.contains(name) {
            true => self.oscillation.tensor(name, &Device::Cpu).map(Some),
            false => Ok(None),
        }
    }
}
