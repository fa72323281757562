//! Swin transformers (Liu et al. 2021): attention within windows that every second block shifts, with a
//! bias for the offset of two patches; maps of half the sides and twice the channels from stage to stage.
//!
//! Tensor names are those of Hugging Face's `SwinForImageClassification` before transformers 5. Taps stand
//! where ofq.md 2.3 and 2.4 place them: inside the attention a step for each place in the window, before
//! the MLP's layers and a reduction one for each column of the map, `[B, rows, columns, channels]`.

use candle_core::Tensor;

use super::attention::{Attention, TOKEN};
use super::drop_path::DropPath;
use super::nn::{finite, LayerNorm, Linear};
use super::patches::PatchEmbedding;
use super::swin_config::{Stage, SwinConfig};
use super::vision::VisionOutput;
use super::vit::{Head, Mlp};
use super::windows::{relative_positions, Windows};
use crate::weights::{Tap, Weight, Weights};
use crate::Result;

/// Of the norms behind the patch embedding and in patch merging, which no configuration sets.
const EPS: f64 = 1e-5;

const PATCHES: &str = "swin.embeddings.patch_embeddings.projection";

/// What is added to the attention logits: a learned number for each head and offset of two patches, and,
/// in shifted blocks, the mask.
#[derive(Debug)]
struct PositionBias {
    table: Weight,
    positions: Tensor,
    mask: Option<Tensor>,
    patches: usize,
}

impl PositionBias {
    fn new(weights: &Weights, name: &str, stage: &Stage, windows: &Windows) -> Result<Self> {
        let table = weights.get(&format!("{name}.relative_position_bias_table"))?.clone();
        let device = table.tensor()?.device().clone();
        let positions = Tensor::new(relative_positions(stage.window), &device)?;
        Ok(PositionBias { table, positions, mask: windows.mask(&device)?, patches: windows.patches() })
    }

    /// `[windows of an image or 1, heads, patches, patches]`.
    fn tensor(&self) -> Result<Tensor> {
        let table = self.table.tensor()?;
        let (n, heads) = (self.patches, table.dim(1)?);
        let bias = table.index_select(&self.positions, 0)?.reshape((n, n, heads))?;
        let bias = bias.permute((2, 0, 1))?.contiguous()?.unsqueeze(0)?;
        match &self.mask {
            Some(mask) => Ok(bias.broadcast_add(mask)?),
            None => Ok(bias),
        }
    }
}

#[derive(Debug)]
struct Block {
    norm_before: LayerNorm,
    windows: Windows,
    bias: PositionBias,
    attention: Attention,
    norm_after: LayerNorm,
    mlp: Mlp,
}

impl Block {
    fn new(weights: &Weights, config: &SwinConfig, stage: &Stage, name: &str, index: usize) -> Result<Self> {
        let windows = stage.windows(index);
        let place = config.attention(stage, name);
        Ok(Block {
            norm_before: LayerNorm::new(weights, &format!("{name}.layernorm_before"), config.eps)?,
            bias: PositionBias::new(weights, &place.inner, stage, &windows)?,
            attention: Attention::new(weights, &place)?,
            windows,
            norm_after: LayerNorm::new(weights, &format!("{name}.layernorm_after"), config.eps)?,
            mlp: Mlp::new(weights, name)?,
        })
    }

    /// `h: [batch, rows, columns, channels]`; `drop` acts on what each branch adds.
    fn forward(&self, h: &Tensor, drop: impl Fn(Tensor, u64) -> Result<Tensor>) -> Result<Tensor> {
        let x = self.windows.partition(&self.norm_before.forward(h)?)?;
        let bias = self.bias.tensor()?.to_dtype(x.dtype())?;
        let x = self.attention.forward(&x, Some(&bias))?;
        let h = (h + drop(self.windows.merge(&x)?, 0)?)?;
        let branch = drop(self.mlp.forward(&self.norm_after.forward(&h)?)?, 1)?;
        Ok((h + branch)?)
    }
}

/// Patch merging: four neighbours side by side, normalised, reduced to twice the channels of one.
#[derive(Debug)]
struct Merging {
    norm: LayerNorm,
    input: Tap,
    reduction: Linear,
}

