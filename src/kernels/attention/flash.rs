//! Attention on a CUDA device without its matrix of probabilities: launches of kernels/attention.cu and, in f32, of
//! kernels/attention_f32.cu, whose headers say what a block owns.
//!
//! Forward leaves the logarithms of the rows' sums of exponentials with the op, which lives as long as its node, and
//! backward makes the probabilities again from them.

use std::sync::{Arc, Mutex, OnceLock, Weak};

use crate::kernels::cpu;
use crate::kernels::cuda::{self, Launch, Place};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::DeviceId;
use candle_core::{
    bail, CpuStorage, CudaDevice, CudaStorage, CustomOp3, DType, Layout, Result, Shape, Tensor,
};

/// What is kept from forward to backward.
struct Left {
    /// `[batch, heads, queries]`, f32.
    lse: CudaStorage,
    starts: Option<Arc<CudaStorage>>,
}

/// What one forward pass leaves for backward passes over the same operands.
#[derive(Clone, Default)]
pub(super) struct Kept(Arc<OnceLock<Left>>);

/// Keys' first tokens that lie on a device, as long as somebody holds them here: the layers of a model share them.
struct Sent {
    of: Weak<[u32]>,
    device: DeviceId,
    there: Arc<CudaStorage>,
}

static SENT: Mutex<Vec<Sent>> = Mutex::new(Vec::new());

fn send(device: &CudaDevice, starts: &Arc<[u32]>) -> Result<Arc<CudaStorage>> {
    // What a panic may have left half-made is a missing entry.
    let mut sent = SENT.lock().unwrap_or_else(|e| e.into_inner());
    sent.retain(|sent| sent.of.strong_count() > 0);
    let own = |sent: &&Sent| std::ptr::addr_eq(sent.of.as_ptr(), Arc::as_ptr(starts));
    if let Some(found) = sent.iter().filter(own).find(|sent| sent.device == device.id()) {
        return Ok(found.there.clone());
    }
    let there = CudaStorage::wrap_cuda_slice(device.clone_htod(&**starts)?, device.clone());
    let there = Arc::new(there);
    sent.push(Sent { of: Arc::downgrade(starts), device: device.id(), there: there.clone() });
    Ok(there)
}

/// The sizes of tiles, as the kernels' headers list them.
struct Tiles {
    module: &'static str,
    /// Columns of a head with their padding.
    depth: usize,
    threads: usize,
    /// Queries of a block forward, and of one that makes dq.
    queries: (usize, usize),
    /// Keys of a block that makes dk and dv, and the blocks that share their columns.
    keys: (usize, usize),
    /// Queries and keys of a block that makes a bias's gradient.
    bias: (usize, usize),
    /// Bytes of shared memory: forward, dq, dk and dv, a bias's gradient.
    shared: [usize; 4],
}

/// The tiles for heads of `depth` columns; none where these are too many.
fn tiles(dtype: DType, depth: usize) -> Option<Tiles> {
    if dtype == DType::F32 {
        let depth = [32, 64, 128, 256].into_iter().find(|d| depth <= *d)?;
        let side = if depth <= 128 { 64 } else { 32 };
        let (tile, square) = (side * (depth + 4), side * (side + 4));
        let shared = [2 * tile + square, 3 * tile + square, 4 * tile + square, 4 * tile].map(|x| 4 * x);
        return Some(Tiles {
            module: "attention_f32",
            depth,
            threads: 256,
            queries: (side, side),
            keys: (side, 1),
            bias: (side, side),
            shared,
        });
    }
    let depth = [32, 64, 96, 128, 256].into_iter().find(|d| depth <= *d)?;
    let queries = (if depth <= 128 { 128 } else { 64 }, if depth <= 64 { 128 } else { 64 });
    let passing = if depth <= 64 { 64 } else { 32 };
    let rows = |count: usize| 2 * count * (depth + 8);
    let shared = [
        rows(queries.0 + 4 * passing),
        rows(2 * queries.1 + 4 * 32),
        rows(2 * 64 + 4 * 32) + 2 * 3 * 32 * 4,
        rows(2 * 64 + 2 * 32),
    ];
    Some(Tiles {
        module: "attention",
        depth,
        threads: 128,
        queries,
        keys: (64, depth.div_ceil(128)),
        bias: (64, 32),
        shared,
    })
}

/// Blocks that a bias's gradient is spread over, where the batch has so many: eight for each multiprocessor of a
/// large card. Part of the numerics.
pub(super) const BLOCKS: usize = 1056;

