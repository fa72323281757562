//! What is kept of the singular values of one matrix, and the rules that every route obeys: which matrices have a
//! condition number, and the power of two that is taken out first.

use serde::{Deserialize, Serialize};

use super::routes::{self, Ends, Scaled};
use super::stored::{Matrix, Scale};

/// Unit roundoff of f64.
pub(super) const U: f64 = f64::EPSILON / 2.0;
/// Sides up to this go the direct way.
const SMALL: usize = 256;

/// Whether a matrix has a condition number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It has.
    Ok,
    /// The smallest singular value is at most `max(m, n) 2^-53` times the largest.
    RankDeficient,
    /// Every number is zero.
    Zero,
    /// Some number is not finite.
    NonFinite,
}

impl Status {
    /// The name that files use.
    pub fn name(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::RankDeficient => "rank_deficient",
            Status::Zero => "zero",
            Status::NonFinite => "non_finite",
        }
    }
}

/// How a spectrum was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Route {
    /// Seen without arithmetic: one singular value, only zeros, a number that is not finite.
    Seen,
    /// All singular values.
    Direct,
    /// The Gram matrix, its Cholesky factor and Lanczos, with certificates.
    Gram,
    /// The triangular factor, its inverse and Lanczos, with certificates.
    Qr,
}

impl Route {
    /// The name that files use.
    pub fn name(self) -> &'static str {
        match self {
            Route::Seen => "seen",
            Route::Direct => "direct",
            Route::Gram => "gram",
            Route::Qr => "qr",
        }
    }
}

/// What is kept of the singular values `sigma_1 >= ... >= sigma_q` of a matrix, `q = min(m, n)`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spectrum {
    /// sigma_1; 0 where a number is not finite.
    pub sigma_max: f64,
    /// sigma_q; 0 where a number is not finite.
    pub sigma_min: f64,
    /// sigma_1 / sigma_q, taken before the power of two is put back, which might over- or underflow; 0 where
    /// the status is not ok.
    pub quotient: f64,
    /// The sum of the natural logarithms of all singular values; 0 where the status is not ok.
    pub log_sum: f64,
    /// The root of the sum of squares.
    pub frobenius: f64,
    /// The deficit of log-volume, `ln(frobenius / sqrt(q)) - log_sum / q`, taken before the power of two is put
    /// back as well; never negative (the means of Jensen's inequality), and 0 where the status is not ok.
    pub deficit: f64,
    /// Whether there is a condition number.
    pub status: Status,
    /// How it was found.
    pub route: Route,
    /// The largest relative error of the condition number; 0 where there is none.
    pub bound: f64,
}

impl Spectrum {
    /// The condition number, where there is one.
    pub fn kappa(&self) -> Option<f64> {
        (self.status == Status::Ok).then_some(self.quotient)
    }

    fn none(status: Status) -> Self {
        Spectrum {
            sigma_max: 0.0,
            sigma_min: 0.0,
            quotient: 0.0,
            log_sum: 0.0,
            frobenius: 0.0,
            deficit: 0.0,
            status,
            route: Route::Seen,
            bound: 0.0,
        }
    }
}

/// The spectrum of a matrix; by all singular values where `exact`.
pub fn spectrum(matrix: &Matrix, exact: bool) -> Spectrum {
    match scaled(matrix) {
        Err(seen) => seen,
        Ok(scaled) => {
            let ends = match exact || matrix.short() <= SMALL {
                true => routes::direct(&scaled),
                false => routes::proven(&scaled),
            };
            finish(&scaled, ends)
        }
    }
}

/// The trace of `WᵀW` by the product phase of the Gram route alone, for benches; `None` for a matrix that no route takes.
pub fn squared(matrix: &Matrix) -> Option<f64> {
    let scaled = scaled(matrix).ok()?;
    Some(routes::product(&scaled).trace())
}

/// The spectrum by one route, `None` where its gate or its certificate refuses.
pub fn by(route: Route, matrix: &Matrix) -> Option<Spectrum> {
    let scaled = match scaled(matrix) {
        Err(seen) => return (route == Route::Seen).then_some(seen),
        Ok(scaled) => scaled,
    };
    let ends = match route {
        Route::Seen => None,
        Route::Direct => Some(routes::direct(&scaled)),
        Route::Gram => routes::gram(&routes::product(&scaled)).ok(),
        Route::Qr => routes::triangle(&scaled).and_then(|r| routes::by_triangle(&r, None)),
    };
    Some(finish(&scaled, ends?))
}

/// Every singular value, the largest first; none where a number is not finite.
pub fn values(matrix: &Matrix) -> Vec<f64> {
    match scaled(matrix) {
        Ok(scaled) => {
            let all = routes::singular_values(&routes::triangle_or_all(&scaled));
            all.into_iter().map(|v| scaled.scale.undo(v)).collect()
        }
        Err(seen) if seen.status == Status::NonFinite => Vec::new(),
        Err(seen) => vec![seen.sigma_max; matrix.short()],
    }
}

fn scaled<'a>(matrix: &'a Matrix<'a>) -> Result<Scaled<'a>, Spectrum> {
    let largest = match matrix.largest() {
        None => return Err(Spectrum::none(Status::NonFinite)),
        Some(0.0) => return Err(Spectrum::none(Status::Zero)),
        Some(largest) => largest,
    };
    let scaled = Scaled { matrix, scale: Scale::for_largest(largest) };
    if matrix.short() > 1 {
        return Ok(scaled);
    }
    // A vector has one singular value, its length.
    let mut numbers = vec![0.0; matrix.long()];
    matrix.panel(0, scaled.scale, &mut numbers);
    let length = numbers.iter().map(|v| v * v).sum::<f64>().sqrt();
    let sigma = scaled.scale.undo(length);
    Err(Spectrum {
        sigma_max: sigma,
        sigma_min: sigma,
        quotient: 1.0,
        log_sum: length.ln() - scaled.scale.ln(),
        frobenius: sigma,
        ..Spectrum::none(Status::Ok)
    })
}

/// The rank rule, and the scale put back.
fn finish(scaled: &Scaled, ends: Ends) -> Spectrum {
    let (matrix, scale) = (scaled.matrix, scaled.scale);
    let sound = ends.bottom > matrix.long() as f64 * U * ends.top;
    let status = if sound { Status::Ok } else { Status::RankDeficient };
    let q = matrix.short() as f64;
    let deficit = (ends.frobenius / q.sqrt()).ln() - ends.log_sum / q;
    Spectrum {
        sigma_max: scale.undo(ends.top),
        sigma_min: scale.undo(ends.bottom),
        quotient: if sound { ends.top / ends.bottom } else { 0.0 },
        log_sum: if sound { ends.log_sum - q * scale.ln() } else { 0.0 },
        frobenius: scale.undo(ends.frobenius),
        // Below zero by rounding alone.
        deficit: if sound { deficit.max(0.0) } else { 0.0 },
        status,
        route: ends.route,
        bound: if sound { ends.bound } else { 0.0 },
    }
}
