//! Where an LSQ quantizer sits: how the elements of x share scales, and the loops over them, forward
//! and backward (the equations are those of `lsq`).

use super::{code, Levels};
use crate::kernels::cpu::{self, simd, Real};
use candle_core::{bail, Result, Tensor};
use rayon::prelude::*;

/// The floor under an activation scale (ofq.md 2.1).
pub const SCALE_FLOOR: f64 = 1e-5;

/// Where an LSQ quantizer sits: how the elements of x share scales.
#[derive(Clone, Copy, Debug)]
pub(super) struct Site {
    pub(super) levels: Levels,
    /// Length of a row.
    pub(super) width: usize,
    /// Rows that the last axis of x as it is falls into.
    pub(super) parts: usize,
    /// Elements between one change of scale and the next.
    pub(super) run: usize,
    pub(super) scales: usize,
    /// Elements of x that share one scale.
    shared: usize,
    /// The scale belongs to the last axis.
    pub(super) per_column: bool,
}

impl Site {
    /// The site of a quantizer on x of shape `dims`, whose last axis falls into `parts` that are rows of their
    /// own: `[.., N, g C]` is `[.., N g, C]`, and `axis` an axis of that.
    pub(super) fn new(
        op: &str,
        dims: &[usize],
        parts: usize,
        s: &Tensor,
        shifts: &[&Tensor],
        levels: Levels,
        axis: Option<usize>,
    ) -> Result<Self> {
        if levels.half || levels.hi < 1 || levels.lo > 0 {
            bail!("{op}: expected levels lo <= 0 < hi without half offset, got {levels:?}")
        }
        let Some((&whole, lead)) = dims.split_last() else {
            bail!("{op}: expected x with an axis, got a scalar")
        };
        if parts == 0 || !whole.is_multiple_of(parts) || (parts > 1 && lead.is_empty()) {
            bail!("{op}: expected x {dims:?} with a last axis in {parts} equal parts")
        }
        let width = whole / parts;
        let mut seen = dims.to_vec();
        if let [.., rows, last] = seen.as_mut_slice() {
            (*rows, *last) = (*rows * parts, width);
        }
        let count: usize = dims.iter().product();
        let (scales, run) = match axis {
            None => (1, count),
            Some(a) if a < dims.len() => (seen[a], seen[a + 1..].iter().product()),
            Some(a) => bail!("{op}: expected a scale axis below {}, got {a}", dims.len()),
        };
        if count == 0 {
            bail!("{op}: expected x with elements, got {dims:?}")
        }
        if s.dims() != [scales] {
            match axis {
                Some(a) => bail!(
                    "{op}: expected one scale per entry of axis {a} of x {seen:?}, [{scales}], got {:?}",
                    s.dims()
                ),
                None => bail!("{op}: expected one scale, [1], got {:?}", s.dims()),
            }
        }
        for shift in shifts {
            if shift.dims() != [whole] {
                bail!("{op}: expected a shift per last-axis entry of x, [{whole}], got {:?}", shift.dims())
            }
        }
        let per_column = axis == Some(dims.len() - 1);
        if per_column && parts > 1 {
            bail!("{op}: expected one part of the last axis where each column has a scale, got {parts}")
        }
        Ok(Site { levels, width, parts, run, scales, shared: count / scales, per_column })
    }

    /// `1 / sqrt(hi * m)`, the factor on the scale's gradient.
    pub(super) fn grad_scale(&self) -> f64 {
        1.0 / (f64::from(self.levels.hi) * self.shared as f64).sqrt()
    }

    pub(super) fn broadcast(&self, s: &Tensor, x: &Tensor, axis: Option<usize>) -> Result<Tensor> {
        let mut dims = vec![1; x.rank()];
        if let Some(a) = axis {
            dims[a] = self.scales;
        }
        s.reshape(dims)
    }

    fn scale_of_row(&self, row: usize) -> usize {
        row * self.width / self.run % self.scales
    }

