//! The rectifier.
//!
//! ```text
//! y = max(x, 0), NaN staying NaN     dx = dy where x > 0, else 0
//! ```
//!
//! candle's own turns NaN into 0 and so hides where it came from. f32 and f64 here, f16 and bf16 through f32.

use super::cpu::{self, real, simd, Real, Road};
#[cfg(feature = "cuda")]
use crate::kernels::cuda;
use crate::kernels::tape::{self, Reads};
#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaStorage};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// `relu` in plain candle ops.
pub fn reference(x: &Tensor) -> Result<Tensor> {
    x.le(0.0)?.where_cond(&x.zeros_like()?, x)
}

simd! {
    /// `max(y, 0)` in place; NaN stays NaN: a comparison, not `max`.
    pub(super) fn rectify<T>(y: &mut [T]) {
        for v in y {
            *v = if *v < T::ZERO { T::ZERO } else { *v };
        }
    }
}

simd! {
    /// The gradient where `y`, before or behind the rectifier, is positive.
    pub(super) fn where_positive<T>(y: &[T], grad: &[T], out: &mut [T]) {
        for ((out, &g), &y) in out.iter_mut().zip(grad).zip(y) {
            *out = if y > T::ZERO { g } else { T::ZERO };
        }
    }
}

struct Relu;

impl CustomOp1 for Relu {
    fn name(&self) -> &'static str {
        "relu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        real!("relu", x, T => {
            let mut y = <T as Real>::slice("relu", x, xl)?.to_vec();
            y.par_chunks_mut(cpu::GRAIN).for_each(rectify);
            Ok((<T as Real>::store(y), xl.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, xl: &Layout) -> Result<(CudaStorage, Shape)> {
        let y = cuda::unwritten(x.device(), xl.shape(), x.dtype())?;
        let places = [cuda::place(self.name(), x, xl)?, cuda::start(&y)];
        cuda::elementwise(x.device(), "relu", x.dtype(), &places, xl.shape().elem_count())?;
        Ok((y, xl.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        x.apply_op2_no_bwd(&grad.contiguous()?, &Backward).map(Some)
    }
}

/// (x, dy) to dx.
struct Backward;

impl CustomOp2 for Backward {
    fn name(&self) -> &'static str {
        "relu-backward"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        grad: &CpuStorage,
        gl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        real!(name, x, T => {
            let (x, grad) = (<T as Real>::slice(name, x, xl)?, <T as Real>::slice(name, grad, gl)?);
            let mut dx = cpu::unwritten(x.len());
            let chunks = dx.par_chunks_mut(cpu::GRAIN).zip(x.par_chunks(cpu::GRAIN));
            chunks.zip(grad.par_chunks(cpu::GRAIN)).for_each(|((dx, x), grad)| where_positive(x, grad, dx));
            Ok((<T as Real>::store(dx), xl.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        xl: &Layout,
        g: &CudaStorage,
        gl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let dx = cuda::unwritten(x.device(), xl.shape(), x.dtype())?;
        let places = [cuda::place(self.name(), x, xl)?, cuda::place(self.name(), g, gl)?, cuda::start(&dx)];
        cuda::elementwise(x.device(), "relu_grad", x.dtype(), &places, xl.shape().elem_count())?;
        Ok((dx, xl.shape().clone()))
    }
}

/// `max(x, 0)` of every element of `x` (any shape).
pub fn relu(x: &Tensor) -> Result<Tensor> {
    match cpu::road_with_cuda("relu", &[("x", x)])? {
        Road::Kernel => tape::apply1(&x.contiguous()?, Relu, Reads::OPERANDS),
        Road::ThroughF32 => relu(&cpu::wide(x)?)?.to_dtype(x.dtype()),
        Road::Reference => reference(x),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use candle_core::Device;

    #[test]
    fn agrees_differentiates_and_ignores_threads() {
        for shape in [vec![1], vec![3, 5], vec![2, 7, 13]] {
            let t = [values(&shape, 1)];
            agrees(&t, &|t| relu(&t[0]), &|t| reference(&t[0]));
            differentiates(&t, &|t| relu(&t[0]));
        }
        ignores_threads(&[values(&[5, 9001], 1)], &|t| relu(&t[0]));
    }

    #[test]
    fn zero_takes_no_gradient_and_nan_passes() {
        let x = Tensor::new(&[-1f32, 0.0, 2.0, f32::NAN], &Device::Cpu).unwrap();
        for y in [relu(&x).unwrap(), reference(&x).unwrap()] {
            let y = y.to_vec1::<f32>().unwrap();
            assert_eq!(y[..3], [0.0, 0.0, 2.0]);
            assert!(y[3].is_nan());
        }
        let x = Tensor::new(&[-1f32, 0.0, 2.0], &Device::Cpu).unwrap();
        let weight = flat(&values(&[3], 77).to_dtype(candle_core::DType::F32).unwrap());
        assert_eq!(flat(&run(&[x], &|t| relu(&t[0]))[1]), [0.0, 0.0, weight[2]]);
    }
}
