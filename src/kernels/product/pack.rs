//! Packing: a matrix written as words in the order in which a register tile reads them.
//!
//! A panel is `width` lanes (columns of b, or rows of a) by `words` words, lane fastest; lanes that
//! do not exist are zero. Along k the words hold one f32 each, or pairs of bf16 (see [`Word`]), so
//! a pair lane costs one conversion here and nothing in the product.

use super::View;
use half::bf16;

/// What a word of 32 bits holds.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Word {
    /// An f32.
    Plain,
    /// An f32 that was rounded to bf16.
    Rounded,
    /// Two bf16, neighbours along k, the first in the low half.
    Pairs,
}

impl Word {
    /// Elements along k.
    pub fn depth(self) -> usize {
        if self == Word::Pairs {
            2
        } else {
            1
        }
    }
}

/// An element of an operand: `f32` or `bf16`.
pub trait Element: Copy + Send + Sync + sealed::Sealed + 'static {}
impl Element for f32 {}
impl Element for bf16 {}

pub(super) mod sealed {
    #[cfg(target_arch = "x86_64")]
    use std::arch::x86_64::*;

    pub trait Sealed: Copy {
        /// Whether a slice of it is a slice of [`super::Word::Plain`] already.
        const PLAIN: bool;
        fn wide(self) -> f32;
        /// The first `count` (1 to 16) elements at `at` as f32; the others are zero.
        ///
        /// # Safety
        /// They lie there, and AVX512 F, BW and VL are there.
        #[cfg(target_arch = "x86_64")]
        unsafe fn load(at: *const Self, count: usize) -> __m512;
    }

    impl Sealed for f32 {
        const PLAIN: bool = true;
        #[inline(always)]
        fn wide(self) -> f32 {
            self
        }
        #[cfg(target_arch = "x86_64")]
        #[inline(always)]
        unsafe fn load(at: *const f32, count: usize) -> __m512 {
            // SAFETY: the caller's contract; masked lanes are not read.
            unsafe { _mm512_maskz_loadu_ps((0xffff_u32 >> (16 - count)) as u16, at) }
        }
    }

    impl Sealed for half::bf16 {
        const PLAIN: bool = false;
        #[inline(always)]
        fn wide(self) -> f32 {
            self.to_f32()
        }
        #[cfg(target_arch = "x86_64")]
        #[inline(always)]
        unsafe fn load(at: *const half::bf16, count: usize) -> __m512 {
            // SAFETY: the caller's contract; masked lanes are not read. The upper half of an f32
            // is a bf16.
            unsafe {
                let half = _mm256_maskz_loadu_epi16((0xffff_u32 >> (16 - count)) as u16, at.cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
            }
        }
    }
}

/// Lanes by k elements of an operand: (p, j) at `data[p * along + j * across]`.
#[derive(Clone, Copy)]
pub(super) struct Source<'a, T> {
    pub data: &'a [T],
    pub along: usize,
    pub across: usize,
}

impl<'a, T: Element> Source<'a, T> {
    /// The columns of b [k, n] as lanes.
    pub fn columns(b: View<'a, T>) -> Self {
        Source { data: b.data, along: b.rs, across: b.cs }
    }

    /// The rows of a [m, k] as lanes.
    pub fn rows(a: View<'a, T>) -> Self {
        Source { data: a.data, along: a.cs, across: a.rs }
    }

    /// The part that begins at element `p` along k and lane `j`.
    pub fn from(self, p: usize, j: usize) -> Self {
        Source { data: &self.data[p * self.along + j * self.across..], ..self }
    }

    fn at(&self, p: usize, j: usize) -> f32 {
        self.data[p * self.along + j * self.across].wide()
    }

    fn word(&self, word: Word, w: usize, j: usize, k: usize) -> u32 {
        match word {
            Word::Plain => self.at(w, j).to_bits(),
            Word::Rounded => bf16::from_f32(self.at(w, j)).to_f32().to_bits(),
            Word::Pairs => {
                let low = bf16::from_f32(self.at(2 * w, j)).to_bits();
                let high = if 2 * w + 1 < k { bf16::from_f32(self.at(2 * w + 1, j)).to_bits() } else { 0 };
                u32::from(high) << 16 | u32::from(low)
            }
        }
    }

