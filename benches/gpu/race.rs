//! Contestants on the device that take turns, what they are measured by, and cells of tables.

use std::cell::RefCell;
use std::fmt;
use std::process::{Child, ExitStatus};
use std::rc::Rc;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor, Var};
use qtune::device::Replay;
use qtune::kernels::tape;

use super::harness::{median, Failure};

/// What the card does at most, as it was measured: 0 where it was not.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ceilings {
    /// Bytes that a copy reads and writes in a second.
    pub copy: f64,
    /// Operations a second of a product of bf16, and of f32.
    pub bf16: f64,
    pub f32: f64,
}

/// How a section tells the ceilings to the process that started it.
pub const SAID: &str = "ceilings: ";

impl Ceilings {
    pub fn read(text: &str) -> Result<Self, Failure> {
        let mut numbers = text.split(',').map(str::parse::<f64>);
        let mut next = || -> Result<f64, Failure> { Ok(numbers.next().ok_or("too few ceilings")??) };
        Ok(Ceilings { copy: next()?, bf16: next()?, f32: next()? })
    }
}

impl fmt::Display for Ceilings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{},{}", self.copy, self.bf16, self.f32)
    }
}

/// What a section is given.
pub struct Setting {
    pub device: Device,
    /// Whether shapes are small: a try of the bench, whose figures mean nothing.
    pub tiny: bool,
    /// Turns of each contestant, and the seconds of one, about.
    pub turns: usize,
    pub seconds: f64,
    /// When nothing new begins.
    pub ends: Instant,
    pub ceilings: Ceilings,
}

impl Setting {
    /// One of two, by whether shapes are small.
    pub fn pick<T>(&self, whole: T, tiny: T) -> T {
        if self.tiny {
            tiny
        } else {
            whole
        }
    }

    /// Whether the time is over, which is then said of `what`.
    pub fn over(&self, what: &str) -> bool {
        let over = Instant::now() >= self.ends;
        if over {
            println!("\nLeft out, for want of time: {what} and what follows.");
        }
        over
    }

    /// Normal numbers.
    pub fn random(&self, shape: &[usize], dtype: DType) -> Result<Tensor, Failure> {
        Ok(Tensor::randn(0f32, 1.0, shape, &self.device)?.to_dtype(dtype)?)
    }

    pub fn wait(&self) -> Result<(), Failure> {
        Ok(self.device.synchronize()?)
    }
}

/// One that takes turns.
pub struct Work<'a> {
    pub name: String,
    run: Box<dyn FnMut() -> Result<(), Failure> + 'a>,
    /// Executions in a run.
    count: usize,
}

impl<'a> Work<'a> {
    /// `work(i)` for `i` in `0..count`, recorded and launched as a whole; where that cannot be recorded, one by one, which
    /// the name then says.
    pub fn recorded<R: 'a>(
        setting: &Setting,
        name: impl Into<String>,
        count: usize,
        mut work: impl FnMut(usize) -> qtune::Result<R> + 'a,
    ) -> Result<Self, Failure> {
        let mut name = name.into();
        let work = Rc::new(RefCell::new(move || -> qtune::Result<()> {
            for i in 0..count {
                drop(work(i)?);
            }
            Ok(())
        }));
        let again = Rc::clone(&work);
        let run: Box<dyn FnMut() -> Result<(), Failure> + 'a> =
            match Replay::record(&setting.device, move || (again.borrow_mut())()) {
                Ok(replay) => Box::new(move || Ok(replay.launch()?)),
                Err(error) => {
                    // The driver tells once more, of what was made meanwhile.
                    while setting.device.synchronize().is_err() && Instant::now() < setting.ends {}
                    eprintln!("{name}: not recorded: {}", first_line(&error));
                    name += " (not recorded)";
                    Box::new(move || Ok((work.borrow_mut())()?))
                }
            };
        Ok(Work { name, run, count })
    }

    /// Work that is done as it comes.
    pub fn plain(name: impl Into<String>, mut work: impl FnMut() -> qtune::Result<()> + 'a) -> Self {
        Work { name: name.into(), run: Box::new(move || Ok(work()?)), count: 1 }
    }
}

