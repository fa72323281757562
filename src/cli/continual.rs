//! `qtune continual`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Args, ValueEnum};
use qtune::recipe::{put, set, Recipe};
use qtune::select::kappa::{Budget, KappaConfig};
use qtune::train::{signal, Progress};
use qtune::{continual, quantize, Error};
use toml::Value;

use super::flags::{anchored, Common};
use super::training::{count, name_of, path, recipe_of, Training};
use super::{bytes, memory, print, print_json, tasks};

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Method {
    /// The optimizer remembers past gradients and moves what they moved less
    Classp,
    /// Elastic weight consolidation
    Ewc,
    /// A few samples of earlier tasks in every batch
    Replay,
    /// From the second task on only the weights of the lowest condition numbers
    Kappatune,
    /// Binary weights whose posterior is the next task's prior
    Field,
    /// Nothing protects earlier tasks
    Finetune,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Heads {
    /// The same outputs for every task
    Shared,
    /// Outputs of its own for every task, an answer is one of all
    Class,
    /// Outputs of its own for every task, which is known
    Task,
}

#[derive(Args, Debug)]
pub struct Continual {
    /// Tasks in order: paths of images, or recipes whose data they are [default: two of built-in glyphs]
    #[arg(long, value_delimiter = ',', value_name = "TASK,..")]
    tasks: Vec<String>,
    /// What keeps earlier tasks [default: classp]
    #[arg(long, value_enum)]
    method: Option<Method>,
    /// Which outputs an answer is picked from [default: shared]
    #[arg(long, value_enum)]
    heads: Option<Heads>,
    /// Pretrained vision model: a folder, a run of ours or a hub name [default: a new one]
    #[arg(long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Evaluate on the last N training images of each task, which are not trained on, to choose settings
    #[arg(long, value_name = "N")]
    validation: Option<usize>,
    /// Factor on the penalty of ewc
    #[arg(long, value_name = "LAMBDA")]
    ewc_lambda: Option<f64>,
    /// Weights that kappatune trains from the second task on: tensors:N (or N), fraction:P of the matrices, share:P of
    /// the parameters (or P%), kappa:T [default: half of the matrices]
    #[arg(long, value_name = "BUDGET")]
    budget: Option<Budget>,
    /// Samples that replay keeps of each task
    #[arg(long, value_name = "N")]
    replay_samples: Option<usize>,
    #[command(flatten)]
    training: Training,
    #[command(flatten)]
    common: Common,
}

/// The recipe of a method, where none is named.
fn recipe_for(method: Method, built_in: bool) -> &'static str {
    match (method, built_in) {
        (Method::Field, true) => "continual-glyphs-field",
        (Method::Field, false) => "continual-field",
        (_, true) => "continual-glyphs",
        (_, false) => "continual",
    }
}

