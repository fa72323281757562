//! metrics.jsonl: one object a line, counted so that a resumed run continues where its checkpoint
//! stands; and beside it the same for TensorBoard.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::report::tensorboard::Events;
use crate::{Error, Result};

/// The metrics of a run.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
    events: Events,
    lines: usize,
}

impl Metrics {
    /// Opens `path`, keeping its first `keep` lines; fewer than that is an error. The event file beside it is
    /// written anew from these.
    pub fn open(path: &Path, keep: usize) -> Result<Self> {
        let io = |e| Error::io(path, e);
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(io)?;
        let mut length = 0u64;
        let mut reader = BufReader::new(&mut file);
        let mut line = Vec::new();
        for kept in 0..keep {
            line.clear();
            let read = reader.read_until(b'\n', &mut line).map_err(io)?;
            if read == 0 || line.last() != Some(&b'\n') {
                let message = format!("found {kept} whole lines, the checkpoint expects {keep}");
                return Err(Error::input(path, message));
            }
            length += read as u64;
        }
        file.set_len(length).map_err(io)?;
        let kept = BufReader::new(File::open(path).map_err(io)?).split(b'\n');
        let events = Events::open(path.parent().unwrap_or(Path::new("")), kept)?;
        Ok(Metrics { path: path.to_path_buf(), file, events, lines: keep })
    }

    /// Lines written so far.
    pub fn lines(&self) -> usize {
        self.lines
    }

    /// Appends one object. Values that are not finite are written as null, which JSON has.
    pub fn write(&mut self, object: Map<String, Value>) -> Result<()> {
        let mut line =
            serde_json::to_vec(&object).map_err(|e| Error::Run(format!("{}: {e}", self.path.display())))?;
        line.push(b'\n');
        // One write for one line: a process that is killed leaves whole lines, but for the last one.
        self.file.write_all(&line).map_err(|e| Error::io(&self.path, e))?;
        self.lines += 1;
        self.events.append(&object)
    }

    /// Makes what was written last through a power cut.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|e| Error::io(&self.path, e))
    }
}

/// The largest resident memory of this process so far, in bytes; 0 where the system does not tell.
pub fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    let kib = line.split_whitespace().next().and_then(|n| n.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lines_after_the_checkpoint_are_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let object = |step: usize| json!({ "step": step }).as_object().unwrap().clone();
        let mut metrics = Metrics::open(&path, 0).unwrap();
        (0..5).for_each(|step| metrics.write(object(step)).unwrap());
        drop(metrics);
        // A line that was cut off in the middle.
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"st").unwrap();
        let mut metrics = Metrics::open(&path, 3).unwrap();
        metrics.write(object(9)).unwrap();
        assert_eq!(metrics.lines(), 4);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "{\"step\":0}\n{\"step\":1}\n{\"step\":2}\n{\"step\":9}\n");
        assert!(Metrics::open(&path, 5).unwrap_err().to_string().contains("found 4 whole lines"));
    }

    #[test]
    fn memory_is_reported() {
        assert!(peak_rss_bytes() > 1 << 20);
    }
}
