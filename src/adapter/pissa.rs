//! PiSSA adapters as plain LoRA on the original base (adapters.md section 5).

use indexmap::IndexMap;
use serde_json::json;

use super::files::Adapter;
use super::method::Method;
use super::names::Part;
use super::place::Ranks;
use crate::transform::pissa::convert;
use crate::{Error, Result};

impl Adapter {
    /// The plain LoRA that equals this adapter, trained on what PiSSA left of the base, on the base
    /// itself: twice the rank, alpha such that the scale stays. `start` holds the factors at the start.
    ///
    /// Errs where either is no LoRA without DoRA, or the two do not fit together.
    pub fn converted(&self, start: &Adapter) -> Result<Self> {
        let Method::Lora(lora) = &self.config.method else {
            return Err(Error::usage("conversion to plain LoRA: found MISS or BONE, expected LORA"));
        };
        if lora.dora {
            return Err(Error::usage("conversion to plain LoRA: DoRA on a moved base has no plain form"));
        }
        let ranks = Ranks::new(lora)?;
        let mut tensors = IndexMap::new();
        for (path, part, tensor) in self.tensors() {
            let key = (path.to_string(), part.clone());
            if *part == Part::LoraB {
                continue;
            }
            if *part != Part::LoraA {
                tensors.insert(key, tensor.clone());
                continue;
            }
            let pair = |adapter: &Adapter| {
                let find = |part: Part| {
                    adapter.tensor(path, &part).cloned().ok_or_else(|| {
                        Error::tensor(adapter.name(path, &part), "missing in the adapter or its start")
                    })
                };
                Ok::<_, Error>((find(Part::LoraA)?, find(Part::LoraB)?))
            };
            let ((a, b), (a0, b0)) = (pair(self)?, pair(start)?);
            let alpha = ranks.alpha(lora, &super::names::Form::Same.spellings(path))?;
            let converted = convert((&a, &b), (&a0, &b0), alpha, lora.rslora)?;
            tensors.insert(key, converted.a);
            tensors.insert((path.to_string(), Part::LoraB), converted.b);
        }
        let factor = if lora.rslora { std::f64::consts::SQRT_2 } else { 2.0 };
        let mut plain = lora.clone();
        plain.r *= 2;
        plain.alpha *= factor;
        plain.rank_pattern.iter_mut().for_each(|(_, r)| *r *= 2);
        plain.alpha_pattern.iter_mut().for_each(|(_, alpha)| *alpha *= factor);
        plain.init = json!(true);
        let mut config = self.config.clone();
        config.method = Method::Lora(plain);
        Ok(Adapter::new(config, tensors, self.source()))
    }
}
