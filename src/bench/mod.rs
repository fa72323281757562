//! What `qtune bench` measures: a model opened as one side of a comparison, and timed passes of it.
//!
//! A [`Side`] is one model in memory. It is asked for passes of made-up input: images through a vision model,
//! or a prompt read (prefill) and an answer written token by token (decode) by a language model. What stands beside
//! it is another [`Side`], in a process of its own, so that each has a peak of memory of its own; [`copies`]
//! makes the model that a side reads where there is none on disk.

pub mod copies;
mod memory;

use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};

use crate::language::open_at;
use crate::models::llama_config::is_language_model;
use crate::models::{held, open_model_with, read_config, Cache, Llama, VisionConfig, VisionModel};
use crate::random::Random;
use crate::weights::{Expr, Pickle, Weight, Weights};
use crate::{Error, Result};

pub use memory::Peak;

/// How a side is opened.
#[derive(Clone, Copy, Debug)]
pub struct Opening {
    /// Whether packed weights become the dense values that they stand for, and activations stay floats: full
    /// precision out of a packed model.
    pub dense: bool,
    /// What a language model's activations and dense weights are held in.
    pub dtype: DType,
    /// Whether pickled files may be read.
    pub pickle: Pickle,
}

/// What one pass is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Images, or rows of text.
    pub batch: usize,
    /// Tokens of a prompt; of no meaning for images.
    pub prompt: usize,
    /// Tokens of an answer, at least one; of no meaning for images.
    pub answer: usize,
}

/// Seconds of one pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pass {
    /// All images of a batch; of text the prompts, up to the logits of the first token of the answers.
    pub first_s: f64,
    /// The tokens of the answers behind the first; none for images and for answers of one token.
    pub decode_s: Option<f64>,
}

/// A model in memory.
#[derive(Debug)]
pub struct Side {
    model: Model,
    device: Device,
    /// Seconds from the folder to a model that can answer.
    pub load_s: f64,
    /// Bytes of the weights in memory: codes and steps of packed ones.
    pub weights_bytes: usize,
    /// Parameters.
    pub params: usize,
    /// Bits of most weights, 32, 16 or what they are packed to.
    pub bits: u8,
    /// What is worth a line.
    pub notes: Vec<String>,
}

#[derive(Debug)]
enum Model {
    Vision(Box<(VisionConfig, VisionModel)>),
    Language(Box<Llama>),
}

/// Whether the folder `dir` holds a language model.
pub fn is_language(dir: &Path) -> bool {
    read_config(dir).is_ok_and(|(_, json)| is_language_model(&json))
}

/// Bytes in memory, and the bits that most weights have.
fn sizes(weights: &Weights) -> Result<(usize, u8)> {
    let (mut bytes, mut counts) = (0, [0usize; 65]);
    for (_, weight) in weights.iter() {
        let count: usize = weight.shape()?.iter().product();
        let (size, bits) = match weight.expr() {
            Expr::Packed(packed) => (packed.bytes(), packed.grid().bits),
            Expr::Dense(tensor) => {
                let each = tensor.dtype().size_in_bytes();
                (count * each, (8 * each) as u8)
            }
            // An untied input embedding stays in its file: its rows are read as they are asked for.
            _ => (0, 0),
        };
        bytes += size;
        counts[usize::from(bits.min(64))] += count;
    }
    let most = (1..65).max_by_key(|bits| counts[*bits]).unwrap_or(32);
    Ok((bytes, most as u8))
}

/// Every weight the dense values of its codes; no rules on taps.
fn unpacked(weights: Weights) -> Result<Weights> {
    let mut dense = Weights::default();
    for (name, weight) in weights.iter() {
        let value = match weight.expr() {
            Expr::Packed(_) => Weight::dense(weight.tensor()?.detach()),
            _ => weight.clone(),
        };
        dense.insert(name, value);
    }
    Ok(dense)
}

impl Side {
    /// Opens the model in the folder `dir`: a vision model or a language model, dense or packed.
    pub fn open(dir: &Path, opening: &Opening, device: &Device) -> Result<Self> {
        let begun = Instant::now();
        let (model, weights, params, notes) = match is_language(dir) {
            true => {
                let start = open_at(dir, device)?;
                let mut weights = held(&start.config, &start.weights, opening.dtype)?;
                if opening.dense {
                    weights = unpacked(weights)?;
                }
                let model = Llama::new(&start.config, &weights, opening.dtype)?;
                (Model::Language(Box::new(model)), weights, start.config.params(), start.notes)
            }
            false => {
                let opened = open_model_with(dir, opening.pickle, device)?;
                let weights = match opening.dense {
                    true => unpacked(opened.weights)?,
                    false => opened.weights,
                };
                let (model, params) = (opened.config.build(&weights)?, opened.config.params());
                (Model::Vision(Box::new((opened.config, model))), weights, params, opened.notes)
            }
        };
        let (weights_bytes, bits) = sizes(&weights)?;
        let load_s = begun.elapsed().as_secs_f64();
        Ok(Side { model, device: device.clone(), load_s, weights_bytes, params, bits, notes })
    }

