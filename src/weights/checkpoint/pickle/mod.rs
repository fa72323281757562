//! Checkpoints of PyTorch (`.pth`, `.pt`, `.bin`), read as data: a zip archive that holds a pickle,
//! which describes the tensors, and a record of raw bytes for each storage that they look into.
//!
//! Python would run what a pickle names. Here a name is a name: `zip` finds the records, `machine`
//! reads the pickle into values without calling anything, `state` finds the model's tensors among
//! them. Nothing is trusted: a tensor must lie within its storage, a storage within the file, and its
//! bytes must have the checksum that the archive lists.

mod machine;
mod state;
#[cfg(test)]
pub(crate) mod testing;
mod zip;

use super::header::Entry;
use super::{shown, Dtype};
use crate::error::{Error, Result};
use machine::{Storage, TensorView};
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use zip::Archive;

/// Whether pickled files may be read. They are read as data, and nothing in them is ever run; yet the
/// format is one that has to be asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pickle {
    /// A pickled file is an error that says how to allow it.
    #[default]
    Refused,
    /// Pickled files are read as data.
    Allowed,
}

impl Pickle {
    /// [`Pickle::Allowed`] where `allowed`.
    pub fn when(allowed: bool) -> Self {
        match allowed {
            true => Pickle::Allowed,
            false => Pickle::Refused,
        }
    }
}

/// The largest pickle that is read, in bytes: it holds names and shapes only.
const MAX_PICKLE: u64 = 64 << 20;

/// The bytes behind one or several tensors of a pickled file.
pub(super) struct Stored {
    /// Byte range in the file.
    begin: usize,
    end: usize,
    crc: u32,
    /// The outcome of the check, made when a tensor is first read.
    checked: OnceLock<Result<(), String>>,
}

impl Stored {
    /// The byte range in the file.
    pub(super) fn range(&self) -> std::ops::Range<usize> {
        self.begin..self.end
    }

    /// Errs where `bytes`, those of the range, have another checksum than the archive lists.
    pub(super) fn check(&self, bytes: &[u8]) -> Result<(), String> {
        self.checked.get_or_init(|| zip::check(self.crc, bytes)).clone()
    }
}

/// Steps between neighbours along each dimension, in elements, of a tensor that is not contiguous.
pub(super) struct Strides(Vec<usize>);

impl Strides {
    /// The elements of `shape`, of `size` bytes each, in row-major order out of `bytes`, which begin
    /// with the first of them.
    pub(super) fn gather(&self, bytes: &[u8], shape: &[usize], size: usize) -> Vec<u8> {
        let count: usize = shape.iter().product();
        let mut gathered = Vec::with_capacity(count * size);
        let mut index = vec![0usize; shape.len()];
        let mut at = 0;
        for _ in 0..count {
            gathered.extend_from_slice(&bytes[at * size..(at + 1) * size]);
            // The next index, as an odometer counts.
            for dim in (0..shape.len()).rev() {
                index[dim] += 1;
                at += self.0[dim];
                if index[dim] < shape[dim] {
                    break;
                }
                at -= self.0[dim] * shape[dim];
                index[dim] = 0;
            }
        }
        gathered
    }
}

/// Whether `path` names a file that PyTorch pickled: by its ending, or by its first bytes where the
/// ending does not say that it is safetensors.
pub(super) fn is_pickled(path: &Path) -> Result<bool> {
    if has_ending(&path.to_string_lossy()) {
        return Ok(true);
    }
    if path.extension().is_some_and(|e| e == "safetensors" || e == "json") {
        return Ok(false);
    }
    let mut first = Vec::new();
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    file.take(4).read_to_end(&mut first).map_err(|e| Error::io(path, e))?;
    Ok(first == b"PK\x03\x04")
}

/// Whether a file's name ends as those of pickled checkpoints do.
pub(super) fn has_ending(name: &str) -> bool {
    [".pth", ".pt", ".bin", ".ckpt", ".pth.tar"].iter().any(|ending| name.ends_with(ending))
}

/// What one pickled file holds.
pub(super) struct Contents {
    pub(super) entries: Vec<(String, Entry)>,
    pub(super) notes: Vec<String>,
}

