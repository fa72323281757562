//! Reference vectors of condition numbers and selections: every case of `kappatune/index.json` runs through here.
//!
//! The folder comes from `QTUNE_GOLDEN`; the default is the copy in `tests/golden`.

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use qtune::select::kappa::spectrum::{by, spectrum};
use qtune::select::kappa::{
    analyse, choose, low_rank_for, total_params, units, Fit, Float, KappaConfig, Kind, Matrix, Options, Role,
    Route, Scored, Spectrum, Unit,
};
use qtune::train::Quiet;
use qtune::weights::{Checkpoint, Weights};
use serde_json::Value;

fn folder() -> PathBuf {
    let root = std::env::var_os("QTUNE_GOLDEN").map(PathBuf::from);
    let root = root.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden"));
    root.join("kappatune")
}

fn index() -> Value {
    let path = folder().join("index.json");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

fn list<'v>(value: &'v Value, key: &str) -> &'v [Value] {
    value[key].as_array().unwrap_or_else(|| panic!("no list {key}"))
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().unwrap_or_else(|| panic!("no text {key} in {value}"))
}

fn size(value: &Value, key: &str) -> usize {
    value[key].as_u64().unwrap_or_else(|| panic!("no number {key} in {value}")) as usize
}

fn role(name: &str) -> Option<Role> {
    serde_json::from_value(Value::from(name)).ok()
}

/// Whether a spectrum is the one of a golden unit, within `tolerance` where that is wider than its own.
fn compare(name: &str, found: &Spectrum, unit: &Value, tolerance: f64) {
    assert_eq!(found.status.name(), text(unit, "status"), "{name}: {found:?}");
    let Some(kappa) = unit["kappa"].as_f64() else {
        assert_eq!(found.kappa(), None, "{name}");
        return;
    };
    let tolerance = unit["rel_tol"].as_f64().unwrap().max(tolerance);
    let near = |what: &str, found: f64, expected: f64| {
        let error = (found / expected - 1.0).abs();
        assert!(
            error <= tolerance,
            "{name}: {what} {found:e}, expected {expected:e}, off by {error:e} of {tolerance:e}"
        );
    };
    near("kappa", found.kappa().unwrap(), kappa);
    near("sigma_max", found.sigma_max, unit["sigma_max"].as_f64().unwrap());
    near("sigma_min", found.sigma_min, unit["sigma_min"].as_f64().unwrap());
}

/// The units of a case, through the store and the units that a program would make.
fn case(weights: &Weights, case: &Value) -> (Weights, Vec<Unit>) {
    let name = text(case, "tensor");
    let mut one = Weights::default();
    one.insert(name, weights.get(name).unwrap().clone());
    let role = match text(case, "kind") {
        "linear" => Role::Linear,
        other => role(other).unwrap_or_else(|| panic!("{name}: kind {other}")),
    };
    let found = units(&one, &|_, _| Some(role)).unwrap();
    (one, found)
}

fn matrices() -> Weights {
    let index = index();
    let path = folder().join(text(&index, "matrices"));
    Weights::from_checkpoint(Arc::new(Checkpoint::open(&path).unwrap()), &Device::Cpu)
}

#[test]
fn condition_numbers() {
    let (index, weights) = (index(), matrices());
    assert!(!list(&index, "cases").is_empty());
    for golden in list(&index, "cases") {
        let name = text(golden, "name");
        let (one, found) = case(&weights, golden);
        let expected = list(golden, "units");
        assert_eq!(found.len(), expected.len(), "{name}");
        for exact in [false, true] {
            let options = Options { exact, ignore_nonfinite: true, ..Options::default() };
            let scored = analyse(&one, &found, &options, None, &Quiet).unwrap();
            for (scored, unit) in scored.iter().zip(expected) {
                assert_eq!(
                    (scored.unit.rows, scored.unit.cols),
                    (size(unit, "rows"), size(unit, "cols")),
                    "{name}"
                );
                compare(name, &scored.spectrum, unit, 0.0);
            }
        }
        let refused = expected.iter().any(|unit| text(unit, "status") == "non_finite");
        let plain = analyse(&one, &found, &Options::default(), None, &Quiet);
        assert_eq!(plain.is_err(), refused, "{name}");
    }
}

