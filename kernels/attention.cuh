// What both files of attention share: the sizes of a call, where heads lie, and which keys a query sees.
#pragma once

#include "arith/attention.h"
#include "row.cuh"

// Passed by value to every kernel. q and o are [batch, queries, heads * depth], k and v [batch, keys,
// groups * depth], head h reading group h / (heads / groups); bias [bias_groups, heads, bias_rows, keys],
// entry b reading group b % bias_groups and bias_rows being `queries` or 1. scale > 0.
struct Attention {
  int batch, heads, groups, queries, keys, depth, bias_groups, bias_rows;
  float scale;

  __device__ __forceinline__ int64_t query_stride() const { return int64_t(heads) * depth; }
  __device__ __forceinline__ int64_t key_stride() const { return int64_t(groups) * depth; }

  template <typename T>
  __device__ __forceinline__ T* query(T* q, int b, int h, int t = 0) const {
    return q + (int64_t(b) * queries + t) * query_stride() + h * depth;
  }

  template <typename T>
  __device__ __forceinline__ T* key(T* k, int b, int g, int t = 0) const {
    return k + (int64_t(b) * keys + t) * key_stride() + g * depth;
  }

  // Of numbers that a query head has one of for each query: [batch, heads, queries].
  __device__ __forceinline__ int64_t statistic(int b, int h, int t) const {
    return (int64_t(b) * heads + h) * queries + t;
  }

  __device__ __forceinline__ int64_t bias_row(int b, int h, int t) const {
    const int64_t head = int64_t(b % bias_groups) * heads + h;
    return (head * bias_rows + (bias_rows > 1 ? t : 0)) * keys;
  }

  __device__ __forceinline__ int last(int t, const uint32_t* starts) const {
    return last_key(t, queries, keys, starts != nullptr);
  }

  // Whether rows of heads can be read 16 bytes at a time from `x`.
  template <typename T>
  __device__ __forceinline__ bool wide(const T* x) const {
    return depth % WIDE<T> == 0 && aligned(x, 16);
  }
};

// The least and the largest start among the queries [from, to) of entry b, the whole warp calling.
struct Starts {
  int least, largest;
};

static __device__ __forceinline__ Starts starts_of(const uint32_t* starts, const Attention& s, int b,
                                                   int from, int to) {
  if (!starts) return {0, 0};
  unsigned least = ~0u, largest = 0;
  for (int t = from + lane_of(); t < to; t += WARP) {
    const unsigned start = starts[int64_t(b) * s.queries + t];
    least = start < least ? start : least;
    largest = start > largest ? start : largest;
  }
  for (int apart = WARP / 2; apart > 0; apart /= 2) {
    const unsigned low = __shfl_xor_sync(ALL_LANES, least, apart);
    const unsigned high = __shfl_xor_sync(ALL_LANES, largest, apart);
    least = low < least ? low : least;
    largest = high > largest ? high : largest;
  }
  return {int(least), int(largest)};
}

// Rows of dO * O summed, [batch, heads, queries]: what every entry of dP is measured from. A run of lanes, a
// power of two of them, takes a head of a query, 16 bytes a lane at a time.
template <typename T>
__device__ __forceinline__ void attention_delta(const T* o, const T* g, float* delta, const Attention& s) {
  constexpr int N = WIDE<T>;
  int lanes = 1;
  while (lanes < WARP && lanes * N < s.depth) lanes *= 2;
  const unsigned row = blockIdx.x * (blockDim.x / unsigned(lanes)) + threadIdx.x / unsigned(lanes);
  const bool real = row < unsigned(s.batch) * unsigned(s.queries) * unsigned(s.heads);
  const bool wide = s.wide(o) && s.wide(g);
  float sum = 0.0f;
  for (int at = lane_of() % lanes * N; real && at < s.depth; at += lanes * N) {
    float x[N], y[N];
    floats_of(load_part<N>(o + int64_t(row) * s.depth, at, s.depth, wide, 0.0f), x);
    floats_of(load_part<N>(g + int64_t(row) * s.depth, at, s.depth, wide, 0.0f), y);
#pragma unroll
    for (int i = 0; i < N; i++) sum = fmaf(x[i], y[i], sum);
  }
  sum = warp_sum(sum, lanes);
  if (!real || lane_of() % lanes != 0) return;
  const unsigned h = row % unsigned(s.heads), place = row / unsigned(s.heads);
  delta[s.statistic(int(place / unsigned(s.queries)), int(h), int(place % unsigned(s.queries)))] = sum;
}
