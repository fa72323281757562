//! The stack machine of Python's pickle format (`pickletools` documents each opcode), over data alone:
//! a global is a name, a call of one that PyTorch uses to rebuild a tensor makes a [`TensorView`], and
//! a call of any other makes an [`Object::Opaque`]. Nothing is ever looked up or run.
//!
//! Every opcode takes at least one byte and adds at most one value, so that memory is bounded by the
//! length of the text; beside it there are limits on opcodes and on the stack.

use std::collections::HashMap;

/// The most opcodes that are read: those of about 150 000 tensors.
const MAX_OPCODES: usize = 1 << 22;
/// The most values on the stack: what `pickle` writes needs some thousands.
const MAX_STACK: usize = 1 << 20;

/// The most dimensions of a tensor.
const MAX_RANK: usize = 8;

/// A value: what is small by itself, the rest by its number in [`Heap`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(&'a str),
    /// Bytes, sets, large integers: nothing that a tensor is made of.
    Other,
    Object(usize),
}

/// What a value of more than one part is.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Object<'a> {
    Tuple(Vec<Value<'a>>),
    List(Vec<Value<'a>>),
    Dict(Vec<(Value<'a>, Value<'a>)>),
    /// The name of a class or function.
    Global(Global<'a>),
    Storage(Storage<'a>),
    Tensor(Box<TensorView<'a>>),
    /// What a call of this class or function would have made.
    Opaque(Global<'a>),
}

/// A class or function by name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Global<'a> {
    pub(super) module: &'a str,
    pub(super) name: &'a str,
}

/// The bytes that tensors look into.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Storage<'a> {
    /// The class that names the element type, as `FloatStorage`.
    pub(super) class: &'a str,
    /// The record's name under `data/`.
    pub(super) key: &'a str,
    /// Elements.
    pub(super) count: usize,
}

/// A tensor as PyTorch describes it: a strided view into a storage, in elements.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct TensorView<'a> {
    pub(super) storage: Storage<'a>,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
}

/// The objects of a pickle; they may hold each other in circles, which numbers do not mind.
#[derive(Debug, Default)]
pub(super) struct Heap<'a> {
    objects: Vec<Object<'a>>,
}

impl<'a> Heap<'a> {
    /// The object behind a value.
    pub(super) fn object(&self, value: Value<'a>) -> Option<&Object<'a>> {
        match value {
            Value::Object(number) => self.objects.get(number),
            _ => None,
        }
    }

    fn make(&mut self, object: Object<'a>) -> Value<'a> {
        self.objects.push(object);
        Value::Object(self.objects.len() - 1)
    }

    fn tuple(&self, value: Value<'a>) -> Option<&[Value<'a>]> {
        match self.object(value) {
            Some(Object::Tuple(values)) => Some(values),
            _ => None,
        }
    }
}

/// Reads a pickle: its objects and the value that it stands for. Errs with the byte and what was found
/// there.
pub(super) fn read(text: &[u8]) -> Result<(Heap<'_>, Value<'_>), String> {
    let mut machine = Machine {
        text,
        at: 0,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        heap: Heap::default(),
    };
    for _ in 0..MAX_OPCODES {
        let at = machine.at;
        let step = machine.step().map_err(|message| format!("byte {at}: {message}"))?;
        if let Some(value) = step {
            return Ok((machine.heap, value));
        }
    }
    Err(format!("found more than {MAX_OPCODES} opcodes"))
}

struct Machine<'a> {
    text: &'a [u8],
    at: usize,
    stack: Vec<Value<'a>>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    heap: Heap<'a>,
}

type Step<T> = std::result::Result<T, String>;

impl<'a> Machine<'a> {
    fn take(&mut self, count: u64) -> Step<&'a [u8]> {
        let left = self.text.len() - self.at;
        let count = usize::try_from(count).ok().filter(|&count| count <= left);
        let Some(count) = count else { return Err(format!("found {left} bytes to the end, expected more")) };
        let taken = &self.text[self.at..self.at + count];
        self.at += count;
        Ok(taken)
    }

    fn byte(&mut self) -> Step<u8> {
        Ok(self.take(1)?[0])
    }

    /// A little-endian number of `bytes` bytes, at most 8.
    fn number(&mut self, bytes: u64) -> Step<u64> {
        Ok(self.take(bytes)?.iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte)))
    }

    /// Text whose length stands before it, in `bytes` bytes.
    fn text(&mut self, bytes: u64) -> Step<&'a str> {
        let length = self.number(bytes)?;
        std::str::from_utf8(self.take(length)?).map_err(|_| "found text that is not UTF-8".to_string())
    }

    fn line(&mut self) -> Step<&'a str> {
        let rest = &self.text[self.at..];
        let end = rest.iter().position(|&b| b == b'\n').ok_or("found no end of the line")?;
        self.at += end + 1;
        std::str::from_utf8(&rest[..end]).map_err(|_| "found a line that is not UTF-8".to_string())
    }

    /// A two's complement number of any length: none where it does not fit 64 bits.
    fn long(&mut self, bytes: u64) -> Step<Value<'a>> {
        let digits = self.take(bytes)?;
        if digits.len() > 8 {
            return Ok(Value::Other);
        }
        let fill = if digits.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 };
        let mut whole = [fill; 8];
        whole[..digits.len()].copy_from_slice(digits);
        Ok(Value::Int(i64::from_le_bytes(whole)))
    }

    fn push(&mut self, value: Value<'a>) -> Step<Option<Value<'a>>> {
        if self.stack.len() >= MAX_STACK {
            return Err(format!("found more than {MAX_STACK} values on the stack"));
        }
        self.stack.push(value);
        Ok(None)
    }

    fn make(&mut self, object: Object<'a>) -> Step<Option<Value<'a>>> {
        let value = self.heap.make(object);
        self.push(value)
    }

    fn pop(&mut self) -> Step<Value<'a>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len() > floor {
            true => self.stack.pop().ok_or_else(|| "found an empty stack".into()),
            false => Err("found an empty stack, expected a value".into()),
        }
    }

    fn top(&self) -> Step<Value<'a>> {
        self.stack.last().copied().ok_or_else(|| "found an empty stack, expected a value".into())
    }

    /// The values above the last mark.
    fn pop_mark(&mut self) -> Step<Vec<Value<'a>>> {
        let mark = self.marks.pop().ok_or("found no mark on the stack, expected one")?;
        Ok(self.stack.split_off(mark))
    }

    fn tuple(&mut self, count: usize) -> Step<Option<Value<'a>>> {
        let mut parts = Vec::with_capacity(count);
        for _ in 0..count {
            parts.push(self.pop()?);
        }
        parts.reverse();
        self.make(Object::Tuple(parts))
    }

    fn append(&mut self, values: Vec<Value<'a>>) -> Step<Option<Value<'a>>> {
        let Value::Object(list) = self.top()? else { return Err("found no list to append to".into()) };
        match &mut self.heap.objects[list] {
            Object::List(items) => items.extend(values),
            // A class of its own that is filled like a list.
            Object::Opaque(_) => {}
            _ => return Err("found no list to append to".into()),
        }
        Ok(None)
    }

    fn set(&mut self, values: Vec<Value<'a>>) -> Step<Option<Value<'a>>> {
        let Value::Object(dict) = self.top()? else { return Err("found no dict to set in".into()) };
        if !values.len().is_multiple_of(2) {
            return Err("found a key without a value".into());
        }
        match &mut self.heap.objects[dict] {
            Object::Dict(items) => items.extend(values.chunks_exact(2).map(|pair| (pair[0], pair[1]))),
            Object::Opaque(_) => {}
            _ => return Err("found no dict to set in".into()),
        }
        Ok(None)
    }

    fn put(&mut self, slot: u64) -> Step<Option<Value<'a>>> {
        let value = self.top()?;
        self.memo.insert(slot as u32, value);
        Ok(None)
    }

    fn get(&mut self, slot: u64) -> Step<Option<Value<'a>>> {
        let value = self.memo.get(&(slot as u32)).copied();
        self.push(value.ok_or_else(|| format!("found no value under {slot}"))?)
    }

    /// One opcode; the value of the whole where it was the last.
    fn step(&mut self) -> Step<Option<Value<'a>>> {
        match self.byte()? {
            0x80 => match self.byte()? {
                2..=5 => Ok(None),
                protocol => Err(format!("found pickle protocol {protocol}, expected 2 to 5")),
            },
            0x95 => self.take(8).map(|_| None), // FRAME
            b'.' => {
                let value = self.pop()?;
                Ok(Some(value))
            }
            b'(' => {
                // As bounded as the stack.
                if self.marks.len() >= MAX_STACK {
                    return Err(format!("found more than {MAX_STACK} marks"));
                }
                self.marks.push(self.stack.len());
                Ok(None)
            }
            b'0' => self.pop().map(|_| None),
            b'1' => self.pop_mark().map(|_| None),
            b'2' => {
                let value = self.top()?;
                self.push(value)
            }
            b'N' => self.push(Value::None),
            0x88 => self.push(Value::Bool(true)),
            0x89 => self.push(Value::Bool(false)),
            b'J' => {
                let number = self.number(4)? as u32 as i32;
                self.push(Value::Int(number.into()))
            }
            b'K' => {
                let number = self.number(1)?;
                self.push(Value::Int(number as i64))
            }
            b'M' => {
                let number = self.number(2)?;
                self.push(Value::Int(number as i64))
            }
            0x8a => {
                let length = self.number(1)?;
                let value = self.long(length)?;
                self.push(value)
            }
            0x8b => {
                let length = self.number(4)?;
                let value = self.long(length)?;
                self.push(value)
            }
            b'G' => {
                let bits = self.number(8)?.swap_bytes();
                self.push(Value::Float(f64::from_bits(bits)))
            }
            b'X' => {
                let text = self.text(4)?;
                self.push(Value::Text(text))
            }
            0x8c => {
                let text = self.text(1)?;
                self.push(Value::Text(text))
            }
            0x8d => {
                let text = self.text(8)?;
                self.push(Value::Text(text))
            }
            // Bytes, in Python 2 also text.
            code @ (b'B' | b'T' | b'C' | b'U' | 0x8e | 0x96) => {
                let length = match code {
                    b'C' | b'U' => self.number(1)?,
                    b'B' | b'T' => self.number(4)?,
                    _ => self.number(8)?,
                };
                let bytes = self.take(length)?;
                self.push(match (code, std::str::from_utf8(bytes)) {
                    (b'T' | b'U', Ok(text)) => Value::Text(text),
                    _ => Value::Other,
                })
            }
            b']' => self.make(Object::List(Vec::new())),
            b'l' => {
                let items = self.pop_mark()?;
                self.make(Object::List(items))
            }
            b'a' => {
                let value = self.pop()?;
                self.append(vec![value])
            }
            b'e' => {
                let values = self.pop_mark()?;
                self.append(values)
            }
            b')' => self.make(Object::Tuple(Vec::new())),
            b't' => {
                let parts = self.pop_mark()?;
                self.make(Object::Tuple(parts))
            }
            code @ 0x85..=0x87 => self.tuple(usize::from(code - 0x84)),
            b'}' => self.make(Object::Dict(Vec::new())),
            b'd' => {
                let values = self.pop_mark()?;
                self.make(Object::Dict(Vec::new()))?;
                self.set(values)
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set(vec![key, value])
            }
            b'u' => {
                let values = self.pop_mark()?;
                self.set(values)
            }
            0x8f => self.push(Value::Other),
            0x90 => self.pop_mark().map(|_| None),
            0x91 => {
                self.pop_mark()?;
                self.push(Value::Other)
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.make(Object::Global(Global { module, name }))
            }
            0x93 => match (self.pop()?, self.pop()?) {
                (Value::Text(name), Value::Text(module)) => {
                    self.make(Object::Global(Global { module, name }))
                }
                _ => Err("found a global whose name is not text".into()),
            },
            b'R' | 0x81 => {
                let (arguments, callee) = (self.pop()?, self.pop()?);
                let value = self.call(callee, arguments)?;
                self.push(value)
            }
            0x92 => {
                let (_, arguments, callee) = (self.pop()?, self.pop()?, self.pop()?);
                let value = self.call(callee, arguments)?;
                self.push(value)
            }
            // The state of an object: what is beside the items of a dict is of no use here.
            b'b' => self.pop().map(|_| None),
            b'Q' => {
                let id = self.pop()?;
                let value = self.persistent(id);
                self.push(value)
            }
            b'q' => {
                let slot = self.number(1)?;
                self.put(slot)
            }
            b'r' => {
                let slot = self.number(4)?;
                self.put(slot)
            }
            0x94 => self.put(self.memo.len() as u64),
            b'h' => {
                let slot = self.number(1)?;
                self.get(slot)
            }
            b'j' => {
                let slot = self.number(4)?;
                self.get(slot)
            }
            code => Err(format!("found opcode 0x{code:02x}, expected one that torch.save writes")),
        }
    }

    /// `("storage", class, key, location, count)` as a storage; anything else is opaque.
    fn persistent(&mut self, id: Value<'a>) -> Value<'a> {
        let storage = match self.heap.tuple(id) {
            Some([Value::Text("storage"), class, Value::Text(key), _, Value::Int(count), ..]) => {
                match (self.heap.object(*class), usize::try_from(*count)) {
                    (Some(Object::Global(class)), Ok(count)) => {
                        Some(Storage { class: class.name, key, count })
                    }
                    _ => None,
                }
            }
            _ => None,
        };
        match storage {
            Some(storage) => self.heap.make(Object::Storage(storage)),
            None => Value::Other,
        }
    }

    /// What a call would have made, told from the names alone.
    fn call(&mut self, callee: Value<'a>, arguments: Value<'a>) -> Step<Value<'a>> {
        let global = match self.heap.object(callee) {
            Some(Object::Global(global)) => *global,
            Some(Object::Opaque(global)) => return Ok(self.heap.make(Object::Opaque(*global))),
            _ => return Err("found a call of what is not a class or function".into()),
        };
        let Some(given) = self.heap.tuple(arguments) else {
            return Err(format!("found a call of {}.{} without a tuple", global.module, global.name));
        };
        let object = match (global.module, global.name) {
            // What they hold is set afterwards; Python 2, which gave it here, never wrote this format.
            ("collections", "OrderedDict" | "defaultdict") => Object::Dict(Vec::new()),
            ("torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor") => match self.tensor(given)? {
                Some(view) => Object::Tensor(Box::new(view)),
                None => Object::Opaque(global),
            },
            ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => {
                return Ok(given.first().copied().unwrap_or(Value::None));
            }
            _ => Object::Opaque(global),
        };
        Ok(self.heap.make(object))
    }

    /// `(storage, offset, shape, strides, …)`; none where the storage is of a kind unknown here.
    fn tensor(&self, given: &[Value<'a>]) -> Step<Option<TensorView<'a>>> {
        let [storage, offset, shape, strides, ..] = given else {
            return Err(format!("found a tensor of {} arguments, expected at least 4", given.len()));
        };
        let Some(Object::Storage(storage)) = self.heap.object(*storage) else { return Ok(None) };
        let size = |value: &Value<'a>| match value {
            Value::Int(n) => usize::try_from(*n).ok(),
            _ => None,
        };
        let sizes = |value: &Value<'a>| -> Option<Vec<usize>> {
            let parts = match self.heap.object(*value) {
                Some(Object::Tuple(parts) | Object::List(parts)) => parts,
                _ => return None,
            };
            // Each call copies them, however often one tuple is shared.
            if parts.len() > MAX_RANK {
                return None;
            }
            parts.iter().map(size).collect()
        };
        match (size(offset), sizes(shape), sizes(strides)) {
            (Some(offset), Some(shape), Some(strides)) if shape.len() == strides.len() => {
                Ok(Some(TensorView { storage: *storage, offset, shape, strides }))
            }
            _ => Err(format!(
                "found a tensor in storage {:?} whose offset, shape and strides are not numbers of at most {MAX_RANK} dimensions",
                storage.key
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{global, pickle, text, view, Py};
    use super::*;

    fn refused(text: &[u8], expected: &str) {
        let error = read(text).err().unwrap_or_else(|| panic!("{text:?} must not be read"));
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }

    #[test]
    fn values_are_what_they_were() {
        let items = vec![
            (text("flag"), Py::Bool(true)),
            (text("n"), Py::Tuple([0, 255, 65_535, -1, 1 << 40].map(Py::Int).to_vec())),
            (text("x"), Py::List(vec![Py::Float(-1.5), Py::None])),
        ];
        let bytes = pickle(&Py::Ordered(items));
        let (heap, whole) = read(&bytes).unwrap();
        let Some(Object::Dict(items)) = heap.object(whole) else { panic!("{whole:?}") };
        assert_eq!(items[0], (Value::Text("flag"), Value::Bool(true)));
        let numbers = [0, 255, 65_535, -1, 1 << 40].map(Value::Int).to_vec();
        assert_eq!(heap.object(items[1].1), Some(&Object::Tuple(numbers)));
        let list = vec![Value::Float(-1.5), Value::None];
        assert_eq!(heap.object(items[2].1), Some(&Object::List(list)));
        // By hand, of protocol 4: a memoized text used twice, in a pair.
        let (heap, pair) = read(b"\x80\x04\x95\x09\0\0\0\0\0\0\0\x8c\x02hi\x94h\0\x86\x94.").unwrap();
        assert_eq!(heap.object(pair), Some(&Object::Tuple(vec![Value::Text("hi"); 2])));
    }

    #[test]
    fn a_tensor_is_told_by_names_and_no_call_is_made() {
        let tensor = view("HalfStorage", 7, 12, 2, &[3, 2], &[1, 4]);
        let parameter = Py::Call(
            Box::new(global("torch._utils", "_rebuild_parameter")),
            vec![tensor, Py::Bool(true), Py::None],
        );
        let bytes = pickle(&parameter);
        let (heap, whole) = read(&bytes).unwrap();
        let storage = Storage { class: "HalfStorage", key: "7", count: 12 };
        let expected = TensorView { storage, offset: 2, shape: vec![3, 2], strides: vec![1, 4] };
        assert_eq!(heap.object(whole), Some(&Object::Tensor(Box::new(expected))));

        let system = Py::Call(Box::new(global("os", "system")), vec![text("true")]);
        let object = Py::Built(Box::new(system), Box::new(Py::Dict(vec![(text("a"), Py::Int(1))])));
        let bytes = pickle(&object);
        let (heap, whole) = read(&bytes).unwrap();
        let name = Global { module: "os", name: "system" };
        assert_eq!(heap.object(whole), Some(&Object::Opaque(name)));
    }

    #[test]
    fn lies_are_told_with_their_byte() {
        refused(b"", "byte 0: found 0 bytes to the end");
        refused(b"\x80\x02", "byte 2: found 0 bytes");
        refused(b"\x80\x01N.", "found pickle protocol 1");
        refused(b"\x80\x02i", "byte 2: found opcode 0x69");
        refused(b"X\xff\xff\xff\xffab", "found 2 bytes to the end");
        refused(b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffab", "found 2 bytes to the end");
        refused(b"\x8c\x01\xff", "not UTF-8");
        refused(b"\x85", "empty stack");
        // What stands below a mark is out of reach.
        refused(b"N(0", "empty stack");
        refused(b"t", "no mark");
        refused(b"h\x03", "no value under 3");
        refused(b"NNa", "no list");
        refused(b"}(Nu", "a key without a value");
        refused(b"N)R", "not a class or function");
        refused(b"cos\nsystem\nNR", "os.system without a tuple");
        refused(b"cos\nsystem", "no end of the line");
        refused(b"ctorch._utils\n_rebuild_tensor_v2\n)R", "0 arguments");
        refused(&[b'N'; MAX_STACK + 1], "values on the stack");
        refused(&[b'('; MAX_STACK + 1], "marks");
        refused(&b"N0".repeat(MAX_OPCODES / 2 + 1), "opcodes");
        // A shape of more dimensions than there are.
        let wide = view("FloatStorage", 0, 1, 0, &[1; 9], &[1; 9]);
        refused(&pickle(&wide), "at most 8 dimensions");
    }
}
