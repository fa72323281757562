//! Recipes: the typed TOML in which the slots of a run are filled.
//!
//! One direction: the file, then `--set` and flags, then [`Recipe::check`], then work. After the check
//! nothing is validated again.

mod adapter;
mod continual;
mod embedded;
mod model;
mod phase;
mod set;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::data::text::TextConfig;
use crate::data::{Augment, DataConfig};
use crate::kernels::Arithmetic;
use crate::models::Reading;
use crate::optim::OptimizerConfig;
use crate::select::kappa::KappaConfig;
use crate::select::SelectBits;
use crate::transform::WeightQuant;
use crate::weights::nearest;
use crate::{files, Error, Result};

pub use adapter::{
    AdapterKind, AdapterSlot, BaseConfig, Biases, Format, Init, LlamaSource, Modules, NewLlama, PeftType,
};
pub use continual::{
    ContinualConfig, EwcConfig, FieldConfig, FisherLabels, HeadKind, Protection, ReplayConfig, TaskConfig,
};
pub use embedded::EMBEDDED;
pub use model::{BinarySource, ConvSource, ModelConfig, SwinSource, VitSource};
pub use phase::{CalmQk, PhaseConfig, QkrBias, QkrConfig, When};
pub use set::{put, set};

/// A whole run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Names the run folder.
    pub name: String,
    /// What it is for, in one line.
    #[serde(default)]
    pub about: String,
    /// Seed of everything random.
    #[serde(default)]
    pub seed: u64,
    /// `[model]`.
    pub model: ModelConfig,
    /// `[data]`.
    #[serde(default)]
    pub data: DataConfig,
    /// `[text]`: what a language model reads, in place of `[data]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<TextConfig>,
    /// `[kappa]`: which weights of a language model are trained, or adapted, by their condition numbers. None: all
    /// that the recipe is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kappa: Option<KappaConfig>,
    /// `[base]`: the frozen weights of a language model packed. None: they are as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseConfig>,
    /// `[adapter]`: what is trained beside frozen weights. None: the weights themselves are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterSlot>,
    /// `[continual]`: tasks that are learned one after another. None: one task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub continual: Option<ContinualConfig>,
    /// `[augment]`: random changes to the training images.
    #[serde(default)]
    pub augment: Augment,
    /// `[activation]`.
    #[serde(default)]
    pub activation: ActivationConfig,
    /// `[qkr]`. None: query and key are quantized each on its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qkr: Option<QkrConfig>,
    /// `[select]`: layers that keep more bits. None: all of a transform have its bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub select: Option<SelectBits>,
    /// `[distill]`.
    #[serde(default)]
    pub distill: DistillConfig,
    /// `[optimizer]`.
    pub optimizer: OptimizerConfig,
    /// `[train]`.
    #[serde(default)]
    pub train: TrainConfig,
    /// `[[transform]]`: the weight quantizers, the blocks' first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub transform: Vec<TransformConfig>,
    /// `[[phase]]`: what is trained, one after another.
    pub phase: Vec<PhaseConfig>,
}

/// How the steps of weights that are not trained are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fit {
    /// The better of the largest weight's and of least squared error, group by group.
    #[default]
    Best,
    /// From the largest weight of each group: plain round to nearest.
    Nearest,
}

impl Fit {
    fn is_best(&self) -> bool {
        *self == Fit::Best
    }
}

/// `[[transform]]`: a weight quantizer and what it is for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransformConfig {
    /// How the steps of a language model are found that is packed without training.
    #[serde(default, skip_serializing_if = "Fit::is_best")]
    pub fit: Fit,
    /// The quantizer.
    pub kind: WeightQuant,
    /// Bits per weight: 2, 3, 4 or 8.
    pub bits: u8,
    /// Columns that share a step within a row, the last group of a row excepted; none: the whole row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<usize>,
    /// Patterns of weight names, `*` for any run of characters, `{a,b}` for one of several.
    pub targets: Vec<String>,
}

/// `[activation]`: learned-step activation quantizers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ActivationConfig {
    /// Bits inside the blocks: 2, 3, 4 or 8; 32 leaves every activation float.
    pub bits: u8,
    /// Bits of the image and of the classifier's input, where `bits` is not 32.
    pub edge_bits: u8,
}

impl Default for ActivationConfig {
    fn default() -> Self {
        ActivationConfig { bits: 32, edge_bits: 8 }
    }
}

