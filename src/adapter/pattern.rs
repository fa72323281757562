//! Python's regular expressions on module paths.
//!
//! Files hold patterns written for Python's `re`, look-around and back-references among them. They run
//! here on an engine that has both, with a limit on backtracking; what the two engines read
//! differently is refused with the pattern shown, never ignored.

use fancy_regex::{Regex, RegexBuilder};

use crate::{Error, Result};

/// Steps of backtracking that one match may take.
const BACKTRACK: usize = 100_000;

/// A compiled pattern of `key` in a configuration.
#[derive(Clone, Debug)]
pub struct Pattern {
    regex: Regex,
    shown: String,
}

impl Pattern {
    /// `re.fullmatch(pattern, path)`.
    pub fn full(key: &str, pattern: &str) -> Result<Self> {
        Self::build(key, pattern, format!(r"\A(?:{pattern})\z"))
    }

    /// `re.match(rf"(.*\.)?({pattern})$", path)`: what keys of rank_pattern and alpha_pattern mean.
    pub fn suffix(key: &str, pattern: &str) -> Result<Self> {
        // The groups are those of PEFT's own expression, so that back-references count the same.
        Self::build(key, pattern, format!(r"\A(.*\.)?({pattern})\z"))
    }

    /// The layer number behind `pattern`, found from the start of the path: one entry of layers_pattern.
    pub fn layer(key: &str, pattern: &str) -> Result<Self> {
        Self::build(key, pattern, format!(r"\A(?:|.*?\.)(?:{pattern})\.(?P<layer>\d+)\."))
    }

    /// The first number that follows two segments: the layer number where there is no layers_pattern.
    pub fn any_layer() -> Result<Self> {
        Self::build("layers_pattern", "", r"\A.*?\.[^.]*\.(?P<layer>\d+)\.".to_string())
    }

    fn build(key: &str, pattern: &str, whole: String) -> Result<Self> {
        let shown = format!("{key}: the pattern {pattern:?}");
        if let Some(why) = foreign(pattern) {
            return Err(Error::usage(format!(
                "{shown} {why}: write it another way, or as a list of modules"
            )));
        }
        let build = |text: &str| {
            let built = RegexBuilder::new(text).backtrack_limit(BACKTRACK).build();
            built.map_err(|e| unreadable(&shown, &e))
        };
        // Alone first: a bracket that only ours would close is an error too.
        build(pattern)?;
        Ok(Pattern { regex: build(&whole)?, shown })
    }

    /// Whether the pattern matches `path`.
    pub fn matches(&self, path: &str) -> Result<bool> {
        self.regex.is_match(path).map_err(|e| self.too_hard(path, &e))
    }

    /// The layer number in `path` (patterns made by [`Pattern::layer`] and [`Pattern::any_layer`]).
    pub fn layer_of(&self, path: &str) -> Result<Option<u64>> {
        let found = self.regex.captures(path).map_err(|e| self.too_hard(path, &e))?;
        Ok(found.and_then(|c| c.name("layer")?.as_str().parse().ok()))
    }

    fn too_hard(&self, path: &str, error: &fancy_regex::Error) -> Error {
        let error = error.to_string();
        Error::usage(format!("{} on {path}: {}", self.shown, error.lines().next().unwrap_or_default()))
    }
}

fn unreadable(shown: &str, error: &fancy_regex::Error) -> Error {
    let error = error.to_string();
    // The parser's message is a drawing: its last line says what is wrong.
    let said = error.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or_default();
    Error::usage(format!("{shown} cannot be read: {said}"))
}