    /// Tokens that a prompt and its answer have room for; none for a vision model.
    pub fn room(&self) -> Option<usize> {
        match &self.model {
            Model::Vision(_) => None,
            Model::Language(model) => Some(model.config().max_positions),
        }
    }

    /// One pass of made-up input, the same every time. Making it is not part of the time.
    pub fn pass(&self, work: &Work) -> Result<Pass> {
        match &self.model {
            Model::Vision(vision) => {
                let (config, model) = vision.as_ref();
                let (height, width) = config.image_size();
                let shape = (work.batch, config.channels(), height, width);
                let mut random = Random::new(0, "bench", &[]);
                let count = work.batch * config.channels() * height * width;
                let pixels: Vec<f32> = (0..count).map(|_| random.normal()).collect();
                let images = Tensor::from_vec(pixels, shape, &self.device)?;
                let begun = Instant::now();
                let logits = model.forward(&images)?.logits()?;
                // To the host: an answer is there when it can be read.
                logits.flatten_all()?.to_vec1::<f32>()?;
                Ok(Pass { first_s: begun.elapsed().as_secs_f64(), decode_s: None })
            }
            Model::Language(model) => self.text(model, work),
        }
    }

    fn text(&self, model: &Llama, work: &Work) -> Result<Pass> {
        let config = model.config();
        let room = work.prompt + work.answer;
        if work.prompt == 0 || work.answer == 0 || room > config.max_positions {
            let most = config.max_positions;
            return Err(Error::usage(format!(
                "--seq-len {}, --tokens {}: expected at least 1 each, and {most} at most together, which the model was \
                 made for",
                work.prompt, work.answer
            )));
        }
        let mut random = Random::new(0, "bench", &[]);
        let tokens: Vec<u32> =
            (0..work.batch * work.prompt).map(|_| random.below(config.vocab as u32)).collect();
        let mut cache = Cache::new(config.layers, room);
        let begun = Instant::now();
        let mut next = likeliest(&model.step_rows(&tokens, work.batch, &mut cache, &self.device)?)?;
        let first_s = begun.elapsed().as_secs_f64();
        let begun = Instant::now();
        for _ in 1..work.answer {
            next = likeliest(&model.step_rows(&next, work.batch, &mut cache, &self.device)?)?;
        }
        let decode_s = (work.answer > 1).then(|| begun.elapsed().as_secs_f64());
        Ok(Pass { first_s, decode_s })
    }
}

/// The likeliest token of each row of logits `[batch, vocab]`.
fn likeliest(logits: &Tensor) -> Result<Vec<u32>> {
    let rows = logits.to_vec2::<f32>()?;
    let of = |row: &Vec<f32>| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(i, _)| i);
    Ok(rows.iter().map(|row| of(row) as u32).collect())
}

/// The middle one of some figures, of an even number the mean of the two in the middle; NaN of none.
pub fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => 0.5 * (sorted[n / 2 - 1] + sorted[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn the_likeliest_of_each_row() {
        let logits = Tensor::new(&[[0f32, 2.0, 1.0], [5.0, -1.0, 4.0]], &Device::Cpu).unwrap();
        assert_eq!(likeliest(&logits).unwrap(), [1, 0]);
    }

    /// Rows that go through the model together say what each says alone.
    #[test]
    fn rows_together_answer_as_they_do_alone() {
        let start = crate::language::tiny(&Device::Cpu).unwrap();
        let model = Llama::new(&start.config, &start.weights, DType::F32).unwrap();
        let rows: Vec<Vec<u32>> =
            (0..3).map(|r| (0..7).map(|t| (r * 31 + t * 17) % 200 + 3).collect()).collect();
        let mut together = Cache::new(start.config.layers, 9);
        let mut alone: Vec<Cache> = rows.iter().map(|_| Cache::new(start.config.layers, 9)).collect();
        let mut tokens = rows.clone();
        for _ in 0..3 {
            let flat: Vec<u32> = tokens.concat();
            let got = model.step_rows(&flat, 3, &mut together, &Device::Cpu).unwrap();
            let got = got.to_vec2::<f32>().unwrap();
            for (r, cache) in alone.iter_mut().enumerate() {
                let want = model.step(&tokens[r], cache, &Device::Cpu).unwrap().to_vec1::<f32>().unwrap();
                let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
                // Sums of other tile shapes run in another order.
                let off = want.iter().zip(&got[r]).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
                assert!(off <= 1e-4 * largest, "row {r}: {off} of {largest}");
            }
            tokens = (0..3).map(|r| vec![(r * 5 + 9) as u32]).collect();
        }
        assert!(model.step_rows(&[1, 2], 2, &mut together, &Device::Cpu).is_err());
    }
}
