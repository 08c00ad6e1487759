// Vec: 16 floats in AVX-512 (F, BW, DQ, VL); AVX512_BF16 where the file is compiled for it.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/exp_constants.h"
#include "cpu/x86_intrinsics.h"

namespace {

using cpo::bf16;
using cpo::f16;

constexpr int kLanes = 16;

struct Vec {
  __m512 v;
};

inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
// b where a or b is NaN, as the instructions do.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
// |magnitude| with the sign of `sign`.
inline Vec copysign(Vec magnitude, Vec sign) {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(_mm512_andnot_ps(bit, magnitude.v), _mm512_and_ps(bit, sign.v))};
}
// x < y ? a : b, b where x is NaN.
inline Vec where_less(Vec x, Vec y, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ), b.v, a.v)};
}
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }

// 2^(i/32), i = 0..31.
alignas(64) constexpr float kExp2Table[32] = {
    0x1.0p+0f, 0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f, 0x1.1d4874p+0f, 0x1.2387a6p+0f, 0x1.29e9ep+0f,
    0x1.306fep+0f, 0x1.371a74p+0f, 0x1.3dea64p+0f, 0x1.44e086p+0f, 0x1.4bfdaep+0f, 0x1.5342b6p+0f, 0x1.5ab07ep+0f, 0x1.6247ecp+0f,
    0x1.6a09e6p+0f, 0x1.71f75ep+0f, 0x1.7a1148p+0f, 0x1.82589ap+0f, 0x1.8ace54p+0f, 0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f,
    0x1.ae89fap+0f, 0x1.b7f77p+0f, 0x1.c199bep+0f, 0x1.cb720ep+0f, 0x1.d5818ep+0f, 0x1.dfc974p+0f, 0x1.ea4afap+0f, 0x1.f50766p+0f,
};

// e^d for d <= 88, 0 below ln(smallest normal), NaN for NaN. At most 2 ulp: |e^r - 1 - c1 r - c2 r^2| <= 2^-24.
inline Vec exp(Vec d) {
  const __m512 magic = _mm512_set1_ps(round_magic(32));
  const __m512 z = _mm512_fmadd_ps(d.v, _mm512_set1_ps(kLog2E), magic);
  const __m512 n = _mm512_sub_ps(z, magic);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2High), d.v);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2Low), r);
  // The permutation reads the low five bits of each index only.
  const __m512 t = _mm512_permutex2var_ps(_mm512_load_ps(kExp2Table), _mm512_castps_si512(z), _mm512_load_ps(kExp2Table + 16));
  const __m512 q = _mm512_mul_ps(r, _mm512_fmadd_ps(_mm512_set1_ps(0x1.0000a4p-1f), r, _mm512_set1_ps(0x1.0000f6p+0f)));
  const __mmask16 normal = _mm512_cmp_ps_mask(d.v, _mm512_set1_ps(kExpMin), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(normal, _mm512_fmadd_ps(t, q, t), n)};  // scalef rounds n down
}

// load2 and store2 move 2 * kLanes stored numbers; which lane holds which number is up to the storage type, and match2
// loads floats in the order of T.

inline void load2(const float* p, Vec& a, Vec& b) {
  a.v = _mm512_loadu_ps(p);
  b.v = _mm512_loadu_ps(p + 16);
}
inline void store2(float* p, Vec a, Vec b) {
  _mm512_storeu_ps(p, a.v);
  _mm512_storeu_ps(p + 16, b.v);
}
inline void match2(const float* p, Vec& a, Vec& b, float) { load2(p, a, b); }

// bf16: a has the numbers at even places and b those at odd places, which needs no shuffle to widen.
inline void load2(const bf16* p, Vec& a, Vec& b) {
  const __m512i raw = _mm512_loadu_si512(p);
  a.v = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
  b.v = _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

#if defined(__AVX512BF16__)
inline void store2(bf16* p, Vec a, Vec b) {
  const __m512i packed = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v));  // 16 of a, then 16 of b
  alignas(64) static constexpr std::uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                                8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), packed));
}
inline void store(bf16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
}
#else
// Rounds to the nearest bf16, ties to even, in the upper 16 bits of each lane.
inline __m512i round_upper(Vec a) {
  const __m512i x = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc00000));
}
inline void store2(bf16* p, Vec a, Vec b) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512i even = _mm512_srli_epi32(round_upper(a), 16);
  _mm512_storeu_si512(p, _mm512_or_si512(even, _mm512_and_si512(round_upper(b), upper)));
}
inline void store(bf16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_upper(a), 16)));
}
#endif
inline void match2(const float* p, Vec& a, Vec& b, bf16) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512 low = _mm512_loadu_ps(p);
  const __m512 high = _mm512_loadu_ps(p + 16);
  a.v = _mm512_permutex2var_ps(low, even, high);
  b.v = _mm512_permutex2var_ps(low, odd, high);
}

inline void load2(const f16* p, Vec& a, Vec& b) {
  a.v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  b.v = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
}
inline void store2(f16* p, Vec a, Vec b) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, kNearest));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), _mm512_cvtps_ph(b.v, kNearest));
}
inline void match2(const float* p, Vec& a, Vec& b, f16) { load2(p, a, b); }

}  // namespace
