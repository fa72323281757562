//! Cross-entropy against class ids or probabilities, a scalar mean over the batch.
//!
//! ```text
//! L = mean_b sum_k -p_bk log softmax(z_b)_k     z [B, K], p [B, K] or the one-hot of u32 ids [B]
//! dz = (softmax(z) * sum_k p_k - p) / B
//! ```
//!
//! p need not sum to one and takes no gradient. On the CPU f32 and f64, f16 and bf16 through f32; on a CUDA device
//! f32, f16 and bf16 (kernels/cross_entropy.cu). Source: ofq.md 6.1 (the soft term of distillation is
//! `soft_cross_entropy(student, softmax(teacher))`).

use super::cpu::{self, real, simd, Real, Road};
#[cfg(feature = "cuda")]
use crate::kernels::cuda::{self, Launch, Place};
use crate::kernels::tape::{self, Reads};
#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaDevice, CudaStorage};
use candle_core::{
    bail, CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor, WithDType, D,
};
use rayon::prelude::*;
#[cfg(feature = "cuda")]
use std::sync::{Arc, OnceLock};

fn log_softmax(z: &Tensor) -> Result<Tensor> {
    let centred = z.broadcast_sub(&z.max_keepdim(D::Minus1)?.detach())?;
    centred.broadcast_sub(&centred.exp()?.sum_keepdim(D::Minus1)?.log()?)
}

/// `cross_entropy` in plain candle ops.
pub fn reference(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    log_softmax(logits)?.gather(&labels.unsqueeze(1)?, 1)?.mean_all()?.neg()
}

/// `soft_cross_entropy` in plain candle ops.
pub fn reference_soft(logits: &Tensor, probs: &Tensor) -> Result<Tensor> {
    (log_softmax(logits)? * probs.detach())?.sum(D::Minus1)?.mean_all()?.neg()
}

simd! {
    /// `e = exp(z - max)` of each row, with (max, sum e) in `stats`.
    fn exp_rows<T>(z: &[T], width: usize, e: &mut [T], stats: &mut [T]) {
        for ((z, e), st) in z.chunks_exact(width).zip(e.chunks_exact_mut(width)).zip(stats.chunks_exact_mut(2)) {
            let top = cpu::max(z);
            for (e, &z) in e.iter_mut().zip(z) {
                *e = (z - top).exp_nonpos();
            }
            st[0] = top;
            st[1] = cpu::sum(e);
        }
    }
}

simd! {
    /// The losses of rows against probabilities; `e` is scratch.
    fn soft_loss_rows<T>(z: &[T], p: &[T], width: usize, e: &mut [T], stats: &[T], loss: &mut [f64]) {
        let rows = z.chunks_exact(width).zip(p.chunks_exact(width)).zip(e.chunks_exact_mut(width));
        for (((z, p), e), (st, loss)) in rows.zip(stats.chunks_exact(2).zip(loss)) {
            let (top, log) = (st[0], st[1].ln());
            for ((e, &z), &p) in e.iter_mut().zip(z).zip(p) {
                // A class without probability costs nothing, whatever its logit.
                *e = if p == T::ZERO { T::ZERO } else { p * (log - (z - top)) };
            }
            *loss = cpu::sum(e).to_f64();
        }
    }
}

simd! {
    /// `dz = factor * (e / sum e * sum p - p)`; `dz` holds e on entry.
    fn soft_grad_rows<T>(p: &[T], width: usize, stats: &[T], factor: T, dz: &mut [T]) {
        for ((p, dz), st) in p.chunks_exact(width).zip(dz.chunks_exact_mut(width)).zip(stats.chunks_exact(2)) {
            let share = cpu::sum(p) / st[1];
            for (dz, &p) in dz.iter_mut().zip(p) {
                *dz = factor * (*dz * share - p);
            }
        }
    }
}

fn check_label(label: u32, row: usize, classes: usize) -> Result<()> {
    if label as usize >= classes {
        bail!("cross_entropy: expected labels below {classes}, got {label} at row {row}")
    }
    Ok(())
}

