//! `qtune inspect`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use qtune::adapter::Record;
use qtune::models::{model_dir, open_model_with, read_config};
use qtune::quantize::sensitivity;
use qtune::report::layers::{last_line, Layer};
use qtune::train::{signal, Progress};
use qtune::weights::format::QuantizationConfig;
use qtune::weights::Checkpoint;
use qtune::{files, hub, Error};
use serde_json::{json, Value};

use super::eval::images_for;
use super::flags::Common;
use super::merge::adapter_dir;
use super::{bytes, inspect_adapter, print, print_json};

#[derive(Args, Debug)]
pub struct Inspect {
    /// A model or adapter folder, a safetensors or PyTorch file, a run folder or a hub name
    #[arg(required_unless_present = "recipes")]
    path: Option<PathBuf>,
    /// List the recipes that the program carries
    #[arg(long, conflicts_with_all = ["path", "sensitivity"])]
    recipes: bool,
    /// Rank the layers of a full-precision model by the accuracy lost when each alone is quantized; a run
    /// folder keeps the figures as sensitivity.json, which [select] of a recipe reads
    #[arg(long)]
    sensitivity: bool,
    /// Images to measure sensitivity on [default: those of the run, for a run folder]
    #[arg(long, value_name = "PATH", requires = "sensitivity")]
    data: Option<PathBuf>,
    /// Images to evaluate on, where they lie elsewhere
    #[arg(long, value_name = "PATH", requires = "sensitivity")]
    eval_data: Option<PathBuf>,
    /// Bits that each layer is quantized to
    #[arg(long, value_name = "BITS", value_parser = ["2", "3", "4", "8"], default_value = "2", requires = "sensitivity")]
    bits: String,
    /// Measure on the first N evaluation samples
    #[arg(long, value_name = "N", default_value_t = 1000, requires = "sensitivity")]
    limit_eval: usize,
    #[command(flatten)]
    common: Common,
}

struct Row {
    name: String,
    shape: Vec<usize>,
    kind: String,
    bytes: usize,
}

impl Inspect {
    pub fn run(self) -> Result<()> {
        if self.recipes {
            return inspect_adapter::recipes(self.common.json);
        }
        let path = self.path.clone().unwrap_or_default();
        let path = hub::resolve(&path.to_string_lossy())?;
        if self.sensitivity {
            return self.rank(&path);
        }
        let dir = model_dir(&path);
        let adapter = adapter_dir(&path);
        if !dir.join("config.json").exists() && adapter.join("adapter_config.json").exists() {
            return inspect_adapter::adapter(&adapter, self.common.json, &self.common.progress());
        }
        // A run that is not finished has no model yet: its full-precision start is there to look at.
        let start = path.join("checkpoints").join("float");
        let dir =
            if dir == path && path.join("recipe.toml").exists() && start.exists() { start } else { dir };
        let quantization = match dir.join("config.json").exists() {
            true => {
                let (file, config) = read_config(&dir)?;
                QuantizationConfig::read(&file, &config)?
            }
            false => None,
        };
        let checkpoint = Checkpoint::open_with(&dir, self.common.pickle())?;
        let progress = self.common.progress();
        checkpoint.notes().iter().for_each(|note| progress.note(note));
        let rows = rows(&checkpoint, quantization.as_ref());
        let stored: usize = rows.iter().map(|r| r.bytes).sum();
        let elements: usize = rows.iter().map(|r| r.shape.iter().product::<usize>()).sum();
        let summary = read_summary(&path)?;
        let layers = read_layers(&path)?;
        let merged = if dir.is_dir() { Record::read(&dir)? } else { None };
        if self.common.json {
            let tensors: Vec<Value> = rows
                .iter()
                .map(|r| json!({"name": r.name, "shape": r.shape, "kind": r.kind, "bytes": r.bytes}))
                .collect();
            let activations = quantization.as_ref().map(|q| json!(q.activations));
            return print_json(&json!({
                "command": "inspect",
                "path": dir.display().to_string(),
                "tensors": tensors,
                "activations": activations,
                "params_total": elements,
                "bytes": stored,
                "metadata": checkpoint.metadata(),
                "notes": checkpoint.notes(),
                "summary": summary,
                "layers": layers.map(|(_, layers)| layers),
                "merged": merged,
            }));
        }
        let width = rows.iter().map(|r| r.name.len()).max().unwrap_or(0);
        let mut text = String::new();
        for row in &rows {
            let shape = row.shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ");
            text += &format!("{:width$}  {shape:>18}  {:<20} {:>10}\n", row.name, row.kind, bytes(row.bytes));
        }
        for row in rows.iter().filter(|row| row.name.ends_with(".qk.weight")) {
            let [rows, width] = row.shape[..] else { continue };
            let (heads, codes) = (rows / width.max(1), rows * width);
            let separate = 2 * width * width;
            text += &format!(
                "{}: {codes} codes, {:.2} times those of query and key ({heads} heads / 2), {} where 8-bit query and key take {}\n",
                row.name,
                codes as f64 / separate.max(1) as f64,
                bytes(row.bytes),
                bytes(2 * width * (width + 4))
            );
        }
        if let Some(quantization) = &quantization {
            let bits = |v: &Value| v.get("bits").and_then(Value::as_u64).unwrap_or(0);
            for (name, value) in &quantization.activations {
                let centering = value.get("centering").and_then(Value::as_str).unwrap_or("").to_string();
                text += &format!("{name:width$}  {:>18}  {} bits {centering}\n", "activation", bits(value));
            }
        }
        text += &format!(
            "{} tensors, {elements} parameters, {} ({:.2} bits a parameter)",
            rows.len(),
            bytes(stored),
            8.0 * stored as f64 / elements.max(1) as f64
        );
        for (key, value) in checkpoint.metadata() {
            text += &format!("\nmetadata {key}: {value}");
        }
        if let Some(record) = &merged {
            text += &format!("\n{}", inspect_adapter::merged_lines(record));
        }
        if let Some((step, layers)) = layers {
            text += &format!("\n\n{}", layer_table(step, &layers));
        }
        if let Some(figures) = summary {
            let figure = |key: &str| figures.get(key).filter(|v| !v.is_null()).map(|v| format!("{key} {v}"));
            let known = ["bits", "act_bits", "fp_top1", "q_top1", "steps", "oscillation", "compression"];
            let shown: Vec<String> = known.iter().filter_map(|k| figure(k)).collect();
            text += &format!("\nrun: {}", shown.join("  "));
        }
        print(&text)
    }
}

