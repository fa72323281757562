/* Runs the functions of these headers on the host, for tests/kernel_arithmetic.rs.
 *
 * Requests come on stdin, replies go to stdout, until stdin ends. All numbers are 32 bits, little-endian.
 *
 *   request: bytes in the name, the name, arrays, and for each its length and its floats
 *   reply:   arrays, and for each its length and its floats
 *
 * A function of single entries is applied to each entry of the first array; the others have its length, or
 * one element, which holds for all. statsq_scale takes rows and their width. To check another function, give
 * it a line in ENTRIES. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "functions.h"
#include "optim.h"
#include "oscillation.h"
#include "quantize.h"

/* X(name, inputs, outputs, statement): from a[0], a[1], .. to r[0], r[1], .. */
#define ENTRIES(X)                                                                                           \
  X(exp_nonpos, 1, 1, r[0] = exp_nonpos(a[0]))                                                               \
  X(error_function, 1, 1, r[0] = error_function(a[0]))                                                       \
  X(normal_share, 1, 1, r[0] = normal_share(a[0]))                                                           \
  X(gelu, 1, 1, r[0] = gelu(a[0]))                                                                           \
  X(gelu_grad, 2, 1, r[0] = gelu_grad(a[0], a[1]))                                                           \
  X(sigmoid, 1, 1, r[0] = sigmoid(a[0]))                                                                     \
  X(silu, 1, 1, r[0] = silu(a[0]))                                                                           \
  X(swiglu, 2, 1, r[0] = swiglu(a[0], a[1]))                                                                 \
  X(swiglu_grad, 3, 2, r[0] = swiglu_grad_gate(a[0], a[1], a[2]); r[1] = swiglu_grad_up(a[0], a[2]))         \
  /* v, lo, hi */                                                                                            \
  X(nearest_code, 3, 1, r[0] = nearest_code(a[0], a[1], a[2]))                                               \
  /* w, step, offset, lo, hi */                                                                              \
  X(grid_code, 5, 1, r[0] = grid_code(a[0], a[1], a[2], a[3], a[4]))                                         \
  X(grid_round, 5, 1, r[0] = grid_round(a[0], a[1], a[2], a[3], a[4]))                                       \
  /* code, step, offset */                                                                                   \
  X(grid_value, 3, 1, r[0] = grid_value(a[0], a[1], a[2]))                                                   \
  /* scale, n */                                                                                             \
  X(statsq_step, 2, 1, r[0] = statsq_step_of(a[0], a[1]))                                                    \
  /* w, scale, n, band, (g) */                                                                               \
  X(statsq_free, 4, 1, r[0] = statsq_free(a[0], a[1], a[2], a[3]))                                           \
  X(statsq_grad, 5, 1, r[0] = statsq_grad(a[0], a[1], a[2], a[3], a[4]))                                     \
  /* x, shift, s, lo, hi, (shift_out or g) */                                                                \
  X(lsq_code, 5, 1, r[0] = lsq_code(a[0], a[1], lsq_scale_of(a[2]), a[3], a[4]))                             \
  X(lsq_value, 5, 1, r[0] = lsq_value(a[0], a[1], lsq_scale_of(a[2]), a[3], a[4]))                           \
  X(lsq_value_shifted, 6, 1, r[0] = lsq_value_shifted(a[0], a[1], lsq_scale_of(a[2]), a[3], a[4], a[5]))     \
  X(lsq_grad, 6, 2, {                                                                                        \
    const float v = lsq_steps(a[0], a[1], lsq_scale_of(a[2]));                                               \
    r[0] = lsq_grad_x(v, a[3], a[4], a[5]);                                                                  \
    r[1] = lsq_grad_scale(v, a[3], a[4], a[5]);                                                              \
  })                                                                                                         \
  /* p, g, m, v, beta1, rest1, beta2, rest2, rate, correct2, eps, keep */                                    \
  X(adamw, 12, 3, {                                                                                          \
    const AdamW f = {a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11]};                                      \
    r[1] = adamw_moment1(a[2], a[1], f);                                                                     \
    r[2] = adamw_moment2(a[3], a[1], f);                                                                     \
    r[0] = adamw_weight(a[0], r[1], r[2], f);                                                                \
  })                                                                                                         \
  /* w, g, sum, lr, threshold, epsilon, decay, p, power, test, plain, scaling */                             \
  X(classp, 12, 3, {                                                                                         \
    const double p = a[7];                                                                                   \
    const Classp f = {a[3], a[4],          a[5],           a[6],           p,                                \
                      1.0 / p, (int32_t)a[8], (int32_t)a[9], (int32_t)a[10], (int32_t)a[11]};                \
    const int passes = classp_passes(a[1], f);                                                               \
    r[1] = classp_sum(a[2], a[1], passes, f.power, f);                                                       \
    r[0] = classp_weight(a[0], r[1], a[1], passes, f.power, f);                                              \
    r[2] = (float)passes;                                                                                    \
  })                                                                                                         \
  /* w, g, m, beta1, rest1, beta2, rest2, lr, keep */                                                        \
  X(lion, 9, 2, {                                                                                            \
    const Lion f = {a[3], a[4], a[5], a[6], a[7], a[8]};                                                     \
    r[0] = lion_weight(a[0], a[2], a[1], f);                                                                 \
    r[1] = lion_momentum(a[2], a[1], f);                                                                     \
  })                                                                                                         \
  /* w, g, velocity, momentum, lr, keep */                                                                   \
  X(sgd, 6, 2, {                                                                                             \
    const Sgd f = {a[3], a[4], a[5], 0.0f};                                                                  \
    r[1] = sgd_velocity(a[2], a[1], f);                                                                      \
    r[0] = sgd_weight(a[0], r[1], f);                                                                        \
  })                                                                                                         \
  /* norm, clip */                                                                                           \
  X(clip_scale, 2, 1, r[0] = clip_scale(a[0], a[1]))                                                         \
  /* code, last, direction, ema, total, momentum, rest */                                                    \
  X(turns_after, 7, 5, {                                                                                     \
    const Turns t = {(int8_t)a[1], (int8_t)a[2], a[3], (uint32_t)a[4]};                                      \
    int changed;                                                                                             \
    const Turns next = turns_after(t, (int8_t)a[0], a[5], a[6], &changed);                                   \
    r[0] = next.last;                                                                                        \
    r[1] = next.direction;                                                                                   \
    r[2] = next.ema;                                                                                         \
    r[3] = (float)next.total;                                                                                \
    r[4] = (float)changed;                                                                                   \
  })                                                                                                         \
  /* sign, g */                                                                                              \
  X(sign_after, 2, 2, {                                                                                      \
    int8_t turned;                                                                                           \
    r[0] = sign_after((int8_t)a[0], a[1], &turned);                                                          \
    r[1] = turned;                                                                                           \
  })                                                                                                         \
  /* free, moved, before */                                                                                  \
  X(held_or, 3, 1, r[0] = held_or(a[0], a[1], a[2]))

