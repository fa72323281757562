// Attention in f16 and bf16 without its matrix of probabilities, forward and backward
// (src/kernels/attention; f32 is in attention_f32.cu).
//
//     P_h = softmax(scale q_h k_g^T + bias_h)   g = h / (heads / groups)    o_h = P_h v_g
//     dS = P * (dP - rowsum(dP * P)), dP_h = do_h v_g^T    dv_g = sum_h P_h^T do_h
//     dq_h = scale dS k_g    dk_g = scale sum_h dS^T q_h   dbias = sum of dS over what shares an entry
//
// With `starts` [batch, queries] query t sees the keys starts[t] ..= t + keys - queries, without it all.
//
// Forward, a warp owns 16 or 32 queries and keeps their o in registers; tiles of keys and values come by
// asynchronous copies, one ahead, and the softmax is taken on the way: the largest logit so far, the sum of
// exponentials, o measured from it (Dao et al. 2022). Its logarithm is kept, and backward makes P again from
// it: a kernel whose blocks own queries makes dq, one whose blocks own keys and values makes dk and dv, over
// all query heads of the group in order. So nothing is added by two blocks, at the price of making the
// logits twice. Products take the operands as they are, P and dS rounded to their type, and sums in f32;
// rowsum(dP * P) is rowsum(do * o), by `attention_delta`.
//
// Rows of a tile lie 16 bytes further apart than they are long, so that the 8 rows of a matrix instruction
// fall on different banks. Heads of d columns are padded with zeros to the next of 32, 64, 96, 128, 256.
//
// Bytes moved: q, o, and k and v for every tile of queries, mostly from the cache; products bound it.
//
//     attention_forward     128 threads; blocks batch * heads * ceil(queries / QUERIES)
//     attention_delta       256 threads; blocks batch * queries * heads * LANES / 256
//     attention_grad_q      128 threads; blocks batch * heads * ceil(queries / QUERIES)
//     attention_grad_kv     128 threads; blocks (batch * groups * ceil(keys / 64), ceil(padded depth / 128))
//     attention_grad_bias   128 threads; blocks (bias_groups * heads * ceil(queries / 64) * ceil(keys / 32),
//                           parts of batch / bias_groups)
//
//     padded depth          32      64      96      128     256
//     QUERIES   forward     128     128     128     128     64
//               grad_q      128     128     64      64      64
//     shared    forward     30720   55296   53248   69632   101376
//     bytes     grad_q      30720   55296   53248   69632   135168
//               grad_kv     21248   37632   54016   70400   135936
//               grad_bias   15360   27648   39936   52224   101376
//
// LANES is the least power of two >= depth / 8, 32 at most. More than 48 KiB are asked for with
// cuFuncSetAttribute.
#include "attention.cuh"
#include "tensor_core.cuh"

constexpr int WARPS = 4, THREADS = WARPS * WARP;

// Elements from one row of a tile to the next.
template <int DP>
constexpr int LD = DP + 8;

// Sixteens of rows that a warp owns, and rows of the tiles that pass by: as many as registers hold.
template <int DP>
struct Forward {
  static constexpr int M = DP <= 128 ? 2 : 1, QUERIES = 16 * M * WARPS, KEYS = DP <= 64 ? 64 : 32;
};
template <int DP>
struct GradQ {
  static constexpr int M = DP <= 64 ? 2 : 1, QUERIES = 16 * M * WARPS, KEYS = 32;
};
template <int DP>
struct GradKv {
  // Columns of dk and dv of a block.
  static constexpr int KEYS = 16 * WARPS, QUERIES = 32, OUT = DP <= 128 ? DP : 128;
};
struct GradBias {
  static constexpr int QUERIES = 16 * WARPS, KEYS = 32;
};

// Rows of a head to a tile, zeros behind the `there` rows and `depth` columns.
template <int ROWS, int DP, typename T>
__device__ __forceinline__ void copy_rows(T* tile, const T* from, int64_t stride, int there, int depth,
                                          bool wide) {
  if (wide) {
    // Unrolled the addresses would take the registers that sums need.
#pragma unroll 1
    for (int i = 0; i < ROWS * DP / 8 / THREADS; i++) {
      const int at = i * THREADS + int(threadIdx.x), row = at / (DP / 8), column = at % (DP / 8) * 8;
      const bool real = row < there && column < depth;
      copy_async(tile + row * LD<DP> + column, real ? from + row * stride + column : from, real ? 16 : 0);
    }
  } else {
#pragma unroll 1
    for (int at = threadIdx.x; at < ROWS * DP; at += THREADS) {
      const int row = at / DP, column = at % DP;
      const bool real = row < there && column < depth;
      tile[row * LD<DP> + column] = real ? from[row * stride + column] : from_float<T>(0.0f);
    }
  }
}

