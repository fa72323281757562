//! `qtune kappa`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use candle_core::Device;
use clap::Args;
use qtune::models::llama_config::is_language_model;
use qtune::models::{model_dir, open_llama, open_model_with, open_weights, read_config, LlamaConfig};
use qtune::select::kappa::{self, Cache, Chosen, Entry, KappaConfig, Options, Roles, Selection, Unit};
use qtune::select::matches;
use qtune::train::{peak_rss_bytes, signal, Progress};
use qtune::weights::{nearest, Checkpoint, Weights};
use qtune::{files, hub, Error};
use serde::de::DeserializeOwned;
use serde_json::{json, Map, Value};

use super::flags::Common;
use super::{print, print_json};

#[derive(Args, Debug)]
pub struct Kappa {
    /// Model: a folder, a file of weights, a run of ours or a hub name
    model: PathBuf,
    /// What to select: tensors:N (or N), fraction:P of the units, share:P of the parameters (or P%), kappa:T
    #[arg(long, value_name = "BUDGET")]
    budget: Option<kappa::Budget>,
    /// What a share does with a unit that no longer fits: end there, or pass it over
    #[arg(long, value_name = "HOW", value_parser = ["prefix", "fill"], default_value = "prefix")]
    fit: String,
    /// Which end of the ranking; highest and random are controls
    #[arg(long, value_name = "END", value_parser = ["lowest", "highest", "random"], default_value = "lowest")]
    order: String,
    /// What is ranked: the condition number, or the deficit of log-volume
    #[arg(long, value_name = "SCORE", value_parser = ["kappa", "logvol"], default_value = "kappa")]
    score: String,
    /// Divide scores by those of a Gaussian matrix of the same shape
    #[arg(long, value_name = "WHAT", value_parser = ["none", "shape"], default_value = "none")]
    normalize: String,
    /// Names that may be selected: a pattern, * stands for anything
    #[arg(long, value_name = "PATTERN")]
    include: Vec<String>,
    /// Names that may not
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<String>,
    /// Roles that are looked at [default: linear, conv, experts]
    #[arg(long, value_name = "ROLE", value_parser = ["linear", "conv", "experts", "embedding", "head", "router"])]
    role: Vec<String>,
    /// Look at embeddings and output heads too
    #[arg(long)]
    include_embeddings: bool,
    /// Leave out matrices with a longer side
    #[arg(long, value_name = "N")]
    max_dim: Option<usize>,
    /// Take fused query, key and value (three times as tall as wide), and gate and up, apart: for analysis only, a
    /// part is not trained by itself
    #[arg(long)]
    split_fused: bool,
    /// Compute all singular values of every matrix
    #[arg(long)]
    exact: bool,
    /// Rank packed weights too, though their condition numbers are mostly rounding
    #[arg(long)]
    allow_quantized_kappa: bool,
    /// Leave matrices with a number that is not finite out
    #[arg(long)]
    ignore_nonfinite: bool,
    /// Neither read nor write the file of known condition numbers beside the model
    #[arg(long)]
    no_cache: bool,
    /// Show the first N of the ranking
    #[arg(long, value_name = "N")]
    top: Option<usize>,
    /// Print every singular value of the matrices of this name or pattern
    #[arg(long, value_name = "NAME")]
    spectrum: Vec<String>,
    /// Folder to write the selection, the figures and the picture to
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Seed of a random order
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    common: Common,
}

/// The weights of a model, and the rule over its names.
struct Opened {
    weights: Weights,
    roles: Box<Roles<'static>>,
    /// A tensor that is used under another name too.
    tied: Option<(&'static str, &'static str)>,
    /// Where its cache lies.
    dir: PathBuf,
    notes: Vec<String>,
}

