//! Attention's second half: values mixed by probabilities (the equations are those of [`super`]).

use super::{check_heads, heads_first};
use crate::kernels::cpu::{self, real, Real, Road};
#[cfg(feature = "cuda")]
use crate::kernels::cuda::{self, Matrices, Place};
use crate::kernels::linear::{product, View};
use crate::kernels::tape::{self, Reads};
#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaStorage, DType};
use candle_core::{bail, CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// `attention_mix` in plain candle ops.
pub fn reference_mix(p: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, _, n, _) = p.dims4()?;
    let c = v.dim(2)?;
    p.contiguous()?.matmul(&heads_first(v, heads)?)?.transpose(1, 2)?.contiguous()?.reshape((b, n, c))
}

/// The sizes of one mix.
#[derive(Clone, Copy)]
struct Sizes {
    heads: usize,
    n: usize,
    m: usize,
    c: usize,
}

impl Sizes {
    fn d(&self) -> usize {
        self.c / self.heads
    }

    /// Head `h` of the batch entry that starts at `x`: a view on columns `h*d ..`.
    fn head<'a, T>(&self, x: &'a [T], h: usize) -> View<'a, T> {
        View { data: &x[h * self.d()..], rs: self.c, cs: 1 }
    }

    fn mix<T: Real>(&self, p: &[T], v: &[T]) -> Vec<T> {
        let &Sizes { heads, n, m, c } = self;
        let d = self.d();
        let mut o = cpu::unwritten(v.len() / (m * c) * n * c);
        o.par_chunks_mut(n * c).zip(p.par_chunks(heads * n * m).zip(v.par_chunks(m * c))).for_each(
            |(o, (p, v))| {
                for (h, p) in p.chunks_exact(n * m).enumerate() {
                    product((n, d, m), &mut o[h * d..], c, View::rows(p, m), self.head(v, h), T::ONE);
                }
            },
        );
        o
    }

    /// dp, then dv.
    fn mix_grad<T: Real>(&self, p: &[T], v: &[T], g: &[T]) -> Vec<T> {
        let &Sizes { heads, n, m, c } = self;
        let d = self.d();
        let mut out = cpu::unwritten(p.len() + v.len());
        let (dp, dv) = out.split_at_mut(p.len());
        dp.par_chunks_mut(heads * n * m)
            .zip(dv.par_chunks_mut(m * c))
            .zip(p.par_chunks(heads * n * m).zip(v.par_chunks(m * c)))
            .zip(g.par_chunks(n * c))
            .for_each(|(((dp, dv), (p, v)), g)| {
                for (h, (dp, p)) in dp.chunks_exact_mut(n * m).zip(p.chunks_exact(n * m)).enumerate() {
                    let g = self.head(g, h);
                    product((n, m, d), dp, m, g, self.head(v, h).t(), T::ONE);
                    product((m, d, n), &mut dv[h * d..], c, View::rows(p, m).t(), g, T::ONE);
                }
            });
        out
    }
}

#[cfg(feature = "cuda")]
impl Sizes {
    /// `[N, M]` of each entry and head, as P.
    fn squares(&self, at: Place, dtype: DType) -> Matrices {
        let &Sizes { heads, n, m, .. } = self;
        Matrices::rows(at, dtype, m, (heads * n * m, n * m))
    }

    /// `[rows, d]` of each entry and head: columns of wider rows.
    fn heads(&self, at: Place, dtype: DType, rows: usize) -> Matrices {
        Matrices::rows(at, dtype, self.c, (rows * self.c, self.d()))
    }
}

/// (P, v) to o.
#[derive(Clone, Copy)]
struct Mix {
    sizes: Sizes,
}

