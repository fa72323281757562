//! Fake quantization: StatsQ, LSQ, and codes on given steps.

use crate::device::{agrees_within, bits, close, device, values, F32, TYPES};
use candle_core::{DType, Device, Tensor, Var};
use qtune::kernels::{self, reference, tape, Levels};

/// Bits of results that must be equal, a NaN being a NaN.
#[track_caller]
fn same(what: &str, got: &Tensor, want: &Tensor) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let nan = f64::NAN.to_bits();
    let of = |t: &Tensor| -> Vec<u64> {
        bits(t).into_iter().map(|b| if f64::from_bits(b).is_nan() { nan } else { b }).collect()
    };
    for (i, (got, want)) in of(got).into_iter().zip(of(want)).enumerate() {
        let (g, w) = (f64::from_bits(got), f64::from_bits(want));
        assert!(got == want, "{what}: element {i}: got {g:e}, want {w:e}");
    }
}

/// `t` in `dtype` on the device, and what that is in f32 on the CPU.
fn both(t: &Tensor, dtype: DType, device: &Device) -> (Tensor, Tensor) {
    let rounded = t.to_dtype(dtype).unwrap();
    (rounded.to_device(device).unwrap(), rounded.to_dtype(DType::F32).unwrap())
}

/// Rows that end within each of the kernel's ways to hold one, wide and not: 8 lanes, a warp, a block, more than a
/// block holds.
const SHAPES: [[usize; 2]; 14] = [
    [1, 1],
    [3, 5],
    [37, 13],
    [2, 64],
    [5, 65],
    [3, 72],
    [9, 256],
    [2, 257],
    [6, 512],
    [2, 520],
    [3, 1031],
    [1, 4104],
    [1, 8195],
    [1, 16_392],
];

#[test]
fn statsq() {
    let Some(device) = device() else { return };
    for (i, shape) in SHAPES.into_iter().enumerate() {
        for b in [1 + i as u8 % 8, 2, 3] {
            let w = values(&shape, u64::from(b));
            agrees_within(&device, std::slice::from_ref(&w), 1.0, &|t| kernels::statsq(&t[0], b), &|t| {
                kernels::statsq(&t[0], b)
            });
            for (dtype, _) in TYPES {
                let what = format!("{shape:?}, {b} bits, {dtype:?}");
                let (there, here) = both(&w, dtype, &device);
                let scale = kernels::statsq_scale(&there).unwrap();
                assert_eq!(scale.dtype(), DType::F32);
                same(&format!("scale, {what}"), &scale, &kernels::statsq_scale(&here).unwrap());
                let codes = kernels::statsq_codes(&there, b).unwrap();
                assert_eq!(codes.dtype(), DType::F32);
                same(&format!("codes, {what}"), &codes, &kernels::statsq_codes(&here, b).unwrap());
                let y = kernels::statsq(&here, b).unwrap().to_dtype(dtype).unwrap();
                same(&what, &kernels::statsq(&there, b).unwrap(), &y);
            }
        }
    }
}

#[test]
fn statsq_of_all_bits_with_ties() {
    let Some(device) = device() else { return };
    // Multiples of 1/16, and rows whose scale is 1 so that ties are met.
    let rows = ((values(&[21, 40], 5) * 4.0).unwrap().round().unwrap() / 16.0).unwrap();
    let halves = Tensor::new(&[0f32, 0.5, -0.5, 1.0, -1.0, -0.0, 0.25, -0.75], &Device::Cpu).unwrap();
    let halves = halves.reshape((1, 8)).unwrap().repeat((1, 5)).unwrap();
    let w = Tensor::cat(&[rows, halves], 0).unwrap();
    for b in 1..=8 {
        let there = w.to_device(&device).unwrap();
        let of = |w: &Tensor| [kernels::statsq_codes(w, b).unwrap(), kernels::statsq(w, b).unwrap()];
        for (got, want) in of(&there).iter().zip(of(&w)) {
            same(&format!("{b} bits"), got, &want);
        }
    }
}

