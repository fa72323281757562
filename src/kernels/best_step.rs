//! The step that a grid should have for weights that are given: for packing without training.
//!
//! ```text
//! best    min over s of Σ (w - s (k + offset))²,   k = clamp(rne(w / s - offset), lo, hi)
//! absmax  max |w| / (hi + offset): nothing is clipped
//! ```
//!
//! The error is not convex in the step. Of 40 starts over the range of the weights, the last of them the
//! absmax step, the best few are followed: rounding and regression by turns (Lloyd's iteration with levels
//! tied to a grid) until the step stays.

use super::cpu::simd;
use super::fake_quant::{code, grid_rows};
use super::Levels;

/// Starts over the range of the weights.
const STARTS: usize = 40;
/// How many of them are followed: more than 4 found nothing better on Gaussian groups.
const FOLLOWED: usize = 4;
/// Turns from each of these at the most.
const TURNS: usize = 8;
/// Accumulators of a sum; part of the numerics.
const LANES: usize = 8;

simd! {
    /// `sums = [Σ w l, Σ l², Σ (w - s l)²]` with `l` the level nearest to `w / s`.
    fn turn<T>(w: &[T], step: T, levels: Levels, sums: &mut [T; 3]) {
        let (lo, hi) = (T::from_f64(f64::from(levels.lo)), T::from_f64(f64::from(levels.hi)));
        let offset = T::from_f64(levels.offset());
        let inverse = T::ONE / step;
        let (mut wl, mut ll, mut error) = ([T::ZERO; LANES], [T::ZERO; LANES], [T::ZERO; LANES]);
        // Whole blocks first, then what is left: the same body, its length known where it matters.
        let (blocks, tail) = w.as_chunks::<LANES>();
        for block in blocks {
            for i in 0..LANES {
                let (w, level) = (block[i], code(block[i] * inverse - offset, lo, hi) + offset);
                let rest = w - step * level;
                wl[i] += w * level;
                ll[i] += level * level;
                error[i] += rest * rest;
            }
        }
        for (i, &w) in tail.iter().enumerate() {
            let level = code(w * inverse - offset, lo, hi) + offset;
            let rest = w - step * level;
            wl[i] += w * level;
            ll[i] += level * level;
            error[i] += rest * rest;
        }
        for (sum, lanes) in sums.iter_mut().zip([wl, ll, error]) {
            *sum = lanes.iter().fold(T::ZERO, |sum, &lane| sum + lane);
        }
    }
}

fn largest(w: &[f32]) -> f32 {
    w.iter().fold(0f32, |m, w| m.max(w.abs()))
}

/// The step at which the outermost level reaches the largest magnitude of `w`; 0 for zeros.
pub fn absmax_step(w: &[f32], levels: Levels) -> f32 {
    (f64::from(largest(w)) / (f64::from(levels.hi) + levels.offset())) as f32
}

/// The step of least squared error for `w`, as far as the search finds it; 0 for zeros.
pub fn best_step(w: &[f32], levels: Levels) -> f32 {
    let largest = largest(w);
    if largest == 0.0 {
        return 0.0;
    }
    let wide: Vec<f64> = w.iter().map(|&w| f64::from(w)).collect();
    let reach = f64::from(levels.hi) + levels.offset();
    // The error at a step, and the step that regression gives for the codes there.
    let at = |step: f64| {
        let mut sums = [0f64; 3];
        turn(&wide, step, levels, &mut sums);
        let [wl, ll, error] = sums;
        (error, if ll > 0.0 { wl / ll } else { step })
    };
    let mut best = (f64::INFINITY, 0f64);
    let mut starts = [(f64::INFINITY, 0f64); STARTS];
    for (i, start) in starts.iter_mut().enumerate() {
        let step = f64::from(largest) / reach * (i + 1) as f64 / STARTS as f64;
        *start = at(step);
        if start.0 < best.0 {
            best = (start.0, step);
        }
    }
    starts.sort_by(|a, b| a.0.total_cmp(&b.0));
    for &(_, first) in starts.iter().take(FOLLOWED) {
        let mut step = first;
        for _ in 0..TURNS {
            // What lies wholly on the other side of zero of an unsigned grid leads here.
            if step <= 0.0 {
                break;
            }
            let (error, next) = at(step);
            if error < best.0 {
                best = (error, step);
            }
            if (next - step).abs() <= 1e-9 * step {
                break;
            }
            step = next;
        }
    }
    best.1 as f32
}

