//! The integer road against the road of tensors, block by block and whole, on small random models of odd sizes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use candle_core::{Device, Tensor};

use super::{IntegerBlock, See};
use crate::kernels::packed::{CodesRef, Isa};
use crate::models::vit::Block;
use crate::models::{Vit, VitConfig};
use crate::random::Random;
use crate::transform::{reparameterize, ActQuant, WeightQuant};
use crate::weights::{Calibration, Transform, Weight, Weights};
use crate::Result;

/// Values whose sums run in another order, relative to the largest.
const VALUES: f32 = 1e-4;
/// Elements that may lie on another code than on the road of tensors: those at a tie of rounding.
const FLIPPED: f64 = 1e-3;

/// The first row of some, and their codes.
type Part = (usize, Vec<i32>);
type Log = Arc<Mutex<BTreeMap<String, Vec<i32>>>>;

/// A rule that keeps the codes it gave.
#[derive(Debug)]
struct Recorder {
    name: String,
    rule: Arc<dyn Transform>,
    log: Log,
}

impl Transform for Recorder {
    fn kind(&self) -> &'static str {
        self.rule.kind()
    }

    fn apply(&self, inputs: &[Tensor]) -> Result<Tensor> {
        if let Some(quantized) = self.rule.quantize(inputs)? {
            let codes = values(&quantized.codes).into_iter().map(|k| k as i32).collect();
            self.log.lock().unwrap().insert(self.name.clone(), codes);
        }
        self.rule.apply(inputs)
    }

    fn frozen(&self) -> Result<Arc<dyn Transform>> {
        self.rule.frozen()
    }
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn random(name: &str, shape: &[usize], (mean, deviation): (f32, f32)) -> Tensor {
    let n = shape.iter().product();
    let mut random = Random::new(5, name, &[n as u64]);
    let values: Vec<f32> = (0..n).map(|_| mean + deviation * random.normal()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// A model in training, its taps calibrated, the shifts where training might have moved them.
struct Case {
    what: String,
    config: VitConfig,
    store: Weights,
    images: Tensor,
}

fn case(bits: u8, act_bits: u8, product: Option<bool>, heads: usize, shifted: bool) -> Case {
    let config = VitConfig {
        image_size: (8, 8),
        patch_size: 4,
        channels: 3,
        hidden: 7 * heads,
        layers: 2,
        heads,
        mlp: 37,
        eps: 1e-6,
        qkv_bias: true,
        distilled: heads == 2,
        two_heads: heads == 2,
        classes: (0..5).map(|i| i.to_string()).collect(),
    };
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let spread = match (shape.len(), name.contains("norm") && name.ends_with("weight")) {
            (_, true) => (1.0, 0.2),
            (1, _) => (0.0, 0.2),
            _ => (0.0, 1.5 / (shape[1..].iter().product::<usize>() as f32).sqrt()),
        };
        let tensor = random(&name, &shape, spread);
        (name, tensor)
    };
    let mut store = Weights::from_tensors(config.shapes().into_iter().map(tensor)).trainable().unwrap();
    for place in config.attentions() {
        if let Some(keep) = product {
            reparameterize(&mut store, &place.inner, heads, keep).unwrap();
        }
    }
    let layers: Vec<(String, Weight)> = store
        .iter()
        .filter(|(name, w)| name.contains("encoder.layer") && w.shape().unwrap().len() == 2)
        .map(|(name, w)| (name.to_string(), w.clone()))
        .collect();
    for (name, weight) in layers {
        let rule = WeightQuant::Statsq.training(bits, None, &weight.tensor().unwrap()).unwrap();
        store.wrap(&name, rule).unwrap();
    }
    let images = random("images", &[6, 3, 8, 8], (0.0, 1.0));
    let calibration = Calibration::new(Box::new(move |name, site, x| {
        let bits = if site.edge { 8 } else { act_bits };
        let (rule, _) = ActQuant::start(bits, site, x)?;
        let tensors: BTreeMap<_, _> = rule.tensors().into_iter().collect();
        let moved = |suffix: &str| {
            let shift = tensors.get(suffix)?;
            let spread = if shifted { (0.05, 0.1) } else { (0.0, 0.0) };
            Some(random(&format!("{name}.{suffix}"), shift.dims(), spread))
        };
        let (shift_in, shift_out) = (moved("shift_in"), moved("shift_out"));
        Ok(Some(Arc::new(rule.trained(name, &tensors["scale"], shift_in.as_ref(), shift_out.as_ref())?)))
    }));
    Vit::new(&config, &store.calibrating(calibration.clone())).unwrap().forward(&images).unwrap();
    for (name, rule) in calibration.rules().unwrap() {
        store.hang(name, rule);
    }
    Case { what: format!("W{bits}A{act_bits} {product:?} {heads} heads {shifted}"), config, store, images }
}

fn cases() -> impl Iterator<Item = Case> {
    let bits = [(2, 2), (3, 3), (4, 4), (2, 8), (8, 8)];
    let forms = [(None, 3, true), (Some(true), 3, true), (Some(false), 2, true), (None, 2, false)];
    bits.into_iter()
        .flat_map(move |(w, a)| forms.map(|(product, heads, shifted)| case(w, a, product, heads, shifted)))
}

fn integer(block: &Block, width: usize, isa: Isa) -> IntegerBlock {
    let norms = [&block.norm_before, &block.norm_after];
    IntegerBlock::of(norms, &block.attention, &block.mlp, width, isa).unwrap().expect("a block on integers")
}

/// The names of a block's taps, as the integer road calls them.
fn place(name: &str) -> &'static str {
    let known = [
        ("query_quant", "query"),
        ("key_quant", "key"),
        ("qk_quant", "key"),
        ("value_quant", "value"),
        ("softmax_quant", "softmax"),
        ("attention.output.dense.input_quant", "context"),
        ("intermediate.dense.input_quant", "up"),
        ("output.dense.input_quant", "down"),
        ("input_quant", "input"),
    ];
    known.iter().find(|(end, _)| name.ends_with(end)).unwrap().1
}

