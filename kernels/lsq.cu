// LSQ (src/kernels/fake_quant/lsq.rs and site.rs): x seen as rows of `width`, of which `parts` lie side by
// side on the last axis of the tensor; shifts along that whole axis.
//
//   v = (x + shift) / se     se = max(s, 1e-5)     q = rne(clamp(v, lo, hi))     y = q se (+ shift_out)
//   inside = lo <= v <= hi     dx = g inside     dshift = sum dx     dshift_out = sum g
//   ds = sum g (q - v inside) / sqrt(hi m), over the m elements that share the scale
//
// Scales and shifts are f32, whatever x is, and so are their gradients. The scale of row r is number
// (r / rows_per_scale) % scales: tokens, rows of a weight, and with scales = 1 the whole tensor; or each
// column of a row has its own (COLUMNS, one part).
//
// A team of threads walks along rows, each thread on V columns of them (a 16-byte access, or one element).
// Teams are a multiple of `parts` in number, so a team's rows are all of one part and its thread keeps the
// shifts, and the sums over rows of their gradients, in registers; the scale's number is stepped along,
// without division. Sums over a row are butterflies within a warp; what is left of them, and the sums of each
// team, a second kernel adds in index order in f64. The order depends on sizes, team and grid alone.
//
// Bytes moved, of an element of b bytes: values 2b, codes b + 4, gradients 3b and one float for each warp and
// row, or for each column and team.
//
// Launch: V = wide ? 16 / b : 1, units = ceil(width / V); `team`, the threads along a row, is a power of two
// up to 32 or a multiple of 32, of which blockDim.x (256 at most, whole warps) is a multiple; gridDim.y =
// ceil(units / team); gridDim.x a multiple of `parts`. wide = 1 needs width % V == 0 and 16-byte addresses of
// x, y, codes, g and dx. Rows and columns are below 2^31, elements are counted in 64 bits.

#include "arith/quantize.h"
#include "common.cuh"

// How elements share scales.
enum Kind { ROWS, COLUMNS, TENSOR };

struct Site {
  const float* s;
  const float* shift;      // [parts * width] or null
  const float* shift_out;  // the same
  uint32_t rows, width, parts;
  uint32_t rows_per_scale, scales;
  float lo, hi;
};

// The number of a row's scale, for rows `stride` apart.
class ScaleOf {
  uint32_t rest, scale, rest_step, scale_step, rows_per_scale, scales;

 public:
  __device__ __forceinline__ ScaleOf(const Site& site, uint32_t row, uint32_t stride)
      : rest(row % site.rows_per_scale),
        scale(row / site.rows_per_scale % site.scales),
        rest_step(stride % site.rows_per_scale),
        scale_step(stride / site.rows_per_scale % site.scales),
        rows_per_scale(site.rows_per_scale),
        scales(site.scales) {}

  __device__ __forceinline__ uint32_t number() const { return scale; }

  __device__ __forceinline__ void next() {
    rest += rest_step;
    scale += scale_step;
    if (rest >= rows_per_scale) {
      rest -= rows_per_scale;
      scale++;
    }
    if (scale >= scales) scale -= scales;
  }
};

// A thread's place: its team among all, its columns.
struct Place {
  uint32_t team, teams;
  uint32_t at, column;
  uint32_t along;  // of its columns in the whole last axis

  __device__ __forceinline__ Place(const Site& site, uint32_t threads, uint32_t v) {
    const uint32_t in_block = blockDim.x / threads;
    team = blockIdx.x * in_block + threadIdx.x / threads;
    teams = gridDim.x * in_block;
    at = blockIdx.y * threads + threadIdx.x % threads;
    column = at * v;
    along = team % site.parts * site.width + column;
  }

  // The place of its columns of a row among all elements.
  __device__ __forceinline__ uint64_t of_row(const Site& site, uint32_t row) const {
    return uint64_t(row) * site.width + column;
  }
};

template <int V>
__device__ __forceinline__ void per_column(const float* from, uint32_t at, float (&x)[V]) {
#pragma unroll
  for (int v = 0; v < V; v++) x[v] = from == nullptr ? 0.0f : from[at + v];
}