/// `e` and per-row (max, sum e), and the losses if `p` is given.
fn rows_of<T: Real>(z: &[T], p: Option<&[T]>, width: usize) -> (Vec<T>, Vec<T>, Vec<f64>) {
    let rows = z.len() / width;
    let (mut e, mut stats, mut loss) = (vec![T::ZERO; z.len()], vec![T::ZERO; 2 * rows], vec![0f64; rows]);
    let step = cpu::chunk_rows(width);
    e.par_chunks_mut(step * width)
        .zip(stats.par_chunks_mut(2 * step))
        .zip(loss.par_chunks_mut(step))
        .enumerate()
        .for_each(|(i, ((e, stats), loss))| {
            let at = i * step * width..i * step * width + e.len();
            exp_rows(&z[at.clone()], width, e, stats);
            if let Some(p) = p {
                soft_loss_rows(&z[at.clone()], &p[at], width, e, stats, loss);
            }
        });
    (e, stats, loss)
}

fn mean<T: Real>(losses: impl ExactSizeIterator<Item = f64>) -> Vec<T> {
    let count = losses.len() as f64;
    vec![T::from_f64(losses.sum::<f64>() / count)]
}

/// The statistics of the rows of some logits on a CUDA device, all f32: the largest, the sum of the exponentials, and
/// one more number, the logit of the label or the sum of the probabilities.
#[cfg(feature = "cuda")]
pub(super) struct Statistics {
    pub rows: usize,
    /// `[3, rows]`.
    numbers: CudaStorage,
}

/// Logits on a CUDA device, or their gradient: `width` to a row, rows `stride` apart.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy)]
pub(super) struct Logits {
    pub at: Place,
    pub dtype: DType,
    pub rows: usize,
    pub width: usize,
    pub stride: usize,
}

#[cfg(feature = "cuda")]
impl Logits {
    fn of(op: &str, z: &CudaStorage, layout: &Layout) -> Result<Self> {
        let (rows, width) = layout.shape().dims2()?;
        Ok(Logits { at: cuda::place(op, z, layout)?, dtype: z.dtype(), rows, width, stride: width })
    }

    /// A kernel over rows, begun with `z, ld`.
    fn launch<'a>(&self, device: &'a CudaDevice, kernel: &str) -> Result<Launch<'a>> {
        let kernel = format!("{kernel}_{}", cuda::suffix(kernel, self.dtype)?);
        Ok(Launch::new(device, "cross_entropy", kernel).place(self.at).i64(self.stride))
    }

    /// Runs a kernel over rows.
    ///
    /// # Safety
    /// As of a launch; the kernel takes rows.
    unsafe fn run(&self, launch: Launch) -> Result<()> {
        let block = match self.width {
            0..=1024 => (32, 4, 1),
            1025..=16384 => (256, 1, 1),
            _ => (512, 1, 1),
        };
        // SAFETY: a row for each lane row of the blocks; the rest is the caller's contract.
        unsafe { launch.run((self.rows.div_ceil(block.1), 1, 1), block, 0) }
    }
}

#[cfg(feature = "cuda")]
impl Statistics {
    /// Room for those of so many rows.
    pub fn unwritten(device: &CudaDevice, rows: usize) -> Result<Self> {
        Ok(Statistics { rows, numbers: cuda::unwritten(device, (3, rows), DType::F32)? })
    }

    fn number(&self, which: usize) -> Place {
        cuda::start(&self.numbers).at(which * self.rows)
    }

    /// Takes those of `z`, which are the rows from `first` on, and the logits of their labels where there are labels.
    pub fn take(&self, device: &CudaDevice, z: Logits, first: usize, labels: Option<Place>) -> Result<()> {
        let [top, sum, own] = [0, 1, 2].map(|which| self.number(which).at(first));
        let launch = z.launch(device, "cross_entropy_stats")?.i64(z.rows).i32(z.width);
        let launch = launch.place(top).place(sum).maybe(labels.map(|labels| labels.at(first))).place(own);
        // SAFETY: z has its rows; the statistics and the labels have as many from `first` on, as the callers see to.
        unsafe { z.run(launch) }
    }

    /// The mean loss of rows with labels, f32.
    pub fn mean(&self, device: &CudaDevice) -> Result<CudaStorage> {
        let loss = cuda::unwritten(device, (), DType::F32)?;
        let launch = Launch::new(device, "cross_entropy", "cross_entropy_mean")
            .place(self.number(0))
            .place(self.number(1))
            .place(self.number(2))
            .i64(self.rows)
            .place(cuda::start(&loss));
        // SAFETY: one block, which strides over the rows of each statistic.
        unsafe { launch.run((1, 1, 1), (1024, 1, 1), 0)? };
        Ok(loss)
    }

