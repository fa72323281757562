//! What the CPU bodies share: the element types, the choice between kernel and reference, fixed
//! chunking, and loops compiled once per instruction set.

use super::arithmetic::arithmetic;
use super::general;
use super::product::{self, View};
use candle_core::{bail, CpuStorage, DType, Layout, Result, Storage, Tensor, WithDType};
use rayon::prelude::*;

/// Elements per unit of parallel work. Part of the numerics: partial sums follow these borders.
pub(super) const GRAIN: usize = 1 << 14;

/// Rows of `width` elements per unit of parallel work; a function of the shape alone.
pub(super) fn chunk_rows(width: usize) -> usize {
    (GRAIN / width.max(1)).max(1)
}

/// A place for `count` results. Zeros would be written first and then written over: a pass over memory for nothing.
///
/// The caller writes every element before it reads one.
#[allow(clippy::uninit_vec)]
pub(super) fn unwritten<T: Real>(count: usize) -> Vec<T> {
    let mut elements = Vec::with_capacity(count);
    // SAFETY: the capacity is `count`; T is f32 or f64, of which every bit pattern is a value, and the callers, all
    // in this room, write each element before they read it.
    unsafe { elements.set_len(count) };
    elements
}

/// Rows of a product below which packing the other operand costs more than it gives.
const FEW: usize = 8;

/// Independent accumulators of a sum over a row. Part of the numerics, like [`GRAIN`].
const LANES: usize = 16;

/// The element types that have a CPU body.
pub(super) trait Real: WithDType {
    const ZERO: Self;
    const ONE: Self;
    /// `self * a + b`, rounded once.
    fn fma(self, a: Self, b: Self) -> Self;
    fn sqrt(self) -> Self;
    fn ln(self) -> Self;
    fn abs(self) -> Self;
    fn is_nan(self) -> bool;
    /// Round half to even.
    fn rne(self) -> Self;
    /// `e^self` for `self <= 0`; NaN stays NaN.
    fn exp_nonpos(self) -> Self;
    /// The error function; NaN stays NaN.
    fn error_function(self) -> Self;
    /// `dst [m, n] = scale a b`, or added onto it, on one thread, its rows `stride` apart.
    #[allow(clippy::too_many_arguments)]
    fn product(
        sizes: (usize, usize, usize),
        dst: &mut [Self],
        stride: usize,
        a: View<Self>,
        b: View<Self>,
        scale: Self,
        add: bool,
    ) {
        general::product(sizes, dst, stride, a, b, scale, add);
    }
    /// `a b (+ bias)`, row-major, on all threads.
    fn matmul(
        sizes: (usize, usize, usize),
        a: View<Self>,
        b: View<Self>,
        bias: Option<&[Self]>,
    ) -> Vec<Self> {
        general::matmul(sizes, a, b, bias)
    }
    /// A storage of these elements.
    fn store(elements: Vec<Self>) -> CpuStorage {
        Self::to_cpu_storage_owned(elements)
    }
    /// All elements of a storage, if they are of this type.
    fn elements_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
    /// The elements of a contiguous storage.
    fn slice<'a>(op: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [Self]> {
        let Some((from, to)) = layout.contiguous_offsets() else {
            bail!("{op}: expected contiguous elements, got strides {:?}", layout.stride())
        };
        Ok(&Self::cpu_storage_as_slice(storage)?[from..to])
    }
}

