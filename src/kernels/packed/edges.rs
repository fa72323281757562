//! The edges between integer products: what becomes of a row of sums before the next product reads it.
//!
//! Each function takes one token's row from floats or whole sums to codes in one pass, so that nothing but
//! codes is ever written to memory between two products. A code is `clamp(rne((v + shift) / step), lo, hi)`, as
//! the trained quantizer has it (ofq.md 2.1), to the bit; a NaN takes the lowest code. The orders of all float
//! operations are those of the ops of [`crate::kernels`], and the same on every instruction set.

use crate::kernels::cpu::{self, Real};
use crate::kernels::gelu::phi;
use crate::kernels::packed::table::Edges;

/// Defines a function whose plain body is compiled for each instruction set; it takes the set first.
macro_rules! per_isa {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(isa: $crate::kernels::packed::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx2,fma")]
            fn avx512($($arg: $ty),*) $(-> $ret)? {
                body($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) $(-> $ret)? {
                body($($arg),*)
            }
            match isa.usable() {
                // SAFETY: `usable` gives Avx512 only where every feature enabled there was detected.
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::packed::Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: `usable` gives Avx2 only where avx2 and fma were detected.
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::packed::Isa::Avx2 => unsafe { avx2($($arg),*) },
                _ => body($($arg),*),
            }
        }
    };
}
pub(super) use per_isa;

/// How whole sums become floats: `y[o] = sum[o] (step unit[o]) + bias[o]`.
#[derive(Clone, Copy, Debug)]
pub struct Affine<'a> {
    /// The token's step.
    pub step: f32,
    /// What one of the whole numbers of each row is worth.
    pub unit: &'a [f32],
    /// One for each row.
    pub bias: &'a [f32],
}

impl Affine<'_> {
    #[inline(always)]
    fn at(&self, o: usize, sum: i32) -> f32 {
        sum as f32 * (self.step * self.unit[o]) + self.bias[o]
    }

    #[inline(always)]
    fn over(&self, len: usize) -> Self {
        Affine { step: self.step, unit: &self.unit[..len], bias: &self.bias[..len] }
    }
}

/// How floats become codes, with one step for the whole row.
#[derive(Clone, Copy, Debug)]
pub struct Rounding<'a> {
    /// Added before, one for each column.
    pub shift: &'a [f32],
    /// The step.
    pub step: f32,
    /// The lowest code.
    pub lo: i32,
    /// The highest code.
    pub hi: i32,
    /// For codes of 2 bits, [`edges_of`] the step.
    pub edges: Option<[f32; 3]>,
}

impl<'a> Rounding<'a> {
    /// With what follows from the other numbers.
    pub fn new(shift: &'a [f32], step: f32, lo: i32, hi: i32) -> Self {
        Rounding { shift, step, lo, hi, edges: edges_of(step, lo, hi) }
    }
}

/// Where the codes `lo ..= hi` change, if there are four: comparisons with these instead of a division, to the same code.
pub fn edges_of(step: f32, lo: i32, hi: i32) -> Option<[f32; 3]> {
    (hi - lo == 3).then(|| Edges::new(lo).thresholds(step))
}

/// 1.5 * 2^23: adding it rounds to even and leaves the whole number in the low bits.
const MAGIC: f32 = 12_582_912.0;

/// The code of `v`, in steps.
#[inline(always)]
fn code(v: f32, lo: f32, hi: f32) -> i32 {
    let v = if v > lo { v } else { lo };
    let v = if v < hi { v } else { hi };
    (v + MAGIC).to_bits().wrapping_sub(MAGIC.to_bits()) as i32
}

/// Writes the fields of `value`, an expression in the column, for every column of `out`; the sum of the codes.
/// No closure: one that is not inlined would be compiled without the instruction set.
macro_rules! fields {
    ($rounding:expr, $out:expr, $c:ident => $value:expr) => {{
        let Rounding { shift, step, lo, hi, edges } = *$rounding;
        let (len, mut sum) = ($out.len(), 0i32);
        let shift = &shift[..len];
        if let Some([a, b, c]) = edges {
            for $c in 0..len {
                let v = $value + shift[$c];
                let field = i32::from(v >= a) + i32::from(v >= b) + i32::from(v >= c);
                sum += field;
                $out[$c] = field as u8;
            }
            sum + lo * len as i32
        } else {
            for $c in 0..len {
                let k = code(($value + shift[$c]) / step, lo as f32, hi as f32);
                sum += k;
                $out[$c] = (k - lo) as u8;
            }
            sum
        }
    }};
}

