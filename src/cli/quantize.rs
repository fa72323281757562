//! `qtune quantize`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Args, ValueEnum};
use qtune::quantize;
use qtune::recipe::{put, set, Recipe};
use qtune::train::{signal, Progress};
use qtune::{files, Error};
use toml::Value;

use super::flags::{anchored, Common};
use super::{bytes, print, print_json};

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

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Schedule {
    Constant,
    Cosine,
    CosineEpochs,
    Linear,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Optimizer {
    Adamw,
    Sgd,
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
    /// Images: an IDX pair, CIFAR-10, an image folder or archive [default: built-in glyphs]
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// Images to evaluate on, where they lie elsewhere
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
    /// Recipe: a name (glyphs, vit-w2a32, vit-w2a2, vit-w4a4, deit-tiny-w2a2, deit-tiny-w3a3, deit-tiny-w4a4,
    /// deit-small-w2a2, deit-small-w3a3, deit-small-w4a4, swin-tiny-w2a2,
    /// swin-tiny-w3a3, swin-tiny-w4a4) or a file
    #[arg(long, value_name = "RECIPE")]
    recipe: Option<String>,
    /// Set any key of the recipe, e.g. phase.0.epochs=3
    #[arg(long, value_name = "KEY.PATH=VALUE")]
    set: Vec<String>,
    /// Run folder [default: runs/<recipe>-<n>]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Continue a run from its last checkpoint
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,
    /// Seed of everything random
    #[arg(long)]
    seed: Option<u64>,
    /// Use the first N training samples
    #[arg(long, value_name = "N")]
    limit_train: Option<usize>,
    /// Use the first N evaluation samples
    #[arg(long, value_name = "N")]
    limit_eval: Option<usize>,
    /// Make what is skipped with a note an error
    #[arg(long)]
    strict: bool,
    /// Steps of quantized training, and half as many of annealing; 0 packs without training
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Epochs of quantized training, and half as many of annealing
    #[arg(long, value_name = "N", conflicts_with = "steps")]
    epochs: Option<f64>,
    /// Peak learning rate of quantized training
    #[arg(long)]
    lr: Option<f64>,
    /// Samples in a forward pass
    #[arg(long, value_name = "N")]
    batch_size: Option<usize>,
    /// Forward passes in a step
    #[arg(long, value_name = "N")]
    accumulate: Option<usize>,
    /// Steps of warm-up of quantized training
    #[arg(long, value_name = "STEPS")]
    warmup: Option<usize>,
    /// Learning rate after warm-up
    #[arg(long, value_enum)]
    schedule: Option<Schedule>,
    /// Update rule
    #[arg(long, value_enum)]
    optimizer: Option<Optimizer>,
    /// Decoupled weight decay
    #[arg(long)]
    weight_decay: Option<f64>,
    /// Largest gradient norm; 0: no clipping
    #[arg(long)]
    clip: Option<f64>,
    /// Steps between checkpoints; 0: one an epoch
    #[arg(long, value_name = "N")]
    checkpoint_steps: Option<usize>,
    /// Steps between evaluations; 0: at the end of each phase
    #[arg(long, value_name = "N")]
    eval_steps: Option<usize>,
    /// Checkpoints to keep, the best one beside
    #[arg(long, value_name = "N")]
    keep: Option<usize>,
    /// Print the resolved recipe, what each tensor becomes and the memory estimate; write nothing
    #[arg(long)]
    dry_run: bool,
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

fn name_of(value: &impl ValueEnum) -> String {
    let name = value.to_possible_value().map(|v| v.get_name().to_string()).unwrap_or_default();
    name.replace('-', "_")
}

fn count(n: usize) -> Value {
    Value::Integer(n as i64)
}

fn path(path: &Path) -> Value {
    Value::String(path.display().to_string())
}

impl Quantize {
    /// What the flags say, as paths and values of the recipe.
    fn overrides(&self) -> Result<Vec<(String, Value)>> {
        let mut keys: Vec<(String, Value)> = Vec::new();
        let mut put = |key: &str, value: Option<Value>| keys.extend(value.map(|v| (key.to_string(), v)));
        let bits = |bits: &Option<String>| bits.as_ref().and_then(|b| b.parse().ok()).map(Value::Integer);
        put("seed", self.seed.map(|s| Value::Integer(s as i64)));
        put("transform.0.bits", bits(&self.bits));
        put("transform.0.kind", self.weight_quant.map(|k| Value::String(name_of(&k))));
        put("activation.bits", bits(&self.act_bits));
        put("model.path", self.model.as_deref().map(path));
        // A run that is continued has it in its recipe.
        let pickle = self.common.allow_pickle && self.resume.is_none();
        put("model.allow_pickle", pickle.then_some(Value::Boolean(true)));
        put("data.path", self.data.as_deref().map(path));
        put("data.eval_path", self.eval_data.as_deref().map(path));
        put("data.limit_train", self.limit_train.map(count));
        put("data.limit_eval", self.limit_eval.map(count));
        put("data.strict", self.strict.then_some(Value::Boolean(true)));
        put("distill.kind", self.kd.map(|k| Value::String(name_of(&k))));
        put("distill.teacher", self.teacher.as_deref().map(path));
        put("train.batch_size", self.batch_size.map(count));
        put("train.accumulate", self.accumulate.map(count));
        put("train.clip", self.clip.map(Value::Float));
        put("train.checkpoint_steps", self.checkpoint_steps.map(count));
        put("train.eval_steps", self.eval_steps.map(count));
        put("train.keep", self.keep.map(count));
        put("optimizer.weight_decay", self.weight_decay.map(Value::Float));
        if self.seed.is_some_and(|s| s > i64::MAX as u64) {
            return Err(Error::usage(format!("--seed: expected at most {}", i64::MAX)).into());
        }
        Ok(keys)
    }

    /// What the flags say of the phases that train with quantizers in place.
    fn phase_overrides(&self) -> Vec<(&'static str, Value)> {
        let mut keys = Vec::new();
        keys.extend(self.steps.map(|n| ("steps", count(n))));
        keys.extend(self.epochs.map(|n| ("epochs", Value::Float(n))));
        keys.extend(self.lr.map(|lr| ("lr", Value::Float(lr))));
        keys.extend(self.warmup.map(|n| ("warmup", count(n))));
        keys.extend(self.schedule.map(|s| ("schedule", Value::String(name_of(&s)))));
        keys
    }

    fn recipe(&self) -> Result<Recipe> {
        let own = self.model.is_some() || self.data.is_some();
        let name = self.recipe.as_deref().unwrap_or(match (own, self.act_bits.as_deref()) {
            (false, _) => "glyphs",
            (true, None | Some("32")) => "vit-w2a32",
            (true, Some("4" | "8")) => "vit-w4a4",
            (true, Some(_)) => "vit-w2a2",
        });
        let mut table = Recipe::table(name)?;
        if let Some(kind) = self.optimizer {
            // Another rule has other settings; decay means the same for all.
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
        for (key, value) in self.overrides()? {
            put(&mut table, &key, value).map_err(|what| Error::usage(format!("{key}: {what}")))?;
        }
        if let Some(Value::Array(phases)) = table.get_mut("phase") {
            for phase in phases.iter_mut().filter_map(Value::as_table_mut) {
                let trains = phase.get("quantize") == Some(&Value::Boolean(true));
                if trains && phase.contains_key("calm") {
                    // Annealing follows the length that the flags give, half as long.
                    if let Some(steps) = self.steps {
                        phase.insert("steps".into(), count(steps.div_ceil(2)));
                    } else if let Some(epochs) = self.epochs {
                        phase.remove("steps");
                        phase.insert("epochs".into(), Value::Float(epochs / 2.0));
                    }
                }
                if trains && !phase.contains_key("calm") {
                    for (key, value) in self.phase_overrides() {
                        // A length of its own: what the recipe said of it does not fit any more.
                        match key {
                            "epochs" => drop((phase.remove("steps"), phase.remove("cosine_span"))),
                            "steps" => drop(phase.remove("cosine_span")),
                            "warmup" => drop(phase.remove("warmup_epochs")),
                            _ => {}
                        }
                        phase.insert(key.into(), value);
                    }
                }
            }
        }
        if self.qkr && !table.contains_key("qkr") {
            table.insert("qkr".into(), Value::Table(toml::Table::new()));
        }
        // Annealing depends on whether there are products.
        for assignment in self.set.iter().filter(|s| s.starts_with("qkr")) {
            set(&mut table, assignment)?;
        }
        if let Some(cga) = self.cga {
            anneal(&mut table, cga);
        }
        for assignment in &self.set {
            set(&mut table, assignment)?;
        }
        if table.contains_key("ablation") {
            return Err(
                Error::usage(format!("recipe {name}: it is an ablation, run it with qtune ablate")).into()
            );
        }
        let mut recipe = Recipe::resolve(table)?;
        if let Some(select) = &mut recipe.select {
            select.pin()?;
        }
        let model = recipe.model.path_mut();
        let paths = [&mut recipe.data.path, &mut recipe.data.eval_path, &mut recipe.distill.teacher, model];
        for path in paths.into_iter().flatten() {
            *path = anchored(path);
        }
        Ok(recipe)
    }

    pub fn run(self) -> Result<()> {
        let progress = self.common.progress();
        let device = self.common.device()?;
        if let Some(dir) = &self.resume {
            return self.resume(dir, &device, &progress);
        }
        let recipe = self.recipe()?;
        if self.dry_run {
            return self.plan(&recipe, &device);
        }
        signal::watch()?;
        let dir = self.create(&recipe)?;
        let bits = recipe.transform.first().map(|t| t.bits).unwrap_or(32);
        let (dir_name, act_bits) = (dir.display(), recipe.activation.bits);
        progress.note(&format!(
            "{dir_name}: recipe {}, weights {bits} bits, activations {act_bits}",
            recipe.name
        ));
        let summary = quantize::run(&recipe, &dir, &device, &progress);
        self.report(&dir, summary)
    }

    fn resume(&self, dir: &Path, device: &candle_core::Device, progress: &dyn Progress) -> Result<()> {
        let changed = !self.overrides()?.is_empty()
            || !self.phase_overrides().is_empty()
            || !self.set.is_empty()
            || self.recipe.is_some()
            || self.optimizer.is_some()
            || self.qkr
            || self.cga.is_some()
            || self.out.is_some();
        if changed {
            let message =
                "--resume continues a run by its own recipe.toml: it goes with no flag that changes it";
            return Err(Error::usage(message).into());
        }
        let path = dir.join("recipe.toml");
        let text = files::read_text(&path)?;
        let table = text.parse::<toml::Table>().map_err(|e| Error::input(&path, e.message().to_string()))?;
        let recipe = Recipe::resolve(table)?;
        if self.dry_run {
            return self.plan(&recipe, device);
        }
        signal::watch()?;
        if let Some(summary) = quantize::finished(dir)? {
            progress.note(&format!("{}: this run is finished", dir.display()));
            return self.report(dir, Ok(summary));
        }
        self.report(dir, quantize::run(&recipe, dir, device, progress))
    }

    /// Makes the run folder, whole or not at all.
    fn create(&self, recipe: &Recipe) -> Result<PathBuf> {
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

    fn report(&self, dir: &Path, summary: qtune::Result<serde_json::Value>) -> Result<()> {
        let summary = match summary {
            Ok(summary) => summary,
            Err(error) => {
                // A run that failed before its first checkpoint leaves nothing worth keeping.
                let stopped = matches!(error, Error::Stopped { .. });
                if !stopped && !dir.join("checkpoints").exists() && self.resume.is_none() {
                    // What went wrong is the news, not that cleaning up did too.
                    let _ = files::discard(dir);
                    if self.out.is_none() {
                        // `runs`, where this was its only run; one that is not empty stays.
                        let _ = dir.parent().map(std::fs::remove_dir);
                    }
                }
                return Err(error.into());
            }
        };
        if self.common.json {
            return print_json(&summary);
        }
        let number = |key: &str| summary.get(key).and_then(serde_json::Value::as_f64);
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

    fn plan(&self, recipe: &Recipe, device: &candle_core::Device) -> Result<()> {
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
            bytes(plan.memory)
        );
        print(&text)
    }
}
