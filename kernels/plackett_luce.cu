// Plackett-Luce distillation (src/kernels/plackett_luce.rs).
//
//     pi  = the label, then the other classes by falling teacher probability, ties by class number
//     L   = mean_b sum_k p_{pi_k} (rest_k - z_{pi_k})     rest_k = log sum_{l >= k} exp z_{pi_l}
//     dz_{pi_m} = (exp(z_{pi_m} - rest_m) mass_m - p_{pi_m}) dL / B
//     mass_m = sum_{k <= m} p_{pi_k} exp(rest_m - rest_k)  = mass_{m-1} exp(rest_m - rest_{m-1}) + p_{pi_m}
//
// z, p [rows, K], labels u32 [rows]. A block has a row. A class's rank is how many come before it, counted over
// all K: the order is that of a stable sort, in a time that does not depend on the data. Then a thread has a run
// of ranks: rests are joined from the last rank on, masses from the first, over runs by a scan in shared memory.
// All in f64, as on the CPU: a row is little, and what is left behind a large logit must keep its digits. A
// label of K or more has a loss of NaN, and so has its row's gradient.
//
// ranked, rests, probs, order: room for [rows, K] numbers each, which a row's block alone writes and reads.
//
// Bytes moved of a class: 4 or 2 of z and p each, K times those of p from the cache, 24 of the room twice.
//
//     256 threads; blocks rows
#include "row.cuh"

constexpr int THREADS = 256;

