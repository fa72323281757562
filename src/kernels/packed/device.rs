//! Packed weights on a CUDA device: uploaded and repacked once, then read by the kernels of kernels/packed*.cu.
//!
//! Which kernel takes a product is kernels/packed.cuh's table. Of f32, f16 and bf16 activations each kernel gives results
//! of their own type; the choice, and every sum's order, follows from shapes alone.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, OnceLock};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute_enum as Attribute;
use candle_core::cuda_backend::{DeviceId, WrapErr};
use candle_core::{bail, CudaDevice, CudaStorage, DType, Layout, Result, Shape, Tensor};

use super::geometry::{Gemv, Slices, Tiles, Whole};
use super::rows::PackedRows;
use crate::kernels::cuda::{self, Launch, Place};
use crate::kernels::rows::with_last;
use crate::kernels::Levels;

/// Columns of activations (of f32 two a token) that `packed_gemv` takes at most.
const FEW: usize = 16;
/// Tokens of f16 or bf16 beyond which a weight is unpacked as a whole for cuBLAS. Products of f32 stay with the tensor
/// cores, which cuBLAS does not use for them.
const DENSE: usize = 512;
/// Tokens that the plain kernel takes, for groups that tiles do not have.
const PLAIN: usize = 16;
/// Bytes of scratch that are kept from one launch to the next.
const KEPT: usize = 64 << 20;
/// Threads of a block of most kernels here.
const THREADS: (usize, usize, usize) = (256, 1, 1);

/// A packed weight on a device.
#[derive(Debug)]
pub(super) struct OnDevice {
    rows: usize,
    cols: usize,
    levels: Levels,
    /// A weight is a step times its field and this.
    zero: f32,
    form: Form,
    /// Bytes of shared memory that a block may have.
    shared: usize,
}

#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // one of each weight
enum Form {
    Tiled(Tiled),
    /// As it comes: `bits` a code, `group` columns a step.
    Plain {
        codes: CudaStorage,
        step: CudaStorage,
        bits: usize,
        group: usize,
    },
}

#[derive(Debug)]
struct Tiled {
    tiles: Tiles,
    words: CudaStorage,
    sets: CudaStorage,
    /// A power of two that brings the largest step to at most 1.
    lift: f32,
    /// What one of the whole numbers of each row is worth, where a row has one step.
    unit: Option<CudaStorage>,
    /// Launches of `packed_gemv` by columns of activations.
    few: [OnceLock<Option<Gemv>>; FEW],
}

/// Rows by number, where they are given.
pub(super) struct Ids {
    /// `count` numbers of u32, or i64.
    pub place: Place,
    pub dtype: DType,
    pub count: usize,
}

/// How activations are codes.
pub(super) struct Codes<'a> {
    /// Whether they are still to be rounded.
    pub rounds: bool,
    pub lo: i32,
    pub hi: i32,
    /// Token `t` has the step `t mod len`.
    pub step: &'a Tensor,
    /// Added before rounding, along a row.
    pub shift: Option<&'a Tensor>,
    /// Added to the result, along a row of it.
    pub bias: Option<&'a Tensor>,
}

/// Columns of the right operand that an activation is.
fn parts(dtype: DType) -> usize {
    if dtype == DType::F32 {
        2
    } else {
        1
    }
}

/// The power of two that brings the largest of the steps to at most 1, within what leaves room on both sides.
fn lift(step: &[f32]) -> f32 {
    let most = step.iter().fold(0f32, |most, &s| if s.is_finite() { most.max(s) } else { most });
    if most == 0.0 {
        return 1.0;
    }
    2f32.powi((-f64::from(most).log2().ceil() as i32).clamp(-64, 96))
}

