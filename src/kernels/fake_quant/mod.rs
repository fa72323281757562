//! Fake quantization: StatsQ for weights (`statsq`), LSQ for activations (`lsq`), and here the grid
//! that both round to and the codes of a given one.
//!
//! A code `k` in `[lo, hi]` stands for `step * (k + offset)`, `w: [R, K]`, one step a row:
//!
//! ```text
//! k = clamp(rne(w / step - offset), lo, hi)     y = step * (k + offset)
//! ```
//!
//! A step below the smallest normal f32 makes a row of zeros with codes 0. A NaN stays a NaN.
//!
//! On the CPU f32 and f64, f16 and bf16 through f32; on a CUDA device f32, f16 and bf16 (kernels/grid.cu,
//! kernels/statsq.cu, kernels/lsq.cu), whose codes on given steps are those of the CPU to the bit.

#[cfg(feature = "cuda")]
mod launch;
mod lsq;
mod site;
mod statsq;

use super::cpu::{self, real, simd, Real, Road};
#[cfg(feature = "cuda")]
use super::cuda::{self, Launch};
#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaStorage};
use candle_core::{bail, CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

pub use lsq::{lsq, lsq_codes, lsq_init, lsq_shifted, reference_lsq};
pub use site::SCALE_FLOOR;
pub use statsq::{
    reference_statsq, reference_statsq_free, statsq, statsq_annealed, statsq_codes, statsq_free, statsq_scale,
};

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

    pub(super) fn offset(self) -> f64 {
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

/// The code nearest to `v`.
#[inline(always)]
pub(super) fn code<T: Real>(v: T, lo: T, hi: T) -> T {
    // Comparisons, not min and max: a NaN must come out as one.
    let v = if v < lo { lo } else { v };
    let v = if v > hi { hi } else { v };
    v.rne()
}

simd! {
    /// Codes or values of rows on a grid with one step each.
    pub(super) fn grid_rows<T>(w: &[T], step: &[T], width: usize, levels: Levels, codes: bool, y: &mut [T]) {
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

/// What a rule over rows `[R, K]` emits.
#[derive(Clone, Copy)]
enum Emit {
    Scale,
    Codes,
    Values,
}

fn on_grid<T: Real>(w: &[T], step: &[T], width: usize, levels: Levels, codes: bool) -> Vec<T> {
    let mut y = cpu::unwritten(w.len());
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
                let mut y = cpu::unwritten(w.len());
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

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        w: &CudaStorage,
        wl: &Layout,
        s: &CudaStorage,
        sl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (name, device, dtype) = (self.name(), w.device(), w.dtype());
        let (rows, width) = wl.shape().dims2()?;
        let codes = matches!(self.emit, Emit::Codes);
        let y = cuda::unwritten(device, wl.shape(), if codes { DType::F32 } else { dtype })?;
        let kernel = if codes { "grid_codes" } else { "grid_values" };
        let mut launch = Launch::new(device, "grid", format!("{kernel}_{}", cuda::suffix(name, dtype)?))
            .place(cuda::place(name, w, wl)?)
            .place(cuda::place(name, s, sl)?)
            .place(cuda::start(&y))
            .i64(rows)
            .i32(width)
            .f32(self.levels.offset() as f32);
        if codes {
            launch = launch.f32(self.levels.lo as f32).f32(self.levels.hi as f32);
        }
        let (grid, block) = cuda::row_grid(rows, width);
        // SAFETY: w and y have rows * width elements and there is a step for each row, as `check_step` saw; rows are
        // strided over.
        unsafe { launch.run(grid, block, 0)? };
        Ok((y, wl.shape().clone()))
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
    match cpu::road_with_cuda("quantize", &[("w", &w), ("step", &step)])? {
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
    match cpu::road_with_cuda("dequantize", &[("codes", &codes), ("step", &step)])? {
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

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use candle_core::Device;

    pub(super) fn tensor<T: candle_core::WithDType>(rows: &[&[T]]) -> Tensor {
        Tensor::from_vec(rows.concat(), (rows.len(), rows[0].len()), &Device::Cpu).unwrap()
    }

    fn bits(t: &Tensor) -> Vec<u32> {
        t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
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
    fn wrong_arguments_are_named() {
        assert!(refusal(quantize(&values(&[2, 2], 1), &values(&[3], 1), Levels::signed(2))).contains("[2]"));
    }
}
