//! A fresh adapter on a model, ready to be trained.

use std::sync::Arc;

use candle_core::{DType, Device};
use indexmap::IndexMap;
use serde_json::Value;

use super::attach::{device_of, Attached, Training};
use super::config::AdapterConfig;
use super::files::Adapter;
use super::method::{LoraConfig, Method, MissConfig, Variant};
use super::modules::{Kind, Module, Modules};
use super::names::{Form, Part};
use super::place::{block_shape, Ranks};
use super::targets::{inside, Bias};
use super::turned::Turned;
use crate::random::Random;
use crate::transform::pissa::pissa;
use crate::transform::{Bat, Dora, Dropout, EmbeddingLora, Lora, LoraInit, Mini, Miss, MissInit};
use crate::weights::{Transform, Weight, Weights};
use crate::{Error, Result};

/// What a fresh adapter changed in a store.
#[derive(Clone, Debug)]
pub struct Started {
    /// The weights that it wraps, and those that are trained themselves (`replaced`).
    pub attached: Attached,
    /// PiSSA: the factors at the start, which [`Adapter::converted`] asks for.
    pub start: Option<Adapter>,
}

impl AdapterConfig {
    /// Puts a fresh, trainable adapter on `weights`: rules on the chosen modules, modules to be trained
    /// whole and biases as trainable copies. What is drawn follows from `training.seed` and names alone.
    ///
    /// Errs where nothing is chosen, a formula does not fit a module (which, with its shape), or the
    /// start is of a kind that is not made here. The store is as it was then.
    pub fn start(&self, weights: &mut Weights, modules: &Modules, training: &Training) -> Result<Started> {
        let lora = matches!(self.method, Method::Lora(_));
        let chosen = self.selection.choose(modules, Form::Same, self.task_type.as_deref(), lora)?;
        let mut store = weights.clone();
        let mut attached = Attached { notes: chosen.notes.clone(), ..Attached::default() };
        let changes = |name: &str| {
            let path = name.rsplit_once('.').map_or(name, |(path, _)| path);
            chosen.targets.iter().any(|t| t == path) || chosen.saved.iter().any(|s| inside(path, s))
        };
        if let Some((table, head)) = modules.tied() {
            let (table, head) = (format!("{table}.weight"), format!("{head}.weight"));
            if !store.contains(&head) && (changes(&table) || changes(&head)) {
                store.insert(head, store.get(&table)?.clone());
                attached.untied = true;
            }
        }
        let mut factors = IndexMap::new();
        for path in &chosen.targets {
            let Some(module) = modules.get(path) else { continue };
            let name = module.weight();
            let rule = match &self.method {
                Method::Miss(miss) => start_miss(miss, module, training, &device_of(&store))?,
                Method::Lora(lora) => start_lora(lora, module, training, &mut store)?,
            };
            if matches!(&self.method, Method::Lora(lora) if lora.moved_base().is_some()) {
                for (suffix, tensor) in rule.tensors() {
                    if let Some(part) = Part::of_suffix(suffix) {
                        factors.insert((path.clone(), part), tensor.copy()?);
                    }
                }
            }
            let rule = if module.turned { Arc::new(Turned::new(rule)) } else { rule };
            store.wrap(&name, rule)?;
            attached.wrapped.push(name);
        }
        let names: Vec<String> = store.iter().map(|(name, _)| name.to_string()).collect();
        for name in names {
            let Some((path, leaf)) = name.rsplit_once('.') else { continue };
            let bias = match self.selection.bias {
                Bias::None => false,
                Bias::All => leaf == "bias",
                Bias::Only => leaf == "bias" && chosen.targets.iter().any(|t| t == path),
            };
            if bias || chosen.saved.iter().any(|saved| inside(path, saved)) {
                let latent = Weight::latent(&store.get(&name)?.tensor()?.to_dtype(DType::F32)?)?;
                store.insert(name.clone(), latent);
                attached.replaced.push(name);
            }
        }
        *weights = store;
        let start =
            (!factors.is_empty()).then(|| Adapter::new(self.clone(), factors, std::path::Path::new("")));
        Ok(Started { attached, start })
    }
}

fn random(training: &Training, module: &Module) -> Random {
    Random::new(training.seed, &format!("adapter {}", module.path), &[])
}

