//! The sizes and labels of the convolutional classifier, read from and written to a `config.json`.

use std::path::Path;

use serde_json::{json, Value};

use super::keys::{label_maps, Keys};
use crate::error::{Error, Result};

/// `model_type` in config.json. No such model exists in transformers: the name is ours.
const KIND: &str = "qtune_conv";

/// Bounds on what a configuration may ask for: a file that lies about a size is refused before anything
/// of that size is made.
const MOST: [(&str, usize); 5] = [
    ("image_size", 1 << 12),
    ("num_channels", 1 << 10),
    ("kernel_size", 1 << 6),
    ("hidden_size", 1 << 16),
    ("labels", 1 << 22),
];
const MOST_LAYERS: usize = 1 << 6;
const MOST_WIDTH: usize = 1 << 14;
/// Elements of one weight.
const MOST_MATRIX: usize = 1 << 30;

/// Sizes and labels of a convolutional classifier.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvConfig {
    /// Height and width of the input, in pixels.
    pub image_size: (usize, usize),
    /// Channels of the input: 1 for gray, 3 for RGB.
    pub channels: usize,
    /// Channels behind each convolution, first to last.
    pub widths: Vec<usize>,
    /// Side of the windows, in pixels; images are not padded.
    pub kernel: usize,
    /// Channels of the layer between the last map and the classifier.
    pub hidden: usize,
    /// In training, the share of the last map's channels and of the hidden layer's elements that are
    /// dropped, each in `[0, 1)`.
    pub dropout: (f64, f64),
    /// The label of each class id.
    pub classes: Vec<String>,
}

/// Whether a configuration is of this kind of model.
pub(super) fn is_conv(json: &Value) -> bool {
    json.get("model_type").and_then(Value::as_str) == Some(KIND)
}

impl ConvConfig {
    /// Reads what [`ConvConfig::to_hf`] writes; missing keys take the sizes of the network that CLASSP was
    /// published with. `path` is for error messages.
    ///
    /// Errs on another model type, a value of the wrong type, sizes that leave nothing of the image, a
    /// dropout of 1 or more and labels that do not count from 0.
    pub fn from_hf(path: &Path, json: &Value) -> Result<Self> {
        let keys = Keys::of(path, json)?;
        let kind = keys.model_type().unwrap_or("none");
        if kind != KIND {
            return Err(keys.error("model_type", &format!("found {kind:?}, expected {KIND}")));
        }
        let config = ConvConfig {
            image_size: keys.sizes("image_size", 28)?,
            channels: keys.size("num_channels", 1)?,
            widths: keys.list("widths", &[32, 64])?,
            kernel: keys.size("kernel_size", 3)?,
            hidden: keys.size("hidden_size", 128)?,
            dropout: (keys.number("channel_dropout", 0.25)?, keys.number("hidden_dropout", 0.5)?),
            classes: keys.labels(MOST[4].1)?,
        };
        config.check().map_err(|e| Error::input(path, e.to_string()))?;
        Ok(config)
    }

    /// The configuration with the keys of Hugging Face's where those say the same.
    pub fn to_hf(&self) -> Value {
        let (height, width) = self.image_size;
        let (id2label, label2id) = label_maps(&self.classes);
        json!({
            "architectures": ["QtuneConvForImageClassification"],
            "model_type": KIND,
            "image_size": if height == width { json!(height) } else { json!([height, width]) },
            "num_channels": self.channels,
            "widths": self.widths,
            "kernel_size": self.kernel,
            "hidden_size": self.hidden,
            "hidden_act": "relu",
            "channel_dropout": self.dropout.0,
            "hidden_dropout": self.dropout.1,
            "id2label": id2label,
            "label2id": label2id,
            "torch_dtype": "float32",
            "dtype": "float32",
        })
    }

    /// Errs ([`Error::Usage`]) on sizes that are zero, absurdly large, or leave nothing of the image, and
    /// on a dropout out of range.
    pub fn check(&self) -> Result<()> {
        let (height, width) = self.image_size;
        let values = [height.max(width), self.channels, self.kernel, self.hidden, self.classes.len()];
        let bounds = MOST.into_iter().zip(values).map(|((name, most), found)| (name, most, found));
        let widths = self.widths.iter().map(|&n| ("widths", MOST_WIDTH, n));
        for (name, most, found) in bounds.chain([("widths", MOST_LAYERS, self.widths.len())]).chain(widths) {
            if found == 0 || found > most {
                return Err(Error::usage(format!("{name}: found {found}, expected 1 to {most}")));
            }
        }
        let lost = (self.kernel - 1) * self.widths.len();
        if height.min(width) < lost + 2 {
            return Err(Error::usage(format!(
                "image_size: found {height}x{width}, expected {} or more on a side for {} convolutions of {} pixels \
                 and a pooling",
                lost + 2,
                self.widths.len(),
                self.kernel
            )));
        }
        let matrix = self.features().saturating_mul(self.hidden);
        if matrix > MOST_MATRIX {
            return Err(Error::usage(format!(
                "hidden_size: found {}, a matrix of {matrix} numbers behind the convolutions, expected at most {MOST_MATRIX}",
                self.hidden
            )));
        }
        for (name, shape) in self.shapes() {
            let numbers = shape.iter().fold(1, |all: usize, n| all.saturating_mul(*n));
            if numbers > MOST_MATRIX {
                return Err(Error::usage(format!(
                    "{name}: found {shape:?}, expected at most {MOST_MATRIX} numbers"
                )));
            }
        }
        for (key, p) in [("channel_dropout", self.dropout.0), ("hidden_dropout", self.dropout.1)] {
            if !(0.0..1.0).contains(&p) {
                return Err(Error::usage(format!("{key}: found {p}, expected 0 or more and less than 1")));
            }
        }
        Ok(())
    }

