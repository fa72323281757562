//! Causal attention of grouped heads over spans of tokens, in one op.
//!
//! ```text
//! P_h = softmax(scale * q_h k_g^T over the keys that t may see)     g = h / (H / G)
//! o_h = P_h v_g         dP_h = do_h v_g^T        dS = P * (dP - rowsum(dP * P))
//! dq_h = scale dS k_g   dk_g = scale sum_h dS^T q_h     dv_g = sum_h P_h^T do_h
//! ```
//!
//! q is `[B, T, H*d]`, k and v are `[B, S, G*d]`, o as q; G divides H. The last query stands at the last
//! key, and query t sees the keys from `starts[b, t]` on up to its own, so that one number a token says
//! everything: samples packed into one row, padding, a sliding window. Probabilities are made by blocks of
//! queries and made again going backward, so memory does not grow with `T * S`.
//!
//! On the CPU f32 and f64, f16 and bf16 through f32; on a CUDA device f32, f16 and bf16 (kernels/attention.cu and
//! attention_f32.cu), heads of up to 256 columns. Source: Vaswani et al. 2017, eq. 1; grouped heads: Ainslie et al.
//! 2023; recomputation: Dao et al. 2022.

use crate::kernels::tape::{self, Reads};
use std::sync::Arc;

#[cfg(feature = "cuda")]
use super::flash;
use crate::kernels::cpu::{self, real, Real, Road};
use crate::kernels::linear::{add_product, product, View};
use crate::kernels::softmax::{self, softmax_rows, softmax_rows_grad};
use candle_core::{bail, CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, Device};
use rayon::prelude::*;

/// Queries whose probabilities are held at a time. Part of the numerics.
const BLOCK: usize = 64;

/// `causal_attention` in plain candle ops.
pub fn reference_causal(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    (heads, groups): (usize, usize),
    scale: f64,
    starts: &[u32],
) -> Result<Tensor> {
    let (b, t, c) = q.dims3()?;
    let (s, d) = (k.dim(1)?, c / heads);
    let each = heads / groups;
    let spread = |x: &Tensor| {
        let x = x.reshape((b, s, groups, 1, d))?.broadcast_as((b, s, groups, each, d))?;
        x.reshape((b, s, heads, d))?.transpose(1, 2)?.contiguous()
    };
    let q = q.reshape((b, t, heads, d))?.transpose(1, 2)?.contiguous()?;
    let (k, v) = (spread(k)?, spread(v)?);
    let logits = (q.matmul(&k.t()?.contiguous()?)? * scale)?;
    let mut mask = vec![0f32; b * t * s];
    for (row, (mask, &start)) in mask.chunks_exact_mut(s).zip(starts).enumerate() {
        let own = row % t + s - t;
        for (j, m) in mask.iter_mut().enumerate() {
            if j < start as usize || j > own {
                *m = f32::NEG_INFINITY;
            }
        }
    }
    let mask = Tensor::from_vec(mask, (b, 1, t, s), q.device())?.to_dtype(q.dtype())?;
    let probs = softmax::reference(&logits.broadcast_add(&mask)?)?;
    probs.matmul(&v)?.transpose(1, 2)?.reshape((b, t, c))
}

#[derive(Clone)]
struct Causal {
    heads: usize,
    groups: usize,
    scale: f64,
    starts: Arc<[u32]>,
    #[cfg(feature = "cuda")]
    kept: flash::Kept,
}

#[cfg(feature = "cuda")]
impl Causal {
    fn call(&self, q: &Shape, k: &Shape) -> Result<flash::Call> {
        let ((batch, queries, width), (_, keys, _)) = (q.dims3()?, k.dims3()?);
        let (heads, groups, scale) = (self.heads, self.groups, self.scale);
        Ok(flash::Call { batch, heads, groups, queries, keys, depth: width / heads, bias: None, scale })
    }
}

/// The sizes of one call.
#[derive(Clone, Copy)]
struct Sizes {
    t: usize,
    s: usize,
    d: usize,
    heads: usize,
    groups: usize,
}