/// Each route alone: right within its bound, or a refusal; never a wrong number.
#[test]
fn forced_routes() {
    let (index, weights) = (index(), matrices());
    let mut tried = [0usize; 3];
    for golden in list(&index, "cases") {
        let name = text(golden, "name");
        let (one, found) = case(&weights, golden);
        for (unit, expected) in found.iter().zip(list(golden, "units")) {
            let tensor = one.get(&unit.param).unwrap().tensor().unwrap();
            let wide = tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let start = unit.index.unwrap_or(0) * unit.numel();
            let bytes: Vec<u8> =
                wide[start..start + unit.numel()].iter().flat_map(|v| v.to_le_bytes()).collect();
            let matrix = Matrix { bytes: &bytes, float: Float::F64, rows: unit.rows, cols: unit.cols };
            let kappa = expected["kappa"].as_f64();
            for (i, route) in [Route::Gram, Route::Qr, Route::Direct].into_iter().enumerate() {
                let forced = by(route, &matrix);
                let seen = spectrum(&matrix, false).route == Route::Seen;
                match forced {
                    Some(found) => {
                        assert!(!seen, "{name}: {found:?}");
                        compare(&format!("{name} by {}", route.name()), &found, expected, 1e-4);
                        tried[i] += 1;
                    }
                    // What the gate lets through has to come through.
                    None => {
                        let gate = [9e4, 1e12 / (unit.rows.min(unit.cols) as f64).sqrt(), f64::INFINITY][i];
                        let within = kappa.is_some_and(|kappa| kappa < gate);
                        assert!(seen || !within, "{name} by {}: refused {kappa:?}", route.name());
                    }
                }
                if route == Route::Gram && kappa.is_some_and(|kappa| kappa > 1.1e5) {
                    assert!(forced.is_none(), "{name}: {forced:?}");
                }
            }
        }
    }
    assert!(tried.iter().all(|count| *count > 0), "{tried:?}");
}

/// The tiny model with its tied head, its units by the golden roles, and their spectra.
fn tiny() -> (Value, Weights, Vec<Scored>) {
    let index = index();
    let golden = index["tiny_model"].clone();
    let path = folder().join(text(&index, "model"));
    let mut weights = Weights::from_checkpoint(Arc::new(Checkpoint::open(&path).unwrap()), &Device::Cpu);
    for parameter in list(&golden, "parameters") {
        if let Some(first) = parameter["tied_to"].as_str() {
            let shared = weights.get(first).unwrap().clone();
            weights.insert(text(parameter, "name"), shared);
        }
    }
    let roles = |name: &str, _: &[usize]| {
        let all = list(&golden, "parameters");
        let parameter = all.iter().find(|p| text(p, "name") == name).unwrap_or_else(|| panic!("no {name}"));
        role(text(parameter, "role"))
    };
    let found = units(&weights, &roles).unwrap();
    let scored = analyse(&weights, &found, &Options::default(), None, &Quiet).unwrap();
    (golden, weights, scored)
}

#[test]
fn the_units_of_a_model() {
    let (golden, weights, scored) = tiny();
    assert_eq!(total_params(&weights).unwrap(), size(&golden, "total_unique_params"));
    let expected = list(&golden, "units");
    assert_eq!(scored.len(), expected.len());
    for unit in expected {
        let key = text(unit, "key");
        let scored = scored.iter().find(|s| s.unit.key() == key).unwrap_or_else(|| panic!("no unit {key}"));
        let Unit { rows, cols, role, kind, index, .. } = scored.unit;
        assert_eq!(
            (rows, cols, role.name()),
            (size(unit, "rows"), size(unit, "cols"), text(unit, "role")),
            "{key}"
        );
        assert_eq!(index.is_some(), kind == Kind::Experts, "{key}");
        compare(key, &scored.spectrum, unit, 0.0);
    }
    for parameter in list(&golden, "parameters") {
        if let Some(first) = parameter["tied_to"].as_str() {
            let unit = scored.iter().find(|s| s.unit.param == first).unwrap();
            assert_eq!(unit.unit.aliases, [text(parameter, "name")]);
        }
    }
}

fn names(scored: &[Scored], chosen: &[usize]) -> Vec<String> {
    chosen.iter().map(|&i| scored[i].unit.key()).collect()
}