enum { MOST = 16 };

typedef struct {
  uint32_t length;
  float *at;
} Array;

typedef void Entry(const float *a, float *r);

typedef struct {
  const char *name;
  int inputs, outputs;
  Entry *entry; /* null: statsq_scale, a rule of whole rows */
} Function;

#define DEFINE(NAME, INPUTS, OUTPUTS, ...) \
  static void do_##NAME(const float *a, float *r) { __VA_ARGS__; }
ENTRIES(DEFINE)

#define LIST(NAME, INPUTS, OUTPUTS, ...) {#NAME, INPUTS, OUTPUTS, do_##NAME},
static const Function functions[] = {ENTRIES(LIST){"statsq_scale", 2, 1, NULL}};

static void fail(const char *what, const char *name) {
  fprintf(stderr, "check: %s: %s\n", name, what);
  exit(2);
}

/* Whether there was another number; stdin may end before one, not within. */
static int number(uint32_t *to) {
  unsigned char bytes[4] = {0};
  const size_t got = fread(bytes, 1, 4, stdin);
  if (got != 0 && got != 4) fail("ends within a number", "stdin");
  *to = (uint32_t)bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
  return got == 4;
}

static uint32_t another(void) {
  uint32_t read;
  if (!number(&read)) fail("ends within a request", "stdin");
  return read;
}

static void put(uint32_t number) {
  const unsigned char bytes[4] = {number & 255, number >> 8 & 255, number >> 16 & 255, number >> 24};
  fwrite(bytes, 1, 4, stdout);
}

static Array array(uint32_t length) {
  Array made = {length, malloc((length ? length : 1) * sizeof(float))};
  if (made.at == NULL) fail("no memory", "array");
  return made;
}

static void apply(const Function *function, const Array *in, Array *out) {
  float a[MOST], r[MOST];
  uint32_t i;
  int k;
  if (function->entry == NULL) {
    const uint32_t width = (uint32_t)in[1].at[0];
    uint32_t row;
    out[0] = array(in[0].length / width);
    for (row = 0; row < out[0].length; row++) {
      double total = 0.0;
      for (i = 0; i < width; i++) total += fabs((double)in[0].at[row * width + i]);
      out[0].at[row] = statsq_scale_of(total, width);
    }
    return;
  }
  for (k = 0; k < function->outputs; k++) out[k] = array(in[0].length);
  for (i = 0; i < in[0].length; i++) {
    for (k = 0; k < function->inputs; k++) a[k] = in[k].at[in[k].length == 1 ? 0 : i];
    function->entry(a, r);
    for (k = 0; k < function->outputs; k++) out[k].at[i] = r[k];
  }
}

int main(void) {
  uint32_t length;
  while (number(&length)) {
    char name[64] = {0};
    Array in[MOST] = {{0, NULL}}, out[MOST] = {{0, NULL}};
    const Function *function = NULL;
    uint32_t i, k;
    if (length >= sizeof(name) || fread(name, 1, length, stdin) != length) fail("no name", "stdin");
    for (i = 0; i < sizeof(functions) / sizeof(functions[0]); i++) {
      if (strcmp(functions[i].name, name) == 0) function = &functions[i];
    }
    if (function == NULL) fail("no such function", name);
    if (another() != (uint32_t)function->inputs) fail("another number of arrays", name);
    for (k = 0; k < (uint32_t)function->inputs; k++) {
      in[k] = array(another());
      for (i = 0; i < in[k].length; i++) {
        const uint32_t bits = another();
        memcpy(in[k].at + i, &bits, 4);
      }
      if (in[k].length != in[0].length && in[k].length != 1) fail("arrays of several lengths", name);
    }
    apply(function, in, out);
    put((uint32_t)function->outputs);
    for (k = 0; k < (uint32_t)function->outputs; k++) {
      put(out[k].length);
      for (i = 0; i < out[k].length; i++) {
        uint32_t bits;
        memcpy(&bits, out[k].at + i, 4);
        put(bits);
      }
      free(out[k].at);
    }
    for (k = 0; k < (uint32_t)function->inputs; k++) free(in[k].at);
  }
  return 0;
}
