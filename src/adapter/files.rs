//! An adapter's directory: adapter_config.json and adapter_model.safetensors (adapters.md sections 1, 3).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use indexmap::IndexMap;

use super::config::AdapterConfig;
use super::method::Method;
use super::names::{self, Part};
use crate::files::{read_text, write_bytes, Staging};
use crate::weights::checkpoint::{check_finite, save};
use crate::weights::Checkpoint;
use crate::{Error, On, Result};

/// The file of the configuration.
pub(super) const CONFIG: &str = "adapter_config.json";
/// The file of the tensors.
pub(super) const TENSORS: &str = "adapter_model.safetensors";
/// What older versions of PEFT wrote instead.
const PICKLED: &str = "adapter_model.bin";

/// An adapter: its configuration and its tensors, each under a module path and a part.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// What it is and where it goes.
    pub config: AdapterConfig,
    tensors: IndexMap<(String, Part), Tensor>,
    source: PathBuf,
    notes: Vec<String>,
}

/// How an adapter is written.
#[derive(Clone, Debug)]
pub struct Save {
    /// The dtype of the tensors: f32, or bf16 and f16 for half the bytes.
    pub dtype: DType,
    /// Module paths of ViTs as transformers 4 spelled them.
    pub old_names: bool,
}

impl Default for Save {
    fn default() -> Self {
        Save { dtype: DType::F32, old_names: false }
    }
}

impl Adapter {
    /// An adapter of these tensors; `source` is for messages.
    pub(super) fn new(
        config: AdapterConfig,
        tensors: IndexMap<(String, Part), Tensor>,
        source: &Path,
    ) -> Self {
        Adapter { config, tensors, source: source.to_path_buf(), notes: Vec::new() }
    }

    /// Reads the adapter in the folder `dir`, or in its only child that holds one (with a note).
    ///
    /// Errs on what [`AdapterConfig::parse`] refuses, on a file of tensors that is missing, truncated or
    /// pickled, on a tensor whose name is not an adapter's, and on values that are not finite.
    pub fn open(dir: &Path) -> Result<Self> {
        let mut notes = Vec::new();
        let dir = folder(dir, &mut notes)?;
        let path = dir.join(CONFIG);
        let config = AdapterConfig::parse(&path, &read_text(&path)?, &mut notes)?;
        let path = dir.join(TENSORS);
        if !path.exists() && dir.join(PICKLED).exists() {
            return Err(Error::input(
                dir.join(PICKLED),
                format!(
                    "a pickled adapter, which is not read: expected {TENSORS}; PEFT writes it with \
                     save_pretrained(\"DIR\", safe_serialization=True)"
                ),
            ));
        }
        let file = Checkpoint::open(&path)?;
        if file.is_empty() {
            return Err(Error::input(&path, "found no tensor, expected an adapter's"));
        }
        let mut tensors = IndexMap::with_capacity(file.len());
        for name in file.names() {
            let wrong = |message: String| Error::input(&path, format!("tensor {name}: {message}"));
            let Some(key) = Part::parse(name) else {
                let expected = "expected base_model.model., a module's path and an adapter's part";
                return Err(wrong(format!("found this name, {expected}")));
            };
            let tensor = file.tensor(name, &Device::Cpu)?;
            if !matches!(tensor.dtype(), DType::F32 | DType::BF16 | DType::F16 | DType::F64) {
                return Err(wrong(format!("found {:?}, expected F32, BF16 or F16", tensor.dtype())));
            }
            check_finite(name, &tensor).map_err(|e| Error::input(&path, e.to_string()))?;
            let first = tensors.insert(key, tensor);
            if first.is_some() {
                return Err(wrong("found under two names, expected one".to_string()));
            }
        }
        Ok(Adapter { config, tensors, source: dir, notes })
    }

