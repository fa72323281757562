//! Writing a checkpoint: one file, whole or not at all, its bytes a function of its tensors.

use super::header::MAX_HEADER;
use super::Dtype;
use crate::error::{Error, Result};
use crate::files::{write_atomic, WriteError};
use candle_core::{DType, Tensor};
use serde_json::Value;
use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::path::Path;

/// A tensor that is to be written, before its values are there.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// Its name.
    pub name: String,
    /// The dtype that it is stored in.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl Planned {
    /// Of a tensor as it is. Errs on dtypes that are not written (see [`save`]).
    pub fn of(name: &str, tensor: &Tensor) -> Result<Self> {
        Ok(Planned {
            name: name.to_string(),
            dtype: spelled(name, tensor.dtype())?,
            shape: tensor.dims().to_vec(),
        })
    }

    /// Bytes of its values.
    pub fn bytes(&self) -> u64 {
        let count: u64 = self.shape.iter().map(|&d| d as u64).product();
        count * self.dtype.bitsize() as u64 / 8
    }
}

/// The values of a planned tensor.
pub enum Piece<'a> {
    /// Of the planned dtype.
    Tensor(Tensor),
    /// As they lie in another file.
    Bytes(Cow<'a, [u8]>),
}

/// Writes `tensors` as one safetensors file, whole or not at all, and returns its size in bytes.
///
/// The bytes depend on the arguments alone. The order is kept, except that wider elements come
/// before narrower ones: readers that view the bytes in place need each tensor aligned.
///
/// Errs on a repeated name and on dtypes other than F64, F32, F16, BF16, I64, I32, I16, U32 and U8.
pub fn save(path: &Path, tensors: &[(String, Tensor)], metadata: &BTreeMap<String, String>) -> Result<u64> {
    let plan = tensors.iter().map(|(name, t)| Planned::of(name, t)).collect::<Result<Vec<_>>>()?;
    save_pieces(path, &plan, metadata, &mut |at| Ok(Piece::Tensor(tensors[at].1.clone())))
}

/// As [`save`], each tensor made only when it is written: `piece` is called once for each index into
/// `plan`, in the order of the file.
pub fn save_pieces<'a>(
    path: &Path,
    plan: &[Planned],
    metadata: &BTreeMap<String, String>,
    piece: &mut dyn FnMut(usize) -> Result<Piece<'a>>,
) -> Result<u64> {
    let mut seen = HashSet::new();
    for Planned { name, .. } in plan {
        if name == "__metadata__" || !seen.insert(name) {
            return Err(Error::tensor(name, "found twice (or reserved), expected a name of its own"));
        }
    }
    let mut order: Vec<usize> = (0..plan.len()).collect();
    order.sort_by_key(|&at| std::cmp::Reverse(plan[at].dtype.bitsize()));

    let quoted = |text: &str| Value::from(text).to_string();
    let mut parts = Vec::with_capacity(order.len() + 1);
    if !metadata.is_empty() {
        let pairs: Vec<String> =
            metadata.iter().map(|(k, v)| format!("{}:{}", quoted(k), quoted(v))).collect();
        parts.push(format!("\"__metadata__\":{{{}}}", pairs.join(",")));
    }
    let mut end = 0u64;
    for planned in order.iter().map(|&at| &plan[at]) {
        let begin = end;
        end += planned.bytes();
        let shape: Vec<String> = planned.shape.iter().map(usize::to_string).collect();
        parts.push(format!(
            "{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{begin},{end}]}}",
            quoted(&planned.name),
            planned.dtype,
            shape.join(",")
        ));
    }
    let mut header = format!("{{{}}}", parts.join(","));
    while header.len() % 8 != 0 {
        header.push(' ');
    }
    if header.len() as u64 > MAX_HEADER {
        return Err(Error::Fit(format!(
            "{}: a header of {} bytes, expected at most {MAX_HEADER}",
            path.display(),
            header.len()
        )));
    }
    write_atomic(path, |w| {
        w.write_all(&(header.len() as u64).to_le_bytes())?;
        w.write_all(header.as_bytes())?;
        for &at in &order {
            write_piece(w, &plan[at], piece(at)?)?;
        }
        Ok(())
    })?;
    Ok(8 + header.len() as u64 + end)
}

