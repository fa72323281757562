//! A small convolutional classifier, the network of CLASSP's vision experiment (classp.md 8): convolutions
//! with a ReLU behind each, a 2 x 2 pooling, channel dropout, a hidden layer with ReLU and dropout, and a
//! linear classifier.
//!
//! What is dropped of sample s in epoch e is a function of these and the seed alone: the same in any batch,
//! on any number of threads, after a resume.

use candle_core::Tensor;

use super::convnet_config::ConvConfig;
use super::drop_path::DropPath;
use super::nn::{finite, Linear};
use super::vision::VisionOutput;
use crate::kernels::{self, Convolution};
use crate::weights::{Weight, Weights};
use crate::{Error, On, Result};

/// Neither padded nor strided, as the network was published.
const PLAIN: Convolution = Convolution { stride: 1, padding: 0, relu: true };

/// `y = max(w * x + b, 0)`, `x [batch, height, width, channels]`.
#[derive(Debug)]
struct Conv {
    name: String,
    weight: Weight,
    bias: Weight,
}

impl Conv {
    fn new(weights: &Weights, name: String) -> Result<Self> {
        let weight = weights.get(&format!("{name}.weight"))?.clone();
        let bias = weights.get(&format!("{name}.bias"))?.clone();
        Ok(Conv { name, weight, bias })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (w, b) = (self.weight.tensor()?, self.bias.tensor()?.to_dtype(x.dtype())?);
        kernels::conv2d(x, &w.to_dtype(x.dtype())?, &b, PLAIN).on(&self.name)
    }
}

/// A convolutional classifier.
#[derive(Debug)]
pub struct ConvNet {
    config: ConvConfig,
    convs: Vec<Conv>,
    hidden: Linear,
    classifier: Linear,
}

impl ConvNet {
    /// Builds the model over `weights`: `conv.0.weight`, `conv.0.bias` and so on, `fc`, `classifier`.
    pub fn new(config: &ConvConfig, weights: &Weights) -> Result<Self> {
        config.check()?;
        Ok(ConvNet {
            convs: (0..config.widths.len())
                .map(|layer| Conv::new(weights, format!("conv.{layer}")))
                .collect::<Result<_>>()?,
            hidden: Linear::new(weights, "fc", true)?,
            classifier: Linear::new(weights, "classifier", true)?,
            config: config.clone(),
        })
    }

    /// The model's sizes.
    pub fn config(&self) -> &ConvConfig {
        &self.config
    }

    /// Runs the model on `images [batch, channels, height, width]`, normalised. Another image size than
    /// the model's is an error.
    pub fn forward(&self, images: &Tensor) -> Result<VisionOutput> {
        self.walk(images, None, &mut |_, _| Ok(()))
    }

    /// As [`ConvNet::forward`], in training: with dropout as `draws` draws it, whose own rate is for models
    /// with residual branches; without draws nothing is dropped.
    pub fn train(&self, images: &Tensor, draws: Option<&DropPath>) -> Result<VisionOutput> {
        self.walk(images, draws, &mut |_, _| Ok(()))
    }

    /// The first stage of the model whose output on `images` is not finite.
    pub fn not_finite(&self, images: &Tensor) -> Result<Option<String>> {
        let mut found = None;
        self.walk(images, None, &mut |stage, h| {
            if found.is_none() && !finite(h)? {
                found = Some(stage.to_string());
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// The forward pass, each stage's output shown to `see` under the stage's name.
    fn walk(
        &self,
        images: &Tensor,
        draws: Option<&DropPath>,
        see: &mut dyn FnMut(&str, &Tensor) -> Result<()>,
    ) -> Result<VisionOutput> {
        let (batch, channels, height, width) = images.dims4()?;
        if (channels, (height, width)) != (self.config.channels, self.config.image_size) {
            let (rows, columns) = self.config.image_size;
            return Err(Error::usage(format!(
                "found images of {channels} x {height} x {width}, the model takes {} x {rows} x {columns}",
                self.config.channels
            )));
        }
        let mut h = match channels {
            // One channel is first and last at once.
            1 => images.reshape((batch, height, width, 1))?,
            _ => images.permute((0, 2, 3, 1))?.contiguous()?,
        };
        for conv in &self.convs {
            h = conv.forward(&h)?;
            see(&conv.name, &h)?;
        }
        let (channel, element) = self.config.dropout;
        let mut h = kernels::max_pool2(&h).on("the pooling")?; // [batch, channels, rows, columns]
        if let Some(draws) = draws {
            h = draws.drop(&h, "channel dropout", channel, h.dim(1)?)?;
        }
        h = kernels::relu(&self.hidden.forward_float(&h.flatten_from(1)?)?)?;
        see("fc", &h)?;
        if let Some(draws) = draws {
            h = draws.drop(&h, "hidden dropout", element, self.config.hidden)?;
        }
        let class = self.classifier.forward_float(&h)?;
        see("the classifier", &class)?;
        Ok(VisionOutput { class, distillation: None })
    }
}
