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
        Ok(VisionOutput { class, distillation: None, variance: None })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::super::keys::numbered_labels;
    use super::*;
    use crate::random::Random;

    fn config(channels: usize, dropout: (f64, f64)) -> ConvConfig {
        ConvConfig {
            image_size: (7, 8),
            channels,
            widths: vec![3, 4],
            kernel: 2,
            hidden: 5,
            dropout,
            classes: numbered_labels(3),
        }
    }

    fn uniform(shape: &[usize], seed: u64) -> Tensor {
        let mut random = Random::new(seed, "values", &[]);
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.range(-1.0, 1.0)).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn weights(config: &ConvConfig) -> Weights {
        let shapes = config.shapes().into_iter().enumerate();
        Weights::from_tensors(shapes.map(|(i, (name, shape))| (name, uniform(&shape, i as u64))))
    }

    fn flat(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// One pixel a window, so that all can be followed: a gray image of 2 x 2, its negative below 0 cut off.
    #[test]
    fn by_hand() {
        let config = ConvConfig {
            image_size: (2, 2),
            channels: 1,
            widths: vec![2],
            kernel: 1,
            hidden: 2,
            dropout: (0.0, 0.0),
            classes: numbered_labels(2),
        };
        let t = |data: &[f32], shape: &[usize]| Tensor::from_slice(data, shape, &Device::Cpu).unwrap();
        let weights = Weights::from_tensors([
            ("conv.0.weight".to_string(), t(&[1., -1.], &[2, 1, 1, 1])),
            ("conv.0.bias".to_string(), t(&[0., 0.5], &[2])),
            ("fc.weight".to_string(), t(&[1., 2., 3., -4.], &[2, 2])),
            ("fc.bias".to_string(), t(&[0., 1.], &[2])),
            ("classifier.weight".to_string(), t(&[1., 0., 2., 1.], &[2, 2])),
            ("classifier.bias".to_string(), t(&[0., -1.], &[2])),
        ]);
        let model = ConvNet::new(&config, &weights).unwrap();
        let images = t(&[1., -2., 3., 0.], &[1, 1, 2, 2]);
        // Pooled: 3 and 2.5; hidden: 8, and 9 - 10 + 1 = 0.
        let class = model.forward(&images).unwrap().class;
        assert_eq!(flat(&class), [8., 15.]);
    }

    /// Against candle's own ops, channels first throughout.
    #[test]
    fn agrees_with_plain_ops() {
        for channels in [1, 3] {
            let config = config(channels, (0.25, 0.5));
            let weights = weights(&config);
            let images = uniform(&[5, channels, 7, 8], 9);
            let w = |name: &str| weights.get(name).unwrap().tensor().unwrap();
            let mut h = images.clone();
            for layer in 0..2 {
                let bias = w(&format!("conv.{layer}.bias")).reshape((1, (), 1, 1)).unwrap();
                let y = h.conv2d(&w(&format!("conv.{layer}.weight")), 0, 1, 1, 1).unwrap();
                h = y.broadcast_add(&bias).unwrap().relu().unwrap();
            }
            let h = h.max_pool2d(2).unwrap().flatten_from(1).unwrap();
            let dense = |h: &Tensor, name: &str| {
                let y = h.matmul(&w(&format!("{name}.weight")).t().unwrap()).unwrap();
                y.broadcast_add(&w(&format!("{name}.bias"))).unwrap()
            };
            let want = flat(&dense(&dense(&h, "fc").relu().unwrap(), "classifier"));
            let model = ConvNet::new(&config, &weights).unwrap();
            let got = flat(&model.forward(&images).unwrap().class);
            for (got, want) in got.iter().zip(&want) {
                assert!((got - want).abs() < 2e-5 * (1.0 + want.abs()), "{got} {want}");
            }
            // Without draws training drops nothing.
            assert_eq!(flat(&model.train(&images, None).unwrap().class), got);
        }
    }

    #[test]
    fn dropout_follows_the_sample_not_the_batch() {
        let config = config(1, (0.25, 0.5));
        let model = ConvNet::new(&config, &weights(&config)).unwrap();
        let images = uniform(&[6, 1, 7, 8], 9);
        let of = |from: usize, count: usize, epoch| {
            let samples = (from..from + count).map(|i| i as u32 * 7).collect();
            let draws = DropPath { rate: 0.0, seed: 3, epoch, samples };
            flat(&model.train(&images.narrow(0, from, count).unwrap(), Some(&draws)).unwrap().class)
        };
        let whole = of(0, 6, 1);
        assert_eq!([of(0, 2, 1), of(2, 1, 1), of(3, 3, 1)].concat(), whole);
        assert_ne!(of(0, 6, 2), whole);
        assert_ne!(flat(&model.forward(&images).unwrap().class), whole);
    }

    #[test]
    fn latent_weights_receive_gradients_and_frozen_ones_none() {
        let config = config(1, (0.0, 0.0));
        let mut weights = weights(&config);
        let frozen = weights.get("conv.0.weight").unwrap().clone();
        weights = weights.trainable().unwrap();
        weights.insert("conv.0.weight", frozen);
        let model = ConvNet::new(&config, &weights).unwrap();
        let images = uniform(&[4, 1, 7, 8], 9);
        let grads =
            model.forward(&images).unwrap().class.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let params = weights.params();
        assert_eq!(params.len(), config.shapes().len() - 1);
        for param in params {
            let grad = grads.get(param.var.as_tensor()).unwrap();
            assert_eq!(grad.dims(), param.var.dims(), "{}", param.name);
            assert!(flat(grad).iter().any(|g| *g != 0.0), "{}", param.name);
        }
    }

    #[test]
    fn other_images_and_what_is_not_finite_are_named() {
        let config = config(1, (0.0, 0.0));
        let store = weights(&config);
        let model = ConvNet::new(&config, &store).unwrap();
        let error = model.forward(&uniform(&[1, 1, 8, 8], 9)).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let said = "found images of 1 x 8 x 8, the model takes 1 x 7 x 8";
        assert!(error.to_string().contains(said), "{error}");
        let images = uniform(&[2, 1, 7, 8], 9);
        assert_eq!(model.not_finite(&images).unwrap(), None);
        for (name, stage) in
            [("conv.1.bias", "conv.1"), ("fc.bias", "fc"), ("classifier.bias", "the classifier")]
        {
            let mut broken = store.clone();
            let shape = store.get(name).unwrap().shape().unwrap();
            let nan = Tensor::full(f32::NAN, shape, &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
            broken.insert(name, Weight::dense(nan));
            let model = ConvNet::new(&config, &broken).unwrap();
            assert_eq!(model.not_finite(&images).unwrap().as_deref(), Some(stage));
        }
    }
}
