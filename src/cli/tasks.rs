//! Tasks as the command line names them: paths of images, or recipes whose data they are.

use std::path::Path;

use anyhow::Result;
use qtune::recipe::Recipe;
use qtune::Error;
use toml::Value;

use super::flags::anchored;
use super::training::{count, path};

/// The tasks `given` as `[[continual.task]]` has them, each under a name of its own.
pub fn tables(given: &[String]) -> Result<Vec<Value>> {
    let (mut taken, mut tasks) = (Vec::new(), Vec::new());
    for name in given {
        let (name, task) = table(name, &taken)?;
        taken.push(name);
        tasks.push(Value::Table(task));
    }
    Ok(tasks)
}

fn table(name: &str, taken: &[String]) -> Result<(String, toml::Table)> {
    let mut table = toml::Table::new();
    let as_path = Path::new(name);
    let recipe = name.ends_with(".toml") || !as_path.exists();
    let data = match recipe {
        false => {
            let mut data = toml::Table::new();
            data.insert("path".into(), path(&anchored(as_path)));
            data
        }
        true => {
            let recipe = Recipe::table(name).map_err(|e| {
                Error::usage(format!("--tasks {name}: no such file or folder, and not a recipe ({e})"))
            })?;
            recipe.get("data").and_then(Value::as_table).cloned().unwrap_or_default()
        }
    };
    let stem = as_path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let stem = stem.unwrap_or_else(|| name.to_string());
    let mut unique = stem.clone();
    let mut number = 2;
    while taken.contains(&unique) {
        unique = format!("{stem}-{number}");
        number += 1;
    }
    table.insert("name".into(), Value::String(unique.clone()));
    table.insert("data".into(), Value::Table(data));
    Ok((unique, table))
}

/// Limits of the command line hold for every task, whatever its own data say.
pub fn limit(table: &mut toml::Table, train: Option<usize>, eval: Option<usize>) {
    let limits = [("limit_train", train), ("limit_eval", eval)];
    let tasks = table.get_mut("continual").and_then(|c| c.get_mut("task")).and_then(Value::as_array_mut);
    for data in tasks.into_iter().flatten().filter_map(|task| task.get_mut("data")) {
        for (key, limit) in limits.iter().filter_map(|(key, limit)| Some((key, (*limit)?))) {
            if let Some(data) = data.as_table_mut() {
                data.insert(key.to_string(), count(limit));
            }
        }
    }
}
