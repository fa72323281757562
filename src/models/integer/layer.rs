//! What the integer road keeps of a tap, a layer and a norm: plain numbers.

use candle_core::{DType, Tensor};

use crate::kernels::packed::edges::{self, Rounding};
use crate::kernels::packed::{CodeMatrix, Isa};
use crate::kernels::SCALE_FLOOR;
use crate::models::nn::{LayerNorm, Linear};
use crate::weights::{Granularity, Tap, Weight};
use crate::Result;

/// The steps of a quantizer.
#[derive(Debug)]
enum Steps {
    One(f32),
    /// For each token, and within it each group of columns.
    Tokens(Vec<f32>),
    Columns(Vec<f32>),
}

/// A quantizer on a tap.
#[derive(Debug)]
pub(super) struct Quantizer {
    pub lo: i32,
    pub hi: i32,
    steps: Steps,
    /// For each step, where codes of 2 bits change; none for others.
    edges: Vec<[f32; 3]>,
    /// Equal parts of a token's columns that have steps of their own.
    groups: usize,
    pub shift_in: Vec<f32>,
    pub shift_out: Option<Vec<f32>>,
}

impl Quantizer {
    /// The quantizer of a tap that `width` columns pass; none where the integer road can not take it.
    pub fn of(tap: &Tap, width: usize) -> Result<Option<Self>> {
        let Some(rule) = tap.rule().map(|rule| rule.grid_rule()).transpose()?.flatten() else {
            return Ok(None);
        };
        let levels = rule.grid.levels();
        let list = |t: &Tensor| t.to_vec1::<f32>();
        // The floor as the quantizer has it.
        let step = list(&rule.step.maximum(SCALE_FLOOR)?)?;
        let shift_in = rule.shift_in.as_ref().map(list).transpose()?;
        let shift_out = rule.shift_out.as_ref().map(list).transpose()?;
        let fits = |shift: &Option<Vec<f32>>| shift.as_ref().is_none_or(|s| s.len() == width);
        let steps = match (rule.granularity, step.as_slice()) {
            (Granularity::Tensor, [step]) => Steps::One(*step),
            (Granularity::Token, steps) if !steps.is_empty() && steps.len().is_multiple_of(rule.groups) => {
                Steps::Tokens(step)
            }
            (Granularity::Channel, steps) if steps.len() == width => Steps::Columns(step),
            _ => return Ok(None),
        };
        if levels.half || !width.is_multiple_of(rule.groups) || !fits(&shift_in) || !fits(&shift_out) {
            return Ok(None);
        }
        let finite = |numbers: &[f32]| numbers.iter().all(|v| v.is_finite());
        let shifts = [&shift_in, &shift_out];
        if !shifts.into_iter().flatten().all(|shift| finite(shift)) {
            return Ok(None);
        }
        let each: &[f32] = match &steps {
            Steps::One(step) => std::slice::from_ref(step),
            Steps::Tokens(steps) | Steps::Columns(steps) => steps,
        };
        let edges = each.iter().filter_map(|&step| edges::edges_of(step, levels.lo, levels.hi)).collect();
        Ok(Some(Quantizer {
            lo: levels.lo,
            hi: levels.hi,
            edges,
            steps,
            groups: rule.groups,
            shift_in: shift_in.unwrap_or_else(|| vec![0.0; width]),
            shift_out,
        }))
    }

    /// The tokens that it was calibrated for, and the groups of each token; none: any number.
    pub fn tokens(&self) -> Option<usize> {
        match &self.steps {
            Steps::Tokens(steps) => Some(steps.len() / self.groups),
            Steps::One(_) | Steps::Columns(_) => None,
        }
    }

    /// Whether a token's columns, or those of each of its `groups`, share one step.
    pub fn by_token(&self, groups: usize) -> bool {
        match self.steps {
            Steps::One(_) => true,
            Steps::Tokens(_) => self.groups == groups,
            Steps::Columns(_) => false,
        }
    }

    /// Whether the codes are signed bytes.
    pub fn signed_bytes(&self) -> bool {
        i8::try_from(self.lo).is_ok() && i8::try_from(self.hi).is_ok()
    }

    /// The step of a group of a token; only where [`Quantizer::by_token`] holds.
    pub fn step(&self, token: usize, group: usize) -> f32 {
        match &self.steps {
            Steps::One(step) => *step,
            Steps::Tokens(steps) | Steps::Columns(steps) => steps[self.place(token, group)],
        }
    }

    /// Which of the steps it is.
    fn place(&self, token: usize, group: usize) -> usize {
        match &self.steps {
            Steps::One(_) => 0,
            Steps::Tokens(_) => token * self.groups + group,
            Steps::Columns(_) => group,
        }
    }

    /// The step of every column, where tokens share them.
    pub fn columns(&self) -> Option<Vec<f32>> {
        match &self.steps {
            Steps::One(step) => Some(vec![*step; self.shift_in.len()]),
            Steps::Columns(steps) => Some(steps.clone()),
            Steps::Tokens(_) => None,
        }
    }

    /// How the columns from `from` on of a token become codes, those of one group.
    pub fn rounding(&self, token: usize, group: usize, from: usize) -> Rounding<'_> {
        let edges = self.edges.get(self.place(token, group)).copied();
        let step = self.step(token, group);
        Rounding { shift: &self.shift_in[from..], step, lo: self.lo, hi: self.hi, edges }
    }
}

/// A packed weight with its bias, what the quantizer before it adds folded in.
#[derive(Debug)]
pub(super) struct Layer {
    pub matrix: CodeMatrix,
    pub bias: Vec<f32>,
}

impl Layer {
    /// The layer behind codes of `input`; none where the integer road can not take it.
    pub fn of(linear: &Linear, input: &Quantizer, isa: Isa) -> Result<Option<Self>> {
        let Some((matrix, bias)) =
            linear.on_integers(input.shift_out.as_deref(), (input.lo, input.hi), isa)?
        else {
            return Ok(None);
        };
        let finite = bias.iter().all(|b| b.is_finite());
        let fits = finite && matrix.cols() == input.shift_in.len() && bias.len() == matrix.rows();
        Ok(fits.then_some(Layer { matrix, bias }))
    }
}

/// A layer norm.
#[derive(Debug)]
pub(super) struct Norm {
    pub weight: Vec<f32>,
    pub bias: Vec<f32>,
    pub eps: f32,
}

impl Norm {
    /// Of a frozen norm in f32 over `width` columns; else none.
    pub fn of(norm: &LayerNorm, width: usize) -> Result<Option<Self>> {
        let (weight, bias, eps) = norm.parts();
        let (Some(weight), Some(bias)) = (frozen(weight)?, frozen(bias)?) else { return Ok(None) };
        let finite = weight.iter().chain(&bias).all(|v| v.is_finite());
        let fits = finite && weight.len() == width && bias.len() == width;
        Ok(fits.then_some(Norm { weight, bias, eps: eps as f32 }))
    }
}

/// The values of a weight without trainables, in f32 on the CPU.
pub(super) fn frozen(weight: &Weight) -> Result<Option<Vec<f32>>> {
    if !weight.params().is_empty() {
        return Ok(None);
    }
    let tensor = weight.tensor()?;
    if tensor.dtype() != DType::F32 || !tensor.device().is_cpu() {
        return Ok(None);
    }
    Ok(Some(tensor.flatten_all()?.to_vec1::<f32>()?))
}
