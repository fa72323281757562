//! The program as a user meets it: output, exit codes, one-line errors, nothing left behind.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use qtune::random::Random;
use serde_json::Value;

/// A run of about a second.
const TINY: &[&str] = &[
    "data.glyphs.train=300",
    "data.glyphs.eval=100",
    "model.hidden=16",
    "model.layers=2",
    "model.heads=2",
    "model.mlp=24",
    "train.batch_size=20",
    "train.log_steps=1",
    "phase.0.steps=12",
    "phase.1.steps=18",
];

fn qtune(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qtune"));
    command.current_dir(dir).stdin(Stdio::null());
    for name in ["HF_HOME", "HF_HUB_CACHE"] {
        command.env(name, dir.join("no-hub"));
    }
    command
}

fn tiny(dir: &Path, out: &str) -> Command {
    let mut command = qtune(dir);
    command.args(["quantize", "--bits", "2", "--out", out]);
    for change in TINY {
        command.args(["--set", change]);
    }
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Runs a command that must fail with `code` and one line on stderr that holds all of `words`.
fn fails(command: &mut Command, code: i32, words: &[&str]) {
    let out = command.output().unwrap();
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{command:?}: {said}");
    assert!(out.stdout.is_empty(), "{command:?}: {}", text(&out.stdout));
    let errors: Vec<&str> = said.lines().filter(|l| l.starts_with("qtune: ")).collect();
    assert_eq!(errors.len(), 1, "{command:?}: {said}");
    assert_eq!(said.lines().last(), errors.first().copied(), "{command:?}: {said}");
    for word in words {
        assert!(errors[0].contains(word), "{command:?}: no {word:?} in {}", errors[0]);
    }
}

fn json(out: &Output) -> Value {
    assert!(out.status.success(), "{}", text(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(&out.stdout)))
}

/// Every file and folder below, hidden ones too.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        }
        found.push(path);
    }
    found.sort();
    found
}

#[test]
fn the_road_from_training_to_prediction() {
    let dir = tempfile::tempdir().unwrap();
    let out = tiny(dir.path(), "run").args(["--json", "--quiet"]).output().unwrap();
    let summary = json(&out);
    assert!(out.stderr.is_empty(), "{}", text(&out.stderr));
    for key in [
        "command",
        "method",
        "model",
        "seed",
        "device",
        "threads",
        "wall_s",
        "steps",
        "peak_rss_bytes",
        "params_total",
        "params_trainable",
        "version",
        "commit",
        "bits",
        "act_bits",
        "fp_top1",
        "q_top1",
        "q_top5",
        "fp_bytes",
        "packed_bytes",
        "compression",
        "oscillation",
        "frozen",
        "train_samples_per_s",
        "infer_samples_per_s_fp",
        "infer_samples_per_s_packed",
    ] {
        assert!(summary.get(key).is_some(), "summary lacks {key}");
    }
    let saved = std::fs::read(dir.path().join("run/summary.json")).unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&saved).unwrap(), summary);

    // The page of the run has its last figures, and every line of metrics an event.
    let page = std::fs::read_to_string(dir.path().join("run/report.html")).unwrap();
    assert!(page.contains(">finished</small>") && page.contains("vit.encoder.layer.1.output.dense.weight"));
    let events = std::fs::read(dir.path().join("run/events.out.tfevents.0.qtune")).unwrap();
    let tag = b"eval/top1";
    let evaluations = metrics(&dir.path().join("run")).iter().filter(|line| line["split"] == "eval").count();
    assert_eq!(events.windows(tag.len()).filter(|w| w == tag).count(), evaluations);

    // The packed model answers as it was measured, by run folder and by model folder.
    for model in ["run", "run/model"] {
        let mut eval = qtune(dir.path());
        eval.args(["eval", model, "--json", "--quiet"]);
        if model == "run/model" {
            fails(qtune(dir.path()).args(["eval", model]), 2, &["--data"]);
            continue;
        }
        let got = json(&eval.output().unwrap());
        assert_eq!(got["top1"], summary["q_top1"], "{model}");
        assert_eq!(got["samples"], 100);
    }

    let image = dir.path().join("glyph.png");
    image::GrayImage::from_fn(40, 32, |x, y| image::Luma([(x * y % 251) as u8])).save(&image).unwrap();
    let predict = qtune(dir.path()).args(["predict", "run", "glyph.png", "--json"]).output().unwrap();
    let top = &json(&predict)["predictions"][0]["top"];
    assert_eq!(top.as_array().unwrap().len(), 3);
    assert!(top[0]["probability"].as_f64().unwrap() >= top[1]["probability"].as_f64().unwrap());

    let inspect = json(&qtune(dir.path()).args(["inspect", "run", "--json"]).output().unwrap());
    let tensors = inspect["tensors"].as_array().unwrap();
    let query =
        tensors.iter().find(|t| t["name"] == "vit.encoder.layer.0.attention.attention.query.weight").unwrap();
    assert_eq!(query["kind"], "2 bits mid_rise");
    // 2 bits a weight and 32 a row.
    assert_eq!(query["bytes"], 16 * 16 / 4 + 4 * 16);
    assert_eq!(inspect["params_total"], summary["params_total"]);

    // The full-precision start opens with the same commands.
    let start = qtune(dir.path()).args(["inspect", "run/checkpoints/float"]).output().unwrap();
    assert!(text(&start.stdout).contains("classifier.weight"));
}

