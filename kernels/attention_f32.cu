// Attention in f32 without its matrix of probabilities, forward and backward (src/kernels/attention). The
// equations, what is kept and which block owns what are those of attention.cu; products are f32 with one
// rounding a multiply-add, exponentials those of the CPU.
//
// A block of 16 by 16 threads has a tile of SIDE queries by SIDE keys: thread (x, y) the rows y * R + i and
// the columns x + 16 j of logits, R = SIDE / 16 of each, and of a result the same rows and every 16th run of
// V columns. Rows that pass by are read 16 bytes at a time along the head, four floats of padding apart from
// a multiple of the banks; a row's logits are shared by 16 lanes of a warp, so no barrier stands between
// making a tile of P and reading it.
//
// Heads of d columns are padded with zeros to the next of 32, 64, 128, 256.
//
//     attention_forward     256 threads; blocks batch * heads * ceil(queries / SIDE)
//     attention_delta       256 threads; blocks batch * queries * heads * LANES / 256
//     attention_grad_q      256 threads; blocks batch * heads * ceil(queries / SIDE)
//     attention_grad_kv     256 threads; blocks batch * groups * ceil(keys / SIDE)
//     attention_grad_bias   256 threads; blocks (bias_groups * heads * ceil(queries / SIDE) *
//                           ceil(keys / SIDE), parts of batch / bias_groups)
//
//     padded depth          32      64      128     256
//     SIDE                  64      64      64      32
//     shared    forward     35840   52224   84992   71168
//     bytes     grad_q      45056   69632   118784  104448
//               grad_kv     54272   87040   152576  137728
//               grad_bias   36864   69632   135168  133120
//
// LANES is the least power of two >= depth / 4, 32 at most. More than 48 KiB are asked for with
// cuFuncSetAttribute.
#include "attention.cuh"

constexpr int THREADS = 256, ACROSS = 16;

// Floats from one row of a tile to the next.
template <int DP>
constexpr int LD = DP + 4;

template <int DP>
constexpr int SIDE = DP <= 128 ? 64 : 32;

static __device__ __forceinline__ int x_of() { return int(threadIdx.x) % ACROSS; }
static __device__ __forceinline__ int y_of() { return int(threadIdx.x) / ACROSS; }

template <int DP>
__device__ __forceinline__ void copy_rows(float* tile, const float* from, int64_t stride, int there,
                                          int depth, bool wide) {
#pragma unroll 2
  for (int at = int(threadIdx.x) * 4; at < SIDE<DP> * DP; at += THREADS * 4) {
    const int row = at / DP, column = at % DP;
    float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (row < there) {
      const float* place = from + row * stride + column;
      if (wide && column < depth) {
        load_floats<4>(place, x);
      } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (column + i < depth) x[i] = place[i];
        }
      }
    }
    store_floats<4>(tile + row * LD<DP> + column, x);
  }
}

// c = a b^T: this thread's rows of `a` and columns, which are rows of `b`, DP long.
template <int DP, int R>
__device__ __forceinline__ void rows_by_rows(float (&c)[R][R], const float* a, const float* b) {
#pragma unroll
  for (int i = 0; i < R; i++) {
#pragma unroll
    for (int j = 0; j < R; j++) c[i][j] = 0.0f;
  }
#pragma unroll 4
  for (int k = 0; k < DP; k += 4) {
    float rows[R][4], columns[R][4];
#pragma unroll
    for (int i = 0; i < R; i++) {
      load_floats<4>(a + (y_of() * R + i) * LD<DP> + k, rows[i]);
      load_floats<4>(b + (x_of() + ACROSS * i) * LD<DP> + k, columns[i]);
    }
#pragma unroll
    for (int l = 0; l < 4; l++) {
#pragma unroll
      for (int i = 0; i < R; i++) {
#pragma unroll
        for (int j = 0; j < R; j++) c[i][j] = fmaf(rows[i][l], columns[j][l], c[i][j]);
      }
    }
  }
}

