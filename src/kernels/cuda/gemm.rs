//! Products of matrices that lie row by row, by cuBLAS; sums are f32.

use super::{start, storage, unwritten, Place};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::cuda_backend::{gemm_reduced_precision_f32, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{bail, CudaDevice, CudaStorage, DType, Layout, Result, Shape, Storage, Tensor};
use std::ffi::c_void;

/// A matrix as a product takes it: what is stored, row by row, or the transpose of that.
#[derive(Clone, Copy, Debug)]
pub(in crate::kernels) struct Matrix {
    at: Place,
    dtype: DType,
    /// Rows and columns as they are stored.
    stored: (usize, usize),
    /// Elements from one stored row to the next.
    stride: usize,
    turned: bool,
}

impl Matrix {
    /// `rows` of `cols` elements without gaps.
    pub fn at(at: Place, dtype: DType, (rows, cols): (usize, usize)) -> Self {
        Matrix { at, dtype, stored: (rows, cols), stride: cols, turned: false }
    }

    /// The rows of a contiguous operand: its last axis, and all that is before it.
    pub fn of(op: &str, storage: &CudaStorage, layout: &Layout) -> Result<Self> {
        let cols = layout.dims().last().copied().unwrap_or(1);
        let rows = layout.shape().elem_count() / cols.max(1);
        Ok(Matrix::at(super::place(op, storage, layout)?, storage.dtype(), (rows, cols)))
    }

    /// With rows that lie `stride` elements apart.
    pub fn apart(self, stride: usize) -> Self {
        Matrix { stride, ..self }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Matrix { turned: !self.turned, ..self }
    }

    /// `count` of the stored rows, from `first` on.
    pub fn rows(self, first: usize, count: usize) -> Self {
        Matrix { at: self.at.at(first * self.stride), stored: (count, self.stored.1), ..self }
    }

    /// `count` of the stored columns, from `first` on.
    pub fn cols(self, first: usize, count: usize) -> Self {
        Matrix { at: self.at.at(first), stored: (self.stored.0, count), ..self }
    }

    /// Where it begins.
    pub fn place(self) -> Place {
        self.at
    }

    /// Rows and columns.
    pub fn sizes(self) -> (usize, usize) {
        let (rows, cols) = self.stored;
        if self.turned {
            (cols, rows)
        } else {
            (rows, cols)
        }
    }
}

fn kind(dtype: DType) -> Result<sys::cudaDataType> {
    match dtype {
        DType::F32 => Ok(sys::cudaDataType::CUDA_R_32F),
        DType::F16 => Ok(sys::cudaDataType::CUDA_R_16F),
        DType::BF16 => Ok(sys::cudaDataType::CUDA_R_16BF),
        other => bail!("gemm: expected f16, bf16 or f32, got {other:?}"),
    }
}

fn small(size: usize) -> Result<i32> {
    match i32::try_from(size) {
        Ok(size) => Ok(size),
        Err(_) => bail!("gemm: a size of {size} is beyond 31 bits"),
    }
}

/// `c = scale a b`, or added onto c; a and b of one type, c of that or f32.
///
/// # Safety
/// The matrices must lie on the device where they say, c apart from a and b.
pub(in crate::kernels) unsafe fn gemm(
    device: &CudaDevice,
    a: Matrix,
    b: Matrix,
    c: Matrix,
    scale: f64,
    onto: bool,
) -> Result<()> {
    let ((m, k), (inner, n)) = (a.sizes(), b.sizes());
    if inner != k || c.sizes() != (m, n) || c.turned || a.dtype != b.dtype {
        bail!("gemm: found {a:?}, {b:?} and {c:?}")
    }
    if m == 0 || n == 0 {
        return Ok(());
    }
    if k == 0 {
        bail!("gemm: expected sums of a term or more, found {a:?}")
    }
    let compute = match a.dtype == DType::F32 && gemm_reduced_precision_f32() {
        true => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        false => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
    };
    let (alpha, beta) = (scale as f32, if onto { 1f32 } else { 0f32 });
    let way = |turned| match turned {
        true => sys::cublasOperation_t::CUBLAS_OP_T,
        false => sys::cublasOperation_t::CUBLAS_OP_N,
    };
    device.cuda_stream().context().bind_to_thread().w()?;
    // cuBLAS counts by columns: what it takes for c is the transpose, b^T a^T.
    // SAFETY: the sizes are those of the matrices, as checked; that they lie there is the caller's contract.
    unsafe {
        result::gemm_ex(
            *device.cublas_handle().handle(),
            way(b.turned),
            way(a.turned),
            small(n)?,
            small(m)?,
            small(k)?,
            (&raw const alpha).cast(),
            b.at.address() as *const c_void,
            kind(b.dtype)?,
            small(b.stride.max(1))?,
            a.at.address() as *const c_void,
            kind(a.dtype)?,
            small(a.stride.max(1))?,
            (&raw const beta).cast(),
            c.at.address() as *mut c_void,
            kind(c.dtype)?,
            small(c.stride.max(1))?,
            compute,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
        .w()
    }
}

/// A tensor over results, without a graph.
pub(in crate::kernels) fn tensor(results: CudaStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(results), shape, BackpropOp::none(), false)
}

/// A tensor in a product, turned or not: its last axis, and all that is before it.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Operand<'a>(pub &'a Tensor, pub bool);

/// `scale a b` in `dtype`, a matrix without a graph; the tensors are contiguous and on one device.
pub(in crate::kernels) fn product_of(
    op: &str,
    a: Operand,
    b: Operand,
    scale: f64,
    dtype: DType,
) -> Result<Tensor> {
    let ((a_storage, al), (b_storage, bl)) = (a.0.storage_and_layout(), b.0.storage_and_layout());
    let (a_storage, b_storage) = (storage(op, &a_storage)?, storage(op, &b_storage)?);
    let turn = |matrix: Matrix, turned: bool| if turned { matrix.t() } else { matrix };
    let (am, bm) = (turn(Matrix::of(op, a_storage, al)?, a.1), turn(Matrix::of(op, b_storage, bl)?, b.1));
    let shape = (am.sizes().0, bm.sizes().1);
    let c = unwritten(a_storage.device(), shape, dtype)?;
    // SAFETY: a and b are those of tensors that are held here, c is new and of the shape of the product.
    unsafe { gemm(a_storage.device(), am, bm, Matrix::at(start(&c), dtype, shape), scale, false)? };
    Ok(tensor(c, shape))
}

/// `c = scale a b` in place, or added onto c, which is contiguous and nobody else's.
pub(in crate::kernels) fn product_into(
    op: &str,
    c: &Tensor,
    a: Operand,
    b: Operand,
    scale: f64,
    onto: bool,
) -> Result<()> {
    let ((a_storage, al), (b_storage, bl)) = (a.0.storage_and_layout(), b.0.storage_and_layout());
    let (c_storage, cl) = c.storage_and_layout();
    let (a_storage, b_storage) = (storage(op, &a_storage)?, storage(op, &b_storage)?);
    let turn = |matrix: Matrix, turned: bool| if turned { matrix.t() } else { matrix };
    let (am, bm) = (turn(Matrix::of(op, a_storage, al)?, a.1), turn(Matrix::of(op, b_storage, bl)?, b.1));
    let cm = Matrix::of(op, storage(op, &c_storage)?, cl)?;
    // SAFETY: all three are those of tensors that are held here.
    unsafe { gemm(a_storage.device(), am, bm, cm, scale, onto) }
}
