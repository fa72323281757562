//! The inner product of [`super`]: a tile of 8, 16 or 24 rows and 8 columns, whose sums stay in registers.
//!
//! Each number of a tile is one chain of fused multiply-adds, in the order of the vectors, whatever the tile's height
//! and whether a register holds four numbers or eight: both instruction sets give the same bytes. Only the plain
//! road rounds each product by itself.

use crate::kernels::packed::Isa;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Rows of a packed panel: three registers of eight numbers.
pub(super) const TALL: usize = 24;
/// Columns of a tile, and the step of its height.
pub(super) const WIDE: usize = 8;
/// How many vectors ahead of its multiplications a panel is fetched.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 8;

/// `c[i + lead j] += sum over k of a[i + 24 k] b[j + 24 k]`, for `rows` numbers i (8, 16 or 24), 8 numbers j and
/// `depth` numbers k, at least one.
pub(super) struct Tile<'a> {
    /// The rows' panel, from the first row of the tile on.
    pub a: &'a [f64],
    /// The columns' panel, from the first column of the tile on.
    pub b: &'a [f64],
    /// How many vectors.
    pub depth: usize,
    /// How many rows.
    pub rows: usize,
    /// What is added to, from the tile's first number on.
    pub c: &'a mut [f64],
    /// From one column of `c` to the next.
    pub lead: usize,
}

impl Tile<'_> {
    /// Adds the tile.
    pub fn add(self, isa: Isa) {
        assert!((1..=self.a.len()).contains(&self.depth) && self.lead <= self.c.len(), "no such tile");
        let before = (self.depth - 1) * TALL;
        assert!(matches!(self.rows, 8 | 16 | 24), "a tile has the rows of one, two or three registers");
        assert!(self.a.len() >= before + self.rows && self.b.len() >= before + WIDE, "a panel is short");
        assert!(self.lead >= self.rows && self.c.len() >= (WIDE - 1) * self.lead + self.rows, "c is short");
        match isa.usable() {
            // SAFETY: `usable` gives a set that the machine has; the lengths that `by_eight` asks for were checked.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe {
                match self.rows {
                    24 => by_eight::<3>(self),
                    16 => by_eight::<2>(self),
                    _ => by_eight::<1>(self),
                }
            },
            // SAFETY: as above, for `by_four`; a tile has the columns 0 to 7.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe {
                let mut tile = self;
                for j in (0..WIDE).step_by(2) {
                    match tile.rows {
                        24 => by_four::<6>(&mut tile, j),
                        16 => by_four::<4>(&mut tile, j),
                        _ => by_four::<2>(&mut tile, j),
                    }
                }
            },
            _ => plain(self),
        }
    }
}

/// A tile of 8 V rows.
///
/// # Safety
/// `a` has `24 (depth - 1) + 8 V` numbers, `b` has `24 (depth - 1) + 8` and `c` has `7 lead + 8 V`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn by_eight<const V: usize>(t: Tile) {
    let (a, b, c) = (t.a.as_ptr(), t.b.as_ptr(), t.c.as_mut_ptr());
    let mut sums = [[_mm512_setzero_pd(); V]; WIDE];
    // SAFETY: the numbers are there, as the caller says; what is fetched ahead may lie outside, and is not read.
    unsafe {
        // They come while the sums are made.
        for j in 0..WIDE {
            for v in 0..V {
                _mm_prefetch::<_MM_HINT_T0>(c.add(j * t.lead + 8 * v).cast());
            }
        }
        for k in 0..t.depth {
            let (a, b) = (a.add(k * TALL), b.add(k * TALL));
            let mut column = [_mm512_setzero_pd(); V];
            for (v, column) in column.iter_mut().enumerate() {
                *column = _mm512_loadu_pd(a.add(8 * v));
                _mm_prefetch::<_MM_HINT_T0>(a.wrapping_add(AHEAD * TALL + 8 * v).cast());
            }
            for (j, sums) in sums.iter_mut().enumerate() {
                let b = _mm512_set1_pd(*b.add(j));
                for (sum, &a) in sums.iter_mut().zip(&column) {
                    *sum = _mm512_fmadd_pd(a, b, *sum);
                }
            }
        }
        for (j, sums) in sums.iter().enumerate() {
            for (v, &sum) in sums.iter().enumerate() {
                let c = c.add(j * t.lead + 8 * v);
                _mm512_storeu_pd(c, _mm512_add_pd(_mm512_loadu_pd(c), sum));
            }
        }
    }
}

/// Two columns from `j` on of a tile of 4 V rows.
///
/// # Safety
/// `j` is at most 6; `a` has `24 (depth - 1) + 4 V` numbers, `b` has `24 (depth - 1) + 8` and `c` has `7 lead + 4 V`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn by_four<const V: usize>(t: &mut Tile, j: usize) {
    let mut sums = [[_mm256_setzero_pd(); 2]; V];
    // SAFETY: the numbers are there, as the caller says.
    unsafe {
        let (a, b, c) = (t.a.as_ptr(), t.b.as_ptr().add(j), t.c.as_mut_ptr().add(j * t.lead));
        for k in 0..t.depth {
            let (a, b) = (a.add(k * TALL), b.add(k * TALL));
            let pair = [_mm256_set1_pd(*b), _mm256_set1_pd(*b.add(1))];
            for (v, sums) in sums.iter_mut().enumerate() {
                let a = _mm256_loadu_pd(a.add(4 * v));
                for (sum, b) in sums.iter_mut().zip(pair) {
                    *sum = _mm256_fmadd_pd(a, b, *sum);
                }
            }
        }
        for (v, sums) in sums.iter().enumerate() {
            for (s, &sum) in sums.iter().enumerate() {
                let c = c.add(s * t.lead + 4 * v);
                _mm256_storeu_pd(c, _mm256_add_pd(_mm256_loadu_pd(c), sum));
            }
        }
    }
}

/// A tile by parts of 4 x 4, without fused multiply-adds: where they are no instruction they are slow.
fn plain(t: Tile) {
    for (i, j) in (0..t.rows).step_by(4).flat_map(|i| [(i, 0), (i, 4)]) {
        let mut sums = [[0f64; 4]; 4];
        for k in 0..t.depth {
            let (a, b) = (&t.a[k * TALL + i..][..4], &t.b[k * TALL + j..][..4]);
            for (sums, b) in sums.iter_mut().zip(b) {
                sums.iter_mut().zip(a).for_each(|(sum, a)| *sum += a * b);
            }
        }
        for (s, sums) in sums.iter().enumerate() {
            t.c[(j + s) * t.lead + i..][..4].iter_mut().zip(sums).for_each(|(c, sum)| *c += sum);
        }
    }
}
