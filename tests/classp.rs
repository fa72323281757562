//! CLASSP against reference trajectories, and the figures of continual learning against reference matrices:
//! every case of the index runs through here.
//!
//! The folder comes from `QTUNE_GOLDEN` (with `classp/index.json` beneath it); the default is the copy in
//! `tests/golden`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use qtune::continual::metrics::metrics;
use qtune::language::run;
use qtune::optim::classp::{ClasspConfig, ClasspMode, FirstTask};
use qtune::optim::{Optimizer, OptimizerConfig};
use qtune::recipe::{put, Recipe};
use qtune::train::Quiet;
use qtune::weights::{Checkpoint, Param, Role};
use serde_json::Value;

/// Relative, of a run in f64 (README of the vectors).
const F64: f64 = 1e-12;
/// Relative and absolute, of a run in f32 (README of the vectors).
const F32: (f64, f64) = (2e-5, 2e-6);

fn folder() -> PathBuf {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    std::env::var_os("QTUNE_GOLDEN").map_or_else(default, PathBuf::from).join("classp")
}

fn index() -> Value {
    let path = folder().join("index.json");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("no number {key} in {value}"))
}

/// The settings of one step of the schedule. The rule takes them at any step, as a recipe for one task and
/// the next would.
fn config(case: &Value, at: &Value) -> OptimizerConfig {
    let mode = match case["mode"].as_str() {
        Some("paper") => ClasspMode::Paper,
        Some("reference") => ClasspMode::Reference,
        other => panic!("mode {other:?}"),
    };
    OptimizerConfig::Classp(ClasspConfig {
        mode,
        threshold: number(at, "threshold"),
        power: number(at, "power"),
        epsilon: number(at, "epsilon"),
        scaling: at["scaling"].as_bool().unwrap(),
        weight_decay: number(case, "weight_decay"),
        no_decay: Vec::new(),
        ..ClasspConfig::default()
    })
}

/// A case's tensors, in one dtype.
struct Case<'a> {
    attrs: &'a Value,
    name: &'a str,
    params: Vec<Param>,
    grads: Vec<Tensor>,
    file: &'a Checkpoint,
    dtype: DType,
}

impl<'a> Case<'a> {
    fn new(attrs: &'a Value, file: &'a Checkpoint, dtype: DType) -> Self {
        let name = attrs["name"].as_str().unwrap();
        let mut case = Case { attrs, name, params: Vec::new(), grads: Vec::new(), file, dtype };
        for param in attrs["params"].as_array().unwrap() {
            let param = param.as_str().unwrap();
            let var = Var::from_tensor(&case.stored(param, "w0").to_dtype(dtype).unwrap()).unwrap();
            case.grads.push(case.stored(param, "grads").to_dtype(dtype).unwrap());
            case.params.push(Param { name: param.to_string(), var, role: Role::Plain });
        }
        case
    }

    fn stored(&self, param: &str, what: &str) -> Tensor {
        self.file.tensor(&format!("{}/{param}/{what}", self.name), &Device::Cpu).unwrap()
    }

