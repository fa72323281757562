//! CLASSP (Ludwig 2024, arXiv 2405.09637): entries move only where their gradient is large enough, and the
//! less the more they were moved before; the arithmetic is [`kernels::classp_step`].
//!
//! Each trainable has one number beside every entry, the sum S of |g|^p over the steps in which the entry
//! moved. It is never cleared: it is what remembers the tasks before. Power 2 and threshold 0 make AdaGrad of
//! it, with epsilon inside the root.

use candle_core::{DType, Device, Tensor};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

#[cfg(feature = "cuda")]
use super::{one_launch, Move};
use super::{stored, tokens, Optimizer};
#[cfg(feature = "cuda")]
use crate::kernels::cuda::{Moved, Together};
use crate::kernels::{self, ClasspParams, GradSum, Passed, Test};
use crate::select::matches;
use crate::weights::{Param, Role};
use crate::{Error, On, Result};

/// Which of two rules is followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClasspMode {
    /// The paper's: each entry is tested by itself, S adds |g|^p.
    #[default]
    Paper,
    /// The released code's: a tensor moves as a whole or not at all, S adds |g|. To compare with published
    /// figures.
    Reference,
}

impl ClasspMode {
    /// As recipes and files spell it.
    pub fn name(self) -> &'static str {
        match self {
            ClasspMode::Paper => "paper",
            ClasspMode::Reference => "reference",
        }
    }
}

/// What holds on the first task alone. `{ scaling = false, threshold = T }` is the schedule of the published
/// runs on images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FirstTask {
    /// Whether steps are divided by the root of S. None: as later.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scaling: Option<bool>,
    /// What the square of a gradient must exceed. None: as later.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
}

/// `[[optimizer.group]]`: settings of the trainables that `targets` match, on every task. Of several groups
/// that match the first counts; what a group does not set is as the optimizer has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClasspGroup {
    /// Patterns of names, `*` for any run of characters, `{a,b}` for one of several.
    pub targets: Vec<String>,
    /// What the square of a gradient must exceed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
    /// Added to S within the root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epsilon: Option<f64>,
    /// The power of S and of its root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub power: Option<f64>,
    /// Whether steps are divided by the root of S.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scaling: Option<bool>,
    /// Factor on the learning rate.
    #[serde(default = "one")]
    pub lr: f64,
}

fn one() -> f64 {
    1.0
}

/// Settings of [`Classp`]. The learning rate is about the length of an entry's first step, where its
/// gradient is large beside epsilon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClasspConfig {
    /// The rule.
    pub mode: ClasspMode,
    /// What the square of a gradient of the mean loss of a step must exceed for its entry to move, 0 or
    /// more; at 0 any gradient but 0 does.
    pub threshold: f64,
    /// The power p, 0.25 to 8: the smaller, the faster steps shrink.
    pub power: f64,
    /// Added to S within the root, above 0.
    pub epsilon: f64,
    /// Whether steps are divided by the p-th root of epsilon + S.
    pub scaling: bool,
    /// Decay of the entries that move, scaled as their gradient is.
    pub weight_decay: f64,
    /// Patterns of parameters without weight decay.
    pub no_decay: Vec<String>,
    /// A threshold of each tensor's own in place of `threshold`, an extension of ours: the mean over its
    /// first steps of this quantile of the squared gradients. Until then it does not move.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threshold_quantile: Option<f64>,
    /// The steps over which that is measured.
    pub quantile_steps: usize,
    /// What holds on the first task alone. None: the same on all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first: Option<FirstTask>,
    /// `[[optimizer.group]]`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub group: Vec<ClasspGroup>,
}

impl Default for ClasspConfig {
    fn default() -> Self {
        ClasspConfig {
            mode: ClasspMode::Paper,
            threshold: 0.0,
            power: 1.0,
            epsilon: 1e-5,
            scaling: true,
            weight_decay: 0.0,
            no_decay: tokens(),
            threshold_quantile: None,
            quantile_steps: 50,
            first: None,
            group: Vec::new(),
        }
    }
}

