//! A matrix of codes in panels for `vpdpbusd`, and its product with activation codes on AVX512.
//!
//! A line of 64 bytes is a quad of four columns of 16 rows; a panel is up to four such groups of rows, its lines
//! quad by quad. A tile takes six tokens through a panel: 24 accumulators, four loads of weights and six
//! broadcasts for 24 products of 64 bytes. Rows and columns that only fill up are zeros.

use std::arch::x86_64::*;
use std::ops::Range;

use super::codes::CodesRef;
use super::product::{Elements, ROWS};

/// Groups of rows that a panel takes at most.
const GROUPS: usize = 4;
/// Tokens of a tile.
const TOKENS: usize = 6;
/// Columns of a quad.
pub(super) const QUAD: usize = 4;

/// Four columns of 16 rows.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// The codes of a matrix `[rows, cols]`, each a signed byte.
#[derive(Clone, Debug)]
pub(super) struct Panels {
    groups: usize,
    quads: usize,
    lines: Vec<Line>,
}

/// The sizes of `groups` groups cut into panels, nearly even: a panel of one group would wait for its few sums.
fn panels(groups: usize) -> impl Iterator<Item = Range<usize>> {
    let count = groups.div_ceil(GROUPS).max(1);
    (0..count).map(move |panel| panel * groups / count..(panel + 1) * groups / count)
}

impl Panels {
    /// The fields of a matrix plus their lowest code, and the sum of each row's codes, rows filled up. The matrix
    /// lies within the elements.
    ///
    /// # Safety
    ///
    /// The processor has AVX512 F, BW and VNNI.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub fn new(rows: usize, cols: usize, of: Elements<'_>) -> (Panels, Vec<i32>) {
        let (groups, quads) = (rows.div_ceil(ROWS), cols.div_ceil(QUAD));
        let lo = of.lo as u8;
        // What is not written is zero once the lowest code is added.
        let mut lines = vec![Line([lo.wrapping_neg(); 64]); groups * quads];
        let mut sums = vec![0i32; groups * ROWS];
        let mut start = 0;
        for panel in panels(groups) {
            let lines = &mut lines[start * quads..][..panel.len() * quads];
            start += panel.len();
            for (g, group) in panel.clone().enumerate() {
                let count = (rows - group * ROWS).min(ROWS);
                let mut sum = _mm512_setzero_si512();
                for quad in 0..quads {
                    let line = &mut lines[quad * panel.len() + g].0;
                    let at = group * ROWS * of.rs + quad * QUAD * of.cs;
                    let width = (cols - quad * QUAD).min(QUAD);
                    match (of.rs, of.cs, count, width) {
                        (_, 1, _, QUAD) => {
                            for (r, four) in line.chunks_exact_mut(QUAD).enumerate().take(count) {
                                four.copy_from_slice(&of.fields[at + r * of.rs..][..QUAD]);
                            }
                        }
                        (1, _, ROWS, QUAD) => interleave(&of.fields[at..], of.cs, line),
                        _ => {
                            for r in 0..count {
                                for c in 0..width {
                                    line[r * QUAD + c] = of.fields[at + r * of.rs + c * of.cs];
                                }
                            }
                        }
                    }
                    // SAFETY: a line has 64 bytes.
                    unsafe {
                        let codes = _mm512_loadu_si512(line.as_ptr().cast());
                        let codes = _mm512_add_epi8(codes, _mm512_set1_epi8(lo as i8));
                        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), codes);
                        _mm512_storeu_si512(line.as_mut_ptr().cast(), codes);
                    }
                }
                let sums = &mut sums[group * ROWS..][..ROWS];
                // SAFETY: the slice has 16 sums.
                unsafe { _mm512_storeu_si512(sums.as_mut_ptr().cast(), sum) };
            }
        }
        (Panels { groups, quads, lines }, sums)
    }

    /// Bytes of a token that are read.
    pub fn width(&self) -> usize {
        self.quads * QUAD
    }

    /// `out[t, r] = Σ_k a[t, k] w[r, k]`, or twice that and the token's sum where `half`; rows of `out` are all the
    /// groups' rows. `sums` are those of [`Panels::new`].
    ///
    /// # Safety
    ///
    /// The processor has AVX512 F, BW and VNNI.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub fn product(&self, a: CodesRef<'_>, sums: &[i32], half: bool, out: &mut [i32]) {
        let (rows, tokens) = (self.groups * ROWS, a.tokens);
        assert!(a.holds(self.width()), "codes: a short buffer");
        assert!(
            out.len() == tokens * rows && sums.len() == rows && self.lines.len() == self.groups * self.quads
        );
        assert!(!half || a.sums.len() == tokens);
        for panel in panels(self.groups) {
            for first in (0..tokens).step_by(TOKENS) {
                let tile = Tile {
                    a: a.fields[first * a.stride..].as_ptr(),
                    a_stride: a.stride,
                    lo: a.lo,
                    w: self.lines[panel.start * self.quads..].as_ptr(),
                    quads: self.quads,
                    sums: sums[panel.start * ROWS..].as_ptr(),
                    half: if half { a.sums[first..].as_ptr() } else { std::ptr::null() },
                    out: out[first * rows + panel.start * ROWS..].as_mut_ptr(),
                    out_stride: rows,
                };
                // SAFETY: the assertions: every token of the tile has `4 quads` bytes and a sum, every group its
                // lines, its sums of rows, and 16 results of each token.
                unsafe { tile.run((tokens - first).min(TOKENS), panel.len()) };
            }
        }
    }
}

