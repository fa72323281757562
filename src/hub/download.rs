//! Repositories brought into the cache, file by file.
//!
//! A file that is on its way lies in `blobs` as `<etag>.incomplete`. Whoever comes next asks for the rest of
//! it; what has arrived is checked against the size that the hub told and, where the etag is one, its
//! SHA-256, and only then takes its name.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::cache::{Holds, Repo};
use super::client::{encoded, header, Client, Trouble, TRIES};
use super::name::{is_commit, stays_inside};
use super::Hub;
use crate::data::text::is_text;
use crate::weights::checkpoint::read_index;
use crate::{files, Error, Result};

/// Read where a model has them, beside its configuration and its weights.
const BESIDE: [&str; 14] = [
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
];
/// The beginnings of the names of splits that data sets are read by.
const SPLITS: [&str; 6] = ["train", "test", "valid", "val", "dev", "eval"];
/// The most bytes of a list of files.
const LIST: u64 = 256 << 20;

/// Brings the files of a model into the cache.
pub(super) fn model(hub: &Hub, repo: &Repo) -> Result<()> {
    let fetch = Fetch::open(hub, repo)?;
    let lacks = |what: &str| Error::input(repo.id(), format!("{repo}: found no {what} on the hub"));
    if !fetch.offers("config.json") {
        return Err(lacks("config.json"));
    }
    fetch.file("config.json")?;
    for file in BESIDE.into_iter().filter(|file| fetch.offers(file)) {
        fetch.file(file)?;
    }
    if fetch.offers("model.safetensors") {
        fetch.file("model.safetensors")?;
    } else if fetch.offers("model.safetensors.index.json") {
        let index = fetch.file("model.safetensors.index.json")?;
        let shards: BTreeSet<String> = read_index(&index)?.into_iter().map(|(_, shard)| shard).collect();
        for shard in shards {
            if !fetch.offers(&shard) {
                return Err(lacks(&shard));
            }
            fetch.file(&shard)?;
        }
    } else {
        return Err(lacks("model.safetensors or its index"));
    }
    fetch.finish()
}

/// Brings the text of a data set into the cache; returns its snapshot.
pub(super) fn data(hub: &Hub, repo: &Repo, folder: Option<&str>) -> Result<PathBuf> {
    let fetch = Fetch::open(hub, repo)?;
    let wanted = text_files(&fetch.offered, folder)
        .map_err(|message| Error::input(repo.id(), format!("{repo}: {message}")))?;
    for file in &wanted {
        fetch.file(file)?;
    }
    fetch.finish()?;
    Ok(fetch.snapshot())
}

/// Which of the files `offered` are the data set: those named after splits in `folder` (at the top or in
/// `data` where that is none), else the only one there.
fn text_files(offered: &BTreeSet<String>, folder: Option<&str>) -> Result<Vec<String>, String> {
    let parent = |file: &str| file.rsplit_once('/').map_or("", |(parent, _)| parent).to_string();
    let name = |file: &str| file.rsplit('/').next().unwrap_or_default().to_ascii_lowercase();
    let texts: Vec<&String> = offered.iter().filter(|file| is_text(Path::new(file))).collect();
    let split = |file: &&&String| SPLITS.iter().any(|split| name(file).starts_with(split));
    let folders = match folder {
        Some(folder) => vec![folder.to_string()],
        None => vec![String::new(), "data".to_string()],
    };
    for folder in &folders {
        let named: Vec<String> = texts
            .iter()
            .filter(|file| parent(file) == *folder)
            .filter(split)
            .map(|f| f.to_string())
            .collect();
        if !named.is_empty() {
            return Ok(named);
        }
    }
    for folder in &folders {
        let here: Vec<&&String> = texts.iter().filter(|file| parent(file) == *folder).collect();
        if let [only] = here[..] {
            return Ok(vec![only.to_string()]);
        }
    }
    let elsewhere: BTreeSet<String> = texts.iter().filter(split).map(|file| parent(file)).collect();
    let place = folder.map_or_else(|| "at the top or in data".to_string(), |folder| format!("in {folder}"));
    let hint = match elsewhere.is_empty() {
        true => String::new(),
        false => {
            let list: Vec<String> = elsewhere.into_iter().take(8).collect();
            format!("; there is text in {}: name one, as org/name/FOLDER", list.join(", "))
        }
    };
    Err(format!("found no files of JSON lines, JSON, Parquet or text named after splits {place}{hint}"))
}

