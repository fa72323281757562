//! The largest eigenvalue of a symmetric operator by Lanczos with full reorthogonalisation.
//!
//! What it finds is a lower bound up to rounding; whether it is the largest is for a certificate to say.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};

use crate::random::Random;

/// A run of Lanczos that can go on.
pub struct Lanczos {
    basis: Mat<f64>,
    /// Diagonal and off-diagonal of the projected operator; `off[k]` couples `k` and `k + 1`.
    diagonal: Vec<f64>,
    off: Vec<f64>,
    /// The largest Ritz value so far.
    pub value: f64,
    /// The norm of what that Ritz pair misses.
    pub residual: f64,
    exhausted: bool,
}

impl Lanczos {
    /// From a fixed start vector, which depends on `n` alone; room for `most` steps.
    pub fn new(n: usize, most: usize) -> Self {
        let mut random = Random::new(0, "lanczos", &[n as u64]);
        let mut basis = Mat::zeros(n, most.min(n) + 1);
        let start: Vec<f64> = (0..n).map(|_| f64::from(random.normal())).collect();
        let norm = start.iter().map(|v| v * v).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
        start.iter().enumerate().for_each(|(i, v)| basis[(i, 0)] = v / norm);
        Lanczos {
            basis,
            diagonal: Vec::new(),
            off: Vec::new(),
            value: 0.0,
            residual: f64::INFINITY,
            exhausted: false,
        }
    }

    /// Up to `steps` more steps of `operator`, which replaces a vector `[n, 1]` by its image, until the residual
    /// is at most `tolerance` times the Ritz value. `false` where a number is not finite.
    pub fn run(&mut self, steps: usize, tolerance: f64, operator: &mut dyn FnMut(MatMut<'_, f64>)) -> bool {
        let n = self.basis.nrows();
        for _ in 0..steps {
            let k = self.diagonal.len();
            if self.exhausted || k + 1 >= self.basis.ncols() {
                break;
            }
            let mut w = Mat::zeros(n, 1);
            w.copy_from(self.basis.as_ref().subcols(k, 1));
            operator(w.as_mut());
            let v = self.basis.as_ref().subcols(k, 1);
            let alpha = dot(v, w.as_ref());
            // Twice is enough, and includes the two terms of the recurrence.
            let known = self.basis.as_ref().subcols(0, k + 1);
            for _ in 0..2 {
                let mut shares = Mat::zeros(k + 1, 1);
                matmul(shares.as_mut(), Accum::Replace, known.transpose(), w.as_ref(), 1.0, Par::Seq);
                matmul(w.as_mut(), Accum::Add, known, shares.as_ref(), -1.0, Par::Seq);
            }
            let beta = dot(w.as_ref(), w.as_ref()).sqrt();
            if !alpha.is_finite() || !beta.is_finite() {
                return false;
            }
            self.diagonal.push(alpha);
            self.off.push(beta);
            self.value = largest(&self.diagonal, &self.off, self.value);
            let last = last_component(&self.diagonal, &self.off, self.value);
            self.residual = beta * last;
            if beta <= 1e-14 * self.value.abs() {
                // An invariant space: what it holds is exact, and there is no way on.
                (self.residual, self.exhausted) = (beta, true);
                break;
            }
            let mut next = self.basis.as_mut().subcols_mut(k + 1, 1);
            for i in 0..n {
                next[(i, 0)] = w[(i, 0)] / beta;
            }
            if self.residual <= tolerance * self.value {
                break;
            }
        }
        self.value.is_finite()
    }
}

fn dot(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> f64 {
    let mut sum = Mat::zeros(1, 1);
    matmul(sum.as_mut(), Accum::Replace, a.transpose(), b, 1.0, Par::Seq);
    sum[(0, 0)]
}

/// The largest eigenvalue of the tridiagonal matrix, which lies at or above `known`, by bisection: the
/// number of negative pivots of `T - x` is the number of eigenvalues below `x`.
fn largest(diagonal: &[f64], off: &[f64], known: f64) -> f64 {
    let k = diagonal.len();
    let reach = |i: usize| {
        let left = if i > 0 { off[i - 1].abs() } else { 0.0 };
        let right = if i + 1 < k { off[i].abs() } else { 0.0 };
        (left, right)
    };
    let bound = |i: usize| {
        let (left, right) = reach(i);
        diagonal[i] + left + right
    };
    let mut high = (0..k).map(bound).fold(f64::NEG_INFINITY, f64::max);
    let all_below = |x: f64| {
        let mut pivot = 1.0f64;
        for (i, entry) in diagonal.iter().enumerate() {
            let square = if i > 0 { off[i - 1] * off[i - 1] } else { 0.0 };
            pivot = entry - x - square / pivot;
            if pivot >= 0.0 {
                return false;
            }
        }
        true
    };
    let mut low = known.min(high);
    for _ in 0..120 {
        let middle = 0.5 * (low + high);
        if middle <= low || middle >= high {
            break;
        }
        match all_below(middle) {
            true => high = middle,
            false => low = middle,
        }
    }
    high
}

/// The magnitude of the last component of the eigenvector of the tridiagonal matrix for its largest
/// eigenvalue `value`: two steps of inverse iteration with a shift just above it, where `shift - T` is positive
/// definite and elimination needs no pivoting.
fn last_component(diagonal: &[f64], off: &[f64], value: f64) -> f64 {
    let k = diagonal.len();
    let shift = value + value.abs() * 4.0 * f64::EPSILON + f64::MIN_POSITIVE;
    let mut pivots = vec![0.0; k];
    let mut vector = vec![1.0; k];
    for (i, entry) in diagonal.iter().enumerate() {
        let before = if i > 0 { off[i - 1] * off[i - 1] / pivots[i - 1] } else { 0.0 };
        let pivot: f64 = shift - entry - before;
        pivots[i] = pivot.max(value.abs() * 1e-300 + f64::MIN_POSITIVE);
    }
    for _ in 0..2 {
        for i in 1..k {
            vector[i] += off[i - 1] / pivots[i - 1] * vector[i - 1];
        }
        for i in (0..k).rev() {
            vector[i] /= pivots[i];
            if i + 1 < k {
                vector[i] += off[i] / pivots[i] * vector[i + 1];
            }
        }
        let most = vector.iter().fold(0f64, |m, v| m.max(v.abs())).max(f64::MIN_POSITIVE);
        vector.iter_mut().for_each(|v| *v /= most);
    }
    let norm = vector.iter().map(|v| v * v).sum::<f64>().sqrt();
    match vector.last() {
        Some(last) if norm > 0.0 => last.abs() / norm,
        _ => 1.0,
    }
}
