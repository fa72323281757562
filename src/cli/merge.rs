//! `qtune merge`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::DType;
use clap::{Args, ValueEnum};
use qtune::adapter::{merge, unmerge, Merge as How, Onto, Residual};
use qtune::models::model_dir;
use qtune::train::Progress;
use qtune::{hub, Error};
use serde_json::json;

use super::flags::Dtype;
use super::progress::{Lines, Verbosity};
use super::{bytes, print, print_json};

/// What commands that only rewrite files share of the flags: they compute on the CPU, in f32.
#[derive(Args, Debug)]
pub struct Writing {
    /// Threads to compute with [default: one for each core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print one JSON object to stdout
    #[arg(long)]
    pub json: bool,
    /// Print errors only
    #[arg(short, long)]
    quiet: bool,
}

impl Writing {
    /// Sets up threads; says where notes go.
    pub fn start(&self) -> qtune::Result<Lines> {
        qtune::threads::start(self.threads)?;
        Ok(Lines::new(if self.quiet { Verbosity::Quiet } else { Verbosity::Normal }))
    }
}

/// What a packed base becomes.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum BasePolicy {
    /// A dense model of the values that the codes stand for: exact
    Dense,
    /// Packed again on the same grids: the size stays, the change is rounded
    Requantize,
}

/// What the base is to an adapter that started from a part of it.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum ResidualBase {
    /// What was left when the start was taken out of it
    Stored,
    /// The original: take the start out of it again
    Rebuild,
}

impl ResidualBase {
    pub fn of(given: Option<Self>) -> Residual {
        match given {
            None => Residual::Refuse,
            Some(ResidualBase::Stored) => Residual::Stored,
            Some(ResidualBase::Rebuild) => Residual::Rebuild,
        }
    }
}

#[derive(Args, Debug)]
pub struct Merge {
    /// The model to merge into: a folder, a run folder of ours or a hub name; with --unmerge the merged one
    model: PathBuf,
    /// Adapter folder in PEFT's layout, or a run folder of ours; DIR=0.5 merges half of its change
    #[arg(long, value_name = "DIR[=X]", num_args = 1.., required_unless_present = "unmerge", conflicts_with = "unmerge")]
    adapter: Vec<String>,
    /// Folder to write, which must not exist
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Factor on the change of every adapter that has none of its own
    #[arg(long, value_name = "X", conflicts_with = "unmerge", allow_negative_numbers = true)]
    scale: Option<f64>,
    /// What a packed base becomes
    #[arg(long, value_enum, default_value = "dense", conflicts_with = "unmerge")]
    base_policy: BasePolicy,
    /// Number format to write [default: that of the base, f32 of a packed one]
    #[arg(long, value_enum, conflicts_with = "unmerge")]
    dtype: Option<Dtype>,
    /// For an adapter that started from a part of its base (PiSSA): which base this is
    #[arg(long, value_enum, conflicts_with = "unmerge")]
    residual: Option<ResidualBase>,
    /// Write the model that this one was merged from: read again, since arithmetic does not give it back
    #[arg(long)]
    unmerge: bool,
    /// Where the base lies now, where it was moved
    #[arg(long, value_name = "DIR", requires = "unmerge")]
    base: Option<PathBuf>,
    #[command(flatten)]
    writing: Writing,
}

fn stored(dtype: Dtype) -> DType {
    match dtype {
        Dtype::F32 => DType::F32,
        Dtype::Bf16 => DType::BF16,
        Dtype::F16 => DType::F16,
    }
}

/// A model's folder by path or hub name.
pub fn folder_of(model: &Path) -> qtune::Result<PathBuf> {
    Ok(model_dir(&hub::resolve(&model.to_string_lossy())?))
}

/// The folder of an adapter: itself, or `adapter/` of a run.
pub fn adapter_dir(path: &Path) -> PathBuf {
    let inner = path.join("adapter");
    match !path.join("adapter_config.json").exists() && inner.join("adapter_config.json").exists() {
        true => inner,
        false => path.to_path_buf(),
    }
}

