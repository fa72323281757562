//! RandAugment's changes of place: affine maps from a pixel of the result to a point of the image, as
//! PIL samples them.
//!
//! ```text
//! x' = a (x + 1/2) + b (y + 1/2) + c,   y' = d (x + 1/2) + e (y + 1/2) + f
//! ```
//!
//! in units of pixels from the corner. A point outside of the image takes the fill; neighbours beyond
//! the border repeat it. The cubic is Keys's with a = -1, not the -0.5 of resizing; values are rounded
//! down.

use super::super::resample::Filter;
use super::super::Image;

/// The six numbers `a, b, c, d, e, f`.
pub(super) type Affine = [f64; 6];

/// Each row moved left by `factor` times its distance from the top.
pub(super) fn shear_x(factor: f64) -> Affine {
    [1.0, factor, 0.0, 0.0, 1.0, 0.0]
}

/// Each column moved up by `factor` times its distance from the left.
pub(super) fn shear_y(factor: f64) -> Affine {
    [1.0, 0.0, 0.0, factor, 1.0, 0.0]
}

/// Moved left by `x` and up by `y` pixels.
pub(super) fn translate(x: f64, y: f64) -> Affine {
    [1.0, 0.0, x, 0.0, 1.0, y]
}

/// Turned counter-clockwise about the middle.
pub(super) fn rotate(degrees: f64, height: usize, width: usize) -> Affine {
    let (sin, cos) = (-degrees.to_radians()).sin_cos();
    let (x, y) = (width as f64 / 2.0, height as f64 / 2.0);
    [cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y]
}

/// `image` under `map`, of the same size, with `fill` (one byte a channel) where the map leaves it.
pub(super) fn transform(image: &Image, map: Affine, filter: Filter, fill: &[u8]) -> Image {
    let [a, b, c, d, e, f] = map;
    let (height, width, channels) = (image.height, image.width, image.channels);
    let mut pixels = Vec::with_capacity(image.pixels.len());
    for y in 0..height {
        for x in 0..width {
            let (u, v) = (x as f64 + 0.5, y as f64 + 0.5);
            let (u, v) = (a * u + b * v + c, d * u + e * v + f);
            if !(u >= 0.0 && u < width as f64 && v >= 0.0 && v < height as f64) {
                pixels.extend_from_slice(&fill[..channels]);
                continue;
            }
            match filter {
                Filter::Nearest => {
                    let at = (v as usize * width + u as usize) * channels;
                    pixels.extend_from_slice(&image.pixels[at..at + channels]);
                }
                Filter::Bilinear => sample(image, u, v, |t| [0.0, 1.0 - t, t, 0.0], &mut pixels),
                // PIL's transforms know no Lanczos.
                Filter::Bicubic | Filter::Lanczos => sample(image, u, v, cubic, &mut pixels),
            }
        }
    }
    Image { pixels, ..*image }
}

/// Weights of the four neighbours of a point a share `t` behind the second.
fn cubic(t: f64) -> [f64; 4] {
    let near = |t: f64| 1.0 - 2.0 * t * t + t * t * t;
    let far = |t: f64| -t * (1.0 - t) * (1.0 - t);
    [far(t), near(t), near(1.0 - t), far(1.0 - t)]
}

fn sample(image: &Image, u: f64, v: f64, weights: impl Fn(f64) -> [f64; 4], out: &mut Vec<u8>) {
    let (height, width, channels) = (image.height as i64, image.width as i64, image.channels);
    let (u, v) = (u - 0.5, v - 0.5);
    let (left, top) = (u.floor(), v.floor());
    let (across, down) = (weights(u - left), weights(v - top));
    let column = |i: usize| (left as i64 + i as i64 - 1).clamp(0, width - 1) as usize * channels;
    let row = |j: usize| (top as i64 + j as i64 - 1).clamp(0, height - 1) as usize * image.width * channels;
    let (columns, rows): ([usize; 4], [usize; 4]) = (std::array::from_fn(column), std::array::from_fn(row));
    for channel in 0..channels {
        let line = |row: usize| -> f64 {
            let at = |i: usize| f64::from(image.pixels[row + columns[i] + channel]);
            (0..4).map(|i| across[i] * at(i)).sum()
        };
        let value: f64 = (0..4).map(|j| down[j] * line(rows[j])).sum();
        // The cast rounds down and cuts off; the hair keeps a whole number that sums to just below it.
        out.push((value + 1e-6) as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gray(width: usize, pixels: &[u8]) -> Image {
        Image { width, height: pixels.len() / width, channels: 1, pixels: pixels.to_vec() }
    }

    const FILTERS: [Filter; 3] = [Filter::Nearest, Filter::Bilinear, Filter::Bicubic];

    #[test]
    fn whole_pixels_move_and_leave_the_fill() {
        let image = gray(3, &[1, 2, 3, 4, 5, 6]);
        for filter in FILTERS {
            let moved = |map| transform(&image, map, filter, &[99]).pixels;
            assert_eq!(moved(translate(0.0, 0.0)), image.pixels);
            assert_eq!(moved(translate(1.0, 0.0)), [2, 3, 99, 5, 6, 99]);
            assert_eq!(moved(translate(-1.0, 1.0)), [99, 4, 5, 99, 99, 99]);
            assert_eq!(moved(rotate(0.0, 2, 3)), image.pixels);
            assert_eq!(moved(rotate(180.0, 2, 3)), [6, 5, 4, 3, 2, 1]);
        }
        let square = gray(2, &[1, 2, 3, 4]);
        assert_eq!(transform(&square, rotate(90.0, 2, 2), Filter::Bilinear, &[0]).pixels, [2, 4, 1, 3]);
    }

    #[test]
    fn shears_slant() {
        // Row y reads x + 2 (y + 1/2) of the result's middle: 1 and 3 to the right.
        let image = gray(4, &[1, 2, 3, 4, 5, 6, 7, 8]);
        for filter in FILTERS {
            let sheared = transform(&image, shear_x(2.0), filter, &[0]);
            assert_eq!(sheared.pixels, [2, 3, 4, 0, 8, 0, 0, 0]);
        }
        let image = gray(2, &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(transform(&image, shear_y(2.0), Filter::Nearest, &[0]).pixels, [3, 8, 5, 0, 7, 0, 0, 0]);
    }

    /// Half a pixel to the right of each middle, on a colour row.
    #[test]
    fn in_between_by_hand() {
        let image = Image { width: 4, height: 1, channels: 3, pixels: vec![0; 12] };
        let mut image = image;
        for (x, value) in [0, 80, 160, 17].into_iter().enumerate() {
            image.pixels[3 * x + 1] = value;
        }
        let channel = |filter| -> Vec<u8> {
            let moved = transform(&image, translate(0.5, 0.0), filter, &[1, 2, 3]);
            assert!(moved.pixels.iter().step_by(3).take(3).all(|v| *v == 0));
            moved.pixels.iter().skip(1).step_by(3).copied().collect()
        };
        // (0 + 80) / 2, (80 + 160) / 2, (160 + 17) / 2 rounded down; the last point is on the border,
        // outside.
        assert_eq!(channel(Filter::Bilinear), [40, 120, 88, 2]);
        // Weights -1, 5, 5, -1 over 8: (5*80 - 160) / 8, (5*240 - 17) / 8, (5*177 - 80 - 17) / 8.
        assert_eq!(channel(Filter::Bicubic), [30, 147, 98, 2]);
    }
}
