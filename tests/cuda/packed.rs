//! Packed weights: products, gradients, rows and values of them, against the CPU's.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use qtune::kernels::{
    self, frozen_rows_matmul, packed_codes_matmul, packed_matmul, packed_quantized_matmul, packed_rows,
    packed_values, Groups, Levels, PackedRows, Rounding,
};
use qtune::models::{Vit, VitConfig};
use qtune::transform::{ActQuant, WeightQuant};
use qtune::weights::format::{stored_tensors, QuantizationConfig};
use qtune::weights::{checkpoint, Calibration, Checkpoint, Grid, Packed, Transform, Weight, Weights};

use crate::device::{agrees_within, bits, close, device, flat, values, TYPES};

/// Rows, columns, and columns that share a step: one step a row, whole and halves of tiles, and groups that tiles do not
/// have; sizes with remainders.
const SHAPES: [(usize, usize, Option<usize>); 10] = [
    (1, 1, None),
    (3, 5, None),
    (33, 130, None),
    (33, 130, Some(64)),
    (70, 300, Some(32)),
    (40, 520, Some(128)),
    (17, 224, Some(96)),
    (33, 64, Some(3)),
    (65, 160, Some(40)),
    (300, 264, None),
];

const TOKENS: [usize; 9] = [1, 3, 8, 9, 16, 17, 33, 65, 130];

/// Codes of `bits` bits with their zero at one of three places, weights up to about one half.
fn weight(
    bits: u8,
    place: usize,
    (rows, cols): (usize, usize),
    group: Option<usize>,
    size: f32,
) -> PackedRows {
    let levels = [Levels::mid_rise(bits), Levels::signed(bits), Levels::unsigned(bits)][place % 3];
    let span = f64::from(levels.hi - levels.lo + 1);
    let draw = |v: f64, n: f64| ((v / 4.0 + 0.5) * n).floor().min(n - 1.0);
    let codes = flat(&values(&[rows, cols], u64::from(bits)));
    let codes: Vec<f32> = codes.into_iter().map(|v| levels.lo as f32 + draw(v, span) as f32).collect();
    let groups = Groups::new(cols, group);
    let step = flat(&values(&[rows, groups.count()], 9)).into_iter();
    let step: Vec<f32> = step.map(|v| size * (1.0 + 0.2 * v as f32) / span as f32).collect();
    PackedRows::pack_groups(levels, bits, groups, &codes, &step)
}

/// What an error says, the stack behind it left out.
fn one_line(error: candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}

fn dense(w: &PackedRows) -> Tensor {
    packed_values(w, &Device::Cpu).unwrap()
}

/// The product and its gradient on the device against those with the dense weight.
#[track_caller]
fn product_agrees(device: &Device, w: &PackedRows, tokens: usize) {
    let x = [values(&[tokens, w.cols], 3)];
    let plain = dense(w);
    agrees_within(device, &x, 4.0, &|t| packed_matmul(&t[0], w), &|t| {
        kernels::reference::linear(&t[0], &plain, None)
    });
}

#[test]
fn products_of_every_width_and_shape() {
    let Some(device) = device() else { return };
    for (i, (rows, cols, group)) in SHAPES.into_iter().enumerate() {
        for bits in 1..=8 {
            let at = i + usize::from(bits) * 2;
            let w = weight(bits, at, (rows, cols), group, 1.0);
            product_agrees(
                &device,
                &w,
                TOKENS[at % TOKENS.len()].min(if rows * cols > 10_000 { 17 } else { 130 }),
            );
        }
    }
}

#[test]
fn products_of_every_number_of_tokens() {
    let Some(device) = device() else { return };
    for (i, tokens) in TOKENS.into_iter().enumerate() {
        for bits in [2, 3, 4, 8] {
            product_agrees(&device, &weight(bits, i, (33, 130), Some(64), 1.0), tokens);
            product_agrees(&device, &weight(bits, i + 1, (7, 70), None, 1.0), tokens);
        }
    }
}

