//! The cross-entropy of a classifier, whose logits are never there as a whole on a GPU.
//!
//! ```text
//! z = h w^T     L = mean_b (log sum_k exp z_bk - z_b,label)     h [n, d], w [V, d], labels u32 [n]
//! dz = (softmax(z) - onehot(labels)) / n     dh = dz w     dw = dz^T h
//! ```
//!
//! On a CUDA device the rows of h are taken in chunks whose logits fit into [`CHUNK`] bytes. A chunk's gradients are
//! computed while its logits are there, in the forward pass, and are multiplied by dL in the backward: one product less
//! than to make the logits again. Logits, losses and sums of gradients are f32 there, the products those of the type of
//! h and w (kernels/cross_entropy.cu). Elsewhere this is `cross_entropy` behind a product.

use super::cpu;
use super::cross_entropy::cross_entropy;
#[cfg(feature = "cuda")]
use super::cross_entropy::{Logits, Statistics};
use super::linear::{frozen_matmul, linear};
#[cfg(feature = "cuda")]
use crate::kernels::{
    cuda::{self, Launch, Matrix, Place},
    tape::{self, Reads},
};
#[cfg(feature = "cuda")]
use candle_core::{
    backend::BackendStorage, CpuStorage, CudaDevice, CudaStorage, CustomOp3, Device, Layout, Shape,
};
use candle_core::{bail, DType, Result, Tensor};
#[cfg(feature = "cuda")]
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of the logits of a chunk of rows and, in half precision, of their gradient.
const CHUNK: usize = 256 << 20;

/// [`classifier_cross_entropy`] with all logits at once.
pub fn reference(h: &Tensor, w: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let logits = match w.track_op() {
        true => linear(h, w, None)?,
        false => frozen_matmul(h, w)?,
    };
    match logits.dtype() {
        DType::F64 => cross_entropy(&logits, labels),
        _ => cross_entropy(&logits.to_dtype(DType::F32)?, labels),
    }
}

/// (h, w, labels) to the mean loss, f32, over chunks of at most `chunk` bytes.
#[cfg(feature = "cuda")]
#[derive(Clone)]
struct Classifier {
    chunk: usize,
    /// Whether the gradients of h and of w are wanted.
    wanted: (bool, bool),
    gradients: Arc<Mutex<Option<Gradients>>>,
}

/// Gradients for a dL of 1, f32.
#[cfg(feature = "cuda")]
struct Gradients {
    h: Option<CudaStorage>,
    w: Option<CudaStorage>,
}

#[cfg(feature = "cuda")]
impl Classifier {
    /// The mean loss, and the gradients that are wanted.
    fn run(
        &self,
        op: &str,
        (h, hl): (&CudaStorage, &Layout),
        (w, wl): (&CudaStorage, &Layout),
        (labels, ll): (&CudaStorage, &Layout),
    ) -> Result<(CudaStorage, Gradients)> {
        let (device, dtype) = (h.device(), h.dtype());
        let ((n, d), (v, _)) = (hl.shape().dims2()?, wl.shape().dims2()?);
        let (hs, ws) = (Matrix::of(op, h, hl)?, Matrix::of(op, w, wl)?);
        let labels = cuda::place(op, labels, ll)?;
        let (with_h, with_w) = self.wanted;
        // Rows of logits begin where the widest accesses may.
        let stride = v.next_multiple_of(8);
        let half = dtype != DType::F32;
        let apart = half && (with_h || with_w);
        let most = (self.chunk / (stride * if apart { 6 } else { 4 })).clamp(1, n);
        let each = n.div_ceil(n.div_ceil(most));
        let z = cuda::unwritten(device, (each, stride), DType::F32)?;
        let own = apart.then(|| cuda::unwritten(device, (each, stride), dtype)).transpose()?;
        let dh = with_h.then(|| cuda::unwritten(device, (n, d), DType::F32)).transpose()?;
        let dw = with_w.then(|| cuda::unwritten(device, (v, d), DType::F32)).transpose()?;
        let statistics = Statistics::unwritten(device, n)?;
        for first in (0..n).step_by(each) {
            let rows = each.min(n - first);
            let logits = Logits { at: cuda::start(&z), dtype: DType::F32, rows, width: v, stride };
            let zs = Matrix::at(logits.at, DType::F32, (rows, v)).apart(stride);
            // SAFETY: h and w are the operands, z has rows of `stride` elements for as many rows as h gives.
            unsafe { cuda::gemm(device, hs.rows(first, rows), ws.t(), zs, 1.0, false)? };
            statistics.take(device, logits, first, Some(labels))?;
            if !with_h && !with_w {
                continue;
            }
            let dz = match &own {
                Some(own) => Logits { at: cuda::start(own), dtype, ..logits },
                None => logits,
            };
            // Without 1 / n, which halves could not hold: it is the products' factor.
            statistics.gradient(device, logits, first, labels, None, dz)?;
            let (dzs, scale) = (Matrix::at(dz.at, dtype, (rows, v)).apart(stride), 1.0 / n as f64);
            if let Some(dh) = &dh {
                let dhs = Matrix::at(cuda::start(dh), DType::F32, (n, d)).rows(first, rows);
                // SAFETY: dz has the rows of h that dh takes, w is the operand.
                unsafe { cuda::gemm(device, dzs, ws, dhs, scale, false)? };
            }
            if let Some(dw) = &dw {
                let dws = Matrix::at(cuda::start(dw), DType::F32, (v, d));
                // SAFETY: dz has these rows of h; dw is read from the second chunk on, when it was written.
                unsafe { cuda::gemm(device, dzs.t(), hs.rows(first, rows), dws, scale, first > 0)? };
            }
        }
        Ok((statistics.mean(device)?, Gradients { h: dh, w: dw }))
    }
}

