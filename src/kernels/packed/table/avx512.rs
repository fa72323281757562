//! AVX512: three weights a byte, 64 rows a look-up.
//!
//! What the processor does for three panels of 64 rows, four tokens and three columns: 12 `vpermb`, 12 byte
//! additions, 3 loads of weights, 4 of tables and 4 of where these lie. The bytes are widened once in a block of 48
//! columns.

use super::digits::{Edges, BLOCK, MAX_BLOCKS, SUMS, TRIPLES};
use super::{Activations, Out, Scales, TableWeights, Task};
use std::arch::x86_64::*;
use std::cell::Cell;

/// Rows that a look-up takes.
pub(super) const PANEL: usize = 64;
/// Tokens of a tile.
pub(super) const TOKENS: usize = 4;
/// Panels of a tile.
const PANELS: usize = 3;
/// Triples of columns in a block: column `m` with `m + 16` and `m + 32`.
const STEPS: usize = BLOCK / 3;
/// Bytes of a block of one panel.
const PANEL_BLOCK: usize = STEPS * PANEL;

/// Sums of 64 rows in 16 bits, from `START` on: of everything, an odd byte counting 256 times, and of the odd bytes.
type Sums = [__m512i; 2];

/// What sums start from: the least that a signed word holds, so that all of its 16 bits serve. An odd byte's start
/// counts 256 times, and so nothing in 16 bits.
const START: i16 = i16::MIN;

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

/// `[panels, blocks, 16, 64]`: in a panel byte `4 i + q` is row `16 q + i`, so that the even bytes, and the odd ones, become
/// words, and of these the even ones, and the odd ones, rows in their order.
pub(super) fn lay_out(rows: usize, blocks: usize, digit: impl Fn(usize, usize) -> u8) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(rows.next_multiple_of(PANEL) * blocks * STEPS);
    for panel in 0..rows.div_ceil(PANEL) {
        for step in 0..blocks * STEPS {
            let col = step / STEPS * BLOCK + step % STEPS;
            bytes.extend((0..PANEL).map(|byte| {
                let row = panel * PANEL + byte / 4 + byte % 4 * 16;
                digit(row, col) | digit(row, col + 16) << 2 | digit(row, col + 32) << 4
            }));
        }
    }
    bytes
}

