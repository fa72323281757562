//! Batches on their way to the device: through page-locked memory, on a stream of their own, so that one is copied while
//! the step before it is computed.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};

use candle_core::cuda_backend::cudarc::driver::{
    result, CudaEvent, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, PinnedHostSlice,
};
use candle_core::cuda_backend::WrapErr;
use candle_core::{bail, CudaDevice, CudaStorage, Device, Result, Shape, Storage, Tensor};

/// Below so many bytes the driver takes a copy of what it is given, and nobody waits.
const SMALL: usize = 64 << 10;

/// Batches that may be on their way at once.
const SLOTS: usize = 3;

/// Room for one batch: here, there, and when either is free.
struct Slot {
    here: PinnedHostSlice<u8>,
    there: CudaSlice<u8>,
    /// It has arrived: what is here may be written over.
    arrived: CudaEvent,
    /// It was taken: what is there may be written over.
    taken: CudaEvent,
}

struct Uploads {
    /// The stream of the copies.
    stream: Arc<CudaStream>,
    slots: Vec<Slot>,
    next: usize,
}

static UPLOADS: LazyLock<Mutex<HashMap<usize, Uploads>>> = LazyLock::new(Mutex::default);

impl Slot {
    fn of(bytes: usize, device: &CudaDevice) -> Result<Self> {
        let context = device.cuda_stream().context().clone();
        // SAFETY: bytes, of which every pattern is a value; they are written before they are copied.
        let (here, there) = unsafe { (context.alloc_pinned::<u8>(bytes).w()?, device.alloc::<u8>(bytes)?) };
        // The copies' stream must not meet memory that is only promised yet.
        device.cuda_stream().synchronize().w()?;
        let event = || context.new_event(None).w();
        Ok(Slot { here, there, arrived: event()?, taken: event()? })
    }
}

/// `values` as a tensor of `shape` on a CUDA device.
pub(crate) fn upload(values: &[f32], shape: &Shape, device: &Device) -> Result<Tensor> {
    let bytes = std::mem::size_of_val(values);
    if shape.elem_count() != values.len() {
        bail!("upload: expected {} values for {shape:?}, got {}", shape.elem_count(), values.len())
    }
    if bytes < SMALL {
        return Tensor::from_slice(values, shape, device);
    }
    let device = device.as_cuda_device()?;
    let compute = device.cuda_stream();
    compute.context().bind_to_thread().w()?;
    let key = Arc::as_ptr(compute.context()) as usize;
    let mut all = UPLOADS.lock().unwrap_or_else(|e| e.into_inner());
    let uploads = match all.entry(key) {
        std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
        std::collections::hash_map::Entry::Vacant(entry) => {
            entry.insert(Uploads { stream: compute.context().new_stream().w()?, slots: Vec::new(), next: 0 })
        }
    };
    let at = uploads.next % SLOTS;
    uploads.next += 1;
    if uploads.slots.len() <= at {
        uploads.slots.push(Slot::of(bytes, device)?);
    }
    let Some(slot) = uploads.slots.get_mut(at) else { bail!("upload: no slot {at}") };
    slot.arrived.synchronize().w()?;
    if slot.there.len() < bytes {
        slot.taken.synchronize().w()?;
        *slot = Slot::of(bytes, device)?;
    }
    // SAFETY: a slice of f32 seen as its bytes.
    let from = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), bytes) };
    slot.here.as_mut_slice().w()?[..bytes].copy_from_slice(from);
    let stream = &uploads.stream;
    stream.wait(&slot.taken).w()?;
    // SAFETY: every element is written by the copy below before anything reads it.
    let mut out = unsafe { device.alloc::<f32>(values.len())? };
    {
        let (there, _there) = slot.there.device_ptr_mut(stream);
        let here = &slot.here.as_slice().w()?[..bytes];
        // SAFETY: `here` is page-locked and stays until `arrived`, which is waited for before it is written again or
        // let go of; `there` has room for `bytes`.
        unsafe { result::memcpy_htod_async(there, here, stream.cu_stream()).w()? };
    }
    slot.arrived.record(stream).w()?;
    compute.wait(&slot.arrived).w()?;
    {
        let (there, _there) = slot.there.device_ptr(&compute);
        let (to, _to) = out.device_ptr_mut(&compute);
        // SAFETY: both have room for `bytes`, and the compute stream has waited for the copy.
        unsafe { result::memcpy_dtod_async(to, there, bytes, compute.cu_stream()).w()? };
    }
    slot.taken.record(&compute).w()?;
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(out, device.clone()));
    Ok(Tensor::from_storage(storage, shape.clone(), candle_core::op::BackpropOp::none(), false))
}
