//! The register tile: `c [M, N vectors] = scale * a b (+ base)` over one block of k, for each
//! instruction set.
//!
//! Operands come in words of 32 bits. A word is one f32, or a pair of bf16 that are neighbours
//! along k; the loop is the same and only the multiply-add differs. b is packed, `N` vectors per
//! word of k, or lies in whole vectors as it is; a is read by strides, one word broadcast at a time, so a row-major a needs no packing.
//!
//! Every element of c is one chain of fused multiply-adds in the order of k, whatever the width of
//! the vectors: the f32 roads agree to the bit.

/// What the first block of k is added onto.
#[derive(Clone, Copy)]
pub(super) enum Base {
    Nothing,
    /// A row of n elements.
    Bias(*const f32),
    /// A matrix beside the result, its rows as far apart as the result's, and perhaps a row on top of it. The result
    /// is not read, and its lines go past the caches where `past` says so: whoever asks for that orders the writes
    /// with [`written`].
    Matrix {
        at: *const f32,
        row: Option<*const f32>,
        past: bool,
        /// Elements from a tile to the one that will want its lines some hundred cycles later.
        ahead: usize,
    },
    /// What the result holds already.
    Result,
}

impl Base {
    /// As seen from another element: `down` elements on by rows and `across` by columns.
    ///
    /// # Safety
    /// The base reaches that far.
    pub unsafe fn on(self, down: usize, across: usize) -> Self {
        // SAFETY: the caller's contract.
        unsafe {
            match self {
                Base::Bias(row) => Base::Bias(row.add(across)),
                Base::Matrix { at, row, past, ahead } => {
                    let row = row.map(|row| row.add(across));
                    Base::Matrix { at: at.add(down + across), row, past, ahead }
                }
                other => other,
            }
        }
    }
}

/// One register tile.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// Words of a: (i, p) lies at `a + i * a_row + p * a_k`.
    pub a: *const u32,
    pub a_row: usize,
    pub a_k: usize,
    /// Words of b: vector v of word p lies at `b + p * b_k + v * LANES`.
    pub b: *const u32,
    pub b_k: usize,
    pub words: usize,
    pub c: *mut f32,
    /// Elements from one row of c to the next.
    pub stride: usize,
    /// Elements of the last vector that exist in c, 1 to LANES.
    pub last: usize,
    pub scale: f32,
    pub base: Base,
}

/// A vector of f32 sums, and how words of a and b are multiplied onto it.
trait Lane {
    type V: Copy;
    /// Words of b.
    type W: Copy;
    const LANES: usize;
    unsafe fn zero() -> Self::V;
    unsafe fn words(at: *const u32) -> Self::W;
    unsafe fn broadcast(at: *const u32) -> Self::W;
    unsafe fn fma(sum: Self::V, a: Self::W, b: Self::W) -> Self::V;
    /// `sum * scale + base`, rounded once.
    unsafe fn onto(sum: Self::V, scale: f32, base: Self::V) -> Self::V;
    /// The first `count` elements at `at`; the others are zero.
    unsafe fn load(at: *const f32, count: usize) -> Self::V;
    unsafe fn store(at: *mut f32, v: Self::V, count: usize);
    unsafe fn sum(a: Self::V, b: Self::V) -> Self::V;
    /// All elements, past the caches; `at` is a multiple of the vector's size.
    unsafe fn stream(at: *mut f32, v: Self::V);
}

