//! Sets of tokens, the rows of an epoch, and batches of rows.

use std::ops::Range;
use std::sync::Arc;

use super::samples::{Made, Sample};
use crate::random::Random;
use crate::{Error, Result};

/// The target where nothing is learned.
pub const NO_TARGET: u32 = u32::MAX;

/// How many rows stay open while samples are packed.
const OPEN: usize = 64;

/// Rows of tokens to train or to evaluate on.
#[derive(Clone, Debug)]
pub struct TextSet {
    content: Content,
    seq_len: usize,
    /// The token that fills rows up.
    filler: u32,
    /// Samples that were cut to `seq_len`.
    pub cut: usize,
    /// Samples that were left out since nothing in them is learned.
    pub dropped: usize,
    /// The most tokens of a sample before cutting; of plain text the tokens in all.
    pub longest: usize,
}

#[derive(Clone, Debug)]
enum Content {
    /// Each row holds these samples.
    Samples { samples: Arc<Vec<Sample>>, rows: Arc<Vec<Vec<u32>>> },
    /// One stream of plain text, of which a row is a window.
    Stream(Arc<Vec<u32>>),
}

impl TextSet {
    /// A set of samples: one a row, or with `pack` as many as fit into `seq_len` tokens.
    pub(super) fn of_samples(made: Made, seq_len: usize, pack: bool, filler: u32) -> Self {
        let Made { samples, cut, dropped, longest, .. } = made;
        let rows = match pack {
            true => first_fit(samples.iter().map(|s| s.tokens.len()), seq_len),
            false => (0..samples.len() as u32).map(|i| vec![i]).collect(),
        };
        let content = Content::Samples { samples: Arc::new(samples), rows: Arc::new(rows) };
        TextSet { content, seq_len, filler, cut, dropped, longest }
    }

    /// A set of windows of a stream.
    pub(super) fn of_stream(tokens: Vec<u32>, seq_len: usize, filler: u32) -> Self {
        let longest = tokens.len();
        TextSet { content: Content::Stream(Arc::new(tokens)), seq_len, filler, cut: 0, dropped: 0, longest }
    }

    /// How many rows an epoch has: of samples the same in every epoch; of plain text as many windows as
    /// fit beside each other, and one at least.
    pub fn rows(&self) -> usize {
        match &self.content {
            Content::Samples { rows, .. } => rows.len(),
            Content::Stream(tokens) => (tokens.len() / self.seq_len).max(usize::from(tokens.len() > 1)),
        }
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.rows() == 0
    }

    /// The samples, in the order of their file; none for plain text.
    pub fn samples(&self) -> &[Sample] {
        match &self.content {
            Content::Samples { samples, .. } => samples,
            Content::Stream(_) => &[],
        }
    }

    /// The stream of plain text; none for samples.
    pub fn stream(&self) -> Option<&[u32]> {
        match &self.content {
            Content::Samples { .. } => None,
            Content::Stream(tokens) => Some(tokens),
        }
    }

    /// How many tokens there are.
    pub fn tokens(&self) -> usize {
        match &self.content {
            Content::Samples { samples, .. } => samples.iter().map(|s| s.tokens.len()).sum(),
            Content::Stream(tokens) => tokens.len(),
        }
    }

    /// How many targets an epoch has.
    pub fn trained(&self) -> usize {
        match &self.content {
            Content::Samples { samples, .. } => samples.iter().map(Sample::trained).sum(),
            Content::Stream(tokens) => self.rows() * self.seq_len.min(tokens.len()).saturating_sub(1),
        }
    }

    /// The rows of epoch `number` under `seed`. Shuffled, samples come in a random order and windows of
    /// plain text begin at random; else in the order of the file, windows side by side.
    pub fn epoch(&self, seed: u64, number: u64, shuffled: bool) -> Epoch {
        let rows = self.rows();
        let order = match (&self.content, shuffled) {
            (Content::Samples { .. }, true) => Random::new(seed, "text order", &[number]).permutation(rows),
            (Content::Samples { .. }, false) => (0..rows as u32).collect(),
            (Content::Stream(tokens), true) => {
                let starts = tokens.len().saturating_sub(self.seq_len) as u32 + 1;
                let start = |row| Random::new(seed, "window", &[number, row]).below(starts);
                (0..rows as u64).map(start).collect()
            }
            (Content::Stream(_), false) => (0..rows).map(|row| (row * self.seq_len) as u32).collect(),
        };
        Epoch { set: self.clone(), order }
    }
}