impl CustomOp2 for Mix {
    fn name(&self) -> &'static str {
        "attention-mix"
    }

    fn cpu_fwd(
        &self,
        p: &CpuStorage,
        pl: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        real!(name, p, T => {
            let (p, v) = (<T as Real>::slice(name, p, pl)?, <T as Real>::slice(name, v, vl)?);
            let shape = Shape::from((vl.dims()[0], self.sizes.n, self.sizes.c));
            Ok((<T as Real>::store(self.sizes.mix(p, v)), shape))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        p: &CudaStorage,
        pl: &Layout,
        v: &CudaStorage,
        vl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (name, sizes) = (self.name(), &self.sizes);
        let &Sizes { heads, n, m, c } = sizes;
        let (batch, dtype) = (vl.dims()[0], p.dtype());
        let shape = Shape::from((batch, n, c));
        let o = cuda::unwritten(p.device(), &shape, dtype)?;
        let operands = [
            sizes.squares(cuda::place(name, p, pl)?, dtype),
            sizes.heads(cuda::place(name, v, vl)?, dtype, m),
            sizes.heads(cuda::start(&o), dtype, n),
        ];
        // SAFETY: P is [batch, heads, n, m], v [batch, m, c] and o [batch, n, c]; heads of o do not overlap.
        unsafe { cuda::product(p.device(), (n, sizes.d(), m), (batch, heads), operands, (1.0, 0.0))? };
        Ok((o, shape))
    }

    fn bwd(
        &self,
        p: &Tensor,
        v: &Tensor,
        _o: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let packed = p.apply_op3_no_bwd(v, &grad.contiguous()?, &MixGrad(*self))?;
        let dp = cpu::unpack(&packed, 0, p.shape())?;
        Ok((Some(dp), Some(cpu::unpack(&packed, p.elem_count(), v.shape())?)))
    }
}

/// (P, v, do) to dP and dv in one flat result.
struct MixGrad(Mix);

impl CustomOp3 for MixGrad {
    fn name(&self) -> &'static str {
        "attention-mix-grad"
    }

    fn cpu_fwd(
        &self,
        p: &CpuStorage,
        pl: &Layout,
        v: &CpuStorage,
        vl: &Layout,
        g: &CpuStorage,
        gl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        real!(name, p, T => {
            let (p, v) = (<T as Real>::slice(name, p, pl)?, <T as Real>::slice(name, v, vl)?);
            let out = self.0.sizes.mix_grad(p, v, <T as Real>::slice(name, g, gl)?);
            let shape = Shape::from(out.len());
            Ok((<T as Real>::store(out), shape))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        p: &CudaStorage,
        pl: &Layout,
        v: &CudaStorage,
        vl: &Layout,
        g: &CudaStorage,
        gl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (name, sizes) = (self.name(), &self.0.sizes);
        let &Sizes { heads, n, m, .. } = sizes;
        let (device, dtype, d) = (p.device(), p.dtype(), sizes.d());
        let (np, nv) = (pl.shape().elem_count(), vl.shape().elem_count());
        let shape = Shape::from(np + nv);
        let out = cuda::unwritten(device, &shape, dtype)?;
        let at = cuda::start(&out);
        let p = sizes.squares(cuda::place(name, p, pl)?, dtype);
        let v = sizes.heads(cuda::place(name, v, vl)?, dtype, m);
        let g = sizes.heads(cuda::place(name, g, gl)?, dtype, n);
        let (dp, dv) = (sizes.squares(at, dtype), sizes.heads(at.at(np), dtype, m));
        let batch = (vl.dims()[0], heads);
        // SAFETY: P and dP are [batch, heads, n, m], v and dv [batch, m, c], do [batch, n, c]; heads of dv do not
        // overlap.
        unsafe {
            cuda::product(device, (n, m, d), batch, [g, v.t(), dp], (1.0, 0.0))?;
            cuda::product(device, (m, d, n), batch, [p.t(), g, dv], (1.0, 0.0))?;
        }
        Ok((out, shape))
    }
}

/// The mixed values `[B, N, C]` of `p: [B, H, N, M]` and `v: [B, M, C]`. Errs when the heads do
/// not divide C.
pub fn attention_mix(p: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor> {
    let op = "attention_mix";
    let sizes = match (p.dims(), v.dims()) {
        ([b, h, n, m], [vb, vm, c]) if b == vb && m == vm && *h == heads && n * m > 0 => {
            Sizes { heads, n: *n, m: *m, c: *c }
        }
        (p, v) => bail!("{op}: expected p [B, {heads}, N, M] and v [B, M, C], got {p:?} and {v:?}"),
    };
    check_heads(op, heads, sizes.c)?;
    match cpu::road_with_cuda(op, &[("p", p), ("v", v)])? {
        Road::Kernel => tape::apply2(&p.contiguous()?, &v.contiguous()?, Mix { sizes }, Reads::OPERANDS),
        Road::ThroughF32 => attention_mix(&cpu::wide(p)?, &cpu::wide(v)?, heads)?.to_dtype(p.dtype()),
        Road::Reference => reference_mix(p, v, heads),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::CASES;
    use super::*;
    use crate::kernels::testing::*;

    #[test]
    fn mix_agrees_and_differentiates() {
        for (b, n, m, c, heads) in CASES {
            let t = [values(&[b, heads, n, m], 1), values(&[b, m, c], 2)];
            let op = |t: &[Tensor]| attention_mix(&t[0], &t[1], heads);
            agrees(&t, &op, &|t| reference_mix(&t[0], &t[1], heads));
            differentiates(&t, &op);
        }
    }

    #[test]
    fn heads_must_divide() {
        let x = values(&[1, 2, 5], 1);
        assert!(refusal(attention_mix(&values(&[1, 3, 2, 2], 1), &x, 2)).contains("[1, 3, 2, 2]"));
    }
}
