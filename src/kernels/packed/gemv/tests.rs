//! Every width, grid, grouping and instruction set against a product in f64.

use super::*;

/// splitmix64.
pub(super) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Between -1 and 1.
    pub fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// A weight as it comes, and its values without the steps.
struct Case {
    bits: u8,
    grid: (i32, bool),
    rows: usize,
    cols: usize,
    group: usize,
    codes: Vec<u8>,
    values: Vec<f64>,
    step: Vec<f32>,
    x: Vec<f32>,
}

impl Case {
    fn new(bits: u8, grid: (i32, bool), rows: usize, cols: usize, group: usize) -> Self {
        let mut random = Random(u64::from(bits) ^ (rows * 1000 + cols) as u64);
        let (mut codes, mut values) = (Vec::new(), Vec::new());
        for _ in 0..rows {
            let (mut buffer, mut filled) = (0u32, 0);
            for _ in 0..cols {
                let field = random.next() as u32 & ((1 << bits) - 1);
                values.push(f64::from(field) + f64::from(grid.0) + if grid.1 { 0.5 } else { 0.0 });
                buffer |= field << filled;
                filled += u32::from(bits);
                while filled >= 8 {
                    codes.push(buffer as u8);
                    (buffer, filled) = (buffer >> 8, filled - 8);
                }
            }
            if filled > 0 {
                codes.push(buffer as u8);
            }
        }
        let groups = Columns::new(cols, group).groups();
        let step = (0..rows * groups).map(|_| 0.05 + 0.04 * random.float()).collect();
        let x = (0..cols).map(|_| random.float()).collect();
        Case { bits, grid, rows, cols, group, codes, values, step, x }
    }

    fn weights(&self, isa: Isa) -> GemvWeights {
        let grid = (self.bits, self.grid.0, self.grid.1);
        GemvWeights::new(grid, self.cols, self.group, &self.codes, &self.step, isa)
    }

    /// The products with `x`, and the sums of their magnitudes.
    fn exact(&self, x: &[f32]) -> Vec<(f64, f64)> {
        let group = self.group.min(self.cols);
        let groups = self.cols.div_ceil(group);
        let product = |row: usize| {
            (0..self.cols).fold((0.0, 0.0), |(sum, size), k| {
                let step = self.step[row * groups + k / group];
                let term = f64::from(step) * self.values[row * self.cols + k] * f64::from(x[k]);
                (sum + term, size + term.abs())
            })
        };
        (0..self.rows).map(product).collect()
    }

    fn name(&self, isa: Isa) -> String {
        let Case { bits, grid, rows, cols, group, .. } = self;
        format!("{bits} bits {grid:?}, {rows} x {cols} by {group}, {isa:?}")
    }
}

fn cases() -> impl Iterator<Item = Case> {
    let grids = (1..=8u8).flat_map(|bits| {
        let lo = -(1 << (bits - 1));
        [(lo, true), (lo, false), (0, false)].map(|grid| (bits, grid))
    });
    grids.flat_map(|(bits, grid)| {
        let shapes = [(1, 1), (3, 5), (33, 64), (16, 65), (65, 130), (32, 192), (70, 197), (5, 1024)];
        let groups = [usize::MAX, 1, 3, 31, 32, 64, 100, 128];
        shapes.into_iter().flat_map(move |(rows, cols)| {
            groups.into_iter().map(move |group| Case::new(bits, grid, rows, cols, group))
        })
    })
}

#[test]
fn int8_products_are_exact_and_the_same_on_every_set() {
    for case in cases() {
        let mut first: Option<Vec<f32>> = None;
        for isa in Isa::available() {
            let (weights, mut row) = (case.weights(isa), Int8Row::default());
            weights.prepare_int8(&case.x, &mut row);
            let mut y = vec![f32::NAN; case.rows];
            weights.times_int8(&[row.clone()], &mut y, 0..case.rows);
            for (y, (want, size)) in y.iter().zip(case.exact(&row.values())) {
                // Blocks are exact; what is left is a few roundings for each, and those of the values.
                let bound = size * 1e-6 * (4.0 + weights.format().columns.blocks() as f64);
                assert!((f64::from(*y) - want).abs() <= bound, "{}: {y} for {want}", case.name(isa));
            }
            let first = first.get_or_insert_with(|| y.clone());
            assert_eq!(first, &y, "{}", case.name(isa));
        }
    }
}

#[test]
fn float_products_err_as_a_dot_product_does() {
    for case in cases() {
        for isa in Isa::available() {
            let (weights, mut row) = (case.weights(isa), FloatRow::default());
            weights.prepare(&case.x, &mut row);
            let mut y = vec![f32::NAN; case.rows];
            weights.times(&[row], &mut y, 0..case.rows);
            for (y, (want, size)) in y.iter().zip(case.exact(&case.x)) {
                let bound = size * 6e-8 * (4 + case.cols) as f64;
                assert!((f64::from(*y) - want).abs() <= bound, "{}: {y} for {want}", case.name(isa));
            }
        }
    }
}

