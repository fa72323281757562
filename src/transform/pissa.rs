//! PiSSA: LoRA that starts from a weight's principal singular values.
//!
//! ```text
//! W = U S V^T     A = (S_r / s)^1/2 V_r^T     B = U_r (S_r / s)^1/2     residual = W - s B A
//! ```
//!
//! Meng et al. 2024, equations 2 to 4. [`convert`] makes it a plain LoRA on the original weight:
//! `A' = [A; A0]`, `B' = [B, -B0]` of twice the rank, A0 and B0 the factors at the start.

use candle_core::{DType, Device, Tensor};
use nalgebra::DMatrix;

use crate::kernels;
use crate::{Error, Result};

/// Up to this shorter side the decomposition is that of the matrix itself, beyond it that of its Gram matrix.
const DIRECT: usize = 512;

/// The factors of a weight's principal part, and what is left of it.
#[derive(Clone, Debug)]
pub struct Principal {
    /// `A [r, I]`, f32.
    pub a: Tensor,
    /// `B [O, r]`, f32.
    pub b: Tensor,
    /// `W - s B A`, `[O, I]`, f32: the base that goes with these factors.
    pub residual: Tensor,
}

/// An adapter as the plain LoRA that it equals on the original weight.
#[derive(Clone, Debug)]
pub struct Converted {
    /// `A' [2 r, I]`.
    pub a: Tensor,
    /// `B' [O, 2 r]`.
    pub b: Tensor,
    /// The rank, twice what it was.
    pub rank: usize,
    /// The alpha under which the scale is what it was.
    pub alpha: f64,
}

/// Splits `w: [O, I]` at rank `r` for the scale `s`, above 0.
///
/// In f64: where the shorter side is at most 512 by the singular value decomposition of w, beyond it by the
/// eigenvectors of its Gram matrix, whose singular values are right to `1e-16 S_1^2 / S_r^2` of themselves.
/// Either way `s B A + residual` gives w back to f32 rounding. A component's largest entry in B is positive.
pub fn pissa(w: &Tensor, r: usize, scale: f64) -> Result<Principal> {
    let (rows, cols) = match *w.dims() {
        [rows, cols] if r > 0 && r <= rows.min(cols) => (rows, cols),
        ref other => {
            return Err(Error::usage(format!(
                "pissa: rank {r} for a weight {other:?}: expected 1 to its shorter side"
            )))
        }
    };
    if scale.is_nan() || scale <= 0.0 {
        return Err(Error::usage(format!("pissa: scale {scale}: expected more than 0")));
    }
    let w = w.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?.contiguous()?;
    let list = w.flatten_all()?.to_vec1::<f64>()?;
    if list.iter().any(|v| !v.is_finite()) {
        return Err(Error::Run("pissa: found a weight that is not finite".to_string()));
    }
    let (values, left, right) = match rows.min(cols) <= DIRECT {
        true => direct(&list, (rows, cols), r)?,
        false => by_gram(&w, r)?,
    };
    let (mut a, mut b) = (vec![0f32; r * cols], vec![0f32; rows * r]);
    for k in 0..r {
        let root = (values[k].max(0.0) / scale).sqrt();
        let largest = left.column(k).iter().fold(0f64, |m, &v| if v.abs() > m.abs() { v } else { m });
        let root = if largest < 0.0 { -root } else { root };
        for i in 0..cols {
            a[k * cols + i] = (right[(i, k)] * root) as f32;
        }
        for o in 0..rows {
            b[o * r + k] = (left[(o, k)] * root) as f32;
        }
    }
    let (a, b) =
        (Tensor::from_vec(a, (r, cols), &Device::Cpu)?, Tensor::from_vec(b, (rows, r), &Device::Cpu)?);
    // Of the factors as they are stored: what their rounding loses stays in the residual.
    let change = (b.to_dtype(DType::F64)?.matmul(&a.to_dtype(DType::F64)?)? * scale)?;
    let residual = (w - change)?.to_dtype(DType::F32)?;
    Ok(Principal { a, b, residual })
}

