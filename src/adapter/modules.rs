//! The modules of a model, as selection rules see them: a path, a kind and a size each.
//!
//! They are read off the names and shapes of the weights, so that every model whose file can be opened
//! can be adapted and merged, whether or not qtune can run it.

use indexmap::IndexMap;
use serde_json::Value;

use super::{is_adapter, names};
use crate::weights::{Expr, Weight, Weights};
use crate::{Error, Result};

/// What a module computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A matrix product.
    Linear,
    /// A table of rows.
    Embedding,
    /// A norm: a vector of weights.
    Norm,
    /// A convolution.
    Conv,
    /// Anything else: a block that holds other modules.
    Other,
}

impl Kind {
    /// As it is called in messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Linear => "a linear layer",
            Kind::Embedding => "an embedding",
            Kind::Norm => "a norm",
            Kind::Conv => "a convolution",
            Kind::Other => "a block of modules",
        }
    }
}

/// One module.
#[derive(Clone, Debug, PartialEq)]
pub struct Module {
    /// Its path: the checkpoint name of its weight without `.weight`.
    pub path: String,
    /// What it computes.
    pub kind: Kind,
    /// Rows and columns of its matrix as a linear layer uses it: `[out, in]`, or `[vocab, dim]` of an
    /// embedding. `None` where it has none.
    pub size: Option<(usize, usize)>,
    /// Whether the file holds the matrix turned, `[in, out]` (GPT-2's Conv1D).
    pub turned: bool,
}

impl Module {
    /// The checkpoint name of its weight.
    pub fn weight(&self) -> String {
        format!("{}.weight", self.path)
    }

    /// The checkpoint name of its bias, whether or not it has one.
    pub fn bias(&self) -> String {
        format!("{}.bias", self.path)
    }
}

/// Every module of a model.
#[derive(Clone, Debug)]
pub struct Modules {
    architecture: String,
    modules: IndexMap<String, Module>,
    head: Option<String>,
    tied: Option<(String, String)>,
}

/// The last segments of the paths of embeddings: their weights look like those of linear layers.
const EMBEDDINGS: [&str; 12] = [
    "embed_tokens",
    "wte",
    "wpe",
    "embed_in",
    "word_embeddings",
    "position_embeddings",
    "token_type_embeddings",
    "embed_positions",
    "shared",
    "tok_embeddings",
    "word_embedding",
    "relative_attention_bias",
];
/// The output embeddings of causal language models.
const HEADS: [&str; 3] = ["lm_head", "embed_out", "output"];
/// GPT-2's products, whose weights are stored turned.
const TURNED: [&str; 4] = ["c_attn", "c_proj", "c_fc", "q_attn"];

fn last(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

impl Modules {
    /// The modules behind `weights`, of a model described by its config.json (`model_type`,
    /// `architectures`, `tie_word_embeddings`).
    pub fn of(config: &Value, weights: &Weights) -> Result<Self> {
        let shapes = weights.iter().map(|(name, weight)| Ok((name.to_string(), shape_of(weight)?)));
        Ok(Self::of_shapes(config, &shapes.collect::<Result<Vec<_>>>()?))
    }

    /// As [`Modules::of`], from names and shapes alone.
    pub fn of_shapes(config: &Value, shapes: &[(String, Vec<usize>)]) -> Self {
        let text = |key: &str| config.get(key).and_then(Value::as_str).unwrap_or_default().to_string();
        let architecture = text("model_type");
        let causal = config.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str);
        let causal = causal.is_some_and(|a| a.ends_with("ForCausalLM") || a.ends_with("LMHeadModel"));
        let mut modules: IndexMap<String, Module> = IndexMap::new();
        for (name, shape) in shapes {
            let Some((path, leaf)) = name.rsplit_once('.') else { continue };
            for (at, _) in path.match_indices('.') {
                let block = path[..at].to_string();
                modules.entry(block.clone()).or_insert_with(|| block_of(block));
            }
            let module = modules.entry(path.to_string()).or_insert_with(|| block_of(path.to_string()));
            if leaf != "weight" {
                continue;
            }
            module.turned = architecture == "gpt2" && TURNED.contains(&last(path)) && shape.len() == 2;
            module.kind = match shape.len() {
                0 | 1 => Kind::Norm,
                2 if EMBEDDINGS.contains(&last(path)) => Kind::Embedding,
                2 => Kind::Linear,
                _ => Kind::Conv,
            };
            module.size = match (shape.as_slice(), module.turned) {
                ([rows, cols], false) => Some((*rows, *cols)),
                ([rows, cols], true) => Some((*cols, *rows)),
                _ => None,
            };
        }
        // transformers' base class ties unless a model says otherwise, and the published files of a
        // tied model hold no weight of the head.
        let says = config.get("tie_word_embeddings").and_then(Value::as_bool);
        let mut head = HEADS.iter().find(|h| modules.contains_key(**h)).map(|h| h.to_string());
        let mut tied = None;
        if head.is_none() && causal && says != Some(false) {
            let table = modules.values().find(|m| m.kind == Kind::Embedding && is_input(&m.path));
            if let Some(table) = table.cloned() {
                let path = if architecture == "gpt_neox" { "embed_out" } else { "lm_head" };
                tied = Some((table.path, path.to_string()));
                let module = Module { path: path.into(), kind: Kind::Linear, ..table_size(table.size) };
                modules.insert(path.to_string(), module);
                head = Some(path.to_string());
            }
        }
        Modules { architecture, modules, head, tied }
    }

    /// `model_type` of the configuration, empty where it has none.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// The modules, in the order of the weights.
    pub fn iter(&self) -> impl Iterator<Item = &Module> {
        self.modules.values()
    }

    /// The module at `path`.
    pub fn get(&self, path: &str) -> Option<&Module> {
        self.modules.get(path)
    }

    /// The path of the output embedding, where there is one.
    pub fn head(&self) -> Option<&str> {
        self.head.as_deref()
    }

    /// Paths of the input and the output embedding where they are one tensor, stored as the first.
    pub fn tied(&self) -> Option<(&str, &str)> {
        self.tied.as_ref().map(|(table, head)| (table.as_str(), head.as_str()))
    }

    /// The path of the table of tokens, where there is one.
    pub fn tokens(&self) -> Option<&str> {
        let table = self.iter().find(|m| m.kind == Kind::Embedding && is_input(&m.path));
        table.map(|m| m.path.as_str())
    }

    /// A hint for messages: the path nearest to one that was asked for.
    pub(super) fn near(&self, path: &str) -> String {
        let near = crate::weights::nearest(path, self.modules.keys().map(String::as_str));
        near.map(|near| format!(" (nearest: {})", names::newer(near))).unwrap_or_default()
    }
}

