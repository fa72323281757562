/* The rectifier and its gradient, as src/kernels/relu.rs. A NaN stays one: comparisons, not fmaxf. */
#ifndef QTUNE_ARITH_RELU_H
#define QTUNE_ARITH_RELU_H

#include "functions.h"

QT_FN float relu(float x) { return x < 0.0f ? 0.0f : x; }

QT_FN float relu_grad(float x, float g) { return x > 0.0f ? g : 0.0f; }

#endif
