//! The private layout of the weights: tiles of rows, each one linear stream.
//!
//! A tile has [`TILE_ROWS`] rows, in bands of 16. Its stream is, group by group, the blocks of the group and then
//! the group's steps, one f32 a row. A block is, band by band, vectors of 64 bytes: byte `4 r + k` belongs to row `r`
//! of the band and to columns that are `k` modulo 4, so that a 32-bit lane is one row and `vpdpbusd` with four
//! activations in every lane needs no sum across lanes. A byte holds fields (`code - lo`) of these columns of the block:
//!
//! | bits | vectors | vector `v`, byte `k` |
//! |---|---|---|
//! | 2 | 4 | columns `16 v + 4 j + k` for `j` in 0..4 at bit `2 j` |
//! | 4 | 8 | columns `8 v + 4 j + k` for `j` in 0..2 at bit `4 j` |
//! | 8 | 16 | column `4 v + k` |
//! | 3 | 6, two threes | below |
//!
//! Three vectors A, B, C of three bits hold eight fields `F0..F7` for each row and `k`, `Fj` of column
//! `32 t + 4 j + k` in the `t`-th three: two whole fields a byte, and in the two bits left over the last two in pieces.
//! A is `F0 | F1 << 3 | F6 (low two) << 6`, B is `F2 | F3 << 3 | F7 (low two) << 6`, C is `F4 | F5 << 3 | F6 (high) << 6 |
//! F7 (high) << 7`. All widths but one of 3 are thus as long as their bits, and 3 is too.

use super::columns::{Columns, BLOCK};

/// Rows of a tile. A thread's rows start at a multiple of it.
///
/// Two bands share the loads of activations, and of the tables of two-bit weights, which are as wide as the weights
/// are short.
pub const TILE_ROWS: usize = 32;
/// Rows of a band: the 32-bit lanes of a vector.
pub(super) const BAND: usize = 16;
/// Bands of a tile.
pub(super) const BANDS: usize = TILE_ROWS / BAND;

/// A cache line, and an AVX-512 vector.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub [u8; 64]);

/// Lines of the codes of one band of a block.
pub(super) const fn band_lines(bits: usize) -> usize {
    2 * bits
}

/// Lines of a tile: its codes, and a line of steps for each band and group.
pub(super) fn tile_lines(bits: usize, columns: Columns) -> usize {
    BANDS * (columns.blocks() * band_lines(bits) + columns.groups())
}

/// Rows as they come: packed bit by bit, least significant first, each row from a byte on.
#[derive(Clone, Copy)]
pub(super) struct Canonical<'a> {
    pub bits: usize,
    pub codes: &'a [u8],
    /// `[rows, groups]`.
    pub step: &'a [f32],
}

/// Bytes of a row as it comes.
pub(super) fn row_bytes(cols: usize, bits: usize) -> usize {
    (cols * bits).div_ceil(8)
}

/// Calls `each` with the number and the value of the first `count` fields of a row.
#[inline(always)]
pub(super) fn fields(bits: usize, row: &[u8], count: usize, mut each: impl FnMut(usize, u8)) {
    let (mut buffer, mut filled) = (0u32, 0usize);
    let mut row = row.iter();
    let mask = (1u32 << bits) - 1;
    for i in 0..count {
        if filled < bits {
            buffer |= u32::from(row.next().copied().unwrap_or(0)) << filled;
            filled += 8;
        }
        each(i, (buffer & mask) as u8);
        (buffer, filled) = (buffer >> bits, filled - bits);
    }
}

/// Fills tile number `tile`, all of zeros before, from the rows that it has. `bits` is the width in the tile, at least
/// that of the rows. Rows past the last have steps of 0.
pub(super) fn fill_tile(tile: usize, bits: usize, columns: Columns, from: Canonical, lines: &mut [Line]) {
    let bytes = row_bytes(columns.cols(), from.bits);
    let rows = from.step.len() / columns.groups();
    let first = tile * TILE_ROWS;
    let mut row = vec![0u8; columns.cols()];
    for r in 0..TILE_ROWS.min(rows - first) {
        fields(from.bits, &from.codes[(first + r) * bytes..][..bytes], columns.cols(), |i, f| row[i] = f);
        let (band, lane) = (r / BAND, r % BAND);
        let steps = &from.step[(first + r) * columns.groups()..][..columns.groups()];
        let mut at = 0;
        let mut ranges = columns.ranges();
        for (group, step) in steps.iter().enumerate() {
            for range in columns.blocks_of(group).filter_map(|_| ranges.next()) {
                let mut block = [0u8; BLOCK];
                block[..range.len()].copy_from_slice(&row[range]);
                let width = band_lines(bits);
                let lines = &mut lines[at + band * width..][..width];
                fill_lane(bits, &block, lane, lines);
                at += BANDS * width;
            }
            lines[at + band].0[4 * lane..][..4].copy_from_slice(&step.to_le_bytes());
            at += BANDS;
        }
    }
}

/// Writes the fields of one row of a block into its lane.
fn fill_lane(bits: usize, block: &[u8; BLOCK], lane: usize, lines: &mut [Line]) {
    let of = |line: usize, j: usize, k: usize| block[line * (32 / bits) + 4 * j + k];
    if bits == 3 {
        for (t, three) in lines.chunks_exact_mut(3).enumerate() {
            for k in 0..4 {
                let f = |j: usize| block[32 * t + 4 * j + k];
                three[0].0[4 * lane + k] = f(0) | f(1) << 3 | f(6) << 6;
                three[1].0[4 * lane + k] = f(2) | f(3) << 3 | f(7) << 6;
                three[2].0[4 * lane + k] = f(4) | f(5) << 3 | (f(6) & 4) << 4 | (f(7) & 4) << 5;
            }
        }
        return;
    }
    for (i, line) in lines.iter_mut().enumerate() {
        for k in 0..4 {
            line.0[4 * lane + k] = (0..8 / bits).fold(0, |byte, j| byte | of(i, j, k) << (bits * j));
        }
    }
}
