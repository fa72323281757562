//! IDX files, the format of the MNIST family: big-endian sizes, then bytes. Plain or gzip.

use super::files::{Files, MOST_IN_MEMORY};
use super::open::Part;
use super::{Image, Source};
use crate::{Error, Result};
use flate2::read::MultiGzDecoder;
use std::io::{Cursor, Read};
use std::path::Path;
use std::sync::Arc;

const IMAGES: u32 = 0x0803; // unsigned bytes, three dimensions
const LABELS: u32 = 0x0801;

/// All images of one IDX pair, in the order of the file.
struct Idx {
    height: usize,
    width: usize,
    pixels: Vec<u8>,
    labels: Vec<u8>,
}

impl Source for Idx {
    fn len(&self) -> usize {
        self.labels.len()
    }

    fn label(&self, index: usize) -> u32 {
        u32::from(self.labels[index])
    }

    fn image(&self, index: usize) -> Result<Image> {
        let size = self.height * self.width;
        let pixels = self.pixels[index * size..(index + 1) * size].to_vec();
        Ok(Image { width: self.width, height: self.height, channels: 1, pixels })
    }

    fn name(&self, index: usize) -> String {
        format!("#{index}")
    }
}

/// Whether a listing holds any file of the MNIST family in its top folder.
pub(super) fn is_here(files: &Files) -> bool {
    ["train", "t10k"].iter().any(|s| ["images", "labels"].iter().any(|k| find(files, s, k).is_some()))
}

/// The training and the test pair; either may be missing as a whole, no pair may be half there.
pub(super) fn open(files: &Files) -> Result<(Option<Part>, Option<Part>)> {
    Ok((pair(files, "train")?, pair(files, "t10k")?))
}

fn find(files: &Files, split: &str, kind: &str) -> Option<usize> {
    let rank = if kind == "images" { 3 } else { 1 };
    let spelled = ["-", "."].map(|dot| format!("{split}-{kind}{dot}idx{rank}-ubyte"));
    spelled.iter().find_map(|name| files.find(name).or_else(|| files.find(&format!("{name}.gz"))))
}

fn pair(files: &Files, split: &str) -> Result<Option<Part>> {
    let missing = |partner: usize, kind: &str, rank: u8| {
        let message = format!("its partner {split}-{kind}-idx{rank}-ubyte[.gz] is missing");
        Err(Error::input(files.full_name(partner), message))
    };
    let (images, labels) = match (find(files, split, "images"), find(files, split, "labels")) {
        (None, None) => return Ok(None),
        (Some(images), None) => return missing(images, "labels", 1),
        (None, Some(labels)) => return missing(labels, "images", 3),
        (Some(images), Some(labels)) => (images, labels),
    };
    let (images_path, labels_path) = (files.full_name(images), files.full_name(labels));
    let (sizes, pixels) = read(&files.read(images)?, &images_path, IMAGES)?;
    let (_, labels) = read(&files.read(labels)?, &labels_path, LABELS)?;
    if sizes[0] != labels.len() {
        let message =
            format!("{} labels, but {} images in {}", labels.len(), sizes[0], images_path.display());
        return Err(Error::input(labels_path, message));
    }
    let most = labels.iter().max().copied().unwrap_or(0);
    let classes = (0..=most).map(|c| c.to_string()).collect();
    let source = Idx { height: sizes[1], width: sizes[2], pixels, labels };
    Ok(Some(Part::ready(labels_path, classes, Arc::new(source))))
}