#[test]
fn long_sums_are_cut_into_slices() {
    let Some(device) = device() else { return };
    for (bits, tokens) in [(2, 8), (2, 17), (3, 16), (3, 40), (4, 4), (4, 70), (8, 16), (8, 17)] {
        product_agrees(&device, &weight(bits, 1, (5, 4096), Some(128), 0.1), tokens);
        product_agrees(&device, &weight(bits, 0, (33, 3000), None, 0.1), tokens);
    }
}

#[test]
fn many_tokens_meet_the_weight_unpacked() {
    let Some(device) = device() else { return };
    for (bits, group) in [(2, Some(32)), (3, None), (4, Some(3)), (8, Some(64))] {
        product_agrees(&device, &weight(bits, 0, (33, 130), group, 1.0), 513);
    }
}

#[test]
fn leading_axes_and_views() {
    let Some(device) = device() else { return };
    let w = weight(4, 0, (33, 72), Some(32), 1.0);
    let x = values(&[5, 3, 100], 4);
    let plain = dense(&w);
    for (dtype, tolerance) in TYPES {
        let x = x.to_dtype(dtype).unwrap();
        let of = |x: &Tensor| x.narrow(2, 7, 72).unwrap();
        let got = packed_matmul(&of(&x.to_device(&device).unwrap()), &w).unwrap();
        let wide = of(&x).to_dtype(DType::F32).unwrap().contiguous().unwrap();
        close("a view", &got, &kernels::reference::linear(&wide, &plain, None).unwrap(), 4.0 * tolerance);
        // Rows that do not begin at 16 bytes.
        let flat = x.flatten_all().unwrap();
        let of = |x: &Tensor| x.narrow(0, 1, 20 * 72).unwrap().reshape((20, 72)).unwrap();
        let got = packed_matmul(&of(&flat.to_device(&device).unwrap()), &w).unwrap();
        let wide = of(&flat).to_dtype(DType::F32).unwrap();
        close("an offset", &got, &kernels::reference::linear(&wide, &plain, None).unwrap(), 4.0 * tolerance);
    }
    // f64 goes through f32 as on the CPU.
    let x = values(&[3, 72], 5).to_dtype(DType::F64).unwrap();
    let got = packed_matmul(&x.to_device(&device).unwrap(), &w).unwrap();
    assert_eq!(got.dtype(), DType::F64);
    close("f64", &got, &packed_matmul(&x, &w).unwrap(), 2e-5);
}

/// A token of zeros, of the smallest numbers, of the largest, and one with a NaN, with steps that are small or large.
#[test]
fn tokens_of_all_sizes() {
    let Some(device) = device() else { return };
    for size in [1e-30f32, 1e-4, 1.0, 1e6] {
        for (bits, group) in [(2, None), (3, Some(32)), (4, Some(64)), (8, None), (4, Some(3))] {
            let w = weight(bits, 0, (40, 96), group, size);
            let plain = dense(&w);
            let scale = [0.0, 1e-38, 1e-20, 1.0, 1e25];
            let scale =
                Tensor::new(&scale.map(|s: f64| s as f32), &Device::Cpu).unwrap().unsqueeze(1).unwrap();
            for (width, back) in [(96, false), (40, true)] {
                let x = values(&[5, width], 8).broadcast_mul(&scale).unwrap();
                let run = |x: &Tensor| -> Result<Tensor> {
                    if !back {
                        return packed_matmul(x, &w);
                    }
                    let leaf = candle_core::Var::zeros((5, 96), x.dtype(), x.device())?;
                    let y = packed_matmul(leaf.as_tensor(), &w)?;
                    Ok((&y * x)?.sum_all()?.backward()?.get(&leaf).unwrap().clone())
                };
                let got = run(&x.to_device(&device).unwrap()).unwrap();
                let right = if back { plain.clone() } else { plain.t().unwrap() };
                let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
                let want = wide(&x).matmul(&wide(&right).contiguous().unwrap()).unwrap();
                let most = wide(&x).abs().unwrap().matmul(&wide(&right).abs().unwrap()).unwrap();
                for ((got, want), most) in flat(&got).into_iter().zip(flat(&want)).zip(flat(&most)) {
                    let near = (got - want).abs() <= 2e-6 * most + 1e-44 || want.abs() > 3e38;
                    assert!(near, "{bits} bits, steps {size}, back {back}: got {got}, want {want}");
                }
                // A NaN stays with its token.
                let nan = Tensor::new(&[0f32, 0.0, 0.0, f32::NAN, 0.0], &Device::Cpu).unwrap();
                let x = values(&[5, width], 8).broadcast_add(&nan.unsqueeze(1).unwrap()).unwrap();
                let got = flat(&run(&x.to_device(&device).unwrap()).unwrap());
                let each = got.len() / 5;
                assert!(got.chunks(each).enumerate().all(|(t, y)| y.iter().all(|v| v.is_nan() == (t == 3))));
            }
        }
    }
}

