//! Root-mean-square normalization over the last axis.
//!
//! ```text
//! n = x / r     r = sqrt(mean x^2 + eps)     y = n * w     x [.., C], w [C]
//! u = dy * w    dx = (u - n * mean(u * n)) / r             dw = sum dy * n over the leading axes
//! ```
//!
//! f32 and f64 here, f16 and bf16 through f32. Source: Zhang and Sennrich 2019, eq. 4.

use super::cpu::{self, real, simd, Real, Road};
#[cfg(feature = "cuda")]
use crate::kernels::norm;
use crate::kernels::tape::{self, Reads};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{bail, CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, D};
use rayon::prelude::*;

/// `rms_norm` in plain candle ops.
pub fn reference(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let r = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    x.broadcast_div(&r)?.broadcast_mul(w)
}

simd! {
    fn forward_rows<T>(x: &[T], w: &[T], eps: T, y: &mut [T]) {
        let width = w.len();
        let count = T::from_f64(width as f64);
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            let r = T::ONE / (cpu::dot(x, x) / count + eps).sqrt();
            for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
                *y = x * r * w;
            }
        }
    }
}

simd! {
    fn backward_rows<T>(x: &[T], w: &[T], g: &[T], eps: T, dx: &mut [T], dw: &mut [T]) {
        let width = w.len();
        let count = T::from_f64(width as f64);
        let dw = &mut dw[..width];
        for ((x, g), dx) in x.chunks_exact(width).zip(g.chunks_exact(width)).zip(dx.chunks_exact_mut(width)) {
            let r = T::ONE / (cpu::dot(x, x) / count + eps).sqrt();
            for c in 0..width {
                dw[c] = (g[c] * r).fma(x[c], dw[c]);
                dx[c] = g[c] * w[c];
            }
            let mean = cpu::dot(dx, x) * r * r / count;
            for c in 0..width {
                dx[c] = (dx[c] - x[c] * mean) * r;
            }
        }
    }
}

/// (x, w) to y.
#[derive(Clone, Copy)]
struct RmsNorm {
    eps: f64,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        real!(name, x, T => {
            let (x, w) = (<T as Real>::slice(name, x, xl)?, <T as Real>::slice(name, w, wl)?);
            let step = cpu::chunk_rows(w.len()) * w.len();
            let mut y = cpu::unwritten(x.len());
            y.par_chunks_mut(step)
                .zip(x.par_chunks(step))
                .for_each(|(y, x)| forward_rows(x, w, self.eps as T, y));
            Ok((<T as Real>::store(y), xl.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        xl: &Layout,
        w: &CudaStorage,
        wl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Ok((norm::rows_forward("rms_norm", (x, xl), &[(w, wl)], self.eps)?, xl.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let packed = x.apply_op3_no_bwd(w, &grad.contiguous()?, &RmsNormGrad(*self))?;
        let dw = w.track_op().then(|| cpu::unpack(&packed, x.elem_count(), w.shape())).transpose()?;
        Ok((Some(cpu::unpack(&packed, 0, x.shape())?), dw))
    }
}

/// (x, w, dy) to dx and dw in one flat result.
struct RmsNormGrad(RmsNorm);

impl CustomOp3 for RmsNormGrad {
    fn name(&self) -> &'static str {
        "rms-norm-grad"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
        g: &CpuStorage,
        gl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        real!(name, x, T => {
            let (x, g) = (<T as Real>::slice(name, x, xl)?, <T as Real>::slice(name, g, gl)?);
            let w = <T as Real>::slice(name, w, wl)?;
            let (count, width) = (x.len(), w.len());
            let step = cpu::chunk_rows(width) * width;
            let mut out = cpu::unwritten(count + width);
            let mut partial = vec![T::ZERO; count.div_ceil(step) * width];
            out[..count]
                .par_chunks_mut(step)
                .zip(x.par_chunks(step).zip(g.par_chunks(step)))
                .zip(partial.par_chunks_mut(width))
                .for_each(|((dx, (x, g)), dw)| backward_rows(x, w, g, self.0.eps as T, dx, dw));
            out[count..].copy_from_slice(&cpu::fold(&partial, width));
            let shape = Shape::from(out.len());
            Ok((<T as Real>::store(out), shape))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        xl: &Layout,
        w: &CudaStorage,
        wl: &Layout,
        g: &CudaStorage,
        gl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        norm::rows_backward("rms_norm", 1, [(x, xl), (w, wl), (g, gl)], self.0.eps)
    }
}

/// Root-mean-square normalization of `x: [.., C]` over its last axis with `w: [C]`.
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let op = "rms_norm";
    let width = x.dims().last().copied().unwrap_or(0);
    if width == 0 || w.dims() != [width] {
        bail!("{op}: expected x [.., C] and w [C], got {:?} and {:?}", x.dims(), w.dims())
    }
    match cpu::road_with_cuda(op, &[("x", x), ("w", w)])? {
        Road::Kernel => tape::apply2(&x.contiguous()?, &w.contiguous()?, RmsNorm { eps }, Reads::OPERANDS),
        Road::ThroughF32 => rms_norm(&cpu::wide(x)?, &cpu::wide(w)?, eps)?.to_dtype(x.dtype()),
        Road::Reference => reference(x, w, eps),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn op(t: &[Tensor]) -> Result<Tensor> {
        rms_norm(&t[0], &t[1], 1e-3)
    }

    #[test]
    fn agrees_and_differentiates() {
        for x in [vec![1, 1], vec![3, 5], vec![7, 13], vec![2, 3, 17], vec![2, 50]] {
            let case = [values(&x, 1), values(&x[x.len() - 1..], 2)];
            agrees(&case, &op, &|t| reference(&t[0], &t[1], 1e-3));
            differentiates(&case, &op);
        }
        let large = [values(&[1200, 33], 1), values(&[33], 2)];
        agrees(&large, &op, &|t| reference(&t[0], &t[1], 1e-3));
        ignores_threads(&large, &op);
    }

    #[test]
    fn by_hand() {
        // Mean square 25.
        let x = Tensor::new(&[[1f32, 7.0]], &candle_core::Device::Cpu).unwrap();
        let w = Tensor::new(&[10f32, 20.0], x.device()).unwrap();
        assert_eq!(rms_norm(&x, &w, 0.0).unwrap().to_vec2::<f32>().unwrap(), [[2.0, 28.0]]);
        let text = refusal(rms_norm(&x, &w.narrow(0, 0, 1).unwrap(), 0.0));
        assert!(text.contains("rms_norm") && text.contains("[1, 2]") && text.contains("[1]"), "{text}");
    }
}
