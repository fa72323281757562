//! Steps of the optimizers over all tensors at once.

use crate::device::{bits, close, device, flat, values, F32};
use candle_core::{DType, Device, Tensor, Var};
use qtune::kernels::{self, reference, AdamWParams, ClasspParams, GradSum, Moments, Test};
use qtune::optim::adamw::AdamWConfig;
use qtune::optim::classp::{ClasspConfig, ClasspMode};
use qtune::optim::lion::LionConfig;
use qtune::optim::sgd::SgdConfig;
use qtune::optim::{Move, Optimizer, OptimizerConfig};
use qtune::weights::{Param, Role};

/// Lengths on both sides of a chunk, odd ones, one.
const SHAPES: [&[usize]; 7] = [&[1], &[3, 5], &[64, 64], &[4097], &[7], &[90, 101], &[2, 2, 2]];

fn params(device: &Device) -> Vec<Param> {
    let param = |(i, shape): (usize, &&[usize])| Param {
        name: format!("w{i}"),
        var: Var::from_tensor(&values(shape, i as u64).to_device(device).unwrap()).unwrap(),
        role: Role::Plain,
    };
    SHAPES.iter().enumerate().map(param).collect()
}

/// The gradients of step `step`, rounded to `dtype`, on the CPU.
fn grads(step: u64, dtype: DType) -> Vec<Tensor> {
    let grad = |(i, shape): (usize, &&[usize])| {
        let g = (values(shape, 100 * step + i as u64) * 0.1).unwrap();
        g.to_dtype(dtype).unwrap()
    };
    SHAPES.iter().enumerate().map(grad).collect()
}

fn lr(i: usize) -> f64 {
    0.01 * (1 + i % 3) as f64
}

/// Entries of every second tensor that may move.
fn free(i: usize) -> Option<Tensor> {
    let free = values(SHAPES[i], 7).ge(0.0).unwrap().to_dtype(DType::F32).unwrap();
    (i % 2 == 1).then_some(free)
}

/// What a trainer does tensor by tensor: the norm, clipping, `update`, and what is held goes back.
fn by_hand(rule: &mut dyn Optimizer, params: &[Param], grads: &[Tensor], clip: f64, held: bool) -> Vec<f64> {
    let squares: Vec<f64> = grads.iter().map(|g| flat(g).iter().map(|g| g * g).sum()).collect();
    let norm = squares.iter().sum::<f64>().sqrt();
    let scale = if clip > 0.0 && norm > clip { clip / norm } else { 1.0 };
    for (i, (param, grad)) in params.iter().zip(grads).enumerate() {
        let grad = (grad.to_dtype(DType::F32).unwrap() * scale).unwrap();
        let before = param.var.as_tensor().copy().unwrap().detach();
        rule.update(param, &grad, lr(i), i % 2 == 0).unwrap();
        if let Some(free) = free(i).filter(|_| held) {
            let moved = param.var.as_detached_tensor();
            param.var.set(&free.ne(0.0).unwrap().where_cond(&moved, &before).unwrap()).unwrap();
        }
    }
    std::iter::once(norm).chain(squares.into_iter().map(f64::sqrt)).collect()
}

/// The same in one launch; `None` where there is none.
fn at_once(
    rule: &mut dyn Optimizer,
    params: &[Param],
    grads: &[Tensor],
    clip: f64,
    held: bool,
) -> Option<Tensor> {
    let there = |t: &Tensor| t.to_device(params[0].var.device()).unwrap();
    let grads: Vec<Tensor> = grads.iter().map(there).collect();
    let free: Vec<Option<Tensor>> =
        (0..params.len()).map(|i| Some(there(&free(i).filter(|_| held)?))).collect();
    let moves: Vec<Move> = params
        .iter()
        .enumerate()
        .map(|(i, param)| Move {
            param,
            grad: &grads[i],
            lr: lr(i),
            decay: i % 2 == 0,
            free: free[i].as_ref(),
        })
        .collect();
    rule.update_all(&moves, clip).unwrap()
}

