//! Softmax over the last axis.
//!
//! ```text
//! y_k = exp(x_k - max x) / sum_j exp(x_j - max x)     dx = y * (dy - sum_j dy_j y_j)
//! ```
//!
//! On the CPU f32 and f64, f16 and bf16 through f32; on a CUDA device f32, f16 and bf16 (kernels/softmax.cu). A row
//! with a NaN, or of -inf alone, gives NaN.

use super::cpu::{self, real, simd, Real, Road};
#[cfg(feature = "cuda")]
use crate::kernels::cuda::{self, Launch, Place};
use crate::kernels::tape::{self, Reads};
#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaDevice, CudaStorage, DType};
use candle_core::{bail, CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, D};
use rayon::prelude::*;

/// Softmax in plain candle ops.
pub fn reference(x: &Tensor) -> Result<Tensor> {
    let e = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    e.broadcast_div(&e.sum_keepdim(D::Minus1)?)
}

simd! {
    /// Softmax of each row, in place.
    pub(super) fn softmax_rows<T>(x: &mut [T], width: usize) {
        for row in x.chunks_exact_mut(width) {
            let top = cpu::max(row);
            for v in row {
                *v -= top;
            }
        }
        // One loop over all rows: short rows would leave most of each vector empty.
        for v in x.iter_mut() {
            *v = v.exp_nonpos();
        }
        for row in x.chunks_exact_mut(width) {
            let r = T::ONE / cpu::sum(row);
            for v in row {
                *v *= r;
            }
        }
    }
}

simd! {
    /// `dx = factor * y * (g - sum g y)` of each row.
    pub(super) fn softmax_rows_grad<T>(y: &[T], g: &[T], width: usize, factor: T, dx: &mut [T]) {
        for ((y, g), dx) in y.chunks_exact(width).zip(g.chunks_exact(width)).zip(dx.chunks_exact_mut(width)) {
            let mean = cpu::dot(y, g);
            for ((dx, &y), &g) in dx.iter_mut().zip(y).zip(g) {
                *dx = factor * y * (g - mean);
            }
        }
    }
}

