//! From accumulators to results: what a tile does with its sums.

/// A tile stores its accumulators as they are, to be gone on with.
pub(super) const PARTIAL: u8 = 0;
/// A tile stores the exact sums.
pub(super) const SUMS: u8 = 1;
/// A tile stores floats: the sums times their steps, plus the bias.
pub(super) const VALUES: u8 = 2;

/// How accumulators become sums, and sums values.
#[derive(Clone, Copy)]
pub(super) struct Finish<'a> {
    /// Bits that an accumulator carries below its sum.
    pub shift: u32,
    /// Whether the sum is then doubled.
    pub double: bool,
    /// What is added to a sum for each unit of a token's own sum.
    pub zero: i32,
    /// What one of the sums is worth, in steps: a power of two.
    pub unit: f32,
    /// Sums of the activations of each token.
    pub token_sums: &'a [i32],
    /// Steps of the tokens; as long as `token_sums` where values are asked for.
    pub token_step: &'a [f32],
    /// Steps of the rows; one for each row where values are asked for.
    pub row_step: &'a [f32],
    /// One for each row, or none at all.
    pub bias: &'a [f32],
}

impl Finish<'_> {
    /// Whether a sum is not just an accumulator shifted down.
    #[inline(always)]
    pub fn corrected(&self) -> bool {
        self.double || self.zero != 0
    }

    /// The exact sum of an accumulator.
    #[inline(always)]
    pub fn sum(&self, token: usize, accumulator: i32) -> i32 {
        let sum = (accumulator >> self.shift) << u32::from(self.double);
        sum.wrapping_add(self.zero.wrapping_mul(self.token_sums[token]))
    }

    /// The value of an accumulator.
    #[inline(always)]
    pub fn value(&self, token: usize, row: usize, accumulator: i32) -> f32 {
        let scale = self.token_step[token] * (self.row_step[row] * self.unit);
        let value = self.sum(token, accumulator) as f32 * scale;
        match self.bias.get(row) {
            Some(bias) => value + bias,
            None => value,
        }
    }
}

/// One tile: some tokens times some groups of rows over a block of quads.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    /// The first quad of the first token: bytes.
    pub a: *const u8,
    /// Bytes from one token to the next.
    pub a_stride: usize,
    /// The unpacked block of the panel, `groups` lines a quad.
    pub w: *const i8,
    pub quads: usize,
    /// What the accumulators start from, `16 groups` of a token.
    pub init: *const i32,
    /// From one token's to the next one's; 0 where all start alike.
    pub init_stride: usize,
    /// First token and first row of the tile.
    pub token: usize,
    pub row: usize,
    /// Rows that exist, at most `16 groups`.
    pub rows: usize,
    /// Where the result of the first token and row goes: i32 for `PARTIAL` and `SUMS`, f32 for `VALUES`.
    pub out: *mut i32,
    /// From one token's results to the next one's.
    pub out_stride: usize,
    pub finish: &'a Finish<'a>,
}

/// The oracle of a tile, and its road where there is no other.
///
/// # Safety
///
/// `tokens` rows of `4 quads` bytes at `a`, `16 groups` accumulators of each at `init`, `quads` times `groups` lines at `w`, and
/// `rows` results of each token at `out` (`16 groups` for `PARTIAL`) are valid; no other thread touches those results.
pub(super) unsafe fn scalar<const MODE: u8>(tile: &Tile, tokens: usize, groups: usize) {
    for t in 0..tokens {
        for r in 0..16 * groups {
            // SAFETY: the caller's word, for token `t` and row `r`.
            unsafe {
                let mut sum = *tile.init.add(t * tile.init_stride + r);
                for k in 0..4 * tile.quads {
                    let a = *tile.a.add(t * tile.a_stride + k);
                    let w = *tile.w.add((k / 4 * groups * 16 + r) * 4 + k % 4);
                    sum = sum.wrapping_add(i32::from(a) * i32::from(w));
                }
                let out = tile.out.add(t * tile.out_stride + r);
                match MODE {
                    PARTIAL => *out = sum,
                    _ if r >= tile.rows => {}
                    SUMS => *out = tile.finish.sum(tile.token + t, sum),
                    _ => *out.cast::<f32>() = tile.finish.value(tile.token + t, tile.row + r, sum),
                }
            }
        }
    }
}
