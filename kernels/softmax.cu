// Softmax of rows and its gradient (src/kernels/softmax.rs), and the softmax of attention's logits with a
// bias (src/kernels/attention/probs.rs), whose products cuBLAS makes.
//
//     y = exp(x - max x) / sum exp(x - max x)        dx = factor y (dy - sum dy y)
//     P = softmax(scale z + bias)                    z [B, H, N, M], bias [G, H, N or 1, M], entry b: b mod G
//     dbias_g = the sum of dS over the entries of group g, and over the rows where the bias has one
//
// A row belongs to a warp or to a block (row.cuh): read once, its exponentials kept in registers. `_long` has
// no bound on the row: one pass for the largest logit and the sum together, one that writes. A row with a
// NaN, or of -inf alone, gives NaN.
//
// Bytes moved of an f16 element: forward 4 (`_long` 6, of which the cache serves two where a row fits),
// backward 6; the bias's gradient 2.
//
//     threads x   the least multiple of 32 with 4 * 16 bytes * x >= a row; 32 means 4 rows a block (y)
//     held        rows of up to 16384 elements, else `_long` with 1024 threads
#include "arith/rows.h"
#include "row.cuh"

// The softmax of a row of which `logits(slot, at, x)` gives a part; it is written to `to`.
template <typename T, int HELD, typename F>
__device__ __forceinline__ void softmax_row(F logits, T* to, int width, bool wide) {
  constexpr int N = WIDE<T>;
  __shared__ float scratch[WARP];
  if constexpr (HELD > 0) {
    float e[HELD][N];
    float top = -INFINITY;
    walk<HELD, N>(width, [&](int slot, int at) {
      logits(slot, at, e[slot]);
#pragma unroll
      for (int i = 0; i < N; i++) top = fmaxf(top, e[slot][i]);
    });
    top = block_max(top, scratch);
    float sum = 0.0f;
    walk<HELD, N>(width, [&](int slot, int at) {
#pragma unroll
      for (int i = 0; i < N; i++) {
        e[slot][i] = softmax_exp(e[slot][i], top);
        if (at + i < width) sum += e[slot][i];
      }
    });
    const float r = 1.0f / block_sum(sum, scratch);
    walk<HELD, N>(width, [&](int slot, int at) {
#pragma unroll
      for (int i = 0; i < N; i++) e[slot][i] *= r;
      store_part<N>(to, at, width, wide, e[slot]);
    });
  } else {
    Softmax s = softmax_none();
    walk<HELD, N>(width, [&](int slot, int at) {
      float x[N];
      logits(slot, at, x);
      float top = s.top;
#pragma unroll
      for (int i = 0; i < N; i++) top = fmaxf(top, x[i]);
      s.sum *= softmax_shrink(s.top, top);
      s.top = top;
      const float base = softmax_base(top);
#pragma unroll
      for (int i = 0; i < N; i++) {
        if (at + i < width) s.sum += softmax_exp(x[i], base);
      }
    });
    const float top = block_max(s.top, scratch);
    const float sum = block_sum(s.sum * softmax_shrink(s.top, top), scratch);
    const float r = 1.0f / softmax_sum(softmax_of(top, sum));
    walk<HELD, N>(width, [&](int slot, int at) {
      float x[N];
      logits(slot, at, x);
#pragma unroll
      for (int i = 0; i < N; i++) x[i] = softmax_exp(x[i], top) * r;
      store_part<N>(to, at, width, wide, x);
    });
  }
}

template <typename T, int HELD>
__device__ __forceinline__ void forward(const T* x, T* y, int64_t rows, int width) {
  constexpr int N = WIDE<T>;
  const int64_t which = row_of_block();
  if (which >= rows) return;
  const bool wide = wide_rows(x, width) && aligned(y, 16);
  const T* from = x + which * width;
  const auto logits = [&](int, int at, float (&v)[N]) {
    floats_of(load_part<N>(from, at, width, wide, -INFINITY), v);
  };
  softmax_row<T, HELD>(logits, y + which * width, width, wide);
}

