//! The arithmetic of the CUDA kernels against the library's ops: the headers of `kernels/arith` are compiled
//! for the host, where they answer beside `qtune::kernels`. What is the same chain of operations has to come
//! out the same to the bit. Without a C compiler the tests say so and pass.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use candle_core::cpu::erf::erf_f64;
use candle_core::{Device, Tensor, Var};
use qtune::kernels::{self, AdamWParams, ClasspParams, GradSum, Levels, Moments, Test};
use qtune::optim::lion::{Lion, LionConfig};
use qtune::optim::sgd::{Sgd, SgdConfig};
use qtune::optim::{Optimizer, OptimizerConfig};
use qtune::random::Random;
use qtune::train::oscillation::{Track, MOMENTUM};
use qtune::train::step::{self, Rule};
use qtune::weights::{Param, Role};

/// The exponential's polynomial, within 1e-7, and two roundings.
const EXP: f64 = 2e-7;
/// The error function: an ulp, and the exponential's share.
const ERF: f64 = 2e-7;
/// A sigmoid: the exponential, a sum, a quotient and a product.
const SIGMOID: f64 = 4e-7;
/// Powers other than 1, 2 and 1/2: the f64 `pow` of two libraries, which rounded to f32 may differ in the
/// last bit, and the two roundings after it.
const POWER: f64 = 3e-7;

/// The compiled `check.c`.
struct Check(tempfile::TempDir);

impl Check {
    fn compile() -> Option<Check> {
        Check::compiled("check.c")
    }

    /// A program of kernels/arith.
    fn compiled(name: &str) -> Option<Check> {
        let dir = tempfile::tempdir().unwrap();
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let mut cc = Command::new(std::env::var_os("CC").unwrap_or("cc".into()));
        cc.args(["-O2", "-ffp-contract=off", "-I"]).arg(&kernels).arg(kernels.join("arith").join(name));
        cc.arg("-o").arg(dir.path().join("check")).arg("-lm");
        match cc.output() {
            Ok(out) => assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr)),
            Err(e) => {
                println!("skipped: no C compiler ({e})");
                return None;
            }
        }
        Some(Check(dir))
    }

    /// What the function `name` makes of arrays; of one element: for all.
    fn run(&self, name: &str, inputs: &[&[f32]]) -> Vec<Vec<f32>> {
        let mut request = Vec::new();
        let number = |bytes: &mut Vec<u8>, n: usize| bytes.extend((n as u32).to_le_bytes());
        number(&mut request, name.len());
        request.extend(name.as_bytes());
        number(&mut request, inputs.len());
        for input in inputs {
            number(&mut request, input.len());
            request.extend(input.iter().flat_map(|x| x.to_le_bytes()));
        }
        let mut command = Command::new(self.0.path().join("check"));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // It reads a whole request before it writes: neither waits for the other.
        child.stdin.take().unwrap().write_all(&request).unwrap();
        let out = child.wait_with_output().unwrap();
        assert!(out.status.success(), "{name}: {}", out.status);
        let mut words = out.stdout.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap()));
        let arrays = words.next().unwrap();
        let reply = (0..arrays)
            .map(|_| {
                let length = words.next().unwrap();
                (0..length).map(|_| f32::from_bits(words.next().unwrap())).collect()
            })
            .collect();
        assert_eq!(words.next(), None, "{name}: more than was asked for");
        reply
    }

    /// Its single result.
    fn one(&self, name: &str, inputs: &[&[f32]]) -> Vec<f32> {
        self.run(name, inputs).remove(0)
    }
}

/// Zeros, ties, the ends of f32 and what lies beyond them.
const EDGES: [f32; 30] = [
    0.0,
    -0.0,
    0.5,
    -0.5,
    1.0,
    -1.0,
    1.5,
    -1.5,
    2.5,
    -2.5,
    3.5,
    -3.5,
    127.5,
    -128.5,
    0.927_734_4,
    -4.0,
    f32::MIN_POSITIVE,
    -f32::MIN_POSITIVE,
    1e-39,
    -1e-45,
    1e-5,
    9.999_999e-6,
    -87.0,
    -87.5,
    1e30,
    f32::MAX,
    f32::MIN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
];

