//! Safetensors checkpoints, in and out. A file is an eight-byte little-endian header length, a JSON
//! header naming each tensor's dtype, shape and byte range, and the bytes.
//!
//! Nothing in a file is trusted: the header is checked against the file's length, every byte must
//! belong to exactly one tensor, and each lie is an error that names the file and the tensor.

use crate::error::{Error, On, Result};
use crate::files::{write_atomic, WriteError};
use candle_core::{DType, Device, Tensor};
use indexmap::IndexMap;
use serde::Deserialize as _;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

pub use safetensors::Dtype;

/// The largest header that is read, in bytes: the limit of the safetensors crate itself.
const MAX_HEADER: u64 = 100_000_000;

/// Files from this size, in bytes, are mapped; smaller ones are read, which no other process can
/// disturb.
const MAP_FROM: u64 = 64 << 20;

/// The data section of one file.
enum Data {
    Read(Vec<u8>),
    /// The whole file, the data beginning at `start`.
    Mapped {
        file: File,
        map: memmap2::Mmap,
        start: usize,
    },
}

struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Byte range within the data section, checked against its length.
    begin: usize,
    end: usize,
}

/// One or several safetensors files seen as one ordered set of named tensors.
pub struct Checkpoint {
    entries: IndexMap<String, Entry>,
    data: Vec<Data>,
    files: Vec<PathBuf>,
    metadata: BTreeMap<String, String>,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint").field("files", &self.files()).field("tensors", &self.len()).finish()
    }
}

impl Checkpoint {
    /// Opens a `.safetensors` file, a `.safetensors.index.json` with its shards beside it, or a
    /// folder that holds `model.safetensors`, `model.safetensors.index.json` or exactly one
    /// `*.safetensors`, looked for in this order. Only headers of large files are read.
    ///
    /// Errs on any file that is not exactly what its header says, naming file and tensor.
    pub fn open(path: &Path) -> Result<Self> {
        let path = find(path)?;
        if path.extension().is_some_and(|e| e == "json") {
            return Self::open_index(&path);
        }
        let mut checkpoint = Self::empty();
        checkpoint.add(&path, MAP_FROM)?;
        Ok(checkpoint)
    }

    fn empty() -> Self {
        Checkpoint {
            entries: IndexMap::new(),
            data: Vec::new(),
            files: Vec::new(),
            metadata: BTreeMap::new(),
        }
    }

    fn open_index(index: &Path) -> Result<Self> {
        let weight_map = read_index(index)?;
        let shards: BTreeSet<&str> = weight_map.iter().map(|(_, s)| s.as_str()).collect();
        let mut checkpoint = Self::empty();
        for shard in shards {
            let path = index.with_file_name(shard);
            if !path.is_file() {
                return Err(Error::input(index, format!("shard {} is not beside the index", shown(shard))));
            }
            checkpoint.add(&path, MAP_FROM)?;
        }
        for (name, shard) in &weight_map {
            let held = checkpoint.file_of(name).and_then(Path::file_name);
            if held != Some(shard.as_ref()) {
                let found = held.map_or("in no shard".to_string(), |h| format!("in {}", h.to_string_lossy()));
                let message = format!("tensor {}: found {found}, expected in {shard}", shown(name));
                return Err(Error::input(index, message));
            }
        }
        Ok(checkpoint)
    }

    fn add(&mut self, path: &Path, map_from: u64) -> Result<()> {
        let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
        let meta = file.metadata().map_err(|e| Error::io(path, e))?;
        if !meta.is_file() {
            return Err(Error::input(path, "found a folder or device, expected a safetensors file"));
        }
        let header = read_header(path, &mut file, meta.len())?;
        let number = self.files.len();
        for (name, mut entry) in header.entries {
            entry.file = number;
            if let Some(first) = self.entries.get(&name) {
                let message =
                    format!("tensor {}: found also in {}", shown(&name), self.files[first.file].display());
                return Err(Error::input(path, message));
            }
            self.entries.insert(name, entry);
        }
        self.data.push(read_data(path, file, header.start, meta.len(), map_from)?);
        self.files.push(path.to_path_buf());
        for (key, value) in header.metadata {
            self.metadata.entry(key).or_insert(value);
        }
        Ok(())
    }

