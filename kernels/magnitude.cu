// What DoRA adds to LoRA (src/kernels/magnitude.rs): the length of a weight's rows, and columns scaled to
// another.
//
//     row_norms       n[o] = |W[o, :] + (up A)[o, :]|, 1 for a row of zeros    W [rows, I], A [r, I]
//                     up = s B [rows, r]
//     scale_columns   y[t, o] = z[t, o] (m[o] / n[o])                          dz: the same of dy
//     magnitude       dm[o] = (sum_t dy[t, o] z[t, o]) / n[o]
//
// row_norms: a block has 8 rows, whose `up` lies in shared memory; each thread walks the columns, so that a
// value of A that it reads serves 8 rows, and W + up A exists in registers alone. W may be a panel of rows.
// The sums of dy z go to partial [parts, width] (columns.cuh), then `magnitude_fold` adds the parts.
//
// Bytes moved: row_norms those of W, and A from the cache for every 8 rows; scale_columns of an f16 element
// 4, products 4.
//
//     row_norms            256 threads; blocks rows / 8; shared 8 * r * 4 bytes
//     scale_columns        as add_bias of elementwise.cu
//     magnitude_products   (32, 8); blocks (width / (32 * elements of 16 bytes), parts)
//     magnitude_fold       (32, 8); blocks width / 32
#include "columns.cuh"

constexpr int NORM_ROWS = 8, NORM_THREADS = 256;

template <typename T>
__device__ __forceinline__ void row_norms(const T* w, const float* a, const float* up, float* norms,
                                          int64_t rows, int width, int rank) {
  extern __shared__ float ups[];  // [rank, NORM_ROWS]
  __shared__ float scratch[WARP];
  const int64_t first = int64_t(blockIdx.x) * NORM_ROWS;
  for (int i = threadIdx.x; i < rank * NORM_ROWS; i += NORM_THREADS) {
    const int64_t row = first + i % NORM_ROWS;
    ups[i] = row < rows ? up[row * rank + i / NORM_ROWS] : 0.0f;
  }
  __syncthreads();
  float squares[NORM_ROWS];
#pragma unroll
  for (int r = 0; r < NORM_ROWS; r++) squares[r] = 0.0f;
  for (int column = threadIdx.x; column < width; column += NORM_THREADS) {
    float v[NORM_ROWS];
#pragma unroll
    for (int r = 0; r < NORM_ROWS; r++) v[r] = 0.0f;
#pragma unroll 4
    for (int k = 0; k < rank; k++) {
      const float x = a[int64_t(k) * width + column];
#pragma unroll
      for (int r = 0; r < NORM_ROWS; r++) v[r] = fmaf(ups[k * NORM_ROWS + r], x, v[r]);
    }
#pragma unroll
    for (int r = 0; r < NORM_ROWS; r++) {
      if (first + r < rows) v[r] = to_float(w[(first + r) * width + column]) + v[r];
      squares[r] = fmaf(v[r], v[r], squares[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < NORM_ROWS; r++) {
    const float sum = block_sum(squares[r], scratch);
    if (threadIdx.x == 0 && first + r < rows) norms[first + r] = sum == 0.0f ? 1.0f : sqrtf(sum);
  }
}

template <typename T>
__device__ __forceinline__ void scale_columns(const T* z, const float* m, const float* n, T* y, int64_t rows,
                                              int width) {
  constexpr int N = WIDE<T>;
  const bool wide = wide_rows(z, width) && aligned(y, 16);
  const int64_t stride = int64_t(gridDim.x) * blockDim.y;
  for (int64_t row = row_of_block(); row < rows; row += stride) {
    walk<0, N>(width, [&](int, int at) {
      float v[N];
      floats_of(load_part<N>(z + row * width, at, width, wide, 0.0f), v);
#pragma unroll
      for (int i = 0; i < N; i++) {
        if (at + i < width) v[i] *= m[at + i] / n[at + i];
      }
      store_part<N>(y + row * width, at, width, wide, v);
    });
  }
}

template <typename T>
__device__ __forceinline__ void products(const T* z, const T* g, float* partial, int64_t rows, int width,
                                         int64_t each) {
  constexpr int N = WIDE<T>;
  const bool wide = wide_rows(z, width) && aligned(g, 16);
  sum_columns<N>(partial, rows, width, each, [&](int64_t row, int at, float (&sum)[N]) {
    float v[N], gs[N];
    floats_of(load_part<N>(z + row * width, at, width, wide, 0.0f), v);
    floats_of(load_part<N>(g + row * width, at, width, wide, 0.0f), gs);
#pragma unroll
    for (int i = 0; i < N; i++) sum[i] = fmaf(v[i], gs[i], sum[i]);
  });
}

extern "C" __global__ void __launch_bounds__(256)
    magnitude_fold(const float* partial, const float* n, float* dm, int64_t parts, int64_t width) {
  fold_parts(partial, parts, width, [&](int64_t column, float sum) { dm[column] = sum / n[column]; });
}

#define MAGNITUDE(suffix, T)                                                                              \
  extern "C" __global__ void __launch_bounds__(NORM_THREADS) row_norms_##suffix(                          \
      const T* w, const float* a, const float* up, float* norms, int64_t rows, int width, int rank) {     \
    row_norms(w, a, up, norms, rows, width, rank);                                                        \
  }                                                                                                       \
  extern "C" __global__ void __launch_bounds__(256)                                                       \
      scale_columns_##suffix(const T* z, const float* m, const float* n, T* y, int64_t rows, int width) { \
    scale_columns(z, m, n, y, rows, width);                                                               \
  }                                                                                                       \
  extern "C" __global__ void __launch_bounds__(256) magnitude_products_##suffix(                          \
      const T* z, const T* g, float* partial, int64_t rows, int width, int64_t each) {                    \
    products(z, g, partial, rows, width, each);                                                           \
  }

FOR_EACH_TYPE(MAGNITUDE)
