//! Weights with an adapter's change folded in, in one pass over memory.
//!
//! ```text
//! low rank       W' = W + s B A                      W [O, I], A [r, I], B [O, r]      Hu et al. 2021, equation 3
//! shared block   W'[o, i] = W[o, i] + D[i mod r, o]  D [r, O]                          arXiv 2409.15371
//! block affine   W'_pq = W_pq + W_pq B_p + B_p       B [O/r, r, r]                     arXiv 2409.15371
//! ```
//!
//! Differentiable in every operand. In f32 on the CPU nothing but W is read from memory and nothing but W' is written,
//! and a weight in training is to the bit the one that is merged; in f32 on a CUDA device W is copied and changed where
//! it is (the block affine form is read and written once). Elsewhere, and backward, these are candle ops.

#[cfg(feature = "cuda")]
use super::cuda::{self, Matrix};
#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaStorage};
use candle_core::{bail, CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor};

use super::linear::View;
use super::product::{onto, tiled, turned};
use super::rows::floats;
use super::tape::{self, Reads};

/// [`low_rank_merged`] in plain candle ops.
pub fn reference_low_rank(w: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    w + (b.matmul(a)? * scale)?
}

/// [`shared_block_merged`] in plain candle ops.
pub fn reference_shared_block(w: &Tensor, d: &Tensor) -> Result<Tensor> {
    let ((outputs, inputs), r) = (w.dims2()?, d.dim(0)?);
    let slices = inputs.div_ceil(r);
    let tiled = d.t()?.unsqueeze(1)?.broadcast_as((outputs, slices, r))?;
    w + tiled.reshape((outputs, slices * r))?.narrow(1, 0, inputs)?
}

/// [`block_affine_merged`] in plain candle ops.
pub fn reference_block_affine(w: &Tensor, b: &Tensor) -> Result<Tensor> {
    let ((o, i), (p, r, _)) = (w.dims2()?, b.dims3()?);
    // Row-major, a block of r rows is r I/r slices of r: [p, r q, r].
    let slices = w.reshape((p, i, r))?;
    let turned = (&slices + slices.matmul(b)?)?.reshape((p, r, i / r, r))?;
    turned.broadcast_add(&b.unsqueeze(2)?)?.reshape((o, i))
}

/// The elements of a layout, one after the other.
#[cfg(feature = "cuda")]
fn copied(x: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
    let mut copy = cuda::unwritten(x.device(), layout.shape(), x.dtype())?;
    x.copy_strided_src(&mut copy, 0, layout)?;
    Ok(copy)
}

/// Whether the fused form takes these operands.
fn fused(operands: &[&Tensor]) -> bool {
    let one = |t: &&Tensor| t.device().is_cpu() || t.device().is_cuda();
    operands.iter().all(|t| one(t) && t.device().same_device(operands[0].device()) && t.dtype() == DType::F32)
}

/// (W, A, B) to W'.
struct LowRank(f32);

