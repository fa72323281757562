//! Adapters as files: PEFT's directories, read, put on a model, collected, written and merged.
//!
//! An [`Adapter`] is a configuration and named tensors, independent of any model. [`Adapter::attach`]
//! wraps the weights of a store in the rules that the tensors belong to ([`crate::transform`]),
//! [`Adapter::of`] collects them out of a trained store, [`Adapter::save`] writes what PEFT loads, and
//! [`merge`] folds adapters into a model's directory. Everything is strict: each tensor of a file is
//! used exactly once, each chosen module has its tensors.
//!
//! The contract, down to file names and rules of selection, was taken from PEFT 0.18 and 0.21.

mod attach;
#[cfg(test)]
mod attach_tests;
mod change;
mod collect;
mod config;
mod fields;
mod files;
mod lora_export;
mod merge;
mod method;
mod modules;
mod names;
mod pattern;
mod pissa;
mod place;
mod record;
mod respell;
mod start;
mod targets;
mod turned;

pub use attach::{Attach, Attached, Residual, Training};
pub use change::{Changes, Rounding};
pub use config::AdapterConfig;
pub use files::{Adapter, Save};
pub use merge::{merge, Merge, Merged, Onto};
pub use method::{LoraConfig, Method, MissConfig, Variant};
pub use modules::{Kind, Module, Modules};
pub use names::{Form, Part, PREFIX};
pub use pattern::Pattern;
pub use record::{unmerge, MergedAdapter, Record};
pub use start::Started;
pub use targets::{Bias, Chosen, Selection, Targets};

use crate::weights::Transform;

/// The rules that adapters are, by the names they give themselves.
const KINDS: [&str; 7] = ["miss", "mini", "bat", "lora", "dora", "embedding_lora", turned::KIND];

/// Whether a rule is an adapter's.
fn is_adapter(rule: &dyn Transform) -> bool {
    KINDS.contains(&rule.kind())
}
