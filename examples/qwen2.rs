//! candle-transformers' Qwen2 over a qtune model and its adapters:
//! `cargo run --release --example qwen2 [MODEL_DIR [ADAPTER_DIR...]]`

mod shared;

use candle_core::{DType, Device};
use candle_transformers::models::qwen2::{Config, ModelForCausalLM};

fn main() -> anyhow::Result<()> {
    shared::run(shared::Kind::Qwen2, |model, adapters| {
        let vb = qtune::var_builder(model, adapters, DType::F32, &Device::Cpu)?;
        let mut qwen = ModelForCausalLM::new(&shared::config::<Config>(model)?, vb)?;
        Ok(qwen.forward(&shared::prompt(model)?, 0)?)
    })
}