/// Which part of `turns` a block of a bias's gradient takes, and the number of parts, where one part has `blocks`.
pub(super) fn parts(turns: usize, blocks: usize) -> (usize, usize) {
    let each = turns.div_ceil(BLOCKS.div_ceil(blocks.max(1)).min(turns).max(1)).max(1);
    (each, turns.div_ceil(each))
}

/// One attention: `queries [batch, queries, heads * depth]` over `keys [batch, keys, groups * depth]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub batch: usize,
    pub heads: usize,
    pub groups: usize,
    pub queries: usize,
    pub keys: usize,
    pub depth: usize,
    /// Groups and rows of the bias, where there is one.
    pub bias: Option<(usize, usize)>,
    pub scale: f64,
}

impl Call {
    /// Whether there are kernels for it, and the device has the memory they share.
    pub fn runs(&self, device: &CudaDevice, dtype: DType) -> Result<bool> {
        // The largest logit is found before it is scaled.
        if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) || self.scale.is_nan() || self.scale <= 0.0
        {
            return Ok(false);
        }
        let Some(tiles) = tiles(dtype, self.depth) else { return Ok(false) };
        // Next to what is asked for lie a few kilobytes that a kernel declares.
        let most = tiles.shared.into_iter().max().unwrap_or(0) + (8 << 10);
        Ok(most <= cuda::shared_memory(device)?.max(48 << 10))
    }

    /// `struct Attention` of kernels/attention.cuh: eight `int`, then a `float`, four bytes each and nothing between.
    fn words(&self) -> Result<[u64; 5]> {
        let (bias_groups, bias_rows) = self.bias.unwrap_or((1, 1));
        let sizes = [
            self.batch,
            self.heads,
            self.groups,
            self.queries,
            self.keys,
            self.depth,
            bias_groups,
            bias_rows,
        ];
        let mut fields = [0u32; 10];
        let rows = self.batch * self.heads * self.queries;
        for (field, size) in fields.iter_mut().zip(sizes).chain([(&mut 0, rows)]) {
            let Ok(size) = i32::try_from(size) else {
                bail!("attention: a size of {size} is beyond 31 bits")
            };
            *field = size as u32;
        }
        fields[8] = (self.scale as f32).to_bits();
        let mut words = [0u64; 5];
        for (word, pair) in words.iter_mut().zip(fields.chunks_exact(2)) {
            // Of two fields the first lies lower.
            *word = u64::from(pair[0]) | u64::from(pair[1]) << 32;
        }
        Ok(words)
    }

    fn kernel<'a>(
        &self,
        device: &'a CudaDevice,
        tiles: &Tiles,
        name: &str,
        dtype: DType,
    ) -> Result<Launch<'a>> {
        let suffix = cuda::suffix("attention", dtype)?;
        Ok(Launch::new(device, tiles.module, format!("attention_{name}_d{}_{suffix}", tiles.depth)))
    }

    fn tiles(&self, dtype: DType) -> Result<Tiles> {
        match tiles(dtype, self.depth) {
            Some(tiles) => Ok(tiles),
            None => bail!("attention: expected heads of 256 columns or fewer, got {}", self.depth),
        }
    }

    /// The result, as `queries`; what backward needs is put into `kept`. With `starts` query t of entry b sees the
    /// keys from `starts[b * queries + t]` on up to its own, the last query standing at the last key, without them
    /// all keys.
    pub fn forward(
        &self,
        op: &str,
        [(q, ql), (k, kl), (v, vl)]: [(&CudaStorage, &Layout); 3],
        bias: Option<(&CudaStorage, &Layout)>,
        starts: Option<&Arc<[u32]>>,
        kept: &Kept,
    ) -> Result<(CudaStorage, Shape)> {
        let (device, dtype) = (q.device(), q.dtype());
        let tiles = self.tiles(dtype)?;
        let bias = bias.map(|(b, l)| cuda::place(op, b, l)).transpose()?;
        let starts = starts.map(|starts| send(device, starts)).transpose()?;
        let o = cuda::unwritten(device, ql.shape(), dtype)?;
        let lse = cuda::unwritten(device, self.batch * self.heads * self.queries, DType::F32)?;
        let launch = self
            .kernel(device, &tiles, "forward", dtype)?
            .place(cuda::place(op, q, ql)?)
            .place(cuda::place(op, k, kl)?)
            .place(cuda::place(op, v, vl)?)
            .maybe(bias)
            .maybe(starts.as_deref().map(cuda::start))
            .place(cuda::start(&o))
            .place(cuda::start(&lse))
            .structure(&self.words()?);
        let blocks = self.batch * self.heads * self.queries.div_ceil(tiles.queries.0);
        // SAFETY: the operands have the sizes that the struct says, which the op's public function checked, starts
        // are of keys that their queries see, o and lse have an element for each that is written.
        unsafe { launch.run((blocks, 1, 1), (tiles.threads, 1, 1), tiles.shared[0])? };
        if kept.0.set(Left { lse, starts }).is_err() {
            bail!("{op}: expected an op to run once")
        }
        Ok((o, ql.shape().clone()))
    }

    /// The gradients of q, k and v, and of the bias if it is `wanted`, views of one result.
    pub fn gradients(
        &self,
        [q, k, v]: [&Tensor; 3],
        bias: Option<&Tensor>,
        o: &Tensor,
        grad: &Tensor,
        (kept, wanted): (&Kept, bool),
    ) -> Result<[Option<Tensor>; 4]> {
        let op = Gradients {
            call: *self,
            bias: bias.cloned(),
            wanted,
            o: o.clone(),
            grad: grad.contiguous()?,
            kept: kept.clone(),
        };
        let packed = q.apply_op3_no_bwd(k, v, &op)?;
        let (nq, nk) = (q.elem_count(), k.elem_count());
        let at = nq + 2 * nk;
        Ok([
            Some(cpu::unpack(&packed, 0, q.shape())?),
            Some(cpu::unpack(&packed, nq, k.shape())?),
            Some(cpu::unpack(&packed, nq + nk, v.shape())?),
            bias.filter(|_| wanted).map(|bias| cpu::unpack(&packed, at, bias.shape())).transpose()?,
        ])
    }
}

