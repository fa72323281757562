//! An adapter on a model: each weight that it changes wrapped in the rule that its tensors belong to.

use std::sync::atomic::AtomicU64;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::files::Adapter;
use super::method::{LoraConfig, Method, MissConfig, Variant};
use super::modules::{Kind, Modules};
use super::names::Part;
use super::place::{block_shape, Leaf, Placed, Ranks, Target};
use super::turned::Turned;
use crate::transform::pissa::pissa;
use crate::transform::{Bat, Dora, Dropout, EmbeddingLora, Lora, Mini, Miss};
use crate::weights::{Transform, Weight, Weights};
use crate::{Error, Result};

/// What training an attached adapter needs beside its tensors.
#[derive(Clone, Debug)]
pub struct Training {
    /// The seed of its dropout.
    pub seed: u64,
    /// The number of the forward pass, which whoever trains counts up.
    pub pass: Arc<AtomicU64>,
}

impl Training {
    /// Training from pass 0.
    pub fn new(seed: u64) -> Self {
        Training { seed, pass: Arc::new(AtomicU64::new(0)) }
    }
}

/// What to make of an adapter whose start was taken out of the base, as PiSSA's is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Residual {
    /// Refuse it.
    #[default]
    Refuse,
    /// The base at hand is what was left when the start was taken out.
    Stored,
    /// The base at hand is the original: take the start out of it again (PiSSA, by an exact decomposition).
    Rebuild,
}

/// How an adapter is put on a model.
#[derive(Clone, Debug, Default)]
pub struct Attach {
    /// Trainable, with its dropout; `None`: frozen, without.
    pub training: Option<Training>,
    /// A factor on the adapter's change, 1 where `None`. The block affine form and DoRA know 0 and 1 alone.
    pub scale: Option<f64>,
    /// What to make of an adapter whose start was taken out of the base.
    pub residual: Residual,
}

/// What an adapter changed in a store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attached {
    /// Weights that are wrapped in a rule, by their checkpoint names.
    pub wrapped: Vec<String>,
    /// Weights that the adapter's own tensors took the place of.
    pub replaced: Vec<String>,
    /// Whether a head that shared its table with the tokens has one of its own now.
    pub untied: bool,
    /// What is worth a line.
    pub notes: Vec<String>,
}

impl Adapter {
    /// Puts the adapter on `weights`, whose modules are `modules`.
    ///
    /// Errs where a tensor of the adapter has no place, a chosen module lacks its tensors, a shape or a
    /// rank does not fit (the first one, with both), or `how` asks for what the method does not have. The
    /// store is as it was then.
    pub fn attach(&self, weights: &mut Weights, modules: &Modules, how: &Attach) -> Result<Attached> {
        self.put(weights, modules, how, false)
    }

    /// As [`Adapter::attach`]; `fold`: what a branch adds to a bias goes into the layer's own, as a merged
    /// model has no other place for it.
    pub(super) fn put(
        &self,
        weights: &mut Weights,
        modules: &Modules,
        how: &Attach,
        fold: bool,
    ) -> Result<Attached> {
        // A file is read to the CPU.
        let device = device_of(weights);
        if !device.is_cpu() && self.tensors().any(|(_, _, tensor)| !tensor.device().same_device(&device)) {
            return self.to_device(&device)?.put(weights, modules, how, fold);
        }
        let placed = self.place(weights, modules)?;
        let scale = how.scale.unwrap_or(1.0);
        self.check_scale(scale, how)?;
        let mut store = weights.clone();
        let mut attached = Attached { notes: placed.notes.clone(), ..Attached::default() };
        if scale == 0.0 {
            attached.notes.push("scale 0: the adapter is left off".to_string());
            return Ok(attached);
        }
        // Copies of the base first: what comes apart, comes apart from them. The copy of a head that
        // stays tied is that of its table.
        let head = modules.tied().map(|(_, head)| format!("{head}.weight"));
        let (late, early): (Vec<&Leaf>, Vec<&Leaf>) =
            placed.leaves.iter().partition(|leaf| !leaf.copy || head.as_ref() == Some(&leaf.name));
        for leaf in early {
            store.insert(leaf.name.clone(), leaf_weight(leaf, &store, how)?);
        }
        attached.untied = untie(&mut store, modules, &placed)?;
        for leaf in late {
            if leaf.copy && !store.contains(&leaf.name) {
                continue;
            }
            store.insert(leaf.name.clone(), leaf_weight(leaf, &store, how)?);
            if !leaf.copy {
                attached.replaced.push(leaf.name.clone());
            }
        }
        let rules = Rules { adapter: self, how, scale, fold };
        for target in &placed.targets {
            let name = target.module.weight();
            let rule = match &self.config.method {
                Method::Miss(miss) => rules.miss(miss, target)?,
                Method::Lora(lora) => {
                    let ranks = Ranks::new(lora)?;
                    let spellings = placed.form.spellings(&target.module.path);
                    rules.lora(lora, &ranks, &spellings, target, &mut store)?
                }
            };
            let rule = if target.module.turned { Arc::new(Turned::new(rule)) } else { rule };
            store.wrap(&name, rule)?;
            attached.wrapped.push(name);
        }
        *weights = store;
        Ok(attached)
    }

