// Vec: 8 floats in portable C++; loops over the lanes, which a compiler may turn into its baseline's vectors.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "cpu/exp_constants.h"

namespace {

using cpo::bf16;
using cpo::f16;

constexpr int kLanes = 8;

struct Vec {
  float v[kLanes];
};

inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <class F>
inline Vec lanes(F f) {
  Vec out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = f(i);
  return out;
}

inline float multiply_add(float a, float b, float c) {
#if defined(__FP_FAST_FMAF)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline Vec set1(float x) {
  return lanes([=](int) { return x; });
}
inline void store(float* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] = a.v[i];
}
inline Vec operator+(const Vec& a, const Vec& b) {
  return lanes([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(const Vec& a, const Vec& b) {
  return lanes([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(const Vec& a, const Vec& b) {
  return lanes([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(const Vec& a, const Vec& b) {
  return lanes([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
  return lanes([&](int i) { return multiply_add(a.v[i], b.v[i], c.v[i]); });
}
inline Vec abs(const Vec& a) {
  return lanes([&](int i) { return float_of(bits_of(a.v[i]) & 0x7fffffffu); });
}
// b where a or b is NaN.
inline Vec max(const Vec& a, const Vec& b) {
  return lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec min(const Vec& a, const Vec& b) {
  return lanes([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
// |magnitude| with the sign of `sign`.
inline Vec copysign(const Vec& magnitude, const Vec& sign) {
  return lanes([&](int i) {
    return float_of((bits_of(magnitude.v[i]) & 0x7fffffffu) | (bits_of(sign.v[i]) & 0x80000000u));
  });
}
// x < y ? a : b, b where x is NaN.
inline Vec where_less(const Vec& x, const Vec& y, const Vec& a, const Vec& b) {
  return lanes([&](int i) { return x.v[i] < y.v[i] ? a.v[i] : b.v[i]; });
}
inline float reduce_max(const Vec& a) {
  float most = a.v[0];
  for (int i = 1; i < kLanes; ++i) most = a.v[i] > most ? a.v[i] : most;
  return most;
}

// e^d for d <= 88, 0 below ln(smallest normal), NaN for NaN. At most 2 ulp: degree 6, within 2^-28.
inline Vec exp(const Vec& d) {
  return lanes([&](int i) {
    constexpr float magic = round_magic(1);
    const float z = multiply_add(d.v[i], kLog2E, magic);
    const float n = z - magic;
    const float r = multiply_add(n, -kLn2Low, multiply_add(n, -kLn2High, d.v[i]));
    float q = multiply_add(0x1.6dcf16p-10f, r, 0x1.126ed2p-7f);
    q = multiply_add(q, r, 0x1.555432p-5f);
    q = multiply_add(q, r, 0x1.555406p-3f);
    q = multiply_add(q, r, 0.5f);
    q = r * multiply_add(q, r, 1.0f);
    const float t = float_of(0x3f800000u + (bits_of(z) << 23));  // 2^n
    return d.v[i] < kExpMin ? 0.0f : multiply_add(t, q, t);
  });
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return float_of(static_cast<std::uint32_t>(x.bits) << 16); }
inline float widen(f16 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinity, NaN
  // The half's exponent and mantissa, read as a float 2^112 times too small; exact for subnormal halves too.
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p+112f));
}

inline void narrow(float x, float& out) { out = x; }
inline void narrow(float x, bf16& out) {
  const std::uint32_t u = bits_of(x);
  out.bits = static_cast<std::uint16_t>(x != x ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
inline void narrow(float x, f16& out) {
  const std::uint32_t u = bits_of(x);
  const std::uint32_t sign = (u >> 16) & 0x8000u;
  const std::uint32_t rest = u & 0x7fffffffu;
  std::uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (rest >= 0x477ff000u) {
    half = 0x7c00u;  // rounds to infinity
  } else if (rest < 0x38800000u) {
    half = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;  // subnormal: the float adder rounds to multiples of 2^-24
  } else {
    half = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<std::uint16_t>(sign | half);
}

template <class T>
inline void load2(const T* p, Vec& a, Vec& b) {
  a = lanes([=](int i) { return widen(p[i]); });
  b = lanes([=](int i) { return widen(p[kLanes + i]); });
}
template <class T>
inline void store2(T* p, const Vec& a, const Vec& b) {
  for (int i = 0; i < kLanes; ++i) narrow(a.v[i], p[i]);
  for (int i = 0; i < kLanes; ++i) narrow(b.v[i], p[kLanes + i]);
}
// Floats in the lane order of T.
template <class T>
inline void match2(const float* p, Vec& a, Vec& b, T) {
  load2(p, a, b);
}

}  // namespace
