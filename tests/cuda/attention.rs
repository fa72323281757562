//! Softmax, attention with and without its probabilities, and products of queries and keys.

use std::sync::Arc;

use crate::device::{agrees_within, bits, close, device, flat, values, F32};
use candle_core::{DType, Device, Result, Tensor};
use qtune::kernels::{self, reference, tape};

#[test]
fn softmax() {
    let Some(device) = device() else { return };
    // Rows of a warp, of a block, and longer than a block keeps.
    for x in
        [vec![1, 1], vec![3, 5], vec![2, 3, 17], vec![5, 128], vec![9, 513], vec![2, 16_384], vec![1, 16_392]]
    {
        let inputs = [(values(&x, 1) * 2.0).unwrap()];
        agrees_within(&device, &inputs, 1.0, &|t| kernels::softmax(&t[0]), &|t| reference::softmax(&t[0]));
    }
}

#[test]
fn softmax_of_large_and_missing_entries() {
    let Some(device) = device() else { return };
    let low = f32::NEG_INFINITY;
    let x = Tensor::new(&[[1e30f32, 1e30, low], [f32::NAN, 0.0, 0.0], [low, low, low]], &device).unwrap();
    let y = kernels::softmax(&x).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(y[0], [0.5, 0.5, 0.0]);
    assert!(y[1..].iter().flatten().all(|v| v.is_nan()));
}

/// (batch, queries, keys, heads, groups, depth, window)
type Case = (usize, usize, usize, usize, usize, usize, usize);

/// Two segments in the second half of the keys, and a window.
fn starts(&(b, t, s, _, _, _, window): &Case) -> Arc<[u32]> {
    let of = |t0: usize| {
        let own = t0 + s - t;
        let segment = if own > s / 2 { s / 2 + 1 } else { 0 };
        segment.max((own + 1).saturating_sub(window)) as u32
    };
    (0..b).flat_map(|_| (0..t).map(of)).collect()
}

fn causal(case: &Case, slack: f64) {
    let Some(device) = device() else { return };
    let &(b, t, s, heads, groups, d, _) = case;
    let inputs =
        [values(&[b, t, heads * d], 1), values(&[b, s, groups * d], 2), values(&[b, s, groups * d], 3)];
    let (starts, sizes, scale) = (starts(case), (heads, groups), 1.0 / (d as f64).sqrt());
    agrees_within(
        &device,
        &inputs,
        slack,
        &|x| kernels::causal_attention(&x[0], &x[1], &x[2], sizes, scale, &starts),
        &|x| reference::causal_attention(&x[0], &x[1], &x[2], sizes, scale, &starts),
    );
}

#[test]
fn causal_attention_of_few_tokens() {
    for case in [(1, 1, 1, 1, 1, 1, 9), (2, 5, 5, 4, 2, 3, 9), (1, 3, 7, 3, 1, 2, 9), (2, 7, 9, 2, 2, 5, 3)] {
        causal(&case, 2.0);
    }
}

#[test]
fn causal_attention_of_every_depth() {
    for depth in [8, 32, 40, 64, 80, 96, 128] {
        causal(&(1, 9, 11, 2, 1, depth, 6), 2.0);
    }
}

#[test]
fn causal_attention_of_the_widest_head() {
    causal(&(1, 3, 5, 1, 1, 256, 9), 2.0);
    causal(&(1, 2, 2, 2, 2, 130, 9), 2.0);
}

#[test]
fn causal_attention_across_tiles() {
    // Queries and keys of several tiles, windows that end and begin within them.
    causal(&(1, 131, 131, 2, 1, 8, 500), 2.0);
    causal(&(1, 70, 139, 2, 1, 8, 20), 2.0);
    causal(&(1, 67, 70, 1, 1, 72, 40), 2.0);
}

