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
//! Hidden layers rectify, `a = max(z, 0)`, as in the paper's programs. These draw one Gaussian `z` for each
//! unit and sample (local reparameterization); here both moments of `a` go on to the next layer in closed
//! form ([`kernels::rectified_moments`]). That makes the pass a function of the images alone: nothing to
//! seed, to resume or to average, and no noise in the gradient.
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
//! that an earlier task has made certain is moved little by a later one, an uncertain one freely. Adam, which
//! divides by the size that gradients have, takes the common factor out again; what then holds a weight
//! is the pull of the prior, which grows with the distance. It asks for no weight decay, a pull toward
//! θ = 0, where everything is forgotten.
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
//!
//! # Figures
//!
//! MNIST, then Fashion-MNIST, the first 10 000 training images of each, ten classes shared; two hidden layers
//! of 200, ten epochs a task in batches of 64, AdamW without decay or clipping; percent right of 10 000 test
//! images by the signed network, mean of three seeds (those of one seed are marked).
//!
//! | training | MNIST, first | MNIST, in the end | Fashion-MNIST |
//! | --- | --- | --- | --- |
//! | field, lr 0.05, prior at 0.01 then 0.2 | 95.2 | 92.5 | 83.1 |
//! | field, lr 0.05, prior at 0.01 then 0 (one seed) | 95.3 | 64.1 | 85.4 |
//! | field, lr 0.05, prior at 1 throughout (one seed) | 88.8 | 59.1 | 70.1 |
//! | sign, lr 0.0003 | 94.9 | 40.1 | 83.6 |

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
            None => Moments { mean: kernels::relu(&self.mean)?, variance: None },
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

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::super::binary_config::tests::tiny;
    use super::super::{VisionConfig, VisionModel};
    use super::*;
    use crate::random::Random;
    use crate::train::task::distillation_loss;
    use crate::weights::Expr;

    fn drawn(name: &str, shape: &[usize], size: f64) -> Tensor {
        let mut random = Random::new(5, name, &[]);
        let values: Vec<f64> =
            (0..shape.iter().product()).map(|_| size * f64::from(random.normal())).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// A store of f64 variables over fields of this size.
    fn store(config: &BinaryConfig, size: f64) -> Weights {
        let mut weights = Weights::default();
        for (name, shape) in config.shapes() {
            let var = Var::from_tensor(&drawn(&name, &shape, size)).unwrap();
            weights.insert(name, Expr::Latent(var).into());
        }
        weights
    }

    fn rows(t: &Tensor) -> Vec<Vec<f64>> {
        t.to_dtype(DType::F64).unwrap().to_vec2().unwrap()
    }

    /// Every pattern of signs of three weights, and of three inputs that are each mean ± deviation, by its
    /// probability: the moments are exact.
    #[test]
    fn moments_of_a_layer_by_enumeration() {
        let (theta, mean) = ([[0.3f64, -1.2, 2.0], [0.0, 0.8, -0.4]], [0.5, -1.0, 2.0]);
        let mut weights = Weights::default();
        weights.insert("a.weight", Weight::dense(Tensor::new(&theta, &Device::Cpu).unwrap()));
        let layer = Layer::new(&weights, "a").unwrap();
        for deviation in [None, Some([0.0, 0.7, 1.5])] {
            let of = |x: [f64; 3]| Tensor::new(&[x], &Device::Cpu).unwrap();
            let x = Moments { mean: of(mean), variance: deviation.map(|d| of(d.map(|d| d * d))) };
            let z = layer.forward(&x, Reading::Field).unwrap();
            let (got, spread) = (rows(&z.mean), rows(z.variance.as_ref().unwrap()));
            for (unit, theta) in theta.iter().enumerate() {
                let (mut first, mut second) = (0.0, 0.0);
                for pattern in 0..64u32 {
                    let bit = |i: usize| if pattern >> i & 1 == 1 { 1.0 } else { -1.0 };
                    let (mut p, mut sum) = (1.0 / 8.0, 0.0);
                    for j in 0..3 {
                        p /= 1.0 + (-2.0 * bit(j) * theta[j]).exp();
                        sum += bit(j) * (mean[j] + bit(3 + j) * deviation.map_or(0.0, |d| d[j]));
                    }
                    let value: f64 = sum / 3f64.sqrt();
                    first += p * value;
                    second += p * value * value;
                }
                assert!((got[0][unit] - first).abs() < 1e-12, "{unit}: {} {first}", got[0][unit]);
                let variance = second - first * first;
                assert!((spread[0][unit] - variance).abs() < 1e-12, "{unit}: {} {variance}", spread[0][unit]);
            }
        }
    }

    #[test]
    fn the_field_loss_differentiates() {
        let config = tiny(Reading::Field);
        let images = drawn("images", &[4, 1, 3, 2], 1.0);
        let labels = Tensor::new(&[0u32, 2, 1, 1], &Device::Cpu).unwrap();
        let weights = store(&config, 0.8);
        let model = Binary::new(&config, &weights).unwrap();
        let loss = || distillation_loss(&model.train(&images).unwrap(), &labels, None, None).unwrap();
        let grads = loss().backward().unwrap();
        for param in weights.params() {
            let analytic = grads.get(param.var.as_tensor()).unwrap().flatten_all().unwrap();
            let base = param.var.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let shape = param.var.shape().clone();
            for (i, analytic) in analytic.to_vec1::<f64>().unwrap().into_iter().enumerate() {
                let at = |by: f64| {
                    let mut moved = base.clone();
                    moved[i] += by;
                    param.var.set(&Tensor::from_vec(moved, &shape, &Device::Cpu).unwrap()).unwrap();
                    loss().to_scalar::<f64>().unwrap()
                };
                let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
                at(0.0);
                let name = &param.name;
                assert!((analytic - numeric).abs() < 1e-8, "{name} {i}: {analytic} {numeric}");
            }
        }
    }

    /// Of fields that are certain the mean-field prediction is the signed network, to rounding, and has no
    /// variance; of any fields the signed network is that of their signs.
    #[test]
    fn both_readings_agree_where_there_is_no_doubt() {
        let config = tiny(Reading::Field);
        let images = drawn("images", &[7, 1, 3, 2], 1.0);
        let certain = Binary::new(&config, &store(&config, 1e4)).unwrap();
        let (signed, mean) = (certain.forward(&images).unwrap(), certain.mean_field(&images).unwrap());
        for (a, b) in rows(&signed.class).iter().flatten().zip(rows(&mean.class).iter().flatten()) {
            assert!((a - b).abs() < 1e-12, "{a} {b}");
        }
        assert!(rows(&mean.variance.unwrap()).iter().flatten().all(|v| *v == 0.0));
        assert!(signed.variance.is_none());

        let weights = store(&config, 0.5);
        let doubtful = Binary::new(&config, &weights).unwrap();
        let signs = weights.iter().map(|(name, w)| {
            let theta = w.tensor().unwrap().detach();
            (
                name.to_string(),
                theta.ge(0.0).unwrap().to_dtype(DType::F64).unwrap().affine(2.0, -1.0).unwrap(),
            )
        });
        let signs = Binary::new(&config, &Weights::from_tensors(signs)).unwrap();
        let expected = rows(&signs.forward(&images).unwrap().class);
        assert_eq!(rows(&doubtful.forward(&images).unwrap().class), expected);
        assert!(rows(&doubtful.mean_field(&images).unwrap().variance.unwrap())
            .iter()
            .flatten()
            .all(|v| *v > 0.0));
    }

    #[test]
    fn hidden_layers_have_the_size_one() {
        let of = |x: [[f64; 2]; 1]| Tensor::new(&x, &Device::Cpu).unwrap();
        let z = Moments { mean: of([[3.0, 1.0]]), variance: Some(of([[2.0, 4.0]])) }.normalised().unwrap();
        // (9 + 2 + 1 + 4) / 2 = 8.
        let scale = 1.0 / 8f64.sqrt();
        for (got, want) in rows(&z.mean)[0].iter().zip([3.0 * scale, scale]) {
            assert!((got - want).abs() < 1e-6);
        }
        for (got, want) in rows(&z.variance.unwrap())[0].iter().zip([0.25, 0.5]) {
            assert!((got - want).abs() < 1e-6);
        }
    }

    /// Straight through: the gradient of the signs, at the fields within one of zero.
    #[test]
    fn the_sign_reading_trains_as_it_is_used() {
        let config = tiny(Reading::Sign);
        let images = drawn("images", &[4, 1, 3, 2], 1.0);
        let weights = store(&config, 0.8);
        let model = Binary::new(&config, &weights).unwrap();
        let output = model.train(&images).unwrap();
        assert!(output.variance.is_none());
        assert_eq!(rows(&output.class), rows(&model.forward(&images).unwrap().class));
        let grads = output.class.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let (mut passed, mut held) = (0, 0);
        for param in weights.params() {
            let grad = grads.get(param.var.as_tensor()).unwrap();
            for (theta, grad) in rows(param.var.as_tensor()).iter().flatten().zip(rows(grad).iter().flatten())
            {
                passed += usize::from(*grad != 0.0);
                held += usize::from(theta.abs() > 1.0);
                assert!(theta.abs() <= 1.0 || *grad == 0.0, "{}: {theta} {grad}", param.name);
            }
        }
        assert!(passed > 20 && held > 5, "{passed} {held}");
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let config = tiny(Reading::Field);
        let vision = VisionConfig::Binary(config.clone());
        assert_eq!(vision.params(), 5 * 6 + 4 * 5 + 3 * 4);
        assert_eq!(
            ["layers.0.weight", "layers.1.weight", "classifier.weight"].map(|n| vision.depth(n)),
            [(0, 2), (1, 2), (2, 2)]
        );
        let weights = store(&config, 1.0);
        let VisionModel::Binary(model) = vision.build(&weights).unwrap() else { panic!("another model") };
        let wide = drawn("images", &[1, 1, 2, 3], 1.0);
        let error = model.forward(&wide).unwrap_err().to_string();
        assert_eq!(error, "images: found 1 x 2 x 3, expected 1 x 3 x 2");
        assert_eq!(model.not_finite(&drawn("images", &[2, 1, 3, 2], 1.0)).unwrap(), None);
        let nan = (drawn("images", &[2, 1, 3, 2], 1.0) * f64::NAN).unwrap();
        assert_eq!(model.not_finite(&nan).unwrap().as_deref(), Some("layers.0"));
        // The rectifiers of either reading let it through to the logits.
        for output in [model.forward(&nan), model.mean_field(&nan)] {
            assert!(rows(&output.unwrap().class).iter().flatten().all(|v| v.is_nan()));
        }
    }
}
