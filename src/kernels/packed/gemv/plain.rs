//! The plain road: rows as they come, one number after the other. The oracle of the others, and the road for groups
//! that do not fill their blocks.

use super::activations::{FloatRow, Int8Row};
use super::layout::{fields, row_bytes, Canonical};
use super::Format;

/// `y[o]` for each row `first + o`, of 8-bit activations.
///
/// The fast roads do the same operations in the same order, so that they give the same bytes.
pub(super) fn int8(format: Format, from: Canonical, first: usize, x: &Int8Row, y: &mut [f32]) {
    let columns = format.columns;
    each_row(format, from, first, y, |field, steps| {
        let mut ranges = columns.ranges();
        steps.iter().enumerate().fold(0f32, |y, (group, &step)| {
            let mut of_group = 0f32;
            for (block, range) in columns.blocks_of(group).zip(&mut ranges) {
                let codes = &x.codes[block * columns.stride()..];
                let sum: i32 =
                    field[range].iter().zip(codes).map(|(&f, &q)| i32::from(f) * i32::from(q)).sum();
                // Exact: halves below 2^23.
                let sum = format.zero * x.sum[block] + sum as f32;
                of_group = sum.mul_add(x.scale[block], of_group);
            }
            of_group.mul_add(step, y)
        })
    });
}

/// `y[o]` for each row `first + o`, of float activations.
pub(super) fn float(format: Format, from: Canonical, first: usize, x: &FloatRow, y: &mut [f32]) {
    let columns = format.columns;
    each_row(format, from, first, y, |field, steps| {
        let mut ranges = columns.ranges();
        steps.iter().enumerate().fold(0f32, |y, (group, &step)| {
            let mut of_group = 0f32;
            for (block, range) in columns.blocks_of(group).zip(&mut ranges) {
                let values = &x.values[block * columns.stride()..];
                for (&f, &v) in field[range].iter().zip(values) {
                    of_group += (f32::from(f) + format.zero) * v;
                }
            }
            y + of_group * step
        })
    });
}

/// Writes `of(fields, steps)` of every row.
fn each_row(format: Format, from: Canonical, first: usize, y: &mut [f32], of: impl Fn(&[u8], &[f32]) -> f32) {
    let (cols, groups) = (format.columns.cols(), format.columns.groups());
    let bytes = row_bytes(cols, from.bits);
    let mut row = vec![0u8; cols];
    for (o, y) in y.iter_mut().enumerate() {
        let at = first + o;
        fields(from.bits, &from.codes[at * bytes..][..bytes], cols, |i, f| row[i] = f);
        *y = of(&row, &from.step[at * groups..][..groups]);
    }
}