// c = a b^T for 16 M rows at `a` and N rows at `b`, DP long.
template <int DP, int M, int N, typename T>
__device__ __forceinline__ void rows_by_rows(float (&c)[M][N / 8][4], const T* a, const T* b) {
  const int lane = lane_of();
  // Which row, and which of its halves, of each operand this lane has the address of.
  const T* left = a + lane % 16 * LD<DP> + lane / 16 * 8;
  const T* right = b + (lane / 16 * 8 + lane % 8) * LD<DP> + lane / 8 % 2 * 8;
#pragma unroll
  for (int i = 0; i < M; i++) {
#pragma unroll
    for (int n = 0; n < N / 8; n++) {
#pragma unroll
      for (int j = 0; j < 4; j++) c[i][n][j] = 0.0f;
    }
  }
#pragma unroll
  for (int k = 0; k < DP; k += 16) {
    uint32_t rows[M][4];
#pragma unroll
    for (int i = 0; i < M; i++) load_matrices(rows[i], left + i * 16 * LD<DP> + k);
#pragma unroll
    for (int n = 0; n < N / 16; n++) {
      uint32_t columns[4];
      load_matrices(columns, right + n * 16 * LD<DP> + k);
#pragma unroll
      for (int i = 0; i < M; i++) {
        mma<T>(c[i][2 * n], rows[i], columns[0], columns[1]);
        mma<T>(c[i][2 * n + 1], rows[i], columns[2], columns[3]);
      }
    }
  }
}

// c += p tile for 16 M rows of p, K long, and OUT columns of the K rows at `tile`.
template <int DP, int OUT, int M, int K, typename T>
__device__ __forceinline__ void mix_rows(float (&c)[M][OUT / 8][4], const float (&p)[M][K / 8][4],
                                         const T* tile) {
  const int lane = lane_of();
  const T* from = tile + lane % 16 * LD<DP> + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < K / 16; k++) {
    uint32_t rows[M][4];
#pragma unroll
    for (int i = 0; i < M; i++) {
      // Two neighbouring tiles of sums are the four registers of one operand.
      rows[i][0] = pair_of<T>(p[i][2 * k][0], p[i][2 * k][1]);
      rows[i][1] = pair_of<T>(p[i][2 * k][2], p[i][2 * k][3]);
      rows[i][2] = pair_of<T>(p[i][2 * k + 1][0], p[i][2 * k + 1][1]);
      rows[i][3] = pair_of<T>(p[i][2 * k + 1][2], p[i][2 * k + 1][3]);
    }
#pragma unroll
    for (int n = 0; n < OUT / 16; n++) {
      uint32_t columns[4];
      load_matrices_transposed(columns, from + k * 16 * LD<DP> + n * 16);
#pragma unroll
      for (int i = 0; i < M; i++) {
        mma<T>(c[i][2 * n], rows[i], columns[0], columns[1]);
        mma<T>(c[i][2 * n + 1], rows[i], columns[2], columns[3]);
      }
    }
  }
}

template <int M, int N>
__device__ __forceinline__ void clear(float (&c)[M][N][4]) {
#pragma unroll
  for (int i = 0; i < M; i++) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
      for (int j = 0; j < 4; j++) c[i][n][j] = 0.0f;
    }
  }
}

// Writes 16 M rows of OUT columns, times a factor for each row, by way of the warp's own rows of a tile.
template <int DP, int OUT, int M, typename T>
__device__ __forceinline__ void store_rows(const float (&c)[M][OUT / 8][4], const float (&factor)[M][2],
                                           T* tile, T* to, int64_t stride, int there, int columns,
                                           bool wide) {
  const int lane = lane_of();
  __syncwarp();
#pragma unroll
  for (int i = 0; i < M; i++) {
#pragma unroll
    for (int n = 0; n < OUT / 8; n++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        T* at = tile + (i * 16 + half * 8 + lane / 4) * LD<DP> + n * 8 + lane % 4 * 2;
        const float f = factor[i][half];
        *reinterpret_cast<uint32_t*>(at) = pair_of<T>(c[i][n][2 * half] * f, c[i][n][2 * half + 1] * f);
      }
    }
  }
  __syncwarp();
  if (wide) {
#pragma unroll 1
    for (int at = lane; at < 16 * M * OUT / 8; at += WARP) {
      const int row = at / (OUT / 8), column = at % (OUT / 8) * 8;
      if (row < there && column < columns)
        store(to + row * stride + column, load<8>(tile + row * LD<DP> + column));
    }
  } else {
#pragma unroll 1
    for (int at = lane; at < 16 * M * OUT; at += WARP) {
      const int row = at / OUT, column = at % OUT;
      if (row < there && column < columns) to[row * stride + column] = tile[row * LD<DP> + column];
    }
  }
}

