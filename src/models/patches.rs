//! The first layer of a vision model: patches of the image, each through one linear layer, which is a
//! convolution whose stride is its size (Dosovitskiy et al. 2021, eq. 1).

use candle_core::Tensor;

use super::attention::site;
use super::nn::{activations, Linear};
use crate::weights::{Granularity, Shifts, Signedness, Site, Tap, Weights};
use crate::{kernels, Error, On, Result};

/// The image: a step for each colour, shifts for each pixel.
const IMAGE: Site = Site { edge: true, ..site(Granularity::Token, Signedness::Data, Shifts::InOut) };

/// The patch embedding, with the tap of the image before it.
#[derive(Debug)]
pub struct PatchEmbedding {
    image: Tap,
    projection: Linear,
    image_size: (usize, usize),
    channels: usize,
    patch_size: usize,
}

impl PatchEmbedding {
    /// The layer called `name` (`vit.embeddings.patch_embeddings.projection`) for images of this size,
    /// which `patch_size` divides.
    pub fn new(
        weights: &Weights,
        name: &str,
        image_size: (usize, usize),
        channels: usize,
        patch_size: usize,
    ) -> Result<Self> {
        Ok(PatchEmbedding {
            image: weights.tap(Self::tap(name), IMAGE),
            projection: Linear::new(weights, name, true)?,
            image_size,
            channels,
            patch_size,
        })
    }

    /// The name of the tap of the layer called `name`.
    pub fn tap(name: &str) -> String {
        format!("{name}.input_quant")
    }

    /// The patches `[batch, patches, hidden]`, row by row, of `images [batch, channels, height, width]`.
    /// Another image size than the layer's is an error.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        let (batch, channels, height, width) = images.dims4().on("images")?;
        let (rows, cols) = self.image_size;
        if (channels, height, width) != (self.channels, rows, cols) {
            return Err(Error::Run(format!(
                "images: found {channels} x {height} x {width}, expected {} x {rows} x {cols}",
                self.channels
            )));
        }
        // A step for each colour and a shift for each pixel: [batch, colours, pixels].
        let flat = activations(images)?.reshape((batch, channels, height * width))?;
        let images = self.image.forward(&flat)?.tensor()?.reshape(images.shape())?;
        self.projection.forward_float(&kernels::patchify(&images, self.patch_size)?)
    }
}
