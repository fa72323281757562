//! A selection as a file: what `qtune kappa` writes and training takes, so that analysis and training can be
//! separate runs.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::analyse::{content_hash, model_hash, Scored};
use super::choose::{score, Chosen};
use super::config::KappaConfig;
use super::spectrum::{Route, Status};
use super::units::{Role, Unit};
use crate::weights::{nearest, Weights};
use crate::{files, Error, Result};

/// The name of the file in a folder of results.
pub const FILE_NAME: &str = "selection.json";
/// What stands first in it.
const FORMAT: &str = "qtune-kappa-1";

/// A unit in a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// The unit's key: the tensor, and the number of the matrix in brackets where it holds several.
    pub name: String,
    /// The tensor.
    pub param: String,
    /// The number of the matrix.
    pub index: Option<usize>,
    /// What it does.
    pub role: Role,
    /// Rows and columns of the matrix.
    pub shape: [usize; 2],
    /// Its condition number; null where it has none.
    pub kappa: Option<f64>,
    /// What it was ranked by.
    pub score: Option<f64>,
    /// Its place among the candidates, from 1; null where it is none.
    pub rank: Option<usize>,
    /// Whether it was chosen.
    pub selected: bool,
    /// Whether it has a condition number.
    pub status: Status,
    /// How its ends were found.
    pub route: Route,
    /// The largest relative error of kappa.
    pub bound: f64,
    /// The largest singular value.
    pub sigma_max: f64,
    /// The smallest singular value.
    pub sigma_min: f64,
    /// The sum of the logarithms of all singular values.
    pub log_sum: f64,
    /// The root of the sum of squares.
    pub frobenius: f64,
    /// What its numbers were stored as.
    pub source: String,
    /// BLAKE3 of its numbers: the selection holds for these alone.
    pub hash: String,
    /// Other names of the same tensor.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
}

/// The condition numbers of a model and what was chosen by them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Selection {
    /// What the file is.
    pub format: String,
    /// One hash over the names and numbers of all units ([`model_hash`]).
    pub model_hash: String,
    /// The seed of a random order.
    pub seed: u64,
    /// The options that led here.
    pub options: KappaConfig,
    /// Parameters of the model, tied ones once.
    pub total_params: usize,
    /// Parameters of the chosen units.
    pub selected_params: usize,
    /// Every unit: candidates in their order, then the others by name.
    pub tensors: Vec<Entry>,
}

impl Selection {
    /// Of a ranking and a choice among `scored`.
    pub fn new(
        scored: &[Scored],
        chosen: &Chosen,
        total_params: usize,
        config: &KappaConfig,
        seed: u64,
    ) -> Self {
        let entry = |i: usize, rank: Option<usize>| {
            let Scored { unit, spectrum, source, hash } = &scored[i];
            Entry {
                name: unit.key(),
                param: unit.param.clone(),
                index: unit.index,
                role: unit.role,
                shape: [unit.rows, unit.cols],
                kappa: spectrum.kappa(),
                score: score(&scored[i], config),
                rank,
                selected: chosen.units.contains(&i),
                status: spectrum.status,
                route: spectrum.route,
                bound: spectrum.bound,
                sigma_max: spectrum.sigma_max,
                sigma_min: spectrum.sigma_min,
                log_sum: spectrum.log_sum,
                frobenius: spectrum.frobenius,
                source: source.clone(),
                hash: hash.clone(),
                aliases: unit.aliases.clone(),
            }
        };
        let ranked = chosen.ranked.iter().enumerate().map(|(place, &i)| entry(i, Some(place + 1)));
        let mut rest: Vec<usize> = (0..scored.len()).filter(|i| !chosen.ranked.contains(i)).collect();
        let name = |i: &usize| (scored[*i].unit.param.clone(), scored[*i].unit.index);
        rest.sort_by_key(name);
        Selection {
            format: FORMAT.into(),
            model_hash: model_hash(scored),
            seed,
            options: config.clone(),
            total_params,
            selected_params: chosen.units.iter().map(|&i| scored[i].unit.numel()).sum(),
            tensors: ranked.chain(rest.into_iter().map(|i| entry(i, None))).collect(),
        }
    }

    /// Reads the file `path`, or the one in that folder.
    pub fn read(path: &Path) -> Result<Self> {
        let path = if path.is_dir() { path.join(FILE_NAME) } else { path.to_path_buf() };
        let wrong = |message: String| Error::input(&path, message);
        let selection: Selection =
            serde_json::from_str(&files::read_text(&path)?).map_err(|e| wrong(e.to_string()))?;
        if selection.format != FORMAT {
            return Err(wrong(format!("format: found {:?}, expected {FORMAT:?}", selection.format)));
        }
        if selection.selected().next().is_none() {
            return Err(wrong("tensors: found none that is selected, expected at least one".into()));
        }
        Ok(selection)
    }

