//! `qtune export`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::Device;
use clap::{Args, ValueEnum};
use qtune::adapter::{merge, Adapter, Merge, Modules, Save};
use qtune::export::{export_gguf, export_plain, Encoding, GgufOptions};
use qtune::models::{open_weights, read_config};
use qtune::train::Progress;
use qtune::Error;
use serde_json::json;

use super::merge::{adapter, adapter_dir, folder_of, ResidualBase, Writing};
use super::progress::Lines;
use super::{bytes, print, print_json};

/// Forms of a model.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum To {
    /// A plain Hugging Face directory
    Safetensors,
    /// One file for llama.cpp and its kin
    Gguf,
}

/// How numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Type {
    F32,
    F16,
    Bf16,
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_0")]
    Q4_0,
}

/// What an adapter becomes.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum As {
    /// Plain LoRA, the same change exactly
    Lora,
}

#[derive(Args, Debug)]
pub struct Export {
    /// Model: a folder, a run folder of ours or a hub name; with --as lora an adapter's folder
    model: PathBuf,
    /// The form to write
    #[arg(long, value_enum, default_value = "safetensors")]
    to: To,
    /// Folder, or file of --to gguf, to write; it must not exist
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// How matrices are stored [default: safetensors as they are, unpacked as f32; gguf f16]
    #[arg(long = "type", value_enum, value_name = "TYPE")]
    kind: Option<Type>,
    /// Adapter to fold in; DIR=0.5 folds in half of its change
    #[arg(long, value_name = "DIR[=X]", num_args = 1..)]
    adapter: Vec<String>,
    /// For an adapter that started from a part of its base (PiSSA): which base this is
    #[arg(long, value_enum, requires = "adapter")]
    residual: Option<ResidualBase>,
    /// Write an adapter as another kind that more programs read
    #[arg(long = "as", value_enum, conflicts_with = "adapter")]
    as_kind: Option<As>,
    /// The adapter's base [default: the one that its adapter_config.json names]
    #[arg(long, value_name = "MODEL", requires = "as_kind")]
    base: Option<PathBuf>,
    #[command(flatten)]
    writing: Writing,
}

impl Type {
    fn name(self) -> &'static str {
        match self {
            Type::F32 => "f32",
            Type::F16 => "f16",
            Type::Bf16 => "bf16",
            Type::Q8_0 => "q8_0",
            Type::Q4_0 => "q4_0",
        }
    }

    /// The dtype of safetensors. Errs on what they do not have.
    fn dtype(self) -> qtune::Result<candle_core::DType> {
        match self {
            Type::F32 => Ok(candle_core::DType::F32),
            Type::F16 => Ok(candle_core::DType::F16),
            Type::Bf16 => Ok(candle_core::DType::BF16),
            Type::Q8_0 | Type::Q4_0 => Err(Error::usage(format!(
                "--type {}: safetensors have f32, f16 and bf16; --to gguf has it",
                self.name()
            ))),
        }
    }

    fn encoding(self) -> Encoding {
        match self {
            Type::F32 => Encoding::F32,
            Type::F16 => Encoding::F16,
            Type::Bf16 => Encoding::Bf16,
            Type::Q8_0 => Encoding::Q8_0,
            Type::Q4_0 => Encoding::Q4_0,
        }
    }
}

/// What a result says beyond command, model and place.
struct Written {
    tensors: usize,
    bytes: u64,
    what: String,
    notes: Vec<String>,
}

impl Export {
    pub fn run(self) -> Result<()> {
        let progress = self.writing.start()?;
        let written = match (self.as_kind, self.to) {
            (Some(As::Lora), To::Safetensors) => self.lora()?,
            (Some(As::Lora), To::Gguf) => {
                let message =
                    "--as lora --to gguf: found an adapter, expected --to safetensors; --adapter folds one into a model";
                return Err(Error::usage(message).into());
            }
            (None, To::Safetensors) => self.plain()?,
            (None, To::Gguf) => self.gguf()?,
        };
        self.report(&written, &progress)
    }

    fn adapters(&self) -> qtune::Result<Vec<(PathBuf, Option<f64>)>> {
        self.adapter.iter().map(|given| adapter(given, None)).collect()
    }

