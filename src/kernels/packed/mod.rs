//! Products with packed weights.
//!
//! `y[t, o] = Σ_k x[t, k] step[o, k / group] (code[o, k] + offset)` for float activations, and the bare
//! integer sum `Σ_k q[t, k] (2 code[o, k] + 1)` (or `Σ q code` on a grid with a zero) for activations that
//! are codes themselves, where a row has one step. `x: [.., in]`, codes `[out, in]` packed,
//! `y: [.., out]`, f32.
//!
//! The weight is unpacked by blocks of rows into a buffer that stays in cache, never as a whole; so
//! too in the backward pass, which gives `dx = dy · W` and nothing for the frozen weight. Many tokens
//! are shared out among the threads; of few, the weight is: its rows forward, its columns backward.

mod codes;
pub mod edges;
pub mod gemm8;
pub mod gemv;
mod isa;
#[cfg(target_arch = "x86_64")]
mod panels;
mod product;
mod rows;
pub mod table;

use crate::kernels::tape::{self, Reads};
use std::cell::RefCell;
use std::ops::Range;

use candle_core::{bail, CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

pub use codes::{code_stride, codes_len, Codes, CodesRef};
pub use isa::Isa;
pub use product::{CodeMatrix, Elements};
pub use rows::{Groups, PackedRows};

use super::fake_quant::{Levels, SCALE_FLOOR};
use super::linear::{add_product, product, View};
use gemm8::Tokens;
use gemv::{FloatRow, GemvWeights, Int8Row, TILE_ROWS};
use table::Scales;

/// Rows of activations that one task takes through all the weight.
const TOKENS: usize = 256;
/// Rows of the weight that are unpacked at a time.
const ROWS: usize = 64;
/// Columns of the weight that one task takes backward where there are few tokens: whole bytes at any width.
const COLUMNS: usize = 256;
/// Whole numbers below this are exact in f32, whatever the order of a sum of them.
const EXACT: i64 = 1 << 24;

/// `x [tokens, in] · W^T` with the rows of `W` given by `unpack`.
fn forward(x: &[f32], rows: &PackedRows, unpack: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let (n, k) = (rows.rows(), rows.cols);
    let tokens = x.len() / k;
    // `x` times `count` rows of the weight from `start` on, unpacked into `block`.
    let turn =
        |(start, count): (usize, usize), x: &[f32], block: &mut [f32], y: &mut [f32], stride: usize| {
            for (row, out) in block.chunks_exact_mut(k).take(count).enumerate() {
                unpack(start + row, out);
            }
            product((x.len() / k, count, k), y, stride, View::rows(x, k), View::rows(block, k).t(), 1.0);
        };
    let mut y = vec![0f32; tokens * n];
    if tokens <= TOKENS {
        y.par_chunks_mut(ROWS * tokens).enumerate().for_each(|(i, y)| {
            let count = y.len() / tokens;
            turn((i * ROWS, count), x, &mut vec![0f32; count * k], y, count);
        });
        return gather(y, tokens, n, ROWS);
    }
    y.par_chunks_mut(TOKENS * n).zip(x.par_chunks(TOKENS * k)).for_each(|(y, x)| {
        let mut block = vec![0f32; ROWS * k];
        for start in (0..n).step_by(ROWS) {
            turn((start, ROWS.min(n - start)), x, &mut block, &mut y[start..], n);
        }
    });
    y
}

/// `g [tokens, out] · W`.
fn backward(g: &[f32], rows: &PackedRows) -> Vec<f32> {
    let (n, k) = (rows.rows(), rows.cols);
    let tokens = g.len() / n;
    // Adds `g` times `width` columns of the weight from `first` on.
    let turn = |(first, width): (usize, usize), g: &[f32], dx: &mut [f32]| {
        let mut block = vec![0f32; ROWS.min(n) * width];
        for start in (0..n).step_by(ROWS) {
            let count = ROWS.min(n - start);
            for (row, out) in block.chunks_exact_mut(width).take(count).enumerate() {
                rows.values_of(start + row, first..first + width, out);
            }
            // dx starts from zeros.
            let (a, b) = (View { data: &g[start..], rs: n, cs: 1 }, View::rows(&block, width));
            add_product((g.len() / n, width, count), dx, width, a, b);
        }
    };
    let mut dx = vec![0f32; tokens * k];
    if tokens <= TOKENS {
        dx.par_chunks_mut(COLUMNS * tokens).enumerate().for_each(|(i, dx)| {
            turn((i * COLUMNS, dx.len() / tokens), g, dx);
        });
        return gather(dx, tokens, k, COLUMNS);
    }
    dx.par_chunks_mut(TOKENS * k).zip(g.par_chunks(TOKENS * n)).for_each(|(dx, g)| turn((0, k), g, dx));
    dx
}

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

/// The exact integer sums where f32 could round them: i32 holds `in` products of 8 bits each.
fn whole_sums(q: &[f32], rows: &PackedRows) -> Vec<f32> {
    let (n, k) = (rows.rows(), rows.cols);
    let mut weight = vec![0i16; n * k];
    let mut row_buffer = vec![0f32; k];
    for (row, out) in weight.chunks_exact_mut(k).enumerate() {
        rows.whole(row, &mut row_buffer);
        out.iter_mut().zip(&row_buffer).for_each(|(o, &v)| *o = v as i16);
    }
    let mut y = vec![0f32; q.len() / k * n];
    y.par_chunks_mut(n).zip(q.par_chunks(k)).for_each(|(y, q)| {
        let q: Vec<i16> = q.iter().map(|&v| v as i16).collect();
        for (y, w) in y.iter_mut().zip(weight.chunks_exact(k)) {
            *y = q.iter().zip(w).map(|(&q, &w)| i64::from(i32::from(q) * i32::from(w))).sum::<i64>() as f32;
        }
    });
    y
}

/// `step[t mod len] step[o] Σ_k q[t, k] (code[o, k] + offset)` of activation codes of magnitude at most `bound`, on
/// integers; none where the weight is not for it.
fn codes_product(q: &[f32], bound: u32, step: &[f32], rows: &PackedRows) -> Option<Vec<f32>> {
    let tokens = q.len() / rows.cols;
    let (least, most) = q.iter().fold((0f32, 0f32), |(a, b), &v| (a.min(v), b.max(v)));
    let signed = least < 0.0;
    let within = |lo: f32, hi: f32| least >= lo && most <= hi;
    if bound > 255 || !(if signed { within(-128.0, 127.0) } else { within(0.0, 255.0) }) {
        return None;
    }
    let nan = |t: usize| q[t * rows.cols..(t + 1) * rows.cols].iter().any(|v| v.is_nan());
    // A NaN has no code: its token is one throughout.
    let step_of = |t: usize| if nan(t) { f32::NAN } else { step[t % step.len()] };
    let steps: Vec<f32> = (0..tokens).map(step_of).collect();
    let mut y = vec![0f32; tokens * rows.rows()];
    let two_bits = bound <= 3 && if signed { within(-2.0, 1.0) } else { within(0.0, 3.0) };
    if let Some(table) = two_bits.then(|| rows.for_two_bits(signed)).flatten() {
        let codes: Vec<i8> = q.iter().map(|&v| v as i8).collect();
        let unit: Vec<f32> = rows.step.iter().map(|step| step * rows.unit()).collect();
        table.product(table::Activations::Codes(&codes), Scales { x: &steps, w: &unit, bias: None }, &mut y);
        return Some(y);
    }
    let weight = rows.for_codes()?;
    let codes = match signed {
        true => {
            let codes: Vec<i8> = q.iter().map(|&v| v as i8).collect();
            Tokens::of_signed(&codes, tokens, rows.cols, &steps)
        }
        false => {
            let codes: Vec<u8> = q.iter().map(|&v| v as u8).collect();
            Tokens::of_unsigned(&codes, tokens, rows.cols, &steps)
        }
    };
    weight.product(&codes, &rows.step, &[], &mut y);
    Some(y)
}

/// How activations become codes: `clamp(rne((x + shift) / step), lo, hi)`, a step below 1e-5 taken as that (ofq.md 2.1).
#[derive(Clone, Debug)]
pub struct Rounding {
    /// Token `t` of the flattened leading axes has the step `t mod len`.
    pub step: Vec<f32>,
    /// Added before, `[in]`; empty: nothing.
    pub shift: Vec<f32>,
    /// The range of the codes, without a half offset.
    pub levels: Levels,
}

/// x to the product of its codes with a packed weight.
struct RoundedCodes {
    rounding: Rounding,
    rows: PackedRows,
}

impl CustomOp1 for RoundedCodes {
    fn name(&self) -> &'static str {
        "packed-quantized-matmul"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, rows) = (slice(x, layout)?, &self.rows);
        let Rounding { step, shift, levels } = &self.rounding;
        let tokens = x.len() / rows.cols;
        // A comparison, not `max`: a NaN must stay one.
        let lift = |s: &f32| if *s < SCALE_FLOOR as f32 { SCALE_FLOOR as f32 } else { *s };
        let step: Vec<f32> = step.iter().map(lift).collect();
        let mut y = super::cpu::unwritten(tokens * rows.rows());
        let two_bits = levels.hi - levels.lo == 3 && matches!(levels.lo, -2 | 0);
        if let Some(table) = two_bits.then(|| rows.for_two_bits(levels.lo < 0)).flatten() {
            let each: Vec<f32> = (0..tokens).map(|t| step[t % step.len()]).collect();
            let unit: Vec<f32> = rows.step.iter().map(|step| step * rows.unit()).collect();
            let shift = (!shift.is_empty()).then_some(shift.as_slice());
            table.product(
                table::Activations::Values(x, shift),
                Scales { x: &each, w: &unit, bias: None },
                &mut y,
            );
        } else if let Some(weight) = rows.for_codes() {
            let how = gemm8::Quantizer { step: &step, lo: levels.lo, hi: levels.hi, shift };
            weight.product_of(x, tokens, rows.cols, how, &rows.step, &[], &mut y);
        } else {
            bail!("{}: found a weight of several steps a row, or too many columns", self.name())
        }
        Ok((CpuStorage::F32(y), with_last(layout, rows.rows())))
    }
}

