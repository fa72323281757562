//! Names: PEFT's tensor names, module paths, and the checkpoint names that qtune uses throughout.
//!
//! PEFT names a tensor `base_model.model.` + module path + part, as in
//! `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`. A module path is what the model's
//! code says, a checkpoint name what its file says; they differ for ViT (adapters.md section 3):
//!
//! | checkpoint, and modules before transformers 5 | modules of transformers 5 |
//! | --- | --- |
//! | `vit.encoder.layer.N.attention.attention.{query,key,value}` | `vit.layers.N.attention.{q,k,v}_proj` |
//! | `vit.encoder.layer.N.attention.output.dense` | `vit.layers.N.attention.o_proj` |
//! | `vit.encoder.layer.N.intermediate.dense`, `….output.dense` | `vit.layers.N.mlp.fc1`, `….mlp.fc2` |
//!
//! Everything inside qtune carries checkpoint names; here is the only door.

/// What every tensor name of an adapter file begins with.
pub const PREFIX: &str = "base_model.model.";

/// The models whose blocks were renamed.
const VIT: [&str; 2] = ["vit", "deit"];

/// Modules of a block: checkpoint, transformers 5.
const BLOCK: [(&str, &str); 6] = [
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
];

/// What a tensor of an adapter file is to its module.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// `.lora_A.weight`, `[r, in]`.
    LoraA,
    /// `.lora_B.weight`, `[out, r]`.
    LoraB,
    /// `.lora_B.bias`, `[out]`.
    LoraBias,
    /// `.lora_magnitude_vector`, `[out]` (DoRA).
    Magnitude,
    /// `.lora_embedding_A`, `[r, vocab]`.
    EmbeddingA,
    /// `.lora_embedding_B`, `[dim, r]`.
    EmbeddingB,
    /// `.miss_block` or `.bone_block`.
    Block,
    /// `.base_layer.` and a tensor of the module itself: a copy of the base (`weight`) or a trained bias.
    Base(String),
    /// A tensor of the module itself: `weight`, `bias` or another.
    Own(String),
}

/// The adapter's parts with the ends of their names: as PEFT writes them, then what else is read.
const ENDS: [(Part, &[&str]); 7] = [
    (Part::LoraA, &["lora_A.weight"]),
    (Part::LoraB, &["lora_B.weight"]),
    (Part::LoraBias, &["lora_B.bias"]),
    (Part::Magnitude, &["lora_magnitude_vector", "lora_magnitude_vector.weight"]),
    (Part::EmbeddingA, &["lora_embedding_A", "lora_embedding_A.weight"]),
    (Part::EmbeddingB, &["lora_embedding_B", "lora_embedding_B.weight"]),
    (Part::Block, &["miss_block", "bone_block", "miss_block.weight", "bone_block.weight"]),
];

/// The segment that older versions put between a part and its leaf: the adapter's own name.
const DEFAULT: &str = "default";
/// The segments that it may follow.
const NAMED: [&str; 8] = [
    "lora_A",
    "lora_B",
    "lora_magnitude_vector",
    "lora_embedding_A",
    "lora_embedding_B",
    "miss_block",
    "bone_block",
    "modules_to_save",
];

impl Part {
    /// Module path and part of the tensor that an adapter file calls `name`; `None` where the name does
    /// not begin with [`PREFIX`] or ends in nothing known.
    pub fn parse(name: &str) -> Option<(String, Part)> {
        let mut segments: Vec<&str> = Vec::new();
        for segment in name.strip_prefix(PREFIX)?.split('.') {
            let named = segments.last().is_some_and(|before| NAMED.contains(before));
            if segment.is_empty() {
                return None;
            }
            if !(named && segment == DEFAULT) {
                segments.push(segment);
            }
        }
        let rest = segments.join(".");
        for (part, ends) in ENDS {
            let path = ends.iter().find_map(|end| rest.strip_suffix(end)?.strip_suffix('.'));
            if let Some(path) = path {
                return Some((path.to_string(), part));
            }
        }
        let (path, leaf) = rest.rsplit_once('.')?;
        if let Some(path) = path.strip_suffix(".base_layer") {
            return Some((path.to_string(), Part::Base(leaf.to_string())));
        }
        // Old files name the wrapper of a module that was trained whole.
        let path = path.strip_suffix(".modules_to_save").unwrap_or(path);
        Some((path.to_string(), Part::Own(leaf.to_string())))
    }

