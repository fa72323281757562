// Products of packed weights with few tokens, which the memory's speed bounds (src/kernels/packed/mod.rs).
//
//     y[t, o] = sum_k x[t, k] step[o, k / group] (u[o, k] + zero)        x [tokens, cols], y [tokens, rows]
//
// Weights are read once, past the first-level cache, by asynchronous copies of 16 bytes a lane into a ring of
// tiles that each warp has to itself, DEPTH - 1 of them under way while one is multiplied. A tensor core does
// the product for eight columns of activations at the price of one; a register of two weights costs one AND,
// since fields stay where they are in a subnormal half and each activation is divided by that power of two
// when it is staged. The sum over u + zero is the sum over u plus zero times the sum of the activations of a
// group, from which the tensor core's sums start.
//
// A block is 8 warps: `split` of them share 32 rows, each taking every split-th tile of the block's columns,
// and their sums are added in a fixed order; 8 / split tiles of rows side by side. The columns are cut into
// gridDim.y slices of whole tiles; the last block to arrive of those of the same rows adds the slices' sums
// in their order.
//
// Bytes moved: rows * cols * bits / 8, 4 for each step, and from the second-level cache for each block its
// slice of the activations, twice.
//
//     threads     256
//     grid        x ceil(rows / (32 * 8 / split)), y slices, 1 <= slices <= tiles
//     split       1, 2, 4 or 8
//     shared      8 * DEPTH * (TILE + 128 * sets) + 8 * n * blocks + columns * 64 * (S / 32 | 1) bytes
//                 n         8 or 16, as in the name
//                 columns   tokens, for f32 twice that: n at most
//                 TILE      1024, at 3 bits 3072
//                 DEPTH     4, at 3 bits 2; twice that for n = 16 at 2 and 3 bits
//                 sets      max(1, tile columns / pitch), for one step a row 0
//                 S         tile columns * ceil(tiles / slices)
//                 blocks    S / min(pitch, tile columns), for one step a row S / tile columns
//     partial     slices * tokens * 32 * ceil(rows / 32) floats where slices > 1
//     tickets     gridDim.x zeros where slices > 1; zeros again afterwards, but not for two launches at once
//     takes       rows and cols up to 2^30; pitch = 0 for one step a row, else packed_pitch(group)
//
// What the launcher chooses (src/kernels/packed/geometry.rs): as many blocks as there is room for on 132
// multiprocessors, once or several times. Staging costs each thread some 12 instructions for every 8
// activations, tokens * S / 2048 times, so that a large weight takes split = 1 and many slices, and only a
// small one, which has too few rows for that, or a single token a larger split. At 2 bits:
//
//     rows x cols      tokens   split   slices   blocks   tiles of a warp
//     4096 x 4096      1        8       1        128      4
//     4096 x 4096      8        1       8        128      4
//     8192 x 28672     1, 8     1       16       512      14
//     28672 x 8192     1        4       1        448      16
//     28672 x 8192     8        1       4        448      16
#include "packed.cuh"

constexpr int WARPS = 8;
// Blocks that a multiprocessor has the registers for, and tiles of a ring, so that some 50 KB are under way
// on each.
template <int BITS, int NT>
constexpr int RESIDENT = NT == 2 ? (BITS > 3 ? 2 : 1) : (BITS > 3 ? 3 : 2);
template <int BITS, int NT>
constexpr int DEPTH = (BITS == 3 ? 2 : 4) * (NT == 2 && BITS <= 3 ? 2 : 1);
// From one column's sums of 32 rows to the next in the exchange between warps: no two lanes meet in a bank.
constexpr int SUMS_APART = 36;

// Columns between two additions to the sums, and whether they have steps of their own.
template <int COLS, bool STEPS>
struct Span {
  static constexpr int VALUE = COLS;
  static constexpr bool STEPPED = STEPS;
};

// Eight activations, lifted, as halves: each divided by the power of two of its step's fields.
template <int BITS>
__device__ __forceinline__ uint4 halves_of(const float (&x)[8], int step) {
  const float even = packed_two_to(-packed_power(BITS, step)),
              odd = packed_two_to(-packed_power(BITS, step + 1));
  return make_uint4(two_halves(x[0] * even, x[1] * even), two_halves(x[2] * even, x[3] * even),
                    two_halves(x[4] * odd, x[5] * odd), two_halves(x[6] * odd, x[7] * odd));
}

