//! The trainer: phases as data, one loop for all of them.

pub mod average;
pub mod figure;
pub mod heads;
pub mod layers;
pub mod metrics;
pub mod oscillation;
pub mod recordings;
pub mod resume;
pub mod signal;
pub mod step;
pub mod supply;
pub mod task;

use std::path::Path;
use std::time::Instant;

use candle_core::{Device, Tensor};
use serde_json::{json, Map, Value};

pub use average::Average;
pub use figure::Figure;
pub use heads::Heads;
pub use metrics::{peak_rss_bytes, Metrics};
pub use oscillation::Tracker;
pub use recordings::Recordings;
pub use resume::State;
pub use supply::{Batches, Images, Supply};
pub use task::{evaluate, evaluate_with, Accuracy, Classify, Pass, Task};

use crate::optim::{self, Optimizer, OptimizerConfig, Rate};
use crate::recipe::{CalmQk, OnNan, PhaseConfig, Recipe};
use crate::weights::{Expr, Gate, Param, Weight, Weights};
use crate::{report, Error, Result};

/// Who hears of a run while it goes on.
pub trait Progress: Send + Sync {
    /// One line worth keeping.
    fn note(&self, line: &str);
    /// Something that takes a while begins: what, and of how many units.
    fn start(&self, what: &str, total: usize);
    /// So many units are done; what there is to say of it.
    fn tick(&self, done: usize, message: &str);
    /// It is over.
    fn finish(&self);
}

/// Nobody.
#[derive(Debug)]
pub struct Quiet;

impl Progress for Quiet {
    fn note(&self, _line: &str) {}
    fn start(&self, _what: &str, _total: usize) {}
    fn tick(&self, _done: usize, _message: &str) {}
    fn finish(&self) {}
}

/// The figures of the last step that was read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// Mean loss.
    pub loss: f64,
    /// Percent of predictions that were right.
    pub top1: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
}

/// A step whose figures are not read yet.
struct Waiting {
    /// Its number in the phase.
    at: usize,
    samples: Vec<u32>,
    moved: step::Moved,
    loss: Figure,
    top1: Figure,
}

/// A run in the middle of its work: what all phases share.
pub struct Trainer<'a, S: Supply> {
    /// The resolved recipe.
    pub recipe: &'a Recipe,
    /// The run's folder.
    pub dir: &'a Path,
    /// What it trains on and is measured by.
    pub supply: &'a S,
    /// Where tensors live.
    pub device: &'a Device,
    /// Who hears of it.
    pub progress: &'a dyn Progress,
    /// The run's metrics.
    pub metrics: Metrics,
    /// Where the run stands.
    pub state: State,
    /// The running average of the trainables, where the recipe wants one.
    pub average: Option<Average>,
    /// The figures of the last step that was read.
    pub seen: Option<Seen>,
    /// When this process took the run up.
    pub started: Instant,
    /// Seconds that earlier processes spent on it.
    pub earlier_s: f64,
}

/// What a phase trains, and with what.
pub struct Phase<'a, T: Task> {
    /// Its settings.
    pub config: &'a PhaseConfig,
    /// The trainable store that the task's model reads.
    pub weights: &'a Weights,
    /// Loss and model.
    pub task: &'a T,
    /// The update rule.
    pub optimizer: &'a mut dyn Optimizer,
    /// The tracks of the quantized weights.
    pub tracker: &'a mut Tracker,
}

/// Steps of one epoch over `samples` samples.
pub fn epoch_steps(recipe: &Recipe, samples: usize) -> usize {
    samples.div_ceil(recipe.train.batch_size * recipe.train.accumulate).max(1)
}

/// Steps of a phase over `samples` samples.
pub fn phase_steps(recipe: &Recipe, phase: &PhaseConfig, samples: usize) -> usize {
    let of_epochs = (phase.epochs * epoch_steps(recipe, samples) as f64).round() as usize;
    phase.steps.unwrap_or(of_epochs)
}

fn rate(recipe: &Recipe, phase: &PhaseConfig, samples: usize) -> Rate {
    let epoch_steps = epoch_steps(recipe, samples);
    let steps = phase_steps(recipe, phase, samples);
    let warmup = phase.warmup + (phase.warmup_epochs * epoch_steps as f64).round() as usize;
    Rate {
        schedule: phase.schedule,
        lr: phase.lr,
        min_lr: phase.min_lr,
        warmup_steps: warmup.min(steps),
        warmup_lr: phase.warmup_lr,
        steps,
        epoch_steps,
        epochs: phase.cosine_span.unwrap_or(match phase.steps {
            Some(steps) => steps as f64 / epoch_steps as f64,
            None => phase.epochs,
        }),
    }
}