/// Orders what tiles wrote past the caches before whatever this thread does next.
pub(super) fn written() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a fence has no operands; SSE is part of x86_64.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// # Safety
/// The instruction set of `L` is there; the tile's a, b and c reach over M rows, N vectors and
/// `words` words, c exclusively.
#[inline(always)]
unsafe fn body<L: Lane, const M: usize, const N: usize>(t: &Tile) {
    // SAFETY: the caller's contract; every address below is one it names.
    unsafe {
        let mut sums = [[L::zero(); N]; M];
        let (mut a, mut b) = (t.a, t.b);
        let row = t.a_row;
        let past = matches!(t.base, Base::Matrix { past: true, .. });
        // The rows of c will be wanted when the loop ends; asking now hides the way to memory.
        for i in 0..M {
            for v in 0..N {
                let of = i * t.stride + v * L::LANES;
                if let Base::Matrix { at, ahead, .. } = t.base {
                    fetch(at.wrapping_add(of + ahead));
                }
                if !past {
                    fetch(t.c.wrapping_add(of));
                }
            }
        }
        for _ in 0..t.words {
            let mut bs = [L::words(b); N];
            for (v, bv) in bs.iter_mut().enumerate() {
                *bv = L::words(b.add(v * L::LANES));
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let av = L::broadcast(a.wrapping_add(i * row));
                for (sum, &bv) in sums.iter_mut().zip(&bs) {
                    *sum = L::fma(*sum, av, bv);
                }
            }
            a = a.wrapping_add(t.a_k);
            b = b.wrapping_add(t.b_k);
        }
        // All of the base before the first store: a load waits for stores to the same place of another page, and rows
        // often lie whole pages apart.
        for (i, sums) in sums.iter_mut().enumerate() {
            for (v, sum) in sums.iter_mut().enumerate() {
                let count = if v + 1 == N { t.last } else { L::LANES };
                let of = i * t.stride + v * L::LANES;
                let base = match t.base {
                    Base::Nothing => L::zero(),
                    Base::Bias(row) => L::load(row.add(v * L::LANES), count),
                    Base::Matrix { at, row, .. } => {
                        let base = L::load(at.add(of), count);
                        match row {
                            Some(row) => L::sum(base, L::load(row.add(v * L::LANES), count)),
                            None => base,
                        }
                    }
                    Base::Result => L::load(t.c.add(of), count),
                };
                *sum = L::onto(*sum, t.scale, base);
            }
        }
        let past = past && t.last == L::LANES && (t.c.addr() | (4 * t.stride)).is_multiple_of(4 * L::LANES);
        for (i, sums) in sums.iter().enumerate() {
            for (v, &sum) in sums.iter().enumerate() {
                let at = t.c.add(i * t.stride + v * L::LANES);
                match past {
                    true => L::stream(at, sum),
                    false => L::store(at, sum, if v + 1 == N { t.last } else { L::LANES }),
                }
            }
        }
    }
}