#[test]
fn a_dry_run_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = tiny(dir.path(), "run").arg("--dry-run").output().unwrap();
    let said = text(&out.stdout);
    assert!(out.status.success());
    for word in ["statsq, 2 bits", "lsq, 8 bits", "[optimizer]", "memory about", "phase quantized: 18 steps"]
    {
        assert!(said.contains(word), "no {word:?} in {said}");
    }
    assert!(files(dir.path()).is_empty());
    let plan = json(&tiny(dir.path(), "run").args(["--dry-run", "--json"]).output().unwrap());
    assert!(plan["memory_bytes"].as_u64().unwrap() > 1 << 20);
}

#[test]
fn wrong_usage_is_one_line_and_code_2() {
    let dir = tempfile::tempdir().unwrap();
    let at = |args: &[&str]| {
        let mut command = qtune(dir.path());
        command.args(args);
        command
    };
    fails(&mut at(&["quantize", "--bits", "5"]), 2, &["--bits", "5", "2, 3, 4, 8"]);
    fails(&mut at(&["quantize", "--act-bits", "1"]), 2, &["--act-bits", "1"]);
    fails(&mut at(&["quantise"]), 2, &["quantise", "quantize"]);
    fails(&mut at(&["quantize", "--set", "train.batchsize=3"]), 2, &["batchsize", "nearest: batch_size"]);
    fails(&mut at(&["quantize", "--recipe", "vit-w2a23"]), 2, &["vit-w2a23", "nearest"]);
    fails(&mut at(&["quantize", "--device", "tpu"]), 2, &["--device tpu"]);
    fails(&mut at(&["quantize", "--threads", "0"]), 2, &["--threads 0"]);
    fails(&mut at(&["quantize", "--dtype", "f16"]), 2, &["f32"]);
    fails(&mut at(&["quantize", "--weight-decay", "nan"]), 2, &["weight_decay"]);
    fails(&mut at(&["quantize", "--accumulate", "9000000000000000000"]), 2, &["train.accumulate"]);
    fails(
        &mut at(&["quantize", "--set", "transform.0.targets=[\"nobody\"]"]),
        2,
        &["nobody", "a name here is"],
    );
    fails(&mut at(&["quantize", "--set", "phase.1.quantize=false"]), 2, &["quantize = true"]);
    fails(&mut at(&["quantize", "--set", "phase.0.steps=0"]), 2, &["untrained", "--kd none"]);
    fails(&mut at(&["eval", "nowhere/at/all"]), 4, &["nowhere/at/all"]);
    assert!(files(dir.path()).is_empty(), "{:?}", files(dir.path()));
    std::fs::create_dir(dir.path().join("there")).unwrap();
    fails(&mut at(&["quantize", "--out", "there"]), 2, &["there", "it exists", "--resume"]);
    fails(&mut at(&["quantize", "--resume", "there"]), 4, &["there/recipe.toml"]);
    fails(&mut at(&["quantize", "--resume", "there", "--lr", "1"]), 2, &["--resume"]);
    assert!(files(&dir.path().join("there")).is_empty());
}

/// An IDX file of unsigned bytes.
fn idx(dims: &[u32], data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, 8, dims.len() as u8];
    dims.iter().for_each(|d| bytes.extend(d.to_be_bytes()));
    bytes.extend(data);
    bytes
}

