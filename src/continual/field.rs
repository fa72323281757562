//! Learning on in the field space of one-bit weights: what the earlier tasks left of each weight's
//! distribution is the prior of the next.
//!
//! ```text
//! KL(q || p) = sum_i m_i (θ_i - θ'_i) - ln cosh θ_i + ln cosh θ'_i       m = tanh θ
//! dKL / dθ   = (1 - m^2) (θ - θ')
//! ```
//!
//! between the distributions of fields θ and θ' ([`crate::models::binary`] says what they are). The log-cosh is
//! `|θ| + ln(1 + exp(-2|θ|)) - ln 2`, and all of it is computed in f64: a divergence is what is left when
//! numbers of the size of |θ| have cancelled. Li, Huang, Zou and Huang 2023 (arXiv 2212.02846).

use crate::kernels::tape::{self, Reads};
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Shape, Tensor, WithDType};
use rayon::prelude::*;

use crate::train::{Figure, Pass};
use crate::weights::Param;
use crate::{Error, Result};

/// Weights per unit of parallel work. Part of the numerics: partial sums follow these borders.
const GRAIN: usize = 1 << 14;

/// Weights whose logarithms are taken as one: each factor is between 1/2 and 2, so their product is far from
/// the ends of f64.
const LOGARITHM: usize = 256;

/// The divergence of one weight in nats as `sum - ln ratio`, and its derivative by `theta`.
#[inline]
fn one(theta: f64, prior: f64) -> (f64, f64, f64) {
    let tail = (-2.0 * theta.abs()).exp();
    let below = (-2.0 * prior.abs()).exp();
    let (rest, apart) = (1.0 / (1.0 + tail), theta - prior);
    let m = ((1.0 - tail) * rest).copysign(theta);
    let sum = m * apart - (theta.abs() - prior.abs());
    (sum, (1.0 + tail) / (1.0 + below), 4.0 * tail * rest * rest * apart)
}

/// The sum of the divergences; the derivative of each goes to `slope`.
fn divergence<T: Copy + Into<f64>>(theta: &[T], prior: &[T], mut slope: impl FnMut(f64)) -> f64 {
    let mut sum = 0.0;
    for (theta, prior) in theta.chunks(LOGARITHM).zip(prior.chunks(LOGARITHM)) {
        let mut product = 1.0;
        for (&theta, &prior) in theta.iter().zip(prior) {
            let (part, ratio, by_theta) = one(theta.into(), prior.into());
            sum += part;
            product *= ratio;
            slope(by_theta);
        }
        sum -= product.ln();
    }
    // Rounding may leave a little less than nothing; what is not a number stays that.
    if sum < 0.0 {
        0.0
    } else {
        sum
    }
}

/// The sum of the divergences, and `factor` times the derivative of each.
fn sums<T: WithDType + Into<f64>>(theta: &[T], prior: &[T], factor: f64) -> (f64, Vec<T>) {
    let mut slopes = vec![T::zero(); theta.len()];
    let parts: Vec<f64> = slopes
        .par_chunks_mut(GRAIN)
        .zip(theta.par_chunks(GRAIN).zip(prior.par_chunks(GRAIN)))
        .map(|(slopes, (theta, prior))| {
            let mut slopes = slopes.iter_mut();
            divergence(theta, prior, |by_theta| {
                if let Some(slope) = slopes.next() {
                    *slope = T::from_f64(factor * by_theta);
                }
            })
        })
        .collect();
    (parts.iter().sum(), slopes)
}

/// [`sums`] of two tensors in host memory, of one shape and dtype.
fn on_host(theta: &Tensor, prior: &Tensor, factor: f64) -> candle_core::Result<(f64, Tensor)> {
    fn of<T: WithDType + Into<f64>>(
        theta: &Tensor,
        prior: &Tensor,
        factor: f64,
    ) -> candle_core::Result<(f64, Tensor)> {
        let (t, p) = (theta.flatten_all()?.to_vec1::<T>()?, prior.flatten_all()?.to_vec1::<T>()?);
        let (value, slope) = sums(&t, &p, factor);
        Ok((value, Tensor::from_vec(slope, theta.shape(), theta.device())?))
    }
    match theta.dtype() {
        DType::F64 => of::<f64>(theta, prior, factor),
        _ => of::<f32>(theta, prior, factor),
    }
}

