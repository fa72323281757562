//! Reads a published Swin: sizes from its configuration or off the tensors, relative position tables
//! fitted to the windows of the image size that is wanted.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use indexmap::IndexMap;
use serde_json::Value;

use super::super::swin_config::SwinConfig;
use super::super::swin_names::{meaning, place_of, TABLE};
use super::positions::resize_positions;
use super::table::Table;
use super::timm::{is_timm, TimmModel, TimmPreprocess, SWIN};
use super::{fresh, has_no_labels, is_head, Imported, Want};
use crate::error::{Error, On, Result};
use crate::weights::checkpoint::Checkpoint;

/// Pixels on a side of the images of published Swins, for checkpoints that do not say.
const USUAL_SIZE: usize = 224;

/// Whether a checkpoint without a configuration is a Swin's.
pub(super) fn looks_like_swin(checkpoint: &Checkpoint) -> bool {
    checkpoint.names().any(|name| name.ends_with(TABLE))
}

/// Reads the Swin in `dir`, whose configuration is `json`. See [`super::import_model`].
pub(super) fn import_swin(
    dir: &Path,
    checkpoint: &Checkpoint,
    json: Option<&(PathBuf, Value)>,
    want: &Want,
    device: &Device,
) -> Result<Imported<SwinConfig>> {
    let mut notes = checkpoint.notes().to_vec();
    if checkpoint.names().any(|name| name.ends_with("quan_a_softmax_fn.s")) {
        let message = "found a Swin trained with quantizers, such checkpoints are read of DeiT alone";
        return Err(Error::input(dir, message));
    }
    let mut table = Table::of(checkpoint, &meaning)?;
    earlier_merging(&mut table);
    let has_head = table.pieces.keys().any(|name| is_head(name));
    let mut stored = match json {
        Some((path, json)) if !is_timm(json) => {
            if has_no_labels(json) && !has_head && want.classes.is_none() {
                let message =
                    "found neither a classifier nor labels (id2label), expected one or wanted classes";
                return Err(Error::input(path, message));
            }
            SwinConfig::from_hf(path, json)?
        }
        other => infer(&table, dir, other, want, &mut notes)?,
    };
    let mut config = stored.clone();
    if let Some(size) = want.image_size {
        config.image_size = size;
    }
    let new_head = match &want.classes {
        Some(classes) if !has_head || classes.len() != stored.classes.len() => {
            config.classes = classes.clone();
            true
        }
        _ => !has_head,
    };
    config.check()?;
    if new_head {
        let found = if has_head { stored.classes.len().to_string() } else { "no".to_string() };
        let wanted = config.classes.len();
        notes.push(format!("classifier: {found} classes in the checkpoint, {wanted} wanted: drawn anew"));
    }
    check_places(&table, &config)?;
    check_tables(&table, &stored)?;
    notes.extend(table.unused_note());
    notes.extend(padding_note(&table, &config));
    // Of another image size, only the tables of relative positions have other shapes.
    stored.image_size = config.image_size;
    let mut tensors = IndexMap::new();
    let mut fitted = None;
    for ((name, shape), (_, stored_shape)) in config.shapes().into_iter().zip(stored.shapes()) {
        let bare = name.strip_prefix("swin.").unwrap_or(&name);
        let tensor = if new_head && is_head(bare) {
            fresh(&name, &shape, want.seed).on(&name)?
        } else if bare.ends_with(TABLE) {
            let (tensor, from) = positions(&table, bare, &name, &shape)?;
            fitted = fitted.or(from.map(|from| (from, side(shape[0]).unwrap_or_default())));
            tensor
        } else {
            table.read(bare, &name, &stored_shape)?
        };
        tensors.insert(name.clone(), tensor.to_device(device).on(&name)?);
    }
    if let Some((from, to)) = fitted {
        let how = if to < from { "those beyond left out" } else { "interpolated (bicubic)" };
        notes.push(format!("relative positions: {from}x{from} offsets in a table, {to}x{to} wanted: {how}"));
    }
    Ok(Imported { config, tensors, quantizers: None, notes, new_head })
}

