//! Files that are whole or absent: everything is written under a temporary name, synced, and only
//! then renamed, so that a kill or a full disk never leaves half a file under a final name.
//!
//! Temporary names are `.<name>.tmp-<pid>-<n>`, beside the final name so that the rename stays on
//! one file system. [`sweep`] removes what killed processes left behind.

use crate::error::{Error, Result};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Mutex;

/// The temporary paths that this process is writing now: [`sweep`] must not take them for those of
/// an earlier process with the same id, which containers hand out again and again.
static LIVE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A temporary path that is removed when dropped, unless it was renamed before.
struct Temporary {
    path: PathBuf,
    renamed: bool,
}

impl Temporary {
    /// A name beside `last`, registered as in use; nothing is created yet.
    fn beside(last: &Path) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let Some(name) = last.file_name() else {
            return Err(Error::input(last, "no file or folder can have this name"));
        };
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".tmp-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        let path = folder_of(last).join(hidden);
        live().push(path.clone());
        // An earlier process of our id may have died over this very name.
        remove(&path).map_err(|e| Error::io(&path, e))?;
        Ok(Temporary { path, renamed: false })
    }

    fn rename(mut self, last: &Path) -> Result<()> {
        fs::rename(&self.path, last).map_err(|e| Error::io(last, e))?;
        self.renamed = true;
        sync_folder(folder_of(last))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.renamed {
            // Nobody is left to hear of a failure here; `sweep` takes what stays.
            let _ = remove(&self.path);
        }
        live().retain(|path| *path != self.path);
    }
}

fn live() -> std::sync::MutexGuard<'static, Vec<PathBuf>> {
    LIVE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The folder that holds `path`, `.` for a bare name.
fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Removes a folder so that a kill in the middle leaves nothing that looks whole: it is first
/// renamed to a temporary name, which [`sweep`] knows.
pub fn discard(folder: &Path) -> Result<()> {
    let gone = Temporary::beside(folder)?;
    fs::rename(folder, &gone.path).map_err(|e| Error::io(folder, e))?;
    remove(&gone.path).map_err(|e| Error::io(&gone.path, e))
}

/// A whole text file; what is not UTF-8 is an error that names it.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = fs::read(path).map_err(|e| Error::io(path, e))?;
    String::from_utf8(bytes)
        .map_err(|e| Error::input(path, format!("not UTF-8 at byte {}", e.utf8_error().valid_up_to())))
}

/// Removes a file, a link or a whole folder; links are never followed.
fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// A rename is on the disk only once the folder that holds the name is.
fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|f| f.sync_all()).map_err(|e| Error::io(folder, e))
}

/// What stopped a writer: the file itself, or something of the writer's own. `?` makes either.
#[derive(Debug)]
pub enum WriteError {
    /// Writing failed; reported with the file's name.
    Io(io::Error),
    /// What was to be written could not be made; reported as it is.
    Other(Error),
}

impl From<io::Error> for WriteError {
    fn from(error: io::Error) -> Self {
        WriteError::Io(error)
    }
}

impl From<Error> for WriteError {
    fn from(error: Error) -> Self {
        WriteError::Other(error)
    }
}

impl From<candle_core::Error> for WriteError {
    fn from(error: candle_core::Error) -> Self {
        WriteError::Other(error.into())
    }
}

/// Writes the file `path` through `write`, whole or not at all: an existing file is replaced in one
/// step, and on any error it stays as it was and the temporary file is removed.
///
/// The folder must exist. The mode is 0666 less the umask. [`Error::Io`] names `path`; a full disk
/// is exit code 3.
pub fn write_atomic(path: &Path, write: impl FnOnce(&mut dyn Write) -> Result<(), WriteError>) -> Result<()> {
    let temporary = Temporary::beside(path)?;
    let attempt = || -> Result<(), WriteError> {
        let file = OpenOptions::new().write(true).create_new(true).open(&temporary.path)?;
        let mut buffer = BufWriter::with_capacity(1 << 20, file);
        write(&mut buffer)?;
        buffer.flush()?;
        // Buffered pages of a full disk may only be refused here.
        buffer.get_ref().sync_all()?;
        Ok(())
    };
    attempt().map_err(|e| match e {
        WriteError::Io(source) => Error::io(path, source),
        WriteError::Other(error) => error,
    })?;
    temporary.rename(path)
}

