// What a kernel's source needs of CUDA's compiler and headers, for g++. Included before it.
#pragma once
#include <assert.h>
#include <limits.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "numbers.h"
#include "run.h"

#ifndef EMULATE_LIST  // Where kernels are looked for these words mark them.
#define __global__
#define __launch_bounds__(...)
#endif
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __align__(n) alignas(n)
#define __grid_constant__
#define __CUDACC__
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#define __CUDA_ARCH__ 900
#undef assert
#define assert(x) ((x) ? void() : emulate::fail("%s:%d: does not hold: %s", __FILE__, __LINE__, #x))

#define threadIdx (emulate::now->thread)
#define blockIdx emulate::block
#define blockDim emulate::block_dim
#define gridDim emulate::grid
#define warpSize 32
#define __syncthreads() emulate::barrier(__LINE__)

#define EMULATE_VECTOR(T, NAME, SIZE)                                                \
  struct alignas(sizeof(T) * 2) NAME##2 { T x, y; };                                 \
  struct NAME##3 { T x, y, z; };                                                     \
  struct alignas(sizeof(T) * 4 < 16 ? sizeof(T) * 4 : 16) NAME##4 { T x, y, z, w; }; \
  inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                         \
  inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define uint3 emulate_uint3
EMULATE_VECTOR(float, float, 4)
EMULATE_VECTOR(double, double, 8)
EMULATE_VECTOR(int, int, 4)
EMULATE_VECTOR(unsigned, uint, 4)
EMULATE_VECTOR(short, short, 2)
EMULATE_VECTOR(unsigned short, ushort, 2)
EMULATE_VECTOR(signed char, char, 1)
EMULATE_VECTOR(unsigned char, uchar, 1)
#undef uint3