    /// The tensors' names, by file (shards in order of their names) and position within it.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no tensor at all.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether a tensor has this name.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|e| e.shape.as_slice())
    }

    /// The dtype a tensor is stored in.
    pub fn dtype(&self, name: &str) -> Option<Dtype> {
        self.entries.get(name).map(|e| e.dtype)
    }

    /// The size of a tensor's data in the file, in bytes.
    pub fn bytes(&self, name: &str) -> Option<usize> {
        self.entries.get(name).map(|e| e.end - e.begin)
    }

    /// The text entries of the headers; where shards disagree, the first one's.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The files, shards in order of their names.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The file that holds a tensor.
    pub fn file_of(&self, name: &str) -> Option<&Path> {
        self.entries.get(name).map(|e| self.files[e.file].as_path())
    }

    /// Reads a tensor in its stored dtype: F64, F32, F16, BF16, F8_E4M3, U8, U32, I16, I32 and I64
    /// as they are, and losslessly BOOL as U8 (0 or 1), I8 as I64 and U16 as U32.
    ///
    /// Errs when there is no such tensor, candle has no such dtype, or a mapped file has shrunk.
    pub fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        let Some(entry) = self.entries.get(name) else {
            let files = self.files.first().map(PathBuf::as_path).unwrap_or(Path::new(""));
            return Err(Error::input(files, format!("tensor {}: found none of this name", shown(name))));
        };
        let (shape, bytes) = (entry.shape.as_slice(), self.slice(entry)?);
        let native = |dtype| Tensor::from_raw_buffer(bytes, dtype, shape, device);
        let tensor = match entry.dtype {
            Dtype::F64 => native(DType::F64),
            Dtype::F32 => native(DType::F32),
            Dtype::F16 => native(DType::F16),
            Dtype::BF16 => native(DType::BF16),
            Dtype::F8_E4M3 => native(DType::F8E4M3),
            Dtype::U8 => native(DType::U8),
            Dtype::U32 => native(DType::U32),
            Dtype::I16 => native(DType::I16),
            Dtype::I32 => native(DType::I32),
            Dtype::I64 => native(DType::I64),
            Dtype::BOOL => {
                let truth: Vec<u8> = bytes.iter().map(|&b| u8::from(b != 0)).collect();
                Tensor::from_vec(truth, shape, device)
            }
            // Not I16: few of candle's kernels know it.
            Dtype::I8 => {
                let wide: Vec<i64> = bytes.iter().map(|&b| i64::from(b as i8)).collect();
                Tensor::from_vec(wide, shape, device)
            }
            Dtype::U16 => {
                let wide = bytes.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]])));
                Tensor::from_vec(wide.collect::<Vec<u32>>(), shape, device)
            }
            other => {
                let message = format!(
                    "tensor {}: found dtype {other}, expected F64, F32, F16, BF16, F8_E4M3, I64, I32, I16, I8, U32, U16, U8 or BOOL",
                    shown(name)
                );
                return Err(Error::input(&self.files[entry.file], message));
            }
        };
        tensor.on(name)
    }

    fn slice(&self, entry: &Entry) -> Result<&[u8]> {
        match &self.data[entry.file] {
            Data::Read(bytes) => Ok(&bytes[entry.begin..entry.end]),
            Data::Mapped { file, map, start } => {
                // Touching a page beyond the end of a file kills the process: ask first.
                let path = &self.files[entry.file];
                let now = file.metadata().map_err(|e| Error::io(path, e))?.len();
                if now != map.len() as u64 {
                    let message =
                        format!("found {now} bytes, {} when it was opened: it was changed", map.len());
                    return Err(Error::input(path, message));
                }
                Ok(&map[start + entry.begin..start + entry.end])
            }
        }
    }
}

