//! Adapters folded into their base: a plain model directory that needs no adapter (adapters.md section 7).
//!
//! The model is written tensor by tensor: what no adapter touches is copied byte for byte, what one does
//! touch is computed in f32 and rounded once to the dtype it is stored in. No more than one dense tensor
//! of the model is in memory at a time.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use serde_json::{json, Value};

use super::attach::{Attach, Residual};
use super::change::{Changes, Compare, Rounding};
use super::files::Adapter;
use super::modules::{shape_of, Modules};
use super::record::{copy, plain_files, Record, RECORD};
use crate::files::{write_bytes, Staging};
use crate::models::read_config;
use crate::transform::OnGrid;
use crate::weights::checkpoint::{save_model_pieces, Dtype, Piece, Planned};
use crate::weights::format::QuantizationConfig;
use crate::weights::{Checkpoint, Expr, Packed, Weight, Weights};
use crate::{Error, On, Result};

/// What a packed base becomes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Onto {
    /// A dense model of the values that the codes stand for, and the adapters' change on them: exact.
    #[default]
    Dense,
    /// Packed again on the same grids, with new steps: the size stays, the change is rounded.
    Requantize,
}

/// How adapters are merged.
#[derive(Clone, Debug)]
pub struct Merge {
    /// The adapters' folders in order, each with a factor on its change (1 where `None`).
    pub adapters: Vec<(PathBuf, Option<f64>)>,
    /// What a packed base becomes.
    pub onto: Onto,
    /// The dtype of all floating-point tensors: `None`, that of the base (f32 of a packed one).
    pub dtype: Option<DType>,
    /// What to make of adapters whose start was taken out of the base.
    pub residual: Residual,
    /// Bytes of a shard, at most; a larger tensor is a shard of its own.
    pub shard: u64,
}

impl Default for Merge {
    fn default() -> Self {
        Merge {
            adapters: Vec::new(),
            onto: Onto::Dense,
            dtype: None,
            residual: Residual::Refuse,
            shard: 5_000_000_000,
        }
    }
}

/// What merging did.
#[derive(Clone, Debug)]
pub struct Merged {
    /// The folder.
    pub dir: PathBuf,
    /// Tensors of the model.
    pub tensors: usize,
    /// Bytes of its safetensors files.
    pub bytes: u64,
    /// What changed, and by how much.
    pub changes: Changes,
    /// What packing again lost, where it was asked for.
    pub rounding: Option<Rounding>,
    /// What is worth a line.
    pub notes: Vec<String>,
}

/// Everything that writing a merged model asks.
struct Source {
    checkpoint: Arc<Checkpoint>,
    quantization: Option<QuantizationConfig>,
    base: Weights,
    merged: Weights,
    /// Names of a table and of the head that shares it.
    tied: Option<(String, String)>,
    onto: Onto,
    dtype: Option<DType>,
}

/// What a tensor of the merged file is.
enum Origin {
    /// Bytes of the base's file.
    Copied(String),
    /// A weight, computed.
    Weight(String),
    /// Codes (`true`) or steps of a weight that is packed again.
    Packed(String, bool),
}