/// Multiplies a block of tokens.
///
/// # Safety
/// The processor has AVX512 F, BW, VL, DQ, VBMI and VNNI; `w` was laid out by [`lay_out`]; the slices of `task` have the
/// lengths that `TableWeights::check` asserts.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
pub(super) unsafe fn block(w: &TableWeights, task: &mut Task) {
    let mut packed = PACKED.take();
    packed.tables.resize(task.tokens.len() * w.blocks, [0; STEPS]);
    packed.offset.clear();
    packed.step.clear();
    let tokens = task.tokens.len();
    let edges = Edges::new(w.x_lo);
    for local in 0..tokens {
        let tile = local / TOKENS * TOKENS;
        let width = TOKENS.min(tokens - tile);
        let tables = &mut packed.tables[tile * w.blocks..(tile + width) * w.blocks];
        let token = task.tokens.start + local;
        let step = task.step(token);
        let (offset, nan) = pack(w, task, token, edges.thresholds(step), &mut tables[local - tile..], width);
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
                3 4 false, 3 3 false, 3 2 false, 3 1 false,
                2 4 false, 2 3 false, 2 2 false, 2 1 false,
                1 4 false, 1 3 false, 1 2 false, 1 1 false,
                1 4 true, 1 3 true, 1 2 true, 1 1 true,
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
    edges: [f32; 3],
    tables: &mut [[u16; STEPS]],
    stride: usize,
) -> (i32, bool) {
    let edges = edges.map(|edge| _mm512_set1_ps(edge));
    // SAFETY: the arrays have 64 bytes.
    let (own_of, digits_of) =
        unsafe { (_mm512_loadu_si512(SUMS.0.as_ptr().cast()), _mm512_loadu_si512(SUMS.1.as_ptr().cast())) };
    let (mut owns, mut digits) = (_mm512_setzero_si512(), _mm512_setzero_si512());
    let mut nan = 0;
    for (block, tables) in tables.iter_mut().step_by(stride).enumerate() {
        let from = token * w.cols + block * BLOCK;
        let left = w.cols - block * BLOCK;
        // SAFETY: `check` asserted `tokens` times `cols` activations and `cols` shifts, of which `left` are left.
        let triple = unsafe {
            match task.x {
                Activations::Codes(a) => triple_of_codes(a.as_ptr().add(from), left, w.x_lo),
                Activations::Fields(a, step) => {
                    triple_of_fields(a.as_ptr().add(token * step + block * BLOCK), left)
                }
                Activations::Values(x, shift) => {
                    let x = x.as_ptr().add(from);
                    let shift = shift.map(|shift| shift.as_ptr().add(block * BLOCK));
                    // The common case without masks.
                    match (left >= BLOCK, shift) {
                        (true, None) => triple_of_values::<true>(x, None, left, &edges, &mut nan),
                        _ => triple_of_values::<false>(x, shift, left, &edges, &mut nan),
                    }
                }
            }
        };
        // The upper bytes of a lane are 0 and look up 0.
        owns = _mm512_add_epi32(owns, _mm512_permutexvar_epi8(triple, own_of));
        digits = _mm512_add_epi32(digits, _mm512_permutexvar_epi8(triple, digits_of));
        let places = _mm512_cvtepi32_epi16(_mm512_slli_epi32::<6>(triple));
        // SAFETY: 16 places of 16 bits.
        unsafe { _mm256_storeu_si256(tables.as_mut_ptr().cast(), places) };
    }
    let offset = w.token_offset(_mm512_reduce_add_epi32(owns), _mm512_reduce_add_epi32(digits));
    // Every time that the sums start.
    let starts = w.blocks.div_ceil(MAX_BLOCKS).max(1) as i32;
    (offset - w.grid.line().1 * i32::from(START) * starts, nan != 0)
}

/// The lanes of digit `digit` where `left` columns are left from the block's first on.
fn lanes(left: usize, digit: usize) -> __mmask16 {
    ((1u32 << left.saturating_sub(digit * STEPS).min(STEPS)) - 1) as __mmask16
}

/// The digits of the columns `m`, `m + 16` and `m + 32` of a block in lane `m`, those behind the last column 0.
///
/// # Safety
/// The processor has AVX512 F, BW and VL; there are `left` codes at `a`, if no more than a block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn triple_of_codes(a: *const i8, left: usize, lo: i32) -> __m512i {
    let mut triple = _mm512_setzero_si512();
    for digit in 0..3 {
        let lanes = lanes(left, digit);
        // SAFETY: the lanes end at the last code.
        let code = unsafe { _mm_maskz_loadu_epi8(lanes, a.wrapping_add(digit * STEPS)) };
        let j = _mm512_sub_epi32(_mm512_cvtepi8_epi32(code), _mm512_set1_epi32(lo));
        let j = _mm512_maskz_and_epi32(lanes, j, _mm512_set1_epi32(3));
        triple = _mm512_or_si512(triple, _mm512_sllv_epi32(j, _mm512_set1_epi32(2 * digit as i32)));
    }
    triple
}

/// As [`triple_of_codes`], of fields.
///
/// # Safety
/// As for [`triple_of_codes`], with fields at `a`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn triple_of_fields(a: *const u8, left: usize) -> __m512i {
    // SAFETY: the lanes end at the last field.
    let of = |digit: usize| unsafe {
        _mm_maskz_loadu_epi8(lanes(left, digit), a.wrapping_add(digit * STEPS).cast())
    };
    let three = |fields| _mm_and_si128(fields, _mm_set1_epi8(3));
    // Fields of two bits stay within their bytes.
    let high = _mm_or_si128(_mm_slli_epi16::<2>(three(of(1))), _mm_slli_epi16::<4>(three(of(2))));
    _mm512_cvtepu8_epi32(_mm_or_si128(three(of(0)), high))
}

