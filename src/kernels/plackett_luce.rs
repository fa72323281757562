//! Plackett-Luce distillation: the student ranks the classes as the teacher does, the label first.
//!
//! ```text
//! pi  = the label, then the other classes by falling teacher probability, ties by class number
//! L   = mean_b sum_k p_{pi_k} (log sum_{l >= k} exp z_{pi_l} - z_{pi_k})   z, p [B, K], labels u32 [B]
//! dz_{pi_m} = (exp(z_{pi_m}) sum_{k <= m} p_{pi_k} / sum_{l >= k} exp z_{pi_l} - p_{pi_m}) / B
//! ```
//!
//! p, the teacher's probabilities, takes no gradient. The first term is a cross-entropy with the label,
//! weighted by the teacher's confidence in it. A row is computed in f64. On the CPU f32 and f64, f16 and bf16 through
//! f32; on a CUDA device f32, f16 and bf16 (kernels/plackett_luce.cu). Source: Bassam, Zhu and Bian 2025, "PLD: a choice-theoretic list-wise knowledge distillation".

use super::cpu::{self, real, Real, Road};
#[cfg(feature = "cuda")]
use crate::kernels::cuda::{self, Launch};
use crate::kernels::tape::{self, Reads};
#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaDevice, CudaStorage};
use candle_core::{bail, CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, WithDType, D};
use rayon::prelude::*;

/// `plackett_luce` in plain candle ops: all `K * K` pairs of ranks of each row.
pub fn reference(logits: &Tensor, teacher_probs: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let (_, k) = logits.dims2()?;
    let device = logits.device();
    let probs = teacher_probs.detach();
    let classes = Tensor::arange(0u32, k as u32, device)?.unsqueeze(0)?;
    // No probability is above 1, so 2 more put the label first.
    let first = classes.broadcast_eq(&labels.unsqueeze(1)?)?.to_dtype(probs.dtype())?;
    let order = (&probs + (first * 2.0)?)?.contiguous()?.arg_sort_last_dim(false)?;
    let (z, p) = (logits.gather(&order, 1)?, probs.gather(&order, 1)?);
    // What comes before rank k is out of the sum: exp(-inf) is 0.
    let rank = Tensor::arange(0u32, k as u32, device)?;
    let behind = rank.unsqueeze(0)?.broadcast_ge(&rank.unsqueeze(1)?)?;
    let out = Tensor::full(f32::NEG_INFINITY, (k, k), device)?;
    let mask = behind.where_cond(&out.zeros_like()?, &out)?.to_dtype(z.dtype())?;
    let rest = z.unsqueeze(1)?.broadcast_add(&mask.unsqueeze(0)?)?.log_sum_exp(D::Minus1)?; // [B, K]
    (p * (rest - z)?)?.sum(D::Minus1)?.mean_all()
}

/// The classes of a row in the order they are ranked.
fn ranking<T: Real>(probs: &[T], label: u32) -> Vec<u32> {
    let mut order: Vec<u32> = (0..probs.len() as u32).collect();
    let p = |class: u32| probs[class as usize].to_f64();
    // The sort is stable: equal classes stay in the order of their numbers.
    order.sort_by(|&a, &b| (b == label).cmp(&(a == label)).then(p(b).total_cmp(&p(a))));
    order
}

/// For each rank the logarithm of the sum over it and what is ranked behind, from the last on, so that
/// nothing underflows against a larger logit in front.
fn rests(z: &[f64]) -> Vec<f64> {
    let mut rest = f64::NEG_INFINITY;
    let mut rests = vec![0.0; z.len()];
    for (out, &z) in rests.iter_mut().zip(z).rev() {
        let top = if z > rest { z } else { rest };
        rest = match top == f64::NEG_INFINITY {
            true => top + z, // NaN stays NaN
            false => top + ((rest - top).exp() + (z - top).exp()).ln(),
        };
        *out = rest;
    }
    rests
}

/// The loss of a row, and its gradient times `factor` where it is asked for.
fn row<T: Real>(z: &[T], p: &[T], label: u32, grad: Option<(&mut [T], f64)>) -> f64 {
    let order = ranking(p, label);
    let ranked = |row: &[T]| -> Vec<f64> { order.iter().map(|&k| row[k as usize].to_f64()).collect() };
    let (z, p) = (ranked(z), ranked(p));
    let rests = rests(&z);
    if let Some((dz, factor)) = grad {
        // sum_{k <= m} p_k exp(rest_m - rest_k): the rests only fall, so no term grows.
        let mut mass = 0.0;
        for (m, &class) in order.iter().enumerate() {
            let fall = if m == 0 { 0.0 } else { (rests[m] - rests[m - 1]).exp() };
            mass = mass * fall + p[m];
            dz[class as usize] = T::from_f64(factor * ((z[m] - rests[m]).exp() * mass - p[m]));
        }
    }
    // A rank without probability costs nothing, whatever its logit.
    let terms = p.iter().zip(rests.iter().zip(&z));
    terms.map(|(&p, (&rest, &z))| if p == 0.0 { 0.0 } else { p * (rest - z) }).sum()
}

