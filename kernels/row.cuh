// Rows of a matrix in the hands of a block: `blockDim.x` threads to a row, `blockDim.y` rows to a block.
//
// With blockDim.x = 32 every row is a warp's, which meets no barrier, so that warps may end early and take
// different numbers of rows. With more, blockDim.y = 1. Part i of thread t covers the elements
// [(i * blockDim.x + t) * N, + N), N of them 16 bytes, whether or not the row is aligned to that: the order
// of a sum does not depend on addresses.
#pragma once

#include "common.cuh"

// Elements [at, at + N) of a row, `fill` for those from `width` on. `wide` says that rows are aligned to N.
template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load_part(const T* row, int at, int width, bool wide, float fill) {
  if (wide && at + N <= width) return load<N>(row + at);
  Pack<T, N> part;
#pragma unroll
  for (int i = 0; i < N; i++) part.at[i] = at + i < width ? row[at + i] : from_float<T>(fill);
  return part;
}

template <int N, typename T>
__device__ __forceinline__ void store_part(T* row, int at, int width, bool wide, const float (&x)[N]) {
  if (wide && at + N <= width) return store_floats<N>(row + at, x);
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (at + i < width) row[at + i] = from_float<T>(x[i]);
  }
}

template <int N, typename T>
__device__ __forceinline__ void floats_of(const Pack<T, N>& part, float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) x[i] = to_float(part.at[i]);
}

// Calls f(slot, first element) for this thread's parts of a row. HELD slots cover the row, or there are none
// and the row is walked as far as it goes. Widths are below 2^30.
template <int HELD, int N, typename F>
__device__ __forceinline__ void walk(int width, F f) {
  if constexpr (HELD > 0) {
#pragma unroll
    for (int slot = 0; slot < HELD; slot++) {
      const int at = (slot * int(blockDim.x) + int(threadIdx.x)) * N;
      if (at < width) f(slot, at);
    }
  } else {
    for (int at = int(threadIdx.x) * N; at < width; at += int(blockDim.x) * N) f(0, at);
  }
}

// A row that is read more than once: kept in registers, HELD parts a thread, or read again from the cache.
template <typename T, int HELD>
struct Row {
  static constexpr int N = WIDE<T>;
  const T* from;
  int width;
  bool wide;
  float fill;
  Pack<T, N> held[HELD > 0 ? HELD : 1];

  __device__ __forceinline__ Row(const T* from, int width, bool wide, float fill = 0.0f)
      : from(from), width(width), wide(wide), fill(fill) {
    if constexpr (HELD > 0) {
      walk<HELD, N>(width, [&](int slot, int at) { held[slot] = load_part<N>(from, at, width, wide, fill); });
    }
  }

  __device__ __forceinline__ void part(int slot, int at, float (&x)[N]) const {
    if constexpr (HELD > 0) {
      floats_of(held[slot], x);
    } else {
      floats_of(load_part<N>(from, at, width, wide, fill), x);
    }
  }
};

// Whether rows of `width` elements that begin at `x` can be read 16 bytes at a time.
template <typename T>
__device__ __forceinline__ bool wide_rows(const T* x, int64_t width) {
  return width % WIDE<T> == 0 && aligned(x, 16);
}

// Parts that a thread keeps of a row.
constexpr int HELD_PARTS = 4;

static __device__ __forceinline__ int64_t row_of_block() {
  return int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
}
