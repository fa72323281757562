//! Products of activations that are codes: whole sums, scaled at the end.

#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaStorage};
use candle_core::{bail, CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use super::device;
use super::gemm8::{self, Tokens};
use super::rows::PackedRows;
use super::table::{self, Scales};
use super::{check, dense, has_body, panels_of, slice};
use crate::kernels::fake_quant::{Levels, SCALE_FLOOR};
use crate::kernels::rows::{with_last, Source};
use crate::kernels::{add_bias, cpu};

/// Whole numbers below this are exact in f32, whatever the order of a sum of them.
const EXACT: i64 = 1 << 24;

/// The exact integer sums where f32 could round them: i32 holds `in` products of 8 bits each.
fn whole_sums(q: &[f32], rows: &PackedRows) -> Vec<f32> {
    let (n, k) = (rows.rows(), rows.cols);
    let mut weight = vec![0i16; n * k];
    let mut row_buffer = vec![0f32; k];
    for (row, out) in weight.chunks_exact_mut(k).enumerate() {
        rows.whole(row, &mut row_buffer);
        out.iter_mut().zip(&row_buffer).for_each(|(o, &v)| *o = v as i16);
    }
    let mut y = vec![0f32; q.len() / k * n];
    y.par_chunks_mut(n).zip(q.par_chunks(k)).for_each(|(y, q)| {
        let q: Vec<i16> = q.iter().map(|&v| v as i16).collect();
        for (y, w) in y.iter_mut().zip(weight.chunks_exact(k)) {
            *y = q.iter().zip(w).map(|(&q, &w)| i64::from(i32::from(q) * i32::from(w))).sum::<i64>() as f32;
        }
    });
    y
}

/// `step[t mod len] step[o] Σ_k q[t, k] (code[o, k] + offset)` of activation codes of magnitude at most `bound`, on
/// integers; none where the weight is not for it.
fn codes_product(q: &[f32], bound: u32, step: &[f32], rows: &PackedRows) -> Option<Vec<f32>> {
    let tokens = q.len() / rows.cols;
    let (least, most) = q.iter().fold((0f32, 0f32), |(a, b), &v| (a.min(v), b.max(v)));
    let signed = least < 0.0;
    let within = |lo: f32, hi: f32| least >= lo && most <= hi;
    if bound > 255 || !(if signed { within(-128.0, 127.0) } else { within(0.0, 255.0) }) {
        return None;
    }
    let nan = |t: usize| q[t * rows.cols..(t + 1) * rows.cols].iter().any(|v| v.is_nan());
    // A NaN has no code: its token is one throughout.
    let step_of = |t: usize| if nan(t) { f32::NAN } else { step[t % step.len()] };
    let steps: Vec<f32> = (0..tokens).map(step_of).collect();
    let mut y = vec![0f32; tokens * rows.rows()];
    let two_bits = bound <= 3 && if signed { within(-2.0, 1.0) } else { within(0.0, 3.0) };
    if let Some(table) = two_bits.then(|| rows.for_two_bits(signed)).flatten() {
        let codes: Vec<i8> = q.iter().map(|&v| v as i8).collect();
        let unit: Vec<f32> = rows.step.iter().map(|step| step * rows.unit()).collect();
        table.product(table::Activations::Codes(&codes), Scales { x: &steps, w: &unit, bias: None }, &mut y);
        return Some(y);
    }
    let weight = rows.for_codes()?;
    let codes = match signed {
        true => {
            let codes: Vec<i8> = q.iter().map(|&v| v as i8).collect();
            Tokens::of_signed(&codes, tokens, rows.cols, &steps)
        }
        false => {
            let codes: Vec<u8> = q.iter().map(|&v| v as u8).collect();
            Tokens::of_unsigned(&codes, tokens, rows.cols, &steps)
        }
    };
    weight.product(&codes, &rows.step, &[], &mut y);
    Some(y)
}

/// How activations become codes: `clamp(rne((x + shift) / step), lo, hi)`, a step below 1e-5 taken as that (ofq.md 2.1).
#[derive(Clone, Debug)]
pub struct Rounding {
    /// Token `t` of the flattened leading axes has the step `t mod len`; f32.
    pub step: Tensor,
    /// Added before, `[in]`, f32; none: nothing.
    pub shift: Option<Tensor>,
    /// The range of the codes, without a half offset.
    pub levels: Levels,
}

/// x to the product of its codes with a packed weight, and a bias.
struct RoundedCodes {
    rounding: Rounding,
    rows: PackedRows,
    bias: Option<Tensor>,
}

impl CustomOp1 for RoundedCodes {
    fn name(&self) -> &'static str {
        "packed-quantized-matmul"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, rows) = (slice(x, layout)?, &self.rows);
        let levels = self.rounding.levels;
        let list = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
        let (step, shift) = (list(&self.rounding.step)?, self.rounding.shift.as_ref().map(list).transpose()?);
        let tokens = x.len() / rows.cols;
        // A comparison, not `max`: a NaN must stay one.
        let lift = |s: &f32| if *s < SCALE_FLOOR as f32 { SCALE_FLOOR as f32 } else { *s };
        let step: Vec<f32> = step.iter().map(lift).collect();
        let mut y = cpu::unwritten(tokens * rows.rows());
        let two_bits = levels.hi - levels.lo == 3 && matches!(levels.lo, -2 | 0);
        if let Some(table) = two_bits.then(|| rows.for_two_bits(levels.lo < 0)).flatten() {
            let each: Vec<f32> = (0..tokens).map(|t| step[t % step.len()]).collect();
            let unit: Vec<f32> = rows.step.iter().map(|step| step * rows.unit()).collect();
            table.product(
                table::Activations::Values(x, shift.as_deref()),
                Scales { x: &each, w: &unit, bias: None },
                &mut y,
            );
        } else if let Some(weight) = rows.for_codes() {
            let shift = shift.as_deref().unwrap_or_default();
            let how = gemm8::Quantizer { step: &step, lo: levels.lo, hi: levels.hi, shift };
            weight.product_of(x, tokens, rows.cols, how, &rows.step, &[], &mut y);
        } else {
            bail!("{}: found a weight of several steps a row, or too many columns", self.name())
        }
        if let Some(bias) = self.bias.as_ref().map(list).transpose()? {
            let add = |row: &mut [f32]| row.iter_mut().zip(&bias).for_each(|(y, b)| *y += b);
            y.par_chunks_mut(bias.len()).for_each(add);
        }
        Ok((CpuStorage::F32(y), with_last(layout, rows.rows())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let Rounding { step, shift, levels: Levels { lo, hi, .. } } = &self.rounding;
        let (shift, bias) = (shift.as_ref(), self.bias.as_ref());
        let codes = device::Codes { rounds: true, lo: *lo, hi: *hi, step, shift, bias };
        self.rows.on_device(x.device())?.codes_product(x, layout, &codes)
    }
}

/// Whether a CUDA device has a product of whole numbers for these activations.
#[cfg(feature = "cuda")]
fn has_whole(x: &Tensor, rows: &PackedRows) -> Result<bool> {
    match x.device() {
        candle_core::Device::Cuda(device) => {
            rows.on_device(device)?.takes_codes(device, x.elem_count() / rows.cols.max(1))
        }
        _ => Ok(false),
    }
}

#[cfg(not(feature = "cuda"))]
fn has_whole(_x: &Tensor, _rows: &PackedRows) -> Result<bool> {
    Ok(false)
}

/// As [`packed_codes_matmul`] of the codes that `rounding` makes of `x [.., in]`, rounded on the way into the product,
/// with `bias [out]` added; none where there is no integer product for the weight, the codes, the type of `x` (f32, on a
/// CUDA device also f16 and bf16) or the device. Differentiable in the bias alone.
pub fn packed_quantized_matmul(
    x: &Tensor,
    rounding: Rounding,
    rows: &PackedRows,
    bias: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    let op = "packed quantized matmul";
    let levels = rounding.levels;
    let bytes = (-128..=0).contains(&levels.lo) && levels.hi <= if levels.lo < 0 { 127 } else { 255 };
    if !bytes || levels.half || !rows.takes_codes() {
        return Ok(None);
    }
    let here = x.device().is_cpu() && x.dtype() == DType::F32;
    let there = has_body(x) && has_whole(x, rows)?;
    if !here && !there {
        return Ok(None);
    }
    let x = check(op, x, rows)?.detach();
    let tokens = x.elem_count() / rows.cols;
    let steps = rounding.step.elem_count();
    if steps == 0 || !tokens.is_multiple_of(steps) {
        bail!("{op}: found {steps} steps for {tokens} tokens");
    }
    if let Some(shifts) = rounding.shift.as_ref().map(Tensor::elem_count).filter(|&n| n != rows.cols) {
        bail!("{op}: found {shifts} shifts, expected {}", rows.cols);
    }
    if let Some(biases) = bias.map(Tensor::elem_count).filter(|&n| n != rows.rows()) {
        bail!("{op}: found {biases} biases, expected {}", rows.rows());
    }
    let plain = |t: &Tensor| t.detach().to_device(x.device())?.to_dtype(DType::F32)?.contiguous();
    let rounding = Rounding {
        step: plain(&rounding.step)?,
        shift: rounding.shift.as_ref().map(plain).transpose()?,
        levels,
    };
    // One that is trained is added where its gradient is not lost.
    let (trained, bias) = match bias {
        Some(bias) if bias.track_op() => (Some(bias), None),
        bias => (None, bias),
    };
    let bias = bias.map(plain).transpose()?;
    let y = x.apply_op1_no_bwd(&RoundedCodes { rounding, rows: rows.clone(), bias })?;
    match trained {
        Some(bias) => Ok(Some(add_bias(&y, &bias.to_dtype(y.dtype())?)?)),
        None => Ok(Some(y)),
    }
}

/// q, codes of magnitude at most `bound` and steps of their own, to their product with a packed weight on a device.
#[cfg(feature = "cuda")]
struct CodesOnDevice {
    rows: PackedRows,
    bound: u32,
    step: Tensor,
}

#[cfg(feature = "cuda")]
impl CustomOp1 for CodesOnDevice {
    fn name(&self) -> &'static str {
        "packed-codes-matmul"
    }

    fn cpu_fwd(&self, _q: &CpuStorage, _layout: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("{}: expected codes on a CUDA device", self.name())
    }

    fn cuda_fwd(&self, q: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        // Signed grids reach 128 at most, and what does not is the same either way.
        let (lo, hi) = if self.bound > 128 { (0, 255) } else { (-128, 127) };
        let codes = device::Codes { rounds: false, lo, hi, step: &self.step, shift: None, bias: None };
        self.rows.on_device(q.device())?.codes_product(q, layout, &codes)
    }
}

