//! Fake quantization: StatsQ for weights, LSQ for activations, and their integer codes.
//!
//! StatsQ (OFQ, Liu et al. 2023; ofq.md section 1), `w: [R, K]`, `n = 2^(bits-1)`:
//!
//! ```text
//! s_r = 2 mean_k |w_rk|     step = s / n     k = clamp(rne(w / step - 1/2), -n, n - 1)
//! y   = step * (k + 1/2)    dL/dw = dL/dy, nothing through s
//! ```
//!
//! LSQ (Esser et al. 2020, in OFQ's form; ofq.md section 2), one scale per entry of one axis of x,
//! shared by `m` elements, with an optional shift along the last axis:
//!
//! ```text
//! se = max(s, 1e-5)     v = (x + shift) / se     q = rne(clamp(v, lo, hi))     y = q * se
//! mask = 1[lo <= v <= hi]     dx = dy * mask     dshift = sum dx
//! ds = sum dy * (q - v * mask) / sqrt(hi * m)    straight through the floor on s
//! ```
//!
//! `n` is a power of two, so `w / (s/n) = n * (w/s)` exactly while nothing is subnormal; a step
//! below the smallest normal f32 makes a row of zeros with codes 0. A NaN stays a NaN.

use super::cpu::{self, real, simd, Real, Road};
use candle_core::{
    bail, CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor, D,
};
use rayon::prelude::*;

/// The floor under an activation scale (ofq.md 2.1).
pub const SCALE_FLOOR: f64 = 1e-5;

/// The integer codes of a quantization grid: k in `[lo, hi]`, value = step * (k + offset), where
/// the offset is 1/2 if `half` and else 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Levels {
    /// The lowest code.
    pub lo: i32,
    /// The highest code.
    pub hi: i32,
    /// Whether values sit half a step above their code.
    pub half: bool,
}

impl Levels {
    /// `[-n, n-1]` with n = 2^(bits-1), values halfway between: StatsQ's grid, without a zero.
    pub fn mid_rise(bits: u8) -> Self {
        Levels { half: true, ..Levels::signed(bits) }
    }

    /// `[-n, n-1]` with n = 2^(bits-1).
    pub fn signed(bits: u8) -> Self {
        let n = 1i32 << (bits.clamp(1, 31) - 1);
        Levels { lo: -n, hi: n - 1, half: false }
    }

    /// `[0, 2^bits - 1]`.
    pub fn unsigned(bits: u8) -> Self {
        Levels { lo: 0, hi: ((1i64 << bits.clamp(1, 31)) - 1) as i32, half: false }
    }

    fn offset(self) -> f64 {
        if self.half {
            0.5
        } else {
            0.0
        }
    }
}

/// Round half to even with plain candle ops (candle's `round` takes ties away from zero).
fn rne(x: &Tensor) -> Result<Tensor> {
    let floor = x.floor()?;
    let rest = (x - &floor)?;
    let odd = (&floor - ((&floor * 0.5)?.floor()? * 2.0)?)?;
    let above = rest.gt(0.5)?.to_dtype(x.dtype())?;
    let tie = rest.eq(0.5)?.to_dtype(x.dtype())?;
    (floor + above)? + (tie * odd)?
}

/// `value` exactly, with the gradient of `carrier`: `carrier - sg(carrier)` is an exact zero.
fn straight_through(value: &Tensor, carrier: &Tensor) -> Result<Tensor> {
    value.detach() + (carrier - carrier.detach())?
}

/// StatsQ in plain candle ops, `w: [R, K]`.
pub fn reference_statsq(w: &Tensor, bits: u8) -> Result<Tensor> {
    let step = (reference_scale(&w.detach())? / f64::from(1u32 << (bits - 1)))?;
    let levels = Levels::mid_rise(bits);
    let codes = reference_quantize(&w.detach(), &step, levels)?;
    straight_through(&reference_dequantize(&codes, &step, levels)?, w)
}

fn reference_scale(w: &Tensor) -> Result<Tensor> {
    w.abs()?.mean(D::Minus1)? * 2.0
}

/// 1 where a row has a usable step; a negative or tiny one makes a row of zeros. NaN counts as usable.
fn live_rows(step: &Tensor) -> Result<Tensor> {
    step.lt(f64::from(f32::MIN_POSITIVE))?.to_dtype(step.dtype())?.affine(-1.0, 1.0)
}

fn reference_quantize(w: &Tensor, step: &Tensor, levels: Levels) -> Result<Tensor> {
    let live = live_rows(step)?.unsqueeze(1)?;
    let safe = ((step.unsqueeze(1)? * &live)? + live.affine(-1.0, 1.0)?)?;
    let v = (w.broadcast_div(&safe)? - levels.offset())?;
    let codes = rne(&v)?.clamp(f64::from(levels.lo), f64::from(levels.hi))?;
    codes.broadcast_mul(&live)
}

fn reference_dequantize(codes: &Tensor, step: &Tensor, levels: Levels) -> Result<Tensor> {
    let live = (step * live_rows(step)?)?.unsqueeze(1)?;
    (codes + levels.offset())?.broadcast_mul(&live)
}

