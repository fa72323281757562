//! Checkpoints of quantization-aware training as the authors of OFQ release them: latent weights under
//! timm's names, query and key reparameterized, and beside them the learned steps and shifts of every
//! quantizer. Bits are nowhere in the file.
//!
//! | stored, under `blocks.N.attn` | here, under `encoder.layer.N.attention.attention` |
//! | --- | --- |
//! | `q.weight`, `k.weight`, `v.weight`, `v.bias` | `query.weight`, `key.weight`, `value.weight`, `value.bias` |
//! | `quant_x_4_qkv.input_quant_fn.s`, `.move_b4.bias`, `.move_aft.bias` | `input_quant`: `scale`, `shift_in`, `shift_out` |
//! | `quan_a_qkx_fn.s`, `move_qkx_b4.bias` | `qk_quant`: `scale`, `shift_in` |
//! | `quan_a_v_fn.s`, `move_v_b4.bias`, `move_v_aft.bias` | `value_quant`: `scale`, `shift_in`, `shift_out` |
//! | `quan_a_softmax_fn.s` | `softmax_quant`: `scale` |
//!
//! A linear layer has `input_quant_fn.s`, `move_b4.bias` and `move_aft.bias` for its `input_quant`, and
//! at 8 bits `lsqw_fn.s`, the steps of its weight; the image's quantizer also `input_quant_fn.signed`.
//! Left out are `clip_val`, a constant, and `move_qkx_aft.bias`, which no softmax can see. Steps are
//! stored in the shape that broadcasts over the activation, here they are flat. ofq.md 8.1.

use super::super::names::{meaning, Meaning};
use super::super::vit_config::VitConfig;
use super::is_head;
use super::table::Table;
use crate::error::Result;
use crate::weights::checkpoint::Checkpoint;
use candle_core::Tensor;
use indexmap::IndexMap;

/// What training left of an activation quantizer.
#[derive(Clone, Debug)]
pub struct TrainedTap {
    /// The steps, one for each token, channel or colour, or one in all; with a reparameterized key a row
    /// of all heads for each token.
    pub scale: Tensor,
    /// Added before it, along the last axis.
    pub shift_in: Option<Tensor>,
    /// Added after it, along the last axis.
    pub shift_out: Option<Tensor>,
    /// Whether the grid has negative codes, where the file says.
    pub signed: Option<bool>,
}

/// The quantizers of a checkpoint of quantization-aware training.
#[derive(Clone, Debug, Default)]
pub struct TrainedQuantizers {
    /// By the name of the tap.
    pub taps: IndexMap<String, TrainedTap>,
    /// The step of each row, by the name of the weight.
    pub steps: IndexMap<String, Tensor>,
}

/// A part of an activation quantizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Part {
    Scale,
    ShiftIn,
    ShiftOut,
    Signed,
}

/// What a stored tensor is in such a checkpoint; names are canonical, without prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// A weight or bias.
    Dense(String),
    /// A part of the quantizer on this tap.
    Tap(String, Part),
    /// The steps of this weight.
    Step(String),
    /// Of no effect.
    Dead,
    /// Nothing of this method's.
    Plain,
}

/// Whether a checkpoint comes from the authors' training.
pub(super) fn is_ofq(checkpoint: &Checkpoint) -> bool {
    checkpoint.names().any(|name| name.ends_with(".attn.quan_a_softmax_fn.s"))
}

/// What the tensor stored as `name` is.
pub(super) fn role(name: &str) -> Role {
    if name.ends_with(".clip_val") {
        return Role::Dead;
    }
    if let Some((layer, rest)) = name.strip_prefix("blocks.").and_then(|rest| rest.split_once(".attn.")) {
        let number = layer.parse::<usize>().ok().filter(|n| n.to_string() == layer);
        if let Some(role) = number.and_then(|layer| in_attention(layer, rest)) {
            return role;
        }
    }
    const LINEAR: [(&str, Part); 4] = [
        (".input_quant_fn.s", Part::Scale),
        (".input_quant_fn.signed", Part::Signed),
        (".move_b4.bias", Part::ShiftIn),
        (".move_aft.bias", Part::ShiftOut),
    ];
    let weight = |module: &str| match meaning(&format!("{module}.weight")) {
        Meaning::Whole(weight) => Some(weight),
        _ => None,
    };
    for (ending, part) in LINEAR {
        let layer = name.strip_suffix(ending).and_then(weight);
        if let Some(layer) = layer.as_deref().and_then(|weight| weight.strip_suffix(".weight")) {
            return Role::Tap(format!("{layer}.input_quant"), part);
        }
    }
    match name.strip_suffix(".lsqw_fn.s").and_then(weight) {
        Some(weight) => Role::Step(weight),
        None => Role::Plain,
    }
}

