//! Weights as integer codes: the grid they lie on, and codes packed bit by bit.
//!
//! A code `k` of a [`Grid`] stands for the value `step * (k + offset)`, with one f32 `step` a row, or one
//! for each group of its columns, and `offset` 1/2 on a mid-rise grid (StatsQ: no zero level) and 0 on a
//! signed one (LSQ). On disk a code is unsigned, `u = k - lo`, and a row is a stream of `bits`-bit fields, least significant bit first;
//! the last byte of a row is filled with zeros, so that every row starts on a byte.

use std::sync::Arc;

use candle_core::{DType, Device, Storage, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::kernels::{packed_rows, packed_values, Groups, Levels, PackedRows};
use crate::{Error, Result};

/// Where the levels of a grid lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Centering {
    /// Levels at odd multiples of half a step: no zero, as many positive as negative ones.
    MidRise,
    /// Two's complement integers: a zero, and one more negative level than positive ones.
    Signed,
    /// Integers from 0: what a softmax or a GELU gives.
    Unsigned,
}

/// The set of values that codes of `bits` bits can stand for, up to a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grid {
    /// Bits per code, 2 to 8.
    pub bits: u8,
    /// Where the levels lie.
    pub centering: Centering,
}

impl Grid {
    /// A grid of `bits` bits; 2 to 8, else an error.
    pub fn new(bits: u8, centering: Centering) -> Result<Self> {
        if !(2..=8).contains(&bits) {
            return Err(Error::usage(format!("bits = {bits}: expected 2 to 8")));
        }
        Ok(Grid { bits, centering })
    }

    /// The range of the codes.
    pub fn levels(self) -> Levels {
        match self.centering {
            Centering::MidRise => Levels::mid_rise(self.bits),
            Centering::Signed => Levels::signed(self.bits),
            Centering::Unsigned => Levels::unsigned(self.bits),
        }
    }

    /// Bytes of a packed row of `cols` codes.
    pub fn row_bytes(self, cols: usize) -> usize {
        PackedRows::row_bytes(cols, self.bits)
    }
}

/// Integer codes with their steps: what a quantizer makes of a tensor before it is packed.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// The codes `k` as whole f32 numbers, in the shape of the tensor.
    pub codes: Tensor,
    /// The steps, f32: one for each entry of `axis`, or one in all; `[rows, groups]` where the columns of
    /// a row fall into groups.
    pub step: Tensor,
    /// The axis that owns a step for each entry; none: one step.
    pub axis: Option<usize>,
    /// Columns of a row (all axes but the first, flattened) that share a step, the last group of a row
    /// excepted; none: the whole row.
    pub group: Option<usize>,
    /// The grid.
    pub grid: Grid,
}

impl Quantized {
    /// How the columns of a row share steps, where axis 0 owns them.
    pub fn groups(&self) -> Groups {
        let rows = self.codes.dims().first().copied().unwrap_or(0);
        Groups::new(self.codes.elem_count() / rows.max(1), self.group)
    }
}

/// A weight stored as packed codes and one step a row, or one for each group of its columns.
#[derive(Clone, Debug)]
pub struct Packed {
    grid: Grid,
    shape: Vec<usize>,
    rows: PackedRows,
    device: Device,
}

/// A step that makes zeros of its weights: the quantizers do so below the smallest normal f32.
pub(super) fn flushed(step: f32) -> f32 {
    if step < f32::MIN_POSITIVE {
        0.0
    } else {
        step
    }
}

impl Packed {
    /// Of packed rows, in a shape of as many elements.
    pub(super) fn of(grid: Grid, shape: &[usize], rows: PackedRows, device: &Device) -> Self {
        Packed { grid, shape: shape.to_vec(), rows, device: device.clone() }
    }

    /// Packs `quantized`: codes `[rows, ...]` with one step for each row (axis 0) or group of its columns.
    pub fn pack(quantized: &Quantized) -> Result<Self> {
        let Quantized { codes, step, grid, .. } = quantized;
        let (shape, groups) = (codes.dims().to_vec(), quantized.groups());
        let rows = shape.first().copied().unwrap_or(0);
        let step = step.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        if rows == 0 || step.len() != rows * groups.count() {
            let of = groups.group().map(|g| format!(" for each group of {g} columns")).unwrap_or_default();
            return Err(Error::Run(format!(
                "packing needs one step a row{of}: found {} steps for shape {shape:?}",
                step.len()
            )));
        }
        let step: Vec<f32> = step.into_iter().map(flushed).collect();
        let values = codes.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let rows = PackedRows::pack_groups(grid.levels(), grid.bits, groups, &values, &step);
        Ok(Packed { grid: *grid, shape, rows, device: codes.device().clone() })
    }

