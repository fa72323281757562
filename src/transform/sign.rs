//! One-bit weights by their sign: `w = sign(θ)`, `sign(0) = 1`, with the straight-through gradient
//! `dθ = dw` where `|θ| <= 1`, else 0.
//!
//! Hubara et al. 2016, "Binarized neural networks", equations 1 and 4. The forward pass is exact: every
//! entry is 1 or -1 and nothing else, but that NaN stays NaN, so that what made it is found.

use crate::kernels::tape::{self, Reads};
use std::sync::Arc;

use candle_core::{bail, CpuStorage, CustomOp1, Layout, Shape, Tensor, WithDType};

use crate::weights::Transform;
use crate::Result;

/// The sign of a latent weight: no trainables, no state.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sign;

impl Transform for Sign {
    fn kind(&self) -> &'static str {
        "sign"
    }

    fn apply(&self, inputs: &[Tensor]) -> Result<Tensor> {
        sign(&inputs[0])
    }

    fn frozen(&self) -> Result<Arc<dyn Transform>> {
        Ok(Arc::new(Sign))
    }
}

/// `sign(θ)`, 1 or -1 in the shape and format of `theta`, with the straight-through gradient.
pub fn sign(theta: &Tensor) -> Result<Tensor> {
    if theta.device().is_cpu() && matches!(theta.dtype(), candle_core::DType::F32 | candle_core::DType::F64) {
        return Ok(tape::apply1(&theta.contiguous()?, SignOp, Reads::OPERANDS)?);
    }
    // The value is a constant, and what is added to it is zero to the bit.
    let at = theta.detach();
    let one = at.ones_like()?;
    let value = at.lt(0.0)?.where_cond(&one.neg()?, &at)?;
    let value = at.ge(0.0)?.where_cond(&one, &value)?;
    let passed = within(&at)?.where_cond(theta, &at.zeros_like()?)?;
    Ok((value + (&passed - passed.detach())?)?)
}

/// Where the gradient passes.
fn within(theta: &Tensor) -> candle_core::Result<Tensor> {
    theta.abs()?.le(1.0)
}

/// 1 or -1; NaN stays NaN.
fn one<T: WithDType>(theta: T) -> T {
    if theta >= T::zero() {
        T::one()
    } else if theta < T::zero() {
        T::zero() - T::one()
    } else {
        theta
    }
}

struct SignOp;

impl CustomOp1 for SignOp {
    fn name(&self) -> &'static str {
        "sign"
    }

    fn cpu_fwd(&self, theta: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let Some((from, to)) = layout.contiguous_offsets() else {
            bail!("sign: expected contiguous elements, got strides {:?}", layout.stride())
        };
        let signs = match theta {
            CpuStorage::F32(theta) => CpuStorage::F32(theta[from..to].iter().copied().map(one).collect()),
            CpuStorage::F64(theta) => CpuStorage::F64(theta[from..to].iter().copied().map(one).collect()),
            _ => bail!("sign: expected elements of f32 or f64"),
        };
        Ok((signs, layout.shape().clone()))
    }

    fn bwd(&self, theta: &Tensor, _sign: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(within(theta)?.where_cond(grad, &grad.zeros_like()?)?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::weights::Weight;

    const THETA: [f32; 8] = [0.3, -0.3, 0.0, -0.0, 1.0, -1.0, 1.0001, -7.0];

    #[test]
    fn every_entry_is_one_or_minus_one_and_the_gradient_passes_within_one() {
        for dtype in [DType::F32, DType::F64, DType::BF16] {
            let theta = Tensor::new(&THETA, &Device::Cpu).unwrap().reshape((2, 4)).unwrap();
            let var = Var::from_tensor(&theta.to_dtype(dtype).unwrap()).unwrap();
            let w = sign(var.as_tensor()).unwrap();
            assert_eq!((w.dtype(), w.dims()), (dtype, &[2, 4][..]));
            let flat =
                |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            // Minus zero is zero: its sign is one too.
            assert_eq!(flat(&w), [1.0, -1.0, 1.0, 1.0, 1.0, -1.0, 1.0, -1.0], "{dtype:?}");
            let slope = Tensor::new(&[1f32, 2., 3., 4., 5., 6., 7., 8.], &Device::Cpu).unwrap();
            let slope = slope.reshape((2, 4)).unwrap().to_dtype(dtype).unwrap();
            let grads = (w * slope).unwrap().sum_all().unwrap().backward().unwrap();
            let mut expected = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0, 0.0];
            if dtype == DType::BF16 {
                expected[6] = 7.0; // 1.0001 is 1 there
            }
            assert_eq!(flat(grads.get(&var).unwrap()), expected, "{dtype:?}");
        }
    }

    /// On the kernel's road (f32, f64) and in plain ops (bf16) alike.
    #[test]
    fn nan_stays_and_the_infinite_have_a_sign() {
        for dtype in [DType::F32, DType::F64, DType::BF16] {
            let theta = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.5];
            let theta = Tensor::new(&theta, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let var = Var::from_tensor(&theta).unwrap();
            let w = sign(var.as_tensor()).unwrap();
            let of = |t: &Tensor| t.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
            assert!(of(&w)[0].is_nan(), "{dtype:?}: {:?}", of(&w));
            assert_eq!(of(&w)[1..], [1.0, -1.0, -1.0], "{dtype:?}");
            // A slope of the saturated that is not finite is none of theirs.
            let slope = [2.0, f32::INFINITY, f32::NEG_INFINITY, 3.0];
            let slope = Tensor::new(&slope, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let grads = (w * slope).unwrap().sum_all().unwrap().backward().unwrap();
            assert_eq!(of(grads.get(&var).unwrap()), [0.0, 0.0, 0.0, 3.0], "{dtype:?}");
        }
    }

    #[test]
    fn both_readings_agree_and_a_transposed_weight_serves() {
        let theta = Tensor::new(&THETA, &Device::Cpu).unwrap().reshape((2, 4)).unwrap();
        let x = Tensor::new(&[[1f32, 2.0, 3.0, 4.0], [-1.0, 0.5, 0.25, 2.0]], &Device::Cpu).unwrap();
        let weight = Weight::latent(&theta).unwrap().wrap(Arc::new(Sign));
        let product = weight.matmul(&x).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(product, [[6.0, -2.0], [0.75, -3.25]].map(|r| r.to_vec()));
        let turned = sign(&theta.t().unwrap()).unwrap().t().unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(turned, weight.tensor().unwrap().to_vec2::<f32>().unwrap());
        let settled = weight.settled().unwrap();
        assert!(settled.params().is_empty() && weight.params().len() == 1);
        assert_eq!(settled.tensor().unwrap().to_vec2::<f32>().unwrap(), turned);
    }
}
