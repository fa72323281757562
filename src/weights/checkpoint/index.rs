//! The index of a model in shards: which file beside it holds which tensor.

use super::header::{Pairs, MAX_HEADER};
use super::shown;
use crate::error::{Error, Result};
use serde_json::Value;
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

#[cfg(test)]
mod tests {
    use super::super::{save, Checkpoint};
    use candle_core::{Device, Tensor};
    use std::collections::BTreeMap;

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
