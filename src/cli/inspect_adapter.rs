//! `qtune inspect` of an adapter's folder, and what it says of merged models and recipes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::Result;
use candle_core::{DType, Tensor};
use qtune::adapter::{Adapter, Method, Part, Record, Targets, Variant};
use qtune::recipe::{Recipe, EMBEDDED};
use qtune::train::Progress;
use serde_json::{json, Value};

use super::{bytes, print, print_json};

/// One tensor of a module.
struct Piece {
    part: String,
    shape: Vec<usize>,
    dtype: String,
    bytes: usize,
    norm: f64,
}

/// A module path whose numbers are compared as numbers.
type Place = Vec<(Option<u64>, String)>;

fn place(path: &str) -> Place {
    path.split('.').map(|segment| (segment.parse().ok(), segment.to_string())).collect()
}

/// The Frobenius norm, in f64.
fn norm(tensor: &Tensor) -> qtune::Result<f64> {
    let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt())
}

/// A tensor's part, spelled as its file does.
fn spelled(part: &Part) -> String {
    match part {
        Part::Base(leaf) => format!("base_layer.{leaf}"),
        Part::Own(leaf) => leaf.clone(),
        part => part.suffix().unwrap_or("tensor").to_string(),
    }
}

/// `peft_type`, the method by the name of its recipe, and alpha where it has one.
fn called(method: &Method) -> (&'static str, &'static str, Option<f64>) {
    match method {
        Method::Miss(miss) => {
            let name = match miss.variant {
                Variant::Bat => "bone",
                Variant::Mini => "mini",
                Variant::Additive | Variant::AdditiveUniform => "miss",
            };
            (if miss.bone { "BONE" } else { "MISS" }, name, None)
        }
        Method::Lora(lora) => {
            let pissa = lora.moved_base().is_some_and(|init| init.starts_with("pissa"));
            let name = match (lora.dora, lora.rslora) {
                (true, _) => "dora",
                (false, _) if pissa => "pissa",
                (false, true) => "rslora",
                (false, false) => "lora",
            };
            ("LORA", name, Some(lora.alpha))
        }
    }
}

fn targets(targets: &Targets) -> String {
    match targets {
        Targets::Default => "the architecture's own".to_string(),
        Targets::List(list) => list.join(", "),
        Targets::Pattern(pattern) => pattern.clone(),
    }
}

/// The last segments of paths, each with its count.
fn condensed<'a>(paths: impl Iterator<Item = &'a str>) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for path in paths {
        *counts.entry(path.rsplit('.').next().unwrap_or(path)).or_default() += 1;
    }
    counts.iter().map(|(name, n)| format!("{name} x {n}")).collect::<Vec<_>>().join(", ")
}

