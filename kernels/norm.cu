// Layer and root-mean-square normalization of rows, forward and backward (src/kernels/norm.rs, rms_norm.rs).
//
//     layer   xh = (x - mean) / sqrt(var + eps)   y = xh w + b     x [rows, width], w, b [width]
//     rms     xh = x / sqrt(mean x^2 + eps)       y = xh w
//     u = dy w    dx = (u - mean(u) - xh mean(u xh)) / sqrt(..), for rms without mean(u)
//     dw = sum dy xh    db = sum dy               over the rows
//
// A row belongs to a warp or to a block (row.cuh). It is read from memory once and kept in registers as it
// is stored, so the variance is taken in two passes over no memory; `_long` reads it again from the cache.
//
// Backward, block p takes the rows [p * each, + each) and writes its sums of dw and db, which no thread
// shares, to partial [parts, 2 or 1, width]; `fold_columns` of elementwise.cu adds the parts. `each` depends
// on the shape alone, so that a result does not depend on the card.
//
// Bytes moved of an f16 element: forward 4, backward 6 and 16 * parts / rows of the partial sums.
//
//     threads x   the least multiple of 32 with 4 * 16 bytes * x >= a row, backward 2 * 16 bytes * x;
//                 32 means 4 rows a block (y)
//     shared      forward none; backward y * (2 or 1) * 2 * 4 * x * (16 / size of an element) bytes
//     held        rows of up to 16384 elements forward, 8192 backward, else `_long` with 1024 threads and no
//                 shared memory
#include "arith/rows.h"
#include "row.cuh"

template <typename T, int HELD>
__device__ __forceinline__ void layer_statistics(const Row<T, HELD>& row, float eps, float* scratch,
                                                 float& mean, float& r) {
  constexpr int N = WIDE<T>;
  const float count = float(row.width);
  float sum = 0.0f;
  walk<HELD, N>(row.width, [&](int slot, int at) {
    float x[N];
    row.part(slot, at, x);
#pragma unroll
    for (int i = 0; i < N; i++) sum += x[i];
  });
  mean = block_sum(sum, scratch) / count;
  float squares = 0.0f;
  walk<HELD, N>(row.width, [&](int slot, int at) {
    float x[N];
    row.part(slot, at, x);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float c = at + i < row.width ? x[i] - mean : 0.0f;
      squares = fmaf(c, c, squares);
    }
  });
  r = norm_scale(block_sum(squares, scratch), count, eps);
}

template <typename T, int HELD>
__device__ __forceinline__ float rms_statistics(const Row<T, HELD>& row, float eps, float* scratch) {
  constexpr int N = WIDE<T>;
  float squares = 0.0f;
  walk<HELD, N>(row.width, [&](int slot, int at) {
    float x[N];
    row.part(slot, at, x);
#pragma unroll
    for (int i = 0; i < N; i++) squares = fmaf(x[i], x[i], squares);
  });
  return norm_scale(block_sum(squares, scratch), float(row.width), eps);
}

template <typename T, int HELD, bool LAYER>
__device__ __forceinline__ void forward(const T* x, const T* w, const T* b, T* y, int64_t rows, int width,
                                        float eps) {
  constexpr int N = WIDE<T>;
  __shared__ float scratch[WARP];
  const int64_t which = row_of_block();
  if (which >= rows) return;
  const bool wide = wide_rows(x, width) && aligned(y, 16) && aligned(w, 16) && aligned(b, 16);
  const Row<T, HELD> row(x + which * width, width, wide);
  float mean = 0.0f, r;
  if constexpr (LAYER) {
    layer_statistics(row, eps, scratch, mean, r);
  } else {
    r = rms_statistics(row, eps, scratch);
  }
  T* to = y + which * width;
  walk<HELD, N>(width, [&](int slot, int at) {
    float v[N], ws[N];
    row.part(slot, at, v);
    floats_of(load_part<N>(w, at, width, wide, 0.0f), ws);
    if constexpr (LAYER) {
      float bs[N];
      floats_of(load_part<N>(b, at, width, wide, 0.0f), bs);
#pragma unroll
      for (int i = 0; i < N; i++) v[i] = layer_norm(v[i] - mean, r, ws[i], bs[i]);
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) v[i] = rms_norm(v[i], r, ws[i]);
    }
    store_part<N>(to, at, width, wide, v);
  });
}

