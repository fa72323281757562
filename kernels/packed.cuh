// What the products with packed weights share: which kernel for what, tiles, numbers as halves, slices.
//
//     y[t, o] = sum_k x[t, k] w[o, k]    w[o, k] = step[o, k / group] (u[o, k] + zero)    zero = lo + offset
//
// Which kernel (tokens: rows of activations; those of f32 count twice, since they enter as two halves; chosen
// in src/kernels/packed/device.rs, with grids of src/kernels/packed/geometry.rs):
//
//     tokens        kernel                                                        file
//     1 .. 8        packed_gemv_w{2,3,4,8}_n8_<type>                              packed_gemv.cu
//     9 .. 16       packed_gemv_w{2,3,4,8}_n16_<type>                             packed_gemv.cu
//     17 .. 32      packed_prepare_<type>, packed_gemm_w{2,3,4,8}_n32             packed_gemm.cu
//     33 .. 64      packed_prepare_<type>, packed_gemm_w{2,3,4,8}_n64             packed_gemm.cu
//     65 .. 512     packed_prepare_<type>, packed_gemm_w{2,3,4,8}_n128            packed_gemm.cu
//     more          packed_values_<type>, then a dense product; f32 as before,    packed.cu
//                   for dense products of f32 have no tensor cores
//     codes         packed_int8_w{2,3,4,8}_n{16,64}_<type>, one step a row        packed_int8.cu
//     dx = dy W     packed_prepare_<type>, packed_back_w{2,3,4,8}_<type>          packed_back.cu
//                   more than 512 tokens, not of f32: packed_values_<type>, then a dense product
//     embedding     packed_values_<type> of tiles, packed_gather_<type> of other groups
//     other groups  packed_plain_<type> up to 16 tokens, or packed_gather_<type> of all rows and a dense
//                   product
//
// Other groups are those of several a row that are no multiple of 32 columns. All but packed_gather and
// packed_plain read the tiled layout of arith/packed.h, which packed_repack and packed_repack_steps make
// once; rows as they come are then no longer needed. Fields of 1 bit become 2, those of 5 to 7 bits 8.
//
// Numbers. A weight enters a tensor core as the whole number u or u + zero, exactly, and an activation as a
// half that was lifted by a power of two to the token's largest: exact for f16 and bf16 but for what is below
// 2^-33 of the largest (`packed_lift`). f32 is the sum of two such halves, hi + lo / 2048, to a unit in its
// last place; they take two columns of the right operand, 2 t and 2 t + 1, which end in the same lane. Sums
// are f32; after each group of columns, and at most 256 columns, the tensor core's sum is multiplied by the
// step and added in f32 with rounding to nearest (the tensor core cuts). An infinite activation may give NaN;
// a NaN gives NaN for its token.
#pragma once

#include "arith/packed.h"
#include "common.cuh"
#include "mma.cuh"

// Sizes of the tiled layout.
template <int BITS>
struct Tile {
  static constexpr int COLS = packed_tile_cols(BITS);
  static constexpr int VECTORS = packed_vectors(BITS);
  // 16-byte vectors of a tile: two bands.
  static constexpr int CHUNKS = 2 * VECTORS * WARP;
  static constexpr int BYTES = CHUNKS * 16;
  // Products of 16 columns.
  static constexpr int STEPS = COLS / 16;
};

// What a lane holds of one band.
template <int BITS>
struct Words {
  uint32_t at[packed_vectors(BITS)][4];

  __device__ __forceinline__ void set(int vector, uint4 w) {
    at[vector][0] = w.x, at[vector][1] = w.y, at[vector][2] = w.z, at[vector][3] = w.w;
  }
  __device__ __forceinline__ uint32_t halves(int step, int part) const {
    return packed_halves(BITS, step, at[0][part], BITS == 3 ? at[BITS == 3][part] : 0u,
                         BITS == 3 ? at[2 * (BITS == 3)][part] : 0u);
  }
  __device__ __forceinline__ uint32_t halves_low(int step, int part) const {
    return packed_halves_low(BITS, step, at[0][part], BITS == 3 ? at[BITS == 3][part] : 0u,
                             BITS == 3 ? at[2 * (BITS == 3)][part] : 0u);
  }
  __device__ __forceinline__ uint32_t bytes(int m, int part) const {
    return packed_bytes(BITS, m, at[0][part], BITS == 3 ? at[BITS == 3][part] : 0u,
                        BITS == 3 ? at[2 * (BITS == 3)][part] : 0u);
  }
};

// Halves that an element enters as.
template <typename T>
constexpr int PARTS = sizeof(T) == 4 ? 2 : 1;
// What the second is lifted by.
constexpr float LOW_LIFT = 2048.0f;

static __device__ __forceinline__ uint32_t two_halves(float a, float b) {
  const __half2 h = __halves2half2(__float2half_rn(a), __float2half_rn(b));
  uint32_t bits;
  memcpy(&bits, &h, 4);
  return bits;
}

// The same half twice.
static __device__ __forceinline__ uint32_t half_twice(float x) { return two_halves(x, x); }

// What is left of x behind its half, lifted.
static __device__ __forceinline__ float below_half(float x) {
  return (x - __half2float(__float2half_rn(x))) * LOW_LIFT;
}

// (u + zero) / 512 of two fields at a power: constants for `centred`.
struct Centre {
  uint32_t times, plus;
};
static __device__ __forceinline__ Centre centre(float zero, int power) {
  return Centre{half_twice(packed_two_to(15 - power)), half_twice(zero * (1.0f / 512.0f))};
}

// Elements [at, at + 8) of a row of activations, zeros from `width` on. `wide` says that rows can be read 16
// bytes at a time.
template <typename T>
__device__ __forceinline__ void eight_of(const T* row, int at, int width, bool wide, float (&x)[8]) {
  if (wide && at + 8 <= width) return load_floats<8>(row + at, x);
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = at + i < width ? to_float(row[at + i]) : 0.0f;
}

// The bits of the largest finite size of eight.
static __device__ __forceinline__ uint32_t top_of(const float (&x)[8]) {
  uint32_t top = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const uint32_t size = packed_size_bits(x[i]);
    top = size > top ? size : top;
  }
  return top;
}

// The last of the blocks that share a ticket, each having written its part: true in all its threads. The
// tickets are 0 before a kernel and after it. Every thread calls.
static __device__ __forceinline__ bool last_of(unsigned* ticket, unsigned blocks) {
  __shared__ unsigned before;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    before = atomicAdd(ticket, 1u);
    if (before == blocks - 1) *ticket = 0;
  }
  __syncthreads();
  if (before != blocks - 1) return false;
  __threadfence();
  return true;
}