impl Merging {
    fn new(weights: &Weights, name: &str) -> Result<Self> {
        let reduction = format!("{name}.reduction");
        Ok(Merging {
            norm: LayerNorm::new(weights, &format!("{name}.norm"), EPS)?,
            input: weights.tap(format!("{reduction}.input_quant"), TOKEN),
            reduction: Linear::new(weights, &reduction, false)?,
        })
    }

    /// `[batch, rows, columns, channels]` to `[batch, rows / 2, columns / 2, 2 channels]`; odd sides are
    /// padded with zeros.
    fn forward(&self, h: &Tensor) -> Result<Tensor> {
        self.reduction.forward(&self.input.forward(&self.norm.forward(&neighbours(h)?)?)?)
    }
}

/// Squares of four patches, their channels in the order top left, bottom left, top right, bottom right.
fn neighbours(h: &Tensor) -> Result<Tensor> {
    let (_, rows, cols, _) = h.dims4()?;
    let h = h.pad_with_zeros(1, 0, rows % 2)?.pad_with_zeros(2, 0, cols % 2)?;
    let (batch, rows, cols, channels) = h.dims4()?;
    let h = h.reshape(&[batch, rows / 2, 2, cols / 2, 2, channels][..])?;
    let h = h.permute(vec![0, 1, 3, 4, 2, 5])?.contiguous()?; // [batch, rows, columns, right, below, channels]
    Ok(h.reshape((batch, rows / 2, cols / 2, 4 * channels))?)
}

/// A Swin transformer with its classifier.
#[derive(Debug)]
pub struct Swin {
    config: SwinConfig,
    patches: PatchEmbedding,
    norm: LayerNorm,
    stages: Vec<(Vec<Block>, Option<Merging>)>,
    last_norm: LayerNorm,
    head: Head,
}

impl Swin {
    /// Builds the model over `weights`, under Hugging Face's names.
    pub fn new(config: &SwinConfig, weights: &Weights) -> Result<Self> {
        config.check()?;
        let sizes = config.stages();
        let mut stages = Vec::with_capacity(sizes.len());
        for (s, stage) in sizes.iter().enumerate() {
            let name = format!("swin.encoder.layers.{s}");
            let block = |b| Block::new(weights, config, stage, &format!("{name}.blocks.{b}"), b);
            let blocks = (0..stage.blocks).map(block).collect::<Result<_>>()?;
            let last = s + 1 == sizes.len();
            let merging = (!last).then(|| Merging::new(weights, &format!("{name}.downsample")));
            stages.push((blocks, merging.transpose()?));
        }
        let (size, channels, patch) = (config.image_size, config.channels, config.patch_size);
        Ok(Swin {
            patches: PatchEmbedding::new(weights, PATCHES, size, channels, patch)?,
            norm: LayerNorm::new(weights, "swin.embeddings.norm", EPS)?,
            stages,
            last_norm: LayerNorm::new(weights, "swin.layernorm", config.eps)?,
            head: Head::new(weights, "classifier")?,
            config: config.clone(),
        })
    }

    /// The model's sizes.
    pub fn config(&self) -> &SwinConfig {
        &self.config
    }

    /// Runs the model on `images [batch, channels, height, width]`, normalised. Another image size than
    /// the model's is an error.
    pub fn forward(&self, images: &Tensor) -> Result<VisionOutput> {
        self.walk(images, None, &mut |_, _| Ok(()))
    }

    /// As [`Swin::forward`], in training: residual branches are left out as `drop` draws it.
    pub fn train(&self, images: &Tensor, drop: Option<&DropPath>) -> Result<VisionOutput> {
        self.walk(images, drop, &mut |_, _| Ok(()))
    }

