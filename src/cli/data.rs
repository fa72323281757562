//! `qtune data`: what training would see.

use std::fmt::Write;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Args, ValueEnum};
use qtune::data::text::{is_text, Builtin, Sample, Shown, TextConfig, TextData, TextSet, Tokenizer};
use qtune::data::{DataConfig, Preprocess, Source};
use qtune::models::{model_dir, open_model_with, read_config};
use qtune::train::Progress;
use qtune::{files, hub, Error};
use serde_json::{json, Value};

use super::flags::Common;
use super::{print, print_json};

/// How many images a sheet has where nothing is said.
const IMAGES: usize = 64;
/// The most pixels of a sheet's side.
const SHEET: usize = 1 << 14;

#[derive(Args, Debug)]
pub struct Data {
    /// Text (JSON lines, JSON, Parquet, plain text; a folder with train.* and test.*) or images [default: the
    /// built-in text, or the built-in glyphs for a vision model]
    file: Option<PathBuf>,
    /// The model whose tokenizer and chat template, or whose image processor, is used: a folder or a hub
    /// name [default: a token for each byte]
    #[arg(long)]
    model: Option<PathBuf>,
    /// Show the first N samples [default: 3 texts, 64 images]
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Where the evaluation split lies elsewhere
    #[arg(long, value_name = "PATH")]
    eval_data: Option<PathBuf>,
    /// Tokens in a row
    #[arg(long, value_name = "N", default_value_t = 256)]
    seq_len: usize,
    /// Put several samples into a row
    #[arg(long)]
    pack: bool,
    /// Chat template: none (a plain one), model (for prompts and completions too) or a file [default: the
    /// model's, for conversations]
    #[arg(long, value_name = "TEMPLATE")]
    template: Option<String>,
    /// Learn prompts too, not completions alone
    #[arg(long)]
    all_tokens: bool,
    /// The built-in text
    #[arg(long, value_enum, default_value = "sorting")]
    builtin: Which,
    /// Make what is cut or skipped with a note an error
    #[arg(long)]
    strict: bool,
    /// Write a sheet of the images as a model sees them, as PNG
    #[arg(long, value_name = "PNG")]
    out: Option<PathBuf>,
    /// Seed of the built-in data
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    common: Common,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Which {
    Sorting,
    Grammar,
}

impl Data {
    pub fn run(self) -> Result<()> {
        let dir = match &self.model {
            Some(model) => Some(model_dir(&hub::resolve(&model.to_string_lossy())?)),
            None => None,
        };
        if self.limit == Some(0) {
            return Err(Error::usage("--limit 0: expected at least 1").into());
        }
        // Without a word about it: the built-in text; a sheet, or a model that sees, is about images.
        let sees = match &dir {
            Some(dir) if dir.join("config.json").is_file() => {
                let config = read_config(dir)?.1;
                config.get("image_size").is_some() || dir.join("preprocessor_config.json").is_file()
            }
            _ => false,
        };
        let images = match &self.file {
            _ if self.out.is_some() || sees => true,
            Some(file) => {
                let file = hub::resolve_data(&file.to_string_lossy())?;
                dir.is_none() && !is_text(&file) && !reads_as_text(&file)
            }
            None => false,
        };
        match images {
            true => self.images(dir.as_deref()),
            false => self.text(dir.as_deref()),
        }
    }

    fn text(&self, dir: Option<&Path>) -> Result<()> {
        let progress = self.common.progress();
        let tokenizer = match dir {
            Some(dir) => Tokenizer::open(dir, vocab(dir)?)?,
            None => Tokenizer::bytes()?,
        };
        let config = TextConfig {
            path: self.file.clone(),
            eval_path: self.eval_data.clone(),
            builtin: match self.builtin {
                Which::Sorting => Builtin::Sorting,
                Which::Grammar => Builtin::Grammar,
            },
            seq_len: self.seq_len,
            pack: self.pack,
            template: self.template.clone(),
            completion_only: !self.all_tokens,
            strict: self.strict,
            ..TextConfig::default()
        };
        let limit = self.limit.unwrap_or(3);
        let (data, mut shown) = config.open_showing(&tokenizer, self.seed, limit)?;
        if shown.is_empty() {
            shown = windows(&data, &tokenizer, self.seq_len, limit)?;
        }
        data.notes.iter().for_each(|note| progress.note(note));
        if self.common.json {
            let samples: Vec<Value> = shown.iter().map(sample_json).collect();
            return print_json(&json!({
                "command": "data",
                "data": data.name,
                "model": self.model.as_ref().map(|m| m.display().to_string()),
                "tokenizer": tokenizer.source().display().to_string(),
                "seq_len": self.seq_len,
                "samples": samples,
                "train": totals_json(&data.train),
                "eval": totals_json(&data.eval),
                "notes": data.notes,
            }));
        }
        let colour =
            std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        let mut out = String::new();
        for sample in &shown {
            out.push_str(&show(sample, &tokenizer, colour)?);
        }
        let learned = if colour { "learned tokens are green" } else { "learned tokens are in brackets" };
        let _ = writeln!(out, "{}: {learned}", data.name);
        let _ = writeln!(out, "  train: {}", totals(&data.train, self.seq_len));
        let _ = write!(out, "  eval:  {}", totals(&data.eval, self.seq_len));
        print(&out)
    }