/// LSQ in plain candle ops; arguments as [`lsq`].
pub fn reference_lsq(
    x: &Tensor,
    s: &Tensor,
    shift_in: Option<&Tensor>,
    levels: Levels,
    axis: Option<usize>,
) -> Result<Tensor> {
    let site = Site::new("lsq", x, s, shift_in, levels, axis)?;
    let s = site.broadcast(s, x, axis)?;
    let x = match shift_in {
        Some(shift) => x.broadcast_add(shift)?,
        None => x.clone(),
    };
    let (lo, hi) = (f64::from(levels.lo), f64::from(levels.hi));
    let se = s.detach().maximum(SCALE_FLOOR)?;
    let v = x.detach().broadcast_div(&se)?;
    let q = rne(&v.clamp(lo, hi)?)?;
    let mask = (v.ge(lo)? * v.le(hi)?)?.to_dtype(x.dtype())?;
    let slope = ((&q - (v * &mask)?)? * site.grad_scale())?.detach();
    let y = q.broadcast_mul(&se)?;
    let along_x = ((&x - x.detach())? * mask.detach())?;
    let along_s = slope.broadcast_mul(&(&s - s.detach())?)?;
    (y.detach() + along_x)? + along_s
}

#[inline(always)]
fn code<T: Real>(v: T, lo: T, hi: T) -> T {
    // Comparisons, not min and max: a NaN must come out as one.
    let v = if v < lo { lo } else { v };
    let v = if v > hi { hi } else { v };
    v.rne()
}

simd! {
    /// `out = 2 mean |row|`, the mean accumulated in f64.
    fn scale_rows<T>(w: &[T], width: usize, out: &mut [T]) {
        for (row, s) in w.chunks_exact(width).zip(out) {
            let mut lanes = [0f64; 8];
            let blocks = row.chunks_exact(8);
            let tail = blocks.remainder();
            for block in blocks {
                for (lane, v) in lanes.iter_mut().zip(block) {
                    *lane += v.abs().to_f64();
                }
            }
            for (lane, v) in lanes.iter_mut().zip(tail) {
                *lane += v.abs().to_f64();
            }
            *s = T::from_f64(2.0 * cpu::sum(&lanes) / width as f64);
        }
    }
}

simd! {
    /// Codes or values of rows on a grid with one step each.
    fn grid_rows<T>(w: &[T], step: &[T], width: usize, levels: Levels, codes: bool, y: &mut [T]) {
        let (lo, hi) = (T::from_f64(f64::from(levels.lo)), T::from_f64(f64::from(levels.hi)));
        let offset = T::from_f64(levels.offset());
        for ((row, &step), y) in w.chunks_exact(width).zip(step).zip(y.chunks_exact_mut(width)) {
            if step < T::from_f64(f64::from(f32::MIN_POSITIVE)) {
                y.fill(T::ZERO);
            } else if codes {
                for (y, &w) in y.iter_mut().zip(row) {
                    *y = code(w / step - offset, lo, hi);
                }
            } else {
                for (y, &w) in y.iter_mut().zip(row) {
                    *y = (code(w / step - offset, lo, hi) + offset) * step;
                }
            }
        }
    }
}

simd! {
    fn value_rows<T>(codes: &[T], step: &[T], width: usize, offset: T, y: &mut [T]) {
        for ((row, &step), y) in codes.chunks_exact(width).zip(step).zip(y.chunks_exact_mut(width)) {
            if step < T::from_f64(f64::from(f32::MIN_POSITIVE)) {
                y.fill(T::ZERO);
            } else {
                for (y, &k) in y.iter_mut().zip(row) {
                    *y = (k + offset) * step;
                }
            }
        }
    }
}

/// `2 mean |w|` per row.
fn scales<T: Real>(w: &[T], width: usize) -> Vec<T> {
    let rows = w.len() / width;
    let mut out = vec![T::ZERO; rows];
    let step = cpu::chunk_rows(width);
    out.par_chunks_mut(step).zip(w.par_chunks(step * width)).for_each(|(s, w)| scale_rows(w, width, s));
    out
}

/// What a rule over rows `[R, K]` emits.
#[derive(Clone, Copy)]
enum Emit {
    Scale,
    Codes,
    Values,
}

#[derive(Clone, Copy)]
struct StatsQ {
    bits: u8,
    emit: Emit,
}

impl CustomOp1 for StatsQ {
    fn name(&self) -> &'static str {
        "statsq"
    }

    fn cpu_fwd(&self, w: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = layout.shape().dims2()?;
        real!(self.name(), w, T => {
            let w = <T as Real>::slice(self.name(), w, layout)?;
            let mut scale = scales(w, width);
            if let Emit::Scale = self.emit {
                return Ok((<T as Real>::store(scale), Shape::from(rows)));
            }
            let n = (1u32 << (self.bits - 1)) as T;
            scale.iter_mut().for_each(|s| *s /= n);
            let codes = matches!(self.emit, Emit::Codes);
            let y = on_grid(w, &scale, width, Levels::mid_rise(self.bits), codes);
            Ok((<T as Real>::store(y), layout.shape().clone()))
        })
    }

    fn bwd(&self, _w: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(grad.clone()))
    }
}

fn on_grid<T: Real>(w: &[T], step: &[T], width: usize, levels: Levels, codes: bool) -> Vec<T> {
    let mut y = vec![T::ZERO; w.len()];
    let rows = cpu::chunk_rows(width);
    y.par_chunks_mut(rows * width)
        .zip(w.par_chunks(rows * width))
        .zip(step.par_chunks(rows))
        .for_each(|((y, w), step)| grid_rows(w, step, width, levels, codes, y));
    y
}

