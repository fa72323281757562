//! One step of an optimizer, and merging an adapter: what they are bound by is memory, so figures are GB/s beside a
//! plain pass over memory in the same race.
//!
//! `cargo bench --bench optim -- [--threads 1,2] [--only 7B] [--save optim]`. Bytes are those that must move: each state read
//! and written once, each operand read once.

mod harness;
mod shapes;

use candle_core::{DType, Device, Tensor};
use harness::{head, micros, of_threads, race, row, Contestant, Failure, Options};
use qtune::kernels::{
    adamw_step, block_affine_merged, classp_step, low_rank_merged, reference, shared_block_merged,
    AdamWParams, ClasspParams, GradSum, Moments,
};
use rayon::prelude::*;

/// Elements of a task of the plain pass.
const GRAIN: usize = 1 << 14;

fn vector(count: usize, value: f32) -> Result<Tensor, Failure> {
    Ok(Tensor::from_vec(vec![value; count], count, &Device::Cpu)?)
}

/// `a = s a + b`: read, read, written.
fn plain(count: usize) -> Contestant<'static> {
    let (mut a, b) = (vec![1f32; count], vec![1e-3f32; count]);
    Contestant::new("plain pass, a = s a + b", 1, 12 * count, move |_| {
        a.par_chunks_mut(GRAIN).zip(b.par_chunks(GRAIN)).for_each(|(a, b)| {
            a.iter_mut().zip(b).for_each(|(a, b)| *a = 0.999 * *a + b);
        });
        Ok(())
    })
}

/// `b = a + 1`: read, written, and past the caches where it does not fit them: what a merge is measured by.
fn copy(count: usize) -> Contestant<'static> {
    let (a, mut b) = (vec![1f32; count], vec![0f32; count]);
    Contestant::new("plain copy, b = a + 1", 1, 8 * count, move |_| {
        b.par_chunks_mut(GRAIN).zip(a.par_chunks(GRAIN)).for_each(|(b, a)| {
            #[cfg(target_arch = "x86_64")]
            if count > 1 << 21 {
                use std::arch::x86_64::*;
                // SAFETY: both vectors of four lie within their slices, and SSE is part of x86_64; what is written is at
                // a multiple of 16 bytes, or copied plainly.
                unsafe {
                    let (head, whole, _) = b.align_to_mut::<__m128>();
                    let skip = head.len();
                    head.iter_mut().zip(a).for_each(|(b, a)| *b = a + 1.0);
                    for (i, to) in whole.iter_mut().enumerate() {
                        let from = a.as_ptr().add(skip + 4 * i);
                        _mm_stream_ps(
                            (to as *mut __m128).cast(),
                            _mm_add_ps(_mm_loadu_ps(from), _mm_set1_ps(1.0)),
                        );
                    }
                    let rest = skip + 4 * whole.len();
                    b[rest..].iter_mut().zip(&a[rest..]).for_each(|(b, a)| *b = a + 1.0);
                    _mm_sfence();
                }
                return;
            }
            b.iter_mut().zip(a).for_each(|(b, a)| *b = a + 1.0);
        });
        Ok(())
    })
}

fn adamw(count: usize) -> Result<Contestant<'static>, Failure> {
    let (p, g) = (vector(count, 1.0)?, vector(count, 1e-3)?);
    let mut moments = Moments::zeros(count, &Device::Cpu)?;
    let mut step = 0;
    Ok(Contestant::new("qtune AdamW", 1, 28 * count, move |_| {
        step += 1;
        adamw_step(&p, &g, &mut moments, step, &AdamWParams { lr: 1e-5, ..AdamWParams::default() })?;
        Ok(())
    }))
}

/// The same in candle's elementwise ops.
fn adamw_of_candle(count: usize) -> Result<Contestant<'static>, Failure> {
    let (mut p, g) = (vector(count, 1.0)?, vector(count, 1e-3)?);
    let (mut m, mut v) = (p.zeros_like()?, p.zeros_like()?);
    let mut step = 0;
    Ok(Contestant::new("AdamW in candle ops", 1, 28 * count, move |_| {
        step += 1;
        let params = AdamWParams { lr: 1e-5, ..AdamWParams::default() };
        (p, m, v) = reference::adamw_step(&p, &g, (&m, &v), step, &params)?;
        Ok(())
    }))
}