/// The divergence, a scalar in the dtype of `theta`, in nats, of the weights of fields `theta` from those of
/// fields `prior`, of any one shape; it has a gradient for `theta` and none for `prior`.
///
/// Errs where shapes or dtypes differ.
pub fn kl(theta: &Tensor, prior: &Tensor) -> Result<Tensor> {
    if theta.dims() != prior.dims() || theta.dtype() != prior.dtype() {
        return Err(Error::Run(format!(
            "kl: found a prior {:?} {:?}, expected {:?} {:?} as the fields are",
            prior.dtype(),
            prior.dims(),
            theta.dtype(),
            theta.dims()
        )));
    }
    let prior = prior.detach();
    match (theta.device().is_cpu(), theta.dtype()) {
        (true, DType::F32 | DType::F64) => {
            Ok(tape::apply2(&theta.contiguous()?, &prior.contiguous()?, Divergence, Reads::ALL)?)
        }
        (true, _) => {
            let wide = kl(&theta.to_dtype(DType::F32)?, &prior.to_dtype(DType::F32)?)?;
            Ok(wide.to_dtype(theta.dtype())?)
        }
        _ => plain(theta, &prior),
    }
}

/// The divergence in plain candle ops, for other devices.
fn plain(theta: &Tensor, prior: &Tensor) -> Result<Tensor> {
    let log_cosh = |t: &Tensor| -> Result<Tensor> {
        let size = t.abs()?;
        Ok((&size + (((&size * -2.0)?.exp()? + 1.0)?.log()? - std::f64::consts::LN_2)?)?)
    };
    let m = theta.tanh()?;
    let each = (((m * (theta - prior)?)? - log_cosh(theta)?)? + log_cosh(prior)?)?;
    Ok(each.sum_all()?)
}

struct Divergence;

impl CustomOp2 for Divergence {
    fn name(&self) -> &'static str {
        "field-kl"
    }

    fn cpu_fwd(
        &self,
        theta: &CpuStorage,
        tl: &Layout,
        prior: &CpuStorage,
        pl: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (Some((from, to)), Some((first, last))) = (tl.contiguous_offsets(), pl.contiguous_offsets())
        else {
            candle_core::bail!("field-kl: expected contiguous elements")
        };
        let sum = match (theta, prior) {
            (CpuStorage::F32(theta), CpuStorage::F32(prior)) => {
                CpuStorage::F32(vec![sums(&theta[from..to], &prior[first..last], 0.0).0 as f32])
            }
            (CpuStorage::F64(theta), CpuStorage::F64(prior)) => {
                CpuStorage::F64(vec![sums(&theta[from..to], &prior[first..last], 0.0).0])
            }
            _ => candle_core::bail!("field-kl: expected elements of f32 or f64"),
        };
        Ok((sum, Shape::from(())))
    }

    fn bwd(
        &self,
        theta: &Tensor,
        prior: &Tensor,
        _sum: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let factor = grad.to_dtype(DType::F64)?.to_scalar()?;
        Ok((Some(on_host(theta, prior, factor)?.1), None))
    }
}

/// The prior of a task: the fields that each weight's distribution had before it.
#[derive(Clone, Debug)]
pub struct FieldPrior {
    /// The fields by the parameter's name.
    pub entries: Vec<(String, Tensor)>,
    /// What the divergence counts. 1 is Bayes' rule; where there are many more weights than samples, as
    /// usual, it leaves most weights undecided, and the network of their signs is a poor one. 0.01 for the
    /// uniform prior of a first task and 0.2 for what it left behind are what the figures of
    /// [`crate::models::binary`] were made with.
    pub weight: f64,
    /// Samples of the task: the loss is a mean over samples, the prior is one for all of them.
    pub samples: usize,
}