#[test]
fn a_token_alone_sees_its_cache() {
    let Some(device) = device() else { return };
    let (b, s, heads, d) = (2, 70, 2, 8);
    let [q, k, v] = [(1, 1), (s, 2), (s, 3)].map(|(rows, seed)| values(&[b, rows, heads * d], seed));
    for starts in [[0u32, 0], [0, 60]] {
        let starts: Arc<[u32]> = starts.into();
        let run = |device: &Device| {
            let [q, k, v] = [&q, &k, &v].map(|t| t.to_device(device).unwrap());
            kernels::causal_attention(&q, &k, &v, (heads, heads), 0.4, &starts).unwrap()
        };
        close("decoding", &run(&device), &run(&Device::Cpu), F32);
    }
}

#[test]
fn nothing_crosses_a_border() {
    let Some(device) = device() else { return };
    let there = |shape: &[usize], seed| values(shape, seed).to_device(&device).unwrap();
    for dtype in [DType::F32, DType::BF16] {
        let [q, k, v] = [1, 2, 3].map(|seed| there(&[1, 6, 8], seed).to_dtype(dtype).unwrap());
        let starts: Arc<[u32]> = [0, 0, 0, 3, 3, 3].into();
        let run = |k: &Tensor, v: &Tensor| kernels::causal_attention(&q, k, v, (2, 2), 1.0, &starts).unwrap();
        // Not even what is not a number.
        let other = |x: &Tensor| {
            let strange = Tensor::full(f32::NAN, (1, 3, 8), &device).unwrap().to_dtype(dtype).unwrap();
            Tensor::cat(&[strange, x.narrow(1, 3, 3).unwrap()], 1).unwrap()
        };
        let tail = |x: &Tensor| bits(&x.narrow(1, 3, 3).unwrap());
        assert_eq!(tail(&run(&k, &v)), tail(&run(&other(&k), &v)), "{dtype:?}: keys");
    }
}

/// (batch, queries, keys, heads, depth)
const SHAPES: [(usize, usize, usize, usize, usize); 6] =
    [(1, 1, 1, 1, 1), (2, 3, 5, 3, 2), (1, 7, 13, 1, 5), (2, 5, 3, 4, 1), (4, 4, 4, 2, 6), (1, 70, 66, 2, 8)];

#[test]
fn probabilities() {
    let Some(device) = device() else { return };
    for (b, n, m, heads, d) in SHAPES {
        // A query for each head, and one for all.
        for width in [heads * d, d] {
            let inputs = [values(&[b, n, width], 1), values(&[b, m, heads * d], 2)];
            agrees_within(
                &device,
                &inputs,
                4.0,
                &|t| kernels::attention_probs(&t[0], &t[1], heads, 0.4, None),
                &|t| reference::attention_probs(&t[0], &t[1], heads, 0.4, None),
            );
        }
    }
}

#[test]
fn probabilities_under_a_bias() {
    let Some(device) = device() else { return };
    for (b, n, m, heads, d) in SHAPES {
        for groups in (1..=b).filter(|g| b % g == 0) {
            for (rows, width) in [(1, heads * d), (n, heads * d), (n, d)] {
                let inputs = [
                    values(&[b, n, width], 1),
                    values(&[b, m, heads * d], 2),
                    values(&[groups, heads, rows, m], 3),
                ];
                agrees_within(
                    &device,
                    &inputs,
                    4.0,
                    &|t| kernels::attention_probs(&t[0], &t[1], heads, 0.4, Some(&t[2])),
                    &|t| reference::attention_probs(&t[0], &t[1], heads, 0.4, Some(&t[2])),
                );
            }
        }
    }
}

#[test]
fn a_bias_of_many_entries() {
    // More entries than parts of the sum over a group.
    let Some(device) = device() else { return };
    let inputs = [values(&[2400, 2, 2], 1), values(&[2400, 2, 2], 2), values(&[2, 1, 2, 2], 3)];
    agrees_within(
        &device,
        &inputs,
        8.0,
        &|t| kernels::attention_probs(&t[0], &t[1], 1, 0.4, Some(&t[2])),
        &|t| reference::attention_probs(&t[0], &t[1], 1, 0.4, Some(&t[2])),
    );
}

#[test]
fn mixes() {
    let Some(device) = device() else { return };
    for (b, n, m, heads, d) in SHAPES {
        let inputs = [values(&[b, heads, n, m], 1), values(&[b, m, heads * d], 2)];
        let slack = if m > 50 { 16.0 } else { 4.0 };
        agrees_within(&device, &inputs, slack, &|t| kernels::attention_mix(&t[0], &t[1], heads), &|t| {
            reference::attention_mix(&t[0], &t[1], heads)
        });
    }
}

