//! Mixup (Zhang et al. 2017) and cutmix (Yun et al. 2019) of a whole batch, as timm's batch mode:
//! image i meets image `n - 1 - i`, one share for all.
//!
//! ```text
//! mixup    x_i = lambda x_i + (1 - lambda) x_{n-1-i}
//! cutmix   x_i = x_{n-1-i} inside a rectangle with sides sqrt(1 - lambda), cut off at the border;
//!          lambda is then the share that is left
//! targets  y_i = lambda s(label_i) + (1 - lambda) s(label_{n-1-i})
//!          s(k) = smoothing / classes everywhere, and 1 - smoothing more at k
//! ```
//!
//! lambda is from Beta(alpha, alpha). Where both are on, each batch takes one of them with probability
//! one half. timm blends bytes and rounds; here the normalised numbers are blended.

use super::resized_crop::Rect;
use super::Augment;
use crate::random::Random;

/// How a batch is mixed with its own reverse.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::data) struct Mix {
    /// The share of an image that stays its own.
    lambda: f64,
    /// What is exchanged; none where all pixels are blended.
    rect: Option<Rect>,
}

/// A rectangle of a share `1 - lambda` of the area around a random point, as far as it lies inside.
fn cut_out(height: usize, width: usize, lambda: f64, random: &mut Random) -> Rect {
    let ratio = (1.0 - lambda).sqrt();
    let mut span = |size: usize| {
        let half = (size as f64 * ratio) as usize / 2;
        let middle = random.below(size as u32) as usize;
        (middle.saturating_sub(half), (middle + half).min(size))
    };
    let ((top, bottom), (left, right)) = (span(height), span(width));
    Rect { top, left, height: bottom - top, width: right - left }
}

impl Mix {
    /// Draws how a batch of images of `height` by `width` pixels is mixed; none where neither is on.
    pub fn draw(augment: &Augment, height: usize, width: usize, random: &mut Random) -> Option<Mix> {
        let cut = match (augment.mixup > 0.0, augment.cutmix > 0.0) {
            (false, false) => return None,
            (true, true) => random.chance(0.5),
            (_, cut) => cut,
        };
        let lambda = random.beta(if cut { augment.cutmix } else { augment.mixup });
        if !cut {
            return Some(Mix { lambda, rect: None });
        }
        let rect = cut_out(height, width, lambda, random);
        let gone = (rect.height * rect.width) as f64 / (height * width) as f64;
        Some(Mix { lambda: 1.0 - gone, rect: Some(rect) })
    }

    /// Mixes `images: [batch, channels, height, width]`, each of `numel` numbers.
    pub fn images(&self, images: &mut [f32], numel: usize, height: usize, width: usize) {
        let count = images.len() / numel;
        let (front, back) = images.split_at_mut(count / 2 * numel);
        // The middle one of an odd number meets itself.
        let back = &mut back[count % 2 * numel..];
        let (own, other) = (self.lambda as f32, (1.0 - self.lambda) as f32);
        for (a, b) in front.chunks_exact_mut(numel).zip(back.chunks_exact_mut(numel).rev()) {
            let Some(rect) = self.rect else {
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (own * *a + other * *b, own * *b + other * *a);
                }
                continue;
            };
            let planes = a.chunks_exact_mut(height * width).zip(b.chunks_exact_mut(height * width));
            for (a, b) in planes {
                for y in rect.top..rect.top + rect.height {
                    let row = y * width + rect.left..y * width + rect.left + rect.width;
                    a[row.clone()].swap_with_slice(&mut b[row]);
                }
            }
        }
    }
}

/// The soft labels `[batch, classes]` of a batch: smoothed, and mixed where the images were.
/// `labels` are below `classes`.
pub(in crate::data) fn soft_targets(
    labels: &[u32],
    classes: usize,
    smoothing: f64,
    mix: Option<Mix>,
) -> Vec<f32> {
    let lambda = mix.map_or(1.0, |mix| mix.lambda);
    let mut targets = vec![(smoothing / classes as f64) as f32; labels.len() * classes];
    let reversed = labels.iter().rev();
    for ((row, &label), &other) in targets.chunks_exact_mut(classes).zip(labels).zip(reversed) {
        row[label as usize] += ((1.0 - smoothing) * lambda) as f32;
        row[other as usize] += ((1.0 - smoothing) * (1.0 - lambda)) as f32;
    }
    targets
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: &[f32], b: &[f32]) -> bool {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6)
    }

    #[test]
    fn blending_by_hand() {
        let mix = Mix { lambda: 0.75, rect: None };
        let mut images = [0.0, 4.0, 100.0, 200.0, 8.0, 0.0]; // three images of 1 x 2
        mix.images(&mut images, 2, 1, 2);
        assert_eq!(images, [2.0, 3.0, 100.0, 200.0, 6.0, 1.0]);
        // 0.75 and 0.25 of the 0.9 that smoothing leaves, over 0.1 / 4 everywhere.
        let targets = soft_targets(&[0, 2, 3], 4, 0.1, Some(mix));
        let expected = [0.7, 0.025, 0.025, 0.25, 0.025, 0.025, 0.925, 0.025, 0.25, 0.025, 0.025, 0.7];
        assert!(near(&targets, &expected), "{targets:?}");
        assert_eq!(soft_targets(&[1, 0], 2, 0.0, None), [0.0, 1.0, 1.0, 0.0]);
    }

    #[test]
    fn pasting_by_hand() {
        let rect = Rect { top: 1, left: 1, height: 1, width: 2 };
        let mix = Mix { lambda: 4.0 / 6.0, rect: Some(rect) };
        // Two images of two channels of 2 x 3.
        let mut images: Vec<f32> = (0..24).map(|v| v as f32).collect();
        mix.images(&mut images, 12, 2, 3);
        assert_eq!(images[..12], [0., 1., 2., 3., 16., 17., 6., 7., 8., 9., 22., 23.]);
        assert_eq!(images[12..], [12., 13., 14., 15., 4., 5., 18., 19., 20., 21., 10., 11.]);
        let targets = soft_targets(&[0, 1], 2, 0.0, Some(mix));
        assert!(near(&targets, &[2.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0, 2.0 / 3.0]), "{targets:?}");
    }

    #[test]
    fn rectangles_lie_inside_and_lambda_is_what_is_left() {
        let both = Augment { mixup: 0.8, cutmix: 1.0, ..Default::default() };
        let (mut cut, mut sum) = (0, 0.0);
        for i in 0..2000 {
            let mix = Mix::draw(&both, 10, 14, &mut Random::new(3, "mix", &[0, i])).unwrap();
            assert!((0.0..=1.0).contains(&mix.lambda), "{mix:?}");
            let Some(rect) = mix.rect else {
                sum += mix.lambda;
                continue;
            };
            cut += 1;
            assert!(rect.top + rect.height <= 10 && rect.left + rect.width <= 14, "{rect:?}");
            let left = 1.0 - (rect.height * rect.width) as f64 / 140.0;
            assert!((mix.lambda - left).abs() < 1e-12);
        }
        assert!((900..1100).contains(&cut), "{cut}");
        assert!((sum / f64::from(2000 - cut) - 0.5).abs() < 0.05);
        let draw = |a: &Augment| Mix::draw(a, 4, 4, &mut Random::new(0, "", &[]));
        assert_eq!(draw(&Augment::default()), None);
        assert!(draw(&Augment { mixup: 1.0, ..Default::default() }).unwrap().rect.is_none());
        assert!(draw(&Augment { cutmix: 1.0, ..Default::default() }).unwrap().rect.is_some());
    }
}
