//! A checkpoint by canonical names, whoever spelled it: where each tensor lies, and reading it.

use super::super::names::{layer_of, Meaning};
use super::super::vit_config::VitConfig;
use super::ofq::{is_ofq, role, Role, StoredQuantizers};
use crate::error::{Error, On, Result};
use crate::weights::checkpoint::{check_finite, Checkpoint, Dtype};
use candle_core::{DType, Device, Tensor};
use indexmap::IndexMap;
use std::path::{Path, PathBuf};

/// Where a canonical tensor lies: a stored tensor, or the given third of a fused one.
pub(super) struct Piece {
    pub(super) stored: String,
    third: Option<usize>,
}

/// The checkpoint by canonical names (without prefix).
pub(super) struct Table<'a> {
    checkpoint: &'a Checkpoint,
    pub(super) pieces: IndexMap<String, Piece>,
    unused: Vec<String>,
    /// Beside the weights of quantization-aware training.
    pub(super) quantizers: Option<StoredQuantizers>,
}

impl<'a> Table<'a> {
    /// `meaning` tells what a stored name is.
    pub(super) fn of(checkpoint: &'a Checkpoint, meaning: &dyn Fn(&str) -> Meaning) -> Result<Self> {
        let quantizers = is_ofq(checkpoint).then(StoredQuantizers::default);
        let mut table = Table { checkpoint, pieces: IndexMap::new(), unused: Vec::new(), quantizers };
        for stored in checkpoint.names() {
            if table.quantizers.is_some() && table.add_trained(stored)? {
                continue;
            }
            match meaning(stored) {
                Meaning::Whole(name) => table.add(name, stored, None)?,
                Meaning::Fused(names) => {
                    for (third, name) in names.into_iter().enumerate() {
                        table.add(name, stored, Some(third))?;
                    }
                }
                Meaning::Foreign => {
                    let message =
                        "found a part that this model does not compute with, expected query, key, value, \
                                   output, two-layer MLP and two norms a block";
                    return Err(table.error(stored, message));
                }
                Meaning::Unused => table.unused.push(stored.to_string()),
            }
        }
        Ok(table)
    }

    /// Takes a tensor of quantization-aware training in; false where it is none of its own.
    fn add_trained(&mut self, stored: &str) -> Result<bool> {
        let first = match role(stored) {
            Role::Plain => return Ok(false),
            Role::Dead => None,
            Role::Dense(name) => return self.add(name, stored, None).map(|()| true),
            Role::Tap(tap, part) => {
                let taps = self.quantizers.as_mut().map(|q| &mut q.taps);
                taps.and_then(|taps| taps.insert((tap, part), stored.to_string()))
            }
            Role::Step(weight) => {
                let steps = self.quantizers.as_mut().map(|q| &mut q.steps);
                steps.and_then(|steps| steps.insert(weight, stored.to_string()))
            }
        };
        match first {
            Some(first) => {
                Err(self.error(stored, &format!("found the same as {first}, expected one of them")))
            }
            None => Ok(true),
        }
    }

    fn add(&mut self, name: String, stored: &str, third: Option<usize>) -> Result<()> {
        if let Some(first) = self.pieces.get(&name) {
            let message = format!("found the same weight as {}, expected one of them", first.stored);
            return Err(self.error(stored, &message));
        }
        self.pieces.insert(name, Piece { stored: stored.to_string(), third });
        Ok(())
    }

    /// An error on the tensor `name`, with the file that holds it or should.
    pub(super) fn error(&self, name: &str, message: &str) -> Error {
        let files = self.checkpoint.files();
        let file = self.checkpoint.file_of(name).or(files.first().map(PathBuf::as_path));
        let shown: String = name.chars().flat_map(char::escape_debug).collect();
        Error::input(file.unwrap_or(Path::new("")), format!("tensor {shown}: {message}"))
    }

