//! Steps of optimizers, and of training, beside PyTorch and PEFT.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use candle_core::{DType, Tensor, Var};
use qtune::kernels::{self, Arithmetic};
use qtune::optim::{adamw, classp, lion, Move, OptimizerConfig};
use qtune::weights::{Param, Role};
use serde_json::Value;

use super::cases;
use super::harness::{head, median, micros, row, Failure};
use super::race::{race, rate, target, wait, Setting, Work};

pub fn optimizers(setting: &Setting) -> Result<(), Failure> {
    let (count, each) = setting.pick((150, 333_333), (3, 100));
    head(
        &format!("A step of an optimizer over {} entries in {count} tensors", count * each),
        &["what", "gradients", "how", "µs", "GB/s", "of copy", "times one by one"],
    );
    let rules = [
        (OptimizerConfig::Adamw(adamw::AdamWConfig::default()), "AdamW", 24),
        (OptimizerConfig::Classp(classp::ClasspConfig::default()), "CLASSP", 16),
        (OptimizerConfig::Lion(lion::LionConfig::default()), "Lion", 16),
    ];
    for (config, name, state) in rules {
        if setting.over(name) {
            return Ok(());
        }
        let param = |i: usize| -> Result<Param, Failure> {
            let var = Var::from_tensor(&setting.random(&[each], DType::F32)?)?;
            Ok(Param { name: format!("{i}.weight"), var, role: Role::Plain })
        };
        let params = (0..count).map(param).collect::<Result<Vec<_>, _>>()?;
        let grads =
            (0..count).map(|_| setting.random(&[each], DType::F32)).collect::<Result<Vec<Tensor>, _>>()?;
        let moves: Vec<Move<'_>> = params
            .iter()
            .zip(&grads)
            .map(|(param, grad)| Move { param, grad, lr: 1e-6, decay: false, free: None })
            .collect();
        let (mut single, mut all) = (config.build(), config.build());
        let mut works = vec![Work::plain("tensor by tensor", || {
            moves.iter().try_for_each(|m| single.update(m.param, m.grad, m.lr, m.decay))
        })];
        let has = all.update_all(&moves, 0.0)?.is_some();
        if has {
            works.push(Work::plain("all at once", || {
                all.update_all(&moves, 0.0)?;
                Ok(())
            }));
        }
        let seconds = race(setting, &mut works)?;
        for (work, s) in works.iter().zip(&seconds) {
            // What a gradient's own norm reads of it is not counted.
            let [rate, share] = rate(setting, (count * each * (state + 4)) as f64, *s);
            let over = format!("{:.2}", seconds[0] / s);
            row(&[name.into(), "f32".into(), work.name.clone(), micros(*s), rate, share, over]);
        }
        if !has {
            let dash = || "-".to_string();
            row(&[name.into(), "f32".into(), "all at once".into(), dash(), dash(), dash(), dash()]);
        }
    }
    Ok(())
}

/// What a side of training says of a case.
struct Figures {
    /// What it has to say of itself.
    note: String,
    ms: f64,
    per_s: f64,
    peak: f64,
}

/// The samples or tokens of a step.
fn counted(case: &str) -> usize {
    match case.split('-').take(2).collect::<Vec<_>>().as_slice() {
        ["deit", "small"] => 128,
        ["deit", "mini"] => 2,
        ["llama", "1b"] => 4 * 512,
        _ => 2 * 16,
    }
}

/// In a process of its own: times the steps of a case and prints a line of JSON.
pub fn case(setting: &Setting, case: &str) -> Result<(), Failure> {
    kernels::set_arithmetic(Arithmetic::Bf16);
    let mut step = cases::step(case, "", &setting.device)?;
    // The first makes what is made once, the second is recorded where passes are.
    for _ in 0..setting.pick(4, 3) {
        step()?;
    }
    setting.wait()?;
    let each = setting.pick(3, 1);
    let mut turns = Vec::new();
    for _ in 0..setting.turns {
        let begun = Instant::now();
        for _ in 0..each {
            step()?;
        }
        setting.wait()?;
        turns.push(begun.elapsed().as_secs_f64() / f64::from(each));
    }
    let seconds = median(turns);
    println!(
        "{}",
        serde_json::json!({
            "case": case, "ms": 1e3 * seconds, "tokens_per_s": counted(case) as f64 / seconds,
            "peak_bytes": qtune::device::peak_bytes(&setting.device).unwrap_or(0),
        })
    );
    Ok(())
}

