//! What a run's folder tells: metrics.jsonl as series, recipe.toml, summary.json, the layers of model/ and
//! sensitivity.json, each where it is there. A run in the middle of its work is as good as a finished one.

use std::collections::HashMap;
use std::path::Path;

use indexmap::IndexMap;
use serde_json::{Map, Value};

use super::layers::Layer;
use super::series::Point;
use crate::models::read_config;
use crate::weights::format::QuantizationConfig;
use crate::weights::Checkpoint;
use crate::{files, Error, Result};

/// The values of one key over a run, with a label for each point where its lines name what they measured.
#[derive(Clone, Debug, Default)]
pub struct Series {
    /// Step and value.
    pub points: Vec<Point>,
    /// What was measured, as many as points, or none at all.
    pub labels: Vec<String>,
}

/// What the lines of split `layers` say of one weight over a run.
#[derive(Clone, Debug, Default)]
pub struct LayerSeries {
    /// Percent of codes that oscillate.
    pub oscillation: Vec<Point>,
    /// The scale of a row, by the row.
    pub scales: IndexMap<u64, Vec<Point>>,
}

/// A row of the layer table.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// The weight's checkpoint name.
    pub name: String,
    /// Its shape, rows first; empty where it is not known yet.
    pub shape: Vec<usize>,
    /// Bits a code.
    pub bits: Option<f64>,
    /// How many codes.
    pub codes: Option<f64>,
    /// Bytes of codes and scales in the file, or of the codes alone where there is no file yet.
    pub bytes: Option<f64>,
    /// The last line of metrics about it.
    pub last: Option<Layer>,
    /// Points of top-1 lost when it alone is quantized.
    pub sensitivity: Option<f64>,
}

/// A run as its folder tells it.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// The folder's own name.
    pub folder: String,
    /// The resolved recipe, as text and as a table.
    pub recipe: (String, toml::Table),
    /// The figures of a finished run.
    pub summary: Option<Map<String, Value>>,
    /// Every number of every line but those of split `layers`, by split and key, in order of appearance.
    pub series: IndexMap<(String, String), Series>,
    /// The step before the first line of each phase, and the phase's name.
    pub phases: Vec<(f64, String)>,
    /// Each weight over time.
    pub layers: IndexMap<String, LayerSeries>,
    /// Means over all weights of what the lines of split `layers` say, each weight by its codes: by key,
    /// `near_threshold/0.005` among them.
    pub means: IndexMap<String, Vec<Point>>,
    /// The step of the last line of split `layers`.
    pub layers_step: Option<f64>,
    /// The layer table.
    pub rows: Vec<Row>,
    /// How many tensors lie beside those of the table in the file, and their bytes.
    pub rest: (usize, usize),
    /// Lines of metrics that are no JSON object, a cut last line apart.
    pub spoiled: usize,
}

impl Run {
    /// Reads the folder of a run; `summary` where its file is not written yet. What cannot be read of
    /// model/ (it may be in the making) is left out.
    pub fn read(dir: &Path, summary: Option<&Value>) -> Result<Self> {
        let recipe = text(&dir.join("recipe.toml"))?.unwrap_or_default();
        let table = recipe.parse::<toml::Table>().unwrap_or_default();
        let summary = match summary {
            Some(value) => value.as_object().cloned(),
            None => json(&dir.join("summary.json"))?.and_then(|v| v.as_object().cloned()),
        };
        let folder = std::path::absolute(dir).ok();
        let folder = folder.and_then(|p| p.file_name().map(|n| n.to_string_lossy().into_owned()));
        let folder = folder.unwrap_or_default();
        let mut run = Run { folder, recipe: (recipe, table), summary, ..Run::default() };
        let mut last = Vec::new();
        if let Some(metrics) = lossy(&dir.join("metrics.jsonl"))? {
            last = run.take_metrics(&metrics);
        }
        let sensitivity = json(&dir.join("sensitivity.json"))?.unwrap_or_default();
        run.rows(&dir.join("model"), last, &drops(&sensitivity));
        Ok(run)
    }

    /// The last value of a series.
    pub fn last(&self, split: &str, key: &str) -> Option<f64> {
        let series = self.series.get(&(split.to_string(), key.to_string()))?;
        series.points.last().map(|p| p.1)
    }

