//! The tiled layout of a CUDA device in numbers, and how its products are launched (kernels/packed*.cu).
//!
//! How a sum is cut, into slices and among warps, is a function of shapes alone, made for a card of 132
//! multiprocessors: results are the same on any card. What only says who computes what may ask the card.

/// Multiprocessors that slices are made for.
const MULTIPROCESSORS: usize = 132;
/// Warps of a block.
const WARPS: usize = 8;
/// What one kernel's sizes may be at most.
const LARGEST: usize = 1 << 30;
/// Blocks along y or z.
const GRID: usize = 65_535;
/// Shared memory that a block of `packed_gemv` is given at most, which a card of 8.0 or 9.0 has.
const GEMV_SHARED: usize = 160 << 10;
/// Shared memory of a multiprocessor of a card of 9.0, from which a block takes 1 KiB more than it asks for.
const SHARED: usize = 227 << 10;
/// Slices that one block adds up at most.
const SLICES: usize = 32;

/// Bits of a field in a tile, for codes of `bits` bits.
fn tile_bits(bits: usize) -> usize {
    match bits {
        0..=2 => 2,
        3 | 4 => bits,
        _ => 8,
    }
}

/// Sizes of the tiled layout of a weight; the functions are those of kernels/arith/packed.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tiles {
    pub rows: usize,
    pub cols: usize,
    /// Bits of a field: 2, 3, 4 or 8.
    pub bits: usize,
    /// Columns of a set of steps, a power of two; 0 where a row has one step.
    pub pitch: usize,
}

/// A launch of `packed_gemv`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gemv {
    /// Columns of activations, as in the kernel's name.
    pub n: usize,
    /// Warps of a block that share their rows.
    pub split: usize,
    pub slices: usize,
    pub blocks: usize,
    pub shared: usize,
}

/// A launch of `packed_gemm` or `packed_back`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slices {
    /// Columns of activations of a block.
    pub n: usize,
    /// Blocks, the last number slices.
    pub grid: (usize, usize, usize),
    pub shared: usize,
}

/// A launch of `packed_int8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Whole {
    /// Tokens of a block.
    pub n: usize,
    pub grid: (usize, usize),
    pub shared: usize,
}

impl Tiles {
    /// Of codes of `bits` bits, `group` columns of a row sharing a step (none: all); none where groups are not whole
    /// blocks of 32 columns, or sizes are beyond the kernels'.
    pub fn of(rows: usize, cols: usize, bits: u8, group: Option<usize>) -> Option<Self> {
        let pitch = match group {
            None => 0,
            Some(group) if group.is_multiple_of(32) && group > 0 => group & group.wrapping_neg(),
            Some(_) => return None,
        };
        let fits = (1..=LARGEST).contains(&rows) && (1..=LARGEST).contains(&cols);
        fits.then(|| Tiles { rows, cols, bits: tile_bits(usize::from(bits)), pitch })
    }

    /// Columns of a tile.
    fn width(self) -> usize {
        match self.bits {
            2 => 128,
            3 => 256,
            4 => 64,
            _ => 32,
        }
    }

    /// Columns that a row is filled up to a multiple of.
    fn pad(self) -> usize {
        self.width().max(64)
    }

    /// Bytes of a tile.
    fn bytes(self) -> usize {
        if self.bits == 3 {
            3072
        } else {
            1024
        }
    }

    /// Tiles in a row of tiles.
    fn across(self) -> usize {
        self.cols.div_ceil(self.pad()) * (self.pad() / self.width())
    }

    /// Tiles in a column of tiles.
    fn down(self) -> usize {
        self.rows.div_ceil(32)
    }

    /// 32-bit words of the weight.
    pub fn words(self) -> usize {
        self.down() * self.across() * self.bytes() / 4
    }

    /// Floats of its sets of steps.
    pub fn steps(self) -> usize {
        let sets = match self.pitch {
            0 => 1,
            pitch => (self.across() * self.width()).div_ceil(pitch),
        };
        self.down() * sets * 32
    }

    /// Floats of a partial result of one slice of the columns, for `tokens` tokens.
    pub fn partial(self, tokens: usize) -> usize {
        tokens * self.down() * 32
    }

    /// Bytes of shared memory of a block of `packed_gemv` with `columns` of activations, `n` at most.
    fn gemv_shared(self, n: usize, columns: usize, slices: usize) -> usize {
        let depth = if self.bits == 3 { 2 } else { 4 } * if n == 16 && self.bits <= 3 { 2 } else { 1 };
        let (sets, span) = match self.pitch {
            0 => (0, self.width()),
            pitch => ((self.width() / pitch).max(1), pitch.min(self.width())),
        };
        let held = self.width() * self.across().div_ceil(slices);
        WARPS * depth * (self.bytes() + 128 * sets) + 8 * n * (held / span) + columns * 64 * ((held / 32) | 1)
    }

