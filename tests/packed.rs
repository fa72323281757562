//! The packed reading against the fake-quantized one: logits with float activations, exact integers
//! with quantized ones.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use qtune::models::nn::Linear;
use qtune::models::open_model;
use qtune::quantize;
use qtune::random::Random;
use qtune::recipe::{set, Recipe};
use qtune::train::Quiet;
use qtune::transform::{ActQuant, WeightQuant};
use qtune::weights::{Granularity, Shifts, Signedness, Site, Weight, Weights};

/// Logits of f32 models whose sums run in another order, relative to the largest.
const LOGITS: f32 = 1e-4;

fn random(name: &str, shape: &[usize]) -> Tensor {
    let n = shape.iter().product();
    let mut random = Random::new(21, name, &[n as u64]);
    Tensor::from_vec((0..n).map(|_| random.normal()).collect::<Vec<f32>>(), shape, &Device::Cpu).unwrap()
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn logits_of_a_packed_model_are_those_of_the_fake_quantized_one() {
    for (bits, kind, product) in
        [(2, "statsq", false), (3, "statsq", true), (4, "lsq", false), (8, "lsq", true)]
    {
        let mut table = Recipe::table("glyphs").unwrap();
        for change in [
            "data.glyphs.train=200",
            "data.glyphs.eval=20",
            "model.hidden=32",
            "model.layers=2",
            "phase.0.steps=20",
            "phase.1.steps=10",
            &format!("transform.0.bits={bits}"),
            &format!("transform.0.kind={kind}"),
        ] {
            set(&mut table, change).unwrap();
        }
        if product {
            set(&mut table, "qkr.bias=keep_q").unwrap();
        }
        let recipe = Recipe::resolve(table).unwrap();
        let dir = tempfile::tempdir().unwrap();
        quantize::run(&recipe, dir.path(), &Device::Cpu, &Quiet).unwrap();
        let packed = open_model(&dir.path().join("model"), &Device::Cpu).unwrap();
        // The same model with every packed weight as the dense values it stands for.
        let tensors = packed.weights.iter().map(|(name, w)| (name.to_string(), w.tensor().unwrap()));
        let dense = Weights::from_tensors(tensors.collect::<Vec<_>>());
        let images = random("images", &[4, 1, 28, 28]);
        let logits = |weights: &Weights| {
            values(&packed.config.build(weights).unwrap().forward(&images).unwrap().logits().unwrap())
        };
        let (a, b) = (logits(&packed.weights), logits(&dense));
        let largest = b.iter().fold(0f32, |m, v| m.max(v.abs()));
        assert!(largest > 0.1, "logits too small to tell anything: {largest}");
        for (a, b) in a.iter().zip(&b) {
            assert!((a - b).abs() <= LOGITS * largest, "{bits} bits {kind}: {a} {b}");
        }
    }
}

/// A layer behind a quantized activation, from equal input codes: the sums are whole numbers, each
/// rounded once when the steps are multiplied in.
#[test]
fn layers_on_codes_are_exact_in_integers() {
    let shapes = [(1, 1, 1, 1), (2, 5, 7, 3), (3, 4, 96, 65), (1, 6, 192, 96), (1, 3, 1024, 9)];
    for (batch, tokens, inputs, outputs) in shapes {
        for (bits, act_bits) in [(2, 2), (3, 3), (4, 4), (2, 8), (8, 8)] {
            for kind in [WeightQuant::Statsq, WeightQuant::Lsq] {
                for signedness in [Signedness::Signed, Signedness::Unsigned] {
                    for granularity in [Granularity::Token, Granularity::Tensor] {
                        let site =
                            Site { granularity, signedness, shifts: Shifts::In, groups: 1, edge: false };
                        let x = random("x", &[batch, tokens, inputs]);
                        let w = random("w", &[outputs, inputs]);
                        let mut store = Weights::default();
                        let rule = kind.training(bits, None, &w).unwrap();
                        store.insert("l.weight", Weight::latent(&w).unwrap().wrap(rule));
                        let (quant, _) = ActQuant::start(act_bits, site, &x).unwrap();
                        store.hang("l.in", Arc::new(quant));
                        let weight = store.get("l.weight").unwrap().quantize().unwrap().unwrap();
                        let packed = store.packed().unwrap();
                        let layer = Linear::new(&packed, "l", false).unwrap();
                        let input = packed.tap("l.in", site).forward(&x).unwrap();
                        let got = values(&layer.forward(&input).unwrap());

                        let codes = input.codes().unwrap().unwrap();
                        let (q, k) = (values(&codes.codes), values(&weight.codes));
                        let (x_step, w_step) = (values(&codes.step), values(&weight.step));
                        let half = weight.grid.levels().half;
                        let mut at = 0;
                        for t in 0..batch * tokens {
                            for o in 0..outputs {
                                let sum: i64 = (0..inputs)
                                    .map(|i| {
                                        let k = k[o * inputs + i] as i64;
                                        q[t * inputs + i] as i64 * if half { 2 * k + 1 } else { k }
                                    })
                                    .sum();
                                let unit = w_step[o] * if half { 0.5 } else { 1.0 };
                                let want = sum as f32 * (x_step[t % x_step.len()] * unit);
                                assert_eq!(got[at], want, "W{bits}A{act_bits} {kind:?} {site:?} at {t}, {o}");
                                at += 1;
                            }
                        }
                        assert_eq!(at, got.len());
                    }
                }
            }
        }
    }
}
