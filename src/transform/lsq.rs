//! LSQ weights: one learned step for each row on a signed grid; the baseline that StatsQ is measured
//! against.
//!
//! `q = rne(clamp(W/s, -n, n - 1))`, `Ŵ = q s`; the gradient of `W` is masked outside the range, that
//! of `s` is `g Σ dŴ (q - v)` inside, the clipped code outside, `g = 1 / sqrt((n - 1) m)`.
//! Esser et al. 2020, "Learned step size quantization", equations 1 to 3.

use std::sync::Arc;

use candle_core::{Tensor, Var};

use crate::weights::{Centering, Grid, Quantized, Role, Transform};
use crate::{kernels, Result};

/// Smallest step that the forward pass uses (ofq.md 2.1).
pub(super) const STEP_FLOOR: f64 = 1e-5;

/// The LSQ weight quantizer.
#[derive(Clone, Debug)]
pub struct Lsq {
    grid: Grid,
    step: Tensor,
}

impl Lsq {
    /// Starts the step of each row of `w` at `2 mean|w| / sqrt(n - 1)`.
    pub fn start(bits: u8, w: &Tensor) -> Result<Self> {
        let grid = Grid::new(bits, Centering::Signed)?;
        let step = kernels::lsq_init(&w.detach(), grid.levels(), Some(0), 2.0)?;
        Ok(Lsq { grid, step: Var::from_tensor(&step)?.as_tensor().clone() })
    }

    /// With the steps that training gave, one for each row.
    pub fn trained(bits: u8, step: &Tensor) -> Result<Self> {
        let grid = Grid::new(bits, Centering::Signed)?;
        Ok(Lsq { grid, step: Var::from_tensor(step)?.as_tensor().clone() })
    }
}

impl Transform for Lsq {
    fn kind(&self) -> &'static str {
        "lsq"
    }

    fn apply(&self, inputs: &[Tensor]) -> Result<Tensor> {
        Ok(kernels::lsq(&inputs[0], &self.step, None, self.grid.levels(), Some(0))?)
    }

    fn params(&self) -> Vec<(&'static str, Var, Role)> {
        trainable("scale", &self.step, Role::Plain).into_iter().collect()
    }

    fn tensors(&self) -> Vec<(&'static str, Tensor)> {
        vec![("scale", self.step.detach())]
    }

    fn frozen(&self) -> Result<Arc<dyn Transform>> {
        Ok(Arc::new(Lsq { grid: self.grid, step: self.step.copy()?.detach() }))
    }

    fn grid(&self) -> Option<Grid> {
        Some(self.grid)
    }

    fn quantize(&self, inputs: &[Tensor]) -> Result<Option<Quantized>> {
        let step = self.step.detach();
        let codes = kernels::lsq_codes(&inputs[0], &step, None, self.grid.levels(), Some(0))?;
        Ok(Some(Quantized { codes, step: step.maximum(STEP_FLOOR)?, axis: Some(0), grid: self.grid }))
    }
}

/// The trainable behind `tensor` where it is one.
pub(super) fn trainable(
    suffix: &'static str,
    tensor: &Tensor,
    role: Role,
) -> Option<(&'static str, Var, Role)> {
    // `Var::from_tensor` of a variable shares its storage.
    if !tensor.is_variable() {
        return None;
    }
    Var::from_tensor(tensor).ok().map(|var| (suffix, var, role))
}
