//! How published Swins name their tensors, and the one spelling that qtune uses: that of
//! `SwinForImageClassification` before transformers 5, without its `swin.` prefix.
//!
//! | canonical, under `encoder.layers.S.blocks.B` | transformers 5 | timm, under `layers.S.blocks.B` | torchvision, under `features.{2S+1}.B` |
//! | --- | --- | --- | --- |
//! | `attention.self.{query,key,value}` | `attention.{q,k,v}_proj` | `attn.qkv`, rows in this order | the same |
//! | `attention.self.relative_position_bias_table` | `attention.relative_position_bias.…` | `attn.…` | the same |
//! | `attention.output.dense` | `attention.o_proj` | `attn.proj` | the same |
//! | `intermediate.dense`, `output.dense` | `mlp.fc1`, `mlp.fc2` | `mlp.fc1`, `mlp.fc2` | `mlp.0`, `mlp.3` |
//! | `layernorm_before`, `layernorm_after` | the same | `norm1`, `norm2` | the same |
//!
//! `encoder.layers.S.downsample` is timm's `layers.S.downsample` and torchvision's `features.{2S+2}`.

use super::names::{numbered, Meaning};

/// Modules outside the blocks: canonical name, then the other spellings.
const OUTSIDE: [(&str, &[&str]); 4] = [
    ("embeddings.patch_embeddings.projection", &["patch_embed.proj", "features.0.0"]),
    ("embeddings.norm", &["patch_embed.norm", "features.0.2"]),
    ("layernorm", &["norm"]),
    ("classifier", &["head", "head.fc"]),
];

/// Modules inside a block: canonical, transformers 5, timm, torchvision.
const BLOCK: [[&str; 4]; 8] = [
    ["attention.self.query", "attention.q_proj", "", ""],
    ["attention.self.key", "attention.k_proj", "", ""],
    ["attention.self.value", "attention.v_proj", "", ""],
    ["attention.output.dense", "attention.o_proj", "attn.proj", "attn.proj"],
    ["intermediate.dense", "mlp.fc1", "mlp.fc1", "mlp.0"],
    ["output.dense", "mlp.fc2", "mlp.fc2", "mlp.3"],
    ["layernorm_before", "layernorm_before", "norm1", "norm1"],
    ["layernorm_after", "layernorm_after", "norm2", "norm2"],
];

/// The end of the names of relative position tables.
pub(super) const TABLE: &str = "relative_position_bias_table";

/// Modules that hold a relative position table.
const TABLES: [&str; 3] = ["attention.self", "attention.relative_position_bias", "attn"];

/// Numbers that follow from the sizes, which some files store with the weights.
const BUFFERS: [&str; 2] = ["relative_position_index", "attn_mask"];

/// What the tensor stored as `name` is, in any of the four spellings, with or without `swin.` before it.
pub fn meaning(name: &str) -> Meaning {
    let bare = name.strip_prefix("swin.").unwrap_or(name);
    if matches!(bare, "absolute_pos_embed" | "embeddings.position_embeddings") {
        return Meaning::Foreign;
    }
    let Some((module, leaf)) = bare.rsplit_once('.') else { return Meaning::Unused };
    if BUFFERS.contains(&leaf) {
        return Meaning::Unused;
    }
    if let Some((canonical, _)) =
        OUTSIDE.iter().find(|(own, others)| *own == module || others.contains(&module))
    {
        return match leaf {
            "weight" | "bias" => Meaning::Whole(format!("{canonical}.{leaf}")),
            _ => Meaning::Unused,
        };
    }
    if let Some((stage, rest)) =
        module.strip_prefix("encoder.layers.").or(module.strip_prefix("layers.")).and_then(numbered)
    {
        return in_stage(stage, rest, leaf);
    }
    match module.strip_prefix("features.").and_then(numbered) {
        Some((layer, rest)) if layer % 2 == 1 => match numbered(rest) {
            Some((block, part)) => in_block(layer / 2, block, part, leaf),
            None => Meaning::Foreign,
        },
        Some((layer, part)) if layer > 0 => in_merging(layer / 2 - 1, part, leaf),
        Some(_) => Meaning::Foreign,
        None => Meaning::Unused,
    }
}

fn in_stage(stage: usize, rest: &str, leaf: &str) -> Meaning {
    if let Some((block, part)) = rest.strip_prefix("blocks.").and_then(numbered) {
        return in_block(stage, block, part, leaf);
    }
    match rest.strip_prefix("downsample.") {
        Some(part) => in_merging(stage, part, leaf),
        None => Meaning::Foreign,
    }
}

fn in_merging(stage: usize, part: &str, leaf: &str) -> Meaning {
    match (part, leaf) {
        ("norm", "weight" | "bias") | ("reduction", "weight") => {
            Meaning::Whole(format!("encoder.layers.{stage}.downsample.{part}.{leaf}"))
        }
        _ => Meaning::Foreign,
    }
}

