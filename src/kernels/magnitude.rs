//! The length of a weight's rows, and columns scaled to another: what DoRA adds to LoRA.
//!
//! ```text
//! n[o] = |W[o, :] + s (B A)[o, :]|     W [O, I] frozen, A [r, I], B [O, r]
//! y[t, o] = z[t, o] m[o] / n[o]        z [.., O], m, n [O]
//! dz = dy m / n     dm[o] = sum_t dy[t, o] z[t, o] / n[o]     nothing for n
//! ```
//!
//! Liu et al. 2024, section 4.3: the length is taken as a constant in the backward pass. A row of zeros
//! counts as one of length 1, so that its magnitude does no harm. f32, W read panel by panel; on a CUDA device
//! (kernels/magnitude.cu) z may be f16 or bf16, and a dense W is read where it lies.

#[cfg(feature = "cuda")]
use crate::kernels::cuda::{self, Launch, Parts};
use crate::kernels::tape::{self, Reads};
#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaStorage, Device};
use candle_core::{bail, CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor, D};
use rayon::prelude::*;

use super::cpu::{self, simd};
use super::linear::{add_product, View};
use super::rows::{floats, FrozenRows, Panels};

/// [`row_norms`] in plain candle ops.
pub fn reference_row_norms(rows: &FrozenRows, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let w = (rows.tensor(a.device())? + (b.detach().matmul(&a.detach())? * scale)?)?;
    let n = w.sqr()?.sum(D::Minus1)?.sqrt()?;
    n.eq(0f64)?.where_cond(&n.ones_like()?, &n)
}

/// [`scale_columns`] in plain candle ops.
pub fn reference_scale_columns(z: &Tensor, m: &Tensor, n: &Tensor) -> Result<Tensor> {
    z.broadcast_mul(&(m / n.detach())?)
}

simd! {
    fn norms_of<T>(rows: &[T], width: usize, n: &mut [T]) {
        for (row, n) in rows.chunks_exact(width).zip(n) {
            let squared = cpu::dot(row, row);
            *n = if squared == T::ZERO { T::ONE } else { squared.sqrt() };
        }
    }
}

simd! {
    fn scale_rows<T>(z: &[T], m: &[T], n: &[T], y: &mut [T]) {
        let width = m.len();
        let n = &n[..width];
        for (z, y) in z.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            for c in 0..width {
                y[c] = z[c] * (m[c] / n[c]);
            }
        }
    }
}

simd! {
    /// Adds the sums of `z dy` over the rows onto `dm`.
    fn add_products<T>(z: &[T], g: &[T], dm: &mut [T]) {
        let width = dm.len();
        for (z, g) in z.chunks_exact(width).zip(g.chunks_exact(width)) {
            for c in 0..width {
                dm[c] = z[c].fma(g[c], dm[c]);
            }
        }
    }
}

/// The length of each row of `W + scale B A`, `[O]`, f32, for the frozen `rows` of W `[O, I]`, `a: [r, I]`
/// and `b: [O, r]`; 1 for a row of zeros. Not differentiable.
pub fn row_norms(rows: &FrozenRows, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let (o, i, r) = (rows.rows(), rows.cols(), a.dims().first().copied().unwrap_or(0));
    if r * o == 0 || a.dims() != [r, i] || b.dims() != [o, r] {
        bail!("row_norms: expected a [r, {i}] and b [{o}, r], got {:?} and {:?}", a.dims(), b.dims())
    }
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = a.device() {
        // What a block of threads may have of shared memory on every card that the kernels are made for.
        if 8 * r * 4 <= 160 << 10 {
            return row_norms_on_cuda(device, rows, a, b, scale);
        }
    }
    if !a.device().is_cpu() {
        return reference_row_norms(rows, a, b, scale);
    }
    let list = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    let (a, up) = (list(a)?, list(&(b.detach() * scale)?)?);
    let mut norms = vec![0f32; o];
    rows.with(|source| {
        let edit = |first: usize, rows: &mut [f32]| {
            let count = rows.len() / i;
            let up = View::rows(&up[first * r..], r);
            add_product((count, i, r), rows, i, up, View::rows(&a, i));
        };
        Panels::edited_freely(source, (o, i), &edit).each(|first, panel| {
            let norms = &mut norms[first..first + panel.len() / i];
            let step = cpu::chunk_rows(i);
            let chunks = norms.par_chunks_mut(step).zip(panel.par_chunks(step * i));
            chunks.for_each(|(norms, panel)| norms_of(panel, i, norms));
        });
        Ok(())
    })?;
    Tensor::from_vec(norms, o, &candle_core::Device::Cpu)
}

