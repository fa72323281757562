//! Products with a weight, and biases.
//!
//! ```text
//! linear        y = x w^T + b     x [.., K], w [N, K], b [N], y [.., N]
//!               dx = dy w         dw = dy^T x         db = sum dy over the leading axes
//! frozen_matmul y = x w^T         dx = dy w, and nothing for w
//! add_bias      y = x + b         b's shape is a suffix of x's; db = sum dy over the leading axes
//! ```
//!
//! On the CPU f32 and f64, f16 and bf16 through f32; on a CUDA device f32, f16 and bf16, whose products are cuBLAS's
//! and whose biases kernels/elementwise.cu's. A gradient is computed only for an operand that a variable stands behind.
//! Products of f32 are those of `product`; of f64, and of a few rows, those of `general`.

use super::cpu::{self, real, simd, Real, Road};
#[cfg(feature = "cuda")]
use crate::kernels::cuda;
use crate::kernels::tape::{self, Reads};
#[cfg(feature = "cuda")]
use candle_core::{
    backend::{BackendDevice, BackendStorage},
    CudaStorage,
};
use candle_core::{bail, CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, D};
use rayon::prelude::*;

/// `linear` in plain candle ops.
pub fn reference(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = x.broadcast_matmul(&w.t()?.broadcast_left(&x.dims()[..x.rank().saturating_sub(2)])?)?;
    match bias {
        Some(b) => y.broadcast_add(b),
        None => Ok(y),
    }
}

/// `add_bias` in plain candle ops.
pub fn reference_add_bias(x: &Tensor, b: &Tensor) -> Result<Tensor> {
    x.broadcast_add(b)
}

pub(super) use super::product::View;

/// `dst [m, n] = scale * a [m, k] b [k, n]` on one thread, rows of dst `stride` apart.
pub(super) fn product<T: Real>(
    sizes: (usize, usize, usize),
    dst: &mut [T],
    stride: usize,
    a: View<T>,
    b: View<T>,
    scale: T,
) {
    T::product(sizes, dst, stride, a, b, scale, false);
}

/// As [`product`], added onto what `dst` holds, without a scale.
pub(super) fn add_product<T: Real>(
    sizes: (usize, usize, usize),
    dst: &mut [T],
    stride: usize,
    a: View<T>,
    b: View<T>,
) {
    T::product(sizes, dst, stride, a, b, T::ONE, true);
}

/// `a [m, k] b [k, n] (+ bias [n])`, row-major, on all threads.
pub(super) fn matmul<T: Real>(
    sizes: (usize, usize, usize),
    a: View<T>,
    b: View<T>,
    bias: Option<&[T]>,
) -> Vec<T> {
    T::matmul(sizes, a, b, bias)
}

/// Which of the three products of a linear layer.
#[derive(Clone, Copy)]
pub(super) enum Product {
    /// x [R, K], w [N, K] to [R, N].
    Forward,
    /// g [R, N], w [N, K] to [R, K].
    Input,
    /// g [R, N], x [R, K] to [N, K].
    Weight,
}

impl Product {
    fn run<T: Real>(self, a: &[T], al: &Layout, b: &[T], bl: &Layout, bias: Option<&[T]>) -> (Vec<T>, Shape) {
        let last = |l: &Layout| l.dims().last().copied().unwrap_or(1);
        let (ac, bc) = (last(al), last(bl));
        let lead = |l: &Layout| l.dims()[..l.dims().len() - 1].to_vec();
        let rows: usize = lead(al).iter().product();
        let (av, bv) = (View::rows(a, ac), View::rows(b, bc));
        match self {
            Product::Forward => {
                let n = bl.dims()[0];
                let mut dims = lead(al);
                dims.push(n);
                (matmul((rows, n, ac), av, bv.t(), bias), Shape::from(dims))
            }
            Product::Input => {
                let mut dims = lead(al);
                dims.push(bc);
                (matmul((rows, bc, ac), av, bv, None), Shape::from(dims))
            }
            Product::Weight => (matmul((ac, bc, rows), av.t(), bv, None), Shape::from((ac, bc))),
        }
    }

