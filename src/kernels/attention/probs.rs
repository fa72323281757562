//! Attention's first half: probabilities of queries over keys (the equations are those of [`super`]).
//!
//! On the CPU one unit of work is one head forward and one batch entry backward. A bias's gradient is summed
//! in parts of the batch that depend on the shapes alone, and the parts in order.

#[cfg(feature = "cuda")]
use super::flash;
use super::{check_heads, heads_first};
use crate::kernels::cpu::{self, real, simd, Real, Road};
#[cfg(feature = "cuda")]
use crate::kernels::cuda::{self, Launch, Matrices, Place};
use crate::kernels::linear::{add_product, product, View};
use crate::kernels::softmax::{self, softmax_rows, softmax_rows_grad};
use crate::kernels::tape::{self, Reads};
#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaDevice, CudaStorage, DType};
use candle_core::{bail, CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// `attention_probs` in plain candle ops.
pub fn reference_probs(
    q: &Tensor,
    k: &Tensor,
    heads: usize,
    scale: f64,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let (b, n, c) = q.dims3()?;
    let k = heads_first(k, heads)?;
    let q = match c == k.dim(3)? && heads > 1 {
        true => q.unsqueeze(1)?.broadcast_as((b, heads, n, c))?.contiguous()?,
        false => heads_first(q, heads)?,
    };
    let mut logits = (q.matmul(&k.t()?.contiguous()?)? * scale)?;
    if let Some(bias) = bias {
        let (groups, h, _, m) = bias.dims4()?;
        let by_group = logits.reshape((b / groups, groups, h, n, m))?;
        logits = by_group.broadcast_add(&bias.unsqueeze(0)?)?.reshape((b, h, n, m))?;
    }
    softmax::reference(&logits)
}

/// The sizes of one attention.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub batch: usize,
    pub heads: usize,
    pub n: usize,
    pub m: usize,
    pub d: usize,
    /// Whether all heads read the same query.
    pub shared: bool,
    /// The bias's groups and rows, where there is one.
    pub bias: Option<(usize, usize)>,
}

/// Query and key, and the probabilities; of a bias the shape.
const PROBS: Reads = Reads { operands: &[true, true, false], result: true };

/// Parts of the batch over which a bias's gradient is summed. Part of the numerics.
const PARTS: usize = 16;

simd! {
    /// Adds rows of `b` onto those of `x`, one row of `b` onto all where it has only one.
    fn add_bias<T>(x: &mut [T], b: &[T], width: usize) {
        if b.len() == width {
            for row in x.chunks_exact_mut(width) {
                for (x, &b) in row.iter_mut().zip(b) {
                    *x += b;
                }
            }
        } else {
            for (x, &b) in x.iter_mut().zip(b) {
                *x += b;
            }
        }
    }
}

simd! {
    /// The other way: rows of `x` added onto those of `b`.
    fn sum_bias<T>(x: &[T], b: &mut [T], width: usize) {
        if b.len() == width {
            for row in x.chunks_exact(width) {
                for (&x, b) in row.iter().zip(b.iter_mut()) {
                    *b += x;
                }
            }
        } else {
            for (&x, b) in x.iter().zip(b) {
                *b += x;
            }
        }
    }
}

impl Sizes {
    /// Columns of a row of q.
    fn q_cols(&self) -> usize {
        if self.shared {
            self.d
        } else {
            self.heads * self.d
        }
    }