impl OnDevice {
    /// Uploads the codes and steps and brings them into the kernels' layout where there is one.
    pub fn new(device: &CudaDevice, rows: &PackedRows) -> Result<Self> {
        let (n, k, bits) = (rows.rows(), rows.cols, usize::from(rows.bits));
        let groups = rows.groups();
        let group = groups.width();
        if n * k == 0
            || rows.codes.len() != n * PackedRows::row_bytes(k, rows.bits)
            || !(1..=8).contains(&bits)
        {
            bail!("packed weight: found {} bytes of codes for [{n}, {k}] of {bits} bits", rows.codes.len());
        }
        let codes = device.storage_from_slice(&rows.codes[..])?;
        let step = device.storage_from_slice(&rows.step[..])?;
        let form = match Tiles::of(n, k, rows.bits, groups.group()) {
            None => Form::Plain { codes, step, bits, group },
            Some(tiles) => {
                let words = cuda::unwritten(device, tiles.words(), DType::U32)?;
                let launch = Launch::new(device, "packed", "packed_repack");
                let launch =
                    launch.place(cuda::start(&codes)).place(cuda::start(&words)).i64(n).i64(k).i32(bits);
                // SAFETY: codes has n canonical rows, as was checked; a thread for each word of words.
                unsafe { launch.run((tiles.words().div_ceil(256), 1, 1), THREADS, 0)? };
                let sets = cuda::unwritten(device, tiles.steps(), DType::F32)?;
                let launch = Launch::new(device, "packed", "packed_repack_steps");
                let launch = launch.place(cuda::start(&step)).place(cuda::start(&sets)).i64(n).i64(k);
                let launch = launch.i64(group).i64(tiles.pitch).i32(bits);
                // SAFETY: step has a number for each group of each row; a thread for each of sets.
                unsafe { launch.run((tiles.steps().div_ceil(256), 1, 1), THREADS, 0)? };
                let unit = match groups.group() {
                    Some(_) => None,
                    None => {
                        let unit: Vec<f32> = rows.step.iter().map(|step| step * rows.unit()).collect();
                        Some(device.storage_from_slice(&unit)?)
                    }
                };
                let (lift, few) = (lift(&rows.step), Default::default());
                Form::Tiled(Tiled { tiles, words, sets, lift, unit, few })
            }
        };
        let context = device.cuda_stream().context().clone();
        let shared = Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        Ok(OnDevice {
            rows: n,
            cols: k,
            levels: rows.levels,
            zero: rows.levels.lo as f32 + if rows.levels.half { 0.5 } else { 0.0 },
            form,
            shared: usize::try_from(context.attribute(shared).w()?).unwrap_or(0),
        })
    }

    /// The values of all rows, or of those with the given numbers; what is no row's number gives NaN.
    pub fn values(&self, device: &CudaDevice, dtype: DType, ids: Option<Ids>) -> Result<CudaStorage> {
        match ids {
            None => self.values_of(device, dtype, (0, self.rows), Place::NULL, 0),
            Some(ids) => {
                let kind = if ids.dtype == DType::U32 { 1 } else { 2 };
                self.values_of(device, dtype, (0, ids.count), ids.place, kind)
            }
        }
    }

    /// The values of `count` rows from `first` on.
    pub fn values_from(
        &self,
        device: &CudaDevice,
        dtype: DType,
        (first, count): (usize, usize),
    ) -> Result<CudaStorage> {
        self.values_of(device, dtype, (first, count), Place::NULL, 0)
    }

    fn values_of(
        &self,
        device: &CudaDevice,
        dtype: DType,
        (first, count): (usize, usize),
        place: Place,
        kind: usize,
    ) -> Result<CudaStorage> {
        let y = cuda::unwritten(device, (count, self.cols), dtype)?;
        let suffix = cuda::suffix("packed values", dtype)?;
        let (kernel, codes, steps, pitch, bits, each) = match &self.form {
            Form::Tiled(of) => ("packed_values", &of.words, &of.sets, of.tiles.pitch, of.tiles.bits, 8),
            Form::Plain { codes, step, bits, group } => {
                ("packed_gather", codes, step, *group, *bits, cuda::wide(dtype))
            }
        };
        let launch = Launch::new(device, "packed", format!("{kernel}_{suffix}"));
        let launch = launch.place(cuda::start(codes)).place(cuda::start(steps)).place(place);
        let launch = launch.place(cuda::start(&y)).i64(count).i64(self.rows).i64(self.cols).i64(pitch);
        let launch = launch.i32(bits).f32(self.zero).i32(kind).i64(first);
        let blocks = (count * self.cols.div_ceil(each)).div_ceil(256);
        // SAFETY: the two are the weight in the layout that the kernel reads, y has `count` rows, and there are as many
        // ids where there are any; a thread for each part of a row.
        unsafe { launch.run((blocks, 1, 1), THREADS, 0)? };
        Ok(y)
    }

