//! The condition numbers of a whole model: one matrix a core, the largest first, as many at a time as memory takes.

use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::cache::{self, Cache};
use super::config::KappaConfig;
use super::source::Source;
use super::spectrum::{spectrum, Spectrum, Status};
use super::stored::Matrix;
use super::units::Unit;
use crate::train::{signal, Progress};
use crate::weights::Weights;
use crate::{Error, Result};

/// A unit with what is known of its singular values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scored {
    /// The unit.
    pub unit: Unit,
    /// Its spectrum.
    pub spectrum: Spectrum,
    /// What its numbers were stored as: `f64`, `f32`, `bf16`, `f16`, or the bits of a packed weight.
    pub source: String,
    /// BLAKE3 of its numbers as they are stored ([`cache::content`]).
    pub hash: String,
}

/// How to analyse.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// All singular values of every unit.
    pub exact: bool,
    /// Packed weights are read too.
    pub allow_quantized: bool,
    /// A number that is not finite makes a status, not an error.
    pub ignore_nonfinite: bool,
    /// Threads; none: those of rayon's pool.
    pub threads: Option<usize>,
    /// Bytes that all threads together may hold; none: half of what is free. One unit is always taken.
    pub memory: Option<usize>,
}

impl From<&KappaConfig> for Options {
    fn from(config: &KappaConfig) -> Self {
        Options {
            exact: config.exact,
            allow_quantized: config.allow_quantized,
            ignore_nonfinite: config.ignore_nonfinite,
            ..Options::default()
        }
    }
}

/// Bytes that a unit takes at the most while it is looked at, `read` of them its numbers as they are read.
fn memory_of(unit: &Unit, read: usize) -> usize {
    let (n, m) = (unit.rows.min(unit.cols), unit.rows.max(unit.cols));
    // Three squares on the Gram route, the stack of triangle and panel on the QR route, two runs of Lanczos.
    let squares = (3 * n).max(m.min(4 * n) + 2 * n);
    8 * n * (squares + 512 + 2 * 601usize.min(n + 1)) + read
}

/// Half of the memory that is free, in bytes; 2 GiB where the system does not say.
fn free_memory() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|l| l.trim().trim_end_matches(" kB").trim().parse::<usize>().ok());
    kib.map_or(2 << 30, |kib| kib * 512)
}

/// What the workers share.
struct Queue {
    /// Positions in the order of work that are taken.
    next: usize,
    /// Bytes held by units at work.
    held: usize,
    done: usize,
    found: Vec<Option<Result<Scored>>>,
    /// Nothing new is begun.
    stop: bool,
    saved: Instant,
}

/// Memory that a unit at work holds. A worker that panics gives it back too, and ends the analysis: the others
/// would wait for it for ever.
struct Held<'q> {
    queue: &'q Mutex<Queue>,
    freed: &'q Condvar,
    need: usize,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut now = self.queue.lock().unwrap_or_else(|e| e.into_inner());
        now.held -= self.need;
        now.stop |= std::thread::panicking();
        drop(now);
        self.freed.notify_all();
    }
}

/// How often a long analysis is written to the cache.
const SAVE_EVERY: Duration = Duration::from_secs(10);

