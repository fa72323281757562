//! Activations as bytes: their quantization, and the codes of a caller.
//!
//! `vpdpbusd` multiplies unsigned bytes by signed ones. Activations are the unsigned side, so that the codes 0 to 255 of an
//! unsigned grid fit; signed ones lie 128 higher, which the product takes back by starting from `-128` times the row sums of
//! the weight.

use rayon::prelude::*;

use super::lines::{bytes, bytes_mut, Line};
use crate::kernels::packed::isa::Isa;

/// Elements below which the calling thread does them all: about 10 µs of work.
const ALONE: usize = 1 << 17;

/// Quantized activations, `[tokens, cols]`, with the step and the sum of each token.
#[derive(Clone, Default)]
pub struct Tokens {
    pub(super) tokens: usize,
    pub(super) cols: usize,
    /// Lines of a token. Odd: tokens a multiple of 4 KB apart would meet in the same few places of the cache.
    pub(super) lines_each: usize,
    /// The codes plus `bias`; zeros behind a token's columns.
    pub(super) lines: Vec<Line>,
    /// 128 where codes are signed, else 0.
    pub(super) bias: u8,
    /// Sums of the codes.
    pub(super) sums: Vec<i32>,
    pub(super) step: Vec<f32>,
}

/// How [`Tokens::quantize`] makes codes.
#[derive(Clone, Copy, Debug)]
pub struct Quantizer<'a> {
    /// Steps, all above 0; token `t` has entry `t mod len`.
    pub step: &'a [f32],
    /// The lowest code, 0 or less: `lo..=hi` lies within -128..=127 or 0..=255.
    pub lo: i32,
    /// The highest code.
    pub hi: i32,
    /// Added to each column before; empty, or one for each column.
    pub shift: &'a [f32],
}

impl Quantizer<'_> {
    fn step_of(&self, token: usize) -> f32 {
        self.step[token % self.step.len()]
    }
}

/// What the loop over a token needs.
#[derive(Clone, Copy)]
struct Row<'a> {
    shift: &'a [f32],
    lo: f32,
    hi: f32,
    bias: i32,
}

impl Tokens {
    fn blank(tokens: usize, cols: usize, bias: u8) -> Tokens {
        let lines_each = cols.div_ceil(Line::BYTES) | 1;
        let lines = vec![Line::ZERO; tokens * lines_each];
        Tokens { tokens, cols, lines_each, lines, bias, sums: vec![0; tokens], step: vec![1.0; tokens] }
    }

    /// Quantizes `x`: `k = clamp(rne((x + shift) / step), lo, hi)`, as LSQ does, to the bit.
    ///
    /// Token `t` are the `cols` elements from `t stride` on. A token with a NaN gets the step NaN, so that
    /// all its results are NaN, as those of a product in floats would be.
    ///
    /// Panics where the lengths do not fit, and where `lo..=hi` fits neither a signed nor an unsigned byte.
    pub fn quantize(
        x: &[f32],
        tokens: usize,
        cols: usize,
        stride: usize,
        how: Quantizer,
        isa: Isa,
    ) -> Tokens {
        let mut out = Tokens::blank(tokens, cols, 0);
        let row = out.prepare(x, tokens, cols, stride, how, isa);
        let each = out.lines_each;
        let rows = out.lines.par_chunks_exact_mut(each).zip(&mut out.sums).zip(&mut out.step);
        match tokens * cols < ALONE || rayon::current_num_threads() == 1 {
            true => out.fill(x, stride, how, row, isa, 0),
            false => rows.enumerate().with_min_len((ALONE / 4).div_ceil(cols)).for_each(
                |(t, ((lines, sum), step))| {
                    (*sum, *step) =
                        quantize_token(isa, &x[t * stride..][..cols], how.step_of(t), row, bytes_mut(lines));
                },
            ),
        }
        out
    }

    /// Quantizes on this thread, into memory that is there already; `first` is what the first token counts as among the steps.
    pub(super) fn requantize(
        &mut self,
        x: &[f32],
        (first, tokens): (usize, usize),
        cols: usize,
        stride: usize,
        how: Quantizer,
        isa: Isa,
    ) {
        let row = self.prepare(x, tokens, cols, stride, how, isa);
        self.fill(x, stride, how, row, isa, first);
    }

