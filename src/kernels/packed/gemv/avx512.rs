//! The AVX-512 road: 16 rows in the lanes of a vector, two bands of them at a time.
//!
//! 8-bit activations: fields are masked where they stand, never shifted; each place in the byte has its own sum, which
//! is a multiple of its place value and is shifted right once a block. Floats: the low four bits of a lane pick one of 16
//! values by `vpermps`, what lies above them does not matter. For 4 and 3 bits these are the values of the codes; for 2
//! bits they are what a pair of codes is worth with its two activations, so that one look-up and one addition does for
//! two columns.

use std::arch::x86_64::*;

use super::activations::{FloatRow, Int8Row};
use super::columns::BLOCK;
use super::layout::{band_lines, tile_lines, Line, BAND, BANDS, TILE_ROWS};
use super::{PANEL, RUN};

/// How far ahead of the reading, in lines, memory is asked for. From 96 to 192 lines are about as good from memory; 40
/// are up to a third slower.
const AHEAD: usize = 128;

/// Asks for lines, from any address on: for the steps too, each line of which would be waited for. The lines stay in the
/// second-level cache, for the next row of activations.
#[inline(always)]
fn ask(from: *const Line, count: usize) {
    for line in 0..count {
        // SAFETY: a prefetch may ask for any address; it is part of SSE, which x86-64 always has.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(line).cast()) };
    }
}

/// A tile times 8-bit activations; `zero` is the value of field 0.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) fn int8<const BITS: usize>(tile: &[Line], x: &Int8Row, zero: f32, y: &mut [f32]) {
    let columns = x.columns;
    let blocks = columns.blocks();
    assert!(columns.tiled() && tile.len() == tile_lines(BITS, columns), "a tile of these columns");
    assert!(x.codes.len() == blocks * BLOCK && x.scale.len() == blocks && x.sum.len() == blocks);
    let zero = _mm512_set1_ps(zero);
    let mut lines = tile.as_ptr();
    let mut out = [_mm512_setzero_ps(); BANDS];
    for group in 0..columns.groups() {
        let mut of_group = [_mm512_setzero_ps(); BANDS];
        for block in columns.blocks_of(group) {
            ask(lines.wrapping_add(AHEAD), BANDS * band_lines(BITS));
            // SAFETY: `tile` has lines for each block and group, `x` 64 codes, a scale and a sum for each block, both
            // asserted above.
            unsafe {
                let codes = x.codes.as_ptr().add(block * BLOCK);
                let scale = _mm512_set1_ps(*x.scale.as_ptr().add(block));
                let seed = _mm512_mul_ps(zero, _mm512_set1_ps(*x.sum.as_ptr().add(block)));
                for (of_group, sum) in of_group.iter_mut().zip(block_sums::<BITS>(lines, codes)) {
                    let exact = _mm512_add_ps(seed, _mm512_cvtepi32_ps(sum));
                    *of_group = _mm512_fmadd_ps(exact, scale, *of_group);
                }
                lines = lines.add(BANDS * band_lines(BITS));
            }
        }
        ask(lines.wrapping_add(AHEAD), BANDS);
        for (out, of_group) in out.iter_mut().zip(of_group) {
            // SAFETY: as above: the group's steps, a line for each band.
            unsafe {
                *out = _mm512_fmadd_ps(of_group, load_step(lines), *out);
                lines = lines.add(1);
            }
        }
    }
    store(&out, y);
}

