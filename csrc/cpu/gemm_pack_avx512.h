// Packing for AVX-512: W rows of A, or columns of B, become a panel in which unit u of all W is contiguous.
//
// A Source reads one dtype as units of 32 bits: one number widened to fp32, or two of half precision, neighbours in k.
#pragma once

#include <cstdint>

#include "cpu/gemm_panel.h"
#include "cpu/x86_intrinsics.h"

namespace {

constexpr int kVector = 16;  // units

inline __mmask16 first_lanes(Size count) {
  return count >= kVector ? __mmask16(0xffff) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

inline __m512i widen_bf16(__m256i x) { return _mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
inline __m512i widen_f16(__m256i x) { return _mm512_castps_si512(_mm512_cvtph_ps(x)); }

struct F32Source {
  using Element = std::uint32_t;
  static constexpr int kUnit = 1;  // elements of k
  // 16 units of one panel index.
  static __m512i along_k(const Element* x, Size k_left) { return _mm512_maskz_loadu_epi32(first_lanes(k_left), x); }
  // One unit of 16 panel indices.
  static __m512i along_panel(const Element* x, Size, Size, __mmask16 mask) { return _mm512_maskz_loadu_epi32(mask, x); }
};

// A 16-bit format, widened to fp32.
template <__m512i (*kWiden)(__m256i)>
struct WidenedSource {
  using Element = std::uint16_t;
  static constexpr int kUnit = 1;
  static __m512i along_k(const Element* x, Size k_left) {
    return kWiden(_mm256_maskz_loadu_epi16(first_lanes(k_left), x));
  }
  static __m512i along_panel(const Element* x, Size, Size, __mmask16 mask) {
    return kWiden(_mm256_maskz_loadu_epi16(mask, x));
  }
};

// Pairs of a 16-bit format; the last pair of an odd k ends in a zero.
struct PairSource {
  using Element = std::uint16_t;
  static constexpr int kUnit = 2;
  static __m512i along_k(const Element* x, Size k_left) {
    const __mmask32 mask = k_left >= 32 ? ~__mmask32(0) : (__mmask32(1) << k_left) - 1;
    return _mm512_maskz_loadu_epi16(mask, x);
  }
  static __m512i along_panel(const Element* x, Size k_stride, Size k_left, __mmask16 mask) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x));
    if (k_left < 2) return low;
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x + k_stride));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
};