/// The file that `path` means: itself, or what a folder holds.
fn find(path: &Path) -> Result<PathBuf> {
    if !std::fs::metadata(path).map_err(|e| Error::io(path, e))?.is_dir() {
        return Ok(path.to_path_buf());
    }
    for name in ["model.safetensors", "model.safetensors.index.json"] {
        if path.join(name).exists() {
            return Ok(path.join(name));
        }
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).map_err(|e| Error::io(path, e))? {
        let name = entry.map_err(|e| Error::io(path, e))?.file_name().to_string_lossy().into_owned();
        // Hidden names are files in the making.
        if name.ends_with(".safetensors") && !name.starts_with('.') {
            found.push(name);
        }
    }
    found.sort();
    match found.as_slice() {
        [one] => Ok(path.join(one)),
        several => {
            let found = if several.is_empty() { "none".to_string() } else { several.join(", ") };
            let expected =
                "expected model.safetensors, model.safetensors.index.json or a single *.safetensors";
            Err(Error::input(path, format!("safetensors files found: {found}; {expected}")))
        }
    }
}

/// Names come from files: without line breaks and of a bounded length they fit one line.
fn shown(name: &str) -> String {
    let clean: String = name.chars().take(200).flat_map(char::escape_debug).collect();
    if clean.is_empty() {
        "\"\"".to_string()
    } else {
        clean
    }
}

/// A JSON object with its keys in order and repeated ones kept, which a map would silently drop.
struct Pairs(Vec<(String, Value)>);

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
    fn check_unique(&self, path: &Path) -> Result<()> {
        let mut seen = HashSet::new();
        match self.0.iter().find(|(name, _)| !seen.insert(name)) {
            Some((name, _)) => Err(Error::input(path, format!("tensor {}: found listed twice", shown(name)))),
            None => Ok(()),
        }
    }
}

/// The `weight_map` of an index: tensor name and shard file name, in the order of the file.
///
/// Errs when a shard's name is anything but a plain file name, so that no index reaches outside its
/// own folder.
pub(crate) fn read_index(path: &Path) -> Result<Vec<(String, String)>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: Pairs,
    }
    let length = std::fs::metadata(path).map_err(|e| Error::io(path, e))?.len();
    if length > MAX_HEADER {
        let message = format!("found an index of {length} bytes, expected at most {MAX_HEADER}");
        return Err(Error::input(path, message));
    }
    let text = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let index: Index = serde_json::from_slice(&text)
        .map_err(|e| Error::input(path, format!("not an index with a weight_map: {e}")))?;
    index.weight_map.check_unique(path)?;
    let plain = |name: &str| {
        !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', ':', '\0'])
    };
    let mut pairs = Vec::with_capacity(index.weight_map.0.len());
    for (name, shard) in index.weight_map.0 {
        match shard {
            Value::String(shard) if plain(&shard) => pairs.push((name, shard)),
            other => {
                let found = shown(&other.to_string());
                let message = format!("tensor {}: found shard {found}, expected a file name", shown(&name));
                return Err(Error::input(path, message));
            }
        }
    }
    if pairs.is_empty() {
        return Err(Error::input(path, "found an empty weight_map, expected tensor names and shards"));
    }
    Ok(pairs)
}

struct Header {
    /// Where the data section begins, in bytes.
    start: u64,
    entries: Vec<(String, Entry)>,
    metadata: BTreeMap<String, String>,
}

/// Reads and checks the header against the file's `length`, in bytes.
fn read_header(path: &Path, file: &mut File, length: u64) -> Result<Header> {
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
    Ok(Entry { file: 0, dtype: known, shape, begin: begin as usize, end: end as usize })
}

