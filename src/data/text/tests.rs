//! Whole data sets: splits, limits, and the published files where they are at hand.

use super::*;
use std::path::{Path, PathBuf};

fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

fn bytes() -> Tokenizer {
    Tokenizer::bytes().unwrap()
}

fn at(path: &Path) -> TextConfig {
    TextConfig { path: Some(path.into()), seq_len: 16, ..TextConfig::default() }
}

/// `n` records, the last one's answer the number `n - 1`.
fn lines(n: usize) -> String {
    (0..n).map(|i| format!("{{\"prompt\": \"p\", \"completion\": \"{i}\"}}\n")).collect()
}

#[test]
fn the_last_tenth_is_held_out() {
    let dir = tempfile::tempdir().unwrap();
    let data = at(&write(dir.path(), "a.jsonl", &lines(25))).open(&bytes(), 0).unwrap();
    assert_eq!((data.train.rows(), data.eval.rows(), data.name.as_str()), (23, 2, "a.jsonl"));
    assert_eq!(data.eval.samples()[1].tokens, bytes().encode("p24</s>", true).unwrap());
    assert!(data.notes[0].contains("last tenth"), "{:?}", data.notes);
    let two = at(&write(dir.path(), "b.jsonl", &lines(2))).open(&bytes(), 0).unwrap();
    assert_eq!((two.train.rows(), two.eval.rows()), (1, 1));
    let one = at(&write(dir.path(), "c.jsonl", &lines(1))).open(&bytes(), 0).unwrap_err();
    assert!(one.to_string().contains("one record"), "{one}");
    // By characters, not by bytes.
    let text = "é".repeat(95) + "12345";
    let data = at(&write(dir.path(), "a.txt", &text)).open(&bytes(), 0).unwrap();
    assert_eq!((data.train.tokens(), data.eval.tokens()), (180, 15));
    assert_eq!(data.train.stream().unwrap()[..2], [0xC3, 0xA9]);
}

#[test]
fn splits_second_paths_and_limits() {
    let dir = tempfile::tempdir().unwrap();
    let (train, test) =
        (write(dir.path(), "train.jsonl", &lines(30)), write(dir.path(), "test.jsonl", &lines(7)));
    let count = |config: TextConfig| {
        let data = config.open(&bytes(), 0).unwrap();
        (data.train.rows(), data.eval.rows())
    };
    assert_eq!(count(at(dir.path())), (30, 7));
    assert_eq!(count(TextConfig { eval_path: Some(test.clone()), ..at(&train) }), (30, 7));
    assert_eq!(count(TextConfig { limit_train: Some(3), limit_eval: Some(2), ..at(dir.path()) }), (3, 2));
    let plain = write(dir.path(), "x.dat", &"0123456789".repeat(50));
    assert_eq!(count(TextConfig { limit_train: Some(3), limit_eval: Some(2), ..at(&plain) }), (3, 2));
    let packed = TextConfig { pack: true, ..at(dir.path()) };
    assert!(count(packed.clone()).0 <= 10 && packed.open(&bytes(), 0).unwrap().train.samples().len() == 30);
    std::fs::remove_file(&train).unwrap();
    let only = at(dir.path()).open(&bytes(), 0).unwrap();
    assert!(only.train.is_empty() && only.eval.rows() == 7);
    let twice = TextConfig { eval_path: Some(test.clone()), ..at(&test) };
    assert_eq!(count(twice), (7, 7));
}

#[test]
fn what_does_not_go_together_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let says = |config: TextConfig| config.open(&bytes(), 0).unwrap_err();
    let nowhere = says(TextConfig { eval_path: Some("x".into()), ..TextConfig::default() });
    assert_eq!((nowhere.exit_code(), nowhere.to_string().contains("no path to train on")), (2, true));
    assert_eq!(says(TextConfig { seq_len: 1, ..TextConfig::default() }).exit_code(), 2);
    assert_eq!(says(TextConfig { limit_train: Some(0), ..TextConfig::default() }).exit_code(), 2);
    assert_eq!(says(at(&dir.path().join("gone.jsonl"))).exit_code(), 4);
    let long = write(
        dir.path(),
        "long.jsonl",
        &"{\"prompt\": \"0123456789abcdef\", \"completion\": \"x\"}\n".repeat(4),
    );
    let message = says(at(&long)).to_string();
    assert!(message.contains("all 3 samples left out") && message.contains("3 were cut"), "{message}");
    let data = TextConfig { seq_len: 18, ..at(&long) }.open(&bytes(), 0).unwrap();
    let cut = &data.notes[1];
    assert!(cut.contains("3 of 3 samples cut to 18 tokens, the longest has 19"), "{:?}", data.notes);
    let strict = TextConfig { seq_len: 18, strict: true, ..at(&long) };
    assert!(says(strict).to_string().contains("long.jsonl: line 1: 19 tokens"));
}

