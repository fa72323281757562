//! Products with packed weights.
//!
//! `y[t, o] = Σ_k x[t, k] step[o, k / group] (code[o, k] + offset)` for float activations, and the bare
//! integer sum `Σ_k q[t, k] (2 code[o, k] + 1)` (or `Σ q code` on a grid with a zero) for activations that
//! are codes themselves, where a row has one step. `x: [.., in]`, codes `[out, in]` packed,
//! `y: [.., out]`, f32.
//!
//! Where no kernel of the CPU reads the codes, the weight is unpacked by panels of rows that stay in cache, once for all
//! tokens; so too in the backward pass, which gives `dx = dy · W` and nothing for the frozen weight. On a CUDA device the
//! codes are repacked once (kernels/packed*.cu), and activations of f16 and bf16 give products of their own type.

mod codes;
mod decode;
#[cfg(feature = "cuda")]
mod device;
pub mod edges;
pub mod gemm8;
pub mod gemv;
#[cfg(any(test, feature = "cuda"))]
mod geometry;
mod isa;
#[cfg(target_arch = "x86_64")]
mod panels;
mod product;
mod quantized;
mod rows;
pub mod table;
mod unpack;

use crate::kernels::tape::{self, Reads};
#[cfg(feature = "cuda")]
use candle_core::{backend::BackendStorage, CudaStorage};
use candle_core::{bail, CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

pub use codes::{code_stride, codes_len, Codes, CodesRef};
pub use isa::Isa;
pub use product::{CodeMatrix, Elements};
pub use quantized::{packed_codes_matmul, packed_quantized_matmul, Rounding};
pub use rows::{Groups, PackedRows};

use super::rows::{with_last, Panels, Source};
pub(super) use decode::decode;
use decode::RoundedMatmul;

/// The rows of a packed weight, unpacked by panels.
fn panels_of<'a>(source: Source<'a>, rows: &PackedRows) -> Panels<'a> {
    Panels::plain(source, (rows.rows(), rows.cols))
}

struct PackedMatmul(PackedRows);
struct PackedMatmulBwd(PackedRows);
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("packed matmul: expected a contiguous operand"),
    }
}

/// Rows of activations up to which products are those of decoding: as many passes over weights in cache.
pub(super) const DECODED: usize = 8;
impl CustomOp1 for PackedMatmul {
    fn name(&self) -> &'static str {
        "packed-matmul"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, layout)?;
        let y = match x.len() / self.0.cols <= DECODED {
            true => decode(x, &self.0),
            false => panels_of(Source::Packed(&self.0), &self.0).product(x),
        };
        Ok((CpuStorage::F32(y), with_last(layout, self.0.rows())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.0.on_device(x.device())?.product(x, layout)
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(g.contiguous()?.apply_op1_no_bwd(&PackedMatmulBwd(self.0.clone()))?))
    }
}

