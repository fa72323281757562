use super::*;
use half::bf16;

struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn fill(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next()).collect()
    }
}

/// A matrix in one of the layouts that occur: row-major, transposed, both with gaps, and strided
/// both ways.
fn laid<T: Element>(data: &[T], rows: usize, cols: usize, layout: usize) -> View<'_, T> {
    match layout {
        0 => View { data, rs: cols, cs: 1 },
        1 => View { data, rs: 1, cs: rows },
        2 => View { data, rs: cols + 3, cs: 1 },
        3 => View { data, rs: 1, cs: rows + 5 },
        _ => View { data, rs: 2, cs: 2 * rows + 1 },
    }
}

fn room(rows: usize, cols: usize) -> usize {
    2 * (rows + 5) * (cols + 5)
}

fn ways() -> Vec<How> {
    let mut ways = vec![];
    #[cfg(target_arch = "x86_64")]
    ways.extend([
        How { road: Road::Avx512Pairs, word: Word::Pairs },
        How { road: Road::Avx512, word: Word::Plain },
        How { road: Road::Avx512, word: Word::Rounded },
        How { road: Road::Avx2, word: Word::Plain },
        How { road: Road::Avx2, word: Word::Rounded },
    ]);
    ways.extend([
        How { road: Road::Plain, word: Word::Plain },
        How { road: Road::Plain, word: Word::Rounded },
    ]);
    ways.retain(|how| how.road.there());
    ways
}

fn rounded(how: How, x: f32) -> f64 {
    f64::from(if how.word == Word::Plain { x } else { bf16::from_f32(x).to_f32() })
}

/// Element (i, j) and the sum of its absolute products, in f64.
fn oracle<T: Element, U: Element>(
    how: How,
    k: usize,
    a: View<T>,
    b: View<U>,
    i: usize,
    j: usize,
) -> (f64, f64) {
    (0..k).fold((0.0, 0.0), |(sum, size), p| {
        let x = rounded(how, a.data[i * a.rs + p * a.cs].wide());
        let y = rounded(how, b.data[p * b.rs + j * b.cs].wide());
        (sum + x * y, size + (x * y).abs())
    })
}

/// Each of the k additions rounds by at most half an ulp of a partial sum.
fn tolerance(k: usize, size: f64) -> f64 {
    (k + 2) as f64 * f64::from(f32::EPSILON) / 2.0 * (size + 1.0)
}

fn check_product<T: Element, U: Element>(how: How, sizes: (usize, usize, usize), a: View<T>, b: View<U>) {
    let (m, n, k) = sizes;
    for (scale, add, gap) in [(1.0, false, 0), (0.125, true, 3)] {
        let stride = n + gap;
        let before = Random(7).fill((m - 1) * stride + n);
        let mut dst = before.clone();
        product_by(how, sizes, &mut dst, stride, a, b, scale, add);
        for (at, (&got, &old)) in dst.iter().zip(&before).enumerate() {
            let (i, j) = (at / stride, at % stride);
            if j >= n {
                assert_eq!(got, old, "{how:?} {sizes:?}: wrote between rows");
                continue;
            }
            let (sum, size) = oracle(how, k, a, b, i, j);
            let want = f64::from(scale) * sum + if add { f64::from(old) } else { 0.0 };
            let off = (f64::from(got) - want).abs();
            assert!(off <= tolerance(k, size), "{how:?} {sizes:?} at {i}, {j}: got {got}, want {want}");
        }
    }
}

#[test]
fn products_follow_the_oracle() {
    let sizes = [
        (1, 1, 1),
        (3, 1, 2),
        (1, 65, 3),
        (5, 16, 7),
        (8, 48, 33),
        (9, 49, 31),
        (17, 64, 65),
        (33, 97, 130),
        (65, 130, 16),
        (19, 113, 197),
        (20, 37, 515),
    ];
    let mut random = Random(1);
    for (s, (m, n, k)) in sizes.into_iter().enumerate() {
        let (x, y) = (random.fill(room(m, k)), random.fill(room(k, n)));
        let narrow = |x: &[f32]| x.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>();
        let (xh, yh) = (narrow(&x), narrow(&y));
        for how in ways() {
            for l in 0..25 {
                let (la, lb) = (l % 5, l / 5);
                if how.road == Road::Plain && l % 6 > 0 {
                    continue; // Software fma; the other layouts differ in packing only.
                }
                check_product(how, (m, n, k), laid(&x, m, k, la), laid(&y, k, n, lb));
                if s % 2 == 1 && l % 3 == 0 {
                    check_product(how, (m, n, k), laid(&xh, m, k, la), laid(&y, k, n, lb));
                    check_product(how, (m, n, k), laid(&x, m, k, la), laid(&yh, k, n, lb));
                }
            }
        }
    }
}

