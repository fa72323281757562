//! `qtune eval`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use clap::Args;
use qtune::data::DataConfig;
use qtune::models::{model_dir, open_model_with};
use qtune::recipe::Recipe;
use qtune::train::{evaluate, peak_rss_bytes, signal, Progress};
use qtune::{hub, quantize, Error};
use serde_json::json;

use super::flags::Common;
use super::{print, print_json};

#[derive(Args, Debug)]
pub struct Eval {
    /// Model: a folder, a file, a run of ours or a hub name; full precision or packed
    model: PathBuf,
    /// Images: an IDX pair, CIFAR-10, an image folder or archive [default: those of the run, for a run folder]
    #[arg(long, value_name = "PATH")]
    data: Option<PathBuf>,
    /// Images to evaluate on, where they lie elsewhere
    #[arg(long, value_name = "PATH")]
    eval_data: Option<PathBuf>,
    /// Use the first N samples
    #[arg(long, value_name = "N")]
    limit_eval: Option<usize>,
    /// Make what is skipped with a note an error
    #[arg(long)]
    strict: bool,
    /// Samples in a forward pass
    #[arg(long, value_name = "N", default_value_t = 250)]
    batch_size: usize,
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
        let started = std::time::Instant::now();
        signal::watch()?;
        let progress = self.common.progress();
        let device = self.common.device()?;
        if self.batch_size == 0 {
            return Err(Error::usage("--batch-size 0: expected at least 1").into());
        }
        let dir = model_dir(&hub::resolve(&self.model.to_string_lossy())?);
        let opened = open_model_with(&dir, self.common.pickle(), &device)?;
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
        let got = evaluate(&model, eval, preprocess, self.batch_size, &device, &progress, true)?;
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
                "device": quantize::device_name(&device),
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
}
