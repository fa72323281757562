//! The bytes behind a header: read whole where the file is small, mapped where it is large, and a
//! mapped file asked for its length before each touch.

use crate::error::{Error, Result};
use std::fs::File;
use std::io::Read as _;
use std::ops::Range;
use std::path::Path;

/// Files from this size, in bytes, are mapped; smaller ones are read, which no other process can
/// disturb.
pub(super) const MAP_FROM: u64 = 64 << 20;

/// The data section of one file.
pub(super) enum Data {
    Read(Vec<u8>),
    /// The whole file, the data beginning at `start`.
    Mapped {
        file: File,
        map: memmap2::Mmap,
        start: usize,
    },
}

impl Data {
    /// The bytes of a range within the data section of the file called `path`.
    ///
    /// Errs when a mapped file has changed its length.
    pub(super) fn slice(&self, path: &Path, range: Range<usize>) -> Result<&[u8]> {
        match self {
            Data::Read(bytes) => Ok(&bytes[range]),
            Data::Mapped { file, map, start } => {
                // Touching a page beyond the end of a file kills the process: ask first.
                let now = file.metadata().map_err(|e| Error::io(path, e))?.len();
                if now != map.len() as u64 {
                    let message =
                        format!("found {now} bytes, {} when it was opened: it was changed", map.len());
                    return Err(Error::input(path, message));
                }
                Ok(&map[start + range.start..start + range.end])
            }
        }
    }
}

/// Reads or maps the data section; `file` stands at `start`, its first byte.
#[allow(unsafe_code)]
pub(super) fn read_data(path: &Path, mut file: File, start: u64, length: u64, map_from: u64) -> Result<Data> {
    if length < map_from {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
        if bytes.len() as u64 != length - start {
            let found = start + bytes.len() as u64;
            return Err(Error::input(path, format!("found {found} bytes, {length} a moment ago")));
        }
        return Ok(Data::Read(bytes));
    }
    // SAFETY: the map is read-only and only ever seen as bytes, for which every value is valid; each
    // reader copies out of it, so that no reference outlives a call. What no check of ours can rule
    // out is another process that truncates the file while a tensor is copied (the kernel then
    // raises SIGBUS): `slice` asks for the length before each, and we never write in place ourselves.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
    if map.len() as u64 != length {
        return Err(Error::input(path, format!("found {} bytes, {length} a moment ago", map.len())));
    }
    Ok(Data::Mapped { file, map, start: start as usize })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{file_of, W};
    use super::super::Checkpoint;
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_mapped_file_that_shrinks_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        std::fs::write(&path, file_of(&format!("{{{W}}}"), &[0; 8])).unwrap();
        let mut mapped = Checkpoint::empty();
        mapped.add(&path, 0).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(20).unwrap();
        assert!(mapped.tensor("w", &Device::Cpu).unwrap_err().to_string().contains("found 20 bytes"));
    }
}
