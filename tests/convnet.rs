//! What the convolutional classifier promises: it learns, the same to the bit on any number of threads; it
//! is written and opened as any model; and what cannot be done with it is said.

use std::sync::Arc;

use candle_core::Device;
use qtune::data::{Augment, Dataset, Loader, Training};
use qtune::models::open_model;
use qtune::optim::sgd::SgdConfig;
use qtune::optim::OptimizerConfig;
use qtune::quantize::{self, Start};
use qtune::recipe::{DistillKind, Recipe};
use qtune::train::{evaluate, step, Accuracy, Classify, Quiet};
use qtune::weights::Weights;

/// A small network on a few glyphs.
fn recipe() -> Recipe {
    let mut table = Recipe::table("glyphs").unwrap();
    let model = "kind = \"conv\"\nwidths = [6, 8]\nhidden = 24\ndropout = [0.1, 0.2]";
    table.insert("model".into(), toml::Value::Table(toml::from_str(model).unwrap()));
    for change in ["data.glyphs.train=400", "data.glyphs.eval=200"] {
        qtune::recipe::set(&mut table, change).unwrap();
    }
    Recipe::resolve(table).unwrap()
}

fn start(recipe: &Recipe) -> (Start, Dataset) {
    let dataset = recipe.data.open(recipe.seed).unwrap();
    (quantize::start(recipe, Some(&dataset), &Device::Cpu).unwrap(), dataset)
}

/// Trains all weights of `start` on so many epochs of `dataset`.
fn trained(start: &Start, dataset: &Dataset, epochs: u64) -> Weights {
    let weights = start.weights.trainable().unwrap();
    let params = weights.params();
    let model = start.config.build(&weights).unwrap();
    let task = Classify {
        model,
        teacher: None,
        distill: DistillKind::None,
        drop_path: Some((0.0, 5)),
        heads: None,
        recordings: None,
    };
    let config = OptimizerConfig::Sgd(SgdConfig { momentum: 0.9, ..Default::default() });
    let mut optimizer = config.build();
    let mut first = true;
    for epoch in 0..epochs {
        let classes = dataset.classes.len();
        let training = Training { augment: Augment::default(), classes, seed: 0, epoch, done: 0 };
        let order = qtune::data::epoch_order(dataset.train.len(), 1, 0, epoch);
        let preprocess = Arc::new(start.preprocess.clone());
        let train = dataset.train.clone();
        for batch in Loader::new(train, preprocess, order, 20, Some(training), 2, &Device::Cpu) {
            let mut rule = step::Rule {
                optimizer: optimizer.as_mut(),
                config: &config,
                lr: 0.02,
                factors: &[],
                clip: 0.0,
                free: &[],
                first,
            };
            step::take(&task, &[batch.unwrap()], &params, &mut rule, &Device::Cpu).unwrap();
            first = false;
        }
    }
    weights.folded().unwrap()
}

fn measured(start: &Start, weights: &Weights, dataset: &Dataset) -> Accuracy {
    let model = start.config.build(weights).unwrap();
    let preprocess = Arc::new(start.preprocess.clone());
    evaluate(&model, dataset.eval.clone(), preprocess, 64, &Device::Cpu, &Quiet, false).unwrap()
}

/// Every weight, in order.
fn bits(weights: &Weights) -> Vec<u32> {
    let values = |(_, w): (&str, &qtune::weights::Weight)| {
        w.tensor().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    weights.iter().flat_map(values).map(f32::to_bits).collect()
}

#[test]
fn it_learns_and_is_opened_as_it_was_written() {
    let (start, dataset) = start(&recipe());
    assert!(start.notes[0].contains("convolutional classifier"), "{:?}", start.notes);
    let before = measured(&start, &start.weights, &dataset);
    let weights = trained(&start, &dataset, 6);
    let after = measured(&start, &weights, &dataset);
    assert!(after.loss < 0.5 * before.loss, "loss {} then {}", before.loss, after.loss);
    assert!(after.top1 > before.top1 + 30.0, "top-1 {} then {}", before.top1, after.top1);

    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("model");
    quantize::write_model(&dir, &start.config, &start.preprocess, &weights).unwrap();
    let opened = open_model(&dir, &Device::Cpu).unwrap();
    assert_eq!((&opened.config, &opened.preprocess), (&start.config, &start.preprocess));
    assert!(opened.notes.is_empty() && opened.quantization.is_none());
    assert_eq!(bits(&opened.weights), bits(&weights));
    assert_eq!(measured(&start, &opened.weights, &dataset).loss, after.loss);
}

#[test]
fn threads_do_not_change_a_bit() {
    let (start, dataset) = start(&recipe());
    let of = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| bits(&trained(&start, &dataset, 1)))
    };
    let one = of(1);
    assert!(one != bits(&start.weights));
    assert!([2, 5].into_iter().all(|threads| of(threads) == one));
}

#[test]
fn a_trained_one_is_where_a_run_starts_and_quantizing_it_is_refused() {
    let (start, dataset) = start(&recipe());
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("model");
    quantize::write_model(&dir, &start.config, &start.preprocess, &start.weights).unwrap();
    let mut recipe = recipe();
    *recipe.model.path_mut() = Some(dir);
    let again = quantize::start(&recipe, Some(&dataset), &Device::Cpu).unwrap();
    assert!(!again.untrained && again.config == start.config);
    assert_eq!(bits(&again.weights), bits(&start.weights));

    let run = tempfile::tempdir().unwrap();
    let error = quantize::run(&recipe, run.path(), &Device::Cpu, &Quiet).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let said = "found a convolutional classifier, which is not quantized: expected a vision transformer";
    assert!(error.to_string().contains(said), "{error}");
}