/// Elements equal but for the sign of a zero, or within a relative error.
#[track_caller]
fn equal(what: &str, got: &Tensor, want: &Tensor, error: f64) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    for (i, (g, w)) in flat(got).into_iter().zip(flat(want)).enumerate() {
        assert!(
            g == w || (g - w).abs() <= error * (w.abs() + 1e-3),
            "{what}: element {i}: got {g:e}, want {w:e}"
        );
    }
}

#[track_caller]
fn same_rules(what: &str, got: &dyn Optimizer, want: &dyn Optimizer, error: f64) {
    let (got, want) = (got.state().unwrap(), want.state().unwrap());
    assert_eq!(got.len(), want.len(), "{what}");
    for ((name, got), (expected, want)) in got.iter().zip(&want) {
        assert_eq!(name, expected, "{what}");
        assert!(got.device().is_cpu());
        equal(&format!("{name}, {what}"), got, want, error);
    }
}

fn rules() -> Vec<(OptimizerConfig, f64)> {
    let adamw = AdamWConfig { beta2: 0.99, weight_decay: 0.1, ..AdamWConfig::default() };
    let lion = LionConfig { beta2: 0.95, weight_decay: 0.1, ..LionConfig::default() };
    let sgd = SgdConfig { weight_decay: 0.1, ..SgdConfig::default() };
    let plain = SgdConfig { momentum: 0.0, ..sgd.clone() };
    let mut rules = vec![
        (OptimizerConfig::Adamw(adamw), 0.0),
        (OptimizerConfig::Lion(lion), 0.0),
        (OptimizerConfig::Sgd(sgd), 0.0),
        (OptimizerConfig::Sgd(plain), 0.0),
    ];
    // Other powers go through the f64 `pow` of two libraries.
    for (power, error) in [(1.0, 0.0), (2.0, 0.0), (0.5, 0.0), (1.5, 3e-7)] {
        for (mode, threshold, scaling) in [
            (ClasspMode::Paper, 0.0, true),
            (ClasspMode::Paper, 1e-5, true),
            (ClasspMode::Paper, 1e-5, false),
            (ClasspMode::Reference, 0.5, true),
            (ClasspMode::Reference, 1.0, true),
        ] {
            let config = ClasspConfig {
                mode,
                threshold,
                power,
                scaling,
                weight_decay: 0.1,
                ..ClasspConfig::default()
            };
            rules.push((OptimizerConfig::Classp(config), error));
        }
    }
    rules
}

#[test]
fn all_tensors_at_once_are_moved_as_one_by_one() {
    let Some(device) = device() else { return };
    for (config, error) in rules() {
        // All types and ways over the steps of one run.
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let what = format!("{config:?}, {dtype:?}");
            let (here, there) = (params(&Device::Cpu), params(&device));
            let (mut one, mut all) = (config.build(), config.build());
            for (step, clip, held) in [(1, 0.0, false), (2, 0.5, true), (3, 1e9, true), (4, 0.3, false)] {
                let mut g = grads(step, dtype);
                // A tensor without a gradient but 0.
                g[4] = g[4].zeros_like().unwrap();
                let norms = by_hand(one.as_mut(), &here, &g, clip, held);
                let got = at_once(all.as_mut(), &there, &g, clip, held).expect("a launch");
                let norms = Tensor::from_vec(norms, 1 + here.len(), &Device::Cpu).unwrap();
                assert_eq!(got.dtype(), DType::F32);
                close(&format!("norms, {what}"), &got, &norms, 1e-6);
                for (here, there) in here.iter().zip(&there) {
                    let what = format!("{} after step {step}, {what}", here.name);
                    equal(&what, there.var.as_tensor(), here.var.as_tensor(), error);
                }
            }
            same_rules(&what, all.as_ref(), one.as_ref(), error);
            for ((name, got), (expected, want)) in all.figures().into_iter().zip(one.figures()) {
                assert_eq!(name, expected);
                assert!((got - want).abs() <= 1e-6 * (1.0 + want), "{name}: {got}, want {want}, {what}");
            }
        }
    }
}

