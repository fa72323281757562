//! `[adapter]`: what is trained beside a frozen language model; `[base]`: how the frozen part is held.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

use crate::adapter::{self, AdapterConfig, LoraConfig, Method, MissConfig, Selection, Targets, Variant};
use crate::{Error, Result};

/// The adapters by the names of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterKind {
    /// Block affine, the form that its first paper calls Bone; PEFT's "bat".
    Bone,
    /// Additive shared blocks.
    Miss,
    /// Additive, shared along the outputs too.
    Mini,
    /// Low rank.
    Lora,
    /// Low rank, scaled by alpha over the root of the rank.
    Rslora,
    /// Low rank in direction, with magnitudes of rows beside.
    Dora,
    /// Low rank, started from the weight's principal part.
    Pissa,
}

/// The format that blocks are written in: PEFT from 0.17 on reads MISS, up to 0.18 BONE.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PeftType {
    /// `MISS`.
    #[default]
    Miss,
    /// `BONE`.
    Bone,
}

/// Modules to adapt, as PEFT's `target_modules`: a list of names or their endings, or one pattern.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Modules {
    /// A regular expression over whole paths, or `all-linear`.
    Pattern(String),
    /// Paths, or their endings from a dot on.
    List(Vec<String>),
}

impl Modules {
    fn targets(&self) -> Targets {
        match self {
            Modules::Pattern(pattern) => Targets::Pattern(pattern.clone()),
            Modules::List(list) => Targets::List(list.clone()),
        }
    }
}

/// Which biases are trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Biases {
    /// None.
    #[default]
    None,
    /// Every one of the model.
    All,
    /// Those of the adapted modules.
    Only,
}

/// `[adapter]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterSlot {
    /// The method.
    pub kind: AdapterKind,
    /// Its rank. None: 64 for blocks, 16 for the family of LoRA; of `bone` the largest divisor of every
    /// size up to 64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// Parameters in all, in place of a rank: the largest rank of `lora`, `rslora` or `pissa` with at most so
    /// many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub match_params: Option<usize>,
    /// LoRA's alpha. None: twice the rank, for `rslora` and `pissa` the rank.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Columns of a `mini` block. None: the rank.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mini_rank: Option<usize>,
    /// Dropout on the input of the branch.
    #[serde(default)]
    pub dropout: f64,
    /// How it starts: `zeros` or `uniform` for blocks, `kaiming` or `gaussian` for LoRA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<Init>,
    /// Modules to adapt.
    #[serde(default = "all_linear")]
    pub targets: Modules,
    /// Modules left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exclude: Option<Modules>,
    /// Layers to adapt. None: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<u64>>,
    /// What stands before a layer's number in a path.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers_pattern: Vec<String>,
    /// Ranks of LoRA by pattern.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<String, usize>,
    /// Alphas of LoRA by pattern.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Modules that are trained whole.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub modules_to_save: Vec<String>,
    /// Biases that are trained.
    #[serde(default)]
    pub bias: Biases,
    /// The format of blocks.
    #[serde(default)]
    pub peft_type: PeftType,
    /// Whether the exact LoRA form of additive blocks is written too.
    #[serde(default)]
    pub as_lora: bool,
}

/// How an adapter starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// Blocks of zeros.
    Zeros,
    /// Blocks of uniform numbers.
    Uniform,
    /// A of uniform numbers within one over the root of the inputs, B of zeros.
    Kaiming,
    /// A of normal numbers of deviation one over the rank, B of zeros.
    Gaussian,
}

fn all_linear() -> Modules {
    Modules::Pattern("all-linear".into())
}

/// `[base]`: the frozen weights packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseConfig {
    /// Bits per weight: 2, 3, 4 or 8.
    pub bits: u8,
    /// Weights of a row that share a step.
    #[serde(default = "sixty_four")]
    pub group_size: usize,
}

fn sixty_four() -> usize {
    64
}

impl BaseConfig {
    pub(super) fn check(self) -> Result<()> {
        if !matches!(self.bits, 2 | 3 | 4 | 8) {
            return Err(Error::usage(format!("base.bits = {}: expected 2, 3, 4 or 8", self.bits)));
        }
        if self.group_size == 0 {
            return Err(Error::usage("base.group_size = 0: expected at least 1"));
        }
        Ok(())
    }
}

impl AdapterSlot {
    /// Whether it is one of shared blocks rather than of LoRA's family.
    pub fn is_block(&self) -> bool {
        matches!(self.kind, AdapterKind::Bone | AdapterKind::Miss | AdapterKind::Mini)
    }