/// Reads names, shapes and places of the tensors in a file of `length` bytes.
pub(super) fn read(path: &Path, file: &mut File, length: u64) -> Result<Contents> {
    let bad = |message: String| Error::input(path, message);
    let mut first = Vec::new();
    let begin = file.seek(SeekFrom::Start(0)).and_then(|_| file.take(16).read_to_end(&mut first));
    begin.map_err(|e| Error::io(path, e))?;
    if !first.starts_with(b"PK\x03\x04") {
        return Err(bad(not_an_archive(&first)));
    }
    let mut archive = Archive::open(path, file, length)?;
    if archive.names().any(|name| name.ends_with("/constants.pkl")) {
        return Err(bad(
            "found a TorchScript archive, expected a state_dict: torch.save(torch.jit.load(FILE).state_dict(), NEW)"
                .into(),
        ));
    }
    if let Some(record) = archive.record("byteorder")? {
        let order = archive.read("byteorder", record, 64)?;
        if order != b"little" {
            let found = shown(&String::from_utf8_lossy(&order));
            return Err(bad(format!("byteorder: found {found}, expected little")));
        }
    }
    let record = archive.record("data.pkl")?.ok_or_else(|| bad("found no data.pkl".into()))?;
    let text = archive.read("data.pkl", record, MAX_PICKLE)?;
    let (heap, whole) = machine::read(&text).map_err(|message| bad(format!("data.pkl: {message}")))?;
    let state = state::find(&heap, whole).map_err(bad)?;

    let mut stored: HashMap<&str, Arc<Stored>> = HashMap::new();
    let mut entries = Vec::with_capacity(state.tensors.len());
    for (name, view) in state.tensors {
        let named = |message: String| bad(format!("tensor {}: {message}", shown(&name)));
        let dtype = dtype_of(view.storage.class).ok_or_else(|| {
            named(format!("found a {}, expected one of real numbers", shown(view.storage.class)))
        })?;
        let key = view.storage.key;
        let bytes = match stored.get(key) {
            Some(bytes) => bytes.clone(),
            None => {
                let record = archive.record(&format!("data/{key}"))?;
                let record = record.ok_or_else(|| named(format!("found no record data/{}", shown(key))))?;
                // Within the file, whose length fits: it was opened.
                let (begin, end) = (record.begin as usize, record.end as usize);
                let bytes = Arc::new(Stored { begin, end, crc: record.crc, checked: OnceLock::new() });
                stored.insert(key, bytes.clone());
                bytes
            }
        };
        let entry = entry(view, dtype, bytes).map_err(named)?;
        entries.push((name.clone(), entry));
    }
    Ok(Contents { entries, notes: state.notes })
}

/// What a file is that begins with `first` and should be an archive.
fn not_an_archive(first: &[u8]) -> String {
    let convert = "convert it in Python: torch.save(torch.load(FILE, map_location=\"cpu\"), NEW)";
    // Ten bytes of a number: the magic of torch.save before PyTorch 1.6.
    if first.starts_with(b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46") {
        return format!("found the pickled form of before PyTorch 1.6, expected a zip archive; {convert}");
    }
    if first.starts_with(b"\x80") {
        return format!("found a bare pickle, expected a zip archive as torch.save writes it; {convert}");
    }
    "found neither a zip archive nor a pickle, expected a file of torch.save".into()
}

/// The dtype of a storage class.
fn dtype_of(class: &str) -> Option<Dtype> {
    Some(match class {
        "DoubleStorage" => Dtype::F64,
        "FloatStorage" => Dtype::F32,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::BF16,
        "LongStorage" => Dtype::I64,
        "IntStorage" => Dtype::I32,
        "ShortStorage" => Dtype::I16,
        "CharStorage" => Dtype::I8,
        "ByteStorage" => Dtype::U8,
        "BoolStorage" => Dtype::BOOL,
        _ => return None,
    })
}

