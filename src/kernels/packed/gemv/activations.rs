//! A row of activations, made ready for the kernels: as 8-bit codes, or as floats.
//!
//! Both lie block by block ([`Columns`]). A row is prepared once and then read by every thread, and by every weight
//! whose columns fall into the same groups; its buffers are kept from one preparation to the next.

use super::columns::Columns;
use super::Format;
use crate::kernels::packed::isa::Isa;

/// A row of activations as 8-bit codes: `x[k] ≈ scale[block of k] code[k]`, codes from -127 to 127.
///
/// Each block of up to 64 columns has its own scale, its greatest magnitude over 127.
#[derive(Clone, Debug)]
pub struct Int8Row {
    pub(super) columns: Columns,
    /// `[blocks, stride]`.
    pub(super) codes: Vec<i8>,
    /// `[blocks]`. A block that holds a NaN or an infinity has the scale NaN, so that the product shows it.
    pub(super) scale: Vec<f32>,
    /// The sum of the codes of each block, exact.
    pub(super) sum: Vec<f32>,
}

impl Default for Int8Row {
    fn default() -> Self {
        Int8Row { columns: Columns::new(0, 1), codes: Vec::new(), scale: Vec::new(), sum: Vec::new() }
    }
}

impl Int8Row {
    /// Quantizes `x: [cols]`.
    pub fn quantize(&mut self, columns: Columns, x: &[f32], isa: Isa) {
        assert_eq!(x.len(), columns.cols(), "activations of a row");
        assert!(isa.is_available(), "{isa:?} on this processor");
        self.columns = columns;
        self.codes.resize(columns.blocks() * columns.stride(), 0);
        self.scale.resize(columns.blocks(), 0.0);
        self.sum.resize(columns.blocks(), 0.0);
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `isa` is available, asserted above.
            Isa::Avx512 => unsafe { self.fill_avx512(x) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `isa` is available, asserted above.
            Isa::Avx2 => unsafe { self.fill_avx2(x) },
            _ => self.fill(x),
        }
    }

