//! Recipes: the typed TOML in which the slots of a run are filled.
//!
//! One direction: the file, then `--set` and flags, then [`Recipe::check`], then work. After the check
//! nothing is validated again.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::data::{Augment, DataConfig};
use crate::optim::{OptimizerConfig, Schedule};
use crate::select::SelectBits;
use crate::transform::WeightQuant;
use crate::weights::nearest;
use crate::{files, Error, Result};

/// The recipes that are compiled in: name and text.
pub const EMBEDDED: &[(&str, &str)] = &[
    ("glyphs", include_str!("../recipes/glyphs.toml")),
    ("vit-w2a32", include_str!("../recipes/vit-w2a32.toml")),
    ("vit-w2a2", include_str!("../recipes/vit-w2a2.toml")),
    ("vit-w4a4", include_str!("../recipes/vit-w4a4.toml")),
    ("deit-tiny-w2a2", include_str!("../recipes/deit-tiny-w2a2.toml")),
    ("deit-tiny-w3a3", include_str!("../recipes/deit-tiny-w3a3.toml")),
    ("deit-tiny-w4a4", include_str!("../recipes/deit-tiny-w4a4.toml")),
    ("deit-small-w2a2", include_str!("../recipes/deit-small-w2a2.toml")),
    ("deit-small-w3a3", include_str!("../recipes/deit-small-w3a3.toml")),
    ("deit-small-w4a4", include_str!("../recipes/deit-small-w4a4.toml")),
    ("swin-tiny-w2a2", include_str!("../recipes/swin-tiny-w2a2.toml")),
    ("swin-tiny-w3a3", include_str!("../recipes/swin-tiny-w3a3.toml")),
    ("swin-tiny-w4a4", include_str!("../recipes/swin-tiny-w4a4.toml")),
    ("ablation-ofq", include_str!("../recipes/ablation-ofq.toml")),
];

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
    pub transform: Vec<TransformConfig>,
    /// `[[phase]]`: what is trained, one after another.
    pub phase: Vec<PhaseConfig>,
}

/// `[model]`: where to start from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum ModelConfig {
    /// A vision transformer.
    Vit(VitSource),
    /// A Swin transformer.
    Swin(SwinSource),
}

impl ModelConfig {
    /// The pretrained model, where there is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            ModelConfig::Vit(vit) => vit.path.as_deref(),
            ModelConfig::Swin(swin) => swin.path.as_deref(),
        }
    }

    /// Whether it may be a file that PyTorch pickled.
    pub fn allow_pickle(&self) -> bool {
        match self {
            ModelConfig::Vit(vit) => vit.allow_pickle,
            ModelConfig::Swin(swin) => swin.allow_pickle,
        }
    }

    /// The same path, to be changed.
    pub fn path_mut(&mut self) -> &mut Option<PathBuf> {
        match self {
            ModelConfig::Vit(vit) => &mut vit.path,
            ModelConfig::Swin(swin) => &mut swin.path,
        }
    }

    /// Pixels on a side that images are brought to, where the recipe says so.
    pub fn image_size(&self) -> Option<usize> {
        match self {
            ModelConfig::Vit(vit) => vit.image_size,
            ModelConfig::Swin(swin) => swin.image_size,
        }
    }

    /// What types cannot hold.
    fn check(&self) -> Result<()> {
        match self {
            ModelConfig::Vit(vit) => vit.check(),
            ModelConfig::Swin(swin) => swin.check(),
        }
    }
}

/// A pretrained ViT, or the sizes of a new one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VitSource {
    /// A pretrained model: a folder, or a hub name. None: a new model of the sizes below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Whether a pretrained model or teacher may be a file that PyTorch pickled. It is read as data and
    /// nothing in it is run.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub allow_pickle: bool,
    /// Pixels on a side that images are brought to. None: the pretrained model's, or, for a new model,
    /// that of the data where it is one size of at most 64, else 64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_size: Option<usize>,
    /// Pixels on a side of a patch of a new model. None: an eighth of the image, at least 4.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patch_size: Option<usize>,
    /// Channels of the blocks of a new model.
    pub hidden: usize,
    /// Blocks of a new model.
    pub layers: usize,
    /// Attention heads of a new model.
    pub heads: usize,
    /// Channels inside the MLP of a new model.
    pub mlp: usize,
}

impl Default for VitSource {
    fn default() -> Self {
        VitSource {
            path: None,
            allow_pickle: false,
            image_size: None,
            patch_size: None,
            hidden: 96,
            layers: 6,
            heads: 4,
            mlp: 192,
        }
    }
}

impl VitSource {
    fn check(&self) -> Result<()> {
        let sizes =
            [("hidden", self.hidden), ("layers", self.layers), ("heads", self.heads), ("mlp", self.mlp)];
        if let Some((key, _)) = sizes.iter().find(|(_, n)| *n == 0) {
            return Err(Error::usage(format!("model.{key} = 0: expected at least 1")));
        }
        if !self.hidden.is_multiple_of(self.heads) {
            return Err(Error::usage(format!(
                "model.heads = {} does not divide model.hidden = {}",
                self.heads, self.hidden
            )));
        }
        Ok(())
    }
}

