//! RandAugment's changes of tone, on bytes, as PIL computes them: tables of 256 values, and blends
//! `a + factor * (b - a)`, cut off at 0 and 255 and rounded down.

use super::super::resample::to_channels;
use super::super::Image;

/// The bytes of one channel through a table.
fn look_up(image: &mut Image, channel: usize, table: &[u8; 256]) {
    let channels = image.channels;
    image.pixels.iter_mut().skip(channel).step_by(channels).for_each(|b| *b = table[usize::from(*b)]);
}

/// Every byte through `f`.
fn map(image: &mut Image, f: impl Fn(u8) -> u8) {
    let table: [u8; 256] = std::array::from_fn(|b| f(b as u8));
    (0..image.channels).for_each(|c| look_up(image, c, &table));
}

fn histogram(image: &Image, channel: usize) -> [usize; 256] {
    let mut counts = [0; 256];
    image.pixels.iter().skip(channel).step_by(image.channels).for_each(|b| counts[usize::from(*b)] += 1);
    counts
}

fn blend(a: u8, b: u8, factor: f32) -> u8 {
    // The cast cuts off at 0 and 255.
    (f32::from(a) + factor * (f32::from(b) - f32::from(a))) as u8
}

/// Stretches each channel from its darkest to its brightest byte over 0 to 255.
pub(super) fn auto_contrast(image: &mut Image) {
    for channel in 0..image.channels {
        let counts = histogram(image, channel);
        let low = counts.iter().position(|n| *n > 0).unwrap_or(0);
        let high = counts.iter().rposition(|n| *n > 0).unwrap_or(0);
        if high > low {
            let scale = 255.0 / (high - low) as f64;
            let offset = -(low as f64) * scale;
            look_up(image, channel, &std::array::from_fn(|b| (b as f64 * scale + offset) as u8));
        }
    }
}

/// Spreads the bytes of each channel so that its histogram is as flat as can be.
pub(super) fn equalize(image: &mut Image) {
    for channel in 0..image.channels {
        let counts = histogram(image, channel);
        let last = counts.iter().rev().find(|n| **n > 0).copied().unwrap_or(0);
        let step = (counts.iter().sum::<usize>() - last) / 255;
        if step == 0 {
            continue;
        }
        let mut below = step / 2;
        let table = std::array::from_fn(|b| {
            let value = (below / step).min(255) as u8;
            below += counts[b];
            value
        });
        look_up(image, channel, &table);
    }
}

/// `255 - b`.
pub(super) fn invert(image: &mut Image) {
    map(image, |b| 255 - b);
}

/// Keeps the upper `bits` of each byte; 0 leaves black.
pub(super) fn posterize(image: &mut Image, bits: u32) {
    if bits < 8 {
        map(image, |b| b & (0xff00u32 >> bits) as u8);
    }
}

/// Inverts the bytes of `threshold` or more.
pub(super) fn solarize(image: &mut Image, threshold: u32) {
    map(image, |b| if u32::from(b) < threshold { b } else { 255 - b });
}

/// Adds to the bytes below 128, to at most 255.
pub(super) fn solarize_add(image: &mut Image, add: u8) {
    map(image, |b| if b < 128 { b.saturating_add(add) } else { b });
}

/// From black (0) over the image (1) to brighter.
pub(super) fn brightness(image: &mut Image, factor: f32) {
    map(image, |b| blend(0, b, factor));
}

/// From the mean of its luma, everywhere (0), over the image (1) to more contrast.
pub(super) fn contrast(image: &mut Image, factor: f32) {
    let luma = to_channels(image, 1);
    let sum: u64 = luma.pixels.iter().map(|b| u64::from(*b)).sum();
    let mean = (sum as f64 / luma.pixels.len() as f64 + 0.5) as u8;
    map(image, |b| blend(mean, b, factor));
}

/// From gray (0) over the image (1) to more colour; a gray image stays.
pub(super) fn color(image: &mut Image, factor: f32) {
    if image.channels == 1 {
        return;
    }
    let luma = to_channels(image, 1).into_owned();
    for (pixel, gray) in image.pixels.chunks_exact_mut(3).zip(luma.pixels) {
        pixel.iter_mut().for_each(|b| *b = blend(gray, *b, factor));
    }
}

