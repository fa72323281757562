//! A language model of the Llama family as one GGUF file.
//!
//! The file is written tensor by tensor: no more than one dense tensor of the model is made at a time.
//! Matrices are stored as asked, vectors (norms, biases) in f32, as llama.cpp's own converter does.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

use super::header::{Header, Kind, Value};
use super::{llama, vocab};
use crate::adapter::{Adapter, Attach, Method, Modules, Residual};
use crate::data::text::Tokenizer;
use crate::files::{write_atomic, WriteError};
use crate::models::{open_llama, LlamaConfig, OpenedLlama};
use crate::weights::checkpoint::check_finite;
use crate::weights::format::QuantizationConfig;
use crate::weights::Weights;
use crate::{Error, On, Result};

/// How the matrices of a file are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encoding {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    #[default]
    F16,
    /// 16-bit floats of f32's range.
    Bf16,
    /// 8 bits and an f16 step for each 32 columns.
    Q8_0,
    /// 4 bits and an f16 step for each 32 columns.
    Q4_0,
}

impl Encoding {
    fn kind(self) -> Kind {
        match self {
            Encoding::F32 => Kind::F32,
            Encoding::F16 => Kind::F16,
            Encoding::Bf16 => Kind::Bf16,
            Encoding::Q8_0 => Kind::Q8_0,
            Encoding::Q4_0 => Kind::Q4_0,
        }
    }

    /// `general.file_type`: how most of the file is stored.
    fn file_type(self) -> u32 {
        match self {
            Encoding::F32 => 0,
            Encoding::F16 => 1,
            Encoding::Q4_0 => 2,
            Encoding::Q8_0 => 7,
            Encoding::Bf16 => 32,
        }
    }
}

/// How a model is exported.
#[derive(Clone, Debug, Default)]
pub struct GgufOptions {
    /// How matrices are stored.
    pub encoding: Encoding,
    /// Adapters to fold in, in order, each with a factor on its change (1 where `None`).
    pub adapters: Vec<(PathBuf, Option<f64>)>,
    /// What to make of adapters whose start was taken out of the base.
    pub residual: Residual,
    /// `general.name`; the folder's name where `None`.
    pub name: Option<String>,
}

/// What was written.
#[derive(Clone, Debug)]
pub struct Gguf {
    /// The file.
    pub path: PathBuf,
    /// The architecture that it names.
    pub architecture: &'static str,
    /// Tensors in it.
    pub tensors: usize,
    /// Its size in bytes.
    pub bytes: u64,
    /// What is worth a line.
    pub notes: Vec<String>,
}

/// What a tensor of the file is made of.
enum Source {
    /// A weight of the model.
    Weight(String),
    /// Numbers made here.
    Numbers(Vec<f32>),
}

/// Writes the language model in the folder `dir` as the GGUF file `out`, whole or not at all.
///
/// Errs where `out` exists, where the model is not of the Llama family or its activations are quantized,
/// where the tokenizer is no byte-pair encoding, where an adapter does not fit, and on values that the
/// encoding cannot hold.
pub fn export_gguf(dir: &Path, out: &Path, options: &GgufOptions) -> Result<Gguf> {
    if std::fs::symlink_metadata(out).is_ok() {
        return Err(Error::io(out, std::io::ErrorKind::AlreadyExists.into()));
    }
    let OpenedLlama { config, json, mut weights, mut notes } = open_llama(dir, &Device::Cpu)?;
    let quantization = QuantizationConfig::read(&dir.join("config.json"), &json)?;
    if let Some(tap) = quantization.iter().flat_map(|q| q.activations.keys()).next() {
        let message = format!("the activations at {tap} are quantized, which GGUF cannot say");
        return Err(Error::input(dir, message));
    }
    let modules = Modules::of(&json, &weights)?;
    for (path, scale) in &options.adapters {
        let adapter = Adapter::open(path)?;
        if matches!(&adapter.config.method, Method::Lora(lora) if lora.bias) {
            let message = "the adapter has biases of its own: merge it first, with qtune merge";
            return Err(Error::input(path, message));
        }
        notes.extend(adapter.notes().iter().cloned());
        let how = Attach { training: None, scale: *scale, residual: options.residual };
        notes.extend(adapter.attach(&mut weights, &modules, &how)?.notes);
    }
    let name = match &options.name {
        Some(name) => name.clone(),
        None => name_of(dir),
    };
    let metadata = metadata(dir, &config, &weights, options.encoding, name, &mut notes)?;
    let (sources, planned) = plan(&config, &weights, options.encoding, &mut notes)?;
    let header = Header::new(metadata, planned)?;
    let head = header.encode();
    let Some(bytes) = header.file_bytes() else {
        return Err(Error::Fit(format!("{}: the file would be beyond counting", out.display())));
    };
    // What readers would stumble over is found before a byte is written.
    let read = Header::parse(out, &head, bytes)?;
    if read != header {
        return Err(Error::Run(format!("{}: the head reads back as another", out.display())));
    }
    write_atomic(out, |w| {
        w.write_all(&head)?;
        for (at, (source, info)) in sources.iter().zip(&header.tensors).enumerate() {
            let tensor = made(&config, &weights, source, &info.shape)?;
            let encoded = encode(&info.name, &tensor, info.kind)?;
            if Some(encoded.len() as u64) != info.bytes() {
                let message =
                    format!("made {} bytes, planned {:?} of {:?}", encoded.len(), info.shape, info.kind);
                return Err(WriteError::Other(Error::tensor(&info.name, message)));
            }
            w.write_all(&encoded)?;
            w.write_all(&vec![0; header.padding(at) as usize])?;
        }
        Ok(())
    })?;
    let architecture = llama::architecture(&config);
    Ok(Gguf { path: out.to_path_buf(), architecture, tensors: header.tensors.len(), bytes, notes })
}