/// As [`packed_codes_matmul`] of the codes that `rounding` makes of `x [.., in]` in f32, rounded on the way into the
/// product; none where there is no integer product for the weight, the codes or the device. Not differentiable.
pub fn packed_quantized_matmul(x: &Tensor, rounding: Rounding, rows: &PackedRows) -> Result<Option<Tensor>> {
    let op = "packed quantized matmul";
    let levels = rounding.levels;
    let bytes = (-128..=0).contains(&levels.lo) && levels.hi <= if levels.lo < 0 { 127 } else { 255 };
    if x.dtype() != DType::F32 || !x.device().is_cpu() || !bytes || levels.half || !rows.takes_codes() {
        return Ok(None);
    }
    let x = check(op, x, rows)?.detach();
    let tokens = x.elem_count() / rows.cols;
    if rounding.step.is_empty() || !tokens.is_multiple_of(rounding.step.len()) {
        bail!("{op}: found {} steps for {tokens} tokens", rounding.step.len());
    }
    if !rounding.shift.is_empty() && rounding.shift.len() != rows.cols {
        bail!("{op}: found {} shifts, expected {}", rounding.shift.len(), rows.cols);
    }
    x.apply_op1_no_bwd(&RoundedCodes { rounding, rows: rows.clone() }).map(Some)
}

