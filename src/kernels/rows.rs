//! Frozen weights by rows, and products with rows that are made on the way.
//!
//! ```text
//! W' = edit(W)     y = x W'^T     dx = dy W'     x [.., I], W [O, I], y [.., O], f32
//! ```
//!
//! W is dense (f32, f16, bf16) or packed codes. Its rows are read, and edited, into a panel of a few
//! megabytes that all threads share, and each panel goes through one product with all tokens: neither W
//! nor W' is ever whole in memory, and a row is made once for each product, however many tokens there are.
//! Panels and tiles follow from shapes alone.
//!
//! On a CUDA device x may be in f32, f16 or bf16. A dense W of its type is read where it lies, codes by their own
//! kernels; of a W of another type, and of rows that are changed, a panel of at most 64 MB at a time is made.

#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaDevice, CudaStorage};
use candle_core::{bail, CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use super::cpu::{self, Real};
use super::linear::{add_product, matmul, product, View};
use super::packed;
use super::tape::{self, Reads};
use super::PackedRows;
#[cfg(feature = "cuda")]
use super::{
    cuda::{self, Matrix},
    linear::Product,
};

/// Floats of a panel, where a single block of rows is not already larger.
const PANEL: usize = 1 << 20;
/// Rows that are read by one task where the edit does not ask for blocks of its own.
const BLOCK: usize = 64;
/// Bytes of a panel on a CUDA device, where a single block of rows is not already larger.
#[cfg(feature = "cuda")]
const DEVICE_PANEL: usize = 64 << 20;
/// Multiply-adds that make a unit of parallel work.
const WORK: usize = 1 << 21;

/// A frozen matrix `[out, in]` that is read row by row.
#[derive(Clone, Debug)]
pub struct FrozenRows(Held);

#[derive(Clone, Debug)]
enum Held {
    Dense(Tensor),
    Packed(PackedRows),
}

impl FrozenRows {
    /// The rows of `w: [out, in]` in f32, f16 or bf16 (f64 is rounded to f32); detached.
    pub fn dense(w: &Tensor) -> Result<Self> {
        if w.rank() != 2 {
            bail!("frozen rows: expected w [out, in], got {:?}", w.dims())
        }
        let w = match w.dtype() {
            DType::F32 | DType::F16 | DType::BF16 => w.detach(),
            DType::F64 => w.detach().to_dtype(DType::F32)?,
            other => bail!("frozen rows: expected w in f16, bf16, f32 or f64, got {other:?}"),
        };
        Ok(FrozenRows(Held::Dense(w.contiguous()?)))
    }

    /// The rows that packed codes stand for.
    pub fn packed(rows: PackedRows) -> Self {
        FrozenRows(Held::Packed(rows))
    }

    /// Rows: output features.
    pub fn rows(&self) -> usize {
        match &self.0 {
            Held::Dense(w) => w.dims().first().copied().unwrap_or(0),
            Held::Packed(rows) => rows.rows(),
        }
    }

    /// Columns: input features.
    pub fn cols(&self) -> usize {
        match &self.0 {
            Held::Dense(w) => w.dims().last().copied().unwrap_or(0),
            Held::Packed(rows) => rows.cols,
        }
    }

    /// The whole matrix in f32 on `device`.
    pub fn tensor(&self, device: &Device) -> Result<Tensor> {
        match &self.0 {
            Held::Dense(w) => w.to_device(device)?.to_dtype(DType::F32),
            Held::Packed(rows) => packed::packed_values(rows, device),
        }
    }

    /// The type of a dense matrix; none of codes.
    pub(super) fn dtype(&self) -> Option<DType> {
        match &self.0 {
            Held::Dense(w) => Some(w.dtype()),
            Held::Packed(_) => None,
        }
    }

    /// The given rows in f32, `[ids.len(), in]`; an id out of range is an error.
    pub fn select(&self, ids: &[u32], device: &Device) -> Result<Tensor> {
        let (n, k) = (self.rows(), self.cols());
        if let Some(id) = ids.iter().find(|&&id| id as usize >= n) {
            bail!("found id {id}, expected one below the {n} rows")
        }
        match &self.0 {
            Held::Packed(rows) => {
                return packed::packed_rows(&Tensor::new(ids, &Device::Cpu)?, rows, device);
            }
            Held::Dense(w) if !w.device().is_cpu() => {
                let ids = Tensor::new(ids, w.device())?;
                return w.index_select(&ids, 0)?.to_device(device)?.to_dtype(DType::F32);
            }
            Held::Dense(_) => {}
        }
        let mut values = vec![0f32; ids.len() * k];
        self.with(|source| {
            let rows = values.par_chunks_mut(k.max(1)).zip(ids);
            rows.for_each(|(out, &id)| source.read(id as usize, out));
            Ok(())
        })?;
        Tensor::from_vec(values, (ids.len(), k), device)
    }

    /// Lends the elements, which must lie on the CPU.
    pub(super) fn with<R>(&self, f: impl FnOnce(Source) -> Result<R>) -> Result<R> {
        match &self.0 {
            Held::Packed(rows) => f(Source::Packed(rows)),
            Held::Dense(w) => {
                let (storage, layout) = w.storage_and_layout();
                let Some((from, to)) = layout.contiguous_offsets() else {
                    bail!("frozen rows: expected contiguous elements, got strides {:?}", layout.stride())
                };
                match cpu::host("frozen rows", &storage)? {
                    CpuStorage::F32(w) => f(Source::F32(&w[from..to])),
                    CpuStorage::F16(w) => f(Source::F16(&w[from..to])),
                    CpuStorage::BF16(w) => f(Source::BF16(&w[from..to])),
                    _ => bail!("frozen rows: expected elements of f16, bf16 or f32"),
                }
            }
        }
    }
}

/// Some rows on a CUDA device.
#[cfg(feature = "cuda")]
pub(super) struct Panel {
    pub rows: Matrix,
    /// What was made for it; memory goes back to the pool in the order of the stream.
    _made: Option<CudaStorage>,
}

/// The most rows of `cols` elements of `size` bytes that make a panel on a CUDA device, in whole blocks.
#[cfg(feature = "cuda")]
pub(super) fn device_panel(cols: usize, size: usize, block: usize) -> usize {
    (DEVICE_PANEL / (cols * size).max(1) / block * block).max(block)
}

#[cfg(feature = "cuda")]
impl FrozenRows {
    /// `count` rows from `first` on, in `dtype`; those of a dense matrix of that type are not copied.
    pub(super) fn panel(
        &self,
        op: &str,
        device: &CudaDevice,
        dtype: DType,
        (first, count): (usize, usize),
    ) -> Result<Panel> {
        let cols = self.cols();
        let made = match &self.0 {
            Held::Dense(w) => {
                let (storage, layout) = w.storage_and_layout();
                let w = cuda::storage(op, &storage)?;
                if w.dtype() == dtype {
                    return Ok(Panel { rows: Matrix::of(op, w, layout)?.rows(first, count), _made: None });
                }
                let from = layout.start_offset() + first * cols;
                w.to_dtype(&Layout::contiguous_with_offset((count, cols), from), dtype)?
            }
            Held::Packed(rows) => rows.values_on_cuda(device, dtype, (first, count))?,
        };
        Ok(Panel { rows: Matrix::at(cuda::start(&made), dtype, (count, cols)), _made: Some(made) })
    }

    /// `x W^T` on a CUDA device, or `x W`, in the type of x.
    pub(super) fn product_on_cuda(
        &self,
        op: &str,
        x: &CudaStorage,
        xl: &Layout,
        back: bool,
    ) -> Result<(CudaStorage, Shape)> {
        let (device, dtype) = (x.device(), x.dtype());
        match &self.0 {
            Held::Packed(rows) => return rows.product_on_cuda(x, xl, back),
            Held::Dense(w) if w.dtype() == dtype => {
                let (w, wl) = w.storage_and_layout();
                let product = if back { Product::Input } else { Product::Forward };
                return product.on_cuda(x, xl, cuda::storage(op, &w)?, wl);
            }
            Held::Dense(_) => {}
        }
        let (n, k) = (self.rows(), self.cols());
        let shape = with_last(xl, if back { k } else { n });
        let y = cuda::unwritten(device, &shape, dtype)?;
        let xs = Matrix::of(op, x, xl)?;
        let ys = Matrix::at(cuda::start(&y), dtype, (xs.sizes().0, if back { k } else { n }));
        let most = device_panel(k, dtype.size_in_bytes(), 1);
        for first in (0..n).step_by(most) {
            let count = most.min(n - first);
            let panel = self.panel(op, device, dtype, (first, count))?;
            // SAFETY: the panel has `count` rows of W, to which go as many columns of y, or of x.
            unsafe {
                match back {
                    false => {
                        cuda::gemm(device, xs, panel.rows.t(), ys.cols(first, count), 1.0, false)?;
                    }
                    true => cuda::gemm(device, xs.cols(first, count), panel.rows, ys, 1.0, first > 0)?,
                }
            }
        }
        Ok((y, shape))
    }

    /// `dy W` without a graph, of a contiguous dy.
    pub(super) fn product_back(&self, op: &str, grad: &Tensor) -> Result<Tensor> {
        let (storage, layout) = grad.storage_and_layout();
        let (dx, shape) = self.product_on_cuda(op, cuda::storage(op, &storage)?, layout, true)?;
        Ok(cuda::tensor(dx, shape))
    }
}

/// Where rows are read from.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
    Packed(&'a PackedRows),
    /// Their whole numbers, without steps.
    Whole(&'a PackedRows),
}

impl Source<'_> {
    /// Writes one row; `out` has the length of a row.
    fn read(self, row: usize, out: &mut [f32]) {
        let at = row * out.len()..(row + 1) * out.len();
        match self {
            Source::F32(w) => out.copy_from_slice(&w[at]),
            Source::F16(w) => out.iter_mut().zip(&w[at]).for_each(|(o, w)| *o = w.to_f32()),
            Source::BF16(w) => out.iter_mut().zip(&w[at]).for_each(|(o, w)| *o = w.to_f32()),
            Source::Packed(rows) => rows.values(row, out),
            Source::Whole(rows) => rows.whole(row, out),
        }
    }

    /// Writes the rows from `first` on, `cols` wide, as many as `out` holds.
    pub fn read_rows(self, first: usize, cols: usize, out: &mut [f32]) {
        for (i, out) in out.chunks_exact_mut(cols).enumerate() {
            self.read(first + i, out);
        }
    }
}

/// Changes rows in place: the first row's number and the elements of that row and those after it.
pub(super) type Edit<'a> = &'a (dyn Fn(usize, &mut [f32]) + Sync);

/// A frozen matrix `[rows, cols]` whose rows an edit changes in blocks of `block` rows.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a> {
    source: Source<'a>,
    rows: usize,
    cols: usize,
    edit: Option<(usize, Edit<'a>)>,
}

impl<'a> Panels<'a> {
    /// The rows as they are.
    pub fn plain(source: Source<'a>, (rows, cols): (usize, usize)) -> Self {
        Panels { source, rows, cols, edit: None }
    }

    /// The rows with `edit`, which is called for `block` rows at a time (the last block may be shorter).
    pub fn edited(source: Source<'a>, (rows, cols): (usize, usize), block: usize, edit: Edit<'a>) -> Self {
        Panels { source, rows, cols, edit: Some((block.max(1), edit)) }
    }

    /// With an edit that takes any number of rows.
    pub fn edited_freely(source: Source<'a>, shape: (usize, usize), edit: Edit<'a>) -> Self {
        Self::edited(source, shape, BLOCK, edit)
    }

    /// Calls `each` with every panel in order: its first row and its elements.
    pub fn each(&self, mut each: impl FnMut(usize, &[f32])) {
        if let (Source::F32(w), None) = (self.source, self.edit) {
            return each(0, w);
        }
        let block = self.edit.map_or(BLOCK, |(block, _)| block);
        let most = (PANEL / self.cols / block * block).max(block).min(self.rows);
        let mut panel: Vec<f32> = cpu::unwritten(most * self.cols);
        for first in (0..self.rows).step_by(most) {
            let panel = &mut panel[..most.min(self.rows - first) * self.cols];
            panel.par_chunks_mut(block * self.cols).enumerate().for_each(|(i, out)| {
                self.source.read_rows(first + i * block, self.cols, out);
                if let Some((_, edit)) = self.edit {
                    edit(first + i * block, out);
                }
            });
            each(first, panel);
        }
    }

    /// `x [tokens, cols] W'^T`, `[tokens, rows]`.
    pub fn product(&self, x: &[f32]) -> Vec<f32> {
        let (n, k) = (self.rows, self.cols);
        let tokens = x.len() / k;
        if let (Source::Packed(rows), None, true) = (self.source, self.edit, tokens <= packed::DECODED) {
            return packed::decode(x, rows);
        }
        let mut y = Vec::new();
        self.each(|first, panel| {
            let count = panel.len() / k;
            if count == n {
                y = matmul((tokens, n, k), View::rows(x, k), View::rows(panel, k).t(), None);
                return;
            }
            y.resize(tokens * n, 0f32);
            let step = tokens_a_task(panel.len());
            y.par_chunks_mut(step * n).zip(x.par_chunks(step * k)).for_each(|(y, x)| {
                let (x, panel) = (View::rows(x, k), View::rows(panel, k));
                product((y.len() / n, count, k), &mut y[first..], n, x, panel.t(), 1.0);
            });
        });
        y
    }

    /// `g [tokens, rows] W'`, `[tokens, cols]`.
    pub fn product_back(&self, g: &[f32]) -> Vec<f32> {
        let (n, k) = (self.rows, self.cols);
        let tokens = g.len() / n;
        let mut dx = Vec::new();
        self.each(|first, panel| {
            let count = panel.len() / k;
            if count == n {
                dx = matmul((tokens, k, n), View::rows(g, n), View::rows(panel, k), None);
                return;
            }
            dx.resize(tokens * k, 0f32);
            let step = tokens_a_task(panel.len());
            dx.par_chunks_mut(step * k).zip(g.par_chunks(step * n)).for_each(|(dx, g)| {
                let g = View { data: &g[first..], rs: n, cs: 1 };
                add_product((dx.len() / k, k, count), dx, k, g, View::rows(panel, k));
            });
        });
        dx
    }
}

/// Tokens that one task takes through a panel.
fn tokens_a_task(panel: usize) -> usize {
    (WORK / panel.max(1)).clamp(128, 4096)
}

/// (x) to x W^T with frozen rows.
struct FrozenProduct {
    rows: FrozenRows,
    /// Whether it is the product of the backward pass, `dy W`.
    back: bool,
}

impl CustomOp1 for FrozenProduct {
    fn name(&self) -> &'static str {
        "frozen-rows-matmul"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = floats(self.name(), x, xl)?;
        let (n, k) = (self.rows.rows(), self.rows.cols());
        let y = self.rows.with(|source| {
            let panels = Panels::plain(source, (n, k));
            Ok(if self.back { panels.product_back(x) } else { panels.product(x) })
        })?;
        Ok((CpuStorage::F32(y), with_last(xl, if self.back { k } else { n })))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, xl: &Layout) -> Result<(CudaStorage, Shape)> {
        self.rows.product_on_cuda(self.name(), x, xl, self.back)
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let op = FrozenProduct { rows: self.rows.clone(), back: true };
        Ok(Some(grad.contiguous()?.apply_op1_no_bwd(&op)?))
    }
}

