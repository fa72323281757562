//! What a quantized layer looks like while it is trained: where its weights lie between the thresholds,
//! how its codes are spread, how often they and their gradients turn (ofq.md 5).
//!
//! With `u = w / step - offset` the codes are `rne(u)` and the thresholds `k + 1/2`, `k` every code but the
//! highest. Distances are in steps.

use candle_core::{DType, Tensor};
use serde_json::{json, Map, Value};

use super::oscillation::Track;
use crate::weights::{Gate, Weight};
use crate::Result;

/// The distances to a threshold whose shares are reported.
const NEAR: [(&str, f32); 4] = [("0.003", 0.003), ("0.005", 0.005), ("0.007", 0.007), ("0.01", 0.01)];
/// The one of them inside which turns of the gradient are counted.
const TURNS_WITHIN: f32 = 0.005;
/// Bins of the histogram of distances, over half a step.
const BINS: usize = 20;
/// Rows of a layer, or groups of columns of its rows, whose scale is followed.
const ROWS: usize = 4;

fn flat(t: &Tensor) -> Result<Vec<f32>> {
    Ok(t.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?)
}

fn share(count: usize, of: usize) -> f64 {
    if of == 0 {
        0.0
    } else {
        count as f64 / of as f64
    }
}

/// Entropy of shares, in bits.
fn entropy(shares: &[f64]) -> f64 {
    -shares.iter().filter(|p| **p > 0.0).map(|p| p * p.log2()).sum::<f64>()
}

/// The figures of one quantized weight, as a line of metrics.jsonl holds them; `None` where it is not on
/// a grid with a step for each row, or for each group of a row's columns.
pub fn figures(name: &str, weight: &Weight, track: &Track, gate: Option<&Gate>) -> Result<Option<Value>> {
    let (Some(before), Some(quantized)) = (weight.before(), weight.quantize()?) else { return Ok(None) };
    let w = flat(&before.tensor()?)?;
    let (codes, steps) = (flat(&quantized.codes)?, flat(&quantized.step)?);
    let groups = quantized.groups();
    let rows = codes.len() / groups.cols().max(1);
    if steps.is_empty() || steps.len() != rows * groups.count() || w.len() != codes.len() {
        return Ok(None);
    }
    let count = w.len();
    let levels = quantized.grid.levels();
    let offset = if levels.half { 0.5 } else { 0.0 };
    let mut near = [0usize; NEAR.len()];
    let mut bins = [0usize; BINS];
    let mut at_level = vec![0usize; (levels.hi - levels.lo + 1) as usize];
    let (mut within, mut turned) = (0usize, 0usize);
    for (i, (&w, &code)) in w.iter().zip(&codes).enumerate() {
        let level = (code as i32 - levels.lo).clamp(0, levels.hi - levels.lo);
        at_level[level as usize] += 1;
        let step = steps[groups.step_of(i)];
        if step < f32::MIN_POSITIVE {
            // A row of zeros has no thresholds: as far away as can be.
            bins[BINS - 1] += 1;
            continue;
        }
        let u = w / step - offset;
        let threshold = u.floor().clamp(levels.lo as f32, (levels.hi - 1) as f32) + 0.5;
        let distance = (u - threshold).abs();
        for (count, (_, limit)) in near.iter_mut().zip(NEAR) {
            *count += usize::from(distance <= limit);
        }
        let bin = (distance * 2.0 * BINS as f32) as usize;
        bins[bin.min(BINS - 1)] += 1;
        if distance <= TURNS_WITHIN {
            within += 1;
            turned += usize::from(track.gradient_turned(i));
        }
    }
    let shares = |counts: &[usize]| counts.iter().map(|&n| share(n, count)).collect::<Vec<f64>>();
    let level_shares = shares(&at_level);
    let rows: Vec<usize> = (0..ROWS.min(steps.len()))
        .map(|i| if steps.len() <= ROWS { i } else { i * (steps.len() - 1) / (ROWS - 1) })
        .collect();
    // A scale, not a step: s = n step, the clip bound of StatsQ.
    let n = f64::from(levels.lo.unsigned_abs().max(1));
    let scales: Vec<f64> = rows.iter().map(|&r| f64::from(steps[r]) * n).collect();
    let frozen = match gate {
        Some(gate) if gate.held => json!(100.0 * (1.0 - mean(&gate.free)?)),
        _ => Value::Null,
    };
    let near: Map<String, Value> =
        NEAR.iter().zip(near).map(|((key, _), n)| (key.to_string(), json!(share(n, count)))).collect();
    Ok(Some(json!({
        "name": name,
        "bits": quantized.grid.bits,
        "codes": count,
        "oscillation": 100.0 * track.oscillating(),
        "osc_ema_mean": track.ema_mean(),
        "flip_rate": share(track.changed(), count),
        "near_threshold": near,
        "grad_flip_rate": if track.has_gradient() && within > 0 { json!(share(turned, within)) } else { Value::Null },
        "frozen": frozen,
        "scale_rows": rows,
        "scales": scales,
        "entropy": entropy(&level_shares),
        "levels": level_shares,
        "distance": shares(&bins),
    })))
}

/// The mean of a gate: the share of entries that are free.
pub fn mean(free: &Tensor) -> Result<f64> {
    let sum = free.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
    Ok(sum / free.elem_count().max(1) as f64)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::Device;

    use super::*;
    use crate::transform::StatsQ;

    #[test]
    fn one_row_by_hand() {
        // Mean magnitude 1/2: s = 1, thresholds -1/2, 0, 1/2, a step of 1/2.
        let w = Tensor::new(&[[0.0f32, 0.001, 0.25, -0.75, 1.0, -0.999]], &Device::Cpu).unwrap();
        let weight = Weight::latent(&w).unwrap().wrap(Arc::new(StatsQ::new(2).unwrap()));
        let mut track = Track::default();
        track.observe(&flat(&weight.quantize().unwrap().unwrap().codes).unwrap(), 0.5);
        let found = figures("w", &weight, &track, None).unwrap().unwrap();
        assert_eq!((&found["bits"], &found["codes"]), (&json!(2), &json!(6)));
        // The tie at 0 goes to the even code 0; 0.001 is 0.002 steps from a threshold.
        assert_eq!(found["levels"], json!([2.0 / 6.0, 0.0, 3.0 / 6.0, 1.0 / 6.0]));
        assert_eq!(found["near_threshold"]["0.003"], json!(2.0 / 6.0));
        assert_eq!(found["distance"][0], json!(2.0 / 6.0));
        // 0.25 and -0.75 lie half a step away, the clipped ones a whole step.
        assert_eq!(found["distance"][BINS - 1], json!(4.0 / 6.0));
        assert_eq!((&found["frozen"], &found["grad_flip_rate"]), (&Value::Null, &Value::Null));
        assert!((found["scales"][0].as_f64().unwrap() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn entropy_of_even_shares() {
        assert_eq!((entropy(&[0.25; 4]), entropy(&[1.0, 0.0])), (2.0, 0.0));
    }
}
