//! The model that stands beside another: a packed copy of a dense one, a dense copy of a packed one.

use std::path::{Path, PathBuf};

use candle_core::Device;
use toml::Value;

use super::is_language;
use crate::export::export_plain;
use crate::recipe::{put, Recipe};
use crate::train::Progress;
use crate::weights::format::QuantizationConfig;
use crate::{language, models, quantize, Error, Result};

/// A folder for copies, gone with everything in it when it is dropped.
#[derive(Debug)]
pub struct Scratch {
    dir: PathBuf,
}

impl Scratch {
    /// A new folder in the system's folder for temporary files (`TMPDIR`).
    pub fn new() -> Result<Self> {
        let above = std::env::temp_dir();
        for n in 0..1000 {
            let dir = above.join(format!("qtune-bench-{}-{n}", std::process::id()));
            match std::fs::create_dir(&dir) {
                Ok(()) => return Ok(Scratch { dir }),
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(Error::io(&dir, e)),
            }
        }
        Err(Error::Run(format!("{}: found no free name for a temporary folder", above.display())))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed is left to the system: there is nobody to tell.
        drop(std::fs::remove_dir_all(&self.dir));
    }
}

/// Whether the model in the folder `dir` is packed.
pub fn is_packed(dir: &Path) -> Result<bool> {
    if !dir.join("config.json").exists() {
        return Ok(false);
    }
    let (path, json) = models::read_config(dir)?;
    Ok(QuantizationConfig::read(&path, &json)?.is_some())
}

/// Packs the model in the folder `dir` to `bits` bits without training, as `qtune quantize --steps 0` does, into a
/// folder within `scratch`, which is returned.
pub fn packed_copy(
    dir: &Path,
    bits: u8,
    allow_pickle: bool,
    scratch: &Scratch,
    progress: &dyn Progress,
) -> Result<PathBuf> {
    let text = is_language(dir);
    let mut table = Recipe::table(if text { "llama-w2" } else { "vit-w2a32" })?;
    let mut set = |key: &str, value: Value| {
        put(&mut table, key, value).map_err(|what| Error::usage(format!("{key}: {what}")))
    };
    set("transform.0.bits", Value::Integer(i64::from(bits)))?;
    set("model.path", Value::String(dir.to_string_lossy().into_owned()))?;
    if allow_pickle {
        set("model.allow_pickle", Value::Boolean(true))?;
    }
    if let Some(Value::Array(phases)) = table.get_mut("phase") {
        for phase in phases.iter_mut().filter_map(Value::as_table_mut) {
            phase.remove("epochs");
            phase.remove("warmup_epochs");
            phase.insert("steps".into(), Value::Integer(0));
        }
    }
    let recipe = Recipe::resolve(table)?;
    let out = scratch.path().join(format!("packed-{bits}"));
    std::fs::create_dir_all(&out).map_err(|e| Error::io(&out, e))?;
    // Packing is the same work wherever it is done, and packed models are read to any device.
    match text {
        true => language::run(&recipe, &out, &Device::Cpu, progress)?,
        false => quantize::run(&recipe, &out, &Device::Cpu, progress)?,
    };
    Ok(out.join("model"))
}

/// Writes the packed language model in the folder `dir` as the dense f32 values that it stands for, into a folder
/// within `scratch`, which is returned.
pub fn dense_copy(dir: &Path, scratch: &Scratch) -> Result<PathBuf> {
    let out = scratch.path().join("dense");
    Ok(export_plain(dir, &out, None)?.dir)
}
