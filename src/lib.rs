//! qtune makes transformers small and teaches them new things.

pub mod error;
pub mod random;

pub use error::{Error, On, Result};
