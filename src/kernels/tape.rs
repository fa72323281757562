//! Gradients of the differentiable ops, without the passes over memory that candle's own walk makes.
//!
//! candle adds every gradient onto a tensor of zeros and keeps all activations until the last one is done. While a
//! [`Tape`] records, the ops of this room are written down here instead: the result of each is a leaf for candle, the
//! walk backward hands a gradient on as it is (a second one is added in place) and lets go of each op as it passes.
//!
//! Between two of our ops a model may compute whatever candle can: such a stretch hangs on the leaves beneath it, and
//! candle walks it when its gradient is complete. So a model is right whatever it mixes, and fast where it does not.
//! One tape is of one thread; without a tape, ops are candle's to walk.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, InplaceOp2, Layout, Result,
    Shape, Storage, Tensor, TensorId,
};
use rayon::prelude::*;

use super::cpu::{self, real, simd, Real};

/// What was applied, and to what.
enum Applied {
    One(Box<dyn CustomOp1 + Send + Sync>),
    Two(Box<dyn CustomOp2 + Send + Sync>),
    Three(Box<dyn CustomOp3 + Send + Sync>),
    Many(Box<dyn Many>),
}

/// Which tensors the backward of an op reads: the tape lets go of the others at once. A shape is not a reading.
#[derive(Clone, Copy)]
pub(crate) struct Reads {
    /// An answer for each operand; beyond the last: yes.
    pub operands: &'static [bool],
    /// Whether the result.
    pub result: bool,
}

impl Reads {
    /// Everything.
    pub const ALL: Reads = Reads { operands: &[], result: true };
    /// The operands, not the result.
    pub const OPERANDS: Reads = Reads { operands: &[], result: false };
    /// The result alone.
    pub const RESULT: Reads = Reads { operands: &[false; 3], result: true };
    /// Nothing.
    pub const NOTHING: Reads = Reads { operands: &[false; 3], result: false };

    /// These operands, an answer for each, not the result.
    pub const fn these(operands: &'static [bool]) -> Reads {
        Reads { operands, result: false }
    }

    fn operand(self, i: usize) -> bool {
        self.operands.get(i).copied().unwrap_or(true)
    }
}

/// A tensor of the shape of `x` that holds one number and is tracked as `x` is.
fn in_place_of(x: &Tensor) -> Result<Tensor> {
    let one = Tensor::zeros((), x.dtype(), x.device())?;
    match x.track_op() {
        true => candle_core::Var::from_tensor(&one)?.as_tensor().broadcast_as(x.shape()),
        false => one.broadcast_as(x.shape()),
    }
}

/// An op of any number of operands, which candle's own cannot be.
pub(crate) trait Many: Send + Sync {
    /// Its name, for errors.
    fn name(&self) -> &'static str;
    /// The result, on the CPU.
    fn cpu_fwd(&self, x: &[(&CpuStorage, &Layout)]) -> Result<(CpuStorage, Shape)>;
    /// The result, on a CUDA device, where the op has a body for it.
    fn cuda_fwd(&self, _x: &[(&CudaStorage, &Layout)]) -> Result<Option<(CudaStorage, Shape)>> {
        Ok(None)
    }
    /// The gradient of each operand that takes one.
    fn bwd(&self, x: &[Tensor], y: &Tensor, grad: &Tensor) -> Result<Vec<Option<Tensor>>>;
    /// What [`Many::bwd`] reads.
    fn reads(&self) -> Reads {
        Reads::OPERANDS
    }
    /// The same of ops that candle can walk.
    fn composed(&self, x: &[Tensor]) -> Result<Tensor>;
}

/// An operand, or what stands in its place.
struct Operand {
    id: TensorId,
    /// Whether candle computed it from leaves.
    stretch: bool,
    tensor: Tensor,
}

struct Node {
    applied: Applied,
    operands: Vec<Operand>,
    result: TensorId,
    output: Tensor,
}

