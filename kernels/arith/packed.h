/* Packed weights: fields of any width, the tiled layout that the kernels read, and how a field becomes a
 * number for a tensor core; the arithmetic of src/kernels/packed on the device.
 *
 * A code is kept as the field u = code - lo, and a weight is step * (u + zero), zero = lo + offset, a
 * multiple of a half. A row as it comes ("canonical") is a stream of fields of 1 to 8 bits, least significant
 * bit first, from a byte on. The tiled layout has fields of 2, 3, 4 or 8 bits and one word for what one lane
 * puts into one register:
 *
 *     tile        32 rows x 128, 256, 64, 32 columns at 2, 3, 4, 8 bits: two bands of 16 rows, one behind
 *                 the other
 *     band        1 (at 3 bits 3) vectors of 32 lanes x 16 bytes, so that a warp reads 512 bytes at once
 *     lane, word  lane 4 g + q holds the rows g and g + 8 of the band and, of every 32 columns, those from
 *                 8 q to 8 q + 7: columns 4 h + 0, 1 of row g in word 0, of row g + 8 in word 1, columns
 *                 4 h + 2, 3 in words 2 and 3
 *     step        16 columns, s = 2 (column / 32) + h: what one m16n8k16 product sums over. Each 16-bit
 *                 half of a word holds the fields of all steps of the tile, of the even column in the low
 *                 half
 *
 * Which columns a product sums in which order is free as long as both operands agree, so the activations keep
 * their natural order: a lane's eight columns are the 16 bytes it reads for two steps. */
#ifndef QTUNE_ARITH_PACKED_H
#define QTUNE_ARITH_PACKED_H

#include <math.h>
#include <stdint.h>

#ifndef QT_FN
#if defined(__CUDACC__)
#define QT_FN static __host__ __device__ __forceinline__
#else
#define QT_FN static inline
#endif
#endif

/* In C++ also for constants. */
#if defined(__cplusplus)
#define QT_CONST QT_FN constexpr
#else
#define QT_CONST QT_FN
#endif

/* Rows of a tile and of a band. */
#define PACKED_TILE_ROWS 32
#define PACKED_BAND_ROWS 16

/* Bytes of a canonical row. */
QT_FN uint64_t packed_row_bytes(uint64_t cols, int bits) { return (cols * (uint64_t)bits + 7) / 8; }

/* Field `col` of a canonical row. */
QT_FN uint32_t packed_field(const uint8_t* row, uint64_t col, int bits) {
  const uint64_t at = col * (uint64_t)bits;
  const int shift = (int)(at % 8);
  uint32_t word = row[at / 8];
  /* The next byte only where the field reaches into it: a row may end here. */
  if (shift + bits > 8) word |= (uint32_t)row[at / 8 + 1] << 8;
  return (word >> shift) & ((1u << bits) - 1u);
}

/* Width of a field in the tiled layout, from its width as it comes. */
QT_CONST int packed_tile_bits(int bits) { return bits <= 2 ? 2 : bits <= 4 ? bits : 8; }

/* Columns of a tile. */
QT_CONST int packed_tile_cols(int bits) { return bits == 2 ? 128 : bits == 3 ? 256 : bits == 4 ? 64 : 32; }

/* 16-byte vectors of a lane in a band. */
QT_CONST int packed_vectors(int bits) { return bits == 3 ? 3 : 1; }

/* Columns that a row is filled up to a multiple of, with fields 0: whole tiles, and at least 64. */
QT_CONST int packed_pad_cols(int bits) { return packed_tile_cols(bits) < 64 ? 64 : packed_tile_cols(bits); }

/* Tiles in a row of tiles. */
QT_FN uint64_t packed_tiles(uint64_t cols, int bits) {
  const uint64_t pad = (uint64_t)packed_pad_cols(bits);
  return (cols + pad - 1) / pad * (pad / (uint64_t)packed_tile_cols(bits));
}

/* 32-bit words of a weight. */
QT_FN uint64_t packed_words(uint64_t rows, uint64_t cols, int bits) {
  return (rows + 31) / 32 * packed_tiles(cols, bits) * (uint64_t)(2 * packed_vectors(bits) * 128);
}

/* Columns that a set of steps (below) is for: the largest power of two that divides the group, which is a
 * multiple of 32; 0 where a row has one step. */
QT_FN uint32_t packed_pitch(uint32_t group) { return group & (0u - group); }

/* Sets in a row of tiles; those for columns that only fill up included. */
QT_FN uint64_t packed_sets(uint64_t cols, int bits, uint64_t pitch) {
  const uint64_t filled = packed_tiles(cols, bits) * (uint64_t)packed_tile_cols(bits);
  return pitch == 0 ? 1 : (filled + pitch - 1) / pitch;
}

/* The step, 0 .. tile_cols / 16, of a column of a tile; its lane's q; which of the lane's four columns it
 * is. */
