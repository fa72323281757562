//! Reads a convolutional classifier of qtune's own: its names and sizes are those of its configuration.

use std::path::{Path, PathBuf};

use candle_core::Device;
use indexmap::IndexMap;
use serde_json::Value;

use super::super::convnet_config::ConvConfig;
use super::super::names::Meaning;
use super::table::Table;
use super::{fresh, is_head, Imported, Want};
use crate::error::{Error, On, Result};
use crate::weights::checkpoint::Checkpoint;

/// Reads the model in `dir`, whose configuration is `json` out of the file beside it. See
/// [`super::import_model`].
///
/// Errs, too, where another image size is wanted: the hidden layer reads every place of the last map.
pub(super) fn import_conv(
    dir: &Path,
    checkpoint: &Checkpoint,
    (path, json): &(PathBuf, Value),
    want: &Want,
    device: &Device,
) -> Result<Imported<ConvConfig>> {
    let mut notes = checkpoint.notes().to_vec();
    let stored = ConvConfig::from_hf(path, json)?;
    if let Some(size) = want.image_size.filter(|size| *size != stored.image_size) {
        let ((h, w), (rows, columns)) = (size, stored.image_size);
        return Err(Error::usage(format!(
            "{}: found a convolutional classifier for images of {rows}x{columns}, it cannot take {h}x{w}",
            dir.display()
        )));
    }
    let table = Table::of(checkpoint, &|name| Meaning::Whole(name.to_string()))?;
    let expected = stored.shapes();
    if let Some(name) = table.pieces.keys().find(|name| !expected.iter().any(|(known, _)| known == *name)) {
        return Err(table.error(name, "found a tensor that the model does not have"));
    }
    let mut config = stored.clone();
    if let Some(classes) = want.classes.as_ref().filter(|classes| classes.len() != stored.classes.len()) {
        config.classes = classes.clone();
        config.check()?;
        let (found, wanted) = (stored.classes.len(), classes.len());
        notes.push(format!("classifier: {found} classes in the checkpoint, {wanted} wanted: drawn anew"));
    }
    let new_head = config.classes.len() != stored.classes.len();
    let mut tensors = IndexMap::with_capacity(expected.len());
    for (name, shape) in config.shapes() {
        let tensor = match new_head && is_head(&name) {
            true => fresh(&name, &shape, want.seed).on(&name)?,
            false => table.read(&name, &name, &shape)?,
        };
        let tensor = tensor.to_device(device).on(&name)?;
        tensors.insert(name, tensor);
    }
    Ok(Imported { config, tensors, quantizers: None, notes, new_head })
}

#[cfg(test)]
mod tests {
    use super::super::super::keys::numbered_labels;
    use super::super::super::vision::VisionConfig;
    use super::super::testing::{folder, values, Named};
    use super::super::{import_model, Want};
    use super::*;
    use candle_core::{DType, Tensor};

    fn config() -> ConvConfig {
        ConvConfig {
            image_size: (7, 6),
            channels: 2,
            widths: vec![3, 4],
            kernel: 2,
            hidden: 5,
            dropout: (0.25, 0.5),
            classes: numbered_labels(3),
        }
    }

    fn weights() -> Named {
        let of = |(i, (name, shape)): (usize, (String, Vec<usize>))| {
            let count = shape.iter().product::<usize>();
            let data: Vec<f32> = (0..count).map(|v| (100 * i + v) as f32 / 64.0).collect();
            (name, Tensor::from_vec(data, shape, &Device::Cpu).unwrap())
        };
        config().shapes().into_iter().enumerate().map(of).collect()
    }

    fn import(tensors: &Named, want: &Want) -> Result<Imported> {
        import_model(folder(tensors, Some(&config().to_hf())).path(), want, &Device::Cpu)
    }

    #[test]
    fn what_was_written_is_read() {
        let imported = import(&weights(), &Want::default()).unwrap();
        assert_eq!(imported.config, VisionConfig::Conv(config()));
        assert!(!imported.new_head && imported.notes.is_empty());
        for ((name, tensor), (found, read)) in weights().iter().zip(&imported.tensors) {
            assert_eq!((name, values(tensor)), (found, values(read)));
        }
    }

    #[test]
    fn a_head_is_drawn_anew_where_it_does_not_fit() {
        let want = |n| Want { classes: Some(numbered_labels(n)), ..Want::default() };
        let imported = import(&weights(), &want(9)).unwrap();
        assert!(imported.new_head && imported.config.classes().len() == 9);
        assert!(imported.notes[0].contains("3 classes in the checkpoint, 9 wanted"));
        assert_eq!(imported.tensors["classifier.weight"].dims(), [9, 5]);
        assert_eq!(values(&imported.tensors["fc.weight"]), values(&weights()[4].1));
        assert!(!import(&weights(), &want(3)).unwrap().new_head);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let refused = |change: &dyn Fn(&mut Named), expected: &str| {
            let mut tensors = weights();
            change(&mut tensors);
            let error = import(&tensors, &Want::default()).unwrap_err();
            assert_eq!(error.exit_code(), 4, "{error}");
            assert!(error.to_string().contains(expected), "{error}");
        };
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        refused(&|t| t.retain(|(n, _)| n != "conv.1.bias"), "conv.1.bias: found none, expected shape [4]");
        refused(&|t| t[0].1 = zeros(&[3, 2, 2, 3]), "found shape [3, 2, 2, 3], expected [3, 2, 2, 2]");
        refused(&|t| t.push(("conv.2.weight".into(), zeros(&[1]))), "conv.2.weight: found a tensor that");
        let want = Want { image_size: Some((8, 8)), ..Want::default() };
        let error = import(&weights(), &want).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("for images of 7x6, it cannot take 8x8"), "{error}");
    }
}
