//! The published data sets, where they are at hand: counts, classes and order.

use super::{DataConfig, Dataset};
use std::path::{Path, PathBuf};

/// The folder of data sets: `QTUNE_DATA`, or `shared/data` beside the package.
fn folder(name: &str) -> Option<PathBuf> {
    let root = std::env::var_os("QTUNE_DATA").map(PathBuf::from);
    let root = root.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data"));
    let path = root.join(name);
    if path.is_dir() {
        return Some(path);
    }
    println!("skipped: {} is not there", path.display());
    None
}

fn open(path: PathBuf) -> Dataset {
    DataConfig { path: Some(path), strict: true, ..Default::default() }.open(0).unwrap()
}

fn counts(data: &Dataset) -> (usize, usize, usize) {
    (data.train.len(), data.eval.len(), data.classes.len())
}

#[test]
fn mnist() {
    let Some(path) = folder("mnist") else { return };
    let data = open(path);
    assert_eq!(counts(&data), (60_000, 10_000, 10));
    let first: Vec<u32> = (0..5).map(|i| data.train.label(i)).collect();
    assert_eq!(first, [5, 0, 4, 1, 9]);
    assert_eq!(data.eval.image(9_999).unwrap().pixels.len(), 784);
}

#[test]
fn cifar10() {
    let Some(path) = folder("cifar10") else { return };
    let data = open(path.clone());
    assert_eq!(counts(&data), (20_000, 10_000, 10));
    assert_eq!((data.classes[0].as_str(), data.classes[9].as_str()), ("airplane", "truck"));
    assert!((0..100).all(|i| data.train.label(i) == i as u32 % 10));
    let image = data.eval.image(5).unwrap();
    assert_eq!((image.width, image.height, image.channels), (32, 32, 3));
    assert_eq!(data.notes.len(), 1, "{:?}", data.notes);
    let pair = DataConfig {
        path: Some(path.join("cifar10-jpg-train20k.tar.gz")),
        eval_path: Some(path.join("cifar10-jpg-test10k.tar.gz")),
        limit_train: Some(30),
        limit_eval: Some(20),
        ..Default::default()
    };
    let limited = pair.open(0).unwrap();
    assert_eq!(counts(&limited), (30, 20, 10));
    assert_eq!(limited.eval.image(5).unwrap(), image);
}

#[test]
fn tiny_imagenet() {
    let Some(path) = folder("tiny-imagenet") else { return };
    let data = open(path);
    assert_eq!(counts(&data), (5_000, 500, 10));
    assert_eq!(data.classes[0], "n01443537");
    let gray = (0..5_000).filter(|&i| data.train.image(i).unwrap().channels == 1).count();
    assert!((1..200).contains(&gray), "{gray} gray images");
}

#[test]
fn hymenoptera() {
    let Some(path) = folder("hymenoptera") else { return };
    let data = open(path);
    assert_eq!(counts(&data), (80, 40, 2));
    assert_eq!((data.name.as_str(), data.classes.join(" ")), ("hymenoptera", "ants bees".to_string()));
    assert!(data.train.name(1).contains("train/bees/"));
}