    fn query<'a, T>(&self, q: &'a [T], h: usize) -> View<'a, T> {
        let from = if self.shared { 0 } else { h * self.d };
        View { data: &q[from..], rs: self.q_cols(), cs: 1 }
    }

    fn key<'a, T>(&self, k: &'a [T], h: usize) -> View<'a, T> {
        View { data: &k[h * self.d..], rs: self.heads * self.d, cs: 1 }
    }

    /// The bias of batch entry `b`, head `h`.
    fn bias_at(&self, b: usize, h: usize) -> std::ops::Range<usize> {
        let (groups, rows) = self.bias.unwrap_or((1, 0));
        let size = rows * self.m;
        let at = (b % groups * self.heads + h) * size;
        at..at + size
    }

    fn probs<T: Real>(&self, q: &[T], k: &[T], bias: &[T], scale: T) -> Vec<T> {
        let &Sizes { heads, n, m, d, .. } = self;
        let (qs, ks) = (n * self.q_cols(), m * heads * d);
        let mut p = cpu::unwritten(self.batch * heads * n * m);
        p.par_chunks_mut(n * m).enumerate().for_each(|(i, p)| {
            let (b, h) = (i / heads, i % heads);
            let (q, k) = (self.query(&q[b * qs..(b + 1) * qs], h), self.key(&k[b * ks..(b + 1) * ks], h));
            product((n, m, d), p, m, q, k.t(), scale);
            if self.bias.is_some() {
                add_bias(p, &bias[self.bias_at(b, h)], m);
            }
            softmax_rows(p, m);
        });
        p
    }

    /// The gradients of one batch entry, shown the gradient of each head's logits before it is scaled.
    fn entry_grad<T: Real>(
        &self,
        [q, k, p, g]: [&[T]; 4],
        scale: T,
        dq: &mut [T],
        dk: &mut [T],
        mut see: impl FnMut(usize, &[T]),
    ) {
        let &Sizes { heads, n, m, d, .. } = self;
        let mut ds = cpu::unwritten(n * m);
        // Without a bias the scale goes in before the products, which saves a pass over nothing.
        let (early, late) = if self.bias.is_some() { (T::ONE, scale) } else { (scale, T::ONE) };
        for (h, (p, g)) in p.chunks_exact(n * m).zip(g.chunks_exact(n * m)).enumerate() {
            softmax_rows_grad(p, g, m, early, &mut ds);
            see(h, &ds);
            let s = View::rows(&ds, m);
            product((m, d, n), &mut dk[h * d..], heads * d, s.t(), self.query(q, h), late);
            if self.shared && h > 0 {
                if self.bias.is_some() {
                    ds.iter_mut().for_each(|v| *v *= late);
                }
                add_product((n, d, m), dq, d, View::rows(&ds, m), self.key(k, h));
            } else {
                let from = if self.shared { 0 } else { h * d };
                product((n, d, m), &mut dq[from..], self.q_cols(), s, self.key(k, h), late);
            }
        }
    }

    /// dq, then dk, then dbias.
    fn probs_grad<T: Real>(&self, q: &[T], k: &[T], p: &[T], g: &[T], scale: T) -> Vec<T> {
        let &Sizes { batch, heads, n, m, d, .. } = self;
        let (qs, ks, ps) = (n * self.q_cols(), m * heads * d, heads * n * m);
        let (groups, rows) = self.bias.unwrap_or((1, 0));
        let size = groups * heads * rows * m;
        // The products write all of dq and dk before they read it.
        let mut out = cpu::unwritten(q.len() + k.len() + size);
        let (dq, rest) = out.split_at_mut(q.len());
        let (dk, dbias) = rest.split_at_mut(k.len());
        dbias.fill(T::ZERO);
        let operands = |b: usize| {
            let at = |size: usize| b * size..(b + 1) * size;
            [&q[at(qs)], &k[at(ks)], &p[at(ps)], &g[at(ps)]]
        };
        let entry = rows * m * heads;
        if size == 0 || groups == batch {
            // Every entry has a bias of its own, or none has one.
            let each = dq.par_chunks_mut(qs).zip(dk.par_chunks_mut(ks)).enumerate();
            if size == 0 {
                each.for_each(|(b, (dq, dk))| self.entry_grad(operands(b), scale, dq, dk, |_, _| {}));
            } else {
                each.zip(dbias.par_chunks_mut(entry)).for_each(|((b, (dq, dk)), dbias)| {
                    self.entry_grad(operands(b), scale, dq, dk, |h, ds| {
                        sum_bias(ds, &mut dbias[h * rows * m..(h + 1) * rows * m], m);
                    });
                });
            }
            return out;
        }
        let part = batch.div_ceil(PARTS);
        let mut partial = vec![T::ZERO; batch.div_ceil(part) * size];
        dq.par_chunks_mut(part * qs)
            .zip(dk.par_chunks_mut(part * ks))
            .zip(partial.par_chunks_mut(size))
            .enumerate()
            .for_each(|(i, ((dq, dk), dbias))| {
                for (j, (dq, dk)) in dq.chunks_exact_mut(qs).zip(dk.chunks_exact_mut(ks)).enumerate() {
                    let b = i * part + j;
                    self.entry_grad(operands(b), scale, dq, dk, |h, ds| {
                        sum_bias(ds, &mut dbias[self.bias_at(b, h)], m);
                    });
                }
            });
        for partial in partial.chunks_exact(size) {
            cpu::add_rows(partial, dbias);
        }
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

    /// The queries of each entry and head, `[N, d]`: columns of wider rows, or the same for all heads.
    fn queries(&self, at: Place, dtype: DType) -> Matrices {
        let columns = self.q_cols();
        Matrices::rows(at, dtype, columns, (self.n * columns, if self.shared { 0 } else { self.d }))
    }

    /// The keys, `[M, d]`.
    fn all_keys(&self, at: Place, dtype: DType) -> Matrices {
        let columns = self.heads * self.d;
        Matrices::rows(at, dtype, columns, (self.m * columns, self.d))
    }

    fn probs_on_cuda(
        &self,
        device: &CudaDevice,
        dtype: DType,
        (q, k, bias): (Place, Place, Option<Place>),
        scale: f64,
    ) -> Result<CudaStorage> {
        let &Sizes { batch, heads, n, m, d, .. } = self;
        let p = cuda::unwritten(device, (batch, heads, n, m), dtype)?;
        let at = cuda::start(&p);
        let operands = [self.queries(q, dtype), self.all_keys(k, dtype).t(), self.squares(at, dtype)];
        // Scaled before they are rounded to halves: sums over a wide query might be beyond these.
        // SAFETY: q has batch * n rows of q_cols, k batch * m of heads * d elements, P batch * heads * n * m.
        unsafe { cuda::product(device, (n, m, d), (batch, heads), operands, (scale as f32, 0.0))? };
        let (groups, rows) = self.bias.unwrap_or((1, 1));
        let count = batch * heads * n;
        let (launch, grid, block) = softmax::over_rows(device, "attention_probs", dtype, (count, m))?;
        let launch = launch.place(at).maybe(bias).place(at).i64(count).i32(m).i32(heads).i32(n);
        // SAFETY: P has `count` rows of m logits, each of which a block reads before it writes there; a bias is
        // [groups, heads, rows, m]; grid and block are those of the kernel's header.
        unsafe { launch.i32(groups).i32(rows).f32(1.0).run(grid, block, 0)? };
        Ok(p)
    }

    /// dq, dk and dbias to `out`.
    fn probs_grad_on_cuda(
        &self,
        device: &CudaDevice,
        dtype: DType,
        [q, k, p, g]: [Place; 4],
        out: Place,
        scale: f64,
    ) -> Result<()> {
        let &Sizes { batch, heads, n, m, d, .. } = self;
        let ds = cuda::unwritten(device, (batch, heads, n, m), dtype)?;
        let at = cuda::start(&ds);
        softmax::softmax_rows_grad_on_cuda(device, dtype, [p, g, at], (batch * heads * n, m))?;
        let (s, scale) = (self.squares(at, dtype), scale as f32);
        let (nq, nk) = (batch * n * self.q_cols(), batch * m * heads * d);
        let (queries, keys) = (self.queries(q, dtype), self.all_keys(k, dtype));
        let dk = self.all_keys(out.at(nq), dtype);
        // SAFETY, of the products: dS is as P; q and dq have batch * n rows of q_cols, k and dk batch * m of
        // heads * d elements; results do not overlap.
        // SAFETY: as above.
        unsafe { cuda::product(device, (m, d, n), (batch, heads), [s.t(), queries, dk], (scale, 0.0))? };
        if self.shared {
            // Summed over the heads in f32, head after head.
            let apart = (dtype != DType::F32).then(|| cuda::unwritten(device, nq, DType::F32)).transpose()?;
            let sum = self.queries(apart.as_ref().map_or(out, cuda::start), DType::F32);
            for h in 0..heads {
                let of_head = self.squares(at.at(h * n * m), dtype);
                let keys = self.all_keys(k.at(h * d), dtype);
                let beta = if h == 0 { 0.0 } else { 1.0 };
                // SAFETY: as above, of one head; what is summed has the elements of q.
                unsafe { cuda::product(device, (n, d, m), (batch, 1), [of_head, keys, sum], (scale, beta))? };
            }
            if let Some(sums) = apart {
                cuda::fold_columns(device, &sums, out, dtype, (1, nq))?;
            }
        } else {
            let dq = self.queries(out, dtype);
            // SAFETY: as above.
            unsafe { cuda::product(device, (n, d, m), (batch, heads), [s, keys, dq], (scale, 0.0))? };
        }
        let Some((groups, rows)) = self.bias else { return Ok(()) };
        let size = groups * heads * rows * m;
        let (each, parts) = flash::parts(batch / groups, size.div_ceil(256));
        let partial = cuda::unwritten(device, parts * size, DType::F32)?;
        let kernel = format!("attention_bias_grad_{}", cuda::suffix("attention_probs", dtype)?);
        let launch = Launch::new(device, "softmax", kernel).place(at).place(cuda::start(&partial));
        let launch = launch.i32(batch).i32(heads).i32(n).i32(m).i32(groups).i32(rows).i32(each);
        // SAFETY: dS is [batch, heads, n, m]; partial has a bias for each part, a thread for each of its entries.
        unsafe { launch.run((size.div_ceil(256), parts, 1), (256, 1, 1), 0)? };
        cuda::fold_columns(device, &partial, out.at(nq + nk), dtype, (parts, size))
    }
}

