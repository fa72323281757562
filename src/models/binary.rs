//! A multi-layer perceptron whose weights are one bit each, and the fields that they are learned in.
//!
//! After C. Li, Z. Huang, W. Zou and H. Huang 2023, "Statistical mechanics of continual learning:
//! variational principle and mean-field potential", Physical Review E 108, 014309 (arXiv 2212.02846).
//!
//! # Weights and fields
//!
//! A weight `w` is 1 or -1 and has no gradient. What is learned is a field `θ` for each, that of the
//! distribution
//!
//! ```text
//! q(w) = exp(w θ) / (2 cosh θ)      E w = m = tanh θ      Var w = 1 - m^2
//! ```
//!
//! independent from weight to weight. The file holds `θ`, `[units, inputs]`, f32; the network that is used
//! (evaluated, exported) has `w = sign θ`, the most probable weights, one bit each. As in the paper there
//! are no biases and nothing else that is trained.
//!
//! # One layer
//!
//! `z_i = sum_j w_ij a_j / sqrt n` over `n` inputs is, by the central limit, Gaussian of
//!
//! ```text
//! mean      M_i = sum_j m_ij E a_j / sqrt n
//! variance  V_i = sum_j [(1 - m_ij^2) E a_j^2 + m_ij^2 Var a_j] / n
//! ```
//!
//! Both lines are exact for independent weights and inputs that are independent of each other; the Gaussian,
//! and that independence behind the first layer, are the approximation. No term of the variance is
//! negative, so a layer that has made up its mind loses nothing to cancellation.
//!
//! Hidden layers rectify, `a = max(z, 0)`, as in the paper. It draws one Gaussian `z` for each unit and sample
//! (local reparameterization); here both moments of `a` go on to the next layer in closed form
//! ([`kernels::rectified_moments`]). That makes the pass a function of the images alone: nothing to seed, to
//! resume or to average, and no noise in the gradient.
//!
//! Before it is rectified, a hidden layer is divided by its size, `r^2 = mean_i (M_i^2 + V_i)` over its units,
//! for each sample: `E z^2` summed over many units is its own expectation, so this is the division of the
//! signed network by `mean_i z_i^2` in both readings. The paper has none; without it the later layers
//! learn at the scale that the earlier ones happen to have, and more is forgotten.
//!
//! # What is minimised
//!
//! For each sample of label `y`, and logits of moments `M`, `V`, the expected log-likelihood from below
//! (Jensen, with `E exp z = exp(M + V / 2)`),
//!
//! ```text
//! E ln p(y) >= M_y - ln sum_k exp(M_k + V_k / 2)
//! ```
//!
//! and to that is added `KL(q || q_before) / N` over all weights, where `q_before` is the distribution that the
//! earlier tasks left behind and `N` the samples of this one ([`crate::continual::field`]). The divergence has
//! the gradient `(1 - m^2)(θ - θ_before)`, and that of the likelihood too carries `dm/dθ = 1 - m^2`: a weight
//! that an earlier task has made certain is moved little by a later one, an uncertain one freely.
//!
//! The paper's programs take the same two terms, with two differences: they anneal `tanh β θ` with growing
//! β, which is here left to the fields themselves to grow, and they pull a field toward its value one step
//! ago, where the equations, and we, pull it toward its value after the task before.
//!
//! # Readings
//!
//! [`Reading::Field`] trains as above. [`Reading::Sign`] trains the same network as it is used, by the
//! straight-through gradient of the sign: what the method has to be better than. [`Binary::forward`] is
//! the signed network in both; [`Binary::mean_field`] is the mean of the logits under `q`.

use std::sync::Arc;

use candle_core::{Tensor, D};

use super::binary_config::{BinaryConfig, Reading};
use super::nn::finite;
use super::vision::VisionOutput;
use crate::transform::Sign;
use crate::weights::{Weight, Weights};
use crate::{kernels, Error, On, Result};

/// Added to the mean square of a layer before the root.
const EPS: f64 = 1e-6;

/// The first two moments of what a layer gives, `[batch, units]`, independent from unit to unit.
#[derive(Clone, Debug)]
pub struct Moments {
    /// The mean.
    pub mean: Tensor,
    /// The variance; `None`: zero, the mean is the value.
    pub variance: Option<Tensor>,
}

impl Moments {
    /// Divided by the root of the mean over units of the expected square.
    fn normalised(self) -> Result<Self> {
        let square = self.mean.sqr()?;
        let square = match &self.variance {
            Some(variance) => (square + variance)?,
            None => square,
        };
        let factor = (square.mean_keepdim(D::Minus1)? + EPS)?.recip()?;
        Ok(Moments {
            mean: self.mean.broadcast_mul(&factor.sqrt()?)?,
            variance: self.variance.map(|v| v.broadcast_mul(&factor)).transpose()?,
        })
    }

