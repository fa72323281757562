//! Tiles on AVX2: 16 rows at a time, three ways to multiply bytes.
//!
//! `vpmaddubsw` sums pairs of products of u8 and i8 in 16 bits and saturates. It is exact where weights are at most 64
//! (255 · 64 · 2 < 2^15); for larger ones the activation goes in two parts, `a = 2 (a >> 1) + (a & 1)`, of which
//! each is small enough. AVX-VNNI does it all in one instruction.

// Loops by index over sizes known to the compiler unroll, and the accumulators become registers.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::finish::{Tile, PARTIAL, SUMS};
use super::lines::Line;
use super::panels::{self, Unpacking};

/// Weights of at most [`NARROW_MOST`].
pub(super) const NARROW: u8 = 0;
/// Any weights.
pub(super) const WIDE: u8 = 1;

/// The largest weight whose products `vpmaddubsw` sums exactly.
pub(super) const NARROW_MOST: i32 = 64;

/// [`panels::unpack`] on AVX2.
#[target_feature(enable = "avx2")]
pub(super) fn unpack(how: Unpacking, groups: usize, packed: &[Line], out: &mut [Line]) {
    panels::unpack(how, groups, packed, out);
}

/// Runs as many of `left` tokens as one tile takes, and says how many.
///
/// # Safety
///
/// As [`super::finish::scalar`] for `left` tokens, the processor has AVX2, and no weight is above [`NARROW_MOST`] where `DOT` is
/// `NARROW`.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn tile<const MODE: u8, const DOT: u8>(tile: &Tile, left: usize, groups: usize) -> usize {
    // SAFETY: the caller's word; a tile takes no more tokens than are left.
    unsafe {
        match left {
            0 => 0,
            1 => run::<1, MODE, DOT>(tile, groups),
            2 | 3 => run::<2, MODE, DOT>(tile, groups),
            _ => run::<4, MODE, DOT>(tile, groups),
        }
    }
}

/// [`tile`] where there is AVX-VNNI.
///
/// # Safety
///
/// As [`super::finish::scalar`] for `left` tokens, and the processor has AVX2 and AVX-VNNI.
#[target_feature(enable = "avx2,avxvnni")]
pub(super) unsafe fn tile_vnni<const MODE: u8>(tile: &Tile, left: usize, groups: usize) -> usize {
    // SAFETY: the caller's word; a tile takes no more tokens than are left.
    unsafe {
        match left {
            0 => 0,
            1 => run_vnni::<1, MODE>(tile, groups),
            2 | 3 => run_vnni::<2, MODE>(tile, groups),
            4 | 5 => run_vnni::<4, MODE>(tile, groups),
            _ => run_vnni::<6, MODE>(tile, groups),
        }
    }
}

/// # Safety
///
/// As [`tile_vnni`] for `T` tokens.
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn run_vnni<const T: usize, const MODE: u8>(tile: &Tile, groups: usize) -> usize {
    for g in 0..groups {
        // SAFETY: the caller's word; two registers of a group's line hold 8 rows each.
        unsafe {
            let mut acc = load::<T>(tile, g);
            for q in 0..tile.quads {
                let (w0, w1) = weights(tile, q * groups + g);
                for t in 0..T {
                    let a = quad(tile, t, q);
                    acc[t][0] = _mm256_dpbusd_avx_epi32(acc[t][0], a, w0);
                    acc[t][1] = _mm256_dpbusd_avx_epi32(acc[t][1], a, w1);
                }
            }
            finish::<T, MODE>(tile, g, acc);
        }
    }
    T
}

/// # Safety
///
/// As [`tile`] for `T` tokens.
#[target_feature(enable = "avx2")]
unsafe fn run<const T: usize, const MODE: u8, const DOT: u8>(tile: &Tile, groups: usize) -> usize {
    let (ones, twos, bit) = (_mm256_set1_epi16(1), _mm256_set1_epi16(2), _mm256_set1_epi8(1));
    for g in 0..groups {
        // SAFETY: the caller's word; two registers of a group's line hold 8 rows each.
        unsafe {
            let mut acc = load::<T>(tile, g);
            for q in 0..tile.quads {
                let (w0, w1) = weights(tile, q * groups + g);
                for t in 0..T {
                    let a = quad(tile, t, q);
                    for (acc, w) in acc[t].iter_mut().zip([w0, w1]) {
                        let sum = if DOT == NARROW {
                            _mm256_madd_epi16(_mm256_maddubs_epi16(a, w), ones)
                        } else {
                            let low = _mm256_and_si256(a, bit);
                            // What is left is even: a 16-bit shift brings no bit of one byte into the other.
                            let high = _mm256_srli_epi16::<1>(_mm256_xor_si256(a, low));
                            _mm256_add_epi32(
                                _mm256_madd_epi16(_mm256_maddubs_epi16(high, w), twos),
                                _mm256_madd_epi16(_mm256_maddubs_epi16(low, w), ones),
                            )
                        };
                        *acc = _mm256_add_epi32(*acc, sum);
                    }
                }
            }
            finish::<T, MODE>(tile, g, acc);
        }
    }
    T
}

/// # Safety
///
/// As [`tile`] for `T` tokens; the group exists.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load<const T: usize>(tile: &Tile, group: usize) -> [[__m256i; 2]; T] {
    let mut acc = [[_mm256_setzero_si256(); 2]; T];
    for (t, acc) in acc.iter_mut().enumerate() {
        for (i, acc) in acc.iter_mut().enumerate() {
            // SAFETY: the caller's word.
            *acc = unsafe {
                _mm256_loadu_si256(tile.init.add(t * tile.init_stride + 16 * group + 8 * i).cast())
            };
        }
    }
    acc
}

/// # Safety
///
/// As [`tile`]; the line exists.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn weights(tile: &Tile, line: usize) -> (__m256i, __m256i) {
    // SAFETY: the caller's word.
    unsafe {
        let w = tile.w.add(64 * line);
        (_mm256_loadu_si256(w.cast()), _mm256_loadu_si256(w.add(32).cast()))
    }
}

/// # Safety
///
/// As [`tile`]; token and quad exist.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn quad(tile: &Tile, t: usize, q: usize) -> __m256i {
    // SAFETY: the caller's word.
    _mm256_set1_epi32(unsafe { tile.a.add(t * tile.a_stride + 4 * q).cast::<i32>().read_unaligned() })
}

/// # Safety
///
/// As [`tile`] for `T` tokens; the group exists.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn finish<const T: usize, const MODE: u8>(tile: &Tile, group: usize, acc: [[__m256i; 2]; T]) {
    for (t, acc) in acc.into_iter().enumerate() {
        let mut sums = [0i32; 16];
        // SAFETY: 8 of the 16 sums each; then the caller's word, for the rows of the group that exist.
        unsafe {
            _mm256_storeu_si256(sums.as_mut_ptr().cast(), acc[0]);
            _mm256_storeu_si256(sums.as_mut_ptr().add(8).cast(), acc[1]);
            let out = tile.out.add(t * tile.out_stride + 16 * group);
            let token = tile.token + t;
            let rows = if MODE == PARTIAL { 16 } else { (tile.rows - 16 * group).min(16) };
            for (r, &sum) in sums[..rows].iter().enumerate() {
                match MODE {
                    PARTIAL => *out.add(r) = sum,
                    SUMS => *out.add(r) = tile.finish.sum(token, sum),
                    _ => *out.add(r).cast::<f32>() = tile.finish.value(token, tile.row + 16 * group + r, sum),
                }
            }
        }
    }
}
