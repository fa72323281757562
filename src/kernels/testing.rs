//! What the tests of the ops share: inputs, comparisons with a reference, with finite differences
//! and across thread counts, and their tolerances.

use super::tape;
use candle_core::{DType, Device, Result, Tensor, Var};

/// f32 against the reference in f32, relative to 1 + |want|: a few hundred roundings of 6e-8.
pub const F32: f64 = 2e-5;
/// f64 against the reference in f64: the same number of roundings of 1e-16.
pub const F64: f64 = 1e-12;
/// bf16 against f32 on the same rounded inputs: two roundings of the result, 2^-9 each.
pub const BF16: f64 = 8e-3;
/// Central differences at step [`STEP`] in f64: STEP^2 times a third derivative, and 1e-16 / STEP.
pub const DIFFERENCE: f64 = 1e-6;
const STEP: f64 = 1e-5;

/// Values in (-2, 2), the same for the same seed, in f64.
pub fn values(shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
    let count = shape.iter().product::<usize>();
    let data: Vec<f64> = (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 11) as f64 / (1u64 << 53) as f64 - 0.5) * 4.0
        })
        .collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

/// The elements in f64.
pub fn flat(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
pub fn close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.dims(), want.dims(), "{what}: shape");
    for (i, (g, w)) in flat(got).into_iter().zip(flat(want)).enumerate() {
        // Written so that a NaN fails.
        let near = (g - w).abs() <= tolerance * (1.0 + w.abs());
        assert!(near, "{what}: element {i}: got {g}, want {w}, tolerance {tolerance}");
    }
}

/// The result of `op` on variables, and the gradient of its weighted sum for each.
pub fn run(inputs: &[Tensor], op: &dyn Fn(&[Tensor]) -> Result<Tensor>) -> Vec<Tensor> {
    let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = op(&tensors).unwrap();
    let weight = values(y.dims(), 77).to_dtype(y.dtype()).unwrap();
    let grads = (&y * &weight).unwrap().sum_all().unwrap().backward().unwrap();
    let mut out = vec![y.detach()];
    out.extend(vars.iter().map(|v| grads.get(v).expect("a gradient for every input").clone()));
    // The same under a tape, which lets go of what an op says that its backward does not read.
    let (y, tape) = tape::record(|| op(&tensors)).unwrap();
    let leaves: Vec<&Tensor> = tensors.iter().collect();
    let mut taped = tape.onward(&y, weight, &leaves).unwrap();
    for (leaf, want) in leaves.into_iter().zip(&out[1..]) {
        let got = taped.remove(leaf).expect("a gradient for every input under a tape");
        close("under a tape", &got, want, if want.dtype() == DType::F64 { F64 } else { F32 });
    }
    out
}

/// Values and gradients against the reference in f32 and f64, and in bf16 against f32.
#[track_caller]
pub fn agrees(
    inputs: &[Tensor],
    op: &dyn Fn(&[Tensor]) -> Result<Tensor>,
    reference: &dyn Fn(&[Tensor]) -> Result<Tensor>,
) {
    let cast = |inputs: &[Tensor], d| inputs.iter().map(|t| t.to_dtype(d).unwrap()).collect::<Vec<_>>();
    for (dtype, tolerance) in [(DType::F32, F32), (DType::F64, F64)] {
        let inputs = cast(inputs, dtype);
        for (i, (got, want)) in run(&inputs, op).iter().zip(run(&inputs, reference)).enumerate() {
            assert_eq!(got.dtype(), dtype);
            close(&format!("{dtype:?} result (0) or gradient of input {i}"), got, &want, tolerance);
        }
    }
    let half = cast(inputs, DType::BF16);
    let (got, want) = (op(&half).unwrap(), op(&cast(&half, DType::F32)).unwrap());
    assert_eq!(got.dtype(), DType::BF16);
    close("bf16 result", &got, &want, BF16);
}

/// Every gradient against central finite differences, in f64.
#[track_caller]
pub fn differentiates(inputs: &[Tensor], op: &dyn Fn(&[Tensor]) -> Result<Tensor>) {
    let analytic = run(inputs, op);
    let weight = values(analytic[0].dims(), 77);
    let loss = |inputs: &[Tensor]| {
        (op(inputs).unwrap() * &weight).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
    };
    for (which, input) in inputs.iter().enumerate() {
        let base = flat(input);
        let moved = |i: usize, by: f64| {
            let mut data = base.clone();
            data[i] += by;
            let mut all = inputs.to_vec();
            all[which] = Tensor::from_vec(data, input.shape(), &Device::Cpu).unwrap();
            loss(&all)
        };
        let numeric: Vec<f64> =
            (0..base.len()).map(|i| (moved(i, STEP) - moved(i, -STEP)) / (2.0 * STEP)).collect();
        let numeric = Tensor::from_vec(numeric, input.shape(), &Device::Cpu).unwrap();
        close(&format!("gradient of input {which}"), &analytic[which + 1], &numeric, DIFFERENCE);
    }
}

/// Every gradient against differences over a step of one, in f32, for an op that is linear in each input
/// alone: there a long step is exact but for rounding.
#[track_caller]
pub fn linear_in_each(inputs: &[Tensor], op: &dyn Fn(&[Tensor]) -> Result<Tensor>) {
    let analytic = run(inputs, op);
    let weight = flat(&values(analytic[0].dims(), 77).to_dtype(DType::F32).unwrap());
    let loss = |inputs: &[Tensor]| -> f64 {
        flat(&op(inputs).unwrap()).iter().zip(&weight).map(|(y, w)| y * w).sum()
    };
    for (which, input) in inputs.iter().enumerate() {
        let base = input.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let moved = |i: usize, by: f32| {
            let mut data = base.clone();
            data[i] += by;
            let mut all = inputs.to_vec();
            all[which] = Tensor::from_vec(data, input.shape(), &Device::Cpu).unwrap();
            loss(&all)
        };
        let numeric: Vec<f64> = (0..base.len()).map(|i| moved(i, 0.5) - moved(i, -0.5)).collect();
        // The sums that cancel in a difference are larger than it: relative to the largest entry.
        let scale = numeric.iter().fold(1f64, |m, v| m.max(v.abs()));
        let numeric = Tensor::from_vec(numeric, input.shape(), &Device::Cpu).unwrap();
        let (got, want) = ((&analytic[which + 1] / scale).unwrap(), (numeric / scale).unwrap());
        close(&format!("gradient of input {which}"), &got, &want, 10.0 * F32);
    }
}

/// Value and gradients in f32, to the bit, on 1, 2 and 5 threads.
#[track_caller]
pub fn ignores_threads(inputs: &[Tensor], op: &(dyn Fn(&[Tensor]) -> Result<Tensor> + Sync)) {
    let inputs: Vec<Tensor> = inputs.iter().map(|t| t.to_dtype(DType::F32).unwrap()).collect();
    let bits = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run(&inputs, op))
            .iter()
            .map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap())
            .map(|v| v.into_iter().map(f32::to_bits).collect::<Vec<_>>())
            .collect::<Vec<_>>()
    };
    let one = bits(1);
    for threads in [2, 5] {
        for (i, (a, b)) in one.iter().zip(bits(threads)).enumerate() {
            assert!(a == &b, "{threads} threads change output {i}");
        }
    }
}

/// The first line of an op's error.
#[track_caller]
pub fn refusal(result: Result<Tensor>) -> String {
    result.expect_err("an error").to_string().lines().next().unwrap_or_default().to_string()
}
