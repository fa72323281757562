//! Random changes to training images; the `[augment]` table of a recipe.
//!
//! One image, in timm's order: a random resized crop (or resizing and a padded crop), a mirroring,
//! RandAugment, normalisation. One batch, as timm's prefetching loader does it: mixup or cutmix of the
//! normalised images, then random erasing of each. An image draws from streams addressed by
//! `[epoch, index]`, its repeats by a third number; a batch from `[epoch, position]`.

mod affine;
mod erase;
mod mix;
mod rand_augment;
mod resized_crop;
mod tone;

pub use erase::EraseMode;
pub(super) use mix::{soft_targets, Mix};
pub use rand_augment::RandAugment;

use super::resample::Filter;
use crate::random::Random;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Random changes to training images. The default changes nothing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Augment {
    /// Pixels of zeros added on each side before a random crop back to size; 0 crops nothing.
    pub crop_pad: usize,
    /// Whether every second image, at random, is mirrored left to right.
    pub flip: bool,
    /// Whether a rectangle of random area and aspect is cut out and brought to size, in place of
    /// resizing the whole image.
    pub resized_crop: bool,
    /// Least and largest area of that rectangle, as shares of the image.
    pub crop_scale: [f64; 2],
    /// Least and largest aspect (width over height) of that rectangle, drawn by its logarithm.
    pub crop_aspect: [f64; 2],
    /// Whether the resized crop and RandAugment's geometry choose bilinear or bicubic at random; else
    /// they use the model's own filter.
    pub random_interpolation: bool,
    /// RandAugment as timm writes it, such as `rand-m9-mstd0.5-inc1`; `none` is none.
    #[serde(deserialize_with = "rand_augment::optional", skip_serializing_if = "Option::is_none")]
    pub rand_augment: Option<RandAugment>,
    /// Probability that a rectangle of an image is erased; 0 erases nothing.
    pub erase: f64,
    /// What an erased rectangle holds.
    pub erase_mode: EraseMode,
    /// Least and largest area of an erased rectangle, as shares of the image.
    pub erase_area: [f64; 2],
    /// Least and largest aspect (height over width) of an erased rectangle, drawn by its logarithm.
    pub erase_aspect: [f64; 2],
    /// Alpha of mixup: batches are blended with their own reverse by a share from Beta(alpha, alpha); 0
    /// is off. Where `cutmix` is on too, each batch takes one of the two at random.
    pub mixup: f64,
    /// Alpha of cutmix: a rectangle of the other image is pasted in, its area drawn likewise; 0 is off.
    pub cutmix: f64,
    /// Probability mass of a target that is spread evenly over all classes. The published 2-bit recipes
    /// have none, for there timm's smoothing acts inside mixup alone (ofq.md 6.1).
    pub label_smoothing: f64,
    /// How often an image comes in an epoch, changed differently each time (repeated augmentation). The
    /// epoch stays as long, so it sees one in so many of the images.
    pub repeats: usize,
}

impl Default for Augment {
    fn default() -> Self {
        Augment {
            crop_pad: 0,
            flip: false,
            resized_crop: false,
            crop_scale: [0.08, 1.0],
            crop_aspect: [3.0 / 4.0, 4.0 / 3.0],
            random_interpolation: false,
            rand_augment: None,
            erase: 0.0,
            erase_mode: EraseMode::Pixel,
            erase_area: [0.02, 1.0 / 3.0],
            erase_aspect: [0.3, 1.0 / 0.3],
            mixup: 0.0,
            cutmix: 0.0,
            label_smoothing: 0.0,
            repeats: 1,
        }
    }
}

impl Augment {
    /// Refuses values out of range, and what does not go together, naming the key.
    pub fn check(&self) -> Result<()> {
        let bad = |key: &str, found: String, expected: &str| {
            Err(Error::usage(format!("augment.{key} = {found}: expected {expected}")))
        };
        for (key, p) in [("erase", self.erase), ("label_smoothing", self.label_smoothing)] {
            if !(0.0..=1.0).contains(&p) {
                return bad(key, p.to_string(), "a probability, 0 to 1");
            }
        }
        for (key, alpha) in [("mixup", self.mixup), ("cutmix", self.cutmix)] {
            if !(alpha.is_finite() && alpha >= 0.0) {
                return bad(key, alpha.to_string(), "0 or more");
            }
        }
        let ranges = [
            ("crop_scale", self.crop_scale, 1.0),
            ("crop_aspect", self.crop_aspect, f64::MAX),
            ("erase_area", self.erase_area, 1.0),
            ("erase_aspect", self.erase_aspect, f64::MAX),
        ];
        for (key, range, most) in ranges {
            let [low, high] = range;
            if !(low > 0.0 && low <= high && high <= most) {
                let end = if most == 1.0 { " and at most 1" } else { "" };
                let expected = format!("[low, high], both above 0, low not above high{end}");
                return bad(key, format!("{range:?}"), &expected);
            }
        }
        if !(1..=1 << 10).contains(&self.repeats) {
            return bad("repeats", self.repeats.to_string(), "1 to 1024");
        }
        if self.resized_crop && self.crop_pad > 0 {
            return bad("crop_pad", self.crop_pad.to_string(), "0 where augment.resized_crop is on");
        }
        Ok(())
    }

    /// The filter of a draw: one of two where the choice is random, else `own`.
    pub(super) fn filter(&self, own: Filter, random: &mut Random) -> Filter {
        match self.random_interpolation {
            true if random.chance(0.5) => Filter::Bilinear,
            true => Filter::Bicubic,
            false => own,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Change = fn(&mut Augment);

    #[test]
    fn the_default_passes_and_bad_values_are_named() {
        Augment::default().check().unwrap();
        let refused = |change: Change| {
            let mut augment = Augment { resized_crop: true, ..Default::default() };
            change(&mut augment);
            let error = augment.check().unwrap_err();
            assert_eq!(error.exit_code(), 2);
            error.to_string()
        };
        let cases: [(Change, &str); 10] = [
            (|a| a.erase = 1.5, "augment.erase = 1.5: expected a probability, 0 to 1"),
            (|a| a.erase = f64::NAN, "augment.erase = NaN: expected a probability, 0 to 1"),
            (|a| a.label_smoothing = -0.1, "augment.label_smoothing = -0.1: expected a probability, 0 to 1"),
            (|a| a.mixup = -1.0, "augment.mixup = -1: expected 0 or more"),
            (|a| a.cutmix = f64::INFINITY, "augment.cutmix = inf: expected 0 or more"),
            (
                |a| a.crop_scale = [1.0, 0.08],
                "augment.crop_scale = [1.0, 0.08]: expected [low, high], both above 0, low not above high and at \
                 most 1",
            ),
            (
                |a| a.crop_aspect = [0.0, 1.0],
                "augment.crop_aspect = [0.0, 1.0]: expected [low, high], both above 0, low not above high",
            ),
            (
                |a| a.erase_area = [0.1, 1.1],
                "augment.erase_area = [0.1, 1.1]: expected [low, high], both above 0, low not above high and at \
                 most 1",
            ),
            (|a| a.repeats = 0, "augment.repeats = 0: expected 1 to 1024"),
            (|a| a.crop_pad = 2, "augment.crop_pad = 2: expected 0 where augment.resized_crop is on"),
        ];
        for (change, expected) in cases {
            assert_eq!(refused(change), expected);
        }
    }
}