impl Inspect {
    /// `--sensitivity`.
    fn rank(&self, path: &Path) -> Result<()> {
        signal::watch()?;
        let progress = self.common.progress();
        let device = self.common.device()?;
        let bits =
            self.bits.parse().map_err(|_| Error::usage(format!("--bits {}: expected 2 to 8", self.bits)))?;
        let start = path.join("checkpoints").join("float");
        let dir = if start.exists() { start } else { model_dir(path) };
        let opened = open_model_with(&dir, self.common.pickle(), &device)?;
        opened.notes.iter().for_each(|note| progress.note(note));
        if self.limit_eval == 0 {
            return Err(Error::usage("--limit-eval 0: expected at least 1").into());
        }
        let (mut data, seed) = images_for(path, self.data.as_deref(), self.eval_data.as_deref())?;
        (data.limit_eval, data.limit_train) = (Some(self.limit_eval), Some(1));
        let dataset = data.open(seed)?.under_labels(opened.config.classes())?;
        dataset.notes.iter().for_each(|note| progress.note(note));
        let ranked = sensitivity::rank(&opened, &dataset, bits, 250, &device, &progress)?;
        if path.join("recipe.toml").exists() {
            let text = serde_json::to_vec_pretty(&ranked)?;
            files::write_bytes(&path.join("sensitivity.json"), &text)?;
            if let Err(error) = qtune::report::write(path) {
                progress.note(&format!("report.html: {error}"));
            }
        }
        if self.common.json {
            return print_json(&ranked);
        }
        let layers = ranked.get("layers").and_then(Value::as_array).cloned().unwrap_or_default();
        let name = |layer: &Value| layer.get("name").and_then(Value::as_str).unwrap_or_default().to_string();
        let number = |layer: &Value, key: &str| layer.get(key).and_then(Value::as_f64).unwrap_or(f64::NAN);
        let width = layers.iter().map(|layer| name(layer).len()).max().unwrap_or(0);
        let mut text =
            format!("{:width$}  points lost   top-1    loss\n", format!("each alone at {bits} bits"));
        for layer in &layers {
            text += &format!(
                "{:width$}  {:>11.2}  {:>5.2} %  {:>+.4}\n",
                name(layer),
                number(layer, "drop"),
                number(layer, "top1"),
                number(layer, "loss_rise")
            );
        }
        let (base, samples) = (number(&ranked, "base_top1"), number(&ranked, "samples"));
        print(&format!("{text}full precision: {base:.2} % on {samples} images"))
    }
}

