//! The sizes and labels of a ViT or DeiT, read from and written to a Hugging Face `config.json`.

use super::attention::AttentionPlace;
use crate::error::{Error, Result};
use serde_json::{json, Map, Value};
use std::path::Path;

/// Bounds on what a configuration may ask for, each far above any published ViT: a file that lies
/// about a size is refused before anything of that size is made.
const MOST: [(&str, usize); 8] = [
    ("image_size", 1 << 14),
    ("patch_size", 1 << 12),
    ("num_channels", 1 << 10),
    ("hidden_size", 1 << 16),
    ("num_hidden_layers", 1 << 10),
    ("num_attention_heads", 1 << 12),
    ("intermediate_size", 1 << 18),
    ("labels", 1 << 22),
];

/// ViT/DeiT sizes and labels.
#[derive(Clone, Debug, PartialEq)]
pub struct VitConfig {
    /// Height and width of the input, in pixels.
    pub image_size: (usize, usize),
    /// Side of a square patch, in pixels.
    pub patch_size: usize,
    /// Channels of the input: 3 for RGB.
    pub channels: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Number of transformer blocks.
    pub layers: usize,
    /// Attention heads a block; they share `hidden` evenly.
    pub heads: usize,
    /// Width inside the MLP.
    pub mlp: usize,
    /// Added to the variance in layer norms.
    pub eps: f64,
    /// Whether the query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Whether there is a distillation token (DeiT).
    pub distilled: bool,
    /// Whether the distillation token has a classifier of its own; the logits are then the mean of
    /// both.
    pub two_heads: bool,
    /// The label of each class id.
    pub classes: Vec<String>,
}

