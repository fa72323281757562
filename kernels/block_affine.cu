// Bone: the block-affine weight and its gradient (src/kernels/block_affine.rs), and the sums over slices of
// MiSS (block_sum.rs).
//
//     block_affine        W'_pq = W_pq + W_pq B_p + B_p      W [O, I], B [O/r, r, r], p < O/r, q < I/r
//     block_affine_grad   dB_p = sum_q (W_pq^T G_pq + G_pq)  G = dy^T x [O, I] in f32, by cuBLAS
//     block_sum           s[t, j] = sum_b x[t, b r + j]      x [tokens, I], j < r, b r + j < I
//     block_sum_grad      dx[t, i] = ds[t, i mod r]     block_sum_onto   dx[t, i] += ds[t, i mod r]
//
// Row after row, the r rows of block p are I slices of r, so W_pq B_p over all q is one product [I, r] [r, r]
// and the sum of dB_p another, [r, I] [I, r]; slice s lies in row s / (I/r) of its block, which is the row of
// B_p that is added to it. W' is made and G is read by panels of whole blocks, so that neither is ever there
// as a whole: the launcher walks panels, with y = x W'^T and dx = dy W' by cuBLAS between.
//
// Both products run on tensor cores in TF32, whose 11 bits hold a half of either kind whole. An f32 operand
// is the sum of two such numbers, 22 bits, and f32 weights times f32 are three products, so a term is off by
// 2^-20 of its size at most, about as much as the rounding of the sums; an infinity may become NaN. W and B
// are added in f32, G as a product with ones.
//
// block_affine: a block has 128 slices and TILE columns, the least of 16, 32, 64 that holds r, else 64 at a
// time; a warp 32 slices. block_affine_grad: a block has TILE by TILE entries of dB_p; 4 warps share a tile
// of 64, and smaller ones are taken by each warp over its share of the slices, added in order. The sums of
// `parts` of the slices are added by `fold_columns` of elementwise.cu. block_sum gives each thread every so
// many elements of a row, a multiple of r apart.
//
// Bytes moved of an f16 element: block_affine 4, its gradient 6; block_sum and its gradient 2, block_sum_onto 4.
//
//     block_affine        128 threads; blocks (blocks of the panel * ceil(I / 128), ceil(r / TILE))
//     block_affine_grad   128 threads; blocks (blocks of the panel, ceil(r / TILE)^2, parts)
//     block_sum           threads (32, 4) for rows up to 1024 elements, else (256, 1); blocks tokens / y; r
//                         up to I; shared x * y * (16 / size of an element) floats
//     block_sum_grad, block_sum_onto    as add_bias of elementwise.cu
#include "arith/functions.h"
#include "row.cuh"
#include "tensor_core.cuh"

constexpr int WARPS = 4, THREADS = WARPS * WARP;
// What a step takes of the dimension that is summed over, and slices of a block of W'.
constexpr int STEP = 32, SLICES = 128;

// Floats from one row of W to the next, by slices or, in the gradient, by columns; and pairs of B or of G.
// Each lets the lanes of a fragment meet all banks.
constexpr int LD_SLICE = STEP + 4;
template <int TILE>
constexpr int LD_COLUMN = TILE + 8;
template <int TILE>
constexpr int LD_PAIR = TILE + 4;

// f32 as the sum of two numbers of TF32, of which the first holds the upper bits.
static __device__ __forceinline__ float upper_of(float x) { return of_bits(bits_of(x) & 0xffffe000u); }
static __device__ __forceinline__ float2 parts_of(float x) {
  const float upper = upper_of(x);
  return make_float2(upper, upper_of(x - upper));
}

