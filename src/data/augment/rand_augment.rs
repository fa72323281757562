//! RandAugment (Cubuk et al. 2019) as timm has it: a few changes out of fifteen, each carried out with
//! probability one half at a magnitude of 0 to 10.
//!
//! It is written as timm writes it, `rand-m9-mstd0.5-inc1`: `m` the magnitude (10 where it is not
//! given), `n` how many changes are drawn, with repetition (2), `mstd` the standard deviation of the
//! magnitude (0; above 100 the magnitude is uniform from 0 to `m`), `mmax` its upper limit (10), `inc1`
//! the set of changes that grow with it, the only one there is here.
//!
//! The image's mean fills what geometry leaves empty.

use super::super::Image;
use super::{affine, tone, Augment};
use crate::data::{Filter, Preprocess};
use crate::random::Random;
use serde::{Deserialize, Deserializer, Serialize};

/// The magnitude at which a change is at its full range.
const FULL: f64 = 10.0;

/// RandAugment, read from timm's notation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RandAugment {
    text: String,
    magnitude: f64,
    changes: usize,
    std: f64,
    most: f64,
}

/// One of the changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    AutoContrast,
    Equalize,
    Invert,
    Rotate,
    Posterize,
    Solarize,
    SolarizeAdd,
    Color,
    Contrast,
    Brightness,
    Sharpness,
    ShearX,
    ShearY,
    TranslateX,
    TranslateY,
}

const OPS: [Op; 15] = [
    Op::AutoContrast,
    Op::Equalize,
    Op::Invert,
    Op::Rotate,
    Op::Posterize,
    Op::Solarize,
    Op::SolarizeAdd,
    Op::Color,
    Op::Contrast,
    Op::Brightness,
    Op::Sharpness,
    Op::ShearX,
    Op::ShearY,
    Op::TranslateX,
    Op::TranslateY,
];

impl TryFrom<String> for RandAugment {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let bad = |what: String| format!("rand_augment {text}: {what}");
        let mut parts = text.split('-');
        if parts.next() != Some("rand") {
            return Err(bad("expected rand-..., such as rand-m9-mstd0.5-inc1, or none".to_string()));
        }
        let (mut magnitude, mut changes, mut std, mut most, mut increasing) = (FULL, 2.0, 0.0, FULL, 0.0);
        for part in parts {
            let digits = part.find(|c: char| c.is_ascii_digit()).unwrap_or(part.len());
            let (key, value) = part.split_at(digits);
            let (slot, low, high) = match key {
                "m" => (&mut magnitude, 0.0, 100.0),
                "n" => (&mut changes, 0.0, 100.0),
                "mstd" => (&mut std, 0.0, f64::MAX),
                "mmax" => (&mut most, 0.0, 100.0),
                "inc" => (&mut increasing, 0.0, 1.0),
                _ => return Err(bad(format!("{part}: expected parts m, n, mstd, mmax and inc"))),
            };
            let whole = matches!(key, "n" | "inc");
            *slot = value
                .parse::<f64>()
                .ok()
                .filter(|v| (low..=high).contains(v) && (!whole || v.fract() == 0.0))
                .ok_or_else(|| {
                    let kind = if whole { "a whole number" } else { "a number" };
                    let end = if high < 1e3 { format!(", {low} to {high}") } else { String::new() };
                    bad(format!("{part}: expected {kind} behind {key}{end}"))
                })?;
        }
        if increasing != 1.0 {
            return Err(bad("expected inc1: the changes that do not grow with m are not here".to_string()));
        }
        Ok(RandAugment { magnitude, changes: changes as usize, std, most, text })
    }
}

impl From<RandAugment> for String {
    fn from(rand: RandAugment) -> String {
        rand.text
    }
}

/// A recipe's `rand_augment`: `none` takes back what was set before.
pub(super) fn optional<'de, D: Deserializer<'de>>(from: D) -> Result<Option<RandAugment>, D::Error> {
    match String::deserialize(from)? {
        none if none == "none" => Ok(None),
        text => RandAugment::try_from(text).map(Some).map_err(serde::de::Error::custom),
    }
}

