//! One CLASSP step of one tensor, in place, in one pass over memory.
//!
//! ```text
//! an entry passes  <=>  g^2 > threshold            (strict; at threshold 0: g is not 0)
//! where it passes:   S = S + |g|^p
//!                    s = lr / (epsilon + S)^(1/p)   with scaling, else lr
//!                    w = w - s (g + decay w)
//! elsewhere w and S stay as they are
//! ```
//!
//! w in f32 or f64, any shape; S beside it in the same type; on a CUDA device f32 in place (kernels/optim.cu).
//! Powers 1, 2 and 1/2 are computed in the type of w, others through f64. Source: Ludwig 2024 (arXiv 2405.09637), the pseudo-code, in which the gradient
//! of the step is in S before the step is scaled. The released code tests a whole tensor at once and adds
//! |g| whatever p is: [`Test::Tensor`] does as it does.

use super::cpu::{self, real, simd, Real};
#[cfg(feature = "cuda")]
use super::cuda;
use candle_core::{
    bail, CpuStorage, DType, Device, InplaceOp2, Layout, Result, Shape, Storage, Tensor, WithDType,
};
use rayon::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

/// What a gradient is tested by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Test {
    /// Each entry by its own square, as the paper has it.
    Entry,
    /// The tensor as a whole, as the released code does: 1 where any square is not zero, else 0, is
    /// compared with the threshold. S adds |g| at every power.
    Tensor,
}

/// The settings of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClasspParams {
    /// Learning rate per step.
    pub lr: f64,
    /// What the square of a gradient must exceed, 0 or more.
    pub threshold: f64,
    /// Added to the sum within the root, above 0.
    pub epsilon: f64,
    /// The power p of the sum and of its root, above 0.
    pub power: f64,
    /// Whether steps are divided by the root of the sum. Without it the sum grows all the same.
    pub scaling: bool,
    /// Decay of the entries that pass, scaled as their gradient is.
    pub weight_decay: f64,
    /// What is tested.
    pub test: Test,
}

impl Default for ClasspParams {
    fn default() -> Self {
        ClasspParams {
            lr: 1e-3,
            threshold: 0.0,
            epsilon: 1e-5,
            power: 1.0,
            scaling: true,
            weight_decay: 0.0,
            test: Test::Entry,
        }
    }
}

/// The sum S of one parameter, in its dtype and on its device.
#[derive(Debug)]
pub struct GradSum {
    shape: Shape,
    state: State,
}

#[derive(Debug)]
enum State {
    Host(CpuStorage),
    Device(Tensor),
}

/// What sums say of themselves, in f64.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SumFigures {
    /// The total of all entries.
    pub total: f64,
    /// Entries above zero.
    pub touched: usize,
}

impl GradSum {
    /// The sum before the first step, in f32 or f64.
    pub fn zeros(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Self> {
        let shape = shape.into();
        let count = shape.elem_count();
        let state = match (device.is_cpu(), dtype) {
            (true, DType::F32) => State::Host(CpuStorage::F32(vec![0.0; count])),
            (true, DType::F64) => State::Host(CpuStorage::F64(vec![0.0; count])),
            (false, DType::F32 | DType::F64) => State::Device(Tensor::zeros(&shape, dtype, device)?),
            _ => bail!("classp: expected a parameter in F32 or F64, got {dtype:?}"),
        };
        Ok(GradSum { shape, state })
    }

    /// S as a tensor in the parameter's shape, for a checkpoint.
    pub fn export(&self) -> Result<Tensor> {
        match &self.state {
            State::Host(CpuStorage::F64(sum)) => Tensor::from_slice(sum, &self.shape, &Device::Cpu),
            State::Host(sum) => {
                Tensor::from_slice(f32::cpu_storage_as_slice(sum)?, &self.shape, &Device::Cpu)
            }
            // A copy: a step moves it in place.
            State::Device(sum) => sum.force_contiguous(),
        }
    }

    /// S where it lies on a device, to be moved in place.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(&self) -> Option<&Tensor> {
        match &self.state {
            State::Host(_) => None,
            State::Device(sum) => Some(sum),
        }
    }

