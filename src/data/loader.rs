//! Batches, prepared on other threads ahead of the consumer.

use super::{Augment, Preprocess, Source};
use crate::random::Random;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::sync::Arc;
use std::thread::JoinHandle;

/// How many finished batches a worker keeps ready.
const AHEAD: usize = 2;

/// Images and their labels, in one order.
#[derive(Debug, Clone)]
pub struct Batch {
    /// `[batch, channels, height, width]`, f32, on the loader's device.
    pub images: Tensor,
    /// The class of each image.
    pub labels: Vec<u32>,
    /// The index of each image in its source.
    pub indices: Vec<u32>,
    /// The number of the epoch, which addresses the random streams of its samples.
    pub epoch: u64,
}

/// A random order of the images of an epoch: the same for the same `seed` and `epoch`.
pub fn epoch_order(len: usize, seed: u64, epoch: u64) -> Vec<u32> {
    Random::new(seed, "order", &[epoch]).permutation(len)
}

/// A batch as a worker makes it: bytes, no tensor yet.
struct Prepared {
    images: Vec<f32>,
    labels: Vec<u32>,
    indices: Vec<u32>,
}

/// What all workers share.
struct Job {
    source: Arc<dyn Source>,
    preprocess: Arc<Preprocess>,
    augment: Option<Augment>,
    order: Vec<u32>,
    batch_size: usize,
    seed: u64,
    epoch: u64,
    workers: usize,
    stop: AtomicBool,
}

/// The batches of an epoch, or of the rest of one, in order; ends after its first error.
///
/// Decoding and augmentation happen on threads of its own, at most two batches each ahead of the
/// consumer. They end when the loader is dropped.
pub struct Loader {
    job: Arc<Job>,
    device: Device,
    /// Worker w makes the batches w, w + workers, …, so reading in turn restores the order.
    ready: Vec<Receiver<Result<Prepared>>>,
    threads: Vec<JoinHandle<()>>,
    next: usize,
    batches: usize,
    /// What went wrong at the start, told by the first `next`.
    failed: Option<Error>,
}

impl Loader {
    /// Starts preparing the images `order` of `source` in batches of `batch_size` (the last may be
    /// shorter) on `workers` threads.
    ///
    /// Image i of epoch e draws its augmentation from a stream of its own, so neither the number of
    /// workers nor where an epoch is resumed (with what is left of its order) changes a byte. Errors
    /// come out of the iterator: an index beyond the source, an image that cannot be decoded, a
    /// `batch_size` of 0, a panic in a worker.
    #[allow(clippy::too_many_arguments)] // one call site in each trainer, where every one is at hand
    pub fn new(
        source: Arc<dyn Source>,
        preprocess: Arc<Preprocess>,
        augment: Option<Augment>,
        order: Vec<u32>,
        batch_size: usize,
        seed: u64,
        epoch: u64,
        workers: usize,
        device: &Device,
    ) -> Self {
        let batches = order.len().div_ceil(batch_size.max(1));
        let workers = workers.clamp(1, batches.max(1));
        let stop = AtomicBool::new(false);
        let job = Job { source, preprocess, augment, order, batch_size, seed, epoch, workers, stop };
        let mut loader = Loader {
            job: Arc::new(job),
            device: device.clone(),
            ready: Vec::new(),
            threads: Vec::new(),
            next: 0,
            batches,
            failed: None,
        };
        if batch_size == 0 {
            loader.failed = Some(Error::usage("batch size is 0, expected at least 1"));
            return loader;
        }
        for worker in 0..workers.min(batches) {
            let (send, receive) = sync_channel(AHEAD - 1); // and one in the making
            let job = loader.job.clone();
            let work = move || job.work(worker, batches, &send);
            match std::thread::Builder::new().name(format!("loader-{worker}")).spawn(work) {
                Ok(thread) => loader.threads.push(thread),
                Err(e) => loader.failed = Some(Error::Run(format!("cannot start a loader thread: {e}"))),
            }
            loader.ready.push(receive);
        }
        loader
    }

    /// How many batches there are in all, those already taken included.
    pub fn batches(&self) -> usize {
        self.batches
    }

