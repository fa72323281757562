//! A tokenizer as GGUF holds it: `tokenizer.ggml.*`.
//!
//! Two kinds of byte-pair encoding are known there. `gpt2` works on bytes and lists its merges; how text is
//! cut before is a name (`tokenizer.ggml.pre`) that stands for a rule built into llama.cpp. `llama`, as
//! SentencePiece made it, has scores in place of merges: of two neighbours that make a token, those of the
//! highest score are joined first, so that minus the rank of a merge is its token's score.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_json::Value as Json;

use super::header::Value;
use crate::data::text::Tokenizer;
use crate::{Error, Result};

// The types of tokens.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// What the file says of a model without a tokenizer.
pub(super) fn none() -> Vec<(String, Value)> {
    vec![("tokenizer.ggml.model".into(), Value::Text("none".into()))]
}

/// Keys of a header with their values.
pub(super) type Entries = Vec<(String, Value)>;

/// What the file says of a tokenizer whose model has `rows` tokens, and what is worth a line.
///
/// Errs on a tokenizer that is no byte-pair encoding.
pub(super) fn metadata(tokenizer: &Tokenizer, rows: usize) -> Result<(Entries, Vec<String>)> {
    let json = tokenizer.to_json()?;
    let model = Bpe::read(tokenizer.source(), &json)?;
    let mut notes = Vec::new();
    let mut entries = Vec::new();
    let mut put = |key: &str, value: Value| entries.push((format!("tokenizer.ggml.{key}"), value));
    let (tokens, types) = model.tokens(&json, rows);
    match model.bytes {
        true => {
            let pre = pre_tokenizer(&json).unwrap_or_else(|| {
                notes.push(
                    "tokenizer: cut by a rule that llama.cpp may not have, written as \"default\": compare its tokens with qtune data's"
                        .into(),
                );
                "default"
            });
            put("model", Value::Text("gpt2".into()));
            put("pre", Value::Text(pre.into()));
        }
        false => {
            put("model", Value::Text("llama".into()));
            put("pre", Value::Text("default".into()));
            put("scores", Value::F32s(model.scores(&tokens)));
        }
    }
    put("tokens", Value::Texts(tokens));
    put("token_type", Value::I32s(types));
    match model.bytes {
        true => {
            let merges = model.merges.iter().map(|(a, b)| format!("{a} {b}")).collect();
            put("merges", Value::Texts(merges));
        }
        false => put("add_space_prefix", Value::Bool(spaced(&json))),
    }
    let ids = [
        ("bos_token_id", tokenizer.bos()),
        ("eos_token_id", tokenizer.eos().first().copied()),
        ("unknown_token_id", model.unknown.as_deref().and_then(|t| tokenizer.id_of(t))),
        ("padding_token_id", tokenizer.pad()),
    ];
    for (key, id) in ids {
        if let Some(id) = id {
            put(key, Value::U32(id));
        }
    }
    put("add_bos_token", Value::Bool(tokenizer.adds_bos()));
    let eos = tokenizer.eos().first().copied();
    let ends = eos.is_some() && tokenizer.encode("", true)?.last().copied() == eos;
    put("add_eos_token", Value::Bool(ends));
    if let Some((_, template)) = tokenizer.chat_template() {
        entries.push(("tokenizer.chat_template".into(), Value::Text(template.to_string())));
    }
    Ok((entries, notes))
}

/// A byte-pair encoding of a tokenizer.json.
struct Bpe {
    /// Token by id.
    vocab: BTreeMap<usize, String>,
    merges: Vec<(String, String)>,
    unknown: Option<String>,
    /// Over bytes spelled as characters, not over characters.
    bytes: bool,
}

impl Bpe {
    fn read(source: &Path, json: &Json) -> Result<Self> {
        let model = json.get("model").unwrap_or(&Json::Null);
        let kind = model.get("type").and_then(Json::as_str).unwrap_or("none");
        if kind != "BPE" {
            let message =
                format!("found a tokenizer of kind {kind}, expected BPE, the one kind that is exported");
            return Err(Error::input(source, message));
        }
        let wrong = |what: &str| Error::input(source, format!("model.{what}: not as expected of BPE"));
        let listed = model.get("vocab").and_then(Json::as_object).ok_or_else(|| wrong("vocab"))?;
        let mut vocab = BTreeMap::new();
        for (token, id) in listed {
            let id = id.as_u64().and_then(|id| usize::try_from(id).ok()).ok_or_else(|| wrong("vocab"))?;
            vocab.insert(id, token.clone());
        }
        let mut merges = Vec::new();
        for merge in model.get("merges").and_then(Json::as_array).into_iter().flatten() {
            let pair = match merge {
                Json::String(text) => text.split_once(' ').map(|(a, b)| (a.to_string(), b.to_string())),
                Json::Array(pair) => match pair.as_slice() {
                    [Json::String(a), Json::String(b)] => Some((a.clone(), b.clone())),
                    _ => None,
                },
                _ => None,
            };
            merges.push(pair.ok_or_else(|| wrong("merges"))?);
        }
        let unknown = model.get("unk_token").and_then(Json::as_str).map(str::to_string);
        let bytes =
            steps(json, "pre_tokenizer").chain(steps(json, "decoder")).any(|s| kind_of(s) == "ByteLevel");
        Ok(Bpe { vocab, merges, unknown, bytes })
    }