/// (q, k) or (q, k, bias) to P.
#[derive(Clone, Copy)]
struct Probs {
    sizes: Sizes,
    scale: f64,
}

impl Probs {
    fn run(
        &self,
        [(q, ql), (k, kl)]: [(&CpuStorage, &Layout); 2],
        bias: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        let name = CustomOp2::name(self);
        let Sizes { batch, heads, n, m, .. } = self.sizes;
        real!(name, q, T => {
            let (q, k) = (<T as Real>::slice(name, q, ql)?, <T as Real>::slice(name, k, kl)?);
            let bias = bias.map(|(b, l)| <T as Real>::slice(name, b, l)).transpose()?.unwrap_or(&[]);
            let p = self.sizes.probs(q, k, bias, self.scale as T);
            Ok((<T as Real>::store(p), Shape::from((batch, heads, n, m))))
        })
    }

    #[cfg(feature = "cuda")]
    fn run_on_cuda(
        &self,
        [(q, ql), (k, kl)]: [(&CudaStorage, &Layout); 2],
        bias: Option<(&CudaStorage, &Layout)>,
    ) -> Result<(CudaStorage, Shape)> {
        let name = CustomOp2::name(self);
        let Sizes { batch, heads, n, m, .. } = self.sizes;
        let bias = bias.map(|(b, l)| cuda::place(name, b, l)).transpose()?;
        let places = (cuda::place(name, q, ql)?, cuda::place(name, k, kl)?, bias);
        let p = self.sizes.probs_on_cuda(q.device(), q.dtype(), places, self.scale)?;
        Ok((p, Shape::from((batch, heads, n, m))))
    }

