//! The contestants of the product benches that run in this process: qtune's packed and dense products through its public
//! functions, and candle's.

#![allow(dead_code)] // Each bench is a crate of its own and takes what it needs.

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{Device, Module, Tensor};
use qtune::kernels::{linear, packed_matmul, packed_matmul_int8, packed_quantized_matmul, Levels, Rounding};
use qtune::random::Random;
use qtune::weights::{Centering, Grid, Packed};

use crate::harness::{Contestant, Failure};
use crate::shapes::Shape;

/// What a contestant is made for.
pub struct Setting<'a> {
    /// The product.
    pub shape: Shape,
    /// Copies of a weight of so many bytes.
    pub copies: &'a dyn Fn(usize) -> usize,
}

/// Numbers between -1 and 1 that cost little to make; what they are changes no time.
fn numbers(count: usize, name: &str) -> Vec<f32> {
    let mut random = Random::new(0, name, &[count as u64]);
    let some: Vec<f32> = (0..count.min(1 << 16)).map(|_| random.range(-1.0, 1.0)).collect();
    some.iter().cycle().take(count).copied().collect()
}

fn activations(shape: &Shape) -> Result<Tensor, Failure> {
    let values = numbers(shape.rows * shape.input, "x");
    Ok(Tensor::from_vec(values, (shape.rows, shape.input), &Device::Cpu)?)
}

/// Copies of a dense weight, each in memory of its own.
fn weights(setting: &Setting<'_>) -> Result<Vec<Tensor>, Failure> {
    let shape = &setting.shape;
    let copies = (setting.copies)(4 * shape.weights());
    let one = |_| {
        let values = numbers(shape.weights(), "w");
        Ok(Tensor::from_vec(values, (shape.output, shape.input), &Device::Cpu)?)
    };
    (0..copies).map(one).collect()
}

