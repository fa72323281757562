// Cross-entropy against class ids or probabilities (src/kernels/cross_entropy.rs), for logits that are there
// as a whole or that a classifier makes for a chunk of the rows at a time (src/kernels/classifier.rs).
//
//     L = mean_b sum_k -p_bk log softmax(z_b)_k    z [B, K], p [B, K] or the one-hot of u32 ids [B]
//     dz = (softmax(z) sum_k p_k - p) dL / B
//
// A classifier z = h W^T never holds more than a chunk [R, K] of logits, and asks for its gradients with them:
//
//     for each chunk of R rows: z = h_R W^T (cuBLAS, to f32), cross_entropy_stats; if gradients are wanted
//                               cross_entropy_grad without dL and B, then dh_R = dz W, dW += dz^T h_R
//     cross_entropy_mean        the loss; going backward the gradients are multiplied by dL
//
// z, p and dz lie in matrices whose rows are ld, p_ld and dz_ld apart. A row belongs to a warp or to a block
// (row.cuh); none is held, so rows have no bound. Statistics, losses and dL are f32. A row whose label is K or
// more has a loss of NaN.
//
// Bytes moved of an f16 logit: statistics 2, gradient 4; soft loss 4, soft gradient 6. Of the logits of a
// classifier over halves, which are f32: statistics 4, gradient 6.
//
//     threads     (32, 4) up to 1024 columns, else (256, 1), above 2^14 columns (512, 1)
#include "arith/rows.h"
#include "row.cuh"

// Columns of a matrix whose rows lie apart.
template <typename T>
__device__ __forceinline__ bool wide_columns(const T* x, int64_t ld) {
  return ld % WIDE<T> == 0 && aligned(x, 16);
}

// own: the logit of the row's label, where there are labels.
template <typename T>
__device__ __forceinline__ void stats(const T* z, int64_t ld, int64_t rows, int n, float* top, float* sum,
                                      const uint32_t* labels, float* own) {
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
  const float all = block_sum(s.sum * softmax_shrink(s.top, high), scratch);
  if (threadIdx.x != 0) return;
  top[which] = high;
  sum[which] = all;
  if (labels) own[which] = labels[which] < uint32_t(n) ? to_float(row[labels[which]]) : NAN;
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

// loss_grad: dL, or null for a factor of 1 in place of dL / rows. dz may be z.
template <typename T, typename O>
__device__ __forceinline__ void grad(const T* z, int64_t ld, int64_t rows, int n, const float* top,
                                     const float* sum, const uint32_t* labels, const float* loss_grad, O* dz,
                                     int64_t dz_ld) {
  constexpr int N = WIDE<T>;
  const int64_t which = row_of_block();
  if (which >= rows) return;
  const bool wide = wide_columns(z, ld) && wide_columns(dz, dz_ld);
  const float high = top[which], factor = loss_grad ? *loss_grad / float(rows) : 1.0f;
  const float share = factor / softmax_sum(softmax_of(high, sum[which]));
  const int64_t column = labels[which];
  walk<0, N>(n, [&](int, int at) {
    float x[N];
    floats_of(load_part<N>(z + which * ld, at, n, wide, 0.0f), x);
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = cross_entropy_grad(x[i], high, share, at + i == column, factor);
    store_part<N>(dz + which * dz_ld, at, n, wide, x);
  });
}

// loss: of each row; mass: its sum of p.
template <typename T>
__device__ __forceinline__ void soft_rows(const T* z, int64_t ld, const T* p, int64_t p_ld, int64_t rows,
                                          int n, const float* top, const float* sum, float* loss,
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
  loss[which] = total;
  mass[which] = weight;
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

#define GRAD(suffix, T, O)                                                                                   \
  extern "C" __global__ void __launch_bounds__(1024) cross_entropy_grad_##suffix(                            \
      const T* z, int64_t ld, int64_t rows, int n, const float* top, const float* sum,                       \
      const uint32_t* labels, const float* loss_grad, O* dz, int64_t dz_ld) {                                \
    grad(z, ld, rows, n, top, sum, labels, loss_grad, dz, dz_ld);                                            \
  }

#define CROSS_ENTROPY(suffix, T)                                                                             \
  extern "C" __global__ void __launch_bounds__(1024) cross_entropy_stats_##suffix(                           \
      const T* z, int64_t ld, int64_t rows, int n, float* top, float* sum, const uint32_t* labels,           \
      float* own) {                                                                                          \
    stats(z, ld, rows, n, top, sum, labels, own);                                                            \
  }                                                                                                          \
  GRAD(suffix, T, T)                                                                                         \
  extern "C" __global__ void __launch_bounds__(1024) soft_cross_entropy_rows_##suffix(                       \
      const T* z, int64_t ld, const T* p, int64_t p_ld, int64_t rows, int n, const float* top,               \
      const float* sum, float* loss, float* mass) {                                                          \
    soft_rows(z, ld, p, p_ld, rows, n, top, sum, loss, mass);                                                \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(1024) soft_cross_entropy_grad_##suffix(                       \
      const T* z, int64_t ld, const T* p, int64_t p_ld, int64_t rows, int n, const float* top,               \
      const float* sum, const float* mass, const float* loss_grad, T* dz, int64_t dz_ld) {                   \
    soft_grad(z, ld, p, p_ld, rows, n, top, sum, mass, loss_grad, dz, dz_ld);                                \
  }

FOR_EACH_TYPE(CROSS_ENTROPY)
// Logits in f32, their gradient in half precision.
GRAD(f32_f16, float, __half)
GRAD(f32_bf16, float, __nv_bfloat16)
