//! Chat templates: messages to text, in a sandbox, and which of that text the assistant says.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, ErrorKind, State, UndefinedBehavior};
use serde_json::{Map, Value as Json};

use super::python;
use super::tokenizer::one_line;
use super::Tokenizer;
use crate::{Error, Result};

/// How much one rendering may do: an instruction, or 64 bytes of text, is one unit.
const FUEL: u64 = 10_000_000;
/// What surrounds an assistant's text in a rendering made to find it; no text may hold these.
const MARKS: [char; 2] = ['\u{FDD0}', '\u{FDD1}'];

/// What stands for a chat template where a model has none: a line for each turn, the end-of-sequence
/// token after each answer.
const FALLBACK: &str = "{{ bos_token }}{% for m in messages %}\
    {% if m.role == 'system' %}{{ m.content }}\n\n\
    {% elif m.role == 'assistant' %}Assistant: {{ m.content }}{{ eos_token }}\n\
    {% elif m.role == 'user' %}User: {{ m.content }}\n\
    {% else %}{{ m.role | capitalize }}: {{ m.content }}\n\
    {% endif %}{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}";

/// A conversation to render.
#[derive(Clone, Debug, Default)]
pub struct Chat {
    /// Messages, each with a `role` and mostly a `content`.
    pub messages: Vec<Json>,
    /// What else the template may ask for by name, such as `tools`.
    pub more: Map<String, Json>,
}

/// A chat template, ready to render.
///
/// Templates are files of strangers: they see the messages, the two special tokens and nothing else, and
/// a rendering that takes too long ends in an error.
pub struct Template {
    /// Where it stands, for messages.
    origin: PathBuf,
    plain: Environment<'static>,
    /// The same, with marks around what stands in `{% generation %}` blocks.
    marked: Option<Environment<'static>>,
    bos: String,
    eos: String,
    fallback: bool,
}

impl std::fmt::Debug for Template {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Template").field("origin", &self.origin).finish_non_exhaustive()
    }
}

impl Template {
    /// The template of this text, which stands in the file `origin`. `strftime_now` gives today's date.
    ///
    /// Errs on a text that is no template, naming its line.
    pub fn new(origin: &Path, text: &str, tokenizer: &Tokenizer) -> Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
        Template::at(origin, text, tokenizer, now)
    }

    /// The template that `tokenizer` came with.
    pub fn of(tokenizer: &Tokenizer) -> Result<Option<Self>> {
        tokenizer.chat_template().map(|(path, text)| Template::new(path, text, tokenizer)).transpose()
    }

    /// The built-in template for models that have none: the system's text and an empty line, then a line
    /// `User: ...` or `Assistant: ...` for each message, the end-of-sequence token behind each answer.
    pub fn fallback(tokenizer: &Tokenizer) -> Result<Self> {
        let mut template = Template::at(Path::new("built-in chat template"), FALLBACK, tokenizer, 0)?;
        template.fallback = true;
        if !tokenizer.adds_bos() {
            template.bos.clear();
        }
        Ok(template)
    }

    /// As [`Template::new`], with `now` in seconds since 1970 as the time.
    fn at(origin: &Path, text: &str, tokenizer: &Tokenizer, now: i64) -> Result<Self> {
        let spelled = |id: Option<u32>| id.and_then(|id| tokenizer.token_of(id)).unwrap_or_default();
        let (plain_text, blocks) = generation_blocks(text, "if true", "endif");
        let marked = match blocks {
            true => {
                let (marked, _) = generation_blocks(text, "call qtune_generation()", "endcall");
                Some(environment(origin, marked, now)?)
            }
            false => None,
        };
        Ok(Template {
            origin: origin.to_path_buf(),
            plain: environment(origin, plain_text, now)?,
            marked,
            bos: spelled(tokenizer.bos()),
            eos: spelled(tokenizer.eos().first().copied()),
            fallback: false,
        })
    }

    /// The text of a conversation; with `prompt` it ends where the assistant is to go on.
    ///
    /// Errs where the template refuses the messages, asks for what they lack, or does not end.
    pub fn render(&self, chat: &Chat, prompt: bool) -> Result<String> {
        self.first(&self.plain, chat, chat.messages.len(), prompt)
    }

    /// The text of a conversation and the byte ranges of it that its assistant says.
    ///
    /// An answer is what the template writes for it beyond the messages before it and the prompt to go
    /// on. Where the template's text for the first messages is not the beginning of its text for more of
    /// them, its `{% generation %}` blocks tell; without those that is an error.
    pub fn render_with_answers(&self, chat: &Chat) -> Result<(String, Vec<Range<usize>>)> {
        let text = self.render(chat, false)?;
        let mut answers = Vec::new();
        for (i, message) in chat.messages.iter().enumerate() {
            if message.get("role").and_then(Json::as_str) != Some("assistant") {
                continue;
            }
            let before = self.first(&self.plain, chat, i, true);
            let after = self.first(&self.plain, chat, i + 1, false);
            match (before, after) {
                (Ok(before), Ok(after)) if after.starts_with(&before) && text.starts_with(&after) => {
                    answers.push(before.len()..after.len());
                }
                (before, after) => {
                    return match &self.marked {
                        Some(_) => self.marked_answers(chat, text),
                        // A template may refuse a part of a conversation; then that is the cause.
                        None => Err(before.err().or(after.err()).unwrap_or_else(|| self.no_prefix(i))),
                    };
                }
            }
        }
        Ok((text, answers))
    }

    fn no_prefix(&self, message: usize) -> Error {
        let found = format!(
            "the text of message {} changes with what comes after it, so what the assistant says cannot be told",
            message + 1
        );
        Error::input(&self.origin, format!("{found}; {{% generation %}} blocks in the template would tell"))
    }

    /// The answers by `{% generation %}` blocks.
    fn marked_answers(&self, chat: &Chat, text: String) -> Result<(String, Vec<Range<usize>>)> {
        let Some(marked) = &self.marked else { return Ok((text, Vec::new())) };
        if text.contains(MARKS) {
            return Err(Error::input(
                &self.origin,
                "the messages hold U+FDD0 or U+FDD1, which are no characters",
            ));
        }
        let with_marks = self.first(marked, chat, chat.messages.len(), false)?;
        let (mut plain, mut answers) = (String::new(), Vec::new());
        for part in with_marks.split_inclusive(MARKS) {
            let body = part.strip_suffix(MARKS).unwrap_or(part);
            plain.push_str(body);
            if part.ends_with(MARKS[1]) {
                answers.push(plain.len() - body.len()..plain.len());
            }
        }
        match plain == text {
            true => Ok((text, answers)),
            false => {
                Err(Error::input(&self.origin, "its {% generation %} blocks change the text around them"))
            }
        }
    }

    /// The text of the first `count` messages.
    fn first(&self, env: &Environment, chat: &Chat, count: usize, prompt: bool) -> Result<String> {
        let mut context: Map<String, Json> = chat.more.clone();
        context.insert("messages".into(), Json::from(&chat.messages[..count.min(chat.messages.len())]));
        context.insert("bos_token".into(), Json::from(self.bos.as_str()));
        context.insert("eos_token".into(), Json::from(self.eos.as_str()));
        context.insert("add_generation_prompt".into(), Json::from(prompt));
        let template = env.get_template("chat").map_err(|e| refusal(&self.origin, &e))?;
        template.render(Value::from(Serde(context))).map_err(|e| refusal(&self.origin, &e))
    }

    /// Whether it is the built-in one.
    pub fn is_fallback(&self) -> bool {
        self.fallback
    }

    /// Where it stands.
    pub fn origin(&self) -> &Path {
        &self.origin
    }
}

