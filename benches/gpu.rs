//! The CUDA kernels beside what the card can do at most, cuBLAS, candle's ops, PyTorch and PEFT.
//!
//! `cargo bench --features cuda --bench gpu -- [--only TEXT]... [--seconds-in-all 230] [--turns 7] [--seconds 0.004] [--tiny]`,
//! or `kernels/gpu-check` on a machine that has a GPU and no cargo. Sections come in the order of their importance, each
//! in a process of its own, so that a fault in one costs the others nothing and each has its own peak of memory. A figure
//! is the median of turns that alternate with those of its baseline; between two synchronizations lie many launches, of
//! work that is recorded as a CUDA graph (what cannot be recorded says so). No section begins, and none goes on, after
//! `--seconds-in-all`; what is left out is said. `--tiny` shrinks every shape, to see that everything runs. PyTorch's
//! and PEFT's side is benches/gpu.py, run by `QTUNE_PYTHON` or python3 where it has them.

#[path = "train/cases.rs"]
#[allow(dead_code)]
mod cases;
#[path = "gpu/dense.rs"]
mod dense;
mod harness;
#[path = "gpu/products.rs"]
mod products;
#[path = "gpu/quantizers.rs"]
mod quantizers;
#[path = "gpu/race.rs"]
mod race;
#[path = "gpu/rows.rs"]
mod rows;
#[path = "gpu/steps.rs"]
mod steps;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use harness::Failure;
use race::{Ceilings, Setting};

/// What measures a section.
type Bench = fn(&Setting) -> Result<(), Failure>;

/// The sections by importance: a name, what measures it, seconds that it may take at most of 230.
const SECTIONS: &[(&str, Bench, f64)] = &[
    ("ceilings", dense::ceilings, 20.0),
    ("packed", products::packed, 60.0),
    ("quantizers", quantizers::bench, 25.0),
    ("integer", products::integer, 20.0),
    ("optimizers", steps::optimizers, 20.0),
    ("rows", rows::rows, 25.0),
    ("attention", rows::attention_section, 20.0),
    ("training", steps::training, 220.0),
];

/// What the command line asks for.
struct Options {
    /// Sections whose name holds one of these; empty: all.
    only: Vec<String>,
    in_all: f64,
    turns: usize,
    /// Seconds of a turn, about.
    seconds: f64,
    tiny: bool,
    /// Of a process that measures: the section, or the case of training, and what the ceilings are.
    section: Option<String>,
    case: Option<String>,
    ceilings: Ceilings,
}

impl Options {
    fn read() -> Result<Self, Failure> {
        let mut options = Options {
            only: Vec::new(),
            in_all: 230.0,
            turns: 7,
            seconds: 0.004,
            tiny: false,
            section: None,
            case: None,
            ceilings: Ceilings::default(),
        };
        let mut args = std::env::args().skip(1);
        while let Some(flag) = args.next() {
            let mut value = || args.next().ok_or_else(|| format!("{flag}: found no value"));
            match flag.as_str() {
                "--bench" => {}
                "--only" => options.only.push(value()?),
                "--seconds-in-all" => options.in_all = value()?.parse()?,
                "--turns" => options.turns = value()?.parse::<usize>()?.max(1),
                "--seconds" => options.seconds = value()?.parse()?,
                "--tiny" => options.tiny = true,
                "--section" => options.section = Some(value()?),
                "--case" => options.case = Some(value()?),
                "--ceilings" => options.ceilings = Ceilings::read(&value()?)?,
                _ => {
                    let known = "--only, --seconds-in-all, --turns, --seconds or --tiny";
                    return Err(format!("{flag}: expected {known}").into());
                }
            }
        }
        Ok(options)
    }

    fn setting(&self) -> Result<Setting, Failure> {
        let ends = Instant::now() + Duration::from_secs_f64(self.in_all.max(0.0));
        let (turns, seconds) = if self.tiny { (1, 0.0) } else { (self.turns, self.seconds) };
        let device = qtune::device::cuda(0)?;
        Ok(Setting { device, tiny: self.tiny, turns, seconds, ends, ceilings: self.ceilings })
    }
}

/// Runs a section in a process of its own and passes on what it prints. What it says of the ceilings comes back.
fn section(
    options: &Options,
    name: &str,
    seconds: f64,
    ceilings: Ceilings,
) -> Result<Option<Ceilings>, Failure> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--section", name, "--seconds-in-all", &seconds.to_string()]);
    command.args(["--turns", &options.turns.to_string(), "--seconds", &options.seconds.to_string()]);
    command.args(["--ceilings", &ceilings.to_string()]);
    if options.tiny {
        command.arg("--tiny");
    }
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let out = child.stdout.take().ok_or("no standard output")?;
    let reader = std::thread::spawn(move || {
        let mut found = None;
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            match line.strip_prefix(race::SAID) {
                Some(text) => found = Ceilings::read(text).ok(),
                None => println!("{line}"),
            }
        }
        found
    });
    // What hangs is ended: sections look at the clock themselves, but not in the middle of a measurement.
    let status = race::wait(&mut child, Duration::from_secs_f64(seconds + 15.0))?;
    let found = reader.join().map_err(|_| "the reader of a section panicked")?;
    match status {
        Some(status) if status.success() => Ok(found),
        Some(status) => Err(format!("{status}").into()),
        None => Err("ended: it took too long".into()),
    }
}

fn main() -> Result<(), Failure> {
    let options = Options::read()?;
    if let Some(case) = &options.case {
        if let Err(error) = steps::case(&options.setting()?, case) {
            eprintln!("error: {}\n{error}", race::first_line(&error));
            std::process::exit(1);
        }
        return Ok(());
    }
    if let Some(name) = &options.section {
        let bench = SECTIONS.iter().find(|s| s.0 == name).ok_or_else(|| format!("no section {name}"))?.1;
        return bench(&options.setting()?);
    }
    let begun = Instant::now();
    let (mut ceilings, mut left_out, mut failed) = (Ceilings::default(), Vec::new(), Vec::new());
    for (name, _, most) in SECTIONS {
        // The ceilings are what the others are measured by.
        let wanted = options.only.is_empty() || options.only.iter().any(|only| name.contains(only.as_str()));
        if !wanted && *name != "ceilings" {
            continue;
        }
        let left = options.in_all - begun.elapsed().as_secs_f64();
        if left < 5.0 {
            left_out.push(*name);
            continue;
        }
        match section(&options, name, left.min(most * options.in_all / 230.0), ceilings) {
            Ok(found) => ceilings = found.unwrap_or(ceilings),
            Err(error) => {
                println!("\nThe section {name} failed: {error}.");
                failed.push(*name);
            }
        }
    }
    if !left_out.is_empty() {
        println!("\nLeft out, for want of time: {}.", left_out.join(", "));
    }
    println!("\n{:.0} s in all.", begun.elapsed().as_secs_f64());
    match failed.is_empty() {
        true => Ok(()),
        false => Err(format!("failed: {}", failed.join(", ")).into()),
    }
}
