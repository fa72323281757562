//! Products by the `gemm` crate, for the types and shapes that have no kernel of ours: f64, and few rows.
//!
//! By strides, so nothing is transposed in memory. The split into tiles, and of a long reduction into at most 16 parts
//! that are added in order, depends on the shapes alone; each tile is a single-threaded product.

use super::cpu::{self, Real};
use super::product::View;
use rayon::prelude::*;

/// One place in a result that several tiles write, each its own elements.
#[derive(Clone, Copy)]
struct Place<T>(*mut T);

impl<T> Place<T> {
    /// The pointer `offset` elements on.
    ///
    /// # Safety
    /// As for pointer addition: `offset` must stay within the allocation.
    unsafe fn at(self, offset: usize) -> *mut T {
        // SAFETY: the caller's contract.
        unsafe { self.0.add(offset) }
    }
}

// SAFETY: a `Place` is only written through by `tile`, whose caller hands every tile its own elements.
unsafe impl<T: Send> Send for Place<T> {}
// SAFETY: as above; no element is shared between threads.
unsafe impl<T: Send> Sync for Place<T> {}

/// `dst [m, n] = scale * a [m, k] b [k, n]`, or added onto it, on one thread; dst has rows `stride` apart.
///
/// # Safety
/// `dst + i * stride + j` must be valid for writes (and initialised if `add`) for every i < m, j < n,
/// and not accessed by another thread meanwhile.
unsafe fn tile<T: Real>(
    (m, n, k): (usize, usize, usize),
    dst: Place<T>,
    stride: usize,
    a: View<T>,
    b: View<T>,
    scale: T,
    add: bool,
) {
    assert!(a.fits(m, k) && b.fits(k, n), "operands of a product lie outside their slices");
    // SAFETY: the assertion covers every read, the caller's contract every write.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.0,
            1,
            stride as isize,
            add,
            a.data.as_ptr(),
            a.cs as isize,
            a.rs as isize,
            b.data.as_ptr(),
            b.cs as isize,
            b.rs as isize,
            T::ONE,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[allow(clippy::too_many_arguments)]
pub(super) fn product<T: Real>(
    (m, n, k): (usize, usize, usize),
    dst: &mut [T],
    stride: usize,
    a: View<T>,
    b: View<T>,
    scale: T,
    add: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(n <= stride && (m - 1) * stride + n <= dst.len(), "result of a product lies outside its slice");
    // SAFETY: the assertion keeps every write inside `dst`, which is borrowed exclusively.
    unsafe { tile((m, n, k), Place(dst.as_mut_ptr()), stride, a, b, scale, add) }
}

/// Multiply-adds that make a unit of parallel work.
const TILE_WORK: usize = 1 << 21;
/// A reduction this long over a small result is split, and into at most this many parts.
const LONG: usize = 1024;
const PARTS: usize = 16;

/// `a [m, k] b [k, n] (+ bias [n])`, row-major, on all threads.
pub(super) fn matmul<T: Real>(
    (m, n, k): (usize, usize, usize),
    a: View<T>,
    b: View<T>,
    bias: Option<&[T]>,
) -> Vec<T> {
    assert!(a.fits(m, k) && b.fits(k, n), "operands of a product lie outside their slices");
    if m == 0 || n == 0 || k == 0 {
        let row = bias.map_or_else(|| vec![T::ZERO; n], <[T]>::to_vec);
        return row.repeat(m);
    }
    if bias.is_none() && k > LONG && m * n <= 1 << 17 {
        return long_product((m, n, k), a, b);
    }
    let tm = (TILE_WORK / (n * k)).clamp(128, 4096).next_multiple_of(16).min(m);
    let tn = if tm * n * k > 4 * TILE_WORK {
        (4 * TILE_WORK / (tm * k)).max(128).next_multiple_of(64).min(n)
    } else {
        n
    };
    let mut out: Vec<T> = Vec::with_capacity(m * n);
    let place = Place(out.as_mut_ptr());
    let across = n.div_ceil(tn);
    (0..m.div_ceil(tm) * across).into_par_iter().for_each(|t| {
        let (i, j) = (t / across * tm, t % across * tn);
        let (rows, cols) = (tm.min(m - i), tn.min(n - j));
        // SAFETY: rows [i, i + rows) and columns [j, j + cols) lie in the m * n elements reserved
        // above and belong to this tile alone; with a bias each is written before it is added to.
        unsafe {
            let corner = place.at(i * n + j);
            if let Some(bias) = bias {
                for r in 0..rows {
                    std::ptr::copy_nonoverlapping(bias[j..j + cols].as_ptr(), corner.add(r * n), cols);
                }
            }
            let a = View { data: &a.data[i * a.rs..], ..a };
            let b = View { data: &b.data[j * b.cs..], ..b };
            tile((rows, cols, k), Place(corner), n, a, b, T::ONE, bias.is_some());
        }
    });
    // SAFETY: the tiles cover all of [0, m) x [0, n), and each product wrote all of its elements.
    unsafe { out.set_len(m * n) };
    out
}

/// A small result over a long reduction: parts of the reduction in parallel, added in order.
fn long_product<T: Real>((m, n, k): (usize, usize, usize), a: View<T>, b: View<T>) -> Vec<T> {
    let part = k.div_ceil(PARTS).max(LONG / 2);
    let size = m * n;
    let mut partial = cpu::unwritten(k.div_ceil(part) * size);
    partial.par_chunks_mut(size).enumerate().for_each(|(p, dst)| {
        let from = p * part;
        let a = View { data: &a.data[from * a.cs..], ..a };
        let b = View { data: &b.data[from * b.rs..], ..b };
        product((m, n, part.min(k - from)), dst, n, a, b, T::ONE, false);
    });
    let (out, rest) = partial.split_at_mut(size);
    out.par_chunks_mut(cpu::GRAIN).enumerate().for_each(|(i, out)| {
        for other in rest.chunks_exact(size) {
            let from = i * cpu::GRAIN;
            cpu::add_rows(&other[from..from + out.len()], out);
        }
    });
    partial.truncate(size);
    partial
}
