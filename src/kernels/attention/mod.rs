//! Multi-head attention in two ops, heads read by strides.
//!
//! ```text
//! probs  P_h = softmax(scale * q_h k_h^T + bias_gh)     P [B, H, N, M]
//!        dS  = P * (dP - rowsum(dP * P))     dbias_g = sum of dS over the entries of group g
//!        dq_h = scale * dS k_h               dk_h = scale * dS^T q_h
//! mix    o_h = P_h v_h                       v [B, M, C], o [B, N, C]
//!        dP_h = do_h v_h^T                   dv_h = P_h^T do_h
//! ```
//!
//! k is `[B, M, H*d]`, head h its columns `h*d .. (h+1)*d`. q is `[B, N, H*d]` likewise, or `[B, N, d]`,
//! the same for all heads (query-key reparameterization, ofq.md 3); dq is then summed over the heads.
//! The bias is `[G, H, N or 1, M]`; G divides B and batch entry b takes group `b mod G`, so that one
//! bias serves all batch entries (G = 1), each its own (G = B), or the windows of an image (Swin).
//!
//! On the CPU f32 and f64, f16 and bf16 through f32. On a CUDA device f32, f16 and bf16: products by cuBLAS, the
//! softmax by kernels/softmax.cu; P, and the gradient of its logits, are of the operands' type. Where nobody reads P,
//! `attention` is both ops in one, there without P in memory (kernels/attention.cu). Source: Vaswani et al. 2017,
//! eq. 1; the bias is that of Liu et al. 2021 (Swin), eq. 4.

mod causal;
#[cfg(feature = "cuda")]
mod flash;
mod fused;
mod mix;
mod probs;

use candle_core::{bail, Result, Tensor};

pub use causal::{causal_attention, reference_causal};
pub use fused::attention;
pub use mix::{attention_mix, reference_mix};
pub use probs::{attention_probs, reference_probs};

/// `[B, N, C]` to `[B, H, N, d]`.
fn heads_first(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, n, c) = x.dims3()?;
    x.reshape((b, n, heads, c / heads))?.transpose(1, 2)?.contiguous()
}

fn check_heads(op: &str, heads: usize, c: usize) -> Result<()> {
    if heads == 0 || c == 0 || !c.is_multiple_of(heads) {
        bail!("{op}: expected a width that {heads} heads divide, got {c}")
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::*;

    /// (batch, N, M, C, heads): one of everything, primes, one head, head size 1, M != N.
    pub(super) const CASES: [(usize, usize, usize, usize, usize); 5] =
        [(1, 1, 1, 1, 1), (2, 3, 5, 6, 3), (1, 7, 13, 5, 1), (2, 5, 3, 4, 4), (3, 4, 4, 12, 2)];

    #[test]
    fn threads_do_not_show() {
        let t = [values(&[9, 50, 24], 1), values(&[9, 50, 24], 2), values(&[9, 50, 24], 3)];
        ignores_threads(&t, &|t| attention_mix(&attention_probs(&t[0], &t[1], 3, 0.35, None)?, &t[2], 3));
        // More entries than parts of the sum over a group.
        let t = [values(&[48, 9, 4], 1), values(&[48, 9, 12], 2), values(&[2, 3, 9, 9], 3)];
        ignores_threads(&t, &|t| attention_probs(&t[0], &t[1], 3, 0.35, Some(&t[2])));
    }
}
