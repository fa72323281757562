//! Tasks one after another: what each method keeps, heads, runs that are killed and resumed, threads, what
//! is refused.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use candle_core::Device;
use qtune::continual::run;
use qtune::recipe::{set, Recipe};
use qtune::train::Quiet;
use serde_json::Value;

/// Two or three tasks of four glyphs each, a small model.
fn table(tasks: usize, changes: &[&str]) -> toml::Table {
    let mut table = Recipe::table("continual-glyphs").unwrap();
    let sets = [["0", "1", "2", "3"], ["A", "E", "F", "H"], ["T", "X", "Y", "4"]];
    let list = sets[..tasks].iter().enumerate().map(|(i, classes)| {
        let mut task = toml::Table::new();
        task.insert("name".into(), format!("t{i}").into());
        task.insert(
            "classes".into(),
            classes.iter().map(|c| toml::Value::from(*c)).collect::<Vec<_>>().into(),
        );
        toml::Value::Table(task)
    });
    let list: Vec<toml::Value> = list.collect();
    table["continual"].as_table_mut().unwrap().insert("task".into(), list.into());
    let short = [
        "model.widths=[8]",
        "model.hidden=24",
        "data.limit_train=3000",
        "data.limit_eval=1000",
        "phase.0.epochs=2",
        "train.batch_size=16",
        "train.log_steps=5",
    ];
    for change in short.iter().chain(changes) {
        set(&mut table, change).unwrap();
    }
    table
}

fn done(tasks: usize, changes: &[&str]) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let recipe = Recipe::resolve(table(tasks, changes)).unwrap();
    run(&recipe, dir.path(), &Device::Cpu, &Quiet).unwrap()
}

fn matrix(summary: &Value) -> Vec<Vec<f64>> {
    let row = |row: &Value| row.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    summary["accuracy"].as_array().unwrap().iter().map(row).collect()
}

const SGD: &str = "optimizer={kind=\"sgd\",momentum=0.0}";

#[test]
fn plain_training_forgets_and_replay_does_not() {
    let plain = done(2, &["continual.method=finetune", SGD, "phase.0.lr=0.1"]);
    let replay = done(2, &["continual.method=replay", SGD, "phase.0.lr=0.1", "continual.replay.samples=60"]);
    let (a, b) = (matrix(&plain), matrix(&replay));
    assert!(a[0][0] > 80.0 && a[1][1] > 80.0, "{a:?}");
    // The first task is learned by the same steps, whatever comes after it.
    assert_eq!(a[0], b[0]);
    assert!(a[1][0] < a[0][0] - 30.0, "{a:?}");
    assert!(b[1][0] > a[1][0] + 20.0, "{a:?} {b:?}");
    assert_eq!(plain["state_bytes"], 0);
    // 60 images of 28 x 28 bytes, a label of 4 each.
    assert_eq!(replay["state_bytes"], 60 * (28 * 28 + 4));
    let number = |s: &Value, key: &str| s[key].as_f64().unwrap();
    assert!((number(&plain, "forgetting") - (a[0][0] - a[1][0])).abs() < 1e-9);
    assert!((number(&plain, "average_accuracy") - (a[1][0] + a[1][1]) / 2.0).abs() < 1e-9);
    assert!((number(&plain, "backward_transfer") - (a[1][0] - a[0][0])).abs() < 1e-9);
}

#[test]
fn a_strong_penalty_holds_the_first_task() {
    let ewc = |lambda: &str| {
        let lambda = format!("continual.ewc.lambda={lambda}");
        let changes =
            ["continual.method=ewc", SGD, "phase.0.lr=0.05", "continual.ewc.samples=200", lambda.as_str()];
        done(2, &changes)
    };
    let (none, strong) = (ewc("0.0"), ewc("30.0"));
    let (a, b) = (matrix(&none), matrix(&strong));
    assert_eq!(a[0], b[0]);
    assert!(b[1][0] > a[1][0] + 10.0, "{a:?} {b:?}");
    // Fisher information and anchor of every weight.
    assert_eq!(strong["state_bytes"].as_u64().unwrap(), 8 * strong["params_total"].as_u64().unwrap());
}