/// `x w^T` for `x: [.., in]` in f32 and a frozen `w: [out, in]` in any float format, which is read by panels and on the
/// CPU never whole in another format; the gradient is that of x alone.
pub fn frozen_rows_matmul(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() && !x.device().is_cuda() {
        return super::linear::frozen_matmul(x, &w.to_dtype(DType::F32)?);
    }
    let rows = FrozenRows::dense(w)?;
    check("frozen_rows_matmul", x, &rows)?;
    tape::apply1(&x.contiguous()?, FrozenProduct { rows, back: false }, Reads::NOTHING)
}

/// The f32 elements of a contiguous operand.
pub(super) fn floats<'a>(op: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    <f32 as Real>::slice(op, storage, layout)
}

/// The shape of an activation with another last axis.
pub(super) fn with_last(layout: &Layout, last: usize) -> Shape {
    let mut dims = layout.dims().to_vec();
    if let Some(dim) = dims.last_mut() {
        *dim = last;
    }
    Shape::from(dims)
}

/// As [`check`]; on a CUDA device x may also be f16 or bf16.
pub(super) fn check_there(op: &str, x: &Tensor, rows: &FrozenRows) -> Result<()> {
    match x.device().is_cuda() && matches!(x.dtype(), DType::F16 | DType::BF16) {
        true => check_shape(op, x, rows),
        false => check(op, x, rows),
    }
}

