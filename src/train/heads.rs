//! Outputs of several tasks in one layer: an image whose task is known is answered among the classes of
//! that task alone.

use std::ops::Range;

use candle_core::{Device, Tensor};

use crate::{Error, Result};

/// What is added to the logit of a class of another task: far below any logit, and finite.
const CLOSED: f32 = -1e9;

/// The classes of each task, as ranges of outputs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heads(pub Vec<Range<usize>>);

impl Heads {
    /// `logits [batch, classes]`, those of other tasks than each label's shut out; a label of no task is an
    /// error.
    pub fn open(&self, logits: &Tensor, labels: &[u32]) -> Result<Tensor> {
        let classes = logits.dim(1)?;
        let mut mask = vec![CLOSED; labels.len() * classes];
        for (row, &label) in mask.chunks_exact_mut(classes.max(1)).zip(labels) {
            let range = self.0.iter().find(|range| range.contains(&(label as usize)));
            let own = range.and_then(|range| row.get_mut(range.clone()));
            own.ok_or_else(|| Error::Run(format!("label {label}: it is no class of any task")))?.fill(0.0);
        }
        let mask = Tensor::from_vec(mask, (labels.len(), classes), &Device::Cpu)?;
        Ok((logits + mask.to_device(logits.device())?.to_dtype(logits.dtype())?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_own_task_stays_open() {
        let logits = Tensor::new(&[[1f32, 5.0, 2.0], [1.0, 5.0, 2.0]], &Device::Cpu).unwrap();
        let heads = Heads(vec![0..1, 1..3]);
        let open = heads.open(&logits, &[0, 2]).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(open[0][0], 1.0);
        assert_eq!(open[1][1..], [5.0, 2.0]);
        assert!(open[0][1] < -1e8 && open[0][2] < -1e8 && open[1][0] < -1e8);
        assert!(heads.open(&logits, &[0, 3]).unwrap_err().to_string().contains("label 3"));
    }
}
