//! The blocked product on one thread: blocks of k, and within one the register tiles.
//!
//! A block of k is at most [`DEPTH`] words, so that a panel of b stays in L1 or nearly, and a block
//! of rows of a in L2. The blocks depend on k alone, and so does the value of every element:
//! neither the place of a tile nor the number of threads is seen in it.

use super::kernel::{self, Base, Road, Tile};
use super::pack::{self, Element, Source, Word};
use super::View;
use std::cell::RefCell;
use std::ops::Range;

/// Words of a block of k.
const DEPTH: usize = 400;
/// Rows of a that a block of packed a holds, and columns of b (a multiple of every panel).
const ROWS: usize = 256;
const COLUMNS: usize = 192;

/// Elements from one row of b to the next up to which b is read where it lies.
const NEAR: usize = 4096;

/// Buffer space in whole cache lines, so that a vector load never crosses one.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code)] [u32; 16]); // Read as words, through a pointer.

/// A buffer of words that grows and is kept.
#[derive(Default)]
pub(super) struct Buffer(Vec<Line>);

impl Buffer {
    /// `words` words; what they hold is left over from earlier use.
    pub fn words(&mut self, words: usize) -> &mut [u32] {
        let lines = words.div_ceil(16);
        if self.0.len() < lines {
            self.0.resize(lines, Line([0; 16]));
        }
        // SAFETY: a `Line` is 16 words without padding, and `lines` of them are initialised.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast::<u32>(), words) }
    }
}

thread_local! {
    static BUFFERS: RefCell<[Buffer; 2]> = RefCell::default();
}

/// How a product is computed on this machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct How {
    pub road: Road,
    pub word: Word,
}

impl How {
    pub fn depth(self) -> usize {
        self.word.depth()
    }

    /// The blocks of `k`, in elements.
    pub fn blocks(self, k: usize) -> impl Iterator<Item = Range<usize>> {
        let words = k.div_ceil(self.depth());
        let step = words.div_ceil(words.div_ceil(DEPTH).max(1)) * self.depth();
        (0..k).step_by(step.max(1)).map(move |from| from..(from + step).min(k))
    }

    /// Lanes a packed operand of `lanes` rows or columns takes.
    pub fn padded(self, lanes: usize) -> usize {
        lanes.next_multiple_of(self.road.lanes())
    }
}

/// How the left operand is read.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Left {
    /// Where it lies.
    Direct,
    /// Packed, each row's words one after the other.
    Lines,
    /// Packed in panels of LANES rows.
    Panels,
}

impl Left {
    /// For a product of `n` columns. Broadcast loads take any stride, so a is packed only where it
    /// must be converted, or where k runs across memory and enough columns pay for the copy.
    pub fn choose<T: Element>(how: How, a: View<T>, n: usize) -> Self {
        if how.word != Word::Plain || !T::PLAIN {
            if a.cs == 1 {
                Left::Lines
            } else {
                Left::Panels
            }
        } else if a.cs == 1 || n <= 2 * how.road.vectors() * how.road.lanes() {
            Left::Direct
        } else {
            Left::Panels
        }
    }

    /// Words of `rows` rows by `words` words.
    fn size(self, how: How, rows: usize, words: usize) -> usize {
        match self {
            Left::Direct => 0,
            Left::Lines => rows * words,
            Left::Panels => how.padded(rows) * words,
        }
    }
}

/// Packs rows of a by the block `k` of its columns, as `left` says.
pub(super) fn pack_left<T: Element>(
    how: How,
    left: Left,
    dst: &mut [u32],
    a: View<T>,
    rows: Range<usize>,
    k: Range<usize>,
) {
    let src = Source::rows(a).from(k.start, rows.start);
    let words = k.len().div_ceil(how.depth());
    match left {
        Left::Direct => {}
        Left::Lines => pack::lines(how.word, dst, src, rows.len(), k.len()),
        Left::Panels => {
            let lanes = how.road.lanes();
            let widths = [lanes; ROWS / 8];
            for (i, dst) in dst.chunks_mut(ROWS * words).enumerate() {
                let from = i * ROWS;
                let count = ROWS.min(rows.len() - from);
                let widths = &widths[..count.div_ceil(lanes)];
                pack::panels(how.word, dst, widths, src.from(0, from), count, k.len());
            }
        }
    }
}