/// An IDX pair for each part, `n` images of 28 x 28.
fn idx_folder(dir: &Path, n: u32) {
    std::fs::create_dir_all(dir).unwrap();
    for part in ["train", "t10k"] {
        let pixels: Vec<u8> = (0..n * 784).map(|i| (i % 251) as u8).collect();
        let labels: Vec<u8> = (0..n).map(|i| (i % 3) as u8).collect();
        std::fs::write(dir.join(format!("{part}-images-idx3-ubyte")), idx(&[n, 28, 28], &pixels)).unwrap();
        std::fs::write(dir.join(format!("{part}-labels-idx1-ubyte")), idx(&[n], &labels)).unwrap();
    }
}

#[test]
fn bad_images_are_named_with_code_4() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let images = data.join("train-images-idx3-ubyte");
    let labels = data.join("train-labels-idx1-ubyte");
    let run = |words: &[&str]| {
        fails(tiny(dir.path(), "run").args(["--data", "data"]), 4, words);
        assert!(!dir.path().join("run").exists(), "a failed run left its folder");
    };
    idx_folder(&data, 9);
    let whole = std::fs::read(&images).unwrap();
    std::fs::write(&images, &whole[..whole.len() - 1]).unwrap();
    run(&["train-images-idx3-ubyte"]);
    std::fs::write(&images, [&[9, 9, 8, 3], &whole[4..]].concat()).unwrap();
    run(&["train-images-idx3-ubyte", "magic"]);
    std::fs::write(&images, []).unwrap();
    run(&["train-images-idx3-ubyte"]);
    std::fs::write(&images, idx(&[u32::MAX, 28, 28], &[0; 784])).unwrap();
    run(&["train-images-idx3-ubyte"]);
    idx_folder(&data, 9);
    std::fs::write(&labels, idx(&[8], &[0; 8])).unwrap();
    run(&["8", "9"]);
    std::fs::remove_dir_all(&data).unwrap();
    std::fs::create_dir(&data).unwrap();
    run(&["data"]);

    // Image folders: none at all, one class, one unreadable among good ones.
    let png = |path: &Path, shade: u8| {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        image::GrayImage::from_pixel(12, 12, image::Luma([shade])).save(path).unwrap();
    };
    std::fs::create_dir_all(data.join("train/cat")).unwrap();
    run(&["data"]);
    for i in 0..6 {
        png(&data.join(format!("train/cat/{i}.png")), i);
    }
    run(&["cat"]);
    for i in 0..6 {
        png(&data.join(format!("train/dog/{i}.png")), 200 + i);
        png(&data.join(format!("test/cat/{i}.png")), i);
        png(&data.join(format!("test/dog/{i}.png")), 200 + i);
    }
    std::fs::write(data.join("train/dog/broken.png"), b"not a png").unwrap();
    fails(tiny(dir.path(), "run").args(["--data", "data", "--strict"]), 4, &["broken.png"]);
    let out = tiny(dir.path(), "run").args(["--data", "data"]).output().unwrap();
    let said = text(&out.stderr);
    assert!(out.status.success(), "{said}");
    assert!(said.contains("broken.png") && said.contains('1'), "{said}");
}

/// A small trained model to spoil.
fn model(dir: &Path) -> PathBuf {
    let out = tiny(dir, "start").arg("--quiet").output().unwrap();
    assert!(out.status.success(), "{}", text(&out.stderr));
    dir.join("start/checkpoints/float")
}

/// The header and the data of a safetensors file.
fn split(path: &Path) -> (Value, Vec<u8>) {
    let bytes = std::fs::read(path).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + n]).unwrap(), bytes[8 + n..].to_vec())
}

fn join(path: &Path, header: &Value, data: &[u8]) {
    let header = serde_json::to_vec(header).unwrap();
    let mut file = std::fs::File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    file.write_all(data).unwrap();
}