// Sums of columns that one thread alone adds to. In shared memory they lie by parts, four floats of all
// threads after another, so that a warp's access meets every bank once; of a long row in the block's own
// place in memory.
template <int HELD, int N>
struct Columns {
  float* sums;
  int width;

  __device__ __forceinline__ float* quad(int kind, int slot, int at, int i) const {
    if constexpr (HELD > 0) {
      return sums + (((kind * HELD + slot) * (N / 4) + i / 4) * int(blockDim.x) + int(threadIdx.x)) * 4;
    } else {
      return sums + int64_t(kind) * width + at + i;
    }
  }
};

template <typename T, int HELD, bool LAYER>
__device__ __forceinline__ void backward(const T* x, const T* w, const T* g, T* dx, float* partial,
                                         int64_t rows, int width, int64_t each, float eps) {
  constexpr int N = WIDE<T>, KINDS = LAYER ? 2 : 1;
  extern __shared__ __align__(16) float block_sums[];
  __shared__ float scratch[WARP];
  const bool wide = wide_rows(x, width) && aligned(g, 16) && aligned(dx, 16) && aligned(w, 16);
  float* part = partial + int64_t(blockIdx.x) * KINDS * width;
  const int own = KINDS * HELD * N * int(blockDim.x);
  const Columns<HELD, N> columns{HELD > 0 ? block_sums + int(threadIdx.y) * own : part, width};
  walk<HELD, N>(width, [&](int slot, int at) {
#pragma unroll
    for (int i = 0; i < N; i++) {
#pragma unroll
      for (int kind = 0; kind < KINDS; kind++) {
        if (HELD > 0 || at + i < width) columns.quad(kind, slot, at, i)[HELD > 0 ? i % 4 : 0] = 0.0f;
      }
    }
  });
  const int64_t first = int64_t(blockIdx.x) * each;
  const int64_t end = first + each < rows ? first + each : rows;
  for (int64_t which = first + threadIdx.y; which < end; which += blockDim.y) {
    const Row<T, HELD> row(x + which * width, width, wide);
    const Row<T, HELD> grad(g + which * width, width, wide);
    float mean = 0.0f, r;
    if constexpr (LAYER) {
      layer_statistics(row, eps, scratch, mean, r);
    } else {
      r = rms_statistics(row, eps, scratch);
    }
    float sum_u = 0.0f, sum_ux = 0.0f;
    walk<HELD, N>(width, [&](int slot, int at) {
      float v[N], gs[N], ws[N];
      row.part(slot, at, v);
      grad.part(slot, at, gs);
      floats_of(load_part<N>(w, at, width, wide, 0.0f), ws);
#pragma unroll
      for (int i = 0; i < N; i++) {
        const float u = gs[i] * ws[i];
        if constexpr (LAYER) {
          const float n = (v[i] - mean) * r;
          sum_u += u;
          sum_ux = fmaf(u, n, sum_ux);
          v[i] = n;
        } else {
          sum_ux = fmaf(u, v[i], sum_ux);
          gs[i] = gs[i] * r;
        }
      }
#pragma unroll
      for (int i = 0; i < N; i += HELD > 0 ? 4 : 1) {
        if constexpr (HELD > 0) {
          float4* dw = reinterpret_cast<float4*>(columns.quad(0, slot, at, i));
          float4 sum = *dw;
          sum.x = fmaf(gs[i], v[i], sum.x);
          sum.y = fmaf(gs[i + 1], v[i + 1], sum.y);
          sum.z = fmaf(gs[i + 2], v[i + 2], sum.z);
          sum.w = fmaf(gs[i + 3], v[i + 3], sum.w);
          *dw = sum;
          if constexpr (LAYER) {
            float4* db = reinterpret_cast<float4*>(columns.quad(1, slot, at, i));
            sum = *db;
            sum.x += gs[i];
            sum.y += gs[i + 1];
            sum.z += gs[i + 2];
            sum.w += gs[i + 3];
            *db = sum;
          }
        } else if (at + i < width) {
          float* dw = columns.quad(0, slot, at, i);
          *dw = fmaf(gs[i], v[i], *dw);
          if constexpr (LAYER) *columns.quad(1, slot, at, i) += gs[i];
        }
      }
    });
    const float inv = 1.0f / float(width);
    float mean_u = 0.0f, mean_ux;
    if constexpr (LAYER) {
      mean_u = block_sum(sum_u, scratch) * inv;
      mean_ux = block_sum(sum_ux, scratch) * inv;
    } else {
      mean_ux = block_sum(sum_ux, scratch) * r * r / float(width);
    }
    T* to = dx + which * width;
    walk<HELD, N>(width, [&](int slot, int at) {
      float v[N], gs[N], ws[N];
      row.part(slot, at, v);
      grad.part(slot, at, gs);
      floats_of(load_part<N>(w, at, width, wide, 0.0f), ws);
#pragma unroll
      for (int i = 0; i < N; i++) {
        const float u = gs[i] * ws[i];
        if constexpr (LAYER) {
          v[i] = layer_norm_grad(u, (v[i] - mean) * r, mean_u, mean_ux, r);
        } else {
          v[i] = rms_norm_grad(u, v[i], mean_ux, r);
        }
      }
      store_part<N>(to, at, width, wide, v);
    });
  }
  if constexpr (HELD > 0) {
    // The rows' lanes of the block in order; with one row a block a thread reads what it wrote.
    if (blockDim.y > 1) __syncthreads();
    if (threadIdx.y > 0) return;
    walk<HELD, N>(width, [&](int slot, int at) {
#pragma unroll
      for (int i = 0; i < N; i++) {
#pragma unroll
        for (int kind = 0; kind < KINDS; kind++) {
          float sum = 0.0f;
          for (int y = 0; y < int(blockDim.y); y++) sum += columns.quad(kind, slot, at, i)[y * own + i % 4];
          if (at + i < width) part[int64_t(kind) * width + at + i] = sum;
        }
      }
    });
  }
}

