/* Arithmetic of rows: softmax and cross-entropy (src/kernels/softmax.rs, cross_entropy.rs), layer and RMS
 * normalization (norm.rs, rms_norm.rs), rotations (rope.rs).
 *
 * A softmax is taken in one pass by keeping the largest logit so far and the sum of exp(x - top). NaN is
 * never a top and makes the sum NaN, and so do an infinite logit and a row of -inf alone, once
 * `softmax_sum` is asked: as where the top is known before the first exponential. */
#ifndef QTUNE_ARITH_ROWS_H
#define QTUNE_ARITH_ROWS_H

#include "functions.h"

#include <math.h>

typedef struct {
  float top, sum;
} Softmax;

QT_FN Softmax softmax_of(float top, float sum) {
  Softmax s;
  s.top = top;
  s.sum = sum;
  return s;
}

/* Of no logits. */
QT_FN Softmax softmax_none(void) { return softmax_of(-INFINITY, 0.0f); }

/* What a logit is measured from: where all were -inf so far, from 0, so that they count nothing. */
QT_FN float softmax_base(float top) { return top == -INFINITY ? 0.0f : top; }

/* The factor of a sum when its top rises. The same infinity twice is no rise. */
QT_FN float softmax_shrink(float from, float to) { return from == to ? 1.0f : exp_nonpos(from - to); }

QT_FN Softmax softmax_join(Softmax a, Softmax b) {
  const float top = b.top > a.top ? b.top : a.top;
  const float left = a.sum * softmax_shrink(a.top, top);
  return softmax_of(top, fmaf(b.sum, softmax_shrink(b.top, top), left));
}

/* The sum as it divides: NaN under an infinite top. */
QT_FN float softmax_sum(Softmax s) { return s.sum + (s.top - s.top); }

/* exp(x - top) of a row whose top is final. */
QT_FN float softmax_exp(float x, float top) { return exp_nonpos(x - top); }

/* factor * y * (g - mean), mean the sum of g y over the row. */
QT_FN float softmax_grad(float y, float g, float mean, float factor) { return factor * y * (g - mean); }

/* The loss of a row whose softmax has (top, sum), z the logit of its class. */
QT_FN float cross_entropy(float z, float top, float sum) { return logf(sum) - (z - top); }

/* share = factor / sum, factor = dL / rows. */
QT_FN float cross_entropy_grad(float z, float top, float share, int own, float factor) {
  const float d = softmax_exp(z, top) * share;
  return own ? d - factor : d;
}

/* One class's part of a loss against probabilities, log = ln(sum). A class without probability costs
 * nothing, whatever its logit. */
QT_FN float soft_cross_entropy(float z, float p, float top, float log) {
  return p == 0.0f ? 0.0f : p * (log - (z - top));
}

/* share = (the sum of p over the row) / sum. */
QT_FN float soft_cross_entropy_grad(float z, float p, float top, float share, float factor) {
  return factor * (softmax_exp(z, top) * share - p);
}

/* 1 / sqrt(mean square + eps): of deviations for layer normalization. */
QT_FN float norm_scale(float squares, float count, float eps) { return 1.0f / sqrtf(squares / count + eps); }

/* c = x - mean. */
QT_FN float layer_norm(float c, float r, float w, float b) { return fmaf(c * r, w, b); }

/* u = dy w and xh = c r, with their means over the row. */
QT_FN float layer_norm_grad(float u, float xh, float mean_u, float mean_ux, float r) {
  return (u - mean_u - xh * mean_ux) * r;
}

QT_FN float rms_norm(float x, float r, float w) { return x * r * w; }

/* mean = sum(u x) r r / count. */
QT_FN float rms_norm_grad(float u, float x, float mean, float r) { return (u - x * mean) * r; }

/* The two members of a pair turned: `first` and `second` of y. */
QT_FN float rope_first(float low, float high, float c, float s) { return low * c - high * s; }
QT_FN float rope_second(float low, float high, float c, float s) { return high * c + low * s; }

#endif
