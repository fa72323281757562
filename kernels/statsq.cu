// StatsQ (src/kernels/fake_quant/statsq.rs), w: [R, K], n = 2^(bits-1), a scale for each unit: a row, or a
// group of its columns (the last group of a row holds what is left).
//
//   s = 2 mean |w|     step = s / n     k = clamp(rne(w / step - 1/2), -n, n - 1)     y = step (k + 1/2)
//   free(w) = exists j in {-(n-1), .., n-1}: |n clamp(w / s, -1, 1) - j| <= band     dL/dw = free(w) dL/dy
//
// A unit belongs to a team: 8 lanes up to 64 columns, a warp up to 512, beyond that the block. Each thread
// keeps up to 16 elements in registers, so that the second use of w, which needs the scale of the whole unit,
// reads nothing; a unit of more than that is read twice, the second time from L2. Sizes are summed in f64 and
// in an order that the team alone sets, so scales do not depend on the grid; they are those of the CPU unless
// the roundings of an f64 sum fall on the border between two f32.
//
// Bytes moved, of an element of b bytes: values 2b, codes b + 4, scales b, free entries b + 4, gradients 3b.
//
// Launch: blocks of whole warps along x, 1024 threads at most, 512 for gradients; any grid, units are strided
// over it. Up to 512 columns in a unit 128 threads spread small weights over the multiprocessors; above, as
// many as hold a unit at 16 elements a thread. Wide accesses are taken where columns, group and addresses
// allow them; without them a thread keeps 8 elements and a warp takes 256 columns. Units, and the elements of
// one, are fewer than 2^31. y may be w, and dw may be g.

#include "arith/quantize.h"
#include "common.cuh"

// Elements of a unit in a thread's registers, moved V at a time.
template <int V>
constexpr int KEPT = V == 1 ? 8 : 16;
// Up to so many columns a unit is left to so many lanes.
constexpr int FEW = 64, FEW_LANES = 8;

enum Emit { SCALE, VALUES, CODES, FREE, GRAD };

template <typename T>
struct Work {
  const T* w;
  const T* g;     // GRAD
  T* y;           // VALUES, GRAD
  float* floats;  // CODES, FREE
  float* scale;   // or null
  int64_t rows, cols, group;
  float n, band;
};

// V neighbours at `at`: x of them in w, and for GRAD g their gradients.
template <Emit EMIT, typename T, int V>
__device__ __forceinline__ void emit(const Work<T>& work, int64_t at, const Pack<T, V>& x,
                                     const Pack<T, V>& g, float scale) {
  const float n = work.n, step = statsq_step_of(scale, n);
  float out[V];
#pragma unroll
  for (int v = 0; v < V; v++) {
    const float w = to_float(x.at[v]);
    if constexpr (EMIT == VALUES) out[v] = grid_round(w, step, 0.5f, -n, n - 1.0f);
    if constexpr (EMIT == CODES) out[v] = grid_code(w, step, 0.5f, -n, n - 1.0f);
    if constexpr (EMIT == FREE) out[v] = statsq_free(w, scale, n, work.band);
    if constexpr (EMIT == GRAD) out[v] = statsq_grad(w, scale, n, work.band, to_float(g.at[v]));
  }
  if constexpr (EMIT == VALUES || EMIT == GRAD) store_floats(work.y + at, out);
  if constexpr (EMIT == CODES || EMIT == FREE) store_floats(work.floats + at, out);
}

template <typename T, int V>
__device__ __forceinline__ double sizes(const Pack<T, V>& x) {
  double sum = 0.0;
#pragma unroll
  for (int v = 0; v < V; v++) sum += double(fabsf(to_float(x.at[v])));
  return sum;
}

