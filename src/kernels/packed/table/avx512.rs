//! AVX512: three weights a byte, 64 rows a look-up.
//!
//! What the processor does for three panels of 64 rows, six tokens and three columns: 18 `vpermb`, 18 byte
//! additions, 3 loads of weights and 6 of tables. The bytes are widened once in a block of 48 columns.

use super::digits::{BLOCK, MAX_BLOCKS, SUMS, TRIPLES};
use super::{Activations, Out, TableWeights, Task};
use std::arch::x86_64::*;
use std::cell::Cell;

/// Rows that a look-up takes.
pub(super) const PANEL: usize = 64;
/// Tokens of a tile.
pub(super) const TOKENS: usize = 6;
/// Panels of a tile.
const PANELS: usize = 3;
/// Triples of columns in a block: column `m` with `m + 16` and `m + 32`.
const STEPS: usize = BLOCK / 3;
/// Bytes of a block of one panel.
const PANEL_BLOCK: usize = STEPS * PANEL;

/// Sums of 64 rows in 16 bits: of everything, an odd byte counting 256 times, and of the odd bytes.
type Sums = [__m512i; 2];

/// What a block of tokens looks like to the kernel. Kept from task to task: fresh memory costs more than the packing.
#[derive(Default)]
struct Packed {
    /// Where in `TRIPLES` the table of a triple lies, in bytes: `[tiles, blocks, tokens of the tile, 16]`.
    tables: Vec<[u16; STEPS]>,
    /// For each token what it adds to its sums beside the tables.
    offset: Vec<i32>,
    /// For each token its step, or NaN.
    step: Vec<f32>,
}

thread_local! {
    static PACKED: Cell<Packed> = Cell::default();
}

/// `[panels, blocks, 16, 64]`: in a panel byte `2 q` is row `q` and byte `2 q + 1` row `32 + q`, so that the even bytes,
/// and the odd ones, widen to rows in their order.
pub(super) fn lay_out(rows: usize, blocks: usize, digit: impl Fn(usize, usize) -> u8) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(rows.next_multiple_of(PANEL) * blocks * STEPS);
    for panel in 0..rows.div_ceil(PANEL) {
        for step in 0..blocks * STEPS {
            let col = step / STEPS * BLOCK + step % STEPS;
            bytes.extend((0..PANEL).map(|byte| {
                let row = panel * PANEL + byte / 2 + byte % 2 * 32;
                digit(row, col) | digit(row, col + 16) << 2 | digit(row, col + 32) << 4
            }));
        }
    }
    bytes
}

/// Multiplies a block of tokens.
///
/// # Safety
/// The processor has AVX512 F, BW, VL, DQ and VBMI; `w` was laid out by [`lay_out`]; the slices of `task` have the
/// lengths that `TableWeights::check` asserts.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
pub(super) unsafe fn block(w: &TableWeights, task: &mut Task) {
    let mut packed = PACKED.take();
    packed.tables.resize(task.tokens.len() * w.blocks, [0; STEPS]);
    packed.offset.clear();
    packed.step.clear();
    let tokens = task.tokens.len();
    for local in 0..tokens {
        let tile = local / TOKENS * TOKENS;
        let width = TOKENS.min(tokens - tile);
        let tables = &mut packed.tables[tile * w.blocks..(tile + width) * w.blocks];
        let step = task.step(task.tokens.start + local);
        let (offset, nan) =
            pack(w, task, task.tokens.start + local, step, &mut tables[local - tile..], width);
        packed.offset.push(offset);
        packed.step.push(if nan { f32::NAN } else { step });
    }
    let panels = w.rows.div_ceil(PANEL);
    // Sums that outgrow 16 bits are rare, and one kernel for them is enough.
    let wide = w.blocks > MAX_BLOCKS;
    let most = if wide { 1 } else { PANELS };
    for panel in (0..panels).step_by(most) {
        for tile in (0..tokens).step_by(TOKENS) {
            let place = Place { w, packed: &packed, panel, tile };
            macro_rules! of_size {
                ($($panels:literal $tokens:literal $wide:literal,)+) => {
                    match (most.min(panels - panel), TOKENS.min(tokens - tile), wide) {
                        $(($panels, $tokens, $wide) => place.tile::<$panels, $tokens, $wide>(task),)+
                        _ => unreachable!("a tile has at most {PANELS} panels and {TOKENS} tokens"),
                    }
                };
            }
            of_size!(
                3 6 false, 3 5 false, 3 4 false, 3 3 false, 3 2 false, 3 1 false,
                2 6 false, 2 5 false, 2 4 false, 2 3 false, 2 2 false, 2 1 false,
                1 6 false, 1 5 false, 1 4 false, 1 3 false, 1 2 false, 1 1 false,
                1 6 true, 1 5 true, 1 4 true, 1 3 true, 1 2 true, 1 1 true,
            );
        }
    }
    PACKED.set(packed);
}

