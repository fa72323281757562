//! What the environment says of the hub: where the cache is, which hub, which token.

use std::fmt;
use std::path::{Path, PathBuf};

use super::Hub;
use crate::{Error, Result};

/// The hub where nothing else is said.
pub(super) const PUBLIC: &str = "https://huggingface.co";

/// A token. It does not show itself.
#[derive(Clone, PartialEq)]
#[cfg_attr(not(feature = "hub"), allow(dead_code))]
pub(super) struct Token(String);

impl Token {
    /// Of what `source` holds, spaces around it aside.
    pub fn new(text: &str, source: &str) -> Result<Self> {
        let text = text.trim();
        match !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic()) {
            true => Ok(Token(text.to_string())),
            // It would break the header that carries it.
            false => Err(Error::usage(format!("{source}: expected a token of letters, digits and signs"))),
        }
    }

    /// The value of the header that carries it.
    #[cfg(feature = "hub")]
    pub fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// A hub's address without a slash at its end.
pub(super) fn endpoint(text: &str) -> Result<String> {
    let text = text.trim().trim_end_matches('/');
    let rest = ["https://", "http://"].iter().find_map(|scheme| text.strip_prefix(scheme));
    let host = rest.map(|rest| rest.split('/').next().unwrap_or_default());
    let plain = |host: &str| !host.is_empty() && host.bytes().all(|b| b.is_ascii_graphic());
    match host {
        // What stands before an @ may be a password: it is not repeated.
        Some(host) if host.contains('@') => Err(Error::usage(
            "HF_ENDPOINT: found a user in the address, expected a host: tokens go in HF_TOKEN",
        )),
        Some(host) if plain(host) && !text.contains(['?', '#']) => Ok(text.to_string()),
        _ => Err(Error::usage(format!("HF_ENDPOINT: found {text:?}, expected an address as {PUBLIC}"))),
    }
}

impl Hub {
    /// `get` looks an environment variable up; empty ones count as unset.
    pub(super) fn from_vars(get: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let base = || {
            get("XDG_CACHE_HOME")
                .map(PathBuf::from)
                .or_else(|| get("HOME").or_else(|| get("USERPROFILE")).map(|h| Path::new(&h).join(".cache")))
        };
        let home = get("HF_HOME").map(PathBuf::from).or_else(|| base().map(|b| b.join("huggingface")));
        let Some(home) = home else {
            return Err(Error::usage(
                "no Hugging Face cache: found none of HF_HOME, XDG_CACHE_HOME and HOME",
            ));
        };
        let mut hub = Hub::new(get("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from));
        if let Some(text) = get("HF_ENDPOINT") {
            hub.endpoint = endpoint(&text)?;
        }
        let yes = |v: String| ["1", "on", "yes", "true"].contains(&v.to_ascii_lowercase().as_str());
        hub.offline = get("HF_HUB_OFFLINE").is_some_and(yes);
        let file = get("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        hub.token = match get("HF_TOKEN") {
            Some(text) => Some(Token::new(&text, "HF_TOKEN")?),
            None => match std::fs::read_to_string(&file) {
                Ok(text) if !text.trim().is_empty() => Some(Token::new(&text, &file.display().to_string())?),
                _ => None,
            },
        };
        Ok(hub)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(vars: &[(&str, &str)]) -> Result<Hub> {
        Hub::from_vars(|key| vars.iter().find(|(k, _)| *k == key).map(|(_, v)| v.to_string()))
    }

    #[test]
    fn the_environment_points_at_the_cache() {
        assert_eq!(of(&[("HOME", "/h")]).unwrap().cache, Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(of(&[("HOME", "/h"), ("HF_HOME", "/f")]).unwrap().cache, Path::new("/f/hub"));
        assert_eq!(of(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/f")]).unwrap().cache, Path::new("/c"));
        assert!(of(&[("HOME", "/h"), ("HF_HUB_OFFLINE", "TRUE")]).unwrap().offline);
        assert!(!of(&[("HOME", "/h"), ("HF_HUB_OFFLINE", "0")]).unwrap().offline);
        assert_eq!(of(&[]).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn the_token_comes_from_the_variable_then_the_file_and_never_shows() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().to_str().unwrap();
        assert_eq!(of(&[("HF_HOME", home)]).unwrap().token, None);
        std::fs::write(dir.path().join("token"), "hf_file\n").unwrap();
        std::fs::write(dir.path().join("other"), "hf_other").unwrap();
        let other = dir.path().join("other");
        let named = ("HF_TOKEN_PATH", other.to_str().unwrap());
        let token = |vars: &[(&str, &str)]| of(vars).unwrap().token.unwrap();
        assert_eq!(token(&[("HF_HOME", home)]).0, "hf_file");
        assert_eq!(token(&[("HF_HOME", home), named]).0, "hf_other");
        assert_eq!(token(&[("HF_HOME", home), named, ("HF_TOKEN", "hf_var")]).0, "hf_var");
        let hub = of(&[("HF_HOME", home)]).unwrap();
        assert!(!format!("{hub:?}").contains("hf_file"));
        let error = of(&[("HF_HOME", home), ("HF_TOKEN", "hf_a\nX: b")]).unwrap_err().to_string();
        assert!(error.contains("HF_TOKEN") && !error.contains("hf_a"), "{error}");
    }

    #[test]
    fn addresses_are_checked_and_passwords_not_repeated() {
        assert_eq!(endpoint("http://127.0.0.1:80/x/").unwrap(), "http://127.0.0.1:80/x");
        for bad in ["", "huggingface.co", "ftp://a", "https://", "https://a/?b", "https:///a"] {
            assert_eq!(endpoint(bad).unwrap_err().exit_code(), 2, "{bad}");
        }
        let error = endpoint("https://me:secret@hub").unwrap_err().to_string();
        assert!(!error.contains("secret"), "{error}");
    }
}