template <bool CODES, bool BY_COLUMN, int V, typename T>
__device__ __forceinline__ void forward(const Site& site, const T* x, T* y, float* codes, uint32_t threads) {
  // Rows in flight. More would take the registers of threads, which are in flight too.
  constexpr int ROWS = V == 1 ? 8 : V == 4 ? 4 : 2;
  const Place place(site, threads, V);
  if (place.column >= site.width) return;
  float before[V], behind[V], own[V];
  per_column(site.shift, place.along, before);
  per_column(site.shift_out, place.along, behind);
  if (BY_COLUMN) per_column(site.s, place.column, own);
  const bool shifted = site.shift_out != nullptr;
  ScaleOf of(site, place.team, place.teams);
  for (uint32_t first = place.team; first < site.rows; first += ROWS * place.teams) {
    Pack<T, V> rows[ROWS];
    float scales[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const uint32_t row = first + i * place.teams;
      if (row < site.rows) {
        rows[i] = load<V>(x + place.of_row(site, row));
        if (!BY_COLUMN) scales[i] = site.s[of.number()];
      }
      of.next();
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const uint32_t row = first + i * place.teams;
      if (row >= site.rows) continue;
      float out[V];
#pragma unroll
      for (int v = 0; v < V; v++) {
        const float scale = lsq_scale_of(BY_COLUMN ? own[v] : scales[i]), e = to_float(rows[i].at[v]);
        if (CODES) {
          out[v] = lsq_code(e, before[v], scale, site.lo, site.hi);
        } else if (shifted) {
          out[v] = lsq_value_shifted(e, before[v], scale, site.lo, site.hi, behind[v]);
        } else {
          out[v] = lsq_value(e, before[v], scale, site.lo, site.hi);
        }
      }
      if constexpr (CODES) {
        store_floats(codes + place.of_row(site, row), out);
      } else {
        store_floats(y + place.of_row(site, row), out);
      }
    }
  }
}

template <bool CODES, typename T>
__device__ __forceinline__ void choose_forward(const Site& site, const T* x, T* y, float* codes,
                                               bool by_column, uint32_t threads, int wide) {
  if (wide) {
    if (by_column) {
      forward<CODES, true, WIDE<T>>(site, x, y, codes, threads);
    } else {
      forward<CODES, false, WIDE<T>>(site, x, y, codes, threads);
    }
  } else {
    if (by_column) {
      forward<CODES, true, 1>(site, x, y, codes, threads);
    } else {
      forward<CODES, false, 1>(site, x, y, codes, threads);
    }
  }
}

// What a backward pass leaves: dx whole, the rest for `lsq_fold_scales` and `lsq_fold_columns`.
template <typename T>
struct Grads {
  T* dx;
  float* scale_sums;  // ROWS [rows, warps], COLUMNS [teams, width], TENSOR [teams, warps]; warps along a row
  float* shift_sums;  // [teams, width], or null
  float* out_sums;    // [teams, width], or null
};

template <Kind KIND, int V, typename T>
__device__ __forceinline__ void backward(const Site& site, const T* x, const T* g, const Grads<T>& to,
                                         uint32_t threads) {
  constexpr int ROWS_AT_ONCE = V == 1 ? 4 : 2;
  const Place place(site, threads, V);
  const bool inside = place.column < site.width;
  const uint32_t lanes = threads < uint32_t(WARP) ? threads : WARP;
  // Of the warps along a row, this one; the first of its lanes writes.
  const uint32_t warps = gridDim.y * (threads / lanes), warp = place.at / lanes;
  const bool writes = place.at % lanes == 0;
  float before[V], own[V], shift_sum[V], out_sum[V], scale_sum[V];
#pragma unroll
  for (int v = 0; v < V; v++) before[v] = own[v] = shift_sum[v] = out_sum[v] = scale_sum[v] = 0.0f;
  if (inside) {
    per_column(site.shift, place.along, before);
    if (KIND == COLUMNS) per_column(site.s, place.column, own);
  }
  ScaleOf of(site, place.team, place.teams);
  // A warp takes all turns together: teams of few lanes share it.
  for (uint32_t first = 0; first < site.rows; first += ROWS_AT_ONCE * place.teams) {
    Pack<T, V> xs[ROWS_AT_ONCE], gs[ROWS_AT_ONCE];
    float scales[ROWS_AT_ONCE];
#pragma unroll
    for (int i = 0; i < ROWS_AT_ONCE; i++) {
      const uint32_t row = first + i * place.teams + place.team;
      if (inside && row < site.rows) {
        xs[i] = load<V>(x + place.of_row(site, row));
        gs[i] = load<V>(g + place.of_row(site, row));
        if (KIND != COLUMNS) scales[i] = site.s[of.number()];
      }
      of.next();
    }
#pragma unroll
    for (int i = 0; i < ROWS_AT_ONCE; i++) {
      const uint32_t row = first + i * place.teams + place.team;
      float of_row = 0.0f;
      if (inside && row < site.rows) {
        float dx[V];
#pragma unroll
        for (int v = 0; v < V; v++) {
          const float scale = lsq_scale_of(KIND == COLUMNS ? own[v] : scales[i]), dy = to_float(gs[i].at[v]);
          const float steps = lsq_steps(to_float(xs[i].at[v]), before[v], scale);
          const float share = lsq_grad_scale(steps, site.lo, site.hi, dy);
          dx[v] = lsq_grad_x(steps, site.lo, site.hi, dy);
          shift_sum[v] += dx[v];
          out_sum[v] += dy;
          if (KIND == ROWS) {
            of_row += share;
          } else {
            scale_sum[v] += share;
          }
        }
        store_floats(to.dx + place.of_row(site, row), dx);
      }
      if (KIND == ROWS) {
        of_row = warp_sum(of_row, lanes);
        if (writes && row < site.rows) to.scale_sums[uint64_t(row) * warps + warp] = of_row;
      }
    }
  }
  if (KIND == TENSOR) {
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < V; v++) sum += scale_sum[v];
    sum = warp_sum(sum, lanes);
    if (writes) to.scale_sums[uint64_t(place.team) * warps + warp] = sum;
  }
  if (!inside) return;
  const uint64_t at = place.of_row(site, place.team);
