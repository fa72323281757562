//! Text for language models: from files of records, conversations or plain text to rows of tokens.
//!
//! A [`Tokenizer`] turns text into ids, a [`Template`] a conversation into text. [`TextConfig::open`]
//! reads files into two [`TextSet`]s; an [`Epoch`] of one gives [`TextBatch`]es, in which padding and
//! packed samples are told by segments, never by a token.

mod builtin;
mod pieces;
mod python;
mod records;
mod samples;
mod sets;
mod template;
mod tokenizer;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use builtin::Builtin;
pub use records::is_text;
pub use samples::{Sample, Shown};
pub use sets::{Epoch, TextBatch, TextSet, NO_TARGET};
pub use template::{Chat, Template};
pub use tokenizer::{Stream, Tokenizer};

use crate::{hub, Error, Result};
use records::{Content, Row};
use samples::Maker;

/// Which text to use and how; the `[text]` table of a recipe.
///
/// Files: JSON lines, a JSON list or Parquet of records, anything else is plain text; each may be gzip.
/// A folder has files named after its splits. Without a split of its own the last tenth is held out.
///
/// Records, by the fields of the first: `text`; `prompt` and `completion`; `question` and `answer` (a line
/// feed between them); `instruction`, `input` and `output` or `response`; `instruction` and `instances`
/// of those two; `messages` of `role` and `content`; `conversations` of `from` and `value`.
///
/// Plain text is one stream of tokens without a beginning-of-sequence token; a row is a window of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TextConfig {
    /// A file, a folder or a hub name; none is the built-in text.
    pub path: Option<PathBuf>,
    /// A second path for the evaluation split; its test split where it has one, else all of it.
    pub eval_path: Option<PathBuf>,
    /// A text that is not to be forgotten: a model that is adapted is measured on it before and after.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control: Option<PathBuf>,
    /// The built-in text, where `path` is none.
    pub builtin: Builtin,
    /// Use the first so many training records only, or rows of plain text.
    pub limit_train: Option<usize>,
    /// Use the first so many evaluation records only, or rows of plain text.
    pub limit_eval: Option<usize>,
    /// Tokens in a row; a sample beyond it is cut.
    pub seq_len: usize,
    /// Whether several samples share a row. They do not see each other.
    pub pack: bool,
    /// How conversations become text: none takes the model's chat template, or a plain one where it has
    /// none; `none` the plain one; a path that template. `model` and a path hold for prompts and
    /// completions too, which are else written as they are.
    pub template: Option<String>,
    /// Whether only completions and answers are learned, not prompts.
    pub completion_only: bool,
    /// The field of the prompt, where it has another name.
    pub prompt: Option<String>,
    /// The field of the completion, where it has another name.
    pub completion: Option<String>,
    /// The field of a whole text, where it has another name.
    pub text: Option<String>,
    /// Whether the beginning-of-sequence token comes first; none: as the tokenizer has it, not in plain
    /// text, and what a chat template writes.
    pub add_bos: Option<bool>,
    /// Whether the end-of-sequence token comes last and is learned; none: behind records, not in plain
    /// text, and what a chat template writes.
    pub add_eos: Option<bool>,
    /// Whether a sample that would be cut is an error.
    pub strict: bool,
}

impl Default for TextConfig {
    fn default() -> Self {
        TextConfig {
            path: None,
            eval_path: None,
            control: None,
            builtin: Builtin::default(),
            limit_train: None,
            limit_eval: None,
            seq_len: 256,
            pack: false,
            template: None,
            completion_only: true,
            prompt: None,
            completion: None,
            text: None,
            add_bos: None,
            add_eos: None,
            strict: false,
        }
    }
}

/// A training and an evaluation set.
#[derive(Clone, Debug)]
pub struct TextData {
    /// What to train on; empty where there is nothing but a test split.
    pub train: TextSet,
    /// What to evaluate on; never empty.
    pub eval: TextSet,
    /// What to call the data set: its file or folder name, or the built-in one's.
    pub name: String,
    /// What a user should know: what was held out, cut or left out, one line each.
    pub notes: Vec<String>,
}

/// A split as it was read, and what to call it in messages.
struct Part {
    path: PathBuf,
    content: Content,
}

impl Part {
    fn read(path: &Path, files: &[PathBuf]) -> Result<Option<Self>> {
        match files.is_empty() {
            true => Ok(None),
            false => Ok(Some(Part { path: path.to_path_buf(), content: records::read(files)? })),
        }
    }

