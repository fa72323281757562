//! Attention on integers: logits and mixed values are sums of codes.
//!
//! With the codes `a` of a query (or, reparameterized, of the input) and `k` of a key, the logit is
//!
//! ```text
//! scale ((s_a[n] a + β_a) . s_k[m] k) = s_a[n] (scale s_k[m]) Σ a k + scale s_k[m] Σ β_a k
//! ```
//!
//! the second term a number for each key; what a key's quantizer adds is the same for all keys of a query and
//! falls out of the softmax. With codes `p` of the probabilities and `v` of the values, the context is
//! `s_p[n] (s_v[c] Σ p v + β_v[c] Σ p)`.

use super::layer::{frozen, Layer, Quantizer};
use super::See;
use crate::kernels::packed::edges::{self, Affine};
use crate::kernels::packed::{code_stride, codes_len, CodeMatrix, Codes, CodesRef, Elements, Isa};
use crate::models::attention::{Attention, Scores};
use crate::Result;

/// How logits come about.
#[derive(Debug)]
enum Logits {
    Separate {
        query: Box<Layer>,
        query_out: Box<Quantizer>,
    },
    /// `r` of all heads in a row, where the query's bias is kept.
    Product {
        bias: Option<Vec<f32>>,
    },
}

/// The attention of a block.
#[derive(Debug)]
pub(super) struct IntegerAttention {
    pub input: Quantizer,
    logits: Logits,
    key: Layer,
    key_out: Quantizer,
    value: Layer,
    value_out: Quantizer,
    value_step: Vec<f32>,
    value_shift: Vec<f32>,
    softmax: Quantizer,
    pub context: Quantizer,
    pub output: Layer,
    heads: usize,
    scale: f32,
    isa: Isa,
}

/// The codes that the tokens of a batch meet each other with: rows of `[batch, tokens]`.
#[derive(Default)]
pub(super) struct Meeting {
    /// Queries, or the input.
    left: Vec<u8>,
    key: Vec<u8>,
    value: Vec<u8>,
    /// What each key adds to its logits, by head.
    bias: Vec<f32>,
}

/// The part of a [`Meeting`] that belongs to some tokens.
pub(super) struct MeetingPart<'a> {
    left: &'a mut [u8],
    key: &'a mut [u8],
    value: &'a mut [u8],
    bias: &'a mut [f32],
}

/// Keys and values of one head as right operands.
pub(super) struct Head {
    key: CodeMatrix,
    value: CodeMatrix,
    /// For each key what a whole number of its logits is worth, and what is added to them; filled up with none.
    unit: Vec<f32>,
    bias: Vec<f32>,
}

impl IntegerAttention {
    /// Of an attention over `width` columns; none where the integer road can not take it.
    pub fn of(attention: &Attention, width: usize, isa: Isa) -> Result<Option<Self>> {
        let heads = attention.heads;
        let Some(input) = Quantizer::of(&attention.input, width)? else { return Ok(None) };
        let (key, key_tap, key_width) = match &attention.scores {
            Scores::Separate { key, key_out, .. } => (key, key_out, width),
            Scores::Product { qk, out, .. } => (qk, out, heads * width),
        };
        let logits = match &attention.scores {
            Scores::Separate { query, query_out, .. } => {
                let Some(query_out) = Quantizer::of(query_out, width)? else { return Ok(None) };
                let Some(query) = Layer::of(query, &input, isa)? else { return Ok(None) };
                if !query_out.by_token(1) || query.matrix.rows() != width {
                    return Ok(None);
                }
                Logits::Separate { query: Box::new(query), query_out: Box::new(query_out) }
            }
            Scores::Product { bias, .. } => {
                let bias = match bias {
                    None => None,
                    Some(bias) => match frozen(bias)?.filter(|r| r.len() == key_width) {
                        None => return Ok(None),
                        found => found,
                    },
                };
                Logits::Product { bias }
            }
        };
        let groups = if let Logits::Product { .. } = logits { heads } else { 1 };
        let (Some(key_out), Some(value_out), Some(softmax), Some(context)) = (
            Quantizer::of(key_tap, key_width)?,
            Quantizer::of(&attention.value_out, width)?,
            // Its columns are keys, which it knows nothing of.
            Quantizer::of(&attention.softmax_out, 0)?,
            Quantizer::of(&attention.context, width)?,
        ) else {
            return Ok(None);
        };
        let (Some(key), Some(value), Some(output)) = (
            Layer::of(key, &input, isa)?,
            Layer::of(&attention.value, &input, isa)?,
            Layer::of(&attention.output, &context, isa)?,
        ) else {
            return Ok(None);
        };
        let Some(value_step) = value_out.columns() else { return Ok(None) };
        let sizes = (key.matrix.rows(), value.matrix.rows(), output.matrix.rows());
        let steps = input.by_token(1) && key_out.by_token(groups) && context.by_token(1);
        let bytes = key_out.signed_bytes() && value_out.signed_bytes();
        if sizes != (key_width, width, width) || !steps || !bytes || softmax.lo != 0 {
            return Ok(None);
        }
        Ok(Some(IntegerAttention {
            value_shift: value_out.shift_out.clone().unwrap_or_else(|| vec![0.0; width]),
            input,
            logits,
            key,
            key_out,
            value,
            value_out,
            value_step,
            softmax,
            context,
            output,
            heads,
            scale: attention.scale as f32,
            isa,
        }))
    }

