//! The rules that make a weight of other weights, and how recipes name them.

pub mod activation;
pub mod bone;
pub mod dora;
pub mod dropout;
pub mod embedding;
mod groups;
pub mod least_squares;
pub mod lora;
pub mod lsq;
pub mod miss;
pub mod pissa;
pub mod qk;
pub mod sign;
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
pub use sign::{sign, Sign};
pub use statsq::StatsQ;

use crate::weights::{Centering, Grid, Transform};
use crate::{Error, Result};

/// A weight quantizer, as `[[transform]]` in a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightQuant {
    /// Scale from the statistics of the row or group, straight-through gradient ([`StatsQ`]).
    Statsq,
    /// Learned step for each row, or group of columns within it ([`Lsq`]).
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

    /// The rule for training, started from the weight `w`; `group` columns of a row share a step, none:
    /// all of them.
    pub fn training(self, bits: u8, group: Option<usize>, w: &Tensor) -> Result<Arc<dyn Transform>> {
        let grid = self.grid(bits)?;
        Ok(match self {
            WeightQuant::Statsq => Arc::new(StatsQ::grouped(grid.bits, group)?),
            WeightQuant::Lsq => Arc::new(Lsq::start(grid.bits, group, w)?),
        })
    }

    /// The rule for packing without training: the step of least squared error for each row or group.
    pub fn untrained(self, bits: u8, group: Option<usize>, w: &Tensor) -> Result<Arc<dyn Transform>> {
        Ok(Arc::new(OnGrid::fit(self.grid(bits)?, group, w)?))
    }
}
