//! The sizes and labels of a Swin transformer, read from and written to a Hugging Face `config.json`.

use std::path::Path;

use serde_json::{json, Value};

use super::attention::AttentionPlace;
use super::keys::{label_maps, Keys};
use super::windows::Windows;
use crate::error::{Error, Result};

/// Bounds on what a configuration may ask for, each far above any published Swin: a file that lies
/// about a size is refused before anything of that size is made.
const MOST: [(&str, usize); 6] = [
    ("image_size", 1 << 13),
    ("patch_size", 1 << 12),
    ("num_channels", 1 << 10),
    ("embed_dim", 1 << 14),
    ("window_size", 1 << 6),
    ("labels", 1 << 22),
];
const MOST_STAGES: usize = 8;
const MOST_BLOCKS: usize = 1 << 10;
const MOST_CHANNELS: usize = 1 << 16;
const MOST_MLP: usize = 1 << 18;
/// Numbers of the mask of a stage's shifted windows: far above any published Swin at any published size.
const MOST_MASK: usize = 1 << 28;

/// Swin sizes and labels.
#[derive(Clone, Debug, PartialEq)]
pub struct SwinConfig {
    /// Height and width of the input, in pixels.
    pub image_size: (usize, usize),
    /// Side of a square patch, in pixels.
    pub patch_size: usize,
    /// Channels of the input: 3 for RGB.
    pub channels: usize,
    /// Channels of the first stage; each stage has twice those of the one before.
    pub embed: usize,
    /// Blocks of each stage.
    pub depths: Vec<usize>,
    /// Attention heads of each stage.
    pub heads: Vec<usize>,
    /// Side of an attention window, in patches of the stage.
    pub window: usize,
    /// Channels inside an MLP over those of its stage.
    pub mlp_ratio: f64,
    /// Added to the variance in the layer norms of the blocks and the last one.
    pub eps: f64,
    /// Whether the query, key and value projections have biases.
    pub qkv_bias: bool,
    /// The label of each class id.
    pub classes: Vec<String>,
}

/// The sizes of one stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage {
    /// Rows and columns of its feature map.
    pub grid: (usize, usize),
    /// Channels.
    pub channels: usize,
    /// Blocks.
    pub blocks: usize,
    /// Attention heads.
    pub heads: usize,
    /// Channels inside an MLP.
    pub mlp: usize,
    /// Side of a window: the model's, or the shorter side of the map where that is not longer.
    pub window: usize,
    /// How far the windows of every second block are shifted: half the model's window, or not at all
    /// where one window spans the shorter side of the map.
    pub shift: usize,
}

impl Stage {
    /// The windows of block `block`.
    pub fn windows(&self, block: usize) -> Windows {
        Windows::new(self.grid, self.window, if block.is_multiple_of(2) { 0 } else { self.shift })
    }

    /// Rows of a relative position table: all offsets between two patches of a window.
    pub fn offsets(&self) -> usize {
        (2 * self.window - 1).pow(2)
    }
}

impl SwinConfig {
    /// Reads a Hugging Face configuration; missing keys take transformers' defaults. `path` is for
    /// error messages.
    ///
    /// Errs on a model type other than swin (Swin v2 computes otherwise), absolute position embeddings,
    /// an activation other than gelu, a value of the wrong type, sizes that do not go together and labels
    /// that do not count from 0.
    pub fn from_hf(path: &Path, json: &Value) -> Result<Self> {
        let keys = Keys::of(path, json)?;
        let kind = match (keys.model_type(), keys.architecture()) {
            (Some(kind), _) => kind,
            (None, Some(name)) if name.starts_with("Swin") && !name.starts_with("Swinv2") => "swin",
            (None, _) => "none",
        };
        if kind != "swin" {
            return Err(keys.error("model_type", &format!("found {kind:?}, expected swin")));
        }
        if keys.truth("use_absolute_embeddings", false)? {
            let message = "found true, expected false: qtune's Swin has relative positions alone";
            return Err(keys.error("use_absolute_embeddings", message));
        }
        keys.gelu()?;
        let config = SwinConfig {
            image_size: keys.sizes("image_size", 224)?,
            patch_size: keys.square("patch_size", 4)?,
            channels: keys.size("num_channels", 3)?,
            embed: keys.size("embed_dim", 96)?,
            depths: keys.list("depths", &[2, 2, 6, 2])?,
            heads: keys.list("num_heads", &[3, 6, 12, 24])?,
            window: keys.size("window_size", 7)?,
            mlp_ratio: keys.number("mlp_ratio", 4.0)?,
            eps: keys.number("layer_norm_eps", 1e-5)?,
            qkv_bias: keys.truth("qkv_bias", true)?,
            classes: keys.labels(MOST[5].1)?,
        };
        config.check().map_err(|e| Error::input(path, e.to_string()))?;
        Ok(config)
    }