#[test]
fn bad_checkpoints_are_named_with_code_4() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path());
    let file = model.join("model.safetensors");
    let (header, data) = split(&file);
    let name = "vit.encoder.layer.1.output.dense.weight";
    let run = |words: &[&str]| {
        for command in ["quantize", "eval", "predict"] {
            let mut c = qtune(dir.path());
            match command {
                "quantize" => c.args(["quantize", "--bits", "4", "--steps", "0", "--model"]).arg(&model),
                "eval" => c.arg("eval").arg(&model).args(["--data", "nothing"]),
                _ => c.arg("predict").arg(&model).arg("nothing.png"),
            };
            fails(&mut c, 4, words);
        }
    };
    let change = |f: &dyn Fn(&mut Value)| {
        let mut header = header.clone();
        f(&mut header);
        join(&file, &header, &data);
    };
    change(&|h| drop(h.as_object_mut().unwrap().remove(name)));
    run(&["model.safetensors"]); // a hole in the data, or the missing tensor: either is named
    change(&|h| h[name]["shape"] = serde_json::json!([24, 16]));
    run(&[name, "[24, 16]", "[16, 24]"]);
    change(&|h| h[name]["data_offsets"] = serde_json::json!([0, 1u64 << 60]));
    run(&["model.safetensors"]);
    change(&|h| h[name]["dtype"] = serde_json::json!("F7"));
    run(&["model.safetensors"]);
    std::fs::write(&file, &std::fs::read(&file).unwrap()[..100]).unwrap();
    run(&["model.safetensors"]);
    std::fs::write(&file, []).unwrap();
    run(&["model.safetensors"]);
    let at = header[name]["data_offsets"][0].as_u64().unwrap() as usize;
    let mut poisoned = data.clone();
    poisoned[at + 8..at + 12].copy_from_slice(&f32::NAN.to_le_bytes());
    join(&file, &header, &poisoned);
    run(&[name, "NaN"]);

    // Shards that leave the folder.
    std::fs::remove_file(&file).unwrap();
    let index = serde_json::json!({"weight_map": {name: "../../secret.safetensors"}});
    std::fs::write(model.join("model.safetensors.index.json"), index.to_string()).unwrap();
    run(&["model.safetensors.index.json", "../../secret.safetensors"]);
    assert!(!dir.path().join("runs").exists() || files(&dir.path().join("runs")).is_empty());
}

#[test]
fn packed_files_that_lie_or_come_from_the_future_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    let model = dir.path().join("start/model");
    let config = model.join("config.json");
    let whole: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    let run = |change: &dyn Fn(&mut Value), words: &[&str]| {
        let mut config_json = whole.clone();
        change(&mut config_json);
        std::fs::write(&config, config_json.to_string()).unwrap();
        fails(qtune(dir.path()).args(["predict", "start/model", "x.png"]), 4, words);
    };
    let key = "quantization_config";
    run(&|c| c[key]["format_version"] = 3.into(), &["format_version", "found 3", "newer qtune"]);
    run(&|c| c[key]["quant_method"] = "gptq".into(), &["gptq", "expected qtune"]);
    let weight = "vit.encoder.layer.0.output.dense.weight";
    run(&|c| c[key]["weights"][weight]["bits"] = 3.into(), &[weight]);
    run(&|c| c[key]["weights"][weight]["shape"] = serde_json::json!([1u64 << 40, 1u64 << 40]), &[weight]);
    run(&|c| drop(c[key]["weights"].as_object_mut().unwrap().remove(weight)), &[weight]);
    run(&|c| c["hidden_size"] = 17.into(), &["17"]);
    std::fs::write(&config, b"{").unwrap();
    fails(qtune(dir.path()).args(["predict", "start/model", "x.png"]), 4, &["config.json"]);
}

/// metrics.jsonl without times and memory.
fn metrics(run: &Path) -> Vec<Value> {
    let strip = |line: &str| {
        let mut value: Value = serde_json::from_str(line).unwrap();
        for key in ["samples_per_s", "peak_rss_bytes"] {
            value.as_object_mut().unwrap().remove(key);
        }
        value
    };
    std::fs::read_to_string(run.join("metrics.jsonl")).unwrap().lines().map(strip).collect()
}

fn names(run: &Path) -> Vec<PathBuf> {
    files(run).iter().map(|p| p.strip_prefix(run).unwrap().to_path_buf()).collect()
}

/// Twenty kills at random moments, each resumed, of one run with quantized activations.
#[test]
fn killed_runs_go_on_as_if_nothing_had_happened() {
    let dir = tempfile::tempdir().unwrap();
    let start = |out: &str| {
        let mut command = tiny(dir.path(), out);
        command.args(["--act-bits", "2", "--checkpoint-steps", "3", "--quiet"]);
        command
    };
    let begun = std::time::Instant::now();
    assert!(start("whole").output().unwrap().status.success());
    let length = begun.elapsed().as_secs_f32();
    let whole = dir.path().join("whole");
    let run = dir.path().join("run");
    let mut random = Random::new(1, "kill", &[]);
    let mut kills = 0;
    for attempt in 0..400 {
        let mut command = match run.exists() {
            true => qtune(dir.path()),
            false => start("run"),
        };
        if run.exists() {
            command.args(["quantize", "--resume", "run", "--quiet"]);
        }
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        if kills < 20 {
            std::thread::sleep(Duration::from_secs_f32(length * random.range(0.05, 0.6)));
            child.kill().unwrap();
        }
        let out = child.wait_with_output().unwrap();
        if out.status.success() && kills >= 20 {
            break;
        }
        if out.status.success() {
            // It came to its end before the kill: the next one starts afresh.
            assert_eq!(metrics(&run), metrics(&whole), "attempt {attempt}");
            std::fs::remove_dir_all(&run).unwrap();
            continue;
        }
        assert_eq!(out.status.code(), None, "{}", text(&out.stderr));
        kills += 1;
    }
    assert_eq!(kills, 20);
    assert_eq!(metrics(&run), metrics(&whole));
    let bytes = |run: &Path, name: &str| std::fs::read(run.join(name)).unwrap();
    for name in ["model/model.safetensors", "model/config.json", "recipe.toml"] {
        assert!(bytes(&run, name) == bytes(&whole, name), "{name} differs");
    }
    assert_eq!(names(&run), names(&whole));
    // Nothing hidden beside the run either.
    let beside: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(beside.iter().all(|name| !name.starts_with('.')), "{beside:?}");
}