    /// One line for each choice that reading took.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The folder that it was read from; empty where it was collected.
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// The same with its tensors on `device`.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let moved = self.tensors.iter().map(|(key, tensor)| Ok((key.clone(), tensor.to_device(device)?)));
        Ok(Adapter { tensors: moved.collect::<Result<_>>()?, ..self.clone() })
    }

    /// Module path, part and tensor, in the order of the file.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Part, &Tensor)> {
        self.tensors.iter().map(|((path, part), tensor)| (path.as_str(), part, tensor))
    }

    /// The tensor that is `part` of the module at `path`.
    pub fn tensor(&self, path: &str, part: &Part) -> Option<&Tensor> {
        self.tensors.get(&(path.to_string(), part.clone()))
    }

    /// Whether blocks are called as BONE did.
    pub(super) fn bone(&self) -> bool {
        matches!(&self.config.method, Method::Miss(miss) if miss.bone)
    }

    /// The name of a tensor in a file.
    pub(super) fn name(&self, path: &str, part: &Part) -> String {
        part.name(path, self.bone())
    }

    /// Bytes of the tensors as they are held.
    pub fn bytes(&self) -> usize {
        self.tensors.values().map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum()
    }

    /// Says MISS (`false`) or BONE in the file. Errs where it is neither, or BONE has no such variant.
    pub fn call_bone(&mut self, bone: bool) -> Result<()> {
        match &mut self.config.method {
            Method::Miss(miss) => miss.bone = bone,
            Method::Lora(_) if bone => {
                return Err(Error::usage("--peft-type bone: found a LORA adapter, expected bone or miss"));
            }
            Method::Lora(_) => {}
        }
        self.config.to_json().map(|_| ())
    }

    /// Writes the folder `dir`, which must not exist, whole or not at all; returns the bytes of the
    /// tensors' file.
    pub fn save(&self, dir: &Path, how: &Save) -> Result<u64> {
        let staging = Staging::new(dir)?;
        let text = self.respelled(how.old_names)?.to_text()?;
        write_bytes(&staging.path().join(CONFIG), text.as_bytes())?;
        let mut tensors = Vec::with_capacity(self.tensors.len());
        for (path, part, tensor) in self.tensors() {
            let path = if how.old_names { names::older(path) } else { names::newer(path) };
            let name = self.name(&path, part);
            let tensor = tensor.to_dtype(how.dtype).on(&name)?;
            // A value beyond f16 would become an infinity that no reader takes.
            check_finite(&name, &tensor)?;
            tensors.push((name, tensor));
        }
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        let bytes = save(&staging.path().join(TENSORS), &tensors, &metadata)?;
        staging.commit()?;
        Ok(bytes)
    }
}