    /// The gradient of `z`, the rows from `first` on, onto `dz`: times dL over all rows, or as it is without a dL.
    pub fn gradient(
        &self,
        device: &CudaDevice,
        z: Logits,
        first: usize,
        labels: Place,
        loss_grad: Option<Place>,
        dz: Logits,
    ) -> Result<()> {
        let op = "cross_entropy_grad";
        let suffix = match z.dtype == dz.dtype {
            true => cuda::suffix(op, z.dtype)?.to_string(),
            false => format!("{}_{}", cuda::suffix(op, z.dtype)?, cuda::suffix(op, dz.dtype)?),
        };
        let launch = Launch::new(device, "cross_entropy", format!("{op}_{suffix}"))
            .place(z.at)
            .i64(z.stride)
            .i64(z.rows)
            .i32(z.width)
            .place(self.number(0).at(first))
            .place(self.number(1).at(first))
            .place(labels.at(first))
            .maybe(loss_grad)
            .place(dz.at)
            .i64(dz.stride);
        // SAFETY: z and dz have the same rows, of which there are statistics and labels from `first` on.
        unsafe { z.run(launch) }
    }

    /// The mean loss of `z` against the probabilities `p`, f32; leaves the sums of p behind.
    fn soft_mean(&self, device: &CudaDevice, z: Logits, p: Logits) -> Result<CudaStorage> {
        let losses = cuda::unwritten(device, self.rows, DType::F32)?;
        let launch = z.launch(device, "soft_cross_entropy_rows")?.place(p.at).i64(p.stride).i64(z.rows);
        let launch = launch.i32(z.width).place(self.number(0)).place(self.number(1));
        let launch = launch.place(cuda::start(&losses)).place(self.number(2));
        // SAFETY: z and p have the same rows, of which there are statistics.
        unsafe { z.run(launch)? };
        mean_of(device, &losses, self.rows)
    }

    /// The gradient of `z` against `p`, after [`Statistics::soft_mean`].
    fn soft_gradient(
        &self,
        device: &CudaDevice,
        z: Logits,
        p: Logits,
        loss_grad: Place,
        dz: Logits,
    ) -> Result<()> {
        let launch = z.launch(device, "soft_cross_entropy_grad")?.place(p.at).i64(p.stride).i64(z.rows);
        let launch = launch.i32(z.width).place(self.number(0)).place(self.number(1)).place(self.number(2));
        let launch = launch.place(loss_grad).place(dz.at).i64(dz.stride);
        // SAFETY: z, p and dz have the same rows, of which there are statistics and sums of p.
        unsafe { z.run(launch) }
    }
}

/// The mean of the losses of rows, f32.
#[cfg(feature = "cuda")]
fn mean_of(device: &CudaDevice, losses: &CudaStorage, rows: usize) -> Result<CudaStorage> {
    let loss = cuda::unwritten(device, (), DType::F32)?;
    let launch = Launch::new(device, "cross_entropy", "soft_cross_entropy_mean");
    let launch = launch.place(cuda::start(losses)).i64(rows).place(cuda::start(&loss));
    // SAFETY: one block, which strides over the losses of the rows.
    unsafe { launch.run((1, 1, 1), (1024, 1, 1), 0)? };
    Ok(loss)
}

/// The mean of the losses of rows, f32, in the type of the logits.
#[cfg(feature = "cuda")]
pub(super) fn mean_on_cuda(
    device: &CudaDevice,
    losses: &CudaStorage,
    rows: usize,
    dtype: DType,
) -> Result<(CudaStorage, Shape)> {
    loss_in(dtype, mean_of(device, losses, rows)?)
}

/// A loss in the type of its logits.
#[cfg(feature = "cuda")]
fn loss_in(dtype: DType, loss: CudaStorage) -> Result<(CudaStorage, Shape)> {
    let shape = Shape::from(());
    match dtype {
        DType::F32 => Ok((loss, shape)),
        _ => Ok((loss.to_dtype(&Layout::contiguous(()), dtype)?, shape)),
    }
}

/// dL as the kernels take it.
fn as_read(z: &Tensor, grad: &Tensor) -> Result<Tensor> {
    match z.device().is_cuda() {
        true => grad.to_dtype(DType::F32),
        false => Ok(grad.clone()),
    }
}

/// The statistics that the forward pass leaves for the backward on a CUDA device.
#[cfg(feature = "cuda")]
type Kept = Arc<OnceLock<Statistics>>;

#[cfg(feature = "cuda")]
fn kept<'a>(op: &str, kept: &'a Kept) -> Result<&'a Statistics> {
    match kept.get() {
        Some(statistics) => Ok(statistics),
        None => bail!("{op}: the backward pass came before the forward"),
    }
}

