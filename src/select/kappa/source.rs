//! Where the numbers of a unit come from: the best copy of a weight at hand, one matrix of it at a time.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use candle_core::{DType, Tensor};
use half::{bf16, f16};
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::stored::{Float, Matrix};
use super::units::Unit;
use crate::weights::{Checkpoint, Expr, Weight, Weights};
use crate::{Error, On, Result};

/// The numbers of one unit.
pub struct Numbers {
    bytes: Vec<u8>,
    float: Float,
    rows: usize,
    cols: usize,
    /// What they were stored as: a dtype, or so many bits of a packed weight.
    pub source: String,
}

impl Numbers {
    /// Them as a matrix.
    pub fn matrix(&self) -> Matrix<'_> {
        Matrix { bytes: &self.bytes, float: self.float, rows: self.rows, cols: self.cols }
    }
}

/// Reads units of a store.
pub struct Source<'a> {
    weights: &'a Weights,
    allow_quantized: bool,
    headers: Mutex<BTreeMap<PathBuf, Header>>,
}

/// Where the tensors of a file of safetensors lie, in bytes from its start.
type Header = BTreeMap<String, (u64, usize)>;

impl<'a> Source<'a> {
    /// Over `weights`; packed ones are refused unless `allow_quantized`.
    pub fn new(weights: &'a Weights, allow_quantized: bool) -> Self {
        Source { weights, allow_quantized, headers: Mutex::default() }
    }

    /// The numbers of a unit. Of a weight under a quantizer or an adapter they are those beneath: kappa is a matter
    /// of the weights that were learned before.
    ///
    /// Errs on a packed weight that is not allowed, on numbers that are no floats, and on a file that cannot be
    /// read.
    pub fn read(&self, unit: &Unit) -> Result<Numbers> {
        let mut weight = self.weights.get(&unit.param)?;
        while let Some(inner) = weight.before() {
            weight = inner;
        }
        match weight.expr() {
            Expr::Stored { checkpoint, name, .. } => self.stored(unit, weight, checkpoint, name),
            Expr::Packed(packed) => {
                let bits = packed.grid().bits;
                if !self.allow_quantized {
                    return Err(Error::tensor(
                        &unit.param,
                        format!(
                            "found {bits} bits packed, whose condition number is mostly rounding, expected 16 bits or more; \
                             --allow-quantized-kappa takes it"
                        ),
                    ));
                }
                dense(unit, &weight.tensor()?, Some(format!("{bits} bits")))
            }
            _ => dense(unit, &weight.tensor()?.detach(), None),
        }
    }

    /// Bytes that the numbers of a unit take while they are read: those of the file, or of the copies of a tensor.
    pub fn bytes(&self, unit: &Unit) -> usize {
        let mut weight = self.weights.get(&unit.param).ok();
        while let Some(inner) = weight.and_then(Weight::before) {
            weight = Some(inner);
        }
        let each = match weight.map(Weight::expr) {
            Some(Expr::Stored { checkpoint, name, .. }) => float(checkpoint.dtype(name)).map(Float::size),
            // Its numbers once as a list and once as bytes.
            Some(Expr::Dense(tensor)) => Some(2 * tensor.dtype().size_in_bytes()),
            _ => None,
        };
        // What is decoded is there as a tensor of f32 too.
        each.unwrap_or(12) * unit.numel()
    }

    fn stored(&self, unit: &Unit, weight: &Weight, checkpoint: &Checkpoint, name: &str) -> Result<Numbers> {
        let float = match (checkpoint.dtype(name), float(checkpoint.dtype(name))) {
            (_, Some(float)) => float,
            (Some(Dtype::F8_E4M3), _) if self.allow_quantized => {
                return dense(unit, &weight.tensor()?, Some("f8_e4m3".into()));
            }
            (other, _) => {
                let found = other.map(|d| format!("{d:?}")).unwrap_or_default();
                let hint = if found == "F8_E4M3" { "; --allow-quantized-kappa takes it" } else { "" };
                let message = format!("found dtype {found}, expected F64, F32, F16 or BF16{hint}");
                return Err(Error::tensor(&unit.param, message));
            }
        };
        let length = unit.numel() * float.size();
        let skip = unit.index.unwrap_or(0) * length;
        let bytes = match self.place(checkpoint, name)? {
            // Read, not mapped: pages of a map would stay with the process, and a model may be larger than memory.
            Some((path, start)) => read_at(&path, start + skip as u64, length)?,
            None => match checkpoint.raw(name)? {
                Cow::Borrowed(all) => part(unit, all, skip, length)?.to_vec(),
                Cow::Owned(all) => part(unit, &all, skip, length)?.to_vec(),
            },
        };
        let source = float.name().to_string();
        Ok(Numbers { bytes, float, rows: unit.rows, cols: unit.cols, source })
    }

