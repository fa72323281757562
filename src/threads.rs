//! The threads that all work is shared out on.

use crate::{Error, Result};

/// Builds the pool of `threads` threads (1 to 1024), or as many as rayon would take, of which the calling thread is one.
/// To be called once, on the thread that will ask for the work, before there is any.
///
/// A pool beside the caller would stand still or wake up whole for every product of a forward pass. Where there is a
/// thread for each core that the process may use, each keeps to its own, unless `QTUNE_PIN` is 0: Linux may put a thread
/// on the core of the one that wakes it, where both then take turns for many milliseconds while the next core has
/// nothing to do.
pub fn start(threads: Option<usize>) -> Result<()> {
    let asked = threads.map_or_else(String::new, |threads| format!("--threads {threads}: "));
    if threads.is_some_and(|threads| !(1..=1024).contains(&threads)) {
        return Err(Error::usage(format!("{asked}expected 1 to 1024")));
    }
    let named = || std::env::var("RAYON_NUM_THREADS").ok().and_then(|count| count.parse::<usize>().ok());
    let count = threads.or_else(named).filter(|&count| count > 0);
    let count = count.or_else(|| std::thread::available_parallelism().ok().map(usize::from)).unwrap_or(1);
    let failed = |e: rayon::ThreadPoolBuildError| Error::usage(format!("{asked}{e}"));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(count);
    if count == 1 {
        // With the caller alone nobody would work for other threads while it waits for them.
        return pool.build_global().map_err(failed);
    }
    // candle's own pool, which it makes when it first needs it, would be kept to one core.
    let _ = candle_core::utils::barrier_pool();
    let pin = std::env::var("QTUNE_PIN").map_or(true, |pin| pin != "0") && cores::keep(count);
    pool.use_current_thread()
        .start_handler(move |thread| {
            if pin {
                cores::take(thread)
            }
        })
        .build_global()
        .map_err(failed)?;
    if pin {
        cores::take(0);
    }
    Ok(())
}

/// Runs `work` with the calling thread on any core: threads and processes that it starts would else be kept to the one
/// that is its own.
pub fn free<R>(work: impl FnOnce() -> R) -> R {
    let own = cores::leave();
    let result = work();
    if let Some(own) = own {
        cores::go_back(&own);
    }
    result
}

#[cfg(target_os = "linux")]
mod cores {
    use rustix::thread::{sched_getaffinity, sched_setaffinity, CpuSet};
    use std::sync::OnceLock;

    /// What the process was given, where threads are kept to cores.
    static ALL: OnceLock<CpuSet> = OnceLock::new();

    fn numbers(set: &CpuSet) -> impl Iterator<Item = usize> + '_ {
        (0..CpuSet::MAX_CPU).filter(|&core| set.is_set(core))
    }

    /// Notes the cores if there are `threads` of them, and says whether.
    pub fn keep(threads: usize) -> bool {
        let Ok(all) = sched_getaffinity(None) else { return false };
        numbers(&all).count() == threads && ALL.get_or_init(|| all) == &all
    }

    /// Keeps the calling thread to the core of a number. A refusal leaves it as it was.
    pub fn take(thread: usize) {
        let Some(core) = ALL.get().and_then(|all| numbers(all).nth(thread)) else { return };
        let mut own = CpuSet::new();
        own.set(core);
        let _ = sched_setaffinity(None, &own);
    }

    /// Gives the calling thread all cores; which it had.
    pub fn leave() -> Option<CpuSet> {
        let own = ALL.get().and_then(|_| sched_getaffinity(None).ok())?;
        sched_setaffinity(None, ALL.get()?).ok()?;
        Some(own)
    }

    /// Takes the cores that [`leave`] gave up.
    pub fn go_back(own: &CpuSet) {
        let _ = sched_setaffinity(None, own);
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_thread_keeps_to_its_core_and_what_it_starts_does_not() {
            let here = || sched_getaffinity(None).unwrap();
            std::thread::spawn(move || {
                let all = here();
                let count = numbers(&all).count();
                assert!(!keep(count + 1) && keep(count));
                take(count - 1);
                assert_eq!(
                    numbers(&here()).collect::<Vec<_>>(),
                    numbers(&all).skip(count - 1).collect::<Vec<_>>()
                );
                let started = crate::threads::free(|| std::thread::spawn(here)).join().unwrap();
                assert!(started == all && numbers(&here()).count() == 1);
            })
            .join()
            .unwrap();
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod cores {
    pub fn keep(_threads: usize) -> bool {
        false
    }

    pub fn take(_thread: usize) {}

    pub fn leave() -> Option<()> {
        None
    }

    pub fn go_back(_own: &()) {}
}
