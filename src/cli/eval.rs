//! `qtune eval`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use clap::Args;
use qtune::data::DataConfig;
use qtune::language;
use qtune::language::generate::{generate, Limits, Sampling};
use qtune::models::llama_config::is_language_model;
use qtune::models::{held, model_dir, open_model_with, read_config, Llama};
use qtune::recipe::Recipe;
use qtune::train::{evaluate, peak_rss_bytes, signal, Progress};
use qtune::{hub, quantize, Error};
use serde_json::json;

use super::flags::Common;
use super::generate::{dtype, scaled};
use super::{print, print_json};

#[derive(Args, Debug)]
pub struct Eval {
    /// Model: a folder, a file, a run of ours or a hub name; full precision or packed
    model: PathBuf,
    /// Images (an IDX pair, CIFAR-10, an image folder or archive) or text (JSON lines, Parquet, plain text) [default:
    /// those of the run, for a run folder]
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// Images or text to evaluate on, where they lie elsewhere
    #[arg(long, value_name = "PATH")]
    eval_data: Option<PathBuf>,
    /// Use the first N samples
    #[arg(long, value_name = "N")]
    limit_eval: Option<usize>,
    /// Make what is skipped with a note an error
    #[arg(long)]
    strict: bool,
    /// Samples in a forward pass [default: 250 images, 8 rows of text]
    #[arg(long, value_name = "N")]
    batch_size: Option<usize>,
    /// Adapters to put on a language model, in this order; DIR=SCALE weights one
    #[arg(long, value_name = "DIR[=SCALE]")]
    adapter: Vec<String>,
    /// Tokens in a row of text
    #[arg(long, value_name = "N")]
    seq_len: Option<usize>,
    /// Answer each prompt too and count the answers whose number after "####" is right (GSM8K), at most so
    /// many tokens each
    #[arg(long, value_name = "TOKENS")]
    exact_match: Option<usize>,
    /// Seed of the built-in glyphs
    #[arg(long)]
    seed: Option<u64>,
    #[command(flatten)]
    common: Common,
}

/// The images to measure a model on and the seed of built-in ones: what the flags say, else what a run
/// folder's own recipe says.
pub fn images_for(
    model: &Path,
    data: Option<&Path>,
    eval_data: Option<&Path>,
) -> qtune::Result<(DataConfig, u64)> {
    if data.is_some() || eval_data.is_some() {
        // A second path alone is the data, and all of what it has to evaluate on.
        let (path, eval_path) = (data.or(eval_data), eval_data);
        let (path, eval_path) = (path.map(Path::to_path_buf), eval_path.map(Path::to_path_buf));
        return Ok((DataConfig { path, eval_path, ..DataConfig::default() }, 0));
    }
    let recipe = model.join("recipe.toml");
    if !recipe.exists() {
        return Err(Error::usage("measuring needs images: give --data PATH, or a run folder as the model"));
    }
    let recipe = Recipe::resolve(Recipe::table(&recipe.to_string_lossy())?)?;
    Ok((recipe.data, recipe.seed))
}

impl Eval {
    pub fn run(self) -> Result<()> {
        let dir = model_dir(&hub::resolve(&self.model.to_string_lossy())?);
        // A run of ours that trained an adapter has no model of its own.
        let adapted = !dir.join("config.json").exists() && self.model.join("adapter").exists();
        let text = read_config(&dir).is_ok_and(|(_, json)| is_language_model(&json));
        if adapted || text {
            return self.text(adapted);
        }
        if !self.adapter.is_empty() || self.exact_match.is_some() || self.seq_len.is_some() {
            let message =
                format!("{}: --adapter, --seq-len and --exact-match are for language models", dir.display());
            return Err(Error::usage(message).into());
        }
        self.images(&dir)
    }

    fn images(self, dir: &Path) -> Result<()> {
        let started = std::time::Instant::now();
        signal::watch()?;
        let progress = self.common.progress();
        let device = self.common.device()?;
        let batch_size = self.batch_size.unwrap_or(250);
        if batch_size == 0 {
            return Err(Error::usage("--batch-size 0: expected at least 1").into());
        }
        let opened = open_model_with(dir, self.common.pickle(), &device)?;
        opened.notes.iter().for_each(|note| progress.note(note));
        let (mut data, seed) = images_for(&self.model, self.data.as_deref(), self.eval_data.as_deref())?;
        let seed = self.seed.unwrap_or(seed);
        data.limit_eval = self.limit_eval.or(data.limit_eval);
        data.strict |= self.strict;
        // The training images are not looked at, so one is enough.
        data.limit_train = Some(1);
        let dataset = data.open(seed)?.under_labels(opened.config.classes())?;
        dataset.notes.iter().for_each(|note| progress.note(note));
        let model = opened.config.build(&opened.weights)?;
        let preprocess = Arc::new(opened.preprocess);
        let eval = dataset.eval.clone();
        let got = evaluate(&model, eval, preprocess, batch_size, &device, &progress, true)?;
        let left_out = dataset.eval.left_out();
        if let Some(first) = left_out.first() {
            progress.note(&format!("{} unreadable images replaced: {first}", left_out.len()));
        }
        if self.common.json {
            let mut value = quantize::accuracy_json(&got);
            let more = json!({
                "command": "eval",
                "method": if opened.quantization.is_some() { "packed" } else { "full precision" },
                "model": self.model.display().to_string(),
                "seed": seed,
                "device": qtune::device::name(&device),
                "threads": rayon::current_num_threads(),
                "wall_s": started.elapsed().as_secs_f64(),
                "steps": 0,
                "peak_rss_bytes": peak_rss_bytes(),
                "params_total": opened.config.params(),
                "params_trainable": 0,
                "version": env!("CARGO_PKG_VERSION"),
                "commit": env!("QTUNE_COMMIT"),
            });
            value.extend(more.as_object().cloned().unwrap_or_default());
            return print_json(&serde_json::Value::Object(value));
        }
        print(&format!(
            "top-1 {:.2} %  top-5 {:.2} %  loss {:.4}  {} images, {:.0} a second",
            got.top1, got.top5, got.loss, got.samples, got.samples_per_s
        ))
    }