    fn finish(&mut self, prepared: Prepared) -> Result<Batch> {
        let p = &self.job.preprocess;
        let shape = (prepared.labels.len(), p.channels, p.height, p.width);
        let images = Tensor::from_vec(prepared.images, shape, &self.device)?;
        let epoch = self.job.epoch;
        Ok(Batch { images, labels: prepared.labels, indices: prepared.indices, epoch })
    }
}

impl Iterator for Loader {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(error) = self.failed.take() {
            self.next = self.batches;
            return Some(Err(error));
        }
        if self.next >= self.batches {
            return None;
        }
        // A worker that is gone without a word has closed its channel: no wait can last.
        let prepared = self.ready[self.next % self.job.workers]
            .recv()
            .unwrap_or_else(|_| Err(Error::Run("a loader thread ended early".to_string())));
        self.next += 1;
        let batch = prepared.and_then(|prepared| self.finish(prepared));
        if batch.is_err() {
            self.next = self.batches;
        }
        Some(batch)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        // An error ends it early.
        (0, Some(self.batches - self.next + usize::from(self.failed.is_some())))
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.job.stop.store(true, Ordering::Relaxed);
        self.ready.clear(); // wakes those that wait to hand a batch over
        for thread in self.threads.drain(..) {
            // A worker's panic has been caught and told.
            let _ = thread.join();
        }
    }
}

impl Job {
    fn work(&self, worker: usize, batches: usize, send: &SyncSender<Result<Prepared>>) {
        for batch in (worker..batches).step_by(self.workers) {
            let result = catch_unwind(AssertUnwindSafe(|| self.prepare(batch))).unwrap_or_else(|cause| {
                let text = cause.downcast_ref::<String>().map(String::as_str);
                let text = text.or(cause.downcast_ref::<&str>().copied()).unwrap_or("no message");
                Err(Error::Run(format!("a loader thread panicked: {text}")))
            });
            let ended = result.is_err();
            if send.send(result).is_err() || ended {
                return;
            }
        }
    }

