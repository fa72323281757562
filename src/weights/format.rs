//! qtune's packed checkpoints: what `quantization_config` in config.json says and what the
//! safetensors file holds.
//!
//! A packed weight `NAME` is stored as `NAME.codes` (u8 `[rows, row_bytes]`, see [`super::packed`]) and
//! `NAME.scale` (f32 `[rows]`, the step of each row; `[rows, groups]` where its entry has a `group_size`,
//! the columns of a row that share a step). A rule on a tap is stored as its tensors beneath
//! the tap's name. Everything else is stored under its own name as f32. The version is raised
//! whenever an older program would read a file wrongly: 1 has one step a row, 2 group sizes. A file says
//! the lowest that it needs.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::checkpoint::{self, Checkpoint};
use super::packed::{Grid, Packed};
use super::{Expr, Transform, Weight, Weights};
use crate::{Error, Result};

/// The newest version of the format that this program reads, and writes where a file needs it.
pub const FORMAT_VERSION: u64 = 2;
/// The version of files whose weights have one step a row.
const ROWS_VERSION: u64 = 1;

/// `quantization_config` in config.json.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct QuantizationConfig {
    /// Always `qtune`.
    pub quant_method: String,
    /// See [`FORMAT_VERSION`].
    pub format_version: u64,
    /// The packed weights by name.
    pub weights: BTreeMap<String, PackedEntry>,
    /// The rules on taps by the tap's name, each as its own kind describes it.
    #[serde(default)]
    pub activations: BTreeMap<String, Value>,
}

/// What config.json says of one packed weight.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PackedEntry {
    /// Bits and centering.
    #[serde(flatten)]
    pub grid: Grid,
    /// Columns of a row that share a step; none: the whole row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_size: Option<usize>,
    /// The weight's shape, rows first.
    pub shape: Vec<usize>,
}

/// Makes the rule of a tap again from its description and its tensors.
pub type Revive<'a> =
    dyn Fn(&str, &Value, &dyn Fn(&str) -> Result<Option<Tensor>>) -> Result<Arc<dyn Transform>> + 'a;

impl QuantizationConfig {
    /// What a store that was packed by [`Weights::packed`] holds.
    pub fn of(weights: &Weights) -> Self {
        let packed = weights.iter().filter_map(|(name, weight)| match weight.expr() {
            Expr::Packed(p) => {
                let (grid, group_size, shape) = (p.grid(), p.group(), p.shape().to_vec());
                Some((name.to_string(), PackedEntry { grid, group_size, shape }))
            }
            _ => None,
        });
        let packed: BTreeMap<String, PackedEntry> = packed.collect();
        let grouped = packed.values().any(|entry| entry.group_size.is_some());
        QuantizationConfig {
            quant_method: "qtune".into(),
            format_version: if grouped { FORMAT_VERSION } else { ROWS_VERSION },
            weights: packed,
            activations: weights.taps().map(|(name, rule)| (name.to_string(), rule.describe())).collect(),
        }
    }

    /// Reads it off a parsed config.json; `None` where the checkpoint is not quantized. Another
    /// method's files and files of a newer version are refused by name.
    pub fn read(path: &Path, config: &Value) -> Result<Option<Self>> {
        let Some(value) = config.get("quantization_config").filter(|v| !v.is_null()) else {
            return Ok(None);
        };
        let method = value.get("quant_method").and_then(Value::as_str).unwrap_or("none");
        if method != "qtune" {
            return Err(Error::input(
                path,
                format!("quantization_config.quant_method: found {method}, expected qtune"),
            ));
        }
        let version = value.get("format_version").and_then(Value::as_u64).unwrap_or(0);
        if version == 0 || version > FORMAT_VERSION {
            return Err(Error::input(
                path,
                format!(
                    "quantization_config.format_version: found {version}, this qtune {} reads up to \
                     {FORMAT_VERSION}; a newer qtune wrote it",
                    env!("CARGO_PKG_VERSION")
                ),
            ));
        }
        serde_json::from_value(value.clone())
            .map(Some)
            .map_err(|e| Error::input(path, format!("quantization_config: {e}")))
    }

    /// Builds the store from the checkpoint that this config describes.
    pub fn open(&self, checkpoint: &Checkpoint, device: &Device, revive: &Revive<'_>) -> Result<Weights> {
        let mut weights = Weights::default();
        let mut used = std::collections::HashSet::new();
        for (name, entry) in &self.weights {
            let (codes, scale) = (format!("{name}.codes"), format!("{name}.scale"));
            // Bounds that no weight reaches, so that no product below can overflow.
            let count = entry.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
            if entry.shape.len() < 2 || count.is_none_or(|n| n >= 1 << 40) {
                let message = format!("found shape {:?}, expected rows and columns of a weight", entry.shape);
                return Err(Error::tensor(name, message));
            }
            let grid = Grid::new(entry.grid.bits, entry.grid.centering)?;
            let packed = Packed::from_tensors(
                name,
                grid,
                entry.group_size,
                &entry.shape,
                &checkpoint.tensor(&codes, &Device::Cpu)?,
                &checkpoint.tensor(&scale, &Device::Cpu)?,
            )?;
            weights.insert(name.clone(), Weight::from(Expr::Packed(packed.to_device(device))));
            used.extend([codes, scale]);
        }
        for (name, value) in &self.activations {
            let seen = std::cell::RefCell::new(Vec::new());
            let read = |suffix: &str| {
                let full = format!("{name}.{suffix}");
                if !checkpoint.contains(&full) {
                    return Ok(None);
                }
                let tensor = checkpoint.tensor(&full, device)?;
                checkpoint::check_finite(&full, &tensor)?;
                seen.borrow_mut().push(full);
                Ok(Some(tensor))
            };
            weights.hang(name.clone(), revive(name, value, &read)?);
            used.extend(seen.into_inner());
        }
        for name in checkpoint.names().filter(|name| !used.contains(*name)) {
            let tensor = checkpoint.tensor(name, device)?;
            checkpoint::check_finite(name, &tensor)?;
            weights.insert(name, Weight::dense(tensor));
        }
        Ok(weights)
    }
}

