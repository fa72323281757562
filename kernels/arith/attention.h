/* Which keys a query sees (src/kernels/attention/causal.rs), and the arithmetic of a tile of logits. */
#ifndef QTUNE_ARITH_ATTENTION_H
#define QTUNE_ARITH_ATTENTION_H

#include "functions.h"

#include <math.h>

/* The last key that query t sees: all see the last one, or, with `causal`, the last query alone does and each
 * before it one less. For a t behind the last query it is the last key. */
QT_FN int last_key(int t, int queries, int keys, int causal) {
  const int last = t + (causal ? keys - queries : keys);
  return last < keys ? last : keys - 1;
}

/* The first query that may see key k. */
QT_FN int first_query(int k, int queries, int keys, int causal) {
  const int t = causal ? k - (keys - queries) : 0;
  return t < 0 ? 0 : t;
}

/* The factors of exponentials taken to base 2. */
#define LOG2_E 1.44269504088896340736f

/* The logarithm of a row's sum of exponentials, top being the largest logit. */
QT_FN float log_sum_exp(float top, float sum) { return top + logf(sum); }

/* The gradient of a logit before it is scaled; delta is the row's sum of dP P. */
QT_FN float logit_grad(float p, float dp, float delta) { return p * (dp - delta); }

#endif