/// Normal numbers of many magnitudes, multiples of 1/16 and edges.
fn floats(name: &str) -> Vec<f32> {
    let mut random = Random::new(7, name, &[]);
    let mut all: Vec<f32> = (0..4000).map(|_| 2.0 * random.normal()).collect();
    all.extend((0..2000).map(|_| random.normal() * random.range(-40.0, 40.0).exp2()));
    all.extend((0..2000).map(|_| (16.0 * random.normal()).round() / 16.0));
    // Each edge beside others than in another list.
    for i in 0..8 * EDGES.len() {
        all.push(EDGES[(i * (1 + name.len() % 7) + i / EDGES.len()) % EDGES.len()]);
    }
    all
}

fn finite(name: &str) -> Vec<f32> {
    floats(name).into_iter().map(|x| if x.abs() < 1e12 { x } else { 1.0 }).collect()
}

fn tensor(x: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_slice(x, shape, &Device::Cpu).unwrap()
}

fn var(x: &[f32], shape: &[usize]) -> Var {
    Var::from_tensor(&tensor(x, shape)).unwrap()
}

fn list(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// The gradients of the sum of `g * y` for each of `vars`.
fn grads(y: &Tensor, g: &Tensor, vars: &[&Var]) -> Vec<Vec<f32>> {
    let grads = (y * g).unwrap().sum_all().unwrap().backward().unwrap();
    vars.iter().map(|v| list(grads.get(v.as_tensor()).unwrap())).collect()
}

#[track_caller]
fn compare(what: &str, got: &[f32], want: &[f32], agree: impl Fn(f32, f32) -> bool) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let fine = got.is_nan() && want.is_nan() || agree(got, want);
        assert!(fine, "{what}, entry {i}: the header gives {got:e}, the library {want:e}");
    }
}

/// To the bit, a NaN being a NaN.
#[track_caller]
fn same(what: &str, got: &[f32], want: &[f32]) {
    compare(what, got, want, |got, want| got.to_bits() == want.to_bits());
}

/// To the bit but for the sign of a zero: candle adds gradients, and what its `affine` gives, to zeros.
#[track_caller]
fn same_sums(what: &str, got: &[f32], want: &[f32]) {
    compare(what, got, want, |got, want| got == want);
}

/// Within a relative error.
#[track_caller]
fn near(what: &str, got: &[f32], want: &[f64], error: f64) {
    let wants: Vec<f32> = want.iter().map(|&w| w as f32).collect();
    compare(what, got, &wants, |got, want| {
        got == want || f64::from((got - want).abs()) <= error * f64::from(want.abs())
    });
}

