//! Times a packed DeiT-Tiny with quantized activations on random weights: `integer_time [bits] [act bits] [qkr]`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{Device, Tensor};
use qtune::models::{Vit, VitConfig};
use qtune::random::Random;
use qtune::transform::{reparameterize, ActQuant, WeightQuant};
use qtune::weights::{Calibration, Weights};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn random(name: &str, shape: &[usize], deviation: f32) -> Tensor {
    let n = shape.iter().product();
    let mut random = Random::new(5, name, &[n as u64]);
    let values: Vec<f32> = (0..n).map(|_| deviation * random.normal()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let bits: u8 = args.get(1).map_or(2, |a| a.parse().unwrap());
    let act_bits: u8 = args.get(2).map_or(2, |a| a.parse().unwrap());
    let qkr = args.iter().any(|a| a == "qkr");
    let config = VitConfig {
        image_size: (224, 224),
        patch_size: 16,
        channels: 3,
        hidden: 192,
        layers: 12,
        heads: 3,
        mlp: 768,
        eps: 1e-6,
        qkv_bias: true,
        distilled: false,
        two_heads: false,
        classes: (0..1000).map(|i| i.to_string()).collect(),
    };
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let fan: usize = shape[1..].iter().product();
        let t = match name.contains("norm") && name.ends_with("weight") {
            true => Tensor::ones(shape.as_slice(), candle_core::DType::F32, &Device::Cpu).unwrap(),
            false => random(&name, &shape, 1.0 / (fan as f32).sqrt()),
        };
        (name, t)
    };
    let mut store = Weights::from_tensors(config.shapes().into_iter().map(tensor)).trainable().unwrap();
    if qkr {
        for place in config.attentions() {
            reparameterize(&mut store, &place.inner, 3, true).unwrap();
        }
    }
    let layers: Vec<_> = store.iter().map(|(n, w)| (n.to_string(), w.clone())).collect();
    for (name, weight) in layers {
        let shape = weight.shape().unwrap();
        if name.contains("encoder.layer") && shape.len() == 2 {
            let rule = WeightQuant::Statsq.training(bits, None, &weight.tensor().unwrap()).unwrap();
            store.wrap(&name, rule).unwrap();
        } else if name.ends_with("projection.weight") || name == "classifier.weight" {
            let rule = WeightQuant::Lsq.training(8, None, &weight.tensor().unwrap()).unwrap();
            store.wrap(&name, rule).unwrap();
        }
    }
    let calibration = Calibration::new(Box::new(move |_, site, x| {
        Ok(Some(Arc::new(ActQuant::start(if site.edge { 8 } else { act_bits }, site, x)?.0)))
    }));
    let images = |n: usize| random("images", &[n, 3, 224, 224], 1.0);
    Vit::new(&config, &store.calibrating(calibration.clone())).unwrap().forward(&images(2)).unwrap();
    for (name, rule) in calibration.rules().unwrap() {
        store.hang(name, rule);
    }
    let vit = Vit::new(&config, &store.packed().unwrap()).unwrap();
    for batch in [1, 8] {
        let x = images(batch);
        let mut row = BTreeMap::new();
        for (name, integers) in [("integer", true), ("tensors", false)] {
            if !integers && args.iter().any(|a| a == "only") {
                continue;
            }
            let run = || match integers {
                true => vit.forward(&x).unwrap(),
                false => vit.train(&x, None).unwrap(),
            };
            run();
            let (begin, mut times) = (Instant::now(), vec![]);
            while begin.elapsed().as_secs_f64() < 0.7 || times.len() < 5 {
                let t = Instant::now();
                run();
                times.push(t.elapsed().as_secs_f64() * 1e3 / batch as f64);
            }
            times.sort_by(f64::total_cmp);
            row.insert(name, (times[times.len() / 2], times[0]));
        }
        println!(
            "W{bits}A{act_bits} qkr {qkr} batch {batch} threads {}: ms an image (median, best) {row:?}",
            rayon::current_num_threads()
        );
    }
}