/// A folder's name; of `model/` in a run, the run's.
fn name_of(dir: &Path) -> String {
    let dir = std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_path_buf());
    let dir = if dir.ends_with("model") { dir.parent().unwrap_or(&dir) } else { &dir };
    dir.file_name().map_or_else(|| "model".to_string(), |name| name.to_string_lossy().into_owned())
}

const TABLE: &str = "model.embed_tokens.weight";

fn metadata(
    dir: &Path,
    config: &LlamaConfig,
    weights: &Weights,
    encoding: Encoding,
    name: String,
    notes: &mut Vec<String>,
) -> Result<Vec<(String, Value)>> {
    let rows = weights.get(TABLE)?.shape()?.first().copied().unwrap_or(0);
    let mut metadata = vec![
        ("general.architecture".to_string(), Value::Text(llama::architecture(config).into())),
        ("general.type".to_string(), Value::Text("model".into())),
        ("general.name".to_string(), Value::Text(name)),
        ("general.file_type".to_string(), Value::U32(encoding.file_type())),
    ];
    if encoding.kind().block() > 1 {
        metadata.push(("general.quantization_version".into(), Value::U32(2)));
    }
    metadata.extend(llama::metadata(config, rows)?);
    notes.extend(llama::left_out(config));
    match Tokenizer::beside(dir) {
        true => {
            let (entries, more) = vocab::metadata(&Tokenizer::open(dir, Some(rows))?, rows)?;
            metadata.extend(entries);
            notes.extend(more);
        }
        false => {
            metadata.extend(vocab::none());
            notes.push(format!("{}: no tokenizer here, the file has none", dir.display()));
        }
    }
    Ok(metadata)
}

/// What is written, in order: sources, and names, shapes and kinds.
type Plan = (Vec<Source>, Vec<(String, Vec<usize>, Kind)>);

fn plan(
    config: &LlamaConfig,
    weights: &Weights,
    encoding: Encoding,
    notes: &mut Vec<String>,
) -> Result<Plan> {
    let (mut sources, mut planned) = (Vec::new(), Vec::new());
    if let Some(factors) = llama::rope_factors(config) {
        planned.push(("rope_freqs.weight".to_string(), vec![factors.len()], Kind::F32));
        sources.push(Source::Numbers(factors));
    }
    let mut odd: Vec<String> = Vec::new();
    for (name, weight) in weights.iter() {
        let (shape, renamed) = (weight.shape()?, llama::renamed(name)?);
        let columns = shape.last().copied().unwrap_or(0);
        let kind = match encoding.kind() {
            _ if shape.len() < 2 => Kind::F32,
            kind if columns.is_multiple_of(kind.block()) => kind,
            _ => {
                odd.push(renamed.clone());
                Kind::F16
            }
        };
        planned.push((renamed, shape, kind));
        sources.push(Source::Weight(name.to_string()));
    }
    if let Some(first) = odd.first() {
        notes.push(format!(
            "{} tensors in f16, {first} first: 32 does not divide their columns, so that {} has no blocks for them",
            odd.len(),
            encoding.kind().name()
        ));
    }
    Ok((sources, planned))
}

