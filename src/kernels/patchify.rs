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