    /// Loss and perplexity of a language model, and answers where they are asked for.
    fn text(self, adapted: bool) -> Result<()> {
        let started = std::time::Instant::now();
        signal::watch()?;
        let progress = self.common.progress();
        let device = self.common.device_for_text()?;
        let recipe = self.model.join("recipe.toml");
        let recipe = match recipe.exists() {
            true => Some(Recipe::resolve(Recipe::table(&recipe.to_string_lossy())?)?),
            false => None,
        };
        let mut start = match (&recipe, adapted) {
            (Some(recipe), true) => language::open(recipe, &device)?,
            _ => language::open_at(&self.model, &device)?,
        };
        start.notes.iter().for_each(|note| progress.note(note));
        let dtype = dtype(&self.common);
        if let (Some(recipe), true) = (&recipe, adapted) {
            language::pack_base(recipe, &mut start, &progress)?;
        }
        start.weights = held(&start.config, &start.weights, dtype)?;
        let own = adapted.then(|| self.model.display().to_string());
        for adapter in own.iter().chain(&self.adapter) {
            let (dir, scale) = scaled(adapter);
            language::attach(&mut start, &dir, scale)?.iter().for_each(|note| progress.note(note));
        }
        let mut text = match (&self.data, &self.eval_data, &recipe) {
            (None, None, None) if start.dir.is_some() => {
                return Err(Error::usage(
                    "measuring needs text: give --data PATH, or a run folder as the model",
                )
                .into())
            }
            (None, None, recipe) => recipe.as_ref().and_then(|r| r.text.clone()).unwrap_or_default(),
            (data, eval, recipe) => {
                let mut text = recipe.as_ref().and_then(|r| r.text.clone()).unwrap_or_default();
                (text.path, text.eval_path) = (data.clone().or(eval.clone()), eval.clone());
                text
            }
        };
        text.seq_len = self.seq_len.unwrap_or(text.seq_len);
        text.limit_eval = self.limit_eval.or(text.limit_eval);
        text.strict |= self.strict;
        let seed = self.seed.or(recipe.as_ref().map(|r| r.seed)).unwrap_or(0);
        let data = text.open(&start.tokenizer, seed)?;
        data.notes.iter().for_each(|note| progress.note(note));
        let model = Llama::new(&start.config, &start.weights, dtype)?;
        let batch = self.batch_size.unwrap_or(8).max(1);
        let got = language::evaluate_text(&model, &data.eval, batch, &device, &progress, true)?;
        let mut matched = None;
        if let Some(tokens) = self.exact_match {
            let limits = Limits { tokens, stop: vec!["\n\n".into()], ignore_eos: false };
            let (mut right, total) = (0usize, data.eval.samples().len());
            progress.start("answering", total);
            for (done, sample) in data.eval.samples().iter().enumerate() {
                let asked = sample.train.iter().position(|t| *t).unwrap_or(sample.tokens.len());
                let answer = generate(
                    &model,
                    &start.tokenizer,
                    &sample.tokens[..asked],
                    &Sampling::default(),
                    &limits,
                    &device,
                    &mut |_| Ok(()),
                )?;
                let want = language::final_number(&start.tokenizer.decode(&sample.tokens[asked..])?);
                let got = language::final_number(&answer.text);
                right += usize::from(want.is_some() && want == got);
                progress.tick(done + 1, &format!("{right} right"));
                if let Some(signal) = signal::asked() {
                    return Err(Error::Stopped { signal, resume: None }.into());
                }
            }
            progress.finish();
            if total == 0 {
                return Err(Error::usage(
                    "--exact-match: expected records of prompts and answers, found plain text",
                )
                .into());
            }
            matched = Some(100.0 * right as f64 / total as f64);
        }
        if self.common.json {
            let mut value = language::text_figures(&got);
            let packed = start.weights.iter().any(|(_, w)| w.grid().is_some());
            let more = json!({
                "command": "eval",
                "method": if packed { "packed" } else { "full precision" },
                "model": self.model.display().to_string(),
                "adapters": self.adapter,
                "seed": seed,
                "device": qtune::device::name(&device),
                "threads": rayon::current_num_threads(),
                "wall_s": started.elapsed().as_secs_f64(),
                "steps": 0,
                "samples": data.eval.rows(),
                "samples_per_s": data.eval.rows() as f64 / started.elapsed().as_secs_f64(),
                "exact_match": matched,
                "peak_rss_bytes": peak_rss_bytes(),
                "params_total": start.config.params(),
                "params_trainable": 0,
                "version": env!("CARGO_PKG_VERSION"),
                "commit": env!("QTUNE_COMMIT"),
            });
            value.extend(more.as_object().cloned().unwrap_or_default());
            return print_json(&serde_json::Value::Object(value));
        }
        let matched = matched.map(|m| format!("  exact match {m:.2} %")).unwrap_or_default();
        print(&format!(
            "loss {:.4}  perplexity {:.3}{matched}  {} tokens predicted, {:.0} tokens a second",
            got.loss,
            got.loss.exp(),
            got.samples,
            got.samples_per_s
        ))
    }
}
