//! Text that needs no files: two little tasks for the embedded model.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{json, Map, Value};

use super::records::Row;
use crate::random::Random;

/// How many distinct records a built-in set has, the held-out tenth included.
const RECORDS: usize = 4000;

/// Text made by rules, the same for the same seed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Builtin {
    /// Letters to put in order: `sort: dbca -> abcd`, three to five letters from `a` to `h`. The answer
    /// follows from the prompt alone, so a model that has understood predicts it without loss.
    #[default]
    Sorting,
    /// Two or three plain sentences of a small grammar, some two hundred words in all: what the embedded
    /// base model was trained on.
    Grammar,
}

impl Builtin {
    /// The name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Builtin::Sorting => "sorting",
            Builtin::Grammar => "grammar",
        }
    }

    /// Distinct records, in a random order of `seed`'s.
    pub(super) fn rows(self, seed: u64) -> Vec<Row> {
        let file: Arc<Path> = Path::new(match self {
            Builtin::Sorting => "built-in sorting",
            Builtin::Grammar => "built-in grammar",
        })
        .into();
        let mut seen = HashSet::new();
        let mut rows = Vec::with_capacity(RECORDS);
        let mut draw = 0;
        while rows.len() < RECORDS {
            let mut random = Random::new(seed, self.name(), &[draw]);
            draw += 1;
            let (key, value) = match self {
                Builtin::Sorting => sorting(&mut random),
                Builtin::Grammar => {
                    let sentences: Vec<String> =
                        (0..2 + random.below(2)).map(|_| sentence(&mut random)).collect();
                    let text = sentences.join(" ");
                    (text.clone(), json!({"text": text}))
                }
            };
            if seen.insert(key) {
                let value: Map<String, Value> = value.as_object().cloned().unwrap_or_default();
                rows.push(Row { file: file.clone(), unit: "record", number: rows.len() + 1, value });
            }
        }
        rows
    }
}

fn sorting(random: &mut Random) -> (String, Value) {
    let letter = |random: &mut Random| b'a' + random.below(8) as u8;
    let mut letters: Vec<u8> = (0..3 + random.below(3)).map(|_| letter(random)).collect();
    let spelled = |letters: &[u8]| letters.iter().map(|&b| char::from(b)).collect::<String>();
    let prompt = format!("sort: {} -> ", spelled(&letters));
    letters.sort_unstable();
    let value = json!({"prompt": prompt, "completion": spelled(&letters)});
    (prompt, value)
}

const BEINGS: [&str; 24] = [
    "cat", "dog", "bird", "fox", "girl", "boy", "farmer", "teacher", "king", "queen", "horse", "mouse",
    "bear", "duck", "baker", "sailor", "singer", "rabbit", "wolf", "cook", "child", "nurse", "painter",
    "goat",
];
const THINGS: [&str; 20] = [
    "ball", "book", "apple", "stone", "basket", "letter", "coat", "lamp", "drum", "boat", "key", "cup",
    "flower", "hat", "map", "box", "bell", "cake", "chair", "ring",
];
const QUALITIES: [&str; 20] = [
    "small", "old", "red", "quiet", "happy", "tall", "brave", "young", "kind", "tired", "green", "clever",
    "big", "sad", "white", "gentle", "proud", "new", "strange", "blue",
];
const PLACES: [&str; 14] = [
    "in the garden",
    "by the river",
    "near the house",
    "under the tree",
    "on the hill",
    "at the market",
    "in the forest",
    "behind the barn",
    "by the sea",
    "in the kitchen",
    "on the road",
    "at the school",
    "near the bridge",
    "in the field",
];
const TIMES: [&str; 8] = [
    "In the morning",
    "At night",
    "After lunch",
    "One day",
    "In the winter",
    "Before dinner",
    "In the summer",
    "Every day",
];
/// Verbs of one being alone: with it in the singular, and with several.
const ALONE: [(&str, &str); 12] = [
    ("sleeps", "sleep"),
    ("runs", "run"),
    ("waits", "wait"),
    ("sings", "sing"),
    ("dances", "dance"),
    ("smiles", "smile"),
    ("rests", "rest"),
    ("walks", "walk"),
    ("plays", "play"),
    ("works", "work"),
    ("sits", "sit"),
    ("laughs", "laugh"),
];
/// Verbs of a being and a thing or another being.
const UPON: [(&str, &str); 16] = [
    ("sees", "see"),
    ("finds", "find"),
    ("likes", "like"),
    ("wants", "want"),
    ("helps", "help"),
    ("knows", "know"),
    ("carries", "carry"),
    ("follows", "follow"),
    ("brings", "bring"),
    ("loves", "love"),
    ("watches", "watch"),
    ("paints", "paint"),
    ("hears", "hear"),
    ("keeps", "keep"),
    ("needs", "need"),
    ("draws", "draw"),
];
const JOINS: [&str; 5] = ["and", "but", "because", "while", "so"];