/// Median seconds of one execution of each, whose turns alternate.
pub fn race(setting: &Setting, works: &mut [Work<'_>]) -> Result<Vec<f64>, Failure> {
    let mut each = Vec::new();
    for work in works.iter_mut() {
        // What fails has no figure, and the others have theirs.
        if let Err(error) = (work.run)().and_then(|()| setting.wait()) {
            work.name += &format!(" (failed: {})", first_line(&error).replace('|', " "));
            each.push(0);
            continue;
        }
        let begun = Instant::now();
        (work.run)()?;
        setting.wait()?;
        let once = begun.elapsed().as_secs_f64().max(1e-7);
        each.push(((setting.seconds / once).ceil() as usize).clamp(1, 10_000));
    }
    let mut turns: Vec<Vec<f64>> = vec![Vec::new(); works.len()];
    for _ in 0..setting.turns {
        for ((work, each), turns) in
            works.iter_mut().zip(&each).zip(&mut turns).filter(|((_, each), _)| **each > 0)
        {
            let begun = Instant::now();
            for _ in 0..*each {
                (work.run)()?;
            }
            setting.wait()?;
            turns.push(begun.elapsed().as_secs_f64() / (each * work.count) as f64);
        }
    }
    Ok(turns.into_iter().map(median).collect())
}

/// An op of its inputs.
pub type Op<'a> = Box<dyn Fn(&[Tensor]) -> candle_core::Result<Tensor> + 'a>;

/// `t` as what a gradient is asked for.
pub fn leaf(t: &Tensor) -> Result<Tensor, Failure> {
    Ok(Var::from_tensor(t)?.as_tensor().clone())
}

/// `op` forward, and, where there is a gradient `g` of what it gives, forward and backward to all its inputs, which are
/// leaves.
pub fn passes<'a>(
    setting: &Setting,
    inputs: &'a [Tensor],
    op: &'a Op<'a>,
    g: Option<&'a Tensor>,
) -> Result<Vec<Work<'a>>, Failure> {
    let plain: Vec<Tensor> = inputs.iter().map(Tensor::detach).collect();
    let mut works = vec![Work::recorded(setting, "forward", 1, move |_| Ok(op(&plain)?))?];
    if let Some(g) = g {
        works.push(Work::recorded(setting, "forward and backward", 1, move |_| {
            let (y, tape) = tape::record(|| op(inputs))?;
            let leaves: Vec<&Tensor> = inputs.iter().collect();
            Ok(tape.onward(&y, g.clone(), &leaves)?)
        })?);
    }
    Ok(works)
}

/// Waits for a process for so long, then ends it: no status.
pub fn wait(child: &mut Child, most: Duration) -> Result<Option<ExitStatus>, Failure> {
    let ends = Instant::now() + most;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= ends {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// `GB/s` of bytes in so many seconds, and of copying's.
pub fn rate(setting: &Setting, bytes: f64, seconds: f64) -> [String; 2] {
    [format!("{:.0}", bytes / seconds / 1e9), percent(bytes / seconds, setting.ceilings.copy)]
}

/// `TFLOP/s`, and of the product's at most.
pub fn speed(ceiling: f64, ops: f64, seconds: f64) -> [String; 2] {
    [format!("{:.1}", ops / seconds / 1e12), percent(ops / seconds, ceiling)]
}

pub fn percent(value: f64, of: f64) -> String {
    match of > 0.0 {
        true => format!("{:.0} %", 100.0 * value / of),
        false => "-".into(),
    }
}

/// What an error says before its trace.
pub fn first_line(error: &dyn fmt::Display) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}

/// A target and whether it is met, which of small shapes means nothing.
pub fn target(setting: &Setting, text: impl fmt::Display, met: bool) -> String {
    if setting.tiny {
        return String::new();
    }
    format!("{text}: {}", if met { "met" } else { "**missed**" })
}

/// f32 and bf16, by name.
pub const TYPES: [(DType, &str); 2] = [(DType::F32, "f32"), (DType::BF16, "bf16")];
