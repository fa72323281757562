//! Products of codes with codes: exact integer sums, scaled once at the end.
//!
//! ```text
//! S[t, o] = Σ_k a[t, k] w[o, k]            whole[t, o] = S, or 2 S + Σ_k a[t, k] where values sit half a step up
//! y[t, o] = (step[t] unit[o]) whole[t, o] + bias[o]
//! ```
//!
//! `a` are activation codes, kept as bytes from their lowest code on ([`super::Codes`]); `w` is a packed weight
//! `[out, in]`, or activation codes that take its place: keys, and values across.

use super::codes::CodesRef;
use super::edges::per_isa;
use super::isa::Isa;
#[cfg(target_arch = "x86_64")]
use super::panels::Panels;
use super::rows::PackedRows;
use super::table::{Activations, TableWeights};
use std::sync::Arc;

/// Codes of a matrix where they lie: element `(r, c)` is the field at `r * rs + c * cs`.
#[derive(Clone, Copy, Debug)]
pub struct Elements<'a> {
    /// The fields, codes from `lo` on.
    pub fields: &'a [u8],
    /// From one row to the next.
    pub rs: usize,
    /// From one column to the next.
    pub cs: usize,
    /// The lowest code.
    pub lo: i32,
}

/// Rows are filled up to a multiple of this, in the sums too.
pub(super) const ROWS: usize = 16;

/// How the codes lie.
#[derive(Clone, Debug)]
enum Layout {
    /// `[rows, cols]`.
    Rows(Vec<i8>),
    /// For activations of 2 bits.
    Table(Arc<TableWeights>),
    #[cfg(target_arch = "x86_64")]
    Panels(Panels),
}

/// A matrix of codes `[out, in]`, prepared as the right operand of integer products: a byte a code.
#[derive(Clone, Debug)]
pub struct CodeMatrix {
    rows: usize,
    cols: usize,
    layout: Layout,
    /// The sum of each row's codes, filled up.
    sums: Vec<i32>,
    /// What one of the whole numbers of each row is worth; empty: the caller knows.
    unit: Vec<f32>,
    half: bool,
    isa: Isa,
}

impl CodeMatrix {
    /// Of a packed weight, for activations whose codes are `left`; none where a row has several steps, a code does not
    /// fit a signed byte, or sums with activations of 8 bits could leave the range of an i32.
    pub fn packed(weight: &PackedRows, left: (i32, i32), isa: Isa) -> Option<Self> {
        let (rows, cols, lo) = (weight.rows(), weight.cols, weight.levels.lo);
        let fits = i8::try_from(lo).is_ok() && i8::try_from(weight.levels.hi).is_ok();
        // Twice over: the whole numbers of a half offset, and what fields count from.
        let most = weight.largest_whole().saturating_mul(2 * 255).saturating_mul(cols as i64);
        if weight.groups().group().is_some() || !fits || most > i64::from(i32::MAX) || rows * cols == 0 {
            return None;
        }
        let unit = weight.step.iter().map(|step| step * weight.unit()).collect();
        // A byte looks up three columns: the last block of 48 should be worth it, and rows fill whole vectors.
        let filled = cols.next_multiple_of(48) * 8 <= cols * 9 && rows.is_multiple_of(ROWS);
        if let Some(table) = filled.then(|| weight.table(left, isa.usable())).flatten() {
            let (layout, sums) = (Layout::Table(Arc::new(table)), vec![0; rows]);
            return Some(CodeMatrix { rows, cols, layout, sums, unit, half: false, isa: isa.usable() });
        }
        let mut fields = vec![0u8; rows * cols];
        let mut row = vec![0f32; cols];
        for (r, fields) in fields.chunks_exact_mut(cols).enumerate() {
            weight.codes_of(r, &mut row);
            fields.iter_mut().zip(&row).for_each(|(field, &code)| *field = (code - lo as f32) as u8);
        }
        let mut half = weight.levels.half;
        let mut lo = lo;
        if half && 2 * weight.levels.hi < 127 && -2 * lo <= 128 {
            // The whole numbers themselves.
            fields.iter_mut().for_each(|u| *u *= 2);
            (half, lo) = (false, 2 * lo + 1);
        }
        let of = Elements { fields: &fields, rs: cols, cs: 1, lo };
        Some(CodeMatrix { unit, half, ..CodeMatrix::of_codes(rows, cols, of, isa) })
    }

