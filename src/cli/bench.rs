//! `qtune bench`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use qtune::bench::copies::{dense_copy, is_packed, packed_copy, Scratch};
use qtune::bench::{is_language, median, Opening, Work};
use qtune::models::model_dir;
use qtune::train::{signal, Progress};
use qtune::{hub, Error};
use serde_json::{json, Map, Value};

use super::bench_side::{serve, Measured, Process};
use super::flags::{Common, Dtype};
use super::generate::dtype;
use super::{bytes, print, print_json};

/// Seconds of passes between turns: long enough that a turn's start does not show, short enough that both sides see
/// the same moods of the machine.
const TURN: f64 = 0.2;
/// Tokens of a prompt, where the model has room.
const PROMPT: usize = 256;

const KEYS: &str = "\
The sides run in processes of their own and take turns, A B A B ...; figures are medians over --runs turns. A packed \
MODEL stands beside the dense f32 values of its own weights; a dense one beside copies of itself packed to --bits, \
made as quantize --steps 0 does (in TMPDIR, removed afterwards). Input is made up: noise in the model's image size, or \
random tokens, and greedy answers.

--json keys: command, model, kind (vision, language), device, threads, runs, params_total, seq_len, tokens and dtype \
(language), version, commit, sides: a list of
  name, bits (of most weights), weights_bytes (in memory), file_bytes (safetensors files; null where the side has \
none), load_s, first_s (first answer after loading: one image, or the first token of one prompt), load_peak_rss_bytes, \
batches: a list of
    batch_size, peak_rss_bytes (loading left out where the system lets it), speedup (over full precision: images, or \
decoded tokens), and
    vision: samples_per_s, ms (of one batch)
    language: prefill_tokens_per_s, prefill_speedup, first_token_s, decode_tokens_per_s, decode_ms (of one step of all rows)";

#[derive(Args, Debug)]
#[command(after_long_help = KEYS)]
pub struct Bench {
    /// Model: a folder, a file, a run of ours or a hub name; full precision or packed
    model: PathBuf,
    /// Bits that a full-precision model is packed to beside itself; a list gives several copies [default: 4,2]
    #[arg(long, value_name = "BITS", value_delimiter = ',', value_parser = ["2", "3", "4", "8"])]
    bits: Vec<String>,
    /// Images in a batch, or rows of text; a list is measured one after another
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,8")]
    batch_size: Vec<usize>,
    /// Tokens of a prompt [default: 256, or what the model has room for]
    #[arg(long, value_name = "N")]
    seq_len: Option<usize>,
    /// Tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 33)]
    tokens: usize,
    /// Turns of each side, after one that does not count
    #[arg(long, value_name = "N", default_value_t = 5)]
    runs: usize,
    /// Be one side, for the process that compares
    #[arg(long, hide = true, value_parser = ["dense", "as-is"])]
    side: Option<String>,
    #[command(flatten)]
    common: Common,
}

/// One side: how it is called, what it reads and what it does with it.
struct Plan {
    name: String,
    dir: PathBuf,
    mode: &'static str,
    file_bytes: Option<u64>,
}

impl Bench {
    pub fn run(mut self) -> Result<()> {
        let dir = model_dir(&hub::resolve(&self.model.to_string_lossy())?);
        let language = is_language(&dir);
        let device = match language {
            true => self.common.device_for_text()?,
            false => self.common.device()?,
        };
        if let Some(side) = &self.side {
            let opening =
                Opening { dense: side == "dense", dtype: dtype(&self.common), pickle: self.common.pickle() };
            let prompt = self.seq_len.unwrap_or(1);
            return serve(&dir, &opening, &device, Work { batch: 1, prompt, answer: self.tokens });
        }
        self.check(language)?;
        signal::watch()?;
        let progress = self.common.progress();
        if language {
            self.fit_prompt(&dir)?;
        }
        let scratch = Scratch::new()?;
        let plans = self.plans(&dir, language, &scratch, &progress)?;
        let mut processes = Vec::new();
        for plan in &plans {
            progress.note(&format!("opening: {}", plan.name));
            processes.push(Process::start(&self.arguments(plan, language), &plan.dir.display().to_string())?);
            stop_if_asked()?;
        }
        if let Some(process) = processes.first() {
            process.ready.notes.iter().for_each(|note| progress.note(note));
            if !process.ready.resets {
                progress.note("peaks of memory include loading: this system does not let them be reset");
            }
        }
        let measured = self.measure(&mut processes, &progress)?;
        let value = self.summary(&device, language, &plans, &processes, &measured);
        match self.common.json {
            true => print_json(&value),
            false => print(&table(&value, language)),
        }
    }

