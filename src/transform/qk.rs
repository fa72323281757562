//! Query-key reparameterization: the product of query and key as the weight that is quantized.
//!
//! `W_h = Wq_hᵀ Wk_h [in, in]` for each head h, stacked over the heads to `[heads in, in]`, row `h in + c`
//! (Liu et al. 2023, section 4.3; ofq.md 3). Its gradients are `dWq_h = Wk_h dW_hᵀ` and `dWk_h = Wq_h dW_h`.
//! With input x the logits are `x_n . (W_h x_m) / sqrt(d)`, d the head's size: those of query and key, but
//! for their biases. What the key's bias adds is the same for all keys of a query, so the softmax takes
//! it out; the query's adds `x_m . r_h` with `r_h = Wk_hᵀ bq_h`, which [`reparameterize`] can keep.

use std::sync::Arc;

use candle_core::Tensor;

use crate::weights::{Expr, Transform, Weight, Weights};
use crate::{kernels, Error, On, Result};

/// The product of a query and a key, both `[heads d, in]`.
#[derive(Clone, Copy, Debug)]
pub struct QkProduct {
    heads: usize,
}

impl QkProduct {
    /// For so many heads.
    pub fn new(heads: usize) -> Self {
        QkProduct { heads }
    }

    /// d and in of a weight `[heads d, in]`.
    fn depth(&self, w: &Tensor) -> Result<(usize, usize)> {
        let (rows, inputs) = w.dims2().on("query or key")?;
        if self.heads == 0 || rows % self.heads != 0 {
            let heads = self.heads;
            return Err(Error::Run(format!(
                "query or key: found {rows} rows, expected a multiple of {heads}"
            )));
        }
        Ok((rows / self.heads, inputs))
    }
}

impl Transform for QkProduct {
    fn kind(&self) -> &'static str {
        "qk"
    }

    fn apply(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let [query, key] = inputs else {
            return Err(Error::Run(format!("qk: found {} inputs, expected query and key", inputs.len())));
        };
        for w in [query, key] {
            self.depth(w)?;
        }
        Ok(kernels::qk_product(query, key, self.heads)?)
    }

    fn parts(&self) -> &'static [&'static str] {
        &[".query", ".key"]
    }

    fn frozen(&self) -> Result<Arc<dyn Transform>> {
        Ok(Arc::new(*self))
    }
}

/// Replaces `query` and `key` beneath `inner` by their product `qk`, trainable where they were, and
/// their biases by what `keep_bias` keeps of them: `qk.bias`, r of all heads in a row. A store without
/// them is an error.
pub fn reparameterize(weights: &mut Weights, inner: &str, heads: usize, keep_bias: bool) -> Result<()> {
    let wq = weights.get(&format!("{inner}.query.weight"))?.clone();
    let wk = weights.get(&format!("{inner}.key.weight"))?.clone();
    let product = Weight::from(Expr::Node {
        transform: Arc::new(QkProduct::new(heads)),
        inputs: vec![wq.clone(), wk.clone()],
    });
    let mut new = vec![(format!("{inner}.qk.weight"), product)];
    let bias = format!("{inner}.query.bias");
    if keep_bias && weights.contains(&bias) {
        let bq = weights.get(&bias)?.tensor()?.detach();
        let wk = wk.tensor()?.detach();
        let (depth, width) = QkProduct::new(heads).depth(&wk)?;
        let by_head = wk.reshape((heads, depth, width))?;
        let bq = bq.reshape((heads, 1, bq.elem_count() / heads.max(1)))?;
        let r = bq.matmul(&by_head)?.flatten_all()?; // [heads in]
        let r = match wq.expr() {
            Expr::Latent(_) => Weight::latent(&r)?,
            _ => Weight::dense(r),
        };
        new.push((format!("{inner}.qk.bias"), r));
    }
    let gone = ["query.weight", "query.bias", "key.weight", "key.bias"];
    let gone: Vec<String> = gone.iter().map(|part| format!("{inner}.{part}")).collect();
    weights.replace(&gone, new);
    Ok(())
}
