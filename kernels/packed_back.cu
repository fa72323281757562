// The gradient of the activations of a product with a packed weight (src/kernels/packed/mod.rs); the weight
// gets none.
//
//     dx[t, k] = sum_o dy[t, o] step[o, k / group] (u[o, k] + zero)      dy [tokens, rows], dx [tokens, cols]
//
// The sum runs over rows, whose steps differ, so that dy takes the steps: dy step is rounded to a half, 11
// bits where a dense bf16 weight has 8 (f32: to two halves), lifted by the token's power of two
// (packed_prepare_<type> with halves null) and by `lift`, a power of two that brings the weight's largest
// step to at most 1. The weights enter exactly, as (u + zero) / 512; their fragments are those of the forward
// product, transposed between lanes.
//
// A block has 128 columns of dx and 128 of tokens (f32: 64 tokens of two), a warp 32 by 64. At a time 32
// rows: dy of the next ones is on its way in registers, their steps by asynchronous copies, and these are
// staged in one of two buffers, once for each set of steps among the block's columns.
//
// Bytes moved by a block: the tiles that its columns lie in, which at 3 bits two blocks share, and dy of its
// tokens; from the second-level cache but for the first time.
//
//     threads     256
//     grid        x ceil(cols / 128), y ceil(tokens * (2 for f32) / 128), z slices of the rows,
//                 1 <= slices <= ceil(rows / 32)
//     shared      copies * 16640 bytes, copies = 1 for one step a row, else max(1, 128 / pitch)
//     partial     slices * tokens * cols floats where slices > 1; tickets as packed_gemm
//     takes       rows, cols, tokens up to 2^30; pitch as packed_gemv
#include "packed.cuh"

constexpr int WARPS = 8;
// Warps along the columns of dx, and along tokens; columns of the right operand of a warp, in eights.
constexpr int WM = 4, WN = 2, NT = 8;
constexpr int M = 32 * WM, N = 8 * NT * WN;
// Rows between two additions to the sums, in tiles.
constexpr int SPAN = 8;

