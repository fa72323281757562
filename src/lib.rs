//! qtune makes transformers small and teaches them new things, on a laptop's CPU or a GPU, without
//! Python.
//!
//! Its one idea: a weight is an expression. It is stored, or computed from other weights, and it can
//! be read in two ways that must agree: `w.tensor()`, the dense matrix that any candle model takes,
//! and `w.matmul(x)`, which avoids building it.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use qtune::transform::StatsQ;
//! use qtune::weights::Weight;
//!
//! # fn main() -> qtune::Result<()> {
//! let w = Tensor::new(&[[0.5f32, -0.1, 0.2, -0.4], [0.1, 0.1, -0.3, 0.7]], &Device::Cpu)?;
//! let x = Tensor::new(&[[1f32, 2.0, 3.0, 4.0]], &Device::Cpu)?;
//! let quantized = Weight::latent(&w)?.wrap(std::sync::Arc::new(StatsQ::new(2)?));
//! let dense = x.matmul(&quantized.tensor()?.t()?)?;
//! let fast = quantized.matmul(&x)?;
//! assert!((dense - fast)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-6);
//! # Ok(())
//! # }
//! ```

#![warn(missing_docs)]
#![deny(unsafe_code)]

pub mod ablation;
pub mod adapter;
pub mod bench;
pub mod continual;
pub mod data;
pub mod device;
pub mod error;
pub mod export;
pub mod files;
pub mod hub;
mod import;
pub mod kernels;
pub mod language;
pub mod memory;
pub mod models;
pub mod optim;
pub mod quantize;
pub mod random;
pub mod recipe;
pub mod report;
pub mod select;
pub mod threads;
pub mod train;
pub mod transform;
pub mod weights;

pub use error::{Error, On, Result};
pub use import::var_builder;