#[test]
fn values_are_the_same_to_the_bit() {
    let Some(device) = device() else { return };
    for (i, (rows, cols, group)) in SHAPES.into_iter().enumerate() {
        for bits_ in 1..=8 {
            let w = weight(bits_, i, (rows, cols), group, 1.0);
            let what = format!("{bits_} bits [{rows}, {cols}] in groups of {group:?}");
            let want = dense(&w);
            let got = packed_values(&w, &device).unwrap();
            assert_eq!(got.dims(), want.dims());
            assert_eq!(bits(&got), bits(&want), "{what}");
            let last = rows as u32 - 1;
            let ids = Tensor::new(&[[last, 0, last / 2], [0, 0, last]], &Device::Cpu).unwrap();
            let want = packed_rows(&ids, &w, &Device::Cpu).unwrap();
            assert_eq!(want.dims(), [2, 3, cols]);
            for dtype in [DType::U32, DType::I64] {
                let there = ids.to_dtype(dtype).unwrap().to_device(&device).unwrap();
                let got = packed_rows(&there, &w, &device).unwrap();
                assert_eq!((got.dims(), bits(&got)), (want.dims(), bits(&want)), "{what}, ids of {dtype:?}");
            }
            let got = packed_rows(&ids, &w, &device).unwrap();
            assert_eq!(bits(&got), bits(&want), "{what}, ids of the CPU");
        }
    }
    let w = weight(4, 0, (5, 40), Some(32), 1.0);
    let ids = Tensor::new(&[4i64, 5, -1], &Device::Cpu).unwrap();
    let got = flat(&packed_rows(&ids.to_device(&device).unwrap(), &w, &device).unwrap());
    assert!(got[..40].iter().all(|v| v.is_finite()) && got[40..].iter().all(|v| v.is_nan()));
    let error = one_line(packed_rows(&ids, &w, &device).unwrap_err());
    assert!(error.contains("expected one below the 5 rows"), "{error}");
}

const GRIDS: [(i32, i32); 6] = [(-2, 1), (0, 3), (-4, 3), (-8, 7), (-128, 127), (0, 255)];

#[test]
fn sums_of_codes_are_exact() {
    let Some(device) = device() else { return };
    for (i, (rows, cols)) in [(1, 1), (3, 5), (33, 130), (300, 40), (10, 300)].into_iter().enumerate() {
        for bits_ in 2..=8 {
            for (lo, hi) in GRIDS {
                let w = weight(bits_, i, (rows, cols), None, 1.0);
                let tokens = if bits_ % 2 == 0 { 6 } else { 66 };
                let draw = flat(&values(&[tokens, cols], 5)).into_iter();
                let q = draw.map(|v| (f64::from(lo) + (v / 4.0 + 0.5) * f64::from(hi - lo)).round() as f32);
                let mut q: Vec<f32> = q.collect();
                q[cols] = f32::NAN;
                let q = Tensor::from_vec(q, (tokens / 3, 3, cols), &Device::Cpu).unwrap();
                let step = Tensor::new(&[0.5f32, 0.3, 2.0], &Device::Cpu).unwrap();
                let bound = lo.unsigned_abs().max(hi.unsigned_abs());
                let want = packed_codes_matmul(&q, bound, &step, &w).unwrap();
                let [q, step] = [q, step].map(|t| t.to_device(&device).unwrap());
                let got = packed_codes_matmul(&q, bound, &step, &w).unwrap();
                assert_eq!(got.dims(), want.dims());
                // A NaN's own bits are nobody's.
                let of = |t: &Tensor| flat(t).iter().map(|v| (v.is_nan(), v + 0.0)).collect::<Vec<_>>();
                for (i, (got, want)) in of(&got).into_iter().zip(of(&want)).enumerate() {
                    let same = got.0 == want.0 && (got.0 || got.1 == want.1);
                    assert!(same, "{bits_} bits by {lo}..{hi} [{rows}, {cols}] at {i}: {got:?} {want:?}");
                }
            }
        }
    }
    // Steps within a row: a sum of floats.
    let w = weight(4, 0, (33, 130), Some(64), 1.0);
    let q = (values(&[4, 130], 5) * 2.0).unwrap().round().unwrap();
    let step = Tensor::new(&[0.5f32, 0.25], &Device::Cpu).unwrap();
    let want = packed_codes_matmul(&q, 4, &step, &w).unwrap();
    let [q, step] = [q, step].map(|t| t.to_device(&device).unwrap());
    close("groups", &packed_codes_matmul(&q, 4, &step, &w).unwrap(), &want, 2e-5);
}

