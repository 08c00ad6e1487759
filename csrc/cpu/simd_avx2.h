// Vec: 8 floats in AVX2 with FMA and F16C.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/exp_constants.h"
#include "cpu/x86_intrinsics.h"

namespace {

using cpo::bf16;
using cpo::f16;

constexpr int kLanes = 8;

struct Vec {
  __m256 v;
};

inline Vec set1(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
// b where a or b is NaN, as the instructions do.
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
// |magnitude| with the sign of `sign`.
inline Vec copysign(Vec magnitude, Vec sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, magnitude.v), _mm256_and_ps(bit, sign.v))};
}
// x < y ? a : b, b where x is NaN.
inline Vec where_less(Vec x, Vec y, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, y.v, _CMP_LT_OQ))};
}
inline float reduce_max(Vec a) {
  float lanes[kLanes];
  store(lanes, a);
  float most = lanes[0];
  for (int i = 1; i < kLanes; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}
inline float reduce_add(Vec a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// The bits of 2^(i/8) less i << 20, which the shifted step count adds again.
alignas(32) constexpr std::int32_t kExp2Table[8] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                                    0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};

// e^d for d <= 88, 0 below ln(smallest normal), NaN for NaN. At most 2 ulp: the cubic is within 2^-25.
inline Vec exp(Vec d) {
  const __m256 magic = _mm256_set1_ps(round_magic(8));
  const __m256 z = _mm256_fmadd_ps(d.v, _mm256_set1_ps(kLog2E), magic);
  const __m256 n = _mm256_sub_ps(z, magic);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2High), d.v);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2Low), r);
  const __m256i steps = _mm256_castps_si256(z);
  // The permutation reads the low three bits of each index only; the shift moves the whole part into the exponent.
  const __m256i fraction = _mm256_permutevar8x32_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(kExp2Table)), steps);
  const __m256 t = _mm256_castsi256_ps(_mm256_add_epi32(fraction, _mm256_slli_epi32(steps, 20)));
  __m256 q = _mm256_fmadd_ps(_mm256_set1_ps(0x1.5560eep-3f), r, _mm256_set1_ps(0x1.00087ep-1f));
  q = _mm256_mul_ps(r, _mm256_fmadd_ps(q, r, _mm256_set1_ps(1.0f)));
  const __m256 normal = _mm256_cmp_ps(d.v, _mm256_set1_ps(kExpMin), _CMP_NLT_UQ);
  return {_mm256_and_ps(normal, _mm256_fmadd_ps(t, q, t))};
}

// load2 and store2 move 2 * kLanes stored numbers; which lane holds which number is up to the storage type, and match2
// loads floats in the order of T.

inline void load2(const float* p, Vec& a, Vec& b) {
  a.v = _mm256_loadu_ps(p);
  b.v = _mm256_loadu_ps(p + 8);
}
inline void store2(float* p, Vec a, Vec b) {
  _mm256_storeu_ps(p, a.v);
  _mm256_storeu_ps(p + 8, b.v);
}
inline void match2(const float* p, Vec& a, Vec& b, float) { load2(p, a, b); }

// bf16: a has the numbers at even places and b those at odd places, which needs no shuffle to widen.
inline void load2(const bf16* p, Vec& a, Vec& b) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  a.v = _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16));
  b.v = _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
// Rounds to the nearest bf16, ties to even, in the upper 16 bits of each lane.
inline __m256i round_upper(Vec a) {
  const __m256i x = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
}
inline void store2(bf16* p, Vec a, Vec b) {
  const __m256i even = _mm256_srli_epi32(round_upper(a), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(even, round_upper(b), 0xaa));
}
inline void store(bf16* p, Vec a) {
  const __m256i high = _mm256_srli_epi32(round_upper(a), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline void match2(const float* p, Vec& a, Vec& b, bf16) {
  const __m256 low = _mm256_loadu_ps(p);
  const __m256 high = _mm256_loadu_ps(p + 8);
  // shuffle works within 128-bit halves; the permutation puts the four pairs in order.
  const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0x88));
  const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0xdd));
  a.v = _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8));
  b.v = _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8));
}

inline void load2(const f16* p, Vec& a, Vec& b) {
  a.v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  b.v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
}
inline void store2(f16* p, Vec a, Vec b) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, kNearest));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(b.v, kNearest));
}
inline void match2(const float* p, Vec& a, Vec& b, f16) { load2(p, a, b); }

}  // namespace
