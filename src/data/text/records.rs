//! Files of text: which of them train and which evaluate, and what they hold, as records or as plain
//! text.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flate2::read::MultiGzDecoder;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use serde_json::{Map, Value};

use super::tokenizer::one_line;
use crate::{Error, On, Result};

/// The most bytes that a compressed file may grow to.
const MOST_IN_MEMORY: u64 = 8 << 30;

/// A record and where it stands.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub file: Arc<Path>,
    /// What its number counts: `line` or `record`.
    pub unit: &'static str,
    /// From 1.
    pub number: usize,
    pub value: Map<String, Value>,
}

impl Row {
    /// Where it stands in its file, such as `line 12`.
    pub fn place(&self) -> String {
        format!("{} {}", self.unit, self.number)
    }

    /// An error that names it.
    pub fn error(&self, message: impl std::fmt::Display) -> Error {
        Error::input(&self.file, format!("{}: {message}", self.place()))
    }
}

/// What files hold.
#[derive(Debug)]
pub(super) enum Content {
    Records(Vec<Row>),
    Plain(String),
}

/// The files of one path, by what they are for.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Splits {
    pub train: Vec<PathBuf>,
    pub eval: Vec<PathBuf>,
}

/// Endings of files of records.
const RECORDS: [&str; 4] = ["jsonl", "ndjson", "json", "parquet"];

