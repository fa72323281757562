//! One error type for the whole library: a variant per cause that a caller can act on.
//!
//! Every message is one line that names the file, the tensor or the key, what was found and what
//! was expected. [`Error::exit_code`] is the command line's contract.

use std::path::{Path, PathBuf};

/// `Result` with qtune's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong, by the cause a caller can act on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command or the recipe asks for something that does not exist or does not go together.
    #[error("{0}")]
    Usage(String),
    /// A file that is not what it should be: truncated, a wrong magic, a lying header.
    #[error("{}: {message}", path.display())]
    Input {
        /// The file or folder.
        path: PathBuf,
        /// What was found and what was expected.
        message: String,
    },
    /// A tensor that is missing or has the wrong shape, dtype or values.
    #[error("tensor {name}: {message}")]
    Tensor {
        /// The checkpoint name of the tensor.
        name: String,
        /// What was found and what was expected.
        message: String,
    },
    /// The system refused an operation on a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// It does not fit into memory or onto the disk.
    #[error("{0}")]
    Fit(String),
    /// The run itself failed: a loss that is not finite, a gradient that never arrived.
    #[error("{0}")]
    Run(String),
    /// A loss or a gradient that is not a finite number.
    #[error("{0}")]
    NotFinite(String),
    /// Stopped by a signal, after a checkpoint was written.
    #[error("stopped by signal {signal}{}", resume.as_ref().map(|p| format!("; continue with --resume {}", p.display())).unwrap_or_default())]
    Stopped {
        /// The signal's number.
        signal: i32,
        /// The run directory that can be resumed.
        resume: Option<PathBuf>,
    },
    /// An error of candle's, with the name of what it happened to.
    #[error("{name}: {}", first_line(source))]
    On {
        /// The tensor, layer or file.
        name: String,
        /// candle's error.
        source: candle_core::Error,
    },
    /// An error of candle's.
    #[error("{}", first_line(.0))]
    Candle(#[from] candle_core::Error),
}

/// candle's messages hold a backtrace where `RUST_BACKTRACE` is set: only the first line is for users.
fn first_line(error: &candle_core::Error) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or_default().to_string()
}

impl Error {
    /// A wrong command line or recipe (exit code 2).
    pub fn usage(message: impl Into<String>) -> Self {
        Error::Usage(message.into())
    }

    /// A bad input file (exit code 4).
    pub fn input(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Error::Input { path: path.as_ref().to_path_buf(), message: message.into() }
    }

    /// A bad tensor in an input file (exit code 4).
    pub fn tensor(name: impl Into<String>, message: impl Into<String>) -> Self {
        Error::Tensor { name: name.into(), message: message.into() }
    }

    /// A failed system call on `path`.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Error::Io { path: path.as_ref().to_path_buf(), source }
    }

    /// The exit code of the command line: 1 the run failed, 2 wrong usage, 3 it does not fit,
    /// 4 a bad input file, 130 and 143 after SIGINT and SIGTERM.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) => 2,
            Error::Fit(_) => 3,
            Error::Input { .. } | Error::Tensor { .. } => 4,
            Error::Io { source, .. } => match source.kind() {
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => 3,
                std::io::ErrorKind::OutOfMemory => 3,
                std::io::ErrorKind::NotFound => 4,
                _ => 1,
            },
            Error::Stopped { signal, .. } => 128u8.saturating_add(*signal as u8),
            Error::Run(_) | Error::NotFinite(_) | Error::On { .. } | Error::Candle(_) => 1,
        }
    }
}

/// Adds the name of the tensor, layer or file to an error of candle's.
pub trait On<T> {
    /// Names what the error happened to.
    fn on(self, name: impl Into<String>) -> Result<T>;
}

impl<T> On<T> for candle_core::Result<T> {
    fn on(self, name: impl Into<String>) -> Result<T> {
        self.map_err(|source| Error::On { name: name.into(), source })
    }
}

impl<T> On<T> for std::io::Result<T> {
    fn on(self, name: impl Into<String>) -> Result<T> {
        self.map_err(|source| Error::Io { path: PathBuf::from(name.into()), source })
    }
}