#[test]
fn statsq_of_rows_that_are_empty_tiny_or_broken() {
    let Some(device) = device() else { return };
    let rows =
        [[0f32, 0.0], [-0.0, 0.0], [1e-39, -1e-39], [1.0, f32::NAN], [f32::INFINITY, 1.0], [3e-38, 1e-38]];
    let w = Tensor::new(&rows, &Device::Cpu).unwrap();
    let there = w.to_device(&device).unwrap();
    same("values", &kernels::statsq(&there, 2).unwrap(), &kernels::statsq(&w, 2).unwrap());
    same("codes", &kernels::statsq_codes(&there, 2).unwrap(), &kernels::statsq_codes(&w, 2).unwrap());
    let free = |w: &Tensor| kernels::statsq_free(w, 2, 0.25).unwrap();
    same("free", &free(&there), &free(&w));
}

#[test]
fn annealing() {
    let Some(device) = device() else { return };
    for shape in SHAPES {
        for (b, band) in [(2u8, 0.1), (3, 0.005), (4, 0.3)] {
            let w = values(&shape, u64::from(b));
            let op = |t: &[Tensor]| kernels::statsq_annealed(&t[0], b, band);
            agrees_within(&device, std::slice::from_ref(&w), 1.0, &op, &op);
            for (dtype, _) in TYPES {
                let (there, here) = both(&w, dtype, &device);
                let free = kernels::statsq_free(&there, b, band).unwrap();
                assert_eq!(free.dtype(), DType::F32);
                let want = kernels::statsq_free(&here, b, band).unwrap();
                same(&format!("free, {shape:?}, {b} bits, {band}, {dtype:?}"), &free, &want);
            }
        }
    }
}

fn grids() -> Vec<Levels> {
    let all = 1..=8;
    let mut grids: Vec<Levels> = all.clone().map(Levels::mid_rise).collect();
    grids.extend(all.clone().skip(1).map(Levels::signed));
    grids.extend(all.map(Levels::unsigned));
    grids
}

#[test]
fn codes_and_values_on_given_steps() {
    let Some(device) = device() else { return };
    for shape in [[1, 1], [13, 5], [6, 8], [9, 264], [3, 2051]] {
        let rows = shape[0];
        // Multiples of 1/16 on steps of powers of two make ties.
        let w = ((values(&shape, 3) * 8.0).unwrap().round().unwrap() / 16.0).unwrap();
        let w =
            Tensor::cat(&[&w.narrow(0, 0, rows / 2).unwrap(), &values(&[rows - rows / 2, shape[1]], 4)], 0);
        let w = w.unwrap();
        let steps = [0.25f32, 0.5, 0.3, 0.0, -1.0, 1e-39, 0.11, f32::MIN_POSITIVE, 7.0, 1e-3];
        let steps: Vec<f32> = steps.into_iter().cycle().take(rows).collect();
        let steps = Tensor::from_vec(steps, rows, &Device::Cpu).unwrap();
        for levels in grids() {
            for (dtype, _) in TYPES {
                let what = format!("{shape:?}, {levels:?}, {dtype:?}");
                let ((w_there, w_here), (s_there, s_here)) =
                    (both(&w, dtype, &device), both(&steps, dtype, &device));
                let codes = kernels::quantize(&w_there, &s_there, levels).unwrap();
                let want = kernels::quantize(&w_here, &s_here, levels).unwrap();
                assert_eq!(codes.dtype(), DType::F32);
                same(&format!("codes, {what}"), &codes, &want);
                let y = kernels::dequantize(&codes, &s_there, levels).unwrap();
                let want = kernels::dequantize(&want, &s_here, levels).unwrap().to_dtype(dtype).unwrap();
                same(&what, &y, &want);
            }
        }
    }
    let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38, -0.0, 1e-45];
    let w = Tensor::new(&[odd], &Device::Cpu).unwrap();
    for step in [0.5f32, f32::NAN, f32::INFINITY] {
        let step = Tensor::new(&[step], &Device::Cpu).unwrap();
        let (there, s) = (w.to_device(&device).unwrap(), step.to_device(&device).unwrap());
        let levels = Levels::mid_rise(3);
        let (codes, want) =
            (kernels::quantize(&there, &s, levels).unwrap(), kernels::quantize(&w, &step, levels).unwrap());
        same("odd codes", &codes, &want);
        let (y, want) = (kernels::dequantize(&codes, &s, levels), kernels::dequantize(&want, &step, levels));
        same("odd values", &y.unwrap(), &want.unwrap());
    }
}

