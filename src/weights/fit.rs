//! Packing a finished weight: the steps that leave the least error, found group by group.
//!
//! A weight is taken by blocks of rows, so that beside it and its codes little is in memory whatever its
//! dtype. Each group of each row gets the better, in squared error, of two steps: the one at which the
//! outermost level reaches the group's largest magnitude (absmax), and the one of least squares.

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::packed::{flushed, Grid, Packed};
use crate::kernels::{absmax_step, best_step, round_to, Groups, Levels, PackedRows};
use crate::{Error, Result};

/// Elements of a weight that are taken at a time.
const BLOCK: usize = 1 << 20;

/// What packing a weight cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fit {
    /// Mean of the squared differences between the weight and what its codes stand for.
    pub mse: f64,
    /// Mean square of the weight itself.
    pub mean_square: f64,
    /// The largest difference.
    pub max_error: f64,
    /// The share of groups for which the step of least squares was better than absmax.
    pub least_squares: f64,
}

impl Fit {
    /// The squared error relative to the weight's: 0 nothing lost, 1 as much as there was.
    pub fn relative(&self) -> f64 {
        if self.mean_square > 0.0 {
            self.mse / self.mean_square
        } else {
            0.0
        }
    }
}

/// How a group's step is chosen.
#[derive(Clone, Copy)]
enum Rule {
    Absmax,
    Better,
}

/// Sums over weights or groups.
#[derive(Clone, Copy, Default)]
struct Sums {
    squares: f64,
    errors: f64,
    largest: f64,
    least_squares: usize,
}

impl Sums {
    fn add(self, other: Sums) -> Sums {
        Sums {
            squares: self.squares + other.squares,
            errors: self.errors + other.errors,
            largest: self.largest.max(other.largest),
            least_squares: self.least_squares + other.least_squares,
        }
    }
}

impl Packed {
    /// Packs `w [rows, ..]` of any float dtype with the better of absmax and least-squares steps for every
    /// `group` columns of a row (none: for the whole row; the last group holds what is left). Errs on a
    /// weight without rows and columns and on values that are not finite.
    pub fn fit(w: &Tensor, grid: Grid, group: Option<usize>) -> Result<(Self, Fit)> {
        pack(w, grid, group, Rule::Better)
    }

    /// As [`Packed::fit`], by absmax steps and rounding to the nearest alone: what others are measured by.
    pub fn nearest(w: &Tensor, grid: Grid, group: Option<usize>) -> Result<(Self, Fit)> {
        pack(w, grid, group, Rule::Absmax)
    }
}

fn pack(w: &Tensor, grid: Grid, group: Option<usize>, rule: Rule) -> Result<(Packed, Fit)> {
    let (shape, count) = (w.dims().to_vec(), w.elem_count());
    if shape.len() < 2 || count == 0 || !w.dtype().is_float() {
        let dtype = w.dtype();
        return Err(Error::Run(format!("found {dtype:?} {shape:?}, expected floats in rows and columns")));
    }
    if group == Some(0) {
        return Err(Error::usage("group = 0: expected 1 column or more"));
    }
    let (rows, levels) = (shape[0], grid.levels());
    let groups = Groups::new(count / rows, group);
    let (cols, steps, bytes) = (groups.cols(), groups.count(), grid.row_bytes(groups.cols()));
    let flat = w.detach().reshape((rows, cols))?;
    let mut codes = vec![0u8; rows * bytes];
    let mut step = vec![0f32; rows * steps];
    let mut sums = Sums::default();
    let block = (BLOCK / cols).max(1);
    for start in (0..rows).step_by(block) {
        let part = flat.narrow(0, start, block.min(rows - start))?;
        let values = part.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            let (row, column) = (start + at / cols, at % cols);
            return Err(Error::Run(format!(
                "row {row}, column {column} holds {}, expected finite weights",
                values[at]
            )));
        }
        let done: Vec<Sums> = values
            .par_chunks(cols)
            .zip(codes[start * bytes..].par_chunks_mut(bytes))
            .zip(step[start * steps..].par_chunks_mut(steps))
            .map(|((row, codes), step)| pack_row(row, grid, groups.width(), (codes, step), rule))
            .collect();
        sums = done.into_iter().fold(sums, Sums::add);
    }
    let fit = Fit {
        mse: sums.errors / count as f64,
        mean_square: sums.squares / count as f64,
        max_error: sums.largest,
        least_squares: sums.least_squares as f64 / (rows * steps) as f64,
    };
    let (bits, group) = (grid.bits, groups.width());
    let rows = PackedRows::new(levels, bits, cols, group, codes.into(), step.into());
    Ok((Packed::of(grid, &shape, rows, w.device()), fit))
}

