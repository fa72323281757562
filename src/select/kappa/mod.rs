//! KappaTune: which weights to train, by their condition numbers (O. Ludwig, "The Condition Number as a
//! Scale-Invariant Proxy for Information Encoding in Neural Units", arXiv 2506.16289).
//!
//! A linear unit whose singular values lie close together passes most of what comes in, and is taken to have room;
//! one whose singular values are spread is taken to be specialised and is left alone. So the units of the
//! lowest `kappa = sigma_1 / sigma_q` are trained and the rest stays frozen. What that measure does not see: all singular
//! values but two (`score = "logvol"` looks at every one), that shape decides most of it (`normalize = "shape"`), and
//! that rounding to 16 bits moves the small ones.
//!
//! `stored` widens numbers, `lanczos` and `routes` find the ends of a spectrum, `spectrum` says what is kept of it;
//! `units` finds the matrices of a model, `source` reads them, `analyse` goes through all, `cache` remembers; `config`
//! and `choose` select, `file` and `picture` show.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use qtune::select::kappa::{analyse, choose, generic_roles, total_params, units, KappaConfig, Options};
//! use qtune::train::Quiet;
//! use qtune::weights::Weights;
//!
//! # fn main() -> qtune::Result<()> {
//! let steep = Tensor::new(&[[9f32, 0.0], [0.0, 1.0]], &Device::Cpu)?;
//! let even = Tensor::new(&[[2f32, 0.0], [0.0, 1.0]], &Device::Cpu)?;
//! let weights = Weights::from_tensors([("a.weight".into(), steep), ("b.weight".into(), even)]);
//! let units = units(&weights, &generic_roles)?;
//! let scored = analyse(&weights, &units, &Options::default(), None, &Quiet)?;
//! let config = KappaConfig { tensors: Some(1), ..KappaConfig::default() };
//! let chosen = choose(&scored, total_params(&weights)?, &config, 0)?;
//! assert_eq!((units[chosen[0]].key().as_str(), scored[chosen[0]].spectrum.kappa()), ("b.weight", Some(2.0)));
//! # Ok(())
//! # }
//! ```

pub mod analyse;
pub mod cache;
pub mod choose;
pub mod config;
pub mod file;
mod lanczos;
pub mod picture;
mod routes;
pub mod source;
pub mod spectrum;
pub mod stored;
pub mod units;

pub use analyse::{analyse, content_hash, model_hash, singular_values, Options, Scored};
pub use cache::Cache;
pub use choose::{
    choose, choose_with_notes, gaussian_deficit, gaussian_kappa, low_rank_for, rank, score, Chosen,
};
pub use config::{Budget, Fit, KappaConfig, Normalize, Order, Score};
pub use file::{Entry, Selection};
pub use spectrum::{Route, Spectrum, Status};
pub use stored::{Float, Matrix};
pub use units::{
    generic_roles, llama_roles, split_fused, tie, total_params, units, vision_roles, Kind, Role, Roles, Unit,
};

#[cfg(test)]
mod tests;