impl Real for f32 {
    const ZERO: f32 = 0.0;
    const ONE: f32 = 1.0;
    fn elements_mut(storage: &mut CpuStorage) -> Option<&mut [f32]> {
        match storage {
            CpuStorage::F32(elements) => Some(elements),
            _ => None,
        }
    }
    #[inline(always)]
    fn fma(self, a: f32, b: f32) -> f32 {
        self.mul_add(a, b)
    }
    #[inline(always)]
    fn sqrt(self) -> f32 {
        f32::sqrt(self)
    }
    #[inline(always)]
    fn ln(self) -> f32 {
        f32::ln(self)
    }
    #[inline(always)]
    fn abs(self) -> f32 {
        f32::abs(self)
    }
    #[inline(always)]
    fn is_nan(self) -> bool {
        f32::is_nan(self)
    }
    #[inline(always)]
    fn rne(self) -> f32 {
        self.round_ties_even()
    }
    fn product(
        sizes: (usize, usize, usize),
        dst: &mut [f32],
        stride: usize,
        a: View<f32>,
        b: View<f32>,
        scale: f32,
        add: bool,
    ) {
        match sizes.0 < FEW {
            true => general::product(sizes, dst, stride, a, b, scale, add),
            false => product::product(arithmetic(), sizes, dst, stride, a, b, scale, add),
        }
    }
    fn matmul(sizes: (usize, usize, usize), a: View<f32>, b: View<f32>, bias: Option<&[f32]>) -> Vec<f32> {
        match sizes.0 < FEW {
            true => general::matmul(sizes, a, b, bias),
            false => product::matmul(arithmetic(), sizes, a, b, bias),
        }
    }
    /// Cody and Waite reduction, then the Cephes polynomial; below -87 the result is 0.
    #[inline(always)]
    fn exp_nonpos(self) -> f32 {
        // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
        const MAGIC: f32 = 12_582_912.0;
        const LN2_HI: f32 = 0.693_359_4;
        const LN2_LO: f32 = -2.121_944_4e-4;
        // Comparisons, not `max`: a NaN must come out as one.
        let x = if self < -87.0 { -87.0 } else { self };
        let shifted = x.mul_add(std::f32::consts::LOG2_E, MAGIC);
        let n = shifted - MAGIC;
        let r = n.mul_add(-LN2_LO, n.mul_add(-LN2_HI, x));
        let mut p = 1.987_569_1e-4f32;
        p = p.mul_add(r, 1.398_2e-3);
        p = p.mul_add(r, 8.333_452e-3);
        p = p.mul_add(r, 4.166_579_6e-2);
        p = p.mul_add(r, 1.666_666_5e-1);
        p = p.mul_add(r, 0.5);
        let e = p.mul_add(r * r, r) + 1.0;
        let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
        if self < -87.0 {
            0.0
        } else {
            e * power
        }
    }
    /// Two polynomials of N. Juffa's (one in x^2 near 0, one for log(1 - erf)), both within an ulp.
    #[inline(always)]
    fn error_function(self) -> f32 {
        let t = f32::abs(self);
        // erf(4) rounds to 1.
        let t = if t > 4.0 { 4.0 } else { t };
        let s = t * t;
        let mut far = (-1.728_534_7e-5f32).mul_add(t, 3.831_971_3e-4);
        let u = (-3.883_964_4e-3f32).mul_add(t, 2.425_462_2e-2);
        far = far.mul_add(s, u);
        far = far.mul_add(t, -1.067_777_9e-1);
        far = far.mul_add(t, -6.348_468_7e-1);
        far = far.mul_add(t, -1.287_175_1e-1);
        far = far.mul_add(t, -t);
        let far = 1.0 - far.exp_nonpos();
        let mut near = -5.967_617e-4f32;
        near = near.mul_add(s, 4.991_194e-3);
        near = near.mul_add(s, -2.676_813_5e-2);
        near = near.mul_add(s, 1.128_199_2e-1);
        near = near.mul_add(s, -3.761_253_4e-1);
        near = near.mul_add(s, 1.283_791_7e-1);
        let near = near.mul_add(t, t);
        let magnitude = if t > 0.927_734_4 { far } else { near };
        magnitude.copysign(self)
    }
}

