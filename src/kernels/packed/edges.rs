//! The edges between integer products: what becomes of a row of sums before the next product reads it.
//!
//! Each function takes one token's row from floats or whole sums to codes in one pass, so that nothing but
//! codes is ever written to memory between two products. A code is `clamp(rne((v + shift) / step), lo, hi)`, as
//! the trained quantizer has it (ofq.md 2.1), to the bit; a NaN takes the lowest code. The orders of all float
//! operations are those of the ops of [`crate::kernels`], and the same on every instruction set.

use crate::kernels::cpu::{self, Real};
use crate::kernels::gelu::phi;

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

impl Rounding<'_> {
    /// Writes the fields of `value(c)` for every column; the sum of the codes.
    #[inline(always)]
    fn write(&self, out: &mut [u8], value: impl Fn(usize) -> f32) -> i32 {
        let shift = &self.shift[..out.len()];
        let (lo, hi) = (self.lo as f32, self.hi as f32);
        let mut sum = 0i32;
        for c in 0..out.len() {
            let k = code((value(c) + shift[c]) / self.step, lo, hi);
            sum += k;
            out[c] = (k - self.lo) as u8;
        }
        sum
    }
}

per_isa! {
    /// The codes of a row of floats; their sum.
    pub fn round(x: &[f32], rounding: &Rounding<'_>, out: &mut [u8]) -> i32 {
        let x = &x[..out.len()];
        rounding.write(out, |c| x[c])
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
        rounding.write(out, |c| Real::fma(row[c] * r, w[c], b[c]))
    }
}

per_isa! {
    /// The codes of a product; their sum.
    pub fn requantize(sums: &[i32], affine: &Affine<'_>, rounding: &Rounding<'_>, out: &mut [u8]) -> i32 {
        let (sums, affine) = (&sums[..out.len()], affine.over(out.len()));
        rounding.write(out, |c| affine.at(c, sums[c]))
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
    /// The codes of the GELU of a product; their sum.
    pub fn gelu(sums: &[i32], affine: &Affine<'_>, rounding: &Rounding<'_>, out: &mut [u8]) -> i32 {
        let (sums, affine) = (&sums[..out.len()], affine.over(out.len()));
        rounding.write(out, |c| {
            let x = affine.at(c, sums[c]);
            x * phi(x)
        })
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
    /// The codes, from 0 to `hi` on `step`, of the softmax of a query's logits over its keys; their sum. The
    /// logit of key m is `sums[m] query unit[m] + bias[m]`; `row` has the length of all.
    pub fn softmax(
        sums: &[i32], query: f32, unit: &[f32], bias: &[f32], step: f32, hi: i32, row: &mut [f32],
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
        let mut sum = 0i32;
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
        rounding.write(out, |c| step * (sums[c] as f32 * unit[c] + total * shift[c]))
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
