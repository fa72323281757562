//! Convolution over images whose channels come last, with its bias and, where asked for, a ReLU behind.
//!
//! ```text
//! z[n, i, j, o] = b[o] + sum over u, v, c of x[n, i s + u - p, j s + v - p, c] w[o, c, u, v]
//! y = z, or max(z, 0)      x [N, H, W, C], w [O, C, k, l], b [O], y [N, H', W', O]
//! H' = (H + 2 p - k) / s + 1, W' likewise, what lies outside x being 0
//! dz = dy, or dy where y > 0
//! db = sum of dz,  dw = dz^T patches(x),  dx = what the patches of dz w put on each place, added up
//! ```
//!
//! A few output rows of one image at a time, their patches are laid out as a matrix [pixels, k l C], which
//! stays in the cache, and multiplied by the weight in the order (u, v, c): a row of a patch is then one
//! piece of x. The backward makes the same matrix again rather than keep it, k l times the size of x.
//! Forward cuts its work by image, backward into at most [`PARTS`] runs of images, whose shares of dw and
//! db are added in order. A gradient is computed only for an operand that a variable stands behind.
//! f32 and f64 here, f16 and bf16 through f32.

use super::cpu::{self, real, simd, Real, Road};
use super::linear::{add_product, product, View};
use super::relu::{rectify, where_positive};
use crate::kernels::tape::{self, Reads};
use candle_core::{bail, CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// Elements of a matrix of patches, unless one row of pixels alone has more.
const PATCHES: usize = 1 << 16;
/// Runs of images whose gradients of the weight are kept apart until they are added.
const PARTS: usize = 16;

/// How the window moves, and what follows the sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Convolution {
    /// Places between two windows, in both directions.
    pub stride: usize,
    /// Zeros around the image, on each of its four sides.
    pub padding: usize,
    /// Whether negative results become 0.
    pub relu: bool,
}

/// The convolution in plain candle ops.
pub fn reference(x: &Tensor, w: &Tensor, b: &Tensor, how: Convolution) -> Result<Tensor> {
    let Convolution { stride, padding, relu } = how;
    let mut x = x.permute((0, 3, 1, 2))?.contiguous()?;
    for axis in [2, 3] {
        x = x.pad_with_zeros(axis, padding, padding)?;
        // What no window reaches is cut off: candle's backward takes what is left over below for what is
        // left over on the right, too.
        let window = w.dim(axis)?;
        x = x.narrow(axis, 0, (x.dim(axis)? - window) / stride * stride + window)?;
    }
    let y = x.contiguous()?.conv2d(w, 0, stride, 1, 1)?.permute((0, 2, 3, 1))?.broadcast_add(b)?;
    match relu {
        true => super::relu::reference(&y),
        false => Ok(y),
    }
}

/// The sizes of one convolution.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    images: usize,
    /// Height and width of x, of y and of the window.
    x: (usize, usize),
    y: (usize, usize),
    window: (usize, usize),
    /// C and O.
    channels: usize,
    out: usize,
    how: Convolution,
}

impl Sizes {
    fn of(x: &[usize], w: &[usize], how: Convolution) -> Result<Self> {
        let (&[images, height, width, channels], &[out, inner, rows, cols]) = (x, w) else {
            bail!("conv2d: expected x [images, height, width, channels] and w [out, channels, rows, columns], got {x:?} and {w:?}")
        };
        if inner != channels {
            bail!("conv2d: expected x of {inner} channels for w {w:?}, got {x:?}")
        }
        if height == 0 || width == 0 {
            bail!("conv2d: expected images of a height and a width above 0, got x {x:?}")
        }
        let room = (height + 2 * how.padding, width + 2 * how.padding);
        if how.stride == 0 || rows == 0 || cols == 0 || rows > room.0 || cols > room.1 {
            bail!(
                "conv2d: expected a window that fits into x {x:?}, got w {w:?}, padding {} and stride {}",
                how.padding,
                how.stride
            )
        }
        let y = ((room.0 - rows) / how.stride + 1, (room.1 - cols) / how.stride + 1);
        Ok(Sizes { images, x: (height, width), y, window: (rows, cols), channels, out, how })
    }

    /// Elements of one patch: the inner length of the products.
    fn patch(&self) -> usize {
        self.window.0 * self.window.1 * self.channels
    }

    /// Elements of one image of x.
    fn image(&self) -> usize {
        self.x.0 * self.x.1 * self.channels
    }

    /// Elements of one image of y.
    fn result(&self) -> usize {
        self.y.0 * self.y.1 * self.out
    }

