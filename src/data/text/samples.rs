//! Records to samples: the text of a record, its tokens, and which of them are learned.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;
use serde_json::{json, Map, Value};

use super::records::Row;
use super::template::{Chat, Template};
use super::{TextConfig, Tokenizer};
use crate::{files, Error, Result};

/// One text, as tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Token ids, at most `seq_len` of them.
    pub tokens: Vec<u32>,
    /// Of each token, whether it is learned as what follows the tokens before it; the first never is.
    pub train: Vec<bool>,
}

impl Sample {
    /// How many tokens are learned.
    pub fn trained(&self) -> usize {
        self.train.iter().filter(|t| **t).count()
    }
}

/// A record as `qtune data` shows it.
#[derive(Clone, Debug)]
pub struct Shown {
    /// Where it stands: a file and a line.
    pub place: String,
    /// Its fields, cut to a line.
    pub summary: String,
    /// How it was read, such as `messages`.
    pub layout: &'static str,
    /// The text that its tokens spell.
    pub text: String,
    /// How many tokens it has before it is cut to the length of a row.
    pub whole: usize,
    /// Its tokens as they are trained on.
    pub sample: Sample,
}

/// How the records of a set are laid out, told from the first one's fields.
#[derive(Clone, Debug, PartialEq)]
enum Layout {
    Text(String),
    Pair {
        prompt: String,
        completion: String,
        between: &'static str,
    },
    /// An instruction, perhaps an input, and the field of the answer.
    Alpaca(String),
    /// An instruction with several inputs and outputs.
    Seeds,
    Messages,
    ShareGpt,
}

/// The text of a record and the byte ranges of it that are its answers.
struct Rendered {
    text: String,
    answers: Vec<Range<usize>>,
    /// Whether the beginning-of-sequence token goes before it.
    begin: bool,
    /// Whether the end-of-sequence token goes behind it, as a part of the answer.
    end: bool,
}

/// Samples and what was lost on the way to them.
#[derive(Debug, Default)]
pub(super) struct Made {
    pub samples: Vec<Sample>,
    pub shown: Vec<Shown>,
    /// How many were cut to `seq_len`.
    pub cut: usize,
    /// How many were left out since nothing in them is learned.
    pub dropped: usize,
    /// The most tokens of a sample before cutting.
    pub longest: usize,
}

/// Makes samples of records.
pub(super) struct Maker<'a> {
    config: &'a TextConfig,
    tokenizer: &'a Tokenizer,
    layout: Layout,
    /// For messages, and for pairs that are to be put as messages.
    template: Option<Template>,
}

impl Layout {
    fn of(config: &TextConfig, row: &Map<String, Value>) -> Option<Self> {
        let has = |key: &str| row.contains_key(key);
        let pair = |prompt: &str, completion: &str, between: &'static str| {
            Some(Layout::Pair { prompt: prompt.into(), completion: completion.into(), between })
        };
        if config.prompt.is_some() || config.completion.is_some() {
            let name = |given: &Option<String>, usual: &str| given.as_deref().unwrap_or(usual).to_string();
            let (prompt, completion) =
                (name(&config.prompt, "prompt"), name(&config.completion, "completion"));
            return pair(&prompt, &completion, "");
        }
        if let Some(text) = &config.text {
            return Some(Layout::Text(text.clone()));
        }
        let answer = || ["output", "response"].into_iter().find(|key| has(key)).map(str::to_string);
        match () {
            () if has("messages") => Some(Layout::Messages),
            () if has("conversations") => Some(Layout::ShareGpt),
            () if has("prompt") && has("completion") => pair("prompt", "completion", ""),
            () if has("question") && has("answer") => pair("question", "answer", "\n"),
            () if has("instruction") && has("instances") => Some(Layout::Seeds),
            () if has("instruction") => answer().map(Layout::Alpaca),
            () if has("text") => Some(Layout::Text("text".into())),
            () => None,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Layout::Text(_) => "text",
            Layout::Pair { .. } => "prompt and completion",
            Layout::Alpaca(_) => "instruction",
            Layout::Seeds => "instruction with instances",
            Layout::Messages => "messages",
            Layout::ShareGpt => "conversations",
        }
    }
}

/// The names of a record's fields.
fn names(row: &Map<String, Value>) -> String {
    row.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
}

