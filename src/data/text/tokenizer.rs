//! Text to token ids and back: whatever file of a tokenizer a model's folder holds, behind one type.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{json, Value};

use super::pieces::{self, template_processing};
use crate::{files, Error, On, Result};

/// A tokenizer with its special tokens and its chat template.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    /// What it was read from, for messages.
    source: PathBuf,
    bos: Option<u32>,
    eos: Vec<u32>,
    pad: Option<u32>,
    adds_bos: bool,
    template: Option<(PathBuf, String)>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("source", &self.source)
            .field("tokens", &self.vocab_size())
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .field("pad", &self.pad)
            .finish_non_exhaustive()
    }
}

/// The name of the built-in tokenizer in messages.
const BYTES: &str = "built-in byte tokenizer";

impl Tokenizer {
    /// The tokenizer of a model's folder, or one tokenizer file.
    ///
    /// The first of these is taken: `tokenizer.json`; `tokenizer.model` (SentencePiece, BPE or unigram);
    /// `tokenizer.bin` or `tok*.bin` (llama2.c); `vocab.json` or `encoder.json` with `merges.txt` or
    /// `vocab.bpe` (GPT-2); `vocab.txt` (WordPiece). Special tokens and the chat template come from
    /// `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json`, `config.json` and
    /// `chat_template.jinja` beside it.
    ///
    /// Errs where there is none, where a file is damaged, and where a token's id has no row among the
    /// `vocab` rows of the model's embedding.
    pub fn open(path: &Path, vocab: Option<usize>) -> Result<Self> {
        let file = find(path)?;
        let dir = file.parent().unwrap_or(Path::new(".")).to_path_buf();
        let side = Side::read(&dir)?;
        let inner = load(&file, &side)?;
        let tokenizer = Tokenizer::assemble(inner, file, &side)?;
        if let Some(rows) = vocab {
            tokenizer.check_vocab(rows)?;
        }
        Ok(tokenizer)
    }