    /// The tensor's name in a file; `bone`: blocks are called as PEFT 0.14 to 0.18 did.
    pub fn name(&self, path: &str, bone: bool) -> String {
        let end = match self {
            Part::Base(leaf) => return format!("{PREFIX}{path}.base_layer.{leaf}"),
            Part::Own(leaf) => return format!("{PREFIX}{path}.{leaf}"),
            Part::Block if bone => "bone_block",
            part => ENDS.iter().find(|(p, _)| p == part).map_or("", |(_, ends)| ends[0]),
        };
        format!("{PREFIX}{path}.{end}")
    }

    /// What a rule calls the tensor beneath its weight's name.
    pub fn suffix(&self) -> Option<&'static str> {
        Some(match self {
            Part::LoraA => "lora_A",
            Part::LoraB => "lora_B",
            Part::LoraBias => "lora_bias",
            Part::Magnitude => "lora_magnitude_vector",
            Part::EmbeddingA => "lora_embedding_A",
            Part::EmbeddingB => "lora_embedding_B",
            Part::Block => "miss_block",
            Part::Base(_) | Part::Own(_) => return None,
        })
    }

    /// The part that a rule calls `suffix`.
    pub fn of_suffix(suffix: &str) -> Option<Part> {
        ENDS.iter().map(|(part, _)| part).find(|part| part.suffix() == Some(suffix)).cloned()
    }
}

/// A module path as transformers 5 spells it; others stay as they are.
pub fn newer(path: &str) -> String {
    renamed(path, ".encoder.layer.", ".layers.", |(old, new)| (old, new))
}

/// A module path as checkpoints and transformers 4 spell it; others stay as they are.
pub fn older(path: &str) -> String {
    renamed(path, ".layers.", ".encoder.layer.", |(old, new)| (new, old))
}

fn renamed(
    path: &str,
    from: &str,
    to: &str,
    turned: impl Fn((&'static str, &'static str)) -> (&'static str, &'static str),
) -> String {
    let block = VIT.iter().find_map(|model| Some((model, path.strip_prefix(model)?.strip_prefix(from)?)));
    let Some((model, block)) = block else { return path.to_string() };
    let (layer, part) = block.split_once('.').unwrap_or((block, ""));
    let part = BLOCK.into_iter().map(turned).find(|(from, _)| *from == part).map_or(part, |(_, to)| to);
    let dot = if part.is_empty() { "" } else { "." };
    format!("{model}{to}{layer}{dot}{part}")
}

/// What transformers puts before the module paths of a model that has a head; published files of some
/// models, GPT-2's among them, lack it.
const FIRST: [&str; 7] = ["model.", "vit.", "deit.", "transformer.", "gpt_neox.", "bert.", "roberta."];

