use super::*;

const SIZES: [usize; 6] = [1, 7, 24, 33, 130, 259];
const COUNTS: [usize; 5] = [0, 1, 5, 64, 513];

/// Numbers in [-1, 1), the same each time.
fn numbers(len: usize, mut state: u64) -> Vec<f64> {
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// `a`, [n, count], with zeros where its form has none.
fn formed(n: usize, count: usize, form: Form) -> Vec<f64> {
    let mut a = numbers(n * count, 3);
    for (at, value) in a.iter_mut().enumerate() {
        let (i, k) = (at % n, at / n);
        let outside = match form {
            Form::Full => false,
            Form::Lower => i < k,
            Form::Upper => i > k,
        };
        if outside {
            *value = 0.0;
        }
    }
    a
}

fn triple_loop(g: &mut [f64], n: usize, a: &[f64]) {
    for vector in a.chunks(n) {
        for j in 0..n {
            for i in j..n {
                g[j * n + i] += vector[i] * vector[j];
            }
        }
    }
}

fn by(isa: Isa, g: &mut [f64], n: usize, a: &[f64], form: Form) {
    add_lower_by(isa, g, n, a.len() / n, form, |some, out| {
        out.copy_from_slice(&a[some.start * n..some.end * n]);
    });
}

#[test]
fn every_form_is_the_plain_sum_and_the_upper_half_is_left() {
    for (n, count) in SIZES.iter().flat_map(|&n| COUNTS.map(|count| (n, count))) {
        for form in [Form::Full, Form::Lower, Form::Upper] {
            let (before, a) = (numbers(n * n, 5), formed(n, count, form));
            let mut expected = before.clone();
            triple_loop(&mut expected, n, &a);
            for isa in Isa::available() {
                let mut g = before.clone();
                by(isa, &mut g, n, &a, form);
                for (at, (got, want)) in g.iter().zip(&expected).enumerate() {
                    let upper = at % n < at / n;
                    let near = (got - want).abs() <= 1e-13 * (count as f64 + 1.0).sqrt();
                    let right = if upper { got.to_bits() == before[at].to_bits() } else { near };
                    assert!(right, "{isa:?} {form:?} n {n} count {count} at {at}: {got}, not {want}");
                }
            }
        }
    }
}

#[test]
fn fused_sets_give_the_same_bytes() {
    let fused: Vec<Isa> = Isa::available().into_iter().filter(|&isa| isa > Isa::Scalar).collect();
    let (n, count) = (259, 513);
    let a = numbers(n * count, 7);
    let products: Vec<Vec<f64>> = fused
        .iter()
        .map(|&isa| {
            let mut g = numbers(n * n, 9);
            by(isa, &mut g, n, &a, Form::Full);
            g
        })
        .collect();
    assert!(products.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn what_is_not_finite_spreads_as_far_as_it_must() {
    let (n, count) = (45, 20);
    for (value, row) in [(f64::NAN, 0), (f64::INFINITY, 30), (f64::NEG_INFINITY, 44)] {
        let mut a = numbers(n * count, 11);
        a[3 * n + row] = value;
        let mut expected = vec![0.0; n * n];
        triple_loop(&mut expected, n, &a);
        for isa in Isa::available() {
            let mut g = vec![0.0; n * n];
            by(isa, &mut g, n, &a, Form::Full);
            for (got, want) in g.iter().zip(&expected) {
                let same = got == want || (got.is_nan() && want.is_nan());
                assert!(if want.is_finite() { got.is_finite() } else { same }, "{isa:?}: {got}, not {want}");
            }
        }
    }
}

#[test]
fn nothing_is_a_matrix_too() {
    add_lower_of(&mut [], 0, 0, Form::Full, |_, _| ());
    add_lower_of(&mut [], 0, 5, Form::Full, |_, out| assert!(out.is_empty()));
}

#[test]
#[should_panic(expected = "square")]
fn a_matrix_that_is_not_square_is_refused() {
    add_lower_of(&mut [0.0; 8], 3, 2, Form::Full, |_, out| out.fill(1.0));
}
