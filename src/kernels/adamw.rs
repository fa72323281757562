//! One AdamW step of one tensor, in place, in one pass over memory.
//!
//! ```text
//! m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
//! p = p (1 - lr wd) - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
//! ```
//!
//! p in f32 or f64, any shape; m and v in f32 beside it. The factors come from f64, the elements
//! are computed in the type of p; on a CUDA device f32 in place (kernels/optim.cu). Source: Loshchilov and Hutter 2019, algorithm 2, with the
//! learning rate multiplied into the decay as PyTorch does.

use super::cpu::{self, real, simd, Real};
#[cfg(feature = "cuda")]
use super::cuda;
use candle_core::{bail, CpuStorage, DType, Device, InplaceOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::sync::Mutex;

/// The settings of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWParams {
    /// Learning rate per step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, per unit of learning rate.
    pub weight_decay: f64,
}

impl Default for AdamWParams {
    fn default() -> Self {
        AdamWParams { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

/// The running moments of one parameter, in f32 on the parameter's device.
#[derive(Debug)]
pub struct Moments {
    shape: Shape,
    state: State,
}

#[derive(Debug)]
enum State {
    Host { m: Vec<f32>, v: Vec<f32> },
    Device { m: Tensor, v: Tensor },
}

impl Moments {
    /// The moments before the first step.
    pub fn zeros(shape: impl Into<Shape>, device: &Device) -> Result<Self> {
        let shape = shape.into();
        let state = if device.is_cpu() {
            let count = shape.elem_count();
            State::Host { m: vec![0.0; count], v: vec![0.0; count] }
        } else {
            let zeros = || Tensor::zeros(&shape, DType::F32, device);
            State::Device { m: zeros()?, v: zeros()? }
        };
        Ok(Moments { shape, state })
    }

    /// (m, v) as f32 tensors in the parameter's shape, for a checkpoint.
    pub fn export(&self) -> Result<(Tensor, Tensor)> {
        match &self.state {
            State::Host { m, v } => {
                let tensor = |x: &[f32]| Tensor::from_slice(x, &self.shape, &Device::Cpu);
                Ok((tensor(m)?, tensor(v)?))
            }
            // Copies: a step moves them in place.
            State::Device { m, v } => Ok((m.force_contiguous()?, v.force_contiguous()?)),
        }
    }

    /// The moments that [`Moments::export`] gave, on the device of the tensors.
    pub fn import(m: &Tensor, v: &Tensor) -> Result<Self> {
        if m.dims() != v.dims() || m.dtype() != DType::F32 || v.dtype() != DType::F32 {
            bail!(
                "adamw: expected two moments of one shape in F32, got {:?} in {:?} and {:?} in {:?}",
                m.dims(),
                m.dtype(),
                v.dims(),
                v.dtype()
            )
        }
        let state = if m.device().is_cpu() && v.device().is_cpu() {
            let host = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
            State::Host { m: host(m)?, v: host(v)? }
        } else if m.device().same_device(v.device()) {
            State::Device { m: m.detach().force_contiguous()?, v: v.detach().force_contiguous()? }
        } else {
            bail!("adamw: expected two moments on one device")
        };
        Ok(Moments { shape: m.shape().clone(), state })
    }

    /// The shape of the parameter.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// (m, v) where they lie on a device, to be moved in place.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(&self) -> Option<[&Tensor; 2]> {
        match &self.state {
            State::Host { .. } => None,
            State::Device { m, v } => Some([m, v]),
        }
    }
}

impl AdamWParams {
    /// The factors of step number `step` as the kernel takes them.
    #[cfg(feature = "cuda")]
    pub(crate) fn words(&self, step: u64) -> [u64; 4] {
        let f = Factors::new(step, self);
        [
            cuda::floats(f.beta1, f.rest1),
            cuda::floats(f.beta2, f.rest2),
            cuda::floats(f.rate, f.correct2),
            cuda::floats(f.eps, f.keep),
        ]
    }
}

/// The step in plain candle ops: (p, m, v) after it. All in the dtype of p except m and v in f32.
pub fn reference(
    p: &Tensor,
    grad: &Tensor,
    (m, v): (&Tensor, &Tensor),
    step: u64,
    params: &AdamWParams,
) -> Result<(Tensor, Tensor, Tensor)> {
    let f = Factors::new(step, params);
    let dtype = p.dtype();
    let m = ((m.to_dtype(dtype)? * f.beta1)? + (grad * f.rest1)?)?;
    let v = ((v.to_dtype(dtype)? * f.beta2)? + (grad.sqr()? * f.rest2)?)?;
    let update = ((&m * f.rate)? / ((&v * f.correct2)?.sqrt()? + f.eps)?)?;
    let p = ((p * f.keep)? - update)?;
    Ok((p, m.to_dtype(DType::F32)?, v.to_dtype(DType::F32)?))
}

/// What one step multiplies with.
#[derive(Clone, Copy)]
struct Factors {
    beta1: f64,
    rest1: f64,
    beta2: f64,
    rest2: f64,
    /// lr / (1 - beta1^t)
    rate: f64,
    /// 1 / (1 - beta2^t)
    correct2: f64,
    eps: f64,
    /// 1 - lr wd
    keep: f64,
}

impl Factors {
    fn new(step: u64, p: &AdamWParams) -> Self {
        let power = |beta: f64| beta.powf(step as f64);
        Factors {
            beta1: p.beta1,
            rest1: 1.0 - p.beta1,
            beta2: p.beta2,
            rest2: 1.0 - p.beta2,
            rate: p.lr / (1.0 - power(p.beta1)),
            correct2: 1.0 / (1.0 - power(p.beta2)),
            eps: p.eps,
            keep: 1.0 - p.lr * p.weight_decay,
        }
    }
}

simd! {
    fn update<T>(p: &mut [T], g: &[T], m: &mut [f32], v: &mut [f32], f: Factors) {
        let of = T::from_f64;
        let (beta1, rest1, beta2, rest2) = (of(f.beta1), of(f.rest1), of(f.beta2), of(f.rest2));
        let (rate, correct2, eps, keep) = (of(f.rate), of(f.correct2), of(f.eps), of(f.keep));
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let m1 = T::from_f64(f64::from(*m)) * beta1 + g * rest1;
            let v1 = T::from_f64(f64::from(*v)) * beta2 + g * g * rest2;
            *m = m1.to_f64() as f32;
            *v = v1.to_f64() as f32;
            *p = *p * keep - m1 * rate / ((v1 * correct2).sqrt() + eps);
        }
    }
}

/// (p, dp): p is updated in place.
struct AdamW<'a> {
    factors: Factors,
    // The op is shared while it runs, but the moments change; the lock is never contended.
    moments: Mutex<(&'a mut [f32], &'a mut [f32])>,
}

