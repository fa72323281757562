//! Launches of kernels/*.cu: modules, arguments, results.
//!
//! Everything runs on the one stream that candle's device has, so a launch sees what was launched before it, and
//! memory that is let go of is not given to others before the launches that use it are done.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, LazyLock, Mutex};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::cudarc::driver::{result, sys, CudaFunction, CudaModule, DevicePtr};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{bail, CudaDevice, CudaStorage, DType, Layout, Result, Shape};

mod columns;
mod device;
mod gemm;
mod graph;
mod oscillation;
mod product;
mod together;
mod transfer;
pub(in crate::kernels) use columns::{add_bias, column_sums, fold_columns, row_grid, Parts};
pub(crate) use device::{open, peak_bytes};
pub(in crate::kernels) use gemm::{gemm, product_into, product_of, tensor, Matrix, Operand};
pub(crate) use graph::{warm, Graph};
pub(crate) use oscillation::{History, HostHistory};
pub(in crate::kernels) use product::{product, Matrices};
pub(crate) use together::{floats, integers, Moved, Rule, Together};
pub(crate) use transfer::upload;

/// The image of one kernels/*.cu, for all architectures that it was compiled for.
struct Module {
    name: &'static str,
    image: &'static [u8],
}

/// What kernels/build.rs made.
static MODULES: &[Module] = include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// A loaded kernel, and how much shared memory it was allowed to ask for.
struct Loaded {
    function: CudaFunction,
    shared: u32,
}

/// The modules and kernels of one context, which they keep alive: its address stands for it.
#[derive(Default)]
struct Cache {
    modules: HashMap<(usize, &'static str), Arc<CudaModule>>,
    kernels: HashMap<(usize, &'static str, String), Loaded>,
    attributes: HashMap<(usize, i32), u32>,
}

static CACHE: LazyLock<Mutex<Cache>> = LazyLock::new(Mutex::default);

/// Shared memory that a block may ask for without being allowed more, in bytes.
const SHARED: u32 = 48 << 10;

impl Cache {
    fn kernel(
        &mut self,
        device: &CudaDevice,
        module: &'static str,
        name: &str,
        shared: u32,
    ) -> Result<sys::CUfunction> {
        let context = device.cuda_stream().context().clone();
        let at = Arc::as_ptr(&context) as usize;
        let key = (at, module, name.to_string());
        if !self.kernels.contains_key(&key) {
            let loaded = match self.modules.get(&(at, module)) {
                Some(loaded) => loaded.clone(),
                None => {
                    let Some(found) = MODULES.iter().find(|m| m.name == module) else {
                        bail!("cuda: no module {module} was compiled")
                    };
                    let loaded = context.load_module(Ptx::from_binary(found.image.to_vec())).w()?;
                    self.modules.insert((at, module), loaded.clone());
                    loaded
                }
            };
            let function = match loaded.load_function(name) {
                Ok(function) => function,
                Err(error) => bail!("cuda: kernels/{module}.cu has no {name}: {error}"),
            };
            self.kernels.insert(key.clone(), Loaded { function, shared: SHARED });
        }
        let Some(loaded) = self.kernels.get_mut(&key) else { bail!("cuda: {name} was not loaded") };
        if shared > loaded.shared {
            let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            loaded.function.set_attribute(most, shared as i32).w()?;
            loaded.shared = shared;
        }
        Ok(loaded.function.cu_function())
    }
}

fn cache() -> std::sync::MutexGuard<'static, Cache> {
    // What a panic may have left half-made is a missing entry.
    CACHE.lock().unwrap_or_else(|e| e.into_inner())
}

/// A number that the driver knows of a device.
fn attribute(device: &CudaDevice, which: sys::CUdevice_attribute_enum) -> Result<u32> {
    let context = device.cuda_stream().context().clone();
    let key = (Arc::as_ptr(&context) as usize, which as i32);
    if let Some(&value) = cache().attributes.get(&key) {
        return Ok(value);
    }
    let value = context.attribute(which).w()? as u32;
    cache().attributes.insert(key, value);
    Ok(value)
}

/// The number of multiprocessors of a device.
pub(super) fn multiprocessors(device: &CudaDevice) -> Result<u32> {
    let count = sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    Ok(attribute(device, count)?.max(1))
}

/// Bytes of shared memory that a block may be allowed to ask for.
pub(super) fn shared_memory(device: &CudaDevice) -> Result<usize> {
    let most = sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    Ok(attribute(device, most)? as usize)
}

/// How the kernels' names end for elements of a type.
pub(super) fn suffix(op: &str, dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::F16 => Ok("f16"),
        DType::BF16 => Ok("bf16"),
        other => bail!("{op}: expected f16, bf16 or f32 on the device, got {other:?}"),
    }
}