/// A block of queries and the keys that any of them sees.
struct Rows {
    from: usize,
    count: usize,
    low: usize,
    keys: usize,
}

impl Sizes {
    fn of(op: &Causal, q: &Layout, k: &Layout) -> Result<Self> {
        let (_, t, c) = q.shape().dims3()?;
        let (_, s, _) = k.shape().dims3()?;
        Ok(Sizes { t, s, d: c / op.heads, heads: op.heads, groups: op.groups })
    }

    /// Query heads that share a key head.
    fn each(&self) -> usize {
        self.heads / self.groups
    }

    fn block(&self, starts: &[u32], from: usize) -> Rows {
        let count = BLOCK.min(self.t - from);
        let own = from + self.s - self.t;
        let low = starts[from..from + count].iter().copied().min().unwrap_or(0) as usize;
        let low = low.min(own);
        Rows { from, count, low, keys: own + count - low }
    }

    /// Columns of head `h` of rows from `from` on.
    fn head<'a, T>(&self, x: &'a [T], heads: usize, from: usize, h: usize) -> View<'a, T> {
        View { data: &x[from * heads * self.d + h * self.d..], rs: heads * self.d, cs: 1 }
    }

    /// The probabilities of a block of one head.
    fn probs<T: Real>(&self, rows: &Rows, starts: &[u32], q: View<T>, k: View<T>, scale: T, p: &mut Vec<T>) {
        p.clear();
        p.resize(rows.count * rows.keys, T::ZERO);
        product((rows.count, rows.keys, self.d), p, rows.keys, q, k.t(), scale);
        let hidden = T::from_f64(f64::NEG_INFINITY);
        for (i, (p, &start)) in p.chunks_exact_mut(rows.keys).zip(&starts[rows.from..]).enumerate() {
            let own = rows.from + i + self.s - self.t - rows.low;
            let start = (start as usize).saturating_sub(rows.low).min(own);
            p[..start].fill(hidden);
            p[own + 1..].fill(hidden);
        }
        softmax_rows(p, rows.keys);
    }

    fn forward<T: Real>(&self, [q, k, v]: [&[T]; 3], starts: &[u32], scale: T) -> Vec<T> {
        let &Sizes { t, s, d, heads, groups } = self;
        let (qs, ks) = (t * heads * d, s * groups * d);
        let blocks = t.div_ceil(BLOCK);
        let mut out = cpu::unwritten(q.len());
        // A task is a block of queries of one batch entry, whose rows of the result lie together.
        let mut tasks = Vec::with_capacity(q.len() / qs.max(1) * blocks);
        for (b, entry) in out.chunks_mut(qs.max(1)).enumerate() {
            tasks.extend(entry.chunks_mut(BLOCK * heads * d).enumerate().map(|(i, o)| (b, i * BLOCK, o)));
        }
        tasks.into_par_iter().for_each(|(b, from, out)| {
            let (q, k, v) = (&q[b * qs..(b + 1) * qs], &k[b * ks..(b + 1) * ks], &v[b * ks..(b + 1) * ks]);
            let starts = &starts[b * t..(b + 1) * t];
            let rows = self.block(starts, from);
            let mut p = Vec::new();
            for h in 0..heads {
                let g = h / self.each();
                let (qh, kh) = (self.head(q, heads, from, h), self.head(k, groups, rows.low, g));
                self.probs(&rows, starts, qh, kh, scale, &mut p);
                let vh = self.head(v, groups, rows.low, g);
                let sizes = (rows.count, d, rows.keys);
                product(sizes, &mut out[h * d..], heads * d, View::rows(&p, rows.keys), vh, T::ONE);
            }
        });
        out
    }

    /// The gradients of one key head of one batch entry: dq `[T, each * d]`, dk and dv `[S, d]`.
    fn group_grad<T: Real>(
        &self,
        [q, k, v, go]: [&[T]; 4],
        starts: &[u32],
        (g, scale): (usize, T),
        [dq, dk, dv]: [&mut [T]; 3],
    ) {
        let &Sizes { t, d, heads, groups, .. } = self;
        let each = self.each();
        let (mut p, mut dp, mut ds) = (Vec::new(), Vec::new(), Vec::new());
        for h in 0..each {
            for from in (0..t).step_by(BLOCK) {
                let rows = self.block(starts, from);
                let size = rows.count * rows.keys;
                let qh = self.head(q, heads, from, g * each + h);
                let oh = self.head(go, heads, from, g * each + h);
                let (kh, vh) = (self.head(k, groups, rows.low, g), self.head(v, groups, rows.low, g));
                self.probs(&rows, starts, qh, kh, scale, &mut p);
                dp.clear();
                dp.resize(size, T::ZERO);
                product((rows.count, rows.keys, d), &mut dp, rows.keys, oh, vh.t(), T::ONE);
                ds.clear();
                ds.resize(size, T::ZERO);
                softmax_rows_grad(&p, &dp, rows.keys, scale, &mut ds);
                let (pv, sv) = (View::rows(&p, rows.keys), View::rows(&ds, rows.keys));
                let sizes = (rows.count, d, rows.keys);
                product(sizes, &mut dq[from * each * d + h * d..], each * d, sv, kh, T::ONE);
                let sizes = (rows.keys, d, rows.count);
                add_product(sizes, &mut dk[rows.low * d..], d, sv.t(), qh);
                add_product(sizes, &mut dv[rows.low * d..], d, pv.t(), oh);
            }
        }
    }

    /// dq, then dk, then dv, each in the layout of its operand.
    fn backward<T: Real>(&self, [q, k, v, go]: [&[T]; 4], starts: &[u32], scale: T) -> Vec<T> {
        let &Sizes { t, s, d, heads, groups } = self;
        let (qs, ks, each) = (t * heads * d, s * groups * d, self.each());
        let (own_q, own_k) = (t * each * d, s * d);
        // Head by head first, so that every task has its results to itself.
        let mut apart = vec![T::ZERO; q.len() + 2 * k.len()];
        let (dq, rest) = apart.split_at_mut(q.len());
        let (dk, dv) = rest.split_at_mut(k.len());
        dq.par_chunks_mut(own_q)
            .zip(dk.par_chunks_mut(own_k).zip(dv.par_chunks_mut(own_k)))
            .enumerate()
            .for_each(|(i, (dq, (dk, dv)))| {
                let (b, g) = (i / groups, i % groups);
                let (at_q, at_k) = (b * qs..(b + 1) * qs, b * ks..(b + 1) * ks);
                let operands = [&q[at_q.clone()], &k[at_k.clone()], &v[at_k], &go[at_q]];
                self.group_grad(operands, &starts[b * t..(b + 1) * t], (g, scale), [dq, dk, dv]);
            });
        let mut out = cpu::unwritten(q.len() + 2 * k.len());
        let (oq, rest) = out.split_at_mut(q.len());
        let (ok, ov) = rest.split_at_mut(k.len());
        interleave(dq, oq, (t, groups, each * d));
        interleave(dk, ok, (s, groups, d));
        interleave(dv, ov, (s, groups, d));
        out
    }
}