QT_CONST int packed_step(int col) { return 2 * (col / 32) + col / 4 % 2; }
QT_CONST int packed_quarter(int col) { return col / 8 % 4; }
QT_CONST int packed_slot(int col) { return col % 4; }
/* And back. */
QT_CONST int packed_col(int step, int quarter, int slot) {
  return 32 * (step / 2) + 8 * quarter + 4 * (step % 2) + slot;
}

/* Steps of weights are kept in sets of 32, one for the rows of a tile: a lane reads those of its four rows g,
 * g + 8, g + 16, g + 24 at once. Where in its set a row's step is. */
QT_CONST int packed_set_slot(int row) { return row % 8 * 4 + row / 8 % 4; }

/* Where bit `bit` of the field of a step lies: the lane's vector, and the bit of the 16-bit half. Of three
 * bits five fields fill 15 bits of each vector, and the last bits are the sixteenth field. */
QT_CONST int packed_vector(int bits, int step, int bit) {
  return bits != 3 ? 0 : step == 15 ? bit : step / 5;
}
QT_CONST int packed_bit(int bits, int step, int bit) {
  return bits != 3 ? bits * step + bit : step == 15 ? 15 : 3 * (step % 5) + bit;
}

/* One bit of a weight in the tiled layout: bit `bit` of word `word`. */
typedef struct {
  uint64_t word;
  int bit;
} packed_place;

/* Where bit `bit` of the field of a row and column is, in a weight of `tiles` tiles a row. */
QT_FN packed_place packed_place_of(int bits, uint64_t tiles, uint64_t row, uint64_t col, int bit) {
  const int width = packed_tile_cols(bits), vectors = packed_vectors(bits);
  const int c = (int)(col % (uint64_t)width), r = (int)(row % 32);
  const int step = packed_step(c), slot = packed_slot(c);
  const int lane = 4 * (r % 8) + packed_quarter(c), word = 2 * (slot / 2) + r / 8 % 2;
  const uint64_t tile = row / 32 * tiles + col / (uint64_t)width;
  const uint64_t vector =
      (tile * 2 + (uint64_t)(r / 16)) * (uint64_t)vectors + (uint64_t)packed_vector(bits, step, bit);
  packed_place place;
  place.word = (vector * 32 + (uint64_t)lane) * 4 + (uint64_t)word;
  place.bit = 16 * (slot % 2) + packed_bit(bits, step, bit);
  return place;
}

/* A bit of a field: what `packed_place_of` takes. */
typedef struct {
  uint64_t row, col;
  int bit;
} packed_origin;

/* The inverse of `packed_place_of`. */
QT_FN packed_origin packed_origin_of(int bits, uint64_t tiles, uint64_t word, int bit) {
  const int width = packed_tile_cols(bits), vectors = packed_vectors(bits);
  const int part = (int)(word % 4), lane = (int)(word / 4 % 32), half = bit / 16, at = bit % 16;
  const uint64_t vector = word / 128, tile = vector / (uint64_t)(2 * vectors);
  const int v = (int)(vector % (uint64_t)vectors), band = (int)(vector / (uint64_t)vectors % 2);
  const int odd = bits == 3 && at == 15;
  const int step = odd ? 15 : bits == 3 ? 5 * v + at / 3 : at / bits;
  packed_origin origin;
  origin.bit = odd ? v : at % bits;
  origin.row = tile / tiles * 32 + (uint64_t)(16 * band + 8 * (part % 2) + lane / 4);
  origin.col = tile % tiles * (uint64_t)width + (uint64_t)packed_col(step, lane % 4, 2 * (part / 2) + half);
  return origin;
}

/* Of 3 bits: what the word of one vector has of the sixteenth field. */
QT_FN uint32_t packed_sixteenth(uint32_t word, int vector) {
  return (word >> (15 - vector)) & (0x00010001u << vector);
}

/* The two fields of one word and step as the halves of a register, left where they are in the mantissa: of a
 * half with no exponent, which is then the number u * 2^(power - 24) exactly (tensor cores read subnormal
 * halves). One instruction for most; w0, w1, w2 are the word in the lane's vectors, of which all but 3 bits
 * has one. */
QT_FN uint32_t packed_halves(int bits, int step, uint32_t w0, uint32_t w1, uint32_t w2) {
  const uint32_t ones = ((1u << bits) - 1u) * 0x00010001u;
  if (bits == 3) {
    const int i = step % 5;
    const uint32_t w = step < 5 ? w0 : step < 10 ? w1 : w2;
    if (step == 15) return packed_sixteenth(w0, 0) | packed_sixteenth(w1, 1) | packed_sixteenth(w2, 2);
    return (i < 3 ? w : w >> 9) & (ones << (3 * (i % 3)));
  }
  return (w0 >> (bits * step / 8 * 8)) & (ones << (bits * step % 8));
}
/* The power above: where the field lies in its half. */
QT_CONST int packed_power(int bits, int step) {
  return bits != 3 ? bits * step % 8 : step == 15 ? 0 : 3 * (step % 5 % 3);
}

