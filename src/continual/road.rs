//! The road of `qtune continual`: one task after another, an evaluation on all of them after each.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use candle_core::Device;
use serde_json::{json, Value};

use super::boundary::{self, Memory, Row};
use super::ewc::{self, Sample};
use super::field::FieldPrior;
use super::metrics::metrics;
use super::stretch::{kept, Penalty, Protected, Stretch};
use super::tasks::{self, Tasks};
use crate::data::Dataset;
use crate::optim::Optimizer;
use crate::quantize::{self, Start};
use crate::recipe::{ContinualConfig, DistillKind, PhaseConfig, Protection, Recipe};
use crate::train::{
    phase_steps, resume, signal, Average, Classify, Metrics, Phase, Progress, State, Supply, Tracker, Trainer,
};
use crate::weights::{Param, Weights};
use crate::{kernels, report, Error, Result};

/// A run in the middle of its work.
struct Run<'a> {
    recipe: &'a Recipe,
    continual: &'a ContinualConfig,
    dir: &'a Path,
    device: &'a Device,
    progress: &'a dyn Progress,
    started: Instant,
    /// Seconds that earlier processes spent.
    earlier_s: f64,
    tasks: Tasks,
    start: Start,
}

/// What a run carries from task to task.
struct Carried {
    weights: Weights,
    memory: Memory,
    optimizer: Option<Box<dyn Optimizer>>,
    rows: Vec<Row>,
    state: State,
    metrics: Metrics,
}

/// The settings of task `at`: its own phase, or the one that all share, under its name.
fn phase(recipe: &Recipe, tasks: &Tasks, at: usize) -> PhaseConfig {
    let phase = if recipe.phase.len() == 1 { &recipe.phase[0] } else { &recipe.phase[at] };
    PhaseConfig { name: tasks.list[at].name.clone(), ..phase.clone() }
}

/// Runs a recipe in the folder `dir`, which exists and holds the resolved recipe; from its latest
/// checkpoint where it has one. Returns what summary.json holds.
pub fn run(recipe: &Recipe, dir: &Path, device: &Device, progress: &dyn Progress) -> Result<Value> {
    kernels::set_arithmetic(recipe.train.products);
    let started = Instant::now();
    let continual = config(recipe)?;
    let saved = resume::latest(dir)?;
    let (tasks, start) = open(recipe, continual, device)?;
    tasks.notes.iter().chain(&start.notes).for_each(|note| progress.note(note));
    let earlier_s = earlier(dir, saved.as_ref())?;
    let run = Run { recipe, continual, dir, device, progress, started, earlier_s, tasks, start };
    let mut carried = run.carried(saved.as_ref())?;
    let mut saved = saved;
    for at in carried.rows.len()..run.tasks.list.len() {
        carried = run.learn(at, carried, saved.take().filter(|saved| saved.state.phase == at))?;
    }
    run.finish(carried)
}

/// The recipe's `[continual]`.
pub fn config(recipe: &Recipe) -> Result<&ContinualConfig> {
    let none = || Error::usage("continual: the recipe has no such table, expected tasks and a method");
    recipe.continual.as_ref().ok_or_else(none)
}

/// The tasks of a recipe and the model that learns them.
pub fn open(recipe: &Recipe, continual: &ContinualConfig, device: &Device) -> Result<(Tasks, Start)> {
    let tasks = tasks::open(recipe, continual)?;
    let first = &tasks.list[0];
    let dataset = Dataset {
        train: first.train.clone(),
        eval: first.eval.clone(),
        classes: tasks.classes.clone(),
        name: first.name.clone(),
        notes: Vec::new(),
    };
    let start = quantize::start(recipe, Some(&dataset), device)?;
    if start.quantizers.is_some() {
        return Err(Error::usage(format!(
            "{}: found quantizers, expected a full-precision model",
            start.name
        )));
    }
    Ok((tasks, start))
}