    /// Rows of y whose patches are laid out at a time.
    fn rows(&self) -> usize {
        (PATCHES / (self.y.1 * self.patch()).max(1)).clamp(1, self.y.0)
    }

    /// Runs of rows of y, first and one behind the last, in order.
    fn blocks(self) -> impl Iterator<Item = (usize, usize)> {
        let rows = self.rows();
        (0..self.y.0).step_by(rows).map(move |from| (from, (from + rows).min(self.y.0)))
    }

    /// Row `u` of the patch at (i, j): where it starts in an image of x, and which elements of the row lie
    /// inside; none where all is padding.
    #[inline(always)]
    fn row(&self, i: usize, j: usize, u: usize) -> Option<(usize, usize, usize)> {
        let Convolution { stride, padding, .. } = self.how;
        let at = (i * stride + u).checked_sub(padding).filter(|at| *at < self.x.0)?;
        let left = j * stride;
        let from = padding.saturating_sub(left);
        let to = (self.x.1 + padding).saturating_sub(left).min(self.window.1);
        if from >= to {
            return None;
        }
        let c = self.channels;
        Some(((at * self.x.1 + left + from - padding) * c, from * c, to * c))
    }
}

/// The patches of rows [from, to) of y, one a row of `patches`.
fn gather<T: Real>(s: &Sizes, image: &[T], (from, to): (usize, usize), patches: &mut [T]) {
    let run = s.window.1 * s.channels;
    for (at, patch) in patches.chunks_exact_mut(s.patch()).take((to - from) * s.y.1).enumerate() {
        let (i, j) = (from + at / s.y.1, at % s.y.1);
        for (u, row) in patch.chunks_exact_mut(run).enumerate() {
            match s.row(i, j, u) {
                Some((start, first, last)) => {
                    row[..first].fill(T::ZERO);
                    row[first..last].copy_from_slice(&image[start..start + last - first]);
                    row[last..].fill(T::ZERO);
                }
                None => row.fill(T::ZERO),
            }
        }
    }
}

simd! {
    /// Adds each patch of rows [from, to) of y onto the places it was taken from.
    fn scatter<T>(s: &Sizes, patches: &[T], from: usize, to: usize, image: &mut [T]) {
        let run = s.window.1 * s.channels;
        for (at, patch) in patches.chunks_exact(s.patch()).take((to - from) * s.y.1).enumerate() {
            let (i, j) = (from + at / s.y.1, at % s.y.1);
            for (u, row) in patch.chunks_exact(run).enumerate() {
                if let Some((start, first, last)) = s.row(i, j, u) {
                    let places = &mut image[start..start + last - first];
                    for (place, &v) in places.iter_mut().zip(&row[first..last]) {
                        *place += v;
                    }
                }
            }
        }
    }
}

/// w [O, C, k l] as [O, k l, C].
fn channels_last<T: Real>(s: &Sizes, w: &[T]) -> Vec<T> {
    let (area, c) = (s.window.0 * s.window.1, s.channels);
    let mut last = vec![T::ZERO; w.len()];
    for (last, w) in last.chunks_exact_mut((area * c).max(1)).zip(w.chunks_exact((area * c).max(1))) {
        for (i, v) in last.iter_mut().enumerate() {
            *v = w[i % c * area + i / c];
        }
    }
    last
}

/// w [O, k l, C] as [O, C, k l].
fn channels_first<T: Real>(s: &Sizes, w: &[T]) -> Vec<T> {
    let turned = Sizes { window: (1, s.channels), channels: s.window.0 * s.window.1, ..*s };
    channels_last(&turned, w)
}

/// (x, w, b) to y.
struct Forward(Sizes);

impl Forward {
    fn run<T: Real>(&self, x: &[T], w: &[T], b: &[T]) -> Vec<T> {
        let s = &self.0;
        let (k, n) = (s.patch(), s.out);
        let mut y = vec![T::ZERO; s.images * s.result()];
        if y.is_empty() || k == 0 {
            return y;
        }
        let w = channels_last(s, w);
        let images = y.par_chunks_mut(s.result()).zip(x.par_chunks(s.image()));
        images.for_each_init(Vec::new, |patches, (y, x)| {
            patches.resize(s.rows() * s.y.1 * k, T::ZERO);
            for (from, to) in s.blocks() {
                let y = &mut y[from * s.y.1 * n..to * s.y.1 * n];
                gather(s, x, (from, to), patches);
                y.chunks_exact_mut(n).for_each(|pixel| pixel.copy_from_slice(b));
                let sizes = ((to - from) * s.y.1, n, k);
                add_product(sizes, y, n, View::rows(patches, k), View::rows(&w, k).t());
                if s.how.relu {
                    rectify(y);
                }
            }
        });
        y
    }
}