    fn width(&self) -> usize {
        self.value_step.len()
    }

    /// Columns of a head's query and key.
    fn depth(&self) -> usize {
        self.key_out.shift_in.len() / self.heads
    }

    /// The numbers of tokens that quantizers were calibrated for.
    pub fn tokens(&self) -> impl Iterator<Item = usize> + '_ {
        let query = match &self.logits {
            Logits::Separate { query_out, .. } => Some(query_out.as_ref()),
            Logits::Product { .. } => None,
        };
        let all = [&self.input, &self.key_out, &self.value_out, &self.softmax, &self.context];
        all.into_iter().chain(query).filter_map(Quantizer::tokens)
    }

    /// Room for what `tokens` tokens of `batch` entries meet with.
    pub fn make_room(&self, meeting: &mut Meeting, batch: usize, tokens: usize) {
        let (width, depth) = (self.width(), self.key_out.shift_in.len());
        meeting.left.resize(codes_len(batch * tokens, width), 0);
        meeting.key.resize(codes_len(batch * tokens, depth), 0);
        meeting.value.resize(codes_len(batch * tokens, width), 0);
        meeting.bias.resize(batch * tokens * self.heads, 0.0);
    }

    /// A meeting's parts, by entry and `block` tokens.
    pub fn parts<'a>(&self, meeting: &'a mut Meeting, tokens: usize, block: usize) -> Vec<MeetingPart<'a>> {
        let (wide, deep) = (code_stride(self.width()), code_stride(self.key_out.shift_in.len()));
        let rows = meeting.bias.len() / self.heads;
        let left = cut(&mut meeting.left[..rows * wide], wide, tokens, block);
        let key = cut(&mut meeting.key[..rows * deep], deep, tokens, block);
        let value = cut(&mut meeting.value[..rows * wide], wide, tokens, block);
        let bias = cut(&mut meeting.bias, self.heads, tokens, block);
        let all = left.zip(key).zip(value).zip(bias);
        all.map(|(((left, key), value), bias)| MeetingPart { left, key, value, bias }).collect()
    }

    /// Queries, keys and values of the tokens with the input codes `x`, the first of them token `first` of its
    /// entry and `row` of all.
    pub fn project(
        &self,
        x: CodesRef<'_>,
        sums: &mut Vec<i32>,
        part: MeetingPart<'_>,
        (first, row): (usize, usize),
        see: See<'_>,
    ) {
        let (width, depth, isa) = (self.width(), self.depth(), self.isa);
        let (wide, deep) = (code_stride(width), code_stride(depth * self.heads));
        if let Logits::Separate { query, query_out } = &self.logits {
            let q = product(query, x, sums);
            for (t, (q, out)) in
                q.chunks_exact(query.matrix.stride()).zip(part.left.chunks_exact_mut(wide)).enumerate()
            {
                let rounding = query_out.rounding(first + t, 0, 0);
                edges::requantize(isa, q, &self.affine(query, first + t), &rounding, &mut out[..width]);
            }
            see("query", row, CodesRef::new(part.left, wide, x.tokens, width, query_out.lo));
        } else {
            for (t, out) in part.left.chunks_exact_mut(wide).enumerate() {
                out[..width].copy_from_slice(x.row(t));
            }
        }
        let k = product(&self.key, x, sums);
        for (t, (k, out)) in
            k.chunks_exact(self.key.matrix.stride()).zip(part.key.chunks_exact_mut(deep)).enumerate()
        {
            let affine = self.affine(&self.key, first + t);
            let heads = k[..depth * self.heads].chunks_exact(depth).zip(out.chunks_exact_mut(depth));
            for (h, (k, out)) in heads.enumerate() {
                let at = h * depth;
                let affine = Affine { unit: &affine.unit[at..], bias: &affine.bias[at..], step: affine.step };
                edges::requantize(isa, k, &affine, &self.key_out.rounding(first + t, self.group(h), at), out);
            }
        }
        see("key", row, CodesRef::new(part.key, deep, x.tokens, depth * self.heads, self.key_out.lo));
        for (t, (key, bias)) in
            part.key.chunks_exact(deep).zip(part.bias.chunks_exact_mut(self.heads)).enumerate()
        {
            for (h, bias) in bias.iter_mut().enumerate() {
                *bias = self.scale * self.key_bias(x.row(t), &key[h * depth..(h + 1) * depth], first + t, h);
            }
        }
        let v = product(&self.value, x, sums);
        for (t, (v, out)) in
            v.chunks_exact(self.value.matrix.stride()).zip(part.value.chunks_exact_mut(wide)).enumerate()
        {
            let Quantizer { lo, hi, shift_in, .. } = &self.value_out;
            let affine = self.affine(&self.value, first + t);
            edges::requantize_columns(
                isa,
                v,
                &affine,
                shift_in,
                &self.value_step,
                *lo,
                *hi,
                &mut out[..width],
            );
        }
        see("value", row, CodesRef::new(part.value, wide, x.tokens, width, self.value_out.lo));
    }

    /// How a product of the input becomes floats.
    fn affine<'a>(&self, layer: &'a Layer, token: usize) -> Affine<'a> {
        Affine { step: self.input.step(token, 0), unit: layer.matrix.unit(), bias: &layer.bias }
    }

    /// Which of a token's steps a head of the key has.
    fn group(&self, head: usize) -> usize {
        if let Logits::Product { .. } = self.logits {
            head
        } else {
            0
        }
    }

    /// What a key, of token `m` with input codes `x`, adds to its logits in a head, before the scale.
    fn key_bias(&self, x: &[u8], key: &[u8], m: usize, head: usize) -> f32 {
        let depth = self.depth();
        let (added, bias) = match &self.logits {
            Logits::Separate { query_out, .. } => {
                (query_out.shift_out.as_ref().map(|shift| &shift[head * depth..(head + 1) * depth]), None)
            }
            Logits::Product { bias } => (self.input.shift_out.as_deref(), bias.as_ref()),
        };
        let mut sum = 0.0;
        if let Some(added) = added {
            sum +=
                self.key_out.step(m, self.group(head)) * edges::weigh(self.isa, key, self.key_out.lo, added);
        }
        if let Some(r) = bias {
            // What the input's quantizer adds is the same for all keys.
            let r = &r[head * depth..(head + 1) * depth];
            sum += self.input.step(m, 0) * edges::weigh(self.isa, x, self.input.lo, r);
        }
        sum
    }

    /// A head of an entry, ready to be met; its keys and values are made `together`, or one after the other.
    pub fn head(
        &self,
        meeting: &Meeting,
        (entry, head): (usize, usize),
        tokens: usize,
        together: bool,
    ) -> Head {
        let (width, depth) = (self.width(), self.depth());
        let (wide, deep) = (code_stride(width), code_stride(depth * self.heads));
        let channels = width / self.heads;
        let fields = &meeting.key[entry * tokens * deep + head * depth..];
        let key = Elements { fields, rs: deep, cs: 1, lo: self.key_out.lo };
        let fields = &meeting.value[entry * tokens * wide + head * channels..];
        let value = Elements { fields, rs: 1, cs: wide, lo: self.value_out.lo };
        let bias = &meeting.bias[entry * tokens * self.heads..(entry + 1) * tokens * self.heads];
        let key = || CodeMatrix::of_codes(tokens, depth, key, self.isa);
        let value = || CodeMatrix::of_codes(channels, tokens, value, self.isa);
        let (key, value) = if together { rayon::join(key, value) } else { (key(), value()) };
        let mut unit: Vec<f32> =
            (0..tokens).map(|m| self.scale * self.key_out.step(m, self.group(head))).collect();
        let mut bias: Vec<f32> = bias.iter().skip(head).step_by(self.heads).copied().collect();
        unit.resize(key.stride(), 0.0);
        bias.resize(key.stride(), f32::NEG_INFINITY);
        Head { key, value, unit, bias }
    }

    /// The codes of the context of `count` queries from `first` on of an entry with these heads.
    pub fn mix(
        &self,
        meeting: &Meeting,
        heads: &[Head],
        (entry, first, count): (usize, usize, usize),
        entries_before: usize,
        scratch: &mut Scratch,
        see: See<'_>,
    ) {
        let (width, isa) = (self.width(), self.isa);
        let (wide, channels) = (code_stride(width), width / self.heads);
        let Scratch { sums, row, codes, probabilities } = scratch;
        codes.reset(count, width, self.context.lo);
        for (h, head) in heads.iter().enumerate() {
            let tokens = head.key.rows();
            let (query, at) = match &self.logits {
                Logits::Separate { query_out, .. } => (query_out.as_ref(), h * self.depth()),
                Logits::Product { .. } => (&self.input, 0),
            };
            let fields = &meeting.left[(entry * tokens + first) * wide + at..];
            let left = CodesRef::new(fields, wide, count, self.depth(), query.lo);
            let logits = room(sums, count * head.key.stride());
            head.key.sums(left, logits);
            probabilities.reset(count, tokens, 0);
            let row = room(row, head.key.stride());
            for (t, logits) in logits.chunks_exact(head.key.stride()).enumerate() {
                let (n, (out, total)) = (first + t, probabilities.filled_row_mut(t, logits.len()));
                let rounding = self.softmax.rounding(n, 0, 0);
                *total = edges::softmax(
                    isa,
                    logits,
                    query.step(n, 0),
                    &head.unit,
                    &head.bias,
                    &rounding,
                    row,
                    out,
                );
            }
            let row = ((entries_before + entry) * self.heads + h) * tokens + first;
            see("softmax", row, probabilities.view());
            let mixed = room(sums, count * head.value.stride());
            head.value.sums(probabilities.view(), mixed);
            let columns = h * channels..(h + 1) * channels;
            let (unit, shift) = (&self.value_step[columns.clone()], &self.value_shift[columns.clone()]);
            for (t, (sums, &total)) in
                mixed.chunks_exact(head.value.stride()).zip(probabilities.view().sums).enumerate()
            {
                let rounding = self.context.rounding(first + t, 0, columns.start);
                let (out, sum) = codes.row_mut(t, columns.clone());
                *sum += edges::mix(
                    isa,
                    sums,
                    self.softmax.step(first + t, 0),
                    total,
                    unit,
                    shift,
                    &rounding,
                    out,
                );
            }
        }
    }

    /// Heads of each entry.
    pub fn heads(&self) -> usize {
        self.heads
    }
}

/// Buffers of a task.
#[derive(Default)]
pub(super) struct Scratch {
    pub sums: Vec<i32>,
    pub row: Vec<f32>,
    pub codes: Codes,
    pub probabilities: Codes,
}

/// The whole sums of a layer behind codes.
pub(super) fn product<'a>(layer: &Layer, x: CodesRef<'_>, sums: &'a mut Vec<i32>) -> &'a [i32] {
    let sums = room(sums, x.tokens * layer.matrix.stride());
    layer.matrix.sums(x, sums);
    sums
}

/// So many elements of a buffer, which is only ever made longer.
pub(super) fn room<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
    &mut buffer[..len]
}

/// Rows `size` long, by entries of `tokens` rows and `block` of these.
pub(super) fn cut<T>(
    all: &mut [T],
    size: usize,
    tokens: usize,
    block: usize,
) -> impl Iterator<Item = &mut [T]> {
    all.chunks_mut(tokens * size).flat_map(move |entry| entry.chunks_mut(block * size))
}