/// Writes the tables of a token, one block in every `stride` of `tables`; gives its offset and whether it has a NaN.
///
/// # Safety
/// As for [`block`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
unsafe fn pack(
    w: &TableWeights,
    task: &Task,
    token: usize,
    step: f32,
    tables: &mut [[u16; STEPS]],
    stride: usize,
) -> (i32, bool) {
    let lo = _mm512_set1_epi32(w.x_lo);
    let edges = super::digits::thresholds(step, w.x_lo).map(|t| _mm512_set1_ps(t));
    // SAFETY: the arrays have 64 bytes.
    let (own_of, digits_of) =
        unsafe { (_mm512_loadu_si512(SUMS.0.as_ptr().cast()), _mm512_loadu_si512(SUMS.1.as_ptr().cast())) };
    let (mut owns, mut digits) = (_mm512_setzero_si512(), _mm512_setzero_si512());
    let mut nan = 0;
    for (block, tables) in tables.iter_mut().step_by(stride).enumerate() {
        let mut triple = _mm512_setzero_si512();
        for digit in 0..3 {
            let col = block * BLOCK + digit * STEPS;
            let left = w.cols.saturating_sub(col).min(STEPS);
            if left == 0 {
                break;
            }
            let lanes = (0xffffu32 >> (STEPS - left)) as __mmask16;
            let at = token * w.cols + col;
            match task.x {
                Activations::Codes(a) => {
                    // SAFETY: `check` asserted `tokens * cols` codes, and the lanes end at the token's last.
                    let code = unsafe { _mm_maskz_loadu_epi8(lanes, a.as_ptr().add(at)) };
                    let j = _mm512_sub_epi32(_mm512_cvtepi8_epi32(code), lo);
                    let j = _mm512_maskz_and_epi32(lanes, j, _mm512_set1_epi32(3));
                    triple =
                        _mm512_or_si512(triple, _mm512_sllv_epi32(j, _mm512_set1_epi32(2 * digit as i32)));
                }
                Activations::Values(x, shift) => {
                    // SAFETY: `check` asserted `tokens * cols` values, and the lanes end at the token's last.
                    let mut v = unsafe { _mm512_maskz_loadu_ps(lanes, x.as_ptr().add(at)) };
                    if let Some(shift) = shift {
                        // SAFETY: `check` asserted `cols` shifts.
                        let shift = unsafe { _mm512_maskz_loadu_ps(lanes, shift.as_ptr().add(col)) };
                        v = _mm512_add_ps(v, shift);
                    }
                    let one = _mm512_set1_epi32(1 << (2 * digit));
                    for edge in edges {
                        let above = _mm512_mask_cmp_ps_mask::<_CMP_GE_OQ>(lanes, v, edge);
                        triple = _mm512_mask_add_epi32(triple, above, triple, one);
                    }
                    nan |= _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
                }
            }
        }
        // The upper bytes of a lane are 0 and look up 0.
        owns = _mm512_add_epi32(owns, _mm512_permutexvar_epi8(triple, own_of));
        digits = _mm512_add_epi32(digits, _mm512_permutexvar_epi8(triple, digits_of));
        let places = _mm512_cvtepi32_epi16(_mm512_slli_epi32::<6>(triple));
        // SAFETY: 16 places of 16 bits.
        unsafe { _mm256_storeu_si256(tables.as_mut_ptr().cast(), places) };
    }
    let offset = w.token_offset(_mm512_reduce_add_epi32(owns), _mm512_reduce_add_epi32(digits));
    (offset, nan != 0)
}

/// A tile: the panels from `panel` on and the tokens of the block from `tile` on.
struct Place<'a> {
    w: &'a TableWeights,
    packed: &'a Packed,
    panel: usize,
    tile: usize,
}

