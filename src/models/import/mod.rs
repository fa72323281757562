//! Reads a published ViT, DeiT or Swin (Hugging Face of either spelling, timm, torchvision) into canonical names,
//! fitted to the image size and classes that are wanted; and a convolutional classifier of our own.
//!
//! `table` knows the checkpoint by canonical names, `ofq` those of quantization-aware training, `infer` reads sizes off the tensors, `timm` what
//! timm's configuration adds, `positions` fits the position embeddings to another grid.

mod binary;
mod conv;
mod infer;
mod ofq;
mod positions;
mod swin;
mod table;
#[cfg(test)]
mod testing;
mod timm;

use super::binary_config::is_binary;
use super::convnet_config::is_conv;
use super::names::meaning;
use super::vision::{is_swin, VisionConfig};
use super::vit_config::VitConfig;
use crate::error::{Error, On, Result};
use crate::random::Random;
use crate::weights::checkpoint::{Checkpoint, Pickle};
use binary::import_binary;
use candle_core::{DType, Device, Tensor};
use conv::import_conv;
use indexmap::IndexMap;
use positions::resize_positions;
use serde_json::Value;
use std::path::{Path, PathBuf};
use swin::{import_swin, looks_like_swin};
use table::Table;
use timm::{is_timm, is_timm_swin};

pub use ofq::{TrainedQuantizers, TrainedTap};
pub use timm::{timm_preprocess, TimmPreprocess};

/// What may be read and what it is to become; `None` keeps what the checkpoint says.
#[derive(Clone, Debug, Default)]
pub struct Want {
    /// Height and width of the input, in pixels.
    pub image_size: Option<(usize, usize)>,
    /// The label of each class id.
    pub classes: Option<Vec<String>>,
    /// Seeds the new classifier, where one is needed.
    pub seed: u64,
    /// Whether the checkpoint may be one that PyTorch pickled.
    pub pickle: Pickle,
}

/// A model read from a checkpoint.
#[derive(Debug)]
pub struct Imported<C = VisionConfig> {
    /// Sizes and labels after fitting.
    pub config: C,
    /// f32 tensors by canonical name, in the order of the configuration's shapes.
    pub tensors: IndexMap<String, Tensor>,
    /// The quantizers that the model was trained with, where it was.
    pub quantizers: Option<TrainedQuantizers>,
    /// One line for each thing that was guessed, fitted or left out.
    pub notes: Vec<String>,
    /// Whether the classifier is new and must be trained before it is of use.
    pub new_head: bool,
}

impl<C> Imported<C> {
    fn map<D>(self, wrap: impl FnOnce(C) -> D) -> Imported<D> {
        let Imported { config, tensors, quantizers, notes, new_head } = self;
        Imported { config: wrap(config), tensors, quantizers, notes, new_head }
    }
}

/// Reads the model in `dir`, a folder or a single file (see [`Checkpoint::open_with`]), onto `device`.
///
/// The sizes come from `config.json` (Hugging Face's or timm's) in the folder or beside the file,
/// or from the text of that form under `config` in the file's own metadata, which goes first; with
/// neither they are read off the tensors. A classifier that is missing or has another number of
/// classes than wanted is drawn anew (truncated normal of deviation 0.02, zero bias); position
/// embeddings are interpolated to another image size.
///
/// Errs, naming file and tensor, on missing, misshapen, unknown or not finite weights, on parts this
/// model does not compute with, and on a model that is packed already.
pub fn import_model(dir: &Path, want: &Want, device: &Device) -> Result<Imported> {
    let checkpoint = Checkpoint::open_with(dir, want.pickle)?;
    let json = config_json(dir, Some(&checkpoint))?;
    if let Some((path, json)) = &json {
        if json.get("quantization_config").is_some_and(|q| !q.is_null()) {
            let message = "found a quantization_config: this model is packed already, expected a plain one";
            return Err(Error::input(path, message));
        }
    }
    if let Some(json) = json.as_ref().filter(|(_, json)| is_conv(json)) {
        return Ok(import_conv(dir, &checkpoint, json, want, device)?.map(VisionConfig::Conv));
    }
    if let Some((path, json)) = json.as_ref().filter(|(_, json)| is_binary(json)) {
        return Ok(import_binary(path, json, &checkpoint, want, device)?.map(VisionConfig::Binary));
    }
    let swin = match &json {
        Some((_, json)) if is_timm(json) => is_timm_swin(json),
        Some((_, json)) => is_swin(json),
        None => looks_like_swin(&checkpoint),
    };
    Ok(match swin {
        true => import_swin(dir, &checkpoint, json.as_ref(), want, device)?.map(VisionConfig::Swin),
        false => import_vit(dir, &checkpoint, json.as_ref(), want, device)?.map(VisionConfig::Vit),
    })
}