fn config(golden: &Value) -> KappaConfig {
    let budget = &golden["budget"];
    let number = |key: &str| budget[key].as_f64().unwrap_or_else(|| panic!("no {key} in {budget}"));
    let roles = list(golden, "roles").iter().map(|r| role(r.as_str().unwrap()).unwrap()).collect();
    let max_dim = golden["max_dim"].as_u64().map(|n| n as usize);
    let mut config = KappaConfig { roles: Some(roles), max_dim, ..KappaConfig::default() };
    match text(budget, "kind") {
        "tensors" => config.tensors = Some(size(budget, "k")),
        "fraction" => config.fraction = Some(number("p")),
        "share" => {
            config.share = Some(number("p"));
            config.fit = if text(budget, "rule") == "fill" { Fit::Fill } else { Fit::Prefix };
        }
        "kappa_max" => config.kappa_max = Some(number("t")),
        other => panic!("budget {other}"),
    }
    config
}

#[test]
fn selections() {
    let (golden, _, scored) = tiny();
    let total = size(&golden, "total_unique_params");
    let all = KappaConfig { fraction: Some(1.0), ..KappaConfig::default() };
    let order: Vec<&str> = list(&golden, "order_default").iter().map(|n| n.as_str().unwrap()).collect();
    assert_eq!(names(&scored, &choose(&scored, total, &all, 0).unwrap()), order);
    // The order of what was analysed is no part of the result.
    let mut turned = scored.clone();
    turned.reverse();
    for selection in list(&golden, "selections") {
        let config = config(selection);
        let what = selection["budget"].to_string();
        let chosen = config.check().and_then(|()| choose(&scored, total, &config, 0));
        if !selection["error"].is_null() {
            let error = chosen.expect_err(&what);
            assert_eq!(error.exit_code(), 2, "{what}: {error}");
            continue;
        }
        let chosen = chosen.unwrap_or_else(|e| panic!("{what}: {e}"));
        let expected: Vec<&str> = list(selection, "selected").iter().map(|n| n.as_str().unwrap()).collect();
        assert_eq!(names(&scored, &chosen), expected, "{what}");
        let numel: usize = chosen.iter().map(|&i| scored[i].unit.numel()).sum();
        assert_eq!(numel, size(selection, "selected_numel"), "{what}");
        let again = choose(&turned, total, &config, 0).unwrap();
        assert_eq!(names(&turned, &again), expected, "{what} in another order");
    }
    if let Some(slices) = golden["trainable_slices_for_tensors_5"].as_object() {
        let five = KappaConfig { tensors: Some(5), ..KappaConfig::default() };
        let chosen = choose(&scored, total, &five, 0).unwrap();
        assert_eq!(slices.values().map(|s| s.as_array().unwrap().len()).sum::<usize>(), 5);
        for &i in &chosen {
            let Unit { param, index, .. } = &scored[i].unit;
            let slice = index.map_or(Value::Null, Value::from);
            assert!(slices[param].as_array().unwrap().contains(&slice), "{param} {slice}");
        }
    }
}

#[test]
fn low_rank_modules() {
    let (golden, _, scored) = tiny();
    let total = size(&golden, "total_unique_params");
    for golden in list(&golden, "lora") {
        let config = KappaConfig {
            tensors: Some(size(golden, "modules")),
            roles: Some(vec![Role::Linear]),
            ..KappaConfig::default()
        };
        let chosen = choose(&scored, total, &config, 0).unwrap();
        let modules: Vec<&str> = chosen.iter().map(|&i| scored[i].unit.module()).collect();
        let targets: Vec<&str> = list(golden, "targets").iter().map(|n| n.as_str().unwrap()).collect();
        assert_eq!(modules, targets);
        let sizes: Vec<(usize, usize)> =
            chosen.iter().map(|&i| (scored[i].unit.cols, scored[i].unit.rows)).collect();
        let params = size(golden, "adapter_params");
        assert_eq!(low_rank_for(&sizes, params).unwrap(), size(golden, "rank"));
        assert_eq!(low_rank_for(&sizes, params - 1).unwrap_or(0), size(golden, "rank") - 1);
    }
}