// What a thread knows of its rows, which are queries: 8 apart, two of each sixteen.
template <int M>
struct Queries {
  int first, low[M][2];

  // `from` is the warp's first query.
  __device__ __forceinline__ Queries(const Attention& s, const uint32_t* starts, int b, int from)
      : first(from + lane_of() / 4) {
#pragma unroll
    for (int i = 0; i < M; i++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const bool real = starts && t(i, half) < s.queries;
        low[i][half] = real ? int(starts[int64_t(b) * s.queries + t(i, half)]) : 0;
      }
    }
  }

  __device__ __forceinline__ int t(int i, int half) const { return first + i * 16 + half * 8; }

  // Whether the warp has queries, of which `there` are left, and one of them sees key k0 or a later one.
  __device__ __forceinline__ bool see(int k0, int there, const Attention& s, const uint32_t* starts) const {
    return there > 0 && k0 <= s.last(first - lane_of() / 4 + 16 * M - 1, starts);
  }
};

// Adds the bias, if there is one, and hides what is not seen. With a bias logits are scaled and times log2 e
// from here on; without, the factor that does both is left to the exponential: the return value.
template <int M, int N, typename T>
__device__ __forceinline__ float finish_logits(float (&c)[M][N][4], const Queries<M>& rows, int k0,
                                               const T* bias, const uint32_t* starts, const Attention& s,
                                               int b, int h) {
  const int column = k0 + lane_of() % 4 * 2;
#pragma unroll
  for (int i = 0; i < M; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int t = rows.t(i, half), low = rows.low[i][half], high = s.last(t, starts);
      if (bias) {
        const T* row = bias + s.bias_row(b, h, t < s.queries ? t : 0);
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
          for (int j = 0; j < 2; j++) {
            const int key = column + n * 8 + j;
            const float add = key <= high ? to_float(row[key]) : 0.0f;
            c[i][n][2 * half + j] = (c[i][n][2 * half + j] * s.scale + add) * LOG2_E;
          }
        }
      }
      if (k0 < low || k0 + N * 8 - 1 > high) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
          for (int j = 0; j < 2; j++) {
            const int key = column + n * 8 + j;
            if (key < low || key > high) c[i][n][2 * half + j] = -INFINITY;
          }
        }
      }
    }
  }
  return bias ? 1.0f : s.scale * LOG2_E;
}

