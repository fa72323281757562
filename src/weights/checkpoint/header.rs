//! A safetensors header, read and checked against the length of its file: dtype, shape and byte
//! range of every tensor, such that each byte belongs to exactly one of them.

use super::pickle::{Stored, Strides};
use super::{shown, Dtype};
use crate::error::{Error, Result};
use serde::Deserialize as _;
use serde_json::Value;
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;

/// The largest header that is read, in bytes: the limit of the safetensors crate itself.
pub(super) const MAX_HEADER: u64 = 100_000_000;

/// One tensor of one file.
pub(super) struct Entry {
    pub(super) file: usize,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Byte range within the data section, checked against its length.
    pub(super) begin: usize,
    pub(super) end: usize,
    /// The storage that it lies in, of a pickled file.
    pub(super) stored: Option<Arc<Stored>>,
    /// How its elements lie apart, where they do not follow each other.
    pub(super) strides: Option<Strides>,
}

impl Entry {
    /// The size of the tensor's elements, in bytes.
    pub(super) fn bytes(&self) -> usize {
        match &self.strides {
            None => self.end - self.begin,
            Some(_) => self.shape.iter().product::<usize>() * (self.dtype.bitsize() / 8),
        }
    }
}

/// A JSON object with its keys in order and repeated ones kept, which a map would silently drop.
pub(super) struct Pairs(pub(super) Vec<(String, Value)>);

impl<'de> serde::Deserialize<'de> for Pairs {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Pairs;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a JSON object")
            }
            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

impl Pairs {
    pub(super) fn check_unique(&self, path: &Path) -> Result<()> {
        let mut seen = HashSet::new();
        match self.0.iter().find(|(name, _)| !seen.insert(name)) {
            Some((name, _)) => Err(Error::input(path, format!("tensor {}: found listed twice", shown(name)))),
            None => Ok(()),
        }
    }
}

/// What one file says of itself.
pub(super) struct Header {
    /// Where the data section begins, in bytes.
    pub(super) start: u64,
    pub(super) entries: Vec<(String, Entry)>,
    pub(super) metadata: BTreeMap<String, String>,
}

/// Reads and checks the header against the file's `length`, in bytes.
pub(super) fn read_header(path: &Path, file: &mut File, length: u64) -> Result<Header> {
    let bad = |message: String| Error::input(path, message);
    if length < 8 {
        return Err(bad(format!("found {length} bytes, expected at least the 8 of a safetensors header")));
    }
    let mut first = [0; 8];
    file.read_exact(&mut first).map_err(|e| Error::io(path, e))?;
    let size = u64::from_le_bytes(first);
    if size > MAX_HEADER || size > length - 8 {
        let guess = match &first[..4] {
            b"PK\x03\x04" => ": this is a zip archive, as torch.save writes it",
            b"GGUF" => ": this is a GGUF file",
            _ => ": truncated, or not a safetensors file",
        };
        let most = MAX_HEADER.min(length - 8);
        return Err(bad(format!("found a header length of {size} bytes, expected at most {most}{guess}")));
    }
    let mut text = vec![0; size as usize];
    file.read_exact(&mut text).map_err(|e| Error::io(path, e))?;
    let pairs: Pairs =
        serde_json::from_slice(&text).map_err(|e| bad(format!("the header is not a JSON object: {e}")))?;
    pairs.check_unique(path)?;

    let mut header = Header { start: 8 + size, entries: Vec::new(), metadata: BTreeMap::new() };
    for (name, value) in pairs.0 {
        if name == "__metadata__" {
            header.metadata = serde_json::from_value(value)
                .map_err(|e| bad(format!("__metadata__: {e}, expected an object of strings")))?;
        } else {
            let entry = read_entry(&value, length - header.start)
                .map_err(|message| bad(format!("tensor {}: {message}", shown(&name))))?;
            header.entries.push((name, entry));
        }
    }
    header.entries.sort_by_key(|(_, e)| (e.begin, e.end));
    let mut end = 0;
    for (name, entry) in &header.entries {
        if entry.begin != end {
            let kind = if entry.begin < end { "an overlap" } else { "a hole" };
            let (name, found) = (shown(name), entry.begin);
            return Err(bad(format!("tensor {name}: found {kind}, bytes from {found}, expected from {end}")));
        }
        end = entry.end;
    }
    if end as u64 != length - header.start {
        let found = length - header.start;
        return Err(bad(format!("found {found} bytes of data, expected the {end} that the header names")));
    }
    Ok(header)
}