/// [`row_norms`] on a CUDA device, panel by panel where W is codes.
#[cfg(feature = "cuda")]
fn row_norms_on_cuda(
    device: &candle_core::CudaDevice,
    rows: &FrozenRows,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
) -> Result<Tensor> {
    let (op, o, (r, i)) = ("row_norms", rows.rows(), a.dims2()?);
    let dtype = rows.dtype().unwrap_or(DType::F32);
    let float = |t: &Tensor| t.detach().to_dtype(DType::F32)?.contiguous();
    let (a, up) = (float(a)?, (float(b)? * scale)?);
    let ((a, al), (up, ul)) = (a.storage_and_layout(), up.storage_and_layout());
    let a = cuda::place(op, cuda::storage(op, &a)?, al)?;
    let up = cuda::place(op, cuda::storage(op, &up)?, ul)?;
    let norms = cuda::unwritten(device, o, DType::F32)?;
    let most = if rows.dtype().is_some() { o } else { super::rows::device_panel(i, 4, 8) };
    for first in (0..o).step_by(most) {
        let count = most.min(o - first);
        let panel = rows.panel(op, device, dtype, (first, count))?;
        let kernel = format!("{op}_{}", cuda::suffix(op, dtype)?);
        let launch = Launch::new(device, "magnitude", kernel)
            .place(panel.rows.place())
            .place(a)
            .place(up.at(first * r))
            .place(cuda::start(&norms).at(first));
        let launch = launch.i64(count).i32(i).i32(r);
        // SAFETY: the panel has `count` rows of i elements, A r of them, B and the norms a row for each row of the
        // panel; eight rows to a block, with the shared memory that the kernel's header asks for.
        unsafe { launch.run((count.div_ceil(8), 1, 1), (256, 1, 1), 8 * r * 4)? };
    }
    Ok(cuda::tensor(norms, o))
}

/// `y = z m / n` on a CUDA device, for z of rows as long as m.
#[cfg(feature = "cuda")]
fn scale_on_cuda(
    op: &str,
    (z, zl): (&CudaStorage, &Layout),
    (m, ml): (&CudaStorage, &Layout),
    n: &Tensor,
    y: cuda::Place,
) -> Result<()> {
    let (n, nl) = n.storage_and_layout();
    let width = ml.shape().elem_count();
    let rows = zl.shape().elem_count() / width.max(1);
    let kernel = format!("scale_columns_{}", cuda::suffix(op, z.dtype())?);
    let launch = Launch::new(z.device(), "magnitude", kernel)
        .place(cuda::place(op, z, zl)?)
        .place(cuda::place(op, m, ml)?)
        .place(cuda::place(op, cuda::storage(op, &n)?, nl)?)
        .place(y);
    let (grid, block) = cuda::row_grid(rows, width);
    // SAFETY: z and y have rows of `width` elements of one type, m and n are one, in f32; rows are strided over.
    unsafe { launch.i64(rows).i32(width).run(grid, block, 0) }
}

/// (z, m) to y at given lengths.
struct ScaleColumns {
    n: Tensor,
}