/// Merges adapters into the model in the folder `base` and writes the folder `out`, which must not
/// exist, whole or not at all.
///
/// Errs where an adapter does not fit, or is merged already; where no tensor changes; on a packed base
/// with quantized activations, which were trained for the weights as they are.
pub fn merge(base: &Path, out: &Path, how: &Merge) -> Result<Merged> {
    let (config_path, config) = read_config(base)?;
    let mut notes = Vec::new();
    let mut adapters = Vec::with_capacity(how.adapters.len());
    for (dir, scale) in &how.adapters {
        let adapter = Adapter::open(dir)?;
        notes.extend(adapter.notes().iter().cloned());
        adapters.push((adapter, scale.unwrap_or(1.0)));
    }
    if adapters.is_empty() {
        return Err(Error::usage("merge: no adapter given, expected one or more"));
    }
    let checkpoint = Arc::new(Checkpoint::open(base)?);
    let before = Record::read(base)?;
    let mut record = Record::new(base, &checkpoint, &adapters, before.as_ref())?;
    let quantization = QuantizationConfig::read(&config_path, &config)?;
    let weights = open(base, quantization.as_ref(), &checkpoint)?;
    let modules = Modules::of(&config, &weights)?;
    let mut source = Source {
        checkpoint,
        base: weights.clone(),
        merged: weights,
        tied: modules.tied().map(|(table, head)| (format!("{table}.weight"), format!("{head}.weight"))),
        onto: if quantization.is_some() { how.onto } else { Onto::Dense },
        quantization,
        dtype: how.dtype,
    };
    let mut untied = false;
    for (adapter, scale) in &adapters {
        let attach = Attach { training: None, scale: Some(*scale), residual: how.residual };
        let attached = adapter.put(&mut source.merged, &modules, &attach, true)?;
        untied |= attached.untied;
        notes.extend(attached.notes);
    }
    let plan = source.plan()?;
    let staging = Staging::new(out)?;
    let compare = RefCell::new(Compare::default());
    let bytes = source.write(staging.path(), &plan, how.shard, &compare)?;
    let compare = compare.into_inner();
    let changes = compare.changes();
    if changes.tensors == 0 {
        return Err(Error::usage(format!(
            "merge: no tensor of {} changed: the adapter is zero, or less than the rounding of the stored dtype",
            base.display()
        )));
    }
    notes.extend(compare.notes());
    if source.quantization.is_some() && source.onto == Onto::Dense {
        notes.push(
            "merged onto the values that the packed base stands for, not onto the model it was packed from"
                .into(),
        );
    }
    match source.config(&config, &modules, untied)? {
        None => copy(&config_path, staging.path())?,
        Some(changed) => {
            let text =
                serde_json::to_vec_pretty(&changed).map_err(|e| Error::Run(format!("config.json: {e}")))?;
            write_bytes(&staging.path().join("config.json"), &text)?;
        }
    }
    for path in plain_files(base)? {
        if travels(&path) {
            copy(&path, staging.path())?;
        }
    }
    if source.onto == Onto::Requantize {
        record.onto = "requantize".to_string();
    }
    record.write(staging.path())?;
    let dir = staging.commit()?;
    Ok(Merged { dir, tensors: plan.len(), bytes, changes, rounding: compare.rounding(), notes })
}

/// The base's weights, each on disk until it is asked for; packed ones as codes.
fn open(
    dir: &Path,
    quantization: Option<&QuantizationConfig>,
    checkpoint: &Arc<Checkpoint>,
) -> Result<Weights> {
    let Some(quantization) = quantization else {
        return Ok(Weights::from_checkpoint(checkpoint.clone(), &Device::Cpu));
    };
    let refuse = || {
        Error::input(dir, "the base quantizes activations too, with steps trained for its weights: merge into the model it was trained from")
    };
    if !quantization.activations.is_empty() {
        return Err(refuse());
    }
    quantization.open(checkpoint, &Device::Cpu, &|_, _, _| Err(refuse()))
}

/// Whether a file beside the weights goes along as it is.
fn travels(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let weights = ["safetensors", "bin", "pt", "pth", "ckpt", "gguf", "h5", "msgpack", "onnx"];
    let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
    !(weights.contains(&extension.as_str())
        || name.ends_with(".index.json")
        || name == "config.json"
        || name == RECORD
        || name == super::files::CONFIG)
}

