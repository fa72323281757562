//! candle-transformers' ViT over a qtune model and its adapters; the logits of its classes for an image of
//! noise: `cargo run --release --example vit [MODEL_DIR [ADAPTER_DIR...]]`

mod shared;

use candle_core::{DType, Device};
use candle_transformers::models::vit::{Config, Model};
use qtune::models::{read_config, VisionConfig};

fn main() -> anyhow::Result<()> {
    shared::run(shared::Kind::Vit, |model, adapters| {
        let config: Config = shared::config(model)?;
        let (path, json) = read_config(model)?;
        let classes = VisionConfig::from_hf(&path, &json)?.classes().len();
        let vb = qtune::var_builder(model, adapters, DType::F32, &Device::Cpu)?;
        let vit = Model::new(&config, classes, vb)?;
        let shape = [1, config.num_channels, config.image_size, config.image_size];
        Ok(vit.forward(&shared::normal("image", &shape, 1.0)?)?)
    })
}
