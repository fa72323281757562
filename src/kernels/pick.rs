//! Rows of a table by their numbers.
//!
//! ```text
//! y[t, :] = x[ids[t], :]     dx[i, :] = sum of dy[t, :] over the t with ids[t] = i     x [V, C], ids u32 [T]
//! ```
//!
//! candle's `index_select`, whose backward takes the rows of dy one after the other; on a CUDA device that of f32, f16
//! and bf16 is kernels/pick.cu, which takes them all at once and adds in the same order.

#[cfg(feature = "cuda")]
use crate::kernels::{
    cuda::{self, Launch},
    tape::{self, Reads},
};
#[cfg(feature = "cuda")]
use candle_core::{
    backend::{BackendDevice, BackendStorage},
    CpuStorage, CudaStorage, CustomOp1, Layout, Shape,
};
use candle_core::{bail, DType, Result, Tensor};

/// [`pick_rows`] in plain candle ops.
pub fn reference(x: &Tensor, ids: &Tensor) -> Result<Tensor> {
    x.index_select(ids, 0)
}

/// x to its rows.
#[cfg(feature = "cuda")]
struct Pick(Tensor);

/// dy to dx, of so many rows.
#[cfg(feature = "cuda")]
struct PickGrad(Tensor, usize);

#[cfg(feature = "cuda")]
impl CustomOp1 for Pick {
    fn name(&self) -> &'static str {
        "pick-rows"
    }

    fn cpu_fwd(&self, _x: &CpuStorage, _xl: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("{}: expected x on a CUDA device", self.name())
    }

    fn cuda_fwd(&self, x: &CudaStorage, xl: &Layout) -> Result<(CudaStorage, Shape)> {
        let (_, width) = xl.shape().dims2()?;
        let (ids, il) = self.0.storage_and_layout();
        let y = x.index_select(cuda::storage(self.name(), &ids)?, xl, il, 0)?;
        Ok((y, Shape::from((il.shape().elem_count(), width))))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let op = PickGrad(self.0.clone(), x.dim(0)?);
        Ok(Some(grad.contiguous()?.apply_op1_no_bwd(&op)?))
    }
}

#[cfg(feature = "cuda")]
impl CustomOp1 for PickGrad {
    fn name(&self) -> &'static str {
        "pick-rows-grad"
    }

    fn cpu_fwd(&self, _g: &CpuStorage, _gl: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("{}: expected dy on a CUDA device", self.name())
    }

    fn cuda_fwd(&self, g: &CudaStorage, gl: &Layout) -> Result<(CudaStorage, Shape)> {
        let (name, dtype, (count, width)) = (self.name(), g.dtype(), gl.shape().dims2()?);
        let (ids, il) = self.0.storage_and_layout();
        let shape = Shape::from((self.1, width));
        let dx = g.device().zeros_impl(&shape, dtype)?;
        let launch = Launch::new(g.device(), "pick", format!("pick_grad_{}", cuda::suffix(name, dtype)?))
            .place(cuda::place(name, g, gl)?)
            .place(cuda::place(name, cuda::storage(name, &ids)?, il)?)
            .place(cuda::start(&dx));
        let launch = launch.i32(count).i64(self.1).i32(width);
        // SAFETY: dy has a row for each number, dx as many rows as the numbers may count; blocks for each number and
        // for the columns of 256 wide accesses.
        unsafe { launch.run((count, width.div_ceil(256 * cuda::wide(dtype)), 1), (256, 1, 1), 0)? };
        Ok((dx, shape))
    }
}

/// The rows `ids: [T]`, u32, of `x: [V, C]`, `[T, C]`; differentiable in x. A number of V or more is an error on the
/// CPU; on a CUDA device it must not be there.
pub fn pick_rows(x: &Tensor, ids: &Tensor) -> Result<Tensor> {
    if x.rank() != 2 || ids.rank() != 1 || ids.dtype() != DType::U32 {
        let (found, of) = (x.dims(), ids.dims());
        bail!(
            "pick_rows: expected x [V, C] and ids [T] in U32, got {found:?} and {of:?} in {:?}",
            ids.dtype()
        )
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() && matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        return tape::apply1(&x.contiguous()?, Pick(ids.contiguous()?), Reads::NOTHING);
    }
    reference(&x.contiguous()?, ids)
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use candle_core::Device;

    #[test]
    fn rows_and_their_gradient() {
        let ids = Tensor::new(&[2u32, 0, 2, 4], &Device::Cpu).unwrap();
        let x = [values(&[5, 3], 1)];
        agrees(&x, &|t| pick_rows(&t[0], &ids), &|t| reference(&t[0], &ids));
        differentiates(&x, &|t| pick_rows(&t[0], &ids));
        let text = refusal(pick_rows(&x[0], &ids.to_dtype(DType::I64).unwrap()));
        assert!(text.contains("ids [T] in U32, got [5, 3] and [4] in I64"), "{text}");
    }
}