// Columns of a result that a thread has: RUNS runs of V.
template <int DP>
struct Out {
  static constexpr int V = DP / ACROSS < 4 ? DP / ACROSS : 4, RUNS = DP / ACROSS / V;
};

// This thread's part of a tile [SIDE, SIDE], for the threads of its rows to read.
template <int DP, int R>
__device__ __forceinline__ void share(float* tile, const float (&p)[R][R]) {
  __syncwarp();
#pragma unroll
  for (int i = 0; i < R; i++) {
#pragma unroll
    for (int j = 0; j < R; j++) tile[(y_of() * R + i) * (SIDE<DP> + 4) + x_of() + ACROSS * j] = p[i][j];
  }
  __syncwarp();
}

// c += p b, p [SIDE, SIDE] as `share` left it, b [SIDE, DP].
template <int DP, int R>
__device__ __forceinline__ void mix_rows(float (&c)[R][DP / ACROSS], const float* p, const float* b) {
  constexpr int V = Out<DP>::V, RUNS = Out<DP>::RUNS;
#pragma unroll 2
  for (int k = 0; k < SIDE<DP>; k += 4) {
    float rows[R][4];
#pragma unroll
    for (int i = 0; i < R; i++) load_floats<4>(p + (y_of() * R + i) * (SIDE<DP> + 4) + k, rows[i]);
#pragma unroll
    for (int l = 0; l < 4; l++) {
#pragma unroll
      for (int run = 0; run < RUNS; run++) {
        float columns[V];
        load_floats<V>(b + (k + l) * LD<DP> + (run * ACROSS + x_of()) * V, columns);
#pragma unroll
        for (int i = 0; i < R; i++) {
#pragma unroll
          for (int j = 0; j < V; j++) {
            c[i][run * V + j] = fmaf(rows[i][l], columns[j], c[i][run * V + j]);
          }
        }
      }
    }
  }
}

template <int R, int C>
__device__ __forceinline__ void clear(float (&c)[R][C]) {
#pragma unroll
  for (int i = 0; i < R; i++) {
#pragma unroll
    for (int j = 0; j < C; j++) c[i][j] = 0.0f;
  }
}

template <int DP, int R>
__device__ __forceinline__ void store_rows(const float (&c)[R][DP / ACROSS], const float (&factor)[R],
                                           float* to, int64_t stride, int there, int depth) {
  constexpr int V = Out<DP>::V, RUNS = Out<DP>::RUNS;
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int row = y_of() * R + i;
#pragma unroll
    for (int j = 0; j < RUNS * V; j++) {
      const int column = (j / V * ACROSS + x_of()) * V + j % V;
      if (row < there && column < depth) to[row * stride + column] = c[i][j] * factor[i];
    }
  }
}

// Scales a tile's logits, adds the bias if there is one, and hides what is not seen. Rows are the queries
// from q0 on and columns the keys from k0 on, or with TURNED the other way around; `low` are the first keys
// that this thread's queries see. Queries behind the last are the caller's to leave out.
template <bool TURNED, int R>
__device__ __forceinline__ void finish_logits(float (&c)[R][R], const int (&low)[R], int q0, int k0,
                                              const float* bias, const uint32_t* starts, const Attention& s,
                                              int b, int h) {
#pragma unroll
  for (int i = 0; i < R; i++) {
#pragma unroll
    for (int j = 0; j < R; j++) {
      const int row = y_of() * R + i, column = x_of() + ACROSS * j;
      const int t = q0 + (TURNED ? column : row), key = k0 + (TURNED ? row : column);
      const bool seen = key >= low[TURNED ? j : i] && key <= s.last(t, starts);
      float z = c[i][j] * s.scale;
      if (bias && seen && t < s.queries) z += bias[s.bias_row(b, h, t) + key];
      c[i][j] = seen ? z : -INFINITY;
    }
  }
}

static __device__ __forceinline__ int low_of(const uint32_t* starts, const Attention& s, int b, int t) {
  return starts && t < s.queries ? int(starts[int64_t(b) * s.queries + t]) : 0;
}