/// timm's newer names put the merging between two stages into the later one.
fn earlier_merging(table: &mut Table<'_>) {
    let at = |name: &str, stage: usize| name.starts_with(&format!("encoder.layers.{stage}.downsample."));
    if table.pieces.keys().any(|name| at(name, 0)) {
        return;
    }
    let moved = |name: String| match place_of(&name) {
        Some((stage, None)) if stage > 0 => {
            name.replace(&format!("encoder.layers.{stage}."), &format!("encoder.layers.{}.", stage - 1))
        }
        _ => name,
    };
    let pieces = std::mem::take(&mut table.pieces);
    table.pieces = pieces.into_iter().map(|(name, piece)| (moved(name), piece)).collect();
}

/// timm shifts a map before it pads it to whole windows, everybody else after: where there is something to
/// pad, its answers are not quite these.
fn padding_note(table: &Table<'_>, config: &SwinConfig) -> Option<String> {
    let timm = table.pieces.values().any(|piece| piece.stored.starts_with("layers."));
    let ragged = |side: usize, window: usize| !side.is_multiple_of(window);
    let stages = config.stages();
    let padded = stages
        .iter()
        .find(|s| s.shift > 0 && (ragged(s.grid.0, s.window) || ragged(s.grid.1, s.window)))
        .filter(|_| timm)?;
    let ((rows, columns), window) = (padded.grid, padded.window);
    Some(format!(
        "{rows}x{columns} patches in windows of {window}: padded, then shifted, which timm does the other way round"
    ))
}

/// A block or merging beyond the configuration's is part of the trained model: not to be dropped.
fn check_places(table: &Table<'_>, config: &SwinConfig) -> Result<()> {
    for (name, piece) in &table.pieces {
        let beyond = match place_of(name) {
            Some((stage, Some(block))) => config.depths.get(stage).is_none_or(|depth| block >= *depth),
            Some((stage, None)) => stage + 1 >= config.depths.len(),
            None => false,
        };
        if beyond {
            let message = format!("found a part beyond the stages of {:?} blocks", config.depths);
            return Err(table.error(&piece.stored, &message));
        }
    }
    Ok(())
}

/// A table of relative positions is made for one window: that of its stage, or the whole window where the
/// map of the stage is smaller. Another one would be fitted to a window that the model was not trained with.
fn check_tables(table: &Table<'_>, stored: &SwinConfig) -> Result<()> {
    for (stage, sizes) in stored.stages().into_iter().enumerate() {
        for block in 0..sizes.blocks {
            let bare = format!("encoder.layers.{stage}.blocks.{block}.attention.self.{TABLE}");
            let Some(piece) = table.pieces.get(&bare) else { continue };
            let [rows, _] = table.dims::<2>(&bare)?;
            let expected = [sizes.window, stored.window].map(|window| (2 * window - 1).pow(2));
            // What is no square of offsets at all is a wrong shape, which reading it says.
            if side(rows).is_some() && !expected.contains(&rows) {
                let message = format!(
                    "found {rows} offsets, expected {} of windows of {} (windows that differ by stage are not read)",
                    expected[1], stored.window
                );
                return Err(table.error(&piece.stored, &message));
            }
        }
    }
    Ok(())
}

/// The odd side of a square table of offsets.
fn side(rows: usize) -> Option<usize> {
    let side = rows.isqrt();
    (side * side == rows && side % 2 == 1).then_some(side)
}

/// The relative position table `bare` with rows for the offsets of the window that is wanted: of a larger
/// one those near the middle, which mean the same offsets, of a smaller one interpolated. Gives the side
/// of the stored table where it is another.
fn positions(table: &Table<'_>, bare: &str, name: &str, shape: &[usize]) -> Result<(Tensor, Option<usize>)> {
    let [rows, heads] = match table.pieces.contains_key(bare) {
        true => table.dims::<2>(bare)?,
        false => [shape[0], shape[1]],
    };
    let (from, to) = match (side(rows), side(shape[0])) {
        (Some(from), Some(to)) if from != to && heads == shape[1] => (from, to),
        _ => return Ok((table.read(bare, name, shape)?, None)),
    };
    let stored = table.read(bare, name, &[rows, heads])?;
    let fitted = if from > to {
        let (edge, grid) = ((from - to) / 2, stored.reshape((from, from, heads)).on(name)?);
        let middle = grid.narrow(0, edge, to).and_then(|t| t.narrow(1, edge, to)).on(name)?;
        middle.contiguous().and_then(|t| t.reshape(shape)).on(name)?
    } else {
        let values = stored.flatten_all().and_then(|t| t.to_vec1::<f32>()).on(name)?;
        let resized = resize_positions(&values, 0, (from, from), (to, to), heads);
        Tensor::from_vec(resized, shape, &Device::Cpu).on(name)?
    };
    Ok((fitted, Some(from)))
}

