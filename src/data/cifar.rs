//! CIFAR-10's binary version: records of one label and 3 planes of 32 x 32 bytes.

use super::files::Files;
use super::open::{Notes, Part};
use super::{Image, Source};
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::sync::Arc;

const SIDE: usize = 32;
const PLANE: usize = SIDE * SIDE;
const RECORD: usize = 1 + 3 * PLANE;
const BATCHES: usize = 5;
const CLASSES: usize = 10;

/// The records of some batches, in order.
struct Cifar {
    records: Vec<u8>,
}

impl Source for Cifar {
    fn len(&self) -> usize {
        self.records.len() / RECORD
    }

    fn label(&self, index: usize) -> u32 {
        u32::from(self.records[index * RECORD])
    }

    fn image(&self, index: usize) -> Result<Image> {
        let planes = &self.records[index * RECORD + 1..(index + 1) * RECORD];
        let mut pixels = Vec::with_capacity(3 * PLANE);
        for i in 0..PLANE {
            pixels.extend([planes[i], planes[PLANE + i], planes[2 * PLANE + i]]);
        }
        Ok(Image { width: SIDE, height: SIDE, channels: 3, pixels })
    }

    fn name(&self, index: usize) -> String {
        format!("#{index}")
    }
}

/// The file called `name`, in whatever folder it lies.
fn find(files: &Files, name: &str) -> Option<usize> {
    files.names().iter().position(|n| n.rsplit('/').next() == Some(name))
}

fn batch_name(number: usize) -> String {
    format!("data_batch_{number}.bin")
}

/// Whether a listing holds any batch of the binary version.
pub(super) fn is_here(files: &Files) -> bool {
    find(files, "test_batch.bin").is_some() || (1..=BATCHES).any(|n| find(files, &batch_name(n)).is_some())
}

/// Whether a listing holds the version for Python, which is pickled and not read.
pub(super) fn is_pickled(files: &Files) -> bool {
    find(files, "data_batch_1").is_some() && find(files, "batches.meta").is_some()
}

/// The training batches and the test batch; either may be missing.
pub(super) fn open(files: &Files, notes: &mut Notes) -> Result<(Option<Part>, Option<Part>)> {
    let classes = class_names(files)?;
    let found: Vec<usize> = (1..=BATCHES).filter_map(|n| find(files, &batch_name(n))).collect();
    if !found.is_empty() {
        for n in (1..=BATCHES).filter(|&n| find(files, &batch_name(n)).is_none()) {
            notes.leave_out(&files.path, format!("{} is missing", batch_name(n)))?;
        }
    }
    let test: Vec<usize> = find(files, "test_batch.bin").into_iter().collect();
    let part = |batches: &[usize]| -> Result<Option<Part>> {
        let Some(&first) = batches.first() else { return Ok(None) };
        let path = if batches.len() == 1 { files.full_name(first) } else { files.path.clone() };
        let source = Arc::new(Cifar { records: records(files, batches)? });
        Ok(Some(Part::ready(path, classes.clone(), source)))
    };
    Ok((part(&found)?, part(&test)?))
}

fn records(files: &Files, batches: &[usize]) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    for &batch in batches {
        let bytes = files.read(batch)?;
        let bad = |message: String| Error::input(files.full_name(batch), message);
        if bytes.is_empty() || bytes.len() % RECORD != 0 {
            return Err(bad(format!("{} bytes, expected a multiple of {RECORD}", bytes.len())));
        }
        let labels = bytes.chunks_exact(RECORD).map(|record| record[0]).enumerate();
        if let Some((i, label)) = labels.into_iter().find(|(_, label)| usize::from(*label) >= CLASSES) {
            return Err(bad(format!("record {i} has label {label}, expected 0 to {}", CLASSES - 1)));
        }
        all.extend_from_slice(&bytes);
    }
    Ok(all)
}