#[derive(Default)]
struct Record {
    nodes: Vec<Node>,
    /// Operands that candle computed from leaves, by the first op that took them.
    stretches: HashMap<TensorId, usize>,
}

thread_local! {
    static RECORD: RefCell<Option<Record>> = const { RefCell::new(None) };
}

/// The ops of a forward pass, in order.
#[must_use]
#[derive(Default)]
pub struct Tape(Record);

/// Puts what was recorded before back in its place, also where the pass fails.
struct Before(Option<Record>);

impl Drop for Before {
    fn drop(&mut self) {
        RECORD.with(|record| *record.borrow_mut() = self.0.take());
    }
}

/// Runs `pass` and writes down its differentiable ops.
pub fn record<R, E>(pass: impl FnOnce() -> std::result::Result<R, E>) -> std::result::Result<(R, Tape), E> {
    recorded(Record::default(), pass)
}

fn recorded<R, E>(
    from: Record,
    pass: impl FnOnce() -> std::result::Result<R, E>,
) -> std::result::Result<(R, Tape), E> {
    let before = Before(RECORD.with(|record| record.borrow_mut().replace(from)));
    let result = pass()?;
    let record = RECORD.with(|record| record.borrow_mut().take()).unwrap_or_default();
    drop(before);
    Ok((result, Tape(record)))
}

impl Tape {
    /// Records further ops behind these.
    pub fn then<R, E>(
        self,
        pass: impl FnOnce() -> std::result::Result<R, E>,
    ) -> std::result::Result<(R, Tape), E> {
        recorded(self.0, pass)
    }
}

fn recording() -> bool {
    RECORD.with(|record| record.borrow().is_some())
}

/// What an op's operands must share.
fn one_device<R>(op: &str) -> Result<R> {
    candle_core::bail!("{op}: expected all operands on one device, the CPU or a CUDA one")
}

fn on_cpu((storage, shape): (CpuStorage, Shape)) -> (Storage, Shape) {
    (Storage::Cpu(storage), shape)
}

fn on_cuda((storage, shape): (CudaStorage, Shape)) -> (Storage, Shape) {
    (Storage::Cuda(storage), shape)
}

/// A leaf over what an op computed, written down.
fn write_down(
    (storage, shape): (Storage, Shape),
    applied: Applied,
    inputs: &[&Tensor],
    reads: Reads,
) -> Result<Tensor> {
    let output = Tensor::from_storage(storage, shape, BackpropOp::none(), true);
    let mut operands = Vec::with_capacity(inputs.len());
    for (i, x) in inputs.iter().enumerate() {
        let stretch = x.track_op() && !x.is_variable();
        // candle walks a stretch from its end.
        let tensor = if stretch || reads.operand(i) { (*x).clone() } else { in_place_of(x)? };
        operands.push(Operand { id: x.id(), stretch, tensor });
    }
    let kept = if reads.result { output.clone() } else { in_place_of(&output)? };
    RECORD.with(|record| {
        if let Some(record) = record.borrow_mut().as_mut() {
            let at = record.nodes.len();
            for x in operands.iter().filter(|x| x.stretch) {
                record.stretches.entry(x.id).or_insert(at);
            }
            record.nodes.push(Node { applied, operands, result: output.id(), output: kept });
        }
    });
    Ok(output)
}

/// `op` of `x`, differentiable.
pub(crate) fn apply1<C: CustomOp1 + Send + Sync + 'static>(
    x: &Tensor,
    op: C,
    reads: Reads,
) -> Result<Tensor> {
    if !x.track_op() {
        return x.apply_op1_no_bwd(&op);
    }
    if !recording() {
        return x.apply_op1(op);
    }
    let result = {
        let (storage, layout) = x.storage_and_layout();
        match &*storage {
            Storage::Cpu(x) => on_cpu(op.cpu_fwd(x, layout)?),
            Storage::Cuda(x) => on_cuda(op.cuda_fwd(x, layout)?),
            _ => one_device(op.name())?,
        }
    };
    write_down(result, Applied::One(Box::new(op)), &[x], reads)
}

