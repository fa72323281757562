//! candle-transformers' Llama over a qtune model and its adapters:
//! `cargo run --release --example llama [MODEL_DIR [ADAPTER_DIR...]]`

mod shared;

use candle_core::{DType, Device};
use candle_transformers::models::llama::{Cache, Llama, LlamaConfig};

fn main() -> anyhow::Result<()> {
    shared::run(shared::Kind::Llama, |model, adapters| {
        let config = shared::config::<LlamaConfig>(model)?.into_config(false);
        let vb = qtune::var_builder(model, adapters, DType::F32, &Device::Cpu)?;
        let llama = Llama::load(vb, &config)?;
        let mut cache = Cache::new(false, DType::F32, &config, &Device::Cpu)?;
        Ok(llama.forward(&shared::prompt(model)?, 0, &mut cache)?)
    })
}
