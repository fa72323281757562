//! TensorBoard's event files, written by hand: TFRecord frames around protobuf messages.
//!
//! A frame is `length: u64 | masked crc32c of the length | data | masked crc32c of the data`, little-endian;
//! the mask of a checksum is `rotate_right(crc, 15) + 0xa282ead8`, so that a checksum of data that holds
//! checksums stays a checksum. The data is an `Event { wall_time = 1, step = 2, file_version = 3 |
//! summary = 5 }` of `Value { tag = 1, simple_value = 2 | histo = 5 }` (tensorflow's event.proto and
//! summary.proto).
//!
//! One line of metrics.jsonl is one frame: scalars are tagged `<split>/<key>`, those of a weight
//! `layers/<name>/<key>`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};

use super::layers::Layer;
use crate::{files, Error, Result};

/// The name of a run's event file: always the same, so that a resumed run goes on with it.
pub const FILE_NAME: &str = "events.out.tfevents.0.qtune";

/// The event file of a run.
#[derive(Debug)]
pub struct Events {
    path: PathBuf,
    file: File,
}

impl Events {
    /// Writes the event file of the folder `dir` anew from `kept`, the first lines of its metrics, and
    /// keeps it open for more. Frames that the file held for these lines keep their times.
    pub fn open(dir: &Path, kept: impl Iterator<Item = io::Result<Vec<u8>>>) -> Result<Self> {
        let path = dir.join(FILE_NAME);
        let times = std::fs::read(&path).map(|old| wall_times(&old)).unwrap_or_default();
        let now = now();
        let time = |i: usize| times.get(i).copied().unwrap_or(now);
        files::write_atomic(&path, |w| {
            let mut version = Vec::new();
            double(&mut version, 1, time(0));
            bytes(&mut version, 3, b"brain.Event:2");
            w.write_all(&frame(&version))?;
            for (i, line) in kept.enumerate() {
                let object: Map<String, Value> = serde_json::from_slice(&line?).unwrap_or_default();
                w.write_all(&frame(&event(&object, time(i + 1))))?;
            }
            Ok(())
        })?;
        let file = OpenOptions::new().append(true).open(&path).map_err(|e| Error::io(&path, e))?;
        Ok(Events { path, file })
    }

    /// Appends one line of metrics.
    pub fn append(&mut self, line: &Map<String, Value>) -> Result<()> {
        self.file.write_all(&frame(&event(line, now()))).map_err(|e| Error::io(&self.path, e))
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map(|d| d.as_secs_f64()).unwrap_or(0.0)
}

/// The times of the whole frames at the start of an event file of ours.
fn wall_times(mut file: &[u8]) -> Vec<f64> {
    let mut times = Vec::new();
    while let Some((data, rest)) = unframe(file) {
        match data.split_first_chunk::<9>() {
            // `wall_time` comes first: its key, then the double.
            Some(([0x09, time @ ..], _)) => times.push(f64::from_le_bytes(*time)),
            _ => break,
        }
        file = rest;
    }
    times
}

/// The data of the first frame, where it is whole, and what follows.
fn unframe(file: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = file.split_first_chunk::<8>()?;
    let (check, rest) = rest.split_first_chunk::<4>()?;
    if u32::from_le_bytes(*check) != masked(length) {
        return None;
    }
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let (data, rest) = rest.split_at_checked(length)?;
    let (check, rest) = rest.split_first_chunk::<4>()?;
    (u32::from_le_bytes(*check) == masked(data)).then_some((data, rest))
}

fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(data.len() + 16);
    out.extend(length);
    out.extend(masked(&length).to_le_bytes());
    out.extend(data);
    out.extend(masked(data).to_le_bytes());
    out
}

/// The message of one line of metrics.
fn event(line: &Map<String, Value>, wall_time: f64) -> Vec<u8> {
    let mut out = Vec::new();
    double(&mut out, 1, wall_time);
    let step = line.get("step").and_then(Value::as_u64).unwrap_or(0);
    key(&mut out, 2, 0);
    varint(&mut out, step);
    let mut summary = Vec::new();
    let split = line.get("split").and_then(Value::as_str).unwrap_or("run");
    for (name, value) in line.iter().filter(|(name, _)| *name != "step") {
        if let Some(value) = value.as_f64() {
            scalar(&mut summary, &format!("{split}/{name}"), value);
        }
    }
    for layer in line.get("layers").and_then(Value::as_array).into_iter().flatten() {
        of_layer(&mut summary, &Layer::read(layer));
    }
    bytes(&mut out, 5, &summary);
    out
}