    /// The sum that [`GradSum::export`] gave, on the device of the tensor. Errs on a dtype other than f32
    /// and f64.
    pub fn import(sum: &Tensor) -> Result<Self> {
        let flat = || sum.flatten_all()?.contiguous();
        let state = match (sum.device().is_cpu(), sum.dtype()) {
            (true, DType::F32) => State::Host(CpuStorage::F32(flat()?.to_vec1()?)),
            (true, DType::F64) => State::Host(CpuStorage::F64(flat()?.to_vec1()?)),
            (false, DType::F32 | DType::F64) => State::Device(sum.detach().force_contiguous()?),
            (_, found) => bail!("classp: expected a sum in F32 or F64, got {found:?}"),
        };
        Ok(GradSum { shape: sum.shape().clone(), state })
    }

    /// The shape of the parameter.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The dtype of the parameter.
    pub fn dtype(&self) -> DType {
        match &self.state {
            State::Host(CpuStorage::F64(_)) => DType::F64,
            State::Host(_) => DType::F32,
            State::Device(sum) => sum.dtype(),
        }
    }

    /// Its figures, in f64, parts added in index order.
    pub fn figures(&self) -> Result<SumFigures> {
        fn run<T: Real>(sum: &[T]) -> SumFigures {
            let parts: Vec<SumFigures> = sum
                .par_chunks(cpu::GRAIN)
                .map(|part| SumFigures {
                    total: part.iter().map(|s| s.to_f64()).sum(),
                    touched: part.iter().filter(|&&s| s > T::ZERO).count(),
                })
                .collect();
            parts.iter().fold(SumFigures::default(), |all, part| SumFigures {
                total: all.total + part.total,
                touched: all.touched + part.touched,
            })
        }
        match &self.state {
            State::Host(sum) => {
                real!("classp", sum, T => Ok(run(T::cpu_storage_as_slice(sum)?)))
            }
            #[cfg(feature = "cuda")]
            State::Device(sum) if sum.device().is_cuda() && sum.dtype() == DType::F32 => {
                Ok(on_cuda(&[sum])?.first().copied().unwrap_or_default())
            }
            State::Device(sum) => Ok(SumFigures {
                total: sum.to_dtype(DType::F64)?.sum_all()?.to_scalar()?,
                touched: count(&sum.gt(0.0)?)?,
            }),
        }
    }
}

/// The figures of each of `sums`, in one pass for all that lie on a CUDA device.
pub(crate) fn figures(sums: &[&GradSum]) -> Result<Vec<SumFigures>> {
    #[cfg(feature = "cuda")]
    {
        let there = sums.iter().filter_map(|sum| sum.on_device().filter(|s| s.dtype() == DType::F32));
        let there: Vec<&Tensor> = there.filter(|sum| sum.device().is_cuda()).collect();
        if there.len() == sums.len() {
            return on_cuda(&there);
        }
    }
    sums.iter().map(|sum| sum.figures()).collect()
}

#[cfg(feature = "cuda")]
fn on_cuda(sums: &[&Tensor]) -> Result<Vec<SumFigures>> {
    let figures = cuda::Together::default().figures(sums)?;
    Ok(figures.into_iter().map(|(total, touched)| SumFigures { total, touched }).collect())
}

/// How many entries passed in a step.
#[derive(Clone, Debug)]
pub(crate) enum Passed {
    /// Counted.
    Known(usize),
    /// Number so and so of a list on a device, i64.
    #[cfg(feature = "cuda")]
    Listed(Tensor, usize),
}

impl Passed {
    /// The total of several, each list of a device read once.
    pub(crate) fn total<'a>(all: impl Iterator<Item = &'a Passed>) -> Result<usize> {
        let mut total = 0;
        #[cfg(feature = "cuda")]
        let mut read: Vec<(candle_core::TensorId, Vec<i64>)> = Vec::new();
        for passed in all {
            total += match passed {
                Passed::Known(count) => *count,
                #[cfg(feature = "cuda")]
                Passed::Listed(list, i) => {
                    let known = read.iter().position(|(id, _)| *id == list.id());
                    let at = known.map_or_else(
                        || {
                            read.push((list.id(), list.to_vec1()?));
                            Ok::<_, candle_core::Error>(read.len() - 1)
                        },
                        Ok,
                    )?;
                    read[at].1.get(*i).map_or(0, |&count| count as usize)
                }
            };
        }
        Ok(total)
    }
}

/// Entries of a mask that are set.
fn count(mask: &Tensor) -> Result<usize> {
    Ok(mask.to_dtype(DType::U32)?.sum_all()?.to_scalar::<u32>()? as usize)
}

