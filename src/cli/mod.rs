//! The command line: flags to recipes, progress to stderr, results to stdout.

mod ablate;
mod bench;
mod bench_side;
mod continual;
mod data;
mod eval;
mod export;
mod finetune;
mod flags;
mod generate;
mod inspect;
mod inspect_adapter;
mod kappa;
mod merge;
mod predict;
mod progress;
mod quantize;
mod tasks;
mod training;

use std::io::Write;

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};
use serde_json::Value;

#[derive(Parser, Debug)]
#[command(
    name = "qtune",
    version = flags::version(),
    about = "Makes transformers small and teaches them new things",
    disable_help_subcommand = true
)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Train a vision transformer for 2-, 3- or 4-bit weights, pack it and measure it
    Quantize(Box<quantize::Quantize>),
    /// Adapt a language model to a text: shared blocks, low rank, or all of it
    Finetune(Box<finetune::Finetune>),
    /// Learn tasks one after another, and measure what is forgotten
    Continual(Box<continual::Continual>),
    /// Run variants of a recipe over widths and seeds, and write a table of what each part brings
    Ablate(Box<ablate::Ablate>),
    /// Measure a full-precision or packed model: top-1, top-5, loss
    Eval(eval::Eval),
    /// Go on from a text with a language model, plain, packed or adapted
    Generate(generate::Generate),
    /// Say what is in an image
    Predict(predict::Predict),
    /// Show what training would see: tokens, what is learned of them and templates; or a sheet of images
    Data(data::Data),
    /// Fold adapters into a model: a plain folder that needs none; --unmerge gives the base back
    Merge(merge::Merge),
    /// Write the same model in another form: plain safetensors, GGUF; or an adapter as plain LoRA
    Export(export::Export),
    /// Rank a model's matrices by condition number, and select those to train
    Kappa(Box<kappa::Kappa>),
    /// Measure speed, time to the first answer and memory: full precision beside packed
    Bench(bench::Bench),
    /// List what a model, checkpoint, adapter or run holds
    Inspect(inspect::Inspect),
    /// Print shell completions
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Parses the command line and runs the command.
pub fn run() -> Result<()> {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) if error.use_stderr() => {
            // clap's message over several lines, as one: what was found and what was expected.
            let text = error.to_string();
            let text = text.split("\n\nUsage").next().unwrap_or(&text);
            let text = text.split("\n\nFor more").next().unwrap_or(text);
            let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
            let line = line.strip_prefix("error: ").unwrap_or(&line).to_string();
            return Err(qtune::Error::usage(line).into());
        }
        Err(help) => {
            help.print()?;
            return Ok(());
        }
    };
    match args.command {
        Command::Quantize(command) => command.run(),
        Command::Finetune(command) => command.run(),
        Command::Continual(command) => command.run(),
        Command::Ablate(command) => command.run(),
        Command::Eval(command) => command.run(),
        Command::Predict(command) => command.run(),
        Command::Generate(command) => command.run(),
        Command::Data(command) => command.run(),
        Command::Merge(command) => command.run(),
        Command::Export(command) => command.run(),
        Command::Kappa(command) => command.run(),
        Command::Bench(command) => command.run(),
        Command::Inspect(command) => command.run(),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Args::command(), "qtune", &mut std::io::stdout());
            Ok(())
        }
    }
}

/// Prints a result to stdout; a reader that went away is no error.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e.into()),
        _ => Ok(()),
    }
}

/// Prints one JSON object.
fn print_json(value: &Value) -> Result<()> {
    print(&serde_json::to_string_pretty(value)?)
}

/// What a plan says of memory.
fn memory(host: usize, there: Option<usize>, device: &candle_core::Device) -> String {
    match there {
        None => bytes(host),
        Some(there) => format!("{} and {} on {}", bytes(host), bytes(there), qtune::device::name(device)),
    }
}

/// Bytes for people.
fn bytes(n: usize) -> String {
    match n {
        0..1024 => format!("{n} B"),
        1024..1_048_576 => format!("{:.1} KiB", n as f64 / 1024.0),
        _ => format!("{:.1} MiB", n as f64 / 1_048_576.0),
    }
}