    fn images(&self, dir: Option<&Path>) -> Result<()> {
        let progress = self.common.progress();
        let config = DataConfig {
            path: self.file.clone(),
            eval_path: self.eval_data.clone(),
            strict: self.strict,
            ..DataConfig::default()
        };
        let data = config.open(self.seed)?;
        data.notes.iter().for_each(|note| progress.note(note));
        let source = if data.train.is_empty() { &data.eval } else { &data.train };
        let count = self.limit.unwrap_or(IMAGES).min(source.len());
        let preprocess = match dir {
            Some(dir) => open_model_with(dir, self.common.pickle(), &candle_core::Device::Cpu)?.preprocess,
            None => {
                let first = source.image(0)?;
                Preprocess::default_for(first.height.min(224), first.width.min(224), first.channels)
            }
        };
        let columns = (count as f64).sqrt().ceil().max(1.0) as usize;
        let mut listed = Vec::new();
        for i in 0..count {
            listed.push(data.classes.get(source.label(i) as usize).cloned().unwrap_or_default());
        }
        if let Some(out) = &self.out {
            sheet(source.as_ref(), &preprocess, count, columns, out)?;
        }
        if self.common.json {
            let images: Vec<Value> =
                (0..count).map(|i| json!({"name": source.name(i), "label": listed[i]})).collect();
            return print_json(&json!({
                "command": "data",
                "data": data.name,
                "model": self.model.as_ref().map(|m| m.display().to_string()),
                "classes": data.classes,
                "train": data.train.len(),
                "eval": data.eval.len(),
                "images": images,
                "sheet": self.out.as_ref().map(|p| p.display().to_string()),
                "notes": data.notes,
            }));
        }
        let Preprocess { height, width, channels, .. } = preprocess;
        let mut out = String::new();
        for (row, labels) in listed.chunks(columns).enumerate() {
            let _ = writeln!(out, "row {}: {}", row + 1, labels.join(", "));
        }
        let (train, eval, classes) = (data.train.len(), data.eval.len(), data.classes.len());
        let _ = write!(out, "{}: {train} train, {eval} eval, {classes} classes; ", data.name);
        let _ = write!(out, "shown as {channels} x {height} x {width}");
        print(&out)
    }
}

/// Whether a file of no known ending begins like text.
fn reads_as_text(file: &Path) -> bool {
    use std::io::Read;
    let mut start = [0; 512];
    let read = std::fs::File::open(file).and_then(|mut f| f.read(&mut start)).unwrap_or(0);
    let start = &start[..read];
    let whole = match std::str::from_utf8(start) {
        Ok(_) => true,
        // The last character may be cut.
        Err(e) => e.error_len().is_none() && e.valid_up_to() + 4 > read,
    };
    read > 0 && whole && !start.contains(&0)
}

/// The rows of a model's embedding, where its config.json says.
fn vocab(dir: &Path) -> qtune::Result<Option<usize>> {
    if !dir.join("config.json").is_file() {
        return Ok(None);
    }
    let config = read_config(dir)?.1;
    let inner = config.get("text_config").and_then(|c| c.get("vocab_size"));
    let rows = config.get("vocab_size").or(inner).and_then(Value::as_u64);
    Ok(rows.and_then(|n| usize::try_from(n).ok()))
}

/// The first rows of plain text, all of which is learned.
fn windows(
    data: &TextData,
    tokenizer: &Tokenizer,
    seq_len: usize,
    limit: usize,
) -> qtune::Result<Vec<Shown>> {
    let set = if data.train.is_empty() { &data.eval } else { &data.train };
    let tokens = set.stream().unwrap_or_default();
    let window = |(i, tokens): (usize, &[u32])| {
        let train = (0..tokens.len()).map(|j| j > 0).collect();
        let text = tokenizer.decode_all(tokens)?;
        Ok(Shown {
            place: format!("{}: window {}", data.name, i + 1),
            summary: format!("tokens {} to {}", i * seq_len, i * seq_len + tokens.len()),
            layout: "plain text",
            text,
            whole: tokens.len(),
            sample: Sample { tokens: tokens.to_vec(), train },
        })
    };
    tokens.chunks(seq_len).take(limit).enumerate().map(window).collect()
}

/// One sample for people: where it stands, its text, and its tokens as `id piece`.
fn show(shown: &Shown, tokenizer: &Tokenizer, colour: bool) -> qtune::Result<String> {
    let Shown { place, summary, layout, text, whole, sample } = shown;
    let (on, off) = if colour { ("\x1b[32m", "\x1b[0m") } else { ("[", "]") };
    let cut = match *whole > sample.tokens.len() {
        true => format!(", cut to {}", sample.tokens.len()),
        false => String::new(),
    };
    let mut out = String::new();
    let _ = writeln!(out, "{place} ({layout}): {whole} tokens{cut}, {} learned", sample.trained());
    let _ = writeln!(out, "  {summary}");
    for line in text.lines() {
        let _ = writeln!(out, "  | {line}");
    }
    let mut line = String::from(" ");
    let mut width = 1;
    for (id, train) in sample.tokens.iter().zip(&sample.train) {
        let piece = tokenizer.token_of(*id).unwrap_or_default();
        let shown = |c: char| if c.is_control() { '\u{FFFD}' } else { c };
        let piece: String = piece.chars().map(shown).collect();
        let token = format!("{id} {piece}");
        let size = token.chars().count() + 3;
        if width + size > 100 {
            let _ = writeln!(out, "{line}");
            (line, width) = (String::from(" "), 1);
        }
        let token = if *train { format!("{on}{token}{off}") } else { token };
        let _ = write!(line, " {token} ");
        width += size;
    }
    let _ = writeln!(out, "{line}\n");
    Ok(out)
}

fn totals(set: &TextSet, seq_len: usize) -> String {
    if set.is_empty() {
        return "nothing".into();
    }
    let (rows, tokens, trained) = (set.rows(), set.tokens(), set.trained());
    if set.stream().is_some() {
        return format!("{tokens} tokens of plain text, {rows} rows of {seq_len}, {trained} learned");
    }
    let samples = set.samples().len();
    let longest = set.samples().iter().map(|s| s.tokens.len()).max().unwrap_or(0);
    let row = longest.max(if samples == rows { 0 } else { seq_len });
    let full = 100.0 * tokens as f64 / (rows * row).max(1) as f64;
    format!(
        "{samples} samples in {rows} rows ({full:.0} % filled), {tokens} tokens, {trained} learned; {} cut, {} left \
         out, the longest has {}",
        set.cut, set.dropped, set.longest
    )
}

fn totals_json(set: &TextSet) -> Value {
    json!({
        "rows": set.rows(),
        "samples": set.samples().len(),
        "tokens": set.tokens(),
        "trained": set.trained(),
        "cut": set.cut,
        "left_out": set.dropped,
        "longest": set.longest,
    })
}

fn sample_json(shown: &Shown) -> Value {
    json!({
        "place": shown.place,
        "layout": shown.layout,
        "summary": shown.summary,
        "text": shown.text,
        "length": shown.whole,
        "tokens": shown.sample.tokens,
        "trained": shown.sample.train,
    })
}

/// Writes the first `count` images side by side as a model sees them, brought back to bytes.
fn sheet(
    source: &dyn Source,
    preprocess: &Preprocess,
    count: usize,
    columns: usize,
    out: &Path,
) -> qtune::Result<()> {
    let Preprocess { height, width, channels, .. } = *preprocess;
    let rows = count.div_ceil(columns);
    // A pixel of black between them.
    let (wide, high) = (columns * (width + 1), rows * (height + 1));
    if wide > SHEET || high > SHEET {
        let most = SHEET / (width.max(height) + 1);
        return Err(Error::usage(format!(
            "a sheet of {wide} x {high} pixels, at most {SHEET} a side: expected --limit {} or less",
            most * most
        )));
    }
    let mut canvas = image::RgbImage::new(wide as u32, high as u32);
    let mut plane = vec![0f32; channels * height * width];
    for i in 0..count {
        preprocess.apply(&source.image(i)?, None, &mut plane)?;
        for y in 0..height {
            for x in 0..width {
                let byte = |c: usize| {
                    let c = c.min(channels - 1);
                    let value = plane[(c * height + y) * width + x] * preprocess.std[c] + preprocess.mean[c];
                    (value / preprocess.rescale).round().clamp(0.0, 255.0) as u8
                };
                let (left, top) = (i % columns * (width + 1), i / columns * (height + 1));
                canvas.put_pixel(
                    (left + x) as u32,
                    (top + y) as u32,
                    image::Rgb([byte(0), byte(1), byte(2)]),
                );
            }
        }
    }
    let mut bytes = Vec::new();
    canvas
        .write_to(&mut std::io::Cursor::new(&mut bytes), image::ImageFormat::Png)
        .map_err(|e| Error::Run(format!("{}: {e}", out.display())))?;
    files::write_bytes(out, &bytes)
}
