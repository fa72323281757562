//! From an image to the numbers a model reads: size, crop, flip, channels, normalisation.
//!
//! The order is the one of Hugging Face's image processors, so that a model sees what it was trained on.

use super::augment::Augment;
use super::resample::{center, resized, to_channels, Filter};
use super::Image;
use crate::random::Random;
use crate::{Error, Result};
use std::borrow::Cow;

/// The largest side that a file may ask for, in pixels.
pub(super) const LARGEST: u64 = 1 << 14;

/// How an image of another size comes to the target size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resize {
    /// Images are expected at the target size; others are treated as with [`Resize::Exact`].
    None,
    /// Straight to the target height and width, whatever the aspect.
    Exact,
    /// The shorter edge to so many pixels, keeping the aspect; then the center is cropped.
    ShortestEdge(usize),
    /// To this height and width, whatever the aspect; then the center is cropped (as DeiT does).
    Through(usize, usize),
}

/// What happens to every image before a model sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocess {
    /// Rows of the result.
    pub height: usize,
    /// Columns of the result.
    pub width: usize,
    /// Channels of the result, 1 or 3.
    pub channels: usize,
    /// Subtracted after rescaling, one number a channel.
    pub mean: Vec<f32>,
    /// Divided by at the end, one positive number a channel.
    pub std: Vec<f32>,
    /// Multiplies the bytes 0 to 255, usually 1/255.
    pub rescale: f32,
    /// How other sizes are treated.
    pub resize: Resize,
    /// How pixels are resampled.
    pub filter: Filter,
}

/// A crop of the padded image and its mirroring; the default is the image itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Shift {
    /// Rows of the padded image above the crop.
    top: usize,
    /// Columns of the padded image left of the crop.
    left: usize,
    /// Pixels of zeros on each side.
    pad: usize,
    /// Left to right, after the crop.
    mirrored: bool,
}

impl Shift {
    fn draw(augment: &Augment, height: usize, width: usize, random: &mut Random) -> Self {
        let mut shift = Shift::default();
        if augment.crop_pad > 0 {
            // More padding than this would only make black images more frequent.
            shift.pad = augment.crop_pad.min(height.max(width));
            let span = 2 * shift.pad as u32 + 1;
            (shift.top, shift.left) = (random.below(span) as usize, random.below(span) as usize);
        }
        shift.mirrored = augment.flip && random.chance(0.5);
        shift
    }

    fn moves(&self) -> bool {
        self.top != self.pad || self.left != self.pad || self.mirrored
    }

    /// Calls `each(place, pixel)` for the pixels of the result that lie inside of the image.
    fn each(&self, height: usize, width: usize, mut each: impl FnMut(usize, usize)) {
        for y in 0..height {
            let row = (y + self.top).checked_sub(self.pad).filter(|row| *row < height);
            let Some(row) = row else { continue };
            for x in 0..width {
                // The crop is mirrored as a whole, so it is read from its other end.
                let x_crop = if self.mirrored { width - 1 - x } else { x };
                let column = (x_crop + self.left).checked_sub(self.pad).filter(|c| *c < width);
                let Some(column) = column else { continue };
                each(y * width + x, row * width + column);
            }
        }
    }

    /// The moved image, of `channels` channels: gray becomes RGB by being read three times.
    fn apply(&self, image: &Image, channels: usize) -> Image {
        let (height, width) = (image.height, image.width);
        let mut pixels = vec![0; height * width * channels];
        self.each(height, width, |to, from| {
            for c in 0..channels {
                pixels[to * channels + c] = image.pixels[from * image.channels + c.min(image.channels - 1)];
            }
        });
        Image { width, height, channels, pixels }
    }
}

impl Preprocess {
    /// Exact bilinear resizing and bytes mapped to -1 to 1 (mean and std 0.5).
    pub fn default_for(height: usize, width: usize, channels: usize) -> Self {
        Preprocess {
            height,
            width,
            channels,
            mean: vec![0.5; channels],
            std: vec![0.5; channels],
            rescale: 1.0 / 255.0,
            resize: Resize::Exact,
            filter: Filter::Bilinear,
        }
    }

    /// How many numbers one image becomes.
    pub fn numel(&self) -> usize {
        self.channels * self.height * self.width
    }

