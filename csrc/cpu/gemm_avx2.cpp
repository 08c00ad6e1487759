// setup.py compiles this file for the instruction set in its name. Products in fp32, in tiles of 6 rows x 16 columns; half
// precision, for which torch has no vectorised product without AVX-512, is widened when packed.
#include <cstring>

#include "cpu/row_args.h"
#include "cpu/simd_avx2.h"

// Written in terms of the Vec above, so the order matters.
#include "cpu/vec_math.h"

#include "cpu/row_transform.h"

#include "cpu/row_backward.h"
#include "cpu/row_forward.h"

#include "cpu/softmax_rows.h"

#include "cpu/gemm_driver.h"
#include "cpu/x86_intrinsics.h"

namespace {

constexpr int kTileRows = 6, kTileCols = 2 * kLanes;

// ---- packing ----

struct F32Source {
  using Element = float;
  static float one(const float* x) { return *x; }
  static __m256 eight(const float* x) { return _mm256_loadu_ps(x); }
};

struct Bf16Source {
  using Element = std::uint16_t;
  static float one(const std::uint16_t* x) {
    const std::uint32_t bits = std::uint32_t(*x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  static __m256 eight(const std::uint16_t* x) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
};

struct F16Source {
  using Element = std::uint16_t;
  static float one(const std::uint16_t* x) { return _cvtsh_ss(*x); }
  static __m256 eight(const std::uint16_t* x) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }
};

// One panel of W, the first of `size` that are left; what is missing becomes zeros.
template <int W, class Source>
void pack_panel(const typename Source::Element* x, const PackSource& s, Size size, float* out) {
  Size e = 0;
  if (size >= W && s.k_stride == 1) {
    for (; e + kLanes <= s.k; e += kLanes, out += W * kLanes) {
      float rows[W][kLanes];
      for (int i = 0; i < W; ++i) {
        _mm256_storeu_ps(rows[i], Source::eight(x + i * s.panel_stride + e));
        __builtin_prefetch(x + i * s.panel_stride + e + 8 * kLanes);
      }
      for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < W; ++i) out[lane * W + i] = rows[i][lane];
    }
  } else if (size >= round_up(W, kLanes) && s.panel_stride == 1) {
    // Lanes beyond W are overwritten by the next unit, or lie in the line between panels.
    for (; e < s.k; ++e, out += W) {
      __builtin_prefetch(x + (e + 8) * s.k_stride);
      for (int i = 0; i < W; i += kLanes) _mm256_storeu_ps(out + i, Source::eight(x + e * s.k_stride + i));
    }
  }
  for (; e < s.k; ++e, out += W)
    for (int i = 0; i < W; ++i) out[i] = i < size ? Source::one(x + i * s.panel_stride + e * s.k_stride) : 0.0f;
}

template <int W, class Source>
void pack_panels(const PackSource& s, Size units, float* out) {
  const auto* x = reinterpret_cast<const typename Source::Element*>(s.data);
  for (Size p = 0; p < s.size; p += W, out += panel_floats<W>(units))
    pack_panel<W, Source>(x + p * s.panel_stride, s, s.size - p, out);
}

// ---- tiles ----

// To nearest even; NaN stays NaN.
inline __m128i narrow_to_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

inline __m128i narrow(__m256 x, cpo::DType dtype) {
  return dtype == cpo::DType::kBF16 ? narrow_to_bf16(x) : _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
}

inline void store_pair(std::uint16_t* high, std::uint16_t* low, Size values, __m256 x, bool add) {
  alignas(16) std::uint16_t top[kLanes] = {}, rest[kLanes] = {};
  if (add) {
    std::memcpy(top, high, values * sizeof *high);
    std::memcpy(rest, low, values * sizeof *low);
    x = _mm256_add_ps(_mm256_add_ps(x, Bf16Source::eight(rest)), Bf16Source::eight(top));
  }
  _mm_store_si128(reinterpret_cast<__m128i*>(top), narrow_to_bf16(x));
  _mm_store_si128(reinterpret_cast<__m128i*>(rest), narrow_to_bf16(_mm256_sub_ps(x, Bf16Source::eight(top))));
  std::memcpy(high, top, values * sizeof *high);
  std::memcpy(low, rest, values * sizeof *low);
}

// Eight columns of a row, of which `count` are inside C: partial vectors go through a buffer.
inline void store_eight(const Tile& t, Size row, Size col, Size count, __m256 x) {
  const Size values = count < kLanes ? count : kLanes, bytes = bytes_of(t.out_dtype);
  char* const out = static_cast<char*>(t.out) + (row * t.out_stride + col) * bytes;
  const float* const in = t.in + row * t.in_stride + col;
  alignas(32) float buffer[kLanes] = {};
  if (t.read) {
    if (values < kLanes) std::memcpy(buffer, in, values * sizeof(float));
    x = _mm256_add_ps(values < kLanes ? _mm256_load_ps(buffer) : _mm256_loadu_ps(in), x);
  }
  if (t.low) {
    store_pair(reinterpret_cast<std::uint16_t*>(out), t.low + row * t.out_stride + col, values, x, t.add_pair);
    return;
  }
  if (t.out_dtype == cpo::DType::kF32)
    _mm256_store_ps(buffer, x);
  else
    _mm_store_si128(reinterpret_cast<__m128i*>(buffer), narrow(x, t.out_dtype));
  std::memcpy(out, buffer, values * bytes);
}

struct Avx2Kernel {
  static constexpr int kUnit = 1, kRows = kTileRows, kCols = kTileCols, kColStep = kTileCols;

  static bool is_unit(cpo::DType) { return false; }

  template <int W>
  static void pack(cpo::DType dtype, const PackSource& source, Size units, float* out) {
    switch (dtype) {
      case cpo::DType::kF32: return pack_panels<W, F32Source>(source, units, out);
      case cpo::DType::kBF16: return pack_panels<W, Bf16Source>(source, units, out);
      case cpo::DType::kF16: return pack_panels<W, F16Source>(source, units, out);
    }
  }

  static void multiply(const Tile& t) {
    __m256 sum[kTileRows][2];
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) {
      sum[i][0] = sum[i][1] = _mm256_setzero_ps();
    }
    const float *a = reinterpret_cast<const float*>(t.a), *b = t.b;
    Prefetch next = *t.next, written = t.written;
    for (Size u = 0; u < t.units; ++u, a += kTileRows, b += kTileCols) {
      if (u % 8 == 0) {
        next.fetch<0>();
        written.fetch<1>();
      }
      const __m256 right[2] = {_mm256_loadu_ps(b), _mm256_loadu_ps(b + kLanes)};
#pragma GCC unroll 6
      for (int i = 0; i < kTileRows; ++i) {
        const __m256 left = _mm256_broadcast_ss(a + i);
        sum[i][0] = _mm256_fmadd_ps(left, right[0], sum[i][0]);
        sum[i][1] = _mm256_fmadd_ps(left, right[1], sum[i][1]);
      }
    }
    *t.next = next;
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) {
      if (i >= t.rows) break;
      store_eight(t, i, 0, t.cols, sum[i][0]);
      if (t.cols > kLanes) store_eight(t, i, kLanes, t.cols - kLanes, sum[i][1]);
    }
  }
};

}  // namespace

namespace cpo {

extern const GemmKernel kGemmAvx2 = {workspace_bytes<Avx2Kernel>, run<Avx2Kernel>, shares<Avx2Kernel>, &kSoftmaxKernels};

}  // namespace cpo