    /// The built-in tokenizer: a token for each byte (its id is the byte), then `<s>` (256, put before
    /// every text), `</s>` (257) and `<pad>` (258).
    pub fn bytes() -> Result<Self> {
        let mut vocab = serde_json::Map::new();
        for (byte, shown) in byte_characters().into_iter().enumerate() {
            vocab.insert(shown.to_string(), json!(byte));
        }
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
        let specials = [("<s>", 256), ("</s>", 257), ("<pad>", 258)];
        let value = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": specials.map(|(text, id)| pieces::added_token(text, id)),
            "normalizer": null,
            "pre_tokenizer": byte_level,
            "post_processor": template_processing("<s>", 256),
            "decoder": byte_level,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": false, "vocab": vocab, "merges": [],
            },
        });
        let side = Side {
            tokenizer: json!({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}),
            ..Side::default()
        };
        Tokenizer::assemble(from_json(Path::new(BYTES), &value)?, PathBuf::from(BYTES), &side)
    }

    /// Whether the folder `dir` holds a file that [`Tokenizer::open`] would take.
    pub fn beside(dir: &Path) -> bool {
        dir.is_dir() && find(dir).is_ok()
    }

    fn assemble(mut inner: tokenizers::Tokenizer, source: PathBuf, side: &Side) -> Result<Self> {
        // Length is our own affair: what a tokenizer.json says of it was meant for other software.
        inner.with_truncation(None).map_err(|e| Error::input(&source, one_line(&e.to_string())))?;
        inner.with_padding(None);
        let ids = |role: &str, known: &[&str]| -> Vec<u32> {
            let mut found = side.ids(role, &inner);
            if found.is_empty() {
                found.extend(known.iter().find_map(|text| inner.token_to_id(text)));
            }
            found
        };
        let bos = ids("bos", &["<s>", "<|begin_of_text|>", "<bos>"]).first().copied();
        let eos = ids("eos", &["</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>"]);
        let pad = ids("pad", &["<pad>", "[PAD]", "<|pad|>"]).first().copied();
        let begins = inner.encode("", true).map(|e| e.get_ids().first().copied()).ok().flatten();
        let adds_bos = match side.tokenizer.get("add_bos_token").and_then(Value::as_bool) {
            Some(said) => said && bos.is_some(),
            None => begins.is_some() && begins == bos,
        };
        let template = side.template.clone();
        Ok(Tokenizer { inner: Arc::new(inner), source, bos, eos, pad, adds_bos, template })
    }

    /// Errs where a token's id is not below `rows`, the rows of the model's embedding.
    pub fn check_vocab(&self, rows: usize) -> Result<()> {
        let vocab = self.inner.get_vocab(true);
        match vocab.iter().max_by_key(|(_, id)| **id) {
            Some((token, id)) if *id as usize >= rows => Err(Error::input(
                &self.source,
                format!("token {token:?} has id {id}, the model's embedding has {rows} rows: expected ids below that"),
            )),
            _ => Ok(()),
        }
    }

    /// The ids of `text`. With `special` what the tokenizer puts around a text is there too, such as the
    /// beginning-of-sequence token; special tokens spelled out in `text` are always read as such.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode(text, special).map_err(|e| self.fails("encode", &e))?;
        let mut ids = encoding.get_ids().to_vec();
        if let (true, Some(bos)) = (special, self.bos) {
            // tokenizer_config.json's add_bos_token has the last word.
            match (ids.first() == Some(&bos), self.adds_bos) {
                (false, true) => ids.insert(0, bos),
                (true, false)
                    if self.inner.encode("", true).is_ok_and(|e| e.get_ids().first() == Some(&bos)) =>
                {
                    ids.remove(0);
                }
                _ => {}
            }
        }
        Ok(ids)
    }

    /// The ids of `text` without special tokens around it, and the bytes of `text` that each came from.
    ///
    /// The ranges leave no gap: white space that a tokenizer trims off a token's place belongs to the
    /// token that carries it. The bytes of one character may share its range.
    pub fn encode_with_places(&self, text: &str) -> Result<(Vec<u32>, Vec<Range<usize>>)> {
        let encoding = self.inner.encode(text, false).map_err(|e| self.fails("encode", &e))?;
        let mut end = 0;
        let places = encoding
            .get_offsets()
            .iter()
            .map(|&(from, to)| {
                let start = from.min(end);
                end = end.max(to);
                start..to.max(start)
            })
            .collect();
        Ok((encoding.get_ids().to_vec(), places))
    }

    /// The text of `ids`, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|e| self.fails("decode", &e))
    }

    /// The text of `ids`, special tokens spelled out.
    pub fn decode_all(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, false).map_err(|e| self.fails("decode", &e))
    }

    fn fails(&self, what: &str, error: &tokenizers::Error) -> Error {
        Error::input(&self.source, format!("cannot {what}: {}", one_line(&error.to_string())))
    }

    /// A decoder of ids that come one by one, after those of a `prompt` (which are not repeated).
    pub fn stream(&self, prompt: &[u32]) -> Stream<'_> {
        let tail = prompt[prompt.len().saturating_sub(8)..].to_vec();
        let read = tail.len();
        Stream { tokenizer: self, ids: tail, shown: 0, read }
    }

    /// One more than the highest id.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1)
    }

    /// The id of a token's text.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id, as the tokenizer spells it.
    pub fn token_of(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The token that begins a sequence.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The tokens that end a sequence, the one to train on first.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// The token that fills rows up, where the model names one; it may be one of [`Tokenizer::eos`].
    pub fn pad(&self) -> Option<u32> {
        self.pad
    }

    /// Whether the tokenizer begins every text with [`Tokenizer::bos`].
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// The text of the model's chat template and the file it stands in.
    pub fn chat_template(&self) -> Option<(&Path, &str)> {
        self.template.as_ref().map(|(path, text)| (path.as_path(), text.as_str()))
    }

    /// What it was read from.
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// The tokenizer as its `tokenizer.json` says it, whatever file it came from.
    pub fn to_json(&self) -> Result<Value> {
        let text = self.inner.to_string(false).map_err(|e| self.fails("write", &e))?;
        serde_json::from_str(&text).map_err(|e| Error::input(&self.source, format!("not JSON: {e}")))
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json` into `dir`, as Hugging Face's libraries read
    /// them.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let path = dir.join("tokenizer.json");
        let text = self.inner.to_string(true).map_err(|e| self.fails("write", &e))?;
        files::write_bytes(&path, text.as_bytes())?;
        let spelled = |id: Option<u32>| id.and_then(|id| self.token_of(id));
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": false,
            "add_bos_token": self.adds_bos,
            "bos_token": spelled(self.bos),
            "eos_token": spelled(self.eos.first().copied()),
            "pad_token": spelled(self.pad),
        });
        if let (Some((_, template)), Some(map)) = (&self.template, config.as_object_mut()) {
            map.insert("chat_template".into(), json!(template));
        }
        files::write_bytes(&dir.join("tokenizer_config.json"), format!("{config:#}\n").as_bytes())
    }
}

/// Text of tokens as they come: nothing is shown before its bytes are whole characters.
pub struct Stream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// Tokens before it were shown and no longer matter for the spelling of what follows.
    shown: usize,
    /// Tokens before it were shown.
    read: usize,
}

/// How many tokens are held back before what is no character is shown as such: one has at most four bytes.
const LONGEST_CHARACTER: usize = 4;

impl Stream<'_> {
    /// Takes a token; returns the text that is now whole, often none.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let waiting = self.ids.len() - self.read;
        self.take(|text| !text.ends_with('\u{FFFD}') || waiting > LONGEST_CHARACTER)
    }

    /// What is left at the end, broken characters as U+FFFD.
    pub fn finish(mut self) -> Result<String> {
        self.take(|_| true)
    }

    fn take(&mut self, whole: impl Fn(&str) -> bool) -> Result<String> {
        let ids = |from: usize, to: usize| self.ids.get(from..to).unwrap_or_default();
        let before = self.tokenizer.decode(ids(self.shown, self.read))?;
        let now = self.tokenizer.decode(ids(self.shown, self.ids.len()))?;
        let new = now.get(before.len()..).unwrap_or_default();
        if new.is_empty() || !whole(&now) {
            return Ok(String::new());
        }
        let text = new.to_string();
        self.shown = self.read;
        self.read = self.ids.len();
        Ok(text)
    }
}

/// What the JSON files beside a tokenizer say.
#[derive(Default)]
struct Side {
    tokenizer: Value,
    special: Value,
    generation: Value,
    model: Value,
    template: Option<(PathBuf, String)>,
}

impl Side {
    fn read(dir: &Path) -> Result<Self> {
        let json = |name: &str| -> Result<Value> {
            let path = dir.join(name);
            match path.is_file() {
                true => serde_json::from_str(&files::read_text(&path)?)
                    .map_err(|e| Error::input(&path, format!("not JSON: {e}"))),
                false => Ok(Value::Null),
            }
        };
        let config = dir.join("tokenizer_config.json");
        let tokenizer = json("tokenizer_config.json")?;
        let jinja = dir.join("chat_template.jinja");
        let template = match jinja.is_file() {
            true => Some((jinja.clone(), files::read_text(&jinja)?)),
            false => named_template(&tokenizer).map(|text| (config, text)),
        };
        Ok(Side {
            tokenizer,
            special: json("special_tokens_map.json")?,
            generation: json("generation_config.json")?,
            model: json("config.json")?,
            template,
        })
    }

    /// The ids of the role `bos`, `eos` or `pad`, the most particular file first; ids that the tokenizer
    /// does not have are left out.
    fn ids(&self, role: &str, inner: &tokenizers::Tokenizer) -> Vec<u32> {
        let key = format!("{role}_token");
        let texts = [&self.tokenizer, &self.special].into_iter().filter_map(|file| {
            let value = file.get(&key)?;
            inner.token_to_id(value.as_str().or_else(|| value.get("content")?.as_str())?)
        });
        let key = format!("{role}_token_id");
        let numbers = [&self.generation, &self.model].into_iter().flat_map(|file| {
            let listed = match file.get(&key) {
                Some(Value::Array(list)) => list.clone(),
                Some(value) => vec![value.clone()],
                None => Vec::new(),
            };
            listed.into_iter().filter_map(|v| u32::try_from(v.as_u64()?).ok())
        });
        let mut ids: Vec<u32> = Vec::new();
        for id in texts.chain(numbers.filter(|id| inner.id_to_token(*id).is_some())) {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        ids
    }
}

/// `chat_template`: a text, or a list of named ones of which `default` is meant.
fn named_template(config: &Value) -> Option<String> {
    match config.get("chat_template")? {
        Value::String(text) => Some(text.clone()),
        Value::Array(list) => {
            let named = |entry: &&Value| entry.get("name").and_then(Value::as_str) == Some("default");
            let entry = list.iter().find(named).or(list.first())?;
            entry.get("template").and_then(Value::as_str).map(str::to_string)
        }
        _ => None,
    }
}

/// Files that a tokenizer may be in, the most complete first.
const NAMES: [&str; 6] =
    ["tokenizer.json", "tokenizer.model", "tokenizer.bin", "vocab.json", "encoder.json", "vocab.txt"];

fn find(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        std::fs::metadata(path).on(path.display().to_string())?;
        return Ok(path.to_path_buf());
    }
    if let Some(file) = NAMES.iter().map(|name| path.join(name)).find(|file| file.is_file()) {
        return Ok(file);
    }
    let entries = std::fs::read_dir(path).on(path.display().to_string())?;
    let llama2c = |p: &PathBuf| {
        let name = p.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        name.starts_with("tok") && name.ends_with(".bin")
    };
    let mut found: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(llama2c).collect();
    found.sort();
    found.into_iter().next().ok_or_else(|| {
        let expected = NAMES.join(", ");
        Error::input(path, format!("no tokenizer: expected one of {expected} or tok*.bin"))
    })
}

fn load(file: &Path, side: &Side) -> Result<tokenizers::Tokenizer> {
    let name = file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let bytes = || std::fs::read(file).on(file.display().to_string());
    if name.ends_with(".model") {
        return pieces::from_sentencepiece(file, &bytes()?);
    }
    if name.ends_with(".bin") {
        return pieces::from_llama2c(file, &bytes()?);
    }
    match name.as_str() {
        "vocab.json" | "encoder.json" => {
            let merges = ["merges.txt", "vocab.bpe"].map(|name| file.with_file_name(name));
            let Some(merges) = merges.iter().find(|path| path.is_file()) else {
                return Err(Error::input(
                    file,
                    "no merges.txt or vocab.bpe beside it, which holds the merges",
                ));
            };
            from_json(file, &pieces::gpt2_json(file, &files::read_text(file)?, merges)?)
        }
        "vocab.txt" => {
            let lower = side.tokenizer.get("do_lower_case").and_then(Value::as_bool).unwrap_or(true);
            from_json(file, &pieces::wordpiece_json(&files::read_text(file)?, lower))
        }
        _ => tokenizers::Tokenizer::from_bytes(bytes()?)
            .map_err(|e| Error::input(file, format!("not a tokenizer.json: {}", one_line(&e.to_string())))),
    }
}

/// The tokenizer that a tokenizer.json of this content is.
pub(super) fn from_json(file: &Path, value: &Value) -> Result<tokenizers::Tokenizer> {
    let read = |e: tokenizers::Error| Error::input(file, one_line(&e.to_string()));
    tokenizers::Tokenizer::from_bytes(value.to_string().as_bytes()).map_err(read)
}

pub(super) fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The character that byte-level BPE writes for each byte: printable Latin-1 as it is, the rest from
/// U+0100 on.
pub(super) fn byte_characters() -> [char; 256] {
    let mut characters = ['\0'; 256];
    let mut next = 0x100;
    for byte in 0..=255u8 {
        characters[byte as usize] = match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
            _ => {
                next += 1;
                char::from_u32(next - 1).unwrap_or('\0')
            }
        };
    }
    characters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_tokens() {
        let t = Tokenizer::bytes().unwrap();
        assert_eq!(t.encode("aé\n", false).unwrap(), [97, 0xC3, 0xA9, 10]);
        assert_eq!(t.encode(" b", true).unwrap(), [256, 32, 98]);
        assert_eq!((t.bos(), t.eos(), t.pad(), t.vocab_size()), (Some(256), &[257u32][..], Some(258), 259));
        let all: Vec<u32> = (0..128).collect();
        let text = t.decode(&all).unwrap();
        assert_eq!(text.bytes().map(u32::from).collect::<Vec<_>>(), all);
        assert_eq!(t.decode(&[256, 104, 105, 257]).unwrap(), "hi");
        assert_eq!(t.encode("a</s>", false).unwrap(), [97, 257]);
        let (ids, places) = t.encode_with_places("é b").unwrap();
        assert_eq!(ids.len(), places.len());
        assert_eq!(places.last().unwrap(), &(3..4));
    }

    #[test]
    fn saved_and_opened_it_is_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let t = Tokenizer::bytes().unwrap();
        t.save(dir.path()).unwrap();
        let read = Tokenizer::open(dir.path(), Some(259)).unwrap();
        let text = "All of it: ünïcödé, \t\0 and <pad></s>.";
        assert_eq!(read.encode(text, true).unwrap(), t.encode(text, true).unwrap());
        assert_eq!((read.bos(), read.eos(), read.pad(), read.adds_bos()), (t.bos(), t.eos(), t.pad(), true));
        let small = Tokenizer::open(dir.path(), Some(258)).unwrap_err().to_string();
        assert!(small.contains("id 258") && small.contains("258 rows"), "{small}");
    }

    #[test]
    fn a_stream_shows_whole_characters_only() {
        let t = Tokenizer::bytes().unwrap();
        let text = "a é 😀!";
        let mut stream = t.stream(&t.encode("x", true).unwrap());
        let mut shown = Vec::new();
        for id in t.encode(text, false).unwrap() {
            let new = stream.push(id).unwrap();
            assert!(!new.contains('\u{FFFD}'), "{new:?}");
            shown.push(new);
        }
        assert_eq!(shown.concat() + &stream.finish().unwrap(), text);
        assert_eq!(shown[0], "a");
        assert_eq!(shown[2], "");
        // What never becomes a character is not held back for ever.
        let mut broken = t.stream(&[]);
        let said: String = (0..6).map(|_| broken.push(0xC3).unwrap()).collect();
        assert!(said.contains('\u{FFFD}'));
    }

    #[test]
    fn roles_come_from_the_files_beside() {
        let dir = tempfile::tempdir().unwrap();
        Tokenizer::bytes().unwrap().save(dir.path()).unwrap();
        let write =
            |name: &str, value: Value| std::fs::write(dir.path().join(name), value.to_string()).unwrap();
        write(
            "tokenizer_config.json",
            json!({"eos_token": {"content": "!"}, "add_bos_token": false, "chat_template":
                [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}),
        );
        write("generation_config.json", json!({"eos_token_id": [257, 33, 9999], "pad_token_id": 257}));
        write("config.json", json!({"bos_token_id": 256, "eos_token_id": 258}));
        let t = Tokenizer::open(dir.path(), None).unwrap();
        assert_eq!((t.bos(), t.eos(), t.pad()), (Some(256), &[33u32, 257, 258][..], Some(257)));
        assert_eq!(t.encode("a", true).unwrap(), [97]);
        assert_eq!(t.chat_template().unwrap().1, "d");
        std::fs::write(dir.path().join("chat_template.jinja"), "j").unwrap();
        assert_eq!(Tokenizer::open(dir.path(), None).unwrap().chat_template().unwrap().1, "j");
        std::fs::write(dir.path().join("config.json"), "{\"a\": ").unwrap();
        let broken = Tokenizer::open(dir.path(), None).unwrap_err().to_string();
        assert!(broken.contains("config.json: not JSON") && broken.contains("column"), "{broken}");
        let empty = tempfile::tempdir().unwrap();
        assert!(Tokenizer::open(empty.path(), None).unwrap_err().to_string().contains("no tokenizer"));
        std::fs::write(empty.path().join("tokenizer.json"), "{}").unwrap();
        assert!(Tokenizer::open(empty.path(), None)
            .unwrap_err()
            .to_string()
            .contains("not a tokenizer.json"));
    }
}