/// `gradient` times dL in `dtype`; in place where it is f32.
#[cfg(feature = "cuda")]
fn scaled(
    device: &CudaDevice,
    gradient: CudaStorage,
    shape: &Shape,
    dtype: DType,
    loss_grad: Place,
) -> Result<Tensor> {
    let (name, count) = ("scale_by", shape.elem_count());
    let other = (dtype != DType::F32).then(|| cuda::unwritten(device, shape, dtype)).transpose()?;
    let onto = other.as_ref().unwrap_or(&gradient);
    let launch = Launch::new(device, "elementwise", format!("{name}_{}", cuda::suffix(name, dtype)?))
        .place(cuda::start(&gradient))
        .place(loss_grad)
        .place(cuda::start(onto))
        .i64(count);
    // SAFETY: the gradient and what it is written to have `count` elements, dL is a scalar in f32.
    unsafe { launch.run((count.div_ceil(256 * 4).min(1 << 20), 1, 1), (256, 1, 1), 0)? };
    Ok(cuda::tensor(other.unwrap_or(gradient), shape.clone()))
}

#[cfg(feature = "cuda")]
impl CustomOp3 for Classifier {
    fn name(&self) -> &'static str {
        "classifier-cross-entropy"
    }

    fn cpu_fwd(
        &self,
        _h: &CpuStorage,
        _hl: &Layout,
        _w: &CpuStorage,
        _wl: &Layout,
        _y: &CpuStorage,
        _yl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("{}: expected operands on a CUDA device", self.name())
    }

    fn cuda_fwd(
        &self,
        h: &CudaStorage,
        hl: &Layout,
        w: &CudaStorage,
        wl: &Layout,
        y: &CudaStorage,
        yl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (loss, gradients) = self.run(self.name(), (h, hl), (w, wl), (y, yl))?;
        *self.gradients.lock().unwrap_or_else(PoisonError::into_inner) = Some(gradients);
        Ok((loss, Shape::from(())))
    }

    fn bwd(
        &self,
        h: &Tensor,
        w: &Tensor,
        y: &Tensor,
        _l: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Device::Cuda(device) = h.device() else { bail!("{}: expected h on a CUDA device", self.name()) };
        let kept = self.gradients.lock().unwrap_or_else(PoisonError::into_inner).take();
        let gradients = match kept {
            Some(gradients) => gradients,
            // Only a second walk over one graph comes here, which still has the operands.
            None => {
                let all = [h, w, y].map(Tensor::storage_and_layout);
                let [h, w, y] = [0, 1, 2].map(|i| cuda::storage(self.name(), &all[i].0));
                self.run(self.name(), (h?, all[0].1), (w?, all[1].1), (y?, all[2].1))?.1
            }
        };
        let grad = grad.to_dtype(DType::F32)?.contiguous()?;
        let (dl, layout) = grad.storage_and_layout();
        let dl = cuda::place(self.name(), cuda::storage(self.name(), &dl)?, layout)?;
        let of = |gradient: Option<CudaStorage>, x: &Tensor| {
            gradient.map(|gradient| scaled(device, gradient, x.shape(), x.dtype(), dl)).transpose()
        };
        Ok((of(gradients.h, h)?, of(gradients.w, w)?, None))
    }
}