#pragma unroll
  for (int v = 0; v < V; v++) {
    if (KIND == COLUMNS) to.scale_sums[at + v] = scale_sum[v];
    if (to.shift_sums != nullptr) to.shift_sums[at + v] = shift_sum[v];
    if (to.out_sums != nullptr) to.out_sums[at + v] = out_sum[v];
  }
}

template <int V, typename T>
__device__ __forceinline__ void choose_backward(const Site& site, const T* x, const T* g, const Grads<T>& to,
                                                int kind, uint32_t threads) {
  if (kind == ROWS) {
    backward<ROWS, V>(site, x, g, to, threads);
  } else if (kind == COLUMNS) {
    backward<COLUMNS, V>(site, x, g, to, threads);
  } else {
    backward<TENSOR, V>(site, x, g, to, threads);
  }
}

// ds[j] = factor * the sum of what the rows with scale j left: `outer` runs of `run` floats, `scales` runs
// apart (ROWS: run = rows_per_scale * warps, outer = rows / (rows_per_scale * scales); TENSOR: run = teams *
// warps, outer = 1). One block for each scale, 1024 threads at most.
extern "C" __global__ void __launch_bounds__(1024)
    lsq_fold_scales(const float* sums, float* ds, uint32_t scales, uint32_t outer, uint32_t run,
                    double factor) {
  __shared__ double scratch[WARP];
  for (uint32_t scale = blockIdx.x; scale < scales; scale += gridDim.x) {
    double total = 0.0;
    const uint64_t count = uint64_t(outer) * run;
    for (uint64_t i = threadIdx.x; i < count; i += blockDim.x) {
      const uint64_t turn = i / run;
      total += double(sums[(turn * scales + scale) * run + (i - turn * run)]);
    }
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) ds[scale] = float(total * factor);
  }
}

// out[c] = factor * the sum over the rows of sums [rows, width]: shifts with width = parts * width and rows =
// teams / parts; scales of COLUMNS. Each warp takes every so manieth row of 32 columns. Any grid, 1024
// threads at most.
extern "C" __global__ void __launch_bounds__(1024)
    lsq_fold_columns(const float* sums, float* out, int64_t rows, int64_t width, double factor) {
  __shared__ double scratch[WARP][WARP];
  const int warps = int(blockDim.x) / WARP;
  for (int64_t tile = blockIdx.x; tile * WARP < width; tile += gridDim.x) {
    const int64_t column = tile * WARP + lane_of();
    double total = 0.0;
    if (column < width) {
#pragma unroll 4
      for (int64_t row = warp_of(); row < rows; row += warps) total += double(sums[row * width + column]);
    }
    scratch[warp_of()][lane_of()] = total;
    __syncthreads();
    if (warp_of() == 0 && column < width) {
      for (int warp = 1; warp < warps; warp++) total += scratch[warp][lane_of()];
      out[column] = float(total * factor);
    }
    __syncthreads();
  }
}

#define SITE_ARGUMENTS                                                                                       \
  uint32_t rows, uint32_t width, uint32_t parts, uint32_t rows_per_scale, uint32_t scales, int32_t kind,     \
      float lo, float hi, uint32_t team, int32_t wide

// kind: 0 rows, 1 columns, 2 the tensor. Shifts and their sums may be null.
#define KERNELS(NAME, T)                                                                                     \
  extern "C" __global__ void __launch_bounds__(256, 3) lsq_##NAME(                                           \
      const T* x, const float* s, const float* shift, const float* shift_out, T* y, SITE_ARGUMENTS) {        \
    const Site site = {s, shift, shift_out, rows, width, parts, rows_per_scale, scales, lo, hi};             \
    choose_forward<false>(site, x, y, nullptr, kind == COLUMNS, team, wide);                                 \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(256, 3) lsq_codes_##NAME(                                     \
      const T* x, const float* s, const float* shift, float* codes, SITE_ARGUMENTS) {                        \
    const Site site = {s, shift, nullptr, rows, width, parts, rows_per_scale, scales, lo, hi};               \
    choose_forward<true, T>(site, x, nullptr, codes, kind == COLUMNS, team, wide);                           \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(256, 2) lsq_grad_##NAME(                                      \
      const T* x, const T* g, const float* s, const float* shift, T* dx, float* scale_sums,                  \
      float* shift_sums, float* out_sums, SITE_ARGUMENTS) {                                                  \
    const Site site = {s, shift, nullptr, rows, width, parts, rows_per_scale, scales, lo, hi};               \
    const Grads<T> to = {dx, scale_sums, shift_sums, out_sums};                                              \
    if (wide) {                                                                                              \
      choose_backward<WIDE<T>>(site, x, g, to, kind, team);                                                  \
    } else {                                                                                                 \
      choose_backward<1>(site, x, g, to, kind, team);                                                        \
    }                                                                                                        \
  }

FOR_EACH_TYPE(KERNELS)