template <int DP, typename T>
__device__ __forceinline__ void forward(const T* q, const T* k, const T* v, const T* bias,
                                        const uint32_t* starts, T* o, float* lse, const Attention& s) {
  constexpr int M = Forward<DP>::M, QUERIES = Forward<DP>::QUERIES, KEYS = Forward<DP>::KEYS;
  extern __shared__ __align__(16) unsigned char tiles[];
  T* queries = reinterpret_cast<T*>(tiles);
  T* keys = queries + QUERIES * LD<DP>;  // two of them
  T* values = keys + 2 * KEYS * LD<DP>;
  const int across = (s.queries + QUERIES - 1) / QUERIES;
  // Late queries see most keys, so they come first.
  const int q0 = (across - 1 - int(blockIdx.x % across)) * QUERIES;
  const int h = int(blockIdx.x / across % s.heads), b = int(blockIdx.x / across / s.heads);
  const int g = h / (s.heads / s.groups);
  const int there = s.queries - q0 < QUERIES ? s.queries - q0 : QUERIES;
  const bool wide = s.wide(q) && s.wide(k) && s.wide(v) && s.wide(o);
  const int first = starts_of(starts, s, b, q0, q0 + there).least, end = s.last(q0 + there - 1, starts) + 1;
  const auto fetch = [&](int k0, int stage) {
    const int count = end - k0;
    copy_rows<KEYS, DP>(keys + stage * KEYS * LD<DP>, s.key(k, b, g, k0), s.key_stride(), count, s.depth,
                        wide);
    copy_rows<KEYS, DP>(values + stage * KEYS * LD<DP>, s.key(v, b, g, k0), s.key_stride(), count, s.depth,
                        wide);
  };
  copy_rows<QUERIES, DP>(queries, s.query(q, b, h, q0), s.query_stride(), there, s.depth, wide);
  fetch(first, 0);
  copy_commit();
  const int own = warp_of() * 16 * M;
  const Queries<M> rows(s, starts, b, q0 + own);
  float out[M][DP / 8][4], top[M][2], sum[M][2];
  clear(out);
#pragma unroll
  for (int i = 0; i < M; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      top[i][half] = -INFINITY;
      sum[i][half] = 0.0f;
    }
  }
  int stage = 0;
  for (int k0 = first; k0 < end; k0 += KEYS, stage ^= 1) {
    if (k0 + KEYS < end) fetch(k0 + KEYS, stage ^ 1);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    if (rows.see(k0, there - own, s, starts)) {
      float p[M][KEYS / 8][4];
      rows_by_rows<DP, M, KEYS>(p, queries + own * LD<DP>, keys + stage * KEYS * LD<DP>);
      const float factor = finish_logits(p, rows, k0, bias, starts, s, b, h);
#pragma unroll
      for (int i = 0; i < M; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float high = -INFINITY;
#pragma unroll
          for (int n = 0; n < KEYS / 8; n++) {
            high = fmaxf(high, fmaxf(p[i][n][2 * half], p[i][n][2 * half + 1]));
          }
          // A row lies in four lanes.
          high = fmaxf(top[i][half], warp_max(high, 4) * factor);
          // Where nothing was seen yet exponentials are measured from 0, and are 0.
          const float base = high == -INFINITY ? 0.0f : high;
          const float shrink = exp2_fast(top[i][half] - base);
          top[i][half] = high;
          float total = 0.0f;
#pragma unroll
          for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
            for (int j = 2 * half; j < 2 * half + 2; j++) {
              p[i][n][j] = exp2_fast(fmaf(p[i][n][j], factor, -base));
              total += p[i][n][j];
            }
          }
          sum[i][half] = fmaf(sum[i][half], shrink, total);
#pragma unroll
          for (int n = 0; n < DP / 8; n++) {
            out[i][n][2 * half] *= shrink;
            out[i][n][2 * half + 1] *= shrink;
          }
        }
      }
      mix_rows<DP, DP, M, KEYS>(out, p, values + stage * KEYS * LD<DP>);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < M; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float all = warp_sum(sum[i][half], 4);
      const int t = rows.t(i, half);
      if (lane_of() % 4 == 0 && t < s.queries) {
        lse[s.statistic(b, h, t)] = log_sum_exp(top[i][half] * (1.0f / LOG2_E), all);
      }
      sum[i][half] = 1.0f / all;
    }
  }
  store_rows<DP, DP, M>(out, sum, queries + own * LD<DP>, s.query(o, b, h, q0 + own), s.query_stride(),
                        there - own, s.depth, wide);
}

// ds = P * (dP - delta) of the warp's 16 M queries and a tile of keys; P itself is not kept.
template <int DP, int M, int KEYS, typename T>
__device__ __forceinline__ void logit_grads(float (&ds)[M][KEYS / 8][4], const T* queries, const T* grads,
                                            const T* keys, const T* values, const Queries<M>& rows,
                                            const float (&low)[M][2], const float (&delta)[M][2], int k0,
                                            const T* bias, const uint32_t* starts, const Attention& s, int b,
                                            int h) {
  rows_by_rows<DP, M, KEYS>(ds, queries, keys);
  const float factor = finish_logits(ds, rows, k0, bias, starts, s, b, h);
  float dp[M][KEYS / 8][4];
  rows_by_rows<DP, M, KEYS>(dp, grads, values);
#pragma unroll
  for (int i = 0; i < M; i++) {
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float p = exp2_fast(fmaf(ds[i][n][j], factor, -low[i][j / 2]));
        ds[i][n][j] = logit_grad(p, dp[i][n][j], delta[i][j / 2]);
      }
    }
  }
}

