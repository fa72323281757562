//! Ops on rows in GB/s, and attention in TFLOP/s, beside candle's.

use std::sync::Arc;

use candle_core::{DType, Tensor, D};
use qtune::kernels::{
    attention, causal_attention, cross_entropy, gelu, layer_norm, rms_norm, rope, softmax, swiglu, Rotations,
};

use super::harness::{head, micros, row, Failure};
use super::race::{leaf, passes, percent, race, rate, speed, Op, Setting, Work, TYPES};

/// An op on rows.
struct Case {
    name: &'static str,
    inputs: Vec<Tensor>,
    op: Op<'static>,
    /// The same in candle, where it has it.
    plain: Option<Op<'static>>,
    /// Passes over the first input forward and backward: read and written.
    passes: (f64, f64),
}

fn cases(setting: &Setting, dtype: DType) -> Result<Vec<Case>, Failure> {
    let random = |shape: &[usize]| -> Result<Tensor, Failure> { leaf(&setting.random(shape, dtype)?) };
    let ones =
        |count: usize| -> Result<Tensor, Failure> { leaf(&Tensor::ones(count, dtype, &setting.device)?) };
    let (tokens, wide) = setting.pick((256 * 197, 768), (6, 32));
    let (text, hidden, mlp) = setting.pick((16384, 4096, 11008), (6, 64, 96));
    let (rows, vocab) = setting.pick((4096, 32000), (6, 100));
    let (batch, len, heads) = setting.pick((8, 2048, 32), (2, 3, 2));
    let labels: Vec<u32> = (0..rows).map(|i| (i * 7919 % vocab) as u32).collect();
    let labels = Tensor::from_vec(labels, rows, &setting.device)?;
    let positions: Arc<[u32]> = (0..batch * len).map(|i| (i % len) as u32).collect();
    let half = hidden / heads / 2;
    let frequencies: Vec<f64> = (0..half).map(|i| 1e4f64.powf(-(i as f64) / half as f64)).collect();
    let rotations = Rotations::new(&frequencies, len, 1.0);
    let same = labels.clone();
    Ok(vec![
        Case {
            name: "layer norm",
            inputs: vec![random(&[tokens, wide])?, ones(wide)?, ones(wide)?],
            op: Box::new(|x| layer_norm(&x[0], &x[1], &x[2], 1e-6)),
            plain: Some(Box::new(|x| candle_nn::ops::layer_norm(&x[0], &x[1], &x[2], 1e-6))),
            passes: (2.0, 3.0),
        },
        Case {
            name: "RMS norm",
            inputs: vec![random(&[text, hidden])?, ones(hidden)?],
            op: Box::new(|x| rms_norm(&x[0], &x[1], 1e-6)),
            plain: Some(Box::new(|x| candle_nn::ops::rms_norm(&x[0], &x[1], 1e-6))),
            passes: (2.0, 3.0),
        },
        Case {
            name: "softmax",
            inputs: vec![random(&setting.pick([256 * 6 * 197, 197], [7, 19]))?],
            op: Box::new(|x| softmax(&x[0])),
            plain: Some(Box::new(|x| candle_nn::ops::softmax_last_dim(&x[0]))),
            passes: (2.0, 3.0),
        },
        Case {
            name: "rotary embedding",
            inputs: vec![random(&[batch, len, hidden])?],
            op: Box::new(move |x| rope(&x[0], heads, &positions, &rotations)),
            plain: None,
            passes: (2.0, 2.0),
        },
        Case {
            name: "SwiGLU",
            inputs: vec![random(&[text / 2, mlp])?, random(&[text / 2, mlp])?],
            op: Box::new(|x| swiglu(&x[0], &x[1])),
            plain: Some(Box::new(|x| x[0].silu()? * &x[1])),
            passes: (3.0, 5.0),
        },
        Case {
            name: "GELU",
            inputs: vec![random(&[tokens, 2 * wide])?],
            op: Box::new(|x| gelu(&x[0])),
            plain: Some(Box::new(|x| x[0].gelu_erf())),
            passes: (2.0, 3.0),
        },
        Case {
            name: "cross-entropy",
            inputs: vec![random(&[rows, vocab])?],
            op: Box::new(move |x| cross_entropy(&x[0], &labels)),
            plain: Some(Box::new(move |x| candle_nn::loss::cross_entropy(&x[0], &same))),
            passes: (1.0, 2.0),
        },
    ])
}