#[test]
fn what_is_held_stays_to_the_bit() {
    let Some(device) = device() else { return };
    for (config, _) in rules().into_iter().take(6) {
        let there = params(&device);
        // A NaN with a payload, and the sign of a zero.
        let odd = [f32::from_bits(0x7fc0_1234), -0.0, 1e-42, 5.0, 1.0, 2.0, 3.0];
        there[4].var.set(&Tensor::new(&odd, &device).unwrap()).unwrap();
        let nothing = Tensor::zeros(7, DType::F32, &device).unwrap();
        let grad = Tensor::ones(7, DType::F32, &device).unwrap();
        let moves = [Move { param: &there[4], grad: &grad, lr: 0.1, decay: true, free: Some(&nothing) }];
        config.build().update_all(&moves, 0.0).unwrap().expect("a launch");
        let got: Vec<u32> = there[4].var.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect();
        assert_eq!(got, odd.map(f32::to_bits), "{config:?}");
    }
}

#[test]
fn a_gradient_that_is_not_finite_moves_nothing() {
    let Some(device) = device() else { return };
    for (config, error) in rules() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let what = format!("{bad} under {config:?}");
            let (here, there) = (params(&Device::Cpu), params(&device));
            let (mut one, mut all) = (config.build(), config.build());
            for step in 1..=4 {
                let mut g = grads(step, DType::F32);
                if step == 2 {
                    let before: Vec<Vec<u64>> = there.iter().map(|p| bits(p.var.as_tensor())).collect();
                    let mut entries = g[3].to_vec1::<f32>().unwrap();
                    entries[4096] = bad;
                    g[3] = Tensor::from_vec(entries, 4097, &Device::Cpu).unwrap();
                    let norms = flat(&at_once(all.as_mut(), &there, &g, 1.0, false).unwrap());
                    assert!(
                        !norms[0].is_finite() && !norms[4].is_finite() && norms[1].is_finite(),
                        "{norms:?}"
                    );
                    all.left_out(&there);
                    let after: Vec<Vec<u64>> = there.iter().map(|p| bits(p.var.as_tensor())).collect();
                    assert_eq!(before, after, "{what}");
                } else {
                    by_hand(one.as_mut(), &here, &g, 1.0, false);
                    at_once(all.as_mut(), &there, &g, 1.0, false).unwrap();
                }
            }
            // As if that step had never been.
            same_rules(&what, all.as_ref(), one.as_ref(), error);
            for (here, there) in here.iter().zip(&there) {
                equal(&what, there.var.as_tensor(), here.var.as_tensor(), error);
            }
        }
    }
}

#[test]
fn a_norm_beyond_f32_moves_nothing_and_one_of_large_entries_is_found() {
    let Some(device) = device() else { return };
    let config = OptimizerConfig::Sgd(SgdConfig { momentum: 0.0, ..SgdConfig::default() });
    for (size, finite) in [(1e30f32, true), (3e38, false)] {
        let there = params(&device);
        let grad = Tensor::full(size, 7, &device).unwrap();
        let moves = [Move { param: &there[4], grad: &grad, lr: 0.1, decay: false, free: None }];
        let before = bits(there[4].var.as_tensor());
        let norms = config.build().update_all(&moves, 1.0).unwrap().unwrap().to_vec1::<f32>().unwrap();
        let want = f64::from(size) * 7f64.sqrt();
        assert_eq!(norms[0].is_finite(), finite);
        assert!(!finite || (f64::from(norms[0]) / want - 1.0).abs() < 1e-6, "{norms:?}");
        assert_eq!(bits(there[4].var.as_tensor()) != before, finite);
    }
}

