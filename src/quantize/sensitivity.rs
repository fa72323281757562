//! Which layers a model can least do with few bits: the accuracy lost when each alone is quantized, all
//! others in full precision, without training (steps of least squared error).

use std::sync::Arc;

use candle_core::Device;
use serde::Serialize;
use serde_json::{json, Value};

use crate::data::Dataset;
use crate::models::Opened;
use crate::train::{evaluate, signal, Progress, Quiet};
use crate::transform::WeightQuant;
use crate::{Error, Result};

/// What quantizing one layer alone costs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sensitivity {
    /// The weight.
    pub name: String,
    /// Its bits.
    pub bits: u8,
    /// Top-1 in percent with it quantized.
    pub top1: f64,
    /// Points of top-1 lost.
    pub drop: f64,
    /// Cross-entropy in nats gained: finer than the drop on few images.
    pub loss_rise: f64,
}

/// Ranks the matrices of a full-precision model by what each loses at `bits` bits, most first.
pub fn rank(
    opened: &Opened,
    dataset: &Dataset,
    bits: u8,
    batch_size: usize,
    device: &Device,
    progress: &dyn Progress,
) -> Result<Value> {
    if opened.quantization.is_some() {
        return Err(Error::usage("sensitivity needs a full-precision model, found a packed one"));
    }
    let preprocess = Arc::new(opened.preprocess.clone());
    let measure = |weights: &crate::weights::Weights| {
        let model = opened.config.build(weights)?;
        let (eval, preprocess) = (dataset.eval.clone(), preprocess.clone());
        evaluate(&model, eval, preprocess, batch_size, device, &Quiet, true)
    };
    let base = measure(&opened.weights)?;
    let mut names = Vec::new();
    for (name, weight) in opened.weights.iter() {
        let shape = weight.shape()?;
        // Matrices and patch embeddings; tokens and positions, whose first axis is 1, are not rows.
        if name.ends_with(".weight") && shape.len() >= 2 && shape[0] > 1 {
            names.push(name.to_string());
        }
    }
    let mut layers = Vec::with_capacity(names.len());
    progress.start("sensitivity", names.len());
    for (i, name) in names.iter().enumerate() {
        if let Some(signal) = signal::asked() {
            return Err(Error::Stopped { signal, resume: None });
        }
        let mut weights = opened.weights.clone();
        let w = weights.get(name)?.tensor()?.detach();
        weights.wrap(name, WeightQuant::Statsq.untrained(bits, None, &w)?)?;
        let got = measure(&weights.folded()?)?;
        let (drop, loss_rise) = (base.top1 - got.top1, got.loss - base.loss);
        layers.push(Sensitivity { name: name.clone(), bits, top1: got.top1, drop, loss_rise });
        progress.tick(i + 1, &format!("{name}: {drop:+.2} points lost"));
    }
    progress.finish();
    layers.sort_by(|a, b| {
        b.drop.total_cmp(&a.drop).then(b.loss_rise.total_cmp(&a.loss_rise)).then(a.name.cmp(&b.name))
    });
    Ok(json!({
        "command": "inspect",
        "bits": bits,
        "base_top1": base.top1,
        "samples": base.samples,
        "layers": layers,
    }))
}
