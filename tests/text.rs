//! `qtune data` as a user meets it: what it prints of texts and images, and what it refuses.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn data(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qtune"));
    command.current_dir(dir).stdin(Stdio::null()).arg("data").args(args);
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// What is printed, of a command that must succeed.
fn prints(dir: &Path, args: &[&str]) -> String {
    let out = data(dir, args);
    assert!(out.status.success(), "{args:?}: {}", text(&out.stderr));
    text(&out.stdout)
}

/// The one line of error, of a command that must fail with `code`.
fn fails(dir: &Path, args: &[&str], code: i32) -> String {
    let out = data(dir, args);
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{args:?}: {said}");
    assert!(out.stdout.is_empty() && said.lines().count() == 1, "{args:?}: {said}");
    said
}

#[test]
fn texts_show_what_is_learned() {
    let dir = tempfile::tempdir().unwrap();
    let records: String =
        (0..20).map(|i| format!("{{\"question\": \"q{i}\", \"answer\": \"a{i}\"}}\n")).collect();
    std::fs::write(dir.path().join("x.jsonl"), records).unwrap();
    let shown = prints(dir.path(), &["x.jsonl", "--limit", "1"]);
    assert!(shown.contains("x.jsonl: line 1 (prompt and completion): 7 tokens, 3 learned"), "{shown}");
    assert!(
        shown.contains("question: q0") && shown.contains("answer: a0") && shown.contains("  | q0\n  | a0\n"),
        "{shown}"
    );
    assert!(
        shown.contains(" 256 <s>  113 q ") && shown.contains("[97 a]") && shown.contains("[257 </s>]"),
        "{shown}"
    );
    assert!(shown.contains("train: 18 samples in 18 rows") && shown.contains("eval:  2 samples"), "{shown}");
    let json: Value =
        serde_json::from_str(&prints(dir.path(), &["x.jsonl", "--pack", "--seq-len", "16", "--json"]))
            .unwrap();
    assert_eq!((json["train"]["rows"].clone(), json["train"]["samples"].clone()), (13.into(), 18.into()));
    assert_eq!(json["samples"][2]["tokens"][1], 113);
    assert_eq!(
        json["samples"][0]["trained"],
        serde_json::json!([false, false, false, false, true, true, true])
    );
    // Plain text: all of it.
    std::fs::write(dir.path().join("x.txt"), "hello ".repeat(40)).unwrap();
    let shown = prints(dir.path(), &["x.txt", "--seq-len", "8"]);
    assert!(shown.contains("x.txt: window 3") && shown.contains("104 h  [101 e]"), "{shown}");
    assert!(shown.contains("216 tokens of plain text, 27 rows of 8, 189 learned"), "{shown}");
    assert!(prints(dir.path(), &[]).contains("sorting: "));
}

#[test]
fn bad_text_is_told_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    write("broken.jsonl", "{\"text\": \"a\"}\n{\"text\": \n");
    write("lacks.jsonl", "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \"a\"}\n{}\n");
    write("long.jsonl", &"{\"text\": \"0123456789\"}\n".repeat(3));
    assert!(fails(dir.path(), &["broken.jsonl"], 4).contains("broken.jsonl: line 2, column 9: EOF"));
    let lacks = fails(dir.path(), &["lacks.jsonl"], 4);
    assert!(lacks.contains("line 2: no field `completion`, found prompt"), "{lacks}");
    assert!(fails(dir.path(), &["long.jsonl", "--seq-len", "8", "--strict"], 4).contains("line 1: 12 tokens"));
    assert!(fails(dir.path(), &["gone.jsonl"], 4).contains("gone.jsonl"));
    assert!(fails(dir.path(), &["long.jsonl", "--limit", "0"], 2).contains("--limit 0"));
}

#[test]
fn images_become_a_sheet() {
    let dir = tempfile::tempdir().unwrap();
    let shown = prints(dir.path(), &["--out", "sheet.png", "--limit", "5"]);
    assert!(shown.contains("row 2: ") && shown.contains("glyphs: "), "{shown}");
    let sheet = image::open(dir.path().join("sheet.png")).unwrap().to_rgb8();
    let columns = 3;
    assert_eq!(sheet.width() % columns, 0);
    assert!(sheet.pixels().any(|p| p.0 != sheet.get_pixel(0, 0).0), "an empty sheet");
}
