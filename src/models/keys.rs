//! Hugging Face's `config.json` key by key, with errors that name file and key.

use std::path::Path;

use serde_json::{json, Map, Value};

use crate::error::{Error, Result};

/// Typed access to a configuration's keys.
pub(super) struct Keys<'a> {
    path: &'a Path,
    keys: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    /// Errs where the configuration is not an object. `path` is for error messages.
    pub(super) fn of(path: &'a Path, json: &'a Value) -> Result<Self> {
        match json.as_object() {
            Some(keys) => Ok(Keys { path, keys }),
            None => Err(Error::input(path, "found no JSON object, expected a model configuration")),
        }
    }

    /// An error on `key`.
    pub(super) fn error(&self, key: &str, message: &str) -> Error {
        Error::input(self.path, format!("{key}: {message}"))
    }

    /// `model_type`.
    pub(super) fn model_type(&self) -> Option<&'a str> {
        self.keys.get("model_type").and_then(Value::as_str)
    }

    /// The first of `architectures`.
    pub(super) fn architecture(&self) -> Option<&'a str> {
        self.keys.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str)
    }

    /// The value of `key` as `read` sees it, or the default where it is missing or null.
    pub(super) fn get<T>(
        &self,
        key: &str,
        default: T,
        kind: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<T> {
        match self.keys.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => {
                read(value).ok_or_else(|| self.error(key, &format!("found {value}, expected {kind}")))
            }
        }
    }

    pub(super) fn size(&self, key: &str, default: usize) -> Result<usize> {
        self.get(key, default, "a whole number", whole)
    }

    pub(super) fn number(&self, key: &str, default: f64) -> Result<f64> {
        self.get(key, default, "a number", Value::as_f64)
    }

    pub(super) fn truth(&self, key: &str, default: bool) -> Result<bool> {
        self.get(key, default, "true or false", Value::as_bool)
    }

    /// Whole numbers, one for each stage of a model.
    pub(super) fn list(&self, key: &str, default: &[usize]) -> Result<Vec<usize>> {
        self.get(key, default.to_vec(), "a list of whole numbers", |value| {
            value.as_array()?.iter().map(whole).collect()
        })
    }

    /// One size for both directions or `[height, width]`.
    pub(super) fn sizes(&self, key: &str, default: usize) -> Result<(usize, usize)> {
        self.get(key, (default, default), "a whole number or [height, width]", |value| match value {
            Value::Array(two) if two.len() == 2 => Some((whole(&two[0])?, whole(&two[1])?)),
            one => whole(one).map(|n| (n, n)),
        })
    }

    /// The side of a square, given as [`Keys::sizes`] are.
    pub(super) fn square(&self, key: &str, default: usize) -> Result<usize> {
        let sides = self.sizes(key, default)?;
        match sides.0 == sides.1 {
            true => Ok(sides.0),
            false => Err(self.error(key, &format!("found {sides:?}, expected a square"))),
        }
    }

    /// Errs on an activation other than the exact GELU.
    pub(super) fn gelu(&self) -> Result<()> {
        let found = self.keys.get("hidden_act").filter(|v| !v.is_null());
        match found.filter(|v| v.as_str() != Some("gelu")) {
            Some(found) => Err(self.error("hidden_act", &format!("found {found}, expected \"gelu\""))),
            None => Ok(()),
        }
    }

    /// `id2label`, else `num_labels` numbered ones, of which transformers' default is 2; at most `most`.
    pub(super) fn labels(&self, most: usize) -> Result<Vec<String>> {
        let Some(labels) = self.keys.get("id2label").filter(|v| !v.is_null()) else {
            let count = self.size("num_labels", 2)?;
            if count > most {
                return Err(self.error("num_labels", &format!("found {count}, expected at most {most}")));
            }
            return Ok(numbered_labels(count));
        };
        let Some(labels) = labels.as_object() else {
            return Err(self.error("id2label", "found no object, expected one from class id to label"));
        };
        (0..labels.len())
            .map(|id| match labels.get(&id.to_string()) {
                Some(Value::String(label)) => Ok(label.clone()),
                Some(other) => Err(self.error("id2label", &format!("{id}: found {other}, expected a text"))),
                None => {
                    let last = labels.len() - 1;
                    Err(self
                        .error("id2label", &format!("found no label {id}, expected all from 0 to {last}")))
                }
            })
            .collect()
    }
}

/// `id2label` and `label2id` as transformers writes them.
pub(super) fn label_maps(classes: &[String]) -> (Map<String, Value>, Map<String, Value>) {
    let ids = classes.iter().enumerate();
    let id2label = ids.clone().map(|(i, c)| (i.to_string(), json!(c))).collect();
    (id2label, ids.map(|(i, c)| (c.clone(), json!(i))).collect())
}

/// transformers' names for `count` classes that have none.
pub(crate) fn numbered_labels(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("LABEL_{i}")).collect()
}

fn whole(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|n| usize::try_from(n).ok())
}