fn classp(count: usize, power: f64) -> Result<Contestant<'static>, Failure> {
    let (w, g) = (vector(count, 1.0)?, vector(count, 1e-3)?);
    let mut sum = GradSum::zeros(count, DType::F32, &Device::Cpu)?;
    let params = ClasspParams { lr: 1e-6, power, ..ClasspParams::default() };
    Ok(Contestant::new(format!("qtune CLASSP, power {power}"), 1, 20 * count, move |_| {
        classp_step(&w, &g, &mut sum, &params)?;
        Ok(())
    }))
}

/// A low-rank change added onto a square weight as near to `count` elements as one is: the weight read and written.
fn merge_lora(count: usize, rank: usize) -> Result<Contestant<'static>, Failure> {
    let n = (count as f64).sqrt() as usize;
    let (w, a, b) = (vector(n * n, 1.0)?.reshape((n, n))?, vector(rank * n, 0.1)?, vector(n * rank, 0.1)?);
    let (a, b) = (a.reshape((rank, n))?, b.reshape((n, rank))?);
    Ok(Contestant::new(format!("merge of LoRA, rank {rank}"), 1, 8 * n * n, move |_| {
        low_rank_merged(&w, &a, &b, 2.0)?;
        Ok(())
    }))
}

/// The same in candle's ops.
fn merge_lora_of_candle(count: usize, rank: usize) -> Result<Contestant<'static>, Failure> {
    let n = (count as f64).sqrt() as usize;
    let (w, a, b) = (vector(n * n, 1.0)?.reshape((n, n))?, vector(rank * n, 0.1)?, vector(n * rank, 0.1)?);
    let (a, b) = (a.reshape((rank, n))?, b.reshape((n, rank))?);
    Ok(Contestant::new(format!("merge of LoRA in candle ops, rank {rank}"), 1, 8 * n * n, move |_| {
        reference::low_rank_merged(&w, &a, &b, 2.0)?;
        Ok(())
    }))
}

fn merge_miss(count: usize, rank: usize) -> Result<Contestant<'static>, Failure> {
    let n = (count as f64).sqrt() as usize;
    let (w, d) = (vector(n * n, 1.0)?.reshape((n, n))?, vector(rank * n, 0.1)?.reshape((rank, n))?);
    Ok(Contestant::new(format!("merge of MiSS, rank {rank}"), 1, 8 * n * n, move |_| {
        shared_block_merged(&w, &d)?;
        Ok(())
    }))
}

fn merge_bone(count: usize, rank: usize) -> Result<Contestant<'static>, Failure> {
    let n = ((count as f64).sqrt() as usize / rank * rank).max(rank);
    let (w, b) = (vector(n * n, 1.0)?.reshape((n, n))?, vector(n * rank, 0.1)?);
    let b = b.reshape((n / rank, rank, rank))?;
    Ok(Contestant::new(format!("merge of Bone, rank {rank}"), 1, 8 * n * n, move |_| {
        block_affine_merged(&w, &b)?;
        Ok(())
    }))
}

fn bench(options: &Options, threads: usize) -> Result<(), Failure> {
    head(
        &format!("Optimizers and merges, {}", of_threads(threads)),
        &["tensor", "what", "µs", "GB/s", "of the plain pass", "of the plain copy"],
    );
    for (of, count) in shapes::TENSORS.iter().filter(|(of, _)| options.wants(&[of])) {
        let mut contestants = vec![
            plain(*count),
            copy(*count),
            adamw(*count)?,
            adamw_of_candle(*count)?,
            classp(*count, 1.0)?,
            classp(*count, 2.0)?,
            merge_lora(*count, 16)?,
            merge_lora_of_candle(*count, 16)?,
            merge_miss(*count, 64)?,
            merge_bone(*count, 64)?,
        ];
        let seconds = race(options, &mut contestants)?;
        let rate = |i: usize| contestants[i].bytes / seconds[i] / 1e9;
        for (i, contestant) in contestants.iter().enumerate() {
            row(&[
                format!("{of}, {count}"),
                contestant.name.clone(),
                micros(seconds[i]),
                format!("{:.1}", rate(i)),
                format!("{:.0} %", 100.0 * rate(i) / rate(0)),
                format!("{:.0} %", 100.0 * rate(i) / rate(1)),
            ]);
        }
    }
    Ok(())
}

fn main() -> Result<(), Failure> {
    harness::each_number_of_threads("Optimizers and merges", &Options::read()?, bench)
}