    /// Text and type of each of `rows` tokens; ids that no token has are unused.
    fn tokens(&self, json: &Json, rows: usize) -> (Vec<String>, Vec<i32>) {
        let mut added: HashMap<usize, (&str, bool)> = HashMap::new();
        for token in json.get("added_tokens").and_then(Json::as_array).into_iter().flatten() {
            let id = token.get("id").and_then(Json::as_u64).and_then(|id| usize::try_from(id).ok());
            if let (Some(id), Some(text)) = (id, token.get("content").and_then(Json::as_str)) {
                let special = token.get("special").and_then(Json::as_bool).unwrap_or(false);
                added.insert(id, (text, special));
            }
        }
        let of = |id: usize| -> (String, i32) {
            let known = self.vocab.get(&id).map(String::as_str);
            let unknown = |text: &str| !self.bytes && self.unknown.as_deref() == Some(text);
            match (added.get(&id).copied(), known) {
                (Some((text, _)), _) | (None, Some(text)) if unknown(text) => (text.to_string(), UNKNOWN),
                (Some((text, true)), _) => (text.to_string(), CONTROL),
                (Some((text, false)), _) => (text.to_string(), USER_DEFINED),
                (None, Some(text)) if !self.bytes && is_byte(text) => (text.to_string(), BYTE),
                (None, Some(text)) => (text.to_string(), NORMAL),
                (None, None) => (format!("[PAD{id}]"), UNUSED),
            }
        };
        (0..rows).map(of).unzip()
    }

    /// Minus the rank of the first merge that makes a token; what no merge makes follows, in order of ids.
    fn scores(&self, tokens: &[String]) -> Vec<f32> {
        let mut ranks: HashMap<String, usize> = HashMap::new();
        for (rank, (a, b)) in self.merges.iter().enumerate() {
            ranks.entry(format!("{a}{b}")).or_insert(rank);
        }
        let mut next = self.merges.len();
        let mut score = |token: &String| match ranks.get(token) {
            Some(rank) => -(*rank as f32),
            None => {
                next += 1;
                -((next - 1) as f32)
            }
        };
        tokens.iter().map(&mut score).collect()
    }
}

/// `<0x0A>` and its like.
fn is_byte(token: &str) -> bool {
    let hex = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    hex.is_some_and(|hex| hex.len() == 2 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
}

fn kind_of(step: &Json) -> &str {
    step.get("type").and_then(Json::as_str).unwrap_or_default()
}

/// The steps of a part of the tokenizer, those of a sequence one by one.
fn steps<'a>(json: &'a Json, part: &str) -> Box<dyn Iterator<Item = &'a Json> + 'a> {
    let Some(part) = json.get(part).filter(|p| !p.is_null()) else { return Box::new(std::iter::empty()) };
    let inside =
        ["normalizers", "pretokenizers", "decoders"].iter().find_map(|key| part.get(key)?.as_array());
    match inside {
        Some(steps) => Box::new(steps.iter()),
        None => Box::new(std::iter::once(part)),
    }
}

/// Whether a space is put before a text.
fn spaced(json: &Json) -> bool {
    let prepends = steps(json, "normalizer").any(|step| kind_of(step) == "Prepend");
    let metaspace = steps(json, "pre_tokenizer").any(|step| {
        let never = step.get("prepend_scheme").and_then(Json::as_str) == Some("never");
        kind_of(step) == "Metaspace" && !never
    });
    prepends || metaspace
}