/// Lines of all layers that a phase writes to metrics.jsonl at most, its last step's beside.
const LAYER_LINES: usize = 300;

/// The integer codes of every weight that a rule puts on a grid.
pub fn codes(weights: &Weights) -> Result<Vec<(String, Tensor)>> {
    let mut codes = Vec::new();
    for (name, weight) in weights.iter() {
        if let Expr::Node { .. } = weight.expr() {
            codes.extend(weight.quantize()?.map(|q| (name.to_string(), q.codes)));
        }
    }
    Ok(codes)
}

/// The names of the weights whose oscillation is what a run reports: those of fewer than 8 bits, or all
/// where there are none. The steps of 8-bit weights, of the first and the last layer, are as fine as the
/// noise of training; annealing leaves learned steps alone too.
pub fn coarse(weights: &Weights) -> std::collections::HashSet<String> {
    let on_grid = |few: bool| {
        let below = move |weight: &Weight| weight.grid().is_some_and(|g| !few || g.bits < 8);
        weights.iter().filter(move |(_, w)| below(w)).map(|(name, _)| name.to_string()).collect()
    };
    let few: std::collections::HashSet<String> = on_grid(true);
    if few.is_empty() {
        on_grid(false)
    } else {
        few
    }
}

impl<S: Supply> Trainer<'_, S> {
    /// The number of an epoch of a phase, distinct over the run: it addresses the random streams.
    fn stream(&self, epoch: usize) -> u64 {
        ((self.state.phase as u64) << 32) | epoch as u64
    }

    /// The first training batch, in the order of the phase that has ended.
    pub fn first_batch(&self) -> Result<<S::Task as Task>::Batch> {
        let first = self.supply.batches(self.stream(0), 0)?.next();
        first.unwrap_or_else(|| Err(Error::Run("training data: found no samples".into())))
    }

    /// Seconds that the run took up to now.
    pub fn wall_s(&self) -> f64 {
        self.earlier_s + self.started.elapsed().as_secs_f64()
    }

    /// Saves a checkpoint of where the run stands.
    pub fn save(
        &mut self,
        weights: &Weights,
        optimizer: &dyn Optimizer,
        tracker: &mut Tracker,
    ) -> Result<()> {
        self.metrics.sync()?;
        self.state.metrics_lines = self.metrics.lines();
        self.state.device = crate::device::name(self.device);
        self.state.wall_s = self.wall_s();
        self.state.taps = weights.taps().map(|(name, rule)| (name.to_string(), rule.describe())).collect();
        self.state.tracked = tracker.names();
        let keep = self.recipe.train.keep;
        let mut rule = optimizer.state()?;
        rule.extend(self.average.iter().flat_map(Average::state));
        resume::save(self.dir, &self.state, weights, rule, tracker.state()?, keep)
    }

    /// The update rule of a phase that begins without one: empty, or with the state that the recipe's
    /// `train.optimizer_state` names.
    pub fn begin_optimizer(&self, params: &[Param]) -> Result<Box<dyn Optimizer>> {
        let train = &self.recipe.train;
        let from = train.optimizer_state.as_deref();
        let from = from.map(|dir| optim::state::From { dir, partial: train.allow_partial });
        let (optimizer, notes) = optim::state::begin(&self.recipe.optimizer, params, train.clip, from)?;
        notes.iter().for_each(|note| self.progress.note(note));
        Ok(optimizer)
    }

    /// Leaves the state of a rule that remembers in the run's folder, for the runs after it.
    pub fn leave_optimizer(&self, optimizer: &dyn Optimizer, params: &[Param]) -> Result<()> {
        if let OptimizerConfig::Classp(config) = &self.recipe.optimizer {
            let base = match self.recipe.model.path() {
                Some(path) => path.display().to_string(),
                None => format!("new {}", self.recipe.name),
            };
            let at = (self.state.step, base.as_str());
            optim::state::save(&self.dir.join("optimizer"), config, optimizer, params, at)?;
        }
        Ok(())
    }

    /// Evaluates a frozen store and writes the line that says so. Where `stoppable`, a signal ends it:
    /// not in the middle of a phase, whose steps would be lost with it.
    pub fn evaluate(&mut self, weights: &Weights, what: &str, stoppable: bool) -> Result<Accuracy> {
        let got = self.supply.evaluate(weights, self.progress, stoppable).map_err(|e| self.stopped(e))?;
        let mut line = Map::new();
        line.insert("step".into(), json!(self.state.step));
        line.insert("split".into(), json!("eval"));
        line.insert("what".into(), json!(what));
        line.extend(self.supply.figures(&got));
        line.insert("peak_rss_bytes".into(), json!(peak_rss_bytes()));
        self.metrics.write(line)?;
        // JSON has no numbers that are not finite: such an evaluation is made again.
        self.state.measured = Some((self.state.step, got)).filter(|(_, got)| got.loss.is_finite());
        report::write(self.dir).unwrap_or_else(|e| self.progress.note(&format!("report: {e}")));
        Ok(got)
    }

    /// The figures of the model as it stands: those at the end of the phase that just ended, or new ones.
    pub fn measure(&mut self, weights: &Weights, what: &str) -> Result<Accuracy> {
        match self.state.measured {
            Some((step, known)) if step == self.state.step && step > 0 => Ok(known),
            _ => self.evaluate(weights, what, true),
        }
    }

    /// A stop in the middle of an evaluation: the last checkpoint is what a resume starts from.
    fn stopped(&self, error: Error) -> Error {
        match error {
            Error::Stopped { signal, .. } => Error::Stopped { signal, resume: Some(self.dir.to_path_buf()) },
            other => other,
        }
    }

    /// Trains one phase from where the state stands to its end.
    pub fn run(&mut self, phase: Phase<'_, S::Task>) -> Result<()> {
        let Phase { config, weights, task, optimizer, tracker } = phase;
        let recipe = self.recipe;
        let (supply, samples) = (self.supply, self.supply.samples());
        let rate = rate(recipe, config, samples);
        let params = weights.params();
        let group = recipe.train.batch_size * recipe.train.accumulate;
        let factors = self.rate_factors(&params);
        if recipe.train.ema > 0.0
            && config.calm.is_none()
            && self.average.is_none()
            && self.state.phase_step < rate.steps
        {
            self.average = Some(Average::new(&params, recipe.train.ema)?);
        }
        let mut loader: Option<Batches<'_, <S::Task as Task>::Batch>> = None;
        let (mut seen, mut seconds) = (0usize, 0f64);
        let mut waiting: Vec<Waiting> = Vec::new();
        self.progress.start(&config.name, rate.steps);
        let tired = |state: &State| recipe.train.patience > 0 && state.stale >= recipe.train.patience;
        while self.state.phase_step < rate.steps && !tired(&self.state) {
            let at = self.state.phase_step;
            let (epoch, within) = (at / rate.epoch_steps, at % rate.epoch_steps);
            if within == 0 || loader.is_none() {
                loader = Some(supply.batches(self.stream(epoch), within * group)?);
            }
            let begun = Instant::now();
            let mut batches = Vec::new();
            if let Some(loader) = &mut loader {
                for batch in loader.take(recipe.train.accumulate) {
                    batches.push(batch?);
                }
            }
            if batches.is_empty() {
                return Err(Error::Run(format!("epoch {epoch}: the data ended before step {at}")));
            }
            let lr = rate.at(at);
            let clip = recipe.train.clip;
            let first = at == 0;
            // From the weights before the step: what may move.
            let free = if config.calm.is_some() { step::free(weights, &params)? } else { Vec::new() };
            let mut rule = step::Rule {
                optimizer: &mut *optimizer,
                config: &recipe.optimizer,
                lr,
                factors: &factors,
                clip,
                free: &free,
                first,
            };
            let samples: Vec<u32> = batches.iter().flat_map(<S::Task as Task>::samples).collect();
            let step = match step::take(task, &batches, &params, &mut rule, self.device) {
                Err(Error::NotFinite(message)) => {
                    self.not_finite(broken(&config.name, at, &message, &samples), &params, optimizer)?;
                    self.state.phase_step += 1;
                    self.state.step += 1;
                    continue;
                }
                Err(Error::Run(message)) => {
                    return Err(Error::Run(format!("phase {}, step {at}: {message}", config.name)))
                }
                other => other?,
            };
            if config.quantize {
                tracker.observe(codes(weights)?)?;
                let named = params.iter().zip(&step.grads);
                let named = named.filter_map(|(p, g)| Some((p.name.as_str(), g.as_ref()?)));
                tracker.observe_gradients(named)?;
            }
            if let Some(average) = &mut self.average {
                average.update(&params)?;
            }
            self.say_still(lr, &params, &step.moved.still);
            let done = at + 1;
            let last = done == rate.steps;
            let log_due = done.is_multiple_of(recipe.train.log_steps) || last;
            let eval_due = recipe.train.eval_steps;
            let eval_due = last || (eval_due > 0 && done.is_multiple_of(eval_due));
            let checkpoint = match recipe.train.checkpoint_steps {
                0 => within + 1 == rate.epoch_steps,
                n => done.is_multiple_of(n),
            };
            waiting.push(Waiting { at, samples, moved: step.moved, loss: step.loss, top1: step.top1 });
            // Nobody waits for a device at every step.
            let due = log_due || eval_due || checkpoint || first || self.seen.is_none();
            let due = due || self.device.is_cpu();
            if due {
                self.settle(&config.name, &mut waiting, &params, optimizer)?;
            }
            seconds += begun.elapsed().as_secs_f64();
            seen += step.counted;
            self.state.samples_per_s = seen as f64 / seconds.max(1e-9);
            self.state.phase_step += 1;
            self.state.step += 1;
            let shown = self.seen.unwrap_or_default();
            let right = match supply.counts_right() {
                true => format!("  top-1 {:.1} %", shown.top1),
                false => String::new(),
            };
            let message = format!(
                "loss {:.4}{right}  lr {lr:.1e}  {:.0} {}",
                shown.loss,
                self.state.samples_per_s,
                supply.unit().1
            );
            self.progress.tick(done, &message);
            if log_due {
                let epoch = epoch as f64 + (within + 1) as f64 / rate.epoch_steps as f64;
                // A line of all layers is long: a few hundred of them show a phase of any length.
                let sparse =
                    recipe.train.log_steps * rate.steps.div_ceil(LAYER_LINES * recipe.train.log_steps).max(1);
                let layers_due = last || done.is_multiple_of(sparse);
                let figures = optimizer.figures();
                self.log(config, lr, epoch, weights, tracker, &figures, layers_due)?;
            }
            if eval_due {
                if let Some(average) = &mut self.average {
                    average.swap(&params)?;
                }
                let got = self.evaluate(&weights.settled()?, &config.name, false)?;
                match &mut self.average {
                    // At the end of the phase the averages stay.
                    Some(average) if !last => average.swap(&params)?,
                    _ => self.average = None,
                }
                let score = supply.score(&got);
                if self.state.best.is_none_or(|(best, _)| score > best) {
                    self.state.best = Some((score, self.state.step));
                    self.state.stale = 0;
                } else {
                    self.state.stale += 1;
                }
                if !last {
                    self.progress.start(&config.name, rate.steps);
                }
            }
            let best = self.state.best.is_some_and(|(_, step)| step == self.state.step);
            let stop = signal::asked();
            if stop.is_some() {
                self.settle(&config.name, &mut waiting, &params, optimizer)?;
            }
            if (checkpoint || best || stop.is_some()) && !last {
                self.save(weights, optimizer, tracker)?;
            }
            if let Some(signal) = stop.filter(|_| !last) {
                self.progress.finish();
                return Err(Error::Stopped { signal, resume: Some(self.dir.to_path_buf()) });
            }
            if tired(&self.state) && !last {
                self.progress.note(&format!(
                    "phase {}: ends at step {done} of {}, {} evaluations brought nothing better",
                    config.name, rate.steps, self.state.stale
                ));
            }
        }
        self.progress.finish();
        if let Some(mut average) = self.average.take() {
            // The phase ended early or with a step left out: the averages stay here too.
            average.swap(&params)?;
        }
        if recipe.train.restore_best {
            self.restore_best(&params)?;
        }
        self.say_left_out();
        Ok(())
    }

    /// What becomes of a step whose loss or gradient is not finite: an error, or the step is left out, from
    /// where the run stands or from its last checkpoint.
    fn not_finite(&mut self, message: String, params: &[Param], optimizer: &mut dyn Optimizer) -> Result<()> {
        let policy = self.recipe.train.on_nan;
        self.state.skipped += 1;
        if policy == OnNan::Stop || self.state.skipped > MOST_SKIPPED {
            return Err(Error::NotFinite(message));
        }
        if policy == OnNan::Rollback {
            if let Some(saved) = resume::latest(self.dir)? {
                saved.restore(params, self.device)?;
                // Nothing stays of what the steps since then left.
                optimizer.retain(&[]);
                if self.average.is_some() {
                    let decay = self.recipe.train.ema;
                    let read = |name: &str| saved.optimizer(name, self.device);
                    self.average = Some(match saved.has_state_of_average() {
                        true => Average::restore(params, decay, &read)?,
                        false => Average::new(params, decay)?,
                    });
                }
                if saved.has_optimizer() {
                    let read = |name: &str| saved.optimizer(name, self.device);
                    optimizer.restore(&saved.with_state(params), &read)?;
                }
            }
        }
        self.progress.note(&format!("{message}: step left out"));
        Ok(())
    }

    /// Reads what steps left on their device, and acts on those whose loss or gradient was not finite.
    fn settle(
        &mut self,
        phase: &str,
        waiting: &mut Vec<Waiting>,
        params: &[Param],
        optimizer: &mut dyn Optimizer,
    ) -> Result<()> {
        for (at, message, samples) in self.read(waiting, params)? {
            // Nothing moved at that step.
            optimizer.left_out(params);
            self.not_finite(broken(phase, at, &message, &samples), params, optimizer)?;
        }
        Ok(())
    }

    /// Reads what steps left on their device and remembers the figures of the last one. Gives the steps whose loss or
    /// gradient was not finite, with what it was and their samples.
    fn read(
        &mut self,
        waiting: &mut Vec<Waiting>,
        params: &[Param],
    ) -> Result<Vec<(usize, String, Vec<u32>)>> {
        let mut broken = Vec::new();
        let figures: Vec<&Figure> =
            waiting.iter().flat_map(|step| [&step.loss, &step.top1, &step.moved.norm]).collect();
        let read = figure::read_all(&figures)?;
        for (step, figures) in waiting.drain(..).zip(read.chunks_exact(3)) {
            let &[loss, top1, grad_norm] = figures else { continue };
            if !loss.is_finite() {
                broken.push((step.at, format!("the loss is {loss}, expected a finite number"), step.samples));
            } else if !grad_norm.is_finite() {
                let norms = step.moved.norms.map(|n| n.to_vec1::<f32>()).transpose()?.unwrap_or_default();
                let of = norms.iter().skip(1).position(|norm| !norm.is_finite()).and_then(|i| params.get(i));
                let of = of.map_or("the parameters together", |param| param.name.as_str());
                broken.push((step.at, format!("the gradient of {of} is not finite"), step.samples));
            } else {
                self.seen = Some(Seen { loss, top1, grad_norm });
            }
        }
        Ok(broken)
    }

    /// Puts the trainables back to where the best evaluation of the phase saw them.
    fn restore_best(&mut self, params: &[Param]) -> Result<()> {
        let Some((_, step)) = self.state.best.filter(|(_, step)| *step != self.state.step) else {
            return Ok(());
        };
        let Some(saved) = resume::at_step(self.dir, step, self.state.phase)? else { return Ok(()) };
        saved.restore(params, self.device)?;
        if self.recipe.train.ema > 0.0 && saved.has_state_of_average() {
            // What was evaluated was the average.
            let read = |name: &str| saved.optimizer(name, self.device);
            Average::restore(params, self.recipe.train.ema, &read)?.swap(params)?;
        }
        self.state.measured = saved.state.measured;
        if let Some((measured, _)) = &mut self.state.measured {
            *measured = self.state.step;
        }
        self.progress.note(&format!("the best evaluation was that of step {step}, whose weights stay"));
        Ok(())
    }

    /// The factor on each parameter's learning rate: `layer_decay` once for each block between it and the
    /// output, and `lora_plus` on LoRA's B. Empty where both are 1.
    fn rate_factors(&self, params: &[Param]) -> Vec<f64> {
        let (decay, plus) = (self.recipe.train.layer_decay, self.recipe.train.lora_plus);
        if decay == 1.0 && plus == 1.0 {
            return Vec::new();
        }
        let factor = |param: &Param| {
            let (depth, last) = self.supply.depth(&param.name);
            let deep = decay.powi(i32::try_from(last - depth).unwrap_or(i32::MAX));
            deep * if param.name.ends_with(".lora_B") { plus } else { 1.0 }
        };
        params.iter().map(factor).collect()
    }

    /// Names the samples that could not be read.
    fn say_left_out(&self) {
        let left_out = self.supply.left_out();
        if let Some(first) = left_out.first() {
            let more = if left_out.len() > 1 { ", ..." } else { "" };
            let count = left_out.len();
            self.progress.note(&format!("{count} unreadable samples replaced so far: {first}{more}"));
        }
    }

    fn say_still(&self, lr: f64, params: &[Param], still: &[String]) {
        if !still.is_empty() && lr > 0.0 {
            self.progress.note(&format!(
                "{} of {} trainables had a zero gradient or did not move at the first step: {}",
                still.len(),
                params.len(),
                still.join(", ")
            ));
        }
    }

    #[allow(clippy::too_many_arguments)] // one call site, where every one is at hand
    fn log(
        &mut self,
        phase: &PhaseConfig,
        lr: f64,
        epoch: f64,
        weights: &Weights,
        tracker: &mut Tracker,
        figures: &[(&'static str, f64)],
        layers_due: bool,
    ) -> Result<()> {
        let seen = self.seen.unwrap_or_default();
        let mut line = Map::new();
        let mut put = |key: &str, value: Value| line.insert(key.to_string(), value);
        put("step", json!(self.state.step));
        put("epoch", json!(epoch));
        put("split", json!("train"));
        put("phase", json!(phase.name));
        put("loss", json!(seen.loss));
        if self.supply.counts_right() {
            put("top1", json!(seen.top1));
        }
        put("lr", json!(lr));
        put("grad_norm", json!(seen.grad_norm));
        for (key, value) in figures {
            put(key, json!(value));
        }
        let gates = if phase.calm.is_some() { weights.gates()? } else { Vec::new() };
        if phase.quantize {
            let coarse = coarse(weights);
            let counts = |name: &str| coarse.contains(name);
            let figures = tracker.figures(counts)?;
            put("oscillation", json!(figures.percent));
            put("osc_ema_mean", json!(figures.ema_mean));
            put("flip_rate", json!(figures.flip_rate));
            let (frozen, masked) =
                closed(gates.iter().filter(|(name, _)| counts(name)), tracker.codes(counts))?;
            self.state.frozen = frozen;
            put("frozen", json!(frozen));
            if phase.calm_qk == CalmQk::MaskGrad {
                put("masked", json!(masked));
            }
        }
        put(self.supply.unit().0, json!(self.state.samples_per_s));
        put("peak_rss_bytes", json!(peak_rss_bytes()));
        if let Some(bytes) = crate::device::peak_bytes(self.device) {
            put("peak_device_bytes", json!(bytes));
        }
        self.metrics.write(line)?;
        if !phase.quantize || !layers_due {
            return Ok(());
        }
        tracker.fetch()?;
        let mut layers = Vec::new();
        for (name, weight) in weights.iter() {
            let Some(track) = tracker.track(name) else { continue };
            let gate = gates.iter().find(|(gated, _)| gated == name).map(|(_, gate)| gate);
            layers.extend(layers::figures(name, weight, track, gate)?);
        }
        let line = json!({
            "step": self.state.step,
            "split": "layers",
            "phase": phase.name,
            "layers": layers,
        });
        self.metrics.write(line.as_object().cloned().unwrap_or_default())
    }
}

/// Steps that a run may leave out.
const MOST_SKIPPED: usize = 100;

/// What is said of a step that was not finite.
fn broken(phase: &str, at: usize, message: &str, samples: &[u32]) -> String {
    format!("phase {phase}, step {at}: {message}; samples {}", few(samples))
}

/// The first few of `samples`.
fn few(samples: &[u32]) -> String {
    let shown: Vec<String> = samples.iter().take(16).map(u32::to_string).collect();
    let more = if samples.len() > shown.len() { ", ..." } else { "" };
    format!("{}{more}", shown.join(", "))
}

/// The percent of `codes` that annealing holds still, and of those whose gradient alone it cuts.
fn closed<'a>(gates: impl Iterator<Item = &'a (String, Gate)>, codes: usize) -> Result<(f64, f64)> {
    let (mut held, mut masked) = (0f64, 0f64);
    for (_, gate) in gates {
        let closed = (1.0 - layers::mean(&gate.free)?) * gate.free.elem_count() as f64;
        *(if gate.held { &mut held } else { &mut masked }) += closed;
    }
    let percent = |n: f64| 100.0 * n / codes.max(1) as f64;
    Ok((percent(held), percent(masked)))
}
