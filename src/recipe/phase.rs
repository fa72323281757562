//! `[[phase]]`: stretches of training and what is in place during them; `[qkr]`, which shapes the weights
//! that annealing is about.

use serde::{Deserialize, Serialize};

use crate::optim::Schedule;

/// When a phase runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// In every run.
    Always,
    /// Where the model, or its classifier, starts from random numbers.
    Untrained,
}

/// `[[phase]]`: a stretch of training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PhaseConfig {
    /// Its name in metrics and messages.
    pub name: String,
    /// Whether the quantizers of `[[transform]]` and `[activation]` are in place.
    pub quantize: bool,
    /// When it runs.
    #[serde(default = "always")]
    pub when: When,
    /// Passes over the training data.
    #[serde(default)]
    pub epochs: f64,
    /// Steps, in place of `epochs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<usize>,
    /// Peak learning rate.
    pub lr: f64,
    /// Final learning rate.
    #[serde(default)]
    pub min_lr: f64,
    /// Shape of the rate after warm-up.
    #[serde(default = "cosine")]
    pub schedule: Schedule,
    /// Steps of warm-up.
    #[serde(default)]
    pub warmup: usize,
    /// Epochs of warm-up, on top of `warmup`.
    #[serde(default)]
    pub warmup_epochs: f64,
    /// Rate that warm-up starts from.
    #[serde(default)]
    pub warmup_lr: f64,
    /// Epochs that the cosine of `cosine_epochs` spans. None: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cosine_span: Option<f64>,
    /// Whether the optimizer goes on from the state that the quantized phase before left.
    #[serde(default, skip_serializing_if = "is_false")]
    pub continue_optimizer: bool,
    /// Confidence-guided annealing: only weights within so many steps of a threshold move, and the
    /// optimizer goes on as with `continue_optimizer`. None: all weights move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calm: Option<f64>,
    /// What annealing does to a product of query and key.
    #[serde(default, skip_serializing_if = "CalmQk::is_off")]
    pub calm_qk: CalmQk,
}

/// What annealing does to the product of query and key, whose factors are shared by whole rows and
/// columns of it, so that its entries cannot be held one by one (ofq.md 4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CalmQk {
    /// Nothing: what the release that gave the published figures does.
    #[default]
    Off,
    /// The gradient of confident entries is cut, as the paper's text describes. Query and key go on moving
    /// along what is left of it, and with them whole rows and columns of the product.
    MaskGrad,
    /// The product becomes a weight of its own, so that confident entries are held still one by one.
    Hold,
}

impl CalmQk {
    fn is_off(&self) -> bool {
        *self == CalmQk::Off
    }
}

/// `[qkr]`: query-key reparameterization.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QkrConfig {
    /// Patterns of the attentions whose query and key become one weight, as names of modules
    /// (`vit.encoder.layer.0.attention.attention`).
    #[serde(default = "every")]
    pub targets: Vec<String>,
    /// What becomes of the query's bias.
    #[serde(default)]
    pub bias: QkrBias,
}

fn every() -> Vec<String> {
    vec!["*".into()]
}

/// What query-key reparameterization does with the query's bias. The key's changes no probability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QkrBias {
    /// It becomes a trainable term of the key side, which keeps the model what it was.
    #[default]
    KeepQ,
    /// It is dropped, as in the published code.
    Drop,
}

fn is_false(value: &bool) -> bool {
    !value
}

fn always() -> When {
    When::Always
}

fn cosine() -> Schedule {
    Schedule::Cosine
}
