//! Learned-step activation quantizers with learned shifts.
//!
//! `A(x) = Q(x + β_in) + β_out` with `Q` the LSQ quantizer of Esser et al. 2020 and both shifts vectors
//! along the last axis that start at zero (ofq.md 2.1 to 2.3; the shifts as in the published OFQ code).

use std::sync::Arc;

use candle_core::{DType, Tensor, Var};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::lsq::{trainable, STEP_FLOOR};
use crate::weights::{
    Centering, Granularity, Grid, GridRule, Quantized, Role, Shifts, Signedness, Site, Transform,
};
use crate::{kernels, Error, Result};

/// Steps tried by [`ActQuant::fit`], from the one that reaches the largest value down by factors.
const SWEEP: i32 = 40;
/// The smallest of them, as a share of the largest.
const SMALLEST: f64 = 0.02;

/// What a file says of an activation quantizer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    bits: u8,
    centering: Centering,
    /// -2: one step for each token, -1: for each channel; none: one step.
    axis: Option<i8>,
    /// Whether there is a shift before it.
    shift_in: bool,
    /// Whether there is a shift after it.
    shift_out: bool,
    /// Parts of the last axis that have steps of their own.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    groups: usize,
}

fn one() -> usize {
    1
}

fn is_one(groups: &usize) -> bool {
    *groups == 1
}

/// An activation quantizer on a tap.
#[derive(Clone, Debug)]
pub struct ActQuant {
    grid: Grid,
    axis: Option<i8>,
    /// Parts of the last axis that have steps of their own: `x [.., N, g C]` is seen as `[.., N g, C]`.
    groups: usize,
    step: Tensor,
    shift_in: Option<Tensor>,
    shift_out: Option<Tensor>,
}

impl ActQuant {
    /// Starts a quantizer of `bits` bits for `site` from the activation `x` seen there: step
    /// `f mean|x| / sqrt(qp)` over the elements that share it, `f` 4 for unsigned grids with a step for
    /// each token or channel and 2 otherwise; shifts zero. The second result tells that `x` was zero
    /// throughout, so that the step sits at its floor of 1e-5.
    pub fn start(bits: u8, site: Site, x: &Tensor) -> Result<(Self, bool)> {
        let x = x.detach().to_dtype(DType::F32)?;
        let unsigned = match site.signedness {
            Signedness::Signed => false,
            Signedness::Unsigned => true,
            Signedness::Data => x.flatten_all()?.min(0)?.to_scalar::<f32>()? >= -1e-5,
        };
        let grid = Grid::new(bits, if unsigned { Centering::Unsigned } else { Centering::Signed })?;
        let axis = match site.granularity {
            Granularity::Token => Some(-2),
            Granularity::Channel => Some(-1),
            Granularity::Tensor => None,
        };
        // The published code starts the image's and the head's quantizers with 2, signed or not.
        let factor = if unsigned && !site.edge { 4.0 } else { 2.0 };
        let grouped = split(&x, site.groups)?;
        let step = kernels::lsq_init(&grouped, grid.levels(), absolute(axis, grouped.rank())?, factor)?;
        let silent = x.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()? == 0.0;
        let shift = |wanted: bool| -> Result<Option<Tensor>> {
            let zeros = Tensor::zeros(x.dim(x.rank() - 1)?, DType::F32, x.device())?;
            Ok(if wanted { Some(Var::from_tensor(&zeros)?.as_tensor().clone()) } else { None })
        };
        let step = Var::from_tensor(&step)?.as_tensor().clone();
        let shift_in = shift(site.shifts != Shifts::None)?;
        let shift_out = shift(site.shifts == Shifts::InOut)?;
        Ok((ActQuant { grid, axis, groups: site.groups, step, shift_in, shift_out }, silent))
    }