    fn prepare(&self, batch: usize) -> Result<Prepared> {
        let first = batch * self.batch_size;
        let indices = &self.order[first..self.order.len().min(first + self.batch_size)];
        let size = self.preprocess.numel();
        let mut images = vec![0.0; indices.len() * size];
        let mut labels = Vec::with_capacity(indices.len());
        for (place, &index) in indices.iter().enumerate() {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Error::Run("the loader was dropped".to_string())); // nobody reads it
            }
            let i = index as usize;
            if i >= self.source.len() {
                let len = self.source.len();
                return Err(Error::usage(format!("image {i} was asked for, there are {len}")));
            }
            let image = self.source.image(i)?;
            let mut random = Random::new(self.seed, "augment", &[self.epoch, u64::from(index)]);
            let augment = self.augment.as_ref().map(|augment| (augment, &mut random));
            let out = &mut images[place * size..(place + 1) * size];
            self.preprocess.apply(&image, augment, out)?;
            labels.push(self.source.label(i));
        }
        Ok(Prepared { images, labels, indices: indices.to_vec() })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Glyphs, Image};
    use super::*;
    use crate::data::DataConfig;

    /// Ten images of one pixel: image i holds i. Image 7 fails as it is told to.
    struct Ten(Option<fn() -> Result<Image>>);

    impl Source for Ten {
        fn len(&self) -> usize {
            10
        }
        fn label(&self, index: usize) -> u32 {
            index as u32 % 3
        }
        fn image(&self, index: usize) -> Result<Image> {
            match self.0 {
                Some(fail) if index == 7 => fail(),
                _ => Ok(Image { width: 1, height: 1, channels: 1, pixels: vec![index as u8] }),
            }
        }
        fn name(&self, index: usize) -> String {
            format!("#{index}")
        }
    }

    /// Bytes come through as they are.
    fn plain() -> Arc<Preprocess> {
        let mut p = Preprocess::default_for(1, 1, 1);
        (p.rescale, p.mean, p.std) = (1.0, vec![0.0], vec![1.0]);
        Arc::new(p)
    }

    fn ten(source: Ten, order: Vec<u32>, batch_size: usize, workers: usize) -> Loader {
        Loader::new(Arc::new(source), plain(), None, order, batch_size, 0, 0, workers, &Device::Cpu)
    }

    #[test]
    fn batches_come_in_order_and_the_last_is_short() {
        for workers in [1, 2, 3, 9] {
            let order = vec![9, 0, 3, 3, 1, 8, 2];
            let loader = ten(Ten(None), order.clone(), 3, workers);
            assert_eq!(loader.batches(), 3);
            let batches: Vec<Batch> = loader.map(|b| b.unwrap()).collect();
            assert_eq!(batches.iter().map(|b| b.labels.len()).collect::<Vec<_>>(), [3, 3, 1]);
            assert_eq!(batches.iter().flat_map(|b| b.indices.clone()).collect::<Vec<_>>(), order);
            assert_eq!(batches[1].labels, [0, 1, 2]);
            assert_eq!(batches[1].images.dims(), [3, 1, 1, 1]);
            let values = batches[1].images.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(values, [3.0, 1.0, 8.0]);
        }
        assert_eq!(ten(Ten(None), vec![], 3, 2).count(), 0);
    }

    /// All values of an augmented epoch, from batch `from` on.
    fn epoch(workers: usize, from: usize, epoch: u64) -> Vec<f32> {
        let glyphs = Glyphs { train: 50, eval: 1, ..Default::default() };
        let data = DataConfig { glyphs, ..Default::default() }.open(5).unwrap();
        let augment = Some(Augment { crop_pad: 3, flip: true });
        let order = epoch_order(50, 5, 0)[from * 8..].to_vec();
        let preprocess = Arc::new(Preprocess::default_for(28, 28, 1));
        Loader::new(data.train, preprocess, augment, order, 8, 5, epoch, workers, &Device::Cpu)
            .flat_map(|b| b.unwrap().images.flatten_all().unwrap().to_vec1::<f32>().unwrap())
            .collect()
    }

    #[test]
    fn the_same_bytes_for_any_number_of_workers_and_after_resuming() {
        let whole = epoch(1, 0, 0);
        assert_eq!(whole.len(), 50 * 784);
        assert!(whole == epoch(2, 0, 0));
        assert!(whole == epoch(5, 0, 0));
        assert!(whole[3 * 8 * 784..] == epoch(2, 3, 0));
        assert!(whole != epoch(2, 0, 1), "another epoch draws other crops");
    }

    #[test]
    fn orders_are_permutations_that_differ_by_epoch() {
        let order = epoch_order(100, 1, 0);
        assert_eq!(order, epoch_order(100, 1, 0));
        assert_ne!(order, epoch_order(100, 1, 1));
        let mut sorted = order;
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<u32>>());
    }

    #[test]
    fn errors_and_panics_come_out_and_end_it() {
        let bad: fn() -> Result<Image> = || Err(Error::input("x.png", "broken"));
        let panics: fn() -> Result<Image> = || panic!("on purpose");
        for (fail, word) in [(bad, "x.png: broken"), (panics, "on purpose")] {
            for workers in [1, 2, 5] {
                let mut loader = ten(Ten(Some(fail)), (0..10).collect(), 2, workers);
                assert_eq!(loader.by_ref().take(3).filter(|b| b.is_ok()).count(), 3);
                assert!(loader.next().unwrap().unwrap_err().to_string().contains(word));
                assert!(loader.next().is_none());
            }
        }
        let beyond = ten(Ten(None), vec![0, 10], 2, 1).next().unwrap().unwrap_err();
        assert_eq!(beyond.to_string(), "image 10 was asked for, there are 10");
        let mut zero = ten(Ten(None), vec![0], 0, 1);
        assert_eq!(zero.next().unwrap().unwrap_err().exit_code(), 2);
        assert!(zero.next().is_none());
    }

    #[test]
    fn dropping_it_midway_ends_the_threads() {
        let source: Arc<dyn Source> = Arc::new(Ten(None));
        for taken in [0, 1, 3] {
            let order = (0..10_000).map(|i| i % 10).collect();
            let mut loader = Loader::new(source.clone(), plain(), None, order, 4, 0, 0, 3, &Device::Cpu);
            assert_eq!(loader.by_ref().take(taken).filter(|b| b.is_ok()).count(), taken);
            drop(loader);
            assert_eq!(Arc::strong_count(&source), 1, "a thread still holds the source");
        }
    }
}
