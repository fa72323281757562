//! adapter_config.json, read and written (adapters.md section 2).
//!
//! Read is whatever PEFT wrote in any version: a missing key takes its default, unknown keys are named
//! in one note, lists that Python kept as sets have no order. What would change the equations and is not
//! computed here is an error that names the key. Written is the small set of keys that old and new
//! versions of PEFT both load.

use std::path::Path;

use serde_json::{json, Map, Value};

use super::fields::Fields;
use super::method::{LoraConfig, Method, MissConfig, CHANGES_THE_MATHS, LORA};
use super::targets::{Bias, Selection, Targets};
use crate::{Error, Result};

/// What an adapter is and where it goes.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// The method and its numbers.
    pub method: Method,
    /// `task_type`, one of PEFT's.
    pub task_type: Option<String>,
    /// `base_model_name_or_path`: a hub name or a path; may be stale.
    pub base: Option<String>,
    /// `revision` of the base.
    pub revision: Option<String>,
    /// `auto_mapping`: the base model's class, where there is no task type.
    pub auto_mapping: Option<Value>,
    /// Which modules.
    pub selection: Selection,
}

/// Keys that every type has.
const COMMON: [&str; 13] = [
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "bias",
];

/// PEFT's task types.
const TASKS: [&str; 6] =
    ["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"];

impl AdapterConfig {
    /// Reads the file's text; `path` is for messages. What is worth a line is added to `notes`.
    ///
    /// Errs on text that is not a JSON object, a `peft_type` other than LORA, MISS and BONE, values of
    /// the wrong type, and settings that change the equations and are not computed here.
    pub fn parse(path: &Path, text: &str, notes: &mut Vec<String>) -> Result<Self> {
        let fields = Fields::parse(path, text)?;
        let Some(kind) = fields.text("peft_type")? else {
            return Err(fields.error("peft_type", "missing, expected LORA, MISS or BONE"));
        };
        let (method, own): (_, &[&str]) = match kind.as_str() {
            "LORA" => (Method::Lora(LoraConfig::read(&fields)?), &LORA),
            "MISS" => {
                let own = &["r", "miss_dropout", "mini_r", "init_weights"];
                (Method::Miss(MissConfig::read(&fields, false)?), own)
            }
            "BONE" => (Method::Miss(MissConfig::read(&fields, true)?), &["r", "init_weights"]),
            other => {
                let message =
                    format!("found {other:?}, expected LORA, MISS or BONE: no other type is supported");
                return Err(fields.error("peft_type", &message));
            }
        };
        let lora = matches!(method, Method::Lora(_));
        let unknown: Vec<&str> = fields
            .names()
            .filter(|key| !COMMON.contains(key) && !own.contains(key))
            .filter(|key| !(lora && CHANGES_THE_MATHS.contains(key)))
            .collect();
        if !unknown.is_empty() {
            notes.push(format!(
                "{}: keys that are not known were ignored: {}",
                path.display(),
                unknown.join(", ")
            ));
        }
        let task_type = fields.text("task_type")?;
        if let Some(task) = task_type.as_deref().filter(|task| !TASKS.contains(task)) {
            let message = format!("found {task:?}, expected null or one of {}", TASKS.join(", "));
            return Err(fields.error("task_type", &message));
        }
        let selection = read_selection(&fields, lora)?;
        Ok(AdapterConfig {
            method,
            task_type,
            base: fields.text("base_model_name_or_path")?,
            revision: fields.text("revision")?,
            auto_mapping: fields.value("auto_mapping").cloned(),
            selection,
        })
    }