/// Elements, and those that differ.
#[derive(Default)]
struct Share(usize, usize);

impl Share {
    fn add(&mut self, differ: impl Iterator<Item = bool>) {
        for differs in differ {
            self.0 += 1;
            self.1 += usize::from(differs);
        }
    }
}

#[test]
fn blocks_give_the_codes_and_values_of_the_road_of_tensors() {
    let mut shares: BTreeMap<String, Share> = BTreeMap::new();
    for Case { what, config, store, images } in cases() {
        let log = Log::default();
        let mut settled = store.settled().unwrap();
        let rules: Vec<_> = settled.taps().map(|(name, rule)| (name.to_string(), rule.clone())).collect();
        for (name, rule) in rules {
            settled.hang(name.clone(), Arc::new(Recorder { name, rule, log: log.clone() }));
        }
        let float = Vit::new(&config, &settled).unwrap();
        let packed = Vit::new(&config, &store.packed().unwrap()).unwrap();
        let (tokens, width) = (config.tokens(), config.hidden);
        let mut h = random("h", &[images.dim(0).unwrap(), tokens, width], (0.1, 1.0));
        for (float, packed) in float.blocks.iter().zip(&packed.blocks) {
            log.lock().unwrap().clear();
            let want = float.forward(&h, |x, _| Ok(x)).unwrap();
            let codes = log.lock().unwrap().clone();
            let want_values = values(&want);
            let largest = want_values.iter().fold(0f32, |m, v| m.max(v.abs()));
            for isa in Isa::available() {
                let block = integer(packed, width, isa);
                assert!(block.takes(tokens) && !block.takes(tokens + 1), "{what}");
                let seen: Mutex<BTreeMap<&str, Vec<Part>>> = Mutex::default();
                let see: See<'_> = &|place, row, codes: CodesRef<'_>| {
                    let rows =
                        (0..codes.tokens).flat_map(|t| codes.row(t).iter().map(|&u| i32::from(u) + codes.lo));
                    seen.lock().unwrap().entry(place).or_default().push((row, rows.collect()));
                };
                let got = IntegerBlock::forward(&[&block], &values(&h), tokens, see);
                let mut seen = seen.into_inner().unwrap();
                for (name, want) in &codes {
                    let parts = seen.get_mut(place(name)).unwrap();
                    parts.sort();
                    let got: Vec<i32> = parts.iter().flat_map(|(_, codes)| codes.clone()).collect();
                    assert_eq!(got.len(), want.len(), "{what} {name}");
                    let share = shares.entry(format!("{isa:?} {}", place(name))).or_default();
                    share.add(got.iter().zip(want).map(|(a, b)| a != b));
                    // Codes that never move would agree whatever they are made of.
                    assert!(got.iter().any(|k| *k != got[0]), "{what} {name}: all codes are {}", got[0]);
                }
                let share = shares.entry(format!("{isa:?} values")).or_default();
                share.add(got.iter().zip(&want_values).map(|(a, b)| (a - b).abs() > VALUES * largest));
            }
            h = want;
        }
    }
    for (place, Share(all, differ)) in shares {
        assert!(differ as f64 <= FLIPPED * all as f64, "{place}: {differ} of {all} differ");
    }
}