/// `op` of `x` and `y`, differentiable.
pub(crate) fn apply2<C: CustomOp2 + Send + Sync + 'static>(
    x: &Tensor,
    y: &Tensor,
    op: C,
    reads: Reads,
) -> Result<Tensor> {
    if !x.track_op() && !y.track_op() {
        return x.apply_op2_no_bwd(y, &op);
    }
    if !recording() {
        return x.apply_op2(y, op);
    }
    let result = {
        let ((xs, xl), (ys, yl)) = (x.storage_and_layout(), y.storage_and_layout());
        match (&*xs, &*ys) {
            (Storage::Cpu(x), Storage::Cpu(y)) => on_cpu(op.cpu_fwd(x, xl, y, yl)?),
            (Storage::Cuda(x), Storage::Cuda(y)) => on_cuda(op.cuda_fwd(x, xl, y, yl)?),
            _ => one_device(op.name())?,
        }
    };
    write_down(result, Applied::Two(Box::new(op)), &[x, y], reads)
}

/// `op` of three tensors, differentiable.
pub(crate) fn apply3<C: CustomOp3 + Send + Sync + 'static>(
    x: &Tensor,
    y: &Tensor,
    z: &Tensor,
    op: C,
    reads: Reads,
) -> Result<Tensor> {
    if !x.track_op() && !y.track_op() && !z.track_op() {
        return x.apply_op3_no_bwd(y, z, &op);
    }
    if !recording() {
        return x.apply_op3(y, z, op);
    }
    let result = {
        let ((xs, xl), (ys, yl)) = (x.storage_and_layout(), y.storage_and_layout());
        let (zs, zl) = z.storage_and_layout();
        match (&*xs, &*ys, &*zs) {
            (Storage::Cpu(x), Storage::Cpu(y), Storage::Cpu(z)) => on_cpu(op.cpu_fwd(x, xl, y, yl, z, zl)?),
            (Storage::Cuda(x), Storage::Cuda(y), Storage::Cuda(z)) => {
                on_cuda(op.cuda_fwd(x, xl, y, yl, z, zl)?)
            }
            _ => one_device(op.name())?,
        }
    };
    write_down(result, Applied::Three(Box::new(op)), &[x, y, z], reads)
}

/// `op` of the operands `x`, which share a device, differentiable.
pub(crate) fn apply<C: Many + 'static>(x: Vec<Tensor>, op: C) -> Result<Tensor> {
    let tracked = x.iter().any(Tensor::track_op);
    let on = |what: fn(&Device) -> bool| x.iter().all(|x| what(x.device()));
    let (here, there) = (on(Device::is_cpu), on(Device::is_cuda));
    if !(here || there) || (tracked && !recording()) {
        return op.composed(&x);
    }
    let result = {
        let held: Vec<_> = x.iter().map(Tensor::storage_and_layout).collect();
        let (mut cpu, mut cuda) = (Vec::new(), Vec::new());
        for (storage, layout) in &held {
            match &**storage {
                Storage::Cpu(storage) => cpu.push((storage, *layout)),
                Storage::Cuda(storage) => cuda.push((storage, *layout)),
                _ => one_device(op.name())?,
            }
        }
        match here {
            true => Some(on_cpu(op.cpu_fwd(&cpu)?)),
            false => op.cuda_fwd(&cuda)?.map(on_cuda),
        }
    };
    let Some((storage, shape)) = result else { return op.composed(&x) };
    if !tracked {
        return Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false));
    }
    let reads = op.reads();
    write_down((storage, shape), Applied::Many(Box::new(op)), &x.iter().collect::<Vec<_>>(), reads)
}

