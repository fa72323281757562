//! Rotations, factors, dropout, rows of tables.

use std::sync::Arc;

use crate::beside::refusal;
use crate::device::{agrees, agrees_within, bits, device, values, TYPES};
use candle_core::{DType, Device, Tensor};
use qtune::kernels::{self, reference, DropoutMask, Rotations};

#[test]
fn rope() {
    let Some(device) = device() else { return };
    // Pairs by 16 bytes and one by one, more than a block of threads for a token, and more tokens than a block of rows.
    for (b, t, heads, d) in [
        (1, 1, 1, 2),
        (2, 3, 2, 4),
        (1, 7, 3, 6),
        (3, 5, 1, 10),
        (2, 9, 3, 16),
        (1, 2, 40, 32),
        (1, 300, 2, 8),
    ] {
        let frequencies: Vec<f64> = (0..d / 2).map(|i| 0.9f64.powi(i)).collect();
        let rotations = Rotations::new(&frequencies, 400, 1.25);
        let positions: Arc<[u32]> = (0..b * t).map(|i| (i * 7 % 400) as u32).collect();
        let x = [values(&[b, t, heads * d as usize], 1)];
        agrees(&device, &x, &|x| kernels::rope(&x[0], heads, &positions, &rotations), &|x| {
            reference::rope(&x[0], heads, &positions, &rotations)
        });
        // Other positions on the same tables.
        let positions: Arc<[u32]> = (0..b * t).map(|i| (i * 5 % 17) as u32).collect();
        agrees(&device, &x, &|x| kernels::rope(&x[0], heads, &positions, &rotations), &|x| {
            reference::rope(&x[0], heads, &positions, &rotations)
        });
    }
    let rotations = Rotations::new(&[1.0], 2, 1.0);
    let x = values(&[1, 2, 2], 1).to_device(&device).unwrap();
    assert!(refusal(kernels::rope(&x, 1, &[0, 2].into(), &rotations)).contains("below 2, got 2"));
    // f64 takes the reference.
    let wide = x.to_dtype(DType::F64).unwrap();
    assert_eq!(kernels::rope(&wide, 1, &[0, 1].into(), &rotations).unwrap().dtype(), DType::F64);
}

#[test]
fn factors() {
    let Some(device) = device() else { return };
    for (shape, lead) in [
        (vec![3], 1),
        (vec![3, 5], 1),
        (vec![2, 3, 5, 4], 2),
        (vec![4, 6], 2),
        (vec![2, 70, 33], 2),
        (vec![3, 2100], 1),
    ] {
        let f = values(&shape[..lead], 2);
        let of = |t: &[Tensor]| f.to_dtype(t[0].dtype())?.to_device(t[0].device());
        // The factors are rounded as x is, in both.
        for (dtype, _) in TYPES {
            let x = values(&shape, 1).to_dtype(dtype).unwrap();
            let there = kernels::scale_leading(
                &x.to_device(&device).unwrap(),
                &of(&[x.to_device(&device).unwrap()]).unwrap(),
            );
            let here = kernels::scale_leading(&x, &of(std::slice::from_ref(&x)).unwrap()).unwrap();
            assert_eq!(bits(&there.unwrap()), bits(&here), "{dtype:?} {shape:?}");
        }
        agrees(&device, &[values(&shape, 1)], &|t| kernels::scale_leading(&t[0], &of(t)?), &|t| {
            reference::scale_leading(&t[0], &of(t)?)
        });
    }
    let x = values(&[2, 3], 1).to_device(&device).unwrap();
    let f = values(&[3], 1).to_device(&device).unwrap();
    assert!(refusal(kernels::scale_leading(&x, &f)).contains("begins [2, 3], got [3]"));
    let here = refusal(kernels::scale_leading(&x, &values(&[2], 1)));
    assert!(here.contains("expected the factors on"), "{here}");
}

/// The masks of the CPU, to the bit, across the border of a chunk of draws and in views.
#[test]
fn dropout() {
    let Some(device) = device() else { return };
    let mask = |p: f64, pass| DropoutMask { p, seed: 0xdead_beef_0123_4567, name: "layers.3.q".into(), pass };
    for (count, p) in [(1, 0.5), (7, 0.1), (1000, 0.25), (16_384 + 13, 0.9), (333, 1.0 - 2f64.powi(-25))] {
        for (dtype, _) in TYPES {
            let x = (values(&[count], 1).abs().unwrap() + 0.1).unwrap().to_dtype(dtype).unwrap();
            let there = x.to_device(&device).unwrap();
            for pass in [0, 3] {
                let want = kernels::dropout(&x, mask(p, pass)).unwrap();
                assert_eq!(
                    bits(&kernels::dropout(&there, mask(p, pass)).unwrap()),
                    bits(&want),
                    "{count} {p} {dtype:?}"
                );
            }
        }
    }
    let x = [values(&[5, 33], 1)];
    agrees(&device, &x, &|t| kernels::dropout(&t[0], mask(0.4, 2)), &|t| {
        reference::dropout(&t[0], &mask(0.4, 2))
    });
    // A view whose elements begin between two accesses of 16 bytes.
    let rows = values(&[4, 3], 1).to_device(&device).unwrap().narrow(0, 1, 3).unwrap();
    let here = kernels::dropout(&rows.to_device(&Device::Cpu).unwrap(), mask(0.5, 1)).unwrap();
    assert_eq!(bits(&kernels::dropout(&rows, mask(0.5, 1)).unwrap()), bits(&here));
    assert!(refusal(kernels::dropout(&rows, mask(1.0, 1))).contains("from 0 to below 1"));
}

#[test]
fn rows_of_a_table() {
    let Some(device) = device() else { return };
    let many: Vec<u32> = (0..300).map(|i| i * i % 11).collect();
    for (rows, width, ids) in [
        (1, 1, vec![0]),
        (5, 3, vec![2, 0, 2, 4]),
        (7, 33, vec![6, 6, 6]),
        (11, 8, many),
        (3, 2100, vec![2, 1, 2]),
    ] {
        let here = Tensor::from_slice(&ids, ids.len(), &Device::Cpu).unwrap();
        let there = here.to_device(&device).unwrap();
        // Sums of up to thirty rows.
        agrees_within(
            &device,
            &[values(&[rows, width], 1)],
            2.0,
            &|t| kernels::pick_rows(&t[0], if t[0].device().is_cpu() { &here } else { &there }),
            &|t| reference::pick_rows(&t[0], &here),
        );
    }
}