struct PackedMatmul(PackedRows);
struct PackedMatmulBwd(PackedRows);
struct PackedSums {
    rows: PackedRows,
    /// Of whole numbers, the steps outside: where a row has one step. Else of values.
    bare: bool,
    /// Whether f32 holds every sum of whole numbers.
    exact: bool,
    /// The largest magnitude of the codes.
    bound: u32,
    /// Steps of the activation, token `t` taking entry `t mod len`; empty: the bare sums.
    step: Vec<f32>,
}

fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("packed matmul: expected a contiguous operand"),
    }
}

fn with_last(layout: &Layout, last: usize) -> Shape {
    let mut dims = layout.dims().to_vec();
    if let Some(dim) = dims.last_mut() {
        *dim = last;
    }
    Shape::from(dims)
}

/// Rows of activations up to which products are those of decoding: as many passes over weights in cache.
pub(super) const DECODED: usize = 8;
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
pub(super) fn decode(x: &[f32], rows: &PackedRows) -> Vec<f32> {
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
struct RoundedMatmul(PackedRows);

impl CustomOp1 for RoundedMatmul {
    fn name(&self) -> &'static str {
        "packed-matmul-int8"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = decode_int8(slice(x, layout)?, &self.0);
        Ok((CpuStorage::F32(y), with_last(layout, self.0.rows())))
    }
}

