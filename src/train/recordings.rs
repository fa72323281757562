//! Passes over batches of one size as CUDA graphs: launched as a whole, without the host's share of each launch.
//!
//! The first batch of a size is taken as it comes, so that what is made on first use is there; the second is recorded;
//! from then on batches are copied to where the recorded one lay. A pass that reads something of the host anew each time,
//! such as what stochastic depth leaves out, cannot be recorded: whoever has one has no [`Recordings`].

#[cfg(feature = "cuda")]
use std::collections::HashMap;
#[cfg(feature = "cuda")]
use std::sync::Mutex;

#[cfg(feature = "cuda")]
use candle_core::{Device, Tensor};

#[cfg(feature = "cuda")]
use super::{Classify, Figure, Pass};
#[cfg(feature = "cuda")]
use crate::kernels::cuda::{warm, Graph};
#[cfg(feature = "cuda")]
use crate::{data::Batch, weights::Param, Result};

/// The recorded passes of a task. Without CUDA nothing is recorded.
#[derive(Debug, Default)]
pub struct Recordings {
    #[cfg(feature = "cuda")]
    of: Mutex<HashMap<Size, Taken>>,
}

/// Samples of a batch, and whether their targets are soft.
#[cfg(feature = "cuda")]
type Size = (usize, bool);

/// What became of a size.
#[cfg(feature = "cuda")]
#[derive(Debug)]
enum Taken {
    /// It was taken once.
    Once,
    /// Where its batches go, and what follows.
    Recorded(Box<Recording>),
}

#[cfg(feature = "cuda")]
#[derive(Debug)]
struct Recording {
    images: Tensor,
    labels: Tensor,
    targets: Option<Tensor>,
    graph: Graph<Pass>,
}

#[cfg(feature = "cuda")]
impl Recordings {
    /// One pass of `task` over `batch`.
    pub(super) fn learn(
        &self,
        task: &Classify,
        batch: &Batch,
        params: &[Param],
        device: &Device,
    ) -> Result<Pass> {
        let size = (batch.labels.len(), batch.targets.is_some());
        let labels = Tensor::from_slice(&batch.labels, batch.labels.len(), device)?;
        let mut of = self.of.lock().unwrap_or_else(|e| e.into_inner());
        let recording = match of.remove(&size) {
            None => {
                let pass = warm(device, || {
                    task.pass(batch, (&batch.images, &labels, batch.targets.as_ref()), params)
                })?;
                of.insert(size, Taken::Once);
                return Ok(pass);
            }
            Some(Taken::Recorded(recording)) => {
                recording.images.slice_set(&batch.images.contiguous()?, 0, 0)?;
                recording.labels.slice_set(&labels, 0, 0)?;
                if let (Some(there), Some(targets)) = (&recording.targets, &batch.targets) {
                    there.slice_set(&targets.contiguous()?, 0, 0)?;
                }
                recording
            }
            Some(Taken::Once) => {
                let images = batch.images.copy()?;
                let targets = batch.targets.as_ref().map(Tensor::copy).transpose()?;
                let graph =
                    Graph::record(device, || task.pass(batch, (&images, &labels, targets.as_ref()), params))?;
                Box::new(Recording { images, labels, targets, graph })
            }
        };
        recording.graph.launch()?;
        let made = recording.graph.made();
        // The next launch writes over what this one made. Gradients are followed before it.
        let own = |figure: &Figure| -> Result<Figure> {
            Ok(match figure {
                Figure::There(scalar) => Figure::There(scalar.copy()?),
                known => known.clone(),
            })
        };
        let pass = Pass { loss: own(&made.loss)?, right: own(&made.right)?, grads: made.grads.clone() };
        of.insert(size, Taken::Recorded(recording));
        Ok(pass)
    }
}