    /// As [`ActQuant::start`], with the steps of least squared error on `x` in place of those that
    /// training starts from: for packing without training.
    pub fn fit(bits: u8, site: Site, x: &Tensor) -> Result<(Self, bool)> {
        let (mut rule, silent) = ActQuant::start(bits, site, x)?;
        let levels = rule.grid.levels();
        let mut x = x.detach().to_dtype(DType::F32)?;
        // An unsigned grid cuts what is negative off, as of a GELU, until training lifts it: here the
        // shifts lift it at once.
        let least = f64::from(x.flatten_all()?.min(0)?.to_scalar::<f32>()?);
        if let (true, Some(shift_in), Some(_)) =
            (levels.lo == 0 && least < 0.0, &rule.shift_in, &rule.shift_out)
        {
            let lift = (shift_in.zeros_like()?.detach() - least)?;
            x = x.broadcast_add(&lift)?;
            rule.shift_out = Some(Var::from_tensor(&lift.neg()?)?.as_tensor().clone());
            rule.shift_in = Some(Var::from_tensor(&lift)?.as_tensor().clone());
        }
        let x = split(&x, rule.groups)?;
        // One row for each step.
        let rows = match absolute(rule.axis, x.rank())? {
            Some(axis) => x.transpose(0, axis)?.contiguous()?.flatten_from(1)?,
            None => x.flatten_all()?.unsqueeze(0)?,
        };
        let reach = (rows.abs()?.max(1)? / f64::from(levels.hi))?.maximum(STEP_FLOOR)?;
        let mut best: Option<(Tensor, Tensor)> = None;
        for i in 0..SWEEP {
            let share = SMALLEST.powf(f64::from(i) / f64::from(SWEEP - 1));
            let step = (&reach * share)?.maximum(STEP_FLOOR)?;
            let codes = kernels::lsq_codes(&rows, &step, None, levels, Some(0))?;
            let error = (codes.broadcast_mul(&step.unsqueeze(1)?)? - &rows)?.sqr()?.sum(1)?;
            best = Some(match best {
                None => (error, step),
                Some((least, kept)) => {
                    let better = error.lt(&least)?;
                    (better.where_cond(&error, &least)?, better.where_cond(&step, &kept)?)
                }
            });
        }
        if let Some((_, step)) = best {
            // A variable, as every state of a rule that a checkpoint must hold.
            rule.step = Var::from_tensor(&step)?.as_tensor().clone();
        }
        Ok((rule, silent))
    }

    /// Builds a quantizer from what a file says and holds: `read` gives the tensor with a suffix.
    /// Trainable where `training`.
    pub fn revive(
        name: &str,
        description: &Value,
        read: &dyn Fn(&str) -> Result<Option<Tensor>>,
        training: bool,
    ) -> Result<Self> {
        let description: Description = serde_json::from_value(description.clone())
            .map_err(|e| Error::tensor(name, format!("activation quantizer: {e}")))?;
        if !matches!(description.axis, None | Some(-1 | -2)) {
            let found = format!("activation quantizer: axis {:?}, expected -1, -2 or none", description.axis);
            return Err(Error::tensor(name, found));
        }
        if description.groups == 0 || (description.groups > 1 && description.axis != Some(-2)) {
            let found = format!("activation quantizer: {} groups", description.groups);
            return Err(Error::tensor(name, format!("{found}, expected 1, or more on axis -2")));
        }
        let part = |suffix: &str, wanted: bool| -> Result<Option<Tensor>> {
            if !wanted {
                return Ok(None);
            }
            let tensor = read(suffix)?;
            if tensor.is_none() {
                return Err(Error::tensor(format!("{name}.{suffix}"), "not found, expected a rank 1 tensor"));
            }
            if let Some(t) = tensor.as_ref().filter(|t| t.rank() != 1 || t.dtype() != DType::F32) {
                let found = format!("found {:?} {:?}, expected F32 of rank 1", t.dtype(), t.dims());
                return Err(Error::tensor(format!("{name}.{suffix}"), found));
            }
            Ok(match tensor {
                Some(t) if training => Some(Var::from_tensor(&t)?.as_tensor().clone()),
                tensor => tensor,
            })
        };
        let step = part("scale", true)?.ok_or_else(|| Error::tensor(name, "no scale"))?;
        Ok(ActQuant {
            grid: Grid::new(description.bits, description.centering)?,
            axis: description.axis,
            groups: description.groups,
            step,
            shift_in: part("shift_in", description.shift_in)?,
            shift_out: part("shift_out", description.shift_out)?,
        })
    }

