// Halves, bfloat16 and the 8-bit floats of CUDA's headers, by way of float: a sum, product or quotient of two
// that is rounded to float first comes out as if rounded once.
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

namespace emulate {

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
// To float so that a second rounding does no harm: an inexact one gets an odd last bit.
inline float odd_float(double x) {
  float f = float(x);
  if (double(f) == x || x != x || isinf(f)) return f;
  uint32_t bits = bits_as<uint32_t>(f);
  if (fabs(double(f)) > fabs(x)) bits--;
  return bits_as<float>(bits | 1);
}
inline uint16_t half_bits(float x) { return x != x ? 0x7fff : uint16_t(_cvtss_sh(x, 0)); }
inline float half_float(uint16_t bits) { return _cvtsh_ss(bits); }
inline uint16_t brain_bits(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  return x != x ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float brain_float(uint16_t bits) { return bits_as<float>(uint32_t(bits) << 16); }

template <typename T>
using if_number = std::enable_if_t<std::is_arithmetic_v<T>>;

}  // namespace emulate

#define EMULATE_NUMBER(H, BITS, FLOAT)                                                                   \
  struct H {                                                                                             \
    uint16_t bits;                                                                                       \
    H() = default;                                                                                       \
    template <typename T, typename = emulate::if_number<T>>                                              \
    H(T x) : bits(emulate::BITS(std::is_same_v<T, float> ? float(x) : emulate::odd_float(double(x)))) {} \
    operator float() const { return emulate::FLOAT(bits); }                                              \
    float f() const { return emulate::FLOAT(bits); }                                                     \
    friend H operator+(H a, H b) { return a.f() + b.f(); }                                               \
    friend H operator-(H a, H b) { return a.f() - b.f(); }                                               \
    friend H operator*(H a, H b) { return a.f() * b.f(); }                                               \
    friend H operator/(H a, H b) { return a.f() / b.f(); }                                               \
    friend H operator-(H a) { return -a.f(); }                                                           \
    friend H& operator+=(H& a, H b) { return a = a + b; }                                                \
    friend H& operator-=(H& a, H b) { return a = a - b; }                                                \
    friend H& operator*=(H& a, H b) { return a = a * b; }                                                \
    friend H& operator/=(H& a, H b) { return a = a / b; }                                                \
    friend bool operator==(H a, H b) { return a.f() == b.f(); }                                          \
    friend bool operator!=(H a, H b) { return a.f() != b.f(); }                                          \
    friend bool operator<(H a, H b) { return a.f() < b.f(); }                                            \
    friend bool operator<=(H a, H b) { return a.f() <= b.f(); }                                          \
    friend bool operator>(H a, H b) { return a.f() > b.f(); }                                            \
    friend bool operator>=(H a, H b) { return a.f() >= b.f(); }                                          \
  };                                                                                                     \
  struct alignas(4) H##2 { H x, y; };                                                                    \
  inline H hsqrt(H a) { return sqrtf(a); }                                                               \
  inline H hexp(H a) { return expf(a); }                                                                 \
  inline H hlog(H a) { return logf(a); }                                                                 \
  inline H hsin(H a) { return sinf(a); }                                                                 \
  inline H hcos(H a) { return cosf(a); }                                                                 \
  inline H __habs(H a) { return fabsf(a); }                                                              \
  inline bool __hisnan(H a) { return isnan(a.f()); }                                                     \
  inline H __hmax(H a, H b) { return fmaxf(a, b); }                                                      \
  inline H __hmin(H a, H b) { return fminf(a, b); }                                                      \
  inline H __hmax_nan(H a, H b) { return __hisnan(a) || __hisnan(b) ? H(NAN) : __hmax(a, b); }           \
  inline H __hmin_nan(H a, H b) { return __hisnan(a) || __hisnan(b) ? H(NAN) : __hmin(a, b); }           \
  inline H __hfma(H a, H b, H c) { return H(double(a.f()) * double(b.f()) + double(c.f())); }            \
  inline H##2 __hadd2(H##2 a, H##2 b) { return {a.x + b.x, a.y + b.y}; }                                 \
  inline H##2 __hmul2(H##2 a, H##2 b) { return {a.x * b.x, a.y * b.y}; }

EMULATE_NUMBER(__half, half_bits, half_float)
EMULATE_NUMBER(__nv_bfloat16, brain_bits, brain_float)
#undef EMULATE_NUMBER
typedef __half half;
typedef __half2 half2;

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) {
  __half x;
  x.bits = bits;
  return x;
}
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }

// 4 bits of exponent and 3 of mantissa, no infinity; what is too large becomes the largest.
enum { __NV_E4M3 };
inline __half __nv_cvt_fp8_to_halfraw(unsigned char bits, int) {
  const int e = bits >> 3 & 15, m = bits & 7;
  const float size = e == 15 && m == 7 ? NAN : e ? ldexpf(float(8 + m), e - 10) : ldexpf(float(m), -9);
  return bits & 128 ? -size : size;
}
struct __nv_fp8_e4m3 {
  unsigned char __x;
  __nv_fp8_e4m3() = default;
  template <typename T, typename = std::enable_if_t<std::is_convertible_v<T, float>>>
  __nv_fp8_e4m3(T from) {
    const float x = float(from), size = fabsf(x);
    __x = signbit(x) ? 128 : 0;
    if (x != x) {
      __x |= 127;
    } else if (size >= 448.0f) {
      __x |= 126;
    } else {
      // In steps of the exponent's last place, ties to even.
      const int e = size < 0x1p-6f ? -6 : ilogbf(size), m = int(rintf(ldexpf(size, 3 - e)));
      __x |= (unsigned char)(m + 8 * (e + 6));
    }
  }
};