    /// The effective scale of each row, or of each column.
    fn effective<T: Real>(&self, s: &[T], rows: usize) -> Vec<T> {
        let floor = T::from_f64(SCALE_FLOOR);
        let lift = |s: T| if s < floor { floor } else { s };
        if self.per_column {
            s.iter().map(|&s| lift(s)).collect()
        } else {
            (0..rows).map(|r| lift(s[self.scale_of_row(r)])).collect()
        }
    }

    fn bounds<T: Real>(&self) -> (T, T) {
        (T::from_f64(f64::from(self.levels.lo)), T::from_f64(f64::from(self.levels.hi)))
    }

    /// Rows of a unit of work: whole entries of the last axis.
    fn chunk(&self) -> usize {
        cpu::chunk_rows(self.width).next_multiple_of(self.parts)
    }

    /// y, or codes; `out` is added to y along the last axis, where it is not empty.
    pub(super) fn forward<T: Real>(&self, x: &[T], s: &[T], shift: &[T], out: &[T], codes: bool) -> Vec<T> {
        let width = self.width;
        let se = self.effective(s, x.len() / width);
        let (lo, hi) = self.bounds();
        let mut y = cpu::unwritten(x.len());
        let rows = self.chunk();
        y.par_chunks_mut(rows * width).zip(x.par_chunks(rows * width)).enumerate().for_each(|(i, (y, x))| {
            if self.per_column {
                lsq_columns(x, shift, out, &se, lo, hi, codes, y);
            } else {
                lsq_rows(x, shift, out, width, &se[i * rows..], lo, hi, codes, y);
            }
        });
        y
    }

    /// dx, then ds, then dshift, then the gradient of `out`, which is that of a shift behind the quantizer, where
    /// `with_out`.
    pub(super) fn backward<T: Real>(&self, x: &[T], s: &[T], shift: &[T], g: &[T], with_out: bool) -> Vec<T> {
        let width = self.width;
        let whole = width * self.parts;
        let count = x.len();
        let se = self.effective(s, count / width);
        let (lo, hi) = self.bounds();
        let rows = self.chunk();
        let chunks = count.div_ceil(rows * width);
        let behind = if with_out { whole } else { 0 };
        let mut out = cpu::unwritten(count + self.scales + whole + behind);
        let sums = whole + behind;
        let mut dshift = vec![T::ZERO; chunks * sums];
        // Per row where a row has one scale, per chunk and column where a column has one.
        let per_chunk = if self.per_column { width } else { rows };
        let mut ds = vec![T::ZERO; chunks * per_chunk];
        out[..count]
            .par_chunks_mut(rows * width)
            .zip(x.par_chunks(rows * width))
            .zip(g.par_chunks(rows * width))
            .zip(dshift.par_chunks_mut(sums))
            .zip(ds.par_chunks_mut(per_chunk))
            .enumerate()
            .for_each(|(i, ((((dx, x), g), dshift), ds))| {
                let (dshift, dout) = dshift.split_at_mut(whole);
                if self.per_column {
                    lsq_columns_grad(x, shift, &se, lo, hi, g, dx, ds, dshift, dout);
                } else {
                    let mut slope = vec![T::ZERO; width];
                    let se = &se[i * rows..];
                    lsq_rows_grad(x, shift, width, se, lo, hi, g, dx, ds, dshift, dout, &mut slope);
                }
            });
        let factor = self.grad_scale();
        if self.per_column {
            for (o, d) in out[count..].iter_mut().zip(cpu::fold(&ds, width)) {
                *o = T::from_f64(d.to_f64() * factor);
            }
        } else {
            let mut total = vec![0f64; self.scales];
            for (row, d) in ds[..count / width].iter().enumerate() {
                total[self.scale_of_row(row)] += d.to_f64();
            }
            for (o, d) in out[count..].iter_mut().zip(total) {
                *o = T::from_f64(d * factor);
            }
        }
        out[count + self.scales..].copy_from_slice(&cpu::fold(&dshift, sums));
        out
    }
}