/// The step in plain candle ops: w and S after it, and how many entries passed.
pub fn reference(
    w: &Tensor,
    grad: &Tensor,
    sum: &Tensor,
    params: &ClasspParams,
) -> Result<(Tensor, Tensor, usize)> {
    let p = params;
    let passes = match p.test {
        Test::Entry if p.threshold == 0.0 => grad.abs()?.gt(0.0)?,
        Test::Entry => grad.sqr()?.gt(p.threshold)?,
        Test::Tensor => {
            let any = count(&grad.sqr()?.ne(0.0)?)? > 0;
            let moves = f64::from(u8::from(any)) > p.threshold;
            Tensor::full(u8::from(moves), grad.shape(), grad.device())?
        }
    };
    let power = match p.test {
        Test::Entry => p.power,
        Test::Tensor => 1.0,
    };
    let added = (sum + grad.abs()?.powf(power)?)?;
    let pull = (grad + (w * p.weight_decay)?)?;
    let step = match p.scaling {
        true => ((pull * p.lr)? / (&added + p.epsilon)?.powf(1.0 / p.power)?)?,
        false => (pull * p.lr)?,
    };
    let moved = passes.where_cond(&(w - step)?, w)?;
    Ok((moved, passes.where_cond(&added, sum)?, count(&passes)?))
}

/// A power and its root.
#[derive(Clone, Copy)]
enum Power {
    One,
    Two,
    Half,
    Other(f64),
}

impl Power {
    fn of(p: f64) -> Self {
        match p {
            1.0 => Power::One,
            2.0 => Power::Two,
            0.5 => Power::Half,
            p => Power::Other(p),
        }
    }
}

/// What one step computes with.
#[derive(Clone, Copy)]
struct Factors {
    lr: f64,
    /// `None`: every entry passes.
    threshold: Option<f64>,
    epsilon: f64,
    power: Power,
    /// Whether |g| itself is added at every power.
    plain: bool,
    scaling: bool,
    decay: f64,
}

impl Factors {
    fn new(p: &ClasspParams) -> Self {
        let entry = p.test == Test::Entry;
        Factors {
            lr: p.lr,
            threshold: entry.then_some(p.threshold),
            epsilon: p.epsilon,
            power: Power::of(p.power),
            plain: !entry,
            scaling: p.scaling,
            decay: p.weight_decay,
        }
    }
}

impl ClasspParams {
    /// The factors of a step as the kernel takes them.
    #[cfg(feature = "cuda")]
    pub(crate) fn words(&self) -> [u64; 6] {
        let power = match Power::of(self.power) {
            Power::One => 0,
            Power::Two => 1,
            Power::Half => 2,
            Power::Other(_) => 3,
        };
        // A tensor that is tested whole passes where 1 exceeds the threshold: else no square is large enough.
        let (test, threshold) = match self.test {
            Test::Entry if self.threshold == 0.0 => (1, 0.0),
            Test::Entry => (2, self.threshold),
            Test::Tensor if self.threshold < 1.0 => (0, self.threshold),
            Test::Tensor => (2, f64::INFINITY),
        };
        let plain = u32::from(self.test == Test::Tensor);
        [
            cuda::floats(self.lr, threshold),
            cuda::floats(self.epsilon, self.weight_decay),
            self.power.to_bits(),
            (1.0 / self.power).to_bits(),
            cuda::integers(power, test),
            cuda::integers(plain, u32::from(self.scaling)),
        ]
    }

    /// The kernel that takes steps of which these are one.
    #[cfg(feature = "cuda")]
    pub(crate) fn rule(all: &[ClasspParams]) -> cuda::Rule {
        cuda::Rule::Classp { whole: all.iter().any(|p| p.test == Test::Tensor) }
    }
}

