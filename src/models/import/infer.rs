//! Sizes read off the tensors, for models without a Hugging Face configuration.

use super::super::names::layer_of;
use super::super::vit_config::VitConfig;
use super::table::Table;
use super::timm::{TimmModel, TimmPreprocess, VIT};
use super::{is_head, Want, POSITIONS};
use crate::error::Result;
use serde_json::Value;
use std::path::{Path, PathBuf};

impl Table<'_> {
    /// Sizes read off the tensors, with what a timm configuration adds.
    pub(super) fn infer(
        &self,
        dir: &Path,
        timm: Option<&(PathBuf, Value)>,
        want: &Want,
        notes: &mut Vec<String>,
    ) -> Result<VitConfig> {
        let timm_names = self.pieces.values().any(|piece| piece.stored.starts_with("blocks."));
        let [_, _, hidden] = self.dims::<3>("embeddings.cls_token")?;
        let [_, channels, patch_size, _] = self.dims::<4>("embeddings.patch_embeddings.projection.weight")?;
        let [_, tokens, _] = self.dims::<3>(POSITIONS)?;
        let [mlp, _] = self.dims::<2>("encoder.layer.0.intermediate.dense.weight")?;
        let layers = 1 + self.pieces.keys().filter_map(|name| layer_of(name)).max().unwrap_or(0);
        let distilled = self.pieces.contains_key("embeddings.distillation_token");
        let head = self.pieces.keys().find(|name| is_head(name) && name.ends_with(".weight"));
        let classes = head.map(|head| self.dims::<2>(head)).transpose()?.map(|[classes, _]| classes);

        let extra = 1 + usize::from(distilled);
        let preprocess = timm.map(|(path, json)| TimmPreprocess::read(path, json)).transpose()?;
        let (rows, columns) = match (tokens.checked_sub(extra), preprocess.and_then(|p| p.grid(patch_size))) {
            (Some(n), Some((rows, columns))) if rows.checked_mul(columns) == Some(n) => (rows, columns),
            (Some(n), _) if n > 0 && n.isqrt().pow(2) == n => (n.isqrt(), n.isqrt()),
            _ => {
                let stored = &self.pieces[POSITIONS].stored;
                let message =
                    format!("found {tokens} positions, expected {extra} and those of a rectangle of patches");
                return Err(self.error(stored, &message));
            }
        };
        let model =
            timm.map(|(path, json)| TimmModel::read(path, json, &VIT)).transpose()?.unwrap_or_default();
        let heads = match self.trained_heads(tokens) {
            Some(heads) => heads,
            None => model.heads(hidden, notes),
        };
        let labels = model.labels_of(classes, timm.map_or(dir, |(path, _)| path), want)?;
        if timm.is_none() {
            notes.push("no config.json: sizes read off the tensors".to_string());
        }
        let side = |n: usize| n.saturating_mul(patch_size);
        Ok(VitConfig {
            image_size: (side(rows), side(columns)),
            patch_size,
            channels,
            hidden,
            layers,
            heads,
            mlp,
            // timm's ViTs and transformers' differ in their default.
            eps: if timm.is_some() || timm_names { 1e-6 } else { 1e-12 },
            qkv_bias: self.pieces.contains_key("encoder.layer.0.attention.attention.value.bias"),
            distilled,
            two_heads: false,
            classes: labels,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::keys::numbered_labels;
    use super::super::testing::*;
    use super::*;
    use crate::weights::checkpoint::save;
    use candle_core::Device;
    use std::collections::BTreeMap;

    #[test]
    fn sizes_are_read_off_the_tensors_without_a_configuration() {
        let square = VitConfig { image_size: (6, 6), heads: 1, ..config(true) };
        let tensors = timm(&weights(&square));
        let dir = folder(&tensors, None);
        let imported = import(&dir, &Want::default()).unwrap();
        let labels = numbered_labels(3);
        assert_eq!(imported.config, VitConfig { classes: labels, ..square });
        assert_eq!(imported.notes.len(), 2, "{:?}", imported.notes);
        assert!(imported.notes.iter().any(|n| n.contains("guessed")), "{:?}", imported.notes);
        // The file alone, and its configuration in its own metadata.
        let file = dir.path().join("model.safetensors");
        same(&import_from(&file, &Want::default(), &Device::Cpu).unwrap(), &weights(&imported.config));
        let metadata = BTreeMap::from([("config".to_string(), config(true).to_hf().to_string())]);
        save(&file, &weights(&config(true)), &metadata).unwrap();
        assert_eq!(import_from(&file, &Want::default(), &Device::Cpu).unwrap().config, config(true));
        // 8x4 pixels are not a square of patches: nothing to go by.
        let error = import(&folder(&timm(&weights(&config(false))), None), &Want::default()).unwrap_err();
        assert!(error.to_string().contains("pos_embed: found 9 positions"), "{error}");
    }
}
