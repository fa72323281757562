//! Steps of the optimizers over all tensors at once (kernels/optim.cu).
//!
//! A step uploads one small table, of tensors and their factors; which blocks work on what follows from lengths alone
//! and stays on the device. Nothing is read back.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::op::BackpropOp;
use candle_core::{bail, CudaDevice, CudaStorage, DType, Result, Shape, Storage, Tensor};

use super::{place, start, storage, suffix, unwritten, Launch, Place};

/// Entries of a chunk, threads of a block, words of a tensor's span (CHUNK, THREADS, Span of the kernels).
const CHUNK: usize = 4096;
const THREADS: usize = 256;
const SPAN: usize = 8;

/// Words that a copy from ordinary memory may have without waiting for the device: 64 KiB.
const UPLOAD: usize = 8 << 10;

/// A tensor that a step moves, in f32, and what belongs to it, of its length and on its device.
pub(crate) struct Moved<'a> {
    /// The weight.
    pub weight: &'a Tensor,
    /// Its gradient: f32, f16 or bf16, as all others are.
    pub grad: &'a Tensor,
    /// What the rule keeps of it, in f32, as many as the rule has.
    pub state: [Option<&'a Tensor>; 2],
    /// Entries at 0 stay where they are.
    pub free: Option<&'a Tensor>,
}

/// A kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rule {
    /// Factors of 4 words, two moments.
    AdamW,
    /// Factors of 6 words, a sum; `whole`: some tensors are tested whole.
    Classp { whole: bool },
    /// Factors of 3 words, a momentum.
    Lion,
    /// Factors of 2 words, a velocity.
    Sgd,
    /// Factors of 2 words.
    SgdPlain,
}

impl Rule {
    /// The kernel, words of a tensor's factors, and of its states.
    fn of(self) -> (&'static str, usize, usize) {
        match self {
            Rule::AdamW => ("adamw", 4, 2),
            Rule::Classp { .. } => ("classp", 6, 1),
            Rule::Lion => ("lion", 3, 1),
            Rule::Sgd => ("sgd", 2, 1),
            Rule::SgdPlain => ("sgd_plain", 2, 0),
        }
    }
}

/// Two floats, rounded from f64, as a word of factors.
pub(crate) fn floats(low: f64, high: f64) -> u64 {
    integers((low as f32).to_bits(), (high as f32).to_bits())
}