fn in_attention(layer: usize, rest: &str) -> Option<Role> {
    let inner = |part: &str| format!("encoder.layer.{layer}.attention.attention.{part}");
    let dense = |part: &str| Some(Role::Dense(inner(part)));
    let tap = |tap: &str, part| Some(Role::Tap(inner(tap), part));
    match rest {
        "q.weight" => dense("query.weight"),
        "k.weight" => dense("key.weight"),
        "v.weight" => dense("value.weight"),
        "v.bias" => dense("value.bias"),
        "quant_x_4_qkv.input_quant_fn.s" => tap("input_quant", Part::Scale),
        "quant_x_4_qkv.move_b4.bias" => tap("input_quant", Part::ShiftIn),
        "quant_x_4_qkv.move_aft.bias" => tap("input_quant", Part::ShiftOut),
        "quan_a_qkx_fn.s" => tap("qk_quant", Part::Scale),
        "move_qkx_b4.bias" => tap("qk_quant", Part::ShiftIn),
        "move_qkx_aft.bias" => Some(Role::Dead),
        "quan_a_v_fn.s" => tap("value_quant", Part::Scale),
        "move_v_b4.bias" => tap("value_quant", Part::ShiftIn),
        "move_v_aft.bias" => tap("value_quant", Part::ShiftOut),
        "quan_a_softmax_fn.s" => tap("softmax_quant", Part::Scale),
        _ => None,
    }
}

/// Where the tensors of the quantizers are stored, by canonical name without prefix.
#[derive(Debug, Default)]
pub(super) struct StoredQuantizers {
    pub(super) taps: IndexMap<(String, Part), String>,
    pub(super) steps: IndexMap<String, String>,
}

/// How many elements each part of the quantizer on a tap has; `None`: the site has no such part.
struct Sizes {
    tap: String,
    scale: usize,
    shift_in: Option<usize>,
    shift_out: Option<usize>,
}

/// The quantizers that a model of these sizes has, by tap name without prefix (ofq.md 2.3, 2.4).
fn expected(config: &VitConfig) -> Vec<Sizes> {
    let (tokens, c) = (config.tokens(), config.hidden);
    let both = |tap: String, scale: usize, shift: usize| {
        let shift = Some(shift);
        Sizes { tap, scale, shift_in: shift, shift_out: shift }
    };
    let pixels = config.image_size.0 * config.image_size.1;
    let image = "embeddings.patch_embeddings.projection.input_quant";
    let mut all = vec![both(image.into(), config.channels, pixels)];
    for layer in 0..config.layers {
        let block = format!("encoder.layer.{layer}");
        let inner = |part: &str| format!("{block}.attention.attention.{part}");
        let key = Some(config.heads * c);
        all.push(both(inner("input_quant"), tokens, c));
        let scale = tokens * config.heads;
        all.push(Sizes { tap: inner("qk_quant"), scale, shift_in: key, shift_out: None });
        all.push(both(inner("value_quant"), c, c));
        all.push(Sizes { tap: inner("softmax_quant"), scale: tokens, shift_in: None, shift_out: None });
        all.push(both(format!("{block}.attention.output.dense.input_quant"), tokens, c));
        all.push(both(format!("{block}.intermediate.dense.input_quant"), tokens, c));
        all.push(both(format!("{block}.output.dense.input_quant"), tokens, config.mlp));
    }
    all.extend(config.heads_of_classes().iter().map(|head| both(format!("{head}.input_quant"), 1, c)));
    all
}

