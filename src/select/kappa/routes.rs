//! The two ends of a matrix's spectrum, and its log-volume, by the cheapest route whose answer can be proven.
//!
//! Write `W [m, n]`, `m >= n`, for the matrix (or its transpose), brought to a largest magnitude in [1, 2) by a power
//! of two, and `u = 2^-53`. Three routes, each with a gate:
//!
//! - **Gram**: `G = W^T W = L L^T`; Lanczos on `G` gives sigma_1^2 and on `G^-1`, through `L`, 1 / sigma_q^2. Squaring
//!   costs half the digits, so it is believed up to kappa = 1e5 only, and only with a certificate: that
//!   `(1 + t) theta_1 I - G` and `G - (1 - t) theta_q I` have Cholesky factors proves that nothing lies outside
//!   (Sylvester's law of inertia), while Lanczos' values bound from the inside.
//! - **QR**: Householder's `R` keeps the digits. Lanczos on `R^-1`; the bottom is certified as the top of `Z^T Z`,
//!   `Z = R^-1`, where rounding is small beside the value. Believed up to kappa = 1e12 / sqrt(n).
//! - **Direct**: all singular values, for small matrices and for what the other two refuse.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor as llt;
use faer::linalg::matmul::matmul;
use faer::linalg::qr::no_pivoting::factor as qr;
use faer::linalg::{triangular_inverse, triangular_solve};
use faer::prelude::{Reborrow, ReborrowMut};
use faer::{Accum, Mat, MatMut, MatRef, Par};

use super::lanczos::Lanczos;
use super::spectrum::{Route, U};
use super::stored::{Matrix, Scale};
use crate::kernels::gram::{add_lower_of, Form};

/// Vectors of the long side that are widened at a time.
const PANEL: usize = 512;
/// The largest kappa that a Gram matrix is believed.
const GATE: f64 = 1e5;
/// What Lanczos may miss, relative to its value.
const TOLERANCE: f64 = 1e-7;
/// Steps of Lanczos before a certificate is asked for, and once more where it fails.
const STEPS: usize = 300;
/// The least relative slack of a certificate.
const SLACK: f64 = 1e-6;
/// Side of the blocks of a product with one half of a symmetric matrix.
const BLOCK: usize = 32;

/// The ends of the spectrum of a scaled matrix, before the rank rule and the scale.
pub(super) struct Ends {
    pub(super) top: f64,
    pub(super) bottom: f64,
    pub(super) log_sum: f64,
    pub(super) frobenius: f64,
    pub(super) route: Route,
    pub(super) bound: f64,
}

/// A matrix that has numbers other than zero, all finite, and its scale.
pub(super) struct Scaled<'a> {
    pub(super) matrix: &'a Matrix<'a>,
    pub(super) scale: Scale,
}

/// Gram, then QR, then all singular values.
pub(super) fn proven(scaled: &Scaled) -> Ends {
    let product = product(scaled);
    let refused = match gram(&product) {
        Ok(ends) => return ends,
        Err(refused) => refused,
    };
    // The top of the spectrum loses nothing by squaring: what is known of it serves the next route.
    let known = refused.or_else(|| top_of(&product));
    drop(product);
    let Some(r) = triangle(scaled) else { return direct(scaled) };
    by_triangle(&r, known.as_ref()).unwrap_or_else(|| of_values(&singular_values(&r)))
}

/// The certified top of a spectrum: sigma_1^2, with the sum of all squares.
pub(super) struct Top {
    theta: f64,
    trace: f64,
}

/// `W^T W`.
pub(super) fn product(scaled: &Scaled) -> Symmetric {
    let (n, m) = (scaled.matrix.short(), scaled.matrix.long());
    let mut numbers = vec![0.0; n * n];
    add_lower_of(&mut numbers, n, m, Form::Full, |some, out| {
        scaled.matrix.panel(some.start, scaled.scale, out);
    });
    Symmetric { n, numbers }
}

/// A symmetric matrix by its lower half, column-major.
pub(super) struct Symmetric {
    n: usize,
    numbers: Vec<f64>,
}

impl Symmetric {
    /// `R^T R` of an upper triangle.
    fn of_rows(r: &Mat<f64>) -> Self {
        let n = r.nrows();
        let mut numbers = vec![0.0; n * n];
        add_lower_of(&mut numbers, n, n, Form::Lower, |some, out| {
            // Eight columns at a time: a cache line of each row is written whole.
            for i in (0..n).step_by(8) {
                for (k, out) in some.clone().zip(out.chunks_exact_mut(n)) {
                    out[i..].iter_mut().take(8).zip(i..).for_each(|(o, i)| *o = r[(k, i)]);
                }
            }
        });
        Symmetric { n, numbers }
    }