/// Where elements lie on a device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    address: sys::CUdeviceptr,
    size: usize,
}

impl Place {
    /// No place: what a kernel's header lets be null.
    pub const NULL: Place = Place { address: 0, size: 0 };

    /// The place `elements` further on.
    pub fn at(self, elements: usize) -> Place {
        Place { address: self.address + (elements * self.size) as u64, ..self }
    }

    /// Whether accesses of `bytes` may start here.
    pub fn aligned(self, bytes: u64) -> bool {
        self.address.is_multiple_of(bytes)
    }

    /// The address, for a struct that holds it.
    pub fn address(self) -> u64 {
        self.address
    }
}

/// The first element of a storage.
pub(super) fn start(storage: &CudaStorage) -> Place {
    macro_rules! address {
        ($($kind:ident),*) => {
            match &storage.slice {
                $(CudaStorageSlice::$kind(slice) => slice.device_ptr(slice.stream()).0,)*
            }
        };
    }
    let address = address!(U8, U32, I16, I32, I64, BF16, F16, F32, F64, F8E4M3, F6E2M3, F6E3M2, F4, F8E8M0);
    Place { address, size: storage.dtype().size_in_bytes() }
}

/// The first of the elements that a contiguous layout takes of a storage.
pub(super) fn place(op: &str, storage: &CudaStorage, layout: &Layout) -> Result<Place> {
    match layout.contiguous_offsets() {
        Some((from, _)) => Ok(start(storage).at(from)),
        None => bail!("{op}: expected contiguous elements, got strides {:?}", layout.stride()),
    }
}

/// The storage behind a tensor that an op carries along.
pub(super) fn storage<'a>(op: &str, storage: &'a candle_core::Storage) -> Result<&'a CudaStorage> {
    match storage {
        candle_core::Storage::Cuda(storage) => Ok(storage),
        _ => bail!("{op}: expected a tensor on the CUDA device"),
    }
}

/// Room for results: every element must be written before one is read.
pub(super) fn unwritten(device: &CudaDevice, shape: impl Into<Shape>, dtype: DType) -> Result<CudaStorage> {
    // SAFETY: elements are numbers, of which every bit pattern is a value; the callers, all in this room, launch a
    // kernel that writes them all.
    unsafe { device.alloc_uninit(&shape.into(), dtype) }
}

/// A kernel and its arguments, in the order in which it takes them.
#[must_use]
pub(super) struct Launch<'a> {
    device: &'a CudaDevice,
    module: &'static str,
    kernel: String,
    /// The arguments' bytes, each from a word of its own on.
    words: Vec<u64>,
    starts: Vec<usize>,
}

impl<'a> Launch<'a> {
    /// A launch of `kernel` of kernels/`module`.cu.
    pub fn new(device: &'a CudaDevice, module: &'static str, kernel: impl Into<String>) -> Self {
        Launch {
            device,
            module,
            kernel: kernel.into(),
            words: Vec::with_capacity(16),
            starts: Vec::with_capacity(16),
        }
    }

    fn word(mut self, word: u64) -> Self {
        self.starts.push(self.words.len());
        self.words.push(word);
        self
    }

    /// A pointer.
    pub fn place(self, place: Place) -> Self {
        self.word(place.address)
    }

    /// A pointer, or null.
    pub fn maybe(self, place: Option<Place>) -> Self {
        self.place(place.unwrap_or(Place::NULL))
    }

    /// An `int64_t`.
    pub fn i64(self, value: usize) -> Self {
        self.word(value as u64)
    }

    /// An `int` or `unsigned`: sizes that fit into 31 bits, which is checked.
    pub fn i32(mut self, value: usize) -> Self {
        // Remembered as something that the launch refuses.
        if value > i32::MAX as usize {
            self.kernel = format!("{}: a size of {value} is beyond 31 bits", self.kernel);
            self.module = "";
        }
        self.word(value as u64)
    }

