// AdamW, CLASSP, Lion and SGD (src/kernels/adamw.rs, src/kernels/classp.rs, src/optim/lion.rs, sgd.rs) over all
// tensors in one launch, and the norm that clips their gradients. The equations of an entry are in
// arith/optim.h.
//
// Master weights and state are f32. Gradients are f32, f16 or bf16 and are multiplied by `*grad_scale`, which
// clips them; where it is NaN nothing at all is written, but counts of 0. Where a tensor has a copy, the new
// weight is written there too, rounded: in f16 beside gradients in f16, else in bf16. Where a tensor has
// `free`, entries at 0 keep their weight bit for bit (annealing); their state goes on, as that of the others.
//
//     squares      sums[chunk] = the sum of the squares of its gradients, in f64
//     sum_chunks   sums[tensor] = the sum over its chunks
//     clip         norms = the root of the sum over all tensors, then of each; grad_scale = most / norm where
//                  most > 0 and norm > most, NaN where f32 does not hold the norm, else 1
//
// Tensors are described by tables in device memory. The work is a list of chunks of 4096 entries, (tensor,
// number within it), or null: all chunks are of the one tensor that there is. A block takes one after the
// other, its threads 4 neighbours at a time where addresses allow it. Factors are those of each tensor, so
// that groups and counts of steps may differ among them. Sums are taken by whole blocks in an order that
// lengths alone set.
//
// Bytes moved for an entry with gradients of b bytes: squares b, AdamW 24 + b, CLASSP, Lion and SGD 16 + b,
// SGD without momentum 8 + b, 2 more for a copy, 4 for `free`. Powers of CLASSP other than 1, 2 and 1/2 are
// two f64 powers an entry, bound by arithmetic.
//
// Launch: 256 threads, as many blocks as chunks or fewer; sum_chunks and classp_count as many as tensors or
// fewer; clip one block of 1024 threads. CLASSP counts the entries that pass by chunk, then `classp_count` by
// tensor.

#include "arith/optim.h"
#include "common.cuh"

constexpr int CHUNK = 4096, THREADS = 256;

// A tensor; pointers that it has no use for are null.
struct Span {
  float* weight;
  const void* grad;
  float* state;   // first moment, sum or momentum
  float* state2;  // AdamW: second moment
  const float* free;
  void* copy;
  int64_t length;
  int64_t first_chunk;  // of the tensor among all chunks
};
static_assert(sizeof(Span) == 64 && sizeof(AdamW) == 32 && sizeof(Classp) == 48 && sizeof(Lion) == 24 &&
                  sizeof(Sgd) == 16,
              "the layouts that the host writes");

struct Chunk {
  uint32_t tensor, number;
};

static __device__ __forceinline__ Chunk chunk_at(const Chunk* table, uint32_t at) {
  return table == nullptr ? Chunk{0, at} : table[at];
}

// Whether there is a number to multiply gradients by.
static __device__ __forceinline__ bool moves(float grad_scale) { return grad_scale == grad_scale; }

// The type of a copy beside gradients of type G.
template <typename G>
struct CopyOf {
  typedef __nv_bfloat16 Type;
};
template <>
struct CopyOf<__half> {
  typedef __half Type;
};

struct AdamWStep {
  static constexpr bool ONE = true, TWO = true, WIDE_TOO = true;
  AdamW f;

  __device__ __forceinline__ float operator()(float p, float g, float& m, float& v) {
    m = adamw_moment1(m, g, f);
    v = adamw_moment2(v, g, f);
    return adamw_weight(p, m, v, f);
  }
};

struct LionStep {
  static constexpr bool ONE = true, TWO = false, WIDE_TOO = true;
  Lion f;

  __device__ __forceinline__ float operator()(float p, float g, float& m, float&) {
    const float moved = lion_weight(p, m, g, f);
    m = lion_momentum(m, g, f);
    return moved;
  }
};

template <bool MOMENTUM>
struct SgdStep {
  static constexpr bool ONE = MOMENTUM, TWO = false, WIDE_TOO = true;
  Sgd f;