    /// Panics unless `lanes` by `k` elements lie in the slice.
    fn check(&self, lanes: usize, k: usize) {
        assert!(
            (lanes - 1) * self.across + (k - 1) * self.along < self.data.len(),
            "operand of a product lies outside its slice"
        );
    }
}

/// Whether the packers may use AVX512.
fn wide_vectors(word: Word) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use super::kernel::Road;
        match word {
            Word::Plain => Road::Avx512.there(),
            Word::Rounded => false,
            Word::Pairs => Road::Avx512Pairs.there(),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = word;
        false
    }
}

/// Packs `lanes` by `k` elements into panels of these widths, one after the other, each of them
/// [k / depth rounded up, width]. Together they are as wide as the lanes, or wider.
pub(super) fn panels<T: Element>(
    word: Word,
    dst: &mut [u32],
    widths: &[usize],
    src: Source<T>,
    lanes: usize,
    k: usize,
) {
    let words = k.div_ceil(word.depth());
    let all: usize = widths.iter().sum();
    assert!(0 < lanes && lanes <= all && 0 < k && dst.len() == words * all);
    src.check(lanes, k);
    #[cfg(target_arch = "x86_64")]
    if wide_vectors(word)
        && widths.iter().all(|w| w.is_multiple_of(16))
        && (src.across == 1 || src.along == 1)
    {
        // SAFETY: `wide_vectors` detected the features; the assertions above cover `dst` (whole
        // vectors, as widths are multiples of 16) and every element of `src`.
        unsafe {
            match (word, src.across == 1) {
                (Word::Pairs, true) => x86::copied_pairs(dst, widths, src, lanes, k),
                (Word::Pairs, false) => x86::turned_pairs(dst, widths, src, lanes, k),
                (_, true) => x86::copied_plain(dst, widths, src, lanes, k),
                (_, false) => x86::turned_plain(dst, widths, src, lanes, k),
            }
        }
        return;
    }
    let (mut rest, mut first) = (dst, 0);
    for &width in widths {
        let (panel, after) = rest.split_at_mut(words * width);
        for (w, row) in panel.chunks_exact_mut(width).enumerate() {
            for (j, out) in row.iter_mut().enumerate() {
                *out = if first + j < lanes { src.word(word, w, first + j, k) } else { 0 };
            }
        }
        (rest, first) = (after, first + width);
    }
}