/// A scalar whose gradient in x is given: what candle's walk begins from. Its value is nobody's.
struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _x: &CpuStorage, _layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn cuda_fwd(&self, x: &CudaStorage, _layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let shape = Shape::from(());
        Ok((x.device().zeros_impl(&shape, DType::F32)?, shape))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, _grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

/// Gradients by tensor.
#[derive(Default)]
pub struct Gradients {
    /// With each whether it is a sum of ours, which nothing else refers to.
    held: HashMap<TensorId, (Tensor, bool)>,
}

impl Gradients {
    /// Takes the gradient of `x` out, where one arrived.
    pub fn remove(&mut self, x: &Tensor) -> Option<Tensor> {
        self.held.remove(&x.id()).map(|(gradient, _)| gradient)
    }

    fn add(&mut self, id: TensorId, gradient: Tensor) -> Result<()> {
        // What candle computed of leaves is tracked: a walk from it would differentiate through it once more.
        let gradient = gradient.detach();
        let sum = match self.held.remove(&id) {
            None => (gradient, false),
            Some((sum, _)) if sum.dims() != gradient.dims() => {
                candle_core::bail!(
                    "tape: found gradients {:?} and {:?} of one tensor",
                    sum.dims(),
                    gradient.dims()
                )
            }
            Some((sum, _)) if !sum.device().is_cpu() || !matches!(sum.dtype(), DType::F32 | DType::F64) => {
                ((sum + gradient)?, false)
            }
            Some((sum, true)) => {
                sum.inplace_op2(&gradient.contiguous()?, &AddOnto)?;
                (sum, true)
            }
            Some((first, false)) => {
                (first.contiguous()?.apply_op2_no_bwd(&gradient.contiguous()?, &Add)?, true)
            }
        };
        self.held.insert(id, sum);
        Ok(())
    }
}

impl Tape {
    /// The gradients of `loss`, a scalar, in the leaves `wanted`: parameters, or whatever the pass began from.
    pub fn backward(self, loss: &Tensor, wanted: &[&Tensor]) -> Result<Gradients> {
        let ones = loss.ones_like()?.detach();
        self.onward(loss, ones, wanted)
    }

    /// As [`Tape::backward`] from a `y` of any shape, whose own gradient is `gradient`.
    pub fn onward(self, y: &Tensor, gradient: Tensor, wanted: &[&Tensor]) -> Result<Gradients> {
        let Record { mut nodes, stretches } = self.0;
        // The leaves whose gradients are of use.
        let mut leaves: std::collections::HashSet<TensorId> = wanted.iter().map(|x| x.id()).collect();
        leaves.extend(nodes.iter().map(|node| node.result));
        let mut ending: HashMap<usize, Vec<Tensor>> = HashMap::new();
        let mut gradients = Gradients::default();
        let walk = |x: &Tensor, gradient: &Tensor, gradients: &mut Gradients| -> Result<()> {
            let found = x.apply_op1(Seed(gradient.detach()))?.backward()?;
            for id in leaves.iter() {
                if let Some(gradient) = found.get_id(*id) {
                    gradients.add(*id, gradient.clone())?;
                }
            }
            Ok(())
        };
        match y.is_variable() {
            true => gradients.add(y.id(), gradient)?,
            false => walk(y, &gradient.detach(), &mut gradients)?,
        }
        while let Some(Node { applied, operands, result, output }) = nodes.pop() {
            let at = nodes.len();
            if let Some((gradient, _)) = gradients.held.remove(&result) {
                let reached: Vec<Option<Tensor>> = match (applied, operands.as_slice()) {
                    (Applied::One(op), [x]) => vec![op.bwd(&x.tensor, &output, &gradient)?],
                    (Applied::Two(op), [x, y]) => {
                        let (dx, dy) = op.bwd(&x.tensor, &y.tensor, &output, &gradient)?;
                        vec![dx, dy]
                    }
                    (Applied::Three(op), [x, y, z]) => {
                        let (dx, dy, dz) = op.bwd(&x.tensor, &y.tensor, &z.tensor, &output, &gradient)?;
                        vec![dx, dy, dz]
                    }
                    (Applied::Many(op), operands) => {
                        let tensors: Vec<Tensor> = operands.iter().map(|x| x.tensor.clone()).collect();
                        op.bwd(&tensors, &output, &gradient)?
                    }
                    _ => Vec::new(),
                };
                drop(gradient);
                for (x, dx) in operands.into_iter().zip(reached) {
                    let Some(dx) = dx.filter(|_| x.tensor.track_op()) else { continue };
                    gradients.add(x.id, dx)?;
                    if let (true, Some(first)) = (x.stretch, stretches.get(&x.id)) {
                        let waiting = ending.entry(*first).or_default();
                        if !waiting.iter().any(|w| w.id() == x.id) {
                            waiting.push(x.tensor);
                        }
                    }
                }
            }
            // No op before this one takes these operands: their gradients are complete.
            for x in ending.remove(&at).unwrap_or_default() {
                if let Some(gradient) = gradients.remove(&x) {
                    walk(&x, &gradient, &mut gradients)?;
                }
            }
        }
        Ok(gradients)
    }
}

simd! {
    fn sum_into<T>(x: &[T], y: &[T], z: &mut [T]) {
        for ((z, &x), &y) in z.iter_mut().zip(x).zip(y) {
            *z = x + y;
        }
    }
}

simd! {
    fn add_onto<T>(x: &mut [T], y: &[T]) {
        for (x, &y) in x.iter_mut().zip(y) {
            *x += y;
        }
    }
}

/// x + y of one shape.
struct Add;

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        y: &CpuStorage,
        yl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        real!(CustomOp2::name(self), x, T => {
            let name = CustomOp2::name(self);
            let (x, y) = (<T as Real>::slice(name, x, xl)?, <T as Real>::slice(name, y, yl)?);
            let mut z = cpu::unwritten(x.len());
            z.par_chunks_mut(cpu::GRAIN)
                .zip(x.par_chunks(cpu::GRAIN).zip(y.par_chunks(cpu::GRAIN)))
                .for_each(|(z, (x, y))| sum_into(x, y, z));
            Ok((<T as Real>::store(z), xl.shape().clone()))
        })
    }

    fn bwd(
        &self,
        _x: &Tensor,
        _y: &Tensor,
        _z: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(grad.clone()), Some(grad.clone())))
    }
}