/// The values of a tensor of the file, in f32.
fn made(config: &LlamaConfig, weights: &Weights, source: &Source, shape: &[usize]) -> Result<Tensor> {
    match source {
        Source::Numbers(numbers) => Ok(Tensor::from_slice(numbers, shape, &Device::Cpu)?),
        Source::Weight(name) => {
            let tensor = weights.get(name)?.tensor()?.detach().to_dtype(DType::F32).on(name)?;
            check_finite(name, &tensor)?;
            llama::ordered(config, name, &tensor)
        }
    }
}

/// The bytes of an f32 tensor as the file holds them. Errs on a value that is beyond f16.
fn encode(name: &str, tensor: &Tensor, kind: Kind) -> Result<Vec<u8>> {
    let quantized = |dtype: GgmlDType| -> Result<Vec<u8>> {
        let quantized = QTensor::quantize(tensor, dtype).on(name)?;
        let data = quantized.data().map(Cow::into_owned).on(name)?;
        // A step beyond f16 is an infinity, and every value of its block with it.
        let step = |block: &[u8]| f16::from_le_bytes([block[0], block[1]]);
        match data.chunks_exact(kind.block_bytes()).all(|block| step(block).is_finite()) {
            true => Ok(data),
            false => Err(too_large(name, kind)),
        }
    };
    let values = match kind {
        Kind::Q4_0 => return quantized(GgmlDType::Q4_0),
        Kind::Q8_0 => return quantized(GgmlDType::Q8_0),
        Kind::F32 | Kind::F16 | Kind::Bf16 => {
            tensor.flatten_all().and_then(|t| t.to_vec1::<f32>()).on(name)?
        }
    };
    let mut bytes = Vec::with_capacity(values.len() * kind.block_bytes());
    for v in values {
        let (half, bfloat) = (f16::from_f32(v), bf16::from_f32(v));
        match kind {
            Kind::F16 if half.is_finite() => bytes.extend_from_slice(&half.to_le_bytes()),
            Kind::Bf16 if bfloat.is_finite() => bytes.extend_from_slice(&bfloat.to_le_bytes()),
            Kind::F32 => bytes.extend_from_slice(&v.to_le_bytes()),
            _ => return Err(too_large(name, kind)),
        }
    }
    Ok(bytes)
}

fn too_large(name: &str, kind: Kind) -> Error {
    Error::tensor(name, format!("found a value beyond {}: export f32 or bf16", kind.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_by_hand() {
        let row: Vec<f32> = (0..32).map(|i| i as f32 - 16.0).collect();
        let t = Tensor::from_slice(&row, (1, 32), &Device::Cpu).unwrap();
        let f32s = encode("w", &t, Kind::F32).unwrap();
        assert_eq!((f32s.len(), &f32s[..4]), (128, &(-16f32).to_le_bytes()[..]));
        let f16s = encode("w", &t, Kind::F16).unwrap();
        assert_eq!((f16s.len(), &f16s[..2]), (64, &f16::from_f32(-16.0).to_le_bytes()[..]));
        let bf16s = encode("w", &t, Kind::Bf16).unwrap();
        assert_eq!((bf16s.len(), &bf16s[2..4]), (64, &bf16::from_f32(-15.0).to_le_bytes()[..]));
        // A step of 16 / 127, codes of w / step.
        let q8 = encode("w", &t, Kind::Q8_0).unwrap();
        assert_eq!((q8.len(), &q8[..2]), (34, &f16::from_f32(16.0 / 127.0).to_le_bytes()[..]));
        assert_eq!((q8[2] as i8, q8[2 + 16] as i8), (-127, 0));
        // A step of -16 / -8 = 2, codes of w / step + 8, the first half of a block in the low bits.
        let q4 = encode("w", &t, Kind::Q4_0).unwrap();
        assert_eq!((q4.len(), &q4[..2]), (18, &f16::from_f32(2.0).to_le_bytes()[..]));
        assert_eq!((q4[2] & 15, q4[2] >> 4), (0, 8));
    }

    #[test]
    fn values_beyond_a_kind_are_refused_by_name() {
        let t = Tensor::new(&[[1e30f32; 32]], &Device::Cpu).unwrap();
        for kind in [Kind::F16, Kind::Q8_0, Kind::Q4_0] {
            let error = encode("blk.0.w", &t, kind).unwrap_err().to_string();
            assert!(error.contains("blk.0.w") && error.contains("beyond"), "{error}");
        }
        assert!(encode("w", &t, Kind::Bf16).is_ok());
    }
}
