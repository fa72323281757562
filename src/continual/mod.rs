//! Tasks learned one after another, and what is lost on the way.

pub mod metrics;