impl Continual {
    fn recipe(&self) -> Result<Recipe> {
        let built_in = self.tasks.is_empty();
        let method = self.method.unwrap_or(Method::Classp);
        let name = match &self.training.recipe {
            Some(name) => name.clone(),
            None => recipe_for(method, built_in).to_string(),
        };
        let mut table = Recipe::table(&name)?;
        if !self.tasks.is_empty() {
            let tasks = tasks::tables(&self.tasks)?;
            let continual = table.entry("continual").or_insert_with(|| Value::Table(toml::Table::new()));
            if let Some(continual) = continual.as_table_mut() {
                continual.insert("task".into(), Value::Array(tasks));
            }
        }
        let mut keys: Vec<(String, Value)> = Vec::new();
        let mut put_key = |key: &str, value: Option<Value>| keys.extend(value.map(|v| (key.to_string(), v)));
        if self.method.is_some() || table.get("continual").and_then(|c| c.get("method")).is_none() {
            put_key("continual.method", Some(Value::String(name_of(&method))));
        }
        put_key("continual.heads", self.heads.map(|h| Value::String(name_of(&h))));
        put_key("continual.validation", self.validation.map(count));
        put_key("continual.ewc.lambda", self.ewc_lambda.map(Value::Float));
        put_key("continual.replay.samples", self.replay_samples.map(count));
        put_key("model.path", self.model.as_deref().map(|p| path(&anchored(p))));
        put_key("model.allow_pickle", self.common.allow_pickle.then_some(Value::Boolean(true)));
        self.optimizer(&mut table, method);
        self.kappa(&mut table, method)?;
        let keys = keys.into_iter().chain(self.training.overrides("data")?).chain(self.common.products());
        for (key, value) in keys {
            put(&mut table, &key, value).map_err(|what| Error::usage(format!("{key}: {what}")))?;
        }
        tasks::limit(&mut table, self.training.limit_train, self.training.limit_eval);
        if let Some(phases) = table.get_mut("phase").and_then(Value::as_array_mut) {
            for phase in phases.iter_mut().filter_map(Value::as_table_mut) {
                self.training.put_phase(phase);
            }
        }
        for assignment in &self.training.set {
            set(&mut table, assignment)?;
        }
        let mut recipe = Recipe::resolve(table)?;
        continual::config(&recipe)?;
        let model = recipe.model.path_mut();
        let tasks =
            recipe.continual.iter_mut().flat_map(|c| &mut c.task).filter_map(|task| task.data.as_mut());
        let data = tasks.chain([&mut recipe.data]).flat_map(|data| [&mut data.path, &mut data.eval_path]);
        let state = &mut recipe.train.optimizer_state;
        for path in data.chain([model, state]).flatten() {
            *path = anchored(path);
        }
        Ok(recipe)
    }

    /// The budget of kappatune; another method has none.
    fn kappa(&self, table: &mut toml::Table, method: Method) -> Result<()> {
        let said = table.get("continual").and_then(|c| c.get("method")).and_then(Value::as_str);
        let kappatune = match self.method {
            Some(_) => method == Method::Kappatune,
            None => said == Some("kappatune"),
        };
        if !kappatune {
            match self.budget {
                Some(_) => {
                    return Err(Error::usage("--budget: only --method kappatune has one").into());
                }
                None => drop(table.remove("kappa")),
            }
            return Ok(());
        }
        let old = table.get("kappa").cloned();
        let budget = match (self.budget, &old) {
            (Some(budget), _) => budget,
            (None, None) => Budget::Fraction(0.5),
            (None, Some(_)) => return Ok(()),
        };
        let config = match old {
            Some(old) => old.try_into().map_err(|e| Error::usage(format!("kappa: {e}")))?,
            None => KappaConfig::default(),
        };
        let value =
            Value::try_from(config.with_budget(budget)).map_err(|e| Error::usage(format!("kappa: {e}")))?;
        table.insert("kappa".into(), value);
        Ok(())
    }

    /// `--method classp` brings its optimizer with it, another method plain gradient descent in its place.
    fn optimizer(&self, table: &mut toml::Table, method: Method) {
        let kind = table.get("optimizer").and_then(|o| o.get("kind")).and_then(Value::as_str);
        let classp = kind == Some("classp");
        let own = table.get("continual").and_then(|c| c.get("method")).and_then(Value::as_str);
        let changed = self.method.filter(|method| own != Some(name_of(method).as_str()));
        let other = match (self.training.optimizer, changed) {
            (None, Some(Method::Classp)) if !classp => Some("classp"),
            (None, Some(_)) if classp && method != Method::Classp => Some("sgd"),
            _ => None,
        };
        if let Some(kind) = other {
            let mut optimizer = toml::Table::new();
            optimizer.insert("kind".into(), Value::String(kind.into()));
            if kind == "sgd" {
                optimizer.insert("momentum".into(), Value::Float(0.0));
            }
            table.insert("optimizer".into(), Value::Table(optimizer));
        }
        self.training.replace_optimizer(table);
    }

