// Products of codes with codes: whole sums on tensor cores, scaled at the end
// (src/kernels/packed/quantized.rs).
//
//     q[t, k] = clamp(rne((x[t, k] + shift[k]) / step[t mod s]), lo, hi)     or q = x, codes already
//     S[t, o] = sum_k q[t, k] w[o, k]      w = 2 (u + lo_w) + 1 where `twice` is 1, else u + lo_w; i32, exact
//     y[t, o] = S (step[t mod s] unit[o]) + bias[o]                     x [tokens, cols], y [tokens, rows]
//
// A block takes N tokens and quantizes all their columns once, as bytes in shared memory in the order in
// which the products read them; then its warps go through the weight, 32 rows each at a time, and meet no
// barrier. The weights are fields from 0 on, read from the cache straight into registers, at 2, 4 and 8 bits
// one pad ahead; four bytes of a register cost two instructions for most. What a field lacks, low = 2 lo_w +
// 1 or lo_w, comes in at the end with the token's sum of codes.
//
// A code is found by a product with the reciprocal, and by the quotient near a tie. A token with a NaN gets
// NaN throughout. i32 sums are modulo 2^32, so a result that fits is right, whatever its parts did.
//
// Bytes moved by a block: its activations, its rows of weights and its results. Weights are read gridDim.y
// times and activations gridDim.x times, from the second-level cache but for the first.
//
//     threads     256
//     grid        x parts of the rows, at most ceil(rows / 256), y ceil(tokens / N) up to 65535: about as
//                 many blocks as multiprocessors, x = 1 where y alone is enough
//     shared      N * (P + 64) bytes, P = cols filled up to a multiple of 128, for 3 bits of 256
//     takes       N = 64 for P up to 3456 (sm_80: 2432), N = 16 up to 14336 (sm_80: 10240); one step a row;
//                 |q| at most 255, and cols * 255 * max(128, largest |w|) below 2^31
//     x           f32, f16, bf16: values where `rounds` is 1, their steps lifted to 1e-5 at least, else whole
//                 numbers; y of the same type. u8: fields, q = x + lo, not rounded; y f32
//     step        [s], s = `steps`, or null: 1; shift [cols] and bias [rows], or null
//     unit        [rows], what 1 of w is worth; null: y gets the sums S as i32 (f32 and u8)
//     lo, hi      the codes' range, within -128 .. 127 or 0 .. 255
#include "arith/quantize.h"
#include "packed.cuh"

constexpr int WARPS = 8;

// How the codes of a block's tokens come to be.
template <typename T>
struct Source {
  const T* x;
  const float* shift;
  int rounds, lo, hi, cols;
  bool wide;

  // Adds the four codes from column `at` of token `t` on into bytes `lane` and `lane` + 2 of two registers.
  // Returns their sum; `nan` becomes true where one is none.
  __device__ __forceinline__ int four(int64_t t, int at, float step, float inverse, bool exact, int lane,
                                      uint32_t (&to)[2], bool& nan) const {
    const T* const row = x + t * cols + at;
    T v[4];
    if (wide && at + 4 <= cols) {
      const Pack<T, 4> pack = load<4>(row);
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] = pack.at[i];
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] = at + i < cols ? row[i] : T();
    }
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int code = 0;
      if constexpr (sizeof(T) == 1) {
        code = at + i < cols ? int(v[i]) + lo : 0;
      } else {
        float f = to_float(v[i]);
        if (rounds) {
          if (shift != nullptr && at + i < cols) f += shift[at + i];
          f = packed_quotient_code(f, step, inverse, exact, float(lo), float(hi));
        }
        const bool none = f != f;
        nan |= none && at + i < cols;
        code = none || at + i >= cols ? 0 : int(f);
      }
      sum += code;
      to[i / 2] |= uint32_t(code & 255) << (16 * (i % 2) + 8 * lane);
    }
    return sum;
  }
};

