//! Labelled images: where they come from, how they become numbers, how batches reach the trainer.
//!
//! A [`Source`] gives images by index. [`DataConfig::open`] recognises the format from the path
//! itself and returns a [`Dataset`] of two sources; [`Preprocess`] turns an image into a normalised
//! plane of numbers; [`Loader`] does that on other threads, in an order that no thread can change.

mod augment;
mod cifar;
mod decode;
mod encoded;
mod files;
mod folder;
mod glyphs;
mod idx;
mod loader;
mod open;
mod preprocess;
mod processor;
mod resample;
pub mod text;

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;

pub use augment::{Augment, EraseMode, RandAugment};
pub use decode::decode_file;
pub use glyphs::Glyphs;
pub use loader::{epoch_order, Batch, Loader, Training};
pub use preprocess::{Preprocess, Resize};
pub use resample::Filter;

/// A decoded image: rows from the top, pixels from the left, channels interleaved (HWC).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Columns, in pixels.
    pub width: usize,
    /// Rows, in pixels.
    pub height: usize,
    /// 1 (gray) or 3 (RGB).
    pub channels: usize,
    /// `height * width * channels` bytes, each 0 to 255.
    pub pixels: Vec<u8>,
}

/// Labelled images by index, readable from any thread.
pub trait Source: Send + Sync {
    /// How many images there are.
    fn len(&self) -> usize;
    /// The class of image `index`, below the number of classes.
    ///
    /// Like the other methods, an `index` of [`Source::len`] or more is the caller's mistake and panics.
    fn label(&self, index: usize) -> u32;
    /// Decodes image `index`; errs where its file cannot be read or decoded.
    fn image(&self, index: usize) -> Result<Image>;
    /// What to call image `index` in messages: its file name, or `#123`.
    fn name(&self, index: usize) -> String;
    /// The images that could not be read so far and were replaced, as error messages; see
    /// [`DataConfig::strict`].
    fn left_out(&self) -> Vec<String> {
        Vec::new()
    }
    /// Whether there are no images at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A training and an evaluation set over the same classes.
#[derive(Clone)]
pub struct Dataset {
    /// What to train on; empty where the path holds nothing but a test split.
    pub train: Arc<dyn Source>,
    /// What to evaluate on; never empty.
    pub eval: Arc<dyn Source>,
    /// Class names; a label is an index into them.
    pub classes: Vec<String>,
    /// What to call the data set: its file or folder name, or `glyphs`.
    pub name: String,
    /// What a user should know: what was left out, held out or chosen, one line each.
    pub notes: Vec<String>,
}

/// Which images to use; the `[data]` table of a recipe.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// A folder or archive of images, IDX files or CIFAR-10 batches; none is the built-in glyphs.
    pub path: Option<PathBuf>,
    /// A second path for the evaluation split; its test split where it has one, else all of it.
    pub eval_path: Option<PathBuf>,
    /// Use the first so many training images only.
    pub limit_train: Option<usize>,
    /// Use the first so many evaluation images only.
    pub limit_eval: Option<usize>,
    /// Whether what would be left out with a note is an error instead.
    pub strict: bool,
    /// The built-in images, where `path` is none.
    pub glyphs: Glyphs,
}

/// Some images of another source, in another order, under other labels.
struct View {
    inner: Arc<dyn Source>,
    /// The images, as indices into `inner`.
    indices: Vec<u32>,
    /// The new label of each label of `inner`.
    relabel: Option<Vec<u32>>,
}

impl Source for View {
    fn len(&self) -> usize {
        self.indices.len()
    }

    fn label(&self, index: usize) -> u32 {
        let label = self.inner.label(self.indices[index] as usize);
        self.relabel.as_ref().map_or(label, |map| map[label as usize])
    }

    fn image(&self, index: usize) -> Result<Image> {
        self.inner.image(self.indices[index] as usize)
    }

    fn left_out(&self) -> Vec<String> {
        self.inner.left_out()
    }

    fn name(&self, index: usize) -> String {
        self.inner.name(self.indices[index] as usize)
    }
}

/// How many of the training images are held out to choose settings by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum HoldOut {
    /// This share, above 0 and below 1; at least one image.
    Share(f64),
    /// This many.
    Count(usize),
}

impl Dataset {
    /// The training images alone, the last of them to evaluate on and the rest to train on: for choosing
    /// settings without a look at the evaluation set, which is left out. Image files come class by class in
    /// turn, others in the order of their file.
    ///
    /// Errs where a share is out of range, or where nothing would be left on either side.
    pub fn validated(mut self, held: HoldOut) -> Result<Self> {
        let all = self.train.len();
        let count = match held {
            HoldOut::Share(share) if !(share > 0.0 && share < 1.0) => {
                return Err(Error::usage(format!("held out: {share}, expected a share above 0 and below 1")))
            }
            HoldOut::Share(share) => ((all as f64 * share).round() as usize).max(1),
            HoldOut::Count(count) => count,
        };
        if count == 0 || count >= all {
            return Err(Error::usage(format!(
                "{}: {count} of {all} training images held out, expected 1 or more on both sides",
                self.name
            )));
        }
        let part = |range: std::ops::Range<usize>| -> Arc<dyn Source> {
            let indices = range.map(|i| i as u32).collect();
            Arc::new(View { inner: self.train.clone(), indices, relabel: None })
        };
        let (train, eval) = (part(0..all - count), part(all - count..all));
        (self.train, self.eval) = (train, eval);
        self.notes.push(format!(
            "{}: evaluated on the last {count} of {all} training images, trained on the others",
            self.name
        ));
        Ok(self)
    }

