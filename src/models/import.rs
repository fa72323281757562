//! Reads a published ViT or DeiT (Hugging Face of either spelling, or timm) into canonical names,
//! fitted to the image size and classes that are wanted.

use super::names::{layer_of, meaning, Meaning};
use super::vit_config::{numbered_labels, VitConfig};
use crate::error::{Error, On, Result};
use crate::random::Random;
use crate::weights::checkpoint::{check_finite, Checkpoint, Dtype};
use candle_core::{DType, Device, Tensor};
use indexmap::IndexMap;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// What the model is to become; `None` keeps what the checkpoint says.
#[derive(Clone, Debug, Default)]
pub struct Want {
    /// Height and width of the input, in pixels.
    pub image_size: Option<(usize, usize)>,
    /// The label of each class id.
    pub classes: Option<Vec<String>>,
    /// Seeds the new classifier, where one is needed.
    pub seed: u64,
}

/// A model read from a checkpoint.
#[derive(Debug)]
pub struct Imported {
    /// Sizes and labels after fitting.
    pub config: VitConfig,
    /// f32 tensors by canonical name, in the order of [`VitConfig::shapes`].
    pub tensors: IndexMap<String, Tensor>,
    /// One line for each thing that was guessed, fitted or left out.
    pub notes: Vec<String>,
    /// Whether the classifier is new and must be trained before it is of use.
    pub new_head: bool,
}

/// Where a canonical tensor lies: a stored tensor, or the given third of a fused one.
struct Piece {
    stored: String,
    third: Option<usize>,
}

/// The checkpoint by canonical names (without prefix).
struct Table<'a> {
    checkpoint: &'a Checkpoint,
    pieces: IndexMap<String, Piece>,
    unused: Vec<String>,
}

/// Reads the ViT in `dir`, a folder or a single `.safetensors` file, onto `device`.
///
/// The sizes come from `config.json` (Hugging Face's or timm's) in the folder or beside the file,
/// or from the text of that form under `config` in the file's own metadata, which goes first; with
/// neither they are read off the tensors. A classifier that is missing or has another number of
/// classes than wanted is drawn anew (truncated normal of deviation 0.02, zero bias); position
/// embeddings are interpolated to another image size.
///
/// Errs, naming file and tensor, on missing, misshapen, unknown or not finite weights, on parts this
/// ViT does not compute with, and on a model that is packed already.
pub fn import_vit(dir: &Path, want: &Want, device: &Device) -> Result<Imported> {
    let checkpoint = Checkpoint::open(dir)?;
    let json = config_json(dir, Some(&checkpoint))?;
    if let Some((path, json)) = &json {
        if json.get("quantization_config").is_some_and(|q| !q.is_null()) {
            let message = "found a quantization_config: this model is packed already, expected a plain one";
            return Err(Error::input(path, message));
        }
    }
    let mut notes = Vec::new();
    let mut table = Table::of(&checkpoint)?;
    let two_heads = table.name_heads();
    let has_head = table.pieces.keys().any(|name| is_head(name));
    let mut stored = match &json {
        Some((path, json)) if !is_timm(json) => {
            if has_no_labels(json) && !has_head && want.classes.is_none() {
                let message =
                    "found neither a classifier nor labels (id2label), expected one or wanted classes";
                return Err(Error::input(path, message));
            }
            VitConfig::from_hf(path, json)?
        }
        other => table.infer(dir, other.as_ref(), want, &mut notes)?,
    };
    if has_head {
        if two_heads && !stored.distilled {
            let message = "found a head of two, expected one: there is no distillation token";
            return Err(table.error("cls_classifier", message));
        }
        stored.two_heads = two_heads;
    }
    stored.check().map_err(|e| Error::input(dir, e.to_string()))?;
    table.check_layers(&stored)?;

    let mut config = stored.clone();
    if let Some(size) = want.image_size {
        config.image_size = size;
    }
    let mut new_head = !has_head;
    match &want.classes {
        Some(classes) if !has_head || classes.len() != stored.classes.len() => {
            config.classes = classes.clone();
            new_head = true;
        }
        _ => {}
    }
    config.check()?;
    if new_head {
        let found = if has_head { stored.classes.len().to_string() } else { "no".to_string() };
        let wanted = config.classes.len();
        notes.push(format!("classifier: {found} classes in the checkpoint, {wanted} wanted: drawn anew"));
    }
    if config.grid() != stored.grid() {
        let ((h, w), (rows, columns)) = (stored.grid(), config.grid());
        notes
            .push(format!("position embeddings: {h}x{w} patches interpolated to {rows}x{columns} (bicubic)"));
    }
    notes.extend(table.unused_note());

    let expected = stored.shapes();
    let mut tensors = IndexMap::with_capacity(expected.len());
    for ((name, shape), (_, stored_shape)) in config.shapes().into_iter().zip(expected) {
        let bare = name.strip_prefix(config.prefix()).and_then(|n| n.strip_prefix('.')).unwrap_or(&name);
        let tensor = if new_head && is_head(bare) {
            fresh(&name, &shape, want.seed).on(&name)?
        } else {
            let read = table.read(bare, &name, &stored_shape)?;
            if bare == POSITIONS && config.grid() != stored.grid() {
                let values = read.flatten_all().and_then(|t| t.to_vec1::<f32>()).on(&name)?;
                let resized = resize_positions(
                    &values,
                    config.extra_tokens(),
                    stored.grid(),
                    config.grid(),
                    config.hidden,
                );
                Tensor::from_vec(resized, shape, &Device::Cpu).on(&name)?
            } else {
                read
            }
        };
        let tensor = tensor.to_device(device).on(&name)?;
        tensors.insert(name, tensor);
    }
    Ok(Imported { config, tensors, notes, new_head })
}