#[test]
fn classp_remembers_in_its_sums() {
    let classp = done(2, &["phase.0.lr=0.05"]);
    let params = classp["params_total"].as_u64().unwrap();
    assert_eq!(classp["state_bytes"].as_u64().unwrap() / 4 / params, 1);
    assert!(matrix(&classp)[0][0] > 60.0, "{classp}");
}

#[test]
fn later_tasks_train_the_chosen_weights_alone() {
    let changes = ["continual.method=kappatune", SGD, "phase.0.lr=0.1", "kappa={tensors=1}"];
    let summary = done(2, &changes);
    let selected = &summary["selected"];
    assert!(selected[0].is_null());
    let names: Vec<&str> = selected[1].as_array().unwrap().iter().map(|n| n.as_str().unwrap()).collect();
    // One tensor, and the classifier.
    assert!(names.contains(&"classifier.weight") && names.contains(&"classifier.bias"), "{names:?}");
    assert_eq!(names.len(), 3, "{names:?}");
}

#[test]
fn heads_of_their_own_forget_less() {
    let with = |heads: &str| {
        done(2, &["continual.method=finetune", SGD, "phase.0.lr=0.1", "phase.0.epochs=5", heads])
    };
    let (class, task) = (with("continual.heads=class"), with("continual.heads=task"));
    let (a, b) = (matrix(&class), matrix(&task));
    // Among the classes of all tasks the last one's win; among its own a task's are told apart still.
    assert!(a[1][0] < 20.0 && a[1][1] > 80.0, "{a:?}");
    assert!(b[1][0] > 50.0 && b[1][1] > 80.0, "{b:?}");
    // Before any training an answer among four is right by chance.
    let before = task["accuracy_before"][0].as_f64().unwrap();
    assert!(before < 60.0, "{before}");
}

fn qtune(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qtune"));
    command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn ok(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What a run leaves that has to be the same whenever it was killed: figures, model, metrics but for times.
fn left(run: &Path) -> (Value, Vec<u8>, Vec<String>) {
    let text = std::fs::read_to_string(run.join("summary.json")).unwrap();
    let summary: Value = serde_json::from_str(&text).unwrap();
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let value: Value = serde_json::from_str(line).unwrap();
        format!("{} {} {} {}", value["step"], value["split"], value["loss"], value["task/t0"])
    };
    let lines = metrics.lines().map(line).collect();
    let figures = serde_json::json!([
        summary["accuracy"],
        summary["accuracy_before"],
        summary["average_accuracy"],
        summary["state_bytes"],
        summary["steps"]
    ]);
    (figures, std::fs::read(run.join("model/model.safetensors")).unwrap(), lines)
}

/// Three tasks, killed at moments all over the run and resumed, on one thread or two: the same matrix, the
/// same model, the same metrics.
#[test]
fn a_killed_run_goes_on_as_if_it_had_not_been() {
    for method in ["classp", "ewc", "replay", "kappatune"] {
        let dir = tempfile::tempdir().unwrap();
        let changes: &[&str] = match method {
            "classp" => &[],
            "kappatune" => &["continual.method=kappatune", SGD, "kappa={tensors=1}"],
            "ewc" => &["continual.method=ewc", SGD, "continual.ewc.samples=60", "continual.ewc.lambda=5.0"],
            _ => &["continual.method=replay", SGD],
        };
        let mut changes = changes.to_vec();
        changes.extend([
            "phase.0.epochs=1",
            "train.checkpoint_steps=3",
            "train.eval_steps=7",
            "train.log_steps=1",
        ]);
        let recipe = Recipe::resolve(table(3, &changes)).unwrap();
        let file = dir.path().join("recipe.toml");
        std::fs::write(&file, recipe.to_toml().unwrap()).unwrap();
        let file = file.display().to_string();
        let out = |name: &str| dir.path().join(name).display().to_string();
        let (whole, cut) = (out("whole"), out("cut"));
        ok(qtune(&["continual", "-q", "--recipe", &file, "--out", &whole, "--threads", "2"])
            .output()
            .unwrap());
        let mut first = true;
        let mut kills = 0;
        for wait in (30..).step_by(45) {
            let args: Vec<&str> = match first {
                true => vec!["continual", "-q", "--recipe", &file, "--out", &cut, "--threads", "1"],
                false => vec!["continual", "-q", "--resume", &cut, "--threads", "1"],
            };
            let mut child = qtune(&args).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(wait));
            let finished = child.try_wait().unwrap();
            if finished.is_none() {
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
            }
            first = !dir.path().join("cut/recipe.toml").exists();
            if let Some(status) = finished {
                assert!(status.success(), "{method}: {:?}", child.wait_with_output());
                break;
            }
            // Enough of it: the rest in one go.
            if kills > 20 {
                ok(qtune(&["continual", "-q", "--resume", &cut, "--threads", "1"]).output().unwrap());
                break;
            }
        }
        assert!(kills > 2, "{method}: the run was over before it could be killed");
        let (a, b) = (left(Path::new(&whole)), left(Path::new(&cut)));
        assert_eq!(a.0, b.0, "{method}");
        assert_eq!(a.1, b.1, "{method}: the models differ");
        assert_eq!(a.2, b.2, "{method}");
    }
}