#[test]
fn functions() {
    let Some(check) = Check::compile() else { return };
    let mut random = Random::new(7, "functions", &[]);
    let mut list_of = |name| {
        // Many where the functions bend: an error in a late coefficient shows in one result of thousands.
        floats(name).into_iter().chain((0..40_000).map(|_| random.range(-5.0, 5.0))).collect::<Vec<f32>>()
    };
    let (x, u, g) = (list_of("x"), list_of("of"), list_of("gradient"));
    let shape = [x.len()];

    let negative: Vec<f32> = x.iter().map(|x| -x.abs()).collect();
    let want: Vec<f64> = negative.iter().map(|&x| if x < -87.0 { 0.0 } else { f64::from(x).exp() }).collect();
    near("exp_nonpos", &check.one("exp_nonpos", &[&negative]), &want, EXP);
    let want: Vec<f64> = x.iter().map(|&x| erf_f64(f64::from(x))).collect();
    near("error_function", &check.one("error_function", &[&x]), &want, ERF);
    // Far below zero the share is a difference of ones: an error relative to 1.
    let share = check.one("normal_share", &[&x]);
    let above = |x: &f32| 1.5 + 0.5 * erf_f64(f64::from(*x) * std::f64::consts::FRAC_1_SQRT_2);
    let lifted: Vec<f32> = share.iter().map(|s| 1.0 + s).collect();
    near("normal_share", &lifted, &x.iter().map(above).collect::<Vec<_>>(), ERF);
    let moderate: Vec<f32> = x.iter().copied().filter(|x| x.is_nan() || x.abs() < 80.0).collect();
    let want: Vec<f64> = moderate.iter().map(|&x| 1.0 / (1.0 + (-f64::from(x)).exp())).collect();
    near("sigmoid", &check.one("sigmoid", &[&moderate]), &want, SIGMOID);

    let leaf = var(&x, &shape);
    let y = kernels::gelu(leaf.as_tensor()).unwrap();
    same("gelu", &check.one("gelu", &[&x]), &list(&y));
    let want = grads(&y, &tensor(&g, &shape), &[&leaf]).remove(0);
    same_sums("gelu_grad", &check.one("gelu_grad", &[&x, &g]), &want);

    let ones = vec![1f32; x.len()];
    let y = kernels::swiglu(leaf.as_tensor(), &tensor(&ones, &shape)).unwrap();
    same("silu", &check.one("silu", &[&x]), &list(&y));
    let up = var(&u, &shape);
    let y = kernels::swiglu(leaf.as_tensor(), up.as_tensor()).unwrap();
    same("swiglu", &check.one("swiglu", &[&x, &u]), &list(&y));
    let (got, want) =
        (check.run("swiglu_grad", &[&x, &u, &g]), grads(&y, &tensor(&g, &shape), &[&leaf, &up]));
    same_sums("swiglu_grad_gate", &got[0], &want[0]);
    same_sums("swiglu_grad_up", &got[1], &want[1]);
}

/// A number for each row as one for each entry.
fn spread(of_rows: &[f32], width: usize) -> Vec<f32> {
    of_rows.iter().flat_map(|&x| std::iter::repeat_n(x, width)).collect()
}

/// Rows of `width`: of numbers, of ties, of borders, of zeros, tiny, huge, and one with a NaN and one with an
/// infinity.
fn rows(width: usize) -> Vec<f32> {
    let mut random = Random::new(7, "rows", &[width as u64]);
    let mut all = Vec::new();
    for row in 0..40 {
        let size = random.range(-30.0, 30.0).exp2();
        all.extend((0..width).map(|_| match row % 4 {
            0 => random.normal(),
            1 => size * random.normal(),
            // Of a few levels, so that many lie on thresholds and on the clip.
            2 => (4.0 * random.normal()).round() / 4.0,
            _ => [0.5, -0.5, 1.0, -1.0][random.below(4) as usize],
        }));
        // Two by two of mean size 1/2: the scale is 1, and multiples of 1/16 lie on borders of bands.
        let halves: Vec<f32> = (0..width).map(|_| random.below(17) as f32 / 16.0).collect();
        all.extend((0..width).map(|i| match i % 2 {
            0 if i + 1 == width => 0.5,
            0 => halves[i] * if i % 4 == 0 { 1.0 } else { -1.0 },
            _ => 1.0 - halves[i - 1],
        }));
    }
    all.extend((0..width).map(|i| if i % 2 == 0 { 0.0 } else { -0.0 }));
    all.extend((0..width).map(|i| if i % 3 == 0 { 1e-39 } else { -3e-39 }));
    all.extend((0..width).map(|i| if i % 3 == 0 { 3e-38 } else { -2e-38 }));
    all.extend((0..width).map(|i| if i == width / 2 { f32::NAN } else { 1.0 }));
    all.extend((0..width).map(|i| if i == width / 2 { f32::NEG_INFINITY } else { 1.0 }));
    all.extend((0..width).map(|i| if i == 0 { f32::MAX } else { -1.0 }));
    all
}