/// (logits, labels) to the mean loss.
#[derive(Clone, Default)]
struct CrossEntropy {
    #[cfg(feature = "cuda")]
    kept: Kept,
}

impl CustomOp2 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(
        &self,
        z: &CpuStorage,
        zl: &Layout,
        y: &CpuStorage,
        yl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, width) = zl.shape().dims2()?;
        let labels = labels_of(y, yl)?;
        for (row, &label) in labels.iter().enumerate() {
            check_label(label, row, width)?;
        }
        real!(self.name(), z, T => {
            let z = <T as Real>::slice(self.name(), z, zl)?;
            let (_, stats, _) = rows_of(z, None, width);
            let losses = labels.iter().zip(z.chunks_exact(width)).zip(stats.chunks_exact(2));
            let losses = losses.map(|((&label, z), st)| (st[1].ln() - (z[label as usize] - st[0])).to_f64());
            Ok((<T as Real>::store(mean::<T>(losses)), Shape::from(())))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        z: &CudaStorage,
        zl: &Layout,
        y: &CudaStorage,
        yl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (name, device) = (self.name(), z.device());
        let logits = Logits::of(name, z, zl)?;
        let statistics = Statistics::unwritten(device, logits.rows)?;
        statistics.take(device, logits, 0, Some(cuda::place(name, y, yl)?))?;
        let loss = loss_in(z.dtype(), statistics.mean(device)?);
        let _ = self.kept.set(statistics);
        loss
    }

    fn bwd(
        &self,
        z: &Tensor,
        y: &Tensor,
        _l: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(z.apply_op3_no_bwd(y, &as_read(z, grad)?, &CrossEntropyGrad(self.clone()))?), None))
    }
}

fn labels_of<'a>(y: &'a CpuStorage, yl: &Layout) -> Result<&'a [u32]> {
    let Some((from, to)) = yl.contiguous_offsets() else {
        bail!("cross_entropy: expected contiguous labels")
    };
    Ok(&y.as_slice::<u32>()?[from..to])
}

