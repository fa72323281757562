// Packed weights as they come and as the products read them: repacking, rows as dense values, and the plain
// product (src/kernels/packed). What kernel a product takes: packed.cuh.
//
//     value[r, c] = step[r, c / group] (u[r, c] + zero)
//
// packed_repack: canonical rows to tiles, once at load; a thread writes one word.
//     threads 256, grid ceil(words / 256), words = packed_words(rows, cols, packed_tile_bits(bits)); bits is
//     the width as it comes, 1 to 8; bits / 8 bytes read and written a code
// packed_repack_steps: steps [rows, ceil(cols / group)] to sets of 32; a thread writes one step.
//     threads 256, grid ceil(row tiles * sets * 32 / 256), sets = packed_sets(cols, tile bits, pitch) for
//     each tile of rows; pitch = packed_pitch(group), 0 for one step a row; bits as above
// packed_gather_T: rows of canonical codes by their numbers, as embeddings do; a thread writes 16 bytes.
//     threads 256, grid ceil(count * ceil(cols / (16 / size of T)) / 256)
// packed_values_T: the same from tiles, bits being theirs; a thread writes 8 columns. Without ids the rows from
//     `from` on, for dense products and panels.
//     threads 256, grid ceil(count * ceil(cols / 8) / 256)
// packed_plain_T: y = x W^T of any width and group from canonical codes; a warp a row and 8 tokens. Slow.
//     threads 256, grid x ceil(rows / 8), y ceil(tokens / 8)
//
// ids: [count] u32 (kind 1) or i64 (kind 2), or none (kind 0), then row from + i. What is no row gives NaN.
#include "packed.cuh"

static __device__ __forceinline__ int64_t thread_of_grid() {
  return int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
}

extern "C" __global__ void packed_repack(const uint8_t* codes, uint32_t* words, int64_t rows, int64_t cols,
                                         int bits) {
  const int wide = packed_tile_bits(bits);
  const uint64_t at = uint64_t(thread_of_grid()), tiles = packed_tiles(uint64_t(cols), wide);
  if (at >= packed_words(uint64_t(rows), uint64_t(cols), wide)) return;
  const uint64_t bytes = packed_row_bytes(uint64_t(cols), bits);
  uint32_t word = 0;
  for (int half = 0; half < 32; half += 16) {
    // Field by field. Of 3 bits the last is one bit of a field whose others are in other words.
    for (int bit = 0; bit < 16; bit += wide) {
      const packed_origin from = packed_origin_of(wide, tiles, at, half + bit);
      if (from.row >= uint64_t(rows) || from.col >= uint64_t(cols)) continue;
      uint32_t field = packed_field(codes + from.row * bytes, from.col, bits) >> from.bit;
      if (bit + wide > 16) field &= 1u;
      word |= field << (half + bit);
    }
  }
  words[at] = word;
}

extern "C" __global__ void packed_repack_steps(const float* step, float* sets, int64_t rows, int64_t cols,
                                               int64_t group, int64_t pitch, int bits) {
  const int64_t pitches = int64_t(packed_sets(uint64_t(cols), packed_tile_bits(bits), uint64_t(pitch)));
  const int64_t groups = (cols + group - 1) / group;
  const int64_t at = thread_of_grid(), set = at / 32;
  if (set >= (rows + 31) / 32 * pitches) return;
  // Slot 4 g + i is row g + 8 i.
  const int64_t row = set / pitches * 32 + at % 4 * 8 + at % 32 / 4, col = set % pitches * pitch;
  sets[at] = row < rows && col < cols ? step[row * groups + col / group] : 0.0f;
}

// The row that output row i is; -1 for none.
static __device__ __forceinline__ int64_t row_of(const void* ids, int kind, int64_t from, int64_t i,
                                                 int64_t rows) {
  const int64_t id = kind == 0   ? from + i
                     : kind == 1 ? static_cast<const uint32_t*>(ids)[i]
                                 : static_cast<const int64_t*>(ids)[i];
  return id >= 0 && id < rows ? id : -1;
}

template <int N, typename T>
__device__ __forceinline__ void put(T* y, int64_t at, int64_t width, bool wide, const float (&v)[N]) {
  if (wide) return store_floats<N>(y + at, v);
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (at + i < width) y[at + i] = from_float<T>(v[i]);
  }
}

template <typename T>
__device__ __forceinline__ void gather(const uint8_t* __restrict__ codes, const float* __restrict__ step,
                                       const void* __restrict__ ids, T* __restrict__ y, int64_t count,
                                       int64_t rows, int64_t cols, int64_t group, int bits, float zero,
                                       int kind, int64_t start) {
  constexpr int AT_ONCE = WIDE<T>;
  const int64_t parts = (cols + AT_ONCE - 1) / AT_ONCE, i = thread_of_grid() / parts;
  const int64_t at = thread_of_grid() % parts * AT_ONCE, groups = (cols + group - 1) / group;
  if (i >= count) return;
  const int64_t row = row_of(ids, kind, start, i, rows);
  const uint8_t* const from = codes + row * int64_t(packed_row_bytes(uint64_t(cols), bits));
  float v[AT_ONCE];
#pragma unroll
  for (int k = 0; k < AT_ONCE; k++) {
    v[k] = NAN;
    if (row >= 0 && at + k < cols) {
      v[k] =
          step[row * groups + (at + k) / group] * (float(packed_field(from, uint64_t(at + k), bits)) + zero);
    }
  }
  put(y + i * cols, at, cols, cols % AT_ONCE == 0 && aligned(y, 16), v);
}