/// Puts lengths into rows of `room`: each into the first of the open rows that has place.
fn first_fit(lengths: impl Iterator<Item = usize>, room: usize) -> Vec<Vec<u32>> {
    let mut rows: Vec<Vec<u32>> = Vec::new();
    let mut used: Vec<usize> = Vec::new();
    for (i, length) in lengths.enumerate() {
        let first = rows.len().saturating_sub(OPEN);
        let row = match (first..rows.len()).find(|&row| used[row] + length <= room) {
            Some(row) => row,
            None => {
                rows.push(Vec::new());
                used.push(0);
                rows.len() - 1
            }
        };
        rows[row].push(i as u32);
        used[row] += length;
    }
    rows
}

/// The rows of one pass over a set, in its order.
#[derive(Clone, Debug)]
pub struct Epoch {
    set: TextSet,
    /// Of samples a row's number, of a stream a window's first token.
    order: Vec<u32>,
}

/// Rows of tokens of one length, and what is to be predicted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextBatch {
    /// Token ids, `[batch, len]` row by row.
    pub tokens: Vec<u32>,
    /// Rows.
    pub batch: usize,
    /// Tokens in a row.
    pub len: usize,
    /// `[batch, len]`: the token that the logits of each place predict, the one that follows;
    /// [`NO_TARGET`] where nothing is learned.
    pub targets: Vec<u32>,
    /// `[batch, len]`: each token's position within its sample.
    pub positions: Vec<u32>,
    /// `[batch, len]`: 0 is padding, else the number of the sample within its row, from 1. Attention
    /// stays within a segment.
    pub segments: Vec<u32>,
    /// The samples in it, as indices into [`TextSet::samples`]; of plain text each window's first token.
    pub samples: Vec<u32>,
    /// How many targets there are.
    pub trained: usize,
}

/// A stretch of a row.
struct Segment<'a> {
    id: u32,
    tokens: &'a [u32],
    /// Of each token whether it is learned; all of them where there is nothing said.
    train: Option<&'a [bool]>,
}

impl Epoch {
    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.order.len()
    }

    /// The rows of `range` as a batch as long as the longest of them.
    ///
    /// Errs where the range is empty or leads beyond the last row.
    pub fn batch(&self, range: Range<usize>) -> Result<TextBatch> {
        let order = self.order.get(range.clone()).filter(|rows| !rows.is_empty()).ok_or_else(|| {
            Error::Run(format!("rows {} to {} of an epoch of {}", range.start, range.end, self.rows()))
        })?;
        let rows: Vec<Vec<Segment>> = match &self.set.content {
            Content::Samples { samples, rows } => {
                let segment = |&id: &u32| {
                    let sample = &samples[id as usize];
                    Segment { id, tokens: &sample.tokens, train: Some(&sample.train) }
                };
                order.iter().map(|&row| rows[row as usize].iter().map(segment).collect()).collect()
            }
            Content::Stream(tokens) => {
                let window = |&start: &u32| {
                    let first = (start as usize).min(tokens.len());
                    let end = (first + self.set.seq_len).min(tokens.len());
                    vec![Segment { id: start, tokens: &tokens[first..end], train: None }]
                };
                order.iter().map(window).collect()
            }
        };
        Ok(TextBatch::of(&rows, self.set.filler))
    }
}

