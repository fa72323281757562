//! Products of 2-bit weights and 2-bit activations by table look-up.
//!
//! `S[t, o] = sum_k a[t, k] w[o, k]`, exactly, and `y[t, o] = S[t, o] (step_x[t] step_w[o]) + bias[o]`, where `w`
//! is `2 code + 1` on a grid with a half offset and `code` on one without, and `a` is a 2-bit code. Three weights
//! of a row are a byte; a table of a token says what any three weights add (`digits`), and `vpermb` looks up
//! 64 rows at once. AVX2 takes pairs and `vpshufb`, 32 rows at once.
//!
//! The outcome is the same to the byte for any number of threads and any instruction set.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod digits;
mod plan;
#[cfg(test)]
pub(crate) mod tests;

use crate::kernels::packed::isa::Isa;
pub(super) use digits::Edges;
use digits::{own, BIAS, BLOCK};
use plan::Plan;
use std::sync::{Mutex, PoisonError};

/// A cache line of packed weights.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// The grid of 2-bit weights: codes `lo..=lo + 3`, and whether values sit half a step above their code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightGrid {
    /// The lowest code.
    pub lo: i32,
    /// Whether the whole number of a code is `2 code + 1`, rather than `code`.
    pub half: bool,
}

impl WeightGrid {
    /// The whole number of digit 0, and what one digit more adds to it.
    fn line(self) -> (i32, i32) {
        if self.half {
            (2 * self.lo + 1, 2)
        } else {
            (self.lo, 1)
        }
    }
}

/// 2-bit weights `[rows, cols]` in the layout of one instruction set, for activations of one grid.
pub struct TableWeights {
    isa: Isa,
    grid: WeightGrid,
    /// The lowest code of the activations, the highest being three more.
    x_lo: i32,
    rows: usize,
    cols: usize,
    /// Blocks of columns.
    blocks: usize,
    /// Panels of rows (64 for AVX512, 32 for AVX2), each `[blocks, 16 or 12, rows of the panel]` bytes; for plain
    /// Rust the digits, `[rows, cols]`.
    lines: Vec<Line>,
    /// What a row adds to its sums beside the tables, filled up to whole panels.
    offset: Vec<i32>,
}

/// The activations of a product, row-major `[tokens, cols]`.
#[derive(Clone, Copy)]
pub enum Activations<'a> {
    /// Codes; their distance from the lowest is taken modulo 4.
    Codes(&'a [i8]),
    /// Codes as fields, their distance from the lowest, modulo 4; from one token to the next so many bytes.
    Fields(&'a [u8], usize),
    /// Values, whose codes are `clamp(rne((x + shift) / step_x), lo, lo + 3)`, computed as in f32 with a division; a
    /// token with a NaN comes out as NaN. `shift`: `[cols]`.
    Values(&'a [f32], Option<&'a [f32]>),
}

impl Activations<'_> {
    fn len(&self) -> usize {
        match self {
            Activations::Codes(a) => a.len(),
            Activations::Fields(a, _) => a.len(),
            Activations::Values(x, _) => x.len(),
        }
    }

    /// Whether there are so many tokens of so many columns.
    fn hold(&self, tokens: usize, cols: usize) -> bool {
        match self {
            Activations::Fields(a, stride) => {
                let before = tokens.saturating_sub(1).checked_mul(*stride);
                tokens == 0 || before.and_then(|at| at.checked_add(cols)).is_some_and(|end| end <= a.len())
            }
            _ => self.len() == tokens * cols,
        }
    }
}

/// What the sums become.
#[derive(Clone, Copy)]
pub struct Scales<'a> {
    /// Steps of the activations, one for each token or one for all. Positive.
    pub x: &'a [f32],
    /// What the whole number 1 of each row's weights is worth: the step, or half of it on a grid with a half offset.
    pub w: &'a [f32],
    /// Added to each output feature.
    pub bias: Option<&'a [f32]>,
}

/// Where a block of tokens puts its results.
enum Out<'a> {
    Sums(&'a mut [i32]),
    Real(&'a mut [f32]),
}

/// A block of tokens, and the rows to multiply them with.
struct Task<'a> {
    tokens: std::ops::Range<usize>,
    x: Activations<'a>,
    scales: Scales<'a>,
    /// `[tokens, rows]`, only those of the block.
    out: Out<'a>,
}

impl Task<'_> {
    fn step(&self, token: usize) -> f32 {
        self.scales.x[if self.scales.x.len() == 1 { 0 } else { token }]
    }
}

impl std::fmt::Debug for TableWeights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TableWeights")
            .field("rows", &self.rows())
            .field("cols", &self.cols())
            .finish_non_exhaustive()
    }
}