    /// The product on a CUDA device, of operands of one type.
    #[cfg(feature = "cuda")]
    pub(super) fn on_cuda(
        self,
        a: &CudaStorage,
        al: &Layout,
        b: &CudaStorage,
        bl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let last = |l: &Layout| l.dims().last().copied().unwrap_or(1);
        let (ac, bc) = (last(al), last(bl));
        let lead = &al.dims()[..al.dims().len() - 1];
        let rows: usize = lead.iter().product();
        let with = |last: usize| Shape::from([lead, &[last]].concat());
        let matrix = |l: &Layout, rows, cols| Layout::contiguous_with_offset((rows, cols), l.start_offset());
        let turned =
            |l: &Layout, rows, cols| Layout::new(Shape::from((cols, rows)), vec![1, cols], l.start_offset());
        let ((m, n, k), av, bv, shape) = match self {
            Product::Forward => {
                let n = bl.dims()[0];
                ((rows, n, ac), matrix(al, rows, ac), turned(bl, n, ac), with(n))
            }
            Product::Input => ((rows, bc, ac), matrix(al, rows, ac), matrix(bl, ac, bc), with(bc)),
            Product::Weight => {
                ((ac, bc, rows), turned(al, rows, ac), matrix(bl, rows, bc), Shape::from((ac, bc)))
            }
        };
        if m == 0 || n == 0 || k == 0 {
            return Ok((a.device().zeros_impl(&shape, a.dtype())?, shape));
        }
        Ok((a.matmul(b, (1, m, n, k), &av, &bv)?, shape))
    }
}

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        al: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = CustomOp2::name(self);
        real!(name, a, T => {
            let (a, b) = (<T as Real>::slice(name, a, al)?, <T as Real>::slice(name, b, bl)?);
            let (y, shape) = self.run(a, al, b, bl, None);
            Ok((<T as Real>::store(y), shape))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        a: &CudaStorage,
        al: &Layout,
        b: &CudaStorage,
        bl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.on_cuda(a, al, b, bl)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dw) = gradients(x, w, &grad.contiguous()?)?;
        Ok((dx, dw))
    }
}

fn gradients(x: &Tensor, w: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let dx = x.track_op().then(|| grad.apply_op2_no_bwd(w, &Product::Input)).transpose()?;
    let dw = w.track_op().then(|| grad.apply_op2_no_bwd(x, &Product::Weight)).transpose()?;
    Ok((dx, dw))
}