    /// The configuration as transformers reads it.
    pub fn to_hf(&self) -> Value {
        let (height, width) = self.image_size;
        let (id2label, label2id) = label_maps(&self.classes);
        json!({
            "architectures": ["SwinForImageClassification"],
            "model_type": "swin",
            "image_size": if height == width { json!(height) } else { json!([height, width]) },
            "patch_size": self.patch_size,
            "num_channels": self.channels,
            "embed_dim": self.embed,
            "depths": self.depths,
            "num_heads": self.heads,
            "num_layers": self.depths.len(),
            "hidden_size": self.embed << (self.depths.len() - 1),
            "window_size": self.window,
            "mlp_ratio": self.mlp_ratio,
            "hidden_act": "gelu",
            "layer_norm_eps": self.eps,
            "qkv_bias": self.qkv_bias,
            "use_absolute_embeddings": false,
            "attention_probs_dropout_prob": 0.0,
            "hidden_dropout_prob": 0.0,
            "drop_path_rate": 0.0,
            "initializer_range": 0.02,
            "encoder_stride": 32,
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
        let (embed, window, labels) = (self.embed, self.window, self.classes.len());
        let values = [height.max(width), self.patch_size, self.channels, embed, window, labels];
        let bounds = MOST.into_iter().zip(values).map(|((name, most), found)| (name, most, found));
        let stages = self.depths.len();
        let depths = self.depths.iter().map(|&n| ("depths", MOST_BLOCKS, n));
        for (name, most, found) in bounds.chain([("depths", MOST_STAGES, stages)]).chain(depths) {
            if found == 0 || found > most {
                return Err(Error::usage(format!("{name}: found {found}, expected 1 to {most}")));
            }
        }
        if self.heads.len() != stages {
            let found = self.heads.len();
            return Err(Error::usage(format!(
                "num_heads: found {found} stages, expected {stages} as depths has"
            )));
        }
        let p = self.patch_size;
        if height == 0 || width == 0 || !height.is_multiple_of(p) || !width.is_multiple_of(p) {
            let message = format!(
                "image_size: found {height}x{width}, expected multiples of patch_size {p} in both directions"
            );
            return Err(Error::usage(message));
        }
        for (stage, &heads) in self.heads.iter().enumerate() {
            let channels = embed << stage;
            if channels > MOST_CHANNELS {
                let message = format!("embed_dim: stage {stage} has {channels} channels, expected at most");
                return Err(Error::usage(format!("{message} {MOST_CHANNELS}")));
            }
            if heads == 0 || !channels.is_multiple_of(heads) {
                let message = format!("num_heads: found {heads} in stage {stage}, expected a divisor of its");
                return Err(Error::usage(format!("{message} {channels} channels")));
            }
            let mlp = channels as f64 * self.mlp_ratio;
            if !(mlp >= 1.0 && mlp <= MOST_MLP as f64) {
                return Err(Error::usage(format!(
                    "mlp_ratio: found {}, expected 1 to {MOST_MLP} channels inside the MLP",
                    self.mlp_ratio
                )));
            }
        }
        for (stage, sizes) in self.stages().iter().enumerate() {
            // What a mask of shifted windows takes: the padded map times the window's patches.
            let window = sizes.window.max(1);
            let padded = sizes.grid.0.next_multiple_of(window) * sizes.grid.1.next_multiple_of(window);
            let mask = padded.saturating_mul(window * window);
            if mask > MOST_MASK {
                let (rows, columns) = sizes.grid;
                return Err(Error::usage(format!(
                    "window_size: found {window} in a map of {rows} x {columns} patches in stage {stage}, a mask of \
                     {mask} numbers, expected at most {MOST_MASK}"
                )));
            }
        }
        if !(self.eps.is_finite() && self.eps > 0.0) {
            return Err(Error::usage(format!("layer_norm_eps: found {}, expected above 0", self.eps)));
        }
        Ok(())
    }

    /// The stages, first to last. A map of odd sides is padded where the next stage halves it.
    pub fn stages(&self) -> Vec<Stage> {
        let mut grid = (self.image_size.0 / self.patch_size, self.image_size.1 / self.patch_size);
        let mut stages = Vec::with_capacity(self.depths.len());
        for (stage, (&blocks, &heads)) in self.depths.iter().zip(&self.heads).enumerate() {
            let channels = self.embed << stage;
            let shorter = grid.0.min(grid.1);
            let (window, shift) =
                if shorter <= self.window { (shorter, 0) } else { (self.window, self.window / 2) };
            let mlp = (channels as f64 * self.mlp_ratio) as usize;
            stages.push(Stage { grid, channels, blocks, heads, mlp, window, shift });
            grid = (grid.0.div_ceil(2), grid.1.div_ceil(2));
        }
        stages
    }

    /// The attention of the block called `block`, of this stage.
    pub fn attention(&self, stage: &Stage, block: &str) -> AttentionPlace {
        AttentionPlace {
            inner: format!("{block}.attention.self"),
            output: format!("{block}.attention.output.dense"),
            width: stage.channels,
            heads: stage.heads,
            qkv_bias: self.qkv_bias,
        }
    }

    /// The attentions of all blocks, from input to output.
    pub fn attentions(&self) -> Vec<AttentionPlace> {
        let stages = self.stages();
        let blocks = stages.iter().enumerate().flat_map(|(s, stage)| {
            (0..stage.blocks).map(move |b| (stage, format!("swin.encoder.layers.{s}.blocks.{b}")))
        });
        blocks.map(|(stage, block)| self.attention(stage, &block)).collect()
    }

    /// Every tensor the model needs, by canonical name and shape, in order from input to output.
    pub fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let mut shapes = Vec::new();
        let mut add = |name: String, shape: &[usize]| shapes.push((name, shape.to_vec()));
        let (embed, p) = (self.embed, self.patch_size);
        add("swin.embeddings.patch_embeddings.projection.weight".into(), &[embed, self.channels, p, p]);
        add("swin.embeddings.patch_embeddings.projection.bias".into(), &[embed]);
        add("swin.embeddings.norm.weight".into(), &[embed]);
        add("swin.embeddings.norm.bias".into(), &[embed]);
        let stages = self.stages();
        for (s, stage) in stages.iter().enumerate() {
            let (c, m) = (stage.channels, stage.mlp);
            for b in 0..stage.blocks {
                let block = format!("swin.encoder.layers.{s}.blocks.{b}");
                let inner = format!("{block}.attention.self");
                for norm in ["layernorm_before", "layernorm_after"] {
                    add(format!("{block}.{norm}.weight"), &[c]);
                    add(format!("{block}.{norm}.bias"), &[c]);
                }
                add(format!("{inner}.relative_position_bias_table"), &[stage.offsets(), stage.heads]);
                for part in ["query", "key", "value"] {
                    add(format!("{inner}.{part}.weight"), &[c, c]);
                    if self.qkv_bias {
                        add(format!("{inner}.{part}.bias"), &[c]);
                    }
                }
                for (part, out, inner) in
                    [("attention.output.dense", c, c), ("intermediate.dense", m, c), ("output.dense", c, m)]
                {
                    add(format!("{block}.{part}.weight"), &[out, inner]);
                    add(format!("{block}.{part}.bias"), &[out]);
                }
            }
            if s + 1 < stages.len() {
                let merging = format!("swin.encoder.layers.{s}.downsample");
                add(format!("{merging}.norm.weight"), &[4 * c]);
                add(format!("{merging}.norm.bias"), &[4 * c]);
                add(format!("{merging}.reduction.weight"), &[2 * c, 4 * c]);
            }
        }
        let last = embed << (self.depths.len() - 1);
        add("swin.layernorm.weight".into(), &[last]);
        add("swin.layernorm.bias".into(), &[last]);
        add("classifier.weight".into(), &[self.classes.len(), last]);
        add("classifier.bias".into(), &[self.classes.len()]);
        shapes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: Value) -> Result<SwinConfig> {
        SwinConfig::from_hf(Path::new("config.json"), &json)
    }

    fn count(config: &SwinConfig) -> usize {
        config.shapes().iter().map(|(_, s)| s.iter().product::<usize>()).sum()
    }

    #[test]
    fn missing_keys_are_those_of_swin_tiny_and_its_parameters_are_counted() {
        let tiny = read(json!({"model_type": "swin", "num_labels": 1000})).unwrap();
        assert_eq!((tiny.embed, tiny.window, tiny.eps), (96, 7, 1e-5));
        // The published counts of torchvision's swin_t and swin_s.
        assert_eq!(count(&tiny), 28_288_354);
        assert_eq!(count(&SwinConfig { depths: vec![2, 2, 18, 2], ..tiny.clone() }), 49_606_258);
        let grids: Vec<_> = tiny.stages().iter().map(|s| (s.grid.0, s.window, s.shift, s.channels)).collect();
        assert_eq!(grids, [(56, 7, 3, 96), (28, 7, 3, 192), (14, 7, 3, 384), (7, 7, 0, 768)]);
    }

    #[test]
    fn windows_are_clamped_to_the_map() {
        let config = read(json!({"model_type": "swin", "image_size": [72, 52]})).unwrap();
        let sizes: Vec<_> = config.stages().iter().map(|s| (s.grid, s.window, s.shift)).collect();
        assert_eq!(sizes, [((18, 13), 7, 3), ((9, 7), 7, 0), ((5, 4), 4, 0), ((3, 2), 2, 0)]);
        assert_eq!(config.stages()[3].offsets(), 9);
    }

    #[test]
    fn writes_what_it_reads() {
        let config = SwinConfig {
            image_size: (12, 8),
            patch_size: 2,
            channels: 1,
            embed: 6,
            depths: vec![2, 1],
            heads: vec![2, 3],
            window: 2,
            mlp_ratio: 1.5,
            eps: 1e-6,
            qkv_bias: false,
            classes: vec!["a".into(), "b".into()],
        };
        assert_eq!(read(config.to_hf()).unwrap(), config);
        assert_eq!(config.to_hf()["hidden_size"], 12);
    }

    #[test]
    fn what_does_not_fit_names_key_found_and_expected() {
        for (key, value, expected) in [
            ("model_type", json!("swinv2"), "found \"swinv2\", expected swin"),
            ("use_absolute_embeddings", json!(true), "found true, expected false"),
            ("hidden_act", json!("relu"), "found \"relu\", expected \"gelu\""),
            ("depths", json!([2, "2"]), "expected a list of whole numbers"),
            ("depths", json!([2, 2, 0, 2]), "found 0, expected 1 to"),
            ("depths", json!([]), "found 0, expected 1 to 8"),
            ("num_heads", json!([3, 6, 12]), "found 3 stages, expected 4"),
            ("num_heads", json!([3, 6, 11, 24]), "found 11 in stage 2, expected a divisor of its 384"),
            ("num_heads", json!([3, 6, 12, 0]), "found 0 in stage 3"),
            ("embed_dim", json!(u64::MAX), "expected 1 to"),
            ("window_size", json!(0), "found 0, expected 1 to 64"),
            ("image_size", json!(222), "found 222x222, expected multiples of patch_size 4"),
            ("patch_size", json!([4, 2]), "expected a square"),
            ("mlp_ratio", json!(-1.0), "found -1"),
            ("mlp_ratio", json!(1e9), "found 1000000000"),
            ("layer_norm_eps", json!(0.0), "expected above 0"),
        ] {
            let mut config = json!({"model_type": "swin"});
            config[key] = value;
            let error = read(config).unwrap_err();
            assert_eq!(error.exit_code(), 4);
            let error = error.to_string();
            assert!(error.starts_with("config.json: "), "{error}");
            assert!(error.contains(expected) && error.contains(key), "{error}");
        }
        let deep = json!({"model_type": "swin", "embed_dim": 1 << 13, "depths": [1, 1, 1, 1, 1],
            "num_heads": [1, 1, 1, 1, 1]});
        assert!(read(deep).unwrap_err().to_string().contains("131072 channels"));
    }
}
