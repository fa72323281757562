//! A grid laid over a finished weight: for packing without training.
//!
//! StatsQ's scale, twice the mean magnitude, is made for training: laid over a finished weight it
//! clips a tenth of a Gaussian. Here the step of each row is the one of least squared error, found by
//! a sweep over the row's range and then by turns of rounding and regression (Lloyd's iteration with
//! levels tied to a grid).

use std::sync::Arc;

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use crate::kernels::{self, Levels};
use crate::weights::{Grid, Quantized, Transform};
use crate::Result;

/// A weight rounded to a grid of given steps; nothing in it is trainable.
#[derive(Clone, Debug)]
pub struct OnGrid {
    grid: Grid,
    step: Tensor,
}

impl OnGrid {
    /// Lays `grid` over `w [rows, ..]` with the step of least squared error for each row.
    pub fn fit(grid: Grid, w: &Tensor) -> Result<Self> {
        let rows = w.dim(0)?;
        let cols = w.elem_count() / rows.max(1);
        let values = w.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let levels = grid.levels();
        let step: Vec<f32> = values.par_chunks(cols.max(1)).map(|row| best_step(row, levels)).collect();
        Ok(OnGrid { grid, step: Tensor::from_vec(step, rows, w.device())? })
    }

    fn codes(&self, w: &Tensor) -> Result<Tensor> {
        let rows = w.dim(0)?;
        let flat = w.reshape((rows, w.elem_count() / rows.max(1)))?;
        Ok(kernels::quantize(&flat, &self.step, self.grid.levels())?)
    }
}

/// The step that minimises `Σ (w - step (k + offset))²` with `k` rounded to the grid.
fn best_step(row: &[f32], levels: Levels) -> f32 {
    let largest = row.iter().fold(0f32, |m, w| m.max(w.abs()));
    if largest == 0.0 {
        return 0.0;
    }
    let offset = if levels.half { 0.5f64 } else { 0.0 };
    let reach = f64::from(levels.hi) + offset;
    // Rounds at one step; returns the error and the step that regression gives for these codes.
    let turn = |step: f64| {
        let (mut wl, mut ll, mut error) = (0f64, 0f64, 0f64);
        for &w in row {
            let w = f64::from(w);
            let k = (w / step - offset).round_ties_even();
            let level = k.clamp(f64::from(levels.lo), f64::from(levels.hi)) + offset;
            wl += w * level;
            ll += level * level;
            error += (w - step * level).powi(2);
        }
        (error, if ll > 0.0 { wl / ll } else { step })
    };
    let mut best = (f64::INFINITY, 0f64);
    for i in 1..=40 {
        let mut step = f64::from(largest) / reach * f64::from(i) / 40.0;
        for _ in 0..8 {
            let (error, next) = turn(step);
            if error < best.0 {
                best = (error, step);
            }
            if next <= 0.0 || (next - step).abs() <= 1e-9 * step {
                break;
            }
            step = next;
        }
    }
    best.1 as f32
}

impl Transform for OnGrid {
    fn kind(&self) -> &'static str {
        "on_grid"
    }

    fn apply(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let codes = self.codes(&inputs[0])?;
        let dense = kernels::dequantize(&codes, &self.step, self.grid.levels())?;
        Ok(dense.reshape(inputs[0].shape())?)
    }

    fn frozen(&self) -> Result<Arc<dyn Transform>> {
        Ok(Arc::new(self.clone()))
    }

    fn grid(&self) -> Option<Grid> {
        Some(self.grid)
    }

    fn quantize(&self, inputs: &[Tensor]) -> Result<Option<Quantized>> {
        let codes = self.codes(&inputs[0])?.reshape(inputs[0].shape())?;
        Ok(Some(Quantized { codes, step: self.step.clone(), axis: Some(0), grid: self.grid }))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::random::Random;
    use crate::weights::Centering;

    #[test]
    fn weights_on_a_grid_are_found_exactly() {
        let grid = Grid::new(2, Centering::MidRise).unwrap();
        let w = Tensor::new(&[[0.3f32, -0.1, 0.1, -0.3], [0., 0., 0., 0.]], &Device::Cpu).unwrap();
        let rule = OnGrid::fit(grid, &w).unwrap();
        let error =
            (rule.apply(std::slice::from_ref(&w)).unwrap() - &w).unwrap().abs().unwrap().max_all().unwrap();
        assert!(error.to_scalar::<f32>().unwrap() < 1e-7);
    }

    #[test]
    fn better_than_statsq_on_a_gaussian_and_near_the_known_optimum() {
        let mut random = Random::new(3, "weights", &[]);
        let row: Vec<f32> = (0..400_000).map(|_| random.normal()).collect();
        let w = Tensor::from_vec(row, (1, 400_000), &Device::Cpu).unwrap();
        let error = |rule: &dyn Transform| {
            let d = (rule.apply(std::slice::from_ref(&w)).unwrap() - &w)
                .unwrap()
                .sqr()
                .unwrap()
                .mean_all()
                .unwrap();
            d.to_scalar::<f32>().unwrap()
        };
        // Max (1960), table II: the uniform 4- and 16-level quantizers of a unit Gaussian leave
        // 0.1188 and 0.01154.
        for (bits, known) in [(2, 0.1188f32), (4, 0.01154)] {
            let grid = Grid::new(bits, Centering::MidRise).unwrap();
            let fitted = error(&OnGrid::fit(grid, &w).unwrap());
            assert!((fitted / known - 1.0).abs() < 0.03, "{bits} bits: {fitted}, known {known}");
            assert!(fitted <= error(&super::super::StatsQ::new(bits).unwrap()));
        }
    }
}
