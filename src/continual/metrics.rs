//! What learning one task after another kept and lost, from the matrix `R` of T tasks: `R[i][j]` is the
//! accuracy on the test data of task j after task i was learned.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The figures of a run over tasks, in the unit of its accuracies. What one task alone leaves undefined is
/// `None`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Mean over all tasks at the end (Lopez-Paz and Ranzato 2017).
    pub average_accuracy: f64,
    /// Mean over earlier tasks of the end less the moment each was learned; negative is forgetting
    /// (Lopez-Paz and Ranzato 2017).
    pub backward_transfer: Option<f64>,
    /// Mean over later tasks of the moment before each was learned less the untrained model (Lopez-Paz and
    /// Ranzato 2017). `None` too where the untrained model was not measured.
    pub forward_transfer: Option<f64>,
    /// The negative of `backward_transfer`, which Avalanche calls forgetting.
    pub forgetting_last: Option<f64>,
    /// Mean over earlier tasks of the best from the moment each was learned to before the last task, less the
    /// end (Chaudhry et al. 2018).
    pub forgetting_max_since_learned: Option<f64>,
    /// The same with the best before the last task at any moment, before the task was learned too.
    pub forgetting_max_any_row: Option<f64>,
    /// Mean over all tasks of the moment each was learned: without it a model that never moves wins.
    pub learning_accuracy: f64,
    /// Mean over the moments of the mean over the tasks learned by then (Rebuffi et al. 2017).
    pub average_incremental_accuracy: f64,
}

/// The figures of losses in nats per token in place of accuracies, with the sign that makes forgetting
/// positive.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossMetrics {
    /// Mean over all tasks at the end.
    pub average_loss: f64,
    /// Mean over all tasks of the moment each was learned.
    pub learning_loss: f64,
    /// Mean over earlier tasks of the end less the moment each was learned.
    pub forgetting: Option<f64>,
    /// e to the `forgetting`: what the perplexity of an earlier task is multiplied by, as a geometric mean.
    pub perplexity_ratio: Option<f64>,
}

/// Errs where the matrix is empty, not square or not finite.
fn check(r: &[Vec<f64>]) -> Result<usize> {
    let tasks = r.len();
    if tasks == 0 {
        return Err(Error::Run("matrix of tasks: found none, expected at least one".into()));
    }
    for (i, row) in r.iter().enumerate() {
        if row.len() != tasks {
            let message = format!("row {i}: found {} columns, expected {tasks}", row.len());
            return Err(Error::Run(format!("matrix of tasks: {message}")));
        }
        if let Some(j) = row.iter().position(|v| !v.is_finite()) {
            let message = format!("row {i}, column {j}: found {}, expected a finite number", row[j]);
            return Err(Error::Run(format!("matrix of tasks: {message}")));
        }
    }
    Ok(tasks)
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0usize), |(sum, count), v| (sum + v, count + 1));
    (count > 0).then(|| sum / count as f64)
}

/// The figures of an accuracy matrix `r`, square, row i after task i; `before`: the untrained model on each
/// task. Errs on other shapes and on what is not finite.
pub fn metrics(r: &[Vec<f64>], before: Option<&[f64]>) -> Result<Metrics> {
    let tasks = check(r)?;
    if let Some(before) = before.filter(|b| b.len() != tasks || b.iter().any(|v| !v.is_finite())) {
        let message = format!("before training: found {before:?}, expected {tasks} finite numbers");
        return Err(Error::Run(format!("matrix of tasks: {message}")));
    }
    let last = tasks - 1;
    let end = &r[last];
    let best = |rows: std::ops::Range<usize>, j: usize| {
        r[rows].iter().map(|row| row[j]).fold(f64::NEG_INFINITY, f64::max)
    };
    let backward_transfer = mean((0..last).map(|j| end[j] - r[j][j]));
    Ok(Metrics {
        average_accuracy: mean(end.iter().copied()).unwrap_or(0.0),
        backward_transfer,
        forward_transfer: before.and_then(|b| mean((1..tasks).map(|j| r[j - 1][j] - b[j]))),
        forgetting_last: mean((0..last).map(|j| r[j][j] - end[j])),
        forgetting_max_since_learned: mean((0..last).map(|j| best(j..last, j) - end[j])),
        forgetting_max_any_row: mean((0..last).map(|j| best(0..last, j) - end[j])),
        learning_accuracy: mean((0..tasks).map(|j| r[j][j])).unwrap_or(0.0),
        average_incremental_accuracy: mean(
            r.iter().enumerate().filter_map(|(i, row)| mean(row[..=i].iter().copied())),
        )
        .unwrap_or(0.0),
    })
}

