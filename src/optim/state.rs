//! What CLASSP carries from run to run: the sums S of every trainable, in a folder of their own.
//!
//! `optimizer.safetensors` holds `NAME.grad_sum` (and `NAME.measured` where thresholds are measured) and, in
//! its metadata, the version of the format, mode, settings, steps, the number of the task, the model that the
//! run started from (told, not compared: what follows on a task starts from what it left), and each trainable's
//! name, shape and power, with a BLAKE3 hash over them. A sum of |g|^p means nothing under another power or
//! mode: they have to be equal.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::classp::{ClasspConfig, TASK};
use super::{Optimizer, OptimizerConfig};
use crate::weights::{checkpoint, Checkpoint, Param};
use crate::{Error, Result};

/// The file within the folder.
pub const FILE: &str = "optimizer.safetensors";

/// The version of the format that this program writes and reads.
const VERSION: &str = "1";

/// A trainable as the metadata has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Listed {
    name: String,
    shape: Vec<usize>,
    power: f64,
}

/// A state to begin with.
#[derive(Clone, Copy, Debug)]
pub struct From<'a> {
    /// The folder of the state, or of the run that left it.
    pub dir: &'a Path,
    /// Whether trainables without a stored sum start at 0 and sums without a trainable are left out.
    pub partial: bool,
}

/// The update rule of a run that begins: empty, or with the state that an earlier run left, one task further
/// than that. Also gives what is worth a line; `clip` is the run's largest gradient norm, 0 for none.
pub fn begin(
    config: &OptimizerConfig,
    params: &[Param],
    clip: f64,
    from: Option<From<'_>>,
) -> Result<(Box<dyn Optimizer>, Vec<String>)> {
    let mut rule = config.build();
    let mut notes = Vec::new();
    if let OptimizerConfig::Classp(config) = config {
        notes.extend(config.notes(clip, params));
        if let Some(from) = from {
            notes.extend(load(from, config, rule.as_mut(), params)?);
            rule.next_task();
        }
    }
    Ok((rule, notes))
}