/// Writes the codes of `w` on one step, and gives the squared error that they leave, its largest part
/// apart: `(Σ (w - ŵ)², max |w - ŵ|)`. A step below the smallest normal f32 makes zeros of codes 0.
pub fn round_to(w: &[f32], step: f32, levels: Levels, codes: &mut [f32]) -> (f64, f64) {
    if w.is_empty() {
        return (0.0, 0.0);
    }
    grid_rows(w, &[step], w.len(), levels, true, codes);
    let step = if step < f32::MIN_POSITIVE { 0.0 } else { step };
    let offset = levels.offset() as f32;
    w.iter().zip(codes).fold((0f64, 0f64), |(sum, largest), (&w, &mut k)| {
        let error = f64::from(w) - f64::from(step * (k + offset));
        (sum + error * error, largest.max(error.abs()))
    })
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;
    use crate::kernels::{dequantize, quantize};
    use crate::random::Random;

    fn weights(n: usize, seed: u64) -> Vec<f32> {
        let mut random = Random::new(seed, "weights", &[n as u64]);
        (0..n).map(|_| random.normal()).collect()
    }

    fn grids() -> impl Iterator<Item = Levels> {
        (2..=8).flat_map(|b| [Levels::mid_rise(b), Levels::signed(b)])
    }

    #[test]
    fn codes_and_errors_are_those_of_the_quantizers() {
        for levels in grids() {
            for n in [1, 7, 8, 64, 77] {
                let w = weights(n, 1);
                let step = best_step(&w, levels);
                let mut codes = vec![0f32; n];
                let (error, most) = round_to(&w, step, levels, &mut codes);
                let tensor = Tensor::from_slice(&w, (1, n), &Device::Cpu).unwrap();
                let step = Tensor::new(&[step], &Device::Cpu).unwrap();
                let expected = quantize(&tensor, &step, levels).unwrap();
                assert_eq!(expected.to_vec2::<f32>().unwrap(), [codes]);
                let values = dequantize(&expected, &step, levels).unwrap().to_vec2::<f32>().unwrap();
                let errors = w.iter().zip(&values[0]).map(|(w, v)| f64::from(*w) - f64::from(*v));
                let (sum, largest) = errors.fold((0f64, 0f64), |(s, m), e| (s + e * e, m.max(e.abs())));
                assert_eq!((error, most), (sum, largest), "{levels:?} {n}");
            }
        }
    }

    #[test]
    fn no_step_of_a_fine_sweep_is_much_better() {
        // The error jumps with the codes: what a sweep of 4000 steps finds may be a little better, and much
        // where there are more levels than weights.
        for levels in grids() {
            for n in [3, 16, 64, 100] {
                let w = weights(n, 2);
                let mut codes = vec![0f32; n];
                let (found, _) = round_to(&w, best_step(&w, levels), levels, &mut codes);
                let absmax = absmax_step(&w, levels);
                let at = |i: i32| absmax * 1.1 * i as f32 / 4000.0;
                let (error, _) = round_to(&w, absmax, levels, &mut codes);
                assert!(found <= error * (1.0 + 1e-6), "{levels:?} {n}: {found}, absmax {error}");
                if levels.hi > 7 {
                    continue;
                }
                let least = (1..=4000).map(|i| round_to(&w, at(i), levels, &mut codes).0);
                let least = least.fold(f64::INFINITY, f64::min);
                assert!(found <= 1.05 * least + 1e-9, "{levels:?} {n}: found {found}, a sweep {least}");
            }
        }
    }

    #[test]
    fn zeros_and_one_weight() {
        let mut codes = [9f32; 3];
        for levels in grids() {
            assert_eq!((best_step(&[0.0; 3], levels), absmax_step(&[0.0; 3], levels)), (0.0, 0.0));
            assert_eq!(round_to(&[0.0; 3], 0.0, levels, &mut codes), (0.0, 0.0));
            assert_eq!(codes, [0.0; 3]);
            let (error, _) = round_to(&[-0.7], best_step(&[-0.7], levels), levels, &mut codes);
            assert!(error < 1e-12, "{levels:?}: {error}");
        }
        // 2 bits without a zero: the levels ±1/2, ±3/2 of a step.
        assert_eq!(absmax_step(&[-3.0, 1.0], Levels::mid_rise(2)), 2.0);
        assert_eq!(absmax_step(&[-3.0, 1.0], Levels::signed(3)), 1.0);
    }
}