/// Opens any model: by its own definition where qtune knows it, else its tensors by rules over names.
fn open(path: &Path, common: &Common) -> qtune::Result<Opened> {
    let path = hub::resolve(&path.to_string_lossy())?;
    let dir = model_dir(&path);
    let (cpu, pickle) = (Device::Cpu, common.pickle());
    let beside = match dir.is_file() {
        true => dir.parent().map(Path::to_path_buf).unwrap_or_default(),
        false => dir.clone(),
    };
    let plain = |weights, notes| Opened {
        weights,
        roles: Box::new(kappa::generic_roles),
        tied: None,
        dir: beside.clone(),
        notes,
    };
    if !dir.join("config.json").exists() {
        let checkpoint = Checkpoint::open_with(&dir, pickle)?;
        let notes = checkpoint.notes().to_vec();
        return Ok(plain(Weights::from_checkpoint(Arc::new(checkpoint), &cpu), notes));
    }
    let (file, config) = read_config(&dir)?;
    if is_language_model(&config) {
        if LlamaConfig::from_hf(&file, &config).is_err() {
            let kind = config.get("model_type").and_then(Value::as_str).unwrap_or("none").to_string();
            let note = format!("model_type {kind}: not known, roles follow the names of the tensors");
            return Ok(plain(open_weights(&dir, &cpu)?, vec![note]));
        }
        let opened = open_llama(&dir, &cpu)?;
        let tied = opened.config.tied.then_some(("model.embed_tokens.weight", "lm_head.weight"));
        let roles = Box::new(kappa::llama_roles);
        return Ok(Opened { weights: opened.weights, roles, tied, dir, notes: opened.notes });
    }
    let opened = open_model_with(&dir, pickle, &cpu)?;
    let roles = Box::new(kappa::vision_roles);
    Ok(Opened { weights: opened.weights, roles, tied: None, dir, notes: opened.notes })
}

/// One of the words that the flags allow, as the type whose name in files it is.
fn word<T: DeserializeOwned>(text: &str) -> qtune::Result<T> {
    serde_json::from_value(json!(text)).map_err(|e| Error::usage(e.to_string()))
}

impl Kappa {
    fn config(&self) -> qtune::Result<KappaConfig> {
        let roles = self.role.iter().map(|role| word(role)).collect::<qtune::Result<Vec<_>>>()?;
        let config = KappaConfig {
            fit: word(&self.fit)?,
            order: word(&self.order)?,
            score: word(&self.score)?,
            normalize: word(&self.normalize)?,
            include: self.include.clone(),
            exclude: self.exclude.clone(),
            roles: (!roles.is_empty()).then_some(roles),
            max_dim: self.max_dim,
            include_embeddings: self.include_embeddings,
            split_fused: self.split_fused,
            exact: self.exact,
            allow_quantized: self.allow_quantized_kappa,
            ignore_nonfinite: self.ignore_nonfinite,
            ..KappaConfig::default()
        };
        // Without a budget everything is ranked and nothing selected.
        let config = config.with_budget(self.budget.unwrap_or(kappa::Budget::Tensors(usize::MAX)));
        config.check()?;
        Ok(config)
    }