impl CustomOp2 for ScaleColumns {
    fn name(&self) -> &'static str {
        "scale-columns"
    }

    fn cpu_fwd(
        &self,
        z: &CpuStorage,
        zl: &Layout,
        m: &CpuStorage,
        ml: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        let (z, m) = (floats(name, z, zl)?, floats(name, m, ml)?);
        let (n, nl) = self.n.storage_and_layout();
        let n = floats(name, cpu::host(name, &n)?, nl)?;
        let step = cpu::chunk_rows(m.len()) * m.len();
        let mut y = vec![0f32; z.len()];
        y.par_chunks_mut(step).zip(z.par_chunks(step)).for_each(|(y, z)| scale_rows(z, m, n, y));
        Ok((CpuStorage::F32(y), zl.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        z: &CudaStorage,
        zl: &Layout,
        m: &CudaStorage,
        ml: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let y = cuda::unwritten(z.device(), zl.shape(), z.dtype())?;
        scale_on_cuda(self.name(), (z, zl), (m, ml), &self.n, cuda::start(&y))?;
        Ok((y, zl.shape().clone()))
    }

    fn bwd(
        &self,
        z: &Tensor,
        m: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if z.device().is_cuda() {
            let grad = grad.contiguous()?;
            let n = &self.n;
            let dz = z.track_op().then(|| grad.apply_op2_no_bwd(m, &ScaleColumns { n: n.clone() }));
            let dm = m.track_op().then(|| z.apply_op2_no_bwd(&grad, &MagnitudeGrad { n: n.clone() }));
            return Ok((dz.transpose()?, dm.transpose()?));
        }
        let op = ScaleColumnsGrad { n: self.n.clone() };
        let flat = z.apply_op3_no_bwd(m, &grad.contiguous()?, &op)?;
        let dz = cpu::unpack(&flat, 0, z.shape())?;
        Ok((Some(dz), Some(cpu::unpack(&flat, z.elem_count(), m.shape())?)))
    }
}

/// (z, m, dy) to dz and dm in one flat result.
struct ScaleColumnsGrad {
    n: Tensor,
}

impl CustomOp3 for ScaleColumnsGrad {
    fn name(&self) -> &'static str {
        "scale-columns-grad"
    }

    fn cpu_fwd(
        &self,
        z: &CpuStorage,
        zl: &Layout,
        m: &CpuStorage,
        ml: &Layout,
        g: &CpuStorage,
        gl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        let (z, m, g) = (floats(name, z, zl)?, floats(name, m, ml)?, floats(name, g, gl)?);
        let (n, nl) = self.n.storage_and_layout();
        let n = floats(name, cpu::host(name, &n)?, nl)?;
        let width = m.len();
        let step = cpu::chunk_rows(width) * width;
        let mut out = vec![0f32; z.len() + width];
        let mut partial = vec![0f32; z.len().div_ceil(step) * width];
        out[..z.len()]
            .par_chunks_mut(step)
            .zip(z.par_chunks(step))
            .zip(g.par_chunks(step))
            .zip(partial.par_chunks_mut(width))
            .for_each(|(((dz, z), g), dm)| {
                scale_rows(g, m, n, dz);
                add_products(z, g, dm);
            });
        let dm = cpu::fold(&partial, width);
        for ((out, dm), n) in out[z.len()..].iter_mut().zip(dm).zip(n) {
            *out = dm / n;
        }
        let shape = Shape::from(out.len());
        Ok((CpuStorage::F32(out), shape))
    }
}

/// (z, dy) to dm on a CUDA device.
#[cfg(feature = "cuda")]
struct MagnitudeGrad {
    n: Tensor,
}

#[cfg(feature = "cuda")]
impl CustomOp2 for MagnitudeGrad {
    fn name(&self) -> &'static str {
        "magnitude-grad"
    }

    fn cpu_fwd(
        &self,
        _z: &CpuStorage,
        _zl: &Layout,
        _g: &CpuStorage,
        _gl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("{}: expected operands on a CUDA device", self.name())
    }

    fn cuda_fwd(
        &self,
        z: &CudaStorage,
        zl: &Layout,
        g: &CudaStorage,
        gl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (name, device, dtype) = (self.name(), z.device(), z.dtype());
        let (n, nl) = self.n.storage_and_layout();
        let width = nl.shape().elem_count();
        let rows = zl.shape().elem_count() / width;
        let parts = Parts::of(rows);
        let partial = cuda::unwritten(device, parts.count * width, DType::F32)?;
        let kernel = format!("magnitude_products_{}", cuda::suffix(name, dtype)?);
        let launch = Launch::new(device, "magnitude", kernel)
            .place(cuda::place(name, z, zl)?)
            .place(cuda::place(name, g, gl)?)
            .place(cuda::start(&partial));
        let launch = launch.i64(rows).i32(width).i64(parts.each);
        // SAFETY: z and dy have rows of `width` elements; a block for each part and for the columns of 32 wide accesses.
        unsafe { launch.run((width.div_ceil(32 * cuda::wide(dtype)), parts.count, 1), (32, 8, 1), 0)? };
        let dm = cuda::unwritten(device, width, DType::F32)?;
        let launch = Launch::new(device, "magnitude", "magnitude_fold")
            .place(cuda::start(&partial))
            .place(cuda::place(name, cuda::storage(name, &n)?, nl)?)
            .place(cuda::start(&dm));
        // SAFETY: blocks of 32 columns cover those of the parts, of n and of dm.
        unsafe { launch.i64(parts.count).i64(width).run((width.div_ceil(32), 1, 1), (32, 8, 1), 0)? };
        Ok((dm, Shape::from(width)))
    }
}