impl Run<'_> {
    /// Where the run stands: at its start, or behind the last task whose end was written.
    fn carried(&self, saved: Option<&resume::Saved>) -> Result<Carried> {
        let mut rows = Vec::new();
        let mut last = None;
        while let Some(boundary) = boundary::read(self.dir, Some(rows.len()))? {
            rows.push(boundary.row.clone());
            last = Some(boundary);
        }
        let mut state = saved.map(|saved| saved.state.clone()).unwrap_or_default();
        // Behind a task's end the next one has not begun: the lines of its evaluation belong to the run.
        let behind = last.as_ref().filter(|_| saved.is_none_or(|saved| saved.state.phase < rows.len()));
        let before = boundary::read(self.dir, None)?;
        let lines = match (behind, &before, saved) {
            (Some(boundary), _, _) => boundary.row.metrics_lines,
            (None, Some(start), None) => start.row.metrics_lines,
            _ => state.metrics_lines,
        };
        state.metrics_lines = lines;
        let mut metrics = Metrics::open(&self.dir.join("metrics.jsonl"), lines)?;
        if let Some(saved) = saved {
            saved.say(self.device, self.progress);
        }
        let (weights, memory) = match &last {
            Some(boundary) => (boundary.weights(self.device)?, boundary.memory(self.device)?),
            None => (self.start.weights.clone(), Memory::default()),
        };
        let mut optimizer = None;
        if let Some(boundary) = last.filter(|_| self.carries()) {
            let mut rule = self.recipe.optimizer.build();
            let stored = boundary.optimizer()?;
            let all = weights.trainable()?.params();
            let known: Vec<Param> = all.into_iter().filter(|p| has_state(stored.names(), &p.name)).collect();
            rule.restore(&known, &|name| stored.tensor(name, self.device))?;
            optimizer = Some(rule);
        }
        if before.is_none() && rows.is_empty() {
            let stretch = self.stretch(0);
            let mut trainer = self.trainer(&stretch, state, metrics);
            trainer.evaluate(&weights.settled()?, "before", true)?;
            let accuracy = stretch.take_seen().unwrap_or_default();
            let row = Row::new(accuracy, trainer.metrics.lines(), trainer.wall_s());
            (state, metrics) = (trainer.state, trainer.metrics);
            state.measured = None;
            boundary::write(self.dir, None, &row, &weights, &memory, &[])?;
        }
        Ok(Carried { weights, memory, optimizer, rows, state, metrics })
    }

    /// Whether the optimizer's state is what remembers.
    fn carries(&self) -> bool {
        self.recipe.optimizer.remembers() && self.continual.method != Protection::Finetune
    }

    fn stretch(&self, at: usize) -> Stretch<'_> {
        let replay = (self.continual.method == Protection::Replay).then_some(&self.continual.replay);
        let preprocess = Arc::new(self.start.preprocess.clone());
        Stretch::new(self.recipe, &self.tasks, at, replay, preprocess, &self.start.config, self.device)
    }

    fn trainer<'a>(
        &'a self,
        stretch: &'a Stretch<'a>,
        state: State,
        metrics: Metrics,
    ) -> Trainer<'a, Stretch<'a>> {
        Trainer {
            recipe: self.recipe,
            dir: self.dir,
            supply: stretch,
            device: self.device,
            progress: self.progress,
            metrics,
            seen: None,
            average: None,
            earlier_s: self.earlier_s,
            state,
            started: self.started,
        }
    }

    /// What is added to the loss of task `at`.
    fn penalty(&self, at: usize, memory: &Memory, params: &[Param]) -> Result<Penalty> {
        match self.continual.method {
            Protection::Ewc if at > 0 => Ok(Penalty::Ewc(memory.ewc.clone(), self.continual.ewc.lambda)),
            Protection::Field => {
                let field = self.continual.field;
                let samples = self.tasks.list[at].train.len();
                let prior = match at {
                    0 => FieldPrior::uniform(params, field.first_weight, samples)?,
                    _ => FieldPrior { entries: memory.prior.clone(), weight: field.weight, samples },
                };
                Ok(Penalty::Field(prior))
            }
            _ => Ok(Penalty::None),
        }
    }

    /// Learns task `at` from where the run stands, and writes its end.
    fn learn(&self, at: usize, carried: Carried, saved: Option<resume::Saved>) -> Result<Carried> {
        let Carried { weights, mut memory, optimizer, mut rows, state, metrics } = carried;
        let (store, selected) = super::select::trained(self.recipe, at, &weights, self.progress)?;
        let params = store.params();
        let stretch = self.stretch(at);
        let config = phase(self.recipe, &self.tasks, at);
        let steps = phase_steps(self.recipe, &config, stretch.samples());
        let mut trainer = self.trainer(&stretch, state, metrics);
        let mut optimizer = match optimizer.filter(|_| self.carries()) {
            Some(mut optimizer) => {
                optimizer.next_task();
                optimizer
            }
            // What the run began with is in its checkpoint.
            None if at > 0 || saved.is_some() => self.recipe.optimizer.build(),
            None => trainer.begin_optimizer(&params)?,
        };
        let mut tracker = Tracker::default();
        match saved {
            Some(saved) => {
                saved.restore(&params, self.device)?;
                if saved.has_optimizer() {
                    let all = weights.trainable()?.params();
                    let known: Vec<Param> = all.into_iter().filter(|p| saved.has_state_of(&p.name)).collect();
                    optimizer.restore(&known, &|name| saved.optimizer(name, self.device))?;
                    let midway = trainer.state.phase_step > 0 && trainer.state.phase_step < steps;
                    if self.recipe.train.ema > 0.0 && midway {
                        let read = |name: &str| saved.optimizer(name, self.device);
                        trainer.average = Some(Average::restore(&params, self.recipe.train.ema, &read)?);
                    }
                }
            }
            None => {
                trainer.state.phase = at;
                trainer.state.phase_step = 0;
                trainer.state.best = None;
                trainer.state.stale = 0;
                trainer.save(&store, optimizer.as_ref(), &mut tracker)?;
            }
        }
        let drop_path = Some((self.recipe.train.drop_path, self.recipe.seed));
        let task = Protected {
            classify: Classify {
                model: self.start.config.build(&store)?,
                teacher: None,
                distill: DistillKind::None,
                drop_path,
                heads: self.tasks.heads.clone(),
                recordings: None,
            },
            penalty: self.penalty(at, &memory, &params)?,
        };
        let before = trainer.state.phase_step;
        let phase = Phase {
            config: &config,
            weights: &store,
            task: &task,
            optimizer: optimizer.as_mut(),
            tracker: &mut tracker,
        };
        trainer.run(phase)?;
        if trainer.state.phase_step != before {
            // The evaluation at the end of the stretch was on all tasks, unless its last step was left out or
            // the best weights took the place of the last.
            let measured = trainer.state.measured.is_some_and(|(step, _)| step == trainer.state.step);
            let seen = stretch.take_seen().filter(|_| measured && !self.recipe.train.restore_best);
            trainer.state.row = seen.map(|seen| (trainer.state.step, seen));
            trainer.save(&store, optimizer.as_ref(), &mut tracker)?;
        }
        let accuracy = match trainer.state.row.take().filter(|(step, _)| *step == trainer.state.step) {
            Some((_, row)) => row,
            None => {
                trainer.evaluate(&store.settled()?, &config.name, true)?;
                stretch.take_seen().unwrap_or_default()
            }
        };
        self.remember(at, &store, &mut memory)?;
        let weights = store.folded()?;
        let row = Row {
            selected,
            samples_per_s: trainer.state.samples_per_s,
            ..Row::new(accuracy, trainer.metrics.lines(), trainer.wall_s())
        };
        trainer.metrics.sync()?;
        if at + 1 == self.tasks.list.len() {
            // What it remembers of weights that this task left alone too.
            trainer.leave_optimizer(optimizer.as_ref(), &weights.trainable()?.params())?;
        }
        let state = if self.carries() { optimizer.state()? } else { Vec::new() };
        boundary::write(self.dir, Some(at), &row, &weights, &memory, &state)?;
        self.say(at, &row);
        trainer.state.metrics_lines = trainer.metrics.lines();
        trainer.state.measured = None;
        let (state, metrics) = (trainer.state, trainer.metrics);
        rows.push(row);
        let optimizer = self.carries().then_some(optimizer);
        report::write(self.dir).unwrap_or_else(|e| self.progress.note(&format!("report: {e}")));
        match signal::asked().filter(|_| at + 1 < self.tasks.list.len()) {
            Some(signal) => Err(Error::Stopped { signal, resume: Some(self.dir.to_path_buf()) }),
            None => Ok(Carried { weights, memory, optimizer, rows, state, metrics }),
        }
    }

    fn say(&self, at: usize, row: &Row) {
        let figures = self.tasks.list.iter().zip(&row.accuracy);
        let figures: Vec<String> = figures.map(|(task, top1)| format!("{} {top1:.2} %", task.name)).collect();
        self.progress.note(&format!("after {}: {}", self.tasks.list[at].name, figures.join(", ")));
    }

    /// Takes up what the method keeps of task `at`, whose training has ended.
    fn remember(&self, at: usize, store: &Weights, memory: &mut Memory) -> Result<()> {
        let params = store.params();
        match self.continual.method {
            Protection::Ewc if at + 1 < self.tasks.list.len() => {
                let model = self.start.config.build(store)?;
                let sample = Sample {
                    model: &model,
                    source: self.tasks.list[at].train.clone(),
                    preprocess: Arc::new(self.start.preprocess.clone()),
                    heads: self.tasks.heads.as_ref(),
                    seed: (self.recipe.seed, at as u64),
                    device: self.device,
                };
                let config = &self.continual.ewc;
                let stopped = |error| match error {
                    Error::Stopped { signal, .. } => {
                        Error::Stopped { signal, resume: Some(self.dir.to_path_buf()) }
                    }
                    other => other,
                };
                let fisher = ewc::fisher(&sample, &params, config, self.progress).map_err(stopped)?;
                memory.ewc.learned(&params, fisher, config)
            }
            Protection::Field => {
                let copy = |p: &Param| Ok((p.name.clone(), p.var.as_tensor().copy()?.detach()));
                memory.prior = params.iter().map(copy).collect::<Result<_>>()?;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Bytes that the method keeps between tasks, the model itself apart.
    fn state_bytes(&self, carried: &Carried) -> Result<usize> {
        let of = |t: &candle_core::Tensor| t.elem_count() * t.dtype().size_in_bytes();
        let optimizer = match &carried.optimizer {
            Some(optimizer) => {
                let state = optimizer.state()?;
                state.iter().filter(|(name, _)| name.ends_with("#grad_sum")).map(|(_, t)| of(t)).sum()
            }
            None => 0,
        };
        let memory = match self.continual.method {
            Protection::Ewc => carried.memory.ewc.bytes(),
            Protection::Field => carried.memory.prior.iter().map(|(_, t)| of(t)).sum(),
            Protection::Replay => self.buffer_bytes()?,
            Protection::Finetune | Protection::Classp | Protection::Kappatune => 0,
        };
        Ok(optimizer + memory)
    }

    /// Bytes of the kept images as they were decoded, and of their labels.
    fn buffer_bytes(&self) -> Result<usize> {
        let mut bytes = 0;
        let earlier = self.tasks.list.len().saturating_sub(1);
        for (i, task) in self.tasks.list.iter().take(earlier).enumerate() {
            for index in kept(self.recipe.seed, i, task.train.len(), self.continual.replay.samples) {
                bytes += task.train.image(index as usize)?.pixels.len() + 4;
            }
        }
        Ok(bytes)
    }

    /// Writes the model and sums up.
    fn finish(&self, carried: Carried) -> Result<Value> {
        let (recipe, start) = (self.recipe, &self.start);
        let model = self.dir.join("model");
        let model_bytes = quantize::write_model(&model, &start.config, &start.preprocess, &carried.weights)?;
        let before = boundary::read(self.dir, None)?.map(|boundary| boundary.row.accuracy);
        let accuracy: Vec<Vec<f64>> = carried.rows.iter().map(|row| row.accuracy.clone()).collect();
        let figures = metrics(&accuracy, before.as_deref())?;
        let trained: usize = match carried.rows.last().and_then(|row| row.selected.as_ref()) {
            None => start.config.params(),
            Some(names) => {
                let shapes = start.config.shapes();
                let chosen = shapes.iter().filter(|(name, _)| names.contains(name));
                chosen.map(|(_, shape)| shape.iter().product::<usize>()).sum()
            }
        };
        let wall_s = self.earlier_s + self.started.elapsed().as_secs_f64();
        let mut summary = quantize::summary_head(recipe, start, wall_s, self.device);
        summary.remove("bits");
        summary.remove("act_bits");
        let mut put = |key: &str, value: Value| summary.insert(key.to_string(), value);
        put("command", json!("continual"));
        put("method", json!(self.continual.method.name()));
        put("optimizer", json!(recipe.optimizer.name()));
        put("heads", json!(self.continual.heads));
        put("tasks", json!(self.tasks.list.iter().map(|task| &task.name).collect::<Vec<_>>()));
        put("steps", json!(carried.state.step));
        put("params_trainable", json!(trained));
        put("accuracy", json!(accuracy));
        put("accuracy_before", json!(before));
        let json = serde_json::to_value(figures).map_err(|e| Error::Run(format!("metrics: {e}")))?;
        for (key, value) in json.as_object().into_iter().flatten() {
            put(key, value.clone());
        }
        put("forgetting", json!(figures.forgetting_last));
        put("state_bytes", json!(self.state_bytes(&carried)?));
        put("model_bytes", json!(model_bytes));
        put("selected", json!(carried.rows.iter().map(|row| &row.selected).collect::<Vec<_>>()));
        put("train_samples_per_s", json!(carried.rows.last().map(|row| row.samples_per_s)));
        put("skipped_steps", json!(carried.state.skipped));
        put("output", json!(model.display().to_string()));
        quantize::write_summary(self.dir, summary, self.progress)
    }
}

/// Seconds that earlier processes spent on the run, as far as they wrote it down.
fn earlier(dir: &Path, saved: Option<&resume::Saved>) -> Result<f64> {
    let mut seconds = saved.map_or(0.0, |saved| saved.state.wall_s);
    let mut after = None;
    while let Some(boundary) = boundary::read(dir, after)? {
        seconds = seconds.max(boundary.row.wall_s);
        after = Some(after.map_or(0, |task: usize| task + 1));
    }
    Ok(seconds)
}

/// Whether `stored` names state of the parameter called `name`.
fn has_state<'a>(mut stored: impl Iterator<Item = &'a str>, name: &str) -> bool {
    stored.any(|found| found.strip_prefix(name).is_some_and(|rest| rest.starts_with('#')))
}