/// The panels of `n` columns: first column, vectors.
pub(super) fn panels(how: How, n: usize) -> impl Iterator<Item = (usize, usize)> {
    let lanes = how.road.lanes();
    let vectors = n.div_ceil(lanes);
    let mut at = 0;
    std::iter::from_fn(move || {
        // A lone vector at the end would waste loads: 4 are 2 and 2.
        let width = match vectors - at {
            0 => return None,
            4 => 2,
            left => left.min(how.road.vectors()),
        };
        at += width;
        Some(((at - width) * lanes, width))
    })
}

/// Packs columns of b by the block `k` of its rows: `padded(columns)` by words.
pub(super) fn pack_right<U: Element>(
    how: How,
    dst: &mut [u32],
    b: View<U>,
    columns: Range<usize>,
    k: Range<usize>,
) {
    let src = Source::columns(b).from(k.start, columns.start);
    let words = k.len().div_ceil(how.depth());
    let mut widths = [0; 16];
    let (mut first, mut count) = (0, 0);
    // As many panels at a time as there is room for.
    for (j, vectors) in panels(how, columns.len()) {
        widths[count] = vectors * how.road.lanes();
        let end = j + widths[count];
        count += 1;
        if count == widths.len() || end >= columns.len() {
            let lanes = end.min(columns.len()) - first;
            let dst = &mut dst[first * words..end * words];
            pack::panels(how.word, dst, &widths[..count], src.from(0, first), lanes, k.len());
            (first, count) = (end, 0);
        }
    }
}

/// Where an operand comes from.
#[derive(Clone, Copy)]
pub(super) enum Packed<'a> {
    /// It is packed here, block by block.
    Here,
    /// All blocks of k, packed before: a block that begins at word w lies at w times the padded
    /// lanes (w times the rows, for lines).
    Before(&'a [u32]),
}

/// One thread's part of a product.
#[derive(Clone, Copy)]
pub(super) struct Job<'a, T, U> {
    pub how: How,
    pub left: Left,
    pub a: View<'a, T>,
    pub b: View<'a, U>,
    pub k: usize,
    pub rows: (usize, usize),
    pub columns: (usize, usize),
    /// Of all rows of the product, if packed before.
    pub a_packed: Packed<'a>,
    pub m: usize,
    /// Of these columns, if packed before.
    pub b_packed: Packed<'a>,
    pub scale: f32,
}

