//! Laws that every transform keeps, whatever it computes, on odd shapes too.

use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use qtune::random::Random;
use qtune::transform::{ActQuant, WeightQuant};
use qtune::weights::{Expr, Granularity, Packed, Shifts, Signedness, Site, Transform, Weight, Weights};

const SHAPES: [(usize, usize); 6] = [(1, 1), (1, 7), (3, 5), (7, 1), (10, 33), (65, 96)];
const KINDS: [WeightQuant; 2] = [WeightQuant::Statsq, WeightQuant::Lsq];
const BITS: [u8; 4] = [2, 3, 4, 8];

/// f32 products of up to 96 terms, summed in another order.
const PRODUCT: f32 = 2e-5;

fn random(name: &str, shape: impl Into<candle_core::Shape>) -> Tensor {
    let shape = shape.into();
    let mut random = Random::new(11, name, &[shape.elem_count() as u64]);
    let values: Vec<f32> = (0..shape.elem_count()).map(|_| random.normal()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn close(a: &Tensor, b: &Tensor, tolerance: f32, what: &str) {
    assert_eq!(a.dims(), b.dims(), "{what}");
    for (x, y) in values(a).iter().zip(values(b)) {
        assert!((x - y).abs() <= tolerance * (1.0 + y.abs()), "{what}: {x} {y}");
    }
}

/// Columns that share a step: all of a row, or some, with and without a rest.
const GROUPS: [Option<usize>; 3] = [None, Some(4), Some(32)];

/// Every weight rule on every shape: trained and untrained, at every width and group.
fn every_rule(mut law: impl FnMut(&str, &Tensor, Arc<dyn Transform>)) {
    for kind in KINDS {
        for bits in BITS {
            for shape in SHAPES {
                let w = random("weight", shape);
                for group in GROUPS {
                    let what = |form: &str| format!("{kind:?} {form} {bits} bits {shape:?} {group:?}");
                    law(&what("trained"), &w, kind.training(bits, group, &w).unwrap());
                    law(&what("untrained"), &w, kind.untrained(bits, group, &w).unwrap());
                }
            }
        }
    }
}

#[test]
fn the_two_readings_agree() {
    every_rule(|what, w, rule| {
        let weight = Weight::latent(w).unwrap().wrap(rule);
        let x = random("x", (2, 3, w.dim(1).unwrap()));
        let dense = x.broadcast_matmul(&weight.tensor().unwrap().t().unwrap()).unwrap();
        close(&weight.matmul(&x).unwrap(), &dense, PRODUCT, what);
        let packed = Weight::from(Expr::Packed(Packed::pack(&weight.quantize().unwrap().unwrap()).unwrap()));
        close(&packed.matmul(&x).unwrap(), &dense, PRODUCT, what);
    });
}

#[test]
fn packing_and_unpacking_is_fake_quantization_bit_for_bit() {
    every_rule(|what, w, rule| {
        let weight = Weight::latent(w).unwrap().wrap(rule);
        let packed = Packed::pack(&weight.quantize().unwrap().unwrap()).unwrap();
        assert_eq!(values(&packed.tensor().unwrap()), values(&weight.tensor().unwrap()), "{what}");
    });
}

#[test]
fn on_given_steps_quantizing_twice_is_quantizing_once() {
    every_rule(|what, w, rule| {
        // StatsQ takes its scale from what it sees, so it is no such rule.
        if rule.kind() != "statsq" {
            let once = rule.apply(std::slice::from_ref(w)).unwrap();
            let twice = rule.apply(std::slice::from_ref(&once)).unwrap();
            assert_eq!(values(&once), values(&twice), "{what}");
        }
    });
}

#[test]
fn a_grid_has_at_most_its_number_of_levels() {
    every_rule(|what, w, rule| {
        let quantized = rule.quantize(std::slice::from_ref(w)).unwrap().unwrap();
        let levels = quantized.grid.levels();
        for code in values(&quantized.codes) {
            assert!(code.fract() == 0.0, "{what}: {code}");
            assert!((levels.lo as f32..=levels.hi as f32).contains(&code), "{what}: {code}");
        }
        assert_eq!(levels.hi - levels.lo + 1, 1 << quantized.grid.bits);
    });
}

#[test]
fn statsq_hands_the_whole_gradient_through_and_lsq_masks_it() {
    for kind in KINDS {
        for shape in SHAPES {
            let w = Var::from_tensor(&random("weight", shape)).unwrap();
            let rule = kind.training(2, None, &w).unwrap();
            let upstream = random("upstream", shape);
            let y = rule.apply(&[w.as_tensor().clone()]).unwrap();
            let grads = (y * &upstream).unwrap().sum_all().unwrap().backward().unwrap();
            let got = values(grads.get(&w).unwrap());
            let quantized = rule.quantize(&[w.as_detached_tensor()]).unwrap().unwrap();
            let step = quantized.step.to_vec1::<f32>().unwrap();
            let masked = |i: usize, w: f32| {
                let v = w / step[i / shape.1];
                kind == WeightQuant::Lsq && !(-2.0..=1.0).contains(&v)
            };
            for (i, ((g, u), w)) in got.iter().zip(values(&upstream)).zip(values(&w)).enumerate() {
                let want = if masked(i, w) { 0.0 } else { u };
                assert_eq!(*g, want, "{kind:?} {shape:?} at {i}");
            }
        }
    }
}

#[test]
fn statsq_levels_of_a_gaussian() {
    // ofq.md 10: shares of the four levels at 2 bits.
    let w = random("gaussian", (1, 1_000_000));
    let rule = WeightQuant::Statsq.training(2, None, &w).unwrap();
    let codes = values(&rule.quantize(&[w]).unwrap().unwrap().codes);
    for (code, share) in [(-2.0, 21.2), (-1.0, 28.8), (0.0, 28.8), (1.0, 21.2)] {
        let got = 100.0 * codes.iter().filter(|c| **c == code).count() as f64 / codes.len() as f64;
        assert!((got - share).abs() < 0.3, "code {code}: {got} %, expected {share}");
    }
}

#[test]
fn folding_changes_nothing_and_leaves_nothing_to_train() {
    let mut store =
        Weights::from_tensors([("a.weight".to_string(), random("a", (5, 9)))]).trainable().unwrap();
    let w = store.get("a.weight").unwrap().tensor().unwrap();
    store.wrap("a.weight", WeightQuant::Lsq.training(3, None, &w).unwrap()).unwrap();
    assert_eq!(
        store.params().iter().map(|p| p.name.as_str()).collect::<Vec<_>>(),
        ["a.weight", "a.weight.scale"]
    );
    let before = values(&store.get("a.weight").unwrap().tensor().unwrap());
    let folded = store.folded().unwrap();
    assert_eq!(values(&folded.get("a.weight").unwrap().tensor().unwrap()), before);
    assert!(folded.params().is_empty() && store.packed().unwrap().params().is_empty());
    // The folded store does not follow what it came from.
    store.params()[0].var.set(&random("b", (5, 9))).unwrap();
    assert_eq!(values(&folded.get("a.weight").unwrap().tensor().unwrap()), before);
    assert_ne!(values(&store.get("a.weight").unwrap().tensor().unwrap()), before);
}

#[test]
fn activation_codes_stand_for_what_training_sees() {
    for granularity in [Granularity::Token, Granularity::Channel, Granularity::Tensor] {
        for signedness in [Signedness::Signed, Signedness::Unsigned, Signedness::Data] {
            for shifts in [Shifts::None, Shifts::In, Shifts::InOut] {
                for bits in BITS {
                    let site = Site { granularity, signedness, shifts, groups: 1, edge: false };
                    let x = random("activation", (2, 5, 7));
                    let (rule, silent) = ActQuant::start(bits, site, &x).unwrap();
                    assert!(!silent);
                    for (suffix, var, _) in rule.params() {
                        if suffix != "scale" {
                            var.set(&(random(suffix, 7) * 0.1).unwrap()).unwrap();
                        }
                    }
                    let y = rule.apply(std::slice::from_ref(&x)).unwrap();
                    let q = rule.quantize(std::slice::from_ref(&x)).unwrap().unwrap();
                    let step = match granularity {
                        Granularity::Token => q.step.reshape((1, 5, 1)).unwrap(),
                        Granularity::Channel => q.step.reshape((1, 1, 7)).unwrap(),
                        Granularity::Tensor => q.step.reshape((1, 1, 1)).unwrap(),
                    };
                    let mut again = q.codes.broadcast_mul(&step).unwrap();
                    if let Some(shift) = rule.shift_out() {
                        again = again.broadcast_add(&shift).unwrap();
                    }
                    assert_eq!(values(&again), values(&y), "{site:?} {bits}");
                }
            }
        }
    }
}

#[test]
fn fitted_activation_steps_leave_less_error_than_those_that_training_starts_from() {
    for granularity in [Granularity::Token, Granularity::Channel, Granularity::Tensor] {
        for signedness in [Signedness::Signed, Signedness::Unsigned] {
            for bits in BITS {
                let site = Site { granularity, signedness, shifts: Shifts::None, groups: 1, edge: false };
                let mut x = random("activation", (4, 9, 50));
                if signedness == Signedness::Unsigned {
                    x = x.abs().unwrap();
                }
                let error = |rule: ActQuant| {
                    let d = (rule.apply(std::slice::from_ref(&x)).unwrap() - &x).unwrap();
                    d.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap()
                };
                let fitted = error(ActQuant::fit(bits, site, &x).unwrap().0);
                let started = error(ActQuant::start(bits, site, &x).unwrap().0);
                assert!(fitted <= started, "{site:?} {bits} bits: {fitted} {started}");
                // A uniform grid over the range leaves a twelfth of a squared step, clipping less.
                let reach = values(&x).iter().fold(0f32, |m, v| m.max(v.abs()));
                let step = reach / ((1u32 << (bits - u8::from(signedness == Signedness::Signed))) - 1) as f32;
                assert!(fitted <= step * step / 6.0, "{site:?} {bits} bits: {fitted}, step {step}");
            }
        }
    }
}

#[test]
fn fitting_lifts_what_an_unsigned_grid_would_cut_off() {
    let site = Site {
        granularity: Granularity::Token,
        signedness: Signedness::Unsigned,
        shifts: Shifts::InOut,
        groups: 1,
        edge: false,
    };
    let x = random("activation", (4, 9, 50));
    let (rule, _) = ActQuant::fit(8, site, &x).unwrap();
    let y = rule.apply(std::slice::from_ref(&x)).unwrap();
    // Half of the values are negative: 8 bits over the range leave less than a hundredth of the largest.
    let reach = values(&x).iter().fold(0f32, |m, v| m.max(v.abs()));
    close(&y, &x, 0.01 * reach, "lifted");
}

#[test]
fn a_token_count_that_differs_is_named_with_both_lengths() {
    let site = Site {
        granularity: Granularity::Token,
        signedness: Signedness::Signed,
        shifts: Shifts::None,
        groups: 1,
        edge: false,
    };
    let (rule, _) = ActQuant::start(4, site, &random("x", (2, 5, 7))).unwrap();
    let error = rule.apply(&[random("x", (2, 6, 7))]).unwrap_err().to_string();
    assert!(error.contains("found 6 tokens") && error.contains("calibrated for 5"), "{error}");
}

#[test]
fn zero_rows_stay_zero_without_nan() {
    for kind in KINDS {
        let w = Var::from_tensor(&Tensor::new(&[[0f32, 0.0, 0.0], [0.3, -0.2, 0.1]], &Device::Cpu).unwrap())
            .unwrap();
        let rule = kind.training(2, None, &w).unwrap();
        let y = rule.apply(&[w.as_tensor().clone()]).unwrap();
        assert!(values(&y).iter().all(|v| v.is_finite()));
        assert_eq!(values(&y)[..3], [0.0, 0.0, 0.0], "{kind:?}");
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert!(values(grads.get(&w).unwrap()).iter().all(|v| v.is_finite()), "{kind:?}");
        let packed = Packed::pack(&rule.quantize(&[w.as_detached_tensor()]).unwrap().unwrap()).unwrap();
        assert_eq!(values(&packed.tensor().unwrap())[..3], [0.0, 0.0, 0.0], "{kind:?}");
    }
}