    /// Takes in every line; returns the layers of the last line that has some.
    fn take_metrics(&mut self, metrics: &str) -> Vec<Layer> {
        let mut last = Vec::new();
        let mut phase = String::new();
        let mut before = 0.0;
        for line in metrics.split_inclusive('\n') {
            let object = match serde_json::from_str::<Value>(line) {
                Ok(Value::Object(object)) => object,
                // What a kill cut off is no fault of the run.
                _ if !line.ends_with('\n') || line.trim().is_empty() => continue,
                _ => {
                    self.spoiled += 1;
                    continue;
                }
            };
            let step = object.get("step").and_then(Value::as_f64).unwrap_or(before);
            let word = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default();
            if !word("phase").is_empty() && word("phase") != phase {
                phase = word("phase").to_string();
                self.phases.push((before, phase.clone()));
            }
            before = step;
            let layers = object.get("layers").and_then(Value::as_array).filter(|_| word("split") == "layers");
            if let Some(layers) = layers {
                last = layers.iter().map(Layer::read).collect();
                self.take_layers(step, &last);
                continue;
            }
            let split = if word("split").is_empty() { "run" } else { word("split") };
            for (key, value) in object.iter().filter(|(key, _)| *key != "step") {
                let Some(value) = value.as_f64().filter(|v| v.is_finite()) else { continue };
                let series = self.series.entry((split.to_string(), key.clone())).or_default();
                series.points.push((step, value));
                // One label for each point or none at all.
                if !word("what").is_empty() && series.labels.len() + 1 == series.points.len() {
                    series.labels.push(word("what").to_string());
                }
            }
        }
        last
    }

    fn take_layers(&mut self, step: f64, layers: &[Layer]) {
        self.layers_step = Some(step);
        let mut sums: IndexMap<String, (f64, f64)> = IndexMap::new();
        for layer in layers {
            let series = self.layers.entry(layer.name.clone()).or_default();
            series.oscillation.extend(layer.figure("oscillation").map(|v| (step, v)));
            for (row, scale) in layer.scale_rows.iter().zip(&layer.scales) {
                series.scales.entry(*row).or_default().push((step, *scale));
            }
            let near = layer.near.iter().map(|(key, v)| (format!("near_threshold/{key}"), *v));
            for (key, value) in layer.figures.iter().cloned().chain(near) {
                let codes = layer.codes.unwrap_or(1.0);
                let (sum, weight) = sums.entry(key).or_default();
                *sum += codes * value;
                *weight += codes;
            }
        }
        for (key, (sum, weight)) in sums.into_iter().filter(|(_, (_, weight))| *weight > 0.0) {
            self.means.entry(key).or_default().push((step, sum / weight));
        }
    }

    /// The layer table: what metrics name, in their order, then what only model/ has.
    fn rows(&mut self, model: &Path, last: Vec<Layer>, drops: &HashMap<String, f64>) {
        let mut rows: IndexMap<String, Row> = IndexMap::new();
        for layer in last {
            let bytes = layer.bits.zip(layer.codes).map(|(bits, codes)| (bits * codes / 8.0).ceil());
            let (name, bits, codes) = (layer.name.clone(), layer.bits, layer.codes);
            let row = Row { name: name.clone(), bits, codes, bytes, last: Some(layer), ..Row::default() };
            rows.insert(name, row);
        }
        if let Some((checkpoint, config)) = packed(model) {
            for name in checkpoint.names() {
                let size = checkpoint.bytes(name).unwrap_or(0);
                let part = |suffix: &str| {
                    let weight = name.strip_suffix(suffix)?;
                    config.weights.get(weight).map(|entry| (weight.to_string(), entry))
                };
                if let Some((weight, entry)) = part(".codes") {
                    let scale = checkpoint.bytes(&format!("{weight}.scale")).unwrap_or(0);
                    let row = rows.entry(weight.clone()).or_default();
                    row.name = weight;
                    row.shape = entry.shape.clone();
                    row.bits = Some(f64::from(entry.grid.bits));
                    // In floats: the sizes are a file's word.
                    row.codes = Some(entry.shape.iter().map(|&n| n as f64).product());
                    row.bytes = Some((size + scale) as f64);
                } else if part(".scale").is_none() {
                    self.rest = (self.rest.0 + 1, self.rest.1 + size);
                }
            }
        }
        for (name, row) in &mut rows {
            row.sensitivity = drops.get(name).copied();
        }
        self.rows = rows.into_values().collect();
    }
}