#[test]
fn chats_use_the_models_template() {
    let dir = tempfile::tempdir().unwrap();
    bytes().save(dir.path()).unwrap();
    let body = "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}\
        {% if add_generation_prompt %}<assistant>{% endif %}";
    write(dir.path(), "chat_template.jinja", body);
    let tokenizer = Tokenizer::open(dir.path(), None).unwrap();
    let turns = r#"{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]}"#;
    let config =
        TextConfig { seq_len: 64, ..at(&write(dir.path(), "t.jsonl", &format!("{turns}\n{turns}"))) };
    let learned = |config: &TextConfig| {
        let data = config.open(&tokenizer, 0).unwrap();
        let sample = &data.train.samples()[0];
        let kept = sample.tokens.iter().zip(&sample.train).filter(|(_, t)| **t).map(|(id, _)| *id);
        (
            tokenizer.decode_all(&sample.tokens).unwrap(),
            tokenizer.decode_all(&kept.collect::<Vec<_>>()).unwrap(),
        )
    };
    assert_eq!(learned(&config), ("<user>u|<assistant>v|".into(), "v|".into()));
    let all = TextConfig { completion_only: false, ..config.clone() };
    assert_eq!(learned(&all).1, "user>u|<assistant>v|");
    let plain = TextConfig { template: Some("none".into()), ..config };
    assert_eq!(learned(&plain).0, "<s>User: u\nAssistant: v</s>\n");
}

#[test]
fn the_built_in_text_opens() {
    for (builtin, text) in [(Builtin::Sorting, "sort: "), (Builtin::Grammar, "")] {
        let config = TextConfig { builtin, strict: true, ..TextConfig::default() };
        let (data, shown) = config.open_showing(&bytes(), 0, 2).unwrap();
        assert_eq!((data.train.rows(), data.eval.rows(), shown.len()), (3600, 400, 2));
        assert!(shown[0].text.starts_with(text));
        assert_eq!(data.name, builtin.name());
    }
}

#[test]
fn the_table_of_a_recipe() {
    let config: TextConfig =
        toml::from_str("path = \"a.jsonl\"\npack = true\nbuiltin = \"grammar\"").unwrap();
    assert!(config.pack && config.builtin == Builtin::Grammar && config.seq_len == 256);
    let back: TextConfig = toml::from_str(&toml::to_string(&config).unwrap()).unwrap();
    assert_eq!(back, config);
    assert!(toml::from_str::<TextConfig>("seqlen = 3").is_err());
}

/// The folder of published data, or a line that says that it is not there.
fn published(name: &str) -> Option<PathBuf> {
    let root = std::env::var_os("QTUNE_DATA").map(PathBuf::from);
    let root = root.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data"));
    let path = root.join(name);
    if !path.exists() {
        println!("skipped: {} is not there", path.display());
        return None;
    }
    Some(path)
}

/// The set-up that was measured with other software, which put a beginning-of-sequence token before the
/// text to train on (623344 tokens then): the same counts.
#[test]
fn tinyshakespeare_has_the_measured_counts() {
    let (Some(text), Some(model)) = (published("tinyshakespeare"), published("models/stories260K-hf")) else {
        return;
    };
    let tokenizer = Tokenizer::open(&model, Some(512)).unwrap();
    let config = TextConfig { path: Some(text), ..TextConfig::default() };
    let data = config.open(&tokenizer, 0).unwrap();
    assert_eq!((data.train.tokens(), data.eval.rows(), data.eval.trained()), (623_343, 273, 273 * 255));
    assert_ne!(data.train.stream().unwrap().first(), tokenizer.bos().as_ref());
    let batch = data.eval.epoch(0, 0, false).batch(0..2).unwrap();
    assert_eq!((batch.len, batch.trained), (256, 510));
    let with_bos = TextConfig { add_bos: Some(true), ..config }.open(&tokenizer, 0).unwrap();
    assert_eq!(with_bos.train.tokens(), 623_344);
}

