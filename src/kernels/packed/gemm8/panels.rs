//! The private layout of the weight: panels of 64 rows, in which a field of each packed line belongs to another group of
//! 16 rows.
//!
//! A quad is four columns. Unpacked, a quad of a group of 16 rows is one line of 16 x 4 bytes, the operand of one
//! `vpdpbusd`; a panel holds its 4 groups (the last panel as many as it has) quad by quad, one linear stream. Packed:
//!
//! ```text
//! 2 bits   a line for a quad: the field of group g at bits 2g, 2g+1 of each byte
//! 3 bits   three lines for two quads: the low two bits as above, twice, then the top bits, at bit 4 (quad odd) + g
//! 4 bits   a line for a quad and two groups: the even group in the low half of each byte
//! 8 bits   as unpacked; also 5 to 7 bits
//! ```
//!
//! A field holds the code about the middle of its range, in two's complement. It is unpacked to the TOP of its byte, so
//! that a shift and a mask are all there is to it, without a sign extension: the bytes are the codes times a power of two, which
//! the sums carry along and which leaves them exactly. On a grid of halves one more bit below the field makes it `2 code + 1`.

use rayon::prelude::*;

use super::lines::{bytes, bytes_mut, Line};

/// Rows of a panel.
pub(super) const PANEL: usize = 64;
/// Rows of a group: the 32-bit lanes of a 512-bit register.
pub(super) const GROUP: usize = 16;
/// Columns of a quad: the products that one lane of `vpdpbusd` sums.
pub(super) const QUAD: usize = 4;

/// How many bits a stored field has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Width {
    Two,
    Three,
    Four,
    Eight,
}

impl Width {
    pub fn of(bits: u8) -> Width {
        match bits {
            1 | 2 => Width::Two,
            3 => Width::Three,
            4 => Width::Four,
            _ => Width::Eight,
        }
    }

    /// Lines of `quads` quads (an even number where a field has three bits) of `groups` groups.
    pub fn lines(self, quads: usize, groups: usize) -> usize {
        match self {
            Width::Two => quads,
            Width::Three => quads * 3 / 2,
            Width::Four => quads * groups.div_ceil(2),
            Width::Eight => quads * groups,
        }
    }

    /// Bits below a field that has been unpacked to the top of its byte.
    pub fn below(self) -> u32 {
        match self {
            Width::Two => 6,
            Width::Three => 5,
            Width::Four => 4,
            Width::Eight => 0,
        }
    }
}

/// Where the rows and columns of a matrix lie in its panels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub rows: usize,
    pub cols: usize,
    pub width: Width,
}

impl Shape {
    pub fn panels(self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Groups of a panel: 4, or what the last one has.
    pub fn groups(self, panel: usize) -> usize {
        (self.rows - panel * PANEL).min(PANEL).div_ceil(GROUP)
    }

    /// Quads of a row, an even number: three bits are stored by pairs of quads.
    pub fn quads(self) -> usize {
        let quads = self.cols.div_ceil(QUAD);
        match self.width {
            Width::Three => quads.next_multiple_of(2),
            _ => quads,
        }
    }

    /// The first line of a panel, and the end of the last one at `panels`.
    pub fn start(self, panel: usize) -> usize {
        let before = panel.min(self.rows / PANEL);
        let whole = before * self.width.lines(self.quads(), PANEL / GROUP);
        match panel > before {
            true => whole + self.width.lines(self.quads(), self.groups(before)),
            false => whole,
        }
    }
}

/// Packs rows that `row` writes as centred codes (two's complement bytes, `shape.cols` of them).
pub(super) fn pack(shape: Shape, row: impl Fn(usize, &mut [i8]) + Sync) -> Vec<Line> {
    let mut lines = vec![Line::ZERO; shape.start(shape.panels())];
    // All panels but the last are of one size.
    let size = shape.start(1.min(shape.panels())).max(1);
    lines.par_chunks_mut(size).enumerate().for_each(|(panel, lines)| {
        let groups = shape.groups(panel);
        let mut codes = vec![0i8; shape.cols];
        let out = bytes_mut(lines);
        for r in 0..(shape.rows - panel * PANEL).min(PANEL) {
            row(panel * PANEL + r, &mut codes);
            let (group, lane) = (r / GROUP, r % GROUP);
            for (quad, codes) in codes.chunks(QUAD).enumerate() {
                for (i, &code) in codes.iter().enumerate() {
                    let (byte, code) = (lane * QUAD + i, code as u8);
                    match shape.width {
                        Width::Two => out[quad * 64 + byte] |= (code & 3) << (2 * group),
                        Width::Three => {
                            let (pair, odd) = (quad / 2 * 192, quad % 2);
                            out[pair + odd * 64 + byte] |= (code & 3) << (2 * group);
                            out[pair + 128 + byte] |= (code >> 2 & 1) << (4 * odd + group);
                        }
                        Width::Four => {
                            let line = quad * groups.div_ceil(2) + group / 2;
                            out[line * 64 + byte] |= (code & 15) << (4 * (group % 2));
                        }
                        Width::Eight => out[(quad * groups + group) * 64 + byte] = code,
                    }
                }
            }
        }
    });
    lines
}

/// What [`unpack`] makes of a field.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unpacking {
    pub width: Width,
    /// The bit set below a field on a grid of halves, else 0.
    pub half: u8,
    /// Bits to shift a byte down by, keeping its sign.
    pub down: u32,
}