#[test]
fn interrupts_leave_a_checkpoint_and_their_exit_code() {
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let dir = tempfile::tempdir().unwrap();
        let mut command = tiny(dir.path(), "run");
        command.args(["--set", "phase.0.steps=20000"]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let metrics = dir.path().join("run/metrics.jsonl");
        let lines = || std::fs::read_to_string(&metrics).map(|t| t.lines().count()).unwrap_or(0);
        for _ in 0..1200 {
            if lines() > 3 {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let kill = Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status();
        assert!(kill.unwrap().success());
        let status = child.wait().unwrap();
        assert_eq!(status.code(), Some(code));
        let kept = names(&dir.path().join("run"));
        assert!(kept.iter().any(|n| n.ends_with("state.json")), "{kept:?}");
        let inspected = qtune(dir.path()).args(["inspect", "run/checkpoints"]).output().unwrap();
        assert_eq!(inspected.status.code(), Some(4), "a folder without a model is bad input");
    }
}

#[test]
fn one_and_two_threads_give_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let run = |threads: &str, out: &str| {
        let done =
            tiny(dir.path(), out).args(["--act-bits", "2", "--threads", threads, "-q"]).output().unwrap();
        assert!(done.status.success(), "{}", text(&done.stderr));
        let run = dir.path().join(out);
        (std::fs::read(run.join("model/model.safetensors")).unwrap(), metrics(&run))
    };
    let one = run("1", "one");
    assert!(one == run("2", "two"), "two threads differ from one");
    assert!(one == run("5", "five"), "five threads differ from one");
}

#[test]
fn completions_and_version() {
    let dir = tempfile::tempdir().unwrap();
    let out = qtune(dir.path()).args(["completions", "bash"]).output().unwrap();
    assert!(out.status.success() && text(&out.stdout).contains("quantize"));
    let out = qtune(dir.path()).arg("--version").output().unwrap();
    assert!(out.status.success() && text(&out.stdout).contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn bf16_products_are_a_setting_of_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let run = |out: &str, dtype: &str| {
        let done = tiny(dir.path(), out).args(["--dtype", dtype, "--json"]).output().unwrap();
        assert!(done.status.success(), "{}", text(&done.stderr));
        let summary: Value = serde_json::from_slice(&done.stdout).unwrap();
        assert!(summary["q_top1"].is_number(), "{summary}");
        let read = |file: &str| std::fs::read(dir.path().join(out).join(file)).unwrap();
        (text(&read("recipe.toml")), read("model/model.safetensors"))
    };
    let (single, half, again) = (run("single", "f32"), run("half", "bf16"), run("again", "bf16"));
    assert!(single.0.contains("products = \"f32\"") && half.0.contains("products = \"bf16\""), "{}", half.0);
    // It changes what is learned, and the same seed gives the same bytes.
    assert!(single.1 != half.1 && half.1 == again.1);
}

#[test]
fn lesser_instruction_sets_run_and_unknown_ones_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let run = |out: &str, set: &str| {
        let done = tiny(dir.path(), out).env("QTUNE_CPU", set).output().unwrap();
        assert!(done.status.success(), "{set}: {}", text(&done.stderr));
        std::fs::read(dir.path().join(out).join("model/model.safetensors")).unwrap()
    };
    // Products and loops of f32 add in the same order on all of them.
    let best = run("best", "avx512");
    assert!(best == run("lesser", "avx2") && best == run("plain", "scalar"));
    fails(tiny(dir.path(), "none").env("QTUNE_CPU", "mmx"), 2, &["QTUNE_CPU", "mmx", "avx2"]);
}
