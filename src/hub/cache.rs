//! The cache on disk, as Python's `huggingface_hub` lays it out:
//!
//! ```text
//! models--org--name/refs/main                   the commit that a branch stood at
//! models--org--name/snapshots/<commit>/<file>   a link to
//! models--org--name/blobs/<etag>                the bytes
//! ```
//!
//! and `datasets--org--name` alike.

use std::fmt;
use std::path::{Path, PathBuf};

use super::name::{is_commit, Name};
use crate::weights::checkpoint::read_index;
use crate::{Error, Result};

/// What a repository holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holds {
    Model,
    Data,
}

/// A repository at a revision.
#[derive(Clone, Debug)]
pub(super) struct Repo {
    pub name: Name,
    pub holds: Holds,
}

impl Repo {
    /// A model's.
    pub fn model(name: Name) -> Self {
        Repo { name, holds: Holds::Model }
    }

    /// A data set's.
    pub fn data(name: Name) -> Self {
        Repo { name, holds: Holds::Data }
    }

    /// `org/name`.
    pub fn id(&self) -> &str {
        &self.name.id
    }

    /// What its folder in the cache is called.
    pub fn folder_name(&self) -> String {
        let kind = match self.holds {
            Holds::Model => "models",
            Holds::Data => "datasets",
        };
        format!("{kind}--{}", self.name.id.replace('/', "--"))
    }

    /// Its folder in the cache.
    pub fn folder(&self, cache: &Path) -> PathBuf {
        cache.join(self.folder_name())
    }

    /// The file that tells the commit of its revision.
    pub fn reference(&self, cache: &Path) -> PathBuf {
        self.folder(cache).join("refs").join(&self.name.revision)
    }
}

impl fmt::Display for Repo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.holds {
            Holds::Model => "model",
            Holds::Data => "data set",
        };
        write!(f, "{kind} {}@{}", self.name.id, self.name.revision)
    }
}

/// What the cache has of a repository.
#[derive(Debug)]
pub(super) enum Cached {
    Whole(PathBuf),
    /// What was looked for and not found, in words.
    Lacking(String),
}

/// The snapshot of a repository, whatever of it is there.
pub(super) fn snapshot(repo: &Repo, cache: &Path) -> Result<Cached> {
    let commit = if is_commit(&repo.name.revision) {
        repo.name.revision.clone()
    } else {
        let reference = repo.reference(cache);
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
    let snapshot = repo.folder(cache).join("snapshots").join(commit);
    match snapshot.is_dir() {
        true => Ok(Cached::Whole(snapshot)),
        false => Ok(Cached::Lacking(snapshot.display().to_string())),
    }
}

/// The snapshot of a model, if its weights are there.
pub(super) fn model(repo: &Repo, cache: &Path) -> Result<Cached> {
    let snapshot = match snapshot(repo, cache)? {
        Cached::Whole(snapshot) => snapshot,
        lacking => return Ok(lacking),
    };
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

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    #[test]
    fn snapshots_are_found_by_branch_and_by_commit_once_whole() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path();
        let folder = cache.join("models--org--net");
        let snapshot = folder.join("snapshots").join(COMMIT);
        let repo = |revision: &str| Repo::model(Name { id: "org/net".into(), revision: revision.into() });
        let lacking = |revision: &str| match model(&repo(revision), cache).unwrap() {
            Cached::Lacking(lack) => lack,
            Cached::Whole(path) => panic!("found {}", path.display()),
        };
        assert!(lacking("main").ends_with("models--org--net/refs/main"));
        std::fs::create_dir_all(folder.join("refs")).unwrap();
        std::fs::write(folder.join("refs/main"), format!("{COMMIT}\n")).unwrap();
        assert!(lacking("main").ends_with(COMMIT));
        std::fs::create_dir_all(&snapshot).unwrap();
        assert!(lacking("main").ends_with("config.json"));
        std::fs::write(snapshot.join("config.json"), "{}").unwrap();
        assert!(lacking(COMMIT).ends_with("model.safetensors"));
        let index = snapshot.join("model.safetensors.index.json");
        std::fs::write(index, r#"{"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors"}}"#).unwrap();
        std::fs::write(snapshot.join("m-1.safetensors"), "").unwrap();
        assert!(lacking("main").ends_with("m-2.safetensors"));
        std::fs::write(snapshot.join("m-2.safetensors"), "").unwrap();
        for revision in ["main", COMMIT] {
            assert!(matches!(model(&repo(revision), cache).unwrap(), Cached::Whole(p) if p == snapshot));
        }
        assert!(lacking("v2").ends_with("refs/v2"));
        // A reference that would lead out of the cache.
        std::fs::write(folder.join("refs/evil"), "../../../etc").unwrap();
        assert_eq!(model(&repo("evil"), cache).err().unwrap().exit_code(), 4);
    }
}
