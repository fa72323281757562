//! Integer products of many tokens, `S[t, o] = Σ_k a[t, k] w[o, k]`: activations of 8 bits or fewer times weights of 1 to 8 bits, exact,
//! and `y[t, o] = step[t] step[o] S[t, o] + bias[o]` in floats.
//!
//! The weight stays packed ([`panels`]); a task takes one panel of 64 rows through some tokens, a block of columns at a time,
//! which it first unpacks into a buffer that stays in the first cache. A tile of up to 24 accumulators then costs one broadcast
//! for four products ([`avx512`]). Sums are of integers, and each result is made by one task: threads change nothing.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use crate::kernels::packed::isa::Isa;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod finish;
mod lines;
mod panels;
#[cfg(test)]
mod tests;
mod tokens;

use finish::{Finish, Tile, PARTIAL, SUMS, VALUES};
use lines::Line;
use panels::{Shape, Unpacking, Width, GROUP, PANEL, QUAD};

pub use tokens::{Quantizer, Tokens};

/// Quads of a block of columns: an unpacked panel of them takes 32 KB, and leaves room in a first cache of 48 KB for the tokens.
const BLOCK: usize = 128;
/// Products below which the calling thread does them all: about 20 µs of work.
const ALONE: usize = 1 << 22;
/// Tokens that a task takes at least, where there are as many: for fewer the unpacking would show.
const SHARE: usize = 48;

/// Tokens for each thread from which on each quantizes and multiplies its own, and unpacks all of the weight for them.
const OWN: usize = 96;

thread_local! {
    /// A thread's own tokens.
    static TOKENS: RefCell<Tokens> = RefCell::new(Tokens::default());
    /// An unpacked block, then the accumulators that one block hands to the next.
    static SCRATCH: RefCell<(Vec<Line>, Vec<i32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// How bytes are multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Road {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Narrow,
    #[cfg(target_arch = "x86_64")]
    Wide,
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Road {
    /// The road on an instruction set for weights of at most this magnitude.
    fn of(isa: Isa, largest: i32) -> Road {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Road::Avx512,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 if is_x86_feature_detected!("avxvnni") => Road::AvxVnni,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 if largest <= avx2::NARROW_MOST => Road::Narrow,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Road::Wide,
            _ => Road::Scalar,
        }
    }
}

/// A weight `[rows, cols]` in a layout of its own, for [`Tokens`] of `cols` codes.
///
/// Memory: as many bits a weight as its codes have (5 to 7 bits take 8), columns padded to four and rows to 16, of
/// a 2-bit weight to 64.
#[derive(Clone)]
pub struct Gemm8Weights {
    shape: Shape,
    isa: Isa,
    road: Road,
    how: Unpacking,
    lines: Vec<Line>,
    /// What the accumulators of a row start from where activations lie 128 too high.
    seeds: Vec<i32>,
    shift: u32,
    double: bool,
    zero: i32,
    unit: f32,
}

impl std::fmt::Debug for Gemm8Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gemm8Weights")
            .field("rows", &self.rows())
            .field("cols", &self.cols())
            .finish_non_exhaustive()
    }
}

