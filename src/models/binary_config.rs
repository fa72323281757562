//! The sizes and labels of a network of one-bit weights, read from and written to a `config.json` in the
//! manner of Hugging Face. The model type is ours: no other program has it.

use std::path::Path;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};

use super::keys::{label_maps, Keys};
use crate::error::{Error, Result};
use crate::random::Random;

/// The model type.
const KIND: &str = "qtune_binary";

/// Bounds on what a configuration may ask for: a file that lies about a size is refused before anything of
/// that size is made.
const MOST: [(&str, usize); 3] = [("image_size", 1 << 12), ("num_channels", 1 << 6), ("labels", 1 << 20)];
const MOST_LAYERS: usize = 64;
const MOST_UNITS: usize = 1 << 16;
/// Fields of one layer.
const MOST_FIELDS: usize = 1 << 30;

/// How the fields θ of a network are read in training. To everyone else its weights are their signs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reading {
    /// As the distribution of each weight: 1 with probability `(1 + tanh θ) / 2`, else -1.
    #[default]
    Field,
    /// As their signs, with the straight-through gradient ([`crate::transform::Sign`]).
    Sign,
}

/// Sizes and labels of a [`Binary`](super::Binary).
#[derive(Clone, Debug, PartialEq)]
pub struct BinaryConfig {
    /// Height and width of the input, in pixels.
    pub image_size: (usize, usize),
    /// Channels of the input: 3 for RGB.
    pub channels: usize,
    /// Units of each hidden layer.
    pub hidden: Vec<usize>,
    /// How the fields are read in training.
    pub reading: Reading,
    /// The label of each class id.
    pub classes: Vec<String>,
}

/// Whether a configuration is such a network's.
pub(super) fn is_binary(json: &Value) -> bool {
    json.get("model_type").and_then(Value::as_str) == Some(KIND)
}

impl BinaryConfig {
    /// Reads a configuration; missing keys take the defaults of a recipe (28 x 28 gray, 200 and 200 hidden
    /// units). `path` is for error messages.
    ///
    /// Errs on another model type, a value of the wrong type, sizes of zero or absurdly large, and labels
    /// that do not count from 0.
    pub fn from_hf(path: &Path, json: &Value) -> Result<Self> {
        let keys = Keys::of(path, json)?;
        if keys.model_type() != Some(KIND) {
            let found = keys.model_type().unwrap_or("none");
            return Err(keys.error("model_type", &format!("found {found:?}, expected {KIND}")));
        }
        let config = BinaryConfig {
            image_size: keys.sizes("image_size", 28)?,
            channels: keys.size("num_channels", 1)?,
            hidden: keys.list("hidden_sizes", &[200, 200])?,
            reading: keys.get("reading", Reading::Field, "\"field\" or \"sign\"", |value| {
                Reading::deserialize(value).ok()
            })?,
            classes: keys.labels(MOST[2].1)?,
        };
        config.check().map_err(|e| Error::input(path, e.to_string()))?;
        Ok(config)
    }

    /// The configuration as [`BinaryConfig::from_hf`] reads it.
    pub fn to_hf(&self) -> Value {
        let (height, width) = self.image_size;
        let (id2label, label2id) = label_maps(&self.classes);
        json!({
            "model_type": KIND,
            "image_size": if height == width { json!(height) } else { json!([height, width]) },
            "num_channels": self.channels,
            "hidden_sizes": self.hidden,
            "reading": self.reading,
            "id2label": id2label,
            "label2id": label2id,
            "dtype": "float32",
        })
    }

    /// Errs ([`Error::Usage`]) on sizes that are zero or absurdly large.
    pub fn check(&self) -> Result<()> {
        let (height, width) = self.image_size;
        let values = [height.max(width), self.channels, self.classes.len()];
        let bounds = MOST.into_iter().zip(values).map(|((name, most), found)| (name, most, found));
        let layers =
            [("hidden_sizes", MOST_LAYERS, self.hidden.len()), ("image_size", MOST[0].1, height.min(width))];
        let units = self.hidden.iter().map(|&n| ("hidden_sizes", MOST_UNITS, n));
        for (name, most, found) in bounds.chain(layers).chain(units) {
            if found == 0 || found > most {
                return Err(Error::usage(format!("{name}: found {found}, expected 1 to {most}")));
            }
        }
        for (name, shape) in self.shapes() {
            let fields = shape.iter().fold(1, |all: usize, n| all.saturating_mul(*n));
            if fields > MOST_FIELDS {
                return Err(Error::usage(format!(
                    "{name}: found {shape:?}, expected at most {MOST_FIELDS} fields"
                )));
            }
        }
        Ok(())
    }