/// A pretrained Swin, or the sizes of a new one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SwinSource {
    /// A pretrained model: a folder, or a hub name. None: a new model of the sizes below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Whether a pretrained model or teacher may be a file that PyTorch pickled, as for a ViT.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub allow_pickle: bool,
    /// Pixels on a side that images are brought to. None: the pretrained model's, or, for a new model,
    /// that of the data where it is one size of at most 64, else 64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_size: Option<usize>,
    /// Pixels on a side of a patch of a new model. None: a sixteenth of the image, at least 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patch_size: Option<usize>,
    /// Channels of the first stage of a new model; each stage has twice those of the one before.
    pub embed: usize,
    /// Blocks of each stage of a new model.
    pub depths: Vec<usize>,
    /// Attention heads of each stage of a new model.
    pub heads: Vec<usize>,
    /// Patches on a side of an attention window of a new model. None: 4 to 8, whatever divides the map.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
    /// Channels inside the MLP of a new model over those of its stage.
    pub mlp_ratio: f64,
}

impl Default for SwinSource {
    fn default() -> Self {
        SwinSource {
            path: None,
            allow_pickle: false,
            image_size: None,
            patch_size: None,
            embed: 48,
            depths: vec![2, 4],
            heads: vec![2, 4],
            window: None,
            mlp_ratio: 2.0,
        }
    }
}

impl SwinSource {
    fn check(&self) -> Result<()> {
        let (stages, heads) = (self.depths.len(), self.heads.len());
        if !(1..=8).contains(&stages) || heads != stages {
            return Err(Error::usage(format!(
                "model.depths has {stages} stages and model.heads {heads}: expected as many, 1 to 8"
            )));
        }
        let all = self.depths.iter().chain(&self.heads).chain([&self.embed]).chain(&self.window);
        if all.into_iter().any(|n| *n == 0) {
            return Err(Error::usage("model: found a size of 0, expected at least 1"));
        }
        for (stage, heads) in self.heads.iter().enumerate() {
            let channels = self.embed.saturating_mul(1 << stage);
            if !channels.is_multiple_of(*heads) {
                return Err(Error::usage(format!(
                    "model.heads = {heads} does not divide the {channels} channels of stage {stage}"
                )));
            }
        }
        if !(self.mlp_ratio.is_finite() && self.mlp_ratio > 0.0) {
            return Err(Error::usage(format!("model.mlp_ratio = {}: expected more than 0", self.mlp_ratio)));
        }
        Ok(())
    }
}

/// `[[transform]]`: a weight quantizer and what it is for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransformConfig {
    /// The quantizer.
    pub kind: WeightQuant,
    /// Bits per weight: 2, 3, 4 or 8.
    pub bits: u8,
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
    /// Decay of an exponential average of the weights that evaluations see and that each phase ends with;
    /// 0: none.
    pub ema: f64,
    /// Stochastic depth: the probability with which the deepest block leaves out a branch for a sample; 0:
    /// never.
    pub drop_path: f64,
    /// Factor on the learning rate from each block to the one before it; 1: the same for all.
    pub layer_decay: f64,
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
        }
    }
}

/// When a phase runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// In every run.
    Always,
    /// Where the model, or its classifier, starts from random numbers.
    Untrained,
}

/// `[[phase]]`: a stretch of training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PhaseConfig {
    /// Its name in metrics and messages.
    pub name: String,
    /// Whether the quantizers of `[[transform]]` and `[activation]` are in place.
    pub quantize: bool,
    /// When it runs.
    #[serde(default = "always")]
    pub when: When,
    /// Passes over the training data.
    #[serde(default)]
    pub epochs: f64,
    /// Steps, in place of `epochs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<usize>,
    /// Peak learning rate.
    pub lr: f64,
    /// Final learning rate.
    #[serde(default)]
    pub min_lr: f64,
    /// Shape of the rate after warm-up.
    #[serde(default = "cosine")]
    pub schedule: Schedule,
    /// Steps of warm-up.
    #[serde(default)]
    pub warmup: usize,
    /// Epochs of warm-up, on top of `warmup`.
    #[serde(default)]
    pub warmup_epochs: f64,
    /// Rate that warm-up starts from.
    #[serde(default)]
    pub warmup_lr: f64,
    /// Epochs that the cosine of `cosine_epochs` spans. None: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cosine_span: Option<f64>,
    /// Whether the optimizer goes on from the state that the quantized phase before left.
    #[serde(default, skip_serializing_if = "is_false")]
    pub continue_optimizer: bool,
    /// Confidence-guided annealing: only weights within so many steps of a threshold move, and the
    /// optimizer goes on as with `continue_optimizer`. None: all weights move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calm: Option<f64>,
    /// What annealing does to a product of query and key.
    #[serde(default, skip_serializing_if = "CalmQk::is_off")]
    pub calm_qk: CalmQk,
}