// Calls finish(n, row, sums) with the sums of column n of the block and the rows row, row + 8, row + 16, row
// + 24, all of which begin(row) has been called for.
template <int BITS, int NT, bool SIGNED, typename B, typename F>
__device__ __forceinline__ void sums_of(const uint4* __restrict__ codes, const uint4* staged, int apart,
                                        int rows, int pads, B begin, F finish) {
  typedef Tile<BITS> Of;
  // Weights a pad at a time, which is a tile or, of 8 bits, two; products of 32 columns in a tile and in a
  // pad.
  constexpr int TILES = packed_pad_cols(BITS) / Of::COLS, VECTORS = TILES * Of::CHUNKS / WARP;
  constexpr int OF_TILE = Of::COLS / 32, PRODUCTS = TILES * OF_TILE;
  // There are not the registers for two pads of 3 bits.
  constexpr bool AHEAD = BITS != 3;
  const int lane = lane_of(), g = lane / 4, q = lane % 4;
  const int row_tiles = (rows + 31) / 32;
  for (int row_tile = int(blockIdx.x) * WARPS + warp_of(); row_tile < row_tiles;
       row_tile += int(gridDim.x) * WARPS) {
    const uint4* from = codes + int64_t(row_tile) * pads * VECTORS * WARP + lane;
    int32_t sums[NT][2][4] = {};
    uint4 ahead[VECTORS];
    if (AHEAD) {
#pragma unroll
      for (int i = 0; i < VECTORS; i++) ahead[i] = __ldg(from + i * WARP);
    }
    for (int pad = 0; pad < pads; pad++) {
      Words<BITS> words[TILES][2];
#pragma unroll
      for (int i = 0; i < VECTORS; i++) {
        words[i / (2 * Of::VECTORS)][i / Of::VECTORS % 2].set(i % Of::VECTORS,
                                                              AHEAD ? ahead[i] : __ldg(from + i * WARP));
      }
      from += VECTORS * WARP;
      if (AHEAD && pad + 1 < pads) {
#pragma unroll
        for (int i = 0; i < VECTORS; i++) ahead[i] = __ldg(from + i * WARP);
      }
      // Two products at a time, for which a lane reads 16 bytes.
#pragma unroll
      for (int m = 0; m < PRODUCTS; m += 2) {
        uint32_t left[2][2][4];
#pragma unroll
        for (int of = 0; of < 2; of++) {
#pragma unroll
          for (int band = 0; band < 2; band++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
              left[of][band][i] = words[(m + of) / OF_TILE][band].bytes((m + of) % OF_TILE, i);
            }
          }
        }
        const uint4* const right = staged + g * apart + (pad * PRODUCTS + m) / 2 * 4 + q;
#pragma unroll
        for (int n = 0; n < NT; n++) {
          const uint4 b = right[n * 8 * apart];
#pragma unroll
          for (int band = 0; band < 2; band++) mma_bytes<SIGNED>(sums[n][band], left[0][band], b.x, b.y);
#pragma unroll
          for (int band = 0; band < 2; band++) mma_bytes<SIGNED>(sums[n][band], left[1][band], b.z, b.w);
        }
      }
    }
    const int row = row_tile * 32 + g;
    begin(row);
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int32_t of[4] = {sums[n][0][i], sums[n][0][i + 2], sums[n][1][i], sums[n][1][i + 2]};
        finish(n * 8 + 2 * q + i, row, of);
      }
    }
  }
}

