//! StatsQ: weights on a mid-rise grid whose scale comes from the row's own statistics, or from those of
//! each group of its columns.
//!
//! `s_r = 2 mean_k |W_rk|`, `k = clamp(rne(n clamp(W/s, -1, 1) - 1/2), -n, n - 1)`,
//! `Ŵ = s (k + 1/2) / n` with `n = 2^(bits-1)`; the gradient of `W` is that of `Ŵ`, whole.
//! Liu et al. 2023, "Oscillation-free quantization for low-bit vision transformers", section 4.1, as
//! the published code has it (the bound 2 is a constant there, the scale detached).

use std::sync::Arc;

use candle_core::Tensor;

use super::groups::Split;
use crate::weights::{Centering, Grid, Quantized, Transform};
use crate::{kernels, Result};

/// The StatsQ weight quantizer: no trainables, no state. While it is annealed (confidence-guided, section
/// 4.4 of the paper) only weights within a band of steps around their thresholds get a gradient.
#[derive(Clone, Copy, Debug)]
pub struct StatsQ {
    grid: Grid,
    /// Columns that share a scale; none: the whole row.
    group: Option<usize>,
    band: Option<f64>,
}

impl StatsQ {
    /// At `bits` bits, 2 to 8 (from 5 bits up the fixed clip at twice the mean costs accuracy).
    pub fn new(bits: u8) -> Result<Self> {
        StatsQ::grouped(bits, None)
    }

    /// As [`StatsQ::new`], with a scale for every `group` columns of a row; none: for the whole row. The
    /// last group of a row holds what is left.
    pub fn grouped(bits: u8, group: Option<usize>) -> Result<Self> {
        Ok(StatsQ { grid: Grid::new(bits, Centering::MidRise)?, group, band: None })
    }
}

impl Transform for StatsQ {
    fn kind(&self) -> &'static str {
        "statsq"
    }

    fn apply(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let (w, bits) = (&inputs[0], self.grid.bits);
        Split::of(w, self.group)?.map(w, |rows| {
            Ok(match self.band {
                None => kernels::statsq(rows, bits)?,
                Some(band) => kernels::statsq_annealed(rows, bits, band)?,
            })
        })
    }

    fn gate(&self, inputs: &[Tensor]) -> Result<Option<Tensor>> {
        let (Some(band), w) = (self.band, &inputs[0]) else { return Ok(None) };
        let free = |rows: &Tensor| Ok(kernels::statsq_free(rows, self.grid.bits, band)?);
        Split::of(w, self.group)?.map(w, free).map(Some)
    }

    fn calmed(&self, band: Option<f64>) -> Option<Arc<dyn Transform>> {
        Some(Arc::new(StatsQ { band, ..*self }))
    }

    fn frozen(&self) -> Result<Arc<dyn Transform>> {
        Ok(Arc::new(*self))
    }

    fn grid(&self) -> Option<Grid> {
        Some(self.grid)
    }

    fn quantize(&self, inputs: &[Tensor]) -> Result<Option<Quantized>> {
        let (w, bits) = (&inputs[0], self.grid.bits);
        let split = Split::of(w, self.group)?;
        // n is a power of two: s / n is exact, and the values come out as `apply` gives them.
        let n = f64::from(1u32 << (bits - 1));
        Ok(Some(Quantized {
            codes: split.map(w, |rows| Ok(kernels::statsq_codes(rows, bits)?))?,
            step: split.find_steps(w, |rows| Ok((kernels::statsq_scale(rows)? / n)?))?,
            axis: Some(0),
            group: split.group(),
            grid: self.grid,
        }))
    }
}
