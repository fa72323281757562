//! Named weights as expressions: the heart of the toolkit.
//!
//! A [`Weights`] store maps checkpoint names, in order, to [`Weight`] expressions, and tap names to
//! the rules that hang there. A model asks the store for its weights by name and never knows what
//! they are made of; whoever changes a model rewrites the store.

pub mod backend;
pub mod checkpoint;
mod fit;
pub mod format;
pub mod packed;
pub mod tap;
pub mod weight;

use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use indexmap::IndexMap;

pub use checkpoint::{Checkpoint, Pickle};
pub use fit::Fit;
pub use packed::{Centering, Grid, Packed, Quantized};
pub use tap::{Activation, Calibration, Granularity, GridRule, Shifts, Signedness, Site, Tap};
pub(crate) use weight::half_on_cuda;
pub use weight::{Expr, Gate, Role, Transform, Weight};

use crate::{Error, Result};

/// A trainable tensor under its full name.
#[derive(Clone, Debug)]
pub struct Param {
    /// The weight's checkpoint name, and beneath it what a rule adds (`….scale`).
    pub name: String,
    /// The tensor.
    pub var: Var,
    /// What it is for.
    pub role: Role,
}

/// Ordered names with their expressions.
#[derive(Clone, Debug, Default)]
pub struct Weights {
    entries: IndexMap<String, Weight>,
    taps: IndexMap<String, Arc<dyn Transform>>,
    calibration: Option<Arc<Calibration>>,
}

impl Weights {
    /// A store of frozen dense weights.
    pub fn from_tensors(tensors: impl IntoIterator<Item = (String, Tensor)>) -> Self {
        let entries = tensors.into_iter().map(|(name, t)| (name, Weight::dense(t))).collect();
        Weights { entries, ..Weights::default() }
    }

    /// A store over every tensor of a checkpoint, each read when it is asked for.
    pub fn from_checkpoint(checkpoint: Arc<Checkpoint>, device: &Device) -> Self {
        let names: Vec<String> = checkpoint.names().map(str::to_string).collect();
        let stored = |name: String| {
            let (checkpoint, device) = (checkpoint.clone(), device.clone());
            (name.clone(), Expr::Stored { checkpoint, name, device }.into())
        };
        Weights { entries: names.into_iter().map(stored).collect(), ..Weights::default() }
    }

    /// Binds `name` to `weight`, in place of what it was or as the last name.
    pub fn insert(&mut self, name: impl Into<String>, weight: Weight) {
        self.entries.insert(name.into(), weight);
    }

    /// Binds `new` in place of the weights called `old`, where the first of them stood.
    pub fn replace(&mut self, old: &[String], new: Vec<(String, Weight)>) {
        let at = old.iter().filter_map(|name| self.entries.get_index_of(name)).min();
        let at = at.unwrap_or(self.entries.len());
        for name in old {
            self.entries.shift_remove(name);
        }
        for (i, (name, weight)) in new.into_iter().enumerate() {
            self.entries.shift_insert(at + i, name, weight);
        }
    }

    /// The weight called `name`; an error that lists near names where there is none.
    pub fn get(&self, name: &str) -> Result<&Weight> {
        self.entries.get(name).ok_or_else(|| {
            let near = nearest(name, self.entries.keys().map(String::as_str));
            let hint = near.map(|n| format!(" (nearest: {n})")).unwrap_or_default();
            Error::tensor(name, format!("not found among {} tensors{hint}", self.entries.len()))
        })
    }