    /// Of what is above zero.
    fn rectified(self) -> Result<Self> {
        Ok(match self.variance {
            None => Moments { mean: self.mean.relu()?, variance: None },
            Some(variance) => {
                let (mean, variance) = kernels::rectified_moments(&self.mean, &variance)?;
                Moments { mean, variance: Some(variance) }
            }
        })
    }

    fn finite(&self) -> Result<bool> {
        let variance = self.variance.as_ref().map(finite).transpose()?;
        Ok(finite(&self.mean)? && variance.unwrap_or(true))
    }
}

/// The fields of one layer.
#[derive(Debug)]
pub struct Layer {
    name: String,
    theta: Weight,
    sign: Weight,
}

impl Layer {
    /// The layer called `name`, of the fields `name.weight`, `[units, inputs]`.
    pub fn new(weights: &Weights, name: &str) -> Result<Self> {
        let theta = weights.get(&format!("{name}.weight"))?.clone();
        Ok(Layer { name: name.to_string(), sign: theta.wrap(Arc::new(Sign)), theta })
    }

    /// `z` of the module's page for inputs of the moments `x`, under `reading`; signed weights take the
    /// mean of `x` for its value.
    pub fn forward(&self, x: &Moments, reading: Reading) -> Result<Moments> {
        let inputs = x.mean.dim(D::Minus1)? as f64;
        match reading {
            Reading::Sign => {
                let mean = (self.sign.matmul(&x.mean)? / inputs.sqrt())?;
                Ok(Moments { mean, variance: None })
            }
            Reading::Field => {
                let m = self.theta.tensor()?.tanh()?;
                let square = m.sqr()?;
                let unsure = square.affine(-1.0, 1.0)?;
                let times = |x: &Tensor, w: &Tensor| kernels::linear(x, w, None).on(&self.name);
                let mean = (times(&x.mean, &m)? / inputs.sqrt())?;
                let variance = match &x.variance {
                    None => times(&x.mean.sqr()?, &unsure)?,
                    Some(v) => (times(&(x.mean.sqr()? + v)?, &unsure)? + times(v, &square)?)?,
                };
                Ok(Moments { mean, variance: Some((variance / inputs)?) })
            }
        }
    }
}

/// The network.
#[derive(Debug)]
pub struct Binary {
    config: BinaryConfig,
    layers: Vec<Layer>,
}

impl Binary {
    /// Builds the model over `weights`, the fields of each layer.
    pub fn new(config: &BinaryConfig, weights: &Weights) -> Result<Self> {
        config.check()?;
        let layers = config.layers().iter().map(|name| Layer::new(weights, name)).collect::<Result<_>>()?;
        Ok(Binary { config: config.clone(), layers })
    }

    /// The model's sizes.
    pub fn config(&self) -> &BinaryConfig {
        &self.config
    }

    /// Runs the network of one-bit weights on `images [batch, channels, height, width]`. Another image size
    /// than the model's is an error.
    pub fn forward(&self, images: &Tensor) -> Result<VisionOutput> {
        self.read(images, Reading::Sign)
    }

    /// As it learns: by the configuration's reading, with the variance of the logits where it has one.
    pub fn train(&self, images: &Tensor) -> Result<VisionOutput> {
        self.read(images, self.config.reading)
    }

    /// The mean-field prediction: mean and variance of the logits under the distribution of the weights.
    pub fn mean_field(&self, images: &Tensor) -> Result<VisionOutput> {
        self.read(images, Reading::Field)
    }

    /// The first layer whose output on `images` is not finite.
    pub fn not_finite(&self, images: &Tensor) -> Result<Option<String>> {
        let mut found = None;
        self.walk(images, self.config.reading, &mut |layer, z| {
            if found.is_none() && !z.finite()? {
                found = Some(layer.to_string());
            }
            Ok(())
        })?;
        Ok(found)
    }

    fn read(&self, images: &Tensor, reading: Reading) -> Result<VisionOutput> {
        let Moments { mean, variance } = self.walk(images, reading, &mut |_, _| Ok(()))?;
        Ok(VisionOutput { class: mean, distillation: None, variance })
    }

    /// The forward pass, what each layer gives shown to `see` under the layer's name.
    fn walk(
        &self,
        images: &Tensor,
        reading: Reading,
        see: &mut dyn FnMut(&str, &Moments) -> Result<()>,
    ) -> Result<Moments> {
        let (_, channels, height, width) = images.dims4().on("images")?;
        let (rows, cols) = self.config.image_size;
        if (channels, height, width) != (self.config.channels, rows, cols) {
            return Err(Error::Run(format!(
                "images: found {channels} x {height} x {width}, expected {} x {rows} x {cols}",
                self.config.channels
            )));
        }
        let mut x = Moments { mean: images.flatten_from(1)?, variance: None };
        for (i, layer) in self.layers.iter().enumerate() {
            let z = layer.forward(&x, reading)?;
            see(&layer.name, &z)?;
            x = match i + 1 == self.layers.len() {
                true => z,
                false => z.normalised()?.rectified()?,
            };
        }
        Ok(x)
    }
}