    /// `Z Z^T` of an upper triangle.
    fn of_columns(z: &Mat<f64>) -> Self {
        let n = z.nrows();
        let mut numbers = vec![0.0; n * n];
        add_lower_of(&mut numbers, n, n, Form::Upper, |some, out| {
            some.zip(out.chunks_exact_mut(n)).for_each(|(k, out)| out.copy_from_slice(z.col_as_slice(k)));
        });
        Symmetric { n, numbers }
    }

    fn diagonal(&self) -> impl Iterator<Item = f64> + '_ {
        self.numbers.iter().step_by(self.n + 1).copied()
    }

    /// The sum of the diagonal.
    pub(super) fn trace(&self) -> f64 {
        self.diagonal().sum()
    }
}

/// The Gram route on `W^T W`. What it learned of the top where it refuses.
pub(super) fn gram(g: &Symmetric) -> Result<Ends, Option<Top>> {
    let (n, trace) = (g.n, g.trace());
    // A column of zeros: the bottom is 0, and no factor will say it better.
    if g.diagonal().any(|square| square == 0.0) {
        let Some(top) = top_of(g) else { return Err(None) };
        let (theta, frobenius) = (top.theta, trace.sqrt());
        let bound = SLACK / 2.0;
        return Ok(Ends {
            top: theta.sqrt(),
            bottom: 0.0,
            log_sum: 0.0,
            frobenius,
            route: Route::Gram,
            bound,
        });
    }
    let mut work = Mat::<f64>::zeros(n, n);
    copy_lower(g, &mut work, 1.0, 0.0);
    if !factor(&mut work) {
        return Err(None);
    }
    let log_sum: f64 = (0..n).map(|i| work[(i, i)].ln()).sum();
    let mut below = Lanczos::new(n, 2 * STEPS);
    let mut through = |x: MatMut<'_, f64>| inverse_of(&work, x);
    if !below.run(STEPS, TOLERANCE, &mut through) {
        return Err(None);
    }
    // The largest diagonal entry is a lower bound on sigma_1^2: where kappa is too large by it alone,
    // the top is not worth finding here.
    let diagonal = g.diagonal().fold(0f64, f64::max);
    let near = diagonal * below.value <= GATE * GATE;
    if !near {
        return Err(None);
    }
    let mut above = Lanczos::new(n, 2 * STEPS);
    let mut times = |x: MatMut<'_, f64>| symmetric(g, x);
    if !above.run(STEPS, TOLERANCE, &mut times) {
        return Err(None);
    }
    let mut spare = Mat::<f64>::zeros(n, n);
    let Some(theta) = certify_top(g, &mut above, &mut spare) else { return Err(None) };
    let known = Top { theta, trace };
    for round in 0..2 {
        if round > 0 && !below.run(STEPS, 0.0, &mut through) {
            break;
        }
        let kappa = (theta * below.value).sqrt();
        let believed = kappa <= GATE;
        if !believed {
            break;
        }
        let slack = SLACK.max(4.0 * (n as f64).sqrt() * U * kappa * kappa);
        copy_lower(g, &mut spare, 1.0, -(1.0 - slack) / below.value);
        if factor(&mut spare) {
            return Ok(Ends {
                top: theta.sqrt(),
                bottom: (1.0 / below.value).sqrt(),
                log_sum,
                frobenius: trace.sqrt(),
                route: Route::Gram,
                bound: (SLACK + slack) / 2.0,
            });
        }
    }
    Err(Some(known))
}

/// The certified largest eigenvalue.
fn top_of(g: &Symmetric) -> Option<Top> {
    let mut above = Lanczos::new(g.n, 2 * STEPS);
    if !above.run(STEPS, TOLERANCE, &mut |x| symmetric(g, x)) {
        return None;
    }
    let theta = certify_top(g, &mut above, &mut Mat::zeros(g.n, g.n))?;
    Some(Top { theta, trace: g.trace() })
}

/// The value that a run of Lanczos on `g` found, once `(1 + t) value I - g` has a factor; after a refusal the
/// run goes on once.
fn certify_top(g: &Symmetric, above: &mut Lanczos, work: &mut Mat<f64>) -> Option<f64> {
    for round in 0..2 {
        if round > 0 && !above.run(STEPS, 0.0, &mut |x| symmetric(g, x)) {
            return None;
        }
        copy_lower(g, work, -1.0, (1.0 + SLACK) * above.value);
        if factor(work) {
            return Some(above.value);
        }
    }
    None
}