/// The tensors of a store as a file holds them: packed weights as codes and scales, the rest as f32,
/// then the tensors of the rules on taps.
pub fn stored_tensors(weights: &Weights) -> Result<Vec<(String, Tensor)>> {
    let mut tensors = Vec::new();
    for (name, weight) in weights.iter() {
        match weight.expr() {
            Expr::Packed(packed) => {
                let (codes, scale) = packed.to_tensors()?;
                tensors.extend([(format!("{name}.codes"), codes), (format!("{name}.scale"), scale)]);
            }
            _ => tensors.push((name.to_string(), weight.tensor()?.detach())),
        }
    }
    for (name, rule) in weights.taps() {
        tensors.extend(rule.tensors().into_iter().map(|(suffix, t)| (format!("{name}.{suffix}"), t)));
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use candle_core::DType;
    use serde_json::json;

    use super::*;
    use crate::weights::packed::Centering;

    /// A folder with one weight `w [3, 10]`, packed, and a bias.
    fn store(group: Option<usize>) -> Weights {
        let w: Vec<f32> = (0..30).map(|i| ((i * 7 % 11) as f32 - 5.0) * 0.1).collect();
        let w = Tensor::from_vec(w, (3, 10), &Device::Cpu).unwrap();
        let grid = Grid::new(4, Centering::Signed).unwrap();
        let mut weights = Weights::default();
        weights.insert("w", Weight::from(Expr::Packed(Packed::fit(&w, grid, group).unwrap().0)));
        weights.insert("b", Weight::dense(Tensor::ones(3, DType::F32, &Device::Cpu).unwrap()));
        weights
    }

    fn saved(weights: &Weights) -> (tempfile::TempDir, Checkpoint) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        checkpoint::save(&path, &stored_tensors(weights).unwrap(), &BTreeMap::new()).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        (dir, checkpoint)
    }

    fn none(_: &str, _: &Value, _: &dyn Fn(&str) -> Result<Option<Tensor>>) -> Result<Arc<dyn Transform>> {
        Err(Error::Run("no taps here".into()))
    }

    fn values(weights: &Weights) -> Vec<Vec<f32>> {
        weights.get("w").unwrap().tensor().unwrap().to_vec2::<f32>().unwrap()
    }

    #[test]
    fn what_is_written_is_read_back() {
        for (group, version) in [(None, 1), (Some(10), 1), (Some(4), 2), (Some(1), 2)] {
            let weights = store(group);
            let value = json!({"quantization_config": QuantizationConfig::of(&weights)});
            let entry = &value["quantization_config"]["weights"]["w"];
            assert_eq!(value["quantization_config"]["format_version"], json!(version));
            assert_eq!(entry.get("group_size").is_some(), version == 2);
            let (_dir, checkpoint) = saved(&weights);
            let config = QuantizationConfig::read(Path::new("config.json"), &value).unwrap().unwrap();
            let back = config.open(&checkpoint, &Device::Cpu, &none).unwrap();
            assert_eq!(values(&back), values(&weights), "{group:?}");
            assert!(back.contains("b"));
        }
    }

    #[test]
    fn a_file_of_version_1_opens_as_written_then() {
        let text = r#"{"quant_method":"qtune","format_version":1,
            "weights":{"w":{"bits":4,"centering":"signed","shape":[3,10]}}}"#;
        let value = json!({"quantization_config": serde_json::from_str::<Value>(text).unwrap()});
        let config = QuantizationConfig::read(Path::new("config.json"), &value).unwrap().unwrap();
        let weights = store(None);
        let (_dir, checkpoint) = saved(&weights);
        let back = config.open(&checkpoint, &Device::Cpu, &none).unwrap();
        assert_eq!(values(&back), values(&weights));
        let again = json!({"quantization_config": QuantizationConfig::of(&back)});
        assert_eq!(again["quantization_config"]["weights"], value["quantization_config"]["weights"]);
    }

    #[test]
    fn lies_about_groups_are_named() {
        let weights = store(Some(4));
        let (_dir, checkpoint) = saved(&weights);
        let open = |group_size: Option<usize>| {
            let mut config = QuantizationConfig::of(&weights);
            config.weights.get_mut("w").unwrap().group_size = group_size;
            config.open(&checkpoint, &Device::Cpu, &none).map(|_| ()).unwrap_err().to_string()
        };
        assert!(open(Some(0)).contains("tensor w: found group_size 0, expected 1 to 9"));
        assert!(open(Some(10)).contains("tensor w: found group_size 10, expected 1 to 9"));
        let found = "tensor w.scale: found F32 [3, 3], expected F32";
        assert_eq!(open(None), format!("{found} [3]"));
        assert_eq!(open(Some(3)), format!("{found} [3, 4]"));
        let newer = json!({"quantization_config": {"quant_method": "qtune", "format_version": 3}});
        let error = QuantizationConfig::read(Path::new("config.json"), &newer).unwrap_err().to_string();
        assert!(error.contains("found 3") && error.contains("reads up to 2"), "{error}");
    }
}
