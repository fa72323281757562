//! The product of a query and a key, head by head (ofq.md 3).
//!
//! ```text
//! W_h = Wq_h^T Wk_h     Wq, Wk [heads d, in], W [heads in, in]
//! dWq_h = Wk_h dW_h^T   dWk_h = Wq_h dW_h
//! ```
//!
//! On the CPU f32 and f64, f16 and bf16 through f32: heads and blocks of rows are tasks, each a product by strides,
//! nothing is transposed in memory, and the result is the same for any number of threads. On a CUDA device f32, f16
//! and bf16, each product one call of cuBLAS.

use super::cpu::{self, real, Real, Road};
#[cfg(feature = "cuda")]
use super::cuda::{self, Matrices, Place};
use super::linear::View;
use crate::kernels::tape::{self, Reads};
#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaStorage, DType};
use candle_core::{bail, CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// Rows of a task.
const ROWS: usize = 64;

/// The product in plain candle ops.
pub fn reference(query: &Tensor, key: &Tensor, heads: usize) -> Result<Tensor> {
    let (rows, inputs) = query.dims2()?;
    let by_head = |w: &Tensor| w.reshape((heads, rows / heads, inputs));
    by_head(query)?.transpose(1, 2)?.contiguous()?.matmul(&by_head(key)?)?.flatten(0, 1)
}

/// Sizes of one head.
#[derive(Clone, Copy)]
struct Sizes {
    heads: usize,
    depth: usize,
    inputs: usize,
}

/// `out`, of `rows` rows a head, each `width` long; `of` is given a head and the block's first row in it.
fn by_blocks<T: Real>(
    sizes: Sizes,
    (rows, width): (usize, usize),
    of: impl Fn(usize, usize, &mut [T]) + Sync,
) -> Vec<T> {
    let mut out = cpu::unwritten(sizes.heads * rows * width);
    let tasks = out.par_chunks_mut(rows * width).enumerate().flat_map(|(head, out)| {
        out.par_chunks_mut(ROWS * width).enumerate().map(move |(block, out)| (head, block * ROWS, out))
    });
    tasks.for_each(|(head, first, out)| of(head, first, out));
    out
}

fn forward<T: Real>(sizes: Sizes, q: &[T], k: &[T]) -> Vec<T> {
    let Sizes { depth, inputs, .. } = sizes;
    by_blocks(sizes, (inputs, inputs), |head, first, out| {
        let at = head * depth * inputs;
        let q = View { data: &q[at + first..], rs: 1, cs: inputs };
        let shape = (out.len() / inputs, inputs, depth);
        T::product(shape, out, inputs, q, View::rows(&k[at..], inputs), T::ONE, false);
    })
}

/// `Wk_h dW_h^T` for `turned`, else `Wq_h dW_h`, of the other factor.
fn backward<T: Real>(sizes: Sizes, other: &[T], g: &[T], turned: bool) -> Vec<T> {
    let Sizes { depth, inputs, .. } = sizes;
    by_blocks(sizes, (depth, inputs), |head, first, out| {
        let other = View::rows(&other[(head * depth + first) * inputs..], inputs);
        let g = View::rows(&g[head * inputs * inputs..], inputs);
        let g = if turned { g.t() } else { g };
        T::product((out.len() / inputs, inputs, inputs), out, inputs, other, g, T::ONE, false);
    })
}

#[cfg(feature = "cuda")]
impl Sizes {
    /// Heads of `rows` rows.
    fn matrices(&self, at: Place, dtype: DType, rows: usize) -> Matrices {
        Matrices::rows(at, dtype, self.inputs, (0, rows * self.inputs))
    }
}

/// (Wq, Wk) to W.
struct QkProduct(Sizes);

impl CustomOp2 for QkProduct {
    fn name(&self) -> &'static str {
        "qk-product"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (name, inputs) = (self.name(), self.0.inputs);
        real!(name, q, T => {
            let (q, k) = (<T as Real>::slice(name, q, ql)?, <T as Real>::slice(name, k, kl)?);
            Ok((<T as Real>::store(forward(self.0, q, k)), Shape::from((self.0.heads * inputs, inputs))))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        ql: &Layout,
        k: &CudaStorage,
        kl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (name, dtype) = (self.name(), q.dtype());
        let Sizes { heads, depth, inputs } = self.0;
        let shape = Shape::from((heads * inputs, inputs));
        let w = cuda::unwritten(q.device(), &shape, dtype)?;
        let q_at = self.0.matrices(cuda::place(name, q, ql)?, dtype, depth);
        let k_at = self.0.matrices(cuda::place(name, k, kl)?, dtype, depth);
        let operands = [q_at.t(), k_at, self.0.matrices(cuda::start(&w), dtype, inputs)];
        // SAFETY: Wq and Wk are [heads depth, inputs], W [heads inputs, inputs], by rows.
        unsafe { cuda::product(q.device(), (inputs, inputs, depth), (1, heads), operands, (1.0, 0.0))? };
        Ok((w, shape))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        _w: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let of = |query| q.apply_op3_no_bwd(k, &grad, &QkProductGrad { sizes: self.0, query });
        let dq = q.track_op().then(|| of(true)).transpose()?;
        let dk = k.track_op().then(|| of(false)).transpose()?;
        Ok((dq, dk))
    }
}

/// (Wq, Wk, dW) to dWq, or to dWk.
struct QkProductGrad {
    sizes: Sizes,
    query: bool,
}

impl CustomOp3 for QkProductGrad {
    fn name(&self) -> &'static str {
        "qk-product-grad"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
        g: &CpuStorage,
        gl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        real!(name, g, T => {
            let g = <T as Real>::slice(name, g, gl)?;
            let other = match self.query {
                true => <T as Real>::slice(name, k, kl)?,
                false => <T as Real>::slice(name, q, ql)?,
            };
            Ok((<T as Real>::store(backward(self.sizes, other, g, self.query)), ql.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        ql: &Layout,
        k: &CudaStorage,
        kl: &Layout,
        g: &CudaStorage,
        gl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (name, dtype) = (self.name(), g.dtype());
        let Sizes { heads, depth, inputs } = self.sizes;
        let out = cuda::unwritten(g.device(), ql.shape(), dtype)?;
        let g_at = self.sizes.matrices(cuda::place(name, g, gl)?, dtype, inputs);
        let (other, g_at) = match self.query {
            true => (cuda::place(name, k, kl)?, g_at.t()),
            false => (cuda::place(name, q, ql)?, g_at),
        };
        let [other, to] = [other, cuda::start(&out)].map(|at| self.sizes.matrices(at, dtype, depth));
        // SAFETY: the factor and its gradient are [heads depth, inputs], dW [heads inputs, inputs], by rows.
        unsafe {
            let sizes = (depth, inputs, inputs);
            cuda::product(g.device(), sizes, (1, heads), [other, g_at, to], (1.0, 0.0))?;
        }
        Ok((out, ql.shape().clone()))
    }
}

/// `Wqᵀ Wk` of each of the heads, `[heads in, in]`, for `query` and `key` `[heads d, in]`; differentiable in both.
pub fn qk_product(query: &Tensor, key: &Tensor, heads: usize) -> Result<Tensor> {
    let op = "qk_product";
    let (rows, inputs) = query.dims2()?;
    if key.dims() != query.dims() || heads == 0 || rows % heads != 0 || query.elem_count() == 0 {
        bail!("{op}: expected query and key [{heads} d, in], got {:?} and {:?}", query.dims(), key.dims())
    }
    match cpu::road_with_cuda(op, &[("query", query), ("key", key)])? {
        Road::Kernel => {
            let sizes = Sizes { heads, depth: rows / heads, inputs };
            tape::apply2(&query.contiguous()?, &key.contiguous()?, QkProduct(sizes), Reads::OPERANDS)
        }
        Road::ThroughF32 => qk_product(&cpu::wide(query)?, &cpu::wide(key)?, heads)?.to_dtype(query.dtype()),
        Road::Reference => reference(query, key, heads),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn case(heads: usize, depth: usize, inputs: usize) -> [Tensor; 2] {
        [1, 2].map(|seed| values(&[heads * depth, inputs], seed))
    }

    #[test]
    fn agrees_with_the_plain_product() {
        for (heads, depth, inputs) in [(1, 1, 1), (3, 2, 5), (2, 70, 130)] {
            let inputs = case(heads, depth, inputs);
            agrees(&inputs, &|t| qk_product(&t[0], &t[1], heads), &|t| reference(&t[0], &t[1], heads));
        }
        differentiates(&case(2, 3, 5), &|t| qk_product(&t[0], &t[1], 2));
        ignores_threads(&case(3, 40, 100), &|t| qk_product(&t[0], &t[1], 3));
    }

    #[test]
    fn by_hand() {
        // Two heads of depth 1: each the outer product of its rows.
        let cpu = &candle_core::Device::Cpu;
        let q = Tensor::new(&[[1f32, 2.0], [0.0, 3.0]], cpu).unwrap();
        let k = Tensor::new(&[[5f32, 7.0], [1.0, -1.0]], cpu).unwrap();
        let w = qk_product(&q, &k, 2).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(w, [[5.0, 7.0], [10.0, 14.0], [0.0, 0.0], [3.0, -3.0]]);
    }

    #[test]
    fn wrong_arguments_are_named() {
        let [q, k] = case(3, 2, 5);
        for (q, k, heads) in [(&q, &k, 4), (&q, &k, 0), (&q, &values(&[6, 4], 1), 3)] {
            assert!(qk_product(q, k, heads).unwrap_err().to_string().contains("[6, 5]"));
        }
    }
}