    /// The first stage of the model whose output on `images` is not finite.
    pub fn not_finite(&self, images: &Tensor) -> Result<Option<String>> {
        let mut found = None;
        self.walk(images, None, &mut |stage, h| {
            if found.is_none() && !finite(h)? {
                found = Some(stage.to_string());
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// The names of the taps of a model of these sizes over `weights`.
    pub fn taps(config: &SwinConfig, weights: &Weights) -> Vec<String> {
        let mut names = vec![PatchEmbedding::tap(PATCHES)];
        let stages = config.stages();
        for (s, stage) in stages.iter().enumerate() {
            for b in 0..stage.blocks {
                let block = format!("swin.encoder.layers.{s}.blocks.{b}");
                let place = config.attention(stage, &block);
                names.extend(place.taps(weights.contains(&place.product())));
                names.extend(
                    ["intermediate", "output"].map(|part| format!("{block}.{part}.dense.input_quant")),
                );
            }
            if s + 1 < stages.len() {
                names.push(format!("swin.encoder.layers.{s}.downsample.reduction.input_quant"));
            }
        }
        names.push("classifier.input_quant".into());
        names
    }

    /// The forward pass, each stage's output shown to `see` under the stage's name.
    fn walk(
        &self,
        images: &Tensor,
        drop: Option<&DropPath>,
        see: &mut dyn FnMut(&str, &Tensor) -> Result<()>,
    ) -> Result<VisionOutput> {
        let patches = self.patches.forward(images)?;
        let (batch, _, embed) = patches.dims3()?;
        let (height, width) = self.config.image_size;
        let side = self.config.patch_size;
        let mut h = self.norm.forward(&patches)?.reshape((batch, height / side, width / side, embed))?;
        see("swin.embeddings", &h)?;
        let (mut layer, layers) = (0, self.config.depths.iter().sum());
        for (s, (blocks, merging)) in self.stages.iter().enumerate() {
            for (b, block) in blocks.iter().enumerate() {
                let name = format!("swin.encoder.layers.{s}.blocks.{b}");
                h = block.forward(&h, |x, branch| match drop {
                    None => Ok(x),
                    Some(drop) => drop.apply(&x, layer, layers, branch),
                })?;
                see(&name, &h)?;
                layer += 1;
            }
            if let Some(merging) = merging {
                h = merging.forward(&h)?;
                see(&format!("swin.encoder.layers.{s}.downsample"), &h)?;
            }
        }
        let h = self.last_norm.forward(&h)?;
        see("swin.layernorm", &h)?;
        let class = self.head.forward(&h.flatten(1, 2)?.mean(1)?)?;
        see("the classifier", &class)?;
        Ok(VisionOutput { class, distillation: None, variance: None })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::{Device, Var};

    use super::*;
    use crate::random::Random;

    /// Odd sides at both stages: windows are padded, shifted and masked in the first, clamped and padded
    /// in the second, merging pads too.
    fn config() -> SwinConfig {
        SwinConfig {
            image_size: (10, 14),
            patch_size: 2,
            channels: 2,
            embed: 4,
            depths: vec![2, 1],
            heads: vec![2, 4],
            window: 3,
            mlp_ratio: 1.5,
            eps: 1e-3,
            qkv_bias: true,
            classes: vec!["a".into(), "b".into(), "c".into()],
        }
    }

    fn random(name: &str, shape: &[usize]) -> Tensor {
        let n: usize = shape.iter().product();
        let mut random = Random::new(3, name, &[]);
        let values: Vec<f32> = (0..n).map(|_| 0.7 * random.normal()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// The same model pixel by pixel in plain loops.
    struct Slow(HashMap<String, Vec<f64>>);

    impl Slow {
        fn linear(&self, x: &[f64], name: &str) -> Vec<f64> {
            let rows = self.0[&format!("{name}.weight")].chunks_exact(x.len());
            let y = rows.map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>());
            match self.0.get(&format!("{name}.bias")) {
                Some(bias) => y.zip(bias).map(|(y, b)| y + b).collect(),
                None => y.collect(),
            }
        }

        fn norm(&self, x: &[f64], name: &str, eps: f64) -> Vec<f64> {
            let n = x.len() as f64;
            let mean = x.iter().sum::<f64>() / n;
            let deviation = (x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n + eps).sqrt();
            let scale = self.0[&format!("{name}.weight")].iter().zip(&self.0[&format!("{name}.bias")]);
            x.iter().zip(scale).map(|(v, (w, b))| (v - mean) / deviation * w + b).collect()
        }

        /// Attention of every pixel to those of its window that are its neighbours in the image.
        fn attention(
            &self,
            map: &[Vec<f64>],
            (rows, cols): (usize, usize),
            stage: &Stage,
            shift: usize,
            name: &str,
        ) -> Vec<Vec<f64>> {
            let (w, heads, width) = (stage.window, stage.heads, stage.channels);
            let (down, across) = (rows.next_multiple_of(w), cols.next_multiple_of(w));
            // Where a pixel comes to lie, and whether it was brought around.
            let turned = |at: usize, n: usize| ((at + n - shift) % n, at < shift);
            let of = |part: &str, x: &[f64]| self.linear(x, &format!("{name}.attention.self.{part}"));
            let mut pixels = Vec::new();
            for (r, c) in (0..down).flat_map(|r| (0..across).map(move |c| (r, c))) {
                let zeros = vec![0.0; width];
                let x = if r < rows && c < cols { &map[r * cols + c] } else { &zeros };
                let ((y, over), (x_at, around)) = (turned(r, down), turned(c, across));
                let window = (y / w, x_at / w);
                pixels.push((
                    window,
                    (over, around),
                    (y, x_at),
                    of("query", x),
                    of("key", x),
                    of("value", x),
                ));
            }
            let table = &self.0[&format!("{name}.attention.self.relative_position_bias_table")];
            let d = width / heads;
            let mut out = Vec::new();
            for (r, c) in (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))) {
                let q = &pixels[r * across + c];
                let mut mixed = vec![0.0; width];
                for h in 0..heads {
                    let part = h * d..(h + 1) * d;
                    let near = pixels.iter().filter(|k| k.0 == q.0);
                    let logits = near.clone().map(|k| {
                        let dot: f64 =
                            q.3[part.clone()].iter().zip(&k.4[part.clone()]).map(|(a, b)| a * b).sum();
                        let (dy, dx) = (q.2 .0 + w - 1 - k.2 .0, q.2 .1 + w - 1 - k.2 .1);
                        let bias = table[(dy * (2 * w - 1) + dx) * heads + h];
                        dot / (d as f64).sqrt() + bias + if k.1 == q.1 { 0.0 } else { -100.0 }
                    });
                    let weights: Vec<f64> = logits.map(f64::exp).collect();
                    let sum: f64 = weights.iter().sum();
                    for (k, weight) in near.zip(&weights) {
                        part.clone().for_each(|i| mixed[i] += weight / sum * k.5[i]);
                    }
                }
                out.push(self.linear(&mixed, &format!("{name}.attention.output.dense")));
            }
            out
        }

        fn logits(&self, config: &SwinConfig, image: &[f64]) -> Vec<f64> {
            let ((height, width), p) = (config.image_size, config.patch_size);
            let (mut rows, mut cols) = (height / p, width / p);
            let mut map: Vec<Vec<f64>> = Vec::new();
            for (r, c) in (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))) {
                let mut patch = Vec::new();
                for (channel, y) in (0..config.channels).flat_map(|k| (0..p).map(move |y| (k, y))) {
                    let at = (channel * height + r * p + y) * width + c * p;
                    patch.extend_from_slice(&image[at..at + p]);
                }
                map.push(self.norm(&self.linear(&patch, PATCHES), "swin.embeddings.norm", EPS));
            }
            let stages = config.stages();
            for (s, stage) in stages.iter().enumerate() {
                for b in 0..stage.blocks {
                    let name = format!("swin.encoder.layers.{s}.blocks.{b}");
                    let norm =
                        |x: &Vec<f64>, which: &str| self.norm(x, &format!("{name}.{which}"), config.eps);
                    let normed: Vec<_> = map.iter().map(|x| norm(x, "layernorm_before")).collect();
                    let shift = if b % 2 == 1 { stage.shift } else { 0 };
                    let attended = self.attention(&normed, (rows, cols), stage, shift, &name);
                    for (x, a) in map.iter_mut().zip(attended) {
                        x.iter_mut().zip(a).for_each(|(x, a)| *x += a);
                        let up =
                            self.linear(&norm(x, "layernorm_after"), &format!("{name}.intermediate.dense"));
                        let up: Vec<f64> = up.into_iter().map(gelu).collect();
                        let down = self.linear(&up, &format!("{name}.output.dense"));
                        x.iter_mut().zip(down).for_each(|(x, y)| *x += y);
                    }
                }
                if s + 1 == stages.len() {
                    break;
                }
                let name = format!("swin.encoder.layers.{s}.downsample");
                let mut merged = Vec::new();
                for (r, c) in (0..rows.div_ceil(2)).flat_map(|r| (0..cols.div_ceil(2)).map(move |c| (r, c))) {
                    let mut four = Vec::new();
                    for (y, x) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
                        let (y, x) = (2 * r + y, 2 * c + x);
                        let inside = y < rows && x < cols;
                        four.extend(if inside {
                            map[y * cols + x].clone()
                        } else {
                            vec![0.0; stage.channels]
                        });
                    }
                    let normed = self.norm(&four, &format!("{name}.norm"), EPS);
                    merged.push(self.linear(&normed, &format!("{name}.reduction")));
                }
                (map, rows, cols) = (merged, rows.div_ceil(2), cols.div_ceil(2));
            }
            let mut mean = vec![0.0; map[0].len()];
            for x in &map {
                let x = self.norm(x, "swin.layernorm", config.eps);
                mean.iter_mut().zip(x).for_each(|(m, x)| *m += x / map.len() as f64);
            }
            self.linear(&mean, "classifier")
        }
    }

    /// x Φ(x), erf by its power series.
    fn gelu(x: f64) -> f64 {
        let z = x / 2f64.sqrt();
        let (mut term, mut sum) = (z, z);
        for n in 1..100 {
            term *= -z * z / n as f64;
            sum += term / (2 * n + 1) as f64;
        }
        0.5 * x * (1.0 + 2.0 / std::f64::consts::PI.sqrt() * sum)
    }

    #[test]
    fn logits_are_those_of_plain_loops() {
        let config = config();
        let shifts: Vec<_> = config.stages().iter().map(|s| (s.grid, s.window, s.shift)).collect();
        assert_eq!(shifts, [((5, 7), 3, 1), ((3, 4), 3, 0)]);
        let tensors: Vec<_> = config.shapes().into_iter().map(|(n, s)| (n.clone(), random(&n, &s))).collect();
        let flat = |t: &Tensor| -> Vec<f64> {
            t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f64::from).collect()
        };
        let slow = Slow(tensors.iter().map(|(n, t)| (n.clone(), flat(t))).collect());
        let images = random("images", &[2, 2, 10, 14]);
        let model = Swin::new(&config, &Weights::from_tensors(tensors)).unwrap();
        let got = flat(&model.forward(&images).unwrap().logits().unwrap());
        let want: Vec<f64> =
            flat(&images).chunks(2 * 10 * 14).flat_map(|image| slow.logits(&config, image)).collect();
        let largest = want.iter().fold(0f64, |m, v| m.max(v.abs()));
        assert!(largest > 0.1 && want[0] != want[3], "{want:?}");
        for (g, w) in got.iter().zip(&want) {
            assert!((g - w).abs() < 2e-5 * largest, "{g} {w}");
        }
    }