/// (w or codes, step) to codes or values.
struct OnGrid {
    levels: Levels,
    emit: Emit,
}

impl CustomOp2 for OnGrid {
    fn name(&self) -> &'static str {
        "quantize"
    }

    fn cpu_fwd(
        &self,
        w: &CpuStorage,
        wl: &Layout,
        s: &CpuStorage,
        sl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, width) = wl.shape().dims2()?;
        real!(self.name(), w, T => {
            let (w, step) = (<T as Real>::slice(self.name(), w, wl)?, <T as Real>::slice(self.name(), s, sl)?);
            let y = if let Emit::Codes = self.emit {
                on_grid(w, step, width, self.levels, true)
            } else {
                let mut y = vec![T::ZERO; w.len()];
                let rows = cpu::chunk_rows(width);
                let offset = self.levels.offset() as T;
                y.par_chunks_mut(rows * width)
                    .zip(w.par_chunks(rows * width))
                    .zip(step.par_chunks(rows))
                    .for_each(|((y, w), step)| value_rows(w, step, width, offset, y));
                y
            };
            Ok((<T as Real>::store(y), wl.shape().clone()))
        })
    }
}

fn check_rows(op: &str, w: &Tensor, bits: u8) -> Result<()> {
    if !(1..=8).contains(&bits) {
        bail!("{op}: expected 1 to 8 bits, got {bits}")
    }
    match w.dims() {
        [_, k] if *k > 0 => Ok(()),
        other => bail!("{op}: expected a weight [rows, columns] with columns, got {other:?}"),
    }
}

fn run_statsq(op: &str, w: &Tensor, bits: u8, emit: Emit) -> Result<Tensor> {
    check_rows(op, w, bits)?;
    match cpu::road(op, &[("w", w)])? {
        Road::Kernel => w.contiguous()?.apply_op1(StatsQ { bits, emit }),
        Road::ThroughF32 => run_statsq(op, &cpu::wide(w)?, bits, emit)?.to_dtype(w.dtype()),
        Road::Reference => {
            let d = w.detach();
            let scale = reference_scale(&d)?;
            match emit {
                Emit::Scale => Ok(scale),
                Emit::Values => reference_statsq(w, bits),
                Emit::Codes => {
                    let step = (scale / f64::from(1u32 << (bits - 1)))?;
                    reference_quantize(&d, &step, Levels::mid_rise(bits))
                }
            }
        }
    }
}

/// StatsQ fake quantization of `w: [R, K]` to `bits` (1 to 8): values on the grid of each row, the
/// gradient passed through untouched. A zero row gives zeros; a NaN or infinite row gives NaN.
pub fn statsq(w: &Tensor, bits: u8) -> Result<Tensor> {
    run_statsq("statsq", w, bits, Emit::Values)
}

/// StatsQ's scale `s = 2 mean |w|` of each row of `w: [R, K]`, `[R]`, without gradient. In f32 at
/// least, whatever the dtype of w.
pub fn statsq_scale(w: &Tensor) -> Result<Tensor> {
    let w = if w.dtype() == DType::F64 { w.detach() } else { cpu::wide(&w.detach())? };
    run_statsq("statsq_scale", &w, 2, Emit::Scale)
}

/// StatsQ's integer codes of `w: [R, K]` as f32, in `[-n, n-1]`; 0 in a zero row. No gradient.
pub fn statsq_codes(w: &Tensor, bits: u8) -> Result<Tensor> {
    run_statsq("statsq_codes", &w.detach(), bits, Emit::Codes)?.to_dtype(DType::F32)
}

fn check_step(op: &str, w: &Tensor, step: &Tensor) -> Result<()> {
    check_rows(op, w, 8)?;
    if step.dims() != [w.dim(0)?] {
        bail!("{op}: expected one step per row, [{}], got {:?}", w.dim(0)?, step.dims())
    }
    Ok(())
}

/// The codes of `w: [R, K]` on given steps `[R]`: `clamp(rne(w/step - offset), lo, hi)` as f32. A
/// row whose step is below the smallest normal f32 (or negative) gets 0. No gradient.
pub fn quantize(w: &Tensor, step: &Tensor, levels: Levels) -> Result<Tensor> {
    check_step("quantize", w, step)?;
    let (w, step) = (w.detach(), step.detach());
    match cpu::road("quantize", &[("w", &w), ("step", &step)])? {
        Road::Kernel => {
            let op = OnGrid { levels, emit: Emit::Codes };
            w.contiguous()?.apply_op2_no_bwd(&step.contiguous()?, &op)?.to_dtype(DType::F32)
        }
        Road::ThroughF32 => quantize(&cpu::wide(&w)?, &cpu::wide(&step)?, levels),
        Road::Reference => reference_quantize(&w, &step, levels)?.to_dtype(DType::F32),
    }
}

/// The values `step * (codes + offset)` of codes `[R, K]` on steps `[R]`, in the dtype of step;
/// zeros where [`quantize`] gives a zero row. No gradient.
pub fn dequantize(codes: &Tensor, step: &Tensor, levels: Levels) -> Result<Tensor> {
    check_step("dequantize", codes, step)?;
    let (codes, step) = (codes.detach().to_dtype(step.dtype())?, step.detach());
    match cpu::road("dequantize", &[("codes", &codes), ("step", &step)])? {
        Road::Kernel => {
            let op = OnGrid { levels, emit: Emit::Values };
            codes.contiguous()?.apply_op2_no_bwd(&step.contiguous()?, &op)
        }
        Road::ThroughF32 => {
            dequantize(&cpu::wide(&codes)?, &cpu::wide(&step)?, levels)?.to_dtype(step.dtype())
        }
        Road::Reference => reference_dequantize(&codes, &step, levels),
    }
}