    /// The same quantizer, trainable, with the steps and shifts that training gave the tap called `name`.
    pub fn trained(
        mut self,
        name: &str,
        scale: &Tensor,
        shift_in: Option<&Tensor>,
        shift_out: Option<&Tensor>,
    ) -> Result<Self> {
        let given = |suffix: &str, own: &Tensor, given: &Tensor| -> Result<Tensor> {
            if given.dims() != own.dims() {
                let message = format!("found shape {:?}, expected {:?}", given.dims(), own.dims());
                return Err(Error::tensor(format!("{name}.{suffix}"), message));
            }
            Ok(Var::from_tensor(&given.to_device(own.device())?)?.as_tensor().clone())
        };
        self.step = given("scale", &self.step, scale)?;
        for (suffix, own, shift) in
            [("shift_in", &mut self.shift_in, shift_in), ("shift_out", &mut self.shift_out, shift_out)]
        {
            *own = match (own.as_ref(), shift) {
                (Some(own), Some(shift)) => Some(given(suffix, own, shift)?),
                (None, None) => None,
                (own, _) => {
                    let place = if own.is_some() { "found none, the place has one" } else { "has no place" };
                    return Err(Error::tensor(format!("{name}.{suffix}"), place));
                }
            };
        }
        Ok(self)
    }

    /// The axis of the steps in `x`, whose groups are already split.
    fn axis(&self, x: &Tensor) -> Result<Option<usize>> {
        self.axis_in(x.dims())
    }

    fn axis_in(&self, dims: &[usize]) -> Result<Option<usize>> {
        let axis = absolute(self.axis, dims.len())?;
        let (found, expected) = (axis.map(|a| dims[a]).unwrap_or(1), self.step.elem_count());
        if found != expected {
            let what = if self.axis == Some(-2) { "tokens" } else { "channels" };
            let (found, expected) = (found / self.groups, expected / self.groups);
            return Err(Error::Run(format!(
                "found {found} {what}, but the quantizer was calibrated for {expected}: a model with \
                 quantized activations keeps the image size it was trained at"
            )));
        }
        Ok(axis)
    }

    /// `x` as the quantizer sees it, and the shift that is still to be added to it: groups are split,
    /// after a shift that lies along all of them.
    fn seen(&self, x: &Tensor) -> Result<(Tensor, Option<&Tensor>)> {
        self.check_shift(x)?;
        match (self.groups, &self.shift_in) {
            (1, shift) => Ok((x.clone(), shift.as_ref())),
            (groups, None) => Ok((split(x, groups)?, None)),
            (groups, Some(shift)) => Ok((split(&kernels::add_bias(x, shift)?, groups)?, None)),
        }
    }

    fn check_shift(&self, x: &Tensor) -> Result<()> {
        if let Some(shift) = &self.shift_in {
            let (channels, expected) = (x.dim(x.rank() - 1)?, shift.elem_count());
            if expected != channels {
                return Err(Error::Run(format!("found {channels} channels, the shifts have {expected}")));
            }
        }
        Ok(())
    }
}

/// `x [.., N, g C]` as `[.., N g, C]`.
fn split(x: &Tensor, groups: usize) -> Result<Tensor> {
    Ok(if groups == 1 { x.clone() } else { x.reshape(divided(x.dims(), groups)?)? })
}

/// The dimensions `[.., N, g C]` as `[.., N g, C]`.
fn divided(dims: &[usize], groups: usize) -> Result<Vec<usize>> {
    if groups == 1 {
        return Ok(dims.to_vec());
    }
    let [lead @ .., tokens, width] = dims else {
        return Err(Error::Run(format!("found an activation {dims:?}, expected tokens and channels")));
    };
    if !width.is_multiple_of(groups) {
        return Err(Error::Run(format!("found {width} channels, expected a multiple of {groups}")));
    }
    Ok(lead.iter().copied().chain([tokens * groups, width / groups]).collect())
}