template <typename T>
__device__ __forceinline__ void values(const uint32_t* __restrict__ words, const float* __restrict__ sets,
                                       const void* __restrict__ ids, T* __restrict__ y, int64_t count,
                                       int64_t rows, int64_t cols, int64_t pitch, int bits, float zero,
                                       int kind, int64_t start) {
  const int64_t parts = (cols + 7) / 8, i = thread_of_grid() / parts, at = thread_of_grid() % parts * 8;
  if (i >= count) return;
  const int64_t row = row_of(ids, kind, start, i, rows);
  float v[8];
#pragma unroll
  for (int k = 0; k < 8; k++) v[k] = NAN;
  if (row >= 0) {
    const int width = packed_tile_cols(bits), vectors = packed_vectors(bits),
              first = packed_step(int(at % width));
    const int64_t tile = row / 32 * int64_t(packed_tiles(uint64_t(cols), bits)) + at / width;
    const int lane = int(row % 8) * 4 + packed_quarter(int(at % width));
    const int64_t pitches = int64_t(packed_sets(uint64_t(cols), bits, uint64_t(pitch)));
    const float step =
        sets[(row / 32 * pitches + (pitch == 0 ? 0 : at / pitch)) * 32 + packed_set_slot(int(row % 32))];
    const uint32_t* const from =
        words + ((tile * 2 + row / 16 % 2) * vectors * WARP + lane) * 4 + row / 8 % 2;
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
      // Words 0 and 2 are a row's, or 1 and 3.
      uint32_t w[3] = {0, 0, 0};
#pragma unroll
      for (int vector = 0; vector < 3; vector++) {
        if (vector < vectors) w[vector] = from[vector * WARP * 4 + pair * 2];
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint32_t low = packed_halves_low(bits, first + half, w[0], w[1], w[2]);
        v[half * 4 + pair * 2] = step * (float(low & 0xffffu) + zero);
        v[half * 4 + pair * 2 + 1] = step * (float(low >> 16) + zero);
      }
    }
  }
  put(y + i * cols, at, cols, cols % 8 == 0 && aligned(y, 16), v);
}

template <typename T>
__device__ __forceinline__ void plain(const uint8_t* __restrict__ codes, const float* __restrict__ step,
                                      const T* __restrict__ x, T* __restrict__ y, int64_t rows, int64_t cols,
                                      int64_t tokens, int64_t group, int bits, float zero) {
  constexpr int AT_ONCE = 8;
  const int64_t row = int64_t(blockIdx.x) * AT_ONCE + warp_of(), first = int64_t(blockIdx.y) * AT_ONCE;
  if (row >= rows) return;
  const int64_t groups = (cols + group - 1) / group;
  const uint8_t* const from = codes + row * int64_t(packed_row_bytes(uint64_t(cols), bits));
  float sums[AT_ONCE] = {};
  for (int64_t c = lane_of(); c < cols; c += WARP) {
    const float w = step[row * groups + c / group] * (float(packed_field(from, uint64_t(c), bits)) + zero);
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      if (first + i < tokens) sums[i] = fmaf(w, to_float(x[(first + i) * cols + c]), sums[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < AT_ONCE; i++) {
    const float sum = warp_sum(sums[i]);
    if (lane_of() == 0 && first + i < tokens) y[(first + i) * rows + row] = from_float<T>(sum);
  }
}

#define PACKED(SUFFIX, T)                                                                               \
  extern "C" __global__ void packed_gather_##SUFFIX(                                                    \
      const uint8_t* codes, const float* step, const void* ids, T* y, int64_t count, int64_t rows,      \
      int64_t cols, int64_t group, int bits, float zero, int kind, int64_t from) {                      \
    gather<T>(codes, step, ids, y, count, rows, cols, group, bits, zero, kind, from);                   \
  }                                                                                                     \
  extern "C" __global__ void packed_values_##SUFFIX(                                                    \
      const uint32_t* words, const float* sets, const void* ids, T* y, int64_t count, int64_t rows,     \
      int64_t cols, int64_t pitch, int bits, float zero, int kind, int64_t from) {                      \
    values<T>(words, sets, ids, y, count, rows, cols, pitch, bits, zero, kind, from);                   \
  }                                                                                                     \
  extern "C" __global__ void packed_plain_##SUFFIX(const uint8_t* codes, const float* step, const T* x, \
                                                   T* y, int64_t rows, int64_t cols, int64_t tokens,    \
                                                   int64_t group, int bits, float zero) {               \
    plain<T>(codes, step, x, y, rows, cols, tokens, group, bits, zero);                                 \
  }
FOR_EACH_TYPE(PACKED)