/// The names in `batches.meta.txt`, or numbers without that file.
fn class_names(files: &Files) -> Result<Vec<String>> {
    let Some(meta) = find(files, "batches.meta.txt") else {
        return Ok((0..CLASSES).map(|c| c.to_string()).collect());
    };
    let text = String::from_utf8_lossy(&files.read(meta)?).into_owned();
    let names: Vec<String> = text.lines().map(|l| l.trim().to_string()).filter(|l| !l.is_empty()).collect();
    if names.len() != CLASSES || names.iter().collect::<BTreeSet<_>>().len() != CLASSES {
        let message = format!("{} class names, expected {CLASSES} different ones", names.len());
        return Err(Error::input(files.full_name(meta), message));
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{DataConfig, Dataset};
    use std::path::Path;

    const NAMES: &str = "a\nb\nc\nd\ne\nf\ng\nh\ni\nj\n\n";

    /// A record whose planes are filled with `label`, `label + 100` and `label + 200`.
    fn record(label: u8) -> Vec<u8> {
        let mut out = vec![label];
        [0, 100, 200].iter().for_each(|add| out.extend([label + add; PLANE]));
        out
    }

    fn folder() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for n in 1..=BATCHES {
            let bytes = [record(n as u8), record(9)].concat();
            std::fs::write(dir.path().join(batch_name(n)), bytes).unwrap();
        }
        std::fs::write(dir.path().join("test_batch.bin"), record(3)).unwrap();
        std::fs::write(dir.path().join("batches.meta.txt"), NAMES).unwrap();
        dir
    }

    fn open(path: &Path) -> Result<Dataset> {
        DataConfig { path: Some(path.to_path_buf()), ..Default::default() }.open(0)
    }

    #[test]
    fn planes_become_pixels() {
        let data = open(folder().path()).unwrap();
        assert_eq!((data.train.len(), data.eval.len()), (10, 1));
        assert_eq!(data.classes[3], "d");
        let labels: Vec<u32> = (0..10).map(|i| data.train.label(i)).collect();
        assert_eq!(labels, [1, 9, 2, 9, 3, 9, 4, 9, 5, 9]);
        let image = data.train.image(2).unwrap();
        assert_eq!((image.width, image.height, image.channels), (32, 32, 3));
        assert_eq!(image.pixels[..6], [2, 102, 202, 2, 102, 202]);
    }

    #[test]
    fn archives_hold_them_too() {
        let dir = folder();
        let path = dir.path().join("cifar-10-binary.tar.gz");
        let gz = flate2::write::GzEncoder::new(std::fs::File::create(&path).unwrap(), Default::default());
        let mut tar = tar::Builder::new(gz);
        for name in (1..=BATCHES).map(batch_name).chain(["test_batch.bin".into(), "batches.meta.txt".into()])
        {
            let inside = format!("cifar-10-batches-bin/{name}");
            tar.append_path_with_name(dir.path().join(name), inside).unwrap();
        }
        tar.into_inner().unwrap().finish().unwrap();
        let data = open(&path).unwrap();
        assert_eq!((data.train.len(), data.eval.len(), data.classes[9].as_str()), (10, 1, "j"));
    }

    #[test]
    fn wrong_lengths_labels_and_names_are_told() {
        let message = |name: &str, bytes: &[u8]| {
            let dir = folder();
            std::fs::write(dir.path().join(name), bytes).unwrap();
            let error = open(dir.path()).err().expect("this file is bad");
            assert_eq!(error.exit_code(), 4);
            error.to_string()
        };
        let long = message("data_batch_2.bin", &[0; RECORD + 1]);
        assert!(long.contains("data_batch_2.bin: 3074 bytes, expected a multiple of 3073"), "{long}");
        let label = message("test_batch.bin", &[record(0), record(10)].concat());
        assert!(label.contains("record 1 has label 10"), "{label}");
        assert!(message("batches.meta.txt", b"a\nb\n").contains("2 class names"));
    }

    #[test]
    fn a_missing_batch_is_noted_or_strictly_refused() {
        let dir = folder();
        std::fs::remove_file(dir.path().join("data_batch_4.bin")).unwrap();
        let data = open(dir.path()).unwrap();
        assert_eq!(data.train.len(), 8);
        assert!(data.notes[0].contains("data_batch_4.bin"), "{:?}", data.notes);
        let strict = DataConfig { path: Some(dir.path().into()), strict: true, ..Default::default() };
        assert!(strict.open(0).err().unwrap().to_string().contains("data_batch_4.bin"));
    }
}