impl Source {
    /// What the base calls the tensor that the merged model calls `name`: a head that came apart was its
    /// table.
    fn origin<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        match &self.tied {
            _ if self.base.contains(name) => Some(name),
            Some((table, head)) if head == name => Some(table),
            _ => None,
        }
    }

    /// The base's weight behind the merged model's.
    fn before(&self, name: &str) -> Option<&Weight> {
        self.base.get(self.origin(name)?).ok()
    }

    fn touched(&self, name: &str) -> Result<bool> {
        let now = self.merged.get(name)?;
        Ok(!self.before(name).is_some_and(|before| std::ptr::eq(before.expr(), now.expr())))
    }

    /// Every tensor of the merged file: what it is, and its name, dtype and shape.
    fn plan(&self) -> Result<Vec<(Origin, Planned)>> {
        let mut plan = Vec::new();
        for (name, weight) in self.merged.iter() {
            let packed = matches!(self.before(name).map(Weight::expr), Some(Expr::Packed(_)));
            let touched = self.touched(name)?;
            // A head that came apart from a packed table has no codes of its own: it becomes dense.
            if packed && self.onto == Onto::Requantize && self.base.contains(name) {
                let (found, expected) = (shape_of(weight)?, self.base.get(name)?.shape()?);
                if found != expected {
                    let message = format!(
                        "found shape {found:?}, expected {expected:?} to pack again: merge onto a dense model"
                    );
                    return Err(Error::tensor(name, message));
                }
                for (part, codes) in [("codes", true), ("scale", false)] {
                    let stored = format!("{name}.{part}");
                    let planned = self.stored(&stored)?;
                    let origin = match touched {
                        true => Origin::Packed(name.to_string(), codes),
                        false => Origin::Copied(stored),
                    };
                    plan.push((origin, planned));
                }
                continue;
            }
            // What was packed becomes f32.
            let origin = self.origin(name).unwrap_or(name);
            let stored = self.checkpoint.dtype(origin).unwrap_or(Dtype::F32);
            let dtype = match (float(stored), self.dtype) {
                (true, Some(asked)) => spelled(asked)?,
                _ => stored,
            };
            if !touched && !packed && dtype == stored {
                let planned = Planned { name: name.to_string(), ..self.stored(origin)? };
                plan.push((Origin::Copied(origin.to_string()), planned));
                continue;
            }
            if !matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F64) {
                let message =
                    format!("found {dtype}, expected F32, BF16, F16 or F64 of a tensor to merge into");
                return Err(Error::tensor(name, message));
            }
            let planned = Planned { name: name.to_string(), dtype, shape: shape_of(weight)? };
            plan.push((Origin::Weight(name.to_string()), planned));
        }
        Ok(plan)
    }

    /// A tensor of the base's file as it is.
    fn stored(&self, name: &str) -> Result<Planned> {
        match (self.checkpoint.dtype(name), self.checkpoint.shape(name)) {
            (Some(dtype), Some(shape)) => {
                Ok(Planned { name: name.to_string(), dtype, shape: shape.to_vec() })
            }
            _ => Err(Error::tensor(name, "not in the base's file")),
        }
    }

    fn write(
        &self,
        dir: &Path,
        plan: &[(Origin, Planned)],
        shard: u64,
        compare: &RefCell<Compare>,
    ) -> Result<u64> {
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        let planned: Vec<Planned> = plan.iter().map(|(_, planned)| planned.clone()).collect();
        // Codes and steps are made together and written apart.
        let mut kept: HashMap<(String, bool), Tensor> = HashMap::new();
        let mut piece = |at: usize| -> Result<Piece<'_>> {
            let (origin, planned) = &plan[at];
            match origin {
                Origin::Copied(name) => Ok(Piece::Bytes(self.checkpoint.raw(name)?)),
                Origin::Weight(name) => {
                    let (tensor, wide) = self.weight(name, planned.dtype)?;
                    let before = self.before(name).filter(|_| self.touched(name).unwrap_or(true));
                    if let Some(before) = before {
                        compare.borrow_mut().changed(name, &before.tensor()?, &wide)?;
                    }
                    Ok(Piece::Tensor(tensor))
                }
                Origin::Packed(name, codes) => {
                    if let Some(made) = kept.remove(&(name.clone(), *codes)) {
                        return Ok(Piece::Tensor(made));
                    }
                    let (own, other) = self.packed(name, *codes, &mut compare.borrow_mut())?;
                    kept.insert((name.clone(), !codes), other);
                    Ok(Piece::Tensor(own))
                }
            }
        };
        save_model_pieces(dir, &planned, &metadata, shard, &mut piece)
    }

    /// A merged weight in the dtype it is stored in, and what that dtype holds of it, in f32.
    fn weight(&self, name: &str, dtype: Dtype) -> Result<(Tensor, Tensor)> {
        let value = self.merged.get(name)?.tensor()?.detach();
        let dtype = of_file(dtype);
        let tensor = value.to_dtype(dtype).on(name)?;
        let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let wide = tensor.to_dtype(wide).on(name)?;
        crate::weights::checkpoint::check_finite(name, &wide)?;
        Ok((tensor, wide.to_dtype(DType::F32).on(name)?))
    }

    /// Codes and steps of a merged weight, the asked-for one first, on the grid it was packed on.
    fn packed(&self, name: &str, codes_first: bool, compare: &mut Compare) -> Result<(Tensor, Tensor)> {
        let exact = self.merged.get(name)?.tensor()?.detach().to_dtype(DType::F32).on(name)?;
        crate::weights::checkpoint::check_finite(name, &exact)?;
        let Some(Expr::Packed(old)) = self.before(name).map(|w| w.expr()) else {
            return Err(Error::Run(format!("{name}: packed in the file, and not here")));
        };
        let rule = OnGrid::fit(old.grid(), old.rows().groups().group(), &exact)?;
        let weight = Weight::dense(exact.clone()).wrap(Arc::new(rule));
        let Some(quantized) = weight.quantize()? else {
            return Err(Error::Run(format!("{name}: its grid packs nothing")));
        };
        let packed = Packed::pack(&quantized)?;
        compare.requantized(name, &old.tensor()?, &exact, &packed.tensor()?)?;
        let (codes, scale) = packed.to_tensors()?;
        Ok(if codes_first { (codes, scale) } else { (scale, codes) })
    }

    /// config.json where it has to change; `None` where it does not.
    fn config(&self, config: &Value, modules: &Modules, untied: bool) -> Result<Option<Value>> {
        let mut changed = config.clone();
        let Some(keys) = changed.as_object_mut() else { return Ok(None) };
        let rows = |weights: &Weights, path: Option<&str>| -> Result<Option<usize>> {
            let name = path.map(|path| format!("{path}.weight"));
            match name.filter(|name| weights.contains(name)) {
                Some(name) => Ok(shape_of(weights.get(&name)?)?.first().copied()),
                None => Ok(None),
            }
        };
        let (table, head) = (rows(&self.merged, modules.tokens())?, rows(&self.merged, modules.head())?);
        if let (Some(table), Some(head)) = (table, head) {
            if table != head {
                return Err(Error::usage(format!(
                    "merge: the table of tokens has {table} rows and the head {head}: expected the same"
                )));
            }
        }
        if untied {
            keys.insert("tie_word_embeddings".into(), json!(false));
        }
        if let Some(table) = table.filter(|_| keys.contains_key("vocab_size")) {
            if rows(&self.base, modules.tokens())? != Some(table) {
                keys.insert("vocab_size".into(), json!(table));
            }
        }
        let dense = self.quantization.is_some() && self.onto == Onto::Dense;
        if dense {
            keys.remove("quantization_config");
        }
        if dense || self.dtype.is_some() {
            let name = match self.dtype.unwrap_or(DType::F32) {
                DType::BF16 => "bfloat16",
                DType::F16 => "float16",
                DType::F64 => "float64",
                _ => "float32",
            };
            let mut known = false;
            for key in ["dtype", "torch_dtype"] {
                if keys.contains_key(key) {
                    keys.insert(key.into(), json!(name));
                    known = true;
                }
            }
            if !known {
                keys.insert("torch_dtype".into(), json!(name));
            }
        }
        Ok((changed != *config).then_some(changed))
    }
}

fn float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::BF16 | Dtype::F16)
}

fn spelled(dtype: DType) -> Result<Dtype> {
    match dtype {
        DType::F32 => Ok(Dtype::F32),
        DType::BF16 => Ok(Dtype::BF16),
        DType::F16 => Ok(Dtype::F16),
        DType::F64 => Ok(Dtype::F64),
        other => Err(Error::usage(format!("dtype {}: expected f32, bf16 or f16", other.as_str()))),
    }
}

fn of_file(dtype: Dtype) -> DType {
    match dtype {
        Dtype::BF16 => DType::BF16,
        Dtype::F16 => DType::F16,
        Dtype::F64 => DType::F64,
        _ => DType::F32,
    }
}
