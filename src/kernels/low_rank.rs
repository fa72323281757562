//! Products with a frozen weight under a low-rank change.
//!
//! ```text
//! y = x W^T + h U,  h = D(x)     x [.., I], W [O, I], h [.., r], U [r, O], y [.., O]
//! shared block   D(x) = the block sums of x, U = the block      W' = W + U tiled     (block_sum.rs)
//! low rank       D(x) = x A^T, U = s B^T                        W' = W + s B A       A [r, I], B [O, r]
//! dx = dy W + D^T(dy U^T)     dU = h^T dy     dA = (dy U^T)^T x
//! ```
//!
//! W is frozen, dense or packed, and gets no gradient; neither it nor W' is ever whole in memory where it is
//! large (see `change` and `rows`). On the CPU all is f32. On a CUDA device x may be f16 or bf16: then the factors, f32,
//! are rounded to that where they meet x, and their gradients are f32. Sources: Hu et al. 2021, equation 3; arXiv
//! 2409.15371, the additive form.

use std::sync::{Arc, OnceLock};

#[cfg(feature = "cuda")]
use crate::kernels::cuda::{self, Matrix, Operand as Factor};
use crate::kernels::tape::{self, Reads};
#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaStorage};
use candle_core::{bail, CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor};

use super::block_sum::block_sum;
use super::change::{Change, Down};
use super::cpu;
use super::linear::{linear, matmul, View};
use super::rows::{self, floats, with_last, FrozenRows};

/// [`shared_block`] in plain candle ops.
pub fn reference_shared_block(x: &Tensor, rows: &FrozenRows, block: &Tensor) -> Result<Tensor> {
    let base = super::linear::reference(x, &rows.tensor(x.device())?, None)?;
    base + linear(&block_sum(x, block.dim(0)?)?, &block.t()?, None)?
}

/// [`low_rank`] in plain candle ops.
pub fn reference(x: &Tensor, rows: &FrozenRows, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let base = super::linear::reference(x, &rows.tensor(x.device())?, None)?;
    base + (linear(&linear(x, a, None)?, b, None)? * scale)?
}

/// [`low_rank_change`] in plain candle ops.
fn composed_change(x: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    linear(&linear(x, a, None)?, b, None)? * scale
}

/// [`shared_block_change`] in plain candle ops.
fn composed_shared_change(x: &Tensor, block: &Tensor) -> Result<Tensor> {
    linear(&block_sum(x, block.dim(0)?)?, &block.t()?, None)
}

/// The transpose of `a [rows, cols]`.
fn transposed(a: &[f32], cols: usize) -> Vec<f32> {
    let rows = a.len() / cols;
    let mut t = Vec::with_capacity(a.len());
    for c in 0..cols {
        t.extend((0..rows).map(|r| a[r * cols + c]));
    }
    t
}

fn shared_change(rows: &FrozenRows, block: &[f32]) -> Change<'static> {
    let o = rows.rows();
    Change { o, i: rows.cols(), r: block.len() / o, down: Down::Blocks, up: transposed(block, o) }
}

fn low_rank_slices<'a>(rows: &FrozenRows, a: &'a [f32], b: &[f32], scale: f32) -> Change<'a> {
    let (o, i) = (rows.rows(), rows.cols());
    let up = b.iter().map(|b| b * scale).collect();
    Change { o, i, r: a.len() / i, down: Down::Matrix(a), up }
}

/// The way down and the way up in a backward pass on a CUDA device.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy)]
enum Way<'a> {
    /// Block sums, and the block `[r, O]`.
    Blocks(&'a Tensor),
    /// A `[r, I]`, and B `[O, r]` with its scale.
    Factors(&'a Tensor, &'a Tensor, f64),
}

#[cfg(feature = "cuda")]
impl Way<'_> {
    /// U in `dtype`, and whether it lies transposed.
    fn up(self, dtype: DType) -> Result<(Tensor, bool)> {
        match self {
            Way::Blocks(block) => Ok((block.detach().to_dtype(dtype)?, false)),
            Way::Factors(_, b, _) => Ok((b.detach().to_dtype(dtype)?, true)),
        }
    }

    fn scale(self) -> f64 {
        match self {
            Way::Blocks(_) => 1.0,
            Way::Factors(_, _, scale) => scale,
        }
    }
}

