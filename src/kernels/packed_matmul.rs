//! Products with packed weights.
//!
//! `y[t, o] = Σ_k x[t, k] step[o] (code[o, k] + offset)` for float activations, and the bare integer sum
//! `Σ_k q[t, k] (2 code[o, k] + 1)` (or `Σ q code` on a grid with a zero) for activations that are
//! codes themselves. `x: [.., in]`, codes `[out, in]` packed, `y: [.., out]`, f32.
//!
//! The weight is unpacked by blocks of rows into a buffer that stays in cache, never as a whole; so
//! too in the backward pass, which gives `dx = dy · W` and nothing for the frozen weight.

use std::sync::Arc;

use candle_core::{bail, CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::linear::{add_product, product, View};
use super::Levels;

/// Rows of activations that one task takes through all the weight.
const TOKENS: usize = 256;
/// Rows of the weight that are unpacked at a time.
const ROWS: usize = 64;
/// Whole numbers below this are exact in f32, whatever the order of a sum of them.
const EXACT: i64 = 1 << 24;

/// Packed rows of codes with a step for each row.
#[derive(Clone, Debug)]
pub struct PackedRows {
    /// The range of the codes.
    pub levels: Levels,
    /// Bits per code, 1 to 8.
    pub bits: u8,
    /// Codes in a row.
    pub cols: usize,
    /// The fields `code - lo`, least significant bit first, every row from a byte on.
    pub codes: Arc<[u8]>,
    /// The step of each row.
    pub step: Arc<[f32]>,
}

impl PackedRows {
    /// Bytes of a row of `cols` codes of `bits` bits.
    pub fn row_bytes(cols: usize, bits: u8) -> usize {
        (cols * usize::from(bits)).div_ceil(8)
    }

    /// Packs whole numbers within the levels, `cols` a row.
    pub fn pack(levels: Levels, bits: u8, cols: usize, codes: &[f32], step: &[f32]) -> Self {
        let bytes = Self::row_bytes(cols, bits);
        let mut packed = vec![0u8; step.len() * bytes];
        for (row, codes) in packed.chunks_exact_mut(bytes.max(1)).zip(codes.chunks_exact(cols.max(1))) {
            let (mut buffer, mut filled, mut at) = (0u32, 0u32, 0usize);
            for &k in codes {
                buffer |= ((k as i32 - levels.lo) as u32 & ((1 << bits) - 1)) << filled;
                filled += u32::from(bits);
                while filled >= 8 {
                    row[at] = buffer as u8;
                    (buffer, filled, at) = (buffer >> 8, filled - 8, at + 1);
                }
            }
            if filled > 0 {
                row[at] = buffer as u8;
            }
        }
        PackedRows { levels, bits, cols, codes: packed.into(), step: step.into() }
    }

    /// Rows: output features.
    pub fn rows(&self) -> usize {
        self.step.len()
    }

    /// Writes `of(code)` for every code of one row.
    #[inline]
    pub fn unpack_row(&self, row: usize, out: &mut [f32], of: impl Fn(i32) -> f32) {
        let bytes = Self::row_bytes(self.cols, self.bits);
        let (bits, lo) = (u32::from(self.bits), self.levels.lo);
        // Every value that a field can take, once: unpacking is then a look-up.
        let mut table = [0f32; 256];
        let mask = (1u32 << bits) - 1;
        for (u, value) in table.iter_mut().enumerate().take(mask as usize + 1) {
            *value = of(u as i32 + lo);
        }
        let source = &self.codes[row * bytes..(row + 1) * bytes];
        if 8 % bits == 0 {
            let fields = (8 / bits) as usize;
            for (out, &byte) in out.chunks_mut(fields).zip(source) {
                for (i, out) in out.iter_mut().enumerate() {
                    *out = table[((u32::from(byte) >> (i as u32 * bits)) & mask) as usize];
                }
            }
            return;
        }
        let mut source = source.iter();
        let (mut buffer, mut filled) = (0u32, 0u32);
        for out in out.iter_mut() {
            if filled < bits {
                buffer |= u32::from(source.next().copied().unwrap_or(0)) << filled;
                filled += 8;
            }
            *out = table[(buffer & mask) as usize];
            (buffer, filled) = (buffer >> bits, filled - bits);
        }
    }

    /// Writes the values `step (code + offset)` of one row.
    pub fn values(&self, row: usize, out: &mut [f32]) {
        let (step, offset) = (self.step[row], if self.levels.half { 0.5 } else { 0.0 });
        self.unpack_row(row, out, |k| step * (k as f32 + offset));
    }

    /// Writes the whole numbers `2 code + 1`, or `code` on a grid with a zero.
    fn whole(&self, row: usize, out: &mut [f32]) {
        let half = self.levels.half;
        self.unpack_row(row, out, |k| if half { (2 * k + 1) as f32 } else { k as f32 });
    }

    /// What one of the whole numbers of [`PackedRows::whole`] is worth, in steps.
    fn unit(&self) -> f32 {
        if self.levels.half {
            0.5
        } else {
            1.0
        }
    }

    fn largest_whole(&self) -> i64 {
        let (lo, hi) = (i64::from(self.levels.lo), i64::from(self.levels.hi));
        let of = |k: i64| if self.levels.half { 2 * k + 1 } else { k };
        of(lo).abs().max(of(hi).abs())
    }
}

/// `x [tokens, in] · W^T` with the rows of `W` given by `unpack`.
fn forward(x: &[f32], rows: &PackedRows, unpack: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let (n, k) = (rows.rows(), rows.cols);
    let tokens = x.len() / k;
    let mut y = vec![0f32; tokens * n];
    y.par_chunks_mut(TOKENS * n).zip(x.par_chunks(TOKENS * k)).for_each(|(y, x)| {
        let m = x.len() / k;
        let mut block = vec![0f32; ROWS * k];
        for start in (0..n).step_by(ROWS) {
            let count = ROWS.min(n - start);
            for (row, out) in block.chunks_exact_mut(k).take(count).enumerate() {
                unpack(start + row, out);
            }
            let (x, block) = (View::rows(x, k), View::rows(&block, k));
            product((m, count, k), &mut y[start..], n, x, block.t(), 1.0);
        }
    });
    y
}

/// `g [tokens, out] · W`.
fn backward(g: &[f32], rows: &PackedRows) -> Vec<f32> {
    let (n, k) = (rows.rows(), rows.cols);
    let tokens = g.len() / n;
    let mut dx = vec![0f32; tokens * k];
    dx.par_chunks_mut(TOKENS * k).zip(g.par_chunks(TOKENS * n)).for_each(|(dx, g)| {
        let m = g.len() / n;
        let mut block = vec![0f32; ROWS * k];
        for start in (0..n).step_by(ROWS) {
            let count = ROWS.min(n - start);
            for (row, out) in block.chunks_exact_mut(k).take(count).enumerate() {
                rows.values(start + row, out);
            }
            // dx starts from zeros.
            let (g, block) = (View { data: &g[start..], rs: n, cs: 1 }, View::rows(&block, k));
            add_product((m, k, count), dx, k, g, block);
        }
    });
    dx
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

struct PackedMatmul(PackedRows);
struct PackedMatmulBwd(PackedRows);
struct PackedSums {
    rows: PackedRows,
    exact: bool,
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

impl CustomOp1 for PackedMatmul {
    fn name(&self) -> &'static str {
        "packed-matmul"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = forward(slice(x, layout)?, &self.0, |row, out| self.0.values(row, out));
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
        let mut y = match self.exact {
            true => forward(q, rows, |row, out| rows.whole(row, out)),
            false => whole_sums(q, rows),
        };
        if !self.step.is_empty() {
            let unit: Vec<f32> = rows.step.iter().map(|s| s * rows.unit()).collect();
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
        true => input.apply_op1(PackedMatmul(rows.clone()))?,
        false => reference(&input, rows)?,
    };
    y.to_dtype(x.dtype())
}

/// The product of quantized activations with a packed weight, summed in integers.
///
/// `q [.., in]` holds codes as whole f32 numbers of magnitude at most `bound`; token `t` of the
/// flattened leading axes has the step `x_step[t mod len]`. Gives
/// `x_step[t] step[o] Σ_k q[t, k] (code[o, k] + offset)`, `[.., out]`, f32: the sum exact, each factor
/// rounded once. Not differentiable.
pub fn packed_codes_matmul(q: &Tensor, bound: u32, x_step: &Tensor, rows: &PackedRows) -> Result<Tensor> {
    let q = check("packed codes matmul", q, rows)?.detach();
    let tokens = q.elem_count() / rows.cols;
    let step = x_step.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    if step.is_empty() || !tokens.is_multiple_of(step.len()) {
        bail!("packed codes matmul: found {} steps for {tokens} tokens", step.len());
    }
    let exact = i64::from(bound) * rows.largest_whole() * (rows.cols as i64) < EXACT;
    if q.device().is_cpu() {
        return q.apply_op1_no_bwd(&PackedSums { rows: rows.clone(), exact, step });
    }
    let sums = q.broadcast_matmul(&dense(&q, rows, |row, out| rows.whole(row, out))?.t()?)?;
    let unit = Tensor::new(&rows.step[..], q.device())?.affine(f64::from(rows.unit()), 0.0)?;
    let n = step.len();
    let step = Tensor::from_vec(step, (n, 1), q.device())?;
    let scaled = sums.reshape((tokens / n, n, rows.rows()))?.broadcast_mul(&step)?.broadcast_mul(&unit)?;
    scaled.reshape(sums.shape())
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::random::Random;

    fn random_rows(levels: Levels, bits: u8, rows: usize, cols: usize) -> (PackedRows, Vec<i64>) {
        let mut random = Random::new(u64::from(bits), "packed", &[rows as u64, cols as u64]);
        let span = (levels.hi - levels.lo + 1) as u32;
        let codes: Vec<i64> =
            (0..rows * cols).map(|_| i64::from(levels.lo) + i64::from(random.below(span))).collect();
        let step: Vec<f32> = (0..rows).map(|_| random.range(0.01, 0.1)).collect();
        let floats: Vec<f32> = codes.iter().map(|&c| c as f32).collect();
        (PackedRows::pack(levels, bits, cols, &floats, &step), codes)
    }

    fn all() -> impl Iterator<Item = (Levels, u8, usize, usize)> {
        let grids = (2..=8).flat_map(|b| [(Levels::mid_rise(b), b), (Levels::signed(b), b)]);
        grids.flat_map(|(l, b)| [(1, 1), (3, 5), (65, 7), (10, 130)].map(|(r, c)| (l, b, r, c)))
    }

    #[test]
    fn codes_survive_packing() {
        for (levels, bits, rows, cols) in all() {
            let (packed, codes) = random_rows(levels, bits, rows, cols);
            assert_eq!(packed.codes.len(), rows * (cols * usize::from(bits)).div_ceil(8));
            let mut out = vec![0f32; cols];
            for (row, codes) in codes.chunks_exact(cols).enumerate() {
                packed.unpack_row(row, &mut out, |k| k as f32);
                assert!(out.iter().zip(codes).all(|(&o, &c)| o as i64 == c), "{bits} bits, row {row}");
            }
        }
    }

    #[test]
    fn integer_sums_are_exact() {
        for (levels, bits, rows, cols) in all() {
            let (packed, codes) = random_rows(levels, bits, rows, cols);
            for exact in [true, false] {
                let mut random = Random::new(9, "q", &[]);
                let q: Vec<i64> = (0..3 * cols).map(|_| i64::from(random.below(256))).collect();
                let input = Tensor::from_vec(q.iter().map(|&v| v as f32).collect(), (3, cols), &Device::Cpu);
                let op = PackedSums { rows: packed.clone(), exact, step: Vec::new() };
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
    fn forward_and_gradient_agree_with_the_dense_product() {
        for (levels, bits, rows, cols) in all() {
            let (packed, _) = random_rows(levels, bits, rows, cols);
            let mut random = Random::new(4, "x", &[cols as u64]);
            let x: Vec<f32> = (0..2 * 3 * cols).map(|_| random.normal()).collect();
            let x = Var::from_vec(x, (2, 3, cols), &Device::Cpu).unwrap();
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
                // f32 sums of up to 130 terms in another order.
                assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()), "{bits} bits {rows}x{cols}: {a} {b}");
            }
        }
    }

    #[test]
    fn wrong_width_is_named() {
        let (packed, _) = random_rows(Levels::signed(4), 4, 2, 3);
        let x = Tensor::zeros((2, 4), DType::F32, &Device::Cpu).unwrap();
        let error = packed_matmul(&x, &packed).unwrap_err().to_string();
        assert!(error.contains("found 4 input features, expected 3"), "{error}");
    }
}
