//! SwiGLU, elementwise.
//!
//! ```text
//! y = g * sigmoid(g) * u     dg = dy * u * s * (1 + g * (1 - s))     du = dy * g * s     s = sigmoid(g)
//! ```
//!
//! f32 and f64 here, f16 and bf16 through f32. Source: Shazeer 2020, "GLU variants improve transformer",
//! eq. 6 without the products.

use super::cpu::{self, real, simd, Real, Road};
#[cfg(feature = "cuda")]
use crate::kernels::cuda;
use crate::kernels::tape::{self, Reads};
#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaStorage};
use candle_core::{bail, CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// SwiGLU in plain candle ops.
pub fn reference(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let sigmoid = (gate.neg()?.exp()? + 1.0)?.recip()?;
    (gate * sigmoid)? * up
}

#[inline(always)]
fn sigmoid<T: Real>(x: T) -> T {
    // The exponential of what is not positive cannot overflow.
    let e = (T::ZERO - x.abs()).exp_nonpos();
    let s = T::ONE / (T::ONE + e);
    if x < T::ZERO {
        e * s
    } else {
        s
    }
}

simd! {
    fn forward<T>(g: &[T], u: &[T], y: &mut [T]) {
        for ((y, &g), &u) in y.iter_mut().zip(g).zip(u) {
            *y = g * sigmoid(g) * u;
        }
    }
}

simd! {
    fn backward<T>(g: &[T], u: &[T], dy: &[T], dg: &mut [T], du: &mut [T]) {
        let operands = g.iter().zip(u).zip(dy);
        for ((dg, du), ((&g, &u), &dy)) in dg.iter_mut().zip(du).zip(operands) {
            let s = sigmoid(g);
            *du = dy * g * s;
            *dg = dy * u * s * g.fma(T::ONE - s, T::ONE);
        }
    }
}

/// (gate, up) to y.
struct SwiGlu;

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(
        &self,
        g: &CpuStorage,
        gl: &Layout,
        u: &CpuStorage,
        ul: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        real!(name, g, T => {
            let (g, u) = (<T as Real>::slice(name, g, gl)?, <T as Real>::slice(name, u, ul)?);
            let mut y = cpu::unwritten(g.len());
            let chunk = cpu::GRAIN;
            y.par_chunks_mut(chunk)
                .zip(g.par_chunks(chunk).zip(u.par_chunks(chunk)))
                .for_each(|(y, (g, u))| forward(g, u, y));
            Ok((<T as Real>::store(y), gl.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        g: &CudaStorage,
        gl: &Layout,
        u: &CudaStorage,
        ul: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let y = cuda::unwritten(g.device(), gl.shape(), g.dtype())?;
        let places = [cuda::place(self.name(), g, gl)?, cuda::place(self.name(), u, ul)?, cuda::start(&y)];
        cuda::elementwise(g.device(), "swiglu", g.dtype(), &places, gl.shape().elem_count())?;
        Ok((y, gl.shape().clone()))
    }

    fn bwd(
        &self,
        g: &Tensor,
        u: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let packed = g.apply_op3_no_bwd(u, &grad.contiguous()?, &SwiGluGrad)?;
        let count = g.elem_count();
        Ok((Some(cpu::unpack(&packed, 0, g.shape())?), Some(cpu::unpack(&packed, count, u.shape())?)))
    }
}

/// (gate, up, dy) to dgate and dup in one flat result.
struct SwiGluGrad;

impl CustomOp3 for SwiGluGrad {
    fn name(&self) -> &'static str {
        "swiglu-grad"
    }

    fn cpu_fwd(
        &self,
        g: &CpuStorage,
        gl: &Layout,
        u: &CpuStorage,
        ul: &Layout,
        dy: &CpuStorage,
        dl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        real!(name, g, T => {
            let (g, u) = (<T as Real>::slice(name, g, gl)?, <T as Real>::slice(name, u, ul)?);
            let dy = <T as Real>::slice(name, dy, dl)?;
            let mut out = cpu::unwritten(2 * g.len());
            let (dg, du) = out.split_at_mut(g.len());
            let chunk = cpu::GRAIN;
            dg.par_chunks_mut(chunk)
                .zip(du.par_chunks_mut(chunk))
                .zip(g.par_chunks(chunk).zip(u.par_chunks(chunk)).zip(dy.par_chunks(chunk)))
                .for_each(|((dg, du), ((g, u), dy))| backward(g, u, dy, dg, du));
            let shape = Shape::from(out.len());
            Ok((<T as Real>::store(out), shape))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        g: &CudaStorage,
        gl: &Layout,
        u: &CudaStorage,
        ul: &Layout,
        dy: &CudaStorage,
        dl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let count = gl.shape().elem_count();
        let out = cuda::unwritten(g.device(), 2 * count, g.dtype())?;
        let operands = [(g, gl), (u, ul), (dy, dl)];
        let mut places = Vec::with_capacity(5);
        for (storage, layout) in operands {
            places.push(cuda::place(self.name(), storage, layout)?);
        }
        places.extend([cuda::start(&out), cuda::start(&out).at(count)]);
        cuda::elementwise(g.device(), "swiglu_grad", g.dtype(), &places, count)?;
        Ok((out, Shape::from(2 * count)))
    }
}

/// `silu(gate) * up`, two tensors of one shape.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let op = "swiglu";
    if gate.dims() != up.dims() {
        bail!("{op}: expected up {:?} as gate is, got {:?}", gate.dims(), up.dims())
    }
    match cpu::road_with_cuda(op, &[("gate", gate), ("up", up)])? {
        Road::Kernel => tape::apply2(&gate.contiguous()?, &up.contiguous()?, SwiGlu, Reads::OPERANDS),
        Road::ThroughF32 => swiglu(&cpu::wide(gate)?, &cpu::wide(up)?)?.to_dtype(gate.dtype()),
        Road::Reference => reference(gate, up),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn op(t: &[Tensor]) -> Result<Tensor> {
        swiglu(&t[0], &t[1])
    }

    #[test]
    fn agrees_and_differentiates() {
        for shape in [vec![1], vec![3, 5], vec![2, 3, 17]] {
            let case = [values(&shape, 1), values(&shape, 2)];
            agrees(&case, &op, &|t| reference(&t[0], &t[1]));
            differentiates(&case, &op);
        }
        let large = [values(&[1201, 33], 1), values(&[1201, 33], 2)];
        agrees(&large, &op, &|t| reference(&t[0], &t[1]));
        ignores_threads(&large, &op);
    }

    #[test]
    fn the_tails_stay_finite() {
        let cpu = &candle_core::Device::Cpu;
        let gate = Tensor::new(&[-1000f32, 0.0, 1000.0], cpu).unwrap();
        let up = Tensor::new(&[3f32, 3.0, 3.0], cpu).unwrap();
        assert_eq!(swiglu(&gate, &up).unwrap().to_vec1::<f32>().unwrap(), [0.0, 0.0, 3000.0]);
        let text = refusal(swiglu(&gate, &up.narrow(0, 0, 2).unwrap()));
        assert!(text.contains("swiglu") && text.contains("[3]") && text.contains("[2]"), "{text}");
    }
}