/// The oracle of attention as one op.
fn both(t: &[Tensor], heads: usize, scale: f64) -> Result<Tensor> {
    let p = reference::attention_probs(&t[0], &t[1], heads, scale, t.get(3))?;
    reference::attention_mix(&p, &t[2], heads)
}

fn fused(device: &Device, inputs: &[Tensor], heads: usize, slack: f64) {
    let op = |t: &[Tensor]| kernels::attention(&t[0], &t[1], &t[2], heads, 0.4, t.get(3));
    agrees_within(device, inputs, slack, &op, &|t| both(t, heads, 0.4));
}

#[test]
fn attention() {
    let Some(device) = device() else { return };
    for (b, n, m, heads, d) in SHAPES {
        let [q, k, v] = [(n, 1), (m, 2), (m, 3)].map(|(rows, seed)| values(&[b, rows, heads * d], seed));
        fused(&device, &[q.clone(), k.clone(), v.clone()], heads, 2.0);
        for groups in (1..=b).filter(|g| b % g == 0) {
            for rows in [1, n] {
                let bias = values(&[groups, heads, rows, m], 4);
                fused(&device, &[q.clone(), k.clone(), v.clone(), bias], heads, 4.0);
            }
        }
    }
}

#[test]
fn attention_of_every_depth() {
    let Some(device) = device() else { return };
    for depth in [8, 32, 64, 80, 96, 128] {
        let shape = |rows| [1, rows, depth];
        let inputs =
            [values(&shape(7), 1), values(&shape(9), 2), values(&shape(9), 3), values(&[1, 1, 7, 9], 4)];
        let scaled: Vec<Tensor> = inputs.iter().map(|t| (t * 0.5).unwrap()).collect();
        fused(&device, &scaled, 1, 4.0);
    }
}

#[test]
fn attention_across_tiles() {
    let Some(device) = device() else { return };
    // A bias of a row for all queries is summed over their tiles.
    for rows in [1, 131] {
        let [q, k, v] = [(131, 1), (69, 2), (69, 3)].map(|(n, seed)| values(&[1, n, 8], seed));
        fused(&device, &[q, k, v, values(&[1, 1, rows, 69], 4)], 1, 8.0);
    }
}

#[test]
fn a_frozen_bias_and_none() {
    let Some(device) = device() else { return };
    let there = |shape: &[usize], seed| values(shape, seed).to_device(&device).unwrap();
    let [q, k, v] = [1, 2, 3].map(|seed| there(&[2, 5, 8], seed));
    let bias = there(&[2, 2, 5, 5], 4);
    let vars = [&q, &k, &v].map(|t| candle_core::Var::from_tensor(t).unwrap());
    let run = |bias: Option<&Tensor>| {
        let (y, tape) =
            tape::record(|| kernels::attention(&vars[0], &vars[1], &vars[2], 2, 0.4, bias)).unwrap();
        let leaves = [vars[0].as_tensor(), vars[1].as_tensor(), vars[2].as_tensor()];
        let mut found = tape.onward(&y, y.ones_like().unwrap(), &leaves).unwrap();
        let mut all = vec![y.detach()];
        all.extend(leaves.into_iter().map(|leaf| found.remove(leaf).unwrap()));
        all
    };
    let zeros = bias.zeros_like().unwrap();
    for (with, without) in run(Some(&zeros)).iter().zip(run(None)) {
        close("a bias of zeros", with, &without, F32);
    }
    // Frozen or trained, a bias acts alike.
    let trained = candle_core::Var::from_tensor(&bias).unwrap();
    for (frozen, trained) in run(Some(&bias)).iter().zip(run(Some(&trained))) {
        assert_eq!(bits(frozen), bits(&trained));
    }
    // Keys that a bias hides count nothing; where all are hidden nothing is a number.
    let hidden = Tensor::full(f32::NEG_INFINITY, (2, 2, 5, 4), &device).unwrap();
    let but_one = Tensor::cat(&[&hidden, &hidden.zeros_like().unwrap().narrow(3, 0, 1).unwrap()], 3).unwrap();
    let o = kernels::attention(&q, &k, &v, 2, 0.4, Some(&but_one)).unwrap();
    close("the last value", &o, &v.narrow(1, 4, 1).unwrap().repeat((1, 5, 1)).unwrap(), F32);
    let all = Tensor::full(f32::NEG_INFINITY, (2, 2, 5, 5), &device).unwrap();
    let o = kernels::attention(&q, &k, &v, 2, 0.4, Some(&all)).unwrap();
    assert!(flat(&o).into_iter().all(f64::is_nan));
}