impl TextBatch {
    fn of(rows: &[Vec<Segment>], filler: u32) -> Self {
        let length = |row: &Vec<Segment>| row.iter().map(|s| s.tokens.len()).sum::<usize>();
        let (batch, len) = (rows.len(), rows.iter().map(length).max().unwrap_or(0));
        let mut out = TextBatch {
            tokens: vec![filler; batch * len],
            batch,
            len,
            targets: vec![NO_TARGET; batch * len],
            positions: vec![0; batch * len],
            segments: vec![0; batch * len],
            ..TextBatch::default()
        };
        for (i, row) in rows.iter().enumerate() {
            let mut at = i * len;
            for (number, segment) in row.iter().enumerate() {
                out.samples.push(segment.id);
                for (position, &token) in segment.tokens.iter().enumerate() {
                    out.tokens[at] = token;
                    out.positions[at] = position as u32;
                    out.segments[at] = number as u32 + 1;
                    // The last token of a segment has none to predict.
                    let learned = segment.train.is_none_or(|train| train.get(position + 1) == Some(&true));
                    if let Some(&next) = segment.tokens.get(position + 1).filter(|_| learned) {
                        out.targets[at] = next;
                        out.trained += 1;
                    }
                    at += 1;
                }
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(tokens: &[u32], first_learned: usize) -> Sample {
        Sample { tokens: tokens.to_vec(), train: (0..tokens.len()).map(|i| i >= first_learned).collect() }
    }

    fn samples() -> Vec<Sample> {
        vec![sample(&[1, 2, 9], 1), sample(&[3, 4, 5, 6, 9], 3), sample(&[7, 9], 1)]
    }

    fn set(pack: bool) -> TextSet {
        TextSet::of_samples(Made { samples: samples(), ..Made::default() }, 5, pack, 9)
    }

    const NO: u32 = NO_TARGET;

    #[test]
    fn rows_are_padded_and_the_end_is_learned_though_it_pads() {
        let batch = set(false).epoch(0, 0, false).batch(0..2).unwrap();
        assert_eq!((batch.batch, batch.len, batch.trained), (2, 5, 4));
        assert_eq!(batch.tokens, [1, 2, 9, 9, 9, 3, 4, 5, 6, 9]);
        assert_eq!(batch.targets, [2, 9, NO, NO, NO, NO, NO, 6, 9, NO]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 0, 0, 1, 2, 3, 4]);
        assert_eq!(batch.segments, [1, 1, 1, 0, 0, 1, 1, 1, 1, 1]);
        assert_eq!(batch.samples, [0, 1]);
        let last = set(false).epoch(0, 0, false).batch(2..3).unwrap();
        assert_eq!((last.len, last.tokens), (2, vec![7, 9]));
        for bad in [2..4, 1..1, 5..6] {
            assert!(set(false).epoch(0, 0, true).batch(bad).is_err());
        }
    }

    #[test]
    fn packed_samples_do_not_see_each_other() {
        let set = set(true);
        assert_eq!((set.rows(), set.tokens(), set.trained()), (2, 10, 5));
        let batch = set.epoch(0, 0, false).batch(0..2).unwrap();
        assert_eq!(batch.tokens, [1, 2, 9, 7, 9, 3, 4, 5, 6, 9]);
        assert_eq!(batch.targets, [2, 9, NO, 9, NO, NO, NO, 6, 9, NO]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 1, 0, 1, 2, 3, 4]);
        assert_eq!(batch.segments, [1, 1, 1, 2, 2, 1, 1, 1, 1, 1]);
        assert_eq!((batch.samples, batch.trained), (vec![0, 2, 1], 5));
    }

    /// Over odd sizes: every sample once, no row too long.
    #[test]
    fn packing_keeps_everything() {
        let mut random = Random::new(3, "lengths", &[]);
        for (n, room) in [(1, 7), (50, 7), (500, 33)] {
            let lengths: Vec<usize> = (0..n).map(|_| 1 + random.below(room) as usize).collect();
            let rows = first_fit(lengths.iter().copied(), room as usize);
            let mut seen: Vec<u32> = rows.concat();
            seen.sort_unstable();
            assert_eq!(seen, (0..n).collect::<Vec<u32>>());
            let used = |row: &Vec<u32>| row.iter().map(|&i| lengths[i as usize]).sum::<usize>();
            assert!(rows.iter().all(|row| used(row) <= room as usize));
            assert!(rows.len() <= 2 * lengths.iter().sum::<usize>() / room as usize + 1);
        }
    }

    #[test]
    fn an_epoch_is_an_order_of_its_own_and_repeats() {
        let many = Made { samples: (0..40).map(|i| sample(&[i, 1], 1)).collect(), ..Made::default() };
        let set = TextSet::of_samples(many, 5, false, 0);
        let order = |seed, number| set.epoch(seed, number, true).batch(0..40).unwrap().samples;
        assert_eq!(order(1, 0), order(1, 0));
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
        let mut all = order(1, 0);
        all.sort_unstable();
        assert_eq!(all, (0..40).collect::<Vec<u32>>());
    }

    #[test]
    fn windows_of_a_stream() {
        let set = TextSet::of_stream((100..117).collect(), 5, 0);
        assert_eq!((set.rows(), set.trained(), set.tokens()), (3, 12, 17));
        let eval = set.epoch(0, 0, false).batch(1..3).unwrap();
        assert_eq!(eval.tokens, (105..115).collect::<Vec<u32>>());
        assert_eq!(eval.targets, [106, 107, 108, 109, NO, 111, 112, 113, 114, NO]);
        assert!(eval.segments.iter().all(|s| *s == 1));
        let starts = |number| set.epoch(4, number, true).batch(0..3).unwrap().samples;
        assert_eq!(starts(0), starts(0));
        assert!((0..50).flat_map(starts).all(|s| s <= 12));
        assert!((0..50).flat_map(starts).any(|s| s == 12) && (0..50).flat_map(starts).any(|s| s == 0));
        // Too short for one row: what there is.
        let short = TextSet::of_stream(vec![1, 2, 3], 5, 0);
        assert_eq!((short.rows(), short.trained()), (1, 2));
        let batch = short.epoch(0, 0, true).batch(0..1).unwrap();
        assert_eq!((batch.tokens, batch.targets), (vec![1, 2, 3], vec![2, 3, NO]));
        assert!(TextSet::of_stream(vec![1], 5, 0).is_empty());
    }
}