/// Unpacks some quads of a panel of `groups` groups; `out` has `groups` lines a quad.
///
/// Plain loops over lines, to be compiled within each instruction set: a line's loop is a shift, a mask and an or of
/// whole registers.
#[inline(always)]
pub(super) fn unpack(how: Unpacking, groups: usize, packed: &[Line], out: &mut [Line]) {
    match groups {
        1 => unpack_groups::<1>(how, packed, out),
        2 => unpack_groups::<2>(how, packed, out),
        3 => unpack_groups::<3>(how, packed, out),
        _ => unpack_groups::<4>(how, packed, out),
    }
}

#[inline(always)]
fn unpack_groups<const G: usize>(how: Unpacking, packed: &[Line], out: &mut [Line]) {
    match how.down {
        0 => unpack_fields::<G, false>(how, packed, out),
        _ => unpack_fields::<G, true>(how, packed, out),
    }
}

#[inline(always)]
fn unpack_fields<const G: usize, const DOWN: bool>(how: Unpacking, packed: &[Line], out: &mut [Line]) {
    let half = how.half;
    let finish = |byte: u8| if DOWN { ((byte | half) as i8 >> how.down) as u8 } else { byte | half };
    match how.width {
        Width::Two => {
            for (x, out) in packed.iter().zip(out.chunks_exact_mut(G)) {
                for (g, out) in out.iter_mut().enumerate() {
                    for (out, &x) in out.0.iter_mut().zip(&x.0) {
                        *out = finish((x << (6 - 2 * g)) & 0xc0);
                    }
                }
            }
        }
        Width::Three => {
            for (x, out) in packed.chunks_exact(3).zip(out.chunks_exact_mut(2 * G)) {
                for (i, out) in out.iter_mut().enumerate() {
                    let (low, top) = (&x[i / G].0, &x[2].0);
                    let (g, e) = (i % G, i / G * 4 + i % G);
                    for ((out, &low), &top) in out.0.iter_mut().zip(low).zip(top) {
                        let low = if g < 3 { low << (5 - 2 * g.min(2)) } else { low >> 1 };
                        *out = finish((low & 0x60) | ((top << (7 - e)) & 0x80));
                    }
                }
            }
        }
        Width::Four => {
            for (x, out) in packed.chunks_exact(G.div_ceil(2)).zip(out.chunks_exact_mut(G)) {
                for (g, out) in out.iter_mut().enumerate() {
                    for (out, &x) in out.0.iter_mut().zip(&x[g / 2].0) {
                        *out = finish((x << (4 - g % 2 * 4)) & 0xf0);
                    }
                }
            }
        }
        // Never asked for: such a panel is read where it lies.
        Width::Eight => bytes_mut(out).copy_from_slice(bytes(packed)),
    }
}
