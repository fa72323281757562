//! Condition numbers: time of each route, its error against a planted spectrum, and numpy's time in the same run.
//!
//! `cargo bench --bench kappa -- 512 2048 4096` for these sizes (default: 512, 1024, 2048), each square; ROWSxCOLS for
//! another shape. Where `QTUNE_PYTHON` names a Python with numpy, its values-only SVD in f64 runs on the same numbers
//! with one thread. All of ours is one thread too.

use std::process::Command;
use std::time::Instant;

use qtune::random::Random;
use qtune::select::kappa::spectrum::{by, spectrum, squared};
use qtune::select::kappa::{Float, Matrix, Route, Spectrum};

/// The program's own allocator, which keeps what it freed: a product's result is else first of all 32 768 page faults.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Failure = Box<dyn std::error::Error>;

const PYTHON: &str = "
import sys, time, numpy as np
path, dtype, rows, cols = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
a = np.fromfile(path, dtype=dtype).reshape(rows, cols).astype(np.float64)
start = time.perf_counter()
s = np.linalg.svd(a, compute_uv=False)
print(time.perf_counter() - start, repr(float(s[0] / s[-1])))
";

/// Numbers of a file.
struct Held {
    bytes: Vec<u8>,
    float: Float,
    rows: usize,
    cols: usize,
}

impl Held {
    fn matrix(&self) -> Matrix<'_> {
        Matrix { bytes: &self.bytes, float: self.float, rows: self.rows, cols: self.cols }
    }
}

/// Normal numbers in f32.
fn gaussian(rows: usize, cols: usize) -> Held {
    let mut random = Random::new(0, "bench", &[rows as u64, cols as u64]);
    let bytes = (0..rows * cols).flat_map(|_| random.normal().to_le_bytes()).collect();
    Held { bytes, float: Float::F32, rows, cols }
}

/// A matrix in f64 of geometrically falling singular values from 1 to `1 / kappa`: a diagonal between random
/// reflections, three on each side, which make every entry its own.
fn planted(rows: usize, cols: usize, kappa: f64) -> Held {
    let q = rows.min(cols);
    let mut a = vec![0f64; rows * cols];
    for i in 0..q {
        a[i * cols + i] = kappa.powf(-(i as f64) / (q - 1).max(1) as f64);
    }
    let mut random = Random::new(0, "planted", &[]);
    let mut unit = |n: usize| {
        let v: Vec<f64> = (0..n).map(|_| f64::from(random.normal())).collect();
        let norm = v.iter().map(|x| x * x).sum::<f64>().sqrt();
        v.into_iter().map(|x| x / norm).collect::<Vec<f64>>()
    };
    for _ in 0..3 {
        let left = unit(rows);
        let mut shares = vec![0f64; cols];
        for (row, l) in a.chunks_exact(cols).zip(&left) {
            row.iter().zip(&mut shares).for_each(|(x, s)| *s += l * x);
        }
        for (row, l) in a.chunks_exact_mut(cols).zip(&left) {
            row.iter_mut().zip(&shares).for_each(|(x, s)| *x -= 2.0 * l * s);
        }
        let right = unit(cols);
        for row in a.chunks_exact_mut(cols) {
            let share: f64 = row.iter().zip(&right).map(|(x, r)| x * r).sum();
            row.iter_mut().zip(&right).for_each(|(x, r)| *x -= 2.0 * share * r);
        }
    }
    Held { bytes: a.iter().flat_map(|v| v.to_le_bytes()).collect(), float: Float::F64, rows, cols }
}

fn timed<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let started = Instant::now();
    let result = work();
    (started.elapsed().as_secs_f64(), result)
}

/// Seconds and kappa of numpy on the same numbers, where a Python is given.
fn numpy(held: &Held) -> Result<Option<(f64, f64)>, Failure> {
    let Some(python) = std::env::var_os("QTUNE_PYTHON") else { return Ok(None) };
    let path = std::env::temp_dir().join(format!("qtune-bench-kappa-{}.bin", std::process::id()));
    std::fs::write(&path, &held.bytes)?;
    let dtype = if held.float == Float::F32 { "<f4" } else { "<f8" };
    let output = Command::new(python)
        .args(["-c", PYTHON])
        .arg(&path)
        .args([dtype, &held.rows.to_string(), &held.cols.to_string()])
        .envs(["OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"].map(|name| (name, "1")))
        .output();
    std::fs::remove_file(&path)?;
    let output = output?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut numbers = text.split_whitespace().map(str::parse::<f64>);
    match (numbers.next(), numbers.next()) {
        (Some(seconds), Some(kappa)) => Ok(Some((seconds?, kappa?))),
        _ => Err(format!("numpy: {}", String::from_utf8_lossy(&output.stderr)).into()),
    }
}

