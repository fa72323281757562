//! `G += A A^T`, the lower half, [n, n], from vectors of n numbers, the columns of `A`.
//!
//! Vectors are taken some hundred at a time and packed in panels of 24 rows, `[panel][vector][24]`. The one packing
//! serves both sides of the product: 8 columns of a tile are a third of a panel's rows, a cache line for each vector.
//! A block of panels stays in the second cache while all the columns to its left pass by it.

#[cfg(test)]
mod tests;
mod tiles;

use std::ops::Range;

use crate::kernels::packed::Isa;
use tiles::{Tile, TALL, WIDE};

/// Vectors that are packed at a time: the product passes once over `G` for each so many. A panel of rows and the
/// columns of a tile, 24 and 8 numbers for each, are 64 KiB: more vectors press on the caches, fewer on `G`.
const DEPTH: usize = 256;
/// Panels of a block: 7 * 24 * 256 numbers are a third of the second cache.
const PANELS: usize = 7;
/// Vectors that are asked for at a time: they are packed before they leave the caches.
const SLAB: usize = 16;

/// Where the vectors have numbers other than zero. The others are passed by, but for those of a tile that has some
/// of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Anywhere.
    Full,
    /// Vector k from its number k on, as the columns of a lower triangle have them.
    Lower,
    /// Vector k up to its number k, as the columns of an upper triangle have them.
    Upper,
}

/// `g += a a^T`, the lower half of `g`, [n, n]; both are column-major, and what lies above the diagonal is left as it
/// is. `fill` writes columns of `a`: those of a range, in order, n numbers each, over what was there before, and zeros
/// where `form` has none.
pub(crate) fn add_lower_of(
    g: &mut [f64],
    n: usize,
    count: usize,
    form: Form,
    fill: impl FnMut(Range<usize>, &mut [f64]),
) {
    add_lower_by(Isa::best(), g, n, count, form, fill);
}

/// As [`add_lower_of`], by an instruction set.
fn add_lower_by(
    isa: Isa,
    g: &mut [f64],
    n: usize,
    count: usize,
    form: Form,
    mut fill: impl FnMut(Range<usize>, &mut [f64]),
) {
    assert_eq!(g.len(), n * n, "a symmetric matrix is square");
    let mut slab = vec![0.0; n * SLAB.min(count)];
    let mut packed = vec![0.0; n.next_multiple_of(TALL) * DEPTH.min(count)];
    for from in (0..count).step_by(DEPTH) {
        let mut pass = Pass { isa, n, form, vectors: from..(from + DEPTH).min(count), packed: &mut packed };
        for from in pass.vectors.clone().step_by(SLAB) {
            let some = from..(from + SLAB).min(pass.vectors.end);
            let slab = &mut slab[..n * some.len()];
            fill(some, slab);
            pass.pack(slab, from);
        }
        pass.multiply(g);
    }
}

/// The vectors of one pass over `G`.
struct Pass<'a> {
    isa: Isa,
    n: usize,
    form: Form,
    /// Which of all they are.
    vectors: Range<usize>,
    /// `[panel][vector][24]`, zeros below row n.
    packed: &'a mut [f64],
}

impl Pass<'_> {
    /// Packs some vectors, of n numbers each, the first of them vector `from`.
    fn pack(&mut self, some: &[f64], from: usize) {
        let (n, depth) = (self.n, self.vectors.len());
        for (p, at) in (0..n).step_by(TALL).enumerate() {
            let panel = &mut self.packed[(p * depth + from - self.vectors.start) * TALL..];
            for (to, vector) in panel.chunks_exact_mut(TALL).zip(some.chunks_exact(n)) {
                match vector[at..].first_chunk::<TALL>() {
                    Some(rows) => to.copy_from_slice(rows),
                    None => {
                        to[..n - at].copy_from_slice(&vector[at..]);
                        to[n - at..].fill(0.0);
                    }
                }
            }
        }
    }

    /// Adds the product of what is packed.
    fn multiply(&self, g: &mut [f64]) {
        let n = self.n;
        for block in (0..n).step_by(PANELS * TALL) {
            let end = (block + PANELS * TALL).min(n);
            for j in (0..end).step_by(WIDE) {
                // The panel that the diagonal crosses in these columns starts there.
                for i in (block.max(j / TALL * TALL)..end).step_by(TALL) {
                    self.tile(g, i.max(j), j);
                }
            }
        }
    }

    /// Adds the tile from row `i` to the end of its panel, in eight columns from `j` on; `i >= j`.
    fn tile(&self, g: &mut [f64], i: usize, j: usize) {
        let (n, all) = (self.n, &self.vectors);
        let some = match self.form {
            Form::Full => all.clone(),
            Form::Lower => all.start..all.end.min(j + WIDE),
            Form::Upper => all.start.max(i)..all.end,
        };
        if some.is_empty() {
            return;
        }
        let side = |at: usize| {
            let panel = &self.packed[at / TALL * TALL * all.len()..][..TALL * all.len()];
            &panel[(some.start - all.start) * TALL + at % TALL..]
        };
        let (a, b, depth) = (side(i), side(j), some.len());
        let rows = (n.next_multiple_of(WIDE) - i).min(TALL - i % TALL);
        let c = &mut g[j * n + i..];
        if i >= j + WIDE && i + rows <= n {
            return Tile { a, b, depth, rows, c, lead: n }.add(self.isa);
        }
        // On the diagonal and at the lower end, what is not of the half or not of the matrix is dropped.
        let mut sums = [0.0; TALL * WIDE];
        Tile { a, b, depth, rows, c: &mut sums, lead: TALL }.add(self.isa);
        for (s, sums) in sums.chunks_exact(TALL).enumerate().take(n - j) {
            let inside = (j + s).saturating_sub(i)..rows.min(n - i);
            c[s * n..][inside.clone()].iter_mut().zip(&sums[inside]).for_each(|(c, sum)| *c += sum);
        }
    }
}