/// Every way to split, with and without a bias.
fn matmul_sizes() -> [(usize, usize, usize); 7] {
    [
        (7, 10, 13),
        (197, 192, 65),
        (130, 700, 130),
        (65, 1300, 67),
        (50, 97, 1576),
        (96, 130, 5001),
        (700, 33, 300),
    ]
}

fn matmul_with(
    how: How,
    sizes: (usize, usize, usize),
    a: View<f32>,
    b: View<f32>,
    bias: Option<&[f32]>,
) -> Vec<f32> {
    let (m, n, _) = sizes;
    let mut out: Vec<f32> = Vec::with_capacity(m * n);
    matmul_by(how, sizes, a, b, bias, &mut out.spare_capacity_mut()[..m * n]);
    // SAFETY: `matmul_by` wrote all m * n elements.
    unsafe { out.set_len(m * n) };
    out
}

fn pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool of a few threads")
}

#[test]
fn matmul_follows_the_oracle_on_any_number_of_threads() {
    let mut random = Random(2);
    let pools = [pool(1), pool(2), pool(5)];
    for (m, n, k) in matmul_sizes() {
        let (x, y, bias) = (random.fill(room(m, k)), random.fill(room(k, n)), random.fill(n));
        for how in ways() {
            for (la, lb, bias) in
                [(0, 0, None), (0, 1, Some(&bias[..])), (1, 0, None), (3, 3, Some(&bias[..]))]
            {
                let (a, b) = (laid(&x, m, k, la), laid(&y, k, n, lb));
                if how.road == Road::Plain && la > 0 {
                    continue; // Software fma; the other layouts differ in packing only.
                }
                let out = pools[0].install(|| matmul_with(how, (m, n, k), a, b, bias));
                for pool in &pools[1..] {
                    let other = pool.install(|| matmul_with(how, (m, n, k), a, b, bias));
                    assert!(
                        out.iter().zip(&other).all(|(x, y)| x.to_bits() == y.to_bits()),
                        "{how:?} {m} {n} {k}"
                    );
                }
                for at in (0..m * n).step_by(if m * n * k > 1 << 20 { 37 } else { 1 }) {
                    let (i, j) = (at / n, at % n);
                    let (sum, size) = oracle(how, k, a, b, i, j);
                    let want = sum + f64::from(bias.map_or(0.0, |b| b[j]));
                    let off = (f64::from(out[at]) - want).abs();
                    assert!(
                        off <= tolerance(k, size),
                        "{how:?} {:?} at {i}, {j}: {} not {want}",
                        (m, n, k),
                        out[at]
                    );
                }
            }
        }
    }
}

#[test]
fn f32_is_the_same_on_every_road() {
    let mut random = Random(3);
    for (m, n, k) in [(13, 50, 300), (130, 97, 65), (50, 97, 1576)] {
        let (x, y) = (random.fill(room(m, k)), random.fill(room(k, n)));
        let (a, b) = (laid(&x, m, k, 1), laid(&y, k, n, 0));
        for word in [Word::Plain, Word::Rounded] {
            let outs: Vec<_> = ways()
                .into_iter()
                .filter(|how| how.word == word)
                .map(|how| matmul_with(how, (m, n, k), a, b, None))
                .collect();
            for out in &outs[1..] {
                assert!(out.iter().zip(&outs[0]).all(|(x, y)| x.to_bits() == y.to_bits()), "{word:?}");
            }
        }
    }
}

#[test]
fn nothing_to_sum() {
    let empty: [f32; 0] = [];
    let view = View::rows(&empty[..], 0);
    assert_eq!(matmul(Arithmetic::F32, (2, 2, 0), view, view, Some(&[1.0, 2.0])), [1.0, 2.0, 1.0, 2.0]);
    assert_eq!(matmul(Arithmetic::Bf16, (0, 2, 5), view, View::rows(&[0f32; 10][..], 2), None), [0f32; 0]);
    let mut dst = [3.0; 2];
    product(Arithmetic::F32, (1, 2, 0), &mut dst, 2, view, view, 1.0, false);
    assert_eq!(dst, [0.0; 2]);
}

#[test]
#[should_panic(expected = "outside their slices")]
fn a_short_operand_is_refused() {
    let x = [0f32; 11];
    matmul(Arithmetic::F32, (3, 1, 4), View::rows(&x[..], 4), View::rows(&x[..], 1), None);
}

#[test]
fn values_beyond_numbers_pass_through() {
    for arithmetic in [Arithmetic::F32, Arithmetic::Bf16] {
        let a = [1.0, f32::INFINITY, f32::NAN, 2.0, 3.0, 1.0];
        let b = [1.0, 1.0, 2.0, 0.5, 1.0, 1.0];
        let out = matmul(arithmetic, (2, 2, 3), View::rows(&a[..], 3), View::rows(&b[..], 2), None);
        assert!(out[0].is_nan() && out[1].is_nan(), "{out:?}");
        assert_eq!(out[2..], [9.0, 4.5]);
    }
}
