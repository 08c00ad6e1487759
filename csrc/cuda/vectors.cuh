// Sixteen bytes of a row at a time: how numbers lie in them, and where the vectors of a row begin.
#pragma once

#include "common/dtype.h"
#include "cuda/simt.h"

namespace cpo {

constexpr int kVectorBytes = 16;

template <class T>
constexpr int kVectorSize = kVectorBytes / static_cast<int>(sizeof(T));

CPO_DEVICE float to_float(float x) { return x; }
CPO_DEVICE float to_float(bf16 x) { return simt::float_of_bits(static_cast<std::uint32_t>(x.bits) << 16); }
CPO_DEVICE float to_float(f16 x) { return simt::f16_to_float(x.bits); }

CPO_DEVICE void unpack(const simt::Words4& v, float (&x)[4], float) {
  CPO_UNROLL
  for (int k = 0; k < 4; ++k) x[k] = simt::float_of_bits(v.word[k]);
}

CPO_DEVICE void unpack(const simt::Words4& v, float (&x)[8], bf16) {
  CPO_UNROLL
  for (int k = 0; k < 4; ++k) {
    x[2 * k] = simt::float_of_bits(v.word[k] << 16);
    x[2 * k + 1] = simt::float_of_bits(v.word[k] & 0xffff0000u);
  }
}

CPO_DEVICE void unpack(const simt::Words4& v, float (&x)[8], f16) {
  CPO_UNROLL
  for (int k = 0; k < 4; ++k) {
    x[2 * k] = simt::f16_to_float(static_cast<std::uint16_t>(v.word[k] & 0xffffu));
    x[2 * k + 1] = simt::f16_to_float(static_cast<std::uint16_t>(v.word[k] >> 16));
  }
}

CPO_DEVICE std::uint32_t pack2(float low, float high, bf16) { return simt::pack_bf16(low, high); }
CPO_DEVICE std::uint32_t pack2(float low, float high, f16) { return simt::pack_f16(low, high); }

CPO_DEVICE void store_rounded(float* p, float x) { simt::store(p, x); }
template <class T>
CPO_DEVICE void store_rounded(T* p, float x) {
  simt::store(reinterpret_cast<std::uint16_t*>(p), static_cast<std::uint16_t>(pack2(x, 0.0f, T{})));
}

CPO_DEVICE void store_vector(float* p, const float (&x)[4]) {
  simt::Words4 v;
  CPO_UNROLL
  for (int k = 0; k < 4; ++k) v.word[k] = simt::bits_of_float(x[k]);
  simt::store(reinterpret_cast<simt::Words4*>(p), v);
}

template <class T>
CPO_DEVICE void store_vector(T* p, const float (&x)[8]) {
  simt::Words4 v;
  CPO_UNROLL
  for (int k = 0; k < 4; ++k) v.word[k] = pack2(x[2 * k], x[2 * k + 1], T{});
  simt::store(reinterpret_cast<simt::Words4*>(p), v);
}

// Half a vector: a narrow gradient of four float32 logits.
template <class T>
CPO_DEVICE void store_vector(T* p, const float (&x)[4]) {
  const simt::Words2 v = {{pack2(x[0], x[1], T{}), pack2(x[2], x[3], T{})}};
  simt::store(reinterpret_cast<simt::Words2*>(p), v);
}

template <class T, int K>
constexpr int kStoreBytes = K * static_cast<int>(sizeof(T));

template <class T>
CPO_DEVICE bool is_aligned(const T* p, int bytes) {
  return reinterpret_cast<std::uintptr_t>(p) % static_cast<unsigned>(bytes) == 0;
}

// K numbers to p, which is at a boundary of as many bytes or, where `aligned` is false, anywhere.
template <class T, int K>
CPO_DEVICE void store_columns(T* p, const float (&x)[K], bool aligned) {
  if (aligned) {
    store_vector(p, x);
  } else {
    CPO_UNROLL
    for (int k = 0; k < K; ++k) store_rounded(p + k, x[k]);
  }
}

// A row from its first 16-byte boundary on: `vectors` whole vectors from column `lead`, then fewer columns than a vector has.
struct Span {
  int lead;
  int vectors;
  int tail;  // first column after the vectors
};

template <class T>
CPO_DEVICE Span find_span(const T* row, int vocab) {
  constexpr int K = kVectorSize<T>;
  const unsigned past = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(row) % kVectorBytes);
  const int to_boundary = static_cast<int>((kVectorBytes - past) % kVectorBytes / sizeof(T));
  const int lead = to_boundary < vocab ? to_boundary : vocab;
  const int vectors = (vocab - lead) / K;
  return {lead, vectors, lead + vectors * K};
}

}  // namespace cpo