/// A field that must be there, as text.
fn field<'r>(row: &'r Map<String, Value>, key: &str) -> std::result::Result<Cow<'r, str>, String> {
    match row.get(key) {
        Some(Value::String(text)) => Ok(Cow::Borrowed(text)),
        Some(value @ (Value::Number(_) | Value::Bool(_))) => Ok(Cow::Owned(value.to_string())),
        Some(Value::Null) => Err(format!("field `{key}` is null, expected text")),
        Some(_) => Err(format!("field `{key}` is a list or an object, expected text")),
        None => Err(format!("no field `{key}`, found {}", names(row))),
    }
}

impl<'a> Maker<'a> {
    /// For records like `first`; errs on one of no known layout, naming its fields.
    pub fn new(config: &'a TextConfig, tokenizer: &'a Tokenizer, first: &Row) -> Result<Self> {
        let layout = Layout::of(config, &first.value).ok_or_else(|| {
            first.error(format!(
                "found the fields {}; expected text, prompt and completion, question and answer, instruction \
                 and output, messages, or conversations",
                names(&first.value)
            ))
        })?;
        let chats = match &layout {
            Layout::Messages | Layout::ShareGpt => true,
            Layout::Pair { prompt, .. } => first.value.get(prompt).is_some_and(Value::is_array),
            _ => false,
        };
        let template = match config.template.as_deref() {
            None if !chats => None,
            Some("none") if !chats => None,
            Some("none") => Some(Template::fallback(tokenizer)?),
            None | Some("model") => match Template::of(tokenizer)? {
                Some(template) => Some(template),
                None => Some(Template::fallback(tokenizer)?),
            },
            Some(path) => {
                let path = Path::new(path);
                Some(Template::new(path, &files::read_text(path)?, tokenizer)?)
            }
        };
        Ok(Maker { config, tokenizer, layout, template })
    }

    /// What a user should know of how records are read.
    pub fn note(&self) -> Option<String> {
        let given = self.config.template.as_deref() != Some("none");
        self.template.as_ref().filter(|t| t.is_fallback() && given).map(|_| {
            "no chat template in the model's files: messages are written as lines `User: ...`, `Assistant: ...`".into()
        })
    }

    /// The samples of `rows`, in their order, and how the first `show` of them look.
    ///
    /// Errs on the first record that lacks a field, or under `strict` on the first that is too long.
    pub fn make(&self, rows: &[Row], show: usize) -> Result<Made> {
        // Each record on its own, so the number of threads changes nothing.
        let encoded: Vec<Result<Vec<(Rendered, Sample)>>> =
            rows.par_iter().map(|row| self.of_row(row)).collect();
        let limit = self.config.seq_len;
        let mut made = Made::default();
        for (row, encoded) in rows.iter().zip(encoded) {
            for (rendered, mut sample) in encoded? {
                let whole = sample.tokens.len();
                made.longest = made.longest.max(whole);
                if whole > limit {
                    if self.config.strict {
                        return Err(row.error(format!("{whole} tokens, longer than seq_len = {limit}")));
                    }
                    made.cut += 1;
                    sample.tokens.truncate(limit);
                    sample.train.truncate(limit);
                }
                if made.shown.len() < show {
                    made.shown.push(Shown {
                        place: format!("{}: {}", row.file.display(), row.place()),
                        summary: summary(&row.value),
                        layout: self.layout.name(),
                        text: rendered.text,
                        whole,
                        sample: sample.clone(),
                    });
                }
                match sample.trained() {
                    0 => made.dropped += 1,
                    _ => made.samples.push(sample),
                }
            }
        }
        Ok(made)
    }

    fn of_row(&self, row: &Row) -> Result<Vec<(Rendered, Sample)>> {
        let rendered = self.render(&row.value).map_err(|e| match e {
            Refused::Field(message) => row.error(message),
            // A template's refusal: the record is what it refuses.
            Refused::Other(error) => row.error(error),
        })?;
        rendered
            .into_iter()
            .map(|r| Ok((self.encode(&r)?, r)))
            .map(|made| made.map(|(s, r)| (r, s)))
            .collect()
    }

