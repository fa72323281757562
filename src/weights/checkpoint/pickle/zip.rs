//! A zip archive as `torch.save` writes it: records stored without compression, found by the central
//! directory at the end of the file, with the 64-bit extension where it is present (PKWARE APPNOTE,
//! sections 4.3 and 4.5.3).
//!
//! Offsets, lengths and names are checked against the file and against each other before anything is
//! read; the checksum of a record is checked by whoever reads its bytes.

use super::super::shown;
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;

const END: &[u8; 4] = b"PK\x05\x06";
const END_64: &[u8; 4] = b"PK\x06\x06";
const LOCATOR_64: &[u8; 4] = b"PK\x06\x07";
const CENTRAL: &[u8; 4] = b"PK\x01\x02";
const LOCAL: &[u8; 4] = b"PK\x03\x04";

/// The largest central directory that is read, in bytes: about a million records.
const MAX_DIRECTORY: u64 = 100_000_000;

/// What the central directory says of one record.
#[derive(Clone, Copy, Debug)]
struct Listed {
    stored: bool,
    crc: u32,
    size: u64,
    header: u64,
}

/// The bytes of one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// Byte range in the file, checked against its length.
    pub(super) begin: u64,
    pub(super) end: u64,
    /// CRC-32 of them.
    pub(super) crc: u32,
}

/// An open archive.
pub(super) struct Archive<'a> {
    path: &'a Path,
    file: &'a mut File,
    length: u64,
    listed: HashMap<String, Listed>,
    /// The folder in which every record of `torch.save` lies.
    root: String,
}

impl<'a> Archive<'a> {
    /// Reads the directory of a file of `length` bytes.
    pub(super) fn open(path: &'a Path, file: &'a mut File, length: u64) -> Result<Self> {
        let mut archive = Archive { path, file, length, listed: HashMap::new(), root: String::new() };
        archive.read_directory()?;
        Ok(archive)
    }

    fn bad(&self, message: impl Into<String>) -> Error {
        Error::input(self.path, message)
    }

    /// The names of the records, in no order.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.listed.keys().map(String::as_str)
    }

    /// The record called `name` within the archive's folder, where there is one.
    pub(super) fn record(&mut self, name: &str) -> Result<Option<Record>> {
        let full = format!("{}{name}", self.root);
        let Some(listed) = self.listed.get(&full).copied() else { return Ok(None) };
        if !listed.stored {
            let message =
                format!("record {}: found it compressed or encrypted, expected it stored", shown(&full));
            return Err(self.bad(message));
        }
        let mut header = [0u8; 30];
        if !within(listed.header, 30, self.length) {
            return Err(self.bad(format!("record {}: its header lies beyond the file's end", shown(&full))));
        }
        self.read_at(listed.header, &mut header)?;
        let name_length = u64::from(u16_at(&header, 26));
        let begin = listed.header + 30 + name_length + u64::from(u16_at(&header, 28));
        if header[..4] != *LOCAL || name_length != full.len() as u64 {
            return Err(
                self.bad(format!("record {}: found no header of it where one is listed", shown(&full)))
            );
        }
        if !within(begin, listed.size, self.length) {
            let (size, length) = (listed.size, self.length);
            let message =
                format!("record {}: found {size} bytes from {begin} on, the file has {length}", shown(&full));
            return Err(self.bad(message));
        }
        let mut own = vec![0u8; full.len()];
        self.read_at(listed.header + 30, &mut own)?;
        if own != full.as_bytes() {
            return Err(self.bad(format!("record {}: found another name at its bytes", shown(&full))));
        }
        Ok(Some(Record { begin, end: begin + listed.size, crc: listed.crc }))
    }

    /// The bytes of a record, at most `limit` of them, their checksum checked.
    pub(super) fn read(&mut self, name: &str, record: Record, limit: u64) -> Result<Vec<u8>> {
        let size = record.end - record.begin;
        if size > limit {
            return Err(self.bad(format!("{name}: found {size} bytes, expected at most {limit}")));
        }
        let mut bytes = vec![0u8; size as usize];
        self.read_at(record.begin, &mut bytes)?;
        check(record.crc, &bytes).map_err(|message| self.bad(format!("{name}: {message}")))?;
        Ok(bytes)
    }

    fn read_at(&mut self, at: u64, bytes: &mut [u8]) -> Result<()> {
        let read = self.file.seek(SeekFrom::Start(at)).and_then(|_| self.file.read_exact(bytes));
        read.map_err(|e| Error::io(self.path, e))
    }

    fn read_directory(&mut self) -> Result<()> {
        let (at, count, size, offset) = self.find_directory()?;
        if size > MAX_DIRECTORY || !within(offset, size, at) || size / 46 < count {
            let message = format!(
                "found a directory of {count} records in {size} bytes from {offset} on, expected it before byte {at}"
            );
            return Err(self.bad(message));
        }
        let mut directory = vec![0u8; size as usize];
        self.read_at(offset, &mut directory)?;
        let mut rest = directory.as_slice();
        for number in 0..count {
            let cut = || format!("directory entry {number}: found it cut off or not one");
            let (name, listed, after) = entry(rest).ok_or_else(|| self.bad(cut()))?;
            let Ok(name) = std::str::from_utf8(name) else {
                return Err(self.bad(format!("directory entry {number}: its name is not UTF-8")));
            };
            if self.listed.insert(name.to_string(), listed).is_some() {
                return Err(self.bad(format!("record {}: found listed twice", shown(name))));
            }
            rest = after;
        }
        if !rest.is_empty() {
            let message = format!("found {} bytes after the {count} directory entries", rest.len());
            return Err(self.bad(message));
        }
        let mut roots = self.listed.keys().filter_map(|name| name.strip_suffix("/data.pkl"));
        match (roots.next(), roots.next()) {
            (Some(root), None) => self.root = format!("{root}/"),
            _ => {
                return Err(
                    self.bad("found a zip archive without one data.pkl, expected what torch.save writes")
                )
            }
        }
        Ok(())
    }

    /// Where the record of the directory's end begins, and what it says: records, size and offset of
    /// the directory, in bytes.
    fn find_directory(&mut self) -> Result<(u64, u64, u64, u64)> {
        // A comment of up to 65535 bytes may stand behind it.
        let tail_length = self.length.min(22 + 65_535);
        let mut tail = vec![0u8; tail_length as usize];
        self.read_at(self.length - tail_length, &mut tail)?;
        let found = (0..tail.len().saturating_sub(21)).rev().find(|&at| {
            tail[at..].starts_with(END) && at + 22 + usize::from(u16_at(&tail, at + 20)) == tail.len()
        });
        let Some(found) = found else {
            return Err(self.bad(format!(
                "found {} bytes without a zip directory at the end, expected one: truncated?",
                self.length
            )));
        };
        let end = self.length - tail_length + found as u64;
        let short = (
            end,
            u64::from(u16_at(&tail, found + 10)),
            u64::from(u32_at(&tail, found + 12)),
            u64::from(u32_at(&tail, found + 16)),
        );
        let mut locator = [0u8; 20];
        if end >= 20 {
            self.read_at(end - 20, &mut locator)?;
        }
        if locator[..4] != *LOCATOR_64 {
            return Ok(short);
        }
        let at = u64_at(&locator, 8);
        let mut long = [0u8; 56];
        if !within(at, 56, end - 20) {
            return Err(
                self.bad(format!("found the directory's end listed at byte {at}, expected it before {end}"))
            );
        }
        self.read_at(at, &mut long)?;
        if long[..4] != *END_64 {
            return Err(self.bad(format!("found no end of a directory at byte {at}, where one is listed")));
        }
        Ok((at, u64_at(&long, 32), u64_at(&long, 40), u64_at(&long, 48)))
    }
}