/// x, scales and a shift before for one quantizer.
fn site(shape: &[usize], axis: Option<usize>) -> [Tensor; 3] {
    let scales = axis.map_or(1, |a| shape[a]);
    let s = values(&[scales], 2).abs().unwrap().affine(0.2, 0.15).unwrap();
    let last = shape[shape.len() - 1];
    [(values(shape, 1) * 0.7).unwrap(), s, (values(&[last], 3) * 0.3).unwrap()]
}

/// A shape and the axes that may have scales.
type Site = (&'static [usize], &'static [Option<usize>]);

#[test]
fn lsq() {
    let Some(device) = device() else { return };
    let sites: [Site; 12] = [
        (&[1, 1], &[None, Some(0), Some(1)]),
        (&[3, 5], &[None, Some(0), Some(1)]),
        (&[2, 7, 13], &[None, Some(0), Some(1), Some(2)]),
        (&[2, 3, 4, 8], &[None, Some(0), Some(1), Some(2), Some(3)]),
        (&[11, 50, 17], &[None, Some(1), Some(2)]),
        // Beyond one block along a row, without and with wide accesses.
        (&[3, 259], &[None, Some(0), Some(1)]),
        (&[5, 1032], &[None, Some(0), Some(1)]),
        // A team of three warps; a row that ends within a warp.
        (&[9, 384], &[None, Some(0), Some(1)]),
        // More rows than teams begin with.
        (&[6000, 4], &[None, Some(1)]),
        (&[300, 9, 8], &[None, Some(1)]),
        // Several rows of a team, of which several share a scale.
        (&[40, 30, 8], &[Some(0), Some(1)]),
        (&[4, 3, 101, 8], &[Some(1)]),
    ];
    for (shape, axes) in sites {
        for &axis in axes {
            for levels in [Levels::signed(2), Levels::unsigned(3)] {
                let t = site(shape, axis);
                agrees_within(
                    &device,
                    &t,
                    4.0,
                    &|t| kernels::lsq(&t[0], &t[1], Some(&t[2]), levels, axis),
                    &|t| reference::lsq(&t[0], &t[1], Some(&t[2]), levels, axis),
                );
                agrees_within(
                    &device,
                    &t[..2],
                    4.0,
                    &|t| kernels::lsq(&t[0], &t[1], None, levels, axis),
                    &|t| reference::lsq(&t[0], &t[1], None, levels, axis),
                );
            }
        }
    }
}

/// Scales and shifts stay f32 beside activations of halves, and so do their gradients.
#[test]
fn lsq_of_halves_on_scales_of_f32() {
    let Some(device) = device() else { return };
    for (shape, parts, axis) in
        [(&[2usize, 5, 12] as &[usize], 3, Some(1)), (&[7, 33], 1, None), (&[9, 3, 40], 1, Some(2))]
    {
        let (last, axes) = (shape[shape.len() - 1], shape.len());
        let mut seen = shape.to_vec();
        (seen[axes - 2], seen[axes - 1]) = (seen[axes - 2] * parts, last / parts);
        let s = values(&[axis.map_or(1, |a| seen[a])], 2).abs().unwrap().affine(0.2, 0.15).unwrap();
        let b = [3, 4].map(|seed| (values(&[last], seed) * 0.3).unwrap());
        let op = |t: &[Tensor]| {
            let shifts = (t.get(2), t.get(3));
            kernels::lsq_shifted(&t[0], &t[1], shifts, Levels::signed(3), (axis, parts))
        };
        for (dtype, tolerance) in TYPES {
            let x = (values(shape, 1) * 0.7).unwrap();
            let (there, here) = both(&x, dtype, &device);
            let all = [there, s.clone(), b[0].clone(), b[1].clone()].map(|t| t.to_device(&device).unwrap());
            let want = op(&[here.clone(), s.clone(), b[0].clone(), b[1].clone()]).unwrap();
            // Nothing but the result is rounded.
            same("y", &op(&all).unwrap(), &want.to_dtype(dtype).unwrap());
            for taped in [false, true] {
                let of = |t: &[Tensor], dtype: DType| -> Vec<Tensor> {
                    let vars: Vec<Var> = t.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
                    let t: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
                    let g = values(shape, 77).to_dtype(dtype).unwrap().to_dtype(t[0].dtype()).unwrap();
                    let g = g.to_device(t[0].device()).unwrap();
                    if !taped {
                        let y = (op(&t).unwrap() * g).unwrap().sum_all().unwrap();
                        let found = y.backward().unwrap();
                        return t.iter().map(|t| found.get(t).unwrap().clone()).collect();
                    }
                    let (y, tape) = tape::record(|| op(&t)).unwrap();
                    let mut found = tape.onward(&y, g, &t.iter().collect::<Vec<_>>()).unwrap();
                    t.iter().map(|t| found.remove(t).unwrap()).collect()
                };
                let got = of(&all, dtype);
                let want = of(&[here.clone(), s.clone(), b[0].clone(), b[1].clone()], dtype);
                for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                    assert_eq!(got.dtype(), if i == 0 { dtype } else { DType::F32 });
                    let what = format!("{shape:?}, {dtype:?}, taped {taped}, gradient {i}");
                    // Walked, the sums are of gradients that candle rounds on the way to the widened operands.
                    close(&what, got, want, if i > 0 && taped { F32 } else { 4.0 * tolerance });
                }
            }
        }
    }
}