/// The byte that stands for the mean of each channel.
fn fill_of(target: &Preprocess) -> Vec<u8> {
    // The hair makes up for a 1/255 that is rounded up: a mean of 0.5 is 128.
    let byte = |mean: &f32| (f64::from(*mean) / f64::from(target.rescale) + 1e-4).round() as u8;
    target.mean.iter().map(byte).collect()
}

impl RandAugment {
    /// The magnitude of one change.
    fn level(&self, random: &mut Random) -> f64 {
        let drawn = match self.std {
            0.0 => self.magnitude,
            std if std > 100.0 => self.magnitude * f64::from(random.uniform()),
            std => self.magnitude + std * f64::from(random.normal()),
        };
        drawn.clamp(0.0, self.most)
    }

    /// Changes `image`, which has the channels of `target`.
    pub(in crate::data) fn apply(
        &self,
        mut image: Image,
        augment: &Augment,
        target: &Preprocess,
        random: &mut Random,
    ) -> Image {
        let fill = fill_of(target);
        for _ in 0..self.changes {
            let op = OPS[random.below(OPS.len() as u32) as usize];
            if random.chance(0.5) {
                let level = self.level(random);
                let negative = random.chance(0.5);
                let filter = augment.filter(target.filter, random);
                image = op.apply(image, level, negative, filter, &fill);
            }
        }
        image
    }
}

