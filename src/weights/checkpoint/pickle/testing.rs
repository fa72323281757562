//! Writes files as `torch.save` does, for tests: a pickle of protocol 2 in an archive of stored records.

use candle_core::{DType, Tensor};

/// A value to pickle.
#[derive(Clone, Debug)]
pub(crate) enum Py {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    Tuple(Vec<Py>),
    List(Vec<Py>),
    Dict(Vec<(Py, Py)>),
    /// An `OrderedDict`.
    Ordered(Vec<(Py, Py)>),
    Global(&'static str, &'static str),
    Call(Box<Py>, Vec<Py>),
    Persistent(Vec<Py>),
    /// An object and its state.
    Built(Box<Py>, Box<Py>),
}

pub(crate) fn text(text: &str) -> Py {
    Py::Text(text.to_string())
}

pub(crate) fn global(module: &'static str, name: &'static str) -> Py {
    Py::Global(module, name)
}

fn ints(values: &[usize]) -> Py {
    Py::Tuple(values.iter().map(|&v| Py::Int(v as i64)).collect())
}

/// A tensor that looks into the storage `key` of `count` elements.
pub(crate) fn view(
    class: &'static str,
    key: usize,
    count: usize,
    offset: usize,
    shape: &[usize],
    strides: &[usize],
) -> Py {
    let storage = Py::Persistent(vec![
        text("storage"),
        global("torch", class),
        text(&key.to_string()),
        text("cpu"),
        Py::Int(count as i64),
    ]);
    let hooks = Py::Ordered(Vec::new());
    let arguments = vec![storage, Py::Int(offset as i64), ints(shape), ints(strides), Py::Bool(false), hooks];
    Py::Call(Box::new(global("torch._utils", "_rebuild_tensor_v2")), arguments)
}

/// A value as a whole pickle of protocol 2.
pub(crate) fn pickle(value: &Py) -> Vec<u8> {
    let mut out = vec![0x80, 2];
    write(value, &mut out);
    out.push(b'.');
    out
}

fn write(value: &Py, out: &mut Vec<u8>) {
    match value {
        Py::None => out.push(b'N'),
        Py::Bool(flag) => out.push(if *flag { 0x88 } else { 0x89 }),
        Py::Int(n @ 0..=255) => out.extend([b'K', *n as u8]),
        Py::Int(n @ 256..=65_535) => {
            out.push(b'M');
            out.extend((*n as u16).to_le_bytes());
        }
        Py::Int(n) if i32::try_from(*n).is_ok() => {
            out.push(b'J');
            out.extend((*n as i32).to_le_bytes());
        }
        Py::Int(n) => {
            out.extend([0x8a, 8]);
            out.extend(n.to_le_bytes());
        }
        Py::Float(v) => {
            out.push(b'G');
            out.extend(v.to_be_bytes());
        }
        Py::Text(text) => {
            out.push(b'X');
            out.extend((text.len() as u32).to_le_bytes());
            out.extend(text.as_bytes());
        }
        Py::Tuple(parts) => {
            out.push(b'(');
            parts.iter().for_each(|part| write(part, out));
            out.push(b't');
        }
        Py::List(items) => {
            out.extend([b']', b'(']);
            items.iter().for_each(|item| write(item, out));
            out.push(b'e');
        }
        Py::Dict(items) => {
            out.push(b'}');
            set(items, out);
        }
        Py::Ordered(items) => {
            write(&global("collections", "OrderedDict"), out);
            out.extend([b')', b'R']);
            set(items, out);
        }
        Py::Global(module, name) => out.extend(format!("c{module}\n{name}\n").into_bytes()),
        Py::Call(callee, arguments) => {
            write(callee, out);
            write(&Py::Tuple(arguments.clone()), out);
            out.push(b'R');
        }
        Py::Persistent(id) => {
            write(&Py::Tuple(id.clone()), out);
            out.push(b'Q');
        }
        Py::Built(object, state) => {
            write(object, out);
            write(state, out);
            out.push(b'b');
        }
    }
}

