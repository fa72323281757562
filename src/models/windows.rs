//! Shifted windows of a feature map (Liu et al. 2021, section 3.2).
//!
//! A map `[B, R, C, channels]` is padded with zeros below and to the right to whole windows of side `w`,
//! shifted up and left by `s` in a cycle, and cut into windows `[B * count, w w, channels]`, those of one
//! image together, row by row. A window of a shifted map can hold patches from opposite edges of the image:
//! a mask of -100 on the attention logits keeps them apart.

use candle_core::{Device, Tensor};

use crate::Result;

/// What stands on the logit of two patches that are not neighbours, as published: enough for a softmax to
/// give nothing.
const APART: f32 = -100.0;

/// How a feature map is cut into windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    grid: (usize, usize),
    side: usize,
    shift: usize,
}

impl Windows {
    /// Windows of `side` patches on a side over a map of `grid` rows and columns, shifted by `shift`
    /// patches, less than `side`.
    pub fn new(grid: (usize, usize), side: usize, shift: usize) -> Self {
        Windows { grid, side, shift }
    }

    /// Rows and columns after padding.
    fn padded(&self) -> (usize, usize) {
        let whole = |n: usize| n.next_multiple_of(self.side);
        (whole(self.grid.0), whole(self.grid.1))
    }

    /// Windows of one image.
    pub fn count(&self) -> usize {
        let (rows, cols) = self.padded();
        (rows / self.side) * (cols / self.side)
    }

    /// Patches of one window.
    pub fn patches(&self) -> usize {
        self.side * self.side
    }

    /// The windows `[B * count, w w, channels]` of `x [B, rows, columns, channels]`.
    pub fn partition(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, _, _, channels) = x.dims4()?;
        let ((rows, cols), w) = (self.padded(), self.side);
        let x = x.pad_with_zeros(1, 0, rows - self.grid.0)?.pad_with_zeros(2, 0, cols - self.grid.1)?;
        let x = turned(&turned(&x, 1, self.shift)?, 2, self.shift)?;
        let x = x.reshape(&[batch, rows / w, w, cols / w, w, channels][..])?;
        let x = x.permute(vec![0, 1, 3, 2, 4, 5])?.contiguous()?;
        Ok(x.reshape((batch * self.count(), w * w, channels))?)
    }

    /// The map that [`Windows::partition`] cut up: shift and padding undone.
    pub fn merge(&self, windows: &Tensor) -> Result<Tensor> {
        let (all, _, channels) = windows.dims3()?;
        let ((rows, cols), w) = (self.padded(), self.side);
        let batch = all / self.count();
        let x = windows.reshape(&[batch, rows / w, cols / w, w, w, channels][..])?;
        let x = x.permute(vec![0, 1, 3, 2, 4, 5])?.contiguous()?.reshape((batch, rows, cols, channels))?;
        let x = turned(&turned(&x, 1, rows - self.shift)?, 2, cols - self.shift)?;
        Ok(x.narrow(1, 0, self.grid.0)?.narrow(2, 0, self.grid.1)?.contiguous()?)
    }

    /// The mask `[count, 1, w w, w w]` of a shifted map, none where nothing is shifted.
    pub fn mask(&self, device: &Device) -> Result<Option<Tensor>> {
        if self.shift == 0 {
            return Ok(None);
        }
        let ((rows, cols), w) = (self.padded(), self.side);
        // The stretch of an axis that an index of the shifted map lies in: before the last window, in it
        // and not brought around, brought around from the other edge.
        let stretch = |at: usize, n: usize| usize::from(at >= n - w) + usize::from(at >= n - self.shift);
        let mut mask = Vec::with_capacity(self.count() * w.pow(4));
        for (top, left) in (0..rows / w).flat_map(|r| (0..cols / w).map(move |c| (r * w, c * w))) {
            let of = |p: usize| (stretch(top + p / w, rows), stretch(left + p % w, cols));
            let regions: Vec<_> = (0..w * w).map(of).collect();
            mask.extend(
                regions.iter().flat_map(|a| regions.iter().map(move |b| if a == b { 0.0 } else { APART })),
            );
        }
        Ok(Some(Tensor::from_vec(mask, (self.count(), 1, w * w, w * w), device)?))
    }
}

/// `x` with axis `axis` turned in a cycle, so that index `by` comes first.
fn turned(x: &Tensor, axis: usize, by: usize) -> Result<Tensor> {
    let n = x.dim(axis)?;
    match by % n {
        0 => Ok(x.clone()),
        by => Ok(Tensor::cat(&[x.narrow(axis, by, n - by)?, x.narrow(axis, 0, by)?], axis)?),
    }
}