#[test]
fn weights_on_the_grid_of_their_statistics() {
    let Some(check) = Check::compile() else { return };
    for width in [1, 7, 64, 193] {
        let w = rows(width);
        let shape = [w.len() / width, width];
        let t = tensor(&w, &shape);
        let scale = list(&kernels::statsq_scale(&t).unwrap());
        let got = check.one("statsq_scale", &[&w, &[width as f32]]);
        // The f64 sum runs in another order: its roundings may lie on the border between two f32.
        compare("statsq_scale", &got, &scale, |got, want| got.to_bits().abs_diff(want.to_bits()) <= 1);
        let per_entry = spread(&scale, width);
        let mut random = Random::new(7, "gradient", &[width as u64]);
        let mut g: Vec<f32> = w.iter().map(|_| random.normal()).collect();
        for (i, g) in g.iter_mut().enumerate().filter(|(i, _)| i % 11 == 0) {
            *g = EDGES[i / 11 % EDGES.len()];
        }
        for bits in [1u8, 2, 3, 4, 8] {
            let (n, what) = (f32::from(1u16 << (bits - 1)), format!("{bits} bits, width {width}"));
            let (lo, hi) = ([-n], [n - 1.0]);
            let step = check.one("statsq_step", &[&scale, &[n]]);
            same(&what, &step, &scale.iter().map(|s| s / n).collect::<Vec<_>>());
            let step = spread(&step, width);
            let codes = check.one("grid_code", &[&w, &step, &[0.5], &lo, &hi]);
            same(&format!("codes, {what}"), &codes, &list(&kernels::statsq_codes(&t, bits).unwrap()));
            let want = list(&kernels::statsq(&t, bits).unwrap());
            same(&what, &check.one("grid_round", &[&w, &step, &[0.5], &lo, &hi]), &want);
            same(&what, &check.one("grid_value", &[&codes, &step, &[0.5]]), &want);
            for band in [0.005f64, 0.1, 0.25, 0.4] {
                let what = format!("band {band}, {what}");
                let inputs: [&[f32]; 4] = [&w, &per_entry, &[n], &[band as f32]];
                let want = list(&kernels::statsq_free(&t, bits, band).unwrap());
                same(&format!("free, {what}"), &check.one("statsq_free", &inputs), &want);
                let leaf = var(&w, &shape);
                let y = kernels::statsq_annealed(leaf.as_tensor(), bits, band).unwrap();
                let want = grads(&y, &tensor(&g, &shape), &[&leaf]).remove(0);
                let [w, scale, n, band] = inputs;
                let got = check.one("statsq_grad", &[w, scale, n, band, &g]);
                same_sums(&format!("gradient, {what}"), &got, &want);
            }
        }
    }
}

#[test]
fn codes_and_values_on_given_steps() {
    let Some(check) = Check::compile() else { return };
    let w = floats("w");
    let mut random = Random::new(7, "steps", &[]);
    let steps = [0.0, -0.0, -1.0, 1e-39, f32::MIN_POSITIVE, 0.25, 1.0, 0.1, 3e7, f32::INFINITY, f32::NAN];
    let step: Vec<f32> =
        w.iter().map(|_| if random.below(2) == 0 { 0.5 } else { steps[random.below(11) as usize] }).collect();
    let shape = [w.len(), 1];
    let grids = [2u8, 3, 8].map(Levels::signed).into_iter().chain([1, 2, 8].map(Levels::unsigned));
    for levels in grids.chain([1, 2, 4, 8].map(Levels::mid_rise)) {
        let what = format!("{levels:?}");
        let (lo, hi) = ([levels.lo as f32], [levels.hi as f32]);
        let offset = [if levels.half { 0.5 } else { 0.0 }];
        let (t, s) = (tensor(&w, &shape), tensor(&step, &shape[..1]));
        let want = kernels::quantize(&t, &s, levels).unwrap();
        let codes = check.one("grid_code", &[&w, &step, &offset, &lo, &hi]);
        same(&format!("codes, {what}"), &codes, &list(&want));
        let want = list(&kernels::dequantize(&want, &s, levels).unwrap());
        same(&what, &check.one("grid_value", &[&codes, &step, &offset]), &want);
        same(&what, &check.one("grid_round", &[&w, &step, &offset, &lo, &hi]), &want);
        // On a step of one and without an offset a code is the nearest itself.
        if !levels.half {
            let ones = vec![1f32; w.len()];
            let want = list(&kernels::quantize(&t, &tensor(&ones, &shape[..1]), levels).unwrap());
            same(&what, &check.one("nearest_code", &[&w, &lo, &hi]), &want);
        }
    }
}

