//! What can be selected: one unit for each matrix that a checkpoint's tensors hold (kappatune.md section 2).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::weights::{Expr, Weight, Weights};
use crate::{Error, Result};

/// What a matrix does in its model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// A linear layer within a block.
    Linear,
    /// A convolution.
    Conv,
    /// The experts of a mixture.
    Experts,
    /// A table of embeddings.
    Embedding,
    /// The output: logits of tokens or classes.
    Head,
    /// What sends tokens to experts.
    Router,
}

impl Role {
    /// The name that recipes and files use.
    pub fn name(self) -> &'static str {
        match self {
            Role::Linear => "linear",
            Role::Conv => "conv",
            Role::Experts => "experts",
            Role::Embedding => "embedding",
            Role::Head => "head",
            Role::Router => "router",
        }
    }

    /// The roles that are looked at where nothing else is said. Embeddings and heads are tall and would win by
    /// their shape; routers too, and training them sends every token elsewhere.
    pub const DEFAULT: [Role; 3] = [Role::Linear, Role::Conv, Role::Experts];
}

/// How a tensor becomes a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// It is one: `[rows, cols]`.
    Matrix,
    /// Its first axis by all others.
    Conv,
    /// One matrix of a stack `[count, rows, cols]`.
    Experts,
    /// One of several that lie above one another in `[count * rows, cols]`.
    Fused,
}

/// A matrix that can be selected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unit {
    /// The checkpoint name of its tensor.
    pub param: String,
    /// Which matrix of that tensor, where it holds several.
    pub index: Option<usize>,
    /// What it does.
    pub role: Role,
    /// How it lies in its tensor.
    pub kind: Kind,
    /// Rows of the matrix.
    pub rows: usize,
    /// Columns of the matrix.
    pub cols: usize,
    /// Other names of the same tensor: training one trains all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
}

impl Unit {
    /// Its name: that of the tensor, with the number of the matrix in brackets where there are several.
    pub fn key(&self) -> String {
        match self.index {
            Some(index) => format!("{}[{index}]", self.param),
            None => self.param.clone(),
        }
    }

    /// The path of its module: the tensor's name without `.weight`.
    pub fn module(&self) -> &str {
        self.param.strip_suffix(".weight").unwrap_or(&self.param)
    }

    /// How many numbers it holds.
    pub fn numel(&self) -> usize {
        self.rows * self.cols
    }
}

/// What a rule over names says of a tensor of this name and shape: its role, `None` where it has no
/// condition number.
pub type Roles<'a> = dyn Fn(&str, &[usize]) -> Option<Role> + 'a;

/// Every unit of `weights`, in their order. Names of one and the same tensor are one unit under the first.
///
/// Errs where a role does not go with a shape, naming the tensor.
pub fn units(weights: &Weights, roles: &Roles) -> Result<Vec<Unit>> {
    let mut units: Vec<Unit> = Vec::new();
    let mut seen: BTreeMap<Identity, String> = BTreeMap::new();
    for (name, weight) in weights.iter() {
        let shape = weight.shape()?;
        if shape.contains(&0) {
            continue;
        }
        let Some(role) = roles(name, &shape) else { continue };
        if let Some(first) = seen.get(&identity(weight)) {
            let same = units.iter_mut().filter(|unit| unit.param == *first);
            same.for_each(|unit| unit.aliases.push(name.to_string()));
            continue;
        }
        seen.insert(identity(weight), name.to_string());
        units.extend(matrices(name, role, &shape)?);
    }
    Ok(units)
}

/// The matrices of one tensor.
fn matrices(name: &str, role: Role, shape: &[usize]) -> Result<Vec<Unit>> {
    let unit = |index, kind, rows, cols| Unit {
        param: name.to_string(),
        index,
        role,
        kind,
        rows,
        cols,
        aliases: Vec::new(),
    };
    match (role, shape) {
        (_, &[rows, cols]) => Ok(vec![unit(None, Kind::Matrix, rows, cols)]),
        (Role::Experts, &[count, rows, cols]) => {
            Ok((0..count).map(|e| unit(Some(e), Kind::Experts, rows, cols)).collect())
        }
        (Role::Conv, &[rows, ref rest @ ..]) if (2..=4).contains(&rest.len()) => {
            Ok(vec![unit(None, Kind::Conv, rows, rest.iter().product())])
        }
        _ => {
            let expected = match role {
                Role::Conv => "3 to 5 axes",
                Role::Experts => "2 or 3 axes",
                _ => "2 axes",
            };
            let message =
                format!("found shape {shape:?}, expected {expected} of a tensor of role {}", role.name());
            Err(Error::tensor(name, message))
        }
    }
}

/// What tells whether two weights are one: the expression itself, the tensor, or the bytes in the file.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Identity {
    Expr(usize),
    Tensor(String),
    Bytes(usize, usize),
}

