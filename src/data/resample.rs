//! Pixels of another size or another number of channels, as PIL computes them.

use super::Image;
use crate::{Error, Result};
use image::imageops::{self, FilterType};
use image::{ImageBuffer, Luma, Pixel, Rgb};
use std::borrow::Cow;

/// The resampling filter; all but nearest widen with the scale when an image shrinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// The pixel whose area holds the sampled point.
    Nearest,
    /// Linear between neighbours.
    Bilinear,
    /// Cubic with a = -0.5.
    Bicubic,
    /// Lanczos over three lobes.
    Lanczos,
}

/// Luma as PIL computes it (Rec. 601), in 1/65536; gray stays gray, to be replicated when read.
pub(super) fn to_channels(image: &Image, channels: usize) -> Cow<'_, Image> {
    if image.channels <= channels {
        return Cow::Borrowed(image);
    }
    let luma = |p: &[u8]| {
        let [r, g, b] = [p[0], p[1], p[2]].map(u32::from);
        ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16) as u8
    };
    let pixels = image.pixels.chunks_exact(3).map(luma).collect();
    Cow::Owned(Image { width: image.width, height: image.height, channels: 1, pixels })
}

/// The middle of an image that is at least as large.
pub(super) fn center(image: Image, height: usize, width: usize) -> Image {
    if (image.height, image.width) == (height, width) {
        return image;
    }
    let (top, left, c) = ((image.height - height) / 2, (image.width - width) / 2, image.channels);
    let row = |y: usize| {
        let start = ((top + y) * image.width + left) * c;
        image.pixels[start..start + width * c].iter().copied()
    };
    let pixels = (0..height).flat_map(row).collect();
    Image { width, height, channels: c, pixels }
}

/// Resamples to another size; errs where the `image` crate cannot count so many pixels.
pub(super) fn resized(image: &Image, height: usize, width: usize, filter: Filter) -> Result<Image> {
    let filter = match filter {
        Filter::Nearest => return Ok(nearest(image, height, width)),
        Filter::Bilinear => FilterType::Triangle,
        Filter::Bicubic => FilterType::CatmullRom,
        Filter::Lanczos => FilterType::Lanczos3,
    };
    let pixels = match image.channels {
        1 => resampled::<Luma<u8>>(image, height, width, filter),
        _ => resampled::<Rgb<u8>>(image, height, width, filter),
    };
    let Some(pixels) = pixels else {
        let (h, w) = (image.height, image.width);
        return Err(Error::usage(format!("cannot resize {h} x {w} pixels to {height} x {width}")));
    };
    Ok(Image { width, height, channels: image.channels, pixels })
}

fn resampled<P: Pixel<Subpixel = u8> + 'static>(
    image: &Image,
    height: usize,
    width: usize,
    filter: FilterType,
) -> Option<Vec<u8>> {
    let side = |n: usize| u32::try_from(n).ok();
    let view: ImageBuffer<P, &[u8]> =
        ImageBuffer::from_raw(side(image.width)?, side(image.height)?, image.pixels.as_slice())?;
    Some(imageops::resize(&view, side(width)?, side(height)?, filter).into_raw())
}

/// Samples at the middle of each new pixel, as PIL does; the `image` crate rounds elsewhere.
fn nearest(image: &Image, height: usize, width: usize) -> Image {
    let from = |i: usize, old: usize, new: usize| ((2 * i + 1) * old / (2 * new)).min(old - 1);
    let c = image.channels;
    let mut pixels = Vec::with_capacity(height * width * c);
    for y in 0..height {
        let row = from(y, image.height, height) * image.width;
        for x in 0..width {
            let start = (row + from(x, image.width, width)) * c;
            pixels.extend_from_slice(&image.pixels[start..start + c]);
        }
    }
    Image { width, height, channels: c, pixels }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gray(height: usize, width: usize, pixels: &[u8]) -> Image {
        Image { width, height, channels: 1, pixels: pixels.to_vec() }
    }

    /// Halving with a triangle of radius 2: the weights 1, 3, 3, 1 over 8, cut off at the edge.
    #[test]
    fn shrinking_averages_over_what_is_left_out() {
        let row = gray(1, 4, &[0, 0, 80, 240]);
        let half = resized(&row, 1, 2, Filter::Bilinear).unwrap();
        // (3*0 + 3*0 + 1*80) / 7 = 11.4 and (1*0 + 3*80 + 3*240) / 7 = 137.1
        assert_eq!(half.pixels, [11, 137]);
    }

    /// Doubling: new middles lie at -0.25, 0.25, 0.75, 1.25 of the old ones.
    #[test]
    fn growing_interpolates() {
        let row = gray(1, 2, &[0, 100]);
        assert_eq!(resized(&row, 1, 4, Filter::Bilinear).unwrap().pixels, [0, 25, 75, 100]);
        assert_eq!(resized(&row, 1, 4, Filter::Nearest).unwrap().pixels, [0, 0, 100, 100]);
        let column = gray(2, 1, &[0, 100]);
        assert_eq!(resized(&column, 4, 1, Filter::Bilinear).unwrap().pixels, [0, 25, 75, 100]);
        // Cubic with a = -0.5 at a quarter: weights -0.0703125, 0.8671875, 0.2265625, -0.0234375;
        // two of them fall outside and the rest is divided by its sum. At 0.25 of a row of four:
        let four = gray(1, 4, &[0, 0, 200, 200]);
        let cubic = resized(&four, 1, 8, Filter::Bicubic).unwrap();
        // pixel 3 lies at 1.25: 200 * (0.2265625 - 0.0234375) = 40.6
        assert_eq!(cubic.pixels[3], 41);
        let flat = gray(5, 7, &[99; 35]);
        for filter in [Filter::Nearest, Filter::Bilinear, Filter::Bicubic, Filter::Lanczos] {
            assert_eq!(resized(&flat, 3, 11, filter).unwrap().pixels, [99; 33]);
        }
    }

    #[test]
    fn nearest_takes_the_pixel_under_the_middle() {
        let row = gray(1, 5, &[1, 2, 3, 4, 5]);
        assert_eq!(resized(&row, 1, 3, Filter::Nearest).unwrap().pixels, [1, 3, 5]);
        assert_eq!(resized(&row, 1, 2, Filter::Nearest).unwrap().pixels, [2, 4]);
    }

    #[test]
    fn colors_keep_their_channels() {
        let rgb = Image { width: 2, height: 1, channels: 3, pixels: vec![0, 10, 20, 100, 110, 120] };
        let wide = resized(&rgb, 1, 4, Filter::Bilinear).unwrap();
        assert_eq!(wide.pixels, [0, 10, 20, 25, 35, 45, 75, 85, 95, 100, 110, 120]);
    }

    #[test]
    fn luma_and_center() {
        let rgb = Image { width: 3, height: 1, channels: 3, pixels: vec![255, 0, 0, 0, 255, 0, 0, 0, 255] };
        assert_eq!(to_channels(&rgb, 1).pixels, [76, 150, 29]); // 0.299, 0.587, 0.114 of 255
        assert_eq!(to_channels(&rgb, 3).as_ref(), &rgb);
        let image = gray(3, 4, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
        assert_eq!(center(image, 1, 2).pixels, [5, 6]);
    }
}
