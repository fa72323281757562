//! Sums of consecutive slices of the last axis.
//!
//! ```text
//! s[t, j] = sum_b x[t, b r + j]     x [.., I], s [.., r], j < r, b r + j < I
//! dx[t, i] = ds[t, i mod r]
//! ```
//!
//! Where r does not divide I the last slice is short, as if zeros followed. On the CPU f32 and f64, f16 and bf16
//! through f32; on a CUDA device f32, f16 and bf16 (kernels/block_affine.cu). The input side of MiSS (arXiv 2409.15371),
//! where all slices share one block.

use super::cpu::{self, real, simd, Real, Road};
#[cfg(feature = "cuda")]
use crate::kernels::cuda::{self, Launch, Place};
use crate::kernels::tape::{self, Reads};
#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaDevice, CudaStorage};
use candle_core::{bail, CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, D};
use rayon::prelude::*;

/// Slices shorter than this are taken several at a time, so that the loops are worth a vector.
const WIDE: usize = 16;

/// The block sum in plain candle ops.
pub fn reference(x: &Tensor, r: usize) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    let slices = width.div_ceil(r);
    let padded = x.pad_with_zeros(D::Minus1, 0, slices * r - width)?;
    let mut dims = x.dims().to_vec();
    dims.pop();
    dims.extend([slices, r]);
    padded.reshape(dims)?.sum(D::Minus2)
}

/// A multiple of r that is at least half of [`WIDE`], where r is not already.
fn stride(r: usize) -> usize {
    r * (WIDE / r).max(1)
}

simd! {
    /// The block sums of each row of `x`, `width` wide, into the rows of `s`, `r` wide.
    pub(super) fn sum_rows<T>(x: &[T], width: usize, r: usize, s: &mut [T]) {
        let wide = stride(r);
        let mut several = [T::ZERO; WIDE];
        for (x, s) in x.chunks_exact(width).zip(s.chunks_exact_mut(r)) {
            s.fill(T::ZERO);
            if wide == r {
                for slice in x.chunks(r) {
                    for (s, &x) in s.iter_mut().zip(slice) {
                        *s += x;
                    }
                }
            } else {
                let several = &mut several[..wide];
                several.fill(T::ZERO);
                for slices in x.chunks(wide) {
                    for (s, &x) in several.iter_mut().zip(slices) {
                        *s += x;
                    }
                }
                for slice in several.chunks_exact(r) {
                    for (s, &x) in s.iter_mut().zip(slice) {
                        *s += x;
                    }
                }
            }
        }
    }
}

simd! {
    /// Adds row t of `s`, `r` wide, onto every slice of row t of `x`, `width` wide.
    pub(super) fn add_tiled<T>(s: &[T], r: usize, x: &mut [T], width: usize) {
        let wide = stride(r);
        let mut several = [T::ZERO; WIDE];
        for (s, x) in s.chunks_exact(r).zip(x.chunks_exact_mut(width)) {
            let tile = if wide == r {
                s
            } else {
                several[..wide].chunks_exact_mut(r).for_each(|tile| tile.copy_from_slice(s));
                &several[..wide]
            };
            for slice in x.chunks_mut(wide) {
                for (x, &s) in slice.iter_mut().zip(tile) {
                    *x += s;
                }
            }
        }
    }
}

/// The block sums of `x [tokens, width]`, `[tokens, r]`.
pub(super) fn sums<T: Real>(x: &[T], width: usize, r: usize) -> Vec<T> {
    let tokens = x.len() / width;
    let mut s = vec![T::ZERO; tokens * r];
    let step = cpu::chunk_rows(width);
    s.par_chunks_mut(step * r).zip(x.par_chunks(step * width)).for_each(|(s, x)| sum_rows(x, width, r, s));
    s
}

/// Slices of r of an axis that is `width` long.
#[derive(Clone, Copy)]
struct BlockSum {
    r: usize,
    width: usize,
}

/// The backward: from sums back to the axis.
struct Tile(BlockSum);

fn last(layout: &Layout, to: usize) -> Shape {
    super::rows::with_last(layout, to)
}

/// The block sums of `x [tokens, width]` on a CUDA device.
#[cfg(feature = "cuda")]
pub(super) fn sums_on_cuda(op: &str, x: &CudaStorage, xl: &Layout, r: usize) -> Result<(CudaStorage, Shape)> {
    let dtype = x.dtype();
    let width = xl.dims().last().copied().unwrap_or(1);
    let tokens = xl.shape().elem_count() / width.max(1);
    let shape = last(xl, r);
    let s = cuda::unwritten(x.device(), &shape, dtype)?;
    let launch = Launch::new(x.device(), "block_affine", format!("block_sum_{}", cuda::suffix(op, dtype)?))
        .place(cuda::place(op, x, xl)?)
        .place(cuda::start(&s))
        .i64(tokens)
        .i32(width)
        .i32(r);
    let (threads, rows) = if width <= 1024 { (32, 4) } else { (256, 1) };
    let shared = threads * rows * cuda::wide(dtype) * 4;
    // SAFETY: x has tokens rows of `width`, s as many of r, at most `width`; a row for each lane row of the blocks, with
    // the shared memory that the kernel's header asks for.
    unsafe { launch.run((tokens.div_ceil(rows), 1, 1), (threads, rows, 1), shared)? };
    Ok((s, shape))
}

