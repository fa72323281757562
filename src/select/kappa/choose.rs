//! From scores to a selection: filters, order, budget (kappatune.md section 3).

use std::cmp::Ordering;

use super::analyse::Scored;
use super::config::{Budget, Fit, KappaConfig, Normalize, Order, Score};
use crate::random::Random;
use crate::select::matches;
use crate::weights::nearest;
use crate::{Error, Result};

/// What was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Indexes of the chosen units, in the order of selection.
    pub units: Vec<usize>,
    /// Indexes of all candidates, in the same order.
    pub ranked: Vec<usize>,
    /// What is worth a line.
    pub notes: Vec<String>,
}

/// The condition number of a Gaussian matrix `[rows, cols]`: `(1 + sqrt c) / (1 - sqrt c)`, `c` the ratio of its sides
/// (Marchenko and Pastur), up to the 4.7 n of a square one (the geometric mean, after Edelman 1988).
pub fn gaussian_kappa(rows: usize, cols: usize) -> f64 {
    let (n, m) = (rows.min(cols) as f64, rows.max(cols) as f64);
    let root = (n / m).sqrt();
    let square = 4.7 * n;
    if root < 1.0 {
        ((1.0 + root) / (1.0 - root)).min(square)
    } else {
        square
    }
}

/// The deficit of log-volume of a Gaussian matrix `[rows, cols]`: half of `ln m` less the mean logarithm of chi-squared
/// variables of `m, m - 1, ..` degrees of freedom, whose product the squared volume is.
pub fn gaussian_deficit(rows: usize, cols: usize) -> f64 {
    let (n, m) = (rows.min(cols), rows.max(cols));
    // E ln chi^2_k = digamma(k / 2) + ln 2, by its series; k = 1 and 2 in closed form.
    let mean_log = |k: usize| match k {
        1 => -1.270_362_845_461_478,
        2 => 0.115_931_515_658_412_4,
        k => {
            let k = k as f64;
            k.ln() - 1.0 / k - 1.0 / (3.0 * k * k)
        }
    };
    let sum: f64 = (0..n).map(|i| mean_log(m - i)).sum();
    0.5 * ((m as f64).ln() - sum / n.max(1) as f64)
}

/// The score of a unit under `config`; `None` where it has no condition number.
pub fn score(scored: &Scored, config: &KappaConfig) -> Option<f64> {
    let kappa = scored.spectrum.kappa()?;
    let (rows, cols) = (scored.unit.rows, scored.unit.cols);
    let shape = config.normalize == Normalize::Shape;
    Some(match config.score {
        Score::Kappa if shape => kappa / gaussian_kappa(rows, cols),
        Score::Kappa => kappa,
        Score::Logvol if shape => scored.spectrum.deficit / gaussian_deficit(rows, cols),
        Score::Logvol => scored.spectrum.deficit,
    })
}

/// The names of units in their order: the parameter's bytes, then the number of the matrix.
fn by_name(a: &Scored, b: &Scored) -> Ordering {
    a.unit.param.as_bytes().cmp(b.unit.param.as_bytes()).then(a.unit.index.cmp(&b.unit.index))
}

/// Whether a unit of this key, parameter or module is meant by one of the patterns.
fn fits(patterns: &[String], s: &Scored) -> bool {
    let key = s.unit.key();
    let names = [key.as_str(), s.unit.param.as_str(), s.unit.module()];
    patterns.iter().any(|p| names.iter().any(|name| matches(p, name)))
}

/// Whether the filters of `config` let a unit through.
fn allowed(s: &Scored, config: &KappaConfig) -> bool {
    // A vector has condition number 1 by definition, which says nothing of it.
    s.unit.rows.min(s.unit.cols) >= 2
        && config.wants(s.unit.role)
        && config.max_dim.is_none_or(|most| s.unit.rows.max(s.unit.cols) <= most)
        && (config.include.is_empty() || fits(&config.include, s))
        && !fits(&config.exclude, s)
}

