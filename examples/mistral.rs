//! candle-transformers' Mistral over a qtune model and its adapters:
//! `cargo run --release --example mistral [MODEL_DIR [ADAPTER_DIR...]]`

mod shared;

use candle_core::{DType, Device};
use candle_transformers::models::mistral::{Config, Model};

fn main() -> anyhow::Result<()> {
    shared::run(shared::Kind::Mistral, |model, adapters| {
        let vb = qtune::var_builder(model, adapters, DType::F32, &Device::Cpu)?;
        let mut mistral = Model::new(&shared::config::<Config>(model)?, vb)?;
        Ok(mistral.forward(&shared::prompt(model)?, 0)?)
    })
}