    /// `x W^T` for x [.., cols].
    pub fn product(&self, x: &CudaStorage, xl: &Layout) -> Result<(CudaStorage, Shape)> {
        let tokens = xl.shape().elem_count() / self.cols;
        let shape = with_last(xl, self.rows);
        let y = match &self.form {
            Form::Plain { codes, step, bits, group } if tokens <= PLAIN => {
                let y = cuda::unwritten(x.device(), &shape, x.dtype())?;
                let suffix = cuda::suffix("packed matmul", x.dtype())?;
                let launch = Launch::new(x.device(), "packed", format!("packed_plain_{suffix}"));
                let launch = launch.place(cuda::start(codes)).place(cuda::start(step));
                let launch = launch.place(cuda::place("packed matmul", x, xl)?).place(cuda::start(&y));
                let launch = launch.i64(self.rows).i64(self.cols).i64(tokens).i64(*group);
                let grid = (self.rows.div_ceil(8), tokens.div_ceil(8), 1);
                // SAFETY: codes and step are the weight as it comes; x and y have rows for all tokens, which with those
                // of the weight the grid covers.
                unsafe { launch.i32(*bits).f32(self.zero).run(grid, THREADS, 0)? };
                Some(y)
            }
            Form::Plain { .. } => None,
            Form::Tiled(of) => self.tiled(of, x, xl, (tokens, &shape))?,
        };
        match y {
            Some(y) => Ok((y, shape)),
            None => Ok((self.dense(x, xl, false)?, shape)),
        }
    }

    /// The products on tensor cores; none where a dense one is better or the only one.
    fn tiled(
        &self,
        of: &Tiled,
        x: &CudaStorage,
        xl: &Layout,
        (tokens, shape): (usize, &Shape),
    ) -> Result<Option<CudaStorage>> {
        let (device, dtype) = (x.device(), x.dtype());
        let columns = tokens * parts(dtype);
        if columns <= FEW {
            let gemv = of.few[columns - 1].get_or_init(|| of.tiles.gemv(columns));
            // A kilobyte is the kernel's own.
            if let Some(gemv) = gemv.filter(|gemv| gemv.shared + 1024 <= self.shared) {
                let y = cuda::unwritten(device, shape, dtype)?;
                self.few(
                    of,
                    gemv,
                    cuda::place("packed matmul", x, xl)?,
                    (cuda::start(&y), tokens, dtype),
                    device,
                )?;
                return Ok(Some(y));
            }
        }
        if dtype != DType::F32 && tokens > DENSE {
            return Ok(None);
        }
        let Some(gemm) = of.tiles.gemm(columns, self.shared.saturating_sub(1024)) else { return Ok(None) };
        let y = cuda::unwritten(device, shape, dtype)?;
        self.many(of, gemm, cuda::place("packed matmul", x, xl)?, (cuda::start(&y), tokens, dtype), device)?;
        Ok(Some(y))
    }

    /// `packed_gemv`.
    fn few(
        &self,
        of: &Tiled,
        gemv: Gemv,
        x: Place,
        (y, tokens, dtype): (Place, usize, DType),
        device: &CudaDevice,
    ) -> Result<()> {
        let Gemv { n, split, slices, blocks, shared } = gemv;
        let suffix = cuda::suffix("packed matmul", dtype)?;
        let run = |partial: Place, tickets: Place| {
            let launch =
                Launch::new(device, "packed_gemv", format!("packed_gemv_w{}_n{n}_{suffix}", of.tiles.bits));
            let launch = launch.place(cuda::start(&of.words)).place(cuda::start(&of.sets)).place(x).place(y);
            let launch = launch.place(partial).place(tickets).i32(self.rows).i32(self.cols).i32(tokens);
            let launch = launch.i32(of.tiles.pitch).f32(self.zero).i32(split);
            // SAFETY: words and sets are the weight in tiles, x and y have rows for all tokens, of which n columns are
            // enough; the grid and its shared memory are those that the header asks for these sizes, and so are partial
            // and tickets where there are slices.
            unsafe { launch.run((blocks, slices, 1), THREADS, shared) }
        };
        if slices == 1 {
            return run(Place::NULL, Place::NULL);
        }
        Workspace::of(device, |space| {
            let tickets = space.tickets(device, blocks)?;
            let ([partial], _kept) = space.room(device, [slices * of.tiles.partial(tokens) * 4])?;
            run(partial, tickets)
        })
    }

