// How often codes turn, followed on the device (src/train/oscillation.rs); the arithmetic of an entry is in
// arith/oscillation.h.
//
//     oscillation_codes       a step's codes onto last, direction, ema and total of each weight, and per block the sums
//                             of ema, of ema > above and of the codes that changed
//     oscillation_gradient    a step's gradient onto the sign of the last one, and whether it turned
//
// Codes are whole floats from -128 to 127. A block strides over the entries, whose number alone says how many blocks
// there are, so that sums do not depend on the card.
//
// Bytes moved of an entry: codes 20, gradients 4 and those of g.
//
//     threads 256; blocks: the least of 256 and count / 1024, rounded up; figures [blocks, 3] f64

#include "arith/oscillation.h"
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
    oscillation_codes(const float* codes, int8_t* last, int8_t* direction, float* ema, uint32_t* total,
                      double* figures, int64_t count, float momentum, float rest, float above) {
  __shared__ double scratch[WARP];
  double sums[3] = {0.0, 0.0, 0.0};
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    int changed;
    const Turns before = {last[i], direction[i], ema[i], total[i]};
    const Turns after = turns_after(before, int8_t(codes[i]), momentum, rest, &changed);
    last[i] = after.last;
    direction[i] = after.direction;
    ema[i] = after.ema;
    total[i] = after.total;
    sums[0] += double(after.ema);
    sums[1] += after.ema > above ? 1.0 : 0.0;
    sums[2] += double(changed);
  }
#pragma unroll
  for (int i = 0; i < 3; i++) {
    const double sum = block_sum(sums[i], scratch);
    if (threadIdx.x == 0) figures[int64_t(blockIdx.x) * 3 + i] = sum;
  }
}

template <typename T>
__device__ __forceinline__ void gradient(const T* g, int8_t* sign, int8_t* turned, int64_t count) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    sign[i] = sign_after(sign[i], to_float(g[i]), turned + i);
  }
}

#define KERNELS(suffix, T)                                                                   \
  extern "C" __global__ void __launch_bounds__(256)                                          \
      oscillation_gradient_##suffix(const T* g, int8_t* sign, int8_t* turned, int64_t count) { \
    gradient(g, sign, turned, count);                                                        \
  }

FOR_EACH_TYPE(KERNELS)
