//! StatsQ (OFQ, Liu et al. 2023; ofq.md section 1), `w: [R, K]`, `n = 2^(bits-1)`:
//!
//! ```text
//! s_r = 2 mean_k |w_rk|     step = s / n     k = clamp(rne(w / step - 1/2), -n, n - 1)
//! y   = step * (k + 1/2)    dL/dw = dL/dy, nothing through s
//! ```
//!
//! Annealing (confidence-guided, ofq.md 4) lets only weights near a threshold move:
//!
//! ```text
//! x = n clamp(w / s, -1, 1)     free(w) = exists j in {-(n-1), .., n-1}: |x - j| <= band
//! dL/dw = free(w) dL/dy
//! ```
//!
//! `n` is a power of two, so `w / (s/n) = n * (w/s)` exactly while nothing is subnormal; a step
//! below the smallest normal f32 makes a row of zeros with codes 0. A NaN stays a NaN.

use super::{check_rows, on_grid, reference_dequantize, reference_quantize, Emit, Levels};
use crate::kernels::cpu::{self, real, simd, Real, Road};
#[cfg(feature = "cuda")]
use crate::kernels::cuda::{self, Launch, Place};
use crate::kernels::tape::{self, Reads};
#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaDevice, CudaStorage};
use candle_core::{bail, CpuStorage, CustomOp1, CustomOp2, DType, Layout, Result, Shape, Tensor, D};
use rayon::prelude::*;

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

/// `2 mean |w|` per row.
fn scales<T: Real>(w: &[T], width: usize) -> Vec<T> {
    let rows = w.len() / width;
    let mut out = vec![T::ZERO; rows];
    let step = cpu::chunk_rows(width);
    out.par_chunks_mut(step).zip(w.par_chunks(step * width)).for_each(|(s, w)| scale_rows(w, width, s));
    out
}

/// Which weights lie within `band` steps of a threshold, in plain candle ops: 1 or 0, `w: [R, K]`.
pub fn reference_statsq_free(w: &Tensor, bits: u8, band: f64) -> Result<Tensor> {
    let w = w.detach();
    let n = f64::from(1u32 << (bits - 1));
    let scale = reference_scale(&w)?.unsqueeze(1)?;
    let live = scale.ge(f64::from(f32::MIN_POSITIVE) * n)?.to_dtype(w.dtype())?;
    let safe = ((&scale * &live)? + live.affine(-1.0, 1.0)?)?;
    let x = (w.broadcast_div(&safe)?.clamp(-1.0, 1.0)? * n)?;
    let nearest = super::rne(&x)?.clamp(1.0 - n, n - 1.0)?;
    (x - nearest)?.abs()?.le(band)?.to_dtype(w.dtype())?.broadcast_mul(&live)
}

simd! {
    /// `out = 1` where a weight lies within `band` steps of a threshold, times `g` where there is one.
    fn free_rows<T>(w: &[T], scale: &[T], width: usize, n: T, band: T, g: &[T], out: &mut [T]) {
        let (last, low, bound) = (n - T::ONE, T::ONE - n, T::ZERO - T::ONE);
        let least = T::from_f64(f64::from(f32::MIN_POSITIVE)) * n;
        for (r, ((row, &s), out)) in
            w.chunks_exact(width).zip(scale).zip(out.chunks_exact_mut(width)).enumerate()
        {
            if s < least {
                out.fill(T::ZERO);
                continue;
            }
            for (out, &w) in out.iter_mut().zip(row) {
                let x = w / s;
                let x = if x < bound { bound } else { x };
                let x = if x > T::ONE { T::ONE } else { x };
                let x = x * n;
                let j = x.rne();
                let j = if j < low { low } else { j };
                let j = if j > last { last } else { j };
                *out = if (x - j).abs() <= band { T::ONE } else { T::ZERO };
            }
            if !g.is_empty() {
                for (out, &g) in out.iter_mut().zip(&g[r * width..(r + 1) * width]) {
                    // A gradient that is not finite stays one where the entry is free, and is cut where not.
                    *out = if *out == T::ONE { g } else { T::ZERO };
                }
            }
        }
    }
}