fn set(items: &[(Py, Py)], out: &mut Vec<u8>) {
    if items.is_empty() {
        return;
    }
    out.push(b'(');
    for (key, value) in items {
        write(key, out);
        write(value, out);
    }
    out.push(b'u');
}

/// An archive of these records, with the 64-bit directory that PyTorch writes where `wide`.
pub(crate) fn archive(records: &[(String, Vec<u8>)], wide: bool) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, bytes) in records {
        let at = out.len() as u32;
        let mut crc = flate2::Crc::new();
        crc.update(bytes);
        let size = (bytes.len() as u32).to_le_bytes();
        let common = [&[0, 0, 0, 8, 0, 0, 0, 0, 0, 0][..], &crc.sum().to_le_bytes(), &size, &size].concat();
        // As PyTorch does, the bytes of each record begin at a multiple of 64.
        let start = out.len() + 30 + name.len();
        let padding = (start + 4).next_multiple_of(64) - start;
        let name_length = (name.len() as u16).to_le_bytes();
        out.extend(b"PK\x03\x04");
        out.extend(&common);
        out.extend(name_length);
        out.extend((padding as u16).to_le_bytes());
        out.extend(name.as_bytes());
        out.extend(b"FB");
        out.extend((padding as u16 - 4).to_le_bytes());
        out.resize(start + padding, b'Z');
        out.extend(bytes);
        directory.extend(b"PK\x01\x02\0\0");
        directory.extend(&common);
        directory.extend(name_length);
        directory.extend([0; 12]);
        directory.extend(at.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let (offset, size, count) = (out.len() as u64, directory.len() as u64, records.len() as u64);
    out.extend(&directory);
    if wide {
        let at = out.len() as u64;
        out.extend(b"PK\x06\x06");
        out.extend(44u64.to_le_bytes());
        out.extend([0; 12]);
        [count, count, size, offset].iter().for_each(|n| out.extend(n.to_le_bytes()));
        out.extend(b"PK\x06\x07\0\0\0\0");
        out.extend(at.to_le_bytes());
        out.extend(1u32.to_le_bytes());
    }
    out.extend(b"PK\x05\x06\0\0\0\0");
    [count, count].iter().for_each(|n| out.extend((*n as u16).to_le_bytes()));
    [size, offset].iter().for_each(|n| out.extend((*n as u32).to_le_bytes()));
    out.extend([0, 0]);
    out
}

/// The file of a value and the bytes of its storages.
pub(crate) fn file(value: &Py, storages: &[Vec<u8>]) -> Vec<u8> {
    let mut records = vec![
        ("archive/data.pkl".to_string(), pickle(value)),
        ("archive/byteorder".to_string(), b"little".to_vec()),
    ];
    let data = storages.iter().enumerate().map(|(key, bytes)| (format!("archive/data/{key}"), bytes.clone()));
    records.extend(data);
    records.push(("archive/version".to_string(), b"3\n".to_vec()));
    archive(&records, true)
}

/// The state_dict of f32 tensors, each in a storage of its own, and the storages.
pub(crate) fn state_dict(tensors: &[(String, Tensor)]) -> (Py, Vec<Vec<u8>>) {
    let (mut items, mut storages) = (Vec::new(), Vec::new());
    for (name, tensor) in tensors {
        assert_eq!(tensor.dtype(), DType::F32);
        let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let mut strides = vec![1; tensor.rank()];
        for dim in (1..tensor.rank()).rev() {
            strides[dim - 1] = strides[dim] * tensor.dims()[dim];
        }
        let view = view("FloatStorage", storages.len(), values.len(), 0, tensor.dims(), &strides);
        items.push((text(name), view));
        storages.push(values.iter().flat_map(|v| v.to_le_bytes()).collect());
    }
    (Py::Ordered(items), storages)
}