/// `Σ field code` over the 64 columns of a block, for each row of both bands.
///
/// # Safety
/// `lines` points to the lines of the block, `codes` to 64 codes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn block_sums<const BITS: usize>(lines: *const Line, codes: *const i8) -> [__m512i; BANDS] {
    // SAFETY: the offsets below are those of the layout, within what the caller vouches for.
    let line = |v: usize, band: usize| unsafe { load(lines, BITS, v, band) };
    // SAFETY: as above: `c` is a multiple of 4 below 64.
    let four = |c: usize| unsafe { _mm512_set1_epi32(codes.add(c).cast::<i32>().read_unaligned()) };
    let dot = |sum: &mut __m512i, fields, mask: u8, four| {
        *sum = _mm512_dpbusd_epi32(*sum, _mm512_and_si512(fields, _mm512_set1_epi8(mask as i8)), four);
    };
    // For each place that a field can have in a byte. Activations are loaded once for both bands, where they are used:
    // loaded ahead of the bands, the compiler spills them.
    let mut sums = [[_mm512_setzero_si512(); 5]; BANDS];
    match BITS {
        2 => {
            for v in 0..4 {
                let x = [four(16 * v), four(16 * v + 4), four(16 * v + 8), four(16 * v + 12)];
                for (band, s) in sums.iter_mut().enumerate() {
                    let w = line(v, band);
                    dot(&mut s[0], w, 0x03, x[0]);
                    dot(&mut s[1], w, 0x0c, x[1]);
                    dot(&mut s[2], w, 0x30, x[2]);
                    dot(&mut s[3], w, 0xc0, x[3]);
                }
            }
            sums.map(|[a, b, c, d, _]| {
                let low = _mm512_add_epi32(a, _mm512_srai_epi32::<2>(b));
                let high = _mm512_add_epi32(_mm512_srai_epi32::<4>(c), _mm512_srai_epi32::<6>(d));
                _mm512_add_epi32(low, high)
            })
        }
        3 => {
            for t in 0..2 {
                let x: [__m512i; 8] = std::array::from_fn(|f| four(32 * t + 4 * f));
                for (band, s) in sums.iter_mut().enumerate() {
                    let (a, b, c) = (line(3 * t, band), line(3 * t + 1, band), line(3 * t + 2, band));
                    for (i, w) in [a, b, c].into_iter().enumerate() {
                        dot(&mut s[0], w, 0x07, x[2 * i]);
                        dot(&mut s[1], w, 0x38, x[2 * i + 1]);
                    }
                    dot(&mut s[2], a, 0xc0, x[6]);
                    dot(&mut s[2], b, 0xc0, x[7]);
                    // The high bits of the last two fields stand for 4, at places 64 and 128.
                    dot(&mut s[3], c, 0x40, x[6]);
                    dot(&mut s[4], c, 0x80, x[7]);
                }
            }
            sums.map(|[one, eight, top, high6, high7]| {
                let whole = _mm512_add_epi32(one, _mm512_srai_epi32::<3>(eight));
                let high = _mm512_add_epi32(_mm512_srai_epi32::<4>(high6), _mm512_srai_epi32::<5>(high7));
                _mm512_add_epi32(whole, _mm512_add_epi32(_mm512_srai_epi32::<6>(top), high))
            })
        }
        4 => {
            for v in 0..8 {
                let x = [four(8 * v), four(8 * v + 4)];
                for (band, s) in sums.iter_mut().enumerate() {
                    let w = line(v, band);
                    dot(&mut s[v % 2], w, 0x0f, x[0]);
                    dot(&mut s[2 + v % 2], w, 0xf0, x[1]);
                }
            }
            sums.map(|[a, b, c, d, _]| {
                let high = _mm512_srai_epi32::<4>(_mm512_add_epi32(c, d));
                _mm512_add_epi32(_mm512_add_epi32(a, b), high)
            })
        }
        _ => {
            for v in 0..16 {
                let x = four(4 * v);
                for (band, s) in sums.iter_mut().enumerate() {
                    s[v % 4] = _mm512_dpbusd_epi32(s[v % 4], line(v, band), x);
                }
            }
            sums.map(|[a, b, c, d, _]| _mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d)))
        }
    }
}

/// Line `v` of a band of a block.
///
/// # Safety
/// `lines` points to the lines of a block of that many bits, and its bands have more than `v`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(lines: *const Line, bits: usize, v: usize, band: usize) -> __m512i {
    // SAFETY: the caller's.
    unsafe { _mm512_load_si512(lines.add(band * band_lines(bits) + v).cast()) }
}

/// The sums of a band that run side by side, so that one addition need not wait for another.
type Sums = [__m512; 4];

