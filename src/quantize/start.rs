//! What a run starts from: data, a model read or made, and the checks that come before any work.

use std::path::Path;

use candle_core::{Device, Tensor};

use super::{targets, teacher, trained};
use crate::data::{Dataset, Preprocess};
use crate::models::import::TrainedQuantizers;
use crate::models::{
    self, import_model, BinaryConfig, ConvConfig, Imported, SwinConfig, VisionConfig, VitConfig, Want,
};
use crate::random::Random;
use crate::recipe::{
    BinarySource, ConvSource, DistillKind, ModelConfig, PhaseConfig, Recipe, SwinSource, VitSource, When,
};
use crate::train::phase_steps;
use crate::weights::{Pickle, Weights};
use crate::{hub, Error, Result};

/// The model that a run starts from.
#[derive(Debug)]
pub struct Start {
    /// Sizes and labels.
    pub config: VisionConfig,
    /// Dense weights.
    pub weights: Weights,
    /// How images become tensors.
    pub preprocess: Preprocess,
    /// The quantizers that it was trained with, where it was.
    pub quantizers: Option<TrainedQuantizers>,
    /// Whether the model, or its classifier, starts from random numbers.
    pub untrained: bool,
    /// What is worth a line.
    pub notes: Vec<String>,
    /// How summary.json calls the model.
    pub name: String,
}

/// The data of a recipe: `None` where a pretrained model is packed without any.
pub fn open_data(recipe: &Recipe) -> Result<Option<Dataset>> {
    if recipe.model.path().is_some() && recipe.data.path.is_none() {
        return Ok(None);
    }
    recipe.data.open(recipe.seed).map(Some)
}

/// Reads or makes the model that a recipe starts from.
pub fn start(recipe: &Recipe, dataset: Option<&Dataset>, device: &Device) -> Result<Start> {
    if let Some(path) = recipe.model.path() {
        return pretrained(recipe, path, dataset, device);
    }
    let dataset = dataset.ok_or_else(|| Error::usage("a new model needs data"))?;
    match &recipe.model {
        ModelConfig::Vit(source) => new_vit(recipe, source, dataset, device),
        ModelConfig::Swin(source) => new_swin(recipe, source, dataset, device),
        ModelConfig::Conv(source) => new_conv(recipe, source, dataset, device),
        ModelConfig::Binary(source) => new_binary(recipe, source, dataset, device),
        ModelConfig::Llama(_) => Err(Error::usage("model.kind = \"llama\": expected a vision transformer")),
    }
}

fn pretrained(recipe: &Recipe, path: &Path, dataset: Option<&Dataset>, device: &Device) -> Result<Start> {
    let dir = models::model_dir(&hub::resolve(&path.to_string_lossy())?);
    let want = Want {
        image_size: recipe.model.image_size().map(|size| (size, size)),
        classes: dataset.map(|d| d.classes.clone()),
        seed: recipe.seed,
        pickle: Pickle::when(recipe.model.allow_pickle()),
    };
    let Imported { config, tensors, quantizers, mut notes, new_head } = import_model(&dir, &want, device)?;
    if quantizers.is_some() {
        notes.push(
            "trained with quantizers, which are laid on as they are; full precision here means its latent weights \
             without them"
                .into(),
        );
    }
    let preprocess = models::preprocess_for(&dir, &config)?;
    let name = path.display().to_string();
    let weights = Weights::from_tensors(tensors);
    Ok(Start { config, weights, preprocess, quantizers, untrained: new_head, notes, name })
}

/// What a new model learns from the first training images: the size on a side that it takes where nobody
/// says otherwise, and their channels.
fn looks(recipe: &Recipe, dataset: &Dataset) -> Result<(usize, usize)> {
    if dataset.train.is_empty() {
        return Err(no_training_images(recipe, dataset));
    }
    let mut looks = Vec::new();
    for index in 0..dataset.train.len().min(32) {
        looks.push(dataset.train.image(index)?);
    }
    let (width, height) = (looks[0].width, looks[0].height);
    let one_size = looks.iter().all(|i| (i.width, i.height) == (width, width));
    let natural = if one_size && height <= 64 { width } else { 64 };
    Ok((natural, looks.iter().map(|i| i.channels).max().unwrap_or(1)))
}