impl CustomOp1 for PackedMatmul {
    fn name(&self) -> &'static str {
        "packed-matmul"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, layout)?;
        let y = match x.len() / self.0.cols <= DECODED {
            true => decode(x, &self.0),
            false => forward(x, &self.0, |row, out| self.0.values(row, out)),
        };
        Ok((CpuStorage::F32(y), with_last(layout, self.0.rows())))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(g.contiguous()?.apply_op1_no_bwd(&PackedMatmulBwd(self.0.clone()))?))
    }
}

impl CustomOp1 for PackedMatmulBwd {
    fn name(&self) -> &'static str {
        "packed-matmul-bwd"
    }

    fn cpu_fwd(&self, g: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let dx = backward(slice(g, layout)?, &self.0);
        Ok((CpuStorage::F32(dx), with_last(layout, self.0.cols)))
    }
}

impl CustomOp1 for PackedSums {
    fn name(&self) -> &'static str {
        "packed-sums"
    }

    fn cpu_fwd(&self, q: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (q, rows) = (slice(q, layout)?, &self.rows);
        if self.bare && !self.step.is_empty() {
            if let Some(y) = codes_product(q, self.bound, &self.step, rows) {
                return Ok((CpuStorage::F32(y), with_last(layout, rows.rows())));
            }
        }
        let mut y = match self.exact {
            _ if !self.bare => forward(q, rows, |row, out| rows.values(row, out)),
            true => forward(q, rows, |row, out| rows.whole(row, out)),
            false => whole_sums(q, rows),
        };
        if !self.step.is_empty() {
            let unit: Vec<f32> = match self.bare {
                true => rows.step.iter().map(|s| s * rows.unit()).collect(),
                false => vec![1.0; rows.rows()],
            };
            y.par_chunks_mut(unit.len()).enumerate().for_each(|(t, y)| {
                let step = self.step[t % self.step.len()];
                y.iter_mut().zip(&unit).for_each(|(y, unit)| *y *= step * unit);
            });
        }
        Ok((CpuStorage::F32(y), with_last(layout, rows.rows())))
    }
}

fn check(op: &str, x: &Tensor, rows: &PackedRows) -> Result<Tensor> {
    let found = x.dims().last().copied().unwrap_or(0);
    if found != rows.cols {
        bail!("{op}: found {found} input features, expected {}", rows.cols);
    }
    if x.elem_count() == 0 {
        bail!("{op}: found an empty activation {:?}", x.dims());
    }
    x.to_dtype(DType::F32)?.contiguous()
}

