//! A weight that is itself an activation, as keys and values are in attention: laid out in panels on the fly.
//!
//! Nothing is packed here, so the work is a transposition: of blocks of 16 rows of 16 quads where a row's columns lie
//! together, and of the four bytes of a quad where its columns lie `stride` apart.

use super::lines::{bytes_mut, Line};
use super::panels::{Shape, Width, GROUP, PANEL, QUAD};
use crate::kernels::packed::isa::Isa;

/// Where the codes of a matrix lie.
#[derive(Clone, Copy)]
pub(super) struct Codes<'a> {
    pub bytes: &'a [u8],
    pub stride: usize,
    /// Bits to turn over for a signed code.
    pub flip: u8,
    /// Whether row `r`, column `c` is at `c stride + r` and not at `r stride + c`.
    pub columns: bool,
}

/// The panels of the codes, 8 bits each, and the sums of each row of them, for whole groups of rows.
pub(super) fn panels(rows: usize, cols: usize, codes: Codes, isa: Isa) -> (Shape, Vec<Line>, Vec<i32>) {
    let shape = Shape { rows, cols, width: Width::Eight };
    let (outer, inner) = if codes.columns { (cols, rows) } else { (rows, cols) };
    assert!(outer == 0 || inner <= codes.stride && codes.bytes.len() >= (outer - 1) * codes.stride + inner);
    let mut lines = vec![Line::ZERO; shape.start(shape.panels())];
    let mut sums = vec![0i32; rows.next_multiple_of(GROUP)];
    for panel in 0..shape.panels() {
        let lines = &mut lines[shape.start(panel)..shape.start(panel + 1)];
        let groups = shape.groups(panel);
        let sums = &mut sums[panel * PANEL..][..groups * GROUP];
        match (isa, codes.columns) {
            // SAFETY: the caller checked that the processor has the set.
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, false) => unsafe { avx512::rows(codes, shape, panel, lines, sums) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, true) => unsafe { avx512::columns(codes, shape, panel, lines, sums) },
            _ => plain(codes, shape, panel, lines, sums),
        }
    }
    (shape, lines, sums)
}