// log2 of the rows' sums and their deltas. Behind the last query the sum is infinite and P nothing.
template <int M>
__device__ __forceinline__ void load_statistics(float (&low)[M][2], float (&delta)[M][2],
                                                const Queries<M>& rows, const float* lse, const float* deltas,
                                                const Attention& s, int b, int h) {
#pragma unroll
  for (int i = 0; i < M; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int t = rows.t(i, half);
      const bool real = t < s.queries;
      low[i][half] = real ? lse[s.statistic(b, h, t)] * LOG2_E : INFINITY;
      delta[i][half] = real ? deltas[s.statistic(b, h, t)] : 0.0f;
    }
  }
}

template <int DP, typename T>
__device__ __forceinline__ void grad_q(const T* q, const T* k, const T* v, const T* bias,
                                       const uint32_t* starts, const T* g_o, const float* lse,
                                       const float* deltas, T* dq, const Attention& s) {
  constexpr int M = GradQ<DP>::M, QUERIES = GradQ<DP>::QUERIES, KEYS = GradQ<DP>::KEYS;
  extern __shared__ __align__(16) unsigned char tiles[];
  T* queries = reinterpret_cast<T*>(tiles);
  T* grads = queries + QUERIES * LD<DP>;
  T* keys = grads + QUERIES * LD<DP>;  // two of them
  T* values = keys + 2 * KEYS * LD<DP>;
  const int across = (s.queries + QUERIES - 1) / QUERIES;
  const int q0 = (across - 1 - int(blockIdx.x % across)) * QUERIES;
  const int h = int(blockIdx.x / across % s.heads), b = int(blockIdx.x / across / s.heads);
  const int g = h / (s.heads / s.groups);
  const int there = s.queries - q0 < QUERIES ? s.queries - q0 : QUERIES;
  const bool wide = s.wide(q) && s.wide(k) && s.wide(v) && s.wide(g_o) && s.wide(dq);
  const int first = starts_of(starts, s, b, q0, q0 + there).least, end = s.last(q0 + there - 1, starts) + 1;
  const auto fetch = [&](int k0, int stage) {
    const int count = end - k0;
    copy_rows<KEYS, DP>(keys + stage * KEYS * LD<DP>, s.key(k, b, g, k0), s.key_stride(), count, s.depth,
                        wide);
    copy_rows<KEYS, DP>(values + stage * KEYS * LD<DP>, s.key(v, b, g, k0), s.key_stride(), count, s.depth,
                        wide);
  };
  copy_rows<QUERIES, DP>(queries, s.query(q, b, h, q0), s.query_stride(), there, s.depth, wide);
  copy_rows<QUERIES, DP>(grads, s.query(g_o, b, h, q0), s.query_stride(), there, s.depth, wide);
  fetch(first, 0);
  copy_commit();
  const int own = warp_of() * 16 * M;
  const Queries<M> rows(s, starts, b, q0 + own);
  float low[M][2], delta[M][2], out[M][DP / 8][4];
  load_statistics(low, delta, rows, lse, deltas, s, b, h);
  clear(out);
  int stage = 0;
  for (int k0 = first; k0 < end; k0 += KEYS, stage ^= 1) {
    if (k0 + KEYS < end) fetch(k0 + KEYS, stage ^ 1);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    if (rows.see(k0, there - own, s, starts)) {
      float ds[M][KEYS / 8][4];
      const T* tile = keys + stage * KEYS * LD<DP>;
      logit_grads<DP, M, KEYS>(ds, queries + own * LD<DP>, grads + own * LD<DP>, tile,
                               values + stage * KEYS * LD<DP>, rows, low, delta, k0, bias, starts, s, b, h);
      mix_rows<DP, DP, M, KEYS>(out, ds, tile);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < M; i++) low[i][0] = low[i][1] = s.scale;
  store_rows<DP, DP, M>(out, low, queries + own * LD<DP>, s.query(dq, b, h, q0 + own), s.query_stride(),
                        there - own, s.depth, wide);
}

// A block owns 64 keys and their values, rows of the transposed logits; queries pass by.
template <int DP, typename T>
__device__ __forceinline__ void grad_kv(const T* q, const T* k, const T* v, const T* bias,
                                        const uint32_t* starts, const T* g_o, const float* lse,
                                        const float* deltas, T* dk, T* dv, const Attention& s) {
  constexpr int KEYS = GradKv<DP>::KEYS, QUERIES = GradKv<DP>::QUERIES, OUT = GradKv<DP>::OUT;
  // Numbers of a tile of queries: log2 of the sum, delta, and the first key seen.
  struct Statistics {
    float low[QUERIES], delta[QUERIES];
    int start[QUERIES];
  };
  extern __shared__ __align__(16) unsigned char tiles[];
  T* keys = reinterpret_cast<T*>(tiles);
  T* values = keys + KEYS * LD<DP>;
  T* queries = values + KEYS * LD<DP>;  // two of them
  T* grads = queries + 2 * QUERIES * LD<DP>;
  Statistics* statistics = reinterpret_cast<Statistics*>(grads + 2 * QUERIES * LD<DP>);  // two of them
  const int across = (s.keys + KEYS - 1) / KEYS;
  // Early keys are seen most.
  const int k0 = int(blockIdx.x % across) * KEYS;
  const int g = int(blockIdx.x / across % s.groups), b = int(blockIdx.x / across / s.groups);
  const int each = s.heads / s.groups, column = int(blockIdx.y) * OUT;
  const int there = s.keys - k0 < KEYS ? s.keys - k0 : KEYS;
  const bool wide = s.wide(q) && s.wide(k) && s.wide(v) && s.wide(g_o) && s.wide(dk) && s.wide(dv);
  // Turns are tiles of queries, head after head; those that see none of these keys are left out.
  const int from = first_query(k0, s.queries, s.keys, starts != nullptr) / QUERIES;
  const int tall = (s.queries + QUERIES - 1) / QUERIES, turns = each * tall;
  int largest = 0;  // start of a query of the turn that `next` found
  const auto next = [&](int turn) {
    for (; turn < turns; turn++) {
      const int tile = turn % tall;
      if (tile < from) {
        turn += from - tile - 1;
        continue;
      }
      const int q0 = tile * QUERIES, to = q0 + QUERIES < s.queries ? q0 + QUERIES : s.queries;
      const Starts of_tile = starts_of(starts, s, b, q0, to);
      largest = of_tile.largest;
      if (of_tile.least < k0 + there) break;
    }
    return turn;
  };
  const auto fetch = [&](int turn, int stage) {
    const int h = g * each + turn / tall, q0 = turn % tall * QUERIES;
    const int count = s.queries - q0;
    copy_rows<QUERIES, DP>(queries + stage * QUERIES * LD<DP>, s.query(q, b, h, q0), s.query_stride(), count,
                           s.depth, wide);
    copy_rows<QUERIES, DP>(grads + stage * QUERIES * LD<DP>, s.query(g_o, b, h, q0), s.query_stride(), count,
                           s.depth, wide);
    if (threadIdx.x < QUERIES) {
      const int i = int(threadIdx.x), t = q0 + i;
      const bool real = t < s.queries;
      Statistics& to = statistics[stage];
      to.low[i] = real ? lse[s.statistic(b, h, t)] * LOG2_E : INFINITY;
      to.delta[i] = real ? deltas[s.statistic(b, h, t)] : 0.0f;
      to.start[i] = real && starts ? int(starts[int64_t(b) * s.queries + t]) : 0;
    }
  };
  copy_rows<KEYS, DP>(keys, s.key(k, b, g, k0), s.key_stride(), there, s.depth, wide);
  copy_rows<KEYS, DP>(values, s.key(v, b, g, k0), s.key_stride(), there, s.depth, wide);
  int turn = next(0);
  if (turn < turns) fetch(turn, 0);
  copy_commit();
  const int own = warp_of() * 16;
  float out_k[1][OUT / 8][4], out_v[1][OUT / 8][4];
  clear(out_k);
  clear(out_v);
  for (int stage = 0; turn < turns; stage ^= 1) {
    const int h = g * each + turn / tall, q0 = turn % tall * QUERIES;
    const bool edge = k0 + KEYS - 1 > s.last(q0, starts) || largest > k0;
    const int following = next(turn + 1);
    if (following < turns) fetch(following, stage ^ 1);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    const T* tile = queries + stage * QUERIES * LD<DP>;
    const T* grad = grads + stage * QUERIES * LD<DP>;
    const Statistics& numbers = statistics[stage];
    // Keys behind the last, or behind all that these queries see, are nobody's.
    if (own < there && k0 + own <= s.last(q0 + QUERIES - 1, starts)) {
      float p[1][QUERIES / 8][4], ds[1][QUERIES / 8][4];
      rows_by_rows<DP, 1, QUERIES>(p, keys + own * LD<DP>, tile);
      rows_by_rows<DP, 1, QUERIES>(ds, values + own * LD<DP>, grad);
      const float factor = bias ? 1.0f : s.scale * LOG2_E;
      // Entry (n, j) of a thread is of query q0 + column + 8 n + j % 2 and of key row + 8 (j / 2).
      const int column_of = lane_of() % 4 * 2, row_of = k0 + own + lane_of() / 4;
      if (bias || edge) {
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++) {
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const int i = column_of + n * 8 + j % 2, t = q0 + i, key = row_of + j / 2 * 8;
            if (bias) {
              const bool real = t < s.queries && key < s.keys;
              const float add = real ? to_float(bias[s.bias_row(b, h, t) + key]) : 0.0f;
              p[0][n][j] = (p[0][n][j] * s.scale + add) * LOG2_E;
            }
            if (key < numbers.start[i] || key > s.last(t, starts)) p[0][n][j] = -INFINITY;
          }
        }
      }
#pragma unroll
      for (int n = 0; n < QUERIES / 8; n++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int i = column_of + n * 8 + j % 2;
          p[0][n][j] = exp2_fast(fmaf(p[0][n][j], factor, -numbers.low[i]));
          ds[0][n][j] = logit_grad(p[0][n][j], ds[0][n][j], numbers.delta[i]);
        }
      }
      mix_rows<DP, OUT, 1, QUERIES>(out_v, p, grad + column);
      mix_rows<DP, OUT, 1, QUERIES>(out_k, ds, tile + column);
    }
    __syncthreads();
    turn = following;
  }
  copy_wait<0>();
  __syncthreads();
  const float scale[1][2] = {{s.scale, s.scale}}, one[1][2] = {{1.0f, 1.0f}};
  store_rows<DP, OUT, 1>(out_k, scale, keys + own * LD<DP>, s.key(dk, b, g, k0 + own) + column,
                         s.key_stride(), there - own, s.depth - column, wide);
  store_rows<DP, OUT, 1>(out_v, one, values + own * LD<DP>, s.key(dv, b, g, k0 + own) + column,
                         s.key_stride(), there - own, s.depth - column, wide);
}