struct Softmax;

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        let width = xl.dims().last().copied().unwrap_or(1);
        real!(self.name(), x, T => {
            let x = <T as Real>::slice(self.name(), x, xl)?;
            let step = cpu::chunk_rows(width) * width;
            let mut y = cpu::unwritten(x.len());
            y.par_chunks_mut(step).zip(x.par_chunks(step)).for_each(|(y, x)| {
                y.copy_from_slice(x);
                softmax_rows(y, width);
            });
            Ok((<T as Real>::store(y), xl.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, xl: &Layout) -> Result<(CudaStorage, Shape)> {
        let sizes = rows_of(xl);
        let (launch, grid, block) = over_rows(x.device(), self.name(), x.dtype(), sizes)?;
        let y = cuda::unwritten(x.device(), xl.shape(), x.dtype())?;
        let launch = launch.place(cuda::place(self.name(), x, xl)?).place(cuda::start(&y));
        // SAFETY: x and y have rows * width elements; grid and block are those of the kernel's header.
        unsafe { launch.i64(sizes.0).i32(sizes.1).run(grid, block, 0)? };
        Ok((y, xl.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(y.apply_op2_no_bwd(&grad.contiguous()?, &SoftmaxGrad)?))
    }
}

/// (y, dy) to dx.
struct SoftmaxGrad;

impl CustomOp2 for SoftmaxGrad {
    fn name(&self) -> &'static str {
        "softmax-grad"
    }

    fn cpu_fwd(
        &self,
        y: &CpuStorage,
        yl: &Layout,
        g: &CpuStorage,
        gl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let width = yl.dims().last().copied().unwrap_or(1);
        real!(self.name(), y, T => {
            let (y, g) = (<T as Real>::slice(self.name(), y, yl)?, <T as Real>::slice(self.name(), g, gl)?);
            let mut dx = cpu::unwritten(y.len());
            let step = cpu::chunk_rows(width) * width;
            dx.par_chunks_mut(step)
                .zip(y.par_chunks(step).zip(g.par_chunks(step)))
                .for_each(|(dx, (y, g))| softmax_rows_grad(y, g, width, T::ONE, dx));
            Ok((<T as Real>::store(dx), yl.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        y: &CudaStorage,
        yl: &Layout,
        g: &CudaStorage,
        gl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let dx = cuda::unwritten(y.device(), yl.shape(), y.dtype())?;
        let places = [cuda::place(self.name(), y, yl)?, cuda::place(self.name(), g, gl)?, cuda::start(&dx)];
        softmax_rows_grad_on_cuda(y.device(), y.dtype(), places, rows_of(yl))?;
        Ok((dx, yl.shape().clone()))
    }
}

/// Rows and their width.
#[cfg(feature = "cuda")]
fn rows_of(layout: &Layout) -> (usize, usize) {
    let width = layout.dims().last().copied().unwrap_or(1);
    (layout.shape().elem_count() / width.max(1), width)
}

/// A launch of `kernel` of kernels/softmax.cu over rows, its grid and its block.
#[cfg(feature = "cuda")]
#[allow(clippy::type_complexity)]
pub(super) fn over_rows<'a>(
    device: &'a CudaDevice,
    kernel: &str,
    dtype: DType,
    (rows, width): (usize, usize),
) -> Result<(Launch<'a>, (usize, usize, usize), (usize, usize, usize))> {
    let suffix = cuda::suffix(kernel, dtype)?;
    // What a block keeps of a row: HELD_PARTS of row.cuh, of 16 bytes a thread.
    let (long, block) = match width > 16_384 {
        true => ("_long", (1024, 1, 1)),
        false => ("", cuda::row_block(width, 4 * cuda::wide(dtype))),
    };
    let launch = Launch::new(device, "softmax", format!("{kernel}{long}_{suffix}"));
    Ok((launch, (rows.div_ceil(block.1), 1, 1), block))
}

/// `dx = y * (g - sum g y)` of each row, of `rows * width` elements at y, g and dx.
#[cfg(feature = "cuda")]
pub(super) fn softmax_rows_grad_on_cuda(
    device: &CudaDevice,
    dtype: DType,
    [y, g, dx]: [Place; 3],
    sizes: (usize, usize),
) -> Result<()> {
    let (launch, grid, block) = over_rows(device, "softmax_grad", dtype, sizes)?;
    let launch = launch.place(y).place(g).place(dx).i64(sizes.0).i32(sizes.1).f32(1.0);
    // SAFETY: the callers give places of rows * width elements; grid and block are those of the kernel's header.
    unsafe { launch.run(grid, block, 0) }
}

/// Softmax of `x: [.., K]` over its last axis.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    if x.dims().last().copied().unwrap_or(0) == 0 {
        bail!("softmax: expected x [.., K], got {:?}", x.dims())
    }
    match cpu::road_with_cuda("softmax", &[("x", x)])? {
        Road::Kernel => tape::apply1(&x.contiguous()?, Softmax, Reads::RESULT),
        Road::ThroughF32 => softmax(&cpu::wide(x)?)?.to_dtype(x.dtype()),
        Road::Reference => reference(x),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[test]
    fn agrees_and_differentiates() {
        for shape in [vec![1, 1], vec![3, 5], vec![7, 13], vec![2, 3, 17]] {
            let x = [(values(&shape, 1) * 3.0).unwrap()];
            agrees(&x, &|t| softmax(&t[0]), &|t| reference(&t[0]));
            differentiates(&x, &|t| softmax(&t[0]));
        }
        ignores_threads(&[values(&[700, 50], 1)], &|t| softmax(&t[0]));
    }

    #[test]
    fn large_and_missing_entries() {
        let x = Tensor::new(
            &[[1e30f32, 1e30, f32::NEG_INFINITY], [f32::NAN, 0.0, 0.0]],
            &candle_core::Device::Cpu,
        );
        let y = softmax(&x.unwrap()).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(y[0], [0.5, 0.5, 0.0]);
        assert!(y[1].iter().all(|v| v.is_nan()));
    }
}