/// `qtune::kernels::linear` in f32.
pub fn dense(setting: &Setting<'_>) -> Result<Contestant<'static>, Failure> {
    let (x, w) = (activations(&setting.shape)?, weights(setting)?);
    let bytes = 4 * setting.shape.weights();
    Ok(Contestant::new("qtune f32", w.len(), bytes, move |i| {
        linear(&x, &w[i], None)?;
        Ok(())
    }))
}

/// Copies of a packed weight of random codes, each in memory of its own.
fn packs(setting: &Setting<'_>, bits: u8, group: Option<usize>) -> Result<Vec<Packed>, Failure> {
    let shape = &setting.shape;
    let grid = Grid::new(bits, if bits == 2 { Centering::MidRise } else { Centering::Signed })?;
    let (bytes, group) = (grid.row_bytes(shape.input), group.filter(|g| *g < shape.input));
    let groups = group.map_or(1, |g| shape.input.div_ceil(g));
    let used = shape.input * usize::from(bits) % 8;
    let mut random = Random::new(0, "codes", &[]);
    let count = (setting.copies)(shape.output * (bytes + 4 * groups));
    let mut codes: Vec<u8> = (0..shape.output * bytes).map(|_| random.bits() as u8).collect();
    if used > 0 {
        codes.chunks_exact_mut(bytes).for_each(|row| row[bytes - 1] &= (1 << used) - 1);
    }
    let step = numbers(shape.output * groups, "step").iter().map(|s| s.abs() + 0.01).collect::<Vec<_>>();
    let one = |_| {
        let codes = Tensor::from_slice(&codes, (shape.output, bytes), &Device::Cpu)?;
        let step = match group {
            Some(_) => Tensor::from_slice(&step, (shape.output, groups), &Device::Cpu)?,
            None => Tensor::from_slice(&step, shape.output, &Device::Cpu)?,
        };
        let dims = [shape.output, shape.input];
        Ok(Packed::from_tensors("w", grid, group, &dims, &codes, &step)?)
    };
    (0..count).map(one).collect()
}

/// `qtune::kernels::packed_matmul`: float activations on a packed weight.
pub fn packed(setting: &Setting<'_>, bits: u8, group: Option<usize>) -> Result<Contestant<'static>, Failure> {
    let (x, w) = (activations(&setting.shape)?, packs(setting, bits, group)?);
    let bytes = w[0].bytes();
    let name = match group {
        Some(group) => format!("qtune W{bits} g{group}, f32 activations"),
        None => format!("qtune W{bits}, f32 activations"),
    };
    Ok(Contestant::new(name, w.len(), bytes, move |i| {
        packed_matmul(&x, w[i].rows())?;
        Ok(())
    }))
}

/// `qtune::kernels::packed_matmul_int8`: float activations that are rounded to 8 bits first, rounding included.
pub fn int8(setting: &Setting<'_>, bits: u8, group: Option<usize>) -> Result<Contestant<'static>, Failure> {
    let (x, w) = (activations(&setting.shape)?, packs(setting, bits, group)?);
    let bytes = w[0].bytes();
    let name = match group {
        Some(group) => format!("qtune W{bits} g{group}, int8 activations"),
        None => format!("qtune W{bits}, int8 activations"),
    };
    Ok(Contestant::new(name, w.len(), bytes, move |i| {
        packed_matmul_int8(&x, w[i].rows())?;
        Ok(())
    }))
}

/// `qtune::kernels::packed_quantized_matmul`: float activations that are rounded to a learned grid with a step for each
/// token, on a packed weight of one step a row, rounding included.
pub fn codes(setting: &Setting<'_>, bits: u8, act_bits: u8) -> Result<Contestant<'static>, Failure> {
    let (x, w) = (activations(&setting.shape)?, packs(setting, bits, None)?);
    let (bytes, shape) = (w[0].bytes(), setting.shape);
    let step = Tensor::full(2.0 / (1u32 << act_bits) as f32, shape.rows, &Device::Cpu)?;
    let shift = Some(Tensor::full(0.01f32, shape.input, &Device::Cpu)?);
    let rounding = Rounding { step, shift, levels: Levels::signed(act_bits) };
    Ok(Contestant::new(format!("qtune W{bits}A{act_bits}"), w.len(), bytes, move |i| {
        packed_quantized_matmul(&x, rounding.clone(), w[i].rows(), None)?.ok_or("no integer product")?;
        Ok(())
    }))
}

/// candle's quantized and dense products; quantized ones only where the input is a multiple of their blocks.
pub fn candle(setting: &Setting<'_>) -> Result<Vec<Contestant<'static>>, Failure> {
    let shape = setting.shape;
    let x = activations(&shape)?;
    let w = weights(setting)?;
    let mut contestants = Vec::new();
    for (name, dtype) in [
        ("candle q2k", GgmlDType::Q2K),
        ("candle q4k", GgmlDType::Q4K),
        ("candle q4_0", GgmlDType::Q4_0),
        ("candle q8_0", GgmlDType::Q8_0),
    ] {
        if !shape.input.is_multiple_of(dtype.block_size()) {
            continue;
        }
        // A few rows are quantized and repeated: what the codes are changes no time.
        let few = 64.min(shape.output);
        let some = QTensor::quantize(&w[0].narrow(0, 0, few)?.contiguous()?, dtype)?;
        let some = some.data()?.into_owned();
        let bytes = some.len() / few * shape.output;
        let data: Vec<u8> = some.iter().cycle().take(bytes).copied().collect();
        let one = |_| -> Result<QMatMul, Failure> {
            let storage = QStorage::from_data(data.clone().into(), &Device::Cpu, dtype)?;
            Ok(QMatMul::from_qtensor(QTensor::new(storage, (shape.output, shape.input))?)?)
        };
        let all: Vec<QMatMul> = (0..(setting.copies)(bytes)).map(one).collect::<Result<_, _>>()?;
        let x = x.clone();
        contestants.push(Contestant::new(name, all.len(), bytes, move |i| {
            all[i].forward(&x)?;
            Ok(())
        }));
    }
    contestants.push(Contestant::new("candle f32", w.len(), 4 * shape.weights(), move |i| {
        x.matmul(&w[i].t()?)?;
        Ok(())
    }));
    Ok(contestants)
}