    /// The names of the layers, from input to output.
    pub fn layers(&self) -> Vec<String> {
        let hidden = (0..self.hidden.len()).map(|i| format!("layers.{i}"));
        hidden.chain(["classifier".to_string()]).collect()
    }

    /// Every tensor the model needs, by name and shape, in order from input to output: the fields θ of each
    /// layer, `[units, inputs]`.
    pub fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (height, width) = self.image_size;
        let mut inputs = self.channels.saturating_mul(height).saturating_mul(width);
        let units = self.hidden.iter().copied().chain([self.classes.len()]);
        let mut shapes = Vec::new();
        for (name, units) in self.layers().into_iter().zip(units) {
            shapes.push((format!("{name}.weight"), vec![units, inputs]));
            inputs = units;
        }
        shapes
    }

    /// The fields of a layer before any training: normal, of a deviation of 0.5 where they are read as a
    /// distribution (a third of the way to certainty: mean magnitude of tanh θ 0.35) and of 0.05 where a
    /// sign is to be within reach of a small step.
    pub fn fresh(&self, seed: u64, name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
        let deviation = match self.reading {
            Reading::Field => 0.5,
            Reading::Sign => 0.05,
        };
        let mut random = Random::new(seed, &format!("initial:{name}"), &[]);
        let fields: Vec<f32> = (0..shape.iter().product()).map(|_| deviation * random.normal()).collect();
        Ok(Tensor::from_vec(fields, shape, device)?)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn tiny(reading: Reading) -> BinaryConfig {
        let classes = ["a", "b", "c"].map(String::from).to_vec();
        BinaryConfig { image_size: (3, 2), channels: 1, hidden: vec![5, 4], reading, classes }
    }

    #[test]
    fn writes_what_it_reads() {
        for reading in [Reading::Field, Reading::Sign] {
            let json = tiny(reading).to_hf();
            assert!(is_binary(&json));
            assert_eq!(BinaryConfig::from_hf(Path::new("config.json"), &json).unwrap(), tiny(reading));
        }
        let plain = json!({"model_type": "qtune_binary", "num_labels": 10});
        let plain = BinaryConfig::from_hf(Path::new("config.json"), &plain).unwrap();
        assert_eq!(plain.reading, Reading::Field);
        let shapes = plain.shapes();
        assert_eq!(shapes[0], ("layers.0.weight".into(), vec![200, 784]));
        assert_eq!(shapes[2], ("classifier.weight".into(), vec![10, 200]));
        assert_eq!(shapes.len(), 3);
    }

    #[test]
    fn what_does_not_fit_names_key_found_and_expected() {
        for (key, value, expected) in [
            ("model_type", json!("vit"), "found \"vit\", expected qtune_binary"),
            ("hidden_sizes", json!([]), "hidden_sizes: found 0, expected 1 to 64"),
            ("hidden_sizes", json!([20, 0]), "hidden_sizes: found 0, expected 1 to 65536"),
            ("hidden_sizes", json!("20"), "expected a list of whole numbers"),
            ("image_size", json!([28, 0]), "image_size: found 0"),
            ("hidden_sizes", json!([65536, 65536]), "layers.1.weight: found [65536, 65536]"),
            ("reading", json!("signs"), "found \"signs\", expected \"field\" or \"sign\""),
        ] {
            let mut json = tiny(Reading::Field).to_hf();
            json[key] = value;
            let error = BinaryConfig::from_hf(Path::new("config.json"), &json).unwrap_err();
            assert_eq!(error.exit_code(), 4);
            let error = error.to_string();
            assert!(error.starts_with("config.json: ") && error.contains(expected), "{error}");
            assert_eq!(error.lines().count(), 1);
        }
        let huge = BinaryConfig { image_size: (4096, 4096), channels: 64, ..tiny(Reading::Field) };
        let expected = "layers.0.weight: found [5, 1073741824], expected at most 1073741824 fields";
        assert_eq!(huge.check().unwrap_err().to_string(), expected);
    }
}
