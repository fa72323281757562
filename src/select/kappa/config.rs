//! `[kappa]` in a recipe: which units are candidates, how they are ordered, and how many are taken.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::units::Role;
use crate::{Error, Result};

/// What a share does with a unit that no longer fits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fit {
    /// It ends there: no unit is trained while a better one is left out.
    #[default]
    Prefix,
    /// It is passed over, and smaller ones behind it may still fit.
    Fill,
}

/// Which end of the ranking is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// The lowest scores: the method.
    #[default]
    Lowest,
    /// The highest ones: a control.
    Highest,
    /// Any, drawn by the run's seed: a control.
    Random,
}

/// What is ranked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Score {
    /// The condition number, sigma_1 / sigma_q: the published method.
    #[default]
    Kappa,
    /// The deficit of log-volume, log(|W|_F / sqrt(q)) - (1/q) sum log sigma_i, which all singular values enter.
    Logvol,
}

/// What a score is measured against.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalize {
    /// Nothing: shape decides most of it.
    #[default]
    None,
    /// The score of a Gaussian matrix of the same shape.
    Shape,
}

/// How much is taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// So many units.
    Tensors(usize),
    /// So large a part of the candidates.
    Fraction(f64),
    /// So large a part of the model's parameters.
    Share(f64),
    /// Every unit of at most this condition number.
    KappaMax(f64),
}

impl FromStr for Budget {
    type Err = Error;

    /// `20` or `tensors:20`, `fraction:0.25`, `share:0.1` or `10%`, `kappa:100`.
    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            Error::usage(format!(
                "budget {text:?}: expected tensors:N (or N), fraction:P, share:P (or P%), kappa:T"
            ))
        };
        let (kind, value) = text.split_once(':').unwrap_or(("", text));
        let number = |text: &str| text.trim().parse::<f64>().ok().filter(|v| v.is_finite()).ok_or_else(wrong);
        let budget = match (kind.trim(), value.trim().strip_suffix('%')) {
            ("" | "share", Some(percent)) => Budget::Share(number(percent)? / 100.0),
            ("fraction", Some(percent)) => Budget::Fraction(number(percent)? / 100.0),
            ("" | "tensors", None) => Budget::Tensors(value.trim().parse().map_err(|_| wrong())?),
            ("fraction", None) => Budget::Fraction(number(value)?),
            ("share", None) => Budget::Share(number(value)?),
            ("kappa" | "kappa_max", None) => Budget::KappaMax(number(value)?),
            _ => return Err(wrong()),
        };
        budget.check()?;
        Ok(budget)
    }
}

impl Budget {
    fn check(self) -> Result<()> {
        let (key, found, expected) = match self {
            Budget::Tensors(0) => ("tensors", "0".to_string(), "at least 1"),
            Budget::Fraction(p) if !(p > 0.0 && p <= 1.0) => {
                ("fraction", p.to_string(), "above 0, at most 1")
            }
            Budget::Share(p) if !(p > 0.0 && p <= 1.0) => ("share", p.to_string(), "above 0, at most 1"),
            Budget::KappaMax(t) if !(t >= 1.0 && t.is_finite()) => {
                ("kappa_max", t.to_string(), "a number from 1")
            }
            _ => return Ok(()),
        };
        Err(Error::usage(format!("kappa.{key} = {found}: expected {expected}")))
    }
}

/// `[kappa]` in a recipe.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KappaConfig {
    /// Budget: so many units.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tensors: Option<usize>,
    /// Budget: so large a part of the candidates, above 0, at most 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fraction: Option<f64>,
    /// Budget: so large a part of the model's parameters, tied ones once; above 0, at most 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<f64>,
    /// Budget: every unit of at most this condition number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kappa_max: Option<f64>,
    /// What `share` does with a unit that no longer fits.
    pub fit: Fit,
    /// Which end of the ranking is taken.
    pub order: Order,
    /// What is ranked.
    pub score: Score,
    /// What the score is measured against.
    pub normalize: Normalize,
    /// Patterns of names (of tensors or of units) that may be taken; none: all. Before the budget.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub include: Vec<String>,
    /// Patterns of names that may not.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// Roles that may be taken; none: linear, conv, experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub roles: Option<Vec<Role>>,
    /// Leaves out units with a longer side.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_dim: Option<usize>,
    /// Embeddings and output heads may be taken too.
    pub include_embeddings: bool,
    /// Takes fused query, key and value (three times as tall as wide), and gate and up, apart. For analysis only: a
    /// part of a tensor is not trained by itself.
    pub split_fused: bool,
    /// All singular values of every unit, whatever that costs.
    pub exact: bool,
    /// Reads packed weights: their condition numbers are mostly those of the rounding.
    pub allow_quantized: bool,
    /// Leaves units with a number that is not finite out, where they are an error otherwise.
    pub ignore_nonfinite: bool,
    /// A file of `qtune kappa`, or a folder that holds one: its selection is taken, nothing is analysed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selection: Option<PathBuf>,
    /// Trains every norm too.
    pub train_norms: bool,
    /// Trains every bias too.
    pub train_biases: bool,
}

