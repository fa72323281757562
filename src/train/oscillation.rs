//! How often quantized weights change their minds: the oscillation measure of Nagel et al. 2022
//! ("Overcoming oscillations in quantization-aware training", section 3), as ofq.md 5 states it.
//!
//! A weight oscillates when its integer code changes in the direction opposite to its previous change,
//! however long ago that was. An exponential mean of these events, momentum 0.01, says how often.

use candle_core::{DType, Device, Tensor};
use indexmap::IndexMap;
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::kernels::cuda::{History, HostHistory};
use crate::{Error, Result};

/// Momentum of the exponential mean.
pub const MOMENTUM: f32 = 0.01;
/// A weight counts as oscillating when its mean lies above this.
pub const OSCILLATES: f32 = 0.005;

/// The history of the codes of one weight.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Track {
    last: Vec<i8>,
    direction: Vec<i8>,
    ema: Vec<f32>,
    total: Vec<u32>,
    /// The sign of the last gradient of each weight; empty where none was shown.
    sign: Vec<i8>,
    /// Whether that sign is the opposite of the one before; of the last step alone.
    turned: Vec<bool>,
    /// Codes that changed at the last step.
    changed: usize,
}

impl Track {
    /// Takes in the codes of a step: whole numbers from -128 to 127. The first call only remembers
    /// them. Returns how many changed.
    pub fn observe(&mut self, codes: &[f32], momentum: f32) -> usize {
        if self.last.len() != codes.len() {
            let n = codes.len();
            let last = codes.iter().map(|&k| k as i8).collect();
            let (direction, ema, total) = (vec![0; n], vec![0.0; n], vec![0; n]);
            *self = Track { last, direction, ema, total, ..Track::default() };
            return 0;
        }
        let history = self.last.iter_mut().zip(&mut self.direction).zip(&mut self.ema).zip(&mut self.total);
        let mut changed = 0;
        for ((((last, direction), ema), total), &code) in history.zip(codes) {
            let code = code as i8;
            let way = (i16::from(*last) - i16::from(code)).signum() as i8;
            let turned = way * *direction == -1;
            *ema = momentum * f32::from(u8::from(turned)) + (1.0 - momentum) * *ema;
            *total += u32::from(turned);
            if way != 0 {
                *direction = way;
                *last = code;
                changed += 1;
            }
        }
        self.changed = changed;
        changed
    }

    /// Takes in the gradient of a step, in the order of the codes. A zero keeps the sign before it.
    pub fn observe_gradient(&mut self, gradient: &[f32]) {
        if self.sign.len() != gradient.len() {
            self.sign = vec![0; gradient.len()];
            self.turned.clear();
        }
        self.turned.resize(gradient.len(), false);
        for ((sign, turned), &g) in self.sign.iter_mut().zip(&mut self.turned).zip(gradient) {
            let now = i8::from(g > 0.0) - i8::from(g < 0.0);
            *turned = now * *sign == -1;
            if now != 0 {
                *sign = now;
            }
        }
    }

    /// Whether gradients were shown.
    pub fn has_gradient(&self) -> bool {
        !self.turned.is_empty()
    }

    /// Whether the gradient of weight `i` turned at the last step.
    pub fn gradient_turned(&self, i: usize) -> bool {
        self.turned.get(i).copied().unwrap_or(false)
    }

    /// Codes that changed at the last step.
    pub fn changed(&self) -> usize {
        self.changed
    }

    /// The share of weights that oscillate: whose mean lies above [`OSCILLATES`].
    pub fn oscillating(&self) -> f64 {
        self.ema.iter().filter(|e| **e > OSCILLATES).count() as f64 / self.ema.len().max(1) as f64
    }

    /// The mean of the exponential means.
    pub fn ema_mean(&self) -> f64 {
        self.ema.iter().map(|&e| f64::from(e)).sum::<f64>() / self.ema.len().max(1) as f64
    }

