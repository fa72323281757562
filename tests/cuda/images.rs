//! What images go through by candle's own ops on a device: convolutions, pools, patches, moments.

use crate::device::{agrees_within, device, values};
use candle_core::Tensor;
use qtune::kernels::{self, reference, Convolution};

#[test]
fn conv2d() {
    let Some(device) = device() else { return };
    for (x, out, window, stride, padding) in
        [([2, 5, 4, 3], 2, (3, 3), 1, 0), ([1, 4, 7, 2], 5, (3, 2), 1, 2), ([2, 7, 6, 1], 3, (3, 3), 2, 1)]
    {
        let inputs = [values(&x, 1), values(&[out, x[3], window.0, window.1], 2), values(&[out], 3)];
        for relu in [false, true] {
            let how = Convolution { stride, padding, relu };
            agrees_within(&device, &inputs, 4.0, &|t| kernels::conv2d(&t[0], &t[1], &t[2], how), &|t| {
                reference::conv2d(&t[0], &t[1], &t[2], how)
            });
        }
    }
}

#[test]
fn max_pool2() {
    let Some(device) = device() else { return };
    for x in [[1, 2, 2, 1], [2, 5, 7, 3]] {
        agrees_within(&device, &[values(&x, 1)], 1.0, &|t| kernels::max_pool2(&t[0]), &|t| {
            reference::max_pool2(&t[0])
        });
    }
}

#[test]
fn patchify() {
    let Some(device) = device() else { return };
    agrees_within(&device, &[values(&[2, 3, 6, 9], 1)], 1.0, &|t| kernels::patchify(&t[0], 3), &|t| {
        kernels::patchify(&t[0], 3)
    });
}

#[test]
fn rectified_moments() {
    let Some(device) = device() else { return };
    let op = |t: &[Tensor]| {
        let (a, w) = kernels::rectified_moments(&t[0], &(t[1].sqr()? + 0.05)?)?;
        Tensor::stack(&[a, w], 0)
    };
    // A variance is squared in the type of its root: a rounding more.
    agrees_within(&device, &[values(&[3, 5], 1), values(&[3, 5], 2)], 2.0, &op, &op);
}
