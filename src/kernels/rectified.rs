//! Moments of a rectified Gaussian, elementwise: of `max(z, 0)` with `z ~ N(m, v)`.
//!
//! ```text
//! s = sqrt v    t = m / s    P = Phi(t)    p = phi(t)    h = t P + p    k = p - t Phi(-t)
//! mean      a = s h              da/dm = P               da/dv = p / (2 s)
//! variance  w = v (P - h k)      dw/dm = 2 a Phi(-t)     dw/dv = P - h p
//! ```
//!
//! `Phi` and `phi` are the distribution and density of the standard normal. The variance is the usual
//! `E z+^2 - a^2` with its two large terms cancelled by hand: `(t^2 + 1) P + t p - h^2 = P - h k`. Where `v`
//! is 0, `z` is certain: `a = max(m, 0)`, `w = 0`, and no gradient flows to `v` from `a`. The derivatives
//! are those of a Gaussian expectation, `dE f/dm = E f'` and `dE f/dv = E f'' / 2`.
//!
//! Both are computed in f64 whatever the elements are, `Phi` by its tail: far below zero `h` is what is left
//! of two numbers `t^2` times its size, and `P - h k` of two such. f32 and f64 here, f16 and bf16 through f32.
//! Source: Frey and Hinton 1999, "Variational learning in nonlinear Gaussian belief networks" (the rectifier's
//! mean and variance).

