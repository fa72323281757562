//! What a recipe would do, without doing it: the tensors, the phases, the memory.

use candle_core::Device;

use super::start::{open_data, prepare};
use super::{qkr, targets};
use crate::data::Dataset;
use crate::models::attention::with_products;
use crate::models::{VisionConfig, VitConfig};
use crate::recipe::{Recipe, When};
use crate::train::{epoch_steps, phase_steps};
use crate::transform::WeightQuant;
use crate::Result;

/// What a recipe would do, without doing it.
#[derive(Debug)]
pub struct Plan {
    /// Every tensor: name, shape, what becomes of it, bytes in the packed file.
    pub tensors: Vec<(String, Vec<usize>, String, usize)>,
    /// Parameters of the model.
    pub params: usize,
    /// Phases that would run: name and steps.
    pub phases: Vec<(String, usize)>,
    /// Estimated peak memory in bytes.
    pub memory: usize,
    /// What is worth a line.
    pub notes: Vec<String>,
}

/// Plans a run.
pub fn plan(recipe: &Recipe, device: &Device) -> Result<Plan> {
    let (start, dataset) = prepare(recipe, open_data(recipe)?, device)?;
    let mut chosen = targets(recipe, &start.weights)?;
    let mut weights = start.weights.clone();
    let trained = start.quantizers.is_some();
    qkr::reparameterize(recipe, &start.config, trained, &mut weights, &mut chosen)?;
    let places = start.config.attentions();
    let mut tensors = Vec::new();
    for (name, shape) in with_products(start.config.shapes(), &places, &weights) {
        let count: usize = shape.iter().product();
        let (what, bytes) = match chosen.get(&name) {
            Some(index) => {
                let transform = &recipe.transform[*index];
                let grid = transform.kind.grid(transform.bits)?;
                let cols = count / shape[0];
                let kind = match transform.kind {
                    WeightQuant::Statsq => "statsq",
                    WeightQuant::Lsq => "lsq",
                };
                (format!("{kind}, {} bits", transform.bits), shape[0] * (grid.row_bytes(cols) + 4))
            }
            None => ("f32".to_string(), 4 * count),
        };
        tensors.push((name, shape, what, bytes));
    }
    let samples = dataset.as_ref().map(|d| d.train.len()).unwrap_or(0);
    let runs = recipe.phase.iter().filter(|p| p.when == When::Always || start.untrained);
    let phases = runs.map(|p| (p.name.clone(), phase_steps(recipe, p, samples))).collect();
    let params = tensors.iter().map(|t| t.1.iter().product::<usize>()).sum();
    let memory = memory_estimate(recipe, &start.config, params)
        + data_estimate(recipe, &start.config, dataset.as_ref())?;
    let mut notes: Vec<String> = dataset.iter().flat_map(|d| d.notes.clone()).collect();
    notes.extend(start.notes);
    let bits = |name: &str| chosen.get(name).map(|index| recipe.transform[*index].bits);
    notes.extend(qkr::notes(&qkr::held(&start.config, &weights), bits)?);
    if samples > 0 {
        notes.push(format!("{samples} training samples, {} steps an epoch", epoch_steps(recipe, samples)));
    }
    Ok(Plan { tensors, params, phases, memory, notes })
}

/// Peak memory of a run, in bytes: parameters with their gradients, moments and teacher, and the
/// activations that a forward pass of one batch leaves behind for its backward pass.
fn memory_estimate(recipe: &Recipe, config: &VisionConfig, params: usize) -> usize {
    let quantized = recipe.activation.bits != 32;
    let values = match config {
        VisionConfig::Vit(vit) => vit_activations(vit, quantized),
    };
    let activations = 4 * recipe.train.batch_size * values;
    let state = params * (4 * 4 + recipe.optimizer.state_bytes());
    let program = 48 << 20;
    // Blocks of the allocator that do not fit the next size asked for: seen to be about a seventh.
    program + (state + activations) * 8 / 7
}

/// Values that a sample leaves in memory between forward and backward.
fn vit_activations(config: &VitConfig, quantized: bool) -> usize {
    let (tokens, c, m) = (config.tokens(), config.hidden, config.mlp);
    // Per block: both norms, q, k, v, mix, projection, two residuals, MLP in, GELU, MLP out.
    let mut per_token = 10 * c + 2 * m;
    let mut probabilities = config.heads * tokens;
    if quantized {
        // Each tap keeps what it quantized and, where shifted, the sum with the shift.
        per_token += 2 * (6 * c + m);
        probabilities *= 2;
    }
    let sample = tokens * (config.layers * (per_token + probabilities) + 4 * c);
    // Backward holds the gradients of one block beside what forward left.
    sample + tokens * (per_token + probabilities)
}

/// Memory of the decoded images and of the batches that are prepared ahead, in bytes.
fn data_estimate(recipe: &Recipe, config: &VisionConfig, dataset: Option<&Dataset>) -> Result<usize> {
    let Some(dataset) = dataset else { return Ok(0) };
    let mut bytes = 0;
    for source in [&dataset.train, &dataset.eval] {
        if !source.is_empty() {
            bytes += source.len() * source.image(0)?.pixels.len();
        }
    }
    // Beyond this, image files are read when they are asked for.
    let decoded = bytes.min(1 << 30);
    let (height, width) = config.image_size();
    let sample = 4 * config.channels() * height * width;
    let ahead = 2 * rayon::current_num_threads().clamp(1, 4) + 1;
    Ok(decoded + ahead * sample * recipe.train.batch_size.max(recipe.train.eval_batch_size))
}
