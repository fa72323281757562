//! Work that is recorded once and then launched as a whole.

use candle_core::cuda_backend::cudarc::driver::{
    sys::{CUgraphInstantiate_flags as Flags, CUstreamCaptureMode as Mode},
    CudaGraph,
};
use candle_core::cuda_backend::WrapErr;
use candle_core::{Device, Result};

/// Launches and copies of one stream, and what they made: tensors whose values each launch writes anew.
pub(crate) struct Graph<R> {
    // Dropped in this order: what was made lies in memory that the graph owns.
    made: R,
    graph: CudaGraph,
}

// SAFETY: a graph is launched through the stream that it holds, whose context every call binds to the calling thread;
// the driver takes launches of different threads one after the other.
unsafe impl<R: Send> Send for Graph<R> {}

impl<R> std::fmt::Debug for Graph<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Graph")
    }
}

/// Runs `work` once as it is, so that what is made on first use is made: modules, workspaces, the shapes that candle's
/// kernels read.
pub(crate) fn warm<R, E: From<candle_core::Error>>(
    device: &Device,
    work: impl FnOnce() -> std::result::Result<R, E>,
) -> std::result::Result<R, E> {
    let _shapes = device.as_cuda_device()?.enable_cuda_graph_htod_cache();
    work()
}

impl<R> Graph<R> {
    /// Records what `work` launches, without running it. `work` must have run once before ([`warm`]), must read nothing
    /// back, and takes the device alone: what it reads of the host is read now and never again.
    pub(crate) fn record<E: From<candle_core::Error>>(
        device: &Device,
        work: impl FnOnce() -> std::result::Result<R, E>,
    ) -> std::result::Result<Self, E> {
        let cuda = device.as_cuda_device()?;
        let stream = cuda.cuda_stream();
        let _shapes = cuda.enable_cuda_graph_htod_cache();
        stream.begin_capture(Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
        let made = work();
        // Ended whatever came of it.
        let graph = stream.end_capture(Flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH).w();
        let made = made?;
        match graph? {
            Some(graph) => Ok(Graph { made, graph }),
            None => Err(candle_core::Error::Msg("cuda: nothing was recorded".into()).into()),
        }
    }

    /// Does all of it once more.
    pub(crate) fn launch(&self) -> Result<()> {
        self.graph.launch().w()
    }

    /// What it makes.
    pub(crate) fn made(&self) -> &R {
        &self.made
    }
}
