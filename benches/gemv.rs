//! One row of activations through a weight, as in decoding: packed weights beside candle's quantized and dense ones.
//!
//! `cargo bench --bench gemv -- [--threads 1,2] [--only 4096] [--seconds 0.1] [--turns 7] [--save gemv]`. "cold" rotates
//! through weights larger than the caches together, as a model of many layers does; "hot" keeps one.

mod harness;
mod ours;
mod shapes;

use harness::{copies, head, micros, of_threads, race, row, Failure, Options};
use ours::{candle, dense, int8, packed, Setting};

fn bench(options: &Options, threads: usize) -> Result<(), Failure> {
    for cold in [false, true] {
        let state = if cold { "cold" } else { "hot" };
        head(
            &format!("One row, {state}, {}", of_threads(threads)),
            &["weight [in->out]", "kernel", "µs", "GB/s of weights", "bits a weight", "over f32"],
        );
        for shape in shapes::GEMV.iter().filter(|s| options.wants(&[s.of, &s.text()])) {
            let setting = Setting { shape: *shape, copies: &|bytes| copies(bytes, cold) };
            let mut contestants = vec![dense(&setting)?];
            for (bits, group) in [(2, None), (2, Some(64)), (3, Some(64)), (4, Some(64)), (8, None)] {
                contestants.push(packed(&setting, bits, group)?);
            }
            for (bits, group) in [(2, None), (2, Some(64)), (4, None), (4, Some(64))] {
                contestants.push(int8(&setting, bits, group)?);
            }
            contestants.extend(candle(&setting)?);
            let seconds = race(options, &mut contestants)?;
            for (contestant, s) in contestants.iter().zip(&seconds) {
                row(&[
                    format!("{} {}", shape.of, shape.text()),
                    contestant.name.clone(),
                    micros(*s),
                    format!("{:.1}", contestant.bytes / s / 1e9),
                    format!("{:.2}", 8.0 * contestant.bytes / shape.weights() as f64),
                    format!("{:.2}", seconds[0] / s),
                ]);
            }
        }
    }
    Ok(())
}

fn main() -> Result<(), Failure> {
    harness::each_number_of_threads("One row of activations", &Options::read()?, bench)
}
