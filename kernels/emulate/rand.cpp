// libcurand: uniform and normal numbers, not those of CUDA's generators.
#include <math.h>

#include "run.h"

#define API(NAME, ...) extern "C" __attribute__((visibility("default"))) int NAME(__VA_ARGS__)

struct Generator {
  void* stream = nullptr;
  uint64_t seed = 0, at = 0;
};
enum { SUCCESS = 0, NOT_MULTIPLE = 105, LAUNCH_FAILURE = 201 };

static uint64_t word(const Generator* g, uint64_t at) {
  uint64_t x = g->seed * 0x9e3779b97f4a7c15u + (g->at + at + 1) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}
// In (0, 1].
static double uniform(const Generator* g, uint64_t at) { return double((word(g, at) >> 11) + 1) * 0x1p-53; }
static double normal(const Generator* g, uint64_t at) {
  const uint64_t pair = at / 2 * 2;
  const double size = sqrt(-2.0 * log(uniform(g, pair))), angle = 2.0 * M_PI * uniform(g, pair + 1);
  return size * (at % 2 ? sin(angle) : cos(angle));
}

template <typename T, typename F>
static int generate(Generator* g, T* to, size_t count, F f) {
  const std::lock_guard<std::recursive_mutex> guard(emulate::whole());
  if (!emulate::device_range(to, count * sizeof(T)))
    emulate::fail("curand: not in one allocation of the device");
  return emulate::submit(g->stream, "curand",
                         [=] {
                           for (size_t i = 0; i < count; i++) to[i] = T(f(i));
                           g->at += count;
                         })
             ? LAUNCH_FAILURE
             : SUCCESS;
}

API(curandCreateGenerator, Generator** g, int) {
  *g = new Generator;
  return SUCCESS;
}
API(curandDestroyGenerator, Generator* g) {
  delete g;
  return SUCCESS;
}
API(curandSetStream, Generator* g, void* stream) {
  g->stream = stream;
  return SUCCESS;
}
API(curandSetPseudoRandomGeneratorSeed, Generator* g, unsigned long long seed) {
  g->seed = seed, g->at = 0;
  return SUCCESS;
}
API(curandSetGeneratorOffset, Generator* g, unsigned long long at) {
  g->at = at;
  return SUCCESS;
}
API(curandGenerate, Generator* g, unsigned* to, size_t count) {
  return generate(g, to, count, [=](size_t i) { return unsigned(word(g, i)); });
}
// A float may not be more than 1 either.
API(curandGenerateUniform, Generator* g, float* to, size_t count) {
  return generate(g, to, count, [=](size_t i) { return float((word(g, i) >> 40) + 1) * 0x1p-24f; });
}
API(curandGenerateUniformDouble, Generator* g, double* to, size_t count) {
  return generate(g, to, count, [=](size_t i) { return uniform(g, i); });
}
API(curandGenerateNormal, Generator* g, float* to, size_t count, float mean, float deviation) {
  if (count % 2) return NOT_MULTIPLE;
  return generate(g, to, count, [=](size_t i) { return mean + deviation * float(normal(g, i)); });
}
API(curandGenerateNormalDouble, Generator* g, double* to, size_t count, double mean, double deviation) {
  if (count % 2) return NOT_MULTIPLE;
  return generate(g, to, count, [=](size_t i) { return mean + deviation * normal(g, i); });
}