/// Runs a command that prints lines of JSON; its last one.
fn said(setting: &Setting, mut command: Command) -> Result<Figures, Failure> {
    let left = setting.ends.saturating_duration_since(Instant::now()).min(Duration::from_secs(120));
    if left < Duration::from_secs(5) {
        return Err("left out, for want of time".into());
    }
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let all_of = |mut pipe: Box<dyn Read + Send>| {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = pipe.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        })
    };
    let out = all_of(Box::new(child.stdout.take().ok_or("no standard output")?));
    let complaint = all_of(Box::new(child.stderr.take().ok_or("no standard error")?));
    let status = wait(&mut child, left)?.ok_or_else(|| format!("ended after {} s", left.as_secs()))?;
    let out = out.join().map_err(|_| "a reader panicked")?;
    let complaint = complaint.join().map_err(|_| "a reader panicked")?;
    if !status.success() {
        eprintln!("{complaint}");
        // Python says what went wrong last, ours first.
        let own = complaint.lines().find(|line| line.starts_with("error: "));
        let why = own.or(complaint.trim().lines().last()).unwrap_or_default().to_string();
        return Err(format!("{status}: {why}").into());
    }
    let line = out.lines().rev().find(|line| line.starts_with('{')).ok_or("it printed no figures")?;
    let json: Value = serde_json::from_str(line)?;
    if let Some(what) = json["missing"].as_str() {
        return Err(format!("not found: {what}").into());
    }
    let number = |key: &str| json[key].as_f64().ok_or_else(|| format!("it said no {key}"));
    let note = json["note"].as_str().map(|note| format!(" ({note})")).unwrap_or_default();
    Ok(Figures { note, ms: number("ms")?, per_s: number("tokens_per_s")?, peak: number("peak_bytes")? })
}

fn ours(setting: &Setting, case: &str) -> Result<Figures, Failure> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--case", case, "--turns", &setting.turns.to_string()]);
    if setting.tiny {
        command.arg("--tiny");
    }
    said(setting, command)
}

fn theirs(setting: &Setting, case: &str) -> Result<Figures, Failure> {
    // From the project's root, as benches run, or from where it was built.
    let here = std::path::Path::new("benches/gpu.py");
    let built = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(here);
    let script = if here.exists() { here } else { built.as_path() };
    let mut command = Command::new(std::env::var("QTUNE_PYTHON").unwrap_or("python3".into()));
    command.arg(script).arg(case);
    if setting.tiny {
        command.arg("--tiny");
    }
    said(setting, command)
}

/// Prints a side's row; its figures, where it has them.
fn line(
    what: &str,
    unit: &str,
    found: Result<Figures, Failure>,
    beside: Option<&Figures>,
    met: impl Fn(&Figures, &Figures) -> Option<String>,
) -> Option<Figures> {
    match found {
        Err(error) => {
            let error = error.to_string().replace(['\n', '|'], " ");
            row(&[format!("{what}: {error}"), "-".into(), "-".into(), "-".into(), "-".into(), String::new()]);
            None
        }
        Ok(figures) => {
            let over = beside.map(|b| format!("{:.2}", figures.ms / b.ms)).unwrap_or("-".into());
            let met = beside.and_then(|b| met(&figures, b)).unwrap_or_default();
            row(&[
                format!("{what}{}", figures.note),
                format!("{:.2}", figures.ms),
                format!("{:.0} {unit}", figures.per_s),
                // What graphs hold is not in the pool that is measured.
                match what.ends_with("recorded") {
                    true => "-".into(),
                    false => format!("{:.0}", figures.peak / 1048576.0),
                },
                over,
                met,
            ]);
            Some(figures)
        }
    }
}

const COLUMNS: [&str; 6] = ["what", "ms a step", "a second", "peak MiB", "time over the first's", "target"];

pub fn training(setting: &Setting) -> Result<(), Failure> {
    let (deit, llama) = (setting.pick("deit-small", "deit-mini"), setting.pick("llama-1b", "llama-mini"));
    let title = setting.pick("rank 64, 4 x 512 tokens", "tiny");
    head(&format!("Bone on a Llama of 1.1 thousand million parameters, bf16, {title}"), &COLUMNS);
    let rank = setting.pick(64, 8);
    let peer = line("PEFT, MiSS bat", "tokens", theirs(setting, "bone"), None, |_, _| None);
    let own = ours(setting, &format!("{llama}-bone-{rank}"));
    line("qtune, Bone", "tokens", own, peer.as_ref(), |own, peer| {
        let speed = target(setting, ">= 1.2 x tokens a second", own.per_s >= 1.2 * peer.per_s);
        Some(format!("{speed}; {}", target(setting, "no more memory", own.peak <= peer.peak)))
    });
    let title = setting.pick("batch 128", "tiny");
    head(&format!("A step of DeiT-S, {title}, products in bf16"), &COLUMNS);
    let own: Vec<(String, Result<Figures, Failure>)> = ["", "-graph", "-w2a2", "-w2a2-graph"]
        .iter()
        .map(|how| (format!("qtune{}", name(how)), ours(setting, &format!("{deit}{how}"))))
        .collect();
    let peer = line("PyTorch, bf16 autocast, compiled", "images", theirs(setting, "deit"), None, |_, _| None);
    for (what, found) in own {
        let quantized = what.contains("W2A2");
        line(&what, "images", found, peer.as_ref(), |own, peer| {
            quantized.then(|| target(setting, "<= 1.3 x PyTorch's plain step", own.ms <= 1.3 * peer.ms))
        });
    }
    Ok(())
}

fn name(how: &str) -> &'static str {
    match how {
        "" => ", plain",
        "-graph" => ", plain, recorded",
        "-w2a2" => ", W2A2",
        _ => ", W2A2, recorded",
    }
}