    fn plain(&self) -> qtune::Result<Written> {
        let dtype = self.kind.map(Type::dtype).transpose()?;
        let dir = self.model_folder()?;
        let adapters = self.adapters()?;
        if adapters.is_empty() {
            let plain = export_plain(&dir, &self.out, dtype)?;
            let what = match plain.unpacked {
                0 => "a plain model".to_string(),
                n => format!("a plain model, {n} tensors unpacked"),
            };
            return Ok(Written { tensors: plain.tensors, bytes: plain.bytes, what, notes: Vec::new() });
        }
        let how = Merge { adapters, dtype, residual: ResidualBase::of(self.residual), ..Merge::default() };
        let merged = merge(&dir, &self.out, &how)?;
        let what = format!("a plain model, {} tensors changed by adapters", merged.changes.tensors);
        Ok(Written { tensors: merged.tensors, bytes: merged.bytes, what, notes: merged.notes })
    }

    fn gguf(&self) -> qtune::Result<Written> {
        let options = GgufOptions {
            encoding: self.kind.map(Type::encoding).unwrap_or_default(),
            adapters: self.adapters()?,
            residual: ResidualBase::of(self.residual),
            name: None,
        };
        let gguf = export_gguf(&self.model_folder()?, &self.out, &options)?;
        let kind = self.kind.map_or("f16", Type::name);
        let what = format!("GGUF of architecture {}, {kind}", gguf.architecture);
        Ok(Written { tensors: gguf.tensors, bytes: gguf.bytes, what, notes: gguf.notes })
    }

    /// The model's folder; an adapter in its place is told.
    fn model_folder(&self) -> qtune::Result<PathBuf> {
        let dir = folder_of(&self.model)?;
        let adapter = adapter_dir(&dir);
        if !dir.join("config.json").exists() && adapter.join("adapter_config.json").exists() {
            return Err(Error::usage(format!(
                "{}: found an adapter, expected a model: export its base with --adapter {}, or the adapter with --as lora",
                dir.display(),
                adapter.display()
            )));
        }
        Ok(dir)
    }

    /// `--as lora`.
    fn lora(&self) -> qtune::Result<Written> {
        let dtype = self.kind.map(Type::dtype).transpose()?;
        let (dir, _) = adapter(&self.model.to_string_lossy(), None)?;
        let found = Adapter::open(&dir)?;
        let base = match (&self.base, &found.config.base) {
            (Some(base), _) => base.clone(),
            (None, Some(named)) => PathBuf::from(named),
            (None, None) => {
                let message = "adapter_config.json names no base: give it with --base MODEL";
                return Err(Error::input(&dir, message));
            }
        };
        let base = self.base_folder(&base)?;
        let weights = open_weights(&base, &Device::Cpu)?;
        let modules = Modules::of(&read_config(&base)?.1, &weights)?;
        let (lora, notes) = found.as_lora(&weights, &modules)?;
        let how = Save { dtype: dtype.unwrap_or(Save::default().dtype), ..Save::default() };
        let bytes = lora.save(&self.out, &how)?;
        let notes = found.notes().iter().cloned().chain(notes).collect();
        let what = format!("plain LoRA of rank {}", lora.config.r());
        Ok(Written { tensors: lora.tensors().count(), bytes, what, notes })
    }

    fn base_folder(&self, base: &Path) -> qtune::Result<PathBuf> {
        folder_of(base).map_err(|error| match self.base {
            Some(_) => error,
            None => {
                let message =
                    format!("the base that the adapter names: {error}; give its place with --base MODEL");
                Error::input(&self.model, message)
            }
        })
    }

    fn report(&self, written: &Written, progress: &Lines) -> Result<()> {
        written.notes.iter().for_each(|note| progress.note(note));
        if self.writing.json {
            return print_json(&json!({
                "command": "export",
                "model": self.model.display().to_string(),
                "to": if self.to == To::Gguf { "gguf" } else { "safetensors" },
                "as": self.as_kind.map(|_| "lora"),
                "type": self.kind.map(Type::name),
                "out": self.out.display().to_string(),
                "tensors": written.tensors,
                "bytes": written.bytes,
                "notes": written.notes,
            }));
        }
        let size = bytes(written.bytes as usize);
        print(&format!("{}: {}, {} tensors, {size}", self.out.display(), written.what, written.tensors))
    }
}
