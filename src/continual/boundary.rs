//! Where one task ends and the next begins: the model, what its method remembers, the optimizer's state and
//! the figures, in `checkpoints/task-NN/`, written whole or not at all.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::ewc::{Ewc, Held};
use crate::weights::{checkpoint, Checkpoint, Weights};
use crate::{files, Error, Result};

/// The version of row.json that this program writes and reads.
const VERSION: u64 = 1;

/// The figures at the end of a task, or before the first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// The version of this file.
    pub version: u64,
    /// Top-1 in percent on every task.
    pub accuracy: Vec<f64>,
    /// The weights that were trained, where not all were.
    pub selected: Option<Vec<String>>,
    /// Samples a second of the training.
    pub samples_per_s: f64,
    /// Lines of metrics.jsonl up to here.
    pub metrics_lines: usize,
    /// Seconds that the run took up to here.
    pub wall_s: f64,
}

impl Row {
    /// A row of these figures.
    pub fn new(accuracy: Vec<f64>, metrics_lines: usize, wall_s: f64) -> Self {
        Row { version: VERSION, accuracy, selected: None, samples_per_s: 0.0, metrics_lines, wall_s }
    }
}

/// What a method remembers of the tasks so far, beside the optimizer's state.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// Elastic weight consolidation.
    pub ewc: Ewc,
    /// The fields of the last posterior.
    pub prior: Vec<(String, Tensor)>,
}

/// A boundary that was read.
pub struct Boundary {
    /// Its figures.
    pub row: Row,
    /// The folder.
    dir: PathBuf,
}

fn folder(run: &Path, after: Option<usize>) -> PathBuf {
    let name = match after {
        None => "task-start".to_string(),
        Some(task) => format!("task-{task:02}"),
    };
    run.join("checkpoints").join(name)
}

/// Writes what holds after task `after`, or (`None`) before the first: then only its figures.
pub fn write(
    run: &Path,
    after: Option<usize>,
    row: &Row,
    weights: &Weights,
    memory: &Memory,
    optimizer: &[(String, Tensor)],
) -> Result<()> {
    let dir = folder(run, after);
    if let Some(parent) = dir.parent() {
        std::fs::create_dir_all(parent).map_err(|e| Error::io(parent, e))?;
    }
    if dir.exists() {
        files::discard(&dir)?;
    }
    let staging = files::Staging::new(&dir)?;
    let at = |name: &str| staging.path().join(name);
    if after.is_some() {
        let none = BTreeMap::new();
        let mut model = Vec::new();
        for (name, weight) in weights.iter() {
            model.push((name.to_string(), weight.tensor()?.detach()));
        }
        checkpoint::save(&at("model.safetensors"), &model, &none)?;
        let mut kept = Vec::new();
        for (i, task) in memory.ewc.tasks.iter().enumerate() {
            for held in task {
                kept.push((format!("ewc/{i}/fisher/{}", held.name), held.fisher.clone()));
                kept.push((format!("ewc/{i}/anchor/{}", held.name), held.anchor.clone()));
            }
        }
        kept.extend(memory.prior.iter().map(|(name, field)| (format!("field/{name}"), field.clone())));
        checkpoint::save(&at("memory.safetensors"), &kept, &none)?;
        checkpoint::save(&at("optimizer.safetensors"), optimizer, &none)?;
    }
    let text = serde_json::to_vec_pretty(row).map_err(|e| Error::Run(format!("row.json: {e}")))?;
    files::write_bytes(&at("row.json"), &text)?;
    staging.commit()?;
    Ok(())
}

/// The boundary after task `after` of a run, or before the first; `None` where it was not reached.
pub fn read(run: &Path, after: Option<usize>) -> Result<Option<Boundary>> {
    let dir = folder(run, after);
    let path = dir.join("row.json");
    if !path.exists() {
        return Ok(None);
    }
    let row: Row =
        serde_json::from_str(&files::read_text(&path)?).map_err(|e| Error::input(&path, e.to_string()))?;
    if row.version != VERSION {
        return Err(Error::input(&path, format!("version: found {}, expected {VERSION}", row.version)));
    }
    Ok(Some(Boundary { row, dir }))
}