  __device__ __forceinline__ float operator()(float p, float g, float& velocity, float&) {
    velocity = MOMENTUM ? sgd_velocity(velocity, g, f) : g;
    return sgd_weight(p, velocity, f);
  }
};

template <int POWER>
struct ClasspStep {
  // One copy of the f64 power in the code, not four.
  static constexpr bool ONE = true, TWO = false, WIDE_TOO = POWER != CLASSP_OTHER;
  Classp f;
  uint32_t passed;

  __device__ __forceinline__ float operator()(float w, float g, float& sum, float&) {
    const int passes = classp_passes(g, f);
    passed += passes;
    sum = classp_sum(sum, g, passes, POWER, f);
    return classp_weight(w, sum, g, passes, POWER, f);
  }
};

// The entries [from, to) by V neighbours, to - from a multiple of V.
template <int V, typename G, typename Step>
__device__ __forceinline__ void walk(const Span& span, int64_t from, int64_t to, float grad_scale,
                                     Step& step) {
  typedef typename CopyOf<G>::Type Copy;
  const G* grad = static_cast<const G*>(span.grad);
  Copy* copy = static_cast<Copy*>(span.copy);
  for (int64_t i = from + int64_t(threadIdx.x) * V; i < to; i += int64_t(blockDim.x) * V) {
    float g[V], p[V], a[V], b[V], free[V];
    load_floats(grad + i, g);
    load_floats(span.weight + i, p);
    if constexpr (Step::ONE) load_floats(span.state + i, a);
    if constexpr (Step::TWO) load_floats(span.state2 + i, b);
    if (span.free != nullptr) load_floats(span.free + i, free);
#pragma unroll
    for (int v = 0; v < V; v++) {
      const float moved = step(p[v], g[v] * grad_scale, a[v], b[v]);
      p[v] = span.free != nullptr ? held_or(free[v], moved, p[v]) : moved;
    }
    store_floats(span.weight + i, p);
    if constexpr (Step::ONE) store_floats(span.state + i, a);
    if constexpr (Step::TWO) store_floats(span.state2 + i, b);
    if (copy != nullptr) store_floats(copy + i, p);
  }
}

template <typename G, typename Step>
__device__ __forceinline__ void take(const Span& span, uint32_t number, float grad_scale, Step& step) {
  constexpr int V = 4;
  const int64_t from = int64_t(number) * CHUNK;
  const int64_t to = span.length - from < CHUNK ? span.length : from + CHUNK;
  int64_t done = from;
  if constexpr (Step::WIDE_TOO) {
    const bool wide = aligned(span.weight, 16) && aligned(span.state, 16) && aligned(span.state2, 16) &&
                      aligned(span.free, 16) && aligned(span.grad, V * sizeof(G)) &&
                      aligned(span.copy, V * 2);
    if (wide) {
      done = to - (to - from) % V;
      walk<V, G>(span, from, done, grad_scale, step);
    }
  }
  walk<1, G>(span, done, to, grad_scale, step);
}

template <typename G, typename Step, typename Factors>
__device__ __forceinline__ void all(const Span* spans, const Factors* factors, const Chunk* table,
                                    uint32_t chunks, const float* grad_scale) {
  const float scale = *grad_scale;
  if (!moves(scale)) return;
  for (uint32_t at = blockIdx.x; at < chunks; at += gridDim.x) {
    const Chunk chunk = chunk_at(table, at);
    const Span span = spans[chunk.tensor];
    Step step = {factors[chunk.tensor]};
    take<G>(span, chunk.number, scale, step);
  }
}

template <typename G, int POWER>
__device__ __forceinline__ uint32_t classp_at(const Span& span, const Classp& f, uint32_t number,
                                              float grad_scale) {
  ClasspStep<POWER> step = {f, 0};
  take<G>(span, number, grad_scale, step);
  return step.passed;
}

