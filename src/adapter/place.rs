//! Where each tensor of an adapter belongs on a model: every tensor in exactly one place, every chosen
//! module with all it needs.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::Tensor;

use super::files::Adapter;
use super::method::{LoraConfig, Method, Variant};
use super::modules::{Kind, Module, Modules};
use super::names::{Form, Part};
use super::pattern::Pattern;
use super::targets::{inside, of_pattern, Bias};
use crate::weights::Weights;
use crate::{Error, Result};

/// A module to adapt, with its tensors.
pub(super) struct Target<'a> {
    pub(super) module: &'a Module,
    /// The path as the adapter spells it.
    pub(super) path: String,
    parts: BTreeMap<&'a Part, &'a Tensor>,
}

/// A tensor of the model itself that the adapter brings.
pub(super) struct Leaf<'a> {
    /// Its checkpoint name.
    pub(super) name: String,
    /// Its name in the adapter's file.
    pub(super) key: String,
    pub(super) tensor: &'a Tensor,
    /// A copy of the base, as PEFT adds of embeddings: not trained.
    pub(super) copy: bool,
}

/// Everything in its place.
pub(super) struct Placed<'a> {
    pub(super) form: Form,
    pub(super) targets: Vec<Target<'a>>,
    pub(super) leaves: Vec<Leaf<'a>>,
    pub(super) notes: Vec<String>,
}

impl<'a> Target<'a> {
    /// The tensor of a part that must be there.
    pub(super) fn part(&self, adapter: &Adapter, part: Part) -> Result<&'a Tensor> {
        self.get(&part).ok_or_else(|| {
            let message = format!(
                "not in the file, but target_modules chooses {}: the adapter would do nothing there",
                self.module.path
            );
            Error::tensor(adapter.name(&self.path, &part), message)
        })
    }

    pub(super) fn get(&self, part: &Part) -> Option<&'a Tensor> {
        self.parts.get(part).copied()
    }

    /// Rows and columns of the module's matrix.
    pub(super) fn size(&self) -> Result<(usize, usize)> {
        self.module.size.ok_or_else(|| Error::Run(format!("{}: a target without a matrix", self.module.path)))
    }

    /// Errs where a part has another shape than the module asks for.
    pub(super) fn check(&self, adapter: &Adapter, part: Part, expected: &[usize]) -> Result<&'a Tensor> {
        let tensor = self.part(adapter, part.clone())?;
        if tensor.dims() == expected {
            return Ok(tensor);
        }
        let (rows, cols) = self.size()?;
        let message = format!(
            "found shape {:?}, expected {expected:?} for {} of shape [{rows}, {cols}]: made for another base?",
            tensor.dims(),
            self.module.path
        );
        Err(Error::tensor(adapter.name(&self.path, &part), message))
    }
}

impl Adapter {
    /// Puts every tensor in its place on the model. What is missing or left over is an error.
    pub(super) fn place<'a>(&'a self, weights: &Weights, modules: &'a Modules) -> Result<Placed<'a>> {
        let form = self.form(modules);
        let lora = matches!(self.config.method, Method::Lora(_));
        let task = self.config.task_type.as_deref();
        let chosen = self.config.selection.choose(modules, form, task, lora)?;
        let mut notes: Vec<String> = form.note().into_iter().chain(chosen.notes).collect();
        let mut targets: BTreeMap<&str, Target> = BTreeMap::new();
        let chosen_targets: BTreeSet<&str> = chosen.targets.iter().map(String::as_str).collect();
        let mut leaves = Vec::new();
        let bias = self.config.selection.bias;
        for (path, part, tensor) in self.tensors() {
            let key = self.name(path, part);
            let base = form.to_base(path);
            let Some(module) = base.as_deref().and_then(|path| modules.get(path)) else {
                let near = modules.near(base.as_deref().unwrap_or(path));
                return Err(Error::tensor(key, format!("the model has no module {path}{near}")));
            };
            let target = chosen_targets.contains(module.path.as_str());
            let saved = chosen.saved.iter().any(|saved| inside(&module.path, saved));
            let table = module.kind == Kind::Embedding || modules.head() == Some(&module.path);
            let leaf = |leaf: &str, copy| Leaf {
                name: format!("{}.{leaf}", module.path),
                key: key.clone(),
                tensor,
                copy,
            };
            match part {
                Part::Own(name) if saved => leaves.push(leaf(name, false)),
                Part::Base(name) if name == "weight" && (target || table) => leaves.push(leaf(name, true)),
                Part::Own(name) if name == "weight" && table => leaves.push(leaf(name, true)),
                Part::Own(name) | Part::Base(name)
                    if name == "bias" && (bias == Bias::All || (bias == Bias::Only && target)) =>
                {
                    leaves.push(leaf(name, false));
                }
                Part::Own(_) | Part::Base(_) => {
                    let message = format!(
                        "belongs to {}, but neither modules_to_save nor bias asks for it",
                        module.path
                    );
                    return Err(Error::tensor(key, message));
                }
                part if target => {
                    let entry = targets.entry(module.path.as_str()).or_insert_with(|| Target {
                        module,
                        path: path.to_string(),
                        parts: BTreeMap::new(),
                    });
                    if entry.path != path {
                        let message = format!("{} is adapted under the name {} too", module.path, entry.path);
                        return Err(Error::tensor(key, message));
                    }
                    entry.parts.insert(part, tensor);
                }
                _ => {
                    let message = format!("belongs to {}, which target_modules does not choose", module.path);
                    return Err(Error::tensor(key, message));
                }
            }
        }
        let mut ordered = Vec::with_capacity(chosen.targets.len());
        for path in &chosen.targets {
            let target = match (targets.remove(path.as_str()), modules.get(path)) {
                (Some(target), _) => target,
                (None, Some(module)) => {
                    let path = form.spellings(path).into_iter().next().unwrap_or_default();
                    Target { module, path, parts: BTreeMap::new() }
                }
                (None, None) => continue,
            };
            self.check_parts(&target)?;
            ordered.push(target);
        }
        self.check_leaves(weights, modules, &chosen.saved, &leaves)?;
        notes.extend(self.check_biases(weights, modules, (&chosen.targets, &chosen.saved), &leaves)?);
        Ok(Placed { form, targets: ordered, leaves, notes })
    }

