//! Sums over the rows of a matrix: parts of the rows, then the parts in f64 (kernels/columns.cuh).

use super::{start, suffix, unwritten, wide, Launch, Place};
use candle_core::{CudaDevice, CudaStorage, DType, Result, Shape};

/// Parts of the rows that are summed apart. Part of the numerics: a function of the rows alone.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Parts {
    /// Rows of a part; of the last one perhaps fewer.
    pub each: usize,
    /// Parts.
    pub count: usize,
}

impl Parts {
    /// Two for each multiprocessor of a large card, of eight rows at least.
    pub fn of(rows: usize) -> Self {
        let each = rows.div_ceil(264).max(8);
        Parts { each, count: rows.div_ceil(each) }
    }
}

/// The sums of `partial [parts, columns]`, f32, over its parts, written to `y [columns]` in `dtype`.
pub(in crate::kernels) fn fold_columns(
    device: &CudaDevice,
    partial: &CudaStorage,
    y: Place,
    dtype: DType,
    (parts, columns): (usize, usize),
) -> Result<()> {
    let launch =
        Launch::new(device, "elementwise", format!("fold_columns_{}", suffix("fold_columns", dtype)?));
    let launch = launch.place(start(partial)).place(y).i64(parts).i64(columns);
    // SAFETY: blocks of 32 columns cover those that partial and y have.
    unsafe { launch.run((columns.div_ceil(32), 1, 1), (32, 8, 1), 0) }
}

/// The sums of the columns of `x [rows, width]`, in its type.
pub(in crate::kernels) fn column_sums(
    device: &CudaDevice,
    x: Place,
    dtype: DType,
    (rows, width): (usize, usize),
) -> Result<CudaStorage> {
    let parts = Parts::of(rows);
    let sums = unwritten(device, width, dtype)?;
    let partial = unwritten(device, parts.count * width, DType::F32)?;
    let launch = Launch::new(device, "elementwise", format!("column_sums_{}", suffix("column_sums", dtype)?));
    let launch = launch.place(x).place(start(&partial)).i64(rows).i32(width).i64(parts.each);
    // SAFETY: a block for each part and for the columns of 32 wide accesses, which x has; partial has its parts.
    unsafe { launch.run((width.div_ceil(32 * wide(dtype)), parts.count, 1), (32, 8, 1), 0)? };
    fold_columns(device, &partial, start(&sums), dtype, (parts.count, width))?;
    Ok(sums)
}

/// `y = x + b` over rows whose end has the shape of b; y may be x.
pub(in crate::kernels) fn add_bias(
    device: &CudaDevice,
    dtype: DType,
    x: Place,
    b: Place,
    y: Place,
    (x_shape, b_shape): (&Shape, &Shape),
) -> Result<()> {
    let width = b_shape.elem_count();
    let rows = x_shape.elem_count() / width.max(1);
    let launch = Launch::new(device, "elementwise", format!("add_bias_{}", suffix("add_bias", dtype)?));
    let launch = launch.place(x).place(b).place(y).i64(rows).i32(width);
    let (grid, block) = row_grid(rows, width);
    // SAFETY: x and y have rows of `width` elements and b one, as the shapes say; rows are strided over.
    unsafe { launch.run(grid, block, 0) }
}

/// The grid and block of kernels/elementwise.cu for rows of `width` elements.
pub(in crate::kernels) fn row_grid(
    rows: usize,
    width: usize,
) -> ((usize, usize, usize), (usize, usize, usize)) {
    let x = width.div_ceil(8).next_power_of_two().clamp(32, 256);
    let y = 256 / x;
    ((rows.div_ceil(y).min(1 << 20), 1, 1), (x, y, 1))
}
