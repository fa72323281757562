//! Batches, prepared on other threads ahead of the consumer.

use super::augment::{soft_targets, Mix};
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
    /// The class of each image; of a mixed one the class of the image that was mixed with another.
    pub labels: Vec<u32>,
    /// The index of each image in its source.
    pub indices: Vec<u32>,
    /// The number of the epoch, which addresses the random streams of its samples.
    pub epoch: u64,
    /// Soft labels `[batch, classes]`, f32, where images are mixed or labels smoothed.
    pub targets: Option<Tensor>,
}

/// What is drawn at random while an epoch is trained on, and where in it to begin.
#[derive(Debug, Clone)]
pub struct Training {
    /// How images and batches change.
    pub augment: Augment,
    /// How many classes there are: the width of soft labels.
    pub classes: usize,
    /// Seed of everything random.
    pub seed: u64,
    /// Number of the epoch, which addresses its random streams.
    pub epoch: u64,
    /// How many images of the epoch's order come before the order that the loader is given.
    pub done: usize,
}

/// A random order of the images of an epoch: the same for the same `seed` and `epoch`. Each image
/// comes `repeats` times in a row, and what exceeds `len` places is left out, as DeiT's sampler does in
/// one process.
pub fn epoch_order(len: usize, repeats: usize, seed: u64, epoch: u64) -> Vec<u32> {
    let order = Random::new(seed, "order", &[epoch]).permutation(len);
    order.into_iter().flat_map(|image| std::iter::repeat_n(image, repeats)).take(len).collect()
}

/// A batch as a worker makes it: bytes, no tensor yet.
struct Prepared {
    images: Vec<f32>,
    labels: Vec<u32>,
    indices: Vec<u32>,
    targets: Option<Vec<f32>>,
}

/// What all workers share.
struct Job {
    source: Arc<dyn Source>,
    preprocess: Arc<Preprocess>,
    order: Vec<u32>,
    batch_size: usize,
    training: Option<Training>,
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
    /// With `training`, images and batches change at random. Image i of epoch e, its repeats and the
    /// batches draw from streams of their own, so neither the number of workers nor where an epoch is
    /// resumed (with what is left of its order) changes a byte. Errors come out of the iterator: an
    /// index beyond the source, an image that cannot be decoded, a label that is no class, a
    /// `batch_size` of 0, a panic in a worker.
    pub fn new(
        source: Arc<dyn Source>,
        preprocess: Arc<Preprocess>,
        order: Vec<u32>,
        batch_size: usize,
        training: Option<Training>,
        workers: usize,
        device: &Device,
    ) -> Self {
        let batches = order.len().div_ceil(batch_size.max(1));
        let workers = workers.clamp(1, batches.max(1));
        let stop = AtomicBool::new(false);
        let job = Job { source, preprocess, order, batch_size, training, workers, stop };
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
            let thread = std::thread::Builder::new().name(format!("loader-{worker}"));
            match crate::threads::free(|| thread.spawn(work)) {
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
        let images = crate::device::upload(prepared.images, shape, &self.device)?;
        let epoch = self.job.training.as_ref().map_or(0, |t| t.epoch);
        let rows = prepared.labels.len();
        let width = |targets: &Vec<f32>| targets.len() / rows.max(1);
        let targets = prepared.targets.map(|t| {
            let shape = (rows, width(&t));
            crate::device::upload(t, shape, &self.device)
        });
        let targets = targets.transpose()?;
        Ok(Batch { images, labels: prepared.labels, indices: prepared.indices, epoch, targets })
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
            let mut random = self.training.as_ref().map(|t| t.stream("augment", index, first + place));
            let augment = self.training.as_ref().map(|t| &t.augment).zip(random.as_mut());
            let out = &mut images[place * size..(place + 1) * size];
            self.preprocess.apply(&image, augment, out)?;
            labels.push(self.source.label(i));
        }
        let targets = match &self.training {
            Some(training) => self.mix_and_erase(training, first, &mut images, &labels, indices)?,
            None => None,
        };
        Ok(Prepared { images, labels, indices: indices.to_vec(), targets })
    }