/* The same with power 0 for any step, for steps that are not constants. */
QT_FN uint32_t packed_halves_low(int bits, int step, uint32_t w0, uint32_t w1, uint32_t w2) {
  const uint32_t ones = ((1u << bits) - 1u) * 0x00010001u;
  if (bits == 3) {
    const uint32_t w = step < 5 ? w0 : step < 10 ? w1 : w2;
    if (step == 15) return packed_halves(3, 15, w0, w1, w2);
    return (w >> (3 * (step % 5))) & ones;
  }
  return (w0 >> (bits * step)) & ones;
}

/* For products of integers, which sum over 32 columns: steps in pairs, so that all four bytes of a register
 * come out of a word at once: bytes 0 and 2 are those of the first step, 1 and 3 those of the second. Which
 * steps product m takes: */
QT_CONST int packed_pair(int bits, int m, int second) {
  return bits == 2   ? m + 4 * second
         : bits == 4 ? m + 2 * second
         : bits == 8 ? second
         : m < 6     ? 5 * (m / 2) + m % 2 + 3 * second
         : m == 6    ? (second ? 7 : 2)
                     : (second ? 15 : 12);
}
QT_FN uint32_t packed_bytes(int bits, int m, uint32_t w0, uint32_t w1, uint32_t w2) {
  if (bits == 3) {
    const uint32_t w = m < 2 ? w0 : m < 4 ? w1 : w2;
    if (m == 6) return ((w0 >> 6) & 0x00070007u) | ((w1 << 2) & 0x07000700u);
    if (m == 7) {
      return ((w2 >> 6) & 0x00070007u) | ((w0 >> 7) & 0x01000100u) | ((w1 >> 6) & 0x02000200u) |
             ((w2 >> 5) & 0x04000400u);
    }
    return m % 2 == 0 ? (w & 0x00070007u) | ((w >> 1) & 0x07000700u)
                      : ((w >> 3) & 0x00070007u) | ((w >> 4) & 0x07000700u);
  }
  return (w0 >> (bits * m)) & (((1u << bits) - 1u) * 0x01010101u);
}

/* 2^k as a float, -126 <= k <= 127. */
QT_FN float packed_two_to(int k) {
  union {
    uint32_t bits;
    float x;
  } both;
  both.bits = (uint32_t)(k + 127) << 23;
  return both.x;
}

/* The bits of |x|, 0 for what is not finite: the largest of a token's says which power of two it is lifted
 * by. */
QT_FN uint32_t packed_size_bits(float x) {
  union {
    float x;
    uint32_t bits;
  } both;
  both.x = x;
  both.bits &= 0x7fffffffu;
  return both.bits < 0x7f800000u ? both.bits : 0u;
}

/* The k with 2^14 <= 2^k top < 2^15, from the bits of a token's largest; at most 120. Times 2^(k - power),
 * power up to 6, a token fits halves: a number of f16's or bf16's precision that is at least 2^-22 of the
 * largest stays exact, and of a smaller one at most 2^-33 of the largest is lost, below what sums in f32
 * round away. */
QT_FN int packed_lift(uint32_t top) {
  const int k = 141 - (int)(top >> 23);
  return k < 120 ? k : 120;
}

/* One code: clamp(rne(v / step), lo, hi) for v = x + shift, without a division for most. The product with the
 * reciprocal is at most three roundings off, 3 * 2^-24 of 256; within 2^-14 of a tie the quotient itself
 * decides. `exact` says to divide always: where the step is not within 1e-30 .. 1e30 the reciprocal may not
 * be normal. A NaN comes out as one. */
QT_FN float packed_quotient_code(float v, float step, float inverse, int exact, float lo, float hi) {
  float near = v * inverse;
  near = near < lo ? lo : near;
  near = near > hi ? hi : near;
  if (exact || fabsf(near - rintf(near)) >= 0.5f - 1.0f / 16384.0f) {
    near = v / step;
    near = near < lo ? lo : near;
    near = near > hi ? hi : near;
  }
  return rintf(near);
}

/* The whole sum of codes from that of fields: codes (2 code + 1 where `twice` is 1) count from `low` at field
 * 0, and `tokens` is the sum of the activation's codes. What overflows on the way is undone: the result
 * fits. */
QT_FN int32_t packed_whole(int32_t fields, int twice, int32_t low, int32_t token) {
  return (int32_t)(((uint32_t)fields << twice) + (uint32_t)low * (uint32_t)token);
}

/* A whole sum as a value: one product of the two steps, then one with the sum. */
QT_FN float packed_value(int32_t whole, float token_step, float unit) {
  return (float)whole * (token_step * unit);
}

#endif
