//! Position embeddings for another grid of patches.

/// Position embeddings `[extra + from.0 * from.1, width]` for another grid: the extra tokens are
/// kept, the rest is interpolated as PyTorch's `interpolate(mode="bicubic", align_corners=False)`
/// does: Keys' cubic convolution (1981) with a = -0.75, pixel centres at halves, edges repeated.
pub(super) fn resize_positions(
    values: &[f32],
    extra: usize,
    from: (usize, usize),
    to: (usize, usize),
    width: usize,
) -> Vec<f32> {
    let (kept, grid) = values.split_at(extra * width);
    let mut out = kept.to_vec();
    out.reserve(to.0 * to.1 * width);
    let (rows, columns) = (taps(from.0, to.0), taps(from.1, to.1));
    let mut sum = vec![0f64; width];
    for row in &rows {
        for column in &columns {
            sum.fill(0.0);
            for (y, wy) in row {
                for (x, wx) in column {
                    let at = (y * from.1 + x) * width;
                    sum.iter_mut()
                        .zip(&grid[at..at + width])
                        .for_each(|(s, &v)| *s += wy * wx * f64::from(v));
                }
            }
            out.extend(sum.iter().map(|&s| s as f32));
        }
    }
    out
}

/// For each of `to` positions the four of `from` it is made of, with their weights.
fn taps(from: usize, to: usize) -> Vec<[(usize, f64); 4]> {
    const A: f64 = -0.75;
    let near = |x: f64| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0; // |x| <= 1
    let far = |x: f64| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A; // 1 < |x| < 2
    (0..to)
        .map(|i| {
            let centre = (i as f64 + 0.5) * from as f64 / to as f64 - 0.5;
            let (left, t) = (centre.floor(), centre - centre.floor());
            let at = |offset: f64| (left + offset).clamp(0.0, from as f64 - 1.0) as usize;
            [(at(-1.0), far(t + 1.0)), (at(0.0), near(t)), (at(1.0), near(1.0 - t)), (at(2.0), far(2.0 - t))]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// PyTorch's bicubic weights at a quarter and three quarters of the way, computed by hand:
    /// for the row (0, 1) they give -27/256, 58/256, 198/256, 283/256.
    #[test]
    fn positions_are_interpolated_as_pytorch_does() {
        let row = [-27f32, 58.0, 198.0, 283.0].map(|v| v / 256.0);
        // Tokens 9 and 8 are kept; the grid [[1, 2], [3, 4]] is 1 + x + 2y, so that each axis shows.
        let resized = resize_positions(&[9.0, 8.0, 1.0, 2.0, 3.0, 4.0], 2, (2, 2), (4, 4), 1);
        let mut expected = vec![9.0, 8.0];
        expected.extend(row.iter().flat_map(|y| row.map(|x| 1.0 + x + 2.0 * y)));
        assert_eq!(resized, expected);
        // The channels do not mix: the second is ten times the first.
        let two: Vec<f32> = [9.0, 8.0, 1.0, 2.0, 3.0, 4.0].iter().flat_map(|v| [*v, 8.0 * v]).collect();
        let resized = resize_positions(&two, 2, (2, 2), (4, 4), 2);
        assert_eq!(resized, expected.iter().flat_map(|v| [*v, 8.0 * v]).collect::<Vec<f32>>());
        // The same grid is the identity, and a constant stays one in any shape.
        let map: Vec<f32> = (0..15).map(|v| (v * v) as f32).collect();
        assert_eq!(resize_positions(&map, 0, (3, 5), (3, 5), 1), map);
        let constant = resize_positions(&[0.7; 13], 1, (3, 4), (7, 2), 1);
        assert_eq!(constant.len(), 15);
        assert!(constant.iter().all(|v| (v - 0.7).abs() < 1e-6), "{constant:?}");
    }
}
