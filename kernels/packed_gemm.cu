// Products of packed weights with 17 and more tokens, on tensor cores (src/kernels/packed/mod.rs).
//
//     y[t, o] = sum_k x[t, k] step[o, k / group] (u[o, k] + zero)        x [tokens, cols], y [tokens, rows]
//
// `packed_prepare_<type>` writes the activations as lifted halves, one row for a token, for f32 two
// (packed.cuh); `packed_gemm_w{2,3,4,8}_n{32,64,128}` multiplies them: the type matters only for how results
// are stored.
//
// A block has WM tiles of 32 weight rows and N columns of activations; a warp one tile of rows and N / WN
// columns. Weights and activations come by asynchronous copies, 64 columns a stage and STAGES - 1 stages
// ahead, the weights a pad of columns (a tile; of 8 bits two) whenever one begins. A weight becomes (u +
// zero) / 512 in a half, exactly, by two instructions for two. The right operand is swizzled by 64 bytes in
// every second row, so that eight lanes meet in no bank.
//
// Bytes moved by a block: its rows of weights and its activations; all weights gridDim.y times, all
// activations gridDim.x times, from the second-level cache but for the first.
//
// packed_prepare_T: halves [tokens (f32: 2 tokens), stride], or null for the powers alone; powers [tokens].
//     threads 256, grid x tokens; stride a multiple of 8, at least cols
// packed_gemm_w{bits}_n{N}: x and stride as above; kind of y 0 f32, 1 f16, 2 bf16.
//     threads     256
//     grid        x ceil(rows / (32 * WM)), y ceil(columns / N), z slices, 1 <= slices <= ceil(cols / PAD);
//                 columns = tokens, for f32 twice that
//     N           32             64   128
//     WM          8              8    4
//     STAGES      8 (w8: 6)      4    4
//     bits        2       3      4       8
//     PAD         128     256    64      64       columns of a pad
//     BYTES       1024    3072   1024    2048     of a pad of 32 rows
//     shared      STAGES * (128 * N + 256 * WM) + (2 + (STAGES - 2) / (PAD / 64)) * WM * BYTES bytes, with
//                 integer division
//     partial     slices * tokens * 32 * ceil(rows / 32) floats where slices > 1
//     tickets     gridDim.x * gridDim.y zeros where slices > 1, zeros again afterwards
//     takes       rows, cols, columns up to 2^30; pitch as packed_gemv
//
// f16 activations may be given as they are, with stride = cols and powers null, where cols is a multiple of 8
// and x is aligned to 16 bytes.
#include "packed.cuh"

constexpr int WARPS = 8;
// Columns of a stage.
constexpr int DEEP = 64;

// One block a token: the power of two that its largest is lifted by, and its halves.
template <typename T>
__device__ __forceinline__ void prepare(const T* __restrict__ x, __half* __restrict__ halves,
                                        float* __restrict__ powers, int cols, int stride) {
  __shared__ uint32_t top;
  const int64_t t = blockIdx.x;
  const bool wide = cols % 8 == 0 && aligned(x, 16);
  const T* const row = x + t * cols;
  if (threadIdx.x == 0) top = 0;
  __syncthreads();
  uint32_t size = 0;
  for (int c = int(threadIdx.x) * 8; c < cols; c += int(blockDim.x) * 8) {
    float v[8];
    eight_of(row, c, cols, wide, v);
    const uint32_t of = top_of(v);
    size = of > size ? of : size;
  }
  size = warp_top(size);
  if (lane_of() == 0) atomicMax(&top, size);
  __syncthreads();
  const int k = packed_lift(top);
  // What takes it back.
  if (threadIdx.x == 0) powers[t] = packed_two_to(-k);
  if (halves == nullptr) return;
  const float lift = packed_two_to(k);
  uint4* const to = reinterpret_cast<uint4*>(halves + t * PARTS<T> * stride);
  for (int c = int(threadIdx.x) * 8; c < stride; c += int(blockDim.x) * 8) {
    float v[8];
    eight_of(row, c, cols, wide, v);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] *= lift;
    to[c / 8] = make_uint4(two_halves(v[0], v[1]), two_halves(v[2], v[3]), two_halves(v[4], v[5]),
                           two_halves(v[6], v[7]));
    if (PARTS<T> == 2) {
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] = below_half(v[i]);
      to[(stride + c) / 8] = make_uint4(two_halves(v[0], v[1]), two_halves(v[2], v[3]),
                                        two_halves(v[4], v[5]), two_halves(v[6], v[7]));
    }
  }
}