/// Within a block everything takes part in the computation, so nothing there is `Unused`.
fn in_block(stage: usize, block: usize, part: &str, leaf: &str) -> Meaning {
    let whole = |rest: &str| format!("encoder.layers.{stage}.blocks.{block}.{rest}");
    if leaf == TABLE && TABLES.contains(&part) {
        return Meaning::Whole(whole(&format!("attention.self.{TABLE}")));
    }
    if !matches!(leaf, "weight" | "bias") || part.is_empty() {
        return Meaning::Foreign;
    }
    if part == "attn.qkv" {
        return Meaning::Fused(
            ["query", "key", "value"].map(|p| whole(&format!("attention.self.{p}.{leaf}"))),
        );
    }
    match BLOCK.iter().find(|row| row.contains(&part)) {
        Some(row) => Meaning::Whole(whole(&format!("{}.{leaf}", row[0]))),
        None => Meaning::Foreign,
    }
}

/// Stage and block, where there is one, in a canonical name.
pub fn place_of(canonical: &str) -> Option<(usize, Option<usize>)> {
    let (stage, rest) = numbered(canonical.strip_prefix("encoder.layers.")?)?;
    Some((stage, rest.strip_prefix("blocks.").and_then(numbered).map(|(block, _)| block)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_spellings_mean_the_same() {
        let whole = |name: &str| Meaning::Whole(name.to_string());
        for [canonical, newer, timm, torchvision] in BLOCK {
            for leaf in ["weight", "bias"] {
                let expected = whole(&format!("encoder.layers.2.blocks.5.{canonical}.{leaf}"));
                let hf = format!("encoder.layers.2.blocks.5.{canonical}.{leaf}");
                assert_eq!(meaning(&format!("swin.{hf}")), expected);
                assert_eq!(meaning(&hf), expected);
                assert_eq!(meaning(&format!("swin.encoder.layers.2.blocks.5.{newer}.{leaf}")), expected);
                if !timm.is_empty() {
                    assert_eq!(meaning(&format!("layers.2.blocks.5.{timm}.{leaf}")), expected);
                    assert_eq!(meaning(&format!("features.5.5.{torchvision}.{leaf}")), expected);
                }
            }
        }
        let fused =
            ["query", "key", "value"].map(|p| format!("encoder.layers.3.blocks.1.attention.self.{p}.weight"));
        assert_eq!(meaning("features.7.1.attn.qkv.weight"), Meaning::Fused(fused.clone()));
        assert_eq!(meaning("layers.3.blocks.1.attn.qkv.weight"), Meaning::Fused(fused));
        for (spelled, expected) in [
            ("features.0.0.weight", "embeddings.patch_embeddings.projection.weight"),
            ("features.0.2.bias", "embeddings.norm.bias"),
            ("patch_embed.norm.bias", "embeddings.norm.bias"),
            ("features.2.reduction.weight", "encoder.layers.0.downsample.reduction.weight"),
            ("features.6.norm.bias", "encoder.layers.2.downsample.norm.bias"),
            ("layers.1.downsample.norm.weight", "encoder.layers.1.downsample.norm.weight"),
            ("norm.weight", "layernorm.weight"),
            ("swin.layernorm.weight", "layernorm.weight"),
            ("head.bias", "classifier.bias"),
            ("head.fc.bias", "classifier.bias"),
            (
                "features.1.0.attn.relative_position_bias_table",
                "encoder.layers.0.blocks.0.attention.self.relative_position_bias_table",
            ),
            (
                "swin.encoder.layers.0.blocks.0.attention.relative_position_bias.relative_position_bias_table",
                "encoder.layers.0.blocks.0.attention.self.relative_position_bias_table",
            ),
        ] {
            assert_eq!(meaning(spelled), whole(expected), "{spelled}");
        }
    }

    #[test]
    fn strangers_are_told_apart() {
        for name in [
            "swin.embeddings.position_embeddings",
            "absolute_pos_embed",
            "features.1.0.attn.logit_scale",
            "features.1.0.attn.cpb_mlp.0.weight",
            "features.2.reduction.bias",
            "swin.encoder.layers.0.blocks.0.attention.self.logit_scale",
            "features.1.weight",
            "layers.0.mixer.weight",
        ] {
            assert_eq!(meaning(name), Meaning::Foreign, "{name}");
        }
        for name in [
            "features.1.0.attn.relative_position_index",
            "layers.0.blocks.1.attn_mask",
            "swin.embeddings.mask_token",
            "decoder.0.weight",
            "weight",
            "",
        ] {
            assert_eq!(meaning(name), Meaning::Unused, "{name}");
        }
        assert_eq!(place_of("encoder.layers.3.blocks.17.output.dense.bias"), Some((3, Some(17))));
        assert_eq!(place_of("encoder.layers.1.downsample.norm.bias"), Some((1, None)));
        assert_eq!(place_of("layernorm.bias"), None);
    }
}
