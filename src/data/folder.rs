//! Image folders: which folder is a split, which a class.

use super::files::{is_image, Files};
use super::open::{Notes, Part};
use crate::Result;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

const TRAIN: [&str; 2] = ["train", "training"];
/// In order of preference, where there are several.
const EVAL: [&str; 6] = ["val", "valid", "validation", "test", "testing", "eval"];

/// The training and evaluation images of a listing, or none where it holds no image at all.
///
/// Understands `train/<class>/…` with `val/<class>/…` or `test/<class>/…`, and plain `<class>/…`,
/// each also below enclosing folders; images may lie deeper below their class.
pub(super) fn open(files: &Arc<Files>, notes: &mut Notes) -> Result<Option<(Option<Part>, Option<Part>)>> {
    let images: Vec<&str> = files.names().iter().map(String::as_str).filter(|n| is_image(n)).collect();
    if images.is_empty() {
        return Ok(None);
    }
    let root = root(&images);
    let tops = split_folders(&images, &root);
    let pick = |names: &[&str]| {
        names.iter().find_map(|name| tops.iter().find(|top| top.eq_ignore_ascii_case(name))).cloned()
    };
    let (train, eval) = (pick(&TRAIN), pick(&EVAL));
    if train.is_none() && eval.is_none() {
        return Ok(Some((part(files, &root, notes)?, None)));
    }
    if let Some(eval) = &eval {
        for unused in tops.iter().filter(|t| Some(*t) != train.as_ref() && *t != eval) {
            notes.say(format!("{}: {unused}/ is not used, {eval}/ is evaluated", files.path.display()));
        }
    }
    let mut below = |top: Option<String>| match top {
        Some(top) => part(files, &format!("{root}{top}/"), notes),
        None => Ok(None),
    };
    Ok(Some((below(train)?, below(eval)?)))
}

/// The prefix below which splits or classes lie: enclosing folders are passed through.
fn root(images: &[&str]) -> String {
    let mut root = String::new();
    loop {
        if !split_folders(images, &root).is_empty() {
            return root;
        }
        let below = || images.iter().filter_map(|name| name.strip_prefix(root.as_str())?.split_once('/'));
        let tops: BTreeSet<&str> = below().map(|(top, _)| top).collect();
        let encloses = below().any(|(_, rest)| rest.contains('/'));
        match tops.first() {
            Some(top) if tops.len() == 1 && encloses => root = format!("{root}{top}/"),
            _ => return root,
        }
    }
}

/// The folders right below `root` that are named like a split and hold folders of images. The
/// second condition lets a class be called `train`: its images lie directly in it.
fn split_folders(images: &[&str], root: &str) -> BTreeSet<String> {
    let below = images.iter().filter_map(|name| name.strip_prefix(root)?.split_once('/'));
    below
        .filter(|(_, rest)| rest.contains('/'))
        .map(|(top, _)| top)
        .filter(|top| TRAIN.iter().chain(&EVAL).any(|name| top.eq_ignore_ascii_case(name)))
        .map(str::to_string)
        .collect()
}

/// The classes right below `prefix`, sorted by name, each with its images sorted by name.
fn part(files: &Arc<Files>, prefix: &str, notes: &mut Notes) -> Result<Option<Part>> {
    let mut classes: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
    let mut loose = 0;
    for (index, name) in files.names().iter().enumerate().filter(|(_, name)| is_image(name)) {
        let Some(rest) = name.strip_prefix(prefix) else { continue };
        match rest.split_once('/') {
            Some((class, _)) => classes.entry(class).or_default().push(index as u32),
            None => loose += 1,
        }
    }
    let path =
        if prefix.is_empty() { files.path.clone() } else { files.path.join(prefix.trim_end_matches('/')) };
    if loose > 0 {
        notes.leave_out(&path, format!("{loose} images outside of any class folder left out"))?;
    }
    let folders = files.folders.iter().filter_map(|name| name.strip_prefix(prefix));
    for empty in folders.filter(|f| !f.is_empty() && !f.contains('/') && !classes.contains_key(f)) {
        notes.leave_out(&path, format!("class folder {empty} holds no images and is left out"))?;
    }
    if classes.is_empty() {
        return Ok(None);
    }
    let (names, by_class) = classes.into_iter().map(|(name, images)| (name.to_string(), images)).unzip();
    Ok(Some(Part::encoded(path, names, files.clone(), by_class)))
}