impl Boundary {
    fn open(&self, name: &str) -> Result<Checkpoint> {
        Checkpoint::open(&self.dir.join(name))
    }

    /// The model, frozen.
    pub fn weights(&self, device: &Device) -> Result<Weights> {
        let model = self.open("model.safetensors")?;
        let names: Vec<String> = model.names().map(str::to_string).collect();
        let read = |name: String| Ok((name.clone(), model.tensor(&name, device)?));
        Ok(Weights::from_tensors(names.into_iter().map(read).collect::<Result<Vec<_>>>()?))
    }

    /// What the method remembers.
    pub fn memory(&self, device: &Device) -> Result<Memory> {
        let file = self.open("memory.safetensors")?;
        let mut memory = Memory::default();
        for name in file.names() {
            if let Some(field) = name.strip_prefix("field/") {
                memory.prior.push((field.to_string(), file.tensor(name, device)?));
            }
            let Some((task, rest)) = name.strip_prefix("ewc/").and_then(|rest| rest.split_once('/')) else {
                continue;
            };
            let task = task.parse::<usize>().ok().filter(|task| *task < 10_000);
            let task = task.ok_or_else(|| Error::tensor(name, "expected ewc/TASK/…"))?;
            let Some(weight) = rest.strip_prefix("fisher/") else { continue };
            let anchor = file.tensor(&format!("ewc/{task}/anchor/{weight}"), device)?;
            let held = Held { name: weight.to_string(), fisher: file.tensor(name, device)?, anchor };
            if memory.ewc.tasks.len() <= task {
                memory.ewc.tasks.resize_with(task + 1, Vec::new);
            }
            memory.ewc.tasks[task].push(held);
        }
        Ok(memory)
    }

    /// The optimizer's state.
    pub fn optimizer(&self) -> Result<Checkpoint> {
        self.open("optimizer.safetensors")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_comes_back() {
        let run = tempfile::tempdir().unwrap();
        let device = &Device::Cpu;
        let tensor = |v: &[f32]| Tensor::new(v, device).unwrap();
        assert!(read(run.path(), Some(0)).unwrap().is_none());
        let weights =
            Weights::from_tensors([("b".to_string(), tensor(&[1.0, 2.0])), ("a".into(), tensor(&[3.0]))]);
        let held =
            |name: &str, f: f32| Held { name: name.into(), fisher: tensor(&[f]), anchor: tensor(&[-f]) };
        let memory = Memory {
            ewc: Ewc { tasks: vec![vec![held("b", 1.0), held("a", 2.0)], vec![held("b", 3.0)]] },
            prior: vec![("b".into(), tensor(&[0.5]))],
        };
        let row = Row { selected: Some(vec!["b".into()]), ..Row::new(vec![90.5, 10.0], 7, 1.5) };
        let state = [("b#m".to_string(), tensor(&[9.0]))];
        write(run.path(), None, &row, &weights, &memory, &[]).unwrap();
        write(run.path(), Some(1), &row, &weights, &memory, &state).unwrap();
        assert_eq!(read(run.path(), None).unwrap().unwrap().row.accuracy, [90.5, 10.0]);
        let back = read(run.path(), Some(1)).unwrap().unwrap();
        assert_eq!((back.row.metrics_lines, back.row.selected.as_deref()), (7, Some(&["b".to_string()][..])));
        let model = back.weights(device).unwrap();
        assert_eq!(model.get("b").unwrap().tensor().unwrap().to_vec1::<f32>().unwrap(), [1.0, 2.0]);
        let memory = back.memory(device).unwrap();
        assert_eq!(memory.ewc.tasks.iter().map(Vec::len).collect::<Vec<_>>(), [2, 1]);
        let b = memory.ewc.tasks[1].first().unwrap();
        assert_eq!((b.name.as_str(), b.fisher.to_vec1::<f32>().unwrap()), ("b", vec![3.0]));
        assert_eq!(b.anchor.to_vec1::<f32>().unwrap(), [-3.0]);
        assert_eq!(memory.prior[0].0, "b");
        assert!(back.optimizer().unwrap().contains("b#m"));
    }
}