    fn check(&mut self, language: bool) -> qtune::Result<()> {
        self.batch_size.sort_unstable();
        self.batch_size.dedup();
        if self.batch_size.first().is_none_or(|n| *n == 0) {
            return Err(Error::usage("--batch-size 0: expected at least 1"));
        }
        if self.runs == 0 {
            return Err(Error::usage("--runs 0: expected at least 1"));
        }
        if language && self.tokens < 2 {
            let found = self.tokens;
            return Err(Error::usage(format!(
                "--tokens {found}: expected at least 2, the first is prefill's"
            )));
        }
        if !language && self.seq_len.is_some() {
            return Err(Error::usage("--seq-len: for language models, found a vision model"));
        }
        Ok(())
    }

    /// What stands side by side, full precision first.
    fn plans(
        &self,
        dir: &Path,
        language: bool,
        scratch: &Scratch,
        progress: &dyn Progress,
    ) -> qtune::Result<Vec<Plan>> {
        let plan = |name: String, dir: &Path, mode: &'static str, on_disk: bool| {
            let file_bytes = on_disk.then(|| file_bytes(dir)).transpose()?;
            Ok::<_, Error>(Plan { name, dir: dir.to_path_buf(), mode, file_bytes })
        };
        if is_packed(dir)? {
            if !self.bits.is_empty() {
                return Err(Error::usage(format!("--bits: {} is packed already", dir.display())));
            }
            // A vision model may hold what a plain folder has no place for: it is unpacked in memory.
            let full = match language {
                true => plan("full precision".into(), &dense_copy(dir, scratch)?, "as-is", true)?,
                false => plan("full precision".into(), dir, "dense", false)?,
            };
            return Ok(vec![full, plan("packed".into(), dir, "as-is", true)?]);
        }
        let mut plans = vec![plan("full precision".into(), dir, "as-is", true)?];
        let bits = match self.bits.is_empty() {
            true => vec!["4".to_string(), "2".to_string()],
            false => self.bits.clone(),
        };
        let mut made = std::collections::BTreeSet::new();
        // A number said twice is one copy.
        for bits in bits.iter().filter(|bits| made.insert((*bits).clone())) {
            progress.note(&format!("packing to {bits} bits"));
            let number = bits.parse().map_err(|_| Error::usage(format!("--bits {bits}")))?;
            let copy = packed_copy(dir, number, self.common.allow_pickle, scratch, progress)?;
            plans.push(plan(format!("packed, {bits} bits"), &copy, "as-is", true)?);
            stop_if_asked()?;
        }
        Ok(plans)
    }

    /// A prompt that leaves room for the answer.
    fn fit_prompt(&mut self, dir: &Path) -> qtune::Result<()> {
        let (path, json) = qtune::models::read_config(dir)?;
        let most = qtune::models::LlamaConfig::from_hf(&path, &json)?.max_positions;
        let prompt = self.seq_len.unwrap_or(PROMPT.min(most.saturating_sub(self.tokens)));
        if prompt == 0 || prompt.checked_add(self.tokens).is_none_or(|all| all > most) {
            return Err(Error::usage(format!(
                "--seq-len {prompt}, --tokens {}: expected at least 1 each and at most {most} together, which the model was \
                 made for",
                self.tokens
            )));
        }
        self.seq_len = Some(prompt);
        Ok(())
    }

    /// The command line of a side.
    fn arguments(&self, plan: &Plan, language: bool) -> Vec<String> {
        let mut args =
            vec!["bench".to_string(), plan.dir.display().to_string(), "--side".into(), plan.mode.into()];
        let mut push = |flag: &str, value: String| args.extend([flag.to_string(), value]);
        push("--threads", rayon::current_num_threads().to_string());
        if let Some(device) = &self.common.device {
            push("--device", device.clone());
        }
        if language {
            push("--seq-len", self.seq_len.unwrap_or(1).to_string());
            push("--tokens", self.tokens.to_string());
        }
        push("--dtype", dtype_name(self.common.dtype).into());
        if self.common.allow_pickle {
            args.push("--allow-pickle".into());
        }
        if self.common.act_int8 {
            args.push("--act-int8".into());
        }
        args
    }

    /// The turns of each side for each batch size, in the order of the sides.
    fn measure(
        &self,
        processes: &mut [Process],
        progress: &dyn Progress,
    ) -> qtune::Result<Vec<Vec<Vec<Measured>>>> {
        let mut measured = Vec::new();
        progress.start("measuring", self.batch_size.len() * (self.runs + 1));
        for (i, batch) in self.batch_size.iter().enumerate() {
            let mut turns: Vec<Vec<Measured>> = vec![Vec::new(); processes.len()];
            for turn in 0..=self.runs {
                for (process, turns) in processes.iter_mut().zip(&mut turns) {
                    stop_if_asked()?;
                    let got = process.run(*batch, TURN)?;
                    if turn > 0 {
                        turns.push(got);
                    }
                }
                progress.tick(i * (self.runs + 1) + turn + 1, &format!("batches of {batch}"));
            }
            measured.push(turns);
        }
        progress.finish();
        Ok(measured)
    }

    fn summary(
        &self,
        device: &candle_core::Device,
        language: bool,
        plans: &[Plan],
        processes: &[Process],
        measured: &[Vec<Vec<Measured>>],
    ) -> Value {
        let sides: Vec<Value> = plans
            .iter()
            .zip(processes)
            .enumerate()
            .map(|(side, (plan, process))| {
                let ready = &process.ready;
                let of = |(batch, turns): (&usize, &Vec<Vec<Measured>>)| {
                    self.figures(language, *batch, &turns[side], &turns[0])
                };
                let batches: Vec<Value> = self.batch_size.iter().zip(measured).map(of).collect();
                json!({
                    "name": plan.name,
                    "bits": ready.bits,
                    "weights_bytes": ready.weights_bytes,
                    "file_bytes": plan.file_bytes,
                    "load_s": ready.load_s,
                    "first_s": ready.first_s,
                    "load_peak_rss_bytes": ready.load_peak_rss_bytes,
                    "batches": batches,
                })
            })
            .collect();
        let mut value = json!({
            "command": "bench",
            "model": self.model.display().to_string(),
            "kind": if language { "language" } else { "vision" },
            "device": qtune::device::name(device),
            "threads": rayon::current_num_threads(),
            "runs": self.runs,
            "params_total": processes.first().map(|p| p.ready.params),
            "sides": sides,
            "version": env!("CARGO_PKG_VERSION"),
            "commit": env!("QTUNE_COMMIT"),
        });
        if let (true, Some(object)) = (language, value.as_object_mut()) {
            object.insert("seq_len".into(), json!(self.seq_len));
            object.insert("tokens".into(), json!(self.tokens));
            object.insert("dtype".into(), json!(dtype_name(self.common.dtype)));
        }
        value
    }

    /// The figures of one batch size of a side, beside the turns of full precision.
    fn figures(&self, language: bool, batch: usize, turns: &[Measured], full: &[Measured]) -> Value {
        let first = |turns: &[Measured]| median(&turns.iter().map(|t| t.first_s).collect::<Vec<_>>());
        let decode =
            |turns: &[Measured]| median(&turns.iter().filter_map(|t| t.decode_s).collect::<Vec<_>>());
        let peak = turns.iter().map(|t| t.peak_rss_bytes).max();
        let mut figures = Map::new();
        let mut put = |key: &str, value: Value| figures.insert(key.to_string(), value);
        put("batch_size", json!(batch));
        put("peak_rss_bytes", json!(peak));
        if language {
            let (read, steps) = (self.seq_len.unwrap_or(0), self.tokens - 1);
            put("prefill_tokens_per_s", json!((batch * read) as f64 / first(turns)));
            put("first_token_s", json!(first(turns)));
            put("decode_tokens_per_s", json!((batch * steps) as f64 / decode(turns)));
            put("decode_ms", json!(1e3 * decode(turns) / steps as f64));
            put("prefill_speedup", json!(first(full) / first(turns)));
            put("speedup", json!(decode(full) / decode(turns)));
        } else {
            put("samples_per_s", json!(batch as f64 / first(turns)));
            put("ms", json!(1e3 * first(turns)));
            put("speedup", json!(first(full) / first(turns)));
        }
        Value::Object(figures)
    }
}