    /// An `int` with a sign.
    pub fn signed(self, value: i32) -> Self {
        self.word(u64::from(value as u32))
    }

    /// A `uint32_t`, all of whose bits count.
    pub fn u32(self, value: u32) -> Self {
        self.word(u64::from(value))
    }

    /// A `uint64_t`.
    pub fn u64(self, value: u64) -> Self {
        self.word(value)
    }

    /// A `float`.
    pub fn f32(self, value: f32) -> Self {
        self.word(u64::from(value.to_bits()))
    }

    /// A `double`.
    pub fn f64(self, value: f64) -> Self {
        self.word(value.to_bits())
    }

    /// A struct, given by value: its bytes as the kernel's side lays them out, in whole words.
    pub fn structure(mut self, words: &[u64]) -> Self {
        self.starts.push(self.words.len());
        self.words.extend_from_slice(words);
        self
    }

    /// Launches it; of a grid without blocks nothing.
    ///
    /// # Safety
    /// The arguments must be those that the kernel's header asks for, in number, order and type, and its grid and
    /// block such that it stays within what they point to.
    pub unsafe fn run(
        mut self,
        grid: (usize, usize, usize),
        block: (usize, usize, usize),
        shared: usize,
    ) -> Result<()> {
        if grid.0 == 0 || grid.1 == 0 || grid.2 == 0 {
            return Ok(());
        }
        if self.module.is_empty() {
            bail!("cuda: {}", self.kernel)
        }
        if grid.0 > i32::MAX as usize || grid.1 > 65535 || grid.2 > 65535 {
            bail!("cuda: {}: a grid of {grid:?} blocks is too large", self.kernel)
        }
        let function = cache().kernel(self.device, self.module, &self.kernel, shared as u32)?;
        let stream = self.device.cuda_stream();
        stream.context().bind_to_thread().w()?;
        let words = self.words.as_mut_ptr();
        // SAFETY: each start is an index that was pushed with the words behind it.
        let mut arguments: Vec<*mut c_void> =
            self.starts.iter().map(|&at| unsafe { words.add(at) }.cast()).collect();
        let three = |(x, y, z): (usize, usize, usize)| (x as u32, y as u32, z as u32);
        // SAFETY: the function belongs to a module that the cache keeps; the arguments are the caller's contract.
        let launched = unsafe {
            result::launch_kernel(
                function,
                three(grid),
                three(block),
                shared as u32,
                stream.cu_stream(),
                &mut arguments,
            )
        };
        match launched {
            Ok(()) => Ok(()),
            Err(error) => bail!(
                "cuda: {} of kernels/{}.cu, grid {grid:?}, block {block:?}, {shared} bytes shared: {error}",
                self.kernel,
                self.module
            ),
        }
    }
}

/// The least multiple of 32 threads, 1024 at most, of which each takes `each` of a row's elements, and how many
/// rows share a block: four where 32 threads suffice (row.cuh).
pub(super) fn row_block(width: usize, each: usize) -> (usize, usize, usize) {
    let threads = width.div_ceil(each.max(1)).next_multiple_of(32).clamp(32, 1024);
    (threads, if threads == 32 { 4 } else { 1 }, 1)
}

/// Elements of 16 bytes.
pub(super) fn wide(dtype: DType) -> usize {
    16 / dtype.size_in_bytes().max(1)
}

/// `KERNEL(operands.., results.., count)` of kernels/activation.cu over `count` elements each.
pub(super) fn elementwise(
    device: &CudaDevice,
    kernel: &str,
    dtype: DType,
    places: &[Place],
    count: usize,
) -> Result<()> {
    let mut launch = Launch::new(device, "activation", format!("{kernel}_{}", suffix(kernel, dtype)?));
    for place in places {
        launch = launch.place(*place);
    }
    let blocks = count.div_ceil(256 * wide(dtype)).min(1 << 20);
    // SAFETY: the callers give places of `count` elements, which the kernel strides over with any grid.
    unsafe { launch.i64(count).run((blocks, 1, 1), (256, 1, 1), 0) }
}
