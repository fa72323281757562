//! The head of a GGUF file, version 3: what the file says of itself, and where each tensor lies.
//!
//! ```text
//! "GGUF"  version u32  tensors u64  entries u64
//! entries:  key, type u32, value
//! tensors:  name, dimensions u32, sizes u64 (columns first), kind u32, offset u64
//! padding to the alignment, then the tensors' bytes, each padded to it
//! ```
//!
//! Numbers are little-endian, a text is its length in bytes (u64) and UTF-8. [`Header::parse`] trusts
//! nothing: readers in use take sizes on faith, so that no file of ours leaves before it has passed here.

use std::collections::HashSet;
use std::path::Path;

use crate::{Error, Result};

const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
/// What tensors are padded to where `general.alignment` says nothing else.
const ALIGNMENT: u64 = 32;
/// The key of another alignment.
const ALIGNMENT_KEY: &str = "general.alignment";
/// Dimensions of a tensor, at most, as in ggml.
const MAX_DIMS: usize = 4;
/// Bytes of a tensor's name, at most, as in ggml.
const MAX_NAME: usize = 63;

/// A value of the metadata: the types that models of text need.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A count or an id.
    U32(u32),
    /// A signed number.
    I32(i32),
    /// A number.
    F32(f32),
    /// A truth.
    Bool(bool),
    /// A text.
    Text(String),
    /// Texts, such as tokens.
    Texts(Vec<String>),
    /// Numbers, such as the scores of tokens.
    F32s(Vec<f32>),
    /// Signed numbers, such as the types of tokens.
    I32s(Vec<i32>),
}

// The numbers of types in the file.
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// How the elements of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Four bytes each.
    F32,
    /// Two bytes each, ten bits of fraction.
    F16,
    /// Two bytes each, seven bits of fraction.
    Bf16,
    /// Blocks of 32 of 4 bits with an f16 step.
    Q4_0,
    /// Blocks of 32 of 8 bits with an f16 step.
    Q8_0,
}

impl Kind {
    const ALL: [Kind; 5] = [Kind::F32, Kind::F16, Kind::Bf16, Kind::Q4_0, Kind::Q8_0];

    /// Its number in the file.
    fn id(self) -> u32 {
        match self {
            Kind::F32 => 0,
            Kind::F16 => 1,
            Kind::Q4_0 => 2,
            Kind::Q8_0 => 8,
            Kind::Bf16 => 30,
        }
    }

    /// Elements of a block; divides the columns of a row.
    pub fn block(self) -> usize {
        match self {
            Kind::F32 | Kind::F16 | Kind::Bf16 => 1,
            Kind::Q4_0 | Kind::Q8_0 => 32,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Kind::F32 => 4,
            Kind::F16 | Kind::Bf16 => 2,
            Kind::Q4_0 => 18,
            Kind::Q8_0 => 34,
        }
    }

    /// As it is called on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Kind::F32 => "f32",
            Kind::F16 => "f16",
            Kind::Bf16 => "bf16",
            Kind::Q4_0 => "q4_0",
            Kind::Q8_0 => "q8_0",
        }
    }
}

/// A tensor of the file.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its shape, rows first.
    pub shape: Vec<usize>,
    /// How its elements are stored.
    pub kind: Kind,
    /// Where it begins, in bytes behind the head.
    pub offset: u64,
}

impl TensorInfo {
    /// Bytes of its elements. `None` where the shape cannot be of this kind, or is beyond counting.
    pub fn bytes(&self) -> Option<u64> {
        let columns = *self.shape.last()?;
        let (block, bytes) = (self.kind.block(), self.kind.block_bytes());
        if !columns.is_multiple_of(block) {
            return None;
        }
        let count = self.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64))?;
        (count / block as u64).checked_mul(bytes as u64)
    }
}

/// The head of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    /// Key and value, in order.
    pub metadata: Vec<(String, Value)>,
    /// The tensors, in order.
    pub tensors: Vec<TensorInfo>,
    /// Bytes of the head with its padding: where offsets count from.
    pub start: u64,
}