// c += a b, a whole or in two parts, b in two.
template <bool WHOLE>
__device__ __forceinline__ void mma_parts(float (&c)[4], const float (&a)[4], float2 b0, float2 b1) {
  uint32_t upper[4];
#pragma unroll
  for (int i = 0; i < 4; i++) upper[i] = bits_of(upper_of(a[i]));
  // The small products first.
  if constexpr (!WHOLE) {
    uint32_t lower[4];
#pragma unroll
    for (int i = 0; i < 4; i++) lower[i] = bits_of(parts_of(a[i]).y);
    mma_tf32(c, lower, bits_of(b0.x), bits_of(b1.x));
  }
  mma_tf32(c, upper, bits_of(b0.y), bits_of(b1.y));
  mma_tf32(c, upper, bits_of(b0.x), bits_of(b1.x));
}

// Four neighbouring elements [row, column ..] of a matrix [rows, columns] in f32, zeros outside.
template <typename T>
__device__ __forceinline__ void load_four(const T* from, int64_t row, int column, int64_t rows, int columns,
                                          float (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = 0.0f;
  if (row >= rows) return;
  const T* place = from + row * columns + column;
  if (columns % 4 == 0 && aligned(from, 4 * sizeof(T))) {
    if (column < columns) load_floats<4>(place, x);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (column + i < columns) x[i] = to_float(place[i]);
  }
}

// out [I, r] of each block; out may have W's type or f32.
template <typename T, typename O, int TILE>
__device__ __forceinline__ void merge(float* scratch, const T* w, const float* b, O* out, int64_t slices,
                                      int r) {
  constexpr int M = SLICES / WARPS / 16, N = TILE / 8;
  float* left = scratch;                                                   // [SLICES, LD_SLICE]
  float2* right = reinterpret_cast<float2*>(scratch + SLICES * LD_SLICE);  // [STEP, LD_PAIR]
  const int64_t tiles = (slices + SLICES - 1) / SLICES;
  const int64_t p = blockIdx.x / tiles, first = blockIdx.x % tiles * SLICES;
  const int column = int(blockIdx.y) * TILE;
  w += p * slices * r;
  out += p * slices * r;
  b += p * r * r;
  const int g = lane_of() / 4, t = lane_of() % 4, own = warp_of() * 16 * M;
  float sum[M][N][4];
#pragma unroll
  for (int i = 0; i < M; i++) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int j = 0; j < 4; j++) sum[i][n][j] = 0.0f;
    }
  }
  for (int k0 = 0; k0 < r; k0 += STEP) {
    for (int i = threadIdx.x; i < SLICES * STEP / 4; i += THREADS) {
      const int slice = i / (STEP / 4), k = i % (STEP / 4) * 4;
      float x[4];
      load_four(w, first + slice, k0 + k, slices, r, x);
      store_floats<4>(left + slice * LD_SLICE + k, x);
    }
    for (int i = threadIdx.x; i < STEP * TILE / 4; i += THREADS) {
      const int k = i / (TILE / 4), d = i % (TILE / 4) * 4;
      float x[4];
      load_four(b, k0 + k, column + d, r, r, x);
#pragma unroll
      for (int j = 0; j < 4; j++) right[k * LD_PAIR<TILE> + d + j] = parts_of(x[j]);
    }
    __syncthreads();
    const int left_over = r - k0 < STEP ? r - k0 : STEP;
    for (int k = 0; k < left_over; k += 8) {
      float rows[M][4];
#pragma unroll
      for (int i = 0; i < M; i++) {
        const float* at = left + (own + i * 16 + g) * LD_SLICE + k + t;
        rows[i][0] = at[0];
        rows[i][1] = at[8 * LD_SLICE];
        rows[i][2] = at[4];
        rows[i][3] = at[8 * LD_SLICE + 4];
      }
#pragma unroll
      for (int n = 0; n < N; n++) {
        const float2 b0 = right[(k + t) * LD_PAIR<TILE> + n * 8 + g];
        const float2 b1 = right[(k + t + 4) * LD_PAIR<TILE> + n * 8 + g];
#pragma unroll
        for (int i = 0; i < M; i++) mma_parts<sizeof(T) == 2>(sum[i][n], rows[i], b0, b1);
      }
    }
    __syncthreads();
  }
  const int64_t across = slices / r;