/// Writes `bytes` as the file `path`, whole or not at all (see [`write_atomic`]).
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic(path, |w| Ok(w.write_all(bytes)?))
}

/// A folder in the making: filled under a hidden name, then given its final name in one step.
///
/// Dropped before [`commit`](Staging::commit) it disappears with everything in it.
pub struct Staging {
    temporary: Temporary,
    last: PathBuf,
}

impl Staging {
    /// Creates the hidden folder beside `last`, and the folders above it where they are missing.
    ///
    /// Errs when something of the name `last` exists: nothing is ever overwritten.
    pub fn new(last: &Path) -> Result<Self> {
        refuse_existing(last)?;
        let above = folder_of(last);
        fs::create_dir_all(above).map_err(|e| Error::io(above, e))?;
        let temporary = Temporary::beside(last)?;
        fs::create_dir(&temporary.path).map_err(|e| Error::io(&temporary.path, e))?;
        Ok(Staging { temporary, last: last.to_path_buf() })
    }

    /// The hidden folder, to be written into.
    pub fn path(&self) -> &Path {
        &self.temporary.path
    }

    /// Syncs every file and folder inside and gives the folder its final name, which is returned.
    ///
    /// Errs when the final name has come to exist meanwhile; the hidden folder is removed then.
    pub fn commit(self) -> Result<PathBuf> {
        sync_tree(&self.temporary.path)?;
        refuse_existing(&self.last)?;
        self.temporary.rename(&self.last)?;
        Ok(self.last)
    }
}

// Checked by hand because rename(2) silently replaces an empty folder.
fn refuse_existing(last: &Path) -> Result<()> {
    match fs::symlink_metadata(last) {
        Ok(_) => Err(Error::Io { path: last.to_path_buf(), source: io::ErrorKind::AlreadyExists.into() }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io(last, e)),
    }
}

fn sync_tree(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let entry = entry.map_err(|e| Error::io(folder, e))?;
        let (path, kind) = (entry.path(), entry.file_type().map_err(|e| Error::io(entry.path(), e))?);
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            File::open(&path).and_then(|f| f.sync_all()).map_err(|e| Error::io(&path, e))?;
        }
    }
    sync_folder(folder)
}

/// Removes the temporary files and folders directly under `folder` whose process is gone, and
/// returns their names, sorted. A missing folder holds none.
///
/// What a running process (by its id, looked up under `/proc`) may still be writing stays.
pub fn sweep(folder: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|e| Error::io(folder, e))?,
    };
    let mut swept = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| Error::io(folder, e))?;
        let (name, path) = (entry.file_name(), entry.path());
        let Some(pid) = writer_of(&name) else { continue };
        if !running(pid, &path) {
            remove(&path).map_err(|e| Error::io(&path, e))?;
            swept.push(name.to_string_lossy().into_owned());
        }
    }
    swept.sort();
    Ok(swept)
}

/// The process id in a temporary name, `.<name>.tmp-<pid>` or `.<name>.tmp-<pid>-<n>`.
fn writer_of(name: &OsStr) -> Option<u32> {
    let (stem, tail) = name.to_str()?.strip_prefix('.')?.rsplit_once(".tmp-")?;
    let (pid, count) = tail.split_once('-').unwrap_or((tail, "0"));
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    if stem.is_empty() || !digits(pid) || !digits(count) {
        return None;
    }
    pid.parse().ok()
}

