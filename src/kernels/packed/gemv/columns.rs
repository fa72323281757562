//! How the columns of a row fall into groups that share a step, and into blocks that a kernel takes at once.
//!
//! A block has at most 64 columns, all of one group, so a group that is no multiple of 64 wide ends in a shorter
//! block. In the tiles of a fast kernel, and in an activation row made for it, such a block is filled up to 64
//! columns with zero activations. That costs less than twice the memory for groups of 32 and more; smaller
//! groups are not filled up, and only the plain road takes them.

use std::ops::Range;

/// Columns of a block.
pub const BLOCK: usize = 64;

/// The columns of a row, in groups and blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Columns {
    cols: usize,
    group: usize,
    stride: usize,
}

impl Columns {
    /// Groups of `group` of `cols` columns, the last what is left; one group where `group >= cols`.
    pub fn new(cols: usize, group: usize) -> Self {
        let whole = group >= cols;
        let group = group.clamp(1, cols.max(1));
        let stride = if whole || group >= BLOCK / 2 { BLOCK } else { group };
        Columns { cols, group, stride }
    }

    /// Columns of a row.
    pub fn cols(self) -> usize {
        self.cols
    }

    /// Groups of a row, at least one.
    pub fn groups(self) -> usize {
        self.cols.div_ceil(self.group).max(1)
    }

    /// Blocks of a row.
    pub fn blocks(self) -> usize {
        self.blocks_of(self.groups() - 1).end
    }

    /// The blocks of a group.
    pub fn blocks_of(self, group: usize) -> Range<usize> {
        let from = group * self.group.div_ceil(BLOCK);
        let width = self.group.min(self.cols - group * self.group);
        from..from + width.div_ceil(BLOCK)
    }

    /// The group of a block.
    pub fn group_of(self, block: usize) -> usize {
        block / self.group.div_ceil(BLOCK)
    }

    /// Columns that a block takes up in a prepared activation row, filled up or not.
    pub fn stride(self) -> usize {
        self.stride
    }

    /// Whether blocks take up 64 columns, as the tiles of the fast kernels want.
    pub fn tiled(self) -> bool {
        self.stride == BLOCK
    }

    /// For each block in order, its columns.
    pub fn ranges(self) -> impl Iterator<Item = Range<usize>> {
        (0..self.groups()).flat_map(move |group| {
            let first = group * self.group;
            let end = self.cols.min(first + self.group);
            (first..end).step_by(BLOCK).map(move |from| from..end.min(from + BLOCK))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_never_cross_groups() {
        let columns = Columns::new(300, 100);
        let ranges: Vec<_> = columns.ranges().collect();
        assert_eq!(ranges, [0..64, 64..100, 100..164, 164..200, 200..264, 264..300]);
        assert_eq!((columns.groups(), columns.blocks(), columns.blocks_of(1)), (3, 6, 2..4));
        assert!(columns.tiled());
        assert!(!Columns::new(300, 31).tiled());
        assert!(Columns::new(5, 5).tiled());
    }

    #[test]
    fn counts_agree_with_ranges() {
        for cols in [0, 1, 3, 63, 64, 65, 130, 197, 4096] {
            for group in [1, 3, 31, 32, 64, 100, 128, usize::MAX] {
                let columns = Columns::new(cols, group);
                assert_eq!(columns.ranges().count(), columns.blocks(), "{cols} by {group}");
                let end = (0..columns.groups()).fold(0, |at, g| {
                    assert_eq!(columns.blocks_of(g).start, at);
                    assert!(columns.blocks_of(g).all(|block| columns.group_of(block) == g));
                    columns.blocks_of(g).end
                });
                assert_eq!(end, columns.blocks());
            }
        }
    }
}
