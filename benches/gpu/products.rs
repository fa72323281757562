//! Products with packed weights beside cuBLAS's with dense ones.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use qtune::kernels::{packed_matmul, packed_quantized_matmul, Groups, Levels, PackedRows, Rounding};

use super::harness::{head, micros, row, Failure};
use super::race::{percent, race, speed, target, Setting, Work};

/// Bytes of weights that are rotated through: several times the second-level cache.
const COLD: usize = 220 << 20;

/// The forms of a weight: bits, and columns that share a step.
const FORMS: [(u8, Option<usize>); 5] = [(2, None), (2, Some(64)), (3, None), (4, None), (8, None)];

/// Copies of a weight of random codes, each of which the device is given apart.
fn packs(
    setting: &Setting,
    (rows, cols): (usize, usize),
    (bits, group): (u8, Option<usize>),
) -> Vec<PackedRows> {
    let levels = if bits == 2 { Levels::mid_rise(2) } else { Levels::signed(bits) };
    let groups = Groups::new(cols, group);
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state
    };
    // Columns are a multiple of 8, so that no row ends within a byte.
    let count = rows * PackedRows::row_bytes(cols, bits);
    let codes: Arc<[u8]> = (0..count).map(|_| (next() >> 56) as u8).collect();
    let step: Arc<[f32]> =
        (0..rows * groups.count()).map(|_| 0.01 + (next() >> 40) as f32 / (1u64 << 28) as f32).collect();
    let copies = setting.pick(COLD.div_ceil(codes.len() + 4 * step.len()).clamp(2, 64), 2);
    let one = |_| PackedRows::new(levels, bits, cols, groups.width(), codes.clone(), step.clone());
    (0..copies).map(one).collect()
}

fn bytes(rows: &PackedRows) -> f64 {
    (rows.codes.len() + 4 * rows.step.len()) as f64
}

/// What products of 2 bits and one step a row shall reach: microseconds at most, times cuBLAS, share of copying.
fn targets(
    setting: &Setting,
    shape: (usize, usize),
    tokens: usize,
    seconds: f64,
    over: f64,
    bytes: f64,
) -> Vec<String> {
    let at_most = |us: f64| target(setting, format!("<= {us} µs"), 1e6 * seconds <= us);
    let times = |least: f64| target(setting, format!(">= {least} x"), over >= least);
    match (shape, tokens) {
        ((8192, 28672), 1) => {
            let share = bytes / seconds / setting.ceilings.copy;
            vec![at_most(21.0), times(4.0), target(setting, ">= 73 %", share >= 0.73)]
        }
        ((4096, 4096), 1) => vec![at_most(4.5)],
        ((8192, 28672), 16) => vec![times(3.0)],
        ((8192, 28672), 512) => vec![times(0.7)],
        _ => Vec::new(),
    }
}

