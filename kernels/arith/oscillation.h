/* How often the code of a quantized weight, and the sign of its gradient, turn (src/train/oscillation.rs; Nagel et
 * al. 2022, section 3). */
#ifndef QTUNE_ARITH_OSCILLATION_H
#define QTUNE_ARITH_OSCILLATION_H

#include <stdint.h>

#ifndef QT_FN
#if defined(__CUDACC__)
#define QT_FN static __host__ __device__ __forceinline__
#else
#define QT_FN static inline
#endif
#endif

/* The history of one code. */
typedef struct {
  int8_t last;
  int8_t direction; /* of its last change: the sign of the code before minus the one after */
  float ema;
  uint32_t total;
} Turns;

/* After a step whose code is `code`; `rest` is 1 - momentum. 1 in `changed` where the code is another. */
QT_FN Turns turns_after(Turns t, int8_t code, float momentum, float rest, int *changed) {
  const int way = (t.last > code) - (t.last < code);
  const int turned = way * t.direction == -1;
  t.ema = momentum * (turned ? 1.0f : 0.0f) + rest * t.ema;
  t.total += (uint32_t)turned;
  *changed = way != 0;
  if (way != 0) {
    t.direction = (int8_t)way;
    t.last = code;
  }
  return t;
}

/* The sign of a gradient after a step whose gradient is `g`: a zero, and a NaN, keeps the one before. 1 in `turned`
 * where it is the opposite. */
QT_FN int8_t sign_after(int8_t sign, float g, int8_t *turned) {
  const int now = (g > 0.0f) - (g < 0.0f);
  *turned = (int8_t)(now * sign == -1);
  return now != 0 ? (int8_t)now : sign;
}

#endif