/// A packed model, where there is one that can be read.
fn packed(model: &Path) -> Option<(Checkpoint, QuantizationConfig)> {
    let (file, config) = read_config(model).ok()?;
    let config = QuantizationConfig::read(&file, &config).ok()??;
    Some((Checkpoint::open(model).ok()?, config))
}

fn drops(sensitivity: &Value) -> HashMap<String, f64> {
    let layers = sensitivity.get("layers").and_then(Value::as_array).into_iter().flatten();
    let drop = |l: &Value| Some((l.get("name")?.as_str()?.to_string(), l.get("drop")?.as_f64()?));
    layers.filter_map(drop).collect()
}

/// A file's text; `None` where there is no such file.
fn text(path: &Path) -> Result<Option<String>> {
    match path.exists() {
        true => files::read_text(path).map(Some),
        false => Ok(None),
    }
}

/// As [`text`], for a file whose last line may be cut in the middle of a character.
fn lossy(path: &Path) -> Result<Option<String>> {
    match path.exists() {
        true => {
            let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
            Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
        }
        false => Ok(None),
    }
}

fn json(path: &Path) -> Result<Option<Value>> {
    let parse = |text: String| serde_json::from_str(&text).map_err(|e| Error::input(path, e.to_string()));
    text(path)?.map(parse).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_series_phases_and_means() {
        let dir = tempfile::tempdir().unwrap();
        let lines = [
            r#"{"step":5,"split":"train","phase":"float","loss":2.0,"novel":7}"#,
            r#"{"step":5,"split":"eval","what":"float","top1":50.0,"loss":null}"#,
            r#"{"step":8,"split":"train","phase":"quantized","loss":1.5}"#,
            r#"{"step":8,"split":"layers","layers":[
                {"name":"a","bits":2,"codes":30,"oscillation":4.0,"scale_rows":[3],"scales":[0.5]},
                {"name":"b","bits":2,"codes":10,"oscillation":8.0,"near_threshold":{"0.005":0.25}}]}"#,
            "no json",
            r#"{"step":9,"split":"train","lo"#,
        ];
        let text = lines.map(|l| l.replace('\n', "")).join("\n");
        std::fs::write(dir.path().join("metrics.jsonl"), text).unwrap();
        let drop = r#"{"layers":[{"name":"b","drop":1.25,"top1":60.0}]}"#;
        std::fs::write(dir.path().join("sensitivity.json"), drop).unwrap();
        let run = Run::read(dir.path(), None).unwrap();
        let series = |split: &str, key: &str| &run.series[&(split.to_string(), key.to_string())];
        assert_eq!(series("train", "loss").points, [(5.0, 2.0), (8.0, 1.5)]);
        assert_eq!(series("train", "novel").points, [(5.0, 7.0)]);
        assert_eq!(series("eval", "top1").labels, ["float"]);
        assert!(!run.series.contains_key(&("eval".into(), "loss".into())));
        assert_eq!(run.phases, [(0.0, "float".to_string()), (5.0, "quantized".to_string())]);
        assert_eq!(run.layers["a"].scales[&3], [(8.0, 0.5)]);
        // (30 * 4 + 10 * 8) / 40, and the share over the one weight that has it.
        assert_eq!(run.means["oscillation"], [(8.0, 5.0)]);
        assert_eq!(run.means["near_threshold/0.005"], [(8.0, 0.25)]);
        assert_eq!(run.spoiled, 1);
        let rows: Vec<_> = run.rows.iter().map(|r| (r.name.as_str(), r.bytes, r.sensitivity)).collect();
        assert_eq!(rows, [("a", Some(8.0), None), ("b", Some(3.0), Some(1.25))]);
    }

    #[test]
    fn an_empty_folder_is_a_run_that_has_not_begun() {
        let dir = tempfile::tempdir().unwrap();
        let run = Run::read(dir.path(), None).unwrap();
        assert!(run.series.is_empty() && run.rows.is_empty() && run.summary.is_none());
        std::fs::write(dir.path().join("summary.json"), "{").unwrap();
        assert!(Run::read(dir.path(), None).unwrap_err().to_string().contains("summary.json"));
    }
}
