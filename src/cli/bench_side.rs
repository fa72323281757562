//! One side of `qtune bench` as a process of its own: its peak of memory is its own, and it waits for its turn.
//!
//! The process opens its model, prints what that took as a line of JSON and then answers each line `BATCH SECONDS` on
//! stdin with a line: passes of BATCH samples for at least SECONDS, and the peak meanwhile. It ends with its stdin.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::Result;
use qtune::bench::{Opening, Pass, Peak, Side, Work};
use qtune::train::signal;
use qtune::Error;
use serde::{Deserialize, Serialize};

/// What a side says when it is ready.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ready {
    /// Seconds from the folder to a model that can answer.
    pub load_s: f64,
    /// Seconds of the first pass of one sample: an image, or the first token.
    pub first_s: f64,
    /// The most memory while loading, in bytes.
    pub load_peak_rss_bytes: u64,
    pub weights_bytes: usize,
    pub params: usize,
    pub bits: u8,
    pub notes: Vec<String>,
    /// Whether later peaks are without loading.
    pub resets: bool,
}

/// What a side says of its passes: means over them.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Measured {
    pub first_s: f64,
    pub decode_s: Option<f64>,
    pub passes: usize,
    pub peak_rss_bytes: u64,
}

/// Answers on stdout until stdin ends.
pub fn serve(dir: &Path, opening: &Opening, device: &candle_core::Device, work: Work) -> Result<()> {
    let side = Side::open(dir, opening, device)?;
    let load_peak_rss_bytes = Peak.bytes();
    let resets = Peak.reset();
    let first = side.pass(&Work { batch: 1, answer: 1, ..work })?;
    say(&Ready {
        load_s: side.load_s,
        first_s: first.first_s,
        load_peak_rss_bytes,
        weights_bytes: side.weights_bytes,
        params: side.params,
        bits: side.bits,
        notes: side.notes.clone(),
        resets,
    })?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let mut words = line.split_whitespace();
        let batch = words.next().and_then(|w| w.parse::<usize>().ok());
        let least = words.next().and_then(|w| w.parse::<f64>().ok());
        let (Some(batch), Some(least)) = (batch, least) else {
            return Err(Error::usage(format!("found {line:?}, expected BATCH SECONDS")).into());
        };
        Peak.reset();
        let mut passes: Vec<Pass> = Vec::new();
        let begun = Instant::now();
        while passes.is_empty() || begun.elapsed().as_secs_f64() < least {
            passes.push(side.pass(&Work { batch, ..work })?);
        }
        let count = passes.len() as f64;
        let decode: Option<f64> = passes.iter().map(|p| p.decode_s).sum();
        say(&Measured {
            first_s: passes.iter().map(|p| p.first_s).sum::<f64>() / count,
            decode_s: decode.map(|s| s / count),
            passes: passes.len(),
            peak_rss_bytes: Peak.bytes(),
        })?;
    }
    Ok(())
}

fn say(what: &impl Serialize) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(what)?)?;
    out.flush()?;
    Ok(())
}

/// A side that runs, as the process that asks it sees it.
pub struct Process {
    child: Child,
    ask: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    what: String,
    pub ready: Ready,
}

impl Process {
    /// Starts this program once more with `args` and waits until its model is ready. `what` names it in errors.
    pub fn start(args: &[String], what: &str) -> qtune::Result<Self> {
        let program: PathBuf = std::env::current_exe().map_err(|e| Error::io("this program", e))?;
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = qtune::threads::free(|| command.spawn()).map_err(|e| Error::io("this program", e))?;
        let (ask, answers) = (child.stdin.take(), child.stdout.take());
        let Some(answers) = answers else { return Err(Error::Run(format!("{what}: found no stdout"))) };
        let ready = Ready {
            load_s: 0.0,
            first_s: 0.0,
            load_peak_rss_bytes: 0,
            weights_bytes: 0,
            params: 0,
            bits: 0,
            notes: Vec::new(),
            resets: false,
        };
        let answers = BufReader::new(answers);
        let mut process = Process { child, ask, answers, what: what.to_string(), ready };
        process.ready = process.answer()?;
        Ok(process)
    }

    /// Asks for passes of `batch` samples for at least `seconds`.
    pub fn run(&mut self, batch: usize, seconds: f64) -> qtune::Result<Measured> {
        let asked = match &mut self.ask {
            Some(ask) => writeln!(ask, "{batch} {seconds}").and_then(|()| ask.flush()),
            None => Ok(()),
        };
        match asked {
            Ok(()) => self.answer(),
            Err(_) => Err(self.failure()),
        }
    }

    fn answer<T: serde::de::DeserializeOwned>(&mut self) -> qtune::Result<T> {
        let mut line = String::new();
        match self.answers.read_line(&mut line) {
            Ok(n) if n > 0 => {
                serde_json::from_str(&line).map_err(|e| Error::Run(format!("{}: {e}", self.what)))
            }
            _ => Err(self.failure()),
        }
    }

    /// Why the process ended, as its own error would have been.
    fn failure(&mut self) -> Error {
        if let Some(signal) = signal::asked() {
            // Ctrl-C goes to both.
            return Error::Stopped { signal, resume: None };
        }
        drop(self.ask.take());
        let mut said = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            drop(std::io::Read::read_to_string(&mut stderr, &mut said));
        }
        let what = &self.what;
        let line = said.lines().rev().find_map(|line| line.strip_prefix("qtune: "));
        let message = format!("{what}: {}", line.unwrap_or("its process ended without a word"));
        let status = self.child.wait().ok();
        #[cfg(unix)]
        let ended_by = status.and_then(|status| std::os::unix::process::ExitStatusExt::signal(&status));
        #[cfg(not(unix))]
        let ended_by: Option<i32> = None;
        match status.and_then(|status| status.code()) {
            Some(2) => Error::Usage(message),
            Some(3) => Error::Fit(message),
            Some(4) => Error::input(what, line.unwrap_or("could not be read")),
            Some(_) => Error::Run(message),
            None => match ended_by {
                // The system ends it so for want of memory.
                Some(9) | None => Error::Fit(format!(
                    "{what}: its process was killed, as the system does when memory runs out"
                )),
                Some(signal) => Error::Run(format!("{what}: its process was ended by signal {signal}")),
            },
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It ends with its stdin, but not in the middle of a pass.
        drop(self.ask.take());
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
