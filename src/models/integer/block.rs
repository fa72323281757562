//! Blocks on integers: what tokens do on their own goes from codes to codes by blocks of tokens, into the next
//! block of the model too; they wait for each other where keys and values are complete.

use std::cell::RefCell;

use rayon::prelude::*;

use super::attention::{cut, product, room, Head, IntegerAttention, Meeting, MeetingPart, Scratch};
use super::layer::{Layer, Norm, Quantizer};
use super::See;
use crate::kernels::packed::edges::{self, Affine};
use crate::kernels::packed::Isa;
use crate::models::attention::Attention;
use crate::models::nn::LayerNorm;
use crate::models::vit::Mlp;
use crate::Result;

/// Tokens that a task takes through a layer, of few and of many, about: enough to be worth reading the weights for, few
/// enough that an image falls into a task for each of several cores.
const TOKENS: [usize; 2] = [24, 48];
/// What is many.
pub(super) const MANY: usize = 1024;

thread_local! {
    /// A thread's buffers, kept from task to task: fresh memory costs as much as what is done with it.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// A block of a vision transformer whose products are all of integers.
#[derive(Debug)]
pub(in crate::models) struct IntegerBlock {
    norm_before: Norm,
    attention: IntegerAttention,
    norm_after: Norm,
    up_in: Quantizer,
    up: Layer,
    down_in: Quantizer,
    down: Layer,
    isa: Isa,
}

impl IntegerBlock {
    /// Of a block's parts; none where one of them is not on integers.
    pub fn of(
        norms: [&LayerNorm; 2],
        attention: &Attention,
        mlp: &Mlp,
        width: usize,
        isa: Isa,
    ) -> Result<Option<Self>> {
        let (Some(norm_before), Some(norm_after)) = (Norm::of(norms[0], width)?, Norm::of(norms[1], width)?)
        else {
            return Ok(None);
        };
        let Some(attention) = IntegerAttention::of(attention, width, isa)? else { return Ok(None) };
        let Some(up_in) = Quantizer::of(&mlp.up_in, width)? else { return Ok(None) };
        let Some(up) = Layer::of(&mlp.up, &up_in, isa)? else { return Ok(None) };
        let Some(down_in) = Quantizer::of(&mlp.down_in, up.matrix.rows())? else { return Ok(None) };
        let Some(down) = Layer::of(&mlp.down, &down_in, isa)? else { return Ok(None) };
        if !up_in.by_token(1) || !down_in.by_token(1) || down.matrix.rows() != width {
            return Ok(None);
        }
        Ok(Some(IntegerBlock { norm_before, attention, norm_after, up_in, up, down_in, down, isa }))
    }

    /// Whether its quantizers were calibrated for so many tokens.
    pub fn takes(&self, tokens: usize) -> bool {
        let mlp = [&self.up_in, &self.down_in].into_iter().filter_map(Quantizer::tokens);
        mlp.chain(self.attention.tokens()).all(|calibrated| calibrated == tokens)
    }

    /// The output of `blocks`, one after the other, for the residual stream `x [batch, tokens, width]`, with
    /// [`IntegerBlock::takes`] tokens and one width in all; `see` is shown the codes behind each tap.
    pub fn forward(blocks: &[&IntegerBlock], x: &[f32], tokens: usize, see: See<'_>) -> Vec<f32> {
        let mut y = x.to_vec();
        let Some(width) = blocks.first().map(|first| first.width()) else { return y };
        assert!(tokens > 0 && x.len().is_multiple_of(tokens * width), "integer block: rows of {width}");
        assert!(blocks.iter().all(|block| block.width() == width), "integer blocks of one width");
        let entry = tokens * width;
        let (batch, threads) = (x.len() / entry, rayon::current_num_threads());
        // Where every thread has entries of its own, none waits for another before the end.
        if batch >= 4 * threads || (batch > 0 && batch.is_multiple_of(threads)) {
            y.par_chunks_mut(entry)
                .with_max_len(1)
                .enumerate()
                .for_each(|(first, y)| Walk { tokens, first, alone: true }.run(blocks, y, see));
        } else {
            Walk { tokens, first: 0, alone: false }.run(blocks, &mut y, see);
        }
        y
    }

    /// Columns of the residual stream.
    pub fn width(&self) -> usize {
        self.norm_before.weight.len()
    }

    /// Queries, keys and values of the rows `x`, the first of them token `first` of its entry and `row` of all.
    fn project(
        &self,
        x: &[f32],
        part: MeetingPart<'_>,
        (first, row): (usize, usize),
        scratch: &mut Scratch,
        see: See<'_>,
    ) {
        self.normalize(&self.norm_before, &self.attention.input, x, first, scratch);
        see("input", row, scratch.codes.view());
        let Scratch { sums, codes, .. } = scratch;
        self.attention.project(codes.view(), sums, part, (first, row), see);
    }

    /// The codes of normalized rows, into the scratch.
    fn normalize(&self, norm: &Norm, to: &Quantizer, x: &[f32], first: usize, scratch: &mut Scratch) {
        let width = norm.weight.len();
        let Scratch { codes, row, .. } = scratch;
        codes.reset(x.len() / width, width, to.lo);
        let row = room(row, width);
        for (t, x) in x.chunks_exact(width).enumerate() {
            let (rounding, (out, sum)) = (to.rounding(first + t, 0, 0), codes.row_mut(t, 0..width));
            *sum = edges::normalize(self.isa, x, &norm.weight, &norm.bias, norm.eps, &rounding, row, out);
        }
    }

    /// The first layer of the MLP and its GELU, from the scratch's codes to codes.
    fn widen(&self, first: usize, scratch: &mut Scratch) {
        let Scratch { codes, sums, row, .. } = scratch;
        let (count, width) = (codes.view().tokens, self.up.matrix.rows());
        let row = room(row, width);
        let up = product(&self.up, codes.view(), sums);
        codes.reset(count, width, self.down_in.lo);
        for (t, up) in up.chunks_exact(self.up.matrix.stride()).enumerate() {
            let affine = affine(&self.up, &self.up_in, first + t);
            let (out, sum) = codes.row_mut(t, 0..width);
            let rounding = self.down_in.rounding(first + t, 0, 0);
            *sum = edges::gelu(self.isa, up, &affine, &rounding, row, out);
        }
    }

    /// Adds a layer behind the scratch's codes, which `from` made, onto `y`.
    fn add(&self, layer: &Layer, from: &Quantizer, first: usize, scratch: &mut Scratch, y: &mut [f32]) {
        let sums = product(layer, scratch.codes.view(), &mut scratch.sums);
        let width = layer.matrix.rows();
        for (t, (y, sums)) in
            y.chunks_exact_mut(width).zip(sums.chunks_exact(layer.matrix.stride())).enumerate()
        {
            edges::accumulate(self.isa, sums, &affine(layer, from, first + t), y);
        }
    }
}

/// Entries on their way through blocks.
struct Walk {
    /// Of each entry.
    tokens: usize,
    /// Which of all the first entry is.
    first: usize,
    /// Whether all is done by the thread that asks.
    alone: bool,
}

impl Walk {
    /// `work` for each item.
    fn each<T: Send>(&self, items: Vec<T>, work: impl Fn(T) + Sync + Send) {
        match self.alone {
            true => items.into_iter().for_each(work),
            false => items.into_par_iter().with_max_len(1).for_each(work),
        }
    }

    /// Takes `y [entries, tokens, width]` through the blocks.
    fn run(&self, blocks: &[&IntegerBlock], y: &mut [f32], see: See<'_>) {
        let Some(first) = blocks.first() else { return };
        let (tokens, width, heads) = (self.tokens, first.width(), first.attention.heads());
        let rows = y.len() / width;
        let batch = rows / tokens;
        // Of one size, since a task of a few tokens that are left costs nearly what a whole one does.
        let about = TOKENS[usize::from(self.alone || rows > MANY)];
        let block = tokens.div_ceil(((tokens + about / 2) / about).max(1));
        // (entry, first token, tokens) of each task.
        let places: Vec<(usize, usize, usize)> = (0..batch)
            .flat_map(|entry| (0..tokens).step_by(block).map(move |t| (entry, t, block.min(tokens - t))))
            .collect();
        // Two, since what the next block's tokens meet with is made while those of this block still meet.
        let (mut meeting, mut coming) = (Meeting::default(), Meeting::default());
        first.attention.make_room(&mut meeting, batch, tokens);
        let parts = first.attention.parts(&mut meeting, tokens, block);
        let x = &*y;
        self.each(places.iter().copied().zip(parts).collect(), |((entry, from, count), part)| {
            let row = entry * tokens + from;
            let x = &x[row * width..(row + count) * width];
            let seen = self.first * tokens + row;
            SCRATCH.with_borrow_mut(|scratch| first.project(x, part, (from, seen), scratch, see));
        });
        for (i, this) in blocks.iter().enumerate() {
            // Keys and values of a head together, where there are too few heads for the threads.
            let together = !self.alone && batch * heads < 4 * rayon::current_num_threads();
            let head = |i: usize| this.attention.head(&meeting, (i / heads, i % heads), tokens, together);
            let met: Vec<Head> = match self.alone {
                true => (0..batch * heads).map(head).collect(),
                false => (0..batch * heads).into_par_iter().with_max_len(1).map(head).collect(),
            };
            let next = blocks.get(i + 1);
            let mut parts: Vec<Option<MeetingPart>> = match next {
                None => Vec::new(),
                Some(next) => {
                    next.attention.make_room(&mut coming, batch, tokens);
                    next.attention.parts(&mut coming, tokens, block).into_iter().map(Some).collect()
                }
            };
            parts.resize_with(places.len(), || None);
            let out: Vec<&mut [f32]> = cut(y, width, tokens, block).collect();
            let items = places.iter().copied().zip(out).zip(parts).collect();
            self.each(items, |((place, y), part)| {
                SCRATCH.with_borrow_mut(|scratch| {
                    let (entry, from, _) = place;
                    let row = (self.first + entry) * tokens + from;
                    let met = &met[entry * heads..(entry + 1) * heads];
                    this.attention.mix(&meeting, met, place, self.first, scratch, see);
                    see("context", row, scratch.codes.view());
                    this.add(&this.attention.output, &this.attention.context, from, scratch, y);
                    this.normalize(&this.norm_after, &this.up_in, y, from, scratch);
                    see("up", row, scratch.codes.view());
                    this.widen(from, scratch);
                    see("down", row, scratch.codes.view());
                    this.add(&this.down, &this.down_in, from, scratch, y);
                    // What these tokens do next on their own needs no other's.
                    if let (Some(next), Some(part)) = (next, part) {
                        next.project(y, part, (from, row), scratch, see);
                    }
                })
            });
            std::mem::swap(&mut meeting, &mut coming);
        }
    }
}

/// How a product of codes that `from` made becomes floats.
fn affine<'a>(layer: &'a Layer, from: &Quantizer, token: usize) -> Affine<'a> {
    Affine { step: from.step(token, 0), unit: layer.matrix.unit(), bias: &layer.bias }
}
