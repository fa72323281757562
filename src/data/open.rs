//! From a path to a data set: recognises the format, brings two splits under one list of classes.

use super::files::{is_archive, Files};
use super::folder::interleave;
use super::{cifar, encoded, folder, glyphs, idx, DataConfig, Dataset, Source, View};
use crate::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a user should know, one line each.
pub(super) struct Notes {
    /// Whether what is left out is an error.
    pub strict: bool,
    pub lines: Vec<String>,
}

impl Notes {
    pub fn new(strict: bool) -> Self {
        Notes { strict, lines: Vec::new() }
    }

    pub fn say(&mut self, line: String) {
        self.lines.push(line);
    }

    /// Says that something of `path` is not used, or errs where that is not wanted.
    pub fn leave_out(&mut self, path: &Path, what: String) -> Result<()> {
        if self.strict {
            return Err(Error::input(path, what));
        }
        self.lines.push(format!("{}: {what}", path.display()));
        Ok(())
    }
}

/// One split as it was found, under class names of its own.
pub(super) struct Part {
    path: PathBuf,
    classes: Vec<String>,
    content: Content,
}

enum Content {
    Ready(Arc<dyn Source>),
    /// Image files by class, not looked into yet.
    Encoded(Arc<Files>, Vec<Vec<u32>>),
}

/// The splits of one path.
struct Found {
    train: Option<Part>,
    eval: Option<Part>,
}

impl Part {
    /// A split that is in memory; `path` is the file to blame for its labels.
    pub fn ready(path: PathBuf, classes: Vec<String>, source: Arc<dyn Source>) -> Self {
        Part { path, classes, content: Content::Ready(source) }
    }

    /// A split of image files: `by_class` holds indices into `files`, none of its lists empty.
    pub fn encoded(path: PathBuf, classes: Vec<String>, files: Arc<Files>, by_class: Vec<Vec<u32>>) -> Self {
        Part { path, classes, content: Content::Encoded(files, by_class) }
    }

    /// Errs where all images are of one class.
    fn check_classes(&self) -> Result<()> {
        let first = match &self.content {
            Content::Encoded(_, by_class) if by_class.len() < 2 => 0,
            Content::Ready(source) if (1..source.len()).all(|i| source.label(i) == source.label(0)) => {
                source.label(0) as usize
            }
            _ => return Ok(()),
        };
        Err(Error::input(&self.path, format!("only one class: {}", self.classes[first])))
    }

    /// Splits the last tenth off: of each class where the order is by class, else of all.
    fn hold_out(self, notes: &mut Notes) -> Result<(Part, Part)> {
        let tenth = |n: usize| if n < 2 { 0 } else { (n / 10).max(1) };
        let (path, classes) = (self.path, self.classes);
        let (of, rest, held) = match self.content {
            Content::Encoded(files, mut rest) => {
                let held: Vec<Vec<u32>> =
                    rest.iter_mut().map(|items| items.split_off(items.len() - tenth(items.len()))).collect();
                if held.iter().all(Vec::is_empty) {
                    return Err(Error::input(path, "one image a class: none can be held out to evaluate on"));
                }
                (" of each class", Content::Encoded(files.clone(), rest), Content::Encoded(files, held))
            }
            Content::Ready(source) => {
                if source.len() < 2 {
                    return Err(Error::input(path, "one image: none can be held out to evaluate on"));
                }
                let first = (source.len() - tenth(source.len())) as u32;
                let view = |range: std::ops::Range<u32>| -> Content {
                    let view = View { inner: source.clone(), indices: range.collect(), relabel: None };
                    Content::Ready(Arc::new(view))
                };
                ("", view(0..first), view(first..source.len() as u32))
            }
        };
        notes.say(format!("{}: no test split, the last tenth{of} is held out", path.display()));
        let (path2, classes2) = (path.clone(), classes.clone());
        Ok((Part { path, classes, content: rest }, Part { path: path2, classes: classes2, content: held }))
    }

    /// The first `limit` images, under labels that index into `classes`.
    fn into_source(
        self,
        classes: &[String],
        limit: Option<usize>,
        room: &mut usize,
        notes: &mut Notes,
    ) -> Result<Arc<dyn Source>> {
        let map: Vec<Option<u32>> = self
            .classes
            .iter()
            .map(|name| classes.iter().position(|c| c == name).map(|i| i as u32))
            .collect();
        let stranger = |name: String, class: &str| {
            let message = format!(
                "{name} is of class `{class}`, not among the training split's {} classes",
                classes.len()
            );
            Error::input(&self.path, message)
        };
        match &self.content {
            Content::Encoded(files, by_class) => {
                let mut entries = interleave(by_class);
                for (file, label) in &mut entries {
                    let name = || files.names()[*file as usize].clone();
                    let own = *label as usize;
                    *label = map[own].ok_or_else(|| stranger(name(), &self.classes[own]))?;
                }
                encoded::open(&self.path, files.clone(), entries, limit, room, notes)
            }
            Content::Ready(source) => {
                let len = limit.unwrap_or(usize::MAX).min(source.len());
                for i in 0..len {
                    let own = source.label(i) as usize;
                    if map[own].is_none() {
                        return Err(stranger(source.name(i), &self.classes[own]));
                    }
                }
                let same = map.iter().enumerate().all(|(i, m)| *m == Some(i as u32));
                if same && len == source.len() {
                    return Ok(source.clone());
                }
                // A class that no image has needs no label.
                let relabel = (!same).then(|| map.iter().map(|m| m.unwrap_or(0)).collect());
                Ok(Arc::new(View { inner: source.clone(), indices: (0..len as u32).collect(), relabel }))
            }
        }
    }
}

