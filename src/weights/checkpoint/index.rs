//! Models in shards, and the index that says which file holds which tensor.

use super::header::{Pairs, MAX_HEADER};
use super::save::{save_pieces, Piece, Planned};
use super::shown;
use crate::error::{Error, Result};
use crate::files::write_bytes;
use candle_core::Tensor;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// The `weight_map` of an index: tensor name and shard file name, in the order of the file.
///
/// Errs when a shard's name is anything but a plain file name, so that no index reaches outside its
/// own folder.
pub(crate) fn read_index(path: &Path) -> Result<Vec<(String, String)>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: Pairs,
    }
    let length = std::fs::metadata(path).map_err(|e| Error::io(path, e))?.len();
    if length > MAX_HEADER {
        let message = format!("found an index of {length} bytes, expected at most {MAX_HEADER}");
        return Err(Error::input(path, message));
    }
    let text = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let index: Index = serde_json::from_slice(&text)
        .map_err(|e| Error::input(path, format!("not an index with a weight_map: {e}")))?;
    index.weight_map.check_unique(path)?;
    let plain = |name: &str| {
        !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', ':', '\0'])
    };
    let mut pairs = Vec::with_capacity(index.weight_map.0.len());
    for (name, shard) in index.weight_map.0 {
        match shard {
            Value::String(shard) if plain(&shard) => pairs.push((name, shard)),
            other => {
                let found = shown(&other.to_string());
                let message = format!("tensor {}: found shard {found}, expected a file name", shown(&name));
                return Err(Error::input(path, message));
            }
        }
    }
    if pairs.is_empty() {
        return Err(Error::input(path, "found an empty weight_map, expected tensor names and shards"));
    }
    Ok(pairs)
}

/// Writes `tensors` into the folder `dir`: as `model.safetensors` where they take at most `limit` bytes,
/// else as shards of at most that (a larger tensor is a shard of its own) with
/// `model.safetensors.index.json` beside them, named as Hugging Face names them. Returns the bytes of
/// the safetensors files.
pub fn save_model(
    dir: &Path,
    tensors: &[(String, Tensor)],
    metadata: &BTreeMap<String, String>,
    limit: u64,
) -> Result<u64> {
    let plan = tensors.iter().map(|(name, t)| Planned::of(name, t)).collect::<Result<Vec<_>>>()?;
    save_model_pieces(dir, &plan, metadata, limit, &mut |at| Ok(Piece::Tensor(tensors[at].1.clone())))
}

