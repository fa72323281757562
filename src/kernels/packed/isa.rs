//! The instruction sets that the packed kernels are written for.
//!
//! The best one that the processor has is taken, or a lesser one that `QTUNE_CPU` names (`avx512`, `avx2`, `scalar`), here and
//! in the loops and products of floats, so that every road can be run on one machine.

use std::sync::OnceLock;

/// An instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust: the oracle, and what is left on other processors.
    Scalar,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, VL, DQ, VBMI and VNNI.
    Avx512,
}

impl Isa {
    /// What the processor has, the plainest first.
    pub fn available() -> Vec<Isa> {
        #[allow(unused_mut)]
        let mut sets = vec![Isa::Scalar];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                sets.push(Isa::Avx2);
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vbmi")
                    && is_x86_feature_detected!("avx512vnni")
                {
                    sets.push(Isa::Avx512);
                }
            }
        }
        sets
    }

    /// The set itself where the processor has it, else the best that it has: what makes a call of a function
    /// compiled for the set sound. Detected once.
    pub fn usable(self) -> Isa {
        static MOST: OnceLock<Isa> = OnceLock::new();
        self.min(*MOST.get_or_init(|| Isa::available().into_iter().max().unwrap_or(Isa::Scalar)))
    }

    /// Whether the processor has it.
    pub fn is_available(self) -> bool {
        self.usable() == self
    }

    /// The most that `QTUNE_CPU` allows, read once; all where it is not set.
    pub fn allowed() -> Isa {
        static ALLOWED: OnceLock<Isa> = OnceLock::new();
        *ALLOWED.get_or_init(|| match std::env::var("QTUNE_CPU").as_deref() {
            Ok("scalar") => Isa::Scalar,
            Ok("avx2") => Isa::Avx2,
            _ => Isa::Avx512,
        })
    }

    /// The set to use, resolved once.
    pub fn best() -> Isa {
        Isa::allowed().usable()
    }
}