    /// The file of a tensor and where in it its bytes begin; `None` where it is not one of safetensors.
    fn place(&self, checkpoint: &Checkpoint, name: &str) -> Result<Option<(PathBuf, u64)>> {
        let Some(path) = checkpoint.file_of(name) else { return Ok(None) };
        if path.extension().is_none_or(|e| e != "safetensors") {
            return Ok(None);
        }
        let mut headers = self.headers.lock().unwrap_or_else(|e| e.into_inner());
        if !headers.contains_key(path) {
            headers.insert(path.to_path_buf(), header(path)?);
        }
        let found = headers.get(path).and_then(|h| h.get(name));
        let same = found.filter(|(_, length)| checkpoint.bytes(name) == Some(*length));
        match same {
            Some((start, _)) => Ok(Some((path.to_path_buf(), *start))),
            None => Err(Error::input(path, format!("tensor {name}: it was changed since it was opened"))),
        }
    }
}

/// A dtype of files that is read as it lies there.
fn float(dtype: Option<Dtype>) -> Option<Float> {
    match dtype? {
        Dtype::F64 => Some(Float::F64),
        Dtype::F32 => Some(Float::F32),
        Dtype::F16 => Some(Float::F16),
        Dtype::BF16 => Some(Float::Bf16),
        _ => None,
    }
}

/// The bytes of a unit among those of its tensor.
fn part<'b>(unit: &Unit, all: &'b [u8], skip: usize, length: usize) -> Result<&'b [u8]> {
    let found = all.len();
    all.get(skip..skip + length).ok_or_else(|| {
        Error::tensor(
            &unit.param,
            format!("found {found} bytes, expected {} for {}", skip + length, unit.key()),
        )
    })
}

fn read_at(path: &Path, start: u64, length: usize) -> Result<Vec<u8>> {
    let io = |e| Error::io(path, e);
    let mut file = File::open(path).map_err(io)?;
    file.seek(SeekFrom::Start(start)).map_err(io)?;
    let mut bytes = vec![0; length];
    file.read_exact(&mut bytes).map_err(io)?;
    Ok(bytes)
}

/// Where a tensor's bytes lie behind the header; the rest of an entry is [`Checkpoint`]'s business.
#[derive(Deserialize)]
struct Place {
    data_offsets: (u64, u64),
}

/// The header of a file that [`Checkpoint`] has found sound.
fn header(path: &Path) -> Result<Header> {
    let wrong = |e: serde_json::Error| Error::input(path, e.to_string());
    let length = read_at(path, 0, 8)?.iter().rev().fold(0u64, |n, b| (n << 8) | u64::from(*b));
    let on_disk = std::fs::metadata(path).map_err(|e| Error::io(path, e))?.len();
    if length > on_disk {
        return Err(Error::input(path, format!("found a header of {length} bytes in a file of {on_disk}")));
    }
    let mut entries: Map<String, Value> =
        serde_json::from_slice(&read_at(path, 8, length as usize)?).map_err(wrong)?;
    entries.remove("__metadata__");
    let mut header = Header::new();
    for (name, entry) in entries {
        let Place { data_offsets: (from, to) } = serde_json::from_value(entry).map_err(wrong)?;
        header.insert(name, (8 + length + from, to.saturating_sub(from) as usize));
    }
    Ok(header)
}

/// The numbers of a unit of a tensor in memory; `source` in place of its dtype.
fn dense(unit: &Unit, tensor: &Tensor, source: Option<String>) -> Result<Numbers> {
    let name = &unit.param;
    let mut flat = tensor.flatten_all().on(name)?;
    if unit.index.is_some() || flat.elem_count() != unit.numel() {
        let from = unit.index.unwrap_or(0) * unit.numel();
        flat = flat.narrow(0, from, unit.numel()).on(name)?;
    }
    let (float, bytes): (Float, Vec<u8>) = match flat.dtype() {
        DType::F64 => {
            (Float::F64, flat.to_vec1::<f64>().on(name)?.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
        DType::F16 => {
            (Float::F16, flat.to_vec1::<f16>().on(name)?.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
        DType::BF16 => {
            (Float::Bf16, flat.to_vec1::<bf16>().on(name)?.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
        _ => {
            let wide = flat.to_dtype(DType::F32).on(name)?;
            (Float::F32, wide.to_vec1::<f32>().on(name)?.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
    };
    let source = source.unwrap_or_else(|| float.name().to_string());
    Ok(Numbers { bytes, float, rows: unit.rows, cols: unit.cols, source })
}
