//! Where a model or a data set lies: a local path, or a hub name `org/name[@revision]` in the Hugging Face
//! cache, which a build with the `hub` feature fills by downloading.
//!
//! The cache is the one that Python's `huggingface_hub` keeps, file for file: what either has fetched the
//! other finds. A download that broke off goes on where it stopped. The token goes to the hub's own host
//! and to no other, whatever a redirect says, and no message holds it.

mod cache;
#[cfg(feature = "hub")]
mod client;
#[cfg(feature = "hub")]
mod download;
mod name;
mod surroundings;

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::data::text::is_text;
use crate::{Error, Result};
use cache::{Cached, Repo};
use name::Name;
use surroundings::Token;

/// The folder of `model`: an existing path as it is, or the snapshot of a hub name; see [`Hub::model`].
pub fn resolve(model: &str) -> Result<PathBuf> {
    match Path::new(model).exists() {
        true => Ok(PathBuf::from(model)),
        false => Hub::from_env()?.model(model),
    }
}

/// The folder of the data set `data`: an existing path as it is, or the snapshot of a hub name; see
/// [`Hub::data`]. What is neither, or ends as a file of text does, stays as it is.
pub fn resolve_data(data: &str) -> Result<PathBuf> {
    let path = PathBuf::from(data);
    if path.exists() || is_text(&path) || Name::parse_data(data).is_none() {
        return Ok(path);
    }
    Hub::from_env()?.data(data)
}

/// A hub and the cache of what it has.
#[derive(Clone, Debug)]
#[cfg_attr(not(feature = "hub"), allow(dead_code))]
pub struct Hub {
    cache: PathBuf,
    endpoint: String,
    token: Option<Token>,
    offline: bool,
    pause: Duration,
}

impl Hub {
    /// The public hub without a token, over the cache in the folder `cache`.
    pub fn new(cache: impl Into<PathBuf>) -> Self {
        Hub {
            cache: cache.into(),
            endpoint: surroundings::PUBLIC.to_string(),
            token: None,
            offline: false,
            pause: Duration::from_secs(1),
        }
    }

    /// What the environment says: the cache in `HF_HUB_CACHE`, else `HF_HOME/hub`, else
    /// `~/.cache/huggingface/hub`; the hub at `HF_ENDPOINT`; the token in `HF_TOKEN`, else in the file
    /// `HF_TOKEN_PATH`, else in `HF_HOME/token`; no request at all where `HF_HUB_OFFLINE` is set.
    pub fn from_env() -> Result<Self> {
        Self::from_vars(|key| std::env::var(key).ok().filter(|v| !v.is_empty()))
    }

    /// Another hub. Errs ([`Error::Usage`]) on what is no http or https address, or names a user.
    pub fn with_endpoint(mut self, endpoint: &str) -> Result<Self> {
        self.endpoint = surroundings::endpoint(endpoint)?;
        Ok(self)
    }

    /// A token, which goes to the hub's own host alone. Errs ([`Error::Usage`]) on what no token can be.
    pub fn with_token(mut self, token: &str) -> Result<Self> {
        self.token = Some(Token::new(token, "the token")?);
        Ok(self)
    }

    /// Without a request: the cache as it is.
    pub fn offline(mut self) -> Self {
        self.offline = true;
        self
    }

    /// How long to wait before a request that failed is made again; twice as long before the next.
    pub fn with_pause(mut self, pause: Duration) -> Self {
        self.pause = pause;
        self
    }

    /// The snapshot of the model `org/name[@revision]`. What the cache holds whole is used without asking
    /// the hub; else configuration, weights and what tokenizers and processors need are downloaded.
    ///
    /// Errs ([`Error::Input`]) on what is not of the form of a hub name, and where the model is not to be
    /// had, saying where it was looked for.
    pub fn model(&self, name: &str) -> Result<PathBuf> {
        let Some(parsed) = Name::parse(name) else {
            return Err(Error::input(
                name,
                "no such file or folder, and not of the form org/name[@revision]",
            ));
        };
        let repo = Repo::model(parsed);
        match cache::model(&repo, &self.cache)? {
            Cached::Whole(snapshot) => Ok(snapshot),
            Cached::Lacking(lack) => self.fetch_model(&repo, &lack),
        }
    }

