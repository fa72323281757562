/* Quantizers: StatsQ for weights, LSQ for activations and weights, annealing; the arithmetic of
 * src/kernels/fake_quant. A code k in [lo, hi] stands for step * (k + offset). Codes are whole floats. */
#ifndef QTUNE_ARITH_QUANTIZE_H
#define QTUNE_ARITH_QUANTIZE_H

#include <math.h>
#include <stdint.h>

#ifndef QT_FN
#if defined(__CUDACC__)
#define QT_FN static __host__ __device__ __forceinline__
#else
#define QT_FN static inline
#endif
#endif

/* The smallest normal f32. */
#define QT_MIN_NORMAL 1.17549435e-38f

/* The code nearest to v, ties to even. Comparisons, not fminf and fmaxf: a NaN must come out as one. */
QT_FN float nearest_code(float v, float lo, float hi) {
  v = v < lo ? lo : v;
  v = v > hi ? hi : v;
  return rintf(v);
}

/* Whether a step stands for a row of zeros with codes 0: below the smallest normal f32. A NaN does not. */
QT_FN int dead_step(float step) { return step < QT_MIN_NORMAL; }

QT_FN float grid_code(float w, float step, float offset, float lo, float hi) {
  return dead_step(step) ? 0.0f : nearest_code(w / step - offset, lo, hi);
}

QT_FN float grid_value(float code, float step, float offset) {
  return dead_step(step) ? 0.0f : (code + offset) * step;
}

/* w on the grid: `grid_value` of `grid_code`. */
QT_FN float grid_round(float w, float step, float offset, float lo, float hi) {
  return dead_step(step) ? 0.0f : (nearest_code(w / step - offset, lo, hi) + offset) * step;
}

/* StatsQ's scale, twice the mean, of a row of `width` elements whose sizes sum to `total` (Liu et al. 2023,
 * section 4.1). The sum is in f64, so that the order of a sum on many threads does not show in f32. */
QT_FN float statsq_scale_of(double total, double width) { return (float)(2.0 * total / width); }

/* StatsQ's step; n = 2^(bits-1), the codes are [-n, n-1] with offset 1/2. */
QT_FN float statsq_step_of(float scale, float n) { return scale / n; }

/* 1 where annealing leaves a weight free: within `band` steps of one of the thresholds -(n-1) .. n-1, the
 * border included; else 0. */
QT_FN float statsq_free(float w, float scale, float n, float band) {
  float x, j;
  if (scale < QT_MIN_NORMAL * n) return 0.0f;
  x = w / scale;
  x = x < -1.0f ? -1.0f : x;
  x = x > 1.0f ? 1.0f : x;
  x = x * n;
  j = rintf(x);
  j = j < 1.0f - n ? 1.0f - n : j;
  j = j > n - 1.0f ? n - 1.0f : j;
  return fabsf(x - j) <= band ? 1.0f : 0.0f;
}

/* The gradient of an annealed weight. Not a product: one that is not finite is cut where nothing is free. */
QT_FN float statsq_grad(float w, float scale, float n, float band, float g) {
  return statsq_free(w, scale, n, band) == 1.0f ? g : 0.0f;
}

/* LSQ's scale as the forward pass uses it; the gradient passes the floor as if it were not there. */
QT_FN float lsq_scale_of(float s) { return s < 1e-5f ? 1e-5f : s; }

/* x in steps, before rounding; a quantizer without a shift has a shift of 0. */
QT_FN float lsq_steps(float x, float shift, float scale) { return (x + shift) / scale; }

QT_FN float lsq_code(float x, float shift, float scale, float lo, float hi) {
  return nearest_code(lsq_steps(x, shift, scale), lo, hi);
}

/* Esser et al. 2020, eq. 1 and 2, after a shift. */
QT_FN float lsq_value(float x, float shift, float scale, float lo, float hi) {
  return lsq_code(x, shift, scale, lo, hi) * scale;
}

/* As `lsq_value`, with a shift behind it too. */
QT_FN float lsq_value_shifted(float x, float shift, float scale, float lo, float hi, float shift_out) {
  return lsq_code(x, shift, scale, lo, hi) * scale + shift_out;
}

/* The gradient of x, and of the shift before it: g where v = lsq_steps(..) lies within the range, its borders
 * included, else 0. */
QT_FN float lsq_grad_x(float v, float lo, float hi, float g) { return v >= lo && v <= hi ? g : 0.0f; }

/* The share of one element in the gradient of its scale, before the factor 1 / sqrt(hi m): g times the slope
 * of the value in the scale (Esser et al. 2020, eq. 3). */
QT_FN float lsq_grad_scale(float v, float lo, float hi, float g) {
  const float q = nearest_code(v, lo, hi);
  return g * (v >= lo && v <= hi ? q - v : q);
}

#endif
