//! LSQ (Esser et al. 2020, in OFQ's form; ofq.md section 2), one scale per entry of one axis of x,
//! shared by `m` elements, with an optional shift along the last axis:
//!
//! ```text
//! se = max(s, 1e-5)     v = (x + shift) / se     q = rne(clamp(v, lo, hi))     y = q * se
//! mask = 1[lo <= v <= hi]     dx = dy * mask     dshift = sum dx
//! ds = sum dy * (q - v * mask) / sqrt(hi * m)    straight through the floor on s
//! ```

use super::site::{Site, SCALE_FLOOR};
use super::statsq::{at_least_f32, run_statsq};
use super::{rne, Emit, Levels};
use crate::kernels::cpu::{self, real, Real, Road};
#[cfg(feature = "cuda")]
use crate::kernels::cuda;
use crate::kernels::tape::{self, Many};
use candle_core::{bail, CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor};
#[cfg(feature = "cuda")]
use candle_core::{op::BackpropOp, CudaStorage, Storage};

/// LSQ in plain candle ops; arguments as [`lsq`].
pub fn reference_lsq(
    x: &Tensor,
    s: &Tensor,
    shift_in: Option<&Tensor>,
    levels: Levels,
    axis: Option<usize>,
) -> Result<Tensor> {
    let shifts: Vec<&Tensor> = shift_in.into_iter().collect();
    let site = Site::new("lsq", x.dims(), 1, s, &shifts, levels, axis)?;
    let s = site.broadcast(s, x, axis)?;
    let x = match shift_in {
        Some(shift) => x.broadcast_add(shift)?,
        None => x.clone(),
    };
    let (lo, hi) = (f64::from(levels.lo), f64::from(levels.hi));
    let se = s.detach().maximum(SCALE_FLOOR)?;
    let v = x.detach().broadcast_div(&se)?;
    let q = rne(&v.clamp(lo, hi)?)?;
    let mask = (v.ge(lo)? * v.le(hi)?)?.to_dtype(x.dtype())?;
    let slope = ((&q - (v * &mask)?)? * site.grad_scale())?.detach();
    let y = q.broadcast_mul(&se)?;
    let along_x = ((&x - x.detach())? * mask.detach())?;
    let along_s = slope.broadcast_mul(&(&s - s.detach())?)?;
    (y.detach() + along_x)? + along_s
}

/// (x, s and the shifts that there are) to y, or to codes.
#[derive(Clone)]
struct Lsq {
    site: Site,
    levels: Levels,
    axis: Option<usize>,
    codes: bool,
    /// Whether there is a shift before it, and one behind it.
    shifts: (bool, bool),
}

impl Lsq {
    /// The shift before it, zeros where there is none, and the one behind it.
    fn shifts<T: Real>(&self, x: &[(&CpuStorage, &Layout)]) -> Result<(Vec<T>, Vec<T>)> {
        let at = |i: usize| match x.get(i) {
            Some((storage, layout)) => Ok(<T as Real>::slice(self.name(), storage, layout)?.to_vec()),
            None => bail!("{}: expected {} operands, got {}", self.name(), i + 1, x.len()),
        };
        let before = if self.shifts.0 { at(2)? } else { vec![T::ZERO; self.site.width * self.site.parts] };
        let behind = if self.shifts.1 { at(2 + usize::from(self.shifts.0))? } else { Vec::new() };
        Ok((before, behind))
    }

    /// The shift before it and the one behind it among the operands.
    #[cfg(feature = "cuda")]
    fn pick<X: Copy>(&self, operands: &[X]) -> Result<(Option<X>, Option<X>)> {
        let expected = 2 + usize::from(self.shifts.0) + usize::from(self.shifts.1);
        if operands.len() != expected {
            bail!("lsq: expected {expected} operands, got {}", operands.len())
        }
        let mut shifts = operands[2..].iter().copied();
        let before = if self.shifts.0 { shifts.next() } else { None };
        Ok((before, shifts.next()))
    }