const POSITIONS: &str = "embeddings.position_embeddings";

fn is_head(bare: &str) -> bool {
    ["classifier.", "cls_classifier.", "distillation_classifier."].iter().any(|h| bare.starts_with(h))
}

fn has_no_labels(json: &Value) -> bool {
    ["id2label", "num_labels"].iter().all(|key| json.get(key).is_none_or(Value::is_null))
}

/// A new classifier's tensor. Each has a random stream of its own, so that a second head does not
/// change the first.
fn fresh(name: &str, shape: &[usize], seed: u64) -> candle_core::Result<Tensor> {
    if shape.len() < 2 {
        return Tensor::zeros(shape, DType::F32, &Device::Cpu);
    }
    let mut random = Random::new(seed, &format!("init:{name}"), &[]);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.truncated_normal(0.02)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// The configuration and the file it came from.
fn config_json(dir: &Path, checkpoint: Option<&Checkpoint>) -> Result<Option<(PathBuf, Value)>> {
    let parse = |path: &Path, text: &[u8]| {
        serde_json::from_slice::<Value>(text)
            .map_err(|e| Error::input(path, format!("the configuration is not JSON: {e}")))
    };
    let path = if dir.is_dir() {
        dir.join("config.json")
    } else {
        if let Some(text) = checkpoint.and_then(|c| c.metadata().get("config")) {
            return Ok(Some((dir.to_path_buf(), parse(dir, text.as_bytes())?)));
        }
        dir.with_file_name("config.json")
    };
    match std::fs::read(&path) {
        Ok(text) => {
            let json = parse(&path, &text)?;
            Ok(Some((path, json)))
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path, e)),
    }
}

fn is_timm(json: &Value) -> bool {
    json.get("model_type").is_none()
        && (json.get("architecture").is_some_and(Value::is_string) || json.get("pretrained_cfg").is_some())
}

impl<'a> Table<'a> {
    fn of(checkpoint: &'a Checkpoint) -> Result<Self> {
        let mut table = Table { checkpoint, pieces: IndexMap::new(), unused: Vec::new() };
        for stored in checkpoint.names() {
            match meaning(stored) {
                Meaning::Whole(name) => table.add(name, stored, None)?,
                Meaning::Fused(names) => {
                    for (third, name) in names.into_iter().enumerate() {
                        table.add(name, stored, Some(third))?;
                    }
                }
                Meaning::Foreign => {
                    let message =
                        "found a part that this ViT does not compute with, expected query, key, value, \
                                   output, two-layer MLP and two norms a block";
                    return Err(table.error(stored, message));
                }
                Meaning::Unused => table.unused.push(stored.to_string()),
            }
        }
        Ok(table)
    }

