//! Other tokenizer files as what a tokenizer.json would say: SentencePiece models, llama2.c's, GPT-2's
//! and WordPiece vocabularies.
//!
//! SentencePiece's BPE joins the neighbours whose union has the best score. A list of merges says the
//! same when it holds, for each piece, every way to cut it into two pieces, in the order of the scores.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{json, Map, Value};
use tokenizers::normalizers::{Precompiled, Sequence};
use tokenizers::NormalizerWrapper;

use super::tokenizer::from_json;
use crate::{files, Error, Result};

/// What a piece is for, by SentencePiece's numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Byte,
}

#[derive(Clone, Debug)]
struct Piece {
    text: String,
    score: f32,
    kind: Kind,
}

/// A vocabulary of pieces and how text is prepared for it.
struct Pieces {
    list: Vec<Piece>,
    unigram: bool,
    /// Whether a space is put before the text.
    dummy_prefix: bool,
    /// Whether runs of spaces count as one.
    squeeze: bool,
    /// The compiled map of characters, of a unigram model.
    charsmap: Vec<u8>,
    bos: Option<usize>,
}

/// The mark that stands for a space.
const SPACE: &str = "\u{2581}";

/// One entry of `added_tokens` in a tokenizer.json.
pub(super) fn added_token(text: &str, id: usize) -> Value {
    json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true})
}

