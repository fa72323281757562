//! A weight seen as the groups of its rows: what a rule does to rows, it then does to groups.
//!
//! `[rows, cols]` in groups of g columns is a matrix `[rows (cols / g), g]`, and where columns are left over
//! another, `[rows, cols mod g]`. Gradients flow through both ways.

use candle_core::Tensor;

use crate::kernels::Groups;
use crate::{Error, Result};

/// How a weight of one shape falls into groups.
#[derive(Clone, Debug)]
pub(super) struct Split {
    shape: Vec<usize>,
    rows: usize,
    groups: Groups,
}

/// `w` in another shape; itself where it has that one, so that no op of candle's stands behind it.
fn shaped(w: &Tensor, shape: &[usize]) -> Result<Tensor> {
    match w.dims() == shape {
        true => Ok(w.clone()),
        false => Ok(w.reshape(shape)?),
    }
}

impl Split {
    /// Of `w [rows, ..]`, `group` columns each; none: the whole row is one. A group of 0 columns and a
    /// weight without elements are errors.
    pub fn of(w: &Tensor, group: Option<usize>) -> Result<Self> {
        let shape = w.dims().to_vec();
        if group == Some(0) {
            return Err(Error::usage("group = 0: expected 1 column or more"));
        }
        let rows = shape.first().copied().unwrap_or(0);
        if w.elem_count() == 0 || rows == 0 {
            return Err(Error::Run(format!("found a weight {shape:?}, expected rows and columns")));
        }
        Ok(Split { groups: Groups::new(w.elem_count() / rows, group), shape, rows })
    }

    /// Groups of full width in a row.
    fn full(&self) -> usize {
        self.groups.cols() / self.groups.width()
    }

    /// `w` as matrices with a group in each row: the full ones, then the shorter ones where there are any.
    pub fn parts(&self, w: &Tensor) -> Result<Vec<Tensor>> {
        let (full, width, rest) = (self.full(), self.groups.width(), self.groups.rest());
        if rest == 0 {
            return Ok(vec![shaped(w, &[self.rows * full, width])?]);
        }
        let flat = shaped(w, &[self.rows, self.groups.cols()])?;
        let main = flat.narrow(1, 0, full * width)?.contiguous()?.reshape((self.rows * full, width))?;
        Ok(vec![main, flat.narrow(1, full * width, rest)?.contiguous()?])
    }

    /// The way back from [`Split::parts`].
    pub fn join(&self, parts: &[Tensor]) -> Result<Tensor> {
        shaped(&self.side_by_side(parts, self.full() * self.groups.width())?, &self.shape)
    }

    /// Steps `[rows, groups]`, or `[rows]` where a row is one group, as those of each part: `[groups]`.
    pub fn steps_of_parts(&self, step: &Tensor) -> Result<Vec<Tensor>> {
        let (count, full) = (self.groups.count(), self.full());
        let expected = self.step_shape();
        if step.dims() != expected {
            let found = step.dims();
            return Err(Error::Run(format!("found steps {found:?}, expected {expected:?}")));
        }
        let step = step.reshape((self.rows, count))?;
        if count == full {
            return Ok(vec![step.flatten_all()?]);
        }
        let main = step.narrow(1, 0, full)?.contiguous()?.flatten_all()?;
        Ok(vec![main, step.narrow(1, full, 1)?.contiguous()?.flatten_all()?])
    }

    /// The way back from [`Split::steps_of_parts`].
    pub fn join_steps(&self, parts: &[Tensor]) -> Result<Tensor> {
        Ok(self.side_by_side(parts, self.full())?.reshape(self.step_shape())?)
    }

    /// `[rows, groups]`, or `[rows]` where a row is one group.
    fn step_shape(&self) -> Vec<usize> {
        match self.groups.group() {
            None => vec![self.rows],
            Some(_) => vec![self.rows, self.groups.count()],
        }
    }

    /// The parts as columns of one matrix, the first `main` of them those of the first part.
    fn side_by_side(&self, parts: &[Tensor], main: usize) -> Result<Tensor> {
        match parts {
            [all] => Ok(all.clone()),
            [first, last] => {
                let (first, last) = (first.reshape((self.rows, main))?, last.reshape((self.rows, ()))?);
                Ok(Tensor::cat(&[first, last], 1)?)
            }
            _ => Err(Error::Run(format!("found {} parts of a weight, expected 1 or 2", parts.len()))),
        }
    }

    /// The columns of a group; none where a row is one.
    pub fn group(&self) -> Option<usize> {
        self.groups.group()
    }

    /// What a rule for rows makes of a weight's groups.
    pub fn map(&self, w: &Tensor, rule: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let parts = self.parts(w)?.iter().map(rule).collect::<Result<Vec<_>>>()?;
        self.join(&parts)
    }