pub fn packed(setting: &Setting) -> Result<(), Failure> {
    let shapes: &[(usize, usize)] =
        setting.pick(&[(8192, 28672), (4096, 4096), (28672, 8192), (4096, 11008)], &[(64, 256), (72, 128)]);
    let batches: &[usize] = setting.pick(&[1, 8, 16, 32, 128, 512], &[1, 16, 40]);
    head(
        "Products with packed weights, beside cuBLAS bf16",
        &[
            "weight [rows x columns]",
            "tokens",
            "weight",
            "x",
            "µs",
            "GB/s packed",
            "of copy",
            "TFLOP/s",
            "of bf16 product",
            "times cuBLAS",
            "target",
        ],
    );
    for (s, &shape) in shapes.iter().enumerate() {
        let (rows, cols) = shape;
        let weights: Vec<Vec<PackedRows>> = FORMS.iter().map(|form| packs(setting, shape, *form)).collect();
        let first = setting.random(&[rows, cols], DType::BF16)?;
        let mut dense = vec![first.clone()];
        while dense.len() < weights[0].len() {
            dense.push(first.copy()?);
        }
        for (d, (dtype, x_name)) in [(DType::BF16, "bf16"), (DType::F16, "f16")].into_iter().enumerate() {
            // Of f16 the forms and shapes that have a target.
            let forms = if d == 0 { FORMS.len() } else { 1 };
            if d == 1 && s > 1 {
                continue;
            }
            for &tokens in batches {
                if setting.over(&format!("{rows} x {cols}, {tokens} tokens, {x_name}")) {
                    return Ok(());
                }
                let x = setting.random(&[tokens, cols], DType::BF16)?;
                let typed = x.to_dtype(dtype)?;
                // Each copy as often as gives a graph a length, where one is short.
                let count = |copies: usize| match tokens {
                    0..=32 => copies * setting.pick(16usize.div_ceil(copies), 1),
                    _ => copies,
                };
                let mut works = vec![Work::recorded(setting, "cuBLAS bf16", count(dense.len()), |i| {
                    Ok(x.matmul(&dense[i % dense.len()].t()?)?)
                })?];
                for ((bits, group), weights) in FORMS.iter().zip(&weights).take(forms) {
                    let name = match group {
                        Some(group) => format!("{bits} bits, groups of {group}"),
                        None => format!("{bits} bits"),
                    };
                    works.push(Work::recorded(setting, name, count(weights.len()), |i| {
                        Ok(packed_matmul(&typed, &weights[i % weights.len()])?)
                    })?);
                }
                let seconds = race(setting, &mut works)?;
                for (i, (work, s)) in works.iter().zip(&seconds).enumerate() {
                    let bytes = match i {
                        0 => 2.0 * (rows * cols) as f64,
                        i => bytes(&weights[i - 1][0]),
                    };
                    let over = seconds[0] / s;
                    let [speed, of_product] =
                        speed(setting.ceilings.bf16, 2.0 * (tokens * rows * cols) as f64, *s);
                    let met = match i {
                        1 => targets(setting, shape, tokens, *s, over, bytes).join("; "),
                        _ => String::new(),
                    };
                    row(&[
                        format!("{rows} x {cols}"),
                        tokens.to_string(),
                        work.name.clone(),
                        if i == 0 { "bf16".into() } else { x_name.into() },
                        micros(*s),
                        format!("{:.0}", bytes / s / 1e9),
                        percent(bytes / s, setting.ceilings.copy),
                        speed,
                        of_product,
                        format!("{over:.2}"),
                        met,
                    ]);
                }
            }
        }
    }
    Ok(())
}

pub fn integer(setting: &Setting) -> Result<(), Failure> {
    head(
        "Products of codes with codes, rounding included, beside cuBLAS bf16",
        &["tokens: in->out", "what", "µs", "TOP/s", "of bf16 product", "times cuBLAS"],
    );
    let (images, len) = setting.pick((64, 197), (2, 5));
    // qkv, output, up and down of DeiT-S.
    let shapes: &[(usize, usize)] =
        setting.pick(&[(384, 1152), (384, 384), (384, 1536), (1536, 384)], &[(128, 64), (64, 128)]);
    for &(input, output) in shapes {
        if setting.over(&format!("{input}->{output}")) {
            return Ok(());
        }
        let x = setting.random(&[images, len, input], DType::BF16)?;
        let w = setting.random(&[output, input], DType::BF16)?;
        let flat = x.reshape(((), input))?;
        let mut works = vec![Work::recorded(setting, "cuBLAS bf16", 8, |_| Ok(flat.matmul(&w.t()?)?))?];
        for bits in [2u8, 4] {
            let weight = packs(setting, (output, input), (bits, None)).swap_remove(0);
            let rounding = Rounding {
                step: Tensor::full(2.0 / (1u32 << bits) as f32, len, &setting.device)?,
                shift: Some(Tensor::full(0.01f32, input, &setting.device)?),
                levels: Levels::signed(bits),
            };
            let x = &x;
            works.push(Work::recorded(setting, format!("W{bits}A{bits}, bf16 to bf16"), 8, move |_| {
                let y = packed_quantized_matmul(x, rounding.clone(), &weight, None)?;
                y.ok_or_else(|| candle_core::Error::Msg("no integer product".into()).into())
            })?);
        }
        let seconds = race(setting, &mut works)?;
        for (work, s) in works.iter().zip(&seconds) {
            let ops = 2.0 * (images * len * input * output) as f64;
            let [speed, share] = speed(setting.ceilings.bf16, ops, *s);
            row(&[
                format!("{}: {input}->{output}", images * len),
                work.name.clone(),
                micros(*s),
                speed,
                share,
                format!("{:.2}", seconds[0] / s),
            ]);
        }
    }
    Ok(())
}
