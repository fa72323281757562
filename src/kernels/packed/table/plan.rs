//! How a product is cut into tasks. No result depends on the cut, so it may follow the number of threads.

use std::ops::Range;

/// Weights that stay in the second-level cache beside everything else.
const NEAR: usize = 256 << 10;

/// Blocks for each thread: enough that one which comes late, or is held up, leaves its share to the others.
const BLOCKS: usize = 4;

/// Tiles of a block, about, that stay in the caches.
const MOST: usize = 8;

/// Tokens cut into blocks of whole tiles, nearly even.
pub(super) struct Plan {
    tokens: usize,
    tile: usize,
    blocks: usize,
}

impl Plan {
    pub(super) fn new(tokens: usize, rows: usize, weight_bytes: usize, tile: usize, threads: usize) -> Self {
        let tiles = if rows == 0 { 0 } else { tokens.div_ceil(tile) };
        // A block reads all the weights once; where they come from afar it should be worth it.
        let worth = if weight_bytes <= NEAR { 3 } else { 12 };
        // Blocks cost a little each, so there are no more than even out the threads; nor do they outgrow the caches.
        let blocks = tiles.div_ceil(worth).min((BLOCKS * threads).max(tiles.div_ceil(MOST)));
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
            for (tile, threads) in [(4, 1), (6, 2), (8, 3), (4, 16)] {
                let plan = Plan::new(tokens, rows, bytes, tile, threads);
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