/// The entry of a view, checked against its storage.
fn entry(view: &TensorView<'_>, dtype: Dtype, stored: Arc<Stored>) -> Result<Entry, String> {
    let TensorView { storage: Storage { key, count, .. }, offset, shape, strides } = view;
    let size = dtype.bitsize() / 8;
    let bytes = stored.end - stored.begin;
    if count.checked_mul(size) != Some(bytes) {
        let key = shown(key);
        return Err(format!(
            "found {bytes} bytes in data/{key}, expected those of {count} elements of {dtype}"
        ));
    }
    // A dimension of 0 does not excuse an absurd one beside it.
    let widest = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1)));
    let elements = if shape.contains(&0) { Some(0) } else { widest };
    let reach = shape
        .iter()
        .zip(strides)
        .try_fold(0usize, |sum, (&d, &stride)| sum.checked_add(d.saturating_sub(1).checked_mul(stride)?));
    let (Some(_), Some(elements), Some(reach)) = (widest, elements, reach) else {
        return Err(format!("found shape {shape:?} with strides {strides:?}, whose size overflows"));
    };
    if elements == 0 {
        let (begin, shape) = (stored.begin, shape.clone());
        return Ok(Entry { file: 0, dtype, shape, begin, end: begin, stored: None, strides: None });
    }
    let last = offset.checked_add(reach).filter(|last| last < count);
    // Reading copies: a small storage repeated without end would need memory that no file has.
    let Some(last) = last.filter(|_| elements <= *count) else {
        return Err(format!(
            "found shape {shape:?} with strides {strides:?} from element {offset} on, its storage has {count}"
        ));
    };
    let mut step = 1;
    let mut contiguous = true;
    for (&d, &stride) in shape.iter().zip(strides).rev() {
        contiguous &= d == 1 || stride == step;
        step *= d;
    }
    Ok(Entry {
        file: 0,
        dtype,
        shape: shape.clone(),
        begin: stored.begin + offset * size,
        end: stored.begin + (last + 1) * size,
        stored: Some(stored),
        strides: (!contiguous).then(|| Strides(strides.clone())),
    })
}

#[cfg(test)]
mod tests {
    use super::super::Checkpoint;
    use super::testing::{archive, file, global, pickle, state_dict, text, view, Py};
    use super::*;
    use crate::random::Random;
    use candle_core::{DType, Device, Tensor};

    /// A folder with one file of these bytes, and its path.
    fn written(bytes: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("net.pth");
        std::fs::write(&path, bytes).unwrap();
        (dir, path)
    }

    fn open(bytes: &[u8]) -> Result<Checkpoint> {
        let (_dir, path) = written(bytes);
        Checkpoint::open_with(&path, Pickle::Allowed)
    }

    #[track_caller]
    fn refused(bytes: &[u8], expected: &[&str]) {
        let opened = open(bytes);
        let read = |c: Checkpoint| c.names().try_for_each(|n| c.tensor(n, &Device::Cpu).map(|_| ()));
        let error = opened.and_then(read).expect_err("a lie must not be read");
        assert_eq!(error.exit_code(), 4, "{error}");
        let error = error.to_string();
        assert!(error.contains("net.pth") && !error.contains('\n'), "{error}");
        expected.iter().for_each(|part| assert!(error.contains(part), "{error:?} lacks {part:?}"));
    }

    fn list(checkpoint: &Checkpoint, name: &str) -> Vec<f64> {
        let tensor = checkpoint.tensor(name, &Device::Cpu).unwrap();
        tensor.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
    }

    /// Views of every kind into two storages: the floats 0 to 11, and three bytes.
    fn sample() -> (Py, Vec<Vec<u8>>) {
        let float = |name: &str, offset, shape: &[usize], strides: &[usize]| {
            (text(name), view("FloatStorage", 0, 12, offset, shape, strides))
        };
        let items = vec![
            float("whole", 0, &[3, 4], &[4, 1]),
            float("part", 4, &[2, 1, 2], &[2, 99, 1]),
            float("turned", 0, &[4, 3], &[1, 4]),
            float("column", 1, &[3], &[4]),
            float("scalar", 11, &[], &[]),
            float("none", 0, &[0, 5], &[5, 1]),
            float("same", 2, &[2, 3], &[0, 1]),
            (text("bytes"), view("CharStorage", 1, 3, 0, &[3], &[1])),
        ];
        let floats = (0..12).flat_map(|n| (n as f32).to_le_bytes()).collect();
        (Py::Ordered(items), vec![floats, vec![0x80, 0x7f, 0xff]])
    }

    const EXPECTED: [(&str, &[usize], &[f64]); 8] = [
        ("whole", &[3, 4], &[0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11.]),
        ("part", &[2, 1, 2], &[4., 5., 6., 7.]),
        ("turned", &[4, 3], &[0., 4., 8., 1., 5., 9., 2., 6., 10., 3., 7., 11.]),
        ("column", &[3], &[1., 5., 9.]),
        ("scalar", &[], &[11.]),
        ("none", &[0, 5], &[]),
        ("same", &[2, 3], &[2., 3., 4., 2., 3., 4.]),
        ("bytes", &[3], &[-128., 127., -1.]),
    ];

