//! Which weights a task trains: all of them, or, of KappaTune's later tasks, those of the lowest condition
//! numbers, ranked as the task before left them.

use crate::recipe::{Protection, Recipe};
use crate::select::kappa::{
    analyse, choose_with_notes, units, units::total_params, vision_roles, KappaConfig, Options,
};
use crate::train::Progress;
use crate::weights::{Weight, Weights};
use crate::{Error, Result};

/// The store of task `at` with what it trains made trainable, and the names of that where it is not all.
pub(super) fn trained(
    recipe: &Recipe,
    at: usize,
    weights: &Weights,
    progress: &dyn Progress,
) -> Result<(Weights, Option<Vec<String>>)> {
    let method = recipe.continual.as_ref().map(|continual| continual.method);
    let Some(kappa) = recipe.kappa.as_ref().filter(|_| at > 0 && method == Some(Protection::Kappatune))
    else {
        return Ok((weights.trainable()?, None));
    };
    let chosen = chosen(recipe, kappa, weights, progress)?;
    let trains = |name: &str| {
        let vector = |ending: &str| name.ends_with(ending);
        let norm = name.contains("norm") && (vector(".weight") || vector(".bias"));
        // The output layer, or both of a model with two heads, is always trained.
        name.split('.').any(|part| part.ends_with("classifier"))
            || chosen.iter().any(|c| c == name)
            || (kappa.train_norms && norm)
            || (kappa.train_biases && vector(".bias") && !norm)
    };
    let (mut store, mut names) = (Weights::default(), Vec::new());
    for (name, weight) in weights.iter() {
        let weight = match trains(name) {
            true => {
                names.push(name.to_string());
                Weight::latent(&weight.tensor()?)?
            }
            false => weight.folded()?,
        };
        store.insert(name, weight);
    }
    let few = names.iter().filter(|name| chosen.contains(name)).count();
    progress
        .note(&format!("trained from here on: {few} weights of low condition number, and the classifier"));
    Ok((store, Some(names)))
}

/// The names that the recipe's `[kappa]` picks of a store.
fn chosen(
    recipe: &Recipe,
    kappa: &KappaConfig,
    weights: &Weights,
    progress: &dyn Progress,
) -> Result<Vec<String>> {
    let units = units(weights, &vision_roles)?;
    let scored = analyse(weights, &units, &Options::from(kappa), None, progress)?;
    let picked = choose_with_notes(&scored, total_params(weights)?, kappa, recipe.seed)?;
    picked.notes.iter().for_each(|note| progress.note(note));
    let mut names = Vec::with_capacity(picked.units.len());
    for i in picked.units {
        let unit = &scored[i].unit;
        if unit.index.is_some() {
            let message = "one of several matrices in a tensor, which is not trained by itself here";
            return Err(Error::usage(format!("kappa: {}: {message}", unit.key())));
        }
        names.push(unit.param.clone());
    }
    Ok(names)
}