    /// What happens to a batch as a whole, and behind it to its images: mixing, erasing, soft labels.
    fn mix_and_erase(
        &self,
        training: &Training,
        first: usize,
        images: &mut [f32],
        labels: &[u32],
        indices: &[u32],
    ) -> Result<Option<Vec<f32>>> {
        let Training { augment, classes, seed, epoch, done } = training;
        let (size, height, width) = (self.preprocess.numel(), self.preprocess.height, self.preprocess.width);
        let mix = Mix::draw(
            augment,
            height,
            width,
            &mut Random::new(*seed, "mix", &[*epoch, (done + first) as u64]),
        );
        if let Some(mix) = mix {
            mix.images(images, size, height, width);
        }
        if augment.erase > 0.0 {
            for (place, (image, &index)) in images.chunks_exact_mut(size).zip(indices).enumerate() {
                augment.erase(image, height, width, &mut training.stream("erase", index, first + place));
            }
        }
        if mix.is_none() && augment.label_smoothing == 0.0 {
            return Ok(None);
        }
        if let Some((label, &index)) = labels.iter().zip(indices).find(|(l, _)| **l as usize >= *classes) {
            let name = self.source.name(index as usize);
            return Err(Error::usage(format!("{name}: its label is {label}, there are {classes} classes")));
        }
        Ok(Some(soft_targets(labels, *classes, augment.label_smoothing, mix)))
    }
}

impl Training {
    /// The stream `name` of image `index` at `place` of the loader's order: addressed by the epoch, the
    /// image, and, from its second time on, which of its times it is.
    fn stream(&self, name: &str, index: u32, place: usize) -> Random {
        let address =
            [self.epoch, u64::from(index), ((self.done + place) % self.augment.repeats.max(1)) as u64];
        Random::new(self.seed, name, if address[2] == 0 { &address[..2] } else { &address })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Glyphs, Image, RandAugment};
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
        Loader::new(Arc::new(source), plain(), order, batch_size, None, workers, &Device::Cpu)
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

    fn shifts() -> Augment {
        Augment { crop_pad: 3, flip: true, ..Default::default() }
    }

    /// Everything at once.
    fn published() -> Augment {
        Augment {
            flip: true,
            resized_crop: true,
            random_interpolation: true,
            rand_augment: RandAugment::try_from("rand-m9-mstd0.5-inc1".to_string()).ok(),
            erase: 0.25,
            mixup: 0.8,
            cutmix: 1.0,
            label_smoothing: 0.1,
            repeats: 3,
            ..Default::default()
        }
    }

    /// All values of an augmented epoch, from batch `from` on, soft labels behind the images.
    fn epoch_of(augment: &Augment, workers: usize, from: usize, epoch: u64) -> Vec<f32> {
        let glyphs = Glyphs { train: 50, eval: 1, ..Default::default() };
        let data = DataConfig { glyphs, ..Default::default() }.open(5).unwrap();
        let order = epoch_order(50, augment.repeats, 5, 0)[from * 8..].to_vec();
        let preprocess = Arc::new(Preprocess::default_for(28, 28, 1));
        let training = Training {
            augment: augment.clone(),
            classes: data.classes.len(),
            seed: 5,
            epoch,
            done: from * 8,
        };
        Loader::new(data.train, preprocess, order, 8, Some(training), workers, &Device::Cpu)
            .flat_map(|b| {
                let batch = b.unwrap();
                let mut all = batch.images.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                if let Some(targets) = batch.targets {
                    assert_eq!(targets.dims2().unwrap(), (batch.labels.len(), data.classes.len()));
                    all.extend(targets.flatten_all().unwrap().to_vec1::<f32>().unwrap());
                }
                all
            })
            .collect()
    }

    fn epoch(workers: usize, from: usize, epoch: u64) -> Vec<f32> {
        epoch_of(&shifts(), workers, from, epoch)
    }

