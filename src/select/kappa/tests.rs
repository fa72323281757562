//! Spectra that are known, routes that must refuse, and a model that must give the same numbers however it is read.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use faer::Mat;
use nalgebra::DMatrix;

use super::cache::{Cache, FILE_NAME};
use super::spectrum::{by, spectrum, values};
use super::*;
use crate::random::Random;
use crate::train::Quiet;
use crate::weights::checkpoint::save;
use crate::weights::{Centering, Checkpoint, Grid, Weights};

/// An orthogonal matrix, from a Gaussian one.
fn orthogonal(n: usize, random: &mut Random) -> Mat<f64> {
    let gaussian = Mat::from_fn(n, n, |_, _| f64::from(random.normal()));
    gaussian.qr().compute_Q()
}

/// A matrix `[rows, cols]` of these singular values, row-major.
fn planted(rows: usize, cols: usize, sigma: &[f64], seed: u64) -> Vec<f64> {
    let mut random = Random::new(seed, "planted", &[]);
    let (u, v) = (orthogonal(rows, &mut random), orthogonal(cols, &mut random));
    let scaled = Mat::from_fn(rows, sigma.len(), |i, j| u[(i, j)] * sigma[j]);
    let product = scaled * v.as_ref().subcols(0, sigma.len()).transpose();
    (0..rows * cols).map(|i| product[(i / cols, i % cols)]).collect()
}

fn geometric(n: usize, kappa: f64) -> Vec<f64> {
    (0..n).map(|i| kappa.powf(-(i as f64) / (n - 1) as f64)).collect()
}

/// Numbers of a file.
struct Held {
    bytes: Vec<u8>,
    rows: usize,
    cols: usize,
}

impl Held {
    fn new(values: &[f64], rows: usize, cols: usize) -> Self {
        Held { bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect(), rows, cols }
    }

    fn matrix(&self) -> Matrix<'_> {
        Matrix { bytes: &self.bytes, float: Float::F64, rows: self.rows, cols: self.cols }
    }
}

fn gaussian(rows: usize, cols: usize, seed: u64) -> Vec<f64> {
    let mut random = Random::new(seed, "gaussian", &[]);
    (0..rows * cols).map(|_| f64::from(random.normal())).collect()
}

fn transposed(values: &[f64], rows: usize, cols: usize) -> Vec<f64> {
    (0..rows * cols).map(|i| values[(i % rows) * cols + i / rows]).collect()
}

/// How far a planted kappa may be off for rounding of the matrix itself and of a stable method: some
/// `u kappa`.
fn rounding(kappa: f64) -> f64 {
    20.0 * f64::EPSILON * kappa
}

#[test]
fn planted_spectra_by_every_route_and_refusals_above_the_gates() {
    let n = 300;
    let spectra = |kappa: f64| {
        let mut one_small = vec![1.0; n];
        one_small[n - 1] = 1.0 / kappa;
        let mut one_large = vec![1.0 / kappa; n];
        one_large[0] = 1.0;
        let mut cluster = geometric(n, kappa);
        (1..5).for_each(|i| cluster[n - i] = (1.0 + 1e-9 * i as f64) / kappa);
        [geometric(n, kappa), one_small, one_large, cluster]
    };
    for kappa in [1e1, 1e4, 1e6, 1e8] {
        for (which, sigma) in spectra(kappa).into_iter().enumerate() {
            let kappa = sigma[0] / sigma.iter().copied().fold(1.0, f64::min);
            let held = Held::new(&planted(n, n, &sigma, which as u64), n, n);
            for route in [Route::Gram, Route::Qr, Route::Direct] {
                let found = by(route, &held.matrix());
                if route == Route::Gram && kappa > 2e5 {
                    assert!(found.is_none(), "{kappa} {which}: {found:?}");
                    continue;
                }
                let found = found.unwrap_or_else(|| panic!("{kappa} {which} {route:?}: refused"));
                let error = (found.quotient / kappa - 1.0).abs();
                assert!(
                    error <= found.bound + rounding(kappa),
                    "{kappa} {which} {route:?}: {error:e} {found:?}"
                );
                assert!(found.bound <= 1e-4, "{kappa} {which} {route:?}: {}", found.bound);
                let log_sum: f64 = sigma.iter().map(|s| s.ln()).sum();
                assert!(
                    (found.log_sum - log_sum).abs() < 1e-9 * kappa.max(1e3),
                    "{} {log_sum}",
                    found.log_sum
                );
                let frobenius = sigma.iter().map(|s| s * s).sum::<f64>().sqrt();
                assert!((found.frobenius / frobenius - 1.0).abs() < 1e-12);
            }
            let route = if kappa < 1e5 { Route::Gram } else { Route::Qr };
            assert_eq!(spectrum(&held.matrix(), false).route, route, "{kappa} {which}");
            assert_eq!(spectrum(&held.matrix(), true).route, Route::Direct);
        }
    }
}