/// The loop over entries, for a power and a root that the compiler knows.
#[inline(always)]
fn walk<T: Real>(
    (w, g, s): (&mut [T], &[T], &mut [T]),
    f: Factors,
    passed: &mut usize,
    power: impl Fn(T) -> T,
    root: impl Fn(T) -> T,
) {
    let of = T::from_f64;
    let (lr, epsilon, decay) = (of(f.lr), of(f.epsilon), of(f.decay));
    // At threshold 0 the square is not asked for: it underflows where the gradient does not.
    let squared = f.threshold.is_some_and(|t| t > 0.0);
    let threshold = of(f.threshold.unwrap_or(0.0));
    let all = f.threshold.is_none();
    for ((w, &g), s) in w.iter_mut().zip(g).zip(s) {
        let size = g.abs();
        let tested = if squared { g * g } else { size };
        let passes = all | (tested > threshold);
        let added = if f.plain { size } else { power(size) };
        // Nothing is added where the test fails, rather than nothing written: stores under a mask run at half the rate
        // from memory.
        let sum = *s + if passes { added } else { T::ZERO };
        let rate = if f.scaling { lr / root(epsilon + sum) } else { lr };
        let step = rate * (g + decay * *w);
        *passed += usize::from(passes);
        *s = sum;
        *w -= if passes { step } else { T::ZERO };
    }
}

simd! {
    fn update<T>(w: &mut [T], g: &[T], s: &mut [T], f: Factors, passed: &mut usize) {
        let at = (w, g, s);
        match f.power {
            Power::One => walk(at, f, passed, |g| g, |s| s),
            Power::Two => walk(at, f, passed, |g| g * g, |s| s.sqrt()),
            Power::Half => walk(at, f, passed, |g| g.sqrt(), |s| s * s),
            Power::Other(p) => {
                let of = |x: T, p: f64| T::from_f64(x.to_f64().powf(p));
                walk(at, f, passed, |g| of(g, p), |s| of(s, 1.0 / p))
            }
        }
    }
}

/// (w, dw): w is updated in place.
struct Classp<'a> {
    factors: Factors,
    // The op is shared while it runs, but the sum changes; the lock is never contended.
    sum: Mutex<&'a mut CpuStorage>,
    passed: AtomicUsize,
}

impl InplaceOp2 for Classp<'_> {
    fn name(&self) -> &'static str {
        "classp"
    }

    fn cpu_fwd(&self, w: &mut CpuStorage, wl: &Layout, g: &CpuStorage, gl: &Layout) -> Result<()> {
        let Some((from, to)) = wl.contiguous_offsets() else {
            bail!("classp: expected a contiguous parameter, got strides {:?}", wl.stride())
        };
        let mut sum = self.sum.lock().unwrap_or_else(|e| e.into_inner());
        fn run<T: Real>(w: &mut [T], g: &[T], s: &mut [T], f: Factors) -> usize {
            w.par_chunks_mut(cpu::GRAIN)
                .zip(g.par_chunks(cpu::GRAIN))
                .zip(s.par_chunks_mut(cpu::GRAIN))
                .map(|((w, g), s)| {
                    let mut passed = 0;
                    update(w, g, s, f, &mut passed);
                    passed
                })
                .sum()
        }
        real!(self.name(), g, T => {
            let g = <T as Real>::slice(self.name(), g, gl)?;
            let (Some(w), Some(s)) = (T::elements_mut(w), T::elements_mut(&mut sum)) else {
                bail!("classp: expected parameter, gradient and sum in one dtype")
            };
            self.passed.store(run(&mut w[from..to], g, s, self.factors), Ordering::Relaxed);
            Ok(())
        })
    }
}

/// Whether any square of `grad` is not zero.
fn any(grad: &Tensor) -> Result<bool> {
    let (storage, layout) = grad.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { return Ok(count(&grad.sqr()?.ne(0.0)?)? > 0) };
    real!("classp", storage, T => {
        Ok(<T as Real>::slice("classp", storage, layout)?.iter().any(|&g| g * g != T::ZERO))
    })
}

/// One CLASSP step of the parameter `w` (f32 or f64, contiguous), in place; `grad` has the shape and dtype
/// of w, `sum` too. Returns how many entries passed the test. Half-precision parameters are refused: steps
/// of a large sum fall below half of their last bit.
pub fn classp_step(w: &Tensor, grad: &Tensor, sum: &mut GradSum, params: &ClasspParams) -> Result<usize> {
    Passed::total([step(w, grad, sum, params)?].iter())
}

