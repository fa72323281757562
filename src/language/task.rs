//! What a language model learns: the next token, where the batch says so, and what a teacher would say.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use candle_core::{Device, Tensor, Var};

use crate::data::text::TextBatch;
use crate::kernels::tape::{self, Tape};
use crate::models::{Llama, Places};
use crate::train::{Figure, Pass, Task};
use crate::weights::Param;
use crate::{kernels, Error, Result};

/// Rows of text with the number that addresses what is random in their pass.
#[derive(Debug)]
pub struct Rows {
    /// The tokens.
    pub batch: TextBatch,
    /// Epoch and row: a function of where the run stands, so that a resumed one repeats it.
    pub number: u64,
}

/// Next-token prediction.
#[derive(Debug)]
pub struct Predict {
    /// The student.
    pub model: Llama,
    /// A frozen teacher, whose probabilities are learned beside the text.
    pub teacher: Option<Llama>,
    /// Whether blocks keep their inputs only and are computed again going backward.
    pub checkpointing: bool,
    /// The number that dropout draws by, shared with the adapters.
    pub pass: Arc<AtomicU64>,
}

/// Logits held at a time, in elements: more tokens than fit are taken in parts.
const MOST_LOGITS: usize = 1 << 25;
/// The same under a frozen output embedding: each part of a trained one costs a pass over its gradient.
const FEW_LOGITS: usize = 1 << 22;

/// The positions that have a target, and the targets.
pub(super) fn targets(batch: &TextBatch) -> (Vec<u32>, Vec<u32>) {
    let with = batch.targets.iter().enumerate().filter(|(_, target)| **target != u32::MAX);
    with.map(|(at, target)| (at as u32, *target)).unzip()
}

/// Where the tokens of a batch stand.
pub(super) fn places(batch: &TextBatch) -> Places {
    Places::new(batch.batch, batch.len, &batch.positions, &batch.segments)
}

/// Gradients summed over the parts of a pass.
struct Sums<'a> {
    params: &'a [Param],
    grads: Vec<Option<Tensor>>,
}

impl Sums<'_> {
    /// Goes backward from `loss`, adds what reached the parameters and gives what reached `input`.
    fn backward(&mut self, tape: Tape, loss: &Tensor, input: Option<&Var>) -> Result<Option<Tensor>> {
        self.onward(tape, loss, loss.ones_like()?, input)
    }

    /// Goes backward from `y`, whose gradient is known.
    fn onward(
        &mut self,
        tape: Tape,
        y: &Tensor,
        grad: Tensor,
        input: Option<&Var>,
    ) -> Result<Option<Tensor>> {
        let wanted: Vec<&Tensor> =
            self.params.iter().map(|p| p.var.as_tensor()).chain(input.map(Var::as_tensor)).collect();
        let mut found = tape.onward(y, grad, &wanted)?;
        for (sum, param) in self.grads.iter_mut().zip(self.params) {
            let Some(grad) = found.remove(param.var.as_tensor()) else { continue };
            *sum = Some(match sum.take() {
                Some(sum) => (sum + grad)?,
                None => grad,
            });
        }
        Ok(input.and_then(|var| found.remove(var.as_tensor())))
    }
}

impl Predict {
    /// The loss of `hidden [n, C]` against `labels`, and of a teacher's `hidden` where there is one.
    fn loss(&self, hidden: &Tensor, labels: &[u32], teacher: Option<&Tensor>) -> Result<Tensor> {
        let (Some(model), Some(teacher)) = (&self.teacher, teacher) else {
            return self.model.loss(hidden, labels);
        };
        self.model.check_ids(labels)?;
        let logits = self.model.head(hidden)?;
        let ids = Tensor::from_slice(labels, labels.len(), logits.device())?;
        let hard = kernels::cross_entropy(&logits, &ids)?;
        let probs = kernels::softmax(&model.head(teacher)?.detach())?;
        Ok((hard + kernels::soft_cross_entropy(&logits, &probs)?)?)
    }

    fn body(&self, batch: &TextBatch, places: &Places, device: &Device) -> Result<(Tensor, Vec<Tensor>)> {
        let mut x = self.model.embed(&batch.tokens, places, device)?;
        let mut inputs = Vec::new();
        for i in 0..self.model.config().layers {
            if self.checkpointing {
                x = x.detach();
                inputs.push(x.clone());
            }
            x = self.model.block(i, &x, places, None)?;
        }
        Ok((x, inputs))
    }

    fn check(&self, value: Figure, batch: &TextBatch, places: &Places, device: &Device) -> Result<Figure> {
        if !value.known_broken() {
            return Ok(value);
        }
        let value = value.read()?;
        let place = self.model.not_finite(&batch.tokens, places, device)?;
        let place = place.map(|layer| format!("; first seen behind {layer}")).unwrap_or_default();
        Err(Error::NotFinite(format!("the loss is {value}, expected a finite number{place}")))
    }
}

/// Rows `at` of `x [batch, len, C]` as `[n, C]`.
fn rows_of(x: &Tensor, at: &[u32]) -> Result<Tensor> {
    let flat = x.flatten(0, 1)?;
    Ok(kernels::pick_rows(&flat, &Tensor::from_slice(at, at.len(), x.device())?)?)
}

