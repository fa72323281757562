//! Models that come with the quantizers they were trained with: laid on as they are, nothing is fitted
//! again. Their weights are latent, query and key are one weight in them, and bits are the recipe's word.

use std::sync::Arc;

use candle_core::Tensor;

use super::start::Start;
use super::targets;
use crate::models::import::TrainedQuantizers;
use crate::models::VisionConfig;
use crate::recipe::{DistillKind, Recipe, When};
use crate::transform::{ActQuant, Lsq, WeightQuant};
use crate::weights::{Calibration, Signedness, Site, Transform, Weights};
use crate::{Error, Result};

/// What a recipe must say for such a model; `trains` tells whether any step is trained.
pub(super) fn check(recipe: &Recipe, start: &Start, trains: bool) -> Result<()> {
    let Some(trained) = &start.quantizers else { return Ok(()) };
    let name = &start.name;
    if recipe.activation.bits == 32 {
        return Err(Error::usage(format!(
            "{name}: found a model trained with quantizers, whose bits are not in the file: give --bits and \
             --act-bits as it was trained"
        )));
    }
    if recipe.phase.iter().any(|phase| !phase.quantize && phase.when == When::Always) {
        let message = "found a model trained with quantizers, a float phase would undo that";
        return Err(Error::usage(format!("{name}: {message}")));
    }
    for (weight, target) in targets(recipe, &start.weights)? {
        let transform = &recipe.transform[target.transform];
        agree(transform.kind, &weight, trained)?;
        if let Some(group) = transform.group {
            return Err(Error::usage(format!(
                "transform.{}.group = {group}: {weight} was trained with one step a row, expected no group",
                target.transform
            )));
        }
    }
    if trains && recipe.distill.kind != DistillKind::None && recipe.distill.teacher.is_none() {
        return Err(Error::usage(format!(
            "{name}: found a model trained with quantizers, which without them is no teacher: name a --teacher, or \
             set --kd none"
        )));
    }
    Ok(())
}

/// Errs where a recipe's rule for the weight called `name` is of another kind than the one it was trained
/// with.
fn agree(kind: WeightQuant, name: &str, trained: &TrainedQuantizers) -> Result<()> {
    let (found, expected) = match (kind, trained.steps.contains_key(name)) {
        (WeightQuant::Statsq, false) | (WeightQuant::Lsq, true) => return Ok(()),
        (WeightQuant::Statsq, true) => ("with learned steps", "lsq"),
        (WeightQuant::Lsq, false) => ("without learned steps", "statsq"),
    };
    Err(Error::usage(format!("{name}: trained {found}, expected a transform of kind {expected}")))
}

/// The rule for the weight called `name`: learned steps as they were trained, StatsQ from its statistics.
pub(super) fn weight_rule(
    kind: WeightQuant,
    bits: u8,
    name: &str,
    w: &Tensor,
    trained: &TrainedQuantizers,
) -> Result<Arc<dyn Transform>> {
    agree(kind, name, trained)?;
    match trained.steps.get(name) {
        Some(step) => Ok(Arc::new(Lsq::trained(bits, &step.to_device(w.device())?)?)),
        None => kind.training(bits, None, w),
    }
}