    pub fn run(self) -> Result<()> {
        let started = std::time::Instant::now();
        signal::watch()?;
        let progress = self.common.progress();
        let device = self.common.device_for_text()?;
        let config = self.config()?;
        let staging = self.out.as_deref().map(files::Staging::new).transpose()?;
        let opened = open(&self.model, &self.common)?;
        opened.notes.iter().for_each(|note| progress.note(note));
        let mut all = kappa::units(&opened.weights, &*opened.roles)?;
        if let Some((param, alias)) = opened.tied {
            kappa::tie(&mut all, param, alias);
        }
        if config.split_fused {
            all = kappa::split_fused(all);
        }
        let units: Vec<Unit> = all.iter().filter(|unit| config.wants(unit.role)).cloned().collect();
        let total = kappa::total_params(&opened.weights)?;
        let cache = (!self.no_cache).then(|| Cache::beside(&opened.dir));
        let scored =
            kappa::analyse(&opened.weights, &units, &Options::from(&config), cache.as_ref(), &progress)?;
        let chosen = match self.budget {
            Some(_) => kappa::choose_with_notes(&scored, total, &config, self.seed)?,
            // A table that nothing is chosen from may be one of units without a condition number.
            None => Chosen {
                units: Vec::new(),
                ranked: kappa::rank(&scored, &config, self.seed)?,
                notes: Vec::new(),
            },
        };
        chosen.notes.iter().for_each(|note| progress.note(note));
        let selection = Selection::new(&scored, &chosen, total, &config, self.seed);
        let spectra = self.spectra(&opened.weights, &all)?;
        let summary = json!({
            "command": "kappa",
            "method": "kappa",
            "model": self.model.display().to_string(),
            "seed": self.seed,
            "device": qtune::device::name(&device),
            "threads": rayon::current_num_threads(),
            "wall_s": started.elapsed().as_secs_f64(),
            "steps": 0,
            "peak_rss_bytes": peak_rss_bytes(),
            "params_total": total,
            "params_trainable": selection.selected_params,
            "version": env!("CARGO_PKG_VERSION"),
            "commit": env!("QTUNE_COMMIT"),
            "model_hash": selection.model_hash,
            "options": if self.budget.is_some() { json!(selection.options) } else { Value::Null },
            "roles": selection.shares().into_iter().map(|(role, chosen, all, numel)| {
                json!({"role": role.name(), "selected": chosen, "units": all, "params": numel})
            }).collect::<Vec<_>>(),
            "tensors": ascending(&selection),
            "spectra": spectra.iter().map(|(name, values)| (name.clone(), json!(values))).collect::<Map<_, _>>(),
        });
        if let Some(staging) = staging {
            let (dir, name) = (staging.path().to_path_buf(), self.model.display().to_string());
            if self.budget.is_some() {
                selection.write(&dir.join(kappa::file::FILE_NAME))?;
            }
            files::write_bytes(&dir.join("summary.json"), &serde_json::to_vec_pretty(&summary)?)?;
            let page = kappa::picture::page(&selection, &name);
            files::write_bytes(&dir.join("report.html"), page.as_bytes())?;
            if let Some(svg) = kappa::picture::svg(&selection) {
                files::write_bytes(&dir.join("kappa.svg"), svg.as_bytes())?;
            }
            progress.note(&format!("written to {}", staging.commit()?.display()));
        }
        if self.common.json {
            return print_json(&summary);
        }
        let mut text = self.table(&selection);
        for (name, values) in &spectra {
            text += &format!("\n\n{} singular values of {name}", values.len());
            for (i, value) in values.iter().enumerate() {
                text += &format!("{}{value:.6e}", if i % 8 == 0 { "\n" } else { "  " });
            }
        }
        print(&text)
    }

    /// The ranking, a line each, and what the roles got.
    fn table(&self, selection: &Selection) -> String {
        let shown = self.top.unwrap_or(usize::MAX).min(selection.tensors.len());
        let mut text =
            String::from("  place         kappa    score  error    route   shape           role       name");
        for entry in &selection.tensors[..shown] {
            text += &format!("\n{}", line(entry));
        }
        if shown < selection.tensors.len() {
            text += &format!("\n  ... {} more", selection.tensors.len() - shown);
        }
        let without = selection.tensors.iter().filter(|t| t.kappa.is_none()).count();
        let sources: std::collections::BTreeSet<&str> =
            selection.tensors.iter().map(|t| t.source.as_str()).collect();
        let sources = sources.into_iter().collect::<Vec<_>>().join(", ");
        text += &format!("\n{} units", selection.tensors.len());
        if !sources.is_empty() {
            text += &format!(" of {sources}");
        }
        if without > 0 {
            text += &format!(", {without} without a condition number");
        }
        if self.budget.is_none() {
            return text + &format!("; {} parameters in the model; --budget selects", selection.total_params);
        }
        text += &format!(
            "\nselected: {} units, {} of {} parameters ({:.2} %)",
            selection.selected().count(),
            selection.selected_params,
            selection.total_params,
            100.0 * selection.selected_params as f64 / selection.total_params.max(1) as f64
        );
        for (role, chosen, all, numel) in selection.shares() {
            let share = 100.0 * numel as f64 / selection.selected_params.max(1) as f64;
            text +=
                &format!("\n  {:<9} {chosen} of {all} units, {share:.1} % of what is selected", role.name());
        }
        text
    }