/// A tile times float activations; `zero` is the value of field 0.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) fn float<const BITS: usize>(tile: &[Line], x: &FloatRow, zero: f32, y: &mut [f32]) {
    let columns = x.format.columns;
    let blocks = columns.blocks();
    assert!(columns.tiled() && tile.len() == tile_lines(BITS, columns), "a tile of these columns");
    assert!(x.values.len() == blocks * BLOCK, "activations of these columns");
    assert!(BITS != 2 || x.pairs.len() == blocks * PAIRS, "tables of these columns");
    // What the codes are worth, in units: 8-bit codes are whole numbers of halves.
    let unit = _mm512_set1_ps(if BITS == 8 { 0.5 } else { 1.0 });
    let codes = match BITS {
        8 => Codes { whole: _mm512_set1_epi32((2.0 * zero) as i32), table: _mm512_setzero_ps() },
        _ => Codes { whole: _mm512_setzero_si512(), table: table(zero, (1 << BITS) - 1, 0) },
    };
    let mut lines = tile.as_ptr();
    let mut out = [_mm512_setzero_ps(); BANDS];
    for group in 0..columns.groups() {
        let mut sums: [Sums; BANDS] = [[_mm512_setzero_ps(); 4]; BANDS];
        for block in columns.blocks_of(group) {
            ask(lines.wrapping_add(AHEAD), BANDS * band_lines(BITS));
            // SAFETY: `tile` has lines for each block and group, `x` 64 values and for 2 bits the tables for each block,
            // all asserted above.
            unsafe {
                if BITS == 2 {
                    add_pairs(lines, x.pairs.as_ptr().add(block * PAIRS), &mut sums);
                } else {
                    add_block::<BITS>(lines, x.values.as_ptr().add(block * BLOCK), codes, &mut sums);
                }
                lines = lines.add(BANDS * band_lines(BITS));
            }
        }
        ask(lines.wrapping_add(AHEAD), BANDS);
        for (out, s) in out.iter_mut().zip(sums) {
            let sum = _mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3]));
            // SAFETY: as above: the group's steps, a line for each band.
            unsafe {
                *out = _mm512_fmadd_ps(_mm512_mul_ps(sum, unit), load_step(lines), *out);
                lines = lines.add(1);
            }
        }
    }
    store(&out, y);
}

/// What a tile of a run has come to.
#[derive(Clone, Copy)]
struct Partial {
    /// Of the groups that are done.
    out: [__m512; BANDS],
    /// Of the group that a panel left in the middle.
    sums: [Sums; BANDS],
    /// The next line, counted from the first of the run.
    at: usize,
}

/// Up to [`RUN`] tiles of two-bit codes times float activations, panel by panel.
///
/// The tables of all columns are four times as long as the codes of a tile. Taken tile by tile they come from the
/// second-level cache for every tile, and the lines asked for from memory wait behind them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) fn float_pairs(tiles: &[Line], x: &FloatRow, _zero: f32, y: &mut [f32]) {
    let columns = x.format.columns;
    let (blocks, each) = (columns.blocks(), tile_lines(2, columns));
    let count = y.len() / TILE_ROWS;
    assert!(count <= RUN && y.len() == count * TILE_ROWS, "products of a run");
    assert!(columns.tiled() && tiles.len() == count * each, "tiles of these columns");
    assert!(x.pairs.len() == blocks * PAIRS, "tables of these columns");
    let nothing = [_mm512_setzero_ps(); 4];
    let mut run: [Partial; RUN] = std::array::from_fn(|tile| Partial {
        out: [_mm512_setzero_ps(); BANDS],
        sums: [nothing; BANDS],
        at: tile * each,
    });
    for first in (0..blocks).step_by(PANEL) {
        let end = blocks.min(first + PANEL);
        for tile in 0..count {
            let Partial { mut out, mut sums, at } = run[tile];
            // What is read next: the panel of the next tile, the next panel of the first, or the next run.
            let next = match run[..count].get(tile + 1) {
                Some(next) => next.at,
                None if end == blocks => tiles.len(),
                None if tile == 0 => at + AHEAD,
                None => run[0].at,
            };
            let ahead = tiles.as_ptr().wrapping_add(next);
            let mut line = 0;
            for group in columns.group_of(first)..=columns.group_of(end - 1) {
                let of_group = columns.blocks_of(group);
                for block in of_group.start.max(first)..of_group.end.min(end) {
                    ask(ahead.wrapping_add(line), BANDS * band_lines(2));
                    // SAFETY: the tile has lines, and `x` tables, for each block and group, asserted above.
                    unsafe {
                        let tables = x.pairs.as_ptr().add(block * PAIRS);
                        add_pairs(tiles.as_ptr().add(at + line), tables, &mut sums);
                    }
                    line += BANDS * band_lines(2);
                }
                if of_group.end <= end {
                    ask(ahead.wrapping_add(line), BANDS);
                    for (out, s) in out.iter_mut().zip(&mut sums) {
                        let sum = _mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3]));
                        // SAFETY: as above: the group's steps, a line for each band.
                        *out =
                            _mm512_fmadd_ps(sum, unsafe { load_step(tiles.as_ptr().add(at + line)) }, *out);
                        line += 1;
                        *s = nothing;
                    }
                }
            }
            run[tile] = Partial { out, sums, at: at + line };
        }
    }
    for (partial, y) in run.iter().zip(y.chunks_exact_mut(TILE_ROWS)) {
        store(&partial.out, y);
    }
}

