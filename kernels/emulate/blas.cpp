// libcublas: products of column-major matrices, sums in f32 (f64, i32), and of curand and the other libraries
// what is called.
#include <stdio.h>

#include <algorithm>
#include <memory>

#include "numbers.h"
#include "run.h"

using emulate::fail;

#define API(NAME, ...) extern "C" __attribute__((visibility("default"))) int NAME(__VA_ARGS__)

enum { SUCCESS = 0, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum Type { R_32F = 0, R_64F = 1, R_16F = 2, R_8I = 3, R_32I = 10, R_16BF = 14 };
enum Compute {
  C_16F = 64,
  C_32F = 68,
  C_64F = 70,
  C_32I = 72,
  C_FAST_16F = 74,
  C_FAST_16BF = 75,
  C_FAST_TF32 = 77
};

struct Handle {
  void* stream = nullptr;
  int pointer_mode = 0, math_mode = 0;
};

static size_t size_of(int type) {
  return type == R_64F ? 8 : type == R_32F || type == R_32I ? 4 : type == R_8I ? 1 : 2;
}

struct Matrix {
  const void* at;
  int type;
  bool transposed;
  long ld;
};

// Columns of tiles: [tiles, depth, TILE], zeros behind `lines`. Element (line, d) lies at line + d ld, or at
// d + line ld.
template <typename S, int TILE, typename T>
static void pack_of(S* to, const T* from, long along_line, long along_depth, int lines, int depth,
                    bool tf32) {
  for (int first = 0; first < lines; first += TILE) {
    for (int d = 0; d < depth; d++, to += TILE) {
      for (int i = 0; i < TILE; i++) {
        S x = first + i < lines ? S(from[(first + i) * along_line + d * along_depth]) : S(0);
        if constexpr (std::is_same_v<S, float>) {
          // To the nearest of 10 bits of mantissa.
          if (tf32) x = emulate::bits_as<float>((emulate::bits_as<uint32_t>(x) + 0x1000) & ~0x1fffu);
        }
        to[i] = x;
      }
    }
  }
}
template <typename S, int TILE>
static void pack(S* to, const Matrix& m, bool lines_are_columns, int lines, int depth, bool tf32) {
  const bool apart = m.transposed != lines_are_columns;
  const long along_line = apart ? m.ld : 1, along_depth = apart ? 1 : m.ld;
  switch (m.type) {
    case R_32F:
      return pack_of<S, TILE>(to, static_cast<const float*>(m.at), along_line, along_depth, lines, depth,
                              tf32);
    case R_64F:
      return pack_of<S, TILE>(to, static_cast<const double*>(m.at), along_line, along_depth, lines, depth,
                              tf32);
    case R_8I:
      return pack_of<S, TILE>(to, static_cast<const int8_t*>(m.at), along_line, along_depth, lines, depth,
                              tf32);
    case R_16F:
      return pack_of<S, TILE>(to, static_cast<const __half*>(m.at), along_line, along_depth, lines, depth,
                              tf32);
    default:
      return pack_of<S, TILE>(to, static_cast<const __nv_bfloat16*>(m.at), along_line, along_depth, lines,
                              depth, tf32);
  }
}

template <typename S, typename T>
static void put(T& to, S sum, S alpha, S beta) {
  const S x = alpha * sum;
  to = T(beta == S(0) ? x : x + beta * S(to));
}

template <typename S>
static void product(const Matrix& a, const Matrix& b, void* c, int c_type, long ldc, int m, int n, int k,
                    S alpha, S beta, bool tf32) {
  typedef S Vector __attribute__((vector_size(64)));
  constexpr int WIDE = 64 / sizeof(S), M = 2 * WIDE, N = 8;
  static std::vector<S> left, right;
  const int tiles_m = (m + M - 1) / M, tiles_n = (n + N - 1) / N;
  left.resize(size_t(tiles_m) * k * M + M), right.resize(size_t(tiles_n) * k * N);
  S* const packed = left.data() + (64 - uintptr_t(left.data()) % 64) % 64 / sizeof(S);
  pack<S, M>(packed, a, false, m, k, tf32);
  pack<S, N>(right.data(), b, true, n, k, tf32);
  for (int i = 0; i < tiles_m; i++) {
    for (int j = 0; j < tiles_n; j++) {
      Vector sums[N][2] = {};
      const Vector* x = reinterpret_cast<const Vector*>(packed + size_t(i) * k * M);
      const S* y = right.data() + size_t(j) * k * N;
      for (int d = 0; d < k; d++, x += 2, y += N) {
        for (int e = 0; e < N; e++) sums[e][0] += x[0] * y[e], sums[e][1] += x[1] * y[e];
      }
      for (int e = 0; e < N && j * N + e < n; e++) {
        for (int f = 0; f < M && i * M + f < m; f++) {
          const S sum = sums[e][f / WIDE][f % WIDE];
          const long at = (long(j) * N + e) * ldc + long(i) * M + f;
          switch (c_type) {
            case R_32F:
              put(static_cast<float*>(c)[at], sum, alpha, beta);
              break;
            case R_64F:
              put(static_cast<double*>(c)[at], sum, alpha, beta);
              break;
            case R_32I:
              put(static_cast<int32_t*>(c)[at], sum, alpha, beta);
              break;
            case R_16F:
              put(static_cast<__half*>(c)[at], sum, alpha, beta);
              break;
            default:
              put(static_cast<__nv_bfloat16*>(c)[at], sum, alpha, beta);
          }
        }
      }
    }
  }
}

static int refuse(int code, const char* why) {
  fprintf(stderr, "emulator: refused: a product: %s\n", why);
  return code;
}

API(cublasGemmStridedBatchedEx, Handle* handle, int op_a, int op_b, int m, int n, int k, const void* alpha,
    const void* a, int a_type, int lda, long long stride_a, const void* b, int b_type, int ldb,
    long long stride_b, const void* beta, void* c, int c_type, int ldc, long long stride_c, int batch,
    int compute, int) {
  const bool ta = op_a != 0, tb = op_b != 0;
  if (handle->pointer_mode != 0) fail("cublas: factors in the device's memory");
  if (m < 0 || n < 0 || k < 0 || batch < 0) return refuse(INVALID_VALUE, "a size below 0");
  if (lda < std::max(1, ta ? k : m) || ldb < std::max(1, tb ? n : k) || ldc < std::max(1, m)) {
    return refuse(INVALID_VALUE, "a leading dimension below the length of a column");
  }
  if (m == 0 || n == 0 || batch == 0) return SUCCESS;
  if (compute == C_32I + 1 || compute == C_32F + 1 || compute == C_64F + 1 || compute == C_16F + 1) compute--;
  const bool halves = a_type == R_16F || a_type == R_16BF;
  const bool allowed =
      a_type == b_type &&
      (compute == C_64F   ? a_type == R_64F && c_type == R_64F
       : compute == C_32I ? a_type == R_8I && c_type == R_32I
       : compute == C_16F ? a_type == R_16F && c_type == R_16F
       : compute == C_32F || compute == C_FAST_16F || compute == C_FAST_16BF || compute == C_FAST_TF32
           ? (halves && (c_type == a_type || c_type == R_32F)) || (a_type == R_32F && c_type == R_32F) ||
                 (a_type == R_8I && c_type == R_32F)
           : false);
  if (!allowed) return refuse(NOT_SUPPORTED, "these types");
  if (a_type == R_8I && (lda % 4 || ldb % 4 || uintptr_t(a) % 4 || uintptr_t(b) % 4 || ldc % 4)) {
    return refuse(NOT_SUPPORTED, "bytes whose columns do not begin at multiples of 4");
  }
  const auto inside = [&](const void* at, int type, long ld, long rows, long columns, long long stride) {
    const std::lock_guard<std::recursive_mutex> guard(emulate::whole());
    const char* const from = static_cast<const char*>(at);
    const long long last = (batch - 1) * stride;
    return rows == 0 || columns == 0 ||
           emulate::device_range(from + std::min(0ll, last) * (long long)(size_of(type)),
                                 size_t(std::abs(last) + (columns - 1) * ld + rows) * size_of(type));
  };
  if (uintptr_t(a) % size_of(a_type) || uintptr_t(b) % size_of(b_type) || uintptr_t(c) % size_of(c_type) ||
      !inside(a, a_type, lda, ta ? k : m, ta ? m : k, stride_a) ||
      !inside(b, b_type, ldb, tb ? n : k, tb ? k : n, stride_b) || !inside(c, c_type, ldc, m, n, stride_c)) {
    fail(
        "cublas: a matrix of a product of %d x %d x %d, %d of them, is not in one allocation of the device, "
        "or not "
        "aligned",
        m, n, k, batch);
  }
  const double factor[2] = {compute == C_64F   ? *static_cast<const double*>(alpha)
                            : compute == C_32I ? *static_cast<const int32_t*>(alpha)
                            : compute == C_16F ? double(*static_cast<const __half*>(alpha))
                                               : *static_cast<const float*>(alpha),
                            compute == C_64F   ? *static_cast<const double*>(beta)
                            : compute == C_32I ? *static_cast<const int32_t*>(beta)
                            : compute == C_16F ? double(*static_cast<const __half*>(beta))
                                               : *static_cast<const float*>(beta)};
  const double alpha_of = factor[0], beta_of = factor[1];
  const bool tf32 = a_type == R_32F && (compute == C_FAST_TF32 || handle->math_mode & 3);
  const int code = emulate::submit(handle->stream, "cublas", [=] {
    for (int i = 0; i < batch; i++) {
      const Matrix x = {static_cast<const char*>(a) + i * stride_a * (long long)(size_of(a_type)), a_type, ta,
                        lda};
      const Matrix y = {static_cast<const char*>(b) + i * stride_b * (long long)(size_of(b_type)), b_type, tb,
                        ldb};
      void* const z = static_cast<char*>(c) + i * stride_c * (long long)(size_of(c_type));
      if (compute == C_64F) {
        product<double>(x, y, z, c_type, ldc, m, n, k, alpha_of, beta_of, false);
      } else if (compute == C_32I) {
        product<int32_t>(x, y, z, c_type, ldc, m, n, k, int32_t(alpha_of), int32_t(beta_of), false);
      } else {
        product<float>(x, y, z, c_type, ldc, m, n, k, float(alpha_of), float(beta_of), tf32);
      }
    }
  });
  return code ? EXECUTION_FAILED : SUCCESS;
}
API(cublasGemmEx, Handle* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a,
    int a_type, int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc,
    int compute, int algo) {
  return cublasGemmStridedBatchedEx(handle, op_a, op_b, m, n, k, alpha, a, a_type, lda, 0, b, b_type, ldb, 0,
                                    beta, c, c_type, ldc, 0, 1, compute, algo);
}
#define GEMM(LETTER, TYPE, COMPUTE)                                                                         \
  API(cublas##LETTER##gemm_v2, Handle* handle, int op_a, int op_b, int m, int n, int k, const void* alpha,  \
      const void* a, int lda, const void* b, int ldb, const void* beta, void* c, int ldc) {                 \
    return cublasGemmEx(handle, op_a, op_b, m, n, k, alpha, a, TYPE, lda, b, TYPE, ldb, beta, c, TYPE, ldc, \
                        COMPUTE, -1);                                                                       \
  }                                                                                                         \
  API(cublas##LETTER##gemmStridedBatched, Handle* handle, int op_a, int op_b, int m, int n, int k,          \
      const void* alpha, const void* a, int lda, long long stride_a, const void* b, int ldb,                \
      long long stride_b, const void* beta, void* c, int ldc, long long stride_c, int batch) {              \
    return cublasGemmStridedBatchedEx(handle, op_a, op_b, m, n, k, alpha, a, TYPE, lda, stride_a, b, TYPE,  \
                                      ldb, stride_b, beta, c, TYPE, ldc, stride_c, batch, COMPUTE, -1);     \
  }
GEMM(S, R_32F, C_32F)
GEMM(D, R_64F, C_64F)
extern "C" __attribute__((visibility("default"), alias("cublasHgemm_v2"))) int cublasHgemm(
    Handle*, int, int, int, int, int, const void*, const void*, int, const void*, int, const void*, void*,
    int);
GEMM(H, R_16F, C_16F)

API(cublasCreate_v2, Handle** handle) {
  *handle = new Handle;
  return SUCCESS;
}
API(cublasDestroy_v2, Handle* handle) {
  delete handle;
  return SUCCESS;
}
API(cublasSetStream_v2, Handle* handle, void* stream) {
  handle->stream = stream;
  return SUCCESS;
}
API(cublasGetStream_v2, Handle* handle, void** stream) {
  *stream = handle->stream;
  return SUCCESS;
}
API(cublasSetWorkspace_v2, Handle*, void*, size_t) { return SUCCESS; }
API(cublasSetMathMode, Handle* handle, int mode) {
  handle->math_mode = mode;
  return SUCCESS;
}
API(cublasGetMathMode, Handle* handle, int* mode) {
  *mode = handle->math_mode;
  return SUCCESS;
}
API(cublasSetPointerMode_v2, Handle* handle, int mode) {
  handle->pointer_mode = mode;
  return SUCCESS;
}
API(cublasGetPointerMode_v2, Handle* handle, int* mode) {
  *mode = handle->pointer_mode;
  return SUCCESS;
}
