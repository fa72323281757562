//! How published ViTs name their tensors, and the one spelling that qtune uses: that of
//! `ViTForImageClassification` before transformers 5, without its `vit.` or `deit.` prefix.
//!
//! | canonical, under `encoder.layer.N` | transformers 5, under `layers.N` | timm, under `blocks.N` |
//! | --- | --- | --- |
//! | `attention.attention.{query,key,value}` | `attention.{q,k,v}_proj` | `attn.qkv`, rows in this order |
//! | `attention.output.dense` | `attention.o_proj` | `attn.proj` |
//! | `intermediate.dense`, `output.dense` | `mlp.fc1`, `mlp.fc2` | `mlp.fc1`, `mlp.fc2` |
//! | `layernorm_before`, `layernorm_after` | the same | `norm1`, `norm2` |

/// What one stored tensor is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// The tensor of this canonical name (without prefix).
    Whole(String),
    /// Query, key and value stacked in this order along the first dimension.
    Fused([String; 3]),
    /// Something this model computes with and qtune's ViT does not: leaving it out would give wrong
    /// answers without a word.
    Foreign,
    /// Something the model does without: a pooler, a mask token.
    Unused,
}

/// Modules outside the blocks: canonical name, then the other spellings.
const OUTSIDE: [(&str, &[&str]); 4] = [
    ("embeddings.patch_embeddings.projection", &["patch_embed.proj"]),
    ("layernorm", &["norm"]),
    ("classifier", &["head"]),
    ("distillation_classifier", &["head_dist"]),
];

/// Single tensors outside the blocks.
const TOKENS: [(&str, &[&str]); 3] = [
    ("embeddings.cls_token", &["cls_token"]),
    ("embeddings.distillation_token", &["dist_token"]),
    ("embeddings.position_embeddings", &["pos_embed"]),
];

/// Modules inside a block: canonical, transformers 5, timm.
const BLOCK: [(&str, &str, &str); 8] = [
    ("attention.attention.query", "attention.q_proj", ""),
    ("attention.attention.key", "attention.k_proj", ""),
    ("attention.attention.value", "attention.v_proj", ""),
    ("attention.output.dense", "attention.o_proj", "attn.proj"),
    ("intermediate.dense", "mlp.fc1", "mlp.fc1"),
    ("output.dense", "mlp.fc2", "mlp.fc2"),
    ("layernorm_before", "layernorm_before", "norm1"),
    ("layernorm_after", "layernorm_after", "norm2"),
];

/// Parts of timm's and others' ViTs that change the computation: layer scale, norms on queries and
/// keys, a norm before the blocks or after pooling, register tokens, attention pooling, relative
/// positions, gated MLPs.
const FOREIGN: [&str; 18] = [
    "ls1",
    "ls2",
    "lambda_1",
    "lambda_2",
    "gamma_1",
    "gamma_2",
    "layer_scale1",
    "layer_scale2",
    "q_norm",
    "k_norm",
    "norm_pre",
    "fc_norm",
    "reg_token",
    "register_tokens",
    "attn_pool",
    "rel_pos",
    "relative_position_bias_table",
    "fc1_g",
];

/// What the tensor stored as `name` is, in any of the three spellings, with or without `vit.` or
/// `deit.` before it.
pub fn meaning(name: &str) -> Meaning {
    let bare = name.strip_prefix("vit.").or_else(|| name.strip_prefix("deit.")).unwrap_or(name);
    if bare.split('.').any(|part| FOREIGN.contains(&part)) {
        return Meaning::Foreign;
    }
    let known = |(canonical, others): &(&str, &[&str]), found: &str| {
        (*canonical == found || others.contains(&found)).then(|| canonical.to_string())
    };
    if let Some(token) = TOKENS.iter().find_map(|row| known(row, bare)) {
        return Meaning::Whole(token);
    }
    let Some((module, leaf)) = bare.rsplit_once('.') else {
        return Meaning::Unused;
    };
    for (prefix, spelling) in
        [("encoder.layer.", Spelling::Classic), ("layers.", Spelling::Modules), ("blocks.", Spelling::Timm)]
    {
        if let Some((layer, part)) = module.strip_prefix(prefix).and_then(numbered) {
            return in_block(layer, part, leaf, spelling);
        }
    }
    if !matches!(leaf, "weight" | "bias") {
        return Meaning::Unused;
    }
    // The first of two heads keeps its name here; what it becomes alone is the configuration's word.
    if module == "cls_classifier" {
        return Meaning::Whole(bare.to_string());
    }
    match OUTSIDE.iter().find_map(|row| known(row, module)) {
        Some(module) => Meaning::Whole(format!("{module}.{leaf}")),
        None => Meaning::Unused,
    }
}