/// Sizes read off the tensors, with what a timm configuration adds.
fn infer(
    table: &Table<'_>,
    dir: &Path,
    timm: Option<&(PathBuf, Value)>,
    want: &Want,
    notes: &mut Vec<String>,
) -> Result<SwinConfig> {
    let [embed, channels, patch_size, _] =
        table.dims::<4>("embeddings.patch_embeddings.projection.weight")?;
    let places = || table.pieces.keys().filter_map(|name| place_of(name));
    let stages = 1 + places().map(|(stage, _)| stage).max().unwrap_or(0);
    let (mut depths, mut heads, mut window) = (Vec::new(), Vec::new(), 0);
    for stage in 0..stages.min(64) {
        let blocks = places().filter(|place| place.0 == stage).filter_map(|place| place.1).max();
        depths.push(1 + blocks.unwrap_or(0));
        let bare = format!("encoder.layers.{stage}.blocks.0.attention.self.{TABLE}");
        let [rows, of_stage] = table.dims::<2>(&bare)?;
        heads.push(of_stage);
        let Some(side) = side(rows) else {
            let message = format!("found {rows} offsets, expected an odd number squared");
            return Err(table.error(&table.pieces[&bare].stored, &message));
        };
        window = window.max(side.div_ceil(2));
    }
    let [mlp, _] = table.dims::<2>("encoder.layers.0.blocks.0.intermediate.dense.weight")?;
    let classes = match table.pieces.contains_key("classifier.weight") {
        true => Some(table.dims::<2>("classifier.weight")?[0]),
        false => None,
    };
    let model = timm.map(|(path, json)| TimmModel::read(path, json, &SWIN)).transpose()?.unwrap_or_default();
    let preprocess = timm.map(|(path, json)| TimmPreprocess::read(path, json)).transpose()?;
    let image_size = match (want.image_size, preprocess) {
        (_, Some(timm)) => (timm.input_size.1, timm.input_size.2),
        (Some(size), None) => size,
        (None, None) => {
            notes.push(format!("no config.json: images taken to be {USUAL_SIZE} pixels on a side"));
            (USUAL_SIZE, USUAL_SIZE)
        }
    };
    let classes = model.labels_of(classes, timm.map_or(dir, |(path, _)| path), want)?;
    if timm.is_none() {
        notes.push("no config.json: sizes read off the tensors".to_string());
    }
    // The ratio that gives the width back where the product is cut to a whole number.
    let ratio = mlp as f64 / embed.max(1) as f64;
    let ratio = if ((embed as f64 * ratio) as usize) < mlp { ratio.next_up() } else { ratio };
    let config = SwinConfig {
        image_size,
        patch_size,
        channels,
        embed,
        depths,
        heads,
        window,
        mlp_ratio: ratio,
        eps: 1e-5,
        qkv_bias: table.pieces.contains_key("encoder.layers.0.blocks.0.attention.self.query.bias"),
        classes,
    };
    config.check().map_err(|e| Error::input(dir, e.to_string()))?;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::super::keys::numbered_labels;
    use super::super::super::vision::VisionConfig;
    use super::super::import_model;
    use super::super::testing::{folder, fused, rename, values, Named};
    use super::*;

    fn config() -> SwinConfig {
        SwinConfig {
            image_size: (16, 16),
            patch_size: 2,
            channels: 3,
            embed: 4,
            depths: vec![2, 2],
            heads: vec![2, 4],
            window: 3,
            mlp_ratio: 1.5,
            eps: 1e-5,
            qkv_bias: true,
            classes: ["cat", "dog", "cow"].map(String::from).to_vec(),
        }
    }

    /// Every element of every tensor has a value of its own.
    fn weights(config: &SwinConfig) -> Named {
        let mut next = 0u32;
        let mut of = |shape: Vec<usize>| {
            let n = shape.iter().product::<usize>() as u32;
            let values: Vec<f32> = (next..next + n).map(|v| v as f32 / 1024.0).collect();
            next += n;
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        config.shapes().into_iter().map(|(name, shape)| (name, of(shape))).collect()
    }

    fn read(dir: &Path, want: &Want) -> Result<Imported<SwinConfig>> {
        Ok(import_model(dir, want, &Device::Cpu)?.map(|config| match config {
            VisionConfig::Swin(swin) => swin,
            other => panic!("found {other:?}, expected a Swin"),
        }))
    }

    #[track_caller]
    fn same(imported: &Imported<SwinConfig>, expected: &Named) {
        let names: Vec<&String> = imported.tensors.keys().collect();
        assert_eq!(names, expected.iter().map(|(n, _)| n).collect::<Vec<_>>());
        for (name, tensor) in expected {
            assert_eq!(imported.tensors[name].dims(), tensor.dims(), "{name}");
            assert_eq!(values(&imported.tensors[name]), values(tensor), "{name}");
        }
    }

    const BLOCK: [(&str, &str); 9] = [
        ("attention.self.query", "attn.qkv"),
        ("attention.self.relative", "attn.relative"),
        ("attention.output.dense", "attn.proj"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("swin.layernorm", "norm"),
        ("classifier", "head"),
        ("intermediate.dense", "mlp.0"),
        ("output.dense", "mlp.3"),
    ];

    /// torchvision's spelling, with the index that it stores.
    fn torchvision(tensors: &Named) -> Named {
        let mut out = rename(&fused(tensors), &BLOCK);
        for (name, _) in &mut out {
            *name = name
                .replace("swin.embeddings.patch_embeddings.projection", "features.0.0")
                .replace("swin.embeddings.norm", "features.0.2");
            for stage in 0..4 {
                let own = format!("swin.encoder.layers.{stage}");
                *name = name
                    .replace(&format!("{own}.blocks"), &format!("features.{}", 2 * stage + 1))
                    .replace(&format!("{own}.downsample"), &format!("features.{}", 2 * stage + 2));
            }
        }
        let index = Tensor::zeros(81, candle_core::DType::I64, &Device::Cpu).unwrap();
        out.push(("features.1.0.attn.relative_position_index".into(), index));
        out
    }

    /// timm's spelling, the merging of two stages in the later one, or in the earlier as in older files.
    fn timm(tensors: &Named, later: bool) -> Named {
        let mut out = rename(&fused(tensors), &BLOCK);
        for (name, _) in &mut out {
            *name = name
                .replace("swin.embeddings.patch_embeddings.projection", "patch_embed.proj")
                .replace("swin.embeddings", "patch_embed")
                .replace("mlp.0", "mlp.fc1")
                .replace("mlp.3", "mlp.fc2")
                .replace("swin.encoder.", "")
                .replace("head", "head.fc");
            if later {
                *name = name.replace("layers.0.downsample", "layers.1.downsample");
            }
        }
        out
    }

    #[test]
    fn every_spelling_gives_the_same_tensors() {
        let config = config();
        let classic = weights(&config);
        let newer = [
            ("attention.self.query", "attention.q_proj"),
            ("attention.self.key", "attention.k_proj"),
            ("attention.self.value", "attention.v_proj"),
            ("attention.self.relative", "attention.relative_position_bias.relative"),
            ("attention.output.dense", "attention.o_proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        ];
        for tensors in [classic.clone(), rename(&classic, &newer), rename(&classic, &[("swin.", "")])] {
            let imported = read(folder(&tensors, Some(&config.to_hf())).path(), &Want::default()).unwrap();
            same(&imported, &classic);
            assert_eq!((imported.config, imported.notes.len()), (config.clone(), 0));
        }
        let json = json!({
            "architecture": "swin_custom", "num_classes": 3, "global_pool": "avg",
            "label_names": ["cat", "dog", "cow"], "pretrained_cfg": {"input_size": [3, 16, 16]}
        });
        for later in [true, false] {
            let imported =
                read(folder(&timm(&classic, later), Some(&json)).path(), &Want::default()).unwrap();
            same(&imported, &classic);
            assert_eq!(imported.config, config);
            // 8 patches are padded to three windows of 3.
            assert!(imported.notes[0].contains("8x8 patches in windows of 3"), "{:?}", imported.notes);
        }
        let want =
            Want { image_size: Some((16, 16)), classes: Some(config.classes.clone()), ..Want::default() };
        let imported = read(folder(&torchvision(&classic), None).path(), &want).unwrap();
        same(&imported, &classic);
        assert_eq!(imported.config, SwinConfig { classes: numbered_labels(3), ..config });
        assert!(imported.notes[1].contains("left unread: features.1.0.attn.relative_position_index"));
    }

    #[test]
    fn tables_follow_the_windows_of_another_image_size() {
        let config = config();
        let classic = weights(&config);
        let dir = folder(&classic, Some(&config.to_hf()));
        let table = "swin.encoder.layers.1.blocks.0.attention.self.relative_position_bias_table";
        let stored = values(&classic.iter().find(|(name, _)| name == table).unwrap().1);
        // 8 pixels: maps of 4 and 2 patches, in the second a window of 2.
        let want = Want { image_size: Some((8, 8)), ..Want::default() };
        let imported = read(dir.path(), &want).unwrap();
        let found = &imported.tensors[table];
        assert_eq!(found.dims(), [9, 4]);
        // The rows of the offsets -1 to 1 out of -2 to 2.
        let rows = [6, 7, 8, 11, 12, 13, 16, 17, 18];
        let expected: Vec<f32> = rows.iter().flat_map(|r| stored[r * 4..r * 4 + 4].to_vec()).collect();
        assert_eq!(values(found), expected);
        assert!(imported.notes[0].contains("5x5 offsets in a table, 3x3 wanted"), "{:?}", imported.notes);
        // And back, interpolated.
        let small = SwinConfig { image_size: (8, 8), ..config.clone() };
        let dir = folder(&weights(&small), Some(&small.to_hf()));
        let imported = read(dir.path(), &Want { image_size: Some((16, 16)), ..Want::default() }).unwrap();
        assert_eq!(imported.tensors[table].dims(), [25, 4]);
        assert!(imported.notes[0].contains("3x3 offsets in a table, 5x5 wanted: interpolated"));
    }

    #[test]
    fn another_head_is_drawn_anew() {
        let config = config();
        let dir = folder(&weights(&config), Some(&config.to_hf()));
        let want = Want { classes: Some(numbered_labels(5)), ..Want::default() };
        let imported = read(dir.path(), &want).unwrap();
        assert!(imported.new_head && imported.tensors["classifier.weight"].dims() == [5, 8]);
        assert!(imported.notes[0].contains("3 classes in the checkpoint, 5 wanted"), "{:?}", imported.notes);
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let config = config();
        let refused = |change: &dyn Fn(&mut Named), json: Option<Value>, expected: &[&str]| {
            let mut tensors = weights(&config);
            change(&mut tensors);
            let json = json.unwrap_or_else(|| config.to_hf());
            let error = read(folder(&tensors, Some(&json)).path(), &Want::default()).unwrap_err();
            assert_eq!(error.exit_code(), 4, "{error}");
            let error = error.to_string();
            expected.iter().for_each(|part| assert!(error.contains(part), "{error:?} lacks {part:?}"));
        };
        let reduction = "swin.encoder.layers.0.downsample.reduction.weight";
        refused(&|t| t.retain(|(n, _)| n != reduction), None, &[reduction, "found none", "[8, 16]"]);
        let zeros = |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
        let add = |name: &'static str, shape: &'static [usize]| {
            move |t: &mut Named| t.push((name.to_string(), zeros(shape)))
        };
        let block = "swin.encoder.layers.1.blocks.2.layernorm_before.bias";
        refused(&add(block, &[8]), None, &[block, "beyond the stages of [2, 2] blocks"]);
        let merging = "swin.encoder.layers.1.downsample.norm.bias";
        refused(&add(merging, &[32]), None, &[merging, "beyond the stages"]);
        let scale = "swin.encoder.layers.0.blocks.0.attention.self.logit_scale";
        refused(&add(scale, &[1]), None, &[scale, "does not compute with"]);
        let table = "swin.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table";
        let bad =
            |t: &mut Named| t.iter_mut().filter(|(n, _)| n == table).for_each(|t| t.1 = zeros(&[24, 2]));
        refused(&bad, None, &[table, "found shape [24, 2], expected [25, 2]"]);
        let wider =
            |t: &mut Named| t.iter_mut().filter(|(n, _)| n == table).for_each(|t| t.1 = zeros(&[49, 2]));
        refused(&wider, None, &[table, "found 49 offsets, expected 25 of windows of 3"]);
        let json = json!({"model_type": "swinv2"});
        refused(&|_| (), Some(json), &["found \"swinv2\", expected swin"]);
        let json = json!({"architecture": "swinv2_tiny_window8_256", "pretrained_cfg": {}});
        refused(&|_| (), Some(json), &["architecture", "swinv2_tiny", "expected swin_*"]);
    }
}
