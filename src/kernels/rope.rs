//! Rotary position embedding, in the order of halves that Hugging Face checkpoints are stored for.
//!
//! ```text
//! y_i       = x_i c_i - x_(i + d/2) s_i          i < d/2, c = cos(p f_i), s = sin(p f_i)
//! y_(i+d/2) = x_(i + d/2) c_i + x_i s_i          dx: the same with -s
//! ```
//!
//! x is `[B, T, H*d]`, head h its columns `h*d .. (h+1)*d`; token t of the flattened `[B*T]` stands at
//! position `p = positions[t]`. On the CPU f32 and f64, f16 and bf16 through f32; on a CUDA device f32, f16 and bf16
//! (kernels/rope.cu). Source: Su et al. 2021, eq. 34.

#[cfg(feature = "cuda")]
use crate::kernels::cuda::{self, Launch};
use crate::kernels::tape::{self, Reads};
use std::sync::Arc;
#[cfg(feature = "cuda")]
use std::sync::{Mutex, PoisonError};

use super::cpu::{self, real, simd, Real, Road};
#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaStorage};
use candle_core::{bail, CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// Cosines and sines of every position and frequency: `[positions, d/2]` each, row by row.
#[derive(Clone, Debug)]
pub struct Rotations {
    half: usize,
    cos: Arc<[f32]>,
    sin: Arc<[f32]>,
    #[cfg(feature = "cuda")]
    there: Arc<Mutex<Option<There>>>,
}

/// The tables on a CUDA device, and the positions that were asked for last: all layers of a pass ask for the same.
#[cfg(feature = "cuda")]
#[derive(Clone, Debug)]
struct There {
    cos: Tensor,
    sin: Tensor,
    positions: Option<(Arc<[u32]>, Tensor)>,
}

impl Rotations {
    /// For positions `0..count` at `frequencies` radians a position (d/2 of them); cosine and sine are
    /// multiplied by `scale`. Angles are taken in f64: in f32 those of far positions lose their digits.
    pub fn new(frequencies: &[f64], count: usize, scale: f64) -> Self {
        let angles = (0..count).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        let (sin, cos): (Vec<f32>, Vec<f32>) =
            angles.map(|a| ((a.sin() * scale) as f32, (a.cos() * scale) as f32)).unzip();
        Rotations {
            half: frequencies.len(),
            cos: cos.into(),
            sin: sin.into(),
            #[cfg(feature = "cuda")]
            there: Arc::default(),
        }
    }

    /// Cosines, sines and `positions` on a device.
    #[cfg(feature = "cuda")]
    fn on(&self, device: &Device, positions: &Arc<[u32]>) -> Result<[Tensor; 3]> {
        let mut there = self.there.lock().unwrap_or_else(PoisonError::into_inner);
        let mut held = match there.take().filter(|held| held.cos.device().same_device(device)) {
            Some(held) => held,
            None => There {
                cos: Tensor::from_slice(&self.cos, self.cos.len(), device)?,
                sin: Tensor::from_slice(&self.sin, self.sin.len(), device)?,
                positions: None,
            },
        };
        let ids = match held.positions.take().filter(|(of, _)| Arc::ptr_eq(of, positions)) {
            Some((_, ids)) => ids,
            None => Tensor::from_slice(positions, positions.len(), device)?,
        };
        held.positions = Some((positions.clone(), ids.clone()));
        let all = [held.cos.clone(), held.sin.clone(), ids];
        *there = Some(held);
        Ok(all)
    }

    /// Positions that there are rows for.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }
}

/// `rope` in plain candle ops.
pub fn reference(x: &Tensor, heads: usize, positions: &[u32], rotations: &Rotations) -> Result<Tensor> {
    let (b, t, c) = x.dims3()?;
    let half = rotations.half;
    let table = |values: &Arc<[f32]>| {
        let all = Tensor::from_slice(values, (rotations.positions(), half), &Device::Cpu)?;
        let ids = Tensor::from_slice(positions, positions.len(), &Device::Cpu)?;
        let rows = all.index_select(&ids, 0)?.reshape((b, t, 1, half))?;
        rows.to_dtype(x.dtype())?.to_device(x.device())
    };
    let (cos, sin) = (table(&rotations.cos)?, table(&rotations.sin)?);
    let x = x.reshape((b, t, heads, c / heads))?;
    let (low, high) = (x.narrow(3, 0, half)?, x.narrow(3, half, half)?);
    let first = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
    let second = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second], 3)?.reshape((b, t, c))
}

simd! {
    /// The heads of one token.
    fn rotate<T>(x: &[T], cos: &[f32], sin: &[f32], sign: T, y: &mut [T]) {
        let half = cos.len();
        let sin = &sin[..half];
        for (x, y) in x.chunks_exact(2 * half).zip(y.chunks_exact_mut(2 * half)) {
            let ((low, high), (first, second)) = (x.split_at(half), y.split_at_mut(half));
            for i in 0..half {
                let (c, s) = (T::from_f64(f64::from(cos[i])), sign * T::from_f64(f64::from(sin[i])));
                first[i] = low[i] * c - high[i] * s;
                second[i] = high[i] * c + low[i] * s;
            }
        }
    }
}