    /// Rebuilds a packed weight from what a file holds: `codes` u8 `[rows, row_bytes]` and `step` f32
    /// `[rows]`, or `[rows, groups]` where `group` columns share one. Groups that are no part of a row,
    /// sizes that do not fit the shape, set bits in the filling and steps that are negative or not finite
    /// are errors.
    pub fn from_tensors(
        name: &str,
        grid: Grid,
        group: Option<usize>,
        shape: &[usize],
        codes: &Tensor,
        step: &Tensor,
    ) -> Result<Self> {
        let rows = shape.first().copied().unwrap_or(0);
        let cols: usize = shape.iter().skip(1).product();
        let bytes = grid.row_bytes(cols);
        if codes.dims() != [rows, bytes] || codes.dtype() != DType::U8 || rows * cols == 0 {
            return Err(Error::tensor(
                format!("{name}.codes"),
                format!(
                    "found {:?} {:?}, expected U8 [{rows}, {bytes}] for {} bits of shape {shape:?}",
                    codes.dtype(),
                    codes.dims(),
                    grid.bits
                ),
            ));
        }
        if let Some(group) = group.filter(|g| !(1..cols).contains(g)) {
            let message = format!("found group_size {group}, expected 1 to {} of {cols} columns", cols - 1);
            return Err(Error::tensor(name, message));
        }
        let groups = Groups::new(cols, group);
        let expected = match group {
            None => vec![rows],
            Some(_) => vec![rows, groups.count()],
        };
        if step.dims() != expected || step.dtype() != DType::F32 {
            return Err(Error::tensor(
                format!("{name}.scale"),
                format!("found {:?} {:?}, expected F32 {expected:?}", step.dtype(), step.dims()),
            ));
        }
        let values = step.flatten_all()?.to_vec1::<f32>()?;
        if let Some(at) = values.iter().position(|s| !s.is_finite() || *s < 0.0) {
            let (row, of) = (at / groups.count(), at % groups.count());
            let place = group.map(|_| format!(", group {of}")).unwrap_or_default();
            return Err(Error::tensor(
                format!("{name}.scale"),
                format!("row {row}{place} holds {}, expected a finite step of at least 0", values[at]),
            ));
        }
        let packed = bytes_of(codes)?;
        let used = cols * usize::from(grid.bits) % 8;
        if used > 0 {
            let filling = packed.chunks_exact(bytes).position(|row| row[bytes - 1] >> used != 0);
            if let Some(row) = filling {
                return Err(Error::tensor(
                    format!("{name}.codes"),
                    format!("row {row} has bits set after its last code, expected zeros"),
                ));
            }
        }
        let (levels, bits, group) = (grid.levels(), grid.bits, groups.width());
        let rows = PackedRows::new(levels, bits, cols, group, packed, values.into());
        Ok(Packed { grid, shape: shape.to_vec(), rows, device: codes.device().clone() })
    }

    /// The grid of the codes.
    pub fn grid(&self) -> Grid {
        self.grid
    }

    /// The shape of the weight, rows first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The packed rows, as the kernels take them.
    pub fn rows(&self) -> &PackedRows {
        &self.rows
    }

    /// Columns of a row that share a step; none: the whole row.
    pub fn group(&self) -> Option<usize> {
        self.rows.groups().group()
    }

    /// The steps, row by row: one for each, or one for each group of its columns.
    pub fn step(&self) -> &[f32] {
        &self.rows.step
    }

    /// Bytes of codes and steps together.
    pub fn bytes(&self) -> usize {
        self.rows.codes.len() + 4 * self.rows.step.len()
    }

    /// The device that results are made on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The same weight, its results made on `device`.
    pub fn to_device(mut self, device: &Device) -> Self {
        self.device = device.clone();
        self
    }

    /// The codes `k` as whole f32 numbers, in the weight's shape.
    pub fn codes(&self) -> Result<Tensor> {
        let cols = self.rows.cols;
        let mut codes = vec![0f32; self.rows.rows() * cols];
        codes.par_chunks_mut(cols).enumerate().for_each(|(row, out)| self.rows.codes_of(row, out));
        Ok(Tensor::from_vec(codes, self.shape.as_slice(), &self.device)?)
    }

    /// The dense f32 weight: exactly the values that fake quantization gives.
    pub fn tensor(&self) -> Result<Tensor> {
        Ok(packed_values(&self.rows, &self.device)?.reshape(self.shape.as_slice())?)
    }