/// Packs lanes one after the other, each as its `k / depth` (rounded up) words.
pub(super) fn lines<T: Element>(word: Word, dst: &mut [u32], src: Source<T>, lanes: usize, k: usize) {
    let words = k.div_ceil(word.depth());
    assert!(0 < lanes && 0 < k && dst.len() == words * lanes);
    src.check(lanes, k);
    #[cfg(target_arch = "x86_64")]
    if wide_vectors(word) && src.along == 1 {
        // SAFETY: `wide_vectors` detected the features, and the assertions above cover both sides.
        unsafe {
            if word == Word::Pairs {
                x86::lines_pairs(dst, src, lanes, k);
            } else {
                x86::lines_plain(dst, src, lanes, k);
            }
        }
        return;
    }
    for (j, line) in dst.chunks_exact_mut(words).enumerate() {
        for (w, out) in line.iter_mut().enumerate() {
            *out = src.word(word, w, j, k);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Element, Source};
    use std::arch::x86_64::*;

    /// 16 words that begin `count` elements (up to 16 words' worth) at `at`, along k.
    #[inline(always)]
    unsafe fn along<T: Element, const PAIRS: bool>(at: *const T, count: usize) -> __m512i {
        // SAFETY: the caller's contract: `count` elements lie there and the features are there.
        unsafe {
            if PAIRS {
                let low = T::load(at, count.min(16));
                let high = if count > 16 { T::load(at.add(16), count - 16) } else { _mm512_setzero_ps() };
                pair(low, high)
            } else {
                _mm512_castps_si512(T::load(at, count))
            }
        }
    }

    /// `low` rounded to bf16 in the first 16 places, `high` in the last.
    #[inline(always)]
    unsafe fn pair(low: __m512, high: __m512) -> __m512i {
        // SAFETY: the caller's contract: AVX512-BF16 is there; both types are the same 64 bytes.
        unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
    }

    /// Lanes that are neighbours in memory: rows of k are copied (pairs: two rows interleaved), each
    /// row into all panels, so that memory is read in runs as long as there are.
    #[inline(always)]
    unsafe fn copied<T: Element, const PAIRS: bool>(
        dst: &mut [u32],
        widths: &[usize],
        src: Source<T>,
        lanes: usize,
        k: usize,
    ) {
        let words = if PAIRS { k.div_ceil(2) } else { k };
        // SAFETY: the caller's contract: vector v of the lanes below `lanes` is in `src`, row w of a
        // panel in `dst`.
        unsafe {
            let interleave: [u16; 32] =
                std::array::from_fn(|i| if i % 2 == 0 { i as u16 / 2 } else { 16 + i as u16 / 2 });
            let interleave = _mm512_loadu_si512(interleave.as_ptr().cast());
            for w in 0..words {
                let from = src.data.as_ptr().add(if PAIRS { 2 * w } else { w } * src.along);
                let mut first = 0;
                for &width in widths {
                    let row = dst.as_mut_ptr().add(first * words + w * width);
                    for v in (0..width).step_by(16) {
                        let count = lanes.saturating_sub(first + v).min(16);
                        let word = if count == 0 {
                            _mm512_setzero_si512()
                        } else if PAIRS {
                            let at = from.add(first + v);
                            let low = T::load(at, count);
                            let high = if 2 * w + 1 < k {
                                T::load(at.add(src.along), count)
                            } else {
                                _mm512_setzero_ps()
                            };
                            _mm512_permutexvar_epi16(interleave, pair(low, high))
                        } else {
                            _mm512_castps_si512(T::load(from.add(first + v), count))
                        };
                        _mm512_storeu_si512(row.add(v).cast(), word);
                    }
                    first += width;
                }
            }
        }
    }

    /// Lanes along which k is contiguous: blocks of 16 lanes by 16 words are transposed.
    #[inline(always)]
    unsafe fn turned<T: Element, const PAIRS: bool>(
        dst: &mut [u32],
        widths: &[usize],
        src: Source<T>,
        lanes: usize,
        k: usize,
    ) {
        let depth = if PAIRS { 2 } else { 1 };
        let words = k.div_ceil(depth);
        let mut first = 0;
        for &width in widths {
            // 16 streams at a time, each read to its end: of more than that the machine does not
            // see that they are streams.
            for v in (0..width).step_by(16) {
                let there = lanes.saturating_sub(first + v).min(16);
                for w in (0..words).step_by(16) {
                    let rows = (words - w).min(16);
                    let count = (k - w * depth).min(16 * depth);
                    let at = src.data.as_ptr().wrapping_add((first + v) * src.across + w * depth);
                    // SAFETY: the caller's contract: lanes below `lanes` hold k elements each, and
                    // row w of a panel holds `width` words, whole vectors.
                    unsafe {
                        let mut block = [_mm512_setzero_si512(); 16];
                        if there == 16 && count == 16 * depth {
                            for (j, line) in block.iter_mut().enumerate() {
                                *line = along::<T, PAIRS>(at.wrapping_add(j * src.across), 16 * depth);
                            }
                        } else {
                            for (j, line) in block.iter_mut().enumerate().take(there) {
                                *line = along::<T, PAIRS>(at.wrapping_add(j * src.across), count);
                            }
                        }
                        let to = dst.as_mut_ptr().add(first * words + w * width + v);
                        for (r, line) in transpose(block).iter().enumerate().take(rows) {
                            _mm512_storeu_si512(to.add(r * width).cast(), *line);
                        }
                    }
                }
            }
            first += width;
        }
    }

    #[inline(always)]
    unsafe fn transpose(r: [__m512i; 16]) -> [__m512i; 16] {
        // SAFETY: the caller's contract: AVX512F is there.
        unsafe {
            let mut t = r;
            for i in 0..8 {
                t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
            }
            let mut u = t;
            for i in 0..4 {
                for h in 0..2 {
                    u[4 * i + 2 * h] = _mm512_unpacklo_epi64(t[4 * i + h], t[4 * i + 2 + h]);
                    u[4 * i + 2 * h + 1] = _mm512_unpackhi_epi64(t[4 * i + h], t[4 * i + 2 + h]);
                }
            }
            // u[4 i + c]: in each quarter q, column 4 q + c of rows 4 i to 4 i + 3.
            let mut out = r;
            for c in 0..4 {
                let low = _mm512_shuffle_i32x4::<0x44>(u[c], u[4 + c]);
                let high = _mm512_shuffle_i32x4::<0xee>(u[c], u[4 + c]);
                let low2 = _mm512_shuffle_i32x4::<0x44>(u[8 + c], u[12 + c]);
                let high2 = _mm512_shuffle_i32x4::<0xee>(u[8 + c], u[12 + c]);
                out[c] = _mm512_shuffle_i32x4::<0x88>(low, low2);
                out[4 + c] = _mm512_shuffle_i32x4::<0xdd>(low, low2);
                out[8 + c] = _mm512_shuffle_i32x4::<0x88>(high, high2);
                out[12 + c] = _mm512_shuffle_i32x4::<0xdd>(high, high2);
            }
            out
        }
    }

    #[inline(always)]
    unsafe fn lines<T: Element, const PAIRS: bool>(dst: &mut [u32], src: Source<T>, lanes: usize, k: usize) {
        let depth = if PAIRS { 2 } else { 1 };
        let words = k.div_ceil(depth);
        // SAFETY: the caller's contract: each lane holds k elements, each line `words` words.
        unsafe {
            for j in 0..lanes {
                let from = src.data.as_ptr().add(j * src.across);
                let to = dst.as_mut_ptr().add(j * words);
                let mut w = 0;
                while w + 16 <= k / depth {
                    let word = along::<T, PAIRS>(from.add(w * depth), 16 * depth);
                    _mm512_storeu_si512(to.add(w).cast(), word);
                    w += 16;
                }
                if w < words {
                    let word = along::<T, PAIRS>(from.add(w * depth), k - w * depth);
                    let mask = (0xffff_u32 >> (16 - (words - w))) as u16;
                    _mm512_mask_storeu_epi32(to.add(w).cast(), mask, word);
                }
            }
        }
    }

    macro_rules! compiled {
        ($features:literal, $pairs:literal: $copied:ident $turned:ident $lines:ident) => {
            /// # Safety
            /// The features are there; `src` holds `lanes` by `k`, `dst` their panels, whose
            /// widths are multiples of 16.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $copied<T: Element>(
                dst: &mut [u32],
                widths: &[usize],
                src: Source<T>,
                lanes: usize,
                k: usize,
            ) {
                // SAFETY: the caller's contract.
                unsafe { copied::<T, $pairs>(dst, widths, src, lanes, k) }
            }

            /// # Safety
            /// As for the function above.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $turned<T: Element>(
                dst: &mut [u32],
                widths: &[usize],
                src: Source<T>,
                lanes: usize,
                k: usize,
            ) {
                // SAFETY: the caller's contract.
                unsafe { turned::<T, $pairs>(dst, widths, src, lanes, k) }
            }

            /// # Safety
            /// The features are there; `src` holds `lanes` by `k`, `dst` their words.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $lines<T: Element>(dst: &mut [u32], src: Source<T>, lanes: usize, k: usize) {
                // SAFETY: the caller's contract.
                unsafe { lines::<T, $pairs>(dst, src, lanes, k) }
            }
        };
    }

    compiled!("avx512f,avx512bw,avx512vl,avx2", false: copied_plain turned_plain lines_plain);
    compiled!("avx512f,avx512bw,avx512vl,avx2,avx512bf16", true: copied_pairs turned_pairs lines_pairs);
}