// partial [parts, rows, bias_groups, heads, bias_rows, keys]: block (tile, part) sums dS of one tile over the
// entries of its group, `each` of them a part. A bias of one row is summed over the tile's queries too, and
// each tile of queries has a row of `partial`; else rows = 1.
template <int DP, typename T>
__device__ __forceinline__ void grad_bias(const T* q, const T* k, const T* v, const T* bias,
                                          const uint32_t* starts, const T* g_o, const float* lse,
                                          const float* deltas, float* partial, int each, const Attention& s) {
  constexpr int QUERIES = GradBias::QUERIES, KEYS = GradBias::KEYS;
  extern __shared__ __align__(16) unsigned char tiles[];
  T* queries = reinterpret_cast<T*>(tiles);
  T* grads = queries + QUERIES * LD<DP>;
  T* keys = grads + QUERIES * LD<DP>;
  T* values = keys + KEYS * LD<DP>;
  __shared__ float sums[WARPS][KEYS];
  const int across = (s.keys + KEYS - 1) / KEYS, down = (s.queries + QUERIES - 1) / QUERIES;
  const int k0 = int(blockIdx.x % across) * KEYS;
  const int tile = int(blockIdx.x / across % down), q0 = tile * QUERIES;
  const int place = int(blockIdx.x / across / down), h = place % s.heads, group = place / s.heads;
  const int g = h / (s.heads / s.groups), own = warp_of() * 16;
  const bool wide = s.wide(q) && s.wide(k) && s.wide(v) && s.wide(g_o);
  float sum[1][KEYS / 8][4];
  clear(sum);
  for (int turn = int(blockIdx.y) * each; turn < int(blockIdx.y + 1) * each; turn++) {
    const int b = group + turn * s.bias_groups;
    if (b >= s.batch) break;
    const int there = s.queries - q0, left = s.keys - k0;
    copy_rows<QUERIES, DP>(queries, s.query(q, b, h, q0), s.query_stride(), there, s.depth, wide);
    copy_rows<QUERIES, DP>(grads, s.query(g_o, b, h, q0), s.query_stride(), there, s.depth, wide);
    copy_rows<KEYS, DP>(keys, s.key(k, b, g, k0), s.key_stride(), left, s.depth, wide);
    copy_rows<KEYS, DP>(values, s.key(v, b, g, k0), s.key_stride(), left, s.depth, wide);
    copy_commit();
    const Queries<1> rows(s, starts, b, q0 + own);
    float low[1][2], delta[1][2], ds[1][KEYS / 8][4];
    load_statistics(low, delta, rows, lse, deltas, s, b, h);
    copy_wait<0>();
    __syncthreads();
    if (rows.see(k0, there - own, s, starts)) {
      logit_grads<DP, 1, KEYS>(ds, queries + own * LD<DP>, grads + own * LD<DP>, keys, values, rows, low,
                               delta, k0, bias, starts, s, b, h);
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
        for (int j = 0; j < 4; j++) sum[0][n][j] += ds[0][n][j];
      }
    }
    __syncthreads();
  }
  const int64_t size = int64_t(s.bias_groups) * s.heads * s.bias_rows * s.keys;
  if (s.bias_rows > 1) {
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int t = q0 + own + lane_of() / 4 + j / 2 * 8, key = k0 + n * 8 + lane_of() % 4 * 2 + j % 2;
        if (t < s.queries && key < s.keys) {
          partial[blockIdx.y * size + (int64_t(place) * s.queries + t) * s.keys + key] = sum[0][n][j];
        }
      }
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float column = sum[0][n][j] + sum[0][n][j + 2];
      // Over the rows, which lie in lanes 4 apart.
      for (int apart = 4; apart < WARP; apart *= 2) column += __shfl_xor_sync(ALL_LANES, column, apart);
      if (lane_of() < 4) sums[warp_of()][n * 8 + lane_of() * 2 + j] = column;
    }
  }
  __syncthreads();
  const int key = k0 + int(threadIdx.x);
  if (threadIdx.x < KEYS && key < s.keys) {
    float column = 0.0f;
    for (int warp = 0; warp < WARPS; warp++) column += sums[warp][threadIdx.x];
    partial[(int64_t(blockIdx.y) * down + tile) * size + int64_t(place) * s.keys + key] = column;
  }
}