/// x += y.
struct AddOnto;

impl InplaceOp2 for AddOnto {
    fn name(&self) -> &'static str {
        "add-onto"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, xl: &Layout, y: &CpuStorage, yl: &Layout) -> Result<()> {
        let Some((from, to)) = xl.contiguous_offsets() else {
            candle_core::bail!("add-onto: expected contiguous elements, got strides {:?}", xl.stride())
        };
        real!(self.name(), y, T => {
            let y = <T as Real>::slice(self.name(), y, yl)?;
            let Some(x) = T::elements_mut(x) else { candle_core::bail!("add-onto: expected one dtype") };
            x[from..to]
                .par_chunks_mut(cpu::GRAIN)
                .zip(y.par_chunks(cpu::GRAIN))
                .for_each(|(x, y)| add_onto(x, y));
            Ok(())
        })
    }
}

/// `x + y` of one shape and dtype.
pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    if x.dims() != y.dims() {
        candle_core::bail!("add: expected one shape, got {:?} and {:?}", x.dims(), y.dims())
    }
    match cpu::road("add", &[("x", x), ("y", y)])? {
        cpu::Road::Kernel => apply2(&x.contiguous()?, &y.contiguous()?, Add, Reads::NOTHING),
        cpu::Road::ThroughF32 | cpu::Road::Reference => x + y,
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use crate::kernels;
    use candle_core::Var;

    /// A pass that takes a leaf twice, mixes candle's ops in between ours and shares a stretch among two of them.
    fn pass(x: &Tensor, w: &Tensor, b: &Tensor) -> Result<Tensor> {
        let h = kernels::linear(x, w, Some(b))?;
        let stretch = (h.sqr()? + x)?.affine(0.5, 0.1)?;
        let y = add(&kernels::gelu(&stretch)?, &kernels::softmax(&stretch)?)?;
        let y = add(&y, &h)?;
        let z = kernels::layer_norm(&y, b, b, 1e-3)?;
        (kernels::linear(&z, w, None)? * x)?.sum_all()
    }

    fn leaves() -> [Var; 3] {
        [(vec![3, 5], 1), (vec![5, 5], 2), (vec![5], 3)]
            .map(|(s, i)| Var::from_tensor(&values(&s, i)).unwrap())
    }

    #[test]
    fn gradients_are_those_of_candle() {
        let [x, w, b] = leaves();
        let want = pass(&x, &w, &b).unwrap().backward().unwrap();
        let (loss, tape) = record(|| pass(&x, &w, &b)).unwrap();
        let leaves = [x.as_tensor(), w.as_tensor(), b.as_tensor()];
        let mut got = tape.backward(&loss, &leaves).unwrap();
        for leaf in leaves {
            close("gradient", &got.remove(leaf).unwrap(), want.get(leaf).unwrap(), 1e-12);
        }
        assert!(got.held.is_empty(), "{} gradients are left", got.held.len());
    }

    #[test]
    fn a_gradient_that_candle_computed_is_not_differentiated() {
        let [x, w, _] = leaves();
        let (b, w) = (Var::from_tensor(&values(&[3, 5], 4)).unwrap(), w);
        let pass = || -> Result<Tensor> {
            // The stretch x^2 receives a gradient that is the tracked product of another stretch.
            let r = add(&x.sqr()?, &b)?;
            (r * w.narrow(0, 0, 3)?)?.sum_all()
        };
        let want = pass().unwrap().backward().unwrap();
        let (loss, tape) = record(pass).unwrap();
        let leaves = [x.as_tensor(), b.as_tensor(), w.as_tensor()];
        let mut got = tape.backward(&loss, &leaves).unwrap();
        for leaf in leaves {
            close("gradient", &got.remove(leaf).unwrap(), want.get(leaf).unwrap(), 1e-12);
        }
    }

    #[test]
    fn a_known_gradient_goes_onward() {
        let [x, w, _] = leaves();
        let (y, tape) = record(|| kernels::linear(&x, &w, None)).unwrap();
        let g = values(&[3, 5], 7);
        let mut got = tape.onward(&y, g.clone(), &[w.as_tensor()]).unwrap();
        close("dw", &got.remove(&w).unwrap(), &g.t().unwrap().matmul(&x).unwrap(), 1e-12);
    }

    #[test]
    fn what_is_frozen_is_not_written_down() {
        let [x, w, b] = leaves();
        let (x, w) = (x.as_detached_tensor(), w.as_detached_tensor());
        let (y, tape) = record(|| kernels::linear(&x, &w, None)).unwrap();
        assert!(tape.0.nodes.is_empty() && !y.track_op());
        // A pass that fails leaves nothing recording behind.
        assert!(record(|| kernels::linear(&x, &b, None)).is_err());
        let y = kernels::linear(&x, &w, Some(&b)).unwrap();
        assert!(y.track_op() && !y.is_variable());
    }

    #[test]
    fn an_unused_result_has_no_gradient() {
        let [x, w, b] = leaves();
        let (loss, tape) = record(|| {
            kernels::linear(&x, &w, Some(&b))?;
            kernels::linear(&x, &w, None)?.sum_all()
        })
        .unwrap();
        let mut got = tape.backward(&loss, &[x.as_tensor(), b.as_tensor()]).unwrap();
        assert!(got.remove(&b).is_none() && got.remove(&x).is_some());
    }
}