    /// Height, width and channels of the map that convolution `layer` gives, before any pooling.
    pub fn map(&self, layer: usize) -> (usize, usize, usize) {
        let lost = (layer + 1) * (self.kernel - 1);
        let width = self.widths.get(layer).copied().unwrap_or(0);
        (self.image_size.0.saturating_sub(lost), self.image_size.1.saturating_sub(lost), width)
    }

    /// Elements of the pooled last map.
    pub fn features(&self) -> usize {
        let (height, width, channels) = self.map(self.widths.len().saturating_sub(1));
        (height / 2).saturating_mul(width / 2).saturating_mul(channels)
    }

    /// Every tensor the model needs, by name and shape, in order from input to output.
    pub fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let mut shapes = Vec::new();
        let mut add = |name: &str, weight: Vec<usize>| {
            let out = weight.first().copied().unwrap_or(0);
            shapes.push((format!("{name}.weight"), weight));
            shapes.push((format!("{name}.bias"), vec![out]));
        };
        let mut inner = self.channels;
        for (layer, &out) in self.widths.iter().enumerate() {
            add(&format!("conv.{layer}"), vec![out, inner, self.kernel, self.kernel]);
            inner = out;
        }
        add("fc", vec![self.hidden, self.features()]);
        add("classifier", vec![self.classes.len(), self.hidden]);
        shapes
    }
}

#[cfg(test)]
mod tests {
    use super::super::keys::numbered_labels;
    use super::*;

    fn published() -> ConvConfig {
        ConvConfig {
            image_size: (28, 28),
            channels: 1,
            widths: vec![32, 64],
            kernel: 3,
            hidden: 128,
            dropout: (0.25, 0.5),
            classes: numbered_labels(10),
        }
    }

    fn read(json: Value) -> Result<ConvConfig> {
        ConvConfig::from_hf(Path::new("config.json"), &json)
    }

    #[test]
    fn writes_what_it_reads_and_defaults_to_the_published_sizes() {
        let other = ConvConfig {
            image_size: (12, 20),
            channels: 3,
            widths: vec![4, 5, 6],
            kernel: 2,
            hidden: 7,
            dropout: (0.0, 0.125),
            classes: vec!["a".into(), "b".into()],
        };
        for config in [published(), other] {
            assert_eq!(read(config.to_hf()).unwrap(), config);
        }
        assert_eq!(read(json!({"model_type": "qtune_conv", "num_labels": 10})).unwrap(), published());
    }

    #[test]
    fn shapes_are_those_of_the_published_network() {
        let config = published();
        assert_eq!((config.map(0), config.map(1), config.features()), ((26, 26, 32), (24, 24, 64), 9216));
        let shapes = config.shapes();
        let of = |name: &str| shapes.iter().find(|(n, _)| n == name).unwrap().1.clone();
        assert_eq!(of("conv.0.weight"), [32, 1, 3, 3]);
        assert_eq!(of("conv.1.weight"), [64, 32, 3, 3]);
        assert_eq!((of("fc.weight"), of("fc.bias")), (vec![128, 9216], vec![128]));
        assert_eq!(of("classifier.weight"), [10, 128]);
        let count: usize = shapes.iter().map(|(_, s)| s.iter().product::<usize>()).sum();
        // 320 + 18 496 + 1 179 776 + 1 290.
        assert_eq!(count, 1_199_882);
    }

    #[test]
    fn what_does_not_fit_names_key_found_and_expected() {
        for (key, value, expected) in [
            ("model_type", json!("vit"), "found \"vit\", expected qtune_conv"),
            (
                "image_size",
                json!(5),
                "found 5x5, expected 6 or more on a side for 2 convolutions of 3 pixels",
            ),
            ("image_size", json!([28, 0]), "found 28x0"),
            ("image_size", json!(1 << 20), "expected 1 to 4096"),
            ("kernel_size", json!(0), "found 0, expected 1 to"),
            ("widths", json!([]), "found 0, expected 1 to"),
            ("widths", json!([32, 0]), "found 0, expected 1 to"),
            ("widths", json!([32, -1]), "expected a list of whole numbers"),
            ("hidden_size", json!("128"), "expected a whole number"),
            ("channel_dropout", json!(1.0), "found 1, expected 0 or more and less than 1"),
            ("hidden_dropout", json!(-0.5), "found -0.5"),
            ("id2label", json!({"0": "a", "2": "b"}), "found no label 1"),
        ] {
            let mut config = json!({"model_type": "qtune_conv"});
            config[key] = value;
            let error = read(config).unwrap_err();
            assert_eq!(error.exit_code(), 4);
            let error = error.to_string();
            assert!(error.starts_with("config.json: "), "{error}");
            assert!(error.contains(expected) && error.contains(key), "{error}");
        }
        let huge = json!({"model_type": "qtune_conv", "image_size": 4096, "hidden_size": 65536});
        assert!(read(huge).unwrap_err().to_string().contains("hidden_size: found 65536"));
        let mut huge = ConvConfig { widths: vec![16384, 16384], hidden: 1, ..published() };
        let text = huge.check().unwrap_err().to_string();
        let expected = "conv.1.weight: found [16384, 16384, 3, 3], expected at most 1073741824 numbers";
        assert_eq!(text, expected);
        huge = ConvConfig { hidden: 1 << 16, classes: numbered_labels((1 << 14) + 1), ..published() };
        assert!(huge.check().unwrap_err().to_string().starts_with("classifier.weight: found [16385, 65536]"));
        huge.classes.truncate(1 << 14);
        assert!(huge.check().is_ok());
    }
}
