//! The arithmetic behind the tables.
//!
//! A 2-bit code is `lo + i` with a digit `i` in 0..4, so a product of codes comes down to the product `i j` of
//! digits and to sums that belong to one row or one token alone. A table may therefore hold
//!
//! `m(i, j) = i j - f(i) - f(j) + 4`, with `f(i) = floor(3 i / 2)`,
//!
//! which lies in `0..=5` where `i j` spans `0..=9`: 16 triples, or 24 pairs, of them fit into a byte before the
//! byte has to be widened. The columns are cut into blocks of 48, which is both. A block is filled up with
//! digits 0, for which `i j = f(i) = f(j) = 0`.
//!
//! No table is ever built: three digits of a token have 64 values, so all the tables there can be are one
//! constant of 64 x 64 bytes, and a token's table is an address.

/// Columns of a block.
pub(super) const BLOCK: usize = 48;

/// Blocks whose sum of `m` is sure to fit into 16 bits: `5 x 48 x 273 = 65520`.
pub(super) const MAX_BLOCKS: usize = 273;

/// What an unused column adds to the sum of `m`, and to be taken off again.
pub(super) const BIAS: i32 = 4;

/// The part of a product of digits that belongs to one of them.
pub(super) const fn own(digit: i32) -> i32 {
    3 * digit / 2
}

const fn entry(i: usize, j: usize) -> u8 {
    ((i * j) as i32 - own(i as i32) - own(j as i32) + BIAS) as u8
}

/// Tables on cache lines of their own.
#[repr(align(64))]
pub(super) struct Tables<const N: usize>(pub [[u8; N]; N]);

/// `TRIPLES.0[x][w]` for three digits of a token, `x = j0 + 4 j1 + 16 j2`, and three of a row, `w` alike.
pub(super) static TRIPLES: Tables<64> = {
    let mut t = [[0; 64]; 64];
    let mut at = 0;
    while at < 64 * 64 {
        let (x, w) = (at / 64, at % 64);
        t[x][w] = entry(w % 4, x % 4) + entry(w / 4 % 4, x / 4 % 4) + entry(w / 16, x / 16);
        at += 1;
    }
    Tables(t)
};

/// `PAIRS.0[x][w]` for two digits of a token, `x = j0 + 4 j1`, and two of a row.
pub(super) static PAIRS: Tables<16> = {
    let mut t = [[0; 16]; 16];
    let mut at = 0;
    while at < 16 * 16 {
        let (x, w) = (at / 16, at % 16);
        t[x][w] = entry(w % 4, x % 4) + entry(w / 4, x / 4);
        at += 1;
    }
    Tables(t)
};

/// The sum of `own` over three digits, and the sum of the digits.
pub(super) static SUMS: ([u8; 64], [u8; 64]) = {
    let (mut owns, mut digits) = ([0; 64], [0; 64]);
    let mut x = 0;
    while x < 64 {
        let (a, b, c) = (x % 4, x / 4 % 4, x / 16);
        owns[x as usize] = (own(a) + own(b) + own(c)) as u8;
        digits[x as usize] = (a + b + c) as u8;
        x += 1;
    }
    (owns, digits)
};

/// Where codes change, in steps: for `lo + 1`, `lo + 2` and `lo + 3` the edge, and whether it belongs to them.
///
/// With `c = k - 1/2`, `rne(q) >= k` says `q >= c` for an even `k` and `q > c` for an odd one. `q` is the
/// quotient rounded to f32, so the edge lies at `step` times the middle between two neighbours in f32, where a
/// tie goes to `c`, whose mantissa is even.
pub(in crate::kernels::packed) struct Edges([(f64, bool); 3]);

impl Edges {
    pub fn new(lo: i32) -> Self {
        Edges([1, 2, 3].map(|above| {
            let k = lo + above;
            let c = k as f32 - 0.5;
            let inclusive = k % 2 == 0;
            let neighbour = if inclusive { c.next_down() } else { c.next_up() };
            ((f64::from(c) + f64::from(neighbour)) * 0.5, inclusive)
        }))
    }

    /// The least `x` whose code `clamp(rne(x / step), lo, lo + 3)` is at least `lo + 1`, `lo + 2`, `lo + 3`.
    ///
    /// The code never falls where `x` grows, so comparisons with these give it exactly, without a division.
    #[inline(always)]
    pub fn thresholds(&self, step: f32) -> [f32; 3] {
        let mut thresholds = [0.0; 3];
        for (threshold, &(middle, inclusive)) in thresholds.iter_mut().zip(&self.0) {
            // Exact: 24 bits times 25.
            let edge = f64::from(step) * middle;
            let x = edge as f32;
            let reached = if inclusive { f64::from(x) >= edge } else { f64::from(x) > edge };
            *threshold = if reached { x } else { x.next_up() };
        }
        thresholds
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::packed::table::tests::Random;

    #[test]
    fn entries_leave_room_for_a_block() {
        let all = (0..16).map(|at| entry(at / 4, at % 4));
        assert_eq!((all.clone().min(), all.max()), (Some(0), Some(5)));
        assert!(TRIPLES.0.iter().flatten().all(|&e| usize::from(e) * BLOCK / 3 <= 255));
        assert!(PAIRS.0.iter().flatten().all(|&e| usize::from(e) * BLOCK / 2 <= 255));
        assert!(5 * BLOCK * MAX_BLOCKS <= usize::from(u16::MAX));
        assert_eq!(BIAS + (0 - own(0) - own(0)), i32::from(entry(0, 0)));
    }

    #[test]
    fn thresholds_are_the_edges_of_the_codes() {
        let mut random = Random(7);
        for case in 0..20_000 {
            let mut step = f32::from_bits(0x3000_0000 + (random.next() as u32) % 0x1400_0000);
            if case % 4 == 0 {
                // Mantissas at their ends are where rounding is tightest.
                step = f32::from_bits(
                    (step.to_bits() & 0xff80_0000) | [0, 1, 0x7f_ffff, 0x7f_fffe][case / 4 % 4],
                );
            }
            for lo in [-2, 0] {
                for (above, t) in Edges::new(lo).thresholds(step).into_iter().enumerate() {
                    let code = |x: f32| (x / step).round_ties_even().clamp(lo as f32, lo as f32 + 3.0) as i32;
                    let k = lo + 1 + above as i32;
                    assert!(code(t) >= k, "step {step:e}, code {k}, at {t:e}");
                    assert!(code(t.next_down()) < k, "step {step:e}, code {k}, below {t:e}");
                }
            }
        }
    }
}