    /// dq, dk and dbias in one flat result.
    fn gradients(&self, q: &Tensor, k: &Tensor, p: &Tensor, grad: &Tensor) -> Result<Tensor> {
        q.apply_op3_no_bwd(k, &grad.contiguous()?, &ProbsGrad { of: *self, p: p.clone() })
    }
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
        self.run([(q, ql), (k, kl)], None)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        ql: &Layout,
        k: &CudaStorage,
        kl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.run_on_cuda([(q, ql), (k, kl)], None)
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        p: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let packed = self.gradients(q, k, p, grad)?;
        let dq = cpu::unpack(&packed, 0, q.shape())?;
        Ok((Some(dq), Some(cpu::unpack(&packed, q.elem_count(), k.shape())?)))
    }
}

impl CustomOp3 for Probs {
    fn name(&self) -> &'static str {
        "attention-probs"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.run([(q, ql), (k, kl)], Some((b, bl)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        ql: &Layout,
        k: &CudaStorage,
        kl: &Layout,
        b: &CudaStorage,
        bl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.run_on_cuda([(q, ql), (k, kl)], Some((b, bl)))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        bias: &Tensor,
        p: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let packed = self.gradients(q, k, p, grad)?;
        let (qn, kn) = (q.elem_count(), k.elem_count());
        let dbias = bias.track_op().then(|| cpu::unpack(&packed, qn + kn, bias.shape())).transpose()?;
        let (dq, dk) = (cpu::unpack(&packed, 0, q.shape())?, cpu::unpack(&packed, qn, k.shape())?);
        Ok((Some(dq), Some(dk), dbias))
    }
}

/// (q, k, dP) to dq, dk and dbias in one flat result.
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

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        ql: &Layout,
        k: &CudaStorage,
        kl: &Layout,
        g: &CudaStorage,
        gl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (name, device, dtype) = (self.name(), g.device(), g.dtype());
        let (p, pl) = self.p.storage_and_layout();
        let places = [
            cuda::place(name, q, ql)?,
            cuda::place(name, k, kl)?,
            cuda::place(name, cuda::storage(name, &p)?, pl)?,
            cuda::place(name, g, gl)?,
        ];
        let Sizes { heads, m, bias, .. } = self.of.sizes;
        let size = bias.map_or(0, |(groups, rows)| groups * heads * rows * m);
        let shape = Shape::from(ql.shape().elem_count() + kl.shape().elem_count() + size);
        let out = cuda::unwritten(device, &shape, dtype)?;
        self.of.sizes.probs_grad_on_cuda(device, dtype, places, cuda::start(&out), self.of.scale)?;
        Ok((out, shape))
    }
}

