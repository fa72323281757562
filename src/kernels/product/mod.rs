//! Matrix products in single precision and in bf16.
//!
//! ```text
//! product   dst [m, n] = scale * a [m, k] b [k, n] (+ dst)    one thread
//! matmul    out [m, n] =         a [m, k] b [k, n] (+ bias)   all threads
//! ```
//!
//! a and b are views by strides: a transpose is a view, and nothing is transposed in memory. Their
//! elements are f32 or bf16, results f32. Under [`Arithmetic::F32`] an element is a chain of fused
//! multiply-adds over each block of k, the blocks added in order. Under [`Arithmetic::Bf16`] the
//! operands are rounded to bf16 (to nearest, ties to even) while they are packed and the products
//! summed in f32: by `vdpbf16ps` in pairs where the machine has it, else as f32. (`vdpbf16ps`
//! takes subnormal numbers as zero, and its pairs add in another order.)
//!
//! How work is split depends on the shapes alone, and each element is computed by one task, or from
//! parts of the reduction that are added in order: the result is the same to the bit for any number
//! of threads. Under `F32` it is also the same on every instruction set.

mod block;
mod kernel;
mod onto;
mod pack;
#[cfg(test)]
mod tests;

pub(super) use onto::{onto, tiled, turned};
pub(super) use pack::Element;

use super::arithmetic::Arithmetic;
use block::{pack_left, pack_right, Buffer, How, Job, Left, Packed};
use kernel::{Base, Road};
use pack::Word;
use rayon::prelude::*;
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

/// A matrix in a slice: element (i, j) lies at `data[i * rs + j * cs]`.
#[derive(Clone, Copy)]
pub(super) struct View<'a, T> {
    pub data: &'a [T],
    pub rs: usize,
    pub cs: usize,
}

impl<'a, T> View<'a, T> {
    /// A row-major matrix of `cols` columns.
    pub fn rows(data: &'a [T], cols: usize) -> Self {
        View { data, rs: cols, cs: 1 }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        View { data: self.data, rs: self.cs, cs: self.rs }
    }

    pub fn fits(&self, rows: usize, cols: usize) -> bool {
        rows == 0 || cols == 0 || (rows - 1) * self.rs + (cols - 1) * self.cs < self.data.len()
    }

    /// Without its first `rows` rows and `cols` columns, of which it has more.
    fn from(self, rows: usize, cols: usize) -> Self {
        View { data: &self.data[rows * self.rs + cols * self.cs..], ..self }
    }
}

/// The best way on this machine, detected once.
fn how(arithmetic: Arithmetic) -> How {
    static HOW: OnceLock<[How; 2]> = OnceLock::new();
    let [f32, bf16] = HOW.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        let roads = [Road::Avx512Pairs, Road::Avx512, Road::Avx2, Road::Plain];
        #[cfg(not(target_arch = "x86_64"))]
        let roads = [Road::Plain];
        let best = |word: Word| {
            let fits = |r: &Road| r.allowed() && r.there() && r.depth() == word.depth();
            roads.into_iter().find(fits).map(|road| How { road, word })
        };
        let plain = best(Word::Plain).unwrap_or(How { road: Road::Plain, word: Word::Plain });
        let rounded = How { word: Word::Rounded, ..plain };
        [plain, best(Word::Pairs).unwrap_or(rounded)]
    });
    match arithmetic {
        Arithmetic::F32 => *f32,
        Arithmetic::Bf16 => *bf16,
    }
}

/// `dst [m, n] = scale * a [m, k] b [k, n]`, or added onto it, on one thread; rows of dst lie
/// `stride` apart. Panics if a view or dst is too short.
#[allow(clippy::too_many_arguments)]
pub(super) fn product<T: Element, U: Element>(
    arithmetic: Arithmetic,
    sizes: (usize, usize, usize),
    dst: &mut [f32],
    stride: usize,
    a: View<T>,
    b: View<U>,
    scale: f32,
    add: bool,
) {
    product_by(how(arithmetic), sizes, dst, stride, a, b, scale, add);
}