/// `z m / n` for `z: [.., O]`, the magnitudes `m: [O]` and the lengths `n: [O]`, all f32; differentiable in
/// z and m, nothing for n. On a CUDA device z may be f16 or bf16.
pub fn scale_columns(z: &Tensor, m: &Tensor, n: &Tensor) -> Result<Tensor> {
    let op = "scale_columns";
    let width = z.dims().last().copied().unwrap_or(0);
    if width == 0 || m.dims() != [width] || n.dims() != [width] {
        bail!("{op}: expected m and n [{width}] for z {:?}, got {:?} and {:?}", z.dims(), m.dims(), n.dims())
    }
    for (name, t) in [("z", z), ("m", m), ("n", n)] {
        let half = matches!(t.dtype(), DType::F16 | DType::BF16);
        let there = name == "z" && half && t.device().is_cuda();
        if t.dtype() != DType::F32 && !there {
            bail!("{op}: expected {name} in F32, got {:?}", t.dtype())
        }
    }
    if !z.device().is_cpu() && !z.device().is_cuda() {
        return reference_scale_columns(z, m, n);
    }
    tape::apply2(
        &z.contiguous()?,
        &m.contiguous()?,
        ScaleColumns { n: n.detach().contiguous()? },
        Reads::OPERANDS,
    )
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use candle_core::Device;

    fn case(shape: &[usize], seed: u64) -> Tensor {
        values(shape, seed).to_dtype(DType::F32).unwrap()
    }

    #[test]
    fn norms_by_hand_and_against_the_reference() {
        let cpu = &Device::Cpu;
        let w = Tensor::new(&[[3f32, 0.0], [0.0, 0.0], [1.0, -2.0]], cpu).unwrap();
        let a = Tensor::new(&[[0f32, 4.0]], cpu).unwrap();
        let b = Tensor::new(&[[2f32], [0.0], [1.0]], cpu).unwrap();
        let n = row_norms(&FrozenRows::dense(&w).unwrap(), &a, &b, 0.5).unwrap();
        assert_eq!(n.to_vec1::<f32>().unwrap(), [5.0, 1.0, 1.0]);
        for (o, i, r) in [(1, 1, 1), (7, 13, 3), (1100, 1001, 4)] {
            let rows = FrozenRows::dense(&case(&[o, i], 1).to_dtype(DType::BF16).unwrap()).unwrap();
            let (a, b) = (case(&[r, i], 2), case(&[o, r], 3));
            let want = reference_row_norms(&rows, &a, &b, 0.7).unwrap();
            close("norms", &row_norms(&rows, &a, &b, 0.7).unwrap(), &want, F32);
        }
    }

    #[test]
    fn columns_agree_and_differentiate() {
        for z in [vec![1, 1], vec![3, 5], vec![2, 4, 17]] {
            let width = z[z.len() - 1];
            let n = (case(&[width], 3).abs().unwrap() + 0.5).unwrap();
            let t = [case(&z, 1), case(&[width], 2)];
            let op = |t: &[Tensor]| scale_columns(&t[0], &t[1], &n);
            for (got, want) in
                run(&t, &op).iter().zip(run(&t, &|t| reference_scale_columns(&t[0], &t[1], &n)))
            {
                close("result or gradient", got, &want, F32);
            }
            linear_in_each(&t, &op);
        }
        let n = case(&[33], 3).abs().unwrap();
        ignores_threads(&[values(&[3000, 33], 1), values(&[33], 2)], &|t| scale_columns(&t[0], &t[1], &n));
    }

    #[test]
    fn wrong_shapes_are_named() {
        let (z, m) = (case(&[3, 5], 1), case(&[4], 2));
        assert!(refusal(scale_columns(&z, &m, &m)).contains("[5] for z [3, 5], got [4]"));
        let rows = FrozenRows::dense(&z).unwrap();
        assert!(refusal(row_norms(&rows, &m, &m, 1.0)).contains("a [r, 5] and b [3, r]"));
    }
}
