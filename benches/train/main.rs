//! Training steps beside those of PyTorch and PEFT, in turn, quantization-aware steps beside plain ones, and packed
//! vision transformers beside PyTorch and onnxruntime.
//!
//! `cargo bench --bench train -- deit-tiny llama-15m-bf16` for these cases (default: all of one thread count, 2 or
//! `QTUNE_THREADS`). Ours and theirs are processes of their own that wait for their turn: A B A B. The medians, the
//! median of the pairs' ratios and the peak memory go to standard output as a Markdown table. The peers run where
//! `QTUNE_PYTHON` names a Python with torch, timm, transformers and peft; real models come from `QTUNE_DATA`.

mod cases;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use candle_core::Device;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Failure = Box<dyn std::error::Error>;

const PEERS: &str = include_str!("peers.py");
/// Between two turns.
const REST: std::time::Duration = std::time::Duration::from_millis(100);
/// Turns that are not counted.
const WARM: usize = 2;

/// A process that takes a step when told to.
struct Runner {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// Memory before the first step, MiB.
    base: f64,
    /// Peak memory so far, MiB.
    peak: f64,
    ms: Vec<f64>,
}

impl Runner {
    fn start(mut command: Command) -> Result<Self, Failure> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let input = child.stdin.take().ok_or("no standard input")?;
        let output = BufReader::new(child.stdout.take().ok_or("no standard output")?);
        let mut runner = Runner { child, input, output, base: 0.0, peak: 0.0, ms: Vec::new() };
        let line = runner.line()?;
        runner.base = line.strip_prefix("ready ").ok_or("not ready")?.trim().parse::<f64>()? / 1024.0;
        Ok(runner)
    }

    fn line(&mut self) -> Result<String, Failure> {
        let mut line = String::new();
        match self.output.read_line(&mut line)? {
            0 => Err(format!("the process ended: {}", self.child.wait()?).into()),
            _ => Ok(line),
        }
    }

    fn turn(&mut self, counted: bool) -> Result<(), Failure> {
        // Threads of the one before spin for a while after their work.
        std::thread::sleep(REST);
        writeln!(self.input, "go")?;
        self.input.flush()?;
        let line = self.line()?;
        let mut parts = line.split_whitespace();
        let mut number = || -> Result<f64, Failure> { Ok(parts.next().ok_or("an empty line")?.parse()?) };
        let (ms, peak) = (number()?, number()?);
        self.peak = peak / 1024.0;
        if counted {
            self.ms.push(ms);
        }
        Ok(())
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Runs one case in turn with what it is measured against, and prints a row for each of these.
fn compare(case: &str, threads: usize, data: &str) -> Result<(), Failure> {
    let ours = |case: &str| -> Result<Runner, Failure> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--ours", case, data]).env("RAYON_NUM_THREADS", threads.to_string());
        command.env("CANDLE_NUM_THREADS", "1");
        Runner::start(command)
    };
    let mut own = ours(case)?;
    let mut others: Vec<(String, Runner)> = Vec::new();
    if let Some(plain) = cases::plain(case) {
        others.push((plain.to_string(), ours(plain)?));
    }
    if let Ok(python) = std::env::var("QTUNE_PYTHON") {
        for (name, peer) in cases::peers(case) {
            let mut command = Command::new(&python);
            command.args(["-c", PEERS, &peer, &threads.to_string(), data]);
            others.push((name.to_string(), Runner::start(command)?));
        }
    }
    for turn in 0..WARM + cases::turns(case) {
        own.turn(turn >= WARM)?;
        for (_, other) in &mut others {
            other.turn(turn >= WARM)?;
        }
    }
    let above = own.peak - own.base;
    let row = format!("| {case} | {:.2} | {:.0} | {above:.0}", median(&own.ms), own.peak);
    for (name, other) in &others {
        let ratios: Vec<f64> = own.ms.iter().zip(&other.ms).map(|(a, b)| a / b).collect();
        let more = other.peak - other.base;
        let theirs = format!("{name} | {:.2} | {:.0} | {more:.0}", median(&other.ms), other.peak);
        // A pass keeps nothing: what making the models took would be compared.
        let memory = match case.starts_with("infer-") {
            true => "-".to_string(),
            false => format!("{:.2} / {:.2}", own.peak / other.peak, above / more),
        };
        println!("{row} | {theirs} | **{:.3}** | {memory} |", median(&ratios));
    }
    if others.is_empty() {
        println!("{row} | - | | | | | |");
    }
    Ok(())
}

/// Takes steps of one case as they are asked for.
fn steps(case: &str, data: &str) -> Result<(), Failure> {
    let mut step = cases::step(case, data, &Device::Cpu)?;
    let peak = || qtune::train::peak_rss_bytes() / 1024;
    println!("ready {}", peak());
    for line in std::io::stdin().lines() {
        line?;
        // A pass of a few milliseconds shows the rest before it: the first of a turn is not counted.
        let passes = if case.starts_with("infer-") { 5 } else { 1 };
        if passes > 1 {
            step()?;
        }
        let start = Instant::now();
        for _ in 0..passes {
            step()?;
        }
        println!("{} {}", start.elapsed().as_secs_f64() * 1e3 / f64::from(passes), peak());
    }
    Ok(())
}

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    if let [flag, case, data] = args.as_slice() {
        if flag == "--ours" {
            qtune::memory::keep();
            qtune::threads::start(None)?;
            return steps(case, data);
        }
    }
    let threads = std::env::var("QTUNE_THREADS").ok().and_then(|n| n.parse().ok()).unwrap_or(2);
    let data = std::env::var("QTUNE_DATA").unwrap_or_else(|_| "../shared/data".into());
    let all = cases::ALL.map(String::from).to_vec();
    println!("| case, {threads} threads | ms | peak MiB | above start | beside | ms | peak MiB | above start | time | memory, peak / above start |");
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for case in if args.is_empty() { &all } else { &args } {
        if let Err(error) = compare(case, threads, &data) {
            println!("| {case} | {error} | | | | | | | | |");
        }
    }
    Ok(())
}