/// A matrix of an op's operands on a CUDA device.
#[cfg(feature = "cuda")]
type There<'a> = (&'a CudaStorage, &'a Layout);

/// An operand in a type, and what was made for it.
#[cfg(feature = "cuda")]
fn cast(op: &str, (x, xl): There, dtype: DType) -> Result<(Matrix, Option<CudaStorage>)> {
    if x.dtype() == dtype {
        return Ok((Matrix::of(op, x, xl)?, None));
    }
    let made = x.to_dtype(xl, dtype)?;
    Ok((Matrix::at(cuda::start(&made), dtype, xl.shape().dims2()?), Some(made)))
}

/// The change on a CUDA device, onto the product with W where there is one, and `h` for the backward: down by A, or by
/// block sums, and up by U `[r, O]` or B `[O, r]` with its scale.
#[cfg(feature = "cuda")]
fn forward_on_cuda(
    op: &str,
    (x, xl): There,
    rows: Option<&FrozenRows>,
    down: Option<There>,
    (up, scale): (There, Option<f64>),
) -> Result<(CudaStorage, Shape, Tensor)> {
    let (device, dtype) = (x.device(), x.dtype());
    let (up, _made) = cast(op, up, dtype)?;
    let up = if scale.is_some() { up.t() } else { up };
    let (r, o) = up.sizes();
    let xs = Matrix::of(op, x, xl)?;
    let (tokens, _) = xs.sizes();
    let h = match down {
        None => super::block_sum::sums_on_cuda(op, x, xl, r)?.0,
        Some(a) => {
            let h = cuda::unwritten(device, (tokens, r), dtype)?;
            let (a, _made) = cast(op, a, dtype)?;
            let hs = Matrix::at(cuda::start(&h), dtype, (tokens, r));
            // SAFETY: x and A are operands, h is new, [tokens, r].
            unsafe { cuda::gemm(device, xs, a.t(), hs, 1.0, false)? };
            h
        }
    };
    let (y, shape) = match rows {
        Some(rows) => rows.product_on_cuda(op, x, xl, false)?,
        None => {
            let shape = with_last(xl, o);
            (cuda::unwritten(device, &shape, dtype)?, shape)
        }
    };
    let hs = Matrix::at(cuda::start(&h), dtype, (tokens, r));
    let ys = Matrix::at(cuda::start(&y), dtype, (tokens, o));
    // SAFETY: y is [tokens, O] and new; without W nothing of it is read.
    unsafe { cuda::gemm(device, hs, up, ys, scale.unwrap_or(1.0), rows.is_some())? };
    Ok((y, shape, cuda::tensor(h, (tokens, r))))
}

/// The gradients of x, of A and of B or the block, those that are wanted; `grad` is contiguous.
#[cfg(feature = "cuda")]
fn backward_on_cuda(
    op: &str,
    x: &Tensor,
    rows: Option<&FrozenRows>,
    way: Way,
    h: Option<&Tensor>,
    grad: &Tensor,
) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
    let (dtype, scale) = (grad.dtype(), way.scale());
    let trained_down = match way {
        Way::Blocks(_) => None,
        Way::Factors(a, ..) => Some(a),
    };
    let wants_down = trained_down.is_some_and(Tensor::track_op);
    // dy U^T, scale included: [tokens, r].
    let g = match x.track_op() || wants_down {
        true => {
            let (up, turned) = way.up(dtype)?;
            Some(cuda::product_of(op, Factor(grad, false), Factor(&up, !turned), scale, dtype)?)
        }
        false => None,
    };
    let dx = match (&g, x.track_op()) {
        (Some(g), true) => {
            let (dx, onto) = match rows {
                Some(rows) => (rows.product_back(op, grad)?, true),
                None => {
                    let device = grad.device().as_cuda_device()?;
                    (cuda::tensor(cuda::unwritten(device, x.shape(), dtype)?, x.shape()), false)
                }
            };
            match way {
                Way::Blocks(_) => tile(op, g, &dx, onto)?,
                Way::Factors(a, ..) => {
                    let a = a.detach().to_dtype(dtype)?;
                    cuda::product_into(op, &dx, Factor(g, false), Factor(&a, false), 1.0, onto)?;
                }
            }
            Some(dx)
        }
        _ => None,
    };
    let da = match (&g, wants_down) {
        (Some(g), true) => Some(cuda::product_of(op, Factor(g, true), Factor(x, false), 1.0, DType::F32)?),
        _ => None,
    };
    let missing = || candle_core::Error::msg(format!("{op}: the backward pass came before the forward"));
    let dup = match way {
        Way::Blocks(block) if block.track_op() => {
            let h = h.ok_or_else(missing)?;
            Some(cuda::product_of(op, Factor(h, true), Factor(grad, false), 1.0, DType::F32)?)
        }
        Way::Factors(_, b, _) if b.track_op() => {
            let h = h.ok_or_else(missing)?;
            Some(cuda::product_of(op, Factor(grad, true), Factor(h, false), scale, DType::F32)?)
        }
        _ => None,
    };
    Ok((dx, da, dup))
}

