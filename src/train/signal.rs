//! Ctrl-C and SIGTERM: the first asks for a checkpoint and a clean end, a second ends at once.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGINT, SIGTERM};

use crate::{Error, Result};

static ASKED: OnceLock<(Arc<AtomicBool>, Arc<AtomicBool>)> = OnceLock::new();
/// A stop asked for by the program itself: what a signal would do, for tests and for callers.
static OWN: AtomicI32 = AtomicI32::new(0);

/// Starts to watch for signals; once is enough, more does no harm.
pub fn watch() -> Result<()> {
    if ASKED.get().is_some() {
        return Ok(());
    }
    let io = |e| Error::io("signal handler", e);
    let flags = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let any = Arc::new(AtomicBool::new(false));
    for (signal, flag) in [(SIGINT, &flags.0), (SIGTERM, &flags.1)] {
        // Order matters: the shutdown looks at the flag that an earlier signal, of either kind, has set.
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, any.clone()).map_err(io)?;
        signal_hook::flag::register(signal, any.clone()).map_err(io)?;
        signal_hook::flag::register(signal, flag.clone()).map_err(io)?;
    }
    ASKED.get_or_init(|| flags);
    Ok(())
}

/// Asks for a stop as `signal` would; 0 takes it back.
pub fn ask(signal: i32) {
    OWN.store(signal, Ordering::SeqCst);
}

/// The signal that asked for a stop.
pub fn asked() -> Option<i32> {
    if let Some((interrupt, terminate)) = ASKED.get() {
        if interrupt.load(Ordering::SeqCst) {
            return Some(SIGINT);
        }
        if terminate.load(Ordering::SeqCst) {
            return Some(SIGTERM);
        }
    }
    Some(OWN.load(Ordering::SeqCst)).filter(|signal| *signal != 0)
}