/// What the student learns from a full-precision teacher.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DistillKind {
    /// Nothing.
    None,
    /// Soft cross-entropy against the teacher's class probabilities (ofq.md 6.1).
    Soft,
    /// The teacher's ranking of the classes behind the label (Plackett-Luce, Bassam et al. 2025), which
    /// takes the place of the cross-entropy with the labels too.
    Pld,
}

/// `[distill]`: the teacher is the model at the start of quantization unless `teacher` names another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DistillConfig {
    /// The loss.
    pub kind: DistillKind,
    /// A teacher model of its own: a folder or a hub name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<PathBuf>,
}

impl Default for DistillConfig {
    fn default() -> Self {
        DistillConfig { kind: DistillKind::Soft, teacher: None }
    }
}

/// What becomes of a step whose loss or gradient is not finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnNan {
    /// The run ends with an error that names the step, its samples and the first layer.
    Stop,
    /// The step is left out.
    Skip,
    /// The step is left out, and what is trained goes back to the last checkpoint.
    Rollback,
}

/// `[train]`: what all phases share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Samples in one forward pass.
    pub batch_size: usize,
    /// Forward passes whose gradients make one step.
    pub accumulate: usize,
    /// Largest norm of the gradient of all trainables together; 0: no clipping.
    pub clip: f64,
    /// Samples in one forward pass of an evaluation.
    pub eval_batch_size: usize,
    /// Steps between lines in metrics.jsonl.
    pub log_steps: usize,
    /// Steps between evaluations; 0: at the end of each phase only.
    pub eval_steps: usize,
    /// Steps between checkpoints; 0: at the end of each epoch.
    pub checkpoint_steps: usize,
    /// Checkpoints kept, the best one beside.
    pub keep: usize,
    /// Decay of an exponential average of the weights that evaluations see and that each phase ends with,
    /// but one that anneals: what it holds still is not to move at its end either. 0: none.
    pub ema: f64,
    /// Stochastic depth: the probability with which the deepest block leaves out a branch for a sample; 0:
    /// never.
    pub drop_path: f64,
    /// Factor on the learning rate from each block to the one before it; 1: the same for all.
    pub layer_decay: f64,
    /// LoRA+ (Hayou et al. 2024): factor on the learning rate of LoRA's B; 1: the same for both.
    pub lora_plus: f64,
    /// Evaluations without a better one after which a phase ends; 0: never.
    pub patience: usize,
    /// Whether a phase ends with the weights of its best evaluation rather than of its last step.
    pub restore_best: bool,
    /// What becomes of a step whose loss or gradient is not finite.
    pub on_nan: OnNan,
    /// Whether only the inputs of blocks are kept for the backward pass and the rest is computed again.
    pub checkpointing: bool,
    /// What the factors of matrix products are rounded to; sums, activations and what is trained stay in f32.
    pub products: Arithmetic,
    /// Whether the passes of a vision transformer on a CUDA device are recorded as graphs and launched as a whole.
    /// Without effect on other devices, under stochastic depth and for language models.
    pub graphs: bool,
    /// The folder of an earlier run, or of the optimizer's state that it left: what classp remembers of the
    /// tasks before. None: nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optimizer_state: Option<PathBuf>,
    /// Whether trainables without a stored state start with none and stored ones that are not trained are left
    /// out, rather than being errors.
    pub allow_partial: bool,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            batch_size: 100,
            accumulate: 1,
            clip: 1.0,
            eval_batch_size: 250,
            log_steps: 10,
            eval_steps: 0,
            checkpoint_steps: 0,
            keep: 2,
            ema: 0.0,
            drop_path: 0.0,
            layer_decay: 1.0,
            lora_plus: 1.0,
            patience: 0,
            restore_best: false,
            on_nan: OnNan::Stop,
            checkpointing: false,
            products: Arithmetic::F32,
            graphs: false,
            optimizer_state: None,
            allow_partial: false,
        }
    }
}