fn new_vit(recipe: &Recipe, source: &VitSource, dataset: &Dataset, device: &Device) -> Result<Start> {
    let (natural, channels) = looks(recipe, dataset)?;
    let size = source.image_size.unwrap_or(natural);
    let (size, patch) = match source.patch_size {
        Some(patch) => (size, patch),
        None => patches(size, 8, 4),
    };
    let config = VitConfig {
        image_size: (size, size),
        patch_size: patch,
        channels,
        hidden: source.hidden,
        layers: source.layers,
        heads: source.heads,
        mlp: source.mlp,
        eps: 1e-6,
        qkv_bias: true,
        distilled: false,
        two_heads: false,
        classes: dataset.classes.clone(),
    };
    config.check()?;
    let note = format!(
        "new ViT: {size} x {size} x {channels} images, patches of {patch}, {} blocks of {} channels, {} heads, {} classes",
        config.layers,
        config.hidden,
        config.heads,
        config.classes.len()
    );
    made(recipe, VisionConfig::Vit(config), note, &initial, device)
}

fn new_swin(recipe: &Recipe, source: &SwinSource, dataset: &Dataset, device: &Device) -> Result<Start> {
    let (natural, channels) = looks(recipe, dataset)?;
    let size = source.image_size.unwrap_or(natural);
    let (size, patch) = match source.patch_size {
        Some(patch) => (size, patch),
        None => patches(size, 16, 2),
    };
    let config = SwinConfig {
        image_size: (size, size),
        patch_size: patch,
        channels,
        embed: source.embed,
        depths: source.depths.clone(),
        heads: source.heads.clone(),
        window: source.window.unwrap_or_else(|| window(size / patch.max(1))),
        mlp_ratio: source.mlp_ratio,
        eps: 1e-5,
        qkv_bias: true,
        classes: dataset.classes.clone(),
    };
    config.check()?;
    let note = format!(
        "new Swin: {size} x {size} x {channels} images, patches of {patch}, {:?} blocks of {} channels and up, {:?} heads, \
         windows of {}, {} classes",
        config.depths,
        config.embed,
        config.heads,
        config.window,
        config.classes.len()
    );
    made(recipe, VisionConfig::Swin(config), note, &initial, device)
}

/// Mean and deviation of the pixels of MNIST, in which the published network sees every image.
const GRAY: (f32, f32) = (0.1307, 0.3081);

fn new_conv(recipe: &Recipe, source: &ConvSource, dataset: &Dataset, device: &Device) -> Result<Start> {
    let (natural, channels) = looks(recipe, dataset)?;
    let size = source.image_size.unwrap_or(natural);
    let config = ConvConfig {
        image_size: (size, size),
        channels,
        widths: source.widths.clone(),
        kernel: source.kernel,
        hidden: source.hidden,
        dropout: source.dropout,
        classes: dataset.classes.clone(),
    };
    config.check()?;
    let note = format!(
        "new convolutional classifier: {size} x {size} x {channels} images, convolutions of {k} x {k} to {:?} channels, \
         {} hidden, {} classes",
        config.widths,
        config.hidden,
        config.classes.len(),
        k = config.kernel
    );
    // A bias is drawn by what its layer reads, which only the weight's shape tells.
    let shapes = config.shapes();
    let inputs = move |name: &str| {
        let weight = name.strip_suffix(".bias").map(|layer| format!("{layer}.weight"));
        let shape = shapes.iter().find(|(n, _)| *n == weight.as_deref().unwrap_or(name));
        shape.map_or(1, |(_, shape)| shape.iter().skip(1).product::<usize>())
    };
    let draw =
        |seed, name: &str, shape: &[usize], device: &Device| uniform(seed, name, shape, inputs(name), device);
    let mut start = made(recipe, VisionConfig::Conv(config), note, &draw, device)?;
    if channels == 1 {
        (start.preprocess.mean, start.preprocess.std) = (vec![GRAY.0], vec![GRAY.1]);
    }
    Ok(start)
}

