// GELU in its erf form, SwiGLU and the rectifier with their gradients, elementwise (src/kernels/gelu.rs,
// swiglu.rs, relu.rs).
//
//     gelu     y = x Phi(x)             dx = dy (Phi(x) + x exp(-x^2/2) / sqrt(2 pi))
//     swiglu   y = silu(gate) up        dgate = dy up s (1 + gate (1 - s)), dup = dy gate s
//              s = sigmoid(gate), silu(gate) = gate s
//     relu     y = x < 0 ? 0 : x        dx = x > 0 ? dy : 0                   NaN stays NaN
//
// A thread takes 16 bytes of each operand at a time; what is left at the end, or all where an operand is not
// aligned, element by element. A result may be an operand.
//
// Bytes moved of an f16 element: gelu and relu 4, their gradients 6; swiglu 6, its gradient 10.
//
//     threads     256; blocks: any number, of 256 * 16 bytes each to cover the tensor
#include "arith/functions.h"
#include "arith/relu.h"
#include "common.cuh"

template <int N>
struct Run {
  static constexpr int COUNT = N;
};

// f(i, Run<N>) for runs of N elements, then f(i, Run<1>) for single ones.
template <typename T, typename F>
__device__ __forceinline__ void each(int64_t count, bool wide, F f) {
  constexpr int N = WIDE<T>;
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  const int64_t runs = wide ? count / N : 0;
  for (int64_t run = thread; run < runs; run += threads) f(run * N, Run<N>());
  for (int64_t i = runs * N + thread; i < count; i += threads) f(i, Run<1>());
}

template <typename T, typename F>
__device__ __forceinline__ void unary(const T* x, T* y, int64_t count, F f) {
  each<T>(count, aligned(x, 16) && aligned(y, 16), [&](int64_t at, auto run) {
    constexpr int N = decltype(run)::COUNT;
    float v[N];
    load_floats<N>(x + at, v);
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = f(v[i]);
    store_floats<N>(y + at, v);
  });
}

template <typename T, typename F>
__device__ __forceinline__ void binary(const T* a, const T* b, T* y, int64_t count, F f) {
  each<T>(count, aligned(a, 16) && aligned(b, 16) && aligned(y, 16), [&](int64_t at, auto run) {
    constexpr int N = decltype(run)::COUNT;
    float v[N], w[N];
    load_floats<N>(a + at, v);
    load_floats<N>(b + at, w);
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = f(v[i], w[i]);
    store_floats<N>(y + at, v);
  });
}

template <typename T>
__device__ __forceinline__ void swiglu_backward(const T* gate, const T* up, const T* g, T* dgate, T* dup,
                                                int64_t count) {
  const bool wide =
      aligned(gate, 16) && aligned(up, 16) && aligned(g, 16) && aligned(dgate, 16) && aligned(dup, 16);
  each<T>(count, wide, [&](int64_t at, auto run) {
    constexpr int N = decltype(run)::COUNT;
    float a[N], b[N], dy[N];
    load_floats<N>(gate + at, a);
    load_floats<N>(up + at, b);
    load_floats<N>(g + at, dy);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float left = swiglu_grad_gate(a[i], b[i], dy[i]);
      b[i] = swiglu_grad_up(a[i], dy[i]);
      a[i] = left;
    }
    store_floats<N>(dgate + at, a);
    store_floats<N>(dup + at, b);
  });
}

#define ACTIVATIONS(suffix, T)                                                                        \
  extern "C" __global__ void __launch_bounds__(256) gelu_##suffix(const T* x, T* y, int64_t count) {  \
    unary(x, y, count, [](float v) { return gelu(v); });                                              \
  }                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256)                                                   \
      gelu_grad_##suffix(const T* x, const T* g, T* dx, int64_t count) {                              \
    binary(x, g, dx, count, [](float v, float dy) { return gelu_grad(v, dy); });                      \
  }                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256) relu_##suffix(const T* x, T* y, int64_t count) {  \
    unary(x, y, count, [](float v) { return relu(v); });                                              \
  }                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256)                                                   \
      relu_grad_##suffix(const T* x, const T* g, T* dx, int64_t count) {                              \
    binary(x, g, dx, count, [](float v, float dy) { return relu_grad(v, dy); });                      \
  }                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256)                                                   \
      swiglu_##suffix(const T* gate, const T* up, T* y, int64_t count) {                              \
    binary(gate, up, y, count, [](float a, float b) { return swiglu(a, b); });                        \
  }                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256)                                                   \
      swiglu_grad_##suffix(const T* gate, const T* up, const T* g, T* dgate, T* dup, int64_t count) { \
    swiglu_backward(gate, up, g, dgate, dup, count);                                                  \
  }

FOR_EACH_TYPE(ACTIVATIONS)