impl Recipe {
    /// The embedded recipe called `name`, or the file at that path, as a table that flags can still
    /// change.
    pub fn table(name: &str) -> Result<toml::Table> {
        let (origin, text) = match EMBEDDED.iter().find(|(n, _)| *n == name) {
            Some((n, text)) => (PathBuf::from(format!("recipe {n}")), (*text).to_string()),
            None => {
                let path = Path::new(name);
                if !path.is_file() {
                    let near = nearest(name, EMBEDDED.iter().map(|(n, _)| *n));
                    let hint = near.map(|n| format!(" (nearest: {n})")).unwrap_or_default();
                    let known: Vec<&str> = EMBEDDED.iter().map(|(n, _)| *n).collect();
                    return Err(Error::usage(format!(
                        "recipe {name}: no such file and not one of {}{hint}",
                        known.join(", ")
                    )));
                }
                (path.to_path_buf(), files::read_text(path)?)
            }
        };
        // Once as the type, so that a mistake is reported with its line in this file.
        let mut plain: toml::Table = toml::from_str(&text)
            .map_err(|e| Error::usage(format!("{}: {}", origin.display(), toml_message(&e))))?;
        if plain.remove("ablation").is_some() {
            // Variants of a recipe: the recipe itself is what stands beside them.
            Recipe::deserialize(toml::Value::Table(plain))
                .map_err(|e| Error::usage(format!("{}: {}", origin.display(), toml_message(&e))))?;
            return toml::from_str(&text)
                .map_err(|e| Error::usage(format!("{}: {}", origin.display(), toml_message(&e))));
        }
        toml::from_str::<Recipe>(&text)
            .map_err(|e| Error::usage(format!("{}: {}", origin.display(), toml_message(&e))))?;
        toml::from_str(&text).map_err(|e| Error::usage(format!("{}: {}", origin.display(), toml_message(&e))))
    }

    /// The recipe that a table describes, checked.
    pub fn resolve(table: toml::Table) -> Result<Self> {
        let recipe: Recipe = Recipe::deserialize(toml::Value::Table(table))
            .map_err(|e| Error::usage(format!("recipe: {}", toml_message(&e))))?;
        recipe.check()?;
        Ok(recipe)
    }