template <int BITS, typename T>
__device__ __forceinline__ void back(const uint4* __restrict__ codes, const float* __restrict__ steps,
                                     const T* __restrict__ dy, const float* __restrict__ powers,
                                     T* __restrict__ dx, float* __restrict__ partial,
                                     unsigned* __restrict__ tickets, int rows, int cols, int tokens,
                                     int pitch, float zero, float lift) {
  typedef Tile<BITS> Of;
  // Of a token four lanes stage eight rows each; what one thread stages.
  constexpr int TOKENS = N / PARTS<T>, UNITS = TOKENS * 4 / (WARPS * WARP);
  extern __shared__ uint4 shared[];
  const int lane = lane_of(), warp = warp_of(), g = lane / 4, q = lane % 4;
  const int wm = warp % WM, wn = warp / WM;
  const int tiles = int(packed_tiles(uint64_t(cols), BITS)), row_tiles = (rows + 31) / 32;
  const int first = int(int64_t(row_tiles) * blockIdx.z / gridDim.z);
  const int last = int(int64_t(row_tiles) * (blockIdx.z + 1) / gridDim.z);
  const int pitch_log = __ffs(pitch) - 1, copies = pitch == 0 || pitch >= M ? 1 : M / pitch;
  const int pitches = int(packed_sets(uint64_t(cols), BITS, uint64_t(pitch)));
  const int first_col = int(blockIdx.x) * M, first_set = pitch == 0 ? 0 : first_col >> pitch_log;
  uint4* const staged = shared;                          // [2, copies, N, 4]
  uint4* const step_ring = shared + 2 * copies * N * 4;  // [2, copies, 8]

  // This warp's 32 columns within their tile. Beyond the last tile they are those of the last, and nobody's.
  const int block = (first_col + wm * 32) / 32, tile = block / (Of::COLS / 32);
  const int step = block % (Of::COLS / 32) * 2, copy = copies == 1 ? 0 : wm * 32 >> pitch_log;
  const uint4* const own_codes = codes + int64_t(tile < tiles ? tile : tiles - 1) * Of::CHUNKS + lane;
  const Centre c = centre(zero, 0);

  auto fetch_steps = [&](int row_tile) {
    if (row_tile < last && threadIdx.x < copies * 8) {
      int set = first_set + int(threadIdx.x) / 8;
      set = set < pitches ? set : pitches - 1;
      copy_async(step_ring + (row_tile - first) % 2 * copies * 8 + threadIdx.x,
                 steps + (int64_t(row_tile) * pitches + set) * 32 + threadIdx.x % 8 * 4);
    }
    copy_commit();
  };
  // Rows 2 q, 2 q + 1 of each eight, in the order in which the lane of the product reads them. A token that
  // is none reads the first, and nobody its results.
  const int own_q = int(threadIdx.x) % 4;
  const T* from_dy[UNITS];
  float v[UNITS][8], up[UNITS];
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    int t = int(blockIdx.y) * TOKENS + (u * WARPS * WARP + int(threadIdx.x)) / 4;
    t = t < tokens ? t : 0;
    from_dy[u] = dy + int64_t(t) * rows + 2 * own_q;
    up[u] = 1.0f / powers[t];
  }
  const bool pairs = rows % 2 == 0 && aligned(dy, 2 * sizeof(T));
  auto fetch = [&](int row_tile) {
    if (row_tile >= last) return;
    const int left = rows - row_tile * 32 - 2 * own_q;
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
      const T* const from = from_dy[u] + row_tile * 32;
      if (pairs) {
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
          Pack<T, 2> pack = {};
          if (i * 4 < left) pack = load<2>(from + i * 4);
          v[u][i] = to_float(pack.at[0]), v[u][i + 1] = to_float(pack.at[1]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
          v[u][i] = i / 2 * 8 + i % 2 < left ? to_float(from[i / 2 * 8 + i % 2]) : 0.0f;
      }
    }
  };
  fetch_steps(first);
  fetch_steps(first + 1);
  fetch(first);
  copy_wait<1>();
  __syncthreads();

  float sums[NT][2][4] = {}, part[NT][2][4] = {};
  for (int row_tile = first; row_tile < last; row_tile++) {
    const int turn = row_tile - first;
    Words<BITS> words[2];
    const uint4* const from = own_codes + int64_t(row_tile) * tiles * Of::CHUNKS;
#pragma unroll
    for (int i = 0; i < Of::CHUNKS / WARP; i++)
      words[i / Of::VECTORS].set(i % Of::VECTORS, __ldg(from + i * WARP));

    for (int of = 0; of < copies; of++) {
      uint4* const to = staged + (turn % 2 * copies + of) * N * 4 + own_q;
      const float4* const set = reinterpret_cast<const float4*>(step_ring + (turn % 2 * copies + of) * 8);
      const float4 even = set[2 * own_q], odd = set[2 * own_q + 1];
#pragma unroll
      for (int u = 0; u < UNITS; u++) {
        const int t = (u * WARPS * WARP + int(threadIdx.x)) / 4 * PARTS<T>;
        float w[8] = {even.x, odd.x, even.y, odd.y, even.z, odd.z, even.w, odd.w};
        // One lift after the other: both at once may be too much for a float.
#pragma unroll
        for (int i = 0; i < 8; i++) w[i] = w[i] * lift * (v[u][i] * up[u]);
        to[t * 4] = make_uint4(two_halves(w[0], w[1]), two_halves(w[2], w[3]), two_halves(w[4], w[5]),
                               two_halves(w[6], w[7]));
        if (PARTS<T> == 2) {
#pragma unroll
          for (int i = 0; i < 8; i++) w[i] = below_half(w[i]);
          to[t * 4 + 4] = make_uint4(two_halves(w[0], w[1]), two_halves(w[2], w[3]), two_halves(w[4], w[5]),
                                     two_halves(w[6], w[7]));
        }
      }
    }
    // The next steps are there, and everybody is done with the buffer of the turn before.
    copy_wait<0>();
    __syncthreads();
    fetch(row_tile + 1);
    fetch_steps(row_tile + 2);

    const uint4* const right_of = staged + ((turn % 2 * copies + copy) * N + wn * NT * 8 + g) * 4 + q;
    uint4 right[NT];
#pragma unroll
    for (int n = 0; n < NT; n++) right[n] = right_of[n * 32];
#pragma unroll
    for (int band = 0; band < 2; band++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          w[i] = transposed(fma_halves(words[band].halves_low(step + half, i), c.times, c.plus));
        }
        const uint32_t left[4] = {w[0], w[2], w[1], w[3]};
#pragma unroll
        for (int n = 0; n < NT; n++) {
          mma_halves(part[n][half], left, band ? right[n].z : right[n].x, band ? right[n].w : right[n].y);
        }
      }
    }
    if (turn % SPAN == SPAN - 1 || row_tile == last - 1) {
#pragma unroll
      for (int n = 0; n < NT; n++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            sums[n][half][i] += part[n][half][i];
            part[n][half][i] = 0.0f;
          }
        }
      }
    }
  }

  // Calls f(token, column, sum) for each result of this lane.
  auto results = [&](auto f) {
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int i = 0; i < 4; i += PARTS<T>) {
          const int column = int(blockIdx.y) * N + (wn * NT + n) * 8 + 2 * q + i % 2, t = column / PARTS<T>;
          const int col = block * 32 + packed_col(half, g / 2, i / 2 * 2 + g % 2);
          if (t >= tokens || col >= cols) continue;
          f(t, col,
            PARTS<T> == 2 ? fmaf(sums[n][half][i | 1], 1.0f / LOW_LIFT, sums[n][half][i]) : sums[n][half][i]);
        }
      }
    }
  };
  auto put = [&](int t, int col, float sum) {
    dx[int64_t(t) * cols + col] = from_float<T>(sum * (512.0f / lift) * powers[t]);
  };
  if (gridDim.z == 1) return results(put);
  results([&](int t, int col, float sum) { partial[(int64_t(blockIdx.z) * tokens + t) * cols + col] = sum; });
  if (!last_of(tickets + blockIdx.y * gridDim.x + blockIdx.x, gridDim.z)) return;
  results([&](int t, int col, float) {
    float sum = 0.0f;
    for (int s = 0; s < int(gridDim.z); s++) sum += __ldcg(partial + (int64_t(s) * tokens + t) * cols + col);
    put(t, col, sum);
  });
}

#define BACK(BITS, SUFFIX, T)                                                                             \
  extern "C" __global__ void __launch_bounds__(WARPS* WARP, 1) packed_back_w##BITS##_##SUFFIX(            \
      const uint4* codes, const float* steps, const T* dy, const float* powers, T* dx, float* partial,    \
      unsigned* tickets, int rows, int cols, int tokens, int pitch, float zero, float lift) {             \
    back<BITS, T>(codes, steps, dy, powers, dx, partial, tickets, rows, cols, tokens, pitch, zero, lift); \
  }
#define BACK_BITS(SUFFIX, T) BACK(2, SUFFIX, T) BACK(3, SUFFIX, T) BACK(4, SUFFIX, T) BACK(8, SUFFIX, T)
FOR_EACH_TYPE(BACK_BITS)
