//! Every road against plain loops, bit for bit.

use super::*;

struct Random(u64);

impl Random {
    /// splitmix64.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn between(&mut self, lo: i32, hi: i32) -> i32 {
        lo + (self.next() % (hi - lo + 1) as u64) as i32
    }

    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }
}

/// Fields `code - lo` of rows, least significant bit first, every row from a byte on.
fn pack(bits: u8, lo: i32, cols: usize, codes: &[i32]) -> Vec<u8> {
    let mut out = Vec::new();
    for row in codes.chunks(cols) {
        let start = out.len();
        out.resize(start + (cols * usize::from(bits)).div_ceil(8), 0u8);
        for (c, code) in row.iter().enumerate() {
            for b in 0..usize::from(bits) {
                let at = c * usize::from(bits) + b;
                out[start + at / 8] |= (((code - lo) >> b & 1) as u8) << (at % 8);
            }
        }
    }
    out
}

/// Codes of tokens: signed, unsigned, all at an end.
fn activations(random: &mut Random, kind: usize, tokens: usize, cols: usize) -> (Vec<i32>, Tokens) {
    let codes: Vec<i32> = (0..tokens * cols)
        .map(|i| match kind {
            0 => random.between(-128, 127),
            1 => random.between(0, 255),
            2 => -128,
            _ if i % 3 == 0 => 254,
            _ => 255,
        })
        .collect();
    let step: Vec<f32> = (0..tokens).map(|_| 0.01 + random.unit()).collect();
    let a = match kind {
        0 | 2 => Tokens::of_signed(&codes.iter().map(|&c| c as i8).collect::<Vec<_>>(), tokens, cols, &step),
        _ => Tokens::of_unsigned(&codes.iter().map(|&c| c as u8).collect::<Vec<_>>(), tokens, cols, &step),
    };
    (codes, a)
}

/// `Σ a whole` for all tokens and rows.
fn sums(a: &[i32], w: &[i32], cols: usize, whole: impl Fn(i32) -> i32) -> Vec<i32> {
    let w: Vec<i32> = w.iter().map(|&w| whole(w)).collect();
    let dot = |a: &[i32], w: &[i32]| a.iter().zip(w).map(|(a, w)| a * w).sum();
    a.chunks(cols).flat_map(|a| w.chunks(cols).map(move |w| dot(a, w))).collect()
}

/// The roads of an instruction set for this weight: with AVX-VNNI, those that it hides too.
fn roads(w: Gemm8Weights, isa: Isa) -> Vec<Gemm8Weights> {
    #[allow(unused_mut)]
    let mut all = vec![w];
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx2 && all[0].road == Road::AvxVnni {
        all.push(Gemm8Weights { road: Road::Wide, ..all[0].clone() });
        if all[0].largest() <= avx2::NARROW_MOST {
            all.push(Gemm8Weights { road: Road::Narrow, ..all[0].clone() });
        }
    }
    let _ = isa;
    all
}

impl Gemm8Weights {
    /// The largest magnitude of an unpacked byte.
    fn largest(&self) -> i32 {
        (0..self.shape.panels())
            .flat_map(|panel| {
                let groups = self.shape.groups(panel);
                let mut block = vec![Line::ZERO; self.shape.quads() * groups];
                self.unpack(
                    groups,
                    &self.lines[self.shape.start(panel)..self.shape.start(panel + 1)],
                    &mut block,
                );
                block
            })
            .flat_map(|line| line.0)
            .map(|byte| i32::from(byte as i8).abs())
            .max()
            .unwrap_or(0)
    }

    fn check(&self, a: &Tokens, want: &[i32], random: &mut Random, what: &str) {
        let (tokens, rows) = (a.tokens(), self.rows());
        let mut got = vec![0i32; tokens * rows];
        self.sums(a, &mut got);
        assert!(got == want, "{what}: sums");
        let step: Vec<f32> = (0..rows).map(|_| 0.01 + random.unit()).collect();
        let bias: Vec<f32> = (0..rows).map(|_| random.unit() - 0.5).collect();
        for bias in [&bias[..], &[]] {
            let mut y = vec![f32::NAN; tokens * rows];
            self.product(a, &step, bias, &mut y);
            for (i, (y, &sum)) in y.iter().zip(want).enumerate() {
                let (t, o) = (i / rows, i % rows);
                let value = sum as f32 * (a.step()[t] * (step[o] * self.unit));
                let value = bias.get(o).map_or(value, |bias| value + bias);
                assert_eq!(y.to_bits(), value.to_bits(), "{what}: token {t}, row {o}");
            }
        }
    }
}