#[inline(always)]
fn fetch(at: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing and faults on no address; SSE is part of x86_64.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Plain Rust; `mul_add` keeps it equal to the vector roads to the bit.
struct Plain;

impl Lane for Plain {
    type V = [f32; 8];
    type W = [f32; 8];
    const LANES: usize = 8;
    #[inline(always)]
    unsafe fn zero() -> Self::V {
        [0.0; 8]
    }
    #[inline(always)]
    unsafe fn words(at: *const u32) -> Self::W {
        // SAFETY: the caller's contract: 8 words lie there.
        unsafe { at.cast::<[f32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn broadcast(at: *const u32) -> Self::W {
        // SAFETY: the caller's contract: a word lies there.
        unsafe { [at.cast::<f32>().read(); 8] }
    }
    #[inline(always)]
    unsafe fn fma(sum: Self::V, a: Self::W, b: Self::W) -> Self::V {
        std::array::from_fn(|i| a[i].mul_add(b[i], sum[i]))
    }
    #[inline(always)]
    unsafe fn onto(sum: Self::V, scale: f32, base: Self::V) -> Self::V {
        std::array::from_fn(|i| sum[i].mul_add(scale, base[i]))
    }
    #[inline(always)]
    unsafe fn load(at: *const f32, count: usize) -> Self::V {
        // SAFETY: the caller's contract: `count` elements lie there.
        std::array::from_fn(|i| if i < count { unsafe { *at.add(i) } } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn store(at: *mut f32, v: Self::V, count: usize) {
        // SAFETY: the caller's contract: `count` elements lie there.
        unsafe { std::ptr::copy_nonoverlapping(v.as_ptr(), at, count) }
    }
    #[inline(always)]
    unsafe fn sum(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn stream(at: *mut f32, v: Self::V) {
        // SAFETY: the caller's contract: 8 elements lie there.
        unsafe { at.cast::<[f32; 8]>().write_unaligned(v) }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Lane;
    use std::arch::x86_64::*;

    pub(super) struct Avx2;

    impl Lane for Avx2 {
        type V = __m256;
        type W = __m256;
        const LANES: usize = 8;
        #[inline(always)]
        unsafe fn zero() -> __m256 {
            // SAFETY: the caller's contract: AVX is there.
            unsafe { _mm256_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn words(at: *const u32) -> __m256 {
            // SAFETY: the caller's contract: 8 words lie there.
            unsafe { _mm256_loadu_ps(at.cast()) }
        }
        #[inline(always)]
        unsafe fn broadcast(at: *const u32) -> __m256 {
            // SAFETY: the caller's contract: a word lies there.
            unsafe { _mm256_set1_ps(at.cast::<f32>().read()) }
        }
        #[inline(always)]
        unsafe fn fma(sum: __m256, a: __m256, b: __m256) -> __m256 {
            // SAFETY: the caller's contract: FMA is there.
            unsafe { _mm256_fmadd_ps(a, b, sum) }
        }
        #[inline(always)]
        unsafe fn onto(sum: __m256, scale: f32, base: __m256) -> __m256 {
            // SAFETY: the caller's contract: FMA is there.
            unsafe { _mm256_fmadd_ps(sum, _mm256_set1_ps(scale), base) }
        }
        #[inline(always)]
        unsafe fn load(at: *const f32, count: usize) -> __m256 {
            // SAFETY: the caller's contract: `count` elements lie there, and no others are read.
            unsafe { _mm256_maskload_ps(at, mask(count)) }
        }
        #[inline(always)]
        unsafe fn store(at: *mut f32, v: __m256, count: usize) {
            // SAFETY: the caller's contract: `count` elements lie there, and no others are written.
            unsafe {
                if count == 8 {
                    _mm256_storeu_ps(at, v);
                } else {
                    _mm256_maskstore_ps(at, mask(count), v);
                }
            }
        }
        #[inline(always)]
        unsafe fn sum(a: __m256, b: __m256) -> __m256 {
            // SAFETY: the caller's contract: AVX is there.
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn stream(at: *mut f32, v: __m256) {
            // SAFETY: the caller's contract: 8 elements lie there, at a multiple of 32 bytes.
            unsafe { _mm256_stream_ps(at, v) }
        }
    }

    #[inline(always)]
    unsafe fn mask(count: usize) -> __m256i {
        // SAFETY: the caller's contract: AVX2 is there.
        unsafe {
            _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))
        }
    }

    /// AVX512F; with `PAIRS`, AVX512-BF16 and words that are pairs of bf16.
    pub(super) struct Avx512<const PAIRS: bool>;

    impl<const PAIRS: bool> Lane for Avx512<PAIRS> {
        type V = __m512;
        type W = __m512i;
        const LANES: usize = 16;
        #[inline(always)]
        unsafe fn zero() -> __m512 {
            // SAFETY: the caller's contract: AVX512F is there.
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn words(at: *const u32) -> __m512i {
            // SAFETY: the caller's contract: 16 words lie there.
            unsafe { _mm512_loadu_si512(at.cast()) }
        }
        #[inline(always)]
        unsafe fn broadcast(at: *const u32) -> __m512i {
            // SAFETY: the caller's contract: a word lies there, at any alignment.
            unsafe { _mm512_set1_epi32(at.cast::<i32>().read_unaligned()) }
        }
        #[inline(always)]
        unsafe fn fma(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
            // SAFETY: the caller's contract: AVX512F is there, with PAIRS also AVX512-BF16. The
            // two types of vector are the same 64 bytes.
            unsafe {
                if PAIRS {
                    _mm512_dpbf16_ps(
                        sum,
                        std::mem::transmute::<__m512i, __m512bh>(a),
                        std::mem::transmute::<__m512i, __m512bh>(b),
                    )
                } else {
                    _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum)
                }
            }
        }
        #[inline(always)]
        unsafe fn onto(sum: __m512, scale: f32, base: __m512) -> __m512 {
            // SAFETY: the caller's contract: AVX512F is there.
            unsafe { _mm512_fmadd_ps(sum, _mm512_set1_ps(scale), base) }
        }
        #[inline(always)]
        unsafe fn load(at: *const f32, count: usize) -> __m512 {
            // SAFETY: the caller's contract: `count` elements lie there, and no others are read.
            unsafe { _mm512_maskz_loadu_ps(mask16(count), at) }
        }
        #[inline(always)]
        unsafe fn store(at: *mut f32, v: __m512, count: usize) {
            // SAFETY: the caller's contract: `count` elements lie there, and no others are written.
            unsafe { _mm512_mask_storeu_ps(at, mask16(count), v) }
        }
        #[inline(always)]
        unsafe fn sum(a: __m512, b: __m512) -> __m512 {
            // SAFETY: the caller's contract: AVX512F is there.
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn stream(at: *mut f32, v: __m512) {
            // SAFETY: the caller's contract: 16 elements lie there, at a multiple of 64 bytes.
            unsafe { _mm512_stream_ps(at, v) }
        }
    }

    #[inline(always)]
    fn mask16(count: usize) -> u16 {
        (0xffff_u32 >> (16 - count)) as u16
    }
}

/// The ways this file can compute a tile.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Road {
    /// AVX512F, f32 words.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX512-BF16, words that are pairs.
    #[cfg(target_arch = "x86_64")]
    Avx512Pairs,
    /// AVX2 and FMA, f32 words.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Anything, f32 words.
    Plain,
}

impl Road {
    /// Whether `QTUNE_CPU` leaves it.
    pub fn allowed(self) -> bool {
        let most = crate::kernels::packed::Isa::allowed();
        match self {
            #[cfg(target_arch = "x86_64")]
            Road::Avx512 | Road::Avx512Pairs => most >= crate::kernels::packed::Isa::Avx512,
            #[cfg(target_arch = "x86_64")]
            Road::Avx2 => most >= crate::kernels::packed::Isa::Avx2,
            Road::Plain => true,
        }
    }

    /// Whether the features this road needs were detected.
    pub fn there(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Road::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Road::Avx512Pairs => Road::Avx512.there() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(target_arch = "x86_64")]
            Road::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Road::Plain => true,
        }
    }

    /// Elements of a vector.
    pub fn lanes(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Road::Avx512 | Road::Avx512Pairs => 16,
            _ => 8,
        }
    }

    /// Rows of the largest tile: with `vectors` of b they fill the registers.
    pub fn rows(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Road::Avx512 | Road::Avx512Pairs => 8,
            _ => 4,
        }
    }

    /// Vectors of the widest tile.
    pub fn vectors(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Road::Avx512 | Road::Avx512Pairs => 3,
            // 4 x 3 would fit 16 registers, but not as the compiler orders it: it spilled.
            _ => 2,
        }
    }

    /// Elements along k of one word.
    pub fn depth(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Road::Avx512Pairs => 2,
            _ => 1,
        }
    }
}

/// Computes a tile of `rows` by `vectors`.
///
/// # Safety
/// `road.there()`; `rows` and `vectors` are 1 to `road.rows()` and 1 to `road.vectors()`; the tile's
/// pointers are valid for that many rows, vectors and words, and c is written by nobody else.
#[inline]
pub(super) unsafe fn run(road: Road, rows: usize, vectors: usize, tile: &Tile) {
    macro_rules! sizes {
        ($f:ident; $($m:literal)*) => {
            match (rows, vectors) {
                $(($m, 1) => $f::<$m, 1>(tile), ($m, 2) => $f::<$m, 2>(tile),)*
                $(($m, 3) => $f::<$m, 3>(tile),)*
                _ => unreachable!("a tile of {rows} rows and {vectors} vectors"),
            }
        };
    }
    // SAFETY: the caller's contract.
    unsafe {
        match road {
            #[cfg(target_arch = "x86_64")]
            Road::Avx512 => sizes!(avx512; 1 2 3 4 5 6 7 8),
            #[cfg(target_arch = "x86_64")]
            Road::Avx512Pairs => sizes!(avx512_pairs; 1 2 3 4 5 6 7 8),
            #[cfg(target_arch = "x86_64")]
            Road::Avx2 => sizes!(avx2; 1 2 3 4),
            Road::Plain => sizes!(plain; 1 2 3 4),
        }
    }
}

macro_rules! compiled {
    ($(#[$meta:meta])* $name:ident, $lane:ty) => {
        /// # Safety
        /// As for [`body`].
        $(#[$meta])*
        unsafe fn $name<const M: usize, const N: usize>(t: &Tile) {
            // SAFETY: the caller's contract, and the features enabled here.
            unsafe { body::<$lane, M, N>(t) }
        }
    };
}

compiled!(
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
    avx512,
    x86::Avx512<false>
);
compiled!(
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma")]
    avx512_pairs,
    x86::Avx512<true>
);
compiled!(
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    avx2,
    x86::Avx2
);
compiled!(plain, Plain);