/// Where both ends stand apart from the rest Lanczos has them to rounding, and the QR route keeps every digit that
/// the matrix has: its bound is a matter of the certificate.
#[test]
fn the_qr_route_keeps_the_digits_where_both_ends_stand_apart() {
    let n = 300;
    for kappa in [1e1, 1e4, 1e6, 1e8, 1e10] {
        // One, then from a half down to twice the last one.
        let mut sigma = geometric(n - 2, kappa / 4.0);
        sigma.iter_mut().for_each(|s| *s *= 0.5);
        sigma.insert(0, 1.0);
        sigma.push(1.0 / kappa);
        let held = Held::new(&planted(n, n, &sigma, 8), n, n);
        let found = by(Route::Qr, &held.matrix()).unwrap_or_else(|| panic!("{kappa}: refused"));
        let error = (found.quotient / kappa - 1.0).abs();
        assert!(error <= rounding(kappa), "{kappa}: {error:e} of {:e}, {found:?}", rounding(kappa));
    }
}

/// More rows than four squares and than a panel: the Gram matrix is summed from panels, and the triangle reduced in
/// pieces, as `spectrum` does it on its own.
#[test]
fn tall_and_wide_matrices_by_panels_and_pieces() {
    let (rows, cols) = (1100, 260);
    for (kappa, route) in [(1e3, Route::Gram), (1e7, Route::Qr)] {
        let sigma = geometric(cols, kappa);
        let values = planted(rows, cols, &sigma, 9);
        let log_sum: f64 = sigma.iter().map(|s| s.ln()).sum();
        let frobenius = sigma.iter().map(|s| s * s).sum::<f64>().sqrt();
        for held in [Held::new(&values, rows, cols), Held::new(&transposed(&values, rows, cols), cols, rows)]
        {
            let found = spectrum(&held.matrix(), false);
            assert_eq!((found.route, found.status), (route, Status::Ok), "{kappa}");
            let error = (found.quotient / kappa - 1.0).abs();
            assert!(error <= found.bound + rounding(kappa), "{kappa}: {error:e} {found:?}");
            assert!(found.bound <= 1e-5, "{kappa}: {found:?}");
            assert!((found.log_sum / log_sum - 1.0).abs() < 1e-8, "{kappa}: {} {log_sum}", found.log_sum);
            assert!((found.frobenius / frobenius - 1.0).abs() < 1e-12, "{kappa}: {}", found.frobenius);
            let deficit = (frobenius / (cols as f64).sqrt()).ln() - log_sum / cols as f64;
            assert!((found.deficit / deficit - 1.0).abs() < 1e-8, "{kappa}: {} {deficit}", found.deficit);
        }
    }
}