/// From smooth (0) over the image (1) to sharper. Smooth is the mean of a pixel and its neighbours,
/// itself counted five times; the outermost pixels stay.
pub(super) fn sharpness(image: &mut Image, factor: f32) {
    let (height, width, channels) = (image.height, image.width, image.channels);
    let before = image.pixels.clone();
    let row = width * channels;
    for y in 1..height.saturating_sub(1) {
        for x in channels..row.saturating_sub(channels) {
            let at = y * row + x;
            let around: u32 = [at - row, at, at + row]
                .iter()
                .flat_map(|&m| [m - channels, m, m + channels])
                .map(|p| u32::from(before[p]))
                .sum();
            // Rounded to the nearest; thirteenths have no ties.
            let smooth = (2 * (around + 4 * u32::from(before[at])) + 13) / 26;
            image.pixels[at] = blend(smooth as u8, before[at], factor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gray(width: usize, pixels: &[u8]) -> Image {
        Image { width, height: pixels.len() / width, channels: 1, pixels: pixels.to_vec() }
    }

    fn after(change: impl Fn(&mut Image), pixels: &[u8]) -> Vec<u8> {
        let mut image = gray(pixels.len(), pixels);
        change(&mut image);
        image.pixels
    }

    #[test]
    fn tables_by_hand() {
        assert_eq!(after(invert, &[0, 100, 255]), [255, 155, 0]);
        assert_eq!(after(|i| posterize(i, 2), &[0, 63, 64, 200, 255]), [0, 0, 64, 192, 192]);
        assert_eq!(after(|i| posterize(i, 0), &[1, 255]), [0, 0]);
        assert_eq!(after(|i| posterize(i, 8), &[1, 255]), [1, 255]);
        assert_eq!(after(|i| solarize(i, 100), &[0, 99, 100, 255]), [0, 99, 155, 0]);
        assert_eq!(after(|i| solarize(i, 256), &[0, 255]), [0, 255]);
        assert_eq!(after(|i| solarize_add(i, 110), &[0, 100, 127, 128, 200]), [110, 210, 237, 128, 200]);
        // 10 to 110 over 0 to 255: 60 lands on 127.5, rounded down.
        assert_eq!(after(auto_contrast, &[10, 60, 110]), [0, 127, 255]);
        assert_eq!(after(auto_contrast, &[9, 9]), [9, 9]);
    }

    #[test]
    fn equalizing_by_hand() {
        // 510 zeros, 255 of 10, 300 of 20: a step of 765 / 255 = 3, so 0, (1 + 510) / 3, (1 + 765) / 3.
        let pixels = [vec![0; 510], vec![10; 255], vec![20; 300]].concat();
        let expected = [vec![0; 510], vec![170; 255], vec![255; 300]].concat();
        assert_eq!(after(equalize, &pixels), expected);
        assert_eq!(after(equalize, &[1, 2, 3]), [1, 2, 3]); // too few to step
    }

    #[test]
    fn blends_by_hand() {
        assert_eq!(after(|i| brightness(i, 0.5), &[0, 101, 255]), [0, 50, 127]);
        assert_eq!(after(|i| brightness(i, 1.9), &[10, 200]), [19, 255]);
        // The mean of 0, 100, 101 is 67.
        assert_eq!(after(|i| contrast(i, 0.0), &[0, 100, 101]), [67, 67, 67]);
        assert_eq!(after(|i| contrast(i, 2.0), &[0, 100, 101]), [0, 133, 135]);
        let mut rgb = Image { width: 1, height: 1, channels: 3, pixels: vec![255, 0, 0] };
        color(&mut rgb, 0.5); // luma 76
        assert_eq!(rgb.pixels, [165, 38, 38]);
        color(&mut rgb, 1.0);
        assert_eq!(rgb.pixels, [165, 38, 38]);
        assert_eq!(after(|i| color(i, 0.1), &[1, 2]), [1, 2]);
    }

    #[test]
    fn sharpness_by_hand() {
        let mut image = gray(4, &[0, 0, 0, 9, 0, 130, 26, 9, 0, 0, 0, 9]);
        let before = image.clone();
        sharpness(&mut image, 0.0);
        // (5 * 130 + 26) / 13 = 52 and (5 * 26 + 130 + 27) / 13 = 22.08; the rest is border.
        assert_eq!(image.pixels, [0, 0, 0, 9, 0, 52, 22, 9, 0, 0, 0, 9]);
        let mut image = before.clone();
        sharpness(&mut image, 2.0); // 52 + 2 * 78 = 208 and 22 + 2 * 4 = 30
        assert_eq!(image.pixels, [0, 0, 0, 9, 0, 208, 30, 9, 0, 0, 0, 9]);
        sharpness(&mut image, 1.0);
        assert_eq!(image.pixels[5..7], [208, 30]);
        let mut thin = gray(1, &[1, 2]);
        sharpness(&mut thin, 0.0);
        assert_eq!(thin.pixels, [1, 2]);
    }

    /// A colour image is changed channel by channel.
    #[test]
    fn channels_have_tables_of_their_own() {
        let mut rgb = Image { width: 2, height: 1, channels: 3, pixels: vec![0, 10, 200, 51, 20, 200] };
        auto_contrast(&mut rgb);
        assert_eq!(rgb.pixels, [0, 0, 200, 255, 255, 200]);
    }
}
