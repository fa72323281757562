// Instructions of sm_80 and later that C++ has no words for: products of small matrices by a warp, and copies
// to shared memory that do not pass through registers.
//
// Fragments of m16n8: lane 4 g + q holds, of the left operand, the rows g and g + 8; of the right one, the
// column g; of the sums, c[0], c[1] of row g and columns 2 q, 2 q + 1, c[2], c[3] of row g + 8.
#pragma once

#include <stdint.h>

// 16 bytes from global to shared memory, past the first-level cache. Both addresses are multiples of 16.
static __device__ __forceinline__ void copy_async(void* to, const void* from) {
  const unsigned at = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n" ::"r"(at), "l"(from) : "memory");
}

// As above of the first `bytes` bytes, zeros behind them. With 0 nothing is read.
static __device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
  const unsigned at = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(at), "l"(from), "r"(bytes)
               : "memory");
}

// Ends a group of this thread's copies.
static __device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most LEFT of this thread's groups are under way.
template <int LEFT>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(LEFT) : "memory");
}

// sums += left [16, 16] right [16, 8], of halves; subnormal ones count.
static __device__ __forceinline__ void mma_halves(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                  uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sums = from + left [16, 16] right [16, 8].
static __device__ __forceinline__ void mma_halves_from(float (&c)[4], float4 from, const uint32_t (&a)[4],
                                                       uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};\n"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(from.x), "f"(from.y), "f"(from.z),
        "f"(from.w));
}

// sums += left [16, 32] right [32, 8], of bytes: unsigned on the left, and on the right signed or not.
template <bool SIGNED>
__device__ __forceinline__ void mma_bytes(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (SIGNED) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};\n"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};\n"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Of 8 x 8 halves of which lane 4 g + q holds row g, columns 2 q and 2 q + 1: the transpose, held likewise.
static __device__ __forceinline__ uint32_t transposed(uint32_t a) {
  uint32_t t;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(t) : "r"(a));
  return t;
}

// a b + c of both halves, each rounded once.
static __device__ __forceinline__ uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;\n" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// The largest over the warp, in all lanes.
static __device__ __forceinline__ uint32_t warp_top(uint32_t x) { return __reduce_max_sync(0xffffffffu, x); }
