//! The rules that make a weight of other weights, and how recipes name them.

pub mod activation;
pub mod bone;
pub mod dora;
pub mod dropout;
pub mod embedding;
pub mod least_squares;
pub mod lora;
pub mod lsq;
pub mod miss;
pub mod pissa;
pub mod qk;
pub mod statsq;

use std::sync::Arc;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

pub use activation::ActQuant;
pub use bone::Bat;
pub use dora::Dora;
pub use dropout::Dropout;
pub use embedding::EmbeddingLora;
pub use least_squares::OnGrid;
pub use lora::{Lora, LoraInit};
pub use lsq::Lsq;
pub use miss::{Mini, Miss, MissInit};
pub use qk::{reparameterize, QkProduct};
pub use statsq::StatsQ;

use crate::weights::{Centering, Grid, Transform};
use crate::{Error, Result};

/// A weight quantizer, as `[[transform]]` in a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightQuant {
    /// Scale from the row's statistics, straight-through gradient ([`StatsQ`]).
    Statsq,
    /// Learned step for each row ([`Lsq`]).
    Lsq,
}

impl WeightQuant {
    /// The grid that it puts weights on at `bits` bits.
    pub fn grid(self, bits: u8) -> Result<Grid> {
        if !matches!(bits, 2 | 3 | 4 | 8) {
            return Err(Error::usage(format!("bits = {bits}: expected 2, 3, 4 or 8")));
        }
        match self {
            WeightQuant::Statsq => Grid::new(bits, Centering::MidRise),
            WeightQuant::Lsq => Grid::new(bits, Centering::Signed),
        }
    }

    /// The rule for training, started from the weight `w`.
    pub fn training(self, bits: u8, w: &Tensor) -> Result<Arc<dyn Transform>> {
        let grid = self.grid(bits)?;
        Ok(match self {
            WeightQuant::Statsq => Arc::new(StatsQ::new(grid.bits)?),
            WeightQuant::Lsq => Arc::new(Lsq::start(grid.bits, w)?),
        })
    }

    /// The rule for packing without training: the step of least squared error for each row.
    pub fn untrained(self, bits: u8, w: &Tensor) -> Result<Arc<dyn Transform>> {
        Ok(Arc::new(OnGrid::fit(self.grid(bits)?, w)?))
    }
}
