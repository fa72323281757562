// Products of tiles on the tensor cores of sm_80 and later, and how 16-bit tiles come to them from shared
// memory. The fragments of an instruction, with g = lane / 4 and t = lane % 4:
//
//     a [16, 16]   a0 (g, 2t)  a1 (g + 8, 2t)  a2 (g, 2t + 8)  a3 (g + 8, 2t + 8)   two columns in each
//     b [16, 8]    b0 (2t, g)  b1 (2t + 8, g)                                       two rows in each
//     c [16, 8]    c0, c1 (g, 2t), (g, 2t + 1)    c2, c3 (g + 8, 2t), (g + 8, 2t + 1)
#pragma once

#include "common.cuh"
#include "mma.cuh"

// c += a b
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_halves(c, a, b0, b1);
}

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                   uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a b of TF32, 8 long: a (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4), b (t, g), (t + 4, g). The lower
// 13 bits of each are 0.
static __device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ uint32_t shared_address(const void* at) {
  return uint32_t(__cvta_generic_to_shared(at));
}

// Four matrices of 8 rows of 16 bytes, row r of matrix m at the address that lane 8 m + r gives. Lane l
// gets of each the two elements (l / 4, 2 (l % 4)); transposed, (2 (l % 4), l / 4) and the one below.
static __device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

static __device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// 2^x to 2 units in the last place; 0 for -inf.
static __device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers rounded, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pair_of(float first, float second) {
  const T both[2] = {from_float<T>(first), from_float<T>(second)};
  uint32_t bits;
  memcpy(&bits, both, 4);
  return bits;
}