    /// For 1 to 16 `columns` of activations (of f32 two a token); none where a row is too long.
    ///
    /// The least time by this count: a block takes the time of its warps' tiles and of 3 more for beginning and
    /// ending, of staging its activations, and there are as many turns as blocks fill the card.
    pub fn gemv(self, columns: usize) -> Option<Gemv> {
        let n = if columns <= 8 { 8 } else { 16 };
        let (across, down) = (self.across(), self.down());
        let resident = match (n, self.bits) {
            (8, 2 | 3) => 2,
            (8, _) => 3,
            (_, 2 | 3) => 1,
            _ => 2,
        };
        // Tiles of a warp: enough for what is under way, and no more than that blocks come in several turns.
        let (least, most) = if self.bits == 3 { (2, 6) } else { (4, 16) };
        let mut best: Option<(usize, Gemv)> = None;
        for split in [8, 4, 2, 1] {
            let blocks = down.div_ceil(WARPS / split);
            for slices in 1..=across.min(SLICES) {
                let shared = self.gemv_shared(n, columns, slices);
                let held = across.div_ceil(slices);
                let each = held.div_ceil(split);
                if shared > GEMV_SHARED || (each < least && slices > 1) {
                    continue;
                }
                let at_once = MULTIPROCESSORS * resident.min(SHARED / (shared + 1024)).max(1);
                let turns = (blocks * slices).div_ceil(at_once);
                // In quarters of what a tile takes. 2048 activations take a block a quarter.
                let staging = (columns * held * self.width()).div_ceil(2048);
                let tile = if self.bits == 3 { 12 } else { 4 };
                let long = each.saturating_sub(most) * tile / 2;
                let time = turns * (each * tile + 12 + staging + long) + if slices > 1 { 12 } else { 0 };
                if best.is_none_or(|(least, _)| time < least) {
                    best = Some((time, Gemv { n, split, slices, blocks, shared }));
                }
            }
        }
        best.map(|(_, gemv)| gemv)
    }

    /// For any number of `columns` of activations, where a block has `most` bytes of shared memory; none where that is
    /// too little, or there are too many columns.
    pub fn gemm(self, columns: usize, most: usize) -> Option<Slices> {
        let pads = self.cols.div_ceil(self.pad());
        let grid = |n: usize| {
            let down = if n == 128 { 4 } else { 8 };
            (self.down().div_ceil(down), columns.div_ceil(n))
        };
        let right = match columns {
            0..=32 => 32,
            33..=64 => 64,
            _ => 128,
        };
        let (x, y) = grid(right);
        let slices = slices_of(x * y, pads, self.pad() / 64, 8);
        // A card with less shared memory takes another shape, but cuts the sums alike.
        let shapes = [right, 64, 128];
        let shape = shapes.into_iter().find(|&n| self.gemm_shared(n) <= most)?;
        let (x, y) = grid(shape);
        (y <= GRID && columns <= LARGEST).then(|| Slices {
            n: shape,
            grid: (x, y, slices),
            shared: self.gemm_shared(shape),
        })
    }

    fn gemm_shared(self, n: usize) -> usize {
        let down = if n == 128 { 4 } else { 8 };
        let stages = match (n, self.bits) {
            (32, 8) => 6,
            (32, _) => 8,
            _ => 4,
        };
        let (of_pad, bytes) = (self.pad() / 64, self.bytes() * self.pad() / self.width());
        stages * (128 * n + 256 * down) + (2 + (stages - 2) / of_pad) * down * bytes
    }

    /// The gradient of `tokens` tokens, `parts` columns each; none where there are too many.
    pub fn back(self, tokens: usize, parts: usize) -> Option<Slices> {
        let columns = tokens.checked_mul(parts).filter(|&columns| columns <= LARGEST)?;
        let (x, y) = (self.cols.div_ceil(128), columns.div_ceil(128));
        let copies = match self.pitch {
            0 => 1,
            pitch => (128 / pitch).max(1),
        };
        let slices = slices_of(x * y, self.down(), 1, 4);
        (y <= GRID).then(|| Slices { n: 128, grid: (x, y, slices), shared: copies * 16_640 })
    }

    /// Whole sums of `tokens` tokens on a card of so many multiprocessors, a block of which has `most` bytes of shared
    /// memory; none where a row is too long, or there are too many tokens.
    pub fn whole(self, tokens: usize, most: usize, multiprocessors: usize) -> Option<Whole> {
        let pad = if self.bits == 3 { 256 } else { 128 };
        let filled = self.cols.next_multiple_of(pad);
        let parts = self.rows.div_ceil(256);
        let of = |n: usize| {
            // The rest is the kernel's own.
            let (y, shared) = (tokens.div_ceil(n), n * (filled + 64));
            (shared + 1024 <= most && y <= GRID).then(|| {
                let fill = multiprocessors * if n == 16 { 2 } else { 1 };
                Whole { n, grid: (fill.div_ceil(y.max(1)).clamp(1, parts), y), shared }
            })
        };
        let (many, few) = (of(64), of(16));
        // The larger reads weights less often, where it fills the card at all.
        let fills = tokens.div_ceil(64) * parts >= multiprocessors;
        if fills {
            many.or(few)
        } else {
            few.or(many)
        }
    }
}