impl Task for Predict {
    type Batch = Rows;

    fn learn(&self, rows: &Rows, params: &[Param], device: &Device) -> Result<Pass> {
        let batch = &rows.batch;
        self.pass.store(rows.number, Ordering::Relaxed);
        let places = places(batch);
        let (at, labels) = targets(batch);
        if labels.is_empty() {
            return Err(Error::Run("a batch without a token to learn".into()));
        }
        let teacher = match &self.teacher {
            Some(teacher) => Some(rows_of(&teacher.hidden(&batch.tokens, &places, device)?.detach(), &at)?),
            None => None,
        };
        let mut sums = Sums { params, grads: vec![None; params.len()] };
        let pass = || self.body(batch, &places, device);
        // What is computed again is not written down: the tape would hold it.
        let ((x, inputs), tape) =
            if self.checkpointing { (pass()?, Tape::default()) } else { tape::record(pass)? };
        let most = if self.model.trains_head() { MOST_LOGITS } else { FEW_LOGITS };
        let part = match teacher.is_some() || self.model.holds_logits(&x)? {
            true => (most / self.model.config().vocab.max(1)).max(1),
            false => labels.len(),
        };
        if !self.checkpointing && labels.len() <= part {
            let (loss, tape) = tape.then(|| {
                let hidden = rows_of(&self.model.finish(&x)?, &at)?;
                self.loss(&hidden, &labels, teacher.as_ref())
            })?;
            let value = self.check(Figure::of(&loss)?, batch, &places, device)?;
            drop(x);
            sums.backward(tape, &loss, None)?;
            return Ok(Pass { loss: value, right: Figure::Known(0.0), grads: sums.grads });
        }
        // The output's part first, in pieces, down to the gradient of what the blocks gave.
        let given = Var::from_tensor(&x.detach())?;
        let (mut value, mut grad) = (Figure::Known(0.0), None);
        for from in (0..labels.len()).step_by(part) {
            let count = part.min(labels.len() - from);
            let share = count as f64 / labels.len() as f64;
            let (loss, tape) = tape::record(|| -> Result<Tensor> {
                let hidden = rows_of(&self.model.finish(given.as_tensor())?, &at[from..from + count])?;
                let teacher = teacher.as_ref().map(|t| t.narrow(0, from, count)).transpose()?;
                self.loss(&hidden, &labels[from..from + count], teacher.as_ref())
            })?;
            value = value.plus(&Figure::of(&loss)?, share)?;
            let grad_of_part = loss.ones_like()?.affine(share, 0.0)?;
            let reached = sums.onward(tape, &loss, grad_of_part, Some(&given))?;
            grad = match (grad, reached) {
                (Some(sum), Some(more)) => Some((sum + more)?),
                (sum, more) => sum.or(more),
            };
        }
        let value = self.check(value, batch, &places, device)?;
        drop(given);
        let Some(mut grad) = grad else {
            return Ok(Pass { loss: value, right: Figure::Known(0.0), grads: sums.grads });
        };
        if !self.checkpointing {
            sums.onward(tape, &x, grad, None)?;
            return Ok(Pass { loss: value, right: Figure::Known(0.0), grads: sums.grads });
        }
        drop((x, tape));
        for (i, x) in inputs.iter().enumerate().rev() {
            let input = Var::from_tensor(x)?;
            let (y, tape) = tape::record(|| self.model.block(i, input.as_tensor(), &places, None))?;
            match sums.onward(tape, &y, grad.clone(), Some(&input))? {
                Some(reached) => grad = reached,
                None => return Ok(Pass { loss: value, right: Figure::Known(0.0), grads: sums.grads }),
            }
        }
        let (embedded, tape) = tape::record(|| self.model.embed(&batch.tokens, &places, device))?;
        if embedded.track_op() {
            sums.onward(tape, &embedded, grad, None)?;
        }
        Ok(Pass { loss: value, right: Figure::Known(0.0), grads: sums.grads })
    }

    fn predictions(rows: &Rows) -> usize {
        rows.batch.trained
    }

    fn counted(rows: &Rows) -> usize {
        rows.batch.tokens.len()
    }

    fn samples(rows: &Rows) -> Vec<u32> {
        rows.batch.samples.clone()
    }
}

/// The loss in nats, summed over the targets of a batch, and how many there are.
pub fn batch_loss(model: &Llama, batch: &TextBatch, device: &Device) -> Result<(f64, usize)> {
    let places = places(batch);
    let (at, labels) = targets(batch);
    if labels.is_empty() {
        return Ok((0.0, 0));
    }
    let hidden = model.hidden(&batch.tokens, &places, device)?;
    let part = match model.holds_logits(&hidden)? {
        true => (MOST_LOGITS / model.config().vocab.max(1)).max(1),
        false => labels.len(),
    };
    let mut sum = 0f64;
    for from in (0..labels.len()).step_by(part) {
        let count = part.min(labels.len() - from);
        let loss = model.loss(&rows_of(&hidden, &at[from..from + count])?, &labels[from..from + count])?;
        sum += f64::from(loss.to_scalar::<f32>()?) * count as f64;
    }
    Ok((sum, labels.len()))
}
