//! What the tests share: the device, inputs, comparisons.

use candle_core::{DType, Device, Result, Tensor, Var};
use qtune::kernels::tape;

/// The first CUDA device, or nothing and a line that says so.
pub fn device() -> Option<Device> {
    match qtune::device::cuda(0) {
        Ok(device) => Some(device),
        Err(error) => {
            let error = error.to_string();
            eprintln!("skipped: no CUDA device: {}", error.lines().next().unwrap_or_default());
            None
        }
    }
}

/// f32 on the device against f32 on the CPU, relative to 1 + |want|: both round each sum in an order of their own.
pub const F32: f64 = 2e-5;
/// f16 against f32 on the same rounded inputs: four roundings of 2^-11.
pub const F16: f64 = 2e-3;
/// bf16 against f32 on the same rounded inputs: four roundings of 2^-8.
pub const BF16: f64 = 1.6e-2;

/// Element types and how near a result in them comes.
pub const TYPES: [(DType, f64); 3] = [(DType::F32, F32), (DType::F16, F16), (DType::BF16, BF16)];

/// Values in (-2, 2), the same for the same seed, in f32 on the CPU.
pub fn values(shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
    let count = shape.iter().product::<usize>();
    let draw = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 4.0
    };
    Tensor::from_vec((0..count).map(draw).collect::<Vec<f32>>(), shape, &Device::Cpu).unwrap()
}

/// The elements in f64.
pub fn flat(t: &Tensor) -> Vec<f64> {
    let t = t.to_device(&Device::Cpu).unwrap();
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Every element of `got` within `tolerance * (1 + |want|)`, a NaN where one is wanted.
#[track_caller]
pub fn close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.dims(), want.dims(), "{what}: shape");
    for (i, (g, w)) in flat(got).into_iter().zip(flat(want)).enumerate() {
        // Written so that a NaN fails where none is wanted.
        let near = (g - w).abs() <= tolerance * (1.0 + w.abs()) || g == w || (g.is_nan() && w.is_nan());
        assert!(near, "{what}: element {i}: got {g}, want {w}, tolerance {tolerance}");
    }
}

/// The bits of all elements, for what must be equal.
pub fn bits(t: &Tensor) -> Vec<u64> {
    flat(t).into_iter().map(f64::to_bits).collect()
}

pub type Op<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

/// The result of `op` on variables and the gradient in each of its sum under weights that are rounded to `like`, first by
/// candle's walk, then by a tape.
pub fn run(inputs: &[Tensor], like: DType, op: Op) -> [Vec<Tensor>; 2] {
    let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = op(&tensors).unwrap();
    let weight = values(y.dims(), 77).to_dtype(like).unwrap().to_dtype(y.dtype()).unwrap();
    let weight = weight.to_device(y.device()).unwrap();
    let found = (&y * &weight).unwrap().sum_all().unwrap().backward().unwrap();
    let mut walked = vec![y.detach()];
    walked.extend(vars.iter().map(|v| found.get(v).expect("a gradient for every input").clone()));
    let (y, tape) = tape::record(|| op(&tensors)).unwrap();
    let leaves: Vec<&Tensor> = tensors.iter().collect();
    let mut found = tape.onward(&y, weight, &leaves).unwrap();
    let mut taped = vec![y.detach()];
    taped.extend(
        leaves.into_iter().map(|x| found.remove(x).expect("a gradient for every input under a tape")),
    );
    [walked, taped]
}

/// Values and gradients of `op` on the device in f32, f16 and bf16 against `reference` on the CPU in f32, of inputs
/// that are rounded alike; `slack` is a factor on the tolerances, for long sums of halves.
#[track_caller]
pub fn agrees_within(device: &Device, inputs: &[Tensor], slack: f64, op: Op, reference: Op) {
    for (dtype, tolerance) in TYPES {
        let rounded: Vec<Tensor> = inputs.iter().map(|t| t.to_dtype(dtype).unwrap()).collect();
        let there: Vec<Tensor> = rounded.iter().map(|t| t.to_device(device).unwrap()).collect();
        let here: Vec<Tensor> = rounded.iter().map(|t| t.to_dtype(DType::F32).unwrap()).collect();
        let [want, _] = run(&here, dtype, reference);
        let tolerance = if dtype == DType::F32 { tolerance } else { tolerance * slack };
        for (how, got) in ["candle's walk", "a tape"].into_iter().zip(run(&there, dtype, op)) {
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                assert_eq!(got.dtype(), dtype);
                let what = format!(
                    "{dtype:?}, {how}, result (0) or gradient of input {i} of {:?}",
                    inputs[0].dims()
                );
                close(&what, got, want, tolerance);
            }
        }
        // The same again, to the bit.
        let [again, _] = run(&there, dtype, op);
        let [first, _] = run(&there, dtype, op);
        for (a, b) in first.iter().zip(&again) {
            assert_eq!(bits(a), bits(b), "{dtype:?}: a second run differs");
        }
    }
}

/// [`agrees_within`] the tolerances as they are.
#[track_caller]
pub fn agrees(device: &Device, inputs: &[Tensor], op: Op, reference: Op) {
    agrees_within(device, inputs, 1.0, op, reference);
}
