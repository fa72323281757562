//! Layer normalization over the last axis.
//!
//! ```text
//! xh = (x - mean) / sqrt(var + eps)     y = xh * w + b        x [.., C], w [C], b [C]
//! with u = dy * w:  dx = (u - mean(u) - xh * mean(u * xh)) / sqrt(var + eps)
//! dw = sum dy * xh     db = sum dy      over the leading axes
//! ```
//!
//! The variance is the biased one, in two passes. On the CPU f32 and f64, f16 and bf16 through f32; on a CUDA device
//! f32, f16 and bf16 (kernels/norm.cu).
//! Source: Ba, Kiros and Hinton 2016, section 3.

use super::cpu::{self, real, simd, Real, Road};
#[cfg(feature = "cuda")]
use crate::kernels::cuda::{self, Launch};
use crate::kernels::tape::{self, Reads};
#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaStorage, DType};
use candle_core::{bail, CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, D};
use rayon::prelude::*;

/// Layer normalization in plain candle ops.
pub fn reference(x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let var = centred.sqr()?.mean_keepdim(D::Minus1)?;
    centred.broadcast_div(&(var + eps)?.sqrt()?)?.broadcast_mul(w)?.broadcast_add(b)
}

/// (mean, 1 / sqrt(var + eps)) of a row; `scratch` has its length.
#[inline(always)]
fn statistics<T: Real>(x: &[T], eps: T, scratch: &mut [T]) -> (T, T) {
    let count = T::from_f64(x.len() as f64);
    let mean = cpu::sum(x) / count;
    for (c, &x) in scratch.iter_mut().zip(x) {
        *c = x - mean;
    }
    let var = cpu::dot(scratch, scratch) / count;
    (mean, T::ONE / (var + eps).sqrt())
}

simd! {
    fn forward_rows<T>(x: &[T], w: &[T], b: &[T], eps: T, y: &mut [T]) {
        let width = w.len();
        let b = &b[..width];
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            let (_, r) = statistics(x, eps, y);
            for c in 0..width {
                y[c] = (y[c] * r).fma(w[c], b[c]);
            }
        }
    }
}

simd! {
    fn backward_rows<T>(
        x: &[T], w: &[T], g: &[T], eps: T, dx: &mut [T], dw: &mut [T], db: &mut [T], xh: &mut [T],
    ) {
        let width = w.len();
        let (xh, dw, db) = (&mut xh[..width], &mut dw[..width], &mut db[..width]);
        let inv = T::ONE / T::from_f64(width as f64);
        for ((x, g), dx) in x.chunks_exact(width).zip(g.chunks_exact(width)).zip(dx.chunks_exact_mut(width)) {
            let (_, r) = statistics(x, eps, xh);
            for c in 0..width {
                let n = xh[c] * r;
                xh[c] = n;
                dw[c] = g[c].fma(n, dw[c]);
                db[c] += g[c];
                dx[c] = g[c] * w[c];
            }
            let mean_u = cpu::sum(dx) * inv;
            let mean_ux = cpu::dot(dx, xh) * inv;
            for c in 0..width {
                dx[c] = (dx[c] - mean_u - xh[c] * mean_ux) * r;
            }
        }
    }
}