per_isa! {
    /// The codes of a row of floats; their sum.
    pub fn round(x: &[f32], rounding: &Rounding<'_>, out: &mut [u8]) -> i32 {
        let x = &x[..out.len()];
        fields!(rounding, out, c => x[c])
    }
}

per_isa! {
    /// Layer normalization of a row with weight `w` and bias `b`, and its codes; their sum. `row` has its length.
    pub fn normalize(
        x: &[f32], w: &[f32], b: &[f32], eps: f32, rounding: &Rounding<'_>, row: &mut [f32], out: &mut [u8],
    ) -> i32 {
        let len = out.len();
        let (x, w, b, row) = (&x[..len], &w[..len], &b[..len], &mut row[..len]);
        let mean = cpu::sum(x) / len as f32;
        for c in 0..len {
            row[c] = x[c] - mean;
        }
        let variance = cpu::dot(row, row) / len as f32;
        let r = 1.0 / f32::sqrt(variance + eps);
        fields!(rounding, out, c => Real::fma(row[c] * r, w[c], b[c]))
    }
}

per_isa! {
    /// The codes of a product; their sum.
    pub fn requantize(sums: &[i32], affine: &Affine<'_>, rounding: &Rounding<'_>, out: &mut [u8]) -> i32 {
        let (sums, affine) = (&sums[..out.len()], affine.over(out.len()));
        fields!(rounding, out, c => affine.at(c, sums[c]))
    }
}

per_isa! {
    /// The codes of a product where every column has a step of its own.
    pub fn requantize_columns(
        sums: &[i32], affine: &Affine<'_>, shift: &[f32], step: &[f32], lo: i32, hi: i32, out: &mut [u8],
    ) {
        let len = out.len();
        let (sums, shift, step, affine) = (&sums[..len], &shift[..len], &step[..len], affine.over(len));
        for c in 0..len {
            let k = code((affine.at(c, sums[c]) + shift[c]) / step[c], lo as f32, hi as f32);
            out[c] = (k - lo) as u8;
        }
    }
}

per_isa! {
    /// The codes of the GELU of a product; their sum. `row` has the length of all.
    pub fn gelu(
        sums: &[i32], affine: &Affine<'_>, rounding: &Rounding<'_>, row: &mut [f32], out: &mut [u8],
    ) -> i32 {
        let len = out.len();
        let (sums, affine, row) = (&sums[..len], affine.over(len), &mut row[..len]);
        for c in 0..len {
            row[c] = affine.at(c, sums[c]);
        }
        for x in row.iter_mut() {
            *x *= phi(*x);
        }
        fields!(rounding, out, c => row[c])
    }
}

per_isa! {
    /// A product added onto `y`.
    pub fn accumulate(sums: &[i32], affine: &Affine<'_>, y: &mut [f32]) {
        let (sums, affine) = (&sums[..y.len()], affine.over(y.len()));
        for c in 0..y.len() {
            y[c] += affine.at(c, sums[c]);
        }
    }
}

per_isa! {
    /// The codes, from 0 on as `rounding` has it without its shift, of the softmax of a query's logits over its keys;
    /// their sum. The logit of key m is `sums[m] query unit[m] + bias[m]`, where a bias of minus infinity is no key and
    /// has the code 0; `row` has the length of all.
    pub fn softmax(
        sums: &[i32], query: f32, unit: &[f32], bias: &[f32], rounding: &Rounding<'_>, row: &mut [f32],
        out: &mut [u8],
    ) -> i32 {
        let len = out.len();
        let (sums, row) = (&sums[..len], &mut row[..len]);
        let affine = Affine { step: query, unit, bias }.over(len);
        for m in 0..len {
            row[m] = affine.at(m, sums[m]);
        }
        let top = cpu::max(row);
        for v in row.iter_mut() {
            *v = Real::exp_nonpos(*v - top);
        }
        let r = 1.0 / cpu::sum(row);
        let Rounding { step, hi, edges, .. } = *rounding;
        let mut sum = 0i32;
        if let Some([a, b, c]) = edges {
            for m in 0..len {
                let v = row[m] * r;
                let field = i32::from(v >= a) + i32::from(v >= b) + i32::from(v >= c);
                sum += field;
                out[m] = field as u8;
            }
            return sum;
        }
        for m in 0..len {
            let k = code(row[m] * r / step, 0.0, hi as f32);
            sum += k;
            out[m] = k as u8;
        }
        sum
    }
}