/// Where an LSQ quantizer sits: how the elements of x share scales.
#[derive(Clone, Copy, Debug)]
struct Site {
    levels: Levels,
    /// Length of the last axis of x.
    width: usize,
    /// Elements between one change of scale and the next.
    run: usize,
    scales: usize,
    /// Elements of x that share one scale.
    shared: usize,
    /// The scale belongs to the last axis.
    per_column: bool,
}

impl Site {
    fn new(
        op: &str,
        x: &Tensor,
        s: &Tensor,
        shift: Option<&Tensor>,
        levels: Levels,
        axis: Option<usize>,
    ) -> Result<Self> {
        if levels.half || levels.hi < 1 || levels.lo > 0 {
            bail!("{op}: expected levels lo <= 0 < hi without half offset, got {levels:?}")
        }
        let dims = x.dims();
        let Some(&width) = dims.last() else { bail!("{op}: expected x with an axis, got a scalar") };
        let count = x.elem_count();
        let (scales, run) = match axis {
            None => (1, count),
            Some(a) if a < dims.len() => (dims[a], dims[a + 1..].iter().product()),
            Some(a) => bail!("{op}: expected a scale axis below {}, got {a}", dims.len()),
        };
        if count == 0 {
            bail!("{op}: expected x with elements, got {dims:?}")
        }
        if s.dims() != [scales] {
            match axis {
                Some(a) => bail!(
                    "{op}: expected one scale per entry of axis {a} of x {dims:?}, [{scales}], got {:?}",
                    s.dims()
                ),
                None => bail!("{op}: expected one scale, [1], got {:?}", s.dims()),
            }
        }
        if let Some(shift) = shift {
            if shift.dims() != [width] {
                bail!("{op}: expected a shift per last-axis entry of x, [{width}], got {:?}", shift.dims())
            }
        }
        let per_column = axis == Some(dims.len() - 1);
        Ok(Site { levels, width, run, scales, shared: count / scales, per_column })
    }

    /// `1 / sqrt(hi * m)`, the factor on the scale's gradient.
    fn grad_scale(&self) -> f64 {
        1.0 / (f64::from(self.levels.hi) * self.shared as f64).sqrt()
    }

    fn broadcast(&self, s: &Tensor, x: &Tensor, axis: Option<usize>) -> Result<Tensor> {
        let mut dims = vec![1; x.rank()];
        if let Some(a) = axis {
            dims[a] = self.scales;
        }
        s.reshape(dims)
    }

    fn scale_of_row(&self, row: usize) -> usize {
        row * self.width / self.run % self.scales
    }

    /// The effective scale of each row, or of each column.
    fn effective<T: Real>(&self, s: &[T], rows: usize) -> Vec<T> {
        let floor = T::from_f64(SCALE_FLOOR);
        let lift = |s: T| if s < floor { floor } else { s };
        if self.per_column {
            s.iter().map(|&s| lift(s)).collect()
        } else {
            (0..rows).map(|r| lift(s[self.scale_of_row(r)])).collect()
        }
    }

    fn bounds<T: Real>(&self) -> (T, T) {
        (T::from_f64(f64::from(self.levels.lo)), T::from_f64(f64::from(self.levels.hi)))
    }

    fn forward<T: Real>(&self, x: &[T], s: &[T], shift: &[T], codes: bool) -> Vec<T> {
        let width = self.width;
        let se = self.effective(s, x.len() / width);
        let (lo, hi) = self.bounds();
        let mut y = vec![T::ZERO; x.len()];
        let rows = cpu::chunk_rows(width);
        y.par_chunks_mut(rows * width).zip(x.par_chunks(rows * width)).enumerate().for_each(|(i, (y, x))| {
            if self.per_column {
                lsq_columns(x, shift, &se, lo, hi, codes, y);
            } else {
                lsq_rows(x, shift, &se[i * rows..], lo, hi, codes, y);
            }
        });
        y
    }

    /// dx, then ds, then dshift.
    fn backward<T: Real>(&self, x: &[T], s: &[T], shift: &[T], g: &[T]) -> Vec<T> {
        let width = self.width;
        let count = x.len();
        let se = self.effective(s, count / width);
        let (lo, hi) = self.bounds();
        let rows = cpu::chunk_rows(width);
        let chunks = count.div_ceil(rows * width);
        let mut out = vec![T::ZERO; count + self.scales + width];
        let mut dshift = vec![T::ZERO; chunks * width];
        // Per row where a row has one scale, per chunk and column where a column has one.
        let per_chunk = if self.per_column { width } else { rows };
        let mut ds = vec![T::ZERO; chunks * per_chunk];
        out[..count]
            .par_chunks_mut(rows * width)
            .zip(x.par_chunks(rows * width))
            .zip(g.par_chunks(rows * width))
            .zip(dshift.par_chunks_mut(width))
            .zip(ds.par_chunks_mut(per_chunk))
            .enumerate()
            .for_each(|(i, ((((dx, x), g), dshift), ds))| {
                if self.per_column {
                    lsq_columns_grad(x, shift, &se, lo, hi, g, dx, ds, dshift);
                } else {
                    let mut slope = vec![T::ZERO; width];
                    lsq_rows_grad(x, shift, &se[i * rows..], lo, hi, g, dx, ds, dshift, &mut slope);
                }
            });
        let factor = self.grad_scale();
        if self.per_column {
            for (o, d) in out[count..].iter_mut().zip(cpu::fold(&ds, width)) {
                *o = T::from_f64(d.to_f64() * factor);
            }
        } else {
            let mut total = vec![0f64; self.scales];
            for (row, d) in ds[..count / width].iter().enumerate() {
                total[self.scale_of_row(row)] += d.to_f64();
            }
            for (o, d) in out[count..].iter_mut().zip(total) {
                *o = T::from_f64(d * factor);
            }
        }
        out[count + self.scales..].copy_from_slice(&cpu::fold(&dshift, width));
        out
    }
}