/// Householder's triangle of `W`: upper, [n, n]. `None` where it is singular to working precision or not finite.
pub(super) fn triangle(scaled: &Scaled) -> Option<Mat<f64>> {
    let r = reduced(scaled);
    let n = r.nrows();
    let diagonal = || (0..n).map(|i| r[(i, i)].abs());
    let largest = diagonal().fold(0f64, f64::max);
    let floor = U * largest * scaled.matrix.long() as f64;
    diagonal().all(|d| d > floor && d.is_finite()).then_some(r)
}

/// The triangle of `W`, whatever its rank.
///
/// A tall matrix is reduced in pieces, each factored beneath the triangle of those before it: four n^2
/// numbers in memory however tall it is.
fn reduced(scaled: &Scaled) -> Mat<f64> {
    let (n, m) = (scaled.matrix.short(), scaled.matrix.long());
    let mut r = Mat::<f64>::zeros(0, n);
    let mut from = 0;
    while from < m {
        let held = r.nrows();
        let count = (4 * n - held).min(m - from);
        let mut stack = Mat::<f64>::zeros(held + count, n);
        for j in 0..n {
            for i in 0..held.min(j + 1) {
                stack[(i, j)] = r[(i, j)];
            }
        }
        let mut panel = vec![0.0; n * PANEL.min(count)];
        for start in (0..count).step_by(PANEL) {
            let some = (count - start).min(PANEL);
            let panel = &mut panel[..n * some];
            scaled.matrix.panel(from + start, scaled.scale, panel);
            let part = MatRef::from_column_major_slice(panel, n, some);
            stack.as_mut().subrows_mut(held + start, some).copy_from(part.transpose());
        }
        from += count;
        factor_qr(stack.as_mut());
        r = Mat::from_fn(n.min(held + count), n, |i, j| if i <= j { stack[(i, j)] } else { 0.0 });
    }
    r
}

fn factor_qr(a: MatMut<'_, f64>) {
    let (m, n) = (a.nrows(), a.ncols());
    let block = qr::recommended_block_size::<f64>(m, n);
    let mut coefficients = Mat::<f64>::zeros(block, m.min(n));
    let need = qr::qr_in_place_scratch::<f64>(m, n, block, Par::Seq, Default::default());
    let mut memory = MemBuffer::new(need);
    let stack = MemStack::new(&mut memory);
    qr::qr_in_place(a, coefficients.as_mut(), Par::Seq, stack, Default::default());
}

/// The QR route on the triangle `r`, upper, with what is known of the top already.
pub(super) fn by_triangle(r: &Mat<f64>, known: Option<&Top>) -> Option<Ends> {
    let n = r.nrows();
    let computed;
    let top = match known {
        Some(top) => top,
        None => {
            computed = top_of(&Symmetric::of_rows(r))?;
            &computed
        }
    };
    let log_sum: f64 = (0..n).map(|i| r[(i, i)].abs().ln()).sum();
    let mut below = Lanczos::new(n, 2 * STEPS);
    // (R^T R)^-1 by two triangular solves.
    let mut through = |mut x: MatMut<'_, f64>| {
        triangular_solve::solve_lower_triangular_in_place(r.transpose(), x.rb_mut(), Par::Seq);
        triangular_solve::solve_upper_triangular_in_place(r.as_ref(), x.rb_mut(), Par::Seq);
    };
    if !below.run(STEPS, TOLERANCE, &mut through) {
        return None;
    }
    // What lies inside can only grow: what is beyond the gate now needs no inverse.
    let within = |below: f64| {
        let kappa = (top.theta * below).sqrt();
        (kappa <= 1e12 / (n as f64).sqrt()).then_some(kappa)
    };
    within(below.value)?;
    // Z Z^T, whose spectrum is that of Z^T Z, is what (R^T R)^-1 is.
    let mut z = Mat::<f64>::zeros(n, n);
    triangular_inverse::invert_upper_triangular(z.as_mut(), r.as_ref(), Par::Seq);
    let g = Symmetric::of_columns(&z);
    for round in 0..2 {
        if round > 0 && !below.run(STEPS, 0.0, &mut through) {
            break;
        }
        let kappa = within(below.value)?;
        let slack = SLACK.max(4.0 * (n as f64).sqrt() * U * kappa);
        copy_lower(&g, &mut z, -1.0, (1.0 + slack) * below.value);
        if factor(&mut z) {
            return Some(Ends {
                top: top.theta.sqrt(),
                bottom: (1.0 / below.value).sqrt(),
                log_sum,
                frobenius: top.trace.sqrt(),
                route: Route::Qr,
                bound: (SLACK + slack) / 2.0 + 5.0 * U * kappa,
            });
        }
    }
    None
}