/// Writes rows of `s` to the slices of those of `x`, or adds them.
#[cfg(feature = "cuda")]
fn tile(op: &str, s: &Tensor, x: &Tensor, onto: bool) -> Result<()> {
    let ((ss, sl), (xs, xl)) = (s.storage_and_layout(), x.storage_and_layout());
    let (ss, xs) = (cuda::storage(op, &ss)?, cuda::storage(op, &xs)?);
    let (tokens, r) = sl.shape().dims2()?;
    let width = xl.dims().last().copied().unwrap_or(1);
    let places = (cuda::place(op, ss, sl)?, cuda::place(op, xs, xl)?);
    super::block_sum::tile_on_cuda(ss.device(), places, s.dtype(), (tokens, width, r), onto)
}

/// (x, block) to y.
#[derive(Clone)]
struct SharedBlock {
    /// W; none on a CUDA device alone, where the change may be asked for without it.
    rows: Option<FrozenRows>,
    /// The block sums of x: all of it that the gradients need, and a fraction of its size.
    sums: Arc<OnceLock<Vec<f32>>>,
    #[cfg(feature = "cuda")]
    sums_there: Arc<OnceLock<Tensor>>,
    /// Whether there will be a backward pass over the block.
    tracked: bool,
}

impl SharedBlock {
    fn new(rows: Option<FrozenRows>, block: &Tensor) -> Self {
        SharedBlock {
            rows,
            sums: Arc::default(),
            #[cfg(feature = "cuda")]
            sums_there: Arc::default(),
            tracked: block.track_op(),
        }
    }

    fn rows(&self) -> Result<&FrozenRows> {
        base(self.name(), &self.rows)
    }
}

/// The frozen weight of an op that has one on the CPU.
fn base<'a>(op: &str, rows: &'a Option<FrozenRows>) -> Result<&'a FrozenRows> {
    match rows {
        Some(rows) => Ok(rows),
        None => bail!("{op}: expected operands on a CUDA device"),
    }
}

