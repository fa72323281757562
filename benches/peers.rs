//! What a Python user would run instead, at the same shapes and in turn with ours: onnxruntime's dynamic int8 and
//! MatMulNBits, PyTorch's f32 and bf16 products.
//!
//! `QTUNE_PYTHON=python3 cargo bench --bench peers -- [--threads 1,2] [--only DeiT] [--save peers]`. That Python needs numpy,
//! and whichever of onnxruntime with onnx, and torch, is to be compared. Where the variable is not set the bench says so
//! and ends. Whole programs (training, PEFT) are compared by hand: their scripts lie outside of this project, in the folder
//! that `QTUNE_PEERS` names, and are listed where it is set.

mod harness;
mod ours;
mod shapes;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use harness::{copies, head, micros, of_threads, race, row, Contestant, Failure, Options, COLD_BYTES};
use ours::{candle, codes, dense, int8, packed, Setting};
use shapes::Shape;

/// Reads `make KIND ROWS IN OUT BYTES`, answers `ready BITS` (of a weight) or `no REASON`; reads `go COUNT`, answers the seconds
/// of about COUNT executions and how many there were. BYTES: the weights to rotate through, 0 for one copy.
const PYTHON: &str = r#"
import sys, time, os
import numpy as np
threads = int(sys.argv[1])
rng = np.random.default_rng(0)

def torch_product(kind, n, k, m, copies):
    import torch
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    dtype = torch.bfloat16 if kind == 'torch-bf16' else torch.float32
    x = torch.randn(n, k, dtype=dtype)
    w = [torch.randn(m, k, dtype=dtype) for _ in range(copies(k * m * (2 if dtype == torch.bfloat16 else 4)))]
    at = [0]
    def run():
        torch.nn.functional.linear(x, w[at[0]])
        at[0] = (at[0] + 1) % len(w)
    return run, len(w), 1, 8 * (2 if dtype == torch.bfloat16 else 4)

