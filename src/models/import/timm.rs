//! What a timm `config.json` says: of the model itself, and of how its images are prepared.

use super::super::keys::numbered_labels;
use super::{config_json, Want};
use crate::error::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// Whether a configuration is timm's.
pub(super) fn is_timm(json: &Value) -> bool {
    json.get("model_type").is_none()
        && (json.get("architecture").is_some_and(Value::is_string) || json.get("pretrained_cfg").is_some())
}

/// A family of timm's models.
pub(super) struct Family {
    /// How the names of its architectures begin.
    pub(super) names: &'static [&'static str],
    /// How errors call them.
    pub(super) expected: &'static str,
    /// How the classifier's input is pooled.
    pub(super) pool: &'static str,
}

/// ViT and DeiT.
pub(super) const VIT: Family =
    Family { names: &["vit_", "deit_"], expected: "vit_* or deit_*", pool: "token" };

/// Swin, the first version.
pub(super) const SWIN: Family = Family { names: &["swin_"], expected: "swin_*", pool: "avg" };

/// Whether the configuration of a timm model is a Swin's, of any version.
pub(super) fn is_timm_swin(json: &Value) -> bool {
    let either = json.get("architecture").or_else(|| json.get("pretrained_cfg")?.get("architecture"));
    either.and_then(Value::as_str).is_some_and(|name| name.starts_with("swin"))
}

/// What a timm `config.json` says of the model itself.
#[derive(Default)]
pub(super) struct TimmModel {
    architecture: Option<String>,
    classes: Option<usize>,
    labels: Option<Vec<String>>,
    heads: Option<usize>,
}

impl TimmModel {
    pub(super) fn read(path: &Path, json: &Value, family: &Family) -> Result<Self> {
        let bad = |key: &str, found: &Value, expected: &str| {
            Err(Error::input(path, format!("{key}: found {found}, expected {expected}")))
        };
        let either = |key: &str| json.get(key).or_else(|| json.get("pretrained_cfg")?.get(key));
        if let Some(found) = either("architecture") {
            if !found.as_str().is_some_and(|a| family.names.iter().any(|name| a.starts_with(name))) {
                return bad("architecture", found, family.expected);
            }
        }
        if let Some(found) = json.get("global_pool") {
            if found.as_str().is_some_and(|pool| !pool.is_empty() && pool != family.pool) {
                return bad("global_pool", found, &format!("{:?}", family.pool));
            }
        }
        let model_args = json.get("model_args");
        if let Some(found) = model_args.and_then(|a| a.get("act_layer")) {
            if found != "gelu" {
                return bad("act_layer", found, "\"gelu\"");
            }
        }
        let size = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
        let texts = |value: &Value| -> Option<Vec<String>> {
            value.as_array()?.iter().map(|label| label.as_str().map(str::to_string)).collect()
        };
        Ok(TimmModel {
            architecture: either("architecture").and_then(Value::as_str).map(str::to_string),
            classes: either("num_classes").and_then(size).filter(|&n| n > 0),
            labels: either("label_names").and_then(texts),
            heads: model_args.and_then(|a| a.get("num_heads")).and_then(size),
        })
    }

    /// The labels of a model whose classifier has so many `classes`: timm's, numbered ones, or, without a
    /// classifier, those that are wanted. `config` is the file that this was read from.
    pub(super) fn labels_of(
        &self,
        classes: Option<usize>,
        config: &Path,
        want: &Want,
    ) -> Result<Vec<String>> {
        match (classes, &self.labels, &want.classes) {
            (Some(n), _, _) if self.classes.is_some_and(|c| c != n) => {
                let found = self.classes.unwrap_or_default();
                let message = format!("num_classes: found {found}, expected {n} as the classifier has");
                Err(Error::input(config, message))
            }
            (Some(n), Some(labels), _) if labels.len() == n => Ok(labels.clone()),
            // Bounded by a real tensor only where the width is not 0; `check` refuses the rest.
            (Some(n), _, _) => Ok(numbered_labels(n.min(1 << 23))),
            (None, _, Some(wanted)) => Ok(wanted.clone()),
            (None, _, None) => {
                Err(Error::input(config, "found no classifier, expected one or wanted classes"))
            }
        }
    }

    /// The number of attention heads, which no tensor's shape tells.
    pub(super) fn heads(&self, hidden: usize, notes: &mut Vec<String>) -> usize {
        if let Some(heads) = self.heads {
            return heads;
        }
        const NAMED: [(&str, usize); 6] =
            [("_tiny_", 3), ("_small_", 6), ("_base_", 12), ("_large_", 16), ("_huge_", 16), ("_giant_", 16)];
        let architecture = self.architecture.as_deref().unwrap_or_default();
        match NAMED.iter().find(|(size, _)| format!("{architecture}_").contains(size)) {
            Some(&(_, heads)) => {
                notes.push(format!("attention heads: {heads}, from the name {architecture}"));
                heads
            }
            None => {
                let heads = (hidden / 64).max(1);
                notes.push(format!(
                    "attention heads: {heads}, guessed as one for every 64 of {hidden} channels"
                ));
                heads
            }
        }
    }
}

/// How timm prepares the images of a model: the `pretrained_cfg` of its `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct TimmPreprocess {
    /// Subtracted from each channel, which is in 0..1.
    pub mean: Vec<f64>,
    /// Each channel is divided by it then.
    pub std: Vec<f64>,
    /// The part of the shorter side that is kept in evaluation, in (0, 1].
    pub crop_pct: f64,
    /// "bicubic", "bilinear", …
    pub interpolation: String,
    /// Channels, height, width.
    pub input_size: (usize, usize, usize),
}