#[derive(Clone, Copy)]
enum Spelling {
    Classic,
    Modules,
    Timm,
}

/// `7.rest` as (7, rest). Not `07.rest`: two spellings of one number could hide a repeated tensor.
pub(super) fn numbered(text: &str) -> Option<(usize, &str)> {
    let (layer, rest) = text.split_once('.').unwrap_or((text, ""));
    // Far above any model, and far below where one more would overflow.
    let number: usize = layer.parse().ok().filter(|n| *n < 1 << 20)?;
    (number.to_string() == layer).then_some((number, rest))
}

/// Within a block everything takes part in the computation, so nothing there is `Unused`.
fn in_block(layer: usize, part: &str, leaf: &str, spelling: Spelling) -> Meaning {
    if !matches!(leaf, "weight" | "bias") {
        return Meaning::Foreign;
    }
    let whole = |canonical: &str| format!("encoder.layer.{layer}.{canonical}.{leaf}");
    if matches!(spelling, Spelling::Timm) && part == "attn.qkv" {
        return Meaning::Fused(["query", "key", "value"].map(|p| whole(&format!("attention.attention.{p}"))));
    }
    let row = BLOCK.iter().find(|(classic, modules, timm)| {
        part == match spelling {
            Spelling::Classic => *classic,
            Spelling::Modules => *modules,
            Spelling::Timm => *timm,
        } && !part.is_empty()
    });
    row.map_or(Meaning::Foreign, |row| Meaning::Whole(whole(row.0)))
}

/// The block number in a canonical name.
pub fn layer_of(canonical: &str) -> Option<usize> {
    canonical.strip_prefix("encoder.layer.")?.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_spellings_mean_the_same() {
        let whole = |name: &str| Meaning::Whole(name.to_string());
        for (canonical, newer, timm) in BLOCK {
            for leaf in ["weight", "bias"] {
                let expected = whole(&format!("encoder.layer.11.{canonical}.{leaf}"));
                assert_eq!(meaning(&format!("vit.encoder.layer.11.{canonical}.{leaf}")), expected);
                assert_eq!(meaning(&format!("encoder.layer.11.{canonical}.{leaf}")), expected);
                assert_eq!(meaning(&format!("deit.layers.11.{newer}.{leaf}")), expected);
                if !timm.is_empty() {
                    assert_eq!(meaning(&format!("blocks.11.{timm}.{leaf}")), expected);
                }
            }
        }
        let fused =
            ["query", "key", "value"].map(|p| format!("encoder.layer.2.attention.attention.{p}.bias"));
        assert_eq!(meaning("blocks.2.attn.qkv.bias"), Meaning::Fused(fused));
        for (spelled, expected) in [
            ("vit.embeddings.cls_token", "embeddings.cls_token"),
            ("dist_token", "embeddings.distillation_token"),
            ("pos_embed", "embeddings.position_embeddings"),
            ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight"),
            ("norm.bias", "layernorm.bias"),
            ("deit.layernorm.bias", "layernorm.bias"),
            ("head.weight", "classifier.weight"),
            ("classifier.weight", "classifier.weight"),
            ("cls_classifier.bias", "cls_classifier.bias"),
            ("head_dist.bias", "distillation_classifier.bias"),
        ] {
            assert_eq!(meaning(spelled), whole(expected), "{spelled}");
        }
    }

    #[test]
    fn strangers_are_told_apart() {
        for name in [
            "blocks.0.ls1.gamma",
            "vit.layers.0.attention.q_norm.weight",
            "norm_pre.weight",
            "fc_norm.weight",
            "reg_token",
            "blocks.0.mlp.fc3.weight",
            "layers.0.mlp.router.weight",
            "blocks.0.attn.logit_scale",
            "blocks.0.weight",
        ] {
            assert_eq!(meaning(name), Meaning::Foreign, "{name}");
        }
        for name in [
            "vit.pooler.dense.weight",
            "vit.embeddings.mask_token",
            "",
            "weight",
            "decoder.0.weight",
            "norm.gamma",
        ] {
            assert_eq!(meaning(name), Meaning::Unused, "{name}");
        }
        assert_eq!(meaning("blocks.01.norm1.weight"), Meaning::Unused);
        assert_eq!(layer_of("encoder.layer.10.output.dense.bias"), Some(10));
        assert_eq!(layer_of("layernorm.bias"), None);
    }
}