impl CustomOp3 for Forward {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (name, s) = (self.name(), &self.0);
        real!(name, x, T => {
            let (x, w) = (<T as Real>::slice(name, x, xl)?, <T as Real>::slice(name, w, wl)?);
            let y = self.run(x, w, <T as Real>::slice(name, b, bl)?);
            Ok((<T as Real>::store(y), Shape::from((s.images, s.y.0, s.y.1, s.out))))
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let wanted = Wanted { x: x.track_op(), w: w.track_op(), b: b.track_op() };
        let op = Backward { sizes: self.0, wanted, x: x.clone(), w: w.clone(), y: y.clone() };
        let packed = grad.contiguous()?.apply_op1_no_bwd(&op)?;
        let (in_x, in_w, _) = op.lengths();
        let part = |wanted: bool, from: usize, of: &Tensor| {
            wanted.then(|| cpu::unpack(&packed, from, of.shape())).transpose()
        };
        Ok((part(wanted.x, 0, x)?, part(wanted.w, in_x, w)?, part(wanted.b, in_x + in_w, b)?))
    }
}

/// The operands that take a gradient.
#[derive(Clone, Copy)]
struct Wanted {
    x: bool,
    w: bool,
    b: bool,
}

/// dy to dx, dw and db, those that are wanted, one behind the other.
struct Backward {
    sizes: Sizes,
    wanted: Wanted,
    x: Tensor,
    w: Tensor,
    y: Tensor,
}

impl Backward {
    /// Elements of dx, dw and db.
    fn lengths(&self) -> (usize, usize, usize) {
        let (s, wanted) = (&self.sizes, self.wanted);
        let of = |wanted: bool, count: usize| if wanted { count } else { 0 };
        (of(wanted.x, s.images * s.image()), of(wanted.w, s.out * s.patch()), of(wanted.b, s.out))
    }

    fn run<T: Real>(&self, x: &[T], w: &[T], y: &[T], grad: &[T]) -> Vec<T> {
        let s = &self.sizes;
        let (in_x, in_w, in_b) = self.lengths();
        let mut packed = vec![T::ZERO; in_x];
        if grad.is_empty() || s.patch() == 0 {
            packed.resize(in_x + in_w + in_b, T::ZERO);
            return packed;
        }
        let w = channels_last(s, w);
        let each = s.images.div_ceil(PARTS);
        let parts = s.images.div_ceil(each);
        let width = in_w + in_b;
        let mut partial = vec![T::ZERO; parts * width];
        let dx = shares(&mut packed, each * s.image(), parts);
        let sums = shares(&mut partial, width, parts);
        dx.into_par_iter().zip(sums).enumerate().for_each_init(Vec::new, |room, (part, (dx, sums))| {
            let (dw, db) = sums.split_at_mut(in_w);
            let first = part * each;
            for image in first..(first + each).min(s.images) {
                let of = |size: usize| image * size..(image + 1) * size;
                let behind = (&y[of(s.result())], &grad[of(s.result())]);
                let dx = match dx.is_empty() {
                    true => &mut [][..],
                    false => &mut dx[(image - first) * s.image()..][..s.image()],
                };
                self.image(&x[of(s.image())], &w, behind, room, (dx, &mut *dw, &mut *db));
            }
        });
        let sums = cpu::fold(&partial, width);
        packed.extend(channels_first(s, &sums[..in_w]));
        packed.extend(&sums[in_w..]);
        packed
    }

    /// What one image gives; `room` holds what is made on the way.
    fn image<T: Real>(
        &self,
        x: &[T],
        w: &[T],
        (y, grad): (&[T], &[T]),
        room: &mut Vec<T>,
        (dx, dw, db): (&mut [T], &mut [T], &mut [T]),
    ) {
        let s = &self.sizes;
        let (k, n) = (s.patch(), s.out);
        let pixels = s.rows() * s.y.1;
        room.resize(pixels * (k + n), T::ZERO);
        let (patches, masked) = room.split_at_mut(pixels * k);
        for (from, to) in s.blocks() {
            let m = (to - from) * s.y.1;
            let at = from * s.y.1 * n..to * s.y.1 * n;
            let dz = if s.how.relu {
                where_positive(&y[at.clone()], &grad[at], &mut masked[..m * n]);
                &masked[..m * n]
            } else {
                &grad[at]
            };
            if !db.is_empty() {
                cpu::add_rows(dz, db);
            }
            if !dw.is_empty() {
                gather(s, x, (from, to), patches);
                add_product((n, k, m), dw, k, View::rows(dz, n).t(), View::rows(patches, k));
            }
            if !dx.is_empty() {
                product((m, k, n), patches, k, View::rows(dz, n), View::rows(w, k), T::ONE);
                scatter(s, patches, from, to, dx);
            }
        }
    }
}

/// `data` in pieces of `size`, `count` of them: empty ones where there is no data.
fn shares<T>(data: &mut [T], size: usize, count: usize) -> Vec<&mut [T]> {
    match data.is_empty() {
        true => (0..count).map(|_| Default::default()).collect(),
        false => data.chunks_mut(size).collect(),
    }
}

impl CustomOp1 for Backward {
    fn name(&self) -> &'static str {
        "conv2d-backward"
    }