#[allow(clippy::too_many_arguments)]
fn product_by<T: Element, U: Element>(
    how: How,
    (m, n, k): (usize, usize, usize),
    dst: &mut [f32],
    stride: usize,
    a: View<T>,
    b: View<U>,
    scale: f32,
    add: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(n <= stride && (m - 1) * stride + n <= dst.len(), "result of a product lies outside its slice");
    assert!(a.fits(m, k) && b.fits(k, n), "operands of a product lie outside their slices");
    if k == 0 {
        if !add {
            dst.chunks_mut(stride).take(m).for_each(|row| row[..n].fill(0.0));
        }
        return;
    }
    let job = whole(how, (m, n, k), a, b, scale);
    let base = if add { Base::Result } else { Base::Nothing };
    // SAFETY: the assertions: dst holds m rows of n elements `stride` apart and is borrowed
    // exclusively; a and b hold what the job reads.
    unsafe { job.run(dst.as_mut_ptr(), stride, base) }
}

/// All of a product as one job that packs for itself.
fn whole<'a, T: Element, U: Element>(
    how: How,
    (m, n, k): (usize, usize, usize),
    a: View<'a, T>,
    b: View<'a, U>,
    scale: f32,
) -> Job<'a, T, U> {
    let left = Left::choose(how, a, n);
    let (a_packed, b_packed) = (Packed::Here, Packed::Here);
    Job { how, left, a, b, k, rows: (0, m), columns: (0, n), a_packed, m, b_packed, scale }
}

/// `a [m, k] b [k, n] (+ bias [n])`, row-major, on all threads.
pub(super) fn matmul<T: Element, U: Element>(
    arithmetic: Arithmetic,
    (m, n, k): (usize, usize, usize),
    a: View<T>,
    b: View<U>,
    bias: Option<&[f32]>,
) -> Vec<f32> {
    let mut out = Vec::with_capacity(m * n);
    matmul_into(arithmetic, (m, n, k), a, b, bias, &mut out.spare_capacity_mut()[..m * n]);
    // SAFETY: `matmul_into` wrote all m * n elements.
    unsafe { out.set_len(m * n) };
    out
}

/// As [`matmul`], into `out [m, n]`, of which it writes every element. Panics if a view or the bias
/// is too short, or if out has another size.
fn matmul_into<T: Element, U: Element>(
    arithmetic: Arithmetic,
    sizes: (usize, usize, usize),
    a: View<T>,
    b: View<U>,
    bias: Option<&[f32]>,
    out: &mut [MaybeUninit<f32>],
) {
    matmul_by(how(arithmetic), sizes, a, b, bias, out);
}

/// Multiply-adds below which a product is one task, and those a task has at least.
const ONE_TASK: usize = 1 << 19;
const TASK: usize = 1 << 21;
/// A product is cut into at most this many tasks.
const TASKS: usize = 32;
/// The least rows and columns of a task; columns in whole panels.
const TASK_ROWS: usize = 64;
const TASK_COLUMNS: usize = 96;
/// Columns of the widest panel of any road: 3 vectors of 16, or 2 of 8 three times.
const PANEL: usize = 48;
/// A reduction is cut into parts of about this length, if the result is small against it.
const PART: usize = 384;
const PARTS: usize = 16;
/// A result of more elements is never summed from parts: they take as much memory, each.
const SMALL: usize = 1 << 19;
/// An operand of more words is packed by each task for itself, block by block: its packed form
/// would be a copy that leaves the caches, and the memory stays with the thread.
const SHARE: usize = 1 << 22;

/// How a product is split; a function of its shape.
#[derive(Debug, PartialEq)]
enum Split {
    One,
    /// Parts of the reduction, of this length.
    Parts(usize),
    /// Tasks of this many rows and columns.
    Tasks(usize, usize),
}

