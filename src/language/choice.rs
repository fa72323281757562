//! KappaTune over a language model: which of its matrices a recipe's `[kappa]` trains, themselves or through
//! adapters, and that this stays so when the run is resumed.

use std::path::Path;

use candle_core::DType;

use super::start::Start;
use crate::adapter::Modules;
use crate::recipe::{AdapterSlot, Modules as Named, Recipe};
use crate::select::kappa::file::FILE_NAME;
use crate::select::kappa::{
    analyse, choose_with_notes, llama_roles, split_fused, tie, total_params, units, Cache, KappaConfig,
    Options, Role, Selection, Unit,
};
use crate::train::Progress;
use crate::weights::{Weight, Weights};
use crate::{Error, Result};

/// What `[kappa]` came to.
#[derive(Debug)]
pub(super) struct Choice {
    /// The condition numbers and what was chosen by them.
    pub selection: Selection,
    /// The recipe's adapter, for exactly the chosen modules.
    pub slot: Option<AdapterSlot>,
}

/// The units that may be chosen: with an adapter the modules that it is for, and linear ones alone.
fn candidates(config: &KappaConfig, slot: Option<&AdapterSlot>, start: &Start) -> Result<Vec<Unit>> {
    let mut all = units(&start.weights, &llama_roles)?;
    if start.config.tied {
        tie(&mut all, "model.embed_tokens.weight", "lm_head.weight");
    }
    if config.split_fused {
        all = split_fused(all);
    }
    all.retain(|unit| config.wants(unit.role));
    if let Some(slot) = slot {
        let modules = Modules::of_shapes(&start.json, &start.config.shapes());
        // A rank of 1 divides every size: which modules does not depend on it.
        let targets = slot.peft(1, &start.name).targets(&modules)?;
        all.retain(|unit| unit.role == Role::Linear && targets.iter().any(|(path, _)| path == unit.module()));
    }
    Ok(all)
}

/// The selection of a run in the folder `dir` (`None`: of a plan, which writes nothing): the one that lies
/// there from the run's beginning, else that of a file that the recipe names, else of the model as `start`
/// has it, before anything is packed.
fn select(
    recipe: &Recipe,
    config: &KappaConfig,
    start: &Start,
    dir: Option<&Path>,
    progress: &dyn Progress,
) -> Result<Selection> {
    let slot = recipe.adapter.as_ref();
    let own = dir.map(|dir| dir.join(FILE_NAME));
    let made = own.as_deref().filter(|own| own.exists());
    let units = candidates(config, slot, start)?;
    let selection = match made.or(config.selection.as_deref()) {
        Some(path) => {
            let selection = Selection::read(path)?;
            selection.among(&units)?;
            selection
        }
        None => {
            // A plan leaves no cache behind that was not there.
            let cache = start.dir.as_deref().map(|dir| (dir, Cache::beside(dir)));
            let known = crate::select::kappa::cache::FILE_NAME;
            let cache = cache.filter(|(at, _)| dir.is_some() || at.join(known).exists());
            let cache = cache.as_ref().map(|(_, cache)| cache);
            let scored = analyse(&start.weights, &units, &Options::from(config), cache, progress)?;
            let total = total_params(&start.weights)?;
            let chosen = choose_with_notes(&scored, total, config, recipe.seed)?;
            chosen.notes.iter().for_each(|note| progress.note(note));
            Selection::new(&scored, &chosen, total, config, recipe.seed)
        }
    };
    if let Some(own) = own.as_deref().filter(|_| made.is_none()) {
        selection.write(own)?;
    }
    Ok(selection)
}

/// What the recipe's `[kappa]` chooses; `None` where it has none. `dir`: the run's folder, where the choice is
/// kept.
pub(super) fn choice(
    recipe: &Recipe,
    start: &Start,
    dir: Option<&Path>,
    progress: &dyn Progress,
) -> Result<Option<Choice>> {
    let Some(config) = &recipe.kappa else { return Ok(None) };
    let selection = select(recipe, config, start, dir, progress)?;
    let chosen: Vec<_> = selection.selected().collect();
    if let Some(slice) = chosen.iter().find(|entry| entry.index.is_some()) {
        return Err(Error::usage(format!(
            "kappa: {} is one of several matrices in a tensor: such are analysed, but not trained by themselves; \
             leave them out with kappa.exclude, or kappa.split_fused",
            slice.name
        )));
    }
    for entry in chosen.iter().filter(|entry| !entry.aliases.is_empty()) {
        progress.note(&format!("{} is {} too: both are trained", entry.param, entry.aliases.join(", ")));
    }
    let kappas: Vec<f64> = chosen.iter().filter_map(|entry| entry.kappa).collect();
    let (low, high) = kappas.iter().fold((f64::INFINITY, 0f64), |(l, h), &k| (l.min(k), h.max(k)));
    progress.note(&format!(
        "kappa: {} of {} matrices, {} of {} parameters, condition numbers {low:.4} to {high:.4}",
        chosen.len(),
        selection.tensors.len(),
        selection.selected_params,
        selection.total_params
    ));
    let slot = recipe.adapter.as_ref().map(|slot| {
        let path = |param: &str| param.strip_suffix(".weight").unwrap_or(param).to_string();
        AdapterSlot {
            // Whole paths, so that no other layer's module of the same name is meant.
            targets: Named::List(chosen.iter().map(|entry| path(&entry.param)).collect()),
            exclude: None,
            layers: None,
            layers_pattern: Vec::new(),
            ..slot.clone()
        }
    });
    Ok(Some(Choice { selection, slot }))
}

impl Choice {
    /// Whether the tensor called `name` is trained itself, where there is no adapter: chosen, or a norm or bias
    /// that the recipe trains with it.
    pub fn trains(&self, config: &KappaConfig, name: &str) -> bool {
        self.selection.selected().any(|entry| entry.param == name)
            || (config.train_norms && name.ends_with("norm.weight"))
            || (config.train_biases && name.ends_with(".bias"))
    }

    /// The paths of the chosen modules, in the order of selection.
    pub fn modules(&self) -> Vec<String> {
        let path = |param: &str| param.strip_suffix(".weight").unwrap_or(param).to_string();
        self.selection.selected().map(|entry| path(&entry.param)).collect()
    }

    /// `base` with what is trained as variables in f32, of the numbers that `start` has.
    pub fn latent(&self, config: &KappaConfig, start: &Start, base: &Weights) -> Result<Weights> {
        let mut weights = base.clone();
        for (name, weight) in start.weights.iter().filter(|(name, _)| self.trains(config, name)) {
            weights.insert(name, Weight::latent(&weight.tensor()?.to_dtype(DType::F32)?)?);
        }
        Ok(weights)
    }
}
