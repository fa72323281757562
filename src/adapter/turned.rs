//! An adapter of a weight that its file holds turned, `[in, out]`, as GPT-2's are (fan_in_fan_out).

use std::sync::Arc;

use candle_core::{Tensor, Var};

use crate::weights::{Role, Transform};
use crate::Result;

/// The rule's name.
pub(super) const KIND: &str = "turned";

/// `rule` applied to the transposed weight, the result transposed back.
#[derive(Clone, Debug)]
pub(super) struct Turned(Arc<dyn Transform>);

impl Turned {
    /// Around `rule`, which expects `[out, in]`.
    pub(super) fn new(rule: Arc<dyn Transform>) -> Self {
        Turned(rule)
    }
}

impl Transform for Turned {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn apply(&self, inputs: &[Tensor]) -> Result<Tensor> {
        let turned = inputs.iter().map(|w| Ok(w.t()?.contiguous()?)).collect::<Result<Vec<_>>>()?;
        Ok(self.0.apply(&turned)?.t()?.contiguous()?)
    }

    fn params(&self) -> Vec<(&'static str, Var, Role)> {
        self.0.params()
    }

    fn tensors(&self) -> Vec<(&'static str, Tensor)> {
        self.0.tensors()
    }

    fn frozen(&self) -> Result<Arc<dyn Transform>> {
        Ok(Arc::new(Turned(self.0.frozen()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::files::tests::ramp;
    use super::*;
    use crate::transform::Lora;
    use crate::weights::Weight;

    #[test]
    fn the_change_is_turned_and_nothing_else() {
        // Whole numbers: every sum of them is exact, in whatever order it is taken.
        let whole = |shape: &[usize]| (ramp(shape) * 8.0).unwrap().round().unwrap();
        let (w, a, b) = (whole(&[3, 5]), whole(&[2, 3]), whole(&[5, 2]));
        let rule = Arc::new(Lora::new(&a, &b, 0.5, None, None, true).unwrap());
        let turned = Weight::dense(w.clone()).wrap(Arc::new(Turned::new(rule)));
        let want = (w + (b.matmul(&a).unwrap() * 0.5).unwrap().t().unwrap()).unwrap();
        assert_eq!(turned.tensor().unwrap().to_vec2::<f32>().unwrap(), want.to_vec2::<f32>().unwrap());
        assert_eq!(turned.params().len(), 2);
        assert!(turned.before().is_some());
    }
}