/// 16 fields of four columns, row by row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn interleave(fields: &[u8], stride: usize, line: &mut [u8; 64]) {
    let column = |c: usize| -> *const __m128i { fields[c * stride..][..ROWS].as_ptr().cast() };
    // SAFETY: each slice above has 16 bytes, a line four times as many.
    unsafe {
        let (a, b) = (_mm_loadu_si128(column(0)), _mm_loadu_si128(column(1)));
        let (c, d) = (_mm_loadu_si128(column(2)), _mm_loadu_si128(column(3)));
        let (ab, cd) = (_mm_unpacklo_epi8(a, b), _mm_unpacklo_epi8(c, d));
        let (ab_high, cd_high) = (_mm_unpackhi_epi8(a, b), _mm_unpackhi_epi8(c, d));
        let out = line.as_mut_ptr().cast::<__m128i>();
        _mm_storeu_si128(out, _mm_unpacklo_epi16(ab, cd));
        _mm_storeu_si128(out.add(1), _mm_unpackhi_epi16(ab, cd));
        _mm_storeu_si128(out.add(2), _mm_unpacklo_epi16(ab_high, cd_high));
        _mm_storeu_si128(out.add(3), _mm_unpackhi_epi16(ab_high, cd_high));
    }
}

/// Some tokens times the groups of a panel.
struct Tile {
    a: *const u8,
    a_stride: usize,
    lo: i32,
    w: *const Line,
    quads: usize,
    sums: *const i32,
    half: *const i32,
    out: *mut i32,
    out_stride: usize,
}

impl Tile {
    /// # Safety
    ///
    /// The processor has AVX512 F, BW and VNNI; `tokens` tokens, up to [`TOKENS`], have `4 quads` bytes and, unless
    /// `half` is null, a sum; `groups` groups, up to [`GROUPS`], have their lines, 16 sums, and results of each token.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn run(&self, tokens: usize, groups: usize) {
        macro_rules! table {
            ($($t:literal),*; $gs:tt) => { match tokens { $($t => table!(@ $t $gs),)* _ => {} } };
            (@ $t:literal ($($g:literal),*)) => {
                // SAFETY: the caller's word, for this many tokens and groups.
                match groups { $($g => unsafe { self.sums::<$t, $g>() },)* _ => {} }
            };
        }
        table!(1, 2, 3, 4, 5, 6; (1, 2, 3, 4));
    }

    /// # Safety
    ///
    /// As [`Tile::run`] for `T` tokens and `G` groups.
    // Counted loops over arrays of known sizes are unrolled whole: the accumulators stay in registers.
    #[allow(clippy::needless_range_loop)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn sums<const T: usize, const G: usize>(&self) {
        // SAFETY: the caller's word, element by element.
        unsafe {
            let mut acc = [[_mm512_setzero_si512(); G]; T];
            let lo = _mm512_set1_epi32(self.lo);
            for g in 0..G {
                let seed = _mm512_mullo_epi32(lo, _mm512_loadu_si512(self.sums.add(ROWS * g).cast()));
                for acc in &mut acc {
                    acc[g] = seed;
                }
            }
            for quad in 0..self.quads {
                let mut w = [_mm512_setzero_si512(); G];
                for g in 0..G {
                    w[g] = _mm512_load_si512(self.w.add(quad * G + g).cast());
                }
                for t in 0..T {
                    let a = self.a.add(t * self.a_stride + QUAD * quad).cast::<i32>().read_unaligned();
                    let a = _mm512_set1_epi32(a);
                    for g in 0..G {
                        acc[t][g] = _mm512_dpbusd_epi32(acc[t][g], a, w[g]);
                    }
                }
            }
            for t in 0..T {
                for g in 0..G {
                    let mut sum = acc[t][g];
                    if !self.half.is_null() {
                        sum = _mm512_add_epi32(
                            _mm512_add_epi32(sum, sum),
                            _mm512_set1_epi32(*self.half.add(t)),
                        );
                    }
                    _mm512_storeu_si512(self.out.add(t * self.out_stride + ROWS * g).cast(), sum);
                }
            }
        }
    }
}