/// `qtune kappa` with these arguments: exit code, stdout, stderr.
fn qtune(args: &[&str]) -> (i32, String, String) {
    let output =
        std::process::Command::new(env!("CARGO_BIN_EXE_qtune")).arg("kappa").args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

/// Without a budget there is a table of what has no condition number too; with one nothing to choose from.
#[test]
fn a_table_of_what_cannot_be_chosen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("flat.safetensors");
    let zeros = Tensor::zeros((3, 2), DType::F32, &Device::Cpu).unwrap();
    let ones = Tensor::ones((3, 2), DType::F32, &Device::Cpu).unwrap();
    let tensors = [("a.weight", zeros), ("b.weight", ones)];
    candle_core::safetensors::save(&std::collections::HashMap::from(tensors), &path).unwrap();
    let model = path.to_str().unwrap();
    let (code, table, stderr) = qtune(&[model, "--no-cache"]);
    assert_eq!(code, 0, "{stderr}");
    for part in ["rank_deficient", "zero", "2 units of f32, 2 without a condition number"] {
        assert!(table.contains(part), "no {part:?} in {table}");
    }
    let (code, json, _) = qtune(&[model, "--no-cache", "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    let chosen = list(&json, "tensors").iter().filter(|t| t["selected"] == true || !t["rank"].is_null());
    assert_eq!((code, chosen.count(), size(&json, "params_trainable")), (0, 0, 0));
    let (code, _, stderr) = qtune(&[model, "--no-cache", "--budget", "1"]);
    assert_eq!(code, 2);
    assert!(stderr.contains("of 2 units 2 have no condition number"), "{stderr}");
}

/// The program on the tiny model, whose roles it takes from the names.
#[test]
fn the_command_line() {
    let index = index();
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.safetensors");
    std::fs::copy(folder().join(text(&index, "model")), &model).unwrap();
    let (model, out) = (model.to_str().unwrap(), dir.path().join("out"));
    let order: Vec<&str> =
        list(&index["tiny_model"], "order_default").iter().map(|n| n.as_str().unwrap()).collect();
    let run = |more: &[&str]| -> Value {
        let (code, stdout, stderr) = qtune(&[&[model, "--json", "--budget", "3"], more].concat());
        assert_eq!(code, 0, "{stderr}");
        serde_json::from_str(&stdout).unwrap()
    };
    let first = run(&["--out", out.to_str().unwrap(), "--threads", "2", "--spectrum", "stem.conv"]);
    let tensors = list(&first, "tensors");
    let selected = |v: &Value| -> Vec<String> {
        let chosen = list(v, "tensors").iter().filter(|t| t["selected"] == true);
        chosen.map(|t| text(t, "name").to_string()).collect()
    };
    assert_eq!(selected(&first), order[..3]);
    let ranked: Vec<&str> = tensors[..order.len()].iter().map(|t| text(t, "name")).collect();
    assert_eq!(ranked, order);
    assert_eq!(text(&tensors[order.len()], "status"), "rank_deficient");
    let spectrum = list(&first["spectra"], "stem.conv.weight");
    assert_eq!(spectrum.len(), 8);
    assert_eq!(first["command"], "kappa");
    assert!(dir.path().join(".qtune-kappa.json").exists());
    for file in ["summary.json", "selection.json", "report.html", "kappa.svg"] {
        assert!(out.join(file).exists(), "{file}");
    }
    let kept = qtune::select::kappa::Selection::read(&out).unwrap();
    assert_eq!(kept.selected().map(|e| e.name.clone()).collect::<Vec<_>>(), order[..3]);

    // Without the cache, with it, and with one thread: the same.
    for more in [&["--no-cache"][..], &["--threads", "1"], &["--exact", "--no-cache"]] {
        assert_eq!(run(more)["tensors"], first["tensors"], "{more:?}");
    }
    let (code, table, _) = qtune(&[model, "--top", "4"]);
    assert_eq!(code, 0);
    assert!(table.contains(order[0]) && table.contains("more") && !table.contains(order[9]), "{table}");

    for (args, message) in [
        (&["--budget", "share:0.0001"][..], "expected at least 0.04"),
        (&["--budget", "tensors:0"], "expected at least 1"),
        (&["--spectrum", "stem.cnv"], "a matrix here is"),
        (&["--include", "nothing*"], "no unit matches"),
    ] {
        let (code, stdout, stderr) = qtune(&[&[model], args].concat());
        assert_eq!((code, stdout.as_str()), (2, ""), "{args:?}: {stderr}");
        assert!(stderr.contains(message) && stderr.trim().lines().count() == 1, "{args:?}: {stderr}");
    }
    let (code, _, stderr) = qtune(&[model, "--out", out.to_str().unwrap()]);
    assert_ne!(code, 0);
    assert!(stderr.contains("out"), "{stderr}");
}