/// The ending of a name in small letters, `.gz` aside.
fn ending(path: &Path) -> String {
    let name = path.file_name().map(|n| n.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    name.rsplit_once('.').map(|(_, end)| end.to_string()).unwrap_or_default()
}

/// Whether a path looks like text to train on: by its ending, or a folder by what it holds.
pub fn is_text(path: &Path) -> bool {
    let text = |path: &Path| RECORDS.contains(&ending(path).as_str()) || ending(path) == "txt";
    match path.is_dir() {
        true => splits(path).is_ok_and(|found| found.train.iter().chain(&found.eval).all(|file| text(file))),
        false => text(path),
    }
}

/// The files of `path`: itself, or those of a folder (or of its folder `data`) that are named after a
/// split, `train*` to train and `test*`, `valid*`, `val*`, `dev*` or `eval*` to evaluate; or its only
/// file.
pub(super) fn splits(path: &Path) -> Result<Splits> {
    if !std::fs::metadata(path).on(path.display().to_string())?.is_dir() {
        return Ok(Splits { train: vec![path.to_path_buf()], eval: Vec::new() });
    }
    for folder in [path.to_path_buf(), path.join("data")] {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        let known = |path: &PathBuf| RECORDS.contains(&ending(path).as_str()) || ending(path) == "txt";
        let mut files: Vec<PathBuf> =
            entries.flatten().map(|e| e.path()).filter(|p| p.is_file() && known(p)).collect();
        files.sort();
        let of = |words: &[&str]| -> Vec<PathBuf> {
            let named = |path: &&PathBuf| {
                let name =
                    path.file_name().map(|n| n.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
                words.iter().any(|word| name.starts_with(word))
            };
            files.iter().filter(named).cloned().collect()
        };
        let train = of(&["train"]);
        // One of them: a data set may have a validation and a test split, and is judged by the latter.
        let names: [&[&str]; 2] = [&["test"], &["valid", "val", "dev", "eval"]];
        let eval = names.iter().map(|words| of(words)).find(|found| !found.is_empty()).unwrap_or_default();
        if !train.is_empty() || !eval.is_empty() {
            return Ok(Splits { train, eval });
        }
        if let [only] = &files[..] {
            return Ok(Splits { train: vec![only.clone()], eval });
        }
    }
    let expected =
        "expected train.* and test.* (or valid*.*), of .jsonl, .json, .parquet or .txt, or one such file";
    Err(Error::input(path, format!("no text found; {expected}")))
}

/// What `files` hold together: records of JSON lines, JSON lists and Parquet, else plain text.
///
/// Errs on a broken line (naming it and the column), on what is not UTF-8, and where some files hold
/// records and others text.
pub(super) fn read(files: &[PathBuf]) -> Result<Content> {
    let mut rows = Vec::new();
    let mut plain: Option<String> = None;
    for path in files {
        match ending(path).as_str() {
            "parquet" => rows.extend(parquet(path)?),
            "json" => rows.extend(json(path, &text(path)?)?),
            "jsonl" | "ndjson" => rows.extend(json_lines(path, &text(path)?)?),
            _ => plain.get_or_insert_default().push_str(&text(path)?),
        }
        if plain.is_some() && !rows.is_empty() {
            return Err(Error::input(
                path,
                "records and plain text side by side: expected files of one kind",
            ));
        }
    }
    Ok(plain.map_or(Content::Records(rows), Content::Plain))
}

/// A whole text file, decompressed where it is gzip.
fn text(path: &Path) -> Result<String> {
    let mut bytes = std::fs::read(path).on(path.display().to_string())?;
    if bytes.starts_with(&[0x1F, 0x8B]) {
        let mut out = Vec::new();
        let mut reader = MultiGzDecoder::new(&bytes[..]).take(MOST_IN_MEMORY);
        reader.read_to_end(&mut out).map_err(|e| Error::input(path, format!("a damaged gzip file: {e}")))?;
        if out.len() as u64 == MOST_IN_MEMORY {
            return Err(Error::input(path, format!("more than {MOST_IN_MEMORY} bytes when decompressed")));
        }
        bytes = out;
    }
    let mut text = String::from_utf8(bytes)
        .map_err(|e| Error::input(path, format!("not UTF-8 at byte {}", e.utf8_error().valid_up_to())))?;
    if text.starts_with('\u{FEFF}') {
        text.remove(0);
    }
    match text.trim().is_empty() {
        true => Err(Error::input(path, "an empty file, expected text")),
        false => Ok(text),
    }
}

/// What serde_json says, without the place, which we name ourselves.
fn cause(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or_default().to_string()
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn json_lines(path: &Path, text: &str) -> Result<Vec<Row>> {
    let file: Arc<Path> = path.into();
    let mut rows = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let value: Value = serde_json::from_str(line).map_err(|e| {
            Error::input(path, format!("line {}, column {}: {}", i + 1, e.column(), cause(&e)))
        })?;
        rows.push(object(&file, "line", i + 1, value)?);
    }
    Ok(rows)
}

fn object(file: &Arc<Path>, unit: &'static str, number: usize, value: Value) -> Result<Row> {
    match value {
        Value::Object(value) => Ok(Row { file: file.clone(), unit, number, value }),
        other => {
            let found = format!("{unit} {number}: found {}, expected an object", kind(&other));
            Err(Error::input(file, found))
        }
    }
}

/// A list of records, an object that holds one under a usual name, or JSON lines in spite of the name.
fn json(path: &Path, text: &str) -> Result<Vec<Row>> {
    let list = match serde_json::from_str::<Value>(text) {
        Ok(Value::Array(list)) => list,
        Ok(Value::Object(mut map)) => {
            let holds = |key: &&str| map.get(*key).is_some_and(Value::is_array);
            match ["data", "train", "examples", "rows"]
                .into_iter()
                .find(holds)
                .and_then(|key| map.remove(key))
            {
                Some(Value::Array(list)) => list,
                _ => vec![Value::Object(map)],
            }
        }
        Ok(other) => {
            return Err(Error::input(path, format!("found {}, expected a list of records", kind(&other))))
        }
        Err(_) if text.trim_start().starts_with('{') => return json_lines(path, text),
        Err(e) => {
            return Err(Error::input(
                path,
                format!("line {}, column {}: {}", e.line(), e.column(), cause(&e)),
            ))
        }
    };
    let file: Arc<Path> = path.into();
    list.into_iter().enumerate().map(|(i, value)| object(&file, "record", i + 1, value)).collect()
}

fn parquet(path: &Path) -> Result<Vec<Row>> {
    let bad = |e: parquet::errors::ParquetError| Error::input(path, one_line(&e.to_string()));
    let file = File::open(path).on(path.display().to_string())?;
    let reader = SerializedFileReader::new(file).map_err(bad)?;
    let name: Arc<Path> = path.into();
    let mut rows = Vec::new();
    for (i, row) in reader.get_row_iter(None).map_err(bad)?.enumerate() {
        let columns = row.map_err(bad)?.into_columns();
        let value = columns.into_iter().map(|(key, field)| (key, value_of(&field))).collect();
        rows.push(Row { file: name.clone(), unit: "record", number: i + 1, value });
    }
    Ok(rows)
}

/// A Parquet value as JSON; what is neither text, number nor made of them is null.
fn value_of(field: &Field) -> Value {
    match field {
        Field::Bool(v) => Value::from(*v),
        Field::Byte(v) => Value::from(*v),
        Field::Short(v) => Value::from(*v),
        Field::Int(v) => Value::from(*v),
        Field::Long(v) => Value::from(*v),
        Field::UByte(v) => Value::from(*v),
        Field::UShort(v) => Value::from(*v),
        Field::UInt(v) => Value::from(*v),
        Field::ULong(v) => Value::from(*v),
        Field::Float(v) => Value::from(*v),
        Field::Double(v) => Value::from(*v),
        Field::Str(v) => Value::from(v.as_str()),
        // Some writers leave out that their bytes are text.
        Field::Bytes(v) => std::str::from_utf8(v.data()).map_or(Value::Null, Value::from),
        Field::Group(row) => {
            let columns = row.get_column_iter();
            Value::Object(columns.map(|(key, field)| (key.clone(), value_of(field))).collect())
        }
        Field::ListInternal(list) => Value::Array(list.elements().iter().map(value_of).collect()),
        Field::MapInternal(map) => {
            let entry = |(key, value): &(Field, Field)| match value_of(key) {
                Value::String(key) => (key, value_of(value)),
                other => (other.to_string(), value_of(value)),
            };
            Value::Object(map.entries().iter().map(entry).collect())
        }
        _ => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn rows(name: &str, bytes: &[u8]) -> Result<Vec<Row>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        match read(&[path])? {
            Content::Records(rows) => Ok(rows),
            Content::Plain(_) => panic!("plain text"),
        }
    }

    #[test]
    fn lines_lists_and_objects_are_records() {
        let two = [r#"{"a": 1}"#, r#"{"a": "ü"}"#];
        let lines = format!("\u{FEFF}{}\n\n{}\n", two[0], two[1]);
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(lines.as_bytes()).unwrap();
        let files = [
            ("x.jsonl", lines.clone().into_bytes()),
            ("x.json", lines.clone().into_bytes()),
            ("x.JSONL.gz", gz.finish().unwrap()),
            ("x.json", format!("[{},\n{}]", two[0], two[1]).into_bytes()),
            ("x.json", format!("{{\"v\": 1, \"data\": [{},{}]}}", two[0], two[1]).into_bytes()),
        ];
        for (name, bytes) in files {
            let found = rows(name, &bytes).unwrap();
            assert_eq!(
                found.iter().map(|r| r.value["a"].clone()).collect::<Vec<_>>(),
                [Value::from(1), "ü".into()]
            );
            assert_eq!(found[0].number, 1);
        }
        assert_eq!(rows("x.jsonl", lines.as_bytes()).unwrap()[1].place(), "line 3");
        assert_eq!(rows("x.json", b"{\n\"a\": 1\n}").unwrap().len(), 1);
    }

    #[test]
    fn broken_files_are_told() {
        let says = |name: &str, bytes: &[u8]| rows(name, bytes).unwrap_err().to_string();
        let broken = says("x.jsonl", b"{\"a\": 1}\n{\"a\": tru}\n");
        assert!(broken.contains("x.jsonl: line 2, column 10: expected"), "{broken}");
        assert!(says("x.jsonl", b"[1]").contains("line 1: found a list, expected an object"));
        assert!(says("x.json", b"[{\"a\": 1},\n{]").contains("line 2, column 2"));
        assert!(says("x.json", b"3").contains("found a number"));
        assert!(says("x.jsonl", b"{\"a\": \"\xFF\"}").contains("not UTF-8 at byte 7"));
        assert!(says("x.jsonl", b" \n").contains("empty file"));
        assert!(says("x.parquet", b"PAR1 no").contains("x.parquet"));
        assert!(says("x.jsonl.gz", b"\x1F\x8B\x08rest").contains("damaged gzip"));
    }

    #[test]
    fn a_folder_is_split_by_names() {
        let dir = tempfile::tempdir().unwrap();
        let touch = |name: &str| std::fs::write(dir.path().join(name), "x").unwrap();
        assert!(splits(dir.path()).unwrap_err().to_string().contains("no text found"));
        std::fs::create_dir(dir.path().join("data")).unwrap();
        touch("data/train-00000-of-00002.parquet");
        touch("data/train-00001-of-00002.parquet");
        touch("data/test-00000-of-00001.parquet");
        touch("data/validation-00000-of-00001.parquet");
        let found = splits(dir.path()).unwrap();
        assert_eq!((found.train.len(), found.eval.len()), (2, 1));
        assert!(found.eval[0].to_string_lossy().contains("test-"));
        touch("only.txt");
        touch("README.md");
        assert_eq!(splits(dir.path()).unwrap().train, [dir.path().join("only.txt")]);
        touch("valid.txt.gz");
        touch("train.txt");
        let found = splits(dir.path()).unwrap();
        assert_eq!(found.train, [dir.path().join("train.txt")]);
        assert_eq!(found.eval, [dir.path().join("valid.txt.gz")]);
        assert!(is_text(dir.path()) && is_text(Path::new("a.jsonl.gz")) && !is_text(Path::new("a.tar.gz")));
        touch("train.jsonl");
        let mixed = read(&splits(dir.path()).unwrap().train);
        assert!(mixed.is_err());
    }

    /// Strings, a number and a list of structs, as Hugging Face's data sets store conversations.
    #[test]
    fn parquet_rows_are_records() {
        use parquet::column::writer::ColumnWriter;
        use parquet::data_type::ByteArray;
        use parquet::file::writer::SerializedFileWriter;
        let schema = "message m { optional binary text (UTF8); required int64 n; optional group messages (LIST) {
            repeated group list { optional group element { optional binary role (UTF8); optional binary content (UTF8); } } } }";
        let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train.parquet");
        let mut writer =
            SerializedFileWriter::new(File::create(&path).unwrap(), schema, Default::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let word = |text: &str| ByteArray::from(text.as_bytes().to_vec());
        let mut column = 0;
        while let Some(mut next) = group.next_column().unwrap() {
            match (next.untyped(), column) {
                (ColumnWriter::ByteArrayColumnWriter(w), 0) => {
                    w.write_batch(&[word("é")], Some(&[1, 0]), None).unwrap();
                }
                (ColumnWriter::Int64ColumnWriter(w), _) => {
                    w.write_batch(&[7, 8], None, None).unwrap();
                }
                (ColumnWriter::ByteArrayColumnWriter(w), column) => {
                    let words = if column == 2 { ["user", "assistant"] } else { ["hi", "ho"] };
                    let words = words.map(word);
                    w.write_batch(&words, Some(&[4, 4, 0]), Some(&[0, 1, 0])).unwrap();
                }
                _ => panic!("a column of another type"),
            }
            next.close().unwrap();
            column += 1;
        }
        group.close().unwrap();
        writer.close().unwrap();
        let Content::Records(rows) = read(&[path]).unwrap() else { panic!("plain") };
        assert_eq!(rows[0].value["text"], "é");
        assert_eq!((rows[1].value["text"].clone(), rows[1].value["n"].clone()), (Value::Null, 8.into()));
        assert_eq!(rows[0].value["messages"][1]["content"], "ho");
        assert_eq!(rows[0].value["messages"].as_array().unwrap().len(), 2);
    }
}
