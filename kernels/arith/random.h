/* Philox 4x32-10 as in src/random.rs (Salmon et al. 2011), and the masks of src/kernels/dropout.rs.
 *
 * A stream is numbered by FNV-1a over a name and then over indices of 8 bytes each, little-endian. Draw i
 * of a stream is word i % 4 of block i / 4, whose counter is (block, stream) under the seed as key. */
#ifndef QTUNE_ARITH_RANDOM_H
#define QTUNE_ARITH_RANDOM_H

#include "functions.h"

#include <stdint.h>

/* Elements that draw from one stream of a dropout's mask: GRAIN of src/kernels/cpu.rs. */
#define DROPOUT_CHUNK 16384

typedef struct {
  uint32_t word[4];
} Philox;

QT_FN Philox philox(uint64_t block, uint64_t stream, uint64_t seed) {
  Philox c;
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  c.word[0] = (uint32_t)block;
  c.word[1] = (uint32_t)(block >> 32);
  c.word[2] = (uint32_t)stream;
  c.word[3] = (uint32_t)(stream >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t a = (uint64_t)0xD2511F53u * c.word[0];
    const uint64_t b = (uint64_t)0xCD9E8D57u * c.word[2];
    Philox next;
    next.word[0] = (uint32_t)(b >> 32) ^ c.word[1] ^ key0;
    next.word[1] = (uint32_t)b;
    next.word[2] = (uint32_t)(a >> 32) ^ c.word[3] ^ key1;
    next.word[3] = (uint32_t)a;
    c = next;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

/* The hash of what a stream was numbered by so far, one index further. The host starts it with the name. */
QT_FN uint64_t stream_index(uint64_t hash, uint64_t index) {
  for (int byte = 0; byte < 8; byte++) {
    hash = (hash ^ (index >> (8 * byte) & 0xff)) * 0x100000001b3ull;
  }
  return hash;
}

/* The stream that an element of a tensor draws from, whose mask has the hash of (name, pass). */
QT_FN uint64_t dropout_stream(uint64_t element, uint64_t hash) {
  return stream_index(hash, element / DROPOUT_CHUNK);
}

/* The draws of an element, a multiple of 4, and the three behind it. */
QT_FN Philox dropout_draws(uint64_t element, uint64_t stream, uint64_t seed) {
  return philox(element % DROPOUT_CHUNK / 4, stream, seed);
}

/* Whether a draw drops its element: uniform < p, where uniform is the draw's upper 24 bits over 2^24, so
 * that the comparison is one of integers. `below` is ceil(p * 2^24), taken in f64. */
QT_FN int dropped(uint32_t draw, uint32_t below) { return (draw >> 8) < below; }

#endif
