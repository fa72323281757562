//! Many rows of activations through a weight, as of images and prompts: packed weights beside candle's quantized and
//! dense ones.
//!
//! `cargo bench --bench gemm -- [--threads 1,2] [--only DeiT] [--seconds 0.1] [--turns 7] [--save gemm]`. GOP/s counts a
//! multiplication and an addition as two; read it against f32 FMA and int8 of `limits`.

mod harness;
mod ours;
mod shapes;

use harness::{head, micros, of_threads, race, row, Failure, Options};
use ours::{candle, codes, dense, packed, Setting};

fn bench(options: &Options, threads: usize) -> Result<(), Failure> {
    head(
        &format!("Many rows, {}", of_threads(threads)),
        &["rows: in->out", "kernel", "µs", "GOP/s", "over f32"],
    );
    for shape in shapes::GEMM.iter().filter(|s| options.wants(&[s.of, &s.text()])) {
        let setting = Setting { shape: *shape, copies: &|_| 1 };
        let mut contestants = vec![dense(&setting)?];
        for (bits, group) in [(2, None), (2, Some(64)), (4, Some(64))] {
            contestants.push(packed(&setting, bits, group)?);
        }
        for (bits, act_bits) in [(2, 2), (3, 3), (4, 4), (2, 8), (4, 8), (8, 8)] {
            contestants.push(codes(&setting, bits, act_bits)?);
        }
        contestants.extend(candle(&setting)?);
        let seconds = race(options, &mut contestants)?;
        for (contestant, s) in contestants.iter().zip(&seconds) {
            row(&[
                format!("{} {}", shape.of, shape.text()),
                contestant.name.clone(),
                micros(*s),
                format!("{:.1}", shape.ops() / s / 1e9),
                format!("{:.2}", seconds[0] / s),
            ]);
        }
    }
    Ok(())
}

fn main() -> Result<(), Failure> {
    harness::each_number_of_threads("Many rows of activations", &Options::read()?, bench)
}