    /// Checks the arguments and makes room.
    fn prepare<'a>(
        &mut self,
        x: &[f32],
        tokens: usize,
        cols: usize,
        stride: usize,
        how: Quantizer<'a>,
        isa: Isa,
    ) -> Row<'a> {
        assert!(Isa::available().contains(&isa), "an instruction set of this processor");
        let highest = if how.lo < 0 { 127 } else { 255 };
        assert!(how.lo >= -128 && how.lo <= how.hi && how.hi <= highest, "the range of a byte");
        assert!(
            !how.step.is_empty() && (how.shift.is_empty() || how.shift.len() == cols),
            "steps and shifts"
        );
        assert!(
            tokens == 0 || cols <= stride && x.len() >= (tokens - 1) * stride + cols,
            "x holds the tokens"
        );
        self.bias = if how.lo < 0 { 128 } else { 0 };
        (self.tokens, self.cols, self.lines_each) = (tokens, cols, cols.div_ceil(Line::BYTES) | 1);
        self.lines.resize(tokens * self.lines_each, Line::ZERO);
        self.sums.resize(tokens, 0);
        self.step.resize(tokens, 1.0);
        Row { shift: how.shift, lo: how.lo as f32, hi: how.hi as f32, bias: i32::from(self.bias) }
    }

    fn fill(&mut self, x: &[f32], stride: usize, how: Quantizer, row: Row, isa: Isa, first: usize) {
        let rows = self.lines.chunks_exact_mut(self.lines_each).zip(&mut self.sums).zip(&mut self.step);
        for (t, ((lines, sum), step)) in rows.enumerate() {
            (*sum, *step) = quantize_token(
                isa,
                &x[t * stride..][..self.cols],
                how.step_of(first + t),
                row,
                bytes_mut(lines),
            );
        }
    }

    /// Signed codes, `[tokens, cols]`, with a step for each token (`t mod len`).
    ///
    /// Panics where the lengths do not fit.
    pub fn of_signed(codes: &[i8], tokens: usize, cols: usize, step: &[f32]) -> Tokens {
        assert!(codes.len() == tokens * cols, "codes for the tokens");
        Tokens::of(tokens, cols, 128, step, |t, out| {
            let codes = &codes[t * cols..(t + 1) * cols];
            out.iter_mut().zip(codes).for_each(|(out, &code)| *out = code as u8 ^ 0x80);
            codes.iter().map(|&code| i32::from(code)).sum()
        })
    }

    /// Unsigned codes, `[tokens, cols]`, with a step for each token (`t mod len`).
    ///
    /// Panics where the lengths do not fit.
    pub fn of_unsigned(codes: &[u8], tokens: usize, cols: usize, step: &[f32]) -> Tokens {
        assert!(codes.len() == tokens * cols, "codes for the tokens");
        Tokens::of(tokens, cols, 0, step, |t, out| {
            let codes = &codes[t * cols..(t + 1) * cols];
            out.copy_from_slice(codes);
            codes.iter().map(|&code| i32::from(code)).sum()
        })
    }

    fn of(
        tokens: usize,
        cols: usize,
        bias: u8,
        step: &[f32],
        row: impl Fn(usize, &mut [u8]) -> i32,
    ) -> Tokens {
        assert!(!step.is_empty(), "a step");
        let mut out = Tokens::blank(tokens, cols, bias);
        for (t, lines) in out.lines.chunks_exact_mut(out.lines_each).enumerate() {
            out.sums[t] = row(t, &mut bytes_mut(lines)[..cols]);
            out.step[t] = step[t % step.len()];
        }
        out
    }

    /// How many tokens there are.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Codes of a token.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The step of each token; NaN where the token had a NaN.
    pub fn step(&self) -> &[f32] {
        &self.step
    }

    /// The sum of each token's codes.
    pub fn sums(&self) -> &[i32] {
        &self.sums
    }

    /// The code of a column of a token.
    pub fn code(&self, token: usize, column: usize) -> i32 {
        assert!(column < self.cols, "a column");
        i32::from(bytes(&self.lines[token * self.lines_each..][..self.lines_each])[column])
            - i32::from(self.bias)
    }
}