per_isa! {
    /// The codes of a query's mixed values, `step (unit[c] sums[c] + total shift[c])`, where `step` and `total`
    /// are those of its probabilities' codes, and `unit` and `shift` those of the values; their sum.
    pub fn mix(
        sums: &[i32], step: f32, total: i32, unit: &[f32], shift: &[f32], rounding: &Rounding<'_>,
        out: &mut [u8],
    ) -> i32 {
        let len = out.len();
        let (sums, unit, shift, total) = (&sums[..len], &unit[..len], &shift[..len], total as f32);
        fields!(rounding, out, c => step * (sums[c] as f32 * unit[c] + total * shift[c]))
    }
}

per_isa! {
    /// `Σ_c (fields[c] + lo) w[c]`, summed lane by lane.
    pub fn weigh(fields: &[u8], lo: i32, w: &[f32]) -> f32 {
        const LANES: usize = 16;
        let w = &w[..fields.len()];
        let mut lanes = [0f32; LANES];
        let (us, ws) = (fields.chunks_exact(LANES), w.chunks_exact(LANES));
        let (ut, wt) = (us.remainder(), ws.remainder());
        for (u, w) in us.zip(ws) {
            for i in 0..LANES {
                lanes[i] = Real::fma((i32::from(u[i]) + lo) as f32, w[i], lanes[i]);
            }
        }
        for i in 0..ut.len() {
            lanes[i] = Real::fma((i32::from(ut[i]) + lo) as f32, wt[i], lanes[i]);
        }
        cpu::sum(&lanes)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::super::Isa;
    use super::*;
    use crate::kernels::{self, Levels};
    use crate::random::Random;

    const WIDTHS: [usize; 6] = [1, 3, 16, 65, 130, 197];
    const GRIDS: [Levels; 5] = [
        Levels { lo: -2, hi: 1, half: false },
        Levels { lo: 0, hi: 3, half: false },
        Levels { lo: -8, hi: 7, half: false },
        Levels { lo: -128, hi: 127, half: false },
        Levels { lo: 0, hi: 255, half: false },
    ];

    fn floats(name: &str, n: usize, spread: f32) -> Vec<f32> {
        let mut random = Random::new(8, name, &[n as u64]);
        // Multiples of 1/16 make many ties.
        (0..n).map(|_| (random.normal() * spread * 16.0).round() / 16.0).collect()
    }

    fn row(x: &[f32]) -> Tensor {
        Tensor::from_slice(x, (1, x.len()), &Device::Cpu).unwrap()
    }

    fn vector(x: &[f32]) -> Tensor {
        Tensor::from_slice(x, x.len(), &Device::Cpu).unwrap()
    }

    /// The fields that the trained quantizer gives for `x`, and their sum of codes.
    fn fields(x: &Tensor, step: f32, shift: Option<&[f32]>, levels: Levels) -> (Vec<u8>, i32) {
        let shift = shift.map(vector);
        let codes = kernels::lsq_codes(x, &vector(&[step]), shift.as_ref(), levels, None).unwrap();
        let codes: Vec<i32> =
            codes.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|&k| k as i32).collect();
        (codes.iter().map(|k| (k - levels.lo) as u8).collect(), codes.iter().sum())
    }

    /// Runs `body` for each instruction set, width and grid, with a step and shifts.
    fn everywhere(body: impl Fn(Isa, usize, Levels, &Rounding<'_>)) {
        for isa in Isa::available() {
            for n in WIDTHS {
                for levels in GRIDS {
                    let shift = floats("shift", n, 0.3);
                    let step = if levels.hi > 100 { 0.03125 } else { 0.625 };
                    body(isa, n, levels, &Rounding::new(&shift, step, levels.lo, levels.hi));
                }
            }
        }
    }

    #[test]
    fn codes_are_those_of_the_trained_quantizer() {
        everywhere(|isa, n, levels, rounding| {
            let (x, mut out) = (floats("x", n, 1.0), vec![0u8; n]);
            let sum = round(isa, &x, rounding, &mut out);
            assert_eq!(
                (out, sum),
                fields(&row(&x), rounding.step, Some(rounding.shift), levels),
                "{isa:?} {n}"
            );
        });
        let mut out = [9u8; 3];
        let rounding = Rounding::new(&[0.0; 3], 1.0, -2, 1);
        assert_eq!(round(Isa::best(), &[f32::NAN, f32::INFINITY, -1e30], &rounding, &mut out), -3);
        assert_eq!(out, [0, 3, 0]);
    }

    #[test]
    fn norms_and_products_go_to_the_codes_of_the_ops() {
        everywhere(|isa, n, levels, rounding| {
            let (x, w, b) = (floats("x", n, 1.0), floats("w", n, 1.0), floats("b", n, 0.2));
            let shift = Some(rounding.shift);
            let (mut scratch, mut out) = (vec![0f32; n], vec![0u8; n]);
            let sum = normalize(isa, &x, &w, &b, 1e-3, rounding, &mut scratch, &mut out);
            let y = kernels::layer_norm(&row(&x), &vector(&w), &vector(&b), 1e-3).unwrap();
            assert_eq!((out.clone(), sum), fields(&y, rounding.step, shift, levels), "norm {isa:?} {n}");

            let sums: Vec<i32> = floats("sums", n, 40.0).iter().map(|&v| v as i32).collect();
            let affine = Affine { step: 0.25, unit: &w, bias: &b };
            let y: Vec<f32> = (0..n).map(|c| sums[c] as f32 * (0.25 * w[c]) + b[c]).collect();
            let sum = requantize(isa, &sums, &affine, rounding, &mut out);
            assert_eq!((out.clone(), sum), fields(&row(&y), rounding.step, shift, levels), "{isa:?} {n}");
            let steps = vec![rounding.step; n];
            let before = out.clone();
            requantize_columns(isa, &sums, &affine, rounding.shift, &steps, levels.lo, levels.hi, &mut out);
            assert_eq!(out, before, "columns {isa:?} {n}");
            let sum = super::gelu(isa, &sums, &affine, rounding, &mut scratch, &mut out);
            let gelu = kernels::gelu(&row(&y)).unwrap();
            assert_eq!((out.clone(), sum), fields(&gelu, rounding.step, shift, levels), "gelu {isa:?} {n}");
            let mut z = x.clone();
            accumulate(isa, &sums, &affine, &mut z);
            assert!(z.iter().zip(&x).zip(&y).all(|((z, x), y)| *z == x + y), "accumulate {isa:?} {n}");
        });
    }

    #[test]
    fn probabilities_and_mixes() {
        everywhere(|isa, n, levels, rounding| {
            let sums: Vec<i32> = floats("sums", n, 9.0).iter().map(|&v| v as i32).collect();
            let (unit, bias) = (floats("unit", n, 0.3), floats("bias", n, 1.0));
            let (mut scratch, mut out) = (vec![0f32; n], vec![0u8; n]);
            if levels.lo == 0 {
                let step = 1.0 / (levels.hi as f32 + 3.0);
                let logits: Vec<f32> = (0..n).map(|m| sums[m] as f32 * (0.25 * unit[m]) + bias[m]).collect();
                let how = Rounding::new(&[], step, 0, levels.hi);
                let sum = softmax(isa, &sums, 0.25, &unit, &bias, &how, &mut scratch, &mut out);
                let p = kernels::softmax(&row(&logits)).unwrap();
                assert_eq!((out.clone(), sum), fields(&p, step, None, levels), "softmax {isa:?} {n}");
                // Filled up with what is no key.
                let filled = n.next_multiple_of(16);
                let with = |of: &[f32], end| [of, &vec![end; filled - n]].concat();
                let (unit, bias) = (with(&unit, 0.0), with(&bias, f32::NEG_INFINITY));
                let sums = [&sums[..], &vec![0; filled - n]].concat();
                let (mut scratch, mut more) = (vec![0f32; filled], vec![9u8; filled]);
                let same = softmax(isa, &sums, 0.25, &unit, &bias, &how, &mut scratch, &mut more);
                assert!(same == sum && more[..n] == out && more[n..].iter().all(|&k| k == 0), "{isa:?} {n}");
            }
            let sum = mix(isa, &sums, 0.25, 3, &unit, &bias, rounding, &mut out);
            let y: Vec<f32> = (0..n).map(|c| 0.25 * (sums[c] as f32 * unit[c] + 3.0 * bias[c])).collect();
            let want = fields(&row(&y), rounding.step, Some(rounding.shift), levels);
            assert_eq!((out.clone(), sum), want, "mix {isa:?} {n}");
            let exact: f64 = out
                .iter()
                .zip(&unit)
                .map(|(&u, &w)| f64::from(i32::from(u) + levels.lo) * f64::from(w))
                .sum();
            let got = weigh(isa, &out, levels.lo, &unit);
            assert!((f64::from(got) - exact).abs() <= 1e-5 * (1.0 + exact.abs()) * n as f64, "{isa:?} {n}");
            assert_eq!(got.to_bits(), weigh(Isa::Scalar, &out, levels.lo, &unit).to_bits(), "{isa:?} {n}");
        });
    }
}