fn check_shape(op: &str, x: &Tensor, rows: &FrozenRows) -> Result<()> {
    let (n, k) = (rows.rows(), rows.cols());
    if x.dims().last() != Some(&k) || x.elem_count() == 0 || n == 0 {
        bail!("{op}: expected x [.., {k}] for w [{n}, {k}], got {:?}", x.dims())
    }
    Ok(())
}

/// Checks that x is f32 `[.., in]` for these rows and holds something.
pub(super) fn check(op: &str, x: &Tensor, rows: &FrozenRows) -> Result<()> {
    check_shape(op, x, rows)?;
    if x.dtype() != DType::F32 {
        bail!("{op}: expected x in F32, got {:?}", x.dtype())
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn flat32(t: &Tensor) -> Vec<f32> {
        t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn products_agree_in_one_panel_and_in_several() {
        // 70 x 5: one panel. 300 x 8192: three, the last of 44 rows; blocks of 5 do not fill 128.
        for (n, k, block) in [(70, 5, 7), (300, 8192, 64), (300, 8192, 5)] {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let w = values(&[n, k], 1).to_dtype(dtype).unwrap();
                let x = values(&[3, k], 2).to_dtype(DType::F32).unwrap();
                let g = values(&[3, n], 3).to_dtype(DType::F32).unwrap();
                let rows = FrozenRows::dense(&w).unwrap();
                let number = Tensor::arange(0f32, n as f32, &Device::Cpu).unwrap().unsqueeze(1).unwrap();
                let edited = w.to_dtype(DType::F32).unwrap().broadcast_add(&number).unwrap();
                // The row's number onto each of its elements.
                let edit = |first: usize, out: &mut [f32]| {
                    assert!(out.len() <= block * k && first.is_multiple_of(block));
                    for (i, row) in out.chunks_exact_mut(k).enumerate() {
                        row.iter_mut().for_each(|v| *v += (first + i) as f32);
                    }
                };
                let (y, dx) = rows
                    .with(|source| {
                        let panels = Panels::edited(source, (n, k), block, &edit);
                        Ok((panels.product(&flat32(&x)), panels.product_back(&flat32(&g))))
                    })
                    .unwrap();
                let double = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
                let want = double(&x).matmul(&double(&edited).t().unwrap()).unwrap();
                // Sums of up to 8192 terms of magnitude 600, in f32.
                let scale = want.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
                let y = Tensor::from_vec(y, (3, n), &Device::Cpu).unwrap();
                close("y", &(double(&y) / scale).unwrap(), &(want / scale).unwrap(), F32);
                let want = double(&g).matmul(&double(&edited)).unwrap();
                let scale = want.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
                let dx = Tensor::from_vec(dx, (3, k), &Device::Cpu).unwrap();
                close("dx", &(double(&dx) / scale).unwrap(), &(want / scale).unwrap(), F32);
            }
        }
    }

    #[test]
    fn products_with_half_precision_differentiate_in_x() {
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let w = values(&[7, 5], 2).to_dtype(dtype).unwrap();
            let wide = w.to_dtype(DType::F32).unwrap();
            let x =
                candle_core::Var::from_tensor(&values(&[2, 3, 5], 1).to_dtype(DType::F32).unwrap()).unwrap();
            let y = frozen_rows_matmul(&x, &w).unwrap();
            close("y", &y, &super::super::linear::reference(&x, &wide, None).unwrap(), F32);
            let g = values(&[2, 3, 7], 3).to_dtype(DType::F32).unwrap();
            let dx = (y * &g).unwrap().sum_all().unwrap().backward().unwrap().remove(&x).unwrap();
            close("dx", &dx, &g.broadcast_matmul(&wide).unwrap(), F32);
        }
    }

    #[test]
    fn selected_rows_are_the_rows() {
        let w = values(&[5, 3], 1).to_dtype(DType::F32).unwrap();
        let rows = FrozenRows::dense(&w).unwrap();
        let got = rows.select(&[4, 0, 4], &Device::Cpu).unwrap();
        let want = w.index_select(&Tensor::new(&[4u32, 0, 4], &Device::Cpu).unwrap(), 0).unwrap();
        close("rows", &got, &want, 0.0);
        assert!(refusal(rows.select(&[1, 5], &Device::Cpu)).contains("id 5, expected one below the 5 rows"));
    }
}