/// Indexes of the candidates of `config` among `scored`, in its order, ties by name; none where no unit that its
/// filters let through has a condition number.
///
/// Errs on a pattern that no unit fits.
pub fn rank(scored: &[Scored], config: &KappaConfig, seed: u64) -> Result<Vec<usize>> {
    for pattern in config.include.iter().chain(&config.exclude) {
        let one = std::slice::from_ref(pattern);
        if !scored.iter().any(|s| fits(one, s)) {
            let near = nearest(pattern, scored.iter().map(|s| s.unit.param.as_str()));
            let hint = near.map(|n| format!("; a name here is {n}")).unwrap_or_default();
            return Err(Error::usage(format!("kappa: no unit matches {pattern:?}{hint}")));
        }
    }
    let open = scored.iter().enumerate().filter(|(_, s)| allowed(s, config));
    let mut candidates: Vec<(usize, f64)> = open.filter_map(|(i, s)| Some((i, score(s, config)?))).collect();
    candidates.sort_by(|a, b| by_name(&scored[a.0], &scored[b.0]));
    match config.order {
        // Stable sorts: equal scores stay in the order of names.
        Order::Lowest => candidates.sort_by(|a, b| a.1.total_cmp(&b.1)),
        Order::Highest => candidates.sort_by(|a, b| b.1.total_cmp(&a.1)),
        Order::Random => {
            let draw = Random::new(seed, "kappa", &[]).permutation(candidates.len());
            candidates = draw.into_iter().map(|i| candidates[i as usize]).collect();
        }
    }
    Ok(candidates.into_iter().map(|(i, _)| i).collect())
}

/// Indexes of the units to train, in order of selection; `total_params` are the parameters of the whole model, tied
/// ones once, and `seed` draws the order of the random control.
///
/// Errs where nothing is taken, with the least budget that takes something.
pub fn choose(scored: &[Scored], total_params: usize, config: &KappaConfig, seed: u64) -> Result<Vec<usize>> {
    Ok(choose_with_notes(scored, total_params, config, seed)?.units)
}

/// As [`choose`], with the ranking it was taken from and what is worth a line.
pub fn choose_with_notes(
    scored: &[Scored],
    total_params: usize,
    config: &KappaConfig,
    seed: u64,
) -> Result<Chosen> {
    let budget = config.budget()?;
    let ranked = rank(scored, config, seed)?;
    if ranked.is_empty() {
        let without = scored.iter().filter(|s| allowed(s, config)).count();
        return Err(Error::usage(format!(
            "kappa: no unit is left to choose from: of {} units {without} have no condition number and {} are left out by \
             include, exclude, roles and max_dim",
            scored.len(),
            scored.len() - without
        )));
    }
    let numel = |i: &usize| scored[*i].unit.numel();
    let mut notes = Vec::new();
    let units: Vec<usize> = match budget {
        Budget::Tensors(k) => {
            if k > ranked.len() {
                notes.push(format!(
                    "kappa.tensors = {k}: there are {} candidates, all are taken",
                    ranked.len()
                ));
            }
            ranked.iter().copied().take(k).collect()
        }
        Budget::Fraction(p) => {
            let k = (p * ranked.len() as f64 + 1e-9).floor() as usize;
            ranked.iter().copied().take(k.max(1)).collect()
        }
        Budget::Share(p) => {
            let limit = limit(p, total_params);
            let (mut taken, mut spent) = (Vec::new(), 0usize);
            for i in &ranked {
                if spent + numel(i) <= limit {
                    spent += numel(i);
                    taken.push(*i);
                } else if config.fit == Fit::Prefix {
                    break;
                }
            }
            taken
        }
        Budget::KappaMax(t) => {
            let low = |i: &usize| scored[*i].spectrum.kappa().is_some_and(|kappa| kappa <= t);
            ranked.iter().copied().filter(low).collect()
        }
    };
    if units.is_empty() {
        return Err(too_small(scored, total_params, config, budget, &ranked));
    }
    Ok(Chosen { units, ranked, notes })
}

/// How many of `total` parameters a share is.
fn limit(share: f64, total: usize) -> usize {
    (share * total as f64 + 1e-9).floor() as usize
}

/// `value` with six figures behind the point, and as little above as it takes to be enough.
fn round_up(value: f64, enough: impl Fn(f64) -> bool) -> f64 {
    let mut least = (value * 1e6).ceil() / 1e6;
    while least.is_finite() && !enough(least) {
        least = least.next_up();
    }
    least
}