fn read_summary(run: &Path) -> Result<Option<Value>> {
    let path = run.join("summary.json");
    match path.exists() {
        true => Ok(serde_json::from_str(&files::read_text(&path)?).ok()),
        false => Ok(None),
    }
}

/// What the last line of metrics about the quantized weights says, and its step.
fn read_layers(run: &Path) -> Result<Option<(u64, Vec<Value>)>> {
    let path = run.join("metrics.jsonl");
    match path.exists() {
        true => {
            let bytes = std::fs::read(&path).map_err(|e| qtune::Error::io(&path, e))?;
            Ok(last_line(&String::from_utf8_lossy(&bytes)))
        }
        false => Ok(None),
    }
}

/// The quantized weights as training left them, a line each.
fn layer_table(step: u64, layers: &[Value]) -> String {
    let layers: Vec<Layer> = layers.iter().map(Layer::read).collect();
    let width = layers.iter().map(|l| l.name.len()).max().unwrap_or(0);
    let digits = |value: Option<f64>, digits: usize| match value {
        Some(value) => format!("{value:.digits$}"),
        None => "-".to_string(),
    };
    let mut text = format!(
        "{:width$}  bits     codes  oscillation %  flip rate  near 0.005  entropy  frozen %  scales of rows",
        format!("quantized weights at step {step}")
    );
    for layer in &layers {
        let figure = |key: &str| layer.figure(key);
        let scales = layer.scale_rows.iter().zip(&layer.scales);
        let scales: Vec<String> = scales.map(|(row, scale)| format!("{row}: {scale:.4}")).collect();
        text += &format!(
            "\n{:width$}  {:>4}  {:>8}  {:>13}  {:>9}  {:>10}  {:>7}  {:>8}  {}",
            layer.name,
            digits(layer.bits, 0),
            digits(layer.codes, 0),
            digits(figure("oscillation"), 2),
            digits(figure("flip_rate"), 5),
            digits(layer.near("0.005"), 4),
            digits(figure("entropy"), 3),
            digits(figure("frozen"), 2),
            scales.join("  ")
        );
    }
    text
}

/// A row for each tensor; codes and scales of a packed weight are one.
fn rows(checkpoint: &Checkpoint, quantization: Option<&QuantizationConfig>) -> Vec<Row> {
    let mut rows = Vec::new();
    let taps: Vec<&str> =
        quantization.iter().flat_map(|q| q.activations.keys()).map(String::as_str).collect();
    for name in checkpoint.names() {
        let size = checkpoint.bytes(name).unwrap_or(0);
        let packed = quantization.and_then(|q| {
            let weight = name.strip_suffix(".codes")?;
            q.weights.get(weight).map(|entry| (weight, entry))
        });
        if let Some((weight, entry)) = packed {
            let scale = checkpoint.bytes(&format!("{weight}.scale")).unwrap_or(0);
            let kind = serde_json::to_value(entry.grid.centering).unwrap_or_default();
            let mut kind = format!("{} bits {}", entry.grid.bits, kind.as_str().unwrap_or_default());
            if let Some(group) = entry.group_size {
                kind += &format!(", groups of {group}");
            }
            rows.push(Row { name: weight.into(), shape: entry.shape.clone(), kind, bytes: size + scale });
            continue;
        }
        let scale = quantization.is_some_and(|q| {
            name.strip_suffix(".scale").is_some_and(|weight| q.weights.contains_key(weight))
        });
        if scale {
            continue;
        }
        let tap = taps.iter().any(|tap| name.starts_with(*tap));
        let dtype = checkpoint.dtype(name).map(|d| format!("{d:?}").to_lowercase()).unwrap_or_default();
        let kind = if tap { format!("{dtype} of a tap") } else { dtype };
        let shape = checkpoint.shape(name).unwrap_or_default().to_vec();
        rows.push(Row { name: name.into(), shape, kind, bytes: size });
    }
    rows
}