// Thread `t` of a team has V neighbours at t * V of a unit, and again every team * V.
template <typename T, int V, Emit EMIT>
__device__ __forceinline__ void walk(const Work<T>& work) {
  __shared__ double scratch[WARP];
  constexpr int COUNT = KEPT<V> / V;
  const int cols = int(work.cols), group = work.group < work.cols ? int(work.group) : cols;
  const int team = group <= FEW ? FEW_LANES : group <= WARP * KEPT<V> ? WARP : int(blockDim.x);
  const int mine = int(threadIdx.x) % team * V, apart = team * V;
  const unsigned groups = unsigned(cols + group - 1) / group, units = unsigned(work.rows) * groups;
  const unsigned teams = blockDim.x / team;
  const bool fits = group <= team * KEPT<V>;
  for (unsigned first = blockIdx.x * teams; first < units; first += gridDim.x * teams) {
    const unsigned unit = first + threadIdx.x / team;
    int64_t base = int64_t(unit) * group;
    // A team without a unit goes along, since a sum needs its whole warp.
    int length = unit < units ? group : 0;
    if (groups * group != unsigned(cols)) {
      const unsigned row = unit / groups;
      const int column = int(unit - row * groups) * group;
      base = int64_t(row) * cols + column;
      if (length > cols - column) length = cols - column;
    }
    Pack<T, V> kept[COUNT];
    double total = 0.0;
    if (fits) {
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        if (mine + i * apart < length) kept[i] = load<V>(work.w + base + (mine + i * apart));
      }
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        if (mine + i * apart < length) total += sizes(kept[i]);
      }
    } else {
#pragma unroll 4
      for (int at = mine; at < length; at += apart) total += sizes(load<V>(work.w + base + at));
    }
    total = team > WARP ? block_sum(total, scratch) : warp_sum(total, team);
    if (length == 0) continue;
    const float scale = statsq_scale_of(total, double(length));
    if (work.scale != nullptr && mine == 0) work.scale[unit] = scale;
    if constexpr (EMIT == SCALE) continue;
    if (fits) {
      // All loads before the first store, which might alias them.
      Pack<T, V> g[COUNT];
      if constexpr (EMIT == GRAD) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
          if (mine + i * apart < length) g[i] = load<V>(work.g + base + (mine + i * apart));
        }
      }
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        if (mine + i * apart < length) emit<EMIT>(work, base + (mine + i * apart), kept[i], g[i], scale);
      }
    } else {
      for (int at = mine; at < length; at += apart) {
        const Pack<T, V> x = load<V>(work.w + base + at);
        Pack<T, V> g;
        if constexpr (EMIT == GRAD) g = load<V>(work.g + base + at);
        emit<EMIT>(work, base + at, x, g, scale);
      }
    }
  }
}

template <Emit EMIT, typename T>
__device__ __forceinline__ void statsq(const Work<T>& work) {
  constexpr int V = WIDE<T>;
  const bool whole = work.cols % V == 0 && (work.group % V == 0 || work.group >= work.cols);
  if (whole && aligned(work.w, 16) && aligned(work.g, 16) && aligned(work.y, 16) &&
      aligned(work.floats, 16)) {
    walk<T, V, EMIT>(work);
  } else {
    walk<T, 1, EMIT>(work);
  }
}

// `scale` [rows, groups] may be null but in statsq_scale; codes are whole floats, free entries 1 or 0.
// group = cols: a scale for each row.
#define KERNELS(NAME, T)                                                                                     \
  extern "C" __global__ void __launch_bounds__(1024)                                                         \
      statsq_##NAME(const T* w, T* y, float* scale, int64_t rows, int64_t cols, int64_t group, float n) {    \
    statsq<VALUES>(Work<T>{w, nullptr, y, nullptr, scale, rows, cols, group, n, 0.0f});                      \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(1024) statsq_codes_##NAME(                                    \
      const T* w, float* codes, float* scale, int64_t rows, int64_t cols, int64_t group, float n) {          \
    statsq<CODES>(Work<T>{w, nullptr, nullptr, codes, scale, rows, cols, group, n, 0.0f});                   \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(1024)                                                         \
      statsq_scale_##NAME(const T* w, float* scale, int64_t rows, int64_t cols, int64_t group) {             \
    statsq<SCALE>(Work<T>{w, nullptr, nullptr, nullptr, scale, rows, cols, group, 1.0f, 0.0f});              \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(1024) statsq_free_##NAME(                                     \
      const T* w, float* free, int64_t rows, int64_t cols, int64_t group, float n, float band) {             \
    statsq<FREE>(Work<T>{w, nullptr, nullptr, free, nullptr, rows, cols, group, n, band});                   \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(512) statsq_grad_##NAME(                                      \
      const T* w, const T* g, T* dw, int64_t rows, int64_t cols, int64_t group, float n, float band) {       \
    statsq<GRAD>(Work<T>{w, g, dw, nullptr, nullptr, rows, cols, group, n, band});                           \
  }

FOR_EACH_TYPE(KERNELS)