impl ClasspConfig {
    /// What the types cannot hold.
    pub(super) fn check(&self) -> Result<()> {
        let threshold = |t: &f64| t.is_finite() && *t >= 0.0;
        let power = |p: &f64| (0.25..=8.0).contains(p);
        let above = |e: &f64| e.is_finite() && *e > 0.0;
        let mut wrong = Vec::new();
        let mut see = |key: String, value: Option<f64>, fits: &dyn Fn(&f64) -> bool, what: &'static str| {
            wrong.extend(value.filter(|v| !fits(v)).map(|v| (key, v, what)));
        };
        let (at_least, between, more) = ("0 or more", "0.25 to 8", "more than 0");
        see("threshold".into(), Some(self.threshold), &threshold, at_least);
        see("power".into(), Some(self.power), &power, between);
        see("epsilon".into(), Some(self.epsilon), &above, more);
        see("first.threshold".into(), self.first.and_then(|f| f.threshold), &threshold, at_least);
        let share = |q: &f64| *q > 0.0 && *q < 1.0;
        see("threshold_quantile".into(), self.threshold_quantile, &share, "above 0 and below 1");
        for (i, group) in self.group.iter().enumerate() {
            let key = |name: &str| format!("group.{i}.{name}");
            see(key("threshold"), group.threshold, &threshold, at_least);
            see(key("power"), group.power, &power, between);
            see(key("epsilon"), group.epsilon, &above, more);
            see(key("lr"), Some(group.lr), &threshold, at_least);
        }
        if let Some((key, value, what)) = wrong.first() {
            return Err(Error::usage(format!("optimizer.{key} = {value}: expected {what}")));
        }
        if let Some(i) = self.group.iter().position(|group| group.targets.is_empty()) {
            return Err(Error::usage(format!("optimizer.group.{i}.targets: found none, expected patterns")));
        }
        self.check_rate(0.0)?;
        if self.threshold_quantile.is_some() {
            if self.threshold > 0.0 || self.first.is_some_and(|f| f.threshold.is_some()) {
                let message = "optimizer.threshold_quantile and a threshold: expected one of them";
                return Err(Error::usage(message));
            }
            if self.mode == ClasspMode::Reference {
                let message =
                    "optimizer.threshold_quantile: of single entries, which mode = \"reference\" does not test";
                return Err(Error::usage(message));
            }
            if self.quantile_steps == 0 {
                return Err(Error::usage("optimizer.quantile_steps = 0: expected at least 1"));
            }
        }
        Ok(())
    }

    /// Errs where f32 cannot hold epsilon, its root, or a learning rate `lr` divided by the root: what the
    /// step of a small gradient is computed with.
    pub(super) fn check_rate(&self, lr: f64) -> Result<()> {
        let groups = self.group.iter().enumerate().map(|(i, group)| {
            let key = match group.epsilon {
                Some(_) => format!("group.{i}.epsilon"),
                None => "epsilon".to_string(),
            };
            let power = group.power.unwrap_or(self.power);
            (key, group.epsilon.unwrap_or(self.epsilon), power, lr * group.lr)
        });
        let own = ("epsilon".to_string(), self.epsilon, self.power, lr);
        for (key, epsilon, power, lr) in std::iter::once(own).chain(groups) {
            let root = epsilon.powf(1.0 / power);
            let held = f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX);
            if let Some(found) = [epsilon, root].into_iter().find(|x| !held.contains(x)) {
                return Err(Error::usage(format!(
                    "optimizer.{key} = {epsilon:e}: found {found:.1e} at power {power}, expected what f32 holds"
                )));
            }
            let rate = lr / root;
            if rate > *held.end() {
                return Err(Error::usage(format!(
                    "optimizer.{key} = {epsilon:e}: a learning rate of {lr:e} by its root at power {power} is {rate:.1e}, \
                     expected what f32 holds"
                )));
            }
        }
        Ok(())
    }

    fn group_of(&self, param: &Param) -> Option<&ClasspGroup> {
        self.group.iter().find(|g| g.targets.iter().any(|pattern| matches(pattern, &param.name)))
    }

    /// The power that holds for a parameter: what its S is a sum of.
    pub fn power_of(&self, param: &Param) -> f64 {
        self.group_of(param).and_then(|group| group.power).unwrap_or(self.power)
    }

    /// Whether a parameter's threshold is measured.
    fn measures(&self, param: &Param) -> bool {
        let own = self.group_of(param).and_then(|group| group.threshold);
        self.threshold_quantile.is_some() && own.is_none() && param.role == Role::Plain
    }

    /// The settings of a step of `param` on task number `task`, counted from 0.
    fn settings(&self, param: &Param, task: u32, lr: f64, decay: bool) -> ClasspParams {
        let group = self.group_of(param);
        let first = self.first.filter(|_| task == 0).unwrap_or_default();
        // The gradient of an activation's step sums over thousands of entries: no threshold means the same
        // to it.
        let threshold = match param.role {
            Role::ActivationStep => 0.0,
            Role::Plain => group.and_then(|g| g.threshold).or(first.threshold).unwrap_or(self.threshold),
        };
        ClasspParams {
            lr: lr * group.map_or(1.0, |g| g.lr),
            threshold,
            epsilon: group.and_then(|g| g.epsilon).unwrap_or(self.epsilon),
            power: self.power_of(param),
            scaling: group.and_then(|g| g.scaling).or(first.scaling).unwrap_or(self.scaling),
            weight_decay: if decay { self.weight_decay } else { 0.0 },
            test: match self.mode {
                ClasspMode::Paper => Test::Entry,
                ClasspMode::Reference => Test::Tensor,
            },
        }
    }

    /// What is worth a line before training `params` with the gradient clipped to norm `clip` (0: not).
    pub fn notes(&self, clip: f64, params: &[Param]) -> Vec<String> {
        let mut notes = Vec::new();
        if self.mode == ClasspMode::Reference {
            notes.push(
                "optimizer.mode = \"reference\": the released code's rule, which moves whole tensors; the paper's is \
                 mode = \"paper\""
                    .into(),
            );
        }
        let count: usize = params.iter().map(|p| p.var.elem_count()).sum();
        let typical = clip * clip / count.max(1) as f64;
        let threshold = self.first.and_then(|f| f.threshold).unwrap_or(0.0).max(self.threshold);
        if clip > 0.0 && typical < threshold && self.mode == ClasspMode::Paper {
            notes.push(format!(
                "optimizer.threshold = {threshold}: gradients clipped to norm {clip} over {count} entries have squares \
                 of {typical:.1e} on the mean, few of which pass"
            ));
        }
        notes
    }
}

