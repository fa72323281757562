//! Fake quantization forward and backward, in GB/s of the bytes that the kernels' headers count, beside candle's ops.

use candle_core::{DType, Tensor};
use qtune::kernels::{lsq, reference, statsq, statsq_annealed, Levels};

use super::harness::{head, micros, row, Failure};
use super::race::{leaf, passes, race, rate, target, Op, Setting, Work, TYPES};

/// A quantizer of the first of its inputs.
struct Case {
    name: &'static str,
    inputs: Vec<Tensor>,
    op: Op<'static>,
    /// The same in candle's ops.
    plain: Op<'static>,
    /// Passes over the first input in bytes going back: read and written; 0 where nothing is done.
    back: f64,
}

fn cases(setting: &Setting, dtype: DType) -> Result<Vec<Case>, Failure> {
    let (rows, cols) = setting.pick((8192, 8192), (8, 64));
    let (images, len, width) = setting.pick((256, 197, 1536), (2, 5, 32));
    let levels = Levels::signed(2);
    let w = leaf(&setting.random(&[rows, cols], dtype)?)?;
    let x = leaf(&setting.random(&[images, len, width], dtype)?)?;
    let full = |value: f32, count: usize| -> Result<Tensor, Failure> {
        leaf(&Tensor::full(value, count, &setting.device)?.to_dtype(dtype)?)
    };
    let statsq_of = |name, op: Op<'static>, back| Case {
        name,
        inputs: vec![w.clone()],
        op,
        plain: Box::new(|w| reference::statsq(&w[0], 2)),
        back,
    };
    let lsq_of = |name, inputs, axis| Case {
        name,
        inputs,
        op: Box::new(move |x| lsq(&x[0], &x[1], x.get(2), levels, Some(axis))),
        plain: Box::new(move |x| reference::lsq(&x[0], &x[1], x.get(2), levels, Some(axis))),
        back: 3.0,
    };
    Ok(vec![
        statsq_of("StatsQ, 2 bits, weight", Box::new(|w| statsq(&w[0], 2)), 0.0),
        statsq_of("StatsQ, 2 bits, annealed", Box::new(|w| statsq_annealed(&w[0], 2, 0.005)), 3.0),
        lsq_of("LSQ, 2 bits, weight, step a row", vec![w.clone(), full(0.5, rows)?], 0),
        lsq_of(
            "LSQ, 2 bits, activations, step a token, shift",
            vec![x, full(0.5, len)?, full(0.01, width)?],
            1,
        ),
    ])
}

pub fn bench(setting: &Setting) -> Result<(), Failure> {
    head(
        "Fake quantization, beside candle's ops",
        &["what", "shape", "type", "pass", "µs", "GB/s", "of copy", "times candle's", "target"],
    );
    for (dtype, type_name) in TYPES {
        for case in cases(setting, dtype)? {
            if setting.over(&format!("{}, {type_name}", case.name)) {
                return Ok(());
            }
            let x = &case.inputs[0];
            let g = setting.random(x.dims(), dtype)?;
            let bytes = (x.elem_count() * dtype.size_in_bytes()) as f64;
            let plain: Vec<Tensor> = case.inputs.iter().map(Tensor::detach).collect();
            let mut works = passes(setting, &case.inputs, &case.op, Some(&g).filter(|_| case.back > 0.0))?;
            works.push(Work::recorded(setting, "forward in candle's ops", 1, |_| Ok((case.plain)(&plain)?))?);
            let seconds = race(setting, &mut works)?;
            let last = works.len() - 1;
            for (i, (work, s)) in works.iter().zip(&seconds).enumerate() {
                let moved = bytes * if i == 1 && i < last { 2.0 + case.back } else { 2.0 };
                let [rate, share] = rate(setting, moved, *s);
                row(&[
                    case.name.into(),
                    format!("{:?}", x.dims()),
                    type_name.into(),
                    work.name.clone(),
                    micros(*s),
                    rate,
                    share,
                    if i == 1 && i < last { "-".into() } else { format!("{:.2}", seconds[last] / s) },
                    match i == last {
                        true => String::new(),
                        false => target(setting, ">= 80 % of copy", moved / s >= 0.8 * setting.ceilings.copy),
                    },
                ]);
            }
        }
    }
    Ok(())
}