    /// Splits the last tenth off: of records by their order, of plain text by characters.
    fn hold_out(self) -> Result<(Part, Part)> {
        let Part { path, content } = self;
        let (rest, held) = match content {
            Content::Records(mut rows) => {
                if rows.len() < 2 {
                    return Err(Error::input(path, "one record: none can be held out to evaluate on"));
                }
                let held = rows.split_off(rows.len() - (rows.len() / 10).max(1));
                (Content::Records(rows), Content::Records(held))
            }
            Content::Plain(mut text) => {
                let first = text.chars().count() * 9 / 10;
                let at = text.char_indices().nth(first).map_or(text.len(), |(at, _)| at);
                let held = text.split_off(at);
                (Content::Plain(text), Content::Plain(held))
            }
        };
        Ok((Part { path: path.clone(), content: rest }, Part { path, content: held }))
    }
}

impl TextConfig {
    /// Errs on a limit of 0 and on a row too short to hold a prediction.
    pub fn check(&self) -> Result<()> {
        for (key, limit) in [("limit_train", self.limit_train), ("limit_eval", self.limit_eval)] {
            if limit == Some(0) {
                return Err(Error::usage(format!("{key} is 0, expected at least 1")));
            }
        }
        if !(2..=1 << 20).contains(&self.seq_len) {
            return Err(Error::usage(format!("seq_len is {}, expected 2 to {}", self.seq_len, 1 << 20)));
        }
        Ok(())
    }

    /// The control text's evaluation set, in the same rows, where there is one: its held-out part.
    pub fn open_control(&self, tokenizer: &Tokenizer) -> Result<Option<TextSet>> {
        let Some(path) = &self.control else { return Ok(None) };
        let plain = TextConfig {
            path: Some(path.clone()),
            eval_path: None,
            control: None,
            prompt: None,
            completion: None,
            text: None,
            limit_train: None,
            ..self.clone()
        };
        Ok(Some(plain.open(tokenizer, 0)?.eval))
    }

    /// Opens the text at `path`, or the built-in one without a path, which alone uses `seed`.
    ///
    /// Errs where a file is damaged or a record lacks a field (naming its line), where a record is cut
    /// and [`TextConfig::strict`], and where nothing is left to train or to evaluate on.
    pub fn open(&self, tokenizer: &Tokenizer, seed: u64) -> Result<TextData> {
        self.open_showing(tokenizer, seed, 0).map(|(data, _)| data)
    }

    /// As [`TextConfig::open`], with how the first `show` records look.
    pub fn open_showing(
        &self,
        tokenizer: &Tokenizer,
        seed: u64,
        show: usize,
    ) -> Result<(TextData, Vec<Shown>)> {
        self.check()?;
        let mut notes = Vec::new();
        let (train, eval, name) = self.parts(seed, &mut notes)?;
        let mut shown = Vec::new();
        let set = |part: Part, limit: Option<usize>, show: usize, notes: &mut Vec<String>| {
            let path = part.path.clone();
            let (set, looks) = self.set(part, tokenizer, limit, show, notes)?;
            match set.is_empty() {
                true => Err(Error::input(path, nothing_left(&set))),
                false => Ok((set, looks)),
            }
        };
        let train = match train {
            Some(part) => {
                let (set, looks) = set(part, self.limit_train, show, &mut notes)?;
                shown = looks;
                set
            }
            None => TextSet::of_samples(Default::default(), self.seq_len, false, 0),
        };
        let show = if train.is_empty() { show } else { 0 };
        let (eval, looks) = set(eval, self.limit_eval, show, &mut notes)?;
        shown.extend(looks);
        notes.dedup();
        Ok((TextData { train, eval, name, notes }, shown))
    }