    /// The dense f32 values of some rows, `[ids, cols]`: an embedding's, without building the rest. A row
    /// beyond the last is an error.
    pub fn select_rows(&self, ids: &[u32]) -> Result<Tensor> {
        let rows = self.rows.rows();
        if let Some(id) = ids.iter().find(|id| **id as usize >= rows) {
            return Err(Error::Run(format!("row {id} of a packed weight: found {rows} rows")));
        }
        let ids = Tensor::from_slice(ids, ids.len(), &Device::Cpu)?;
        Ok(packed_rows(&ids, &self.rows, &self.device)?)
    }

    /// What a file holds: codes u8 `[rows, row_bytes]` and steps f32 `[rows]`, or `[rows, groups]`.
    pub fn to_tensors(&self) -> Result<(Tensor, Tensor)> {
        let (rows, bytes) = (self.rows.rows(), self.grid.row_bytes(self.rows.cols));
        let codes = Tensor::from_slice(&self.rows.codes, (rows, bytes), &Device::Cpu)?;
        let step = Tensor::from_slice(&self.rows.step, self.rows.step.len(), &Device::Cpu)?;
        match self.group() {
            None => Ok((codes, step)),
            Some(_) => Ok((codes, step.reshape((rows, ()))?)),
        }
    }
}