    /// The exponential means, in the order of the codes.
    pub fn ema(&self) -> &[f32] {
        &self.ema
    }

    /// How often each code turned.
    pub fn total(&self) -> &[u32] {
        &self.total
    }

    /// The direction of the last change of each code: sign of the code before minus the code after.
    pub fn direction(&self) -> &[i8] {
        &self.direction
    }
}

#[cfg(feature = "cuda")]
impl Track {
    fn history(&self) -> HostHistory {
        HostHistory {
            last: self.last.clone(),
            direction: self.direction.clone(),
            ema: self.ema.clone(),
            total: self.total.clone(),
            sign: self.sign.clone(),
            turned: self.turned.clone(),
            changed: self.changed,
        }
    }

    fn of(history: HostHistory) -> Self {
        let HostHistory { last, direction, ema, total, sign, turned, changed } = history;
        Track { last, direction, ema, total, sign, turned, changed }
    }
}

/// What the tracks of all weights say together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Oscillation {
    /// Mean of the exponential means.
    pub ema_mean: f64,
    /// Percent of weights whose mean lies above [`OSCILLATES`].
    pub percent: f64,
    /// Share of codes that changed at the last step.
    pub flip_rate: f64,
}

/// The tracks of all quantized weights, by name. Those of weights on a CUDA device are followed there: what the host has
/// of them is what [`Tracker::fetch`] brought.
#[derive(Debug, Default)]
pub struct Tracker {
    tracks: IndexMap<String, Track>,
    #[cfg(feature = "cuda")]
    there: IndexMap<String, History>,
}

impl Tracker {
    /// Takes in the codes of every quantized weight after a step.
    pub fn observe(&mut self, codes: Vec<(String, Tensor)>) -> Result<()> {
        let mut values = IndexMap::with_capacity(codes.len());
        for (name, codes) in codes {
            self.tracks.entry(name.clone()).or_default();
            #[cfg(feature = "cuda")]
            if codes.device().is_cuda() {
                self.observe_there(&name, &codes)?;
                continue;
            }
            values.insert(name, codes.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?);
        }
        let mut work: Vec<(&mut Track, &Vec<f32>)> =
            self.tracks.iter_mut().filter_map(|(name, track)| Some((track, values.get(name)?))).collect();
        work.par_iter_mut().for_each(|(track, codes)| {
            track.observe(codes, MOMENTUM);
        });
        Ok(())
    }

