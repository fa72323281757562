//! Adapters over frozen weights: their products, merges and transforms.

use std::sync::atomic::AtomicU64;
use std::sync::Arc;

use crate::beside::{agrees_beside, refusal};
use crate::device::{agrees_within, bits, close, device, flat, run, values, F32, TYPES};
use candle_core::{DType, Device, Result, Tensor, Var};
use qtune::kernels::{self, reference, FrozenRows};
use qtune::random::Random;
use qtune::transform::{Bat, Dora, Dropout, EmbeddingLora, Lora, LoraInit, Mini, Miss};
use qtune::weights::{Transform, Weight};

/// Small, so that sums of products are of the size that tolerances are for.
fn small(shape: &[usize], seed: u64) -> Tensor {
    (values(shape, seed) * 0.3).unwrap()
}

/// A frozen weight of a type on the device of x: that of x, or another.
fn rows_of(w: &Tensor, x: &Tensor, dtype: DType) -> Result<FrozenRows> {
    FrozenRows::dense(&w.to_dtype(dtype)?.to_device(x.device())?)
}

#[test]
fn block_sums() {
    let Some(device) = device() else { return };
    // Slices that a row of threads holds several of, one of, and less than one of; short last ones; 256 threads a row.
    for (x, r) in [
        (vec![1, 1], 1),
        (vec![3, 5], 2),
        (vec![2, 7, 13], 13),
        (vec![5, 37], 3),
        (vec![2, 64], 8),
        (vec![2, 48], 16),
        (vec![3, 50], 17),
        (vec![2, 300], 40),
        (vec![2, 1032], 24),
        (vec![1, 2100], 300),
        (vec![1, 4608], 2304),
    ] {
        agrees_within(&device, &[small(&x, 1)], 2.0, &|t| kernels::block_sum(&t[0], r), &|t| {
            reference::block_sum(&t[0], r)
        });
    }
    let x = values(&[3, 5], 1).to_device(&device).unwrap();
    assert!(refusal(kernels::block_sum(&x, 6)).contains("slices of 1 to 5"));
}

#[test]
fn low_rank_and_shared_block() {
    let Some(device) = device() else { return };
    for (x, o, r) in [
        (vec![1, 1], 1, 1),
        (vec![2, 3, 5], 7, 2),
        (vec![9, 6], 4, 3),
        (vec![1, 33], 17, 4),
        (vec![9, 40], 24, 16),
    ] {
        let i = x[x.len() - 1];
        let w = small(&[o, i], 2);
        let x = small(&x, 1);
        // The weight in the type of x, and in each of the types whatever that of x is.
        for stored in [None, Some(DType::F32), Some(DType::F16), Some(DType::BF16)] {
            let rows = |t: &Tensor| rows_of(&w, t, stored.unwrap_or(t.dtype()));
            // The reference gets x in f32: the weight is rounded as the device has it.
            for (dtype, _) in TYPES {
                let t = [small(&[r, o], 3)];
                let half = x.to_dtype(dtype).unwrap();
                let plain = FrozenRows::dense(&w.to_dtype(stored.unwrap_or(dtype)).unwrap()).unwrap();
                let [want, _] = run(&[half.to_dtype(DType::F32).unwrap(), t[0].clone()], dtype, &|t| {
                    reference::shared_block(&t[0], &plain, &t[1])
                });
                let on = [half.to_device(&device).unwrap(), t[0].to_device(&device).unwrap()];
                let tolerance = TYPES.iter().find(|(d, _)| *d == dtype).unwrap().1 * 2.0;
                for got in run(&on, dtype, &|t| kernels::shared_block(&t[0], &rows(&t[0])?, &t[1])) {
                    assert_eq!((got[0].dtype(), got[2].dtype()), (dtype, DType::F32));
                    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                        close(&format!("shared block, {dtype:?} on {stored:?}, {i}"), got, want, tolerance);
                    }
                }
                let t = [small(&[r, i], 3), small(&[o, r], 4)];
                let inputs = [half.to_dtype(DType::F32).unwrap(), t[0].clone(), t[1].clone()];
                let [want, _] =
                    run(&inputs, dtype, &|t| reference::low_rank(&t[0], &plain, &t[1], &t[2], 0.75));
                let on = [&half, &t[0], &t[1]].map(|t| t.to_device(&device).unwrap());
                for got in run(&on, dtype, &|t| kernels::low_rank(&t[0], &rows(&t[0])?, &t[1], &t[2], 0.75)) {
                    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                        close(&format!("low rank, {dtype:?} on {stored:?}, {i}"), got, want, tolerance);
                    }
                }
            }
        }
        let x = std::slice::from_ref(&x);
        agrees_beside(
            &device,
            x,
            &[small(&[r, i], 3), small(&[o, r], 4)],
            2.0,
            &|t| kernels::low_rank_change(&t[0], &t[1], &t[2], 0.75),
            &|t| kernels::low_rank_change(&t[0], &t[1], &t[2], 0.75),
        );
        agrees_beside(
            &device,
            x,
            &[small(&[r, o], 3)],
            2.0,
            &|t| kernels::shared_block_change(&t[0], &t[1]),
            &|t| kernels::shared_block_change(&t[0], &t[1]),
        );
    }
    let x = values(&[3, 5], 1).to_device(&device).unwrap();
    let rows = FrozenRows::dense(&x).unwrap();
    assert!(refusal(kernels::shared_block(&x, &rows, &values(&[6, 3], 1).to_device(&device).unwrap()))
        .contains("r from 1 to 5"));
    let half = values(&[2, 5], 1).to_dtype(DType::F16).unwrap().to_device(&device).unwrap();
    assert!(refusal(kernels::low_rank(&x, &rows, &half, &half, 1.0)).contains("expected a in F32"));
}