/// The oracle of a panel.
fn plain(codes: Codes, shape: Shape, panel: usize, lines: &mut [Line], sums: &mut [i32]) {
    let groups = shape.groups(panel);
    let out = bytes_mut(lines);
    for r in 0..(shape.rows - panel * PANEL).min(PANEL) {
        let row = panel * PANEL + r;
        for c in 0..shape.cols {
            let at = if codes.columns { c * codes.stride + row } else { row * codes.stride + c };
            let code = codes.bytes[at] ^ codes.flip;
            out[((c / QUAD * groups + r / GROUP) * GROUP + r % GROUP) * QUAD + c % QUAD] = code;
            sums[r] += i32::from(code as i8);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{Codes, Line, Shape, GROUP, PANEL, QUAD};

    fn first(count: usize) -> u64 {
        if count < 64 {
            (1 << count) - 1
        } else {
            !0
        }
    }

    /// Up to 64 codes at a place, zeros behind them.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn load(codes: Codes, at: usize, count: usize) -> __m512i {
        let flip = _mm512_set1_epi8(codes.flip as i8);
        let source = &codes.bytes[at..at + count];
        // SAFETY: the mask leaves out what lies behind the slice.
        let found = unsafe { _mm512_mask_loadu_epi8(flip, first(source.len()), source.as_ptr().cast()) };
        _mm512_xor_si512(found, flip)
    }

    /// Adds each lane's four codes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    fn add(sum: __m512i, codes: __m512i) -> __m512i {
        _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), codes)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store(line: &mut Line, codes: __m512i) {
        // SAFETY: a line is 64 bytes, aligned.
        unsafe { _mm512_store_si512(line.0.as_mut_ptr().cast(), codes) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store_sums(sums: &mut [i32], sum: __m512i) {
        let sums = &mut sums[..GROUP];
        // SAFETY: the slice has 16 entries.
        unsafe { _mm512_storeu_si512(sums.as_mut_ptr().cast(), sum) }
    }

    /// A panel of rows whose columns lie together.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub(super) fn rows(codes: Codes, shape: Shape, panel: usize, lines: &mut [Line], sums: &mut [i32]) {
        let groups = shape.groups(panel);
        for g in 0..groups {
            let row = panel * PANEL + g * GROUP;
            let mut sum = _mm512_setzero_si512();
            for col in (0..shape.cols).step_by(64) {
                let count = (shape.cols - col).min(64);
                let mut block = [_mm512_setzero_si512(); 16];
                for (r, block) in block.iter_mut().enumerate().take(shape.rows - row) {
                    *block = load(codes, (row + r) * codes.stride + col, count);
                }
                let block = transpose(block);
                let quads = lines[col / QUAD * groups..].chunks_mut(groups);
                for (line, quad) in quads.zip(block) {
                    store(&mut line[g], quad);
                    sum = add(sum, quad);
                }
            }
            store_sums(&mut sums[g * GROUP..], sum);
        }
    }

    /// 16 registers of 16 lanes, the other way round.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn transpose(x: [__m512i; 16]) -> [__m512i; 16] {
        // Within each 128-bit part: t[4i + j] has lane j of rows 4i..4i + 4.
        let mut t = x;
        for i in 0..4 {
            let (ab_low, ab_high) = (
                _mm512_unpacklo_epi32(x[4 * i], x[4 * i + 1]),
                _mm512_unpackhi_epi32(x[4 * i], x[4 * i + 1]),
            );
            let (cd_low, cd_high) = (
                _mm512_unpacklo_epi32(x[4 * i + 2], x[4 * i + 3]),
                _mm512_unpackhi_epi32(x[4 * i + 2], x[4 * i + 3]),
            );
            t[4 * i] = _mm512_unpacklo_epi64(ab_low, cd_low);
            t[4 * i + 1] = _mm512_unpackhi_epi64(ab_low, cd_low);
            t[4 * i + 2] = _mm512_unpacklo_epi64(ab_high, cd_high);
            t[4 * i + 3] = _mm512_unpackhi_epi64(ab_high, cd_high);
        }
        // Then the 128-bit parts: part p of t[4i + j] is lane 4p + j of rows 4i..4i + 4.
        let mut out = t;
        for j in 0..4 {
            let parts = parts([t[j], t[4 + j], t[8 + j], t[12 + j]]);
            for (p, part) in parts.into_iter().enumerate() {
                out[4 * p + j] = part;
            }
        }
        out
    }

    /// Four registers of four 128-bit parts, the other way round.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn parts(x: [__m512i; 4]) -> [__m512i; 4] {
        let (ab_low, ab_high) =
            (_mm512_shuffle_i32x4::<0x44>(x[0], x[1]), _mm512_shuffle_i32x4::<0xee>(x[0], x[1]));
        let (cd_low, cd_high) =
            (_mm512_shuffle_i32x4::<0x44>(x[2], x[3]), _mm512_shuffle_i32x4::<0xee>(x[2], x[3]));
        [
            _mm512_shuffle_i32x4::<0x88>(ab_low, cd_low),
            _mm512_shuffle_i32x4::<0xdd>(ab_low, cd_low),
            _mm512_shuffle_i32x4::<0x88>(ab_high, cd_high),
            _mm512_shuffle_i32x4::<0xdd>(ab_high, cd_high),
        ]
    }

    /// A panel of rows that lie together, column by column.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub(super) fn columns(codes: Codes, shape: Shape, panel: usize, lines: &mut [Line], sums: &mut [i32]) {
        let groups = shape.groups(panel);
        let row = panel * PANEL;
        let count = (shape.rows - row).min(PANEL);
        let mut sum = [_mm512_setzero_si512(); PANEL / GROUP];
        for (quad, lines) in lines.chunks_exact_mut(groups).enumerate() {
            let mut x = [_mm512_setzero_si512(); QUAD];
            for (i, x) in x.iter_mut().enumerate().take(shape.cols - quad * QUAD) {
                *x = load(codes, (quad * QUAD + i) * codes.stride + row, count);
            }
            let (ab_low, ab_high) = (_mm512_unpacklo_epi8(x[0], x[1]), _mm512_unpackhi_epi8(x[0], x[1]));
            let (cd_low, cd_high) = (_mm512_unpacklo_epi8(x[2], x[3]), _mm512_unpackhi_epi8(x[2], x[3]));
            // Part p of the i-th: rows 16p + 4i and the three after.
            let lanes = parts([
                _mm512_unpacklo_epi16(ab_low, cd_low),
                _mm512_unpackhi_epi16(ab_low, cd_low),
                _mm512_unpacklo_epi16(ab_high, cd_high),
                _mm512_unpackhi_epi16(ab_high, cd_high),
            ]);
            for ((line, lane), sum) in lines.iter_mut().zip(lanes).zip(&mut sum) {
                store(line, lane);
                *sum = add(*sum, lane);
            }
        }
        for (g, sum) in sum.into_iter().enumerate().take(groups) {
            store_sums(&mut sums[g * GROUP..], sum);
        }
    }
}
