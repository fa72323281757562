//! Progress on stderr: bars where it is a terminal, else one plain line a second at most.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use qtune::train::Progress;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verbosity {
    Quiet,
    Normal,
    Loud,
}

#[derive(Debug)]
struct Now {
    what: String,
    total: usize,
    bar: Option<ProgressBar>,
    begun: Instant,
    first: usize,
    printed: Instant,
}

/// The progress of one command.
#[derive(Debug)]
pub struct Lines {
    verbosity: Verbosity,
    terminal: bool,
    now: Mutex<Option<Now>>,
}

impl Lines {
    pub fn new(verbosity: Verbosity) -> Self {
        Lines { verbosity, terminal: std::io::stderr().is_terminal(), now: Mutex::new(None) }
    }

    fn with(&self, act: impl FnOnce(&mut Option<Now>)) {
        let mut now = self.now.lock().unwrap_or_else(|e| e.into_inner());
        act(&mut now);
    }
}

impl Progress for Lines {
    fn note(&self, line: &str) {
        if self.verbosity == Verbosity::Quiet {
            return;
        }
        self.with(|now| match now.as_ref().and_then(|n| n.bar.as_ref()) {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        });
    }

    fn start(&self, what: &str, total: usize) {
        if self.verbosity == Verbosity::Quiet {
            return;
        }
        let bar = self.terminal.then(|| {
            let bar = ProgressBar::new(total as u64);
            let style =
                ProgressStyle::with_template("{prefix:>14} {bar:24} {pos}/{len} {eta:>4} left  {msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_prefix(what.to_string());
            bar
        });
        let begun = Instant::now();
        let now = Now { what: what.into(), total, bar, begun, first: usize::MAX, printed: begun };
        self.with(|slot| *slot = Some(now));
    }

    fn tick(&self, done: usize, message: &str) {
        self.with(|slot| {
            let Some(now) = slot else { return };
            if let Some(bar) = &now.bar {
                bar.set_position(done as u64);
                bar.set_message(message.to_string());
                return;
            }
            if now.first == usize::MAX {
                now.first = done;
            }
            let pause = if self.verbosity == Verbosity::Loud { 1 } else { 5 };
            if now.printed.elapsed() < Duration::from_secs(pause) {
                return;
            }
            now.printed = Instant::now();
            let (moved, left) = (done - now.first.min(done), now.total.saturating_sub(done));
            let rest = match moved {
                0 => String::new(),
                _ => {
                    format!("  {:.0} s left", now.begun.elapsed().as_secs_f64() / moved as f64 * left as f64)
                }
            };
            eprintln!("{} {done}/{}  {message}{rest}", now.what, now.total);
        });
    }

    fn finish(&self) {
        self.with(|slot| {
            if let Some(bar) = slot.take().and_then(|now| now.bar) {
                bar.finish_and_clear();
            }
        });
    }
}