simd! {
    fn lsq_rows<T>(x: &[T], shift: &[T], se: &[T], lo: T, hi: T, codes: bool, y: &mut [T]) {
        let width = shift.len();
        for ((x, y), &se) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(se) {
            let unit = if codes { T::ONE } else { se };
            for ((y, &x), &b) in y.iter_mut().zip(x).zip(shift) {
                *y = code((x + b) / se, lo, hi) * unit;
            }
        }
    }
}

simd! {
    fn lsq_columns<T>(x: &[T], shift: &[T], se: &[T], lo: T, hi: T, codes: bool, y: &mut [T]) {
        let width = shift.len();
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            for (((y, &x), &b), &se) in y.iter_mut().zip(x).zip(shift).zip(se) {
                let q = code((x + b) / se, lo, hi);
                *y = if codes { q } else { q * se };
            }
        }
    }
}

/// (dx, the slope of y in the effective scale) of one element.
#[inline(always)]
fn element_grad<T: Real>(x: T, shift: T, se: T, lo: T, hi: T, g: T) -> (T, T) {
    let v = (x + shift) / se;
    let q = code(v, lo, hi);
    let inside = v >= lo && v <= hi;
    let dx = if inside { g } else { T::ZERO };
    let slope = if inside { q - v } else { q };
    (dx, g * slope)
}