/// The error of a budget that takes nothing, with the least one that would.
fn too_small(
    scored: &[Scored],
    total_params: usize,
    config: &KappaConfig,
    budget: Budget,
    ranked: &[usize],
) -> Error {
    let kappa = |i: &usize| scored[*i].spectrum.kappa().unwrap_or(f64::INFINITY);
    match budget {
        Budget::KappaMax(t) => {
            let least = ranked.iter().map(kappa).fold(f64::INFINITY, f64::min);
            Error::usage(format!(
                "kappa.kappa_max = {t}: takes no unit, expected at least {}",
                round_up(least, |t| least <= t)
            ))
        }
        Budget::Share(p) => {
            let first = match config.fit {
                Fit::Prefix => ranked.first(),
                Fit::Fill => ranked.iter().min_by_key(|i| scored[**i].unit.numel()),
            };
            let unit = first.map(|i| &scored[*i].unit);
            let (name, numel) = unit.map(|u| (u.key(), u.numel())).unwrap_or_default();
            let total = total_params.max(1);
            let least = round_up(numel as f64 / total as f64, |p| numel <= limit(p, total));
            Error::usage(format!(
                "kappa.share = {p}: takes no unit, expected at least {least}, the {numel} of {total_params} parameters of \
                 {name}"
            ))
        }
        Budget::Tensors(_) | Budget::Fraction(_) => Error::usage("kappa: the budget takes no unit"),
    }
}

/// The largest rank of low-rank adapters on modules of these `(in, out)` sizes whose parameters, `rank (in + out)`
/// each, are at most `params` in all: `match_params` of a recipe.
///
/// Errs where not even rank 1 fits, or there is no module.
pub fn low_rank_for(modules: &[(usize, usize)], params: usize) -> Result<usize> {
    let each: usize = modules.iter().map(|(inner, out)| inner + out).sum();
    if each == 0 {
        return Err(Error::usage("match_params: found no module to adapt"));
    }
    match params / each {
        0 => Err(Error::usage(format!("match_params = {params}: expected at least {each}, those of rank 1"))),
        rank => Ok(rank),
    }
}

#[cfg(test)]
mod tests {
    use super::super::spectrum::{Route, Spectrum, Status};
    use super::super::units::{Kind, Role, Unit};
    use super::*;

    fn unit(param: &str, index: Option<usize>, shape: (usize, usize), kappa: f64) -> Scored {
        let kind = if index.is_some() { Kind::Experts } else { Kind::Matrix };
        let role = if index.is_some() { Role::Experts } else { Role::Linear };
        let sound = kappa > 0.0;
        Scored {
            unit: Unit {
                param: param.into(),
                index,
                role,
                kind,
                rows: shape.0,
                cols: shape.1,
                aliases: Vec::new(),
            },
            spectrum: Spectrum {
                sigma_max: kappa,
                sigma_min: 1.0,
                quotient: kappa,
                log_sum: 0.0,
                frobenius: 1.0,
                deficit: 0.0,
                status: if sound { Status::Ok } else { Status::RankDeficient },
                route: Route::Direct,
                bound: 0.0,
            },
            source: "f32".into(),
            hash: String::new(),
        }
    }

    fn four() -> Vec<Scored> {
        vec![
            unit("b", None, (2, 5), 2.0),
            unit("e", Some(10), (2, 2), 3.0),
            unit("e", Some(9), (2, 2), 3.0),
            unit("a", None, (4, 4), 2.0),
            unit("dead", None, (2, 2), 0.0),
        ]
    }

    fn names(scored: &[Scored], config: &KappaConfig, total: usize) -> Vec<String> {
        choose(scored, total, config, 0).unwrap().iter().map(|i| scored[*i].unit.key()).collect()
    }

    fn budget(text: &str) -> KappaConfig {
        KappaConfig::default().with_budget(text.parse().unwrap())
    }