/// One tensor's entry, checked against the length of the data section, in bytes.
fn read_entry(value: &Value, length: u64) -> Result<Entry, String> {
    #[derive(serde::Deserialize)]
    struct Raw {
        dtype: String,
        shape: Vec<u64>,
        data_offsets: [u64; 2],
    }
    let Raw { dtype, shape, data_offsets: [begin, end] } =
        Raw::deserialize(value).map_err(|e| format!("{e} in its header entry"))?;
    let known: Dtype = serde_json::from_value(Value::String(dtype.clone()))
        .map_err(|_| format!("found dtype {}, expected one of safetensors'", shown(&dtype)))?;
    if begin > end || end > length {
        return Err(format!("found bytes {begin}..{end}, expected a range within the file's {length}"));
    }
    // A dimension of 0 does not excuse an absurd one beside it, so zeros count as one here.
    let bits = shape.iter().try_fold(known.bitsize() as u64, |n, &d| n.checked_mul(d.max(1))).filter(|&n| {
        n <= i64::MAX as u64 // so that every dimension and the product fit a usize too
    });
    let Some(bits) = bits else {
        return Err(format!("found shape {shape:?}, whose size overflows"));
    };
    let bits = if shape.contains(&0) { 0 } else { bits };
    if bits % 8 != 0 || bits / 8 != end - begin {
        let found = end - begin;
        return Err(format!("found {found} bytes, expected {} for {known} {shape:?}", bits.div_ceil(8)));
    }
    let shape = shape.into_iter().map(|d| d as usize).collect();
    Ok(Entry {
        file: 0,
        dtype: known,
        shape,
        begin: begin as usize,
        end: end as usize,
        stored: None,
        strides: None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{file_of, W};
    use super::super::Checkpoint;
    use super::*;
    use std::io::Write as _;

    /// The message of opening these bytes.
    fn refused(bytes: &[u8]) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lie.safetensors");
        std::fs::write(&path, bytes).unwrap();
        let error = Checkpoint::open(&path).expect_err("a lie must not open");
        assert_eq!(error.exit_code(), 4, "{error}");
        let message = error.to_string();
        assert!(message.contains("lie.safetensors") && !message.contains('\n'), "{message}");
        message
    }

    #[track_caller]
    fn lies(header: &str, data: usize, expected: &[&str]) {
        let message = refused(&file_of(header, &vec![0; data]));
        for part in expected {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
    }

    #[test]
    fn lengths_that_lie() {
        assert!(refused(b"").contains("found 0 bytes"));
        assert!(refused(b"1234567").contains("found 7 bytes"));
        assert!(refused(&9u64.to_le_bytes()).contains("header length of 9 bytes, expected at most 0"));
        assert!(refused(&u64::MAX.to_le_bytes()).contains("18446744073709551615"));
        assert!(refused(b"PK\x03\x04abcdefgh").contains("torch.save"));
        // A header larger than the limit is refused by its length alone, although the file is as long.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("huge.safetensors");
        let file = File::create(&path).unwrap();
        (&file).write_all(&(MAX_HEADER + 1).to_le_bytes()).unwrap();
        file.set_len(8 + MAX_HEADER + 1).unwrap();
        assert!(Checkpoint::open(&path).err().unwrap().to_string().contains("expected at most 100000000"));
    }

    #[test]
    fn headers_that_lie() {
        lies("[1]", 0, &["not a JSON object"]);
        lies("{", 0, &["not a JSON object"]);
        lies(&"[".repeat(100_000), 0, &["not a JSON object"]);
        lies("\u{1}\u{2}", 0, &["not a JSON object"]);
        lies(r#"{"__metadata__":{"a":1}}"#, 0, &["__metadata__"]);
        lies(r#"{"w":3}"#, 0, &["tensor w"]);
        lies(r#"{"w":{"dtype":"F32","shape":[2]}}"#, 8, &["tensor w", "data_offsets"]);
        lies(r#"{"w":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#, 8, &["tensor w", "-2"]);
        lies(r#"{"w":{"dtype":"F31","shape":[2],"data_offsets":[0,8]}}"#, 8, &["tensor w", "F31"]);
        lies(&format!("{{{W},{W}}}"), 8, &["tensor w", "twice"]);
        lies("{\"a\\nb\":3}", 0, &["tensor a\\nb"]);
    }

    #[test]
    fn ranges_that_lie() {
        let entry = |name: &str, shape: &str, begin: u64, end: u64| {
            format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
        };
        lies(&format!("{{{}}}", entry("w", "[2]", 8, 0)), 8, &["tensor w", "8..0"]);
        lies(&format!("{{{}}}", entry("w", "[2]", 0, 8)), 7, &["tensor w", "0..8", "7"]);
        lies(&format!("{{{}}}", entry("w", "[3]", 0, 8)), 8, &["tensor w", "found 8 bytes, expected 12"]);
        lies(&format!("{{{}}}", entry("w", "[4294967296,4294967296]", 0, 0)), 0, &["tensor w", "overflows"]);
        lies(&format!("{{{}}}", entry("w", "[0,18446744073709551615,9]", 0, 0)), 0, &["overflows"]);
        let two = format!("{{{W},{}}}", entry("v", "[2]", 4, 12));
        lies(&two, 12, &["tensor v", "overlap", "from 4, expected from 8"]);
        let two = format!("{{{W},{}}}", entry("v", "[2]", 12, 20));
        lies(&two, 20, &["tensor v", "hole", "from 12, expected from 8"]);
        lies(&format!("{{{W}}}"), 12, &["found 12 bytes of data, expected the 8"]);
        lies(r#"{"w":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}"#, 2, &["tensor w", "F4"]);
    }
}
