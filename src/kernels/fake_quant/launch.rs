//! Launches of kernels/lsq.cu over a site.

use super::site::Site;
use crate::kernels::cuda::{self, Launch, Place};
use candle_core::backend::BackendStorage;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result};

const NAME: &str = "lsq";

/// Threads of a block, at most.
const THREADS: usize = 256;

/// An operand.
pub(super) type On<'a> = (&'a CudaStorage, &'a Layout);

/// How elements share scales, as the kernels number it.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Rows = 0,
    Columns = 1,
    Tensor = 2,
}

/// How threads walk along the rows. Where sums depend on it, a function of shapes, of the element type and of whether
/// addresses allow wide accesses.
struct Walk {
    rows: usize,
    kind: Kind,
    wide: bool,
    /// Threads along a row.
    team: usize,
    /// Blocks along a row.
    across: usize,
    /// Blocks, and teams in one.
    blocks: usize,
    in_block: usize,
}

impl Walk {
    /// Teams of rows.
    fn teams(&self) -> usize {
        self.blocks * self.in_block
    }

    /// Warps, or what of one there is, along a row.
    fn warps(&self) -> usize {
        self.across * (self.team / self.team.min(32))
    }
}

impl Site {
    /// A walk over all elements of `x` in at most `most` blocks, of which a team takes at least `each` rows where
    /// there are enough.
    fn walk(&self, x: On, places: &[Place], (each, most): (usize, usize)) -> Walk {
        let rows = x.1.shape().elem_count() / self.width;
        let wide = cuda::wide(x.0.dtype());
        let whole = self.width.is_multiple_of(wide) && places.iter().all(|place| place.aligned(16));
        let units = if whole { self.width / wide } else { self.width };
        let team = match units {
            0..=32 => units.next_power_of_two(),
            // Blocks along a row of one length.
            _ => units.div_ceil(units.div_ceil(THREADS)).next_multiple_of(32),
        };
        let across = units.div_ceil(team);
        let in_block = THREADS / team;
        let blocks = rows.div_ceil(in_block * each).min((most / across).max(1));
        let kind = match self.scales {
            1 => Kind::Tensor,
            _ if self.per_column => Kind::Columns,
            _ => Kind::Rows,
        };
        Walk { rows, kind, wide: whole, team, across, blocks: blocks.next_multiple_of(self.parts), in_block }
    }

    /// `launch` with what all kernels take last, run.
    ///
    /// # Safety
    /// The places before are those that the kernel takes, of the elements that the site has; sums are as large as
    /// the walk asks.
    unsafe fn run(&self, launch: Launch, walk: &Walk) -> Result<()> {
        let rows_per_scale = match walk.kind {
            Kind::Rows => self.run / self.width,
            Kind::Columns | Kind::Tensor => walk.rows,
        };
        let launch = launch
            .i32(walk.rows)
            .i32(self.width)
            .i32(self.parts)
            .i32(rows_per_scale)
            .i32(self.scales)
            .i32(walk.kind as usize)
            .f32(self.levels.lo as f32)
            .f32(self.levels.hi as f32)
            .i32(walk.team)
            .i32(usize::from(walk.wide));
        // SAFETY: the caller's contract; teams are whole within blocks, blocks whole warps, and their number a multiple
        // of the parts.
        unsafe { launch.run((walk.blocks, walk.across, 1), (walk.in_block * walk.team, 1, 1), 0) }
    }

    /// y in the type of x, or codes in f32; `behind` is added to y.
    pub(super) fn forward_on_cuda(
        &self,
        x: On,
        s: On,
        (before, behind): (Option<On>, Option<On>),
        codes: bool,
    ) -> Result<CudaStorage> {
        let (device, dtype) = (x.0.device(), x.0.dtype());
        let y = cuda::unwritten(device, x.1.shape(), if codes { DType::F32 } else { dtype })?;
        let place = |(storage, layout): On| cuda::place(NAME, storage, layout);
        let (x_at, y_at) = (place(x)?, cuda::start(&y));
        // Four waves of three blocks on each multiprocessor of a large card.
        let walk = self.walk(x, &[x_at, y_at], (1, 1584));
        let kernel = if codes { "lsq_codes" } else { "lsq" };
        let mut launch = Launch::new(device, "lsq", format!("{kernel}_{}", cuda::suffix(NAME, dtype)?))
            .place(x_at)
            .place(place(s)?)
            .maybe(before.map(place).transpose()?);
        if !codes {
            launch = launch.maybe(behind.map(place).transpose()?);
        }
        // SAFETY: x and y have the site's elements, s its scales and shifts its last axis, as `Site::new` saw.
        unsafe { self.run(launch.place(y_at), &walk)? };
        Ok(y)
    }