/// What annealing does to the product of query and key, whose factors are shared by whole rows and
/// columns of it, so that its entries cannot be held one by one (ofq.md 4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CalmQk {
    /// Nothing: what the release that gave the published figures does.
    #[default]
    Off,
    /// The gradient of confident entries is cut, as the paper's text describes. Query and key go on moving
    /// along what is left of it, and with them whole rows and columns of the product.
    MaskGrad,
    /// The product becomes a weight of its own, so that confident entries are held still one by one.
    Hold,
}

impl CalmQk {
    fn is_off(&self) -> bool {
        *self == CalmQk::Off
    }
}

/// `[qkr]`: query-key reparameterization.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QkrConfig {
    /// Patterns of the attentions whose query and key become one weight, as names of modules
    /// (`vit.encoder.layer.0.attention.attention`).
    #[serde(default = "every")]
    pub targets: Vec<String>,
    /// What becomes of the query's bias.
    #[serde(default)]
    pub bias: QkrBias,
}

fn every() -> Vec<String> {
    vec!["*".into()]
}

/// What query-key reparameterization does with the query's bias. The key's changes no probability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QkrBias {
    /// It becomes a trainable term of the key side, which keeps the model what it was.
    #[default]
    KeepQ,
    /// It is dropped, as in the published code.
    Drop,
}

fn is_false(value: &bool) -> bool {
    !value
}

fn always() -> When {
    When::Always
}

fn cosine() -> Schedule {
    Schedule::Cosine
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
        if self.transform.is_empty() {
            return Err(Error::usage("transform: found none, expected a weight quantizer"));
        }
        for (i, transform) in self.transform.iter().enumerate() {
            transform.kind.grid(transform.bits).map_err(|e| Error::usage(format!("transform.{i}: {e}")))?;
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
        self.optimizer.check()?;
        if !(train.clip.is_finite() && train.clip >= 0.0) {
            return Err(Error::usage(format!("train.clip = {}: expected 0 or more", train.clip)));
        }
        self.model.check()?;
        self.check_phases()
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
            let after = self.phase[..i].iter().any(|earlier| earlier.quantize);
            if after && !phase.quantize {
                return Err(Error::usage(format!(
                    "{}: a float phase cannot follow a quantized one",
                    key("quantize")
                )));
            }
        }
        if !self.phase.iter().any(|phase| phase.quantize) {
            return Err(Error::usage("phase: found none with quantize = true, expected at least one"));
        }
        Ok(())
    }
}

/// Sets `key.path=value` in a table: numbers index arrays, the value is TOML or else a string.
pub fn set(table: &mut toml::Table, assignment: &str) -> Result<()> {
    let bad = |what: &str| Error::usage(format!("--set {assignment}: {what}"));
    let (path, value) = assignment.split_once('=').ok_or_else(|| bad("expected key.path=value"))?;
    let value = format!("v = {value}").parse::<toml::Table>().ok().and_then(|mut t| t.remove("v"));
    let text = assignment.split_once('=').map(|(_, v)| v.to_string()).unwrap_or_default();
    put(table, path, value.unwrap_or(toml::Value::String(text))).map_err(|what| bad(&what))
}

/// Sets the value at a dotted path; tables on the way are made, array entries must exist.
pub fn put(table: &mut toml::Table, path: &str, value: toml::Value) -> Result<(), String> {
    let mut keys: Vec<&str> = path.trim().split('.').collect();
    let last = keys.pop().filter(|k| !k.is_empty()).ok_or("expected a key")?;
    let Some((first, rest)) = keys.split_first() else {
        table.insert(last.to_string(), value);
        return Ok(());
    };
    let empty = || toml::Value::Table(toml::Table::new());
    let mut at = table.entry(first.to_string()).or_insert_with(empty);
    for key in rest {
        at = match at {
            toml::Value::Table(t) => t.entry(key.to_string()).or_insert_with(empty),
            toml::Value::Array(a) => {
                let (index, len) = (key.parse::<usize>().ok(), a.len());
                index
                    .and_then(|i| a.get_mut(i))
                    .ok_or_else(|| format!("{key}: expected an index below {len}"))?
            }
            _ => return Err(format!("{key}: what is above it is neither a table nor an array")),
        };
    }
    match at {
        toml::Value::Table(t) => {
            t.insert(last.to_string(), value);
            Ok(())
        }
        toml::Value::Array(a) => {
            let (index, len) = (last.parse::<usize>().ok(), a.len());
            let slot = index.and_then(|i| a.get_mut(i));
            *slot.ok_or_else(|| format!("{last}: expected an index below {len}"))? = value;
            Ok(())
        }
        _ => Err(format!("{last}: what is above it is neither a table nor an array")),
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
