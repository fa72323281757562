//! Rows of integer codes, packed bit by bit, with a step for each group of columns.
//!
//! Row `r` and column `c` stand for `step[r, c / group] (code[r, c] + offset)`; the last group of a row
//! holds what is left of its columns. A row with one step is a row of one group.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

#[cfg(feature = "cuda")]
use candle_core::{cuda_backend::DeviceId, CudaDevice};

#[cfg(feature = "cuda")]
use super::device::OnDevice;
use super::gemm8::Gemm8Weights;
use super::gemv::GemvWeights;
use super::isa::Isa;
use super::table::{TableWeights, WeightGrid};
use super::unpack::unpack;

use crate::kernels::Levels;

/// How the columns of a row fall into groups that share a step: so many each, the last what is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    cols: usize,
    width: usize,
}

impl Groups {
    /// Groups of `group` of `cols` columns; none, or more than there are: the whole row is one.
    pub fn new(cols: usize, group: Option<usize>) -> Self {
        Groups { cols, width: group.unwrap_or(cols).clamp(1, cols.max(1)) }
    }

    /// Columns of a row.
    pub fn cols(self) -> usize {
        self.cols
    }

    /// Columns of a group, but for a shorter last one.
    pub fn width(self) -> usize {
        self.width
    }

    /// Groups of a row, at least one.
    pub fn count(self) -> usize {
        self.cols.div_ceil(self.width).max(1)
    }

    /// Columns of the last group where it is shorter than the others, else 0.
    pub fn rest(self) -> usize {
        self.cols % self.width
    }

    /// The columns of a group; none where a row is one group.
    pub fn group(self) -> Option<usize> {
        (self.count() > 1).then_some(self.width)
    }

    /// Which step, counted over all rows, the element with this flat index has.
    pub fn step_of(self, index: usize) -> usize {
        let cols = self.cols.max(1);
        index / cols * self.count() + index % cols / self.width
    }
}

/// Columns from which on tables are ahead of integer products (`benches/results`).
const LONG: usize = 144;

/// Packed rows of codes with a step for each group of columns.
#[derive(Clone, Debug)]
pub struct PackedRows {
    /// The range of the codes.
    pub levels: Levels,
    /// Bits per code, 1 to 8.
    pub bits: u8,
    /// Codes in a row.
    pub cols: usize,
    /// Columns that share a step, the last group of a row excepted; `cols` where a row has one step.
    pub group: usize,
    /// The fields `code - lo`, least significant bit first, every row from a byte on.
    pub codes: Arc<[u8]>,
    /// The steps, `[rows, groups]`, row-major.
    pub step: Arc<[f32]>,
    /// The layout that products with few rows read, made when the first one comes.
    repacked: Arc<Repacked>,
}

/// The kernels' own layouts, each made when a product asks for it.
#[derive(Debug, Default)]
struct Repacked {
    few: OnceLock<GemvWeights>,
    many: OnceLock<Option<Gemm8Weights>>,
    /// For signed 2-bit activations, and for unsigned ones.
    tables: [OnceLock<TableWeights>; 2],
    /// On each CUDA device that asked.
    #[cfg(feature = "cuda")]
    devices: std::sync::Mutex<Vec<(DeviceId, Arc<OnDevice>)>>,
}

impl PackedRows {
    /// Bytes of a row of `cols` codes of `bits` bits.
    pub fn row_bytes(cols: usize, bits: u8) -> usize {
        (cols * usize::from(bits)).div_ceil(8)
    }

    /// Rows of codes that are packed already; see the fields.
    pub fn new(
        levels: Levels,
        bits: u8,
        cols: usize,
        group: usize,
        codes: Arc<[u8]>,
        step: Arc<[f32]>,
    ) -> Self {
        PackedRows { levels, bits, cols, group, codes, step, repacked: Arc::default() }
    }

    /// The rows as products with few rows of activations read them.
    pub(super) fn repacked(&self) -> &GemvWeights {
        self.repacked.few.get_or_init(|| {
            let Levels { lo, half, .. } = self.levels;
            GemvWeights::new(
                (self.bits, lo, half),
                self.cols,
                self.group,
                &self.codes,
                &self.step,
                Isa::best(),
            )
        })
    }

    /// The rows as the kernels of a CUDA device read them, brought there by whoever asks first.
    #[cfg(feature = "cuda")]
    pub(super) fn on_device(&self, device: &CudaDevice) -> candle_core::Result<Arc<OnDevice>> {
        let mut devices = self.repacked.devices.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((_, found)) = devices.iter().find(|(id, _)| *id == device.id()) {
            return Ok(found.clone());
        }
        let made = Arc::new(OnDevice::new(device, self)?);
        devices.push((device.id(), made.clone()));
        Ok(made)
    }

    /// Whether products with codes are for these rows: one step each, and sums that 32 bits hold.
    pub(super) fn takes_codes(&self) -> bool {
        let most = i64::try_from(self.cols).map_or(i64::MAX, |cols| cols.saturating_mul(255));
        let most = most.saturating_mul(self.largest_whole().max(128));
        self.groups().group().is_none() && self.cols > 0 && most <= i64::from(i32::MAX)
    }