fn identity(weight: &Weight) -> Identity {
    let own = std::ptr::from_ref(weight.expr()) as usize;
    match weight.expr() {
        Expr::Dense(tensor) => Identity::Tensor(format!("{:?}", tensor.id())),
        Expr::Stored { checkpoint, name, .. } => match checkpoint.raw(name) {
            // Pickled files let several names share a storage.
            Ok(std::borrow::Cow::Borrowed(bytes)) => Identity::Bytes(bytes.as_ptr() as usize, bytes.len()),
            _ => Identity::Expr(own),
        },
        _ => Identity::Expr(own),
    }
}

/// Every parameter of a model, tied ones once.
pub fn total_params(weights: &Weights) -> Result<usize> {
    let mut seen = std::collections::BTreeSet::new();
    let mut total = 0;
    for (_, weight) in weights.iter() {
        if seen.insert(identity(weight)) {
            total += weight.shape()?.iter().product::<usize>();
        }
    }
    Ok(total)
}

/// Says that the tensor called `param` is used as `alias` too, by a model that ties them without storing both.
pub fn tie(units: &mut [Unit], param: &str, alias: &str) {
    let same =
        units.iter_mut().filter(|unit| unit.param == param && !unit.aliases.iter().any(|a| a == alias));
    same.for_each(|unit| unit.aliases.push(alias.to_string()));
}

/// The same units, a fused tensor as the parts that its name promises: gate and up in halves, query, key and
/// value in thirds where the tensor is three times as tall as wide (with fewer key heads than query heads the
/// parts differ in size, and the tensor stays whole). For analysis: training takes whole tensors alone.
pub fn split_fused(units: Vec<Unit>) -> Vec<Unit> {
    let mut split = Vec::with_capacity(units.len());
    for unit in units {
        let parts = match last(unit.module()) {
            _ if unit.kind != Kind::Matrix || unit.role != Role::Linear => 1,
            "gate_up_proj" | "gate_up" | "w13" if unit.rows % 2 == 0 => 2,
            "qkv" | "qkv_proj" | "query_key_value" | "in_proj" | "Wqkv" if unit.rows == 3 * unit.cols => 3,
            _ => 1,
        };
        if parts == 1 {
            split.push(unit);
            continue;
        }
        let rows = unit.rows / parts;
        split.extend((0..parts).map(|i| Unit { index: Some(i), kind: Kind::Fused, rows, ..unit.clone() }));
    }
    split
}