    fn add(&mut self, name: String, stored: &str, third: Option<usize>) -> Result<()> {
        if let Some(first) = self.pieces.get(&name) {
            let message = format!("found the same weight as {}, expected one of them", first.stored);
            return Err(self.error(stored, &message));
        }
        self.pieces.insert(name, Piece { stored: stored.to_string(), third });
        Ok(())
    }

    /// An error on the tensor `name`, with the file that holds it or should.
    fn error(&self, name: &str, message: &str) -> Error {
        let files = self.checkpoint.files();
        let file = self.checkpoint.file_of(name).or(files.first().map(PathBuf::as_path));
        let shown: String = name.chars().flat_map(char::escape_debug).collect();
        Error::input(file.unwrap_or(Path::new("")), format!("tensor {shown}: {message}"))
    }

    /// timm calls the class token's head `head` with and without a second one; two heads have names
    /// of their own here. Returns whether there are two.
    fn name_heads(&mut self) -> bool {
        let has = |table: &Self, head: &str| table.pieces.keys().any(|name| name.starts_with(head));
        if has(self, "distillation_classifier.") && !has(self, "cls_classifier.") {
            for leaf in ["weight", "bias"] {
                if let Some(piece) = self.pieces.shift_remove(&format!("classifier.{leaf}")) {
                    self.pieces.insert(format!("cls_classifier.{leaf}"), piece);
                }
            }
        }
        has(self, "distillation_classifier.") || has(self, "cls_classifier.")
    }

    /// A block beyond the configuration's last is part of the trained model: not to be dropped.
    fn check_layers(&self, config: &VitConfig) -> Result<()> {
        for (name, piece) in &self.pieces {
            if layer_of(name).is_some_and(|layer| layer >= config.layers) {
                let message = format!("found a block beyond the {} that are expected", config.layers);
                return Err(self.error(&piece.stored, &message));
            }
        }
        Ok(())
    }

    fn unused_note(&self) -> Option<String> {
        const SHOWN: usize = 4;
        let names: Vec<String> = self
            .unused
            .iter()
            .take(SHOWN)
            .map(|n| n.chars().flat_map(char::escape_debug).collect())
            .collect();
        let more = self.unused.len().saturating_sub(SHOWN);
        let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
        (!names.is_empty()).then(|| format!("left unread: {}{rest}", names.join(", ")))
    }

    /// The canonical tensor `bare` (called `name` with its prefix) in f32, of this shape.
    fn read(&self, bare: &str, name: &str, shape: &[usize]) -> Result<Tensor> {
        let Some(Piece { stored, third }) = self.pieces.get(bare) else {
            return Err(self.error(name, &format!("found none, expected shape {shape:?}")));
        };
        let mut whole = shape.to_vec();
        if third.is_some() {
            whole[0] *= 3;
        }
        let found = self.checkpoint.shape(stored).unwrap_or_default();
        if found != whole {
            return Err(self.error(stored, &format!("found shape {found:?}, expected {whole:?}")));
        }
        let dtype = self.checkpoint.dtype(stored);
        if !matches!(dtype, Some(Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)) {
            let found = dtype.map(|d| d.to_string()).unwrap_or_default();
            return Err(self.error(stored, &format!("found dtype {found}, expected F64, F32, F16 or BF16")));
        }
        let tensor = self.checkpoint.tensor(stored, &Device::Cpu)?.to_dtype(DType::F32).on(stored)?;
        check_finite(stored, &tensor)?;
        match third {
            // Copied, so that a third does not keep the whole alive.
            Some(third) => tensor.narrow(0, third * shape[0], shape[0]).and_then(|t| t.force_contiguous()),
            None => Ok(tensor),
        }
        .on(stored)
    }

    /// The shape of a canonical tensor that must have `N` dimensions.
    fn dims<const N: usize>(&self, bare: &str) -> Result<[usize; N]> {
        let Some(piece) = self.pieces.get(bare) else {
            let first =
                self.checkpoint.names().next().map_or("no tensor at all".into(), |n| format!("{n:?} first"));
            return Err(self.error(bare, &format!("found none of this meaning ({first}), expected a ViT's")));
        };
        let found = self.checkpoint.shape(&piece.stored).unwrap_or_default();
        found.try_into().map_err(|_| {
            self.error(&piece.stored, &format!("found shape {found:?}, expected {N} dimensions"))
        })
    }