/// The folder that holds the adapter: `dir`, or its only child that does.
fn folder(dir: &Path, notes: &mut Vec<String>) -> Result<PathBuf> {
    if dir.join(CONFIG).exists() {
        return Ok(dir.to_path_buf());
    }
    let mut children = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let path = entry.map_err(|e| Error::io(dir, e))?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if !hidden && path.join(CONFIG).exists() {
            children.push(path);
        }
    }
    children.sort();
    match children.as_slice() {
        [one] => {
            notes.push(format!("{}: no {CONFIG} here, the one in {} is read", dir.display(), one.display()));
            Ok(one.clone())
        }
        [] => Err(Error::input(dir, format!("found no {CONFIG}, expected an adapter's folder"))),
        several => {
            let names = several.iter().filter_map(|p| p.file_name()).map(|n| n.to_string_lossy());
            let names = names.collect::<Vec<_>>().join(", ");
            Err(Error::input(
                dir,
                format!("found {CONFIG} in {names}, expected one adapter: name its folder"),
            ))
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;

    use super::super::targets::{Selection, Targets};
    use super::*;

    /// Values that differ, in f32.
    pub fn ramp(shape: &[usize]) -> Tensor {
        let count = shape.iter().product::<usize>();
        let values: Vec<f32> = (0..count).map(|i| (i as f32 * 0.37).sin() * 0.5).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// An adapter of these tensors, named by module path and part.
    pub fn adapter(method: Method, targets: &[&str], tensors: &[(&str, Part, Tensor)]) -> Adapter {
        let config = AdapterConfig {
            method,
            task_type: Some("CAUSAL_LM".into()),
            base: None,
            revision: None,
            auto_mapping: None,
            selection: Selection {
                targets: Targets::List(targets.iter().map(|t| t.to_string()).collect()),
                ..Selection::default()
            },
        };
        let tensors = tensors.iter().map(|(path, part, t)| ((path.to_string(), part.clone()), t.clone()));
        Adapter::new(config, tensors.collect(), Path::new("adapter"))
    }

    fn sample() -> Adapter {
        adapter(
            Method::Lora(Default::default()),
            &["q"],
            &[("m.q", Part::LoraA, ramp(&[2, 3])), ("m.q", Part::LoraB, ramp(&[4, 2]))],
        )
    }

    fn write(dir: &Path, config: &str, tensors: &[(&str, Tensor)]) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join(CONFIG), config).unwrap();
        let tensors: Vec<_> = tensors.iter().map(|(name, t)| (name.to_string(), t.clone())).collect();
        save(&dir.join(TENSORS), &tensors, &BTreeMap::new()).unwrap();
    }

    const LORA: &str = r#"{"peft_type": "LORA"}"#;

    #[test]
    fn what_is_saved_opens_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("runs").join("adapter");
        let bytes = sample().save(&path, &Save::default()).unwrap();
        assert_eq!(bytes, fs::metadata(path.join(TENSORS)).unwrap().len());
        let back = Adapter::open(&path).unwrap();
        assert_eq!(back.config, sample().config);
        assert_eq!((back.source(), back.notes().len()), (path.as_path(), 0));
        for (module, part, tensor) in sample().tensors() {
            let read = back.tensor(module, part).unwrap();
            assert_eq!(read.to_vec2::<f32>().unwrap(), tensor.to_vec2::<f32>().unwrap());
        }
        let file = Checkpoint::open(&path.join(TENSORS)).unwrap();
        assert_eq!(file.metadata().get("format").map(String::as_str), Some("pt"));
        assert!(file.names().all(|name| name.starts_with("base_model.model.m.q.lora_")));
        // Nothing is overwritten, and nothing else is left.
        assert!(sample().save(&path, &Save::default()).is_err());
        assert_eq!(fs::read_dir(dir.path().join("runs")).unwrap().count(), 1);
        let half = dir.path().join("half");
        sample().save(&half, &Save { dtype: DType::BF16, ..Save::default() }).unwrap();
        assert!(Adapter::open(&half).unwrap().tensors().all(|(_, _, t)| t.dtype() == DType::BF16));
    }

    #[test]
    fn a_parent_of_one_adapter_is_read_with_a_note() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        assert!(Adapter::open(dir.path()).unwrap_err().to_string().contains("found no adapter_config.json"));
        sample().save(&at("one"), &Save::default()).unwrap();
        let opened = Adapter::open(dir.path()).unwrap();
        assert!(opened.notes().len() == 1 && opened.notes()[0].contains("one"), "{:?}", opened.notes());
        sample().save(&at("two"), &Save::default()).unwrap();
        let error = Adapter::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("one, two"), "{error}");
        assert_eq!(Adapter::open(&at("none")).unwrap_err().exit_code(), 4);
    }

    #[test]
    fn bad_files_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let mut count = 0;
        let mut refused = |make: &dyn Fn(&Path), parts: &[&str]| {
            count += 1;
            let path = dir.path().join(format!("{count}"));
            make(&path);
            let error = Adapter::open(&path).unwrap_err();
            assert_eq!(error.exit_code(), 4, "{error}");
            let error = error.to_string();
            assert!(!error.contains('\n'));
            parts.iter().for_each(|part| assert!(error.contains(part), "{error:?} lacks {part:?}"));
        };
        let a = "base_model.model.m.q.lora_A.weight";
        let one = |value: f32| Tensor::new(&[[0f32, value]], &Device::Cpu).unwrap();
        refused(&|p| write(p, LORA, &[(a, one(f32::NAN))]), &[a, "NaN", TENSORS]);
        refused(&|p| write(p, LORA, &[(a, one(f32::INFINITY))]), &[a, "inf"]);
        refused(
            &|p| write(p, LORA, &[("m.q.lora_A.weight", one(1.0))]),
            &["m.q.lora_A.weight", "base_model"],
        );
        refused(&|p| write(p, LORA, &[(a, Tensor::new(&[1u8], &Device::Cpu).unwrap())]), &[a, "U8"]);
        let twice = [(a, one(1.0)), ("base_model.model.m.q.lora_A.default.weight", one(1.0))];
        refused(&|p| write(p, LORA, &twice), &["two names"]);
        refused(&|p| write(p, LORA, &[]), &["no tensor"]);
        refused(
            &|p| {
                write(p, LORA, &[(a, one(1.0))]);
                let file = fs::OpenOptions::new().write(true).open(p.join(TENSORS)).unwrap();
                file.set_len(file.metadata().unwrap().len() - 1).unwrap();
            },
            &[TENSORS],
        );
        refused(
            &|p| {
                write(p, LORA, &[(a, one(1.0))]);
                fs::rename(p.join(TENSORS), p.join(PICKLED)).unwrap();
            },
            &[PICKLED, "safe_serialization"],
        );
        refused(
            &|p| {
                write(p, LORA, &[(a, one(1.0))]);
                fs::remove_file(p.join(TENSORS)).unwrap();
            },
            &[TENSORS],
        );
    }

    #[test]
    fn values_beyond_f16_are_not_written() {
        let big = Tensor::new(&[[1e6f32]], &Device::Cpu).unwrap();
        let adapter = adapter(Method::Lora(Default::default()), &["q"], &[("m.q", Part::LoraA, big)]);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        assert!(adapter.save(&path, &Save { dtype: DType::F16, old_names: false }).is_err());
        assert!(!path.exists());
    }
}
