//! qtune's packed checkpoints: what `quantization_config` in config.json says and what the
//! safetensors file holds.
//!
//! A packed weight `NAME` is stored as `NAME.codes` (u8 `[rows, row_bytes]`, see [`super::packed`]) and
//! `NAME.scale` (f32 `[rows]`, the step of each row). A rule on a tap is stored as its tensors beneath
//! the tap's name. Everything else is stored under its own name as f32. The version is raised
//! whenever an older program would read a file wrongly.

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

/// The version of the format that this program writes, and the newest that it reads.
pub const FORMAT_VERSION: u64 = 1;

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
                Some((name.to_string(), PackedEntry { grid: p.grid(), shape: p.shape().to_vec() }))
            }
            _ => None,
        });
        QuantizationConfig {
            quant_method: "qtune".into(),
            format_version: FORMAT_VERSION,
            weights: packed.collect(),
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
                &entry.shape,
                &checkpoint.tensor(&codes, device)?,
                &checkpoint.tensor(&scale, device)?,
            )?;
            weights.insert(name.clone(), Weight::from(Expr::Packed(packed)));
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