#[test]
fn block_affine() {
    let Some(device) = device() else { return };
    // Tiles of 16, 32 and 64 columns and more than one of them; slices beyond 128 and in parts.
    for (x, o, r) in [
        (vec![1, 1], 1, 1),
        (vec![2, 3, 6], 9, 3),
        (vec![5, 10], 15, 5),
        (vec![3, 34], 34, 17),
        (vec![3, 144], 32, 16),
        (vec![3, 120], 40, 40),
        (vec![2, 70], 140, 70),
        (vec![2, 264], 12, 6),
    ] {
        let i = x[x.len() - 1];
        let (w, x, b) = (small(&[o, i], 2), small(&x, 1), small(&[o / r, r, r], 3));
        for stored in [None, Some(DType::F32), Some(DType::BF16)] {
            for (dtype, tolerance) in TYPES {
                let half = x.to_dtype(dtype).unwrap();
                let plain = FrozenRows::dense(&w.to_dtype(stored.unwrap_or(dtype)).unwrap()).unwrap();
                let inputs = [half.to_dtype(DType::F32).unwrap(), b.clone()];
                let [want, _] = run(&inputs, dtype, &|t| reference::block_affine(&t[0], &plain, &t[1]));
                let on = [&half, &b].map(|t| t.to_device(&device).unwrap());
                let op = |t: &[Tensor]| {
                    kernels::block_affine(&t[0], &rows_of(&w, &t[0], stored.unwrap_or(dtype))?, &t[1])
                };
                // Sums of some hundred terms of size one.
                let tolerance = if dtype == DType::F32 { tolerance * 2.0 } else { tolerance * 4.0 };
                for got in run(&on, dtype, &op) {
                    assert_eq!((got[0].dtype(), got[2].dtype()), (dtype, DType::F32));
                    for (at, (got, want)) in got.iter().zip(&want).enumerate() {
                        close(
                            &format!("{dtype:?} on {stored:?}, [{o}, {i}] by {r}, {at}"),
                            got,
                            want,
                            tolerance,
                        );
                    }
                }
            }
        }
    }
    let x = values(&[3, 6], 1).to_device(&device).unwrap();
    let rows = FrozenRows::dense(&x).unwrap();
    let b = values(&[1, 2, 2], 1).to_device(&device).unwrap();
    assert!(refusal(kernels::block_affine(&x, &rows, &b)).contains("r dividing 3 and 6"));
}

