//! Products of a few rows of activations, as in decoding: the weight is read once, as codes.

use std::cell::RefCell;
use std::ops::Range;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape};
use rayon::prelude::*;

use super::gemv::{FloatRow, GemvWeights, Int8Row, TILE_ROWS};
use super::rows::PackedRows;
use super::slice;
use crate::kernels::rows::with_last;

/// Blocks of up to `block` columns, each row-major, one after another: as one row-major matrix.
fn gather(blocks: Vec<f32>, rows: usize, cols: usize, block: usize) -> Vec<f32> {
    if rows <= 1 || cols <= block {
        return blocks;
    }
    let mut whole = vec![0f32; blocks.len()];
    for (i, part) in blocks.chunks(block * rows).enumerate() {
        let width = part.len() / rows;
        for (whole, part) in whole.chunks_exact_mut(cols).zip(part.chunks_exact(width)) {
            whole[i * block..i * block + width].copy_from_slice(part);
        }
    }
    whole
}

/// Bytes of the weight that one task takes of a product with few rows. Whom a row falls to does not show in it.
const SHARE: usize = 1 << 19;

thread_local! {
    static FLOATS: RefCell<Vec<FloatRow>> = const { RefCell::new(Vec::new()) };
    static CODES: RefCell<Vec<Int8Row>> = const { RefCell::new(Vec::new()) };
}

/// `y [tokens, out]` of few tokens: `times` gives the products of a range of rows, `[tokens, rows of the range]`.
fn share_out(
    weight: &GemvWeights,
    tokens: usize,
    times: impl Fn(&mut [f32], Range<usize>) + Sync,
) -> Vec<f32> {
    let n = weight.rows();
    let each = (SHARE * n / weight.bytes().max(1)).next_multiple_of(TILE_ROWS).max(TILE_ROWS);
    let mut y = vec![0f32; tokens * n];
    if each >= n {
        times(&mut y, 0..n);
        return y;
    }
    y.par_chunks_mut(each * tokens).enumerate().for_each(|(i, y)| {
        times(y, i * each..i * each + y.len() / tokens);
    });
    gather(y, tokens, n, each)
}

/// The product of a few rows of activations, as floats.
pub(in crate::kernels) fn decode(x: &[f32], rows: &PackedRows) -> Vec<f32> {
    let weight = rows.repacked();
    let tokens = x.len() / rows.cols;
    // Taken out, not borrowed: a task that this thread steals meanwhile may come here too.
    let mut held = FLOATS.with(RefCell::take);
    if held.len() < tokens {
        held.resize_with(tokens, FloatRow::default);
    }
    for (x, row) in x.chunks_exact(rows.cols).zip(&mut held) {
        weight.prepare(x, row);
    }
    let row = &held[..tokens];
    let y = share_out(weight, tokens, |y, range| weight.times(row, y, range));
    FLOATS.with(|place| place.replace(held));
    y
}

/// The same of activations rounded to 8 bits, with a scale for each block of 64 columns.
fn decode_int8(x: &[f32], rows: &PackedRows) -> Vec<f32> {
    let weight = rows.repacked();
    let tokens = x.len() / rows.cols;
    // Taken out, not borrowed: a task that this thread steals meanwhile may come here too.
    let mut held = CODES.with(RefCell::take);
    if held.len() < tokens {
        held.resize_with(tokens, Int8Row::default);
    }
    for (x, row) in x.chunks_exact(rows.cols).zip(&mut held) {
        weight.prepare_int8(x, row);
    }
    let row = &held[..tokens];
    let y = share_out(weight, tokens, |y, range| weight.times_int8(row, y, range));
    CODES.with(|place| place.replace(held));
    y
}

/// x, of few rows, to y by way of 8 bits.
pub(super) struct RoundedMatmul(pub PackedRows);

impl CustomOp1 for RoundedMatmul {
    fn name(&self) -> &'static str {
        "packed-matmul-int8"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = decode_int8(slice(x, layout)?, &self.0);
        Ok((CpuStorage::F32(y), with_last(layout, self.0.rows())))
    }
}
