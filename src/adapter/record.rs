//! What was merged: a small file beside a merged model, so that the same adapter is not merged twice
//! and the base can be had back.
//!
//! Taking an adapter out by arithmetic does not give the base back: rounding stays, and the block affine
//! form and DoRA may not be invertible at all. So the base is read again, and checked to be what it was.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::files::{Adapter, TENSORS};
use crate::files::{read_text, write_bytes, Staging};
use crate::weights::Checkpoint;
use crate::{Error, Result};

/// The name of the file.
pub(super) const RECORD: &str = "qtune_merge.json";
/// The version that is written, and the newest that is read.
const VERSION: u64 = 1;

/// What a merged model was made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// See [`unmerge`]; raised whenever an older program would read it wrongly.
    pub format_version: u64,
    /// The base's folder.
    pub base: PathBuf,
    /// A fingerprint of the base's tensors.
    pub base_fingerprint: String,
    /// How a packed base was merged: `dense` or `requantize`; `dense` of a dense one.
    pub onto: String,
    /// The adapters, in the order of merging.
    pub adapters: Vec<MergedAdapter>,
    /// Fingerprints of adapters that the base had in it already.
    #[serde(default)]
    pub before: Vec<String>,
}

/// One adapter of a merged model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergedAdapter {
    /// Its folder.
    pub path: PathBuf,
    /// A fingerprint of its tensors.
    pub fingerprint: String,
    /// The factor on its change.
    pub scale: f64,
}

impl Record {
    /// Reads the record in `dir`; `None` where there is none.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(RECORD);
        if !path.exists() {
            return Ok(None);
        }
        let record: Record = serde_json::from_str(&read_text(&path)?)
            .map_err(|e| Error::input(&path, format!("not a record of merging: {e}")))?;
        match record.format_version {
            1..=VERSION => Ok(Some(record)),
            found => {
                let message = format!("format_version: found {found}, this program reads up to {VERSION}");
                Err(Error::input(&path, message))
            }
        }
    }

    /// A record of merging into the model in `base`, which `before` says what is in already.
    ///
    /// Errs where an adapter is in it already, or given twice.
    pub(super) fn new(
        base: &Path,
        checkpoint: &Checkpoint,
        adapters: &[(Adapter, f64)],
        before: Option<&Record>,
    ) -> Result<Self> {
        let known = before.map(|r| {
            let own = r.adapters.iter().map(|a| a.fingerprint.clone());
            r.before.iter().cloned().chain(own).collect::<Vec<_>>()
        });
        let known = known.unwrap_or_default();
        let mut merged: Vec<MergedAdapter> = Vec::with_capacity(adapters.len());
        for (adapter, scale) in adapters {
            let source = adapter.source();
            let fingerprint = fingerprint([source.join(TENSORS)].iter())?;
            if known.contains(&fingerprint) {
                let message = format!(
                    "the adapter {} is merged into this model already: {RECORD} says so",
                    source.display()
                );
                return Err(Error::input(base, message));
            }
            if merged.iter().any(|m| m.fingerprint == fingerprint) {
                let message = format!("the adapter {} is given twice", source.display());
                return Err(Error::usage(message));
            }
            merged.push(MergedAdapter { path: absolute(source)?, fingerprint, scale: *scale });
        }
        Ok(Record {
            format_version: VERSION,
            base: absolute(base)?,
            base_fingerprint: fingerprint(checkpoint.files().iter())?,
            onto: "dense".to_string(),
            adapters: merged,
            before: known,
        })
    }

    pub(super) fn write(&self, dir: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(|e| Error::Run(format!("{RECORD}: {e}")))?;
        write_bytes(&dir.join(RECORD), &text)
    }
}

