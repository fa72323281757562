/* Checks arith/rows.h, random.h, relu.h and attention.h on the host, against f64 and known answers:
 *
 *     cc -std=c99 -O1 -ffp-contract=off -Ikernels kernels/arith/check_rows.c -lm -o check_rows
 *     ./check_rows */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "arith/attention.h"
#include "arith/random.h"
#include "arith/relu.h"
#include "arith/rows.h"

#define CHECK(what, ...)     \
  do {                       \
    if (!(what)) {           \
      printf("%s: ", #what); \
      printf(__VA_ARGS__);   \
      printf("\n");          \
      exit(1);               \
    }                        \
  } while (0)

static double uniform(void) {
  static uint64_t state = 9;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (double)(state >> 11) / 9007199254740992.0;
}

/* In [-scale, scale). */
static float around(double scale) { return (float)((2.0 * uniform() - 1.0) * scale); }

static int near(double got, double want, double tolerance) {
  return fabs(got - want) <= tolerance * (1.0 + fabs(want));
}

/* ---- Philox and dropout ---- */

/* The known answers published with Random123 1.09 (kat_vectors). */
static void known_answers(void) {
  const Philox zero = philox(0, 0, 0), ones = philox(~0ull, ~0ull, ~0ull);
  const Philox digits = philox(0x85a308d3243f6a88ull, 0x0370734413198a2eull, 0x299f31d0a4093822ull);
  const uint32_t want[3][4] = {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u},
                               {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu},
                               {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}};
  for (int i = 0; i < 4; i++) {
    CHECK(zero.word[i] == want[0][i], "word %d", i);
    CHECK(ones.word[i] == want[1][i], "word %d", i);
    CHECK(digits.word[i] == want[2][i], "word %d", i);
  }
}

static uint64_t hash_of(const char* name, uint64_t pass) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (; *name; name++) hash = (hash ^ (uint8_t)*name) * 0x100000001b3ull;
  return stream_index(hash, pass);
}

/* What Random::new(seed, "layer.0.q", &[77, chunk]) of src/random.rs draws first, and in a chunk's end. */
static void draws_of_the_library(void) {
  const uint64_t seed = 0x123456789abcdefull, hash = hash_of("layer.0.q", 77);
  static const struct {
    uint64_t element;
    uint32_t draw;
  } KNOWN[] = {
      {0u, 0x58f9fd91u},     {1u, 0x432686b4u},     {7u, 0x6d9386b9u},     {16383u, 0x83bab40cu},
      {16384u, 0x2823f891u}, {16389u, 0xec35d821u}, {49150u, 0x973e40a3u}, {11468803u, 0x37efdfa9u},
  };
  for (size_t i = 0; i < sizeof KNOWN / sizeof *KNOWN; i++) {
    const uint64_t at = KNOWN[i].element;
    const uint32_t got = dropout_draws(at - at % 4, dropout_stream(at, hash), seed).word[at % 4];
    CHECK(got == KNOWN[i].draw, "element %llu: %08x, want %08x", (unsigned long long)at, got, KNOWN[i].draw);
  }
}

/* The comparison of integers is that of the library: f64::from(uniform) < p. */
static void drops_as_the_library_does(void) {
  for (int i = 0; i < 100000; i++) {
    double p = uniform();
    uint32_t draw = (uint32_t)(uniform() * 4294967296.0);
    /* Near the border, and on it. */
    if (i % 2) draw = (uint32_t)(p * 16777216.0) * 256u + (uint32_t)(i % 256);
    if (i % 4 == 3) p = (double)(draw >> 8) / 16777216.0;
    const uint32_t below = (uint32_t)ceil(p * 16777216.0);
    const double u = (double)((float)(draw >> 8) / 16777216.0f);
    CHECK(dropped(draw, below) == (u < p), "draw %08x, p %.17g", draw, p);
  }
}

/* ---- softmax ---- */

