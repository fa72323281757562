//! What the benches share: contestants that take turns, cold and hot weights, threads, tables with a name and date.
//!
//! Figures of a shared machine drift by tens of percent within minutes, ratios of interleaved medians do not: all
//! contestants of a shape run A B C A B C ... in one process, and each figure is the median of its turns.

#![allow(dead_code)] // Each bench is a crate of its own and takes what it needs.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The program's own allocator, which keeps what it freed as the program has it: results of megabytes would otherwise
/// cost a fault for each page. (`PURGE_DELAY` is set for the processes that measure.)
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What goes wrong in a bench ends it with its message.
pub type Failure = Box<dyn std::error::Error>;

/// Bytes that a cold run rotates through: several times the last-level caches of the machines at hand.
pub const COLD_BYTES: usize = 192 << 20;

/// What the command line asks for: `--threads 1,2 --seconds 0.2 --turns 7 --only TEXT --save NAME`.
#[derive(Clone, Debug)]
pub struct Options {
    /// Numbers of threads, one after another.
    pub threads: Vec<usize>,
    /// Seconds of a turn of one contestant, at most about.
    pub seconds: f64,
    /// Turns of each contestant.
    pub turns: usize,
    /// Only shapes whose text or origin holds this.
    pub only: Vec<String>,
    /// Writes benches/results/NAME.md too.
    pub save: Option<String>,
}

impl Options {
    /// Reads them; the `--bench` that cargo adds is passed over, anything unknown is an error.
    pub fn read() -> Result<Self, Failure> {
        let most = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if most > 1 { vec![1, most] } else { vec![1] };
        let mut options = Options { threads, seconds: 0.1, turns: 7, only: Vec::new(), save: None };
        let mut args = std::env::args().skip(1);
        while let Some(flag) = args.next() {
            let mut value = || args.next().ok_or_else(|| format!("{flag}: found no value"));
            match flag.as_str() {
                "--bench" => {}
                "--threads" => {
                    options.threads = value()?.split(',').map(str::parse).collect::<Result<_, _>>()?;
                }
                "--seconds" => options.seconds = value()?.parse()?,
                "--turns" => options.turns = value()?.parse::<usize>()?.max(1),
                "--only" => options.only.push(value()?),
                "--save" => options.save = Some(value()?),
                _ => {
                    return Err(
                        format!("{flag}: expected --threads, --seconds, --turns, --only or --save").into()
                    )
                }
            }
        }
        if options.threads.contains(&0) {
            return Err("--threads 0: expected at least 1".into());
        }
        Ok(options)
    }

    /// Whether something called by these names is asked for.
    pub fn wants(&self, names: &[&str]) -> bool {
        self.only.is_empty()
            || self.only.iter().any(|only| names.iter().any(|name| name.contains(only.as_str())))
    }
}

/// One that takes turns: a name, and what to do for copy number `i` of its weights.
pub struct Contestant<'a> {
    /// How the table calls it.
    pub name: String,
    /// `run(from, count)`: so many executions, on copies `from`, `from + 1`, ... of the weights modulo their number;
    /// the seconds of all of them together.
    pub run: Run<'a>,
    /// Copies of the weights; 1 stays in cache as far as it fits.
    pub copies: usize,
    /// Bytes of one copy of the weights, for GB/s.
    pub bytes: f64,
}

/// See [`Contestant::run`].
pub type Run<'a> = Box<dyn FnMut(usize, usize) -> Result<f64, Failure> + 'a>;

impl<'a> Contestant<'a> {
    /// Of work in this process, whose time is taken here: `work(i)` executes on copy `i`.
    pub fn new(
        name: impl Into<String>,
        copies: usize,
        bytes: usize,
        mut work: impl FnMut(usize) -> Result<(), Failure> + 'a,
    ) -> Self {
        let copies = copies.max(1);
        let run = move |from: usize, count: usize| {
            let begun = Instant::now();
            for i in 0..count {
                work((from + i) % copies)?;
            }
            Ok(begun.elapsed().as_secs_f64())
        };
        Contestant { name: name.into(), run: Box::new(run), copies, bytes: bytes as f64 }
    }
}