impl Place<'_> {
    /// # Safety
    /// As for [`block`]; there are `P` panels from `panel` on and `T` tokens from `tile` on, as they are packed.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
    unsafe fn tile<const P: usize, const T: usize, const WIDE: bool>(&self, task: &mut Task) {
        let w = self.w;
        let stride = w.blocks * PANEL_BLOCK;
        let weights = &super::bytes(&w.lines)[self.panel * stride..(self.panel + P) * stride];
        let tables = &self.packed.tables[self.tile * w.blocks..(self.tile + T) * w.blocks];
        let zero = _mm512_setzero_si512();
        let mut sums = [[[zero; 2]; P]; T];
        let mut wide = [[[zero; 4]; P]; T];
        let mut from = 0;
        while from < w.blocks {
            let blocks = if WIDE { MAX_BLOCKS.min(w.blocks - from) } else { w.blocks };
            // SAFETY: the slices above hold `P` panels and `T` tokens of `w.blocks` blocks, and `from + blocks` is no more.
            unsafe {
                let weights = weights.as_ptr().add(from * PANEL_BLOCK);
                look_up::<P, T>(weights, stride, tables.as_ptr().add(from * T).cast(), blocks, &mut sums);
            }
            if WIDE {
                for (wide, sums) in wide.iter_mut().flatten().zip(sums.iter_mut().flatten()) {
                    for (quarter, wide) in wide.iter_mut().enumerate() {
                        *wide = _mm512_add_epi32(*wide, widen(sums, quarter));
                    }
                    *sums = [zero; 2];
                }
            }
            from += blocks;
        }
        for (t, (sums, wide)) in sums.iter().zip(&wide).enumerate() {
            for (p, (sums, wide)) in sums.iter().zip(wide).enumerate() {
                let row = (self.panel + p) * PANEL;
                for (quarter, wide) in wide.iter().enumerate() {
                    let row = row + quarter * 16;
                    if row < w.rows {
                        let sums = if WIDE { *wide } else { widen(sums, quarter) };
                        // SAFETY: `row` is a row, and `self.tile + t` a token of the block.
                        unsafe { self.finish(sums, row, self.tile + t, task) };
                    }
                }
            }
        }
    }

    /// Turns the tables' sums of 16 rows into results.
    ///
    /// # Safety
    /// As for [`block`]; `row` is below the rows and a multiple of 16, `token` is one of the block.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
    unsafe fn finish(&self, sums: __m512i, row: usize, token: usize, task: &mut Task) {
        let w = self.w;
        let lanes = (0xffffu32 >> (16 - (w.rows - row).min(16))) as __mmask16;
        let own = _mm512_set1_epi32(self.packed.offset[token]);
        // SAFETY: the offsets are filled up to whole panels.
        let offset = unsafe { _mm512_loadu_si512(w.offset.as_ptr().add(row).cast()) };
        let sums = if w.grid.half { _mm512_add_epi32(sums, sums) } else { sums };
        let sums = _mm512_add_epi32(sums, _mm512_add_epi32(offset, own));
        let at = token * w.rows + row;
        match &mut task.out {
            // SAFETY: the results are `[tokens of the block, rows]`, and the lanes end at the last row.
            Out::Sums(out) => unsafe { _mm512_mask_storeu_epi32(out.as_mut_ptr().add(at), lanes, sums) },
            Out::Real(y) => {
                let step = _mm512_set1_ps(self.packed.step[token]);
                // SAFETY: `product` asserted a step for each row, and the lanes end at the last.
                let steps = unsafe { _mm512_maskz_loadu_ps(lanes, task.scales.w.as_ptr().add(row)) };
                let mut v = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_mul_ps(step, steps));
                v = match task.scales.bias {
                    // SAFETY: `product` asserted a bias for each row.
                    Some(bias) => {
                        _mm512_add_ps(v, unsafe { _mm512_maskz_loadu_ps(lanes, bias.as_ptr().add(row)) })
                    }
                    // As the other roads do it: -0 becomes 0.
                    None => _mm512_add_ps(v, _mm512_setzero_ps()),
                };
                // SAFETY: as for the sums.
                unsafe { _mm512_mask_storeu_ps(y.as_mut_ptr().add(at), lanes, v) };
            }
        }
    }
}

/// Rows `16 quarter..` of 64: those of the even bytes, then those of the odd ones.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn widen(&[all, odd]: &Sums, quarter: usize) -> __m512i {
    let words = if quarter < 2 { _mm512_sub_epi16(all, _mm512_slli_epi16::<8>(odd)) } else { odd };
    let half = match quarter % 2 {
        0 => _mm512_castsi512_si256(words),
        _ => _mm512_extracti64x4_epi64::<1>(words),
    };
    _mm512_cvtepu16_epi32(half)
}

/// Adds what the tables say of `blocks` blocks.
///
/// # Safety
/// `weights` points at `P` panels `stride` bytes apart and `x` at places of tables, both of `blocks` blocks.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
unsafe fn look_up<const P: usize, const T: usize>(
    mut weights: *const u8,
    stride: usize,
    mut x: *const u16,
    blocks: usize,
    sums: &mut [[Sums; P]; T],
) {
    let all = TRIPLES.0.as_ptr().cast::<u8>();
    for _ in 0..blocks {
        let mut bytes = [[_mm512_setzero_si512(); P]; T];
        for m in 0..STEPS {
            let mut index = [_mm512_setzero_si512(); P];
            for (p, index) in index.iter_mut().enumerate() {
                // SAFETY: within the panels, as the caller promises.
                *index = unsafe { _mm512_loadu_si512(weights.add(p * stride).cast()) };
            }
            for (t, bytes) in bytes.iter_mut().enumerate() {
                // SAFETY: `[T, 16]` places a block, each that of a table.
                let table = unsafe { _mm512_loadu_si512(all.add(usize::from(*x.add(t * STEPS + m))).cast()) };
                for (bytes, &index) in bytes.iter_mut().zip(&index) {
                    *bytes = _mm512_add_epi8(*bytes, _mm512_permutexvar_epi8(index, table));
                }
            }
            // SAFETY: a step of the panel, and in the end the panel's end at most.
            weights = unsafe { weights.add(PANEL) };
        }
        // SAFETY: a block of places, in the end their end.
        x = unsafe { x.add(T * STEPS) };
        // Not flattened: a chain of iterators over `bytes` would keep it in memory.
        for (sums, bytes) in sums.iter_mut().zip(bytes) {
            for (sums, bytes) in sums.iter_mut().zip(bytes) {
                sums[0] = _mm512_add_epi16(sums[0], bytes);
                sums[1] = _mm512_add_epi16(sums[1], _mm512_srli_epi16::<8>(bytes));
            }
        }
    }
}