    /// timm calls the class token's head `head` with and without a second one; two heads have names
    /// of their own here. Returns whether there are two.
    pub(super) fn name_heads(&mut self) -> bool {
        let has = |table: &Self, head: &str| table.pieces.keys().any(|name| name.starts_with(head));
        if has(self, "distillation_classifier.") && !has(self, "cls_classifier.") {
            for leaf in ["weight", "bias"] {
                if let Some(piece) = self.pieces.shift_remove(&format!("classifier.{leaf}")) {
                    self.pieces.insert(format!("cls_classifier.{leaf}"), piece);
                }
            }
            if let Some(stored) = &mut self.quantizers {
                let named = |name: String| match name.strip_prefix("classifier.") {
                    Some(rest) => format!("cls_classifier.{rest}"),
                    None => name,
                };
                let taps = std::mem::take(&mut stored.taps).into_iter();
                stored.taps = taps.map(|((tap, part), name)| ((named(tap), part), name)).collect();
                let steps = std::mem::take(&mut stored.steps).into_iter();
                stored.steps = steps.map(|(weight, name)| (named(weight), name)).collect();
            }
        }
        has(self, "distillation_classifier.") || has(self, "cls_classifier.")
    }

    /// A block beyond the configuration's last is part of the trained model: not to be dropped.
    pub(super) fn check_layers(&self, config: &VitConfig) -> Result<()> {
        for (name, piece) in &self.pieces {
            if layer_of(name).is_some_and(|layer| layer >= config.layers) {
                let message = format!("found a block beyond the {} that are expected", config.layers);
                return Err(self.error(&piece.stored, &message));
            }
        }
        Ok(())
    }

    pub(super) fn unused_note(&self) -> Option<String> {
        const SHOWN: usize = 4;
        let names: Vec<String> = self
            .unused
            .iter()
            .take(SHOWN)
            .map(|n| n.chars().flat_map(char::escape_debug).collect())
            .collect();
        let more = self.unused.len().saturating_sub(SHOWN);
        let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
        (!names.is_empty()).then(|| format!("left unread: {}{rest}", names.join(", ")))
    }

    /// The canonical tensor `bare` (called `name` with its prefix) in f32, of this shape.
    pub(super) fn read(&self, bare: &str, name: &str, shape: &[usize]) -> Result<Tensor> {
        let Some(Piece { stored, third }) = self.pieces.get(bare) else {
            return Err(self.error(name, &format!("found none, expected shape {shape:?}")));
        };
        let mut whole = shape.to_vec();
        if third.is_some() {
            whole[0] *= 3;
        }
        let found = self.checkpoint.shape(stored).unwrap_or_default();
        if found != whole {
            return Err(self.error(stored, &format!("found shape {found:?}, expected {whole:?}")));
        }
        let dtype = self.checkpoint.dtype(stored);
        if !matches!(dtype, Some(Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)) {
            let found = dtype.map(|d| d.to_string()).unwrap_or_default();
            return Err(self.error(stored, &format!("found dtype {found}, expected F64, F32, F16 or BF16")));
        }
        let tensor = self.checkpoint.tensor(stored, &Device::Cpu)?.to_dtype(DType::F32).on(stored)?;
        check_finite(stored, &tensor)?;
        match third {
            // Copied, so that a third does not keep the whole alive.
            Some(third) => tensor.narrow(0, third * shape[0], shape[0]).and_then(|t| t.force_contiguous()),
            None => Ok(tensor),
        }
        .on(stored)
    }

    /// The shape of a stored tensor.
    pub(super) fn shape_of(&self, stored: &str) -> &[usize] {
        self.checkpoint.shape(stored).unwrap_or_default()
    }

    /// The rows of a canonical weight.
    pub(super) fn rows_of(&self, bare: &str) -> Result<usize> {
        let rows = self.pieces.get(bare).and_then(|piece| self.shape_of(&piece.stored).first().copied());
        rows.ok_or_else(|| self.error(bare, "found none, expected the weight whose steps are stored"))
    }