#[test]
fn lsq_of_more_rows_than_teams() {
    let Some(device) = device() else { return };
    for (shape, axis) in [(&[1700usize, 255] as &[usize], Some(0)), (&[17, 100, 255], Some(0))] {
        let [x, s, _] = site(shape, axis);
        let (x_there, s_there) = (x.to_device(&device).unwrap(), s.to_device(&device).unwrap());
        let op = |x: &Tensor, s: &Tensor| kernels::lsq(x, s, None, Levels::signed(4), axis).unwrap();
        same(&format!("{shape:?}"), &op(&x_there, &s_there), &op(&x, &s));
    }
}

#[test]
fn lsq_codes_of_all_bits() {
    let Some(device) = device() else { return };
    for (shape, axis) in
        [(&[7usize, 13] as &[usize], None), (&[4, 6, 16], Some(1)), (&[5, 24], Some(1)), (&[9, 65], Some(0))]
    {
        let [x, s, shift] = site(shape, axis);
        // Ties: x and the shift in sixteenths, on scales of 1/2 and their like.
        let ties = |t: &Tensor| ((t * 16.0).unwrap().round().unwrap() / 16.0).unwrap();
        let half = (s.ones_like().unwrap() * 0.5).unwrap();
        for (x, s, shift) in [(x.clone(), s, shift.clone()), (ties(&x), half, ties(&shift))] {
            for levels in grids().into_iter().filter(|levels| !levels.half && levels.hi >= 1) {
                for (dtype, _) in TYPES {
                    let what = format!("{shape:?}, {levels:?}, {dtype:?}");
                    let ((x, here), (s, s_here)) = (both(&x, dtype, &device), both(&s, dtype, &device));
                    let (b, b_here) = both(&shift, dtype, &device);
                    for (b, b_here) in [(Some(&b), Some(&b_here)), (None, None)] {
                        let codes = kernels::lsq_codes(&x, &s, b, levels, axis).unwrap();
                        assert_eq!(codes.dtype(), DType::F32);
                        let want = kernels::lsq_codes(&here, &s_here, b_here, levels, axis).unwrap();
                        same(&format!("codes, {what}"), &codes, &want);
                        let y = kernels::lsq(&x, &s, b, levels, axis).unwrap();
                        let want = kernels::lsq(&here, &s_here, b_here, levels, axis).unwrap();
                        same(&what, &y, &want.to_dtype(dtype).unwrap());
                    }
                }
            }
        }
    }
}

#[test]
fn lsq_of_parts_with_shifts_on_both_sides() {
    let Some(device) = device() else { return };
    for (shape, parts, axis) in [
        (&[2usize, 5, 12] as &[usize], 3, Some(1)),
        (&[2, 5, 16], 2, Some(1)),
        (&[3, 4, 21], 7, None),
        (&[4, 6, 48], 3, Some(0)),
        (&[9, 3, 40], 1, Some(2)),
        (&[300, 4, 24], 3, Some(1)),
    ] {
        let (last, axes) = (shape[shape.len() - 1], shape.len());
        let mut seen = shape.to_vec();
        (seen[axes - 2], seen[axes - 1]) = (seen[axes - 2] * parts, last / parts);
        let s = values(&[axis.map_or(1, |a| seen[a])], 2).abs().unwrap().affine(0.2, 0.15).unwrap();
        let t = [(values(shape, 1) * 0.7).unwrap(), s, values(&[last], 3), values(&[last], 4)];
        let t = [t[0].clone(), t[1].clone(), (&t[2] * 0.3).unwrap(), (&t[3] * 0.3).unwrap()];
        let levels = Levels::signed(3);
        let op = |t: &[Tensor]| {
            kernels::lsq_shifted(&t[0], &t[1], (Some(&t[2]), Some(&t[3])), levels, (axis, parts))
        };
        agrees_within(&device, &t, 4.0, &op, &op);
        let op =
            |t: &[Tensor]| kernels::lsq_shifted(&t[0], &t[1], (None, Some(&t[2])), levels, (axis, parts));
        agrees_within(&device, &t[..3], 4.0, &op, &op);
        let op =
            |t: &[Tensor]| kernels::lsq_shifted(&t[0], &t[1], (Some(&t[2]), None), levels, (axis, parts));
        agrees_within(&device, &t[..3], 4.0, &op, &op);
    }
}