#[test]
fn activations_on_learned_steps() {
    let Some(check) = Check::compile() else { return };
    let (x, g) = (floats("activation"), floats("gradient"));
    let mut random = Random::new(7, "scales", &[]);
    let scales = [1e-5, 9.999_999e-6, 1e-7, 0.0, -0.3, 0.5, 1.0, 0.1, 1e20, f32::INFINITY, f32::NAN];
    let s: Vec<f32> = x
        .iter()
        .map(|_| if random.below(2) == 0 { 0.25 } else { scales[random.below(11) as usize] })
        .collect();
    // A row of one element, so that each has a scale of its own and the sums are of one term.
    let shape = [x.len(), 1];
    for levels in [2u8, 3, 4, 8].map(Levels::signed).into_iter().chain([1, 2, 8].map(Levels::unsigned)) {
        let (lo, hi) = ([levels.lo as f32], [levels.hi as f32]);
        for (before, behind) in [(0.0f32, 0.125f32), (0.5, -1.0), (-0.3, 0.7)] {
            let what = format!("{levels:?}, shifts {before} and {behind}");
            let leaves = (var(&x, &shape), var(&s, &shape[..1]), var(&[before], &[1]), var(&[behind], &[1]));
            let (x_leaf, s_leaf) = (leaves.0.as_tensor(), leaves.1.as_tensor());
            let shift = Some(leaves.2.as_tensor());
            let inputs: [&[f32]; 5] = [&x, &[before], &s, &lo, &hi];
            let want = kernels::lsq_codes(x_leaf, s_leaf, shift, levels, Some(0)).unwrap();
            same(&format!("codes, {what}"), &check.one("lsq_code", &inputs), &list(&want));
            let y = kernels::lsq(x_leaf, s_leaf, shift, levels, Some(0)).unwrap();
            same(&what, &check.one("lsq_value", &inputs), &list(&y));
            if before == 0.0 {
                let y = kernels::lsq(x_leaf, s_leaf, None, levels, Some(0)).unwrap();
                same(&format!("{what}, without"), &check.one("lsq_value", &inputs), &list(&y));
            }
            let [x, shift_in, s, lo, hi] = inputs;
            let shifts = (shift, Some(leaves.3.as_tensor()));
            let shifted = kernels::lsq_shifted(x_leaf, s_leaf, shifts, levels, (Some(0), 1)).unwrap();
            let got = check.one("lsq_value_shifted", &[x, shift_in, s, lo, hi, &[behind]]);
            same(&format!("shifted, {what}"), &got, &list(&shifted));

            let got = check.run("lsq_grad", &[x, shift_in, s, lo, hi, &g]);
            let want = grads(&y, &tensor(&g, &shape), &[&leaves.0, &leaves.1]);
            same_sums(&format!("dx, {what}"), &got[0], &want[0]);
            let factor = 1.0 / f64::from(levels.hi).sqrt();
            let ds: Vec<f32> = got[1].iter().map(|&share| (f64::from(share) * factor) as f32).collect();
            same_sums(&format!("ds, {what}"), &ds, &want[1]);
        }
    }
}

fn param(var: &Var) -> Param {
    Param { name: "w".into(), var: var.clone(), role: Role::Plain }
}

