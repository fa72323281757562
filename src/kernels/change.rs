//! A change of low rank to a frozen weight, on slices: what the ops of `low_rank` compute with.
//!
//! The change is `D^T U`, with D the way down from the inputs to rank r and U the way up to the outputs.
//! It is added onto the rows of W where that costs less than to run it beside them for every token; which of
//! the two depends on shapes alone.

use rayon::prelude::*;

use super::block_sum::{add_tiled, sum_rows, sums};
use super::linear::{add_product, matmul, product, View};
use super::rows::{Panels, Source};

/// Multiply-adds that make a unit of parallel work.
const WORK: usize = 1 << 21;

/// How x comes down to rank r.
#[derive(Clone, Copy)]
pub(super) enum Down<'a> {
    /// Sums of slices of length r.
    Blocks,
    /// A matrix `[r, I]`.
    Matrix(&'a [f32]),
}

/// The change, in the form that the loops take.
pub(super) struct Change<'a> {
    pub o: usize,
    pub i: usize,
    pub r: usize,
    pub down: Down<'a>,
    /// U transposed, `[O, r]`, scale included.
    pub up: Vec<f32>,
}

impl Change<'_> {
    /// Adds the change onto the rows of W from `first` on.
    fn add_onto(&self, first: usize, rows: &mut [f32]) {
        let (i, r, count) = (self.i, self.r, rows.len() / self.i);
        let up = &self.up[first * r..(first + count) * r];
        match self.down {
            Down::Blocks => add_tiled(up, r, rows, i),
            Down::Matrix(a) => add_product((count, i, r), rows, i, View::rows(up, r), View::rows(a, i)),
        }
    }

    /// Whether making W' costs less than the branch at so many tokens.
    fn merges(&self, tokens: usize) -> bool {
        self.o * self.i <= tokens * (self.o + self.i)
    }

    /// Tokens that one task takes through the branch.
    fn step(&self) -> usize {
        (WORK / (self.r * (self.o + self.i))).clamp(64, 4096)
    }

    /// `D(x)`, `[tokens, r]`.
    pub fn down(&self, x: &[f32]) -> Vec<f32> {
        let tokens = x.len() / self.i;
        match self.down {
            Down::Blocks => sums(x, self.i, self.r),
            Down::Matrix(a) => {
                matmul((tokens, self.r, self.i), View::rows(x, self.i), View::rows(a, self.i).t(), None)
            }
        }
    }

    /// `dy U^T`, `[tokens, r]`.
    pub fn up_back(&self, g: &[f32]) -> Vec<f32> {
        let tokens = g.len() / self.o;
        matmul((tokens, self.r, self.o), View::rows(g, self.o), View::rows(&self.up, self.r), None)
    }

    /// `x W'^T`, `[tokens, O]`.
    pub fn forward(&self, source: Source, x: &[f32]) -> Vec<f32> {
        let (o, i, r) = (self.o, self.i, self.r);
        if self.merges(x.len() / i) {
            let edit = |first: usize, rows: &mut [f32]| self.add_onto(first, rows);
            return Panels::edited_freely(source, (o, i), &edit).product(x);
        }
        let mut y = Panels::plain(source, (o, i)).product(x);
        let step = self.step();
        y.par_chunks_mut(step * o).zip(x.par_chunks(step * i)).for_each(|(y, x)| {
            let tokens = y.len() / o;
            let mut h = vec![0f32; tokens * r];
            match self.down {
                Down::Blocks => sum_rows(x, i, r, &mut h),
                Down::Matrix(a) => {
                    product((tokens, r, i), &mut h, r, View::rows(x, i), View::rows(a, i).t(), 1.0);
                }
            }
            add_product((tokens, o, r), y, o, View::rows(&h, r), View::rows(&self.up, r).t());
        });
        y
    }

    /// `g W'`, `[tokens, I]`.
    pub fn input_gradient(&self, source: Source, g: &[f32]) -> Vec<f32> {
        let (o, i, r) = (self.o, self.i, self.r);
        if self.merges(g.len() / o) {
            let edit = |first: usize, rows: &mut [f32]| self.add_onto(first, rows);
            return Panels::edited_freely(source, (o, i), &edit).product_back(g);
        }
        let mut dx = Panels::plain(source, (o, i)).product_back(g);
        let step = self.step();
        dx.par_chunks_mut(step * i).zip(g.par_chunks(step * o)).for_each(|(dx, g)| {
            let tokens = dx.len() / i;
            let mut h = vec![0f32; tokens * r];
            product((tokens, r, o), &mut h, r, View::rows(g, o), View::rows(&self.up, r), 1.0);
            match self.down {
                Down::Blocks => add_tiled(&h, r, dx, i),
                Down::Matrix(a) => add_product((tokens, i, r), dx, i, View::rows(&h, r), View::rows(a, i)),
            }
        });
        dx
    }
}