fn write_piece(w: &mut dyn Write, planned: &Planned, piece: Piece) -> Result<(), WriteError> {
    let name = &planned.name;
    let fits = match &piece {
        Piece::Tensor(tensor) => {
            tensor.dims() == planned.shape && spelled(name, tensor.dtype())? == planned.dtype
        }
        Piece::Bytes(bytes) => bytes.len() as u64 == planned.bytes(),
    };
    if !fits {
        return Err(Error::Run(format!("{name}: made another tensor than planned, {planned:?}")).into());
    }
    match piece {
        Piece::Tensor(tensor) => write_tensor(w, name, &tensor),
        Piece::Bytes(bytes) => Ok(w.write_all(&bytes)?),
    }
}

/// The name of a dtype in files.
fn spelled(name: &str, dtype: DType) -> Result<Dtype> {
    Ok(match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        DType::I32 => Dtype::I32,
        DType::I16 => Dtype::I16,
        DType::U32 => Dtype::U32,
        DType::U8 => Dtype::U8,
        other => {
            let message = format!(
                "found dtype {}, expected f64, f32, f16, bf16, i64, i32, i16, u32 or u8",
                other.as_str()
            );
            return Err(Error::tensor(name, message));
        }
    })
}

/// Writes a tensor's elements in row-major order, little-endian.
fn write_tensor(w: &mut dyn Write, name: &str, tensor: &Tensor) -> Result<(), WriteError> {
    fn elements<T: candle_core::WithDType, const N: usize>(
        w: &mut dyn Write,
        tensor: &Tensor,
        bytes_of: impl Fn(T) -> [u8; N],
    ) -> Result<(), WriteError> {
        let values = tensor.flatten_all()?.to_vec1::<T>()?;
        let mut buffer = Vec::with_capacity(N << 16);
        for block in values.chunks(1 << 16) {
            buffer.clear();
            block.iter().for_each(|&v| buffer.extend_from_slice(&bytes_of(v)));
            w.write_all(&buffer)?;
        }
        Ok(())
    }
    let written = match tensor.dtype() {
        DType::F64 => elements(w, tensor, f64::to_le_bytes),
        DType::F32 => elements(w, tensor, f32::to_le_bytes),
        DType::F16 => elements(w, tensor, half::f16::to_le_bytes),
        DType::BF16 => elements(w, tensor, half::bf16::to_le_bytes),
        DType::I64 => elements(w, tensor, i64::to_le_bytes),
        DType::I32 => elements(w, tensor, i32::to_le_bytes),
        DType::I16 => elements(w, tensor, i16::to_le_bytes),
        DType::U32 => elements(w, tensor, u32::to_le_bytes),
        DType::U8 => elements(w, tensor, u8::to_le_bytes),
        other => spelled(name, other).map(|_| ()).map_err(WriteError::from),
    };
    written.map_err(|e| match e {
        WriteError::Other(Error::Candle(source)) => Error::On { name: name.to_string(), source }.into(),
        other => other,
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::file_of;
    use super::super::Checkpoint;
    use super::*;
    use candle_core::Device;

    #[test]
    fn bytes_are_those_of_the_format_and_repeat() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let cpu = &Device::Cpu;
        let tensors = [
            ("b".to_string(), Tensor::new(&[7u8, 8, 9], cpu).unwrap()),
            ("a".to_string(), Tensor::new(&[1f32], cpu).unwrap()),
        ];
        save(&path, &tensors, &BTreeMap::new()).unwrap();
        // The wide one first, so that it is aligned.
        let header = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[3],"data_offsets":[4,7]}}"#;
        let padded = format!("{header:width$}", width = header.len().next_multiple_of(8));
        let expected = file_of(&padded, &[0, 0, 0x80, 0x3f, 7, 8, 9]);
        let first = std::fs::read(&path).unwrap();
        assert_eq!(first, expected);
        save(&path, &tensors, &BTreeMap::new()).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), first);
        // The format's own crate reads it too.
        let read = safetensors::SafeTensors::deserialize(&first).unwrap();
        assert_eq!(read.tensor("b").unwrap().data(), [7, 8, 9]);
        // Order is kept among equals: "b" before "a".
        let equal = [tensors[0].clone(), ("a".to_string(), Tensor::new(&[1u8], cpu).unwrap())];
        save(&path, &equal, &BTreeMap::new()).unwrap();
        assert_eq!(Checkpoint::open(&path).unwrap().names().collect::<Vec<_>>(), ["b", "a"]);
        let twice = [tensors[0].clone(), tensors[0].clone()];
        assert!(save(&path, &twice, &BTreeMap::new()).unwrap_err().to_string().contains("tensor b"));
    }
}