/// [`packed_codes_matmul`] on a CUDA device.
#[cfg(feature = "cuda")]
fn codes_on_device(q: &Tensor, bound: u32, x_step: &Tensor, rows: &PackedRows) -> Result<Tensor> {
    let (tokens, n) = (q.elem_count() / rows.cols, x_step.elem_count());
    let step = x_step.detach().to_device(q.device())?.to_dtype(DType::F32)?.flatten_all()?.contiguous()?;
    if bound <= 255 && rows.takes_codes() && has_whole(q, rows)? {
        return q.apply_op1_no_bwd(&CodesOnDevice { rows: rows.clone(), bound, step });
    }
    let sums = super::packed_matmul(q, rows)?;
    let scaled = sums.reshape((tokens / n, n, rows.rows()))?.broadcast_mul(&step.reshape((n, 1))?)?;
    scaled.reshape(sums.shape())
}

struct PackedSums {
    rows: PackedRows,
    /// Of whole numbers, the steps outside: where a row has one step. Else of values.
    bare: bool,
    /// Whether f32 holds every sum of whole numbers.
    exact: bool,
    /// The largest magnitude of the codes.
    bound: u32,
    /// Steps of the activation, token `t` taking entry `t mod len`; empty: the bare sums.
    step: Vec<f32>,
}