/// The post-processor that puts one token before every text.
pub(super) fn template_processing(token: &str, id: usize) -> Value {
    let special = |kind: u8| json!({"SpecialToken": {"id": token, "type_id": kind}});
    let sequence = |id: &str, kind: u8| json!({"Sequence": {"id": id, "type_id": kind}});
    json!({
        "type": "TemplateProcessing",
        "single": [special(0), sequence("A", 0)],
        "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    })
}

/// The tokenizer of a llama2.c file: the longest piece's length (i32), then for each piece its score
/// (f32), its length in bytes (i32) and its bytes, all little-endian.
pub(super) fn from_llama2c(file: &Path, bytes: &[u8]) -> Result<tokenizers::Tokenizer> {
    let mut list = Vec::new();
    let mut rest = bytes.get(4..).ok_or_else(|| Error::input(file, "4 bytes of header expected"))?;
    while !rest.is_empty() {
        let id = list.len();
        let short = || Error::input(file, format!("token {id}: the file ends within it"));
        let (head, body) = rest.split_at_checked(8).ok_or_else(short)?;
        let word = |i: usize| [head[i], head[i + 1], head[i + 2], head[i + 3]];
        let (score, length) = (f32::from_le_bytes(word(0)), i32::from_le_bytes(word(4)));
        let length = usize::try_from(length).map_err(|_| {
            Error::input(
                file,
                format!("token {id}: found a length of {length}, is this a llama2.c tokenizer?"),
            )
        })?;
        let (text, after) = body.split_at_checked(length).ok_or_else(short)?;
        rest = after;
        let text = std::str::from_utf8(text)
            .map_err(|_| Error::input(file, format!("token {id}: its {length} bytes are not UTF-8")))?;
        let is_byte = text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
        let (text, kind) = match id {
            0 => ("<unk>".to_string(), Kind::Unknown),
            // The file has line feeds around these two, for printing.
            1 => ("<s>".to_string(), Kind::Control),
            2 => ("</s>".to_string(), Kind::Control),
            _ if is_byte => (text.to_string(), Kind::Byte),
            _ => (text.replace(' ', SPACE), Kind::Normal),
        };
        list.push(Piece { text, score, kind });
    }
    if list.len() < 3 {
        return Err(Error::input(file, format!("found {} tokens, expected 3 or more", list.len())));
    }
    let pieces = Pieces {
        list,
        unigram: false,
        dummy_prefix: true,
        squeeze: false,
        charsmap: Vec::new(),
        bos: Some(1),
    };
    pieces.tokenizer(file)
}

/// The tokenizer of a SentencePiece model, of type BPE or unigram.
pub(super) fn from_sentencepiece(file: &Path, bytes: &[u8]) -> Result<tokenizers::Tokenizer> {
    let mut pieces = Pieces {
        list: Vec::new(),
        unigram: true, // the default of the format
        dummy_prefix: true,
        squeeze: true,
        charsmap: Vec::new(),
        bos: Some(1),
    };
    for field in fields(file, bytes)? {
        match field {
            (1, Field::Bytes(piece)) => {
                let id = pieces.list.len();
                pieces.list.push(read_piece(file, id, piece)?);
            }
            (2, Field::Bytes(trainer)) => {
                for field in fields(file, trainer)? {
                    match field {
                        (3, Field::Number(1)) => {}
                        (3, Field::Number(2)) => pieces.unigram = false,
                        (3, Field::Number(n)) => {
                            let found = format!("a SentencePiece model of type {n}");
                            return Err(Error::input(
                                file,
                                format!("{found}, expected 1 (unigram) or 2 (BPE)"),
                            ));
                        }
                        // -1, a varint of ten bytes, says that there is none.
                        (41, Field::Number(n)) => {
                            pieces.bos = i32::try_from(n as i64).ok().and_then(|n| n.try_into().ok())
                        }
                        _ => {}
                    }
                }
            }
            (3, Field::Bytes(normalizer)) => {
                for field in fields(file, normalizer)? {
                    match field {
                        (2, Field::Bytes(map)) => pieces.charsmap = map.to_vec(),
                        (3, Field::Number(n)) => pieces.dummy_prefix = n != 0,
                        (4, Field::Number(n)) => pieces.squeeze = n != 0,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    if pieces.list.is_empty() {
        return Err(Error::input(file, "no pieces found, expected a SentencePiece model"));
    }
    pieces.tokenizer(file)
}

fn read_piece(file: &Path, id: usize, bytes: &[u8]) -> Result<Piece> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: Kind::Normal };
    for field in fields(file, bytes)? {
        match field {
            (1, Field::Bytes(text)) => {
                let text = std::str::from_utf8(text);
                piece.text =
                    text.map_err(|_| Error::input(file, format!("piece {id}: not UTF-8")))?.to_string();
            }
            (2, Field::Word(word)) => piece.score = f32::from_le_bytes(word),
            (3, Field::Number(n)) => {
                piece.kind = match n {
                    2 => Kind::Unknown,
                    3 => Kind::Control,
                    4 => Kind::UserDefined,
                    6 => Kind::Byte,
                    _ => Kind::Normal,
                }
            }
            _ => {}
        }
    }
    Ok(piece)
}

impl Pieces {
    fn tokenizer(&self, file: &Path) -> Result<tokenizers::Tokenizer> {
        let mut seen: HashMap<&str, usize> = HashMap::new();
        for (id, piece) in self.list.iter().enumerate() {
            if let Some(first) = seen.insert(&piece.text, id) {
                let text = &piece.text;
                return Err(Error::input(file, format!("tokens {first} and {id} are both {text:?}")));
            }
        }
        let added: Vec<Value> = self
            .list
            .iter()
            .enumerate()
            .filter(|(_, p)| matches!(p.kind, Kind::Unknown | Kind::Control | Kind::UserDefined))
            .map(|(id, p)| {
                let mut token = added_token(&p.text, id);
                token["special"] = json!(p.kind != Kind::UserDefined);
                token
            })
            .collect();
        let unknown = self.list.iter().position(|p| p.kind == Kind::Unknown);
        let bytes = self.list.iter().filter(|p| p.kind == Kind::Byte).count() == 256;
        let bos = self.bos.and_then(|id| Some((id, &self.list.get(id)?.text)));
        let space = json!({"String": " "});
        let prepend = json!({"type": "Prepend", "prepend": SPACE});
        let replace = json!({"type": "Replace", "pattern": space, "content": SPACE});
        let (normalizer, pre_tokenizer, model) = match self.unigram {
            true => {
                let vocab: Vec<Value> = self.list.iter().map(|p| json!([p.text, p.score])).collect();
                let model =
                    json!({"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": bytes});
                let scheme = if self.dummy_prefix { "always" } else { "never" };
                let words = json!({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": true});
                (Value::Null, words, model)
            }
            false => {
                let steps = if self.dummy_prefix { vec![prepend, replace] } else { vec![replace] };
                let vocab: Map<String, Value> =
                    self.list.iter().enumerate().map(|(id, p)| (p.text.clone(), json!(id))).collect();
                let model = json!({
                    "type": "BPE", "dropout": null, "unk_token": unknown.map(|id| &self.list[id].text),
                    "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
                    "byte_fallback": bytes, "ignore_merges": false, "vocab": vocab,
                    "merges": self.merges(&seen),
                });
                (json!({"type": "Sequence", "normalizers": steps}), Value::Null, model)
            }
        };
        let strip = if self.dummy_prefix { 1 } else { 0 };
        let value = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": bos.map(|(id, text)| template_processing(text, id)),
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": strip, "stop": 0},
            ]},
            "model": model,
        });
        let mut tokenizer = from_json(file, &value)?;
        let mut steps: Vec<NormalizerWrapper> = Vec::new();
        if self.unigram && !self.charsmap.is_empty() {
            let map = Precompiled::from(&self.charsmap)
                .map_err(|e| Error::input(file, format!("its map of characters: {e}")))?;
            steps.push(map.into());
        }
        if self.unigram && self.squeeze {
            let runs = json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "});
            let runs = serde_json::from_value::<NormalizerWrapper>(runs);
            steps.push(runs.map_err(|e| Error::input(file, e.to_string()))?);
        }
        if !steps.is_empty() {
            tokenizer
                .with_normalizer(Some(Sequence::new(steps)))
                .map_err(|e| Error::input(file, e.to_string()))?;
        }
        Ok(tokenizer)
    }

    /// Every cut of every piece into two pieces, the best scores first; of equal scores the lower id.
    fn merges(&self, ids: &HashMap<&str, usize>) -> Vec<(&str, &str)> {
        let normal = |text: &str| {
            let id = *ids.get(text)?;
            (self.list.get(id)?.kind == Kind::Normal).then_some(id)
        };
        let mut found: Vec<(f32, usize, usize, usize, &str, &str)> = Vec::new();
        for (id, piece) in self.list.iter().enumerate().filter(|(_, p)| p.kind == Kind::Normal) {
            for (at, _) in piece.text.char_indices().skip(1) {
                let (left, right) = piece.text.split_at(at);
                if let (Some(l), Some(r)) = (normal(left), normal(right)) {
                    found.push((piece.score, id, l, r, left, right));
                }
            }
        }
        found.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
        found.into_iter().map(|(.., left, right)| (left, right)).collect()
    }
}

/// A field of a protobuf message.
enum Field<'a> {
    Number(u64),
    Word([u8; 4]),
    Bytes(&'a [u8]),
    Other,
}

/// The fields of a protobuf message, by number.
fn fields<'a>(file: &Path, bytes: &'a [u8]) -> Result<Vec<(u64, Field<'a>)>> {
    let bad = || Error::input(file, "a damaged SentencePiece model: its protobuf ends within a field");
    let mut rest = bytes;
    let mut found = Vec::new();
    while !rest.is_empty() {
        let key = varint(&mut rest).ok_or_else(bad)?;
        let field = match key & 7 {
            0 => Field::Number(varint(&mut rest).ok_or_else(bad)?),
            1 => {
                rest = rest.get(8..).ok_or_else(bad)?;
                Field::Other
            }
            2 => {
                let length = varint(&mut rest).and_then(|n| usize::try_from(n).ok()).ok_or_else(bad)?;
                let (taken, after) = rest.split_at_checked(length).ok_or_else(bad)?;
                rest = after;
                Field::Bytes(taken)
            }
            5 => {
                let (word, after) = rest.split_first_chunk::<4>().ok_or_else(bad)?;
                rest = after;
                Field::Word(*word)
            }
            other => {
                let message = format!("not a SentencePiece model: found wire type {other} in its protobuf");
                return Err(Error::input(file, message));
            }
        };
        found.push((key >> 3, field));
    }
    Ok(found)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7F) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

/// The tokenizer.json of GPT-2's pair of files: the vocabulary as JSON, one merge a line.
pub(super) fn gpt2_json(file: &Path, vocab: &str, merges: &Path) -> Result<Value> {
    let vocab: Map<String, Value> =
        serde_json::from_str(vocab).map_err(|e| Error::input(file, format!("not a JSON vocabulary: {e}")))?;
    let mut pairs = Vec::new();
    for (i, line) in files::read_text(merges)?.lines().enumerate() {
        if line.starts_with("#version") || line.is_empty() {
            continue;
        }
        let Some((left, right)) = line.split_once(' ') else {
            let found = format!("line {}: found {line:?}, expected two pieces with a space between", i + 1);
            return Err(Error::input(merges, found));
        };
        pairs.push(json!([left, right]));
    }
    let special = ["<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>"];
    let added: Vec<Value> = special
        .iter()
        .filter_map(|text| Some(added_token(text, usize::try_from(vocab.get(*text)?.as_u64()?).ok()?)))
        .collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true});
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": pairs,
        },
    }))
}