/// As [`save_model`], each tensor made only when it is written: `piece` is called once for each index
/// into `plan`.
pub fn save_model_pieces<'a>(
    dir: &Path,
    plan: &[Planned],
    metadata: &BTreeMap<String, String>,
    limit: u64,
    piece: &mut dyn FnMut(usize) -> Result<Piece<'a>>,
) -> Result<u64> {
    let total: u64 = plan.iter().map(Planned::bytes).sum();
    if total <= limit {
        return save_pieces(&dir.join("model.safetensors"), plan, metadata, piece);
    }
    let mut shards = Vec::new();
    let (mut begin, mut filled) = (0, 0u64);
    for (at, planned) in plan.iter().enumerate() {
        if at > begin && filled + planned.bytes() > limit {
            shards.push(begin..at);
            (begin, filled) = (at, 0);
        }
        filled += planned.bytes();
    }
    shards.push(begin..plan.len());
    let (mut map, mut bytes) = (serde_json::Map::new(), 0);
    let count = shards.len();
    for (n, range) in shards.into_iter().enumerate() {
        let file = format!("model-{:05}-of-{count:05}.safetensors", n + 1);
        let part = &plan[range.clone()];
        bytes += save_pieces(&dir.join(&file), part, metadata, &mut |at| piece(range.start + at))?;
        map.extend(part.iter().map(|planned| (planned.name.clone(), Value::from(file.clone()))));
    }
    // The index last: without it the shards are no model.
    let index = serde_json::json!({"metadata": {"total_size": total}, "weight_map": map});
    let text = serde_json::to_vec_pretty(&index).map_err(|e| Error::Run(format!("index: {e}")))?;
    write_bytes(&dir.join("model.safetensors.index.json"), &text)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::{save, Checkpoint};
    use super::*;
    use candle_core::Device;

    #[test]
    fn what_is_written_in_shards_comes_back() {
        let tensor = |n: usize| Tensor::arange(0f32, n as f32, &Device::Cpu).unwrap();
        let sizes = [("c", 3), ("a", 2), ("b", 9), ("d", 1), ("e", 1)];
        let tensors: Vec<(String, Tensor)> = sizes.map(|(name, n)| (name.to_string(), tensor(n))).to_vec();
        // (limit in bytes, files): 64 bytes in one; c and a, then b, then d and e; one each.
        for (limit, files) in [(64, 1), (20, 3), (1, 5)] {
            let dir = tempfile::tempdir().unwrap();
            let bytes = save_model(dir.path(), &tensors, &BTreeMap::new(), limit).unwrap();
            let read = Checkpoint::open(dir.path()).unwrap();
            assert_eq!(read.files().len(), files, "limit {limit}");
            let on_disk: u64 = read.files().iter().map(|f| std::fs::metadata(f).unwrap().len()).sum();
            assert_eq!(bytes, on_disk);
            assert_eq!(dir.path().join("model.safetensors.index.json").exists(), files > 1);
            for (name, t) in &tensors {
                let back = read.tensor(name, &Device::Cpu).unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(back, t.to_vec1::<f32>().unwrap(), "{name}");
            }
        }
    }

    #[test]
    fn shards_are_joined_and_their_index_is_not_trusted() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let one = |name: &str, value: f32| [(name.to_string(), Tensor::new(value, &Device::Cpu).unwrap())];
        save(&at("m-1.safetensors"), &one("a", 1.0), &BTreeMap::new()).unwrap();
        save(&at("m-2.safetensors"), &one("b", 2.0), &BTreeMap::new()).unwrap();
        let index = at("model.safetensors.index.json");
        let open = |map: &str| {
            std::fs::write(&index, format!(r#"{{"metadata":{{}},"weight_map":{map}}}"#)).unwrap();
            Checkpoint::open(dir.path())
        };
        let whole = open(r#"{"b":"m-2.safetensors","a":"m-1.safetensors"}"#).unwrap();
        assert_eq!(whole.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(whole.file_of("b"), Some(at("m-2.safetensors").as_path()));
        assert_eq!(whole.tensor("b", &Device::Cpu).unwrap().to_scalar::<f32>().unwrap(), 2.0);

        let refused = |map: &str, expected: &[&str]| {
            let error = open(map).err().unwrap_or_else(|| panic!("{map} must not open"));
            assert_eq!(error.exit_code(), 4);
            let error = error.to_string();
            expected.iter().for_each(|part| assert!(error.contains(part), "{error:?} lacks {part:?}"));
        };
        std::fs::create_dir(at("sub")).unwrap();
        std::fs::copy(at("m-1.safetensors"), at("sub/m-1.safetensors")).unwrap();
        let absolute = at("m-1.safetensors").display().to_string();
        for escape in
            ["../m-1.safetensors", "sub/m-1.safetensors", "", "..", r"sub\\m-1.safetensors", &absolute]
        {
            refused(&format!(r#"{{"a":"{escape}"}}"#), &["index.json", "tensor a", "expected a file name"]);
        }
        refused(r#"{"a":7}"#, &["tensor a", "found shard 7"]);
        refused("{}", &["empty weight_map"]);
        refused("3", &["weight_map"]);
        refused(r#"{"a":"m-3.safetensors"}"#, &["m-3.safetensors"]);
        refused(r#"{"a":"m-2.safetensors"}"#, &["tensor a", "in no shard"]);
        refused(
            r#"{"a":"m-2.safetensors","b":"m-1.safetensors"}"#,
            &["tensor a", "found in m-1.safetensors, expected in m-2.safetensors"],
        );
        refused(r#"{"a":"m-1.safetensors","a":"m-2.safetensors"}"#, &["tensor a", "twice"]);
        std::fs::copy(at("m-1.safetensors"), at("m-2.safetensors")).unwrap();
        refused(
            r#"{"a":"m-1.safetensors","b":"m-2.safetensors"}"#,
            &["m-2.safetensors", "tensor a", "m-1.safetensors"],
        );
    }
}
