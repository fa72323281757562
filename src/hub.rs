//! Where a model lies: a local path, or a hub name `org/name[@revision]` in the Hugging Face cache,
//! which a build with the `hub` feature fills by downloading.

use crate::error::{Error, Result};
use crate::weights::checkpoint::read_index;
use std::path::{Path, PathBuf};

/// A hub name that is well formed.
#[derive(Debug, PartialEq)]
struct HubName {
    /// `org/name`.
    id: String,
    revision: String,
}

/// The folder of `model`: an existing path as it is, or the snapshot of a hub name.
///
/// The cache is looked at first (`HF_HUB_CACHE`, else `HF_HOME/hub`, else
/// `~/.cache/huggingface/hub`); what it holds whole is used without asking the hub. Only then, built
/// with `--features hub` and without `HF_HUB_OFFLINE`, the model is downloaded into it (`HF_ENDPOINT`,
/// `HF_TOKEN`).
///
/// Errs ([`Error::Input`]) on what is neither a path nor of the form of a hub name, and where the
/// model is not to be had, saying where it was looked for.
pub fn resolve(model: &str) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    let Some(name) = HubName::parse(model) else {
        return Err(Error::input(model, "no such file or folder, and not of the form org/name[@revision]"));
    };
    let surroundings = Surroundings::from_env(|key| std::env::var(key).ok().filter(|v| !v.is_empty()))?;
    match cached(&name, &surroundings.cache)? {
        Cached::Whole(snapshot) => Ok(snapshot),
        Cached::Lacking(lack) => fetch(&name, &surroundings, &lack),
    }
}

impl HubName {
    fn parse(text: &str) -> Option<Self> {
        let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (org, name) = id.split_once('/')?;
        let word = |part: &str| {
            part.len() <= 96
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
                && part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                && !part.ends_with(['-', '.'])
                && !part.contains("--")
                && !part.contains("..")
        };
        let step = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+".contains(&b))
        };
        let good = word(org) && word(name) && revision.split('/').all(step);
        good.then(|| HubName { id: id.to_string(), revision: revision.to_string() })
    }

    /// The folder of the cache for this model.
    fn folder(&self, cache: &Path) -> PathBuf {
        cache.join(format!("models--{}", self.id.replace('/', "--")))
    }
}

/// What the environment says about the hub.
#[derive(Debug)]
#[cfg_attr(not(feature = "hub"), allow(dead_code))]
struct Surroundings {
    cache: PathBuf,
    /// `HF_HOME`, where a stored token lies.
    home: PathBuf,
    offline: bool,
    endpoint: Option<String>,
    token: Option<String>,
}

impl Surroundings {
    /// `get` looks an environment variable up; empty ones count as unset.
    fn from_env(get: impl Fn(&str) -> Option<String>) -> Result<Self> {
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
        let cache = get("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from);
        let offline = get("HF_HUB_OFFLINE")
            .is_some_and(|v| ["1", "on", "yes", "true"].contains(&v.to_ascii_lowercase().as_str()));
        Ok(Surroundings { cache, home, offline, endpoint: get("HF_ENDPOINT"), token: get("HF_TOKEN") })
    }
}

enum Cached {
    Whole(PathBuf),
    /// What was looked for and not found, in words.
    Lacking(String),
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The snapshot of `name` in the cache, if its weights are there.
fn cached(name: &HubName, cache: &Path) -> Result<Cached> {
    let folder = name.folder(cache);
    let commit = if is_commit(&name.revision) {
        name.revision.clone()
    } else {
        let reference = folder.join("refs").join(&name.revision);
        match std::fs::read_to_string(&reference) {
            Ok(text) if is_commit(text.trim()) => text.trim().to_string(),
            // Anything else could lead out of the cache once it is part of a path.
            Ok(text) => {
                let found: String = text.trim().chars().take(60).flat_map(char::escape_debug).collect();
                return Err(Error::input(
                    &reference,
                    format!("found {found:?}, expected a commit's 40 digits"),
                ));
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Cached::Lacking(reference.display().to_string()))
            }
            Err(e) => return Err(Error::io(reference, e)),
        }
    };
    let snapshot = folder.join("snapshots").join(commit);
    let wanted = |file: &str| snapshot.join(file).display().to_string();
    if !snapshot.join("config.json").exists() {
        return Ok(Cached::Lacking(wanted("config.json")));
    }
    if snapshot.join("model.safetensors").exists() {
        return Ok(Cached::Whole(snapshot));
    }
    let index = snapshot.join("model.safetensors.index.json");
    if !index.exists() {
        return Ok(Cached::Lacking(wanted("model.safetensors")));
    }
    // An interrupted download leaves an index with some of its shards.
    let shards = read_index(&index)?;
    match shards.iter().find(|(_, shard)| !snapshot.join(shard).exists()) {
        Some((_, shard)) => Ok(Cached::Lacking(wanted(shard))),
        None => Ok(Cached::Whole(snapshot)),
    }
}

fn refused(name: &HubName, lack: &str, why: &str) -> Error {
    let HubName { id, revision } = name;
    let message =
        format!("no such file or folder, and no model {id}@{revision} in the cache: no {lack}; {why}");
    Error::input(id, message)
}

#[cfg(not(feature = "hub"))]
fn fetch(name: &HubName, _: &Surroundings, lack: &str) -> Result<PathBuf> {
    Err(refused(name, lack, "a qtune built with --features hub downloads it"))
}

#[cfg(feature = "hub")]
fn fetch(name: &HubName, surroundings: &Surroundings, lack: &str) -> Result<PathBuf> {
    if surroundings.offline {
        return Err(refused(name, lack, "HF_HUB_OFFLINE forbids to download it"));
    }
    download::fetch(name, surroundings)?;
    match cached(name, &surroundings.cache)? {
        Cached::Whole(snapshot) => Ok(snapshot),
        Cached::Lacking(lack) => Err(refused(name, &lack, "the download did not bring it")),
    }
}

#[cfg(feature = "hub")]
mod download {
    use super::{HubName, Surroundings};
    use crate::error::{Error, Result};
    use crate::weights::checkpoint::read_index;
    use hf_hub::api::sync::{ApiBuilder, ApiError};
    use hf_hub::{Cache, Repo, RepoType};
    use std::collections::BTreeSet;
    use std::path::PathBuf;