/// The dense values of a packed weight, `[out, in]`.
fn dense(x: &Tensor, rows: &PackedRows, of: impl Fn(usize, &mut [f32])) -> Result<Tensor> {
    let mut values = vec![0f32; rows.rows() * rows.cols];
    values.chunks_exact_mut(rows.cols).enumerate().for_each(|(row, out)| of(row, out));
    Tensor::from_vec(values, (rows.rows(), rows.cols), x.device())
}

/// Plain reading of [`packed_matmul`]: the whole weight unpacked, then a dense product.
pub fn reference(x: &Tensor, rows: &PackedRows) -> Result<Tensor> {
    x.broadcast_matmul(&dense(x, rows, |row, out| rows.values(row, out))?.t()?)
}

/// `x [.., in]` times the transposed packed weight, `[.., out]` in `x`'s dtype; differentiable in `x`.
pub fn packed_matmul(x: &Tensor, rows: &PackedRows) -> Result<Tensor> {
    let input = check("packed matmul", x, rows)?;
    let y = match input.device().is_cpu() {
        true => tape::apply1(&input, PackedMatmul(rows.clone()), Reads::NOTHING)?,
        false => reference(&input, rows)?,
    };
    y.to_dtype(x.dtype())
}

/// As [`packed_matmul`] of up to 8 rows of activations that are rounded to 8 bits first, symmetrically, with a scale
/// for each block of up to 64 columns (absmax / 127): sums within a block are exact. More rows, and rows on another
/// device, are multiplied as floats. Not differentiable.
pub fn packed_matmul_int8(x: &Tensor, rows: &PackedRows) -> Result<Tensor> {
    let input = check("packed matmul", x, rows)?.detach();
    if !input.device().is_cpu() || input.elem_count() / rows.cols > DECODED {
        return packed_matmul(&x.detach(), rows);
    }
    input.apply_op1_no_bwd(&RoundedMatmul(rows.clone()))?.to_dtype(x.dtype())
}