template <int DP>
__device__ __forceinline__ void forward(const float* q, const float* k, const float* v, const float* bias,
                                        const uint32_t* starts, float* o, float* lse, const Attention& s) {
  constexpr int S = SIDE<DP>, R = S / ACROSS;
  extern __shared__ __align__(16) float tiles[];
  float* queries = tiles;
  float* passing = queries + S * LD<DP>;  // keys, then values
  float* probs = passing + S * LD<DP>;
  const int across = (s.queries + S - 1) / S;
  const int q0 = (across - 1 - int(blockIdx.x % across)) * S;
  const int h = int(blockIdx.x / across % s.heads), b = int(blockIdx.x / across / s.heads);
  const int g = h / (s.heads / s.groups);
  const int there = s.queries - q0 < S ? s.queries - q0 : S;
  const bool wide = s.wide(q) && s.wide(k) && s.wide(v);
  const int first = starts_of(starts, s, b, q0, q0 + there).least, end = s.last(q0 + there - 1, starts) + 1;
  copy_rows<DP>(queries, s.query(q, b, h, q0), s.query_stride(), there, s.depth, wide);
  float out[R][DP / ACROSS], top[R], sum[R];
  int start[R];
  clear(out);
#pragma unroll
  for (int i = 0; i < R; i++) {
    start[i] = low_of(starts, s, b, q0 + y_of() * R + i);
    top[i] = -INFINITY;
    sum[i] = 0.0f;
  }
  for (int k0 = first; k0 < end; k0 += S) {
    __syncthreads();
    copy_rows<DP>(passing, s.key(k, b, g, k0), s.key_stride(), end - k0, s.depth, wide);
    __syncthreads();
    float p[R][R];
    rows_by_rows<DP>(p, queries, passing);
    finish_logits<false>(p, start, q0, k0, bias, starts, s, b, h);
#pragma unroll
    for (int i = 0; i < R; i++) {
      float high = -INFINITY, total = 0.0f;
#pragma unroll
      for (int j = 0; j < R; j++) high = fmaxf(high, p[i][j]);
      high = fmaxf(top[i], warp_max(high, ACROSS));
      // Where nothing was seen yet exponentials are measured from 0, and are 0.
      const float base = high == -INFINITY ? 0.0f : high;
      const float shrink = exp_nonpos(top[i] - base);
      top[i] = high;
#pragma unroll
      for (int j = 0; j < R; j++) {
        p[i][j] = exp_nonpos(p[i][j] - base);
        total += p[i][j];
      }
      sum[i] = fmaf(sum[i], shrink, total);
#pragma unroll
      for (int j = 0; j < DP / ACROSS; j++) out[i][j] *= shrink;
    }
    share<DP>(probs, p);
    __syncthreads();
    copy_rows<DP>(passing, s.key(v, b, g, k0), s.key_stride(), end - k0, s.depth, wide);
    __syncthreads();
    mix_rows<DP, R>(out, probs, passing);
  }
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int row = y_of() * R + i;
    const float all = warp_sum(sum[i], ACROSS);
    if (x_of() == 0 && row < there) lse[s.statistic(b, h, q0 + row)] = log_sum_exp(top[i], all);
    sum[i] = 1.0f / all;
  }
  store_rows<DP>(out, sum, s.query(o, b, h, q0), s.query_stride(), there, s.depth);
}

