//! An adapter out of a store: what training left in its rules and trained tensors.

use std::path::Path;

use candle_core::Tensor;
use indexmap::IndexMap;

use super::config::AdapterConfig;
use super::files::Adapter;
use super::is_adapter;
use super::modules::Modules;
use super::names::{Form, Part};
use super::targets::{inside, Bias};
use crate::weights::{Expr, Weights};
use crate::{Error, Result};

impl Adapter {
    /// Collects the adapter that `config` describes out of `weights`: the tensors of the outermost rule
    /// on each module that the configuration chooses, modules that are trained whole, trained biases.
    /// All are copies of the values of now.
    ///
    /// Errs where a chosen module carries no adapter, or one of another shape.
    pub fn of(config: &AdapterConfig, weights: &Weights, modules: &Modules) -> Result<Self> {
        let lora = matches!(config.method, super::Method::Lora(_));
        let task = config.task_type.as_deref();
        let chosen = config.selection.choose(modules, Form::Same, task, lora)?;
        let mut tensors: IndexMap<(String, Part), Tensor> = IndexMap::new();
        for path in &chosen.targets {
            let name = format!("{path}.weight");
            let weight = weights.get(&name)?;
            let rule = match weight.expr() {
                Expr::Node { transform, .. } if is_adapter(transform.as_ref()) => transform,
                _ => {
                    return Err(Error::tensor(name, "found no adapter on it, but target_modules chooses it"))
                }
            };
            for (suffix, tensor) in rule.tensors() {
                let Some(part) = Part::of_suffix(suffix) else {
                    return Err(Error::tensor(format!("{name}.{suffix}"), "not a tensor of an adapter"));
                };
                tensors.insert((path.clone(), part), tensor.copy()?.detach());
            }
        }
        let targeted = |path: &str| chosen.targets.iter().any(|t| t == path);
        for (name, weight) in weights.iter() {
            let Some((path, leaf)) = name.rsplit_once('.') else { continue };
            let saved = chosen.saved.iter().any(|saved| inside(path, saved));
            let bias = leaf == "bias"
                && match config.selection.bias {
                    Bias::None => false,
                    Bias::All => true,
                    Bias::Only => targeted(path),
                };
            let part = match (saved, bias) {
                (true, _) => Part::Own(leaf.to_string()),
                (false, true) if targeted(path) => Part::Base(leaf.to_string()),
                (false, true) => Part::Own(leaf.to_string()),
                (false, false) => continue,
            };
            tensors.insert((path.to_string(), part), weight.tensor()?.copy()?.detach());
        }
        let adapter = Adapter::new(config.clone(), tensors, Path::new(""));
        // What is written must be what can be read.
        adapter.place(weights, modules)?;
        Ok(adapter)
    }
}

impl AdapterConfig {
    /// Paths and sizes `(out, in)` of the modules that the configuration chooses.
    pub fn targets(&self, modules: &Modules) -> Result<Vec<(String, (usize, usize))>> {
        let lora = matches!(self.method, super::Method::Lora(_));
        let chosen = self.selection.choose(modules, Form::Same, self.task_type.as_deref(), lora)?;
        let size = |path: String| {
            let module = modules.get(&path);
            match module.and_then(|m| m.size) {
                Some(size) => Ok((path, size)),
                None => Err(Error::Run(format!("{path}: a target without a matrix"))),
            }
        };
        chosen.targets.into_iter().map(size).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::attach::{Attach, Training};
    use super::super::files::tests::{adapter, ramp};
    use super::super::method::{LoraConfig, Method};
    use super::super::modules::tests::{llama, llama_shapes};
    use super::*;

    const Q: [&str; 2] = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"];

    fn store() -> Weights {
        Weights::from_tensors(llama_shapes(false).into_iter().map(|(name, shape)| (name, ramp(&shape))))
    }

    fn sample() -> Adapter {
        let mut tensors = vec![("model.norm", Part::Own("weight".to_string()), ramp(&[8]))];
        for path in Q {
            tensors.push((path, Part::LoraA, ramp(&[2, 8])));
            tensors.push((path, Part::LoraB, ramp(&[8, 2])));
        }
        let mut sample =
            adapter(Method::Lora(LoraConfig { r: 2, ..LoraConfig::default() }), &["q_proj"], &tensors);
        sample.config.selection.modules_to_save = vec!["norm".into()];
        sample
    }

    #[test]
    fn what_was_attached_is_collected() {
        let mut weights = store();
        let how = Attach { training: Some(Training::new(0)), ..Attach::default() };
        sample().attach(&mut weights, &llama(false), &how).unwrap();
        let modules = Modules::of(&serde_json::json!({"model_type": "llama"}), &weights).unwrap();
        let back = Adapter::of(&sample().config, &weights, &modules).unwrap();
        assert_eq!(back.tensors().count(), sample().tensors().count());
        for (path, part, tensor) in sample().tensors() {
            let got = back.tensor(path, part).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(got, tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap(), "{path} {part:?}");
        }
        // A copy: training on does not move it.
        let before = back.tensor(Q[0], &Part::LoraA).unwrap().to_vec2::<f32>().unwrap();
        for param in weights.params() {
            param.var.set(&param.var.zeros_like().unwrap()).unwrap();
        }
        assert_eq!(back.tensor(Q[0], &Part::LoraA).unwrap().to_vec2::<f32>().unwrap(), before);
    }

    #[test]
    fn a_chosen_module_without_an_adapter_is_an_error() {
        let error = Adapter::of(&sample().config, &store(), &llama(false)).unwrap_err().to_string();
        assert!(error.contains(Q[0]) && error.contains("no adapter"), "{error}");
        let targets = sample().config.targets(&llama(false)).unwrap();
        assert_eq!(targets, Q.map(|q| (q.to_string(), (8, 8))));
    }
}
