//! Flags that all training commands share, and their run folders.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Args, ValueEnum};
use qtune::recipe::Recipe;
use qtune::{files, Error};
use toml::Value;

use super::flags::anchored;

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Schedule {
    Constant,
    Cosine,
    CosineEpochs,
    Linear,
    Wsd,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Optimizer {
    Adamw,
    Classp,
    Lion,
    Sgd,
}

#[derive(Args, Debug)]
pub struct Training {
    /// Recipe: the name of one that is compiled in, or a file (see qtune inspect --recipes)
    #[arg(long, value_name = "RECIPE")]
    pub recipe: Option<String>,
    /// Set any key of the recipe, e.g. phase.0.epochs=3
    #[arg(long, value_name = "KEY.PATH=VALUE")]
    pub set: Vec<String>,
    /// Run folder [default: runs/<recipe>-<n>]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Continue a run from its last checkpoint
    #[arg(long, value_name = "DIR")]
    pub resume: Option<PathBuf>,
    /// Seed of everything random
    #[arg(long)]
    pub seed: Option<u64>,
    /// Use the first N training samples
    #[arg(long, value_name = "N")]
    pub limit_train: Option<usize>,
    /// Use the first N evaluation samples
    #[arg(long, value_name = "N")]
    pub limit_eval: Option<usize>,
    /// Make what is skipped with a note an error
    #[arg(long)]
    pub strict: bool,
    /// Steps of training, and of quantize half as many of annealing; 0 packs without training
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Epochs of training, and of quantize half as many of annealing
    #[arg(long, value_name = "N", conflicts_with = "steps")]
    pub epochs: Option<f64>,
    /// Peak learning rate
    #[arg(long)]
    pub lr: Option<f64>,
    /// Samples (rows of text) in a forward pass
    #[arg(long, value_name = "N")]
    pub batch_size: Option<usize>,
    /// Forward passes in a step
    #[arg(long, value_name = "N")]
    pub accumulate: Option<usize>,
    /// Steps of warm-up
    #[arg(long, value_name = "STEPS")]
    pub warmup: Option<usize>,
    /// Learning rate after warm-up
    #[arg(long, value_enum)]
    pub schedule: Option<Schedule>,
    /// Update rule
    #[arg(long, value_enum)]
    pub optimizer: Option<Optimizer>,
    /// Folder of an earlier run, whose optimizer state classp goes on from
    #[arg(long, value_name = "DIR")]
    pub optimizer_state: Option<PathBuf>,
    /// Decoupled weight decay
    #[arg(long)]
    pub weight_decay: Option<f64>,
    /// Largest gradient norm; 0: no clipping
    #[arg(long)]
    pub clip: Option<f64>,
    /// Steps between checkpoints; 0: one an epoch
    #[arg(long, value_name = "N")]
    pub checkpoint_steps: Option<usize>,
    /// Steps between evaluations; 0: at the end of each phase
    #[arg(long, value_name = "N")]
    pub eval_steps: Option<usize>,
    /// Checkpoints to keep, the best one beside
    #[arg(long, value_name = "N")]
    pub keep: Option<usize>,
    /// Print the resolved recipe, what each tensor becomes and the memory estimate; write nothing
    #[arg(long)]
    pub dry_run: bool,
}

pub fn name_of(value: &impl ValueEnum) -> String {
    let name = value.to_possible_value().map(|v| v.get_name().to_string()).unwrap_or_default();
    name.replace('-', "_")
}

pub fn count(n: usize) -> Value {
    Value::Integer(n as i64)
}

pub fn path(path: &Path) -> Value {
    Value::String(path.display().to_string())
}

/// The recipe that a run folder was made with.
pub fn recipe_of(dir: &Path) -> Result<Recipe> {
    let path = dir.join("recipe.toml");
    let text = files::read_text(&path)?;
    let table = text.parse::<toml::Table>().map_err(|e| Error::input(&path, e.message().to_string()))?;
    Ok(Recipe::resolve(table)?)
}

impl Training {
    /// What the flags say, as paths and values of the recipe; `table` is that of the data.
    pub fn overrides(&self, table: &str) -> Result<Vec<(String, Value)>> {
        let mut keys: Vec<(String, Value)> = Vec::new();
        let mut put = |key: &str, value: Option<Value>| keys.extend(value.map(|v| (key.to_string(), v)));
        put("seed", self.seed.map(|s| Value::Integer(s as i64)));
        put(&format!("{table}.limit_train"), self.limit_train.map(count));
        put(&format!("{table}.limit_eval"), self.limit_eval.map(count));
        put(&format!("{table}.strict"), self.strict.then_some(Value::Boolean(true)));
        put("train.batch_size", self.batch_size.map(count));
        put("train.accumulate", self.accumulate.map(count));
        put("train.clip", self.clip.map(Value::Float));
        put("train.checkpoint_steps", self.checkpoint_steps.map(count));
        put("train.eval_steps", self.eval_steps.map(count));
        put("train.keep", self.keep.map(count));
        let anchored = self.optimizer_state.as_deref().map(anchored);
        put("train.optimizer_state", anchored.as_deref().map(path));
        put("optimizer.weight_decay", self.weight_decay.map(Value::Float));
        if self.seed.is_some_and(|s| s > i64::MAX as u64) {
            return Err(Error::usage(format!("--seed: expected at most {}", i64::MAX)).into());
        }
        Ok(keys)
    }

    /// What the flags say of the phases.
    pub fn phase_overrides(&self) -> Vec<(&'static str, Value)> {
        let mut keys = Vec::new();
        keys.extend(self.steps.map(|n| ("steps", count(n))));
        keys.extend(self.epochs.map(|n| ("epochs", Value::Float(n))));
        keys.extend(self.lr.map(|lr| ("lr", Value::Float(lr))));
        keys.extend(self.warmup.map(|n| ("warmup", count(n))));
        keys.extend(self.schedule.map(|s| ("schedule", Value::String(name_of(&s)))));
        keys
    }

    /// Puts what the flags say of phases into one of them. A length of its own takes away what the recipe
    /// said of it.
    pub fn put_phase(&self, phase: &mut toml::Table) {
        for (key, value) in self.phase_overrides() {
            match key {
                "epochs" => drop((phase.remove("steps"), phase.remove("cosine_span"))),
                "steps" => drop(phase.remove("cosine_span")),
                "warmup" => drop(phase.remove("warmup_epochs")),
                _ => {}
            }
            phase.insert(key.into(), value);
        }
    }

    /// Another update rule has other settings; decay means the same for all.
    pub fn replace_optimizer(&self, table: &mut toml::Table) {
        let Some(kind) = self.optimizer else { return };
        let old = table.get("optimizer").and_then(Value::as_table).cloned().unwrap_or_default();
        let kind = Value::String(name_of(&kind));
        if old.get("kind") != Some(&kind) {
            let shared = ["weight_decay", "no_decay"];
            let mut optimizer: toml::Table =
                old.into_iter().filter(|(key, _)| shared.contains(&key.as_str())).collect();
            optimizer.insert("kind".into(), kind);
            table.insert("optimizer".into(), Value::Table(optimizer));
        }
    }

    /// Whether any flag changes the recipe.
    pub fn changes(&self) -> bool {
        let keys = self.overrides("data").map_or(true, |keys| !keys.is_empty());
        keys || !self.phase_overrides().is_empty()
            || !self.set.is_empty()
            || self.recipe.is_some()
            || self.optimizer.is_some()
            || self.out.is_some()
    }

    /// Makes the run folder, whole or not at all.
    pub fn create(&self, recipe: &Recipe) -> Result<PathBuf> {
        let dir = match &self.out {
            Some(dir) => dir.clone(),
            None => (1..)
                .map(|n| PathBuf::from(format!("runs/{}-{n}", recipe.name)))
                .find(|dir| !dir.exists())
                .unwrap_or_default(),
        };
        if dir.exists() {
            let message = format!(
                "--out {}: it exists; name another folder, or continue it with --resume {}",
                dir.display(),
                dir.display()
            );
            return Err(Error::usage(message).into());
        }
        if let Some(parent) = dir.parent().filter(|p| !p.as_os_str().is_empty()) {
            std::fs::create_dir_all(parent).map_err(|e| Error::io(parent, e))?;
            files::sweep(parent)?;
        }
        let staging = files::Staging::new(&dir)?;
        files::write_bytes(&staging.path().join("recipe.toml"), recipe.to_toml()?.as_bytes())?;
        staging.commit()?;
        Ok(dir)
    }

    /// A run's summary, or its error: then a run that failed before its first checkpoint leaves nothing.
    pub fn settle(&self, dir: &Path, summary: qtune::Result<serde_json::Value>) -> Result<serde_json::Value> {
        let error = match summary {
            Ok(summary) => return Ok(summary),
            Err(error) => error,
        };
        let stopped = matches!(error, Error::Stopped { .. });
        if !stopped && !dir.join("checkpoints").exists() && self.resume.is_none() {
            // What went wrong is the news, not that cleaning up did too.
            let _ = files::discard(dir);
            if self.out.is_none() {
                // `runs`, where this was its only run; one that is not empty stays.
                let _ = dir.parent().map(std::fs::remove_dir);
            }
        }
        Err(error.into())
    }
}