    /// How the adapter's paths relate to the model's: the first form under which all of them are
    /// found, else the one that finds most.
    fn form(&self, modules: &Modules) -> Form {
        let paths: BTreeSet<&str> = self.tensors().map(|(path, _, _)| path).collect();
        let found = |form: Form| {
            paths.iter().filter(|p| form.to_base(p).is_some_and(|path| modules.get(&path).is_some())).count()
        };
        let mut best = (0, Form::Same);
        for form in Form::all() {
            let count = found(form);
            if count > best.0 {
                best = (count, form);
            }
        }
        best.1
    }

    /// Errs where a target has no tensor of the method, or one of another.
    fn check_parts(&self, target: &Target) -> Result<()> {
        let embedding = target.module.kind == Kind::Embedding;
        let mut parts = match (&self.config.method, embedding) {
            (Method::Lora(_), true) => vec![Part::EmbeddingA, Part::EmbeddingB],
            (Method::Lora(_), false) => vec![Part::LoraA, Part::LoraB],
            (Method::Miss(_), _) => vec![Part::Block],
        };
        if let Method::Lora(lora) = &self.config.method {
            if embedding && lora.dora {
                let message = format!("{}: DoRA on an embedding is not supported", target.module.path);
                return Err(Error::usage(message));
            }
            parts.extend(lora.dora.then_some(Part::Magnitude));
            parts.extend((lora.bias && !embedding).then_some(Part::LoraBias));
        }
        for part in &parts {
            target.part(self, part.clone())?;
        }
        match target.parts.keys().find(|part| !parts.contains(part)) {
            Some(part) => {
                let message =
                    format!("found, but the configuration asks for no such part of {}", target.module.path);
                Err(Error::tensor(self.name(&target.path, part), message))
            }
            None => Ok(()),
        }
    }

    /// Errs where a tensor of the model itself has another shape than the base's, or a module that was
    /// saved whole lacks one. Tables of tokens and the head may have other numbers of rows.
    fn check_leaves(
        &self,
        weights: &Weights,
        modules: &Modules,
        saved: &[String],
        leaves: &[Leaf],
    ) -> Result<()> {
        let tied = modules.tied().map(|(table, head)| (format!("{table}.weight"), format!("{head}.weight")));
        for (at, leaf) in leaves.iter().enumerate() {
            let base = match &tied {
                Some((table, head)) if *head == leaf.name && !weights.contains(head) => table,
                _ => &leaf.name,
            };
            let shape = super::modules::shape_of(weights.get(base)?)?;
            let path = leaf.name.rsplit_once('.').map_or("", |(path, _)| path);
            let table = modules.tokens() == Some(path) || modules.head() == Some(path);
            let found = leaf.tensor.dims();
            let fits =
                found == shape || (table && found.get(1..) == shape.get(1..) && found.len() == shape.len());
            if !fits {
                let message = format!(
                    "found shape {found:?}, expected {shape:?} of {}: made for another base?",
                    leaf.name
                );
                return Err(Error::tensor(&leaf.key, message));
            }
            if leaves[..at].iter().any(|other| other.name == leaf.name) {
                return Err(Error::tensor(&leaf.key, format!("{} is in the file twice", leaf.name)));
            }
        }
        for path in saved {
            let head = tied.as_ref().map(|(_, head)| head).filter(|head| inside(head, path));
            let own = weights.iter().map(|(name, _)| name).filter(|name| inside(name, path));
            for name in own.chain(head.map(String::as_str)) {
                if !leaves.iter().any(|leaf| leaf.name == name) {
                    let message = format!("not in the file, but modules_to_save names {path}");
                    return Err(Error::tensor(name, message));
                }
            }
        }
        Ok(())
    }

