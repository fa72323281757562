//! A grid laid over a finished weight: for packing without training.
//!
//! StatsQ's scale, twice the mean magnitude, is made for training: laid over a finished weight it
//! clips a tenth of a Gaussian. Here the step of each row, or of each group of its columns, is the one of
//! least squared error ([`kernels::best_step`]).

use std::sync::Arc;

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::groups::Split;
use crate::kernels;
use crate::weights::{Grid, Quantized, Transform};
use crate::Result;

/// A weight rounded to a grid of given steps; nothing in it is trainable.
#[derive(Clone, Debug)]
pub struct OnGrid {
    grid: Grid,
    /// Columns that share a step; none: the whole row.
    group: Option<usize>,
    /// `[rows]`, or `[rows, groups]` where there are several.
    step: Tensor,
}

impl OnGrid {
    /// Lays `grid` over `w [rows, ..]` with the step of least squared error for each row, or for each
    /// `group` of its columns.
    pub fn fit(grid: Grid, group: Option<usize>, w: &Tensor) -> Result<Self> {
        let levels = grid.levels();
        let w = w.detach().to_dtype(DType::F32)?;
        let step = Split::of(&w, group)?.find_steps(&w, |rows| {
            let (n, width) = rows.dims2()?;
            let values = rows.flatten_all()?.to_vec1::<f32>()?;
            let step: Vec<f32> =
                values.par_chunks(width).map(|row| kernels::best_step(row, levels)).collect();
            Ok(Tensor::from_vec(step, n, rows.device())?)
        })?;
        Ok(OnGrid { grid, group, step })
    }

    fn codes(&self, w: &Tensor) -> Result<Tensor> {
        let levels = self.grid.levels();
        let split = Split::of(w, self.group)?;
        split.map_steps(w, &self.step, |w, step| Ok(kernels::quantize(w, step, levels)?))
    }
}

impl Transform for OnGrid {
    fn kind(&self) -> &'static str {
        "on_grid"
    }

    fn apply(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let (codes, levels) = (self.codes(&inputs[0])?, self.grid.levels());
        let split = Split::of(&codes, self.group)?;
        split.map_steps(&codes, &self.step, |codes, step| Ok(kernels::dequantize(codes, step, levels)?))
    }

    fn frozen(&self) -> Result<Arc<dyn Transform>> {
        Ok(Arc::new(self.clone()))
    }

    fn grid(&self) -> Option<Grid> {
        Some(self.grid)
    }

    fn quantize(&self, inputs: &[Tensor]) -> Result<Option<Quantized>> {
        let codes = self.codes(&inputs[0])?;
        let group = Split::of(&codes, self.group)?.group();
        Ok(Some(Quantized { codes, step: self.step.clone(), axis: Some(0), group, grid: self.grid }))
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
        let rule = OnGrid::fit(grid, None, &w).unwrap();
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
            let fitted = error(&OnGrid::fit(grid, None, &w).unwrap());
            assert!((fitted / known - 1.0).abs() < 0.03, "{bits} bits: {fitted}, known {known}");
            assert!(fitted <= error(&super::super::StatsQ::new(bits).unwrap()));
        }
    }
}