#[test]
fn what_no_route_can_prove_goes_to_all_singular_values() {
    let n = 270;
    // Above the gate of the QR route, below the rank rule.
    let held = Held::new(&planted(n, n, &geometric(n, 1e12), 1), n, n);
    assert!(by(Route::Gram, &held.matrix()).is_none() && by(Route::Qr, &held.matrix()).is_none());
    let found = spectrum(&held.matrix(), false);
    assert_eq!((found.route, found.status), (Route::Direct, Status::Ok));
    assert!((found.quotient / 1e12 - 1.0).abs() < rounding(1e12), "{}", found.quotient);

    // Twice the same row: a quotient would be any number about 1e16.
    let mut values = gaussian(n, n, 2);
    values.copy_within(0..n, 5 * n);
    let held = Held::new(&values, n, n);
    assert!(by(Route::Gram, &held.matrix()).is_none() && by(Route::Qr, &held.matrix()).is_none());
    let found = spectrum(&held.matrix(), false);
    assert_eq!((found.status, found.kappa(), found.bound), (Status::RankDeficient, None, 0.0));
    assert!(found.sigma_max > 1.0);

    // A column of zeros in a tall matrix, a row of zeros in a wide one.
    let (rows, cols) = (400, 260);
    let mut values = gaussian(rows, cols, 3);
    (0..rows).for_each(|i| values[i * cols + 7] = 0.0);
    for held in [Held::new(&values, rows, cols), Held::new(&transposed(&values, rows, cols), cols, rows)] {
        let found = spectrum(&held.matrix(), false);
        assert_eq!((found.status, found.sigma_min), (Status::RankDeficient, 0.0));
        let exact = spectrum(&held.matrix(), true);
        assert!((found.sigma_max / exact.sigma_max - 1.0).abs() < 1e-6);
        assert_eq!(exact.status, Status::RankDeficient);
    }
}

#[test]
fn transposes_scales_and_permutations() {
    for (rows, cols) in [(40, 12), (300, 260), (261, 900)] {
        let base = gaussian(rows, cols, 4);
        let own = spectrum(&Held::new(&base, rows, cols).matrix(), false);
        let turned = Held::new(&transposed(&base, rows, cols), cols, rows);
        assert_eq!(spectrum(&turned.matrix(), false), own, "{rows} {cols}");
        for exponent in [-500, 500] {
            let factor = 2f64.powi(exponent);
            let scaled: Vec<f64> = base.iter().map(|v| v * factor).collect();
            let found = spectrum(&Held::new(&scaled, rows, cols).matrix(), false);
            assert_eq!((found.quotient.to_bits(), found.route), (own.quotient.to_bits(), own.route));
            assert_eq!(found.sigma_max, own.sigma_max * factor);
            let expected = own.log_sum + rows.min(cols) as f64 * factor.ln();
            assert!((found.log_sum / expected - 1.0).abs() < 1e-12);
        }
        let mut random = Random::new(5, "order", &[]);
        let (p, q) = (random.permutation(rows), random.permutation(cols));
        let moved: Vec<f64> =
            (0..rows * cols).map(|i| base[p[i / cols] as usize * cols + q[i % cols] as usize]).collect();
        let found = spectrum(&Held::new(&moved, rows, cols).matrix(), false);
        assert!((found.quotient / own.quotient - 1.0).abs() < 1e-10, "{} {}", found.quotient, own.quotient);
    }
    // Near the ends of f64 even the singular values leave its range, and kappa stays.
    for factor in [1e306, 1e-306] {
        let values = [3.0 * factor, 0.0, 0.0, 1.5 * factor];
        assert_eq!(spectrum(&Held::new(&values, 2, 2).matrix(), false).kappa(), Some(2.0));
    }
    let tiny = [f64::from_bits(6), 0.0, 0.0, f64::from_bits(2)];
    assert_eq!(spectrum(&Held::new(&tiny, 2, 2).matrix(), false).kappa(), Some(3.0));
    // And so does the deficit of log-volume, though the root of the sum of squares is rounded to a whole multiple
    // of the least number, or lies beyond the largest.
    let deficit = |a: f64, b: f64| spectrum(&Held::new(&[a, 0.0, 0.0, b], 2, 2).matrix(), false).deficit;
    let plain = deficit(7.0, 5.0);
    assert!((plain - 0.5 * (37.0f64 / 35.0).ln()).abs() < 1e-15, "{plain}");
    assert_eq!(deficit(f64::from_bits(7), f64::from_bits(5)), plain);
    assert_eq!(deficit(7.0 * 2f64.powi(1021), 5.0 * 2f64.powi(1021)), plain);
}

