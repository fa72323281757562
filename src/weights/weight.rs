//! A named weight is an expression: stored, or computed from other weights.

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};

use super::checkpoint::Checkpoint;
use super::packed::{Grid, Packed, Quantized};
use super::tap::GridRule;
use crate::{kernels, Error, Result};

/// What a trainable is for, where the trainer must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A weight, a bias, a shift: its gradient is the mean over the samples of a step.
    Plain,
    /// The step of an activation quantizer. LSQ scales its gradient by one over the root of the number
    /// of elements that share it, the samples of the forward pass among them (ofq.md 2.1), so a step
    /// that is split into several passes has to put the scale right.
    ActivationStep,
}

/// A rule that makes a weight of other weights, or a quantized activation of an activation.
///
/// It is immutable: its `Var`s are its only state. `apply` alone makes a method right everywhere,
/// the other readings make it cheap or small.
pub trait Transform: Send + Sync + Debug {
    /// The name that recipes and files use.
    fn kind(&self) -> &'static str;

    /// The equation: the dense result, differentiable in the inputs and the transform's own `Var`s.
    fn apply(&self, inputs: &[Tensor]) -> Result<Tensor>;

    /// `x [.., in]` times the transposed result, `[.., out]`.
    fn matmul(&self, x: &Tensor, inputs: &[Weight]) -> Result<Tensor> {
        let inputs = inputs.iter().map(Weight::tensor).collect::<Result<Vec<_>>>()?;
        Ok(kernels::linear(x, &in_format_of(x, &self.apply(&inputs)?)?, None)?)
    }

    /// Rows of the result, `[.., cols]` for `ids` of any shape.
    fn rows(&self, ids: &Tensor, inputs: &[Weight]) -> Result<Tensor> {
        let inputs = inputs.iter().map(Weight::tensor).collect::<Result<Vec<_>>>()?;
        gather(&self.apply(&inputs)?, ids)
    }

    /// Its trainables: what to append to the weight's name, the `Var`, its role.
    fn params(&self) -> Vec<(&'static str, Var, Role)> {
        Vec::new()
    }

    /// Its stored tensors, trainable or not, under the same suffixes.
    fn tensors(&self) -> Vec<(&'static str, Tensor)> {
        self.params().into_iter().map(|(suffix, var, _)| (suffix, var.as_detached_tensor())).collect()
    }

    /// The same rule without trainables, for evaluation.
    fn frozen(&self) -> Result<Arc<dyn Transform>>;

    /// What to append to a weight's name for the trainables of each input; one input: nothing.
    fn parts(&self) -> &'static [&'static str] {
        &[""]
    }

    /// Which entries are free to move, 1 or 0 in the shape of the only input; `None`: all. The trainer
    /// holds the others still against momentum and decay where the input is a trainable.
    fn gate(&self, _inputs: &[Tensor]) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// The same quantizer, annealed to a band of so many steps around its thresholds, or no longer
    /// (`None`); `None` where it is no quantizer that can be.
    fn calmed(&self, _band: Option<f64>) -> Option<Arc<dyn Transform>> {
        None
    }

    /// The grid that the result lies on, where it lies on one.
    fn grid(&self) -> Option<Grid> {
        None
    }

    /// Codes and steps where the result lies on a grid; `None` where it does not.
    fn quantize(&self, _inputs: &[Tensor]) -> Result<Option<Quantized>> {
        Ok(None)
    }

    /// The parts of a frozen activation quantizer on a grid, for those who compute on its codes; none where
    /// the rule is another, or has trainables.
    fn grid_rule(&self) -> Result<Option<GridRule>> {
        Ok(None)
    }

    /// What an activation quantizer adds to its dequantized codes, along the last axis.
    fn shift_out(&self) -> Option<Tensor> {
        None
    }

    /// How a file describes an activation quantizer: bits, levels, axis.
    fn describe(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
}