    /// The same images with the labels of a model that knows `known`: by name where every class of
    /// the data is one of the model's (case aside), else by number where the data's classes are
    /// numbered or as many as the model's, which the note then says. Anything else is an error.
    pub fn under_labels(mut self, known: &[String]) -> Result<Self> {
        let same = |a: &str, b: &str| a.eq_ignore_ascii_case(b);
        let place = |class: &String| known.iter().position(|k| same(k, class));
        let numbered = self.classes.iter().enumerate().all(|(i, class)| *class == i.to_string());
        let named: Option<Vec<u32>> = self.classes.iter().map(|c| place(c).map(|i| i as u32)).collect();
        match named {
            Some(map) if map.iter().enumerate().all(|(i, &to)| i as u32 == to) => {}
            Some(map) => {
                self.train = relabelled(self.train, &map);
                self.eval = relabelled(self.eval, &map);
            }
            None if numbered && self.classes.len() <= known.len() => {}
            None if self.classes.len() == known.len() => self.notes.push(format!(
                "{}: its class names are not the model's: matched by order, {} is taken as {}",
                self.name, self.classes[0], known[0]
            )),
            None => {
                return Err(Error::usage(format!(
                    "{}: found {} classes ({}, ...), the model knows {} ({}, ...)",
                    self.name,
                    self.classes.len(),
                    self.classes.first().map(String::as_str).unwrap_or(""),
                    known.len(),
                    known.first().map(String::as_str).unwrap_or(""),
                )))
            }
        }
        self.classes = known.to_vec();
        Ok(self)
    }
}

fn relabelled(inner: Arc<dyn Source>, map: &[u32]) -> Arc<dyn Source> {
    let indices = (0..inner.len() as u32).collect();
    Arc::new(View { inner, indices, relabel: Some(map.to_vec()) })
}

#[cfg(test)]
mod label_tests {
    use super::*;

    fn data(classes: usize) -> Dataset {
        let glyphs = Glyphs { classes, train: 40, eval: 20, ..Default::default() };
        DataConfig { glyphs, ..Default::default() }.open(0).unwrap()
    }

    #[test]
    fn labels_follow_names_then_numbers() {
        let names = |list: &[&str]| list.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        let mut own = data(3);
        own.classes = names(&["ant", "bee", "cat"]);
        let before: Vec<u32> = (0..20).map(|i| own.eval.label(i)).collect();
        let known = names(&["Cat", "dog", "bee", "ant"]);
        let by_name = own.clone().under_labels(&known).unwrap();
        let expected: Vec<u32> = before.iter().map(|&l| [3, 2, 0][l as usize]).collect();
        assert_eq!((0..20).map(|i| by_name.eval.label(i)).collect::<Vec<_>>(), expected);
        // As many classes of other names: by order, and said.
        let by_order = own.clone().under_labels(&names(&["x", "y", "z"])).unwrap();
        assert_eq!((0..20).map(|i| by_order.eval.label(i)).collect::<Vec<_>>(), before);
        assert_eq!(by_order.notes.len(), own.notes.len() + 1);
        // Fewer classes of other names: no telling which is which.
        assert!(own.clone().under_labels(&names(&["w", "x", "y", "z"])).is_err());
        own.classes = names(&["0", "1", "2"]);
        assert!(own.clone().under_labels(&names(&["w", "x", "y", "z"])).is_ok());
        assert!(own.under_labels(&names(&["w", "x"])).is_err());
    }

    #[test]
    fn validation_takes_the_last_training_images_and_leaves_the_evaluation_set_alone() {
        let own = data(3);
        for (held, count) in [(HoldOut::Share(0.25), 10), (HoldOut::Count(7), 7), (HoldOut::Share(1e-9), 1)] {
            let split = own.clone().validated(held).unwrap();
            assert_eq!((split.train.len(), split.eval.len()), (40 - count, count));
            for i in 0..count {
                assert_eq!(split.eval.image(i).unwrap(), own.train.image(40 - count + i).unwrap());
                assert_eq!(split.eval.label(i), own.train.label(40 - count + i));
            }
            assert_eq!(split.train.image(0).unwrap(), own.train.image(0).unwrap());
            let said = format!("evaluated on the last {count} of 40 training images");
            assert!(split.notes.last().unwrap().contains(&said), "{:?}", split.notes);
        }
        for held in [HoldOut::Share(1.0), HoldOut::Share(f64::NAN), HoldOut::Count(0), HoldOut::Count(40)] {
            assert_eq!(own.clone().validated(held).err().unwrap().exit_code(), 2, "{held:?}");
        }
    }
}

#[cfg(test)]
mod real_files;
