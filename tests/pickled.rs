//! PyTorch's own files, read as data: the same tensors as their conversions, and leave that must be given.

use std::path::PathBuf;
use std::process::Command;

use candle_core::Device;
use qtune::weights::{Checkpoint, Pickle};

/// A file of the test data, or none with a line that says so.
fn data(path: &str) -> Option<PathBuf> {
    let root = std::env::var("QTUNE_DATA").unwrap_or_else(|_| "../shared/data".into());
    let path = PathBuf::from(root).join("models").join(path);
    if !path.exists() {
        eprintln!("skipped: no {}", path.display());
    }
    path.exists().then_some(path)
}

fn values(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    let tensor = checkpoint.tensor(name, &Device::Cpu).unwrap_or_else(|e| panic!("{name}: {e}"));
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Every tensor of the converted model is the one that PyTorch saved, bit by bit.
#[test]
fn a_saved_model_is_its_conversion() {
    let (Some(path), Some(hf)) = (data("vit-cifar10/best_vit.pth"), data("vit-cifar10-hf")) else { return };
    let saved = Checkpoint::open_with(&path, Pickle::Allowed).unwrap();
    let converted = Checkpoint::open(&hf).unwrap();
    let rules = [
        ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("vit.embeddings.position_embeddings", "pos_embed.pos_embedding"),
        ("vit.embeddings.cls_token", "cls_token"),
        ("vit.layernorm", "norm"),
        ("vit.encoder.layer.", "transformer."),
        ("attention.output.dense", "attn.out_proj"),
        ("intermediate.dense", "mlp.0"),
        ("output.dense", "mlp.3"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("classifier", "head"),
    ];
    let mut read = 0;
    for name in converted.names() {
        let mut theirs = rules.iter().fold(name.to_string(), |n, (ours, theirs)| n.replace(ours, theirs));
        let mut third = None;
        for (i, part) in ["query", "key", "value"].iter().enumerate() {
            if let Some((block, leaf)) = theirs.clone().split_once(&format!("attention.attention.{part}.")) {
                (theirs, third) = (format!("{block}attn.in_proj_{leaf}"), Some(i));
            }
        }
        let expected = values(&converted, name);
        let mut found = values(&saved, &theirs);
        if let Some(third) = third {
            found = found[third * expected.len()..(third + 1) * expected.len()].to_vec();
        }
        assert!(found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()), "{name}");
        assert_eq!(found.len(), expected.len(), "{name}");
        read += expected.len();
    }
    assert_eq!(read, 811_146);
    let all: usize = saved.names().map(|n| saved.shape(n).unwrap().iter().product::<usize>()).sum();
    assert_eq!(all, read);
    assert_eq!(saved.notes(), [] as [String; 0]);
}

fn qtune(args: &[&str]) -> (Option<i32>, String, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_qtune")).args(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (out.status.code(), text(out.stdout), text(out.stderr))
}

#[test]
fn leave_must_be_given() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("net.pth");
    std::fs::write(&path, "PK\u{3}\u{4}, or so it says").unwrap();
    let path = path.to_str().unwrap();
    let commands: [&[&str]; 4] = [
        &["inspect", path],
        &["eval", path, "--data", "nothing"],
        &["predict", path, "nothing.png"],
        &["quantize", "--bits", "4", "--steps", "0", "--dry-run", "--model", path],
    ];
    for command in commands {
        let (code, out, said) = qtune(command);
        assert_eq!((code, out.as_str()), (Some(2), ""), "{command:?}: {said}");
        assert!(said.contains("net.pth") && said.contains("--allow-pickle"), "{command:?}: {said}");
        let (code, out, said) = qtune(&[command, &["--allow-pickle"]].concat());
        assert_eq!((code, out.as_str()), (Some(4), ""), "{command:?}: {said}");
        assert!(said.contains("net.pth") && said.contains("zip directory"), "{command:?}: {said}");
    }
}

#[test]
fn a_saved_model_can_be_looked_at() {
    let Some(path) = data("vit-mnist/vit_mnist.pth") else { return };
    let (code, out, said) = qtune(&["inspect", path.to_str().unwrap(), "--allow-pickle"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(out.contains("pos_embedding") && out.contains("213642 parameters"), "{out}");
}