/// As [`triple_of_codes`], of values; bits of `nan` where one of them, shifted, is NaN. `FULL`: a whole block is left.
///
/// # Safety
/// As for [`triple_of_codes`], with values at `x` and at `shift`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn triple_of_values<const FULL: bool>(
    x: *const f32,
    shift: Option<*const f32>,
    left: usize,
    edges: &[__m512; 3],
    nan: &mut __mmask16,
) -> __m512i {
    let mut triple = _mm512_setzero_si512();
    for digit in 0..3 {
        let lanes = if FULL { 0xffff } else { lanes(left, digit) };
        let at = digit * STEPS;
        // SAFETY: the lanes end at the last value.
        let mut v = unsafe { _mm512_maskz_loadu_ps(lanes, x.wrapping_add(at)) };
        if let Some(shift) = shift {
            // SAFETY: as above.
            v = _mm512_add_ps(v, unsafe { _mm512_maskz_loadu_ps(lanes, shift.wrapping_add(at)) });
        }
        // The upper bit of the digit says which edge the lower one depends on.
        let upper = _mm512_mask_cmp_ps_mask::<_CMP_GE_OQ>(lanes, v, edges[1]);
        let edge = _mm512_mask_mov_ps(edges[0], upper, edges[2]);
        let lower = _mm512_mask_cmp_ps_mask::<_CMP_GE_OQ>(lanes, v, edge);
        triple = _mm512_mask_or_epi32(triple, upper, triple, _mm512_set1_epi32(2 << (2 * digit)));
        triple = _mm512_mask_or_epi32(triple, lower, triple, _mm512_set1_epi32(1 << (2 * digit)));
        *nan |= _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
    }
    triple
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
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
    unsafe fn tile<const P: usize, const T: usize, const WIDE: bool>(&self, task: &mut Task) {
        let w = self.w;
        let stride = w.blocks * PANEL_BLOCK;
        let weights = &super::bytes(&w.lines)[self.panel * stride..(self.panel + P) * stride];
        let tables = &self.packed.tables[self.tile * w.blocks..(self.tile + T) * w.blocks];
        let start = [[[_mm512_set1_epi16(START); 2]; P]; T];
        if WIDE {
            let mut wide = [[[_mm512_setzero_si512(); 4]; P]; T];
            for from in (0..w.blocks).step_by(MAX_BLOCKS) {
                let mut sums = start;
                // SAFETY: the slices above hold `P` panels and `T` tokens of `w.blocks` blocks, and these are some of them.
                unsafe {
                    let weights = weights.as_ptr().add(from * PANEL_BLOCK);
                    let tables = tables.as_ptr().add(from * T).cast();
                    look_up::<P, T>(weights, stride, tables, MAX_BLOCKS.min(w.blocks - from), &mut sums);
                }
                for (wide, sums) in wide.iter_mut().flatten().zip(sums.iter().flatten()) {
                    *wide = widen(sums, &picks(w.grid.line().1), wide);
                }
            }
            // SAFETY: as for this function.
            unsafe { self.finish::<true>(wide.as_flattened().as_flattened(), P, task) };
        } else {
            let mut sums = start;
            // SAFETY: the slices above hold `P` panels and `T` tokens of `w.blocks` blocks.
            unsafe {
                look_up::<P, T>(weights.as_ptr(), stride, tables.as_ptr().cast(), w.blocks, &mut sums);
            }
            // SAFETY: as for this function.
            unsafe { self.finish::<false>(sums.as_flattened().as_flattened(), P, task) };
        }
    }

    /// Turns the sums `[tokens of the tile, panels, 2 or, if wide, 4]` into results.
    ///
    /// # Safety
    /// As for [`Place::tile`], with `panels` for `P`.
    // Apart from the look-ups, which need all the registers there are: both in one had everything on the stack.
    #[inline(never)]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
    unsafe fn finish<const WIDE: bool>(&self, sums: &[__m512i], panels: usize, task: &mut Task) {
        let each = if WIDE { 4 } else { 2 };
        for p in 0..panels {
            let row = (self.panel + p) * PANEL;
            let sums = sums[p * each..].chunks(panels * each);
            let at = self.tile * self.w.rows + row;
            let scales = &task.scales;
            match &mut task.out {
                // SAFETY: as for this function, and the results are `[tokens of the block, rows]`.
                Out::Real(y) if row + PANEL <= self.w.rows => unsafe {
                    self.panel::<WIDE, true, true>(sums, row, scales, y[at..].as_mut_ptr());
                },
                // SAFETY: as above.
                Out::Real(y) => unsafe {
                    self.panel::<WIDE, true, false>(sums, row, scales, y[at..].as_mut_ptr());
                },
                // SAFETY: as above; what is stored are whole numbers.
                Out::Sums(out) => unsafe {
                    self.panel::<WIDE, false, false>(sums, row, scales, out[at..].as_mut_ptr().cast());
                },
            }
        }
    }

    /// Turns the sums of the panel from `row` on into what is stored from `out` on, token after token.
    ///
    /// # Safety
    /// As for [`Place::tile`]; a token has 2 or, if wide, 4 sums; the whole panel is within the rows if it is `FULL`,
    /// and `out` is the panel's place in the results of the tile's first token.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")]
    unsafe fn panel<'s, const WIDE: bool, const REAL: bool, const FULL: bool>(
        &self,
        sums: impl Iterator<Item = &'s [__m512i]>,
        row: usize,
        scales: &Scales,
        mut out: *mut f32,
    ) {
        let w = self.w;
        let zero = _mm512_setzero_si512();
        let (mut lanes, mut offset) = ([0xffff; 4], [zero; 4]);
        let (mut steps, mut bias) = ([_mm512_setzero_ps(); 4], [_mm512_setzero_ps(); 4]);
        for quarter in 0..4 {
            let row = row + 16 * quarter;
            if !FULL {
                lanes[quarter] = ((1u32 << w.rows.saturating_sub(row).min(16)) - 1) as __mmask16;
            }
            // SAFETY: the offsets are filled up to whole panels.
            offset[quarter] = unsafe { _mm512_loadu_si512(w.offset.as_ptr().add(row).cast()) };
            if REAL {
                // Without a bias 0 is added, as on the other roads: -0 becomes 0.
                let each = [(&mut steps[quarter], Some(scales.w)), (&mut bias[quarter], scales.bias)];
                for (to, rows) in each {
                    let Some(rows) = rows else { continue };
                    // SAFETY: `product` asserted a step and a bias for each row, and the lanes end at the last.
                    *to = unsafe { _mm512_maskz_loadu_ps(lanes[quarter], rows.as_ptr().wrapping_add(row)) };
                }
            }
        }
        let picks = picks(w.grid.line().1);
        let tokens = self.packed.offset[self.tile..].iter().zip(&self.packed.step[self.tile..]);
        for (sums, (&own, &step)) in sums.zip(tokens) {
            let own = _mm512_set1_epi32(own);
            let step = _mm512_set1_ps(step);
            let offset = offset.map(|offset| _mm512_add_epi32(offset, own));
            let whole = match WIDE {
                true => [0, 1, 2, 3].map(|quarter| _mm512_add_epi32(sums[quarter], offset[quarter])),
                false => widen(&[sums[0], sums[1]], &picks, &offset),
            };
            for quarter in 0..4 {
                let result = match REAL {
                    true => {
                        let step = _mm512_mul_ps(step, steps[quarter]);
                        _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(whole[quarter]), step), bias[quarter])
                    }
                    false => _mm512_castsi512_ps(whole[quarter]),
                };
                let out = out.wrapping_add(16 * quarter);
                // SAFETY: within the results of the token, as the caller promises; the lanes end at the last row.
                unsafe {
                    match FULL {
                        true => _mm512_storeu_ps(out, result),
                        false => _mm512_mask_storeu_ps(out, lanes[quarter], result),
                    }
                }
            }
            out = out.wrapping_add(w.rows);
        }
    }
}

/// What [`widen`] multiplies the even words with, and the odd ones: what a unit of their sums is worth.
#[inline]
#[target_feature(enable = "avx512f")]
fn picks(unit: i32) -> [__m512i; 2] {
    [_mm512_set1_epi32(unit), _mm512_set1_epi32(unit << 16)]
}

/// Adds the sums of 64 rows to `onto`, 16 rows each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn widen(&[all, odd]: &Sums, picks: &[__m512i; 2], onto: &[__m512i; 4]) -> [__m512i; 4] {
    let even = _mm512_sub_epi16(all, _mm512_slli_epi16::<8>(odd));
    [
        _mm512_dpwssd_epi32(onto[0], even, picks[0]),
        _mm512_dpwssd_epi32(onto[1], odd, picks[0]),
        _mm512_dpwssd_epi32(onto[2], even, picks[1]),
        _mm512_dpwssd_epi32(onto[3], odd, picks[1]),
    ]
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