    /// `packed_prepare` and `packed_gemm`.
    fn many(
        &self,
        of: &Tiled,
        gemm: Slices,
        x: Place,
        (y, tokens, dtype): (Place, usize, DType),
        device: &CudaDevice,
    ) -> Result<()> {
        let Slices { n, grid, shared } = gemm;
        let columns = tokens * parts(dtype);
        let stride = self.cols.next_multiple_of(8);
        // Halves are taken as they are where 16 bytes of a row can be read at once.
        let direct = dtype == DType::F16 && stride == self.cols && x.aligned(16);
        let halves = if direct { 0 } else { columns * stride * 2 };
        let partial = if grid.2 > 1 { grid.2 * of.tiles.partial(tokens) * 4 } else { 0 };
        Workspace::of(device, |space| {
            let tickets = if grid.2 > 1 { space.tickets(device, grid.0 * grid.1)? } else { Place::NULL };
            let sizes = [halves, if direct { 0 } else { tokens * 4 }, partial];
            let ([halves, powers, partial], _kept) = space.room(device, sizes)?;
            let left = match direct {
                true => x,
                false => {
                    prepare(device, dtype, (x, halves, powers), (tokens, self.cols, stride))?;
                    halves
                }
            };
            let kind = match dtype {
                DType::F32 => 0,
                DType::F16 => 1,
                _ => 2,
            };
            let launch = Launch::new(device, "packed_gemm", format!("packed_gemm_w{}_n{n}", of.tiles.bits));
            let launch = launch.place(cuda::start(&of.words)).place(cuda::start(&of.sets)).place(left);
            let launch = launch.place(powers).place(y).place(partial).place(tickets);
            let launch = launch.i32(self.rows).i32(self.cols).i32(columns).i32(stride).i32(of.tiles.pitch);
            // SAFETY: words and sets are the weight in tiles, `left` has `columns` rows of `stride` halves with a power
            // for each token, or is x itself without; y has rows for all tokens. The grid, its shared memory, partial
            // and tickets are those that the header asks for these sizes.
            unsafe { launch.f32(self.zero).i32(kind).run(grid, THREADS, shared) }
        })
    }

    /// `dy W` for dy [.., rows].
    pub fn product_back(&self, g: &CudaStorage, gl: &Layout) -> Result<(CudaStorage, Shape)> {
        let (device, dtype) = (g.device(), g.dtype());
        let tokens = gl.shape().elem_count() / self.rows;
        let shape = with_last(gl, self.cols);
        let back = match &self.form {
            Form::Tiled(of) if dtype == DType::F32 || tokens <= DENSE => {
                of.tiles.back(tokens, parts(dtype)).map(|back| (of, back))
            }
            _ => None,
        };
        let Some((of, Slices { grid, shared, .. })) = back else {
            return Ok((self.dense(g, gl, true)?, shape));
        };
        let dx = cuda::unwritten(device, &shape, dtype)?;
        let dy = cuda::place("packed matmul backward", g, gl)?;
        let partial = if grid.2 > 1 { grid.2 * tokens * self.cols * 4 } else { 0 };
        Workspace::of(device, |space| {
            let tickets = if grid.2 > 1 { space.tickets(device, grid.0 * grid.1)? } else { Place::NULL };
            let ([powers, partial], _kept) = space.room(device, [tokens * 4, partial])?;
            prepare(device, dtype, (dy, Place::NULL, powers), (tokens, self.rows, 0))?;
            let suffix = cuda::suffix("packed matmul backward", dtype)?;
            let launch =
                Launch::new(device, "packed_back", format!("packed_back_w{}_{suffix}", of.tiles.bits));
            let launch = launch.place(cuda::start(&of.words)).place(cuda::start(&of.sets)).place(dy);
            let launch = launch.place(powers).place(cuda::start(&dx)).place(partial).place(tickets);
            let launch = launch.i32(self.rows).i32(self.cols).i32(tokens).i32(of.tiles.pitch);
            // SAFETY: words and sets are the weight in tiles, dy and dx have rows for all tokens and powers a number. The
            // grid, its shared memory, partial and tickets are those that the header asks for these sizes.
            unsafe { launch.f32(self.zero).f32(of.lift).run(grid, THREADS, shared) }
        })?;
        Ok((dx, shape))
    }

