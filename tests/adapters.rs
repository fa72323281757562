//! Laws that every adapter keeps, on odd shapes, over dense, half-precision and packed bases.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use qtune::random::Random;
use qtune::transform::{
    Bat, Dora, Dropout, EmbeddingLora, Lora, LoraInit, Mini, Miss, MissInit, WeightQuant,
};
use qtune::weights::{checkpoint, Checkpoint, Expr, Packed, Transform, Weight, Weights};

const SHAPES: [(usize, usize); 6] = [(1, 1), (5, 3), (3, 5), (6, 9), (10, 33), (48, 80)];
const SCALE: f64 = 0.75;

/// f32 sums of up to 80 products, in another order, relative to the largest of them.
const PRODUCT: f64 = 5e-6;
/// Differences of such sums over a step of one.
const DIFFERENCE: f64 = 1e-4;
/// Two roundings to bf16.
const BF16: f64 = 8e-3;

fn random(name: &str, shape: &[usize]) -> Tensor {
    let mut random = Random::new(11, name, &[]);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.normal()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn values(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn close(what: &str, a: &Tensor, b: &Tensor, tolerance: f64) {
    assert_eq!(a.dims(), b.dims(), "{what}");
    let (a, b) = (values(a), values(b));
    let largest = b.iter().fold(1f64, |m, v| m.max(f64::from(v.abs())));
    for (a, b) in a.iter().zip(&b) {
        let near = f64::from((a - b).abs()) <= tolerance * largest;
        assert!(near, "{what}: {a} {b}, largest {largest}");
    }
}

/// A weight as it lies in a store, and its name.
fn bases(shape: (usize, usize)) -> Vec<(&'static str, Weight)> {
    let w = random("weight", &[shape.0, shape.1]);
    let grid = WeightQuant::Lsq.untrained(4, None, &w).unwrap();
    let quantized = grid.quantize(std::slice::from_ref(&w)).unwrap().unwrap();
    let packed = Expr::Packed(Packed::pack(&quantized).unwrap());
    let stored = stored(&[("weight".to_string(), w.clone())]);
    vec![
        ("f32", Weight::dense(w.clone())),
        ("bf16", Weight::dense(w.to_dtype(DType::BF16).unwrap())),
        ("f16", Weight::dense(w.to_dtype(DType::F16).unwrap())),
        ("packed", packed.into()),
        ("stored", stored.get("weight").unwrap().clone()),
    ]
}

/// A store over a file of these tensors; so small a file is read whole when it is opened.
fn stored(tensors: &[(String, Tensor)]) -> Weights {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    checkpoint::save(&path, tensors, &Default::default()).unwrap();
    Weights::from_checkpoint(Arc::new(Checkpoint::open(&path).unwrap()), &Device::Cpu)
}

struct Case {
    what: String,
    shape: (usize, usize),
    base: Weight,
    fresh: Arc<dyn Transform>,
    trained: Arc<dyn Transform>,
}

fn ranks(shape: (usize, usize)) -> (usize, usize, usize) {
    let block = (2..shape.0).rev().find(|m| shape.0.is_multiple_of(*m)).unwrap_or(shape.0);
    (shape.1.min(4), Bat::rank_for(&[shape], 8), block)
}

/// Trained tensors: those of the fresh adapter, moved.
fn moved(
    what: &str,
    shape: (usize, usize),
    fresh: &dyn Transform,
    dropout: Option<Dropout>,
) -> Arc<dyn Transform> {
    let t: Vec<Tensor> = fresh
        .tensors()
        .iter()
        .map(|(suffix, t)| (t + (random(&format!("{what} {suffix}"), t.dims()) * 0.5).unwrap()).unwrap())
        .collect();
    match what {
        "miss" => Arc::new(Miss::new(&t[0], shape, dropout, true).unwrap()),
        "mini" => Arc::new(Mini::new(&t[0], shape, dropout, true).unwrap()),
        "bat" => Arc::new(Bat::new(&t[0], shape, true).unwrap()),
        "lora" => Arc::new(Lora::new(&t[0], &t[1], SCALE, None, dropout, true).unwrap()),
        "dora" => Arc::new(Dora::new(&t[0], &t[1], &t[2], SCALE, dropout, true).unwrap()),
        _ => Arc::new(EmbeddingLora::new(&t[0], &t[1], SCALE, true).unwrap()),
    }
}

fn fresh(shape: (usize, usize), base: &Weight) -> Vec<(&'static str, Arc<dyn Transform>)> {
    let (r, square, m) = ranks(shape);
    let mut random = Random::new(2, "start", &[]);
    let init = LoraInit::Kaiming;
    vec![
        ("miss", Arc::new(Miss::start(r, shape, MissInit::Zeros, None, &mut random).unwrap())),
        ("mini", Arc::new(Mini::start(r, m, shape, None).unwrap())),
        ("bat", Arc::new(Bat::start(square, shape).unwrap())),
        ("lora", Arc::new(Lora::start(r, shape, SCALE, init, None, &mut random).unwrap())),
        ("dora", Arc::new(Dora::start(r, base, SCALE, init, None, &mut random).unwrap())),
        ("embedding", Arc::new(EmbeddingLora::start(r, shape, SCALE, &mut random).unwrap())),
    ]
}

fn every_case(mut law: impl FnMut(Case)) {
    for shape in SHAPES {
        for (kind, base) in bases(shape) {
            for (name, fresh) in fresh(shape, &base) {
                let trained = moved(name, shape, fresh.as_ref(), None);
                let what = format!("{name} on {kind} {shape:?}");
                law(Case { what, shape, base: base.clone(), fresh, trained });
            }
        }
    }
}

/// One token, so that products take the branch, and many, so that they take W'.
fn inputs(width: usize) -> [Tensor; 2] {
    [random("one", &[1, width]), random("many", &[2, 70, width])]
}

fn dense_product(x: &Tensor, w: &Tensor) -> Tensor {
    let flat = x.reshape(((), w.dim(1).unwrap())).unwrap();
    let mut dims = x.dims().to_vec();
    *dims.last_mut().unwrap() = w.dim(0).unwrap();
    flat.matmul(&w.t().unwrap()).unwrap().reshape(dims).unwrap()
}

#[test]
fn the_two_readings_agree() {
    every_case(|Case { what, shape, base, trained, .. }| {
        let weight = base.wrap(trained);
        let w = weight.tensor().unwrap();
        assert_eq!((w.dtype(), weight.shape().unwrap()), (DType::F32, vec![shape.0, shape.1]), "{what}");
        for x in inputs(shape.1) {
            let got = weight.matmul(&x).unwrap();
            assert_eq!(got.dtype(), DType::F32, "{what}");
            close(&what, &got, &dense_product(&x, &w), PRODUCT);
            let half = x.to_dtype(DType::BF16).unwrap();
            let got = weight.matmul(&half).unwrap();
            assert_eq!(got.dtype(), DType::BF16, "{what}");
            close(&what, &got, &dense_product(&half.to_dtype(DType::F32).unwrap(), &w), BF16);
        }
    });
}

#[test]
fn a_fresh_adapter_changes_nothing() {
    every_case(|Case { what, shape, base, fresh, .. }| {
        let weight = base.wrap(fresh);
        assert_eq!(values(&weight.tensor().unwrap()), values(&base.tensor().unwrap()), "{what}");
        for x in inputs(shape.1) {
            // Dense weights multiply activations of their own dtype.
            let dtype = match base.expr() {
                Expr::Dense(w) => w.dtype(),
                _ => DType::F32,
            };
            let x = x.to_dtype(dtype).unwrap();
            let (got, want) = (weight.matmul(&x).unwrap(), base.matmul(&x).unwrap());
            match base.expr() {
                // A few rows times packed codes have a kernel of their own, which adds in another order than the product
                // with rows that an adapter changes on the way.
                Expr::Packed(_) => close(&what, &got, &want, PRODUCT),
                _ => assert_eq!(values(&got), values(&want), "{what}"),
            }
        }
    });
}

#[test]
fn nor_does_one_on_a_weight_of_several_panels_but_for_the_order_of_sums() {
    let shape = (300, 4096);
    for (kind, base) in bases(shape) {
        let dtype = match base.expr() {
            Expr::Dense(w) => w.dtype(),
            _ => DType::F32,
        };
        for tokens in [1, 260] {
            let x = random("x", &[tokens, 4096]).to_dtype(dtype).unwrap();
            let want = base.matmul(&x).unwrap();
            for (name, fresh) in fresh(shape, &base) {
                let what = format!("{name} on {kind}, {tokens} tokens");
                // A product sums in an order that follows from the size of its tile.
                let tolerance = if dtype == DType::F32 { PRODUCT } else { BF16 };
                close(&what, &base.wrap(fresh).matmul(&x).unwrap(), &want, tolerance);
            }
        }
    }
}

/// `sum y * weights` of f32 results, summed in f64.
fn loss_of(y: &Tensor) -> f64 {
    let weights = values(&random("upstream", y.dims()));
    values(y).iter().zip(weights).map(|(y, w)| f64::from(*y) * f64::from(w)).sum()
}

fn grads(y: &Tensor, of: &[&Tensor]) -> Vec<Tensor> {
    let loss = (y * random("upstream", y.dims())).unwrap().sum_all().unwrap();
    let grads = loss.backward().unwrap();
    of.iter().map(|t| grads.get(t).expect("a gradient").clone()).collect()
}

/// Differences of `loss` over a step of one for each element of `var`: exact up to rounding where the
/// loss is linear in it.
fn differences(var: &Var, loss: impl Fn() -> f64) -> Tensor {
    let base = var.as_tensor().copy().unwrap();
    let list = values(&base);
    let at = |i: usize, by: f32| {
        let mut moved = list.clone();
        moved[i] += by;
        var.set(&Tensor::from_vec(moved, base.shape(), &Device::Cpu).unwrap()).unwrap();
        loss()
    };
    let found: Vec<f32> = (0..list.len()).map(|i| (at(i, 0.5) - at(i, -0.5)) as f32).collect();
    var.set(&base).unwrap();
    Tensor::from_vec(found, base.shape(), &Device::Cpu).unwrap()
}

#[test]
fn gradients_are_those_of_finite_differences_and_of_the_dense_reading() {
    every_case(|Case { what, shape, base, trained, .. }| {
        if shape == SHAPES[5] {
            return; // thousands of differences; panels and tiles have their own tests
        }
        let weight = base.wrap(trained);
        for x in [random("one", &[1, shape.1]), random("few", &[2, 10, shape.1])] {
            let x = Var::from_tensor(&x).unwrap();
            let params = weight.params();
            let mut of = vec![x.as_tensor()];
            of.extend(params.iter().map(|(_, var, _)| var.as_tensor()));
            let fast = grads(&weight.matmul(&x).unwrap(), &of);
            let dense = grads(&dense_product(&x, &weight.tensor().unwrap()), &of);
            for (i, (fast, dense)) in fast.iter().zip(&dense).enumerate() {
                close(&format!("{what}: gradient {i}, dense"), fast, dense, 4.0 * PRODUCT);
            }
            let loss = || loss_of(&weight.matmul(&x).unwrap());
            close(&format!("{what}: x"), &fast[0], &differences(&x, loss), DIFFERENCE);
            for ((suffix, var, _), fast) in params.iter().zip(&fast[1..]) {
                // DoRA holds the length of a row constant, so its A and B follow no difference.
                if !what.starts_with("dora") || suffix.ends_with("magnitude_vector") {
                    close(&format!("{what}: {suffix}"), fast, &differences(var, loss), DIFFERENCE);
                }
            }
        }
    });
}

#[test]
fn the_length_of_a_row_is_a_constant_of_doras_gradient() {
    let (o, i, r) = (4, 6, 2);
    let (w, x) = (random("w", &[o, i]), random("x", &[5, i]));
    let (a, b, m) = (random("a", &[r, i]), random("b", &[o, r]), random("m", &[o]));
    let dora: Arc<dyn Transform> = Arc::new(Dora::new(&a, &b, &m, SCALE, None, true).unwrap());
    let params = dora.params();
    let of: Vec<&Tensor> = params.iter().map(|(_, var, _)| var.as_tensor()).collect();
    let got = grads(&Weight::dense(w.clone()).wrap(dora.clone()).matmul(&x).unwrap(), &of);
    // By the formulas of adapters.md 5: A and B see dY m/n, dm = sum dY (x V^T) / n.
    let v = (&w + (b.matmul(&a).unwrap() * SCALE).unwrap()).unwrap();
    let n = v.sqr().unwrap().sum(1).unwrap().sqrt().unwrap();
    let upstream = random("upstream", &[5, o]);
    let seen = upstream.broadcast_mul(&(&m / &n).unwrap()).unwrap();
    let g = (seen.t().unwrap().matmul(&x).unwrap() * SCALE).unwrap(); // of B A
    close("dA", &got[0], &b.t().unwrap().matmul(&g).unwrap(), PRODUCT);
    close("dB", &got[1], &g.matmul(&a.t().unwrap()).unwrap(), PRODUCT);
    let z = x.matmul(&v.t().unwrap()).unwrap();
    close("dm", &got[2], &((upstream * z).unwrap().sum(0).unwrap() / n).unwrap(), PRODUCT);
}

#[test]
fn the_frozen_rule_is_the_same_and_stays() {
    every_case(|Case { what, shape, base, trained, .. }| {
        let (weight, frozen) = (base.wrap(trained.clone()), base.wrap(trained.frozen().unwrap()));
        let [x, _] = inputs(shape.1);
        let before = values(&weight.tensor().unwrap());
        assert_eq!(values(&frozen.tensor().unwrap()), before, "{what}");
        let (a, b) = (weight.matmul(&x).unwrap(), frozen.matmul(&x).unwrap());
        assert_eq!(values(&a), values(&b), "{what}");
        assert!(frozen.params().is_empty() && !weight.params().is_empty(), "{what}");
        let names = |t: &dyn Transform| t.tensors().iter().map(|(s, _)| *s).collect::<Vec<_>>();
        assert_eq!(names(trained.as_ref()), names(trained.frozen().unwrap().as_ref()), "{what}");
        for (_, var, _) in weight.params() {
            var.set(&random("elsewhere", var.dims())).unwrap();
        }
        assert_eq!(values(&frozen.tensor().unwrap()), before, "{what}");
        assert_ne!(values(&weight.tensor().unwrap()), before, "{what}");
    });
}

#[test]
fn nothing_of_a_frozen_base_receives_a_gradient_and_a_trainable_one_does() {
    let shape = (6, 9);
    for (name, fresh) in fresh(shape, &Weight::dense(random("weight", &[6, 9]))) {
        let trained = moved(name, shape, fresh.as_ref(), None);
        let w = Var::from_tensor(&random("weight", &[6, 9])).unwrap();
        let x = random("x", &[4, 9]);
        let y = Weight::dense(w.as_tensor().clone()).wrap(trained.clone()).matmul(&x).unwrap();
        let found = y.sum_all().unwrap().backward().unwrap();
        assert!(found.get(&w).is_none() && found.get(&x).is_none(), "{name}");
        assert!(trained.params().iter().all(|(_, var, _)| found.get(var).is_some()), "{name}");
        // The same equation over a trainable weight, or over another rule.
        let latent = Weight::latent(&w).unwrap();
        let weight = latent.wrap(trained.clone());
        close(name, &weight.matmul(&x).unwrap(), &y, PRODUCT);
        let base = weight.params().remove(0).1;
        let fast = grads(&weight.matmul(&x).unwrap(), &[base.as_tensor()]);
        let dense = grads(&dense_product(&x, &weight.tensor().unwrap()), &[base.as_tensor()]);
        close(name, &fast[0], &dense[0], 4.0 * PRODUCT);
    }
}

#[test]
fn adapters_stand_on_adapters() {
    let shape = (6, 9);
    for (kind, base) in bases(shape) {
        for (inner, first) in fresh(shape, &base) {
            let first = base.wrap(moved(inner, shape, first.as_ref(), None));
            for (outer, second) in fresh(shape, &first) {
                let weight = first.wrap(moved(outer, shape, second.as_ref(), None));
                let x = random("x", &[2, 3, 9]);
                let want = dense_product(&x, &weight.tensor().unwrap());
                let what = format!("{outer} on {inner} on {kind}");
                close(&what, &weight.matmul(&x).unwrap(), &want, 4.0 * PRODUCT);
            }
        }
    }
}

#[test]
fn additive_adapters_are_exactly_lora() {
    for shape in SHAPES {
        let w = random("weight", &[shape.0, shape.1]);
        let (r, _, m) = ranks(shape);
        let miss = Miss::new(&random("d", &[r, shape.0]), shape, None, true).unwrap();
        let mini = Mini::new(&random("d", &[r, m]), shape, None, true).unwrap();
        let forms: [(Arc<dyn Transform>, _); 2] =
            [(Arc::new(miss.clone()), miss.to_lora()), (Arc::new(mini.clone()), mini.to_lora())];
        for (adapter, form) in forms {
            let (a, b) = form.unwrap();
            let lora = Lora::new(&a, &b, 1.0, None, None, false).unwrap();
            let want = values(&adapter.apply(std::slice::from_ref(&w)).unwrap());
            assert_eq!(values(&lora.apply(std::slice::from_ref(&w)).unwrap()), want, "{shape:?}");
        }
    }
}

#[test]
fn a_mini_block_over_all_outputs_is_miss() {
    for shape in SHAPES {
        let (w, d) = (random("weight", &[shape.0, shape.1]), random("d", &[shape.1.min(4), shape.0]));
        let miss = Miss::new(&d, shape, None, true).unwrap().apply(std::slice::from_ref(&w)).unwrap();
        let mini = Mini::new(&d, shape, None, true).unwrap().apply(&[w]).unwrap();
        assert_eq!(values(&mini), values(&miss));
    }
}

#[test]
fn dropout_falls_on_what_the_adapter_adds_alone() {
    let shape = (10, 33);
    let pass = Arc::new(AtomicU64::new(3));
    let dropout = Dropout::new(0.4, 7, "layer", pass.clone()).unwrap();
    for (kind, base) in bases(shape) {
        for (name, start) in fresh(shape, &base) {
            if name == "bat" || name == "embedding" {
                continue; // neither takes dropout
            }
            let rule = moved(name, shape, start.as_ref(), Some(dropout.clone()));
            let weight = base.wrap(rule.clone());
            let x = random("x", &[4, 33]);
            let w = base.tensor().unwrap().to_dtype(DType::F32).unwrap();
            let change = (weight.tensor().unwrap() - &w).unwrap();
            let seen = dropout.apply(&x).unwrap();
            let want = (dense_product(&x, &w) + dense_product(&seen, &change)).unwrap();
            let what = format!("{name} on {kind}");
            close(&what, &weight.matmul(&x).unwrap(), &want, 4.0 * PRODUCT);
            let first = values(&weight.matmul(&x).unwrap());
            assert_eq!(values(&weight.matmul(&x).unwrap()), first, "{what}");
            pass.store(4, Ordering::Relaxed);
            assert_ne!(values(&weight.matmul(&x).unwrap()), first, "{what}");
            pass.store(3, Ordering::Relaxed);
            let frozen = base.wrap(rule.frozen().unwrap());
            let whole = dense_product(&x, &weight.tensor().unwrap());
            close(&what, &frozen.matmul(&x).unwrap(), &whole, PRODUCT);
            // The backward sees the mask of its forward.
            let params = weight.params();
            let x = Var::from_tensor(&x).unwrap();
            let mut of: Vec<&Tensor> = params.iter().map(|(_, var, _)| var.as_tensor()).collect();
            of.push(x.as_tensor());
            let fast = grads(&weight.matmul(&x).unwrap(), &of);
            let loss = || loss_of(&weight.matmul(&x).unwrap());
            close(&what, &fast[of.len() - 1], &differences(&x, loss), DIFFERENCE);
            let last = &params[params.len() - 1].1;
            close(&what, &fast[of.len() - 2], &differences(last, loss), DIFFERENCE);
        }
    }
}

#[test]
fn rows_are_those_of_the_table() {
    let ids = Tensor::new(&[[2u32, 0, 5], [5, 5, 1]], &Device::Cpu).unwrap();
    let picked = |table: &Tensor| {
        let flat = ids.flatten_all().unwrap();
        table.index_select(&flat, 0).unwrap().reshape((2, 3, 9)).unwrap()
    };
    let shape = (6, 9);
    for (kind, base) in bases(shape) {
        assert_eq!(values(&base.rows(&ids).unwrap()), values(&picked(&base.tensor().unwrap())), "{kind}");
        for (name, start) in fresh(shape, &base) {
            let weight = base.wrap(moved(name, shape, start.as_ref(), None));
            let want = picked(&weight.tensor().unwrap());
            close(&format!("{name} on {kind}"), &weight.rows(&ids).unwrap(), &want, PRODUCT);
        }
        let far = Tensor::new(&[1u32, 6], &Device::Cpu).unwrap();
        let error = base.rows(&far).unwrap_err().to_string();
        assert_eq!(error, "found id 6, expected one below the 6 rows of the table");
    }
    // A table in a file, whose other rows are not read.
    let list: Vec<(String, Tensor)> = [DType::F32, DType::F16, DType::BF16, DType::F64]
        .map(|dtype| (format!("{dtype:?}"), random("weight", &[6, 9]).to_dtype(dtype).unwrap()))
        .to_vec();
    let store = stored(&list);
    for (name, table) in &list {
        let rows = store.get(name).unwrap().rows(&ids).unwrap();
        assert_eq!((rows.dtype(), values(&rows)), (table.dtype(), values(&picked(table))), "{name}");
        let far = Tensor::new(&[1u32, 6], &Device::Cpu).unwrap();
        let error = store.get(name).unwrap().rows(&far).unwrap_err().to_string();
        assert_eq!(error, "found id 6, expected one below the 6 rows of the table");
    }
    // Gradients: to a trainable table and to the adapter, none to a frozen table.
    let table = Weight::latent(&random("weight", &[6, 9])).unwrap();
    let var = table.params().remove(0).1;
    let found = grads(&table.rows(&ids).unwrap(), &[var.as_tensor()]);
    let upstream = random("upstream", &[2, 3, 9]).reshape((6, 9)).unwrap();
    let row = |i: usize| upstream.get(i).unwrap();
    let want = ((row(2) + row(3)).unwrap() + row(4)).unwrap();
    close("row 5, three times", &found[0].get(5).unwrap(), &want, PRODUCT);
    let w = Var::from_tensor(&random("weight", &[6, 9])).unwrap();
    let (a, b) = (random("a", &[2, 6]), random("b", &[9, 2]));
    let rule: Arc<dyn Transform> = Arc::new(EmbeddingLora::new(&a, &b, SCALE, true).unwrap());
    let weight = Weight::dense(w.as_tensor().clone()).wrap(rule.clone());
    let loss = || loss_of(&weight.rows(&ids).unwrap());
    let vars: Vec<Var> = rule.params().into_iter().map(|(_, var, _)| var).collect();
    let of: Vec<&Tensor> = vars.iter().map(Var::as_tensor).collect();
    for (got, var) in grads(&weight.rows(&ids).unwrap(), &of).iter().zip(&vars) {
        close("embedding", got, &differences(var, loss), DIFFERENCE);
    }
    let found = weight.rows(&ids).unwrap().sum_all().unwrap().backward().unwrap();
    assert!(found.get(&w).is_none());
}

#[test]
fn the_bias_of_a_branch_is_scaled_and_trained() {
    let (o, i, r) = (5, 7, 2);
    let (w, bias) = (Weight::dense(random("w", &[o, i])), random("bias", &[o]));
    let (a, b) = (random("a", &[r, i]), random("b", &[o, r]));
    let lora = Lora::new(&a, &b, SCALE, Some(&bias), None, true).unwrap();
    let change = lora.bias_change().unwrap().unwrap().detach();
    close("bias", &change, &(bias * SCALE).unwrap(), 0.0);
    let weight = w.wrap(Arc::new(lora));
    let x = random("x", &[4, i]);
    let want = dense_product(&x, &weight.tensor().unwrap()).broadcast_add(&change).unwrap();
    close("y", &weight.matmul(&x).unwrap(), &want, PRODUCT);
    let params = weight.params();
    let (suffix, var, _) = &params[2];
    assert_eq!(suffix, ".lora_bias");
    let got = grads(&weight.matmul(&x).unwrap(), &[var.as_tensor()]);
    let loss = || loss_of(&weight.matmul(&x).unwrap());
    close("gradient", &got[0], &differences(var, loss), DIFFERENCE);
}

#[test]
fn a_weight_of_another_shape_is_named() {
    let other = Weight::dense(random("weight", &[6, 8]));
    let packed = &bases((6, 8))[3].1;
    for (name, start) in fresh((6, 9), &Weight::dense(random("weight", &[6, 9]))) {
        for base in [&other, packed] {
            let weight = base.wrap(start.clone());
            let x = random("x", &[2, 9]);
            let dense = weight.tensor().unwrap_err().to_string();
            assert!(dense.contains("found a weight [6, 8], expected [6, 9]"), "{name}: {dense}");
            if name != "embedding" {
                assert_eq!(weight.matmul(&x).unwrap_err().to_string(), dense, "{name}");
            }
        }
    }
}
