//! Packed weights times one row of activations, or a few: what decoding does.
//!
//! `y[o] = Σ_g step[o, g] Σ_{k in g} (code[o, k] + offset) x[k]`, with codes of 1 to 8 bits and the offset 0 or a half.
//! The codes are repacked once into a layout of the kernels' own (`layout.rs`), of 2, 3, 4 or 8 bits. The activations
//! are floats, or 8-bit codes with a scale for each block of 64 columns: then the sum within a block is exact, and every
//! instruction set gives the same bytes.
//!
//! | road | 8-bit activations | floats |
//! |---|---|---|
//! | AVX-512 | `vpdpbusd` | a table of what a code, or a pair of 2-bit codes, is worth |
//! | AVX2 | `vpmaddubsw` | a table for 2 and 3 bits, conversion for 4 and 8 |
//! | plain | one by one | one by one |
//!
//! Groups of 32 columns and more take the fast roads, best if they are a multiple of 64 wide or the whole row; smaller
//! ones take the plain road. The caller shares out ranges of rows among threads: each row's result is the same however
//! the rows are shared out.

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod columns;
mod layout;
mod plain;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub use activations::{FloatRow, Int8Row};
pub use columns::Columns;
pub use layout::TILE_ROWS;

use crate::kernels::packed::isa::Isa;
use layout::{Canonical, Line};

/// Blocks of a panel: their tables of pairs of two-bit codes, 2 KB each, stay in the first-level cache while a run of
/// tiles goes by. 12 are no faster hot and slower from memory; 16 are slower.
const PANEL: usize = 8;
/// Tiles of a run, at most. Rows of one or two panels are taken tile by tile: all their tables stay.
const RUN: usize = 16;

/// What an activation row has to be prepared for. Weights of one format can share a prepared row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Format {
    /// Bits of a field in the layout: 2, 3, 4 or 8.
    pub bits: usize,
    /// The value of field 0, in steps: a multiple of a half.
    pub zero: f32,
    /// Groups and blocks.
    pub columns: Columns,
    /// The instruction set.
    pub isa: Isa,
}

/// A weight `[rows, cols]`, repacked for products with single rows of activations.
#[derive(Clone)]
pub struct GemvWeights {
    format: Format,
    rows: usize,
    store: Store,
}

#[derive(Clone)]
enum Store {
    /// Tile after tile, each of `layout::tile_lines`.
    Tiles(Vec<Line>),
    /// As they came.
    Plain { bits: usize, codes: Vec<u8>, step: Vec<f32> },
}

/// The kernel of a tile, or of a run of them: the tiles, a prepared row, the value of field 0; writes a product
/// for each row.
type Kernel<X> = unsafe fn(&[Line], &X, f32, &mut [f32]);

impl std::fmt::Debug for GemvWeights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut out = f.debug_struct("GemvWeights");
        out.field("format", &self.format).field("rows", &self.rows).finish_non_exhaustive()
    }
}

impl GemvWeights {
    /// Repacks `codes`, the fields `code - lo` of `bits` bits, least significant first, every row from a byte on.
    ///
    /// `half`: values sit half a step above their code. `group`: columns that share a step, the last group of a row
    /// excepted; `cols` or more where a row has one step. `step: [rows, groups]`, row-major. `isa` must be one that the
    /// processor has.
    pub fn new(
        (bits, lo, half): (u8, i32, bool),
        cols: usize,
        group: usize,
        codes: &[u8],
        step: &[f32],
        isa: Isa,
    ) -> Self {
        let given = usize::from(bits);
        assert!((1..=8).contains(&given), "{bits} bits per code");
        // Halves below 2^23: the sums of a block of 8-bit activations are then exact in f32.
        assert!(lo.abs() <= 256, "lowest code {lo}");
        assert!(isa.is_available(), "{isa:?} on this processor");
        let columns = Columns::new(cols, group);
        let rows = step.len() / columns.groups();
        assert_eq!(step.len(), rows * columns.groups(), "steps of whole rows");
        assert_eq!(codes.len(), rows * layout::row_bytes(cols, given), "bytes of {rows} rows");
        let bits = match given {
            1 | 2 => 2,
            3 | 4 => given,
            _ => 8,
        };
        let zero = lo as f32 + if half { 0.5 } else { 0.0 };
        let store = if isa == Isa::Scalar || !columns.tiled() {
            Store::Plain { bits: given, codes: codes.to_vec(), step: step.to_vec() }
        } else {
            let each = layout::tile_lines(bits, columns);
            let mut lines = vec![Line([0; 64]); rows.div_ceil(TILE_ROWS) * each];
            for (tile, lines) in lines.chunks_exact_mut(each).enumerate() {
                layout::fill_tile(tile, bits, columns, Canonical { bits: given, codes, step }, lines);
            }
            Store::Tiles(lines)
        };
        GemvWeights { format: Format { bits, zero, columns, isa }, rows, store }
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.format.columns.cols()
    }

    /// Bytes that a product reads of the weight, steps included.
    pub fn bytes(&self) -> usize {
        match &self.store {
            Store::Tiles(lines) => std::mem::size_of_val(lines.as_slice()),
            Store::Plain { codes, step, .. } => codes.len() + std::mem::size_of_val(step.as_slice()),
        }
    }

    /// What a row of activations has to be prepared for.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Makes `x: [cols]` ready for [`GemvWeights::times`], in the buffers that `row` has.
    pub fn prepare(&self, x: &[f32], row: &mut FloatRow) {
        row.fill(self.format, x);
    }