    /// The configuration as JSON: the keys that every version of PEFT which knows the type loads.
    ///
    /// Errs where BONE is asked for and has no such variant.
    pub fn to_json(&self) -> Result<Value> {
        let mut keys = Map::new();
        let selection = &self.selection;
        let list = |list: &[String]| match list.is_empty() {
            true => Value::Null,
            false => json!(list),
        };
        let targets = |targets: &Targets| match targets {
            Targets::Default => Value::Null,
            Targets::List(list) => json!(list),
            Targets::Pattern(pattern) => json!(pattern),
        };
        let (kind, only) = match &self.method {
            Method::Lora(lora) => {
                lora.write(&mut keys);
                ("LORA", "lora_only")
            }
            Method::Miss(miss) => {
                miss.write(&mut keys)?;
                if miss.bone {
                    ("BONE", "bone_only")
                } else {
                    ("MISS", "MiSS_only")
                }
            }
        };
        let bias = match selection.bias {
            Bias::None => "none",
            Bias::All => "all",
            Bias::Only => only,
        };
        let layers = selection.layers_to_transform.as_ref().map_or(Value::Null, |layers| json!(layers));
        let mapping = self.auto_mapping.clone().filter(|_| self.task_type.is_none());
        keys.extend([
            ("peft_type".to_string(), json!(kind)),
            ("task_type".to_string(), json!(self.task_type)),
            ("base_model_name_or_path".to_string(), json!(self.base)),
            ("revision".to_string(), json!(self.revision)),
            ("inference_mode".to_string(), json!(true)),
            ("auto_mapping".to_string(), mapping.unwrap_or(Value::Null)),
            ("target_modules".to_string(), targets(&selection.targets)),
            ("layers_to_transform".to_string(), layers),
            ("layers_pattern".to_string(), list(&selection.layers_pattern)),
            ("modules_to_save".to_string(), list(&selection.modules_to_save)),
            ("bias".to_string(), json!(bias)),
        ]);
        // Since PEFT 0.14: older versions refuse a file that has it.
        if let Some(exclude) = &selection.exclude {
            keys.insert("exclude_modules".to_string(), targets(exclude));
        }
        Ok(Value::Object(keys))
    }

    /// The file's text: keys sorted, nested ones too, two spaces, no newline at the end.
    pub fn to_text(&self) -> Result<String> {
        let sorted = sorted(&self.to_json()?);
        serde_json::to_string_pretty(&sorted).map_err(|e| Error::Run(format!("adapter_config.json: {e}")))
    }

    /// The rank that the configuration names, before patterns.
    pub fn r(&self) -> usize {
        match &self.method {
            Method::Lora(lora) => lora.r,
            Method::Miss(miss) => miss.r,
        }
    }
}

fn read_selection(fields: &Fields, lora: bool) -> Result<Selection> {
    let targets = match fields.list_or_text("target_modules")? {
        None => Targets::Default,
        Some(targets) => targets,
    };
    let layers_to_transform = fields.numbers("layers_to_transform")?;
    let layers_pattern = match fields.list_or_text("layers_pattern")? {
        Some(Targets::List(list)) => list,
        Some(Targets::Pattern(one)) if !one.is_empty() => vec![one],
        _ => Vec::new(),
    };
    if matches!(targets, Targets::Pattern(_)) {
        for (key, set) in [
            ("layers_to_transform", layers_to_transform.is_some()),
            ("layers_pattern", !layers_pattern.is_empty()),
        ] {
            if set {
                return Err(fields.error(key, "expected null where target_modules is a text and no list"));
            }
        }
    }
    if lora && layers_to_transform.is_none() && !layers_pattern.is_empty() {
        return Err(fields.error("layers_pattern", "expected null without layers_to_transform"));
    }
    let saved = match fields.list_or_text("modules_to_save")? {
        None => Vec::new(),
        Some(Targets::List(list)) => list,
        Some(_) => return Err(fields.error("modules_to_save", "found a text, expected a list")),
    };
    let bias = match fields.text("bias")?.as_deref() {
        None | Some("none") => Bias::None,
        Some("all") => Bias::All,
        Some(only) if only.ends_with("_only") => Bias::Only,
        Some(other) => {
            let message = format!("found {other:?}, expected \"none\", \"all\" or one that ends in _only");
            return Err(fields.error("bias", &message));
        }
    };
    let exclude = fields.list_or_text("exclude_modules")?;
    let exclude = exclude.filter(|e| !matches!(e, Targets::List(list) if list.is_empty()));
    Ok(Selection { targets, exclude, layers_to_transform, layers_pattern, modules_to_save: saved, bias })
}

