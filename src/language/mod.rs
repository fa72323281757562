//! The roads of language models: adapted to a text (`qtune finetune`) and quantized with it (`qtune quantize`),
//! under the trainer that images have too.

mod adapt;
mod choice;
pub mod generate;
mod pack;
mod phases;
pub mod plan;
mod start;
mod supply;
mod task;
mod write;

use std::path::Path;
use std::time::Instant;

use candle_core::Device;
use serde_json::{json, Map, Value};

use crate::recipe::Recipe;
use crate::train::{peak_rss_bytes, Progress};
use crate::{files, kernels, report, Error, Result};

pub use adapt::pack_base;
pub use start::{attach, open, open_at, open_text, source, start, tiny, Start};
pub use supply::{evaluate_text, text_figures, Texts};
pub use task::{batch_loss, Predict, Rows};
pub use write::write_language_model;

/// Runs a recipe for a language model in the folder `dir`, which exists and holds the resolved recipe; from
/// its latest checkpoint where it has one. Returns what summary.json holds.
pub fn run(recipe: &Recipe, dir: &Path, device: &Device, progress: &dyn Progress) -> Result<Value> {
    kernels::set_arithmetic(recipe.train.products);
    let started = Instant::now();
    match recipe.adapts() {
        true => adapt::run(recipe, dir, device, progress, started),
        false => pack::run(recipe, dir, device, progress, started),
    }
}

/// The number that an answer ends with: behind `####` as GSM8K writes it, else the last one; commas,
/// currency signs and a last full stop left out.
pub fn final_number(text: &str) -> Option<String> {
    let tail = text.rsplit_once("####").map_or(text, |(_, tail)| tail);
    let word = match text.contains("####") {
        true => tail.split_whitespace().next(),
        false => tail.split_whitespace().rev().find(|word| word.contains(|c: char| c.is_ascii_digit())),
    }?;
    let number: String = word.chars().filter(|c| c.is_ascii_digit() || matches!(c, '.' | '-')).collect();
    let number = number.trim_end_matches('.');
    (!number.is_empty()).then(|| number.to_string())
}

/// The figures that every summary.json has.
fn summary_head(
    recipe: &Recipe,
    command: &str,
    method: &str,
    start: &Start,
    wall_s: f64,
    device: &Device,
) -> Map<String, Value> {
    let head = json!({
        "command": command,
        "method": method,
        "recipe": recipe.name,
        "model": start.name,
        "seed": recipe.seed,
        "device": crate::device::name(device),
        "threads": rayon::current_num_threads(),
        "wall_s": wall_s,
        "peak_rss_bytes": peak_rss_bytes(),
        "params_total": start.config.params(),
        "version": env!("CARGO_PKG_VERSION"),
        "commit": env!("QTUNE_COMMIT"),
    });
    let mut head = head.as_object().cloned().unwrap_or_default();
    head.extend(
        crate::device::peak_bytes(device).map(|bytes| ("peak_device_bytes".to_string(), json!(bytes))),
    );
    head
}

fn write_summary(dir: &Path, summary: Map<String, Value>, progress: &dyn Progress) -> Result<Value> {
    let summary = Value::Object(summary);
    report::finish(dir, &summary).unwrap_or_else(|e| progress.note(&format!("report: {e}")));
    let text = serde_json::to_vec_pretty(&summary).map_err(|e| Error::Run(format!("summary.json: {e}")))?;
    files::write_bytes(&dir.join("summary.json"), &text)?;
    Ok(summary)
}

#[cfg(test)]
mod tests {
    use super::final_number;

    #[test]
    fn numbers_that_answers_end_with() {
        let of = |text: &str| final_number(text);
        assert_eq!(of("2 + 2 = 4\n#### 4"), Some("4".into()));
        assert_eq!(of("#### 1,234"), Some("1234".into()));
        assert_eq!(of("It is $18."), Some("18".into()));
        assert_eq!(of("#### -3.5 then more 7"), Some("-3.5".into()));
        assert_eq!(of("none"), None);
    }
}
