//! Devices: how they are opened, named and measured.

use candle_core::{Device, DeviceLocation, Shape, Tensor};

use crate::{Error, Result};

/// CUDA device `ordinal`. Errs where the program was built without CUDA or the device does not open.
#[cfg(feature = "cuda")]
pub fn cuda(ordinal: usize) -> Result<Device> {
    crate::kernels::cuda::open(ordinal).map_err(|error| {
        let error = error.to_string();
        Error::usage(format!("--device cuda:{ordinal}: {}", error.lines().next().unwrap_or_default()))
    })
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

/// Work on a CUDA device that was recorded once and is launched as a whole, without the host's share of each launch: a
/// CUDA graph.
///
/// ```no_run
/// # use candle_core::{DType, Tensor};
/// # fn main() -> qtune::Result<()> {
/// let device = qtune::device::cuda(0)?;
/// let x = Tensor::ones((8, 64), DType::BF16, &device)?;
/// let replay = qtune::device::Replay::record(&device, || Ok(qtune::kernels::gelu(&x)?))?;
/// replay.launch()?;
/// println!("{}", replay.made());
/// # Ok(())
/// # }
/// ```
#[cfg(feature = "cuda")]
pub struct Replay<'a, R> {
    // Dropped in this order: the graph reads what the work holds.
    graph: crate::kernels::cuda::Graph<R>,
    _work: Box<dyn FnMut() -> Result<R> + 'a>,
}

#[cfg(feature = "cuda")]
impl<'a, R> Replay<'a, R> {
    /// Takes `work` once as it is, so that what is made on first use is made, and once more to record what it launches;
    /// then keeps it, since a launch reads the tensors that it holds. `work` must read nothing back, and takes the device
    /// alone meanwhile; what it reads of the host is read now and never again. Errs where `device` is no CUDA device,
    /// where `work` errs, and where something in it cannot be recorded.
    pub fn record(device: &Device, work: impl FnMut() -> Result<R> + 'a) -> Result<Self> {
        let mut work: Box<dyn FnMut() -> Result<R> + 'a> = Box::new(work);
        drop(crate::kernels::cuda::warm(device, &mut work)?);
        let graph = crate::kernels::cuda::Graph::record(device, &mut work)?;
        Ok(Replay { graph, _work: work })
    }

    /// Does all of it once more, behind what was launched before; does not wait for it.
    pub fn launch(&self) -> Result<()> {
        Ok(self.graph.launch()?)
    }

    /// What the work gave: tensors whose values each launch writes anew, and the first launch writes first.
    pub fn made(&self) -> &R {
        self.graph.made()
    }
}

#[cfg(feature = "cuda")]
impl<R> std::fmt::Debug for Replay<'_, R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Replay")
    }
}