#[test]
fn the_command_prints_a_matrix_and_plans_without_writing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run").display().to_string();
    let short = ["--limit-train", "200", "--limit-eval", "50", "--epochs", "1", "--set", "model.widths=[4]"];
    let plan =
        ok(qtune(&[&["continual", "--dry-run", "--out", &out][..], &short].concat()).output().unwrap());
    assert!(plan.contains("task letters") && plan.contains("kept between tasks"), "{plan}");
    assert!(!Path::new(&out).exists());
    let text = ok(qtune(&[&["continual", "-q", "--out", &out][..], &short].concat()).output().unwrap());
    assert!(text.contains("after digits") && text.contains("average accuracy"), "{text}");
    let page = std::fs::read_to_string(Path::new(&out).join("report.html")).unwrap();
    assert!(page.contains("Top-1 on each task") && page.contains("after letters"));
    let again = qtune(&["continual", "--resume", &out, "--json"]).output().unwrap();
    let summary: Value = serde_json::from_str(&ok(again)).unwrap();
    assert_eq!(
        (summary["command"].as_str(), summary["method"].as_str()),
        (Some("continual"), Some("classp"))
    );
    assert_eq!(summary["accuracy"].as_array().unwrap().len(), 2);
}

fn refused(args: &[&str]) -> (Option<i32>, String) {
    let output = qtune(&[args, &["-q"]].concat()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).trim().to_string();
    assert_eq!(text.lines().count(), 1, "{text}");
    (output.status.code(), text)
}

#[test]
fn what_does_not_go_together_is_said() {
    let (code, text) = refused(&["continual", "--tasks", "no-such-folder,glyphs"]);
    assert!(code == Some(2) && text.contains("no-such-folder"), "{text}");
    let (code, text) = refused(&["continual", "--set", "continual.task.0.classes=[\"0\",\"Q\"]"]);
    assert!(code == Some(2) && text.contains("\"Q\""), "{text}");
    let (code, text) = refused(&["continual", "--method", "classp", "--optimizer", "sgd"]);
    assert!(code == Some(2) && text.contains("optimizer.kind"), "{text}");
    let (code, text) = refused(&["continual", "--recipe", "glyphs"]);
    assert!(code == Some(2) && text.contains("continual.task"), "{text}");
    let (code, text) = refused(&["quantize", "--recipe", "continual-glyphs"]);
    assert!(code == Some(2) && text.contains("qtune continual"), "{text}");
}
