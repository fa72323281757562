//! Writing a checkpoint: one file, whole or not at all, its bytes a function of its tensors.

use super::header::MAX_HEADER;
use crate::error::{Error, Result};
use crate::files::{write_atomic, WriteError};
use candle_core::{DType, Tensor};
use serde_json::Value;
use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::path::Path;

/// Writes `tensors` as one safetensors file, whole or not at all, and returns its size in bytes.
///
/// The bytes depend on the arguments alone. The order is kept, except that wider elements come
/// before narrower ones: readers that view the bytes in place need each tensor aligned.
///
/// Errs on a repeated name and on dtypes other than F64, F32, F16, BF16, I64, I32, I16, U32 and U8.
pub fn save(path: &Path, tensors: &[(String, Tensor)], metadata: &BTreeMap<String, String>) -> Result<u64> {
    let mut seen = HashSet::new();
    let mut order = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        if name == "__metadata__" || !seen.insert(name) {
            return Err(Error::tensor(name, "found twice (or reserved), expected a name of its own"));
        }
        order.push((name, tensor, spelled(name, tensor.dtype())?));
    }
    order.sort_by_key(|(_, tensor, _)| std::cmp::Reverse(tensor.dtype().size_in_bytes()));

    let quoted = |text: &str| Value::from(text).to_string();
    let mut parts = Vec::with_capacity(order.len() + 1);
    if !metadata.is_empty() {
        let pairs: Vec<String> =
            metadata.iter().map(|(k, v)| format!("{}:{}", quoted(k), quoted(v))).collect();
        parts.push(format!("\"__metadata__\":{{{}}}", pairs.join(",")));
    }
    let mut end = 0u64;
    for (name, tensor, dtype) in &order {
        let begin = end;
        end += (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64;
        let shape: Vec<String> = tensor.dims().iter().map(usize::to_string).collect();
        parts.push(format!(
            "{}:{{\"dtype\":\"{dtype}\",\"shape\":[{}],\"data_offsets\":[{begin},{end}]}}",
            quoted(name),
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
        order.iter().try_for_each(|(name, tensor, _)| write_tensor(w, name, tensor))
    })?;
    Ok(8 + header.len() as u64 + end)
}

fn spelled(name: &str, dtype: DType) -> Result<&'static str> {
    Ok(match dtype {
        DType::F64 => "F64",
        DType::F32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        DType::I64 => "I64",
        DType::I32 => "I32",
        DType::I16 => "I16",
        DType::U32 => "U32",
        DType::U8 => "U8",
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