/// Reads or maps the data section; `file` stands behind the header.
#[allow(unsafe_code)]
fn read_data(path: &Path, mut file: File, start: u64, length: u64, map_from: u64) -> Result<Data> {
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

/// Writes `tensors` as one safetensors file, whole or not at all, and returns its size in bytes.
///
/// The bytes depend on the arguments alone. The order is kept, except that wider elements come
/// before narrower ones: readers that view the bytes in place need each tensor aligned.
///
/// Errs on a repeated name and on dtypes other than F64, F32, F16, BF16, I64, I32, I16, U32 and U8.
pub fn save(path: &Path, tensors: &[(String, Tensor)], metadata: &BTreeMap<String, String>) -> Result<u64> {
    let mut seen = HashSet::new();
    let mut order = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        if name == "__metadata__" || !seen.insert(name) {
            return Err(Error::tensor(name, "found twice (or reserved), expected a name of its own"));
        }
        order.push((name, tensor, spelled(name, tensor.dtype())?));
    }
    order.sort_by_key(|(_, tensor, _)| std::cmp::Reverse(tensor.dtype().size_in_bytes()));

    let quoted = |text: &str| Value::from(text).to_string();
    let mut parts = Vec::with_capacity(order.len() + 1);
    if !metadata.is_empty() {
        let pairs: Vec<String> =
            metadata.iter().map(|(k, v)| format!("{}:{}", quoted(k), quoted(v))).collect();
        parts.push(format!("\"__metadata__\":{{{}}}", pairs.join(",")));
    }
    let mut end = 0u64;
    for (name, tensor, dtype) in &order {
        let begin = end;
        end += (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64;
        let shape: Vec<String> = tensor.dims().iter().map(usize::to_string).collect();
        parts.push(format!(
            "{}:{{\"dtype\":\"{dtype}\",\"shape\":[{}],\"data_offsets\":[{begin},{end}]}}",
            quoted(name),
            shape.join(",")
        ));
    }
    let mut header = format!("{{{}}}", parts.join(","));
    while header.len() % 8 != 0 {
        header.push(' ');
    }
    if header.len() as u64 > MAX_HEADER {
        return Err(Error::Fit(format!(
            "{}: a header of {} bytes, expected at most {MAX_HEADER}",
            path.display(),
            header.len()
        )));
    }
    write_atomic(path, |w| {
        w.write_all(&(header.len() as u64).to_le_bytes())?;
        w.write_all(header.as_bytes())?;
        order.iter().try_for_each(|(name, tensor, _)| write_tensor(w, name, tensor))
    })?;
    Ok(8 + header.len() as u64 + end)
}

fn spelled(name: &str, dtype: DType) -> Result<&'static str> {
    Ok(match dtype {
        DType::F64 => "F64",
        DType::F32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        DType::I64 => "I64",
        DType::I32 => "I32",
        DType::I16 => "I16",
        DType::U32 => "U32",
        DType::U8 => "U8",
        other => {
            let message = format!(
                "found dtype {}, expected f64, f32, f16, bf16, i64, i32, i16, u32 or u8",
                other.as_str()
            );
            return Err(Error::tensor(name, message));
        }
    })
}

/// Writes a tensor's elements in row-major order, little-endian.
fn write_tensor(w: &mut dyn Write, name: &str, tensor: &Tensor) -> Result<(), WriteError> {
    fn elements<T: candle_core::WithDType, const N: usize>(
        w: &mut dyn Write,
        tensor: &Tensor,
        bytes_of: impl Fn(T) -> [u8; N],
    ) -> Result<(), WriteError> {
        let values = tensor.flatten_all()?.to_vec1::<T>()?;
        let mut buffer = Vec::with_capacity(N << 16);
        for block in values.chunks(1 << 16) {
            buffer.clear();
            block.iter().for_each(|&v| buffer.extend_from_slice(&bytes_of(v)));
            w.write_all(&buffer)?;
        }
        Ok(())
    }
    let written = match tensor.dtype() {
        DType::F64 => elements(w, tensor, f64::to_le_bytes),
        DType::F32 => elements(w, tensor, f32::to_le_bytes),
        DType::F16 => elements(w, tensor, half::f16::to_le_bytes),
        DType::BF16 => elements(w, tensor, half::bf16::to_le_bytes),
        DType::I64 => elements(w, tensor, i64::to_le_bytes),
        DType::I32 => elements(w, tensor, i32::to_le_bytes),
        DType::I16 => elements(w, tensor, i16::to_le_bytes),
        DType::U32 => elements(w, tensor, u32::to_le_bytes),
        DType::U8 => elements(w, tensor, u8::to_le_bytes),
        other => spelled(name, other).map(|_| ()).map_err(WriteError::from),
    };
    written.map_err(|e| match e {
        WriteError::Other(Error::Candle(source)) => Error::On { name: name.to_string(), source }.into(),
        other => other,
    })
}