impl TimmPreprocess {
    /// Missing keys take timm's defaults.
    pub(super) fn read(path: &Path, json: &Value) -> Result<Self> {
        // Older files hold the same keys one level up.
        let keys = json.get("pretrained_cfg").filter(|v| v.is_object()).unwrap_or(json);
        let bad = |key: &str, found: &Value, expected: &str| {
            Error::input(path, format!("{key}: found {found}, expected {expected}"))
        };
        let get = |key: &str| keys.get(key).filter(|v| !v.is_null());
        let list = |key: &str, default: &[f64], least: f64| match get(key) {
            None => Ok(default.to_vec()),
            Some(found) => {
                let numbers: Option<Vec<f64>> =
                    found.as_array().and_then(|a| a.iter().map(Value::as_f64).collect());
                numbers
                    .filter(|n| !n.is_empty() && n.iter().all(|&v| v > least))
                    .ok_or_else(|| bad(key, found, &format!("a list of numbers above {least}")))
            }
        };
        let input = list("input_size", &[3.0, 224.0, 224.0], 0.0)?;
        let whole = |v: &f64| v.fract() == 0.0 && *v <= f64::from(1 << 14);
        let input_size = match input.as_slice() {
            [c, h, w] if input.iter().all(whole) => (*c as usize, *h as usize, *w as usize),
            _ => {
                let found = get("input_size").unwrap_or(&Value::Null);
                return Err(bad("input_size", found, "[channels, height, width]"));
            }
        };
        let crop_pct = match get("crop_pct") {
            None => 0.875,
            Some(found) => found
                .as_f64()
                .filter(|c| *c > 0.0 && *c <= 1.0)
                .ok_or_else(|| bad("crop_pct", found, "a number in (0, 1]"))?,
        };
        let interpolation = match get("interpolation") {
            None => "bicubic".to_string(),
            Some(Value::String(name)) => name.clone(),
            Some(found) => return Err(bad("interpolation", found, "a name such as \"bicubic\"")),
        };
        Ok(TimmPreprocess {
            mean: list("mean", &[0.485, 0.456, 0.406], f64::MIN)?,
            std: list("std", &[0.229, 0.224, 0.225], 0.0)?,
            crop_pct,
            interpolation,
            input_size,
        })
    }

    /// Rows and columns of patches.
    pub(super) fn grid(&self, patch: usize) -> Option<(usize, usize)> {
        Some((self.input_size.1.checked_div(patch)?, self.input_size.2.checked_div(patch)?))
    }
}

/// The image preparation of a timm model directory; `None` where `config.json` is missing or is not
/// timm's.
pub fn timm_preprocess(dir: &Path) -> Result<Option<TimmPreprocess>> {
    match config_json(dir, None)? {
        Some((path, json)) if is_timm(&json) => TimmPreprocess::read(&path, &json).map(Some),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::super::Want;
    use super::*;
    use serde_json::json;

    #[test]
    fn heads_follow_the_architecture() {
        for (name, hidden, heads) in [
            ("vit_tiny_patch16_224", 192, 3),
            ("deit_small_distilled_patch16_224", 384, 6),
            ("vit_base_patch16_224.augreg_in21k", 768, 12),
            ("vit_large_patch14", 1024, 16),
            ("vit_huge_patch14_224", 1280, 16),
            ("vit_medium_patch16", 512, 8),
            ("vit_other", 8, 1),
        ] {
            let model = TimmModel { architecture: Some(name.into()), ..TimmModel::default() };
            let mut notes = Vec::new();
            assert_eq!(model.heads(hidden, &mut notes), heads, "{name}");
            assert_eq!(notes.len(), 1);
        }
    }

    #[test]
    fn timm_configurations_are_checked_and_read() {
        let tensors = timm(&weights(&config(false)));
        let refused = |json: Value, expected: &str| {
            let error = import(&folder(&tensors, Some(&json)), &Want::default()).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("config.json"), "{error}");
        };
        let size = json!({"input_size": [3, 8, 4]});
        let name = "vit_x";
        refused(json!({"architecture": "resnet50", "pretrained_cfg": size}), "found \"resnet50\"");
        refused(json!({"architecture": name, "global_pool": "avg", "pretrained_cfg": size}), "global_pool");
        refused(
            json!({"architecture": name, "num_classes": 4, "pretrained_cfg": size}),
            "found 4, expected 3",
        );
        refused(json!({"architecture": name, "pretrained_cfg": {"input_size": [3, -8, 4]}}), "input_size");
        refused(json!({"architecture": name, "pretrained_cfg": {"std": [0.5, 0.0, 0.5]}}), "std");

        let read = |json: Value| timm_preprocess(folder(&[], Some(&json)).path());
        let full = json!({"architecture": name, "pretrained_cfg": {
            "input_size": [3, 8, 4], "mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3],
            "crop_pct": 0.9, "interpolation": "bilinear"}});
        let expected = TimmPreprocess {
            mean: vec![0.5, 0.4, 0.3],
            std: vec![0.1, 0.2, 0.3],
            crop_pct: 0.9,
            interpolation: "bilinear".into(),
            input_size: (3, 8, 4),
        };
        assert_eq!(read(full).unwrap(), Some(expected));
        let defaults = read(json!({"architecture": name})).unwrap().unwrap();
        assert_eq!((defaults.crop_pct, defaults.mean[0]), (0.875, 0.485));
        assert_eq!(read(config(false).to_hf()).unwrap(), None);
        assert_eq!(timm_preprocess(folder(&[], None).path()).unwrap(), None);
        assert!(read(json!({"architecture": name, "crop_pct": 2})).is_err());
    }
}
