//! Named taps: the places in a model where an activation can be quantized.
//!
//! A model says where its taps are and what kind of [`Site`] each one is; which rule hangs there is
//! the store's business. A tap hands its layer an [`Activation`], which can be read as a float tensor
//! or, where the rule puts it on a grid, as integer codes.

use std::cell::OnceCell;
use std::sync::{Arc, Mutex};

use candle_core::Tensor;
use indexmap::IndexMap;

use super::packed::{Grid, Quantized};
use super::weight::Transform;
use crate::{Error, Result};

/// Which elements share a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granularity {
    /// One for each entry of the last axis but one: tokens, rows of a softmax, colours of an image.
    Token,
    /// One for each entry of the last axis.
    Channel,
    /// One in all.
    Tensor,
}

/// Whether the grid has negative codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signedness {
    /// It has.
    Signed,
    /// It has not.
    Unsigned,
    /// The calibration data decide: any value below -1e-5 makes it signed.
    Data,
}

/// Which learned shifts surround a quantizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shifts {
    /// None.
    None,
    /// Before it only.
    In,
    /// Before and after it.
    InOut,
}

/// What a model says of a place where an activation can be quantized (ofq.md 2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// Which elements share a step.
    pub granularity: Granularity,
    /// Whether the grid has negative codes.
    pub signedness: Signedness,
    /// Which learned shifts surround the quantizer.
    pub shifts: Shifts,
    /// Into how many equal parts of the last axis a token falls, each with a step of its own; 1: none.
    /// Shifts lie along the whole axis.
    pub groups: usize,
    /// The first or last layer of the model, which keeps 8 bits.
    pub edge: bool,
}

/// What an activation quantizer on a grid is made of: `x` becomes
/// `step clamp(rne((x + shift_in) / step), lo, hi) + shift_out`.
#[derive(Clone, Debug)]
pub struct GridRule {
    /// The grid of the codes.
    pub grid: Grid,
    /// Which elements share a step.
    pub granularity: Granularity,
    /// Into how many equal parts of the last axis a token falls, each with a step of its own.
    pub groups: usize,
    /// The steps, f32, of which one below 1e-5 acts as that: one, one for each channel, or one for each token and, within
    /// it, part of the last axis.
    pub step: Tensor,
    /// Added before, along the last axis, f32.
    pub shift_in: Option<Tensor>,
    /// Added after, along the last axis, f32.
    pub shift_out: Option<Tensor>,
}

/// Makes the rule of a tap from the first activation seen there; `None` leaves the tap open.
pub type Calibrate = dyn Fn(&str, Site, &Tensor) -> Result<Option<Arc<dyn Transform>>> + Send + Sync;

/// A pass over the model that hangs a rule on each tap it comes by: later taps see what earlier
/// rules made of the activations, as in training.
pub struct Calibration {
    rule: Box<Calibrate>,
    found: Mutex<IndexMap<String, Option<Arc<dyn Transform>>>>,
}

impl std::fmt::Debug for Calibration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Calibration").finish_non_exhaustive()
    }
}

impl Calibration {
    /// A calibration that makes rules with `rule`.
    pub fn new(rule: Box<Calibrate>) -> Arc<Self> {
        Arc::new(Calibration { rule, found: Mutex::default() })
    }

    fn at(&self, name: &str, site: Site, x: &Tensor) -> Result<Option<Arc<dyn Transform>>> {
        let mut found = self.found.lock().map_err(|_| Error::Run("calibration was interrupted".into()))?;
        if let Some(rule) = found.get(name) {
            return Ok(rule.clone());
        }
        let rule = (self.rule)(name, site, x)?;
        found.insert(name.to_string(), rule.clone());
        Ok(rule)
    }

    /// The rules made so far, in the order in which the model came by their taps.
    pub fn rules(&self) -> Result<IndexMap<String, Arc<dyn Transform>>> {
        let found = self.found.lock().map_err(|_| Error::Run("calibration was interrupted".into()))?;
        Ok(found.iter().filter_map(|(name, rule)| Some((name.clone(), rule.clone()?))).collect())
    }
}

#[derive(Clone, Debug)]
pub(super) enum Hung {
    Nothing,
    Rule(Arc<dyn Transform>),
    Calibration(Arc<Calibration>),
}

/// A place in a model where an activation passes.
#[derive(Clone, Debug)]
pub struct Tap {
    name: String,
    site: Site,
    hung: Hung,
}

impl Tap {
    pub(super) fn new(name: String, site: Site, hung: Hung) -> Self {
        Tap { name, site, hung }
    }

    /// The tap's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Takes `x` through the tap.
    pub fn forward(&self, x: &Tensor) -> Result<Activation> {
        let rule = match &self.hung {
            Hung::Nothing => None,
            Hung::Rule(rule) => Some(rule.clone()),
            Hung::Calibration(calibration) => calibration.at(&self.name, self.site, x)?,
        };
        Ok(Activation { name: self.name.clone(), x: x.clone(), rule, float: OnceCell::new() })
    }

    /// Whether nothing hangs here: what passes leaves as it came, and nobody sees it.
    pub fn is_open(&self) -> bool {
        matches!(self.hung, Hung::Nothing)
    }

    /// The rule that hangs here.
    pub fn rule(&self) -> Option<&Arc<dyn Transform>> {
        match &self.hung {
            Hung::Rule(rule) => Some(rule),
            Hung::Nothing | Hung::Calibration(_) => None,
        }
    }
}

/// An activation behind a tap.
#[derive(Debug)]
pub struct Activation {
    name: String,
    x: Tensor,
    rule: Option<Arc<dyn Transform>>,
    float: OnceCell<Tensor>,
}

impl Activation {
    /// As floats, quantized and dequantized where a rule hangs at the tap; differentiable.
    pub fn tensor(&self) -> Result<Tensor> {
        if let Some(tensor) = self.float.get() {
            return Ok(tensor.clone());
        }
        let tensor = match &self.rule {
            None => self.x.clone(),
            Some(rule) => rule.apply(std::slice::from_ref(&self.x)).map_err(|e| named(&self.name, e))?,
        };
        Ok(self.float.get_or_init(|| tensor).clone())
    }

    /// What the rule adds to its dequantized codes, along the last axis.
    pub fn shift_out(&self) -> Option<Tensor> {
        self.rule.as_ref().and_then(|rule| rule.shift_out())
    }

    /// As it came to the tap.
    pub fn seen(&self) -> &Tensor {
        &self.x
    }

    /// What a frozen rule on a grid does; see [`Transform::grid_rule`].
    pub fn grid_rule(&self) -> Result<Option<GridRule>> {
        match &self.rule {
            Some(rule) => rule.grid_rule().map_err(|e| named(&self.name, e)),
            None => Ok(None),
        }
    }

    /// As integer codes, where a rule on a grid hangs at the tap.
    pub fn codes(&self) -> Result<Option<Quantized>> {
        match &self.rule {
            None => Ok(None),
            Some(rule) => rule.quantize(std::slice::from_ref(&self.x)).map_err(|e| named(&self.name, e)),
        }
    }
}

fn named(name: &str, error: Error) -> Error {
    match error {
        Error::Run(message) => Error::Run(format!("{name}: {message}")),
        Error::Candle(source) => Error::On { name: name.to_string(), source },
        other => other,
    }
}