fn dropout(p: f64, module: &Module, training: &Training) -> Result<Option<Dropout>> {
    match p > 0.0 {
        true => Ok(Some(Dropout::new(p, training.seed, &module.path, training.pass.clone())?)),
        false => Ok(None),
    }
}

fn size_of(module: &Module) -> Result<(usize, usize)> {
    module.size.ok_or_else(|| Error::Run(format!("{}: a target without a matrix", module.path)))
}

fn start_miss(
    miss: &MissConfig,
    module: &Module,
    training: &Training,
    device: &Device,
) -> Result<Arc<dyn Transform>> {
    let size = size_of(module)?;
    // For its refusals, which name the layer.
    block_shape(miss.variant, (miss.r, miss.mini_r), &module.path, size)?;
    let drop = dropout(miss.dropout, module, training)?;
    let mut random = random(training, module);
    Ok(match miss.variant {
        Variant::Bat => Arc::new(Bat::start(miss.r, size)?.to_device(device)?),
        Variant::Mini => Arc::new(Mini::start(miss.r, miss.mini_r, size, drop)?.to_device(device)?),
        Variant::Additive | Variant::AdditiveUniform => {
            let zeros = miss.variant == Variant::Additive;
            let init = if zeros { MissInit::Zeros } else { MissInit::Uniform };
            Arc::new(Miss::start(miss.r, size, init, drop, &mut random)?.to_device(device)?)
        }
    })
}

