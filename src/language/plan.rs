//! What a run over text would do, without doing it: what each tensor becomes, how much is trained, how much
//! memory that takes.

use candle_core::Device;

use super::adapt::{packable, rank_of};
use super::choice::choice;
use super::{open, open_text, pack, source};
use crate::adapter::Modules;
use crate::models::LlamaConfig;
use crate::quantize::targets;
use crate::recipe::{Recipe, When};
use crate::train::{phase_steps, Quiet};
use crate::weights::{Centering, Grid};
use crate::{Error, Result};

/// A plan.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Name, shape and fate of every tensor.
    pub tensors: Vec<(String, Vec<usize>, String)>,
    /// Parameters of the model.
    pub params: usize,
    /// Parameters that are trained.
    pub trainable: usize,
    /// Names and steps of the phases.
    pub phases: Vec<(String, usize)>,
    /// The memory that training takes at its peak, in bytes, pages of mapped files apart.
    pub memory: usize,
    /// Of a CUDA device the peak of what is in use there, in bytes, without the driver's own.
    pub device_memory: Option<usize>,
    /// What is worth a line.
    pub notes: Vec<String>,
}

/// Program, tables, tokenizer and text apart from tensors.
const FIXED: usize = 60 << 20;

/// Of what is asked for, a tenth more: the allocator keeps what was freed, and not every size is asked for again.
const SLACK: usize = 10;

/// Bytes of activations in an evaluation: a block of one batch, and a part of the logits twice.
fn evaluation(recipe: &Recipe, config: &LlamaConfig, seq_len: usize, width: usize) -> usize {
    let rows = recipe.train.eval_batch_size * seq_len;
    rows * (2 * config.hidden + 2 * config.mlp) * width + 2 * 4 * (rows * config.vocab).min(1 << 25)
}

/// Floats that a block holds a token while it goes forward, its graph kept.
fn block_floats(config: &LlamaConfig) -> usize {
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    // Two norms, two sums, query and key each before and after turning, value, the attention's result and
    // its product, gate, up, their product and its.
    7 * config.hidden + 3 * q + 4 * kv + 3 * config.mlp
}