/// One entry of the directory: its name, what it says, and the bytes behind it.
fn entry(bytes: &[u8]) -> Option<(&[u8], Listed, &[u8])> {
    if bytes.len() < 46 || bytes[..4] != *CENTRAL {
        return None;
    }
    let (flags, method) = (u16_at(bytes, 8), u16_at(bytes, 10));
    let crc = u32_at(bytes, 16);
    let [name, extra, comment] = [28, 30, 32].map(|at| usize::from(u16_at(bytes, at)));
    let name_end = 46 + name;
    let extra_end = name_end + extra;
    let after = bytes.get(extra_end + comment..)?;
    let short = [20, 24, 42].map(|at| u32_at(bytes, at));
    let long = wide(&bytes[name_end..extra_end]);
    let mut long = long.chunks_exact(8);
    // Sizes beyond 32 bits stand in the extra field, in the order size, packed size, offset.
    let mut of = |value: u32| match value {
        u32::MAX => long.next().map(|v| u64_at(v, 0)),
        value => Some(u64::from(value)),
    };
    let (size, packed, header) = (of(short[1])?, of(short[0])?, of(short[2])?);
    let stored = method == 0 && flags & 1 == 0 && size == packed;
    Some((&bytes[46..name_end], Listed { stored, crc, size, header }, after))
}

/// The contents of the 64-bit extra field, empty where there is none.
fn wide(mut extra: &[u8]) -> &[u8] {
    while extra.len() >= 4 {
        let (kind, size) = (u16_at(extra, 0), usize::from(u16_at(extra, 2)));
        let Some(field) = extra.get(4..4 + size) else { return &[] };
        if kind == 1 {
            return field;
        }
        extra = &extra[4 + size..];
    }
    &[]
}

/// Whether the `size` bytes from `begin` on lie before `end`.
fn within(begin: u64, size: u64, end: u64) -> bool {
    begin.checked_add(size).is_some_and(|last| last <= end)
}

/// Compares the CRC-32 of `bytes` to the one that is listed; 0 is what PyTorch lists where it was told
/// to compute none.
pub(super) fn check(listed: u32, bytes: &[u8]) -> Result<(), String> {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    match listed == 0 || crc.sum() == listed {
        true => Ok(()),
        false => Err(format!("found checksum {:08x}, expected {listed:08x}: the file is damaged", crc.sum())),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
