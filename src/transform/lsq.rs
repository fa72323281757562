//! LSQ weights: one learned step for each row, or each group of its columns, on a signed grid; the
//! baseline that StatsQ is measured against.
//!
//! `q = rne(clamp(W/s, -n, n - 1))`, `Ŵ = q s`; the gradient of `W` is masked outside the range, that
//! of `s` is `g Σ dŴ (q - v)` inside, the clipped code outside, `g = 1 / sqrt((n - 1) m)`.
//! Esser et al. 2020, "Learned step size quantization", equations 1 to 3.

use std::sync::Arc;

use candle_core::{Tensor, Var};

use super::groups::Split;
use crate::weights::{Centering, Grid, Quantized, Role, Transform};
use crate::{kernels, Result};

/// Smallest step that the forward pass uses (ofq.md 2.1).
pub(super) const STEP_FLOOR: f64 = 1e-5;

/// The LSQ weight quantizer.
#[derive(Clone, Debug)]
pub struct Lsq {
    grid: Grid,
    /// Columns that share a step; none: the whole row.
    group: Option<usize>,
    /// `[rows]`, or `[rows, groups]` where there are several.
    step: Tensor,
}

impl Lsq {
    /// Starts the step of each row of `w`, or of each `group` of its columns, at `2 mean|w| / sqrt(n - 1)`.
    pub fn start(bits: u8, group: Option<usize>, w: &Tensor) -> Result<Self> {
        let grid = Grid::new(bits, Centering::Signed)?;
        let w = w.detach();
        let first = |rows: &Tensor| Ok(kernels::lsq_init(rows, grid.levels(), Some(0), 2.0)?);
        let step = match group {
            None => first(&w)?,
            Some(_) => Split::of(&w, group)?.find_steps(&w, first)?,
        };
        Ok(Lsq { grid, group, step: Var::from_tensor(&step)?.as_tensor().clone() })
    }

    /// With the steps that training gave, one for each row.
    pub fn trained(bits: u8, step: &Tensor) -> Result<Self> {
        let grid = Grid::new(bits, Centering::Signed)?;
        Ok(Lsq { grid, group: None, step: Var::from_tensor(step)?.as_tensor().clone() })
    }
}

impl Transform for Lsq {
    fn kind(&self) -> &'static str {
        "lsq"
    }

    fn apply(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let (w, levels) = (&inputs[0], self.grid.levels());
        let rule = |w: &Tensor, step: &Tensor| Ok(kernels::lsq(w, step, None, levels, Some(0))?);
        match self.group {
            None => rule(w, &self.step),
            Some(_) => Split::of(w, self.group)?.map_steps(w, &self.step, rule),
        }
    }

    fn params(&self) -> Vec<(&'static str, Var, Role)> {
        trainable("scale", &self.step, Role::Plain).into_iter().collect()
    }

    fn tensors(&self) -> Vec<(&'static str, Tensor)> {
        vec![("scale", self.step.detach())]
    }

    fn frozen(&self) -> Result<Arc<dyn Transform>> {
        Ok(Arc::new(Lsq { step: self.step.copy()?.detach(), ..*self }))
    }

    fn grid(&self) -> Option<Grid> {
        Some(self.grid)
    }

    fn quantize(&self, inputs: &[Tensor]) -> Result<Option<Quantized>> {
        let (w, step, levels) = (&inputs[0], self.step.detach(), self.grid.levels());
        let split = Split::of(w, self.group)?;
        let codes =
            split.map_steps(w, &step, |w, step| Ok(kernels::lsq_codes(w, step, None, levels, Some(0))?))?;
        let (step, group) = (step.maximum(STEP_FLOOR)?, split.group());
        Ok(Some(Quantized { codes, step, axis: Some(0), group, grid: self.grid }))
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
