//! What chat templates use of Python: methods of strings, maps and lists, `tojson` as Hugging Face's
//! libraries space it, `strftime_now`.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};
use serde_json::Value as Json;

/// A method that the template engine does not know of, with Python's meaning.
pub(super) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::String => match value.as_str() {
            Some(text) => of_string(text, name, args),
            None => Err(unknown()),
        },
        ValueKind::Map => match (name, args) {
            ("items", []) => state.apply_filter("items", std::slice::from_ref(value)),
            ("keys", []) => Ok(value.try_iter()?.collect()),
            ("values", []) => value.try_iter()?.map(|key| value.get_item(&key)).collect(),
            ("get", [key] | [key, _]) => {
                let found = value.get_item(key)?;
                Ok(match found.is_undefined() {
                    true => args.get(1).cloned().unwrap_or(Value::from(())),
                    false => found,
                })
            }
            _ => Err(unknown()),
        },
        ValueKind::Seq => match (name, args) {
            ("count", [wanted]) => Ok(Value::from(value.try_iter()?.filter(|item| item == wanted).count())),
            ("index", [wanted]) => {
                let place = value.try_iter()?.position(|item| item == *wanted);
                place.map(Value::from).ok_or_else(|| wrong(format!("{wanted} is not in the list")))
            }
            _ => Err(unknown()),
        },
        _ => Err(unknown()),
    }
}

fn unknown() -> Error {
    Error::from(ErrorKind::UnknownMethod)
}

fn wrong(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

fn of_string(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let word = |i: usize| -> Result<&str, Error> {
        let found = args.get(i).and_then(Value::as_str);
        found.ok_or_else(|| wrong(format!("{name}: expected a string as argument {}", i + 1)))
    };
    // None and a missing argument mean the default.
    let given = |i: usize| args.get(i).filter(|v| !v.is_none() && !v.is_undefined() && !v.is_kwargs());
    let any_of = |test: &dyn Fn(&str) -> bool| -> Result<Value, Error> {
        let Some(first) = args.first() else { return Err(wrong(format!("{name}: expected an argument"))) };
        if let Some(word) = first.as_str() {
            return Ok(Value::from(test(word)));
        }
        Ok(Value::from(first.try_iter()?.any(|item| item.as_str().is_some_and(test))))
    };
    Ok(match name {
        "strip" | "lstrip" | "rstrip" => {
            let set = match given(0) {
                Some(_) => Some(word(0)?),
                None => None,
            };
            let out = |c: char| set.map_or(c.is_whitespace(), |set| set.contains(c));
            let text = if name == "rstrip" { text } else { text.trim_start_matches(out) };
            Value::from(if name == "lstrip" { text } else { text.trim_end_matches(out) })
        }
        "split" | "rsplit" => {
            let most = match given(1) {
                Some(n) => n.as_i64().and_then(|n| usize::try_from(n).ok()),
                None => Kwargs::try_from(args.last().cloned().unwrap_or_default())
                    .ok()
                    .and_then(|named| named.get::<Option<usize>>("maxsplit").ok().flatten()),
            };
            let parts = match given(0) {
                Some(_) if word(0)?.is_empty() => return Err(wrong(format!("{name}: empty separator"))),
                Some(_) => split_at(text, word(0)?, most, name == "rsplit"),
                None => split_spaces(text, most, name == "rsplit"),
            };
            Value::from_iter(parts)
        }
        "splitlines" => Value::from_iter(text.lines()),
        "startswith" => any_of(&|word| text.starts_with(word))?,
        "endswith" => any_of(&|word| text.ends_with(word))?,
        "upper" => Value::from(text.to_uppercase()),
        "lower" => Value::from(text.to_lowercase()),
        "capitalize" => Value::from(capitalized(text)),
        "title" => {
            let mut inside = false;
            let mut titled = String::new();
            for c in text.chars() {
                match inside {
                    true => titled.extend(c.to_lowercase()),
                    false => titled.extend(c.to_uppercase()),
                }
                inside = c.is_alphabetic();
            }
            Value::from(titled)
        }
        "replace" => match given(2).and_then(Value::as_i64).and_then(|n| usize::try_from(n).ok()) {
            Some(most) => Value::from(text.replacen(word(0)?, word(1)?, most)),
            None => Value::from(text.replace(word(0)?, word(1)?)),
        },
        "join" => {
            let Some(list) = args.first() else { return Err(wrong("join: expected a list".into())) };
            let parts: Vec<String> = list.try_iter()?.map(|item| item.to_string()).collect();
            Value::from(parts.join(text))
        }
        "find" | "rfind" => {
            let wanted = word(0)?;
            let byte = if name == "find" { text.find(wanted) } else { text.rfind(wanted) };
            Value::from(byte.map_or(-1, |at| text[..at].chars().count() as i64))
        }
        "count" => Value::from(text.matches(word(0)?).count()),
        "removeprefix" => Value::from(text.strip_prefix(word(0)?).unwrap_or(text)),
        "removesuffix" => Value::from(text.strip_suffix(word(0)?).unwrap_or(text)),
        "isdigit" | "isnumeric" => Value::from(!text.is_empty() && text.chars().all(char::is_numeric)),
        "isalpha" => Value::from(!text.is_empty() && text.chars().all(char::is_alphabetic)),
        "isalnum" => Value::from(!text.is_empty() && text.chars().all(char::is_alphanumeric)),
        "isspace" => Value::from(!text.is_empty() && text.chars().all(char::is_whitespace)),
        "islower" => {
            Value::from(text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase))
        }
        "isupper" => {
            Value::from(text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase))
        }
        _ => return Err(unknown()),
    })
}