fn labels_of<'a>(y: &'a CpuStorage, yl: &Layout, classes: usize) -> Result<&'a [u32]> {
    let Some((from, to)) = yl.contiguous_offsets() else {
        bail!("plackett_luce: expected contiguous labels")
    };
    let labels = &y.as_slice::<u32>()?[from..to];
    if let Some((row, label)) = labels.iter().enumerate().find(|(_, l)| **l as usize >= classes) {
        bail!("plackett_luce: expected labels below {classes}, got {label} at row {row}")
    }
    Ok(labels)
}

/// A launch over rows with its operands, and the room that it works in.
#[cfg(feature = "cuda")]
fn launch<'a>(
    device: &'a CudaDevice,
    kernel: &str,
    (z, zl): (&CudaStorage, &Layout),
    (p, pl): (&CudaStorage, &Layout),
    (y, yl): (&CudaStorage, &Layout),
) -> Result<(Launch<'a>, [CudaStorage; 4])> {
    let (_, width) = zl.shape().dims2()?;
    let room = |dtype| cuda::unwritten(device, zl.shape(), dtype);
    let rooms = [room(DType::F64)?, room(DType::F64)?, room(DType::F32)?, room(DType::U32)?];
    let name = format!("{kernel}_{}", cuda::suffix(kernel, z.dtype())?);
    let mut launch = Launch::new(device, "plackett_luce", name);
    for (operand, layout) in [(z, zl), (p, pl), (y, yl)] {
        launch = launch.place(cuda::place(kernel, operand, layout)?);
    }
    launch = launch.i32(width);
    for room in &rooms {
        launch = launch.place(cuda::start(room));
    }
    Ok((launch, rooms))
}

/// (logits, teacher probs, labels) to the mean loss.
struct PlackettLuce;