/// The tokenizer.json of a WordPiece vocabulary, one piece a line.
pub(super) fn wordpiece_json(text: &str, lower: bool) -> Value {
    let vocab: Map<String, Value> =
        text.lines().enumerate().map(|(id, piece)| (piece.to_string(), json!(id))).collect();
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
    let added: Vec<Value> = special
        .iter()
        .filter_map(|text| Some(added_token(text, usize::try_from(vocab.get(*text)?.as_u64()?).ok()?)))
        .collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": lower},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": null,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocab},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A field of bytes in protobuf.
    fn bytes(number: u8, body: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, body.len() as u8], body].concat()
    }

    /// A SentencePiece model: pieces of a text, a score and a kind; the type of the model; its normalizer.
    fn model(pieces: &[(&str, f32, u8)], kind: u8, normalizer: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        for (text, score, kind) in pieces {
            let score = [&[0x15][..], &score.to_le_bytes()].concat();
            out.extend(bytes(1, &[bytes(1, text.as_bytes()), score, vec![0x18, *kind]].concat()));
        }
        out.extend(bytes(2, &[0x18, kind]));
        out.extend(bytes(3, normalizer));
        out
    }

    const SPECIAL: [(&str, f32, u8); 3] = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)];

    fn ids(model: &[u8], text: &str) -> Vec<u32> {
        let tokenizer = from_sentencepiece(Path::new("t.model"), model).unwrap();
        tokenizer.encode(text, true).unwrap().get_ids().to_vec()
    }

    #[test]
    fn unigram_takes_the_likeliest_cut() {
        let own = [("\u{2581}ab", -1.0, 1), ("\u{2581}", -2.0, 1), ("a", -3.0, 1), ("b", -3.5, 1)];
        let pieces = [&SPECIAL[..], &own].concat();
        assert_eq!(ids(&model(&pieces, 1, &[]), "ab  a"), [1, 3, 4, 5]);
        // Without a space put before the text: field 3 of the normalizer is 0.
        assert_eq!(ids(&model(&pieces, 1, &[0x18, 0]), "ab"), [1, 5, 6]);
    }

    #[test]
    fn bpe_joins_by_score() {
        let own = [("\u{2581}", -9.0, 1), ("a", -9.0, 1), ("b", -9.0, 1), ("c", -9.0, 1)];
        let joined = [("bc", -1.0, 1), ("ab", -2.0, 1), ("\u{2581}ab", -3.0, 1), ("[x]", 0.0, 4)];
        let pieces = [&SPECIAL[..], &own, &joined].concat();
        assert_eq!(ids(&model(&pieces, 2, &[]), "ab abc"), [1, 9, 3, 4, 7]);
        // Spaces stay as they are, what a user defined is one token, the unknown is one too.
        assert_eq!(ids(&model(&pieces, 2, &[]), "a  "), [1, 3, 4, 3, 3]);
        assert!(ids(&model(&pieces, 2, &[]), "a[x]").contains(&10));
        assert_eq!(ids(&model(&pieces, 2, &[]), "zz"), [1, 3, 0]);
    }

    #[test]
    fn damaged_files_are_told() {
        let says = |bytes: &[u8]| from_sentencepiece(Path::new("t.model"), bytes).unwrap_err().to_string();
        let whole = model(&SPECIAL, 1, &[]);
        assert!(says(&whole[..whole.len() - 9]).contains("t.model: a damaged"), "{}", says(&whole[..9]));
        assert!(says(&[]).contains("no pieces"));
        assert!(says(b"not one").contains("t.model"));
        assert!(says(&model(&SPECIAL, 3, &[])).contains("of type 3, expected 1 (unigram) or 2 (BPE)"));
        let twice = [SPECIAL[0], SPECIAL[1], SPECIAL[1]];
        assert!(says(&model(&twice, 2, &[])).contains("tokens 1 and 2 are both \"<s>\""));
        let says = |bytes: &[u8]| from_llama2c(Path::new("t.bin"), bytes).unwrap_err().to_string();
        assert!(says(&[1, 2]).contains("t.bin: 4 bytes of header"));
        let entry = [&[0; 8][..], &5i32.to_le_bytes(), b"abc"].concat();
        assert!(says(&entry).contains("token 0: the file ends within it"));
        let negative = [&[0; 8][..], &(-1i32).to_le_bytes()].concat();
        assert!(says(&negative).contains("token 0: found a length of -1"));
        assert!(says(&[0; 12]).contains("found 1 tokens, expected 3 or more"));
    }
}