/// What the hub says of a file.
struct Facts {
    etag: String,
    size: Option<u64>,
}

/// A repository on its way into the cache.
struct Fetch<'a> {
    client: Client<'a>,
    hub: &'a Hub,
    repo: &'a Repo,
    commit: String,
    offered: BTreeSet<String>,
}

impl<'a> Fetch<'a> {
    /// Asks which commit the revision is at and which files it has.
    fn open(hub: &'a Hub, repo: &'a Repo) -> Result<Self> {
        let client = Client::new(hub)?;
        let kind = match repo.holds {
            Holds::Model => "models",
            Holds::Data => "datasets",
        };
        let (endpoint, id) = (&hub.endpoint, repo.id());
        let url = format!("{endpoint}/api/{kind}/{id}/revision/{}", encoded(&repo.name.revision, b""));
        let list = client.patiently(|| {
            let reply = client.get(&url, 0)?;
            if reply.status().as_u16() != 200 {
                return Err(Trouble::of_status(reply.status().as_u16()));
            }
            let mut bytes = Vec::new();
            let mut body = reply.into_body().into_reader().take(LIST);
            body.read_to_end(&mut bytes).map_err(|e| Trouble::passing(e.to_string()))?;
            Ok(bytes)
        });
        let list = list.map_err(|trouble| client.error(repo, "the list of files", &trouble))?;
        let list: Value = serde_json::from_slice(&list)
            .map_err(|e| Error::Run(format!("{repo}: the list of files is not JSON: {e}")))?;
        let commit = list.get("sha").and_then(Value::as_str).unwrap_or_default();
        if !is_commit(commit) {
            let message = format!("{repo}: the list of files names no commit, expected sha of 40 digits");
            return Err(Error::Run(message));
        }
        let siblings = list.get("siblings").and_then(Value::as_array);
        let names = siblings.into_iter().flatten().filter_map(|s| s.get("rfilename")?.as_str());
        let offered = names.filter(|name| stays_inside(name)).map(str::to_string).collect();
        Ok(Fetch { client, hub, repo, commit: commit.to_string(), offered })
    }

    fn offers(&self, file: &str) -> bool {
        self.offered.contains(file)
    }

    fn folder(&self) -> PathBuf {
        self.repo.folder(&self.hub.cache)
    }

    fn snapshot(&self) -> PathBuf {
        self.folder().join("snapshots").join(&self.commit)
    }

    /// Says that the revision is at the commit, whose files are all here.
    fn finish(&self) -> Result<()> {
        if self.repo.name.revision == self.commit {
            return Ok(());
        }
        let reference = self.repo.reference(&self.hub.cache);
        make_parent(&reference)?;
        files::write_bytes(&reference, self.commit.as_bytes())
    }

    /// Brings one file into the snapshot.
    fn file(&self, file: &str) -> Result<PathBuf> {
        let pointer = self.snapshot().join(file);
        if pointer.exists() {
            return Ok(pointer);
        }
        let kind = match self.repo.holds {
            Holds::Model => "",
            Holds::Data => "datasets/",
        };
        let (endpoint, id, commit) = (&self.hub.endpoint, self.repo.id(), &self.commit);
        let url = format!("{endpoint}/{kind}{id}/resolve/{commit}/{}", encoded(file, b"/"));
        let facts = self.facts(&url).map_err(|trouble| self.client.error(self.repo, file, &trouble))?;
        let blob = self.folder().join("blobs").join(&facts.etag);
        make_parent(&blob)?;
        let _lock = self.lock(&facts.etag)?;
        let whole = fs::metadata(&blob).is_ok_and(|m| facts.size.is_none_or(|size| m.len() == size));
        if !whole {
            self.blob(&url, &facts, &blob, file)?;
        }
        make_parent(&pointer)?;
        link(&blob, &pointer, file)?;
        Ok(pointer)
    }