#[test]
fn lsq_floors_its_scale() {
    let Some(device) = device() else { return };
    let x = (values(&[4, 6], 1) * 1e-5).unwrap();
    for small in [1e-7f32, -0.3, 0.0] {
        let s = Tensor::new(&[small], &Device::Cpu).unwrap();
        let op = |t: &[Tensor]| kernels::lsq(&t[0], &t[1], None, Levels::signed(3), None);
        // In f16 the values themselves are subnormal: the others only are told apart.
        let (there, s_there) = (x.to_device(&device).unwrap(), s.to_device(&device).unwrap());
        same("floored", &op(&[there, s_there]).unwrap(), &op(&[x.clone(), s]).unwrap());
    }
}

#[test]
fn lsq_begins_with_the_mean() {
    let Some(device) = device() else { return };
    let x = values(&[6, 9, 20], 1);
    for axis in [None, Some(0), Some(1), Some(2)] {
        for (dtype, _) in TYPES {
            let (there, here) = both(&x, dtype, &device);
            let of = |x: &Tensor| kernels::lsq_init(x, Levels::signed(3), axis, 2.0).unwrap();
            assert_eq!(of(&there).dtype(), DType::F32);
            close(&format!("{axis:?}, {dtype:?}"), &of(&there), &of(&here), F32);
        }
    }
}

#[test]
fn what_lies_at_odd_addresses() {
    let Some(device) = device() else { return };
    // Rows that would allow wide accesses, from the second on of a matrix with an odd width before it.
    let flat = values(&[1 + 6 * 16], 1).to_device(&device).unwrap();
    let x = flat.narrow(0, 1, 6 * 16).unwrap().reshape((6, 16)).unwrap();
    let here = x.to_device(&Device::Cpu).unwrap();
    same("statsq", &kernels::statsq(&x, 3).unwrap(), &kernels::statsq(&here, 3).unwrap());
    let step = |on: &Device| Tensor::new(&[0.3f32; 6], on).unwrap();
    let codes = |x: &Tensor| kernels::quantize(x, &step(x.device()), Levels::signed(4)).unwrap();
    same("codes", &codes(&x), &codes(&here));
    let y = |x: &Tensor| kernels::lsq(x, &step(x.device()), None, Levels::signed(4), Some(0)).unwrap();
    same("lsq", &y(&x), &y(&here));
}

#[test]
fn wrong_arguments_are_named() {
    let Some(device) = device() else { return };
    let on = |shape: &[usize]| values(shape, 1).to_device(&device).unwrap();
    let refused = |result: candle_core::Result<Tensor>| {
        let text = result.unwrap_err().to_string();
        text.lines().next().unwrap_or_default().to_string()
    };
    assert!(refused(kernels::statsq(&on(&[2, 7, 13]), 2)).contains("[2, 7, 13]"));
    assert!(refused(kernels::statsq_free(&on(&[2, 2]), 2, 0.5)).contains("below 0.5"));
    assert!(refused(kernels::quantize(&on(&[2, 2]), &on(&[3]), Levels::signed(2))).contains("[2]"));
    let text = refused(kernels::lsq(&on(&[2, 7]), &on(&[6]), None, Levels::signed(2), Some(1)));
    assert!(text.contains("[7]") && text.contains("[6]"), "{text}");
    let elsewhere = values(&[7], 1);
    let text = refused(kernels::lsq(&on(&[2, 7]), &elsewhere, None, Levels::signed(2), Some(1)));
    assert!(text.contains("expected s on"), "{text}");
}
