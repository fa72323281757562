//! Tiles on AVX512-VNNI: up to 24 accumulators of 16 rows each.

// Loops by index over sizes known to the compiler unroll, and the accumulators become registers.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::finish::{Finish, Tile, PARTIAL, SUMS};
use super::lines::Line;
use super::panels::{self, Unpacking};

/// [`panels::unpack`] on AVX512.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn unpack(how: Unpacking, groups: usize, packed: &[Line], out: &mut [Line]) {
    panels::unpack(how, groups, packed, out);
}

/// The accumulators of a tile.
#[repr(C, align(64))]
struct Accumulators(MaybeUninit<[i32; 16 * 24]>);

/// Runs as many of `left` tokens as one tile takes, and says how many.
///
/// # Safety
///
/// As [`super::finish::scalar`] for `left` tokens, and the processor has AVX512 F, BW, VL and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn tile<const MODE: u8>(tile: &Tile, left: usize, groups: usize) -> usize {
    // SAFETY: the caller's word; a tile has at most 24 accumulators, which `sums_of` writes and `finish` then reads.
    unsafe {
        if MODE == PARTIAL {
            return sums_of(tile, left, groups, tile.out, tile.out_stride);
        }
        let mut room = Accumulators(MaybeUninit::uninit());
        let sums = room.0.as_mut_ptr().cast::<i32>();
        let tokens = sums_of(tile, left, groups, sums, 16 * groups);
        finish::<MODE>(tile, tokens, groups, sums);
        tokens
    }
}

/// Writes the accumulators of as many tokens as one tile takes, `16 groups` each, `stride` apart, and says of how many.
///
/// # Safety
///
/// As [`tile`], and there is room at `out`, for `PARTIAL` as the tile has it, else for 24 accumulators.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn sums_of(tile: &Tile, left: usize, groups: usize, out: *mut i32, stride: usize) -> usize {
    macro_rules! run {
        ($($groups:literal: $first:literal $($tokens:literal)*;)*) => {
            match groups {
                // SAFETY: the caller's word; a tile takes no more tokens than are left.
                $($groups => unsafe {
                    if left >= $first { sums::<$first, $groups>(tile, out, stride); return $first; }
                    $(if left >= $tokens { sums::<$tokens, $groups>(tile, out, stride); return $tokens; })*
                },)*
                _ => {}
            }
        };
    }
    // Groups of rows, then tokens: 24 accumulators leave registers for 4 weights and a token, and 12 are enough to hide the
    // latency of a product.
    run! {
        4: 6 5 4 3 2 1;
        3: 8 4 2 1;
        2: 12 6 4 2 1;
        1: 12 6 4 2 1;
    }
    left
}

/// # Safety
///
/// As [`sums_of`] for `T` tokens and `G` groups.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn sums<const T: usize, const G: usize>(tile: &Tile, out: *mut i32, stride: usize) {
    let mut acc = [[_mm512_setzero_si512(); G]; T];
    // SAFETY: the caller's word; group `g` of token `t` are 16 accumulators, a quad of a token 4 bytes, a group of a quad a line.
    unsafe {
        for t in 0..T {
            for g in 0..G {
                acc[t][g] = _mm512_loadu_si512(tile.init.add(t * tile.init_stride + 16 * g).cast());
            }
        }
        let (mut a, mut w) = (tile.a, tile.w);
        for _ in 0..tile.quads {
            let mut lines = [_mm512_setzero_si512(); G];
            for g in 0..G {
                lines[g] = _mm512_loadu_si512(w.add(64 * g).cast());
            }
            for t in 0..T {
                let quad = _mm512_set1_epi32(a.add(t * tile.a_stride).cast::<i32>().read_unaligned());
                for g in 0..G {
                    acc[t][g] = _mm512_dpbusd_epi32(acc[t][g], quad, lines[g]);
                }
            }
            a = a.add(4);
            w = w.add(64 * G);
        }
        // Only stored: with more of a body this loop is not unrolled, and the accumulators live in memory throughout, at a
        // third of the speed.
        for t in 0..T {
            for g in 0..G {
                _mm512_storeu_si512(out.add(t * stride + 16 * g).cast(), acc[t][g]);
            }
        }
    }
}