fn running(pid: u32, path: &Path) -> bool {
    if pid == std::process::id() {
        let name = path.file_name();
        return live().iter().any(|l| l.file_name() == name);
    }
    // Without /proc nothing can be told: better to leave a stranger's file than to break it.
    !Path::new("/proc/self").exists() || Path::new("/proc").join(pid.to_string()).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn replaces_in_one_step_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        write_bytes(&path, b"one").unwrap();
        write_atomic(&path, |w| {
            w.write_all(b"t")?;
            // Until the end the old content is what others see.
            assert_eq!(fs::read(&path).unwrap(), b"one");
            Ok(w.write_all(b"wo")?)
        })
        .unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(names(dir.path()), ["a.bin"]);
    }

    #[test]
    #[cfg(unix)]
    fn mode_follows_the_umask_like_any_new_file() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let mode = |name: &str| fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
        write_bytes(&dir.path().join("ours"), b"").unwrap();
        File::create(dir.path().join("plain")).unwrap();
        assert_eq!(mode("ours"), mode("plain"));
    }

    #[test]
    fn an_error_keeps_the_old_file_and_removes_the_new() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        write_bytes(&path, b"old").unwrap();
        let full = write_atomic(&path, |w| {
            w.write_all(&vec![1; 3 << 20])?;
            Err(io::Error::from(io::ErrorKind::StorageFull).into())
        })
        .unwrap_err();
        assert_eq!(full.exit_code(), 3);
        assert!(full.to_string().contains("a.bin"), "{full}");
        let other = write_atomic(&path, |_| Err(Error::tensor("w", "found NaN").into())).unwrap_err();
        assert_eq!(other.to_string(), "tensor w: found NaN");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(dir.path()), ["a.bin"]);
        assert_eq!(write_bytes(&dir.path().join("no/such/folder"), b"").unwrap_err().exit_code(), 4);
        assert_eq!(write_bytes(Path::new("/"), b"").unwrap_err().exit_code(), 4);
    }

    #[test]
    fn staging_appears_at_once_or_never() {
        let dir = tempfile::tempdir().unwrap();
        let last = dir.path().join("runs/one");
        let staging = Staging::new(&last).unwrap();
        fs::create_dir(staging.path().join("sub")).unwrap();
        write_bytes(&staging.path().join("sub/f"), b"x").unwrap();
        assert!(!last.exists());
        assert_eq!(staging.commit().unwrap(), last);
        assert_eq!(fs::read(last.join("sub/f")).unwrap(), b"x");
        let taken = Staging::new(&last).err().unwrap();
        assert!(taken.to_string().contains("runs/one"), "{taken}");

        let dropped = Staging::new(&dir.path().join("runs/two")).unwrap();
        write_bytes(&dropped.path().join("f"), b"x").unwrap();
        drop(dropped);
        // An empty folder that came between would be replaced by a bare rename.
        let beaten = Staging::new(&dir.path().join("runs/three")).unwrap();
        fs::create_dir(dir.path().join("runs/three")).unwrap();
        assert!(beaten.commit().is_err());
        assert_eq!(names(&dir.path().join("runs")), ["one", "three"]);
    }

    /// A child that is killed while it writes, as a run under `kill -9` would be.
    #[test]
    #[cfg(target_os = "linux")]
    fn sweep_takes_what_the_dead_left_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let leftover = format!(".model.safetensors.tmp-{}", child.id());
        fs::write(dir.path().join(&leftover), b"half").unwrap();
        let folder = format!(".one.tmp-{}-3", child.id());
        fs::create_dir(dir.path().join(&folder)).unwrap();
        fs::write(dir.path().join(&folder).join("f"), b"half").unwrap();
        let kept = [".hidden", ".a.tmp-", ".a.tmp-12x", ".tmp-1", "a.tmp-99999999", "model.safetensors"];
        kept.iter().for_each(|name| fs::write(dir.path().join(name), b"").unwrap());
        assert_eq!(sweep(dir.path()).unwrap(), Vec::<String>::new(), "the writer still runs");

        child.kill().unwrap();
        child.wait().unwrap();
        // One of our own that is being written, and one of an earlier process of our id.
        let staging = Staging::new(&dir.path().join("now")).unwrap();
        let reborn = format!(".old.tmp-{}-4000000", std::process::id());
        fs::write(dir.path().join(&reborn), b"half").unwrap();
        let mut expected = vec![leftover, folder, reborn];
        expected.sort();
        assert_eq!(sweep(dir.path()).unwrap(), expected);
        assert!(staging.path().exists());
        drop(staging);
        let mut left: Vec<String> = kept.iter().map(|s| s.to_string()).collect();
        left.sort();
        assert_eq!(names(dir.path()), left);
        assert!(sweep(&dir.path().join("missing")).unwrap().is_empty());
    }
}