fn split((m, n, k): (usize, usize, usize)) -> Split {
    let work = m * n * k;
    if work < ONE_TASK {
        return Split::One;
    }
    // Parts read each operand once; the sums of the parts are extra work per element of the result.
    if k >= 1024 && m * n <= (32 * k).min(SMALL) {
        let parts = (k / PART).clamp(2, PARTS);
        let parts = 1 << parts.ilog2();
        return Split::Parts(k.div_ceil(parts).next_multiple_of(2));
    }
    let tasks = (work / TASK).clamp(2, TASKS);
    // Both ways of cutting an operand are packed once; the longer side is cut first.
    let (down, across) = if n >= m {
        let across = tasks.min(n / TASK_COLUMNS).max(1);
        // With few rows and strips enough, each strip of b is packed by the task that uses it.
        let down = if across >= 8 && m <= 1024 { 1 } else { (tasks / across).min(m / TASK_ROWS).max(1) };
        (down, across)
    } else {
        let down = tasks.min(m / TASK_ROWS).max(1);
        (down, (tasks / down).min(n / TASK_COLUMNS).max(1))
    };
    let rows = m.div_ceil(down).next_multiple_of(16);
    let columns = n.div_ceil(across).next_multiple_of(PANEL);
    Split::Tasks(rows, columns)
}

/// A place that several tasks write, each its own elements.
#[derive(Clone, Copy)]
struct Place(*mut f32);

impl Place {
    /// The pointer `offset` elements on, which stay within the allocation if it is written through.
    fn at(self, offset: usize) -> *mut f32 {
        self.0.wrapping_add(offset)
    }
}

// SAFETY: tasks write through a `Place` each to elements of their own, see `matmul_by`.
unsafe impl Send for Place {}
// SAFETY: as above; no element is shared between threads.
unsafe impl Sync for Place {}

thread_local! {
    /// What a product packs or sums for all of its tasks: a, b, and parts.
    static SHARED: RefCell<[Buffer; 3]> = RefCell::default();
}

fn matmul_by<T: Element, U: Element>(
    how: How,
    (m, n, k): (usize, usize, usize),
    a: View<T>,
    b: View<U>,
    bias: Option<&[f32]>,
    out: &mut [MaybeUninit<f32>],
) {
    assert!(a.fits(m, k) && b.fits(k, n), "operands of a product lie outside their slices");
    assert!(out.len() == m * n, "expected room for {m} x {n} elements, got {}", out.len());
    assert!(bias.is_none_or(|bias| bias.len() == n), "expected a bias of {n} elements");
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        for row in out.chunks_exact_mut(n) {
            for (j, place) in row.iter_mut().enumerate() {
                place.write(bias.map_or(0.0, |bias| bias[j]));
            }
        }
        return;
    }
    let base = |j: usize| bias.map_or(Base::Nothing, |bias| Base::Bias(bias[j..].as_ptr()));
    let place = Place(out.as_mut_ptr().cast());
    match split((m, n, k)) {
        // SAFETY: the assertions above: out has m rows of n elements, borrowed exclusively; the
        // views and the bias reach over the product.
        Split::One => unsafe { whole(how, (m, n, k), a, b, 1.0).run(place.at(0), n, base(0)) },
        Split::Parts(part) => {
            // Taken out, not borrowed: while this thread waits it may start another product.
            let mut shared = SHARED.take();
            let size = (m * n).next_multiple_of(16);
            let parts = k.div_ceil(part);
            let sums = shared[2].words((parts - 1) * size);
            let rest = Place(sums.as_mut_ptr().cast());
            (0..parts).into_par_iter().with_max_len(1).for_each(|p| {
                let from = p * part;
                let job = whole(how, (m, n, part.min(k - from)), a.from(0, from), b.from(from, 0), 1.0);
                let bias = bias.map_or(Base::Nothing, |bias| Base::Bias(bias.as_ptr()));
                let (c, base) =
                    if p == 0 { (place.at(0), bias) } else { (rest.at((p - 1) * size), Base::Nothing) };
                // SAFETY: part 0 writes to out, each other to its own m * n words of `sums`; the
                // views hold rows and columns from `from` on by the assertions above.
                unsafe { job.run(c, n, base) }
            });
            let sums = &*sums;
            out.par_chunks_mut(SUM).enumerate().for_each(|(i, out)| {
                // SAFETY: part 0 wrote all of out.
                let out = unsafe { &mut *(std::ptr::from_mut(out) as *mut [f32]) };
                for part in sums.chunks_exact(size) {
                    for (sum, &word) in out.iter_mut().zip(&part[i * SUM..]) {
                        *sum += f32::from_bits(word);
                    }
                }
            });
            SHARED.set(shared);
        }
        Split::Tasks(rows, columns) => {
            let mut shared = SHARED.take();
            let [abuf, bbuf, _] = &mut shared;
            let left = Left::choose(how, a, columns);
            let (down, across) = (m.div_ceil(rows), n.div_ceil(columns));
            let words = k.div_ceil(how.depth());
            let a_packed = if across > 1 && left != Left::Direct && how.padded(m) * words <= SHARE {
                Packed::Before(pack_all_left(how, left, abuf, a, m, k))
            } else {
                Packed::Here
            };
            // Strips begin at whole panels, so only the last is padded.
            let padded = how.padded(n);
            let b_all: Option<&[u32]> = if down > 1 && padded * words <= SHARE {
                let all = bbuf.words(padded * words);
                pack_all_right(how, all, b, (n, k), columns);
                Some(all)
            } else {
                None
            };
            (0..down * across).into_par_iter().with_max_len(1).for_each(|t| {
                let (i, j) = (t % down * rows, t / down * columns);
                let span = (j, (j + columns).min(n));
                let b_packed = b_all.map_or(Packed::Here, |all| {
                    Packed::Before(&all[j * words..(j + how.padded(span.1 - j)) * words])
                });
                let rows = (i, (i + rows).min(m));
                let job = Job { how, left, a, b, k, rows, columns: span, a_packed, m, b_packed, scale: 1.0 };
                // SAFETY: rows and columns lie in the m by n elements of out and belong to this
                // task alone; the views and the bias reach over them by the assertions above.
                unsafe { job.run(place.at(i * n + j), n, base(j)) }
            });
            SHARED.set(shared);
        }
    }
}