/// The forms of a weight.
#[derive(Debug)]
pub enum Expr {
    /// A frozen dense tensor.
    Dense(Tensor),
    /// A frozen tensor that is still in its file and read when asked for.
    Stored {
        /// The file.
        checkpoint: Arc<Checkpoint>,
        /// The name in the file.
        name: String,
        /// Where to read it to.
        device: Device,
    },
    /// A trainable tensor.
    Latent(Var),
    /// Frozen codes with their steps.
    Packed(Packed),
    /// A rule over other weights.
    Node {
        /// The rule.
        transform: Arc<dyn Transform>,
        /// What it is applied to.
        inputs: Vec<Weight>,
    },
}

/// The entries of a weight that annealing leaves free.
#[derive(Clone, Debug)]
pub struct Gate {
    /// 1 where the weight may move, 0 where not.
    pub free: Tensor,
    /// Whether what is not free can be held still: a trainable of its own. The product of two trainables
    /// is not; only its gradient can be masked.
    pub held: bool,
}

/// A weight: cheap to clone, shared by the store and the model.
#[derive(Clone, Debug)]
pub struct Weight(Arc<Expr>);

impl From<Expr> for Weight {
    fn from(expr: Expr) -> Self {
        Weight(Arc::new(expr))
    }
}

impl Weight {
    /// A frozen dense weight.
    pub fn dense(tensor: Tensor) -> Self {
        Expr::Dense(tensor).into()
    }

    /// A trainable weight that starts from `tensor` (copied).
    pub fn latent(tensor: &Tensor) -> Result<Self> {
        Ok(Expr::Latent(Var::from_tensor(&tensor.detach().copy()?)?).into())
    }

    /// `transform` applied to this weight.
    pub fn wrap(&self, transform: Arc<dyn Transform>) -> Self {
        Expr::Node { transform, inputs: vec![self.clone()] }.into()
    }

    /// The expression itself.
    pub fn expr(&self) -> &Expr {
        &self.0
    }

    /// First reading: the dense matrix `[out, in]` (or any other shape), differentiable.
    pub fn tensor(&self) -> Result<Tensor> {
        match self.expr() {
            Expr::Dense(tensor) => Ok(tensor.clone()),
            Expr::Stored { checkpoint, name, device } => checkpoint.tensor(name, device),
            Expr::Latent(var) => Ok(var.as_tensor().clone()),
            Expr::Packed(packed) => packed.tensor(),
            Expr::Node { transform, inputs } => {
                let inputs = inputs.iter().map(Weight::tensor).collect::<Result<Vec<_>>>()?;
                transform.apply(&inputs)
            }
        }
    }

    /// Second reading: `x [.., in]` times the transposed weight, `[.., out]`, without building the
    /// matrix where a kernel avoids it and without a gradient for a frozen one.
    pub fn matmul(&self, x: &Tensor) -> Result<Tensor> {
        match self.expr() {
            Expr::Dense(w) => frozen(x, w),
            Expr::Stored { .. } => frozen(x, &self.tensor()?),
            Expr::Latent(w) => Ok(kernels::linear(x, &in_format_of(x, w.as_tensor())?, None)?),
            Expr::Packed(packed) if kernels::rounds_activations() && !x.track_op() => {
                Ok(kernels::packed_matmul_int8(x, packed.rows())?)
            }
            Expr::Packed(packed) => Ok(kernels::packed_matmul(x, packed.rows())?),
            Expr::Node { transform, inputs } => transform.matmul(x, inputs),
        }
    }

