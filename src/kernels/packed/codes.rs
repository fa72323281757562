//! Activation codes as bytes: what an integer product reads from the left.
//!
//! A code `k` of the range `lo ..= hi` is kept as the field `k - lo`, one unsigned byte whatever the grid is,
//! since the dot products of bytes that processors have want one operand unsigned.

/// Rows lie a multiple of this apart, so that a kernel may read past their last code: what it reads there meets
/// zeros of the other operand.
const ALIGN: usize = 64;

/// Rows of codes, `[tokens, cols]`, with the sum of each row. Reused from one product to the next.
#[derive(Clone, Debug, Default)]
pub struct Codes {
    fields: Vec<u8>,
    sums: Vec<i32>,
    tokens: usize,
    cols: usize,
    lo: i32,
}

/// Bytes from one row of `cols` codes to the next.
pub fn code_stride(cols: usize) -> usize {
    cols.next_multiple_of(ALIGN)
}

/// Bytes of a buffer for `tokens` rows of `cols` codes: a kernel reads up to a vector past a row's last code.
pub fn codes_len(tokens: usize, cols: usize) -> usize {
    tokens * code_stride(cols) + ALIGN
}

impl Codes {
    /// Makes room for `tokens` rows of `cols` codes that start at `lo`. The rows, and what fills them up, hold
    /// anything; sums are zero.
    pub fn reset(&mut self, tokens: usize, cols: usize, lo: i32) {
        let len = codes_len(tokens, cols);
        if self.fields.len() < len {
            self.fields.resize(len, 0);
        }
        self.sums.clear();
        self.sums.resize(tokens, 0);
        (self.tokens, self.cols, self.lo) = (tokens, cols, lo);
    }

    /// The fields of some columns of a row, and the row's sum, to which what writes them adds.
    pub fn row_mut(&mut self, token: usize, columns: std::ops::Range<usize>) -> (&mut [u8], &mut i32) {
        assert!(columns.end <= self.cols, "columns {columns:?} of {}", self.cols);
        let at = token * code_stride(self.cols);
        (&mut self.fields[at + columns.start..at + columns.end], &mut self.sums[token])
    }

    /// The first `width` fields of a row, what fills it up included, and its sum.
    pub fn filled_row_mut(&mut self, token: usize, width: usize) -> (&mut [u8], &mut i32) {
        let stride = code_stride(self.cols);
        assert!(width <= stride, "{width} fields in a row of {stride}");
        (&mut self.fields[token * stride..token * stride + width], &mut self.sums[token])
    }

    /// All rows.
    pub fn view(&self) -> CodesRef<'_> {
        CodesRef {
            fields: &self.fields,
            stride: code_stride(self.cols),
            tokens: self.tokens,
            cols: self.cols,
            lo: self.lo,
            sums: &self.sums,
        }
    }
}

/// Rows of codes that lie in somebody else's buffer.
#[derive(Clone, Copy, Debug)]
pub struct CodesRef<'a> {
    /// Field `c` of token `t` lies at `t * stride + c`.
    pub fields: &'a [u8],
    /// Bytes from one token to the next.
    pub stride: usize,
    /// Rows.
    pub tokens: usize,
    /// Codes of a row.
    pub cols: usize,
    /// The lowest code: a code is its field and this.
    pub lo: i32,
    /// The sum of each row's codes. May be empty where the other operand's levels have no half offset.
    pub sums: &'a [i32],
}

impl<'a> CodesRef<'a> {
    /// Rows from `fields`, without their sums.
    pub fn new(fields: &'a [u8], stride: usize, tokens: usize, cols: usize, lo: i32) -> Self {
        CodesRef { fields, stride, tokens, cols, lo, sums: &[] }
    }

    /// The fields of one row.
    pub fn row(&self, token: usize) -> &'a [u8] {
        &self.fields[token * self.stride..token * self.stride + self.cols]
    }

    /// Whether the buffer holds so many bytes of every row.
    pub(super) fn holds(&self, width: usize) -> bool {
        let end = |rows: usize| rows.checked_mul(self.stride)?.checked_add(width);
        self.tokens == 0 || end(self.tokens - 1).is_some_and(|end| end <= self.fields.len())
    }

    /// Whether the buffer holds all rows.
    pub(super) fn fits(&self) -> bool {
        self.holds(self.cols)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_lie_apart_and_keep_their_sums() {
        let mut codes = Codes::default();
        for (tokens, cols) in [(3, 5), (2, 65), (4, 65), (1, 1)] {
            codes.reset(tokens, cols, -2);
            for t in 0..tokens {
                let (fields, sum) = codes.row_mut(t, 0..cols);
                assert_eq!((fields.len(), *sum), (cols, 0));
                fields.fill(t as u8 + 1);
                *sum += 7;
            }
            let view = codes.view();
            assert!(view.fits() && view.sums == vec![7; tokens]);
            for t in 0..tokens {
                assert!(view.row(t).iter().all(|&u| u == t as u8 + 1));
            }
        }
    }
}