impl Real for f64 {
    const ZERO: f64 = 0.0;
    const ONE: f64 = 1.0;
    fn elements_mut(storage: &mut CpuStorage) -> Option<&mut [f64]> {
        match storage {
            CpuStorage::F64(elements) => Some(elements),
            _ => None,
        }
    }
    #[inline(always)]
    fn fma(self, a: f64, b: f64) -> f64 {
        self.mul_add(a, b)
    }
    #[inline(always)]
    fn sqrt(self) -> f64 {
        f64::sqrt(self)
    }
    #[inline(always)]
    fn ln(self) -> f64 {
        f64::ln(self)
    }
    #[inline(always)]
    fn abs(self) -> f64 {
        f64::abs(self)
    }
    #[inline(always)]
    fn is_nan(self) -> bool {
        f64::is_nan(self)
    }
    #[inline(always)]
    fn rne(self) -> f64 {
        self.round_ties_even()
    }
    #[inline(always)]
    fn exp_nonpos(self) -> f64 {
        self.exp()
    }
    #[inline(always)]
    fn error_function(self) -> f64 {
        candle_core::cpu::erf::erf_f64(self)
    }
}

/// Runs `$body` with `$t` bound to the element type of a float storage.
macro_rules! real {
    ($op:expr, $storage:expr, $t:ident => $body:expr) => {
        match $storage {
            candle_core::CpuStorage::F32(_) => {
                type $t = f32;
                $body
            }
            candle_core::CpuStorage::F64(_) => {
                type $t = f64;
                $body
            }
            _ => candle_core::bail!("{}: expected elements of f32 or f64", $op),
        }
    };
}
pub(super) use real;

/// The instruction sets a loop is compiled for.
#[derive(Clone, Copy)]
pub(super) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Baseline,
}

/// The best instruction set of this machine (the standard library caches the detection).
#[inline]
pub(super) fn isa() -> Isa {
    #[cfg(target_arch = "x86_64")]
    {
        let allowed = super::packed::Isa::allowed();
        if allowed >= super::packed::Isa::Avx512
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
        {
            return Isa::Avx512;
        }
        if allowed >= super::packed::Isa::Avx2
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
        {
            return Isa::Avx2;
        }
    }
    Isa::Baseline
}