#[test]
fn small_matrices_of_every_dtype_agree_with_another_library() {
    for (rows, cols) in [(2, 2), (5, 3), (3, 5), (17, 40), (64, 64), (100, 99), (130, 20)] {
        let base = gaussian(rows, cols, 6);
        let t = Tensor::from_vec(base, (rows, cols), &Device::Cpu).unwrap();
        for (float, dtype) in [
            (Float::F64, DType::F64),
            (Float::F32, DType::F32),
            (Float::F16, DType::F16),
            (Float::Bf16, DType::BF16),
        ] {
            let stored = t.to_dtype(dtype).unwrap();
            let wide = stored.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let flat = stored.flatten_all().unwrap();
            let bytes: Vec<u8> = match dtype {
                DType::F64 => flat.to_vec1::<f64>().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect(),
                DType::F32 => flat.to_vec1::<f32>().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect(),
                DType::F16 => {
                    flat.to_vec1::<half::f16>().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect()
                }
                _ => flat.to_vec1::<half::bf16>().unwrap().iter().flat_map(|v| v.to_le_bytes()).collect(),
            };
            let matrix = Matrix { bytes: &bytes, float, rows, cols };
            let oracle = DMatrix::from_row_slice(rows, cols, &wide).singular_values();
            let found = spectrum(&matrix, false);
            let (top, bottom) = (oracle.max(), oracle.min());
            assert!((found.quotient / (top / bottom) - 1.0).abs() < rounding(top / bottom).max(1e-12));
            let log_sum: f64 = oracle.iter().map(|s| s.ln()).sum();
            assert!((found.log_sum - log_sum).abs() < 1e-9);
            let all = values(&matrix);
            assert!(all.windows(2).all(|w| w[0] >= w[1]) && all.len() == rows.min(cols));
            assert!((all[0] / top - 1.0).abs() < 1e-12);
        }
    }
}

#[test]
fn what_is_seen_at_once() {
    let one = spectrum(&Held::new(&[-3.5], 1, 1).matrix(), false);
    assert_eq!(
        (one.kappa(), one.sigma_max, one.status, one.route),
        (Some(1.0), 3.5, Status::Ok, Route::Seen)
    );
    let row = spectrum(&Held::new(&[3.0, 4.0], 1, 2).matrix(), false);
    assert_eq!((row.kappa(), row.sigma_min), (Some(1.0), 5.0));
    assert!((row.log_sum - 5f64.ln()).abs() < 1e-15);
    let zero = spectrum(&Held::new(&[0.0; 6], 2, 3).matrix(), false);
    assert_eq!((zero.status, zero.kappa()), (Status::Zero, None));
    for bad in [f64::NAN, f64::INFINITY] {
        let found = spectrum(&Held::new(&[1.0, 2.0, bad, 4.0], 2, 2).matrix(), false);
        assert_eq!((found.status, found.kappa()), (Status::NonFinite, None));
    }
}