/* In chunks of random lengths, joined in any order, as over all at once. */
static void softmax_joins(void) {
  for (int turn = 0; turn < 2000; turn++) {
    float x[64];
    const int count = 1 + turn % 64;
    double top = -INFINITY, sum = 0.0;
    for (int i = 0; i < count; i++) {
      x[i] = uniform() < 0.2 ? -INFINITY : around(turn % 3 ? 5.0 : 200.0);
      top = x[i] > top ? x[i] : top;
    }
    for (int i = 0; i < count; i++) sum += exp(x[i] - top);
    Softmax all = softmax_none();
    for (int i = 0; i < count;) {
      const int end = i + 1 + (int)(uniform() * (count - i));
      Softmax part = softmax_none();
      for (; i < end; i++) part = softmax_join(part, softmax_of(x[i], x[i] == -INFINITY ? 0.0f : 1.0f));
      all = uniform() < 0.5 ? softmax_join(all, part) : softmax_join(part, all);
    }
    if (top == -INFINITY) {
      CHECK(isnan(softmax_sum(all)), "all are -inf");
      continue;
    }
    CHECK(all.top == (float)top, "top %g, want %g", all.top, top);
    CHECK(near(softmax_sum(all), sum, 1e-6), "sum %g, want %g", softmax_sum(all), sum);
    for (int i = 0; i < count; i++) {
      const double y = softmax_exp(x[i], all.top) / softmax_sum(all);
      CHECK(near(y, exp(x[i] - top) / sum, 1e-6), "%g of %g", y, x[i]);
    }
  }
}

/* NaN and infinities show, whichever side they come from. */
static void softmax_shows_what_is_not_finite(void) {
  const Softmax one = softmax_of(1.0f, 1.0f);
  const Softmax nan = softmax_of(-INFINITY, NAN), infinite = softmax_of(INFINITY, 1.0f);
  CHECK(isnan(softmax_sum(softmax_join(one, nan))) && isnan(softmax_sum(softmax_join(nan, one))), "NaN");
  CHECK(isnan(softmax_sum(softmax_join(one, infinite))), "inf behind");
  CHECK(isnan(softmax_sum(softmax_join(infinite, one))), "inf in front");
  CHECK(isnan(softmax_sum(softmax_none())), "nothing");
  const Softmax same = softmax_join(softmax_none(), one);
  CHECK(same.top == 1.0f && same.sum == 1.0f, "nothing joined: (%g, %g)", same.top, same.sum);
}

/* ---- losses ---- */

static void losses(void) {
  for (int turn = 0; turn < 500; turn++) {
    enum { K = 9 };
    float z[K], p[K], mass = 0.0f;
    double top = -INFINITY, sum = 0.0, weight = 0.0;
    const int label = turn % K;
    for (int k = 0; k < K; k++) {
      z[k] = around(6.0);
      p[k] = uniform() < 0.3 ? 0.0f : (float)uniform();
      top = z[k] > top ? z[k] : top;
      mass += p[k];
      weight += p[k];
    }
    for (int k = 0; k < K; k++) sum += exp(z[k] - top);
    const float t = (float)top, s = (float)sum;
    CHECK(near(cross_entropy(z[label], t, s), log(sum) + top - z[label], 1e-6), "label %d", label);
    for (int k = 0; k < K; k++) {
      const double q = exp(z[k] - top) / sum;
      CHECK(near(cross_entropy_grad(z[k], t, 0.5f / s, k == label, 0.5f), 0.5 * (q - (k == label)), 1e-6),
            "%d", k);
      CHECK(near(soft_cross_entropy(z[k], p[k], t, logf(s)), p[k] * (log(sum) + top - z[k]), 2e-6), "%d", k);
      CHECK(near(soft_cross_entropy_grad(z[k], p[k], t, mass / s, 0.5f), 0.5 * (q * weight - p[k]), 2e-6),
            "%d", k);
    }
  }
  CHECK(soft_cross_entropy(-INFINITY, 0.0f, 0.0f, 1.0f) == 0.0f, "no probability, no loss");
  CHECK(isnan(soft_cross_entropy(NAN, 0.5f, 0.0f, 1.0f)), "NaN");
}

/* ---- norms ---- */