#[test]
fn codes_made_on_the_way_are_those_of_the_quantizer() {
    let Some(device) = device() else { return };
    for (i, (rows, cols)) in [(3, 5), (33, 130), (40, 192), (10, 300)].into_iter().enumerate() {
        for bits_ in 2..=8 {
            for (n, (lo, hi)) in GRIDS.into_iter().enumerate() {
                let w = weight(bits_, i, (rows, cols), None, 1.0);
                let tokens = [6, 66][n % 2];
                let levels = Levels { lo, hi, half: false };
                // Steps of one sixteenth of a power of two, and values on multiples of them, make ties; one is too small.
                let step = Tensor::new(&[0.25f32, 1e-7, 0.3], &Device::Cpu).unwrap();
                let size = if hi > 100 { 8.0 } else { 0.5 };
                let x = ((values(&[tokens, cols], 6) * size).unwrap() * 8.0).unwrap().round().unwrap();
                let x = (x / 8.0).unwrap();
                let shift = (n % 3 > 0).then(|| (values(&[cols], 7) * 0.2).unwrap());
                let bias = (n % 2 > 0).then(|| values(&[rows], 8));
                let run = |x: &Tensor, step: &Tensor, shift: &Option<Tensor>, bias: &Option<Tensor>| {
                    let rounding = Rounding { step: step.clone(), shift: shift.clone(), levels };
                    packed_quantized_matmul(x, rounding, &w, bias.as_ref()).unwrap()
                };
                let there = |t: &Option<Tensor>| t.as_ref().map(|t| t.to_device(&device).unwrap());
                for (dtype, _) in TYPES {
                    let x = x.to_dtype(dtype).unwrap();
                    let wide = x.to_dtype(DType::F32).unwrap();
                    let want = run(&wide, &step, &shift, &bias).unwrap().to_dtype(dtype).unwrap();
                    let (shift, bias) = (there(&shift), there(&bias));
                    let (x, step) = (x.to_device(&device).unwrap(), step.to_device(&device).unwrap());
                    let got = run(&x, &step, &shift, &bias).unwrap();
                    assert_eq!(got.dtype(), dtype);
                    let of = |t: &Tensor| flat(t).into_iter().map(|v| v + 0.0).collect::<Vec<_>>();
                    assert_eq!(of(&got), of(&want), "{dtype:?}, {bits_} bits by {lo}..{hi} [{rows}, {cols}]");
                }
            }
        }
    }
    // So many that a block takes 64 of them at once.
    for bits_ in [2, 3, 4, 8] {
        let w = weight(bits_, 1, (3, 70), None, 1.0);
        let x = values(&[64 * 140, 70], 6);
        let run = |device: &Device| {
            let step = Tensor::new(&[0.25f32, 0.3], device).unwrap();
            let rounding = Rounding { step, shift: None, levels: Levels::signed(4) };
            packed_quantized_matmul(&x.to_device(device).unwrap(), rounding, &w, None).unwrap().unwrap()
        };
        assert_eq!(bits(&run(&device)), bits(&run(&Device::Cpu)), "{bits_} bits, many tokens");
    }
    // There is none for steps within a row.
    let w = weight(4, 0, (33, 130), Some(64), 1.0);
    let x = values(&[4, 130], 5).to_device(&device).unwrap();
    let step = Tensor::ones(1, DType::F32, &device).unwrap();
    let rounding = Rounding { step, shift: None, levels: Levels::signed(4) };
    assert!(packed_quantized_matmul(&x, rounding, &w, None).unwrap().is_none());
}