    fn steps(&self) -> &'a [Value] {
        self.attrs["schedule"].as_array().unwrap()
    }

    /// The gradients of a step, clipped as the vectors are: by min(1, c / (norm + 1e-6)).
    fn gradients(&self, step: usize) -> Vec<Option<Tensor>> {
        let missing = |name: &str| {
            let pairs = self.attrs["missing_grad"].as_array().unwrap();
            pairs.iter().any(|pair| pair[0] == name && pair[1] == step as u64)
        };
        let grads: Vec<Option<Tensor>> = self
            .params
            .iter()
            .zip(&self.grads)
            .map(|(param, grads)| (!missing(&param.name)).then(|| grads.get(step).unwrap()))
            .collect();
        let Some(clip) = self.attrs["clip_global_norm"].as_f64() else { return grads };
        let square = |g: &Tensor| g.sqr().unwrap().sum_all().unwrap().to_dtype(DType::F64).unwrap();
        let squares = grads.iter().flatten().map(|g| square(g).to_scalar::<f64>().unwrap());
        let factor = (clip / (squares.sum::<f64>().sqrt() + 1e-6)).min(1.0);
        grads.into_iter().map(|g| g.map(|g| (g * factor).unwrap())).collect()
    }

    /// Takes one step; how many entries passed the test.
    fn step(&self, rule: &mut dyn Optimizer, step: usize) -> usize {
        let mut passed = 0.0;
        for (param, grad) in self.params.iter().zip(self.gradients(step)) {
            let Some(grad) = grad else { continue };
            rule.update(param, &grad, number(&self.steps()[step], "lr"), true).unwrap();
        }
        let count: usize = self.params.iter().map(|p| p.var.elem_count()).sum();
        for (key, value) in rule.figures() {
            if key == "passing" {
                passed = value / 100.0 * count as f64;
            }
        }
        passed.round() as usize
    }

    fn state(rule: &dyn Optimizer) -> BTreeMap<String, Tensor> {
        rule.state().unwrap().into_iter().collect()
    }

    /// The rule with the settings of `step` and the state of `before`.
    fn rule(&self, step: usize, before: Option<&dyn Optimizer>) -> Box<dyn Optimizer> {
        let config = config(self.attrs, &self.steps()[step]);
        config.check().unwrap();
        let mut rule = config.build();
        if let Some(before) = before {
            let state = Self::state(before);
            let known: Vec<Param> = self
                .params
                .iter()
                .filter(|p| state.contains_key(&format!("{}#grad_sum", p.name)))
                .cloned()
                .collect();
            rule.restore(&known, &|name| Ok(state[name].clone())).unwrap();
        }
        rule
    }

    fn close(&self, what: &str, step: usize, got: &Tensor, want: &Tensor) {
        let flat =
            |t: &Tensor| t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        for (i, (got, want)) in flat(got).into_iter().zip(flat(want)).enumerate() {
            let allowed = match self.dtype {
                DType::F64 => F64 * want.abs(),
                _ => F32.0 * want.abs() + F32.1,
            };
            let near = (got - want).abs() <= allowed;
            assert!(near, "{} {:?}, step {step}, {what}[{i}]: got {got}, want {want}", self.name, self.dtype);
        }
    }

    fn compare(&self, rule: &dyn Optimizer, step: usize) {
        let state = Self::state(rule);
        for param in &self.params {
            let at = |what: &str| self.stored(&param.name, what).get(step).unwrap();
            self.close(&param.name, step, param.var.as_tensor(), &at("w"));
            // A parameter that had no gradient yet has no sum.
            if let Some(sum) = state.get(&format!("{}#grad_sum", param.name)) {
                assert_eq!(sum.dtype(), self.dtype);
                self.close(&format!("{}#grad_sum", param.name), step, sum, &at("grad_sum"));
            }
        }
    }
}

/// The dtypes that a case is made for: on the boundary f32 cannot tell.
fn dtypes(case: &Value) -> &'static [DType] {
    match case["note"].as_str().is_some_and(|note| note.contains("run in f64")) {
        true => &[DType::F64],
        false => &[DType::F64, DType::F32],
    }
}

fn cases(index: &Value) -> &[Value] {
    let cases = index["cases"].as_array().unwrap();
    assert!(!cases.is_empty());
    cases
}

fn trajectories(index: &Value) -> Checkpoint {
    Checkpoint::open(&folder().join(index["file"].as_str().unwrap())).unwrap()
}

#[test]
fn every_trajectory_is_followed() {
    let index = index();
    let file = trajectories(&index);
    for attrs in cases(&index) {
        for &dtype in dtypes(attrs) {
            let case = Case::new(attrs, &file, dtype);
            let mut rule = case.rule(0, None);
            for step in 0..case.steps().len() {
                // The schedule changes settings, never the state.
                if step > 0 && case.steps()[step] != case.steps()[step - 1] {
                    rule = case.rule(step, Some(rule.as_ref()));
                }
                let passed = case.step(rule.as_mut(), step);
                case.compare(rule.as_ref(), step);
                let missing = attrs["missing_grad"].as_array().is_some_and(|m| !m.is_empty());
                if let Some(want) = attrs["weights_passing_threshold"][step].as_u64().filter(|_| !missing) {
                    assert_eq!(
                        passed as u64, want,
                        "{} {dtype:?}, step {step}: entries that pass",
                        case.name
                    );
                }
            }
        }
    }
}