/// # Safety
///
/// As [`tile`] for `tokens`; `sums` are their accumulators.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn finish<const MODE: u8>(tile: &Tile, tokens: usize, groups: usize, sums: *const i32) {
    let how = tile.finish;
    // An accumulator that only carries bits below its sum is a float as it is, times a power of two.
    let corrected = how.corrected();
    let unit = if corrected { how.unit } else { how.unit / (1u32 << how.shift) as f32 };
    for g in 0..groups {
        let rows = (tile.rows - 16 * g).min(16);
        let mask = (!0u16) >> (16 - rows);
        // SAFETY: the caller's word; the mask leaves out rows that do not exist, of which there may be some in the last group.
        unsafe {
            let load = |of: &[f32]| _mm512_maskz_loadu_ps(mask, of.as_ptr().add(tile.row + 16 * g));
            let (mut step, mut bias) = (_mm512_setzero_ps(), _mm512_setzero_ps());
            if MODE != SUMS {
                step = _mm512_mul_ps(load(how.row_step), _mm512_set1_ps(unit));
                if !how.bias.is_empty() {
                    bias = load(how.bias);
                }
            }
            for t in 0..tokens {
                let mut sum = _mm512_loadu_si512(sums.add((t * groups + g) * 16).cast());
                if corrected || MODE == SUMS {
                    sum = whole(how, tile.token + t, sum);
                }
                let out = tile.out.add(t * tile.out_stride + 16 * g);
                if MODE == SUMS {
                    store(out, rows, sum);
                    continue;
                }
                let token = _mm512_set1_ps(*how.token_step.as_ptr().add(tile.token + t));
                let mut y = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(token, step));
                if !how.bias.is_empty() {
                    y = _mm512_add_ps(y, bias);
                }
                store(out, rows, _mm512_castps_si512(y));
            }
        }
    }
}

/// Stores the first `rows` of 16 results.
///
/// # Safety
///
/// The processor has AVX512F, and there is room at `out` for the results.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store(out: *mut i32, rows: usize, results: __m512i) {
    // SAFETY: the caller's word; the parts are 8, 4, 2 and 1 of the results, as the bits of `rows` say.
    unsafe {
        if rows >= 16 {
            return _mm512_storeu_si512(out.cast(), results);
        }
        // In parts; whether a masked store would do as well was not measured.
        let (mut rest, mut out) = (results, out);
        if rows & 8 != 0 {
            _mm256_storeu_si256(out.cast(), _mm512_castsi512_si256(rest));
            rest = _mm512_shuffle_i32x4::<0b1110>(rest, rest);
            out = out.add(8);
        }
        if rows & 4 != 0 {
            _mm_storeu_si128(out.cast(), _mm512_castsi512_si128(rest));
            rest = _mm512_shuffle_i32x4::<1>(rest, rest);
            out = out.add(4);
        }
        let mut rest = _mm512_castsi512_si128(rest);
        if rows & 2 != 0 {
            _mm_storel_epi64(out.cast(), rest);
            rest = _mm_srli_si128::<8>(rest);
            out = out.add(2);
        }
        if rows & 1 != 0 {
            *out = _mm_cvtsi128_si32(rest);
        }
    }
}

/// [`Finish::sum`] of 16 accumulators.
///
/// # Safety
///
/// The processor has AVX512F, and the token exists.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn whole(how: &Finish, token: usize, acc: __m512i) -> __m512i {
    let sum = _mm512_sra_epi32(acc, _mm_cvtsi32_si128(how.shift as i32));
    let sum = if how.double { _mm512_add_epi32(sum, sum) } else { sum };
    // SAFETY: the caller's word.
    let more = how.zero.wrapping_mul(unsafe { *how.token_sums.as_ptr().add(token) });
    _mm512_add_epi32(sum, _mm512_set1_epi32(more))
}