    #[test]
    fn gradients_reach_every_weight() {
        let config = config();
        let tensors: Vec<_> = config.shapes().into_iter().map(|(n, s)| (n.clone(), random(&n, &s))).collect();
        let weights = Weights::from_tensors(tensors).trainable().unwrap();
        let model = Swin::new(&config, &weights).unwrap();
        let images = Var::from_tensor(&random("images", &[2, 2, 10, 14])).unwrap();
        let logits = model.forward(images.as_tensor()).unwrap().logits().unwrap();
        let grads = logits.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let size = |t: &Tensor| t.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        for param in weights.params() {
            let grad = grads.get(param.var.as_tensor()).unwrap_or_else(|| panic!("none for {}", param.name));
            // A key's bias adds the same to all logits of a query.
            assert!(size(grad) > 1e-4 || param.name.ends_with("key.bias"), "{}: {grad}", param.name);
        }
        assert!(size(grads.get(images.as_tensor()).unwrap()) > 1e-4);
        // Every offset of a table is used somewhere.
        let name = "swin.encoder.layers.0.blocks.1.attention.self.relative_position_bias_table";
        let table = weights.params().into_iter().find(|p| p.name == name).unwrap();
        let grad = grads.get(table.var.as_tensor()).unwrap().abs().unwrap();
        assert!(grad.flatten_all().unwrap().min(0).unwrap().to_scalar::<f32>().unwrap() > 0.0);
    }

    #[test]
    fn what_is_not_finite_is_placed() {
        let config = config();
        let tensors =
            config.shapes().into_iter().map(|(n, s)| match n.contains("layers.0.downsample.norm.b") {
                true => {
                    (n, (Tensor::ones(s, candle_core::DType::F32, &Device::Cpu).unwrap() * f64::NAN).unwrap())
                }
                false => (n.clone(), random(&n, &s)),
            });
        let model = Swin::new(&config, &Weights::from_tensors(tensors.collect::<Vec<_>>())).unwrap();
        let found = model.not_finite(&random("images", &[1, 2, 10, 14])).unwrap();
        assert_eq!(found.as_deref(), Some("swin.encoder.layers.0.downsample"));
    }
}