/// An environment like the one Hugging Face's libraries render chat templates in, limited.
fn environment(origin: &Path, text: String, now: i64) -> Result<Environment<'static>> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.map_err(|e| refusal(origin, &e))?);
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(64);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_unknown_method_callback(python::method);
    env.add_filter("tojson", python::to_json);
    env.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", move |format: &str| python::strftime(format, now));
    env.add_function("qtune_generation", |state: &mut State, named: Kwargs| {
        let text = named.get::<Value>("caller")?.call(state, &[])?;
        Ok::<String, minijinja::Error>(format!("{}{text}{}", MARKS[0], MARKS[1]))
    });
    env.add_template_owned("chat", text).map_err(|e| refusal(origin, &e))?;
    Ok(env)
}

/// A template's error on one line, with its line.
fn refusal(origin: &Path, error: &minijinja::Error) -> Error {
    let line = error.line().map(|line| format!("line {line}: ")).unwrap_or_default();
    let kind = match error.kind() {
        ErrorKind::OutOfFuel => "the template takes too long".to_string(),
        kind => kind.to_string(),
    };
    let text = match (error.kind(), error.detail()) {
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_string(),
        (_, Some(detail)) => format!("{kind}: {detail}"),
        (_, None) => kind,
    };
    Error::input(origin, format!("chat template: {line}{}", one_line(&text)))
}

