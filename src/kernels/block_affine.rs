//! Products with a frozen weight under Bone's block-affine rule.
//!
//! ```text
//! W'_pq = W_pq + W_pq B_p + B_p     y = x W'^T     W_pq, B_p [r, r], p < O/r, q < I/r
//! dx = dy W'     dB_p = sum_q (W_pq^T G_pq + G_pq)     G = dy^T x
//! ```
//!
//! W `[O, I]` is frozen, dense or packed; B `[O/r, r, r]`, x `[.., I]`, f32. Source: arXiv 2409.15371
//! (v1, section 3; "Bat" in later versions). The rows of block p, read one after another, are I slices
//! of r, so that `W_pq B_p` over all q is one product `[I, r] [r, r]`, and so is the sum of dB_p. W' is made
//! panel by panel in both passes (see `rows`), and G too.
//!
//! On a CUDA device (kernels/block_affine.cu) x may be f16 or bf16: W', summed in f32, is then rounded to that, and dB
//! is f32.

#[cfg(feature = "cuda")]
use crate::kernels::cuda::{self, Launch, Matrix, Place};
use crate::kernels::tape::{self, Reads};
#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaDevice, CudaStorage};
use candle_core::{bail, CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::block_sum::{add_tiled, sum_rows};
use super::linear::{add_product, matmul, View};
use super::merged::reference_block_affine;
use super::rows::{self, floats, with_last, FrozenRows, Panels, Source};

/// Floats of the panel of G.
const PANEL: usize = 1 << 20;

/// The product in plain candle ops.
pub fn reference(x: &Tensor, rows: &FrozenRows, b: &Tensor) -> Result<Tensor> {
    let w = reference_block_affine(&rows.tensor(x.device())?, b)?;
    x.broadcast_matmul(&w.t()?.broadcast_left(&x.dims()[..x.rank().saturating_sub(2)])?)
}

/// Shapes of one product: O, I, r.
#[derive(Clone, Copy)]
struct Sizes {
    o: usize,
    i: usize,
    r: usize,
}

/// Turns the rows of one block, `r` of them, into those of W'.
fn turn(Sizes { i, r, .. }: Sizes, b: &[f32], rows: &mut [f32]) {
    let plain = rows.to_vec();
    add_product((i, r, r), rows, r, View::rows(&plain, r), View::rows(b, r));
    add_tiled(b, r, rows, i);
}

fn with_panels<R>(source: Source, sizes: Sizes, b: &[f32], f: impl FnOnce(Panels) -> R) -> R {
    let square = sizes.r * sizes.r;
    let edit = |first: usize, rows: &mut [f32]| {
        let p = first / sizes.r;
        turn(sizes, &b[p * square..(p + 1) * square], rows);
    };
    f(Panels::edited(source, (sizes.o, sizes.i), sizes.r, &edit))
}

/// `dB` for `x [tokens, I]` and `g [tokens, O]`.
fn block_gradient(source: Source, Sizes { o, i, r }: Sizes, x: &[f32], g: &[f32]) -> Vec<f32> {
    let tokens = g.len() / o;
    let mut db = vec![0f32; o * r];
    let most = (PANEL / i / r * r).max(r).min(o);
    for first in (0..o).step_by(most) {
        let count = most.min(o - first);
        let columns = View { data: &g[first..], rs: 1, cs: o };
        let outer = matmul((count, i, tokens), columns, View::rows(x, i), None);
        let blocks = db[first * r..(first + count) * r].par_chunks_mut(r * r);
        blocks.zip(outer.par_chunks(r * i)).enumerate().for_each_init(
            || vec![0f32; r * i],
            |w, (p, (db, outer))| {
                source.read_rows(first + p * r, i, w);
                sum_rows(outer, i, r, db);
                add_product((r, r, i), db, r, View::rows(w, r).t(), View::rows(outer, r));
            },
        );
    }
    db
}

/// The columns of B that a block of threads takes: TILE of the kernel.
#[cfg(feature = "cuda")]
fn tile(r: usize) -> usize {
    match r {
        0..=16 => 16,
        17..=32 => 32,
        _ => 64,
    }
}

/// W' of `count` rows in whole blocks, from W and their B, into `merged` of another type perhaps.
#[cfg(feature = "cuda")]
pub(super) fn merge_on_cuda(
    device: &CudaDevice,
    (w, from): (Place, DType),
    b: Place,
    (merged, to): (Place, DType),
    (count, i, r): (usize, usize, usize),
) -> Result<()> {
    let op = "block_affine";
    let suffix = match from == to {
        true => cuda::suffix(op, from)?.to_string(),
        false => format!("{}_{}", cuda::suffix(op, from)?, cuda::suffix(op, to)?),
    };
    let launch = Launch::new(device, "block_affine", format!("{op}_{suffix}"));
    let launch = launch.place(w).place(b).place(merged).i64(i).i32(r);
    // SAFETY: W and W' have count / r blocks of i slices of r, B as many of r rows; slices by 128 and columns by tiles,
    // as the kernel's header asks.
    unsafe { launch.run((count / r * i.div_ceil(128), r.div_ceil(tile(r)), 1), (128, 1, 1), 0) }
}

#[cfg(feature = "cuda")]
impl BlockAffine {
    /// The type that W is read in: its own, or that of x where it is codes.
    fn stored(&self, x: DType) -> DType {
        self.rows.dtype().unwrap_or(x)
    }

    /// Calls `each` with the panels of W' in `dtype`: the first row and the panel.
    fn panels(
        &self,
        op: &str,
        device: &CudaDevice,
        dtype: DType,
        b: Place,
        mut each: impl FnMut(usize, Matrix) -> Result<()>,
    ) -> Result<()> {
        let Sizes { o, i, r } = self.sizes;
        let most = rows::device_panel(i, dtype.size_in_bytes(), r).min(o);
        let merged = cuda::unwritten(device, (most, i), dtype)?;
        let stored = self.stored(dtype);
        for first in (0..o).step_by(most) {
            let count = most.min(o - first);
            let panel = self.rows.panel(op, device, stored, (first, count))?;
            let to = (cuda::start(&merged), dtype);
            merge_on_cuda(device, (panel.rows.place(), stored), b.at(first * r), to, (count, i, r))?;
            each(first, Matrix::at(to.0, dtype, (count, i)))?;
        }
        Ok(())
    }

    /// `dB` for `x [tokens, I]` and `g [tokens, O]` of one type.
    fn block_gradient_on_cuda(
        &self,
        op: &str,
        device: &CudaDevice,
        (x, g): (Matrix, Matrix),
        dtype: DType,
    ) -> Result<CudaStorage> {
        let Sizes { o, i, r } = self.sizes;
        let db = cuda::unwritten(device, (o / r, r, r), DType::F32)?;
        let most = rows::device_panel(i, 4, r).min(o);
        let outer = cuda::unwritten(device, (most, i), DType::F32)?;
        let stored = self.stored(dtype);
        for first in (0..o).step_by(most) {
            let count = most.min(o - first);
            let panel = self.rows.panel(op, device, stored, (first, count))?;
            let outers = Matrix::at(cuda::start(&outer), DType::F32, (count, i));
            // SAFETY: g and x are operands of as many tokens, the panel of G is new.
            unsafe { cuda::gemm(device, g.cols(first, count).t(), x, outers, 1.0, false)? };
            let onto = cuda::start(&db).at(first * r);
            gradient_on_cuda(device, (panel.rows.place(), stored), outers.place(), onto, (count, i, r))?;
        }
        Ok(db)
    }
}

/// dB of `count` rows in whole blocks, from W and G in f32.
#[cfg(feature = "cuda")]
fn gradient_on_cuda(
    device: &CudaDevice,
    (w, stored): (Place, DType),
    g: Place,
    db: Place,
    (count, i, r): (usize, usize, usize),
) -> Result<()> {
    let op = "block_affine_grad";
    let (blocks, tiles) = (count / r, r.div_ceil(tile(r)).pow(2));
    // Parts of the slices, so that there is work for a large card: a function of the shapes alone.
    let each = i.div_ceil((512 / (blocks * tiles)).clamp(1, 16)).next_multiple_of(128);
    let parts = i.div_ceil(each);
    let partial = (parts > 1).then(|| cuda::unwritten(device, parts * count * r, DType::F32)).transpose()?;
    let launch = Launch::new(device, "block_affine", format!("{op}_{}", cuda::suffix(op, stored)?));
    let launch = launch.place(w).place(g).place(partial.as_ref().map_or(db, cuda::start));
    // SAFETY: W and G have `blocks` blocks of i slices of r, dB as many of r rows, for each part; a block of threads for
    // each block, tile and part, as the kernel's header asks.
    unsafe { launch.i64(i).i32(r).i64(each).run((blocks, tiles, parts), (128, 1, 1), 0)? };
    match partial {
        Some(partial) => cuda::fold_columns(device, &partial, db, DType::F32, (parts, count * r)),
        None => Ok(()),
    }
}

/// (x, B) to y over a frozen weight.
#[derive(Clone)]
struct BlockAffine {
    rows: FrozenRows,
    sizes: Sizes,
}

impl CustomOp2 for BlockAffine {
    fn name(&self) -> &'static str {
        "block-affine"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, b) = (floats(self.name(), x, xl)?, floats(self.name(), b, bl)?);
        let y = self.rows.with(|source| Ok(with_panels(source, self.sizes, b, |w| w.product(x))))?;
        Ok((CpuStorage::F32(y), with_last(xl, self.sizes.o)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        xl: &Layout,
        b: &CudaStorage,
        bl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (name, device, dtype, o) = (self.name(), x.device(), x.dtype(), self.sizes.o);
        let (xs, shape) = (Matrix::of(name, x, xl)?, with_last(xl, o));
        let y = cuda::unwritten(device, &shape, dtype)?;
        let ys = Matrix::at(cuda::start(&y), dtype, (xs.sizes().0, o));
        self.panels(name, device, dtype, cuda::place(name, b, bl)?, |first, panel| {
            let (_, count) = panel.t().sizes();
            // SAFETY: the panel has `count` rows of W', to which go as many columns of y, which is new.
            unsafe { cuda::gemm(device, xs, panel.t(), ys.cols(first, count), 1.0, false) }
        })?;
        Ok((y, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let of = |input| x.apply_op3_no_bwd(b, &grad, &BlockAffineGrad { of: self.clone(), input });
        let dx = x.track_op().then(|| of(true)).transpose()?;
        let db = b.track_op().then(|| of(false)).transpose()?;
        Ok((dx, db))
    }
}

/// (x, B, dy) to dx, or to dB.
struct BlockAffineGrad {
    of: BlockAffine,
    input: bool,
}

impl CustomOp3 for BlockAffineGrad {
    fn name(&self) -> &'static str {
        "block-affine-grad"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
        g: &CpuStorage,
        gl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (name, BlockAffine { rows, sizes }) = (self.name(), &self.of);
        let (x, b, g) = (floats(name, x, xl)?, floats(name, b, bl)?, floats(name, g, gl)?);
        rows.with(|source| {
            Ok(match self.input {
                true => {
                    let dx = with_panels(source, *sizes, b, |w| w.product_back(g));
                    (CpuStorage::F32(dx), xl.shape().clone())
                }
                false => (CpuStorage::F32(block_gradient(source, *sizes, x, g)), bl.shape().clone()),
            })
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        xl: &Layout,
        b: &CudaStorage,
        bl: &Layout,
        g: &CudaStorage,
        gl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (name, device, dtype) = (self.name(), g.device(), g.dtype());
        let gs = Matrix::of(name, g, gl)?;
        if !self.input {
            let both = (Matrix::of(name, x, xl)?, gs);
            return Ok((self.of.block_gradient_on_cuda(name, device, both, dtype)?, bl.shape().clone()));
        }
        let dx = cuda::unwritten(device, xl.shape(), dtype)?;
        let dxs = Matrix::at(cuda::start(&dx), dtype, (gs.sizes().0, self.of.sizes.i));
        self.of.panels(name, device, dtype, cuda::place(name, b, bl)?, |first, panel| {
            let (count, _) = panel.sizes();
            // SAFETY: the panel has the rows of W' that as many columns of g meet; dx is read from the second panel on.
            unsafe { cuda::gemm(device, gs.cols(first, count), panel, dxs, 1.0, first > 0) }
        })?;
        Ok((dx, xl.shape().clone()))
    }
}

/// `x W'^T` for `x: [.., I]`, the frozen `rows` of W `[O, I]` and `b: [O/r, r, r]`, all f32; differentiable
/// in x and b. On a CUDA device x may be f16 or bf16. Errs where r does not divide O and I.
pub fn block_affine(x: &Tensor, rows: &FrozenRows, b: &Tensor) -> Result<Tensor> {
    let op = "block_affine";
    rows::check_there(op, x, rows)?;
    let sizes = Sizes { o: rows.rows(), i: rows.cols(), r: b.dims().last().copied().unwrap_or(0) };
    let Sizes { o, i, r } = sizes;
    if r == 0 || o % r != 0 || i % r != 0 || b.dims() != [o / r, r, r] {
        bail!("{op}: expected b [{o}/r, r, r] with r dividing {o} and {i}, got {:?}", b.dims())
    }
    if b.dtype() != DType::F32 {
        bail!("{op}: expected b in F32, got {:?}", b.dtype())
    }
    // W in another type than a half-precision x is changed in f32 alone.
    if x.dtype() != DType::F32 && rows.dtype().is_some_and(|dtype| dtype != x.dtype()) {
        return block_affine(&x.to_dtype(DType::F32)?, rows, b)?.to_dtype(x.dtype());
    }
    if !x.device().is_cpu() && !x.device().is_cuda() {
        return reference(x, rows, b);
    }
    tape::apply2(
        &x.contiguous()?,
        &b.contiguous()?,
        BlockAffine { rows: rows.clone(), sizes },
        Reads::OPERANDS,
    )
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn case(x: &[usize], o: usize, r: usize, dtype: DType) -> ([Tensor; 2], FrozenRows) {
        let i = x[x.len() - 1];
        let f32s = |t: Tensor| t.to_dtype(DType::F32).unwrap();
        let rows = FrozenRows::dense(&values(&[o, i], 2).to_dtype(dtype).unwrap()).unwrap();
        ([f32s(values(x, 1)), f32s(values(&[o / r, r, r], 3))], rows)
    }

    #[test]
    fn by_hand() {
        // One block, r = 2: W (E + B) + B with W = [[1, 2], [3, 4]] and B = [[1, 0], [2, -1]].
        let cpu = &candle_core::Device::Cpu;
        let w = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], cpu).unwrap();
        let b = Tensor::new(&[[[1f32, 0.0], [2.0, -1.0]]], cpu).unwrap();
        assert_eq!(
            reference_block_affine(&w, &b).unwrap().to_vec2::<f32>().unwrap(),
            [[7.0, 0.0], [16.0, -1.0]]
        );
        let x = Tensor::new(&[[1f32, 10.0]], cpu).unwrap();
        let y = block_affine(&x, &FrozenRows::dense(&w).unwrap(), &b).unwrap();
        assert_eq!(y.to_vec2::<f32>().unwrap(), [[7.0, 6.0]]);
    }

    #[test]
    fn agrees_and_differentiates() {
        for (x, o, r) in [
            (vec![1, 1], 1, 1),
            (vec![2, 3, 6], 9, 3),
            (vec![5, 10], 15, 5),
            (vec![3, 12], 8, 2),
            (vec![7, 34], 17, 17),
        ] {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let (t, rows) = case(&x, o, r, dtype);
                let op = |t: &[Tensor]| block_affine(&t[0], &rows, &t[1]);
                let like = |t: &[Tensor]| reference(&t[0], &rows, &t[1]);
                for (i, (got, want)) in run(&t, &op).iter().zip(run(&t, &like)).enumerate() {
                    close(&format!("result (0) or gradient of input {i}, {dtype:?}"), got, &want, F32);
                }
                linear_in_each(&t, &op);
            }
        }
    }

    #[test]
    fn panels_agree_with_the_whole_and_threads_do_not_matter() {
        // Panels of 1024 and 126 rows, and of all rows but five.
        for (x, o, r) in [([9, 1024], 1152, 64), ([3, 1050], 1050, 35)] {
            let (t, rows) = case(&x, o, r, DType::F32);
            let op = |t: &[Tensor]| block_affine(&t[0], &rows, &t[1]);
            let like = |t: &[Tensor]| reference(&t[0], &rows, &t[1]);
            for (got, want) in run(&t, &op).iter().zip(run(&t, &like)) {
                let scale = flat(&want).iter().fold(1f64, |m, v| m.max(v.abs()));
                let of = |t: &Tensor| (t / scale).unwrap();
                close("result or gradient", &of(got), &of(&want), F32);
            }
            ignores_threads(&t, &op);
        }
    }

    #[test]
    fn what_is_not_trained_gets_no_gradient_and_zeros_change_nothing() {
        let (t, rows) = case(&[5, 12], 8, 4, DType::F32);
        let zero = candle_core::Var::from_tensor(&t[1].zeros_like().unwrap()).unwrap();
        let y = block_affine(&t[0], &rows, &zero).unwrap();
        let w = rows.tensor(&candle_core::Device::Cpu).unwrap();
        let plain = crate::kernels::frozen_matmul(&t[0], &w).unwrap();
        assert_eq!(y.to_vec2::<f32>().unwrap(), plain.to_vec2::<f32>().unwrap());
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&zero).is_some() && grads.get(&t[0]).is_none() && grads.get(&w).is_none());
    }

    #[test]
    fn wrong_shapes_are_named() {
        let (t, rows) = case(&[5, 12], 8, 4, DType::F32);
        let text = refusal(block_affine(&t[0], &rows, &values(&[2, 4, 3], 1)));
        assert!(text.contains("r dividing 8 and 12") && text.contains("[2, 4, 3]"), "{text}");
        assert!(refusal(block_affine(&values(&[5, 11], 1), &rows, &t[1])).contains("[.., 12]"));
    }
}
