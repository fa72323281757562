// Cross-entropy against class ids or probabilities (src/kernels/cross_entropy.rs), for logits that are there
// as a whole or that a classifier makes chunk by chunk of the vocabulary.
//
//     L = mean_b sum_k -p_bk log softmax(z_b)_k    z [B, K], p [B, K] or the one-hot of u32 ids [B]
//     dz = (softmax(z) sum_k p_k - p) dL / B
//
// Every kernel works on the columns [first, first + n) of z, lying in a matrix whose rows are `ld` apart.
// With n = K it is called once. A classifier z = h W^T never holds more than a chunk [B, n]:
//
//     for each chunk: z = h W_c^T (cuBLAS), cross_entropy_stats     running top and sum, the own logit
//     cross_entropy_mean                                            the loss, with no gradient wanted the end
//     for each chunk: z = h W_c^T again, cross_entropy_grad onto z, then dh += dz W_c, dW_c = dz^T h
//
// Against probabilities the loss is taken in the second walk, soft_cross_entropy_rows before the gradient;
// those of a teacher are made of its own chunk and statistics by softmax_of_stats.
//
// A row belongs to a warp or to a block (row.cuh); none is held, so rows have no bound. Statistics, losses
// and dL are f32. A label of K or more leaves NaN, and the number of the first such row in `bad`.
//
// Bytes moved of an f16 logit: statistics 2, gradient 4; soft loss 4, soft gradient 6.
//
//     threads     (32, 4) up to 1024 columns, else (256, 1), above 2^14 columns (512, 1)
#include "arith/rows.h"
#include "row.cuh"

// Columns of a matrix whose rows lie apart.
template <typename T>
__device__ __forceinline__ bool wide_columns(const T* x, int64_t ld) {
  return ld % WIDE<T> == 0 && aligned(x, 16);
}

// top and sum over this chunk, and all before it unless `fresh`; own: the logit of the row's label.
template <typename T>
__device__ __forceinline__ void stats(const T* z, int64_t ld, int64_t rows, int n, int fresh, float* top,
                                      float* sum, const uint32_t* labels, int64_t first, int64_t classes,
                                      float* own, unsigned long long* bad) {
  constexpr int N = WIDE<T>;
  __shared__ float scratch[WARP];
  const int64_t which = row_of_block();
  if (which >= rows) return;
  const bool wide = wide_columns(z, ld);
  const T* row = z + which * ld;
  Softmax s = softmax_none();
  walk<0, N>(n, [&](int, int at) {
    float x[N];
    floats_of(load_part<N>(row, at, n, wide, -INFINITY), x);
    float high = s.top;
#pragma unroll
    for (int i = 0; i < N; i++) high = fmaxf(high, x[i]);
    s.sum *= softmax_shrink(s.top, high);
    s.top = high;
    const float base = softmax_base(high);
#pragma unroll
    for (int i = 0; i < N; i++) {
      if (at + i < n) s.sum += softmax_exp(x[i], base);
    }
  });
  const float high = block_max(s.top, scratch);
  const Softmax chunk = softmax_of(high, block_sum(s.sum * softmax_shrink(s.top, high), scratch));
  if (threadIdx.x != 0) return;
  s = fresh ? chunk : softmax_join(softmax_of(top[which], sum[which]), chunk);
  top[which] = s.top;
  sum[which] = s.sum;
  if (!labels) return;
  const int64_t label = labels[which], column = label - first;
  if (column >= 0 && column < n) {
    own[which] = to_float(row[column]);
  } else if (fresh) {
    // Stays where no chunk has the label.
    own[which] = NAN;
    if (label >= classes) atomicMin(bad, static_cast<unsigned long long>(which));
  }
}

// The mean of a row's loss over rows, in f64; one block.
template <typename F>
__device__ __forceinline__ void mean_of(int64_t rows, float* out, F loss) {
  __shared__ double scratch[WARP];
  double sum = 0.0;
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) sum += double(loss(row));
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) *out = float(sum / double(rows));
}

// dz may be z.
template <typename T>
__device__ __forceinline__ void grad(const T* z, int64_t ld, int64_t rows, int n, const float* top,
                                     const float* sum, const uint32_t* labels, int64_t first,
                                     const float* loss_grad, T* dz, int64_t dz_ld) {
  constexpr int N = WIDE<T>;
  const int64_t which = row_of_block();
  if (which >= rows) return;
  const bool wide = wide_columns(z, ld) && wide_columns(dz, dz_ld);
  const float high = top[which], factor = *loss_grad / float(rows);
  const float share = factor / softmax_sum(softmax_of(high, sum[which]));
  const int64_t column = int64_t(labels[which]) - first;
  walk<0, N>(n, [&](int, int at) {
    float x[N];
    floats_of(load_part<N>(z + which * ld, at, n, wide, 0.0f), x);
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = cross_entropy_grad(x[i], high, share, at + i == column, factor);
    store_part<N>(dz + which * dz_ld, at, n, wide, x);
  });
}