/// Elements of a result summed from parts at a time.
const SUM: usize = 1 << 13;
/// Words below which packing is one task, about.
const PACK: usize = 1 << 15;

/// Packs all of a, on all threads.
fn pack_all_left<'a, T: Element>(
    how: How,
    left: Left,
    buffer: &'a mut Buffer,
    a: View<T>,
    m: usize,
    k: usize,
) -> &'a [u32] {
    let lanes = if left == Left::Lines { m } else { how.padded(m) };
    let all = buffer.words(lanes * k.div_ceil(how.depth()));
    let mut rest = &mut *all;
    let mut pieces = Vec::new();
    for k in how.blocks(k) {
        let words = k.len().div_ceil(how.depth());
        let (block, after) = std::mem::take(&mut rest).split_at_mut(lanes * words);
        rest = after;
        let step = (PACK / words).next_multiple_of(16);
        for (i, piece) in block.chunks_mut(step * words).enumerate() {
            pieces.push((piece, i * step..((i + 1) * step).min(m), k.clone()));
        }
    }
    pieces.into_par_iter().for_each(|(piece, rows, k)| pack_left(how, left, piece, a, rows, k));
    all
}

/// Packs all of b in strips of `columns`, on all threads.
fn pack_all_right<U: Element>(
    how: How,
    mut all: &mut [u32],
    b: View<U>,
    (n, k): (usize, usize),
    columns: usize,
) {
    let mut pieces = Vec::new();
    for j in (0..n).step_by(columns) {
        let strip = j..(j + columns).min(n);
        for k in how.blocks(k) {
            let words = k.len().div_ceil(how.depth());
            let (piece, rest) = std::mem::take(&mut all).split_at_mut(how.padded(strip.len()) * words);
            all = rest;
            pieces.push((piece, strip.clone(), k));
        }
    }
    pieces.into_par_iter().for_each(|(piece, strip, k)| pack_right(how, piece, b, strip, k));
}