use super::cpu::{self, real, simd, Real, Road};
use crate::kernels::tape::{self, Reads};
use candle_core::cpu::erf::erfc_f64;
use candle_core::{bail, CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// 1 / sqrt(2 pi).
const PEAK: f64 = 0.398_942_280_401_432_7;

/// Both moments in plain candle ops: mean and variance, of a variance above 0. Without a tail of its own,
/// `Phi` is good to 1e-16 here, not to so much of itself.
pub fn reference(mean: &Tensor, variance: &Tensor) -> Result<(Tensor, Tensor)> {
    let dtype = mean.dtype();
    let (mean, variance) = (mean.to_dtype(DType::F64)?, variance.to_dtype(DType::F64)?);
    let deviation = variance.sqrt()?;
    let t = (mean / &deviation)?;
    let below = (((&t * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)? * 0.5)?;
    let density = ((t.sqr()? * -0.5)?.exp()? * PEAK)?;
    let h = ((&t * &below)? + &density)?;
    let k = (density - (t * (1.0 - &below)?)?)?;
    let spread = (variance * (below - (&h * k)?)?)?;
    let at_least = |x: Tensor| x.lt(0.0)?.where_cond(&x.zeros_like()?, &x)?.to_dtype(dtype);
    Ok((at_least((deviation * h)?)?, at_least(spread)?))
}

/// `z` by its deviation: `s`, `P`, `Phi(-t)`, `p` and `h`; none where it is certain.
#[inline(always)]
fn normal(m: f64, v: f64) -> Option<[f64; 5]> {
    if v <= 0.0 {
        return None;
    }
    let s = v.sqrt();
    let t = m / s;
    let tail = 0.5 * erfc_f64(t.abs() * std::f64::consts::FRAC_1_SQRT_2);
    let (below, above) = if t < 0.0 { (tail, 1.0 - tail) } else { (1.0 - tail, tail) };
    let density = PEAK * (-0.5 * t * t).exp();
    Some([s, below, above, density, not_negative(t.mul_add(below, density))])
}

/// Far below zero what is left is rounding of nothing; NaN stays NaN.
#[inline(always)]
fn not_negative(x: f64) -> f64 {
    if x < 0.0 {
        0.0
    } else {
        x
    }
}

simd! {
    fn forward<T>(m: &[T], v: &[T], mean: &mut [T], variance: &mut [T]) {
        for (((mean, variance), &m), &v) in mean.iter_mut().zip(variance).zip(m).zip(v) {
            let (m, v) = (m.to_f64(), v.to_f64());
            let (a, w) = match normal(m, v) {
                None => (not_negative(m), 0.0),
                Some([s, below, above, density, h]) => {
                    (s * h, not_negative(v * (below - h * (density - m / s * above))))
                }
            };
            (*mean, *variance) = (T::from_f64(a), T::from_f64(w));
        }
    }
}

simd! {
    fn backward<T>(m: &[T], v: &[T], g: &[T], gw: &[T], dm: &mut [T], dv: &mut [T]) {
        let all = dm.iter_mut().zip(dv).zip(m).zip(v).zip(g).zip(gw);
        for (((((dm, dv), &m), &v), &g), &gw) in all {
            let (m, g, gw) = (m.to_f64(), g.to_f64(), gw.to_f64());
            let (by_m, by_v) = match normal(m, v.to_f64()) {
                None => {
                    let step = if m > 0.0 { 1.0 } else { 0.0 };
                    (g * step, gw * step)
                }
                Some([s, below, above, density, h]) => {
                    (g * below + gw * (2.0 * s * h * above), g * density / (2.0 * s) + gw * (below - h * density))
                }
            };
            (*dm, *dv) = (T::from_f64(by_m), T::from_f64(by_v));
        }
    }
}

/// (mean, variance) of z to those of max(z, 0), packed one after the other.
struct Rectified;

impl CustomOp2 for Rectified {
    fn name(&self) -> &'static str {
        "rectified-moments"
    }

    fn cpu_fwd(
        &self,
        m: &CpuStorage,
        ml: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        real!(self.name(), m, T => {
            let (m, v) = (<T as Real>::slice(self.name(), m, ml)?, <T as Real>::slice(self.name(), v, vl)?);
            let mut out = cpu::unwritten(2 * m.len());
            let (mean, variance) = out.split_at_mut(m.len());
            mean.par_chunks_mut(cpu::GRAIN)
                .zip(variance.par_chunks_mut(cpu::GRAIN))
                .zip(m.par_chunks(cpu::GRAIN).zip(v.par_chunks(cpu::GRAIN)))
                .for_each(|((mean, variance), (m, v))| forward(m, v, mean, variance));
            let count = out.len();
            Ok((<T as Real>::store(out), Shape::from(count)))
        })
    }

    fn bwd(
        &self,
        m: &Tensor,
        v: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let packed = m.apply_op3_no_bwd(v, &grad.contiguous()?, &RectifiedGrad)?;
        let dm = cpu::unpack(&packed, 0, m.shape())?;
        Ok((Some(dm), Some(cpu::unpack(&packed, m.elem_count(), v.shape())?)))
    }
}

/// (mean, variance, both gradients packed) to (dm, dv) packed.
struct RectifiedGrad;

impl CustomOp3 for RectifiedGrad {
    fn name(&self) -> &'static str {
        "rectified-moments-grad"
    }

    fn cpu_fwd(
        &self,
        m: &CpuStorage,
        ml: &Layout,
        v: &CpuStorage,
        vl: &Layout,
        g: &CpuStorage,
        gl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        real!(self.name(), m, T => {
            let (m, v) = (<T as Real>::slice(self.name(), m, ml)?, <T as Real>::slice(self.name(), v, vl)?);
            let (g, gw) = <T as Real>::slice(self.name(), g, gl)?.split_at(m.len());
            let mut out = cpu::unwritten(2 * m.len());
            let (dm, dv) = out.split_at_mut(m.len());
            dm.par_chunks_mut(cpu::GRAIN)
                .zip(dv.par_chunks_mut(cpu::GRAIN))
                .zip(m.par_chunks(cpu::GRAIN).zip(v.par_chunks(cpu::GRAIN)))
                .zip(g.par_chunks(cpu::GRAIN).zip(gw.par_chunks(cpu::GRAIN)))
                .for_each(|(((dm, dv), (m, v)), (g, gw))| backward(m, v, g, gw, dm, dv));
            let count = out.len();
            Ok((<T as Real>::store(out), Shape::from(count)))
        })
    }
}

