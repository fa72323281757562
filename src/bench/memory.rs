//! The largest resident memory of a stretch of a process's life.

use crate::train::peak_rss_bytes;

/// Watches the high-water mark of this process's resident memory.
///
/// On Linux the mark can be put back to what is resident now (`/proc/self/clear_refs`); where that is refused
/// it is that of the whole life of the process, loading included, and [`Peak::reset`] says so.
#[derive(Clone, Copy, Debug, Default)]
pub struct Peak;

impl Peak {
    /// Forgets the peak so far; false where the system does not let it.
    pub fn reset(self) -> bool {
        // proc(5): 5 resets the peak resident set size, and nothing else.
        std::fs::write("/proc/self/clear_refs", "5").is_ok()
    }

    /// The peak since it was last reset, in bytes; 0 where the system does not tell.
    pub fn bytes(self) -> u64 {
        peak_rss_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peak_is_seen() {
        let block = vec![1u8; 64 << 20];
        assert!(block.iter().map(|b| usize::from(*b)).sum::<usize>() == 64 << 20);
        assert!(Peak.bytes() >= 64 << 20, "{} bytes", Peak.bytes());
        drop(block);
        Peak.reset();
        assert!(Peak.bytes() > 0);
    }
}