pub fn rows(setting: &Setting) -> Result<(), Failure> {
    head(
        "Rows, beside candle's ops",
        &["what", "shape", "type", "pass", "µs", "GB/s", "of copy", "times candle's"],
    );
    for (dtype, type_name) in TYPES {
        for case in cases(setting, dtype)? {
            if setting.over(&format!("{}, {type_name}", case.name)) {
                return Ok(());
            }
            let x = &case.inputs[0];
            let made = (case.op)(&case.inputs)?;
            let g = setting.random(made.dims(), made.dtype())?;
            drop(made);
            let bytes = (x.elem_count() * dtype.size_in_bytes()) as f64;
            let plain: Vec<Tensor> = case.inputs.iter().map(Tensor::detach).collect();
            let mut works = passes(setting, &case.inputs, &case.op, Some(&g))?;
            if let Some(op) = &case.plain {
                works.push(Work::recorded(setting, "forward in candle", 1, |_| Ok(op(&plain)?))?);
            }
            let seconds = race(setting, &mut works)?;
            for (i, (work, s)) in works.iter().zip(&seconds).enumerate() {
                let (forward, back) = case.passes;
                let moved = bytes * if i == 1 { forward + back } else { forward };
                let [rate, share] = rate(setting, moved, *s);
                let over = match seconds.get(2).filter(|_| i != 1) {
                    Some(plain) => format!("{:.2}", plain / s),
                    None => "-".into(),
                };
                row(&[
                    case.name.into(),
                    format!("{:?}", x.dims()),
                    type_name.into(),
                    work.name.clone(),
                    micros(*s),
                    rate,
                    share,
                    over,
                ]);
            }
        }
    }
    Ok(())
}

/// `[B, T, heads * d]` as `[B, heads, T, d]`.
fn split(x: &Tensor, heads: usize) -> candle_core::Result<Tensor> {
    let (b, t, c) = x.dims3()?;
    x.reshape((b, t, heads, c / heads))?.transpose(1, 2)?.contiguous()
}

/// Attention in candle's ops, with cuBLAS's products.
fn plain(x: &[Tensor], heads: usize, scale: f64, mask: Option<&Tensor>) -> candle_core::Result<Tensor> {
    let (q, k, v) = (split(&x[0], heads)?, split(&x[1], heads)?, split(&x[2], heads)?);
    let mut logits = (q.matmul(&k.t()?)? * scale)?;
    if let Some(mask) = mask {
        logits = logits.broadcast_add(mask)?;
    }
    let o = candle_nn::ops::softmax_last_dim(&logits)?.matmul(&v)?;
    o.transpose(1, 2)?.flatten_from(D::Minus2)
}

fn attention_of(
    setting: &Setting,
    name: &str,
    [batch, len, heads, d]: [usize; 4],
    causal: bool,
) -> Result<(), Failure> {
    let scale = 1.0 / (d as f64).sqrt();
    // Two products forward, five backward; a causal one has half the entries.
    let product = 2.0 * (batch * heads * len * len * d) as f64 * if causal { 0.5 } else { 1.0 };
    for (dtype, type_name) in TYPES {
        if setting.over(&format!("{name}, {type_name}")) {
            return Ok(());
        }
        let random = || -> Result<Tensor, Failure> { setting.random(&[batch, len, heads * d], dtype) };
        let inputs = [leaf(&random()?)?, leaf(&random()?)?, leaf(&random()?)?];
        let g = random()?;
        let starts: Arc<[u32]> = vec![0; batch * len].into();
        let op: Op<'_> = Box::new(move |x| match causal {
            true => causal_attention(&x[0], &x[1], &x[2], (heads, heads), scale, &starts),
            false => attention(&x[0], &x[1], &x[2], heads, scale, None),
        });
        let mask = match causal {
            true => {
                let mask: Vec<f32> =
                    (0..len * len).map(|i| if i % len > i / len { f32::NEG_INFINITY } else { 0.0 }).collect();
                Some(Tensor::from_vec(mask, (len, len), &setting.device)?.to_dtype(dtype)?)
            }
            false => None,
        };
        let held: Vec<Tensor> = inputs.iter().map(Tensor::detach).collect();
        let mut works = passes(setting, &inputs, &op, Some(&g))?;
        works.push(Work::recorded(setting, "forward in candle's ops", 1, |_| {
            Ok(plain(&held, heads, scale, mask.as_ref())?)
        })?);
        let seconds = race(setting, &mut works)?;
        for (i, (work, s)) in works.iter().zip(&seconds).enumerate() {
            let ops = product * if i == 1 { 7.0 } else { 2.0 };
            let ceiling = if dtype == DType::BF16 { setting.ceilings.bf16 } else { setting.ceilings.f32 };
            let [rate, share] = speed(ceiling, ops, *s);
            row(&[
                name.into(),
                format!("{batch} x {len} x {heads} heads x {d}"),
                type_name.into(),
                work.name.clone(),
                micros(*s),
                rate,
                share,
                percent(ops / s, setting.ceilings.bf16),
                if i == 1 { "-".into() } else { format!("{:.2}", seconds[2] / s) },
            ]);
        }
    }
    Ok(())
}

pub fn attention_section(setting: &Setting) -> Result<(), Failure> {
    head(
        "Attention, beside candle's ops",
        &[
            "what",
            "shape",
            "type",
            "pass",
            "µs",
            "TFLOP/s",
            "of the type's product",
            "of bf16 product",
            "times candle's",
        ],
    );
    attention_of(setting, "DeiT-S", setting.pick([128, 197, 6, 64], [1, 5, 2, 32]), false)?;
    attention_of(setting, "Llama, causal", setting.pick([4, 1024, 32, 64], [1, 6, 2, 32]), true)
}