    /// Writes the file `path`, whole or not at all.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(|e| Error::input(path, e.to_string()))?;
        files::write_bytes(path, &text)
    }

    /// The chosen units, in the order of selection.
    pub fn selected(&self) -> impl Iterator<Item = &Entry> {
        self.tensors.iter().filter(|entry| entry.selected)
    }

    /// The chosen ones among the `units` of `weights`, as indexes in the order of selection.
    ///
    /// Errs on one that the model does not have, or has in another shape or with other numbers than it was
    /// selected by.
    pub fn among(&self, weights: &Weights, units: &[Unit]) -> Result<Vec<usize>> {
        self.selected()
            .map(|entry| {
                let at = units.iter().position(|unit| unit.key() == entry.name);
                let Some(at) = at else {
                    let near = nearest(&entry.name, units.iter().map(|u| u.param.as_str()));
                    let hint = near.map(|n| format!(" (nearest: {n})")).unwrap_or_default();
                    let message = format!("selected, but not found among {} units{hint}", units.len());
                    return Err(Error::tensor(&entry.name, message));
                };
                let found = [units[at].rows, units[at].cols];
                if found != entry.shape {
                    let message = format!("found shape {found:?}, expected {:?} as selected", entry.shape);
                    return Err(Error::tensor(&entry.name, message));
                }
                let found = content_hash(weights, &units[at], self.options.allow_quantized)?;
                if found != entry.hash {
                    let short = |hash: &str| hash.chars().take(12).collect::<String>();
                    let message = format!(
                        "found other numbers than it was selected by (hash {}, expected {})",
                        short(&found),
                        short(&entry.hash)
                    );
                    return Err(Error::tensor(&entry.name, message));
                }
                Ok(at)
            })
            .collect()
    }

    /// For each role: its name, chosen units, all units, chosen parameters.
    pub fn shares(&self) -> Vec<(Role, usize, usize, usize)> {
        let mut roles: Vec<Role> = self.tensors.iter().map(|entry| entry.role).collect();
        roles.sort();
        roles.dedup();
        let of = |role: Role| {
            let all = self.tensors.iter().filter(|entry| entry.role == role);
            let chosen = all.clone().filter(|entry| entry.selected);
            let numel = chosen.clone().map(|entry| entry.shape[0] * entry.shape[1]).sum();
            (role, chosen.count(), all.count(), numel)
        };
        roles.into_iter().map(of).collect()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::super::analyse::{analyse, Options};
    use super::super::choose::choose_with_notes;
    use super::super::units::{generic_roles, units};
    use super::*;
    use crate::train::Quiet;
    use crate::weights::Weight;

    #[test]
    fn a_selection_survives_its_file() {
        let cpu = &Device::Cpu;
        let weights = Weights::from_tensors([
            ("a.weight".to_string(), Tensor::new(&[[4f32, 0.0], [0.0, 1.0]], cpu).unwrap()),
            ("b.weight".to_string(), Tensor::new(&[[2f32, 0.0], [0.0, 1.0]], cpu).unwrap()),
            ("dead.weight".to_string(), Tensor::new(&[[1f32, 1.0], [1.0, 1.0]], cpu).unwrap()),
        ]);
        let units = units(&weights, &generic_roles).unwrap();
        let scored = analyse(&weights, &units, &Options::default(), None, &Quiet).unwrap();
        let config = KappaConfig { tensors: Some(1), ..KappaConfig::default() };
        let chosen = choose_with_notes(&scored, 12, &config, 0).unwrap();
        let selection = Selection::new(&scored, &chosen, 12, &config, 0);
        let dir = tempfile::tempdir().unwrap();
        selection.write(&dir.path().join(FILE_NAME)).unwrap();
        let read = Selection::read(dir.path()).unwrap();
        assert_eq!(read, selection);
        assert_eq!(read.among(&weights, &units).unwrap(), [1]);
        let ranks: Vec<_> = read.tensors.iter().map(|t| (t.name.as_str(), t.rank, t.kappa)).collect();
        let expected =
            [("b.weight", Some(1), Some(2.0)), ("a.weight", Some(2), Some(4.0)), ("dead.weight", None, None)];
        assert_eq!(ranks, expected);
        assert_eq!(read.shares(), [(Role::Linear, 1, 3, 4)]);

        let error = read.among(&weights, &units[..1]).unwrap_err().to_string();
        assert_eq!(error, "tensor b.weight: selected, but not found among 1 units (nearest: a.weight)");
        let mut other = units.clone();
        other[1].rows = 3;
        let error = read.among(&weights, &other).unwrap_err().to_string();
        assert!(error.contains("found shape [3, 2], expected [2, 2]"), "{error}");
        // Only what was chosen has to be as it was.
        let mut changed = weights.clone();
        let dense = |rows: &[[f32; 2]; 2]| Weight::dense(Tensor::new(rows, cpu).unwrap());
        changed.insert("a.weight", dense(&[[5.0, 0.0], [0.0, 1.0]]));
        assert_eq!(read.among(&changed, &units).unwrap(), [1]);
        changed.insert("b.weight", dense(&[[3.0, 0.0], [0.0, 1.0]]));
        let error = read.among(&changed, &units).unwrap_err().to_string();
        assert!(
            error.starts_with("tensor b.weight: found other numbers than it was selected by (hash "),
            "{error}"
        );
        let path = dir.path().join("none.json");
        let mut none = selection;
        none.tensors.iter_mut().for_each(|t| t.selected = false);
        none.write(&path).unwrap();
        assert!(Selection::read(&path).unwrap_err().to_string().contains("found none that is selected"));
    }
}
