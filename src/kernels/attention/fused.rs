//! Attention whose probabilities nobody else reads (the equations are those of [`super`]).

use super::{attention_mix, attention_probs};
use candle_core::{Result, Tensor};

/// `attention_mix` of `attention_probs` of the same arguments: `[B, N, H*d]` of `q: [B, N, H*d]` over
/// `k, v: [B, M, H*d]`, with an optional bias on the logits. On a CUDA device without the matrix of probabilities,
/// where there are kernels for the sizes at hand.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    scale: f64,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(o) = on_cuda::attention(q, k, v, heads, scale, bias)? {
        return Ok(o);
    }
    attention_mix(&attention_probs(q, k, heads, scale, bias)?, v, heads)
}

#[cfg(feature = "cuda")]
mod on_cuda {
    use super::super::flash::{Call, Kept};
    use super::super::probs;
    use super::*;
    use crate::kernels::cpu::{self, Road};
    use crate::kernels::cuda;
    use crate::kernels::tape::{self, Many, Reads};
    use candle_core::{bail, CpuStorage, CudaStorage, CustomOp3, Device, Layout, Shape};

    const OP: &str = "attention";

    /// (q, k, v) to o, under a bias that takes no gradient.
    struct Fused {
        call: Call,
        bias: Option<Tensor>,
        kept: Kept,
    }

    impl CustomOp3 for Fused {
        fn name(&self) -> &'static str {
            OP
        }

        fn cpu_fwd(
            &self,
            _q: &CpuStorage,
            _ql: &Layout,
            _k: &CpuStorage,
            _kl: &Layout,
            _v: &CpuStorage,
            _vl: &Layout,
        ) -> Result<(CpuStorage, Shape)> {
            bail!("{OP}: expected tensors on the CUDA device")
        }

        fn cuda_fwd(
            &self,
            q: &CudaStorage,
            ql: &Layout,
            k: &CudaStorage,
            kl: &Layout,
            v: &CudaStorage,
            vl: &Layout,
        ) -> Result<(CudaStorage, Shape)> {
            let operands = [(q, ql), (k, kl), (v, vl)];
            let Some(bias) = &self.bias else {
                return self.call.forward(OP, operands, None, None, &self.kept);
            };
            let (storage, layout) = bias.storage_and_layout();
            let bias = (cuda::storage(OP, &storage)?, layout);
            self.call.forward(OP, operands, Some(bias), None, &self.kept)
        }

        fn bwd(
            &self,
            q: &Tensor,
            k: &Tensor,
            v: &Tensor,
            o: &Tensor,
            grad: &Tensor,
        ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
            let kept = (&self.kept, false);
            let [dq, dk, dv, _] = self.call.gradients([q, k, v], self.bias.as_ref(), o, grad, kept)?;
            Ok((dq, dk, dv))
        }
    }

    /// (q, k, v, bias) to o.
    struct FusedBias {
        call: Call,
        kept: Kept,
    }

    impl Many for FusedBias {
        fn name(&self) -> &'static str {
            OP
        }

        fn cpu_fwd(&self, _x: &[(&CpuStorage, &Layout)]) -> Result<(CpuStorage, Shape)> {
            bail!("{OP}: expected tensors on the CUDA device")
        }

        fn cuda_fwd(&self, x: &[(&CudaStorage, &Layout)]) -> Result<Option<(CudaStorage, Shape)>> {
            let [q, k, v, bias] = x else { bail!("{OP}: expected q, k, v and a bias") };
            self.call.forward(OP, [*q, *k, *v], Some(*bias), None, &self.kept).map(Some)
        }

        fn bwd(&self, x: &[Tensor], o: &Tensor, grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
            let [q, k, v, bias] = x else { bail!("{OP}: expected q, k, v and a bias") };
            let kept = (&self.kept, bias.track_op());
            Ok(self.call.gradients([q, k, v], Some(bias), o, grad, kept)?.into())
        }

        fn reads(&self) -> Reads {
            Reads::ALL
        }

        fn composed(&self, x: &[Tensor]) -> Result<Tensor> {
            let [q, k, v, bias] = x else { bail!("{OP}: expected q, k, v and a bias") };
            let Call { heads, scale, .. } = self.call;
            attention_mix(&attention_probs(q, k, heads, scale, Some(bias))?, v, heads)
        }
    }

    /// The result, where there are kernels for it.
    pub(super) fn attention(
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        heads: usize,
        scale: f64,
        bias: Option<&Tensor>,
    ) -> Result<Option<Tensor>> {
        let Device::Cuda(device) = q.device() else { return Ok(None) };
        let sizes = probs::sizes(OP, q, k, heads, bias)?;
        // One query for all heads, or values of another width.
        if sizes.shared || v.dims() != k.dims() {
            return Ok(None);
        }
        let mut named = vec![("q", q), ("k", k), ("v", v)];
        named.extend(bias.map(|b| ("bias", b)));
        let call = Call {
            batch: sizes.batch,
            heads,
            groups: heads,
            queries: sizes.n,
            keys: sizes.m,
            depth: sizes.d,
            bias: sizes.bias,
            scale,
        };
        if cpu::road_with_cuda(OP, &named)? != Road::Kernel || !call.runs(device, q.dtype())? {
            return Ok(None);
        }
        let (q, k, v, kept) = (q.contiguous()?, k.contiguous()?, v.contiguous()?, Kept::default());
        let bias = bias.map(Tensor::contiguous).transpose()?;
        match bias {
            Some(bias) if bias.track_op() => tape::apply(vec![q, k, v, bias], FusedBias { call, kept }),
            bias => tape::apply3(&q, &k, &v, Fused { call, bias, kept }, Reads::ALL),
        }
        .map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::CASES;
    use super::*;
    use crate::kernels::testing::*;

    #[test]
    fn it_is_the_mix_of_the_probabilities() {
        for (b, n, m, c, heads) in CASES {
            let t = [values(&[b, n, c], 1), values(&[b, m, c], 2), values(&[b, m, c], 3)];
            let bias = values(&[1, heads, n, m], 4);
            for bias in [None, Some(&bias)] {
                let p = attention_probs(&t[0], &t[1], heads, 0.7, bias).unwrap();
                let want = attention_mix(&p, &t[2], heads).unwrap();
                let got = attention(&t[0], &t[1], &t[2], heads, 0.7, bias).unwrap();
                assert_eq!(flat(&got), flat(&want));
            }
        }
    }
}