/// `{% generation %}` and its end under other names; whether there were any.
fn generation_blocks(text: &str, open: &str, close: &str) -> (String, bool) {
    let (mut out, mut rest, mut found) = (String::new(), text, false);
    while let Some(at) = rest.find("{%") {
        let (head, tail) = rest.split_at(at);
        let Some(end) = tail[2..].find("%}") else { break };
        let (tag, after) = tail.split_at(end + 4);
        let inner = tag[2..tag.len() - 2].trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        out.push_str(head);
        match inner {
            "generation" | "endgeneration" => {
                found = true;
                out.push_str(&tag.replace(inner, if inner == "generation" { open } else { close }));
            }
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    (out, found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn chat(turns: &[(&str, &str)]) -> Chat {
        let message = |(role, content): &(&str, &str)| json!({"role": role, "content": content});
        Chat { messages: turns.iter().map(message).collect(), more: Map::new() }
    }

    fn template(text: &str) -> Template {
        Template::at(Path::new("t.jinja"), text, &Tokenizer::bytes().unwrap(), 0).unwrap()
    }

    const CHATML: &str =
        "{%- for message in messages %}\n    {{- '<|im_start|>' + message['role'] + '\\n' + \
        message.content.strip() + '<|im_end|>\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    \
        {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n";

    const TALK: &[(&str, &str)] = &[
        ("system", "Be short."),
        ("user", "2+2?"),
        ("assistant", "4"),
        ("user", "3?"),
        ("assistant", " 3 "),
    ];

    #[test]
    fn chatml_and_what_its_assistant_says() {
        let (text, answers) = template(CHATML).render_with_answers(&chat(TALK)).unwrap();
        assert!(
            text.starts_with("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n2+2?"),
            "{text}"
        );
        let said: Vec<&str> = answers.iter().map(|r| &text[r.clone()]).collect();
        assert_eq!(said, ["4<|im_end|>\n", "3<|im_end|>\n"]);
        let prompt = template(CHATML).render(&chat(&TALK[..2]), true).unwrap();
        assert!(prompt.ends_with("2+2?<|im_end|>\n<|im_start|>assistant\n"), "{prompt}");
    }

    #[test]
    fn the_fallback_is_what_it_says() {
        let t = Template::fallback(&Tokenizer::bytes().unwrap()).unwrap();
        let (text, answers) = t.render_with_answers(&chat(&TALK[..3])).unwrap();
        assert_eq!(text, "<s>Be short.\n\nUser: 2+2?\nAssistant: 4</s>\n");
        assert_eq!(&text[answers[0].clone()], "4</s>\n");
    }

    /// A template that drops earlier answers' thoughts is no prefix of itself.
    #[test]
    fn generation_blocks_tell_where_prefixes_do_not() {
        let body = "{% for m in messages %}\n  {% if m.role == 'user' %}\nQ{{ m.content }}{{ messages|length }}\n  \
            {% else %}\nA{% generation %}{{ m.content }}E{% endgeneration %}\n\n  {% endif %}\n{% endfor %}\n";
        let (text, answers) = template(body).render_with_answers(&chat(&TALK[1..])).unwrap();
        assert_eq!(text, "Q2+2?4\nA4E\nQ3?4\nA 3 E\n");
        assert_eq!(answers.iter().map(|r| &text[r.clone()]).collect::<Vec<_>>(), ["4E", " 3 E"]);
        let without = body.replace("{% generation %}", "").replace("{% endgeneration %}", "");
        let message = template(&without).render_with_answers(&chat(&TALK[1..])).unwrap_err().to_string();
        assert!(message.contains("message 2 changes") && message.contains("{% generation %}"), "{message}");
    }

    #[test]
    fn errors_name_the_line_and_are_one_line() {
        let says = |text: &str| {
            let made = Template::at(Path::new("t.jinja"), text, &Tokenizer::bytes().unwrap(), 0);
            made.and_then(|t| t.render(&chat(TALK), false)).unwrap_err().to_string()
        };
        let refused = says("a\nb\n{{ raise_exception('roles must\\nalternate') }}");
        assert_eq!(refused, "t.jinja: chat template: line 3: roles must alternate");
        assert!(says("\n{% for %}").contains("line 2"), "{}", says("\n{% for %}"));
        assert!(says("{{ messages[0].nothing.more }}").contains("line 1"));
        assert!(says("{% include '/etc/passwd' %}").contains("t.jinja"));
        assert!(says("{%}").contains("t.jinja") && says("a {% generation").contains("t.jinja"));
        let endless = says("{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}");
        assert!(endless.contains("takes too long"), "{endless}");
        assert!(says("{{ 'x' * 99999999999 }}").contains("line 1"));
    }

    #[test]
    fn what_templates_ask_for() {
        let one = chat(&TALK[1..2]);
        let says = |text: &str| template(text).render(&one, true).unwrap();
        assert_eq!(
            says("{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}{{ none }}"),
            "<s></s>TrueNone"
        );
        assert_eq!(says("{{ strftime_now('%d %b %Y') }}{{ undefined_thing }}"), "01 Jan 1970");
        assert_eq!(says("{% set ns = namespace(n=0) %}{% for m in messages[:1] %}{% set ns.n = 3 %}{% endfor %}{{ ns.n }}"), "3");
        assert_eq!(says("{% if tools is defined %}T{% endif %}{{ messages[0]['content'] | trim }}"), "2+2?");
        assert_eq!(says("a\n{% if true %}\n  b\n  {% endif %}\nc\n"), "a\n  b\nc");
        assert_eq!(says("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(messages[-1].role) }}"), "<user>");
    }
}
