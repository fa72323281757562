// Codes and values on steps that are given (src/kernels/fake_quant/mod.rs); w, codes and y [rows, width], a
// step for each row:
//
//     grid_codes    k = clamp(rne(w / step - offset), lo, hi)
//     grid_values   y = step (k + offset)
//
// A step below the smallest normal f32 makes codes and values of 0. Codes come as f32 whatever the type of w;
// for values they are of the type of the steps, as y is. A thread takes 16 bytes at a time where rows and
// addresses allow it.
//
// Bytes moved of an element of b bytes: codes b + 4, values 2b.
//
//     threads x   the least power of two >= width / 8, 32 to 256; y = 256 / x; blocks x: rows / y or fewer
#include "arith/quantize.h"
#include "row.cuh"

// f(row, an element) of all elements.
template <typename T, typename Y, typename F>
__device__ __forceinline__ void each(const T* x, Y* y, int64_t rows, int width, F f) {
  constexpr int N = WIDE<T>;
  const bool wide = wide_rows(x, width) && aligned(y, 16);
  const int64_t stride = int64_t(gridDim.x) * blockDim.y;
  for (int64_t row = row_of_block(); row < rows; row += stride) {
    walk<0, N>(width, [&](int, int at) {
      float v[N];
      floats_of(load_part<N>(x + row * width, at, width, wide, 0.0f), v);
#pragma unroll
      for (int i = 0; i < N; i++) v[i] = f(row, v[i]);
      store_part<N>(y + row * width, at, width, wide, v);
    });
  }
}

#define GRID(suffix, T)                                                                                      \
  extern "C" __global__ void __launch_bounds__(256)                                                          \
      grid_codes_##suffix(const T* w, const T* step, float* codes, int64_t rows, int width, float offset,    \
                          float lo, float hi) {                                                              \
    each(w, codes, rows, width,                                                                              \
         [&](int64_t row, float x) { return grid_code(x, to_float(step[row]), offset, lo, hi); });           \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(256)                                                          \
      grid_values_##suffix(const T* codes, const T* step, T* y, int64_t rows, int width, float offset) {     \
    each(codes, y, rows, width,                                                                              \
         [&](int64_t row, float k) { return grid_value(k, to_float(step[row]), offset); });                  \
  }

FOR_EACH_TYPE(GRID)
