//! The keys of adapter_config.json one by one, with errors that name file and key.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::targets::Targets;
use crate::{Error, Result};

/// An object's pairs in the order of the file, repeated keys kept: a map would lose both.
struct Ordered(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Ordered {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Ordered;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_unit<E>(self) -> std::result::Result<Ordered, E> {
                Ok(Ordered(Vec::new()))
            }
            fn visit_map<A: serde::de::MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Ordered, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Ordered(pairs))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// The two objects whose order has a meaning.
#[derive(Deserialize)]
struct Patterns {
    rank_pattern: Option<Ordered>,
    alpha_pattern: Option<Ordered>,
}

/// Typed access to the keys; null is as good as missing.
pub(super) struct Fields<'a> {
    path: &'a Path,
    text: &'a str,
    keys: Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// Errs on text that is not one JSON object.
    pub(super) fn parse(path: &'a Path, text: &'a str) -> Result<Self> {
        let value: Value =
            serde_json::from_str(text).map_err(|e| Error::input(path, format!("not a JSON object: {e}")))?;
        match value {
            Value::Object(keys) => Ok(Fields { path, text, keys }),
            _ => Err(Error::input(path, "found no JSON object, expected an adapter's configuration")),
        }
    }

    /// An error on `key`.
    pub(super) fn error(&self, key: &str, message: &str) -> Error {
        Error::input(self.path, format!("{key}: {message}"))
    }

    /// The names of all keys.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.keys.keys().map(String::as_str)
    }

    /// The value of `key` where it is there and not null.
    pub(super) fn value(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).filter(|value| !value.is_null())
    }

    fn read<T>(&self, key: &str, kind: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        let read = |value| {
            read(value).ok_or_else(|| self.error(key, &format!("found {}, expected {kind}", brief(value))))
        };
        self.value(key).map(read).transpose()
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<String>> {
        self.read(key, "a text", |value| value.as_str().map(str::to_string))
    }

    pub(super) fn truth(&self, key: &str) -> Result<bool> {
        Ok(self.read(key, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    pub(super) fn number(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.read(key, "a number", Value::as_f64)?.unwrap_or(default))
    }

    /// A whole number from 1 on.
    pub(super) fn rank(&self, key: &str, default: usize) -> Result<usize> {
        let rank = |value: &Value| value.as_u64().filter(|r| (1..1 << 24).contains(r)).map(|r| r as usize);
        Ok(self.read(key, "a whole number above 0", rank)?.unwrap_or(default))
    }

    /// A probability below 1.
    pub(super) fn dropout(&self, key: &str) -> Result<f64> {
        let p = |value: &Value| value.as_f64().filter(|p| (0.0..1.0).contains(p));
        Ok(self.read(key, "a number from 0 to below 1", p)?.unwrap_or(0.0))
    }

    /// A list of texts, or one text.
    pub(super) fn list_or_text(&self, key: &str) -> Result<Option<Targets>> {
        self.read(key, "a list of texts or a text", |value| match value {
            Value::String(text) => Some(Targets::Pattern(text.clone())),
            Value::Array(list) => {
                let texts = list.iter().map(|v| v.as_str().map(str::to_string));
                Some(Targets::List(texts.collect::<Option<_>>()?))
            }
            _ => None,
        })
    }

    /// A list of layer numbers, or one; an empty list restricts nothing.
    pub(super) fn numbers(&self, key: &str) -> Result<Option<Vec<u64>>> {
        let numbers = self.read(key, "a layer number or a list of them", |value| match value {
            Value::Array(list) => list.iter().map(Value::as_u64).collect(),
            one => one.as_u64().map(|n| vec![n]),
        })?;
        Ok(numbers.filter(|list| !list.is_empty()))
    }

    /// The pairs of `rank_pattern` or `alpha_pattern`, in the order of the file.
    pub(super) fn pairs(&self, key: &str) -> Result<Vec<(String, Value)>> {
        if self.value(key).is_some_and(|value| !value.is_object()) {
            return Err(self.error(key, "expected an object from pattern to number"));
        }
        let patterns: Patterns =
            serde_json::from_str(self.text).map_err(|e| self.error(key, &e.to_string()))?;
        let pairs = if key == "rank_pattern" { patterns.rank_pattern } else { patterns.alpha_pattern };
        let pairs = pairs.map(|pairs| pairs.0).unwrap_or_default();
        let twice = pairs.iter().enumerate().find(|(at, (key, _))| pairs[..*at].iter().any(|p| p.0 == *key));
        match twice {
            Some((_, (pattern, _))) => Err(self.error(key, &format!("{pattern}: found twice"))),
            None => Ok(pairs),
        }
    }

    /// Errs where `key` is set to anything but nothing: null, false, or an empty list or object.
    pub(super) fn must_be_off(&self, key: &str) -> Result<()> {
        let off = |value: &Value| match value {
            Value::Bool(on) => !on,
            Value::Array(list) => list.is_empty(),
            Value::Object(keys) => keys.is_empty(),
            _ => false,
        };
        match self.value(key).filter(|value| !off(value)) {
            Some(value) => {
                let message = format!(
                    "found {}: it changes what the adapter computes and is not supported",
                    brief(value)
                );
                Err(self.error(key, &message))
            }
            None => Ok(()),
        }
    }
}

/// A value as messages show it: on one line, of a bounded length.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(120) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}