fn new_binary(recipe: &Recipe, source: &BinarySource, dataset: &Dataset, device: &Device) -> Result<Start> {
    let (natural, channels) = looks(recipe, dataset)?;
    let size = source.image_size.unwrap_or(natural);
    let config = BinaryConfig {
        image_size: (size, size),
        channels,
        hidden: source.hidden.clone(),
        reading: source.reading,
        classes: dataset.classes.clone(),
    };
    config.check()?;
    let note = format!(
        "new perceptron of one-bit weights: {size} x {size} x {channels} images, {:?} hidden units, {} classes",
        config.hidden,
        config.classes.len()
    );
    let sizes = config.clone();
    let draw =
        move |seed, name: &str, shape: &[usize], device: &Device| sizes.fresh(seed, name, shape, device);
    made(recipe, VisionConfig::Binary(config), note, &draw, device)
}

/// How a fresh tensor is drawn: by the seed, its name and its shape.
type Initial<'a> = &'a dyn Fn(u64, &str, &[usize], &Device) -> Result<Tensor>;

/// A model of these sizes from random numbers.
fn made(
    recipe: &Recipe,
    config: VisionConfig,
    note: String,
    initial: Initial<'_>,
    device: &Device,
) -> Result<Start> {
    let mut tensors = Vec::new();
    for (name, shape) in config.shapes() {
        tensors.push((name.clone(), initial(recipe.seed, &name, &shape, device)?));
    }
    Ok(Start {
        preprocess: models::preprocess_of(&config),
        config,
        weights: Weights::from_tensors(tensors),
        quantizers: None,
        untrained: true,
        notes: vec![note],
        name: format!("new {}", recipe.name),
    })
}

/// The patch of a new model, the divisor of the image's size nearest one of so many parts of it and at
/// least `least`; a size without one is brought down to a multiple of `least`.
fn patches(size: usize, parts: usize, least: usize) -> (usize, usize) {
    let wanted = (size / parts).max(least);
    let divisors = (least..=size / 2).filter(|p| size.is_multiple_of(*p));
    match divisors.min_by_key(|p| p.abs_diff(wanted)).filter(|p| *p <= 2 * wanted) {
        Some(patch) => (size, patch),
        None => ((size / least).max(1) * least, least),
    }
}

/// The window of a new Swin over a map of so many patches on a side: the largest of 4 to 8 that cuts it
/// into whole windows, two or more on a side; else 7, for which maps are padded.
fn window(map: usize) -> usize {
    (4..=8).rev().find(|w| map.is_multiple_of(*w) && 2 * w <= map).unwrap_or(7)
}

fn no_training_images(recipe: &Recipe, dataset: &Dataset) -> Error {
    let path = recipe.data.path.clone().unwrap_or_else(|| dataset.name.clone().into());
    Error::input(path, "found images to evaluate on, but none to train on")
}

/// A fresh tensor: norms one, biases zero, tokens, positions and the classifier from a truncated normal of 0.02,
/// other matrices of 0.7 / sqrt(inputs), which keeps a pre-norm block's output near its input's size.
fn initial(seed: u64, name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
    let count: usize = shape.iter().product();
    let norm = shape.len() == 1;
    let values: Vec<f32> = if name.ends_with(".bias") {
        vec![0.0; count]
    } else if norm {
        vec![1.0; count]
    } else {
        let small = name.contains("token") || name.contains("position") || name.contains("classifier");
        let inputs: usize = shape.iter().skip(1).product();
        let std = if small { 0.02 } else { 0.7 / (inputs as f32).sqrt() };
        let mut random = Random::new(seed, &format!("initial:{name}"), &[]);
        (0..count).map(|_| random.truncated_normal(std)).collect()
    };
    Ok(Tensor::from_vec(values, shape, device)?)
}

/// A fresh tensor uniform within 1 / sqrt(inputs) of 0, a layer's weight and bias alike: what PyTorch gives
/// its convolutions and linear layers (He et al. 2015 with a slope of sqrt 5).
fn uniform(seed: u64, name: &str, shape: &[usize], inputs: usize, device: &Device) -> Result<Tensor> {
    let bound = 1.0 / (inputs.max(1) as f32).sqrt();
    let mut random = Random::new(seed, &format!("initial:{name}"), &[]);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.range(-bound, bound)).collect();
    Ok(Tensor::from_vec(values, shape, device)?)
}