/// Cut after any step and continued from the stored weights and sums; and from one's own state, to the bit.
#[test]
fn every_trajectory_is_resumed_after_any_step() {
    let index = index();
    let file = trajectories(&index);
    for attrs in cases(&index) {
        for &dtype in dtypes(attrs) {
            let whole = Case::new(attrs, &file, dtype);
            let mut rule = whole.rule(0, None);
            for step in 0..whole.steps().len() {
                if step > 0 {
                    rule = whole.rule(step, Some(rule.as_ref()));
                }
                whole.step(rule.as_mut(), step);
            }
            let bits = |case: &Case| -> Vec<Vec<f64>> {
                let flat = |p: &Param| p.var.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
                case.params.iter().map(|p| flat(p).to_vec1().unwrap()).collect()
            };
            let through = Case::new(attrs, &file, dtype);
            let mut plain = through.rule(0, None);
            for step in 0..through.steps().len() {
                if step > 0 && through.steps()[step] != through.steps()[step - 1] {
                    plain = through.rule(step, Some(plain.as_ref()));
                }
                through.step(plain.as_mut(), step);
            }
            assert_eq!(bits(&whole), bits(&through), "{} {dtype:?}", whole.name);
            for cut in 1..whole.steps().len() {
                let case = Case::new(attrs, &file, dtype);
                let mut rule = case.rule(cut, None);
                let at = |param: &str, what: &str| {
                    case.stored(param, what).get(cut - 1).unwrap().to_dtype(dtype).unwrap()
                };
                for param in &case.params {
                    param.var.set(&at(&param.name, "w")).unwrap();
                }
                let read = |name: &str| {
                    Ok(match name.split_once('#') {
                        Some((param, "grad_sum")) => at(param, "grad_sum"),
                        _ => Tensor::new(&[0u32], &Device::Cpu)?,
                    })
                };
                rule.restore(&case.params, &read).unwrap();
                for step in cut..case.steps().len() {
                    if case.steps()[step] != case.steps()[step - 1] {
                        rule = case.rule(step, Some(rule.as_ref()));
                    }
                    case.step(rule.as_mut(), step);
                    case.compare(rule.as_ref(), step);
                }
            }
        }
    }
}

/// A schedule that changes scaling and threshold once is that of a first task and those after it.
#[test]
fn a_switch_is_what_a_task_boundary_does() {
    let index = index();
    let file = trajectories(&index);
    let mut run = 0;
    for attrs in cases(&index).iter().filter(|case| case["mode"] == "paper") {
        let case = Case::new(attrs, &file, DType::F64);
        let steps = case.steps();
        let changes: Vec<usize> = (1..steps.len()).filter(|&i| steps[i] != steps[i - 1]).collect();
        let [boundary] = changes[..] else { continue };
        let (before, after) = (&steps[0], &steps[boundary]);
        if ["power", "epsilon"].iter().any(|key| before[key] != after[key]) {
            continue;
        }
        let OptimizerConfig::Classp(mut config) = config(attrs, after) else { panic!() };
        config.first =
            Some(FirstTask { scaling: before["scaling"].as_bool(), threshold: before["threshold"].as_f64() });
        let mut rule = OptimizerConfig::Classp(config).build();
        for step in 0..steps.len() {
            if step == boundary {
                rule.next_task();
            }
            case.step(rule.as_mut(), step);
            case.compare(rule.as_ref(), step);
        }
        run += 1;
    }
    // The published schedule is among the vectors.
    assert!(run > 0, "no case switches");
}

#[test]
fn the_figures_of_every_matrix() {
    let index = index();
    let matrices = index["continual_metrics"].as_array().unwrap();
    assert!(!matrices.is_empty());
    for (at, case) in matrices.iter().enumerate() {
        let row = |row: &Value| -> Vec<f64> {
            row.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
        };
        let r: Vec<Vec<f64>> = case["R"].as_array().unwrap().iter().map(row).collect();
        let before = case.get("before_training").filter(|b| !b.is_null()).map(row);
        let got = serde_json::to_value(metrics(&r, before.as_deref()).unwrap()).unwrap();
        for (key, got) in got.as_object().unwrap() {
            match (got.as_f64(), case.get(key).and_then(Value::as_f64)) {
                // A few roundings of sums over at most some tens of accuracies.
                (Some(got), Some(want)) => {
                    assert!((got - want).abs() <= 1e-12, "matrix {at}: {key}: got {got}, want {want}")
                }
                (got, want) => assert_eq!(got, want, "matrix {at}: {key}"),
            }
        }
    }
}

