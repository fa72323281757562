//! Changing a recipe's table before it is resolved.

use crate::{Error, Result};

/// Sets `key.path=value` in a table: numbers index arrays, the value is TOML or else a string.
pub fn set(table: &mut toml::Table, assignment: &str) -> Result<()> {
    let bad = |what: &str| Error::usage(format!("--set {assignment}: {what}"));
    let (path, value) = assignment.split_once('=').ok_or_else(|| bad("expected key.path=value"))?;
    let value = format!("v = {value}").parse::<toml::Table>().ok().and_then(|mut t| t.remove("v"));
    let text = assignment.split_once('=').map(|(_, v)| v.to_string()).unwrap_or_default();
    put(table, path, value.unwrap_or(toml::Value::String(text))).map_err(|what| bad(&what))
}

/// Sets the value at a dotted path; tables on the way are made, array entries must exist.
pub fn put(table: &mut toml::Table, path: &str, value: toml::Value) -> Result<(), String> {
    let mut keys: Vec<&str> = path.trim().split('.').collect();
    let last = keys.pop().filter(|k| !k.is_empty()).ok_or("expected a key")?;
    let Some((first, rest)) = keys.split_first() else {
        table.insert(last.to_string(), value);
        return Ok(());
    };
    let empty = || toml::Value::Table(toml::Table::new());
    let mut at = table.entry(first.to_string()).or_insert_with(empty);
    for key in rest {
        at = match at {
            toml::Value::Table(t) => t.entry(key.to_string()).or_insert_with(empty),
            toml::Value::Array(a) => {
                let (index, len) = (key.parse::<usize>().ok(), a.len());
                index
                    .and_then(|i| a.get_mut(i))
                    .ok_or_else(|| format!("{key}: expected an index below {len}"))?
            }
            _ => return Err(format!("{key}: what is above it is neither a table nor an array")),
        };
    }
    match at {
        toml::Value::Table(t) => {
            t.insert(last.to_string(), value);
            Ok(())
        }
        toml::Value::Array(a) => {
            let (index, len) = (last.parse::<usize>().ok(), a.len());
            let slot = index.and_then(|i| a.get_mut(i));
            *slot.ok_or_else(|| format!("{last}: expected an index below {len}"))? = value;
            Ok(())
        }
        _ => Err(format!("{last}: what is above it is neither a table nor an array")),
    }
}
