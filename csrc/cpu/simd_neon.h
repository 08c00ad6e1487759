// Vec: 4 floats in NEON. Only what Armv8-A began with and every 64-bit ARM processor runs: 16-bit floats are converted, not
// computed with.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "common/dtype.h"
#include "cpu/exp_constants.h"

namespace {

using cpo::bf16;
using cpo::f16;

constexpr int kLanes = 4;

struct Vec {
  float32x4_t v;
};

inline Vec set1(float x) { return {vdupq_n_f32(x)}; }
inline void store(float* p, Vec a) { vst1q_f32(p, a.v); }
inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline Vec abs(Vec a) { return {vabsq_f32(a.v)}; }
// b where a or b is NaN; NEON's own maximum and minimum would be NaN.
inline Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
// |magnitude| with the sign of `sign`.
inline Vec copysign(Vec magnitude, Vec sign) { return {vbslq_f32(vdupq_n_u32(0x80000000u), sign.v, magnitude.v)}; }
// x < y ? a : b, b where x is NaN.
inline Vec where_less(Vec x, Vec y, Vec a, Vec b) { return {vbslq_f32(vcltq_f32(x.v, y.v), a.v, b.v)}; }
// Of lanes that are not NaN.
inline float reduce_max(Vec a) { return vmaxvq_f32(a.v); }

// e^d for d <= 88, 0 below ln(smallest normal), NaN for NaN. At most 2 ulp: the portable code's polynomial of degree 6, within
// 2^-28. A table of powers of two, as AVX2 has, would take as many instructions.
// Always inlined: GCC would call it, and load its constants again every time.
[[gnu::always_inline]] inline Vec exp(Vec d) {
  const float32x4_t magic = vdupq_n_f32(round_magic(1));
  const float32x4_t z = vfmaq_f32(magic, d.v, vdupq_n_f32(kLog2E));
  const float32x4_t n = vsubq_f32(z, magic);
  const float32x4_t r = vfmsq_f32(vfmsq_f32(d.v, n, vdupq_n_f32(kLn2High)), n, vdupq_n_f32(kLn2Low));
  float32x4_t q = vfmaq_f32(vdupq_n_f32(0x1.126ed2p-7f), vdupq_n_f32(0x1.6dcf16p-10f), r);
  q = vfmaq_f32(vdupq_n_f32(0x1.555432p-5f), q, r);
  q = vfmaq_f32(vdupq_n_f32(0x1.555406p-3f), q, r);
  q = vfmaq_f32(vdupq_n_f32(0.5f), q, r);
  q = vmulq_f32(r, vfmaq_f32(vdupq_n_f32(1.0f), q, r));
  const uint32x4_t exponent = vshlq_n_u32(vreinterpretq_u32_f32(z), 23);
  const float32x4_t t = vreinterpretq_f32_u32(vaddq_u32(exponent, vdupq_n_u32(0x3f800000u)));  // 2^n
  const uint32x4_t tiny = vcltq_f32(d.v, vdupq_n_f32(kExpMin));
  return {vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(vfmaq_f32(t, q, t)), tiny))};
}

// load2 and store2 move 2 * kLanes stored numbers in their order, and match2 loads floats in the order of T, which is the same.

inline void load2(const float* p, Vec& a, Vec& b) {
  a.v = vld1q_f32(p);
  b.v = vld1q_f32(p + 4);
}
inline void store2(float* p, Vec a, Vec b) {
  vst1q_f32(p, a.v);
  vst1q_f32(p + 4, b.v);
}

inline void load2(const bf16* p, Vec& a, Vec& b) {
  const uint16x8_t raw = vld1q_u16(&p->bits);
  a.v = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(raw), 16));
  b.v = vreinterpretq_f32_u32(vshll_high_n_u16(raw, 16));
}
// The bits of a, and those of bf16's NaN for any NaN: rounding could carry a NaN's own bits into the sign.
inline uint32x4_t bits_to_round(Vec a) {
  return vbslq_u32(vceqq_f32(a.v, a.v), vreinterpretq_u32_f32(a.v), vdupq_n_u32(0x7fc00000u));
}
// Added to the bits of a float32, this makes the upper 16 of them the nearest bf16, ties to even.
inline uint32x4_t rounding_of(uint32x4_t bits) {
  return vaddq_u32(vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1)), vdupq_n_u32(0x7fff));
}
inline void store2(bf16* p, Vec a, Vec b) {
  const uint32x4_t low = bits_to_round(a), high = bits_to_round(b);
  vst1q_u16(&p->bits, vaddhn_high_u32(vaddhn_u32(low, rounding_of(low)), high, rounding_of(high)));
}

inline void load2(const f16* p, Vec& a, Vec& b) {
  const float16x8_t raw = vreinterpretq_f16_u16(vld1q_u16(&p->bits));
  a.v = vcvt_f32_f16(vget_low_f16(raw));
  b.v = vcvt_high_f32_f16(raw);
}
inline void store2(f16* p, Vec a, Vec b) {
  vst1q_u16(&p->bits, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(a.v), b.v)));
}

template <class T>
inline void match2(const float* p, Vec& a, Vec& b, T) {
  load2(p, a, b);
}

}  // namespace