pub(super) fn sizes(op: &str, q: &Tensor, k: &Tensor, heads: usize, bias: Option<&Tensor>) -> Result<Sizes> {
    let (batch, n, m, qc, kc) = match (q.dims(), k.dims()) {
        (&[b, n, qc], &[kb, m, kc]) if b == kb && b * n * m > 0 => (b, n, m, qc, kc),
        (q, k) => bail!("{op}: expected q [B, N, C] and k [B, M, C], got {q:?} and {k:?}"),
    };
    check_heads(op, heads, kc)?;
    let d = kc / heads;
    if qc != kc && qc != d {
        bail!("{op}: expected q of {kc} columns, or of {d} for all {heads} heads, got {qc}")
    }
    let bias = match bias.map(Tensor::dims) {
        None => None,
        Some(&[g, h, rows, bm])
            if g > 0 && batch.is_multiple_of(g) && h == heads && bm == m && (rows == n || rows == 1) =>
        {
            Some((g, rows))
        }
        Some(got) => {
            bail!("{op}: expected a bias [G, {heads}, {n} or 1, {m}], G a divisor of {batch}, got {got:?}")
        }
    };
    Ok(Sizes { batch, heads, n, m, d, shared: qc != kc, bias })
}

/// Attention probabilities `[B, H, N, M]` of `q: [B, N, H*d]`, or `[B, N, d]` for all heads alike, over
/// `k: [B, M, H*d]`: softmax over the last axis of `scale * q_h k_h^T + bias`, with an optional bias
/// `[G, H, N or 1, M]` of which batch entry b takes group `b mod G`. Errs when the heads do not
/// divide k's width, or G does not divide B.
pub fn attention_probs(
    q: &Tensor,
    k: &Tensor,
    heads: usize,
    scale: f64,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let op = "attention_probs";
    let sizes = sizes(op, q, k, heads, bias)?;
    let mut named = vec![("q", q), ("k", k)];
    named.extend(bias.map(|b| ("bias", b)));
    match cpu::road_with_cuda(op, &named)? {
        Road::Kernel => {
            let (q, k, probs) = (q.contiguous()?, k.contiguous()?, Probs { sizes, scale });
            match bias {
                Some(bias) => tape::apply3(&q, &k, &bias.contiguous()?, probs, PROBS),
                None => tape::apply2(&q, &k, probs, PROBS),
            }
        }
        Road::ThroughF32 => {
            let bias = bias.map(cpu::wide).transpose()?;
            attention_probs(&cpu::wide(q)?, &cpu::wide(k)?, heads, scale, bias.as_ref())?.to_dtype(q.dtype())
        }
        Road::Reference => reference_probs(q, k, heads, scale, bias),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::CASES;
    use super::*;
    use crate::kernels::testing::*;

    #[test]
    fn probs_agree_and_differentiate() {
        for (b, n, m, c, heads) in CASES {
            let t = [values(&[b, n, c], 1), values(&[b, m, c], 2)];
            let op = |t: &[Tensor]| attention_probs(&t[0], &t[1], heads, 0.7, None);
            agrees(&t, &op, &|t| reference_probs(&t[0], &t[1], heads, 0.7, None));
            differentiates(&t, &op);
        }
    }

    #[test]
    fn one_query_for_all_heads() {
        for (b, n, m, c, heads) in CASES {
            let t = [values(&[b, n, c], 1), values(&[b, m, heads * c], 2)];
            let op = |t: &[Tensor]| attention_probs(&t[0], &t[1], heads, 0.7, None);
            agrees(&t, &op, &|t| reference_probs(&t[0], &t[1], heads, 0.7, None));
            differentiates(&t, &op);
            // It is the query repeated for each head.
            let repeated = Tensor::cat(&vec![&t[0]; heads], 2).unwrap();
            let want = attention_probs(&repeated, &t[1], heads, 0.7, None).unwrap();
            close("repeated query", &op(&t).unwrap(), &want, F64);
        }
    }

    #[test]
    fn biases_of_every_kind() {
        for (b, n, m, c, heads) in CASES {
            for groups in (1..=b).filter(|g| b % g == 0) {
                for rows in [1, n] {
                    for shared in [false, true] {
                        let width = if shared { c * heads } else { c };
                        let t = [
                            values(&[b, n, c], 1),
                            values(&[b, m, width], 2),
                            values(&[groups, heads, rows, m], 3),
                        ];
                        let op = |t: &[Tensor]| attention_probs(&t[0], &t[1], heads, 0.7, Some(&t[2]));
                        agrees(&t, &op, &|t| reference_probs(&t[0], &t[1], heads, 0.7, Some(&t[2])));
                        differentiates(&t, &op);
                    }
                }
            }
        }
    }

    #[test]
    fn wrong_shapes_are_named() {
        let x = values(&[2, 2, 5], 1);
        let text = refusal(attention_probs(&x, &x, 2, 1.0, None));
        assert!(
            text.contains("attention_probs") && text.contains("2 heads") && text.contains("got 5"),
            "{text}"
        );
        let (q, k) = (values(&[2, 3, 4], 1), values(&[2, 3, 6], 1));
        assert!(refusal(attention_probs(&q, &k, 2, 1.0, None)).contains("got 4"));
        let bias = values(&[3, 2, 3, 3], 1);
        assert!(refusal(attention_probs(&k, &k, 2, 1.0, Some(&bias))).contains("got [3, 2, 3, 3]"));
    }
}