#pragma unroll
  for (int i = 0; i < M; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t slice = first + own + i * 16 + half * 8 + g;
      if (slice >= slices) continue;
      const float* row = b + slice / across * r;
#pragma unroll
      for (int n = 0; n < N; n++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const int d = column + n * 8 + 2 * t + j;
          if (d >= r) continue;
          out[slice * r + d] = from_float<O>(to_float(w[slice * r + d]) + sum[i][n][2 * half + j] + row[d]);
        }
      }
    }
  }
}

template <typename T, typename O>
__device__ __forceinline__ void block_affine(const T* w, const float* b, O* out, int64_t slices, int r) {
  __shared__ __align__(16) float scratch[SLICES * LD_SLICE + 2 * STEP * LD_PAIR<64>];
  if (r <= 16) return merge<T, O, 16>(scratch, w, b, out, slices, r);
  if (r <= 32) return merge<T, O, 32>(scratch, w, b, out, slices, r);
  merge<T, O, 64>(scratch, w, b, out, slices, r);
}

// db [parts, blocks, r, r]: each part over the slices [part * each, + each).
template <typename T, int TILE>
__device__ __forceinline__ void gradient(float* scratch, const T* w, const float* g, float* db,
                                         int64_t slices, int r, int64_t each) {
  // A warp's tile; with one warp to a tile the others take other slices of a step.
  constexpr int SIDE = TILE < 32 ? TILE : 32, TEAMS = TILE == 64 ? 1 : WARPS, M = SIDE / 16, N = SIDE / 8;
  float* left = scratch;                                                        // [STEP, LD_COLUMN]
  float2* right = reinterpret_cast<float2*>(scratch + STEP * LD_COLUMN<TILE>);  // [STEP, LD_PAIR]
  __shared__ int lies[STEP];  // the row of the block that a slice is part of
  const int64_t p = blockIdx.x;
  const int tiles = (r + TILE - 1) / TILE;
  const int row0 = int(blockIdx.y) / tiles * TILE, column0 = int(blockIdx.y) % tiles * TILE;
  const int x = lane_of() / 4, t = lane_of() % 4;
  const int team = TEAMS > 1 ? warp_of() : 0;
  const int y = TEAMS > 1 ? 0 : warp_of() / 2 * SIDE, z = TEAMS > 1 ? 0 : warp_of() % 2 * SIDE;
  const int64_t first = int64_t(blockIdx.z) * each;
  const int64_t end = first + each < slices ? first + each : slices;
  const int64_t across = slices / r;
  const T* wp = w + p * slices * r;
  const float* gp = g + p * slices * r;
  float sum[M][N][4];
#pragma unroll
  for (int i = 0; i < M; i++) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int j = 0; j < 4; j++) sum[i][n][j] = 0.0f;
    }
  }
  for (int64_t s0 = first; s0 < end; s0 += STEP) {
    if (threadIdx.x < STEP) lies[threadIdx.x] = int((s0 + threadIdx.x) / across);
    for (int i = threadIdx.x; i < STEP * TILE / 4; i += THREADS) {
      const int s = i / (TILE / 4), d = i % (TILE / 4) * 4;
      float v[4];
      load_four(wp, s0 + s, row0 + d, end, r, v);
      store_floats<4>(left + s * LD_COLUMN<TILE> + d, v);
      load_four(gp, s0 + s, column0 + d, end, r, v);
#pragma unroll
      for (int j = 0; j < 4; j++) right[s * LD_PAIR<TILE> + d + j] = parts_of(v[j]);
    }
    __syncthreads();
    for (int s = team * 8; s < STEP; s += TEAMS * 8) {
      float2 b0[N], b1[N];
#pragma unroll
      for (int n = 0; n < N; n++) {
        b0[n] = right[(s + t) * LD_PAIR<TILE> + z + n * 8 + x];
        b1[n] = right[(s + t + 4) * LD_PAIR<TILE> + z + n * 8 + x];
      }
#pragma unroll
      for (int i = 0; i < M; i++) {
        const float* at = left + (s + t) * LD_COLUMN<TILE> + y + i * 16 + x;
        const float rows[4] = {at[0], at[8], at[4 * LD_COLUMN<TILE>], at[4 * LD_COLUMN<TILE> + 8]};
#pragma unroll
        for (int n = 0; n < N; n++) mma_parts<sizeof(T) == 2>(sum[i][n], rows, b0[n], b1[n]);
        // To the row that a slice lies in G itself is added: W with ones there. Rows only rise with s.
        const int row = row0 + y + i * 16;
        if (lies[s] < row + 16 && lies[s + 7] >= row) {
          const float ones[4] = {
              lies[s + t] == row + x ? 1.0f : 0.0f, lies[s + t] == row + x + 8 ? 1.0f : 0.0f,
              lies[s + t + 4] == row + x ? 1.0f : 0.0f, lies[s + t + 4] == row + x + 8 ? 1.0f : 0.0f};
#pragma unroll
          for (int n = 0; n < N; n++) mma_parts<true>(sum[i][n], ones, b0[n], b1[n]);
        }
      }
    }
    __syncthreads();
  }
  // The teams' tiles in order, by way of the place of the operands.
  for (int other = 1; other < TEAMS; other++) {
#pragma unroll
    for (int i = 0; i < M; i++) {
#pragma unroll
      for (int n = 0; n < N; n++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          float* place = scratch + ((i * N + n) * 4 + j) * WARP + lane_of();
          if (team == other) *place = sum[i][n][j];
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < M; i++) {
#pragma unroll
      for (int n = 0; n < N; n++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          if (team == 0) sum[i][n][j] += scratch[((i * N + n) * 4 + j) * WARP + lane_of()];
        }
      }
    }
    __syncthreads();
  }
  if (team > 0) return;
  float* to = db + (int64_t(blockIdx.z) * gridDim.x + p) * r * r;