    /// The two splits as they are read, and a name for both.
    fn parts(&self, seed: u64, notes: &mut Vec<String>) -> Result<(Option<Part>, Part, String)> {
        let Some(path) = &self.path else {
            if let Some(eval) = &self.eval_path {
                let message = format!("eval_path is {}, but there is no path to train on", eval.display());
                return Err(Error::usage(message));
            }
            let name = self.builtin.name().to_string();
            let content = Content::Records(self.builtin.rows(seed));
            let (train, eval) =
                Part { path: PathBuf::from(format!("built-in {name}")), content }.hold_out()?;
            return Ok((Some(train), eval, name));
        };
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
        let name = name.unwrap_or_else(|| path.display().to_string());
        let local = hub::resolve_data(&path.to_string_lossy())?;
        let found = records::splits(&local)?;
        let (train, eval) = (Part::read(path, &found.train)?, Part::read(path, &found.eval)?);
        let (train, eval) = match (&self.eval_path, train, eval) {
            (Some(other), train, eval) => {
                if train.is_none() {
                    notes.push(format!("{}: its test split is trained on", path.display()));
                }
                let found = records::splits(&hub::resolve_data(&other.to_string_lossy())?)?;
                let files = if found.eval.is_empty() { found.train } else { found.eval };
                (train.or(eval), Part::read(other, &files)?)
            }
            (None, Some(train), None) => {
                notes.push(format!("{}: no test split, the last tenth is held out", path.display()));
                let (rest, held) = train.hold_out()?;
                (Some(rest), Some(held))
            }
            (None, None, eval) => {
                notes.push(format!("{}: only a test split, nothing to train on", path.display()));
                (None, eval)
            }
            (None, train, eval) => (train, eval),
        };
        let eval = eval.ok_or_else(|| Error::input(path, "no text to evaluate on"))?;
        Ok((train, eval, name))
    }

    /// The tokens of a split.
    fn set(
        &self,
        part: Part,
        tokenizer: &Tokenizer,
        limit: Option<usize>,
        show: usize,
        notes: &mut Vec<String>,
    ) -> Result<(TextSet, Vec<Shown>)> {
        let filler = tokenizer.pad().or(tokenizer.eos().first().copied()).unwrap_or(0);
        let path = part.path.display();
        let mut rows: Vec<Row> = match part.content {
            Content::Plain(text) => {
                return self.stream(&text, tokenizer, limit, filler).map(|s| (s, Vec::new()))
            }
            Content::Records(rows) => rows,
        };
        rows.truncate(limit.unwrap_or(usize::MAX));
        let Some(first) = rows.first() else { return Err(Error::input(&part.path, "no records found")) };
        let maker = Maker::new(self, tokenizer, first)?;
        notes.extend(maker.note().map(|note| format!("{path}: {note}")));
        let mut made = maker.make(&rows, show)?;
        let of = made.samples.len() + made.dropped;
        if made.cut > 0 {
            let (cut, longest, limit) = (made.cut, made.longest, self.seq_len);
            notes.push(format!(
                "{path}: {cut} of {of} samples cut to {limit} tokens, the longest has {longest}"
            ));
        }
        if made.dropped > 0 {
            let why = if made.cut > 0 { "no answer within those tokens" } else { "no answer in them" };
            notes.push(format!("{path}: {} of {of} samples left out: {why}", made.dropped));
        }
        let shown = std::mem::take(&mut made.shown);
        Ok((TextSet::of_samples(made, self.seq_len, self.pack, filler), shown))
    }

    /// Plain text as one stream, encoded in one piece.
    fn stream(
        &self,
        text: &str,
        tokenizer: &Tokenizer,
        limit: Option<usize>,
        filler: u32,
    ) -> Result<TextSet> {
        let mut tokens = tokenizer.encode_with_places(text)?.0;
        if let (Some(true), Some(bos)) = (self.add_bos, tokenizer.bos()) {
            tokens.insert(0, bos);
        }
        if let (Some(true), Some(eos)) = (self.add_eos, tokenizer.eos().first()) {
            tokens.push(*eos);
        }
        if tokens.len() > u32::MAX as usize {
            return Err(Error::Fit(format!(
                "{} tokens in one text, at most {} are read",
                tokens.len(),
                u32::MAX
            )));
        }
        tokens.truncate(limit.unwrap_or(usize::MAX).saturating_mul(self.seq_len));
        Ok(TextSet::of_stream(tokens, self.seq_len, filler))
    }
}

fn nothing_left(set: &TextSet) -> String {
    match set.stream() {
        Some(tokens) => format!("{} tokens, expected 2 or more", tokens.len()),
        None => {
            let (dropped, cut, limit) = (set.dropped, set.cut, "seq_len");
            format!("all {dropped} samples left out: nothing in them is learned ({cut} were cut to {limit})")
        }
    }
}

#[cfg(test)]
mod tests;