impl Gemm8Weights {
    /// From rows of `cols` fields `code - lo` of `bits` bits (1 to 8), least significant bit first, every row from a byte on. Where
    /// `half`, a row's weights are `code + 1/2` and the sums are `Σ a (2 code + 1)`.
    ///
    /// None where 32 bits do not hold every possible sum (for 8-bit weights beyond 32 000 columns).
    ///
    /// Panics where the codes are not whole rows, and where the processor has not the instruction set.
    pub fn new(bits: u8, lo: i32, half: bool, cols: usize, codes: &[u8], isa: Isa) -> Option<Gemm8Weights> {
        assert!((1..=8).contains(&bits) && cols > 0, "1 to 8 bits, some columns");
        assert!(Isa::available().contains(&isa), "an instruction set of this processor");
        let row_bytes = (cols * usize::from(bits)).div_ceil(8);
        assert!(codes.len().is_multiple_of(row_bytes), "whole rows");
        let width = Width::of(bits);
        let shape = Shape { rows: codes.len() / row_bytes, cols, width };

        // Stored is `centred`, `code = centred + middle`; or, in a byte with room for it, `2 centred + 1`.
        let top = 1i32 << (bits - 1);
        let middle = lo.checked_add(top)?;
        let within = half && bits < 8;
        let written = width == Width::Eight && within;
        let value = |k: i32| if half { 2 * i64::from(k) + 1 } else { i64::from(k) };
        let largest = value(lo).abs().max(value(lo.checked_add(2 * top - 1)?).abs()).max(128);
        // Of an activation 255 at most; the accumulators hold bytes of up to 128.
        if largest * 255 * i64::try_from(cols).ok()? > i64::from(i32::MAX) {
            return None;
        }
        let lines = panels::pack(shape, |row, out| {
            let mut source = codes[row * row_bytes..(row + 1) * row_bytes].iter();
            let (mut buffer, mut filled) = (0u32, 0u8);
            for out in out {
                if filled < bits {
                    buffer |= u32::from(source.next().copied().unwrap_or(0)) << filled;
                    filled += 8;
                }
                let centred = (buffer & (2 * top as u32 - 1)) as i32 - top;
                *out = if written { 2 * centred + 1 } else { centred } as i8;
                (buffer, filled) = (buffer >> bits, filled - bits);
            }
        });

        let below = width.below() - u32::from(within && !written);
        let bound = if within { 2 * top - 1 } else { top };
        let road = Road::of(isa, bound);
        // Only where a product takes any byte may its bytes stay where they are unpacked to, at the top.
        let down = match road {
            #[cfg(target_arch = "x86_64")]
            Road::Avx512 => 0,
            _ => below,
        };
        let half_bit = if within && !written { 1 << below } else { 0 };
        let mut weights = Gemm8Weights {
            shape,
            isa,
            road,
            how: Unpacking { width, half: half_bit, down },
            lines,
            seeds: Vec::new(),
            shift: below - down,
            double: half && !within,
            zero: match (half, within) {
                (false, _) => middle,
                (true, true) => 2 * middle,
                (true, false) => 2 * middle + 1,
            },
            unit: if half { 0.5 } else { 1.0 },
        };
        weights.seeds = weights.row_sums().into_iter().map(|sum| -128 * sum).collect();
        Some(weights)
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.shape.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.shape.cols
    }

