//! Devices: how they are opened, named and measured.

use candle_core::{Device, DeviceLocation, Shape, Tensor};

#[cfg(not(feature = "cuda"))]
use crate::Error;
use crate::Result;

/// CUDA device `ordinal`. Errs where the program was built without CUDA or the device does not open.
#[cfg(feature = "cuda")]
pub fn cuda(ordinal: usize) -> Result<Device> {
    Ok(crate::kernels::cuda::open(ordinal)?)
}

/// CUDA device `ordinal`. Errs where the program was built without CUDA or the device does not open.
#[cfg(not(feature = "cuda"))]
pub fn cuda(_ordinal: usize) -> Result<Device> {
    Err(Error::usage("--device cuda: this qtune was built without the cuda feature"))
}

/// CUDA device 0 where there is one, else the CPU.
pub fn best() -> Device {
    match cfg!(feature = "cuda") {
        true => cuda(0).unwrap_or(Device::Cpu),
        false => Device::Cpu,
    }
}

/// A device as summary.json calls it: `cpu`, `cuda:0`.
pub fn name(device: &Device) -> String {
    match device.location() {
        DeviceLocation::Cpu => "cpu".into(),
        DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

/// Bytes of a CUDA device that were in use at most since it was opened; of the CPU nothing: its peak is the
/// process's.
#[cfg(feature = "cuda")]
pub fn peak_bytes(device: &Device) -> Option<u64> {
    crate::kernels::cuda::peak_bytes(device.as_cuda_device().ok()?).ok()
}

/// Bytes of a CUDA device that were in use at most since it was opened; of the CPU nothing: its peak is the
/// process's.
#[cfg(not(feature = "cuda"))]
pub fn peak_bytes(_device: &Device) -> Option<u64> {
    None
}

/// `values` as a tensor of `shape`. On the way to a CUDA device they go beside the work that is there already.
pub fn upload(values: Vec<f32>, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return Ok(crate::kernels::cuda::upload(&values, &shape, device)?);
    }
    Ok(Tensor::from_vec(values, shape, device)?)
}