    pub fn run(self) -> Result<()> {
        let progress = self.common.progress();
        let device = self.common.device()?;
        if let Some(dir) = &self.training.resume {
            let own = self.method.is_some()
                || !self.tasks.is_empty()
                || self.heads.is_some()
                || self.model.is_some()
                || self.validation.is_some()
                || self.ewc_lambda.is_some()
                || self.budget.is_some()
                || self.replay_samples.is_some();
            if self.training.changes() || own {
                let message =
                    "--resume: a run goes on with the recipe that it was begun with, leave other flags away";
                return Err(Error::usage(message).into());
            }
            let recipe = recipe_of(dir)?;
            if self.training.dry_run {
                return self.plan(&recipe, &device);
            }
            signal::watch()?;
            if let Some(summary) = quantize::finished(dir)? {
                progress.note(&format!("{}: this run is finished", dir.display()));
                return self.report(dir, Ok(summary));
            }
            return self.report(dir, continual::run(&recipe, dir, &device, &progress));
        }
        let recipe = self.recipe()?;
        if self.training.dry_run {
            return self.plan(&recipe, &device);
        }
        signal::watch()?;
        let dir = self.training.create(&recipe)?;
        progress.note(&format!("{}: recipe {}", dir.display(), recipe.name));
        self.report(&dir, continual::run(&recipe, &dir, &device, &progress))
    }

    /// What would be done, doing nothing.
    fn plan(&self, recipe: &Recipe, device: &candle_core::Device) -> Result<()> {
        let plan = continual::plan(recipe, device)?;
        if self.common.json {
            return print_json(&serde_json::json!({
                "recipe": recipe,
                "tasks": plan.tasks.iter().map(|t| serde_json::json!({
                    "name": t.name, "train": t.train, "eval": t.eval, "steps": t.steps,
                })).collect::<Vec<_>>(),
                "classes": plan.classes,
                "params_total": plan.params,
                "params_trainable": plan.params,
                "memory_bytes": plan.memory,
            "device_memory_bytes": plan.device_memory,
                "state_bytes": plan.state,
            }));
        }
        let mut text = recipe.to_toml()?;
        text.push('\n');
        for task in &plan.tasks {
            text += &format!(
                "task {}: {} images to train on, {} to evaluate on, {} steps\n",
                task.name, task.train, task.eval, task.steps
            );
        }
        text += &format!(
            "{} classes; {} parameters; memory about {}; kept between tasks {}",
            plan.classes.len(),
            plan.params,
            memory(plan.memory, plan.device_memory, device),
            bytes(plan.state)
        );
        print(&text)
    }

    fn report(&self, dir: &Path, summary: qtune::Result<serde_json::Value>) -> Result<()> {
        let summary = self.training.settle(dir, summary)?;
        if self.common.json {
            return print_json(&summary);
        }
        let list =
            |key: &str| summary.get(key).and_then(serde_json::Value::as_array).cloned().unwrap_or_default();
        let names: Vec<String> =
            list("tasks").iter().map(|t| t.as_str().unwrap_or_default().to_string()).collect();
        let width = names.iter().map(String::len).max().unwrap_or(0).max(8);
        let mut text = format!("{:w$}", "", w = width + 6);
        for name in &names {
            text += &format!("  {name:>width$}");
        }
        for (name, row) in names.iter().zip(list("accuracy")) {
            text += &format!("\nafter {name:width$}");
            for figure in row.as_array().into_iter().flatten() {
                text += &format!("  {:>width$.2}", figure.as_f64().unwrap_or(f64::NAN));
            }
        }
        let number = |key: &str| summary.get(key).and_then(serde_json::Value::as_f64);
        let shown = |key: &str| number(key).map_or("-".to_string(), |n| format!("{n:.2}"));
        text += &format!(
            "\naverage accuracy {} %   forgetting {}   kept between tasks {}",
            shown("average_accuracy"),
            shown("forgetting"),
            bytes(number("state_bytes").unwrap_or(0.0) as usize)
        );
        let output = summary.get("output").and_then(serde_json::Value::as_str).unwrap_or_default();
        print(&format!("{text}\n{output}"))
    }
}