    fn check_scale(&self, scale: f64, how: &Attach) -> Result<()> {
        let whole = match &self.config.method {
            Method::Miss(miss) => miss.variant == Variant::Bat,
            Method::Lora(lora) => lora.dora,
        };
        if !scale.is_finite() {
            return Err(Error::usage(format!("scale {scale}: expected a finite number")));
        }
        if whole && scale != 0.0 && scale != 1.0 {
            let what = if self.config.r() > 0 && matches!(self.config.method, Method::Lora(_)) {
                "DoRA"
            } else {
                "the block affine form"
            };
            return Err(Error::usage(format!("scale {scale}: {what} is no sum, expected 0 or 1")));
        }
        if how.training.is_some() && scale != 1.0 {
            let message = format!("scale {scale}: an adapter is trained at its own scale, expected 1");
            return Err(Error::usage(message));
        }
        let Method::Lora(lora) = &self.config.method else { return Ok(()) };
        match (lora.moved_base(), how.residual) {
            (None, _) | (_, Residual::Stored) => Ok(()),
            (Some(init), Residual::Rebuild) if init.starts_with("pissa") => Ok(()),
            (Some(init), Residual::Rebuild) => Err(Error::usage(format!(
                "init_lora_weights: {init} changed the base in a way that is not rebuilt here: expected the \
                 base that was left, or an adapter converted to plain LoRA"
            ))),
            (Some(init), Residual::Refuse) => Err(Error::usage(format!(
                "{}: init_lora_weights is {init}, which moved part of the base into the adapter: expected an \
                 adapter converted to plain LoRA, the base that was left, or word to rebuild it",
                self.source().display()
            ))),
        }
    }
}

/// Where the weights of a store lie.
pub(super) fn device_of(weights: &Weights) -> Device {
    weights.iter().next().map_or(Device::Cpu, |(_, weight)| weight.device())
}

/// Gives a head that shares its table with the tokens a weight of its own where the adapter changes
/// either; the head keeps the table as it was.
fn untie(weights: &mut Weights, modules: &Modules, placed: &Placed) -> Result<bool> {
    let Some((table, head)) = modules.tied() else { return Ok(false) };
    let (table, head) = (format!("{table}.weight"), format!("{head}.weight"));
    let touched = |name: &str| {
        placed.targets.iter().any(|t| t.module.weight() == name)
            || placed.leaves.iter().any(|leaf| !leaf.copy && leaf.name == name)
    };
    if weights.contains(&head) || !(touched(&table) || touched(&head)) {
        return Ok(false);
    }
    let shared = weights.get(&table)?.clone();
    weights.insert(head, shared);
    Ok(true)
}

/// The weight that a tensor of the model itself becomes.
fn leaf_weight(leaf: &Leaf, weights: &Weights, how: &Attach) -> Result<Weight> {
    if how.training.is_some() && !leaf.copy {
        return Weight::latent(&leaf.tensor.to_dtype(DType::F32)?);
    }
    // Frozen, it is what the base's own tensor is to the model, dtype included.
    let dtype = match weights.contains(&leaf.name) {
        true => match weights.get(&leaf.name)?.expr() {
            crate::weights::Expr::Packed(_) => DType::F32,
            _ => weights.get(&leaf.name)?.tensor()?.dtype(),
        },
        false => leaf.tensor.dtype(),
    };
    Ok(Weight::dense(leaf.tensor.to_dtype(dtype)?))
}

/// Makes the rules of one adapter.
struct Rules<'a> {
    adapter: &'a Adapter,
    how: &'a Attach,
    scale: f64,
    fold: bool,
}