// `bias` may be null; `heads` and `n` say to which row of it a row of z belongs.
template <typename T, int HELD>
__device__ __forceinline__ void probs(const T* z, const T* bias, T* p, int64_t rows, int width, int heads,
                                      int n, int groups, int bias_rows, float scale) {
  constexpr int N = WIDE<T>;
  const int64_t which = row_of_block();
  if (which >= rows) return;
  const bool wide = wide_rows(z, width) && aligned(p, 16) && aligned(bias, 16);
  const T* from = z + which * width;
  const int64_t place = which / n;
  const int64_t head = place / heads % groups * heads + place % heads;
  const T* add = bias ? bias + (head * bias_rows + (bias_rows > 1 ? which % n : 0)) * width : nullptr;
  const auto logits = [&](int, int at, float (&v)[N]) {
    floats_of(load_part<N>(from, at, width, wide, -INFINITY), v);
#pragma unroll
    for (int i = 0; i < N; i++) v[i] *= scale;
    if (add) {
      float b[N];
      floats_of(load_part<N>(add, at, width, wide, -INFINITY), b);
#pragma unroll
      for (int i = 0; i < N; i++) v[i] += b[i];
    }
  };
  softmax_row<T, HELD>(logits, p + which * width, width, wide);
}

template <typename T, int HELD>
__device__ __forceinline__ void backward(const T* y, const T* g, T* dx, int64_t rows, int width,
                                         float factor) {
  constexpr int N = WIDE<T>;
  __shared__ float scratch[WARP];
  const int64_t which = row_of_block();
  if (which >= rows) return;
  const bool wide = wide_rows(y, width) && aligned(g, 16) && aligned(dx, 16);
  const Row<T, HELD> row(y + which * width, width, wide);
  const Row<T, HELD> grad(g + which * width, width, wide);
  float sum = 0.0f;
  walk<HELD, N>(width, [&](int slot, int at) {
    float v[N], gs[N];
    row.part(slot, at, v);
    grad.part(slot, at, gs);
#pragma unroll
    for (int i = 0; i < N; i++) sum = fmaf(v[i], gs[i], sum);
  });
  const float mean = block_sum(sum, scratch);
  T* to = dx + which * width;
  walk<HELD, N>(width, [&](int slot, int at) {
    float v[N], gs[N];
    row.part(slot, at, v);
    grad.part(slot, at, gs);
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = softmax_grad(v[i], gs[i], mean, factor);
    store_part<N>(to, at, width, wide, v);
  });
}

// Entry i of the bias [groups, heads, bias_rows, m] by thread i, over the batch entries of part blockIdx.y.
template <typename T>
__device__ __forceinline__ void bias_grad(const T* ds, float* partial, int batch, int heads, int n, int m,
                                          int groups, int bias_rows, int each) {
  const int64_t size = int64_t(groups) * heads * bias_rows * m;
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) return;
  const int64_t row = i / m, column = i % m, head = row / bias_rows;
  const int64_t group = head / heads, h = head % heads;
  // Rows of the logits that share this entry.
  const int from = bias_rows > 1 ? int(row % bias_rows) : 0, to = bias_rows > 1 ? from + 1 : n;
  const int64_t first = int64_t(blockIdx.y) * each;
  float sum = 0.0f;
  for (int64_t turn = first; turn < first + each; turn++) {
    const int64_t b = group + turn * groups;
    if (b >= batch) break;
    const T* s = ds + ((b * heads + h) * n + from) * m + column;
    for (int r = from; r < to; r++, s += m) sum += to_float(*s);
  }
  partial[blockIdx.y * size + i] = sum;
}

#define SOFTMAX(suffix, T, held, HELD, THREADS)                                                             \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                     \
      softmax##held##_##suffix(const T* x, T* y, int64_t rows, int width) {                                 \
    forward<T, HELD>(x, y, rows, width);                                                                    \
  }                                                                                                         \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                     \
      softmax_grad##held##_##suffix(const T* y, const T* g, T* dx, int64_t rows, int width, float factor) { \
    backward<T, HELD>(y, g, dx, rows, width, factor);                                                       \
  }                                                                                                         \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                     \
      attention_probs##held##_##suffix(const T* z, const T* bias, T* p, int64_t rows, int width, int heads, \
                                       int n, int groups, int bias_rows, float scale) {                     \
    probs<T, HELD>(z, bias, p, rows, width, heads, n, groups, bias_rows, scale);                            \
  }

#define HELD_SOFTMAX(suffix, T) SOFTMAX(suffix, T, , HELD_PARTS, 256 * int(sizeof(T)))
#define LONG_SOFTMAX(suffix, T) SOFTMAX(suffix, T, _long, 0, 1024)
#define BIAS_GRAD(suffix, T)                                                                        \
  extern "C" __global__ void __launch_bounds__(256)                                                 \
      attention_bias_grad_##suffix(const T* ds, float* partial, int batch, int heads, int n, int m, \
                                   int groups, int bias_rows, int each) {                           \
    bias_grad(ds, partial, batch, heads, n, m, groups, bias_rows, each);                            \
  }

FOR_EACH_TYPE(HELD_SOFTMAX)
FOR_EACH_TYPE(LONG_SOFTMAX)
FOR_EACH_TYPE(BIAS_GRAD)
