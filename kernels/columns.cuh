// Sums over the rows of a matrix in two stages, in an order that the shape alone sets: blocks of (32, 8)
// threads add the columns of a part of the rows, then the parts are added in f64.
#pragma once

#include "row.cuh"

// Lane rows of a block: each takes every 8th row, or part.
constexpr int SIDE = 8;

// partial[part, column], part = blockIdx.y of the rows [part * each, + each): what f(row, first column, sum)
// adds onto sum, of N columns, over the part's rows.
template <int N, typename F>
__device__ __forceinline__ void sum_columns(float* partial, int64_t rows, int width, int64_t each, F f) {
  __shared__ float sums[SIDE][WARP][N + 1];
  const int at = (int(blockIdx.x) * WARP + int(threadIdx.x)) * N;
  float sum[N];
#pragma unroll
  for (int i = 0; i < N; i++) sum[i] = 0.0f;
  if (at < width) {
    const int64_t first = int64_t(blockIdx.y) * each;
    const int64_t end = first + each < rows ? first + each : rows;
#pragma unroll 4
    for (int64_t row = first + threadIdx.y; row < end; row += SIDE) f(row, at, sum);
  }
#pragma unroll
  for (int i = 0; i < N; i++) sums[threadIdx.y][threadIdx.x][i] = sum[i];
  __syncthreads();
  // One column a thread from here on: 32 * N of them.
  for (int c = int(threadIdx.y) * WARP + int(threadIdx.x); c < WARP * N; c += SIDE * WARP) {
    const int column = int(blockIdx.x) * WARP * N + c;
    if (column >= width) continue;
    float total = 0.0f;
#pragma unroll
    for (int y = 0; y < SIDE; y++) total += sums[y][c / N][c % N];
    partial[int64_t(blockIdx.y) * width + column] = total;
  }
}

// finish(column, the sum of its parts).
template <typename F>
__device__ __forceinline__ void fold_parts(const float* partial, int64_t parts, int64_t columns, F finish) {
  __shared__ double sums[SIDE][WARP];
  const int64_t column = int64_t(blockIdx.x) * WARP + threadIdx.x;
  double sum = 0.0;
  if (column < columns) {
#pragma unroll 4
    for (int64_t part = threadIdx.y; part < parts; part += SIDE)
      sum += double(partial[part * columns + column]);
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= columns) return;
  for (int y = 1; y < SIDE; y++) sum += sums[y][threadIdx.x];
  finish(column, float(sum));
}