/// How the module paths of an adapter relate to those of the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// The same.
    Same,
    /// The adapter was made on the model without its head: its paths lack this first segment.
    Headless(&'static str),
    /// The base is the model without its head: the adapter's paths have this first segment before them.
    Headed(&'static str),
}

impl Form {
    /// Every form, the likelier first.
    pub fn all() -> impl Iterator<Item = Form> {
        let headless = FIRST.into_iter().map(Form::Headless);
        std::iter::once(Form::Same).chain(headless).chain(FIRST.into_iter().map(Form::Headed))
    }

    /// The base's module path of the adapter's.
    pub fn to_base(self, path: &str) -> Option<String> {
        match self {
            Form::Same => Some(older(path)),
            Form::Headless(first) => Some(older(&format!("{first}{path}"))),
            Form::Headed(first) => older(path).strip_prefix(first).map(str::to_string),
        }
    }

    /// How the adapter may spell the base's module path: as transformers 5 does, and as the checkpoint
    /// does where that is another.
    pub fn spellings(self, path: &str) -> Vec<String> {
        let (new, old) = match self {
            Form::Headed(first) => (newer(&format!("{first}{path}")), format!("{first}{path}")),
            _ => (newer(path), path.to_string()),
        };
        let mut spellings = vec![new];
        if spellings[0] != old {
            spellings.push(old);
        }
        if let Form::Headless(first) = self {
            for spelling in &mut spellings {
                if let Some(bare) = spelling.strip_prefix(first) {
                    *spelling = bare.to_string();
                }
            }
        }
        spellings
    }

    /// One line where the paths are not the same.
    pub fn note(self) -> Option<String> {
        match self {
            Form::Same => None,
            Form::Headless(first) => Some(format!(
                "the adapter was made on the model without its head: {first} was put before its module paths"
            )),
            Form::Headed(first) => Some(format!(
                "the base is a model without its head: {first} was taken from the adapter's module paths"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart_and_put_together() {
        let q = "model.layers.0.self_attn.q_proj";
        for (name, path, part) in [
            ("lora_A.weight", q, Part::LoraA),
            ("lora_B.weight", q, Part::LoraB),
            ("lora_B.bias", q, Part::LoraBias),
            ("lora_magnitude_vector", q, Part::Magnitude),
            ("lora_embedding_A", q, Part::EmbeddingA),
            ("lora_embedding_B", q, Part::EmbeddingB),
            ("miss_block", q, Part::Block),
            ("base_layer.weight", q, Part::Base("weight".into())),
            ("base_layer.bias", q, Part::Base("bias".into())),
            ("bias", q, Part::Own("bias".into())),
        ] {
            let full = format!("{PREFIX}{q}.{name}");
            assert_eq!(Part::parse(&full), Some((path.to_string(), part.clone())), "{full}");
            assert_eq!(part.name(path, false), full);
            if let Some(suffix) = part.suffix() {
                assert_eq!(Part::of_suffix(suffix), Some(part));
            }
        }
        assert_eq!(Part::Block.name(q, true), format!("{PREFIX}{q}.bone_block"));
    }

    #[test]
    fn what_other_versions_wrote_is_read() {
        for (name, part) in [
            ("l.q.lora_A.default.weight", Part::LoraA),
            ("l.q.lora_magnitude_vector.default.weight", Part::Magnitude),
            ("l.q.lora_embedding_B.default", Part::EmbeddingB),
            ("l.q.bone_block", Part::Block),
            ("l.q.bone_block.default", Part::Block),
            ("l.q.modules_to_save.default.weight", Part::Own("weight".into())),
        ] {
            assert_eq!(Part::parse(&format!("{PREFIX}{name}")), Some(("l.q".to_string(), part)), "{name}");
        }
        for name in
            ["model.layers.0.q.lora_A.weight", "base_model.model.weight", "base_model.model.a..b.bias"]
        {
            assert_eq!(Part::parse(name), None, "{name}");
        }
    }

    #[test]
    fn vit_has_two_spellings_and_others_one() {
        for (old, new) in BLOCK {
            let (old, new) = (format!("vit.encoder.layer.11.{old}"), format!("vit.layers.11.{new}"));
            assert_eq!(newer(&old), new);
            assert_eq!(older(&new), old);
            assert_eq!((older(&old), newer(&new)), (old, new));
        }
        assert_eq!(newer("deit.encoder.layer.0.layernorm_after"), "deit.layers.0.layernorm_after");
        assert_eq!(older("vit.layers.3"), "vit.encoder.layer.3");
        for other in
            ["bert.encoder.layer.0.output.dense", "model.layers.0.mlp.fc1", "classifier", "vit.layernorm"]
        {
            assert_eq!((newer(other), older(other)), (other.to_string(), other.to_string()));
        }
    }

    #[test]
    fn forms_go_there_and_back() {
        let q = "vit.encoder.layer.1.attention.attention.query";
        assert_eq!(Form::Same.spellings(q), ["vit.layers.1.attention.q_proj", q]);
        assert_eq!(Form::Headless("vit.").spellings(q)[0], "layers.1.attention.q_proj");
        assert_eq!(Form::Headless("vit.").spellings("classifier"), ["classifier"]);
        assert_eq!(Form::Headed("model.").spellings("layers.0.mlp"), ["model.layers.0.mlp"]);
        for form in [Form::Same, Form::Headless("vit.")] {
            for spelled in form.spellings(q) {
                assert_eq!(form.to_base(&spelled).as_deref(), Some(q));
            }
        }
        assert_eq!(Form::Headed("model.").to_base("model.layers.0.mlp").as_deref(), Some("layers.0.mlp"));
        assert_eq!(Form::Headed("model.").to_base("lm_head"), None);
    }
}
