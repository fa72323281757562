//! Models and adapters for other people's code: a `VarBuilder` that any candle model loads from.

use std::path::Path;

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

use crate::adapter::{Adapter, Attach, Modules};
use crate::models::{model_dir, open_weights, read_config};
use crate::weights::Weights;
use crate::Result;

/// A `VarBuilder` over the model in the folder `dir` with `adapters` on it, each a folder as PEFT or qtune
/// writes it, put on in their order. A candle model that asks it for its tensors gets those of the adapted
/// model, as `dtype` on `device`; its code stays as it is.
///
/// The base may be of any architecture, in one file or in shards, dense or packed by qtune. Tensors are
/// read, unpacked and adapted on the CPU one at a time, when the model asks for them, and go by the names
/// in the checkpoint; adapters may name their modules as transformers 5 does. Where a model's table of
/// tokens is its output embedding too, a model that asks for `lm_head.weight` is given the table.
///
/// An adapter that changes one of the two takes them apart, as it does in PEFT: there is an
/// `lm_head.weight` of its own then (`contains_tensor` tells), and a model that looks at
/// `tie_word_embeddings` in its configuration has to be told `false`.
///
/// Errs on a folder that is not a model's, on an adapter with a tensor that has no place in the model, with
/// a module that lacks its tensors, or of a shape that does not fit: nothing of an adapter is left out.
///
/// ```no_run
/// use candle_core::{DType, Device};
/// use candle_nn::{linear_no_bias, Linear};
/// use std::path::Path;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let adapters = [Path::new("runs/sorting/adapter")];
/// let vb = qtune::var_builder(Path::new("SmolLM2-135M"), &adapters, DType::F32, &Device::Cpu)?;
/// // A layer of a model; `candle_transformers::models::llama::Llama::load(vb, &config)` asks for all.
/// let query: Linear = linear_no_bias(576, 576, vb.pp("model.layers.0.self_attn.q_proj"))?;
/// # Ok(())
/// # }
/// ```
pub fn var_builder(
    dir: &Path,
    adapters: &[&Path],
    dtype: DType,
    device: &Device,
) -> Result<VarBuilder<'static>> {
    let dir = model_dir(dir);
    let json = read_config(&dir)?.1;
    let mut weights = open_weights(&dir, &Device::Cpu)?;
    let modules = Modules::of(&json, &weights)?;
    for path in adapters {
        let inner = path.join("adapter");
        // A run folder of ours.
        let path = if inner.join("adapter_config.json").exists() { &inner } else { *path };
        Adapter::open(path)?.attach(&mut weights, &modules, &Attach::default())?;
    }
    let tied = modules.tied().map(|(table, head)| (format!("{table}.weight"), format!("{head}.weight")));
    let model = Model { weights, tied };
    Ok(VarBuilder::from_backend(Box::new(model), dtype, device.clone()))
}

/// A store and the two names of a tied table: the one that it has, and the one that it goes by too.
struct Model {
    weights: Weights,
    tied: Option<(String, String)>,
}

impl Model {
    /// The name under which the store has what is asked for.
    fn stored<'a>(&'a self, name: &'a str) -> &'a str {
        match &self.tied {
            Some((table, head)) if head == name && !self.weights.contains(name) => table,
            _ => name,
        }
    }
}

impl SimpleBackend for Model {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        SimpleBackend::get(&self.weights, shape, self.stored(name), init, dtype, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        self.weights.get_unchecked(self.stored(name), dtype, device)
    }

    /// Says no to the second name of a tied table: a model that can share it, should.
    fn contains_tensor(&self, name: &str) -> bool {
        self.weights.contains(name)
    }
}