template <typename G>
__device__ __forceinline__ void classp(const Span* spans, const Classp* factors, const Chunk* table,
                                       uint32_t chunks, const float* grad_scale, const uint32_t* any,
                                       uint32_t* counts) {
  __shared__ uint32_t scratch[WARP];
  const float scale = *grad_scale;
  for (uint32_t at = blockIdx.x; at < chunks; at += gridDim.x) {
    const Chunk chunk = chunk_at(table, at);
    const Span span = spans[chunk.tensor];
    const Classp f = factors[chunk.tensor];
    uint32_t passed = 0;
    // A tensor that is tested whole moves only where it has a gradient.
    if (moves(scale) && (f.test != CLASSP_ALL || any == nullptr || any[chunk.tensor] != 0)) {
      switch (f.power) {
        case CLASSP_ONE: passed = classp_at<G, CLASSP_ONE>(span, f, chunk.number, scale); break;
        case CLASSP_TWO: passed = classp_at<G, CLASSP_TWO>(span, f, chunk.number, scale); break;
        case CLASSP_HALF: passed = classp_at<G, CLASSP_HALF>(span, f, chunk.number, scale); break;
        default: passed = classp_at<G, CLASSP_OTHER>(span, f, chunk.number, scale); break;
      }
    }
    passed = block_sum(passed, scratch);
    if (threadIdx.x == 0) counts[at] = passed;
  }
}

// any[tensor] becomes 1 where the square of one of its gradients is not 0; it is zeroed before. The atomic is
// an "or" of whole numbers: its order does not show.
template <typename G>
__device__ __forceinline__ void classp_any(const Span* spans, const Chunk* table, uint32_t chunks,
                                           const float* grad_scale, uint32_t* any) {
  const float scale = *grad_scale;
  for (uint32_t at = blockIdx.x; at < chunks; at += gridDim.x) {
    const Chunk chunk = chunk_at(table, at);
    const Span span = spans[chunk.tensor];
    const G* grad = static_cast<const G*>(span.grad);
    const int64_t from = int64_t(chunk.number) * CHUNK;
    const int64_t to = span.length - from < CHUNK ? span.length : from + CHUNK;
    int found = 0;
    for (int64_t i = from + threadIdx.x; i < to; i += blockDim.x) {
      const float g = to_float(grad[i]) * scale;
      found |= g * g != 0.0f;
    }
    if (__any_sync(ALL_LANES, found) && lane_of() == 0) atomicOr(any + chunk.tensor, 1u);
  }
}

// passed[tensor] = the sum of its chunks' counts, the chunks of a tensor lying together in their order. One
// block for each tensor, 1024 threads at most.
extern "C" __global__ void __launch_bounds__(1024)
    classp_count(const Span* spans, uint32_t tensors, const uint32_t* counts, uint64_t* passed) {
  __shared__ unsigned long long scratch[WARP];
  for (uint32_t tensor = blockIdx.x; tensor < tensors; tensor += gridDim.x) {
    const int64_t first = spans[tensor].first_chunk;
    const int64_t chunks = (spans[tensor].length + CHUNK - 1) / CHUNK;
    unsigned long long total = 0;
    for (int64_t i = threadIdx.x; i < chunks; i += blockDim.x) total += counts[first + i];
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) passed[tensor] = total;
  }
}

// Thread t adds the squares of 4 neighbours at a time, wherever they lie in memory.
template <typename G>
__device__ __forceinline__ void squares(const Span* spans, const Chunk* table, uint32_t chunks,
                                        double* sums) {
  constexpr int V = 4;
  __shared__ double scratch[WARP];
  for (uint32_t at = blockIdx.x; at < chunks; at += gridDim.x) {
    const Chunk chunk = chunk_at(table, at);
    const Span span = spans[chunk.tensor];
    const G* grad = static_cast<const G*>(span.grad);
    const bool wide = aligned(grad, V * sizeof(G));
    const int64_t from = int64_t(chunk.number) * CHUNK;
    const int64_t to = span.length - from < CHUNK ? span.length : from + CHUNK;
    double sum = 0.0;
#pragma unroll 4
    for (int64_t i = from + int64_t(threadIdx.x) * V; i < to; i += int64_t(blockDim.x) * V) {
      float g[V];
      if (wide && i + V <= to) {
        load_floats(grad + i, g);
      } else {
#pragma unroll
        for (int v = 0; v < V; v++) g[v] = i + v < to ? to_float(grad[i + v]) : 0.0f;
      }
#pragma unroll
      for (int v = 0; v < V; v++) sum += double(g[v]) * double(g[v]);
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) sums[at] = sum;
  }
}