impl CustomOp1 for PackedMatmulBwd {
    fn name(&self) -> &'static str {
        "packed-matmul-bwd"
    }

    fn cpu_fwd(&self, g: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let dx = panels_of(Source::Packed(&self.0), &self.0).product_back(slice(g, layout)?);
        Ok((CpuStorage::F32(dx), with_last(layout, self.0.cols)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, g: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.0.on_device(g.device())?.product_back(g, layout)
    }
}

/// Rows of a packed weight by their numbers.
struct Gather(PackedRows);

impl CustomOp1 for Gather {
    fn name(&self) -> &'static str {
        "packed-rows"
    }

    fn cpu_fwd(&self, ids: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, cols) = (self.0.rows(), self.0.cols);
        let Some((from, to)) = layout.contiguous_offsets() else {
            bail!("packed rows: expected contiguous ids")
        };
        let ids = &ids.as_slice::<u32>()?[from..to];
        if let Some(id) = ids.iter().find(|&&id| id as usize >= rows) {
            bail!("packed rows: found id {id}, expected one below the {rows} rows")
        }
        let mut values = vec![0f32; ids.len() * cols];
        values.par_chunks_mut(cols).zip(ids).for_each(|(out, &id)| self.0.values(id as usize, out));
        Ok((CpuStorage::F32(values), Shape::from([layout.dims(), &[cols]].concat())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, ids: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (device, count) = (ids.device(), layout.shape().elem_count());
        let place = crate::kernels::cuda::place("packed rows", ids, layout)?;
        let ids = device::Ids { place, dtype: ids.dtype(), count };
        let values = self.0.on_device(device)?.values(device, DType::F32, Some(ids))?;
        Ok((values, Shape::from([layout.dims(), &[self.0.cols]].concat())))
    }
}

/// The rows `ids` of a packed weight, `[.., in]` for ids of any shape and whole type, f32 on `device`. An id out of range
/// is an error where the ids are on the CPU; to look at those of a device would be to wait for it: such an id gives
/// a row of NaN.
pub fn packed_rows(ids: &Tensor, rows: &PackedRows, device: &Device) -> Result<Tensor> {
    let wide = ids.dtype() == DType::I64 && ids.device().is_cuda();
    let ids = if wide { ids.clone() } else { ids.to_dtype(DType::U32)? };
    if ids.elem_count() == 0 {
        return Tensor::zeros([ids.dims(), &[rows.cols]].concat(), DType::F32, device);
    }
    if ids.device().is_cpu() && !device.is_cpu() {
        let most = ids.flatten_all()?.max(0)?.to_scalar::<u32>()?;
        if most as usize >= rows.rows() {
            bail!("packed rows: found id {most}, expected one below the {} rows", rows.rows())
        }
    }
    let on = if device.is_cuda() { device } else { &Device::Cpu };
    let ids = ids.to_device(on)?.contiguous()?;
    ids.apply_op1_no_bwd(&Gather(rows.clone()))?.to_device(device)
}

/// The dense values of a packed weight, `[out, in]`, f32 on `device`, the same to the bit on any.
pub fn packed_values(rows: &PackedRows, device: &Device) -> Result<Tensor> {
    let shape = (rows.rows(), rows.cols);
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = device {
        let values = rows.on_device(cuda)?.values(cuda, DType::F32, None)?;
        let storage = candle_core::Storage::Cuda(values);
        return Ok(Tensor::from_storage(storage, shape, candle_core::op::BackpropOp::none(), false));
    }
    let mut values = vec![0f32; shape.0 * shape.1];
    values.par_chunks_mut(rows.cols.max(1)).enumerate().for_each(|(row, out)| rows.values(row, out));
    Tensor::from_vec(values, shape, device)
}

#[cfg(feature = "cuda")]
impl PackedRows {
    /// `x W^T` on a CUDA device, or `x W`, in the type of x.
    pub(super) fn product_on_cuda(
        &self,
        x: &CudaStorage,
        xl: &Layout,
        back: bool,
    ) -> Result<(CudaStorage, Shape)> {
        let there = self.on_device(x.device())?;
        match back {
            false => there.product(x, xl),
            true => there.product_back(x, xl),
        }
    }

    /// The values of `count` rows from `first` on, on a CUDA device.
    pub(super) fn values_on_cuda(
        &self,
        device: &candle_core::CudaDevice,
        dtype: DType,
        (first, count): (usize, usize),
    ) -> Result<CudaStorage> {
        self.on_device(device)?.values_from(device, dtype, (first, count))
    }
}

/// Whether a CUDA body takes activations of this type as they are.
fn has_body(x: &Tensor) -> bool {
    x.device().is_cuda() && matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16)
}

/// `x` as the kernels take it: contiguous, of f32 but for what a CUDA body takes as it is.
fn check(op: &str, x: &Tensor, rows: &PackedRows) -> Result<Tensor> {
    let found = x.dims().last().copied().unwrap_or(0);
    if found != rows.cols {
        bail!("{op}: found {found} input features, expected {}", rows.cols);
    }
    if x.elem_count() == 0 {
        bail!("{op}: found an empty activation {:?}", x.dims());
    }
    match has_body(x) {
        true => x.contiguous(),
        false => x.to_dtype(DType::F32)?.contiguous(),
    }
}

/// The dense values of a packed weight, `[out, in]`.
fn dense(x: &Tensor, rows: &PackedRows, of: impl Fn(usize, &mut [f32])) -> Result<Tensor> {
    let mut values = vec![0f32; rows.rows() * rows.cols];
    values.chunks_exact_mut(rows.cols).enumerate().for_each(|(row, out)| of(row, out));
    Tensor::from_vec(values, (rows.rows(), rows.cols), x.device())
}

/// Plain reading of [`packed_matmul`]: the whole weight unpacked, then a dense product.
pub fn reference(x: &Tensor, rows: &PackedRows) -> Result<Tensor> {
    x.broadcast_matmul(&dense(x, rows, |row, out| rows.values(row, out))?.t()?)
}

/// `x [.., in]` times the transposed packed weight, `[.., out]` in `x`'s dtype; differentiable in `x`.
pub fn packed_matmul(x: &Tensor, rows: &PackedRows) -> Result<Tensor> {
    let input = check("packed matmul", x, rows)?;
    let y = match input.device().is_cpu() || has_body(&input) {
        true => tape::apply1(&input, PackedMatmul(rows.clone()), Reads::NOTHING)?,
        false => reference(&input, rows)?,
    };
    y.to_dtype(x.dtype())
}