/// Makes the plan of a recipe for a language model.
pub fn plan(recipe: &Recipe, device: &Device) -> Result<Plan> {
    let start = open(recipe, device)?;
    let data = open_text(recipe, &start)?;
    let source = source(recipe)?;
    // Of activations, which are f32 on the CPU whatever the weights are held in.
    let width = if device.is_cpu() { 4 } else { source.dtype.dtype().size_in_bytes() };
    let config = &start.config;
    let shapes = config.shapes();
    let modules = Modules::of_shapes(&start.json, &shapes);
    let mut notes: Vec<String> = start.notes.iter().chain(&data.notes).cloned().collect();
    let packed = if recipe.base.is_some() { packable(&start) } else { Vec::new() };
    let (mut tensors, mut held, mut trainable) = (Vec::new(), 0usize, 0usize);
    let mut adapted: Vec<(String, usize)> = Vec::new();
    let choice = choice(recipe, &start, None, &Quiet)?;
    let slot = choice.as_ref().and_then(|c| c.slot.as_ref()).or(recipe.adapter.as_ref());
    // With [kappa] the chosen ones alone, without it every one.
    let tuned = |name: &str| match (&choice, &recipe.kappa) {
        (Some(choice), Some(config)) => choice.trains(config, name),
        _ => true,
    };
    if let Some(choice) = &choice {
        notes.push(format!(
            "kappa: {} of {} matrices, {} parameters",
            choice.selection.selected().count(),
            choice.selection.tensors.len(),
            choice.selection.selected_params
        ));
    }
    if let Some(slot) = slot {
        let (rank, note) = rank_of(slot, &modules)?;
        notes.extend(note);
        for (path, (out, inputs)) in slot.peft(rank, &start.name).targets(&modules)? {
            let count = match slot.kind {
                crate::recipe::AdapterKind::Bone | crate::recipe::AdapterKind::Miss => rank * out,
                crate::recipe::AdapterKind::Mini => rank * slot.mini_rank.unwrap_or(rank),
                crate::recipe::AdapterKind::Dora => rank * (out + inputs) + out,
                _ => rank * (out + inputs),
            };
            adapted.push((format!("{path}.weight"), count));
        }
    }
    let quantized = if recipe.adapts() { Default::default() } else { targets(recipe, &start.weights)? };
    let trains = pack::steps(recipe, data.train.rows()) > 0;
    for (name, shape) in &shapes {
        let count: usize = shape.iter().product();
        let mut what = Vec::new();
        // Rows of an embedding that is no output's too are read where they lie.
        let on_disk = name == "model.embed_tokens.weight" && !config.tied && recipe.adapts();
        if let (Some(base), true) = (recipe.base, packed.contains(name)) {
            let grid =
                Grid::new(base.bits, if base.bits == 2 { Centering::MidRise } else { Centering::Signed })?;
            let (rows, cols) = (shape[0], count / shape[0].max(1));
            held += rows * grid.row_bytes(cols) + 4 * rows * cols.div_ceil(base.group_size);
            what.push(format!("{} bits, groups of {}", base.bits, base.group_size));
        } else if let Some(target) = quantized.get(name) {
            what.push(format!("{} bits", target.bits));
            // Trained beside a frozen teacher; its rounded form is made in every pass.
            held += if trains { 12 * count } else { 0 };
            trainable += if trains { count } else { 0 };
        } else if recipe.adapts() && recipe.adapter.is_none() && tuned(name) || (!recipe.adapts() && trains) {
            trainable += count;
            held += if recipe.adapts() { 4 * count } else { 8 * count };
            what.push("trained".into());
        } else if !on_disk {
            held += width * count;
        }
        if let Some((_, count)) = adapted.iter().find(|(adapted, _)| adapted == name) {
            trainable += count;
            held += 4 * count;
            what.push(format!("adapter, {count} parameters"));
        }
        if what.is_empty() {
            what.push("frozen".into());
        }
        tensors.push((name.clone(), shape.clone(), what.join(", ")));
    }
    if let (Some(slot), true) = (&recipe.adapter, adapted.is_empty()) {
        return Err(Error::usage(format!("adapter.targets = {:?}: found no module", slot.targets)));
    }
    let samples = data.train.rows();
    let runs = |when: When| when == When::Always || source.new.is_some();
    let phases: Vec<(String, usize)> = recipe
        .phase
        .iter()
        .map(|p| (p.name.clone(), if runs(p.when) { phase_steps(recipe, p, samples) } else { 0 }))
        .collect();
    let seq_len = recipe.text.as_ref().map_or(256, |text| text.seq_len);
    let rows = recipe.train.batch_size * seq_len;
    // Gradients and the optimizer's state, and once more the state as a checkpoint is written.
    let state = recipe.optimizer.state_bytes();
    let steady = FIXED + held + trainable * (4 + 2 * state);
    let evaluated = evaluation(recipe, config, seq_len, width);
    let peak = steady + activations(recipe, config, rows, width).max(evaluated);
    let (memory, device_memory) = match device.is_cuda() {
        true => (FIXED + held, Some(peak - FIXED)),
        false => (peak + peak / SLACK, None),
    };
    Ok(Plan { tensors, params: config.params(), trainable, phases, memory, device_memory, notes })
}

/// Bytes of activations at the peak of a step over `rows` tokens.
fn activations(recipe: &Recipe, config: &LlamaConfig, rows: usize, width: usize) -> usize {
    // Logits, what softmax makes of them and their gradient.
    let head = 3 * rows * config.vocab * 4;
    let block = rows * block_floats(config) * width;
    let inputs = (config.layers + 1) * rows * config.hidden * width;
    match recipe.train.checkpointing {
        // A block's graph with its gradients, or the output's, whichever is larger.
        true => inputs + head.max(2 * block),
        false => config.layers * block + head,
    }
}
