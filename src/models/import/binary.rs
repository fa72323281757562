//! Reads a network of one-bit weights: the fields of its layers, fitted to the classes that are wanted.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use indexmap::IndexMap;
use serde_json::Value;

use super::super::binary_config::BinaryConfig;
use super::{Imported, Want};
use crate::error::{Error, On, Result};
use crate::weights::checkpoint::{check_finite, Checkpoint};

/// Reads the network of the configuration `json`, which lies at `path`. See [`super::import_model`]. Every
/// pixel has weights of its own, so another image size than the model's is an error.
pub(super) fn import_binary(
    path: &Path,
    json: &Value,
    checkpoint: &Checkpoint,
    want: &Want,
    device: &Device,
) -> Result<Imported<BinaryConfig>> {
    let stored = BinaryConfig::from_hf(path, json)?;
    if let Some(size) = want.image_size.filter(|size| *size != stored.image_size) {
        let ((h, w), (height, width)) = (size, stored.image_size);
        return Err(Error::usage(format!(
            "{}: found a perceptron over {height}x{width} pixels, which does not go with {h}x{w}",
            path.display()
        )));
    }
    let mut config = stored.clone();
    let mut notes = checkpoint.notes().to_vec();
    let wanted = want.classes.as_ref().filter(|classes| classes.len() != stored.classes.len());
    if let Some(classes) = wanted {
        config.classes = classes.clone();
        config.check()?;
        let (found, wanted) = (stored.classes.len(), classes.len());
        notes.push(format!("classifier: {found} classes in the checkpoint, {wanted} wanted: drawn anew"));
    }
    let expected = stored.shapes();
    for name in checkpoint.names() {
        if !expected.iter().any(|(known, _)| known == name) {
            return Err(Error::input(
                path,
                format!("tensor {name}: found beside the model, which has no such"),
            ));
        }
    }
    let mut tensors = IndexMap::with_capacity(expected.len());
    for ((name, shape), (_, stored_shape)) in config.shapes().into_iter().zip(expected) {
        let tensor = if wanted.is_some() && name.starts_with("classifier.") {
            config.fresh(want.seed, &name, &shape, device)?
        } else {
            read(path, checkpoint, &name, &stored_shape)?.to_device(device).on(&name)?
        };
        tensors.insert(name, tensor);
    }
    Ok(Imported { config, tensors, quantizers: None, notes, new_head: wanted.is_some() })
}

fn read(path: &Path, checkpoint: &Checkpoint, name: &str, shape: &[usize]) -> Result<Tensor> {
    let error = |message: String| Error::input(path, format!("tensor {name}: {message}"));
    match checkpoint.shape(name) {
        None => return Err(error(format!("not found, expected fields of shape {shape:?}"))),
        Some(found) if found != shape => {
            return Err(error(format!("found shape {found:?}, expected {shape:?}")));
        }
        Some(_) => {}
    }
    let tensor = checkpoint.tensor(name, &Device::Cpu)?.to_dtype(DType::F32).on(name)?;
    check_finite(name, &tensor)?;
    Ok(tensor)
}