fn stop_if_asked() -> qtune::Result<()> {
    match signal::asked() {
        Some(signal) => Err(Error::Stopped { signal, resume: None }),
        None => Ok(()),
    }
}

fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "f32",
        Dtype::Bf16 => "bf16",
        Dtype::F16 => "f16",
    }
}

/// Bytes of the files of weights in a model's folder, or of the file itself.
fn file_bytes(dir: &Path) -> qtune::Result<u64> {
    if dir.is_file() {
        return Ok(std::fs::metadata(dir).map_err(|e| Error::io(dir, e))?.len());
    }
    let entries = || std::fs::read_dir(dir).map_err(|e| Error::io(dir, e));
    for extension in ["safetensors", "bin", "pth", "pt"] {
        let mut bytes = 0;
        for entry in entries()? {
            let path = entry.map_err(|e| Error::io(dir, e))?.path();
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            // A tokenizer's .bin holds no weights.
            if path.extension().is_some_and(|e| e == extension) && !name.starts_with("tokenizer") {
                bytes += std::fs::metadata(&path).map_err(|e| Error::io(&path, e))?.len();
            }
        }
        if bytes > 0 {
            return Ok(bytes);
        }
    }
    Ok(0)
}

/// The summary for people: a line for each side and batch size.
fn table(value: &Value, language: bool) -> String {
    let number = |v: &Value, key: &str| v[key].as_f64().unwrap_or(f64::NAN);
    let size = |v: &Value, key: &str| v[key].as_u64().map_or("-".into(), |n| bytes(n as usize));
    let time = |s: f64| match s {
        s if s < 1.0 => format!("{:.2} ms", 1e3 * s),
        s => format!("{s:.2} s"),
    };
    let threads = match value["threads"].as_u64() {
        Some(1) => "1 thread".to_string(),
        n => format!("{} threads", n.unwrap_or(0)),
    };
    let (device, runs) = (value["device"].as_str().unwrap_or(""), &value["runs"]);
    let asked = match language {
        true => format!(", prompts of {} tokens, answers of {}", value["seq_len"], value["tokens"]),
        false => String::new(),
    };
    let (model, params) = (value["model"].as_str().unwrap_or(""), &value["params_total"]);
    let mut rows: Vec<Vec<String>> =
        vec![["", "weights", "load", "first", "batch"].map(String::from).to_vec()];
    let rates: &[&str] = match language {
        true => &["prefill tok/s", "speed", "decode tok/s", "speed", "peak memory"],
        false => &["images/s", "one batch", "speed", "peak memory"],
    };
    rows[0].extend(rates.iter().map(|s| s.to_string()));
    let no_sides = Vec::new();
    for side in value["sides"].as_array().unwrap_or(&no_sides) {
        for (i, batch) in side["batches"].as_array().unwrap_or(&no_sides).iter().enumerate() {
            let mut row = match i {
                0 => vec![
                    side["name"].as_str().unwrap_or("").to_string(),
                    size(side, "weights_bytes"),
                    time(number(side, "load_s")),
                    time(number(side, "first_s")),
                ],
                _ => vec![String::new(); 4],
            };
            row.push(batch["batch_size"].to_string());
            let times = |key: &str| format!("{:.2} x", number(batch, key));
            if language {
                row.push(format!("{:.1}", number(batch, "prefill_tokens_per_s")));
                row.push(times("prefill_speedup"));
                row.push(format!("{:.1}", number(batch, "decode_tokens_per_s")));
            } else {
                row.push(format!("{:.1}", number(batch, "samples_per_s")));
                row.push(time(1e-3 * number(batch, "ms")));
            }
            row.push(times("speedup"));
            row.push(size(batch, "peak_rss_bytes"));
            rows.push(row);
        }
    }
    let widths: Vec<usize> = (0..rows[0].len())
        .map(|c| rows.iter().filter_map(|row| row.get(c)).map(|cell| cell.len()).max().unwrap_or(0))
        .collect();
    let mut text = format!("{model}: {params} parameters; {device}, {threads}, medians of {runs}{asked}");
    for row in &rows {
        let cells = row.iter().zip(&widths).enumerate();
        let line: Vec<String> = cells
            .map(|(c, (cell, &width))| match c {
                0 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            })
            .collect();
        text += "\n";
        text += line.join("  ").trim_end();
    }
    text
}