    /// Quantizes `x: [cols]` for [`GemvWeights::times_int8`], into the buffers that `row` has.
    pub fn prepare_int8(&self, x: &[f32], row: &mut Int8Row) {
        row.quantize(self.format.columns, x, self.format.isa);
    }

    /// `y: [x.len(), rows.len()]`: the products of some rows of the weight with each of a few rows of floats.
    ///
    /// `rows` starts at a multiple of [`TILE_ROWS`] and ends at one or at the last row.
    pub fn times(&self, x: &[FloatRow], y: &mut [f32], rows: Range<usize>) {
        assert!(x.iter().all(|x| x.format == self.format), "rows prepared for another format");
        let Format { bits, isa, columns, .. } = self.format;
        let paneled = isa == Isa::Avx512 && bits == 2 && columns.blocks() > 2 * PANEL;
        let run = if paneled { RUN } else { 1 };
        #[cfg(target_arch = "x86_64")]
        let kernel: Option<Kernel<FloatRow>> = match (isa, bits) {
            (Isa::Avx512, 2) if paneled => Some(avx512::float_pairs),
            (Isa::Avx512, 2) => Some(avx512::float::<2>),
            (Isa::Avx512, 3) => Some(avx512::float::<3>),
            (Isa::Avx512, 4) => Some(avx512::float::<4>),
            (Isa::Avx512, _) => Some(avx512::float::<8>),
            (Isa::Avx2, 2) => Some(avx2::float::<2>),
            (Isa::Avx2, 3) => Some(avx2::float::<3>),
            (Isa::Avx2, 4) => Some(avx2::float::<4>),
            (Isa::Avx2, _) => Some(avx2::float::<8>),
            (Isa::Scalar, _) => None,
        };
        #[cfg(not(target_arch = "x86_64"))]
        let kernel: Option<Kernel<FloatRow>> = None;
        self.each_run(kernel, run, plain::float, x, y, rows);
    }

    /// `y: [x.len(), rows.len()]`: the products of some rows of the weight with each of a few rows of 8-bit activations.
    ///
    /// `rows` starts at a multiple of [`TILE_ROWS`] and ends at one or at the last row.
    pub fn times_int8(&self, x: &[Int8Row], y: &mut [f32], rows: Range<usize>) {
        assert!(x.iter().all(|x| x.columns == self.format.columns), "rows prepared for other columns");
        let Format { bits, isa, .. } = self.format;
        #[cfg(target_arch = "x86_64")]
        let kernel: Option<Kernel<Int8Row>> = match (isa, bits) {
            (Isa::Avx512, 2) => Some(avx512::int8::<2>),
            (Isa::Avx512, 3) => Some(avx512::int8::<3>),
            (Isa::Avx512, 4) => Some(avx512::int8::<4>),
            (Isa::Avx512, _) => Some(avx512::int8::<8>),
            (Isa::Avx2, 2) => Some(avx2::int8::<2>),
            (Isa::Avx2, 3) => Some(avx2::int8::<3>),
            (Isa::Avx2, 4) => Some(avx2::int8::<4>),
            (Isa::Avx2, _) => Some(avx2::int8::<8>),
            (Isa::Scalar, _) => None,
        };
        #[cfg(not(target_arch = "x86_64"))]
        let kernel: Option<Kernel<Int8Row>> = None;
        self.each_run(kernel, 1, plain::int8, x, y, rows);
    }

    /// `run`: tiles that the kernel takes at once.
    fn each_run<X>(
        &self,
        kernel: Option<Kernel<X>>,
        run: usize,
        plain: fn(Format, Canonical, usize, &X, &mut [f32]),
        x: &[X],
        y: &mut [f32],
        rows: Range<usize>,
    ) {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        let whole = rows.start.is_multiple_of(TILE_ROWS)
            && (rows.end.is_multiple_of(TILE_ROWS) || rows.end == self.rows);
        assert!(whole || rows.is_empty(), "rows {rows:?} in tiles of {TILE_ROWS}");
        assert_eq!(y.len(), x.len() * rows.len(), "products");
        if rows.is_empty() {
            return;
        }
        match (&self.store, kernel) {
            (Store::Tiles(lines), Some(kernel)) => {
                let each = layout::tile_lines(self.format.bits, self.format.columns);
                for first in rows.clone().step_by(run * TILE_ROWS) {
                    let count = (rows.end - first).div_ceil(TILE_ROWS).min(run);
                    let tiles = &lines[first / TILE_ROWS * each..][..count * each];
                    // The tiles come from memory once for all rows of activations.
                    for (x, y) in x.iter().zip(y.chunks_exact_mut(rows.len())) {
                        let y = &mut y[first - rows.start..];
                        // SAFETY: `format.isa`, whose kernel this is, is available: `new` asserted it.
                        let kernel = |y: &mut [f32]| unsafe { kernel(tiles, x, self.format.zero, y) };
                        if let Some(y) = y.get_mut(..count * TILE_ROWS) {
                            kernel(y);
                        } else {
                            let mut out = [0f32; RUN * TILE_ROWS];
                            kernel(&mut out[..count * TILE_ROWS]);
                            y.copy_from_slice(&out[..y.len()]);
                        }
                    }
                }
            }
            (Store::Plain { bits, codes, step }, _) => {
                let from = Canonical { bits: *bits, codes, step };
                for (x, y) in x.iter().zip(y.chunks_exact_mut(rows.len())) {
                    plain(self.format, from, rows.start, x, y);
                }
            }
            (Store::Tiles(_), None) => unreachable!("tiles are made only for a set that has kernels"),
        }
    }
}