/// Numbers of a block's tables of pairs: 32 pairs of columns, each of 4 x 4 codes.
const PAIRS: usize = BLOCK / 2 * 16;

/// Writes what each pair of two-bit codes is worth, `[blocks, 32, 16]`: for the nibble `n` of vector `v` the pair of
/// columns `16 v + 8 (n % 2) + n / 2` (the low code) and four further on.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn pair_tables(values: &[f32], zero: f32, pairs: &mut [f32]) {
    assert_eq!(pairs.len(), values.len() / BLOCK * PAIRS, "tables of whole blocks");
    let (low, high) = (table(zero, 3, 0), table(zero, 3, 2));
    for (x, tables) in values.chunks_exact(16).zip(pairs.chunks_exact_mut(8 * 16)) {
        for (n, table) in tables.chunks_exact_mut(16).enumerate() {
            let column = 8 * (n % 2) + n / 2;
            let second = _mm512_mul_ps(high, _mm512_set1_ps(x[column + 4]));
            let both = _mm512_fmadd_ps(low, _mm512_set1_ps(x[column]), second);
            // SAFETY: `table` is a chunk of 16.
            unsafe { _mm512_storeu_ps(table.as_mut_ptr(), both) };
        }
    }
}

/// For the numbers `n` of 0 to 15 the value of the field `(n >> shift) & mask`.
#[inline]
#[target_feature(enable = "avx512f")]
fn table(zero: f32, mask: u32, shift: u32) -> __m512 {
    let values: [f32; 16] = std::array::from_fn(|n| ((n as u32 >> shift) & mask) as f32 + zero);
    // SAFETY: 16 numbers.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

/// Adds a block of two-bit codes of both bands.
///
/// # Safety
/// `lines` points to the lines of the block, `tables` to its `PAIRS` numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn add_pairs(lines: *const Line, tables: *const f32, sums: &mut [Sums; BANDS]) {
    for v in 0..band_lines(2) {
        // SAFETY: the offset is that of the layout, within what the caller vouches for.
        let w: [__m512i; BANDS] = std::array::from_fn(|band| unsafe { load(lines, 2, v, band) });
        for n in 0..8 {
            // SAFETY: as above: 4 x 8 tables of 16.
            let table = unsafe { _mm512_loadu_ps(tables.add((8 * v + n) * 16)) };
            for (sums, w) in sums.iter_mut().zip(w) {
                let worth = _mm512_permutexvar_ps(shifted(w, 4 * n), table);
                sums[n % 4] = _mm512_add_ps(sums[n % 4], worth);
            }
        }
    }
}

/// What the codes of a width are worth.
#[derive(Clone, Copy)]
struct Codes {
    /// For 8 bits: twice the value of field 0.
    whole: __m512i,
    /// Else the value for the low bits of a lane.
    table: __m512,
}

