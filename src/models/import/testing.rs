//! What the tests of the import share: a small ViT in every spelling, written to a folder.

use super::super::vision::VisionConfig;
use super::super::vit_config::VitConfig;
use super::{import_model, Imported, Want};
use crate::error::Result;
use crate::weights::checkpoint::save;
use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

pub type Named = Vec<(String, Tensor)>;

pub fn config(distilled: bool) -> VitConfig {
    VitConfig {
        image_size: (8, 4),
        patch_size: 2,
        channels: 3,
        hidden: 6,
        layers: 2,
        heads: 3,
        mlp: 5,
        eps: 1e-6,
        qkv_bias: true,
        distilled,
        two_heads: distilled,
        classes: ["cat", "dog", "cow"].map(String::from).to_vec(),
    }
}

/// Every element of every tensor has a value of its own.
pub fn weights(config: &VitConfig) -> Vec<(String, Tensor)> {
    let mut next = 0u32;
    let mut of = |shape: Vec<usize>| {
        let n = shape.iter().product::<usize>() as u32;
        let values: Vec<f32> = (next..next + n).map(|v| v as f32 / 1024.0).collect();
        next += n;
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    config.shapes().into_iter().map(|(name, shape)| (name, of(shape))).collect()
}

/// A folder with these tensors and this configuration.
pub fn folder(tensors: &[(String, Tensor)], config: Option<&Value>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    save(&dir.path().join("model.safetensors"), tensors, &BTreeMap::new()).unwrap();
    if let Some(config) = config {
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    }
    dir
}

pub fn import_from(dir: &Path, want: &Want, device: &Device) -> Result<Imported<VitConfig>> {
    Ok(import_model(dir, want, device)?.map(|config| match config {
        VisionConfig::Vit(vit) => vit,
        other => panic!("found {other:?}, expected a ViT"),
    }))
}

pub fn import(dir: &tempfile::TempDir, want: &Want) -> Result<Imported<VitConfig>> {
    import_from(dir.path(), want, &Device::Cpu)
}

pub fn rename(tensors: &[(String, Tensor)], rules: &[(&str, &str)]) -> Vec<(String, Tensor)> {
    let new = |name: &str| rules.iter().fold(name.to_string(), |n, (from, to)| n.replace(from, to));
    tensors.iter().map(|(name, tensor)| (new(name), tensor.clone())).collect()
}

pub const NEWER: [(&str, &str); 8] = [
    (".encoder.layer.", ".layers."),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("", ""),
];

/// Query, key and value stacked by hand under the query's name.
pub fn fused(tensors: &[(String, Tensor)]) -> Named {
    let by_name: HashMap<&str, &Tensor> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let mut out = Vec::new();
    for (name, tensor) in tensors {
        if name.contains(".query.") {
            let part = |p: &str| by_name[name.replace("query", p).as_str()].clone();
            let fused = Tensor::cat(&[part("query"), part("key"), part("value")], 0).unwrap();
            out.push((name.clone(), fused));
        } else if !name.contains(".key.") && !name.contains(".value.") {
            out.push((name.clone(), tensor.clone()));
        }
    }
    out
}

/// timm's spelling.
pub fn timm(tensors: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
    let rules = [
        ("deit.embeddings.distillation_token", "dist_token"),
        ("deit.", "vit."),
        ("vit.embeddings.cls_token", "cls_token"),
        ("vit.embeddings.position_embeddings", "pos_embed"),
        ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("vit.encoder.layer.", "blocks."),
        ("attention.attention.query", "attn.qkv"),
        ("attention.output.dense", "attn.proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("vit.layernorm", "norm"),
        ("distillation_classifier", "head_dist"),
        ("cls_classifier", "head"),
        ("classifier", "head"),
    ];
    rename(&fused(tensors), &rules)
}

pub fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
pub fn same(imported: &Imported<VitConfig>, expected: &[(String, Tensor)]) {
    let names: Vec<&String> = imported.tensors.keys().collect();
    assert_eq!(names, expected.iter().map(|(n, _)| n).collect::<Vec<_>>());
    for (name, tensor) in expected {
        let found = &imported.tensors[name];
        assert_eq!((found.dims(), found.dtype()), (tensor.dims(), DType::F32), "{name}");
        assert_eq!(values(found), values(tensor), "{name}");
    }
}