/// The bytes of a u8 tensor, copied once.
fn bytes_of(codes: &Tensor) -> Result<Arc<[u8]>> {
    let codes = codes.contiguous()?;
    if let (Storage::Cpu(storage), layout) = (&*codes.storage_and_layout().0, codes.layout()) {
        if let Some((from, to)) = layout.contiguous_offsets() {
            return Ok(storage.as_slice::<u8>()?[from..to].into());
        }
    }
    Ok(codes.flatten_all()?.to_vec1::<u8>()?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(grid: Grid, rows: usize, cols: usize, group: Option<usize>) -> Quantized {
        let levels = grid.levels();
        let span = (levels.hi - levels.lo + 1) as usize;
        let codes: Vec<f32> =
            (0..rows * cols).map(|i| (levels.lo + ((i * 7 + i / 3) % span) as i32) as f32).collect();
        let count = Groups::new(cols, group).count();
        let step: Vec<f32> = (1..=rows * count).map(|r| r as f32 * 0.1).collect();
        Quantized {
            codes: Tensor::from_vec(codes, (rows, cols), &Device::Cpu).unwrap(),
            step: Tensor::from_vec(step, (rows, count), &Device::Cpu).unwrap(),
            axis: Some(0),
            group,
            grid,
        }
    }

    fn grid(bits: u8, centering: Centering) -> Grid {
        Grid::new(bits, centering).unwrap()
    }

    /// Every width and centering, odd shapes, groups with and without a rest.
    fn samples() -> Vec<Quantized> {
        let mut all = Vec::new();
        for bits in 2..=8 {
            for centering in [Centering::MidRise, Centering::Signed, Centering::Unsigned] {
                for (rows, cols) in [(1, 1), (3, 5), (2, 8), (5, 13), (4, 97)] {
                    for group in [None, Some(1), Some(4), Some(32)] {
                        all.push(sample(grid(bits, centering), rows, cols, group));
                    }
                }
            }
        }
        all
    }

    #[test]
    fn codes_survive_packing_at_every_width_and_odd_shape() {
        for q in samples() {
            let (rows, cols) = q.codes.dims2().unwrap();
            let packed = Packed::pack(&q).unwrap();
            let what = format!("{:?} {rows}x{cols} in groups of {:?}", q.grid, q.group);
            let back = packed.codes().unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(back, q.codes.to_vec2::<f32>().unwrap(), "{what}");
            let count = q.groups().count();
            let bytes = rows * (cols * usize::from(q.grid.bits)).div_ceil(8) + 4 * rows * count;
            assert_eq!(packed.bytes(), bytes, "{what}");
            let (codes, step) = packed.to_tensors().unwrap();
            assert_eq!(step.dims(), if count > 1 { vec![rows, count] } else { vec![rows] }, "{what}");
            let group = packed.group();
            let again = Packed::from_tensors("w", q.grid, group, &[rows, cols], &codes, &step).unwrap();
            assert_eq!(again.codes().unwrap().to_vec2::<f32>().unwrap(), back, "{what}");
            let dense = packed.tensor().unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(again.tensor().unwrap().to_vec2::<f32>().unwrap(), dense, "{what}");
            let ids = [rows as u32 - 1, 0, 0];
            let some = packed.select_rows(&ids).unwrap().to_vec2::<f32>().unwrap();
            let expected: Vec<_> = ids.iter().map(|id| dense[*id as usize].clone()).collect();
            assert_eq!(some, expected, "{what}");
        }
    }

    #[test]
    fn two_bit_layout_by_hand() {
        // codes -2, -1, 0, 1, 1 are the fields 0, 1, 2, 3, 3: 0b11100100 and, filled with zeros, 0b11.
        let q = |group: Option<usize>, step: &[f32]| Quantized {
            codes: Tensor::new(&[[-2f32, -1., 0., 1., 1.]], &Device::Cpu).unwrap(),
            step: Tensor::new(step, &Device::Cpu).unwrap(),
            axis: Some(0),
            group,
            grid: grid(2, Centering::MidRise),
        };
        let values = |packed: &Packed| packed.tensor().unwrap().to_vec2::<f32>().unwrap();
        let packed = Packed::pack(&q(None, &[0.5])).unwrap();
        assert_eq!(packed.rows.codes[..], [0b1110_0100, 0b11]);
        assert_eq!(values(&packed), [[-0.75, -0.25, 0.25, 0.75, 0.75]]);
        // Two columns share a step, the fifth has its own.
        let packed = Packed::pack(&q(Some(2), &[0.5, 2.0, 4.0])).unwrap();
        assert_eq!(packed.rows.codes[..], [0b1110_0100, 0b11]);
        assert_eq!(values(&packed), [[-0.75, -0.25, 1.0, 3.0, 6.0]]);
        let wrong = Packed::pack(&q(Some(2), &[0.5, 2.0])).unwrap_err().to_string();
        assert!(wrong.contains("group of 2 columns: found 2 steps for shape [1, 5]"), "{wrong}");
    }

    #[test]
    fn steps_too_small_make_zeros() {
        let mut q = sample(grid(2, Centering::MidRise), 2, 3, None);
        q.step = Tensor::new(&[1e-39f32, 1.0], &Device::Cpu).unwrap();
        let values = Packed::pack(&q).unwrap().tensor().unwrap().to_vec2::<f32>().unwrap();
        assert!(values[0].iter().all(|v| *v == 0.0) && values[1].iter().all(|v| *v != 0.0));
    }

    #[test]
    fn lies_in_a_file_are_named() {
        let q = sample(grid(3, Centering::Signed), 2, 5, None);
        let (codes, step) = Packed::pack(&q).unwrap().to_tensors().unwrap();
        let lie = |group: Option<usize>, shape: &[usize], codes: &Tensor, step: &Tensor| {
            let read = Packed::from_tensors("w", q.grid, group, shape, codes, step);
            read.map(|_| ()).unwrap_err().to_string()
        };
        let read = |shape: &[usize], codes: &Tensor, step: &Tensor| lie(None, shape, codes, step);
        assert!(read(&[2, 6], &codes, &step).contains("w.codes"));
        assert!(
            read(&[2, 5], &codes, &Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap()).contains("w.scale")
        );
        let negative = Tensor::new(&[0.1f32, -0.1], &Device::Cpu).unwrap();
        assert!(read(&[2, 5], &codes, &negative).contains("row 1 holds -0.1"));
        let full = Tensor::full(255u8, (2, 2), &Device::Cpu).unwrap();
        assert!(read(&[2, 5], &full, &step).contains("after its last code"));
        assert!(Grid::new(9, Centering::Signed).is_err() && Grid::new(1, Centering::Signed).is_err());
        // Groups.
        for group in [0, 5, 6] {
            let message = lie(Some(group), &[2, 5], &codes, &step);
            assert!(message.contains(&format!("found group_size {group}, expected 1 to 4")), "{message}");
        }
        let message = lie(Some(2), &[2, 5], &codes, &step);
        assert!(message.contains("w.scale: found F32 [2], expected F32 [2, 3]"), "{message}");
        let steps = Tensor::new(&[[0.1f32, 0.1, 0.1], [0.1, f32::NAN, 0.1]], &Device::Cpu).unwrap();
        assert!(lie(Some(2), &[2, 5], &codes, &steps).contains("row 1, group 1 holds NaN"));
    }

    #[test]
    fn a_row_that_is_not_there_is_named() {
        let packed = Packed::pack(&sample(grid(4, Centering::Signed), 2, 5, Some(2))).unwrap();
        let error = packed.select_rows(&[1, 2]).unwrap_err().to_string();
        assert_eq!(error, "row 2 of a packed weight: found 2 rows");
        assert_eq!(packed.select_rows(&[]).unwrap().dims(), [0, 5]);
    }
}
