//! Opening a CUDA device, and its memory.

use candle_core::cuda_backend::cudarc::driver::sys::{self, CUmemPool_attribute_enum as Attribute};
use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaDevice, Device, Result};

/// CUDA device `ordinal`.
pub(crate) fn open(ordinal: usize) -> Result<Device> {
    // Not the stream of the calling thread, which candle takes by itself: on another thread that is another stream.
    let opened = Device::new_cuda_with_stream(ordinal)?;
    let device = opened.as_cuda_device()?;
    // SAFETY: all work is on the one stream of the device; where another copies to it, `transfer` orders the two.
    unsafe { device.disable_event_tracking() };
    if device.cuda_stream().context().has_async_alloc() {
        // What a step frees, the next one asks for again: it stays with the pool, not given back at every
        // synchronization.
        set(device, Attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX)?;
    }
    Ok(opened)
}

/// Bytes of the device that were in use at most, all at once, since it was opened; 0 where the
/// driver has no pool.
pub(crate) fn peak_bytes(device: &CudaDevice) -> Result<u64> {
    if !device.cuda_stream().context().has_async_alloc() {
        return Ok(0);
    }
    let mut value = 0u64;
    let pool = pool(device)?;
    // SAFETY: the attribute is an unsigned number of 64 bits, of a pool that lives as long as the device.
    unsafe {
        sys::cuMemPoolGetAttribute(pool, Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, (&raw mut value).cast())
            .result()
            .w()?;
    }
    Ok(value)
}

fn pool(device: &CudaDevice) -> Result<sys::CUmemoryPool> {
    let stream = device.cuda_stream();
    stream.context().bind_to_thread().w()?;
    let mut pool = std::ptr::null_mut();
    // SAFETY: the device is one that is open; `pool` takes the answer.
    unsafe { sys::cuDeviceGetDefaultMemPool(&raw mut pool, stream.context().cu_device()).result().w()? };
    Ok(pool)
}

fn set(device: &CudaDevice, attribute: Attribute, mut value: u64) -> Result<()> {
    let pool = pool(device)?;
    // SAFETY: the attributes that are set here are unsigned numbers of 64 bits.
    unsafe { sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut value).cast()).result().w() }
}