fn check(h: &Tensor, w: &Tensor, labels: &Tensor) -> Result<()> {
    let op = "classifier_cross_entropy";
    let (n, d, v) = match (h.dims(), w.dims()) {
        ([n, d], [v, e]) if d == e && n * d * v > 0 => (*n, *d, *v),
        (h, w) => bail!("{op}: expected h [n, d] and w [V, d] with elements, got {h:?} and {w:?}"),
    };
    if u32::try_from(v).is_err() {
        bail!("{op}: expected classes that u32 counts, got w [{v}, {d}]")
    }
    if labels.dims() != [n] || labels.dtype() != DType::U32 {
        bail!("{op}: expected labels [{n}] in U32, got {:?} in {:?}", labels.dims(), labels.dtype())
    }
    if !labels.device().same_device(h.device()) {
        bail!("{op}: expected labels on the device of h, got {:?}", labels.device().location())
    }
    Ok(())
}

/// The mean cross-entropy of the logits `h w^T` for `h: [n, d]` and `w: [V, d]` of one dtype against class ids
/// `labels: [n]` in u32: a scalar in f32, of f64 in f64. Differentiable in h and, where it is tracked, in w.
///
/// A label of V or more is an error; on a CUDA device, where nobody looks at the labels, the loss is then NaN.
pub fn classifier_cross_entropy(h: &Tensor, w: &Tensor, labels: &Tensor) -> Result<Tensor> {
    classifier_cross_entropy_in(h, w, labels, CHUNK)
}

/// [`classifier_cross_entropy`] in chunks of at most `chunk` bytes on a CUDA device, a row at least.
pub fn classifier_cross_entropy_in(h: &Tensor, w: &Tensor, labels: &Tensor, chunk: usize) -> Result<Tensor> {
    check(h, w, labels)?;
    let road = cpu::road_with_cuda("classifier_cross_entropy", &[("h", h), ("w", w)])?;
    #[cfg(feature = "cuda")]
    if h.device().is_cuda() && road == cpu::Road::Kernel {
        let op = Classifier { chunk, wanted: (h.track_op(), w.track_op()), gradients: Arc::default() };
        return tape::apply3(&h.contiguous()?, &w.contiguous()?, &labels.contiguous()?, op, Reads::NOTHING);
    }
    let _ = (chunk, road);
    reference(h, w, labels)
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use candle_core::{Device, Var};

    fn labels(n: usize, v: usize) -> Tensor {
        Tensor::from_vec((0..n).map(|i| (i * 5 % v) as u32).collect::<Vec<_>>(), n, &Device::Cpu).unwrap()
    }

    #[test]
    fn it_is_the_loss_of_a_linear_layer() {
        for (n, d, v) in [(1, 1, 1), (3, 5, 7), (6, 4, 13)] {
            let (t, y) = ([values(&[n, d], 1), values(&[v, d], 2)], labels(n, v));
            let plain = |t: &[Tensor]| cross_entropy(&linear(&t[0], &t[1], None)?, &y);
            for (got, want) in
                run(&t, &|t| classifier_cross_entropy(&t[0], &t[1], &y)).iter().zip(run(&t, &plain))
            {
                close("result or gradient", got, &want, F64);
            }
            differentiates(&t, &|t| classifier_cross_entropy(&t[0], &t[1], &y));
            let half: Vec<Tensor> = t.iter().map(|t| t.to_dtype(DType::BF16).unwrap()).collect();
            let loss = classifier_cross_entropy(&half[0], &half[1], &y).unwrap();
            assert_eq!(loss.dtype(), DType::F32);
        }
    }

    #[test]
    fn a_frozen_matrix_gets_no_gradient() {
        let (h, w) = (Var::from_tensor(&values(&[3, 5], 1)).unwrap(), values(&[7, 5], 2));
        let grads = classifier_cross_entropy(&h, &w, &labels(3, 7)).unwrap().backward().unwrap();
        assert!(grads.get(&h).is_some() && grads.get(&w).is_none());
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let (h, w) = (values(&[3, 5], 1), values(&[7, 4], 2));
        let text = refusal(classifier_cross_entropy(&h, &w, &labels(3, 7)));
        assert!(text.contains("[3, 5] and [7, 4]"), "{text}");
        let w = values(&[7, 5], 2);
        assert!(
            refusal(classifier_cross_entropy(&h, &w, &labels(2, 7))).contains("labels [3] in U32, got [2]")
        );
        assert!(refusal(classifier_cross_entropy(&h, &w, &labels(3, 99))).contains("below 7"));
        let single = w.to_dtype(DType::F32).unwrap();
        assert!(refusal(classifier_cross_entropy(&h, &single, &labels(3, 7))).contains("F64"));
    }
}