impl TableWeights {
    /// Lays out weights from the canonical packing: the fields `code - lo`, least significant bits first, every row
    /// from a byte on. `x_lo` is the lowest code of the activations: -2 if they are signed, 0 if not.
    pub fn new(grid: WeightGrid, x_lo: i32, rows: usize, cols: usize, codes: &[u8], isa: Isa) -> Self {
        let row_bytes = cols.div_ceil(4);
        assert_eq!(codes.len(), rows * row_bytes, "packed codes of {rows} x {cols}");
        // A set that the processor lacks would be undefined behaviour.
        assert!(Isa::available().contains(&isa), "{isa:?} on this processor");
        let digit = |row: usize, col: usize| match row < rows && col < cols {
            true => codes[row * row_bytes + col / 4] >> (2 * (col % 4)) & 3,
            false => 0,
        };
        let blocks = cols.div_ceil(BLOCK);
        let (bytes, panel) = match isa {
            Isa::Scalar => ((0..rows * cols).map(|at| digit(at / cols, at % cols)).collect(), 1),
            Isa::Avx2 => (avx2::lay_out(rows, blocks, digit), avx2::PANEL),
            Isa::Avx512 => (avx512::lay_out(rows, blocks, digit), avx512::PANEL),
        };
        let (zero, unit) = grid.line();
        let offset = (0..rows.next_multiple_of(panel)).map(|row| {
            let (mut owns, mut sum) = (0, 0);
            for col in 0..cols {
                let i = i32::from(digit(row, col));
                (owns, sum) = (owns + own(i), sum + i);
            }
            unit * (owns + x_lo * sum - BIAS * (blocks * BLOCK) as i32) + zero * x_lo * cols as i32
        });
        TableWeights { isa, grid, x_lo, rows, cols, blocks, lines: lines(bytes), offset: offset.collect() }
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes that the layout takes.
    pub fn bytes(&self) -> usize {
        self.lines.len() * 64
    }

    /// The exact sums `[tokens, rows]`; `step_x` (one for each token, or one) is used for values only.
    pub fn sums(&self, x: Activations, step_x: &[f32], out: &mut [i32]) {
        let scales = Scales { x: step_x, w: &[], bias: None };
        let tokens = self.check(&x, &scales, out.len());
        let plan = self.plan(tokens);
        let mut tasks = Vec::with_capacity(plan.blocks());
        let mut rest = out;
        for tokens in plan.tokens() {
            let (out, behind) = rest.split_at_mut(tokens.len() * self.rows);
            rest = behind;
            tasks.push(Task { tokens, x, scales, out: Out::Sums(out) });
        }
        self.run(tasks);
    }

    /// As [`TableWeights::sums`] of codes, on the thread that asks.
    pub fn sums_here(&self, x: Activations, out: &mut [i32]) {
        assert!(!matches!(x, Activations::Values(..)), "values have steps");
        let scales = Scales { x: &[1.0], w: &[], bias: None };
        let tokens = self.check(&x, &scales, out.len());
        if tokens > 0 {
            self.block(Task { tokens: 0..tokens, x, scales, out: Out::Sums(out) });
        }
    }

    /// `y [tokens, rows]`.
    pub fn product(&self, x: Activations, scales: Scales, y: &mut [f32]) {
        let tokens = self.check(&x, &scales, y.len());
        assert_eq!(scales.w.len(), self.rows, "steps of rows");
        assert!(scales.bias.is_none_or(|b| b.len() == self.rows), "bias of {} rows", self.rows);
        let plan = self.plan(tokens);
        let mut tasks = Vec::with_capacity(plan.blocks());
        let mut rest = y;
        for tokens in plan.tokens() {
            let (out, behind) = rest.split_at_mut(tokens.len() * self.rows);
            rest = behind;
            tasks.push(Task { tokens, x, scales, out: Out::Real(out) });
        }
        self.run(tasks);
    }

    /// The number of tokens, after everything that the kernels rely on is checked.
    fn check(&self, x: &Activations, scales: &Scales, out: usize) -> usize {
        assert!(out.is_multiple_of(self.rows.max(1)), "{out} results of {} rows", self.rows);
        let tokens = out / self.rows.max(1);
        assert!(self.rows == 0 || x.hold(tokens, self.cols), "activations of {tokens} tokens");
        assert!(scales.x.len() == 1 || scales.x.len() == tokens, "steps of {tokens} tokens");
        if let Activations::Values(_, Some(shift)) = x {
            assert_eq!(shift.len(), self.cols, "shifts of columns");
        }
        tokens
    }

    /// Tokens that a tile of the kernel takes.
    fn tile(&self) -> usize {
        match self.isa {
            Isa::Scalar => 8,
            Isa::Avx2 => avx2::TOKENS,
            Isa::Avx512 => avx512::TOKENS,
        }
    }

    fn plan(&self, tokens: usize) -> Plan {
        Plan::new(tokens, self.rows, self.bytes(), self.tile(), rayon::current_num_threads())
    }

    /// The caller takes tasks from the front, and helpers from the back, until none is left: a helper that is slow to
    /// wake leaves its share to the others, a caller outside the pool works too, and from product to product each keeps
    /// about to its part of the results.
    fn run(&self, tasks: Vec<Task>) {
        let helpers = rayon::current_num_threads().min(tasks.len()) - usize::from(!tasks.is_empty());
        let tasks = Mutex::new(tasks.into_iter());
        let take = |which: fn(&mut std::vec::IntoIter<_>) -> Option<_>| {
            which(&mut tasks.lock().unwrap_or_else(PoisonError::into_inner))
        };
        let work = |which| std::iter::from_fn(|| take(which)).for_each(|task| self.block(task));
        match helpers {
            // Not worth waking anyone.
            0 => work(Iterator::next),
            _ => rayon::in_place_scope(|scope| {
                for _ in 0..helpers {
                    scope.spawn(|_| work(DoubleEndedIterator::next_back));
                }
                work(Iterator::next);
            }),
        }
    }

    fn block(&self, mut task: Task) {
        match self.isa {
            Isa::Scalar => self.plain(&mut task),
            // SAFETY: `new` asserted that the processor has the set of `self.isa`; `check` asserted the lengths.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::block(self, &mut task) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512::block(self, &mut task) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("`new` asserted the set"),
        }
    }

    /// The digits of a token into `out` (at least `cols`, what is left untouched), and whether one was NaN.
    #[inline(always)]
    fn digits(&self, x: Activations, token: usize, step: f32, out: &mut [u8]) -> bool {
        let columns = token * self.cols..(token + 1) * self.cols;
        match x {
            Activations::Codes(a) => {
                for (out, &a) in out.iter_mut().zip(&a[columns]) {
                    *out = (i32::from(a) - self.x_lo) as u8 & 3;
                }
                false
            }
            Activations::Fields(a, stride) => {
                for (out, &a) in out.iter_mut().zip(&a[token * stride..token * stride + self.cols]) {
                    *out = a & 3;
                }
                false
            }
            Activations::Values(x, shift) => {
                let [t1, t2, t3] = digits::Edges::new(self.x_lo).thresholds(step);
                let digit = |v: f32| u8::from(v >= t1) + u8::from(v >= t2) + u8::from(v >= t3);
                let mut nan = false;
                match shift {
                    None => {
                        for (out, &v) in out.iter_mut().zip(&x[columns]) {
                            nan |= v.is_nan();
                            *out = digit(v);
                        }
                    }
                    Some(shift) => {
                        for ((out, &v), &b) in out.iter_mut().zip(&x[columns]).zip(shift) {
                            nan |= (v + b).is_nan();
                            *out = digit(v + b);
                        }
                    }
                }
                nan
            }
        }
    }

    /// What a token adds to its sums beside the tables, from the sums of `own` and of its digits.
    #[inline(always)]
    fn token_offset(&self, owns: i32, digits: i32) -> i32 {
        let (zero, unit) = self.grid.line();
        unit * owns + zero * digits
    }

    fn plain(&self, task: &mut Task) {
        let (zero, unit) = self.grid.line();
        let mut digits = vec![0; self.cols];
        let bytes = bytes(&self.lines);
        for (local, token) in task.tokens.clone().enumerate() {
            let step = task.step(token);
            let nan = self.digits(task.x, token, step, &mut digits);
            let step = if nan { f32::NAN } else { step };
            for row in 0..self.rows {
                let weights = &bytes[row * self.cols..(row + 1) * self.cols];
                let sum: i32 = weights
                    .iter()
                    .zip(&digits)
                    .map(|(&i, &j)| (zero + unit * i32::from(i)) * (self.x_lo + i32::from(j)))
                    .sum();
                match &mut task.out {
                    Out::Sums(out) => out[local * self.rows + row] = sum,
                    Out::Real(y) => {
                        let bias = task.scales.bias.map_or(0.0, |b| b[row]);
                        y[local * self.rows + row] = sum as f32 * (step * task.scales.w[row]) + bias;
                    }
                }
            }
        }
    }
}

fn lines(bytes: Vec<u8>) -> Vec<Line> {
    let fill = |chunk: &[u8]| {
        let mut line = Line([0; 64]);
        line.0[..chunk.len()].copy_from_slice(chunk);
        line
    };
    bytes.chunks(64).map(fill).collect()
}

fn bytes(lines: &[Line]) -> &[u8] {
    // SAFETY: a `Line` is 64 bytes without padding, and the slice keeps its borrow.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * 64) }
}
