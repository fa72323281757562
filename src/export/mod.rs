//! The same model in another form: a plain Hugging Face directory, or one GGUF file for llama.cpp and
//! what is built on it.
//!
//! Packed weights become the values that they stand for. A form that cannot say what a model does is
//! refused, with what it lacks; it is never written without a word.

mod gguf;
mod header;
mod llama;
mod plain;
mod vocab;

pub use gguf::{export_gguf, Encoding, Gguf, GgufOptions};
pub use header::{Header, Kind, TensorInfo, Value};
pub use plain::{export_plain, Plain};