fn block_of(path: String) -> Module {
    Module { path, kind: Kind::Other, size: None, turned: false }
}

fn table_size(size: Option<(usize, usize)>) -> Module {
    Module { size, ..block_of(String::new()) }
}

/// Whether an embedding is the table of tokens.
fn is_input(path: &str) -> bool {
    matches!(
        last(path),
        "embed_tokens" | "wte" | "embed_in" | "word_embeddings" | "tok_embeddings" | "shared"
    )
}

/// The shape of a weight that may carry adapters, which leave it as it is.
pub(super) fn shape_of(weight: &Weight) -> Result<Vec<usize>> {
    match weight.expr() {
        Expr::Node { transform, inputs } if is_adapter(transform.as_ref()) => match inputs.first() {
            Some(base) => shape_of(base),
            None => Err(Error::Run(format!("a rule {} without a weight", transform.kind()))),
        },
        _ => weight.shape(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    /// A two-layer Llama of width 8.
    pub fn llama(tied: bool) -> Modules {
        let config = json!({
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "tie_word_embeddings": tied,
        });
        Modules::of_shapes(&config, &llama_shapes(tied))
    }

    /// Its shapes.
    pub fn llama_shapes(tied: bool) -> Vec<(String, Vec<usize>)> {
        let mut shapes = vec![("model.embed_tokens.weight".to_string(), vec![16, 8])];
        for layer in 0..2 {
            let mut add = |name: &str, shape: &[usize]| {
                shapes.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()));
            };
            add("self_attn.q_proj", &[8, 8]);
            add("self_attn.v_proj", &[4, 8]);
            add("mlp.down_proj", &[8, 12]);
            add("input_layernorm", &[8]);
        }
        shapes.push(("model.norm.weight".to_string(), vec![8]));
        if !tied {
            shapes.push(("lm_head.weight".to_string(), vec![16, 8]));
        }
        shapes
    }

    #[test]
    fn kinds_and_sizes() {
        let modules = llama(false);
        let of = |path: &str| modules.get(path).unwrap().clone();
        assert_eq!(of("model.embed_tokens").kind, Kind::Embedding);
        assert_eq!(of("model.layers.1.mlp.down_proj").size, Some((8, 12)));
        assert_eq!(of("model.layers.1.mlp").kind, Kind::Other);
        assert_eq!(of("model.norm").kind, Kind::Norm);
        assert_eq!((modules.head(), modules.tied()), (Some("lm_head"), None));
        assert!(modules.near("model.layers.1.mlp.down").contains("nearest"));
    }

    #[test]
    fn a_tied_head_is_a_module_without_a_weight() {
        let modules = llama(true);
        assert_eq!(modules.tied(), Some(("model.embed_tokens", "lm_head")));
        assert_eq!(modules.get("lm_head").unwrap().size, Some((16, 8)));
        assert_eq!(modules.get("lm_head").unwrap().kind, Kind::Linear);
    }

    #[test]
    fn gpt2_holds_its_products_turned() {
        let shapes =
            [("h.0.attn.c_attn.weight".to_string(), vec![8, 24]), ("wte.weight".into(), vec![16, 8])];
        let modules = Modules::of_shapes(&json!({"model_type": "gpt2"}), &shapes);
        let attn = modules.get("h.0.attn.c_attn").unwrap();
        assert_eq!((attn.size, attn.turned, attn.kind), (Some((24, 8)), true, Kind::Linear));
        assert_eq!((modules.head(), modules.get("wte").unwrap().kind), (None, Kind::Embedding));
    }
}