impl<T: Element, U: Element> Job<'_, T, U> {
    /// Computes rows by columns of the result, whose first element is at `c`.
    ///
    /// # Safety
    /// `c + i * stride + j` is valid for writes for every i and j of this job (and initialised, if
    /// the base is the result), and not accessed by another thread meanwhile; a bias or a matrix, which starts
    /// at this job's first element, reaches over its columns (and rows, as far apart as those of c); a and b hold every row and column of
    /// the job over all of k.
    pub unsafe fn run(&self, c: *mut f32, stride: usize, base: Base) {
        BUFFERS.with_borrow_mut(|[abuf, bbuf]| {
            let (from, to) = self.columns;
            let strip = if matches!(self.b_packed, Packed::Here) { COLUMNS } else { to - from };
            for j in (from..to).step_by(strip.max(1)) {
                let columns = j..(j + strip).min(to);
                // SAFETY: the caller's contract: the base reaches over the columns.
                let base = unsafe { base.on(0, j - from) };
                // SAFETY: the caller's contract, for a part of its columns.
                unsafe { self.strip(columns, c.add(j - from), stride, base, abuf, bbuf) }
            }
        });
    }

    /// Whether b is read where it lies: its rows in whole vectors, near enough to each other that a block of them is
    /// as good as packed.
    fn reads_right(&self, columns: usize) -> bool {
        let plain = self.how.word == Word::Plain && U::PLAIN && self.b.cs == 1;
        let here = matches!(self.b_packed, Packed::Here);
        plain && here && self.b.rs <= NEAR && columns.is_multiple_of(self.how.road.lanes())
    }

    /// # Safety
    /// As for `run`, of these columns.
    unsafe fn strip(
        &self,
        columns: Range<usize>,
        c: *mut f32,
        stride: usize,
        base: Base,
        abuf: &mut Buffer,
        bbuf: &mut Buffer,
    ) {
        let how = self.how;
        let width = how.padded(columns.len());
        let direct = self.reads_right(columns.len());
        for k in how.blocks(self.k) {
            let (at, words) = (k.start / how.depth(), k.len().div_ceil(how.depth()));
            let b: &[u32] = match self.b_packed {
                Packed::Here if direct => &[],
                Packed::Here => {
                    let dst = bbuf.words(width * words);
                    pack_right(how, dst, self.b, columns.clone(), k.clone());
                    dst
                }
                Packed::Before(all) => &all[at * width..(at + words) * width],
            };
            let base = if k.start == 0 { base } else { Base::Result };
            for i in (self.rows.0..self.rows.1).step_by(ROWS) {
                let rows = i..(i + ROWS).min(self.rows.1);
                // The words of row `first` on are `a`.
                let (a, first): (*const u32, usize) = match (self.left, self.a_packed) {
                    (Left::Direct, _) => {
                        // A product of plain words: `choose` saw that T is f32.
                        let from = &self.a.data[rows.start * self.a.rs + k.start * self.a.cs..];
                        (from.as_ptr().cast(), rows.start)
                    }
                    (left, Packed::Here) => {
                        let dst = abuf.words(left.size(how, rows.len(), words));
                        pack_left(how, left, dst, self.a, rows.clone(), k.clone());
                        (dst.as_ptr(), rows.start)
                    }
                    (left, Packed::Before(all)) => {
                        let block = left.size(how, self.m, 1) * at;
                        (all[block..block + left.size(how, self.m, words)].as_ptr(), 0)
                    }
                };
                for (j, vectors) in panels(how, columns.len()) {
                    let lanes = how.road.lanes();
                    let last = (columns.len() - j - (vectors - 1) * lanes).min(lanes);
                    let (b, b_k) = match direct {
                        true => {
                            // A product of plain words: `reads_right` saw that U is f32.
                            let from = &self.b.data[k.start * self.b.rs + columns.start + j..];
                            (from.as_ptr().cast(), self.b.rs)
                        }
                        false => {
                            let panel = &b[j * words..(j + vectors * lanes) * words];
                            (panel.as_ptr(), vectors * lanes)
                        }
                    };
                    for r in rows.clone().step_by(how.road.rows()) {
                        let i = r - first;
                        let (offset, a_row, a_k) = match self.left {
                            Left::Direct => (i * self.a.rs, self.a.rs, self.a.cs),
                            Left::Lines => (i * words, words, 1),
                            Left::Panels => (i / lanes * lanes * words + i % lanes, 1, lanes),
                        };
                        let tile = Tile {
                            a: a.wrapping_add(offset),
                            a_row,
                            a_k,
                            b,
                            b_k,
                            words,
                            c: c.wrapping_add((r - self.rows.0) * stride + j),
                            stride,
                            last,
                            scale: self.scale,
                            // SAFETY: the caller's contract: the base reaches over rows and columns.
                            base: unsafe { base.on((r - self.rows.0) * stride, j) },
                        };
                        // SAFETY: `How` is only made for a road that is there; b's slice was just
                        // checked to hold the panel, or b holds whole vectors of the rows and columns by the caller's
                        // contract; a holds the rows and words by the caller's
                        // contract, or packed by `pack_left` (blocks of rows and panels begin at
                        // multiples of the tile's rows, so a tile lies within a panel); c by the
                        // caller's contract.
                        unsafe { kernel::run(how.road, how.road.rows().min(rows.end - r), vectors, &tile) }
                    }
                }
            }
        }
    }
}
