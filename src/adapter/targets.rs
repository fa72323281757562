//! Which modules an adapter is for: PEFT's rules (adapters.md section 4).
//!
//! The rules read module paths as the adapter spells them. Where a model has two spellings (see
//! [`super::names`]) a rule holds if it holds for one of them.

use super::modules::{Kind, Module, Modules};
use super::names::Form;
use super::pattern::Pattern;
use crate::{Error, Result};

/// `target_modules` or `exclude_modules`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Targets {
    /// Null: the architecture's default.
    #[default]
    Default,
    /// Whole paths, or their last segments.
    List(Vec<String>),
    /// A pattern for the whole path, or `all-linear`.
    Pattern(String),
}

/// `bias`: which biases are trained and saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// Every bias of the model.
    All,
    /// Those of the adapted modules.
    Only,
}

/// The keys of a configuration that choose modules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// `target_modules`.
    pub targets: Targets,
    /// `exclude_modules`.
    pub exclude: Option<Targets>,
    /// `layers_to_transform`; `None`: every layer.
    pub layers_to_transform: Option<Vec<u64>>,
    /// `layers_pattern`.
    pub layers_pattern: Vec<String>,
    /// `modules_to_save`: trained whole.
    pub modules_to_save: Vec<String>,
    /// `bias`.
    pub bias: Bias,
}

/// What a selection found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chosen {
    /// Paths of the modules to adapt, in the order of the model.
    pub targets: Vec<String>,
    /// Paths of the modules that are trained whole, outermost ones alone.
    pub saved: Vec<String>,
    /// What is worth a line.
    pub notes: Vec<String>,
}

/// What PEFT adapts where target_modules is null, by `model_type`.
const DEFAULTS: [(&[&str], &[&str]); 6] = [
    (&["llama", "mistral", "qwen2", "qwen3", "gemma", "mixtral"], &["q_proj", "v_proj"]),
    (&["phi"], &["q_proj", "v_proj", "fc1", "fc2"]),
    (&["gpt2"], &["c_attn"]),
    (&["gpt_neox"], &["query_key_value"]),
    (&["bert"], &["query", "value"]),
    (&["t5"], &["q", "v"]),
];