fn hash(listed: &[Listed]) -> String {
    let mut hasher = blake3::Hasher::new();
    for Listed { name, shape, .. } in listed {
        hasher.update(format!("{name} {shape:?}\n").as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// Writes the state of `rule` over `params`, after `step` steps from the model called `base`, into the folder
/// `dir`: whole or not at all, in place of what was there. Returns the bytes of the file.
pub fn save(
    dir: &Path,
    config: &ClasspConfig,
    rule: &dyn Optimizer,
    params: &[Param],
    (step, base): (usize, &str),
) -> Result<u64> {
    let state: BTreeMap<String, Tensor> = rule.state()?.into_iter().collect();
    let task = match state.get(TASK) {
        Some(task) => task.flatten_all()?.get(0)?.to_scalar::<u32>()?,
        None => return Err(Error::Run(format!("optimizer state: found no {TASK}"))),
    };
    let (mut tensors, mut listed) = (Vec::new(), Vec::new());
    for param in params {
        let Some(sum) = state.get(&format!("{}#grad_sum", param.name)) else { continue };
        let power = config.power_of(param);
        listed.push(Listed { name: param.name.clone(), shape: sum.dims().to_vec(), power });
        tensors.push((format!("{}.grad_sum", param.name), sum.clone()));
        let measured = state.get(&format!("{}#measured", param.name));
        tensors.extend(measured.map(|m| (format!("{}.measured", param.name), m.clone())));
    }
    let text =
        |value: serde_json::Result<String>| value.map_err(|e| Error::Run(format!("optimizer state: {e}")));
    let metadata: BTreeMap<String, String> = [
        ("version", VERSION.to_string()),
        ("mode", config.mode.name().to_string()),
        ("power", config.power.to_string()),
        ("step", step.to_string()),
        ("task", task.to_string()),
        ("base", base.to_string()),
        ("settings", text(serde_json::to_string(config))?),
        ("hash", hash(&listed)),
        ("params", text(serde_json::to_string(&listed))?),
    ]
    .map(|(key, value)| (key.to_string(), value))
    .into();
    std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    checkpoint::save(&dir.join(FILE), &tensors, &metadata)
}

/// The state's file in a folder, or in that of a run.
fn file(dir: &Path) -> Result<PathBuf> {
    let here = dir.join(FILE);
    let run = dir.join("optimizer").join(FILE);
    match (here.is_file(), run.is_file()) {
        (true, _) => Ok(here),
        (false, true) => Ok(run),
        (false, false) => {
            let message = format!("found neither {FILE} nor optimizer/{FILE}: a run with classp leaves it");
            Err(Error::input(dir, message))
        }
    }
}

/// Brings a stored state into `rule`.
fn load(
    from: From<'_>,
    config: &ClasspConfig,
    rule: &mut dyn Optimizer,
    params: &[Param],
) -> Result<Vec<String>> {
    let path = file(from.dir)?;
    let stored = Checkpoint::open(&path)?;
    let meta = |key: &str| {
        let value = stored.metadata().get(key).map(String::as_str);
        value.ok_or_else(|| Error::input(&path, format!("metadata: found no {key}")))
    };
    let differ = |what: &str, found: &str, expected: &str| {
        Err(Error::input(&path, format!("{what}: found {found}, expected {expected}")))
    };
    let version = meta("version")?;
    if version != VERSION {
        return differ("version", version, VERSION);
    }
    let (mode, wanted) = (meta("mode")?, config.mode.name());
    if mode != wanted {
        return differ("mode", mode, &format!("{wanted}, the recipe's: the sums mean another thing"));
    }
    let stated = meta("task")?;
    let task: u32 = stated
        .parse()
        .map_err(|_| Error::input(&path, format!("task: found {stated:?}, expected a number")))?;
    let listed: Vec<Listed> =
        serde_json::from_str(meta("params")?).map_err(|e| Error::input(&path, format!("params: {e}")))?;
    let found = hash(&listed);
    if found != meta("hash")? {
        return differ("hash of the names and shapes", &found, meta("hash")?);
    }
    let mut notes = Vec::new();
    let mut known = Vec::new();
    for param in params {
        let name = &param.name;
        let Some(entry) = listed.iter().find(|entry| entry.name == *name) else { continue };
        if entry.shape != param.var.dims() {
            let message =
                format!("{}: found shape {:?}, expected {:?}", path.display(), entry.shape, param.var.dims());
            return Err(Error::tensor(name, message));
        }
        let power = config.power_of(param);
        if entry.power != power {
            let (found, expected) = (entry.power.to_string(), power.to_string());
            return differ(&format!("power of {name}"), &found, &format!("{expected}, the recipe's"));
        }
        known.push(param.clone());
    }
    let missing: Vec<&str> =
        params.iter().filter(|p| !known.iter().any(|k| k.name == p.name)).map(|p| p.name.as_str()).collect();
    let extra: Vec<&str> = listed
        .iter()
        .filter(|entry| !params.iter().any(|p| p.name == entry.name))
        .map(|entry| entry.name.as_str())
        .collect();
    let hint = "train.allow_partial = true goes on without";
    for (names, what) in
        [(&missing, "trained, but without a stored sum"), (&extra, "stored, but not trained")]
    {
        let Some(first) = names.first() else { continue };
        let more = match names.len() {
            1 => String::new(),
            n => format!(" and {} more", n - 1),
        };
        let message = format!("{first}{more}: {what}");
        if !from.partial {
            return Err(Error::input(&path, format!("{message}; {hint}")));
        }
        notes.push(format!("{}: {message}", path.display()));
    }
    let device = params.first().map_or(Device::Cpu, |p| p.var.device().clone());
    let read = |key: &str| match key.rsplit_once('#') {
        _ if key == TASK => Ok(Tensor::new(&[task], &Device::Cpu)?),
        // Stored where no threshold was measured: that begins here.
        Some((name, "measured")) if !stored.contains(&format!("{name}.measured")) => {
            Ok(Tensor::new(&[0f64, 0.0], &Device::Cpu)?)
        }
        Some((name, part)) => stored.tensor(&format!("{name}.{part}"), &device),
        None => stored.tensor(key, &device),
    };
    rule.restore(&known, &read)?;
    let base = stored.metadata().get("base").map(|base| format!(" from {base}")).unwrap_or_default();
    notes.push(format!(
        "{}: sums of {} trainables after task {} ({} steps{base})",
        path.display(),
        known.len(),
        task + 1,
        meta("step")?
    ));
    Ok(notes)
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::optim::classp::{Classp, ClasspMode};
    use crate::weights::Role;

    fn params(names: &[&str]) -> Vec<Param> {
        let param = |name: &&str| Param {
            name: name.to_string(),
            var: Var::new(&[0f32, 0.0, 0.0], &Device::Cpu).unwrap(),
            role: Role::Plain,
        };
        names.iter().map(param).collect()
    }

    fn trained(config: &ClasspConfig, params: &[Param]) -> Classp {
        let mut rule = Classp::new(config.clone());
        for param in params {
            let grad = Tensor::new(&[1f32, -2.0, 0.0], &Device::Cpu).unwrap();
            rule.update(param, &grad, 0.1, true).unwrap();
        }
        rule
    }

    fn sums(rule: &dyn Optimizer) -> Vec<(String, Vec<f32>)> {
        let state = rule.state().unwrap().into_iter().filter(|(name, _)| name.ends_with("#grad_sum"));
        state.map(|(name, sum)| (name, sum.to_vec1().unwrap())).collect()
    }

    fn task(rule: &dyn Optimizer) -> u32 {
        let state = rule.state().unwrap();
        state.iter().find(|(name, _)| name == TASK).unwrap().1.to_vec1::<u32>().unwrap()[0]
    }

    #[test]
    fn what_a_run_leaves_another_begins_with_one_task_further() {
        let run = tempfile::tempdir().unwrap();
        let config = ClasspConfig::default();
        let params = params(&["a", "b"]);
        let rule = trained(&config, &params);
        let dir = run.path().join("optimizer");
        save(&dir, &config, &rule, &params, (7, "new a")).unwrap();
        let bytes = std::fs::read(dir.join(FILE)).unwrap();
        save(&dir, &config, &rule, &params, (7, "new a")).unwrap();
        assert_eq!(bytes, std::fs::read(dir.join(FILE)).unwrap());
        let config = OptimizerConfig::Classp(config);
        for dir in [run.path(), dir.as_path()] {
            let from = Some(From { dir, partial: false });
            let (again, notes) = begin(&config, &params, 0.0, from).unwrap();
            assert_eq!(sums(again.as_ref()), sums(&rule));
            assert_eq!((task(&rule), task(again.as_ref())), (0, 1));
            assert!(
                notes[0].contains("2 trainables") && notes[0].contains("7 steps from new a"),
                "{notes:?}"
            );
        }
        let (fresh, _) = begin(&config, &params, 0.0, None).unwrap();
        assert!(sums(fresh.as_ref()).is_empty() && task(fresh.as_ref()) == 0);
    }

    /// A run that measures thresholds begins with sums of one that did not.
    #[test]
    fn what_was_not_measured_is_measured_from_the_start() {
        let run = tempfile::tempdir().unwrap();
        let config = ClasspConfig::default();
        let params = params(&["a"]);
        save(run.path(), &config, &trained(&config, &params), &params, (1, "new a")).unwrap();
        let config = ClasspConfig { threshold_quantile: Some(0.5), quantile_steps: 1, ..config };
        let from = Some(From { dir: run.path(), partial: false });
        let (mut rule, _) = begin(&OptimizerConfig::Classp(config), &params, 0.0, from).unwrap();
        assert_eq!(sums(rule.as_ref())[0].1, [1.0, 2.0, 0.0]);
        let before: Vec<f32> = params[0].var.to_vec1().unwrap();
        let grad = Tensor::new(&[1f32, 2.0, 3.0], &Device::Cpu).unwrap();
        for moved in [false, true] {
            rule.update(&params[0], &grad, 0.1, true).unwrap();
            let now: Vec<f32> = params[0].var.to_vec1().unwrap();
            // The threshold is the second square: the third entry alone passes.
            assert_eq!((now[..2] == before[..2], now[2] != before[2]), (true, moved));
        }
    }

    #[test]
    fn what_differs_is_named() {
        let run = tempfile::tempdir().unwrap();
        let config = ClasspConfig::default();
        let all = params(&["a", "b"]);
        save(run.path(), &config, &trained(&config, &all), &all, (1, "new a")).unwrap();
        let begun = |config: &ClasspConfig, params: &[Param], partial| {
            let from = Some(From { dir: run.path(), partial });
            begin(&OptimizerConfig::Classp(config.clone()), params, 0.0, from)
        };
        let refused = |config: &ClasspConfig, params: &[Param]| {
            let error = begun(config, params, false).err().unwrap();
            assert_eq!(error.exit_code(), 4, "{error}");
            error.to_string()
        };
        let other = ClasspConfig { power: 2.0, ..ClasspConfig::default() };
        let text = refused(&other, &all);
        assert!(text.contains("power of a: found 1, expected 2"), "{text}");
        let other = ClasspConfig { mode: ClasspMode::Reference, ..ClasspConfig::default() };
        let text = refused(&other, &all);
        assert!(text.contains("mode: found paper, expected reference"), "{text}");
        let text = refused(&config, &params(&["a"]));
        assert!(text.contains("b: stored, but not trained"), "{text}");
        let text = refused(&config, &params(&["a", "b", "c", "d"]));
        assert!(text.contains("c and 1 more: trained, but without"), "{text}");
        let (rule, notes) = begun(&config, &params(&["b", "c"]), true).unwrap();
        assert_eq!(sums(rule.as_ref()), [("b#grad_sum".to_string(), vec![1.0, 2.0, 0.0])]);
        assert_eq!(notes.len(), 3, "{notes:?}");
        let mut wide = params(&["a"]);
        wide[0].var = Var::new(&[0f32], &Device::Cpu).unwrap();
        let text = begun(&config, &wide, true).err().unwrap().to_string();
        assert!(text.contains("tensor a") && text.contains("[3]") && text.contains("[1]"), "{text}");
        let nowhere = Some(From { dir: Path::new("/nowhere"), partial: false });
        let text = begin(&OptimizerConfig::Classp(config), &all, 0.0, nowhere).err().unwrap().to_string();
        assert!(text.contains("/nowhere") && text.contains(FILE), "{text}");
    }
}