    /// Sizes read off the tensors, with what a timm configuration adds.
    fn infer(
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
        let model = timm.map(|(path, json)| TimmModel::read(path, json)).transpose()?.unwrap_or_default();
        let heads = model.heads(hidden, notes);
        let labels = match (classes, model.labels, &want.classes) {
            (Some(n), _, _) if model.classes.is_some_and(|c| c != n) => {
                let found = model.classes.unwrap_or_default();
                let message = format!("num_classes: found {found}, expected {n} as the classifier has");
                return Err(Error::input(timm.map_or(dir, |(path, _)| path), message));
            }
            (Some(n), Some(labels), _) if labels.len() == n => labels,
            // Bounded by a real tensor only where the width is not 0; `check` refuses the rest.
            (Some(n), _, _) => numbered_labels(n.min(1 << 23)),
            (None, _, Some(wanted)) => wanted.clone(),
            (None, _, None) => {
                return Err(Error::input(dir, "found no classifier, expected one or wanted classes"))
            }
        };
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
            qkv_bias: self.pieces.contains_key("encoder.layer.0.attention.attention.query.bias"),
            distilled,
            two_heads: false,
            classes: labels,
        })
    }
}

/// What a timm `config.json` says of the model itself.
#[derive(Default)]
struct TimmModel {
    architecture: Option<String>,
    classes: Option<usize>,
    labels: Option<Vec<String>>,
    heads: Option<usize>,
}