/// A run over the built-in text `task`, of a model in a folder or the carried one.
fn tuned(
    dir: &Path,
    task: &str,
    model: Option<&Path>,
    state: Option<&Path>,
    changes: &[(&str, toml::Value)],
) -> qtune::Result<Value> {
    let mut table = Recipe::table("classp").unwrap();
    let path = |path: &Path| toml::Value::String(path.display().to_string());
    let mut keys: Vec<(&str, toml::Value)> = vec![
        ("text.builtin", task.into()),
        ("text.seq_len", toml::Value::Integer(128)),
        ("text.pack", toml::Value::Boolean(true)),
        ("text.limit_train", toml::Value::Integer(300)),
        ("text.limit_eval", toml::Value::Integer(20)),
        ("train.batch_size", toml::Value::Integer(16)),
        ("train.accumulate", toml::Value::Integer(1)),
        ("train.checkpoint_steps", toml::Value::Integer(2)),
        ("phase.0.steps", toml::Value::Integer(6)),
    ];
    keys.extend(model.map(|model| ("model.path", path(model))));
    keys.extend(state.map(|state| ("train.optimizer_state", path(state))));
    for (key, value) in keys.iter().chain(changes) {
        put(&mut table, key, value.clone()).unwrap();
    }
    std::fs::create_dir_all(dir).unwrap();
    run(&Recipe::resolve(table)?, dir, &Device::Cpu, &Quiet)
}

/// The Euclidean distance of two models.
fn distance(a: &Path, b: &Path) -> f64 {
    let open = |dir: &Path| Checkpoint::open(&dir.join("model")).unwrap();
    let (a, b) = (open(a), open(b));
    let square = |name: &str| {
        let of = |c: &Checkpoint| c.tensor(name, &Device::Cpu).unwrap();
        let sum = (of(&a) - of(&b)).unwrap().sqr().unwrap().sum_all().unwrap();
        f64::from(sum.to_scalar::<f32>().unwrap())
    };
    a.names().map(square).sum::<f64>().sqrt()
}

/// What an earlier run's state remembers holds a later one back; the task is counted on; a resumed run does
/// not take the state up twice.
#[test]
fn a_later_run_that_remembers_moves_less() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    tuned(&at("first"), "grammar", None, None, &[]).unwrap();
    let model = at("first").join("model");
    tuned(&at("without"), "sorting", Some(&model), None, &[]).unwrap();
    tuned(&at("with"), "sorting", Some(&model), Some(&at("first")), &[]).unwrap();
    let (with, without) = (distance(&at("first"), &at("with")), distance(&at("first"), &at("without")));
    assert!(with > 0.0 && with < 0.8 * without, "{with} {without}");
    let state = |name: &str| Checkpoint::open(&at(name).join("optimizer/optimizer.safetensors")).unwrap();
    let tasks = ["first", "without", "with"].map(|name| state(name).metadata()["task"].clone());
    assert_eq!(tasks, ["0", "0", "1"]);

    // Cut after step 2 and resumed.
    let cut = at("cut");
    std::fs::create_dir_all(cut.join("checkpoints")).unwrap();
    std::fs::copy(at("with").join("metrics.jsonl"), cut.join("metrics.jsonl")).unwrap();
    let checkpoint = |run: &Path, step: usize| run.join(format!("checkpoints/step-{step:08}-p0"));
    std::fs::create_dir(checkpoint(&cut, 2)).unwrap();
    let from = tempfile::tempdir().unwrap();
    tuned(
        from.path(),
        "sorting",
        Some(&model),
        Some(&at("first")),
        &[("train.keep", toml::Value::Integer(9))],
    )
    .unwrap();
    for entry in std::fs::read_dir(checkpoint(from.path(), 2)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), checkpoint(&cut, 2).join(entry.file_name())).unwrap();
    }
    tuned(&cut, "sorting", Some(&model), Some(&at("first")), &[]).unwrap();
    let bytes = |run: &Path| std::fs::read(run.join("optimizer/optimizer.safetensors")).unwrap();
    assert_eq!(distance(&at("with"), &cut), 0.0);
    assert_eq!(bytes(&at("with")), bytes(&cut));

    // Another power, other trainables, another rule.
    let refused = |changes: &[(&str, toml::Value)]| {
        tuned(&at("refused"), "sorting", Some(&model), Some(&at("first")), changes).unwrap_err().to_string()
    };
    let power = refused(&[("optimizer.power", toml::Value::Float(2.0))]);
    assert!(power.contains("power of") && power.contains("found 1, expected 2"), "{power}");
    let lora = "kind = \"lora\"".parse::<toml::Table>().unwrap();
    let other = refused(&[("adapter", toml::Value::Table(lora))]);
    assert!(other.contains("without a stored sum") && other.contains("allow_partial"), "{other}");
    let sgd = "kind = \"sgd\"".parse::<toml::Table>().unwrap();
    let rule = refused(&[("optimizer", toml::Value::Table(sgd))]);
    assert!(rule.contains("train.optimizer_state") && rule.contains("classp"), "{rule}");
}
