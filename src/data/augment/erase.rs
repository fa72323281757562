//! Random erasing (Zhong et al. 2017), as timm draws it: on normalised planes, a rectangle of random
//! area and aspect smaller than the image, filled with normal noise (a draw for each number) or zeros,
//! the mean. Ten tries for one that fits, then the image stays whole.

use super::resized_crop::{up_to, within, within_log, TRIES};
use super::Augment;
use crate::random::Random;
use serde::{Deserialize, Serialize};

/// What an erased rectangle holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EraseMode {
    /// Standard normal noise, each number of each channel for itself.
    Pixel,
    /// Zeros: the mean of the normalisation.
    Const,
}

impl Augment {
    /// Erases a rectangle of `planes: [channels, height, width]` with the probability of the recipe.
    pub(in crate::data) fn erase(
        &self,
        planes: &mut [f32],
        height: usize,
        width: usize,
        random: &mut Random,
    ) {
        if self.erase == 0.0 || f64::from(random.uniform()) >= self.erase {
            return;
        }
        for _ in 0..TRIES {
            let area = within(self.erase_area, random) * (height * width) as f64;
            let aspect = within_log(self.erase_aspect, random);
            let side = |square: f64| (square.sqrt().round_ties_even() as usize).max(1);
            let (h, w) = (side(area * aspect), side(area / aspect));
            if h >= height || w >= width {
                continue;
            }
            let (top, left) = (up_to(height - h, random), up_to(width - w, random));
            for plane in planes.chunks_exact_mut(height * width) {
                for row in plane.chunks_exact_mut(width).skip(top).take(h) {
                    for value in &mut row[left..left + w] {
                        *value = match self.erase_mode {
                            EraseMode::Pixel => random.normal(),
                            EraseMode::Const => 0.0,
                        };
                    }
                }
            }
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image of 7s after erasing.
    fn erased(augment: &Augment, channels: usize, height: usize, width: usize, i: u64) -> Vec<f32> {
        let mut planes = vec![7.0; channels * height * width];
        augment.erase(&mut planes, height, width, &mut Random::new(1, "erase", &[i]));
        planes
    }

    #[test]
    fn a_rectangle_of_every_plane_as_often_as_asked() {
        let augment = Augment { erase: 0.25, erase_mode: EraseMode::Const, ..Default::default() };
        let (mut hit, mut share) = (0, 0.0);
        for i in 0..2000 {
            let planes = erased(&augment, 3, 20, 30, i);
            let (first, rest) = planes.split_at(600);
            assert!(rest.chunks(600).all(|plane| plane == first), "the planes differ");
            let gone: Vec<usize> = (0..600).filter(|&p| first[p] == 0.0).collect();
            if gone.is_empty() {
                assert!(first.iter().all(|v| *v == 7.0));
                continue;
            }
            let rows = (gone[0] / 30, gone[gone.len() - 1] / 30);
            let columns = (gone[0] % 30, gone[gone.len() - 1] % 30);
            let full = (rows.1 - rows.0 + 1) * (columns.1 - columns.0 + 1);
            assert_eq!(gone.len(), full, "not a rectangle");
            assert!((9..=210).contains(&full), "{full} of 600"); // 0.02 to 1/3, in whole pixels
            (hit, share) = (hit + 1, share + full as f64 / 600.0);
        }
        assert!((400..600).contains(&hit), "{hit} of 2000 at a quarter");
        assert!((0.12..0.22).contains(&(share / f64::from(hit))), "{share} {hit}");
    }

    #[test]
    fn noise_differs_everywhere_and_zero_probability_draws_nothing() {
        let augment = Augment { erase: 1.0, erase_area: [0.3, 0.3], ..Default::default() };
        let mut noise: Vec<f32> =
            (0..200).flat_map(|i| erased(&augment, 2, 16, 16, i).into_iter().filter(|v| *v != 7.0)).collect();
        let n = noise.len() as f32;
        let mean = noise.iter().sum::<f32>() / n;
        let variance = noise.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / n;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
        noise.sort_by(f32::total_cmp);
        noise.dedup();
        assert!(noise.len() as f32 > 0.99 * n);
        assert!(erased(&Augment::default(), 1, 4, 4, 0).iter().all(|v| *v == 7.0));
        // Nothing fits into one pixel: it stays, whatever the probability.
        assert_eq!(erased(&augment, 1, 1, 1, 0), [7.0]);
    }
}