fn pick<T: Copy>(random: &mut Random, list: &[T]) -> Option<T> {
    list.get(random.below(list.len() as u32) as usize).copied()
}

fn word(random: &mut Random, list: &[&'static str]) -> &'static str {
    pick(random, list).unwrap_or_default()
}

/// `the old farmer`, or in the plural `the old farmers`.
fn noun(random: &mut Random, list: &[&'static str], plural: bool) -> String {
    let quality = random.chance(0.5).then(|| word(random, QUALITIES.as_slice()));
    let name = match word(random, list) {
        "mouse" if plural => "mice".to_string(),
        "child" if plural => "children".to_string(),
        "wolf" if plural => "wolves".to_string(),
        name if plural && name.ends_with(['x', 's']) => format!("{name}es"),
        name if plural => format!("{name}s"),
        name => name.to_string(),
    };
    let first = quality.unwrap_or(&name).to_string();
    let article = match (plural, random.chance(0.6)) {
        (_, true) => "the ",
        (true, false) => "two ",
        (false, false) if first.starts_with(['a', 'e', 'i', 'o', 'u']) => "an ",
        (false, false) => "a ",
    };
    match quality {
        Some(quality) => format!("{article}{quality} {name}"),
        None => format!("{article}{name}"),
    }
}

fn clause(random: &mut Random) -> String {
    let plural = random.chance(0.3);
    let subject = noun(random, &BEINGS, plural);
    let form = |(one, many): (&'static str, &'static str)| if plural { many } else { one };
    if random.chance(0.4) {
        let verb = pick(random, &ALONE).map(form).unwrap_or_default();
        return match random.chance(0.7) {
            true => format!("{subject} {verb} {}", word(random, &PLACES)),
            false => format!("{subject} {verb}"),
        };
    }
    let verb = pick(random, &UPON).map(form).unwrap_or_default();
    let list: &[&'static str] = if random.chance(0.6) { &THINGS } else { &BEINGS };
    let several = random.chance(0.2);
    format!("{subject} {verb} {}", noun(random, list, several))
}

fn sentence(random: &mut Random) -> String {
    let mut text = clause(random);
    if random.chance(0.3) {
        text = format!("{text} {} {}", word(random, &JOINS), clause(random));
    }
    if random.chance(0.2) {
        text = format!("{}, {text}", word(random, &TIMES));
    }
    let mut rest = text.chars();
    let first = rest.next().map(|c| c.to_ascii_uppercase());
    first.into_iter().chain(rest).chain(['.']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distinct_repeatable_and_right() {
        let rows = Builtin::Sorting.rows(0);
        assert_eq!(rows.len(), RECORDS);
        for row in &rows {
            let field = |key: &str| row.value[key].as_str().unwrap().to_string();
            let prompt = field("prompt");
            let letters = prompt.strip_prefix("sort: ").and_then(|p| p.strip_suffix(" -> ")).unwrap();
            let mut sorted: Vec<char> = letters.chars().collect();
            sorted.sort_unstable();
            assert_eq!(field("completion"), sorted.into_iter().collect::<String>());
        }
        let texts = |seed| {
            Builtin::Grammar.rows(seed).iter().map(|r| r.value["text"].to_string()).collect::<Vec<_>>()
        };
        assert_eq!(texts(1), texts(1));
        assert_ne!(texts(1), texts(2));
        assert_eq!(texts(1).iter().collect::<HashSet<_>>().len(), RECORDS);
        for text in texts(1) {
            assert!(
                text.is_ascii() && text.ends_with(".\"") && !text.contains("  ") && text.len() < 400,
                "{text}"
            );
        }
    }
}