impl VitConfig {
    /// Reads a Hugging Face configuration; missing keys take transformers' defaults. `path` is for
    /// error messages.
    ///
    /// Errs on a model type other than vit and deit, an activation other than gelu, a value of the
    /// wrong type, sizes that do not go together and labels that do not count from 0.
    pub fn from_hf(path: &Path, json: &Value) -> Result<Self> {
        let Some(keys) = json.as_object() else {
            return Err(Error::input(path, "found no JSON object, expected a model configuration"));
        };
        let reader = Reader { path, keys };
        let architecture = keys.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str);
        let kind = match (keys.get("model_type").and_then(Value::as_str), architecture) {
            (Some(kind), _) => kind,
            (None, Some(name)) if name.starts_with("ViT") => "vit",
            (None, Some(name)) if name.starts_with("DeiT") => "deit",
            (None, _) => "none",
        };
        let distilled = match kind {
            "vit" => false,
            "deit" => true,
            found => {
                return Err(reader.error("model_type", &format!("found {found:?}, expected vit or deit")))
            }
        };
        let activation = keys.get("hidden_act").map_or(Some("gelu"), Value::as_str);
        if activation != Some("gelu") {
            let found = keys.get("hidden_act").unwrap_or(&Value::Null);
            return Err(reader.error("hidden_act", &format!("found {found}, expected \"gelu\"")));
        }
        let patch = reader.sizes("patch_size", 16)?;
        if patch.0 != patch.1 {
            return Err(reader.error("patch_size", &format!("found {patch:?}, expected a square")));
        }
        let config = VitConfig {
            image_size: reader.sizes("image_size", 224)?,
            patch_size: patch.0,
            channels: reader.size("num_channels", 3)?,
            hidden: reader.size("hidden_size", 768)?,
            layers: reader.size("num_hidden_layers", 12)?,
            heads: reader.size("num_attention_heads", 12)?,
            mlp: reader.size("intermediate_size", 3072)?,
            eps: reader.number("layer_norm_eps", 1e-12)?,
            qkv_bias: reader.truth("qkv_bias", true)?,
            distilled,
            two_heads: distilled && architecture == Some("DeiTForImageClassificationWithTeacher"),
            classes: reader.labels()?,
        };
        config.check().map_err(|e| Error::input(path, e.to_string()))?;
        Ok(config)
    }

    /// The configuration as transformers reads it.
    pub fn to_hf(&self) -> Value {
        let (height, width) = self.image_size;
        let architecture = match (self.distilled, self.two_heads) {
            (false, _) => "ViTForImageClassification",
            (true, false) => "DeiTForImageClassification",
            (true, true) => "DeiTForImageClassificationWithTeacher",
        };
        let id2label: Map<String, Value> =
            self.classes.iter().enumerate().map(|(i, c)| (i.to_string(), json!(c))).collect();
        let label2id: Map<String, Value> =
            self.classes.iter().enumerate().map(|(i, c)| (c.clone(), json!(i))).collect();
        json!({
            "architectures": [architecture],
            "model_type": self.prefix(),
            "image_size": if height == width { json!(height) } else { json!([height, width]) },
            "patch_size": self.patch_size,
            "num_channels": self.channels,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.mlp,
            "hidden_act": "gelu",
            "layer_norm_eps": self.eps,
            "qkv_bias": self.qkv_bias,
            "attention_probs_dropout_prob": 0.0,
            "hidden_dropout_prob": 0.0,
            "initializer_range": 0.02,
            "encoder_stride": self.patch_size,
            "id2label": id2label,
            "label2id": label2id,
            // Old and new transformers spell the same key differently.
            "torch_dtype": "float32",
            "dtype": "float32",
        })
    }

    /// Errs ([`Error::Usage`]) on sizes that are zero, absurdly large, or do not divide as they must.
    pub fn check(&self) -> Result<()> {
        let (height, width) = self.image_size;
        let values = [
            height.max(width),
            self.patch_size,
            self.channels,
            self.hidden,
            self.layers,
            self.heads,
            self.mlp,
            self.classes.len(),
        ];
        for ((name, most), found) in MOST.into_iter().zip(values) {
            if found == 0 || found > most {
                return Err(Error::usage(format!("{name}: found {found}, expected 1 to {most}")));
            }
        }
        let p = self.patch_size;
        if height == 0 || width == 0 || !height.is_multiple_of(p) || !width.is_multiple_of(p) {
            let message = format!(
                "image_size: found {height}x{width}, expected multiples of patch_size {p} in both directions"
            );
            return Err(Error::usage(message));
        }
        if !self.hidden.is_multiple_of(self.heads) {
            let (hidden, heads) = (self.hidden, self.heads);
            let message =
                format!("num_attention_heads: found {heads}, expected a divisor of hidden_size {hidden}");
            return Err(Error::usage(message));
        }
        if !(self.eps.is_finite() && self.eps > 0.0) {
            return Err(Error::usage(format!("layer_norm_eps: found {}, expected above 0", self.eps)));
        }
        if self.two_heads && !self.distilled {
            return Err(Error::usage("two classifiers need a distillation token, found none"));
        }
        Ok(())
    }

    /// Rows and columns of patches.
    pub fn grid(&self) -> (usize, usize) {
        (self.image_size.0 / self.patch_size, self.image_size.1 / self.patch_size)
    }

    /// Tokens before the patches: the class token and, distilled, the distillation token.
    pub fn extra_tokens(&self) -> usize {
        1 + usize::from(self.distilled)
    }

    /// Length of the sequence: patches and extra tokens.
    pub fn tokens(&self) -> usize {
        self.grid().0 * self.grid().1 + self.extra_tokens()
    }

    /// The first component of the tensor names: "vit", or "deit" with a distillation token.
    pub fn prefix(&self) -> &'static str {
        if self.distilled {
            "deit"
        } else {
            "vit"
        }
    }

    /// The modules that map a token to logits: one `classifier`, or the two of a distilled DeiT.
    pub fn heads_of_classes(&self) -> &'static [&'static str] {
        if self.two_heads {
            &["cls_classifier", "distillation_classifier"]
        } else {
            &["classifier"]
        }
    }

    /// The attention of the block called `block`.
    pub fn attention(&self, block: &str) -> AttentionPlace {
        AttentionPlace {
            inner: format!("{block}.attention.attention"),
            output: format!("{block}.attention.output.dense"),
            width: self.hidden,
            heads: self.heads,
            qkv_bias: self.qkv_bias,
        }
    }

    /// The attentions of all blocks, from input to output.
    pub fn attentions(&self) -> Vec<AttentionPlace> {
        let prefix = self.prefix();
        (0..self.layers).map(|i| self.attention(&format!("{prefix}.encoder.layer.{i}"))).collect()
    }

    /// Every tensor the model needs, by canonical name and shape, in order from input to output.
    pub fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (c, m, p) = (self.hidden, self.mlp, self.patch_size);
        let mut shapes = Vec::new();
        let prefix = self.prefix();
        let mut add = |name: String, shape: &[usize]| shapes.push((name, shape.to_vec()));

        add(format!("{prefix}.embeddings.cls_token"), &[1, 1, c]);
        if self.distilled {
            add(format!("{prefix}.embeddings.distillation_token"), &[1, 1, c]);
        }
        add(format!("{prefix}.embeddings.position_embeddings"), &[1, self.tokens(), c]);
        let patches = format!("{prefix}.embeddings.patch_embeddings.projection");
        add(format!("{patches}.weight"), &[c, self.channels, p, p]);
        add(format!("{patches}.bias"), &[c]);
        for layer in 0..self.layers {
            let block = format!("{prefix}.encoder.layer.{layer}");
            for part in ["query", "key", "value"] {
                add(format!("{block}.attention.attention.{part}.weight"), &[c, c]);
                if self.qkv_bias {
                    add(format!("{block}.attention.attention.{part}.bias"), &[c]);
                }
            }
            for (part, out, inner) in
                [("attention.output.dense", c, c), ("intermediate.dense", m, c), ("output.dense", c, m)]
            {
                add(format!("{block}.{part}.weight"), &[out, inner]);
                add(format!("{block}.{part}.bias"), &[out]);
            }
            for part in ["layernorm_before", "layernorm_after"] {
                add(format!("{block}.{part}.weight"), &[c]);
                add(format!("{block}.{part}.bias"), &[c]);
            }
        }
        add(format!("{prefix}.layernorm.weight"), &[c]);
        add(format!("{prefix}.layernorm.bias"), &[c]);
        for head in self.heads_of_classes() {
            add(format!("{head}.weight"), &[self.classes.len(), c]);
            add(format!("{head}.bias"), &[self.classes.len()]);
        }
        shapes
    }
}

