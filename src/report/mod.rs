//! The report of a run: `report.html`, one page that needs nothing but itself, and event files for
//! TensorBoard. Both are made of the run's folder alone, whatever the command.
//!
//! `collect` reads the folder, `series` and `text` make curves and numbers small enough to show, `svg`,
//! `bars` and `heat` draw, `html` and `table` write the page.

mod bars;
mod collect;
mod heat;
mod html;
pub mod layers;
pub(crate) mod series;
pub(crate) mod svg;
mod table;
mod tasks;
pub mod tensorboard;
pub(crate) mod text;

use std::path::Path;

use serde_json::Value;

use crate::{files, Result};

/// The name of a run's page.
pub const FILE_NAME: &str = "report.html";

/// Writes the page of the run in the folder `dir`, whole or not at all.
pub fn write(dir: &Path) -> Result<()> {
    let run = collect::Run::read(dir, None)?;
    files::write_bytes(&dir.join(FILE_NAME), html::page(&run).as_bytes())
}

/// As [`write`], with the figures of a run that ends here: summary.json itself is what says that a run
/// is over, and is written last.
pub fn finish(dir: &Path, summary: &Value) -> Result<()> {
    let run = collect::Run::read(dir, Some(summary))?;
    files::write_bytes(&dir.join(FILE_NAME), html::page(&run).as_bytes())
}

#[cfg(test)]
mod tests;