#[test]
fn a_state_goes_to_the_other_device_and_back() {
    let Some(device) = device() else { return };
    for (config, error) in rules() {
        let what = format!("{config:?}");
        let (here, there) = (params(&Device::Cpu), params(&device));
        let (mut one, mut all) = (config.build(), config.build());
        for step in 1..=3 {
            let g = grads(step, DType::F32);
            by_hand(one.as_mut(), &here, &g, 0.5, false);
            at_once(all.as_mut(), &there, &g, 0.5, false).unwrap();
            // Each goes on with what the other has.
            let (of_one, of_all) = (one.state().unwrap(), all.state().unwrap());
            let kept: Vec<Vec<u64>> = of_all.iter().map(|(_, t)| bits(t)).collect();
            let restored = |params: &[Param], state: &[(String, Tensor)]| {
                let mut rule = config.build();
                rule.restore(params, &|name| {
                    let found = state.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no {name}"));
                    Ok(found.1.clone())
                })
                .unwrap();
                rule
            };
            (one, all) = (restored(&here, &of_all), restored(&there, &of_one));
            let g = grads(10 + step, DType::F32);
            by_hand(one.as_mut(), &here, &g, 0.0, false);
            at_once(all.as_mut(), &there, &g, 0.0, false).unwrap();
            // What was given out is not what moves.
            assert_eq!(kept, of_all.iter().map(|(_, t)| bits(t)).collect::<Vec<_>>(), "{what}");
        }
        same_rules(&what, all.as_ref(), one.as_ref(), error);
        for (here, there) in here.iter().zip(&there) {
            equal(&what, there.var.as_tensor(), here.var.as_tensor(), error);
        }
    }
}

#[test]
fn one_tensor_alone() {
    let Some(device) = device() else { return };
    for (config, error) in rules() {
        let (here, there) = (params(&Device::Cpu), params(&device));
        let (mut one, mut other) = (config.build(), config.build());
        for step in 1..=3 {
            for (i, g) in grads(step, DType::F32).iter().enumerate() {
                one.update(&here[i], g, lr(i), true).unwrap();
                other.update(&there[i], &g.to_device(&device).unwrap(), lr(i), true).unwrap();
            }
        }
        let what = format!("{config:?}");
        same_rules(&what, other.as_ref(), one.as_ref(), error);
        for (here, there) in here.iter().zip(&there) {
            equal(&what, there.var.as_tensor(), here.var.as_tensor(), error);
        }
        for ((name, got), (_, want)) in other.figures().into_iter().zip(one.figures()) {
            assert!((got - want).abs() <= 1e-6 * (1.0 + want), "{name}: {got}, want {want}, {what}");
        }
    }
}

#[test]
fn a_threshold_is_measured_before_there_is_a_launch() {
    let Some(device) = device() else { return };
    let config = ClasspConfig {
        threshold_quantile: Some(0.5),
        quantile_steps: 2,
        scaling: false,
        ..ClasspConfig::default()
    };
    let config = OptimizerConfig::Classp(config);
    let (here, there) = (params(&Device::Cpu), params(&device));
    let (mut one, mut all) = (config.build(), config.build());
    for step in 1..=4 {
        let g = grads(step, DType::F32);
        by_hand(one.as_mut(), &here, &g, 0.0, false);
        let launched = at_once(all.as_mut(), &there, &g, 0.0, false).is_some();
        assert_eq!(launched, step > 2);
        if !launched {
            for (i, g) in g.iter().enumerate() {
                all.update(&there[i], &g.to_device(&device).unwrap(), lr(i), i % 2 == 0).unwrap();
            }
        }
    }
    same_rules("measured", all.as_ref(), one.as_ref(), 0.0);
    for (here, there) in here.iter().zip(&there) {
        equal("measured", there.var.as_tensor(), here.var.as_tensor(), 0.0);
    }
}

#[test]
fn what_no_launch_takes() {
    let Some(device) = device() else { return };
    for (config, _) in rules().into_iter().take(5) {
        let mut rule = config.build();
        assert!(rule.update_all(&[], 1.0).unwrap().is_none());
        let here = params(&Device::Cpu);
        assert!(at_once(rule.as_mut(), &here, &grads(1, DType::F32), 1.0, false).is_none());
        let there = params(&device);
        let mut mixed = grads(1, DType::F32);
        mixed[2] = mixed[2].to_dtype(DType::BF16).unwrap();
        assert!(at_once(rule.as_mut(), &there, &mixed, 1.0, false).is_none());
        let mut wrong = grads(1, DType::F32);
        wrong[2] = wrong[3].clone();
        assert!(at_once(rule.as_mut(), &there, &wrong, 1.0, false).is_none());
        let twice = [there[0].clone(), there[0].clone()];
        assert!(at_once(rule.as_mut(), &twice, &grads(1, DType::F32)[..2], 1.0, false).is_none());
        let wide = Param {
            name: "wide".into(),
            var: Var::zeros(3, DType::F64, &device).unwrap(),
            role: Role::Plain,
        };
        let grad = Tensor::ones(3, DType::F64, &device).unwrap();
        let moves = [Move { param: &wide, grad: &grad, lr: 0.1, decay: false, free: None }];
        assert!(rule.update_all(&moves, 1.0).unwrap().is_none());
        // f64 goes the ways of candle.
        rule.update(&wide, &grad, 0.1, false).unwrap();
        assert!(wide.var.to_vec1::<f64>().unwrap().iter().all(|w| *w < 0.0), "{config:?}");
        assert!(rule
            .state()
            .unwrap()
            .iter()
            .all(|(name, _)| !name.starts_with('w') || name.starts_with("wide")));
    }
}