/// The r largest singular values, and their left and right vectors as columns.
type Decomposition = (Vec<f64>, DMatrix<f64>, DMatrix<f64>);

fn direct(w: &[f64], (rows, cols): (usize, usize), r: usize) -> Result<Decomposition> {
    let failed = || Error::Run("pissa: the singular value decomposition did not converge".to_string());
    let svd =
        DMatrix::from_row_slice(rows, cols, w).try_svd(true, true, f64::EPSILON, 0).ok_or_else(failed)?;
    let (u, vt) = (svd.u.ok_or_else(failed)?, svd.v_t.ok_or_else(failed)?);
    let order = largest(svd.singular_values.as_slice(), r);
    let values = order.iter().map(|&k| svd.singular_values[k]).collect();
    let left = DMatrix::from_fn(rows, r, |i, k| u[(i, order[k])]);
    let right = DMatrix::from_fn(cols, r, |i, k| vt[(order[k], i)]);
    Ok((values, left, right))
}

/// The places of the r largest values, largest first.
fn largest(values: &[f64], r: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    order.truncate(r);
    order
}

/// By the eigenvectors on the shorter side; those on the longer one follow from a product with w.
fn by_gram(w: &Tensor, r: usize) -> Result<Decomposition> {
    let (rows, cols) = w.dims2()?;
    let tall = rows > cols;
    let short = if tall { w.t()?.contiguous()? } else { w.clone() }; // [n, m], n <= m
    let n = rows.min(cols);
    let gram = kernels::linear(&short, &short, None)?.flatten_all()?.to_vec1::<f64>()?;
    let eigen = DMatrix::from_row_slice(n, n, &gram).symmetric_eigen();
    let order = largest(eigen.eigenvalues.as_slice(), r);
    let vectors: Vec<f64> = (0..r * n).map(|at| eigen.eigenvectors[(at % n, order[at / n])]).collect();
    let near = Tensor::from_vec(vectors, (r, n), &Device::Cpu)?;
    let far = near.matmul(&short)?.to_vec2::<f64>()?; // each of the length of its singular value
    let near = near.to_vec2::<f64>()?;
    let values: Vec<f64> = far.iter().map(|v| v.iter().map(|x| x * x).sum::<f64>().sqrt()).collect();
    let unit = |k: usize| if values[k] > 0.0 { 1.0 / values[k] } else { 0.0 };
    let near = DMatrix::from_fn(n, r, |i, k| near[k][i]);
    let far = DMatrix::from_fn(rows.max(cols), r, |i, k| far[k][i] * unit(k));
    Ok(if tall { (values, far, near) } else { (values, near, far) })
}