impl InplaceOp2 for AdamW<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, p: &mut CpuStorage, pl: &Layout, g: &CpuStorage, gl: &Layout) -> Result<()> {
        let Some((from, to)) = pl.contiguous_offsets() else {
            bail!("adamw: expected a contiguous parameter, got strides {:?}", pl.stride())
        };
        let mut moments = self.moments.lock().unwrap_or_else(|e| e.into_inner());
        let (m, v) = &mut *moments;
        fn run<T: Real>(p: &mut [T], g: &[T], m: &mut [f32], v: &mut [f32], f: Factors) {
            p.par_chunks_mut(cpu::GRAIN)
                .zip(g.par_chunks(cpu::GRAIN))
                .zip(m.par_chunks_mut(cpu::GRAIN).zip(v.par_chunks_mut(cpu::GRAIN)))
                .for_each(|((p, g), (m, v))| update(p, g, m, v, f));
        }
        real!(self.name(), g, T => {
            let g = <T as Real>::slice(self.name(), g, gl)?;
            let p = T::elements_mut(p);
            let Some(p) = p else { bail!("adamw: expected parameter and gradient in one dtype") };
            run(&mut p[from..to], g, m, v, self.factors);
            Ok(())
        })
    }
}

/// One AdamW step of the parameter `p` (f32 or f64, contiguous), in place, number `step` counted
/// from 1. `grad` has the shape and dtype of p, `moments` its shape.
pub fn adamw_step(
    p: &Tensor,
    grad: &Tensor,
    moments: &mut Moments,
    step: u64,
    params: &AdamWParams,
) -> Result<()> {
    let op = "adamw";
    if grad.shape() != p.shape() || moments.shape() != p.shape() {
        bail!(
            "{op}: expected gradient and moments {:?}, got {:?} and {:?}",
            p.dims(),
            grad.dims(),
            moments.shape().dims()
        )
    }
    if step == 0 {
        bail!("{op}: expected a step counted from 1, got 0")
    }
    if !matches!(p.dtype(), DType::F32 | DType::F64) {
        bail!("{op}: expected a parameter in F32 or F64, got {:?}", p.dtype())
    }
    cpu::road(op, &[("p", p), ("grad", grad)])?;
    let grad = grad.detach().contiguous()?;
    match &mut moments.state {
        State::Host { m, v } if p.device().is_cpu() => {
            let fused = AdamW { factors: Factors::new(step, params), moments: Mutex::new((m, v)) };
            p.inplace_op2(&grad, &fused)
        }
        #[cfg(feature = "cuda")]
        State::Device { m, v } if p.device().is_cuda() && p.dtype() == DType::F32 => {
            let moved = cuda::Moved { weight: p, grad: &grad, state: [Some(&*m), Some(&*v)], free: None };
            let factors = params.words(step);
            cuda::Together::default().run(cuda::Rule::AdamW, &[moved], &factors, None).map(drop)
        }
        State::Device { m, v } if p.device().same_device(m.device()) => {
            let (new, m1, v1) = reference(&p.detach(), &grad, (m, v), step, params)?;
            let count = p.elem_count();
            p.reshape(count)?.slice_set(&new.reshape(count)?, 0, 0)?;
            (*m, *v) = (m1, v1);
            Ok(())
        }
        _ => bail!("{op}: expected the moments on the device of the parameter"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use candle_core::Var;

    const PARAMS: AdamWParams =
        AdamWParams { lr: 0.02, beta1: 0.9, beta2: 0.99, eps: 1e-6, weight_decay: 0.1 };

    #[test]
    fn follows_the_reference() {
        for (dtype, tolerance) in [(DType::F32, F32), (DType::F64, F32)] {
            for shape in [vec![], vec![1], vec![3, 5], vec![7, 13], vec![20_001]] {
                let p = Var::from_tensor(&values(&shape, 1).to_dtype(dtype).unwrap()).unwrap();
                let mut moments = Moments::zeros(shape.clone(), &Device::Cpu).unwrap();
                let (m, v) = moments.export().unwrap();
                let (mut want, mut m, mut v) = (p.as_tensor().copy().unwrap().detach(), m, v);
                for step in 1..=4 {
                    let g = values(&shape, 10 + step).to_dtype(dtype).unwrap();
                    adamw_step(&p, &g, &mut moments, step, &PARAMS).unwrap();
                    (want, m, v) = reference(&want, &g, (&m, &v), step, &PARAMS).unwrap();
                }
                close("parameter", &p, &want, tolerance);
                let (gm, gv) = moments.export().unwrap();
                close("first moment", &gm, &m, F32);
                close("second moment", &gv, &v, F32);
            }
        }
    }

    #[test]
    fn by_hand() {
        // At step 1 the corrected moments are g and g^2: the update is lr * sign(g) for eps 0.
        let p = Var::new(&[1f32, -2.0], &Device::Cpu).unwrap();
        let g = Tensor::new(&[3f32, -5.0], &Device::Cpu).unwrap();
        let mut moments = Moments::zeros(2, &Device::Cpu).unwrap();
        let params = AdamWParams { lr: 0.5, eps: 0.0, weight_decay: 0.25, ..PARAMS };
        adamw_step(&p, &g, &mut moments, 1, &params).unwrap();
        let want = Tensor::new(&[1.0 * 0.875 - 0.5, -2.0 * 0.875 + 0.5], &Device::Cpu).unwrap();
        close("step", &p, &want, F32);
    }

    #[test]
    fn export_and_import_continue_to_the_bit() {
        let start = values(&[50], 1).to_dtype(DType::F32).unwrap();
        let g = |i| values(&[50], i).to_dtype(DType::F32).unwrap();
        let run = |interrupt: bool| {
            let p = Var::from_tensor(&start).unwrap();
            let mut moments = Moments::zeros(50, &Device::Cpu).unwrap();
            for step in 1..=6 {
                if interrupt && step == 4 {
                    let (m, v) = moments.export().unwrap();
                    moments = Moments::import(&m, &v).unwrap();
                }
                adamw_step(&p, &g(step), &mut moments, step, &PARAMS).unwrap();
            }
            p.to_vec1::<f32>().unwrap()
        };
        assert_eq!(run(true), run(false));
        assert_ne!(run(false), start.to_vec1::<f32>().unwrap());
    }

    #[test]
    fn wrong_arguments_are_named() {
        let p = values(&[3], 1);
        let mut moments = Moments::zeros(3, &Device::Cpu).unwrap();
        let mut message = |p: &Tensor, g: &Tensor, step| {
            adamw_step(p, g, &mut moments, step, &PARAMS).unwrap_err().to_string()
        };
        assert!(message(&p, &values(&[4], 1), 1).contains("[4]"));
        assert!(message(&p, &p.copy().unwrap(), 0).contains("got 0"));
        assert!(message(&p, &p.to_dtype(DType::F32).unwrap(), 1).contains("F64"));
        let wrong = Tensor::zeros(2, DType::F64, &Device::Cpu).unwrap();
        assert!(Moments::import(&wrong, &wrong).unwrap_err().to_string().contains("F64"));
    }
}