fn capitalized(text: &str) -> String {
    let mut rest = text.chars();
    let first: String = rest.next().map(|c| c.to_uppercase().collect()).unwrap_or_default();
    first + &rest.as_str().to_lowercase()
}

fn split_at<'a>(text: &'a str, by: &str, most: Option<usize>, from_right: bool) -> Vec<&'a str> {
    match (most, from_right) {
        (None, _) => text.split(by).collect(),
        (Some(n), false) => text.splitn(n.saturating_add(1), by).collect(),
        (Some(n), true) => {
            let mut parts: Vec<&str> = text.rsplitn(n.saturating_add(1), by).collect();
            parts.reverse();
            parts
        }
    }
}

/// Without a separator: at runs of white space, none of it kept at the ends.
fn split_spaces(text: &str, most: Option<usize>, from_right: bool) -> Vec<&str> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let Some(most) = most.filter(|n| *n < words.len().saturating_sub(1)) else { return words };
    // What is not split any more is kept as it stands between its first and last word.
    let place = |word: &str| word.as_ptr() as usize - text.as_ptr() as usize;
    if from_right {
        let cut = words.len() - most;
        let end = place(words[cut - 1]) + words[cut - 1].len();
        let mut parts = vec![text[..end].trim_start()];
        parts.extend(&words[cut..]);
        return parts;
    }
    let mut parts = words[..most].to_vec();
    parts.push(text[place(words[most])..].trim_end());
    parts
}

/// `tojson` as Hugging Face's libraries have it: Python's `json.dumps` with `ensure_ascii=False`, so
/// spaces behind `,` and `:`, and nothing escaped for HTML.
pub(super) fn to_json(value: &Value, args: Kwargs) -> Result<Value, Error> {
    let indent = args.get::<Option<usize>>("indent")?;
    // What is beyond ASCII stays as it is, as Hugging Face's libraries have it.
    let _ = args.get::<Option<bool>>("ensure_ascii")?;
    let sorted = args.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    args.assert_all_used()?;
    let mut json = serde_json::to_value(value).map_err(|e| wrong(format!("tojson: {e}")))?;
    if sorted {
        json.sort_all_objects();
    }
    let mut out = String::new();
    write_json(&json, indent.map(|n| n.min(16)), 0, &mut out);
    Ok(Value::from(out))
}