    /// The product with the weight unpacked whole, or where `back` says so with its transpose.
    fn dense(&self, x: &CudaStorage, xl: &Layout, back: bool) -> Result<CudaStorage> {
        let (n, k) = (self.rows, self.cols);
        let w = self.values(x.device(), x.dtype(), None)?;
        let (from, to, wl) = match back {
            true => (n, k, Layout::contiguous((n, k))),
            false => (k, n, Layout::new(Shape::from((k, n)), vec![1, k], 0)),
        };
        let tokens = xl.shape().elem_count() / from;
        let xl = Layout::contiguous_with_offset((tokens, from), xl.start_offset());
        x.matmul(&w, (1, tokens, to, from), &xl, &wl)
    }

    /// Where [`OnDevice::codes_product`] takes so many tokens.
    fn whole(&self, device: &CudaDevice, tokens: usize) -> Result<Option<(&Tiled, &CudaStorage, Whole)>> {
        let Form::Tiled(of) = &self.form else { return Ok(None) };
        let Some(unit) = &of.unit else { return Ok(None) };
        let multiprocessors = cuda::multiprocessors(device)? as usize;
        Ok(of.tiles.whole(tokens, self.shared, multiprocessors).map(|whole| (of, unit, whole)))
    }

    /// Whether there is a product of whole numbers for so many tokens.
    pub fn takes_codes(&self, device: &CudaDevice, tokens: usize) -> Result<bool> {
        Ok(self.whole(device, tokens)?.is_some())
    }

    /// The product with x [.., cols] as codes; only where [`OnDevice::takes_codes`] says so, and
    /// [`PackedRows::takes_codes`].
    pub fn codes_product(
        &self,
        x: &CudaStorage,
        xl: &Layout,
        codes: &Codes<'_>,
    ) -> Result<(CudaStorage, Shape)> {
        let op = "packed codes matmul";
        let (device, dtype) = (x.device(), x.dtype());
        let tokens = xl.shape().elem_count() / self.cols;
        let Some((of, unit, Whole { n, grid, shared })) = self.whole(device, tokens)? else {
            bail!("{op}: found no product of whole numbers for {tokens} tokens of {} columns", self.cols)
        };
        let shape = with_last(xl, self.rows);
        let y = cuda::unwritten(device, &shape, dtype)?;
        let steps = codes.step.elem_count();
        let fits = |t: Option<&Tensor>, len: usize| {
            t.is_none_or(|t| t.elem_count() == len && t.dtype() == DType::F32)
        };
        if steps == 0
            || !fits(Some(codes.step), steps)
            || !fits(codes.shift, self.cols)
            || !fits(codes.bias, self.rows)
        {
            bail!("{op}: expected steps, shifts [{}] and a bias [{}] in F32", self.cols, self.rows)
        }
        let held = [Some(codes.step), codes.shift, codes.bias].map(|t| t.map(Tensor::storage_and_layout));
        let mut places = [Place::NULL; 3];
        for (place, held) in places.iter_mut().zip(&held) {
            if let Some((storage, layout)) = held {
                *place = cuda::place(op, cuda::storage(op, storage)?, layout)?;
            }
        }
        let [step, shift, bias] = places;
        let (lo, half) = (self.levels.lo, self.levels.half);
        let suffix = cuda::suffix(op, dtype)?;
        let launch =
            Launch::new(device, "packed_int8", format!("packed_int8_w{}_n{n}_{suffix}", of.tiles.bits));
        let launch = launch.place(cuda::start(&of.words)).place(cuda::start(unit)).place(bias);
        let launch = launch.place(cuda::place(op, x, xl)?).place(step).place(shift).place(cuda::start(&y));
        let launch =
            launch.i32(self.rows).i32(self.cols).i64(tokens).i32(steps).i32(usize::from(codes.rounds));
        let launch = launch.signed(codes.lo).signed(codes.hi).i32(usize::from(half));
        let launch = launch.signed(if half { 2 * lo + 1 } else { lo });
        // SAFETY: words are the weight in tiles with a unit for each row; x and y have rows for all tokens; steps, shifts
        // and bias have their lengths, as was checked; the grid and its shared memory are those that the header asks for.
        unsafe { launch.run((grid.0, grid.1, 1), THREADS, shared)? };
        Ok((y, shape))
    }
}