/// A model with a tensor for every way to lie in a file.
fn model() -> Vec<(String, Tensor)> {
    let tensor = |shape: &[usize], seed: u64, dtype: DType| {
        let count = shape.iter().product();
        Tensor::from_vec(gaussian(1, count, seed), shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
    };
    vec![
        ("layers.0.q_proj.weight".into(), tensor(&[270, 270], 1, DType::BF16)),
        ("layers.0.q_proj.bias".into(), tensor(&[270], 2, DType::F32)),
        ("layers.0.k_proj.weight".into(), tensor(&[20, 70], 3, DType::F16)),
        ("layers.0.experts.down_proj".into(), tensor(&[3, 12, 30], 4, DType::F32)),
        ("stem.conv.weight".into(), tensor(&[9, 2, 3, 3], 5, DType::F64)),
        ("embed.weight".into(), tensor(&[300, 8], 6, DType::F32)),
    ]
}

#[test]
fn the_same_bits_from_file_memory_and_cache_with_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    save(&path, &model(), &Default::default()).unwrap();
    let stored = Weights::from_checkpoint(Arc::new(Checkpoint::open(&path).unwrap()), &Device::Cpu);
    let dense = Weights::from_tensors(model());
    let cache = || Cache::beside(dir.path());
    let run = |weights: &Weights, threads: usize, cache: Option<&Cache>| {
        let units = units(weights, &generic_roles).unwrap();
        let options = Options { threads: Some(threads), ..Options::default() };
        let mut scored = analyse(weights, &units, &options, cache, &Quiet).unwrap();
        scored.sort_by_key(|s| s.unit.key());
        scored
    };
    let first = run(&dense, 1, None);
    assert_eq!(first.len(), 7);
    assert_eq!(first, run(&dense, 2, None));
    assert_eq!(first, run(&stored, 2, Some(&cache())));
    assert!(dir.path().join(FILE_NAME).exists());
    assert_eq!(first, run(&stored, 1, Some(&cache())));
    // One after another where memory allows no more, and no waiting without end.
    let units = units(&stored, &generic_roles).unwrap();
    let tight = Options { threads: Some(4), memory: Some(1), ..Options::default() };
    let mut alone = analyse(&stored, &units, &tight, None, &Quiet).unwrap();
    alone.sort_by_key(|s| s.unit.key());
    assert_eq!(first, alone);
    let sources: Vec<&str> = first.iter().map(|s| s.source.as_str()).collect();
    assert_eq!(sources, ["f32", "f32", "f32", "f32", "f16", "bf16", "f64"]);

    // What the cache says is believed: the file's content is its key.
    let known = cache();
    let mut lie = first[0].spectrum;
    lie.quotient = 12345.0;
    known.put(&super::cache::key(&first[0].hash, first[0].unit.kind, false), lie);
    assert_eq!(run(&dense, 1, Some(&known))[0].spectrum.quotient, 12345.0);
}

/// The hash of a model is one of names and numbers: neither the order nor the route is part of it.
#[test]
fn one_hash_for_one_content() {
    let hash = |tensors: Vec<(String, Tensor)>, exact: bool| {
        let weights = Weights::from_tensors(tensors);
        let units = units(&weights, &generic_roles).unwrap();
        let options = Options { exact, ..Options::default() };
        let scored = analyse(&weights, &units, &options, None, &Quiet).unwrap();
        for s in &scored {
            assert_eq!(content_hash(&weights, &s.unit, false).unwrap(), s.hash, "{}", s.unit.key());
        }
        (model_hash(&scored), scored)
    };
    let (own, scored) = hash(model(), false);
    let (exact, of_all) = hash(model(), true);
    let routes = |scored: &[Scored]| scored.iter().map(|s| s.spectrum.route).collect::<Vec<_>>();
    assert_ne!(routes(&scored), routes(&of_all));
    assert_eq!(own, exact);
    let mut turned = model();
    turned.reverse();
    assert_eq!(own, hash(turned, false).0);
    let mut back = scored.clone();
    back.reverse();
    assert_eq!(own, model_hash(&back));
    assert_ne!(own, model_hash(&scored[1..]));
    let mut moved = model();
    moved[2].0 = "layers.1.k_proj.weight".into();
    assert_ne!(own, hash(moved, false).0);
    let mut other = model();
    other[2].1 = other[2].1.neg().unwrap();
    assert_ne!(own, hash(other, false).0);
}

