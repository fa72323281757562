//! Built-in images: handwritten-looking characters, drawn from strokes under random distortion.
//!
//! Every image is a pure function of (seed, split, index), so none is stored: a source draws the
//! ones it is asked for, the same bytes on any thread.

use super::{Dataset, Image, Source};
use crate::random::Random;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// The built-in image set; the `[data.glyphs]` table of a recipe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Glyphs {
    /// How many characters there are to tell apart, 2 to 20.
    pub classes: usize,
    /// Height and width in pixels, 8 to 512.
    pub size: usize,
    /// Training images.
    pub train: usize,
    /// Evaluation images.
    pub eval: usize,
}

impl Default for Glyphs {
    fn default() -> Self {
        Glyphs { classes: 10, size: 28, train: 8000, eval: 2000 }
    }
}

/// A piece of a character, in a box from -1 to 1, x to the right and y down.
enum Stroke {
    Line(&'static [(f32, f32)]),
    /// Part of an ellipse: center, radii, and two angles in turns, clockwise from the right.
    Arc((f32, f32), (f32, f32), f32, f32),
}

use Stroke::{Arc as A, Line as L};

const CHARACTERS: [(&str, &[Stroke]); 20] = [
    ("0", &[A((0.0, 0.0), (0.6, 0.9), 0.0, 1.0)]),
    ("1", &[L(&[(-0.3, -0.55), (0.05, -0.9), (0.05, 0.9)])]),
    ("2", &[A((0.0, -0.4), (0.55, 0.5), 0.5, 1.12), L(&[(0.4, -0.06), (-0.55, 0.9), (0.6, 0.9)])]),
    ("3", &[A((-0.05, -0.45), (0.5, 0.45), 0.55, 1.25), A((-0.05, 0.45), (0.58, 0.45), 0.75, 1.45)]),
    ("4", &[L(&[(0.3, 0.9), (0.3, -0.9), (-0.6, 0.3), (0.65, 0.3)])]),
    ("5", &[L(&[(0.5, -0.9), (-0.4, -0.9), (-0.42, -0.02)]), A((0.0, 0.35), (0.58, 0.55), 0.62, 1.42)]),
    ("6", &[A((0.0, 0.4), (0.52, 0.5), 0.0, 1.0), A((0.45, 0.4), (0.97, 1.3), 0.5, 0.74)]),
    ("7", &[L(&[(-0.55, -0.9), (0.55, -0.9), (-0.15, 0.9)])]),
    ("8", &[A((0.0, -0.45), (0.45, 0.45), 0.0, 1.0), A((0.0, 0.45), (0.55, 0.45), 0.0, 1.0)]),
    ("9", &[A((0.0, -0.4), (0.52, 0.5), 0.0, 1.0), A((-0.45, -0.4), (0.97, 1.3), 0.0, 0.24)]),
    ("A", &[L(&[(-0.65, 0.9), (0.0, -0.9), (0.65, 0.9)]), L(&[(-0.42, 0.25), (0.42, 0.25)])]),
    ("E", &[L(&[(0.5, -0.9), (-0.5, -0.9), (-0.5, 0.9), (0.5, 0.9)]), L(&[(-0.5, 0.0), (0.35, 0.0)])]),
    ("F", &[L(&[(0.55, -0.9), (-0.45, -0.9), (-0.45, 0.9)]), L(&[(-0.45, -0.05), (0.35, -0.05)])]),
    (
        "H",
        &[
            L(&[(-0.55, -0.9), (-0.55, 0.9)]),
            L(&[(0.55, -0.9), (0.55, 0.9)]),
            L(&[(-0.55, 0.0), (0.55, 0.0)]),
        ],
    ),
    (
        "K",
        &[L(&[(-0.5, -0.9), (-0.5, 0.9)]), L(&[(0.55, -0.9), (-0.5, 0.1)]), L(&[(-0.2, -0.18), (0.6, 0.9)])],
    ),
    ("M", &[L(&[(-0.7, 0.9), (-0.65, -0.9), (0.0, 0.2), (0.65, -0.9), (0.7, 0.9)])]),
    (
        "P",
        &[
            L(&[(-0.45, 0.9), (-0.45, -0.9), (0.0, -0.9)]),
            A((0.0, -0.4), (0.5, 0.5), 0.75, 1.25),
            L(&[(0.0, 0.1), (-0.45, 0.1)]),
        ],
    ),
    ("T", &[L(&[(-0.65, -0.9), (0.65, -0.9)]), L(&[(0.0, -0.9), (0.0, 0.9)])]),
    ("X", &[L(&[(-0.6, -0.9), (0.6, 0.9)]), L(&[(0.6, -0.9), (-0.6, 0.9)])]),
    ("Y", &[L(&[(-0.6, -0.9), (0.0, -0.05), (0.6, -0.9)]), L(&[(0.0, -0.05), (0.0, 0.9)])]),
];

impl Stroke {
    /// The stroke as a chain of points; 14 pieces a turn are near enough at this size.
    fn points(&self) -> Vec<(f32, f32)> {
        match *self {
            Stroke::Line(points) => points.to_vec(),
            Stroke::Arc((x, y), (rx, ry), from, to) => {
                let pieces = ((to - from) * 14.0).ceil().max(2.0);
                let at = |i: f32| (from + (to - from) * i / pieces) * std::f32::consts::TAU;
                (0..=pieces as usize)
                    .map(|i| at(i as f32))
                    .map(|angle| (x + rx * angle.cos(), y + ry * angle.sin()))
                    .collect()
            }
        }
    }
}

/// One split of the built-in images.
struct Drawn {
    stream: &'static str,
    seed: u64,
    size: usize,
    len: usize,
    /// The strokes of each class as chains of points.
    characters: Vec<Vec<Vec<(f32, f32)>>>,
}

impl Source for Drawn {
    fn len(&self) -> usize {
        self.len
    }

