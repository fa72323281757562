//! What a recipe would do, without doing it: the tensors, the phases, the memory.

use candle_core::Device;

use super::start::{open_data, prepare};
use super::{qkr, targets};
use crate::data::Dataset;
use crate::kernels::{Arithmetic, Groups};
use crate::models::attention::with_products;
use crate::models::{SwinConfig, VisionConfig, VitConfig};
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
    /// Of a CUDA device the estimated peak of what is in use there, in bytes, without the driver's own.
    pub device_memory: Option<usize>,
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
            Some(target) => {
                let transform = &recipe.transform[target.transform];
                let grid = transform.kind.grid(target.bits)?;
                let cols = count / shape[0];
                let kind = match transform.kind {
                    WeightQuant::Statsq => "statsq",
                    WeightQuant::Lsq => "lsq",
                };
                let groups = Groups::new(cols, transform.group);
                let mut what = format!("{kind}, {} bits", target.bits);
                if let Some(group) = groups.group() {
                    what += &format!(", groups of {group}");
                }
                (what, shape[0] * (grid.row_bytes(cols) + 4 * groups.count()))
            }
            None => ("f32".to_string(), 4 * count),
        };
        tensors.push((name, shape, what, bytes));
    }
    let samples = dataset.as_ref().map(|d| d.train.len()).unwrap_or(0);
    let runs = recipe.phase.iter().filter(|p| p.when == When::Always || start.untrained);
    let phases = runs.map(|p| (p.name.clone(), phase_steps(recipe, p, samples))).collect();
    let params = start.config.params();
    let codes = tensors.iter().filter(|t| chosen.contains_key(&t.0));
    let codes = codes.map(|t| t.1.iter().product::<usize>()).sum();
    let held = qkr::held(&start.config, &weights);
    let products: Vec<bool> = places.iter().map(|place| held.contains(place)).collect();
    // The product of each, what it is quantized to, and its gradient.
    let made: usize = held.iter().map(|place| 3 * 4 * place.heads * place.width * place.width).sum();
    // Activations are halves where a CUDA device multiplies halves; weights are then rounded to them, too.
    let half = device.is_cuda() && recipe.train.products == Arithmetic::Bf16;
    let rounded = if half { 2 * params } else { 0 };
    let tensors_bytes =
        tensor_estimate(recipe, &start.config, (params, codes), &products, if half { 2 } else { 4 })
            + made
            + rounded;
    let data = data_estimate(recipe, &start.config, dataset.as_ref())?;
    let (memory, device_memory) = match device.is_cuda() {
        // The checkpoint is read and written by way of the host.
        true => (PROGRAM + 8 * params + data, Some(tensors_bytes)),
        // Blocks of the allocator that do not fit the next size asked for: seen to be about a seventh.
        false => (PROGRAM + (tensors_bytes - made) * 8 / 7 + made + data, None),
    };
    let mut notes: Vec<String> = dataset.iter().flat_map(|d| d.notes.clone()).collect();
    notes.extend(start.notes);
    let bits = |name: &str| chosen.get(name).map(|target| target.bits);
    notes.extend(qkr::notes(&qkr::held(&start.config, &weights), bits)?);
    if samples > 0 {
        notes.push(format!("{samples} training samples, {} steps an epoch", epoch_steps(recipe, samples)));
    }
    Ok(Plan { tensors, params, phases, memory, device_memory, notes })
}

/// The program without tensors, in bytes.
const PROGRAM: usize = 72 << 20;

/// Tensors of a run at its peak, in bytes: parameters with their gradients, moments and teacher, what is kept of
/// each code, and the activations, of `width` bytes each, that a forward pass of one batch leaves behind for its
/// backward pass.
fn tensor_estimate(
    recipe: &Recipe,
    config: &VisionConfig,
    (params, codes): (usize, usize),
    products: &[bool],
    width: usize,
) -> usize {
    let quantized = recipe.activation.bits != 32;
    let of = |block: usize| Kept { quantized, product: products.get(block).copied().unwrap_or(false) };
    let values = match config {
        VisionConfig::Vit(vit) => vit_activations(vit, of),
        VisionConfig::Swin(swin) => swin_activations(swin, of),
        // Refused before; the maps all the same, and the gradients of two.
        VisionConfig::Conv(conv) => {
            let maps = (0..conv.widths.len()).map(|layer| conv.map(layer)).map(|(h, w, c)| 2 * h * w * c);
            maps.sum::<usize>() + 2 * conv.features()
        }
        // Refused before, too; moments of each unit before and after its rectifier, and of the input.
        VisionConfig::Binary(binary) => {
            12 * binary.shapes().iter().map(|(_, shape)| shape[0] + shape[1]).sum::<usize>()
        }
    };
    let activations = width * recipe.train.batch_size * values;
    let average = if recipe.train.ema > 0.0 { 4 } else { 0 };
    let state = params * (4 * 4 + recipe.optimizer.state_bytes() + average);
    // The tracks of the codes; while annealed, what is free and what was there before the step.
    let calm = if recipe.phase.iter().any(|p| p.calm.is_some()) { 8 } else { 0 };
    let tracks = codes * (12 + calm);
    state + activations + tracks
}

/// What decides how much a block keeps.
#[derive(Clone, Copy)]
struct Kept {
    /// Activations are quantized.
    quantized: bool,
    /// Query and key are one weight.
    product: bool,
}

/// Values that one block leaves in memory for a sample of `tokens` tokens of `c` channels, each of which
/// attends to `keys` tokens, with `m` channels inside the MLP.
fn block_activations(tokens: usize, c: usize, m: usize, heads: usize, keys: usize, kept: Kept) -> usize {
    // Both norms, v, mix, projection, two residuals, MLP in, GELU, MLP out; query and key or their product.
    let mut per_token = 8 * c + 2 * m + if kept.product { heads * c } else { 2 * c };
    let mut probabilities = heads * keys;
    if kept.quantized {
        // Each tap keeps what it quantized and, where shifted, the sum with the shift behind it: input, v,
        // mix, MLP in, GELU. Query has both, key the first; the product what is before and behind.
        per_token += 8 * c + 2 * m + if kept.product { 2 * heads * c } else { 3 * c };
        probabilities *= 2;
    }
    tokens * (per_token + probabilities)
}

/// Values that a sample leaves in memory between forward and backward, and those of one block's gradients
/// beside them.
fn vit_activations(config: &VitConfig, kept: impl Fn(usize) -> Kept) -> usize {
    let (tokens, c) = (config.tokens(), config.hidden);
    let block = |i| block_activations(tokens, c, config.mlp, config.heads, tokens, kept(i));
    let largest = (0..config.layers).map(block).max().unwrap_or(0);
    (0..config.layers).map(block).sum::<usize>() + tokens * 4 * c + largest
}

fn swin_activations(config: &SwinConfig, kept: impl Fn(usize) -> Kept) -> usize {
    let (mut sum, mut largest, mut at) = (0, 0, 0);
    for stage in config.stages() {
        let windows = stage.windows(0);
        let (c, patches) = (stage.channels, windows.count() * windows.patches());
        for _ in 0..stage.blocks {
            // Cutting into windows and back: two copies each.
            let block = block_activations(patches, c, stage.mlp, stage.heads, windows.patches(), kept(at))
                + patches * 4 * c;
            sum += block;
            largest = largest.max(block);
            at += 1;
        }
        // Merging: neighbours, norm, reduction, and what its tap keeps.
        sum += patches * (if kept(at).quantized { 5 } else { 3 }) * c;
    }
    sum + largest
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
