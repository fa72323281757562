//! Images to rows of patches: a convolution whose kernel equals its stride is then a `linear`.
//!
//! ```text
//! y[b, gy * (W/p) + gx, (c * p + py) * p + px] = x[b, c, gy * p + py, gx * p + px]
//! ```
//!
//! x [B, C, H, W] of any dtype, y [B, (H/p) (W/p), C p p]. A permutation in plain candle ops, so it
//! has its gradient and runs on every device. Source: Dosovitskiy et al. 2021, eq. 1.

use candle_core::{bail, Result, Tensor};

/// The patches `[B, (H/p) (W/p), C p p]` of `images: [B, C, H, W]`, elements in the order (c, py,
/// px), so that `linear` with a convolution's `weight.reshape([out, C p p])` equals it. Errs when
/// the patch size does not divide H and W.
pub fn patchify(images: &Tensor, patch: usize) -> Result<Tensor> {
    let [b, c, h, w] = *images.dims() else {
        bail!("patchify: expected images [B, C, H, W], got {:?}", images.dims())
    };
    if patch == 0 || h % patch != 0 || w % patch != 0 {
        bail!("patchify: expected a height and width that {patch} divides, got {h} x {w}")
    }
    let (gh, gw) = (h / patch, w / patch);
    images
        .reshape(&[b, c, gh, patch, gw, patch][..])?
        .permute(vec![0, 2, 4, 1, 3, 5])? // [b, gh, gw, c, py, px]
        .contiguous()?
        .reshape((b, gh * gw, c * patch * patch))
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[test]
    fn linear_on_patches_is_the_convolution() {
        for (b, c, h, w, p, out) in [(1, 1, 1, 1, 1, 1), (2, 3, 6, 9, 3, 5), (1, 2, 4, 8, 2, 3)] {
            let (x, k) = (values(&[b, c, h, w], 1), values(&[out, c, p, p], 2));
            let flat = k.reshape((out, c * p * p)).unwrap();
            let got = super::super::linear(&patchify(&x, p).unwrap(), &flat, None).unwrap();
            let want = x.conv2d(&k, 0, p, 1, 1).unwrap().flatten_from(2).unwrap().transpose(1, 2).unwrap();
            close("patch embedding", &got, &want.contiguous().unwrap(), F64);
            differentiates(&[x], &|t| patchify(&t[0], p));
        }
    }

    #[test]
    fn sizes_must_divide() {
        let text = refusal(patchify(&values(&[1, 1, 6, 8], 1), 4));
        assert!(text.contains("patchify") && text.contains("4 divides") && text.contains("6 x 8"), "{text}");
    }
}