template <int DP>
__device__ __forceinline__ void grad_q(const float* q, const float* k, const float* v, const float* bias,
                                       const uint32_t* starts, const float* g_o, const float* lse,
                                       const float* deltas, float* dq, const Attention& s) {
  constexpr int S = SIDE<DP>, R = S / ACROSS;
  extern __shared__ __align__(16) float tiles[];
  float* queries = tiles;
  float* grads = queries + S * LD<DP>;
  float* passing = grads + S * LD<DP>;  // values, then keys
  float* probs = passing + S * LD<DP>;
  const int across = (s.queries + S - 1) / S;
  const int q0 = (across - 1 - int(blockIdx.x % across)) * S;
  const int h = int(blockIdx.x / across % s.heads), b = int(blockIdx.x / across / s.heads);
  const int g = h / (s.heads / s.groups);
  const int there = s.queries - q0 < S ? s.queries - q0 : S;
  const bool wide = s.wide(q) && s.wide(k) && s.wide(v) && s.wide(g_o);
  const int first = starts_of(starts, s, b, q0, q0 + there).least, end = s.last(q0 + there - 1, starts) + 1;
  copy_rows<DP>(queries, s.query(q, b, h, q0), s.query_stride(), there, s.depth, wide);
  copy_rows<DP>(grads, s.query(g_o, b, h, q0), s.query_stride(), there, s.depth, wide);
  float out[R][DP / ACROSS], low[R], delta[R];
  int start[R];
  clear(out);
#pragma unroll
  for (int i = 0; i < R; i++) {
    const int t = q0 + y_of() * R + i;
    start[i] = low_of(starts, s, b, t);
    low[i] = t < s.queries ? lse[s.statistic(b, h, t)] : INFINITY;
    delta[i] = t < s.queries ? deltas[s.statistic(b, h, t)] : 0.0f;
  }
  for (int k0 = first; k0 < end; k0 += S) {
    float dp[R][R], ds[R][R];
    __syncthreads();
    copy_rows<DP>(passing, s.key(v, b, g, k0), s.key_stride(), end - k0, s.depth, wide);
    __syncthreads();
    rows_by_rows<DP>(dp, grads, passing);
    __syncthreads();
    copy_rows<DP>(passing, s.key(k, b, g, k0), s.key_stride(), end - k0, s.depth, wide);
    __syncthreads();
    rows_by_rows<DP>(ds, queries, passing);
    finish_logits<false>(ds, start, q0, k0, bias, starts, s, b, h);
#pragma unroll
    for (int i = 0; i < R; i++) {
#pragma unroll
      for (int j = 0; j < R; j++) ds[i][j] = logit_grad(exp_nonpos(ds[i][j] - low[i]), dp[i][j], delta[i]);
    }
    share<DP>(probs, ds);
    mix_rows<DP, R>(out, probs, passing);
  }
#pragma unroll
  for (int i = 0; i < R; i++) low[i] = s.scale;
  store_rows<DP>(out, low, s.query(dq, b, h, q0), s.query_stride(), there, s.depth);
}