/// (q, k, v) to dq, dk, dv and, if wanted, dbias in one flat result.
struct Gradients {
    call: Call,
    bias: Option<Tensor>,
    wanted: bool,
    o: Tensor,
    grad: Tensor,
    kept: Kept,
}

impl CustomOp3 for Gradients {
    fn name(&self) -> &'static str {
        "attention-grad"
    }

    fn cpu_fwd(
        &self,
        _q: &CpuStorage,
        _ql: &Layout,
        _k: &CpuStorage,
        _kl: &Layout,
        _v: &CpuStorage,
        _vl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("{}: expected tensors on the CUDA device", self.name())
    }

    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        ql: &Layout,
        k: &CudaStorage,
        kl: &Layout,
        v: &CudaStorage,
        vl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (name, call) = (self.name(), &self.call);
        let Some(left) = self.kept.0.get() else { bail!("{name}: expected a forward pass before it") };
        let (device, dtype) = (q.device(), q.dtype());
        let tiles = call.tiles(dtype)?;
        let within = |t: &Tensor| -> Result<Place> {
            let (storage, layout) = t.storage_and_layout();
            cuda::place(name, cuda::storage(name, &storage)?, layout)
        };
        let (o, g) = (within(&self.o)?, within(&self.grad)?);
        let bias = self.bias.as_ref().map(within).transpose()?;
        let starts = left.starts.as_deref().map(cuda::start);
        let (nq, nk) = (ql.shape().elem_count(), kl.shape().elem_count());
        let size = match (self.wanted, call.bias) {
            (true, Some((groups, rows))) => groups * call.heads * rows * call.keys,
            _ => 0,
        };
        let out = cuda::unwritten(device, nq + 2 * nk + size, dtype)?;
        let at = cuda::start(&out);
        let words = call.words()?;
        let (q, k, v) = (cuda::place(name, q, ql)?, cuda::place(name, k, kl)?, cuda::place(name, v, vl)?);
        // SAFETY, of all four launches: the sizes are those of the forward pass, whose results lse and o are; delta
        // has a number for each head of each query, out the elements of q, k, v and the bias in this order; blocks
        // are as the kernels' headers ask.
        let rows = call.batch * call.queries * call.heads;
        let delta = cuda::unwritten(device, rows, DType::F32)?;
        let suffix = cuda::suffix(name, dtype)?;
        let launch = Launch::new(device, tiles.module, format!("attention_delta_{suffix}"));
        let launch = launch.place(o).place(g).place(cuda::start(&delta)).structure(&words);
        let lanes = call.depth.div_ceil(cuda::wide(dtype)).next_power_of_two().min(32);
        // SAFETY: as above.
        unsafe { launch.run((rows.div_ceil(256 / lanes), 1, 1), (256, 1, 1), 0)? };
        let begin = |kernel: &str| -> Result<Launch> {
            let launch = call.kernel(device, &tiles, kernel, dtype)?;
            let launch = launch.place(q).place(k).place(v).maybe(bias).maybe(starts);
            Ok(launch.place(g).place(cuda::start(&left.lse)).place(cuda::start(&delta)))
        };
        let (threads, [_, for_q, for_kv, for_bias]) = ((tiles.threads, 1, 1), tiles.shared);
        let blocks = call.batch * call.heads * call.queries.div_ceil(tiles.queries.1);
        // SAFETY: as above.
        unsafe { begin("grad_q")?.place(at).structure(&words).run((blocks, 1, 1), threads, for_q)? };
        let launch = begin("grad_kv")?.place(at.at(nq)).place(at.at(nq + nk)).structure(&words);
        let blocks = call.batch * call.groups * call.keys.div_ceil(tiles.keys.0);
        // SAFETY: as above.
        unsafe { launch.run((blocks, tiles.keys.1, 1), threads, for_kv)? };
        if let (true, Some((groups, bias_rows))) = (size > 0, call.bias) {
            let down = call.queries.div_ceil(tiles.bias.0);
            let blocks = groups * call.heads * down * call.keys.div_ceil(tiles.bias.1);
            let (each, parts) = parts(call.batch / groups, blocks);
            // A bias of one row is summed over tiles of queries, too.
            let sums = if bias_rows > 1 { parts } else { parts * down };
            let partial = cuda::unwritten(device, sums * size, DType::F32)?;
            let launch = begin("grad_bias")?.place(cuda::start(&partial)).i32(each).structure(&words);
            // SAFETY: as above; partial has a bias for each part and, where it is summed over them, tile of queries.
            unsafe { launch.run((blocks, parts, 1), threads, for_bias)? };
            cuda::fold_columns(device, &partial, at.at(nq + 2 * nk), dtype, (sums, size))?;
        }
        let shape = Shape::from(nq + 2 * nk + size);
        Ok((out, shape))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tables of the headers of kernels/attention.cu and attention_f32.cu.
    #[test]
    fn shared_memory_is_what_the_headers_say() {
        let halves = [
            (32, [30720, 30720, 21248, 15360]),
            (64, [55296, 55296, 37632, 27648]),
            (96, [53248, 53248, 54016, 39936]),
            (128, [69632, 69632, 70400, 52224]),
            (256, [101376, 135168, 135936, 101376]),
        ];
        let floats = [
            (32, [35840, 45056, 54272, 36864]),
            (64, [52224, 69632, 87040, 69632]),
            (128, [84992, 118784, 152576, 135168]),
            (256, [71168, 104448, 137728, 133120]),
        ];
        for (dtype, table) in [(DType::BF16, &halves[..]), (DType::F32, &floats[..])] {
            for (depth, shared) in table {
                let found = tiles(dtype, *depth).unwrap();
                assert_eq!((found.depth, found.shared), (*depth, *shared), "{dtype:?}");
            }
            assert!(tiles(dtype, 257).is_none());
        }
    }

    #[test]
    fn the_struct_is_laid_out_by_words() {
        let call = Call {
            batch: 1,
            heads: 2,
            groups: 3,
            queries: 4,
            keys: 5,
            depth: 6,
            bias: Some((7, 8)),
            scale: 1.0,
        };
        let bytes: Vec<u8> = call.words().unwrap().into_iter().flat_map(u64::to_ne_bytes).collect();
        let fields: Vec<u32> =
            bytes.chunks_exact(4).map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect();
        assert_eq!(fields, [1, 2, 3, 4, 5, 6, 7, 8, 1f32.to_bits(), 0]);
        assert!(Call { keys: 1 << 31, ..call }.words().is_err());
    }

    #[test]
    fn parts_cover_all_turns() {
        for turns in [1, 2, 7, 64, 1000, 8192] {
            for blocks in [1, 6, 100, 1055, 1056, 5000] {
                let (each, parts) = parts(turns, blocks);
                assert!(each * parts >= turns && each * (parts - 1) < turns, "{turns} {blocks}");
                assert!(parts == 1 || parts * blocks < 2 * BLOCKS + blocks);
            }
        }
    }
}