impl FieldPrior {
    /// What the tasks so far left behind: `params` as they are now (copied).
    pub fn posterior(params: &[Param], weight: f64, samples: usize) -> Result<Self> {
        FieldPrior::of(params, weight, samples, |t| Ok(t.copy()?))
    }

    /// Before the first task: every weight 1 or -1 with the same probability, θ = 0.
    pub fn uniform(params: &[Param], weight: f64, samples: usize) -> Result<Self> {
        FieldPrior::of(params, weight, samples, |t| Ok(t.zeros_like()?))
    }

    fn of(
        params: &[Param],
        weight: f64,
        samples: usize,
        prior: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        let entry = |p: &Param| Ok((p.name.clone(), prior(&p.var.as_detached_tensor())?));
        Ok(FieldPrior { entries: params.iter().map(entry).collect::<Result<_>>()?, weight, samples })
    }

    /// Adds `weight KL / samples` and its gradient to a pass over `params`. A parameter without an entry (a
    /// new classifier) has no prior, and an entry without a parameter stays unused.
    ///
    /// Errs on an entry of another shape than its parameter's.
    pub fn add(&self, params: &[Param], pass: &mut Pass) -> Result<()> {
        let factor = self.weight / self.samples.max(1) as f64;
        if factor == 0.0 {
            return Ok(());
        }
        for (param, grad) in params.iter().zip(pass.grads.iter_mut()) {
            let Some((_, prior)) = self.entries.iter().find(|(name, _)| *name == param.name) else {
                continue;
            };
            let theta = param.var.as_detached_tensor();
            if theta.dims() != prior.dims() {
                let (found, expected) = (prior.dims(), theta.dims());
                let message = format!("found a prior of shape {found:?}, expected {expected:?}");
                return Err(Error::tensor(&param.name, message));
            }
            let (value, slope) = weighted(&theta, prior, factor)?;
            pass.loss = pass.loss.plus(&Figure::Known(value), factor)?;
            *grad = Some(match grad.take() {
                Some(grad) => (grad + slope)?,
                None => slope,
            });
        }
        Ok(())
    }

    /// Bytes that remembering takes: one f32 for each weight.
    pub fn bytes(&self) -> usize {
        self.entries.iter().map(|(_, t)| t.elem_count() * t.dtype().size_in_bytes()).sum()
    }
}