#[test]
fn adamw() {
    let Some(check) = Check::compile() else { return };
    let (p, g, m) = (floats("p"), floats("gradient"), floats("moment"));
    let v: Vec<f32> = floats("another").into_iter().map(f32::abs).collect();
    let shape = [p.len()];
    let settings = AdamWParams { lr: 0.02, beta1: 0.9, beta2: 0.99, eps: 1e-6, weight_decay: 0.1 };
    for (step, settings) in [(1, settings), (7, settings), (100_000, AdamWParams::default())] {
        let AdamWParams { lr, beta1, beta2, eps, weight_decay } = settings;
        let left = |beta: f64| 1.0 - beta.powf(step as f64);
        let factors = [
            beta1,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            lr / left(beta1),
            1.0 / left(beta2),
            eps,
            1.0 - lr * weight_decay,
        ]
        .map(|f| [f as f32]);
        let mut inputs: Vec<&[f32]> = vec![&p, &g, &m, &v];
        inputs.extend(factors.iter().map(|f| f.as_slice()));
        let got = check.run("adamw", &inputs);

        let weight = var(&p, &shape);
        let mut moments = Moments::import(&tensor(&m, &shape), &tensor(&v, &shape)).unwrap();
        kernels::adamw_step(weight.as_tensor(), &tensor(&g, &shape), &mut moments, step, &settings).unwrap();
        let (m1, v1) = moments.export().unwrap();
        same("first moment", &got[1], &list(&m1));
        same("second moment", &got[2], &list(&v1));
        same("weight", &got[0], &list(weight.as_tensor()));
    }
}

