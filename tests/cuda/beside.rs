//! Comparisons of ops whose trained operands stay f32 beside halves, and of what they refuse.

use crate::device::{bits, close, run, Op, TYPES};
use candle_core::{DType, Device, Result, Tensor};

/// As [`crate::device::agrees_within`] for an op of which `halves` alone take the type, and `floats`, behind them, stay
/// f32, as what is trained does; gradients are of the type of their input.
#[track_caller]
pub fn agrees_beside(
    device: &Device,
    halves: &[Tensor],
    floats: &[Tensor],
    slack: f64,
    op: Op,
    reference: Op,
) {
    for (dtype, tolerance) in TYPES {
        let mut rounded: Vec<Tensor> = halves.iter().map(|t| t.to_dtype(dtype).unwrap()).collect();
        rounded.extend(floats.iter().cloned());
        let there: Vec<Tensor> = rounded.iter().map(|t| t.to_device(device).unwrap()).collect();
        let here: Vec<Tensor> = rounded.iter().map(|t| t.to_dtype(DType::F32).unwrap()).collect();
        let [want, _] = run(&here, dtype, reference);
        let tolerance = if dtype == DType::F32 { tolerance } else { tolerance * slack };
        for (how, got) in ["candle's walk", "a tape"].into_iter().zip(run(&there, dtype, op)) {
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                let what = format!(
                    "{dtype:?}, {how}, result (0) or gradient of input {i} of {:?}",
                    halves[0].dims()
                );
                assert_eq!(got.dtype(), if i > halves.len() { DType::F32 } else { dtype }, "{what}");
                close(&what, got, want, tolerance);
            }
        }
        let ([first, _], [again, _]) = (run(&there, dtype, op), run(&there, dtype, op));
        for (a, b) in first.iter().zip(&again) {
            assert_eq!(bits(a), bits(b), "{dtype:?}: a second run differs");
        }
    }
}

/// The first line of an op's error.
#[track_caller]
pub fn refusal<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("expected an error"),
        Err(error) => error.to_string().lines().next().unwrap_or_default().to_string(),
    }
}
