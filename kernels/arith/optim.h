/* One entry's step of AdamW, CLASSP, Lion and SGD, what clips its gradient and what annealing holds still; the
 * arithmetic of src/kernels/adamw.rs, src/kernels/classp.rs, src/optim/lion.rs, src/optim/sgd.rs and
 * src/train/step.rs. Factors come rounded from f64. */
#ifndef QTUNE_ARITH_OPTIM_H
#define QTUNE_ARITH_OPTIM_H

#include <math.h>
#include <stdint.h>

#ifndef QT_FN
#if defined(__CUDACC__)
#define QT_FN static __host__ __device__ __forceinline__
#else
#define QT_FN static inline
#endif
#endif

/* What an AdamW step multiplies with. */
typedef struct {
  float beta1, rest1; /* and 1 - beta1 */
  float beta2, rest2;
  float rate;     /* lr / (1 - beta1^t) */
  float correct2; /* 1 / (1 - beta2^t) */
  float eps;
  float keep; /* 1 - lr decay */
} AdamW;

/* Loshchilov and Hutter 2019, algorithm 2. */
QT_FN float adamw_moment1(float m, float g, AdamW f) { return m * f.beta1 + g * f.rest1; }

QT_FN float adamw_moment2(float v, float g, AdamW f) { return v * f.beta2 + g * g * f.rest2; }

/* The weight after a step; m and v are the moments after it. */
QT_FN float adamw_weight(float p, float m, float v, AdamW f) {
  return p * f.keep - m * f.rate / (sqrtf(v * f.correct2) + f.eps);
}

/* Powers of CLASSP. */
enum { CLASSP_ONE = 0, CLASSP_TWO = 1, CLASSP_HALF = 2, CLASSP_OTHER = 3 };

/* What a gradient is tested by: it passes untested, |g| > 0, or g^2 > threshold. At threshold 0 the square is
 * not asked for: it underflows where the gradient does not. */
enum { CLASSP_ALL = 0, CLASSP_NONZERO = 1, CLASSP_SQUARE = 2 };

/* What a CLASSP step computes with. */
typedef struct {
  float lr;
  float threshold;
  float epsilon;
  float decay;
  double exponent, root; /* p and 1 / p, for CLASSP_OTHER */
  int32_t power;         /* CLASSP_ONE .. CLASSP_OTHER */
  int32_t test;          /* CLASSP_ALL .. CLASSP_SQUARE */
  int32_t plain;         /* |g| itself is added at every power */
  int32_t scaling;       /* steps are divided by the root of the sum */
} Classp;

QT_FN int classp_passes(float g, Classp f) {
  return f.test == CLASSP_ALL || (f.test == CLASSP_SQUARE ? g * g > f.threshold : fabsf(g) > 0.0f);
}

/* |g|^p of a size. Powers other than 1, 2 and 1/2 go through f64. */
QT_FN float classp_power(float size, int power, double exponent) {
  switch (power) {
    case CLASSP_ONE: return size;
    case CLASSP_TWO: return size * size;
    case CLASSP_HALF: return sqrtf(size);
    default: return (float)pow((double)size, exponent);
  }
}

/* s^(1/p). */
QT_FN float classp_root(float s, int power, double root) {
  switch (power) {
    case CLASSP_ONE: return s;
    case CLASSP_TWO: return sqrtf(s);
    case CLASSP_HALF: return s * s;
    default: return (float)pow((double)s, root);
  }
}

/* The sum after the step of an entry that passes, or not (Ludwig 2024, the pseudo-code). `power` is that of
 * f, apart so that a loop over many entries can know it beforehand. */
QT_FN float classp_sum(float sum, float g, int passes, int power, Classp f) {
  const float size = fabsf(g);
  const float added = f.plain ? size : classp_power(size, power, f.exponent);
  return sum + (passes ? added : 0.0f);
}

/* The weight after the step; `sum` is the one after it. */
QT_FN float classp_weight(float w, float sum, float g, int passes, int power, Classp f) {
  const float rate = f.scaling ? f.lr / classp_root(f.epsilon + sum, power, f.root) : f.lr;
  const float step = rate * (g + f.decay * w);
  return w - (passes ? step : 0.0f);
}

/* What a Lion step multiplies with. */
typedef struct {
  float beta1, rest1;
  float beta2, rest2;
  float lr;
  float keep; /* 1 - lr decay */
} Lion;

/* Chen et al. 2023, algorithm 2; the sign of 0, and of a NaN, is 0. */
QT_FN float lion_weight(float w, float m, float g, Lion f) {
  const float u = m * f.beta1 + g * f.rest1;
  const float sign = (u > 0.0f ? 1.0f : 0.0f) - (u < 0.0f ? 1.0f : 0.0f);
  return w * f.keep - sign * f.lr;
}

/* The momentum after the step, of the one before it. */
QT_FN float lion_momentum(float m, float g, Lion f) { return m * f.beta2 + g * f.rest2; }

/* What an SGD step multiplies with. */
typedef struct {
  float momentum;
  float lr;
  float keep; /* 1 - lr decay */
  float unused;
} Sgd;

QT_FN float sgd_velocity(float velocity, float g, Sgd f) { return g + velocity * f.momentum; }

/* The weight after the step; the velocity is the one after it. */
QT_FN float sgd_weight(float w, float velocity, Sgd f) { return w * f.keep - velocity * f.lr; }

/* What gradients of the norm `norm` are multiplied by: it clips them to the norm `clip`, 0 for no clipping. NaN where
 * the norm is no finite f32: then nothing is to move. */
QT_FN float clip_scale(double norm, double clip) {
  const float rounded = (float)norm;
  if (!(rounded - rounded == 0.0f)) return rounded - rounded;
  return clip > 0.0 && norm > clip ? (float)(clip / norm) : 1.0f;
}

/* An entry that annealing holds (free is 0) stays what it was, bit for bit, against momentum and decay. */
QT_FN float held_or(float free, float moved, float before) { return free != 0.0f ? moved : before; }

#endif