/// (x, w, b) to y.
#[derive(Clone, Copy)]
struct LayerNorm {
    eps: f64,
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        real!(name, x, T => {
            let x = <T as Real>::slice(name, x, xl)?;
            let (w, b) = (<T as Real>::slice(name, w, wl)?, <T as Real>::slice(name, b, bl)?);
            let step = cpu::chunk_rows(w.len()) * w.len();
            let mut y = cpu::unwritten(x.len());
            y.par_chunks_mut(step)
                .zip(x.par_chunks(step))
                .for_each(|(y, x)| forward_rows(x, w, b, self.eps as T, y));
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
        b: &CudaStorage,
        bl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let sides = [(w, wl), (b, bl)];
        Ok((rows_forward("layer_norm", (x, xl), &sides, self.eps)?, xl.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let packed = x.apply_op3_no_bwd(w, &grad.contiguous()?, &LayerNormGrad(*self))?;
        let (count, width) = (x.elem_count(), w.elem_count());
        Ok((
            Some(cpu::unpack(&packed, 0, x.shape())?),
            Some(cpu::unpack(&packed, count, w.shape())?),
            Some(cpu::unpack(&packed, count + width, b.shape())?),
        ))
    }
}

/// (x, w, dy) to dx, dw and db in one flat result.
struct LayerNormGrad(LayerNorm);

impl CustomOp3 for LayerNormGrad {
    fn name(&self) -> &'static str {
        "layer-norm-grad"
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
            let mut out = cpu::unwritten(count + 2 * width);
            let mut partial = vec![T::ZERO; count.div_ceil(step) * 2 * width];
            out[..count]
                .par_chunks_mut(step)
                .zip(x.par_chunks(step))
                .zip(g.par_chunks(step))
                .zip(partial.par_chunks_mut(2 * width))
                .for_each(|(((dx, x), g), sums)| {
                    let (dw, db) = sums.split_at_mut(width);
                    let mut xh = vec![T::ZERO; width];
                    backward_rows(x, w, g, self.0.eps as T, dx, dw, db, &mut xh);
                });
            out[count..].copy_from_slice(&cpu::fold(&partial, 2 * width));
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
        rows_backward("layer_norm", 2, [(x, xl), (w, wl), (g, gl)], self.0.eps)
    }
}

/// `NAME [rows, width]` of kernels/norm.cu, of x and what lies beside it: w, and a layer's b.
#[cfg(feature = "cuda")]
pub(super) fn rows_forward(
    name: &str,
    (x, xl): (&CudaStorage, &Layout),
    beside: &[(&CudaStorage, &Layout)],
    eps: f64,
) -> Result<CudaStorage> {
    let (device, dtype) = (x.device(), x.dtype());
    let width = xl.dims().last().copied().unwrap_or(1);
    let rows = xl.shape().elem_count() / width;
    let y = cuda::unwritten(device, xl.shape(), dtype)?;
    // What a block keeps of a row (HELD_PARTS of row.cuh).
    let (each, most) = (4 * cuda::wide(dtype), 16_384 * 2 / dtype.size_in_bytes());
    let (long, block) = match width > most {
        true => ("_long", (1024, 1, 1)),
        false => ("", cuda::row_block(width, each)),
    };
    let kernel = format!("{name}{long}_{}", cuda::suffix(name, dtype)?);
    let mut launch = Launch::new(device, "norm", kernel).place(cuda::place(name, x, xl)?);
    for (b, bl) in beside {
        launch = launch.place(cuda::place(name, b, bl)?);
    }
    let launch = launch.place(cuda::start(&y)).i64(rows).i32(width).f32(eps as f32);
    // SAFETY: x and y have rows * width elements, w and b width; the block holds a row as the kernel's header asks.
    unsafe { launch.run((rows.div_ceil(block.1), 1, 1), block, 0)? };
    Ok(y)
}

/// `NAME_grad` of kernels/norm.cu of x, w and dy: dx and the gradients of `kinds` rows, dw and a layer's db, in one
/// flat result.
#[cfg(feature = "cuda")]
pub(super) fn rows_backward(
    name: &str,
    kinds: usize,
    [(x, xl), (w, wl), (g, gl)]: [(&CudaStorage, &Layout); 3],
    eps: f64,
) -> Result<(CudaStorage, Shape)> {
    let (device, dtype) = (x.device(), x.dtype());
    let width = wl.shape().elem_count();
    let count = xl.shape().elem_count();
    let rows = count / width;
    let out = cuda::unwritten(device, count + kinds * width, dtype)?;
    let parts = cuda::Parts::of(rows);
    let partial = cuda::unwritten(device, parts.count * kinds * width, DType::F32)?;
    let (wide, size) = (cuda::wide(dtype), dtype.size_in_bytes());
    // Two rows are kept, so half as much of each as forward.
    let (long, block) = match width > 8192 * 2 / size {
        true => ("_long", (1024, 1, 1)),
        false => ("", cuda::row_block(width, 2 * wide)),
    };
    let shared = if long.is_empty() { block.1 * kinds * 2 * 4 * block.0 * wide } else { 0 };
    let kernel = format!("{name}_grad{long}_{}", cuda::suffix(name, dtype)?);
    let launch = Launch::new(device, "norm", kernel)
        .place(cuda::place(name, x, xl)?)
        .place(cuda::place(name, w, wl)?)
        .place(cuda::place(name, g, gl)?)
        .place(cuda::start(&out))
        .place(cuda::start(&partial));
    let launch = launch.i64(rows).i32(width).i64(parts.each).f32(eps as f32);
    // SAFETY: x, dy and dx have rows * width elements, w width, partial a row of each kind for every block, of which
    // there is one for each part; the block and its shared memory hold a row as the kernel's header asks.
    unsafe { launch.run((parts.count, 1, 1), block, shared)? };
    cuda::fold_columns(device, &partial, cuda::start(&out).at(count), dtype, (parts.count, kinds * width))?;
    Ok((out, Shape::from(count + kinds * width)))
}

/// Layer normalization of `x: [.., C]` over its last axis with `w: [C]` and `b: [C]`.
pub fn layer_norm(x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<Tensor> {
    let op = "layer_norm";
    let width = x.dims().last().copied().unwrap_or(0);
    if width == 0 {
        bail!("{op}: expected x [.., C], got {:?}", x.dims())
    }
    for (name, t) in [("w", w), ("b", b)] {
        if t.dims() != [width] {
            bail!("{op}: expected {name} [{width}], got {:?}", t.dims())
        }
    }
    match cpu::road_with_cuda(op, &[("x", x), ("w", w), ("b", b)])? {
        Road::Kernel => tape::apply3(
            &x.contiguous()?,
            &w.contiguous()?,
            &b.contiguous()?,
            LayerNorm { eps },
            Reads::OPERANDS,
        ),
        Road::ThroughF32 => {
            layer_norm(&cpu::wide(x)?, &cpu::wide(w)?, &cpu::wide(b)?, eps)?.to_dtype(x.dtype())
        }
        Road::Reference => reference(x, w, b, eps),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn case(x: &[usize]) -> [Tensor; 3] {
        let c = [x[x.len() - 1]];
        [values(x, 1), values(&c, 2), values(&c, 3)]
    }

    fn op(t: &[Tensor]) -> Result<Tensor> {
        layer_norm(&t[0], &t[1], &t[2], 1e-3)
    }

    #[test]
    fn agrees_and_differentiates() {
        for x in [vec![1, 1], vec![3, 5], vec![7, 13], vec![2, 3, 17], vec![2, 50]] {
            agrees(&case(&x), &op, &|t| reference(&t[0], &t[1], &t[2], 1e-3));
            differentiates(&case(&x), &op);
        }
        agrees(&case(&[1200, 33]), &op, &|t| reference(&t[0], &t[1], &t[2], 1e-3));
        ignores_threads(&case(&[1200, 33]), &op);
    }

    #[test]
    fn by_hand() {
        // Mean 2, variance 1.
        let x = Tensor::new(&[[1f32, 3.0]], &candle_core::Device::Cpu).unwrap();
        let (w, b) = (x.flatten_all().unwrap(), Tensor::new(&[10f32, 20.0], x.device()).unwrap());
        assert_eq!(layer_norm(&x, &w, &b, 0.0).unwrap().to_vec2::<f32>().unwrap(), [[9.0, 23.0]]);
    }

    #[test]
    fn a_far_mean_keeps_its_variance() {
        // One-pass variance would lose all digits here.
        let x = (values(&[3, 64], 1) + 4096.0).unwrap().to_dtype(candle_core::DType::F32).unwrap();
        let exact = x.to_dtype(candle_core::DType::F64).unwrap();
        let ones = |d| Tensor::ones(64, d, x.device()).unwrap();
        let got = layer_norm(&x, &ones(x.dtype()), &ones(x.dtype()), 1e-6).unwrap();
        let want = reference(&exact, &ones(exact.dtype()), &ones(exact.dtype()), 1e-6).unwrap();
        // The mean of numbers near 4096 is rounded to 2.4e-4 of the unit deviation.
        close("far mean", &got, &want, 5e-4);
    }

    #[test]
    fn wrong_shapes_are_named() {
        let [x, w, _] = case(&[3, 5]);
        let text = refusal(layer_norm(&x, &w, &values(&[4], 1), 1e-5));
        assert!(text.contains("layer_norm") && text.contains("b [5]") && text.contains("[4]"), "{text}");
    }
}
