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

/// The StatsQ weight quantizer: no trainables, no state.
#[derive(Clone, Copy, Debug)]
pub struct StatsQ {
    grid: Grid,
}

impl StatsQ {
    /// At `bits` bits, 2 to 8 (from 5 bits up the fixed clip at twice the mean costs accuracy).
    pub fn new(bits: u8) -> Result<Self> {
        Ok(StatsQ { grid: Grid::new(bits, Centering::MidRise)? })
    }
}

impl Transform for StatsQ {
    fn kind(&self) -> &'static str {
        "statsq"
    }

    fn apply(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let w = &inputs[0];
        let rows = w.dim(0)?;
        let flat = w.reshape((rows, w.elem_count() / rows.max(1)))?;
        Ok(kernels::statsq(&flat, self.grid.bits)?.reshape(w.shape())?)
    }

    fn frozen(&self) -> Result<Arc<dyn Transform>> {
        Ok(Arc::new(*self))
    }

    fn quantize(&self, inputs: &[Tensor]) -> Result<Option<Quantized>> {
        let w = &inputs[0];
        let rows = w.dim(0)?;
        let flat = w.reshape((rows, w.elem_count() / rows.max(1)))?;
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