impl Rules<'_> {
    fn trainable(&self) -> bool {
        self.how.training.is_some()
    }

    fn dropout(&self, p: f64, target: &Target) -> Result<Option<Dropout>> {
        match &self.how.training {
            Some(training) if p > 0.0 => {
                Ok(Some(Dropout::new(p, training.seed, &target.module.path, training.pass.clone())?))
            }
            _ => Ok(None),
        }
    }

    fn miss(&self, miss: &MissConfig, target: &Target) -> Result<Arc<dyn Transform>> {
        let size = target.size()?;
        let found = target.part(self.adapter, Part::Block)?;
        let ranks = (miss.r, miss.mini_r);
        if miss.variant != Variant::Bat && found.dims().first() != Some(&miss.r) {
            let message = format!(
                "found rank {:?} of {:?}, expected {} of adapter_config.json",
                found.dims().first().unwrap_or(&0),
                found.dims(),
                miss.r
            );
            return Err(Error::tensor(self.adapter.name(&target.path, &Part::Block), message));
        }
        let shape = block_shape(miss.variant, ranks, &target.module.path, size)?;
        let block = target.check(self.adapter, Part::Block, &shape)?;
        let dropout = self.dropout(miss.dropout, target)?;
        let scaled = || Ok::<_, Error>(block.to_dtype(DType::F32)?.affine(self.scale, 0.0)?);
        let train = self.trainable();
        Ok(match miss.variant {
            Variant::Bat => Arc::new(Bat::new(block, size, train)?),
            Variant::Mini => Arc::new(Mini::new(&scaled()?, size, dropout, train)?),
            Variant::Additive | Variant::AdditiveUniform => {
                Arc::new(Miss::new(&scaled()?, size, dropout, train)?)
            }
        })
    }

    fn lora(
        &self,
        lora: &LoraConfig,
        ranks: &Ranks,
        spellings: &[String],
        target: &Target,
        store: &mut Weights,
    ) -> Result<Arc<dyn Transform>> {
        let adapter = self.adapter;
        let train = self.trainable();
        let embedding = target.module.kind == Kind::Embedding;
        let first = if embedding { Part::EmbeddingA } else { Part::LoraA };
        let (mut rows, cols) = target.size()?;
        // A table or a head of another size came with the adapter.
        if let Some(row) =
            store.get(&target.module.weight()).ok().and_then(|w| super::modules::shape_of(w).ok())
        {
            if !target.module.turned {
                rows = row.first().copied().unwrap_or(rows);
            }
        }
        let name = adapter.name(&target.path, &first);
        let found = target.part(adapter, first.clone())?.dims().first().copied().unwrap_or(0);
        let scale = ranks.scale(lora, spellings, &name, found)? * self.scale;
        if embedding {
            let a = target.check(adapter, Part::EmbeddingA, &[found, rows])?;
            let b = target.check(adapter, Part::EmbeddingB, &[cols, found])?;
            return Ok(Arc::new(EmbeddingLora::new(a, b, scale, train)?));
        }
        let a = target.check(adapter, Part::LoraA, &[found, cols])?;
        let b = target.check(adapter, Part::LoraB, &[rows, found])?;
        if self.how.residual == Residual::Rebuild && lora.moved_base().is_some() {
            let name = target.module.weight();
            let w = store.get(&name)?.tensor()?.to_dtype(DType::F32)?;
            let residual = match target.module.turned {
                true => pissa(&w.t()?.contiguous()?, found, scale)?.residual.t()?.contiguous()?,
                false => pissa(&w, found, scale)?.residual,
            };
            store.insert(name, Weight::dense(residual.to_device(w.device())?));
        }
        let dropout = self.dropout(lora.dropout, target)?;
        if lora.dora {
            let m = target.check(adapter, Part::Magnitude, &[rows])?;
            return Ok(Arc::new(Dora::new(a, b, m, scale, dropout, train)?));
        }
        let bias = match lora.bias {
            true => Some(target.check(adapter, Part::LoraBias, &[rows])?),
            false => None,
        };
        if let Some(bias) = bias.filter(|_| self.fold) {
            self.fold_bias(bias, scale, target, store)?;
            return Ok(Arc::new(Lora::new(a, b, scale, None, dropout, train)?));
        }
        Ok(Arc::new(Lora::new(a, b, scale, bias, dropout, train)?))
    }

    fn fold_bias(&self, bias: &Tensor, scale: f64, target: &Target, store: &mut Weights) -> Result<()> {
        let name = target.module.bias();
        if !store.contains(&name) {
            let message = format!(
                "lora_bias adds to a bias that {} does not have: it cannot be merged",
                target.module.path
            );
            return Err(Error::tensor(self.adapter.name(&target.path, &Part::LoraBias), message));
        }
        let own = store.get(&name)?.tensor()?.to_dtype(DType::F32)?;
        let sum = (own + bias.to_dtype(DType::F32)?.affine(scale, 0.0)?)?;
        store.insert(name, Weight::dense(sum));
        Ok(())
    }
}
