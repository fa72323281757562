//! Stochastic depth (Huang et al. 2016, as vision transformers use it): in training a residual branch is
//! left out for a sample with a probability that grows with depth, and what remains is scaled up so that
//! its expectation is the same.
//!
//! Whether sample s of epoch e leaves out branch b of layer l is a function of these and the seed alone:
//! the same in any batch, on any number of threads, after a resume. So is dropout (Srivastava et al. 2014)
//! where a model has it.

use candle_core::Tensor;

use crate::random::Random;
use crate::{kernels, Result};

/// The draws of one batch: what a model leaves out of each sample in training.
#[derive(Clone, Debug)]
pub struct DropPath {
    /// Probability that a residual branch of the deepest layer is left out; it falls linearly to 0 at the
    /// first.
    pub rate: f64,
    /// The seed.
    pub seed: u64,
    /// The epoch's number.
    pub epoch: u64,
    /// The samples of the batch, in order.
    pub samples: Vec<u32>,
}

impl DropPath {
    /// `x: [batch, ..]`, what branch `branch` of layer `layer` of `layers` adds to the residual stream,
    /// zero for samples that leave it out.
    pub fn apply(&self, x: &Tensor, layer: usize, layers: usize, branch: u64) -> Result<Tensor> {
        let drop = self.rate * layer as f64 / (layers.max(2) - 1) as f64;
        if drop <= 0.0 {
            return Ok(x.clone());
        }
        let keep = (1.0 - drop) as f32;
        let draw = |sample: &u32| {
            let address = [self.epoch, u64::from(*sample), layer as u64, branch];
            let stays = Random::new(self.seed, "drop path", &address).uniform() < keep;
            if stays {
                1.0 / keep
            } else {
                0.0
            }
        };
        let factors: Vec<f32> = self.samples.iter().map(draw).collect();
        let mut shape = vec![1; x.rank()];
        shape[0] = factors.len();
        let factors = Tensor::from_vec(factors, shape, x.device())?.to_dtype(x.dtype())?;
        Ok(x.broadcast_mul(&factors)?)
    }

    /// Dropout called `name` of `x: [batch, width, ..]`: of each sample each of `width` channels or elements
    /// is zero with probability `p`, in `[0, 1)`, and the others are scaled up so that the expectation is
    /// the same.
    pub fn drop(&self, x: &Tensor, name: &str, p: f64, width: usize) -> Result<Tensor> {
        if p <= 0.0 {
            return Ok(x.clone());
        }
        let keep = (1.0 - p) as f32;
        let mut factors = Vec::with_capacity(self.samples.len() * width);
        for sample in &self.samples {
            let mut random = Random::new(self.seed, name, &[self.epoch, u64::from(*sample)]);
            factors.extend((0..width).map(|_| if random.uniform() < keep { 1.0 / keep } else { 0.0 }));
        }
        let factors = Tensor::from_vec(factors, (self.samples.len(), width), x.device())?;
        Ok(kernels::scale_leading(x, &factors.to_dtype(x.dtype())?)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    fn means(samples: Vec<u32>, layer: usize) -> Vec<f32> {
        let x = Tensor::ones((samples.len(), 2, 3), DType::F32, &Device::Cpu).unwrap();
        let drop = DropPath { rate: 0.5, seed: 3, epoch: 1, samples };
        drop.apply(&x, layer, 5, 0).unwrap().mean((1, 2)).unwrap().to_vec1().unwrap()
    }

    #[test]
    fn shares_grow_with_depth_and_expectation_stays() {
        let all: Vec<u32> = (0..4000).collect();
        assert!(means(all.clone(), 0).iter().all(|m| *m == 1.0));
        for (layer, share) in [(2, 0.25), (4, 0.5)] {
            let means = means(all.clone(), layer);
            let gone = means.iter().filter(|m| **m == 0.0).count() as f64 / 4000.0;
            assert!((gone - share).abs() < 0.03, "layer {layer}: {gone}");
            assert!((means.iter().sum::<f32>() / 4000.0 - 1.0).abs() < 0.06);
        }
    }

    #[test]
    fn a_sample_draws_the_same_in_any_batch() {
        let whole = means((0..50).collect(), 4);
        assert_eq!(means((20..30).collect(), 4), whole[20..30]);
    }

    #[test]
    fn dropout_follows_sample_epoch_and_name_and_keeps_the_expectation() {
        let of = |samples: std::ops::Range<u32>, epoch, name: &str, p: f64| {
            let x = Tensor::ones((samples.len(), 20, 3), DType::F32, &Device::Cpu).unwrap();
            let drop = DropPath { rate: 0.5, seed: 3, epoch, samples: samples.collect() };
            let y = drop.drop(&x, name, p, 20).unwrap();
            y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let whole = of(0..500, 1, "a", 0.25);
        assert_eq!(of(200..210, 1, "a", 0.25), whole[200 * 60..210 * 60]);
        assert!(of(0..500, 2, "a", 0.25) != whole && of(0..500, 1, "b", 0.25) != whole);
        // A channel is dropped as a whole.
        assert!(whole.chunks(3).all(|c| c == [0.0; 3] || c == [1.0 / 0.75; 3]));
        let kept = whole.iter().filter(|v| **v != 0.0).count() as f64 / whole.len() as f64;
        // Three standard deviations of a share of 10 000 draws.
        assert!((kept - 0.75).abs() < 0.013, "{kept}");
        assert!(of(0..5, 1, "a", 0.0).iter().all(|v| *v == 1.0));
    }
}