/// What is known of one parameter.
#[derive(Debug)]
struct Entry {
    sum: GradSum,
    /// The total of the quantiles measured so far, and of how many steps.
    measured: (f64, usize),
    /// Entries that moved in its last step.
    passed: Passed,
}

/// The rule: the sums of each parameter, and the number of the task.
#[derive(Debug)]
pub struct Classp {
    config: ClasspConfig,
    task: u32,
    entries: IndexMap<String, Entry>,
    #[cfg(feature = "cuda")]
    together: Together,
}

/// The name of the task's number among the state.
pub(super) const TASK: &str = "classp#task";

impl Classp {
    /// On the first task, with sums of zero.
    pub fn new(config: ClasspConfig) -> Self {
        Classp {
            config,
            task: 0,
            entries: IndexMap::new(),
            #[cfg(feature = "cuda")]
            together: Together::default(),
        }
    }

    /// Sees that there is a sum.
    fn begin(&mut self, param: &Param) -> Result<()> {
        if !self.entries.contains_key(&param.name) {
            let var = &param.var;
            let sum = GradSum::zeros(var.shape(), var.dtype(), var.device()).on(&param.name)?;
            let entry = Entry { sum, measured: (0.0, 0), passed: Passed::Known(0) };
            self.entries.insert(param.name.clone(), entry);
        }
        Ok(())
    }
}

/// The `q` quantile of the squares of `grad`, by nearest rank, in f64.
fn quantile_of_squares(grad: &Tensor, q: f64) -> Result<f64> {
    let flat = grad.detach().to_dtype(DType::F64)?.to_device(&Device::Cpu)?.flatten_all()?;
    let mut squares: Vec<f64> = flat.to_vec1::<f64>()?.into_iter().map(|g| g * g).collect();
    if squares.is_empty() {
        return Ok(0.0);
    }
    let rank = ((q * squares.len() as f64).ceil() as usize).clamp(1, squares.len());
    let (_, value, _) = squares.select_nth_unstable_by(rank - 1, f64::total_cmp);
    Ok(*value)
}

