//! The largest of every four pixels, over images whose channels come last, to channels first.
//!
//! ```text
//! y[n, c, i, j] = max of x[n, 2 i + u, 2 j + v, c] over u, v of 0 and 1
//! x [N, H, W, C], y [N, C, H / 2, W / 2]; a last odd row or column is left out
//! dx = dy at the first of the largest, in the order (0, 0), (0, 1), (1, 0), (1, 1); 0 elsewhere
//! NaN is larger than any number, the last of several the largest
//! ```
//!
//! Channels first, because a classifier behind it reads them flat in the order in which published files
//! store its weight; turning them here costs no pass of its own. The backward looks for the largest again.
//! f32 and f64 here, f16 and bf16 through f32.

use super::cpu::{self, real, simd, Real, Road};
use crate::kernels::tape::{self, Reads};
use candle_core::{bail, CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// `max_pool2` in plain candle ops: a gradient goes to the first of the largest here, too.
pub fn reference(x: &Tensor) -> Result<Tensor> {
    let (n, h, w, c) = x.dims4()?;
    let x = x.narrow(1, 0, h / 2 * 2)?.narrow(2, 0, w / 2 * 2)?.contiguous()?;
    let x = x.reshape(vec![n, h / 2, 2, w / 2, 2, c])?;
    let mut best: Option<Tensor> = None;
    for (u, v) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let next = x.narrow(2, u, 1)?.narrow(4, v, 1)?.reshape((n, h / 2, w / 2, c))?;
        best = Some(match best {
            None => next,
            Some(best) => (next.gt(&best)? + next.ne(&next)?)?.where_cond(&next, &best)?,
        });
    }
    match best {
        Some(best) => best.permute((0, 3, 1, 2))?.contiguous(),
        None => Ok(x),
    }
}

/// The sizes of a pooling: height and width of x, channels.
#[derive(Clone, Copy)]
struct Sizes {
    height: usize,
    width: usize,
    channels: usize,
}

impl Sizes {
    /// Pixels of an image of y.
    fn pixels(&self) -> usize {
        (self.height / 2) * (self.width / 2)
    }

    /// Where in an image of x the four pixels behind pixel `at` of y start.
    #[inline(always)]
    fn four(&self, at: usize) -> [usize; 4] {
        let (i, j) = (at / (self.width / 2), at % (self.width / 2));
        let (first, c) = ((2 * i * self.width + 2 * j) * self.channels, self.channels);
        [first, first + c, first + self.width * c, first + (self.width + 1) * c]
    }
}

/// Whether `next` takes the place of `best`.
#[inline(always)]
fn beats<T: Real>(next: T, best: T) -> bool {
    (next > best) | next.is_nan()
}

simd! {
    fn forward<T>(s: Sizes, x: &[T], y: &mut [T]) {
        let (c, pixels) = (s.channels, s.pixels());
        for at in 0..pixels {
            let [a, b, d, e] = s.four(at).map(|from| &x[from..from + c]);
            for ch in 0..c {
                let mut best = a[ch];
                best = if beats(b[ch], best) { b[ch] } else { best };
                best = if beats(d[ch], best) { d[ch] } else { best };
                best = if beats(e[ch], best) { e[ch] } else { best };
                y[ch * pixels + at] = best;
            }
        }
    }
}

simd! {
    fn backward<T>(s: Sizes, x: &[T], grad: &[T], dx: &mut [T]) {
        let (c, pixels) = (s.channels, s.pixels());
        for at in 0..pixels {
            let starts = s.four(at);
            let [a, b, d, e] = starts.map(|from| &x[from..from + c]);
            for ch in 0..c {
                let (mut best, mut place) = (a[ch], starts[0]);
                (best, place) = if beats(b[ch], best) { (b[ch], starts[1]) } else { (best, place) };
                (best, place) = if beats(d[ch], best) { (d[ch], starts[2]) } else { (best, place) };
                place = if beats(e[ch], best) { starts[3] } else { place };
                dx[place + ch] = grad[ch * pixels + at];
            }
        }
    }
}

struct MaxPool(Sizes);

impl CustomOp1 for MaxPool {
    fn name(&self) -> &'static str {
        "max-pool"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        let s = self.0;
        real!("max-pool", x, T => {
            let x = <T as Real>::slice("max-pool", x, xl)?;
            let images = xl.dims().first().copied().unwrap_or(0);
            let size = s.pixels() * s.channels;
            let mut y = vec![T::ZERO; images * size];
            if !y.is_empty() {
                let image = s.height * s.width * s.channels;
                y.par_chunks_mut(size).zip(x.par_chunks(image)).for_each(|(y, x)| forward(s, x, y));
            }
            Ok((<T as Real>::store(y), Shape::from((images, s.channels, s.height / 2, s.width / 2))))
        })
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        x.apply_op2_no_bwd(&grad.contiguous()?, &Backward(self.0)).map(Some)
    }
}