template <int BITS, int NT, typename T>
__device__ __forceinline__ void gemv(const uint4* __restrict__ codes, const float* __restrict__ steps,
                                     const T* __restrict__ x, T* __restrict__ y, float* __restrict__ partial,
                                     unsigned* __restrict__ tickets, int rows, int cols, int tokens,
                                     int pitch, float zero, int split) {
  typedef Tile<BITS> Of;
  constexpr int COLS = Of::COLS, N = 8 * NT, RING = DEPTH<BITS, NT>;
  extern __shared__ uint4 shared[];
  __shared__ uint32_t tops[N];

  const int lane = lane_of(), warp = warp_of(), g = lane / 4, q = lane % 4;
  const int columns = tokens * PARTS<T>;
  const int tiles = int(packed_tiles(uint64_t(cols), BITS));
  const int first = int(int64_t(tiles) * blockIdx.y / gridDim.y);
  const int last = int(int64_t(tiles) * (blockIdx.y + 1) / gridDim.y);
  const int held = (tiles + int(gridDim.y) - 1) / int(gridDim.y) * COLS;
  const int apart = 4 * (held / 32 | 1);
  // Columns between two additions to the sums, and the sets of steps of a tile.
  const int span = pitch == 0 || pitch > COLS ? COLS : pitch;
  const int span_log = __ffs(span) - 1, pitch_log = __ffs(pitch) - 1;
  const int sets = pitch == 0 ? 0 : COLS / span;
  const int pitches = int(packed_sets(uint64_t(cols), BITS, uint64_t(pitch)));

  uint4* const ring = shared + warp * RING * Of::CHUNKS;
  uint4* const step_ring = shared + WARPS * RING * Of::CHUNKS + warp * RING * sets * 8;
  // What the sums of rows g and g + 8 and two columns start from.
  float4* const starts = reinterpret_cast<float4*>(shared + WARPS * RING * (Of::CHUNKS + sets * 8));
  uint4* const staged = reinterpret_cast<uint4*>(starts + (held >> span_log) * (N / 2));

  const int row_tile = int(blockIdx.x) * (WARPS / split) + warp / split;
  // A warp without rows has no tiles.
  const int end = row_tile * 32 < rows ? last : first;
  const int own = first + warp % split;
  const uint4* next_codes = codes + (int64_t(row_tile) * tiles + own) * Of::CHUNKS + lane;
  const float* const row_steps = steps + int64_t(row_tile) * pitches * 32;
  int next = own;

  auto fetch = [&](unsigned slot) {
    if (next < end) {
#pragma unroll
      for (int i = 0; i < Of::CHUNKS / WARP; i++) {
        copy_async(ring + slot * Of::CHUNKS + i * WARP + lane, next_codes + i * WARP);
      }
#pragma unroll
      for (int i = 0; i < (COLS / 4 + WARP - 1) / WARP; i++) {
        const int of = i * WARP + lane;
        if (of < sets * 8) {
          copy_async(step_ring + slot * sets * 8 + of,
                     row_steps + (((next * COLS) >> pitch_log) * 32 + of * 4));
        }
      }
    }
    // Empty ones too: which group is a tile's is a matter of counting.
    copy_commit();
    next += split;
    next_codes += split * Of::CHUNKS;
  };
#pragma unroll
  for (int i = 0; i < RING - 1; i++) fetch(i);

  // The activations of the slice, while the first weights are on their way.
  const int from = first * COLS, width = (last - first) * COLS;
  const bool wide = cols % 8 == 0 && aligned(x, 16);
  if (threadIdx.x < N) tops[threadIdx.x] = 0;
  __syncthreads();
  for (int t = 0; t < tokens; t++) {
    uint32_t top = 0;
    for (int c = int(threadIdx.x) * 8; c < width; c += WARPS * WARP * 8) {
      float v[8];
      eight_of(x + int64_t(t) * cols, from + c, cols, wide, v);
      const uint32_t size = top_of(v);
      top = size > top ? size : top;
    }
    top = warp_top(top);
    if (lane == 0) atomicMax(&tops[t], top);
  }
  __syncthreads();
  for (int t = 0; t < tokens; t++) {
    const float lift = packed_two_to(packed_lift(tops[t]));
    for (int c = warp * WARP * 8; c < width; c += WARPS * WARP * 8) {
      const int at = c + lane * 8, step = packed_step(at % COLS);
      float v[8];
      eight_of(x + int64_t(t) * cols, from + at, at < width ? cols : 0, wide, v);
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] *= lift;
      const float sum = warp_sum(((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])), span / 8);
      if (at < width) {
        uint4* const to = staged + t * PARTS<T> * apart + at / 8;
        to[0] = halves_of<BITS>(v, step);
        if (PARTS<T> == 2) {
#pragma unroll
          for (int i = 0; i < 8; i++) {
            // Rounded where the first half was: divided by the power of two.
            const int power = packed_power(BITS, step + i / 4);
            v[i] = below_half(v[i] * packed_two_to(-power)) * packed_two_to(power);
          }
          to[apart] = halves_of<BITS>(v, step);
        }
        if (lane % (span / 8) == 0) {
          const int column = t * PARTS<T>;
          float* const start =
              reinterpret_cast<float*>(starts + (at >> span_log) * (N / 2) + column / 2) + column % 2;
          // As a sum of fields is: in units of the smallest half.
          start[0] = start[2] = zero * sum * (1.0f / 16777216.0f);
          if (PARTS<T> == 2) start[1] = start[3] = 0.0f;
        }
      }
    }
  }
  __syncthreads();

  // A column that no token has repeats the last: nobody reads its sums.
  const uint4* operand[NT];
