//! An adapter as plain LoRA, for the many programs that read no more than that (adapters.md section 8).
//!
//! Additive and mini blocks are LoRA exactly. Members of the LoRA family become what every reader
//! agrees on: one rank, a scale of 1 (alpha = r), no patterns, a list of modules. What plain LoRA cannot
//! say is refused, with merging as the way out.

use candle_core::{DType, Device, Tensor};
use indexmap::IndexMap;

use super::config::AdapterConfig;
use super::files::Adapter;
use super::method::{LoraConfig, Method, MissConfig, Variant};
use super::modules::{Kind, Modules};
use super::names::{Form, Part};
use super::place::{Placed, Ranks, Target};
use super::targets::{Bias, Selection, Targets};
use crate::transform::{Mini, Miss};
use crate::weights::Weights;
use crate::{Error, Result};

impl Adapter {
    /// The same change as a plain LoRA adapter for the model of `weights`, with one line for each thing
    /// that was left out.
    ///
    /// Errs on the block affine form and DoRA, whose changes are not of low rank, on biases and modules
    /// that were trained whole, and where the adapter does not fit the model.
    pub fn as_lora(&self, weights: &Weights, modules: &Modules) -> Result<(Self, Vec<String>)> {
        let refuse = |what: &str| {
            Err(Error::usage(format!(
                "plain LoRA cannot hold {what}: merge the adapter into its base instead"
            )))
        };
        match &self.config.method {
            Method::Miss(miss) if miss.variant == Variant::Bat => {
                return refuse("the block affine form, whose change has full rank");
            }
            Method::Lora(lora) if lora.dora => return refuse("DoRA's magnitudes"),
            Method::Lora(lora) if lora.bias => return refuse("the bias of lora_B"),
            Method::Lora(lora) => {
                if let Some(init) = lora.moved_base() {
                    return refuse(&format!("a start that {init} took out of the base"));
                }
            }
            Method::Miss(_) => {}
        }
        let placed = self.place(weights, modules)?;
        if let Some(leaf) = placed.leaves.iter().find(|leaf| !leaf.copy) {
            return refuse(&format!("{}, which was trained whole", leaf.name));
        }
        let mut notes = placed.notes.clone();
        for leaf in &placed.leaves {
            let base = weights.contains(&leaf.name).then(|| weights.get(&leaf.name)?.shape()).transpose()?;
            if base.is_some_and(|shape| shape != leaf.tensor.dims()) {
                return refuse(&format!("{} of another size than the base's", leaf.name));
            }
            notes.push(format!("{}: a copy of the base, left out", leaf.key));
        }
        let factors = self.factors(&placed)?;
        let rank = factors.iter().map(|(_, _, a, _)| a.dim(0)).collect::<candle_core::Result<Vec<_>>>()?;
        let Some(rank) = rank.into_iter().max() else {
            return Err(Error::usage("plain LoRA: the adapter has no tensor"));
        };
        let mut tensors = IndexMap::new();
        for (path, embedding, a, b) in factors {
            let missing = rank - a.dim(0)?;
            let (a, b) = match missing {
                0 => (a, b),
                n => {
                    let below = Tensor::zeros((n, a.dim(1)?), DType::F32, &Device::Cpu)?;
                    let beside = Tensor::zeros((b.dim(0)?, n), DType::F32, &Device::Cpu)?;
                    (Tensor::cat(&[a, below], 0)?, Tensor::cat(&[b, beside], 1)?)
                }
            };
            let parts = match embedding {
                true => [Part::EmbeddingA, Part::EmbeddingB],
                false => [Part::LoraA, Part::LoraB],
            };
            for (part, tensor) in parts.into_iter().zip([a, b]) {
                tensors.insert((path.clone(), part), tensor.contiguous()?);
            }
        }
        let (dropout, fan_in_fan_out) = match &self.config.method {
            Method::Miss(miss) => (miss.dropout, false),
            Method::Lora(lora) => (lora.dropout, lora.fan_in_fan_out),
        };
        let alpha = rank as f64;
        let lora = LoraConfig { r: rank, alpha, dropout, fan_in_fan_out, ..LoraConfig::default() };
        let selection = Selection {
            targets: Targets::List(listed(&self.config, &placed, modules)?),
            bias: Bias::None,
            ..Selection::default()
        };
        let config = AdapterConfig { method: Method::Lora(lora), selection, ..self.config.clone() };
        Ok((Adapter::new(config, tensors, self.source()), notes))
    }

    /// Path, whether it is an embedding, A and B with the scale in it, for each target.
    fn factors(&self, placed: &Placed) -> Result<Vec<(String, bool, Tensor, Tensor)>> {
        let mut factors = Vec::with_capacity(placed.targets.len());
        for target in &placed.targets {
            let (a, b) = match &self.config.method {
                Method::Miss(miss) => self.of_block(miss, target)?,
                Method::Lora(lora) => self.of_lora(lora, placed.form, target)?,
            };
            factors.push((target.path.clone(), target.module.kind == Kind::Embedding, a, b));
        }
        Ok(factors)
    }

    fn of_block(&self, miss: &MissConfig, target: &Target) -> Result<(Tensor, Tensor)> {
        let size = target.size()?;
        let block = target.part(self, Part::Block)?;
        match miss.variant {
            Variant::Mini => Mini::new(block, size, None, false)?.to_lora(),
            _ => Miss::new(block, size, None, false)?.to_lora(),
        }
    }

