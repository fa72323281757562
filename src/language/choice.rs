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
    // A file has chosen already, by its own options.
    all.retain(|unit| config.selection.is_some() || config.wants(unit.role));
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
            selection.among(&start.weights, &units)?;
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
             leave them out with kappa.exclude",
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

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::super::adapt::ready;
    use super::super::tiny;
    use super::*;
    use crate::kernels;
    use crate::models::{Llama, Places};
    use crate::recipe::put;
    use crate::train::Quiet;
    use crate::weights::Expr;

    fn recipe(changes: &[(&str, toml::Value)]) -> Recipe {
        let mut table = Recipe::table("sorting").unwrap();
        table.remove("adapter");
        for (key, value) in changes {
            put(&mut table, key, value.clone()).unwrap();
        }
        Recipe::resolve(table).unwrap()
    }

    fn kappa(budget: &str) -> (&'static str, toml::Value) {
        ("kappa", toml::Value::Table(budget.parse().unwrap()))
    }

    /// The chosen tensors alone are variables, and alone get a gradient.
    #[test]
    fn what_is_not_chosen_gets_no_gradient() {
        let start = tiny(&Device::Cpu).unwrap();
        for (budget, more) in [("tensors = 3", 0), ("tensors = 3\ntrain_norms = true", 7)] {
            let dir = tempfile::tempdir().unwrap();
            let ready = ready(&recipe(&[kappa(budget)]), &start, dir.path(), &Quiet).unwrap();
            let names: Vec<String> = ready.weights.params().iter().map(|p| p.name.clone()).collect();
            assert_eq!(names.len(), 3 + more, "{names:?}");
            assert_eq!(ready.selected.len(), 3);
            let chosen = |path: &String| names.contains(&format!("{path}.weight"));
            assert!(ready.selected.iter().all(chosen), "{names:?} {:?}", ready.selected);
            let model = Llama::new(&start.config, &ready.weights, DType::F32).unwrap();
            let tokens: Vec<u32> = (0..24).map(|i| i * 7 % 50 + 40).collect();
            let logits = model.forward(&tokens, &Places::plain(2, 12), &Device::Cpu).unwrap();
            let logits = logits.flatten(0, 1).unwrap();
            let labels = Tensor::from_slice(&tokens, 24, &Device::Cpu).unwrap();
            let grads = kernels::cross_entropy(&logits, &labels).unwrap().backward().unwrap();
            for (name, weight) in ready.weights.iter() {
                let got = match weight.expr() {
                    Expr::Latent(var) => grads.get(var.as_tensor()).is_some(),
                    Expr::Dense(tensor) => grads.get(tensor).is_some(),
                    other => panic!("{name}: {other:?}"),
                };
                assert_eq!(got, names.iter().any(|n| n == name), "{name}");
            }
        }
    }

    /// Half-precision weights stay as they are, the chosen ones are held in f32.
    #[test]
    fn the_chosen_ones_alone_have_a_master_copy() {
        let start = tiny(&Device::Cpu).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let recipe = recipe(&[kappa("tensors = 2"), ("model.dtype", "bf16".into())]);
        let mut stored = tiny(&Device::Cpu).unwrap();
        stored.weights = Weights::from_tensors(start.weights.iter().map(|(name, weight)| {
            (name.to_string(), weight.tensor().unwrap().to_dtype(DType::BF16).unwrap())
        }));
        let ready = ready(&recipe, &stored, dir.path(), &Quiet).unwrap();
        for (name, weight) in ready.weights.iter() {
            let chosen = ready.selected.iter().any(|path| name == format!("{path}.weight"));
            let want = if chosen { DType::F32 } else { DType::BF16 };
            assert_eq!(weight.tensor().unwrap().dtype(), want, "{name}");
        }
        let model = Llama::new(&start.config, &ready.weights, DType::BF16).unwrap();
        let logits = model.forward(&[65, 66, 67], &Places::plain(1, 3), &Device::Cpu).unwrap();
        let grads = logits.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        for param in ready.weights.params() {
            assert_eq!(grads.get(param.var.as_tensor()).unwrap().dtype(), DType::F32, "{}", param.name);
        }
    }

    /// Orders choose differently, a file's choice is taken as it is, and what cannot be trained is refused.
    #[test]
    fn controls_files_and_refusals() {
        let start = tiny(&Device::Cpu).unwrap();
        let chosen = |recipe: &Recipe| {
            let choice = choice(recipe, &start, None, &Quiet).unwrap().unwrap();
            let mut modules = choice.modules();
            modules.sort();
            modules
        };
        let lowest = chosen(&recipe(&[kappa("tensors = 4")]));
        let highest = chosen(&recipe(&[kappa("tensors = 4\norder = \"highest\"")]));
        assert!(lowest.iter().all(|module| !highest.contains(module)), "{lowest:?} {highest:?}");
        let random = "tensors = 4\norder = \"random\"";
        let of = |seed: i64| chosen(&recipe(&[kappa(random), ("seed", toml::Value::Integer(seed))]));
        assert_eq!(of(1), of(1));
        assert!(of(1) != of(2) || of(2) != of(3));
        assert!(of(1) != lowest || of(2) != lowest);

        let run = tempfile::tempdir().unwrap();
        let first = recipe(&[kappa("tensors = 4\norder = \"highest\"")]);
        choice(&first, &start, Some(run.path()), &Quiet).unwrap();
        let file = format!("selection = {:?}", run.path().display().to_string());
        assert_eq!(chosen(&recipe(&[kappa(&file)])), highest);
        // It holds for the numbers that it was made of alone.
        let mut other = tiny(&Device::Cpu).unwrap();
        let name = format!("{}.weight", highest[0]);
        let moved = other.weights.get(&name).unwrap().tensor().unwrap().affine(1.0, 0.5).unwrap();
        other.weights.insert(&name, Weight::dense(moved));
        let error = choice(&recipe(&[kappa(&file)]), &other, None, &Quiet).unwrap_err().to_string();
        assert!(error.starts_with(&format!("tensor {name}: found other numbers")), "{error}");
        // A run keeps to what lies in its folder, whatever the recipe would choose now.
        let again = choice(&recipe(&[kappa("tensors = 4")]), &start, Some(run.path()), &Quiet).unwrap();
        assert_eq!(again.unwrap().selection.options.order, first.kappa.unwrap().order);

        let plain = choice(&recipe(&[]), &start, None, &Quiet).unwrap();
        assert!(plain.is_none());
        let all = recipe(&[kappa("tensors = 1\ninclude = [\"nothing.*\"]")]);
        let error = choice(&all, &start, None, &Quiet).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("nothing.*"), "{error}");
    }

    /// A slice of a stack of experts has a condition number, and is not trained by itself.
    #[test]
    fn slices_are_analysed_only() {
        let mut start = tiny(&Device::Cpu).unwrap();
        let stack = (0..18).map(|i| (i * i % 7) as f32).collect();
        let stack = Tensor::from_vec(stack, (2, 3, 3), &Device::Cpu).unwrap();
        start.weights.insert("model.layers.0.mlp.experts.up_proj", Weight::dense(stack));
        let only = recipe(&[kappa("tensors = 1\nroles = [\"experts\"]")]);
        let error = choice(&only, &start, None, &Quiet).unwrap_err().to_string();
        assert!(error.contains("experts.up_proj[") && error.contains("analysed"), "{error}");
    }
}