fn last(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// The path of a module and its segments; none for a bias.
fn segments(name: &str) -> Option<Vec<&str>> {
    let path = name.strip_suffix(".weight").unwrap_or(name);
    (!path.ends_with("bias")).then(|| path.split('.').collect())
}

/// Whether a segment is one of experts. `shared_experts` is not: it is a plain MLP that every token takes.
fn experts(segments: &[&str]) -> bool {
    segments.contains(&"experts")
}

fn router(segments: &[&str]) -> bool {
    matches!(segments.last(), Some(&("router" | "gate" | "shared_expert_gate" | "gate_linear")))
}

/// The roles of the names of the Llama family.
pub fn llama_roles(name: &str, shape: &[usize]) -> Option<Role> {
    let segments = segments(name)?;
    match (segments.last().copied()?, shape.len()) {
        _ if router(&segments) && shape.len() == 2 => Some(Role::Router),
        (_, 2 | 3) if experts(&segments) => Some(Role::Experts),
        ("embed_tokens", 2) => Some(Role::Embedding),
        ("lm_head", 2) => Some(Role::Head),
        (
            "q_proj" | "k_proj" | "v_proj" | "o_proj" | "gate_proj" | "up_proj" | "down_proj" | "qkv_proj"
            | "gate_up_proj",
            2,
        ) => Some(Role::Linear),
        _ => None,
    }
}

/// The roles of the names of vision models: transformers under the canonical names of
/// [`crate::models::names`], small convolutional networks (`conv*`, `fc*`), and
/// perceptrons (`layers.N`).
pub fn vision_roles(name: &str, shape: &[usize]) -> Option<Role> {
    let segments = segments(name)?;
    // Layers in a row are numbered: `conv.0`, `layers.1`.
    let last = segments.iter().rev().copied().find(|s| !s.chars().all(|c| c.is_ascii_digit()))?;
    let numbered = segments.last().is_some_and(|s| *s != last);
    match shape.len() {
        2 if last.contains("classifier") || last == "head" => Some(Role::Head),
        2 if matches!(last, "query" | "key" | "value" | "dense" | "reduction") || last.starts_with("fc") => {
            Some(Role::Linear)
        }
        2 if last == "layers" && numbered => Some(Role::Linear),
        3..=5 if last == "projection" && segments.contains(&"patch_embeddings") => Some(Role::Conv),
        3..=5 if last.starts_with("conv") => Some(Role::Conv),
        _ => None,
    }
}

/// The roles of any checkpoint, by rules over names where no model says more:
///
/// - biases, norms and everything below two axes: none; tables of positions and single tokens: none;
/// - a segment `experts`: experts; a last segment `router` or `gate`: router;
/// - two axes: an embedding where a segment speaks of one (`embed_tokens`, `wte`, `word_embeddings`, ...), a head
///   where the last segment is `lm_head`, `head`, `score`, `output` at the root or speaks of a classifier,
///   linear otherwise;
/// - four and five axes: convolutions; three: a convolution where the name speaks of one, else none, since
///   a stack of matrices has three axes too.
pub fn generic_roles(name: &str, shape: &[usize]) -> Option<Role> {
    let segments = segments(name)?;
    let last = segments.last().copied()?;
    let lower = name.to_ascii_lowercase();
    if lower.contains("norm")
        || ["position", "pos_embed", "rel_pos", "cls_token", "dist_token", "wpe"]
            .iter()
            .any(|p| lower.contains(p))
    {
        return None;
    }
    let embeds = |s: &&str| s.contains("embed") || matches!(*s, "wte" | "shared");
    match shape.len() {
        2 if router(&segments) => Some(Role::Router),
        2 | 3 if experts(&segments) => Some(Role::Experts),
        2 if matches!(last, "lm_head" | "head" | "score" | "head_dist") || last.contains("classifier") => {
            Some(Role::Head)
        }
        2 if segments == ["output"] => Some(Role::Head),
        2 if segments.iter().any(embeds) => Some(Role::Embedding),
        2 => Some(Role::Linear),
        4 | 5 => Some(Role::Conv),
        3 if lower.contains("conv") => Some(Role::Conv),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::models::{BinaryConfig, ConvConfig, Reading};

    fn store(tensors: &[(&str, &[usize])]) -> Weights {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        Weights::from_tensors(tensors.iter().map(|(name, shape)| (name.to_string(), zeros(shape))))
    }

    #[test]
    fn every_matrix_is_a_unit_and_vectors_are_none() {
        let weights = store(&[
            ("a.q_proj.weight", &[4, 3]),
            ("a.q_proj.bias", &[4]),
            ("conv.weight", &[5, 2, 3, 3]),
            ("m.experts.gate_up_proj", &[2, 6, 4]),
            ("m.experts.gate_up_proj_bias", &[2, 6]),
            ("empty.weight", &[0, 3]),
        ]);
        let units = units(&weights, &generic_roles).unwrap();
        let found: Vec<_> = units.iter().map(|u| (u.key(), u.rows, u.cols, u.role, u.kind)).collect();
        assert_eq!(
            found,
            [
                ("a.q_proj.weight".to_string(), 4, 3, Role::Linear, Kind::Matrix),
                ("conv.weight".to_string(), 5, 18, Role::Conv, Kind::Conv),
                ("m.experts.gate_up_proj[0]".to_string(), 6, 4, Role::Experts, Kind::Experts),
                ("m.experts.gate_up_proj[1]".to_string(), 6, 4, Role::Experts, Kind::Experts),
            ]
        );
        assert_eq!((units[0].module(), units[0].numel()), ("a.q_proj", 12));
        let error = super::units(&weights, &|_, _| Some(Role::Head)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "tensor a.q_proj.bias: found shape [4], expected 2 axes of a tensor of role head"
        );
    }

    #[test]
    fn tied_weights_are_one_unit_counted_once() {
        let mut weights = store(&[("embed.weight", &[6, 2]), ("up.weight", &[3, 2]), ("norm.weight", &[2])]);
        let shared = weights.get("embed.weight").unwrap().clone();
        weights.insert("lm_head.weight", shared);
        let mut units = units(&weights, &generic_roles).unwrap();
        assert_eq!(units.len(), 2);
        assert_eq!(units[0].aliases, ["lm_head.weight"]);
        assert_eq!(total_params(&weights).unwrap(), 12 + 6 + 2);
        tie(&mut units, "embed.weight", "lm_head.weight");
        tie(&mut units, "up.weight", "down.weight");
        assert_eq!(
            (units[0].aliases.len(), units[1].aliases.as_slice()),
            (1, &["down.weight".to_string()][..])
        );
    }

    #[test]
    fn names_have_roles() {
        let square: &[usize] = &[8, 8];
        for (roles, name, shape, role) in [
            (&llama_roles as &Roles, "model.layers.0.self_attn.q_proj.weight", square, Some(Role::Linear)),
            (&llama_roles, "model.layers.0.self_attn.q_proj.bias", &[8], None),
            (&llama_roles, "model.embed_tokens.weight", square, Some(Role::Embedding)),
            (&llama_roles, "lm_head.weight", square, Some(Role::Head)),
            (&llama_roles, "model.layers.0.mlp.experts.3.up_proj.weight", square, Some(Role::Experts)),
            (&llama_roles, "model.layers.0.mlp.shared_experts.up_proj.weight", square, Some(Role::Linear)),
            (&llama_roles, "model.layers.0.mlp.gate.weight", square, Some(Role::Router)),
            (&llama_roles, "model.layers.0.mlp.gate_proj.weight", square, Some(Role::Linear)),
            (&llama_roles, "model.norm.weight", &[8], None),
            (&vision_roles, "vit.encoder.layer.0.output.dense.weight", square, Some(Role::Linear)),
            (
                &vision_roles,
                "vit.embeddings.patch_embeddings.projection.weight",
                &[8, 3, 4, 4],
                Some(Role::Conv),
            ),
            (&vision_roles, "vit.embeddings.position_embeddings", &[1, 5, 8], None),
            (
                &vision_roles,
                "swin.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table",
                square,
                None,
            ),
            (&vision_roles, "distillation_classifier.weight", square, Some(Role::Head)),
            (&vision_roles, "conv1.weight", &[8, 1, 3, 3], Some(Role::Conv)),
            (&vision_roles, "fc1.weight", square, Some(Role::Linear)),
            (&generic_roles, "h.0.attn.c_attn.weight", square, Some(Role::Linear)),
            (&generic_roles, "wte.weight", square, Some(Role::Embedding)),
            (&generic_roles, "wpe.weight", square, None),
            (&generic_roles, "stack", &[2, 8, 8], None),
            (&generic_roles, "conv1d.weight", &[8, 8, 3], Some(Role::Conv)),
            (&generic_roles, "output.weight", square, Some(Role::Head)),
            (&generic_roles, "block.output.weight", square, Some(Role::Linear)),
        ] {
            assert_eq!(roles(name, shape), role, "{name}");
        }
    }

    /// Over every tensor of the small networks, as their configurations have them.
    #[test]
    fn every_tensor_of_the_small_networks_has_its_role() {
        let classes = |count: usize| (0..count).map(|i| i.to_string()).collect::<Vec<_>>();
        let conv = ConvConfig {
            image_size: (28, 28),
            channels: 1,
            widths: vec![32, 64],
            kernel: 3,
            hidden: 128,
            dropout: (0.25, 0.5),
            classes: classes(10),
        };
        let binary = BinaryConfig {
            image_size: (28, 28),
            channels: 1,
            hidden: vec![200, 100],
            reading: Reading::Sign,
            classes: classes(10),
        };
        let roles = |shapes: Vec<(String, Vec<usize>)>| -> Vec<(String, Option<Role>)> {
            let of = |(name, shape): (String, Vec<usize>)| (vision_roles(&name, &shape), name);
            shapes.into_iter().map(of).map(|(role, name)| (name, role)).collect()
        };
        let expected = |of: &[(&str, Option<Role>)]| -> Vec<(String, Option<Role>)> {
            of.iter().map(|(name, role)| (name.to_string(), *role)).collect()
        };
        let of_conv = [
            ("conv.0.weight", Some(Role::Conv)),
            ("conv.0.bias", None),
            ("conv.1.weight", Some(Role::Conv)),
            ("conv.1.bias", None),
            ("fc.weight", Some(Role::Linear)),
            ("fc.bias", None),
            ("classifier.weight", Some(Role::Head)),
            ("classifier.bias", None),
        ];
        assert_eq!(roles(conv.shapes()), expected(&of_conv));
        let of_binary = [
            ("layers.0.weight", Some(Role::Linear)),
            ("layers.1.weight", Some(Role::Linear)),
            ("classifier.weight", Some(Role::Head)),
        ];
        assert_eq!(roles(binary.shapes()), expected(&of_binary));
    }

    #[test]
    fn fused_tensors_split_by_name() {
        let weights = store(&[
            ("a.qkv.weight", &[12, 4]),
            ("b.qkv_proj.weight", &[8, 4]),
            ("c.gate_up_proj.weight", &[10, 4]),
            ("d.dense.weight", &[12, 4]),
        ]);
        let split = split_fused(units(&weights, &generic_roles).unwrap());
        let found: Vec<_> = split.iter().map(|u| (u.key(), u.rows)).collect();
        let expected = [
            ("a.qkv.weight[0]", 4),
            ("a.qkv.weight[1]", 4),
            ("a.qkv.weight[2]", 4),
            ("b.qkv_proj.weight", 8),
            ("c.gate_up_proj.weight[0]", 5),
            ("c.gate_up_proj.weight[1]", 5),
            ("d.dense.weight", 12),
        ];
        assert_eq!(found, expected.map(|(name, rows)| (name.to_string(), rows)));
    }
}