fn padded(n: u64, alignment: u64) -> Option<u64> {
    n.checked_next_multiple_of(alignment)
}

impl Header {
    /// The head of a file of these tensors, one behind the other in this order.
    ///
    /// Errs on a tensor whose shape cannot be of its kind.
    pub fn new(
        metadata: Vec<(String, Value)>,
        tensors: impl IntoIterator<Item = (String, Vec<usize>, Kind)>,
    ) -> Result<Self> {
        let mut placed = Vec::new();
        let mut offset = 0u64;
        for (name, shape, kind) in tensors {
            let info = TensorInfo { name, shape, kind, offset };
            let end = info.bytes().and_then(|n| padded(offset.checked_add(n)?, ALIGNMENT));
            let Some(end) = end else {
                let message = format!("found shape {:?}, which {} cannot hold", info.shape, kind.name());
                return Err(Error::tensor(info.name, message));
            };
            offset = end;
            placed.push(info);
        }
        let mut header = Header { metadata, tensors: placed, start: 0 };
        header.start = header.encode().len() as u64;
        Ok(header)
    }

    /// The bytes of the head, with the padding behind it.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_text(&mut out, key);
            put_value(&mut out, value);
        }
        for info in &self.tensors {
            put_text(&mut out, &info.name);
            out.extend((info.shape.len() as u32).to_le_bytes());
            for &size in info.shape.iter().rev() {
                out.extend((size as u64).to_le_bytes());
            }
            out.extend(info.kind.id().to_le_bytes());
            out.extend(info.offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
        out
    }

    /// Bytes of the whole file, the padding behind the last tensor too.
    pub fn file_bytes(&self) -> Option<u64> {
        let end = match self.tensors.last() {
            Some(last) => padded(last.offset.checked_add(last.bytes()?)?, ALIGNMENT)?,
            None => 0,
        };
        self.start.checked_add(end)
    }

    /// Bytes of padding behind tensor `at`.
    pub fn padding(&self, at: usize) -> u64 {
        let bytes = self.tensors.get(at).and_then(TensorInfo::bytes).unwrap_or(0);
        bytes.next_multiple_of(ALIGNMENT) - bytes
    }

    /// Reads the head in `bytes`, the beginning of a file of `length` bytes or all of it. `path` is for
    /// messages.
    ///
    /// Errs on anything but a file whose every byte is accounted for: another magic or version, counts
    /// that the file is too short for, keys or names twice, an alignment that is no power of two, shapes
    /// beyond counting or that no block divides, tensors that overlap, leave gaps or reach beyond the end.
    pub fn parse(path: &Path, bytes: &[u8], length: u64) -> Result<Self> {
        let mut reader = Reader { path, bytes, at: 0 };
        let magic = reader.take(4, "the magic")?;
        if magic != MAGIC {
            return Err(reader.wrong(format!("found magic {magic:02x?}, expected GGUF")));
        }
        let version = reader.u32("the version")?;
        if version != VERSION {
            return Err(reader.wrong(format!("found version {version}, expected {VERSION}")));
        }
        let tensors = reader.u64("the count of tensors")?;
        let entries = reader.u64("the count of entries")?;
        // The least that a tensor and an entry take, so that a lie about the counts costs nothing.
        if tensors.saturating_mul(32).saturating_add(entries.saturating_mul(13)) > bytes.len() as u64 {
            let message = format!("found {tensors} tensors and {entries} entries, more than the file holds");
            return Err(reader.wrong(message));
        }
        let mut metadata = Vec::with_capacity(entries as usize);
        let mut seen = HashSet::new();
        for _ in 0..entries {
            let key = reader.text("a key")?;
            if key.is_empty() || !seen.insert(key.clone()) {
                return Err(reader.wrong(format!("key {key:?}: found empty or twice, expected once")));
            }
            let value = reader.value(&key)?;
            metadata.push((key, value));
        }
        let alignment = match metadata.iter().find(|(key, _)| key == ALIGNMENT_KEY) {
            None => ALIGNMENT,
            Some((_, Value::U32(n))) if n.is_power_of_two() => u64::from(*n),
            Some((_, found)) => {
                let message = format!("{ALIGNMENT_KEY}: found {found:?}, expected a power of two");
                return Err(reader.wrong(message));
            }
        };
        let mut infos = Vec::with_capacity(tensors as usize);
        let mut seen = HashSet::new();
        let mut end = 0u64;
        for _ in 0..tensors {
            let info = reader.tensor()?;
            let wrong = |message: String| reader.wrong(format!("tensor {}: {message}", info.name));
            if !seen.insert(info.name.clone()) {
                return Err(wrong("found twice".into()));
            }
            if info.offset != end {
                return Err(wrong(format!("found offset {}, expected {end}", info.offset)));
            }
            let next = info.bytes().and_then(|n| padded(end.checked_add(n)?, alignment));
            let Some(next) = next.filter(|next| *next <= length) else {
                let message = format!("found shape {:?} of {}", info.shape, info.kind.name());
                return Err(wrong(format!(
                    "{message}, which its blocks do not divide or the file cannot hold"
                )));
            };
            end = next;
            infos.push(info);
        }
        let start = padded(reader.at as u64, alignment).unwrap_or(u64::MAX);
        if start.checked_add(end) != Some(length) {
            let message = format!("found {length} bytes, expected a head of {start} and tensors of {end}");
            return Err(reader.wrong(message));
        }
        Ok(Header { metadata, tensors: infos, start })
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    let mut array = |of: u32, len: usize| {
        for n in [ARRAY, of] {
            out.extend(n.to_le_bytes());
        }
        out.extend((len as u64).to_le_bytes());
    };
    match value {
        Value::Texts(texts) => array(TEXT, texts.len()),
        Value::F32s(numbers) => array(F32, numbers.len()),
        Value::I32s(numbers) => array(I32, numbers.len()),
        _ => {}
    }
    let mut single = |of: u32, bytes: &[u8]| {
        out.extend(of.to_le_bytes());
        out.extend(bytes);
    };
    match value {
        Value::U32(n) => single(U32, &n.to_le_bytes()),
        Value::I32(n) => single(I32, &n.to_le_bytes()),
        Value::F32(n) => single(F32, &n.to_le_bytes()),
        Value::Bool(truth) => single(BOOL, &[u8::from(*truth)]),
        Value::Text(text) => {
            single(TEXT, &[]);
            put_text(out, text);
        }
        Value::Texts(texts) => texts.iter().for_each(|text| put_text(out, text)),
        Value::F32s(numbers) => numbers.iter().for_each(|n| out.extend(n.to_le_bytes())),
        Value::I32s(numbers) => numbers.iter().for_each(|n| out.extend(n.to_le_bytes())),
    }
}

/// The bytes of a head and how far they are read.
struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn wrong(&self, message: String) -> Error {
        Error::input(self.path, message)
    }

    fn take(&mut self, count: u64, what: &str) -> Result<&'a [u8]> {
        let left = self.bytes.get(self.at..).unwrap_or_default();
        let found = usize::try_from(count).ok().and_then(|n| left.get(..n));
        let Some(found) = found else {
            let message = format!("ends within {what}: expected {count} bytes at {}", self.at);
            return Err(self.wrong(message));
        };
        self.at += found.len();
        Ok(found)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(self.take(4, what)?);
        Ok(u32::from_le_bytes(bytes))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(self.take(8, what)?);
        Ok(u64::from_le_bytes(bytes))
    }

    fn text(&mut self, what: &str) -> Result<String> {
        let count = self.u64(what)?;
        let bytes = self.take(count, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_string()),
            Err(_) => Err(self.wrong(format!("{what}: not UTF-8 before byte {}", self.at))),
        }
    }

    fn value(&mut self, key: &str) -> Result<Value> {
        Ok(match self.u32(key)? {
            U32 => Value::U32(self.u32(key)?),
            I32 => Value::I32(self.u32(key)? as i32),
            F32 => Value::F32(f32::from_bits(self.u32(key)?)),
            BOOL => match self.take(1, key)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                found => return Err(self.wrong(format!("{key}: found truth {found:?}, expected 0 or 1"))),
            },
            TEXT => Value::Text(self.text(key)?),
            ARRAY => {
                let (of, count) = (self.u32(key)?, self.u64(key)?);
                match of {
                    TEXT => {
                        let mut texts = Vec::new();
                        for _ in 0..count {
                            texts.push(self.text(key)?);
                        }
                        Value::Texts(texts)
                    }
                    F32 => Value::F32s(self.words(key, count)?.map(f32::from_le_bytes).collect()),
                    I32 => Value::I32s(self.words(key, count)?.map(i32::from_le_bytes).collect()),
                    other => return Err(self.wrong(format!("{key}: found a list of type {other}"))),
                }
            }
            other => return Err(self.wrong(format!("{key}: found type {other}, which is not written here"))),
        })
    }

    /// `count` numbers of four bytes.
    fn words(&mut self, key: &str, count: u64) -> Result<impl Iterator<Item = [u8; 4]> + 'a> {
        let bytes = self.take(count.saturating_mul(4), key)?;
        Ok(bytes.chunks_exact(4).map(|word| [word[0], word[1], word[2], word[3]]))
    }

    fn tensor(&mut self) -> Result<TensorInfo> {
        let name = self.text("a tensor's name")?;
        if name.is_empty() || name.len() > MAX_NAME {
            let message = format!("tensor {name:?}: expected a name of 1 to {MAX_NAME} bytes");
            return Err(self.wrong(message));
        }
        let dims = self.u32(&name)? as usize;
        if !(1..=MAX_DIMS).contains(&dims) {
            return Err(
                self.wrong(format!("tensor {name}: found {dims} dimensions, expected 1 to {MAX_DIMS}"))
            );
        }
        let mut shape = Vec::with_capacity(dims);
        for _ in 0..dims {
            let size = usize::try_from(self.u64(&name)?).unwrap_or(usize::MAX);
            if size == 0 {
                return Err(self.wrong(format!("tensor {name}: found a dimension of size 0")));
            }
            shape.push(size);
        }
        shape.reverse();
        let id = self.u32(&name)?;
        let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.id() == id) else {
            return Err(self.wrong(format!("tensor {name}: found kind {id}, which is not written here")));
        };
        Ok(TensorInfo { shape, kind, offset: self.u64(&name)?, name })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Header {
        let metadata = vec![
            ("general.architecture".to_string(), Value::Text("llama".into())),
            ("n".to_string(), Value::U32(7)),
            ("below".to_string(), Value::I32(-7)),
            ("eps".to_string(), Value::F32(1e-5)),
            ("yes".to_string(), Value::Bool(true)),
            ("tokens".to_string(), Value::Texts(vec!["<s>".into(), String::new(), "▁t".into()])),
            ("scores".to_string(), Value::F32s(vec![0.0, -1.5])),
            ("types".to_string(), Value::I32s(vec![3, -1])),
        ];
        let tensors = [
            ("a".to_string(), vec![3, 64], Kind::Q8_0),
            ("b".to_string(), vec![5], Kind::F32),
            ("c".to_string(), vec![2, 32], Kind::Q4_0),
        ];
        Header::new(metadata, tensors).unwrap()
    }

    fn refused(bytes: &[u8], length: u64, word: &str) {
        let error = Header::parse(Path::new("m.gguf"), bytes, length).unwrap_err();
        assert_eq!(error.exit_code(), 4);
        let error = error.to_string();
        assert!(error.contains("m.gguf") && error.contains(word), "{error}");
    }

    #[test]
    fn what_is_written_is_read_back() {
        let header = sample();
        let bytes = header.encode();
        // 3 x 2 blocks of 34 bytes, 20 bytes, 2 blocks of 18, each padded to 32.
        assert_eq!(header.tensors.iter().map(|t| t.offset).collect::<Vec<_>>(), [0, 224, 256]);
        assert_eq!((0..3).map(|at| header.padding(at)).collect::<Vec<_>>(), [20, 12, 28]);
        assert_eq!(header.file_bytes(), Some(bytes.len() as u64 + 320));
        assert_eq!(bytes.len() % 32, 0);
        let read = Header::parse(Path::new("m.gguf"), &bytes, header.file_bytes().unwrap()).unwrap();
        assert_eq!(read, header);
    }

    #[test]
    fn columns_come_first_in_the_file() {
        let header = Header::new(Vec::new(), [("w".to_string(), vec![2, 32], Kind::F16)]).unwrap();
        let bytes = header.encode();
        let sizes: Vec<u64> =
            [37, 45].map(|at| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())).to_vec();
        assert_eq!(sizes, [32, 2]);
    }

    #[test]
    fn no_shorter_file_and_no_lie_passes() {
        let header = sample();
        let (bytes, length) = (header.encode(), header.file_bytes().unwrap());
        for cut in 0..bytes.len() - 31 {
            assert!(Header::parse(Path::new("m"), &bytes[..cut], length).is_err(), "{cut} bytes");
        }
        refused(&bytes, length - 32, "expected a head of");
        refused(&bytes, length + 32, "expected a head of");
        let with = |at: usize, new: &[u8]| {
            let mut bytes = bytes.clone();
            bytes[at..at + new.len()].copy_from_slice(new);
            bytes
        };
        refused(&with(0, b"GGML"), length, "magic");
        refused(&with(4, &[2]), length, "found version 2");
        refused(&with(8, &u64::MAX.to_le_bytes()), length, "more than the file holds");
        refused(&with(24, &u64::MAX.to_le_bytes()), length, "ends within a key");
        // The head's end: kind and offset of the last tensor, its sizes before.
        let end = bytes.iter().rposition(|&b| b != 0).unwrap() + 7;
        let tail = u64::from_le_bytes(bytes[end - 8..end].try_into().unwrap());
        assert_eq!(tail, 256);
        refused(&with(end - 8, &255u64.to_le_bytes()), length, "found offset 255, expected 256");
        refused(&with(end - 12, &99u32.to_le_bytes()), length, "found kind 99");
        refused(&with(end - 20, &(u64::MAX / 2).to_le_bytes()), length, "cannot hold");
        refused(&with(end - 28, &33u64.to_le_bytes()), length, "do not divide");
        refused(&with(end - 28, &0u64.to_le_bytes()), length, "size 0");
        refused(&with(end - 32, &9u32.to_le_bytes()), length, "found 9 dimensions");
    }

    #[test]
    fn names_and_alignment_are_checked() {
        let of = |metadata: Vec<(String, Value)>, names: [&str; 2]| {
            let tensors = names.map(|name| (name.to_string(), vec![8], Kind::F32));
            let header = Header::new(metadata, tensors).unwrap();
            (header.encode(), header.file_bytes().unwrap())
        };
        let (bytes, length) = of(Vec::new(), ["a", "a"]);
        refused(&bytes, length, "tensor a: found twice");
        let (bytes, length) = of(Vec::new(), ["a", &"n".repeat(64)]);
        refused(&bytes, length, "1 to 63 bytes");
        let (bytes, length) = of(vec![(ALIGNMENT_KEY.into(), Value::U32(0))], ["a", "b"]);
        refused(&bytes, length, "power of two");
        let twice = vec![("k".to_string(), Value::U32(0)), ("k".to_string(), Value::U32(1))];
        let (bytes, length) = of(twice, ["a", "b"]);
        refused(&bytes, length, "key \"k\"");
        let odd = Header::new(Vec::new(), [("a".to_string(), vec![33], Kind::Q8_0)]).unwrap_err();
        assert_eq!(odd.to_string(), "tensor a: found shape [33], which q8_0 cannot hold");
    }
}
