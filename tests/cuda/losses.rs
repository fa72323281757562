//! Losses, and the classifier whose logits are never all there.

use crate::beside::refusal;
use crate::device::{agrees_within, close, device, flat, run, values, F32, TYPES};
use candle_core::{DType, Device, Tensor, Var};
use qtune::kernels::{self, reference};

fn labels(b: usize, k: usize) -> Tensor {
    Tensor::from_vec((0..b).map(|i| (i * 5 % k) as u32).collect::<Vec<_>>(), b, &Device::Cpu).unwrap()
}

#[test]
fn cross_entropy() {
    let Some(device) = device() else { return };
    // A warp to a row, 256 threads, 512 threads; rows that are aligned to 16 bytes and others.
    for (b, k) in [(1, 1), (3, 5), (7, 13), (5, 64), (130, 3), (2, 1025), (2, 2048), (2, 17_001)] {
        let here = labels(b, k);
        let there = here.to_device(&device).unwrap();
        let z = [(values(&[b, k], 1) * 4.0).unwrap()];
        agrees_within(
            &device,
            &z,
            2.0,
            &|t| kernels::cross_entropy(&t[0], if t[0].device().is_cpu() { &here } else { &there }),
            &|t| reference::cross_entropy(&t[0], &here),
        );
    }
}

#[test]
fn soft_cross_entropy() {
    let Some(device) = device() else { return };
    for (b, k) in [(1, 1), (3, 5), (7, 13), (5, 64), (130, 3), (2, 1025), (2, 2048), (2, 17_001)] {
        // Not normalized, and negative in places: the equation does not ask.
        let p = (values(&[b, k], 2) / k as f64).unwrap();
        for (dtype, tolerance) in TYPES {
            let p = p.to_dtype(dtype).unwrap();
            let z = values(&[b, k], 1).to_dtype(dtype).unwrap();
            let wide = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
            let [want, _] = run(&[wide(&z)], dtype, &|t| reference::soft_cross_entropy(&t[0], &wide(&p)));
            let there = p.to_device(&device).unwrap();
            for got in
                run(&[z.to_device(&device).unwrap()], dtype, &|t| kernels::soft_cross_entropy(&t[0], &there))
            {
                for (got, want) in got.iter().zip(&want) {
                    assert_eq!(got.dtype(), dtype);
                    close(&format!("{dtype:?} {b} {k}"), got, want, tolerance);
                }
            }
        }
    }
}

#[test]
fn far_out_and_what_is_not_a_number() {
    let Some(device) = device() else { return };
    let t = |data: &[f32], shape: (usize, usize)| Tensor::from_slice(data, shape, &device).unwrap();
    let ids = |ids: &[u32]| Tensor::from_slice(ids, ids.len(), &device).unwrap();
    let z = t(&[0.0, 0.0, 1000.0, 0.0], (2, 2));
    let loss = kernels::cross_entropy(&z, &ids(&[1, 1])).unwrap();
    let want = (2f64.ln() + 1000.0) / 2.0;
    assert!((flat(&loss)[0] - want).abs() < F32 * want);
    // Logits of -inf count nothing; a class without probability costs nothing, whatever its logit.
    let z = t(&[f32::NEG_INFINITY, 0.0, 0.0], (1, 3));
    assert!((flat(&kernels::cross_entropy(&z, &ids(&[1])).unwrap())[0] - 2f64.ln()).abs() < F32);
    let p = t(&[0.0, 0.5, 0.5], (1, 3));
    assert!((flat(&kernels::soft_cross_entropy(&z, &p).unwrap())[0] - 2f64.ln()).abs() < F32);
    let nan = t(&[f32::NAN, 0.0, 1.0], (1, 3));
    assert!(flat(&kernels::cross_entropy(&nan, &ids(&[1])).unwrap())[0].is_nan());
    assert!(flat(&kernels::soft_cross_entropy(&nan, &p).unwrap())[0].is_nan());
    // A label that is none is found where the loss is read.
    for dtype in [DType::F32, DType::BF16] {
        let z = values(&[3, 4], 1).to_dtype(dtype).unwrap().to_device(&device).unwrap();
        for bad in [4, u32::MAX] {
            assert!(flat(&kernels::cross_entropy(&z, &ids(&[0, bad, 1])).unwrap())[0].is_nan());
            let w = values(&[4, 4], 2).to_dtype(dtype).unwrap().to_device(&device).unwrap();
            assert!(flat(&kernels::classifier_cross_entropy(&z, &w, &ids(&[0, bad, 1])).unwrap())[0].is_nan());
        }
    }
    assert!(refusal(kernels::cross_entropy(&z, &ids(&[0, 1]))).contains("labels [1] in U32, got [2]"));
    assert!(refusal(kernels::cross_entropy(&z, &labels(1, 3))).contains("on the device of the logits"));
    assert!(
        refusal(kernels::soft_cross_entropy(&z, &t(&[0.0; 4], (2, 2)))).contains("probs [1, 3], got [2, 2]")
    );
}