/// Quantizes one token into all of its bytes: its sum and its step. The processor has the set.
fn quantize_token(isa: Isa, x: &[f32], step: f32, how: Row, out: &mut [u8]) -> (i32, f32) {
    let (out, rest) = out.split_at_mut(x.len());
    rest.fill(0);
    let (sum, nan) = match isa {
        // SAFETY: `Tokens::prepare` found the set among the processor's.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::quantize(x, step, how, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { quantize_avx2(x, step, how, out) },
        _ => quantize_row(x, step, how, out),
    };
    (sum, if nan { f32::NAN } else { step })
}

/// Codes plus bias of one token; their sum (without it), and whether there was a NaN.
#[inline(always)]
fn quantize_row(x: &[f32], step: f32, how: Row, out: &mut [u8]) -> (i32, bool) {
    let (mut sum, mut nan) = (0i32, 0u32);
    let mut one = |x: f32, out: &mut u8| {
        let v = x / step;
        nan |= u32::from(v.is_nan());
        let v = if v < how.lo { how.lo } else { v };
        let v = if v > how.hi { how.hi } else { v };
        // A NaN becomes 0 here, which its step makes good.
        let code = v.round_ties_even() as i32;
        sum += code;
        *out = (code + how.bias) as u8;
    };
    match how.shift.is_empty() {
        true => x.iter().zip(out).for_each(|(&x, out)| one(x, out)),
        false => x.iter().zip(how.shift).zip(out).for_each(|((&x, &shift), out)| one(x + shift, out)),
    }
    (sum, nan != 0)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn quantize_avx2(x: &[f32], step: f32, how: Row, out: &mut [u8]) -> (i32, bool) {
    quantize_row(x, step, how, out)
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::Row;

    /// Within this of a tie, the quotient itself decides: a product with the reciprocal of the step, which is several times
    /// cheaper, is at most three roundings off, `3 · 2^-24` of 256.
    const DOUBT: f32 = 1.0 / 16384.0;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    pub(super) fn quantize(x: &[f32], step: f32, how: Row, out: &mut [u8]) -> (i32, bool) {
        assert!(out.len() == x.len() && (how.shift.is_empty() || how.shift.len() == x.len()));
        let (s, inverse) = (_mm512_set1_ps(step), _mm512_set1_ps(1.0 / step));
        // Elsewhere the reciprocal or the product may leave the range of normal numbers, and with it the bound on its error.
        let divide = !(1e-30..=1e30).contains(&step);
        let (lo, hi) = (_mm512_set1_ps(how.lo), _mm512_set1_ps(how.hi));
        let bias = _mm512_set1_epi32(how.bias);
        let doubtful = _mm512_set1_ps(0.5 - DOUBT);
        let clamp = |v| _mm512_min_ps(_mm512_max_ps(v, lo), hi);
        let mut sum = _mm512_setzero_si512();
        let mut nan = 0u16;
        let mut i = 0;
        while i < x.len() {
            let mask = if x.len() - i < 16 { (1u16 << (x.len() - i)) - 1 } else { !0 };
            // SAFETY: the mask leaves out what lies beyond the end of x.
            let mut v = unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr().add(i)) };
            if !how.shift.is_empty() {
                // SAFETY: the shift was checked to be as long as x.
                v = _mm512_add_ps(v, unsafe { _mm512_maskz_loadu_ps(mask, how.shift.as_ptr().add(i)) });
            }
            let unordered = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            nan |= unordered;
            let mut near = clamp(_mm512_mul_ps(v, inverse));
            let rest = _mm512_sub_ps(near, _mm512_roundscale_ps::<0x08>(near));
            if divide || _mm512_cmp_ps_mask::<_CMP_GE_OQ>(_mm512_abs_ps(rest), doubtful) != 0 {
                near = clamp(_mm512_div_ps(v, s));
            }
            // To nearest, ties to even, as the processor is set; 0 where there is no number.
            let code = _mm512_maskz_cvtps_epi32(!unordered, near);
            sum = _mm512_add_epi32(sum, code);
            let bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(code, bias));
            // SAFETY: out was checked to be as long as x.
            unsafe {
                match mask {
                    0xffff => _mm_storeu_si128(out.as_mut_ptr().add(i).cast(), bytes),
                    _ => _mm_mask_storeu_epi8(out.as_mut_ptr().add(i).cast(), mask, bytes),
                }
            }
            i += 16;
        }
        (_mm512_reduce_add_epi32(sum), nan != 0)
    }
}