#define NORMS(suffix, T, held, HELD, THREADS)                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS) layer_norm##held##_##suffix(                \
      const T* x, const T* w, const T* b, T* y, int64_t rows, int width, float eps) {               \
    forward<T, HELD, true>(x, w, b, y, rows, width, eps);                                           \
  }                                                                                                 \
  extern "C" __global__ void __launch_bounds__(THREADS)                                             \
      rms_norm##held##_##suffix(const T* x, const T* w, T* y, int64_t rows, int width, float eps) { \
    forward<T, HELD, false>(x, w, nullptr, y, rows, width, eps);                                    \
  }

#define GRADS(suffix, T, held, HELD, THREADS)                                                     \
  extern "C" __global__ void __launch_bounds__(THREADS)                                           \
      layer_norm_grad##held##_##suffix(const T* x, const T* w, const T* g, T* dx, float* partial, \
                                       int64_t rows, int width, int64_t each, float eps) {        \
    backward<T, HELD, true>(x, w, g, dx, partial, rows, width, each, eps);                        \
  }                                                                                               \
  extern "C" __global__ void __launch_bounds__(THREADS)                                           \
      rms_norm_grad##held##_##suffix(const T* x, const T* w, const T* g, T* dx, float* partial,   \
                                     int64_t rows, int width, int64_t each, float eps) {          \
    backward<T, HELD, false>(x, w, g, dx, partial, rows, width, each, eps);                       \
  }

// Backward keeps two rows, so half as much of each.
#define ENTRIES(suffix, T)                                 \
  NORMS(suffix, T, , HELD_PARTS, 256 * int(sizeof(T)))     \
  NORMS(suffix, T, _long, 0, 1024)                         \
  GRADS(suffix, T, , HELD_PARTS / 2, 256 * int(sizeof(T))) \
  GRADS(suffix, T, _long, 0, 1024)

FOR_EACH_TYPE(ENTRIES)