// A block owns SIDE keys and their values, rows of the transposed logits; queries pass by.
template <int DP>
__device__ __forceinline__ void grad_kv(const float* q, const float* k, const float* v, const float* bias,
                                        const uint32_t* starts, const float* g_o, const float* lse,
                                        const float* deltas, float* dk, float* dv, const Attention& s) {
  constexpr int S = SIDE<DP>, R = S / ACROSS;
  extern __shared__ __align__(16) float tiles[];
  float* keys = tiles;
  float* values = keys + S * LD<DP>;
  float* queries = values + S * LD<DP>;
  float* grads = queries + S * LD<DP>;
  float* probs = grads + S * LD<DP>;
  const int across = (s.keys + S - 1) / S;
  const int k0 = int(blockIdx.x % across) * S;
  const int g = int(blockIdx.x / across % s.groups), b = int(blockIdx.x / across / s.groups);
  const int each = s.heads / s.groups;
  const int there = s.keys - k0 < S ? s.keys - k0 : S;
  const bool wide = s.wide(q) && s.wide(k) && s.wide(v) && s.wide(g_o);
  const int from = first_query(k0, s.queries, s.keys, starts != nullptr) / S * S;
  copy_rows<DP>(keys, s.key(k, b, g, k0), s.key_stride(), there, s.depth, wide);
  copy_rows<DP>(values, s.key(v, b, g, k0), s.key_stride(), there, s.depth, wide);
  float out_k[R][DP / ACROSS], out_v[R][DP / ACROSS];
  clear(out_k);
  clear(out_v);
  for (int h = g * each; h < (g + 1) * each; h++) {
    for (int q0 = from; q0 < s.queries; q0 += S) {
      const int count = s.queries - q0 < S ? s.queries - q0 : S;
      if (starts_of(starts, s, b, q0, q0 + count).least >= k0 + there) continue;
      __syncthreads();
      copy_rows<DP>(queries, s.query(q, b, h, q0), s.query_stride(), count, s.depth, wide);
      copy_rows<DP>(grads, s.query(g_o, b, h, q0), s.query_stride(), count, s.depth, wide);
      __syncthreads();
      float p[R][R], ds[R][R];
      int start[R];
#pragma unroll
      for (int j = 0; j < R; j++) start[j] = low_of(starts, s, b, q0 + x_of() + ACROSS * j);
      rows_by_rows<DP>(p, keys, queries);
      finish_logits<true>(p, start, q0, k0, bias, starts, s, b, h);
      rows_by_rows<DP>(ds, values, grads);
#pragma unroll
      for (int j = 0; j < R; j++) {
        const int t = q0 + x_of() + ACROSS * j;
        const float low = t < s.queries ? lse[s.statistic(b, h, t)] : INFINITY;
        const float delta = t < s.queries ? deltas[s.statistic(b, h, t)] : 0.0f;
#pragma unroll
        for (int i = 0; i < R; i++) {
          p[i][j] = exp_nonpos(p[i][j] - low);
          ds[i][j] = logit_grad(p[i][j], ds[i][j], delta);
        }
      }
      share<DP>(probs, p);
      mix_rows<DP, R>(out_v, probs, grads);
      share<DP>(probs, ds);
      mix_rows<DP, R>(out_k, probs, queries);
    }
  }
  float scale[R], one[R];
#pragma unroll
  for (int i = 0; i < R; i++) {
    scale[i] = s.scale;
    one[i] = 1.0f;
  }
  store_rows<DP>(out_k, scale, s.key(dk, b, g, k0), s.key_stride(), there, s.depth);
  store_rows<DP>(out_v, one, s.key(dv, b, g, k0), s.key_stride(), there, s.depth);
}

