//! Weights as integer codes: the grid they lie on, and codes packed bit by bit.
//!
//! A code `k` of a [`Grid`] stands for the value `step * (k + offset)`, with one f32 `step` a row and
//! `offset` 1/2 on a mid-rise grid (StatsQ: no zero level) and 0 on a signed one (LSQ). On disk a code
//! is unsigned, `u = k - lo`, and a row is a stream of `bits`-bit fields, least significant bit first;
//! the last byte of a row is filled with zeros, so that every row starts on a byte.

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::kernels::{Levels, PackedRows};
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
    /// The steps, f32: one for each entry of `axis`, or one in all.
    pub step: Tensor,
    /// The axis that owns a step for each entry; none: one step.
    pub axis: Option<usize>,
    /// The grid.
    pub grid: Grid,
}

/// A weight stored as packed codes and one step a row.
#[derive(Clone, Debug)]
pub struct Packed {
    grid: Grid,
    shape: Vec<usize>,
    rows: PackedRows,
    device: Device,
}

impl Packed {
    /// Packs `quantized`: codes `[rows, ...]` with one step for each row (axis 0).
    pub fn pack(quantized: &Quantized) -> Result<Self> {
        let Quantized { codes, step, grid, .. } = quantized;
        let shape = codes.dims().to_vec();
        let rows = shape.first().copied().unwrap_or(0);
        let step = step.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        if rows == 0 || step.len() != rows {
            return Err(Error::Run(format!(
                "packing needs one step a row: found {} steps for shape {shape:?}",
                step.len()
            )));
        }
        let cols = codes.elem_count() / rows;
        let values = codes.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let rows = PackedRows::pack(grid.levels(), grid.bits, cols, &values, &step);
        Ok(Packed { grid: *grid, shape, rows, device: codes.device().clone() })
    }

