//! Batches of products by cuBLAS, of matrices wherever they lie: the heads of an attention are columns of a wider
//! matrix, and none of them is copied.

use std::ffi::c_void;

use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::cuda_backend::{gemm_reduced_precision_f32, WrapErr};
use candle_core::{bail, CudaDevice, DType, Result};

use super::{suffix, Place};

/// Matrices of one size, numbered by two numbers, the outer and the inner.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Matrices {
    /// Where the first one is.
    at: Place,
    dtype: DType,
    /// Elements from one row to the next as they are stored.
    row: usize,
    /// Whether what is stored as rows are columns.
    turned: bool,
    /// Elements from one matrix to the next, along the outer and the inner number.
    apart: (usize, usize),
}

impl Matrices {
    /// Matrices by rows that lie `row` elements apart.
    pub fn rows(at: Place, dtype: DType, row: usize, apart: (usize, usize)) -> Self {
        Matrices { at, dtype, row, turned: false, apart }
    }

    /// Their transposes.
    pub fn t(self) -> Self {
        Matrices { turned: !self.turned, ..self }
    }

    fn kind(self) -> Result<sys::cudaDataType> {
        suffix("product", self.dtype)?;
        Ok(match self.dtype {
            DType::F16 => sys::cudaDataType::CUDA_R_16F,
            DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
            _ => sys::cudaDataType::CUDA_R_32F,
        })
    }

    fn operation(self) -> sys::cublasOperation_t {
        match self.turned {
            true => sys::cublasOperation_t::CUBLAS_OP_T,
            false => sys::cublasOperation_t::CUBLAS_OP_N,
        }
    }

    /// Whether all of them lie as far apart as the inner ones, of which there are so many.
    fn even(self, inner: usize) -> bool {
        self.apart.0 == self.apart.1 * inner
    }
}

/// Matrices of a call: what fits into the third axis of a grid.
const MOST: usize = 65_535;

/// `out [m, n] = alpha a [m, k] b [k, n] + beta out` for each of `outer * inner`, in f32; `out` lies by rows, and is
/// not read with a `beta` of 0. One call where the matrices of all three operands lie evenly, else one for each of
/// the lesser number.
///
/// # Safety
/// The operands and the result must be in the device's memory as they say, the results apart from each other, and
/// from the operands.
pub(in crate::kernels) unsafe fn product(
    device: &CudaDevice,
    (m, n, k): (usize, usize, usize),
    (outer, inner): (usize, usize),
    [a, b, out]: [Matrices; 3],
    (alpha, beta): (f32, f32),
) -> Result<()> {
    let all = [a, b, out];
    let largest = [m, n, k].into_iter().chain(all.map(|x| x.row)).max().unwrap_or(0);
    if out.turned || m * n * k == 0 || largest > i32::MAX as usize {
        bail!("cuda: expected a product of {m} by {n} by {k} of at most 31 bits, its result by rows")
    }
    // Calls, how far apart their matrices begin; matrices of a call, and how far those lie apart.
    let (calls, across, count, apart) = match () {
        _ if inner == 1 || all.iter().all(|x| x.even(inner)) => {
            let apart = if inner == 1 { all.map(|x| x.apart.0) } else { all.map(|x| x.apart.1) };
            (1, [0; 3], outer * inner, apart)
        }
        _ if outer <= inner => (outer, all.map(|x| x.apart.0), inner, all.map(|x| x.apart.1)),
        _ => (inner, all.map(|x| x.apart.1), outer, all.map(|x| x.apart.0)),
    };
    let compute = match a.dtype {
        DType::F32 if gemm_reduced_precision_f32() => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
    };
    let kinds = [a.kind()?, b.kind()?, out.kind()?];
    device.cuda_stream().context().bind_to_thread().w()?;
    let blas = device.cublas_handle();
    for call in 0..calls {
        for first in (0..count).step_by(MOST) {
            let place = |i: usize| all[i].at.at(call * across[i] + first * apart[i]).address();
            // By columns, as cuBLAS reads them, the matrices are their transposes: out^T = b^T a^T.
            // SAFETY: sizes and strides fit their types, as was checked, or follow from memory that is there; the
            // rest is the caller's contract.
            unsafe {
                result::gemm_strided_batched_ex(
                    *blas.handle(),
                    b.operation(),
                    a.operation(),
                    n as i32,
                    m as i32,
                    k as i32,
                    (&raw const alpha).cast(),
                    place(1) as *const c_void,
                    kinds[1],
                    b.row as i32,
                    apart[1] as i64,
                    place(0) as *const c_void,
                    kinds[0],
                    a.row as i32,
                    apart[0] as i64,
                    (&raw const beta).cast(),
                    place(2) as *mut c_void,
                    kinds[2],
                    out.row as i32,
                    apart[2] as i64,
                    MOST.min(count - first) as i32,
                    compute,
                    sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
                )
                .w()?;
            }
        }
    }
    Ok(())
}
