//! Histories of codes on the device (kernels/oscillation.cu).

use super::{place, storage, suffix, Launch, Place};
use candle_core::{DType, Device, Result, Tensor};

/// The history of the codes of one weight, on its device: what a track of `train::oscillation` holds.
#[derive(Debug)]
pub(crate) struct History {
    count: usize,
    /// Signed bytes.
    last: Tensor,
    direction: Tensor,
    ema: Tensor,
    total: Tensor,
    /// Signed bytes; nothing where no gradient was shown.
    signs: Option<(Tensor, Tensor)>,
    /// For each block the sums of the means, of those above a bound, and of the codes that changed.
    figures: Tensor,
}

/// A history as the host holds it.
#[derive(Debug, Default)]
pub(crate) struct HostHistory {
    pub last: Vec<i8>,
    pub direction: Vec<i8>,
    pub ema: Vec<f32>,
    pub total: Vec<u32>,
    pub sign: Vec<i8>,
    pub turned: Vec<bool>,
    pub changed: usize,
}

fn blocks(count: usize) -> usize {
    count.div_ceil(1024).clamp(1, 256)
}

fn bytes(values: impl Iterator<Item = i8>, device: &Device) -> Result<Tensor> {
    let values: Vec<u8> = values.map(|v| v as u8).collect();
    let count = values.len();
    Tensor::from_vec(values, count, device)
}

/// The first element of a contiguous tensor on a CUDA device, which lives as long as the tensor.
fn at(op: &str, x: &Tensor) -> Result<Place> {
    let (held, layout) = x.storage_and_layout();
    place(op, storage(op, &held)?, layout)
}

impl History {
    /// What the host knows, brought to `device`.
    pub(crate) fn there(known: &HostHistory, device: &Device) -> Result<Self> {
        let count = known.last.len();
        let signs = match known.sign.is_empty() {
            true => None,
            false => {
                let turned = (0..count).map(|i| i8::from(known.turned.get(i).copied().unwrap_or(false)));
                Some((bytes(known.sign.iter().copied(), device)?, bytes(turned, device)?))
            }
        };
        let mut figures = vec![0f64; blocks(count) * 3];
        figures[0] = known.ema.iter().map(|&e| f64::from(e)).sum();
        Ok(History {
            count,
            last: bytes(known.last.iter().copied(), device)?,
            direction: bytes(known.direction.iter().copied(), device)?,
            ema: Tensor::from_slice(&known.ema, count, device)?,
            total: Tensor::from_slice(&known.total, count, device)?,
            signs,
            figures: Tensor::from_vec(figures, (blocks(count), 3), device)?,
        })
    }

    /// Elements that are followed.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Takes in the codes of a step: whole numbers in f32.
    pub(crate) fn observe(&self, codes: &Tensor, momentum: f32, above: f32) -> Result<()> {
        let op = "oscillation";
        let codes = codes.to_dtype(DType::F32)?.contiguous()?;
        if codes.elem_count() != self.count {
            candle_core::bail!("{op}: expected {} codes, got {}", self.count, codes.elem_count())
        }
        let device = codes.device().as_cuda_device()?;
        let launch = Launch::new(device, "oscillation", "oscillation_codes").place(at(op, &codes)?);
        let launch =
            launch.place(at(op, &self.last)?).place(at(op, &self.direction)?).place(at(op, &self.ema)?);
        let launch = launch.place(at(op, &self.total)?).place(at(op, &self.figures)?).i64(self.count);
        let launch = launch.f32(momentum).f32(1.0 - momentum).f32(above);
        // SAFETY: all have `count` elements, figures three for each block.
        unsafe { launch.run((blocks(self.count), 1, 1), (256, 1, 1), 0) }
    }

    /// Takes in the gradient of a step.
    pub(crate) fn observe_gradient(&mut self, gradient: &Tensor) -> Result<()> {
        let op = "oscillation";
        let gradient = gradient.contiguous()?;
        if gradient.elem_count() != self.count {
            candle_core::bail!("{op}: expected {} gradients, got {}", self.count, gradient.elem_count())
        }
        let device = gradient.device().as_cuda_device()?;
        if self.signs.is_none() {
            let zeros = || Tensor::zeros(self.count, DType::U8, gradient.device());
            self.signs = Some((zeros()?, zeros()?));
        }
        let Some((sign, turned)) = &self.signs else { return Ok(()) };
        let kernel = format!("oscillation_gradient_{}", suffix(op, gradient.dtype())?);
        let launch = Launch::new(device, "oscillation", kernel).place(at(op, &gradient)?);
        let launch = launch.place(at(op, sign)?).place(at(op, turned)?).i64(self.count);
        // SAFETY: all have `count` elements.
        unsafe { launch.run((blocks(self.count), 1, 1), (256, 1, 1), 0) }
    }

    /// The sums of the means, of those above the bound, and of the codes that changed at the last step, `[blocks, 3]`.
    pub(crate) fn figures(&self) -> &Tensor {
        &self.figures
    }

    /// Brought back to the host; waits for the device.
    pub(crate) fn read(&self) -> Result<HostHistory> {
        let signed = |t: &Tensor| {
            Ok::<_, candle_core::Error>(t.to_vec1::<u8>()?.into_iter().map(|b| b as i8).collect())
        };
        let (sign, turned) = match &self.signs {
            Some((sign, turned)) => {
                (signed(sign)?, turned.to_vec1::<u8>()?.into_iter().map(|turned| turned != 0).collect())
            }
            None => (Vec::new(), Vec::new()),
        };
        let changed: f64 = self.figures.to_vec2::<f64>()?.iter().map(|sums| sums[2]).sum();
        Ok(HostHistory {
            last: signed(&self.last)?,
            direction: signed(&self.direction)?,
            ema: self.ema.to_vec1()?,
            total: self.total.to_vec1()?,
            sign,
            turned,
            changed: changed as usize,
        })
    }
}