    /// As [`Split::map`], for a rule with a step for each row.
    pub fn map_steps(
        &self,
        w: &Tensor,
        step: &Tensor,
        rule: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (parts, steps) = (self.parts(w)?, self.steps_of_parts(step)?);
        let parts = parts.iter().zip(&steps).map(|(w, s)| rule(w, s)).collect::<Result<Vec<_>>>()?;
        self.join(&parts)
    }

    /// The step that a rule finds for each group.
    pub fn find_steps(&self, w: &Tensor, rule: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let parts = self.parts(w)?.iter().map(rule).collect::<Result<Vec<_>>>()?;
        self.join_steps(&parts)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::random::Random;
    use crate::transform::{Lsq, OnGrid, StatsQ, WeightQuant};
    use crate::weights::{Expr, Packed, Transform, Weight, Weights};

    fn random(name: &str, shape: &[usize]) -> Tensor {
        let mut random = Random::new(5, name, &[]);
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.normal()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn flat(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Shapes and groups: with a rest, without, of one column, of the whole row and more.
    const CASES: [(&[usize], usize); 8] = [
        (&[3, 172], 64),
        (&[5, 12], 4),
        (&[2, 7], 1),
        (&[4, 9], 9),
        (&[4, 9], 100),
        (&[1, 5], 3),
        (&[3, 2, 3, 2], 5),
        (&[7, 1], 1),
    ];

    /// The columns of each group of a row of `cols`, by hand.
    fn ranges(cols: usize, group: usize) -> Vec<std::ops::Range<usize>> {
        (0..cols).step_by(group).map(|from| from..cols.min(from + group)).collect()
    }

    #[test]
    fn there_and_back_and_each_group_a_row() {
        for (shape, group) in CASES {
            let w = random("w", shape);
            let split = Split::of(&w, Some(group)).unwrap();
            let parts = split.parts(&w).unwrap();
            assert_eq!(flat(&split.join(&parts).unwrap()), flat(&w));
            let cols = w.elem_count() / shape[0];
            let sums = split.find_steps(&w, |rows| Ok(rows.sum(1)?)).unwrap();
            let values = flat(&w);
            let expected: Vec<f32> = values
                .chunks(cols)
                .flat_map(|row| ranges(cols, group).into_iter().map(|r| row[r].iter().sum::<f32>()))
                .collect();
            for (sum, expected) in flat(&sums).iter().zip(&expected) {
                assert!((sum - expected).abs() < 1e-4, "{shape:?} in groups of {group}");
            }
            let groups = cols.div_ceil(group);
            assert_eq!(sums.dims(), if groups > 1 { vec![shape[0], groups] } else { vec![shape[0]] });
            let steps = split.steps_of_parts(&sums).unwrap();
            assert_eq!(flat(&split.join_steps(&steps).unwrap()), flat(&sums));
        }
        let w = random("w", &[2, 5]);
        assert!(Split::of(&w, Some(0)).unwrap_err().to_string().contains("group = 0"));
        let wrong = Split::of(&w, Some(2)).unwrap().steps_of_parts(&random("s", &[2, 2]));
        assert!(wrong.unwrap_err().to_string().contains("found steps [2, 2], expected [2, 3]"));
        let empty = Tensor::zeros((0, 3), DType::F32, &Device::Cpu).unwrap();
        assert!(Split::of(&empty, None).unwrap_err().to_string().contains("[0, 3]"));
    }

    type Make = fn(&Tensor, Option<usize>) -> Arc<dyn Transform>;

    /// Every rule for weights, annealed too.
    fn rules() -> [(&'static str, Make); 6] {
        [
            ("statsq", |_, g| Arc::new(StatsQ::grouped(2, g).unwrap())),
            ("statsq annealed", |_, g| StatsQ::grouped(3, g).unwrap().calmed(Some(0.1)).unwrap()),
            ("lsq", |w, g| Arc::new(Lsq::start(2, g, w).unwrap())),
            ("lsq 4", |w, g| Arc::new(Lsq::start(4, g, w).unwrap())),
            ("least squares", |w, g| WeightQuant::Statsq.untrained(2, g, w).unwrap()),
            ("least squares 3", |w, g| {
                Arc::new(OnGrid::fit(WeightQuant::Lsq.grid(3).unwrap(), g, w).unwrap())
            }),
        ]
    }

    /// Values of a rule and the gradients of its input and its step, for the same upstream gradient.
    fn run(
        rule: &dyn Transform,
        w: &Tensor,
        upstream: &Tensor,
    ) -> (Vec<f32>, Option<Vec<f32>>, Option<Vec<f32>>) {
        let w = Var::from_tensor(w).unwrap();
        let y = rule.apply(&[w.as_tensor().clone()]).unwrap();
        let grads = (&y * upstream).unwrap().sum_all().unwrap().backward().unwrap();
        let step = rule.params().first().map(|(_, var, _)| flat(grads.get(var).unwrap()));
        (flat(&y), grads.get(&w).map(flat), step)
    }

    #[test]
    fn a_group_is_treated_as_a_row_of_its_own() {
        for (name, make) in rules() {
            for (shape, group) in CASES {
                let (w, upstream) = (random("w", shape), random("g", shape));
                let cols = w.elem_count() / shape[0];
                let what = format!("{name} {shape:?} in groups of {group}");
                let rule = make(&w, Some(group));
                let (values, dw, ds) = run(&*rule, &w, &upstream);
                let gate = rule.gate(std::slice::from_ref(&w)).unwrap().map(|gate| flat(&gate));
                let quantized = rule.quantize(std::slice::from_ref(&w)).unwrap().unwrap();
                assert_eq!(quantized.codes.dims(), shape, "{what}");
                let steps = flat(&quantized.step);
                let ranges = ranges(cols, group);
                for row in 0..shape[0] {
                    for (i, range) in ranges.iter().enumerate() {
                        let part = |t: &Tensor| {
                            let row = t.reshape((shape[0], cols)).unwrap().narrow(0, row, 1).unwrap();
                            row.narrow(1, range.start, range.len()).unwrap().contiguous().unwrap()
                        };
                        let at = row * cols + range.start..row * cols + range.end;
                        let alone = make(&part(&w), None);
                        let (v, d, s) = run(&*alone, &part(&w), &part(&upstream));
                        assert_eq!(values[at.clone()], v, "{what}: values");
                        match (&dw, d) {
                            (Some(dw), Some(d)) => assert_eq!(dw[at.clone()], d, "{what}: gradient"),
                            (dw, d) => assert_eq!((dw.is_none(), d.is_none()), (true, true), "{what}"),
                        }
                        let at_step = row * ranges.len() + i;
                        if let (Some(ds), Some(s)) = (&ds, s) {
                            // The same sum, in an order that the number of rows decides; and 1 / sqrt(m) of
                            // the elements that share the step, as of a row.
                            assert!((ds[at_step] - s[0]).abs() <= 1e-5 * (1.0 + s[0].abs()), "{what}: step");
                        }
                        let one = alone.quantize(&[part(&w)]).unwrap().unwrap();
                        assert_eq!(flat(&quantized.codes)[at.clone()], flat(&one.codes), "{what}: codes");
                        assert_eq!(steps[at_step], flat(&one.step)[0], "{what}: step");
                        if let Some(gate) = &gate {
                            let one = alone.gate(&[part(&w)]).unwrap().unwrap();
                            assert_eq!(gate[at], flat(&one), "{what}: gate");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn packed_equals_fake_quantized_and_both_readings_agree() {
        for (name, make) in rules() {
            for (shape, group) in CASES {
                let w = random("w", shape);
                let what = format!("{name} {shape:?} in groups of {group}");
                let mut store = Weights::default();
                store.insert("w", Weight::latent(&w).unwrap().wrap(make(&w, Some(group))));
                let packed = store.packed().unwrap();
                let Expr::Packed(p) = packed.get("w").unwrap().expr() else { panic!("{what}: not packed") };
                let groups = (w.elem_count() / shape[0]).div_ceil(group);
                assert_eq!(p.step().len(), shape[0] * groups, "{what}");
                let (fake, real) = (store.get("w").unwrap().tensor().unwrap(), p.tensor().unwrap());
                assert_eq!(fake.dims(), real.dims());
                // To the bit, but for the sign of a zero, which codes do not hold.
                assert_eq!(flat(&fake), flat(&real), "{what}");
                if shape.len() == 2 {
                    let x = random("x", &[2, 3, shape[1]]);
                    let dense = x.broadcast_matmul(&fake.t().unwrap()).unwrap();
                    for y in [store.get("w").unwrap().matmul(&x), packed.get("w").unwrap().matmul(&x)] {
                        for (y, dense) in flat(&y.unwrap()).iter().zip(flat(&dense)) {
                            // f32 sums of up to 172 terms in another order.
                            assert!((y - dense).abs() <= 2e-5 * (1.0 + dense.abs()), "{what}: {y} {dense}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn an_lsq_step_is_a_parameter_of_its_own_for_each_group() {
        let w = random("w", &[3, 10]);
        let rule = Lsq::start(4, Some(4), &w).unwrap();
        let (suffix, var, _) = rule.params().remove(0);
        assert_eq!((suffix, var.dims()), ("scale", [3, 3].as_slice()));
        assert_eq!(rule.tensors()[0].1.dims(), [3, 3]);
        // Training moves the parameter, and the rule with it.
        var.set(&Tensor::full(0.25f32, (3, 3), &Device::Cpu).unwrap()).unwrap();
        let quantized = rule.quantize(std::slice::from_ref(&w)).unwrap().unwrap();
        assert_eq!(flat(&quantized.step), [0.25; 9]);
        let packed = Packed::pack(&quantized).unwrap();
        assert_eq!(flat(&packed.tensor().unwrap()), flat(&rule.apply(&[w]).unwrap()));
        let frozen = rule.frozen().unwrap();
        assert!(frozen.params().is_empty() && frozen.tensors()[0].1.dims() == [3, 3]);
    }
}
