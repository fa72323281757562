//! The methods of adapters and their numbers, as adapter_config.json spells them (adapters.md section 2).

use serde_json::{json, Map, Value};

use super::fields::Fields;
use crate::{Error, Result};

/// The methods.
#[derive(Clone, Debug, PartialEq)]
pub enum Method {
    /// LoRA and its kin.
    Lora(LoraConfig),
    /// Shared blocks: MiSS, Bone, Bat.
    Miss(MissConfig),
}

/// `peft_type` LORA.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank.
    pub r: usize,
    /// Alpha: the scale is alpha / r, or alpha / √r under rsLoRA.
    pub alpha: f64,
    /// Dropout on the input of the branch, in training.
    pub dropout: f64,
    /// rsLoRA: the scale is alpha / √r.
    pub rslora: bool,
    /// DoRA: rows are scaled to trained magnitudes.
    pub dora: bool,
    /// `init_lora_weights`, with its JSON type.
    pub init: Value,
    /// Ranks of their own, by patterns in file order.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas of their own, by patterns in file order.
    pub alpha_pattern: Vec<(String, f64)>,
    /// `fan_in_fan_out`. What is turned is told by the module, as in PEFT; kept for the file.
    pub fan_in_fan_out: bool,
    /// Whether B has a bias.
    pub bias: bool,
}

/// `peft_type` MISS or BONE.
#[derive(Clone, Debug, PartialEq)]
pub struct MissConfig {
    /// Rank: the length of a block.
    pub r: usize,
    /// Dropout on the input of the branch, in training.
    pub dropout: f64,
    /// Columns of a mini block.
    pub mini_r: usize,
    /// The formula, `init_weights` in the file.
    pub variant: Variant,
    /// Whether the file says BONE, which PEFT 0.14 to 0.18 knew.
    pub bone: bool,
}

/// `init_weights` of MISS and BONE: the formula, and for the additive one how it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Additive, from zeros (`true`).
    Additive,
    /// Additive, from uniform numbers (`false`).
    AdditiveUniform,
    /// Block affine (`"bat"`).
    Bat,
    /// Additive and tiled along the outputs too (`"mini"`).
    Mini,
}

impl Variant {
    fn to_json(self) -> Value {
        match self {
            Variant::Additive => json!(true),
            Variant::AdditiveUniform => json!(false),
            Variant::Bat => json!("bat"),
            Variant::Mini => json!("mini"),
        }
    }
}

impl Default for LoraConfig {
    fn default() -> Self {
        LoraConfig {
            r: 8,
            alpha: 8.0,
            dropout: 0.0,
            rslora: false,
            dora: false,
            init: json!(true),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            fan_in_fan_out: false,
            bias: false,
        }
    }
}

impl Default for MissConfig {
    fn default() -> Self {
        MissConfig { r: 64, dropout: 0.0, mini_r: 1, variant: Variant::Additive, bone: false }
    }
}

impl LoraConfig {
    /// What changed the base before training started, where `init` says that something did: its name.
    pub fn moved_base(&self) -> Option<&str> {
        let init = self.init.as_str()?;
        let kinds = ["pissa", "olora", "loftq", "corda", "lora_ga"];
        kinds.iter().any(|kind| init == *kind || init.starts_with("pissa_niter_")).then_some(init)
    }

    pub(super) fn read(fields: &Fields) -> Result<Self> {
        let default = LoraConfig::default();
        for key in CHANGES_THE_MATHS {
            fields.must_be_off(key)?;
        }
        let init = fields.value("init_lora_weights").cloned().unwrap_or(default.init);
        let known = match &init {
            Value::Bool(_) => true,
            Value::String(kind) => {
                INITS.contains(&kind.as_str())
                    || kind.strip_prefix("pissa_niter_").is_some_and(|n| n.parse::<u32>().is_ok())
            }
            _ => false,
        };
        if !known {
            let expected = format!("expected true, false, or one of {}", INITS.join(", "));
            return Err(fields.error("init_lora_weights", &format!("found {init}, {expected}")));
        }
        let ranks = fields.pairs("rank_pattern")?;
        let rank =
            |(pattern, value): (String, Value)| match value.as_u64().filter(|r| *r > 0) {
                Some(r) => Ok((pattern, r as usize)),
                None => Err(fields
                    .error("rank_pattern", &format!("{pattern}: found {value}, expected a rank above 0"))),
            };
        let alphas = fields.pairs("alpha_pattern")?;
        let alpha = |(pattern, value): (String, Value)| match value.as_f64().filter(|a| a.is_finite()) {
            Some(a) => Ok((pattern, a)),
            None => {
                Err(fields.error("alpha_pattern", &format!("{pattern}: found {value}, expected a number")))
            }
        };
        Ok(LoraConfig {
            r: fields.rank("r", default.r)?,
            alpha: fields.number("lora_alpha", default.alpha)?,
            dropout: fields.dropout("lora_dropout")?,
            rslora: fields.truth("use_rslora")?,
            dora: fields.truth("use_dora")?,
            init,
            rank_pattern: ranks.into_iter().map(rank).collect::<Result<_>>()?,
            alpha_pattern: alphas.into_iter().map(alpha).collect::<Result<_>>()?,
            fan_in_fan_out: fields.truth("fan_in_fan_out")?,
            bias: fields.truth("lora_bias")?,
        })
    }