/// Prints what the adapter in `dir` holds.
pub fn adapter(dir: &Path, as_json: bool, progress: &dyn Progress) -> Result<()> {
    let adapter = Adapter::open(dir)?;
    adapter.notes().iter().for_each(|note| progress.note(note));
    let mut modules: BTreeMap<Place, (String, Vec<Piece>)> = BTreeMap::new();
    let mut ranks = BTreeSet::new();
    for (path, part, tensor) in adapter.tensors() {
        if matches!(part, Part::LoraA | Part::EmbeddingA) {
            ranks.extend(tensor.dims().first());
        }
        let piece = Piece {
            part: spelled(part),
            shape: tensor.dims().to_vec(),
            dtype: tensor.dtype().as_str().to_string(),
            bytes: tensor.elem_count() * tensor.dtype().size_in_bytes(),
            norm: norm(tensor)?,
        };
        modules.entry(place(path)).or_insert_with(|| (path.to_string(), Vec::new())).1.push(piece);
    }
    if ranks.is_empty() {
        ranks.insert(adapter.config.r());
    }
    let (peft_type, method, alpha) = called(&adapter.config.method);
    let pieces = || modules.values().flat_map(|(_, pieces)| pieces);
    let (count, stored) = (pieces().count(), pieces().map(|p| p.bytes).sum::<usize>());
    let elements: usize = pieces().map(|p| p.shape.iter().product::<usize>()).sum();
    let whole = |pieces: &[Piece]| pieces.iter().map(|p| p.norm * p.norm).sum::<f64>();
    let total = modules.values().map(|(_, pieces)| whole(pieces)).sum::<f64>().sqrt();
    let dtypes: BTreeSet<&str> = pieces().map(|p| p.dtype.as_str()).collect();
    let dtypes: Vec<&str> = dtypes.into_iter().collect();
    if as_json {
        let listed: Vec<Value> = modules
            .values()
            .map(|(path, pieces)| {
                let tensors: Vec<Value> = pieces
                    .iter()
                    .map(|p| {
                        json!({"part": p.part, "shape": p.shape, "dtype": p.dtype, "bytes": p.bytes, "norm": p.norm})
                    })
                    .collect();
                json!({"module": path, "norm": whole(pieces).sqrt(), "tensors": tensors})
            })
            .collect();
        return print_json(&json!({
            "command": "inspect",
            "path": dir.display().to_string(),
            "peft_type": peft_type,
            "method": method,
            "ranks": ranks,
            "alpha": alpha,
            "base": adapter.config.base,
            "revision": adapter.config.revision,
            "task_type": adapter.config.task_type,
            "target_modules": targets(&adapter.config.selection.targets),
            "modules_to_save": adapter.config.selection.modules_to_save,
            "modules": listed,
            "tensors": count,
            "params_total": elements,
            "bytes": stored,
            "dtypes": dtypes,
            "norm": total,
            "notes": adapter.notes(),
        }));
    }
    let ranks = ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    let alpha = alpha.map(|alpha| format!(", alpha {alpha}")).unwrap_or_default();
    let mut text = format!("{peft_type} ({method}), rank {ranks}{alpha}\n");
    let base = adapter.config.base.as_deref().unwrap_or("not named");
    text += &format!("base: {base}\ntargets: {}\n", targets(&adapter.config.selection.targets));
    text += &format!("modules: {}\n", condensed(modules.values().map(|(path, _)| path.as_str())));
    let width = modules.values().map(|(path, _)| path.len()).max().unwrap_or(0).max(6);
    text += &format!("{:width$}  {:>10}  {:>10}  tensors\n", "module", "bytes", "norm");
    for (path, pieces) in modules.values() {
        let shown = pieces.iter().map(|p| {
            let shape = p.shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" x ");
            format!("{} {shape} {} (norm {:.4})", p.part, p.dtype, p.norm)
        });
        let size = pieces.iter().map(|p| p.bytes).sum();
        let shown = shown.collect::<Vec<_>>().join(", ");
        text += &format!("{path:width$}  {:>10}  {:>10.4}  {shown}\n", bytes(size), whole(pieces).sqrt());
    }
    text += &format!(
        "{} modules, {count} tensors, {elements} parameters, {} ({}), norm {total:.4}",
        modules.len(),
        bytes(stored),
        dtypes.join(", ")
    );
    print(&text)
}

/// What was merged into a model, a line each.
pub fn merged_lines(record: &Record) -> String {
    let mut text = format!("merged onto {} ({})", record.base.display(), record.onto);
    for adapter in &record.adapters {
        text += &format!("\nmerged adapter {}, {} times its change", adapter.path.display(), adapter.scale);
    }
    if !record.before.is_empty() {
        text += &format!("\nmerged before, into the base: {} adapters", record.before.len());
    }
    text
}

/// Prints the recipes that are compiled in.
pub fn recipes(as_json: bool) -> Result<()> {
    let mut listed = Vec::with_capacity(EMBEDDED.len());
    for (name, _) in EMBEDDED {
        let table = Recipe::table(name)?;
        let about = table.get("about").and_then(|about| about.as_str()).unwrap_or_default().to_string();
        listed.push((*name, about));
    }
    if as_json {
        let recipes: Vec<Value> =
            listed.iter().map(|(name, about)| json!({"name": name, "about": about})).collect();
        return print_json(&json!({"command": "inspect", "recipes": recipes}));
    }
    let width = listed.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let lines: Vec<String> = listed.iter().map(|(name, about)| format!("{name:width$}  {about}")).collect();
    print(&lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_paths_are_compared_as_numbers() {
        let mut paths = ["m.10.q", "m.9.q", "m.norm", "m.9.k"];
        paths.sort_by_key(|path| place(path));
        assert_eq!(paths, ["m.norm", "m.9.k", "m.9.q", "m.10.q"]);
        assert_eq!(condensed(paths.into_iter()), "k x 1, norm x 1, q x 2");
    }
}