/// Copies of `bytes` of weights that a cold run rotates through; 1 of a hot one.
pub fn copies(bytes: usize, cold: bool) -> usize {
    match cold {
        true => COLD_BYTES.div_ceil(bytes.max(1)).clamp(2, 4096),
        false => 1,
    }
}

/// Between turns: threads of candle, PyTorch and onnxruntime spin for a while after their work, on the cores of the next.
const PAUSE: Duration = Duration::from_millis(100);

/// Median seconds of one execution of each contestant, whose turns alternate. The first executions of each are not
/// counted: what is laid out anew or compiled once belongs to loading.
pub fn race(options: &Options, contestants: &mut [Contestant<'_>]) -> Result<Vec<f64>, Failure> {
    let mut each = Vec::new();
    for contestant in contestants.iter_mut() {
        // Every copy once: what a kernel lays out anew it lays out now.
        (contestant.run)(0, contestant.copies)?;
        let few = contestant.copies.min(3);
        let once = ((contestant.run)(0, few)? / few as f64).max(1e-9);
        each.push(((options.seconds / once).ceil() as usize).clamp(1, 100_000));
    }
    let mut turns: Vec<Vec<f64>> = vec![Vec::new(); contestants.len()];
    for turn in 0..options.turns {
        for (c, contestant) in contestants.iter_mut().enumerate() {
            std::thread::sleep(PAUSE);
            // One that does not count wakes the threads that slept meanwhile.
            (contestant.run)(turn * each[c], 1)?;
            let seconds = (contestant.run)(turn * each[c] + 1, each[c])?;
            turns[c].push(seconds / each[c] as f64);
        }
    }
    Ok(turns.into_iter().map(median).collect())
}

/// The middle one; of an even number the larger of the two in the middle.
pub fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The environment variable that tells a process of a bench its number of threads.
const THREADS: &str = "QTUNE_BENCH_THREADS";

/// Runs a bench once for each number of threads, in a process of its own: pools that were made once keep their size,
/// and candle's, rayon's and Python's are told theirs by the environment. What the processes print is the result,
/// which is written to `benches/results/NAME.md` too where `--save NAME` asks for it.
pub fn each_number_of_threads(
    what: &str,
    options: &Options,
    bench: impl Fn(&Options, usize) -> Result<(), Failure>,
) -> Result<(), Failure> {
    if let Ok(threads) = std::env::var(THREADS) {
        qtune::threads::start(None)?;
        return bench(options, threads.parse()?);
    }
    let mut text = format!("# {what}\n\n{}\n", machine());
    println!("{text}");
    for threads in &options.threads {
        let number = threads.to_string();
        let (begun, before) = (Instant::now(), others());
        let mut child = Command::new(std::env::current_exe()?)
            .args(std::env::args_os().skip(1))
            .env(THREADS, &number)
            .env("RAYON_NUM_THREADS", &number)
            .env("CANDLE_NUM_THREADS", &number)
            .env("OMP_NUM_THREADS", &number)
            .env("MIMALLOC_PURGE_DELAY", "-1")
            .stdout(Stdio::piped())
            .spawn()?;
        if let Some(out) = child.stdout.take() {
            for line in BufReader::new(out).lines() {
                let line = line?;
                println!("{line}");
                text += &line;
                text.push('\n');
            }
        }
        let status = child.wait()?;
        if !status.success() {
            return Err(format!("{what}, {threads} threads: {status}").into());
        }
        if let (Some(before), Some(after)) = (before, others()) {
            let cores = (after - before) / begun.elapsed().as_secs_f64();
            let said = if cores > 0.1 { ", so these figures are disturbed" } else { "" };
            let line = format!("\nMeanwhile other processes took {:.2} of a core{said}.", cores.max(0.0));
            println!("{line}");
            text += &line;
            text.push('\n');
        }
    }
    if let Some(name) = &options.save {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("benches/results");
        std::fs::create_dir_all(&dir)?;
        let path = dir.join(format!("{name}.md"));
        std::fs::write(&path, text)?;
        println!("\nwritten: {}", path.display());
    }
    Ok(())
}

/// Seconds that all cores together have spent since the system started on other processes than this one and those that
/// it has waited for; none where the system does not tell.
fn others() -> Option<f64> {
    let numbers =
        |text: &str| text.split_whitespace().map(|n| n.parse().unwrap_or(0.0)).collect::<Vec<f64>>();
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    // user, nice, system, idle, iowait, irq, softirq, steal
    let all = numbers(stat.lines().next()?.strip_prefix("cpu")?);
    let busy = all.get(..8)?.iter().sum::<f64>() - all[3] - all[4];
    let own = std::fs::read_to_string("/proc/self/stat").ok()?;
    // Behind the name in brackets; utime, stime and those of children are fields 14 to 17 of proc(5), the state is 3.
    let own = numbers(own.rsplit_once(')')?.1);
    Some((busy - own.get(11..15)?.iter().sum::<f64>()) / 100.0)
}

/// `1 thread`, `2 threads`.
pub fn of_threads(threads: usize) -> String {
    match threads {
        1 => "1 thread".into(),
        n => format!("{n} threads"),
    }
}

/// Prints the head of a Markdown table.
pub fn head(title: &str, columns: &[&str]) {
    println!("\n## {title}\n\n| {} |\n|{}", columns.join(" | "), " --- |".repeat(columns.len()));
}

/// Prints a row of a Markdown table.
pub fn row(cells: &[String]) {
    println!("| {} |", cells.join(" | "));
}

fn said(program: &str, args: &[&str]) -> Option<String> {
    let out = Command::new(program).args(args).output().ok().filter(|out| out.status.success())?;
    Some(String::from_utf8_lossy(&out.stdout).trim().to_string()).filter(|text| !text.is_empty())
}

/// Processor, cores, caches, commit and date, in a line or two.
pub fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let fields: BTreeMap<&str, &str> = info
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key.trim(), value.trim()))
        .collect();
    let field = |key: &str| fields.get(key).copied().unwrap_or("?");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let cache = |index: usize| {
        let at = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size");
        std::fs::read_to_string(at).map(|text| text.trim().to_string()).unwrap_or("?".into())
    };
    let commit = said("git", &["-C", env!("CARGO_MANIFEST_DIR"), "rev-parse", "--short=12", "HEAD"]);
    let dirty =
        said("git", &["-C", env!("CARGO_MANIFEST_DIR"), "status", "--porcelain", "--untracked-files=no"]);
    format!(
        "{}, family {} model {}, {cores} cores; L1d {}, L2 {}, L3 {}; {}.\nCommit {}{}, {}. Medians of interleaved turns.",
        field("model name"),
        field("cpu family"),
        field("model"),
        cache(0),
        cache(2),
        cache(3),
        features(),
        commit.unwrap_or("unknown".into()),
        if dirty.is_some() { " with changes" } else { "" },
        said("date", &["-u", "+%Y-%m-%d %H:%M UTC"]).unwrap_or_default(),
    )
}

fn features() -> String {
    #[cfg(target_arch = "x86_64")]
    {
        let found = [
            ("avx2", is_x86_feature_detected!("avx2")),
            ("fma", is_x86_feature_detected!("fma")),
            ("avx512f", is_x86_feature_detected!("avx512f")),
            ("avx512bw", is_x86_feature_detected!("avx512bw")),
            ("avx512vbmi", is_x86_feature_detected!("avx512vbmi")),
            ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
            ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
            ("avxvnni", is_x86_feature_detected!("avxvnni")),
        ];
        let names: Vec<&str> = found.iter().filter(|f| f.1).map(|f| f.0).collect();
        names.join(" ")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        std::env::consts::ARCH.to_string()
    }
}

/// Microseconds for a table.
pub fn micros(seconds: f64) -> String {
    match 1e6 * seconds {
        us if us < 100.0 => format!("{us:.1}"),
        us => format!("{us:.0}"),
    }
}
