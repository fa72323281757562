//! LSQ (Esser et al. 2020, in OFQ's form; ofq.md section 2), one scale per entry of one axis of x,
//! shared by `m` elements, with an optional shift along the last axis:
//!
//! ```text
//! se = max(s, 1e-5)     v = (x + shift) / se     q = rne(clamp(v, lo, hi))     y = q * se
//! mask = 1[lo <= v <= hi]     dx = dy * mask     dshift = sum dx
//! ds = sum dy * (q - v * mask) / sqrt(hi * m)    straight through the floor on s
//! ```

use super::site::{Site, SCALE_FLOOR};
use super::statsq::run_statsq;
use super::{rne, Emit, Levels};
use crate::kernels::cpu::{self, real, Real, Road};
use candle_core::{bail, CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor};

/// LSQ in plain candle ops; arguments as [`lsq`].
pub fn reference_lsq(
    x: &Tensor,
    s: &Tensor,
    shift_in: Option<&Tensor>,
    levels: Levels,
    axis: Option<usize>,
) -> Result<Tensor> {
    let site = Site::new("lsq", x, s, shift_in, levels, axis)?;
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

/// (x, s, shift) to y, or to codes.
#[derive(Clone, Copy)]
struct Lsq {
    site: Site,
    codes: bool,
}

impl CustomOp3 for Lsq {
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
        let name = self.name();
        real!(name, x, T => {
            let (s, b) = (<T as Real>::slice(name, s, sl)?, <T as Real>::slice(name, b, bl)?);
            let y = self.site.forward(<T as Real>::slice(name, x, xl)?, s, b, self.codes);
            Ok((<T as Real>::store(y), xl.shape().clone()))
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        s: &Tensor,
        shift: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let op = LsqGrad { site: self.site, grad: grad.contiguous()? };
        let packed = x.apply_op3_no_bwd(s, shift, &op)?;
        let count = x.elem_count();
        let dx = cpu::unpack(&packed, 0, x.shape())?;
        let ds = cpu::unpack(&packed, count, s.shape())?;
        let dshift = shift
            .track_op()
            .then(|| cpu::unpack(&packed, count + s.elem_count(), shift.shape()))
            .transpose()?;
        Ok((Some(dx), Some(ds), dshift))
    }
}

/// (x, s, shift) to dx, ds and dshift in one flat result.
struct LsqGrad {
    site: Site,
    grad: Tensor,
}

impl CustomOp3 for LsqGrad {
    fn name(&self) -> &'static str {
        "lsq-grad"
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
        let name = self.name();
        let (grad, gl) = self.grad.storage_and_layout();
        let grad = cpu::host(name, &grad)?;
        real!(name, x, T => {
            let (s, b) = (<T as Real>::slice(name, s, sl)?, <T as Real>::slice(name, b, bl)?);
            let g = <T as Real>::slice(name, grad, gl)?;
            let out = self.site.backward(<T as Real>::slice(name, x, xl)?, s, b, g);
            let shape = Shape::from(out.len());
            Ok((<T as Real>::store(out), shape))
        })
    }
}

/// LSQ fake quantization of x (any shape): `s: [A]` holds one scale per entry of `axis`, or `[1]`
/// for the whole of x where `axis` is `None`; `shift_in: [C]`, added before, lies along the last
/// axis. Gradients reach x, s and the shift. Errs when the lengths do not fit.
pub fn lsq(
    x: &Tensor,
    s: &Tensor,
    shift_in: Option<&Tensor>,
    levels: Levels,
    axis: Option<usize>,
) -> Result<Tensor> {
    run_lsq("lsq", x, s, shift_in, levels, axis, false)
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
    run_lsq("lsq_codes", &x.detach(), &s.detach(), shift.as_ref(), levels, axis, true)?.to_dtype(DType::F32)
}

fn run_lsq(
    op: &str,
    x: &Tensor,
    s: &Tensor,
    shift_in: Option<&Tensor>,
    levels: Levels,
    axis: Option<usize>,
    codes: bool,
) -> Result<Tensor> {
    let site = Site::new(op, x, s, shift_in, levels, axis)?;
    let mut named = vec![("x", x), ("s", s)];
    named.extend(shift_in.map(|t| ("shift_in", t)));
    match cpu::road(op, &named)? {
        Road::Kernel => {
            let shift = match shift_in {
                Some(shift) => shift.contiguous()?,
                None => Tensor::zeros(site.width, x.dtype(), x.device())?,
            };
            x.contiguous()?.apply_op3(&s.contiguous()?, &shift, Lsq { site, codes })
        }
        Road::ThroughF32 => {
            let shift = shift_in.map(cpu::wide).transpose()?;
            let y = run_lsq(op, &cpu::wide(x)?, &cpu::wide(s)?, shift.as_ref(), levels, axis, codes)?;
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
        Road::Reference => reference_lsq(x, s, shift_in, levels, axis),
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
    let x = if x.dtype() == DType::F64 { x.detach() } else { cpu::wide(&x.detach())? };
    let dummy = Tensor::zeros(scales, x.dtype(), x.device())?;
    Site::new(op, &x, &dummy, None, levels, axis)?;
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