simd! {
    fn lsq_rows_grad<T>(
        x: &[T], shift: &[T], se: &[T], lo: T, hi: T, g: &[T],
        dx: &mut [T], ds: &mut [T], dshift: &mut [T], slope: &mut [T],
    ) {
        let width = shift.len();
        let (dshift, slope) = (&mut dshift[..width], &mut slope[..width]);
        let rows = x.chunks_exact(width).zip(g.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
        for ((((x, g), dx), &se), ds) in rows.zip(se).zip(ds) {
            for c in 0..width {
                let (d, t) = element_grad(x[c], shift[c], se, lo, hi, g[c]);
                dx[c] = d;
                dshift[c] += d;
                slope[c] = t;
            }
            *ds = cpu::sum(slope);
        }
    }
}

simd! {
    fn lsq_columns_grad<T>(
        x: &[T], shift: &[T], se: &[T], lo: T, hi: T, g: &[T],
        dx: &mut [T], ds: &mut [T], dshift: &mut [T],
    ) {
        let width = shift.len();
        let (se, ds, dshift) = (&se[..width], &mut ds[..width], &mut dshift[..width]);
        let rows = x.chunks_exact(width).zip(g.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
        for ((x, g), dx) in rows {
            for c in 0..width {
                let (d, t) = element_grad(x[c], shift[c], se[c], lo, hi, g[c]);
                dx[c] = d;
                dshift[c] += d;
                ds[c] += t;
            }
        }
    }
}

/// (x, s, shift) to y, or to codes.
#[derive(Clone, Copy)]
struct Lsq {
    site: Site,
    codes: bool,
}

impl CustomOp3 for Lsq {
    fn name(&self) -> &'static str {
        "lsq"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        s: &CpuStorage,
        sl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        real!(name, x, T => {
            let (s, b) = (<T as Real>::slice(name, s, sl)?, <T as Real>::slice(name, b, bl)?);
            let y = self.site.forward(<T as Real>::slice(name, x, xl)?, s, b, self.codes);
            Ok((<T as Real>::store(y), xl.shape().clone()))
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        s: &Tensor,
        shift: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let op = LsqGrad { site: self.site, grad: grad.contiguous()? };
        let packed = x.apply_op3_no_bwd(s, shift, &op)?;
        let count = x.elem_count();
        let dx = cpu::unpack(&packed, 0, x.shape())?;
        let ds = cpu::unpack(&packed, count, s.shape())?;
        let dshift = shift
            .track_op()
            .then(|| cpu::unpack(&packed, count + s.elem_count(), shift.shape()))
            .transpose()?;
        Ok((Some(dx), Some(ds), dshift))
    }
}

/// (x, s, shift) to dx, ds and dshift in one flat result.
struct LsqGrad {
    site: Site,
    grad: Tensor,
}

impl CustomOp3 for LsqGrad {
    fn name(&self) -> &'static str {
        "lsq-grad"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        s: &CpuStorage,
        sl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        let (grad, gl) = self.grad.storage_and_layout();
        let grad = cpu::host(name, &grad)?;
        real!(name, x, T => {
            let (s, b) = (<T as Real>::slice(name, s, sl)?, <T as Real>::slice(name, b, bl)?);
            let g = <T as Real>::slice(name, grad, gl)?;
            let out = self.site.backward(<T as Real>::slice(name, x, xl)?, s, b, g);
            let shape = Shape::from(out.len());
            Ok((<T as Real>::store(out), shape))
        })
    }
}

/// LSQ fake quantization of x (any shape): `s: [A]` holds one scale per entry of `axis`, or `[1]`
/// for the whole of x where `axis` is `None`; `shift_in: [C]`, added before, lies along the last
/// axis. Gradients reach x, s and the shift. Errs when the lengths do not fit.
pub fn lsq(
    x: &Tensor,
    s: &Tensor,
    shift_in: Option<&Tensor>,
    levels: Levels,
    axis: Option<usize>,
) -> Result<Tensor> {
    run_lsq("lsq", x, s, shift_in, levels, axis, false)
}

/// The integer codes of [`lsq`] as f32, in the shape of x. No gradient.
pub fn lsq_codes(
    x: &Tensor,
    s: &Tensor,
    shift_in: Option<&Tensor>,
    levels: Levels,
    axis: Option<usize>,
) -> Result<Tensor> {
    let shift = shift_in.map(Tensor::detach);
    run_lsq("lsq_codes", &x.detach(), &s.detach(), shift.as_ref(), levels, axis, true)?.to_dtype(DType::F32)
}

fn run_lsq(
    op: &str,
    x: &Tensor,
    s: &Tensor,
    shift_in: Option<&Tensor>,
    levels: Levels,
    axis: Option<usize>,
    codes: bool,
) -> Result<Tensor> {
    let site = Site::new(op, x, s, shift_in, levels, axis)?;
    let mut named = vec![("x", x), ("s", s)];
    named.extend(shift_in.map(|t| ("shift_in", t)));
    match cpu::road(op, &named)? {
        Road::Kernel => {
            let shift = match shift_in {
                Some(shift) => shift.contiguous()?,
                None => Tensor::zeros(site.width, x.dtype(), x.device())?,
            };
            x.contiguous()?.apply_op3(&s.contiguous()?, &shift, Lsq { site, codes })
        }
        Road::ThroughF32 => {
            let shift = shift_in.map(cpu::wide).transpose()?;
            let y = run_lsq(op, &cpu::wide(x)?, &cpu::wide(s)?, shift.as_ref(), levels, axis, codes)?;
            y.to_dtype(x.dtype())
        }
        Road::Reference if codes => {
            let se = site.broadcast(s, x, axis)?.maximum(SCALE_FLOOR)?;
            let x = match shift_in {
                Some(shift) => x.broadcast_add(shift)?,
                None => x.clone(),
            };
            rne(&x.broadcast_div(&se)?.clamp(f64::from(levels.lo), f64::from(levels.hi))?)
        }
        Road::Reference => reference_lsq(x, s, shift_in, levels, axis),
    }
}

/// LSQ's first scale, `factor * mean|x| / sqrt(hi)` over the elements that share it, floored at
/// [`SCALE_FLOOR`]: `[A]` for an axis, `[1]` without. In f32 at least. No gradient.
pub fn lsq_init(x: &Tensor, levels: Levels, axis: Option<usize>, factor: f64) -> Result<Tensor> {
    let op = "lsq_init";
    let scales = match axis {
        None => 1,
        Some(a) if a < x.rank() => x.dim(a)?,
        Some(a) => bail!("{op}: expected a scale axis below {}, got {a}", x.rank()),
    };
    let x = if x.dtype() == DType::F64 { x.detach() } else { cpu::wide(&x.detach())? };
    let dummy = Tensor::zeros(scales, x.dtype(), x.device())?;
    Site::new(op, &x, &dummy, None, levels, axis)?;
    // One row per scale; a calibration pass, so the copy does not matter.
    let rows = match axis {
        None | Some(0) => x.reshape((scales, ()))?,
        Some(a) => x.transpose(0, a)?.contiguous()?.reshape((scales, ()))?,
    };
    let mean = (run_statsq(op, &rows, 2, Emit::Scale)? * (0.5 * factor / f64::from(levels.hi).sqrt()))?;
    mean.maximum(SCALE_FLOOR)
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use candle_core::{Device, Var};

    fn tensor<T: candle_core::WithDType>(rows: &[&[T]]) -> Tensor {
        Tensor::from_vec(rows.concat(), (rows.len(), rows[0].len()), &Device::Cpu).unwrap()
    }

    fn bits(t: &Tensor) -> Vec<u32> {
        t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn statsq_agrees_and_passes_the_gradient_through() {
        for shape in [[1, 1], [3, 5], [7, 13], [600, 50]] {
            for bits in [1, 2, 3, 4, 8] {
                let w = [values(&shape, u64::from(bits))];
                agrees(&w, &|t| statsq(&t[0], bits), &|t| reference_statsq(&t[0], bits));
            }
        }
        let w = values(&[3, 5], 1);
        close("identity", &run(&[w], &|t| statsq(&t[0], 2))[1], &values(&[3, 5], 77), 0.0);
        ignores_threads(&[values(&[600, 50], 1)], &|t| statsq(&t[0], 2));
    }

    #[test]
    fn statsq_ties_go_to_even_and_stay_on_the_grid() {
        // Mean magnitude 1/2, so s = 1 and the thresholds at 2 bits are -1/2, 0, 1/2; the row also
        // holds both clip points and an entry beyond each.
        let w = tensor(&[&[0.0f32, 0.5, -0.5, 1.0, -1.0, -0.0, 0.25, -0.75]]);
        assert_eq!(statsq_scale(&w).unwrap().to_vec1::<f32>().unwrap(), [1.0]);
        // x - 1/2 = -0.5, 0.5, -1.5, 1.5, -2.5, -0.5, 0, -2
        let codes = statsq_codes(&w, 2).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(codes, [[0.0, 0.0, -2.0, 1.0, -2.0, 0.0, 0.0, -2.0]]);
        let values = statsq(&w, 2).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(values, [[0.25, 0.25, -0.75, 0.75, -0.75, 0.25, 0.25, -0.75]]);
        // A single column lies on a tie at every width.
        let w = tensor(&[&[0.3f32], &[-0.3]]);
        assert_eq!(statsq_codes(&w, 2).unwrap().to_vec2::<f32>().unwrap(), [[0.0], [-2.0]]);
        assert_eq!(statsq_codes(&w, 3).unwrap().to_vec2::<f32>().unwrap(), [[2.0], [-2.0]]);
    }

    #[test]
    fn quantize_on_the_same_step_gives_statsq() {
        for b in [2u8, 3, 4, 8] {
            // Multiples of 1/16 make many ties whatever the scale's digits.
            let w = ((values(&[40, 53], 5) * 16.0).unwrap().round().unwrap() / 16.0).unwrap();
            let w = w.to_dtype(DType::F32).unwrap();
            let step = (statsq_scale(&w).unwrap() / f64::from(1u32 << (b - 1))).unwrap();
            let codes = quantize(&w, &step, Levels::mid_rise(b)).unwrap();
            assert_eq!(bits(&codes), bits(&statsq_codes(&w, b).unwrap()));
            let values = dequantize(&codes, &step, Levels::mid_rise(b)).unwrap();
            assert_eq!(bits(&values), bits(&statsq(&w, b).unwrap()));
            let n = f64::from(1u32 << (b - 1));
            // The equation as ofq.md writes it: clip, scale by n, round.
            let s = statsq_scale(&w).unwrap().unsqueeze(1).unwrap();
            let x = (w.broadcast_div(&s).unwrap().clamp(-1.0, 1.0).unwrap() * n).unwrap();
            let k = rne(&(x - 0.5).unwrap()).unwrap().clamp(-n, n - 1.0).unwrap();
            close("codes by the book", &codes, &k, 0.0);
        }
    }

    #[test]
    fn signed_and_unsigned_grids() {
        let w = tensor(&[&[-1.0f32, 0.24, 0.25, 0.75, 9.0], &[-1.0, 0.5, 1.0, 1.5, 2.5]]);
        let step = Tensor::new(&[0.5f32, 1.0], &Device::Cpu).unwrap();
        let k = quantize(&w, &step, Levels::signed(2)).unwrap();
        assert_eq!(k.to_vec2::<f32>().unwrap(), [[-2.0, 0.0, 0.0, 1.0, 1.0], [-1.0, 0.0, 1.0, 1.0, 1.0]]);
        let k = quantize(&w, &step, Levels::unsigned(2)).unwrap();
        assert_eq!(k.to_vec2::<f32>().unwrap(), [[0.0, 0.0, 0.0, 2.0, 3.0], [0.0, 0.0, 1.0, 2.0, 2.0]]);
        let y = dequantize(&k, &step, Levels::unsigned(2)).unwrap();
        assert_eq!(y.to_vec2::<f32>().unwrap(), [[0.0, 0.0, 0.0, 1.0, 1.5], [0.0, 0.0, 1.0, 2.0, 2.0]]);
    }

    #[test]
    fn empty_tiny_and_broken_rows() {
        let w = tensor(&[&[0.0f32, 0.0], &[1e-39, -1e-39], &[1.0, f32::NAN], &[f32::INFINITY, 1.0]]);
        let y = statsq(&w, 2).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!((y[0].as_slice(), y[1].as_slice()), ([0.0; 2].as_slice(), [0.0; 2].as_slice()));
        assert!(y[2].iter().all(|v| v.is_nan()) && y[3][0].is_nan(), "{y:?}");
        let k = statsq_codes(&w, 2).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!((k[0][0], k[1][1]), (0.0, 0.0));
        let zero = run(&[tensor(&[&[0.0f64, 0.0]])], &|t| statsq(&t[0], 2));
        close("gradient of a zero row", &zero[1], &values(&[1, 2], 77), 0.0);
    }

    fn site(shape: &[usize], axis: Option<usize>) -> Vec<Tensor> {
        let scales = axis.map_or(1, |a| shape[a]);
        let s = values(&[scales], 2).abs().unwrap().affine(0.2, 0.15).unwrap();
        vec![(values(shape, 1) * 0.7).unwrap(), s, (values(&[shape[shape.len() - 1]], 3) * 0.3).unwrap()]
    }

    #[test]
    fn lsq_agrees_on_every_axis() {
        let shapes: [(&[usize], &[Option<usize>]); 5] = [
            (&[1, 1], &[None, Some(0), Some(1)]),
            (&[3, 5], &[None, Some(0), Some(1)]),
            (&[2, 7, 13], &[None, Some(0), Some(1), Some(2)]),
            (&[2, 3, 4, 5], &[None, Some(0), Some(1), Some(2), Some(3)]),
            (&[41, 50, 17], &[None, Some(1), Some(2)]),
        ];
        for (shape, axes) in shapes {
            for &axis in axes {
                for levels in [Levels::signed(2), Levels::unsigned(3)] {
                    let t = site(shape, axis);
                    let op = |t: &[Tensor]| lsq(&t[0], &t[1], Some(&t[2]), levels, axis);
                    agrees(&t, &op, &|t| reference_lsq(&t[0], &t[1], Some(&t[2]), levels, axis));
                    let op = |t: &[Tensor]| lsq(&t[0], &t[1], None, levels, axis);
                    agrees(&t[..2], &op, &|t| reference_lsq(&t[0], &t[1], None, levels, axis));
                }
            }
        }
        for axis in [None, Some(1), Some(2)] {
            let t = site(&[41, 50, 17], axis);
            ignores_threads(&t, &|t| lsq(&t[0], &t[1], Some(&t[2]), Levels::signed(3), axis));
        }
    }

    #[test]
    fn lsq_by_hand() {
        // 2 bits signed, s = 1/2: v = -6, -2 (the bound), 0.6, 1 (the bound), 1.2.
        let x = Var::new(&[-3.0f64, -1.0, 0.3, 0.5, 0.6], &Device::Cpu).unwrap();
        let s = Var::new(&[0.5f64], &Device::Cpu).unwrap();
        let y = lsq(&x, &s, None, Levels::signed(2), None).unwrap();
        assert_eq!(y.to_vec1::<f64>().unwrap(), [-1.0, -1.0, 0.5, 0.5, 0.5]);
        let k = lsq_codes(&x, &s, None, Levels::signed(2), None).unwrap();
        assert_eq!(k.to_vec1::<f32>().unwrap(), [-2.0, -2.0, 1.0, 1.0, 1.0]);
        let g = Tensor::new(&[1.0f64, 10.0, 100.0, 1000.0, 10000.0], &Device::Cpu).unwrap();
        let grads = (y * g).unwrap().sum_all().unwrap().backward().unwrap();
        assert_eq!(grads.get(&x).unwrap().to_vec1::<f64>().unwrap(), [0.0, 10.0, 100.0, 1000.0, 0.0]);
        // -2 * 1 below, 0 at the bounds, (1 - 0.6) * 100 inside, 1 * 10000 above; hi * m = 5.
        let want = (-2.0 + 0.4 * 100.0 + 10000.0) / 5f64.sqrt();
        assert!((grads.get(&s).unwrap().to_vec1::<f64>().unwrap()[0] - want).abs() < F64 * want);
    }

    #[test]
    fn lsq_floor_is_straight_through() {
        for small in [1e-7f64, -0.3] {
            let x = values(&[4, 3], 1);
            let s = Tensor::new(&[small], &Device::Cpu).unwrap();
            let floor = Tensor::new(&[SCALE_FLOOR], &Device::Cpu).unwrap();
            let op = |t: &[Tensor]| lsq(&t[0], &t[1], None, Levels::signed(2), None);
            let (got, want) = (run(&[x.clone(), s], &op), run(&[x, floor], &op));
            for (got, want) in got.iter().zip(&want) {
                close("floored", got, want, 0.0);
            }
            assert!(flat(&got[2])[0] != 0.0, "the scale still gets its gradient");
        }
    }

    #[test]
    fn lsq_init_is_the_mean_of_the_sharing_elements() {
        let x = tensor(&[&[1.0f64, -2.0, 3.0], &[0.0, 0.0, 0.0]]);
        let s = lsq_init(&x, Levels::signed(3), Some(0), 2.0).unwrap();
        close("rows", &s, &Tensor::new(&[4.0 / 3f64.sqrt(), SCALE_FLOOR], &Device::Cpu).unwrap(), F64);
        let s = lsq_init(&x, Levels::signed(3), Some(1), 2.0).unwrap();
        let want =
            Tensor::new(&[1.0 / 3f64.sqrt(), 2.0 / 3f64.sqrt(), 3.0 / 3f64.sqrt()], &Device::Cpu).unwrap();
        close("columns", &s, &want, F64);
        let s = lsq_init(&x, Levels::unsigned(2), None, 4.0).unwrap();
        close("all", &s, &Tensor::new(&[4.0 / 3f64.sqrt()], &Device::Cpu).unwrap(), F64);
    }

    #[test]
    fn wrong_arguments_are_named() {
        let x = values(&[2, 7, 13], 1);
        let text = refusal(lsq(&x, &values(&[6], 1), None, Levels::signed(2), Some(1)));
        assert!(text.contains("lsq") && text.contains("[7]") && text.contains("[6]"), "{text}");
        let text = refusal(lsq(&x, &values(&[7], 1), Some(&values(&[7], 1)), Levels::signed(2), Some(1)));
        assert!(text.contains("[13]"), "{text}");
        assert!(refusal(lsq(&x, &values(&[1], 1), None, Levels::signed(1), None)).contains("lo <= 0 < hi"));
        assert!(refusal(statsq(&x, 2)).contains("[2, 7, 13]"));
        assert!(refusal(statsq(&values(&[2, 2], 1), 9)).contains("got 9"));
        assert!(refusal(quantize(&values(&[2, 2], 1), &values(&[3], 1), Levels::signed(2))).contains("[2]"));
    }
}