    /// As products with codes of many tokens read them; none where a row has several steps, or 32 bits might not hold a
    /// sum.
    pub(super) fn for_codes(&self) -> Option<&Gemm8Weights> {
        let Levels { lo, half, .. } = self.levels;
        if !self.takes_codes() {
            return None;
        }
        let make = || Gemm8Weights::new(self.bits, lo, half, self.cols, &self.codes, Isa::best());
        // Made outside: it runs on all threads, and one that waits may steal a task that comes here too.
        if self.repacked.many.get().is_none() {
            let made = make();
            self.repacked.many.get_or_init(|| made);
        }
        self.repacked.many.get().and_then(Option::as_ref)
    }

    /// The tables for activations with the codes `lo ..= hi`, where both are of 2 bits and a row has one step.
    pub(super) fn table(&self, (lo, hi): (i32, i32), isa: Isa) -> Option<TableWeights> {
        let grid = WeightGrid { lo: self.levels.lo, half: self.levels.half };
        let fits = self.bits == 2 && self.groups().group().is_none() && hi - lo == 3 && matches!(lo, -2 | 0);
        fits.then(|| TableWeights::new(grid, lo, self.rows(), self.cols, &self.codes, isa))
    }

    /// As products of 2-bit weights with 2-bit codes read them, where tables are ahead of integer products: the longer
    /// the sum the further.
    pub(super) fn for_two_bits(&self, signed: bool) -> Option<&TableWeights> {
        let Levels { lo, half, .. } = self.levels;
        if self.bits != 2 || self.groups().group().is_some() || self.cols < LONG {
            return None;
        }
        let (grid, x_lo) = (WeightGrid { lo, half }, if signed { -2 } else { 0 });
        let make = || TableWeights::new(grid, x_lo, self.rows(), self.cols, &self.codes, Isa::best());
        Some(self.repacked.tables[usize::from(!signed)].get_or_init(make))
    }

    /// Packs whole numbers within the levels, `cols` a row, with one step for each row.
    pub fn pack(levels: Levels, bits: u8, cols: usize, codes: &[f32], step: &[f32]) -> Self {
        Self::pack_groups(levels, bits, Groups::new(cols, None), codes, step)
    }

    /// Packs whole numbers within the levels, with steps `[rows, groups]`, row-major.
    pub fn pack_groups(levels: Levels, bits: u8, groups: Groups, codes: &[f32], step: &[f32]) -> Self {
        let (cols, bytes) = (groups.cols(), Self::row_bytes(groups.cols(), bits));
        let mut packed = vec![0u8; step.len() / groups.count() * bytes];
        for (row, codes) in packed.chunks_exact_mut(bytes.max(1)).zip(codes.chunks_exact(cols.max(1))) {
            Self::pack_row(levels, bits, codes, row);
        }
        PackedRows::new(levels, bits, cols, groups.width(), packed.into(), step.into())
    }

    /// Packs the codes of one row into its bytes, as many as [`PackedRows::row_bytes`] says.
    pub fn pack_row(levels: Levels, bits: u8, codes: &[f32], row: &mut [u8]) {
        let (mut buffer, mut filled) = (0u32, 0u32);
        let mut row = row.iter_mut();
        for &k in codes {
            buffer |= ((k as i32 - levels.lo) as u32 & ((1 << bits) - 1)) << filled;
            filled += u32::from(bits);
            while filled >= 8 {
                if let Some(byte) = row.next() {
                    *byte = buffer as u8;
                }
                (buffer, filled) = (buffer >> 8, filled - 8);
            }
        }
        if let (true, Some(byte)) = (filled > 0, row.next()) {
            *byte = buffer as u8;
        }
    }

    /// Rows: output features.
    pub fn rows(&self) -> usize {
        self.step.len() / self.groups().count()
    }

    /// How the columns share steps.
    pub fn groups(&self) -> Groups {
        Groups::new(self.cols, Some(self.group))
    }

    /// The steps of one row, one for each group.
    pub fn steps(&self, row: usize) -> &[f32] {
        let count = self.groups().count();
        &self.step[row * count..(row + 1) * count]
    }

    /// Writes the codes of one row.
    pub fn codes_of(&self, row: usize, out: &mut [f32]) {
        self.unpack(row, 0, (0.0, 1.0), out);
    }

    /// Writes `scale (code + offset)` for as many codes of one row as `out` holds, from column `from` on.
    fn unpack(&self, row: usize, from: usize, (offset, scale): (f32, f32), out: &mut [f32]) {
        let bytes = Self::row_bytes(self.cols, self.bits);
        let codes = &self.codes[row * bytes..(row + 1) * bytes];
        unpack(Isa::best(), codes, self.bits, from, self.levels.lo, offset, scale, out);
    }

    /// Writes the values `step (code + offset)` of one row.
    pub fn values(&self, row: usize, out: &mut [f32]) {
        self.values_of(row, 0..self.cols, out);
    }