/// The spectrum of every unit, in their order. Each is computed by one thread alone, so that the numbers are the same
/// for any number of threads. What `cache` knows is not computed again; what is new is written to it, now and then
/// and at the end, an interrupted analysis included. A cache that cannot be written is a note.
///
/// Errs on a weight that cannot be read, on a number that is not finite (see [`Options`]), and when a signal asks
/// for a stop.
pub fn analyse(
    weights: &Weights,
    units: &[Unit],
    options: &Options,
    cache: Option<&Cache>,
    progress: &dyn Progress,
) -> Result<Vec<Scored>> {
    if let Some(note) = cache.and_then(Cache::note) {
        progress.note(note);
    }
    let source = Source::new(weights, options.allow_quantized);
    // The largest first: what is left at the end is small. Experts of one tensor stay together.
    let mut order: Vec<usize> = (0..units.len()).collect();
    let needs: Vec<usize> = units.iter().map(|unit| memory_of(unit, source.bytes(unit))).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(needs[i]));
    let memory = options.memory.unwrap_or_else(free_memory);
    let threads = options.threads.unwrap_or_else(rayon::current_num_threads).clamp(1, units.len().max(1));
    let queue = Mutex::new(Queue {
        next: 0,
        held: 0,
        done: 0,
        found: units.iter().map(|_| None).collect(),
        stop: false,
        saved: Instant::now(),
    });
    let freed = Condvar::new();
    progress.start("kappa", units.len());
    let work = || {
        let lock = || queue.lock().unwrap_or_else(|e| e.into_inner());
        loop {
            let mut now = lock();
            let (i, need) = loop {
                let Some(&i) = order.get(now.next).filter(|_| !now.stop) else { return };
                let need = needs[i];
                if now.held == 0 || now.held + need <= memory {
                    (now.next, now.held) = (now.next + 1, now.held + need);
                    break (i, need);
                }
                now = freed.wait(now).unwrap_or_else(|e| e.into_inner());
            };
            drop(now);
            let held = Held { queue: &queue, freed: &freed, need };
            let found = one(&source, &units[i], options, cache);
            let mut now = lock();
            now.done += 1;
            now.stop |= found.is_err() || signal::asked().is_some();
            now.found[i] = Some(found);
            progress.tick(now.done, &units[i].key());
            let save = now.saved.elapsed() > SAVE_EVERY;
            if save {
                now.saved = Instant::now();
            }
            drop(now);
            drop(held);
            if let (true, Some(cache)) = (save, cache) {
                // The last save tells of what hinders it.
                let _ = cache.save();
            }
        }
    };
    std::thread::scope(|scope| {
        crate::threads::free(|| {
            for _ in 1..threads {
                scope.spawn(work);
            }
        });
        work();
    });
    progress.finish();
    if let Some(Err(error)) = cache.map(Cache::save) {
        progress.note(&format!("{error}: condition numbers are not kept"));
    }
    let queue = queue.into_inner().unwrap_or_else(|e| e.into_inner());
    let mut scored = Vec::with_capacity(units.len());
    let mut missing = false;
    for found in queue.found {
        match found {
            Some(found) => scored.push(found?),
            None => missing = true,
        }
    }
    match signal::asked() {
        Some(signal) if missing => Err(Error::Stopped { signal, resume: None }),
        _ => Ok(scored),
    }
}

fn one(source: &Source, unit: &Unit, options: &Options, cache: Option<&Cache>) -> Result<Scored> {
    let numbers = source.read(unit)?;
    let matrix: Matrix = numbers.matrix();
    let hash = cache::content(&matrix);
    let key = cache::key(&hash, unit.kind, options.exact);
    let spectrum = match cache.and_then(|c| c.get(&key)) {
        Some(known) => known,
        None => {
            let found = spectrum(&matrix, options.exact);
            if let Some(cache) = cache {
                cache.put(&key, found);
            }
            found
        }
    };
    if spectrum.status == Status::NonFinite && !options.ignore_nonfinite {
        let message =
            "found a number that is not finite, expected finite ones; --ignore-nonfinite leaves the unit out";
        return Err(Error::tensor(unit.key(), message));
    }
    Ok(Scored { unit: unit.clone(), spectrum, source: numbers.source, hash })
}

/// Every singular value of a unit, the largest first.
pub fn singular_values(weights: &Weights, unit: &Unit, allow_quantized: bool) -> Result<Vec<f64>> {
    let numbers = Source::new(weights, allow_quantized).read(unit)?;
    Ok(super::spectrum::values(&numbers.matrix()))
}

/// The hash of a unit's numbers, as [`Scored`] has it.
pub fn content_hash(weights: &Weights, unit: &Unit, allow_quantized: bool) -> Result<String> {
    let numbers = Source::new(weights, allow_quantized).read(unit)?;
    Ok(cache::content(&numbers.matrix()))
}

/// One hash over the names and numbers of all units, in whatever order they come and however their condition numbers
/// were found.
pub fn model_hash(scored: &[Scored]) -> String {
    let mut lines: Vec<String> = scored.iter().map(|s| format!("{} {}\n", s.unit.key(), s.hash)).collect();
    lines.sort();
    blake3::hash(lines.concat().as_bytes()).to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::super::units::{Kind, Role};
    use super::*;

    #[test]
    fn memory_counts_what_is_read_without_an_end() {
        let unit = |rows, cols| Unit {
            param: "w".into(),
            index: None,
            role: Role::Linear,
            kind: Kind::Matrix,
            rows,
            cols,
            aliases: Vec::new(),
        };
        let small = unit(300, 400);
        assert_eq!(memory_of(&small, 8 * small.numel()) - memory_of(&small, 2 * small.numel()), 6 * 120_000);
        // An embedding of 16 bits, 5 GiB of them.
        let large = unit(1 << 20, 2560);
        let read = 2 * large.numel();
        assert!(read > 1 << 32);
        assert_eq!(memory_of(&large, read) - memory_of(&large, 0), read);
    }
}