#pragma unroll
  for (int i = 0; i < M; i++) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int a = row0 + y + i * 16 + j / 2 * 8 + x, d = column0 + z + n * 8 + 2 * t + j % 2;
        if (a < r && d < r) to[a * r + d] = sum[i][n][j];
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ void block_affine_grad(const T* w, const float* g, float* db, int64_t slices,
                                                  int r, int64_t each) {
  __shared__ __align__(16) float scratch[STEP * LD_COLUMN<64> + 2 * STEP * LD_PAIR<64>];
  if (r <= 16) return gradient<T, 16>(scratch, w, g, db, slices, r, each);
  if (r <= 32) return gradient<T, 32>(scratch, w, g, db, slices, r, each);
  gradient<T, 64>(scratch, w, g, db, slices, r, each);
}

// Places of N elements. `places` of them make a slice; a thread takes those a multiple of it apart.
template <int N, typename T>
__device__ __forceinline__ void sum_slices(const T* x, T* s, int64_t tokens, int width, int r) {
  extern __shared__ float slice_sums[];
  const int64_t token = row_of_block();
  if (token >= tokens) return;
  x += token * width;
  s += token * r;
  const int places = r / N, all = width / N, lane = threadIdx.x, lanes = blockDim.x;
  // As many lanes as slices fit, or all, where a slice is longer than a row of threads.
  const int used = places <= lanes ? lanes / places * places : lanes;
  float* mine = slice_sums + (int(threadIdx.y) * lanes + lane) * N;
  for (int from = 0; from < places; from += used) {
    const int start = from + lane;
    float sum[N];
#pragma unroll
    for (int i = 0; i < N; i++) sum[i] = 0.0f;
    if (lane < used && start < (places <= lanes ? used : places)) {
      for (int at = start; at < all; at += places <= lanes ? used : places) {
        float v[N];
        load_floats<N>(x + int64_t(at) * N, v);
#pragma unroll
        for (int i = 0; i < N; i++) sum[i] += v[i];
      }
      if (places > lanes) store_floats<N>(s + start * N, sum);
    }
    if (places > lanes) continue;
#pragma unroll
    for (int i = 0; i < N; i++) mine[i] = sum[i];
    if (blockDim.x == WARP) {
      __syncwarp();
    } else {
      __syncthreads();
    }
    if (lane < places) {
      for (int other = lane + places; other < used; other += places) {
#pragma unroll
        for (int i = 0; i < N; i++) sum[i] += mine[(other - lane) * N + i];
      }
      store_floats<N>(s + lane * N, sum);
    }
  }
}