/// As [`packed_matmul`] of up to 8 rows of activations that are rounded to 8 bits first, symmetrically, with a scale
/// for each block of up to 64 columns (absmax / 127): sums within a block are exact. More rows, and rows on another
/// device, are multiplied as floats. Not differentiable.
pub fn packed_matmul_int8(x: &Tensor, rows: &PackedRows) -> Result<Tensor> {
    let input = check("packed matmul", x, rows)?.detach();
    if !input.device().is_cpu() || input.elem_count() / rows.cols > DECODED {
        return packed_matmul(&x.detach(), rows);
    }
    input.apply_op1_no_bwd(&RoundedMatmul(rows.clone()))?.to_dtype(x.dtype())
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::rows::tests::{grids, random_rows};
    use super::*;
    use crate::kernels::Levels;
    use crate::random::Random;

    /// Shapes, with and without groups, some with a rest; the larger ones are split both ways.
    pub(super) fn all() -> impl Iterator<Item = (Levels, u8, usize, usize, Option<usize>)> {
        let shapes = [
            (1, 1, None),
            (3, 5, None),
            (65, 7, None),
            (10, 130, None),
            (3, 5, Some(2)),
            (65, 7, Some(1)),
            (10, 130, Some(64)),
            (70, 300, Some(32)),
            // Long enough for tables.
            (10, 400, None),
        ];
        grids().flat_map(move |(l, b)| shapes.map(|(r, c, g)| (l, b, r, c, g)))
    }

    #[test]
    fn eight_bits_of_activation_are_near_the_floats() {
        for (levels, bits, rows, cols, group) in all() {
            let (packed, _) = random_rows((levels, bits), rows, cols, group);
            let mut random = Random::new(6, "x", &[cols as u64]);
            let x: Vec<f32> = (0..2 * cols).map(|_| random.normal()).collect();
            let x = Tensor::from_vec(x, (2, cols), &Device::Cpu).unwrap();
            let rounded = packed_matmul_int8(&x, &packed).unwrap().to_vec2::<f32>().unwrap();
            let exact = packed_matmul(&x, &packed).unwrap().to_vec2::<f32>().unwrap();
            for (a, b) in rounded.concat().iter().zip(exact.concat()) {
                // Half a step of 1/127 of the largest activation, at random signs over the columns.
                let size = packed.largest_whole() as f32 * 0.1 * (cols as f32).sqrt();
                assert!((a - b).abs() <= 0.03 * size, "{bits} bits {rows}x{cols}: {a} {b}");
            }
        }
    }

    #[test]
    fn forward_and_gradient_agree_with_the_dense_product() {
        // Few tokens, and more than one task takes.
        let tokens = |bits: u8| if bits == 3 { 258 } else { 6 };
        for (levels, bits, rows, cols, group) in all() {
            let (packed, _) = random_rows((levels, bits), rows, cols, group);
            let mut random = Random::new(4, "x", &[cols as u64]);
            let tokens = tokens(bits);
            let x: Vec<f32> = (0..tokens * cols).map(|_| random.normal()).collect();
            let x = Var::from_vec(x, (2, tokens / 2, cols), &Device::Cpu).unwrap();
            let run = |y: Tensor| {
                let weights = Tensor::arange(0f32, y.elem_count() as f32, &Device::Cpu).unwrap();
                let loss = (y.flatten_all().unwrap() * weights.cos().unwrap()).unwrap().sum_all().unwrap();
                let g = loss.backward().unwrap().get(&x).unwrap().clone();
                (
                    y.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
                    g.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
                )
            };
            let fast = run(packed_matmul(&x, &packed).unwrap());
            let plain = run(reference(&x, &packed).unwrap());
            for (a, b) in fast.0.iter().zip(&plain.0).chain(fast.1.iter().zip(&plain.1)) {
                // f32 sums of up to 300 terms in another order; 8-bit codes reach 255 steps of a tenth.
                let size = packed.largest_whole() as f32 * 0.1;
                assert!(
                    (a - b).abs() <= 1e-5 * (1.0 + b.abs() + size),
                    "{bits} bits {rows}x{cols} in groups of {group:?}: {a} {b}"
                );
            }
        }
    }

    #[test]
    fn threads_change_nothing() {
        for (tokens, group) in [(5, Some(64)), (5, None), (265, Some(64))] {
            let (packed, _) = random_rows((Levels::mid_rise(3), 3), 150, 600, group);
            let x = crate::kernels::testing::values(&[tokens, 600], 5);
            crate::kernels::testing::ignores_threads(&[x], &|t| packed_matmul(&t[0], &packed));
        }
    }

    #[test]
    fn half_precision_activations_keep_their_dtype() {
        let (packed, _) = random_rows((Levels::signed(4), 4), 7, 13, Some(5));
        let x = crate::kernels::testing::values(&[3, 13], 2);
        for dtype in [DType::BF16, DType::F16] {
            let x = x.to_dtype(dtype).unwrap();
            let y = packed_matmul(&x, &packed).unwrap();
            assert_eq!(y.dtype(), dtype);
            let wide = packed_matmul(&x.to_dtype(DType::F32).unwrap(), &packed).unwrap();
            crate::kernels::testing::close("half", &y, &wide, crate::kernels::testing::BF16);
        }
    }

    #[test]
    fn wrong_width_is_named() {
        let (packed, _) = random_rows((Levels::signed(4), 4), 2, 3, None);
        let x = Tensor::zeros((2, 4), DType::F32, &Device::Cpu).unwrap();
        let error = packed_matmul(&x, &packed).unwrap_err().to_string();
        assert!(error.contains("found 4 input features, expected 3"), "{error}");
    }
}