    /// Writes the values of some columns of one row; `out` has their number.
    pub fn values_of(&self, row: usize, columns: Range<usize>, out: &mut [f32]) {
        let (offset, steps) = (self.offset(), self.steps(row));
        if let [step] = steps {
            return self.unpack(row, columns.start, (offset, *step), out);
        }
        let mut from = columns.start;
        // The first of the columns may lie inside a group.
        let head = (self.group - from % self.group).min(out.len());
        let (head, rest) = out.split_at_mut(head);
        let mut steps = steps[from / self.group..].iter();
        for (out, step) in std::iter::once(head).chain(rest.chunks_mut(self.group)).zip(&mut steps) {
            self.unpack(row, from, (offset, *step), out);
            from += out.len();
        }
    }

    fn offset(&self) -> f32 {
        if self.levels.half {
            0.5
        } else {
            0.0
        }
    }

    /// Writes the whole numbers `2 code + 1`, or `code` on a grid with a zero.
    pub(in crate::kernels) fn whole(&self, row: usize, out: &mut [f32]) {
        // Twice a code and a half is exact.
        self.unpack(row, 0, (self.offset(), 1.0 / self.unit()), out);
    }

    /// What one of the whole numbers of [`PackedRows::whole`] is worth, in steps.
    pub(super) fn unit(&self) -> f32 {
        if self.levels.half {
            0.5
        } else {
            1.0
        }
    }

    pub(super) fn largest_whole(&self) -> i64 {
        let (lo, hi) = (i64::from(self.levels.lo), i64::from(self.levels.hi));
        let of = |k: i64| if self.levels.half { 2 * k + 1 } else { k };
        of(lo).abs().max(of(hi).abs())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::random::Random;

    pub(crate) fn random_rows(
        (levels, bits): (Levels, u8),
        rows: usize,
        cols: usize,
        group: Option<usize>,
    ) -> (PackedRows, Vec<i64>) {
        let mut random = Random::new(u64::from(bits), "packed", &[rows as u64, cols as u64]);
        let span = (levels.hi - levels.lo + 1) as u32;
        let codes: Vec<i64> =
            (0..rows * cols).map(|_| i64::from(levels.lo) + i64::from(random.below(span))).collect();
        let groups = Groups::new(cols, group);
        let step: Vec<f32> = (0..rows * groups.count()).map(|_| random.range(0.01, 0.1)).collect();
        let floats: Vec<f32> = codes.iter().map(|&c| c as f32).collect();
        (PackedRows::pack_groups(levels, bits, groups, &floats, &step), codes)
    }

    pub(crate) fn grids() -> impl Iterator<Item = (Levels, u8)> {
        (2..=8).flat_map(|b| [Levels::mid_rise(b), Levels::signed(b), Levels::unsigned(b)].map(|l| (l, b)))
    }

    #[test]
    fn columns_fall_into_groups() {
        let groups = Groups::new(172, Some(64));
        assert_eq!((groups.count(), groups.rest(), groups.group()), (3, 44, Some(64)));
        // 172 = 64 + 64 + 44: the second row starts its own.
        assert_eq!([0, 63, 64, 171, 172, 236].map(|i| groups.step_of(i)), [0, 0, 1, 2, 3, 4]);
        for group in [None, Some(172), Some(1000)] {
            let groups = Groups::new(172, group);
            assert_eq!((groups.count(), groups.rest(), groups.group()), (1, 0, None));
            assert_eq!([171, 172].map(|i| groups.step_of(i)), [0, 1]);
        }
        assert_eq!(Groups::new(6, Some(3)).count(), 2);
        assert_eq!(Groups::new(0, Some(3)).count(), 1);
    }

    #[test]
    fn codes_survive_packing_and_values_are_theirs() {
        for (levels, bits) in grids() {
            for (rows, cols) in [(1, 1), (3, 5), (65, 7), (10, 130)] {
                for group in [None, Some(1), Some(3), Some(8), Some(64)] {
                    let (packed, codes) = random_rows((levels, bits), rows, cols, group);
                    assert_eq!(packed.codes.len(), rows * (cols * usize::from(bits)).div_ceil(8));
                    assert_eq!(packed.rows(), rows);
                    let what = format!("{bits} bits {rows}x{cols} in groups of {group:?}");
                    let mut out = vec![0f32; cols];
                    for (row, codes) in codes.chunks_exact(cols).enumerate() {
                        packed.codes_of(row, &mut out);
                        assert!(out.iter().zip(codes).all(|(&o, &c)| o as i64 == c), "{what}, row {row}");
                        packed.values(row, &mut out);
                        for (column, (value, &code)) in out.iter().zip(codes).enumerate() {
                            let step = packed.step[packed.groups().step_of(row * cols + column)];
                            let want = step * (code as f32 + if levels.half { 0.5 } else { 0.0 });
                            assert_eq!(*value, want, "{what}, row {row}, column {column}");
                        }
                        for columns in [0..cols / 2, cols / 3..cols, cols - 1..cols, cols / 2..cols / 2] {
                            let mut part = vec![0f32; columns.len()];
                            packed.values_of(row, columns.clone(), &mut part);
                            assert_eq!(part, out[columns.clone()], "{what}, row {row}, {columns:?}");
                        }
                    }
                }
            }
        }
    }
}