    #[test]
    fn views_are_read_as_pytorch_sees_them() {
        let (state, storages) = sample();
        let bytes = file(&state, &storages);
        let (dir, path) = written(&bytes);
        let mut mapped = Checkpoint::empty();
        mapped.add_pickled(&path, 0).unwrap();
        let by_folder = Checkpoint::open_with(dir.path(), Pickle::Allowed).unwrap();
        for checkpoint in [open(&bytes).unwrap(), by_folder, mapped] {
            assert_eq!(checkpoint.names().collect::<Vec<_>>(), EXPECTED.map(|(name, ..)| name));
            for (name, shape, values) in EXPECTED {
                assert_eq!(checkpoint.shape(name).unwrap(), shape, "{name}");
                assert_eq!(list(&checkpoint, name), values, "{name}");
            }
            assert_eq!((checkpoint.bytes("turned"), checkpoint.bytes("same")), (Some(48), Some(24)));
            assert_eq!(checkpoint.dtype("bytes"), Some(Dtype::I8));
        }
    }

    #[test]
    fn every_storage_class_has_its_dtype() {
        let classes: [(&str, Dtype, &[u8], f64); 10] = [
            ("DoubleStorage", Dtype::F64, &[0, 0, 0, 0, 0, 0, 4, 0xc0], -2.5),
            ("FloatStorage", Dtype::F32, &[0, 0, 0x20, 0xc0], -2.5),
            ("HalfStorage", Dtype::F16, &[0, 0xc1], -2.5),
            ("BFloat16Storage", Dtype::BF16, &[0x20, 0xc0], -2.5),
            ("LongStorage", Dtype::I64, &[0xfe, 255, 255, 255, 255, 255, 255, 255], -2.0),
            ("IntStorage", Dtype::I32, &[0xfe, 255, 255, 255], -2.0),
            ("ShortStorage", Dtype::I16, &[0xfe, 255], -2.0),
            ("CharStorage", Dtype::I8, &[0xfe], -2.0),
            ("ByteStorage", Dtype::U8, &[0xfe], 254.0),
            ("BoolStorage", Dtype::BOOL, &[1], 1.0),
        ];
        for (class, dtype, bytes, value) in classes {
            let state = Py::Dict(vec![(text("x"), view(class, 0, 1, 0, &[1], &[1]))]);
            let checkpoint = open(&file(&state, &[bytes.to_vec()])).unwrap();
            assert_eq!(checkpoint.dtype("x"), Some(dtype));
            assert_eq!(list(&checkpoint, "x"), [value], "{class}");
        }
        let state = Py::Dict(vec![(text("x"), view("ComplexFloatStorage", 0, 1, 0, &[1], &[1]))]);
        refused(&file(&state, &[vec![0; 8]]), &["tensor x", "ComplexFloatStorage"]);
    }

    #[test]
    fn without_leave_it_is_a_wrong_use() {
        let (state, storages) = sample();
        let (dir, path) = written(&file(&state, &storages));
        std::fs::copy(&path, dir.path().join("renamed")).unwrap();
        for path in [dir.path().to_path_buf(), path, dir.path().join("renamed")] {
            let error = Checkpoint::open(&path).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{error}");
            assert!(error.to_string().contains("--allow-pickle"), "{error}");
        }
        // Safetensors in the same folder need no leave.
        let tensor = Tensor::new(&[1f32], &Device::Cpu).unwrap();
        let safe = dir.path().join("a.safetensors");
        super::super::save(&safe, &[("a".into(), tensor)], &Default::default()).unwrap();
        assert_eq!(Checkpoint::open(dir.path()).unwrap().names().collect::<Vec<_>>(), ["a"]);
    }

    #[test]
    fn other_formats_are_named() {
        refused(b"", &["neither a zip archive nor a pickle"]);
        refused(b"GGUF0000", &["neither a zip archive nor a pickle"]);
        refused(
            b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.",
            &["before PyTorch 1.6", "torch.load"],
        );
        refused(b"\x80\x04N.", &["a bare pickle"]);
        let record = |name: &str, bytes: &[u8]| (name.to_string(), bytes.to_vec());
        let none = pickle(&Py::None);
        let script = [record("a/data.pkl", &none), record("a/constants.pkl", &none)];
        refused(&archive(&script, true), &["TorchScript"]);
        let big = [record("a/data.pkl", &none), record("a/byteorder", b"big")];
        refused(&archive(&big, true), &["byteorder", "found big"]);
        refused(&archive(&[record("word/document.xml", b"")], false), &["without one data.pkl"]);
        refused(&archive(&[record("a/data.pkl", &none)], false), &["neither a dict"]);
        let twice = [record("a/data.pkl", &none), record("a/data.pkl", &none)];
        refused(&archive(&twice, false), &["listed twice"]);
    }