// sums[tensor] = the sum of what its chunks have, which lie together in their order. One block a tensor.
extern "C" __global__ void __launch_bounds__(THREADS)
    sum_chunks(const Span* spans, uint32_t tensors, const double* of_chunks, double* sums) {
  __shared__ double scratch[WARP];
  for (uint32_t tensor = blockIdx.x; tensor < tensors; tensor += gridDim.x) {
    const int64_t first = spans[tensor].first_chunk;
    const int64_t chunks = (spans[tensor].length + CHUNK - 1) / CHUNK;
    double total = 0.0;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < chunks; i += blockDim.x) total += of_chunks[first + i];
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) sums[tensor] = total;
  }
}

// norms [1 + tensors]: of all, then of each; of sums of squares. One block.
extern "C" __global__ void __launch_bounds__(1024)
    clip(uint32_t tensors, const double* sums, double most, float* norms, float* grad_scale) {
  __shared__ double scratch[WARP];
  double total = 0.0;
  for (uint32_t tensor = threadIdx.x; tensor < tensors; tensor += blockDim.x) {
    total += sums[tensor];
    norms[1 + tensor] = float(sqrt(sums[tensor]));
  }
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) {
    const double norm = sqrt(total);
    norms[0] = float(norm);
    *grad_scale = clip_scale(norm, most);
  }
}

// What the sums of CLASSP say: by chunk the total of `state`, and how many of its entries are above 0.
extern "C" __global__ void __launch_bounds__(THREADS)
    classp_sums(const Span* spans, const Chunk* table, uint32_t chunks, double* totals, uint32_t* touched) {
  __shared__ double scratch[WARP];
  __shared__ uint32_t counted[WARP];
  for (uint32_t at = blockIdx.x; at < chunks; at += gridDim.x) {
    const Chunk chunk = chunk_at(table, at);
    const Span span = spans[chunk.tensor];
    const int64_t from = int64_t(chunk.number) * CHUNK;
    const int64_t to = span.length - from < CHUNK ? span.length : from + CHUNK;
    double total = 0.0;
    uint32_t above = 0;
#pragma unroll 4
    for (int64_t i = from + threadIdx.x; i < to; i += blockDim.x) {
      const float sum = span.state[i];
      total += double(sum);
      above += sum > 0.0f;
    }
    total = block_sum(total, scratch);
    above = block_sum(above, counted);
    if (threadIdx.x == 0) {
      totals[at] = total;
      touched[at] = above;
    }
  }
}

// `any` is null unless a tensor is tested whole.
#define STEP(KERNEL, NAME, G, RULE, FACTORS)                                                                 \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                      \
      KERNEL##_##NAME(const Span* spans, const FACTORS* factors, const Chunk* table, uint32_t chunks,        \
                      const float* grad_scale) {                                                             \
    all<G, RULE>(spans, factors, table, chunks, grad_scale);                                                 \
  }

#define KERNELS(NAME, G)                                                                                     \
  STEP(adamw, NAME, G, AdamWStep, AdamW)                                                                     \
  STEP(lion, NAME, G, LionStep, Lion)                                                                        \
  STEP(sgd, NAME, G, SgdStep<true>, Sgd)                                                                     \
  STEP(sgd_plain, NAME, G, SgdStep<false>, Sgd)                                                              \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                      \
      classp_##NAME(const Span* spans, const Classp* factors, const Chunk* table, uint32_t chunks,           \
                    const float* grad_scale, const uint32_t* any, uint32_t* counts) {                        \
    classp<G>(spans, factors, table, chunks, grad_scale, any, counts);                                       \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                      \
      classp_any_##NAME(const Span* spans, const Chunk* table, uint32_t chunks, const float* grad_scale,     \
                        uint32_t* any) {                                                                     \
    classp_any<G>(spans, table, chunks, grad_scale, any);                                                    \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                      \
      squares_##NAME(const Span* spans, const Chunk* table, uint32_t chunks, double* sums) {                 \
    squares<G>(spans, table, chunks, sums);                                                                  \
  }

FOR_EACH_TYPE(KERNELS)