/// `[B, groups, rows, width]` to `[B, rows, groups, width]`.
fn interleave<T: Real>(from: &[T], to: &mut [T], (rows, groups, width): (usize, usize, usize)) {
    let entry = (rows * groups * width).max(1);
    to.par_chunks_mut(entry).zip(from.par_chunks(entry)).for_each(|(to, from)| {
        for (g, from) in from.chunks_exact(rows * width).enumerate() {
            for (row, from) in from.chunks_exact(width).enumerate() {
                let at = (row * groups + g) * width;
                to[at..at + width].copy_from_slice(from);
            }
        }
    });
}

impl CustomOp3 for Causal {
    fn name(&self) -> &'static str {
        "causal-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        let sizes = Sizes::of(self, ql, kl)?;
        real!(name, q, T => {
            let (q, k) = (<T as Real>::slice(name, q, ql)?, <T as Real>::slice(name, k, kl)?);
            let v = <T as Real>::slice(name, v, vl)?;
            let o = sizes.forward([q, k, v], &self.starts, self.scale as T);
            Ok((<T as Real>::store(o), ql.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        ql: &Layout,
        k: &CudaStorage,
        kl: &Layout,
        v: &CudaStorage,
        vl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let call = self.call(ql.shape(), kl.shape())?;
        // A query alone, as in decoding, sees all keys, which the kernels know without being told.
        let all = call.queries == 1 && self.starts.iter().all(|&start| start == 0);
        let starts = Some(&self.starts).filter(|_| !all);
        call.forward(self.name(), [(q, ql), (k, kl), (v, vl)], None, starts, &self.kept)
    }

    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        o: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if q.device().is_cuda() {
            let call = self.call(q.shape(), k.shape())?;
            let [dq, dk, dv, _] = call.gradients([q, k, v], None, o, grad, (&self.kept, false))?;
            return Ok((dq, dk, dv));
        }
        let op = CausalGrad { op: self.clone(), grad: grad.contiguous()? };
        let packed = q.apply_op3_no_bwd(k, v, &op)?;
        let (nq, nk) = (q.elem_count(), k.elem_count());
        Ok((
            Some(cpu::unpack(&packed, 0, q.shape())?),
            Some(cpu::unpack(&packed, nq, k.shape())?),
            Some(cpu::unpack(&packed, nq + nk, v.shape())?),
        ))
    }
}

/// (q, k, v) to dq, dk and dv in one flat result.
struct CausalGrad {
    op: Causal,
    grad: Tensor,
}

impl CustomOp3 for CausalGrad {
    fn name(&self) -> &'static str {
        "causal-attention-grad"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        let sizes = Sizes::of(&self.op, ql, kl)?;
        let (grad, gl) = self.grad.storage_and_layout();
        let grad = cpu::host(name, &grad)?;
        real!(name, q, T => {
            let (q, k) = (<T as Real>::slice(name, q, ql)?, <T as Real>::slice(name, k, kl)?);
            let (v, g) = (<T as Real>::slice(name, v, vl)?, <T as Real>::slice(name, grad, gl)?);
            let out = sizes.backward([q, k, v, g], &self.op.starts, self.op.scale as T);
            let shape = Shape::from(out.len());
            Ok((<T as Real>::store(out), shape))
        })
    }
}

#[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
fn road(op: &str, causal: &Causal, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Road> {
    let named = [("q", q), ("k", k), ("v", v)];
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = q.device() {
        if causal.call(q.shape(), k.shape())?.runs(device, q.dtype())? {
            return cpu::road_with_cuda(op, &named);
        }
    }
    cpu::road(op, &named)
}

/// Attention of `q: [B, T, heads * d]` over `k, v: [B, S, groups * d]`, S at least T, `[B, T, heads * d]`.
/// Query t of batch entry b sees the keys `starts[b * T + t] ..= t + S - T`.
pub fn causal_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    (heads, groups): (usize, usize),
    scale: f64,
    starts: &Arc<[u32]>,
) -> Result<Tensor> {
    let op = "causal_attention";
    let (b, t, c) = q.dims3()?;
    let (kb, s, kc) = k.dims3()?;
    let divides = |n: usize, of: usize| n > 0 && of.is_multiple_of(n);
    if !divides(groups, heads) || !divides(heads, c) || c == 0 || t == 0 {
        bail!("{op}: expected {groups} groups to divide {heads} heads, and these a width, got {c}")
    }
    if kb != b || s < t || kc != c / heads * groups || v.dims() != k.dims() {
        let (want, k, v) = (c / heads * groups, k.dims(), v.dims());
        bail!("{op}: expected k and v [{b}, {t} or more, {want}], got {k:?} and {v:?}")
    }
    if starts.len() != b * t {
        bail!("{op}: expected {} starts, got {}", b * t, starts.len())
    }
    if let Some((i, start)) = starts.iter().enumerate().find(|(i, s0)| **s0 as usize > i % t + s - t) {
        bail!("{op}: expected token {i} to see itself, got a start of {start}")
    }
    let causal = Causal {
        heads,
        groups,
        scale,
        starts: starts.clone(),
        #[cfg(feature = "cuda")]
        kept: flash::Kept::default(),
    };
    match road(op, &causal, q, k, v)? {
        Road::Kernel => {
            // On a CUDA device backward measures dP from the rows of do * o.
            let reads = if q.device().is_cuda() { Reads::ALL } else { Reads::OPERANDS };
            tape::apply3(&q.contiguous()?, &k.contiguous()?, &v.contiguous()?, causal, reads)
        }
        Road::ThroughF32 => {
            let (k, v) = (cpu::wide(k)?, cpu::wide(v)?);
            causal_attention(&cpu::wide(q)?, &k, &v, (heads, groups), scale, starts)?.to_dtype(q.dtype())
        }
        Road::Reference => reference_causal(q, k, v, (heads, groups), scale, starts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::*;

    /// (B, T, S, heads, groups, d, window): odd sizes, more keys than queries, a block and a half.
    const CASES: [(usize, usize, usize, usize, usize, usize, usize); 6] = [
        (1, 1, 1, 1, 1, 1, 9),
        (2, 5, 5, 4, 2, 3, 9),
        (1, 3, 7, 3, 1, 2, 9),
        (2, 7, 9, 2, 2, 5, 3),
        (1, 97, 97, 2, 1, 4, 200),
        (1, 70, 90, 2, 1, 2, 20),
    ];

    fn starts(b: usize, t: usize, s: usize, window: usize) -> Arc<[u32]> {
        // Two segments in the second half of the keys, and a window.
        let of = |t0: usize| {
            let own = t0 + s - t;
            let segment = if own > s / 2 { s / 2 + 1 } else { 0 };
            segment.max((own + 1).saturating_sub(window)) as u32
        };
        (0..b).flat_map(|_| (0..t).map(of)).collect()
    }

    #[test]
    fn agrees_and_differentiates() {
        for (b, t, s, heads, groups, d, window) in CASES {
            let case = [
                values(&[b, t, heads * d], 1),
                values(&[b, s, groups * d], 2),
                values(&[b, s, groups * d], 3),
            ];
            let starts = starts(b, t, s, window);
            let sizes = (heads, groups);
            let op = |x: &[Tensor]| causal_attention(&x[0], &x[1], &x[2], sizes, 0.4, &starts);
            agrees(&case, &op, &|x| reference_causal(&x[0], &x[1], &x[2], sizes, 0.4, &starts));
            if t < 50 {
                differentiates(&case, &op);
            }
            ignores_threads(&case, &op);
        }
    }

    #[test]
    fn nothing_crosses_a_border() {
        // The second segment's results do not change when the first one's keys do.
        let (q, k, v) = (values(&[1, 6, 4], 1), values(&[1, 6, 4], 2), values(&[1, 6, 4], 3));
        let starts: Arc<[u32]> = [0, 0, 0, 3, 3, 3].into();
        let run = |k: &Tensor, v: &Tensor| causal_attention(&q, k, v, (2, 2), 1.0, &starts).unwrap();
        let other =
            |x: &Tensor| Tensor::cat(&[values(&[1, 3, 4], 9), x.narrow(1, 3, 3).unwrap()], 1).unwrap();
        let (a, b) = (run(&k, &v), run(&other(&k), &other(&v)));
        let tail = |x: &Tensor| flat(&x.narrow(1, 3, 3).unwrap());
        assert_eq!(tail(&a), tail(&b));
        assert_ne!(flat(&a), flat(&b));
    }

    #[test]
    fn wrong_shapes_are_named() {
        let (q, k) = (values(&[1, 3, 4], 1), values(&[1, 2, 4], 2));
        let text = refusal(causal_attention(&q, &k, &k, (2, 2), 1.0, &[0, 0, 0].into()));
        assert!(text.contains("3 or more") && text.contains("[1, 2, 4]"), "{text}");
        let text = refusal(causal_attention(&q, &q, &q, (2, 2), 1.0, &[0, 2, 0].into()));
        assert!(text.contains("token 1") && text.contains("start of 2"), "{text}");
    }
}