/// For each query and key of a window of side `w`, in this order, the row of the relative position table
/// `[(2w - 1)^2, heads]` that holds their offset: rows `(dy + w - 1) (2w - 1) + dx + w - 1`, where `dy` and
/// `dx` lead from the key to the query.
pub fn relative_positions(w: usize) -> Vec<u32> {
    let place = |p: usize| (p / w, p % w);
    let row = |q: usize, k: usize| {
        let ((qy, qx), (ky, kx)) = (place(q), place(k));
        ((qy + w - 1 - ky) * (2 * w - 1) + qx + w - 1 - kx) as u32
    };
    (0..w * w).flat_map(|q| (0..w * w).map(move |k| row(q, k))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(grid: (usize, usize), batch: usize) -> Tensor {
        let n = batch * grid.0 * grid.1 * 2;
        let values: Vec<f32> = (0..n).map(|v| v as f32).collect();
        Tensor::from_vec(values, (batch, grid.0, grid.1, 2), &Device::Cpu).unwrap()
    }

    fn flat(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn merging_undoes_partitioning() {
        for (grid, side, shift) in
            [((4, 4), 2, 0), ((4, 4), 2, 1), ((5, 7), 3, 1), ((6, 9), 3, 2), ((2, 5), 2, 0), ((3, 3), 3, 0)]
        {
            let windows = Windows::new(grid, side, shift);
            let x = map(grid, 2);
            let cut = windows.partition(&x).unwrap();
            assert_eq!(cut.dims(), [2 * windows.count(), side * side, 2]);
            assert_eq!(flat(&windows.merge(&cut).unwrap()), flat(&x), "{grid:?} {side} {shift}");
        }
    }

    #[test]
    fn windows_by_hand() {
        let values: Vec<f32> = (0..16).map(|v| v as f32).collect();
        let x = Tensor::from_vec(values, (1, 4, 4, 1), &Device::Cpu).unwrap();
        let cut = |shift| flat(&Windows::new((4, 4), 2, shift).partition(&x).unwrap());
        assert_eq!(cut(0), [0., 1., 4., 5., 2., 3., 6., 7., 8., 9., 12., 13., 10., 11., 14., 15.]);
        // Shifted by one, the last window holds the four corners.
        assert_eq!(cut(1), [5., 6., 9., 10., 7., 4., 11., 8., 13., 14., 1., 2., 15., 12., 3., 0.]);
        // Padded: one row of three becomes two windows whose second column and row are zero.
        let x = Tensor::new(&[1f32, 2., 3.], &Device::Cpu).unwrap().reshape((1, 1, 3, 1)).unwrap();
        let cut = Windows::new((1, 3), 2, 0).partition(&x).unwrap();
        assert_eq!(flat(&cut), [1., 2., 0., 0., 3., 0., 0., 0.]);
    }

    #[test]
    fn the_mask_parts_what_the_shift_brought_together() {
        assert!(Windows::new((4, 4), 2, 0).mask(&Device::Cpu).unwrap().is_none());
        let mask = Windows::new((4, 4), 2, 1).mask(&Device::Cpu).unwrap().unwrap();
        assert_eq!(mask.dims(), [4, 1, 4, 4]);
        let a = APART;
        // The first window is whole; the second joins columns 3 and 0, the third rows, the last both.
        let first = [0.0; 16];
        let columns = [0., a, 0., a, a, 0., a, 0., 0., a, 0., a, a, 0., a, 0.];
        let rows = [0., 0., a, a, 0., 0., a, a, a, a, 0., 0., a, a, 0., 0.];
        let both = [0., a, a, a, a, 0., a, a, a, a, 0., a, a, a, a, 0.];
        assert_eq!(flat(&mask), [first, columns, rows, both].concat());
    }

    #[test]
    fn offsets_of_a_window_of_two_by_hand() {
        // The key to the right and below gives the least row.
        assert_eq!(relative_positions(2), [4, 3, 1, 0, 5, 4, 2, 1, 7, 6, 4, 3, 8, 7, 5, 4]);
        assert_eq!(relative_positions(1), [0]);
        let seven = relative_positions(7);
        assert_eq!((seven.len(), seven[0], seven[48], seven[48 * 49]), (2401, 84, 0, 168));
    }
}