#[test]
fn a_zero_code_hides_a_great_activation() {
    // Products are those of f32, not of a fixed point that the greatest activation sets: 0 · 2^40 leaves 3 · 2^-20 whole.
    for bits in [2u8, 3, 4, 8] {
        let mut case = Case::new(bits, (0, false), 32, 64, 64);
        let row = PackedOnes::bytes(bits);
        case.codes = row.repeat(32);
        case.step.fill(1.0);
        case.x.fill(0.0);
        (case.x[0], case.x[9]) = (2f32.powi(40), 3.0 * 2f32.powi(-20));
        for isa in Isa::available() {
            let (weights, mut x) = (case.weights(isa), FloatRow::default());
            weights.prepare(&case.x, &mut x);
            let mut y = vec![0f32; 32];
            weights.times(&[x], &mut y, 0..32);
            assert!(y.iter().all(|&y| y == 3.0 * 2f32.powi(-20)), "{}: {y:?}", case.name(isa));
        }
    }
}

/// A row of 64 fields, the first 0 and the others 1.
struct PackedOnes;

impl PackedOnes {
    fn bytes(bits: u8) -> Vec<u8> {
        let mut row = vec![0u8; 8 * usize::from(bits)];
        for at in (1..64).map(|i| i * usize::from(bits)) {
            row[at / 8] |= 1 << (at % 8);
        }
        row
    }
}

#[test]
fn extremes_do_not_saturate() {
    for bits in [2u8, 3, 4, 8] {
        for sign in [1.0, -1.0] {
            let mut case = Case::new(bits, (0, false), 32, 128, 128);
            case.codes.fill(0xff);
            case.step.fill(1.0);
            case.x.fill(127.0 * sign);
            for isa in Isa::available() {
                let (weights, mut row) = (case.weights(isa), Int8Row::default());
                weights.prepare_int8(&case.x, &mut row);
                let mut y = vec![0f32; 32];
                weights.times_int8(&[row], &mut y, 0..32);
                let want = sign * 127.0 * 128.0 * ((1 << bits) - 1) as f32;
                assert!(y.iter().all(|&y| y == want), "{}: {y:?} for {want}", case.name(isa));
            }
        }
    }
}

#[test]
fn any_share_of_rows_and_any_number_of_them_gives_the_same_bytes() {
    for (bits, group) in [(2, 64), (3, 197), (4, 100), (8, 3)] {
        let case = Case::new(bits, (-2, true), 100, 197, group);
        for isa in Isa::available() {
            let weights = case.weights(isa);
            let (mut floats, mut codes) = (Vec::new(), Vec::new());
            for i in 0..3 {
                let x: Vec<f32> = case.x.iter().map(|v| v * (1.0 + i as f32)).collect();
                floats.push(FloatRow::default());
                weights.prepare(&x, &mut floats[i]);
                codes.push(Int8Row::default());
                weights.prepare_int8(&x, &mut codes[i]);
            }
            let (mut whole, mut whole8) = (vec![0f32; 300], vec![0f32; 300]);
            weights.times(&floats, &mut whole, 0..100);
            weights.times_int8(&codes, &mut whole8, 0..100);
            for i in 0..3 {
                for rows in [0..32, 32..100, 64..96, 0..0] {
                    let (mut part, mut part8) = (vec![0f32; rows.len()], vec![0f32; rows.len()]);
                    weights.times(&floats[i..i + 1], &mut part, rows.clone());
                    weights.times_int8(&codes[i..i + 1], &mut part8, rows.clone());
                    assert_eq!(part, whole[100 * i..][rows.clone()]);
                    assert_eq!(part8, whole8[100 * i..][rows.clone()]);
                }
            }
        }
    }
}

#[test]
fn runs_of_tiles_and_panels_of_columns_change_nothing() {
    // Several runs and panels, neither whole, and groups that panels cut.
    for group in [usize::MAX, 64, 192, 100] {
        let case = Case::new(2, (-2, true), 1100, 1111, group);
        for isa in Isa::available() {
            let (weights, mut row) = (case.weights(isa), FloatRow::default());
            weights.prepare(&case.x, &mut row);
            let row = [row];
            let mut whole = vec![f32::NAN; 1100];
            weights.times(&row, &mut whole, 0..1100);
            for (y, (want, size)) in whole.iter().zip(case.exact(&case.x)) {
                let bound = size * 6e-8 * (4 + case.cols) as f64;
                assert!((f64::from(*y) - want).abs() <= bound, "{}: {y} for {want}", case.name(isa));
            }
            for rows in [0..32, 32..1100, 64..128, 1088..1100] {
                let mut part = vec![f32::NAN; rows.len()];
                weights.times(&row, &mut part, rows.clone());
                assert_eq!(part, whole[rows], "{}", case.name(isa));
            }
        }
    }
}

#[test]
fn a_row_no_number_shows() {
    let mut case = Case::new(2, (-2, true), 40, 130, 64);
    case.x[100] = f32::INFINITY;
    for isa in Isa::available() {
        let (weights, mut row, mut float) = (case.weights(isa), Int8Row::default(), FloatRow::default());
        weights.prepare_int8(&case.x, &mut row);
        weights.prepare(&case.x, &mut float);
        let (mut y, mut z) = (vec![0f32; 40], vec![0f32; 40]);
        weights.times_int8(&[row], &mut y, 0..40);
        weights.times(&[float], &mut z, 0..40);
        assert!(y.iter().all(|y| y.is_nan()) && z.iter().all(|z| !z.is_finite()), "{}", case.name(isa));
    }
}
