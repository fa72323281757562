//! Norms, activations and products with a dense weight.

use crate::device::{agrees, agrees_within, device, values};
use qtune::kernels::{self, reference};

#[test]
fn layer_norm() {
    let Some(device) = device() else { return };
    for x in [vec![1, 1], vec![3, 5], vec![7, 13], vec![2, 3, 17], vec![2, 50], vec![300, 64], vec![2, 1000]]
    {
        let c = [x[x.len() - 1]];
        let inputs = [values(&x, 1), values(&c, 2), values(&c, 3)];
        agrees_within(&device, &inputs, 4.0, &|t| kernels::layer_norm(&t[0], &t[1], &t[2], 1e-3), &|t| {
            reference::layer_norm(&t[0], &t[1], &t[2], 1e-3)
        });
        agrees_within(&device, &inputs[..2], 4.0, &|t| kernels::rms_norm(&t[0], &t[1], 1e-3), &|t| {
            reference::rms_norm(&t[0], &t[1], 1e-3)
        });
    }
}

#[test]
fn a_row_too_long_to_be_held() {
    let Some(device) = device() else { return };
    let (x, c) = ([2, 40_000], [40_000]);
    let inputs = [values(&x, 1), values(&c, 2), values(&c, 3)];
    agrees_within(&device, &inputs, 4.0, &|t| kernels::layer_norm(&t[0], &t[1], &t[2], 1e-3), &|t| {
        reference::layer_norm(&t[0], &t[1], &t[2], 1e-3)
    });
}

#[test]
fn activations() {
    let Some(device) = device() else { return };
    for shape in [vec![1], vec![3, 5], vec![7, 13], vec![2, 2048], vec![5003]] {
        let inputs = [values(&shape, 1), values(&shape, 2)];
        agrees(&device, &inputs[..1], &|t| kernels::gelu(&t[0]), &|t| reference::gelu(&t[0]));
        agrees(&device, &inputs[..1], &|t| kernels::relu(&t[0]), &|t| reference::relu(&t[0]));
        agrees(&device, &inputs, &|t| kernels::swiglu(&t[0], &t[1]), &|t| reference::swiglu(&t[0], &t[1]));
    }
}

#[test]
fn linear() {
    let Some(device) = device() else { return };
    for (x, out) in
        [(vec![1, 1], 1), (vec![3, 5], 7), (vec![2, 7, 13], 3), (vec![2, 1, 2, 3], 5), (vec![70, 64], 96)]
    {
        let k = x[x.len() - 1];
        let inputs = [values(&x, 1), values(&[out, k], 2), values(&[out], 3)];
        agrees_within(&device, &inputs, 4.0, &|t| kernels::linear(&t[0], &t[1], Some(&t[2])), &|t| {
            reference::linear(&t[0], &t[1], Some(&t[2]))
        });
        agrees_within(&device, &inputs[..2], 4.0, &|t| kernels::linear(&t[0], &t[1], None), &|t| {
            reference::linear(&t[0], &t[1], None)
        });
        let w = values(&[out, k], 2);
        agrees_within(
            &device,
            &inputs[..1],
            4.0,
            &|t| kernels::frozen_matmul(&t[0], &w.to_dtype(t[0].dtype())?.to_device(t[0].device())?),
            &|t| reference::linear(&t[0], &w, None),
        );
    }
}

#[test]
fn add_bias() {
    let Some(device) = device() else { return };
    for (x, b) in
        [(vec![3, 5], vec![5]), (vec![2, 7, 13], vec![7, 13]), (vec![4000, 16], vec![16]), (vec![3], vec![])]
    {
        let inputs = [values(&x, 1), values(&b, 2)];
        agrees_within(&device, &inputs, 4.0, &|t| kernels::add_bias(&t[0], &t[1]), &|t| {
            reference::add_bias(&t[0], &t[1])
        });
    }
}