    /// (dx in the type of x, then in one f32 storage ds, dshift where there is a shift before, and dout where there is one
    /// behind).
    pub(super) fn backward_on_cuda(
        &self,
        x: On,
        g: On,
        s: On,
        before: Option<On>,
        behind: bool,
    ) -> Result<(CudaStorage, CudaStorage)> {
        let (device, dtype) = (x.0.device(), x.0.dtype());
        let whole = self.width * self.parts;
        let dx = cuda::unwritten(device, x.1.shape(), dtype)?;
        let shifts = usize::from(before.is_some()) + usize::from(behind);
        let rest = cuda::unwritten(device, self.scales + shifts * whole, DType::F32)?;
        let place = |(storage, layout): On| cuda::place(NAME, storage, layout);
        let (x_at, g_at, dx_at) = (place(x)?, place(g)?, cuda::start(&dx));
        // Two blocks on each multiprocessor of a large card; a team's sums beside four rows or more.
        let walk = self.walk(x, &[x_at, g_at, dx_at], (4, 264));
        let (teams, warps) = (walk.teams(), walk.warps());
        let of_scales = match walk.kind {
            Kind::Rows => walk.rows * warps,
            Kind::Columns => teams * self.width,
            Kind::Tensor => teams * warps,
        };
        let sums = |count: usize| cuda::unwritten(device, count, DType::F32);
        let scale_sums = sums(of_scales)?;
        let shift_sums = before.map(|_| sums(teams * self.width)).transpose()?;
        let out_sums = behind.then(|| sums(teams * self.width)).transpose()?;
        let kernel = format!("lsq_grad_{}", cuda::suffix(NAME, dtype)?);
        let launch = Launch::new(device, "lsq", kernel)
            .place(x_at)
            .place(g_at)
            .place(place(s)?)
            .maybe(before.map(place).transpose()?)
            .place(dx_at)
            .place(cuda::start(&scale_sums))
            .maybe(shift_sums.as_ref().map(cuda::start))
            .maybe(out_sums.as_ref().map(cuda::start));
        // SAFETY: x, dy and dx have the site's elements, s its scales and the shift its last axis, as `Site::new` saw;
        // the sums are of the walk's teams and warps.
        unsafe { self.run(launch, &walk)? };

        let mut to = cuda::start(&rest);
        match walk.kind {
            Kind::Columns => {
                fold_columns(device, &scale_sums, to, (teams, self.width), self.grad_scale())?;
            }
            Kind::Rows => {
                let run = self.run / self.width * warps;
                self.fold_scales(device, &scale_sums, to, (of_scales / self.scales / run, run))?;
            }
            Kind::Tensor => self.fold_scales(device, &scale_sums, to, (1, of_scales))?,
        }
        to = to.at(self.scales);
        for sums in [shift_sums, out_sums].into_iter().flatten() {
            fold_columns(device, &sums, to, (teams / self.parts, whole), 1.0)?;
            to = to.at(whole);
        }
        Ok((dx, rest))
    }

    /// ds of sums in which each scale has `outer` runs of `run` floats.
    fn fold_scales(
        &self,
        device: &CudaDevice,
        sums: &CudaStorage,
        ds: Place,
        (outer, run): (usize, usize),
    ) -> Result<()> {
        let launch = Launch::new(device, "lsq", "lsq_fold_scales").place(cuda::start(sums)).place(ds);
        let launch = launch.i32(self.scales).i32(outer).i32(run).f64(self.grad_scale());
        let threads = (outer * run).next_multiple_of(32).min(1024);
        // SAFETY: the sums are `outer` runs of each scale and ds has them all; scales are strided over.
        unsafe { launch.run((self.scales.min(1 << 20), 1, 1), (threads, 1, 1), 0) }
    }
}

/// The sums over the rows of `sums [rows, width]`, times `factor`.
fn fold_columns(
    device: &CudaDevice,
    sums: &CudaStorage,
    to: Place,
    (rows, width): (usize, usize),
    factor: f64,
) -> Result<()> {
    let launch = Launch::new(device, "lsq", "lsq_fold_columns").place(cuda::start(sums)).place(to);
    // Eight rows to a warp, where there are enough.
    let warps = rows.div_ceil(8).clamp(1, 32);
    let launch = launch.i64(rows).i64(width).f64(factor);
    // SAFETY: the callers' sums have rows * width floats, and `to` a row of them; columns are strided over.
    unsafe { launch.run((width.div_ceil(32), 1, 1), (32 * warps, 1, 1), 0) }
}