/// The product of quantized activations with a packed weight, summed in integers.
///
/// `q [.., in]` holds codes as whole f32 numbers of magnitude at most `bound`; token `t` of the
/// flattened leading axes has the step `x_step[t mod len]`. Gives
/// `x_step[t] step[o] Σ_k q[t, k] (code[o, k] + offset)`, `[.., out]`, f32: the sum exact, each factor
/// rounded once. Where a row has several steps they stand inside the sum, which is then one of floats.
/// Not differentiable.
pub fn packed_codes_matmul(q: &Tensor, bound: u32, x_step: &Tensor, rows: &PackedRows) -> Result<Tensor> {
    let q = check("packed codes matmul", q, rows)?.detach();
    let tokens = q.elem_count() / rows.cols;
    let step = x_step.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    if step.is_empty() || !tokens.is_multiple_of(step.len()) {
        bail!("packed codes matmul: found {} steps for {tokens} tokens", step.len());
    }
    let bare = rows.groups().group().is_none();
    let exact = i64::from(bound) * rows.largest_whole() * (rows.cols as i64) < EXACT;
    if q.device().is_cpu() {
        return q.apply_op1_no_bwd(&PackedSums { rows: rows.clone(), bare, exact, bound, step });
    }
    let (w, unit) = match bare {
        true => {
            let unit = Tensor::new(&rows.step[..], q.device())?.affine(f64::from(rows.unit()), 0.0)?;
            (dense(&q, rows, |row, out| rows.whole(row, out))?, unit)
        }
        false => {
            let unit = Tensor::ones(rows.rows(), DType::F32, q.device())?;
            (dense(&q, rows, |row, out| rows.values(row, out))?, unit)
        }
    };
    let sums = q.broadcast_matmul(&w.t()?)?;
    let n = step.len();
    let step = Tensor::from_vec(step, (n, 1), q.device())?;
    let scaled = sums.reshape((tokens / n, n, rows.rows()))?.broadcast_mul(&step)?.broadcast_mul(&unit)?;
    scaled.reshape(sums.shape())
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::rows::tests::{grids, random_rows};
    use super::*;
    use crate::kernels::Levels;
    use crate::random::Random;

    /// Shapes, with and without groups, some with a rest; the larger ones are split both ways.
    fn all() -> impl Iterator<Item = (Levels, u8, usize, usize, Option<usize>)> {
        let shapes = [
            (1, 1, None),
            (3, 5, None),
            (65, 7, None),
            (10, 130, None),
            (3, 5, Some(2)),
            (65, 7, Some(1)),
            (10, 130, Some(64)),
            (70, 300, Some(32)),
            // Long enough for tables.
            (10, 400, None),
        ];
        grids().flat_map(move |(l, b)| shapes.map(|(r, c, g)| (l, b, r, c, g)))
    }

    #[test]
    fn integer_sums_are_exact() {
        for (levels, bits, rows, cols, group) in all().filter(|shape| shape.4.is_none()) {
            let (packed, codes) = random_rows((levels, bits), rows, cols, group);
            for exact in [true, false] {
                let mut random = Random::new(9, "q", &[]);
                let q: Vec<i64> = (0..3 * cols).map(|_| i64::from(random.below(256))).collect();
                let input = Tensor::from_vec(q.iter().map(|&v| v as f32).collect(), (3, cols), &Device::Cpu);
                let op = PackedSums { rows: packed.clone(), bare: true, exact, bound: 255, step: Vec::new() };
                let y = input.unwrap().apply_op1_no_bwd(&op).unwrap().to_vec2::<f32>().unwrap();
                for (t, y) in y.iter().enumerate() {
                    for (o, &y) in y.iter().enumerate() {
                        let whole = |c: i64| if levels.half { 2 * c + 1 } else { c };
                        let sum: i64 = (0..cols).map(|k| q[t * cols + k] * whole(codes[o * cols + k])).sum();
                        assert_eq!(y as i64, sum, "{bits} bits {rows}x{cols} at {t}, {o}");
                    }
                }
            }
        }
    }

    #[test]
    fn codes_made_on_the_way_are_those_of_the_quantizer() {
        for (levels, bits, rows, cols, group) in all().filter(|shape| shape.4.is_none()) {
            for (act, lo) in [(2u8, -2), (2, 0), (3, -4), (8, -128), (8, 0)] {
                let (packed, _) = random_rows((levels, bits), rows, cols, group);
                let codes = if lo < 0 { Levels::signed(act) } else { Levels::unsigned(act) };
                let mut random = Random::new(5, "x", &[cols as u64, u64::from(act)]);
                let x: Vec<f32> = (0..3 * cols).map(|_| 2.0 * random.normal()).collect();
                let x = Tensor::from_vec(x, (3, cols), &Device::Cpu).unwrap();
                let step: Vec<f32> = (0..3).map(|t| 0.3 + 0.1 * t as f32).collect();
                let shift: Vec<f32> = (0..cols).map(|_| 0.2 * random.normal()).collect();
                let rounding = Rounding { step: step.clone(), shift: shift.clone(), levels: codes };
                let got = packed_quantized_matmul(&x, rounding, &packed).unwrap();
                // A weight of 8 bits that are not a signed byte has no integer product.
                let Some(got) = got else { continue };
                let step = Tensor::new(step, &Device::Cpu).unwrap();
                let shift = Tensor::new(shift, &Device::Cpu).unwrap();
                let q = crate::kernels::lsq_codes(&x, &step, Some(&shift), codes, Some(0)).unwrap();
                let bound = codes.lo.unsigned_abs().max(codes.hi.unsigned_abs());
                let want = packed_codes_matmul(&q, bound, &step, &packed).unwrap();
                let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                for (got, want) in flat(&got).into_iter().zip(flat(&want)) {
                    assert_eq!(got.to_bits(), want.to_bits(), "{bits} bits by {act} {rows}x{cols}");
                }
            }
        }
    }

    #[test]
    fn codes_times_codes_are_the_whole_sums() {
        for (levels, bits, rows, cols, group) in all().filter(|shape| shape.4.is_none()) {
            for (lo, hi) in [(-2i64, 1), (0, 3), (-128, 127), (0, 255), (-1, 2)] {
                let (packed, codes) = random_rows((levels, bits), rows, cols, group);
                let mut random = Random::new(8, "codes", &[cols as u64, hi as u64]);
                let width = (hi - lo + 1) as u32;
                let q: Vec<i64> = (0..3 * cols).map(|_| lo + i64::from(random.below(width))).collect();
                let mut floats: Vec<f32> = q.iter().map(|&v| v as f32).collect();
                let step = Tensor::new(&[0.5f32, 1.0, 2.0], &Device::Cpu).unwrap();
                let run = |q: &[f32]| {
                    let q = Tensor::from_slice(q, (3, cols), &Device::Cpu).unwrap();
                    let bound = lo.unsigned_abs().max(hi.unsigned_abs()) as u32;
                    packed_codes_matmul(&q, bound, &step, &packed).unwrap().to_vec2::<f32>().unwrap()
                };
                for (t, y) in run(&floats).iter().enumerate() {
                    for (o, &y) in y.iter().enumerate() {
                        let whole = |c: i64| if levels.half { 2 * c + 1 } else { c };
                        let sum: i64 = (0..cols).map(|k| q[t * cols + k] * whole(codes[o * cols + k])).sum();
                        let unit = packed.steps(o)[0] * packed.unit();
                        let want = sum as f32 * ([0.5f32, 1.0, 2.0][t] * unit);
                        assert_eq!(y, want, "{bits} bits by {lo}..{hi} {rows}x{cols} at {t}, {o}");
                    }
                }
                floats[cols] = f32::NAN;
                let y = run(&floats);
                assert!(y[1].iter().all(|v| v.is_nan()) && y[0].iter().chain(&y[2]).all(|v| !v.is_nan()));
            }
        }
    }

    #[test]
    fn eight_bits_of_activation_are_near_the_floats() {
        for (levels, bits, rows, cols, group) in all() {
            let (packed, _) = random_rows((levels, bits), rows, cols, group);
            let mut random = Random::new(6, "x", &[cols as u64]);
            let x: Vec<f32> = (0..2 * cols).map(|_| random.normal()).collect();
            let x = Tensor::from_vec(x, (2, cols), &Device::Cpu).unwrap();
            let rounded = packed_matmul_int8(&x, &packed).unwrap().to_vec2::<f32>().unwrap();
            let exact = packed_matmul(&x, &packed).unwrap().to_vec2::<f32>().unwrap();
            for (a, b) in rounded.concat().iter().zip(exact.concat()) {
                // Half a step of 1/127 of the largest activation, at random signs over the columns.
                let size = packed.largest_whole() as f32 * 0.1 * (cols as f32).sqrt();
                assert!((a - b).abs() <= 0.03 * size, "{bits} bits {rows}x{cols}: {a} {b}");
            }
        }
    }

    #[test]
    fn forward_and_gradient_agree_with_the_dense_product() {
        // Few tokens, and more than one task takes.
        let tokens = |bits: u8| if bits == 3 { TOKENS + 2 } else { 6 };
        for (levels, bits, rows, cols, group) in all() {
            let (packed, _) = random_rows((levels, bits), rows, cols, group);
            let mut random = Random::new(4, "x", &[cols as u64]);
            let tokens = tokens(bits);
            let x: Vec<f32> = (0..tokens * cols).map(|_| random.normal()).collect();
            let x = Var::from_vec(x, (2, tokens / 2, cols), &Device::Cpu).unwrap();
            let run = |y: Tensor| {
                let weights = Tensor::arange(0f32, y.elem_count() as f32, &Device::Cpu).unwrap();
                let loss = (y.flatten_all().unwrap() * weights.cos().unwrap()).unwrap().sum_all().unwrap();
                let g = loss.backward().unwrap().get(&x).unwrap().clone();
                (
                    y.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
                    g.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
                )
            };
            let fast = run(packed_matmul(&x, &packed).unwrap());
            let plain = run(reference(&x, &packed).unwrap());
            for (a, b) in fast.0.iter().zip(&plain.0).chain(fast.1.iter().zip(&plain.1)) {
                // f32 sums of up to 300 terms in another order; 8-bit codes reach 255 steps of a tenth.
                let size = packed.largest_whole() as f32 * 0.1;
                assert!(
                    (a - b).abs() <= 1e-5 * (1.0 + b.abs() + size),
                    "{bits} bits {rows}x{cols} in groups of {group:?}: {a} {b}"
                );
            }
        }
    }

    #[test]
    fn threads_change_nothing() {
        for (tokens, group) in [(5, Some(64)), (5, None), (TOKENS + 9, Some(64))] {
            let (packed, _) = random_rows((Levels::mid_rise(3), 3), 150, 600, group);
            let x = crate::kernels::testing::values(&[tokens, 600], 5);
            crate::kernels::testing::ignores_threads(&[x], &|t| packed_matmul(&t[0], &packed));
        }
    }

    #[test]
    fn half_precision_activations_keep_their_dtype() {
        let (packed, _) = random_rows((Levels::signed(4), 4), 7, 13, Some(5));
        let x = crate::kernels::testing::values(&[3, 13], 2);
        for dtype in [DType::BF16, DType::F16] {
            let x = x.to_dtype(dtype).unwrap();
            let y = packed_matmul(&x, &packed).unwrap();
            assert_eq!(y.dtype(), dtype);
            let wide = packed_matmul(&x.to_dtype(DType::F32).unwrap(), &packed).unwrap();
            crate::kernels::testing::close("half", &y, &wide, crate::kernels::testing::BF16);
        }
    }

    #[test]
    fn codes_meet_steps_by_groups_as_floats() {
        let (packed, codes) = random_rows((Levels::mid_rise(2), 2), 5, 10, Some(4));
        let mut random = Random::new(9, "q", &[]);
        let q: Vec<f32> = (0..4 * 10).map(|_| random.below(4) as f32).collect();
        let x_step = [0.5f32, 0.25];
        let input = Tensor::from_slice(&q, (2, 2, 10), &Device::Cpu).unwrap();
        let step = Tensor::new(&x_step, &Device::Cpu).unwrap();
        let y = packed_codes_matmul(&input, 3, &step, &packed).unwrap();
        assert_eq!(y.dims(), [2, 2, 5]);
        let y = y.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (t, y) in y.chunks_exact(5).enumerate() {
            for (o, y) in y.iter().enumerate() {
                let term = |k: usize| {
                    let step = packed.step[packed.groups().step_of(o * 10 + k)];
                    f64::from(q[t * 10 + k]) * f64::from(step) * (codes[o * 10 + k] as f64 + 0.5)
                };
                let want = f64::from(x_step[t % 2]) * (0..10).map(term).sum::<f64>();
                assert!((f64::from(*y) - want).abs() < 1e-6, "token {t}, row {o}: {y} {want}");
            }
        }
    }

    #[test]
    fn wrong_width_is_named() {
        let (packed, _) = random_rows((Levels::signed(4), 4), 2, 3, None);
        let x = Tensor::zeros((2, 4), DType::F32, &Device::Cpu).unwrap();
        let error = packed_matmul(&x, &packed).unwrap_err().to_string();
        assert!(error.contains("found 4 input features, expected 3"), "{error}");
    }
}