template <int N, bool ONTO, typename T>
__device__ __forceinline__ void tile_slices(const T* ds, T* dx, int64_t tokens, int width, int r) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.y;
  for (int64_t token = row_of_block(); token < tokens; token += stride) {
    for (int at = int(threadIdx.x) * N; at < width; at += int(blockDim.x) * N) {
      T* place = dx + token * width + at;
      const Pack<T, N> tile = load<N>(ds + token * r + at % r);
      if constexpr (ONTO) {
        float x[N], s[N];
        load_floats<N>(place, x);
        floats_of(tile, s);
#pragma unroll
        for (int i = 0; i < N; i++) x[i] += s[i];
        store_floats<N>(place, x);
      } else {
        store(place, tile);
      }
    }
  }
}

template <bool ONTO, typename T>
__device__ __forceinline__ void tile(const T* ds, T* dx, int64_t tokens, int width, int r) {
  if (r % WIDE<T> == 0 && width % WIDE<T> == 0 && aligned(ds, 16) && aligned(dx, 16)) {
    tile_slices<WIDE<T>, ONTO>(ds, dx, tokens, width, r);
  } else {
    tile_slices<1, ONTO>(ds, dx, tokens, width, r);
  }
}

#define MERGE(suffix, T, O)                                                              \
  extern "C" __global__ void __launch_bounds__(THREADS)                                  \
      block_affine_##suffix(const T* w, const float* b, O* out, int64_t slices, int r) { \
    block_affine(w, b, out, slices, r);                                                  \
  }

#define BLOCKS(suffix, T)                                                                 \
  extern "C" __global__ void __launch_bounds__(THREADS) block_affine_grad_##suffix(       \
      const T* w, const float* g, float* db, int64_t slices, int r, int64_t each) {       \
    block_affine_grad(w, g, db, slices, r, each);                                         \
  }                                                                                       \
  extern "C" __global__ void __launch_bounds__(256)                                       \
      block_sum_##suffix(const T* x, T* s, int64_t tokens, int width, int r) {            \
    if (r % WIDE<T> == 0 && width % WIDE<T> == 0 && aligned(x, 16) && aligned(s, 16)) {   \
      sum_slices<WIDE<T>>(x, s, tokens, width, r);                                        \
    } else {                                                                              \
      sum_slices<1>(x, s, tokens, width, r);                                              \
    }                                                                                     \
  }                                                                                       \
  extern "C" __global__ void __launch_bounds__(256)                                       \
      block_sum_grad_##suffix(const T* ds, T* dx, int64_t tokens, int width, int r) {     \
    tile<false>(ds, dx, tokens, width, r);                                                \
  }                                                                                       \
  extern "C" __global__ void __launch_bounds__(256)                                       \
      block_sum_onto_##suffix(const T* ds, T* dx, int64_t tokens, int width, int r) {     \
    tile<true>(ds, dx, tokens, width, r);                                                 \
  }

FOR_EACH_TYPE(BLOCKS)
MERGE(f32, float, float)
MERGE(f16, __half, __half)
MERGE(bf16, __nv_bfloat16, __nv_bfloat16)
// Half precision in, f32 out.
MERGE(f16_f32, __half, float)
MERGE(bf16_f32, __nv_bfloat16, float)
