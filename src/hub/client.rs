//! Requests to a hub.
//!
//! Redirects are followed here and not by the HTTP library, since each step decides who hears the token:
//! scheme, host and port must be the hub's own.

use std::time::Duration;

use ureq::http::{HeaderMap, Response, Uri};
use ureq::{Agent, Body};

use super::cache::Repo;
use super::Hub;
use crate::{Error, Result};

/// How often a request is made before it counts as failed.
pub(super) const TRIES: u32 = 4;
/// Redirects in a row.
const STEPS: usize = 10;

/// Where a request goes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Origin {
    scheme: String,
    host: String,
    port: u16,
}

impl Origin {
    fn of(url: &str) -> Option<Self> {
        let uri: Uri = url.parse().ok()?;
        let scheme = uri.scheme_str()?.to_ascii_lowercase();
        let standard = match scheme.as_str() {
            "https" => 443,
            "http" => 80,
            _ => return None,
        };
        let host = uri.host()?.to_ascii_lowercase();
        Some(Origin { scheme, host, port: uri.port_u16().unwrap_or(standard) })
    }

    /// Whether it is this machine, which no proxy reaches.
    fn is_local(&self) -> bool {
        ["localhost", "127.0.0.1", "[::1]"].contains(&self.host.as_str())
    }
}

/// Why a request did not succeed.
#[derive(Debug)]
pub(super) struct Trouble {
    pub text: String,
    pub status: Option<u16>,
    /// Whether it may pass.
    pub passing: bool,
}

impl Trouble {
    /// Of a connection; may pass.
    pub fn passing(text: impl Into<String>) -> Self {
        Trouble { text: text.into(), status: None, passing: true }
    }

    fn lasting(text: impl Into<String>) -> Self {
        Trouble { text: text.into(), status: None, passing: false }
    }

    /// Of an answer that was not asked for.
    pub fn of_status(status: u16) -> Self {
        let text = match status {
            401 => "the hub wants to know who asks (401)".to_string(),
            403 => "the hub grants no access (403)".to_string(),
            404 => "the hub has none (404)".to_string(),
            429 => "the hub was asked too often (429)".to_string(),
            other => format!("the hub answered {other}"),
        };
        Trouble { text, status: Some(status), passing: status == 429 || status >= 500 }
    }

    fn of_library(error: &ureq::Error) -> Self {
        let text = error.to_string();
        let text = text.lines().next().unwrap_or_default().to_string();
        let passing = matches!(
            error,
            ureq::Error::Io(_)
                | ureq::Error::Timeout(_)
                | ureq::Error::ConnectionFailed
                | ureq::Error::Protocol(_)
                | ureq::Error::BodyStalled
        );
        Trouble { text, status: None, passing }
    }
}

/// A hub that is asked.
pub(super) struct Client<'a> {
    hub: &'a Hub,
    agent: Agent,
    origin: Origin,
}

/// The value of a header, where it is text.
pub(super) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