    fn facts(&self, url: &str) -> Result<Facts, Trouble> {
        self.client.patiently(|| {
            let reply = self.client.head(url)?;
            let status = reply.status().as_u16();
            if status >= 400 {
                return Err(Trouble::of_status(status));
            }
            let of = |names: &[&str]| names.iter().find_map(|name| header(reply.headers(), name));
            let etag = of(&["x-linked-etag", "etag"]).unwrap_or_default();
            let etag = etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"');
            let good = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
            if etag.is_empty() || etag.len() > 128 || etag.starts_with('.') || !etag.bytes().all(good) {
                // It is to be a file's name.
                let text = "the hub names no etag of letters and digits".to_string();
                return Err(Trouble { text, status: Some(status), passing: false });
            }
            // The length of a redirect's own body says nothing.
            let names: &[&str] =
                if status == 200 { &["x-linked-size", "content-length"] } else { &["x-linked-size"] };
            Ok(Facts { etag: etag.to_string(), size: of(names).and_then(|size| size.parse().ok()) })
        })
    }

    /// Keeps other processes, Python's among them, off a blob while the file is open.
    fn lock(&self, etag: &str) -> Result<File> {
        let folder = self.repo.folder_name();
        let path = self.hub.cache.join(".locks").join(folder).join(format!("{etag}.lock"));
        make_parent(&path)?;
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(|e| Error::io(&path, e))?;
        match file.lock() {
            Err(e) if e.kind() != std::io::ErrorKind::Unsupported => Err(Error::io(&path, e)),
            _ => Ok(file),
        }
    }

    /// Downloads a blob, from where an earlier attempt stopped.
    fn blob(&self, url: &str, facts: &Facts, blob: &Path, file: &str) -> Result<()> {
        let mut part = blob.as_os_str().to_os_string();
        part.push(".incomplete");
        let part = PathBuf::from(part);
        let mut open = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&part)
            .map_err(|e| Error::io(&part, e))?;
        let (mut failed, mut most) = (0, 0);
        loop {
            let trouble = match self.stretch(url, facts.size, &mut open, &part)? {
                Ok(()) => break,
                Err(trouble) => trouble,
            };
            let have = length(&open, &part)?;
            // As long as it moves on it may break as often as it likes.
            failed = if have > most { 1 } else { failed + 1 };
            most = most.max(have);
            if !trouble.passing || failed >= TRIES {
                return Err(self.client.error(self.repo, file, &trouble));
            }
            self.client.pause(failed - 1);
        }
        if facts.etag.len() == 64 && facts.etag.bytes().all(|b| b.is_ascii_hexdigit()) {
            let found = sha256(&mut open).map_err(|e| Error::io(&part, e))?;
            if found != facts.etag.to_ascii_lowercase() {
                fs::remove_file(&part).map_err(|e| Error::io(&part, e))?;
                let message = format!("{file}: found SHA-256 {found}, expected {}", facts.etag);
                return Err(Error::input(self.repo.id(), message));
            }
        }
        open.sync_all().map_err(|e| Error::io(&part, e))?;
        fs::rename(&part, blob).map_err(|e| Error::io(blob, e))
    }

    /// Asks for what `part` lacks and appends what comes; the inner error is the hub's, after which what
    /// has come stays.
    fn stretch(
        &self,
        url: &str,
        size: Option<u64>,
        open: &mut File,
        part: &Path,
    ) -> Result<Result<(), Trouble>> {
        let io = |e: std::io::Error| Error::io(part, e);
        let mut have = length(open, part)?;
        if size.is_some_and(|size| have > size) {
            open.set_len(0).map_err(io)?;
            have = 0;
        }
        if size == Some(have) {
            return Ok(Ok(()));
        }
        let reply = match self.client.get(url, have) {
            Ok(reply) => reply,
            Err(trouble) => return Ok(Err(trouble)),
        };
        match reply.status().as_u16() {
            206 if first_byte(header(reply.headers(), "content-range")) == Some(have) => {}
            200 => {
                open.set_len(0).map_err(io)?;
                have = 0;
            }
            206 | 416 => {
                open.set_len(0).map_err(io)?;
                return Ok(Err(Trouble::passing("the hub does not go on where the download broke off")));
            }
            other => return Ok(Err(Trouble::of_status(other))),
        }
        let length = header(reply.headers(), "content-length").and_then(|n| n.parse::<u64>().ok());
        let total = size.or(length.map(|n| n.saturating_add(have)));
        open.seek(SeekFrom::Start(have)).map_err(io)?;
        let mut body = reply.into_body().into_reader();
        let mut buffer = vec![0; 1 << 18];
        loop {
            let n = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Ok(Err(Trouble::passing(format!("broke off after {have} bytes: {e}")))),
            };
            have += n as u64;
            if let Some(total) = total.filter(|total| have > *total) {
                open.set_len(0).map_err(io)?;
                return Ok(Err(Trouble::passing(format!("more than the {total} bytes that were told"))));
            }
            open.write_all(&buffer[..n]).map_err(io)?;
        }
        Ok(match total.filter(|total| have < *total) {
            Some(total) => Err(Trouble::passing(format!("broke off after {have} of {total} bytes"))),
            None => Ok(()),
        })
    }
}