#[test]
fn what_no_kernel_takes_goes_another_way() {
    let Some(device) = device() else { return };
    // Heads too wide, a scale that is not positive, one query for all heads.
    for (depth, scale, shared) in [(260, 0.1, false), (4, -0.5, false), (4, 0.4, true)] {
        let width = if shared { depth } else { 2 * depth };
        let inputs =
            [values(&[1, 3, width], 1), values(&[1, 4, 2 * depth], 2), values(&[1, 4, 2 * depth], 3)];
        let op = |t: &[Tensor]| kernels::attention(&t[0], &t[1], &t[2], 2, scale, None);
        agrees_within(&device, &inputs, 4.0, &op, &|t| both(t, 2, scale));
        if !shared {
            let inputs = [values(&[1, 4, width], 1), inputs[1].clone(), inputs[2].clone()];
            let starts: Arc<[u32]> = [0, 0, 1, 1].into();
            let op = |t: &[Tensor]| kernels::causal_attention(&t[0], &t[1], &t[2], (2, 2), scale, &starts);
            agrees_within(&device, &inputs, 4.0, &op, &|t| {
                reference::causal_attention(&t[0], &t[1], &t[2], (2, 2), scale, &starts)
            });
        }
    }
}

#[test]
fn products_of_query_and_key() {
    let Some(device) = device() else { return };
    for (heads, depth, inputs) in [(1, 1, 1), (3, 2, 5), (2, 17, 40)] {
        let t = [1, 2].map(|seed| values(&[heads * depth, inputs], seed));
        let slack = if depth > 8 { 16.0 } else { 4.0 };
        agrees_within(&device, &t, slack, &|t| kernels::qk_product(&t[0], &t[1], heads), &|t| {
            reference::qk_product(&t[0], &t[1], heads)
        });
    }
}

#[test]
fn wrong_arguments_are_named() {
    let Some(device) = device() else { return };
    let there = |shape: &[usize]| values(shape, 1).to_device(&device).unwrap();
    let refusal = |result: Result<Tensor>| {
        let text = result.expect_err("an error").to_string();
        text.lines().next().unwrap_or_default().to_string()
    };
    let x = there(&[2, 3, 4]);
    let text = refusal(kernels::attention(&x, &there(&[2, 3, 6]), &x, 2, 1.0, None));
    assert!(text.contains("attention") && text.contains("got 4"), "{text}");
    let text = refusal(kernels::attention(&x, &x, &x, 2, 1.0, Some(&there(&[3, 2, 3, 3]))));
    assert!(text.contains("got [3, 2, 3, 3]"), "{text}");
    let half = x.to_dtype(DType::F16).unwrap();
    let text = refusal(kernels::attention(&x, &half, &half, 2, 1.0, None));
    assert!(text.contains("F32") && text.contains("F16"), "{text}");
    let text = refusal(kernels::causal_attention(&x, &there(&[2, 2, 4]), &x, (2, 2), 1.0, &[0; 6].into()));
    assert!(text.contains("3 or more"), "{text}");
    let text = refusal(kernels::attention_mix(&there(&[2, 3, 3, 3]), &x, 2));
    assert!(text.contains("[2, 3, 3, 3]"), "{text}");
    let here = values(&[2, 3, 4], 1);
    let text = refusal(kernels::attention(&x, &here, &here, 2, 1.0, None));
    assert!(text.contains("attention"), "{text}");
}
