//! The limits of this machine, which every other figure is read against: bytes a second from memory and caches,
//! operations a second of the units that products run on.
//!
//! `cargo bench --bench limits`. `n/a`: the processor, or this program, has no such instruction.

mod harness;

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

use harness::{head, median, of_threads, row, Failure, Options};

/// What one thread does: so many units of work, each call.
type Work<'a> = Box<dyn FnMut() -> f64 + Send + 'a>;

/// Units a second of all threads together, the median over turns. `make` gives each thread its work.
fn rate(options: &Options, threads: usize, make: &(dyn Fn() -> Work<'static> + Sync)) -> f64 {
    let mut turns = Vec::new();
    for _ in 0..options.turns {
        let barrier = Barrier::new(threads);
        let rates: Vec<f64> = std::thread::scope(|scope| {
            let handles: Vec<_> = (0..threads)
                .map(|_| {
                    scope.spawn(|| {
                        let mut work = make();
                        work();
                        barrier.wait();
                        let (begun, mut units) = (Instant::now(), 0.0);
                        while begun.elapsed().as_secs_f64() < options.seconds {
                            units += work();
                        }
                        units / begun.elapsed().as_secs_f64()
                    })
                })
                .collect();
            handles.into_iter().map(|handle| handle.join().unwrap_or(f64::NAN)).collect()
        });
        turns.push(rates.iter().sum());
    }
    median(turns)
}

/// Reads all of `data`; eight sums, so that no addition waits for another.
fn read(data: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: avx512f was just detected.
            return unsafe { x86::read_avx512(data) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: avx2 was just detected.
            return unsafe { x86::read_avx2(data) };
        }
    }
    let mut sums = [0u64; 8];
    for eight in data.chunks_exact(8) {
        sums.iter_mut().zip(eight).for_each(|(sum, v)| *sum ^= v);
    }
    sums.iter().fold(0, |a, b| a ^ b)
}

fn reading(bytes: usize) -> Work<'static> {
    let data = vec![3u64; bytes / 8];
    // A small buffer often enough that looking at the clock costs nothing.
    let times = ((4 << 20) / bytes).max(1);
    Box::new(move || {
        for _ in 0..times {
            black_box(read(black_box(&data)));
        }
        (times * bytes) as f64
    })
}

/// `a = b + s c`: two streams read, one written (twelve bytes an element; that a line is fetched before it is written
/// is not counted).
fn triad(bytes: usize) -> Work<'static> {
    let n = bytes / 12;
    let (mut a, b, c) = (vec![0f32; n], vec![1f32; n], vec![2f32; n]);
    Box::new(move || {
        let s = black_box(3f32);
        for ((a, b), c) in a.iter_mut().zip(&b).zip(&c) {
            *a = b + s * c;
        }
        black_box(&mut a);
        12.0 * n as f64
    })
}

/// A loop of one instruction on registers, and the operations that it does in one call; none where the processor lacks
/// it.
type Unit = (&'static str, &'static str, fn() -> Option<fn() -> f64>);

const UNITS: &[Unit] = &[
    ("f32 FMA", "GFLOP/s", || unit("fma32")),
    ("f64 FMA", "GFLOP/s", || unit("fma64")),
    ("bf16 dot (vdpbf16ps)", "GFLOP/s", || unit("bf16")),
    ("int8 dot (vpdpbusd)", "GOP/s", || unit("int8")),
    ("int8 maddubs + madd + add, AVX2", "GOP/s", || unit("maddubs")),
];

