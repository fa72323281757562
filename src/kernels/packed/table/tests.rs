//! Against sums in plain integers, on every instruction set of this machine.

use super::*;

pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn digit(&mut self) -> u8 {
        (self.next() >> 40) as u8 & 3
    }

    fn real(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

const GRIDS: [WeightGrid; 3] = [
    WeightGrid { lo: -2, half: true },
    WeightGrid { lo: -2, half: false },
    WeightGrid { lo: 0, half: false },
];

fn packed(digits: &[u8], cols: usize) -> Vec<u8> {
    let row = |row: &[u8]| -> Vec<u8> {
        row.chunks(4).map(|four| four.iter().rev().fold(0, |byte, d| byte << 2 | d)).collect()
    };
    digits.chunks(cols).flat_map(row).collect()
}

/// The sums in i64, from the codes.
fn oracle(grid: WeightGrid, digits: &[u8], a: &[i8], cols: usize) -> Vec<i32> {
    let whole = |d: u8| {
        let code = i64::from(grid.lo) + i64::from(d);
        if grid.half {
            2 * code + 1
        } else {
            code
        }
    };
    let of = |a: &[i8], w: &[u8]| a.iter().zip(w).map(|(&a, &w)| i64::from(a) * whole(w)).sum::<i64>() as i32;
    a.chunks(cols).flat_map(|a| digits.chunks(cols).map(move |w| of(a, w))).collect()
}

/// (tokens, rows, cols)
const SHAPES: [(usize, usize, usize); 14] = [
    (1, 1, 1),
    (3, 3, 3),
    (1, 65, 130),
    (5, 64, 48),
    (7, 130, 197),
    (13, 197, 65),
    (6, 192, 96),
    (4, 129, 49),
    (29, 63, 47),
    (2, 31, 144),
    (50, 257, 100),
    (197, 33, 16),
    (1, 16, 1000),
    (25, 200, 33),
];

#[test]
fn sums_are_exact_on_every_set() {
    for (tokens, rows, cols) in SHAPES {
        for (grid, x_lo) in GRIDS.into_iter().flat_map(|g| [(g, -2), (g, 0)]) {
            let mut random = Random((tokens * rows * cols) as u64);
            let digits: Vec<u8> = (0..rows * cols).map(|_| random.digit()).collect();
            let a: Vec<i8> = (0..tokens * cols).map(|_| random.digit() as i8 + x_lo as i8).collect();
            let want = oracle(grid, &digits, &a, cols);
            for isa in Isa::available() {
                let w = TableWeights::new(grid, x_lo, rows, cols, &packed(&digits, cols), isa);
                let mut sums = vec![0; tokens * rows];
                w.sums(Activations::Codes(&a), &[1.0], &mut sums);
                assert!(sums == want, "{isa:?} {grid:?} {x_lo} {tokens}x{rows}x{cols}");
            }
        }
    }
}

#[test]
fn extremes_do_not_overflow() {
    // 14000 columns take more than 16 bits; every table at its largest and at its least.
    for (rows, cols) in [(70, 14_000), (200, 13_104), (70, 480)] {
        for (wd, xd) in [(0, 0), (3, 3), (0, 3), (3, 0), (1, 1), (2, 1)] {
            let (grid, x_lo) = (GRIDS[0], -2);
            let digits = vec![wd; rows * cols];
            let a = vec![xd as i8 + x_lo as i8; 7 * cols];
            let want = oracle(grid, &digits, &a, cols);
            for isa in Isa::available() {
                let w = TableWeights::new(grid, x_lo, rows, cols, &packed(&digits, cols), isa);
                let mut sums = vec![0; 7 * rows];
                w.sums(Activations::Codes(&a), &[1.0], &mut sums);
                assert!(sums == want, "{isa:?} {rows}x{cols} digits {wd} and {xd}");
            }
        }
    }
}

#[test]
fn results_are_the_same_to_the_bit() {
    for (tokens, rows, cols) in SHAPES {
        for (case, (grid, x_lo)) in GRIDS.into_iter().flat_map(|g| [(g, -2), (g, 0)]).enumerate() {
            let mut random = Random((tokens + rows * cols) as u64);
            let digits: Vec<u8> = (0..rows * cols).map(|_| random.digit()).collect();
            let mut x: Vec<f32> = (0..tokens * cols).map(|_| random.real() * 2.0).collect();
            let step: Vec<f32> =
                (0..if case % 2 == 0 { tokens } else { 1 }).map(|_| 0.4 + 0.2 * random.real()).collect();
            for (at, x) in x.iter_mut().enumerate().step_by(3) {
                // On the edges between codes, and beside them.
                let step = step[if step.len() == 1 { 0 } else { at / cols }];
                let edge = step * ((at % 5) as f32 - 2.5);
                *x = [edge, edge.next_up(), edge.next_down()][at / 3 % 3];
            }
            if case == 0 {
                x[tokens * cols / 2] = f32::NAN;
                x[0] = f32::INFINITY;
            }
            let shift: Vec<f32> = (0..cols).map(|_| random.real() * 0.1).collect();
            let shift = (case % 3 == 1).then_some(&shift[..]);
            let w: Vec<f32> = (0..rows).map(|_| random.real()).collect();
            let bias: Vec<f32> = (0..rows).map(|_| random.real()).collect();
            let bias = (case % 3 != 2).then_some(&bias[..]);
            let (mut a, mut bad) = (vec![0; tokens * cols], vec![false; tokens]);
            for (at, (a, &x)) in a.iter_mut().zip(&x).enumerate() {
                let v = x + shift.map_or(0.0, |s| s[at % cols]);
                let q = v / step[if step.len() == 1 { 0 } else { at / cols }];
                bad[at / cols] |= q.is_nan();
                *a = q.clamp(x_lo as f32, x_lo as f32 + 3.0).round_ties_even() as i8;
            }
            let want: Vec<f32> = oracle(grid, &digits, &a, cols)
                .into_iter()
                .enumerate()
                .map(|(at, sum)| {
                    let (token, row) = (at / rows, at % rows);
                    let x = if bad[token] { f32::NAN } else { step[if step.len() == 1 { 0 } else { token }] };
                    sum as f32 * (x * w[row]) + bias.map_or(0.0, |b| b[row])
                })
                .collect();
            let scales = Scales { x: &step, w: &w, bias };
            let same = |a: &[f32], b: &[f32]| {
                a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()))
            };
            for isa in Isa::available() {
                let table = TableWeights::new(grid, x_lo, rows, cols, &packed(&digits, cols), isa);
                let mut y = vec![0.0; tokens * rows];
                table.product(Activations::Values(&x, shift), scales, &mut y);
                assert!(same(&y, &want), "{isa:?} case {case} {tokens}x{rows}x{cols}");
                if case != 0 {
                    let mut of_codes = vec![0.0; tokens * rows];
                    table.product(Activations::Codes(&a), scales, &mut of_codes);
                    assert!(same(&of_codes, &want), "{isa:?} codes, case {case} {tokens}x{rows}x{cols}");
                }
            }
        }
    }
}

#[test]
fn threads_change_nothing() {
    let (tokens, rows, cols) = (197, 192, 96);
    let mut random = Random(3);
    let digits: Vec<u8> = (0..rows * cols).map(|_| random.digit()).collect();
    let x: Vec<f32> = (0..tokens * cols).map(|_| random.real()).collect();
    let scales = Scales { x: &[0.3], w: &vec![0.1; rows], bias: None };
    for isa in Isa::available() {
        let w = TableWeights::new(GRIDS[0], -2, rows, cols, &packed(&digits, cols), isa);
        let with = |threads: usize| -> Result<Vec<f32>, rayon::ThreadPoolBuildError> {
            let mut y = vec![0.0; tokens * rows];
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            pool.install(|| w.product(Activations::Values(&x, None), scales, &mut y));
            Ok(y)
        };
        let one = with(1).expect("a pool of one thread");
        for threads in [2, 3, 7] {
            assert_eq!(with(threads).expect("a small pool"), one, "{isa:?} on {threads}");
        }
    }
}