/// `DIR` or `DIR=X`: an adapter's folder and the factor on its change.
pub fn adapter(given: &str, scale: Option<f64>) -> qtune::Result<(PathBuf, Option<f64>)> {
    let (dir, scale) = match given.rsplit_once('=') {
        Some((dir, factor)) if !Path::new(given).exists() => {
            let factor: f64 = factor.parse().map_err(|_| {
                Error::usage(format!("--adapter {given}: found {factor:?}, expected a number"))
            })?;
            (dir, Some(factor))
        }
        _ => (given, scale),
    };
    if let Some(found) = scale.filter(|scale| !scale.is_finite()) {
        return Err(Error::usage(format!("--adapter {given}: found factor {found}, expected a finite one")));
    }
    Ok((adapter_dir(&hub::resolve(dir)?), scale))
}

impl Merge {
    pub fn run(self) -> Result<()> {
        let progress = self.writing.start()?;
        if self.unmerge {
            return self.unmerged();
        }
        let base = folder_of(&self.model)?;
        let adapters = self.adapter.iter().map(|given| adapter(given, self.scale));
        let how = How {
            adapters: adapters.collect::<qtune::Result<Vec<_>>>()?,
            onto: match self.base_policy {
                BasePolicy::Dense => Onto::Dense,
                BasePolicy::Requantize => Onto::Requantize,
            },
            dtype: self.dtype.map(stored),
            residual: ResidualBase::of(self.residual),
            ..How::default()
        };
        let merged = merge(&base, &self.out, &how)?;
        merged.notes.iter().for_each(|note| progress.note(note));
        let changes = &merged.changes;
        if self.writing.json {
            let at = |(value, name): &(f64, String)| json!({"value": value, "tensor": name});
            let adapters = how.adapters.iter().map(
                |(dir, scale)| json!({"path": dir.display().to_string(), "scale": scale.unwrap_or(1.0)}),
            );
            return print_json(&json!({
                "command": "merge",
                "model": self.model.display().to_string(),
                "adapters": adapters.collect::<Vec<_>>(),
                "out": merged.dir.display().to_string(),
                "tensors": merged.tensors,
                "bytes": merged.bytes,
                "changed": changes.tensors,
                "largest_change": at(&changes.largest),
                "largest_relative_change": at(&changes.relative),
                "packed_error": merged.rounding.as_ref().map(|rounding| json!({
                    "largest": at(&rounding.largest),
                    "mean": rounding.mean,
                    "mean_change": rounding.change,
                })),
                "notes": merged.notes,
            }));
        }
        let mut text = format!(
            "{}: {} tensors, {}\nchanged {} tensors, most {:.3e} in {}, relative to its norm {:.3e} in {}",
            merged.dir.display(),
            merged.tensors,
            bytes(merged.bytes as usize),
            changes.tensors,
            changes.largest.0,
            changes.largest.1,
            changes.relative.0,
            changes.relative.1
        );
        if let Some(rounding) = &merged.rounding {
            text += &format!(
                "\npacked again: off by {:.3e} an element, where the change is {:.3e}; most {:.3e} in {}",
                rounding.mean, rounding.change, rounding.largest.0, rounding.largest.1
            );
        }
        print(&text)
    }

    fn unmerged(&self) -> Result<()> {
        let merged = folder_of(&self.model)?;
        let base = self.base.as_deref().map(folder_of).transpose()?;
        let dir = unmerge(&merged, base.as_deref(), &self.out)?;
        if self.writing.json {
            return print_json(&json!({
                "command": "merge",
                "unmerge": true,
                "model": self.model.display().to_string(),
                "out": dir.display().to_string(),
            }));
        }
        print(&format!("{}: the base of {}, byte for byte", dir.display(), self.model.display()))
    }
}