/* The gradient of y = sum g_c norm(x)_c w_c by central differences in f64. */
static void norms_differentiate(void) {
  enum { C = 7 };
  for (int turn = 0; turn < 400; turn++) {
    const int layer = turn % 2;
    float x[C], w[C], b[C], g[C];
    const float eps = 1e-3f;
    for (int c = 0; c < C; c++) {
      x[c] = around(2.0);
      w[c] = around(2.0);
      b[c] = around(1.0);
      g[c] = around(1.0);
    }
    double want[C];
    for (int c = 0; c < C; c++) {
      double loss[2];
      for (int side = 0; side < 2; side++) {
        double v[C], mean = 0.0, squares = 0.0;
        for (int i = 0; i < C; i++) v[i] = x[i] + (i == c ? (side ? 1e-5 : -1e-5) : 0.0);
        for (int i = 0; i < C; i++) mean += layer ? v[i] / C : 0.0;
        for (int i = 0; i < C; i++) squares += (v[i] - mean) * (v[i] - mean);
        const double r = 1.0 / sqrt(squares / C + eps);
        loss[side] = 0.0;
        for (int i = 0; i < C; i++) loss[side] += g[i] * ((v[i] - mean) * r * w[i] + b[i]);
      }
      want[c] = (loss[1] - loss[0]) / 2e-5;
    }
    float mean = 0.0f, squares = 0.0f, mean_u = 0.0f, mean_ux = 0.0f;
    for (int c = 0; c < C; c++) mean += layer ? x[c] : 0.0f;
    mean /= (float)C;
    for (int c = 0; c < C; c++) squares = fmaf(x[c] - mean, x[c] - mean, squares);
    const float r = norm_scale(squares, (float)C, eps);
    for (int c = 0; c < C; c++) {
      const float u = g[c] * w[c];
      mean_u += u / (float)C;
      mean_ux += u * (x[c] - mean) * (layer ? r : r * r) / (float)C;
      const double y = layer ? layer_norm(x[c] - mean, r, w[c], b[c]) : rms_norm(x[c], r, w[c]);
      CHECK(near(y, (x[c] - mean) * r * w[c] + (layer ? b[c] : 0.0), 1e-6), "%d", c);
    }
    for (int c = 0; c < C; c++) {
      const float u = g[c] * w[c];
      const float got = layer ? layer_norm_grad(u, (x[c] - mean) * r, mean_u, mean_ux, r)
                              : rms_norm_grad(u, x[c], mean_ux, r);
      CHECK(near(got, want[c], 2e-5), "%s, %d: %g, want %g", layer ? "layer" : "rms", c, got, want[c]);
    }
  }
}

/* ---- the rest ---- */

static void rotations_turn_back(void) {
  for (int turn = 0; turn < 1000; turn++) {
    const float low = around(3.0), high = around(3.0), angle = around(3.2);
    const float c = cosf(angle), s = sinf(angle);
    const float first = rope_first(low, high, c, s), second = rope_second(low, high, c, s);
    CHECK(near(first, low * cos(angle) - high * sin(angle), 1e-6), "%g", angle);
    CHECK(near(rope_first(first, second, c, -s), low, 2e-6), "%g", angle);
    CHECK(near(rope_second(first, second, c, -s), high, 2e-6), "%g", angle);
  }
}

static void relu_keeps_nan(void) {
  CHECK(relu(-1.0f) == 0.0f && relu(2.0f) == 2.0f && isnan(relu(NAN)), "relu");
  CHECK(relu_grad(0.0f, 3.0f) == 0.0f && relu_grad(1.0f, 3.0f) == 3.0f && relu_grad(NAN, 3.0f) == 0.0f,
        "grad");
}

/* Query t sees key k exactly if it is not before the first query that sees k. */
static void who_sees_whom(void) {
  for (int queries = 1; queries < 7; queries++) {
    for (int keys = queries; keys < 10; keys++) {
      for (int k = 0; k < keys; k++) {
        for (int t = 0; t < queries; t++) {
          CHECK((k <= last_key(t, queries, keys, 1)) == (k <= t + keys - queries), "%d %d %d %d", queries,
                keys, t, k);
          CHECK((k <= last_key(t, queries, keys, 1)) == (t >= first_query(k, queries, keys, 1)), "%d %d", t,
                k);
          CHECK(last_key(t, queries, keys, 0) == keys - 1 && first_query(k, queries, keys, 0) == 0, "%d", t);
        }
      }
      CHECK(last_key(queries + 5, queries, keys, 1) == keys - 1, "behind the last");
    }
  }
}

/* P made again from the logarithm of the sum is P. */
static void probabilities_again(void) {
  for (int turn = 0; turn < 1000; turn++) {
    float z[5];
    Softmax s = softmax_none();
    for (int i = 0; i < 5; i++) {
      z[i] = around(30.0);
      s = softmax_join(s, softmax_of(z[i], 1.0f));
    }
    const float lse = log_sum_exp(s.top, s.sum);
    for (int i = 0; i < 5; i++) {
      /* The logarithm is rounded to 4e-6 of the exponent at 64. */
      CHECK(near(exp_nonpos(z[i] - lse), softmax_exp(z[i], s.top) / s.sum, 5e-6), "%g", z[i]);
    }
  }
  CHECK(logit_grad(0.5f, 3.0f, 1.0f) == 1.0f, "gradient");
}

int main(void) {
  known_answers();
  draws_of_the_library();
  drops_as_the_library_does();
  softmax_joins();
  softmax_shows_what_is_not_finite();
  losses();
  norms_differentiate();
  rotations_turn_back();
  relu_keeps_nan();
  who_sees_whom();
  probabilities_again();
  printf("rows: all well\n");
  return 0;
}
