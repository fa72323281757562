//! Records the commit that the program was built from, for `--version` and summary.json.

use std::path::Path;
use std::process::Command;

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
}
