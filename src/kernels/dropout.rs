//! Inverted dropout whose mask is a pure function of a name and a pass.
//!
//! ```text
//! y = x k / (1 - p)     k drawn 1 with probability 1 - p, else 0     dx = dy k / (1 - p)
//! ```
//!
//! The mask is drawn in chunks of fixed length from the streams `[pass, chunk]` under (seed, name), so a
//! forward pass that is done again (activation checkpointing) and the backward see the same one, whatever
//! the number of threads and the device. On the CPU f32 and f64, f16 and bf16 through f32; on a CUDA device f32, f16
//! and bf16 (kernels/elementwise.cu). Srivastava et al. 2014.

use super::cpu::{self, real, Real};
#[cfg(feature = "cuda")]
use crate::kernels::cuda::{self, Launch};
use crate::kernels::tape::{self, Reads};
use crate::random::Random;
#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaStorage};
use candle_core::{bail, CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, WithDType};
use rayon::prelude::*;

/// What decides a mask.
#[derive(Clone, Debug)]
pub struct DropoutMask {
    /// The share of elements that are dropped, in `[0, 1)`.
    pub p: f64,
    /// The run's seed.
    pub seed: u64,
    /// Where in the model.
    pub name: String,
    /// The number of the forward pass.
    pub pass: u64,
}

impl DropoutMask {
    /// The factors of the elements of one chunk: 0 or `1 / (1 - p)`.
    fn factors(&self, chunk: usize) -> impl FnMut() -> f64 {
        let mut random = Random::new(self.seed, &self.name, &[self.pass, chunk as u64]);
        let (p, kept) = (self.p, 1.0 / (1.0 - self.p));
        move || if f64::from(random.uniform()) < p { 0.0 } else { kept }
    }
}

/// Dropout in plain candle ops: a mask of factors, then a product.
pub fn reference(x: &Tensor, mask: &DropoutMask) -> Result<Tensor> {
    let count = x.elem_count();
    let mut factors = Vec::with_capacity(count);
    for chunk in 0..count.div_ceil(cpu::GRAIN) {
        let mut next = mask.factors(chunk);
        factors.extend((0..cpu::GRAIN.min(count - chunk * cpu::GRAIN)).map(|_| next()));
    }
    x * Tensor::from_vec(factors, x.shape(), x.device())?.to_dtype(x.dtype())?
}

impl CustomOp1 for DropoutMask {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        real!("dropout", x, T => {
            let x = <T as Real>::slice("dropout", x, xl)?;
            let mut y = cpu::unwritten(x.len());
            let chunks = y.par_chunks_mut(cpu::GRAIN).zip(x.par_chunks(cpu::GRAIN)).enumerate();
            chunks.for_each(|(chunk, (y, x))| {
                let mut next = self.factors(chunk);
                y.iter_mut().zip(x).for_each(|(y, &x)| *y = x * T::from_f64(next()));
            });
            Ok((<T as Real>::store(y), xl.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, xl: &Layout) -> Result<(CudaStorage, Shape)> {
        let (dtype, count) = (x.dtype(), xl.shape().elem_count());
        let y = cuda::unwritten(x.device(), xl.shape(), dtype)?;
        // A draw is a multiple of 2^-24, so that it is below p where its 24 bits are below this.
        let below = (self.p * f64::from(1 << 24)).ceil() as u32;
        let hash = crate::random::number_of(&self.name, &[self.pass]);
        let kernel = format!("dropout_{}", cuda::suffix("dropout", dtype)?);
        let launch = Launch::new(x.device(), "elementwise", kernel)
            .place(cuda::place("dropout", x, xl)?)
            .place(cuda::start(&y));
        let launch = launch.i64(count).u64(self.seed).u64(hash).u32(below).f32((1.0 / (1.0 - self.p)) as f32);
        let blocks = count.div_ceil(256 * cuda::wide(dtype)).min(1 << 20);
        // SAFETY: x and y have `count` elements, over which any grid strides.
        unsafe { launch.run((blocks, 1, 1), (256, 1, 1), 0)? };
        Ok((y, xl.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(grad.contiguous()?.apply_op1_no_bwd(self)?))
    }
}

/// Dropout of `x` (any shape) under `mask`; `p` outside `[0, 1)` is an error, 0 hands x back.
pub fn dropout(x: &Tensor, mask: DropoutMask) -> Result<Tensor> {
    if !(0.0..1.0).contains(&mask.p) {
        bail!("dropout: expected p from 0 to below 1, got {}", mask.p)
    }
    if mask.p == 0.0 {
        return Ok(x.clone());
    }
    match cpu::road_with_cuda("dropout", &[("x", x)])? {
        cpu::Road::Kernel => tape::apply1(&x.contiguous()?, mask, Reads::NOTHING),
        cpu::Road::ThroughF32 => dropout(&x.to_dtype(DType::F32)?, mask)?.to_dtype(x.dtype()),
        cpu::Road::Reference => reference(x, &mask),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn mask(p: f64, name: &str, pass: u64) -> DropoutMask {
        DropoutMask { p, seed: 3, name: name.to_string(), pass }
    }

    #[test]
    fn agrees_differentiates_and_ignores_threads() {
        for shape in [vec![1], vec![3, 5], vec![2, 7, 13]] {
            let t = [values(&shape, 1)];
            agrees(&t, &|t| dropout(&t[0], mask(0.4, "a", 2)), &|t| reference(&t[0], &mask(0.4, "a", 2)));
            differentiates(&t, &|t| dropout(&t[0], mask(0.4, "a", 2)));
        }
        let t = [values(&[5, 9001], 1)];
        agrees(&t, &|t| dropout(&t[0], mask(0.4, "a", 2)), &|t| reference(&t[0], &mask(0.4, "a", 2)));
        ignores_threads(&t, &|t| dropout(&t[0], mask(0.4, "a", 2)));
    }

    #[test]
    fn the_mask_follows_name_and_pass_and_keeps_its_share() {
        let x = Tensor::ones(100_000, DType::F32, &candle_core::Device::Cpu).unwrap();
        let of = |name: &str, pass| dropout(&x, mask(0.25, name, pass)).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(of("a", 1), of("a", 1));
        assert!(of("a", 1) != of("a", 2) && of("a", 1) != of("b", 1));
        let kept = of("a", 1).iter().filter(|&&v| v != 0.0).count() as f64 / 100_000.0;
        // Three standard deviations of a share of 100 000 draws.
        assert!((kept - 0.75).abs() < 0.0042, "{kept}");
        assert!(of("a", 1).iter().all(|&v| v == 0.0 || v == (1.0f64 / 0.75) as f32));
    }

    #[test]
    fn shares_out_of_range_are_named() {
        let x = values(&[3], 1);
        for p in [1.0, -0.1, f64::NAN] {
            assert!(refusal(dropout(&x, mask(p, "a", 1))).contains("from 0 to below 1"));
        }
        assert_eq!(flat(&dropout(&x, mask(0.0, "a", 1)).unwrap()), flat(&x));
    }
}
