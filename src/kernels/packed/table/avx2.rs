//! AVX2: two weights an index, two indices a byte, 32 rows a look-up.

use super::digits::{own, BLOCK, MAX_BLOCKS, PAIRS};
use super::{Out, TableWeights, Task};
use std::arch::x86_64::*;

/// Rows that a look-up takes.
pub(super) const PANEL: usize = 32;
/// Tokens of a tile.
pub(super) const TOKENS: usize = 4;
/// Panels of a tile.
const PANELS: usize = 2;
/// Pairs of columns in a block: column `m` with `m + 24`.
const PAIRS_OF_BLOCK: usize = BLOCK / 2;
/// Bytes of a row in a block: pair `q` below, pair `q + 12` above.
const STEPS: usize = PAIRS_OF_BLOCK / 2;
/// Bytes of a block of one panel.
const PANEL_BLOCK: usize = STEPS * PANEL;

/// Sums of 32 rows in 16 bits: of everything, an odd byte counting 256 times, and of the odd bytes.
type Sums = [__m256i; 2];

/// `[panels, blocks, 12, 32]`: in a panel byte `2 q` is row `q` and byte `2 q + 1` row `16 + q`.
pub(super) fn lay_out(rows: usize, blocks: usize, digit: impl Fn(usize, usize) -> u8) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(rows.next_multiple_of(PANEL) * blocks * STEPS);
    for panel in 0..rows.div_ceil(PANEL) {
        for step in 0..blocks * STEPS {
            let col = step / STEPS * BLOCK + step % STEPS;
            bytes.extend((0..PANEL).map(|byte| {
                let row = panel * PANEL + byte / 2 + byte % 2 * 16;
                let pair = |col| digit(row, col) | digit(row, col + PAIRS_OF_BLOCK) << 2;
                pair(col) | pair(col + STEPS) << 4
            }));
        }
    }
    bytes
}

/// Where in `PAIRS` the table of each pair lies, in bytes, `[tiles, blocks, tokens of the tile, 24]`, and for each
/// token its offset and its step, NaN where one of its values is.
struct Packed {
    tables: Vec<[u8; PAIRS_OF_BLOCK]>,
    tokens: Vec<(i32, f32)>,
}

/// Multiplies a block of tokens.
///
/// # Safety
/// The processor has AVX2; `w` was laid out by [`lay_out`]; the slices of `task` have the lengths that
/// `TableWeights::check` asserts.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn block(w: &TableWeights, task: &mut Task) {
    let tokens = task.tokens.len();
    let packed = pack(w, task);
    let panels = w.rows.div_ceil(PANEL);
    for panel in (0..panels).step_by(PANELS) {
        for tile in (0..tokens).step_by(TOKENS) {
            macro_rules! of_size {
                ($($panels:literal $tokens:literal,)+) => {
                    match (PANELS.min(panels - panel), TOKENS.min(tokens - tile)) {
                        // SAFETY: the caller's promise, and `packed` is of this block.
                        $(($panels, $tokens) => unsafe {
                            run_tile::<$panels, $tokens>(w, &packed, panel, tile, task)
                        },)+
                        _ => unreachable!("a tile has at most {PANELS} panels and {TOKENS} tokens"),
                    }
                };
            }
            of_size!(2 4, 2 3, 2 2, 2 1, 1 4, 1 3, 1 2, 1 1,);
        }
    }
}

#[target_feature(enable = "avx2")]
fn pack(w: &TableWeights, task: &Task) -> Packed {
    let tokens = task.tokens.len();
    let mut packed =
        Packed { tables: vec![[0; PAIRS_OF_BLOCK]; tokens * w.blocks], tokens: Vec::with_capacity(tokens) };
    let mut digits = vec![0u8; w.blocks * BLOCK];
    for local in 0..tokens {
        let token = task.tokens.start + local;
        let step = task.step(token);
        let nan = w.digits(task.x, token, step, &mut digits);
        let (mut owns, mut sum) = (0, 0);
        for &j in &digits {
            owns += own(i32::from(j));
            sum += i32::from(j);
        }
        packed.tokens.push((w.token_offset(owns, sum), if nan { f32::NAN } else { step }));
        let tile = local / TOKENS * TOKENS;
        let width = TOKENS.min(tokens - tile);
        let tables = packed.tables[tile * w.blocks + local - tile..].iter_mut().step_by(width);
        for (tables, digits) in tables.zip(digits.chunks_exact(BLOCK)) {
            let (low, high) = digits.split_at(PAIRS_OF_BLOCK);
            for ((table, &low), &high) in tables.iter_mut().zip(low).zip(high) {
                *table = (low | high << 2) << 4;
            }
        }
    }
    packed
}

