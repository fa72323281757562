//! `qtune ablate`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use qtune::ablation;
use qtune::recipe::{put, set, Recipe};
use qtune::train::{signal, Progress};
use qtune::Error;
use toml::Value;

use super::flags::{anchored, Common};
use super::{print, print_json, tasks};

#[derive(Args, Debug)]
pub struct Ablate {
    /// Recipe with an [ablation] table: a name (ablation-ofq) or a file
    #[arg(long, value_name = "RECIPE", default_value = "ablation-ofq")]
    recipe: String,
    /// Pretrained model to start every run from [default: a new one]
    #[arg(long, value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Images [default: built-in glyphs], or text
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// A text that is not to be forgotten, for a sweep over adapted language models
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Images or text to evaluate on, where they lie elsewhere
    #[arg(long, value_name = "PATH")]
    eval_data: Option<PathBuf>,
    /// Widths to run [default: those of the recipe]
    #[arg(long, value_delimiter = ',', value_name = "BITS,..")]
    bits: Vec<u8>,
    /// Seeds of each variant [default: that of the recipe]
    #[arg(long, value_name = "N")]
    seeds: Option<u64>,
    /// Run only the variants whose name contains this; the table still shows all that is finished
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Use the first N training samples
    #[arg(long, value_name = "N")]
    limit_train: Option<usize>,
    /// Use the first N evaluation samples
    #[arg(long, value_name = "N")]
    limit_eval: Option<usize>,
    /// Tasks of a sweep over tasks, in place of the recipe's: paths of images
    #[arg(long, value_delimiter = ',', value_name = "TASK,..")]
    tasks: Vec<String>,
    /// Set any key of the recipe, e.g. phase.1.steps=300
    #[arg(long, value_name = "KEY.PATH=VALUE")]
    set: Vec<String>,
    /// Folder of the sweep; one that exists goes on
    #[arg(long, value_name = "DIR", default_value = "runs/ablation")]
    out: PathBuf,
    /// Write the table of what is finished and run nothing
    #[arg(long)]
    table: bool,
    #[command(flatten)]
    common: Common,
}

impl Ablate {
    pub fn run(self) -> Result<()> {
        let progress = self.common.progress();
        let device = self.common.device()?;
        let mut table = Recipe::table(&self.recipe)?;
        let path = |p: &PathBuf| Value::String(anchored(p).display().to_string());
        let count = |n: usize| Value::Integer(i64::try_from(n).unwrap_or(i64::MAX));
        let kind = table.get("model").and_then(|m| m.get("kind")).and_then(Value::as_str);
        let data = if kind == Some("llama") { "text" } else { "data" };
        let at = |key: &str| format!("{data}.{key}");
        let overrides = [
            ("model.path", self.model.as_ref().map(path)),
            ("model.allow_pickle", self.common.allow_pickle.then_some(Value::Boolean(true))),
            (&at("path"), self.data.as_ref().map(path)),
            (&at("eval_path"), self.eval_data.as_ref().map(path)),
            (&at("limit_train"), self.limit_train.map(count)),
            (&at("limit_eval"), self.limit_eval.map(count)),
            ("text.control", self.control.as_ref().map(path)),
        ];
        for (key, value) in overrides.into_iter().filter_map(|(key, value)| Some((key, value?))) {
            put(&mut table, key, value).map_err(|what| Error::usage(format!("{key}: {what}")))?;
        }
        for assignment in &self.set {
            set(&mut table, assignment)?;
        }
        if !self.tasks.is_empty() {
            let tasks = tasks::tables(&self.tasks)?;
            put(&mut table, "continual.task", Value::Array(tasks))
                .map_err(|what| Error::usage(format!("continual.task: {what}")))?;
        }
        tasks::limit(&mut table, self.limit_train, self.limit_eval);
        let mut ablation = ablation::split(&mut table)?;
        if !self.bits.is_empty() {
            ablation.bits = self.bits.clone();
            ablation.bits.sort_unstable();
            ablation.bits.dedup();
        }
        if let Some(seeds) = self.seeds {
            if !(1..=1000).contains(&seeds) {
                return Err(Error::usage(format!("--seeds {seeds}: expected 1 to 1000")).into());
            }
            ablation.seeds = seeds;
        }
        let cells = ablation.cells(&table, &self.out)?;
        let picked = |name: &str| self.only.is_empty() || self.only.iter().any(|part| name.contains(part));
        if let Some(part) = self.only.iter().find(|p| !ablation.variant.iter().any(|v| v.name.contains(*p))) {
            let names: Vec<&str> = ablation.variant.iter().map(|v| v.name.as_str()).collect();
            let message =
                format!("--only {part}: no variant has it in its name, expected one of {}", names.join("; "));
            return Err(Error::usage(message).into());
        }
        std::fs::create_dir_all(&self.out).map_err(|e| Error::io(&self.out, e))?;
        if !self.table {
            signal::watch()?;
            let wanted: Vec<_> = cells.iter().filter(|cell| picked(&cell.variant)).collect();
            for (i, cell) in wanted.iter().enumerate() {
                progress.note(&format!("run {} of {}: {}", i + 1, wanted.len(), cell.dir.display()));
                ablation::run(cell, &device, &progress)?;
                // After each run, so that a sweep that is cut short shows what there is.
                ablation::write(&self.out, &ablation.table(&cells)?)?;
            }
        }
        let shown = ablation.table(&cells)?;
        let value = ablation::write(&self.out, &shown)?;
        if self.common.json {
            return print_json(&value);
        }
        print(shown.markdown().trim_end())
    }
}
