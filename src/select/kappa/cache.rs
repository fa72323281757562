//! Condition numbers kept beside the model, under the content they are of: a file that changes its name keeps
//! them, one that changes its numbers does not.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use super::spectrum::Spectrum;
use super::stored::Matrix;
use super::units::Kind;
use crate::{files, Error, Result};

/// The name of the file beside a model.
pub const FILE_NAME: &str = ".qtune-kappa.json";

/// Goes up with every change to the arithmetic.
const VERSION: u32 = 2;

/// What stands in the file.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    version: u32,
    spectra: BTreeMap<String, Spectrum>,
}

/// What every version of the file has.
#[derive(Deserialize)]
struct Head {
    version: u32,
}

/// The cache of one model.
#[derive(Debug)]
pub struct Cache {
    path: PathBuf,
    spectra: Mutex<BTreeMap<String, Spectrum>>,
    note: Option<String>,
    /// Whether the file lacks something, or is damaged.
    behind: AtomicBool,
}

/// BLAKE3 of the numbers of a matrix: dtype, shape and bytes, whatever is made of them.
pub fn content(matrix: &Matrix) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher
        .update(format!("qtune matrix {} {} {} ", matrix.float.name(), matrix.rows, matrix.cols).as_bytes());
    hasher.update(matrix.bytes);
    hasher.finalize().to_hex().to_string()
}

/// What a spectrum is kept under: BLAKE3 of the [`content`], the kind, the way and the version of the algorithm.
/// Options that act later (roles, budgets) are no part of it.
pub fn key(content: &str, kind: Kind, exact: bool) -> String {
    let way = if exact { "exact" } else { "proven" };
    let text = format!("qtune kappa {VERSION} {way} {kind:?} {content}");
    blake3::hash(text.as_bytes()).to_hex().to_string()
}

impl Cache {
    /// The cache in the file `path`. A missing one is empty; a damaged one too, and [`Cache::note`] says so.
    pub fn open(path: &Path) -> Self {
        let (spectra, note) = match read(path) {
            Ok(spectra) => (spectra, None),
            Err(error) => (BTreeMap::new(), Some(format!("{error}: the cache is made anew"))),
        };
        let behind = AtomicBool::new(note.is_some());
        Cache { path: path.to_path_buf(), spectra: Mutex::new(spectra), note, behind }
    }

    /// The cache beside the model in `dir`.
    pub fn beside(dir: &Path) -> Self {
        Cache::open(&dir.join(FILE_NAME))
    }

    /// What was wrong with the file, where something was.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Spectrum>> {
        self.spectra.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// What is kept under `key`.
    pub fn get(&self, key: &str) -> Option<Spectrum> {
        self.lock().get(key).copied()
    }

    /// Keeps `spectrum` under `key`; on the disk with the next [`Cache::save`].
    pub fn put(&self, key: &str, spectrum: Spectrum) {
        self.lock().insert(key.to_string(), spectrum);
        self.behind.store(true, Ordering::SeqCst);
    }

    /// Writes the file, whole or not at all, with what another process has added to it meanwhile; nothing where
    /// there is nothing new. What could not be written is tried again by the next call.
    pub fn save(&self) -> Result<()> {
        if !self.behind.swap(false, Ordering::SeqCst) {
            return Ok(());
        }
        let written = self.write();
        if written.is_err() {
            self.behind.store(true, Ordering::SeqCst);
        }
        written
    }

    fn write(&self) -> Result<()> {
        let mut spectra = self.lock();
        for (key, spectrum) in read(&self.path).unwrap_or_default() {
            spectra.entry(key).or_insert(spectrum);
        }
        let contents = Contents { version: VERSION, spectra: spectra.clone() };
        let text =
            serde_json::to_vec_pretty(&contents).map_err(|e| Error::input(&self.path, e.to_string()))?;
        files::write_bytes(&self.path, &text)
    }
}

fn read(path: &Path) -> Result<BTreeMap<String, Spectrum>> {
    if !path.exists() {
        return Ok(BTreeMap::new());
    }
    let text = files::read_text(path)?;
    let wrong = |e: serde_json::Error| Error::input(path, e.to_string());
    // What an older arithmetic found has keys of its own and would only lie about.
    let head: Head = serde_json::from_str(&text).map_err(wrong)?;
    if head.version != VERSION {
        return Ok(BTreeMap::new());
    }
    let contents: Contents = serde_json::from_str(&text).map_err(wrong)?;
    Ok(contents.spectra)
}

#[cfg(test)]
mod tests {
    use super::super::stored::Float;
    use super::*;

    #[test]
    fn keys_are_of_the_content() {
        let bytes: Vec<u8> = (0..24).collect();
        let matrix = Matrix { bytes: &bytes, float: Float::F32, rows: 2, cols: 3 };
        let own = content(&matrix);
        assert_eq!(own, content(&Matrix { bytes: &bytes.clone(), ..matrix }));
        let mut other = bytes.clone();
        other[5] ^= 1;
        for different in [
            Matrix { bytes: &other, ..matrix },
            Matrix { rows: 3, cols: 2, ..matrix },
            Matrix { float: Float::F16, rows: 4, ..matrix },
        ] {
            assert_ne!(own, content(&different));
            assert_ne!(key(&own, Kind::Matrix, false), key(&content(&different), Kind::Matrix, false));
        }
        assert_ne!(key(&own, Kind::Matrix, false), key(&own, Kind::Conv, false));
        assert_ne!(key(&own, Kind::Matrix, false), key(&own, Kind::Matrix, true));
    }

    #[test]
    fn two_writers_lose_nothing_and_damage_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let bytes = 2.5f64.to_le_bytes();
        let matrix = Matrix { bytes: &bytes, float: Float::F64, rows: 1, cols: 1 };
        let spectrum = super::super::spectrum::spectrum(&matrix, false);
        let (one, two) = (Cache::open(&path), Cache::open(&path));
        one.put("one", spectrum);
        two.put("two", spectrum);
        one.save().unwrap();
        two.save().unwrap();
        let both = Cache::open(&path);
        assert_eq!((both.get("one"), both.get("two")), (Some(spectrum), Some(spectrum)));
        assert!(both.note().is_none());

        let damage = format!("{{\"version\": {VERSION}, \"spe");
        std::fs::write(&path, damage).unwrap();
        let damaged = Cache::open(&path);
        assert!(damaged.note().unwrap().contains(FILE_NAME) && damaged.get("one").is_none());
        damaged.put("three", spectrum);
        damaged.save().unwrap();
        assert_eq!(Cache::open(&path).get("three"), Some(spectrum));

        // An older file is no damage, whatever it says of a spectrum.
        std::fs::write(&path, "{\"version\": 1, \"spectra\": {\"one\": {\"sigma_max\": 1}}}").unwrap();
        let older = Cache::open(&path);
        assert!(older.note().is_none() && older.get("one").is_none());
    }

    #[test]
    fn what_could_not_be_written_is_written_later() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("later");
        let path = folder.join(FILE_NAME);
        let bytes = 2.5f64.to_le_bytes();
        let matrix = Matrix { bytes: &bytes, float: Float::F64, rows: 1, cols: 1 };
        let spectrum = super::super::spectrum::spectrum(&matrix, false);
        let cache = Cache::open(&path);
        cache.put("one", spectrum);
        assert!(cache.save().is_err());
        std::fs::create_dir(&folder).unwrap();
        cache.save().unwrap();
        assert_eq!(Cache::open(&path).get("one"), Some(spectrum));
    }
}
