//! Products added onto another matrix in one pass over memory, for weights into which a change is folded.
//!
//! ```text
//! onto     out [m, n] = base [m, n] + scale * a [m, k] b [k, n]
//! turned   out_p = base_p + base_p b_p + b_p       out, base [m, n], b [m/r, r, r]
//! tiled    out [i, j] = base [i, j] + s [i, j mod r]
//! ```
//!
//! In `turned` base_p are the rows of block p, r of them, each n/r slices of r; every slice of row i is multiplied
//! with b_p and row i of b_p is added to it. A result that is larger than the caches goes past them, so that its lines
//! are not read first.

use super::block::{pack_right, panels, Buffer, Job, Left, Packed};
use super::kernel::{self, written, Base, Tile};
use super::{how, pack_all_right, Arithmetic, View, PANEL, SHARED};
use rayon::prelude::*;
use std::cell::RefCell;

/// Elements of a result above which it goes past the caches.
const PAST: usize = 1 << 21;
/// Elements of a result that make a task.
const TASK: usize = 1 << 16;
/// Rows that are walked together, from their first column to their last: as many streams as the machine follows.
const ROWS: usize = 8;

/// Tiles that the base is asked for ahead.
const AHEAD: usize = 2;

thread_local! {
    static BLOCK: RefCell<Buffer> = RefCell::default();
}

/// `base [m, n] + scale * a [m, k] b [k, n]`, row-major, on all threads. Panics if a slice is too short.
pub(in crate::kernels) fn onto(
    (m, n, k): (usize, usize, usize),
    base: &[f32],
    a: View<f32>,
    b: View<f32>,
    scale: f32,
) -> Vec<f32> {
    assert!(base.len() == m * n, "expected a base of {m} x {n} elements, got {}", base.len());
    assert!(a.fits(m, k) && b.fits(k, n), "operands of a product lie outside their slices");
    if m * n == 0 || k == 0 {
        return base.to_vec();
    }
    let how = how(Arithmetic::F32);
    // Taken out, not borrowed: while this thread waits it may start another product.
    let mut shared = SHARED.take();
    let all = shared[1].words(how.padded(n) * k);
    pack_all_right(how, all, b, (n, k), n);
    let b_packed = Packed::Before(all);
    let left = Left::Direct;
    let mut out: Vec<f32> = Vec::with_capacity(m * n);
    let rows = (TASK / n).next_multiple_of(ROWS).max(ROWS);
    let past = m * n > PAST;
    let tasks = out.spare_capacity_mut()[..m * n].par_chunks_mut(rows * n).enumerate();
    tasks.for_each(|(task, out)| {
        for (i, out) in out.chunks_mut(ROWS * n).enumerate() {
            let first = task * rows + i * ROWS;
            let span = (first, first + out.len() / n);
            let job = Job {
                how,
                left,
                a,
                b,
                k,
                rows: span,
                columns: (0, n),
                a_packed: Packed::Here,
                m,
                b_packed,
                scale,
            };
            let base = Base::Matrix {
                at: base[first * n..][..out.len()].as_ptr(),
                row: None,
                past,
                ahead: AHEAD * 2 * PANEL,
            };
            // SAFETY: `out` and the base hold the job's rows, n elements each, `out` exclusively; the views reach over
            // the product by the assertions above.
            unsafe { job.run(out.as_mut_ptr().cast(), n, base) }
        }
        written();
    });
    SHARED.set(shared);
    // SAFETY: the tasks wrote every row.
    unsafe { out.set_len(m * n) };
    out
}