/// llama.cpp's name of the rule that cuts text before bytes are merged.
fn pre_tokenizer(json: &Json) -> Option<&'static str> {
    let steps: Vec<&Json> = steps(json, "pre_tokenizer").collect();
    let kinds: Vec<&str> = steps.iter().map(|step| kind_of(step)).collect();
    let own_rule = |step: &Json| step.get("use_regex").and_then(Json::as_bool).unwrap_or(true);
    match (kinds.as_slice(), steps.as_slice()) {
        (["ByteLevel"], [level]) if own_rule(level) => Some("gpt-2"),
        (["Digits", "ByteLevel"], [digits, level]) if own_rule(level) => {
            let single = digits.get("individual_digits").and_then(Json::as_bool) == Some(true);
            single.then_some("smollm")
        }
        (["Split", "ByteLevel"], [split, level]) if !own_rule(level) => {
            let rule = split.get("pattern").and_then(|p| p.get("Regex")).and_then(Json::as_str)?;
            // Contractions, words, runs of digits, signs, line ends: the rules differ in the digits.
            let shared =
                rule.starts_with("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}");
            match (shared, rule.contains("\\p{N}{1,3}|")) {
                (true, true) => Some("llama-bpe"),
                (true, false) if rule.contains("\\p{L}+|\\p{N}|") => Some("qwen2"),
                _ => None,
            }
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pieces() -> Json {
        json!({
            "added_tokens": [
                {"id": 0, "content": "<unk>", "special": true}, {"id": 1, "content": "<s>", "special": true},
                {"id": 7, "content": "<tool>", "special": false},
            ],
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]},
            "pre_tokenizer": null, "decoder": {"type": "ByteFallback"},
            "model": {
                "type": "BPE", "unk_token": "<unk>",
                "vocab": {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "▁ab": 3, "ab": 4, "a": 5, "b": 6},
                "merges": [["a", "b"], ["▁", "ab"], ["▁a", "b"]],
            },
        })
    }

    #[test]
    fn tokens_types_and_scores_by_hand() {
        let json = pieces();
        let bpe = Bpe::read(Path::new("tokenizer.json"), &json).unwrap();
        assert!(!bpe.bytes);
        let (tokens, types) = bpe.tokens(&json, 9);
        assert_eq!(tokens, ["<unk>", "<s>", "<0x0A>", "▁ab", "ab", "a", "b", "<tool>", "[PAD8]"]);
        assert_eq!(types, [UNKNOWN, CONTROL, BYTE, NORMAL, NORMAL, NORMAL, NORMAL, USER_DEFINED, UNUSED]);
        // ▁ab is made by the second merge and by the third: the first that makes it counts.
        assert_eq!(bpe.scores(&tokens), [-3.0, -4.0, -5.0, -1.0, 0.0, -6.0, -7.0, -8.0, -9.0]);
        assert!(spaced(&json));
        let plain = json!({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"}});
        assert!(!spaced(&plain));
    }

    #[test]
    fn what_is_no_byte_pair_encoding_is_refused() {
        let refused = |json: Json, words: &[&str]| {
            let error = Bpe::read(Path::new("t.json"), &json).err().unwrap().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        };
        refused(json!({"model": {"type": "Unigram"}}), &["t.json", "kind Unigram", "expected BPE"]);
        refused(json!({"model": {"type": "BPE", "vocab": {"a": -1}}}), &["model.vocab"]);
        refused(json!({"model": {"type": "BPE", "vocab": {}, "merges": [["a"]]}}), &["model.merges"]);
    }

    #[test]
    fn rules_of_cutting_are_known_by_their_pattern() {
        let split = |digits: &str| {
            let rule = format!(
                "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|{digits}| ?[^\\s\\p{{L}}\\p{{N}}]+"
            );
            json!({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": rule}}, {"type": "ByteLevel", "use_regex": false}]}})
        };
        assert_eq!(pre_tokenizer(&split("\\p{N}{1,3}")), Some("llama-bpe"));
        assert_eq!(pre_tokenizer(&split("\\p{N}")), Some("qwen2"));
        assert_eq!(pre_tokenizer(&split("\\p{N}{2}")), None);
        assert_eq!(pre_tokenizer(&json!({"pre_tokenizer": {"type": "ByteLevel"}})), Some("gpt-2"));
        assert_eq!(pre_tokenizer(&json!({"pre_tokenizer": {"type": "ByteLevel", "use_regex": false}})), None);
        let digits = json!({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true}, {"type": "ByteLevel"}]}});
        assert_eq!(pre_tokenizer(&digits), Some("smollm"));
    }

    #[test]
    fn bytes_have_merges_and_no_scores() {
        let (entries, notes) = metadata(&Tokenizer::bytes().unwrap(), 300).unwrap();
        let of = |key: &str| {
            let key = format!("tokenizer.ggml.{key}");
            entries.iter().find(|(k, _)| *k == key).map(|(_, v)| v.clone())
        };
        assert_eq!(of("model"), Some(Value::Text("gpt2".into())));
        assert_eq!(of("merges"), Some(Value::Texts(Vec::new())));
        assert_eq!(of("scores"), None);
        assert_eq!((of("bos_token_id"), of("eos_token_id")), (Some(Value::U32(256)), Some(Value::U32(257))));
        assert_eq!(
            (of("add_bos_token"), of("add_eos_token")),
            (Some(Value::Bool(true)), Some(Value::Bool(false)))
        );
        let Some(Value::Texts(tokens)) = of("tokens") else { panic!("no tokens") };
        assert_eq!((tokens.len(), tokens[256].as_str(), tokens[299].as_str()), (300, "<s>", "[PAD299]"));
        assert!(notes[0].contains("default"), "{notes:?}");
    }
}
