//! A factor for each leading place, as what a sample's dropout is: a number for a channel or an element.
//!
//! ```text
//! y[i, j] = x[i, j] f[i]      i over the leading axes that f has, j over the rest; dx = dy f
//! ```
//!
//! `f` takes no gradient. On the CPU f32 and f64, f16 and bf16 through f32; on a CUDA device f32, f16 and bf16
//! (kernels/elementwise.cu).

use super::cpu::{self, real, simd, Real, Road};
#[cfg(feature = "cuda")]
use crate::kernels::cuda::{self, Launch};
use crate::kernels::tape::{self, Reads};
#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaStorage};
use candle_core::{bail, CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// `scale_leading` in plain candle ops.
pub fn reference(x: &Tensor, f: &Tensor) -> Result<Tensor> {
    let mut shape = f.dims().to_vec();
    shape.resize(x.rank(), 1);
    x.broadcast_mul(&f.detach().reshape(shape)?)
}

simd! {
    fn scale<T>(x: &[T], f: &[T], each: usize, y: &mut [T]) {
        for ((y, x), &f) in y.chunks_exact_mut(each).zip(x.chunks_exact(each)).zip(f) {
            for (y, &x) in y.iter_mut().zip(x) {
                *y = x * f;
            }
        }
    }
}

struct Scale(Tensor);

impl CustomOp1 for Scale {
    fn name(&self) -> &'static str {
        "scale-leading"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        let (f, fl) = self.0.storage_and_layout();
        real!(name, x, T => {
            let x = <T as Real>::slice(name, x, xl)?;
            let f = <T as Real>::slice(name, cpu::host(name, &f)?, fl)?;
            let mut y = cpu::unwritten(x.len());
            if !x.is_empty() {
                let each = x.len() / f.len();
                let rows = cpu::chunk_rows(each);
                let chunks = y.par_chunks_mut(rows * each).zip(x.par_chunks(rows * each));
                chunks.zip(f.par_chunks(rows)).for_each(|((y, x), f)| scale(x, f, each, y));
            }
            Ok((<T as Real>::store(y), xl.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, xl: &Layout) -> Result<(CudaStorage, Shape)> {
        let (name, dtype) = (self.name(), x.dtype());
        let (f, fl) = self.0.storage_and_layout();
        let y = cuda::unwritten(x.device(), xl.shape(), dtype)?;
        let rows = fl.shape().elem_count();
        let width = xl.shape().elem_count() / rows.max(1);
        let kernel = format!("scale_leading_{}", cuda::suffix(name, dtype)?);
        let launch = Launch::new(x.device(), "elementwise", kernel)
            .place(cuda::place(name, x, xl)?)
            .place(cuda::place(name, cuda::storage(name, &f)?, fl)?)
            .place(cuda::start(&y));
        let (grid, block) = cuda::row_grid(rows, width);
        // SAFETY: x and y have rows * width elements, f one for each row; rows are strided over.
        unsafe { launch.i64(rows).i32(width).run(grid, block, 0)? };
        Ok((y, xl.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        grad.contiguous()?.apply_op1_no_bwd(self).map(Some)
    }
}

/// `x` times the factors `f`, whose shape is how x's begins. `f` is a constant: no gradient reaches it.
pub fn scale_leading(x: &Tensor, f: &Tensor) -> Result<Tensor> {
    if !x.dims().starts_with(f.dims()) {
        bail!("scale_leading: expected factors whose shape begins {:?}, got {:?}", x.dims(), f.dims())
    }
    let f = f.detach();
    match cpu::road_with_cuda("scale_leading", &[("x", x), ("the factors", &f)])? {
        Road::Kernel => tape::apply1(&x.contiguous()?, Scale(f.contiguous()?), Reads::NOTHING),
        Road::ThroughF32 => scale_leading(&cpu::wide(x)?, &cpu::wide(&f)?)?.to_dtype(x.dtype()),
        Road::Reference => reference(x, &f),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use candle_core::Var;

    #[test]
    fn agrees_differentiates_and_ignores_threads() {
        for (shape, lead) in [(vec![3], 1), (vec![3, 5], 1), (vec![2, 3, 5, 4], 2), (vec![4, 6], 2)] {
            let (t, f) = ([values(&shape, 1)], values(&shape[..lead], 2));
            let of = |t: &[Tensor]| f.to_dtype(t[0].dtype());
            agrees(&t, &|t| scale_leading(&t[0], &of(t)?), &|t| reference(&t[0], &of(t)?));
            differentiates(&t, &|t| scale_leading(&t[0], &f));
        }
        let f = values(&[70, 64], 2).to_dtype(candle_core::DType::F32).unwrap();
        ignores_threads(&[values(&[70, 64, 9], 1)], &|t| scale_leading(&t[0], &f));
    }

    #[test]
    fn factors_are_constants_of_a_shape_that_begins_as_x_does() {
        let (x, f) = (values(&[2, 3], 1), Var::from_tensor(&values(&[2], 2)).unwrap());
        let x = Var::from_tensor(&x).unwrap();
        let grads = scale_leading(&x, &f).unwrap().sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&x).is_some() && grads.get(&f).is_none());
        assert!(refusal(scale_leading(&x, &values(&[3], 1))).contains("begins [2, 3], got [3]"));
    }
}
