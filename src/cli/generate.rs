//! `qtune generate`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use candle_core::DType;
use clap::Args;
use qtune::data::text::{Chat, Template};
use qtune::language::generate::{generate, Limits, Sampling};
use qtune::language::{attach, open_at, tiny, Start};
use qtune::models::{held, Llama};
use qtune::train::{signal, Progress};
use qtune::Error;
use serde_json::{json, Value};

use super::flags::{Common, Dtype};
use super::{print, print_json};

#[derive(Args, Debug)]
pub struct Generate {
    /// Language model: a folder, a run of ours or a hub name; full precision or packed [default: the one the
    /// program carries]
    model: Option<PathBuf>,
    /// Text to go on from; several give several answers
    #[arg(long, value_name = "TEXT", required = true)]
    prompt: Vec<String>,
    /// Adapters to put on the model, in this order; DIR=SCALE weights one
    #[arg(long, value_name = "DIR[=SCALE]")]
    adapter: Vec<String>,
    /// Answer once without an adapter and once with each, switched over one model in memory
    #[arg(long, requires = "adapter")]
    each: bool,
    /// Put the prompt as a user's message into the model's chat template
    #[arg(long)]
    chat: bool,
    /// Tokens to add at most
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_tokens: usize,
    /// Texts that end an answer
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on behind the end-of-sequence token
    #[arg(long)]
    ignore_eos: bool,
    /// Divides the logits; 0 takes the likeliest token
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Draw from so many of the likeliest tokens; 0: all
    #[arg(long, value_name = "N", default_value_t = 0)]
    top_k: usize,
    /// Draw from the likeliest tokens that reach this probability together
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f64,
    /// Draw from tokens of at least this share of the likeliest one's probability
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f64,
    /// Makes tokens that were seen less likely; 1: not
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    repetition_penalty: f64,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    common: Common,
}

/// A folder with a scale behind the last `=`, where what stands there is a number.
pub fn scaled(text: &str) -> (PathBuf, Option<f64>) {
    match text.rsplit_once('=').map(|(dir, scale)| (dir, scale.parse::<f64>())) {
        Some((dir, Ok(scale))) => (PathBuf::from(dir), Some(scale)),
        _ => (PathBuf::from(text), None),
    }
}

/// What frozen weights are held in, and activations too but on the CPU, where these are f32.
pub fn dtype(common: &Common) -> DType {
    match common.dtype {
        Dtype::F32 => DType::F32,
        Dtype::Bf16 => DType::BF16,
        Dtype::F16 => DType::F16,
    }
}

impl Generate {
    fn prompt_tokens(&self, start: &Start, text: &str) -> Result<Vec<u32>> {
        let tokenizer = &start.tokenizer;
        if self.chat {
            let template = match Template::of(tokenizer)? {
                Some(template) => template,
                None => Template::fallback(tokenizer)?,
            };
            let messages = vec![json!({"role": "user", "content": text})];
            let text = template.render(&Chat { messages, more: Default::default() }, true)?;
            return Ok(tokenizer.encode(&text, false)?);
        }
        let mut tokens = tokenizer.encode(text, true)?;
        // A text begins where training texts began.
        if let Some(bos) = tokenizer.bos().filter(|bos| tokens.first() != Some(bos)) {
            tokens.insert(0, bos);
        }
        Ok(tokens)
    }

    pub fn run(self) -> Result<()> {
        signal::watch()?;
        let progress = self.common.progress();
        let device = self.common.device_for_text()?;
        let sampling = Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
        };
        sampling.check()?;
        if self.max_tokens == 0 {
            return Err(Error::usage("--max-tokens 0: expected at least 1").into());
        }
        let mut start = match &self.model {
            Some(model) => open_at(model, &device)?,
            None => tiny(&device)?,
        };
        start.notes.iter().for_each(|note| progress.note(note));
        let dtype = dtype(&self.common);
        start.weights = held(&start.config, &start.weights, dtype)?;
        let base = start.weights.clone();
        // Each is a name and the store with what goes on the base.
        let mut models: Vec<(String, Llama)> = Vec::new();
        if self.each {
            models.push(("base".into(), Llama::new(&start.config, &base, dtype)?));
        }
        for adapter in &self.adapter {
            if self.each {
                start.weights = base.clone();
            }
            let (dir, scale) = scaled(adapter);
            attach(&mut start, &dir, scale)?.iter().for_each(|note| progress.note(note));
            if self.each {
                models.push((adapter.clone(), Llama::new(&start.config, &start.weights, dtype)?));
            }
        }
        if !self.each {
            models.push((String::new(), Llama::new(&start.config, &start.weights, dtype)?));
        }
        let limits = Limits { tokens: self.max_tokens, stop: self.stop.clone(), ignore_eos: self.ignore_eos };
        let mut answers = Vec::new();
        let several = self.prompt.len() * models.len() > 1;
        for prompt in &self.prompt {
            let tokens = self.prompt_tokens(&start, prompt)?;
            for (name, model) in &models {
                if several && !self.common.json {
                    let from = if name.is_empty() { String::new() } else { format!("[{name}] ") };
                    print(&format!("{from}{prompt}"))?;
                }
                let quiet = self.common.json;
                let mut show = |piece: &str| {
                    if quiet {
                        return Ok(());
                    }
                    let mut out = std::io::stdout().lock();
                    match out.write_all(piece.as_bytes()).and_then(|()| out.flush()) {
                        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::io("stdout", e)),
                        _ => Ok(()),
                    }
                };
                let answer =
                    generate(model, &start.tokenizer, &tokens, &sampling, &limits, &device, &mut show)?;
                if !quiet {
                    print("")?;
                }
                progress.note(&format!(
                    "{} tokens, the first after {:.3} s, then {:.1} a second",
                    answer.tokens.len(),
                    answer.first_s,
                    answer.tokens_per_s
                ));
                let mut value = serde_json::to_value(&answer)?;
                if let Some(object) = value.as_object_mut() {
                    object.insert("prompt".into(), json!(prompt));
                    object.insert("prompt_tokens".into(), json!(tokens.len()));
                    if !name.is_empty() {
                        object.insert("adapter".into(), json!(name));
                    }
                }
                answers.push(value);
                if let Some(signal) = signal::asked() {
                    return Err(Error::Stopped { signal, resume: None }.into());
                }
            }
        }
        if self.common.json {
            let model = self.model.as_ref().map_or(start.name.clone(), |m| m.display().to_string());
            print_json(&json!({"command": "generate", "model": model, "answers": Value::Array(answers)}))?;
        }
        Ok(())
    }
}
