//! GELU in its erf form, elementwise.
//!
//! ```text
//! y = x * Phi(x)     Phi(x) = (1 + erf(x / sqrt 2)) / 2     dy/dx = Phi(x) + x * exp(-x^2/2) / sqrt(2 pi)
//! ```
//!
//! f32 and f64 here, f16 and bf16 through f32. Source: Hendrycks and Gimpel 2016, section 2.

use super::cpu::{self, real, simd, Real, Road};
#[cfg(feature = "cuda")]
use crate::kernels::cuda;
use crate::kernels::tape::{self, Reads};
#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaStorage};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// GELU in plain candle ops.
pub fn reference(x: &Tensor) -> Result<Tensor> {
    let phi = (((x * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)? * 0.5)?;
    x * phi
}

#[inline(always)]
pub(super) fn phi<T: Real>(x: T) -> T {
    let half = T::from_f64(0.5);
    half.fma((x * T::from_f64(std::f64::consts::FRAC_1_SQRT_2)).error_function(), half)
}

simd! {
    fn forward<T>(x: &[T], y: &mut [T]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x * phi(x);
        }
    }
}

simd! {
    fn backward<T>(x: &[T], g: &[T], dx: &mut [T]) {
        // 1 / sqrt(2 pi)
        let peak = T::from_f64(0.398_942_280_401_432_7);
        let half = T::from_f64(-0.5);
        for ((dx, &x), &g) in dx.iter_mut().zip(x).zip(g) {
            let density = peak * (x * x * half).exp_nonpos();
            *dx = g * x.fma(density, phi(x));
        }
    }
}

struct Gelu;

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        real!(self.name(), x, T => {
            let x = <T as Real>::slice(self.name(), x, xl)?;
            let mut y = cpu::unwritten(x.len());
            y.par_chunks_mut(cpu::GRAIN).zip(x.par_chunks(cpu::GRAIN)).for_each(|(y, x)| forward(x, y));
            Ok((<T as Real>::store(y), xl.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, xl: &Layout) -> Result<(CudaStorage, Shape)> {
        let y = cuda::unwritten(x.device(), xl.shape(), x.dtype())?;
        let places = [cuda::place(self.name(), x, xl)?, cuda::start(&y)];
        cuda::elementwise(x.device(), "gelu", x.dtype(), &places, xl.shape().elem_count())?;
        Ok((y, xl.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(x.apply_op2_no_bwd(&grad.contiguous()?, &GeluGrad)?))
    }
}

/// (x, dy) to dx.
struct GeluGrad;

impl CustomOp2 for GeluGrad {
    fn name(&self) -> &'static str {
        "gelu-grad"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        g: &CpuStorage,
        gl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        real!(self.name(), x, T => {
            let (x, g) = (<T as Real>::slice(self.name(), x, xl)?, <T as Real>::slice(self.name(), g, gl)?);
            let mut dx = cpu::unwritten(x.len());
            dx.par_chunks_mut(cpu::GRAIN)
                .zip(x.par_chunks(cpu::GRAIN).zip(g.par_chunks(cpu::GRAIN)))
                .for_each(|(dx, (x, g))| backward(x, g, dx));
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
        cuda::elementwise(x.device(), "gelu_grad", x.dtype(), &places, xl.shape().elem_count())?;
        Ok((dx, xl.shape().clone()))
    }
}

/// GELU (erf form) of a tensor of any shape.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    match cpu::road_with_cuda("gelu", &[("x", x)])? {
        Road::Kernel => tape::apply1(&x.contiguous()?, Gelu, Reads::OPERANDS),
        Road::ThroughF32 => gelu(&cpu::wide(x)?)?.to_dtype(x.dtype()),
        Road::Reference => reference(x),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[test]
    fn agrees_and_differentiates() {
        for shape in [vec![1, 1], vec![3, 5], vec![7, 13]] {
            let x = (values(&shape, 1) * 2.0).unwrap();
            agrees(std::slice::from_ref(&x), &|t| gelu(&t[0]), &|t| reference(&t[0]));
            differentiates(&[x], &|t| gelu(&t[0]));
        }
        ignores_threads(&[values(&[40_001], 1)], &|t| gelu(&t[0]));
    }

    #[test]
    fn the_tails_are_flat() {
        let x =
            Tensor::new(&[-40f32, -1e30, f32::NEG_INFINITY, 40.0, f32::NAN, 0.0], &candle_core::Device::Cpu);
        let y = gelu(&x.unwrap()).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!((y[0], y[1], y[3], y[5]), (0.0, 0.0, 40.0, 0.0));
        // -inf * 0, as the equation says.
        assert!(y[2].is_nan() && y[4].is_nan());
    }
}