fn import_vit(
    dir: &Path,
    checkpoint: &Checkpoint,
    json: Option<&(PathBuf, Value)>,
    want: &Want,
    device: &Device,
) -> Result<Imported<VitConfig>> {
    let mut notes = checkpoint.notes().to_vec();
    let mut table = Table::of(checkpoint, &meaning)?;
    let two_heads = table.name_heads();
    let has_head = table.pieces.keys().any(|name| is_head(name));
    let mut stored = match json {
        Some((path, json)) if !is_timm(json) => {
            if has_no_labels(json) && !has_head && want.classes.is_none() {
                let message =
                    "found neither a classifier nor labels (id2label), expected one or wanted classes";
                return Err(Error::input(path, message));
            }
            VitConfig::from_hf(path, json)?
        }
        other => table.infer(dir, other, want, &mut notes)?,
    };
    if has_head {
        if two_heads && !stored.distilled {
            let message = "found a head of two, expected one: there is no distillation token";
            return Err(table.error("cls_classifier", message));
        }
        stored.two_heads = two_heads;
    }
    // Only the value's: query and key are one weight without a bias, whatever a configuration says.
    stored.qkv_bias |= table.quantizers.is_some();
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
    let quantizers = table.trained(&stored)?;
    if quantizers.is_some() && (new_head || config.grid() != stored.grid()) {
        let ((h, w), classes) = (config.image_size, config.classes.len());
        return Err(Error::usage(format!(
            "{}: found a model trained with quantizers, whose steps do not go with {h}x{w} pixels and {classes} \
             classes; it is for {}x{} and {}",
            dir.display(),
            stored.image_size.0,
            stored.image_size.1,
            stored.classes.len()
        )));
    }

    let expected = stored.shapes();
    let mut tensors = IndexMap::with_capacity(expected.len());
    for ((name, shape), (_, stored_shape)) in config.shapes().into_iter().zip(expected) {
        let bare = name.strip_prefix(config.prefix()).and_then(|n| n.strip_prefix('.')).unwrap_or(&name);
        let tensor = if new_head && is_head(bare) {
            fresh(&name, &shape, want.seed).on(&name)?
        } else if quantizers.is_some() && is_query_or_key_bias(bare) {
            // Reparameterization has none.
            Tensor::zeros(shape, DType::F32, &Device::Cpu).on(&name)?
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
    Ok(Imported { config, tensors, quantizers, notes, new_head })
}

const POSITIONS: &str = "embeddings.position_embeddings";

fn is_head(bare: &str) -> bool {
    ["classifier.", "cls_classifier.", "distillation_classifier."].iter().any(|h| bare.starts_with(h))
}

fn is_query_or_key_bias(bare: &str) -> bool {
    [".attention.query.bias", ".attention.key.bias"].iter().any(|end| bare.ends_with(end))
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

#[cfg(test)]
mod tests {
    use super::super::keys::numbered_labels;
    use super::testing::*;
    use super::*;
    use serde_json::json;

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
    fn what_is_wrong_with_a_configuration_is_said() {
        let config = config(false);
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
            let imported = import_from(&dir, &Want::default(), &Device::Cpu).unwrap();
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