/// The divergence and `factor` times its gradient in `theta`.
fn weighted(theta: &Tensor, prior: &Tensor, factor: f64) -> Result<(f64, Tensor)> {
    let prior = prior.to_dtype(theta.dtype())?.to_device(theta.device())?;
    if theta.device().is_cpu() && matches!(theta.dtype(), DType::F32 | DType::F64) {
        return Ok(on_host(theta, &prior, factor)?);
    }
    let value = kl(theta, &prior)?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
    // 1 - m^2 without the difference, as in `one`.
    let tail = (theta.abs()? * -2.0)?.exp()?;
    let unsure = ((&tail * 4.0)? / (tail + 1.0)?.sqr()?)?;
    Ok((value, ((unsure * (theta - prior)?)? * factor)?))
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::weights::Role;

    fn row(values: &[f64]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    fn scalar(t: &Tensor) -> f64 {
        t.to_dtype(DType::F64).unwrap().to_scalar().unwrap()
    }

    fn param(name: &str, values: &[f32]) -> Param {
        let var = Var::from_tensor(&Tensor::new(values, &Device::Cpu).unwrap()).unwrap();
        Param { name: name.into(), var, role: Role::Plain }
    }

    /// A mean of 3/5 is a probability of 4/5: from a fair coin 0.8 ln 1.6 + 0.2 ln 0.4.
    #[test]
    fn divergence_by_hand() {
        let (theta, fair) = (row(&[0.6f64.atanh()]), row(&[0.0]));
        let expected = 0.8 * 1.6f64.ln() + 0.2 * 0.4f64.ln();
        assert!((scalar(&kl(&theta, &fair).unwrap()) - expected).abs() < 1e-12);
        // The other way round: 0.5 ln (0.5 / 0.8) + 0.5 ln (0.5 / 0.2).
        let expected = 0.5 * (0.25f64 / 0.16).ln();
        assert!((scalar(&kl(&fair, &theta).unwrap()) - expected).abs() < 1e-12);
        // From certainty on one side to certainty on the other: 2 θ', and no number overflows.
        for far in [20.0, 500.0, 1e6] {
            let there = scalar(&kl(&row(&[-far]), &row(&[far])).unwrap());
            assert!((there / (2.0 * far) - 1.0).abs() < 1e-12, "{far}: {there}");
            assert_eq!(scalar(&kl(&row(&[far]), &row(&[far])).unwrap()), 0.0);
        }
        assert!((scalar(&kl(&row(&[900.0]), &fair).unwrap()) - 2f64.ln()).abs() < 1e-12);
    }

    /// Against the two-term sum over both values of the weight, in both formats.
    #[test]
    fn divergence_is_the_sum_over_both_values() {
        let fields = [-3.0, -1.1, -0.4, 0.0, 0.2, 0.9, 2.5, 4.0];
        let p = |t: f64, w: f64| 1.0 / (1.0 + (-2.0 * w * t).exp());
        for t in fields {
            for s in fields {
                let expected: f64 = [1.0, -1.0].iter().map(|&w| p(t, w) * (p(t, w) / p(s, w)).ln()).sum();
                let found = scalar(&kl(&row(&[t]), &row(&[s])).unwrap());
                assert!((found - expected).abs() < 1e-12, "{t} {s}: {found} {expected}");
                let f32s =
                    kl(&row(&[t]).to_dtype(DType::F32).unwrap(), &row(&[s]).to_dtype(DType::F32).unwrap());
                assert!((scalar(&f32s.unwrap()) - expected).abs() < 1e-5 * (1.0 + expected));
                let plain = scalar(&plain(&row(&[t]), &row(&[s])).unwrap());
                assert!((plain - expected).abs() < 1e-12, "{t} {s}: {plain} {expected}");
            }
        }
    }

    #[test]
    fn gradient_agrees_with_differences() {
        let theta = [-2.0, -0.3, 0.0, 0.7, 1.9, 3.0];
        let prior = row(&[1.0, -0.2, 0.4, 0.7, -2.0, 2.5]);
        let var = Var::from_tensor(&row(&theta)).unwrap();
        let sum = (kl(var.as_tensor(), &prior).unwrap() * 3.0).unwrap();
        let grads = sum.backward().unwrap();
        let analytic = grads.get(&var).unwrap().to_vec1::<f64>().unwrap();
        for i in 0..theta.len() {
            let at = |by: f64| {
                let mut moved = theta;
                moved[i] += by;
                3.0 * scalar(&kl(&row(&moved), &prior).unwrap())
            };
            let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
            assert!((analytic[i] - numeric).abs() < 1e-8, "{i}: {} {numeric}", analytic[i]);
        }
    }

    /// Where f32 no longer tells tanh θ from 1: both roads to the gradient agree, and it is not 0.
    #[test]
    fn the_certain_are_still_pulled() {
        for (theta, dtype) in [(12.0, DType::F32), (-20.0, DType::F32), (25.0, DType::F64)] {
            let of = |t: f64| row(&[t]).to_dtype(dtype).unwrap();
            let (var, prior) = (Var::from_tensor(&of(theta)).unwrap(), of(1.0));
            let sum = (kl(var.as_tensor(), &prior).unwrap() * 3.0).unwrap();
            let got = sum.backward().unwrap().get(&var).unwrap().to_dtype(DType::F64).unwrap();
            let got = got.to_vec1::<f64>().unwrap()[0];
            let want = 3.0 * (theta - 1.0) / theta.cosh().powi(2);
            assert!((got / want - 1.0).abs() < 1e-6, "{theta}: {got} {want}");
            let (_, added) = weighted(&of(theta), &prior, 3.0).unwrap();
            assert_eq!(added.to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap(), [got]);
        }
    }

    #[test]
    fn what_is_not_a_number_is_not_hidden() {
        for (theta, prior) in [(f64::NAN, 0.5), (0.5, f64::NAN)] {
            for dtype in [DType::F32, DType::F64] {
                let of = |t: f64| row(&[1.0, t, -1.0]).to_dtype(dtype).unwrap();
                assert!(scalar(&kl(&of(theta), &of(prior)).unwrap()).is_nan());
                let (value, slope) = weighted(&of(theta), &of(prior), 1.0).unwrap();
                let slope = slope.to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
                assert!(value.is_nan() && slope[1].is_nan() && slope[0] == 0.0, "{value} {slope:?}");
            }
        }
    }

    #[test]
    fn a_prior_adds_its_share_to_a_pass() {
        let params = [param("a", &[0.5, -1.0, 2.0]), param("new", &[1.0]), param("b", &[0.25])];
        let mut prior = FieldPrior::uniform(&params, 0.5, 10).unwrap();
        prior.entries.remove(1);
        let ones = Tensor::new(&[1f32, 1.0, 1.0], &Device::Cpu).unwrap();
        let mut pass =
            Pass { loss: Figure::Known(1.0), right: Figure::Known(0.0), grads: vec![Some(ones), None, None] };
        prior.add(&params, &mut pass).unwrap();
        let mut sum = 0.0;
        for (param, added) in [(&params[0], 1.0), (&params[2], 0.0)] {
            let at = params.iter().position(|p| p.name == param.name).unwrap();
            let grad = pass.grads[at].as_ref().unwrap().to_vec1::<f32>().unwrap();
            for (theta, grad) in param.var.as_tensor().to_vec1::<f32>().unwrap().iter().zip(grad) {
                let (theta, m) = (f64::from(*theta), f64::from(*theta).tanh());
                assert!((f64::from(grad) - added - 0.05 * (1.0 - m * m) * theta).abs() < 1e-6);
                sum += 0.05 * scalar(&kl(&row(&[theta]), &row(&[0.0])).unwrap());
            }
        }
        assert!(pass.grads[1].is_none());
        assert!((pass.loss.read().unwrap() - 1.0 - sum).abs() < 1e-9, "{:?} {sum}", pass.loss);
        assert_eq!(prior.bytes(), 16);

        // What is the prior costs nothing; another shape is an error.
        let own = FieldPrior::posterior(&params, 1.0, 1).unwrap();
        let mut pass =
            Pass { loss: Figure::Known(0.0), right: Figure::Known(0.0), grads: vec![None, None, None] };
        own.add(&params, &mut pass).unwrap();
        assert_eq!(pass.loss.read().unwrap(), 0.0);
        let narrow = [param("a", &[0.5, -1.0])];
        let error = own.add(&narrow, &mut pass).unwrap_err().to_string();
        assert_eq!(error, "tensor a: found a prior of shape [3], expected [2]");
        let error = kl(&row(&[1.0]), &row(&[1.0, 2.0])).unwrap_err().to_string();
        assert!(error.contains("found a prior F64 [2], expected F64 [1]"), "{error}");
    }

    /// The fields that were copied stay where they were when training moves on.
    #[test]
    fn a_posterior_does_not_move_with_its_parameters() {
        let params = [param("a", &[0.5, -1.0])];
        let prior = FieldPrior::posterior(&params, 1.0, 1).unwrap();
        params[0].var.set(&Tensor::new(&[3f32, 3.0], &Device::Cpu).unwrap()).unwrap();
        assert_eq!(prior.entries[0].1.to_vec1::<f32>().unwrap(), [0.5, -1.0]);
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let theta: Vec<f32> = (0..50_001).map(|i| ((i * 37 % 1001) as f32 - 500.0) * 0.01).collect();
        let prior: Vec<f32> = (0..50_001).map(|i| ((i * 91 % 997) as f32 - 498.0) * 0.01).collect();
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| sums(&theta, &prior, 0.3))
        };
        let one = on(1);
        assert!(one.0 > 0.0);
        for threads in [2, 5] {
            assert_eq!(on(threads), one);
        }
    }
}