/// transformers' names for `count` classes that have none.
pub(crate) fn numbered_labels(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("LABEL_{i}")).collect()
}

/// Typed access to a configuration's keys, with errors that name file and key.
struct Reader<'a> {
    path: &'a Path,
    keys: &'a Map<String, Value>,
}

impl Reader<'_> {
    fn error(&self, key: &str, message: &str) -> Error {
        Error::input(self.path, format!("{key}: {message}"))
    }

    /// The value of `key` as `read` sees it, or the default where it is missing or null.
    fn get<T>(&self, key: &str, default: T, kind: &str, read: impl Fn(&Value) -> Option<T>) -> Result<T> {
        match self.keys.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => {
                read(value).ok_or_else(|| self.error(key, &format!("found {value}, expected {kind}")))
            }
        }
    }

    fn size(&self, key: &str, default: usize) -> Result<usize> {
        self.get(key, default, "a whole number", whole)
    }

    fn number(&self, key: &str, default: f64) -> Result<f64> {
        self.get(key, default, "a number", Value::as_f64)
    }

    fn truth(&self, key: &str, default: bool) -> Result<bool> {
        self.get(key, default, "true or false", Value::as_bool)
    }

    /// One size for both directions or `[height, width]`.
    fn sizes(&self, key: &str, default: usize) -> Result<(usize, usize)> {
        self.get(key, (default, default), "a whole number or [height, width]", |value| match value {
            Value::Array(two) if two.len() == 2 => Some((whole(&two[0])?, whole(&two[1])?)),
            one => whole(one).map(|n| (n, n)),
        })
    }

    /// `id2label`, else `num_labels` numbered ones, of which transformers' default is 2.
    fn labels(&self) -> Result<Vec<String>> {
        let Some(labels) = self.keys.get("id2label").filter(|v| !v.is_null()) else {
            let count = self.size("num_labels", 2)?;
            let most = MOST[7].1;
            if count > most {
                return Err(self.error("num_labels", &format!("found {count}, expected at most {most}")));
            }
            return Ok(numbered_labels(count));
        };
        let Some(labels) = labels.as_object() else {
            return Err(self.error("id2label", "found no object, expected one from class id to label"));
        };
        (0..labels.len())
            .map(|id| match labels.get(&id.to_string()) {
                Some(Value::String(label)) => Ok(label.clone()),
                Some(other) => Err(self.error("id2label", &format!("{id}: found {other}, expected a text"))),
                None => {
                    let last = labels.len() - 1;
                    Err(self
                        .error("id2label", &format!("found no label {id}, expected all from 0 to {last}")))
                }
            })
            .collect()
    }
}