    /// The recipe as a file holds it.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::Run(format!("recipe: {e}")))
    }

    /// What only several tables together can tell, and what types cannot hold.
    pub fn check(&self) -> Result<()> {
        match self.model {
            ModelConfig::Llama(_) => self.check_language()?,
            _ => self.check_vision()?,
        }
        for (i, transform) in self.transform.iter().enumerate() {
            transform.kind.grid(transform.bits).map_err(|e| Error::usage(format!("transform.{i}: {e}")))?;
            if transform.group == Some(0) {
                return Err(Error::usage(format!("transform.{i}.group = 0: expected 1 column or more")));
            }
            if transform.targets.is_empty() {
                return Err(Error::usage(format!("transform.{i}.targets: found none, expected patterns")));
            }
        }
        if let Some(select) = &self.select {
            select.check()?;
        }
        let ActivationConfig { bits, edge_bits } = self.activation;
        if !matches!(bits, 2 | 3 | 4 | 8 | 32) {
            return Err(Error::usage(format!("activation.bits = {bits}: expected 2, 3, 4, 8 or 32")));
        }
        if !(2..=8).contains(&edge_bits) {
            return Err(Error::usage(format!("activation.edge_bits = {edge_bits}: expected 2 to 8")));
        }
        let train = &self.train;
        let counts = [
            ("train.batch_size", train.batch_size),
            ("train.accumulate", train.accumulate),
            ("train.eval_batch_size", train.eval_batch_size),
            ("train.log_steps", train.log_steps),
            ("train.keep", train.keep),
        ];
        if let Some((key, n)) = counts.iter().find(|(_, n)| *n == 0 || *n > 1 << 20) {
            return Err(Error::usage(format!("{key} = {n}: expected 1 to {}", 1 << 20)));
        }
        self.augment.check()?;
        for (key, value) in [("train.ema", train.ema), ("train.drop_path", train.drop_path)] {
            if !(0.0..1.0).contains(&value) {
                return Err(Error::usage(format!("{key} = {value}: expected 0 or more and less than 1")));
            }
        }
        if !(train.layer_decay > 0.0 && train.layer_decay <= 1.0) {
            let found = train.layer_decay;
            return Err(Error::usage(format!("train.layer_decay = {found}: expected above 0 and at most 1")));
        }
        if !(train.lora_plus.is_finite() && train.lora_plus > 0.0) {
            return Err(Error::usage(format!("train.lora_plus = {}: expected above 0", train.lora_plus)));
        }
        self.optimizer.check()?;
        if train.optimizer_state.is_some() && !self.optimizer.remembers() {
            let message =
                "train.optimizer_state: expected optimizer.kind = \"classp\", whose state remembers";
            return Err(Error::usage(message));
        }
        if !(train.clip.is_finite() && train.clip >= 0.0) {
            return Err(Error::usage(format!("train.clip = {}: expected 0 or more", train.clip)));
        }
        self.model.check()?;
        self.check_phases()
    }

    /// Whether the model is a language model that is adapted rather than quantized.
    pub fn adapts(&self) -> bool {
        matches!(self.model, ModelConfig::Llama(_)) && self.transform.is_empty()
    }

    fn check_vision(&self) -> Result<()> {
        let stray = [
            ("text", self.text.is_some()),
            ("kappa", self.kappa.is_some() && self.continual.is_none()),
            ("base", self.base.is_some()),
            ("adapter", self.adapter.is_some()),
        ];
        if let Some((table, _)) = stray.iter().find(|(_, there)| *there) {
            return Err(Error::usage(format!("{table}: only a model of kind llama has it")));
        }
        if let Some(continual) = &self.continual {
            return self.check_continual(continual);
        }
        if self.train.graphs && self.train.drop_path > 0.0 {
            return Err(Error::usage(
                "train.graphs: train.drop_path draws anew at every step, which no recording can",
            ));
        }
        match self.transform.is_empty() {
            true => Err(Error::usage("transform: found none, expected a weight quantizer")),
            false => Ok(()),
        }
    }

    fn check_continual(&self, continual: &ContinualConfig) -> Result<()> {
        continual.check()?;
        let stray = [
            ("transform", !self.transform.is_empty()),
            ("activation", self.activation.bits != 32),
            ("qkr", self.qkr.is_some()),
            ("select", self.select.is_some()),
        ];
        if let Some((table, _)) = stray.iter().find(|(_, there)| *there) {
            return Err(Error::usage(format!("{table}: tasks that are learned one after another have none")));
        }
        match (&self.kappa, continual.method) {
            (Some(kappa), Protection::Kappatune) => {
                kappa.check()?;
                if kappa.selection.is_some() || kappa.split_fused {
                    return Err(Error::usage(
                        "kappa.selection, kappa.split_fused: tasks are ranked as the one before left them",
                    ));
                }
            }
            (None, Protection::Kappatune) => {
                return Err(Error::usage(
                    "continual.method = \"kappatune\": expected a [kappa] with a budget",
                ));
            }
            (Some(_), _) => return Err(Error::usage("kappa: only continual.method = \"kappatune\" has it")),
            (None, _) => {}
        }
        let binary = matches!(&self.model, ModelConfig::Binary(b) if b.reading == Reading::Field);
        if (continual.method == Protection::Field) != binary {
            return Err(Error::usage(
                "continual.method = \"field\" and model.kind = \"binary\", model.reading = \"field\": expected both",
            ));
        }
        let mixes = self.augment.mixup > 0.0 || self.augment.cutmix > 0.0;
        if continual.heads == HeadKind::Task && (self.augment.label_smoothing > 0.0 || mixes) {
            return Err(Error::usage(
                "augment.label_smoothing, mixup, cutmix: their soft labels reach over the heads of all tasks, expected \
                 none with continual.heads = \"task\"",
            ));
        }
        if self.distill.teacher.is_some() || self.distill.kind == DistillKind::Pld {
            return Err(Error::usage("distill: tasks that are learned one after another have no teacher"));
        }
        let (phases, tasks) = (self.phase.len(), continual.task.len());
        if phases != 1 && phases != tasks {
            return Err(Error::usage(format!(
                "phase: found {phases}, expected one for all tasks, or one for each of {tasks}"
            )));
        }
        if self.phase.iter().any(|phase| phase.quantize) {
            return Err(Error::usage("phase: quantize = true needs a [[transform]]"));
        }
        let classp = self.optimizer.remembers();
        if continual.method == Protection::Classp && !classp {
            return Err(Error::usage("continual.method = \"classp\": expected optimizer.kind = \"classp\""));
        }
        Ok(())
    }

    fn check_language(&self) -> Result<()> {
        let plain = Augment::default();
        let stray = [
            ("augment", self.augment != plain),
            ("activation", self.activation.bits != 32),
            ("qkr", self.qkr.is_some()),
            ("continual", self.continual.is_some()),
            ("train.drop_path", self.train.drop_path > 0.0),
            ("train.graphs", self.train.graphs),
        ];
        if let Some((table, _)) = stray.iter().find(|(_, there)| *there) {
            return Err(Error::usage(format!("{table}: only a vision transformer has it")));
        }
        if let Some(base) = self.base {
            base.check()?;
            if self.adapter.is_none() {
                return Err(Error::usage(
                    "base: packed weights are frozen, expected an [adapter] that is trained",
                ));
            }
        }
        if let Some(kappa) = &self.kappa {
            kappa.check()?;
            if !self.transform.is_empty() {
                return Err(Error::usage("kappa and transform: expected one of them"));
            }
            if self.adapter.is_some() && (kappa.train_norms || kappa.train_biases) {
                let message = "kappa.train_norms, kappa.train_biases: beside an adapter it is adapter.modules_to_save and \
                               adapter.bias that train them";
                return Err(Error::usage(message));
            }
        }
        if let Some(adapter) = &self.adapter {
            adapter.check()?;
            if !self.transform.is_empty() {
                return Err(Error::usage("adapter and transform: expected one of them"));
            }
            if self.phase.iter().any(|phase| phase.quantize) {
                return Err(Error::usage("phase: quantize = true needs a [[transform]]"));
            }
        }
        if self.distill.kind == DistillKind::Pld {
            return Err(Error::usage("distill.kind = \"pld\": a ranking of classes, expected soft or none"));
        }
        Ok(())
    }

    fn check_phases(&self) -> Result<()> {
        for (i, phase) in self.phase.iter().enumerate() {
            let key = |key: &str| format!("phase.{i}.{key}");
            let finite = [
                ("epochs", phase.epochs),
                ("lr", phase.lr),
                ("min_lr", phase.min_lr),
                ("warmup_epochs", phase.warmup_epochs),
                ("warmup_lr", phase.warmup_lr),
            ];
            if let Some((name, value)) = finite.iter().find(|(_, v)| !(v.is_finite() && *v >= 0.0)) {
                return Err(Error::usage(format!("{} = {value}: expected 0 or more", key(name))));
            }
            self.optimizer.check_rate(phase.lr.max(phase.min_lr).max(phase.warmup_lr))?;
            if let Some(span) = phase.cosine_span.filter(|span| !(span.is_finite() && *span > 0.0)) {
                return Err(Error::usage(format!("{} = {span}: expected more than 0", key("cosine_span"))));
            }
            if let Some(band) = phase.calm {
                if !(band > 0.0 && band < 0.5) {
                    let found = format!("{} = {band}", key("calm"));
                    return Err(Error::usage(format!("{found}: expected above 0 and below 0.5 steps")));
                }
                if !phase.quantize {
                    return Err(Error::usage(format!("{}: it needs quantize = true", key("calm"))));
                }
                if !self.transform.iter().any(|t| t.kind == WeightQuant::Statsq) {
                    let expected = "expected a transform of kind statsq, whose thresholds it is about";
                    return Err(Error::usage(format!("{}: {expected}", key("calm"))));
                }
            }
            if phase.calm_qk != CalmQk::Off && (phase.calm.is_none() || self.qkr.is_none()) {
                let name = key("calm_qk");
                return Err(Error::usage(format!("{name}: it needs calm in the phase and a [qkr] table")));
            }
            if phase.continue_optimizer && !self.phase[..i].iter().any(|earlier| earlier.quantize) {
                let name = key("continue_optimizer");
                return Err(Error::usage(format!(
                    "{name}: no quantized phase comes before, whose state it could take"
                )));
            }
            let after = self.phase[..i].iter().any(|earlier| earlier.quantize);
            if after && !phase.quantize {
                return Err(Error::usage(format!(
                    "{}: a float phase cannot follow a quantized one",
                    key("quantize")
                )));
            }
        }
        if !self.adapts() && self.continual.is_none() && !self.phase.iter().any(|phase| phase.quantize) {
            return Err(Error::usage("phase: found none with quantize = true, expected at least one"));
        }
        Ok(())
    }
}

/// toml's message in one line, with the nearest known key where one is unknown.
fn toml_message(error: &toml::de::Error) -> String {
    let mut text = error.message().replace('\n', " ");
    if let Some((_, rest)) = text.split_once("unknown field `") {
        if let Some((unknown, expected)) = rest.split_once('`') {
            let known: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
            if let Some(near) = nearest(unknown, known.into_iter()) {
                text = format!("{text} (nearest: {near})");
            }
        }
    }
    let shown = error.to_string();
    let place = shown.lines().next().and_then(|l| l.split_once(" at ")).map(|(_, place)| place.to_string());
    let key = shown.lines().find_map(|l| l.strip_prefix("in ")).map(str::to_string);
    match (place, key) {
        (Some(place), _) => format!("{place}: {text}"),
        (None, Some(key)) => format!("{key}: {text}"),
        (None, None) => text,
    }
}
