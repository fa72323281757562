//! What a run over several tasks would do, without doing it.

use candle_core::Device;

use super::road::{config, open};
use crate::recipe::{Protection, Recipe};
use crate::train::phase_steps;
use crate::Result;

/// A task of a plan.
#[derive(Clone, Debug)]
pub struct PlannedTask {
    /// Its name.
    pub name: String,
    /// Training images.
    pub train: usize,
    /// Evaluation images.
    pub eval: usize,
    /// Steps.
    pub steps: usize,
}

/// A plan.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The tasks, in order.
    pub tasks: Vec<PlannedTask>,
    /// The outputs of the model.
    pub classes: Vec<String>,
    /// Parameters of the model.
    pub params: usize,
    /// The memory that training takes at its peak, in bytes, a rough figure.
    pub memory: usize,
    /// Of a CUDA device the peak of what is in use there, in bytes, without the driver's own.
    pub device_memory: Option<usize>,
    /// Bytes that the method keeps between tasks, the model apart.
    pub state: usize,
}

/// Program, tables and the loader's batches.
const FIXED: usize = 60 << 20;

/// Makes the plan of a recipe.
pub fn plan(recipe: &Recipe, device: &Device) -> Result<Plan> {
    let continual = config(recipe)?;
    let (tasks, start) = open(recipe, continual, device)?;
    let params = start.config.params();
    let planned = tasks.list.iter().enumerate().map(|(i, task)| {
        let phase = if recipe.phase.len() == 1 { &recipe.phase[0] } else { &recipe.phase[i] };
        let train = task.train.len();
        PlannedTask {
            name: task.name.clone(),
            train,
            eval: task.eval.len(),
            steps: phase_steps(recipe, phase, train),
        }
    });
    let planned: Vec<PlannedTask> = planned.collect();
    let (height, width) = start.config.image_size();
    let pixels = height * width * start.config.channels();
    let earlier = planned.len().saturating_sub(1);
    let anchors = if continual.ewc.online.is_some() { 1 } else { earlier };
    let state = match continual.method {
        Protection::Finetune | Protection::Kappatune => 0,
        Protection::Field => 4 * params,
        Protection::Classp => 0,
        Protection::Ewc => 8 * params * anchors,
        Protection::Replay => {
            planned.iter().take(earlier).map(|t| t.train.min(continual.replay.samples) * (pixels + 4)).sum()
        }
    };
    let remembers = recipe.optimizer.remembers() && continual.method != Protection::Finetune;
    let state = state + if remembers { 4 * params } else { 0 };
    // Weights, gradients, the rule's state, and of every image of a batch some hundred times its floats.
    let trained = params * (8 + recipe.optimizer.state_bytes());
    let tensors = trained + state + recipe.train.batch_size * pixels * 4 * 100;
    let (memory, device_memory) = match device.is_cuda() {
        true => (FIXED + 8 * params, Some(tensors)),
        false => (FIXED + tensors, None),
    };
    Ok(Plan { tasks: planned, classes: tasks.classes, params, memory, device_memory, state })
}