/// The first byte's number in a `Content-Range`, as in `bytes 10-99/100`.
fn first_byte(range: Option<&str>) -> Option<u64> {
    range?.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}

fn length(file: &File, path: &Path) -> Result<u64> {
    Ok(file.metadata().map_err(|e| Error::io(path, e))?.len())
}

fn make_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(parent) => fs::create_dir_all(parent).map_err(|e| Error::io(parent, e)),
        None => Ok(()),
    }
}

fn sha256(file: &mut File) -> std::io::Result<String> {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    let mut buffer = vec![0; 1 << 20];
    file.seek(SeekFrom::Start(0))?;
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            n => context.update(&buffer[..n]),
        }
    }
    Ok(context.finish().as_ref().iter().map(|b| format!("{b:02x}")).collect())
}

/// Makes `pointer`, the place of `file` in a snapshot, lead to `blob`: by a link that stays good when the
/// cache is moved, or as the blob itself where there are no links.
fn link(blob: &Path, pointer: &Path, file: &str) -> Result<()> {
    let failed = |e: std::io::Error| Error::io(pointer, e);
    match fs::remove_file(pointer) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
        _ => {}
    }
    #[cfg(unix)]
    {
        // snapshots, the commit, and the folders of the file's own name.
        let up = "../".repeat(2 + file.matches('/').count());
        let name = blob.file_name().map(Path::new).unwrap_or(blob);
        let target = Path::new(&up).join("blobs").join(name);
        match std::os::unix::fs::symlink(target, pointer) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => Err(failed(e)),
            _ => Ok(()),
        }
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        fs::rename(blob, pointer).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_of_a_data_set() {
        let of = |offered: &[&str], folder: Option<&str>| {
            text_files(&offered.iter().map(|f| f.to_string()).collect(), folder)
        };
        let flat = ["README.md", "test.jsonl", "train.jsonl", "extra/train.jsonl", "train.png"];
        assert_eq!(of(&flat, None).unwrap(), ["test.jsonl", "train.jsonl"]);
        let shards = ["dataset_infos.json", "data/train-0.parquet", "data/validation-0.parquet"];
        assert_eq!(of(&shards, None).unwrap(), shards[1..]);
        assert_eq!(of(&["a.md", "book.txt"], None).unwrap(), ["book.txt"]);
        let parts = ["main/train-0.parquet", "socratic/train-0.parquet", "README.md"];
        assert_eq!(of(&parts, Some("main")).unwrap(), parts[..1]);
        let error = of(&parts, None).unwrap_err();
        assert!(error.contains("main, socratic"), "{error}");
        assert!(of(&["a.png"], None).unwrap_err().ends_with("in data"));
        assert!(of(&parts, Some("none")).unwrap_err().contains("in none"));
    }

    #[test]
    fn ranges_and_digests() {
        assert_eq!(first_byte(Some("bytes 10-99/100")), Some(10));
        assert_eq!(first_byte(Some("bytes */100")), None);
        assert_eq!(first_byte(None), None);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, "abc").unwrap();
        // FIPS 180-2, appendix B.1.
        let known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(&mut File::open(&path).unwrap()).unwrap(), known);
    }
}