    /// The stored tensor of `count` values in f32, its shape, which only served to broadcast it, gone.
    pub(super) fn read_flat(&self, stored: &str, count: usize) -> Result<Tensor> {
        let found = self.shape_of(stored);
        if found.iter().product::<usize>() != count {
            return Err(self.error(stored, &format!("found shape {found:?}, expected {count} values")));
        }
        let tensor = self.checkpoint.tensor(stored, &Device::Cpu)?;
        let flat = tensor.flatten_all().and_then(|t| t.to_dtype(DType::F32)).on(stored)?;
        check_finite(stored, &flat)?;
        Ok(flat)
    }

    /// The shape of a canonical tensor that must have `N` dimensions.
    pub(super) fn dims<const N: usize>(&self, bare: &str) -> Result<[usize; N]> {
        let Some(piece) = self.pieces.get(bare) else {
            let first =
                self.checkpoint.names().next().map_or("no tensor at all".into(), |n| format!("{n:?} first"));
            return Err(self.error(
                bare,
                &format!("found none of this meaning ({first}), expected a vision transformer's"),
            ));
        };
        let found = self.checkpoint.shape(&piece.stored).unwrap_or_default();
        found.try_into().map_err(|_| {
            self.error(&piece.stored, &format!("found shape {found:?}, expected {N} dimensions"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::super::Want;
    use super::*;

    #[test]
    fn stored_dtypes_become_f32() {
        let config = config(false);
        for dtype in [DType::F16, DType::BF16, DType::F64] {
            let of = |(n, t): (String, Tensor)| (n, t.to_dtype(dtype).unwrap());
            let stored: Vec<_> = weights(&config).into_iter().map(of).collect();
            let back = |(n, t): &(String, Tensor)| (n.clone(), t.to_dtype(DType::F32).unwrap());
            let expected: Vec<_> = stored.iter().map(back).collect();
            same(&import(&folder(&stored, Some(&config.to_hf())), &Want::default()).unwrap(), &expected);
        }
    }

    #[test]
    fn what_is_wrong_with_a_tensor_is_said() {
        let config = config(false);
        let query = "vit.encoder.layer.1.attention.attention.query.weight";
        let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
        let refused = |change: &dyn Fn(&mut Named), expected: &[&str]| {
            let mut tensors = weights(&config);
            change(&mut tensors);
            let error = import(&folder(&tensors, Some(&config.to_hf())), &Want::default()).unwrap_err();
            assert_eq!(error.exit_code(), 4, "{error}");
            let error = error.to_string();
            expected.iter().for_each(|part| assert!(error.contains(part), "{error:?} lacks {part:?}"));
        };
        let replace = |tensors: &mut Named, with: Tensor| {
            tensors.iter_mut().find(|(n, _)| n == query).unwrap().1 = with;
        };
        refused(&|t| t.retain(|(n, _)| n != query), &["model.safetensors", query, "found none", "[6, 6]"]);
        refused(&|t| replace(t, zeros(&[6, 5], DType::F32)), &[query, "found shape [6, 5], expected [6, 6]"]);
        refused(&|t| replace(t, zeros(&[6, 6], DType::U8)), &[query, "found dtype U8"]);
        refused(
            &|t| {
                let mut values = vec![0f32; 36];
                values[7] = f32::NAN;
                replace(t, Tensor::from_vec(values, (6, 6), &Device::Cpu).unwrap());
            },
            &[query, "NaN", "flat index 7 "],
        );
        let add = |name: &'static str| move |t: &mut Named| t.push((name.into(), zeros(&[6], DType::F32)));
        refused(&add("vit.encoder.layer.2.layernorm_before.bias"), &["layer.2", "beyond the 2"]);
        refused(&add("vit.encoder.layer.0.ls1.gamma"), &["ls1.gamma", "does not compute with"]);
        refused(&add("vit.layers.0.mlp.fc1.bias"), &["the same weight as vit.encoder.layer.0.intermediate"]);
        refused(&add("cls_classifier.bias"), &["cls_classifier", "expected one"]);
    }
}