/// # Safety
/// As for [`block`]; there are `P` panels from `panel` on and `T` tokens from `tile` on, as they are packed.
#[target_feature(enable = "avx2")]
unsafe fn run_tile<const P: usize, const T: usize>(
    w: &TableWeights,
    packed: &Packed,
    panel: usize,
    tile: usize,
    task: &mut Task,
) {
    let stride = w.blocks * PANEL_BLOCK;
    let weights = &super::bytes(&w.lines)[panel * stride..(panel + P) * stride];
    let tables = &packed.tables[tile * w.blocks..(tile + T) * w.blocks];
    let mut wide = [[[0i32; PANEL]; P]; T];
    let mut from = 0;
    while from < w.blocks {
        let blocks = MAX_BLOCKS.min(w.blocks - from);
        let mut sums = [[[_mm256_setzero_si256(); 2]; P]; T];
        // SAFETY: the slices above hold `P` panels and `T` tokens of `w.blocks` blocks, and `from + blocks` is no more.
        unsafe {
            let weights = weights.as_ptr().add(from * PANEL_BLOCK);
            look_up::<P, T>(weights, stride, tables.as_ptr().add(from * T).cast(), blocks, &mut sums);
        }
        for (wide, &[all, odd]) in wide.iter_mut().flatten().zip(sums.iter().flatten()) {
            let even = _mm256_sub_epi16(all, _mm256_slli_epi16::<8>(odd));
            let mut words = [0u16; PANEL];
            // SAFETY: 32 words.
            unsafe {
                _mm256_storeu_si256(words.as_mut_ptr().cast(), even);
                _mm256_storeu_si256(words.as_mut_ptr().add(16).cast(), odd);
            }
            wide.iter_mut().zip(words).for_each(|(wide, word)| *wide += i32::from(word));
        }
        from += blocks;
    }
    for (wide, token) in wide.iter().zip(tile..) {
        for (wide, panel) in wide.iter().zip(panel..) {
            finish(w, packed.tokens[token], wide, panel * PANEL, token, task);
        }
    }
}

/// Turns the tables' sums of a panel into results.
#[inline]
#[target_feature(enable = "avx2")]
fn finish(
    w: &TableWeights,
    (own, step): (i32, f32),
    sums: &[i32; PANEL],
    row: usize,
    token: usize,
    task: &mut Task,
) {
    let rows = row..w.rows.min(row + PANEL);
    let results = token * w.rows + rows.start..token * w.rows + rows.end;
    let (_, unit) = w.grid.line();
    let mut whole = [0i32; PANEL];
    for ((whole, sum), offset) in whole.iter_mut().zip(sums).zip(&w.offset[row..row + PANEL]) {
        *whole = unit * sum + (offset + own);
    }
    match &mut task.out {
        Out::Sums(out) => out[results].copy_from_slice(&whole[..rows.len()]),
        Out::Real(y) => {
            let bias = task.scales.bias.map(|b| &b[rows.clone()]);
            let y = y[results].iter_mut().zip(whole).zip(&task.scales.w[rows]);
            for (i, ((y, whole), steps)) in y.enumerate() {
                *y = whole as f32 * (step * steps) + bias.map_or(0.0, |b| b[i]);
            }
        }
    }
}

/// Adds what the tables say of `blocks` blocks.
///
/// # Safety
/// `weights` points at `P` panels `stride` bytes apart and `x` at places of tables, both of `blocks` blocks.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn look_up<const P: usize, const T: usize>(
    mut weights: *const u8,
    stride: usize,
    mut x: *const u8,
    blocks: usize,
    sums: &mut [[Sums; P]; T],
) {
    let all = PAIRS.0.as_ptr().cast::<u8>();
    let nibble = _mm256_set1_epi8(15);
    for _ in 0..blocks {
        let mut bytes = [[_mm256_setzero_si256(); P]; T];
        for q in 0..STEPS {
            for upper in [false, true] {
                let mut index = [_mm256_setzero_si256(); P];
                for (p, index) in index.iter_mut().enumerate() {
                    // SAFETY: within the panels, as the caller promises.
                    let raw = unsafe { _mm256_loadu_si256(weights.add(p * stride).cast()) };
                    let raw = if upper { _mm256_srli_epi16::<4>(raw) } else { raw };
                    *index = _mm256_and_si256(raw, nibble);
                }
                let pair = if upper { q + STEPS } else { q };
                for (t, bytes) in bytes.iter_mut().enumerate() {
                    // SAFETY: `[T, 24]` places a block, each that of a table of 16 bytes.
                    let table = unsafe {
                        let place = usize::from(*x.add(t * PAIRS_OF_BLOCK + pair));
                        _mm256_broadcastsi128_si256(_mm_loadu_si128(all.add(place).cast()))
                    };
                    for (bytes, &index) in bytes.iter_mut().zip(&index) {
                        *bytes = _mm256_add_epi8(*bytes, _mm256_shuffle_epi8(table, index));
                    }
                }
            }
            // SAFETY: a step of the panel, and in the end the panel's end at most.
            weights = unsafe { weights.add(PANEL) };
        }
        // SAFETY: a block of places, in the end their end.
        x = unsafe { x.add(T * PAIRS_OF_BLOCK) };
        // Not flattened: a chain of iterators over `bytes` would keep it in memory.
        for (sums, bytes) in sums.iter_mut().zip(bytes) {
            for (sums, bytes) in sums.iter_mut().zip(bytes) {
                sums[0] = _mm256_add_epi16(sums[0], bytes);
                sums[1] = _mm256_add_epi16(sums[1], _mm256_srli_epi16::<8>(bytes));
            }
        }
    }
}