/// Hangs the trained quantizers on the taps that `images` come by.
pub(super) fn hang(
    recipe: &Recipe,
    config: &VisionConfig,
    weights: &mut Weights,
    images: &Tensor,
    trained: &TrainedQuantizers,
) -> Result<()> {
    let activation = recipe.activation;
    let taps = trained.taps.clone();
    let calibration = Calibration::new(Box::new(move |name, site, x| {
        let bits = if site.edge { activation.edge_bits } else { activation.bits };
        let Some(tap) = taps.get(name) else {
            return Err(Error::tensor(name, "found no trained quantizer for this place, expected one"));
        };
        let signedness = match tap.signed {
            Some(true) => Signedness::Signed,
            Some(false) => Signedness::Unsigned,
            None => site.signedness,
        };
        let site = Site { signedness, ..site };
        let (rule, _) = ActQuant::start(bits, site, x)?;
        let shifts = (tap.shift_in.as_ref(), tap.shift_out.as_ref());
        Ok(Some(Arc::new(rule.trained(name, &tap.scale, shifts.0, shifts.1)?)))
    }));
    let store = weights.folded()?.calibrating(calibration.clone());
    config.build(&store)?.forward(images)?;
    for (name, rule) in calibration.rules()? {
        weights.hang(name, rule);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::Device;

    use super::*;
    use crate::data::Preprocess;
    use crate::models::{open_model, open_model_with, VitConfig};
    use crate::quantize::{calibrate, lay_quantizers, run, write_model};
    use crate::random::Random;
    use crate::recipe::set;
    use crate::train::Quiet;
    use crate::weights::checkpoint::pickle::testing as pth;
    use crate::weights::Expr;

    fn config() -> VisionConfig {
        VisionConfig::Vit(VitConfig {
            image_size: (8, 8),
            patch_size: 4,
            channels: 1,
            hidden: 12,
            layers: 2,
            heads: 3,
            mlp: 20,
            eps: 1e-6,
            qkv_bias: true,
            distilled: true,
            two_heads: true,
            classes: ["0", "1", "2"].map(String::from).to_vec(),
        })
    }

    fn normal(shape: &[usize], std: f32, name: &str) -> Tensor {
        let mut random = Random::new(3, name, &[]);
        let values = (0..shape.iter().product()).map(|_| std * random.normal()).collect::<Vec<f32>>();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn recipe(changes: &[&str]) -> Recipe {
        let mut table = Recipe::table("vit-w2a2").unwrap();
        changes.iter().for_each(|change| set(&mut table, change).unwrap());
        Recipe::resolve(table).unwrap()
    }

    /// A full-precision model.
    fn reference() -> Start {
        let config = config();
        let tensors: Vec<(String, Tensor)> = config
            .shapes()
            .into_iter()
            .map(|(name, shape)| (name.clone(), normal(&shape, 0.3, &name)))
            .collect();
        Start {
            weights: Weights::from_tensors(tensors),
            preprocess: Preprocess::default_for(8, 8, 1),
            config,
            quantizers: None,
            untrained: false,
            notes: Vec::new(),
            name: "reference".into(),
        }
    }

    /// A model with its quantizers, every step and shift moved as training would.
    fn trained_store() -> Weights {
        let start = reference();
        let recipe = recipe(&["qkr.bias=\"drop\""]);
        let mut weights = start.weights.trainable().unwrap();
        lay_quantizers(&recipe, &start, &mut weights, true, &Quiet).unwrap();
        let images = normal(&[4, 1, 8, 8], 1.0, "images");
        calibrate(&recipe, &start.config, &mut weights, &images, true, &Quiet).unwrap();
        for param in weights.params() {
            let (own, drawn) = (param.var.as_detached_tensor(), normal(param.var.dims(), 0.1, &param.name));
            let moved = match param.name.ends_with(".scale") {
                true => (own * (drawn + 1.0).unwrap()).unwrap(),
                false if param.name.contains("_quant.shift") => drawn,
                false => continue,
            };
            param.var.set(&moved).unwrap();
        }
        weights
    }

    #[test]
    fn a_model_quantized_by_groups_is_written_and_read_back() {
        let start = reference();
        let images = normal(&[4, 1, 8, 8], 1.0, "images");
        let answers = |weights: &Weights| {
            let logits = start.config.build(weights).unwrap().forward(&images).unwrap().logits().unwrap();
            logits.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        for (bits, training) in [(2, true), (2, false), (32, true), (32, false)] {
            let act_bits = format!("activation.bits={bits}");
            // Rows of 12 and 20 columns; of 16 and 12, which are one group.
            let groups = ["transform.0.group=5", "transform.1.group=64"];
            let recipe = recipe(&["qkr.bias=\"drop\"", &act_bits, groups[0], groups[1]]);
            let mut weights = start.weights.trainable().unwrap();
            lay_quantizers(&recipe, &start, &mut weights, training, &Quiet).unwrap();
            calibrate(&recipe, &start.config, &mut weights, &images, training, &Quiet).unwrap();
            let packed = weights.packed().unwrap();
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("model");
            write_model(&path, &start.config, &start.preprocess, &packed).unwrap();
            let opened = open_model(&path, &Device::Cpu).unwrap();
            let mut grouped = 0;
            for (name, weight) in packed.iter() {
                let found = opened.weights.get(name).unwrap();
                if let (Expr::Packed(a), Expr::Packed(b)) = (weight.expr(), found.expr()) {
                    assert_eq!((a.grid(), a.group(), a.step()), (b.grid(), b.group(), b.step()), "{name}");
                    assert!(a.group().is_none_or(|group| group == 5), "{name}");
                    grouped += usize::from(a.group().is_some());
                }
            }
            // The product, value, output and two of the MLP in each block.
            assert_eq!(grouped, 2 * 5);
            assert_eq!(answers(&packed), answers(&opened.weights), "{bits} {training}");
            if bits == 32 {
                for (got, want) in answers(&packed).iter().zip(answers(&weights.folded().unwrap())) {
                    // The same values, through a few layers of sums in another order.
                    assert!((got - want).abs() <= 1e-4 * (1.0 + want.abs()), "{training}: {got} {want}");
                }
            }
        }
    }

    /// Our names to the authors', one after another.
    const NAMES: [(&str, &str); 29] = [
        ("deit.embeddings.distillation_token", "dist_token"),
        ("deit.embeddings.cls_token", "cls_token"),
        ("deit.embeddings.position_embeddings", "pos_embed"),
        ("deit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("deit.encoder.layer.", "blocks."),
        ("deit.layernorm", "norm"),
        ("attention.attention.qk.weight.query", "attn.q.weight"),
        ("attention.attention.qk.weight.key", "attn.k.weight"),
        ("attention.attention.value.", "attn.v."),
        ("attention.attention.input_quant.scale", "attn.quant_x_4_qkv.input_quant_fn.s"),
        ("attention.attention.input_quant.shift_in", "attn.quant_x_4_qkv.move_b4.bias"),
        ("attention.attention.input_quant.shift_out", "attn.quant_x_4_qkv.move_aft.bias"),
        ("attention.attention.qk_quant.scale", "attn.quan_a_qkx_fn.s"),
        ("attention.attention.qk_quant.shift_in", "attn.move_qkx_b4.bias"),
        ("attention.attention.value_quant.scale", "attn.quan_a_v_fn.s"),
        ("attention.attention.value_quant.shift_in", "attn.move_v_b4.bias"),
        ("attention.attention.value_quant.shift_out", "attn.move_v_aft.bias"),
        ("attention.attention.softmax_quant.scale", "attn.quan_a_softmax_fn.s"),
        ("attention.output.dense", "attn.proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("distillation_classifier", "head_dist"),
        ("cls_classifier", "head"),
        (".input_quant.scale", ".input_quant_fn.s"),
        (".input_quant.shift_in", ".move_b4.bias"),
        (".input_quant.shift_out", ".move_aft.bias"),
        (".weight.scale", ".lsqw_fn.s"),
    ];

    /// The file that the authors' program would have left of this store.
    fn release(weights: &Weights, path: &Path) {
        let named =
            |name: &str| NAMES.iter().fold(name.to_string(), |n, (ours, theirs)| n.replace(ours, theirs));
        let broadcast = |name: &str, t: Tensor| match name.ends_with("_fn.s") && t.rank() == 1 {
            true => t.reshape((1, t.elem_count(), 1)).unwrap(),
            false => t,
        };
        let mut tensors: Vec<(String, Tensor)> = Vec::new();
        for param in weights.params() {
            let name = named(&param.name);
            let tensor = broadcast(&name, param.var.as_detached_tensor());
            tensors.push((name, tensor));
        }
        let one = Tensor::new(&[1f32], &Device::Cpu).unwrap();
        tensors.push(("patch_embed.proj.input_quant_fn.signed".into(), one.clone()));
        tensors.push(("blocks.0.attn.v.clip_val".into(), one));
        let (state, storages) = pth::state_dict(&tensors);
        let top = pth::Py::Dict(vec![(pth::text("state_dict"), state)]);
        std::fs::write(path, pth::file(&top, &storages)).unwrap();
    }

    fn idx(dims: &[u32], data: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0, 0, 8, dims.len() as u8];
        dims.iter().for_each(|d| bytes.extend(d.to_be_bytes()));
        bytes.extend(data);
        bytes
    }

    /// A released file is packed as it stands: codes, steps and answers of the model that was trained.
    #[test]
    fn a_released_model_is_packed_as_it_was_trained() {
        let reference = trained_store();
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        release(&reference, &at("best.pth"));
        std::fs::write(at("config.json"), config().to_hf().to_string()).unwrap();
        std::fs::create_dir(at("data")).unwrap();
        for part in ["train", "t10k"] {
            let pixels: Vec<u8> = (0..30 * 64).map(|i| (i * 37 % 251) as u8).collect();
            let labels: Vec<u8> = (0..30).map(|i| (i % 3) as u8).collect();
            std::fs::write(at(&format!("data/{part}-images-idx3-ubyte")), idx(&[30, 8, 8], &pixels)).unwrap();
            std::fs::write(at(&format!("data/{part}-labels-idx1-ubyte")), idx(&[30], &labels)).unwrap();
        }
        let path = |key: &str, name: &str| format!("{key}='{}'", at(name).display());
        let sources = [path("model.path", "best.pth"), path("data.path", "data")];
        let mut changes: Vec<&str> = sources.iter().map(String::as_str).collect();
        changes.extend(["model.allow_pickle=true", "phase.1.steps=0", "train.batch_size=10"]);
        std::fs::create_dir(at("run")).unwrap();
        run(&recipe(&changes), &at("run"), &Device::Cpu, &Quiet).unwrap();

        let packed = reference.packed().unwrap();
        let opened = open_model(&at("run/model"), &Device::Cpu).unwrap();
        let mut compared = 0;
        for (name, weight) in packed.iter() {
            let found = opened.weights.get(name).unwrap();
            if let (Expr::Packed(a), Expr::Packed(b)) = (weight.expr(), found.expr()) {
                assert_eq!((a.grid(), a.step()), (b.grid(), b.step()), "{name}");
                assert_eq!(a.rows().codes, b.rows().codes, "{name}");
                compared += 1;
            }
        }
        // The product, value, output and two of the MLP in each block; patches and two heads.
        assert_eq!(compared, 2 * 5 + 3);
        let images = normal(&[4, 1, 8, 8], 1.0, "other images");
        let answers = |weights: &Weights| {
            let logits = config().build(weights).unwrap().forward(&images).unwrap().logits().unwrap();
            logits.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(answers(&packed), answers(&opened.weights));
        assert_eq!(opened.weights.taps().count(), 2 * 7 + 3);

        // What the recipe must say is asked for before any work.
        let refused = |more: &[&str], expected: &str| {
            let recipe = recipe(&[&changes, more].concat());
            let error = run(&recipe, &at("run2"), &Device::Cpu, &Quiet).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains(expected), "{error}");
        };
        refused(&["activation.bits=32"], "--act-bits");
        refused(&["transform.0.group=4"], "expected no group");
        refused(&["phase.1.steps=3"], "--teacher");
        refused(&["model.allow_pickle=false"], "--allow-pickle");
        refused(&["transform.0.kind='lsq'"], "expected a transform of kind statsq");
        // For evaluation it has to be packed first.
        let error = open_model_with(&at("best.pth"), crate::weights::Pickle::Allowed, &Device::Cpu);
        assert!(error.unwrap_err().to_string().contains("pack it first"));
    }
}
