/* Exponential, error function and the activations made of them, as src/kernels/cpu.rs, gelu.rs and swiglu.rs
 * compute them: the same chain of operations, each rounded once, so that the results are theirs to the bit.
 * CUDA's own expf and erff are other polynomials. */
#ifndef QTUNE_ARITH_FUNCTIONS_H
#define QTUNE_ARITH_FUNCTIONS_H

#include <math.h>
#include <stdint.h>

#ifndef QT_FN
#if defined(__CUDACC__)
#define QT_FN static __host__ __device__ __forceinline__
#else
#define QT_FN static inline
#endif
#endif

QT_FN uint32_t bits_of(float x) {
  union {
    float x;
    uint32_t bits;
  } both;
  both.x = x;
  return both.bits;
}

QT_FN float of_bits(uint32_t bits) {
  union {
    float x;
    uint32_t bits;
  } both;
  both.bits = bits;
  return both.x;
}

/* e^x for x <= 0: reduction by Cody and Waite, then the Cephes polynomial. 0 below -87; a NaN stays one. */
QT_FN float exp_nonpos(float x) {
  /* Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits. */
  const float magic = 12582912.0f, log2_e = 1.44269504088896340736f;
  const float ln2_high = 0.6933594f, ln2_low = -2.1219444e-4f;
  const float lifted = x < -87.0f ? -87.0f : x;
  const float shifted = fmaf(lifted, log2_e, magic);
  const float n = shifted - magic;
  const float r = fmaf(n, -ln2_low, fmaf(n, -ln2_high, lifted));
  float p = 1.9875691e-4f, e, power;
  p = fmaf(p, r, 1.3982e-3f);
  p = fmaf(p, r, 8.333452e-3f);
  p = fmaf(p, r, 4.1665796e-2f);
  p = fmaf(p, r, 1.6666665e-1f);
  p = fmaf(p, r, 0.5f);
  e = fmaf(p, r * r, r) + 1.0f;
  power = of_bits((bits_of(shifted) << 23) + 0x3f800000u);
  return x < -87.0f ? 0.0f : e * power;
}

/* erf(x), by two polynomials of N. Juffa's: one in x^2 near 0, one for log(1 - erf). A NaN stays one. */
QT_FN float error_function(float x) {
  /* erf(4) rounds to 1. */
  const float size = fabsf(x), t = size > 4.0f ? 4.0f : size, s = t * t;
  float tail = fmaf(-1.7285347e-5f, t, 3.8319713e-4f);
  const float u = fmaf(-3.8839644e-3f, t, 2.4254622e-2f);
  float centre = -5.967617e-4f;
  tail = fmaf(tail, s, u);
  tail = fmaf(tail, t, -1.0677779e-1f);
  tail = fmaf(tail, t, -6.3484687e-1f);
  tail = fmaf(tail, t, -1.2871751e-1f);
  tail = fmaf(tail, t, -t);
  tail = 1.0f - exp_nonpos(tail);
  centre = fmaf(centre, s, 4.991194e-3f);
  centre = fmaf(centre, s, -2.6768135e-2f);
  centre = fmaf(centre, s, 1.1281992e-1f);
  centre = fmaf(centre, s, -3.7612534e-1f);
  centre = fmaf(centre, s, 1.2837917e-1f);
  centre = fmaf(centre, t, t);
  return copysignf(t > 0.9277344f ? tail : centre, x);
}

/* The normal distribution function, (1 + erf(x / sqrt 2)) / 2. */
QT_FN float normal_share(float x) { return fmaf(0.5f, error_function(x * 0.70710678118654752440f), 0.5f); }

/* x Phi(x) (Hendrycks and Gimpel 2016, section 2). */
QT_FN float gelu(float x) { return x * normal_share(x); }

/* g (Phi(x) + x exp(-x^2/2) / sqrt(2 pi)). */
QT_FN float gelu_grad(float x, float g) {
  const float density = 0.3989422804014327f * exp_nonpos(x * x * -0.5f);
  return g * fmaf(x, density, normal_share(x));
}

/* 1 / (1 + e^-x). The exponential of what is not positive cannot overflow. */
QT_FN float sigmoid(float x) {
  const float e = exp_nonpos(0.0f - fabsf(x)), s = 1.0f / (1.0f + e);
  return x < 0.0f ? e * s : s;
}

QT_FN float silu(float x) { return x * sigmoid(x); }

/* silu(gate) up (Shazeer 2020, eq. 6 without the products). */
QT_FN float swiglu(float gate, float up) { return silu(gate) * up; }

/* The gradient of swiglu in the gate, g that of its result. */
QT_FN float swiglu_grad_gate(float gate, float up, float g) {
  const float s = sigmoid(gate);
  return g * up * s * fmaf(gate, 1.0f - s, 1.0f);
}

/* The gradient of swiglu in the other factor. */
QT_FN float swiglu_grad_up(float gate, float g) { return g * gate * sigmoid(gate); }

#endif