#pragma unroll
  for (int n = 0; n < NT; n++)
    operand[n] = staged + (n * 8 + g < columns ? n * 8 + g : columns - 1) * apart + q;
  float sums[NT][2][4] = {};
  auto multiply = [&](auto each) {
    constexpr int SPAN = decltype(each)::VALUE;
    unsigned slot = 0;
    for (int tile = own; tile < end; tile += split) {
      copy_wait<RING - 2>();
      __syncwarp();
      fetch((slot + RING - 1) & (RING - 1));
      const uint4* const from = ring + slot * Of::CHUNKS + lane;
      // Of 3 bits a lane holds one of its three vectors at a time, and what it has of the sixteenth field.
      uint32_t words[2][4], sixteenth[2][4];
      const int at = (tile - first) * COLS;
#pragma unroll
      for (int part = 0; part < COLS / SPAN; part++) {
        float partial_sums[NT][2][4];
        float4 start[NT];
#pragma unroll
        for (int n = 0; n < NT; n++) start[n] = starts[(at / SPAN + part) * (N / 2) + n * 4 + q];
#pragma unroll
        for (int j = part * SPAN / 32; j < (part + 1) * SPAN / 32; j++) {
          uint4 right[NT];
#pragma unroll
          for (int n = 0; n < NT; n++) right[n] = operand[n][at / 8 + j * 4];
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const int step_of = 2 * j + half, vector = packed_vector(BITS, step_of, 0);
#pragma unroll
            for (int band = 0; band < 2; band++) {
              if (step_of == 0 || (step_of < 15 && vector != packed_vector(BITS, step_of - 1, 0))) {
                const uint4 w = from[(band * Of::VECTORS + vector) * WARP];
                words[band][0] = w.x, words[band][1] = w.y, words[band][2] = w.z, words[band][3] = w.w;
                if (BITS == 3) {
#pragma unroll
                  for (int i = 0; i < 4; i++) {
                    const uint32_t bit = packed_sixteenth(words[band][i], vector);
                    sixteenth[band][i] = vector == 0 ? bit : sixteenth[band][i] | bit;
                  }
                }
              }
              uint32_t left[4];
#pragma unroll
              for (int i = 0; i < 4; i++) {
                const uint32_t w = words[band][i];
                left[i] = step_of == 15 ? sixteenth[band][i] : packed_halves(BITS, step_of, w, w, w);
              }
#pragma unroll
              for (int n = 0; n < NT; n++) {
                if (half == 0 && j == part * SPAN / 32) {
                  mma_halves_from(partial_sums[n][band], start[n], left, right[n].x, right[n].y);
                } else {
                  mma_halves(partial_sums[n][band], left, half ? right[n].z : right[n].x,
                             half ? right[n].w : right[n].y);
                }
              }
            }
          }
        }
        float4 step = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
        if (decltype(each)::STEPPED) {
          step = *reinterpret_cast<const float4*>(step_ring + (slot * sets + part) * 8 + g);
        }
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            sums[n][0][i] = fmaf(i < 2 ? step.x : step.y, partial_sums[n][0][i], sums[n][0][i]);
            sums[n][1][i] = fmaf(i < 2 ? step.z : step.w, partial_sums[n][1][i], sums[n][1][i]);
          }
        }
      }
      slot = (slot + 1) & (RING - 1);
    }
  };
  // A loop for each span, so that no branch cuts the chain of products.
  if (sets == 0) {
    multiply(Span<COLS, false>());
  } else if (span == COLS) {
    multiply(Span<COLS, true>());
  } else if (span == 32) {
    multiply(Span<32, true>());
  } else if (COLS > 64 && span == 64) {
    multiply(Span<(COLS > 64 ? 64 : COLS), true>());
  } else if (COLS > 128) {
    multiply(Span<(COLS > 128 ? 128 : COLS), true>());
  }
  copy_wait<0>();

  // The warps' sums, in the place of the ring.
  __syncthreads();
  float* const exchange = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int n = 0; n < NT; n++) {
#pragma unroll
    for (int band = 0; band < 2; band++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int column = n * 8 + 2 * q + i % 2, row = band * 16 + i / 2 * 8 + g;
        exchange[(warp * N + column) * SUMS_APART + row] = sums[n][band][i];
      }
    }
  }
  __syncthreads();
  const int block_rows = WARPS / split * 32, all_rows = (rows + 31) / 32 * 32;
  const int first_row = int(blockIdx.x) * block_rows;
  for (int e = int(threadIdx.x); e < block_rows * tokens; e += WARPS * WARP) {
    const int r = e % block_rows, t = e / block_rows, row = first_row + r;
    if (row >= rows) continue;
    float sum = 0.0f;
    for (int i = 0; i < split; i++) {
      const float* const of = exchange + ((r / 32 * split + i) * N + t * PARTS<T>)*SUMS_APART + r % 32;
      sum += PARTS<T> == 2 ? fmaf(of[SUMS_APART], 1.0f / LOW_LIFT, of[0]) : of[0];
    }
    if (sets == 0) sum *= steps[row / 32 * 32 + packed_set_slot(row % 32)];
    sum = sum * 16777216.0f * packed_two_to(-packed_lift(tops[t]));
    if (gridDim.y == 1) {
      y[int64_t(t) * rows + row] = from_float<T>(sum);
    } else {
      partial[(int64_t(blockIdx.y) * tokens + t) * all_rows + row] = sum;
    }
  }
  if (gridDim.y == 1 || !last_of(tickets + blockIdx.x, gridDim.y)) return;
  for (int e = int(threadIdx.x); e < block_rows * tokens; e += WARPS * WARP) {
    const int t = e / block_rows, row = first_row + e % block_rows;
    if (row >= rows) continue;
    float sum = 0.0f;
    for (int s = 0; s < int(gridDim.y); s++)
      sum += __ldcg(partial + (int64_t(s) * tokens + t) * all_rows + row);
    y[int64_t(t) * rows + row] = from_float<T>(sum);
  }
}

#define GEMV(BITS, NT, N, SUFFIX, T)                                                                  \
  extern "C" __global__ void __launch_bounds__(WARPS* WARP, (RESIDENT<BITS, NT>))                     \
      packed_gemv_w##BITS##_n##N##_##SUFFIX(const uint4* codes, const float* steps, const T* x, T* y, \
                                            float* partial, unsigned* tickets, int rows, int cols,    \
                                            int tokens, int pitch, float zero, int split) {           \
    gemv<BITS, NT, T>(codes, steps, x, y, partial, tickets, rows, cols, tokens, pitch, zero, split);  \
  }
#define GEMV_BITS(SUFFIX, T)                                                                            \
  GEMV(2, 1, 8, SUFFIX, T)                                                                              \
  GEMV(3, 1, 8, SUFFIX, T)                                                                              \
  GEMV(4, 1, 8, SUFFIX, T) GEMV(8, 1, 8, SUFFIX, T) GEMV(2, 2, 16, SUFFIX, T) GEMV(3, 2, 16, SUFFIX, T) \
      GEMV(4, 2, 16, SUFFIX, T) GEMV(8, 2, 16, SUFFIX, T)
FOR_EACH_TYPE(GEMV_BITS)