/// `packed_prepare`: the halves of x [tokens, cols], or none, and the power of two of each token.
fn prepare(
    device: &CudaDevice,
    dtype: DType,
    (x, halves, powers): (Place, Place, Place),
    (tokens, cols, stride): (usize, usize, usize),
) -> Result<()> {
    let suffix = cuda::suffix("packed matmul", dtype)?;
    let launch = Launch::new(device, "packed_gemm", format!("packed_prepare_{suffix}"));
    let launch = launch.place(x).place(halves).place(powers).i32(cols).i32(stride);
    // SAFETY: x has `tokens` rows of `cols`, halves, where they are wanted, rows of `stride` for each of their parts, and
    // powers a number for each; a block for each token.
    unsafe { launch.run((tokens, 1, 1), THREADS, 0) }
}

/// What launches on one device share, one after the other: counters that are zero between launches, and scratch.
struct Workspace {
    tickets: CudaStorage,
    count: usize,
    /// And its bytes.
    scratch: Option<(CudaStorage, usize)>,
}

static WORKSPACES: LazyLock<Mutex<HashMap<DeviceId, Workspace>>> = LazyLock::new(Mutex::default);

impl Workspace {
    /// Tickets that a device has from the start.
    const TICKETS: usize = 4096;

    /// Lends the workspace of a device. What is launched within has it for itself, as all is on one stream.
    fn of<R>(device: &CudaDevice, f: impl FnOnce(&mut Workspace) -> Result<R>) -> Result<R> {
        let mut all = WORKSPACES.lock().unwrap_or_else(|e| e.into_inner());
        let space = match all.entry(device.id()) {
            std::collections::hash_map::Entry::Occupied(found) => found.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => {
                let tickets = device.zeros_impl(&Shape::from(Self::TICKETS), DType::U32)?;
                place.insert(Workspace { tickets, count: Self::TICKETS, scratch: None })
            }
        };
        f(space)
    }

    /// At least `count` tickets.
    fn tickets(&mut self, device: &CudaDevice, count: usize) -> Result<Place> {
        if count > self.count {
            let count = count.next_power_of_two();
            self.tickets = device.zeros_impl(&Shape::from(count), DType::U32)?;
            self.count = count;
        }
        Ok(cuda::start(&self.tickets))
    }

    /// Places of so many bytes each, null for none, in scratch that is kept or, where it is large, comes along.
    fn room<const N: usize>(
        &mut self,
        device: &CudaDevice,
        bytes: [usize; N],
    ) -> Result<([Place; N], Option<CudaStorage>)> {
        let mut ends = [0; N];
        let mut total = 0usize;
        for (end, bytes) in ends.iter_mut().zip(bytes) {
            total += bytes.next_multiple_of(256);
            *end = total;
        }
        let mut places = [Place::NULL; N];
        if total == 0 {
            return Ok((places, None));
        }
        let large = match total > KEPT {
            true => Some(cuda::unwritten(device, total, DType::U8)?),
            false => None,
        };
        if large.is_none() && self.scratch.as_ref().is_none_or(|(_, bytes)| *bytes < total) {
            // Let go of first, so that the two are not there at once.
            self.scratch = None;
            let bytes = total.next_power_of_two();
            self.scratch = Some((cuda::unwritten(device, bytes, DType::U8)?, bytes));
        }
        let kept = self.scratch.as_ref().map(|(storage, _)| storage);
        let Some(storage) = large.as_ref().or(kept) else { bail!("packed matmul: found no scratch") };
        for ((place, end), bytes) in places.iter_mut().zip(ends).zip(bytes) {
            if bytes > 0 {
                *place = cuda::start(storage).at(end - bytes.next_multiple_of(256));
            }
        }
        Ok((places, large))
    }
}