// partial [parts, rows, bias_groups, heads, bias_rows, keys], as in attention.cu.
template <int DP>
__device__ __forceinline__ void grad_bias(const float* q, const float* k, const float* v, const float* bias,
                                          const uint32_t* starts, const float* g_o, const float* lse,
                                          const float* deltas, float* partial, int each, const Attention& s) {
  constexpr int S = SIDE<DP>, R = S / ACROSS;
  extern __shared__ __align__(16) float tiles[];
  float* queries = tiles;
  float* grads = queries + S * LD<DP>;
  float* keys = grads + S * LD<DP>;
  float* values = keys + S * LD<DP>;
  __shared__ float sums[ACROSS][S];
  const int across = (s.keys + S - 1) / S, down = (s.queries + S - 1) / S;
  const int k0 = int(blockIdx.x % across) * S;
  const int tile = int(blockIdx.x / across % down), q0 = tile * S;
  const int place = int(blockIdx.x / across / down), h = place % s.heads, group = place / s.heads;
  const int g = h / (s.heads / s.groups);
  const bool wide = s.wide(q) && s.wide(k) && s.wide(v) && s.wide(g_o);
  float sum[R][R];
  clear(sum);
  for (int turn = int(blockIdx.y) * each; turn < int(blockIdx.y + 1) * each; turn++) {
    const int b = group + turn * s.bias_groups;
    if (b >= s.batch) break;
    __syncthreads();
    copy_rows<DP>(queries, s.query(q, b, h, q0), s.query_stride(), s.queries - q0, s.depth, wide);
    copy_rows<DP>(grads, s.query(g_o, b, h, q0), s.query_stride(), s.queries - q0, s.depth, wide);
    copy_rows<DP>(keys, s.key(k, b, g, k0), s.key_stride(), s.keys - k0, s.depth, wide);
    copy_rows<DP>(values, s.key(v, b, g, k0), s.key_stride(), s.keys - k0, s.depth, wide);
    __syncthreads();
    float dp[R][R], ds[R][R];
    int start[R];
#pragma unroll
    for (int i = 0; i < R; i++) start[i] = low_of(starts, s, b, q0 + y_of() * R + i);
    rows_by_rows<DP>(dp, grads, values);
    rows_by_rows<DP>(ds, queries, keys);
    finish_logits<false>(ds, start, q0, k0, bias, starts, s, b, h);
#pragma unroll
    for (int i = 0; i < R; i++) {
      const int t = q0 + y_of() * R + i;
      const float low = t < s.queries ? lse[s.statistic(b, h, t)] : INFINITY;
      const float delta = t < s.queries ? deltas[s.statistic(b, h, t)] : 0.0f;
#pragma unroll
      for (int j = 0; j < R; j++) sum[i][j] += logit_grad(exp_nonpos(ds[i][j] - low), dp[i][j], delta);
    }
  }
  const int64_t size = int64_t(s.bias_groups) * s.heads * s.bias_rows * s.keys;
  if (s.bias_rows > 1) {
#pragma unroll
    for (int i = 0; i < R; i++) {
#pragma unroll
      for (int j = 0; j < R; j++) {
        const int t = q0 + y_of() * R + i, key = k0 + x_of() + ACROSS * j;
        if (t < s.queries && key < s.keys) {
          partial[blockIdx.y * size + (int64_t(place) * s.queries + t) * s.keys + key] = sum[i][j];
        }
      }
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < R; j++) {
    float column = 0.0f;
#pragma unroll
    for (int i = 0; i < R; i++) column += sum[i][j];
    sums[y_of()][x_of() + ACROSS * j] = column;
  }
  __syncthreads();
  const int key = k0 + int(threadIdx.x);
  if (threadIdx.x < S && key < s.keys) {
    float column = 0.0f;
    for (int y = 0; y < ACROSS; y++) column += sums[y][threadIdx.x];
    partial[(int64_t(blockIdx.y) * down + tile) * size + int64_t(place) * s.keys + key] = column;
  }
}

#define ATTENTION(DP)                                                                                      \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                    \
      attention_forward_d##DP##_f32(const float* q, const float* k, const float* v, const float* bias,     \
                                    const uint32_t* starts, float* o, float* lse, const Attention s) {     \
    forward<DP>(q, k, v, bias, starts, o, lse, s);                                                         \
  }                                                                                                        \
  extern "C" __global__ void __launch_bounds__(THREADS) attention_grad_q_d##DP##_f32(                      \
      const float* q, const float* k, const float* v, const float* bias, const uint32_t* starts,           \
      const float* g, const float* lse, const float* delta, float* dq, const Attention s) {                \
    grad_q<DP>(q, k, v, bias, starts, g, lse, delta, dq, s);                                               \
  }                                                                                                        \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_grad_kv_d##DP##_f32(                  \
      const float* q, const float* k, const float* v, const float* bias, const uint32_t* starts,           \
      const float* g, const float* lse, const float* delta, float* dk, float* dv, const Attention s) {     \
    grad_kv<DP>(q, k, v, bias, starts, g, lse, delta, dk, dv, s);                                          \
  }                                                                                                        \
  extern "C" __global__ void __launch_bounds__(THREADS) attention_grad_bias_d##DP##_f32(                   \
      const float* q, const float* k, const float* v, const float* bias, const uint32_t* starts,           \
      const float* g, const float* lse, const float* delta, float* partial, int each, const Attention s) { \
    grad_bias<DP>(q, k, v, bias, starts, g, lse, delta, partial, each, s);                                 \
  }

ATTENTION(32)
ATTENTION(64)
ATTENTION(128)
ATTENTION(256)

extern "C" __global__ void __launch_bounds__(256)
    attention_delta_f32(const float* o, const float* g, float* delta, const Attention s) {
  attention_delta(o, g, delta, s);
}