// loss: this chunk's part of each row's loss, onto what is there unless `fresh`; mass: of the sum of p.
template <typename T>
__device__ __forceinline__ void soft_rows(const T* z, int64_t ld, const T* p, int64_t p_ld, int64_t rows,
                                          int n, const float* top, const float* sum, int fresh, float* loss,
                                          float* mass) {
  constexpr int N = WIDE<T>;
  __shared__ float scratch[WARP];
  const int64_t which = row_of_block();
  if (which >= rows) return;
  const bool wide = wide_columns(z, ld) && wide_columns(p, p_ld);
  const float high = top[which], log = logf(softmax_sum(softmax_of(high, sum[which])));
  float total = 0.0f, weight = 0.0f;
  walk<0, N>(n, [&](int, int at) {
    float x[N], q[N];
    floats_of(load_part<N>(z + which * ld, at, n, wide, 0.0f), x);
    floats_of(load_part<N>(p + which * p_ld, at, n, wide, 0.0f), q);
#pragma unroll
    for (int i = 0; i < N; i++) {
      total += soft_cross_entropy(x[i], q[i], high, log);
      weight += q[i];
    }
  });
  total = block_sum(total, scratch);
  weight = block_sum(weight, scratch);
  if (threadIdx.x != 0) return;
  loss[which] = fresh ? total : loss[which] + total;
  mass[which] = fresh ? weight : mass[which] + weight;
}

// dz may be z.
template <typename T>
__device__ __forceinline__ void soft_grad(const T* z, int64_t ld, const T* p, int64_t p_ld, int64_t rows,
                                          int n, const float* top, const float* sum, const float* mass,
                                          const float* loss_grad, T* dz, int64_t dz_ld) {
  constexpr int N = WIDE<T>;
  const int64_t which = row_of_block();
  if (which >= rows) return;
  const bool wide = wide_columns(z, ld) && wide_columns(p, p_ld) && wide_columns(dz, dz_ld);
  const float high = top[which], factor = *loss_grad / float(rows);
  const float share = mass[which] / softmax_sum(softmax_of(high, sum[which]));
  walk<0, N>(n, [&](int, int at) {
    float x[N], q[N];
    floats_of(load_part<N>(z + which * ld, at, n, wide, 0.0f), x);
    floats_of(load_part<N>(p + which * p_ld, at, n, wide, 0.0f), q);
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = soft_cross_entropy_grad(x[i], q[i], high, share, factor);
    store_part<N>(dz + which * dz_ld, at, n, wide, x);
  });
}

// p may be z.
template <typename T>
__device__ __forceinline__ void of_stats(const T* z, int64_t ld, int64_t rows, int n, const float* top,
                                         const float* sum, T* p, int64_t p_ld) {
  constexpr int N = WIDE<T>;
  const int64_t which = row_of_block();
  if (which >= rows) return;
  const bool wide = wide_columns(z, ld) && wide_columns(p, p_ld);
  const float high = top[which], r = 1.0f / softmax_sum(softmax_of(high, sum[which]));
  walk<0, N>(n, [&](int, int at) {
    float x[N];
    floats_of(load_part<N>(z + which * ld, at, n, wide, 0.0f), x);
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = softmax_exp(x[i], high) * r;
    store_part<N>(p + which * p_ld, at, n, wide, x);
  });
}

extern "C" __global__ void __launch_bounds__(1024)
    cross_entropy_mean(const float* top, const float* sum, const float* own, int64_t rows, float* out) {
  mean_of(rows, out, [&](int64_t row) {
    return cross_entropy(own[row], top[row], softmax_sum(softmax_of(top[row], sum[row])));
  });
}

extern "C" __global__ void __launch_bounds__(1024)
    soft_cross_entropy_mean(const float* loss, int64_t rows, float* out) {
  mean_of(rows, out, [&](int64_t row) { return loss[row]; });
}

#define CROSS_ENTROPY(suffix, T)                                                                             \
  extern "C" __global__ void __launch_bounds__(1024) cross_entropy_stats_##suffix(                           \
      const T* z, int64_t ld, int64_t rows, int n, int fresh, float* top, float* sum,                        \
      const uint32_t* labels, int64_t first, int64_t classes, float* own, unsigned long long* bad) {         \
    stats(z, ld, rows, n, fresh, top, sum, labels, first, classes, own, bad);                                \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(1024) cross_entropy_grad_##suffix(                            \
      const T* z, int64_t ld, int64_t rows, int n, const float* top, const float* sum,                       \
      const uint32_t* labels, int64_t first, const float* loss_grad, T* dz, int64_t dz_ld) {                 \
    grad(z, ld, rows, n, top, sum, labels, first, loss_grad, dz, dz_ld);                                     \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(1024) soft_cross_entropy_rows_##suffix(                       \
      const T* z, int64_t ld, const T* p, int64_t p_ld, int64_t rows, int n, const float* top,               \
      const float* sum, int fresh, float* loss, float* mass) {                                               \
    soft_rows(z, ld, p, p_ld, rows, n, top, sum, fresh, loss, mass);                                         \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(1024) soft_cross_entropy_grad_##suffix(                       \
      const T* z, int64_t ld, const T* p, int64_t p_ld, int64_t rows, int n, const float* top,               \
      const float* sum, const float* mass, const float* loss_grad, T* dz, int64_t dz_ld) {                   \
    soft_grad(z, ld, p, p_ld, rows, n, top, sum, mass, loss_grad, dz, dz_ld);                                \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(1024) softmax_of_stats_##suffix(                              \
      const T* z, int64_t ld, int64_t rows, int n, const float* top, const float* sum, T* p, int64_t p_ld) { \
    of_stats(z, ld, rows, n, top, sum, p, p_ld);                                                             \
  }

FOR_EACH_TYPE(CROSS_ENTROPY)