/// Takes one of each class in turn until all are taken, so that the first N are balanced.
/// Returns (item, class).
pub(super) fn interleave(by_class: &[Vec<u32>]) -> Vec<(u32, u32)> {
    let rounds = by_class.iter().map(Vec::len).max().unwrap_or(0);
    let round =
        |r: usize| by_class.iter().enumerate().filter_map(move |(c, items)| Some((*items.get(r)?, c as u32)));
    (0..rounds).flat_map(round).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{decode::png, DataConfig, Dataset, Image};
    use std::path::Path;

    /// A PNG of one pixel with this value.
    fn pixel(value: u8) -> Vec<u8> {
        png(&Image { width: 1, height: 1, channels: 1, pixels: vec![value] })
    }

    fn put(dir: &Path, name: &str, bytes: &[u8]) {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    fn tree(names: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        names.iter().enumerate().for_each(|(i, name)| put(dir.path(), name, &pixel(i as u8)));
        dir
    }

    fn config(path: &Path) -> DataConfig {
        DataConfig { path: Some(path.to_path_buf()), ..Default::default() }
    }

    /// File names without folders, in the order of the source.
    fn order(source: &dyn crate::data::Source) -> Vec<String> {
        let last = |i| source.name(i).rsplit('/').next().unwrap().to_string();
        (0..source.len()).map(last).collect()
    }

    fn refused(config: &DataConfig) -> String {
        let error = config.open(0).err().expect("this set is bad");
        assert_eq!(error.exit_code(), 4, "{error}");
        error.to_string()
    }

    const TWO: [&str; 6] = [
        "train/b/1.png",
        "train/a/2.png",
        "train/a/images/3.png",
        "train/b/4.png",
        "val/a/5.png",
        "val/b/6.png",
    ];

    #[test]
    fn classes_take_turns() {
        assert_eq!(
            interleave(&[vec![1, 2, 3], vec![4], vec![5, 6]]),
            [(1, 0), (4, 1), (5, 2), (2, 0), (6, 2), (3, 0)]
        );
        let dir = tree(&TWO);
        let data = config(dir.path()).open(0).unwrap();
        assert_eq!(data.classes, ["a", "b"]);
        assert_eq!(order(&*data.train), ["2.png", "1.png", "3.png", "4.png"]);
        let labels: Vec<u32> = (0..4).map(|i| data.train.label(i)).collect();
        assert_eq!(labels, [0, 1, 0, 1]);
        assert_eq!(data.train.image(2).unwrap().pixels, [2]);
        assert_eq!(data.eval.image(1).unwrap().pixels, [5]);
        assert!(data.notes.is_empty(), "{:?}", data.notes);
        let limited = DataConfig { limit_train: Some(3), limit_eval: Some(1), ..config(dir.path()) };
        let data = limited.open(0).unwrap();
        assert_eq!(order(&*data.train), ["2.png", "1.png", "3.png"]);
        assert_eq!(data.eval.len(), 1);
        let none = DataConfig { limit_eval: Some(0), ..config(dir.path()) };
        assert_eq!(none.open(0).err().unwrap().exit_code(), 2);
    }

    #[test]
    fn enclosing_folders_are_passed_through_and_junk_is_ignored() {
        let dir =
            tree(&["x/y/Train/a/1.png", "x/y/Train/b/2.JPG", "x/y/test/a/3.png", "x/y/Train/a/._1.png"]);
        put(dir.path(), "x/y/Train/b/2.JPG", &pixel(9)); // a PNG whose name says JPEG
        put(dir.path(), "__MACOSX/x.png", b"junk");
        put(dir.path(), ".cache/a/x.png", b"junk");
        let data = config(dir.path()).open(0).unwrap();
        assert_eq!((data.train.len(), data.eval.len()), (2, 1));
        assert_eq!(data.train.image(1).unwrap().pixels, [9]);
    }

    #[test]
    fn a_class_may_be_called_train() {
        let data = config(tree(&["car/1.png", "train/2.png", "car/3.png", "train/4.png"]).path()).open(0);
        assert_eq!(data.unwrap().classes, ["car", "train"]);
    }

    #[test]
    fn without_a_split_the_last_tenth_of_each_class_is_held_out() {
        let names: Vec<String> =
            (0..30).map(|i| format!("{}/{i:02}.png", if i < 20 { "a" } else { "b" })).collect();
        let dir = tree(&names.iter().map(String::as_str).collect::<Vec<_>>());
        let data = config(dir.path()).open(0).unwrap();
        assert_eq!(order(&*data.eval), ["18.png", "29.png", "19.png"]);
        assert_eq!(data.train.len(), 27);
        assert!(data.notes[0].contains("last tenth of each class"), "{:?}", data.notes);
        let other = tree(&["b/1.png", "b/2.png"]);
        let split = DataConfig { eval_path: Some(other.path().into()), ..config(dir.path()) };
        let data = split.open(0).unwrap();
        assert_eq!((data.train.len(), data.eval.len(), data.eval.label(0)), (30, 2, 1));
    }

    #[test]
    fn a_test_split_alone_leaves_nothing_to_train_on() {
        let data: Dataset = config(tree(&["test/a/1.png", "test/b/2.png"]).path()).open(0).unwrap();
        assert_eq!((data.train.len(), data.eval.len()), (0, 2));
        assert!(data.notes[0].contains("nothing to train on"), "{:?}", data.notes);
    }

    #[test]
    fn wrong_folders_are_told() {
        let text = refused(&config(tree(&["train/a/1.png", "train/b/2.png", "val/zebra/3.png"]).path()));
        assert!(text.contains("`zebra`") && text.contains("val/zebra/3.png"), "{text}");
        assert!(refused(&config(tree(&["a/1.png", "a/2.png"]).path())).contains("only one class: a"));
        assert!(refused(&config(tree(&["a/1.txt"]).path())).contains("no images"));
        assert!(refused(&config(tree(&["1.png", "2.png"]).path())).contains("no images"));
        assert!(refused(&config(Path::new("/nowhere/at/all"))).contains("/nowhere/at/all"));
    }

    #[test]
    fn empty_classes_and_unreadable_images_are_noted_or_strictly_refused() {
        let dir = tree(&TWO);
        std::fs::create_dir(dir.path().join("train/c")).unwrap();
        let data = config(dir.path()).open(0).unwrap();
        assert_eq!(data.classes.len(), 2);
        assert!(data.notes[0].contains("class folder c"), "{:?}", data.notes);
        let strict = DataConfig { strict: true, ..config(dir.path()) };
        assert!(refused(&strict).contains("class folder c"));
        std::fs::remove_dir(dir.path().join("train/c")).unwrap();
        put(dir.path(), "train/a/2.png", b"no image");
        let data = config(dir.path()).open(0).unwrap();
        assert_eq!(order(&*data.train), ["1.png", "3.png", "4.png"]);
        assert!(
            data.notes[0].contains("1 unreadable") && data.notes[0].contains("2.png"),
            "{:?}",
            data.notes
        );
        assert!(refused(&strict).contains("2.png"));
        // A limit is filled up from further on.
        let limited = DataConfig { limit_train: Some(2), ..config(dir.path()) };
        assert_eq!(order(&*limited.open(0).unwrap().train), ["1.png", "3.png"]);
        TWO[..4].iter().for_each(|name| put(dir.path(), name, b"no image"));
        assert!(refused(&config(dir.path())).contains("none of its 4 images"));
    }
}