impl KappaConfig {
    /// What types cannot hold.
    pub fn check(&self) -> Result<()> {
        let set = [
            ("tensors", self.tensors.is_some()),
            ("fraction", self.fraction.is_some()),
            ("share", self.share.is_some()),
            ("kappa_max", self.kappa_max.is_some()),
            ("selection", self.selection.is_some()),
        ];
        let set: Vec<&str> = set.into_iter().filter(|(_, set)| *set).map(|(key, _)| key).collect();
        if set.len() != 1 {
            let found = if set.is_empty() { "none".to_string() } else { set.join(" and ") };
            let expected = "expected exactly one of tensors, fraction, share, kappa_max, selection";
            return Err(Error::usage(format!("kappa: found {found}, {expected}")));
        }
        if let Some(budget) = self.found() {
            budget.check()?;
        }
        if self.fit == Fit::Fill && self.share.is_none() {
            return Err(Error::usage("kappa.fit = \"fill\": it needs kappa.share"));
        }
        if self.max_dim == Some(0) {
            return Err(Error::usage("kappa.max_dim = 0: expected at least 1"));
        }
        if self.roles.as_ref().is_some_and(Vec::is_empty) {
            return Err(Error::usage(
                "kappa.roles: found none, expected linear, conv, experts, embedding, head or router",
            ));
        }
        Ok(())
    }

    fn found(&self) -> Option<Budget> {
        let mut budgets = [
            self.tensors.map(Budget::Tensors),
            self.fraction.map(Budget::Fraction),
            self.share.map(Budget::Share),
            self.kappa_max.map(Budget::KappaMax),
        ]
        .into_iter()
        .flatten();
        budgets.next()
    }

    /// Its budget; an error where there is none.
    pub fn budget(&self) -> Result<Budget> {
        let budget = self.found();
        budget.ok_or_else(|| {
            Error::usage("kappa: found no budget, expected tensors, fraction, share or kappa_max")
        })
    }

    /// The same with another budget in place of its own.
    pub fn with_budget(mut self, budget: Budget) -> Self {
        (self.tensors, self.fraction, self.share, self.kappa_max) = (None, None, None, None);
        match budget {
            Budget::Tensors(k) => self.tensors = Some(k),
            Budget::Fraction(p) => self.fraction = Some(p),
            Budget::Share(p) => self.share = Some(p),
            Budget::KappaMax(t) => self.kappa_max = Some(t),
        }
        self
    }

    /// Whether units of this role may be taken.
    pub fn wants(&self, role: Role) -> bool {
        let named = match &self.roles {
            Some(roles) => roles.contains(&role),
            None => Role::DEFAULT.contains(&role),
        };
        named || (self.include_embeddings && matches!(role, Role::Embedding | Role::Head))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_read_from_text() {
        for (text, budget) in [
            ("20", Budget::Tensors(20)),
            ("tensors:20", Budget::Tensors(20)),
            ("fraction:0.25", Budget::Fraction(0.25)),
            ("share:0.1", Budget::Share(0.1)),
            ("10%", Budget::Share(0.1)),
            ("kappa:100", Budget::KappaMax(100.0)),
        ] {
            assert_eq!(text.parse::<Budget>().unwrap(), budget, "{text}");
        }
        for text in ["", "0", "-1", "0.5", "share:0", "share:1.5", "kappa:0.5", "kappa:inf", "nan%", "size:3"]
        {
            let error = text.parse::<Budget>().unwrap_err();
            assert_eq!(error.exit_code(), 2, "{text}: {error}");
        }
    }

    #[test]
    fn exactly_one_budget() {
        let none = KappaConfig::default();
        assert_eq!(
            none.check().unwrap_err().to_string(),
            "kappa: found none, expected exactly one of tensors, fraction, share, kappa_max, selection"
        );
        let two = KappaConfig { share: Some(0.1), ..none.clone().with_budget(Budget::Tensors(3)) };
        assert!(two.check().unwrap_err().to_string().contains("tensors and share"));
        assert!(none.clone().with_budget(Budget::Tensors(3)).check().is_ok());
        assert!(KappaConfig { selection: Some("s.json".into()), ..none.clone() }.check().is_ok());
        assert!(none.clone().with_budget(Budget::Share(1.5)).check().is_err());
        assert!(KappaConfig { fit: Fit::Fill, tensors: Some(1), ..none.clone() }.check().is_err());
        assert!(KappaConfig { roles: Some(Vec::new()), tensors: Some(1), ..none }.check().is_err());
        let read: KappaConfig = toml::from_str("share = 0.1\nfit = \"fill\"\nroles = [\"linear\"]").unwrap();
        assert_eq!(read.budget().unwrap(), Budget::Share(0.1));
        assert!(read.wants(Role::Linear) && !read.wants(Role::Conv) && !read.wants(Role::Head));
        assert!(KappaConfig { include_embeddings: true, ..read }.wants(Role::Head));
        assert!(toml::from_str::<KappaConfig>("tensor = 3").is_err());
    }
}
