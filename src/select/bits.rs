//! Which layers keep more bits: the first and the last ones, or the most sensitive.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::weights::nearest;
use crate::{files, Error, Result};

/// `[select]` in a recipe: of the matrices of the first `[[transform]]`, those that get `bits` bits in
/// place of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SelectBits {
    /// Bits of the layers that are picked: 2, 3, 4 or 8.
    pub bits: u8,
    /// So many matrices from the input's side.
    #[serde(default)]
    pub first: usize,
    /// So many matrices from the output's side.
    #[serde(default)]
    pub last: usize,
    /// So many of those that lose most accuracy when quantized alone, by `sensitivity`.
    #[serde(default)]
    pub most_sensitive: usize,
    /// What `qtune inspect --sensitivity --json` printed, or a run folder that holds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sensitivity: Option<PathBuf>,
    /// The ranking itself, names in falling order of what they lose: what a run keeps of `sensitivity`, so
    /// that nothing that happens to the file changes it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranking: Vec<String>,
}

impl SelectBits {
    /// What types cannot hold.
    pub fn check(&self) -> Result<()> {
        if !matches!(self.bits, 2 | 3 | 4 | 8) {
            return Err(Error::usage(format!("select.bits = {}: expected 2, 3, 4 or 8", self.bits)));
        }
        if self.most_sensitive > 0 && self.sensitivity.is_none() && self.ranking.is_empty() {
            let message =
                "select.most_sensitive: it needs select.sensitivity, a file of qtune inspect --sensitivity";
            return Err(Error::usage(message));
        }
        if self.first.max(self.last).max(self.most_sensitive) == 0 {
            return Err(Error::usage(
                "select: picks no layer, expected first, last or most_sensitive above 0",
            ));
        }
        Ok(())
    }

    /// Takes the ranking out of its file.
    pub fn pin(&mut self) -> Result<()> {
        if let Some(path) = self.sensitivity.take() {
            self.ranking = ranking(&path)?;
        }
        Ok(())
    }

    /// The picked ones of `names`, which stand in order from input to output.
    pub fn pick(&self, names: &[&str]) -> Result<Vec<String>> {
        let n = names.len();
        let at_an_end = |i: usize| i < self.first || i.saturating_add(self.last) >= n;
        let mut picked: Vec<String> = names
            .iter()
            .enumerate()
            .filter(|(i, _)| at_an_end(*i))
            .map(|(_, name)| name.to_string())
            .collect();
        if self.most_sensitive > 0 {
            let ranked = match &self.sensitivity {
                Some(path) => ranking(path)?,
                None => self.ranking.clone(),
            };
            let known: Vec<&String> = ranked.iter().filter(|name| names.contains(&name.as_str())).collect();
            if known.len() < self.most_sensitive {
                let stranger = ranked.iter().find(|name| !names.contains(&name.as_str()));
                let near = stranger.and_then(|s| nearest(s, names.iter().copied()));
                let hint = near.map(|n| format!(" (a layer here is {n})")).unwrap_or_default();
                let (found, wanted) = (known.len(), self.most_sensitive);
                return Err(Error::usage(format!(
                    "select.sensitivity: found {found} layers of this model, expected {wanted}{hint}"
                )));
            }
            picked.extend(known.into_iter().take(self.most_sensitive).cloned());
        }
        Ok(picked)
    }
}

/// The layers of a sensitivity file, the one that loses most first.
fn ranking(path: &Path) -> Result<Vec<String>> {
    let path = if path.is_dir() { path.join("sensitivity.json") } else { path.to_path_buf() };
    let value: Value =
        serde_json::from_str(&files::read_text(&path)?).map_err(|e| Error::input(&path, e.to_string()))?;
    let layers = value.get("layers").and_then(Value::as_array);
    let layers =
        layers.ok_or_else(|| Error::input(&path, "layers: found none, expected a list of name and drop"))?;
    let mut ranked = Vec::with_capacity(layers.len());
    for (i, layer) in layers.iter().enumerate() {
        let name = layer.get("name").and_then(Value::as_str);
        let drop = layer.get("drop").and_then(Value::as_f64);
        let (Some(name), Some(drop)) = (name, drop) else {
            return Err(Error::input(&path, format!("layers.{i}: found {layer}, expected name and drop")));
        };
        ranked.push((drop, name.to_string()));
    }
    // By drop, then by name: equal ones keep an order.
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    Ok(ranked.into_iter().map(|(_, name)| name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(first: usize, last: usize, most_sensitive: usize, path: Option<PathBuf>) -> SelectBits {
        SelectBits { bits: 4, first, last, most_sensitive, sensitivity: path, ranking: Vec::new() }
    }

    #[test]
    fn ends_and_the_most_sensitive() {
        let names = ["a", "b", "c", "d"];
        assert_eq!(rule(1, 2, 0, None).pick(&names).unwrap(), ["a", "c", "d"]);
        assert_eq!(rule(9, 9, 0, None).pick(&names).unwrap(), names);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sensitivity.json");
        let text = r#"{"layers":[{"name":"d","drop":0.1},{"name":"b","drop":3},{"name":"c","drop":3.0}]}"#;
        std::fs::write(&path, text).unwrap();
        assert_eq!(rule(0, 0, 2, Some(path.clone())).pick(&names).unwrap(), ["b", "c"]);
        let mut pinned = rule(1, 0, 1, Some(dir.path().into()));
        assert_eq!(pinned.pick(&names).unwrap(), ["a", "b"]);
        // What a run keeps of the file picks the same.
        pinned.pin().unwrap();
        assert_eq!(
            (pinned.sensitivity.is_none(), pinned.pick(&names).unwrap()),
            (true, vec!["a".into(), "b".into()])
        );
        let error = rule(0, 0, 4, Some(path)).pick(&names).unwrap_err();
        assert!(error.to_string().contains("found 3 layers") && error.exit_code() == 2, "{error}");
    }

    #[test]
    fn what_picks_nothing_is_refused() {
        assert!(rule(0, 0, 0, None).check().unwrap_err().to_string().contains("picks no layer"));
        assert!(rule(0, 0, 1, None).check().unwrap_err().to_string().contains("select.sensitivity"));
        assert!(SelectBits { bits: 5, ..rule(1, 0, 0, None) }.check().is_err());
    }
}
