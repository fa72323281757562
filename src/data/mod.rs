//! Labelled images: where they come from, how they become numbers, how batches reach the trainer.
//!
//! A [`Source`] gives images by index. [`DataConfig::open`] recognises the format from the path
//! itself and returns a [`Dataset`] of two sources; [`Preprocess`] turns an image into a normalised
//! plane of numbers; [`Loader`] does that on other threads, in an order that no thread can change.

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

use crate::Result;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;

pub use decode::decode_file;
pub use glyphs::Glyphs;
pub use loader::{epoch_order, Batch, Loader};
pub use preprocess::{Augment, Preprocess, Resize};
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

    fn name(&self, index: usize) -> String {
        self.inner.name(self.indices[index] as usize)
    }
}

#[cfg(test)]
mod real_files;