fn unit(name: &str) -> Option<fn() -> f64> {
    #[cfg(target_arch = "x86_64")]
    return x86::unit(name);
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = name;
        None
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    #[target_feature(enable = "avx512f")]
    pub fn read_avx512(data: &[u64]) -> u64 {
        let mut sums = [_mm512_setzero_si512(); 8];
        for block in data.chunks_exact(64) {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: a block holds 64 words, eight for each of the eight loads.
                let v = unsafe { _mm512_loadu_si512(block.as_ptr().add(8 * i).cast()) };
                *sum = _mm512_xor_si512(*sum, v);
            }
        }
        let all = sums.iter().fold(_mm512_setzero_si512(), |a, b| _mm512_xor_si512(a, *b));
        _mm512_reduce_add_epi64(all) as u64
    }

    #[target_feature(enable = "avx2")]
    pub fn read_avx2(data: &[u64]) -> u64 {
        let mut sums = [_mm256_setzero_si256(); 8];
        for block in data.chunks_exact(32) {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: a block holds 32 words, four for each of the eight loads.
                let v = unsafe { _mm256_loadu_si256(block.as_ptr().add(4 * i).cast()) };
                *sum = _mm256_xor_si256(*sum, v);
            }
        }
        let all = sums.iter().fold(_mm256_setzero_si256(), |a, b| _mm256_xor_si256(a, *b));
        _mm256_extract_epi64::<0>(all) as u64
    }

    /// Rounds of a call.
    const ROUNDS: usize = 10_000;
    /// Sums at a time: more than latency times units, fewer than registers.
    const SUMS: usize = 12;

    /// A loop of `$step` over `SUMS` sums that start from `$zero`; `$ops` operations each.
    macro_rules! looped {
        ($name:ident, $features:literal, $zero:expr, $a:expr, $b:expr, $step:expr, $ops:expr) => {
            #[target_feature(enable = $features)]
            fn $name() -> f64 {
                let (a, b) = (black_box($a), black_box($b));
                let mut sums = [$zero; SUMS];
                for _ in 0..ROUNDS {
                    for sum in sums.iter_mut() {
                        *sum = $step(*sum, a, b);
                    }
                }
                black_box(&sums);
                (ROUNDS * SUMS * $ops) as f64
            }
        };
    }

    looped!(
        fma32_avx512,
        "avx512f",
        _mm512_setzero_ps(),
        _mm512_set1_ps(0.5),
        _mm512_set1_ps(0.25),
        |s, a, b| _mm512_fmadd_ps(s, a, b),
        32
    );
    looped!(
        fma32_avx2,
        "avx2,fma",
        _mm256_setzero_ps(),
        _mm256_set1_ps(0.5),
        _mm256_set1_ps(0.25),
        |s, a, b| _mm256_fmadd_ps(s, a, b),
        16
    );
    looped!(
        fma64_avx512,
        "avx512f",
        _mm512_setzero_pd(),
        _mm512_set1_pd(0.5),
        _mm512_set1_pd(0.25),
        |s, a, b| _mm512_fmadd_pd(s, a, b),
        16
    );
    looped!(
        fma64_avx2,
        "avx2,fma",
        _mm256_setzero_pd(),
        _mm256_set1_pd(0.5),
        _mm256_set1_pd(0.25),
        |s, a, b| _mm256_fmadd_pd(s, a, b),
        8
    );
    looped!(
        bf16_avx512,
        "avx512f,avx512bf16",
        _mm512_setzero_ps(),
        _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5), _mm512_set1_ps(0.5)),
        _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.25), _mm512_set1_ps(0.25)),
        |s, a, b| _mm512_dpbf16_ps(s, a, b),
        64
    );
    looped!(
        int8_avx512,
        "avx512f,avx512vnni",
        _mm512_setzero_si512(),
        _mm512_set1_epi8(3),
        _mm512_set1_epi8(5),
        |s, a, b| _mm512_dpbusd_epi32(s, a, b),
        128
    );
    looped!(
        int8_avxvnni,
        "avx2,avxvnni",
        _mm256_setzero_si256(),
        _mm256_set1_epi8(3),
        _mm256_set1_epi8(5),
        |s, a, b| _mm256_dpbusd_avx_epi32(s, a, b),
        64
    );

    /// Its product does not depend on the sum, so the operand is hidden each round lest it leave the loop.
    #[target_feature(enable = "avx2")]
    fn maddubs_avx2() -> f64 {
        let (b, ones) = (black_box(_mm256_set1_epi8(5)), _mm256_set1_epi16(1));
        let mut sums = [_mm256_setzero_si256(); 8];
        for _ in 0..ROUNDS {
            for sum in sums.iter_mut() {
                let mut a = *sum;
                // SAFETY: no instruction: the compiler may only no longer know what is in the register.
                unsafe {
                    std::arch::asm!("/* {0} */", inout(ymm_reg) a, options(nomem, nostack, preserves_flags))
                };
                let pairs = _mm256_maddubs_epi16(a, b);
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
            }
        }
        black_box(&sums);
        (ROUNDS * 8 * 64) as f64
    }

    macro_rules! detected {
        ($unit:ident) => {
            // SAFETY: this stands where all features of the function were just detected.
            Some(|| unsafe { $unit() })
        };
    }

    pub fn unit(name: &str) -> Option<fn() -> f64> {
        let avx512 = is_x86_feature_detected!("avx512f");
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        match name {
            "fma32" if avx512 => detected!(fma32_avx512),
            "fma32" if avx2 => detected!(fma32_avx2),
            "fma64" if avx512 => detected!(fma64_avx512),
            "fma64" if avx2 => detected!(fma64_avx2),
            "bf16" if avx512 && is_x86_feature_detected!("avx512bf16") => detected!(bf16_avx512),
            "int8" if avx512 && is_x86_feature_detected!("avx512vnni") => detected!(int8_avx512),
            "int8" if avx2 && is_x86_feature_detected!("avxvnni") => detected!(int8_avxvnni),
            "maddubs" if avx2 => detected!(maddubs_avx2),
            _ => None,
        }
    }
}

fn bench(options: &Options, threads: usize) -> Result<(), Failure> {
    head(&format!("Limits, {}", of_threads(threads)), &["what", "figure", "unit"]);
    let put = |what: &str, figure: Option<f64>, unit: &str| {
        let figure = figure.map_or("n/a".into(), |f| format!("{f:.0}"));
        row(&[what.into(), figure, unit.into()]);
    };
    // All threads together read so much; of the second-level cache, which is each core's own, each its part.
    let sizes = [
        ("memory read, 512 MB", 512 << 20),
        ("L3 read, 8 MB", 8 << 20),
        ("L2 read, 256 KB a thread", threads * (256 << 10)),
        ("L1 read, 16 KB a thread", threads * (16 << 10)),
    ];
    for (what, bytes) in sizes.into_iter().filter(|(what, _)| options.wants(&[what])) {
        let make = move || reading(bytes / threads / 512 * 512);
        put(what, Some(rate(options, threads, &make) / 1e9), "GB/s");
    }
    if options.wants(&["triad"]) {
        let make = move || triad(384 * (1 << 20) / threads);
        put("memory triad, 2 read + 1 written", Some(rate(options, threads, &make) / 1e9), "GB/s");
    }
    for (what, unit, find) in UNITS.iter().filter(|(what, _, _)| options.wants(&[what])) {
        let figure = find().map(|work| rate(options, threads, &move || Box::new(work)) / 1e9);
        put(what, figure, unit);
    }
    Ok(())
}

fn main() -> Result<(), Failure> {
    harness::each_number_of_threads("Limits of this machine", &Options::read()?, bench)
}
