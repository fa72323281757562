//! Which weights a rule is for: patterns over checkpoint names.

pub mod bits;
pub mod kappa;

pub use bits::SelectBits;

use crate::weights::nearest;
use crate::{Error, Result};

/// Whether `name` fits `pattern`, in which `*` stands for any run of characters, dots included, and
/// `{a,b}` for one of the texts between the commas.
pub fn matches(pattern: &str, name: &str) -> bool {
    if let Some((head, (choices, tail))) =
        pattern.split_once('{').and_then(|(head, rest)| Some((head, rest.split_once('}')?)))
    {
        return choices.split(',').any(|choice| matches(&format!("{head}{choice}{tail}"), name));
    }
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| name.strip_prefix(first)) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.len() >= last.len() && rest.ends_with(last)
}

/// The names that fit any of `patterns`, in the order of `names`. A pattern that nothing fits is an
/// error that lists a near name.
pub fn select<'a>(patterns: &[String], names: &[&'a str]) -> Result<Vec<&'a str>> {
    if let Some(idle) = patterns.iter().find(|p| !names.iter().any(|n| matches(p, n))) {
        let near = nearest(idle, names.iter().copied()).or(names.first().copied());
        let hint = near.map(|n| format!("; a name here is {n}")).unwrap_or_default();
        return Err(Error::usage(format!("targets: no weight matches {idle:?}{hint}")));
    }
    Ok(names.iter().copied().filter(|n| patterns.iter().any(|p| matches(p, n))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_any_run() {
        for (pattern, name, fits) in [
            ("a.b", "a.b", true),
            ("a.b", "a.b.c", false),
            ("a*", "a.b.c", true),
            ("*.c", "a.b.c", true),
            ("*.layer.*.query.weight", "vit.encoder.layer.3.attention.query.weight", true),
            ("*.layer.*.query.weight", "vit.encoder.layer.3.attention.key.weight", false),
            ("ab*ba", "aba", false),
            ("a*b*c", "a.c.b", false),
            ("*", "", true),
            ("*.{dense,reduction}.weight", "a.reduction.weight", true),
            ("*.{dense,reduction}.weight", "a.norm.weight", false),
            ("{a,b}.{c,}", "b.", true),
            ("a{b", "a{b", true),
        ] {
            assert_eq!(matches(pattern, name), fits, "{pattern} {name}");
        }
    }

    #[test]
    fn order_is_that_of_the_names_and_idle_patterns_are_errors() {
        let names = ["x.query.weight", "x.key.weight", "x.bias"];
        let found = select(&["*key*".into(), "*query*".into()], &names).unwrap();
        assert_eq!(found, ["x.query.weight", "x.key.weight"]);
        let error = select(&["*key*".into(), "x.keys.weight".into()], &names).unwrap_err();
        assert!(error.to_string().contains("x.keys.weight") && error.to_string().contains("x.key.weight"));
    }
}
