// A register tile of C for AVX-512: 8 rows x 48 columns are 24 of the 32 registers, and need 11 loads for 24 multiply-adds.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/gemm_pack_avx512.h"
#include "cpu/x86_intrinsics.h"

namespace {

constexpr int kTileRows = 8, kTileVectors = 3, kTileCols = kTileVectors * kVector;

// To bf16, to nearest even; NaN stays NaN. The conversion of AVX512_BF16 would flush subnormals.
inline __m256i narrow_to_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i result = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16));
}

inline __m512 widen_from_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

template <class Arithmetic>
inline void store_pair(std::uint16_t* high, std::uint16_t* low, __mmask16 mask, __m512 x, bool add) {
  if (add) {
    x = _mm512_add_ps(x, widen_from_bf16(_mm256_maskz_loadu_epi16(mask, low)));
    x = _mm512_add_ps(x, widen_from_bf16(_mm256_maskz_loadu_epi16(mask, high)));
  }
  const __m256i top = Arithmetic::to_bf16(x);
  _mm256_mask_storeu_epi16(high, mask, top);
  _mm256_mask_storeu_epi16(low, mask, Arithmetic::to_bf16(_mm512_sub_ps(x, widen_from_bf16(top))));
}

// `store(offset, mask, x)` for each vector of the tile.
template <int R, int V, class Store>
inline __attribute__((always_inline)) void store_vectors(const Tile& t, const __m512 (&sum)[R][V], Store store) {
  const __mmask16 last = first_lanes(t.cols - kVector * (V - 1));
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < V; ++j) {
      const __mmask16 mask = j + 1 < V ? first_lanes(kVector) : last;
      __m512 x = sum[i][j];
      if (t.read) x = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, t.in + i * t.in_stride + kVector * j), x);
      store(i * t.out_stride + kVector * j, mask, x);
    }
  }
}

template <class Arithmetic, int R, int V>
inline void store_tile(const Tile& t, const __m512 (&sum)[R][V]) {
  auto* const narrow_out = static_cast<std::uint16_t*>(t.out);
  if (t.out_dtype == cpo::DType::kF32)
    store_vectors(t, sum, [&](Size at, __mmask16 mask, __m512 x) { _mm512_mask_storeu_ps(static_cast<float*>(t.out) + at, mask, x); });
  else if (t.low)
    store_vectors(t, sum, [&](Size at, __mmask16 mask, __m512 x) { store_pair<Arithmetic>(narrow_out + at, t.low + at, mask, x, t.add_pair); });
  else if (t.out_dtype == cpo::DType::kBF16 && !t.read)
    store_vectors(t, sum, [&](Size at, __mmask16 mask, __m512 x) {
      _mm256_mask_storeu_epi16(narrow_out + at, mask, Arithmetic::sum_to_bf16(x));
    });
  else if (t.out_dtype == cpo::DType::kBF16)
    store_vectors(t, sum, [&](Size at, __mmask16 mask, __m512 x) {
      _mm256_mask_storeu_epi16(narrow_out + at, mask, Arithmetic::to_bf16(x));
    });
  else
    store_vectors(t, sum, [&](Size at, __mmask16 mask, __m512 x) {
      _mm256_mask_storeu_epi16(narrow_out + at, mask, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    });
}

inline __m512 broadcast_unit(const char* x) {
  float unit;
  std::memcpy(&unit, x, sizeof unit);
  return _mm512_set1_ps(unit);
}

// R rows and V vectors of columns; the padding of a panel beyond them is neither read nor multiplied.
template <class Arithmetic, int R, int V>
void multiply_tile(const Tile& t) {
  constexpr Size kUnitsPerLine = 4;
  __m512 sum[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < V; ++j) sum[i][j] = _mm512_setzero_ps();
  }
  const char* a[R];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) a[i] = t.a + i * t.a_row;
  const float* b = t.b;
  Size at = 0;  // in the rows of A
  const auto multiply_unit = [&]() __attribute__((always_inline)) {
    __m512 right[V];
#pragma GCC unroll 3
    for (int j = 0; j < V; ++j) right[j] = _mm512_loadu_ps(b + kVector * j);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const __m512 left = broadcast_unit(a[i] + at);
#pragma GCC unroll 3
      for (int j = 0; j < V; ++j) sum[i][j] = Arithmetic::multiply_add(left, right[j], sum[i][j]);
    }
    at += t.a_unit;
    b += kTileCols;
  };
  // A line at a time: all at once they would take the buffers that lines of B wait in.
  Prefetch next = *t.next, written = t.written;
  Size u = 0;
  for (; u + kUnitsPerLine <= t.units; u += kUnitsPerLine) {
    next.fetch<0>();
    written.fetch<1>();
#pragma GCC unroll 4
    for (int i = 0; i < kUnitsPerLine; ++i) multiply_unit();
  }
  *t.next = next;
#pragma GCC unroll 4
  for (; u < t.units; ++u) multiply_unit();
  store_tile<Arithmetic>(t, sum);
}

// What the driver asks of an instruction set. Arithmetic supplies kUnit, is_unit, multiply_add, to_bf16, sum_to_bf16 and
// pack<W>.
template <class Arithmetic>
struct TileKernel : Arithmetic {
  static constexpr int kRows = kTileRows, kCols = kTileCols;
  static constexpr Size kColStep = 2 * kVector;  // of the split over threads: whole lines of bf16

  static void multiply(const Tile& t) { kFunctions[t.rows - 1][(t.cols - 1) / kVector](t); }

 private:
  using Function = void (*)(const Tile&);
  template <int R, int V>
  static constexpr Function kFunction = multiply_tile<Arithmetic, R, V>;
  static constexpr Function kFunctions[kTileRows][kTileVectors] = {
      {kFunction<1, 1>, kFunction<1, 2>, kFunction<1, 3>}, {kFunction<2, 1>, kFunction<2, 2>, kFunction<2, 3>},
      {kFunction<3, 1>, kFunction<3, 2>, kFunction<3, 3>}, {kFunction<4, 1>, kFunction<4, 2>, kFunction<4, 3>},
      {kFunction<5, 1>, kFunction<5, 2>, kFunction<5, 3>}, {kFunction<6, 1>, kFunction<6, 2>, kFunction<6, 3>},
      {kFunction<7, 1>, kFunction<7, 2>, kFunction<7, 3>}, {kFunction<8, 1>, kFunction<8, 2>, kFunction<8, 3>},
  };
};

}  // namespace
