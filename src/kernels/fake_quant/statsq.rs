//! StatsQ (OFQ, Liu et al. 2023; ofq.md section 1), `w: [R, K]`, `n = 2^(bits-1)`:
//!
//! ```text
//! s_r = 2 mean_k |w_rk|     step = s / n     k = clamp(rne(w / step - 1/2), -n, n - 1)
//! y   = step * (k + 1/2)    dL/dw = dL/dy, nothing through s
//! ```
//!
//! `n` is a power of two, so `w / (s/n) = n * (w/s)` exactly while nothing is subnormal; a step
//! below the smallest normal f32 makes a row of zeros with codes 0. A NaN stays a NaN.

use super::{check_rows, on_grid, reference_dequantize, reference_quantize, Emit, Levels};
use crate::kernels::cpu::{self, real, simd, Real, Road};
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, D};
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

/// The rule in every form, on whichever road there is.
pub(super) fn run_statsq(op: &str, w: &Tensor, bits: u8, emit: Emit) -> Result<Tensor> {
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
    fn wrong_arguments_are_named() {
        let x = values(&[2, 7, 13], 1);
        assert!(refusal(statsq(&x, 2)).contains("[2, 7, 13]"));
        assert!(refusal(statsq(&values(&[2, 2], 1), 9)).contains("got 9"));
    }
}