    /// Third reading: the rows `ids` of a table `[rows, cols]`, `[.., cols]` for `ids` (u32) of any shape, on the CPU or
    /// the table's device; a frozen table takes no gradient, and of a packed one only these rows are unpacked. An id out
    /// of range is an error, but that a packed table on another device gives NaN for it where the ids are there too.
    pub fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        match self.expr() {
            Expr::Dense(table) => gather(&table.detach(), ids),
            Expr::Stored { checkpoint, name, device }
                if checkpoint.shape(name).is_some_and(|s| s.len() == 2) =>
            {
                let rows = checkpoint.shape(name).and_then(|s| s.first().copied()).unwrap_or(0);
                let (ids, list) = checked(ids, rows)?;
                let picked = checkpoint.rows(name, &list, device)?;
                let cols = picked.dim(1)?;
                Ok(picked.reshape([ids.dims(), &[cols]].concat())?)
            }
            Expr::Stored { .. } => gather(&self.tensor()?, ids),
            Expr::Latent(table) => gather(table.as_tensor(), ids),
            Expr::Packed(packed) if packed.shape().len() == 2 => {
                if ids.device().is_cpu() {
                    checked(ids, packed.rows().rows())?;
                }
                Ok(kernels::packed_rows(ids, packed.rows(), packed.device())?)
            }
            Expr::Packed(packed) => gather(&packed.tensor()?, ids),
            Expr::Node { transform, inputs } => transform.rows(ids, inputs),
        }
    }

    /// Where its elements lie, or are read to.
    pub fn device(&self) -> Device {
        match self.expr() {
            Expr::Dense(tensor) => tensor.device().clone(),
            Expr::Stored { device, .. } => device.clone(),
            Expr::Latent(var) => var.device().clone(),
            Expr::Packed(packed) => packed.device().clone(),
            Expr::Node { inputs, .. } => inputs.first().map_or(Device::Cpu, Weight::device),
        }
    }

    /// The weight's shape.
    pub fn shape(&self) -> Result<Vec<usize>> {
        match self.expr() {
            Expr::Packed(packed) => Ok(packed.shape().to_vec()),
            Expr::Stored { checkpoint, name, .. } if checkpoint.shape(name).is_some() => {
                Ok(checkpoint.shape(name).unwrap_or_default().to_vec())
            }
            // A rule over one weight, a quantizer or an adapter, keeps its shape.
            Expr::Node { inputs, .. } if inputs.len() == 1 => inputs[0].shape(),
            _ => Ok(self.tensor()?.dims().to_vec()),
        }
    }

    /// The grid that the weight lies on, where it lies on one.
    pub fn grid(&self) -> Option<Grid> {
        match self.expr() {
            Expr::Packed(packed) => Some(packed.grid()),
            Expr::Node { transform, .. } => transform.grid(),
            _ => None,
        }
    }

    /// Codes and steps where the outermost rule puts the weight on a grid.
    pub fn quantize(&self) -> Result<Option<Quantized>> {
        match self.expr() {
            Expr::Node { transform, inputs } => {
                let inputs = inputs.iter().map(|w| Ok(w.tensor()?.detach())).collect::<Result<Vec<_>>>()?;
                transform.quantize(&inputs)
            }
            _ => Ok(None),
        }
    }

    /// Which entries of the trainable behind its quantizer are free to move, where not all are.
    pub fn gate(&self) -> Result<Option<Gate>> {
        let Expr::Node { transform, inputs } = self.expr() else { return Ok(None) };
        let [input] = inputs.as_slice() else { return Ok(None) };
        let Some(free) = transform.gate(&[input.tensor()?.detach()])? else { return Ok(None) };
        let held = matches!(input.expr(), Expr::Latent(_));
        Ok(Some(Gate { free, held }))
    }

    /// The weight before its quantizer.
    pub fn before(&self) -> Option<&Weight> {
        match self.expr() {
            Expr::Node { inputs, .. } if inputs.len() == 1 => inputs.first(),
            _ => None,
        }
    }

    /// As it is, its quantizer annealed to `band` (see [`Transform::calmed`]).
    pub fn calmed(&self, band: Option<f64>) -> Option<Self> {
        let Expr::Node { transform, inputs } = self.expr() else { return None };
        let transform = transform.calmed(band)?;
        Some(Expr::Node { transform, inputs: inputs.clone() }.into())
    }

    /// The trainables in it: suffix after the weight's name (empty for the latent itself), `Var`, role.
    pub fn params(&self) -> Vec<(String, Var, Role)> {
        match self.expr() {
            Expr::Latent(var) => vec![(String::new(), var.clone(), Role::Plain)],
            Expr::Node { transform, inputs } => {
                let mut params = Vec::new();
                let parts = transform.parts().iter().copied().chain(std::iter::repeat(""));
                for (input, part) in inputs.iter().zip(parts) {
                    let inner = input.params().into_iter();
                    params.extend(inner.map(|(suffix, var, role)| (format!("{part}{suffix}"), var, role)));
                }
                let own = transform.params().into_iter();
                params.extend(own.map(|(suffix, var, role)| (format!(".{suffix}"), var, role)));
                params
            }
            Expr::Dense(_) | Expr::Stored { .. } | Expr::Packed(_) => Vec::new(),
        }
    }

    /// The same without trainables, for evaluation: what was put on a grid and what several weights make is
    /// computed once, an adapter stays beside its base.
    pub fn settled(&self) -> Result<Self> {
        match self.expr() {
            Expr::Node { transform, inputs } if inputs.len() == 1 && transform.grid().is_none() => {
                let inputs = vec![inputs[0].settled()?];
                Ok(Expr::Node { transform: transform.frozen()?, inputs }.into())
            }
            Expr::Stored { .. } => Ok(self.clone()),
            _ => self.folded(),
        }
    }

    /// The value of now as a frozen dense leaf; packed leaves stay packed.
    pub fn folded(&self) -> Result<Self> {
        match self.expr() {
            Expr::Dense(_) | Expr::Packed(_) => Ok(self.clone()),
            // Copied: training moves a variable in place.
            Expr::Latent(var) => Ok(Weight::dense(var.as_tensor().copy()?.detach())),
            _ => Ok(Weight::dense(self.tensor()?.detach())),
        }
    }
}

