//! Tasks that are learned one after another, and what each method does so that the earlier ones stay:
//! nothing (plain training), CLASSP, elastic weight consolidation, replay, KappaTune, the posterior of
//! binary weights.
//!
//! All run through the one trainer: a task is a phase of it. What a method adds is a penalty on the loss
//! (`ewc`, `field`), other samples (`stretch`), a choice of weights (`select`), or an optimizer whose state
//! outlives the task. `road` walks from task to task, `boundary` is what lies between two of them, `metrics`
//! are the figures of the whole.

mod boundary;
pub mod ewc;
pub mod field;
pub mod metrics;
mod plan;
mod road;
mod select;
mod stretch;
pub mod tasks;

pub use plan::{plan, Plan, PlannedTask};
pub use road::{config, open, run};
