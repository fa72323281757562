// The gradient of rows that were picked of a table (src/kernels/pick.rs).
//
//     y[t, :] = x[ids[t], :]    dx[i, :] = sum of dy[t, :] over the t with ids[t] = i    x [V, width], ids u32 [T]
//
// A row of dx belongs to the first t that has its number: its block finds the others by walking the ids behind
// it, and adds their rows in order, in f32. Rows that nobody picked were zero before; what is no row is left out.
//
// Bytes moved of an f16 element of dy: 2, and of a row of dx that was picked 2; ids from the cache for each block.
//
//     256 threads; blocks (T, ceil(width / (256 * elements of 16 bytes)))
#include "row.cuh"

constexpr int THREADS = 256;

template <typename T>
__device__ __forceinline__ void pick_grad(const T* g, const uint32_t* ids, T* dx, int count, int64_t rows,
                                          int width) {
  constexpr int N = WIDE<T>;
  __shared__ int taken[THREADS];
  const int t = blockIdx.x, lane = threadIdx.x;
  const uint32_t id = ids[t];
  if (id >= rows) return;
  int before = 0;
  for (int at = lane; at < t; at += THREADS) before |= ids[at] == id;
  taken[lane] = before;
  __syncthreads();
  for (int half = THREADS / 2; half > 0; half /= 2) {
    if (lane < half) taken[lane] |= taken[lane + half];
    __syncthreads();
  }
  if (taken[0]) return;
  const bool wide = wide_rows(g, width) && aligned(dx, 16);
  const int column = (int(blockIdx.y) * THREADS + lane) * N;
  float sum[N];
#pragma unroll
  for (int i = 0; i < N; i++) sum[i] = 0.0f;
  for (int first = t; first < count; first += THREADS) {
    __syncthreads();
    taken[lane] = first + lane < count && ids[first + lane] == id;
    __syncthreads();
    const int end = count - first < THREADS ? count - first : THREADS;
    for (int i = 0; i < end; i++) {
      if (!taken[i] || column >= width) continue;
      float x[N];
      floats_of(load_part<N>(g + int64_t(first + i) * width, column, width, wide, 0.0f), x);
#pragma unroll
      for (int j = 0; j < N; j++) sum[j] += x[j];
    }
  }
  if (column < width) store_part<N>(dx + int64_t(id) * width, column, width, wide, sum);
}

#define PICK(suffix, T)                                                                                     \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                     \
      pick_grad_##suffix(const T* g, const uint32_t* ids, T* dx, int count, int64_t rows, int width) {      \
    pick_grad(g, ids, dx, count, rows, width);                                                              \
  }

FOR_EACH_TYPE(PICK)