#[test]
fn lengths_and_columns() {
    let Some(device) = device() else { return };
    for (o, i, r) in [(1, 1, 1), (7, 13, 3), (9, 300, 4), (17, 40, 40)] {
        let (a, b) = (small(&[r, i], 2), small(&[o, r], 3));
        for (dtype, _) in TYPES {
            let w = small(&[o, i], 1).to_dtype(dtype).unwrap();
            let want = kernels::row_norms(&FrozenRows::dense(&w).unwrap(), &a, &b, 0.7).unwrap();
            let rows = FrozenRows::dense(&w.to_device(&device).unwrap()).unwrap();
            let on = |t: &Tensor| t.to_device(&device).unwrap();
            close("norms", &kernels::row_norms(&rows, &on(&a), &on(&b), 0.7).unwrap(), &want, F32);
        }
    }
    let zeros = Tensor::zeros((3, 5), DType::F32, &device).unwrap();
    let (a, b) =
        (Tensor::zeros((2, 5), DType::F32, &device).unwrap(), Tensor::zeros((3, 2), DType::F32, &device));
    let norms = kernels::row_norms(&FrozenRows::dense(&zeros).unwrap(), &a, &b.unwrap(), 1.0).unwrap();
    assert_eq!(flat(&norms), [1.0; 3]);
    for z in [vec![1, 1], vec![3, 5], vec![2, 4, 17], vec![300, 64], vec![20, 600]] {
        let width = z[z.len() - 1];
        let n = (values(&[width], 3).abs().unwrap() + 0.5).unwrap();
        let op = |t: &[Tensor]| kernels::scale_columns(&t[0], &t[1], &n.to_device(t[0].device())?);
        let like = |t: &[Tensor]| reference::scale_columns(&t[0], &t[1], &n);
        // So small that a gradient of m, a sum over all rows, is of the size that tolerances are for.
        let z = (small(&z, 1) / (z.iter().product::<usize>() as f64 / width as f64).sqrt()).unwrap();
        agrees_beside(&device, &[z], &[values(&[width], 2)], 2.0, &op, &like);
    }
    let z = values(&[3, 5], 1).to_device(&device).unwrap();
    let m = values(&[4], 1).to_device(&device).unwrap();
    assert!(refusal(kernels::scale_columns(&z, &m, &m)).contains("[5] for z [3, 5], got [4]"));
}

#[test]
fn merged() {
    let Some(device) = device() else { return };
    let both = |inputs: &[Tensor],
                op: &dyn Fn(&[Tensor]) -> Result<Tensor>,
                like: &dyn Fn(&[Tensor]) -> Result<Tensor>| {
        let [want, _] = run(inputs, DType::F32, like);
        let on: Vec<Tensor> = inputs.iter().map(|t| t.to_device(&device).unwrap()).collect();
        for got in run(&on, DType::F32, op) {
            for (got, want) in got.iter().zip(&want) {
                close("merged", got, want, F32);
            }
        }
    };
    for (o, i, r) in [(1, 1, 1), (3, 5, 2), (70, 130, 16)] {
        both(
            &[small(&[o, i], 1), small(&[r, i], 2), small(&[o, r], 3)],
            &|t| kernels::low_rank_merged(&t[0], &t[1], &t[2], 0.5),
            &|t| reference::low_rank_merged(&t[0], &t[1], &t[2], 0.5),
        );
        both(
            &[small(&[o, i], 1), small(&[r, o], 2)],
            &|t| kernels::shared_block_merged(&t[0], &t[1]),
            &|t| reference::shared_block_merged(&t[0], &t[1]),
        );
    }
    for (o, i, r) in [(1, 1, 1), (4, 6, 2), (66, 132, 33)] {
        both(
            &[small(&[o, i], 1), small(&[o / r, r, r], 2)],
            &|t| kernels::block_affine_merged(&t[0], &t[1]),
            &|t| reference::block_affine_merged(&t[0], &t[1]),
        );
    }
}