    /// Classes take turns, so that any first N images are balanced.
    fn label(&self, index: usize) -> u32 {
        (index % self.characters.len()) as u32
    }

    fn image(&self, index: usize) -> Result<Image> {
        let mut random = Random::new(self.seed, self.stream, &[index as u64]);
        let strokes = &self.characters[index % self.characters.len()];
        let pixels = draw(strokes, self.size, &mut random);
        Ok(Image { width: self.size, height: self.size, channels: 1, pixels })
    }

    fn name(&self, index: usize) -> String {
        format!("#{index}")
    }
}

/// The built-in data set; errs where the settings are out of bounds.
pub(super) fn open(
    glyphs: &Glyphs,
    limit_train: Option<usize>,
    limit_eval: Option<usize>,
    seed: u64,
) -> Result<Dataset> {
    let Glyphs { classes, size, train, eval } = *glyphs;
    let within = |key: &str, value: usize, low: usize, high: usize| match (low..=high).contains(&value) {
        true => Ok(()),
        false => Err(Error::usage(format!("glyphs.{key} is {value}, expected {low} to {high}"))),
    };
    within("classes", classes, 2, CHARACTERS.len())?;
    within("size", size, 8, 512)?;
    within("train", train, 1, 1 << 30)?;
    within("eval", eval, 1, 1 << 30)?;
    let characters: Vec<Vec<Vec<(f32, f32)>>> = CHARACTERS[..classes]
        .iter()
        .map(|(_, strokes)| strokes.iter().map(Stroke::points).collect())
        .collect();
    let split = |stream, len: usize, limit: Option<usize>| -> Arc<dyn Source> {
        let len = limit.map_or(len, |limit| limit.min(len));
        Arc::new(Drawn { stream, seed, size, len, characters: characters.clone() })
    };
    Ok(Dataset {
        train: split("glyphs.train", train, limit_train),
        eval: split("glyphs.eval", eval, limit_eval),
        classes: CHARACTERS[..classes].iter().map(|(name, _)| name.to_string()).collect(),
        name: "glyphs".to_string(),
        notes: Vec::new(),
    })
}

/// Ink on a square canvas, built up stroke by stroke.
struct Canvas {
    size: usize,
    /// Squared distance of each pixel's center to the nearest stroke, in pixels.
    distance: Vec<f32>,
}

impl Canvas {
    /// Takes the line from `a` to `b` into account for pixels up to `reach` away from it.
    fn line(&mut self, a: (f32, f32), b: (f32, f32), reach: f32) {
        let last = self.size as f32 - 1.0;
        let span = |a: f32, b: f32| {
            let (low, high) = (a.min(b) - reach - 0.5, a.max(b) + reach - 0.5);
            (low.ceil().clamp(0.0, last) as usize, high.floor().clamp(0.0, last) as usize)
        };
        let ((x0, x1), (y0, y1)) = (span(a.0, b.0), span(a.1, b.1));
        let (dx, dy) = (b.0 - a.0, b.1 - a.1);
        let scale = 1.0 / (dx * dx + dy * dy).max(1e-12); // a stroke of no length is a dot
        for y in y0..=y1 {
            let row = &mut self.distance[y * self.size + x0..=y * self.size + x1];
            let py = y as f32 + 0.5 - a.1;
            for (i, nearest) in row.iter_mut().enumerate() {
                let px = (x0 + i) as f32 + 0.5 - a.0;
                let along = ((px * dx + py * dy) * scale).clamp(0.0, 1.0);
                let (ex, ey) = (px - along * dx, py - along * dy);
                *nearest = nearest.min(ex * ex + ey * ey);
            }
        }
    }