template <typename A, typename B>
inline std::common_type_t<A, B> min(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return y < x ? y : x;
}
template <typename A, typename B>
inline std::common_type_t<A, B> max(A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return x < y ? y : x;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline double normcdf(double x) { return 0.5 * erfc(-x * M_SQRT1_2); }
inline float normcdff(float x) { return float(normcdf(double(x))); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline int __float2int_rn(float x) {
  return x >= 0x1p31f ? INT_MAX : x < -0x1p31f ? INT_MIN : x != x ? 0 : int(rintf(x));
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t((unsigned __int128)a * b >> 64); }
inline float __uint_as_float(unsigned x) { return emulate::bits_as<float>(x); }
inline float __int_as_float(int x) { return emulate::bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return emulate::bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return emulate::bits_as<int>(x); }
inline double __longlong_as_double(long long x) { return emulate::bits_as<double>(x); }
inline long long __double_as_longlong(double x) { return emulate::bits_as<long long>(x); }
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += int8_t(a >> i) * int8_t(b >> i);
  return c;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned select) {
  const uint64_t both = uint64_t(b) << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned s = select >> 4 * i & 15, byte = unsigned(both >> 8 * (s & 7)) & 255;
    out |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return out;
}
template <typename T>
inline T __ldg(const T* at) {
  return *at;
}
template <typename T>
inline T __ldcg(const T* at) {
  return *at;
}
template <typename T>
inline T __ldcs(const T* at) {
  return *at;
}
template <typename T>
inline void __stcg(T* at, T x) {
  *at = x;
}
template <typename T>
inline void __stcs(T* at, T x) {
  *at = x;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline size_t __cvta_generic_to_shared(const void* at) { return size_t(at); }

#define EMULATE_ATOMIC(NAME, NEW)                 \
  template <typename T>                           \
  inline T NAME(T* at, std::common_type_t<T> x) { \
    const T old = *at;                            \
    *at = NEW;                                    \
    return old;                                   \
  }
EMULATE_ATOMIC(atomicAdd, T(old + x))
EMULATE_ATOMIC(atomicSub, T(old - x))
EMULATE_ATOMIC(atomicMax, x > old ? x : old)
EMULATE_ATOMIC(atomicMin, x < old ? x : old)
EMULATE_ATOMIC(atomicOr, old | x)
EMULATE_ATOMIC(atomicAnd, old& x)
EMULATE_ATOMIC(atomicXor, old ^ x)
EMULATE_ATOMIC(atomicExch, x)
#undef EMULATE_ATOMIC
template <typename T>
inline T atomicCAS(T* at, std::common_type_t<T> expected, std::common_type_t<T> x) {
  const T old = *at;
  if (old == expected) *at = x;
  return old;
}

// --- A warp together --------------------------------------------------------------------------------------

namespace emulate {

template <typename T>
struct Exchange {
  T in, out;
  int argument, width;
};
#define EMULATE_SHUFFLE(NAME, FROM)                                                                         \
  template <typename T>                                                                                     \
  inline T NAME(unsigned mask, T x, int argument, int width = 32) {                                         \
    emulate::Exchange<T> mine = {x, x, argument, width};                                                    \
    emulate::collective(#NAME, mask, &mine, [](void** of, unsigned mask) {                                  \
      for (unsigned rest = mask; rest; rest &= rest - 1) {                                                  \
        const int lane = __builtin_ctz(rest);                                                               \
        auto* const mine = static_cast<emulate::Exchange<T>*>(of[lane]);                                    \
        const int width = mine->width, first = lane & ~(width - 1), argument = mine->argument, from = FROM; \
        if (from < first || from >= first + width) continue;                                                \
        if (!(mask >> from & 1)) emulate::fail(#NAME ": lane %d takes from lane %d, absent", lane, from);   \
        mine->out = static_cast<emulate::Exchange<T>*>(of[from])->in;                                       \
      }                                                                                                     \
    });                                                                                                     \
    return mine.out;                                                                                        \
  }
}  // namespace emulate
EMULATE_SHUFFLE(__shfl_xor_sync, lane ^ argument)
EMULATE_SHUFFLE(__shfl_down_sync, lane + argument)
EMULATE_SHUFFLE(__shfl_up_sync, lane - argument)
EMULATE_SHUFFLE(__shfl_sync, first + (argument & (width - 1)))
#undef EMULATE_SHUFFLE

// One value of all lanes', for all.
#define EMULATE_REDUCE(NAME, IN, OUT, START, NEXT)                         \
  inline OUT NAME(unsigned mask, IN x) {                                   \
    struct Mine {                                                          \
      IN in;                                                               \
      OUT out;                                                             \
    } mine = {x, OUT()};                                                   \
    emulate::collective(#NAME, mask, &mine, [](void** of, unsigned mask) { \
      OUT all = START;                                                     \
      for (unsigned rest = mask; rest; rest &= rest - 1) {                 \
        const int lane = __builtin_ctz(rest);                              \
        const IN x = static_cast<Mine*>(of[lane])->in;                     \
        all = NEXT;                                                        \
      }                                                                    \
      for (unsigned rest = mask; rest; rest &= rest - 1)                   \
        static_cast<Mine*>(of[__builtin_ctz(rest)])->out = all;            \
    });                                                                    \
    return mine.out;                                                       \
  }
EMULATE_REDUCE(__any_sync, int, int, 0, all || x)
EMULATE_REDUCE(__all_sync, int, int, 1, all&& x)
EMULATE_REDUCE(__ballot_sync, int, unsigned, 0u, all | (x ? 1u << lane : 0u))
EMULATE_REDUCE(__reduce_max_sync, unsigned, unsigned, 0u, std::max(all, x))
EMULATE_REDUCE(__reduce_min_sync, unsigned, unsigned, ~0u, std::min(all, x))
EMULATE_REDUCE(__reduce_add_sync, unsigned, unsigned, 0u, all + x)
EMULATE_REDUCE(__reduce_or_sync, unsigned, unsigned, 0u, all | x)
#undef EMULATE_REDUCE
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulate::collective("__syncwarp", mask, nullptr, [](void**, unsigned) {});
}
#define __activemask() (emulate::fail("__activemask"), 0u)

// --- Instructions, by the names that build makes of `asm` -------------------------------------------------