    #[test]
    fn ascending_with_ties_by_name_and_number() {
        let scored = four();
        assert_eq!(names(&scored, &budget("4"), 34), ["a", "b", "e[9]", "e[10]"]);
        let chosen = choose_with_notes(&scored, 34, &budget("9"), 0).unwrap();
        assert_eq!(chosen.notes, ["kappa.tensors = 9: there are 4 candidates, all are taken"]);
        let highest = KappaConfig { order: Order::Highest, ..budget("3") };
        assert_eq!(names(&scored, &highest, 34), ["e[9]", "e[10]", "a"]);
        let mut turned = scored.clone();
        turned.reverse();
        assert_eq!(names(&turned, &budget("4"), 34), ["a", "b", "e[9]", "e[10]"]);
    }

    #[test]
    fn budgets() {
        let scored = four();
        assert_eq!(names(&scored, &budget("fraction:0.5"), 34), ["a", "b"]);
        assert_eq!(names(&scored, &budget("fraction:0.01"), 34), ["a"]);
        assert_eq!(names(&scored, &budget("kappa:2"), 34), ["a", "b"]);
        // 16 + 10 + 4 of 34: 26 fit, then the first that does not ends it, or is passed over.
        assert_eq!(names(&scored, &budget("share:0.75"), 34), ["a"]);
        let fill = KappaConfig { fit: Fit::Fill, ..budget("share:0.75") };
        assert_eq!(names(&scored, &fill, 34), ["a", "e[9]", "e[10]"]);
        // 0.3 of 10 is a hair below 3 in binary.
        let thirds = [unit("a", None, (3, 1), 1.0), unit("b", None, (3, 2), 1.0)];
        assert!(choose(&thirds, 20, &budget("share:0.3"), 0).is_ok());
    }

    #[test]
    fn what_takes_nothing_says_what_would() {
        let scored = four();
        let message = |config: &KappaConfig| choose(&scored, 34, config, 0).unwrap_err().to_string();
        assert_eq!(
            message(&budget("share:0.1")),
            "kappa.share = 0.1: takes no unit, expected at least 0.470589, the 16 of 34 parameters of a"
        );
        let fill = KappaConfig { fit: Fit::Fill, ..budget("share:0.1") };
        assert!(message(&fill).contains("at least 0.117648, the 4 of 34 parameters of e[9]"));
        assert!(names(&scored, &KappaConfig { share: Some(0.117648), ..fill }, 34).len() == 1);
        assert!(message(&budget("kappa:1.5")).contains("at least 2"));
        let none = KappaConfig { roles: Some(vec![Role::Conv]), ..budget("1") };
        assert!(message(&none).contains("no unit is left"), "{}", message(&none));
        let idle = KappaConfig { include: vec!["a.*".into()], ..budget("1") };
        assert!(message(&idle).contains("no unit matches \"a.*\""));
        let ok = KappaConfig { include: vec!["e".into()], exclude: vec!["e[[]9]".into()], ..budget("1") };
        assert!(choose(&scored, 34, &ok, 0).is_err());
        let ok = KappaConfig { include: vec!["e".into()], exclude: vec!["*9]".into()], ..budget("3") };
        assert_eq!(names(&scored, &ok, 34), ["e[10]"]);
    }

    /// What is said to be the least budget is one, to the last digit that is said.
    #[test]
    fn what_would_take_something_does() {
        let least = |scored: &[Scored], total, config: &KappaConfig| -> f64 {
            let error = choose(scored, total, config, 0).unwrap_err().to_string();
            let (_, rest) = error.split_once("expected at least ").unwrap();
            rest.split(',').next().unwrap().parse().unwrap()
        };
        let mut random = Random::new(0, "least", &[]);
        for _ in 0..200 {
            let kappa = 10f64.powf(2.0 + 11.0 * f64::from(random.uniform()));
            let scored = [unit("a", None, (3, 7), kappa)];
            let enough = least(&scored, 21, &budget("kappa:1"));
            assert!(enough >= kappa && enough <= kappa * (1.0 + 2e-8), "{kappa} {enough}");
            assert!(choose(&scored, 21, &budget(&format!("kappa:{enough}")), 0).is_ok(), "{kappa} {enough}");
            // A model of up to 1e17 parameters.
            let total = 10f64.powf(3.0 + 14.0 * f64::from(random.uniform())) as usize;
            let scored = [unit("a", None, (total / 7, 3), 2.0)];
            let enough = least(&scored, total, &KappaConfig { share: Some(1e-9), ..KappaConfig::default() });
            let config = KappaConfig { share: Some(enough), ..KappaConfig::default() };
            assert!(choose(&scored, total, &config, 0).is_ok(), "{total} {enough}");
        }
    }