/// The same value with the keys of every object in order.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(keys) => {
            let mut pairs: Vec<_> = keys.iter().collect();
            pairs.sort_by(|a, b| a.0.cmp(b.0));
            Value::Object(pairs.into_iter().map(|(key, value)| (key.clone(), sorted(value))).collect())
        }
        Value::Array(list) => Value::Array(list.iter().map(sorted).collect()),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::method::Variant;
    use super::*;

    fn parse(text: &str) -> Result<(AdapterConfig, Vec<String>)> {
        let mut notes = Vec::new();
        let config = AdapterConfig::parse(Path::new("a/adapter_config.json"), text, &mut notes)?;
        Ok((config, notes))
    }

    #[track_caller]
    fn refused(text: &str, parts: &[&str]) {
        let error = parse(text).expect_err(text);
        assert_eq!(error.exit_code(), 4, "{error}");
        let error = error.to_string();
        assert!(!error.contains('\n') && error.contains("adapter_config.json"), "{error}");
        parts.iter().for_each(|part| assert!(error.contains(part), "{error:?} lacks {part:?}"));
    }

    #[test]
    fn the_type_alone_is_enough() {
        let (config, notes) = parse(r#"{"peft_type": "LORA"}"#).unwrap();
        assert_eq!(config.method, Method::Lora(LoraConfig::default()));
        assert_eq!((config.selection.targets, config.selection.bias), (Targets::Default, Bias::None));
        assert!(notes.is_empty());
        let (config, _) = parse(r#"{"peft_type": "MISS"}"#).unwrap();
        assert_eq!(config.method, Method::Miss(MissConfig::default()));
        assert_eq!(config.r(), 64);
    }

    #[test]
    fn unknown_keys_are_named_once() {
        let (_, notes) =
            parse(r#"{"peft_type": "LORA", "b_new": 1, "a_new": null, "megatron_core": "m"}"#).unwrap();
        assert_eq!(notes.len(), 1);
        assert!(notes[0].contains("b_new") && notes[0].contains("a_new") && !notes[0].contains("megatron"));
    }

    #[test]
    fn patterns_keep_their_order_and_alpha_may_be_a_float() {
        let text = r#"{"peft_type": "LORA", "lora_alpha": 11.313708498984761, "use_rslora": true,
            "rank_pattern": {"z": 4, "a": 2, "m": 3}, "alpha_pattern": {"q": 1.5}}"#;
        let Method::Lora(lora) = parse(text).unwrap().0.method else { panic!("LORA") };
        let order: Vec<&str> = lora.rank_pattern.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(order, ["z", "a", "m"]);
        assert_eq!((lora.alpha, lora.alpha_pattern[0].1), (11.313708498984761, 1.5));
    }

    #[test]
    fn what_is_written_reads_back() {
        for text in [
            r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 12, "target_modules": ["v", "q"], "task_type": "CAUSAL_LM",
                "use_dora": true, "init_lora_weights": "gaussian", "rank_pattern": {"^a\\.b": 2}, "lora_dropout": 0.05}"#,
            r#"{"peft_type": "MISS", "init_weights": "mini", "mini_r": 4, "bias": "MiSS_only", "miss_dropout": 0.1,
                "exclude_modules": ["lm_head"], "layers_to_transform": [0, 3], "layers_pattern": "h", "target_modules": ["q"]}"#,
            r#"{"peft_type": "BONE", "r": 16, "init_weights": false, "target_modules": ".*q", "modules_to_save": ["classifier"],
                "auto_mapping": {"parent_library": "p", "base_model_class": "c"}, "bias": "bone_only"}"#,
            r#"{"peft_type": "BONE", "init_weights": "bat", "bias": "all", "base_model_name_or_path": "é/b", "revision": "x"}"#,
        ] {
            let (config, _) = parse(text).unwrap();
            let written = config.to_text().unwrap();
            assert_eq!(parse(&written).unwrap().0, config, "{written}");
            assert!(!written.ends_with('\n') && written.starts_with("{\n  \""));
            // Every key of the source that is written has the value it had.
            let (source, written): (Value, Value) =
                (serde_json::from_str(text).unwrap(), serde_json::from_str(&written).unwrap());
            for (key, value) in source.as_object().unwrap() {
                if key != "layers_pattern" {
                    assert_eq!(written.get(key), Some(value), "{key}");
                }
            }
            assert!(written.get("peft_version").is_none());
        }
    }

    #[test]
    fn keys_are_written_in_order() {
        let text = r#"{"peft_type": "BONE", "auto_mapping": {"z": {"y": 1, "b": 2}, "a": []}}"#;
        let written = parse(text).unwrap().0.to_text().unwrap();
        let keys: Vec<&str> = written
            .lines()
            .filter_map(|l| l.strip_prefix("  \"")?.split_once('"'))
            .map(|(key, _)| key)
            .collect();
        let mut order = keys.clone();
        order.sort();
        assert_eq!(keys, order);
        let at = |key: &str| written.find(key).unwrap();
        assert!(at("\"a\": []") < at("\"z\"") && at("\"b\": 2") < at("\"y\": 1"));
    }

    #[test]
    fn bone_has_neither_mini_nor_dropout() {
        for miss in [
            MissConfig { variant: Variant::Mini, bone: true, ..MissConfig::default() },
            MissConfig { dropout: 0.1, bone: true, ..MissConfig::default() },
        ] {
            let (mut config, _) = parse(r#"{"peft_type": "MISS"}"#).unwrap();
            config.method = Method::Miss(miss);
            assert!(config.to_text().unwrap_err().to_string().contains("MISS"));
        }
        refused(r#"{"peft_type": "BONE", "init_weights": "mini"}"#, &["init_weights", "mini", "bat"]);
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        refused("[]", &["JSON object"]);
        refused("{", &["JSON"]);
        refused("{}", &["peft_type", "missing"]);
        refused(r#"{"peft_type": "LOHA"}"#, &["peft_type", "LOHA", "LORA, MISS or BONE"]);
        refused(r#"{"peft_type": "lora"}"#, &["peft_type", "lora"]);
        refused(r#"{"peft_type": 3}"#, &["peft_type", "found 3"]);
        refused(r#"{"peft_type": "LORA", "r": 0}"#, &["r: found 0"]);
        refused(r#"{"peft_type": "LORA", "r": 4.5}"#, &["r: found 4.5"]);
        refused(r#"{"peft_type": "LORA", "lora_alpha": "x"}"#, &["lora_alpha"]);
        refused(r#"{"peft_type": "LORA", "lora_dropout": 1.0}"#, &["lora_dropout", "1"]);
        refused(r#"{"peft_type": "LORA", "task_type": "CHAT"}"#, &["task_type", "CHAT", "CAUSAL_LM"]);
        refused(r#"{"peft_type": "LORA", "init_lora_weights": "magic"}"#, &["init_lora_weights", "magic"]);
        refused(r#"{"peft_type": "LORA", "bias": "some"}"#, &["bias", "some"]);
        refused(r#"{"peft_type": "LORA", "use_qalora": true}"#, &["use_qalora", "true"]);
        refused(r#"{"peft_type": "LORA", "layer_replication": [[0, 2]]}"#, &["layer_replication"]);
        refused(r#"{"peft_type": "LORA", "trainable_token_indices": [1]}"#, &["trainable_token_indices"]);
        refused(r#"{"peft_type": "LORA", "arrow_config": {"a": 1}}"#, &["arrow_config"]);
        refused(r#"{"peft_type": "LORA", "rank_pattern": {"a": 0}}"#, &["rank_pattern", "a: found 0"]);
        refused(r#"{"peft_type": "LORA", "rank_pattern": {"a": 1, "a": 2}}"#, &["rank_pattern", "twice"]);
        refused(
            r#"{"peft_type": "LORA", "target_modules": ".*", "layers_to_transform": [1]}"#,
            &["layers_to_transform", "target_modules"],
        );
        refused(
            r#"{"peft_type": "LORA", "layers_pattern": "h", "target_modules": ["a"]}"#,
            &["layers_pattern"],
        );
        refused(
            r#"{"peft_type": "MISS", "init_weights": "bat", "miss_dropout": 0.5}"#,
            &["miss_dropout", "0.5", "block affine"],
        );
        refused(r#"{"peft_type": "MISS", "init_weights": "magic"}"#, &["init_weights", "magic"]);
        // Off, in whatever way it is said, is fine.
        for off in ["null", "false", "[]", "{}"] {
            parse(&format!(r#"{{"peft_type": "LORA", "use_qalora": {off}, "kasa_config": {off}}}"#)).unwrap();
        }
    }

    #[test]
    fn kinds_that_moved_the_base_are_known() {
        for (init, moved) in [("pissa", true), ("pissa_niter_16", true), ("olora", true), ("eva", false)] {
            let lora = LoraConfig { init: json!(init), ..LoraConfig::default() };
            assert_eq!(lora.moved_base(), moved.then_some(init));
        }
        assert_eq!(LoraConfig::default().moved_base(), None);
    }
}
