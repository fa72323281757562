//! `qtune finetune`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Args, ValueEnum};
use qtune::language;
use qtune::recipe::{put, set, Recipe};
use qtune::select::kappa::Budget;
use qtune::train::{signal, Progress};
use qtune::{quantize, Error};
use toml::Value;

use super::flags::{anchored, Common, Dtype};
use super::training::{count, name_of, path, recipe_of, Training};
use super::{bytes, memory, print, print_json};

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Method {
    /// Block affine: PEFT's "bat"
    Bone,
    /// Additive shared blocks
    Miss,
    /// Additive blocks shared along the outputs too
    Mini,
    /// Low rank
    Lora,
    /// Low rank, scaled by the root of the rank
    Rslora,
    /// Low rank in direction, with magnitudes of rows
    Dora,
    /// Low rank, started from the weight's principal part
    Pissa,
    /// The weights of the lowest condition numbers
    Kappatune,
    /// Every weight
    Full,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PeftType {
    Miss,
    Bone,
}

#[derive(Args, Debug)]
pub struct Finetune {
    /// What is trained [default: bone]
    #[arg(long, value_enum)]
    method: Option<Method>,
    /// Language model: a folder, a run of ours or a hub name [default: the one the program carries]
    #[arg(long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Text: JSON lines, Parquet, plain text, a folder of them [default: a built-in task]
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// Text to evaluate on, where it lies elsewhere
    #[arg(long, value_name = "PATH")]
    eval_data: Option<PathBuf>,
    /// A text that is not to be forgotten: its loss before and after
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Weights to train, or to adapt, by their condition numbers, lowest first: tensors:N (or N), fraction:P of the
    /// matrices, share:P of the parameters (or P%), kappa:T
    #[arg(long, value_name = "BUDGET")]
    budget: Option<Budget>,
    /// Rank of the adapter
    #[arg(long, value_name = "N")]
    rank: Option<usize>,
    /// LoRA's alpha
    #[arg(long)]
    alpha: Option<f64>,
    /// Dropout on the input of the adapter
    #[arg(long, value_name = "P")]
    dropout: Option<f64>,
    /// Modules to adapt: names separated by commas, a regular expression over whole paths, or all-linear
    #[arg(long, value_name = "MODULES")]
    targets: Option<String>,
    /// Format that blocks are written in
    #[arg(long, value_enum)]
    peft_type: Option<PeftType>,
    /// Write the exact LoRA form of additive blocks too
    #[arg(long)]
    as_lora: bool,
    /// Pack the frozen weights to so many bits
    #[arg(long, value_parser = ["2", "3", "4", "8"], value_name = "BITS")]
    base_bits: Option<String>,
    /// Tokens in a row
    #[arg(long, value_name = "N")]
    seq_len: Option<usize>,
    /// Put several samples into one row; they do not see each other
    #[arg(long)]
    pack: bool,
    /// Keep only the inputs of blocks and compute the rest again going backward
    #[arg(long)]
    checkpointing: bool,
    /// LoRA+: factor on the learning rate of B
    #[arg(long, value_name = "RATIO")]
    lora_plus: Option<f64>,
    #[command(flatten)]
    training: Training,
    #[command(flatten)]
    common: Common,
}

/// Names separated by commas become a list; what only a regular expression has stays one text.
fn modules(text: &str) -> Value {
    let pattern = text == "all-linear" || text.contains(['*', '\\', '(', '[', '|', '^', '$', '+', '?']);
    match pattern {
        true => Value::String(text.into()),
        false => text.split(',').map(|name| Value::String(name.trim().into())).collect::<Vec<_>>().into(),
    }
}

/// Puts a budget in place of the recipe's, whichever kind that has.
fn replace_budget(table: &mut toml::Table, budget: Budget) {
    let mut kappa = table.get("kappa").and_then(Value::as_table).cloned().unwrap_or_default();
    for key in ["tensors", "fraction", "share", "kappa_max", "selection"] {
        kappa.remove(key);
    }
    let (key, value) = match budget {
        Budget::Tensors(n) => ("tensors", count(n)),
        Budget::Fraction(p) => ("fraction", Value::Float(p)),
        Budget::Share(p) => ("share", Value::Float(p)),
        Budget::KappaMax(t) => ("kappa_max", Value::Float(t)),
    };
    if !matches!(budget, Budget::Share(_)) {
        // It is about shares alone.
        kappa.remove("fit");
    }
    kappa.insert(key.into(), value);
    table.insert("kappa".into(), Value::Table(kappa));
}

impl Finetune {
    fn overrides(&self) -> Result<Vec<(String, Value)>> {
        let mut keys: Vec<(String, Value)> = Vec::new();
        let mut put = |key: &str, value: Option<Value>| keys.extend(value.map(|v| (key.to_string(), v)));
        let yes = |flag: bool| flag.then_some(Value::Boolean(true));
        put("model.path", self.model.as_deref().map(path));
        put("text.path", self.data.as_deref().map(path));
        put("text.eval_path", self.eval_data.as_deref().map(path));
        put("text.control", self.control.as_deref().map(path));
        put("text.seq_len", self.seq_len.map(count));
        put("text.pack", yes(self.pack));
        put("adapter.rank", self.rank.map(count));
        put("adapter.alpha", self.alpha.map(Value::Float));
        put("adapter.dropout", self.dropout.map(Value::Float));
        put("adapter.targets", self.targets.as_deref().map(modules));
        put("adapter.peft_type", self.peft_type.map(|t| Value::String(name_of(&t))));
        put("adapter.as_lora", yes(self.as_lora));
        let bits = self.base_bits.as_ref().and_then(|b| b.parse().ok());
        put("base.bits", bits.map(Value::Integer));
        put("train.checkpointing", yes(self.checkpointing));
        put("train.lora_plus", self.lora_plus.map(Value::Float));
        let dtype = match self.common.dtype {
            Dtype::F32 => None,
            Dtype::Bf16 => Some("bf16"),
            Dtype::F16 => Some("f16"),
        };
        put("model.dtype", dtype.map(|d| Value::String(d.into())));
        keys.extend(self.training.overrides("text")?);
        keys.extend(self.common.products());
        Ok(keys)
    }

    fn recipe(&self) -> Result<Recipe> {
        // A method is the recipe of that name; without model and text the built-in ones.
        let method = self.method.map(|m| name_of(&m));
        let built_in = self.model.is_none() && self.data.is_none();
        let name = match (&self.training.recipe, &method, built_in) {
            (Some(name), _, _) => name.clone(),
            (None, _, true) => "sorting".into(),
            (None, Some(method), false) => method.clone(),
            (None, None, false) => "bone".into(),
        };
        let mut table = Recipe::table(&name)?;
        if let Some(method) = &method {
            let slot = table.get("adapter").and_then(Value::as_table).cloned();
            let other = slot.as_ref().and_then(|s| s.get("kind")).and_then(Value::as_str) != Some(method);
            if method == "full" {
                table.remove("adapter");
                table.remove("kappa");
            } else if method == "kappatune" {
                table.remove("adapter");
                let tenth = || toml::Table::from_iter([("share".to_string(), Value::Float(0.1))]);
                table.entry("kappa").or_insert_with(|| Value::Table(tenth()));
            } else if other {
                let mut slot = toml::Table::new();
                slot.insert("kind".into(), Value::String(method.clone()));
                table.insert("adapter".into(), Value::Table(slot));
            }
        }
        if let Some(budget) = self.budget {
            replace_budget(&mut table, budget);
        }
        self.training.replace_optimizer(&mut table);
        for (key, value) in self.overrides()? {
            if key.starts_with("adapter.") && !table.contains_key("adapter") {
                let flag = key.trim_start_matches("adapter.").replace('_', "-");
                let method = method.as_deref().unwrap_or("full");
                return Err(Error::usage(format!("--{flag}: --method {method} has no adapter")).into());
            }
            put(&mut table, &key, value).map_err(|what| Error::usage(format!("{key}: {what}")))?;
        }
        if let Some(Value::Array(phases)) = table.get_mut("phase") {
            phases
                .iter_mut()
                .filter_map(Value::as_table_mut)
                .for_each(|phase| self.training.put_phase(phase));
        }
        for assignment in &self.training.set {
            set(&mut table, assignment)?;
        }
        let mut recipe = Recipe::resolve(table)?;
        language::source(&recipe)?;
        if !recipe.adapts() {
            return Err(
                Error::usage(format!("recipe {name}: it quantizes, run it with qtune quantize")).into()
            );
        }
        let model = recipe.model.path_mut();
        let text =
            recipe.text.iter_mut().flat_map(|text| [&mut text.path, &mut text.eval_path, &mut text.control]);
        let chosen = recipe.kappa.iter_mut().map(|kappa| &mut kappa.selection);
        let state = &mut recipe.train.optimizer_state;
        for path in [model, state].into_iter().chain(text).chain(chosen).flatten() {
            *path = anchored(path);
        }
        Ok(recipe)
    }

    pub fn run(self) -> Result<()> {
        let progress = self.common.progress();
        let device = self.common.device_for_text()?;
        if let Some(dir) = &self.training.resume {
            let own = self.method.is_some() || self.budget.is_some();
            if !self.overrides()?.is_empty() || own || self.training.changes() {
                let message =
                    "--resume continues a run by its own recipe.toml: it goes with no flag that changes it";
                return Err(Error::usage(message).into());
            }
            let recipe = recipe_of(dir)?;
            if self.training.dry_run {
                return print_plan(&recipe, &device, self.common.json);
            }
            signal::watch()?;
            if let Some(summary) = quantize::finished(dir)? {
                progress.note(&format!("{}: this run is finished", dir.display()));
                return self.report(dir, Ok(summary));
            }
            return self.report(dir, language::run(&recipe, dir, &device, &progress));
        }
        let recipe = self.recipe()?;
        if self.training.dry_run {
            return print_plan(&recipe, &device, self.common.json);
        }
        signal::watch()?;
        let dir = self.training.create(&recipe)?;
        progress.note(&format!("{}: recipe {}", dir.display(), recipe.name));
        self.report(&dir, language::run(&recipe, &dir, &device, &progress))
    }

    fn report(&self, dir: &Path, summary: qtune::Result<serde_json::Value>) -> Result<()> {
        let summary = self.training.settle(dir, summary)?;
        if self.common.json {
            return print_json(&summary);
        }
        let number = |key: &str| summary.get(key).and_then(serde_json::Value::as_f64).unwrap_or(f64::NAN);
        let mut text = format!(
            "base     loss {:.4}   perplexity {:.3}\nadapted  loss {:.4}   perplexity {:.3}   {} of {} parameters trained",
            number("base_loss"),
            number("base_ppl"),
            number("final_loss"),
            number("final_ppl"),
            number("params_trainable"),
            number("params_total"),
        );
        for key in ["sample_before", "sample_after"] {
            if let Some(sample) = summary.get(key).and_then(serde_json::Value::as_str) {
                text += &format!("\n{}: {sample}", key.replace('_', " "));
            }
        }
        let size = summary.get("adapter_bytes").and_then(serde_json::Value::as_u64);
        let size = size.map(|n| format!(" ({})", bytes(n as usize))).unwrap_or_default();
        let output = summary.get("output").and_then(serde_json::Value::as_str).unwrap_or_default();
        print(&format!("{text}\n{output}{size}"))
    }
}

/// Prints what a run over text would do.
pub fn print_plan(recipe: &Recipe, device: &candle_core::Device, as_json: bool) -> Result<()> {
    let plan = language::plan::plan(recipe, device)?;
    if as_json {
        return print_json(&serde_json::json!({
            "recipe": recipe,
            "tensors": plan.tensors.iter().map(|(name, shape, what)| {
                serde_json::json!({"name": name, "shape": shape, "becomes": what})
            }).collect::<Vec<_>>(),
            "params_total": plan.params,
            "params_trainable": plan.trainable,
            "phases": plan.phases.iter().map(|(n, s)| serde_json::json!({"name": n, "steps": s})).collect::<Vec<_>>(),
            "memory_bytes": plan.memory,
        "device_memory_bytes": plan.device_memory,
            "notes": plan.notes,
        }));
    }
    let mut text = recipe.to_toml()?;
    text.push('\n');
    let width = plan.tensors.iter().map(|t| t.0.len()).max().unwrap_or(0);
    for (name, shape, what) in &plan.tensors {
        let shape = shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ");
        text += &format!("{name:width$}  {shape:>16}  {what}\n");
    }
    for note in &plan.notes {
        text += &format!("{note}\n");
    }
    for (name, steps) in &plan.phases {
        text += &format!("phase {name}: {steps} steps\n");
    }
    text += &format!(
        "{} parameters, {} trained; memory about {}",
        plan.params,
        plan.trainable,
        memory(plan.memory, plan.device_memory, device)
    );
    print(&text)
}