/// `base [m, n]` turned by `b [m/r, r, r]`, see the module, on all threads. Panics if r does not divide m and n or a
/// slice has another length.
pub(in crate::kernels) fn turned((m, n, r): (usize, usize, usize), base: &[f32], b: &[f32]) -> Vec<f32> {
    assert!(r > 0 && m.is_multiple_of(r) && n.is_multiple_of(r), "blocks of {r} in {m} x {n}");
    assert!(base.len() == m * n && b.len() == m * r, "a base or blocks of another size");
    if m * n == 0 {
        return Vec::new();
    }
    let how = how(Arithmetic::F32);
    let mut out: Vec<f32> = Vec::with_capacity(m * n);
    let past = m * n > PAST;
    let slices = n / r;
    // A block in parts, where one is enough work for several tasks.
    let rows = (TASK / n).clamp(1, r);
    let tasks = out.spare_capacity_mut()[..m * n].par_chunks_mut(r * n).enumerate().flat_map(|(p, out)| {
        out.par_chunks_mut(rows * n).enumerate().map(move |(i, out)| (p, i * rows, out))
    });
    tasks.for_each(|(p, first, out)| {
        let b = &b[p * r * r..(p + 1) * r * r];
        let mut packed = BLOCK.take();
        let words = packed.words(how.padded(r) * r);
        let mut rest = &mut *words;
        for k in how.blocks(r) {
            let (piece, after) = std::mem::take(&mut rest).split_at_mut(how.padded(r) * k.len());
            rest = after;
            pack_right(how, piece, View::rows(b, r), 0..r, k);
        }
        for (i, out) in out.chunks_exact_mut(n).enumerate() {
            let i = first + i;
            let own = &base[(p * r + i) * n..][..n];
            let job = Job {
                how,
                left: Left::Direct,
                a: View::rows(own, r),
                b: View::rows(b, r),
                k: r,
                rows: (0, slices),
                columns: (0, r),
                a_packed: Packed::Here,
                m: slices,
                b_packed: Packed::Before(words),
                scale: 1.0,
            };
            let base = Base::Matrix {
                at: own.as_ptr(),
                row: Some(b[i * r..][..r].as_ptr()),
                past,
                ahead: AHEAD * ROWS * r,
            };
            // SAFETY: `out` and `own` are a row, slices of r elements each, `out` exclusively; row i of b holds r.
            unsafe { job.run(out.as_mut_ptr().cast(), r, base) }
        }
        written();
        BLOCK.set(packed);
    });
    // SAFETY: the tasks wrote every row.
    unsafe { out.set_len(m * n) };
    out
}