    #[test]
    fn without_a_condition_number_there_is_a_ranking_of_none() {
        let dead = [unit("dead", None, (2, 2), 0.0), unit("gone", None, (3, 2), 0.0)];
        assert_eq!(rank(&dead, &budget("1"), 0).unwrap(), [0usize; 0]);
        assert!(choose(&dead, 10, &budget("1"), 0).unwrap_err().to_string().contains("of 2 units 2 have no"));
        let idle = KappaConfig { include: vec!["none".into()], ..budget("1") };
        assert!(rank(&dead, &idle, 0).is_err());
    }

    #[test]
    fn random_orders_follow_the_seed_and_not_the_order_of_the_units() {
        let scored: Vec<Scored> =
            (0..20).map(|i| unit(&format!("u{i:02}"), None, (2, 2), f64::from(i) + 1.0)).collect();
        let config = KappaConfig { order: Order::Random, ..budget("8") };
        let draw = |scored: &[Scored], seed| -> Vec<String> {
            let chosen = choose(scored, 80, &config, seed).unwrap();
            chosen.iter().map(|i| scored[*i].unit.key()).collect()
        };
        let mut turned = scored.clone();
        turned.reverse();
        assert_eq!(draw(&scored, 1), draw(&turned, 1));
        assert_ne!(draw(&scored, 1), draw(&scored, 2));
    }

    #[test]
    fn plain_quotients_order_as_the_published_selector_does() {
        // diag(3, 1), diag(2, 1), diag(10, 4): 3, 2, 2.5.
        let scored = [
            unit("m.0.weight", None, (2, 2), 3.0 / 1.0),
            unit("m.1.weight", None, (2, 2), 2.0 / 1.0),
            unit("m.2.weight", None, (2, 2), 10.0 / 4.0),
        ];
        assert_eq!(names(&scored, &budget("3"), 12), ["m.1.weight", "m.2.weight", "m.0.weight"]);
    }

    #[test]
    fn scores_against_a_gaussian_of_the_shape() {
        assert!((gaussian_kappa(4, 1) - 3.0).abs() < 1e-12);
        assert!((gaussian_kappa(100, 400) - 3.0).abs() < 1e-12);
        assert_eq!(gaussian_kappa(512, 512), 4.7 * 512.0);
        assert!(gaussian_kappa(512, 513) <= 4.7 * 512.0);
        // One by one: ln |x| of a normal number has mean -0.6352, half of that of its square.
        assert!((gaussian_deficit(1, 1) - 0.635_181_422_730_739).abs() < 1e-12);
        let tall = unit("t", None, (400, 100), 4.0);
        let square = unit("s", None, (100, 100), 400.0);
        let config = KappaConfig { normalize: Normalize::Shape, ..budget("1") };
        assert_eq!(names(&[tall.clone(), square.clone()], &config, 50_000), ["s"]);
        assert_eq!(names(&[tall, square], &budget("1"), 50_000), ["t"]);
        let mut uneven = unit("o", None, (4, 4), 3.0);
        uneven.spectrum.deficit = 0.25;
        let logvol = KappaConfig { score: Score::Logvol, ..budget("1") };
        assert_eq!(score(&uneven, &logvol), Some(0.25));
        let shaped = KappaConfig { normalize: Normalize::Shape, ..logvol };
        assert_eq!(score(&uneven, &shaped), Some(0.25 / gaussian_deficit(4, 4)));
    }

    #[test]
    fn ranks_that_match_a_number_of_parameters() {
        assert_eq!(low_rank_for(&[(8, 8), (12, 8)], 36 * 5 + 35).unwrap(), 5);
        let error = low_rank_for(&[(8, 8)], 15).unwrap_err().to_string();
        assert_eq!(error, "match_params = 15: expected at least 16, those of rank 1");
        assert!(low_rank_for(&[], 15).is_err());
    }
}