/// Adds a block of 3, 4 or 8-bit codes of both bands.
///
/// # Safety
/// `lines` points to the lines of the block, `x` to 64 numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn add_block<const BITS: usize>(
    lines: *const Line,
    x: *const f32,
    codes: Codes,
    sums: &mut [Sums; BANDS],
) {
    // SAFETY: the offsets below are those of the layout, within what the caller vouches for.
    let line = |v: usize| unsafe { [load(lines, BITS, v, 0), load(lines, BITS, v, 1)] };
    let mut add = |values: [__m512; BANDS], column: usize, k: usize| {
        // SAFETY: as above: `column` is below 64.
        let x = unsafe { _mm512_set1_ps(*x.add(column)) };
        for (sums, value) in sums.iter_mut().zip(values) {
            sums[k] = _mm512_fmadd_ps(value, x, sums[k]);
        }
    };
    let look_up =
        |w: [__m512i; BANDS], shift| w.map(|w| _mm512_permutexvar_ps(shifted(w, shift), codes.table));
    match BITS {
        3 => {
            for t in 0..2 {
                let (a, b, c) = (line(3 * t), line(3 * t + 1), line(3 * t + 2));
                let last = [last_two(a[0], b[0], c[0]), last_two(a[1], b[1], c[1])];
                for (i, w) in [a, b, c, last].into_iter().enumerate() {
                    for k in 0..4 {
                        add(look_up(w, 8 * k), 32 * t + 8 * i + k, k);
                        add(look_up(w, 8 * k + 3), 32 * t + 8 * i + 4 + k, k);
                    }
                }
            }
        }
        4 => {
            for v in 0..8 {
                let w = line(v);
                for k in 0..4 {
                    add(look_up(w, 8 * k), 8 * v + k, k);
                    add(look_up(w, 8 * k + 4), 8 * v + 4 + k, k);
                }
            }
        }
        _ => {
            for v in 0..16 {
                let w = line(v);
                for k in 0..4 {
                    // A dot product with (0, .., 2, .., 0) takes out a byte, doubles it and adds what field 0 is worth.
                    let byte = _mm512_set1_epi32(2 << (8 * k));
                    let twice = w.map(|w| _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(codes.whole, w, byte)));
                    add(twice, 4 * v + k, k);
                }
            }
        }
    }
}

/// The last two fields of a three of lines of 3 bits, in the places of whole ones.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn last_two(a: __m512i, b: __m512i, c: __m512i) -> __m512i {
    let piece = |w, mask: u8| _mm512_and_si512(w, _mm512_set1_epi8(mask as i8));
    let low = _mm512_or_si512(piece(_mm512_srli_epi16::<6>(a), 0x03), piece(_mm512_srli_epi16::<3>(b), 0x18));
    let high =
        _mm512_or_si512(piece(_mm512_srli_epi16::<4>(c), 0x04), piece(_mm512_srli_epi16::<2>(c), 0x20));
    _mm512_or_si512(low, high)
}

/// Lanes shifted right; once the loop around it is unrolled, a shift by an immediate.
#[inline]
#[target_feature(enable = "avx512f")]
fn shifted(w: __m512i, by: usize) -> __m512i {
    _mm512_srlv_epi32(w, _mm512_set1_epi32(by as i32))
}

/// The steps of a band.
///
/// # Safety
/// `line` points to a line.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_step(line: *const Line) -> __m512 {
    // SAFETY: the caller's.
    unsafe { _mm512_load_ps(line.cast()) }
}

/// Writes the products of a tile.
#[inline]
#[target_feature(enable = "avx512f")]
fn store(out: &[__m512; BANDS], y: &mut [f32]) {
    assert_eq!(y.len(), TILE_ROWS, "products of a tile");
    for (out, y) in out.iter().zip(y.chunks_exact_mut(BAND)) {
        // SAFETY: a chunk of 16.
        unsafe { _mm512_storeu_ps(y.as_mut_ptr(), *out) };
    }
}