/// Slices of sums that `blocks` blocks each take, of `units` units at most that are `each` long: where blocks run in the
/// fewest turns, `start` being what a block takes besides.
fn slices_of(blocks: usize, units: usize, each: usize, start: usize) -> usize {
    let time = |slices: usize| {
        let turns = (blocks * slices).div_ceil(MULTIPROCESSORS);
        turns * (units.div_ceil(slices) * each + start) + if slices > 1 { start } else { 0 }
    };
    (1..=units.clamp(1, SLICES)).min_by_key(|&slices| time(slices)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiles(rows: usize, cols: usize, bits: u8, group: Option<usize>) -> Tiles {
        Tiles::of(rows, cols, bits, group).unwrap()
    }

    #[test]
    fn layouts_by_hand() {
        // Two rows of tiles of 128 columns, 1 KiB each.
        let of = tiles(33, 200, 2, None);
        assert_eq!((of.words(), of.steps()), (2 * 2 * 256, 2 * 32));
        assert_eq!((tiles(33, 200, 1, None), of.partial(3)), (of, 3 * 64));
        // Steps for each 32 columns of the 256 that are filled up.
        assert_eq!(tiles(33, 200, 2, Some(96)).steps(), 2 * 8 * 32);
        assert_eq!(tiles(32, 257, 3, Some(512)).words(), 2 * 768);
        // Of 8 bits a pad is two tiles.
        assert_eq!((tiles(1, 1, 5, None).bits, tiles(1, 1, 8, None).words()), (8, 2 * 256));
        for group in [0, 1, 16, 48, 33] {
            assert_eq!(Tiles::of(4, 100, 4, Some(group)), None, "{group}");
        }
        assert_eq!(Tiles::of(0, 4, 4, None), None);
    }

    /// The table of kernels/packed_gemv.cu.
    #[test]
    fn few_tokens_as_the_kernel_says() {
        let chosen = |rows, cols, bits, columns| {
            let Gemv { split, slices, blocks, .. } = tiles(rows, cols, bits, None).gemv(columns).unwrap();
            (split, slices, blocks * slices)
        };
        assert_eq!(chosen(4096, 4096, 2, 1), (8, 1, 128));
        assert_eq!(chosen(4096, 4096, 2, 8), (1, 8, 128));
        assert_eq!(chosen(4096, 4096, 4, 1), (8, 2, 256));
        for columns in [1, 8] {
            assert_eq!(chosen(8192, 28_672, 2, columns), (1, 16, 512));
        }
        assert_eq!(chosen(28_672, 8192, 2, 1), (4, 1, 448));
        assert_eq!(chosen(28_672, 8192, 2, 8), (1, 4, 448));
    }

    #[test]
    fn sizes_stay_within_what_kernels_take() {
        let shapes =
            [(1, 1), (33, 130), (576, 1536), (4096, 4096), (8192, 28_672), (152_064, 8192), (7, 1 << 20)];
        for (rows, cols) in shapes {
            for bits in 1..=8 {
                for group in [None, Some(32), Some(64), Some(128), Some(96), Some(4096)] {
                    let group = group.filter(|&g| g < cols);
                    let of = tiles(rows, cols, bits, group);
                    for columns in 1..=16 {
                        // The products of many tokens take what is too long for those of few.
                        let Some(Gemv { n, split, slices, blocks, shared }) = of.gemv(columns) else {
                            assert!(cols > 1 << 19 || (bits, columns > 8) == (3, true), "{of:?} {columns}");
                            continue;
                        };
                        assert!(columns <= n && slices <= of.across() && shared <= GEMV_SHARED);
                        assert!(blocks * (WARPS / split) * 32 >= rows);
                    }
                    for columns in [1, 17, 33, 100, 512, 4096] {
                        let many = of.gemm(columns, 226 << 10).unwrap();
                        assert!(many.grid.2 <= cols.div_ceil(of.pad()) && many.grid.2 >= 1);
                        // A smaller card cuts alike.
                        if let Some(other) = of.gemm(columns, 99 << 10) {
                            assert!(other.grid.2 == many.grid.2 && other.shared <= 99 << 10);
                        }
                        let back = of.back(columns, 1).unwrap();
                        assert!(back.grid.2 <= of.down() && back.shared <= 66_560);
                    }
                }
            }
        }
    }

    #[test]
    fn whole_sums_fill_the_card_or_read_weights_less_often() {
        let of = |rows, cols, tokens| tiles(rows, cols, 4, None).whole(tokens, 227 << 10, 132);
        assert_eq!(of(576, 192, 197), Some(Whole { n: 16, grid: (3, 13), shared: 16 * 320 }));
        assert_eq!(of(576, 192, 64 * 197).map(|w| (w.n, w.grid)), Some((64, (1, 197))));
        assert_eq!(of(576, 14_336, 64 * 197).map(|w| w.n), Some(16));
        assert_eq!(of(576, 14_337, 1), None);
        assert_eq!(of(1, 64, 65_535 * 64 + 1), None);
    }
}
