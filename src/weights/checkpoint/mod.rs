//! Checkpoints: safetensors, in and out, and PyTorch's pickled files, in. A safetensors file is an eight-byte little-endian header length, a JSON
//! header naming each tensor's dtype, shape and byte range, and the bytes.
//!
//! Nothing in a file is trusted: the header is checked against the file's length, every byte must
//! belong to exactly one tensor, and each lie is an error that names the file and the tensor.
//!
//! `header` checks one file's header and `index` the list of a model's shards, `data` holds the bytes
//! behind a header, `save` writes, `pickle` reads PyTorch's own files where that is allowed; here they
//! are one ordered set of named tensors.

mod data;
mod header;
mod index;
pub(crate) mod pickle;
mod save;

use crate::error::{Error, On, Result};
use candle_core::{DType, Device, Tensor};
use data::{read_data, Data, MAP_FROM};
use header::{read_header, Entry};
use indexmap::IndexMap;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Seek as _;
use std::path::{Path, PathBuf};

pub(crate) use index::read_index;
pub use index::{save_model, save_model_pieces};
pub use pickle::Pickle;
pub use safetensors::Dtype;
pub use save::{save, save_pieces, Piece, Planned};

/// One or several files seen as one ordered set of named tensors.
pub struct Checkpoint {
    entries: IndexMap<String, Entry>,
    data: Vec<Data>,
    files: Vec<PathBuf>,
    metadata: BTreeMap<String, String>,
    notes: Vec<String>,
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
        Self::open_with(path, Pickle::Refused)
    }

    /// As [`Checkpoint::open`], and, where `pickle` allows it, a file that PyTorch pickled (`.pth`, `.pt`,
    /// `.bin`), or a folder without safetensors that holds exactly one.
    ///
    /// A pickled file that is not allowed is a wrong use ([`Error::Usage`]).
    pub fn open_with(path: &Path, pickle: Pickle) -> Result<Self> {
        let path = find(path)?;
        if path.extension().is_some_and(|e| e == "json") {
            return Self::open_index(&path);
        }
        let mut checkpoint = Self::empty();
        if !pickle::is_pickled(&path)? {
            checkpoint.add(&path, MAP_FROM)?;
        } else if pickle == Pickle::Refused {
            return Err(Error::usage(format!(
                "{}: found a file that PyTorch pickled: --allow-pickle reads it, as data alone",
                path.display()
            )));
        } else {
            checkpoint.add_pickled(&path, MAP_FROM)?;
        }
        Ok(checkpoint)
    }

    fn empty() -> Self {
        Checkpoint {
            entries: IndexMap::new(),
            data: Vec::new(),
            files: Vec::new(),
            metadata: BTreeMap::new(),
            notes: Vec::new(),
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

    fn add_pickled(&mut self, path: &Path, map_from: u64) -> Result<()> {
        let (mut file, length) = open_file(path)?;
        let contents = pickle::read(path, &mut file, length)?;
        file.rewind().map_err(|e| Error::io(path, e))?;
        self.data.push(read_data(path, file, 0, length, map_from)?);
        self.files.push(path.to_path_buf());
        self.entries.extend(contents.entries);
        self.notes.extend(contents.notes);
        Ok(())
    }

    fn add(&mut self, path: &Path, map_from: u64) -> Result<()> {
        let (mut file, length) = open_file(path)?;
        let header = read_header(path, &mut file, length)?;
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
        self.data.push(read_data(path, file, header.start, length, map_from)?);
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
        self.entries.get(name).map(Entry::bytes)
    }

    /// The text entries of the headers; where shards disagree, the first one's.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// One line for each choice that reading took: which of a file's dicts is the model's.
    pub fn notes(&self) -> &[String] {
        &self.notes
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
        let bytes = &*self.raw(name)?;
        let Some(entry) = self.entries.get(name) else { return Err(self.none_called(name)) };
        let shape = entry.shape.as_slice();
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
}

impl Checkpoint {
    fn none_called(&self, name: &str) -> Error {
        let files = self.files.first().map(PathBuf::as_path).unwrap_or(Path::new(""));
        Error::input(files, format!("tensor {}: found none of this name", shown(name)))
    }

    /// The bytes of a tensor's elements as they are stored, row-major, little-endian.
    ///
    /// Errs when there is no such tensor, or a mapped file has shrunk.
    pub fn raw(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        let Some(entry) = self.entries.get(name) else { return Err(self.none_called(name)) };
        let (data, path) = (&self.data[entry.file], self.files[entry.file].as_path());
        if let Some(stored) = &entry.stored {
            let whole = data.slice(path, stored.range())?;
            stored
                .check(whole)
                .map_err(|message| Error::input(path, format!("tensor {}: {message}", shown(name))))?;
        }
        let bytes = data.slice(path, entry.begin..entry.end)?;
        Ok(match &entry.strides {
            None => Cow::Borrowed(bytes),
            Some(strides) => Cow::Owned(strides.gather(bytes, &entry.shape, entry.dtype.bitsize() / 8)),
        })
    }

    /// Reads rows of a table `[rows, cols]`, `[ids.len(), cols]` in its stored dtype; of plain floats in a
    /// file of safetensors only these rows are touched. Errs as [`Checkpoint::tensor`] does, and on an id
    /// out of range.
    pub fn rows(&self, name: &str, ids: &[u32], device: &Device) -> Result<Tensor> {
        let entry = self.entries.get(name).filter(|e| e.strides.is_none() && e.stored.is_none());
        let plain = entry.and_then(|e| match (e.dtype, e.shape.as_slice()) {
            (Dtype::F32, [rows, cols]) => Some((e, DType::F32, *rows, *cols)),
            (Dtype::F16, [rows, cols]) => Some((e, DType::F16, *rows, *cols)),
            (Dtype::BF16, [rows, cols]) => Some((e, DType::BF16, *rows, *cols)),
            _ => None,
        });
        let Some((entry, dtype, rows, cols)) = plain else {
            let ids = Tensor::new(ids, device).on(name)?;
            return self.tensor(name, device)?.contiguous()?.index_select(&ids, 0).on(name);
        };
        if let Some(id) = ids.iter().find(|&&id| id as usize >= rows) {
            return Err(Error::tensor(name, format!("found id {id}, expected one below the {rows} rows")));
        }
        let (data, path) = (&self.data[entry.file], self.files[entry.file].as_path());
        let table = data.slice(path, entry.begin..entry.end)?;
        let width = cols * dtype.size_in_bytes();
        let picked: Vec<u8> =
            ids.iter().flat_map(|&id| &table[id as usize * width..][..width]).copied().collect();
        Tensor::from_raw_buffer(&picked, dtype, &[ids.len(), cols], device).on(name)
    }
}

/// An open file and its length in bytes.
fn open_file(path: &Path) -> Result<(File, u64)> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let meta = file.metadata().map_err(|e| Error::io(path, e))?;
    match meta.is_file() {
        true => Ok((file, meta.len())),
        false => Err(Error::input(path, "found a folder or device, expected a file of tensors")),
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
    let (mut found, mut pickled) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(path).map_err(|e| Error::io(path, e))? {
        let name = entry.map_err(|e| Error::io(path, e))?.file_name().to_string_lossy().into_owned();
        // Hidden names are files in the making.
        match name.starts_with('.') {
            false if name.ends_with(".safetensors") => found.push(name),
            false if pickle::has_ending(&name) => pickled.push(name),
            _ => {}
        }
    }
    // Beside a model of transformers lie its optimizer and its arguments, pickled too.
    if pickled.iter().any(|name| name == "pytorch_model.bin") {
        pickled.retain(|name| name == "pytorch_model.bin");
    }
    found.sort();
    pickled.sort();
    match (found.as_slice(), pickled.as_slice()) {
        ([one], _) | ([], [one]) => Ok(path.join(one)),
        (several, _) => {
            let found = if several.is_empty() { "none".to_string() } else { several.join(", ") };
            let beside = match pickled.is_empty() {
                true => String::new(),
                false => format!(", pickled files {}", pickled.join(", ")),
            };
            let expected =
                "expected model.safetensors, model.safetensors.index.json or a single *.safetensors";
            Err(Error::input(path, format!("safetensors files found: {found}{beside}; {expected}")))
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

    /// The header entry of two floats.
    pub(super) const W: &str = r#""w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;

    /// The bytes of a file with this header.
    pub(super) fn file_of(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(data);
        bytes
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
