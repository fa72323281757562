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

#[cfg(test)]
mod tests {
    use super::super::super::binary_config::tests::tiny;
    use super::super::super::{open_model, preprocess_of, Reading, VisionConfig};
    use super::super::import_model;
    use super::*;
    use crate::quantize::write_model;
    use crate::weights::Weights;

    fn fields(config: &BinaryConfig) -> Weights {
        let fresh = |(name, shape): (String, Vec<usize>)| {
            let theta = config.fresh(3, &name, &shape, &Device::Cpu).unwrap();
            (name, theta)
        };
        Weights::from_tensors(config.shapes().into_iter().map(fresh))
    }

    fn bits(t: &Tensor) -> Vec<u32> {
        t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    }

    fn written(config: &BinaryConfig, weights: &Weights) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let vision = VisionConfig::Binary(config.clone());
        write_model(&dir.path().join("model"), &vision, &preprocess_of(&vision), weights).unwrap();
        dir
    }

    #[test]
    fn what_is_written_is_read_back_to_the_bit() {
        for reading in [Reading::Field, Reading::Sign] {
            let config = tiny(reading);
            let weights = fields(&config);
            let dir = written(&config, &weights);
            let opened = open_model(&dir.path().join("model"), &Device::Cpu).unwrap();
            assert_eq!(opened.config, VisionConfig::Binary(config.clone()));
            assert_eq!((&opened.preprocess.mean, &opened.preprocess.std), (&vec![0.0], &vec![1.0]));
            for (name, weight) in weights.iter() {
                let found = opened.weights.get(name).unwrap().tensor().unwrap();
                assert_eq!(bits(&found), bits(&weight.tensor().unwrap()), "{name}");
            }
            let images = Tensor::arange(0f32, 12.0, &Device::Cpu).unwrap().reshape((2, 1, 3, 2)).unwrap();
            let logits = |weights: &Weights| {
                let model = opened.config.build(weights).unwrap();
                bits(&model.forward(&images).unwrap().class)
            };
            assert_eq!(logits(&opened.weights), logits(&weights));
        }
    }

    #[test]
    fn a_head_is_drawn_anew_where_it_does_not_fit() {
        let config = tiny(Reading::Field);
        let weights = fields(&config);
        let dir = written(&config, &weights);
        let want = |classes: &[&str]| Want {
            classes: Some(classes.iter().map(|c| c.to_string()).collect()),
            ..Want::default()
        };
        let import = |want: &Want| import_model(&dir.path().join("model"), want, &Device::Cpu).unwrap();
        // As many classes: the head and the model's own names stay.
        let kept = import(&want(&["x", "y", "z"]));
        assert!(!kept.new_head && kept.notes.is_empty());
        assert_eq!(kept.config, VisionConfig::Binary(config.clone()));
        let new = import(&want(&["x", "y"]));
        assert!(new.new_head && new.notes[0].contains("3 classes in the checkpoint, 2 wanted"));
        assert_eq!(new.tensors["classifier.weight"].dims(), [2, 4]);
        let body = weights.get("layers.1.weight").unwrap().tensor().unwrap();
        assert_eq!(bits(&new.tensors["layers.1.weight"]), bits(&body));
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let config = tiny(Reading::Field);
        let mut weights = fields(&config);
        let dir = written(&config, &weights);
        let want = Want { image_size: Some((4, 4)), ..Want::default() };
        let error = import_model(&dir.path().join("model"), &want, &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("found a perceptron over 3x2 pixels, which does not go with 4x4"), "{error}");
        let zeros = |shape: &[usize]| {
            crate::weights::Weight::dense(Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap())
        };
        for (name, shape, expected) in [
            ("layers.0.weight", vec![5, 7], "layers.0.weight: found shape [5, 7], expected [5, 6]"),
            ("layers.0.bias", vec![5], "layers.0.bias: found beside the model"),
        ] {
            let whole = weights.clone();
            weights.insert(name, zeros(&shape));
            let dir = written(&config, &weights);
            let error = open_model(&dir.path().join("model"), &Device::Cpu).unwrap_err().to_string();
            assert!(error.contains("config.json") && error.contains(expected), "{error}");
            weights = whole;
        }
        let rest = weights.iter().skip(1).map(|(name, w)| (name.to_string(), w.tensor().unwrap()));
        let dir = written(&config, &Weights::from_tensors(rest));
        let error = open_model(&dir.path().join("model"), &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("layers.0.weight: not found, expected fields of shape [5, 6]"), "{error}");
    }
}