    /// Read where the repository has them; the configuration and the weights must be there.
    const OPTIONAL: [&str; 6] = [
        "preprocessor_config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.json",
    ];

    /// Brings the files of `name` into the cache.
    pub(super) fn fetch(name: &HubName, surroundings: &Surroundings) -> Result<()> {
        let HubName { id, revision } = name;
        let failed = |what: &str, error: ApiError| {
            let text = error.to_string();
            let line = text.lines().next().unwrap_or_default();
            let endpoint = surroundings.endpoint.as_deref().unwrap_or("https://huggingface.co");
            Error::Run(format!("{id}@{revision}: {what} could not be had from {endpoint}: {line}"))
        };
        let stored = || std::fs::read_to_string(surroundings.home.join("token")).ok();
        let token = surroundings.token.clone().or_else(stored).map(|t| t.trim().to_string());
        let mut builder = ApiBuilder::from_cache(Cache::new(surroundings.cache.clone()))
            .with_token(token.filter(|t| !t.is_empty()))
            .with_progress(false)
            .with_retries(2);
        if let Some(endpoint) = &surroundings.endpoint {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_string());
        }
        let api = builder.build().map_err(|e| failed("a connection", e))?;
        let repo = api.repo(Repo::with_revision(id.clone(), RepoType::Model, revision.clone()));
        let info = repo.info().map_err(|error| match &error {
            // The hub answers 401 to strangers for what does not exist, so as not to tell.
            ApiError::RequestError(e) if e.to_string().contains("404") || e.to_string().contains("401") => {
                let message = format!("no such file or folder, and no model {id}@{revision} to be seen: {e}");
                Error::input(id, message)
            }
            _ => failed("the list of files", error),
        })?;
        let offered: BTreeSet<&str> = info.siblings.iter().map(|s| s.rfilename.as_str()).collect();
        // A file of an older commit would satisfy `get` while the branch has moved on.
        let snapshot = super::HubName { id: id.clone(), revision: info.sha.clone() }
            .folder(&surroundings.cache)
            .join("snapshots")
            .join(&info.sha);
        let get = |file: &str| -> Result<PathBuf> {
            let here = snapshot.join(file);
            if super::is_commit(&info.sha) && here.exists() {
                return Ok(here);
            }
            repo.download(file).map_err(|e| failed(file, e))
        };
        get("config.json")?;
        for file in OPTIONAL.into_iter().filter(|file| offered.contains(file)) {
            get(file)?;
        }
        if offered.contains("model.safetensors") {
            get("model.safetensors")?;
        } else if offered.contains("model.safetensors.index.json") {
            let index = get("model.safetensors.index.json")?;
            let shards: BTreeSet<String> = read_index(&index)?.into_iter().map(|(_, s)| s).collect();
            for shard in shards {
                get(&shard)?;
            }
        } else {
            let message = "found neither model.safetensors nor its index on the hub, expected one of them";
            return Err(Error::input(id, message));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    #[test]
    fn names_are_checked_before_they_become_paths() {
        let of = |id: &str, revision: &str| Some(HubName { id: id.into(), revision: revision.into() });
        assert_eq!(HubName::parse("google/vit-base_16.x"), of("google/vit-base_16.x", "main"));
        assert_eq!(HubName::parse("a/b@v1.0"), of("a/b", "v1.0"));
        assert_eq!(HubName::parse("a/b@refs/pr/1"), of("a/b", "refs/pr/1"));
        for bad in [
            "",
            "gpt2",
            "a/",
            "/b",
            "a/b/c",
            "./b",
            "../b",
            "a/..",
            "a/b@",
            "a/b@..",
            "a/b@x/../y",
            "a/b@/etc",
            "a/b c",
            "a--b/c",
            "-a/b",
            "a/b-",
            "a/b\n",
            "a\\b/c",
            "ä/b",
            "a/b@x@y",
        ] {
            assert_eq!(HubName::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn the_environment_points_at_the_cache() {
        let of = |vars: &[(&str, &str)]| {
            let get = |key: &str| vars.iter().find(|(k, _)| *k == key).map(|(_, v)| v.to_string());
            Surroundings::from_env(get)
        };
        assert_eq!(of(&[("HOME", "/h")]).unwrap().cache, Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(of(&[("HOME", "/h"), ("HF_HOME", "/f")]).unwrap().cache, Path::new("/f/hub"));
        assert_eq!(of(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/f")]).unwrap().cache, Path::new("/c"));
        assert!(of(&[("HOME", "/h"), ("HF_HUB_OFFLINE", "TRUE")]).unwrap().offline);
        assert!(!of(&[("HOME", "/h"), ("HF_HUB_OFFLINE", "0")]).unwrap().offline);
        assert_eq!(of(&[]).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn local_paths_win_and_nonsense_is_an_input_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        assert_eq!(resolve(path).unwrap(), dir.path());
        let error = resolve(&format!("{path}/none")).unwrap_err();
        assert_eq!(error.exit_code(), 4);
        assert!(error.to_string().contains("no such file or folder"), "{error}");
    }

    #[test]
    fn snapshots_are_found_by_branch_and_by_commit_once_whole() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path();
        let folder = cache.join("models--org--net");
        let snapshot = folder.join("snapshots").join(COMMIT);
        let name = |revision: &str| HubName { id: "org/net".into(), revision: revision.into() };
        let lacking = |revision: &str| match cached(&name(revision), cache).unwrap() {
            Cached::Lacking(lack) => lack,
            Cached::Whole(path) => panic!("found {}", path.display()),
        };
        assert!(lacking("main").ends_with("models--org--net/refs/main"));
        std::fs::create_dir_all(folder.join("refs")).unwrap();
        std::fs::write(folder.join("refs/main"), format!("{COMMIT}\n")).unwrap();
        assert!(lacking("main").ends_with("config.json"));
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::write(snapshot.join("config.json"), "{}").unwrap();
        assert!(lacking(COMMIT).ends_with("model.safetensors"));
        let index = snapshot.join("model.safetensors.index.json");
        std::fs::write(index, r#"{"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors"}}"#).unwrap();
        std::fs::write(snapshot.join("m-1.safetensors"), "").unwrap();
        assert!(lacking("main").ends_with("m-2.safetensors"));
        std::fs::write(snapshot.join("m-2.safetensors"), "").unwrap();
        for revision in ["main", COMMIT] {
            assert!(matches!(cached(&name(revision), cache).unwrap(), Cached::Whole(p) if p == snapshot));
        }
        assert!(lacking("v2").ends_with("refs/v2"));
        // A reference that would lead out of the cache.
        std::fs::write(folder.join("refs/evil"), "../../../etc").unwrap();
        assert_eq!(cached(&name("evil"), cache).err().unwrap().exit_code(), 4);
    }

    #[test]
    #[cfg(not(feature = "hub"))]
    fn without_the_feature_the_error_says_what_to_do() {
        let name = HubName { id: "org/net".into(), revision: "main".into() };
        let surroundings = Surroundings::from_env(|_| Some("/nowhere".into())).unwrap();
        let error = fetch(&name, &surroundings, "/nowhere/refs/main").unwrap_err();
        assert_eq!(error.exit_code(), 4);
        for part in ["org/net@main", "/nowhere/refs/main", "--features hub"] {
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}