impl Table<'_> {
    /// The number of heads that the steps of the reparameterized keys tell.
    pub(super) fn trained_heads(&self, tokens: usize) -> Option<usize> {
        let steps = ("encoder.layer.0.attention.attention.qk_quant".to_string(), Part::Scale);
        let count: usize = self.shape_of(self.quantizers.as_ref()?.taps.get(&steps)?).iter().product();
        (tokens > 0 && count > 0 && count.is_multiple_of(tokens)).then(|| count / tokens)
    }

    /// Reads the quantizers of a model of these sizes, under their names with prefix.
    pub(super) fn trained(&self, config: &VitConfig) -> Result<Option<TrainedQuantizers>> {
        let Some(stored) = &self.quantizers else { return Ok(None) };
        let full = |bare: &str| match is_head(bare) {
            true => bare.to_string(),
            false => format!("{}.{bare}", config.prefix()),
        };
        let mut used = 0;
        let mut trained = TrainedQuantizers::default();
        for Sizes { tap, scale, shift_in, shift_out } in expected(config) {
            let mut part = |part: Part, count: Option<usize>| -> Result<Option<Tensor>> {
                let Some(count) = count else { return Ok(None) };
                let Some(name) = stored.taps.get(&(tap.clone(), part)) else {
                    let message = format!("found no {part:?} of this quantizer, expected {count} values");
                    return Err(self.error(&tap, &message));
                };
                used += 1;
                self.read_flat(name, count).map(Some)
            };
            let steps = part(Part::Scale, Some(scale))?;
            let (shift_in, shift_out) = (part(Part::ShiftIn, shift_in)?, part(Part::ShiftOut, shift_out)?);
            let signed = match stored.taps.contains_key(&(tap.clone(), Part::Signed)) {
                true => part(Part::Signed, Some(1))?,
                false => None,
            };
            let signed = signed.map(|t| t.to_vec1::<f32>()).transpose()?.map(|v| v[0] != 0.0);
            if let Some(scale) = steps {
                trained.taps.insert(full(&tap), TrainedTap { scale, shift_in, shift_out, signed });
            }
        }
        if used != stored.taps.len() {
            let known: Vec<String> = expected(config).into_iter().map(|sizes| sizes.tap).collect();
            let stranger = stored.taps.iter().find(|((tap, _), _)| !known.contains(tap));
            let stranger = stranger.or_else(|| stored.taps.last()).map(|(_, name)| name.as_str());
            let message = "found a quantizer's tensor for a place where the model has none";
            return Err(self.error(stranger.unwrap_or_default(), message));
        }
        for (weight, name) in &stored.steps {
            let rows = self.rows_of(weight)?;
            trained.steps.insert(full(weight), self.read_flat(name, rows)?);
        }
        Ok(Some(trained))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::super::{import_model, Want};
    use super::*;
    use crate::weights::checkpoint::pickle::testing as pth;
    use crate::weights::Pickle;
    use candle_core::{DType, Device};

    /// A checkpoint as the authors' program writes it, of a distilled DeiT: every value its own.
    fn checkpoint(config: &VitConfig) -> Named {
        let mut next = 0u32;
        let mut of = |shape: &[usize]| {
            let n = shape.iter().product::<usize>() as u32;
            let values: Vec<f32> = (next..next + n).map(|v| 0.5 + v as f32 / 8192.0).collect();
            next += n;
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        let (c, m, n, h) = (config.hidden, config.mlp, config.tokens(), config.heads);
        let mut all: Named = Vec::new();
        for (name, tensor) in timm(&weights(config)) {
            match name.split_once(".attn.qkv.") {
                None => all.push((name, tensor)),
                Some((block, "weight")) => {
                    for part in ["q", "k", "v"] {
                        all.push((format!("{block}.attn.{part}.weight"), of(&[c, c])));
                    }
                    all.push((format!("{block}.attn.q.clip_val"), of(&[1])));
                }
                Some((block, _)) => all.push((format!("{block}.attn.v.bias"), of(&[c]))),
            }
        }
        let mut add = |name: String, shape: &[usize]| all.push((name, of(shape)));
        let mut linear = |module: String, steps: &[usize], shift: &[usize]| {
            add(format!("{module}.input_quant_fn.s"), steps);
            add(format!("{module}.move_b4.bias"), shift);
            add(format!("{module}.move_aft.bias"), shift);
        };
        for i in 0..config.layers {
            let block = format!("blocks.{i}");
            linear(format!("{block}.attn.quant_x_4_qkv"), &[1, n, 1], &[c]);
            linear(format!("{block}.attn.proj"), &[1, n, 1], &[c]);
            linear(format!("{block}.mlp.fc1"), &[1, n, 1], &[c]);
            linear(format!("{block}.mlp.fc2"), &[1, n, 1], &[m]);
        }
        linear("head".into(), &[1], &[c]);
        linear("head_dist".into(), &[1], &[c]);
        linear("patch_embed.proj".into(), &[1, 3, 1, 1], &[1, 1, 8, 4]);
        for i in 0..config.layers {
            let attn = format!("blocks.{i}.attn");
            add(format!("{attn}.quan_a_qkx_fn.s"), &[1, n * h, 1]);
            add(format!("{attn}.move_qkx_b4.bias"), &[h * c]);
            add(format!("{attn}.move_qkx_aft.bias"), &[h * c]);
            add(format!("{attn}.quan_a_v_fn.s"), &[1, 1, c]);
            add(format!("{attn}.move_v_b4.bias"), &[c]);
            add(format!("{attn}.move_v_aft.bias"), &[c]);
            add(format!("{attn}.quan_a_softmax_fn.s"), &[1, 1, n, 1]);
        }
        add("head.lsqw_fn.s".into(), &[3, 1]);
        add("head_dist.lsqw_fn.s".into(), &[3, 1]);
        add("patch_embed.proj.lsqw_fn.s".into(), &[c, 1, 1, 1]);
        all.push((
            "patch_embed.proj.input_quant_fn.signed".into(),
            Tensor::ones(1, DType::F32, &Device::Cpu).unwrap(),
        ));
        all
    }

    fn config() -> VitConfig {
        super::super::testing::config(true)
    }

    fn find<'t>(tensors: &'t Named, name: &str) -> &'t Tensor {
        &tensors.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("{name}")).1
    }

    /// The names of a released file against ours, once as safetensors and once as it is released.
    #[test]
    fn every_tensor_finds_its_place() {
        let config = config();
        let stored = checkpoint(&config);
        let json = config.to_hf();
        let safe = folder(&stored, Some(&json));
        let pickled = folder(&[], Some(&json));
        std::fs::remove_file(pickled.path().join("model.safetensors")).unwrap();
        let (state, storages) = pth::state_dict(&stored);
        let top =
            pth::Py::Dict(vec![(pth::text("epoch"), pth::Py::Int(299)), (pth::text("state_dict"), state)]);
        std::fs::write(pickled.path().join("model_best.pth.tar"), pth::file(&top, &storages)).unwrap();
        for dir in [&safe, &pickled] {
            let want = Want { pickle: Pickle::Allowed, ..Want::default() };
            let imported = import(dir, &want).unwrap();
            assert_eq!(imported.config, config);
            let of = |name: &str| values(find(&stored, name));
            let dense = |name: &str| values(&imported.tensors[name]);
            let inner = "deit.encoder.layer.1.attention.attention";
            for (part, name) in [("query", "q"), ("key", "k"), ("value", "v")] {
                let stored = of(&format!("blocks.1.attn.{name}.weight"));
                assert_eq!(dense(&format!("{inner}.{part}.weight")), stored, "{part}");
            }
            assert_eq!(dense(&format!("{inner}.value.bias")), of("blocks.1.attn.v.bias"));
            assert_eq!(dense(&format!("{inner}.query.bias")), [0.0; 6]);
            assert_eq!(dense("deit.encoder.layer.0.output.dense.weight"), of("blocks.0.mlp.fc2.weight"));
            assert_eq!(dense("distillation_classifier.bias"), of("head_dist.bias"));

            let trained = imported.quantizers.unwrap();
            // Input, key, value, softmax, output and two of the MLP for each block; image and two heads.
            assert_eq!(trained.taps.len(), 2 * 7 + 3);
            let tap = |name: &str| &trained.taps[name];
            let key = tap(&format!("{inner}.qk_quant"));
            assert_eq!(values(&key.scale), of("blocks.1.attn.quan_a_qkx_fn.s"));
            assert_eq!((key.scale.dims(), key.shift_out.is_none()), (&[10 * 3][..], true));
            assert_eq!(values(key.shift_in.as_ref().unwrap()), of("blocks.1.attn.move_qkx_b4.bias"));
            let softmax = tap(&format!("{inner}.softmax_quant"));
            assert_eq!(values(&softmax.scale), of("blocks.1.attn.quan_a_softmax_fn.s"));
            assert!(softmax.shift_in.is_none() && softmax.shift_out.is_none());
            let value = tap(&format!("{inner}.value_quant"));
            assert_eq!(values(value.shift_out.as_ref().unwrap()), of("blocks.1.attn.move_v_aft.bias"));
            let input = tap(&format!("{inner}.input_quant"));
            assert_eq!(values(&input.scale), of("blocks.1.attn.quant_x_4_qkv.input_quant_fn.s"));
            let down = tap("deit.encoder.layer.0.output.dense.input_quant");
            assert_eq!(values(down.shift_in.as_ref().unwrap()), of("blocks.0.mlp.fc2.move_b4.bias"));
            let image = tap("deit.embeddings.patch_embeddings.projection.input_quant");
            assert_eq!((image.scale.dims(), image.signed), (&[3][..], Some(true)));
            assert_eq!(image.shift_in.as_ref().unwrap().dims(), [32]);
            assert_eq!(values(&tap("cls_classifier.input_quant").scale), of("head.input_quant_fn.s"));
            let steps: Vec<&str> = trained.steps.keys().map(String::as_str).collect();
            let patches = "deit.embeddings.patch_embeddings.projection.weight";
            assert_eq!(steps, ["cls_classifier.weight", "distillation_classifier.weight", patches]);
            assert_eq!(values(&trained.steps[patches]), of("patch_embed.proj.lsqw_fn.s"));
        }
    }

    /// Without a configuration the heads are those of the steps, not a guess.
    #[test]
    fn heads_are_told_by_the_steps_of_the_keys() {
        let square = VitConfig { image_size: (8, 8), ..config() };
        let mut stored = checkpoint(&square);
        let map = Tensor::zeros((1, 1, 8, 8), DType::F32, &Device::Cpu).unwrap();
        for (name, tensor) in &mut stored {
            if name.starts_with("patch_embed.proj.move") {
                *tensor = map.clone();
            }
        }
        let imported = import(&folder(&stored, None), &Want::default()).unwrap();
        assert_eq!(imported.config.heads, 3);
        assert!(imported.config.qkv_bias && imported.quantizers.is_some());
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let config = config();
        let json = config.to_hf();
        let refused = |change: &dyn Fn(&mut Named), expected: &[&str]| {
            let mut stored = checkpoint(&config);
            change(&mut stored);
            let error = import(&folder(&stored, Some(&json)), &Want::default()).unwrap_err().to_string();
            expected.iter().for_each(|part| assert!(error.contains(part), "{error:?} lacks {part:?}"));
        };
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let replace = |name: &'static str, shape: &'static [usize]| {
            move |stored: &mut Named| stored.iter_mut().find(|(n, _)| n == name).unwrap().1 = zeros(shape)
        };
        let tokens = "blocks.0.mlp.fc1.input_quant_fn.s";
        refused(&replace(tokens, &[1, 7, 1]), &[tokens, "found shape [1, 7, 1], expected 10 values"]);
        refused(&replace("head.lsqw_fn.s", &[4, 1]), &["head.lsqw_fn.s", "expected 3 values"]);
        let value = "blocks.1.attn.move_v_b4.bias";
        refused(&|s| s.retain(|(n, _)| n != value), &["layer.1", "value_quant", "ShiftIn"]);
        let extra =
            |stored: &mut Named| stored.push(("blocks.0.attn.q.input_quant_fn.s".into(), zeros(&[1])));
        refused(&extra, &["blocks.0.attn.q.input_quant_fn.s", "does not compute with"]);

        // Another image size or other classes do not go with trained steps.
        let dir = folder(&checkpoint(&config), Some(&json));
        let want = Want { classes: Some(vec!["a".into(), "b".into()]), ..Want::default() };
        let error = import_model(dir.path(), &want, &Device::Cpu).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains("2 classes"), "{error}");
        let want = Want { image_size: Some((16, 16)), ..Want::default() };
        let error = import_model(dir.path(), &want, &Device::Cpu).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains("16x16"), "{error}");
    }
}
