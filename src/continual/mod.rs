//! Learning on without forgetting.

pub mod field;
