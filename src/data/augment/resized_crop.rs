//! Random resized crops (Szegedy et al. 2015; drawn as torchvision and timm draw them).
//!
//! ```text
//! area = U(scale) * height * width,  aspect = exp(U(ln aspect))
//! width = round(sqrt(area * aspect)),  height = round(sqrt(area / aspect))
//! ```
//!
//! drawn until it fits, ten times at most; then the largest middle part within the aspects.

use super::super::resample::resized;
use super::super::Image;
use super::Augment;
use crate::data::{Filter, Preprocess};
use crate::random::Random;
use crate::Result;

/// Tries before the middle is taken.
pub(super) const TRIES: usize = 10;

/// A rectangle of an image, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rect {
    pub top: usize,
    pub left: usize,
    pub height: usize,
    pub width: usize,
}

/// Uniform in a range of numbers, which may be a single one.
pub(super) fn within([low, high]: [f64; 2], random: &mut Random) -> f64 {
    low + (high - low) * f64::from(random.uniform())
}

/// Uniform by the logarithm in a range of positive numbers.
pub(super) fn within_log([low, high]: [f64; 2], random: &mut Random) -> f64 {
    within([low.ln(), high.ln()], random).exp()
}

/// Uniform in `0..=last`.
pub(super) fn up_to(last: usize, random: &mut Random) -> usize {
    random.below(u32::try_from(last).unwrap_or(u32::MAX - 1) + 1) as usize
}

/// The rectangle to cut out of an image of `height` by `width` pixels.
fn draw(height: usize, width: usize, scale: [f64; 2], aspect: [f64; 2], random: &mut Random) -> Rect {
    for _ in 0..TRIES {
        let area = within(scale, random) * (height * width) as f64;
        let aspect = within_log(aspect, random);
        let side = |square: f64| (square.sqrt().round_ties_even() as usize).max(1);
        let (h, w) = (side(area / aspect), side(area * aspect));
        if h <= height && w <= width {
            let (top, left) = (up_to(height - h, random), up_to(width - w, random));
            return Rect { top, left, height: h, width: w };
        }
    }
    let (mut h, mut w) = (height, width);
    let own = width as f64 / height as f64;
    if own < aspect[0] {
        h = ((width as f64 / aspect[0]).round_ties_even() as usize).clamp(1, height);
    } else if own > aspect[1] {
        w = ((height as f64 * aspect[1]).round_ties_even() as usize).clamp(1, width);
    }
    Rect { top: (height - h) / 2, left: (width - w) / 2, height: h, width: w }
}

fn cut(image: &Image, rect: Rect) -> Image {
    let c = image.channels;
    let mut pixels = Vec::with_capacity(rect.height * rect.width * c);
    for y in rect.top..rect.top + rect.height {
        let start = (y * image.width + rect.left) * c;
        pixels.extend_from_slice(&image.pixels[start..start + rect.width * c]);
    }
    Image { width: rect.width, height: rect.height, channels: c, pixels }
}

impl Augment {
    /// A random part of `image` at the size of `target`. Pixels outside of it have no influence.
    pub(in crate::data) fn crop(
        &self,
        image: &Image,
        target: &Preprocess,
        random: &mut Random,
    ) -> Result<Image> {
        let rect = draw(image.height, image.width, self.crop_scale, self.crop_aspect, random);
        let filter: Filter = self.filter(target.filter, random);
        let part = cut(image, rect);
        if (part.height, part.width) == (target.height, target.width) {
            return Ok(part);
        }
        resized(&part, target.height, target.width, filter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rectangles_keep_to_the_image_the_areas_and_the_aspects() {
        let (scale, aspect) = ([0.08, 1.0], [3.0 / 4.0, 4.0 / 3.0]);
        let (mut areas, mut wide) = (0.0, 0);
        for i in 0..2000 {
            let rect = draw(100, 200, scale, aspect, &mut Random::new(1, "crop", &[i]));
            assert!(rect.top + rect.height <= 100 && rect.left + rect.width <= 200, "{rect:?}");
            let area = (rect.height * rect.width) as f64 / 20_000.0;
            let ratio = rect.width as f64 / rect.height as f64;
            // Sides are whole pixels.
            assert!((0.07..=1.0).contains(&area), "{rect:?}");
            assert!((0.72..=1.38).contains(&ratio), "{rect:?}");
            areas += area / 2000.0;
            wide += usize::from(rect.width > rect.height);
        }
        // Above 2/3 nothing fits, and the tries there are repeated: the mean of U(0.08, ~0.6).
        assert!((0.25..0.45).contains(&areas), "{areas}");
        assert!((900..1300).contains(&wide), "{wide}");
    }

    #[test]
    fn what_never_fits_takes_the_middle() {
        let all = [1.0, 1.0];
        // A whole image of aspect 4 has no rectangle of aspect 3/4 to 4/3 of its own area.
        let rect = |h, w| draw(h, w, all, [3.0 / 4.0, 4.0 / 3.0], &mut Random::new(1, "", &[]));
        assert_eq!(rect(30, 120), Rect { top: 0, left: 40, height: 30, width: 40 });
        assert_eq!(rect(120, 30), Rect { top: 40, left: 0, height: 40, width: 30 });
        assert_eq!(draw(7, 9, all, [2.0, 2.0], &mut Random::new(1, "", &[])).height, 4); // 9 / 2 to even
        assert_eq!(rect(1, 1), Rect { top: 0, left: 0, height: 1, width: 1 });
    }

    #[test]
    fn the_whole_of_a_square_is_the_image_and_a_part_is_resized() {
        let image = Image { width: 3, height: 3, channels: 1, pixels: (0..9).collect() };
        let whole = Augment { crop_scale: [1.0, 1.0], crop_aspect: [1.0, 1.0], ..Default::default() };
        let mut target = Preprocess::default_for(3, 3, 1);
        assert_eq!(whole.crop(&image, &target, &mut Random::new(1, "", &[])).unwrap(), image);
        // One pixel of nine, drawn from all, fills the result.
        (target.height, target.width) = (2, 4);
        let part = Augment { crop_scale: [1.0 / 9.0; 2], ..whole };
        let mut seen = [0; 9];
        for i in 0..900 {
            let got = part.crop(&image, &target, &mut Random::new(1, "", &[i])).unwrap();
            assert_eq!((got.height, got.width), (2, 4));
            assert!(got.pixels.iter().all(|p| *p == got.pixels[0]));
            seen[usize::from(got.pixels[0])] += 1;
        }
        assert!(seen.iter().all(|&n| (60..150).contains(&n)), "{seen:?}");
    }
}