template <int BITS, int WM, int WN, int NT, int STAGES>
__device__ __forceinline__ void gemm(const uint4* __restrict__ codes, const float* __restrict__ steps,
                                     const __half* __restrict__ x, const float* __restrict__ powers,
                                     void* __restrict__ y, float* __restrict__ partial,
                                     unsigned* __restrict__ tickets, int rows, int cols, int columns,
                                     int stride, int pitch, float zero, int kind) {
  typedef Tile<BITS> Of;
  static_assert(WM * WN == WARPS, "a tile of rows for each warp along m");
  constexpr int N = 8 * NT * WN;
  // Weights come by pads: one tile, of 8 bits two; Q stages take one.
  constexpr int PAD = packed_pad_cols(BITS), TILES = PAD / Of::COLS, CHUNKS = TILES * Of::CHUNKS,
                Q = PAD / DEEP;
  constexpr int SLOTS = 2 + (STAGES - 2) / Q;
  extern __shared__ uint4 shared[];
  uint4* const staged = shared;                      // [STAGES, N, 8]
  uint4* const step_ring = staged + STAGES * N * 8;  // [STAGES, WM, 2, 8]
  uint4* const ring = step_ring + STAGES * WM * 16;  // [SLOTS, WM, CHUNKS]

  const int lane = lane_of(), warp = warp_of(), g = lane / 4, q = lane % 4;
  const int wm = warp % WM, wn = warp / WM;
  const int pads = (cols + PAD - 1) / PAD, row_tiles = (rows + 31) / 32;
  const int first = int(int64_t(pads) * blockIdx.z / gridDim.z);
  const int last = int(int64_t(pads) * (blockIdx.z + 1) / gridDim.z);
  const int stages = (last - first) * Q;
  const int span = pitch == 0 || pitch > 256 ? 256 : pitch;
  const int pitch_log = __ffs(pitch) - 1;
  const int pitches = int(packed_sets(uint64_t(cols), BITS, uint64_t(pitch)));
  const int first_column = int(blockIdx.y) * N;

  // What this thread copies: of every stage one 16 bytes of every 32nd row of activations, and the steps of
  // some rows; of every pad a part of the weights of one tile of rows. A tile beyond the last is the last
  // once more.
  constexpr int ROWS = WARPS * WARP / 8, SHARE = CHUNKS * WM / WARPS;
  const int row = int(threadIdx.x) / 8, chunk = int(threadIdx.x) % 8;
  const __half* next_x = x + int64_t(first_column + row) * stride + first * PAD + chunk * 8;
  const int in_row = stride - first * PAD - chunk * 8;
  uint4* const to_x = staged + row * 8 + (chunk ^ (row & 1) << 2);
  auto tile_of = [&](int i) {
    const int tile = int(blockIdx.x) * WM + i;
    return int64_t(tile < row_tiles ? tile : row_tiles - 1);
  };
  const float* const from_steps = steps + tile_of(int(threadIdx.x) / 16) * pitches * 32 + threadIdx.x % 8 * 4;
  const uint4* next_codes = codes + (tile_of(wm) * pads + first) * CHUNKS + wn * SHARE + lane;
  uint4* const to_codes = ring + wm * CHUNKS + wn * SHARE + lane;
  int fetched = 0, fetch_slot = 0, fetch_pad = 0;

  // The next stage; the first of a pad where `sub` is 0.
  auto fetch = [&](int sub) {
    if (fetched < stages) {
      // Of a row or of columns that nobody has nothing is read, and zeros are written.
      const bool there = fetched * DEEP < in_row;
#pragma unroll
      for (int i = 0; i < N / ROWS; i++) {
        copy_async(to_x + (fetch_slot * N + i * ROWS) * 8, next_x + int64_t(i * ROWS) * stride,
                   there && first_column + row + i * ROWS < columns ? 16 : 0);
      }
      if (pitch != 0 && threadIdx.x < WM * 16) {
        const int col = first * PAD + fetched * DEEP + int(threadIdx.x) / 8 % 2 * 32;
        copy_async(step_ring + fetch_slot * WM * 16 + threadIdx.x, from_steps + (col >> pitch_log) * 32);
      }
      if (sub == 0) {
#pragma unroll
        for (int i = 0; i < SHARE / WARP; i++) {
          copy_async(to_codes + fetch_pad * WM * CHUNKS + i * WARP, next_codes + i * WARP);
        }
        next_codes += CHUNKS;
        fetch_pad = fetch_pad + 1 == SLOTS ? 0 : fetch_pad + 1;
      }
    }
    copy_commit();
    next_x += DEEP;
    fetched++;
    fetch_slot = fetch_slot + 1 == STAGES ? 0 : fetch_slot + 1;
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) fetch(i % Q);

  float sums[NT][2][4] = {}, part[NT][2][4] = {};
  // Two swizzles: this lane's 16 bytes of the first and the second 32 columns of a stage.
  const int at[2] = {(wn * NT * 8 + g) * 8 + (q ^ (g & 1) << 2),
                     (wn * NT * 8 + g) * 8 + (q ^ 4 ^ (g & 1) << 2)};
  Words<BITS> words[TILES][2];
  int slot = 0, pad_slot = 0;
  for (int pad = 0; pad < last - first; pad++) {
#pragma unroll
    for (int sub = 0; sub < Q; sub++) {
      copy_wait<STAGES - 2>();
      __syncthreads();
      fetch((sub + STAGES - 1) % Q);
      if (sub == 0) {
        const uint4* const from = ring + (pad_slot * WM + wm) * CHUNKS + lane;
#pragma unroll
        for (int i = 0; i < CHUNKS / WARP; i++) {
          words[i / (2 * Of::VECTORS)][i / Of::VECTORS % 2].set(i % Of::VECTORS, from[i * WARP]);
        }
      }
#pragma unroll
      for (int j = 0; j < 2; j++) {
        uint4 right[NT];
#pragma unroll
        for (int n = 0; n < NT; n++) right[n] = staged[slot * N * 8 + at[j] + n * 64];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int all = sub * 4 + j * 2 + half, step = all % Of::STEPS, tile = all / Of::STEPS;
          const Centre c = centre(zero, packed_power(BITS, step));
#pragma unroll
          for (int band = 0; band < 2; band++) {
            uint32_t left[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
              left[i] = fma_halves(words[tile][band].halves(step, i), c.times, c.plus);
#pragma unroll
            for (int n = 0; n < NT; n++) {
              mma_halves(part[n][band], left, half ? right[n].z : right[n].x, half ? right[n].w : right[n].y);
            }
          }
        }
        const int next = (first + pad) * PAD + sub * DEEP + (j + 1) * 32;
        if ((next & (span - 1)) == 0 || (sub == Q - 1 && j == 1 && pad == last - first - 1)) {
          float4 step = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
          if (pitch != 0) {
            step = *reinterpret_cast<const float4*>(step_ring + ((slot * WM + wm) * 2 + j) * 8 + g);
          }
#pragma unroll
          for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
              sums[n][0][i] = fmaf(i < 2 ? step.x : step.y, part[n][0][i], sums[n][0][i]);
              sums[n][1][i] = fmaf(i < 2 ? step.z : step.w, part[n][1][i], sums[n][1][i]);
              part[n][0][i] = part[n][1][i] = 0.0f;
            }
          }
        }
      }
      slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
    pad_slot = pad_slot + 1 == SLOTS ? 0 : pad_slot + 1;
  }
  copy_wait<0>();

  const int parts = kind == 0 ? 2 : 1, tokens = columns / parts, all_rows = row_tiles * 32;
  // Calls f(token, row, sum) for each result of this lane.
  auto results = [&](auto f) {
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
      for (int band = 0; band < 2; band++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int column = first_column + (wn * NT + n) * 8 + 2 * q + i % 2;
          const int row = (int(blockIdx.x) * WM + wm) * 32 + band * 16 + i / 2 * 8 + g;
          if (row >= rows || column >= columns || (parts == 2 && i % 2 == 1)) continue;
          const float low = sums[n][band][i | 1];
          f(parts == 2 ? column / 2 : column, row,
            parts == 2 ? fmaf(low, 1.0f / LOW_LIFT, sums[n][band][i]) : sums[n][band][i]);
        }
      }
    }
  };
  auto put = [&](int t, int row, float sum) {
    if (pitch == 0) sum *= steps[row / 32 * 32 + packed_set_slot(row % 32)];
    sum *= 512.0f;
    if (powers != nullptr) sum *= powers[t];
    const int64_t to = int64_t(t) * rows + row;
    if (kind == 0) static_cast<float*>(y)[to] = sum;
    if (kind == 1) static_cast<__half*>(y)[to] = from_float<__half>(sum);
    if (kind == 2) static_cast<__nv_bfloat16*>(y)[to] = from_float<__nv_bfloat16>(sum);
  };
  if (gridDim.z == 1) return results(put);
  results(
      [&](int t, int row, float sum) { partial[(int64_t(blockIdx.z) * tokens + t) * all_rows + row] = sum; });
  if (!last_of(tickets + blockIdx.y * gridDim.x + blockIdx.x, gridDim.z)) return;
  results([&](int t, int row, float) {
    float sum = 0.0f;
    for (int s = 0; s < int(gridDim.z); s++)
      sum += __ldcg(partial + (int64_t(s) * tokens + t) * all_rows + row);
    put(t, row, sum);
  });
}