    /// Errs where some of the biases that were trained are missing; a note where all are.
    fn check_biases(
        &self,
        weights: &Weights,
        modules: &Modules,
        (targets, saved): (&[String], &[String]),
        leaves: &[Leaf],
    ) -> Result<Option<String>> {
        let asked = |module: &&Module| match self.config.selection.bias {
            Bias::None => false,
            Bias::All => !saved.iter().any(|s| inside(&module.path, s)),
            Bias::Only => targets.contains(&module.path),
        };
        let biases: Vec<String> =
            modules.iter().filter(asked).map(Module::bias).filter(|name| weights.contains(name)).collect();
        let here = |name: &&String| leaves.iter().any(|leaf| leaf.name == **name);
        let missing = biases.iter().find(|name| !here(name));
        match missing {
            None => Ok(None),
            // PEFT's "_only" looked for them under names that they no longer have, and saved none.
            Some(_) if self.config.selection.bias == Bias::Only && !biases.iter().any(|b| here(&b)) => {
                Ok(Some("bias: the file holds no trained bias; those of the base stay".to_string()))
            }
            Some(name) => Err(Error::tensor(name, "not in the file, but bias asks for it")),
        }
    }
}

/// Rank and scale of each target of LoRA.
pub(super) struct Ranks {
    ranks: Vec<(Pattern, usize)>,
    alphas: Vec<(Pattern, f64)>,
}

impl Ranks {
    /// Compiles the patterns.
    pub(super) fn new(lora: &LoraConfig) -> Result<Self> {
        let ranks = lora.rank_pattern.iter();
        let ranks = ranks.map(|(p, r)| Ok((Pattern::suffix("rank_pattern", p)?, *r)));
        let alphas = lora.alpha_pattern.iter();
        let alphas = alphas.map(|(p, a)| Ok((Pattern::suffix("alpha_pattern", p)?, *a)));
        Ok(Ranks { ranks: ranks.collect::<Result<_>>()?, alphas: alphas.collect::<Result<_>>()? })
    }

    /// The rank that the configuration gives a path of these spellings.
    pub(super) fn rank(&self, lora: &LoraConfig, spellings: &[String]) -> Result<usize> {
        Ok(of_pattern(&self.ranks, spellings)?.unwrap_or(lora.r))
    }

    /// Alpha of a path of these spellings.
    pub(super) fn alpha(&self, lora: &LoraConfig, spellings: &[String]) -> Result<f64> {
        Ok(of_pattern(&self.alphas, spellings)?.unwrap_or(lora.alpha))
    }

    /// Rank and scale of a target whose first factor has `found` rows.
    ///
    /// Errs where the configuration says another rank. Saving sorts patterns, so where several fit one
    /// path they may resolve differently than in training: any of their ranks is believed then.
    pub(super) fn scale(
        &self,
        lora: &LoraConfig,
        spellings: &[String],
        name: &str,
        found: usize,
    ) -> Result<f64> {
        let rank = self.rank(lora, spellings)?;
        if found != rank {
            let mut fits = false;
            for (pattern, value) in &self.ranks {
                for path in spellings {
                    fits |= *value == found && pattern.matches(path)?;
                }
            }
            if !fits {
                let message = format!("found rank {found}, expected {rank} of adapter_config.json");
                return Err(Error::tensor(name, message));
            }
        }
        let alpha = self.alpha(lora, spellings)?;
        let r = found as f64;
        Ok(if lora.rslora { alpha / r.sqrt() } else { alpha / r })
    }
}

/// The shape of a block for a layer of `rows` by `cols`; errs where the formula does not fit it.
pub(super) fn block_shape(
    variant: Variant,
    (r, mini_r): (usize, usize),
    path: &str,
    (rows, cols): (usize, usize),
) -> Result<Vec<usize>> {
    let refuse = |message: String| Err(Error::usage(format!("{path} of shape [{rows}, {cols}]: {message}")));
    match variant {
        Variant::Bat if rows % r != 0 || cols % r != 0 => {
            refuse(format!("rank {r} must divide both, as the block affine form asks"))
        }
        Variant::Bat => Ok(vec![rows / r, r, r]),
        _ if r > cols => refuse(format!("found rank {r}, expected at most {cols}")),
        Variant::Mini if rows % mini_r != 0 => refuse(format!("mini_r = {mini_r} must divide {rows}")),
        Variant::Mini => Ok(vec![r, mini_r]),
        Variant::Additive | Variant::AdditiveUniform => Ok(vec![r, rows]),
    }
}