/// Recognises what lies at `path`.
fn find(path: &Path, notes: &mut Notes) -> Result<Found> {
    let files = Arc::new(Files::open(path)?);
    for line in &files.left_out {
        notes.leave_out(path, line.clone())?;
    }
    if idx::is_here(&files) {
        let (train, eval) = idx::open(&files)?;
        return Ok(Found { train, eval });
    }
    if cifar::is_here(&files) {
        let (train, eval) = cifar::open(&files, notes)?;
        return Ok(Found { train, eval });
    }
    if let Some((train, eval)) = folder::open(&files, notes)? {
        if train.is_none() && eval.is_none() {
            return Err(Error::input(path, "no images in class folders: expected <class>/*.jpg or *.png"));
        }
        return Ok(Found { train, eval });
    }
    if path.is_dir() {
        if let Some(found) = find_archives(&files, notes)? {
            return Ok(found);
        }
    }
    let mend = match cifar::is_pickled(&files) {
        true => "these are CIFAR-10's pickled batches: the binary version (data_batch_1.bin) is read",
        false => {
            "expected IDX files (train-images-idx3-ubyte), CIFAR-10 batches (data_batch_1.bin), \
                  folders of .jpg or .png images by class, or one archive of them"
        }
    };
    Err(Error::input(path, format!("no images found; {mend}")))
}

/// Opens the one archive of a folder, or its pair of archives named after the splits.
fn find_archives(files: &Files, notes: &mut Notes) -> Result<Option<Found>> {
    let archives: Vec<&str> =
        files.names().iter().map(String::as_str).filter(|n| is_archive(n) && !n.contains('/')).collect();
    let folder = &files.path;
    if let [only] = archives[..] {
        notes.say(format!("{}: its one archive {only} is used", folder.display()));
        return find(&folder.join(only), notes).map(Some);
    }
    let named = |word: &str| {
        let mut with = archives.iter().filter(|n| n.to_ascii_lowercase().contains(word));
        with.next().filter(|_| with.next().is_none())
    };
    let eval = ["val", "test"].iter().find_map(|word| named(word));
    let (Some(train), Some(eval)) = (named("train"), eval) else { return Ok(None) };
    if train == eval {
        return Ok(None);
    }
    notes.say(format!("{}: {train} is trained on, {eval} evaluated", folder.display()));
    let (first, second) = (find(&folder.join(train), notes)?, find(&folder.join(eval), notes)?);
    Ok(Some(Found { train: first.train.or(first.eval), eval: second.eval.or(second.train) }))
}

impl DataConfig {
    /// Opens the images at `path`, or the built-in glyphs without one; only those use `seed`.
    ///
    /// Without a test split and without `eval_path` the last tenth is held out; with nothing but a
    /// test split the training set is empty. Errs where a limit is 0, where nothing is recognised,
    /// where a file is damaged, where there are fewer than two classes to train on, and where the
    /// evaluation set has a class that the training set lacks.
    pub fn open(&self, seed: u64) -> Result<Dataset> {
        for (key, limit) in [("limit_train", self.limit_train), ("limit_eval", self.limit_eval)] {
            if limit == Some(0) {
                return Err(Error::usage(format!("{key} is 0, expected at least 1")));
            }
        }
        let Some(path) = &self.path else {
            if let Some(eval) = &self.eval_path {
                let message = format!("eval_path is {}, but there is no path to train on", eval.display());
                return Err(Error::usage(message));
            }
            return glyphs::open(&self.glyphs, self.limit_train, self.limit_eval, seed);
        };
        let mut notes = Notes::new(self.strict);
        let found = find(path, &mut notes)?;
        let (train, eval) = match (&self.eval_path, found) {
            (Some(eval_path), Found { train, eval }) => {
                if train.is_none() {
                    notes.say(format!("{}: its test split is trained on", path.display()));
                }
                let other = find(eval_path, &mut notes)?;
                (train.or(eval), other.eval.or(other.train))
            }
            (None, Found { train: Some(train), eval: None }) => {
                let (rest, held) = train.hold_out(&mut notes)?;
                (Some(rest), Some(held))
            }
            (None, Found { train, eval }) => (train, eval),
        };
        let Some(eval) = eval else {
            return Err(Error::input(path, "no images to evaluate on"));
        };
        let mut room = encoded::MOST_KEPT;
        let classes = train.as_ref().map_or(&eval.classes, |t| &t.classes).clone();
        let train = match train {
            Some(train) => {
                train.check_classes()?;
                Some(train.into_source(&classes, self.limit_train, &mut room, &mut notes)?)
            }
            None => {
                notes.say(format!("{}: only a test split, nothing to train on", path.display()));
                None
            }
        };
        let eval = eval.into_source(&classes, self.limit_eval, &mut room, &mut notes)?;
        let train = train
            .unwrap_or_else(|| Arc::new(View { inner: eval.clone(), indices: Vec::new(), relabel: None }));
        Ok(Dataset { train, eval, classes, name: short_name(path), notes: notes.lines })
    }
}

/// The last part of a path, without an archive's endings.
fn short_name(path: &Path) -> String {
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let name = whole.file_name().unwrap_or(whole.as_os_str()).to_string_lossy().into_owned();
    let ending = [".tar.gz", ".tgz", ".tar"].iter().find(|end| name.to_ascii_lowercase().ends_with(*end));
    ending.map_or(name.clone(), |end| name[..name.len() - end.len()].to_string())
}