/// The scalars and histograms of one weight.
fn of_layer(summary: &mut Vec<u8>, layer: &Layer) {
    let mut put = |key: &str, value: Option<f64>| {
        if let Some(value) = value {
            scalar(summary, &format!("layers/{}/{key}", layer.name), value);
        }
    };
    for (key, value) in &layer.figures {
        put(key, Some(*value));
    }
    for (distance, share) in &layer.near {
        put(&format!("near_threshold/{distance}"), Some(*share));
    }
    for (row, scale) in layer.scale_rows.iter().zip(&layer.scales) {
        put(&format!("scale/row_{row}"), Some(*scale));
    }
    let codes = layer.codes.unwrap_or(1.0);
    let mut histogram = |key: &str, shares: &[f64], from: f64, width: f64| {
        if !shares.is_empty() {
            let counts: Vec<f64> = shares.iter().map(|share| share * codes).collect();
            let mut value = Vec::new();
            bytes(&mut value, 1, format!("layers/{}/{key}", layer.name).as_bytes());
            bytes(&mut value, 5, &histo(&counts, from, width));
            bytes(summary, 1, &value);
        }
    };
    // A level's bar lies around its number, the lowest being 0.
    histogram("levels", &layer.levels, -0.5, 1.0);
    histogram("distance", &layer.distance, 0.0, 0.5 / layer.distance.len().max(1) as f64);
}

fn scalar(summary: &mut Vec<u8>, tag: &str, value: f64) {
    let mut out = Vec::new();
    bytes(&mut out, 1, tag.as_bytes());
    key(&mut out, 2, 5);
    out.extend((value as f32).to_le_bytes());
    bytes(summary, 1, &out);
}

/// A `HistogramProto { min = 1, max, num, sum, sum_squares, bucket_limit, bucket }` of equal bars.
fn histo(counts: &[f64], from: f64, width: f64) -> Vec<u8> {
    let limit = |i: usize| from + width * i as f64;
    let middle = |i: usize| limit(i) + width / 2.0;
    let sum = |f: &dyn Fn(usize) -> f64| counts.iter().enumerate().map(|(i, n)| n * f(i)).sum::<f64>();
    let mut out = Vec::new();
    double(&mut out, 1, from);
    double(&mut out, 2, limit(counts.len()));
    double(&mut out, 3, counts.iter().sum());
    double(&mut out, 4, sum(&middle));
    double(&mut out, 5, sum(&|i| middle(i) * middle(i)));
    let packed =
        |values: &mut dyn Iterator<Item = f64>| values.flat_map(f64::to_le_bytes).collect::<Vec<u8>>();
    bytes(&mut out, 6, &packed(&mut (1..=counts.len()).map(limit)));
    bytes(&mut out, 7, &packed(&mut counts.iter().copied()));
    out
}

/// A field's key: its number and how its value is laid out (0 varint, 1 eight bytes, 2 with a length,
/// 5 four bytes).
fn key(out: &mut Vec<u8>, field: u64, layout: u64) {
    varint(out, field << 3 | layout);
}

/// Seven bits a byte, the lowest first, the top bit set on all but the last byte.
fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn double(out: &mut Vec<u8>, field: u64, value: f64) {
    key(out, field, 1);
    out.extend(value.to_le_bytes());
}

fn bytes(out: &mut Vec<u8>, field: u64, value: &[u8]) {
    key(out, field, 2);
    varint(out, value.len() as u64);
    out.extend(value);
}

/// crc32c (Castagnoli) one byte at a time: polynomial 0x1EDC6F41, here with its bits reversed.
const TABLE: [u32; 256] = {
    let mut table = [0u32; 256];
    let mut i = 0;
    while i < 256 {
        let (mut crc, mut bit) = (i as u32, 0);
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82F6_3B78 } else { crc >> 1 };
            bit += 1;
        }
        table[i] = crc;
        i += 1;
    }
    table
};

fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(!0u32, |crc, byte| crc >> 8 ^ TABLE[usize::from(crc as u8 ^ byte)])
}

fn masked(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// RFC 3720, B.4, and the check value of the catalogue of CRCs.
    #[test]
    fn checksums_of_known_data() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
        assert_eq!(crc32c(&[0xFF; 32]), 0x62A8_AB43);
        let rising: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&rising), 0x46DD_794E);
    }

    #[test]
    fn varints_by_hand() {
        let of = |value| {
            let mut out = Vec::new();
            varint(&mut out, value);
            out
        };
        assert_eq!(of(0), [0]);
        assert_eq!(of(127), [127]);
        assert_eq!(of(128), [0x80, 1]);
        assert_eq!(of(300), [0xAC, 2]);
        assert_eq!(of(u64::MAX), [[0xFF; 9].as_slice(), &[1]].concat());
    }

    #[test]
    fn frames_are_lengths_and_checksums_around_the_data() {
        let framed = frame(b"123456789");
        assert_eq!(framed.len(), 8 + 4 + 9 + 4);
        assert_eq!(framed[..8], 9u64.to_le_bytes());
        let mask = 0xE306_9283u32.rotate_right(15).wrapping_add(0xa282_ead8);
        assert_eq!(framed[21..], mask.to_le_bytes());
        assert_eq!(unframe(&framed), Some((&b"123456789"[..], &b""[..])));
        let cut = &framed[..framed.len() - 1];
        assert_eq!(unframe(cut), None);
        let mut spoiled = framed.clone();
        spoiled[14] ^= 1;
        assert_eq!(unframe(&spoiled), None);
    }

    #[test]
    fn a_scalar_by_hand() {
        let line = json!({"step": 300, "split": "eval", "top1": 1.5, "what": "packed", "loss": null});
        let got = event(line.as_object().unwrap(), 2.0);
        let mut expected = vec![0x09, 0, 0, 0, 0, 0, 0, 0, 0x40, 0x10, 0xAC, 2, 0x2A, 18, 0x0A, 16];
        expected.extend(b"\x0A\x09eval/top1\x15");
        expected.extend(1.5f32.to_le_bytes());
        assert_eq!(got, expected);
    }

    #[test]
    fn histograms_hold_limits_and_counts() {
        let got = histo(&[1.0, 3.0], -0.5, 1.0);
        let f = |v: f64| v.to_le_bytes().to_vec();
        let head = [[9].into(), f(-0.5), [17].into(), f(1.5), [25].into(), f(4.0), [33].into(), f(3.0)];
        let tail = [[41].into(), f(3.0), [50, 16].into(), f(0.5), f(1.5), [58, 16].into(), f(1.0), f(3.0)];
        assert_eq!(got, [head, tail].concat().concat());
    }

    #[test]
    fn a_file_opened_again_keeps_what_was_kept_and_its_times() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let line =
            |step: u64| json!({"step": step, "split": "train", "loss": 0.5}).as_object().unwrap().clone();
        let text = |step| Ok(serde_json::to_vec(&line(step)).unwrap());
        let mut events = Events::open(dir.path(), std::iter::empty()).unwrap();
        (1..4).for_each(|step| events.append(&line(step)).unwrap());
        let whole = std::fs::read(&path).unwrap();
        let times = wall_times(&whole);
        assert_eq!(times.len(), 4);
        assert!(times.windows(2).all(|t| t[0] <= t[1]) && times[0] > 1e9);

        drop(Events::open(dir.path(), [text(1), text(2)].into_iter()).unwrap());
        let kept = std::fs::read(&path).unwrap();
        assert!(whole.starts_with(&kept) && kept.len() < whole.len());
        assert_eq!(wall_times(&kept), times[..3]);

        // Half a frame at the end: its line is written again.
        std::fs::write(&path, &whole[..whole.len() - 3]).unwrap();
        drop(Events::open(dir.path(), (1..4).map(text)).unwrap());
        let again = std::fs::read(&path).unwrap();
        assert_eq!(again.len(), whole.len());
        assert_eq!(wall_times(&again)[..3], times[..3]);
    }
}