    /// Takes in the gradients of a step, of the tracked weights that have one of their own.
    pub fn observe_gradients<'a>(
        &mut self,
        gradients: impl Iterator<Item = (&'a str, &'a Tensor)>,
    ) -> Result<()> {
        for (name, gradient) in gradients {
            #[cfg(feature = "cuda")]
            if let Some(history) = self.there.get_mut(name) {
                history.observe_gradient(gradient)?;
                continue;
            }
            if let Some(track) = self.tracks.get_mut(name) {
                track.observe_gradient(&gradient.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?);
            }
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn observe_there(&mut self, name: &str, codes: &Tensor) -> Result<()> {
        if let Some(history) = self.there.get(name).filter(|h| h.count() == codes.elem_count()) {
            return Ok(history.observe(codes, MOMENTUM, OSCILLATES)?);
        }
        // The first codes, or the first behind a checkpoint.
        let Some(track) = self.tracks.get_mut(name) else { return Ok(()) };
        let known = track.last.len() == codes.elem_count();
        if !known {
            track.observe(&codes.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?, MOMENTUM);
        }
        let history = History::there(&track.history(), codes.device())?;
        if known {
            history.observe(codes, MOMENTUM, OSCILLATES)?;
        }
        self.there.insert(name.to_string(), history);
        Ok(())
    }

    /// Brings what is followed on a device to the host, for [`Tracker::track`]; waits for it.
    pub fn fetch(&mut self) -> Result<()> {
        #[cfg(feature = "cuda")]
        for (name, history) in &self.there {
            self.tracks.insert(name.clone(), Track::of(history.read()?));
        }
        Ok(())
    }

    /// The track of the weight called `name`.
    pub fn track(&self, name: &str) -> Option<&Track> {
        self.tracks.get(name)
    }

    /// How many codes are tracked of the weights that `counts` names.
    pub fn codes(&self, counts: impl Fn(&str) -> bool) -> usize {
        self.tracks.iter().filter(|(name, _)| counts(name)).map(|(name, t)| self.length(name, t)).sum()
    }

    /// Three sums, with what the histories on a device add to them.
    #[cfg(feature = "cuda")]
    fn with_those_there(&self, mut sums: [f64; 3], counts: &impl Fn(&str) -> bool) -> Result<[f64; 3]> {
        let there: Vec<&Tensor> =
            self.there.iter().filter(|(name, _)| counts(name)).map(|(_, h)| h.figures()).collect();
        if !there.is_empty() {
            for row in Tensor::cat(&there, 0)?.to_vec2::<f64>()? {
                sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
            }
        }
        Ok(sums)
    }

    #[cfg(not(feature = "cuda"))]
    fn with_those_there(&self, sums: [f64; 3], _counts: &impl Fn(&str) -> bool) -> Result<[f64; 3]> {
        Ok(sums)
    }

    #[cfg(feature = "cuda")]
    fn length(&self, name: &str, track: &Track) -> usize {
        self.there.get(name).map_or(track.ema.len(), History::count)
    }

    #[cfg(not(feature = "cuda"))]
    fn length(&self, _name: &str, track: &Track) -> usize {
        track.ema.len()
    }

    /// The names of the tracked weights, in order.
    pub fn names(&self) -> Vec<String> {
        self.tracks.keys().cloned().collect()
    }

    /// The figures over the weights that `counts` names.
    pub fn figures(&self, counts: impl Fn(&str) -> bool) -> Result<Oscillation> {
        let n = self.codes(&counts);
        let share = |count: f64| if n == 0 { 0.0 } else { count / n as f64 };
        let on_host = |name: &str| {
            #[cfg(feature = "cuda")]
            if self.there.contains_key(name) {
                return false;
            }
            counts(name)
        };
        let counted = || self.tracks.iter().filter(|(name, _)| on_host(name)).map(|(_, track)| track);
        let each = || counted().flat_map(|t| &t.ema);
        let here = [
            each().map(|&e| f64::from(e)).sum(),
            each().filter(|e| **e > OSCILLATES).count() as f64,
            counted().map(|t| t.changed).sum::<usize>() as f64,
        ];
        let sums = self.with_those_there(here, &counts)?;
        let [means, above, changed] = sums.map(share);
        Ok(Oscillation { ema_mean: means, percent: 100.0 * above, flip_rate: changed })
    }

    /// The state as named tensors.
    pub fn state(&mut self) -> Result<Vec<(String, Tensor)>> {
        self.fetch()?;
        let mut tensors = Vec::new();
        for (name, track) in &self.tracks {
            let n = track.last.len();
            let bytes =
                |v: &[i8]| Tensor::from_vec(v.iter().map(|&x| x as u8).collect::<Vec<u8>>(), n, &Device::Cpu);
            tensors.push((format!("{name}#code"), bytes(&track.last)?));
            tensors.push((format!("{name}#direction"), bytes(&track.direction)?));
            tensors.push((format!("{name}#ema"), Tensor::from_slice(&track.ema, n, &Device::Cpu)?));
            tensors.push((format!("{name}#total"), Tensor::from_slice(&track.total, n, &Device::Cpu)?));
            if track.sign.len() == n {
                tensors.push((format!("{name}#sign"), bytes(&track.sign)?));
            }
        }
        Ok(tensors)
    }

    /// Takes back what [`Tracker::state`] gave.
    pub fn restore(names: &[String], read: &dyn Fn(&str) -> Result<Option<Tensor>>) -> Result<Self> {
        let must = |name: String| -> Result<Tensor> {
            read(&name)?.ok_or_else(|| Error::tensor(name, "not found in the oscillation tracks"))
        };
        let mut tracks = IndexMap::new();
        for name in names {
            let bytes = |part: &str| -> Result<Vec<i8>> {
                let values = must(format!("{name}#{part}"))?.to_vec1::<u8>()?;
                Ok(values.into_iter().map(|x| x as i8).collect())
            };
            let (last, direction) = (bytes("code")?, bytes("direction")?);
            let ema = must(format!("{name}#ema"))?.to_vec1::<f32>()?;
            let total = must(format!("{name}#total"))?.to_vec1::<u32>()?;
            // Only weights with a gradient of their own have signs.
            let sign = match read(&format!("{name}#sign"))? {
                Some(_) => bytes("sign")?,
                None => Vec::new(),
            };
            let lengths = [last.len(), direction.len(), ema.len(), total.len()];
            if lengths.iter().any(|n| *n != lengths[0]) {
                return Err(Error::tensor(name, format!("tracker state of unequal lengths {lengths:?}")));
            }
            let track = Track { last, direction, ema, total, sign, ..Track::default() };
            tracks.insert(name.clone(), track);
        }
        Ok(Tracker {
            tracks,
            #[cfg(feature = "cuda")]
            there: IndexMap::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_by_hand() {
        let mut track = Track::default();
        let steps = [0.0, 1.0, 1.0, 0.0, -1.0, 0.0]; // up, -, down (turn), down, up (turn)
        let changed: Vec<usize> = steps.iter().map(|&k| track.observe(&[k], 0.5)).collect();
        assert_eq!(changed, [0, 1, 0, 1, 1, 1]);
        assert_eq!(track.total, [2]);
        // ema: 0, 0, 0.5, 0.25, 0.625
        assert_eq!(track.ema, [0.625]);
        assert_eq!(track.direction, [-1]);
    }

    #[test]
    fn state_survives_a_round_trip() {
        let mut tracker = Tracker::default();
        let codes =
            |v: &[f32]| vec![("w".to_string(), Tensor::from_slice(v, v.len(), &Device::Cpu).unwrap())];
        for v in [[0f32, -2.0, 1.0], [1.0, -2.0, 0.0], [0.0, -1.0, 0.0]] {
            tracker.observe(codes(&v)).unwrap();
            let gradient = Tensor::new(&v, &Device::Cpu).unwrap();
            tracker.observe_gradients([("w", &gradient)].into_iter()).unwrap();
        }
        let figures = tracker.figures(|_| true).unwrap();
        assert!((figures.flip_rate - 2.0 / 3.0).abs() < 1e-9);
        assert!((figures.percent - 100.0 / 3.0).abs() < 1e-9);
        let state: std::collections::HashMap<String, Tensor> = tracker.state().unwrap().into_iter().collect();
        let read = |name: &str| Ok(state.get(name).cloned());
        let mut back = Tracker::restore(&["w".to_string()], &read).unwrap();
        assert_eq!(
            (back.tracks["w"].ema(), &back.tracks["w"].sign),
            (tracker.tracks["w"].ema(), &vec![1, -1, 1])
        );
        // Whatever comes next, both go on alike.
        for tracker in [&mut back, &mut tracker] {
            tracker.observe(codes(&[1.0, -2.0, 1.0])).unwrap();
            let gradient = Tensor::new(&[-1f32, -1.0, 0.0], &Device::Cpu).unwrap();
            tracker.observe_gradients([("w", &gradient)].into_iter()).unwrap();
        }
        assert_eq!(back.tracks, tracker.tracks);
        assert_eq!(tracker.tracks["w"].turned, [true, false, false]);
    }
}