    fn render(&self, row: &Map<String, Value>) -> std::result::Result<Vec<Rendered>, Refused> {
        match &self.layout {
            Layout::Text(key) => {
                let text = field(row, key)?.into_owned();
                let answers = std::iter::once(0..text.len()).collect();
                Ok(vec![self.plain(text, answers)])
            }
            Layout::Messages => Ok(vec![self.chat(turns(row, "messages")?, row, 0)?]),
            Layout::ShareGpt => Ok(vec![self.chat(turns(row, "conversations")?, row, 0)?]),
            Layout::Pair { prompt, completion, .. } if row.get(prompt).is_some_and(Value::is_array) => {
                let (mut messages, answer) = (turns(row, prompt)?, turns(row, completion)?);
                let given = messages.len();
                messages.extend(answer);
                Ok(vec![self.chat(messages, row, given)?])
            }
            Layout::Pair { prompt, completion, between } => {
                let (prompt, completion) = (field(row, prompt)?, field(row, completion)?);
                Ok(vec![self.pair(&prompt, between, &completion)?])
            }
            Layout::Alpaca(answer) => {
                let input = row.get("input").and_then(Value::as_str).unwrap_or_default();
                Ok(vec![self.instruction(&field(row, "instruction")?, input, &field(row, answer)?)?])
            }
            Layout::Seeds => {
                let instruction = field(row, "instruction")?;
                let Some(Value::Array(list)) = row.get("instances") else {
                    return Err(Refused::Field("field `instances`: expected a list".into()));
                };
                let instance = |value: &Value| {
                    let map = value.as_object().ok_or("field `instances`: expected objects".to_string())?;
                    let input = map.get("input").and_then(Value::as_str).unwrap_or_default();
                    self.instruction(&instruction, input, &field(map, "output")?)
                };
                list.iter().map(instance).collect()
            }
        }
    }

    /// A text that no template has a part in.
    fn plain(&self, text: String, answers: Vec<Range<usize>>) -> Rendered {
        let begin = self.config.add_bos.unwrap_or(self.tokenizer.adds_bos());
        Rendered { text, answers, begin, end: self.config.add_eos.unwrap_or(true) }
    }

    fn pair(&self, prompt: &str, between: &str, completion: &str) -> std::result::Result<Rendered, Refused> {
        if self.template.is_some() {
            let turn = |role: &str, content: &str| json!({"role": role, "content": content});
            return self.chat(vec![turn("user", prompt), turn("assistant", completion)], &Map::new(), 0);
        }
        let text = format!("{prompt}{between}{completion}");
        let answers = std::iter::once(text.len() - completion.len()..text.len()).collect();
        Ok(self.plain(text, answers))
    }

    fn instruction(&self, what: &str, input: &str, answer: &str) -> std::result::Result<Rendered, Refused> {
        if self.template.is_some() {
            let gap = if input.is_empty() { "" } else { "\n\n" };
            return self.pair(&format!("{what}{gap}{input}"), "", answer);
        }
        let input = if input.is_empty() { String::new() } else { format!("### Input:\n{input}\n\n") };
        self.pair(&format!("### Instruction:\n{what}\n\n{input}### Response:\n"), "", answer)
    }

    /// A conversation whose first `given` messages are not learned.
    fn chat(
        &self,
        messages: Vec<Value>,
        row: &Map<String, Value>,
        given: usize,
    ) -> std::result::Result<Rendered, Refused> {
        let Some(template) = &self.template else {
            return Err(Refused::Field("messages where the first record had a text".into()));
        };
        let answers = |list: &[Value]| list.iter().filter(|m| m["role"] == "assistant").count();
        let skipped = answers(&messages[..given]);
        let more = row.get("tools").filter(|t| !t.is_null()).map(|t| ("tools".to_string(), t.clone()));
        let chat = Chat { messages, more: more.into_iter().collect() };
        let (text, answers) = match self.config.completion_only {
            true => template.render_with_answers(&chat).map_err(Refused::Other)?,
            // Then it need not be known what the assistant says.
            false => (template.render(&chat, false).map_err(Refused::Other)?, Vec::new()),
        };
        let answers = answers.into_iter().skip(skipped).collect();
        // A template writes its own special tokens.
        let begin = self.config.add_bos.unwrap_or(false);
        Ok(Rendered { text, answers, begin, end: self.config.add_eos.unwrap_or(false) })
    }