/// Writes row t of `s [tokens, r]` to every slice of row t of `x [tokens, width]`, or adds it onto them.
#[cfg(feature = "cuda")]
pub(super) fn tile_on_cuda(
    device: &CudaDevice,
    (s, x): (Place, Place),
    dtype: DType,
    (tokens, width, r): (usize, usize, usize),
    onto: bool,
) -> Result<()> {
    let kernel = if onto { "block_sum_onto" } else { "block_sum_grad" };
    let launch = Launch::new(device, "block_affine", format!("{kernel}_{}", cuda::suffix(kernel, dtype)?));
    let (grid, block) = cuda::row_grid(tokens, width);
    // SAFETY: s has `tokens` rows of r, x of `width`, as the callers say; rows are strided over.
    unsafe { launch.place(s).place(x).i64(tokens).i32(width).i32(r).run(grid, block, 0) }
}

impl CustomOp1 for BlockSum {
    fn name(&self) -> &'static str {
        "block-sum"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        real!(self.name(), x, T => {
            let s = sums(<T as Real>::slice(self.name(), x, xl)?, self.width, self.r);
            Ok((<T as Real>::store(s), last(xl, self.r)))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, xl: &Layout) -> Result<(CudaStorage, Shape)> {
        sums_on_cuda(self.name(), x, xl, self.r)
    }

    fn bwd(&self, _x: &Tensor, _s: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(grad.contiguous()?.apply_op1_no_bwd(&Tile(*self))?))
    }
}

impl CustomOp1 for Tile {
    fn name(&self) -> &'static str {
        "block-sum-tile"
    }

    fn cpu_fwd(&self, g: &CpuStorage, gl: &Layout) -> Result<(CpuStorage, Shape)> {
        let BlockSum { r, width } = self.0;
        real!(self.name(), g, T => {
            let g = <T as Real>::slice(self.name(), g, gl)?;
            let step = cpu::chunk_rows(width);
            let mut x = vec![T::ZERO; g.len() / r * width];
            x.par_chunks_mut(step * width)
                .zip(g.par_chunks(step * r))
                .for_each(|(x, g)| add_tiled(g, r, x, width));
            Ok((<T as Real>::store(x), last(gl, width)))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, g: &CudaStorage, gl: &Layout) -> Result<(CudaStorage, Shape)> {
        let BlockSum { r, width } = self.0;
        let (shape, tokens) = (last(gl, width), gl.shape().elem_count() / r);
        let x = cuda::unwritten(g.device(), &shape, g.dtype())?;
        let places = (cuda::place(self.name(), g, gl)?, cuda::start(&x));
        tile_on_cuda(g.device(), places, g.dtype(), (tokens, width, r), false)?;
        Ok((x, shape))
    }
}

/// The sums of consecutive slices of length r of `x: [.., I]`, `[.., r]`; r from 1 to I.
pub fn block_sum(x: &Tensor, r: usize) -> Result<Tensor> {
    let op = "block_sum";
    let width = x.dims().last().copied().unwrap_or(0);
    if r == 0 || r > width {
        bail!("{op}: expected slices of 1 to {width} for x {:?}, got {r}", x.dims())
    }
    match cpu::road_with_cuda(op, &[("x", x)])? {
        Road::Kernel => tape::apply1(&x.contiguous()?, BlockSum { r, width }, Reads::NOTHING),
        Road::ThroughF32 => block_sum(&x.to_dtype(DType::F32)?, r)?.to_dtype(x.dtype()),
        Road::Reference => reference(x, r),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[test]
    fn by_hand() {
        let x = Tensor::new(&[[1f32, 2.0, 3.0, 4.0, 5.0]], &candle_core::Device::Cpu).unwrap();
        assert_eq!(block_sum(&x, 2).unwrap().to_vec2::<f32>().unwrap(), [[9.0, 6.0]]);
        assert_eq!(block_sum(&x, 5).unwrap().to_vec2::<f32>().unwrap(), x.to_vec2::<f32>().unwrap());
    }

    #[test]
    fn agrees_and_differentiates() {
        for (x, r) in [
            (vec![1, 1], 1),
            (vec![3, 5], 2),
            (vec![2, 7, 13], 13),
            (vec![2, 37], 3),
            (vec![2, 64], 4),
            (vec![2, 50], 17),
            (vec![2, 100], 16),
        ] {
            let t = [values(&x, 1)];
            agrees(&t, &|t| block_sum(&t[0], r), &|t| reference(&t[0], r));
            differentiates(&t, &|t| block_sum(&t[0], r));
        }
        ignores_threads(&[values(&[1203, 37], 1)], &|t| block_sum(&t[0], 5));
    }

    #[test]
    fn wrong_lengths_are_named() {
        for r in [0, 6] {
            let text = refusal(block_sum(&values(&[3, 5], 1), r));
            assert!(text.contains("slices of 1 to 5") && text.ends_with(&format!("got {r}")), "{text}");
        }
    }
}