/// Defines a function over slices whose body is compiled per instruction set and chosen at run
/// time. The body is plain Rust in a fixed order, so its value does not depend on the choice.
macro_rules! simd {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<T>($($arg:ident : $ty:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name<T: $crate::kernels::cpu::Real>($($arg: $ty),*) {
            #[inline(always)]
            fn body<T: $crate::kernels::cpu::Real>($($arg: $ty),*) $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512dq,avx512vl,avx2,fma")]
            fn avx512<T: $crate::kernels::cpu::Real>($($arg: $ty),*) {
                body::<T>($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2<T: $crate::kernels::cpu::Real>($($arg: $ty),*) {
                body::<T>($($arg),*)
            }
            match $crate::kernels::cpu::isa() {
                // SAFETY: `isa` returned Avx512 only after detecting every feature enabled there.
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::cpu::Isa::Avx512 => unsafe { avx512::<T>($($arg),*) },
                // SAFETY: `isa` returned Avx2 only after detecting avx2 and fma.
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::cpu::Isa::Avx2 => unsafe { avx2::<T>($($arg),*) },
                $crate::kernels::cpu::Isa::Baseline => body::<T>($($arg),*),
            }
        }
    };
}
pub(super) use simd;

/// Sum of a row in a fixed order: lane by lane, then pairwise.
#[inline(always)]
pub(super) fn sum<T: Real>(x: &[T]) -> T {
    let mut lanes = [T::ZERO; LANES];
    let blocks = x.chunks_exact(LANES);
    let tail = blocks.remainder();
    for block in blocks {
        for (lane, &v) in lanes.iter_mut().zip(block) {
            *lane += v;
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(tail) {
        *lane += v;
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            let other = lanes[i + half];
            lanes[i] += other;
        }
        half /= 2;
    }
    lanes[0]
}

/// Sum of products of two rows, in the order of [`sum`].
#[inline(always)]
pub(super) fn dot<T: Real>(x: &[T], y: &[T]) -> T {
    let y = &y[..x.len()];
    let mut lanes = [T::ZERO; LANES];
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let (xt, yt) = (xs.remainder(), ys.remainder());
    for (xb, yb) in xs.zip(ys) {
        for i in 0..LANES {
            lanes[i] = xb[i].fma(yb[i], lanes[i]);
        }
    }
    for i in 0..xt.len() {
        lanes[i] = xt[i].fma(yt[i], lanes[i]);
    }
    sum(&lanes)
}

/// The largest element; NaN is skipped here and surfaces in what is computed from the row.
#[inline(always)]
pub(super) fn max<T: Real>(x: &[T]) -> T {
    let mut lanes = [T::from_f64(f64::NEG_INFINITY); LANES];
    let blocks = x.chunks_exact(LANES);
    let tail = blocks.remainder();
    for block in blocks {
        for (lane, &v) in lanes.iter_mut().zip(block) {
            *lane = if v > *lane { v } else { *lane };
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(tail) {
        *lane = if v > *lane { v } else { *lane };
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            let other = lanes[i + half];
            lanes[i] = if other > lanes[i] { other } else { lanes[i] };
        }
        half /= 2;
    }
    lanes[0]
}

simd! {
    /// Adds each row of `x` onto `sums`.
    pub(super) fn add_rows<T>(x: &[T], sums: &mut [T]) {
        let width = sums.len();
        for row in x.chunks_exact(width) {
            for (s, &v) in sums.iter_mut().zip(row) {
                *s += v;
            }
        }
    }
}

/// Sums over the leading dimensions of `x [rows, width]`, partial sums combined in index order.
pub(super) fn column_sums<T: Real>(x: &[T], width: usize) -> Vec<T> {
    if width == 0 || x.is_empty() {
        return vec![T::ZERO; width];
    }
    let step = chunk_rows(width) * width;
    let mut partial = vec![T::ZERO; x.len().div_ceil(step) * width];
    partial.par_chunks_mut(width).zip(x.par_chunks(step)).for_each(|(sums, rows)| add_rows(rows, sums));
    fold(&partial, width)
}

/// Adds partial sums `[parts, width]` in index order, in f64.
pub(super) fn fold<T: Real>(partial: &[T], width: usize) -> Vec<T> {
    let mut total = vec![0f64; width];
    if width > 0 {
        for part in partial.chunks_exact(width) {
            for (t, v) in total.iter_mut().zip(part) {
                *t += v.to_f64();
            }
        }
    }
    total.into_iter().map(T::from_f64).collect()
}

/// How an op is computed for the tensors at hand.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Road {
    /// The op's body for the device.
    Kernel,
    /// Through f32 and back.
    ThroughF32,
    /// Plain candle ops.
    Reference,
}

/// Checks that the named tensors share one float dtype and one device, and chooses the road.
pub(super) fn road(op: &str, tensors: &[(&str, &Tensor)]) -> Result<Road> {
    let (first, lead) = tensors[0];
    for (name, t) in tensors {
        if t.dtype() != lead.dtype() {
            bail!("{op}: expected {name} in {:?} as {first} is, got {:?}", lead.dtype(), t.dtype())
        }
        if !t.device().same_device(lead.device()) {
            bail!(
                "{op}: expected {name} on {:?} as {first} is, got {:?}",
                lead.device().location(),
                t.device().location()
            )
        }
    }
    match lead.dtype() {
        DType::F16 | DType::BF16 => Ok(Road::ThroughF32),
        DType::F32 | DType::F64 if lead.device().is_cpu() => Ok(Road::Kernel),
        DType::F32 | DType::F64 => Ok(Road::Reference),
        other => bail!("{op}: expected {first} in f16, bf16, f32 or f64, got {other:?}"),
    }
}

/// As [`road`], for an op with a CUDA body, which takes f32, f16 and bf16 as they are.
pub(super) fn road_with_cuda(op: &str, tensors: &[(&str, &Tensor)]) -> Result<Road> {
    let road = road(op, tensors)?;
    let (_, lead) = tensors[0];
    Ok(match lead.device().is_cuda() && lead.dtype() != DType::F64 {
        true => Road::Kernel,
        false => road,
    })
}

/// The CPU storage behind a tensor that an op carries along.
pub(super) fn host<'a>(op: &str, storage: &'a Storage) -> Result<&'a CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => bail!("{op}: expected a tensor on the CPU"),
    }
}

/// The f32 form of a half-precision operand.
pub(super) fn wide(t: &Tensor) -> Result<Tensor> {
    t.to_dtype(DType::F32)
}

/// Part `[from, from + shape)` of a flat packed result, in its shape, without a copy.
pub(super) fn unpack(packed: &Tensor, from: usize, shape: &candle_core::Shape) -> Result<Tensor> {
    packed.narrow(0, from, shape.elem_count())?.reshape(shape)
}

#[cfg(test)]
mod tests {
    use super::*;

    simd! {
        fn functions<T>(x: &[T], e: &mut [T], f: &mut [T]) {
            for i in 0..x.len() {
                e[i] = (T::ZERO - x[i].abs()).exp_nonpos();
                f[i] = x[i].error_function();
            }
        }
    }

    /// Relative error of exp: the polynomial's 1e-7 and two roundings.
    const EXP: f64 = 2e-7;
    /// Error of erf, relative to its value: one ulp and the exp's share.
    const ERF: f64 = 2e-7;

    #[test]
    fn exp_and_erf_follow_libm() {
        let x: Vec<f32> =
            (-868_000..=868_000).map(|i| i as f32 * 1e-4).chain([-0.0, 1e-30, -1e-30]).collect();
        let (mut e, mut f) = (vec![0f32; x.len()], vec![0f32; x.len()]);
        functions(&x, &mut e, &mut f);
        for ((&x, e), f) in x.iter().zip(e).zip(f) {
            let want = (-f64::from(x).abs()).exp();
            assert!((f64::from(e) / want - 1.0).abs() < EXP, "exp of -|{x}|: got {e}, want {want}");
            let want = candle_core::cpu::erf::erf_f64(f64::from(x));
            assert!((f64::from(f) - want).abs() <= ERF * want.abs(), "erf of {x}: got {f}, want {want}");
        }
    }

    #[test]
    fn exp_and_erf_at_the_edges() {
        assert!(f32::NAN.exp_nonpos().is_nan() && f32::NAN.error_function().is_nan());
        assert_eq!(f32::NEG_INFINITY.exp_nonpos(), 0.0);
        assert_eq!(0f32.exp_nonpos(), 1.0);
        assert_eq!((f32::INFINITY.error_function(), f32::NEG_INFINITY.error_function()), (1.0, -1.0));
    }

    #[test]
    fn reductions_cover_blocks_and_tails() {
        for len in [0usize, 1, 15, 16, 17, 50, 64, 97] {
            let x: Vec<f64> = (0..len).map(|i| i as f64).collect();
            let triangle = (len * len.saturating_sub(1) / 2) as f64;
            assert_eq!(sum(&x), triangle, "sum of {len}");
            let squares: f64 = x.iter().map(|v| v * v).sum();
            assert_eq!(dot(&x, &x), squares, "dot of {len}");
            assert_eq!(max(&x), if len == 0 { f64::NEG_INFINITY } else { (len - 1) as f64 }, "max of {len}");
        }
    }

    #[test]
    fn column_sums_cross_chunks() {
        let (rows, width) = (9001, 7);
        let x: Vec<f64> = (0..rows * width).map(|i| (i % width) as f64 + 1.0).collect();
        let want: Vec<f64> = (0..width).map(|c| (c + 1) as f64 * rows as f64).collect();
        assert_eq!(column_sums(&x, width), want);
    }
}
