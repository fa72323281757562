//! The learning rate over the steps of a phase.

use serde::{Deserialize, Serialize};

/// The shape of the learning rate after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Stays at `lr`.
    Constant,
    /// Half a cosine from `lr` at the end of warm-up to `min_lr` at the end of the phase, by step.
    Cosine,
    /// By whole epochs, as timm's scheduler runs the published OFQ recipes (ofq.md 6.2): warm-up counts
    /// from `warmup_lr`, the cosine's angle from epoch 0, and after its end the rate stays at `min_lr`.
    CosineEpochs,
    /// A straight line from `lr` at the end of warm-up to `min_lr`.
    Linear,
    /// Warm-up, stable, decay (Hu et al. 2024): stays at `lr` and over the last tenth of the steps after
    /// warm-up falls in a straight line to `min_lr`.
    Wsd,
}

/// The learning rate of a phase.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// Shape after warm-up.
    pub schedule: Schedule,
    /// Peak rate.
    pub lr: f64,
    /// Final rate.
    pub min_lr: f64,
    /// Steps of warm-up, a straight line from `warmup_lr`.
    pub warmup_steps: usize,
    /// Rate before the first step of warm-up.
    pub warmup_lr: f64,
    /// Steps of the phase.
    pub steps: usize,
    /// Steps of an epoch.
    pub epoch_steps: usize,
    /// Epochs that the cosine spans, for [`Schedule::CosineEpochs`].
    pub epochs: f64,
}

impl Rate {
    /// The rate of step `step`, counted from 0.
    pub fn at(&self, step: usize) -> f64 {
        if self.schedule == Schedule::CosineEpochs {
            return self.at_epoch(step / self.epoch_steps.max(1));
        }
        if step < self.warmup_steps {
            let share = (step + 1) as f64 / self.warmup_steps as f64;
            return self.warmup_lr + (self.lr - self.warmup_lr) * share;
        }
        let rest = self.steps.saturating_sub(self.warmup_steps).max(1);
        let share = ((step - self.warmup_steps) as f64 / rest as f64).min(1.0);
        match self.schedule {
            Schedule::Constant | Schedule::CosineEpochs => self.lr,
            Schedule::Linear => self.lr + (self.min_lr - self.lr) * share,
            Schedule::Wsd => self.lr + (self.min_lr - self.lr) * ((share - 0.9) * 10.0).max(0.0),
            Schedule::Cosine => {
                self.min_lr + (self.lr - self.min_lr) * 0.5 * (1.0 + (std::f64::consts::PI * share).cos())
            }
        }
    }

    fn at_epoch(&self, epoch: usize) -> f64 {
        let warmup = self.warmup_steps.div_ceil(self.epoch_steps.max(1));
        let t = epoch as f64;
        if epoch < warmup {
            return self.warmup_lr + t * (self.lr - self.warmup_lr) / warmup as f64;
        }
        if t >= self.epochs {
            return self.min_lr;
        }
        let angle = std::f64::consts::PI * t / self.epochs;
        self.min_lr + (self.lr - self.min_lr) * 0.5 * (1.0 + angle.cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate {
        schedule: Schedule::Cosine,
        lr: 1.0,
        min_lr: 0.2,
        warmup_steps: 4,
        warmup_lr: 0.0,
        steps: 14,
        epoch_steps: 2,
        epochs: 7.0,
    };

    #[test]
    fn cosine_by_hand() {
        assert_eq!((RATE.at(0), RATE.at(3), RATE.at(4)), (0.25, 1.0, 1.0));
        assert!((RATE.at(9) - 0.6).abs() < 1e-12); // half way: the middle of lr and min_lr
        assert!((RATE.at(14) - 0.2).abs() < 1e-12 && (RATE.at(99) - 0.2).abs() < 1e-12);
        let linear = Rate { schedule: Schedule::Linear, ..RATE };
        assert!((linear.at(9) - 0.6).abs() < 1e-12);
        assert_eq!(Rate { schedule: Schedule::Constant, ..RATE }.at(13), 1.0);
    }

    #[test]
    fn published_epochs() {
        // ofq.md 6.2, DeiT at 2 bits: five epochs of warm-up from 1e-6 to 5.47e-4, 300 epochs.
        let rate = Rate {
            schedule: Schedule::CosineEpochs,
            lr: 5.47e-4,
            min_lr: 1e-5,
            warmup_steps: 50,
            warmup_lr: 1e-6,
            steps: 3100,
            epoch_steps: 10,
            epochs: 300.0,
        };
        assert_eq!(rate.at(0), 1e-6);
        assert!((rate.at(19) - (1e-6 + (5.47e-4 - 1e-6) / 5.0)).abs() < 1e-12);
        let fifth = 1e-5 + (5.47e-4 - 1e-5) * (1.0 + (std::f64::consts::PI * 5.0 / 300.0).cos()) / 2.0;
        assert!((rate.at(50) - fifth).abs() < 1e-12);
        assert!((rate.at(1500) - (1e-5 + 5.37e-4 / 2.0)).abs() < 1e-12);
        assert_eq!(rate.at(3000), 1e-5);
    }
}