// halves: [tokens (f32: 2 tokens), stride], or null for the powers alone; powers: [tokens].
#define PREPARE(SUFFIX, T)                                                                       \
  extern "C" __global__ void __launch_bounds__(256)                                              \
      packed_prepare_##SUFFIX(const T* x, __half* halves, float* powers, int cols, int stride) { \
    prepare<T>(x, halves, powers, cols, stride);                                                 \
  }
FOR_EACH_TYPE(PREPARE)

#define GEMM(BITS, N, WM, WN, NT, STAGES)                                                                    \
  extern "C" __global__ void __launch_bounds__(WARPS* WARP, 1) packed_gemm_w##BITS##_n##N(                   \
      const uint4* codes, const float* steps, const __half* x, const float* powers, void* y, float* partial, \
      unsigned* tickets, int rows, int cols, int columns, int stride, int pitch, float zero, int kind) {     \
    gemm<BITS, WM, WN, NT, STAGES>(codes, steps, x, powers, y, partial, tickets, rows, cols, columns,        \
                                   stride, pitch, zero, kind);                                               \
  }
#define GEMM_BITS(BITS, MOST) \
  GEMM(BITS, 32, 8, 1, 4, MOST) GEMM(BITS, 64, 8, 1, 8, 4) GEMM(BITS, 128, 4, 2, 8, 4)
GEMM_BITS(2, 8)
GEMM_BITS(3, 8)
GEMM_BITS(4, 8)
GEMM_BITS(8, 6)
