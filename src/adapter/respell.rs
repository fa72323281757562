//! A configuration in the spelling that it is written in.
//!
//! Two things in it depend on how paths are spelled and sorted: selection rules, which PEFT applies to
//! the module paths of its own day (see [`super::names`]), and patterns of ranks and alphas, whose order
//! is lost when PEFT sorts them. Where a rule would mean another thing to its reader it is replaced by
//! whole paths; everything else stays as it was.

use std::collections::BTreeSet;

use super::config::AdapterConfig;
use super::files::Adapter;
use super::method::Method;
use super::names::{newer, older, Part};
use super::pattern::Pattern;
use super::targets::{of_pattern, Targets};
use crate::Result;

impl Adapter {
    /// The paths of the adapted modules.
    pub(super) fn target_paths(&self) -> BTreeSet<&str> {
        let own = |part: &Part| matches!(part, Part::Own(_) | Part::Base(_));
        self.tensors().filter(|(_, part, _)| !own(part)).map(|(path, _, _)| path).collect()
    }

    /// The configuration for a file that spells modules as transformers 5 does, or (`old`) as 4 did.
    pub(super) fn respelled(&self, old: bool) -> Result<AdapterConfig> {
        let mut config = self.config.clone();
        // What the rules say now, under either spelling, and the one spelling to be written.
        let paths: Vec<([String; 2], String)> = self
            .target_paths()
            .into_iter()
            .map(|path| {
                let both = [newer(path), older(path)];
                let written = if old { older(path) } else { newer(path) };
                (both, written)
            })
            .collect();
        if paths.iter().any(|(both, _)| both[0] != both[1]) {
            config.selection.targets = respelled_targets(&config.selection.targets, &paths)?;
        }
        if let Method::Lora(lora) = &mut config.method {
            lora.rank_pattern = disjoint("rank_pattern", &lora.rank_pattern, lora.r, &paths)?;
            lora.alpha_pattern = disjoint("alpha_pattern", &lora.alpha_pattern, lora.alpha, &paths)?;
        }
        Ok(config)
    }
}

fn ends_with(path: &str, entry: &str) -> bool {
    path.strip_suffix(entry).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

fn respelled_targets(targets: &Targets, paths: &[([String; 2], String)]) -> Result<Targets> {
    match targets {
        Targets::List(list) => {
            let mut entries = BTreeSet::new();
            for entry in list {
                let meant = paths.iter().filter(|(both, _)| both.iter().any(|path| ends_with(path, entry)));
                for (_, written) in meant {
                    match ends_with(written, entry) {
                        true => entries.insert(entry.clone()),
                        false => entries.insert(shortest(written, paths)),
                    };
                }
            }
            let same = entries.len() == list.len() && list.iter().all(|entry| entries.contains(entry));
            Ok(if same { targets.clone() } else { Targets::List(entries.into_iter().collect()) })
        }
        Targets::Pattern(text) if !targets.all_linear() => {
            let pattern = Pattern::full("target_modules", text)?;
            for (_, written) in paths {
                if !pattern.matches(written)? {
                    let all = paths.iter().map(|(_, written)| written.clone());
                    return Ok(Targets::List(all.collect::<BTreeSet<_>>().into_iter().collect()));
                }
            }
            Ok(targets.clone())
        }
        other => Ok(other.clone()),
    }
}

/// The last segment of a path where no other module of a block ends in it, else the whole path.
fn shortest(path: &str, paths: &[([String; 2], String)]) -> String {
    let last = path.rsplit('.').next().unwrap_or(path);
    // transformers 4 called three of a block's modules dense.
    match last != "dense" && paths.iter().any(|(_, written)| written == path) {
        true => last.to_string(),
        false => path.to_string(),
    }
}

/// The same values under patterns whose order does not matter: as they are where sorting and spelling
/// change nothing, else one whole path each.
fn disjoint<T: Copy + PartialEq>(
    key: &str,
    patterns: &[(String, T)],
    default: T,
    paths: &[([String; 2], String)],
) -> Result<Vec<(String, T)>> {
    let compile = |list: &[(String, T)]| {
        list.iter().map(|(text, value)| Ok((Pattern::suffix(key, text)?, *value))).collect::<Result<Vec<_>>>()
    };
    let mut sorted = patterns.to_vec();
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    let (now, later) = (compile(patterns)?, compile(&sorted)?);
    let (mut whole, mut same) = (Vec::new(), true);
    for (both, written) in paths {
        let value = of_pattern(&now, both)?.unwrap_or(default);
        let read = of_pattern(&later, std::slice::from_ref(written))?.unwrap_or(default);
        same &= value == read;
        if value != default {
            whole.push((format!("^{}", written.replace('.', r"\.")), value));
        }
    }
    Ok(if same { patterns.to_vec() } else { whole })
}

#[cfg(test)]
mod tests {
    use super::super::files::tests::{adapter, ramp};
    use super::super::method::LoraConfig;
    use super::*;

    const LAYER: &str = "vit.encoder.layer.0";

    fn vit(modules: &[&str], targets: &[&str]) -> Adapter {
        let tensors: Vec<_> = modules.iter().map(|m| (format!("{LAYER}.{m}"), ramp(&[2, 3]))).collect();
        let tensors: Vec<_> = tensors.iter().map(|(m, t)| (m.as_str(), Part::LoraA, t.clone())).collect();
        adapter(Method::Lora(LoraConfig::default()), targets, &tensors)
    }

    fn targets(adapter: &Adapter, old: bool) -> Vec<String> {
        match adapter.respelled(old).unwrap().selection.targets {
            Targets::List(list) => list,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn old_names_become_new_and_back() {
        let query =
            vit(&["attention.attention.query", "intermediate.dense"], &["query", "intermediate.dense"]);
        assert_eq!(targets(&query, false), ["fc1", "q_proj"]);
        assert_eq!(targets(&query, true), ["query", "intermediate.dense"]);
        let new = vit(&["attention.attention.query", "output.dense"], &["q_proj", "fc2"]);
        assert_eq!(targets(&new, false), ["q_proj", "fc2"]);
        assert_eq!(targets(&new, true), ["query".to_string(), format!("{LAYER}.output.dense")]);
        let mut pattern = vit(&["output.dense"], &[]);
        pattern.config.selection.targets = Targets::Pattern(r"vit\.encoder\..*\.output\.dense".into());
        assert_eq!(targets(&pattern, false), ["vit.layers.0.mlp.fc2"]);
        assert!(matches!(pattern.respelled(true).unwrap().selection.targets, Targets::Pattern(_)));
    }

    #[test]
    fn patterns_that_sorting_would_change_become_paths() {
        let q = "model.layers.0.self_attn.q_proj";
        let of = |patterns: &[(&str, usize)]| {
            let patterns = patterns.iter().map(|(p, r)| (p.to_string(), *r)).collect();
            let lora = LoraConfig { rank_pattern: patterns, ..LoraConfig::default() };
            let adapter = adapter(Method::Lora(lora), &["q_proj"], &[(q, Part::LoraA, ramp(&[2, 3]))]);
            let Method::Lora(lora) = adapter.respelled(false).unwrap().method else { panic!("LORA") };
            lora.rank_pattern
        };
        assert_eq!(of(&[("q_proj", 4), ("k_proj", 2)]).len(), 2);
        let path = format!("^{}", q.replace('.', r"\."));
        assert_eq!(of(&[("q_proj", 4), ("layers.0.self_attn.q_proj", 2)]), [(path, 4)]);
    }
}
