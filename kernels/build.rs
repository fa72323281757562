//! Records the commit that the program was built from, for `--version` and summary.json, and under feature `cuda`
//! compiles kernels/*.cu.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

fn main() {
    let git = |args: &[&str]| {
        let out = Command::new("git").args(args).output().ok().filter(|o| o.status.success())?;
        Some(String::from_utf8_lossy(&out.stdout).trim().to_string()).filter(|s| !s.is_empty())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".into());
    println!("cargo:rustc-env=QTUNE_COMMIT={commit}");
    println!("cargo:rerun-if-changed=kernels/build.rs");
    // A commit moves HEAD's log; where there is none (a source archive) nothing is watched.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]).filter(|p| Path::new(p).exists()) {
        println!("cargo:rerun-if-changed={log}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        if let Err(message) = kernels() {
            println!("cargo::error={message}");
        }
    }
}

/// What every call of nvcc is given; kernels/compile gives the same.
const FLAGS: &str = "kernels/nvcc.flags";

/// What an image holds: machine code for 8.x and 9.x, and PTX, which the driver compiles for later cards. Compressed,
/// since the kernels are many times as large as text: the driver unpacks what it takes.
const IMAGE: [&str; 6] = [
    "-fatbin",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    "--compress-mode=size",
    // The two architectures at once.
    "--threads=2",
    "-o",
];

/// Compiles each kernels/*.cu and writes `kernels.rs`, an expression that lists what came of them, by name:
///
/// `&[Module { name: "classp", image: include_bytes!("classp.fatbin") }, ...]`
fn kernels() -> Result<(), String> {
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-env-changed=NVCC");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let nvcc = Nvcc::find()?;

    // A header may be included by any kernel.
    let mut shared = format!("{IMAGE:?}{}", nvcc.version).into_bytes();
    let mut sources = Vec::new();
    for path in files(Path::new("kernels"))? {
        match path.extension().and_then(OsStr::to_str) {
            Some("cu") => sources.push(path),
            Some("cuh" | "h" | "flags") => shared.extend(read(&path)?),
            _ => {}
        }
    }

    let mut list = String::from("&[\n");
    let mut tasks = Vec::new();
    for source in sources {
        let name = source.file_stem().and_then(OsStr::to_str).ok_or("kernels: a name is not UTF-8")?;
        list += &format!("    Module {{ name: {name:?}, image: include_bytes!(\"{name}.fatbin\") }},\n");
        let mut hasher = DefaultHasher::new();
        hasher.write(&shared);
        hasher.write(&read(&source)?);
        tasks.push((out.join(name), hasher.finish().to_string(), source));
    }
    list.push_str("]\n");

    let next = AtomicUsize::new(0);
    let work = || -> Result<(), String> {
        while let Some((made, key, source)) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
            // Written last: what is there is whole, and was made of the same text by the same compiler.
            let (image, record) = (made.with_extension("fatbin"), made.with_extension("key"));
            if fs::read_to_string(&record).is_ok_and(|of| of == *key) {
                continue;
            }
            let _ = fs::remove_file(&record);
            nvcc.compile(source, &image)?;
            write(&record, key)?;
        }
        Ok(())
    };
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1).min(tasks.len());
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        running
            .into_iter()
            .try_for_each(|thread| thread.join().map_err(|_| "a thread panicked".to_string())?)
    })?;
    write(&out.join("kernels.rs"), &list)
}

/// All files beneath `folder`, sorted.
fn files(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))? {
        let path = entry.map_err(|e| format!("{}: {e}", folder.display()))?.path();
        // What runs kernels on the host is no part of them.
        if path.ends_with("kernels/emulate") {
            continue;
        }
        match path.is_dir() {
            true => found.extend(files(&path)?),
            false => found.push(path),
        }
    }
    found.sort();
    Ok(found)
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|e| format!("{}: {e}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

/// CUDA's compiler.
struct Nvcc {
    path: PathBuf,
    /// All that it says of itself.
    version: String,
}

impl Nvcc {
    /// `$NVCC`, else the one of `$CUDA_HOME`, else the one in `PATH`.
    fn find() -> Result<Self, String> {
        let home = || {
            let path = PathBuf::from(env::var_os("CUDA_HOME")?).join("bin/nvcc");
            path.exists().then_some(path)
        };
        let path = env::var_os("NVCC").map(PathBuf::from).or_else(home).unwrap_or("nvcc".into());
        let said = Command::new(&path).arg("--version").output().map_err(|error| {
            format!(
                "{}: {error}; feature `cuda` needs CUDA's compiler: kernels/setup-cuda brings it, or name one in \
                 NVCC or CUDA_HOME",
                path.display()
            )
        })?;
        Ok(Nvcc { path, version: String::from_utf8_lossy(&said.stdout).into_owned() })
    }

    fn compile(&self, source: &Path, image: &Path) -> Result<(), String> {
        let mut command = Command::new(&self.path);
        let ended = command.args(["--options-file", FLAGS]).args(IMAGE).arg(image).arg(source).output();
        let ended = ended.map_err(|error| format!("{}: {error}", self.path.display()))?;
        let said = [ended.stdout, ended.stderr].concat();
        for line in String::from_utf8_lossy(&said).lines().filter(|line| !line.trim().is_empty()) {
            println!("cargo::warning={line}");
        }
        match ended.status.success() {
            true => Ok(()),
            false => Err(format!("{}: nvcc: {}", source.display(), ended.status)),
        }
    }
}