/// (x, dy) to dx.
struct Backward(Sizes);

impl CustomOp2 for Backward {
    fn name(&self) -> &'static str {
        "max-pool-backward"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        grad: &CpuStorage,
        gl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (name, s) = (self.name(), self.0);
        real!(name, x, T => {
            let (x, grad) = (<T as Real>::slice(name, x, xl)?, <T as Real>::slice(name, grad, gl)?);
            let mut dx = vec![T::ZERO; x.len()];
            if !grad.is_empty() {
                let image = s.height * s.width * s.channels;
                let images = dx.par_chunks_mut(image).zip(x.par_chunks(image));
                images
                    .zip(grad.par_chunks(s.pixels() * s.channels))
                    .for_each(|((dx, x), grad)| backward(s, x, grad, dx));
            }
            Ok((<T as Real>::store(dx), xl.shape().clone()))
        })
    }
}

/// The largest of every four pixels of `x: [images, height, width, channels]`, to
/// `[images, channels, height / 2, width / 2]`.
pub fn max_pool2(x: &Tensor) -> Result<Tensor> {
    let &[_, height, width, channels] = x.dims() else {
        bail!("max_pool2: expected x [images, height, width, channels], got {:?}", x.dims())
    };
    match cpu::road("max_pool2", &[("x", x)])? {
        Road::Kernel => {
            tape::apply1(&x.contiguous()?, MaxPool(Sizes { height, width, channels }), Reads::OPERANDS)
        }
        Road::ThroughF32 => max_pool2(&cpu::wide(x)?)?.to_dtype(x.dtype()),
        Road::Reference => reference(x),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn by_hand_the_first_of_equal_wins() {
        // Two channels: the second holds the same as the first, less 10.
        let one = [1f32, 2., 5., 5., 3., 3., 5., 5.];
        let both: Vec<f32> = one.iter().flat_map(|v| [*v, v - 10.0]).collect();
        let x = Tensor::from_vec(both, (1, 2, 4, 2), &Device::Cpu).unwrap();
        let all = run(&[x], &|t| max_pool2(&t[0]));
        assert_eq!(all[0].dims(), [1, 2, 1, 2]);
        assert_eq!(flat(&all[0]), [3., 5., -7., -5.]);
        let g = flat(&values(&[1, 2, 1, 2], 77).to_dtype(DType::F32).unwrap());
        let z = 0.0;
        let want = [z, z, z, z, g[1], g[3], z, z, g[0], g[2], z, z, z, z, z, z];
        assert_eq!(flat(&all[1]), want);
    }

    /// Wherever in its window it lies, and the gradient goes where it came from.
    #[test]
    fn nan_comes_through_from_any_place() {
        for places in 1u32..16 {
            let at = |i: u32| if places >> i & 1 == 1 { f64::NAN } else { f64::from(i * 7 % 4) };
            let x = Tensor::from_vec((0..4).map(at).collect(), (1, 2, 2, 1), &Device::Cpu).unwrap();
            let last = 31 - places.leading_zeros() as usize;
            for all in
                [run(std::slice::from_ref(&x), &|t| max_pool2(&t[0])), run(&[x], &|t| reference(&t[0]))]
            {
                assert!(flat(&all[0])[0].is_nan(), "{places:04b}");
                let mut want = [0.0; 4];
                want[last] = flat(&values(&[1, 1, 1, 1], 77))[0];
                assert_eq!(flat(&all[1]), want, "{places:04b}");
            }
        }
    }

    #[test]
    fn agrees_differentiates_and_ignores_threads() {
        for shape in [[1, 2, 2, 1], [3, 4, 6, 5], [2, 5, 3, 17], [1, 1, 4, 2]] {
            let t = [values(&shape, 1)];
            agrees(&t, &|t| max_pool2(&t[0]), &|t| reference(&t[0]));
            differentiates(&t, &|t| max_pool2(&t[0]));
            // Many equal ones.
            let t = [values(&shape, 1).round().unwrap()];
            agrees(&t, &|t| max_pool2(&t[0]), &|t| reference(&t[0]));
        }
        ignores_threads(&[values(&[9, 12, 12, 64], 1)], &|t| max_pool2(&t[0]));
        assert!(refusal(max_pool2(&values(&[3, 3], 1))).contains("expected x [images"));
    }
}