impl CustomOp3 for PlackettLuce {
    fn name(&self) -> &'static str {
        "plackett-luce"
    }

    fn cpu_fwd(
        &self,
        z: &CpuStorage,
        zl: &Layout,
        p: &CpuStorage,
        pl: &Layout,
        y: &CpuStorage,
        yl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = zl.shape().dims2()?;
        let labels = labels_of(y, yl, width)?;
        real!(self.name(), z, T => {
            let (z, p) = (<T as Real>::slice(self.name(), z, zl)?, <T as Real>::slice(self.name(), p, pl)?);
            let mut losses = vec![0f64; rows];
            let step = cpu::chunk_rows(width);
            losses.par_chunks_mut(step).enumerate().for_each(|(i, losses)| {
                for (r, loss) in losses.iter_mut().enumerate() {
                    let (b, at) = (i * step + r, (i * step + r) * width);
                    *loss = row(&z[at..at + width], &p[at..at + width], labels[b], None);
                }
            });
            let mean = <T as WithDType>::from_f64(losses.iter().sum::<f64>() / rows as f64);
            Ok((<T as Real>::store(vec![mean]), Shape::from(())))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        z: &CudaStorage,
        zl: &Layout,
        p: &CudaStorage,
        pl: &Layout,
        y: &CudaStorage,
        yl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (device, (rows, _)) = (z.device(), zl.shape().dims2()?);
        let losses = cuda::unwritten(device, rows, DType::F32)?;
        let (launch, _rooms) = launch(device, "plackett_luce", (z, zl), (p, pl), (y, yl))?;
        // SAFETY: a block for each row of z and p, of which there is a label, a loss, and room of their own.
        unsafe { launch.place(cuda::start(&losses)).run((rows, 1, 1), (256, 1, 1), 0)? };
        super::cross_entropy::mean_on_cuda(device, &losses, rows, z.dtype())
    }

    fn bwd(
        &self,
        z: &Tensor,
        p: &Tensor,
        y: &Tensor,
        _l: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if z.device().is_cuda() {
            let grad = grad.to_dtype(DType::F32)?.contiguous()?;
            return Ok((Some(z.apply_op3_no_bwd(p, y, &PlackettLuceGrad(Some(grad)))?), None, None));
        }
        let dz = z.apply_op3_no_bwd(p, y, &PlackettLuceGrad(None))?;
        Ok((Some(dz.broadcast_mul(grad)?), None, None))
    }
}

/// (logits, teacher probs, labels) to the gradient of the logits, times dL where it is given.
struct PlackettLuceGrad(#[allow(dead_code)] Option<Tensor>);

impl CustomOp3 for PlackettLuceGrad {
    fn name(&self) -> &'static str {
        "plackett-luce-grad"
    }

    fn cpu_fwd(
        &self,
        z: &CpuStorage,
        zl: &Layout,
        p: &CpuStorage,
        pl: &Layout,
        y: &CpuStorage,
        yl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = zl.shape().dims2()?;
        let labels = labels_of(y, yl, width)?;
        real!(self.name(), z, T => {
            let (z, p) = (<T as Real>::slice(self.name(), z, zl)?, <T as Real>::slice(self.name(), p, pl)?);
            let mut dz = vec![<T as Real>::ZERO; z.len()];
            let step = cpu::chunk_rows(width);
            dz.par_chunks_mut(step * width).enumerate().for_each(|(i, dz)| {
                for (r, dz) in dz.chunks_exact_mut(width).enumerate() {
                    let (b, at) = (i * step + r, (i * step + r) * width);
                    row(&z[at..at + width], &p[at..at + width], labels[b], Some((dz, 1.0 / rows as f64)));
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
        p: &CudaStorage,
        pl: &Layout,
        y: &CudaStorage,
        yl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (name, device, (rows, _)) = (self.name(), z.device(), zl.shape().dims2()?);
        let Some(grad) = &self.0 else { bail!("{name}: expected the gradient of the loss") };
        let (g, gl) = grad.storage_and_layout();
        let dl = cuda::place(name, cuda::storage(name, &g)?, gl)?;
        let dz = cuda::unwritten(device, zl.shape(), z.dtype())?;
        let (launch, _rooms) = launch(device, "plackett_luce_grad", (z, zl), (p, pl), (y, yl))?;
        // SAFETY: a block for each row of z, p and dz, of which there is a label and room of their own.
        unsafe { launch.place(dl).place(cuda::start(&dz)).run((rows, 1, 1), (256, 1, 1), 0)? };
        Ok((dz, zl.shape().clone()))
    }
}

/// The mean Plackett-Luce loss of `logits: [B, K]` against a ranking: the class ids `labels: [B]` in
/// u32 first, then the other classes by falling `teacher_probs: [B, K]`, each rank weighted by its
/// probability. A scalar; the gradient reaches the logits only. A label of K or more is an error; on a CUDA device,
/// where nobody looks at the labels, the loss is then NaN.
pub fn plackett_luce(logits: &Tensor, teacher_probs: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let op = "plackett_luce";
    let (b, k) = match logits.dims() {
        [b, k] if b * k > 0 => (*b, *k),
        other => bail!("{op}: expected logits [B, K] with elements, got {other:?}"),
    };
    if teacher_probs.dims() != logits.dims() {
        bail!("{op}: expected teacher_probs {:?}, got {:?}", logits.dims(), teacher_probs.dims())
    }
    if labels.dims() != [b] || labels.dtype() != DType::U32 {
        bail!("{op}: expected labels [{b}] in U32, got {:?} in {:?}", labels.dims(), labels.dtype())
    }
    if !labels.device().same_device(logits.device()) {
        bail!("{op}: expected labels on the device of the logits, got {:?}", labels.device().location())
    }
    let probs = teacher_probs.detach();
    match cpu::road_with_cuda(op, &[("logits", logits), ("teacher_probs", &probs)])? {
        Road::Kernel => tape::apply3(
            &logits.contiguous()?,
            &probs.contiguous()?,
            &labels.contiguous()?,
            PlackettLuce,
            Reads::OPERANDS,
        ),
        Road::ThroughF32 => {
            plackett_luce(&cpu::wide(logits)?, &cpu::wide(&probs)?, labels)?.to_dtype(logits.dtype())
        }
        Road::Reference => {
            if let Some(label) = labels.to_vec1::<u32>()?.into_iter().find(|l| *l as usize >= k) {
                bail!("{op}: expected labels below {k}, got {label}")
            }
            reference(logits, &probs, labels)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use candle_core::{Device, Var};

    fn labels(b: usize, k: usize) -> Tensor {
        Tensor::from_vec((0..b).map(|i| ((i * 5 + 1) % k) as u32).collect(), b, &Device::Cpu).unwrap()
    }

    fn probs(b: usize, k: usize) -> Tensor {
        candle_nn::ops::softmax(&values(&[b, k], 2), 1).unwrap()
    }

    type Op = fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;

    #[test]
    fn agrees_and_differentiates() {
        for (b, k) in [(1, 1), (3, 5), (7, 13)] {
            let (y, p) = (labels(b, k), probs(b, k));
            let with = |f: Op| {
                let (y, p) = (y.clone(), p.clone());
                move |t: &[Tensor]| f(&t[0], &p.to_dtype(t[0].dtype())?, &y)
            };
            let z = [(values(&[b, k], 1) * 4.0).unwrap()];
            agrees(&z, &with(plackett_luce), &with(reference));
            differentiates(&z, &with(plackett_luce));
        }
    }

    #[test]
    fn threads_change_nothing() {
        let (y, p) = (labels(2001, 10), probs(2001, 10).to_dtype(DType::F32).unwrap());
        ignores_threads(&[values(&[2001, 10], 1)], &|t| plackett_luce(&t[0], &p, &y));
    }

    /// z = ln(1, 2, 5), p = (0.2, 0.2, 0.6), label 1: the order is 1, 2, 0.
    #[test]
    fn by_hand() {
        let z = Var::new(&[[1f64.ln(), 2f64.ln(), 5f64.ln()]], &Device::Cpu).unwrap();
        let p = Tensor::new(&[[0.2f64, 0.2, 0.6]], &Device::Cpu).unwrap();
        let y = Tensor::new(&[1u32], &Device::Cpu).unwrap();
        let loss = plackett_luce(&z, &p, &y).unwrap();
        // 0.2 ln(8 / 2) + 0.6 ln(6 / 5) + 0.2 ln(1 / 1)
        let expected = 0.2 * 4f64.ln() + 0.6 * 1.2f64.ln();
        let got = loss.to_scalar::<f64>().unwrap();
        assert!((got - expected).abs() < F64, "{got} {expected}");
        // Of class 1: 2 * 0.2/8 - 0.2; of 2: 5 (0.2/8 + 0.6/6) - 0.6; of 0: 0.2/8 + 0.6/6 + 0.2 - 0.2.
        let grads = loss.backward().unwrap();
        let grad = Tensor::new(&[[0.125f64, -0.15, 0.025]], &Device::Cpu).unwrap();
        close("gradient", grads.get(&z).unwrap(), &grad, F64);
    }

    /// Where the teacher is sure of the label it is the cross-entropy, and equals rank by number.
    #[test]
    fn holds_the_cross_entropy_and_breaks_ties_by_class() {
        let z = (values(&[4, 6], 3) * 3.0).unwrap();
        let y = labels(4, 6);
        let sure = candle_nn::encoding::one_hot(y.clone(), 6, 1f64, 0.0).unwrap();
        let (a, b) = (plackett_luce(&z, &sure, &y).unwrap(), super::super::cross_entropy(&z, &y).unwrap());
        close("sure teacher", &a, &b, F64);
        assert_eq!(ranking(&[0.1f64, 0.3, 0.3, 0.3], 2), [2, 1, 3, 0]);
        assert_eq!(ranking(&[0.25f32; 4], 3), [3, 0, 1, 2]);
    }

    #[test]
    fn logits_far_apart_stay_exact() {
        // Behind the label only -1000 and -1001 are left: their difference decides.
        let z = Var::new(&[[1000f32, -1000.0, -1001.0]], &Device::Cpu).unwrap();
        let p = Tensor::new(&[[0.0f32, 0.6, 0.4]], &Device::Cpu).unwrap();
        let y = Tensor::new(&[0u32], &Device::Cpu).unwrap();
        let loss = plackett_luce(&z, &p, &y).unwrap();
        let want = 0.6 * (1.0 + (-1f64).exp()).ln();
        assert!((f64::from(loss.to_scalar::<f32>().unwrap()) - want).abs() < F32);
        let grads = loss.backward().unwrap();
        assert!(flat(grads.get(&z).unwrap()).iter().all(|g| g.is_finite()));
        let z = Tensor::new(&[[f32::NAN, 0.0, 1.0]], &Device::Cpu).unwrap();
        let p = Tensor::new(&[[0.2f32, 0.4, 0.4]], &Device::Cpu).unwrap();
        assert!(plackett_luce(&z, &p, &y).unwrap().to_scalar::<f32>().unwrap().is_nan());
    }

    #[test]
    fn arguments_are_checked() {
        let (z, p) = (values(&[2, 3], 1), probs(2, 3));
        let y = |labels: &[u32]| Tensor::new(labels, &Device::Cpu).unwrap();
        let text = refusal(plackett_luce(&z, &p, &y(&[0, 3])));
        assert!(text.contains("below 3") && text.contains("got 3 at row 1"), "{text}");
        assert!(refusal(plackett_luce(&z, &p, &y(&[0]))).contains("labels [2] in U32, got [1]"));
        assert!(refusal(plackett_luce(&z, &probs(3, 2), &y(&[0, 1])))
            .contains("teacher_probs [2, 3], got [3, 2]"));
        assert!(refusal(plackett_luce(&z.flatten_all().unwrap(), &p, &y(&[0, 1]))).contains("[B, K]"));
    }
}
