//! The program: parse, run, print the error on one line, exit with its code.

#![deny(unsafe_code)]

use std::process::ExitCode;

mod cli;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    qtune::memory::keep();
    // candle's own elementwise ops would spin on a second pool beside ours, which costs more than it
    // gives at our sizes. Set before candle reads it, while there is one thread.
    if std::env::var_os("CANDLE_NUM_THREADS").is_none() {
        std::env::set_var("CANDLE_NUM_THREADS", "1");
    }
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut message = error.to_string().replace('\n', " ");
            // candle's errors hold a backtrace behind their first line, where one is asked for. Library errors already
            // hold their cause's text.
            let chain: Vec<String> =
                error.chain().map(|e| e.to_string().lines().next().unwrap_or_default().to_string()).collect();
            for cause in chain.iter().skip(1).filter(|cause| !chain[0].contains(cause.as_str())) {
                message = format!("{message}: {cause}");
            }
            eprintln!("qtune: {message}");
            let code = error.downcast_ref::<qtune::Error>().map(qtune::Error::exit_code).unwrap_or(1);
            ExitCode::from(code)
        }
    }
}