impl<'a> Client<'a> {
    /// Of a hub; nothing is asked yet.
    pub fn new(hub: &'a Hub) -> Result<Self> {
        let Some(origin) = Origin::of(&hub.endpoint) else {
            return Err(Error::usage(format!("HF_ENDPOINT: {} is no address", hub.endpoint)));
        };
        let minute = Some(Duration::from_secs(60));
        let mut config = Agent::config_builder()
            .max_redirects(0)
            .http_status_as_error(false)
            .user_agent(concat!("qtune/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(minute)
            .timeout_recv_response(minute)
            .timeout_per_read(minute);
        if origin.is_local() {
            config = config.proxy(None);
        }
        Ok(Client { hub, agent: config.build().into(), origin })
    }

    /// Headers of the file at `url`, and the status. A redirect to another host ends it: what the hub
    /// says of the file stands in the redirect.
    pub fn head(&self, url: &str) -> Result<Response<Body>, Trouble> {
        self.walk(url, |url, own| {
            let mut request = self.agent.head(url).header("accept-encoding", "identity");
            if let Some(token) = own {
                request = request.header("authorization", token);
            }
            request.call()
        })
    }

    /// The bytes at `url` from number `from` on, where it is above 0.
    pub fn get(&self, url: &str, from: u64) -> Result<Response<Body>, Trouble> {
        let mut at = url.to_string();
        for _ in 0..STEPS {
            let reply = self.walk(&at, |url, own| {
                let mut request = self.agent.get(url).header("accept-encoding", "identity");
                if let Some(token) = own {
                    request = request.header("authorization", token);
                }
                if from > 0 {
                    request = request.header("range", format!("bytes={from}-"));
                }
                request.call()
            })?;
            match self.next(&at, &reply)? {
                Some(next) => at = next,
                None => return Ok(reply),
            }
        }
        Err(Trouble::lasting(format!("more than {STEPS} redirects")))
    }

    /// Asks, follows redirects within one origin, and returns the first other answer.
    fn walk(
        &self,
        url: &str,
        ask: impl Fn(&str, Option<String>) -> std::result::Result<Response<Body>, ureq::Error>,
    ) -> Result<Response<Body>, Trouble> {
        let mut at = url.to_string();
        for _ in 0..STEPS {
            let own = Origin::of(&at).as_ref() == Some(&self.origin);
            let token = self.hub.token.as_ref().filter(|_| own).map(|token| token.header());
            let reply = ask(&at, token).map_err(|e| Trouble::of_library(&e))?;
            match self.next(&at, &reply)? {
                Some(next) if Origin::of(&next) == Origin::of(&at) => at = next,
                _ => return Ok(reply),
            }
        }
        Err(Trouble::lasting(format!("more than {STEPS} redirects")))
    }

    /// Where a redirect leads; `None` where the answer is none.
    fn next(&self, at: &str, reply: &Response<Body>) -> Result<Option<String>, Trouble> {
        if !matches!(reply.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
            return Ok(None);
        }
        let Some(location) = header(reply.headers(), "location") else {
            return Err(Trouble::lasting("a redirect that leads nowhere"));
        };
        let next = joined(at, location).ok_or_else(|| Trouble::lasting("a redirect that is no address"))?;
        let scheme = |url: &str| Origin::of(url).map(|origin| origin.scheme);
        match (scheme(at).as_deref(), scheme(&next).as_deref()) {
            (Some("https"), Some("http")) => Err(Trouble::lasting("a redirect from https to plain http")),
            (_, None) => Err(Trouble::lasting("a redirect that is no address")),
            _ => Ok(Some(next)),
        }
    }

    /// Makes a request again while its trouble may pass, after longer and longer pauses.
    pub fn patiently<T>(&self, mut ask: impl FnMut() -> Result<T, Trouble>) -> Result<T, Trouble> {
        for failed in 0.. {
            match ask() {
                Err(trouble) if trouble.passing && failed + 1 < TRIES => self.pause(failed),
                other => return other,
            }
        }
        Err(Trouble::lasting("never asked"))
    }

    /// Waits after so many failures.
    pub fn pause(&self, failed: u32) {
        std::thread::sleep(self.hub.pause.saturating_mul(1 << failed.min(6)));
    }

    /// The error of `repo` for `what` that could not be had.
    pub fn error(&self, repo: &Repo, what: &str, trouble: &Trouble) -> Error {
        let Origin { scheme, host, port } = &self.origin;
        let place = match (scheme.as_str(), port) {
            ("https", 443) | ("http", 80) => format!("{scheme}://{host}"),
            _ => format!("{scheme}://{host}:{port}"),
        };
        let hint = match (trouble.status, &self.hub.token) {
            // The hub answers 401 to strangers for what does not exist, so as not to tell.
            (Some(401 | 404), None) => "; a private or gated one wants a token in HF_TOKEN",
            (Some(401), Some(_)) => "; is the token still good?",
            (Some(403), _) => "; a gated one wants its terms accepted on its page",
            _ => "",
        };
        let text = &trouble.text;
        match trouble.status {
            Some(401 | 403 | 404) => Error::input(
                repo.id(),
                format!("no such file or folder, and no {repo} to be had from {place}: {what}: {text}{hint}"),
            ),
            _ => Error::Run(format!("{repo}: {what} could not be had from {place}: {text}")),
        }
    }
}

/// The address that `location` means, seen from `at`.
fn joined(at: &str, location: &str) -> Option<String> {
    let origin_end = at.find("://").map(|i| i + 3)?;
    let path = at[origin_end..].find('/').map_or(at.len(), |i| origin_end + i);
    if let Some(rest) = location.strip_prefix("//") {
        return Some(format!("{}{rest}", &at[..origin_end]));
    }
    match location.starts_with('/') {
        true => Some(format!("{}{location}", &at[..path])),
        false => location.contains("://").then(|| location.to_string()),
    }
}

/// `text` in an address; `keep`: signs that stay beside letters and digits.
pub(super) fn encoded(text: &str, keep: &[u8]) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || keep.contains(&byte) {
            true => out.push(byte as char),
            false => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_scheme_host_and_port_are_the_same_place() {
        let of = |url: &str| Origin::of(url).unwrap();
        let hub = of("https://Hub.co");
        assert_eq!(of("https://hub.co:443/a?b"), hub);
        for other in [
            "http://hub.co",
            "https://hub.co:8443",
            "https://hub.co.evil.org",
            "https://hub.co@evil.org/",
            "https://cdn.hub.co",
        ] {
            assert_ne!(of(other), hub, "{other}");
        }
        assert_eq!(Origin::of("file:///etc"), None);
        assert_eq!(Origin::of("/a"), None);
    }

    #[test]
    fn redirects_are_read_from_where_they_are_met() {
        let of = |location: &str| joined("http://a:1/b/c?d", location);
        assert_eq!(of("/x?y").unwrap(), "http://a:1/x?y");
        assert_eq!(of("//b/x").unwrap(), "http://b/x");
        assert_eq!(of("https://b/x").unwrap(), "https://b/x");
        assert_eq!(of("x"), None);
        assert_eq!(encoded("refs/pr/1 ü", b""), "refs%2Fpr%2F1%20%C3%BC");
        assert_eq!(encoded("a/b+c", b"/"), "a/b%2Bc");
    }
}
