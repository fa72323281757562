//! candle-transformers' BERT over a qtune model and its adapters; hidden states of the last token:
//! `cargo run --release --example bert [MODEL_DIR [ADAPTER_DIR...]]`

mod shared;

use candle_core::{DType, Device};
use candle_transformers::models::bert::{BertModel, Config};

fn main() -> anyhow::Result<()> {
    shared::run(shared::Kind::Bert, |model, adapters| {
        let vb = qtune::var_builder(model, adapters, DType::F32, &Device::Cpu)?;
        let bert = BertModel::load(vb, &shared::config::<Config>(model)?)?;
        let tokens = shared::prompt(model)?;
        Ok(bert.forward(&tokens, &tokens.zeros_like()?, None)?)
    })
}