/// All singular values.
pub(super) fn direct(scaled: &Scaled) -> Ends {
    of_values(&singular_values(&triangle_or_all(scaled)))
}

/// The matrix [m, n], or its triangle where that is the shorter way.
pub(super) fn triangle_or_all(scaled: &Scaled) -> Mat<f64> {
    let (n, m) = (scaled.matrix.short(), scaled.matrix.long());
    if 3 * m > 5 * n {
        return reduced(scaled);
    }
    let mut numbers = vec![0.0; n * m];
    scaled.matrix.panel(0, scaled.scale, &mut numbers);
    Mat::from_fn(m, n, |i, j| numbers[i * n + j])
}

fn of_values(values: &[f64]) -> Ends {
    let (top, bottom) = (values.first().copied().unwrap_or(0.0), values.last().copied().unwrap_or(0.0));
    Ends {
        top,
        bottom,
        log_sum: values.iter().map(|v| v.ln()).sum(),
        frobenius: values.iter().map(|v| v * v).sum::<f64>().sqrt(),
        route: Route::Direct,
        bound: 5.0 * U * (top / bottom).max(1.0),
    }
}

/// The singular values of a finite matrix, the largest first.
pub(super) fn singular_values(a: &Mat<f64>) -> Vec<f64> {
    // The divide-and-conquer of faer gives up on numbers that are not finite only; QR iteration is the spare.
    a.singular_values().unwrap_or_else(|_| {
        let dense = nalgebra::DMatrix::from_fn(a.nrows(), a.ncols(), |i, j| a[(i, j)]);
        dense.singular_values().iter().copied().collect()
    })
}

/// `to = factor from + shift I`, lower halves.
fn copy_lower(from: &Symmetric, to: &mut Mat<f64>, factor: f64, shift: f64) {
    for (j, from) in from.numbers.chunks_exact(from.n).enumerate() {
        let to = to.col_as_slice_mut(j);
        from[j..].iter().zip(&mut to[j..]).for_each(|(f, t)| *t = factor * f);
        to[j] += shift;
    }
}

/// Cholesky in place, lower half; whether there is a factor.
fn factor(a: &mut Mat<f64>) -> bool {
    let n = a.nrows();
    let mut memory = MemBuffer::new(llt::cholesky_in_place_scratch::<f64>(n, Par::Seq, Default::default()));
    let stack = MemStack::new(&mut memory);
    let done = llt::cholesky_in_place(a.as_mut(), Default::default(), Par::Seq, stack, Default::default());
    done.is_ok() && (0..n).all(|i| a[(i, i)] > 0.0 && a[(i, i)].is_finite())
}

/// `x` to `(L L^T)^-1 x`.
fn inverse_of(l: &Mat<f64>, mut x: MatMut<'_, f64>) {
    triangular_solve::solve_lower_triangular_in_place(l.as_ref(), x.rb_mut(), Par::Seq);
    triangular_solve::solve_upper_triangular_in_place(l.transpose(), x.rb_mut(), Par::Seq);
}

/// `x` to `g x`, of which only the lower half is read: the product is bound by memory, and this way each number
/// comes by once.
fn symmetric(g: &Symmetric, mut x: MatMut<'_, f64>) {
    let n = g.n;
    let g = MatRef::from_column_major_slice(&g.numbers, n, n);
    let mut y = Mat::<f64>::zeros(n, 1);
    let mut corner = Mat::<f64>::zeros(BLOCK, BLOCK);
    for j in (0..n).step_by(BLOCK) {
        let wide = (n - j).min(BLOCK);
        let own = x.rb().subrows(j, wide);
        for c in 0..wide {
            for r in c..wide {
                let value = g[(j + r, j + c)];
                (corner[(r, c)], corner[(c, r)]) = (value, value);
            }
        }
        let corner = corner.as_ref().submatrix(0, 0, wide, wide);
        matmul(y.as_mut().subrows_mut(j, wide), Accum::Add, corner, own, 1.0, Par::Seq);
        let rest = n - j - wide;
        if rest > 0 {
            let panel = g.submatrix(j + wide, j, rest, wide);
            let lower = x.rb().subrows(j + wide, rest);
            matmul(y.as_mut().subrows_mut(j + wide, rest), Accum::Add, panel, own, 1.0, Par::Seq);
            matmul(y.as_mut().subrows_mut(j, wide), Accum::Add, panel.transpose(), lower, 1.0, Par::Seq);
        }
    }
    x.copy_from(&y);
}
