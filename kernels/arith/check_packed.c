/* Checks arith/packed.h on the host, every case where there are not too many:
 *
 *     cc -std=c99 -O1 -ffp-contract=off -Ikernels kernels/arith/check_packed.c -lm -o check_packed
 *     ./check_packed */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arith/packed.h"

#define CHECK(what, ...)     \
  do {                       \
    if (!(what)) {           \
      printf("%s: ", #what); \
      printf(__VA_ARGS__);   \
      printf("\n");          \
      exit(1);               \
    }                        \
  } while (0)

static const int WIDTHS[4] = {2, 3, 4, 8};

/* The value of a half. */
static float half_value(uint32_t half) {
  const int exponent = (int)(half >> 10 & 31), mantissa = (int)(half & 1023);
  const float size =
      exponent ? ldexpf((float)(1024 + mantissa), exponent - 25) : ldexpf((float)mantissa, -24);
  return half & 0x8000 ? -size : size;
}

/* Whether a half holds x. */
static int is_half(float x) {
  int exponent;
  const float mantissa = frexpf(fabsf(x), &exponent);
  /* 11 bits, or whole multiples of 2^-24 below the normal numbers. */
  const float whole = exponent > -14 ? ldexpf(mantissa, 11) : ldexpf(fabsf(x), 24);
  return fabsf(x) <= 65504.0f && whole == rintf(whole);
}

static uint32_t random_word(void) {
  static uint64_t state = 9;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(state >> 32);
}

/* Every pair of bytes at every width: the fields of a stream, one by one and against bits taken alone. */
static void fields(void) {
  for (int bits = 1; bits <= 8; bits++) {
    for (uint32_t word = 0; word < 1u << 16; word++) {
      const uint8_t row[3] = {(uint8_t)word, (uint8_t)(word >> 8), 0x5a};
      const uint32_t stream = word | 0x5a0000u;
      for (int col = 0; col * bits < 16; col++) {
        uint32_t want = 0;
        for (int b = 0; b < bits; b++) want |= (stream >> (col * bits + b) & 1u) << b;
        CHECK(packed_field(row, (uint64_t)col, bits) == want, "%d bits, %04x, field %d", bits, word, col);
      }
    }
    /* A field that ends with the row does not read behind it: under -fsanitize=address this would show. */
    for (int cols = 1; cols <= 17; cols++) {
      const uint64_t bytes = packed_row_bytes((uint64_t)cols, bits);
      uint8_t* row = malloc(bytes);
      memset(row, 0xff, bytes);
      CHECK(packed_field(row, (uint64_t)cols - 1, bits) == (1u << bits) - 1u, "%d bits, %d columns", bits,
            cols);
      free(row);
    }
  }
}

/* Each bit of each weight has a place of its own, the places fill the words, and each leads back. */
static void places(void) {
  for (int i = 0; i < 4; i++) {
    const int bits = WIDTHS[i];
    for (int rows = 32; rows <= 96; rows += 32) {
      for (int pads = 1; pads <= 3; pads++) {
        const uint64_t cols = (uint64_t)(pads * packed_pad_cols(bits)), tiles = packed_tiles(cols, bits);
        const uint64_t words = packed_words((uint64_t)rows, cols, bits);
        uint32_t* seen = calloc(words, 4);
        CHECK(words * 32 == (uint64_t)rows * cols * (uint64_t)bits, "%d bits: %d words", bits, (int)words);
        for (uint64_t row = 0; row < (uint64_t)rows; row++) {
          for (uint64_t col = 0; col < cols; col++) {
            for (int bit = 0; bit < bits; bit++) {
              const packed_place at = packed_place_of(bits, tiles, row, col, bit);
              const packed_origin back = packed_origin_of(bits, tiles, at.word, at.bit);
              CHECK(at.word < words && at.bit >= 0 && at.bit < 32, "%d bits, row %d", bits, (int)row);
              CHECK(!(seen[at.word] >> at.bit & 1), "%d bits, row %d, column %d", bits, (int)row, (int)col);
              seen[at.word] |= 1u << at.bit;
              CHECK(back.row == row && back.col == col && back.bit == bit,
                    "%d bits, row %d, column %d: %d, %d", bits, (int)row, (int)col, (int)back.row,
                    (int)back.col);
            }
          }
        }
        for (uint64_t w = 0; w < words; w++) CHECK(seen[w] == 0xffffffffu, "%d bits, word %d", bits, (int)w);
        free(seen);
      }
    }
    for (uint64_t cols = 1; cols < 600; cols++) {
      const uint64_t held = packed_tiles(cols, bits) * (uint64_t)packed_tile_cols(bits);
      CHECK(held >= cols && held < cols + (uint64_t)packed_pad_cols(bits), "%d bits, %d columns", bits,
            (int)cols);
      CHECK(held % 64 == 0, "%d bits, %d columns", bits, (int)cols);
    }
    for (int col = 0; col < packed_tile_cols(bits); col++) {
      CHECK(packed_col(packed_step(col), packed_quarter(col), packed_slot(col)) == col, "column %d", col);
    }
  }
}

/* Sets of steps: each row of a tile has its slot, a lane's four rows side by side; pitches divide their
 * group. */
static void sets(void) {
  uint32_t seen = 0;
  for (int row = 0; row < 32; row++) {
    seen |= 1u << packed_set_slot(row);
    CHECK(packed_set_slot(row) == packed_set_slot(row % 8) + row / 8, "row %d", row);
  }
  CHECK(seen == 0xffffffffu, "slots %x", seen);
  for (uint32_t group = 32; group <= 4096; group += 32) {
    const uint32_t pitch = packed_pitch(group);
    CHECK(pitch >= 32 && group % pitch == 0 && group / pitch % 2 == 1, "group %u: %u", group, pitch);
    CHECK((pitch & (pitch - 1)) == 0, "group %u: %u", group, pitch);
  }
  for (int i = 0; i < 4; i++) {
    for (uint64_t cols = 1; cols < 600; cols++) {
      const uint64_t filled = packed_tiles(cols, WIDTHS[i]) * (uint64_t)packed_tile_cols(WIDTHS[i]);
      for (uint64_t pitch = 32; pitch <= 512; pitch *= 2) {
        const uint64_t n = packed_sets(cols, WIDTHS[i], pitch);
        CHECK(n * pitch >= filled && (n - 1) * pitch < filled, "%d columns, pitch %d", (int)cols, (int)pitch);
      }
      CHECK(packed_sets(cols, WIDTHS[i], 0) == 1, "%d columns", (int)cols);
    }
  }
}

/* The registers that the kernels make of words hold the fields that the places say, in the halves and bytes
 * that the products expect. */
static void registers(void) {
  for (int i = 0; i < 4; i++) {
    const int bits = WIDTHS[i], width = packed_tile_cols(bits), vectors = packed_vectors(bits);
    const uint32_t mask = (1u << bits) - 1u;
    for (int round = 0; round < 40; round++) {
      /* All words a lane can hold in one vector for 2 bits are too many: random ones, and single bits. */
      uint32_t words[2 * 3 * 128];
      uint32_t field[32][256];
      memset(field, 0, sizeof field);
      for (int w = 0; w < 2 * vectors * 128; w++) {
        words[w] = round < 32 ? 1u << ((w + round) % 32) : random_word();
        for (int b = 0; b < 32; b++) {
          const packed_origin from = packed_origin_of(bits, 1, (uint64_t)w, b);
          field[from.row][from.col] |= (words[w] >> b & 1u) << from.bit;
        }
      }
      for (int band = 0; band < 2; band++) {
        for (int lane = 0; lane < 32; lane++) {
          for (int part = 0; part < 4; part++) {
            uint32_t w[3] = {0, 0, 0};
            const int row = 16 * band + 8 * (part % 2) + lane / 4;
            for (int v = 0; v < vectors; v++) w[v] = words[((band * vectors + v) * 32 + lane) * 4 + part];
            for (int step = 0; step < width / 16; step++) {
              const uint32_t low = packed_halves_low(bits, step, w[0], w[1], w[2]);
              const int power = packed_power(bits, step);
              CHECK(power >= 0 && power <= 6 && power + bits <= 10, "%d bits, step %d", bits, step);
              CHECK(packed_halves(bits, step, w[0], w[1], w[2]) == low << power, "%d bits, step %d", bits,
                    step);
              for (int half = 0; half < 2; half++) {
                const int col = packed_col(step, lane % 4, 2 * (part / 2) + half);
                CHECK((low >> (16 * half) & 0xffffu) == field[row][col], "%d bits, row %d, column %d", bits,
                      row, col);
              }
            }
            for (int m = 0; m < width / 32; m++) {
              const uint32_t bytes = packed_bytes(bits, m, w[0], w[1], w[2]);
              for (int byte = 0; byte < 4; byte++) {
                const int step = packed_pair(bits, m, byte % 2);
                const int col = packed_col(step, lane % 4, 2 * (part / 2) + byte / 2);
                CHECK((bytes >> (8 * byte) & 0xffu) == field[row][col], "%d bits, product %d, byte %d", bits,
                      m, byte);
                CHECK((bytes >> (8 * byte) & 0xffu) <= mask, "%d bits, product %d, byte %d", bits, m, byte);
              }
            }
          }
        }
      }
    }
    /* The pairs are all steps, each once. */
    uint32_t steps = 0;
    for (int m = 0; m < width / 32; m++)
      steps |= 1u << packed_pair(bits, m, 0) | 1u << packed_pair(bits, m, 1);
    CHECK(steps == (width == 512 ? 0xffffffffu : (1u << (width / 16)) - 1u), "%d bits: steps %x", bits,
          steps);
  }
}

/* Fields as halves: exact in place, and exact after the fma that puts them on their grid. */
static void halves(void) {
  for (int i = 0; i < 4; i++) {
    const int bits = WIDTHS[i];
    for (uint32_t u = 0; u < 1u << bits; u++) {
      for (int power = 0; power + bits <= 10; power++) {
        CHECK(half_value(u << power) == ldexpf((float)u, power - 24), "%d bits, field %u", bits, u);
      }
      for (int twice = -512; twice <= 512; twice++) {
        const float zero = 0.5f * (float)twice;
        for (int power = 0; power <= 6; power++) {
          const float times = packed_two_to(15 - power), plus = zero / 512.0f;
          const float exact = half_value((u << power) & 1023) * times + plus;
          if (power + bits > 10) continue;
          CHECK(is_half(times) && is_half(plus), "power %d, zero %g", power, (double)zero);
          CHECK(exact == ((float)u + zero) / 512.0f && is_half(exact), "%d bits, field %u, zero %g", bits, u,
                (double)zero);
        }
      }
    }
  }
}

/* Lifting: the largest ends in 2^14 .. 2^15, and powers of two are themselves. */
static void lifts(void) {
  for (int k = -126; k <= 127; k++) CHECK(packed_two_to(k) == ldexpf(1.0f, k), "2^%d", k);
  for (uint32_t high = 0; high < 0x7f80u; high++) {
    union {
      uint32_t bits;
      float x;
    } both;
    both.bits = high << 16 | 0x5a5a;
    const int k = packed_lift(packed_size_bits(-both.x));
    const float top = both.x * packed_two_to(k);
    CHECK(k >= -113 && k <= 120, "%g: %d", (double)both.x, k);
    CHECK(top < 32768.0f && (top >= 16384.0f || k == 120), "%g: %g", (double)both.x, (double)top);
  }
  CHECK(packed_size_bits(INFINITY) == 0 && packed_size_bits(NAN) == 0, "what is not finite");
}

/* Codes by the reciprocal are those by the quotient, near ties above all. */
static void codes(void) {
  const float steps[] = {1e-5f, 0.01f,  0.3f, 1.0f / 3.0f, 0.999999f, 1.0f,
                         7.3f,  255.0f, 3e4f, 1e-31f,      1e31f,     1e-40f};
  const float ranges[][2] = {{-2, 1}, {0, 3}, {-4, 3}, {0, 15}, {-128, 127}, {0, 255}};
  for (unsigned s = 0; s < sizeof steps / sizeof *steps; s++) {
    for (unsigned r = 0; r < 6; r++) {
      const float lo = ranges[r][0], hi = ranges[r][1], step = steps[s];
      const int exact = !(step >= 1e-30f && step <= 1e30f);
      for (int half = 2 * (int)lo - 5; half <= 2 * (int)hi + 5; half++) {
        float v = 0.5f * (float)half * step;
        for (int i = 0; i < 40; i++) v = nextafterf(v, -INFINITY);
        for (int i = 0; i < 80; i++) {
          float want = v / step;
          want = want < lo ? lo : want;
          want = want > hi ? hi : want;
          want = rintf(want);
          CHECK(packed_quotient_code(v, step, 1.0f / step, exact, lo, hi) == want, "%a / %a", (double)v,
                (double)step);
          v = nextafterf(v, INFINITY);
        }
      }
      for (int i = 0; i < 20000; i++) {
        const float v = ldexpf((float)(int32_t)random_word(), -31) * 1.2f * step * (hi - lo + 1.0f);
        float want = v / step;
        want = want < lo ? lo : want;
        want = want > hi ? hi : want;
        CHECK(packed_quotient_code(v, step, 1.0f / step, exact, lo, hi) == rintf(want), "%a / %a", (double)v,
              (double)step);
      }
      CHECK(isnan(packed_quotient_code(NAN, step, 1.0f / step, exact, lo, hi)), "a NaN");
      CHECK(packed_quotient_code(INFINITY, step, 1.0f / step, exact, lo, hi) == hi, "infinity");
    }
  }
}

/* Whole sums, also where the sum of fields leaves the range of an i32. */
static void wholes(void) {
  for (int round = 0; round < 1000; round++) {
    int64_t fields = 0, token = 0, want = 0;
    const int twice = round % 2, lo = -(int)(random_word() % 129);
    for (int k = 0; k < 60000; k++) {
      const int64_t u = random_word() % 256, q = round % 3 ? 255 : random_word() % 256;
      fields += u * q;
      token += q;
      want += q * (twice ? 2 * (u + lo) + 1 : u + lo);
    }
    if (want != (int32_t)want) continue;
    CHECK(packed_whole((int32_t)(uint32_t)fields, twice, twice ? 2 * lo + 1 : lo, (int32_t)token) ==
              (int32_t)want,
          "round %d", round);
  }
}

int main(void) {
  fields();
  places();
  sets();
  registers();
  halves();
  lifts();
  codes();
  wholes();
  printf("packed.h: all checks passed\n");
  return 0;
}