    /// Errs on what does not go together.
    pub(super) fn check(&self) -> Result<()> {
        let bad = |message: String| Err(Error::usage(format!("adapter.{message}")));
        if self.rank == Some(0) || self.mini_rank == Some(0) {
            return bad("rank = 0: expected at least 1".into());
        }
        if let Some(params) = self.match_params {
            if self.rank.is_some() {
                return bad("rank and adapter.match_params: expected one of them".into());
            }
            if !matches!(self.kind, AdapterKind::Lora | AdapterKind::Rslora | AdapterKind::Pissa) {
                let kind = self.kind;
                return bad(format!(
                    "match_params = {params}: of lora, rslora and pissa, not of kind {kind:?}"
                ));
            }
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return bad(format!("dropout = {}: expected 0 or more and less than 1", self.dropout));
        }
        if self.dropout > 0.0 && self.kind == AdapterKind::Bone {
            return bad(format!("dropout = {}: block affine adapters have none", self.dropout));
        }
        if self.mini_rank.is_some() && self.kind != AdapterKind::Mini {
            return bad("mini_rank: only kind mini has one".into());
        }
        if self.is_block() {
            if self.alpha.is_some() || !self.rank_pattern.is_empty() || !self.alpha_pattern.is_empty() {
                return bad("alpha, rank_pattern, alpha_pattern: shared blocks have none".into());
            }
            if self.peft_type == PeftType::Bone && (self.kind == AdapterKind::Mini || self.dropout > 0.0) {
                return bad("peft_type = \"bone\": that format has neither mini blocks nor dropout".into());
            }
            if self.as_lora && self.kind == AdapterKind::Bone {
                return bad("as_lora: a block affine change has full rank, merge it instead".into());
            }
        } else if self.alpha.is_some_and(|a| !a.is_finite() || a <= 0.0) {
            return bad(format!("alpha = {:?}: expected above 0", self.alpha));
        }
        match (self.init, self.kind) {
            (Some(Init::Zeros | Init::Uniform), AdapterKind::Miss) | (None, _) => Ok(()),
            (
                Some(Init::Kaiming | Init::Gaussian),
                AdapterKind::Lora | AdapterKind::Rslora | AdapterKind::Dora,
            ) => Ok(()),
            (Some(init), kind) => bad(format!("init = {init:?}: not for kind {kind:?}")),
        }
    }

    /// As PEFT's configuration, at rank `rank`; `base` names the model.
    pub fn peft(&self, rank: usize, base: &str) -> AdapterConfig {
        let ratio = if matches!(self.kind, AdapterKind::Rslora | AdapterKind::Pissa) { 1.0 } else { 2.0 };
        let method = match self.kind {
            AdapterKind::Bone | AdapterKind::Miss | AdapterKind::Mini => Method::Miss(MissConfig {
                r: rank,
                dropout: self.dropout,
                mini_r: if self.kind == AdapterKind::Mini { self.mini_rank.unwrap_or(rank) } else { 1 },
                variant: match (self.kind, self.init) {
                    (AdapterKind::Bone, _) => Variant::Bat,
                    (AdapterKind::Mini, _) => Variant::Mini,
                    (_, Some(Init::Uniform)) => Variant::AdditiveUniform,
                    _ => Variant::Additive,
                },
                bone: self.peft_type == PeftType::Bone,
            }),
            kind => Method::Lora(LoraConfig {
                r: rank,
                alpha: self.alpha.unwrap_or(ratio * rank as f64),
                dropout: self.dropout,
                rslora: kind == AdapterKind::Rslora,
                dora: kind == AdapterKind::Dora,
                init: match (kind, self.init) {
                    (AdapterKind::Pissa, _) => serde_json::json!("pissa"),
                    (_, Some(Init::Gaussian)) => serde_json::json!("gaussian"),
                    _ => serde_json::json!(true),
                },
                rank_pattern: self.rank_pattern.clone().into_iter().collect(),
                alpha_pattern: self.alpha_pattern.clone().into_iter().collect(),
                ..LoraConfig::default()
            }),
        };
        AdapterConfig {
            method,
            task_type: Some("CAUSAL_LM".into()),
            base: Some(base.to_string()),
            revision: None,
            auto_mapping: None,
            selection: self.selection(),
        }
    }

    /// Which modules, by PEFT's rules.
    pub fn selection(&self) -> Selection {
        Selection {
            targets: self.targets.targets(),
            exclude: self.exclude.as_ref().map(Modules::targets),
            layers_to_transform: self.layers.clone(),
            layers_pattern: self.layers_pattern.clone(),
            modules_to_save: self.modules_to_save.clone(),
            bias: match self.bias {
                Biases::None => adapter::Bias::None,
                Biases::All => adapter::Bias::All,
                Biases::Only => adapter::Bias::Only,
            },
        }
    }
}

/// A pretrained language model, or the sizes of a new one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LlamaSource {
    /// A pretrained model: a folder, or a hub name. None: the model that the program carries.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Adapters that are folded in before anything else, in this order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<PathBuf>,
    /// What frozen weights and activations are held in.
    pub dtype: Format,
    /// The sizes of a new model of random weights, in place of a pretrained one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new: Option<NewLlama>,
}

impl Default for LlamaSource {
    fn default() -> Self {
        LlamaSource { path: None, adapters: Vec::new(), dtype: Format::F32, new: None }
    }
}

/// A number format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// 32 bits.
    F32,
    /// 16 bits, 8 of them mantissa.
    Bf16,
    /// 16 bits, 11 of them mantissa.
    F16,
}

impl Format {
    /// candle's name for it.
    pub fn dtype(self) -> candle_core::DType {
        match self {
            Format::F32 => candle_core::DType::F32,
            Format::Bf16 => candle_core::DType::BF16,
            Format::F16 => candle_core::DType::F16,
        }
    }
}

/// The sizes of a new model, over the built-in byte-level tokenizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewLlama {
    /// Channels of the blocks.
    pub hidden: usize,
    /// Channels inside the MLP.
    pub mlp: usize,
    /// Blocks.
    pub layers: usize,
    /// Query heads; divides `hidden`.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Tokens that it is made for.
    pub positions: usize,
}

impl NewLlama {
    pub(super) fn check(self) -> Result<()> {
        let NewLlama { hidden, mlp, layers, heads, kv_heads, positions } = self;
        if [hidden, mlp, layers, heads, kv_heads, positions].contains(&0) {
            return Err(Error::usage("model.new: found a size of 0, expected at least 1"));
        }
        if !hidden.is_multiple_of(2 * heads) || !heads.is_multiple_of(kv_heads) {
            return Err(Error::usage(format!(
                "model.new: expected hidden {hidden} to be a multiple of twice heads {heads}, and these of kv_heads \
                 {kv_heads}"
            )));
        }
        Ok(())
    }
}