inline void transpose(__m512i (&x)[kVector]) {
  __m512i t[kVector];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    x[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    x[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    x[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    x[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    x[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    x[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// Writes units of 16 panel indices from `index`, a multiple of 16: a vector of one panel, or a half of each of two.
template <int W>
class PanelWriter {
  static_assert(W == 8 || W % kVector == 0);

 public:
  PanelWriter(float* out, Size units, Size index)
      : first_(out + index / W * panel_floats<W>(units) + index % W), second_(first_ + panel_floats<W>(units)) {}

  void store(Size unit, __m512i x) const {
    if constexpr (W == 8) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(first_ + unit * W), _mm512_castsi512_si256(x));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(second_ + unit * W), _mm512_extracti64x4_epi64(x, 1));
    } else {
      _mm512_storeu_si512(first_ + unit * W, x);
    }
  }

  // Units `unit` and `unit + 1`.
  void store_two(Size unit, __m512i x, __m512i y) const {
    if constexpr (W == 8) {
      _mm512_storeu_si512(first_ + unit * W, _mm512_shuffle_i64x2(x, y, 0x44));
      _mm512_storeu_si512(second_ + unit * W, _mm512_shuffle_i64x2(x, y, 0xee));
    } else {
      store(unit, x);
      store(unit + 1, y);
    }
  }

 private:
  float *first_, *second_;
};

// Neighbours in k are neighbours in memory.
template <int W, class Source>
void pack_along_k(const PackSource& s, Size units, float* out) {
  constexpr Size kStep = kVector * Source::kUnit, kAhead = 4 * kStep;
  const auto* data = reinterpret_cast<const typename Source::Element*>(s.data);
  for (Size p = 0; p < s.size; p += kVector) {
    const PanelWriter<W> writer(out, units, p);
    const auto* x = data + p * s.panel_stride;
    Size e = 0, unit = 0;
    for (; p + kVector <= s.size && e + kStep <= s.k; e += kStep, unit += kVector) {  // whole vectors: no masks
      __m512i v[kVector];
#pragma GCC unroll 16
      for (int i = 0; i < kVector; ++i) {
        v[i] = Source::along_k(x + i * s.panel_stride + e, kStep);
        __builtin_prefetch(x + i * s.panel_stride + e + kAhead);
        __builtin_prefetch(x + (i + kVector) * s.panel_stride + e);  // the rows after these, where k is short
      }
      transpose(v);
#pragma GCC unroll 8
      for (int i = 0; i < kVector; i += 2) writer.store_two(unit + i, v[i], v[i + 1]);
    }
    for (; e < s.k; e += kStep, unit += kVector) {
      __m512i v[kVector];
#pragma GCC unroll 16
      for (int i = 0; i < kVector; ++i)
        v[i] = p + i < s.size ? Source::along_k(x + i * s.panel_stride + e, s.k - e) : _mm512_setzero_si512();
      transpose(v);
      for (int i = 0; i < kVector && i * Source::kUnit < s.k - e; ++i) writer.store(unit + i, v[i]);
    }
  }
}

// Neighbours in the panel are neighbours in memory.
template <int W, class Source>
void pack_along_panel(const PackSource& s, Size units, float* out) {
  constexpr Size kStep = 2 * Source::kUnit, kAhead = 4 * kStep;
  const auto* x = reinterpret_cast<const typename Source::Element*>(s.data);
  for (Size e = 0, unit = 0; e < s.k; e += kStep, unit += 2, x += kStep * s.k_stride) {
    for (Size p = 0; p < s.size; p += kVector) {
      const PanelWriter<W> writer(out, units, p);
      const __mmask16 mask = first_lanes(s.size - p);
      for (int i = 0; i < kStep; ++i) __builtin_prefetch(x + (kAhead + i) * s.k_stride + p);
      const __m512i first = Source::along_panel(x + p, s.k_stride, s.k - e, mask);
      const Size k_left = s.k - e - Source::kUnit;
      if (k_left > 0)
        writer.store_two(unit, first, Source::along_panel(x + Source::kUnit * s.k_stride + p, s.k_stride, k_left, mask));
      else
        writer.store(unit, first);
    }
  }
}

// Any strides: 16 panel indices are first gathered side by side, a unit at a time.
template <int W, class Source>
void pack_strided(const PackSource& s, Size units, float* out) {
  using Element = typename Source::Element;
  const auto* data = reinterpret_cast<const Element*>(s.data);
  for (Size p = 0; p < s.size; p += kVector) {
    const PanelWriter<W> writer(out, units, p);
    for (Size e = 0, unit = 0; e < s.k; e += Source::kUnit, ++unit) {
      Element gathered[Source::kUnit][kVector] = {};
      for (Size u = 0; u < Source::kUnit && e + u < s.k; ++u)
        for (Size i = 0; i < kVector && p + i < s.size; ++i)
          gathered[u][i] = data[(p + i) * s.panel_stride + (e + u) * s.k_stride];
      writer.store(unit, Source::along_panel(gathered[0], kVector, s.k - e, first_lanes(kVector)));
    }
  }
}

template <int W, class Source>
void pack(const PackSource& s, Size units, float* out) {
  if (s.k_stride == 1)
    pack_along_k<W, Source>(s, units, out);
  else if (s.panel_stride == 1)
    pack_along_panel<W, Source>(s, units, out);
  else
    pack_strided<W, Source>(s, units, out);
}

}  // namespace