/// `base [m, n]` with row i of `s [m, r]` added onto every slice of row i, the last of which may be short, on all
/// threads. Panics on slices of another length.
pub(in crate::kernels) fn tiled((m, n, r): (usize, usize, usize), base: &[f32], s: View<f32>) -> Vec<f32> {
    assert!(r > 0 && base.len() == m * n && s.fits(m, r), "a base or sums of another size");
    if m * n == 0 {
        return Vec::new();
    }
    let how = how(Arithmetic::F32);
    let (lanes, most) = (how.road.lanes(), how.road.rows());
    let past = m * n > PAST;
    // Several slices at a time where one is narrower than a tile.
    let wide = r * (how.road.vectors() * lanes / r).max(1);
    let slices = n / wide;
    let mut out: Vec<f32> = Vec::with_capacity(m * n);
    let rows = (TASK / n).max(1);
    let tasks = out.spare_capacity_mut()[..m * n].par_chunks_mut(rows * n).enumerate();
    tasks.for_each_init(
        || vec![0f32; wide],
        |row, (task, out)| {
            for (i, out) in out.chunks_exact_mut(n).enumerate() {
                let i = task * rows + i;
                let base = &base[i * n..][..n];
                let (one, others) = row.split_at_mut(r);
                one.iter_mut().enumerate().for_each(|(j, v)| *v = s.data[i * s.rs + j * s.cs]);
                others.chunks_exact_mut(r).for_each(|part| part.copy_from_slice(one));
                for first in (0..slices).step_by(most) {
                    for (j, vectors) in panels(how, wide) {
                        let (c, stride) = (out[first * wide + j..].as_mut_ptr().cast(), wide);
                        let last = (wide - j - (vectors - 1) * lanes).min(lanes);
                        let at = base[first * wide + j..].as_ptr();
                        let ahead = AHEAD * most * wide;
                        let base = Base::Matrix { at, row: Some(row[j..].as_ptr()), past, ahead };
                        // No words: nothing is multiplied, and a and b are not read.
                        let (none, words) = (std::ptr::null(), 0);
                        let (a, a_row, a_k, b, b_k, scale) = (none, 0, 0, none, 0, 1.0);
                        let tile = Tile { a, a_row, a_k, b, b_k, words, c, stride, last, scale, base };
                        // SAFETY: `How` is only made for a road that is there; `out` and `base` hold this many slices
                        // from `first` on, `wide` elements each, `out` exclusively, and `row` one.
                        unsafe { kernel::run(how.road, most.min(slices - first), vectors, &tile) }
                    }
                }
                let rest = slices * wide;
                for ((out, base), s) in out[rest..].iter_mut().zip(&base[rest..]).zip(&*row) {
                    out.write(base + s);
                }
            }
            written();
        },
    );
    // SAFETY: the tasks wrote every row.
    unsafe { out.set_len(m * n) };
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let mut random = Random::new(seed, "onto", &[]);
        (0..count).map(|_| random.normal()).collect()
    }

    fn near(got: &[f32], want: &[f64]) {
        assert_eq!(got.len(), want.len());
        for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
            assert!((f64::from(g) - w).abs() <= 2e-5 * (1.0 + w.abs()), "at {i}: {g}, expected {w}");
        }
    }

    #[test]
    fn added_in_one_pass_as_in_two() {
        // The last goes past the caches, with rows that begin anywhere in a line.
        for (m, n, k) in [(1, 1, 1), (3, 17, 5), (9, 48, 16), (70, 130, 401), (33, 96, 0), (1050, 2003, 3)] {
            let (base, a, b) = (numbers(m * n, 1), numbers(m * k, 2), numbers(k * n, 3));
            let want: Vec<f64> = (0..m * n)
                .map(|at| {
                    let (i, j) = (at / n, at % n);
                    let sum: f64 = (0..k).map(|p| f64::from(a[i * k + p]) * f64::from(b[p * n + j])).sum();
                    f64::from(base[at]) + 0.5 * sum
                })
                .collect();
            near(&onto((m, n, k), &base, View::rows(&a, k), View::rows(&b, n), 0.5), &want);
        }
    }

    #[test]
    fn turned_slice_by_slice() {
        for (m, n, r) in [(1, 1, 1), (2, 6, 2), (15, 35, 5), (64, 128, 64), (1056, 2016, 48)] {
            let (base, b) = (numbers(m * n, 1), numbers(m * r, 2));
            let want: Vec<f64> = (0..m * n)
                .map(|at| {
                    let (o, i) = (at / n, at % n);
                    let block = |x: usize, y: usize| f64::from(b[(o / r * r + x) * r + y]);
                    let slice = &base[o * n + i / r * r..][..r];
                    let product: f64 =
                        slice.iter().enumerate().map(|(x, &w)| f64::from(w) * block(x, i % r)).sum();
                    f64::from(base[at]) + product + block(o % r, i % r)
                })
                .collect();
            near(&turned((m, n, r), &base, &b), &want);
        }
    }

    #[test]
    fn tiled_to_the_last_short_slice() {
        for (m, n, r) in [(1, 1, 1), (2, 7, 3), (5, 130, 16), (3, 97, 48), (4, 300, 100), (1100, 2011, 8)] {
            let (base, s) = (numbers(m * n, 1), numbers(m * r, 2));
            let want: Vec<f64> =
                (0..m * n).map(|at| f64::from(base[at]) + f64::from(s[at / n * r + at % n % r])).collect();
            near(&tiled((m, n, r), &base, View::rows(&s, r)), &want);
        }
    }

    #[test]
    fn threads_change_nothing() {
        let (base, a, b) = (numbers(1200 * 1800, 1), numbers(1200 * 8, 2), numbers(8 * 1800, 3));
        let blocks = numbers(1200 * 24, 4);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let sum = onto((1200, 1800, 8), &base, View::rows(&a, 8), View::rows(&b, 1800), 2.0);
                (sum, turned((1200, 1800, 24), &base, &blocks))
            })
        };
        let one = run(1);
        assert!(one == run(2) && one == run(5));
    }
}