    /// Rebuilds a packed weight from what a file holds: `codes` u8 `[rows, row_bytes]` and `step` f32
    /// `[rows]`. Sizes that do not fit the shape, set bits in the filling and steps that are negative
    /// or not finite are errors.
    pub fn from_tensors(
        name: &str,
        grid: Grid,
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
        if step.dims() != [rows] || step.dtype() != DType::F32 {
            return Err(Error::tensor(
                format!("{name}.scale"),
                format!("found {:?} {:?}, expected F32 [{rows}]", step.dtype(), step.dims()),
            ));
        }
        let values = step.to_vec1::<f32>()?;
        if let Some(row) = values.iter().position(|s| !s.is_finite() || *s < 0.0) {
            return Err(Error::tensor(
                format!("{name}.scale"),
                format!("row {row} holds {}, expected a finite step of at least 0", values[row]),
            ));
        }
        let packed = codes.flatten_all()?.to_vec1::<u8>()?;
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
        let (levels, bits) = (grid.levels(), grid.bits);
        let rows = PackedRows { levels, bits, cols, codes: packed.into(), step: values.into() };
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

    /// The step of each row.
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

    /// The codes `k` as whole f32 numbers, in the weight's shape.
    pub fn codes(&self) -> Result<Tensor> {
        self.read(|rows, row, out| rows.unpack_row(row, out, |k| k as f32))
    }

    /// The dense f32 weight: exactly the values that fake quantization gives.
    pub fn tensor(&self) -> Result<Tensor> {
        self.read(PackedRows::values)
    }

    fn read(&self, of: impl Fn(&PackedRows, usize, &mut [f32])) -> Result<Tensor> {
        let cols = self.rows.cols;
        let mut values = vec![0f32; self.rows.rows() * cols];
        values.chunks_exact_mut(cols).enumerate().for_each(|(row, out)| of(&self.rows, row, out));
        Ok(Tensor::from_vec(values, self.shape.as_slice(), &self.device)?)
    }

    /// What a file holds: codes u8 `[rows, row_bytes]` and steps f32 `[rows]`.
    pub fn to_tensors(&self) -> Result<(Tensor, Tensor)> {
        let (rows, bytes) = (self.rows.rows(), self.grid.row_bytes(self.rows.cols));
        let codes = Tensor::from_slice(&self.rows.codes, (rows, bytes), &Device::Cpu)?;
        let step = Tensor::from_slice(&self.rows.step, rows, &Device::Cpu)?;
        Ok((codes, step))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(bits: u8, centering: Centering, rows: usize, cols: usize) -> Quantized {
        let grid = Grid::new(bits, centering).unwrap();
        let levels = grid.levels();
        let span = (levels.hi - levels.lo + 1) as usize;
        let codes: Vec<f32> =
            (0..rows * cols).map(|i| (levels.lo + ((i * 7 + i / 3) % span) as i32) as f32).collect();
        Quantized {
            codes: Tensor::from_vec(codes, (rows, cols), &Device::Cpu).unwrap(),
            step: Tensor::from_vec((1..=rows).map(|r| r as f32 * 0.1).collect(), rows, &Device::Cpu).unwrap(),
            axis: Some(0),
            grid,
        }
    }

    #[test]
    fn codes_survive_packing_at_every_width_and_odd_shape() {
        for bits in 2..=8 {
            for centering in [Centering::MidRise, Centering::Signed, Centering::Unsigned] {
                for (rows, cols) in [(1, 1), (3, 5), (2, 8), (5, 13), (4, 97)] {
                    let q = sample(bits, centering, rows, cols);
                    let packed = Packed::pack(&q).unwrap();
                    let back = packed.codes().unwrap().to_vec2::<f32>().unwrap();
                    assert_eq!(back, q.codes.to_vec2::<f32>().unwrap(), "{bits} bits {rows}x{cols}");
                    assert_eq!(packed.bytes(), rows * (cols * bits as usize).div_ceil(8) + 4 * rows);
                    let (codes, step) = packed.to_tensors().unwrap();
                    let again = Packed::from_tensors("w", q.grid, &[rows, cols], &codes, &step).unwrap();
                    assert_eq!(again.codes().unwrap().to_vec2::<f32>().unwrap(), back);
                }
            }
        }
    }

    #[test]
    fn two_bit_layout_by_hand() {
        // codes -2, -1, 0, 1, 1 are the fields 0, 1, 2, 3, 3: 0b11100100 and, filled with zeros, 0b11.
        let q = Quantized {
            codes: Tensor::new(&[[-2f32, -1., 0., 1., 1.]], &Device::Cpu).unwrap(),
            step: Tensor::new(&[0.5f32], &Device::Cpu).unwrap(),
            axis: Some(0),
            grid: Grid::new(2, Centering::MidRise).unwrap(),
        };
        let packed = Packed::pack(&q).unwrap();
        assert_eq!(packed.rows.codes[..], [0b1110_0100, 0b11]);
        assert_eq!(packed.tensor().unwrap().to_vec2::<f32>().unwrap(), [[-0.75, -0.25, 0.25, 0.75, 0.75]]);
    }

    #[test]
    fn lies_in_a_file_are_named() {
        let q = sample(3, Centering::Signed, 2, 5);
        let (codes, step) = Packed::pack(&q).unwrap().to_tensors().unwrap();
        let read = |shape: &[usize], codes: &Tensor, step: &Tensor| {
            Packed::from_tensors("w", q.grid, shape, codes, step).map(|_| ()).unwrap_err().to_string()
        };
        assert!(read(&[2, 6], &codes, &step).contains("w.codes"));
        assert!(
            read(&[2, 5], &codes, &Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap()).contains("w.scale")
        );
        let negative = Tensor::new(&[0.1f32, -0.1], &Device::Cpu).unwrap();
        assert!(read(&[2, 5], &codes, &negative).contains("row 1 holds -0.1"));
        let full = Tensor::full(255u8, (2, 2), &Device::Cpu).unwrap();
        assert!(read(&[2, 5], &full, &step).contains("after its last code"));
        assert!(Grid::new(9, Centering::Signed).is_err() && Grid::new(1, Centering::Signed).is_err());
    }
}
