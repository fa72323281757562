//! What the card does at most: copies, and cuBLAS's products.

use candle_core::DType;

use super::harness::{head, micros, row, Failure};
use super::race::{race, Ceilings, Setting, Work, SAID};

pub fn ceilings(setting: &Setting) -> Result<(), Failure> {
    head("Ceilings", &["what", "µs", "rate"]);
    let count = setting.pick(1 << 28, 1 << 12);
    let from = setting.random(&[count], DType::F32)?;
    let mut copies =
        [Work::recorded(setting, format!("copy of {} MiB", count >> 18), 1, |_| Ok(from.copy()?))?];
    let seconds = race(setting, &mut copies)?[0];
    let mut found = Ceilings { copy: 8.0 * count as f64 / seconds, ..Ceilings::default() };
    row(&[
        copies[0].name.clone(),
        micros(seconds),
        format!("{:.0} GB/s, read and written", found.copy / 1e9),
    ]);
    for (dtype, name) in super::race::TYPES {
        let n = setting.pick(8192usize, 32);
        let (a, b) = (setting.random(&[n, n], dtype)?, setting.random(&[n, n], dtype)?);
        let name = format!("product of {n} x {n} x {n}, {name}");
        let mut products = [Work::recorded(setting, name, 1, |_| Ok(a.matmul(&b.t()?)?))?];
        let seconds = race(setting, &mut products)?[0];
        let rate = 2.0 * (n as f64).powi(3) / seconds;
        row(&[products[0].name.clone(), micros(seconds), format!("{:.1} TFLOP/s", rate / 1e12)]);
        match dtype {
            DType::BF16 => found.bf16 = rate,
            _ => found.f32 = rate,
        }
    }
    println!("{SAID}{found}");
    Ok(())
}
