//! `qtune quantize`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Args, ValueEnum};
use qtune::models::llama_config::is_language_model;
use qtune::models::{model_dir, read_config};
use qtune::recipe::{put, set, ModelConfig, Recipe};
use qtune::train::{signal, Progress};
use qtune::{hub, language, quantize, Error};
use toml::Value;

use super::flags::{anchored, Common};
use super::training::{count, name_of, path, recipe_of, Training};
use super::{bytes, memory, print, print_json};

#[derive(Clone, Copy, Debug, ValueEnum)]
enum WeightQuant {
    Statsq,
    Lsq,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kd {
    Soft,
    Pld,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Cga {
    Reference,
    Paper,
    Off,
}

#[derive(Args, Debug)]
pub struct Quantize {
    /// Bits per weight inside the blocks
    #[arg(long, value_parser = ["2", "3", "4", "8"], value_name = "BITS")]
    bits: Option<String>,
    /// Bits per activation inside the blocks; 32 leaves all activations float
    #[arg(long, value_parser = ["2", "3", "4", "8", "32"], value_name = "BITS")]
    act_bits: Option<String>,
    /// How the blocks' weights are quantized
    #[arg(long, value_enum)]
    weight_quant: Option<WeightQuant>,
    /// Pretrained model: a folder, a file, a run of ours or a hub name [default: a new one]
    #[arg(long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Images: an IDX pair, CIFAR-10, an image folder or archive [default: built-in glyphs]; for a language model
    /// text: JSON lines, Parquet, plain text
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// Columns of a row that share a step, for a language model
    #[arg(long, value_name = "N")]
    group_size: Option<usize>,
    /// Tokens in a row of text, for a language model
    #[arg(long, value_name = "N")]
    seq_len: Option<usize>,
    /// Images or text to evaluate on, where they lie elsewhere
    #[arg(long, value_name = "PATH")]
    eval_data: Option<PathBuf>,
    /// Quantize the product of query and key in place of both (query-key reparameterization)
    #[arg(long)]
    qkr: bool,
    /// Anneal at the end: only weights near a threshold move. paper: the product of query and key too
    #[arg(long, value_enum)]
    cga: Option<Cga>,
    /// What the student learns from a full-precision teacher
    #[arg(long, value_enum)]
    kd: Option<Kd>,
    /// Teacher model [default: the model at the start of quantization]
    #[arg(long, value_name = "MODEL")]
    teacher: Option<PathBuf>,
    #[command(flatten)]
    training: Training,
    #[command(flatten)]
    common: Common,
}

/// What `--cga` makes of a recipe's phases: those that anneal follow it; where there is none, one is
/// added after the last, half as long, at its final rate, or a hundredth of its peak where that is 0.
fn anneal(table: &mut toml::Table, cga: Cga) {
    let product = table.contains_key("qkr");
    let Some(Value::Array(phases)) = table.get_mut("phase") else { return };
    if cga == Cga::Off {
        phases.retain(|phase| phase.get("calm").is_none());
        return;
    }
    if !phases.iter().any(|phase| phase.get("calm").is_some()) {
        let Some(last) = phases.last().and_then(Value::as_table) else { return };
        let mut phase = toml::Table::new();
        let number =
            |key: &str| last.get(key).and_then(|v| v.as_float().or(v.as_integer().map(|n| n as f64)));
        phase.insert("name".into(), Value::String("annealed".into()));
        phase.insert("quantize".into(), Value::Boolean(true));
        if let Some(steps) = last.get("steps").and_then(Value::as_integer) {
            phase.insert("steps".into(), Value::Integer((steps + 1) / 2));
        } else {
            phase.insert("epochs".into(), Value::Float(number("epochs").unwrap_or(0.0) / 2.0));
        }
        let lr = number("lr").unwrap_or(1e-3);
        let floor = number("min_lr").filter(|lr| *lr > 0.0).unwrap_or(lr / 100.0);
        phase.insert("lr".into(), Value::Float(floor));
        phase.insert("schedule".into(), Value::String("constant".into()));
        phase.insert("calm".into(), Value::Float(0.005));
        phases.push(Value::Table(phase));
    }
    let mask = if cga == Cga::Paper && product { "mask_grad" } else { "off" };
    for phase in phases.iter_mut().filter_map(Value::as_table_mut).filter(|p| p.contains_key("calm")) {
        phase.insert("calm_qk".into(), Value::String(mask.into()));
    }
}

/// Runs the road of the recipe's model.
fn run_recipe(
    recipe: &Recipe,
    dir: &Path,
    device: &candle_core::Device,
    progress: &dyn Progress,
) -> qtune::Result<serde_json::Value> {
    match recipe.model {
        ModelConfig::Llama(_) => language::run(recipe, dir, device, progress),
        _ => quantize::run(recipe, dir, device, progress),
    }
}

impl Quantize {
    /// What the flags say, as paths and values of the recipe.
    fn overrides(&self) -> Result<Vec<(String, Value)>> {
        let mut keys: Vec<(String, Value)> = Vec::new();
        let mut put = |key: &str, value: Option<Value>| keys.extend(value.map(|v| (key.to_string(), v)));
        let bits = |bits: &Option<String>| bits.as_ref().and_then(|b| b.parse().ok()).map(Value::Integer);
        put("transform.0.bits", bits(&self.bits));
        put("transform.0.kind", self.weight_quant.map(|k| Value::String(name_of(&k))));
        put("activation.bits", bits(&self.act_bits));
        put("transform.0.group", self.group_size.map(count));
        put("model.path", self.model.as_deref().map(path));
        // A run that is continued has it in its recipe.
        let pickle = self.common.allow_pickle && self.training.resume.is_none();
        put("model.allow_pickle", pickle.then_some(Value::Boolean(true)));
        let table = if self.is_text() { "text" } else { "data" };
        put(&format!("{table}.path"), self.data.as_deref().map(path));
        put(&format!("{table}.eval_path"), self.eval_data.as_deref().map(path));
        put(&format!("{table}.seq_len"), self.seq_len.map(count));
        keys.extend(self.training.overrides(table)?);
        keys.extend(self.common.products());
        let mut put = |key: &str, value: Option<Value>| keys.extend(value.map(|v| (key.to_string(), v)));
        put("distill.kind", self.kd.map(|k| Value::String(name_of(&k))));
        put("distill.teacher", self.teacher.as_deref().map(path));
        Ok(keys)
    }

    /// Whether it is a language model that is quantized: by its recipe, or by the model's own configuration.
    fn is_text(&self) -> bool {
        if let Some(name) = &self.training.recipe {
            let kind = Recipe::table(name).ok().and_then(|t| t.get("model")?.get("kind").cloned());
            return kind.is_some_and(|kind| kind.as_str() == Some("llama"));
        }
        let dir = self.model.as_ref().and_then(|m| hub::resolve(&m.to_string_lossy()).ok());
        let config = dir.and_then(|dir| read_config(&model_dir(&dir)).ok());
        config.is_some_and(|(_, json)| is_language_model(&json))
    }

    fn recipe(&self) -> Result<Recipe> {
        let own = self.model.is_some() || self.data.is_some();
        let text = self.is_text();
        let name = self.training.recipe.as_deref().unwrap_or(match (own, self.act_bits.as_deref()) {
            _ if text => "llama-w2",
            (false, _) => "glyphs",
            (true, None | Some("32")) => "vit-w2a32",
            (true, Some("4" | "8")) => "vit-w4a4",
            (true, Some(_)) => "vit-w2a2",
        });
        let mut table = Recipe::table(name)?;
        self.training.replace_optimizer(&mut table);
        for (key, value) in self.overrides()? {
            put(&mut table, &key, value).map_err(|what| Error::usage(format!("{key}: {what}")))?;
        }
        if let Some(Value::Array(phases)) = table.get_mut("phase") {
            for phase in phases.iter_mut().filter_map(Value::as_table_mut) {
                let trains = phase.get("quantize") == Some(&Value::Boolean(true));
                if trains && phase.contains_key("calm") {
                    // Annealing follows the length that the flags give, half as long.
                    if let Some(steps) = self.training.steps {
                        phase.insert("steps".into(), count(steps.div_ceil(2)));
                    } else if let Some(epochs) = self.training.epochs {
                        phase.remove("steps");
                        phase.insert("epochs".into(), Value::Float(epochs / 2.0));
                    }
                }
                if trains && !phase.contains_key("calm") {
                    self.training.put_phase(phase);
                }
            }
        }
        if self.qkr && !table.contains_key("qkr") {
            table.insert("qkr".into(), Value::Table(toml::Table::new()));
        }
        // Annealing depends on whether there are products.
        for assignment in self.training.set.iter().filter(|s| s.starts_with("qkr")) {
            set(&mut table, assignment)?;
        }
        if let Some(cga) = self.cga {
            anneal(&mut table, cga);
        }
        for assignment in &self.training.set {
            set(&mut table, assignment)?;
        }
        if table.contains_key("ablation") {
            return Err(
                Error::usage(format!("recipe {name}: it is an ablation, run it with qtune ablate")).into()
            );
        }
        let mut recipe = Recipe::resolve(table)?;
        if recipe.continual.is_some() {
            let message = format!(
                "recipe {name}: its tasks are learned one after another, run it with qtune continual"
            );
            return Err(Error::usage(message).into());
        }
        if let Some(select) = &mut recipe.select {
            select.pin()?;
        }
        let model = recipe.model.path_mut();
        let paths = [&mut recipe.data.path, &mut recipe.data.eval_path, &mut recipe.distill.teacher, model];
        let text = recipe.text.iter_mut().flat_map(|text| [&mut text.path, &mut text.eval_path]);
        for path in paths.into_iter().chain(text).flatten() {
            *path = anchored(path);
        }
        Ok(recipe)
    }

    pub fn run(self) -> Result<()> {
        let progress = self.common.progress();
        let device = self.common.device()?;
        if let Some(dir) = &self.training.resume {
            return self.resume(dir, &device, &progress);
        }
        let recipe = self.recipe()?;
        if self.training.dry_run {
            return self.plan(&recipe, &device);
        }
        signal::watch()?;
        let dir = self.training.create(&recipe)?;
        let bits = recipe.transform.first().map(|t| t.bits).unwrap_or(32);
        let (dir_name, act_bits) = (dir.display(), recipe.activation.bits);
        progress.note(&format!(
            "{dir_name}: recipe {}, weights {bits} bits, activations {act_bits}",
            recipe.name
        ));
        let summary = run_recipe(&recipe, &dir, &device, &progress);
        self.report(&dir, summary)
    }

    fn resume(&self, dir: &Path, device: &candle_core::Device, progress: &dyn Progress) -> Result<()> {
        let changed =
            !self.overrides()?.is_empty() || self.training.changes() || self.qkr || self.cga.is_some();
        if changed {
            let message =
                "--resume continues a run by its own recipe.toml: it goes with no flag that changes it";
            return Err(Error::usage(message).into());
        }
        let recipe = recipe_of(dir)?;
        if self.training.dry_run {
            return self.plan(&recipe, device);
        }
        signal::watch()?;
        if let Some(summary) = quantize::finished(dir)? {
            progress.note(&format!("{}: this run is finished", dir.display()));
            return self.report(dir, Ok(summary));
        }
        self.report(dir, run_recipe(&recipe, dir, device, progress))
    }

    fn report(&self, dir: &Path, summary: qtune::Result<serde_json::Value>) -> Result<()> {
        let summary = self.training.settle(dir, summary)?;
        if self.common.json {
            return print_json(&summary);
        }
        let number = |key: &str| summary.get(key).and_then(serde_json::Value::as_f64);
        if summary.get("fp_loss").is_some() {
            return self.report_text(dir, &number);
        }
        let percent = |key: &str| number(key).map(|v| format!("{v:.2} %")).unwrap_or("not measured".into());
        let size = |key: &str| bytes(number(key).unwrap_or(0.0) as usize);
        print(&format!(
            "full precision  top-1 {:>12}   {:>10}\npacked          top-1 {:>12}   {:>10}   {:.1} times smaller\nmodel: {}",
            percent("fp_top1"),
            size("fp_bytes"),
            percent("q_top1"),
            size("packed_bytes"),
            number("compression").unwrap_or(0.0),
            dir.join("model").display()
        ))
    }

    fn report_text(&self, dir: &Path, number: &dyn Fn(&str) -> Option<f64>) -> Result<()> {
        let loss = |key: &str| number(key).map(|v| format!("{v:.4}")).unwrap_or("not measured".into());
        let size = |key: &str| bytes(number(key).unwrap_or(0.0) as usize);
        print(&format!(
            "full precision  loss {:>12}   {:>10}\npacked          loss {:>12}   {:>10}   {:.1} times smaller\nmodel: {}",
            loss("fp_loss"),
            size("fp_bytes"),
            loss("q_loss"),
            size("packed_bytes"),
            number("compression").unwrap_or(0.0),
            dir.join("model").display()
        ))
    }

    fn plan(&self, recipe: &Recipe, device: &candle_core::Device) -> Result<()> {
        if matches!(recipe.model, ModelConfig::Llama(_)) {
            return super::finetune::print_plan(recipe, device, self.common.json);
        }
        let plan = quantize::plan(recipe, device)?;
        if self.common.json {
            let tensors: Vec<_> = plan
                .tensors
                .iter()
                .map(|(name, shape, what, bytes)| {
                    serde_json::json!({"name": name, "shape": shape, "becomes": what, "packed_bytes": bytes})
                })
                .collect();
            return print_json(&serde_json::json!({
                "recipe": recipe,
                "tensors": tensors,
                "params_total": plan.params,
                "phases": plan.phases.iter().map(|(n, s)| serde_json::json!({"name": n, "steps": s})).collect::<Vec<_>>(),
                "memory_bytes": plan.memory,
            "device_memory_bytes": plan.device_memory,
                "notes": plan.notes,
            }));
        }
        let mut text = recipe.to_toml()?;
        text.push('\n');
        let width = plan.tensors.iter().map(|t| t.0.len()).max().unwrap_or(0);
        let mut packed = 0;
        for (name, shape, what, size) in &plan.tensors {
            let shape = shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ");
            text += &format!("{name:width$}  {shape:>16}  {what:<14} {:>10}\n", bytes(*size));
            packed += size;
        }
        for note in &plan.notes {
            text += &format!("{note}\n");
        }
        for (name, steps) in &plan.phases {
            text += &format!("phase {name}: {steps} steps\n");
        }
        text += &format!(
            "{} parameters, {} packed; memory about {}",
            plan.params,
            bytes(packed),
            memory(plan.memory, plan.device_memory, device)
        );
        print(&text)
    }
}