#[test]
fn logits_are_those_of_the_packed_and_of_the_fake_quantized_model() {
    for Case { what, config, store, images } in cases() {
        let packed = Vit::new(&config, &store.packed().unwrap()).unwrap();
        let settled = Vit::new(&config, &store.settled().unwrap()).unwrap();
        let integer = values(&packed.forward(&images).unwrap().logits().unwrap());
        let tensors = values(&packed.train(&images, None).unwrap().logits().unwrap());
        let float = values(&settled.forward(&images).unwrap().logits().unwrap());
        let largest = float.iter().fold(0f32, |m, v| m.max(v.abs()));
        assert!(largest > 0.1, "{what}: logits too small to tell anything");
        for (name, other) in [("packed", tensors), ("fake-quantized", float)] {
            let classes = config.classes.len();
            for (i, (a, b)) in integer.chunks(classes).zip(other.chunks(classes)).enumerate() {
                let best = |row: &[f32]| (0..classes).max_by(|x, y| row[*x].total_cmp(&row[*y]));
                assert_eq!(best(a), best(b), "{what}, {name}, image {i}: {a:?} {b:?}");
                for (a, b) in a.iter().zip(b) {
                    assert!((a - b).abs() <= VALUES * largest, "{what}, {name}, image {i}: {a} {b}");
                }
            }
        }
    }
}

#[test]
fn threads_and_company_change_nothing() {
    let pool = |threads: usize| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    for Case { what, config, store, .. } in cases().take(3) {
        let packed = Vit::new(&config, &store.packed().unwrap()).unwrap();
        let (tokens, width) = (config.tokens(), config.hidden);
        // More rows than are cut finely.
        let batch = super::block::MANY / tokens + 3;
        let h = values(&random("h", &[batch, tokens, width], (0.1, 1.0)));
        let blocks: Vec<_> = packed.blocks.iter().map(|b| integer(b, width, Isa::best())).collect();
        let blocks: Vec<_> = blocks.iter().collect();
        let bits = |y: Vec<f32>| y.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let run = |threads| {
            bits(pool(threads).install(|| IntegerBlock::forward(&blocks, &h, tokens, &|_, _, _| {})))
        };
        let one = run(1);
        assert!(one == run(2) && one == run(5), "{what}");
        let alone =
            h.chunks(tokens * width).flat_map(|h| IntegerBlock::forward(&blocks, h, tokens, &|_, _, _| {}));
        assert!(one == bits(alone.collect()), "{what}");
        let none = |_: &'static str, _: usize, _: CodesRef<'_>| {};
        let each = blocks.iter().fold(h.clone(), |h, b| IntegerBlock::forward(&[b], &h, tokens, &none));
        assert!(one == bits(each), "{what}: one after the other");
    }
}

#[test]
fn what_is_not_all_on_integers_keeps_the_road_of_tensors() {
    let Case { config, store, .. } = case(2, 2, None, 3, true);
    let found = |store: &Weights| {
        let vit = Vit::new(&config, store).unwrap();
        let block = &vit.blocks[0];
        let norms = [&block.norm_before, &block.norm_after];
        IntegerBlock::of(norms, &block.attention, &block.mlp, config.hidden, Isa::best()).unwrap().is_some()
    };
    assert!(found(&store.packed().unwrap()));
    assert!(!found(&store) && !found(&store.settled().unwrap()));
    // Trainables at the taps; no taps; one weight dense.
    let mut packed = store.packed().unwrap();
    for (name, rule) in store.taps() {
        packed.hang(name, rule.clone());
    }
    assert!(!found(&packed));
    let packed = store.packed().unwrap();
    let open = packed.iter().fold(Weights::default(), |mut open, (name, w)| {
        open.insert(name, w.clone());
        open
    });
    assert!(!found(&open));
    let mut packed = store.packed().unwrap();
    let name = format!("{}.encoder.layer.0.intermediate.dense.weight", config.prefix());
    let dense = Weight::dense(packed.get(&name).unwrap().tensor().unwrap());
    packed.insert(name, dense);
    assert!(!found(&packed));
}