/// Mean and variance of `max(z, 0)` for Gaussian `z` of these moments, all of one shape; `variance` is 0 or
/// more.
pub fn rectified_moments(mean: &Tensor, variance: &Tensor) -> Result<(Tensor, Tensor)> {
    let op = "rectified moments";
    if mean.dims() != variance.dims() {
        bail!(
            "{op}: expected a variance of shape {:?} as the mean has, got {:?}",
            mean.dims(),
            variance.dims()
        )
    }
    match cpu::road(op, &[("mean", mean), ("variance", variance)])? {
        Road::Kernel => {
            let packed =
                tape::apply2(&mean.contiguous()?, &variance.contiguous()?, Rectified, Reads::OPERANDS)?;
            let count = mean.elem_count();
            Ok((cpu::unpack(&packed, 0, mean.shape())?, cpu::unpack(&packed, count, mean.shape())?))
        }
        Road::ThroughF32 => {
            let (a, w) = rectified_moments(&cpu::wide(mean)?, &cpu::wide(variance)?)?;
            Ok((a.to_dtype(mean.dtype())?, w.to_dtype(mean.dtype())?))
        }
        // Its division knows no certain z.
        Road::Reference => reference(mean, &variance.maximum(1e-12)?),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use candle_core::{Device, Var};

    /// Both moments as one tensor, from a mean and the root of a variance, so that any input is valid.
    fn op(t: &[Tensor]) -> Result<Tensor> {
        let (a, w) = rectified_moments(&t[0], &(t[1].sqr()? + 0.05)?)?;
        Tensor::stack(&[a, w], 0)
    }

    #[test]
    fn agrees_and_differentiates() {
        let plain = |t: &[Tensor]| {
            let (a, w) = reference(&t[0], &(t[1].sqr()? + 0.05)?)?;
            Tensor::stack(&[a, w], 0)
        };
        for shape in [vec![1, 1], vec![3, 5], vec![7, 13]] {
            let inputs = [values(&shape, 1), values(&shape, 2)];
            agrees(&inputs, &op, &plain);
            differentiates(&inputs, &op);
        }
        ignores_threads(&[values(&[40_001], 1), values(&[40_001], 2)], &op);
    }

    /// Of a standard normal: mean 1 / sqrt(2 pi), second moment 1/2.
    #[test]
    fn moments_by_hand_and_by_quadrature() {
        let scalar = |m: f64, v: f64| {
            let of = |x: f64| Tensor::new(&[x], &Device::Cpu).unwrap();
            let (a, w) = rectified_moments(&of(m), &of(v)).unwrap();
            (a.to_vec1::<f64>().unwrap()[0], w.to_vec1::<f64>().unwrap()[0])
        };
        let (a, w) = scalar(0.0, 1.0);
        assert!((a - PEAK).abs() < 1e-12 && (w - (0.5 - PEAK * PEAK)).abs() < 1e-12, "{a} {w}");
        for (m, v) in [(0.7, 0.3), (-1.2, 2.0), (3.0, 0.1), (-2.0, 0.5)] {
            // The trapezoid rule over ten deviations is exact to far below the tolerance but for the kink.
            let (steps, s) = (200_000, f64::sqrt(v));
            let (mut first, mut second) = (0.0, 0.0);
            for i in 0..=steps {
                let t = -10.0 + 20.0 * f64::from(i) / f64::from(steps);
                let (z, p) = ((m + s * t).max(0.0), PEAK * (-0.5 * t * t).exp() * 20.0 / f64::from(steps));
                first += z * p;
                second += z * z * p;
            }
            let (a, w) = scalar(m, v);
            assert!((a - first).abs() < 1e-8, "{m} {v}: {a} {first}");
            assert!((w - (second - first * first)).abs() < 1e-8, "{m} {v}: {w}");
        }
    }

    #[test]
    fn the_certain_and_the_far_are_exact() {
        let of = |x: &[f32]| Tensor::new(x, &Device::Cpu).unwrap();
        let (m, v) = (of(&[2.0, -2.0, 0.0, 1e4, -1e4]), of(&[0.0, 0.0, 0.0, 1e-6, 1e-6]));
        let (a, w) = rectified_moments(&m, &v).unwrap();
        assert_eq!(a.to_vec1::<f32>().unwrap(), [2.0, 0.0, 0.0, 1e4, 0.0]);
        assert_eq!(w.to_vec1::<f32>().unwrap(), [0.0, 0.0, 0.0, 1e-6, 0.0]);
        let message = refusal(rectified_moments(&m, &of(&[1.0])).map(|(a, _)| a));
        assert!(message.contains("expected a variance of shape [5]"), "{message}");
    }

    /// Three to eight deviations below zero: in f32 what f64 rounds to, and f64 what the integral is.
    #[test]
    fn the_tail_keeps_its_digits() {
        let both = |m: f64, v: f64, dtype: DType| {
            let of = |x: f64| Tensor::new(&[x], &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let (m, v) = (Var::from_tensor(&of(m)).unwrap(), Var::from_tensor(&of(v)).unwrap());
            let (a, w) = rectified_moments(m.as_tensor(), v.as_tensor()).unwrap();
            let mut all = vec![a.clone(), w.clone()];
            for y in [a, w] {
                let grads = y.sum_all().unwrap().backward().unwrap();
                all.extend([&m, &v].map(|x| grads.get(x).unwrap().clone()));
            }
            all.iter().map(|y| flat(y)[0]).collect::<Vec<f64>>()
        };
        for i in 0..=20 {
            let t = -3.0 - 0.25 * f64::from(i);
            for s in [0.25, 1.0, 2.0] {
                let (narrow, wide) = (both(t * s, s * s, DType::F32), both(t * s, s * s, DType::F64));
                for (which, (narrow, wide)) in narrow.iter().zip(&wide).enumerate() {
                    let near = *narrow > 0.0 && (narrow / wide - 1.0).abs() < 1e-6;
                    assert!(near, "{t} {s}, {which}: {narrow} {wide}");
                }
                let (steps, mut first, mut second) = (40_000, 0.0, 0.0);
                for i in 0..=steps {
                    let x = 4.0 * f64::from(i) / f64::from(steps);
                    let p = PEAK * (-0.5 * (x - t).powi(2)).exp() * 4.0 / f64::from(steps);
                    first += s * x * p;
                    second += s * s * x * x * p;
                }
                assert!((wide[0] / first - 1.0).abs() < 1e-6, "{t} {s}: {} {first}", wide[0]);
                let spread = second - first * first;
                assert!((wide[1] / spread - 1.0).abs() < 1e-6, "{t} {s}: {} {spread}", wide[1]);
            }
        }
        // Where even f64 has nothing left, in no format a mean below 0.
        let m = Tensor::arange(-60f64, 0.0, &Device::Cpu).unwrap();
        for dtype in [DType::F64, DType::F32, DType::BF16] {
            let (m, v) = (m.to_dtype(dtype).unwrap(), m.ones_like().unwrap().to_dtype(dtype).unwrap());
            for (a, w) in [rectified_moments(&m, &v).unwrap(), reference(&m, &v).unwrap()] {
                assert!(flat(&a).iter().chain(&flat(&w)).all(|x| *x >= 0.0), "{dtype:?}");
            }
        }
    }

    #[test]
    fn what_is_not_a_number_stays_so() {
        let of = |x: &[f32]| Tensor::new(x, &Device::Cpu).unwrap();
        let (m, v) = (of(&[f32::NAN, f32::NAN, 1.0]), of(&[0.0, 1.0, f32::NAN]));
        let (a, w) = rectified_moments(&m, &v).unwrap();
        assert!(flat(&a).iter().all(|x| x.is_nan()) && flat(&w)[1..].iter().all(|x| x.is_nan()));
    }
}