impl TimmModel {
    fn read(path: &Path, json: &Value) -> Result<Self> {
        let bad = |key: &str, found: &Value, expected: &str| {
            Err(Error::input(path, format!("{key}: found {found}, expected {expected}")))
        };
        let either = |key: &str| json.get(key).or_else(|| json.get("pretrained_cfg")?.get(key));
        if let Some(found) = either("architecture") {
            if !found.as_str().is_some_and(|a| a.starts_with("vit_") || a.starts_with("deit_")) {
                return bad("architecture", found, "vit_* or deit_*");
            }
        }
        if let Some(found) = json.get("global_pool") {
            if !matches!(found.as_str(), None | Some("token" | "")) {
                return bad("global_pool", found, "\"token\"");
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

    /// The number of attention heads, which no tensor's shape tells.
    fn heads(&self, hidden: usize, notes: &mut Vec<String>) -> usize {
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
    fn read(path: &Path, json: &Value) -> Result<Self> {
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

    fn grid(&self, patch: usize) -> Option<(usize, usize)> {
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

/// Position embeddings `[extra + from.0 * from.1, width]` for another grid: the extra tokens are
/// kept, the rest is interpolated as PyTorch's `interpolate(mode="bicubic", align_corners=False)`
/// does: Keys' cubic convolution (1981) with a = -0.75, pixel centres at halves, edges repeated.
fn resize_positions(
    values: &[f32],
    extra: usize,
    from: (usize, usize),
    to: (usize, usize),
    width: usize,
) -> Vec<f32> {
    let (kept, grid) = values.split_at(extra * width);
    let mut out = kept.to_vec();
    out.reserve(to.0 * to.1 * width);
    let (rows, columns) = (taps(from.0, to.0), taps(from.1, to.1));
    let mut sum = vec![0f64; width];
    for row in &rows {
        for column in &columns {
            sum.fill(0.0);
            for (y, wy) in row {
                for (x, wx) in column {
                    let at = (y * from.1 + x) * width;
                    sum.iter_mut()
                        .zip(&grid[at..at + width])
                        .for_each(|(s, &v)| *s += wy * wx * f64::from(v));
                }
            }
            out.extend(sum.iter().map(|&s| s as f32));
        }
    }
    out
}

/// For each of `to` positions the four of `from` it is made of, with their weights.
fn taps(from: usize, to: usize) -> Vec<[(usize, f64); 4]> {
    const A: f64 = -0.75;
    let near = |x: f64| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0; // |x| <= 1
    let far = |x: f64| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A; // 1 < |x| < 2
    (0..to)
        .map(|i| {
            let centre = (i as f64 + 0.5) * from as f64 / to as f64 - 0.5;
            let (left, t) = (centre.floor(), centre - centre.floor());
            let at = |offset: f64| (left + offset).clamp(0.0, from as f64 - 1.0) as usize;
            [(at(-1.0), far(t + 1.0)), (at(0.0), near(t)), (at(1.0), near(1.0 - t)), (at(2.0), far(2.0 - t))]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::checkpoint::save;
    use serde_json::json;
    use std::collections::{BTreeMap, HashMap};

    type Named = Vec<(String, Tensor)>;

    fn config(distilled: bool) -> VitConfig {
        VitConfig {
            image_size: (8, 4),
            patch_size: 2,
            channels: 3,
            hidden: 6,
            layers: 2,
            heads: 3,
            mlp: 5,
            eps: 1e-6,
            qkv_bias: true,
            distilled,
            two_heads: distilled,
            classes: ["cat", "dog", "cow"].map(String::from).to_vec(),
        }
    }

    /// Every element of every tensor has a value of its own.
    fn weights(config: &VitConfig) -> Vec<(String, Tensor)> {
        let mut next = 0u32;
        let mut of = |shape: Vec<usize>| {
            let n = shape.iter().product::<usize>() as u32;
            let values: Vec<f32> = (next..next + n).map(|v| v as f32 / 1024.0).collect();
            next += n;
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        config.shapes().into_iter().map(|(name, shape)| (name, of(shape))).collect()
    }

    /// A folder with these tensors and this configuration.
    fn folder(tensors: &[(String, Tensor)], config: Option<&Value>) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        save(&dir.path().join("model.safetensors"), tensors, &BTreeMap::new()).unwrap();
        if let Some(config) = config {
            std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        }
        dir
    }

    fn import(dir: &tempfile::TempDir, want: &Want) -> Result<Imported> {
        import_vit(dir.path(), want, &Device::Cpu)
    }

    fn rename(tensors: &[(String, Tensor)], rules: &[(&str, &str)]) -> Vec<(String, Tensor)> {
        let new = |name: &str| rules.iter().fold(name.to_string(), |n, (from, to)| n.replace(from, to));
        tensors.iter().map(|(name, tensor)| (new(name), tensor.clone())).collect()
    }

    const NEWER: [(&str, &str); 8] = [
        (".encoder.layer.", ".layers."),
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
        ("", ""),
    ];

    /// timm's spelling, with query, key and value stacked by hand.
    fn timm(tensors: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
        let by_name: HashMap<&str, &Tensor> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
        let mut out = Vec::new();
        for (name, tensor) in tensors {
            if name.contains("attention.query.") {
                let part = |p: &str| by_name[name.replace("query", p).as_str()].clone();
                let fused = Tensor::cat(&[part("query"), part("key"), part("value")], 0).unwrap();
                out.push((name.replace("attention.attention.query", "attn.qkv"), fused));
            } else if !name.contains("attention.key.") && !name.contains("attention.value.") {
                out.push((name.clone(), tensor.clone()));
            }
        }
        let rules = [
            ("deit.embeddings.distillation_token", "dist_token"),
            ("deit.", "vit."),
            ("vit.embeddings.cls_token", "cls_token"),
            ("vit.embeddings.position_embeddings", "pos_embed"),
            ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("vit.encoder.layer.", "blocks."),
            ("attention.output.dense", "attn.proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("vit.layernorm", "norm"),
            ("distillation_classifier", "head_dist"),
            ("cls_classifier", "head"),
            ("classifier", "head"),
        ];
        rename(&out, &rules)
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[track_caller]
    fn same(imported: &Imported, expected: &[(String, Tensor)]) {
        let names: Vec<&String> = imported.tensors.keys().collect();
        assert_eq!(names, expected.iter().map(|(n, _)| n).collect::<Vec<_>>());
        for (name, tensor) in expected {
            let found = &imported.tensors[name];
            assert_eq!((found.dims(), found.dtype()), (tensor.dims(), DType::F32), "{name}");
            assert_eq!(values(found), values(tensor), "{name}");
        }
    }

    #[test]
    fn every_spelling_gives_the_same_tensors() {
        for distilled in [false, true] {
            let config = config(distilled);
            let classic = weights(&config);
            let prefix = format!("{}.", config.prefix());
            let newer = rename(&classic, &NEWER);
            let bare = rename(&newer, &[(&prefix, "")]);
            assert!(newer.iter().any(|(n, _)| n.ends_with("layers.1.attention.q_proj.bias")));
            for tensors in [&classic, &newer, &bare] {
                let imported = import(&folder(tensors, Some(&config.to_hf())), &Want::default()).unwrap();
                same(&imported, &classic);
                assert_eq!(imported.config, config);
                assert_eq!((imported.notes.len(), imported.new_head), (0, false));
            }
            let json = json!({
                "architecture": "vit_custom_patch2", "num_classes": 3, "model_args": {"num_heads": 3},
                "label_names": ["cat", "dog", "cow"], "pretrained_cfg": {"input_size": [3, 8, 4]}
            });
            let imported = import(&folder(&timm(&classic), Some(&json)), &Want::default()).unwrap();
            same(&imported, &classic);
            assert_eq!(imported.config, config);
            assert!(imported.notes.is_empty(), "{:?}", imported.notes);
        }
    }

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
        same(&import_vit(&file, &Want::default(), &Device::Cpu).unwrap(), &weights(&imported.config));
        let metadata = BTreeMap::from([("config".to_string(), config(true).to_hf().to_string())]);
        save(&file, &weights(&config(true)), &metadata).unwrap();
        assert_eq!(import_vit(&file, &Want::default(), &Device::Cpu).unwrap().config, config(true));
        // 8x4 pixels are not a square of patches: nothing to go by.
        let error = import(&folder(&timm(&weights(&config(false))), None), &Want::default()).unwrap_err();
        assert!(error.to_string().contains("pos_embed: found 9 positions"), "{error}");
    }

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
    fn a_head_is_drawn_anew_where_it_does_not_fit() {
        let config = config(true);
        let classic = weights(&config);
        let dir = folder(&classic, Some(&config.to_hf()));
        let want = |n: usize, seed| Want { classes: Some(numbered_labels(n)), seed, ..Want::default() };
        // As many classes: the head and the model's own names stay.
        let kept = import(&dir, &want(3, 0)).unwrap();
        assert!(!kept.new_head && kept.config.classes == config.classes);
        same(&kept, &classic);

        let fresh = import(&dir, &want(50, 7)).unwrap();
        assert!(fresh.new_head && fresh.config.classes == numbered_labels(50));
        assert!(fresh.notes[0].contains("3 classes in the checkpoint, 50 wanted"), "{:?}", fresh.notes);
        let heads: Vec<Vec<f32>> = ["cls", "distillation"]
            .map(|h| values(&fresh.tensors[&format!("{h}_classifier.weight")]))
            .to_vec();
        for head in &heads {
            let n = head.len() as f32;
            assert_eq!(head.len(), 50 * 6);
            assert!(head.iter().all(|v| v.abs() <= 0.04));
            let deviation = (head.iter().map(|v| v * v).sum::<f32>() / n).sqrt();
            // A normal cut at two deviations has 0.88 of its deviation.
            assert!((deviation - 0.0176).abs() < 0.002, "{deviation}");
        }
        assert_ne!(heads[0], heads[1]);
        assert!(values(&fresh.tensors["cls_classifier.bias"]).iter().all(|&v| v == 0.0));
        let bits = |seed| values(&import(&dir, &want(50, seed)).unwrap().tensors["cls_classifier.weight"]);
        assert_eq!(bits(7), heads[0]);
        assert_ne!(bits(8), heads[0]);
        // The rest is untouched.
        assert_eq!(
            values(&fresh.tensors["deit.layernorm.weight"]),
            values(&kept.tensors["deit.layernorm.weight"])
        );
    }

    #[test]
    fn a_bare_model_gets_a_head_and_its_pooler_is_named() {
        let config = config(false);
        let mut body: Vec<_> =
            weights(&config).into_iter().filter(|(n, _)| !n.starts_with("classifier")).collect();
        body = rename(&body, &[("vit.", "")]);
        body.push(("pooler.dense.weight".into(), Tensor::zeros((6, 6), DType::F32, &Device::Cpu).unwrap()));
        let mut json = config.to_hf();
        json["architectures"] = json!(["ViTModel"]);
        let imported = import(&folder(&body, Some(&json)), &Want::default()).unwrap();
        assert!(imported.new_head);
        assert_eq!(imported.config, config);
        assert_eq!(imported.notes.len(), 2, "{:?}", imported.notes);
        assert!(imported.notes[1].contains("left unread: pooler.dense.weight"), "{:?}", imported.notes);
        // Neither head nor labels: how many classes?
        json.as_object_mut().unwrap().remove("id2label");
        let dir = folder(&body, Some(&json));
        assert!(import(&dir, &Want::default()).unwrap_err().to_string().contains("wanted classes"));
        let want = Want { classes: Some(numbered_labels(5)), ..Want::default() };
        assert_eq!(import(&dir, &want).unwrap().tensors["classifier.weight"].dims(), [5, 6]);
    }

    #[test]
    fn stored_dtypes_become_f32() {
        let config = config(false);
        for dtype in [DType::F16, DType::BF16, DType::F64] {
            let of = |(n, t): (String, Tensor)| (n, t.to_dtype(dtype).unwrap());
            let stored: Vec<_> = weights(&config).into_iter().map(of).collect();
            let back = |(n, t): &(String, Tensor)| (n.clone(), t.to_dtype(DType::F32).unwrap());
            let expected: Vec<_> = stored.iter().map(back).collect();
            same(&import(&folder(&stored, Some(&config.to_hf())), &Want::default()).unwrap(), &expected);
        }
    }

    #[test]
    fn what_is_wrong_with_a_tensor_is_said() {
        let config = config(false);
        let query = "vit.encoder.layer.1.attention.attention.query.weight";
        let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
        let refused = |change: &dyn Fn(&mut Named), expected: &[&str]| {
            let mut tensors = weights(&config);
            change(&mut tensors);
            let error = import(&folder(&tensors, Some(&config.to_hf())), &Want::default()).unwrap_err();
            assert_eq!(error.exit_code(), 4, "{error}");
            let error = error.to_string();
            expected.iter().for_each(|part| assert!(error.contains(part), "{error:?} lacks {part:?}"));
        };
        let replace = |tensors: &mut Named, with: Tensor| {
            tensors.iter_mut().find(|(n, _)| n == query).unwrap().1 = with;
        };
        refused(&|t| t.retain(|(n, _)| n != query), &["model.safetensors", query, "found none", "[6, 6]"]);
        refused(&|t| replace(t, zeros(&[6, 5], DType::F32)), &[query, "found shape [6, 5], expected [6, 6]"]);
        refused(&|t| replace(t, zeros(&[6, 6], DType::U8)), &[query, "found dtype U8"]);
        refused(
            &|t| {
                let mut values = vec![0f32; 36];
                values[7] = f32::NAN;
                replace(t, Tensor::from_vec(values, (6, 6), &Device::Cpu).unwrap());
            },
            &[query, "NaN", "flat index 7 "],
        );
        let add = |name: &'static str| move |t: &mut Named| t.push((name.into(), zeros(&[6], DType::F32)));
        refused(&add("vit.encoder.layer.2.layernorm_before.bias"), &["layer.2", "beyond the 2"]);
        refused(&add("vit.encoder.layer.0.ls1.gamma"), &["ls1.gamma", "does not compute with"]);
        refused(&add("vit.layers.0.mlp.fc1.bias"), &["the same weight as vit.encoder.layer.0.intermediate"]);
        refused(&add("cls_classifier.bias"), &["cls_classifier", "expected one"]);

        let with = |key: &str, value: Value| {
            let mut json = config.to_hf();
            json[key] = value;
            import(&folder(&weights(&config), Some(&json)), &Want::default()).unwrap_err()
        };
        let packed = with("quantization_config", json!({"bits": 4}));
        assert!(packed.to_string().contains("packed already") && packed.exit_code() == 4, "{packed}");
        let labels = json!({"0": "a", "1": "b"});
        assert!(with("id2label", labels).to_string().contains("found shape [3, 6], expected [2, 6]"));
        // The user's own numbers are wrong usage, not a bad file.
        let want = Want { image_size: Some((7, 4)), ..Want::default() };
        let error = import(&folder(&weights(&config), Some(&config.to_hf())), &want).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
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

    /// PyTorch's bicubic weights at a quarter and three quarters of the way, computed by hand:
    /// for the row (0, 1) they give -27/256, 58/256, 198/256, 283/256.
    #[test]
    fn positions_are_interpolated_as_pytorch_does() {
        let row = [-27f32, 58.0, 198.0, 283.0].map(|v| v / 256.0);
        // Tokens 9 and 8 are kept; the grid [[1, 2], [3, 4]] is 1 + x + 2y, so that each axis shows.
        let resized = resize_positions(&[9.0, 8.0, 1.0, 2.0, 3.0, 4.0], 2, (2, 2), (4, 4), 1);
        let mut expected = vec![9.0, 8.0];
        expected.extend(row.iter().flat_map(|y| row.map(|x| 1.0 + x + 2.0 * y)));
        assert_eq!(resized, expected);
        // The channels do not mix: the second is ten times the first.
        let two: Vec<f32> = [9.0, 8.0, 1.0, 2.0, 3.0, 4.0].iter().flat_map(|v| [*v, 8.0 * v]).collect();
        let resized = resize_positions(&two, 2, (2, 2), (4, 4), 2);
        assert_eq!(resized, expected.iter().flat_map(|v| [*v, 8.0 * v]).collect::<Vec<f32>>());
        // The same grid is the identity, and a constant stays one in any shape.
        let map: Vec<f32> = (0..15).map(|v| (v * v) as f32).collect();
        assert_eq!(resize_positions(&map, 0, (3, 5), (3, 5), 1), map);
        let constant = resize_positions(&[0.7; 13], 1, (3, 4), (7, 2), 1);
        assert_eq!(constant.len(), 15);
        assert!(constant.iter().all(|v| (v - 0.7).abs() < 1e-6), "{constant:?}");
    }

    #[test]
    fn another_image_size_changes_the_positions_alone() {
        let config = config(true);
        let classic = weights(&config);
        let want = Want { image_size: Some((16, 8)), ..Want::default() };
        let imported = import(&folder(&classic, Some(&config.to_hf())), &want).unwrap();
        assert_eq!(imported.config, VitConfig { image_size: (16, 8), ..config.clone() });
        assert!(imported.notes[0].contains("4x2 patches interpolated to 8x4"), "{:?}", imported.notes);
        for (name, tensor) in &classic {
            let found = &imported.tensors[name];
            if name.ends_with("position_embeddings") {
                assert_eq!(found.dims(), [1, 34, 6]);
                // The class and distillation tokens.
                assert_eq!(values(found)[..12], values(tensor)[..12]);
            } else {
                assert_eq!(values(found), values(tensor), "{name}");
            }
        }
    }

    #[test]
    fn trained_models_load() {
        let data = std::env::var_os("QTUNE_DATA")
            .map(PathBuf::from)
            .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data"));
        for (name, classes, hidden, parameters) in [
            ("vit-fashion-hf", "Ankle boot", None, None),
            ("vit-cifar10-hf", "truck", Some(128), Some(811_146)),
        ] {
            let dir = data.join("models").join(name);
            if !dir.is_dir() {
                println!("skipped: {} is not there", dir.display());
                continue;
            }
            let imported = import_vit(&dir, &Want::default(), &Device::Cpu).unwrap();
            assert_eq!(imported.config.classes[9], classes);
            assert!(hidden.is_none_or(|h| h == imported.config.hidden));
            let count: usize = imported.tensors.values().map(Tensor::elem_count).sum();
            assert!(parameters.is_none_or(|p| p == count), "{count}");
            assert!(!imported.new_head && imported.notes.is_empty(), "{:?}", imported.notes);
            // Its own configuration, written and read again, is the same.
            let json = imported.config.to_hf();
            assert_eq!(VitConfig::from_hf(&dir, &json).unwrap(), imported.config);
        }
    }
}