fn free<T: Real>(w: &[T], width: usize, bits: u8, band: f64, g: &[T]) -> Vec<T> {
    let scale = scales(w, width);
    let (n, band) = (T::from_f64(f64::from(1u32 << (bits - 1))), T::from_f64(band));
    let mut out = cpu::unwritten(w.len());
    let rows = cpu::chunk_rows(width);
    out.par_chunks_mut(rows * width)
        .zip(w.par_chunks(rows * width))
        .zip(scale.par_chunks(rows))
        .enumerate()
        .for_each(|(i, ((out, w), scale))| {
            let from = i * rows * width;
            let g = if g.is_empty() { g } else { &g[from..from + w.len()] };
            free_rows(w, scale, width, n, band, g, out);
        });
    out
}

/// `n = 2^(bits-1)`.
#[cfg(feature = "cuda")]
fn half_levels(bits: u8) -> f32 {
    (1u32 << (bits - 1)) as f32
}

/// `KERNEL(places.., rows, cols, a group for each row, numbers..)` of kernels/statsq.cu; `most` threads a block.
#[cfg(feature = "cuda")]
fn launch(
    device: &CudaDevice,
    kernel: &str,
    dtype: DType,
    places: &[Place],
    (rows, width): (usize, usize),
    numbers: &[f32],
    most: usize,
) -> Result<()> {
    if rows > i32::MAX as usize || width > i32::MAX as usize {
        bail!("{kernel}: expected fewer than 2^31 rows and columns, got [{rows}, {width}]")
    }
    let wide = cuda::wide(dtype);
    // What a thread keeps of a row (KEPT of the kernel), wherever the elements lie.
    let kept = if width.is_multiple_of(wide) { 16 } else { 8 };
    let threads = match width {
        0..=512 => 128,
        _ => width.div_ceil(kept).next_multiple_of(32).clamp(128, most),
    };
    // Rows of a block.
    let teams = match width {
        0..=64 => threads / 8,
        _ if width <= 32 * kept => threads / 32,
        _ => 1,
    };
    let mut launch = Launch::new(device, "statsq", format!("{kernel}_{}", cuda::suffix(kernel, dtype)?));
    for place in places {
        launch = launch.place(*place);
    }
    launch = launch.i64(rows).i64(width).i64(width);
    for number in numbers {
        launch = launch.f32(*number);
    }
    // SAFETY: the callers give places of rows * width elements, of a scale for each row, or none, in the kernel's
    // order; blocks are whole warps and rows are strided over.
    unsafe { launch.run((rows.div_ceil(teams).min(1 << 20), 1, 1), (threads, 1, 1), 0) }
}

#[derive(Clone, Copy)]
struct StatsQ {
    bits: u8,
    emit: Emit,
    /// Annealed to so many steps around the thresholds.
    band: Option<f64>,
}

/// (w) or (w, gradient) to the free entries or the gradient of the free entries.
#[derive(Clone, Copy)]
struct Free {
    bits: u8,
    band: f64,
}