    /// Tokens, and which are learned: those that hold any of an answer's text.
    fn encode(&self, rendered: &Rendered) -> Result<Sample> {
        let (mut tokens, places) = self.tokenizer.encode_with_places(&rendered.text)?;
        let in_answer = |place: &Range<usize>| {
            rendered.answers.iter().any(|answer| place.end > answer.start && place.start < answer.end)
        };
        let all = !self.config.completion_only;
        let mut train: Vec<bool> = places.iter().map(|place| all || in_answer(place)).collect();
        if let Some(bos) = self.tokenizer.bos().filter(|bos| rendered.begin && tokens.first() != Some(bos)) {
            tokens.insert(0, bos);
            train.insert(0, false);
        }
        if let Some(eos) = self.tokenizer.eos().first().filter(|_| rendered.end) {
            tokens.push(*eos);
            train.push(true);
        }
        if let Some(first) = train.first_mut() {
            *first = false;
        }
        Ok(Sample { tokens, train })
    }
}

/// Why a record is not a sample.
enum Refused {
    /// Something of its own.
    Field(String),
    /// The template's word.
    Other(Error),
}

impl From<String> for Refused {
    fn from(message: String) -> Self {
        Refused::Field(message)
    }
}

/// The messages in a field: objects with `role` and `content`, or with `from` and `value` as ShareGPT
/// has them.
fn turns(row: &Map<String, Value>, key: &str) -> std::result::Result<Vec<Value>, String> {
    let list = match row.get(key) {
        Some(Value::Array(list)) => list,
        Some(_) => return Err(format!("field `{key}`: expected a list of messages")),
        None => return Err(format!("no field `{key}`, found {}", names(row))),
    };
    if list.is_empty() {
        return Err(format!("field `{key}`: no messages in it"));
    }
    let turn = |(i, message): (usize, &Value)| {
        let at = |what: String| format!("field `{key}`, message {}: {what}", i + 1);
        let Some(map) = message.as_object() else { return Err(at("expected an object".into())) };
        if map.contains_key("role") {
            field(map, "role").map_err(at)?;
            return Ok(message.clone());
        }
        let (from, value) = (field(map, "from").map_err(at)?, field(map, "value").map_err(at)?);
        let role = match &*from {
            "human" => "user",
            "gpt" | "chatgpt" | "bot" => "assistant",
            "function_response" | "observation" => "tool",
            other => other,
        };
        Ok(json!({"role": role, "content": value}))
    };
    list.iter().enumerate().map(turn).collect()
}