/// (x, w, bias) to y.
struct Linear;

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
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
        let name = self.name();
        real!(name, x, T => {
            let (x, w) = (<T as Real>::slice(name, x, xl)?, <T as Real>::slice(name, w, wl)?);
            let (y, shape) = Product::Forward.run(x, xl, w, wl, Some(<T as Real>::slice(name, b, bl)?));
            Ok((<T as Real>::store(y), shape))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        xl: &Layout,
        w: &CudaStorage,
        wl: &Layout,
        b: &CudaStorage,
        bl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (y, shape) = Product::Forward.on_cuda(x, xl, w, wl)?;
        let at = cuda::start(&y);
        cuda::add_bias(
            y.device(),
            y.dtype(),
            at,
            cuda::place(self.name(), b, bl)?,
            at,
            (&shape, bl.shape()),
        )?;
        Ok((y, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (dx, dw) = gradients(x, w, &grad)?;
        let db = b.track_op().then(|| grad.apply_op1_no_bwd(&ColumnSums(b.shape().clone()))).transpose()?;
        Ok((dx, dw, db))
    }
}

/// Sums over the leading axes, down to a shape that is a suffix.
struct ColumnSums(Shape);

impl CustomOp1 for ColumnSums {
    fn name(&self) -> &'static str {
        "column-sums"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        real!(self.name(), x, T => {
            let x = <T as Real>::slice(self.name(), x, xl)?;
            Ok((<T as Real>::store(cpu::column_sums(x, self.0.elem_count())), self.0.clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, xl: &Layout) -> Result<(CudaStorage, Shape)> {
        let width = self.0.elem_count();
        let rows = xl.shape().elem_count() / width.max(1);
        let at = cuda::place(self.name(), x, xl)?;
        Ok((cuda::column_sums(x.device(), at, x.dtype(), (rows, width))?, self.0.clone()))
    }
}

/// x to x w^T with a weight that takes no gradient.
struct Frozen {
    w: Tensor,
    product: Product,
}

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "frozen-matmul"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (w, wl) = self.w.storage_and_layout();
        CustomOp2::cpu_fwd(&self.product, x, xl, cpu::host(self.name(), &w)?, wl)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, xl: &Layout) -> Result<(CudaStorage, Shape)> {
        let (w, wl) = self.w.storage_and_layout();
        self.product.on_cuda(x, xl, cuda::storage(self.name(), &w)?, wl)
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let op = Frozen { w: self.w.clone(), product: Product::Input };
        Ok(Some(grad.contiguous()?.apply_op1_no_bwd(&op)?))
    }
}

fn check(op: &str, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<()> {
    let (n, k) = match w.dims() {
        [n, k] => (*n, *k),
        other => bail!("{op}: expected w [out, in], got {other:?}"),
    };
    if x.rank() < 2 || x.dim(D::Minus1)? != k {
        bail!("{op}: expected x [.., {k}] for w [{n}, {k}], got {:?}", x.dims())
    }
    if let Some(b) = bias {
        if b.dims() != [n] {
            bail!("{op}: expected bias [{n}], got {:?}", b.dims())
        }
    }
    Ok(())
}

/// `x w^T + bias` for `x: [.., K]` (two axes or more), `w: [N, K]`, `bias: [N]`.
pub fn linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let op = "linear";
    check(op, x, w, bias)?;
    let mut named = vec![("x", x), ("w", w)];
    named.extend(bias.map(|b| ("bias", b)));
    match cpu::road_with_cuda(op, &named)? {
        Road::Kernel => {
            let (x, w) = (x.contiguous()?, w.contiguous()?);
            match bias {
                Some(b) => tape::apply3(&x, &w, &b.contiguous()?, Linear, Reads::OPERANDS),
                None => tape::apply2(&x, &w, Product::Forward, Reads::OPERANDS),
            }
        }
        Road::ThroughF32 => {
            let bias = bias.map(cpu::wide).transpose()?;
            linear(&cpu::wide(x)?, &cpu::wide(w)?, bias.as_ref())?.to_dtype(x.dtype())
        }
        Road::Reference => reference(x, w, bias),
    }
}

/// `x w^T` for `x: [.., K]` and a frozen `w: [N, K]`: the backward gives dx only, and the graph
/// behind w is not touched.
pub fn frozen_matmul(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let op = "frozen_matmul";
    check(op, x, w, None)?;
    let w = w.detach();
    match cpu::road_with_cuda(op, &[("x", x), ("w", &w)])? {
        Road::Kernel => tape::apply1(
            &x.contiguous()?,
            Frozen { w: w.contiguous()?, product: Product::Forward },
            Reads::NOTHING,
        ),
        Road::ThroughF32 => frozen_matmul(&cpu::wide(x)?, &cpu::wide(&w)?)?.to_dtype(x.dtype()),
        Road::Reference => reference(x, &w, None),
    }
}

simd! {
    fn add_rows_into<T>(x: &[T], b: &[T], y: &mut [T]) {
        let width = b.len();
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            for ((y, &x), &b) in y.iter_mut().zip(x).zip(b) {
                *y = x + b;
            }
        }
    }
}

struct AddBias;

impl CustomOp2 for AddBias {
    fn name(&self) -> &'static str {
        "add-bias"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        real!(self.name(), x, T => {
            let (x, b) = (<T as Real>::slice(self.name(), x, xl)?, <T as Real>::slice(self.name(), b, bl)?);
            let mut y = cpu::unwritten(x.len());
            if !b.is_empty() {
                let step = cpu::chunk_rows(b.len()) * b.len();
                y.par_chunks_mut(step).zip(x.par_chunks(step)).for_each(|(y, x)| add_rows_into(x, b, y));
            }
            Ok((<T as Real>::store(y), xl.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        xl: &Layout,
        b: &CudaStorage,
        bl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let y = cuda::unwritten(x.device(), xl.shape(), x.dtype())?;
        let (x_at, b_at) = (cuda::place(self.name(), x, xl)?, cuda::place(self.name(), b, bl)?);
        cuda::add_bias(x.device(), x.dtype(), x_at, b_at, cuda::start(&y), (xl.shape(), bl.shape()))?;
        Ok((y, xl.shape().clone()))
    }

    fn bwd(
        &self,
        _x: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let db = if b.track_op() {
            Some(grad.contiguous()?.apply_op1_no_bwd(&ColumnSums(b.shape().clone()))?)
        } else {
            None
        };
        Ok((Some(grad.clone()), db))
    }
}

/// `x + b`, where the shape of b is a suffix of the shape of x.
pub fn add_bias(x: &Tensor, b: &Tensor) -> Result<Tensor> {
    let op = "add_bias";
    if !x.dims().ends_with(b.dims()) {
        bail!("{op}: expected a bias whose shape ends that of x {:?}, got {:?}", x.dims(), b.dims())
    }
    match cpu::road_with_cuda(op, &[("x", x), ("b", b)])? {
        Road::Kernel => tape::apply2(&x.contiguous()?, &b.contiguous()?, AddBias, Reads::NOTHING),
        Road::ThroughF32 => add_bias(&cpu::wide(x)?, &cpu::wide(b)?)?.to_dtype(x.dtype()),
        Road::Reference => reference_add_bias(x, b),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use candle_core::DType;
    use candle_core::Var;

    fn case(x: &[usize], out: usize) -> [Tensor; 3] {
        let k = x[x.len() - 1];
        [values(x, 1), values(&[out, k], 2), values(&[out], 3)]
    }

    #[test]
    fn linear_agrees_and_differentiates() {
        for (x, out) in [(vec![1, 1], 1), (vec![3, 5], 7), (vec![2, 7, 13], 3), (vec![2, 1, 2, 3], 5)] {
            let with = case(&x, out);
            let op = |t: &[Tensor]| linear(&t[0], &t[1], Some(&t[2]));
            agrees(&with, &op, &|t| reference(&t[0], &t[1], Some(&t[2])));
            differentiates(&with, &op);
            let op = |t: &[Tensor]| linear(&t[0], &t[1], None);
            agrees(&with[..2], &op, &|t| reference(&t[0], &t[1], None));
            differentiates(&with[..2], &op);
        }
    }

    #[test]
    fn tiles_and_long_reductions_agree() {
        // Rows and columns in several tiles; then a weight gradient over 1537 rows in parts.
        for (x, out) in [([200, 301], 401), ([1537, 6], 5), ([4500, 33], 17)] {
            // So small that the terms, not only their sum, are of the size that the tolerance is for.
            let t = case(&x, out).map(|t| (t * 0.05).unwrap());
            let op = |t: &[Tensor]| linear(&t[0], &t[1], Some(&t[2]));
            let like = |t: &[Tensor]| reference(&t[0], &t[1], Some(&t[2]));
            // Sums of thousands of terms: an oracle in f32 would bring as much error as there is to find.
            let exact =
                run(&t.clone().map(|t| t.to_dtype(DType::F32).unwrap().to_dtype(DType::F64).unwrap()), &like);
            let single = run(&t.clone().map(|t| t.to_dtype(DType::F32).unwrap()), &op);
            for (got, want) in single.iter().zip(&exact) {
                close("f32", got, want, F32);
            }
            for (got, want) in run(&t, &op).iter().zip(run(&t, &like)) {
                close("f64", got, &want, F64);
            }
        }
    }

    #[test]
    fn linear_ignores_threads() {
        for (x, out) in [([200, 301], 401), ([5003, 33], 17), ([2048, 96], 192)] {
            ignores_threads(&case(&x, out), &|t| linear(&t[0], &t[1], Some(&t[2])));
        }
    }

    #[test]
    fn reads_strided_inputs() {
        let [x, w, b] = case(&[5, 3], 4);
        let want = linear(&x, &w, Some(&b)).unwrap();
        let swapped = x.t().unwrap().contiguous().unwrap().t().unwrap();
        let tail = Tensor::cat(&[&w, &w], 0).unwrap().narrow(0, 4, 4).unwrap();
        close("strided", &linear(&swapped, &tail, Some(&b)).unwrap(), &want, F64);
    }

    #[test]
    fn only_variables_get_gradients() {
        let [x, w, b] = case(&[3, 5], 7);
        let w = Var::from_tensor(&w).unwrap();
        let y = linear(&x, &w, Some(&b)).unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&w).is_some() && grads.get(&x).is_none() && grads.get(&b).is_none());
    }

    #[test]
    fn frozen_weight_gets_no_gradient() {
        let [x, w, _] = case(&[2, 3, 5], 7);
        let op = |t: &[Tensor]| frozen_matmul(&t[0], &values(&[7, 5], 2).to_dtype(t[0].dtype())?);
        let like = |t: &[Tensor]| reference(&t[0], &values(&[7, 5], 2).to_dtype(t[0].dtype())?, None);
        agrees(std::slice::from_ref(&x), &op, &like);
        differentiates(std::slice::from_ref(&x), &op);
        let (x, w) = (Var::from_tensor(&x).unwrap(), Var::from_tensor(&w).unwrap());
        let grads = frozen_matmul(&x, &w).unwrap().sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&x).is_some() && grads.get(&w).is_none());
    }

    #[test]
    fn add_bias_agrees_and_differentiates() {
        for (x, b) in [
            (vec![1, 1], vec![1]),
            (vec![3, 5], vec![5]),
            (vec![4, 7, 13], vec![7, 13]),
            (vec![3, 2], vec![3, 2]),
        ] {
            let t = [values(&x, 1), values(&b, 2)];
            agrees(&t, &|t| add_bias(&t[0], &t[1]), &|t| reference_add_bias(&t[0], &t[1]));
            differentiates(&t, &|t| add_bias(&t[0], &t[1]));
        }
        ignores_threads(&[values(&[301, 7, 33], 1), values(&[7, 33], 2)], &|t| add_bias(&t[0], &t[1]));
    }

    #[test]
    fn wrong_shapes_are_named() {
        let (x, w) = (values(&[3, 5], 1), values(&[7, 4], 2));
        let text = refusal(linear(&x, &w, None));
        assert!(text.contains("linear") && text.contains("[.., 4]") && text.contains("[3, 5]"), "{text}");
        assert!(refusal(add_bias(&x, &values(&[3], 1))).contains("[3, 5]"));
        let text = refusal(linear(&x, &values(&[7, 5], 2).to_dtype(DType::F32).unwrap(), None));
        assert!(text.contains("F64") && text.contains("F32"), "{text}");
    }
}