impl CustomOp1 for Free {
    fn name(&self) -> &'static str {
        "statsq-free"
    }

    fn cpu_fwd(&self, w: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, width) = layout.shape().dims2()?;
        let name = CustomOp1::name(self);
        real!(name, w, T => {
            let w = <T as Real>::slice(name, w, layout)?;
            let y = free(w, width, self.bits, self.band, &[]);
            Ok((<T as Real>::store(y), layout.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, w: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let name = CustomOp1::name(self);
        let y = cuda::unwritten(w.device(), layout.shape(), DType::F32)?;
        let places = [cuda::place(name, w, layout)?, cuda::start(&y)];
        let numbers = [half_levels(self.bits), self.band as f32];
        let shape = layout.shape().dims2()?;
        launch(w.device(), "statsq_free", w.dtype(), &places, shape, &numbers, 1024)?;
        Ok((y, layout.shape().clone()))
    }
}

impl CustomOp2 for Free {
    fn name(&self) -> &'static str {
        "statsq-free-grad"
    }

    fn cpu_fwd(
        &self,
        w: &CpuStorage,
        wl: &Layout,
        g: &CpuStorage,
        gl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, width) = wl.shape().dims2()?;
        let name = CustomOp2::name(self);
        real!(name, w, T => {
            let (w, g) = (<T as Real>::slice(name, w, wl)?, <T as Real>::slice(name, g, gl)?);
            Ok((<T as Real>::store(free(w, width, self.bits, self.band, g)), wl.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        w: &CudaStorage,
        wl: &Layout,
        g: &CudaStorage,
        gl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let name = CustomOp2::name(self);
        let dw = cuda::unwritten(w.device(), wl.shape(), w.dtype())?;
        let places = [cuda::place(name, w, wl)?, cuda::place(name, g, gl)?, cuda::start(&dw)];
        let numbers = [half_levels(self.bits), self.band as f32];
        launch(w.device(), "statsq_grad", w.dtype(), &places, wl.shape().dims2()?, &numbers, 512)?;
        Ok((dw, wl.shape().clone()))
    }
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

    /// Scales and codes in f32 whatever the dtype of w.
    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, w: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (name, device, dtype) = (self.name(), w.device(), w.dtype());
        let (rows, width) = layout.shape().dims2()?;
        let (kernel, y) = match self.emit {
            Emit::Scale => ("statsq_scale", cuda::unwritten(device, rows, DType::F32)?),
            Emit::Codes => ("statsq_codes", cuda::unwritten(device, layout.shape(), DType::F32)?),
            Emit::Values => ("statsq", cuda::unwritten(device, layout.shape(), dtype)?),
        };
        let mut places = vec![cuda::place(name, w, layout)?, cuda::start(&y)];
        if let Emit::Scale = self.emit {
            launch(device, kernel, dtype, &places, (rows, width), &[], 1024)?;
            return Ok((y, Shape::from(rows)));
        }
        places.push(Place::NULL);
        launch(device, kernel, dtype, &places, (rows, width), &[half_levels(self.bits)], 1024)?;
        Ok((y, layout.shape().clone()))
    }

    fn bwd(&self, w: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        match self.band {
            None => Ok(Some(grad.clone())),
            Some(band) => Ok(Some(w.apply_op2_no_bwd(&grad.contiguous()?, &Free { bits: self.bits, band })?)),
        }
    }
}

/// The rule in every form, on whichever road there is. On a CUDA device scales and codes are f32 at least.
pub(super) fn run_statsq(op: &str, w: &Tensor, bits: u8, emit: Emit) -> Result<Tensor> {
    run_annealed(op, w, bits, emit, None)
}

fn run_annealed(op: &str, w: &Tensor, bits: u8, emit: Emit, band: Option<f64>) -> Result<Tensor> {
    check_rows(op, w, bits)?;
    match cpu::road_with_cuda(op, &[("w", w)])? {
        Road::Kernel => tape::apply1(&w.contiguous()?, StatsQ { bits, emit, band }, Reads::OPERANDS),
        Road::ThroughF32 => run_annealed(op, &cpu::wide(w)?, bits, emit, band)?.to_dtype(w.dtype()),
        Road::Reference => {
            let d = w.detach();
            let scale = reference_scale(&d)?;
            match emit {
                Emit::Scale => Ok(scale),
                Emit::Values => match band {
                    None => reference_statsq(w, bits),
                    Some(band) => {
                        let free = reference_statsq_free(&d, bits, band)?;
                        straight_through(&reference_statsq(&d, bits)?, &(w * free)?)
                    }
                },
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

/// [`statsq`] while it is annealed: the same values, and a gradient only for weights within `band`
/// steps of a threshold (0 < band < 1/2, else an error). A zero row has no such weights.
pub fn statsq_annealed(w: &Tensor, bits: u8, band: f64) -> Result<Tensor> {
    check_band("statsq_annealed", band)?;
    run_annealed("statsq_annealed", w, bits, Emit::Values, Some(band))
}

/// Which entries of `w: [R, K]` annealing leaves free, 1 or 0: those within `band` steps of a threshold,
/// the border included. In f32 at least, whatever the dtype of w. No gradient.
pub fn statsq_free(w: &Tensor, bits: u8, band: f64) -> Result<Tensor> {
    let op = "statsq_free";
    check_band(op, band)?;
    check_rows(op, w, bits)?;
    let w = at_least_f32(w)?;
    match cpu::road_with_cuda(op, &[("w", &w)])? {
        Road::Reference => reference_statsq_free(&w, bits, band),
        _ => w.contiguous()?.apply_op1_no_bwd(&Free { bits, band }),
    }
}

/// `w` without a gradient, in f32 where it is narrower, unless a kernel makes f32 of it.
pub(super) fn at_least_f32(w: &Tensor) -> Result<Tensor> {
    match w.dtype() {
        DType::F64 => Ok(w.detach()),
        DType::F16 | DType::BF16 if w.device().is_cuda() => Ok(w.detach()),
        _ => cpu::wide(&w.detach()),
    }
}

fn check_band(op: &str, band: f64) -> Result<()> {
    match band > 0.0 && band < 0.5 {
        true => Ok(()),
        false => bail!("{op}: expected a band above 0 and below 0.5 steps, got {band}"),
    }
}

/// StatsQ's scale `s = 2 mean |w|` of each row of `w: [R, K]`, `[R]`, without gradient. In f32 at
/// least, whatever the dtype of w.
pub fn statsq_scale(w: &Tensor) -> Result<Tensor> {
    let w = at_least_f32(w)?;
    run_statsq("statsq_scale", &w, 2, Emit::Scale)
}

/// StatsQ's integer codes of `w: [R, K]` as f32, in `[-n, n-1]`; 0 in a zero row. No gradient.
pub fn statsq_codes(w: &Tensor, bits: u8) -> Result<Tensor> {
    run_statsq("statsq_codes", &w.detach(), bits, Emit::Codes)?.to_dtype(DType::F32)
}

#[cfg(test)]
mod tests {
    use super::super::tests::tensor;
    use super::*;
    use crate::kernels::testing::*;

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

    #[test]
    fn annealing_frees_what_lies_near_a_threshold() {
        // Small shapes: an entry within an ulp of the band's border may fall on either side.
        for shape in [[1, 1], [3, 5], [7, 13], [60, 50]] {
            for bits in [2, 3, 4] {
                let w = [values(&shape, u64::from(bits))];
                let (op, like) = (
                    |t: &[Tensor]| statsq_annealed(&t[0], bits, 0.1),
                    |t: &[Tensor]| {
                        let free = reference_statsq_free(&t[0], bits, 0.1)?;
                        straight_through(&reference_statsq(&t[0], bits)?, &(&t[0] * free)?)
                    },
                );
                agrees(&w, &op, &like);
                ignores_threads(&w, &op);
                let free = statsq_free(&w[0], bits, 0.1).unwrap();
                close("free", &free, &reference_statsq_free(&w[0], bits, 0.1).unwrap(), 0.0);
                close("values", &op(&w).unwrap(), &statsq(&w[0], bits).unwrap(), 0.0);
                let grad = (values(&shape, 77) * &free).unwrap();
                close("gradient", &run(&w, &op)[1], &grad, 0.0);
            }
        }
        // Mean magnitude 1/2, so s = 1; at 2 bits the thresholds are -1/2, 0, 1/2 and a step is 1/2.
        // Beyond the clip, one step from the last threshold, nothing is free.
        let w = tensor(&[&[0.0f32, 0.125, -0.125, 0.25, 0.5, 0.75, 1.0, -1.25]]);
        let w = w.broadcast_div(&statsq_scale(&w).unwrap()).unwrap();
        assert_eq!(statsq_scale(&w).unwrap().to_vec1::<f32>().unwrap(), [1.0]);
        let free = statsq_free(&w, 2, 0.25).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(free, [[1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]]);
        let zero = statsq_free(&tensor(&[&[0.0f32, 0.0]]), 2, 0.25).unwrap();
        assert_eq!(zero.to_vec2::<f32>().unwrap(), [[0.0, 0.0]]);
        for band in [0.0, 0.5, f64::NAN] {
            assert!(refusal(statsq_free(&w, 2, band)).contains("below 0.5"));
        }
    }

    #[test]
    fn wrong_arguments_are_named() {
        let x = values(&[2, 7, 13], 1);
        assert!(refusal(statsq(&x, 2)).contains("[2, 7, 13]"));
        assert!(refusal(statsq(&values(&[2, 2], 1), 9)).contains("got 9"));
    }
}
