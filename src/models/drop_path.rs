//! Stochastic depth (Huang et al. 2016, as vision transformers use it): in training a residual branch is
//! left out for a sample with a probability that grows with depth, and what remains is scaled up so that
//! its expectation is the same.
//!
//! Whether sample s of epoch e leaves out branch b of layer l is a function of these and the seed alone:
//! the same in any batch, on any number of threads, after a resume.

use candle_core::Tensor;

use crate::random::Random;
use crate::Result;

/// The draws of one batch.
#[derive(Clone, Debug)]
pub struct DropPath {
    /// Probability of the deepest layer; it falls linearly to 0 at the first.
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
}
