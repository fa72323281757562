//! Multi-head attention in two ops, heads read by strides.
//!
//! ```text
//! probs  P_h = softmax(scale * q_h k_h^T)     q [B, N, C], k [B, M, C], P [B, H, N, M], d = C / H
//!        dS  = P * (dP - rowsum(dP * P))      dq_h = scale * dS k_h     dk_h = scale * dS^T q_h
//! mix    o_h = P_h v_h                        v [B, M, C], o [B, N, C]
//!        dP_h = do_h v_h^T                    dv_h = P_h^T do_h
//! ```
//!
//! Head h is columns `h*d .. (h+1)*d`. f32 and f64 here, f16 and bf16 through f32. One unit of
//! work is one head forward and one batch entry backward. Source: Vaswani et al. 2017, eq. 1.

use super::cpu::{self, real, Real, Road};
use super::linear::{product, View};
use super::softmax::{self, softmax_rows, softmax_rows_grad};
use candle_core::{bail, CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// `[B, N, C]` to `[B, H, N, d]`.
fn heads_first(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, n, c) = x.dims3()?;
    x.reshape((b, n, heads, c / heads))?.transpose(1, 2)?.contiguous()
}

/// `attention_probs` in plain candle ops.
pub fn reference_probs(q: &Tensor, k: &Tensor, heads: usize, scale: f64) -> Result<Tensor> {
    let (q, k) = (heads_first(q, heads)?, heads_first(k, heads)?);
    softmax::reference(&(q.matmul(&k.t()?.contiguous()?)? * scale)?)
}

/// `attention_mix` in plain candle ops.
pub fn reference_mix(p: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, _, n, _) = p.dims4()?;
    let c = v.dim(2)?;
    p.contiguous()?.matmul(&heads_first(v, heads)?)?.transpose(1, 2)?.contiguous()?.reshape((b, n, c))
}

/// The sizes of one attention.
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

    fn probs<T: Real>(&self, q: &[T], k: &[T], scale: T) -> Vec<T> {
        let &Sizes { heads, n, m, c } = self;
        let mut p = vec![T::ZERO; q.len() / (n * c) * heads * n * m];
        p.par_chunks_mut(n * m).enumerate().for_each(|(i, p)| {
            let (b, h) = (i / heads, i % heads);
            let (q, k) = (self.head(&q[b * n * c..], h), self.head(&k[b * m * c..], h));
            product((n, m, self.d()), p, m, q, k.t(), scale);
            softmax_rows(p, m);
        });
        p
    }

    /// dq, then dk.
    fn probs_grad<T: Real>(&self, q: &[T], k: &[T], p: &[T], g: &[T], scale: T) -> Vec<T> {
        let &Sizes { heads, n, m, c } = self;
        let d = self.d();
        let mut out = vec![T::ZERO; q.len() + k.len()];
        let (dq, dk) = out.split_at_mut(q.len());
        dq.par_chunks_mut(n * c)
            .zip(dk.par_chunks_mut(m * c))
            .zip(q.par_chunks(n * c).zip(k.par_chunks(m * c)))
            .zip(p.par_chunks(heads * n * m).zip(g.par_chunks(heads * n * m)))
            .for_each(|(((dq, dk), (q, k)), (p, g))| {
                let mut ds = vec![T::ZERO; n * m];
                for (h, (p, g)) in p.chunks_exact(n * m).zip(g.chunks_exact(n * m)).enumerate() {
                    softmax_rows_grad(p, g, m, scale, &mut ds);
                    let s = View::rows(&ds, m);
                    product((n, d, m), &mut dq[h * d..], c, s, self.head(k, h), T::ONE);
                    product((m, d, n), &mut dk[h * d..], c, s.t(), self.head(q, h), T::ONE);
                }
            });
        out
    }

    fn mix<T: Real>(&self, p: &[T], v: &[T]) -> Vec<T> {
        let &Sizes { heads, n, m, c } = self;
        let d = self.d();
        let mut o = vec![T::ZERO; v.len() / (m * c) * n * c];
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
        let mut out = vec![T::ZERO; p.len() + v.len()];
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

/// (q, k) to P.
#[derive(Clone, Copy)]
struct Probs {
    sizes: Sizes,
    scale: f64,
}

impl CustomOp2 for Probs {
    fn name(&self) -> &'static str {
        "attention-probs"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        let Sizes { heads, n, m, .. } = self.sizes;
        real!(name, q, T => {
            let (q, k) = (<T as Real>::slice(name, q, ql)?, <T as Real>::slice(name, k, kl)?);
            let p = self.sizes.probs(q, k, self.scale as T);
            Ok((<T as Real>::store(p), Shape::from((ql.dims()[0], heads, n, m))))
        })
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        p: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let packed = q.apply_op3_no_bwd(k, &grad.contiguous()?, &ProbsGrad { of: *self, p: p.clone() })?;
        let dq = cpu::unpack(&packed, 0, q.shape())?;
        Ok((Some(dq), Some(cpu::unpack(&packed, q.elem_count(), k.shape())?)))
    }
}

