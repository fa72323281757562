//! `qtune predict`.

use std::path::PathBuf;

use anyhow::Result;
use candle_core::Tensor;
use clap::Args;
use qtune::data::decode_file;
use qtune::models::{model_dir, open_model_with};
use qtune::{hub, kernels};
use serde_json::json;

use super::flags::Common;
use super::{print, print_json};

#[derive(Args, Debug)]
pub struct Predict {
    /// Model: a folder, a file, a run of ours or a hub name; full precision or packed
    model: PathBuf,
    /// Images, jpeg or png
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// Classes to show for each image
    #[arg(long, value_name = "N", default_value_t = 3)]
    top: usize,
    #[command(flatten)]
    common: Common,
}

impl Predict {
    pub fn run(self) -> Result<()> {
        let device = self.common.device()?;
        let dir = model_dir(&hub::resolve(&self.model.to_string_lossy())?);
        let opened = open_model_with(&dir, self.common.pickle(), &device)?;
        let model = opened.config.build(&opened.weights)?;
        let (height, width) = opened.config.image_size();
        let channels = opened.config.channels();
        let mut answers = Vec::new();
        for path in &self.images {
            let image = decode_file(path)?;
            let mut pixels = vec![0f32; channels * height * width];
            opened.preprocess.apply(&image, None, &mut pixels)?;
            let input = Tensor::from_vec(pixels, (1, channels, height, width), &device)?;
            let logits = model.forward(&input)?.logits()?;
            let shares = kernels::softmax(&logits)?.flatten_all()?.to_vec1::<f32>()?;
            let mut order: Vec<usize> = (0..shares.len()).collect();
            order.sort_by(|a, b| shares[*b].total_cmp(&shares[*a]).then(a.cmp(b)));
            order.truncate(self.top.max(1));
            let label = |class: usize| opened.config.classes().get(class).cloned().unwrap_or_default();
            if !self.common.json {
                let said: Vec<String> =
                    order.iter().map(|&c| format!("{} {:.1} %", label(c), 100.0 * shares[c])).collect();
                print(&format!("{}: {}", path.display(), said.join(", ")))?;
            }
            let top: Vec<_> = order
                .iter()
                .map(|&c| json!({"class": c, "label": label(c), "probability": shares[c]}))
                .collect();
            answers.push(json!({"image": path.display().to_string(), "top": top}));
        }
        if self.common.json {
            print_json(&json!({
                "command": "predict",
                "model": self.model.display().to_string(),
                "predictions": answers,
            }))?;
        }
        Ok(())
    }
}