/// One chunk, several with a shorter last one, a row to a chunk; both gradients, and each alone.
#[test]
fn a_classifier_in_chunks() {
    let Some(device) = device() else { return };
    for (n, d, v, rows) in [(1, 1, 1, 1), (5, 3, 7, 2), (9, 8, 16, 4), (7, 5, 33, 100), (3, 4, 1030, 1)] {
        let here = labels(n, v);
        let there = here.to_device(&device).unwrap();
        let t = [values(&[n, d], 1), values(&[v, d], 2)];
        for (dtype, tolerance) in TYPES {
            // Bytes that hold so many rows of logits and their gradient.
            let chunk = rows * v.next_multiple_of(8) * if dtype == DType::F32 { 4 } else { 6 };
            let rounded: Vec<Tensor> = t.iter().map(|t| t.to_dtype(dtype).unwrap()).collect();
            let wide: Vec<Tensor> = rounded.iter().map(|t| t.to_dtype(DType::F32).unwrap()).collect();
            let [want, _] =
                run(&wide, DType::F32, &|t| reference::classifier_cross_entropy(&t[0], &t[1], &here));
            let on: Vec<Tensor> = rounded.iter().map(|t| t.to_device(&device).unwrap()).collect();
            let what = format!("{dtype:?}, [{n}, {d}] and [{v}, {d}] by {rows} rows");
            for got in run(&on, DType::F32, &|t| {
                // As the harness weights it, a loss of the type of its input.
                kernels::classifier_cross_entropy_in(&t[0], &t[1], &there, chunk)
            }) {
                assert_eq!(got[0].dtype(), DType::F32);
                // The logits are f32 whatever the operands are: the loss is as near.
                close(&what, &got[0], &want[0], F32);
                for (got, want) in got[1..].iter().zip(&want[1..]) {
                    assert_eq!(got.dtype(), dtype);
                    close(&what, got, want, tolerance);
                }
            }
            // One alone, as with a frozen matrix; and nothing.
            for which in [0, 1] {
                let op = |x: &[Tensor]| {
                    let mut all = on.clone();
                    all[which] = x[0].clone();
                    kernels::classifier_cross_entropy_in(&all[0], &all[1], &there, chunk)
                };
                for got in run(std::slice::from_ref(&on[which]), DType::F32, &op) {
                    close(&what, &got[1], &want[1 + which], tolerance);
                }
            }
            let loss = kernels::classifier_cross_entropy_in(&on[0], &on[1], &there, chunk).unwrap();
            close(&what, &loss, &want[0], F32);
        }
    }
}

/// Two walks over one graph, as candle allows: the second finds the gradients gone and makes them again.
#[test]
fn a_classifier_is_walked_twice() {
    let Some(device) = device() else { return };
    let on = |t: &Tensor| Var::from_tensor(&t.to_device(&device).unwrap()).unwrap();
    let (h, w) = (on(&values(&[4, 3], 1)), on(&values(&[5, 3], 2)));
    let ids = labels(4, 5).to_device(&device).unwrap();
    let loss = (kernels::classifier_cross_entropy(&h, &w, &ids).unwrap() * 3.0).unwrap();
    let (first, second) = (loss.backward().unwrap(), loss.backward().unwrap());
    for var in [&h, &w] {
        close("again", second.get(var).unwrap(), first.get(var).unwrap(), 1e-7);
    }
}

#[test]
fn a_classifier_of_f64_is_composed() {
    let Some(device) = device() else { return };
    let on = |t: Tensor| t.to_dtype(DType::F64).unwrap().to_device(&device).unwrap();
    let (h, w, y) = (on(values(&[4, 3], 1)), on(values(&[5, 3], 2)), labels(4, 5));
    let loss = kernels::classifier_cross_entropy(&h, &w, &y.to_device(&device).unwrap()).unwrap();
    let want = reference::classifier_cross_entropy(&values(&[4, 3], 1), &values(&[5, 3], 2), &y).unwrap();
    assert_eq!(loss.dtype(), DType::F64);
    close("f64", &loss, &want, F32);
}

#[test]
fn plackett_luce() {
    let Some(device) = device() else { return };
    for (b, k) in [(1, 1), (3, 5), (7, 13), (2, 70)] {
        let here =
            Tensor::from_vec((0..b).map(|i| ((i * 5 + 1) % k) as u32).collect::<Vec<_>>(), b, &Device::Cpu)
                .unwrap();
        let there = here.to_device(&device).unwrap();
        let p = kernels::softmax(&values(&[b, k], 2)).unwrap();
        for (dtype, tolerance) in TYPES {
            let p = p.to_dtype(dtype).unwrap();
            let z = values(&[b, k], 1).to_dtype(dtype).unwrap();
            let wide = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
            let [want, _] = run(&[wide(&z)], dtype, &|t| kernels::plackett_luce(&t[0], &wide(&p), &here));
            let teacher = p.to_device(&device).unwrap();
            for got in run(&[z.to_device(&device).unwrap()], dtype, &|t| {
                kernels::plackett_luce(&t[0], &teacher, &there)
            }) {
                for (got, want) in got.iter().zip(&want) {
                    close(&format!("{dtype:?} {b} {k}"), got, want, tolerance);
                }
            }
        }
    }
}