def ort_product(kind, n, k, m, copies):
    import onnxruntime as ort
    from onnx import helper as h, TensorProto as T, numpy_helper as nh
    nodes, init, outs = [], [], []
    if kind == 'ort-f32':
        bits, r = 32, copies(4 * k * m)
    elif kind == 'ort-int8':
        bits, r = 8, copies(k * m)
    else:
        bits = int(kind[-1])
        per = bits + 32 / 64
        r = copies(int(k * m * per / 8))
    for i in range(r):
        o = f'y{i}'
        if kind == 'ort-f32':
            init.append(nh.from_array(rng.standard_normal((k, m), dtype=np.float32), f'w{i}'))
            nodes.append(h.make_node('MatMul', ['x', f'w{i}'], [o]))
        elif kind == 'ort-int8':
            # Each with the activations quantized anew, as every layer of a model has them.
            nodes.append(h.make_node('DynamicQuantizeLinear', ['x'], [f'xq{i}', f'xs{i}', f'xz{i}']))
            init.append(nh.from_array(rng.integers(-127, 127, (k, m), dtype=np.int8), f'w{i}'))
            init.append(nh.from_array(np.zeros((), np.int8), f'wz{i}'))
            init.append(nh.from_array(np.float32(0.01), f'ws{i}'))
            nodes += [h.make_node('MatMulInteger', [f'xq{i}', f'w{i}', f'xz{i}', f'wz{i}'], [f'i{i}']),
                      h.make_node('Cast', [f'i{i}'], [f'c{i}'], to=T.FLOAT),
                      h.make_node('Mul', [f'xs{i}', f'ws{i}'], [f's{i}']),
                      h.make_node('Mul', [f'c{i}', f's{i}'], [o])]
        else:
            blocks = -(-k // 64)
            init.append(nh.from_array(rng.integers(0, 255, (m, blocks, 64 * bits // 8), dtype=np.uint8), f'w{i}'))
            init.append(nh.from_array(rng.random(m * blocks, dtype=np.float32), f's{i}'))
            nodes.append(h.make_node('MatMulNBits', ['x', f'w{i}', f's{i}'], [o], domain='com.microsoft',
                                     K=k, N=m, bits=bits, block_size=64, accuracy_level=4))
        outs.append(h.make_tensor_value_info(o, T.FLOAT, None))
    graph = h.make_graph(nodes, 'g', [h.make_tensor_value_info('x', T.FLOAT, ['n', k])], outs, init)
    ops = [h.make_opsetid('', 17), h.make_opsetid('com.microsoft', 1)]
    model = h.make_model(graph, opset_imports=ops, ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    feed = {'x': rng.standard_normal((n, k), dtype=np.float32)}
    # One run of the graph is r products.
    return lambda: session.run(None, feed), r, r, {'ort-f32': 32, 'ort-int8': 8}.get(kind, bits + 0.5)

made = {}
for line in sys.stdin:
    words = line.split()
    try:
        if words[0] == 'make':
            kind, (n, k, m, rotate) = words[1], map(int, words[2:6])
            copies = lambda size: min(max(2, -(-rotate // size)), 512) if rotate else 1
            make = torch_product if kind.startswith('torch') else ort_product
            made[kind] = make(kind, n, k, m, copies)
            made[kind][0]()
            print('ready', made[kind][3], flush=True)
        elif words[0] == 'drop':
            made.clear()
            print('ready 0', flush=True)
        else:
            run, _, each, _ = made[words[1]]
            times = max(1, round(int(words[2]) / each))
            begun = time.perf_counter()
            for _ in range(times):
                run()
            print((time.perf_counter() - begun), times * each, flush=True)
    except Exception as error:
        print('no', ' '.join(str(error).split())[:200], flush=True)
"#;

/// Python at the other end of two pipes.
struct Python {
    child: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Python {
    fn start(program: &std::ffi::OsStr, threads: usize) -> Result<Self, Failure> {
        let mut command = Command::new(program);
        command.args(["-c", PYTHON, &threads.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = qtune::threads::free(|| command.spawn())?;
        let (ask, answers) = (child.stdin.take(), child.stdout.take());
        let (Some(ask), Some(answers)) = (ask, answers) else { return Err("Python: found no pipes".into()) };
        Ok(Python { child, ask, answers: BufReader::new(answers) })
    }

    fn say(&mut self, line: &str) -> Result<String, Failure> {
        writeln!(self.ask, "{line}")?;
        self.ask.flush()?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        match answer.trim() {
            "" => Err("Python ended".into()),
            answer => Ok(answer.to_string()),
        }
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Peers of a shape; what is not installed is left out, and said once.
fn peers<'a>(
    python: &'a std::cell::RefCell<Python>,
    missing: &mut Vec<String>,
    shape: &Shape,
    rotate: usize,
) -> Result<Vec<Contestant<'a>>, Failure> {
    let mut contestants = Vec::new();
    for kind in ["torch-f32", "torch-bf16", "ort-f32", "ort-int8", "ort-nbits4", "ort-nbits2"] {
        // A dense f32 head of a vocabulary in one ONNX graph, several times, is more than its format holds.
        if kind == "ort-f32" && rotate > 0 && 4 * shape.weights() > 64 << 20 {
            continue;
        }
        let Shape { rows, input, output, .. } = shape;
        let answer = python.borrow_mut().say(&format!("make {kind} {rows} {input} {output} {rotate}"))?;
        let Some(bits) = answer.strip_prefix("ready ").and_then(|bits| bits.parse::<f64>().ok()) else {
            if !missing.iter().any(|m| m == kind) {
                eprintln!("{kind}: {answer}");
                missing.push(kind.to_string());
            }
            continue;
        };
        let run = move |_from: usize, count: usize| -> Result<f64, Failure> {
            let answer = python.borrow_mut().say(&format!("go {kind} {count}"))?;
            let figures: Vec<f64> = answer.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
            match figures[..] {
                // A graph runs whole: scaled to what was asked for.
                [seconds, done] if done > 0.0 => Ok(seconds * count as f64 / done),
                _ => Err(format!("{kind}: {answer}").into()),
            }
        };
        let bytes = bits * shape.weights() as f64 / 8.0;
        contestants.push(Contestant { name: kind.into(), run: Box::new(run), copies: 1, bytes });
    }
    Ok(contestants)
}

fn bench(options: &Options, threads: usize) -> Result<(), Failure> {
    let Some(program) = std::env::var_os("QTUNE_PYTHON") else {
        println!(
            "QTUNE_PYTHON is not set: it names a Python with numpy, and onnxruntime with onnx, or torch"
        );
        return Ok(());
    };
    if let Some(folder) = std::env::var_os("QTUNE_PEERS").filter(|_| threads == options.threads[0]) {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "py") {
                println!("whole program, by hand: {}", path.display());
            }
        }
    }
    let python = std::cell::RefCell::new(Python::start(&program, threads)?);
    let mut missing = Vec::new();
    let products = [("hot", shapes::GEMM, 0), ("hot", shapes::GEMV, 0), ("cold", shapes::GEMV, COLD_BYTES)];
    for (state, list, rotate) in products {
        head(
            &format!(
                "{}, {state}, {}",
                if list[0].rows == 1 { "One row" } else { "Many rows" },
                of_threads(threads)
            ),
            &["product", "kernel", "µs", "GOP/s", "GB/s of weights", "over torch-f32"],
        );
        for shape in list.iter().filter(|s| options.wants(&[s.of, &s.text()])) {
            let setting = Setting { shape: *shape, copies: &|bytes| copies(bytes, rotate > 0) };
            let mut contestants = vec![dense(&setting)?];
            for (bits, group) in [(2, Some(64)), (4, Some(64))] {
                contestants.push(packed(&setting, bits, group)?);
            }
            if shape.rows == 1 {
                for (bits, group) in [(2, None), (2, Some(64)), (4, Some(64))] {
                    contestants.push(int8(&setting, bits, group)?);
                }
                contestants.extend(candle(&setting)?);
            } else {
                for (bits, act_bits) in [(2, 2), (2, 8), (4, 8), (8, 8)] {
                    contestants.push(codes(&setting, bits, act_bits)?);
                }
            }
            contestants.extend(peers(&python, &mut missing, shape, rotate)?);
            let seconds = race(options, &mut contestants)?;
            let base = contestants.iter().position(|c| c.name == "torch-f32").unwrap_or(0);
            for (contestant, s) in contestants.iter().zip(&seconds) {
                row(&[
                    format!("{} {}", shape.of, shape.text()),
                    contestant.name.clone(),
                    micros(*s),
                    format!("{:.1}", shape.ops() / s / 1e9),
                    format!("{:.1}", contestant.bytes / s / 1e9),
                    format!("{:.2}", seconds[base] / s),
                ]);
            }
            drop(contestants);
            python.borrow_mut().say("drop")?;
        }
    }
    Ok(())
}

fn main() -> Result<(), Failure> {
    harness::each_number_of_threads("Beside Python", &Options::read()?, bench)
}