/// The sizes and the bytes of one file; `magic` also tells the number of sizes.
fn read(bytes: &[u8], path: &Path, magic: u32) -> Result<(Vec<usize>, Vec<u8>)> {
    let bad = |message: String| Error::input(path, message);
    let gzip = bytes.starts_with(&[0x1f, 0x8b]);
    let mut reader: Box<dyn Read + '_> =
        if gzip { Box::new(MultiGzDecoder::new(bytes)) } else { Box::new(Cursor::new(bytes)) };
    let mut word = || -> Result<u32> {
        let mut word = [0; 4];
        reader.read_exact(&mut word).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => bad("truncated: it ends inside the header".to_string()),
            _ => bad(format!("damaged gzip: {e}")),
        })?;
        Ok(u32::from_be_bytes(word))
    };
    let found = word()?;
    if found != magic {
        return Err(bad(format!("found magic {found:#010x}, expected {magic:#010x}")));
    }
    let sizes = (0..magic & 0xff).map(|_| Ok(word()? as usize)).collect::<Result<Vec<_>>>()?;
    let shown = || sizes.iter().map(|s| s.to_string()).collect::<Vec<_>>().join(" x ");
    if sizes.contains(&0) {
        return Err(bad(format!("the header claims {} bytes: nothing in it", shown())));
    }
    let claimed = sizes.iter().try_fold(1u64, |a, &s| a.checked_mul(s as u64));
    let Some(claimed) = claimed.filter(|&c| c <= MOST_IN_MEMORY) else {
        let most = MOST_IN_MEMORY >> 30;
        return Err(bad(format!("the header claims {} bytes, the most that is read is {most} GiB", shown())));
    };
    // Grows with what is there; one byte more than claimed is enough to know that there is more.
    let mut content = Vec::new();
    match reader.take(claimed + 1).read_to_end(&mut content) {
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {} // too short: told below
        Err(e) => return Err(bad(format!("damaged gzip: {e}"))),
    }
    let there = content.len() as u64;
    if there < claimed {
        return Err(bad(format!("truncated: the header claims {} bytes, {there} are there", shown())));
    }
    if there > claimed {
        return Err(bad(format!("the header claims {} bytes, more are there", shown())));
    }
    Ok((sizes, content))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::data::DataConfig;
    use std::io::Write;

    /// A file with `sizes` in its header and `content` after it.
    pub fn idx(magic: u32, sizes: &[u32], content: &[u8]) -> Vec<u8> {
        let mut out = magic.to_be_bytes().to_vec();
        sizes.iter().for_each(|s| out.extend(s.to_be_bytes()));
        out.extend(content);
        out
    }

    /// A folder with 4 training images of 2 x 1 pixels and 2 test images.
    fn folder() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, bytes: Vec<u8>| std::fs::write(dir.path().join(name), bytes).unwrap();
        put("train-images-idx3-ubyte", idx(IMAGES, &[4, 1, 2], &[10, 11, 20, 21, 30, 31, 40, 41]));
        put("train-labels.idx1-ubyte", idx(LABELS, &[4], &[2, 0, 1, 2]));
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&idx(IMAGES, &[2, 1, 2], &[50, 51, 60, 61])).unwrap();
        put("t10k-images-idx3-ubyte.gz", gz.finish().unwrap());
        put("t10k-labels-idx1-ubyte", idx(LABELS, &[2], &[1, 0]));
        dir
    }

    fn open(dir: &tempfile::TempDir) -> Result<crate::data::Dataset> {
        DataConfig { path: Some(dir.path().to_path_buf()), ..Default::default() }.open(0)
    }

    /// The message after `name` was replaced by `bytes`.
    fn message(name: &str, bytes: &[u8]) -> String {
        let dir = folder();
        std::fs::write(dir.path().join(name), bytes).unwrap();
        let error = open(&dir).err().expect("this file is bad");
        assert_eq!(error.exit_code(), 4);
        let text = error.to_string();
        assert!(text.contains(name), "{text}");
        text
    }

    #[test]
    fn reads_a_pair_in_file_order() {
        let data = open(&folder()).unwrap();
        assert_eq!(data.classes, ["0", "1", "2"]);
        assert_eq!((data.train.len(), data.eval.len()), (4, 2));
        let labels: Vec<u32> = (0..4).map(|i| data.train.label(i)).collect();
        assert_eq!(labels, [2, 0, 1, 2]);
        let image = data.train.image(1).unwrap();
        assert_eq!(image, Image { width: 2, height: 1, channels: 1, pixels: vec![20, 21] });
        assert_eq!(data.eval.image(1).unwrap().pixels, [60, 61]);
        assert_eq!(data.train.name(3), "#3");
    }

    #[test]
    fn every_wrong_file_is_told() {
        let images = "train-images-idx3-ubyte";
        let magic = message(images, &idx(LABELS, &[4, 1, 2], &[0; 8]));
        assert!(magic.contains("found magic 0x00000801, expected 0x00000803"), "{magic}");
        let short = message(images, &idx(IMAGES, &[4, 1, 2], &[0; 7]));
        assert!(short.contains("claims 4 x 1 x 2 bytes, 7 are there"), "{short}");
        assert!(message(images, &idx(IMAGES, &[4, 1, 2], &[0; 9])).contains("more are there"));
        assert!(message(images, &[0, 0, 8]).contains("inside the header"));
        assert!(message(images, &idx(IMAGES, &[u32::MAX; 3], &[0; 8])).contains("the most that is read"));
        assert!(message(images, &idx(IMAGES, &[4, 0, 2], &[])).contains("nothing in it"));
        let labels = "train-labels.idx1-ubyte";
        assert!(message(labels, &idx(LABELS, &[3], &[0; 3])).contains("3 labels, but 4 images"));
        let range = message("t10k-labels-idx1-ubyte", &idx(LABELS, &[2], &[1, 7]));
        assert!(range.contains("#1") && range.contains("`7`"), "{range}");
        assert!(message("t10k-images-idx3-ubyte.gz", &[0x1f, 0x8b, 8, 0, 0]).contains("header"));
    }

    #[test]
    fn a_missing_partner_is_named() {
        let dir = folder();
        std::fs::remove_file(dir.path().join("t10k-labels-idx1-ubyte")).unwrap();
        let text = open(&dir).err().unwrap().to_string();
        assert!(text.contains("t10k-labels-idx1-ubyte[.gz] is missing"), "{text}");
    }

    #[test]
    fn one_class_is_not_enough() {
        let text = message("train-labels.idx1-ubyte", &idx(LABELS, &[4], &[0; 4]));
        assert!(text.contains("one class"), "{text}");
    }

    #[test]
    fn without_a_test_pair_the_last_tenth_is_held_out() {
        let dir = folder();
        for name in ["t10k-labels-idx1-ubyte", "t10k-images-idx3-ubyte.gz"] {
            std::fs::remove_file(dir.path().join(name)).unwrap();
        }
        let labels: Vec<u8> = (0..20).map(|i| i % 2).collect();
        std::fs::write(dir.path().join("train-labels.idx1-ubyte"), idx(LABELS, &[20], &labels)).unwrap();
        let pixels: Vec<u8> = (0..40).collect();
        std::fs::write(dir.path().join("train-images-idx3-ubyte"), idx(IMAGES, &[20, 1, 2], &pixels))
            .unwrap();
        let data = open(&dir).unwrap();
        assert_eq!((data.train.len(), data.eval.len()), (18, 2));
        assert_eq!(data.eval.image(0).unwrap().pixels, [36, 37]);
        assert!(data.notes.iter().any(|n| n.contains("last tenth")), "{:?}", data.notes);
    }
}