/// A frozen matrix in another type than x, and by panels.
#[test]
fn frozen_rows() {
    let Some(device) = device() else { return };
    for (tokens, o, i) in [(1, 1, 1), (3, 7, 5), (9, 40, 24)] {
        let (x, w) = (small(&[tokens, i], 1), small(&[o, i], 2));
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let w = w.to_dtype(dtype).unwrap();
            let wide = w.to_dtype(DType::F32).unwrap();
            let [want, _] =
                run(std::slice::from_ref(&x), DType::F32, &|t| reference::linear(&t[0], &wide, None));
            let there = w.to_device(&device).unwrap();
            for got in run(&[x.to_device(&device).unwrap()], DType::F32, &|t| {
                kernels::frozen_rows_matmul(&t[0], &there)
            }) {
                for (got, want) in got.iter().zip(&want) {
                    close("frozen rows", got, want, F32);
                }
            }
            let rows = FrozenRows::dense(&there).unwrap();
            let picked = rows.select(&[0, o as u32 - 1], &Device::Cpu).unwrap();
            let ids = Tensor::new(&[0u32, o as u32 - 1], &Device::Cpu).unwrap();
            assert_eq!(bits(&picked), bits(&wide.index_select(&ids, 0).unwrap()));
        }
    }
}

const SHAPE: (usize, usize) = (24, 36);