/// Texts to compare tokenizers on: prose, many scripts, odd spaces.
fn samples() -> Vec<String> {
    let mut texts = vec![
        "".to_string(),
        " ".into(),
        "  two  spaces ".into(),
        "\n\ttab\r\n".into(),
        "naïve café, €5 – “ok”…".into(),
        "日本語のテキスト и русский текст".into(),
        "😀👩‍👩‍👧 \u{0}\u{7F}".into(),
        "x".repeat(100),
        "12345 3.14 #@!".into(),
    ];
    for name in ["tinyshakespeare/input.txt", "gsm8k/test.jsonl", "tinystories/tinystories_sample.txt"] {
        let Some(path) = published(name) else { continue };
        let text = String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned();
        texts.extend(text.lines().filter(|l| !l.contains('<')).step_by(7).take(500).map(str::to_string));
        texts.push(text.chars().filter(|c| *c != '<').take(3000).collect());
    }
    texts
}

#[test]
fn a_llama2c_tokenizer_is_the_converted_one() {
    let (Some(own), Some(hf)) = (published("models/stories260K"), published("models/stories260K-hf")) else {
        return;
    };
    let (own, hf) = (Tokenizer::open(&own, Some(512)).unwrap(), Tokenizer::open(&hf, Some(512)).unwrap());
    for text in samples() {
        let ids = own.encode(&text, true).unwrap();
        assert_eq!(ids, hf.encode(&text, true).unwrap(), "{text:?}");
        assert_eq!(own.decode(&ids).unwrap(), text);
    }
    assert_eq!((own.bos(), own.eos(), own.adds_bos()), (Some(1), &[2u32][..], true));
}

#[test]
fn llama2_in_both_of_its_forms_is_one_tokenizer() {
    let Some(dir) = published("tokenizers/llama2") else { return };
    let model = Tokenizer::open(&dir.join("tokenizer.model"), Some(32000)).unwrap();
    let bin = Tokenizer::open(&dir.join("tokenizer.bin"), Some(32000)).unwrap();
    for text in samples() {
        let ids = model.encode(&text, true).unwrap();
        assert_eq!(ids, bin.encode(&text, true).unwrap(), "{text:?}");
        assert_eq!(model.decode(&ids).unwrap(), text);
    }
    // As the reference implementation has it.
    assert_eq!(model.encode("Hello world", true).unwrap(), [1, 15043, 3186]);
    assert!(Tokenizer::open(&dir, Some(100)).unwrap_err().to_string().contains("31999"));
}

#[test]
fn gpt2_and_bert_vocabularies() {
    if let Some(dir) = published("tokenizers/gpt2") {
        let gpt2 = Tokenizer::open(&dir, Some(50257)).unwrap();
        assert_eq!(gpt2.encode("Hello world, it's", false).unwrap(), [15496, 995, 11, 340, 338]);
        assert_eq!((gpt2.eos(), gpt2.adds_bos()), (&[50256u32][..], false));
        for text in samples() {
            assert_eq!(gpt2.decode(&gpt2.encode(&text, true).unwrap()).unwrap(), text);
            let (ids, places) = gpt2.encode_with_places(&text).unwrap();
            assert_eq!(ids.len(), places.len());
            assert!(places.windows(2).all(|w| w[1].start <= w[0].end && w[0].end <= w[1].end), "{text:?}");
            assert_eq!(places.last().map_or(0, |p| p.end), text.len());
        }
    }
    if let Some(dir) = published("tokenizers/bert-base-uncased") {
        let bert = Tokenizer::open(&dir, None).unwrap();
        assert_eq!(bert.encode("Hello, world!", false).unwrap(), [7592, 1010, 2088, 999]);
    }
}

#[test]
fn gsm8k_learns_answers_only() {
    let (Some(text), Some(model)) = (published("gsm8k"), published("models/stories260K-hf")) else { return };
    let tokenizer = Tokenizer::open(&model, Some(512)).unwrap();
    let config = TextConfig {
        path: Some(text),
        limit_train: Some(300),
        limit_eval: Some(30),
        seq_len: 512,
        ..TextConfig::default()
    };
    let (data, shown) = config.open_showing(&tokenizer, 0, 1).unwrap();
    assert_eq!(
        (data.train.samples().len() + data.train.dropped, data.eval.samples().len() + data.eval.dropped),
        (300, 30)
    );
    let sample = &shown[0].sample;
    let part = |learned: bool| {
        let kept = sample.tokens.iter().zip(&sample.train).filter(|(_, t)| **t == learned).map(|(id, _)| *id);
        tokenizer.decode_all(&kept.collect::<Vec<_>>()).unwrap()
    };
    assert!(part(true).trim_start().starts_with("Natalia sold 48/2"), "{}", part(true));
    assert!(part(true).ends_with("#### 72</s>"), "{}", part(true));
    assert!(part(false).contains("April and May?\n"), "{}", part(false));
}