    fn cpu_fwd(&self, grad: &CpuStorage, gl: &Layout) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        let ((x, xl), (w, wl), (y, yl)) =
            (self.x.storage_and_layout(), self.w.storage_and_layout(), self.y.storage_and_layout());
        real!(name, grad, T => {
            let x = <T as Real>::slice(name, cpu::host(name, &x)?, xl)?;
            let w = <T as Real>::slice(name, cpu::host(name, &w)?, wl)?;
            let y = <T as Real>::slice(name, cpu::host(name, &y)?, yl)?;
            let packed = self.run(x, w, y, <T as Real>::slice(name, grad, gl)?);
            let length = packed.len();
            Ok((<T as Real>::store(packed), Shape::from(length)))
        })
    }
}

/// The convolution of `x: [images, height, width, channels]` with `w: [out, channels, rows, columns]` and
/// `b: [out]`, to `[images, rows of y, columns of y, out]`.
///
/// Errs on shapes that do not go together, images without pixels, a window larger than the padded image, and a stride of 0.
pub fn conv2d(x: &Tensor, w: &Tensor, b: &Tensor, how: Convolution) -> Result<Tensor> {
    let sizes = Sizes::of(x.dims(), w.dims(), how)?;
    if b.dims() != [sizes.out] {
        bail!("conv2d: expected b [{}], got {:?}", sizes.out, b.dims())
    }
    match cpu::road("conv2d", &[("x", x), ("w", w), ("b", b)])? {
        Road::Kernel => {
            tape::apply3(&x.contiguous()?, &w.contiguous()?, &b.contiguous()?, Forward(sizes), Reads::ALL)
        }
        Road::ThroughF32 => conv2d(&cpu::wide(x)?, &cpu::wide(w)?, &cpu::wide(b)?, how)?.to_dtype(x.dtype()),
        Road::Reference => reference(x, w, b, how),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use candle_core::{DType, Device, Var};

    fn how(stride: usize, padding: usize, relu: bool) -> Convolution {
        Convolution { stride, padding, relu }
    }

    fn inputs(x: [usize; 4], out: usize, window: (usize, usize)) -> [Tensor; 3] {
        [values(&x, 1), values(&[out, x[3], window.0, window.1], 2), values(&[out], 3)]
    }

    #[test]
    fn by_hand() {
        let t = |data: &[f64], shape: &[usize]| Tensor::from_slice(data, shape, &Device::Cpu).unwrap();
        let x = t(&[1., 2., 3., 4., 5., 6., 7., 8., 9.], &[1, 3, 3, 1]);
        let w = t(&[1., 0., 0., -1., 0., 1., 1., 0.], &[2, 1, 2, 2]);
        let y = conv2d(&x, &w, &t(&[0., -8.], &[2]), how(1, 0, false)).unwrap();
        // The first: what is above left less what is below right, -4 everywhere; the second: the other
        // diagonal, less 8.
        assert_eq!(flat(&y), [-4., -2., -4., 0., -4., 4., -4., 6.]);
        assert_eq!(
            flat(&conv2d(&x, &w, &t(&[5., -8.], &[2]), how(1, 0, true)).unwrap())[..4],
            [1., 0., 1., 0.]
        );
        // Padded and in steps of two: the corners of the image alone.
        let w = t(&[0., 0., 0., 1.], &[1, 1, 2, 2]);
        let y = conv2d(&x, &w, &t(&[0.], &[1]), how(2, 1, false)).unwrap();
        assert_eq!(flat(&y), [1., 3., 7., 9.]);
    }

    #[test]
    fn agrees_and_differentiates_over_odd_shapes() {
        for (x, out, window, stride, padding) in [
            ([1, 1, 1, 1], 1, (1, 1), 1, 0),
            ([2, 5, 4, 3], 2, (3, 3), 1, 0),
            ([3, 4, 7, 2], 5, (3, 2), 1, 2),
            ([2, 7, 6, 1], 3, (3, 3), 2, 1),
            ([1, 2, 2, 2], 2, (3, 3), 1, 1),
            ([2, 6, 5, 2], 2, (2, 2), 3, 0),
        ] {
            let t = inputs(x, out, window);
            for relu in [false, true] {
                let how = how(stride, padding, relu);
                agrees(&t, &|t| conv2d(&t[0], &t[1], &t[2], how), &|t| reference(&t[0], &t[1], &t[2], how));
                differentiates(&t, &|t| conv2d(&t[0], &t[1], &t[2], how));
            }
        }
    }

    /// Several blocks of rows, several images a part.
    #[test]
    fn large_ones_agree_and_ignore_threads() {
        let t = inputs([35, 30, 20, 8], 6, (5, 5));
        let sizes = Sizes::of(t[0].dims(), t[1].dims(), how(1, 1, true)).unwrap();
        assert!(sizes.blocks().count() > 1 && sizes.images > 2 * PARTS);
        let how = how(1, 1, true);
        ignores_threads(&t, &|t| conv2d(&t[0], &t[1], &t[2], how));
        for (got, want) in run(&t, &|t| conv2d(&t[0], &t[1], &t[2], how))
            .iter()
            .zip(run(&t, &|t| reference(&t[0], &t[1], &t[2], how)))
        {
            // Sums of 28 000 products: relative to their size.
            close("f64", &(got / 100.0).unwrap(), &(want / 100.0).unwrap(), F64);
        }
    }

    #[test]
    fn gradients_are_computed_for_variables_alone() {
        let [x, w, b] = inputs([2, 5, 5, 2], 3, (3, 3));
        let how = how(1, 0, true);
        let all = run(&[x.clone(), w.clone(), b.clone()], &|t| conv2d(&t[0], &t[1], &t[2], how));
        for which in 0..3 {
            let mut t = [x.clone(), w.clone(), b.clone()];
            let var = Var::from_tensor(&t[which]).unwrap();
            t[which] = var.as_tensor().clone();
            let y = conv2d(&t[0], &t[1], &t[2], how).unwrap();
            let weight = values(y.dims(), 77);
            let grads = (y * weight).unwrap().sum_all().unwrap().backward().unwrap();
            assert_eq!(flat(grads.get(&var).unwrap()), flat(&all[which + 1]));
            for other in (0..3).filter(|other| *other != which) {
                assert!(grads.get(&t[other]).is_none());
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_so_and_no_images_are_none() {
        let [x, w, b] = inputs([1, 3, 3, 1], 2, (3, 3)).map(|t| t.to_dtype(DType::F32).unwrap());
        let nan = (b * f64::NAN).unwrap();
        assert!(flat(&conv2d(&x, &w, &nan, how(1, 0, true)).unwrap()).iter().all(|v| v.is_nan()));
        let t = [Tensor::zeros((0, 3, 3, 1), DType::F32, &Device::Cpu).unwrap(), w, nan];
        let all = run(&t, &|t| conv2d(&t[0], &t[1], &t[2], how(1, 0, true)));
        assert_eq!(all[0].dims(), [0, 1, 1, 2]);
        assert!(flat(&all[2]).iter().all(|v| *v == 0.0));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let [x, w, b] = inputs([1, 3, 3, 2], 2, (3, 3));
        let said = |x: &Tensor, w: &Tensor, b: &Tensor, how| refusal(conv2d(x, w, b, how));
        let other = values(&[2, 1, 3, 3], 1);
        assert!(said(&x, &other, &b, how(1, 0, false)).contains("expected x of 1 channels"));
        assert!(said(&x, &w, &values(&[3], 1), how(1, 0, false)).contains("expected b [2], got [3]"));
        assert!(said(&x, &w, &b, how(0, 0, false)).contains("stride 0"));
        let wide = values(&[2, 2, 4, 4], 1);
        assert!(said(&x, &wide, &b, how(1, 0, false)).contains("expected a window that fits into x"));
        for none in [[1, 0, 3, 2], [1, 3, 0, 2]] {
            let none = Tensor::zeros(&none[..], DType::F64, &Device::Cpu).unwrap();
            let text = said(&none, &w, &b, how(1, 3, false));
            assert!(text.contains("expected images of a height and a width above 0"), "{text}");
        }
        assert!(said(&values(&[3, 3], 1), &w, &b, how(1, 0, false)).contains("expected x [images"));
    }
}
