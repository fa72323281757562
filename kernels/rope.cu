// Rotary position embedding in the order of halves (src/kernels/rope.rs).
//
//     y_i       = x_i c_i - x_(i + d/2) s_i          i < d/2, c and s of the row positions[t] of the tables
//     y_(i+d/2) = x_(i + d/2) c_i + x_i s_i          dx: the same with -s
//
// x and y [tokens, heads * d], of any float type, cos and sin [positions, d/2] in f32. A thread turns 16
// bytes of pairs of one head at a time, or one pair where d/2 is no multiple of that; threads x walk the
// pairs of a token, threads y and blocks the tokens. y may be x.
//
// Bytes moved of an f16 element: 4; the tables stay in the cache.
//
//     threads     x: the least power of two >= heads * d/2 / (pairs of a step), 256 at most; y = 256 / x
#include "arith/rows.h"
#include "common.cuh"

template <int N, typename T>
__device__ __forceinline__ void rotate(const T* x, const uint32_t* positions, const float* cos,
                                       const float* sin, T* y, int64_t tokens, int heads, int half,
                                       float sign) {
  const int steps = heads * (half / N);
  const int64_t width = int64_t(heads) * 2 * half;
  const int64_t stride = int64_t(gridDim.x) * blockDim.y;
  for (int64_t t = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; t < tokens; t += stride) {
    const int64_t table = int64_t(positions[t]) * half;
    for (int step = threadIdx.x; step < steps; step += blockDim.x) {
      const int i = step % (half / N) * N;
      const int64_t at = t * width + int64_t(step / (half / N)) * 2 * half + i;
      float low[N], high[N], first[N], second[N];
      load_floats<N>(x + at, low);
      load_floats<N>(x + at + half, high);
#pragma unroll
      for (int j = 0; j < N; j++) {
        const float c = cos[table + i + j], s = sign * sin[table + i + j];
        first[j] = rope_first(low[j], high[j], c, s);
        second[j] = rope_second(low[j], high[j], c, s);
      }
      store_floats<N>(y + at, first);
      store_floats<N>(y + at + half, second);
    }
  }
}

// sign: 1, or -1 for the gradient.
#define ROPE(suffix, T)                                                                              \
  extern "C" __global__ void __launch_bounds__(256)                                                  \
      rope_##suffix(const T* x, const uint32_t* positions, const float* cos, const float* sin, T* y, \
                    int64_t tokens, int heads, int half, float sign) {                               \
    if (half % WIDE<T> == 0 && aligned(x, 16) && aligned(y, 16)) {                                   \
      rotate<WIDE<T>>(x, positions, cos, sin, y, tokens, heads, half, sign);                         \
    } else {                                                                                         \
      rotate<1>(x, positions, cos, sin, y, tokens, heads, half, sign);                               \
    }                                                                                                \
  }

FOR_EACH_TYPE(ROPE)