#define ATTENTION(suffix, T, DP)                                                                        \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                 \
      attention_forward_d##DP##_##suffix(const T* q, const T* k, const T* v, const T* bias,             \
                                         const uint32_t* starts, T* o, float* lse, const Attention s) { \
    forward<DP>(q, k, v, bias, starts, o, lse, s);                                                      \
  }                                                                                                     \
  extern "C" __global__ void __launch_bounds__(THREADS) attention_grad_q_d##DP##_##suffix(              \
      const T* q, const T* k, const T* v, const T* bias, const uint32_t* starts, const T* g,            \
      const float* lse, const float* delta, T* dq, const Attention s) {                                 \
    grad_q<DP>(q, k, v, bias, starts, g, lse, delta, dq, s);                                            \
  }                                                                                                     \
  extern "C" __global__ void __launch_bounds__(THREADS) attention_grad_kv_d##DP##_##suffix(             \
      const T* q, const T* k, const T* v, const T* bias, const uint32_t* starts, const T* g,            \
      const float* lse, const float* delta, T* dk, T* dv, const Attention s) {                          \
    grad_kv<DP>(q, k, v, bias, starts, g, lse, delta, dk, dv, s);                                       \
  }                                                                                                     \
  extern "C" __global__ void __launch_bounds__(THREADS) attention_grad_bias_d##DP##_##suffix(           \
      const T* q, const T* k, const T* v, const T* bias, const uint32_t* starts, const T* g,            \
      const float* lse, const float* delta, float* partial, int each, const Attention s) {              \
    grad_bias<DP>(q, k, v, bias, starts, g, lse, delta, partial, each, s);                              \
  }

#define DEPTHS(suffix, T)                                                                 \
  ATTENTION(suffix, T, 32)                                                                \
  ATTENTION(suffix, T, 64)                                                                \
  ATTENTION(suffix, T, 96)                                                                \
  ATTENTION(suffix, T, 128)                                                               \
  ATTENTION(suffix, T, 256)                                                               \
  extern "C" __global__ void __launch_bounds__(256)                                       \
      attention_delta_##suffix(const T* o, const T* g, float* delta, const Attention s) { \
    attention_delta(o, g, delta, s);                                                      \
  }

DEPTHS(f16, __half)
DEPTHS(bf16, __nv_bfloat16)