impl CustomOp3 for LowRank {
    fn name(&self) -> &'static str {
        "low-rank-merged"
    }

    fn cpu_fwd(
        &self,
        w: &CpuStorage,
        wl: &Layout,
        a: &CpuStorage,
        al: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (name, (o, i), r) = (self.name(), wl.shape().dims2()?, al.dims()[0]);
        let (w, a, b) = (floats(name, w, wl)?, floats(name, a, al)?, floats(name, b, bl)?);
        let merged = onto((o, i, r), w, View::rows(b, r), View::rows(a, i), self.0);
        Ok((CpuStorage::F32(merged), wl.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        w: &CudaStorage,
        wl: &Layout,
        a: &CudaStorage,
        al: &Layout,
        b: &CudaStorage,
        bl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (name, merged) = (self.name(), copied(w, wl)?);
        let (a, b) = (Matrix::of(name, a, al)?, Matrix::of(name, b, bl)?);
        let onto = Matrix::at(cuda::start(&merged), DType::F32, wl.shape().dims2()?);
        // SAFETY: A and B are operands, the copy of W is new and of its shape.
        unsafe { cuda::gemm(w.device(), b, a, onto, f64::from(self.0), true)? };
        Ok((merged, wl.shape().clone()))
    }

    fn bwd(
        &self,
        _w: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _merged: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (a, b, scale, grad) = (a.detach(), b.detach(), f64::from(self.0), grad.contiguous()?);
        let da = (b.t()?.matmul(&grad)? * scale)?;
        let db = (grad.matmul(&a.t()?)? * scale)?;
        Ok((Some(grad), Some(da), Some(db)))
    }
}

/// (W, D) to W'.
struct SharedBlock;

impl CustomOp2 for SharedBlock {
    fn name(&self) -> &'static str {
        "shared-block-merged"
    }

    fn cpu_fwd(
        &self,
        w: &CpuStorage,
        wl: &Layout,
        d: &CpuStorage,
        dl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((o, i), r) = (wl.shape().dims2()?, dl.dims()[0]);
        let d = View::rows(floats(self.name(), d, dl)?, o);
        let merged = tiled((o, i, r), floats(self.name(), w, wl)?, d.t());
        Ok((CpuStorage::F32(merged), wl.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        w: &CudaStorage,
        wl: &Layout,
        d: &CudaStorage,
        dl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let ((o, i), r, merged) = (wl.shape().dims2()?, dl.dims()[0], copied(w, wl)?);
        // D transposed: a row of it for each row of W.
        let turned = Layout::new(Shape::from((o, r)), vec![1, o], dl.start_offset());
        let rows = copied(d, &turned)?;
        let places = (cuda::start(&rows), cuda::start(&merged));
        super::block_sum::tile_on_cuda(w.device(), places, DType::F32, (o, i, r), true)?;
        Ok((merged, wl.shape().clone()))
    }

    fn bwd(
        &self,
        _w: &Tensor,
        d: &Tensor,
        _merged: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dd = super::block_sum::reference(grad, d.dim(0)?)?.t()?.contiguous()?;
        Ok((Some(grad.clone()), Some(dd)))
    }
}

/// (W, B) to W'.
struct BlockAffine;

impl CustomOp2 for BlockAffine {
    fn name(&self) -> &'static str {
        "block-affine-merged"
    }

    fn cpu_fwd(
        &self,
        w: &CpuStorage,
        wl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((o, i), r) = (wl.shape().dims2()?, bl.dims()[1]);
        let merged = turned((o, i, r), floats(self.name(), w, wl)?, floats(self.name(), b, bl)?);
        Ok((CpuStorage::F32(merged), wl.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        w: &CudaStorage,
        wl: &Layout,
        b: &CudaStorage,
        bl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (name, (o, i), r) = (self.name(), wl.shape().dims2()?, bl.dims()[1]);
        let merged = cuda::unwritten(w.device(), wl.shape(), DType::F32)?;
        let (from, b) = (cuda::place(name, w, wl)?, cuda::place(name, b, bl)?);
        let (from, to) = ((from, DType::F32), (cuda::start(&merged), DType::F32));
        super::block_affine::merge_on_cuda(w.device(), from, b, to, (o, i, r))?;
        Ok((merged, wl.shape().clone()))
    }

    fn bwd(
        &self,
        w: &Tensor,
        b: &Tensor,
        _merged: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let ((o, i), (p, r, _)) = (w.dims2()?, b.dims3()?);
        let (w, b) = (w.detach().reshape((p, i, r))?, b.detach());
        let g = grad.contiguous()?.reshape((p, i, r))?;
        // dW_pq = G_pq + G_pq B_p^T, dB_p = sum over q of W_pq^T G_pq + G_pq
        let dw = (&g + g.matmul(&b.transpose(1, 2)?.contiguous()?)?)?.reshape((o, i))?;
        let db = w.transpose(1, 2)?.contiguous()?.matmul(&g)?;
        let db = (db + g.reshape((p, r, i / r, r))?.sum(2)?)?;
        Ok((Some(dw), Some(db)))
    }
}

/// `W + scale B A` for `w: [O, I]`, `a: [r, I]` and `b: [O, r]`.
pub fn low_rank_merged(w: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let ((o, i), (r, width), (height, s)) = (w.dims2()?, a.dims2()?, b.dims2()?);
    if (width, height, s) != (i, o, r) {
        bail!("low_rank_merged: expected a [r, {i}] and b [{o}, r], got {:?} and {:?}", a.dims(), b.dims())
    }
    match fused(&[w, a, b]) {
        true => {
            let (w, a, b) = (w.contiguous()?, a.contiguous()?, b.contiguous()?);
            tape::apply3(&w, &a, &b, LowRank(scale as f32), Reads::OPERANDS)
        }
        false => reference_low_rank(w, a, b, scale),
    }
}

/// `W[o, i] + D[i mod r, o]` for `w: [O, I]` and `d: [r, O]`.
pub fn shared_block_merged(w: &Tensor, d: &Tensor) -> Result<Tensor> {
    let ((o, _), (r, width)) = (w.dims2()?, d.dims2()?);
    if r == 0 || width != o {
        bail!("shared_block_merged: expected a block [r, {o}], got {:?}", d.dims())
    }
    match fused(&[w, d]) {
        true => tape::apply2(&w.contiguous()?, &d.contiguous()?, SharedBlock, Reads::OPERANDS),
        false => reference_shared_block(w, d),
    }
}

/// `W_pq + W_pq B_p + B_p` for `w: [O, I]` and `b: [O/r, r, r]`, r dividing O and I.
pub fn block_affine_merged(w: &Tensor, b: &Tensor) -> Result<Tensor> {
    let ((o, i), r) = (w.dims2()?, b.dims().last().copied().unwrap_or(0));
    if r == 0 || o % r != 0 || i % r != 0 || b.dims() != [o / r, r, r] {
        bail!("block_affine_merged: expected b [{o}/r, r, r] with r dividing {o} and {i}, got {:?}", b.dims())
    }
    match fused(&[w, b]) {
        true => tape::apply2(&w.contiguous()?, &b.contiguous()?, BlockAffine, Reads::OPERANDS),
        false => reference_block_affine(w, b),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn case(shape: &[usize], seed: u64) -> Tensor {
        values(shape, seed).to_dtype(DType::F32).unwrap()
    }

    /// Values and gradients against candle's.
    fn check(
        inputs: &[Tensor],
        op: &dyn Fn(&[Tensor]) -> Result<Tensor>,
        reference: &dyn Fn(&[Tensor]) -> Result<Tensor>,
    ) {
        let want = run(inputs, reference);
        close("merged", &op(inputs).unwrap(), &want[0], F32);
        for (i, (got, want)) in run(inputs, op).iter().zip(&want).enumerate() {
            close(&format!("result (0) or gradient of input {i}"), got, want, F32);
        }
    }

    #[test]
    fn low_rank_follows_the_reference() {
        for (o, i, r) in [(1, 1, 1), (3, 5, 2), (70, 130, 16)] {
            let inputs = [case(&[o, i], 1), case(&[r, i], 2), case(&[o, r], 3)];
            check(&inputs, &|t| low_rank_merged(&t[0], &t[1], &t[2], 0.5), &|t| {
                reference_low_rank(&t[0], &t[1], &t[2], 0.5)
            });
        }
    }

    #[test]
    fn shared_block_follows_the_reference() {
        for (o, i, r) in [(1, 1, 1), (3, 5, 2), (70, 130, 16), (4, 7, 7)] {
            let inputs = [case(&[o, i], 1), case(&[r, o], 2)];
            check(&inputs, &|t| shared_block_merged(&t[0], &t[1]), &|t| reference_shared_block(&t[0], &t[1]));
        }
    }

    #[test]
    fn block_affine_follows_the_reference() {
        for (o, i, r) in [(1, 1, 1), (4, 6, 2), (66, 132, 33)] {
            let inputs = [case(&[o, i], 1), case(&[o / r, r, r], 2)];
            check(&inputs, &|t| block_affine_merged(&t[0], &t[1]), &|t| reference_block_affine(&t[0], &t[1]));
        }
    }

    #[test]
    fn views_are_read_as_what_they_show() {
        let w = case(&[6, 4], 1).t().unwrap();
        let b = case(&[2, 2, 2], 2);
        let want = reference_block_affine(&w.contiguous().unwrap(), &b).unwrap();
        close("of a transpose", &block_affine_merged(&w, &b).unwrap(), &want, F32);
    }

    #[test]
    fn shapes_that_do_not_fit_are_named() {
        let w = case(&[4, 6], 1);
        let message = |r: Result<Tensor>| r.unwrap_err().to_string();
        assert!(message(low_rank_merged(&w, &case(&[2, 5], 2), &case(&[4, 2], 3), 1.0)).contains("[2, 5]"));
        assert!(message(shared_block_merged(&w, &case(&[2, 5], 2))).contains("[2, 5]"));
        assert!(message(block_affine_merged(&w, &case(&[1, 4, 4], 2))).contains("[1, 4, 4]"));
    }
}