impl CustomOp1 for PackedSums {
    fn name(&self) -> &'static str {
        "packed-sums"
    }

    fn cpu_fwd(&self, q: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (q, rows) = (slice(q, layout)?, &self.rows);
        if self.bare && !self.step.is_empty() {
            if let Some(y) = codes_product(q, self.bound, &self.step, rows) {
                return Ok((CpuStorage::F32(y), with_last(layout, rows.rows())));
            }
        }
        let mut y = match self.exact {
            _ if !self.bare => panels_of(Source::Packed(rows), rows).product(q),
            true => panels_of(Source::Whole(rows), rows).product(q),
            false => whole_sums(q, rows),
        };
        if !self.step.is_empty() {
            let unit: Vec<f32> = match self.bare {
                true => rows.step.iter().map(|s| s * rows.unit()).collect(),
                false => vec![1.0; rows.rows()],
            };
            y.par_chunks_mut(unit.len()).enumerate().for_each(|(t, y)| {
                let step = self.step[t % self.step.len()];
                y.iter_mut().zip(&unit).for_each(|(y, unit)| *y *= step * unit);
            });
        }
        Ok((CpuStorage::F32(y), with_last(layout, rows.rows())))
    }
}

/// The product of quantized activations with a packed weight, summed in integers.
///
/// `q [.., in]` holds codes as whole f32 numbers of magnitude at most `bound`; token `t` of the
/// flattened leading axes has the step `x_step[t mod len]`. Gives
/// `x_step[t] step[o] Σ_k q[t, k] (code[o, k] + offset)`, `[.., out]`, f32: the sum exact, each factor
/// rounded once. Where a row has several steps they stand inside the sum, which is then one of floats.
/// On a CUDA device nobody looks at the codes first: above a bound of 128 they are taken to be from 0 on.
/// Not differentiable.
pub fn packed_codes_matmul(q: &Tensor, bound: u32, x_step: &Tensor, rows: &PackedRows) -> Result<Tensor> {
    let q = check("packed codes matmul", q, rows)?.detach().to_dtype(DType::F32)?;
    let (tokens, steps) = (q.elem_count() / rows.cols, x_step.elem_count());
    if steps == 0 || !tokens.is_multiple_of(steps) {
        bail!("packed codes matmul: found {steps} steps for {tokens} tokens");
    }
    #[cfg(feature = "cuda")]
    if q.device().is_cuda() {
        return codes_on_device(&q, bound, x_step, rows);
    }
    let step = x_step.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let bare = rows.groups().group().is_none();
    let exact = i64::from(bound) * rows.largest_whole() * (rows.cols as i64) < EXACT;
    if q.device().is_cpu() {
        return q.apply_op1_no_bwd(&PackedSums { rows: rows.clone(), bare, exact, bound, step });
    }
    let (w, unit) = match bare {
        true => {
            let unit = Tensor::new(&rows.step[..], q.device())?.affine(f64::from(rows.unit()), 0.0)?;
            (dense(&q, rows, |row, out| rows.whole(row, out))?, unit)
        }
        false => {
            let unit = Tensor::ones(rows.rows(), DType::F32, q.device())?;
            (dense(&q, rows, |row, out| rows.values(row, out))?, unit)
        }
    };
    let sums = q.broadcast_matmul(&w.t()?)?;
    let n = step.len();
    let step = Tensor::from_vec(step, (n, 1), q.device())?;
    let scaled = sums.reshape((tokens / n, n, rows.rows()))?.broadcast_mul(&step)?.broadcast_mul(&unit)?;
    scaled.reshape(sums.shape())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::rows::tests::random_rows;
    use super::super::tests::all;
    use super::*;
    use crate::random::Random;

    #[test]
    fn integer_sums_are_exact() {
        for (levels, bits, rows, cols, group) in all().filter(|shape| shape.4.is_none()) {
            let (packed, codes) = random_rows((levels, bits), rows, cols, group);
            for exact in [true, false] {
                let mut random = Random::new(9, "q", &[]);
                let q: Vec<i64> = (0..3 * cols).map(|_| i64::from(random.below(256))).collect();
                let input = Tensor::from_vec(q.iter().map(|&v| v as f32).collect(), (3, cols), &Device::Cpu);
                let op = PackedSums { rows: packed.clone(), bare: true, exact, bound: 255, step: Vec::new() };
                let y = input.unwrap().apply_op1_no_bwd(&op).unwrap().to_vec2::<f32>().unwrap();
                for (t, y) in y.iter().enumerate() {
                    for (o, &y) in y.iter().enumerate() {
                        let whole = |c: i64| if levels.half { 2 * c + 1 } else { c };
                        let sum: i64 = (0..cols).map(|k| q[t * cols + k] * whole(codes[o * cols + k])).sum();
                        assert_eq!(y as i64, sum, "{bits} bits {rows}x{cols} at {t}, {o}");
                    }
                }
            }
        }
    }

    #[test]
    fn codes_made_on_the_way_are_those_of_the_quantizer() {
        for (levels, bits, rows, cols, group) in all().filter(|shape| shape.4.is_none()) {
            for (act, lo) in [(2u8, -2), (2, 0), (3, -4), (8, -128), (8, 0)] {
                let (packed, _) = random_rows((levels, bits), rows, cols, group);
                let codes = if lo < 0 { Levels::signed(act) } else { Levels::unsigned(act) };
                let mut random = Random::new(5, "x", &[cols as u64, u64::from(act)]);
                let x: Vec<f32> = (0..3 * cols).map(|_| 2.0 * random.normal()).collect();
                let x = Tensor::from_vec(x, (3, cols), &Device::Cpu).unwrap();
                let step: Vec<f32> = (0..3).map(|t| 0.3 + 0.1 * t as f32).collect();
                let shift: Vec<f32> = (0..cols).map(|_| 0.2 * random.normal()).collect();
                let step = Tensor::new(step, &Device::Cpu).unwrap();
                let shift = Tensor::new(shift, &Device::Cpu).unwrap();
                let rounding = Rounding { step: step.clone(), shift: Some(shift.clone()), levels: codes };
                let got = packed_quantized_matmul(&x, rounding, &packed, None).unwrap();
                // A weight of 8 bits that are not a signed byte has no integer product.
                let Some(got) = got else { continue };
                let q = crate::kernels::lsq_codes(&x, &step, Some(&shift), codes, Some(0)).unwrap();
                let bound = codes.lo.unsigned_abs().max(codes.hi.unsigned_abs());
                let want = packed_codes_matmul(&q, bound, &step, &packed).unwrap();
                let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                for (got, want) in flat(&got).into_iter().zip(flat(&want)) {
                    assert_eq!(got.to_bits(), want.to_bits(), "{bits} bits by {act} {rows}x{cols}");
                }
            }
        }
    }

    #[test]
    fn a_bias_is_added_and_may_be_trained() {
        let (packed, _) = random_rows((Levels::signed(4), 4), 5, 70, None);
        let x = crate::kernels::testing::values(&[3, 70], 2).to_dtype(DType::F32).unwrap();
        let rounding = Rounding {
            step: Tensor::new(&[0.25f32], &Device::Cpu).unwrap(),
            shift: None,
            levels: Levels::signed(4),
        };
        let run = |bias| packed_quantized_matmul(&x, rounding.clone(), &packed, bias);
        let bias = Tensor::new(&[1f32, -2.0, 3.0, 0.5, 0.1], &Device::Cpu).unwrap();
        let want = add_bias(&run(None).unwrap().unwrap(), &bias).unwrap().to_vec2::<f32>().unwrap();
        let var = candle_core::Var::from_tensor(&bias).unwrap();
        for bias in [&bias, var.as_tensor()] {
            assert_eq!(run(Some(bias)).unwrap().unwrap().to_vec2::<f32>().unwrap(), want);
        }
        let y = run(Some(var.as_tensor())).unwrap().unwrap();
        let grad = y.sum_all().unwrap().backward().unwrap().get(&var).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(grad, [3.0; 5]);
        let error = run(Some(&x)).unwrap_err().to_string();
        assert!(error.contains("found 210 biases, expected 5"), "{error}");
    }

    #[test]
    fn codes_times_codes_are_the_whole_sums() {
        for (levels, bits, rows, cols, group) in all().filter(|shape| shape.4.is_none()) {
            for (lo, hi) in [(-2i64, 1), (0, 3), (-128, 127), (0, 255), (-1, 2)] {
                let (packed, codes) = random_rows((levels, bits), rows, cols, group);
                let mut random = Random::new(8, "codes", &[cols as u64, hi as u64]);
                let width = (hi - lo + 1) as u32;
                let q: Vec<i64> = (0..3 * cols).map(|_| lo + i64::from(random.below(width))).collect();
                let mut floats: Vec<f32> = q.iter().map(|&v| v as f32).collect();
                let step = Tensor::new(&[0.5f32, 1.0, 2.0], &Device::Cpu).unwrap();
                let run = |q: &[f32]| {
                    let q = Tensor::from_slice(q, (3, cols), &Device::Cpu).unwrap();
                    let bound = lo.unsigned_abs().max(hi.unsigned_abs()) as u32;
                    packed_codes_matmul(&q, bound, &step, &packed).unwrap().to_vec2::<f32>().unwrap()
                };
                for (t, y) in run(&floats).iter().enumerate() {
                    for (o, &y) in y.iter().enumerate() {
                        let whole = |c: i64| if levels.half { 2 * c + 1 } else { c };
                        let sum: i64 = (0..cols).map(|k| q[t * cols + k] * whole(codes[o * cols + k])).sum();
                        let unit = packed.steps(o)[0] * packed.unit();
                        let want = sum as f32 * ([0.5f32, 1.0, 2.0][t] * unit);
                        assert_eq!(y, want, "{bits} bits by {lo}..{hi} {rows}x{cols} at {t}, {o}");
                    }
                }
                floats[cols] = f32::NAN;
                let y = run(&floats);
                assert!(y[1].iter().all(|v| v.is_nan()) && y[0].iter().chain(&y[2]).all(|v| !v.is_nan()));
            }
        }
    }

    #[test]
    fn codes_meet_steps_by_groups_as_floats() {
        let (packed, codes) = random_rows((Levels::mid_rise(2), 2), 5, 10, Some(4));
        let mut random = Random::new(9, "q", &[]);
        let q: Vec<f32> = (0..4 * 10).map(|_| random.below(4) as f32).collect();
        let x_step = [0.5f32, 0.25];
        let input = Tensor::from_slice(&q, (2, 2, 10), &Device::Cpu).unwrap();
        let step = Tensor::new(&x_step, &Device::Cpu).unwrap();
        let y = packed_codes_matmul(&input, 3, &step, &packed).unwrap();
        assert_eq!(y.dims(), [2, 2, 5]);
        let y = y.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (t, y) in y.chunks_exact(5).enumerate() {
            for (o, y) in y.iter().enumerate() {
                let term = |k: usize| {
                    let step = packed.step[packed.groups().step_of(o * 10 + k)];
                    f64::from(q[t * 10 + k]) * f64::from(step) * (codes[o * 10 + k] as f64 + 0.5)
                };
                let want = f64::from(x_step[t % 2]) * (0..10).map(term).sum::<f64>();
                assert!((f64::from(*y) - want).abs() < 1e-6, "token {t}, row {o}: {y} {want}");
            }
        }
    }
}