/// Whether `path` is `entry` or ends in it, from a dot on.
fn ends_with(path: &str, entry: &str) -> bool {
    path.strip_suffix(entry).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// Whether `entry` is a run of whole segments of `path`.
fn runs_in(path: &str, entry: &str) -> bool {
    !entry.is_empty() && format!(".{path}.").contains(&format!(".{entry}."))
}

/// A compiled rule for paths.
enum Rule {
    List(Vec<String>),
    Pattern(Pattern),
}

impl Rule {
    fn new(key: &str, targets: &Targets, default: &[&str]) -> Result<Self> {
        Ok(match targets {
            Targets::Default => Rule::List(default.iter().map(|t| t.to_string()).collect()),
            Targets::List(list) => Rule::List(list.clone()),
            Targets::Pattern(pattern) => Rule::Pattern(Pattern::full(key, pattern)?),
        })
    }

    fn holds(&self, spellings: &[String]) -> Result<bool> {
        for path in spellings {
            let holds = match self {
                Rule::List(list) => list.iter().any(|entry| ends_with(path, entry)),
                Rule::Pattern(pattern) => pattern.matches(path)?,
            };
            if holds {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// The rule on layer numbers.
struct Layers<'a> {
    listed: &'a [u64],
    patterns: Vec<Pattern>,
}

impl Layers<'_> {
    fn holds(&self, spellings: &[String]) -> Result<bool> {
        for path in spellings {
            for pattern in &self.patterns {
                if let Some(layer) = pattern.layer_of(path)? {
                    return Ok(self.listed.contains(&layer));
                }
            }
        }
        Ok(false)
    }
}

impl Targets {
    /// Whether it is `all-linear`, in any capitals.
    pub fn all_linear(&self) -> bool {
        matches!(self, Targets::Pattern(text) if text.eq_ignore_ascii_case("all-linear"))
    }
}

impl Selection {
    /// The modules of `modules` that the rules choose, spelled as `form` says; `task` is the task type.
    ///
    /// Errs where nothing is chosen or an entry of a list matches nothing (with near names), where a
    /// chosen module is of a kind that is not adapted (`embeddings`: whether embeddings are), where
    /// there is no default for the architecture, and on patterns that cannot be read.
    pub fn choose(
        &self,
        modules: &Modules,
        form: Form,
        task: Option<&str>,
        embeddings: bool,
    ) -> Result<Chosen> {
        let mut chosen = Chosen::default();
        let spelled: Vec<(&Module, Vec<String>)> =
            modules.iter().map(|m| (m, form.spellings(&m.path))).collect();
        chosen.saved = self.saved(&spelled, &mut chosen.notes);
        let exclude = self.exclude.as_ref().map(|e| Rule::new("exclude_modules", e, &[])).transpose()?;
        let default = self.default_targets(modules)?;
        let all_linear = self.targets.all_linear();
        let spared = if all_linear { spared(modules, task) } else { None };
        let rule = match all_linear {
            true => Rule::List(Vec::new()),
            false => Rule::new("target_modules", &self.targets, default)?,
        };
        let layers = self.layers()?;
        for (module, spellings) in &spelled {
            let saved = |m: &String| spellings.iter().any(|path| runs_in(path, m));
            if self.modules_to_save.iter().any(saved) || chosen.saved.iter().any(|s| inside(&module.path, s))
            {
                continue;
            }
            if let Some(exclude) = &exclude {
                if exclude.holds(spellings)? {
                    continue;
                }
            }
            let target = match all_linear {
                true => module.kind == Kind::Linear && spared.as_deref() != Some(&module.path),
                false => rule.holds(spellings)?,
            };
            if !target {
                continue;
            }
            if let Some(layers) = &layers {
                if !layers.holds(spellings)? {
                    continue;
                }
            }
            if !(module.kind == Kind::Linear || (module.kind == Kind::Embedding && embeddings)) {
                return Err(Error::usage(format!(
                    "target_modules: {} is {}, expected a linear layer{}",
                    module.path,
                    module.kind.as_str(),
                    if embeddings { " or an embedding" } else { "" }
                )));
            }
            chosen.targets.push(module.path.clone());
        }
        if let Rule::List(list) = &rule {
            unmatched(list, &spelled)?;
        }
        if chosen.targets.is_empty() {
            return Err(Error::usage(format!(
                "target_modules: {} chooses none of the model's {} modules{}",
                self.shown(default),
                modules.iter().filter(|m| m.kind != Kind::Other).count(),
                self.hint(&spelled)
            )));
        }
        Ok(chosen)
    }

    fn default_targets(&self, modules: &Modules) -> Result<&'static [&'static str]> {
        if self.targets != Targets::Default {
            return Ok(&[]);
        }
        let architecture = modules.architecture();
        let found = DEFAULTS.iter().find(|(types, _)| types.contains(&architecture));
        found.map(|(_, targets)| *targets).ok_or_else(|| {
            Error::usage(format!(
                "target_modules: null, and no default for model_type {architecture:?}: expected a list of modules, or all-linear"
            ))
        })
    }

    fn layers(&self) -> Result<Option<Layers<'_>>> {
        let Some(listed) = &self.layers_to_transform else { return Ok(None) };
        let patterns = match self.layers_pattern.as_slice() {
            [] => vec![Pattern::any_layer()?],
            some => some.iter().map(|p| Pattern::layer("layers_pattern", p)).collect::<Result<_>>()?,
        };
        Ok(Some(Layers { listed, patterns }))
    }

    /// The modules that are trained whole. PEFT takes any path that ends in an entry, "my_head" for
    /// "head" too; here that looser rule has its turn only where the one with dots finds nothing.
    fn saved(&self, spelled: &[(&Module, Vec<String>)], notes: &mut Vec<String>) -> Vec<String> {
        let mut saved: Vec<String> = Vec::new();
        for entry in &self.modules_to_save {
            let find = |rule: &dyn Fn(&str) -> bool| {
                let found = spelled.iter().filter(|(_, spellings)| spellings.iter().any(|s| rule(s)));
                found.map(|(module, _)| module.path.clone()).collect::<Vec<_>>()
            };
            let mut found = find(&|path| ends_with(path, entry));
            if found.is_empty() && !entry.is_empty() {
                found = find(&|path| path.ends_with(entry.as_str()));
            }
            if found.is_empty() {
                // PEFT adds the usual names of classifiers, whichever the model has.
                notes.push(format!("modules_to_save: the model has no {entry}"));
            }
            saved.extend(found);
        }
        let all = saved.clone();
        saved.retain(|path| !all.iter().any(|other| other != path && inside(path, other)));
        saved.sort();
        saved.dedup();
        saved
    }

    fn shown(&self, default: &[&str]) -> String {
        match &self.targets {
            Targets::Default => default.join(", "),
            Targets::List(list) => list.join(", "),
            Targets::Pattern(pattern) => format!("{pattern:?}"),
        }
    }

    fn hint(&self, spelled: &[(&Module, Vec<String>)]) -> String {
        match &self.targets {
            Targets::Pattern(pattern) if !self.targets.all_linear() => {
                let tail: Vec<&str> = spelled
                    .iter()
                    .flat_map(|(_, s)| s.iter().map(String::as_str))
                    .filter(|p| p.ends_with(pattern))
                    .collect();
                match tail.first() {
                    Some(path) => {
                        format!(": a pattern must match the whole path, as in \".*{pattern}\" for {path}")
                    }
                    None => String::new(),
                }
            }
            _ if self.layers_to_transform.is_some() => ": layers_to_transform leaves none".to_string(),
            _ if self.exclude.is_some() => ": exclude_modules leaves none".to_string(),
            _ => String::new(),
        }
    }
}

/// Whether `path` is `block` or lies in it.
pub(super) fn inside(path: &str, block: &str) -> bool {
    path.strip_prefix(block).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// What all-linear spares: the output embedding, or else the head of a sequence classifier.
fn spared(modules: &Modules, task: Option<&str>) -> Option<String> {
    if let Some(head) = modules.head() {
        return Some(head.to_string());
    }
    if task != Some("SEQ_CLS") {
        return None;
    }
    let head = ["score", "classifier"].into_iter().find(|name| modules.get(name).is_some())?;
    Some(head.to_string())
}

/// Errs on the first entry that is no module, which PEFT passes over without a word.
fn unmatched(list: &[String], spelled: &[(&Module, Vec<String>)]) -> Result<()> {
    for entry in list {
        let found = spelled.iter().any(|(_, spellings)| spellings.iter().any(|path| ends_with(path, entry)));
        if !found {
            let segments = entry.split('.').count();
            let tails = spelled.iter().flat_map(|(_, spellings)| spellings).filter_map(|path| {
                let at = path.rmatch_indices('.').nth(segments - 1).map_or(0, |(at, _)| at + 1);
                (path.split('.').count() >= segments).then(|| &path[at..])
            });
            let near = crate::weights::nearest(entry, tails);
            let hint = near.map(|near| format!(" (nearest: {near})")).unwrap_or_default();
            return Err(Error::usage(format!("target_modules: no module ends in {entry:?}{hint}")));
        }
    }
    Ok(())
}

/// The value of the first of `patterns` that matches one of the spellings, as rank_pattern and
/// alpha_pattern are read.
pub(super) fn of_pattern<T: Copy>(patterns: &[(Pattern, T)], spellings: &[String]) -> Result<Option<T>> {
    for (pattern, value) in patterns {
        for path in spellings {
            if pattern.matches(path)? {
                return Ok(Some(*value));
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::modules::tests::llama;
    use super::*;

    fn list(entries: &[&str]) -> Targets {
        Targets::List(entries.iter().map(|e| e.to_string()).collect())
    }

    fn pattern(text: &str) -> Targets {
        Targets::Pattern(text.to_string())
    }

    fn choose(selection: &Selection) -> Result<Vec<String>> {
        Ok(selection.choose(&llama(false), Form::Same, Some("CAUSAL_LM"), true)?.targets)
    }

    fn chosen(targets: Targets) -> Vec<String> {
        choose(&Selection { targets, ..Selection::default() }).unwrap()
    }

    #[track_caller]
    fn refused(selection: &Selection, parts: &[&str]) {
        let error = choose(selection).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let error = error.to_string();
        parts.iter().for_each(|part| assert!(error.contains(part), "{error:?} lacks {part:?}"));
    }

    const Q: [&str; 2] = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"];

    #[test]
    fn lists_match_whole_segments() {
        assert_eq!(chosen(list(&["q_proj"])), Q);
        assert_eq!(chosen(list(&["self_attn.q_proj"])), Q);
        assert_eq!(chosen(list(&[Q[1]])), Q[1..]);
        assert_eq!(chosen(list(&["embed_tokens", "lm_head"])), ["model.embed_tokens", "lm_head"]);
        assert!(
            ends_with("a.q_proj", "q_proj") && !ends_with("a.my_q_proj", "q_proj") && ends_with("a", "a")
        );
    }

    #[test]
    fn texts_match_whole_paths() {
        assert_eq!(chosen(pattern(".*q_proj")), Q);
        assert_eq!(chosen(pattern(r"model\.layers\.(?!0)\d+\..*_proj")).len(), 3);
        let selection = |targets| Selection { targets, ..Selection::default() };
        refused(&selection(pattern("q_proj")), &["q_proj", "whole path", ".*q_proj"]);
        refused(&selection(pattern("(")), &["target_modules", "\"(\""]);
    }

    #[test]
    fn all_linear_spares_the_head() {
        for text in ["all-linear", "ALL-Linear"] {
            let all = chosen(pattern(text));
            assert_eq!(all.len(), 6, "{all:?}");
            assert!(!all.iter().any(|p| p == "lm_head" || p.contains("embed")));
        }
        let shapes = ["vit.encoder.layer.0.output.dense.weight", "classifier.weight"];
        let shapes = shapes.map(|name| (name.to_string(), vec![4, 4]));
        let vit = Modules::of_shapes(&json!({"model_type": "vit"}), &shapes);
        let selection = Selection { targets: pattern("all-linear"), ..Selection::default() };
        let count = |task| selection.choose(&vit, Form::Same, task, false).unwrap().targets.len();
        assert_eq!((count(None), count(Some("SEQ_CLS"))), (2, 1));
    }

    #[test]
    fn null_is_the_architectures_default() {
        assert_eq!(chosen(Targets::Default).len(), 4);
        let modules = Modules::of_shapes(&json!({"model_type": "phi3"}), &[("a.weight".into(), vec![2, 2])]);
        let error = Selection::default().choose(&modules, Form::Same, None, true).unwrap_err().to_string();
        assert!(error.contains("phi3"), "{error}");
    }

    #[test]
    fn excluded_saved_and_listed_layers() {
        let base = Selection { targets: list(&["q_proj", "v_proj"]), ..Selection::default() };
        let exclude = |exclude| Selection { exclude: Some(exclude), ..base.clone() };
        assert_eq!(choose(&exclude(list(&["v_proj"]))).unwrap(), Q);
        assert_eq!(choose(&exclude(list(&["q_proj", Q[0]]))).unwrap().len(), 2);
        assert_eq!(choose(&exclude(pattern(r".*\.1\..*|.*v_proj"))).unwrap(), Q[..1]);
        refused(&exclude(list(&["q_proj", "v_proj"])), &["exclude_modules"]);

        let saved = Selection { modules_to_save: vec!["layers.1".into(), "norm".into()], ..base.clone() };
        let found = saved.choose(&llama(false), Form::Same, None, true).unwrap();
        assert_eq!(found.saved, ["model.layers.1", "model.norm"]);
        assert_eq!(found.targets.len(), 2);
        assert!(found.targets.iter().all(|path| path.contains("layers.0")));

        let layer = Selection { layers_to_transform: Some(vec![1]), ..base.clone() };
        assert_eq!(choose(&layer).unwrap(), [Q[1], "model.layers.1.self_attn.v_proj"]);
        let of = |p: &str| Selection { layers_pattern: vec![p.to_string()], ..layer.clone() };
        assert_eq!(choose(&of("layers")).unwrap().len(), 2);
        refused(&of("h"), &["layers_to_transform"]);
        // No number in the path: not adapted.
        let head = Selection { targets: list(&["q_proj", "lm_head"]), ..layer };
        assert_eq!(choose(&head).unwrap(), Q[1..]);
    }

    #[test]
    fn saved_modules_by_the_dotted_rule_first() {
        let shapes = ["my_head", "head", "x.q"].map(|name| (format!("{name}.weight"), vec![2, 2]));
        let of = |shapes: &[(String, Vec<usize>)]| {
            let modules = Modules::of_shapes(&json!({}), shapes);
            let selection = Selection {
                targets: list(&["q"]),
                modules_to_save: vec!["head".into(), "score".into()],
                ..Selection::default()
            };
            selection.choose(&modules, Form::Same, None, false).unwrap()
        };
        let found = of(&shapes);
        assert_eq!(found.saved, ["head"]);
        assert!(found.notes.len() == 1 && found.notes[0].contains("score"));
        assert_eq!(of(&[shapes[0].clone(), shapes[2].clone()]).saved, ["my_head"]);
    }

    #[test]
    fn what_matches_nothing_or_the_wrong_kind_is_said() {
        let of = |entries: &[&str]| Selection { targets: list(entries), ..Selection::default() };
        refused(&of(&["q_proj", "vproj"]), &["vproj", "nearest: v_proj"]);
        refused(&of(&["self_atn.q_proj"]), &["nearest: self_attn.q_proj"]);
        refused(&of(&["mlp"]), &["model.layers.0.mlp", "block of modules"]);
        refused(&of(&["norm"]), &["model.norm", "norm, expected a linear layer or an embedding"]);
        refused(&of(&[]), &["chooses none"]);
        let error = of(&["embed_tokens"]).choose(&llama(false), Form::Same, None, false).unwrap_err();
        assert!(error.to_string().contains("is an embedding, expected a linear layer"), "{error}");
    }

    #[test]
    fn both_spellings_of_vit() {
        let names =
            ["attention.attention.query", "intermediate.dense", "output.dense", "attention.output.dense"];
        let shapes = names.map(|n| (format!("vit.encoder.layer.0.{n}.weight"), vec![4, 4]));
        let vit = Modules::of_shapes(&json!({"model_type": "vit"}), &shapes);
        let of = |targets| {
            let selection = Selection { targets, ..Selection::default() };
            selection.choose(&vit, Form::Same, None, false).unwrap().targets
        };
        let query = ["vit.encoder.layer.0.attention.attention.query"];
        assert_eq!(of(list(&["q_proj"])), query);
        assert_eq!(of(list(&["query"])), query);
        assert_eq!(of(pattern(r"vit\.layers\.\d+\.attention\.q_proj")), query);
        assert_eq!(of(list(&["fc2"])), ["vit.encoder.layer.0.output.dense"]);
        assert_eq!(of(list(&["dense"])).len(), 3);
    }
}