/// Writes the model that `dir` was merged from into the folder `out`, byte for byte. The base is looked for
/// where it was, or at `base`.
///
/// Errs where `dir` is no merged model, where the base is gone, or where its tensors are others now.
pub fn unmerge(dir: &Path, base: Option<&Path>, out: &Path) -> Result<PathBuf> {
    let Some(record) = Record::read(dir)? else {
        let message = format!("found no {RECORD}, expected the folder of a merged model");
        return Err(Error::input(dir, message));
    };
    let base = base.unwrap_or(&record.base);
    if !base.exists() {
        let message = "the base of this model is not there any more: give its new place";
        return Err(Error::input(base, message));
    }
    let checkpoint = Checkpoint::open(base)?;
    let found = fingerprint(checkpoint.files().iter())?;
    if found != record.base_fingerprint {
        let expected = record.base_fingerprint;
        let message = format!(
            "found tensors of fingerprint {found}, expected {expected}: not the base of {}",
            dir.display()
        );
        return Err(Error::input(base, message));
    }
    let staging = Staging::new(out)?;
    for path in plain_files(base)? {
        copy(&path, staging.path())?;
    }
    staging.commit()
}

/// The files directly in `dir` that are not hidden, links followed, in order of their names.
pub(super) fn plain_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let path = entry.map_err(|e| Error::io(dir, e))?.path();
        let hidden = path.file_name().is_none_or(|name| name.to_string_lossy().starts_with('.'));
        if !hidden && fs::metadata(&path).map_err(|e| Error::io(&path, e))?.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Copies a file into a folder, under its own name.
pub(super) fn copy(file: &Path, dir: &Path) -> Result<()> {
    let Some(name) = file.file_name() else { return Ok(()) };
    fs::copy(file, dir.join(name)).map(|_| ()).map_err(|e| Error::io(dir.join(name), e))
}

fn absolute(path: &Path) -> Result<PathBuf> {
    fs::canonicalize(path).map_err(|e| Error::io(path, e))
}

/// A fingerprint of files' bytes: FNV-1a over words of eight bytes, lengths included. Each step is a
/// bijection of the state, so that no change of a single word goes unseen; against intent it is no guard.
fn fingerprint<'a>(files: impl Iterator<Item = &'a PathBuf>) -> Result<String> {
    let mut state = 0xcbf2_9ce4_8422_2325u64;
    let mut word = |w: u64| state = (state ^ w).wrapping_mul(0x0000_0100_0000_01b3);
    for path in files {
        let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
        let mut buffer = vec![0u8; 1 << 20];
        let mut length = 0u64;
        loop {
            let mut filled = 0;
            while filled < buffer.len() {
                match file.read(&mut buffer[filled..]).map_err(|e| Error::io(path, e))? {
                    0 => break,
                    n => filled += n,
                }
            }
            for chunk in buffer[..filled].chunks(8) {
                let mut bytes = [0u8; 8];
                bytes[..chunk.len()].copy_from_slice(chunk);
                word(u64::from_le_bytes(bytes));
            }
            length += filled as u64;
            if filled < buffer.len() {
                break;
            }
        }
        word(length);
    }
    Ok(format!("{state:016x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_see_every_byte_and_every_length() {
        let dir = tempfile::tempdir().unwrap();
        let of = |bytes: &[u8]| {
            let path = dir.path().join("f");
            fs::write(&path, bytes).unwrap();
            fingerprint([path].iter()).unwrap()
        };
        let long = vec![7u8; (1 << 20) + 3];
        let first = of(&long);
        assert_eq!(of(&long), first);
        for at in [0, 9, (1 << 20) - 1, (1 << 20) + 2] {
            let mut other = long.clone();
            other[at] ^= 0x80;
            assert_ne!(of(&other), first, "{at}");
        }
        assert_ne!(of(&[0u8; 3]), of(&[0u8; 4]));
        assert_ne!(of(&[]), of(&[0]));
    }

    #[test]
    fn records_of_another_kind_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Record::read(dir.path()).unwrap(), None);
        let write = |text: &str| fs::write(dir.path().join(RECORD), text).unwrap();
        write("{}");
        assert!(Record::read(dir.path()).unwrap_err().to_string().contains(RECORD));
        write(
            r#"{"format_version": 9, "base": "b", "base_fingerprint": "", "onto": "dense", "adapters": []}"#,
        );
        assert!(Record::read(dir.path()).unwrap_err().to_string().contains("found 9"));
        let error = unmerge(&dir.path().join("x"), None, &dir.path().join("out")).unwrap_err().to_string();
        assert!(error.contains("expected the folder of a merged model"), "{error}");
    }
}
