//! JPEG and PNG files as a source: small sets decoded once at open, large ones when asked.

use super::decode::decode;
use super::files::Files;
use super::open::Notes;
use super::{Image, Source};
use crate::{Error, Result};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Sets of more images than this are not decoded at open.
const MOST_VERIFIED: usize = 60_000;
/// How many unreadable images are named in a note.
const NAMED: usize = 5;

/// Decoded images are kept while all sets together stay below this many bytes.
pub(super) const MOST_KEPT: usize = 1 << 30;

/// Images in files, in a fixed order.
struct Encoded {
    files: Arc<Files>,
    /// (file, label).
    entries: Vec<(u32, u32)>,
    /// What could not be read so far, by index, where that is not an error: in sets too large to look
    /// into at open the next readable image of the same class takes its place, the same one each time.
    left_out: Option<Mutex<BTreeMap<usize, String>>>,
}

/// Images decoded at open.
struct Decoded {
    names: Vec<String>,
    labels: Vec<u32>,
    images: Vec<Image>,
}

impl Source for Encoded {
    fn len(&self) -> usize {
        self.entries.len()
    }

    fn label(&self, index: usize) -> u32 {
        self.entries[index].1
    }

    fn image(&self, index: usize) -> Result<Image> {
        let (file, label) = self.entries[index];
        let (error, left_out) = match (read(&self.files, file), &self.left_out) {
            (Err(error @ Error::Input { .. }), Some(left_out)) => (error, left_out),
            (result, _) => return result,
        };
        left_out.lock().unwrap_or_else(|e| e.into_inner()).insert(index, error.to_string());
        let after = (1..self.entries.len()).map(|step| self.entries[(index + step) % self.entries.len()]);
        let same_class = after.filter(|entry| entry.1 == label);
        same_class.take(100).find_map(|(file, _)| read(&self.files, file).ok()).ok_or(error)
    }

    fn left_out(&self) -> Vec<String> {
        let left_out = self.left_out.as_ref().map(|l| l.lock().unwrap_or_else(|e| e.into_inner()));
        left_out.map(|l| l.values().cloned().collect()).unwrap_or_default()
    }

    fn name(&self, index: usize) -> String {
        self.files.names()[self.entries[index].0 as usize].clone()
    }
}

impl Source for Decoded {
    fn len(&self) -> usize {
        self.images.len()
    }

    fn label(&self, index: usize) -> u32 {
        self.labels[index]
    }

    fn image(&self, index: usize) -> Result<Image> {
        Ok(self.images[index].clone())
    }

    fn name(&self, index: usize) -> String {
        self.names[index].clone()
    }
}

fn read(files: &Files, file: u32) -> Result<Image> {
    let bytes = files.read(file as usize)?;
    decode(&bytes).map_err(|message| Error::input(files.full_name(file as usize), message))
}