namespace emulate {

inline void cp_async_cg_shared_global_L2__128B(unsigned to, const void* from, int bytes = 16) {
  copy_begin(to, from, bytes);
}
inline void cp_async_cg_shared_global(unsigned to, const void* from, int bytes = 16) {
  copy_begin(to, from, bytes);
}
inline void cp_async_commit_group() { copy_commit(); }
inline void cp_async_wait_group(int left) { copy_wait(size_t(left)); }
inline void cp_async_wait_all() { copy_commit(), copy_wait(0); }

// c [16, 8] += a [16, K] b [K, 8], an operand's registers holding N each. Products are exact and sums are
// rounded once; a GPU cuts its sums somewhere below, each in its own way.
template <typename Sum, typename C, int N, typename In>
inline void product(const char* what, C& c0, C& c1, C& c2, C& c3, const C (&from)[4], const uint32_t (&a)[4],
                    const uint32_t (&b)[2], In decode) {
  struct Mine {
    C c[4];
    uint32_t a[4], b[2];
    In decode;
  } mine = {{from[0], from[1], from[2], from[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}, decode};
  collective(what, 0xffffffffu, &mine, [](void** of, unsigned) {
    constexpr int K = 8 * N;
    Sum left[16][K], right[K][8], sums[16][8];
    for (int lane = 0; lane < 32; lane++) {
      const Mine* const m = static_cast<Mine*>(of[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; r++) {
        for (int i = 0; i < N; i++)
          left[g + 8 * (r % 2)][N * t + i + 4 * N * (r / 2)] = m->decode(m->a[r], i, 0);
      }
      for (int r = 0; r < 2; r++) {
        for (int i = 0; i < N; i++) right[N * t + i + 4 * N * r][g] = m->decode(m->b[r], i, 1);
      }
      for (int i = 0; i < 4; i++) sums[g + 8 * (i / 2)][2 * t + i % 2] = Sum(m->c[i]);
    }
    for (int row = 0; row < 16; row++) {
      for (int k = 0; k < K; k++) {
        for (int column = 0; column < 8; column++) sums[row][column] += left[row][k] * right[k][column];
      }
    }
    for (int lane = 0; lane < 32; lane++) {
      for (int i = 0; i < 4; i++)
        static_cast<Mine*>(of[lane])->c[i] = C(sums[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2]);
    }
  });
  c0 = mine.c[0], c1 = mine.c[1], c2 = mine.c[2], c3 = mine.c[3];
}
inline double half_of(uint32_t word, int i, int) { return half_float(uint16_t(word >> 16 * i)); }
inline double brain_of(uint32_t word, int i, int) { return brain_float(uint16_t(word >> 16 * i)); }
inline double tf32_of(uint32_t word, int, int) {
  if (word & 0x1fff) fail("an operand of a product in TF32 has lower bits");
  return bits_as<float>(word);
}
inline uint32_t byte_of(uint32_t word, int i, int) { return word >> 8 * i & 255; }
inline uint32_t right_signed_of(uint32_t word, int i, int right) {
  return right ? uint32_t(int8_t(word >> 8 * i)) : word >> 8 * i & 255;
}
inline uint32_t signed_of(uint32_t word, int i, int) { return uint32_t(int8_t(word >> 8 * i)); }
#define EMULATE_MMA(NAME, SUM, C, N, DECODE)                                                         \
  inline void NAME(C& c0, C& c1, C& c2, C& c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,   \
                   uint32_t b0, uint32_t b1) {                                                       \
    product<SUM, C, N>(#NAME, c0, c1, c2, c3, {c0, c1, c2, c3}, {a0, a1, a2, a3}, {b0, b1}, DECODE); \
  }                                                                                                  \
  inline void NAME(C& c0, C& c1, C& c2, C& c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,   \
                   uint32_t b0, uint32_t b1, C f0, C f1, C f2, C f3) {                               \
    product<SUM, C, N>(#NAME, c0, c1, c2, c3, {f0, f1, f2, f3}, {a0, a1, a2, a3}, {b0, b1}, DECODE); \
  }
EMULATE_MMA(mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32, double, float, 2, half_of)
EMULATE_MMA(mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32, double, float, 2, brain_of)
EMULATE_MMA(mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32, double, float, 1, tf32_of)
EMULATE_MMA(mma_sync_aligned_m16n8k32_row_col_s32_u8_u8_s32, uint32_t, int32_t, 4, byte_of)
EMULATE_MMA(mma_sync_aligned_m16n8k32_row_col_s32_u8_s8_s32, uint32_t, int32_t, 4, right_signed_of)
EMULATE_MMA(mma_sync_aligned_m16n8k32_row_col_s32_s8_s8_s32, uint32_t, int32_t, 4, signed_of)
#undef EMULATE_MMA

template <bool TRANSPOSED>
inline void load_matrices_of(const char* what, uint32_t (&r)[4], unsigned address) {
  struct Mine {
    const uint16_t* row;
    uint32_t r[4];
  } mine = {static_cast<const uint16_t*>(shared_pointer(address, 16)), {}};
  collective(what, 0xffffffffu, &mine, [](void** of, unsigned) {
    for (int lane = 0; lane < 32; lane++) {
      for (int m = 0; m < 4; m++) {
        uint32_t both = 0;
        for (int j = 0; j < 2; j++) {
          const int pair = 2 * (lane % 4) + j, row = TRANSPOSED ? pair : lane / 4,
                    column = TRANSPOSED ? lane / 4 : pair;
          both |= uint32_t(static_cast<Mine*>(of[8 * m + row])->row[column]) << 16 * j;
        }
        static_cast<Mine*>(of[lane])->r[m] = both;
      }
    }
  });
  memcpy(r, mine.r, sizeof r);
}
inline void ldmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3,
                                                     unsigned address) {
  uint32_t r[4];
  load_matrices_of<false>("ldmatrix", r, address);
  r0 = r[0], r1 = r[1], r2 = r[2], r3 = r[3];
}
inline void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t& r0, uint32_t& r1, uint32_t& r2,
                                                           uint32_t& r3, unsigned address) {
  uint32_t r[4];
  load_matrices_of<true>("ldmatrix.trans", r, address);
  r0 = r[0], r1 = r[1], r2 = r[2], r3 = r[3];
}
inline void movmatrix_sync_aligned_m8n8_trans_b16(uint32_t& to, uint32_t from) {
  struct Mine {
    uint32_t in, out;
  } mine = {from, 0};
  collective("movmatrix", 0xffffffffu, &mine, [](void** of, unsigned) {
    uint16_t m[8][8];
    for (int lane = 0; lane < 32; lane++) {
      for (int i = 0; i < 2; i++)
        m[lane / 4][lane % 4 * 2 + i] = uint16_t(static_cast<Mine*>(of[lane])->in >> 16 * i);
    }
    for (int lane = 0; lane < 32; lane++) {
      const int column = lane / 4, row = lane % 4 * 2;
      static_cast<Mine*>(of[lane])->out = m[row][column] | uint32_t(m[row + 1][column]) << 16;
    }
  });
  to = mine.out;
}
inline void fma_rn_f16x2(uint32_t& d, uint32_t a, uint32_t b, uint32_t c) {
  uint32_t both = 0;
  for (int i = 0; i < 2; i++) {
    const double sum = half_of(a, i, 0) * half_of(b, i, 0) + half_of(c, i, 0);
    both |= uint32_t(__half(sum).bits) << 16 * i;
  }
  d = both;
}
inline void ex2_approx_ftz_f32(float& y, float x) {
  y = exp2f(fabsf(x) < 0x1p-126f ? 0.0f : x);
  if (y < 0x1p-126f) y = 0.0f;
}

// --- How a module names its kernels -----------------------------------------------------------------------

constexpr int first_of(int x, int = 0, int = 0) { return x; }
template <auto F>
struct Entry;
template <typename... A, void (*F)(A...)>
struct Entry<F> {
  template <size_t... I>
  static void call_each(void* const* at, std::index_sequence<I...>) {
    F(*static_cast<const A*>(at[I])...);
  }
  static void call(void* const* at) { call_each(at, std::index_sequence_for<A...>()); }
  static constexpr size_t count = sizeof...(A);
  static constexpr Parameter parameters[] = {{sizeof(A), std::is_pointer_v<A>}..., {0, false}};
};
#define EMULATE_KERNEL(NAME, THREADS)                                                           \
  {#NAME, emulate::Entry<&NAME>::call, emulate::first_of THREADS, emulate::Entry<&NAME>::count, \
   emulate::Entry<&NAME>::parameters},

}  // namespace emulate