/// `[tokens, cols, rows]`: remainders of every kind, several panels, several blocks.
const SHAPES: [(usize, usize, usize); 12] = [
    (1, 1, 1),
    (2, 3, 3),
    (3, 5, 16),
    (5, 65, 17),
    (6, 130, 40),
    (7, 64, 64),
    (13, 197, 65),
    (11, 31, 100),
    (25, 66, 130),
    (4, 512, 20),
    (8, 513, 70),
    (14, 1100, 45),
];

#[test]
fn sums_are_exact_on_every_road() {
    let mut random = Random(1);
    for isa in Isa::available() {
        for bits in 1..=8u8 {
            let n = 1 << (bits - 1);
            for (lo, half) in [(-n, true), (-n, false), (0, false), (0, true), (-3, false)] {
                let hi = lo + 2 * n - 1;
                for (tokens, cols, rows) in SHAPES {
                    let codes: Vec<i32> = (0..rows * cols).map(|_| random.between(lo, hi)).collect();
                    let packed = pack(bits, lo, cols, &codes);
                    let w = Gemm8Weights::new(bits, lo, half, cols, &packed, isa).unwrap();
                    assert_eq!((w.rows(), w.cols()), (rows, cols));
                    for w in roads(w, isa) {
                        for kind in 0..2 {
                            let (a, t) = activations(&mut random, kind, tokens, cols);
                            let want = sums(&a, &codes, cols, |c| if half { 2 * c + 1 } else { c });
                            let road = w.road;
                            let what = format!("{isa:?} {road:?} {bits} bits from {lo} half {half} {tokens}x{cols}x{rows}, {kind}");
                            w.check(&t, &want, &mut random, &what);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn extreme_codes_do_not_saturate() {
    let mut random = Random(2);
    let (tokens, cols, rows) = (7, 700, 33);
    for isa in Isa::available() {
        for bits in 1..=8u8 {
            let n = 1 << (bits - 1);
            for (lo, half) in [(-n, true), (-n, false), (0, false), (0, true)] {
                for code in [lo, lo + 2 * n - 1] {
                    let codes = vec![code; rows * cols];
                    let packed = pack(bits, lo, cols, &codes);
                    let w = Gemm8Weights::new(bits, lo, half, cols, &packed, isa).unwrap();
                    for w in roads(w, isa) {
                        for kind in 2..4 {
                            let (a, t) = activations(&mut random, kind, tokens, cols);
                            let want = sums(&a, &codes, cols, |c| if half { 2 * c + 1 } else { c });
                            w.check(
                                &t,
                                &want,
                                &mut random,
                                &format!("{isa:?} {bits} bits, all {code}, {kind}"),
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn threads_change_nothing() {
    let mut random = Random(4);
    // Beyond what one thread does alone, with panels and tokens that do not share out evenly.
    let (tokens, cols, rows) = (197, 200, 330);
    let codes: Vec<i32> = (0..rows * cols).map(|_| random.between(-4, 3)).collect();
    let packed = pack(3, -4, cols, &codes);
    let x: Vec<f32> = (0..tokens * cols).map(|_| random.unit() * 4.0 - 2.0).collect();
    for isa in Isa::available() {
        let w = Gemm8Weights::new(3, -4, true, cols, &packed, isa).unwrap();
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let how = Quantizer { step: &[0.013, 0.02, 0.01], lo: -128, hi: 127, shift: &[] };
                let a = Tokens::quantize(&x, tokens, cols, cols, how, isa);
                let mut y = vec![0f32; tokens * rows];
                w.product(&a, &vec![0.1; rows], &[], &mut y);
                let mut z = vec![0f32; tokens * rows];
                w.product_of(&x, tokens, cols, how, &vec![0.1; rows], &[], &mut z);
                assert!(y == z, "{isa:?} in one, {threads} threads");
                y.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            })
        };
        let one = run(1);
        assert!([2, 3, 7].into_iter().all(|threads| run(threads) == one), "{isa:?}");
    }
}

/// As `kernels::fake_quant::site` has it, in the order of its operations.
fn code(x: f32, shift: f32, step: f32, lo: i32, hi: i32) -> f32 {
    let v = (x + shift) / step;
    let v = if v < lo as f32 { lo as f32 } else { v };
    let v = if v > hi as f32 { hi as f32 } else { v };
    v.round_ties_even()
}

#[test]
fn quantization_agrees_to_the_bit() {
    let mut random = Random(5);
    let grids = [(-128, 127), (0, 255), (-2, 1), (0, 3), (-8, 7), (0, 127)];
    for isa in Isa::available() {
        for (tokens, cols) in [(1, 1), (3, 15), (5, 16), (4, 65), (2, 130), (197, 197)] {
            for (lo, hi) in grids {
                for stride in [cols, cols + 5] {
                    // Steps that are not powers of two, tiny ones, and one that puts every x on a tie.
                    let step: Vec<f32> = (0..tokens)
                        .map(|t| match t % 4 {
                            0 => 0.037 * (1.0 + random.unit()),
                            1 => 2.0,
                            2 => 1e-5,
                            _ => 1e-38,
                        })
                        .collect();
                    let x: Vec<f32> = (0..tokens * stride)
                        .map(|i| match i % 7 {
                            0 => random.between(-300, 300) as f32,
                            1 => (random.between(-300, 300) as f32 + 0.5) * step[i / stride],
                            2 => f32::from_bits(
                                ((random.between(-300, 300) as f32 + 0.5) * step[i / stride]).to_bits() ^ 1,
                            ),
                            3 => 0.0,
                            4 => f32::INFINITY * if i % 2 == 0 { 1.0 } else { -1.0 },
                            _ => (random.unit() - 0.5) * 300.0 * step[i / stride],
                        })
                        .collect();
                    let shift: Vec<f32> = (0..cols).map(|_| random.unit() - 0.5).collect();
                    for shift in [&shift[..], &[]] {
                        let how = Quantizer { step: &step, lo, hi, shift };
                        let got = Tokens::quantize(&x, tokens, cols, stride, how, isa);
                        for t in 0..tokens {
                            let mut sum = 0;
                            for c in 0..cols {
                                let (x, b) = (x[t * stride + c], shift.get(c).copied().unwrap_or(0.0));
                                let want = code(x, b, step[t], lo, hi) as i32;
                                assert_eq!(
                                    got.code(t, c),
                                    want,
                                    "{isa:?} {x} + {b} by {} in {lo}..={hi}",
                                    step[t]
                                );
                                sum += want;
                            }
                            assert_eq!((got.sums()[t], got.step()[t]), (sum, step[t]));
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn nan_reaches_every_result_of_its_token() {
    for isa in Isa::available() {
        for cols in [5, 16, 40] {
            let mut x = vec![0.5f32; 3 * cols];
            x[cols + cols - 1] = f32::NAN;
            let how = Quantizer { step: &[0.25], lo: -8, hi: 7, shift: &[] };
            let a = Tokens::quantize(&x, 3, cols, cols, how, isa);
            let w = Gemm8Weights::new(8, -128, false, cols, &vec![129; 2 * cols], isa).unwrap();
            let mut y = vec![0f32; 6];
            w.product(&a, &[1.0, 2.0], &[], &mut y);
            assert!(y[2].is_nan() && y[3].is_nan(), "{isa:?} {y:?}");
            let sum = 0.5 * cols as f32;
            assert_eq!([y[0], y[1], y[4], y[5]], [sum, 2.0 * sum, sum, 2.0 * sum]);
        }
    }
}

#[test]
fn sums_beyond_32_bits_are_refused() {
    let isa = Isa::best();
    let of = |bits: u8, lo: i32, half: bool, cols: usize| {
        Gemm8Weights::new(bits, lo, half, cols, &vec![0; (cols * usize::from(bits)).div_ceil(8)], isa)
            .is_some()
    };
    assert!(of(2, -2, true, 65_000) && !of(2, -2, true, 66_000));
    assert!(of(8, -128, true, 33_000) && !of(8, -128, true, 33_100));
    assert!(!of(8, i32::MAX - 3, false, 1) && !of(8, i32::MAX, false, 1));
}

#[test]
fn nothing_gives_nothing() {
    let isa = Isa::best();
    let w = Gemm8Weights::new(8, -128, false, 2, &[129, 130, 131, 132, 133, 134], isa).unwrap();
    w.sums(&Tokens::of_signed(&[], 0, 2, &[1.0]), &mut []);
    let w = Gemm8Weights::new(2, -2, true, 4, &[], isa).unwrap();
    w.sums(&Tokens::of_signed(&[1, 2, 3, 4], 1, 4, &[1.0]), &mut []);
}