/// A worker that panics ends the analysis, though others wait for the memory that it holds.
#[test]
fn a_panic_holds_no_memory_back() {
    struct Panics;
    impl crate::train::Progress for Panics {
        fn note(&self, _line: &str) {}
        fn start(&self, _what: &str, _total: usize) {}
        fn tick(&self, _done: usize, _message: &str) {
            panic!("a terminal that is gone");
        }
        fn finish(&self) {}
    }
    let weights = Weights::from_tensors(model());
    let units = units(&weights, &generic_roles).unwrap();
    let options = Options { threads: Some(4), memory: Some(1), ..Options::default() };
    let run = std::panic::AssertUnwindSafe(|| analyse(&weights, &units, &options, None, &Panics));
    assert!(std::panic::catch_unwind(run).is_err());
}

#[test]
fn a_folder_that_cannot_be_written_is_a_note() {
    #[derive(Default)]
    struct Notes(std::sync::Mutex<Vec<String>>);
    impl crate::train::Progress for Notes {
        fn note(&self, line: &str) {
            self.0.lock().unwrap().push(line.into());
        }
        fn start(&self, _what: &str, _total: usize) {}
        fn tick(&self, _done: usize, _message: &str) {}
        fn finish(&self) {}
    }
    let dir = tempfile::tempdir().unwrap();
    let weights = Weights::from_tensors(model());
    let units = units(&weights, &generic_roles).unwrap();
    let notes = Notes::default();
    let cache = Cache::open(&dir.path().join("missing").join(FILE_NAME));
    let scored = analyse(&weights, &units, &Options::default(), Some(&cache), &notes).unwrap();
    assert_eq!(scored.len(), units.len());
    let notes = notes.0.into_inner().unwrap();
    assert!(notes.len() == 1 && notes[0].contains("are not kept"), "{notes:?}");
}

#[test]
fn weights_that_cannot_be_ranked_are_named() {
    let cpu = &Device::Cpu;
    let bad = Tensor::new(&[[1f32, f32::NAN], [0.0, 1.0]], cpu).unwrap();
    let weights = Weights::from_tensors([("a.weight".to_string(), bad)]);
    let all = units(&weights, &generic_roles).unwrap();
    let error = analyse(&weights, &all, &Options::default(), None, &Quiet).unwrap_err();
    assert!(error.to_string().starts_with("tensor a.weight: found a number that is not finite"), "{error}");
    let options = Options { ignore_nonfinite: true, ..Options::default() };
    let scored = analyse(&weights, &all, &options, None, &Quiet).unwrap();
    assert_eq!(scored[0].spectrum.status, Status::NonFinite);
    let config = KappaConfig { tensors: Some(1), ..KappaConfig::default() };
    assert!(choose(&scored, 4, &config, 0).unwrap_err().to_string().contains("1 have no condition number"));

    let mut weights = Weights::from_tensors([(
        "a.weight".to_string(),
        Tensor::from_vec(gaussian(4, 8, 1), (4, 8), cpu).unwrap().to_dtype(DType::F32).unwrap(),
    )]);
    let grid = Grid::new(4, Centering::Signed).unwrap();
    weights.pack_frozen(&["a.weight"], grid, None, |_, _| {}).unwrap();
    let all = units(&weights, &generic_roles).unwrap();
    let error = analyse(&weights, &all, &Options::default(), None, &Quiet).unwrap_err().to_string();
    assert!(
        error.contains("tensor a.weight: found 4 bits packed") && error.contains("--allow-quantized-kappa")
    );
    let options = Options { allow_quantized: true, ..Options::default() };
    assert_eq!(analyse(&weights, &all, &options, None, &Quiet).unwrap()[0].source, "4 bits");

    let whole =
        Weights::from_tensors([("a.weight".to_string(), Tensor::zeros((2, 2), DType::F32, cpu).unwrap())]);
    let listed = units(&whole, &generic_roles).unwrap();
    let scored = analyse(&whole, &listed, &Options::default(), None, &Quiet).unwrap();
    assert_eq!(scored[0].spectrum.status, Status::Zero);
}