/// Whether products of `x` are those of its own format, to which weights are rounded: elsewhere the weight sets it.
pub(crate) fn half_on_cuda(x: &Tensor) -> bool {
    x.device().is_cuda() && matches!(x.dtype(), DType::F16 | DType::BF16)
}

/// A weight as products of `x` take it.
fn in_format_of(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    match half_on_cuda(x) {
        true => Ok(w.to_dtype(x.dtype())?),
        false => Ok(w.clone()),
    }
}

/// `x w^T` with a frozen weight: where their number formats differ, in f32, the result in that of `x`.
fn frozen(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    if x.dtype() == w.dtype() || half_on_cuda(x) {
        return Ok(kernels::frozen_matmul(x, &in_format_of(x, w)?)?);
    }
    let y = kernels::frozen_rows_matmul(&x.to_dtype(DType::F32)?, w)?;
    Ok(y.to_dtype(x.dtype())?)
}

/// The ids as u32 and as a list, each below `rows`.
fn checked(ids: &Tensor, rows: usize) -> Result<(Tensor, Vec<u32>)> {
    let ids = ids.to_dtype(DType::U32)?;
    let list = ids.flatten_all()?.to_vec1::<u32>()?;
    match list.iter().find(|&&id| id as usize >= rows) {
        Some(id) => {
            Err(Error::Run(format!("found id {id}, expected one below the {rows} rows of the table")))
        }
        None => Ok((ids, list)),
    }
}

/// The rows `ids` of a table `[rows, cols]`, `[.., cols]`.
fn gather(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let (rows, cols) = table.dims2()?;
    let (ids, _) = checked(ids, rows)?;
    let picked = kernels::pick_rows(table, &ids.flatten_all()?.to_device(table.device())?)?;
    Ok(picked.reshape([ids.dims(), &[cols]].concat())?)
}