simd! {
    fn lsq_rows<T>(
        x: &[T], shift: &[T], out: &[T], width: usize, se: &[T], lo: T, hi: T, codes: bool, y: &mut [T],
    ) {
        let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(se);
        let mut at = 0;
        for ((x, y), &se) in rows {
            let unit = if codes { T::ONE } else { se };
            let b = &shift[at..at + width];
            if out.is_empty() {
                for ((y, &x), &b) in y.iter_mut().zip(x).zip(b) {
                    *y = code((x + b) / se, lo, hi) * unit;
                }
            } else {
                let o = &out[at..at + width];
                for (((y, &x), &b), &o) in y.iter_mut().zip(x).zip(b).zip(o) {
                    *y = code((x + b) / se, lo, hi) * unit + o;
                }
            }
            at = if at + width == shift.len() { 0 } else { at + width };
        }
    }
}

simd! {
    fn lsq_columns<T>(x: &[T], shift: &[T], out: &[T], se: &[T], lo: T, hi: T, codes: bool, y: &mut [T]) {
        let width = shift.len();
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            for (((y, &x), &b), &se) in y.iter_mut().zip(x).zip(shift).zip(se) {
                let q = code((x + b) / se, lo, hi);
                *y = if codes { q } else { q * se };
            }
            for (y, &o) in y.iter_mut().zip(out) {
                *y += o;
            }
        }
    }
}

/// (dx, the slope of y in the effective scale) of one element.
#[inline(always)]
fn element_grad<T: Real>(x: T, shift: T, se: T, lo: T, hi: T, g: T) -> (T, T) {
    let v = (x + shift) / se;
    let q = code(v, lo, hi);
    let inside = v >= lo && v <= hi;
    let dx = if inside { g } else { T::ZERO };
    let slope = if inside { q - v } else { q };
    (dx, g * slope)
}

simd! {
    fn lsq_rows_grad<T>(
        x: &[T], shift: &[T], width: usize, se: &[T], lo: T, hi: T, g: &[T],
        dx: &mut [T], ds: &mut [T], dshift: &mut [T], dout: &mut [T], slope: &mut [T],
    ) {
        let slope = &mut slope[..width];
        let rows = x.chunks_exact(width).zip(g.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
        let mut at = 0;
        for ((((x, g), dx), &se), ds) in rows.zip(se).zip(ds) {
            let (shift_of_row, dshift) = (&shift[at..at + width], &mut dshift[at..at + width]);
            if dout.is_empty() {
                for c in 0..width {
                    let (d, t) = element_grad(x[c], shift_of_row[c], se, lo, hi, g[c]);
                    dx[c] = d;
                    dshift[c] += d;
                    slope[c] = t;
                }
            } else {
                let dout = &mut dout[at..at + width];
                for c in 0..width {
                    let (d, t) = element_grad(x[c], shift_of_row[c], se, lo, hi, g[c]);
                    dx[c] = d;
                    dshift[c] += d;
                    slope[c] = t;
                    dout[c] += g[c];
                }
            }
            *ds = cpu::sum(slope);
            at = if at + width == shift.len() { 0 } else { at + width };
        }
    }
}

simd! {
    fn lsq_columns_grad<T>(
        x: &[T], shift: &[T], se: &[T], lo: T, hi: T, g: &[T],
        dx: &mut [T], ds: &mut [T], dshift: &mut [T], dout: &mut [T],
    ) {
        let width = shift.len();
        let (se, ds, dshift) = (&se[..width], &mut ds[..width], &mut dshift[..width]);
        let rows = x.chunks_exact(width).zip(g.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
        for ((x, g), dx) in rows {
            for c in 0..width {
                let (d, t) = element_grad(x[c], shift[c], se[c], lo, hi, g[c]);
                dx[c] = d;
                dshift[c] += d;
                ds[c] += t;
            }
            for (d, &g) in dout.iter_mut().zip(g) {
                *d += g;
            }
        }
    }
}