    /// Writes `image` into `out`: `[channels, height, width]`, normalised.
    ///
    /// The image is brought to the target size, whatever [`Preprocess::resize`] says; one that has
    /// it is not resampled. With `augment` it is changed at random on the way, drawing in this order: a
    /// resized crop, where it is on, in place of the resizing; a crop with its top and its left from 0
    /// to `2 * crop_pad`; the mirroring; RandAugment. What `augment` says of whole batches and of
    /// erasing, which comes behind them, is the [`Loader`](super::Loader)'s. Errs where `out`, `mean`
    /// or `std` have the wrong length, or channels are neither 1 nor 3.
    pub fn apply(
        &self,
        image: &Image,
        augment: Option<(&Augment, &mut Random)>,
        out: &mut [f32],
    ) -> Result<()> {
        self.check(image, out.len())?;
        let image = to_channels(image, self.channels);
        let Some((augment, random)) = augment else {
            self.normalise(&*self.to_size(&image)?, Shift::default(), out);
            return Ok(());
        };
        let image = match augment.resized_crop {
            true => Cow::Owned(augment.crop(&image, self, random)?),
            false => self.to_size(&image)?,
        };
        let shift = Shift::draw(augment, self.height, self.width, random);
        match &augment.rand_augment {
            Some(rand) => {
                let changed = rand.apply(shift.apply(&image, self.channels), augment, self, random);
                self.normalise(&changed, Shift::default(), out);
            }
            None => self.normalise(&image, shift, out),
        }
        Ok(())
    }

    /// The moved image as planes of numbers.
    fn normalise(&self, image: &Image, shift: Shift, out: &mut [f32]) {
        let (height, width, channels) = (self.height, self.width, image.channels);
        for c in 0..self.channels {
            // A gray image that becomes RGB is read three times.
            let from = c.min(channels - 1);
            let (scale, mean, std) = (self.rescale, self.mean[c], self.std[c]);
            let value = |byte: u8| (f32::from(byte) * scale - mean) / std;
            let plane = &mut out[c * height * width..(c + 1) * height * width];
            if !shift.moves() {
                for (out, pixel) in plane.iter_mut().zip(image.pixels.chunks_exact(channels)) {
                    *out = value(pixel[from]);
                }
                continue;
            }
            plane.fill(value(0));
            shift.each(height, width, |to, at| plane[to] = value(image.pixels[at * channels + from]));
        }
    }

    fn check(&self, image: &Image, out: usize) -> Result<()> {
        let usage = |message: String| Err(Error::usage(message));
        let known = |channels: usize| channels == 1 || channels == 3;
        if !known(image.channels) || !known(self.channels) {
            let (from, to) = (image.channels, self.channels);
            return usage(format!("images of {from} channels for a model of {to}, expected 1 or 3 each"));
        }
        if self.mean.len() != self.channels || self.std.len() != self.channels {
            let (mean, std) = (self.mean.len(), self.std.len());
            return usage(format!("mean has {mean} and std {std} numbers, expected {}", self.channels));
        }
        if image.height == 0
            || image.width == 0
            || image.pixels.len() != image.height * image.width * image.channels
        {
            let (n, c) = (image.pixels.len(), image.channels);
            return usage(format!("{n} bytes in an image of {} x {} x {c}", image.height, image.width));
        }
        if self.numel() == 0 || out != self.numel() {
            let (c, h, w) = (self.channels, self.height, self.width);
            return usage(format!("room for {out} numbers, expected {c} x {h} x {w}"));
        }
        Ok(())
    }