    /// The folder of the data set `org/name[/folder][@revision]`: files of JSON lines, JSON, Parquet and
    /// text that are named after splits (`train*`, `test*`, `valid*`, `dev*`, `eval*`) in that folder, at
    /// the top or in `data`, or the only one there.
    ///
    /// A data set may be whole in many ways, so the hub is asked each time which files there are; what the
    /// cache has of them is not downloaded again, and without the hub the cache is taken as it is. Errs as
    /// [`Hub::model`] does.
    pub fn data(&self, name: &str) -> Result<PathBuf> {
        let Some((parsed, folder)) = Name::parse_data(name) else {
            let form = "no such file or folder, and not of the form org/name[/folder][@revision]";
            return Err(Error::input(name, form));
        };
        let repo = Repo::data(parsed);
        let snapshot = self.fetch_data(&repo, folder.as_deref())?;
        Ok(folder.map_or(snapshot.clone(), |folder| snapshot.join(folder)))
    }
}

/// What is not in the cache and cannot be had.
fn refused(repo: &Repo, lack: &str, why: &str) -> Error {
    let message = format!("no such file or folder, and no {repo} in the cache: no {lack}; {why}");
    Error::input(repo.id(), message)
}

#[cfg(not(feature = "hub"))]
impl Hub {
    fn fetch_model(&self, repo: &Repo, lack: &str) -> Result<PathBuf> {
        Err(refused(repo, lack, "a qtune built with --features hub downloads it"))
    }

    fn fetch_data(&self, repo: &Repo, _: Option<&str>) -> Result<PathBuf> {
        match cache::snapshot(repo, &self.cache)? {
            Cached::Whole(snapshot) => Ok(snapshot),
            Cached::Lacking(lack) => self.fetch_model(repo, &lack),
        }
    }
}

#[cfg(feature = "hub")]
impl Hub {
    fn fetch_model(&self, repo: &Repo, lack: &str) -> Result<PathBuf> {
        if self.offline {
            return Err(refused(repo, lack, "HF_HUB_OFFLINE forbids to download it"));
        }
        download::model(self, repo)?;
        match cache::model(repo, &self.cache)? {
            Cached::Whole(snapshot) => Ok(snapshot),
            Cached::Lacking(lack) => Err(refused(repo, &lack, "the download did not bring it")),
        }
    }

    fn fetch_data(&self, repo: &Repo, folder: Option<&str>) -> Result<PathBuf> {
        let cached = cache::snapshot(repo, &self.cache)?;
        if self.offline {
            return match cached {
                Cached::Whole(snapshot) => Ok(snapshot),
                Cached::Lacking(lack) => Err(refused(repo, &lack, "HF_HUB_OFFLINE forbids to download it")),
            };
        }
        match (download::data(self, repo, folder), cached) {
            (Ok(snapshot), _) => Ok(snapshot),
            // The hub is out of reach: what was fetched before will do.
            (Err(Error::Run(_)), Cached::Whole(snapshot)) => Ok(snapshot),
            (Err(error), _) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_paths_win_and_nonsense_is_an_input_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        assert_eq!(resolve(path).unwrap(), dir.path());
        assert_eq!(resolve_data(path).unwrap(), dir.path());
        let error = resolve(&format!("{path}/none")).unwrap_err();
        assert_eq!(error.exit_code(), 4);
        assert!(error.to_string().contains("no such file or folder"), "{error}");
        // A slip of the pen in a file's name is not looked for on the hub.
        for path in ["runs/train.jsonl", "data/a.txt", "a/b.json.gz", "nowhere"] {
            assert_eq!(resolve_data(path).unwrap(), Path::new(path));
        }
    }

    #[test]
    fn offline_says_what_lacks() {
        let dir = tempfile::tempdir().unwrap();
        let hub = Hub::new(dir.path()).offline();
        for error in [hub.model("org/net").unwrap_err(), hub.data("org/net").unwrap_err()] {
            assert_eq!(error.exit_code(), 4);
            let error = error.to_string();
            let word = if cfg!(feature = "hub") { "HF_HUB_OFFLINE" } else { "--features hub" };
            for part in ["org/net@main", "org--net/refs/main", word] {
                assert!(error.contains(part), "{error}");
            }
        }
    }
}