/// Opens what a recipe starts from and checks, before any work, what would else fail hours later.
pub(super) fn prepare(
    recipe: &Recipe,
    dataset: Option<Dataset>,
    device: &Device,
) -> Result<(Start, Option<Dataset>)> {
    let start = start(recipe, dataset.as_ref(), device)?;
    let other = match start.config {
        VisionConfig::Conv(_) => Some("a convolutional classifier"),
        VisionConfig::Binary(_) => Some("a perceptron of one-bit weights"),
        VisionConfig::Vit(_) | VisionConfig::Swin(_) => None,
    };
    if let Some(found) = other {
        return Err(Error::usage(format!(
            "{}: found {found}, which is not quantized: expected a vision transformer",
            start.name
        )));
    }
    if dataset.is_none() {
        check_without_data(recipe)?;
    }
    targets(recipe, &start.weights)?;
    let Some(mut dataset) = dataset else {
        if start.untrained {
            return Err(Error::usage(format!("{}: a new classifier needs images: give --data", start.name)));
        }
        trained::check(recipe, &start, false)?;
        return Ok((start, None));
    };
    if !start.untrained {
        dataset = dataset.under_labels(start.config.classes())?;
    }
    let samples = dataset.train.len();
    let runs: Vec<_> = recipe.phase.iter().filter(|p| p.when == When::Always || start.untrained).collect();
    let trains = runs.iter().any(|p| p.steps.unwrap_or(usize::from(p.epochs > 0.0)) > 0);
    if samples == 0 && (trains || recipe.activation.bits != 32) {
        return Err(no_training_images(recipe, &dataset));
    }
    if dataset.eval.is_empty() {
        let path = recipe.data.path.clone().unwrap_or_else(|| dataset.name.clone().into());
        return Err(Error::input(path, "found no images to evaluate on"));
    }
    let steps = |quantize: bool| -> usize {
        let of = runs.iter().filter(|p| p.quantize == quantize);
        of.map(|p| phase_steps(recipe, p, samples)).sum()
    };
    trained::check(recipe, &start, steps(true) > 0)?;
    if recipe.distill.kind != DistillKind::None && steps(true) > 0 {
        if recipe.distill.teacher.is_some() {
            teacher(recipe, Path::new(""), &start, device)?;
        } else if start.untrained && steps(false) == 0 {
            return Err(Error::usage(
                "the teacher would be an untrained model: train a float phase first, name a --teacher, or set \
                 --kd none",
            ));
        }
    }
    Ok((start, Some(dataset)))
}

/// Training, calibration and a new classifier need data.
pub fn check_without_data(recipe: &Recipe) -> Result<()> {
    let idle = |p: &PhaseConfig| p.steps == Some(0) || (p.steps.is_none() && p.epochs == 0.0);
    if recipe.data.eval_path.is_some() {
        return Err(Error::usage("data.eval_path: it needs data.path (--data) beside it"));
    }
    if !recipe.phase.iter().filter(|p| p.quantize || p.when == When::Always).all(idle) {
        return Err(Error::usage("training needs images: give --data PATH, or --steps 0 to pack as it is"));
    }
    if recipe.activation.bits != 32 {
        return Err(Error::usage(format!(
            "activation.bits = {} needs images to calibrate on: give --data PATH",
            recipe.activation.bits
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{patches, window};

    #[test]
    fn patches_divide_the_image() {
        let of = |size| patches(size, 8, 4);
        assert_eq!([28, 32, 64, 48, 8, 12].map(of), [(28, 4), (32, 4), (64, 8), (48, 6), (8, 4), (12, 4)]);
        // 31 is prime, and 58 has no divisor near an eighth.
        assert_eq!([31, 58, 62].map(of), [(28, 4), (56, 4), (60, 4)]);
        assert_eq!(
            [28, 32, 64, 224, 31].map(|size| patches(size, 16, 2)),
            [(28, 2), (32, 2), (64, 4), (224, 14), (30, 2)]
        );
        for (size, least) in (8..=300).flat_map(|size| [(size, 4), (size, 2)]) {
            let (size, patch) = patches(size, 32 / least, least);
            assert!(patch >= least && size % patch == 0 && size / patch >= 2, "{size} {patch}");
        }
    }

    #[test]
    fn windows_cut_the_map_evenly_where_they_can() {
        assert_eq!([14, 16, 56, 8, 10, 15, 13, 4].map(window), [7, 8, 8, 4, 5, 5, 7, 7]);
    }
}