type Rule = (&'static str, Arc<dyn Transform>, Box<dyn Fn(&Device) -> Arc<dyn Transform>>);

/// Every adapter on the CPU and how it comes to a device, with or without dropout.
fn rules(dropped: bool) -> Vec<Rule> {
    let pass = Arc::new(AtomicU64::new(3));
    let drop = || dropped.then(|| Dropout::new(0.3, 5, "q", pass.clone()).unwrap());
    let mut random = Random::new(7, "adapters", &[]);
    let mut factors = |shape: &[usize]| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| 0.2 * random.normal()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let (o, i) = SHAPE;
    let bias = factors(&[o]);
    let lora = Lora::new(&factors(&[4, i]), &factors(&[o, 4]), 0.5, Some(&bias), drop(), true).unwrap();
    let magnitude = (factors(&[o]).abs().unwrap() + 1.0).unwrap();
    let dora = Dora::new(&factors(&[4, i]), &factors(&[o, 4]), &magnitude, 0.5, drop(), true).unwrap();
    let miss = Miss::new(&factors(&[5, o]), SHAPE, drop(), true).unwrap();
    let mini = Mini::new(&factors(&[5, 6]), SHAPE, drop(), true).unwrap();
    let bat = Bat::new(&factors(&[o / 12, 12, 12]), SHAPE, true).unwrap();
    let table = EmbeddingLora::new(&factors(&[3, o]), &factors(&[i, 3]), 0.5, true).unwrap();
    macro_rules! all {
        ($($name:literal $rule:ident),*) => {
            vec![$(($name, Arc::new($rule.clone()) as Arc<dyn Transform>, {
                let rule = $rule.clone();
                Box::new(move |device: &Device| Arc::new(rule.to_device(device).unwrap()) as Arc<dyn Transform>)
                    as Box<dyn Fn(&Device) -> Arc<dyn Transform>>
            })),*]
        };
    }
    all!["lora" lora, "dora" dora, "miss" miss, "mini" mini, "bat" bat, "embedding" table]
}

/// The product and its gradients: of x first, then of the trainables in their order.
fn learned(weight: &Weight, x: &Tensor) -> Vec<Tensor> {
    let x = Var::from_tensor(x).unwrap();
    let y = weight.matmul(x.as_tensor()).unwrap();
    let upstream = values(y.dims(), 77).to_dtype(y.dtype()).unwrap().to_device(y.device()).unwrap();
    let found = (&y * upstream).unwrap().sum_all().unwrap().backward().unwrap();
    let mut all = vec![y.detach(), found.get(&x).unwrap().clone()];
    all.extend(
        weight
            .params()
            .iter()
            .map(|(name, var, _)| found.get(var).unwrap_or_else(|| panic!("{name}")).clone()),
    );
    all
}

/// Each adapter on each kind of base: frozen in the type of x and in f32, and trained.
#[test]
fn transforms() {
    let Some(device) = device() else { return };
    let (w, x) = (small(&[SHAPE.0, SHAPE.1], 1), small(&[2, 3, SHAPE.1], 2));
    for (dtype, tolerance) in TYPES {
        for base in ["frozen", "frozen in f32", "trained"] {
            let stored = if base == "frozen" { dtype } else { DType::F32 };
            let (w, x) = (w.to_dtype(stored).unwrap(), x.to_dtype(dtype).unwrap());
            let of = |w: &Tensor| match base {
                "trained" => Weight::latent(w).unwrap(),
                _ => Weight::dense(w.clone()),
            };
            let (here, there) = (of(&w), of(&w.to_device(&device).unwrap()));
            for dropped in [false, true] {
                for (kind, rule, moved) in rules(dropped) {
                    let (here, there) = (here.wrap(rule), there.wrap(moved(&device)));
                    let what = format!("{kind}, {dtype:?}, {base}, dropout {dropped}");
                    assert!(there.device().is_cuda(), "{what}");
                    let want = learned(&here, &x.to_dtype(DType::F32).unwrap());
                    let got = learned(&there, &x.to_device(&device).unwrap());
                    assert_eq!(got.len(), want.len(), "{what}");
                    assert_eq!(got[0].dtype(), dtype, "{what}");
                    // Sums of up to a hundred products, each rounded twice.
                    let slack = if dtype == DType::F32 { 2.0 } else { 4.0 };
                    for (at, (got, want)) in got.iter().zip(&want).enumerate() {
                        close(&format!("{what}, {at}"), got, want, slack * tolerance);
                    }
                    let (merged, plain) = (there.tensor().unwrap(), here.tensor().unwrap());
                    close(&format!("{what}, merged"), &merged, &plain, F32);
                    assert!(there.settled().unwrap().params().is_empty());
                }
            }
        }
    }
}

#[test]
fn rows_of_an_adapted_table() {
    let Some(device) = device() else { return };
    let w = small(&[SHAPE.0, SHAPE.1], 1);
    let (_, rule, moved) = rules(false).pop().unwrap();
    let ids = Tensor::new(&[[3u32, 0], [23, 3]], &Device::Cpu).unwrap();
    let of = |weight: &Weight, ids: &Tensor| {
        let y = weight.rows(ids).unwrap();
        let upstream = values(y.dims(), 77).to_device(y.device()).unwrap();
        let found = (&y * upstream).unwrap().sum_all().unwrap().backward().unwrap();
        let grads = weight.params().into_iter().map(|(_, var, _)| found.get(&var).unwrap().clone());
        std::iter::once(y.detach()).chain(grads).collect::<Vec<_>>()
    };
    let want = of(&Weight::dense(w.clone()).wrap(rule), &ids);
    let got = of(
        &Weight::dense(w.to_device(&device).unwrap()).wrap(moved(&device)),
        &ids.to_device(&device).unwrap(),
    );
    for (got, want) in got.iter().zip(&want) {
        close("rows", got, want, F32);
    }
    // A trained table.
    let (here, there) =
        (Weight::latent(&w).unwrap(), Weight::latent(&w.to_device(&device).unwrap()).unwrap());
    for (got, want) in of(&there, &ids.to_device(&device).unwrap()).iter().zip(&of(&here, &ids)) {
        close("a trained table", got, want, F32);
    }
}

/// The start of DoRA takes the lengths of a weight where it lies.
#[test]
fn a_start_lies_where_its_weight_does() {
    let Some(device) = device() else { return };
    let w = small(&[SHAPE.0, SHAPE.1], 1);
    let start = |w: &Tensor| {
        let mut random = Random::new(1, "dora", &[]);
        let weight = Weight::dense(w.clone());
        Dora::start(3, &weight, 0.5, LoraInit::Kaiming, None, &mut random).unwrap().tensors()
    };
    for ((name, got), (_, want)) in start(&w.to_device(&device).unwrap()).iter().zip(start(&w)) {
        assert!(got.device().is_cuda(), "{name}");
        close(name, got, &want, F32);
    }
}

#[test]
fn signs() {
    let Some(device) = device() else { return };
    let theta = values(&[3, 7], 1);
    let op = |t: &[Tensor]| qtune::transform::sign(&t[0]).map_err(candle_core::Error::wrap);
    agrees_within(&device, &[theta], 1.0, &op, &op);
}
