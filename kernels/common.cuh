// What the kernels share: element types, wide accesses, and sums whose order depends on sizes alone.
//
// Elements are f32, f16 or bf16 in memory and float in registers. A sum over a warp is a butterfly: every
// lane ends with the same bits, since a + b is b + a. No float is ever added by an atomic.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// X(suffix of the entry point, type) for each element type.
#define FOR_EACH_TYPE(X) X(f32, float) X(f16, __half) X(bf16, __nv_bfloat16)

static __device__ __forceinline__ float to_float(float x) { return x; }
static __device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
static __device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounded to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Elements of one 16-byte access.
template <typename T>
constexpr int WIDE = 16 / int(sizeof(T));

// N elements in registers, moved by one access where they fit in 16 bytes.
template <typename T, int N>
struct Pack {
  T at[N];
};

template <int BYTES>
struct Access;
template <>
struct Access<16> {
  typedef uint4 Word;
};
template <>
struct Access<8> {
  typedef uint2 Word;
};
template <>
struct Access<4> {
  typedef uint32_t Word;
};
template <>
struct Access<2> {
  typedef uint16_t Word;
};

// `from` is aligned to N elements. Not restrict, here and below: the compiler would take what is read for
// constant throughout the kernel, which results written in place are not.
template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
  constexpr int COUNT = N < WIDE<T> ? N : WIDE<T>;
  typedef typename Access<COUNT * int(sizeof(T))>::Word Word;
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; i += COUNT) {
    // Through a word: the compiler would split a struct of halves into narrow accesses.
    const Word word = *reinterpret_cast<const Word*>(from + i);
    memcpy(pack.at + i, &word, sizeof(Word));
  }
  return pack;
}

// `to` is aligned to N elements, or to 16 bytes where N elements are more, as for `load`.
template <int N, typename T>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) {
  constexpr int COUNT = N < WIDE<T> ? N : WIDE<T>;
  typedef typename Access<COUNT * int(sizeof(T))>::Word Word;
#pragma unroll
  for (int i = 0; i < N; i += COUNT) {
    Word word;
    memcpy(&word, pack.at + i, sizeof(Word));
    *reinterpret_cast<Word*>(to + i) = word;
  }
}

template <int N, typename T>
__device__ __forceinline__ void load_floats(const T* from, float (&x)[N]) {
  const Pack<T, N> pack = load<N>(from);
#pragma unroll
  for (int i = 0; i < N; i++) x[i] = to_float(pack.at[i]);
}

template <int N, typename T>
__device__ __forceinline__ void store_floats(T* to, const float (&x)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; i++) pack.at[i] = from_float<T>(x[i]);
  store(to, pack);
}

// Whether the address is a multiple of `bytes`, a power of two; true of null.
static __device__ __forceinline__ bool aligned(const void* at, unsigned bytes) {
  return (reinterpret_cast<uintptr_t>(at) & (bytes - 1)) == 0;
}

static __device__ __forceinline__ int lane_of() { return int(threadIdx.x) % WARP; }
static __device__ __forceinline__ int warp_of() { return int(threadIdx.x) / WARP; }

// The sum over each run of `lanes` lanes, a power of two up to 32, in all of them. The whole warp calls.
template <typename T>
__device__ __forceinline__ T warp_sum(T x, int lanes = WARP) {
  for (int apart = lanes / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(ALL_LANES, x, apart);
  return x;
}

// The largest over each run of `lanes` lanes; a NaN is skipped. The whole warp calls.
static __device__ __forceinline__ float warp_max(float x, int lanes = WARP) {
  for (int apart = lanes / 2; apart > 0; apart /= 2) {
    const float other = __shfl_xor_sync(ALL_LANES, x, apart);
    x = fmaxf(x, other);
  }
  return x;
}

// The sum over the block in all threads: within warps, then over the warps' sums. `scratch` is in shared
// memory and holds 32. Blocks are whole warps along x; every thread calls.
template <typename T>
__device__ __forceinline__ T block_sum(T x, T* scratch) {
  x = warp_sum(x);
  if (blockDim.x == WARP) return x;
  // A sum before this one may still be read.
  __syncthreads();
  if (lane_of() == 0) scratch[warp_of()] = x;
  __syncthreads();
  return warp_sum(lane_of() < int(blockDim.x) / WARP ? scratch[lane_of()] : T(0));
}

// The largest over the block in all threads, as `block_sum` sums.
static __device__ __forceinline__ float block_max(float x, float* scratch) {
  x = warp_max(x);
  if (blockDim.x == WARP) return x;
  __syncthreads();
  if (lane_of() == 0) scratch[warp_of()] = x;
  __syncthreads();
  return warp_max(lane_of() < int(blockDim.x) / WARP ? scratch[lane_of()] : -INFINITY);
}