#[test]
fn classp() {
    let Some(check) = Check::compile() else { return };
    let (w, g) = (floats("w"), floats("gradient"));
    let sum: Vec<f32> = floats("sum").into_iter().map(f32::abs).collect();
    let shape = [w.len()];
    // The powers and what the kernels call them.
    for (power, called) in [(1.0, 0.0f32), (2.0, 1.0), (0.5, 2.0), (1.5, 3.0), (3.0, 3.0)] {
        for threshold in [0.0, 0.25] {
            for (scaling, weight_decay) in [(true, 0.0), (true, 0.1), (false, 0.1)] {
                for test in [Test::Entry, Test::Tensor] {
                    let settings = ClasspParams {
                        lr: 0.02,
                        threshold,
                        epsilon: 1e-5,
                        power,
                        scaling,
                        weight_decay,
                        test,
                    };
                    let tested = match test {
                        Test::Entry if threshold == 0.0 => 1.0,
                        Test::Entry => 2.0,
                        Test::Tensor => 0.0f32,
                    };
                    let flags = [called, tested, f32::from(test == Test::Tensor), f32::from(scaling)];
                    let factors = [0.02, threshold, 1e-5, weight_decay, power].map(|f| f as f32);
                    let factors: Vec<[f32; 1]> = factors.into_iter().chain(flags).map(|f| [f]).collect();
                    let mut inputs: Vec<&[f32]> = vec![&w, &g, &sum];
                    inputs.extend(factors.iter().map(|f| f.as_slice()));
                    let got = check.run("classp", &inputs);

                    let weight = var(&w, &shape);
                    let mut state = GradSum::import(&tensor(&sum, &shape)).unwrap();
                    let grad = tensor(&g, &shape);
                    let passed =
                        kernels::classp_step(weight.as_tensor(), &grad, &mut state, &settings).unwrap();
                    let what = format!("{settings:?}");
                    assert_eq!(got[2].iter().filter(|&&p| p == 1.0).count(), passed, "{what}");
                    let (want_w, want_s) = (list(weight.as_tensor()), list(&state.export().unwrap()));
                    if called < 3.0 {
                        same(&format!("sum, {what}"), &got[1], &want_s);
                        same(&format!("weight, {what}"), &got[0], &want_w);
                    } else {
                        let double = |x: Vec<f32>| x.into_iter().map(f64::from).collect::<Vec<_>>();
                        near(&format!("sum, {what}"), &got[1], &double(want_s), POWER);
                        // The step carries the error; beside what it leaves of a weight that may be large.
                        let step = |after: &[f32]| -> Vec<f32> {
                            after.iter().zip(&w).map(|(after, before)| after - before).collect()
                        };
                        let (got, want) = (step(&got[0]), step(&want_w));
                        for ((got, want), w) in got.iter().zip(&want).zip(&w) {
                            let fine = got.is_nan() && want.is_nan()
                                || got == want
                                || f64::from((got - want).abs()) <= POWER * f64::from(want.abs() + w.abs());
                            assert!(fine, "step of {w:e}: header {got:e}, library {want:e}, {what}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn lion_and_what_annealing_holds() {
    let Some(check) = Check::compile() else { return };
    let (w, g, h) = (floats("w"), floats("gradient"), floats("later"));
    let shape = [w.len(), 1];
    let config = LionConfig { beta1: 0.9, beta2: 0.95, weight_decay: 0.1, ..LionConfig::default() };
    let lr = 0.03;
    let factors = [config.beta1, 1.0 - config.beta1, config.beta2, 1.0 - config.beta2, lr];
    let with_decay = |keep: f64| factors.into_iter().chain([keep]).map(|f| [f as f32]).collect::<Vec<_>>();
    let lion = |w: &[f32], g: &[f32], m: &[f32], decay: bool| {
        let factors = with_decay(if decay { 1.0 - lr * config.weight_decay } else { 1.0 });
        let mut inputs: Vec<&[f32]> = vec![w, g, m];
        inputs.extend(factors.iter().map(|f| f.as_slice()));
        let [w, m]: [Vec<f32>; 2] = check.run("lion", &inputs).try_into().unwrap();
        (w, m)
    };
    for decay in [false, true] {
        let weight = var(&w, &shape);
        let (mut rule, mut at, mut m) = (Lion::new(config.clone()), w.clone(), vec![0f32; w.len()]);
        for g in [&g, &h, &g] {
            rule.update(&param(&weight), &tensor(g, &shape), lr, decay).unwrap();
            (at, m) = lion(&at, g, &m, decay);
            same_sums("momentum", &m, &list(&rule.state().unwrap()[0].1));
            same_sums("weight", &at, &list(weight.as_tensor()));
        }
    }

    // A whole step: clipped, decayed, and held where nothing is free.
    let (w, g) = (finite("w"), finite("gradient"));
    let free: Vec<f32> = (0..w.len()).map(|i| if i % 3 == 0 { 0.0 } else { 1.0 }).collect();
    let (weight, clip) = (var(&w, &shape), 0.5);
    let mut optimizer = Lion::new(config.clone());
    let mut rule = Rule {
        optimizer: &mut optimizer,
        config: &OptimizerConfig::Lion(config.clone()),
        lr,
        factors: &[],
        clip,
        free: &[Some(tensor(&free, &shape))],
        first: false,
    };
    let moved = step::update(&[param(&weight)], &[Some(tensor(&g, &shape))], &mut rule).unwrap();
    let norm = moved.norm.read().unwrap();
    assert!(norm > clip, "{norm}");
    let scale = (clip / norm) as f32;
    let clipped: Vec<f32> = g.iter().map(|g| g * scale).collect();
    let (moved, _) = lion(&w, &clipped, &vec![0.0; w.len()], true);
    let got = check.one("held_or", &[&free, &moved, &w]);
    same_sums("weight", &got, &list(weight.as_tensor()));
    for (i, (got, w)) in got.iter().zip(&w).enumerate().filter(|(i, _)| i % 3 == 0) {
        assert_eq!(got.to_bits(), w.to_bits(), "entry {i} is held");
    }
}

#[test]
fn sgd_and_what_clips() {
    let Some(check) = Check::compile() else { return };
    let (w, g, h) = (floats("w"), floats("gradient"), floats("later"));
    let shape = [w.len(), 1];
    let config = SgdConfig { momentum: 0.9, weight_decay: 0.1, ..SgdConfig::default() };
    let lr = 0.03;
    for decay in [false, true] {
        let factors = [config.momentum, lr, if decay { 1.0 - lr * config.weight_decay } else { 1.0 }];
        let factors = factors.map(|f| [f as f32]);
        let weight = var(&w, &shape);
        let (mut rule, mut at, mut v) = (Sgd::new(config.clone()), w.clone(), vec![0f32; w.len()]);
        for g in [&g, &h, &g] {
            rule.update(&param(&weight), &tensor(g, &shape), lr, decay).unwrap();
            let [momentum, lr, keep] = &factors;
            [at, v] = check.run("sgd", &[&at, g, &v, momentum, lr, keep]).try_into().unwrap();
            same_sums("velocity", &v, &list(&rule.state().unwrap()[0].1));
            same_sums("weight", &at, &list(weight.as_tensor()));
        }
    }

    let norms = [0.0, 0.25, 0.5, 0.7, 3e38, f32::INFINITY, f32::NAN];
    for clip in [0.0f32, 0.5, -1.0] {
        let want = norms.map(|norm| match norm {
            norm if !norm.is_finite() => f32::NAN,
            norm if clip > 0.0 && norm > clip => (f64::from(clip) / f64::from(norm)) as f32,
            _ => 1.0,
        });
        same(&format!("scale of clip {clip}"), &check.one("clip_scale", &[&norms, &[clip]]), &want);
    }
}

/// What the headers of packed weights, of rows, of random draws and of attention say of themselves.
#[test]
fn headers_that_check_themselves() {
    for name in ["check_packed.c", "check_rows.c"] {
        let Some(check) = Check::compiled(name) else { return };
        let out = Command::new(check.0.path().join("check")).output().unwrap();
        let said = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success() && !said.is_empty(), "{name}: {said}");
    }
}

#[test]
fn oscillation() {
    let Some(check) = Check::compile() else { return };
    let mut random = Random::new(5, "codes", &[]);
    let count = 4000;
    let mut codes = || -> Vec<f32> { (0..count).map(|_| (random.uniform() * 4.0).floor() - 2.0).collect() };
    let first = codes();
    let mut track = Track::default();
    assert_eq!(track.observe(&first, MOMENTUM), 0);
    let zeros = || vec![0f32; count];
    let (mut last, mut direction, mut ema, mut total) = (first, zeros(), zeros(), zeros());
    for _ in 0..6 {
        let next = codes();
        let changed = track.observe(&next, MOMENTUM);
        let inputs: [&[f32]; 7] = [&next, &last, &direction, &ema, &total, &[MOMENTUM], &[1.0 - MOMENTUM]];
        let got = check.run("turns_after", &inputs);
        same("means", &got[2], track.ema());
        let whole = |v: &[f32]| v.iter().map(|&x| x as i64).collect::<Vec<_>>();
        assert_eq!(whole(&got[0]), whole(&next));
        assert_eq!(whole(&got[1]), track.direction().iter().map(|&d| i64::from(d)).collect::<Vec<_>>());
        assert_eq!(whole(&got[3]), track.total().iter().map(|&t| i64::from(t)).collect::<Vec<_>>());
        assert_eq!(got[4].iter().sum::<f32>() as usize, changed);
        [last, direction, ema, total] = [got[0].clone(), got[1].clone(), got[2].clone(), got[3].clone()];
    }

    let mut sign = zeros();
    for round in 0..4 {
        let mut gradient: Vec<f32> = (0..count).map(|_| random.normal()).collect();
        gradient.iter_mut().step_by(7).for_each(|g| *g = 0.0);
        gradient[round] = f32::NAN;
        track.observe_gradient(&gradient);
        let got = check.run("sign_after", &[&sign, &gradient]);
        for (i, &turned) in got[1].iter().enumerate() {
            assert_eq!(turned == 1.0, track.gradient_turned(i), "round {round}, {i}");
        }
        sign = got[0].clone();
    }
}