/// The first `limit` readable images of `entries`, given as (file, label).
///
/// Unreadable ones are left out with a note, or with `strict` are an error; sets of more than
/// 60 000 are not looked into: there an unreadable one is replaced when it is asked for. `room` is what is left, in bytes, for decoded images to be kept.
pub(super) fn open(
    path: &Path,
    files: Arc<Files>,
    entries: Vec<(u32, u32)>,
    limit: Option<usize>,
    room: &mut usize,
    notes: &mut Notes,
) -> Result<Arc<dyn Source>> {
    let wanted = limit.unwrap_or(usize::MAX).min(entries.len());
    if wanted > MOST_VERIFIED {
        let left_out = (!notes.strict).then(Mutex::default);
        let entries = entries[..wanted].to_vec();
        return Ok(Arc::new(Encoded { files, entries, left_out }));
    }
    let kept = AtomicUsize::new(0);
    let most = *room;
    // Counts each image before it is kept, so that no more than `most` and one a thread are held.
    let attempt = |&(file, _): &(u32, u32)| -> Result<Option<Image>> {
        let image = read(&files, file)?;
        let size = image.pixels.len();
        Ok((kept.fetch_add(size, Ordering::Relaxed).saturating_add(size) <= most).then_some(image))
    };
    let (mut good, mut images) = (Vec::with_capacity(wanted), Vec::with_capacity(wanted));
    let (mut bad, mut named, mut tried) = (0, Vec::new(), 0);
    // More than one round only where unreadable images left a limit unfilled.
    while good.len() < wanted && tried < entries.len() {
        let round = &entries[tried..entries.len().min(tried + wanted - good.len())];
        tried += round.len();
        let results: Vec<Result<Option<Image>>> = round.par_iter().map(attempt).collect();
        for (entry, result) in round.iter().zip(results) {
            match result {
                Ok(image) => {
                    good.push(*entry);
                    images.extend(image);
                }
                Err(error) if notes.strict => return Err(error),
                Err(error) => {
                    bad += 1;
                    if named.len() < NAMED {
                        named.push(error.to_string());
                    }
                }
            }
        }
    }
    if good.is_empty() {
        let first = named.first().cloned().unwrap_or_default();
        return Err(Error::input(path, format!("none of its {} images can be read: {first}", entries.len())));
    }
    if bad > 0 {
        let more = if bad > named.len() { ", …" } else { "" };
        notes.say(format!("{bad} unreadable images left out: {}{more}", named.join(", ")));
    }
    if images.len() < good.len() {
        return Ok(Arc::new(Encoded { files, entries: good, left_out: None }));
    }
    *room -= kept.into_inner().min(most);
    let names = good.iter().map(|&(file, _)| files.names()[file as usize].clone()).collect();
    let labels = good.iter().map(|&(_, label)| label).collect();
    Ok(Arc::new(Decoded { names, labels, images }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::decode::png;

    /// What a set too large to look into does with an unreadable image.
    #[test]
    fn the_next_of_its_class_takes_its_place() {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..6u8 {
            let image = Image { width: 1, height: 1, channels: 1, pixels: vec![i] };
            std::fs::write(dir.path().join(format!("{i}.png")), png(&image)).unwrap();
        }
        std::fs::write(dir.path().join("4.png"), b"damaged").unwrap();
        let files = Arc::new(Files::open(dir.path()).unwrap());
        let entries: Vec<(u32, u32)> = (0..6).map(|i| (i, i % 2)).collect();
        let source = |left_out| Encoded { files: files.clone(), entries: entries.clone(), left_out };
        let lenient = source(Some(Mutex::default()));
        assert!(lenient.left_out().is_empty());
        for _ in 0..2 {
            assert_eq!(lenient.image(4).unwrap().pixels, [0]); // 5 is of the other class, 0 is next
        }
        assert_eq!(lenient.left_out().len(), 1);
        assert!(lenient.left_out()[0].contains("4.png"));
        assert!(source(None).image(4).unwrap_err().to_string().contains("4.png"));
    }

    /// With no room the set is verified and read from its files again, with the same result.
    #[test]
    fn the_same_images_whether_kept_or_not() {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..20u8 {
            let image = Image { width: 3, height: 1, channels: 1, pixels: vec![i, i, 0] };
            std::fs::write(dir.path().join(format!("{i:02}.png")), png(&image)).unwrap();
        }
        std::fs::write(dir.path().join("07.png"), b"damaged").unwrap();
        let files = Arc::new(Files::open(dir.path()).unwrap());
        let entries: Vec<(u32, u32)> = (0..20).map(|i| (i, i % 3)).collect();
        let load = |room: usize| {
            let (mut left, mut notes) = (room, Notes::new(false));
            let source =
                open(dir.path(), files.clone(), entries.clone(), None, &mut left, &mut notes).unwrap();
            assert!(notes.lines[0].starts_with("1 unreadable"), "{:?}", notes.lines);
            (source, left)
        };
        let ((kept, left), (lazy, none_left)) = (load(1000), load(56)); // 19 images of 3 bytes are 57
        assert_eq!((left, none_left), (1000 - 57, 56));
        assert_eq!((kept.len(), lazy.len()), (19, 19));
        for i in 0..19 {
            assert_eq!(kept.image(i).unwrap(), lazy.image(i).unwrap());
            assert_eq!((kept.label(i), kept.name(i)), (lazy.label(i), lazy.name(i)));
        }
        std::fs::remove_file(dir.path().join("03.png")).unwrap();
        assert!(kept.image(3).is_ok());
        assert!(lazy.image(3).unwrap_err().to_string().contains("03.png"));
    }
}