    pub(super) fn write(&self, keys: &mut Map<String, Value>) {
        let ranks: Map<String, Value> =
            self.rank_pattern.iter().map(|(pattern, r)| (pattern.clone(), json!(r))).collect();
        let alphas: Map<String, Value> =
            self.alpha_pattern.iter().map(|(pattern, a)| (pattern.clone(), number(*a))).collect();
        keys.extend([
            ("r".to_string(), json!(self.r)),
            ("lora_alpha".to_string(), number(self.alpha)),
            ("lora_dropout".to_string(), json!(self.dropout)),
            ("fan_in_fan_out".to_string(), json!(self.fan_in_fan_out)),
            ("init_lora_weights".to_string(), self.init.clone()),
            ("rank_pattern".to_string(), Value::Object(ranks)),
            ("alpha_pattern".to_string(), Value::Object(alphas)),
        ]);
        // Younger than the type itself: versions that lack them refuse the file.
        for (key, set) in [("use_rslora", self.rslora), ("use_dora", self.dora), ("lora_bias", self.bias)] {
            if set {
                keys.insert(key.to_string(), json!(true));
            }
        }
    }
}

/// What `init_lora_weights` may be beside true and false.
const INITS: [&str; 10] =
    ["gaussian", "pissa", "pissa_niter_N", "olora", "loftq", "eva", "corda", "orthogonal", "lora_ga", "mica"];

/// LORA keys that change the equations in ways that are not computed here.
pub(super) const CHANGES_THE_MATHS: [&str; 10] = [
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "arrow_config",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "velora_config",
];

/// LORA keys beside the common ones that are understood or mean nothing here.
pub(super) const LORA: [&str; 18] = [
    "r",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "loftq_config",
    "eva_config",
    "corda_config",
    "megatron_config",
    "megatron_core",
    "qalora_group_size",
    "lora_ga_config",
    "ensure_weight_tying",
];

impl MissConfig {
    pub(super) fn read(fields: &Fields, bone: bool) -> Result<Self> {
        let variant = match fields.value("init_weights") {
            None | Some(Value::Bool(true)) => Variant::Additive,
            Some(Value::Bool(false)) => Variant::AdditiveUniform,
            Some(Value::String(kind)) if kind == "bat" => Variant::Bat,
            Some(Value::String(kind)) if kind == "mini" && !bone => Variant::Mini,
            Some(other) => {
                let expected =
                    if bone { "true, false or \"bat\"" } else { "true, false, \"bat\" or \"mini\"" };
                return Err(fields.error("init_weights", &format!("found {other}, expected {expected}")));
            }
        };
        let default = MissConfig::default();
        let dropout = if bone { 0.0 } else { fields.dropout("miss_dropout")? };
        if variant == Variant::Bat && dropout > 0.0 {
            let message = format!("found {dropout}, expected 0: the block affine form has no dropout");
            return Err(fields.error("miss_dropout", &message));
        }
        let mini_r = if bone { default.mini_r } else { fields.rank("mini_r", default.mini_r)? };
        Ok(MissConfig { r: fields.rank("r", default.r)?, dropout, mini_r, variant, bone })
    }

    pub(super) fn write(&self, keys: &mut Map<String, Value>) -> Result<()> {
        keys.insert("r".into(), json!(self.r));
        keys.insert("init_weights".into(), self.variant.to_json());
        if !self.bone {
            keys.insert("miss_dropout".into(), json!(self.dropout));
            keys.insert("mini_r".into(), json!(self.mini_r));
            return Ok(());
        }
        if self.variant == Variant::Mini || self.dropout > 0.0 {
            let what = if self.variant == Variant::Mini { "mini" } else { "dropout" };
            return Err(Error::usage(format!("peft_type BONE has no {what}: write MISS (--peft-type miss)")));
        }
        Ok(())
    }
}

/// A whole number without a fraction, as Python writes an int.
fn number(value: f64) -> Value {
    match value.fract() == 0.0 && value.abs() < 1e15 {
        true => json!(value as i64),
        false => json!(value),
    }
}