    fn of_lora(&self, lora: &LoraConfig, form: Form, target: &Target) -> Result<(Tensor, Tensor)> {
        let parts = match target.module.kind == Kind::Embedding {
            true => [Part::EmbeddingA, Part::EmbeddingB],
            false => [Part::LoraA, Part::LoraB],
        };
        let name = self.name(&target.path, &parts[0]);
        let [a, b] = parts.map(|part| target.part(self, part));
        let (a, b) = (a?.to_dtype(DType::F32)?, b?.to_dtype(DType::F32)?);
        let found = a.dims().first().copied().unwrap_or(0);
        let spellings = form.spellings(&target.module.path);
        let scale = Ranks::new(lora)?.scale(lora, &spellings, &name, found)?;
        Ok((a, b.affine(scale, 0.0)?))
    }
}

/// The targets as a list: last segments where they mean the same modules, else whole paths.
fn listed(config: &AdapterConfig, placed: &Placed, modules: &Modules) -> Result<Vec<String>> {
    let mut last: Vec<String> = Vec::new();
    for target in &placed.targets {
        let segment = target.path.rsplit('.').next().unwrap_or(&target.path).to_string();
        if !last.contains(&segment) {
            last.push(segment);
        }
    }
    last.sort();
    let short = Selection { targets: Targets::List(last.clone()), ..Selection::default() };
    let found = short.choose(modules, placed.form, config.task_type.as_deref(), true);
    let same = found.is_ok_and(|found| {
        found.targets.len() == placed.targets.len()
            && placed.targets.iter().all(|target| found.targets.contains(&target.module.path))
    });
    Ok(match same {
        true => last,
        false => placed.targets.iter().map(|target| target.path.clone()).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::attach::Attach;
    use super::super::files::tests::{adapter, ramp};
    use super::super::modules::tests::{llama, llama_shapes};
    use super::*;

    const Q: [&str; 2] = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"];

    fn store() -> Weights {
        Weights::from_tensors(llama_shapes(false).into_iter().map(|(name, shape)| (name, ramp(&shape))))
    }

    #[track_caller]
    fn same_change(adapter: &Adapter) -> Adapter {
        let (plain, _) = adapter.as_lora(&store(), &llama(false)).unwrap();
        let values = |adapter: &Adapter| {
            let mut weights = store();
            adapter.attach(&mut weights, &llama(false), &Attach::default()).unwrap();
            let flat = weights
                .iter()
                .map(|(_, w)| w.tensor().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap());
            flat.collect::<Vec<_>>().concat()
        };
        for (got, want) in values(&plain).iter().zip(values(adapter)) {
            assert!((got - want).abs() <= 1e-6, "{got} {want}");
        }
        let Method::Lora(lora) = &plain.config.method else { panic!("LORA") };
        assert_eq!(lora.alpha, lora.r as f64);
        assert!(lora.rank_pattern.is_empty() && lora.alpha_pattern.is_empty() && !lora.rslora);
        plain
    }

    #[test]
    fn blocks_are_lora_exactly() {
        let path = "model.layers.0.mlp.down_proj";
        let of = |variant, block: &[usize]| {
            let config = MissConfig { r: 5, mini_r: 4, variant, ..MissConfig::default() };
            adapter(Method::Miss(config), &[path], &[(path, Part::Block, ramp(block))])
        };
        // 12 inputs, rank 5: the last slice is cut.
        let plain = same_change(&of(Variant::Additive, &[5, 8]));
        assert_eq!(plain.config.r(), 5);
        assert_eq!(plain.config.selection.targets, Targets::List(vec![path.to_string()]));
        same_change(&of(Variant::Mini, &[5, 4]));
    }

    #[test]
    fn ranks_and_scales_become_one() {
        let tensors = [
            (Q[0], Part::LoraA, ramp(&[2, 8])),
            (Q[0], Part::LoraB, ramp(&[8, 2])),
            (Q[1], Part::LoraA, ramp(&[3, 8])),
            (Q[1], Part::LoraB, ramp(&[8, 3])),
        ];
        let config = LoraConfig {
            r: 2,
            alpha: 5.0,
            rslora: true,
            rank_pattern: vec![("layers.1.self_attn.q_proj".into(), 3)],
            alpha_pattern: vec![("layers.1.self_attn.q_proj".into(), 1.5)],
            ..LoraConfig::default()
        };
        let mut adapter = adapter(Method::Lora(config), &[], &tensors);
        adapter.config.selection.targets = Targets::Pattern(".*q_proj".into());
        let plain = same_change(&adapter);
        assert_eq!(plain.config.r(), 3);
        assert_eq!(plain.config.selection.targets, Targets::List(vec!["q_proj".into()]));
    }

    #[test]
    fn what_plain_lora_cannot_say_is_refused() {
        let refused = |adapter: &Adapter, part: &str| {
            let error = adapter.as_lora(&store(), &llama(false)).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("merge"), "{error}");
        };
        let block = [(Q[0], Part::Block, ramp(&[4, 2, 2]))];
        let bat = MissConfig { r: 2, variant: Variant::Bat, ..MissConfig::default() };
        refused(&adapter(Method::Miss(bat), &[Q[0]], &block), "block affine");
        let lora = |lora: LoraConfig| LoraConfig { r: 2, ..lora };
        let pair = [(Q[0], Part::LoraA, ramp(&[2, 8])), (Q[0], Part::LoraB, ramp(&[8, 2]))];
        let of = |config| adapter(Method::Lora(config), &[Q[0]], &pair);
        refused(&of(lora(LoraConfig { dora: true, ..LoraConfig::default() })), "DoRA");
        refused(&of(lora(LoraConfig { bias: true, ..LoraConfig::default() })), "bias");
        let mut saved = adapter(
            Method::Lora(lora(LoraConfig::default())),
            &[Q[0]],
            &[pair[0].clone(), pair[1].clone(), ("model.norm", Part::Own("weight".into()), ramp(&[8]))],
        );
        saved.config.selection.modules_to_save = vec!["norm".into()];
        refused(&saved, "model.norm.weight");
    }
}