/// An axis counted from the end, counted from the front.
fn absolute(axis: Option<i8>, rank: usize) -> Result<Option<usize>> {
    let Some(axis) = axis else { return Ok(None) };
    let back = usize::from(axis.unsigned_abs());
    if axis >= 0 || back > rank {
        return Err(Error::Run(format!("axis {axis} of a tensor of rank {rank}: expected -1 or -2")));
    }
    Ok(Some(rank - back))
}

impl Transform for ActQuant {
    fn kind(&self) -> &'static str {
        "lsq_activation"
    }

    fn apply(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let x = &inputs[0];
        self.check_shift(x)?;
        let axis = self.axis_in(&divided(x.dims(), self.groups)?)?;
        let shifts = (self.shift_in.as_ref(), self.shift_out.as_ref());
        Ok(kernels::lsq_shifted(x, &self.step, shifts, self.grid.levels(), (axis, self.groups))?)
    }

    fn params(&self) -> Vec<(&'static str, Var, Role)> {
        let mut params: Vec<_> = trainable("scale", &self.step, Role::ActivationStep).into_iter().collect();
        let shifts = [("shift_in", &self.shift_in), ("shift_out", &self.shift_out)];
        for (suffix, shift) in shifts {
            params.extend(shift.as_ref().and_then(|t| trainable(suffix, t, Role::Plain)));
        }
        params
    }

    fn tensors(&self) -> Vec<(&'static str, Tensor)> {
        let mut tensors = vec![("scale", self.step.detach())];
        tensors.extend(self.shift_in.as_ref().map(|t| ("shift_in", t.detach())));
        tensors.extend(self.shift_out.as_ref().map(|t| ("shift_out", t.detach())));
        tensors
    }

    fn frozen(&self) -> Result<std::sync::Arc<dyn Transform>> {
        Ok(Arc::new(ActQuant {
            grid: self.grid,
            axis: self.axis,
            groups: self.groups,
            step: self.step.copy()?.detach(),
            shift_in: self.shift_in.as_ref().map(Tensor::copy).transpose()?.map(|t| t.detach()),
            shift_out: self.shift_out.as_ref().map(Tensor::copy).transpose()?.map(|t| t.detach()),
        }))
    }

    fn quantize(&self, inputs: &[Tensor]) -> Result<Option<Quantized>> {
        // The codes keep the shape that the quantizer sees: the axis of the steps is one of theirs.
        let (x, shift) = self.seen(&inputs[0])?;
        let axis = self.axis(&x)?;
        let codes = kernels::lsq_codes(&x, &self.step, shift, self.grid.levels(), axis)?;
        let step = self.step.detach().maximum(STEP_FLOOR)?;
        Ok(Some(Quantized { codes, step, axis, group: None, grid: self.grid }))
    }

    fn grid_rule(&self) -> Result<Option<GridRule>> {
        if !self.params().is_empty() {
            return Ok(None);
        }
        Ok(Some(GridRule {
            grid: self.grid,
            granularity: match self.axis {
                Some(-2) => Granularity::Token,
                Some(_) => Granularity::Channel,
                None => Granularity::Tensor,
            },
            groups: self.groups,
            step: self.step.clone(),
            shift_in: self.shift_in.clone(),
            shift_out: self.shift_out.clone(),
        }))
    }

    fn shift_out(&self) -> Option<Tensor> {
        self.shift_out.clone()
    }

    fn describe(&self) -> Value {
        let Grid { bits, centering } = self.grid;
        let (shift_in, shift_out) = (self.shift_in.is_some(), self.shift_out.is_some());
        let (axis, groups) = (self.axis, self.groups);
        let description = Description { bits, centering, axis, shift_in, shift_out, groups };
        serde_json::to_value(description).unwrap_or_default()
    }
}
