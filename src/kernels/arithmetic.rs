//! What floats are multiplied in.

use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// The number format of the factors in products of f32 matrices. Sums are f32 in both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arithmetic {
    /// As they are.
    #[default]
    F32,
    /// Rounded to bfloat16, to the nearest, ties to even: 8 bits of significand, the exponents of f32. Products with fewer
    /// than 8 rows on the left, as in decoding, stay in f32: memory bounds them.
    Bf16,
}

static CHOSEN: AtomicU8 = AtomicU8::new(0);

/// Chooses for the whole process, before there is work: one run has one arithmetic.
pub fn set_arithmetic(arithmetic: Arithmetic) {
    CHOSEN.store(u8::from(arithmetic == Arithmetic::Bf16), Ordering::Relaxed);
}

/// What was chosen.
pub fn arithmetic() -> Arithmetic {
    match CHOSEN.load(Ordering::Relaxed) {
        0 => Arithmetic::F32,
        _ => Arithmetic::Bf16,
    }
}

static ROUNDED: AtomicBool = AtomicBool::new(false);

/// Chooses for the whole process whether decoding rounds the activations of packed weights to 8 bits
/// ([`super::packed_matmul_int8`]).
pub fn round_activations(yes: bool) {
    ROUNDED.store(yes, Ordering::Relaxed);
}

/// What was chosen.
pub fn rounds_activations() -> bool {
    ROUNDED.load(Ordering::Relaxed)
}