    /// Whether there is a weight called `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Names and expressions, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Weight)> {
        self.entries.iter().map(|(name, weight)| (name.as_str(), weight))
    }

    /// Replaces the weight called `name` by `transform` applied to it.
    pub fn wrap(&mut self, name: &str, transform: Arc<dyn Transform>) -> Result<()> {
        let wrapped = self.get(name)?.wrap(transform);
        self.insert(name, wrapped);
        Ok(())
    }

    /// Every dense leaf made trainable, copied: the store it came from does not move with it.
    pub fn trainable(&self) -> Result<Self> {
        let mut entries = IndexMap::with_capacity(self.entries.len());
        for (name, weight) in &self.entries {
            let weight = match weight.expr() {
                Expr::Dense(_) | Expr::Stored { .. } => Weight::latent(&weight.tensor()?)?,
                _ => weight.clone(),
            };
            entries.insert(name.clone(), weight);
        }
        Ok(Weights { entries, taps: self.taps.clone(), calibration: None })
    }

    /// The values of now: every expression a frozen leaf, every tap's rule without trainables.
    pub fn folded(&self) -> Result<Self> {
        let mut folded = self.folded_taps()?;
        for (name, weight) in &self.entries {
            folded.entries.insert(name.clone(), weight.folded()?);
        }
        Ok(folded)
    }

    /// The same without trainables: every expression frozen, what is on a grid computed, adapters beside
    /// their bases (see [`Weight::settled`]).
    pub fn settled(&self) -> Result<Self> {
        let mut settled = self.folded_taps()?;
        for (name, weight) in &self.entries {
            settled.entries.insert(name.clone(), weight.settled()?);
        }
        Ok(settled)
    }

    fn folded_taps(&self) -> Result<Self> {
        let mut taps = IndexMap::with_capacity(self.taps.len());
        for (name, rule) in &self.taps {
            taps.insert(name.clone(), rule.frozen()?);
        }
        Ok(Weights { entries: IndexMap::with_capacity(self.entries.len()), taps, calibration: None })
    }

    /// As [`Weights::folded`], with every weight that lies on a grid packed.
    pub fn packed(&self) -> Result<Self> {
        let mut packed = self.folded()?;
        for (name, weight) in &self.entries {
            if let Some(quantized) = weight.quantize()? {
                packed.insert(name.clone(), Expr::Packed(Packed::pack(&quantized)?).into());
            }
        }
        Ok(packed)
    }

    /// Packs the frozen weights called `names` in place, one after another, so that beside what is packed
    /// only one dense tensor is in memory; `group` columns of a row share a step, none: all of them.
    /// `progress` hears of each. A weight that is trainable, computed or packed already is an error.
    pub fn pack_frozen<S: AsRef<str>>(
        &mut self,
        names: &[S],
        grid: Grid,
        group: Option<usize>,
        mut progress: impl FnMut(&str, &Fit),
    ) -> Result<()> {
        for name in names.iter().map(AsRef::as_ref) {
            let weight = self.get(name)?;
            let found = match weight.expr() {
                Expr::Dense(_) | Expr::Stored { .. } => None,
                Expr::Latent(_) => Some("a trainable weight"),
                Expr::Packed(_) => Some("a packed weight"),
                Expr::Node { .. } => Some("a weight computed of others"),
            };
            if let Some(found) = found {
                return Err(Error::tensor(name, format!("found {found}, expected a frozen dense one")));
            }
            let (packed, fit) = Packed::fit(&weight.tensor()?, grid, group).map_err(|e| match e {
                Error::Run(message) => Error::tensor(name, message),
                other => other,
            })?;
            progress(name, &fit);
            self.insert(name, Expr::Packed(packed).into());
        }
        Ok(())
    }

    /// The tap called `name`, with whatever rule hangs there.
    pub fn tap(&self, name: impl Into<String>, site: Site) -> Tap {
        let name = name.into();
        let hung = match (&self.calibration, self.taps.get(&name)) {
            (_, Some(rule)) => tap::Hung::Rule(rule.clone()),
            (Some(calibration), None) => tap::Hung::Calibration(calibration.clone()),
            (None, None) => tap::Hung::Nothing,
        };
        Tap::new(name, site, hung)
    }

    /// The rules on taps, in order.
    pub fn taps(&self) -> impl Iterator<Item = (&str, &Arc<dyn Transform>)> {
        self.taps.iter().map(|(name, rule)| (name.as_str(), rule))
    }

    /// Hangs `rule` on the tap called `name`.
    pub fn hang(&mut self, name: impl Into<String>, rule: Arc<dyn Transform>) {
        self.taps.insert(name.into(), rule);
    }

    /// The same store, whose open taps make their rules when an activation first comes by.
    pub fn calibrating(&self, calibration: Arc<Calibration>) -> Self {
        Weights { calibration: Some(calibration), ..self.clone() }
    }

    /// The same store with every quantizer annealed to `band` (`None`: no longer), that of a product of
    /// weights only where `products` says so. Also tells how many quantizers the band reached.
    pub fn calmed(&self, band: Option<f64>, products: bool) -> (Self, usize) {
        let (mut calm, mut reached) = (self.clone(), 0);
        for (name, weight) in &self.entries {
            let product = weight.before().is_some_and(|w| matches!(w.expr(), Expr::Node { .. }));
            let band = if product && !products { None } else { band };
            if let Some(weight) = weight.calmed(band) {
                reached += usize::from(band.is_some());
                calm.insert(name.clone(), weight);
            }
        }
        (calm, reached)
    }

    /// The same store with every product of weights behind a quantizer as a trainable of its own, which
    /// starts from the product's value (copied).
    pub fn unfactored(&self) -> Result<Self> {
        let mut store = self.clone();
        for (name, weight) in &self.entries {
            let product = weight.before().filter(|w| matches!(w.expr(), Expr::Node { .. }));
            if let (Some(product), Expr::Node { transform, .. }) = (product, weight.expr()) {
                let own = Weight::latent(&product.tensor()?)?;
                store.insert(name.clone(), own.wrap(transform.clone()));
            }
        }
        Ok(store)
    }

    /// What annealing leaves free of each weight under it, by the weight's name.
    pub fn gates(&self) -> Result<Vec<(String, Gate)>> {
        let mut gates = Vec::new();
        for (name, weight) in &self.entries {
            gates.extend(weight.gate()?.map(|gate| (name.clone(), gate)));
        }
        Ok(gates)
    }

    /// Every trainable, weights first, then taps, each in order.
    pub fn params(&self) -> Vec<Param> {
        let mut params = Vec::new();
        for (name, weight) in &self.entries {
            let own = weight.params().into_iter();
            params.extend(own.map(|(suffix, var, role)| Param {
                name: format!("{name}{suffix}"),
                var,
                role,
            }));
        }
        for (name, rule) in &self.taps {
            let own = rule.params().into_iter();
            params.extend(own.map(|(suffix, var, role)| Param {
                name: format!("{name}.{suffix}"),
                var,
                role,
            }));
        }
        params
    }
}

/// The nearest of `names` to what was asked for, where one is near enough to be a slip of the pen.
pub fn nearest<'a>(asked: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let near = names.map(|name| (strsim::normalized_damerau_levenshtein(asked, name), name));
    near.filter(|(likeness, _)| *likeness > 0.5).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, name)| name)
}