    #[test]
    fn mixed_and_erased_batches_are_the_same_for_any_workers_and_after_resuming() {
        let all = published();
        let whole = epoch_of(&all, 1, 0, 0);
        assert!(whole == epoch_of(&all, 2, 0, 0));
        assert!(whole == epoch_of(&all, 5, 0, 0));
        let rest = epoch_of(&all, 2, 3, 0);
        assert!(whole[whole.len() - rest.len()..] == rest);
        assert!(whole != epoch_of(&all, 1, 0, 1), "another epoch draws others");
        assert!(whole.iter().all(|v| v.is_finite()));
    }

    #[test]
    fn repeats_come_in_a_row_and_change_differently() {
        let augment = Augment { repeats: 3, crop_pad: 3, ..Default::default() };
        let order = epoch_order(50, 3, 5, 0);
        assert_eq!(order.len(), 50);
        let firsts = epoch_order(50, 1, 5, 0);
        assert!(order.chunks(3).zip(&firsts).all(|(same, first)| same.iter().all(|i| i == first)));
        let images = epoch_of(&augment, 1, 0, 0);
        let image = |i: usize| &images[i * 784..(i + 1) * 784];
        let differ = (0..16).filter(|i| image(3 * i) != image(3 * i + 1)).count();
        assert!(differ >= 12, "{differ} of 16 repeats were changed differently");
        // The first time draws as without repeats: the same image in the same epoch.
        let once = epoch(1, 0, 0);
        let plain = epoch_of(&Augment { crop_pad: 3, ..Default::default() }, 1, 0, 0);
        assert_eq!(image(0), &plain[..784]);
        assert_eq!(once.len(), plain.len());
    }

    #[test]
    fn soft_labels_are_there_where_asked_and_sum_to_one() {
        let load = |augment: Augment, classes: usize| {
            let training = Some(Training { augment, classes, seed: 1, epoch: 0, done: 0 });
            let order = (0..10).collect();
            Loader::new(Arc::new(Ten(None)), plain(), order, 4, training, 2, &Device::Cpu)
                .collect::<Result<Vec<Batch>>>()
        };
        for batch in load(Augment::default(), 3).unwrap() {
            assert!(batch.targets.is_none());
        }
        let smooth = Augment { label_smoothing: 0.3, ..Default::default() };
        let batches = load(smooth.clone(), 3).unwrap();
        let rows = batches[0].targets.as_ref().unwrap().to_vec2::<f32>().unwrap();
        for (row, label) in rows.iter().zip([0, 1, 2, 0]) {
            for (k, p) in row.iter().enumerate() {
                assert!((p - if k == label { 0.8 } else { 0.1 }).abs() < 1e-6, "{row:?}");
            }
        }
        for batch in load(Augment { mixup: 0.8, cutmix: 1.0, ..smooth.clone() }, 3).unwrap() {
            assert_eq!(batch.labels[0], batch.indices[0] % 3, "labels stay the primary ones");
            for row in batch.targets.unwrap().to_vec2::<f32>().unwrap() {
                assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-5, "{row:?}");
            }
        }
        let error = load(smooth, 2).unwrap_err();
        assert_eq!(error.to_string(), "#2: its label is 2, there are 2 classes");
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

    /// Crops and flips as they were before the other augmentations came: a published run can be repeated.
    #[test]
    fn padded_crops_and_flips_stay_what_they_were() {
        let bits = epoch(1, 0, 0).into_iter().flat_map(|v| v.to_bits().to_le_bytes());
        let hash = bits.fold(0xcbf2_9ce4_8422_2325u64, |h, byte| {
            (h ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        assert_eq!(hash, 0x8e72_b7f3_6983_400e, "{hash:#x}");
    }

    #[test]
    fn orders_are_permutations_that_differ_by_epoch() {
        let order = epoch_order(100, 1, 1, 0);
        assert_eq!(order, epoch_order(100, 1, 1, 0));
        assert_ne!(order, epoch_order(100, 1, 1, 1));
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
            let mut loader = Loader::new(source.clone(), plain(), order, 4, None, 3, &Device::Cpu);
            assert_eq!(loader.by_ref().take(taken).filter(|b| b.is_ok()).count(), taken);
            drop(loader);
            assert_eq!(Arc::strong_count(&source), 1, "a thread still holds the source");
        }
    }
}