    /// Moves the strokes drawn so far into `ink`: `level` inside, falling to 0 over `soft` pixels
    /// around `half` pixels from the middle of the stroke.
    fn settle(&mut self, ink: &mut [f32], level: f32, half: f32, soft: f32) {
        for (ink, distance) in ink.iter_mut().zip(&mut self.distance) {
            if *distance < f32::INFINITY {
                let covered = ((half - distance.sqrt()) / soft + 0.5).clamp(0.0, 1.0);
                *ink = ink.max(level * covered);
                *distance = f32::INFINITY;
            }
        }
    }
}

/// Draws one character of `size` x `size` pixels, distorted by what `random` says.
fn draw(strokes: &[Vec<(f32, f32)>], size: usize, random: &mut Random) -> Vec<u8> {
    let side = size as f32;
    let unit = side / 28.0; // lengths below are meant for 28 pixels
    let (sin, cos) = random.range(-0.22, 0.22).sin_cos(); // 13 degrees
    let shear = random.range(-0.25, 0.25);
    let (wide, high) = (random.range(0.29, 0.41) * side, random.range(0.32, 0.42) * side);
    let shift = (random.range(-0.06, 0.06) * side, random.range(-0.06, 0.06) * side);
    // A slow wave bends the strokes as a hand does.
    let (bend_x, phase_x) = (random.range(0.0, 0.12), random.range(0.0, std::f32::consts::TAU));
    let (bend_y, phase_y) = (random.range(0.0, 0.12), random.range(0.0, std::f32::consts::TAU));
    let half = random.range(0.7, 1.7) * unit;
    let soft = random.range(0.9, 2.4) * unit;
    let level = random.range(140.0, 255.0);
    let noise = random.range(4.0, 30.0);
    let place = |&(x, y): &(f32, f32)| {
        let (x, y) = (x + bend_x * (2.5 * y + phase_x).sin(), y + bend_y * (2.5 * x + phase_y).sin());
        let (x, y) = ((x + shear * y) * wide, y * high);
        (side / 2.0 + shift.0 + cos * x - sin * y, side / 2.0 + shift.1 + sin * x + cos * y)
    };

    let mut canvas = Canvas { size, distance: vec![f32::INFINITY; size * size] };
    let mut ink = vec![0.0; size * size];
    for stroke in strokes {
        let points: Vec<(f32, f32)> = stroke.iter().map(place).collect();
        for pair in points.windows(2) {
            canvas.line(pair[0], pair[1], half + soft / 2.0);
        }
    }
    canvas.settle(&mut ink, level, half, soft);
    // Stray marks that belong to no character.
    for _ in 0..random.below(3) {
        let from = (random.range(0.0, side), random.range(0.0, side));
        let (sin, cos) = random.range(0.0, std::f32::consts::TAU).sin_cos();
        let length = random.range(2.0, 8.0) * unit;
        let thin = random.range(0.4, 1.1) * unit;
        canvas.line(from, (from.0 + cos * length, from.1 + sin * length), thin + soft / 2.0);
        canvas.settle(&mut ink, random.range(0.4, 1.0) * level, thin, soft);
    }
    // Four uniform bytes of one draw add up to nearly a normal one: mean 510, deviation 147.8.
    let grain = noise / 147.8;
    ink.iter()
        .map(|&ink| {
            let sum: u32 = random.bits().to_le_bytes().iter().map(|&b| u32::from(b)).sum();
            (ink + (sum as f32 - 510.0) * grain).round().clamp(0.0, 255.0) as u8
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;

    fn set(glyphs: Glyphs, seed: u64) -> Dataset {
        open(&glyphs, None, None, seed).unwrap()
    }

    #[test]
    fn the_same_bytes_on_any_thread_and_others_for_another_seed_or_split() {
        let small = Glyphs { train: 64, eval: 64, ..Default::default() };
        let (a, b, c) = (set(small.clone(), 3), set(small.clone(), 3), set(small, 4));
        let alone: Vec<Image> = (0..64).map(|i| a.train.image(i).unwrap()).collect();
        let together: Vec<Image> = (0..64).into_par_iter().map(|i| b.train.image(i).unwrap()).collect();
        assert_eq!(alone, together);
        assert_ne!(alone[0], c.train.image(0).unwrap());
        assert_ne!(alone[0], a.eval.image(0).unwrap());
        assert_ne!(alone[0], alone[10]);
    }

    #[test]
    fn classes_are_balanced_and_limits_hold() {
        let glyphs = Glyphs { classes: 20, train: 100, ..Default::default() };
        let data = open(&glyphs, None, Some(7), 0).unwrap();
        let mut seen = [0; 20];
        (0..100).for_each(|i| seen[data.train.label(i) as usize] += 1);
        assert_eq!(seen, [5; 20]);
        assert_eq!((data.eval.len(), data.classes.len(), data.classes[19].as_str()), (7, 20, "Y"));
    }

    #[test]
    fn settings_out_of_bounds_are_usage_errors() {
        for glyphs in [
            Glyphs { classes: 21, ..Default::default() },
            Glyphs { classes: 1, ..Default::default() },
            Glyphs { size: 7, ..Default::default() },
            Glyphs { train: 0, ..Default::default() },
        ] {
            assert_eq!(open(&glyphs, None, None, 0).err().unwrap().exit_code(), 2);
        }
    }

    /// Without distortion ink follows from the distance: a horizontal line through the middle of
    /// row 3, 1 pixel to either side, soft over 1 pixel.
    #[test]
    fn ink_falls_off_with_distance() {
        let mut canvas = Canvas { size: 8, distance: vec![f32::INFINITY; 64] };
        canvas.line((-5.0, 3.5), (20.0, 3.5), 1.5);
        let mut ink = vec![0.0; 64];
        canvas.settle(&mut ink, 200.0, 1.0, 1.0);
        let column: Vec<f32> = (0..8).map(|y| ink[y * 8 + 4]).collect();
        assert_eq!(column, [0.0, 0.0, 100.0, 200.0, 100.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn images_hold_ink_on_a_dark_ground() {
        let data = set(Glyphs { classes: 20, size: 33, train: 200, eval: 1 }, 1);
        for i in 0..200 {
            let image = data.train.image(i).unwrap();
            assert_eq!((image.pixels.len(), image.channels), (33 * 33, 1));
            let bright = image.pixels.iter().filter(|&&p| p > 60).count();
            assert!((30..800).contains(&bright), "image {i} has {bright} bright pixels");
        }
    }
}