impl Optimizer for Classp {
    fn update(&mut self, param: &Param, grad: &Tensor, lr: f64, decay: bool) -> Result<()> {
        let var = &param.var;
        if !matches!(var.dtype(), DType::F32 | DType::F64) {
            let message =
                format!("found {:?}, expected master weights in f32: classp has no others", var.dtype());
            return Err(Error::tensor(&param.name, message));
        }
        let mut settings = self.config.settings(param, self.task, lr, decay);
        self.begin(param)?;
        let Some(entry) = self.entries.get_mut(&param.name) else { return Ok(()) };
        if let Some(q) = self.config.threshold_quantile.filter(|_| self.config.measures(param)) {
            let (total, steps) = &mut entry.measured;
            if *steps < self.config.quantile_steps {
                *total += quantile_of_squares(grad, q)?;
                *steps += 1;
                entry.passed = Passed::Known(0);
                return Ok(());
            }
            settings.threshold = *total / *steps as f64;
        }
        entry.passed =
            kernels::classp_step_counted(var.as_tensor(), grad, &mut entry.sum, &settings).on(&param.name)?;
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn update_all(&mut self, moves: &[Move<'_>], clip: f64) -> Result<Option<Tensor>> {
        if !one_launch(moves) {
            return Ok(None);
        }
        for m in moves {
            self.begin(m.param)?;
        }
        let mut settings = Vec::with_capacity(moves.len());
        let (mut moved, mut factors) = (Vec::with_capacity(moves.len()), Vec::with_capacity(6 * moves.len()));
        for Move { param, grad, lr, decay, free } in moves {
            let Some(entry) = self.entries.get(&param.name) else { return Ok(None) };
            let Some(sum) = entry.sum.on_device() else { return Ok(None) };
            let mut own = self.config.settings(param, self.task, *lr, *decay);
            if self.config.measures(param) {
                let (total, steps) = entry.measured;
                // What is measured is read on the CPU.
                if steps < self.config.quantile_steps {
                    return Ok(None);
                }
                own.threshold = total / steps as f64;
            }
            factors.extend(own.words());
            settings.push(own);
            let state = [Some(sum), None];
            moved.push(Moved { weight: param.var.as_tensor(), grad, state, free: *free });
        }
        let rule = ClasspParams::rule(&settings);
        let left = self.together.run(rule, &moved, &factors, Some(clip))?;
        for (i, m) in moves.iter().enumerate() {
            if let (Some(entry), Some(passed)) = (self.entries.get_mut(&m.param.name), &left.passed) {
                entry.passed = Passed::Listed(passed.clone(), i);
            }
        }
        Ok(left.norms)
    }

    fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = vec![(TASK.to_string(), Tensor::new(&[self.task], &Device::Cpu)?)];
        for (name, entry) in &self.entries {
            tensors.push((format!("{name}#grad_sum"), stored(&entry.sum.export()?)?));
            if self.config.threshold_quantile.is_some() {
                let (total, steps) = entry.measured;
                let measured = Tensor::new(&[total, steps as f64], &Device::Cpu)?;
                tensors.push((format!("{name}#measured"), measured));
            }
        }
        Ok(tensors)
    }

    fn retain(&mut self, params: &[Param]) {
        self.entries.retain(|name, _| params.iter().any(|p| p.name == *name));
    }

    fn restore(&mut self, params: &[Param], read: &dyn Fn(&str) -> Result<Tensor>) -> Result<()> {
        self.task = read(TASK)?.flatten_all()?.get(0)?.to_scalar::<u32>()?;
        for Param { name, var, .. } in params {
            let sum = read(&format!("{name}#grad_sum"))?.to_device(var.device())?;
            if sum.dims() != var.dims() || sum.dtype() != var.dtype() {
                return Err(Error::tensor(
                    format!("{name}#grad_sum"),
                    format!(
                        "found {:?} in {:?}, expected {:?} in {:?}",
                        sum.dims(),
                        sum.dtype(),
                        var.dims(),
                        var.dtype()
                    ),
                ));
            }
            let mut measured = (0.0, 0);
            if self.config.threshold_quantile.is_some() {
                let stored = read(&format!("{name}#measured"))?.flatten_all()?.to_vec1::<f64>()?;
                if let [total, steps] = stored[..] {
                    measured = (total, steps as usize);
                }
            }
            let entry = Entry { sum: GradSum::import(&sum).on(name)?, measured, passed: Passed::Known(0) };
            self.entries.insert(name.clone(), entry);
        }
        Ok(())
    }

    fn next_task(&mut self) {
        self.task += 1;
        self.entries.values_mut().for_each(|entry| entry.passed = Passed::Known(0));
    }

    /// Percent of the entries that moved in the last step, the mean of S, percent of the entries whose S is
    /// above zero: the signs that a threshold is in a sensible range.
    fn figures(&self) -> Vec<(&'static str, f64)> {
        let sums: Vec<&GradSum> = self.entries.values().map(|entry| &entry.sum).collect();
        // A device that fails here fails the next step too, which says so.
        let figures = kernels::classp_figures(&sums).unwrap_or_default();
        let passed = Passed::total(self.entries.values().map(|entry| &entry.passed)).unwrap_or_default();
        let count: usize = sums.iter().map(|sum| sum.shape().elem_count()).sum();
        let total: f64 = figures.iter().map(|figures| figures.total).sum();
        let touched: usize = figures.iter().map(|figures| figures.touched).sum();
        let share = |n: usize| 100.0 * n as f64 / count.max(1) as f64;
        vec![
            ("passing", share(passed)),
            ("mean_grad_sum", total / count.max(1) as f64),
            ("touched", share(touched)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    fn param(name: &str, values: &[f32], role: Role) -> Param {
        Param { name: name.into(), var: Var::new(values, &Device::Cpu).unwrap(), role }
    }

    fn grad(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    fn values(param: &Param) -> Vec<f32> {
        param.var.to_vec1().unwrap()
    }

    #[test]
    fn the_first_task_has_its_own_settings_and_the_sums_stay() {
        let first = Some(FirstTask { scaling: Some(false), threshold: Some(0.25) });
        let config = ClasspConfig { first, epsilon: 1.0, ..ClasspConfig::default() };
        let mut rule = Classp::new(config.clone());
        let w = param("w", &[0.0, 0.0], Role::Plain);
        rule.update(&w, &grad(&[1.0, 0.25]), 0.5, true).unwrap();
        // The second entry is below the threshold; the first moves by lr g.
        assert_eq!(values(&w), [-0.5, 0.0]);
        rule.next_task();
        let state = rule.state().unwrap();
        let read = |name: &str| Ok(state.iter().find(|(n, _)| n == name).unwrap().1.clone());
        let mut again = Classp::new(config);
        again.restore(std::slice::from_ref(&w), &read).unwrap();
        again.update(&w, &grad(&[1.0, 0.25]), 0.5, true).unwrap();
        // S = 1 + 1 and 0.25: steps of 0.5 / 3 and 0.5 * 0.25 / 1.25
        assert_eq!(values(&w), [-0.5 - 0.5 / 3.0, -0.5 / 1.25 * 0.25]);
    }

    #[test]
    fn groups_do_not_leak_and_activation_steps_always_pass() {
        let group = |name: &str, threshold, power, lr| ClasspGroup {
            targets: vec![name.into()],
            threshold,
            epsilon: None,
            power,
            scaling: Some(false),
            lr,
        };
        let config = ClasspConfig {
            threshold: 4.0,
            scaling: false,
            group: vec![group("a", Some(0.0), None, 0.5), group("b", None, Some(2.0), 1.0)],
            ..ClasspConfig::default()
        };
        let mut rule = Classp::new(config.clone());
        let params = ["a", "b", "c", "step"]
            .map(|name| param(name, &[0.0], if name == "step" { Role::ActivationStep } else { Role::Plain }));
        for p in &params {
            rule.update(p, &grad(&[1.5]), 1.0, true).unwrap();
        }
        let moved: Vec<f32> = params.iter().map(|p| values(p)[0]).collect();
        assert_eq!(moved, [-0.75, 0.0, 0.0, -1.5]);
        for p in &params {
            rule.update(p, &grad(&[3.0]), 1.0, true).unwrap();
        }
        let sums: Vec<f32> =
            rule.entries.values().map(|e| e.sum.export().unwrap().to_vec1().unwrap()[0]).collect();
        assert_eq!(sums, [4.5, 9.0, 3.0, 4.5]);
        assert_eq!((config.power_of(&params[0]), config.power_of(&params[1])), (1.0, 2.0));
    }

    #[test]
    fn a_threshold_is_measured_before_anything_moves_and_is_kept() {
        let config = ClasspConfig {
            threshold_quantile: Some(0.5),
            quantile_steps: 2,
            scaling: false,
            ..ClasspConfig::default()
        };
        let mut rule = Classp::new(config.clone());
        let w = param("w", &[0.0; 4], Role::Plain);
        // The second of four squares: 4, then 16. The mean is 10.
        for g in [[1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0]] {
            rule.update(&w, &grad(&g), 1.0, true).unwrap();
            assert_eq!(values(&w), [0.0; 4]);
        }
        let state = rule.state().unwrap();
        let read = |name: &str| Ok(state.iter().find(|(n, _)| n == name).unwrap().1.clone());
        let mut again = Classp::new(config);
        again.restore(std::slice::from_ref(&w), &read).unwrap();
        again.update(&w, &grad(&[1.0, 3.0, 3.5, 4.0]), 1.0, true).unwrap();
        assert_eq!(values(&w), [0.0, 0.0, -3.5, -4.0]);
        let figures = again.figures();
        assert_eq!(figures, [("passing", 50.0), ("mean_grad_sum", 7.5 / 4.0), ("touched", 50.0)]);
    }

    #[test]
    fn half_precision_without_a_master_copy_is_refused() {
        let var = Var::zeros(2, DType::BF16, &Device::Cpu).unwrap();
        let p = Param { name: "layer.weight".into(), var: var.clone(), role: Role::Plain };
        let mut rule = Classp::new(ClasspConfig::default());
        let error = rule.update(&p, var.as_tensor(), 0.1, true).unwrap_err().to_string();
        assert!(error.contains("layer.weight") && error.contains("BF16") && error.contains("f32"), "{error}");
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let wrong = |change: &dyn Fn(&mut ClasspConfig)| {
            let mut config = ClasspConfig::default();
            change(&mut config);
            config.check().unwrap_err().to_string()
        };
        assert!(wrong(&|c| c.power = 9.0).contains("optimizer.power = 9"));
        assert!(wrong(&|c| c.power = 0.2).contains("0.25 to 8"));
        assert!(wrong(&|c| c.epsilon = 0.0).contains("optimizer.epsilon = 0"));
        assert!(wrong(&|c| c.threshold = f64::NAN).contains("optimizer.threshold"));
        assert!(wrong(&|c| c.threshold_quantile = Some(1.0)).contains("threshold_quantile = 1"));
        let group = ClasspGroup {
            targets: vec!["*".into()],
            threshold: Some(-1.0),
            epsilon: None,
            power: None,
            scaling: None,
            lr: 1.0,
        };
        assert!(wrong(&|c| c.group = vec![group.clone()]).contains("group.0.threshold = -1"));
        let both = wrong(&|c| (c.threshold_quantile, c.threshold) = (Some(0.5), 0.1));
        assert!(both.contains("expected one of them"), "{both}");
        assert!(ClasspConfig::default().check().is_ok());
    }

    #[test]
    fn an_epsilon_that_f32_cannot_divide_by_is_refused() {
        let of = |epsilon, power| ClasspConfig { epsilon, power, ..ClasspConfig::default() };
        let said = |config: ClasspConfig| config.check().unwrap_err().to_string();
        // 1e-10 to the fourth, then 1e-46 itself.
        let text = said(of(1e-10, 0.25));
        assert!(text.starts_with("optimizer.epsilon = 1e-10: ") && text.contains("power 0.25"), "{text}");
        assert!(said(of(1e-46, 8.0)).contains("found 1.0e-46 at power 8"));
        assert!(said(of(1e10, 0.25)).contains("expected what f32 holds"));
        let config = of(1e-9, 0.25);
        config.check().unwrap();
        config.check_rate(1e2).unwrap();
        let text = config.check_rate(1e3).unwrap_err().to_string();
        assert!(
            text.contains("a learning rate of 1e3") && text.contains("expected what f32 holds"),
            "{text}"
        );
        let group = ClasspGroup {
            targets: vec!["*".into()],
            threshold: None,
            epsilon: Some(1e-10),
            power: Some(0.25),
            scaling: None,
            lr: 1.0,
        };
        let grouped = ClasspConfig { group: vec![group], ..ClasspConfig::default() };
        assert!(said(grouped).starts_with("optimizer.group.0.epsilon = 1e-10: "));
    }

    #[test]
    fn notes_on_what_seldom_passes_and_on_the_released_rule() {
        let w = param("w", &[0.0; 100], Role::Plain);
        let of = |mode, threshold, clip| {
            ClasspConfig { mode, threshold, ..ClasspConfig::default() }.notes(clip, std::slice::from_ref(&w))
        };
        assert!(of(ClasspMode::Paper, 0.005, 1.0).is_empty() && of(ClasspMode::Paper, 0.5, 0.0).is_empty());
        assert!(of(ClasspMode::Paper, 0.02, 1.0)[0].contains("0.02"));
        assert!(of(ClasspMode::Reference, 0.5, 1.0)[0].contains("whole tensors"));
    }
}