impl Op {
    /// `image` changed at a `level` of 0 to 10 (or `mmax`); where a change has two directions,
    /// `negative` takes the second.
    fn apply(self, mut image: Image, level: f64, negative: bool, filter: Filter, fill: &[u8]) -> Image {
        let share = level / FULL;
        let signed = |most: f64| if negative { -share * most } else { share * most };
        // 1 changes nothing; never all the way to 0.
        let factor = (1.0 + signed(0.9)).max(0.1) as f32;
        let (height, width) = (image.height, image.width);
        let map = match self {
            Op::Rotate => Some(affine::rotate(signed(30.0), height, width)),
            Op::ShearX => Some(affine::shear_x(signed(0.3))),
            Op::ShearY => Some(affine::shear_y(signed(0.3))),
            Op::TranslateX => Some(affine::translate(signed(0.45) * width as f64, 0.0)),
            Op::TranslateY => Some(affine::translate(0.0, signed(0.45) * height as f64)),
            _ => None,
        };
        if let Some(map) = map {
            return affine::transform(&image, map, filter, fill);
        }
        match self {
            Op::AutoContrast => tone::auto_contrast(&mut image),
            Op::Equalize => tone::equalize(&mut image),
            Op::Invert => tone::invert(&mut image),
            Op::Posterize => tone::posterize(&mut image, 4u32.saturating_sub((share * 4.0) as u32)),
            Op::Solarize => tone::solarize(&mut image, 256u32.saturating_sub((share * 256.0) as u32)),
            Op::SolarizeAdd => tone::solarize_add(&mut image, (share * 110.0).min(128.0) as u8),
            Op::Color => tone::color(&mut image, factor),
            Op::Contrast => tone::contrast(&mut image, factor),
            Op::Brightness => tone::brightness(&mut image, factor),
            Op::Sharpness => tone::sharpness(&mut image, factor),
            Op::Rotate | Op::ShearX | Op::ShearY | Op::TranslateX | Op::TranslateY => {}
        }
        image
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<RandAugment, String> {
        RandAugment::try_from(text.to_string())
    }

    fn photo(channels: usize) -> Image {
        let byte = |i: usize| ((i * 37 + i * i / 11) % 251) as u8;
        Image { width: 12, height: 9, channels, pixels: (0..108 * channels).map(byte).collect() }
    }

    #[test]
    fn the_notation_is_read_and_written_back() {
        let r = parse("rand-m9-mstd0.5-inc1").unwrap();
        assert_eq!((r.magnitude, r.changes, r.std, r.most), (9.0, 2, 0.5, 10.0));
        assert_eq!(String::from(r), "rand-m9-mstd0.5-inc1");
        let r = parse("rand-inc1-n3-mmax15-m12").unwrap();
        assert_eq!((r.magnitude, r.changes, r.std, r.most), (12.0, 3, 0.0, 15.0));
        assert_eq!(parse("rand-inc1").unwrap().magnitude, 10.0);
    }

    #[test]
    fn what_is_wrong_with_it_is_named() {
        let wrong = |text: &str| parse(text).unwrap_err();
        assert_eq!(
            wrong("rand-m9-w0-inc1"),
            "rand_augment rand-m9-w0-inc1: w0: expected parts m, n, mstd, mmax and inc"
        );
        assert_eq!(
            wrong("rand-mten-inc1"),
            "rand_augment rand-mten-inc1: mten: expected parts m, n, mstd, mmax and inc"
        );
        assert_eq!(wrong("rand-m-inc1"), "rand_augment rand-m-inc1: m: expected a number behind m, 0 to 100");
        assert_eq!(
            wrong("rand-n1.5-inc1"),
            "rand_augment rand-n1.5-inc1: n1.5: expected a whole number behind n, 0 to 100"
        );
        assert_eq!(wrong("rand--inc1"), "rand_augment rand--inc1: : expected parts m, n, mstd, mmax and inc");
        for text in ["rand-m9", "rand-m9-inc0"] {
            assert!(wrong(text).contains("expected inc1"), "{}", wrong(text));
        }
        for text in ["", "augmix-m3", "m9-inc1", "rand-mstdx-inc1", "rand-m1e999-inc1", "rand-m9-incinf"] {
            assert!(wrong(text).starts_with(&format!("rand_augment {text}: ")), "{}", wrong(text));
        }
    }

    #[test]
    fn magnitudes_follow_their_notation() {
        let levels = |text: &str| -> Vec<f64> {
            let rand = parse(text).unwrap();
            (0..2000).map(|i| rand.level(&mut Random::new(1, "level", &[i]))).collect()
        };
        assert!(levels("rand-m7-inc1").iter().all(|l| *l == 7.0));
        assert!(levels("rand-m12-inc1").iter().all(|l| *l == 10.0));
        assert!(levels("rand-m12-mmax15-inc1").iter().all(|l| *l == 12.0));
        let near = levels("rand-m9-mstd0.5-inc1");
        let mean = near.iter().sum::<f64>() / 2000.0;
        assert!((mean - 9.0).abs() < 0.05 && near.iter().all(|l| (7.0..=10.0).contains(l)), "{mean}");
        assert!(near.iter().filter(|l| (8.5..9.5).contains(*l)).count() > 1300); // 68 %
        let flat = levels("rand-m8-mstd101-inc1");
        let mean = flat.iter().sum::<f64>() / 2000.0;
        assert!((mean - 4.0).abs() < 0.2 && flat.iter().all(|l| (0.0..8.0).contains(l)), "{mean}");
    }

    /// At level 0 a change with a level is none, but for posterizing to four bits.
    #[test]
    fn no_magnitude_no_change() {
        for op in OPS {
            let image = photo(3);
            let same = op.apply(image.clone(), 0.0, false, Filter::Bilinear, &[0; 3]) == image;
            let levelled = ![Op::AutoContrast, Op::Equalize, Op::Invert, Op::Posterize].contains(&op);
            assert!(!levelled || same, "{op:?}");
            // Upwards and downwards, gray and colour, at the far end and beyond it: sizes stay.
            for channels in [1, 3] {
                for (level, negative) in [(10.0, false), (10.0, true), (30.0, true)] {
                    let changed = op.apply(photo(channels), level, negative, Filter::Bicubic, &[9; 3]);
                    assert_eq!(changed.pixels.len(), 108 * channels);
                }
            }
        }
    }

    #[test]
    fn every_change_comes_and_half_of_them_are_left_out() {
        let (rand, augment) = (parse("rand-m9-n1-inc1").unwrap(), Augment::default());
        let target = Preprocess::default_for(9, 12, 3);
        assert_eq!(fill_of(&target), [128; 3]);
        let image = photo(3);
        let mut seen = std::collections::BTreeMap::new();
        for i in 0..6000 {
            let random = &mut Random::new(2, "rand", &[i]);
            let changed = rand.apply(image.clone(), &augment, &target, random);
            *seen.entry(changed.pixels).or_insert(0usize) += 1;
        }
        let unchanged = seen[&image.pixels];
        assert!((2850..3500).contains(&unchanged), "{unchanged}"); // half, and equalizing so few pixels
                                                                   // One result each of six changes at most, two each of nine with a direction.
        assert!((20..=24).contains(&seen.len()), "{}", seen.len());
    }
}
