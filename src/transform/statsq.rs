//! StatsQ: weights on a mid-rise grid whose scale comes from the row's own statistics.
//!
//! `s_r = 2 mean_k |W_rk|`, `k = clamp(rne(n clamp(W/s, -1, 1) - 1/2), -n, n - 1)`,
//! `Ŵ = s (k + 1/2) / n` with `n = 2^(bits-1)`; the gradient of `W` is that of `Ŵ`, whole.
//! Liu et al. 2023, "Oscillation-free quantization for low-bit vision transformers", section 4.1, as
//! the published code has it (the bound 2 is a constant there, the scale detached).

use std::sync::Arc;

use candle_core::Tensor;

use crate::weights::{Centering, Grid, Quantized, Transform};
use crate::{kernels, Result};

/// The StatsQ weight quantizer: no trainables, no state. While it is annealed (confidence-guided, section
/// 4.4 of the paper) only weights within a band of steps around their thresholds get a gradient.
#[derive(Clone, Copy, Debug)]
pub struct StatsQ {
    grid: Grid,
    band: Option<f64>,
}

impl StatsQ {
    /// At `bits` bits, 2 to 8 (from 5 bits up the fixed clip at twice the mean costs accuracy).
    pub fn new(bits: u8) -> Result<Self> {
        Ok(StatsQ { grid: Grid::new(bits, Centering::MidRise)?, band: None })
    }
}

impl Transform for StatsQ {
    fn kind(&self) -> &'static str {
        "statsq"
    }

    fn apply(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let (w, bits) = (&inputs[0], self.grid.bits);
        let flat = rows(w)?;
        let y = match self.band {
            None => kernels::statsq(&flat, bits)?,
            Some(band) => kernels::statsq_annealed(&flat, bits, band)?,
        };
        Ok(y.reshape(w.shape())?)
    }

    fn gate(&self, inputs: &[Tensor]) -> Result<Option<Tensor>> {
        let Some(band) = self.band else { return Ok(None) };
        let free = kernels::statsq_free(&rows(&inputs[0])?, self.grid.bits, band)?;
        Ok(Some(free.reshape(inputs[0].shape())?))
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
        let w = &inputs[0];
        let flat = rows(w)?;
        // n is a power of two: s / n is exact, and the values come out as `apply` gives them.
        let n = f64::from(1u32 << (self.grid.bits - 1));
        Ok(Some(Quantized {
            codes: kernels::statsq_codes(&flat, self.grid.bits)?.reshape(w.shape())?,
            step: (kernels::statsq_scale(&flat)? / n)?,
            axis: Some(0),
            grid: self.grid,
        }))
    }
}

/// A weight of any shape as rows, one for each output.
fn rows(w: &Tensor) -> Result<Tensor> {
    let rows = w.dim(0)?;
    Ok(w.reshape((rows, w.elem_count() / rows.max(1)))?)
}
