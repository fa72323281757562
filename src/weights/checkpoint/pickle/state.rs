//! The model's tensors in what a checkpoint holds: the values of a state_dict, at the top or under the
//! key that training programs give it.

use super::super::shown;
use super::machine::{Heap, Object, TensorView, Value};
use std::collections::HashSet;

/// Where a state_dict lies in a training checkpoint, the trained weights before their running mean.
const WRAPPERS: [&str; 9] = [
    "model",
    "state_dict",
    "model_state_dict",
    "model_state",
    "module",
    "net",
    "model_ema",
    "state_dict_ema",
    "ema",
];

/// What wrappers of a model put before every name.
const PREFIXES: [&str; 2] = ["module.", "_orig_mod."];

/// A state_dict.
pub(super) struct State<'h, 'a> {
    /// Names, and the tensors in their order.
    pub(super) tensors: Vec<(String, &'h TensorView<'a>)>,
    /// One line for what was chosen or left out.
    pub(super) notes: Vec<String>,
}

/// Finds the state_dict in the value of a whole checkpoint.
pub(super) fn find<'h, 'a>(heap: &'h Heap<'a>, whole: Value<'a>) -> Result<State<'h, 'a>, String> {
    let expected = "expected a state_dict: names and their tensors";
    let top = match heap.object(whole) {
        Some(Object::Dict(items)) => items,
        Some(Object::Opaque(class)) => {
            let class = shown(&format!("{}.{}", class.module, class.name));
            return Err(format!("found an object of {class}, {expected}; save its state_dict() instead"));
        }
        Some(Object::Tensor(_)) => return Err(format!("found a single tensor, {expected}")),
        _ => return Err(format!("found neither a dict nor a tensor, {expected}")),
    };
    let mut notes = Vec::new();
    let mut items = top;
    for wrapper in WRAPPERS {
        let under = top.iter().rev().find(|(key, _)| *key == Value::Text(wrapper));
        let Some((_, value)) = under else { continue };
        if let Some(Object::Dict(inner)) = heap.object(*value) {
            if inner.iter().any(|(_, value)| tensor(heap, *value).is_some()) {
                let others = top.iter().filter(|(key, _)| *key != Value::Text(wrapper)).map(|(key, _)| *key);
                let beside = listed(others);
                let beside = if beside.is_empty() { beside } else { format!(", beside it {beside}") };
                notes.push(format!("tensors read from {wrapper:?}{beside}"));
                items = inner;
                break;
            }
        }
    }
    let mut tensors = Vec::new();
    let mut left = Vec::new();
    let mut seen = HashSet::new();
    for (key, value) in items {
        match (key, tensor(heap, *value)) {
            (Value::Text(name), Some(view)) => {
                if !seen.insert(*name) {
                    return Err(format!("tensor {}: found listed twice", shown(name)));
                }
                tensors.push((*name, view));
            }
            _ => left.push(*key),
        }
    }
    if tensors.is_empty() {
        return Err(format!(
            "found a dict of {} without a tensor, {expected}",
            listed(items.iter().map(|i| i.0))
        ));
    }
    if !left.is_empty() {
        notes.push(format!("not tensors, left unread: {}", listed(left.into_iter())));
    }
    // Wrappers come one in another, in any order.
    let on_all = |tensors: &[(&str, _)], prefix: &str| {
        let fits = |name: &str| name.len() > prefix.len() && name.starts_with(prefix);
        !tensors.is_empty() && tensors.iter().all(|(name, _)| fits(name))
    };
    while let Some(prefix) = PREFIXES.iter().find(|prefix| on_all(&tensors, prefix)) {
        tensors.iter_mut().for_each(|(name, _)| *name = &name[prefix.len()..]);
    }
    let tensors = tensors.into_iter().map(|(name, view)| (name.to_string(), view)).collect();
    Ok(State { tensors, notes })
}

fn tensor<'h, 'a>(heap: &'h Heap<'a>, value: Value<'a>) -> Option<&'h TensorView<'a>> {
    match heap.object(value) {
        Some(Object::Tensor(view)) => Some(view),
        _ => None,
    }
}

/// Keys for a message, the first of many.
fn listed<'a>(keys: impl Iterator<Item = Value<'a>>) -> String {
    const SHOWN: usize = 6;
    let mut names = Vec::new();
    let mut more = 0;
    for key in keys {
        match key {
            _ if names.len() == SHOWN => more += 1,
            Value::Text(name) => names.push(shown(name)),
            Value::Int(n) => names.push(n.to_string()),
            _ => names.push("a key that is no text".to_string()),
        }
    }
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{rest}", names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::super::machine;
    use super::super::testing::{global, pickle, text, view, Py};
    use super::*;

    fn one() -> Py {
        view("FloatStorage", 0, 1, 0, &[1], &[1])
    }

    /// Names and notes, or the error.
    fn found(value: &Py) -> Result<(Vec<String>, Vec<String>), String> {
        let bytes = pickle(value);
        let (heap, whole) = machine::read(&bytes).unwrap();
        let state = find(&heap, whole)?;
        Ok((state.tensors.into_iter().map(|(name, _)| name).collect(), state.notes))
    }

    #[test]
    fn the_model_is_found_among_what_training_keeps() {
        let state = Py::Ordered(vec![(text("module.b"), one()), (text("module.a"), one())]);
        let names = ["b", "a"].map(String::from).to_vec();
        assert_eq!(found(&state).unwrap(), (names.clone(), vec![]));
        let args = Py::Call(Box::new(global("argparse", "Namespace")), vec![]);
        let checkpoint = Py::Dict(vec![
            (text("epoch"), Py::Int(3)),
            (text("model_ema"), Py::Ordered(vec![(text("c"), one())])),
            (text("best"), one()),
            (text("model"), state),
            (text("args"), Py::Built(Box::new(args), Box::new(Py::Dict(vec![])))),
        ]);
        let (got, notes) = found(&checkpoint).unwrap();
        assert_eq!(got, names);
        assert_eq!(notes, [r#"tensors read from "model", beside it epoch, model_ema, best, args"#]);
        // A prefix that not all share belongs to the names, and what is no tensor is told.
        let mixed = [("module.a", one()), ("b", one()), ("n", Py::Int(1))];
        let mixed = Py::Dict(mixed.map(|(name, value)| (text(name), value)).to_vec());
        let (got, notes) = found(&mixed).unwrap();
        assert_eq!(got, ["module.a", "b"]);
        assert_eq!(notes, ["not tensors, left unread: n"]);
    }

    #[test]
    fn what_is_no_state_dict_is_named() {
        let refused = |value: Py, expected: &str| {
            let error = found(&value).unwrap_err();
            assert!(error.contains(expected) && !error.contains('\n'), "{error:?} lacks {expected:?}");
        };
        refused(Py::Int(3), "neither a dict nor a tensor");
        refused(one(), "a single tensor");
        refused(Py::Dict(vec![(text("epoch"), Py::Int(3))]), "a dict of epoch without a tensor");
        let net = Py::Call(Box::new(global("my.nets", "Net")), vec![]);
        refused(net, "an object of my.nets.Net, expected a state_dict");
        refused(Py::Dict(vec![(text("a"), one()), (text("a"), one())]), "tensor a: found listed twice");
    }
}