/// Packs one row into its bytes and steps.
fn pack_row(
    row: &[f32],
    grid: Grid,
    width: usize,
    (bytes, steps): (&mut [u8], &mut [f32]),
    rule: Rule,
) -> Sums {
    let levels = grid.levels();
    let mut codes = vec![0f32; row.len()];
    let mut sums = Sums::default();
    for ((w, codes), step) in row.chunks(width).zip(codes.chunks_mut(width)).zip(steps) {
        let found = choose(w, levels, rule, codes);
        *step = found.0;
        sums = sums.add(found.1);
    }
    PackedRows::pack_row(levels, grid.bits, &codes, bytes);
    sums
}

/// The step of one group; writes its codes.
fn choose(w: &[f32], levels: Levels, rule: Rule, codes: &mut [f32]) -> (f32, Sums) {
    let squares = w.iter().map(|&w| f64::from(w) * f64::from(w)).sum();
    let absmax = flushed(absmax_step(w, levels));
    let (errors, largest) = round_to(w, absmax, levels, codes);
    let plain = (absmax, Sums { squares, errors, largest, least_squares: 0 });
    if let Rule::Absmax = rule {
        return plain;
    }
    let best = flushed(best_step(w, levels));
    let (errors, largest) = round_to(w, best, levels, codes);
    if errors < plain.1.errors {
        return (best, Sums { squares, errors, largest, least_squares: 1 });
    }
    round_to(w, absmax, levels, codes);
    plain
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::random::Random;
    use crate::weights::{Centering, Expr, Weight, Weights};

    fn random(seed: u64, shape: &[usize]) -> Tensor {
        let mut random = Random::new(seed, "weights", &[]);
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.normal()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn flat(t: &Tensor) -> Vec<f32> {
        t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn grids() -> Vec<Grid> {
        let grids = (2..=8).flat_map(|bits| {
            [Centering::MidRise, Centering::Signed].map(|centering| Grid::new(bits, centering).unwrap())
        });
        grids.collect()
    }

    #[test]
    fn the_reported_error_is_the_error_and_never_worse_than_absmax() {
        for grid in grids() {
            for (shape, group) in [
                (vec![3, 172], Some(64)),
                (vec![5, 7], None),
                (vec![2, 3, 4], Some(5)),
                (vec![1, 1], Some(1)),
            ] {
                let w = random(1, &shape);
                let what = format!("{grid:?} {shape:?} in groups of {group:?}");
                let (nearest, plain) = Packed::nearest(&w, grid, group).unwrap();
                let (packed, fit) = Packed::fit(&w, grid, group).unwrap();
                for (packed, fit) in [(&nearest, &plain), (&packed, &fit)] {
                    assert_eq!(packed.shape(), shape, "{what}");
                    let errors: Vec<f64> = flat(&w)
                        .iter()
                        .zip(flat(&packed.tensor().unwrap()))
                        .map(|(w, q)| (f64::from(*w) - f64::from(q)).abs())
                        .collect();
                    let mse = errors.iter().map(|e| e * e).sum::<f64>() / errors.len() as f64;
                    assert!((fit.mse - mse).abs() <= 1e-12 + 1e-9 * mse, "{what}: {fit:?}, {mse}");
                    assert_eq!(fit.max_error, errors.iter().copied().fold(0.0, f64::max), "{what}");
                }
                assert!(fit.mse <= plain.mse, "{what}: {fit:?} {plain:?}");
                assert_eq!(plain.least_squares, 0.0);
                // With no step above absmax, a whole group has no clipped weight, and none is farther than
                // half a step off.
                if shape.len() == 2 {
                    let largest = nearest.step().iter().copied().fold(0f32, f32::max);
                    assert!(plain.max_error <= f64::from(largest) * 0.500_01, "{what}: {plain:?}");
                }
            }
        }
    }

    #[test]
    fn groups_of_a_gaussian_lose_less_than_rows() {
        let w = random(2, &[8, 512]);
        for grid in grids() {
            let error = |group| Packed::fit(&w, grid, group).unwrap().1.relative();
            let (row, wide, narrow) = (error(None), error(Some(128)), error(Some(16)));
            assert!(narrow < wide && wide < row, "{grid:?}: {row} {wide} {narrow}");
        }
        // Max (1960), table II: four uniform levels of a unit Gaussian leave 0.1188; least squares over a
        // row comes near, absmax does not.
        let grid = Grid::new(2, Centering::MidRise).unwrap();
        let (fit, nearest) =
            (Packed::fit(&w, grid, None).unwrap().1, Packed::nearest(&w, grid, None).unwrap().1);
        assert!(
            (fit.relative() / 0.1188 - 1.0).abs() < 0.05 && nearest.relative() > 0.2,
            "{fit:?} {nearest:?}"
        );
        assert_eq!(fit.least_squares, 1.0);
    }

    #[test]
    fn weights_on_a_grid_are_found_exactly() {
        let w = Tensor::new(&[[0.3f32, -0.1, 0.1, -0.3, 0.5, -1.5], [0.0; 6]], &Device::Cpu).unwrap();
        let (packed, fit) = Packed::fit(&w, Grid::new(2, Centering::MidRise).unwrap(), Some(4)).unwrap();
        assert!(fit.max_error < 1e-7, "{fit:?}");
        let steps: Vec<f32> = packed.step().iter().map(|s| (s * 1e6).round() / 1e6).collect();
        assert_eq!(steps, [0.2, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn half_precision_and_blocks_of_rows_change_nothing() {
        // More elements than one block holds.
        let w = random(3, &[BLOCK / 1000 + 9, 1000]).to_dtype(DType::BF16).unwrap();
        let grid = Grid::new(2, Centering::Signed).unwrap();
        let (packed, _) = Packed::nearest(&w, grid, Some(64)).unwrap();
        let wide = w.to_dtype(DType::F32).unwrap();
        for row in [0, BLOCK / 1000 - 1, BLOCK / 1000, BLOCK / 1000 + 8] {
            let alone = Packed::nearest(&wide.narrow(0, row, 1).unwrap(), grid, Some(64)).unwrap().0;
            let id = row as u32;
            assert_eq!(
                flat(&packed.select_rows(&[id]).unwrap()),
                flat(&alone.tensor().unwrap()),
                "row {row}"
            );
        }
    }

    #[test]
    fn threads_change_nothing() {
        let w = random(4, &[33, 100]);
        let grid = Grid::new(3, Centering::MidRise).unwrap();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (packed, fit) = pool.install(|| Packed::fit(&w, grid, Some(32)).unwrap());
            (packed.step().to_vec(), flat(&packed.tensor().unwrap()), fit)
        };
        let one = run(1);
        assert!(one == run(2) && one == run(5));
    }

    #[test]
    fn what_cannot_be_packed_is_named() {
        let grid = Grid::new(4, Centering::Signed).unwrap();
        let error = |w: &Tensor, group| Packed::fit(w, grid, group).map(|_| ()).unwrap_err().to_string();
        let w = Tensor::new(&[[1f32, 2.0], [3.0, f32::NAN]], &Device::Cpu).unwrap();
        assert_eq!(error(&w, None), "row 1, column 1 holds NaN, expected finite weights");
        assert!(error(&random(1, &[3]), None).contains("found F32 [3], expected floats in rows and columns"));
        assert!(error(&random(1, &[0, 3]), None).contains("[0, 3]"));
        assert!(error(&w.to_dtype(DType::U32).unwrap(), None).contains("found U32"));
        assert!(error(&random(1, &[2, 3]), Some(0)).contains("group = 0"));
    }

    #[test]
    fn a_store_is_packed_one_by_one() {
        let mut store =
            Weights::from_tensors(["a", "b", "c"].map(|name| (name.to_string(), random(7, &[3, 10]))));
        store.insert("c", Weight::latent(&random(8, &[3, 10])).unwrap());
        let grid = Grid::new(4, Centering::MidRise).unwrap();
        let mut heard = Vec::new();
        store
            .pack_frozen(&["b", "a"], grid, Some(4), |name, fit| heard.push((name.to_string(), *fit)))
            .unwrap();
        assert_eq!(heard.iter().map(|h| h.0.as_str()).collect::<Vec<_>>(), ["b", "a"]);
        assert!(heard[0].1 == heard[1].1 && heard[0].1.relative() < 0.02, "{heard:?}");
        assert_eq!(store.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["a", "b", "c"]);
        let Expr::Packed(packed) = store.get("a").unwrap().expr() else { panic!("a is not packed") };
        assert_eq!((packed.group(), packed.grid()), (Some(4), grid));
        let mut refused =
            |name: &str| store.pack_frozen(&[name], grid, None, |_, _| ()).unwrap_err().to_string();
        assert_eq!(refused("c"), "tensor c: found a trainable weight, expected a frozen dense one");
        assert_eq!(refused("a"), "tensor a: found a packed weight, expected a frozen dense one");
        assert!(refused("d").contains("tensor d: not found"));
        let broken = Tensor::full(f32::INFINITY, (2, 2), &Device::Cpu).unwrap();
        let mut store = Weights::from_tensors([("w".to_string(), broken)]);
        let error = store.pack_frozen(&["w"], grid, None, |_, _| ()).unwrap_err();
        assert_eq!(error.to_string(), "tensor w: row 0, column 0 holds inf, expected finite weights");
        assert_eq!(error.exit_code(), 4);
    }
}