fn report(what: &str, seconds: f64, found: Option<Spectrum>, truth: Option<f64>, peer: Option<(f64, f64)>) {
    let Some(found) = found else {
        println!("  {what:<34} {seconds:>8.3} s   refused");
        return;
    };
    let error = |of: f64| format!("{:.1e}", (found.quotient / of - 1.0).abs());
    let planted = truth.map(|t| format!("  off the planted one by {}", error(t))).unwrap_or_default();
    let beside = peer
        .map(|(theirs, kappa)| {
            format!("  {:.1} times faster than numpy, off its by {}", theirs / seconds, error(kappa))
        })
        .unwrap_or_default();
    println!(
        "  {what:<34} {seconds:>8.3} s   kappa {:.6e} by {}, bound {:.0e}{planted}{beside}",
        found.quotient,
        found.route.name(),
        found.bound
    );
}

fn shape(text: &str) -> Option<(usize, usize)> {
    let (rows, cols) = text.split_once('x').unwrap_or((text, text));
    Some((rows.parse().ok()?, cols.parse().ok()?))
}

fn main() -> Result<(), Failure> {
    qtune::memory::keep();
    let asked: Vec<(usize, usize)> = std::env::args().skip(1).filter_map(|arg| shape(&arg)).collect();
    let shapes = if asked.is_empty() { vec![(512, 512), (1024, 1024), (2048, 2048)] } else { asked };
    for (rows, cols) in shapes {
        println!("{rows} x {cols}");
        let held = gaussian(rows, cols);
        let peer = numpy(&held)?;
        if let Some((seconds, kappa)) = peer {
            println!("  {:<34} {seconds:>8.3} s   kappa {kappa:.6e}", "numpy, gaussian f32");
        }
        for route in [Route::Gram, Route::Qr] {
            let (seconds, found) = timed(|| by(route, &held.matrix()));
            report(&format!("{}, gaussian f32", route.name()), seconds, found, None, peer);
        }
        // One half of W^T W: a multiplication and an addition for each of its elements and each row.
        let mut seconds: Vec<f64> = (0..5).map(|_| timed(|| squared(&held.matrix())).0).collect();
        seconds.sort_by(f64::total_cmp);
        let (short, long) = (rows.min(cols) as f64, rows.max(cols) as f64);
        let rate = short * (short + 1.0) * long / seconds[2] / 1e9;
        println!("  {:<34} {:>8.3} s   {rate:.1} GFLOP/s in f64", "product phase, gaussian f32", seconds[2]);
        let (seconds, found) = timed(|| spectrum(&held.matrix(), false));
        report("as qtune goes, gaussian f32", seconds, Some(found), None, peer);
        if rows.min(cols) <= 1024 {
            let (seconds, found) = timed(|| spectrum(&held.matrix(), true));
            report("all singular values, gaussian f32", seconds, Some(found), None, peer);
        }
        for kappa in [1e2, 1e4, 9e4, 1e6, 1e8] {
            let held = planted(rows, cols, kappa);
            // Once for what the Gram route takes, once for what it leaves to the QR route.
            let peer = if kappa == 1e4 || kappa == 1e6 { numpy(&held)? } else { None };
            if let Some((seconds, found)) = peer {
                let what = format!("numpy, planted {kappa:.0e} f64");
                println!("  {what:<34} {seconds:>8.3} s   kappa {found:.6e}");
            }
            for route in [Route::Gram, Route::Qr] {
                let (seconds, found) = timed(|| by(route, &held.matrix()));
                report(
                    &format!("{}, planted {kappa:.0e} f64", route.name()),
                    seconds,
                    found,
                    Some(kappa),
                    peer,
                );
            }
            let (seconds, found) = timed(|| spectrum(&held.matrix(), false));
            report(
                &format!("as qtune goes, planted {kappa:.0e} f64"),
                seconds,
                Some(found),
                Some(kappa),
                peer,
            );
        }
    }
    Ok(())
}
