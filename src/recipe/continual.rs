//! `[continual]`: tasks that are learned one after another, and what keeps the earlier ones.

use serde::{Deserialize, Serialize};

use crate::data::DataConfig;
use crate::{Error, Result};

/// What keeps earlier tasks while a later one is learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protection {
    /// Nothing: plain training, task after task.
    Finetune,
    /// The optimizer's own memory of past gradients ([`crate::optim::classp`]).
    Classp,
    /// Elastic weight consolidation.
    Ewc,
    /// Some samples of earlier tasks in every batch.
    Replay,
    /// From the second task on only the weights of the lowest condition numbers are trained.
    Kappatune,
    /// The posterior of binary weights is the next task's prior.
    Field,
}

impl Protection {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Protection::Finetune => "finetune",
            Protection::Classp => "classp",
            Protection::Ewc => "ewc",
            Protection::Replay => "replay",
            Protection::Kappatune => "kappatune",
            Protection::Field => "field",
        }
    }
}

/// Which classes an answer is picked from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadKind {
    /// One set of classes for all tasks: label 3 of each is the same output. Nobody says which task an image
    /// is of (domain-incremental).
    #[default]
    Shared,
    /// Each task brings classes of its own, and an answer is one of all of them (class-incremental).
    Class,
    /// Each task brings classes of its own, and an answer is one of its task's, which is known
    /// (task-incremental).
    Task,
}

/// `[[continual.task]]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskConfig {
    /// Its name in tables and messages.
    pub name: String,
    /// Its images; limits that it does not set are those of `[data]`. None: those of `[data]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<DataConfig>,
    /// Of these images the ones of some classes, by name, in the order of their new labels. Empty: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<String>,
    /// The number of a random order that the pixels of every image are put in. None: as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub permute: Option<u64>,
}

/// Where the labels come from that the Fisher information is the gradient of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FisherLabels {
    /// Drawn from what the model says: the Fisher information proper.
    #[default]
    Model,
    /// The data's: the empirical Fisher information.
    Data,
}

/// `[continual.ewc]` (Kirkpatrick et al. 2017).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EwcConfig {
    /// The penalty is half of this times the sum of Fisher information times squared distance. Plain gradient
    /// descent diverges where this times the learning rate times the largest Fisher information exceeds 2.
    pub lambda: f64,
    /// Training images of each task that its Fisher information is the mean over.
    pub samples: usize,
    /// Where their labels come from.
    pub labels: FisherLabels,
    /// One anchor, that of the last task, under the sum of all tasks' Fisher information, each task's times
    /// this for every task after it (Schwarz et al. 2018). None: an anchor for every task.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub online: Option<f64>,
}

impl Default for EwcConfig {
    fn default() -> Self {
        EwcConfig { lambda: 10.0, samples: 1000, labels: FisherLabels::Model, online: None }
    }
}

/// `[continual.replay]`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReplayConfig {
    /// Training images kept of each task.
    pub samples: usize,
    /// The share of them in every later epoch, which stays as long as it is.
    pub share: f64,
}

impl Default for ReplayConfig {
    fn default() -> Self {
        ReplayConfig { samples: 200, share: 0.5 }
    }
}

/// `[continual.field]`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FieldConfig {
    /// Factor on the divergence from the posterior of the tasks before, which is divided by the number of training
    /// images: 1 is Bayes' rule.
    pub weight: f64,
    /// The same for the first task, whose prior says nothing: at 1 it keeps this network from learning.
    pub first_weight: f64,
}

impl Default for FieldConfig {
    fn default() -> Self {
        FieldConfig { weight: 0.2, first_weight: 0.01 }
    }
}

/// `[continual]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContinualConfig {
    /// What keeps earlier tasks.
    pub method: Protection,
    /// Which classes an answer is picked from.
    #[serde(default)]
    pub heads: HeadKind,
    /// So many of each task's last training images are evaluated on in place of its test images, and not
    /// trained on: for choosing settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<usize>,
    /// `[continual.ewc]`.
    #[serde(default)]
    pub ewc: EwcConfig,
    /// `[continual.replay]`.
    #[serde(default)]
    pub replay: ReplayConfig,
    /// `[continual.field]`.
    #[serde(default)]
    pub field: FieldConfig,
    /// The tasks, in order.
    #[serde(default)]
    pub task: Vec<TaskConfig>,
}

impl ContinualConfig {
    /// What types cannot hold.
    pub(super) fn check(&self) -> Result<()> {
        let bad = |message: String| Err(Error::usage(format!("continual.{message}")));
        if self.task.is_empty() {
            return bad("task: found none, expected tasks to learn: --tasks A,B".into());
        }
        for (i, task) in self.task.iter().enumerate() {
            if task.name.is_empty() || self.task[..i].iter().any(|other| other.name == task.name) {
                let found = &task.name;
                return bad(format!("task.{i}.name = {found:?}: expected a name of its own for every task"));
            }
            if let Some(class) = task.classes.iter().enumerate().find(|(i, c)| task.classes[..*i].contains(c))
            {
                return bad(format!("task.{i}.classes: found {:?} twice", class.1));
            }
        }
        let positive = [
            ("ewc.lambda", self.ewc.lambda),
            ("field.weight", self.field.weight),
            ("field.first_weight", self.field.first_weight),
        ];
        if let Some((key, value)) = positive.iter().find(|(_, v)| !(v.is_finite() && *v >= 0.0)) {
            return bad(format!("{key} = {value}: expected 0 or more"));
        }
        if self.ewc.online.is_some_and(|keep| !(0.0..=1.0).contains(&keep)) {
            return bad(format!("ewc.online = {:?}: expected 0 to 1", self.ewc.online));
        }
        if self.ewc.samples == 0 || self.replay.samples == 0 {
            return bad("ewc.samples, replay.samples: expected at least 1".into());
        }
        if !(self.replay.share > 0.0 && self.replay.share < 1.0) {
            return bad(format!("replay.share = {}: expected above 0 and below 1", self.replay.share));
        }
        if self.validation == Some(0) {
            return bad("validation = 0: expected at least 1".into());
        }
        Ok(())
    }
}