fn whole(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|n| usize::try_from(n).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn tiny() -> VitConfig {
        VitConfig {
            image_size: (8, 4),
            patch_size: 2,
            channels: 3,
            hidden: 4,
            layers: 1,
            heads: 2,
            mlp: 6,
            eps: 1e-6,
            qkv_bias: true,
            distilled: true,
            two_heads: true,
            classes: vec!["a".into(), "b".into(), "a".into()],
        }
    }

    fn read(json: Value) -> Result<VitConfig> {
        VitConfig::from_hf(Path::new("config.json"), &json)
    }

    #[test]
    fn writes_what_it_reads() {
        let square = VitConfig { image_size: (8, 8), distilled: false, two_heads: false, ..tiny() };
        let one_head = VitConfig { two_heads: false, qkv_bias: false, ..tiny() };
        for (config, kind, architecture) in [
            (tiny(), "deit", "DeiTForImageClassificationWithTeacher"),
            (one_head, "deit", "DeiTForImageClassification"),
            (square, "vit", "ViTForImageClassification"),
        ] {
            let json = config.to_hf();
            assert_eq!(json["model_type"], kind);
            assert_eq!(json["architectures"], json!([architecture]));
            assert_eq!(read(json).unwrap(), config);
        }
        assert_eq!(tiny().to_hf()["image_size"], json!([8, 4]));
        assert_eq!(tiny().to_hf()["id2label"]["2"], "a");
        assert_eq!(tiny().to_hf()["label2id"]["b"], 1);
    }

    #[test]
    fn missing_keys_take_the_defaults_of_transformers() {
        let config = read(json!({"model_type": "vit"})).unwrap();
        assert_eq!((config.image_size, config.patch_size, config.hidden), ((224, 224), 16, 768));
        assert_eq!((config.layers, config.heads, config.mlp, config.eps), (12, 12, 3072, 1e-12));
        assert_eq!(config.classes, ["LABEL_0", "LABEL_1"]);
        assert_eq!(config.tokens(), 197);
        assert!(config.qkv_bias && !config.distilled);
        let named = read(json!({"architectures": ["DeiTModel"], "num_labels": 3})).unwrap();
        assert!(named.distilled && !named.two_heads);
        assert_eq!((named.tokens(), named.classes.len()), (198, 3));
    }

    #[test]
    fn what_does_not_fit_names_key_found_and_expected() {
        for (key, value, expected) in [
            ("model_type", json!("swin"), "found \"swin\", expected vit or deit"),
            ("hidden_act", json!("gelu_new"), "found \"gelu_new\", expected \"gelu\""),
            ("hidden_size", json!("768"), "found \"768\", expected a whole number"),
            ("hidden_size", json!(-4), "found -4"),
            ("hidden_size", json!(0), "found 0, expected 1 to"),
            ("num_hidden_layers", json!(u64::MAX), "expected 1 to"),
            ("num_attention_heads", json!(7), "found 7, expected a divisor of hidden_size 768"),
            ("image_size", json!(225), "found 225x225, expected multiples of patch_size 16"),
            ("image_size", json!([224, 0]), "found 224x0"),
            ("image_size", json!([224]), "expected a whole number or [height, width]"),
            ("patch_size", json!([16, 8]), "expected a square"),
            ("layer_norm_eps", json!(0.0), "found 0, expected above 0"),
            ("qkv_bias", json!("yes"), "expected true or false"),
            ("num_labels", json!(0), "labels: found 0"),
            ("num_labels", json!(u64::MAX), "expected at most"),
            ("id2label", json!({"0": "a", "2": "b"}), "found no label 1"),
            ("id2label", json!({"0": 4}), "found 4, expected a text"),
            ("id2label", json!([]), "found no object"),
        ] {
            let mut config = json!({"model_type": "vit"});
            config[key] = value;
            let error = read(config).unwrap_err();
            assert_eq!(error.exit_code(), 4);
            let error = error.to_string();
            assert!(error.starts_with("config.json: "), "{error}");
            assert!(error.contains(expected) && error.contains(key.trim_start_matches("num_")), "{error}");
        }
        assert!(read(json!(3)).unwrap_err().to_string().contains("expected a model configuration"));
    }

    #[test]
    fn shapes_count_every_parameter() {
        // DeiT-Tiny with 1000 classes: 5717416 parameters, the published number.
        let mut deit = VitConfig {
            image_size: (224, 224),
            patch_size: 16,
            hidden: 192,
            layers: 12,
            heads: 3,
            mlp: 768,
            distilled: false,
            two_heads: false,
            classes: numbered_labels(1000),
            ..tiny()
        };
        let count =
            |c: &VitConfig| c.shapes().iter().map(|(_, s)| s.iter().product::<usize>()).sum::<usize>();
        assert_eq!(count(&deit), 5_717_416);
        // Distilled: a token, its position, and a second classifier.
        (deit.distilled, deit.two_heads) = (true, true);
        assert_eq!(count(&deit), 5_717_416 + 2 * 192 + 193 * 1000);
        let names: Vec<String> = tiny().shapes().into_iter().map(|(n, _)| n).collect();
        assert_eq!(names[1], "deit.embeddings.distillation_token");
        assert_eq!(names[names.len() - 1], "distillation_classifier.bias");
        assert_eq!(tiny().shapes()[2].1, [1, 4 * 2 + 2, 4]);
    }
}