/// Errs where a tensor of floats holds a NaN or an infinity, with the first one's flat index.
pub fn check_finite(name: &str, tensor: &Tensor) -> Result<()> {
    if !tensor.dtype().is_float() {
        return Ok(());
    }
    // Widening keeps what is not finite and makes nothing else so.
    let wide = if tensor.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let flat = tensor.flatten_all().and_then(|t| t.to_dtype(wide)).on(name)?;
    let found = if wide == DType::F64 {
        first_not_finite(&flat.to_vec1::<f64>().on(name)?)
    } else {
        first_not_finite(&flat.to_vec1::<f32>().on(name)?)
    };
    match found {
        Some((index, value)) => {
            let shape = tensor.dims();
            let message = format!("found {value} at flat index {index} of {shape:?}, expected finite values");
            Err(Error::tensor(name, message))
        }
        None => Ok(()),
    }
}

fn first_not_finite<T: Copy + Into<f64>>(values: &[T]) -> Option<(usize, f64)> {
    values.iter().map(|&v| v.into()).enumerate().find(|(_, v): &(usize, f64)| !v.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_of(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

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

    const W: &str = r#""w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;

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

    fn sample() -> Vec<(String, Tensor)> {
        let cpu = &Device::Cpu;
        let of = |dtype| Tensor::new(&[[1f32, 2.0, 3.0], [4.0, 5.0, 126.0]], cpu).unwrap().to_dtype(dtype);
        let mut tensors = vec![("none".to_string(), Tensor::zeros((0, 3), DType::F32, cpu).unwrap())];
        let dtypes = [DType::U8, DType::BF16, DType::F64, DType::F32, DType::F16, DType::I64, DType::U32];
        for dtype in dtypes.into_iter().chain([DType::I32, DType::I16]) {
            tensors.push((format!("t.{}", dtype.as_str()), of(dtype).unwrap()));
        }
        tensors.push(("scalar".into(), Tensor::new(2.5f32, cpu).unwrap()));
        // Not contiguous: the bytes must follow the shape, not the storage.
        tensors.push(("turned".into(), of(DType::F32).unwrap().t().unwrap()));
        tensors
    }

    fn same(a: &Tensor, b: &Tensor) -> bool {
        let list =
            |t: &Tensor| t.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
        a.dtype() == b.dtype() && a.dims() == b.dims() && list(a) == list(b)
    }

    #[test]
    fn what_is_saved_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let metadata =
            BTreeMap::from([("format".to_string(), "pt".to_string()), ("q\"".into(), "\n".into())]);
        let bytes = save(&path, &sample(), &metadata).unwrap();
        assert_eq!(bytes, std::fs::metadata(&path).unwrap().len());
        // From the file, from the folder, and mapped.
        let mut mapped = Checkpoint::empty();
        mapped.add(&path, 0).unwrap();
        assert!(matches!(mapped.data[0], Data::Mapped { .. }));
        for checkpoint in [Checkpoint::open(&path).unwrap(), Checkpoint::open(dir.path()).unwrap(), mapped] {
            assert_eq!(checkpoint.len(), sample().len());
            assert_eq!(checkpoint.metadata(), &metadata);
            assert_eq!(checkpoint.files(), std::slice::from_ref(&path));
            for (name, tensor) in sample() {
                let read = checkpoint.tensor(&name, &Device::Cpu).unwrap();
                assert!(same(&read, &tensor), "{name}: {read} is not {tensor}");
                assert_eq!(checkpoint.shape(&name).unwrap(), tensor.dims());
            }
            assert_eq!(checkpoint.bytes("t.bf16"), Some(12));
            assert_eq!(checkpoint.dtype("t.bf16"), Some(Dtype::BF16));
            assert_eq!(checkpoint.file_of("scalar"), Some(path.as_path()));
            assert!(!checkpoint.contains("absent") && checkpoint.shape("absent").is_none());
            let absent = checkpoint.tensor("absent", &Device::Cpu).unwrap_err().to_string();
            assert!(absent.contains("tensor absent") && absent.contains("model.safetensors"), "{absent}");
        }
    }

    #[test]
    fn bytes_are_those_of_the_format_and_repeat() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let cpu = &Device::Cpu;
        let tensors = [
            ("b".to_string(), Tensor::new(&[7u8, 8, 9], cpu).unwrap()),
            ("a".to_string(), Tensor::new(&[1f32], cpu).unwrap()),
        ];
        save(&path, &tensors, &BTreeMap::new()).unwrap();
        // The wide one first, so that it is aligned.
        let header = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[3],"data_offsets":[4,7]}}"#;
        let padded = format!("{header:width$}", width = header.len().next_multiple_of(8));
        let expected = file_of(&padded, &[0, 0, 0x80, 0x3f, 7, 8, 9]);
        let first = std::fs::read(&path).unwrap();
        assert_eq!(first, expected);
        save(&path, &tensors, &BTreeMap::new()).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), first);
        // The format's own crate reads it too.
        let read = safetensors::SafeTensors::deserialize(&first).unwrap();
        assert_eq!(read.tensor("b").unwrap().data(), [7, 8, 9]);
        // Order is kept among equals: "b" before "a".
        let equal = [tensors[0].clone(), ("a".to_string(), Tensor::new(&[1u8], cpu).unwrap())];
        save(&path, &equal, &BTreeMap::new()).unwrap();
        assert_eq!(Checkpoint::open(&path).unwrap().names().collect::<Vec<_>>(), ["b", "a"]);
        let twice = [tensors[0].clone(), tensors[0].clone()];
        assert!(save(&path, &twice, &BTreeMap::new()).unwrap_err().to_string().contains("tensor b"));
    }

    #[test]
    fn narrow_dtypes_widen_and_misaligned_data_reads() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("odd.safetensors");
        // The header has an odd length and a bool stands before the floats: nothing is aligned.
        let header = r#"{"b":{"dtype":"BOOL","shape":[3],"data_offsets":[0,3]},"f":{"dtype":"F32","shape":[2],"data_offsets":[3,11]},"i":{"dtype":"I8","shape":[2],"data_offsets":[11,13]},"u":{"dtype":"U16","shape":[],"data_offsets":[13,15]},"x":{"dtype":"U64","shape":[1],"data_offsets":[15,23]}}"#;
        let mut data = vec![0, 1, 255];
        data.extend([1.5f32, -2.0].iter().flat_map(|v| v.to_le_bytes()));
        data.extend([0x80, 0x7f, 0xff, 0xfe]);
        data.extend([0; 8]);
        std::fs::write(&path, file_of(header, &data)).unwrap();
        let mut mapped = Checkpoint::empty();
        mapped.add(&path, 0).unwrap();
        for checkpoint in [Checkpoint::open(&path).unwrap(), mapped] {
            let read = |name| checkpoint.tensor(name, &Device::Cpu).unwrap();
            assert_eq!(read("b").to_vec1::<u8>().unwrap(), [0, 1, 1]);
            assert_eq!(read("f").to_vec1::<f32>().unwrap(), [1.5, -2.0]);
            assert_eq!(read("i").to_vec1::<i64>().unwrap(), [-128, 127]);
            assert_eq!(read("u").to_scalar::<u32>().unwrap(), 0xfeff);
            let error = checkpoint.tensor("x", &Device::Cpu).unwrap_err().to_string();
            assert!(error.contains("tensor x: found dtype U64"), "{error}");
        }
    }

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

    #[test]
    fn shards_are_joined_and_their_index_is_not_trusted() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let one = |name: &str, value: f32| [(name.to_string(), Tensor::new(value, &Device::Cpu).unwrap())];
        save(&at("m-1.safetensors"), &one("a", 1.0), &BTreeMap::new()).unwrap();
        save(&at("m-2.safetensors"), &one("b", 2.0), &BTreeMap::new()).unwrap();
        let index = at("model.safetensors.index.json");
        let open = |map: &str| {
            std::fs::write(&index, format!(r#"{{"metadata":{{}},"weight_map":{map}}}"#)).unwrap();
            Checkpoint::open(dir.path())
        };
        let whole = open(r#"{"b":"m-2.safetensors","a":"m-1.safetensors"}"#).unwrap();
        assert_eq!(whole.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(whole.file_of("b"), Some(at("m-2.safetensors").as_path()));
        assert_eq!(whole.tensor("b", &Device::Cpu).unwrap().to_scalar::<f32>().unwrap(), 2.0);

        let refused = |map: &str, expected: &[&str]| {
            let error = open(map).err().unwrap_or_else(|| panic!("{map} must not open"));
            assert_eq!(error.exit_code(), 4);
            let error = error.to_string();
            expected.iter().for_each(|part| assert!(error.contains(part), "{error:?} lacks {part:?}"));
        };
        std::fs::create_dir(at("sub")).unwrap();
        std::fs::copy(at("m-1.safetensors"), at("sub/m-1.safetensors")).unwrap();
        let absolute = at("m-1.safetensors").display().to_string();
        for escape in
            ["../m-1.safetensors", "sub/m-1.safetensors", "", "..", r"sub\\m-1.safetensors", &absolute]
        {
            refused(&format!(r#"{{"a":"{escape}"}}"#), &["index.json", "tensor a", "expected a file name"]);
        }
        refused(r#"{"a":7}"#, &["tensor a", "found shard 7"]);
        refused("{}", &["empty weight_map"]);
        refused("3", &["weight_map"]);
        refused(r#"{"a":"m-3.safetensors"}"#, &["m-3.safetensors"]);
        refused(r#"{"a":"m-2.safetensors"}"#, &["tensor a", "in no shard"]);
        refused(
            r#"{"a":"m-2.safetensors","b":"m-1.safetensors"}"#,
            &["tensor a", "found in m-1.safetensors, expected in m-2.safetensors"],
        );
        refused(r#"{"a":"m-1.safetensors","a":"m-2.safetensors"}"#, &["tensor a", "twice"]);
        std::fs::copy(at("m-1.safetensors"), at("m-2.safetensors")).unwrap();
        refused(
            r#"{"a":"m-1.safetensors","b":"m-2.safetensors"}"#,
            &["m-2.safetensors", "tensor a", "m-1.safetensors"],
        );
    }

    #[test]
    fn a_folder_must_mean_one_model() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Checkpoint::open(dir.path()).map(|c| c.files()[0].file_name().unwrap().to_owned());
        assert!(open().unwrap_err().to_string().contains("found: none"));
        let write = |name: &str| save(&dir.path().join(name), &[], &BTreeMap::new()).unwrap();
        write("b.safetensors");
        write(".c.safetensors");
        assert_eq!(open().unwrap(), "b.safetensors");
        write("a.safetensors");
        assert!(open().unwrap_err().to_string().contains("a.safetensors, b.safetensors"));
        write("model.safetensors");
        assert_eq!(open().unwrap(), "model.safetensors");
        let missing = Checkpoint::open(&dir.path().join("nowhere")).err().unwrap();
        assert_eq!(missing.exit_code(), 4);
    }

    #[test]
    fn the_first_value_that_is_not_finite_is_named() {
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            let of =
                |v: f32| Tensor::new(&[[1f32, 2.0], [v, v]], &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            check_finite("w", &of(3.0)).unwrap();
            for v in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let error = check_finite("w", &of(v)).unwrap_err().to_string();
                assert!(error.contains("tensor w") && error.contains("flat index 2 "), "{error}");
            }
        }
        check_finite("codes", &Tensor::new(&[1u8], &Device::Cpu).unwrap()).unwrap();
    }
}