/// Two numbers of 32 bits as a word of factors.
pub(crate) fn integers(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// What a step leaves on the device.
#[derive(Debug, Default)]
pub(crate) struct Left {
    /// f32 `[1 + tensors]`: the norm of all gradients, then of each.
    pub norms: Option<Tensor>,
    /// i64 `[tensors]`: entries that passed CLASSP's test.
    pub passed: Option<Tensor>,
}

/// The chunks of tensors of given lengths, (tensor, number within it), in device memory.
#[derive(Debug)]
struct Chunks {
    device: CudaDevice,
    lengths: Vec<usize>,
    table: CudaStorage,
}

/// Steps over many tensors, most often the same ones.
#[derive(Debug, Default)]
pub(crate) struct Together {
    chunks: Option<Chunks>,
    /// Where the last step wrote, from and to, as its tensors come: seen not to overlap.
    written: Vec<(u64, u64)>,
}

/// Tensors as the kernels see them.
struct Spans {
    words: Vec<u64>,
    lengths: Vec<usize>,
    chunks: usize,
}

impl Spans {
    fn of(count: usize) -> Self {
        Spans { words: Vec::with_capacity(SPAN * count), lengths: Vec::with_capacity(count), chunks: 0 }
    }

    /// Weight, gradient, two states, free entries and copy of a tensor.
    fn push(&mut self, places: [Place; 6], length: usize) {
        self.words.extend(places.map(Place::address));
        self.words.extend([length as u64, self.chunks as u64]);
        self.lengths.push(length);
        self.chunks += length.div_ceil(CHUNK);
    }
}

/// Where `length` contiguous elements of `dtype` lie on `device`.
fn find(what: &str, t: &Tensor, length: usize, dtype: DType, device: &CudaDevice) -> Result<Place> {
    let op = "optimizer";
    if t.elem_count() != length || t.dtype() != dtype {
        bail!(
            "{op}: expected {what} of {length} elements in {dtype:?}, got {} in {:?}",
            t.elem_count(),
            t.dtype()
        )
    }
    let (held, layout) = t.storage_and_layout();
    let held = storage(op, &held)?;
    if !held.device().same_device(device) {
        bail!("{op}: expected {what} on the device of the other tensors")
    }
    place(op, held, layout)
}

/// `words` on the device.
fn upload(device: &CudaDevice, words: &[u64]) -> Result<CudaStorage> {
    let words: Vec<i64> = words.iter().map(|&word| word as i64).collect();
    let mut to = unwritten(device, words.len().max(1), DType::I64)?;
    let slice = to.as_cuda_slice_mut::<i64>()?;
    for (i, part) in words.chunks(UPLOAD).enumerate() {
        let from = i * UPLOAD;
        device.memcpy_htod(part, &mut slice.slice_mut(from..from + part.len()))?;
    }
    Ok(to)
}

fn tensor(storage: CudaStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

impl Together {
    /// The table of chunks; of one tensor none is needed.
    fn table(&mut self, device: &CudaDevice, spans: &Spans) -> Result<Place> {
        if spans.lengths.len() == 1 {
            return Ok(Place::NULL);
        }
        if let Some(held) = &self.chunks {
            if held.lengths == spans.lengths && held.device.same_device(device) {
                return Ok(start(&held.table));
            }
        }
        let mut words = Vec::with_capacity(spans.chunks);
        for (tensor, length) in spans.lengths.iter().enumerate() {
            words.extend((0..length.div_ceil(CHUNK)).map(|number| integers(tensor as u32, number as u32)));
        }
        let table = upload(device, &words)?;
        let at = start(&table);
        self.chunks = Some(Chunks { device: device.clone(), lengths: spans.lengths.clone(), table });
        Ok(at)
    }

    /// Errs where two of the places that a step writes overlap.
    fn apart(&mut self, written: Vec<(u64, u64)>) -> Result<()> {
        if self.written != written {
            let mut sorted = written.clone();
            sorted.sort_unstable();
            if sorted.windows(2).any(|pair| pair[1].0 < pair[0].1) {
                bail!("optimizer: expected parameters and states that share no memory")
            }
            self.written = written;
        }
        Ok(())
    }

    /// One step of all of `moved`, of which there is one at least: `factors` are the words of each, one after another.
    /// With `clip` gradients are taken no longer than that (0: as they are), all together, and their norms are found;
    /// where the norm is not finite nothing moves.
    pub fn run(
        &mut self,
        rule: Rule,
        moved: &[Moved<'_>],
        factors: &[u64],
        clip: Option<f64>,
    ) -> Result<Left> {
        let (kernel, words, states) = rule.of();
        let count = moved.len();
        let Some(first) = moved.first() else { bail!("{kernel}: expected a tensor to move, got none") };
        if factors.len() != words * count {
            bail!("{kernel}: expected {words} words of factors for each tensor")
        }
        let device = first.weight.device().as_cuda_device()?.clone();
        let dtype = first.grad.dtype();
        let kind = suffix(kernel, dtype)?;
        // Held until everything is launched.
        let mut held = Vec::new();
        let mut written = Vec::with_capacity((1 + states) * count);
        let mut spans = Spans::of(count);
        for it in moved {
            let length = it.weight.elem_count();
            let mut places = [Place::NULL; 6];
            let mut writes = |place: Place| {
                if length > 0 {
                    written.push((place.address(), place.at(length).address()));
                }
            };
            places[0] = find("a weight", it.weight, length, DType::F32, &device)?;
            writes(places[0]);
            let grad = it.grad.contiguous()?;
            places[1] = find("a gradient", &grad, length, dtype, &device)?;
            held.push(grad);
            for (i, state) in it.state.iter().take(states).enumerate() {
                let Some(state) = state else { bail!("{kernel}: expected {states} states of each tensor") };
                places[2 + i] = find("a state", state, length, DType::F32, &device)?;
                writes(places[2 + i]);
            }
            if let Some(free) = it.free {
                let free = free.to_dtype(DType::F32)?.contiguous()?;
                places[4] = find("free entries", &free, length, DType::F32, &device)?;
                held.push(free);
            }
            spans.push(places, length);
        }
        self.apart(written)?;
        let table = self.table(&device, &spans)?;
        let chunks = spans.chunks;

        let one = spans.words.len() + factors.len();
        let mut tables = spans.words;
        tables.extend_from_slice(factors);
        tables.push(floats(1.0, 0.0));
        let tables = upload(&device, &tables)?;
        let spans_at = start(&tables);
        let factors_at = spans_at.at(SPAN * count);

        let room = |count: usize, dtype| unwritten(&device, count.max(1), dtype);
        let launch = |kernel: &str| Launch::new(&device, "optim", kernel.to_string());
        let block = (THREADS, 1, 1);
        let (mut left, mut scale) = (Left::default(), None);
        if let Some(clip) = clip {
            let (of_chunks, sums) = (room(chunks, DType::F64)?, room(count, DType::F64)?);
            let (norms, factor) = (room(1 + count, DType::F32)?, room(1, DType::F32)?);
            let squares = launch(&format!("squares_{kind}")).place(spans_at).place(table).i32(chunks);
            // SAFETY: spans are of gradients in this type, chunks of the spans, and there is a sum for each chunk.
            unsafe { squares.place(start(&of_chunks)).run((chunks, 1, 1), block, 0)? };
            self.sum_chunks(&device, spans_at, count, &of_chunks, &sums)?;
            let last = launch("clip").i32(count).place(start(&sums)).f64(clip).place(start(&norms));
            // SAFETY: a sum for each tensor, norms one more, and one factor; one block.
            unsafe { last.place(start(&factor)).run((1, 1, 1), (1024, 1, 1), 0)? };
            left.norms = Some(tensor(norms, 1 + count));
            scale = Some(factor);
        }
        let scale_at = scale.as_ref().map_or(spans_at.at(one), start);

        let step = launch(&format!("{kernel}_{kind}")).place(spans_at).place(factors_at).place(table);
        let step = step.i32(chunks).place(scale_at);
        let Rule::Classp { whole } = rule else {
            // SAFETY: `find` saw that what the spans name has their lengths and types, `apart` that nothing is
            // written twice; factors are of this rule and the scale is one float.
            unsafe { step.run((chunks, 1, 1), block, 0)? };
            return Ok(left);
        };
        let any = match whole {
            true => Some(device.zeros_impl(&Shape::from(count), DType::U32)?),
            false => None,
        };
        if let Some(any) = &any {
            let any_of = launch(&format!("classp_any_{kind}")).place(spans_at).place(table).i32(chunks);
            // SAFETY: as below; there is a number for each tensor, zeroed.
            unsafe { any_of.place(scale_at).place(start(any)).run((chunks, 1, 1), block, 0)? };
        }
        let (counts, passed) = (room(chunks, DType::U32)?, room(count, DType::I64)?);
        let step = step.maybe(any.as_ref().map(start)).place(start(&counts));
        // SAFETY: as above; there is a count for each chunk.
        unsafe { step.run((chunks, 1, 1), block, 0)? };
        self.count_chunks(&device, spans_at, count, &counts, &passed)?;
        left.passed = Some(tensor(passed, count));
        Ok(left)
    }

    fn sum_chunks(
        &self,
        device: &CudaDevice,
        spans: Place,
        count: usize,
        of_chunks: &CudaStorage,
        sums: &CudaStorage,
    ) -> Result<()> {
        let launch = Launch::new(device, "optim", "sum_chunks").place(spans).i32(count);
        let launch = launch.place(start(of_chunks)).place(start(sums));
        // SAFETY: the callers have an f64 for each chunk of the spans, and for each of them.
        unsafe { launch.run((count, 1, 1), (THREADS, 1, 1), 0) }
    }

    fn count_chunks(
        &self,
        device: &CudaDevice,
        spans: Place,
        count: usize,
        counts: &CudaStorage,
        sums: &CudaStorage,
    ) -> Result<()> {
        let launch = Launch::new(device, "optim", "classp_count").place(spans).i32(count);
        let launch = launch.place(start(counts)).place(start(sums));
        // SAFETY: the callers have a count of 32 bits for each chunk of the spans, and of 64 bits for each of them.
        unsafe { launch.run((count, 1, 1), (THREADS, 1, 1), 0) }
    }

    /// (total, entries above zero) of each of CLASSP's sums, in f32, on one device; read back.
    pub fn figures(&mut self, sums: &[&Tensor]) -> Result<Vec<(f64, usize)>> {
        let Some(first) = sums.first() else { return Ok(Vec::new()) };
        let device = first.device().as_cuda_device()?.clone();
        let mut spans = Spans::of(sums.len());
        for sum in sums {
            let mut places = [Place::NULL; 6];
            places[2] = find("a sum", sum, sum.elem_count(), DType::F32, &device)?;
            spans.push(places, sum.elem_count());
        }
        let (count, chunks) = (sums.len(), spans.chunks);
        let table = self.table(&device, &spans)?;
        let tables = upload(&device, &spans.words)?;
        let room = |count: usize, dtype| unwritten(&device, count.max(1), dtype);
        let (of_chunks, totals) = (room(chunks, DType::F64)?, room(count, DType::F64)?);
        let (counts, touched) = (room(chunks, DType::U32)?, room(count, DType::I64)?);
        let launch = Launch::new(&device, "optim", "classp_sums").place(start(&tables)).place(table);
        let launch = launch.i32(chunks).place(start(&of_chunks)).place(start(&counts));
        // SAFETY: `find` saw the sums, chunks are theirs, and there are a total and a count for each chunk.
        unsafe { launch.run((chunks, 1, 1), (THREADS, 1, 1), 0)? };
        self.sum_chunks(&device, start(&tables), count, &of_chunks, &totals)?;
        self.count_chunks(&device, start(&tables), count, &counts, &touched)?;
        let totals = tensor(totals, count).to_vec1::<f64>()?;
        let touched = tensor(touched, count).to_vec1::<i64>()?;
        Ok(totals.into_iter().zip(touched).map(|(total, touched)| (total, touched as usize)).collect())
    }
}