/// The figures of a matrix of mean losses in nats per token, `r[i][j]` on task j after task i. Errs as
/// [`metrics`] does.
pub fn loss_metrics(r: &[Vec<f64>]) -> Result<LossMetrics> {
    let tasks = check(r)?;
    let end = &r[tasks - 1];
    let forgetting = mean((0..tasks - 1).map(|j| end[j] - r[j][j]));
    Ok(LossMetrics {
        average_loss: mean(end.iter().copied()).unwrap_or(0.0),
        learning_loss: mean((0..tasks).map(|j| r[j][j])).unwrap_or(0.0),
        forgetting,
        perplexity_ratio: forgetting.map(f64::exp),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_tasks_by_hand() {
        let r = [vec![8.0, 3.0, 1.0], vec![6.0, 9.0, 2.0], vec![4.0, 5.0, 7.0]];
        let m = metrics(&r, Some(&[1.0, 1.0, 4.0])).unwrap();
        assert_eq!(m.average_accuracy, 16.0 / 3.0);
        assert_eq!(m.backward_transfer, Some((4.0 - 8.0 + 5.0 - 9.0) / 2.0));
        assert_eq!(m.forgetting_last, Some(4.0));
        // Onto task 1 after task 0, onto task 2 after task 1.
        assert_eq!(m.forward_transfer, Some((3.0 - 1.0 + 2.0 - 4.0) / 2.0));
        assert_eq!(m.learning_accuracy, 8.0);
        assert_eq!(m.average_incremental_accuracy, (8.0 + 7.5 + 16.0 / 3.0) / 3.0);
        assert_eq!(metrics(&r, None).unwrap().forward_transfer, None);
        // Best before it was learned: 9 on task 1, where learning it gave 6.
        let r = [vec![8.0, 9.0, 0.0], vec![9.0, 6.0, 0.0], vec![5.0, 5.0, 0.0]];
        let m = metrics(&r, None).unwrap();
        assert_eq!(m.forgetting_max_any_row, Some((4.0 + 4.0) / 2.0));
        assert_eq!(m.forgetting_max_since_learned, Some((4.0 + 1.0) / 2.0));
        assert_eq!(m.forgetting_last, Some((3.0 + 1.0) / 2.0));
    }

    #[test]
    fn one_task_forgets_nothing_that_could_be_told() {
        let m = metrics(&[vec![0.5]], Some(&[0.1])).unwrap();
        assert_eq!(
            (m.average_accuracy, m.learning_accuracy, m.average_incremental_accuracy),
            (0.5, 0.5, 0.5)
        );
        let undefined = [
            m.backward_transfer,
            m.forward_transfer,
            m.forgetting_last,
            m.forgetting_max_since_learned,
            m.forgetting_max_any_row,
        ];
        assert_eq!(undefined, [None; 5]);
        let json = serde_json::to_value(m).unwrap();
        assert!(json["backward_transfer"].is_null());
    }

    #[test]
    fn losses_forget_upwards() {
        let m = loss_metrics(&[vec![1.0, 3.0], vec![1.5, 2.0]]).unwrap();
        assert_eq!((m.average_loss, m.learning_loss, m.forgetting), (1.75, 1.5, Some(0.5)));
        assert_eq!(m.perplexity_ratio, Some(0.5f64.exp()));
        assert_eq!(loss_metrics(&[vec![1.0]]).unwrap().perplexity_ratio, None);
    }

    #[test]
    fn what_is_no_matrix_is_refused() {
        let message = |r: &[Vec<f64>], b: Option<&[f64]>| metrics(r, b).unwrap_err().to_string();
        assert!(message(&[], None).contains("expected at least one"));
        assert!(message(&[vec![1.0, 2.0], vec![1.0]], None).contains("row 1: found 1"));
        assert!(message(&[vec![f64::NAN]], None).contains("row 0, column 0: found NaN"));
        assert!(message(&[vec![1.0]], Some(&[])).contains("expected 1 finite"));
        assert!(loss_metrics(&[vec![1.0, 2.0]]).is_err());
    }
}