/// A record's fields on one line.
fn summary(row: &Map<String, Value>) -> String {
    let short = |value: &Value| {
        let text = match value {
            Value::String(text) => text.split_whitespace().collect::<Vec<_>>().join(" "),
            Value::Array(list) => format!("list of {}", list.len()),
            other => other.to_string(),
        };
        match text.char_indices().nth(40) {
            Some((at, _)) => format!("{}...", &text[..at]),
            None => text,
        }
    };
    row.iter().map(|(key, value)| format!("{key}: {}", short(value))).collect::<Vec<_>>().join(" | ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn row(value: Value) -> Row {
        let file: Arc<Path> = Path::new("x.jsonl").into();
        Row { file, unit: "line", number: 4, value: value.as_object().unwrap().clone() }
    }

    fn make(config: &TextConfig, value: Value) -> Result<Made> {
        let tokenizer = Tokenizer::bytes().unwrap();
        let rows = [row(value)];
        Maker::new(config, &tokenizer, &rows[0])?.make(&rows, 9)
    }

    /// The text of a sample with what is learned in brackets.
    fn marked(sample: &Sample) -> String {
        let t = Tokenizer::bytes().unwrap();
        let mut out = String::new();
        let mut inside = false;
        for (id, train) in sample.tokens.iter().zip(&sample.train) {
            if *train != inside {
                out.push(if *train { '[' } else { ']' });
                inside = *train;
            }
            out.push_str(&t.decode_all(&[*id]).unwrap());
        }
        out + if inside { "]" } else { "" }
    }

    fn says(config: &TextConfig, value: Value) -> String {
        make(config, value).unwrap().samples.iter().map(marked).collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn each_layout_and_what_is_learned_of_it() {
        let c = TextConfig::default();
        assert_eq!(says(&c, json!({"text": "hi"})), "<s>[hi</s>]");
        assert_eq!(says(&c, json!({"prompt": "a ", "completion": "b", "id": 1})), "<s>a [b</s>]");
        assert_eq!(says(&c, json!({"question": "1+1", "answer": 2})), "<s>1+1\n[2</s>]");
        let alpaca = json!({"instruction": "Do.", "input": "x", "output": "y"});
        assert_eq!(says(&c, alpaca), "<s>### Instruction:\nDo.\n\n### Input:\nx\n\n### Response:\n[y</s>]");
        let alpaca = json!({"instruction": "Do.", "input": "", "response": "y"});
        assert_eq!(says(&c, alpaca), "<s>### Instruction:\nDo.\n\n### Response:\n[y</s>]");
        let seeds = json!({"instruction": "I", "instances": [{"input": "", "output": "p"}, {"input": "", "output": "q"}]});
        assert_eq!(says(&c, seeds).matches("; <s>### Instruction:\nI").count(), 1);
        let chat =
            json!({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]});
        assert_eq!(says(&c, chat.clone()), "<s>User: u\nAssistant: [v</s>\n]");
        let gpt = json!({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "v"}]});
        assert_eq!(says(&c, gpt), says(&c, chat.clone()));
        let turns = json!({"prompt": [{"role": "user", "content": "u"}], "completion": [{"role": "assistant", "content": "v"}]});
        assert_eq!(says(&c, turns), says(&c, chat));
    }

    #[test]
    fn settings_change_it() {
        let pair = || json!({"prompt": "a", "completion": "b"});
        let with = |f: &dyn Fn(&mut TextConfig)| {
            let mut c = TextConfig::default();
            f(&mut c);
            says(&c, pair())
        };
        assert_eq!(with(&|c| c.completion_only = false), "<s>[ab</s>]");
        assert_eq!(with(&|c| c.add_bos = Some(false)), "a[b</s>]");
        assert_eq!(with(&|c| c.add_eos = Some(false)), "<s>a[b]");
        assert_eq!(with(&|c| c.template = Some("model".into())), "<s>User: a\nAssistant: [b</s>\n]");
        assert_eq!(
            with(&|c| (c.prompt, c.completion) = (Some("completion".into()), Some("prompt".into()))),
            "<s>b[a</s>]"
        );
        assert_eq!(with(&|c| c.text = Some("completion".into())), "<s>[b</s>]");
    }

    /// The end is learned even where it is also the padding.
    #[test]
    fn cut_dropped_and_strict() {
        let c = TextConfig { seq_len: 4, ..TextConfig::default() };
        let made = make(&c, json!({"prompt": "a", "completion": "bcd"})).unwrap();
        assert_eq!((marked(&made.samples[0]), made.cut, made.longest), ("<s>a[bc]".into(), 1, 6));
        assert_eq!(made.shown[0].whole, 6);
        let made = make(&c, json!({"prompt": "abcd", "completion": "e"})).unwrap();
        assert_eq!((made.samples.len(), made.cut, made.dropped), (0, 1, 1));
        let strict = TextConfig { strict: true, ..c };
        let error = make(&strict, json!({"prompt": "abcd", "completion": "e"})).unwrap_err().to_string();
        assert_eq!(error, "x.jsonl: line 4: 7 tokens, longer than seq_len = 4");
    }

    #[test]
    fn a_missing_field_is_named() {
        let c = TextConfig::default();
        let error = |value: Value| make(&c, value).unwrap_err().to_string();
        assert!(error(json!({"foo": 1})).contains("line 4: found the fields foo; expected text"));
        assert!(error(json!({"prompt": "a", "completion": null})).contains("field `completion` is null"));
        assert!(error(json!({"messages": []})).contains("field `messages`: no messages"));
        let no_role = error(json!({"messages": [{"content": "x"}]}));
        assert!(no_role.contains("message 1: no field `from`, found content"), "{no_role}");
        let t = Tokenizer::bytes().unwrap();
        let rows = [row(json!({"question": "q", "answer": "a"})), row(json!({"question": "q"}))];
        let error = Maker::new(&c, &t, &rows[0]).unwrap().make(&rows, 0).unwrap_err().to_string();
        assert_eq!(error, "x.jsonl: line 4: no field `answer`, found question");
    }

    /// A merge over the border between prompt and answer counts as answer.
    #[test]
    fn a_token_over_the_border_is_learned() {
        let rendered = Rendered {
            text: "aéb".into(),
            answers: std::iter::once(1..4).collect(),
            begin: true,
            end: false,
        };
        let c = TextConfig::default();
        let t = Tokenizer::bytes().unwrap();
        let maker = Maker { config: &c, tokenizer: &t, layout: Layout::Messages, template: None };
        let sample = maker.encode(&rendered).unwrap();
        assert_eq!(sample.tokens, [256, 97, 0xC3, 0xA9, 98]);
        assert_eq!(sample.train, [false, false, true, true, true]);
    }
}