    /// Bytes of the packed weight.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.lines[..])
    }

    /// Sums of the unpacked bytes of each row.
    fn row_sums(&self) -> Vec<i32> {
        let quads = self.shape.quads();
        let mut sums = vec![0i32; self.shape.rows.next_multiple_of(GROUP)];
        sums.par_chunks_mut(PANEL).enumerate().for_each(|(panel, sums)| {
            let groups = self.shape.groups(panel);
            let mut block = vec![Line::ZERO; quads * groups];
            let packed = &self.lines[self.shape.start(panel)..self.shape.start(panel + 1)];
            self.unpack(groups, packed, &mut block);
            for (quad, lines) in block.chunks_exact(groups).enumerate() {
                // Columns that only fill up a quad may unpack to anything: their activations are zeros, without a bias.
                let cols = self.shape.cols.saturating_sub(quad * QUAD).min(QUAD);
                let codes = lines.iter().flat_map(|line| line.0.chunks_exact(QUAD));
                for (sum, codes) in sums.iter_mut().zip(codes) {
                    *sum += codes[..cols].iter().map(|&code| i32::from(code as i8)).sum::<i32>();
                }
            }
        });
        sums
    }

    fn unpack(&self, groups: usize, packed: &[Line], out: &mut [Line]) {
        match self.road {
            Road::Scalar => panels::unpack(self.how, groups, packed, out),
            // SAFETY: the constructors took a set that the processor has.
            #[cfg(target_arch = "x86_64")]
            Road::Avx512 => unsafe { avx512::unpack(self.how, groups, packed, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            _ => unsafe { avx2::unpack(self.how, groups, packed, out) },
        }
    }

    fn finish<'a>(&self, a: &'a Tokens) -> Finish<'a> {
        Finish {
            shift: self.shift,
            double: self.double,
            zero: self.zero,
            unit: self.unit,
            token_sums: &a.sums,
            token_step: &a.step,
            row_step: &[],
            bias: &[],
        }
    }

    /// The exact sums, `[tokens, rows]`: `Σ a code`, or `Σ a (2 code + 1)` on a grid of halves.
    ///
    /// Panics where the lengths do not fit.
    pub fn sums(&self, a: &Tokens, out: &mut [i32]) {
        assert!(out.len() == a.tokens * self.shape.rows, "results for tokens and rows");
        self.run::<SUMS>(a, &self.finish(a), out.as_mut_ptr());
    }

    /// `y[t, o] = step[t] step[o] Σ_k a[t, k] w[o, k] + bias[o]`, `[tokens, rows]`; `step[t]` is the tokens' own, and `bias` may be
    /// empty. The sum is exact; it, the product of the steps, their product and the sum with the bias are rounded once each.
    ///
    /// Panics where the lengths do not fit.
    pub fn product(&self, a: &Tokens, step: &[f32], bias: &[f32], y: &mut [f32]) {
        self.fits(a.tokens, step, bias, y);
        let finish = Finish { row_step: step, bias, ..self.finish(a) };
        self.run::<VALUES>(a, &finish, y.as_mut_ptr().cast());
    }

    /// [`Tokens::quantize`] and [`Gemm8Weights::product`] in one, so that threads meet once: `x` are `tokens` of `cols` elements,
    /// `stride` apart.
    ///
    /// Panics as those do.
    #[allow(clippy::too_many_arguments)]
    pub fn product_of(
        &self,
        x: &[f32],
        tokens: usize,
        stride: usize,
        how: Quantizer,
        step: &[f32],
        bias: &[f32],
        y: &mut [f32],
    ) {
        let (rows, cols) = (self.shape.rows, self.shape.cols);
        let share = tokens.div_ceil(rayon::current_num_threads());
        if share == tokens || share < OWN || rows == 0 {
            return self.product(&Tokens::quantize(x, tokens, cols, stride, how, self.isa), step, bias, y);
        }
        self.fits(tokens, step, bias, y);
        assert!(cols <= stride && x.len() >= (tokens - 1) * stride + cols, "x holds the tokens");
        y.par_chunks_mut(share * rows).enumerate().for_each(|(i, y)| {
            let (first, tokens) = (i * share, y.len() / rows);
            TOKENS.with_borrow_mut(|a| {
                a.requantize(&x[first * stride..], (first, tokens), cols, stride, how, self.isa);
                let finish = Finish { row_step: step, bias, ..self.finish(a) };
                for panel in 0..self.shape.panels() {
                    self.task::<VALUES>(panel, 0..tokens, a, &finish, y.as_mut_ptr().cast());
                }
            });
        });
    }

    fn fits(&self, tokens: usize, step: &[f32], bias: &[f32], y: &[f32]) {
        assert!(step.len() == self.shape.rows, "a step for each row");
        assert!(bias.is_empty() || bias.len() == self.shape.rows, "a bias for each row");
        assert!(y.len() == tokens * self.shape.rows, "results for tokens and rows");
    }

    /// `out` has room for `tokens` times `rows` results.
    fn run<const MODE: u8>(&self, a: &Tokens, finish: &Finish, out: *mut i32) {
        /// A place that tasks write different parts of.
        struct Place(*mut i32);
        // SAFETY: each task writes the results of its own tokens and rows only.
        unsafe impl Sync for Place {}
        impl Place {
            fn get(&self) -> *mut i32 {
                self.0
            }
        }

        assert!(a.cols == self.shape.cols, "tokens of {} codes for {} columns", a.cols, self.shape.cols);
        let (tokens, panels) = (a.tokens, self.shape.panels());
        if tokens == 0 || panels == 0 {
            return;
        }
        let place = Place(out);
        let threads = rayon::current_num_threads();
        if threads == 1 || tokens * self.shape.rows * self.shape.cols < ALONE {
            (0..panels).for_each(|panel| self.task::<MODE>(panel, 0..tokens, a, finish, out));
            return;
        }
        // Panels alone may be too few to share out evenly.
        let shares = (4 * threads).div_ceil(panels).min(tokens.div_ceil(SHARE));
        let share = tokens.div_ceil(shares).next_multiple_of(6);
        let shares = tokens.div_ceil(share);
        (0..panels * shares).into_par_iter().with_max_len(1).for_each(|task| {
            let start = task % shares * share;
            self.task::<MODE>(task / shares, start..(start + share).min(tokens), a, finish, place.get());
        });
    }

    /// The results of a panel's rows for some tokens; `out` is those of all tokens and rows.
    fn task<const MODE: u8>(
        &self,
        panel: usize,
        tokens: Range<usize>,
        a: &Tokens,
        finish: &Finish,
        out: *mut i32,
    ) {
        let (shape, row) = (self.shape, panel * PANEL);
        let groups = shape.groups(panel);
        let quads = shape.quads();
        let packed = &self.lines[shape.start(panel)..shape.start(panel + 1)];
        let unseeded = [0i32; PANEL];
        let seeds = if a.bias == 0 { &unseeded[..] } else { &self.seeds[row..] };
        SCRATCH.with_borrow_mut(|(block, partial)| {
            let wide = groups * GROUP;
            if shape.width != Width::Eight && block.len() < BLOCK * groups {
                block.resize(BLOCK * groups, Line::ZERO);
            }
            if quads > BLOCK && partial.len() < tokens.len() * wide {
                partial.resize(tokens.len() * wide, 0);
            }
            for start in (0..quads).step_by(BLOCK) {
                let count = BLOCK.min(quads - start);
                let packed =
                    &packed[shape.width.lines(start, groups)..shape.width.lines(start + count, groups)];
                let lines = match shape.width {
                    Width::Eight => packed,
                    _ => {
                        let lines = &mut block[..count * groups];
                        self.unpack(groups, packed, lines);
                        &*lines
                    }
                };
                let last = start + count == quads;
                let mut t = tokens.start;
                while t < tokens.end {
                    let line = t * a.lines_each;
                    let carried = (t - tokens.start) * wide;
                    let (init, init_stride) = match start {
                        0 => (seeds.as_ptr(), 0),
                        _ => (partial[carried..].as_ptr(), wide),
                    };
                    let (out, out_stride) = match last {
                        // SAFETY: results of all tokens and rows are there.
                        true => (unsafe { out.add(t * shape.rows + row) }, shape.rows),
                        false => (partial[carried..].as_mut_ptr(), wide),
                    };
                    let tile = Tile {
                        a: lines::bytes(&a.lines[line..])[start * QUAD..].as_ptr(),
                        a_stride: a.lines_each * Line::BYTES,
                        w: lines.as_ptr().cast(),
                        quads: count,
                        init,
                        init_stride,
                        token: t,
                        row,
                        rows: (shape.rows - row).min(PANEL),
                        out,
                        out_stride,
                        finish,
                    };
                    let left = tokens.end - t;
                    // SAFETY: tokens from `t` on are `left`, each of `quads` quads in its lines; `lines` are `count` quads of
                    // `groups`; seeds, carried sums and results are those of the tile.
                    t += unsafe {
                        match last {
                            true => self.tile::<MODE>(&tile, left, groups),
                            false => self.tile::<PARTIAL>(&tile, left, groups),
                        }
                    };
                }
            }
        });
    }

    /// Runs as many of `left` tokens as a tile takes.
    ///
    /// # Safety
    ///
    /// As [`finish::scalar`] for `left` tokens.
    unsafe fn tile<const MODE: u8>(&self, tile: &Tile, left: usize, groups: usize) -> usize {
        // SAFETY: the caller's word, and the constructors took a road that the processor has, for weights as they are.
        unsafe {
            match self.road {
                Road::Scalar => {
                    finish::scalar::<MODE>(tile, left, groups);
                    left
                }
                #[cfg(target_arch = "x86_64")]
                Road::Narrow => avx2::tile::<MODE, { avx2::NARROW }>(tile, left, groups),
                #[cfg(target_arch = "x86_64")]
                Road::Wide => avx2::tile::<MODE, { avx2::WIDE }>(tile, left, groups),
                #[cfg(target_arch = "x86_64")]
                Road::AvxVnni => avx2::tile_vnni::<MODE>(tile, left, groups),
                #[cfg(target_arch = "x86_64")]
                Road::Avx512 => avx512::tile::<MODE>(tile, left, groups),
            }
        }
    }
}