fn write_json(value: &Json, indent: Option<usize>, depth: usize, out: &mut String) {
    let (open, close, len) = match value {
        Json::Array(list) => ('[', ']', list.len()),
        Json::Object(map) => ('{', '}', map.len()),
        plain => return out.push_str(&plain.to_string()),
    };
    let line = |depth: usize, out: &mut String| {
        if let Some(indent) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    out.push(open);
    let mut item = |i: usize, key: Option<&str>, value: &Json| {
        if i > 0 {
            out.push_str(if indent.is_some() { "," } else { ", " });
        }
        line(depth + 1, out);
        if let Some(key) = key {
            out.push_str(&Json::from(key).to_string());
            out.push_str(": ");
        }
        write_json(value, indent, depth + 1, out);
    };
    match value {
        Json::Array(list) => list.iter().enumerate().for_each(|(i, v)| item(i, None, v)),
        Json::Object(map) => map.iter().enumerate().for_each(|(i, (k, v))| item(i, Some(k), v)),
        _ => {}
    }
    if len > 0 {
        line(depth, out);
    }
    out.push(close);
}

/// The time `seconds` after 1970 in UTC, by a `strftime` format: `%Y %y %m %B %b %d %e %j %A %a %H %I %M
/// %S %p %%`; other directives stay as they are.
pub(super) fn strftime(format: &str, seconds: i64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Years that begin in March end with the leap day; eras of 400 years are all alike.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let of = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * of + of / 4 - of / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = of + era * 400 + i64::from(month <= 2);
    let leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
    let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334][(month - 1) as usize];
    let ordinal = before + day + i64::from(leap && month > 2);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let name = MONTHS[(month - 1) as usize];
    let weekday = DAYS[days.rem_euclid(7) as usize];
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match rest.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&format!("{:02}", year.rem_euclid(100))),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('B') => out.push_str(name),
            Some('b') => out.push_str(&name[..3]),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('e') => out.push_str(&format!("{day:2}")),
            Some('j') => out.push_str(&format!("{ordinal:03}")),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('H') => out.push_str(&format!("{hour:02}")),
            Some('I') => out.push_str(&format!("{:02}", (hour + 11) % 12 + 1)),
            Some('M') => out.push_str(&format!("{minute:02}")),
            Some('S') => out.push_str(&format!("{:02}", second % 60)),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(template: &str) -> String {
        let mut env = minijinja::Environment::new();
        env.set_unknown_method_callback(method);
        env.add_filter("tojson", to_json);
        env.render_str(template, minijinja::context! { m => minijinja::value::Serde(serde_json::json!({"a": [1, "é<"], "b": null})) })
            .unwrap_or_else(|e| format!("error: {e}"))
    }

    #[test]
    fn methods_do_what_python_does() {
        let cases = [
            ("{{ ' a b '.strip() }}|{{ 'xxaxx'.strip('x') }}|{{ ' a '.lstrip() }}|{{ ' a '.rstrip() }}", "a b|a|a | a"),
            ("{{ 'a,b,c'.split(',') | join('+') }} {{ 'a,b,c'.split(',', 1)[1] }}", "a+b+c b,c"),
            ("{{ 'a,b,c'.rsplit(',', 1)[0] }} {{ ' a  b c '.split()|join('.') }}", "a,b a.b.c"),
            ("{{ ' a  b  c '.split(None, 1)[1] }}|{{ 'a,b'.split(',', maxsplit=1)|length }}", "b  c|2"),
            ("{{ ' a  b  c '.rsplit(None, 1)[0] }}", "a  b"),
            ("{{ 'abc'.startswith('ab') }} {{ 'abc'.endswith(['x', 'bc']) }}", "True True"),
            ("{{ 'hELLO wORLD'.title() }} {{ 'hELLO'.capitalize() }} {{ 'a'.upper() }}", "Hello World Hello A"),
            ("{{ 'aaa'.replace('a', 'b', 2) }} {{ 'héh'.find('h') }} {{ 'x'.find('y') }}", "bba 0 -1"),
            ("{{ 'ab'.removeprefix('a') }} {{ ','.join(['a', 'b']) }} {{ 'banana'.count('an') }}", "b a,b 2"),
            ("{% for k, v in m.items() %}{{ k }}{% endfor %} {{ m.get('x', 'd') }} {{ m.get('a')|length }}", "ab d 2"),
            ("{{ m | tojson }}", "{\"a\": [1, \"é<\"], \"b\": null}"),
            ("{{ m.a | tojson(indent=2) }}", "[\n  1,\n  \"é<\"\n]"),
            ("{{ [] | tojson(indent=4) }}", "[]"),
        ];
        for (template, expected) in cases {
            assert_eq!(says(template), expected, "{template}");
        }
        for bad in
            ["{{ 'a'.nonsense() }}", "{{ 'a'.split('') }}", "{{ 'a'.replace(1, 2) }}", "{{ 3.strip() }}"]
        {
            assert!(says(bad).starts_with("error"), "{bad}");
        }
    }

    #[test]
    fn dates() {
        assert_eq!(strftime("%d %b %Y", 0), "01 Jan 1970");
        assert_eq!(strftime("%Y-%m-%d %H:%M:%S %a %j", 951_827_696), "2000-02-29 12:34:56 Tue 060");
        assert_eq!(strftime("%A %B %e %y %I%p %% %Q", 1_735_689_599), "Tuesday December 31 24 11PM % %Q");
        assert_eq!(strftime("%Y %j", -1), "1969 365");
    }
}