/// As [`classp_step`], without waiting for a device's count.
pub(crate) fn step(w: &Tensor, grad: &Tensor, sum: &mut GradSum, params: &ClasspParams) -> Result<Passed> {
    let op = "classp";
    if grad.shape() != w.shape() || sum.shape() != w.shape() {
        bail!(
            "{op}: expected gradient and sum {:?}, got {:?} and {:?}",
            w.dims(),
            grad.dims(),
            sum.shape().dims()
        )
    }
    if !matches!(w.dtype(), DType::F32 | DType::F64) {
        bail!("{op}: expected a parameter in F32 or F64, got {:?}", w.dtype())
    }
    cpu::road(op, &[("w", w), ("grad", grad)])?;
    if sum.dtype() != w.dtype() {
        bail!("{op}: expected the sum in {:?} as w is, got {:?}", w.dtype(), sum.dtype())
    }
    let grad = grad.detach().contiguous()?;
    match &mut sum.state {
        State::Host(s) if w.device().is_cpu() => {
            if params.test == Test::Tensor {
                let moves = f64::from(u8::from(any(&grad)?)) > params.threshold;
                if !moves {
                    return Ok(Passed::Known(0));
                }
            }
            let fused =
                Classp { factors: Factors::new(params), sum: Mutex::new(s), passed: AtomicUsize::new(0) };
            w.inplace_op2(&grad, &fused)?;
            Ok(Passed::Known(fused.passed.into_inner()))
        }
        #[cfg(feature = "cuda")]
        State::Device(s) if w.device().is_cuda() && w.dtype() == DType::F32 => {
            let moved = cuda::Moved { weight: w, grad: &grad, state: [Some(&*s), None], free: None };
            let rule = ClasspParams::rule(std::slice::from_ref(params));
            let left = cuda::Together::default().run(rule, &[moved], &params.words(), None)?;
            Ok(left.passed.map_or(Passed::Known(0), |passed| Passed::Listed(passed, 0)))
        }
        State::Device(s) if w.device().same_device(s.device()) => {
            let (new, s1, passed) = reference(&w.detach(), &grad, s, params)?;
            let count = w.elem_count();
            w.reshape(count)?.slice_set(&new.reshape(count)?, 0, 0)?;
            *s = s1;
            Ok(Passed::Known(passed))
        }
        _ => bail!("{op}: expected the sum on the device of the parameter"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use candle_core::Var;

    const PARAMS: ClasspParams = ClasspParams {
        lr: 0.02,
        threshold: 0.25,
        epsilon: 1e-4,
        power: 1.0,
        scaling: true,
        weight_decay: 0.1,
        test: Test::Entry,
    };

    #[test]
    fn follows_the_reference() {
        for (dtype, tolerance) in [(DType::F32, F32), (DType::F64, F64)] {
            for power in [0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 8.0] {
                for test in [Test::Entry, Test::Tensor] {
                    for (threshold, scaling) in [(0.0, true), (0.25, true), (0.25, false), (1.0, true)] {
                        let params = ClasspParams { power, test, threshold, scaling, ..PARAMS };
                        for shape in [vec![], vec![1], vec![3, 5], vec![7, 13]] {
                            compare(&shape, dtype, &params, tolerance);
                        }
                    }
                }
            }
            compare(&[20_001], dtype, &PARAMS, tolerance);
        }
    }

    fn compare(shape: &[usize], dtype: DType, params: &ClasspParams, tolerance: f64) {
        let w = Var::from_tensor(&values(shape, 1).to_dtype(dtype).unwrap()).unwrap();
        let mut sum = GradSum::zeros(shape, dtype, &Device::Cpu).unwrap();
        let (mut want, mut s) = (w.as_tensor().copy().unwrap().detach(), sum.export().unwrap());
        for step in 1..=4 {
            let g = values(shape, 10 + step).to_dtype(dtype).unwrap();
            let passed = classp_step(&w, &g, &mut sum, params).unwrap();
            let count;
            (want, s, count) = reference(&want, &g, &s, params).unwrap();
            assert_eq!(passed, count, "{params:?}");
        }
        close("parameter", &w, &want, tolerance);
        // Sums of squares and higher powers reach some hundreds.
        close("sum", &sum.export().unwrap(), &s, tolerance);
        let figures = sum.figures().unwrap();
        let all = flat(&s);
        assert_eq!(figures.touched, all.iter().filter(|&&s| s > 0.0).count());
        let total: f64 = all.iter().sum();
        assert!((figures.total - total).abs() <= tolerance * (1.0 + total), "{} {total}", figures.total);
    }

    #[test]
    fn by_hand() {
        // Squares 9, 0.04, 0.25 against 0.25: the first alone passes, strictly.
        let w = Var::new(&[1f64, -2.0, 4.0], &Device::Cpu).unwrap();
        let g = Tensor::new(&[3f64, -0.2, 0.5], &Device::Cpu).unwrap();
        let mut sum = GradSum::zeros(3, DType::F64, &Device::Cpu).unwrap();
        let params = ClasspParams { lr: 0.5, epsilon: 1.0, weight_decay: 0.25, ..PARAMS };
        assert_eq!(classp_step(&w, &g, &mut sum, &params).unwrap(), 1);
        // s = 0.5 / (1 + 3); w = 1 - s (3 + 0.25)
        assert_eq!(flat(&w), [1.0 - 0.125 * 3.25, -2.0, 4.0]);
        assert_eq!(flat(&sum.export().unwrap()), [3.0, 0.0, 0.0]);
        // Without scaling the step is lr g, and the sum grows all the same.
        let plain = ClasspParams { scaling: false, weight_decay: 0.0, ..params };
        classp_step(&w, &g, &mut sum, &plain).unwrap();
        assert_eq!(flat(&w), [1.0 - 0.125 * 3.25 - 1.5, -2.0, 4.0]);
        assert_eq!(flat(&sum.export().unwrap()), [6.0, 0.0, 0.0]);
    }

    #[test]
    fn at_threshold_zero_the_smallest_gradient_passes_and_zero_does_not() {
        let w = Var::new(&[1f32, 1.0], &Device::Cpu).unwrap();
        // Its square underflows.
        let g = Tensor::new(&[1e-30f32, 0.0], &Device::Cpu).unwrap();
        let mut sum = GradSum::zeros(2, DType::F32, &Device::Cpu).unwrap();
        let params = ClasspParams { threshold: 0.0, weight_decay: 0.0, scaling: false, ..PARAMS };
        assert_eq!(classp_step(&w, &g, &mut sum, &params).unwrap(), 1);
        assert_eq!(sum.export().unwrap().to_vec1::<f32>().unwrap(), [1e-30, 0.0]);
        let bad = Tensor::new(&[f32::NAN, f32::NAN], &Device::Cpu).unwrap();
        for threshold in [0.0, 0.25] {
            let params = ClasspParams { threshold, ..params };
            assert_eq!(classp_step(&w, &bad, &mut sum, &params).unwrap(), 0);
        }
        assert_eq!(w.to_vec1::<f32>().unwrap(), [1.0, 1.0]);
    }

    #[test]
    fn threads_change_nothing() {
        for power in [1.0, 2.0, 3.0] {
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    let shape = [50_001];
                    let w = Var::from_tensor(&values(&shape, 1).to_dtype(DType::F32).unwrap()).unwrap();
                    let mut sum = GradSum::zeros(50_001, DType::F32, &Device::Cpu).unwrap();
                    let params = ClasspParams { power, ..PARAMS };
                    let g = |i| values(&shape, i).to_dtype(DType::F32).unwrap();
                    let passed: Vec<usize> =
                        (1..4).map(|i| classp_step(&w, &g(i), &mut sum, &params).unwrap()).collect();
                    let figures = sum.figures().unwrap();
                    let sum = sum.export().unwrap().to_vec1::<f32>().unwrap();
                    (w.to_vec1::<f32>().unwrap(), sum, passed, figures)
                })
            };
            let one = run(1);
            assert!(one == run(2) && one == run(5));
        }
    }

    #[test]
    fn wrong_arguments_are_named() {
        let w = values(&[3], 1);
        let mut sum = GradSum::zeros(3, DType::F64, &Device::Cpu).unwrap();
        let mut message =
            |w: &Tensor, g: &Tensor| classp_step(w, g, &mut sum, &PARAMS).unwrap_err().to_string();
        assert!(message(&w, &values(&[4], 1)).contains("[4]"));
        let single = w.to_dtype(DType::F32).unwrap();
        assert!(message(&w, &single).contains("F32"));
        assert!(message(&single, &single).contains("F64"));
        let half = w.to_dtype(DType::BF16).unwrap();
        assert!(message(&half, &half).contains("BF16"));
        assert!(GradSum::zeros(3, DType::BF16, &Device::Cpu).unwrap_err().to_string().contains("BF16"));
        assert!(GradSum::import(&half).unwrap_err().to_string().contains("BF16"));
    }
}