impl CustomOp2 for SharedBlock {
    fn name(&self) -> &'static str {
        "shared-block"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        d: &CpuStorage,
        dl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, d) = (floats(self.name(), x, xl)?, floats(self.name(), d, dl)?);
        let rows = self.rows()?;
        let change = shared_change(rows, d);
        if self.tracked {
            self.sums.get_or_init(|| change.down(x));
        }
        let y = rows.with(|source| Ok(change.forward(source, x)))?;
        Ok((CpuStorage::F32(y), with_last(xl, change.o)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        xl: &Layout,
        d: &CudaStorage,
        dl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (y, shape, sums) =
            forward_on_cuda(self.name(), (x, xl), self.rows.as_ref(), None, ((d, dl), None))?;
        if self.tracked {
            let _ = self.sums_there.set(sums);
        }
        Ok((y, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        d: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        #[cfg(feature = "cuda")]
        if grad.device().is_cuda() {
            let (rows, sums) = (self.rows.as_ref(), self.sums_there.get());
            let (dx, _, dd) = backward_on_cuda(self.name(), x, rows, Way::Blocks(d), sums, &grad)?;
            return Ok((dx, dd));
        }
        let of = |which| {
            let op = SharedBlockGrad { of: self.clone(), which, x: x.shape().clone() };
            d.apply_op2_no_bwd(&grad, &op)
        };
        let dx = x.track_op().then(|| of(Operand::Input)).transpose()?;
        let dd = d.track_op().then(|| of(Operand::Up)).transpose()?;
        Ok((dx, dd))
    }
}

/// Whose gradient an op gives.
#[derive(Clone, Copy)]
enum Operand {
    Input,
    Down,
    Up,
}

/// (block, dy) to dx or dU.
struct SharedBlockGrad {
    of: SharedBlock,
    which: Operand,
    x: Shape,
}

impl CustomOp2 for SharedBlockGrad {
    fn name(&self) -> &'static str {
        "shared-block-grad"
    }

    fn cpu_fwd(
        &self,
        d: &CpuStorage,
        dl: &Layout,
        g: &CpuStorage,
        gl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        let (d, g) = (floats(name, d, dl)?, floats(name, g, gl)?);
        let rows = self.of.rows()?;
        let change = shared_change(rows, d);
        let Change { o, i, r, .. } = change;
        match (self.which, self.of.sums.get()) {
            (Operand::Input, _) => {
                let dx = rows.with(|source| Ok(change.input_gradient(source, g)))?;
                Ok((CpuStorage::F32(dx), self.x.clone()))
            }
            (Operand::Down | Operand::Up, Some(h)) => {
                let tokens = self.x.elem_count() / i;
                let du = matmul((r, o, tokens), View::rows(h, r).t(), View::rows(g, o), None);
                Ok((CpuStorage::F32(du), dl.shape().clone()))
            }
            _ => bail!("{name}: the backward pass came before the forward"),
        }
    }
}

/// (x, A, B) to y.
#[derive(Clone)]
struct LowRank {
    /// W, as of [`SharedBlock`].
    rows: Option<FrozenRows>,
    scale: f32,
    /// `x A^T`, where B is trained.
    #[cfg(feature = "cuda")]
    kept: Option<Arc<OnceLock<Tensor>>>,
}

impl LowRank {
    fn new(rows: Option<FrozenRows>, scale: f64, _b: &Tensor) -> Self {
        LowRank {
            rows,
            scale: scale as f32,
            #[cfg(feature = "cuda")]
            kept: _b.track_op().then(Arc::default),
        }
    }
}

impl CustomOp3 for LowRank {
    fn name(&self) -> &'static str {
        "low-rank"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        a: &CpuStorage,
        al: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        let (x, a, b) = (floats(name, x, xl)?, floats(name, a, al)?, floats(name, b, bl)?);
        let rows = base(name, &self.rows)?;
        let change = low_rank_slices(rows, a, b, self.scale);
        let y = rows.with(|source| Ok(change.forward(source, x)))?;
        Ok((CpuStorage::F32(y), with_last(xl, change.o)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        xl: &Layout,
        a: &CudaStorage,
        al: &Layout,
        b: &CudaStorage,
        bl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let up = ((b, bl), Some(f64::from(self.scale)));
        let (y, shape, h) = forward_on_cuda(self.name(), (x, xl), self.rows.as_ref(), Some((a, al)), up)?;
        if let Some(kept) = &self.kept {
            let _ = kept.set(h);
        }
        Ok((y, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        #[cfg(feature = "cuda")]
        if grad.device().is_cuda() {
            let (rows, h) = (self.rows.as_ref(), self.kept.as_ref().and_then(|kept| kept.get()));
            let way = Way::Factors(a, b, f64::from(self.scale));
            return backward_on_cuda(self.name(), x, rows, way, h, &grad);
        }
        let of =
            |which| x.apply_op3_no_bwd(b, &grad, &LowRankGrad { of: self.clone(), a: a.detach(), which });
        let dx = x.track_op().then(|| of(Operand::Input)).transpose()?;
        let da = a.track_op().then(|| of(Operand::Down)).transpose()?;
        let db = b.track_op().then(|| of(Operand::Up)).transpose()?;
        Ok((dx, da, db))
    }
}

/// (x, B, dy) to dx, dA or dB.
struct LowRankGrad {
    of: LowRank,
    a: Tensor,
    which: Operand,
}

impl CustomOp3 for LowRankGrad {
    fn name(&self) -> &'static str {
        "low-rank-grad"
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
        let (name, LowRank { rows, scale, .. }) = (self.name(), &self.of);
        let rows = base(name, rows)?;
        let (x, b, g) = (floats(name, x, xl)?, floats(name, b, bl)?, floats(name, g, gl)?);
        let (a, a_layout) = self.a.storage_and_layout();
        let a = floats(name, cpu::host(name, &a)?, a_layout)?;
        let change = low_rank_slices(rows, a, b, *scale);
        let Change { o, i, r, .. } = change;
        let tokens = x.len() / i;
        match self.which {
            Operand::Input => {
                let dx = rows.with(|source| Ok(change.input_gradient(source, g)))?;
                Ok((CpuStorage::F32(dx), xl.shape().clone()))
            }
            Operand::Down => {
                let h = change.up_back(g);
                let da = matmul((r, i, tokens), View::rows(&h, r).t(), View::rows(x, i), None);
                Ok((CpuStorage::F32(da), a_layout.shape().clone()))
            }
            Operand::Up => {
                let h = change.down(x);
                let mut db = matmul((o, r, tokens), View::rows(g, o).t(), View::rows(&h, r), None);
                db.iter_mut().for_each(|v| *v *= scale);
                Ok((CpuStorage::F32(db), bl.shape().clone()))
            }
        }
    }
}

fn check_f32(op: &str, tensors: &[(&str, &Tensor)]) -> Result<()> {
    for (name, t) in tensors {
        if t.dtype() != DType::F32 {
            bail!("{op}: expected {name} in F32, got {:?}", t.dtype())
        }
    }
    Ok(())
}

/// `x W'^T` with `W'[o, i] = W[o, i] + block[i mod r, o]`, for `x: [.., I]`, the frozen `rows` of W `[O, I]`
/// and `block: [r, O]`, r at most I, all f32; differentiable in x and the block. On a CUDA device x may be f16 or bf16.
pub fn shared_block(x: &Tensor, rows: &FrozenRows, block: &Tensor) -> Result<Tensor> {
    let op = "shared_block";
    rows::check_there(op, x, rows)?;
    check_f32(op, &[("block", block)])?;
    let (o, i) = (rows.rows(), rows.cols());
    match block.dims() {
        [r, width] if *width == o && (1..=i).contains(r) => {}
        other => bail!("{op}: expected a block [r, {o}] with r from 1 to {i}, got {other:?}"),
    }
    if x.dtype() != DType::F32 && rows.dtype().is_some_and(|dtype| dtype != x.dtype()) {
        return shared_block(&cpu::wide(x)?, rows, block)?.to_dtype(x.dtype());
    }
    if !x.device().is_cpu() && !x.device().is_cuda() {
        return reference_shared_block(x, rows, block);
    }
    let op = SharedBlock::new(Some(rows.clone()), block);
    tape::apply2(&x.contiguous()?, &block.contiguous()?, op, Reads::these(&[false, true]))
}

/// What [`shared_block`] adds to `x W^T`: the block sums of x times `block: [r, O]`, f32; on a CUDA device x may be f16
/// or bf16.
pub fn shared_block_change(x: &Tensor, block: &Tensor) -> Result<Tensor> {
    let op = "shared_block_change";
    let i = check_x(op, x)?;
    check_f32(op, &[("block", block)])?;
    match block.dims() {
        [r, o] if *o > 0 && (1..=i).contains(r) => {}
        other => bail!("{op}: expected a block [r, O] with r from 1 to {i}, got {other:?}"),
    }
    if !x.device().is_cuda() {
        return composed_shared_change(x, block);
    }
    let op = SharedBlock::new(None, block);
    tape::apply2(&x.contiguous()?, &block.contiguous()?, op, Reads::these(&[false, true]))
}

/// The width of an x for a change alone.
fn check_x(op: &str, x: &Tensor) -> Result<usize> {
    let i = x.dims().last().copied().unwrap_or(0);
    let there = x.device().is_cuda() && matches!(x.dtype(), DType::F16 | DType::BF16);
    if x.elem_count() == 0 || !(there || x.dtype() == DType::F32) {
        bail!("{op}: expected x [.., I] in F32, got {:?} in {:?}", x.dims(), x.dtype())
    }
    Ok(i)
}

/// `x W'^T` with `W' = W + scale B A`, for `x: [.., I]`, the frozen `rows` of W `[O, I]`, `a: [r, I]` and
/// `b: [O, r]`, all f32; differentiable in x, a and b. On a CUDA device x may be f16 or bf16.
pub fn low_rank(x: &Tensor, rows: &FrozenRows, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let op = "low_rank";
    rows::check_there(op, x, rows)?;
    check_f32(op, &[("a", a), ("b", b)])?;
    let (o, i, r) = (rows.rows(), rows.cols(), a.dims().first().copied().unwrap_or(0));
    if r == 0 || a.dims() != [r, i] || b.dims() != [o, r] {
        bail!("{op}: expected a [r, {i}] and b [{o}, r], got {:?} and {:?}", a.dims(), b.dims())
    }
    if x.dtype() != DType::F32 && rows.dtype().is_some_and(|dtype| dtype != x.dtype()) {
        return low_rank(&cpu::wide(x)?, rows, a, b, scale)?.to_dtype(x.dtype());
    }
    if !x.device().is_cpu() && !x.device().is_cuda() {
        return reference(x, rows, a, b, scale);
    }
    let op = LowRank::new(Some(rows.clone()), scale, b);
    tape::apply3(&x.contiguous()?, &a.contiguous()?, &b.contiguous()?, op, Reads::OPERANDS)
}

/// What [`low_rank`] adds to `x W^T`: `scale x A^T B^T` for `a: [r, I]` and `b: [O, r]`, f32; on a CUDA device x may be
/// f16 or bf16.
pub fn low_rank_change(x: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let op = "low_rank_change";
    let i = check_x(op, x)?;
    check_f32(op, &[("a", a), ("b", b)])?;
    let (r, o) = (a.dims().first().copied().unwrap_or(0), b.dims().first().copied().unwrap_or(0));
    if r * o == 0 || a.dims() != [r, i] || b.dims() != [o, r] {
        bail!("{op}: expected a [r, {i}] and b [O, r], got {:?} and {:?}", a.dims(), b.dims())
    }
    if !x.device().is_cuda() {
        return composed_change(x, a, b, scale);
    }
    let op = LowRank::new(None, scale, b);
    tape::apply3(&x.contiguous()?, &a.contiguous()?, &b.contiguous()?, op, Reads::OPERANDS)
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use candle_core::{Device, Var};

    const SCALE: f64 = 0.75;

    fn case(shape: &[usize], seed: u64) -> Tensor {
        values(shape, seed).to_dtype(DType::F32).unwrap()
    }

    fn dense(o: usize, i: usize, dtype: DType) -> FrozenRows {
        FrozenRows::dense(&values(&[o, i], 2).to_dtype(dtype).unwrap()).unwrap()
    }

    /// Against the reference, relative to the largest element: long sums in f32.
    fn same(
        t: &[Tensor],
        op: &dyn Fn(&[Tensor]) -> Result<Tensor>,
        like: &dyn Fn(&[Tensor]) -> Result<Tensor>,
    ) {
        for (i, (got, want)) in run(t, op).iter().zip(run(t, like)).enumerate() {
            let scale = flat(&want).iter().fold(1f64, |m, v| m.max(v.abs()));
            let of = |t: &Tensor| (t / scale).unwrap();
            close(&format!("result (0) or gradient of input {i}"), &of(got), &of(&want), F32);
        }
    }

    #[test]
    fn by_hand() {
        let cpu = &Device::Cpu;
        let rows = FrozenRows::dense(&Tensor::zeros((2, 3), DType::F32, cpu).unwrap()).unwrap();
        // Three inputs in slices of two: the last slice sees the first row of the block alone.
        let x = Tensor::new(&[[1f32, 10.0, 100.0]], cpu).unwrap();
        let block = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], cpu).unwrap();
        let y = shared_block(&x, &rows, &block).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(y, [[101.0 + 30.0, 202.0 + 40.0]]);
        let (a, b) =
            (Tensor::new(&[[1f32, 0.0, 1.0]], cpu).unwrap(), Tensor::new(&[[1f32], [-2.0]], cpu).unwrap());
        let y = low_rank(&x, &rows, &a, &b, 0.5).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(y, [[50.5, -101.0]]);
    }

    #[test]
    fn agree_and_differentiate() {
        // The first shapes take the branch, the others W'.
        for (x, o, r) in [
            (vec![1, 33], 17, 4),
            (vec![2, 7], 5, 7),
            (vec![2, 3, 5], 7, 2),
            (vec![9, 6], 4, 3),
            (vec![1, 1], 1, 1),
        ] {
            let i = x[x.len() - 1];
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let rows = dense(o, i, dtype);
                let t = [case(&x, 1), case(&[r, o], 3)];
                let op = |t: &[Tensor]| shared_block(&t[0], &rows, &t[1]);
                same(&t, &op, &|t| reference_shared_block(&t[0], &rows, &t[1]));
                linear_in_each(&t, &op);
                let t = [case(&x, 1), case(&[r, i], 3), case(&[o, r], 4)];
                let op = |t: &[Tensor]| low_rank(&t[0], &rows, &t[1], &t[2], SCALE);
                same(&t, &op, &|t| reference(&t[0], &rows, &t[1], &t[2], SCALE));
                linear_in_each(&t, &op);
            }
        }
    }

    #[test]
    fn large_ones_agree_and_ignore_threads() {
        // Several panels of half floats; 1500 tokens make W', 130 take the branch.
        for (tokens, o, i, r) in [(130, 1100, 1001, 8), (1500, 1100, 1001, 5)] {
            let rows = dense(o, i, DType::BF16);
            let t = [case(&[tokens, i], 1), case(&[r, o], 3)];
            let op = |t: &[Tensor]| shared_block(&t[0], &rows, &t[1]);
            same(&t, &op, &|t| reference_shared_block(&t[0], &rows, &t[1]));
            ignores_threads(&t, &op);
            let t = [case(&[tokens, i], 1), case(&[r, i], 3), case(&[o, r], 4)];
            let op = |t: &[Tensor]| low_rank(&t[0], &rows, &t[1], &t[2], SCALE);
            same(&t, &op, &|t| reference(&t[0], &rows, &t[1], &t[2], SCALE));
            ignores_threads(&t, &op);
        }
    }

    #[test]
    fn what_is_not_trained_gets_no_gradient() {
        let (w, x) = (Var::from_tensor(&case(&[4, 6], 1)).unwrap(), case(&[9, 6], 2));
        let rows = FrozenRows::dense(&w).unwrap();
        let (a, b) = (case(&[2, 6], 3), Var::from_tensor(&case(&[4, 2], 4)).unwrap());
        let y = low_rank(&x, &rows, &a, &b, SCALE).unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&b).is_some());
        assert!(grads.get(&w).is_none() && grads.get(&x).is_none() && grads.get(&a).is_none());
    }

    #[test]
    fn wrong_shapes_are_named() {
        let (rows, x) = (dense(4, 6, DType::F32), case(&[9, 6], 2));
        let text = refusal(shared_block(&x, &rows, &case(&[7, 4], 1)));
        assert!(text.contains("r from 1 to 6") && text.contains("[7, 4]"), "{text}");
        let text = refusal(low_rank(&x, &rows, &case(&[2, 5], 1), &case(&[4, 2], 1), 1.0));
        assert!(text.contains("a [r, 6] and b [4, r]") && text.contains("[2, 5]"), "{text}");
        assert!(refusal(shared_block(&values(&[9, 6], 1), &rows, &case(&[2, 4], 1))).contains("F64"));
    }
}