/// (logits, labels, dL) to the gradient of the logits.
struct CrossEntropyGrad(#[allow(dead_code)] CrossEntropy);

impl CustomOp3 for CrossEntropyGrad {
    fn name(&self) -> &'static str {
        "cross-entropy-grad"
    }

    fn cpu_fwd(
        &self,
        z: &CpuStorage,
        zl: &Layout,
        y: &CpuStorage,
        yl: &Layout,
        g: &CpuStorage,
        gl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = zl.shape().dims2()?;
        let labels = labels_of(y, yl)?;
        real!(self.name(), z, T => {
            let z = <T as Real>::slice(self.name(), z, zl)?;
            let factor = <T as Real>::slice(self.name(), g, gl)?[0] / rows as T;
            let (mut dz, stats, _) = rows_of(z, None, width);
            let step = cpu::chunk_rows(width);
            dz.par_chunks_mut(step * width).enumerate().for_each(|(i, dz)| {
                for (r, dz) in dz.chunks_exact_mut(width).enumerate() {
                    let row = i * step + r;
                    let share = factor / stats[2 * row + 1];
                    dz.iter_mut().for_each(|d| *d *= share);
                    dz[labels[row] as usize] -= factor;
                }
            });
            Ok((<T as Real>::store(dz), zl.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        z: &CudaStorage,
        zl: &Layout,
        y: &CudaStorage,
        yl: &Layout,
        g: &CudaStorage,
        gl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (name, device) = (self.name(), z.device());
        let logits = Logits::of(name, z, zl)?;
        let dz = cuda::unwritten(device, zl.shape(), z.dtype())?;
        let onto = Logits { at: cuda::start(&dz), ..logits };
        let (labels, dl) = (cuda::place(name, y, yl)?, cuda::place(name, g, gl)?);
        kept(name, &self.0.kept)?.gradient(device, logits, 0, labels, Some(dl), onto)?;
        Ok((dz, zl.shape().clone()))
    }
}

/// (logits, probs) to the mean loss.
#[derive(Clone, Default)]
struct SoftCrossEntropy {
    #[cfg(feature = "cuda")]
    kept: Kept,
}

impl CustomOp2 for SoftCrossEntropy {
    fn name(&self) -> &'static str {
        "soft-cross-entropy"
    }

    fn cpu_fwd(
        &self,
        z: &CpuStorage,
        zl: &Layout,
        p: &CpuStorage,
        pl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, width) = zl.shape().dims2()?;
        real!(self.name(), z, T => {
            let (z, p) = (<T as Real>::slice(self.name(), z, zl)?, <T as Real>::slice(self.name(), p, pl)?);
            let (_, _, loss) = rows_of(z, Some(p), width);
            Ok((<T as Real>::store(mean::<T>(loss.into_iter())), Shape::from(())))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        z: &CudaStorage,
        zl: &Layout,
        p: &CudaStorage,
        pl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (name, device) = (self.name(), z.device());
        let (logits, probs) = (Logits::of(name, z, zl)?, Logits::of(name, p, pl)?);
        let statistics = Statistics::unwritten(device, logits.rows)?;
        statistics.take(device, logits, 0, None)?;
        let loss = loss_in(z.dtype(), statistics.soft_mean(device, logits, probs)?);
        let _ = self.kept.set(statistics);
        loss
    }

    fn bwd(
        &self,
        z: &Tensor,
        p: &Tensor,
        _l: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(z.apply_op3_no_bwd(p, &as_read(z, grad)?, &SoftCrossEntropyGrad(self.clone()))?), None))
    }
}

/// (logits, probs, dL) to the gradient of the logits.
struct SoftCrossEntropyGrad(#[allow(dead_code)] SoftCrossEntropy);

impl CustomOp3 for SoftCrossEntropyGrad {
    fn name(&self) -> &'static str {
        "soft-cross-entropy-grad"
    }

    fn cpu_fwd(
        &self,
        z: &CpuStorage,
        zl: &Layout,
        p: &CpuStorage,
        pl: &Layout,
        g: &CpuStorage,
        gl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = zl.shape().dims2()?;
        real!(self.name(), z, T => {
            let (z, p) = (<T as Real>::slice(self.name(), z, zl)?, <T as Real>::slice(self.name(), p, pl)?);
            let factor = <T as Real>::slice(self.name(), g, gl)?[0] / rows as T;
            let (mut dz, stats, _) = rows_of(z, None, width);
            let step = cpu::chunk_rows(width);
            dz.par_chunks_mut(step * width)
                .zip(p.par_chunks(step * width))
                .zip(stats.par_chunks(2 * step))
                .for_each(|((dz, p), stats)| soft_grad_rows(p, width, stats, factor, dz));
            Ok((<T as Real>::store(dz), zl.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        z: &CudaStorage,
        zl: &Layout,
        p: &CudaStorage,
        pl: &Layout,
        g: &CudaStorage,
        gl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (name, device) = (self.name(), z.device());
        let (logits, probs) = (Logits::of(name, z, zl)?, Logits::of(name, p, pl)?);
        let dz = cuda::unwritten(device, zl.shape(), z.dtype())?;
        let onto = Logits { at: cuda::start(&dz), ..logits };
        kept(name, &self.0.kept)?.soft_gradient(device, logits, probs, cuda::place(name, g, gl)?, onto)?;
        Ok((dz, zl.shape().clone()))
    }
}

fn check_logits(op: &str, logits: &Tensor) -> Result<(usize, usize)> {
    match logits.dims() {
        [b, k] if b * k > 0 => Ok((*b, *k)),
        other => bail!("{op}: expected logits [B, K] with elements, got {other:?}"),
    }
}

/// The mean cross-entropy of `logits: [B, K]` against class ids `labels: [B]` in u32, a scalar.
/// A label of K or more is an error; on a CUDA device, where nobody looks at the labels, the loss is then NaN.
pub fn cross_entropy(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let op = "cross_entropy";
    let (b, k) = check_logits(op, logits)?;
    if labels.dims() != [b] || labels.dtype() != DType::U32 {
        bail!("{op}: expected labels [{b}] in U32, got {:?} in {:?}", labels.dims(), labels.dtype())
    }
    if !labels.device().same_device(logits.device()) {
        bail!("{op}: expected labels on the device of the logits, got {:?}", labels.device().location())
    }
    match cpu::road_with_cuda(op, &[("logits", logits)])? {
        Road::Kernel => tape::apply2(
            &logits.contiguous()?,
            &labels.contiguous()?,
            CrossEntropy::default(),
            Reads::OPERANDS,
        ),
        Road::ThroughF32 => cross_entropy(&cpu::wide(logits)?, labels)?.to_dtype(logits.dtype()),
        Road::Reference => {
            for (row, label) in labels.to_vec1::<u32>()?.into_iter().enumerate() {
                check_label(label, row, k)?;
            }
            reference(logits, labels)
        }
    }
}

/// The mean over the batch of `sum_k -p_k log softmax(z)_k` for `logits: [B, K]` and
/// `probs: [B, K]`, a scalar. The gradient reaches the logits only.
pub fn soft_cross_entropy(logits: &Tensor, probs: &Tensor) -> Result<Tensor> {
    let op = "soft_cross_entropy";
    check_logits(op, logits)?;
    if probs.dims() != logits.dims() {
        bail!("{op}: expected probs {:?}, got {:?}", logits.dims(), probs.dims())
    }
    let probs = probs.detach();
    match cpu::road_with_cuda(op, &[("logits", logits), ("probs", &probs)])? {
        Road::Kernel => tape::apply2(
            &logits.contiguous()?,
            &probs.contiguous()?,
            SoftCrossEntropy::default(),
            Reads::OPERANDS,
        ),
        Road::ThroughF32 => {
            soft_cross_entropy(&cpu::wide(logits)?, &cpu::wide(&probs)?)?.to_dtype(logits.dtype())
        }
        Road::Reference => reference_soft(logits, &probs),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use candle_core::Device;

    fn labels(b: usize, k: usize) -> Tensor {
        Tensor::from_vec((0..b).map(|i| (i * 5 % k) as u32).collect(), b, &Device::Cpu).unwrap()
    }

    #[test]
    fn hard_agrees_and_differentiates() {
        for (b, k) in [(1, 1), (3, 5), (7, 13)] {
            let y = labels(b, k);
            let z = [(values(&[b, k], 1) * 4.0).unwrap()];
            agrees(&z, &|t| cross_entropy(&t[0], &y), &|t| reference(&t[0], &y));
            differentiates(&z, &|t| cross_entropy(&t[0], &y));
        }
        let y = labels(2001, 10);
        ignores_threads(&[values(&[2001, 10], 1)], &|t| cross_entropy(&t[0], &y));
    }

    #[test]
    fn soft_agrees_and_differentiates() {
        for (b, k) in [(1, 1), (3, 5), (7, 13)] {
            // Not normalized, and negative in places: the equation does not ask.
            let p = values(&[b, k], 2);
            let with = |f: fn(&Tensor, &Tensor) -> Result<Tensor>| {
                let p = p.clone();
                move |t: &[Tensor]| f(&t[0], &p.to_dtype(t[0].dtype())?)
            };
            let z = [values(&[b, k], 1)];
            agrees(&z, &with(soft_cross_entropy), &with(reference_soft));
            differentiates(&z, &with(soft_cross_entropy));
        }
        let p = values(&[2001, 10], 2).to_dtype(DType::F32).unwrap();
        ignores_threads(&[values(&[2001, 10], 1)], &|t| soft_cross_entropy(&t[0], &p));
    }

    #[test]
    fn by_hand_and_far_out() {
        let z = Tensor::new(&[[0f64, 0.0], [1000.0, 0.0]], &Device::Cpu).unwrap();
        let y = Tensor::new(&[1u32, 1], &Device::Cpu).unwrap();
        let loss = cross_entropy(&z, &y).unwrap().to_scalar::<f64>().unwrap();
        assert!((loss - (2f64.ln() + 1000.0) / 2.0).abs() < F64 * 1000.0, "{loss}");
    }

    #[test]
    fn a_nan_shows() {
        let z = Tensor::new(&[[f32::NAN, 0.0, 1.0]], &Device::Cpu).unwrap();
        let y = Tensor::new(&[1u32], &Device::Cpu).unwrap();
        assert!(cross_entropy(&z, &y).unwrap().to_scalar::<f32>().unwrap().is_nan());
        let p = Tensor::new(&[[0f32, 0.5, 0.5]], &Device::Cpu).unwrap();
        assert!(soft_cross_entropy(&z, &p).unwrap().to_scalar::<f32>().unwrap().is_nan());
    }

    #[test]
    fn labels_are_checked() {
        let z = values(&[2, 3], 1);
        let text = refusal(cross_entropy(&z, &Tensor::new(&[0u32, 3], &Device::Cpu).unwrap()));
        assert!(text.contains("below 3") && text.contains("got 3 at row 1"), "{text}");
        assert!(refusal(cross_entropy(&z, &Tensor::new(&[0u32], &Device::Cpu).unwrap())).contains("[2]"));
        assert!(refusal(soft_cross_entropy(&z, &values(&[3, 2], 1))).contains("[3, 2]"));
    }
}