#[derive(Clone)]
struct Rope {
    positions: Arc<[u32]>,
    rotations: Rotations,
    /// Whether it turns back, as gradients do.
    back: bool,
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        let width = xl.dims().last().copied().unwrap_or(1);
        let half = self.rotations.half;
        real!(self.name(), x, T => {
            let x = <T as Real>::slice(self.name(), x, xl)?;
            let sign = if self.back { T::ZERO - T::ONE } else { T::ONE };
            let rows = cpu::chunk_rows(width);
            let mut y = cpu::unwritten(x.len());
            y.par_chunks_mut(rows * width).zip(x.par_chunks(rows * width)).enumerate().for_each(|(i, (y, x))| {
                let positions = self.positions[i * rows..].iter();
                for ((y, x), &p) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(positions) {
                    let at = p as usize * half..(p as usize + 1) * half;
                    rotate(x, &self.rotations.cos[at.clone()], &self.rotations.sin[at], sign, y);
                }
            });
            Ok((<T as Real>::store(y), xl.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, xl: &Layout) -> Result<(CudaStorage, Shape)> {
        let (name, dtype, half) = (self.name(), x.dtype(), self.rotations.half);
        let tables = self.rotations.on(&Device::Cuda(x.device().clone()), &self.positions)?;
        let [(cos, cl), (sin, sl), (ids, il)] = tables.each_ref().map(Tensor::storage_and_layout);
        let y = cuda::unwritten(x.device(), xl.shape(), dtype)?;
        let pairs = xl.dims().last().copied().unwrap_or(0) / 2;
        let tokens = xl.shape().elem_count() / (2 * pairs).max(1);
        let each = if half.is_multiple_of(cuda::wide(dtype)) { cuda::wide(dtype) } else { 1 };
        let threads = (pairs / each).next_power_of_two().clamp(1, 256);
        let rows = 256 / threads;
        let launch = Launch::new(x.device(), name, format!("rope_{}", cuda::suffix(name, dtype)?))
            .place(cuda::place(name, x, xl)?)
            .place(cuda::place(name, cuda::storage(name, &ids)?, il)?)
            .place(cuda::place(name, cuda::storage(name, &cos)?, cl)?)
            .place(cuda::place(name, cuda::storage(name, &sin)?, sl)?)
            .place(cuda::start(&y));
        let launch = launch.i64(tokens).i32(pairs / half).i32(half).f32(if self.back { -1.0 } else { 1.0 });
        let blocks = tokens.div_ceil(rows).min(1 << 20);
        // SAFETY: x and y have tokens * heads * 2 half elements, and there is a position for each token, for which, as
        // `rope` checked, the tables have a row of `half`; tokens are strided over.
        unsafe { launch.run((blocks, 1, 1), (threads, rows, 1), 0)? };
        Ok((y, xl.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(grad.contiguous()?.apply_op1_no_bwd(&Rope { back: true, ..self.clone() })?))
    }
}

/// Rotates the heads of `x: [B, T, heads * d]` to `positions` (`B * T` of them, each below
/// [`Rotations::positions`]).
pub fn rope(x: &Tensor, heads: usize, positions: &Arc<[u32]>, rotations: &Rotations) -> Result<Tensor> {
    let op = "rope";
    let (b, t, c) = x.dims3()?;
    if heads == 0 || rotations.half == 0 || c != heads * 2 * rotations.half {
        bail!("{op}: expected x [B, T, {}] for {heads} heads, got {:?}", heads * 2 * rotations.half, x.dims())
    }
    if positions.len() != b * t {
        bail!("{op}: expected {} positions, got {}", b * t, positions.len())
    }
    if let Some(p) = positions.iter().find(|p| **p as usize >= rotations.positions()) {
        bail!("{op}: expected positions below {}, got {p}", rotations.positions())
    }
    match cpu::road_with_cuda(op, &[("x", x)])? {
        Road::Kernel => {
            let op = Rope { positions: positions.clone(), rotations: rotations.clone(), back: false };
            tape::apply1(&x.contiguous()?, op, Reads::NOTHING)
        }
        Road::ThroughF32 => rope(&cpu::wide(x)?, heads, positions, rotations)?.to_dtype(x.dtype()),
        Road::Reference => reference(x, heads, positions, rotations),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[test]
    fn agrees_and_differentiates() {
        for (b, t, heads, d) in [(1, 1, 1, 2), (2, 3, 2, 4), (1, 7, 3, 6), (3, 5, 1, 10)] {
            let frequencies: Vec<f64> = (0..d / 2).map(|i| 0.9f64.powi(i)).collect();
            let rotations = Rotations::new(&frequencies, 20, 1.25);
            let positions: Arc<[u32]> = (0..b * t).map(|i| (i * 7 % 20) as u32).collect();
            let x = [values(&[b, t, heads * d as usize], 1)];
            let op = |x: &[Tensor]| rope(&x[0], heads, &positions, &rotations);
            agrees(&x, &op, &|x| reference(&x[0], heads, &positions, &rotations));
            differentiates(&x, &op);
        }
        let rotations = Rotations::new(&[1.0, 0.3, 0.1], 3000, 1.0);
        let positions: Arc<[u32]> = (0..3000).collect();
        ignores_threads(&[values(&[1, 3000, 12], 1)], &|x| rope(&x[0], 2, &positions, &rotations));
    }

    #[test]
    fn by_hand() {
        // A quarter turn takes (x, y) to (-y, x).
        let rotations = Rotations::new(&[std::f64::consts::FRAC_PI_2], 2, 1.0);
        let x = Tensor::new(&[[[3f32, 4.0], [3.0, 4.0]]], &Device::Cpu).unwrap();
        let y = rope(&x, 1, &[0, 1].into(), &rotations).unwrap().to_vec3::<f32>().unwrap();
        assert_eq!(y[0][0], [3.0, 4.0]);
        assert!((y[0][1][0] + 4.0).abs() < 1e-6 && (y[0][1][1] - 3.0).abs() < 1e-6, "{y:?}");
        let text = refusal(rope(&x, 1, &[0, 2].into(), &rotations));
        assert!(text.contains("below 2") && text.contains("got 2"), "{text}");
        let text = refusal(rope(&x, 1, &[0].into(), &rotations));
        assert!(text.contains("2 positions"), "{text}");
    }
}
