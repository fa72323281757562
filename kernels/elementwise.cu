// Biases, factors, dropout, and sums of columns (src/kernels/linear.rs, scale.rs, dropout.rs).
//
//     add_bias        y[i, j] = x[i, j] + b[j]          x [rows, width], b [width]
//     scale_leading   y[i, j] = x[i, j] f[i]            f [rows]
//     scale_by        y[i] = x[i] f[0]                  x and f f32
//     dropout         y[i] = x[i] (0 if dropped, else 1 / (1 - p))
//     column_sums     partial[part, j] = sum of x[i, j] over the rows [part * each, + each)
//     fold_columns    y[j] = sum_part partial[part, j], in f64
//
// The gradient of a bias is column_sums and fold_columns (columns.cuh); `each` depends on the shape alone, so
// that the sum does not depend on the card. dropout draws the bits of src/random.rs, four elements from one
// block of Philox, so the backward pass and the CPU see the same mask; `hash` is FNV-1a of name and pass,
// `below` = ceil(p * 2^24).
//
// A thread takes 16 bytes at a time where rows and operands allow it. Results may be operands.
//
// Bytes moved of an f16 element: add_bias, scale_leading and dropout 4, column_sums 2; scale_by 6, or none
// where it would write what is there.
//
//     add_bias, scale_leading   threads x: the least power of two >= width / 8, 32 to 256; y = 256 / x;
//                               blocks x: rows / y or fewer
//     dropout                   256 threads; blocks: any number, of 256 * 16 bytes each to cover the tensor
//     scale_by                  the same, of 256 * 16 bytes of x
//     column_sums               (32, 8); blocks (width / (32 * elements of 16 bytes), parts)
//     fold_columns              (32, 8); blocks columns / 32
#include "arith/random.h"
#include "columns.cuh"

// f(row, first column, elements) for runs of a row.
template <typename T, typename F>
__device__ __forceinline__ void each_part(const T* x, T* y, int64_t rows, int width, bool wide, F f) {
  constexpr int N = WIDE<T>;
  const int64_t stride = int64_t(gridDim.x) * blockDim.y;
  for (int64_t row = row_of_block(); row < rows; row += stride) {
    walk<0, N>(width, [&](int, int at) {
      float v[N];
      floats_of(load_part<N>(x + row * width, at, width, wide, 0.0f), v);
      f(row, at, v);
      store_part<N>(y + row * width, at, width, wide, v);
    });
  }
}

template <typename T>
__device__ __forceinline__ void add_bias(const T* x, const T* b, T* y, int64_t rows, int width) {
  constexpr int N = WIDE<T>;
  const bool wide = wide_rows(x, width) && aligned(y, 16) && aligned(b, 16);
  each_part(x, y, rows, width, wide, [&](int64_t, int at, float (&v)[N]) {
    float bs[N];
    floats_of(load_part<N>(b, at, width, wide, 0.0f), bs);
#pragma unroll
    for (int i = 0; i < N; i++) v[i] += bs[i];
  });
}

template <typename T>
__device__ __forceinline__ void scale_leading(const T* x, const T* f, T* y, int64_t rows, int width) {
  constexpr int N = WIDE<T>;
  const bool wide = wide_rows(x, width) && aligned(y, 16);
  each_part(x, y, rows, width, wide, [&](int64_t row, int, float (&v)[N]) {
    const float factor = to_float(f[row]);
#pragma unroll
    for (int i = 0; i < N; i++) v[i] *= factor;
  });
}

template <typename T>
__device__ __forceinline__ void scale_by(const float* x, const float* f, T* y, int64_t count) {
  constexpr int N = WIDE<float>;
  const float factor = *f;
  if (factor == 1.0f && static_cast<const void*>(x) == static_cast<const void*>(y)) return;
  const bool wide = aligned(x, 16) && aligned(y, 16);
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t part = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; part * N < count; part += threads) {
    const int64_t at = part * N;
    const int left = count - at < N ? int(count - at) : N;
    float v[N];
    floats_of(load_part<N>(x + at, 0, left, wide, 0.0f), v);
#pragma unroll
    for (int i = 0; i < N; i++) v[i] *= factor;
    store_part<N>(y + at, 0, left, wide, v);
  }
}

template <typename T>
__device__ __forceinline__ void dropout(const T* x, T* y, int64_t count, uint64_t seed, uint64_t hash,
                                        uint32_t below, float kept) {
  constexpr int N = WIDE<T>;
  const bool wide = aligned(x, 16) && aligned(y, 16);
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t part = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; part * N < count; part += threads) {
    const int64_t at = part * N;
    // The end is reached within a part, whose width is what is left.
    const int left = count - at < N ? int(count - at) : N;
    float v[N];
    floats_of(load_part<N>(x + at, 0, left, wide, 0.0f), v);
    const uint64_t stream = dropout_stream(uint64_t(at), hash);
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const Philox draws = dropout_draws(uint64_t(at + i), stream, seed);
#pragma unroll
      for (int j = 0; j < 4; j++) v[i + j] *= dropped(draws.word[j], below) ? 0.0f : kept;
    }
    store_part<N>(y + at, 0, left, wide, v);
  }
}

template <typename T>
__device__ __forceinline__ void column_sums(const T* x, float* partial, int64_t rows, int width,
                                            int64_t each) {
  constexpr int N = WIDE<T>;
  const bool wide = wide_rows(x, width);
  sum_columns<N>(partial, rows, width, each, [&](int64_t row, int at, float (&sum)[N]) {
    float v[N];
    floats_of(load_part<N>(x + row * width, at, width, wide, 0.0f), v);
#pragma unroll
    for (int i = 0; i < N; i++) sum[i] += v[i];
  });
}

#define ELEMENTWISE(suffix, T)                                                                               \
  extern "C" __global__ void __launch_bounds__(256)                                                          \
      add_bias_##suffix(const T* x, const T* b, T* y, int64_t rows, int width) {                             \
    add_bias(x, b, y, rows, width);                                                                          \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(256)                                                          \
      scale_leading_##suffix(const T* x, const T* f, T* y, int64_t rows, int width) {                        \
    scale_leading(x, f, y, rows, width);                                                                     \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(256)                                                          \
      scale_by_##suffix(const float* x, const float* f, T* y, int64_t count) {                               \
    scale_by(x, f, y, count);                                                                                \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(256) dropout_##suffix(                                        \
      const T* x, T* y, int64_t count, uint64_t seed, uint64_t hash, uint32_t below, float kept) {           \
    dropout(x, y, count, seed, hash, below, kept);                                                           \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(256)                                                          \
      column_sums_##suffix(const T* x, float* partial, int64_t rows, int width, int64_t each) {              \
    column_sums(x, partial, rows, width, each);                                                              \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(256)                                                          \
      fold_columns_##suffix(const float* partial, T* y, int64_t parts, int64_t columns) {                    \
    fold_parts(partial, parts, columns, [&](int64_t column, float sum) { y[column] = from_float<T>(sum); }); \
  }

FOR_EACH_TYPE(ELEMENTWISE)