// Numbers in the order of f64's total_cmp, which is that of floats for numbers that floats hold.
static __device__ __forceinline__ int key_of(float p) {
  int bits;
  memcpy(&bits, &p, 4);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

// exp(x - top), top the largest of some: nothing where all are -inf. NaN stays NaN.
static __device__ __forceinline__ double above(double x, double top) {
  if (top == -INFINITY) return x == x ? 0.0 : x;
  return exp(x - top);
}

struct Rest {
  double top, sum;
  __device__ __forceinline__ double value() const { return sum == 0.0 ? -INFINITY : top + log(sum); }
};

static __device__ __forceinline__ Rest join(Rest a, Rest b) {
  const double top = a.top > b.top ? a.top : b.top;
  return {top, a.sum * above(a.top, top) + b.sum * above(b.top, top)};
}

// The sum over ranks from `z` on: one more in front.
static __device__ __forceinline__ Rest joined(Rest rest, double z) {
  const double top = z > rest.top ? z : rest.top;
  return {top, rest.sum * above(rest.top, top) + above(z, top)};
}

// Brings a row in the order of ranks and gives the runs' rests; those of a run are in `rests`. Whether the label
// is one.
template <typename T>
__device__ __forceinline__ bool ranked_rests(const T* z, const T* p, uint32_t label, int k, double* ranked,
                                             double* rests, float* probs, uint32_t* order) {
  __shared__ double tops[THREADS];
  __shared__ double sums[THREADS];
  const int lane = threadIdx.x;
  for (int own = lane; own < k; own += THREADS) {
    const float prob = to_float(p[own]);
    const int key = key_of(prob);
    int rank = 0;
    if (uint32_t(own) != label) {
      rank = 1;
      for (int other = 0; other < k; other++) {
        const int before = key_of(to_float(p[other]));
        rank += uint32_t(other) != label && (before > key || (before == key && other < own));
      }
    }
    if (rank >= k) continue;  // Without a label that is one, the last rank has no place.
    ranked[rank] = to_float(z[own]);
    probs[rank] = prob;
    order[rank] = own;
  }
  if (label >= uint32_t(k)) return false;
  __syncthreads();
  const int each = (k + THREADS - 1) / THREADS, first = lane * each, end = first + each < k ? first + each : k;
  Rest rest = {-INFINITY, 0.0};
  for (int m = end - 1; m >= first; m--) rest = joined(rest, ranked[m]);
  tops[lane] = rest.top;
  sums[lane] = rest.sum;
  __syncthreads();
  for (int apart = 1; apart < THREADS; apart *= 2) {
    const int other = lane + apart;
    const Rest behind = other < THREADS ? Rest{tops[other], sums[other]} : Rest{-INFINITY, 0.0};
    __syncthreads();
    rest = join(rest, behind);
    tops[lane] = rest.top;
    sums[lane] = rest.sum;
    __syncthreads();
  }
  rest = lane + 1 < THREADS ? Rest{tops[lane + 1], sums[lane + 1]} : Rest{-INFINITY, 0.0};
  for (int m = end - 1; m >= first; m--) {
    rest = joined(rest, ranked[m]);
    rests[m] = rest.value();
  }
  __syncthreads();
  return true;
}

template <typename T>
__device__ __forceinline__ void losses(const T* z, const T* p, const uint32_t* labels, int k, double* ranked,
                                       double* rests, float* probs, uint32_t* order, float* loss) {
  __shared__ double scratch[WARP];
  const int64_t row = blockIdx.x, at = row * k;
  if (!ranked_rests(z + at, p + at, labels[row], k, ranked + at, rests + at, probs + at, order + at)) {
    if (threadIdx.x == 0) loss[row] = NAN;
    return;
  }
  double sum = 0.0;
  for (int m = threadIdx.x; m < k; m += THREADS) {
    const double prob = probs[at + m];
    // A rank without probability costs nothing, whatever its logit.
    if (prob != 0.0) sum += prob * (rests[at + m] - ranked[at + m]);
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) loss[row] = float(sum);
}

template <typename T>
__device__ __forceinline__ void gradients(const T* z, const T* p, const uint32_t* labels, int k,
                                          double* ranked, double* rests, float* probs, uint32_t* order,
                                          const float* loss_grad, T* dz) {
  __shared__ double falls[THREADS];
  __shared__ double masses[THREADS];
  const int64_t row = blockIdx.x, at = row * k;
  const int lane = threadIdx.x;
  ranked += at;
  rests += at;
  probs += at;
  order += at;
  if (!ranked_rests(z + at, p + at, labels[row], k, ranked, rests, probs, order)) {
    for (int i = lane; i < k; i += THREADS) dz[at + i] = from_float<T>(NAN);
    return;
  }
  const int each = (k + THREADS - 1) / THREADS, first = lane * each, end = first + each < k ? first + each : k;
  // The rests only fall, so no term grows.
  auto fall_of = [&](int m) { return m == 0 ? 0.0 : exp(rests[m] - rests[m - 1]); };
  double fall = 1.0, mass = 0.0;
  for (int m = first; m < end; m++) {
    const double f = fall_of(m);
    fall *= f;
    mass = mass * f + probs[m];
  }
  falls[lane] = fall;
  masses[lane] = mass;
  __syncthreads();
  for (int apart = 1; apart < THREADS; apart *= 2) {
    const int other = lane - apart;
    const double before = other >= 0 ? falls[other] : 1.0, onto = other >= 0 ? masses[other] : 0.0;
    __syncthreads();
    mass = onto * fall + mass;
    fall *= before;
    falls[lane] = fall;
    masses[lane] = mass;
    __syncthreads();
  }
  mass = lane > 0 ? masses[lane - 1] : 0.0;
  const double factor = double(*loss_grad) / double(gridDim.x);
  for (int m = first; m < end; m++) {
    mass = mass * fall_of(m) + probs[m];
    const double d = factor * (exp(ranked[m] - rests[m]) * mass - probs[m]);
    dz[at + order[m]] = from_float<T>(float(d));
  }
}

#define PLACKETT_LUCE(suffix, T)                                                                             \
  extern "C" __global__ void __launch_bounds__(THREADS) plackett_luce_##suffix(                              \
      const T* z, const T* p, const uint32_t* labels, int k, double* ranked, double* rests, float* probs,    \
      uint32_t* order, float* loss) {                                                                        \
    losses(z, p, labels, k, ranked, rests, probs, order, loss);                                              \
  }                                                                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS) plackett_luce_grad_##suffix(                         \
      const T* z, const T* p, const uint32_t* labels, int k, double* ranked, double* rests, float* probs,    \
      uint32_t* order, const float* loss_grad, T* dz) {                                                      \
    gradients(z, p, labels, k, ranked, rests, probs, order, loss_grad, dz);                                  \
  }

FOR_EACH_TYPE(PLACKETT_LUCE)