    fn to_size<'a>(&self, image: &'a Image) -> Result<Cow<'a, Image>> {
        let (height, width) = (self.height, self.width);
        if (image.height, image.width) == (height, width) {
            return Ok(Cow::Borrowed(image));
        }
        let (h, w) = match self.resize {
            Resize::None | Resize::Exact => (height, width),
            Resize::Through(h, w) => (h, w),
            Resize::ShortestEdge(edge) => {
                // The longer edge is rounded down, as Hugging Face does.
                let (short, long) = (image.height.min(image.width), image.height.max(image.width));
                let long = edge * long / short;
                if image.height <= image.width {
                    (edge, long)
                } else {
                    (long, edge)
                }
            }
        };
        // Too small to be cropped from, or (a strip of one pixel) too large to be held.
        if h < height || w < width || h.saturating_mul(w) > LARGEST as usize * LARGEST as usize {
            return resized(image, height, width, self.filter).map(Cow::Owned);
        }
        let larger = resized(image, h, w, self.filter)?;
        Ok(Cow::Owned(center(larger, height, width)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::augment::RandAugment;
    use super::*;

    fn gray(height: usize, width: usize, pixels: &[u8]) -> Image {
        Image { width, height, channels: 1, pixels: pixels.to_vec() }
    }

    /// Numbers that are the bytes themselves.
    fn bytes(height: usize, width: usize, channels: usize) -> Preprocess {
        let mut p = Preprocess::default_for(height, width, channels);
        (p.rescale, p.mean, p.std) = (1.0, vec![0.0; channels], vec![1.0; channels]);
        p
    }

    fn apply(p: &Preprocess, image: &Image) -> Vec<f32> {
        let mut out = vec![f32::NAN; p.numel()];
        p.apply(image, None, &mut out).unwrap();
        out
    }

    #[test]
    fn normalises_into_planes() {
        let rgb = Image { width: 2, height: 1, channels: 3, pixels: vec![0, 51, 102, 255, 204, 153] };
        let mut p = Preprocess::default_for(1, 2, 3);
        (p.mean, p.std) = (vec![0.0, 0.2, 0.4], vec![1.0, 0.5, 0.25]);
        let expected = [0.0, 1.0, 0.0, 1.2, 0.0, 0.8];
        let near =
            |a: &[f32], b: &[f32]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
        assert!(near(&apply(&p, &rgb), &expected), "{:?}", apply(&p, &rgb));
        let three = apply(&Preprocess::default_for(1, 2, 3), &gray(1, 2, &[0, 255]));
        assert!(near(&three, &[-1.0, 1.0, -1.0, 1.0, -1.0, 1.0]), "{three:?}");
        assert_eq!(apply(&bytes(1, 2, 1), &rgb), [42.0, 213.0]); // 0.587 * 51 + 0.114 * 102 = 41.6
    }

    #[test]
    fn every_way_to_the_target_size() {
        // Columns 0, 10, …, 70 in 4 equal rows.
        let row: Vec<u8> = (0..8).map(|x| x * 10).collect();
        let image = gray(4, 8, &row.repeat(4));
        let mut p = bytes(2, 2, 1);
        p.filter = Filter::Nearest;
        assert_eq!(apply(&p, &image), [20.0, 60.0, 20.0, 60.0]);
        p.resize = Resize::None;
        assert_eq!(apply(&p, &image), [20.0, 60.0, 20.0, 60.0]);
        p.resize = Resize::ShortestEdge(2); // 2 x 4 with columns 10, 30, 50, 70
        assert_eq!(apply(&p, &image), [30.0, 50.0, 30.0, 50.0]);
        p.resize = Resize::ShortestEdge(4); // stays, then the middle
        assert_eq!(apply(&p, &image), [30.0, 40.0, 30.0, 40.0]);
        p.resize = Resize::Through(4, 4);
        assert_eq!(apply(&p, &image), [30.0, 50.0, 30.0, 50.0]);
        p.resize = Resize::ShortestEdge(1); // too small to crop from
        assert_eq!(apply(&p, &image), [20.0, 60.0, 20.0, 60.0]);
        // At the target size nothing is resampled.
        p.resize = Resize::ShortestEdge(9);
        assert_eq!(apply(&p, &gray(2, 2, &[1, 2, 3, 4])), [1.0, 2.0, 3.0, 4.0]);
        // A strip that would become 65535 times as long as it is wide.
        let strip = gray(1, 65_535, &vec![7; 65_535]);
        p.resize = Resize::ShortestEdge(16_000);
        assert_eq!(apply(&p, &strip), [7.0; 4]);
    }

    /// Every augmentation of a 2 x 3 image is a shift by at most the padding, mirrored or not.
    #[test]
    fn crops_shift_over_zeros_and_flips_mirror() {
        let image = gray(2, 3, &[1, 2, 3, 4, 5, 6]);
        let at = |y: isize, x: isize| match (0..2).contains(&y) && (0..3).contains(&x) {
            true => f32::from(image.pixels[(y * 3 + x) as usize]),
            false => 0.0,
        };
        let mut expected = Vec::new();
        for (dy, dx) in (-1..=1).flat_map(|dy| (-1..=1).map(move |dx| (dy, dx))) {
            let cells = |mirror: bool| -> Vec<f32> {
                let x_of = |x| if mirror { 2 - x } else { x };
                (0..2)
                    .flat_map(|y| (0..3).map(move |x| (y, x)))
                    .map(|(y, x)| at(y + dy, x_of(x) + dx))
                    .collect()
            };
            expected.extend([cells(false), cells(true)]);
        }
        let augment = Augment { crop_pad: 1, flip: true, ..Default::default() };
        let mut seen = [0; 18];
        for i in 0..1800 {
            let mut out = vec![f32::NAN; 6];
            let mut random = Random::new(1, "augment", &[0, i]);
            bytes(2, 3, 1).apply(&image, Some((&augment, &mut random)), &mut out).unwrap();
            let which = expected.iter().position(|e| *e == out);
            seen[which.unwrap_or_else(|| panic!("{out:?} is no shift of the image"))] += 1;
        }
        assert!(seen.iter().all(|&n| (50..150).contains(&n)), "{seen:?}");
        let mut out = vec![f32::NAN; 6];
        let nothing = Augment::default();
        bytes(2, 3, 1).apply(&image, Some((&nothing, &mut Random::new(0, "", &[]))), &mut out).unwrap();
        assert_eq!(out, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        // Padding is of the byte 0, before normalisation.
        let far = Augment { crop_pad: usize::MAX, ..Default::default() };
        let mut darkest = f32::INFINITY;
        for i in 0..20 {
            let random = &mut Random::new(0, "", &[i]);
            Preprocess::default_for(2, 3, 1).apply(&image, Some((&far, random)), &mut out).unwrap();
            darkest = out.iter().copied().fold(darkest, f32::min);
        }
        assert_eq!(darkest, -1.0);
    }

    /// RandAugment sees the bytes of the crop, and gray as RGB where the model does.
    #[test]
    fn the_order_is_crop_mirror_rand_augment_normalise() {
        let image = gray(1, 2, &[10, 20]);
        let set = |flip, rand: &str| Augment {
            flip,
            rand_augment: RandAugment::try_from(rand.to_string()).ok(),
            ..Default::default()
        };
        let run = |augment: &Augment, i| {
            let mut out = vec![f32::NAN; 6];
            bytes(1, 2, 3).apply(&image, Some((augment, &mut Random::new(4, "x", &[i]))), &mut out).unwrap();
            out
        };
        for i in 0..50 {
            let plain = run(&set(true, ""), i);
            assert_eq!(run(&set(true, "rand-n0-inc1"), i), plain, "the mirroring is drawn before");
        }
        // Planes of a gray image change alike, but for the fill where a channel has a mean of its own.
        let one: Vec<_> = (0..200).map(|i| run(&set(false, "rand-m9-n1-inc1"), i)).collect();
        assert!(one.iter().all(|o| o[..2] == o[2..4] && o[..2] == o[4..]));
        assert!(one.contains(&vec![0.0, 255.0, 0.0, 255.0, 0.0, 255.0]), "no contrast was stretched");
        assert!(one.contains(&vec![245.0, 235.0, 245.0, 235.0, 245.0, 235.0]), "none was inverted");
    }

    #[test]
    fn resized_crops_replace_the_resizing() {
        let augment = Augment { resized_crop: true, flip: true, ..Default::default() };
        let image = gray(20, 30, &(0..600).map(|i| (i % 251) as u8).collect::<Vec<_>>());
        let run = |p: &Preprocess, i| {
            let mut out = vec![f32::NAN; p.numel()];
            p.apply(&image, Some((&augment, &mut Random::new(4, "x", &[i]))), &mut out).unwrap();
            out
        };
        let p = bytes(8, 8, 1);
        let mut different: Vec<Vec<u32>> =
            (0..50).map(|i| run(&p, i).iter().map(|v| v.to_bits()).collect()).collect();
        assert!(different.iter().flatten().all(|v| (0.0..=255.0).contains(&f32::from_bits(*v))));
        assert_eq!(run(&p, 3), run(&p, 3));
        different.sort();
        different.dedup();
        assert!(different.len() > 45);
        let through = Preprocess { resize: Resize::Through(9, 9), ..p.clone() };
        assert_eq!(run(&p, 3), run(&through, 3));
    }

    #[test]
    fn what_does_not_fit_together_is_a_usage_error() {
        let image = gray(1, 2, &[0, 0]);
        let refused = |p: &Preprocess, image: &Image, room: usize| {
            assert_eq!(p.apply(image, None, &mut vec![0.0; room]).unwrap_err().exit_code(), 2);
        };
        refused(&bytes(1, 2, 1), &image, 3);
        refused(&bytes(1, 2, 2), &image, 4);
        refused(&bytes(1, 2, 1), &gray(1, 2, &[0]), 2);
        refused(&bytes(1, 2, 1), &Image { channels: 4, ..image.clone() }, 2);
        refused(&Preprocess { std: vec![], ..bytes(1, 2, 1) }, &image, 2);
        refused(&bytes(0, 2, 1), &image, 0);
    }
}