#[test]
fn parameters_that_share_memory_are_refused() {
    let Some(device) = device() else { return };
    let first = params(&device).swap_remove(1);
    let twin = Param { name: "twin".into(), ..first.clone() };
    let grad = Tensor::ones(&[3, 5], DType::F32, &device).unwrap();
    let moves = [&first, &twin].map(|param| Move { param, grad: &grad, lr: 0.1, decay: false, free: None });
    for (config, _) in rules().into_iter().take(5) {
        let error = config.build().update_all(&moves, 0.0).unwrap_err().to_string();
        assert!(error.contains("share no memory"), "{error}");
    }
}

#[test]
fn the_steps_of_the_kernels_follow_the_references() {
    let Some(device) = device() else { return };
    for shape in SHAPES {
        let there = |t: Tensor| t.to_device(&device).unwrap();
        let w = Var::from_tensor(&there(values(shape, 1))).unwrap();
        let (mut want, mut m) = (values(shape, 1), values(shape, 1).zeros_like().unwrap());
        let mut v = m.clone();
        let mut moments = Moments::zeros(shape, &device).unwrap();
        let params = AdamWParams { lr: 0.02, weight_decay: 0.1, ..AdamWParams::default() };
        for step in 1..=3 {
            let g = values(shape, 10 + step);
            kernels::adamw_step(&w, &there(g.clone()), &mut moments, step, &params).unwrap();
            (want, m, v) = reference::adamw_step(&want, &g, (&m, &v), step, &params).unwrap();
        }
        close("adamw", &w, &want, F32);
        let (got_m, got_v) = moments.export().unwrap();
        close("m", &got_m, &m, F32);
        close("v", &got_v, &v, F32);
        let again = Moments::import(&got_m, &got_v).unwrap();
        assert_eq!(again.shape().dims(), shape);

        for (power, test, threshold) in [
            (1.0, Test::Entry, 0.25),
            (3.0, Test::Entry, 0.0),
            (2.0, Test::Tensor, 0.5),
            (1.0, Test::Tensor, 1.0),
        ] {
            let w = Var::from_tensor(&there(values(shape, 1))).unwrap();
            let (mut want, mut s) = (values(shape, 1), values(shape, 1).zeros_like().unwrap());
            let mut sum = GradSum::zeros(shape, DType::F32, &device).unwrap();
            let params = ClasspParams { lr: 0.02, threshold, power, test, ..ClasspParams::default() };
            for step in 1..=3 {
                let g = values(shape, 10 + step);
                let passed = kernels::classp_step(&w, &there(g.clone()), &mut sum, &params).unwrap();
                let counted;
                (want, s, counted) = reference::classp_step(&want, &g, &s, &params).unwrap();
                assert_eq!(passed, counted, "{params:?}");
            }
            close("classp", &w, &want, F32);
            close("sum", &sum.export().unwrap(), &s, F32);
            let figures = sum.figures().unwrap();
            let all = flat(&s);
            assert_eq!(figures.touched, all.iter().filter(|&&s| s > 0.0).count());
            let total: f64 = all.iter().sum();
            assert!((figures.total - total).abs() <= F32 * (1.0 + total), "{} {total}", figures.total);
        }
    }
}