#[test]
fn frozen_rows_of_any_type() {
    let Some(device) = device() else { return };
    for (n, k, tokens) in [(7, 5, 3), (70, 130, 17)] {
        for (dtype, _) in TYPES {
            let w = values(&[n, k], 2).to_dtype(dtype).unwrap();
            let there = w.to_device(&device).unwrap();
            let x = values(&[tokens, k], 3);
            let leaf =
                |device: &Device| candle_core::Var::from_tensor(&x.to_device(device).unwrap()).unwrap();
            let run = |x: &candle_core::Var, w: &Tensor| {
                let y = frozen_rows_matmul(x.as_tensor(), w).unwrap();
                let g = values(&[tokens, n], 4).to_device(x.device()).unwrap();
                let found = (&y * &g).unwrap().sum_all().unwrap().backward().unwrap();
                (y.detach(), found.get(x).unwrap().clone())
            };
            let (y, dx) = run(&leaf(&device), &there);
            let (want, want_dx) = run(&leaf(&Device::Cpu), &w);
            close("frozen rows", &y, &want, 2e-5);
            close("frozen rows, gradient", &dx, &want_dx, 2e-5);
        }
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let Some(device) = device() else { return };
    let w = weight(4, 0, (5, 40), None, 1.0);
    let x = Tensor::zeros((2, 41), DType::F32, &device).unwrap();
    assert!(one_line(packed_matmul(&x, &w).unwrap_err()).contains("found 41 input features, expected 40"));
    let x = Tensor::zeros((4, 40), DType::F32, &device).unwrap();
    let step = Tensor::ones(3, DType::F32, &device).unwrap();
    assert!(
        one_line(packed_codes_matmul(&x, 3, &step, &w).unwrap_err()).contains("found 3 steps for 4 tokens")
    );
    let step = Tensor::ones(4, DType::F32, &device).unwrap();
    let shift = Some(Tensor::ones(39, DType::F32, &device).unwrap());
    let rounding = Rounding { step: step.clone(), shift, levels: Levels::signed(4) };
    let error = packed_quantized_matmul(&x, rounding, &w, None).unwrap_err();
    assert!(one_line(error).contains("found 39 shifts, expected 40"));
    let rounding = Rounding { step, shift: None, levels: Levels::signed(4) };
    let bias = Tensor::ones(6, DType::F32, &device).unwrap();
    assert!(
        one_line(packed_quantized_matmul(&x, rounding, &w, Some(&bias)).unwrap_err()).contains("a bias [5]")
    );
}

#[test]
fn a_packed_weight_reads_alike() {
    let Some(device) = device() else { return };
    let w = values(&[70, 96], 1);
    for (bits_, group) in [(2, None), (3, Some(32)), (4, Some(10)), (8, Some(64))] {
        let grid = Grid::new(bits_, qtune::weights::Centering::Signed).unwrap();
        let here = Packed::fit(&w, grid, group).unwrap().0;
        let there = here.clone().to_device(&device);
        assert_eq!(bits(&there.tensor().unwrap()), bits(&here.tensor().unwrap()));
        assert_eq!(bits(&there.codes().unwrap()), bits(&here.codes().unwrap()));
        let rows = |p: &Packed| bits(&p.select_rows(&[69, 0, 3]).unwrap());
        assert_eq!(rows(&there), rows(&here));
        assert!(there.select_rows(&[70]).is_err());
        let [here, there] = [here, there].map(|p| Weight::from(qtune::weights::Expr::Packed(p)));
        let ids = Tensor::new(&[[1u32, 69], [0, 5]], &Device::Cpu).unwrap();
        let want = here.rows(&ids).unwrap();
        assert!(there.rows(&(&ids + 1f64).unwrap()).is_err());
        for ids in [ids.clone(), ids.to_device(&device).unwrap()] {
            let got = there.rows(&ids).unwrap();
            assert!(got.device().is_cuda());
            assert_eq!((got.dims(), bits(&got)), (want.dims(), bits(&want)));
        }
        let x = values(&[3, 96], 2);
        let got = there.matmul(&x.to_device(&device).unwrap()).unwrap();
        close("matmul", &got, &here.matmul(&x).unwrap(), 2e-5);
    }
}

/// A small ViT in training, its taps calibrated.
fn vit(bits: u8, act_bits: u8) -> (VitConfig, Weights, Tensor) {
    let config = VitConfig {
        image_size: (8, 8),
        patch_size: 4,
        channels: 3,
        hidden: 24,
        layers: 2,
        heads: 3,
        mlp: 37,
        eps: 1e-6,
        qkv_bias: true,
        distilled: false,
        two_heads: false,
        classes: (0..5).map(|i| i.to_string()).collect(),
    };
    let shapes = config.shapes().into_iter().enumerate();
    let tensors = shapes.map(|(i, (name, shape))| {
        let width = shape[1..].iter().product::<usize>() as f64;
        let plain = values(&shape, i as u64);
        let tensor = match (shape.len(), name.contains("norm") && name.ends_with("weight")) {
            (_, true) => plain.affine(0.1, 1.0),
            (1, _) => plain.affine(0.1, 0.0),
            _ => plain.affine(1.0 / width.sqrt(), 0.0),
        };
        (name, tensor.unwrap())
    });
    let mut store = Weights::from_tensors(tensors).trainable().unwrap();
    let layers: Vec<(String, Weight)> = store
        .iter()
        .filter(|(name, w)| name.contains("encoder.layer") && w.shape().unwrap().len() == 2)
        .map(|(name, w)| (name.to_string(), w.clone()))
        .collect();
    for (name, weight) in layers {
        let rule = WeightQuant::Statsq.training(bits, None, &weight.tensor().unwrap()).unwrap();
        store.wrap(&name, rule).unwrap();
    }
    let images = values(&[3, 3, 8, 8], 50);
    let calibration = Calibration::new(Box::new(move |_, site, x| {
        let (rule, _) = ActQuant::fit(if site.edge { 8 } else { act_bits }, site, x)?;
        Ok(Some(Arc::new(rule) as Arc<dyn Transform>))
    }));
    Vit::new(&config, &store.calibrating(calibration.clone())).unwrap().forward(&images).unwrap();
    for (name, rule) in calibration.rules().unwrap() {
        store.hang(name, rule);
    }
    (config, store, images)
}

/// A packed model as it is written and opened again, on the device.
#[test]
fn a_packed_model_goes_on_codes() {
    let Some(device) = device() else { return };
    for (w, a) in [(2, 2), (3, 3), (4, 4), (2, 8)] {
        let (config, store, images) = vit(w, a);
        let packed = store.packed().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        checkpoint::save(&path, &stored_tensors(&packed).unwrap(), &BTreeMap::new()).unwrap();
        let (file, how) = (Checkpoint::open(&path).unwrap(), QuantizationConfig::of(&packed));
        let open = |device: &Device| {
            let revive = |name: &str, value: &_, read: &dyn Fn(&str) -> qtune::Result<Option<Tensor>>| {
                Ok(Arc::new(ActQuant::revive(name, value, read, false)?) as Arc<dyn Transform>)
            };
            Vit::new(&config, &how.open(&file, device, &revive).unwrap()).unwrap()
        };
        let want = open(&Device::Cpu).forward(&images).unwrap().class;
        let got = open(&device).forward(&images.to_device(&device).unwrap()).unwrap().class;
        assert!(got.device().is_cuda());
        close(&format!("W{w}A{a}"), &got, &want, 1e-3);
    }
}