/// (q, k, dP) to dq and dk in one flat result.
struct ProbsGrad {
    of: Probs,
    p: Tensor,
}

impl CustomOp3 for ProbsGrad {
    fn name(&self) -> &'static str {
        "attention-probs-grad"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
        g: &CpuStorage,
        gl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        let (p, pl) = self.p.storage_and_layout();
        let p = cpu::host(name, &p)?;
        real!(name, q, T => {
            let (q, k) = (<T as Real>::slice(name, q, ql)?, <T as Real>::slice(name, k, kl)?);
            let (p, g) = (<T as Real>::slice(name, p, pl)?, <T as Real>::slice(name, g, gl)?);
            let out = self.of.sizes.probs_grad(q, k, p, g, self.of.scale as T);
            let shape = Shape::from(out.len());
            Ok((<T as Real>::store(out), shape))
        })
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
}

fn check_heads(op: &str, heads: usize, c: usize) -> Result<()> {
    if heads == 0 || c == 0 || !c.is_multiple_of(heads) {
        bail!("{op}: expected a width that {heads} heads divide, got {c}")
    }
    Ok(())
}

/// Attention probabilities `[B, H, N, M]` of `q: [B, N, C]` over `k: [B, M, C]`: softmax over the
/// last axis of `scale * q_h k_h^T`. Errs when the heads do not divide C.
pub fn attention_probs(q: &Tensor, k: &Tensor, heads: usize, scale: f64) -> Result<Tensor> {
    let op = "attention_probs";
    let sizes = match (q.dims(), k.dims()) {
        ([b, n, c], [kb, m, kc]) if b == kb && c == kc && n * m > 0 => Sizes { heads, n: *n, m: *m, c: *c },
        (q, k) => bail!("{op}: expected q [B, N, C] and k [B, M, C], got {q:?} and {k:?}"),
    };
    check_heads(op, heads, sizes.c)?;
    match cpu::road(op, &[("q", q), ("k", k)])? {
        Road::Kernel => q.contiguous()?.apply_op2(&k.contiguous()?, Probs { sizes, scale }),
        Road::ThroughF32 => {
            attention_probs(&cpu::wide(q)?, &cpu::wide(k)?, heads, scale)?.to_dtype(q.dtype())
        }
        Road::Reference => reference_probs(q, k, heads, scale),
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
    match cpu::road(op, &[("p", p), ("v", v)])? {
        Road::Kernel => p.contiguous()?.apply_op2(&v.contiguous()?, Mix { sizes }),
        Road::ThroughF32 => attention_mix(&cpu::wide(p)?, &cpu::wide(v)?, heads)?.to_dtype(p.dtype()),
        Road::Reference => reference_mix(p, v, heads),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    /// (batch, N, M, C, heads): one of everything, primes, one head, head size 1, M != N.
    const CASES: [(usize, usize, usize, usize, usize); 5] =
        [(1, 1, 1, 1, 1), (2, 3, 5, 6, 3), (1, 7, 13, 5, 1), (2, 5, 3, 4, 4), (3, 4, 4, 12, 2)];

    #[test]
    fn probs_agree_and_differentiate() {
        for (b, n, m, c, heads) in CASES {
            let t = [values(&[b, n, c], 1), values(&[b, m, c], 2)];
            let op = |t: &[Tensor]| attention_probs(&t[0], &t[1], heads, 0.7);
            agrees(&t, &op, &|t| reference_probs(&t[0], &t[1], heads, 0.7));
            differentiates(&t, &op);
        }
    }

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
    fn threads_do_not_show() {
        let t = [values(&[9, 50, 24], 1), values(&[9, 50, 24], 2), values(&[9, 50, 24], 3)];
        ignores_threads(&t, &|t| attention_mix(&attention_probs(&t[0], &t[1], 3, 0.35)?, &t[2], 3));
    }

    #[test]
    fn heads_must_divide() {
        let x = values(&[1, 2, 5], 1);
        let text = refusal(attention_probs(&x, &x, 2, 1.0));
        assert!(
            text.contains("attention_probs") && text.contains("2 heads") && text.contains("got 5"),
            "{text}"
        );
        assert!(refusal(attention_mix(&values(&[1, 3, 2, 2], 1), &x, 2)).contains("[1, 3, 2, 2]"));
    }
}