    /// Every singular value of what `--spectrum` names.
    fn spectra(&self, weights: &Weights, units: &[Unit]) -> qtune::Result<Vec<(String, Vec<f64>)>> {
        let mut spectra: Vec<(String, Vec<f64>)> = Vec::new();
        for pattern in &self.spectrum {
            let fits = |unit: &&Unit| {
                [unit.key().as_str(), unit.param.as_str(), unit.module()]
                    .iter()
                    .any(|name| matches(pattern, name))
            };
            let found: Vec<&Unit> = units.iter().filter(fits).collect();
            if found.is_empty() {
                let near = nearest(pattern, units.iter().map(Unit::module));
                let hint = near.map(|n| format!("; a matrix here is {n}")).unwrap_or_default();
                return Err(Error::usage(format!("--spectrum {pattern}: no matrix has this name{hint}")));
            }
            for unit in found {
                let key = unit.key();
                if spectra.iter().all(|(name, _)| *name != key) {
                    spectra.push((key, kappa::singular_values(weights, unit, self.allow_quantized_kappa)?));
                }
            }
        }
        Ok(spectra)
    }
}

/// A number of the table: four figures that count.
fn number(value: f64) -> String {
    match value {
        v if v >= 1e5 => format!("{v:.3e}"),
        v if v >= 100.0 => format!("{v:.1}"),
        v => format!("{v:.4}"),
    }
}

/// A line of the table; a star where the unit is selected.
fn line(entry: &Entry) -> String {
    let place = entry.rank.map(|r| r.to_string()).unwrap_or_else(|| "-".into());
    let star = if entry.selected { "*" } else { " " };
    let kappa = match entry.kappa {
        Some(kappa) => number(kappa),
        None => entry.status.name().to_string(),
    };
    let score = entry.score.map(number).unwrap_or_else(|| "-".into());
    let error = if entry.kappa.is_some() { format!("{:.0e}", entry.bound) } else { "-".into() };
    let shape = format!("{} x {}", entry.shape[0], entry.shape[1]);
    format!(
        "{star} {place:>5}  {kappa:>12}  {score:>7}  {error:<7}  {:<6}  {shape:<14}  {:<9}  {}",
        entry.route.name(),
        entry.role.name(),
        entry.name
    )
}

/// Every unit by ascending condition number, ties by name; those without one at the end.
fn ascending(selection: &Selection) -> Vec<Value> {
    let mut entries: Vec<&Entry> = selection.tensors.iter().collect();
    let key = |e: &Entry| e.kappa.unwrap_or(f64::INFINITY);
    entries.sort_by(|a, b| {
        key(a).total_cmp(&key(b)).then_with(|| a.param.cmp(&b.param)).then_with(|| a.index.cmp(&b.index))
    });
    entries.into_iter().map(|entry| json!(entry)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_make_a_configuration() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            kappa: Kappa,
        }
        let parse = |args: &[&str]| {
            <Line as clap::Parser>::try_parse_from(["x"].iter().chain(args)).map(|line| line.kappa)
        };
        let kappa = parse(&["m", "--budget", "10%", "--fit", "fill", "--role", "conv", "--order", "highest"])
            .unwrap();
        let config = kappa.config().unwrap();
        assert_eq!((config.share, config.fit), (Some(0.1), kappa::Fit::Fill));
        assert_eq!((config.order, config.roles), (kappa::Order::Highest, Some(vec![kappa::Role::Conv])));
        assert!(parse(&["m"]).unwrap().config().is_ok());
        assert!(parse(&["m", "--budget", "0"]).is_err());
        assert!(parse(&["m", "--budget", "3", "--fit", "fill"]).unwrap().config().is_err());
    }
}
