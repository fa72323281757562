//! How far merging moved a model, and what packing it again lost.

use candle_core::{DType, Tensor};

use crate::Result;

/// What merging changed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Changes {
    /// How many tensors changed.
    pub tensors: usize,
    /// The largest change of an element, and in which tensor.
    pub largest: (f64, String),
    /// The largest change of a tensor, relative: the norm of the change over that of the base; and which.
    pub relative: (f64, String),
}

/// What packing a merged model again lost against the exact merge.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rounding {
    /// The largest difference of an element, and in which tensor.
    pub largest: (f64, String),
    /// The mean difference over the elements of the tensors that were packed again.
    pub mean: f64,
    /// The mean change that the adapters made to them, for comparison.
    pub change: f64,
}

/// Gathers the figures tensor by tensor.
#[derive(Debug, Default)]
pub(super) struct Compare {
    changes: Changes,
    unchanged: Vec<String>,
    largest: (f64, String),
    sums: (f64, f64),
    elements: u64,
}

fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?)
}

/// The largest and the summed difference, and the norms of the difference and of `a`.
fn gap(a: &[f32], b: &[f32]) -> (f64, f64, f64, f64) {
    let (mut largest, mut sum, mut square, mut norm) = (0f64, 0f64, 0f64, 0f64);
    for (&a, &b) in a.iter().zip(b) {
        let d = (f64::from(b) - f64::from(a)).abs();
        largest = largest.max(d);
        sum += d;
        square += d * d;
        norm += f64::from(a) * f64::from(a);
    }
    (largest, sum, square.sqrt(), norm.sqrt())
}

impl Compare {
    /// Takes in a tensor before and after; of a table with other rows, those that both have.
    pub(super) fn changed(&mut self, name: &str, before: &Tensor, after: &Tensor) -> Result<()> {
        let resized = before.dims() != after.dims();
        self.moved(name, &values(before)?, &values(after)?, resized);
        Ok(())
    }

    fn moved(&mut self, name: &str, before: &[f32], after: &[f32], resized: bool) {
        let (largest, _, square, norm) = gap(before, after);
        if largest == 0.0 && !resized {
            self.unchanged.push(name.to_string());
            return;
        }
        self.changes.tensors += 1;
        if largest > self.changes.largest.0 {
            self.changes.largest = (largest, name.to_string());
        }
        let relative = if norm > 0.0 { square / norm } else { f64::INFINITY };
        if relative > self.changes.relative.0 {
            self.changes.relative = (relative, name.to_string());
        }
    }

    /// Takes in a tensor that is packed again: the base's values, the exact merge, and what is stored.
    pub(super) fn requantized(
        &mut self,
        name: &str,
        before: &Tensor,
        exact: &Tensor,
        stored: &Tensor,
    ) -> Result<()> {
        let (before, exact, stored) = (values(before)?, values(exact)?, values(stored)?);
        self.moved(name, &before, &stored, false);
        let (largest, lost, _, _) = gap(&exact, &stored);
        if largest > self.largest.0 || self.elements == 0 {
            self.largest = (largest, name.to_string());
        }
        self.sums.0 += lost;
        self.sums.1 += gap(&before, &exact).1;
        self.elements += exact.len() as u64;
        Ok(())
    }

    pub(super) fn changes(&self) -> Changes {
        self.changes.clone()
    }

    /// What packing again lost, where anything was packed again.
    pub(super) fn rounding(&self) -> Option<Rounding> {
        let count = self.elements as f64;
        (self.elements > 0).then(|| Rounding {
            largest: self.largest.clone(),
            mean: self.sums.0 / count,
            change: self.sums.1 / count,
        })
    }

    /// What is worth a line.
    pub(super) fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if let Some(first) = self.unchanged.first() {
            let (count, of) = (self.unchanged.len(), self.unchanged.len() + self.changes.tensors);
            notes.push(format!(
                "{count} of {of} adapted tensors stay as they were after rounding, {first} first"
            ));
        }
        // A base on its grid takes small changes back to where it was: all of them is as much as it loses.
        if let Some(Rounding { mean, change, .. }) = self.rounding().filter(|r| 2.0 * r.mean > r.change) {
            notes.push(format!(
                "packing again lost {mean:.3e} an element, where the adapters changed {change:.3e}: a dense \
                 merge keeps the change"
            ));
        }
        notes
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    #[test]
    fn figures_by_hand() {
        let mut compare = Compare::default();
        compare.changed("a", &tensor(&[3.0, 4.0]), &tensor(&[3.0, 4.5])).unwrap();
        compare.changed("b", &tensor(&[0.5, 0.0]), &tensor(&[0.5, 0.25])).unwrap();
        compare.changed("c", &tensor(&[1.0]), &tensor(&[1.0])).unwrap();
        let changes = compare.changes();
        assert_eq!(changes.tensors, 2);
        assert_eq!(changes.largest, (0.5, "a".to_string()));
        assert_eq!(changes.relative, (0.5, "b".to_string()));
        assert_eq!(compare.rounding(), None);
        assert_eq!(compare.notes(), ["1 of 3 adapted tensors stay as they were after rounding, c first"]);
    }

    #[test]
    fn what_packing_loses_is_set_against_the_change() {
        let mut compare = Compare::default();
        let (before, exact) = (tensor(&[1.0, 2.0]), tensor(&[1.0, 2.25]));
        compare.requantized("a", &before, &exact, &tensor(&[1.5, 2.5])).unwrap();
        let rounding = compare.rounding().unwrap();
        assert_eq!(rounding, Rounding { largest: (0.5, "a".into()), mean: 0.375, change: 0.125 });
        assert!(compare.notes()[0].contains("packing again lost"));
    }
}