    /// Of activation codes, each row's step left to the caller. The codes must fit a signed byte.
    pub fn of_codes(rows: usize, cols: usize, of: Elements<'_>, isa: Isa) -> Self {
        let last = (rows.max(1) - 1) * of.rs + (cols.max(1) - 1) * of.cs;
        assert!(
            rows * cols == 0 || last < of.fields.len(),
            "codes: a matrix of {rows} x {cols} does not fit"
        );
        let isa = isa.usable();
        let (layout, sums) = lay_out(isa, rows, cols, of);
        CodeMatrix { rows, cols, layout, sums, unit: Vec::new(), half: false, isa }
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// From one token's sums to the next one's: the rows, filled up.
    pub fn stride(&self) -> usize {
        self.sums.len()
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// What one of the whole numbers of each row is worth: its step, or half of it on a grid without a zero.
    pub fn unit(&self) -> &[f32] {
        &self.unit
    }

    /// The whole numbers of every token and row, `[tokens, stride]`, exact. A row of codes is read to the next
    /// multiple of four columns, so that the last needs as many bytes behind it.
    pub fn sums(&self, codes: CodesRef<'_>, out: &mut [i32]) {
        assert_eq!(codes.cols, self.cols, "codes: input features");
        assert_eq!(out.len(), codes.tokens * self.stride(), "codes: room for the sums");
        assert!(codes.fits() && (!self.half || codes.sums.len() == codes.tokens), "codes: a short buffer");
        match &self.layout {
            Layout::Table(w) => w.sums_here(Activations::Fields(codes.fields, codes.stride), out),
            Layout::Rows(w) => dots(self.isa, codes, w, &self.sums, self.half, out),
            // SAFETY: panels are made only where `usable` gave Avx512, which it does where all that is enabled there
            // was detected.
            #[cfg(target_arch = "x86_64")]
            Layout::Panels(w) => unsafe { w.product(codes, &self.sums, self.half, out) },
        }
    }

    /// `out[t, o] = (x_step[t mod len] unit[o]) whole[t, o] + bias[o]`, `[tokens, rows]`, of a packed weight.
    pub fn times(&self, codes: CodesRef<'_>, x_step: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
        assert!(self.unit.len() == self.rows && !x_step.is_empty(), "codes: a product without steps");
        let mut sums = vec![0i32; codes.tokens * self.stride()];
        self.sums(codes, &mut sums);
        let sums = sums.chunks_exact(self.stride());
        for (t, (out, sums)) in out.chunks_exact_mut(self.rows).zip(sums).enumerate() {
            let step = x_step[t % x_step.len()];
            for ((y, &sum), &unit) in out.iter_mut().zip(sums).zip(&self.unit) {
                *y = sum as f32 * (step * unit);
            }
            if let Some(bias) = bias {
                out.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        }
    }
}

fn lay_out(isa: Isa, rows: usize, cols: usize, of: Elements<'_>) -> (Layout, Vec<i32>) {
    #[cfg(target_arch = "x86_64")]
    if isa.usable() == Isa::Avx512 {
        // SAFETY: `usable` gives Avx512 only where all that is enabled there was detected.
        let (panels, sums) = unsafe { Panels::new(rows, cols, of) };
        return (Layout::Panels(panels), sums);
    }
    let (lo, mut codes) = (of.lo as u8, vec![0i8; rows * cols]);
    let mut sums = vec![0i32; rows.next_multiple_of(ROWS)];
    for ((r, codes), sum) in codes.chunks_exact_mut(cols.max(1)).enumerate().zip(&mut sums) {
        for (c, code) in codes.iter_mut().enumerate() {
            *code = of.fields[r * of.rs + c * of.cs].wrapping_add(lo) as i8;
            *sum += i32::from(*code);
        }
    }
    (Layout::Rows(codes), sums)
}

per_isa! {
    /// `out[t, o] = Σ_k (a[t, k] + lo) w[o, k]`, or twice that and the token's sum where `half`.
    fn dots(a: CodesRef<'_>, w: &[i8], sums: &[i32], half: bool, out: &mut [i32]) {
        for (t, out) in out.chunks_exact_mut(sums.len().max(1)).enumerate() {
            let fields = a.row(t);
            for ((out, w), &sum) in out.iter_mut().zip(w.chunks_exact(fields.len().max(1))).zip(sums) {
                let dot: i32 = fields.iter().zip(w).map(|(&a, &w)| i32::from(a) * i32::from(w)).sum();
                let dot = dot + sum * a.lo;
                *out = if half { 2 * dot + a.sums[t] } else { dot };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::codes::Codes;
    use super::super::rows::tests::{grids, random_rows};
    use super::*;
    use crate::kernels::Levels;
    use crate::random::Random;

    /// Random codes of a grid, and as plain numbers.
    pub(crate) fn random_codes(levels: Levels, tokens: usize, cols: usize) -> (Codes, Vec<i64>) {
        let mut random = Random::new(3, "codes", &[tokens as u64, cols as u64]);
        let span = (levels.hi - levels.lo + 1) as u32;
        let mut codes = Codes::default();
        codes.reset(tokens, cols, levels.lo);
        let mut plain = Vec::new();
        for t in 0..tokens {
            let (fields, sum) = codes.row_mut(t, 0..cols);
            for field in fields {
                *field = random.below(span) as u8;
                let code = i32::from(*field) + levels.lo;
                *sum += code;
                plain.push(i64::from(code));
            }
        }
        (codes, plain)
    }

    /// Codes of activations that need a byte.
    const EIGHT: (i32, i32) = (0, 255);

    #[test]
    fn tables_give_the_same_sums() {
        for isa in Isa::available() {
            for (tokens, cols, rows) in [(1, 48, 16), (3, 144, 32), (5, 190, 64), (7, 768, 208)] {
                for (levels, bits) in grids().filter(|grid| grid.1 == 2) {
                    for grid in [Levels::signed(2), Levels::unsigned(2)] {
                        let (weight, _) = random_rows((levels, bits), rows, cols, None);
                        let (codes, _) = random_codes(grid, tokens, cols);
                        let both = [(grid.lo, grid.hi), EIGHT].map(|left| {
                            let matrix = CodeMatrix::packed(&weight, left, isa).unwrap();
                            let table = matches!(matrix.layout, Layout::Table(_));
                            assert_eq!(table, left != EIGHT, "{tokens}x{cols}x{rows}");
                            let mut out = vec![0i32; tokens * matrix.stride()];
                            matrix.sums(codes.view(), &mut out);
                            out
                        });
                        assert_eq!(both[0], both[1], "{isa:?} {tokens}x{cols}x{rows}");
                    }
                }
            }
        }
    }

    const SHAPES: [(usize, usize, usize); 7] =
        [(1, 1, 1), (3, 5, 3), (2, 65, 7), (5, 3, 130), (7, 130, 197), (25, 70, 64), (49, 66, 197)];

    #[test]
    fn sums_are_exact_on_every_instruction_set() {
        for isa in Isa::available() {
            for (tokens, rows, cols) in SHAPES {
                for (levels, bits) in grids() {
                    let (weight, w) = random_rows((levels, bits), rows, cols, None);
                    let Some(matrix) = CodeMatrix::packed(&weight, EIGHT, isa) else {
                        assert_eq!(levels, Levels::unsigned(8));
                        continue;
                    };
                    for grid in
                        [Levels::signed(2), Levels::unsigned(3), Levels::signed(8), Levels::unsigned(8)]
                    {
                        let (codes, a) = random_codes(grid, tokens, cols);
                        let mut out = vec![0i32; tokens * matrix.stride()];
                        matrix.sums(codes.view(), &mut out);
                        for i in 0..tokens * rows {
                            let (t, o) = (i / rows, i % rows);
                            let got = out[t * matrix.stride() + o];
                            let whole = |k: i64| if levels.half { 2 * k + 1 } else { k };
                            let want: i64 = (0..cols).map(|k| a[t * cols + k] * whole(w[o * cols + k])).sum();
                            assert_eq!(
                                i64::from(got),
                                want,
                                "{isa:?} W{bits} {tokens}x{cols}x{rows} at {t}, {o}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn activations_take_the_weights_place_either_way_round() {
        for isa in Isa::available() {
            for (tokens, rows, cols) in SHAPES {
                let (left, a) = random_codes(Levels::unsigned(4), tokens, cols);
                for grid in [Levels::signed(2), Levels::signed(8), Levels::unsigned(7)] {
                    let (right, b) = random_codes(grid, rows, cols);
                    let (across, c) = random_codes(grid, cols, rows);
                    let (fields, lo) = (right.view().fields, grid.lo);
                    let matrix = CodeMatrix::of_codes(
                        rows,
                        cols,
                        Elements { fields, rs: right.view().stride, cs: 1, lo },
                        isa,
                    );
                    let fields = across.view().fields;
                    let turned = CodeMatrix::of_codes(
                        rows,
                        cols,
                        Elements { fields, rs: 1, cs: across.view().stride, lo },
                        isa,
                    );
                    let check = |matrix: &CodeMatrix, at: &dyn Fn(usize, usize) -> i64| {
                        let mut out = vec![0i32; tokens * matrix.stride()];
                        matrix.sums(left.view(), &mut out);
                        for i in 0..tokens * rows {
                            let (t, o) = (i / rows, i % rows);
                            let got = out[t * matrix.stride() + o];
                            let want: i64 = (0..cols).map(|k| a[t * cols + k] * at(o, k)).sum();
                            assert_eq!(i64::from(got), want, "{isa:?} {tokens}x{cols}x{rows} at {t}, {o}");
                        }
                    };
                    check(&matrix, &|o, k| b[o * cols + k]);
                    check(&turned, &|o, k| c[k * rows + o]);
                }
            }
        }
    }

    #[test]
    fn steps_and_biases_come_last() {
        let (weight, w) = random_rows((Levels::mid_rise(2), 2), 3, 5, None);
        let (codes, a) = random_codes(Levels::signed(3), 4, 5);
        let matrix = CodeMatrix::packed(&weight, EIGHT, Isa::best()).unwrap();
        let (step, bias) = ([0.5f32, 0.25], [1f32, -2.0, 3.0]);
        let mut out = vec![0f32; 12];
        matrix.times(codes.view(), &step, Some(&bias), &mut out);
        for (i, &y) in out.iter().enumerate() {
            let (t, o) = (i / 3, i % 3);
            let sum: i64 = (0..5).map(|k| a[t * 5 + k] * (2 * w[o * 5 + k] + 1)).sum();
            assert_eq!(y, sum as f32 * (step[t % 2] * (weight.step[o] * 0.5)) + bias[o]);
        }
        let (grouped, _) = random_rows((Levels::mid_rise(2), 2), 3, 5, Some(2));
        assert!(CodeMatrix::packed(&grouped, EIGHT, Isa::best()).is_none());
    }
}