fn start_lora(
    lora: &LoraConfig,
    module: &Module,
    training: &Training,
    store: &mut Weights,
) -> Result<Arc<dyn Transform>> {
    let size = size_of(module)?;
    let ranks = Ranks::new(lora)?;
    let spellings = Form::Same.spellings(&module.path);
    let r = ranks.rank(lora, &spellings)?;
    let scale = ranks.scale(lora, &spellings, &module.path, r)?;
    let drop = dropout(lora.dropout, module, training)?;
    let mut random = random(training, module);
    let device = device_of(store);
    if lora.bias {
        return Err(Error::usage("lora_bias: trained adapters have none, expected false"));
    }
    if module.kind == Kind::Embedding {
        return match lora.dora {
            true => Err(Error::usage(format!("{}: DoRA on an embedding is not supported", module.path))),
            false => Ok(Arc::new(EmbeddingLora::start(r, size, scale, &mut random)?.to_device(&device)?)),
        };
    }
    let name = module.weight();
    let init = match &lora.init {
        Value::Bool(true) => LoraInit::Kaiming,
        Value::String(kind) if kind == "gaussian" => LoraInit::Gaussian,
        Value::String(kind) if kind == "pissa" && !lora.dora => {
            let w = store.get(&name)?.tensor()?.to_dtype(DType::F32)?;
            let w = if module.turned { w.t()?.contiguous()? } else { w };
            let principal = pissa(&w, r, scale)?;
            let residual = principal.residual;
            let residual = if module.turned { residual.t()?.contiguous()? } else { residual };
            store.insert(name, Weight::dense(residual.to_device(&device)?));
            let rule = Lora::new(&principal.a, &principal.b, scale, None, drop, true)?;
            return Ok(Arc::new(rule.to_device(&device)?));
        }
        other => {
            return Err(Error::usage(format!(
                "init_lora_weights: {other} is not made here, expected true, \"gaussian\" or \"pissa\""
            )))
        }
    };
    if lora.dora {
        let weight = store.get(&name)?.clone();
        let weight = if module.turned { Weight::dense(weight.tensor()?.t()?.contiguous()?) } else { weight };
        return Ok(Arc::new(Dora::start(r, &weight, scale, init, drop, &mut random)?));
    }
    Ok(Arc::new(Lora::start(r, size, scale, init, drop, &mut random)?.to_device(&device)?))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::attach::Attach;
    use super::super::files::tests::{adapter, ramp};
    use super::super::modules::tests::{llama, llama_shapes};
    use super::*;

    fn store() -> Weights {
        Weights::from_tensors(llama_shapes(false).into_iter().map(|(name, shape)| (name, ramp(&shape))))
    }

    fn config(method: Method) -> AdapterConfig {
        adapter(method, &["q_proj", "down_proj"], &[]).config
    }

    fn values(weights: &Weights) -> Vec<Vec<f32>> {
        let flat = |w: &Weight| w.tensor().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        weights.iter().map(|(_, w)| flat(w)).collect()
    }

    #[test]
    fn a_fresh_adapter_changes_nothing_and_trains_what_it_says() {
        let lora = |lora: LoraConfig| Method::Lora(LoraConfig { r: 2, ..lora });
        let miss = |variant| Method::Miss(MissConfig { r: 4, mini_r: 2, variant, ..MissConfig::default() });
        for (method, count) in [
            (lora(LoraConfig::default()), 8),
            (lora(LoraConfig { init: json!("gaussian"), ..LoraConfig::default() }), 8),
            (miss(Variant::Additive), 4),
            (miss(Variant::Bat), 4),
            (miss(Variant::Mini), 4),
        ] {
            let mut weights = store();
            let started =
                config(method.clone()).start(&mut weights, &llama(false), &Training::new(3)).unwrap();
            assert_eq!(values(&weights), values(&store()), "{method:?}");
            assert_eq!(started.attached.wrapped.len(), 4);
            assert!(started.start.is_none());
            assert_eq!(weights.params().len(), count, "{method:?}");
            // The same seed draws the same, and what is collected can be attached.
            let mut again = store();
            config(method.clone()).start(&mut again, &llama(false), &Training::new(3)).unwrap();
            let vars = |w: &Weights| w.params().iter().map(|p| p.var.to_string()).collect::<Vec<_>>();
            assert_eq!(vars(&weights), vars(&again));
            let modules = Modules::of(&json!({"model_type": "llama"}), &weights).unwrap();
            let collected = Adapter::of(&config(method), &weights, &modules).unwrap();
            collected.attach(&mut store(), &llama(false), &Attach::default()).unwrap();
        }
    }

    #[test]
    fn pissa_starts_from_the_weight_and_converts_back() {
        let mut config =
            config(Method::Lora(LoraConfig { r: 2, init: json!("pissa"), ..LoraConfig::default() }));
        let mut weights = store();
        let started = config.start(&mut weights, &llama(false), &Training::new(3)).unwrap();
        let near = |a: &Weights, b: &Weights, tolerance: f32| {
            for (a, b) in values(a).concat().iter().zip(values(b).concat()) {
                assert!((a - b).abs() < tolerance, "{a} {b}");
            }
        };
        near(&weights, &store(), 1e-5);
        // Moved, then written as plain LoRA and put on the original base: the same weights.
        for param in weights.params() {
            param.var.set(&(param.var.as_tensor() * 1.5).unwrap()).unwrap();
        }
        let raw = Adapter::of(&config, &weights, &llama(false)).unwrap();
        let plain = raw.converted(&started.start.unwrap()).unwrap();
        let mut original = store();
        plain.attach(&mut original, &llama(false), &Attach::default()).unwrap();
        near(&original, &weights, 1e-5);
        assert_eq!(plain.config.r(), 4);
        config.method = Method::Lora(LoraConfig { init: json!("eva"), ..LoraConfig::default() });
        let error = config.start(&mut store(), &llama(false), &Training::new(3)).unwrap_err().to_string();
        assert!(error.contains("eva"), "{error}");
    }

    #[test]
    fn what_does_not_fit_names_the_layer() {
        let bat = MissConfig { r: 5, variant: Variant::Bat, ..MissConfig::default() };
        let mut weights = store();
        let error = config(Method::Miss(bat))
            .start(&mut weights, &llama(false), &Training::new(0))
            .unwrap_err()
            .to_string();
        assert!(error.contains("q_proj") && error.contains("[8, 8]") && error.contains('5'), "{error}");
        assert!(weights.params().is_empty());
    }

    #[test]
    fn saved_modules_and_biases_are_trained() {
        let mut config = config(Method::Lora(LoraConfig { r: 2, ..LoraConfig::default() }));
        config.selection.modules_to_save = vec!["norm".into(), "lm_head".into()];
        let mut weights = store();
        let started = config.start(&mut weights, &llama(false), &Training::new(0)).unwrap();
        assert_eq!(started.attached.replaced, ["model.norm.weight", "lm_head.weight"]);
        assert_eq!(weights.params().len(), 10);
        assert_eq!(values(&weights), values(&store()));
    }
}