/// The plain LoRA on the original weight that equals factors `a`, `b` on the residual of the start `a0`, `b0`
/// (all `[r, I]` and `[O, r]`): the scale `alpha / r`, or `alpha / sqrt(r)` with `rslora`, stays what it was.
pub fn convert(
    (a, b): (&Tensor, &Tensor),
    (a0, b0): (&Tensor, &Tensor),
    alpha: f64,
    rslora: bool,
) -> Result<Converted> {
    super::lora::shape_of(["lora_A", "lora_B"], a, b)?;
    if a.dims() != a0.dims() || b.dims() != b0.dims() {
        return Err(Error::tensor(
            "lora_A",
            format!(
                "found {:?} and a start {:?}, expected one shape, as for lora_B {:?} and {:?}",
                a.dims(),
                a0.dims(),
                b.dims(),
                b0.dims()
            ),
        ));
    }
    let wide = |t: &Tensor| t.detach().to_dtype(DType::F32);
    Ok(Converted {
        a: Tensor::cat(&[wide(a)?, wide(a0)?], 0)?,
        b: Tensor::cat(&[wide(b)?, wide(b0)?.neg()?], 1)?,
        rank: 2 * a.dim(0)?,
        alpha: alpha * if rslora { std::f64::consts::SQRT_2 } else { 2.0 },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn random(shape: (usize, usize), name: &str) -> Tensor {
        let mut random = Random::new(5, name, &[shape.0 as u64, shape.1 as u64]);
        let values: Vec<f32> = (0..shape.0 * shape.1).map(|_| random.normal()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn largest_gap(a: &Tensor, b: &Tensor) -> f64 {
        let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
        (wide(a) - wide(b)).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn a_diagonal_by_hand() {
        let w = Tensor::new(&[[0f32, 8.0], [-2.0, 0.0], [0.0, 0.0]], &Device::Cpu).unwrap();
        let Principal { a, b, residual } = pissa(&w, 1, 2.0).unwrap();
        // S_1 = 8: both factors carry (8 / 2)^1/2.
        assert!(largest_gap(&a, &Tensor::new(&[[0f32, 2.0]], &Device::Cpu).unwrap()) < 1e-6);
        assert!(largest_gap(&b, &Tensor::new(&[[2f32], [0.0], [0.0]], &Device::Cpu).unwrap()) < 1e-6);
        let want = Tensor::new(&[[0f32, 0.0], [-2.0, 0.0], [0.0, 0.0]], &Device::Cpu).unwrap();
        assert!(largest_gap(&residual, &want) < 1e-6);
    }

    #[test]
    fn both_routes_find_the_same_part_and_leave_its_residual() {
        for shape in [(9, 5), (5, 9), (40, 40), (64, 33)] {
            let w = random(shape, "w");
            let Principal { a, b, residual } = pissa(&w, 4, 0.5).unwrap();
            let product = (b.matmul(&a).unwrap() * 0.5).unwrap();
            assert!(largest_gap(&(&product + &residual).unwrap(), &w) < 1e-5, "{shape:?}");
            let wide = w.to_dtype(DType::F64).unwrap();
            let (values, left, right) = by_gram(&wide, 4).unwrap();
            for i in 0..shape.0 {
                for j in 0..shape.1 {
                    let of: f64 = (0..4).map(|k| left[(i, k)] * values[k] * right[(j, k)]).sum();
                    let got = product.get(i).unwrap().get(j).unwrap().to_scalar::<f32>().unwrap();
                    assert!((of - f64::from(got)).abs() < 1e-5, "{shape:?}: {of} {got}");
                }
            }
            // What is left has no part along the factors.
            let along = residual.matmul(&a.t().unwrap()).unwrap();
            assert!(largest_gap(&along, &along.zeros_like().unwrap()) < 2e-4, "{shape:?}");
        }
    }

    #[test]
    fn the_converted_form_equals_the_adapter_on_its_residual() {
        let w = random((7, 6), "w");
        for rslora in [false, true] {
            let (r, alpha) = (3usize, 6.0);
            let scale = |alpha: f64, r: usize| alpha / if rslora { (r as f64).sqrt() } else { r as f64 };
            let Principal { a: a0, b: b0, residual } = pissa(&w, r, scale(alpha, r)).unwrap();
            let a = (&a0 + random((3, 6), "a")).unwrap();
            let b = (&b0 + random((7, 3), "b")).unwrap();
            let plain = convert((&a, &b), (&a0, &b0), alpha, rslora).unwrap();
            let of = |w: &Tensor, a: &Tensor, b: &Tensor, s: f64| {
                (w + (b.matmul(a).unwrap() * s).unwrap()).unwrap()
            };
            let want = of(&residual, &a, &b, scale(alpha, r));
            let got = of(&w, &plain.a, &plain.b, scale(plain.alpha, plain.rank));
            assert!(largest_gap(&got, &want) < 1e-4, "{rslora}");
        }
    }

    #[test]
    fn what_cannot_be_split_is_named() {
        let w = random((4, 6), "w");
        let error = |r, s| pissa(&w, r, s).unwrap_err().to_string();
        assert!(error(5, 1.0).contains("rank 5 for a weight [4, 6]"));
        assert!(error(2, 0.0).contains("scale 0: expected more than 0"));
        let nan = Tensor::new(&[[f32::NAN]], &Device::Cpu).unwrap();
        assert!(pissa(&nan, 1, 1.0).unwrap_err().to_string().contains("not finite"));
    }
}
