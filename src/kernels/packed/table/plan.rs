//! How a product is cut into tasks: by its shapes alone, so that the cut is the same for any number of threads.

use std::ops::Range;

/// Weights that stay in the second-level cache beside everything else.
const NEAR: usize = 256 << 10;

/// Tokens cut into blocks of whole tiles, nearly even.
pub(super) struct Plan {
    tokens: usize,
    tile: usize,
    blocks: usize,
}

impl Plan {
    pub(super) fn new(tokens: usize, rows: usize, weight_bytes: usize, tile: usize) -> Self {
        let tiles = if rows == 0 { 0 } else { tokens.div_ceil(tile) };
        // A block reads all the weights once; where they come from afar it should be worth it.
        let worth = if weight_bytes <= NEAR { 2 } else { 8 };
        let blocks = tiles.div_ceil(worth);
        // Two or four threads get alike where there are enough.
        let blocks = if blocks > 4 { blocks / 4 * 4 } else { blocks };
        Plan { tokens, tile, blocks }
    }

    pub(super) fn blocks(&self) -> usize {
        self.blocks
    }

    pub(super) fn tokens(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let tiles = self.tokens.div_ceil(self.tile);
        (0..self.blocks).map(move |block| {
            let edge = |block: usize| (block * tiles / self.blocks * self.tile).min(self.tokens);
            edge(block)..edge(block + 1)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_the_tokens_in_order() {
        for (tokens, rows, bytes) in
            [(0, 4, 64), (5, 0, 64), (1, 4, 64), (197, 576, 1 << 15), (512, 4096, 6 << 20)]
        {
            for tile in [4, 6, 8] {
                let plan = Plan::new(tokens, rows, bytes, tile);
                let mut next = 0;
                for range in plan.tokens() {
                    assert_eq!(range.start, next);
                    assert!(!range.is_empty());
                    next = range.end;
                }
                assert_eq!(next, if rows == 0 { 0 } else { tokens });
            }
        }
    }
}