    /// The values that the codes stand for, `[cols]`.
    pub fn values(&self) -> Vec<f32> {
        let mut out = Vec::with_capacity(self.columns.cols());
        for (block, range) in self.columns.ranges().enumerate() {
            let codes = &self.codes[block * self.columns.stride()..][..range.len()];
            out.extend(codes.iter().map(|&q| self.scale[block] * f32::from(q)));
        }
        out
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn fill_avx512(&mut self, x: &[f32]) {
        self.fill(x);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn fill_avx2(&mut self, x: &[f32]) {
        self.fill(x);
    }

    // Inlined into the functions above so that the compiler vectorizes it for each instruction set; every operation
    // is exact or rounded on its own, so all of them give the same bytes.
    #[inline(always)]
    fn fill(&mut self, x: &[f32]) {
        let stride = self.columns.stride();
        let mut short = [0f32; super::columns::BLOCK];
        for (block, range) in self.columns.ranges().enumerate() {
            let codes = &mut self.codes[block * stride..][..stride];
            let (scale, sum) = if range.len() == codes.len() {
                quantize_block(&x[range], codes)
            } else {
                let n = range.len();
                short[..n].copy_from_slice(&x[range]);
                short[n..].fill(0.0);
                quantize_block(&short[..stride], codes)
            };
            (self.scale[block], self.sum[block]) = (scale, sum);
        }
    }
}

/// Writes the codes of a block and gives its scale and the sum of the codes.
#[inline(always)]
fn quantize_block(x: &[f32], codes: &mut [i8]) -> (f32, f32) {
    // Magnitudes compare as integers, NaN and infinity above all else: an integer maximum vectorizes and loses no NaN.
    let greatest = x.iter().fold(0u32, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
    let greatest = f32::from_bits(greatest);
    let inverse = 127.0 / greatest;
    if !greatest.is_finite() || !inverse.is_finite() {
        // Below 2^-121 or so the inverse overflows: such a block is nothing.
        codes.fill(0);
        return (if greatest.is_finite() { 0.0 } else { f32::NAN }, 0.0);
    }
    let mut sum = 0i32;
    for (code, v) in codes.iter_mut().zip(x) {
        // Adding and taking away 1.5 * 2^23 rounds to the nearest whole number, ties to even, which then stands in the
        // low bits: |v inverse| is at most 127 and an ulp.
        let rounded = (v * inverse + 12_582_912.0).to_bits() as i32 - 0x4b40_0000;
        sum += rounded;
        *code = rounded as i8;
    }
    (greatest / 127.0, sum as f32)
}

/// A row of float activations, made ready for weights of one [`Format`].
#[derive(Clone, Debug)]
pub struct FloatRow {
    pub(super) format: Format,
    /// `[blocks, stride]`.
    pub(super) values: Vec<f32>,
    /// For two-bit weights under AVX-512, else empty: what each pair of codes is worth, `[blocks, 32, 16]`.
    pub(super) pairs: Vec<f32>,
}

impl Default for FloatRow {
    fn default() -> Self {
        let format = Format { bits: 0, zero: 0.0, columns: Columns::new(0, 1), isa: Isa::Scalar };
        FloatRow { format, values: Vec::new(), pairs: Vec::new() }
    }
}

impl FloatRow {
    pub(super) fn fill(&mut self, format: Format, x: &[f32]) {
        let columns = format.columns;
        assert_eq!(x.len(), columns.cols(), "activations of a row");
        self.format = format;
        let stride = columns.stride();
        self.values.resize(columns.blocks() * stride, 0.0);
        for (slot, range) in self.values.chunks_exact_mut(stride).zip(columns.ranges()) {
            let (filled, rest) = slot.split_at_mut(range.len());
            filled.copy_from_slice(&x[range]);
            rest.fill(0.0);
        }
        let paired = format.isa == Isa::Avx512 && format.bits == 2 && columns.tiled();
        self.pairs.resize(if paired { columns.blocks() * 32 * 16 } else { 0 }, 0.0);
        #[cfg(target_arch = "x86_64")]
        if paired {
            assert!(format.isa.is_available(), "AVX-512 on this processor");
            // SAFETY: the assertion above.
            unsafe { super::avx512::pair_tables(&self.values, format.zero, &mut self.pairs) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Random;
    use super::*;

    #[test]
    fn codes_are_the_nearest_and_the_same_on_every_set() {
        let mut random = Random(7);
        for (cols, group) in [(1, 1), (3, 3), (64, 64), (65, 64), (197, 20), (300, 100), (1000, 1000)] {
            let columns = Columns::new(cols, group);
            let x: Vec<f32> = (0..cols).map(|_| random.float() * 3.0).collect();
            let mut rows = Isa::available().into_iter().map(|isa| {
                let mut row = Int8Row::default();
                row.quantize(columns, &x, isa);
                row
            });
            let plain = rows.next().expect("the plain set is always there");
            for row in rows {
                assert_eq!((&row.codes, &row.scale, &row.sum), (&plain.codes, &plain.scale, &plain.sum));
            }
            for (block, range) in columns.ranges().enumerate() {
                let greatest = x[range.clone()].iter().fold(0f32, |m, v| m.max(v.abs()));
                let (scale, inverse) = (greatest / 127.0, 127.0 / greatest);
                assert_eq!(plain.scale[block], scale);
                let codes = &plain.codes[block * columns.stride()..][..columns.stride()];
                for (v, &q) in x[range.clone()].iter().zip(codes) {
                    assert_eq!((v * inverse).round_ties_even(), f32::from(q));
                }
                assert!(codes[range.len()..].iter().all(|&q| q == 0));
                assert_eq!(plain.sum[block], codes.iter().map(|&q| f32::from(q)).sum::<f32>());
            }
        }
    }

    #[test]
    fn blocks_of_nothing_and_of_no_number() {
        let mut x = vec![0f32; 192];
        x[64] = f32::NAN;
        x[128] = 1e-40;
        for isa in Isa::available() {
            let mut row = Int8Row::default();
            row.quantize(Columns::new(192, 192), &x, isa);
            assert_eq!((row.scale[0], row.scale[2]), (0.0, 0.0));
            assert!(row.scale[1].is_nan());
            assert!(row.codes.iter().all(|&q| q == 0));
        }
    }
}
