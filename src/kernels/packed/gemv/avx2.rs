//! The AVX2 road: eight rows in the lanes of a vector, four such octets to a tile.
//!
//! 8-bit activations: `vpmaddubsw` of unsigned fields and signed codes adds pairs in 16 bits, where it saturates. Fields
//! of at most 15 keep a pair within 2 · 15 · 127 = 3810, and eight of those within 30480; 8-bit fields go by halves.

use std::arch::x86_64::*;

use super::activations::{FloatRow, Int8Row};
use super::columns::BLOCK;
use super::layout::{band_lines, tile_lines, Line, BANDS, TILE_ROWS};

/// Rows of an octet.
const OCTET: usize = 8;
/// Octets of a tile.
const OCTETS: usize = TILE_ROWS / OCTET;

/// The vectors of the codes of one octet: half a line of each line of its band.
#[derive(Clone, Copy)]
struct Octet(*const u8);

impl Octet {
    /// # Safety
    /// The octet's band has more than `v` lines.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn vector(self, v: usize) -> __m256i {
        // SAFETY: the caller's; lines, and so their halves, are aligned.
        unsafe { _mm256_load_si256(self.0.add(64 * v).cast()) }
    }
}

/// Goes through a tile: `$add` adds a block of an octet to its `sums`; a group's sum times its step is added to the row.
macro_rules! tile_kernel {
    ($tile:ident, $columns:ident, $bits:ident, $y:ident, |$block:ident, $octet:ident, $sum:ident| $add:expr) => {
        assert!($columns.tiled() && $tile.len() == tile_lines($bits, $columns), "a tile of these columns");
        assert_eq!($y.len(), TILE_ROWS, "products of a tile");
        let mut at = $tile.as_ptr().cast::<u8>();
        let mut out = [_mm256_setzero_ps(); OCTETS];
        for group in 0..$columns.groups() {
            let mut of_group = [_mm256_setzero_ps(); OCTETS];
            for $block in $columns.blocks_of(group) {
                for (i, $sum) in of_group.iter_mut().enumerate() {
                    // SAFETY: `tile` has lines for each block and group (asserted above), two octets to a band.
                    let $octet = Octet(unsafe { at.add(i / 2 * 64 * band_lines($bits) + i % 2 * 32) });
                    *$sum = $add;
                }
                // SAFETY: as above.
                at = unsafe { at.add(64 * BANDS * band_lines($bits)) };
            }
            for (i, (out, sum)) in out.iter_mut().zip(of_group).enumerate() {
                // SAFETY: as above: the group's steps, half a line an octet.
                let step = unsafe { _mm256_load_ps(at.add(32 * i).cast()) };
                *out = _mm256_fmadd_ps(sum, step, *out);
            }
            // SAFETY: as above.
            at = unsafe { at.add(64 * BANDS) };
        }
        for (out, y) in out.iter().zip($y.chunks_exact_mut(OCTET)) {
            // SAFETY: a chunk of 8.
            unsafe { _mm256_storeu_ps(y.as_mut_ptr(), *out) };
        }
    };
}

/// A tile times 8-bit activations; `zero` is the value of field 0.
#[target_feature(enable = "avx2,fma")]
pub(super) fn int8<const BITS: usize>(tile: &[Line], x: &Int8Row, zero: f32, y: &mut [f32]) {
    let columns = x.columns;
    let blocks = columns.blocks();
    assert!(x.codes.len() == blocks * BLOCK && x.scale.len() == blocks && x.sum.len() == blocks);
    tile_kernel!(tile, columns, BITS, y, |block, octet, sum| {
        let codes = &x.codes[block * BLOCK..][..BLOCK];
        // SAFETY: `octet` is that of a whole block, and there are 64 codes.
        let fields = _mm256_cvtepi32_ps(unsafe { block_sum::<BITS>(octet, codes.as_ptr()) });
        let exact = _mm256_add_ps(_mm256_set1_ps(zero * x.sum[block]), fields);
        _mm256_fmadd_ps(exact, _mm256_set1_ps(x.scale[block]), *sum)
    });
}

/// `Σ field code` over the 64 columns of a block, for each row of an octet.
///
/// # Safety
/// `octet` has `band_lines(BITS)` vectors, `codes` points to 64 codes.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn block_sum<const BITS: usize>(octet: Octet, codes: *const i8) -> __m256i {
    // SAFETY: the caller's: below `band_lines(BITS)`.
    let vector = |v: usize| unsafe { octet.vector(v) };
    // The fields at a place in the bytes, times their four codes, by pairs.
    let dot = |w, shift: i32, mask: i8, c: usize| {
        let fields = _mm256_and_si256(shifted16(w, shift), _mm256_set1_epi8(mask));
        // SAFETY: `c` is a multiple of 4 below 64.
        let four = unsafe { codes.add(c).cast::<i32>().read_unaligned() };
        _mm256_maddubs_epi16(fields, _mm256_set1_epi32(four))
    };
    let wide = |pairs| _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    let mut sum = _mm256_setzero_si256();
    let mut pairs = _mm256_setzero_si256();
    match BITS {
        2 => {
            // 16 pairs of at most 2 · 3 · 127: 12192.
            for v in 0..4 {
                let w = vector(v);
                for j in 0..4 {
                    pairs = _mm256_add_epi16(pairs, dot(w, 2 * j, 0x03, 16 * v + 4 * j as usize));
                }
            }
            wide(pairs)
        }
        3 => {
            // 16 pairs of at most 2 · 7 · 127: 28448.
            for t in 0..2 {
                let (a, b, c) = (vector(3 * t), vector(3 * t + 1), vector(3 * t + 2));
                for (i, w) in [a, b, c, last_two(a, b, c)].into_iter().enumerate() {
                    let at = 32 * t + 8 * i;
                    pairs = _mm256_add_epi16(pairs, dot(w, 0, 0x07, at));
                    pairs = _mm256_add_epi16(pairs, dot(w, 3, 0x07, at + 4));
                }
            }
            wide(pairs)
        }
        4 => {
            for half in 0..2 {
                pairs = _mm256_setzero_si256();
                for v in 4 * half..4 * half + 4 {
                    let w = vector(v);
                    pairs = _mm256_add_epi16(pairs, dot(w, 0, 0x0f, 8 * v));
                    pairs = _mm256_add_epi16(pairs, dot(w, 4, 0x0f, 8 * v + 4));
                }
                sum = _mm256_add_epi32(sum, wide(pairs));
            }
            sum
        }
        _ => {
            let mut high_sum = _mm256_setzero_si256();
            for half in 0..2 {
                pairs = _mm256_setzero_si256();
                let mut high = _mm256_setzero_si256();
                for v in 8 * half..8 * half + 8 {
                    let w = vector(v);
                    pairs = _mm256_add_epi16(pairs, dot(w, 0, 0x0f, 4 * v));
                    high = _mm256_add_epi16(high, dot(w, 4, 0x0f, 4 * v));
                }
                sum = _mm256_add_epi32(sum, wide(pairs));
                high_sum = _mm256_add_epi32(high_sum, wide(high));
            }
            _mm256_add_epi32(sum, _mm256_slli_epi32::<4>(high_sum))
        }
    }
}