    #[test]
    fn views_that_lie() {
        let refuse = |class, count, offset, shape: &[usize], strides: &[usize], expected: &[&str]| {
            let state = Py::Dict(vec![(text("w"), view(class, 0, count, offset, shape, strides))]);
            refused(&file(&state, &[vec![0; 16]]), &[&["tensor w"], expected].concat());
        };
        let huge = 1usize << 62;
        refuse("FloatStorage", 5, 0, &[1], &[1], &["found 16 bytes in data/0, expected those of 5"]);
        refuse("FloatStorage", huge, 0, &[1], &[1], &["found 16 bytes"]);
        refuse("FloatStorage", 4, 1, &[4], &[1], &["from element 1 on, its storage has 4"]);
        refuse("FloatStorage", 4, 0, &[2], &[4], &["its storage has 4"]);
        refuse("FloatStorage", 4, huge, &[1], &[1], &["its storage has 4"]);
        refuse("FloatStorage", 4, 0, &[huge, huge], &[0, 0], &["overflows"]);
        refuse("FloatStorage", 4, 0, &[0, huge, huge], &[1, 1, 1], &["overflows"]);
        refuse("FloatStorage", 4, 0, &[5, 1], &[huge, 1], &["overflows"]);
        // One element seen as a thousand million: memory that the file does not have.
        refuse("FloatStorage", 4, 0, &[1 << 30], &[0], &["its storage has 4"]);
        let absent = Py::Dict(vec![(text("w"), view("FloatStorage", 3, 1, 0, &[1], &[1]))]);
        refused(&file(&absent, &[]), &["tensor w", "no record data/3"]);
        let foreign = Py::Call(Box::new(global("torch._utils", "_rebuild_qtensor")), vec![Py::None]);
        refused(&file(&Py::Dict(vec![(text("w"), foreign)]), &[]), &["without a tensor"]);
    }

    /// Cut short anywhere it is an error; with one byte changed, an error or the same tensors.
    #[test]
    fn damage_is_found_or_does_no_harm() {
        let (state, storages) = sample();
        let whole = file(&state, &storages);
        for length in 0..whole.len() {
            assert!(open(&whole[..length]).is_err(), "cut at {length}");
        }
        let mut random = Random::new(7, "flips", &[]);
        let mut found = 0;
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 + (random.uniform() * 255.0) as u8;
            let Ok(checkpoint) = open(&bytes) else {
                found += 1;
                continue;
            };
            for (name, shape, values) in EXPECTED {
                let Ok(tensor) = checkpoint.tensor(name, &Device::Cpu) else {
                    found += 1;
                    continue;
                };
                assert_eq!(tensor.dims(), shape, "byte {at}: {name}");
                assert_eq!(list(&checkpoint, name), values, "byte {at}: {name}");
            }
        }
        assert!(found > whole.len() / 4, "{found} of {}", whole.len());
    }

    /// The pickle itself, whose checksum would hide what its own checks find: it may say other things,
    /// and must not bring the reader down.
    #[test]
    fn a_damaged_pickle_is_read_as_far_as_it_goes() {
        let (state, storages) = sample();
        let text = pickle(&state);
        let mut random = Random::new(8, "flips", &[]);
        let mut read = 0;
        for round in 0..4 * text.len() {
            let mut text = text.clone();
            for _ in 0..=round % 3 {
                let at = (random.uniform() * text.len() as f32) as usize % text.len();
                text[at] = (random.uniform() * 256.0) as u8;
            }
            let mut records = vec![("a/data.pkl".to_string(), text)];
            let data = storages.iter().enumerate();
            records.extend(data.map(|(key, bytes)| (format!("a/data/{key}"), bytes.clone())));
            if let Ok(checkpoint) = open(&archive(&records, round % 2 == 0)) {
                read += checkpoint.names().filter(|n| checkpoint.tensor(n, &Device::Cpu).is_ok()).count();
            }
        }
        assert!(read > 0);
    }

    #[test]
    fn states_of_whole_models_come_back() {
        let tensor = |n: f32| Tensor::new(&[[n, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap();
        let tensors = [("module.a".to_string(), tensor(1.0)), ("module.b".to_string(), tensor(9.0))];
        let (state, storages) = state_dict(&tensors);
        let top = Py::Dict(vec![(text("state_dict"), state), (text("epoch"), Py::Int(300))]);
        let checkpoint = open(&file(&top, &storages)).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(list(&checkpoint, "b"), [9.0, 2.0, 3.0, 4.0]);
        assert_eq!(checkpoint.notes(), [r#"tensors read from "state_dict", beside it epoch"#]);
    }
}