    /// As [`Many::bwd`]; dx lies by itself, so that it can go while the others wait for the update.
    #[cfg(feature = "cuda")]
    fn bwd_on_cuda(&self, operands: &[Tensor], grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let held: Vec<_> = operands.iter().chain([grad]).map(Tensor::storage_and_layout).collect();
        let mut there = Vec::with_capacity(held.len());
        for (storage, layout) in &held {
            there.push((cuda::storage("lsq", storage)?, *layout));
        }
        let Some((&g, there)) = there.split_last() else { bail!("lsq: expected a gradient") };
        let (before, behind) = self.pick(there)?;
        let (dx, rest) = self.site.backward_on_cuda(there[0], g, there[1], before, behind.is_some())?;
        let tensor = |storage: CudaStorage, shape: Shape| {
            Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
        };
        let count: usize = operands[1..].iter().map(Tensor::elem_count).sum();
        let rest = tensor(rest, Shape::from(count));
        let mut found = vec![Some(tensor(dx, operands[0].shape().clone()))];
        let mut at = 0;
        for operand in &operands[1..] {
            found.push(Some(cpu::unpack(&rest, at, operand.shape())?));
            at += operand.elem_count();
        }
        Ok(found)
    }
}

impl Many for Lsq {
    fn name(&self) -> &'static str {
        "lsq"
    }

    fn cpu_fwd(&self, operands: &[(&CpuStorage, &Layout)]) -> Result<(CpuStorage, Shape)> {
        let [(x, xl), (s, sl), ..] = operands else { bail!("lsq: expected x and scales") };
        real!(self.name(), x, T => {
            let (before, behind) = self.shifts::<T>(operands)?;
            let (x, s) = (<T as Real>::slice(self.name(), x, xl)?, <T as Real>::slice(self.name(), s, sl)?);
            let y = self.site.forward(x, s, &before, &behind, self.codes);
            Ok((<T as Real>::store(y), xl.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, operands: &[(&CudaStorage, &Layout)]) -> Result<Option<(CudaStorage, Shape)>> {
        let shifts = self.pick(operands)?;
        let y = self.site.forward_on_cuda(operands[0], operands[1], shifts, self.codes)?;
        Ok(Some((y, operands[0].1.shape().clone())))
    }

    fn bwd(&self, operands: &[Tensor], _y: &Tensor, grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        #[cfg(feature = "cuda")]
        if grad.device().is_cuda() {
            return self.bwd_on_cuda(operands, &grad.contiguous()?);
        }
        let [x, s, shifts @ ..] = operands else { bail!("lsq: expected x and scales") };
        let op = LsqGrad { of: self.clone(), s: s.clone(), grad: grad.contiguous()? };
        let packed = match (self.shifts.0, shifts.first()) {
            (true, Some(before)) => x.apply_op2_no_bwd(before, &op)?,
            _ => {
                let zeros = Tensor::zeros(self.site.width * self.site.parts, x.dtype(), x.device())?;
                x.apply_op2_no_bwd(&zeros, &op)?
            }
        };
        let (mut at, count) = (x.elem_count(), s.elem_count());
        let mut found =
            vec![Some(cpu::unpack(&packed, 0, x.shape())?), Some(cpu::unpack(&packed, at, s.shape())?)];
        at += count;
        if !self.shifts.0 {
            at += self.site.width * self.site.parts;
        }
        for shift in shifts {
            found.push(Some(cpu::unpack(&packed, at, shift.shape())?));
            at += shift.elem_count();
        }
        Ok(found)
    }

    fn composed(&self, operands: &[Tensor]) -> Result<Tensor> {
        let [x, s, shifts @ ..] = operands else { bail!("lsq: expected x and scales") };
        let (before, behind) = match (self.shifts, shifts) {
            ((true, true), [before, behind]) => (Some(before), Some(behind)),
            ((true, false), [before]) => (Some(before), None),
            ((false, true), [behind]) => (None, Some(behind)),
            _ => (None, None),
        };
        let parts = self.site.parts;
        if matches!(x.dtype(), DType::F16 | DType::BF16) && (parts > 1 || behind.is_some()) {
            // Between these ops nothing may be rounded: a code would be another.
            let wide: Vec<Tensor> = operands.iter().map(cpu::wide).collect::<Result<_>>()?;
            return self.composed(&wide)?.to_dtype(x.dtype());
        }
        let (seen, before) = match before {
            // A shift lies along all parts.
            Some(before) if parts > 1 => (crate::kernels::add_bias(x, before)?, None),
            before => (x.clone(), before),
        };
        let seen = match parts {
            1 => seen,
            _ => {
                let mut dims = seen.dims().to_vec();
                if let [.., rows, last] = dims.as_mut_slice() {
                    (*rows, *last) = (*rows * parts, *last / parts);
                }
                seen.reshape(dims)?
            }
        };
        let y = match cpu::road_with_cuda("lsq", &[("x", x)])? == Road::Kernel {
            true => alone(&seen, s, before, self.levels, self.axis, self.codes)?,
            false => reference_lsq(&seen, s, before, self.levels, self.axis)?,
        };
        let y = if parts == 1 { y } else { y.reshape(x.shape())? };
        match behind {
            Some(behind) => crate::kernels::add_bias(&y, behind),
            None => Ok(y),
        }
    }
}

/// As candle walks it: (x, s, shift) to y, or to codes.
struct Alone(Lsq);

/// One part, no shift behind, in ops of candle's kind.
fn alone(
    x: &Tensor,
    s: &Tensor,
    before: Option<&Tensor>,
    levels: Levels,
    axis: Option<usize>,
    codes: bool,
) -> Result<Tensor> {
    let shifts: Vec<&Tensor> = before.into_iter().collect();
    let site = Site::new("lsq", x.dims(), 1, s, &shifts, levels, axis)?;
    let before = match before {
        Some(before) => before.contiguous()?,
        None => Tensor::zeros(site.width, s.dtype(), x.device())?,
    };
    let op = Alone(Lsq { site, levels, axis, codes, shifts: (true, false) });
    x.contiguous()?.apply_op3(&s.contiguous()?, &before, op)
}

impl CustomOp3 for Alone {
    fn name(&self) -> &'static str {
        "lsq"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        s: &CpuStorage,
        sl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Many::cpu_fwd(&self.0, &[(x, xl), (s, sl), (b, bl)])
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        xl: &Layout,
        s: &CudaStorage,
        sl: &Layout,
        b: &CudaStorage,
        bl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        match Many::cuda_fwd(&self.0, &[(x, xl), (s, sl), (b, bl)])? {
            Some(y) => Ok(y),
            None => bail!("lsq: no body for these operands"),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        s: &Tensor,
        shift: &Tensor,
        y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut found = Many::bwd(&self.0, &[x.clone(), s.clone(), shift.clone()], y, grad)?.into_iter();
        let mut next = || found.next().flatten();
        let (dx, ds, dshift) = (next(), next(), next());
        Ok((dx, ds, dshift.filter(|_| shift.track_op())))
    }
}

/// (x, shift) to dx, ds, dshift and the gradient of the shift behind in one flat result.
struct LsqGrad {
    of: Lsq,
    s: Tensor,
    grad: Tensor,
}

impl CustomOp2 for LsqGrad {
    fn name(&self) -> &'static str {
        "lsq-grad"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        let (grad, gl) = self.grad.storage_and_layout();
        let (s, sl) = self.s.storage_and_layout();
        let (grad, s) = (cpu::host(name, &grad)?, cpu::host(name, &s)?);
        real!(name, x, T => {
            let (s, b) = (<T as Real>::slice(name, s, sl)?, <T as Real>::slice(name, b, bl)?);
            let (x, g) = (<T as Real>::slice(name, x, xl)?, <T as Real>::slice(name, grad, gl)?);
            let out = self.of.site.backward(x, s, b, g, self.of.shifts.1);
            let shape = Shape::from(out.len());
            Ok((<T as Real>::store(out), shape))
        })
    }
}

/// LSQ fake quantization of x (any shape): `s: [A]` holds one scale per entry of `axis`, or `[1]`
/// for the whole of x where `axis` is `None`; `shift_in: [C]`, added before, lies along the last
/// axis. Gradients reach x, s and the shift. Errs when the lengths do not fit, and where dtypes differ: but on a CUDA
/// device s and shifts may be f32 beside an x of f16 or bf16.
pub fn lsq(
    x: &Tensor,
    s: &Tensor,
    shift_in: Option<&Tensor>,
    levels: Levels,
    axis: Option<usize>,
) -> Result<Tensor> {
    run_lsq("lsq", x, s, (shift_in, None), levels, (axis, 1), false)
}

/// The integer codes of [`lsq`] as f32, in the shape of x. No gradient.
pub fn lsq_codes(
    x: &Tensor,
    s: &Tensor,
    shift_in: Option<&Tensor>,
    levels: Levels,
    axis: Option<usize>,
) -> Result<Tensor> {
    let shift = shift_in.map(Tensor::detach);
    run_lsq("lsq_codes", &x.detach(), &s.detach(), (shift.as_ref(), None), levels, (axis, 1), true)?
        .to_dtype(DType::F32)
}

/// As [`lsq`] of x `[.., N, parts C]` seen as `[.., N parts, C]`, of which `axis` is an axis, with a shift behind the
/// quantizer too; both shifts lie along the whole last axis of x. The result has the shape of x.
pub fn lsq_shifted(
    x: &Tensor,
    s: &Tensor,
    (shift_in, shift_out): (Option<&Tensor>, Option<&Tensor>),
    levels: Levels,
    (axis, parts): (Option<usize>, usize),
) -> Result<Tensor> {
    run_lsq("lsq", x, s, (shift_in, shift_out), levels, (axis, parts), false)
}

fn run_lsq(
    op: &str,
    x: &Tensor,
    s: &Tensor,
    (shift_in, shift_out): (Option<&Tensor>, Option<&Tensor>),
    levels: Levels,
    (axis, parts): (Option<usize>, usize),
    codes: bool,
) -> Result<Tensor> {
    let on_cuda = x.device().is_cuda() && matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16);
    if on_cuda && s.dtype() == x.dtype() && s.dtype() != DType::F32 {
        // There scales and shifts are f32, whatever x is.
        let single = |t: Option<&Tensor>| t.map(cpu::wide).transpose();
        let (before, behind) = (single(shift_in)?, single(shift_out)?);
        let shifts = (before.as_ref(), behind.as_ref());
        return run_lsq(op, x, &cpu::wide(s)?, shifts, levels, (axis, parts), codes);
    }
    let shifts: Vec<&Tensor> = shift_in.into_iter().chain(shift_out).collect();
    let site = Site::new(op, x.dims(), parts, s, &shifts, levels, axis)?;
    let mut named = vec![("x", x), ("s", s)];
    named.extend(shift_in.map(|t| ("shift_in", t)));
    named.extend(shift_out.map(|t| ("shift_out", t)));
    let lsq = Lsq { site, levels, axis, codes, shifts: (shift_in.is_some(), shift_out.is_some()) };
    let road = match on_cuda && s.dtype() == DType::F32 && s.device().same_device(x.device()) {
        true => cpu::road_with_cuda(op, &named[1..]),
        false => cpu::road_with_cuda(op, &named),
    };
    match road? {
        Road::Kernel => {
            let mut operands = vec![x.contiguous()?, s.contiguous()?];
            for shift in shifts {
                operands.push(shift.contiguous()?);
            }
            tape::apply(operands, lsq)
        }
        Road::ThroughF32 => {
            let wide = |t: Option<&Tensor>| t.map(cpu::wide).transpose();
            let (before, behind) = (wide(shift_in)?, wide(shift_out)?);
            let shifts = (before.as_ref(), behind.as_ref());
            let y = run_lsq(op, &cpu::wide(x)?, &cpu::wide(s)?, shifts, levels, (axis, parts), codes)?;
            y.to_dtype(x.dtype())
        }
        Road::Reference if codes => {
            let se = site.broadcast(s, x, axis)?.maximum(SCALE_FLOOR)?;
            let x = match shift_in {
                Some(shift) => x.broadcast_add(shift)?,
                None => x.clone(),
            };
            rne(&x.broadcast_div(&se)?.clamp(f64::from(levels.lo), f64::from(levels.hi))?)
        }
        Road::Reference => {
            let mut operands = vec![x.clone(), s.clone()];
            operands.extend(shifts.into_iter().cloned());
            lsq.composed(&operands)
        }
    }
}

/// LSQ's first scale, `factor * mean|x| / sqrt(hi)` over the elements that share it, floored at
/// [`SCALE_FLOOR`]: `[A]` for an axis, `[1]` without. In f32 at least. No gradient.
pub fn lsq_init(x: &Tensor, levels: Levels, axis: Option<usize>, factor: f64) -> Result<Tensor> {
    let op = "lsq_init";
    let scales = match axis {
        None => 1,
        Some(a) if a < x.rank() => x.dim(a)?,
        Some(a) => bail!("{op}: expected a scale axis below {}, got {a}", x.rank()),
    };
    let x = at_least_f32(x)?;
    let dummy = Tensor::zeros(scales, x.dtype(), x.device())?;
    Site::new(op, x.dims(), 1, &dummy, &[], levels, axis)?;
    // One row per scale; a calibration pass, so the copy does not matter.
    let rows = match axis {
        None | Some(0) => x.reshape((scales, ()))?,
        Some(a) => x.transpose(0, a)?.contiguous()?.reshape((scales, ()))?,
    };
    let mean = (run_statsq(op, &rows, 2, Emit::Scale)? * (0.5 * factor / f64::from(levels.hi).sqrt()))?;
    mean.maximum(SCALE_FLOOR)
}

#[cfg(test)]
mod tests {
    use super::super::tests::tensor;
    use super::*;
    use crate::kernels::testing::*;
    use candle_core::{Device, Var};

    fn site(shape: &[usize], axis: Option<usize>) -> Vec<Tensor> {
        let scales = axis.map_or(1, |a| shape[a]);
        let s = values(&[scales], 2).abs().unwrap().affine(0.2, 0.15).unwrap();
        vec![(values(shape, 1) * 0.7).unwrap(), s, (values(&[shape[shape.len() - 1]], 3) * 0.3).unwrap()]
    }

    #[test]
    fn lsq_agrees_on_every_axis() {
        let shapes: [(&[usize], &[Option<usize>]); 5] = [
            (&[1, 1], &[None, Some(0), Some(1)]),
            (&[3, 5], &[None, Some(0), Some(1)]),
            (&[2, 7, 13], &[None, Some(0), Some(1), Some(2)]),
            (&[2, 3, 4, 5], &[None, Some(0), Some(1), Some(2), Some(3)]),
            (&[41, 50, 17], &[None, Some(1), Some(2)]),
        ];
        for (shape, axes) in shapes {
            for &axis in axes {
                for levels in [Levels::signed(2), Levels::unsigned(3)] {
                    let t = site(shape, axis);
                    let op = |t: &[Tensor]| lsq(&t[0], &t[1], Some(&t[2]), levels, axis);
                    agrees(&t, &op, &|t| reference_lsq(&t[0], &t[1], Some(&t[2]), levels, axis));
                    let op = |t: &[Tensor]| lsq(&t[0], &t[1], None, levels, axis);
                    agrees(&t[..2], &op, &|t| reference_lsq(&t[0], &t[1], None, levels, axis));
                }
            }
        }
        for axis in [None, Some(1), Some(2)] {
            let t = site(&[41, 50, 17], axis);
            ignores_threads(&t, &|t| lsq(&t[0], &t[1], Some(&t[2]), Levels::signed(3), axis));
        }
    }

    #[test]
    fn lsq_by_hand() {
        // 2 bits signed, s = 1/2: v = -6, -2 (the bound), 0.6, 1 (the bound), 1.2.
        let x = Var::new(&[-3.0f64, -1.0, 0.3, 0.5, 0.6], &Device::Cpu).unwrap();
        let s = Var::new(&[0.5f64], &Device::Cpu).unwrap();
        let y = lsq(&x, &s, None, Levels::signed(2), None).unwrap();
        assert_eq!(y.to_vec1::<f64>().unwrap(), [-1.0, -1.0, 0.5, 0.5, 0.5]);
        let k = lsq_codes(&x, &s, None, Levels::signed(2), None).unwrap();
        assert_eq!(k.to_vec1::<f32>().unwrap(), [-2.0, -2.0, 1.0, 1.0, 1.0]);
        let g = Tensor::new(&[1.0f64, 10.0, 100.0, 1000.0, 10000.0], &Device::Cpu).unwrap();
        let grads = (y * g).unwrap().sum_all().unwrap().backward().unwrap();
        assert_eq!(grads.get(&x).unwrap().to_vec1::<f64>().unwrap(), [0.0, 10.0, 100.0, 1000.0, 0.0]);
        // -2 * 1 below, 0 at the bounds, (1 - 0.6) * 100 inside, 1 * 10000 above; hi * m = 5.
        let want = (-2.0 + 0.4 * 100.0 + 10000.0) / 5f64.sqrt();
        assert!((grads.get(&s).unwrap().to_vec1::<f64>().unwrap()[0] - want).abs() < F64 * want);
    }

    #[test]
    fn lsq_floor_is_straight_through() {
        for small in [1e-7f64, -0.3] {
            let x = values(&[4, 3], 1);
            let s = Tensor::new(&[small], &Device::Cpu).unwrap();
            let floor = Tensor::new(&[SCALE_FLOOR], &Device::Cpu).unwrap();
            let op = |t: &[Tensor]| lsq(&t[0], &t[1], None, Levels::signed(2), None);
            let (got, want) = (run(&[x.clone(), s], &op), run(&[x, floor], &op));
            for (got, want) in got.iter().zip(&want) {
                close("floored", got, want, 0.0);
            }
            assert!(flat(&got[2])[0] != 0.0, "the scale still gets its gradient");
        }
    }

    #[test]
    fn lsq_init_is_the_mean_of_the_sharing_elements() {
        let x = tensor(&[&[1.0f64, -2.0, 3.0], &[0.0, 0.0, 0.0]]);
        let s = lsq_init(&x, Levels::signed(3), Some(0), 2.0).unwrap();
        close("rows", &s, &Tensor::new(&[4.0 / 3f64.sqrt(), SCALE_FLOOR], &Device::Cpu).unwrap(), F64);
        let s = lsq_init(&x, Levels::signed(3), Some(1), 2.0).unwrap();
        let want =
            Tensor::new(&[1.0 / 3f64.sqrt(), 2.0 / 3f64.sqrt(), 3.0 / 3f64.sqrt()], &Device::Cpu).unwrap();
        close("columns", &s, &want, F64);
        let s = lsq_init(&x, Levels::unsigned(2), None, 4.0).unwrap();
        close("all", &s, &Tensor::new(&[4.0 / 3f64.sqrt()], &Device::Cpu).unwrap(), F64);
    }

    #[test]
    fn wrong_arguments_are_named() {
        let x = values(&[2, 7, 13], 1);
        let text = refusal(lsq(&x, &values(&[6], 1), None, Levels::signed(2), Some(1)));
        assert!(text.contains("lsq") && text.contains("[7]") && text.contains("[6]"), "{text}");
        let text = refusal(lsq(&x, &values(&[7], 1), Some(&values(&[7], 1)), Levels::signed(2), Some(1)));
        assert!(text.contains("[13]"), "{text}");
        assert!(refusal(lsq(&x, &values(&[1], 1), None, Levels::signed(1), None)).contains("lo <= 0 < hi"));
    }
}
