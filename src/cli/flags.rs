//! Flags that mean the same in every command.

use std::path::{Path, PathBuf};

use candle_core::Device;
use clap::{Args, ValueEnum};
use qtune::weights::Pickle;
use qtune::{Error, Result};

use super::progress::{Lines, Verbosity};

/// `--version`: with commit and the CPU or GPU features in use.
pub fn version() -> &'static str {
    static TEXT: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    TEXT.get_or_init(|| {
        let mut features: Vec<&str> = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let found = [
                ("avx2", is_x86_feature_detected!("avx2")),
                ("fma", is_x86_feature_detected!("fma")),
                ("avx512f", is_x86_feature_detected!("avx512f")),
                ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
            ];
            features.extend(found.iter().filter(|(_, present)| *present).map(|(name, _)| *name));
        }
        if cfg!(feature = "cuda") {
            features.push("cuda");
        }
        if cfg!(feature = "hub") {
            features.push("hub");
        }
        let features = if features.is_empty() { "portable".to_string() } else { features.join(" ") };
        format!("{} ({}, {features})", env!("CARGO_PKG_VERSION"), env!("QTUNE_COMMIT"))
    })
}

#[derive(Args, Debug)]
pub struct Common {
    /// Device to compute on: cpu, cuda or cuda:N [default: cuda where built in and present]
    #[arg(long, value_name = "DEVICE", global = true)]
    pub device: Option<String>,
    /// Threads to compute with [default: one for each core]
    #[arg(long, value_name = "N", global = true)]
    pub threads: Option<usize>,
    /// Number format to compute in
    #[arg(long, value_enum, default_value = "f32", global = true)]
    pub dtype: Dtype,
    /// Round the activations of a packed language model to 8 bits where up to 8 rows are multiplied at a time, as in
    /// decoding: faster, not exact. Without effect under an adapter
    #[arg(long, global = true)]
    pub act_int8: bool,
    /// Read models that PyTorch pickled (.pth, .pt, .bin): as data, nothing in them is run
    #[arg(long, global = true)]
    pub allow_pickle: bool,
    /// Print one JSON object to stdout
    #[arg(long, global = true)]
    pub json: bool,
    /// Print errors only
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Print more
    #[arg(short, long, global = true)]
    pub verbose: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum Dtype {
    F32,
    Bf16,
    F16,
}

impl Common {
    /// Sets up threads and device for a vision transformer.
    pub fn device(&self) -> Result<Device> {
        if self.act_int8 {
            return Err(Error::usage(
                "--act-int8: expected a language model, a vision transformer has learned grids",
            ));
        }
        if self.dtype == Dtype::F16 {
            return Err(Error::usage("--dtype f16: expected f32 or bf16 for a vision transformer"));
        }
        self.device_for_text()
    }

    /// What the format makes of a recipe's products.
    pub fn products(&self) -> Option<(String, toml::Value)> {
        let bf16 = self.dtype == Dtype::Bf16;
        bf16.then(|| ("train.products".to_string(), toml::Value::String("bf16".into())))
    }

    /// Sets up threads and device for a model that runs in any number format.
    pub fn device_for_text(&self) -> Result<Device> {
        if let Ok(set) = std::env::var("QTUNE_CPU") {
            if !["avx512", "avx2", "scalar"].contains(&set.as_str()) {
                return Err(Error::usage(format!("QTUNE_CPU = {set}: expected avx512, avx2 or scalar")));
            }
        }
        qtune::kernels::round_activations(self.act_int8);
        if self.dtype == Dtype::Bf16 {
            qtune::kernels::set_arithmetic(qtune::kernels::Arithmetic::Bf16);
        }
        qtune::threads::start(self.threads)?;
        let name = self.device.as_deref();
        let (kind, ordinal) = match name {
            None => return Ok(qtune::device::best()),
            Some(name) => match name.split_once(':') {
                None => (name, 0),
                Some((kind, n)) => {
                    let n =
                        n.parse().map_err(|_| Error::usage(format!("--device {name}: expected cuda:N")))?;
                    (kind, n)
                }
            },
        };
        match kind {
            "cpu" => Ok(Device::Cpu),
            "cuda" => qtune::device::cuda(ordinal),
            other => Err(Error::usage(format!("--device {other}: expected cpu, cuda or cuda:N"))),
        }
    }

    /// Whether pickled files may be read.
    pub fn pickle(&self) -> Pickle {
        Pickle::when(self.allow_pickle)
    }

    /// Where progress goes.
    pub fn progress(&self) -> Lines {
        Lines::new(match (self.quiet, self.verbose) {
            (true, _) => Verbosity::Quiet,
            (false, true) => Verbosity::Loud,
            (false, false) => Verbosity::Normal,
        })
    }
}

/// A path that still names the same file when the run is resumed from elsewhere; hub names stay.
pub fn anchored(path: &Path) -> PathBuf {
    match path.exists() {
        true => std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf()),
        false => path.to_path_buf(),
    }
}