template <int BITS, int NT, typename T, typename Out>
__device__ __forceinline__ void int8(const uint4* __restrict__ codes, const float* __restrict__ unit,
                                     const float* __restrict__ bias, const T* __restrict__ x,
                                     const float* __restrict__ step, const float* __restrict__ shift,
                                     Out* __restrict__ y, int rows, int cols, int64_t tokens, int steps,
                                     int rounds, int lo, int hi, int twice, int low) {
  typedef Tile<BITS> Of;
  constexpr int N = 8 * NT;
  extern __shared__ uint4 shared[];
  __shared__ int32_t totals[N];
  __shared__ float scales[N];
  const int lane = lane_of(), warp = warp_of();
  constexpr int PAD = packed_pad_cols(BITS);
  const int pads = (cols + PAD - 1) / PAD, products = pads * PAD / 32;
  // An odd number of 64 bytes: rows of tokens begin in alternating halves of the banks.
  const int apart = 4 * ((products + 3) / 4 * 2 + 1);
  const int64_t first = int64_t(blockIdx.y) * N;

  const Source<T> source = {x, shift, rounds, lo, hi, cols, cols % 4 == 0 && aligned(x, 4 * sizeof(T))};
  for (int n = warp; n < N; n += WARPS) {
    const int64_t t = first + n;
    uint2* const to = reinterpret_cast<uint2*>(shared + n * apart);
    int sum = 0;
    bool nan = false;
    float token_step = step != nullptr && t < tokens ? step[t % steps] : 1.0f;
    if (rounds) token_step = lsq_scale_of(token_step);
    if (t < tokens) {
      const float inverse = 1.0f / token_step;
      const bool exact = !(token_step >= 1e-30f && token_step <= 1e30f);
      // One lane's eight bytes of one product at a time.
      for (int i = lane; i < products * 4; i += WARP) {
        const int product = i / 4, q = i % 4, tile = product / (Of::COLS / 32), m = product % (Of::COLS / 32);
        uint32_t both[2] = {0, 0};
#pragma unroll
        for (int second = 0; second < 2; second++) {
          const int at = tile * Of::COLS + packed_col(packed_pair(BITS, m, second), q, 0);
          sum += source.four(t, at, token_step, inverse, exact, second, both, nan);
        }
        to[(product / 2 * 4 + q) * 2 + product % 2] = make_uint2(both[0], both[1]);
      }
    } else {
      for (int i = lane; i < products * 4; i += WARP) to[i] = make_uint2(0, 0);
    }
    sum = warp_sum(sum);
    nan = __any_sync(ALL_LANES, nan);
    if (lane == 0) {
      totals[n] = sum;
      scales[n] = nan ? NAN : token_step;
    }
  }
  __syncthreads();

  const int64_t left = tokens - first;
  Out* const own_y = y + first * rows;
  float units[4], biases[4];
  auto begin = [&](int row) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const bool there = row + i * 8 < rows;
      units[i] = there && unit != nullptr ? unit[row + i * 8] : 0.0f;
      // Adding -0 changes nothing, not even the sign of a zero.
      biases[i] = there && bias != nullptr ? bias[row + i * 8] : -0.0f;
    }
  };
  auto finish = [&](int n, int row, const int32_t (&fields)[4]) {
    if (n >= left) return;
    const float token_step = scales[n];
    const int32_t total = totals[n];
    Out* const to = own_y + int64_t(n) * rows + row;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (row + i * 8 >= rows) continue;
      const int32_t whole = packed_whole(fields[i], twice, low, total);
      if (unit != nullptr) {
        to[i * 8] = from_float<Out>(packed_value(whole, token_step, units[i]) + biases[i]);
      } else if constexpr (sizeof(Out) == 4) {
        reinterpret_cast<int32_t*>(to)[i * 8] = whole;
      }
    }
  };
  if (lo < 0) {
    sums_of<BITS, NT, true>(codes, shared, apart, rows, pads, begin, finish);
  } else {
    sums_of<BITS, NT, false>(codes, shared, apart, rows, pads, begin, finish);
  }
}

#define INT8(BITS, NT, N, SUFFIX, T, OUT)                                                                   \
  extern "C" __global__ void __launch_bounds__(WARPS* WARP, NT == 2 ? 2 : 1)                                \
      packed_int8_w##BITS##_n##N##_##SUFFIX(const uint4* codes, const float* unit, const float* bias,       \
                                            const T* x, const float* step, const float* shift, OUT* y,      \
                                            int rows, int cols, int64_t tokens, int steps, int rounds,      \
                                            int lo, int hi, int twice, int low) {                           \
    int8<BITS, NT, T, OUT>(codes, unit, bias, x, step, shift, y, rows, cols, tokens, steps, rounds, lo, hi, \
                           twice, low);                                                                     \
  }
#define INT8_BITS(SUFFIX, T, OUT)                                                              \
  INT8(2, 8, 64, SUFFIX, T, OUT)                                                               \
  INT8(3, 8, 64, SUFFIX, T, OUT)                                                               \
  INT8(4, 8, 64, SUFFIX, T, OUT)                                                               \
  INT8(8, 8, 64, SUFFIX, T, OUT) INT8(2, 2, 16, SUFFIX, T, OUT) INT8(3, 2, 16, SUFFIX, T, OUT) \
      INT8(4, 2, 16, SUFFIX, T, OUT) INT8(8, 2, 16, SUFFIX, T, OUT)
#define INT8_TYPE(SUFFIX, T) INT8_BITS(SUFFIX, T, T)
FOR_EACH_TYPE(INT8_TYPE)
INT8_BITS(u8, uint8_t, float)