/// What Python and the engine here read differently; `None`: nothing.
fn foreign(pattern: &str) -> Option<String> {
    let mut chars = pattern.chars().peekable();
    let mut class = false;
    let mut before = ' ';
    while let Some(c) = chars.next() {
        let next = chars.peek().copied();
        match c {
            '\\' => {
                let escaped = chars.next()?;
                let python = "dDwWsSbBAZntrfvaxu".contains(escaped) || escaped.is_ascii_digit();
                if escaped.is_ascii_alphabetic() && !python {
                    return Some(format!(
                        "has \\{escaped}, which Python's re reads differently or not at all"
                    ));
                }
            }
            '[' if class => return Some("has [ within [], which is plain in Python alone".to_string()),
            '[' => {
                class = true;
                // A leading ] or ^] is plain.
                if next == Some('^') {
                    chars.next();
                }
                if chars.peek() == Some(&']') {
                    chars.next();
                }
            }
            ']' => class = false,
            '&' | '~' | '-' if class && before == c => {
                return Some(format!("has {c}{c} within [], which is plain in Python alone"));
            }
            '{' if !class && next == Some(',') => {
                return Some("has {,n}, which only Python reads as {0,n}".to_string());
            }
            _ => {}
        }
        before = c;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(pattern: &str, path: &str) -> bool {
        Pattern::full("target_modules", pattern).unwrap().matches(path).unwrap()
    }

    #[test]
    fn whole_paths_look_around_and_back_references() {
        let q = "model.layers.0.self_attn.q_proj";
        assert!(!full("q_proj", q));
        assert!(full(".*q_proj", q));
        assert!(full(r".*\.(q|v)_proj", q));
        assert!(full(r"^(?!.*vision).*(?:q_proj|v_proj).*$", q));
        assert!(!full(r"^(?!.*vision).*(?:q_proj|v_proj).*$", "vision.layers.0.q_proj"));
        assert!(full(r"(?P<n>\w+)\.(?P=n)", "ab.ab"));
        assert!(full(r"(\w+)\.\1", "ab.ab") && !full(r"(\w+)\.\1", "ab.ba"));
        // An alternation is whole on both sides.
        assert!(!full("a|b", "ab") && full("a|b", "b"));
        assert!(full("(?i).*Q_PROJ", q));
    }

    #[test]
    fn suffixes_as_peft_matches_them() {
        let fits = |pattern: &str, path: &str| {
            Pattern::suffix("rank_pattern", pattern).unwrap().matches(path).unwrap()
        };
        assert!(fits("down_proj", "model.layers.0.mlp.down_proj"));
        assert!(!fits("own_proj", "model.layers.0.mlp.down_proj"));
        assert!(fits("layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"));
        // A dot is a wildcard, and ^ asks for the whole path.
        assert!(fits("layers.0.q", "layers_0.q"));
        assert!(fits("^model.q", "model.q") && !fits("^q", "model.q"));
    }

    #[test]
    fn layers() {
        let any = Pattern::any_layer().unwrap();
        assert_eq!(any.layer_of("model.layers.7.mlp.experts.3.up_proj").unwrap(), Some(7));
        assert_eq!(any.layer_of("lm_head").unwrap(), None);
        assert_eq!(any.layer_of("layers.0.self_attn.q_proj").unwrap(), None);
        let h = Pattern::layer("layers_pattern", "h").unwrap();
        assert_eq!(h.layer_of("h.3.attn").unwrap(), Some(3));
        assert_eq!(h.layer_of("transformer.h.12.attn.h.2.c").unwrap(), Some(12));
        assert_eq!(h.layer_of("transformer.sh.12.attn").unwrap(), None);
    }

    #[test]
    fn what_cannot_be_read_is_shown() {
        for pattern in ["(", "a)(b", r"\p{L}", "[a&&b]", "[[a]]", "a{,3}", "(?<!a+)b(?a)", r"\K"] {
            let error = Pattern::full("target_modules", pattern).expect_err(pattern);
            let (code, error) = (error.exit_code(), error.to_string());
            assert_eq!(code, 2, "{error}");
            assert!(error.contains("target_modules") && !error.contains('\n'), "{error}");
            assert!(error.contains(&format!("{pattern:?}")), "{error}");
        }
        // Catastrophic backtracking ends.
        let slow = Pattern::full("target_modules", r"((?:a|aa)+)\1b").unwrap();
        let error = slow.matches(&format!("{}cb", "a".repeat(60))).unwrap_err().to_string();
        assert!(error.contains("acktrack"), "{error}");
    }
}