/// A tile times float activations; `zero` is the value of field 0.
#[target_feature(enable = "avx2,fma")]
pub(super) fn float<const BITS: usize>(tile: &[Line], x: &FloatRow, zero: f32, y: &mut [f32]) {
    let columns = x.format.columns;
    assert!(x.values.len() == columns.blocks() * BLOCK, "activations of these columns");
    let values: [f32; 8] = std::array::from_fn(|n| (n & ((1 << BITS) - 1)) as f32 + zero);
    // SAFETY: 8 numbers.
    let table = unsafe { _mm256_loadu_ps(values.as_ptr()) };
    tile_kernel!(tile, columns, BITS, y, |block, octet, sum| {
        let x = &x.values[block * BLOCK..][..BLOCK];
        // SAFETY: `octet` is that of a whole block, and there are 64 numbers.
        unsafe { add_block::<BITS>(octet, x.as_ptr(), table, *sum) }
    });
}

/// Adds a block of an octet to its sum.
///
/// # Safety
/// `octet` has `band_lines(BITS)` vectors, `x` points to 64 numbers.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn add_block<const BITS: usize>(octet: Octet, x: *const f32, table: __m256, sum: __m256) -> __m256 {
    // Four sums, so that one addition need not wait for another.
    let mut sums = [sum, _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()];
    // SAFETY: the caller's: below `band_lines(BITS)`.
    let vector = |v: usize| unsafe { octet.vector(v) };
    // The field of `BITS` bits at `shift` in each lane, times the activation of its column.
    let mut add = |w, shift: usize, column: usize| {
        let lane = _mm256_srlv_epi32(w, _mm256_set1_epi32(shift as i32));
        let value = match BITS {
            // These look at the low two or three bits of a lane alone.
            2 => _mm256_permutevar_ps(table, lane),
            3 => _mm256_permutevar8x32_ps(table, lane),
            _ => {
                let field = _mm256_and_si256(lane, _mm256_set1_epi32((1 << BITS) - 1));
                // The first value of the table is that of field 0.
                let zero = _mm256_permutevar8x32_ps(table, _mm256_setzero_si256());
                _mm256_add_ps(_mm256_cvtepi32_ps(field), zero)
            }
        };
        let k = column % 4;
        // SAFETY: the caller's: `column` is below 64.
        sums[k] = _mm256_fmadd_ps(value, unsafe { _mm256_set1_ps(*x.add(column)) }, sums[k]);
    };
    if BITS == 3 {
        for t in 0..2 {
            let (a, b, c) = (vector(3 * t), vector(3 * t + 1), vector(3 * t + 2));
            for (i, w) in [a, b, c, last_two(a, b, c)].into_iter().enumerate() {
                for k in 0..4 {
                    add(w, 8 * k, 32 * t + 8 * i + k);
                    add(w, 8 * k + 3, 32 * t + 8 * i + 4 + k);
                }
            }
        }
    } else {
        for v in 0..band_lines(BITS) {
            let w = vector(v);
            for k in 0..4 {
                for j in 0..8 / BITS {
                    add(w, 8 * k + BITS * j, 32 / BITS * v + 4 * j + k);
                }
            }
        }
    }
    _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]))
}

/// The last two fields of a three of vectors of 3 bits, in the places of whole ones.
#[inline]
#[target_feature(enable = "avx2")]
fn last_two(a: __m256i, b: __m256i, c: __m256i) -> __m256i {
    let piece = |w, shift, mask: i8| _mm256_and_si256(shifted16(w, shift), _mm256_set1_epi8(mask));
    let low = _mm256_or_si256(piece(a, 6, 0x03), piece(b, 3, 0x18));
    _mm256_or_si256(low, _mm256_or_si256(piece(c, 4, 0x04), piece(c, 2, 0x20)))
}

/// 16-bit lanes shifted right; the bits that cross from byte to byte are masked away by the caller.
#[inline]
#[target_feature(enable = "avx2")]
fn shifted16(w: __m256i, by: i32) -> __m256i {
    _mm256_srl_epi16(w, _mm_cvtsi32_si128(by))
}
