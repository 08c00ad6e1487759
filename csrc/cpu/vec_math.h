// What the row kernels need beyond one instruction set's Vec. Included after a simd_*.h, into the same anonymous namespace, so
// that the linker never merges code of two instruction sets; for the same reason no std function is called here.
#pragma once

#include <math.h>
#include <stdint.h>

namespace {

constexpr int kPair = 2 * kLanes;

inline float first_lane(const Vec& a) {
  float lanes[kLanes];
  store(lanes, a);
  return lanes[0];
}

// Lanes added in double, in order.
inline double sum(const Vec& a, const Vec& b) {
  float lanes[kPair];
  store(lanes, a);
  store(lanes + kLanes, b);
  double total = 0.0;
  for (int i = 0; i < kPair; ++i) total += static_cast<double>(lanes[i]);
  return total;
}

// Relative error 4 ulp: an odd polynomial near 0, where 1 - 2 / (e^2u + 1) would cancel.
[[gnu::always_inline]] inline Vec tanh(const Vec& u) {
  const Vec size = abs(u);
  const Vec z = u * u;
  Vec p = fma(z, set1(-0x1.76ac1ap-8f), set1(0x1.5256d8p-6f));
  p = fma(z, p, set1(-0x1.b84448p-5f));
  p = fma(z, p, set1(0x1.110768p-3f));
  p = fma(z, p, set1(-0x1.555534p-2f));
  const Vec near = fma(u * z, p, u);
  const Vec e = exp(min(set1(40.0f), size + size));  // e^40: tanh is 1 in float32 long before
  const Vec far = copysign(set1(1.0f) - set1(2.0f) / (e + set1(1.0f)), u);
  return where_less(size, set1(0.625f), near, far);
}

// Asks for the memory that a loop over pairs will read soon; past the end of a row that is often the next row. The hardware's
// own prefetchers stop at 4 KiB pages; this makes reading float32 rows from memory a third faster.
template <class T>
inline void prefetch_ahead(const T* pair) {
  constexpr uintptr_t kAhead = 8192;
  constexpr uintptr_t kLine = 64;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pair) + kAhead;
  for (uintptr_t k = 0; k < kPair * sizeof(T); k += kLine) __builtin_prefetch(reinterpret_cast<const void*>(address + k));
}

template <class T>
T one();
template <>
inline float one<float>() {
  return 1.0f;
}
template <>
inline bf16 one<bf16>() {
  return {0x3f80};
}
template <>
inline f16 one<f16>() {
  return {0x3c00};
}

// The last n < kPair columns of a row, filled up with copies of the last one; `valid` is 1 for the real ones, in whatever
// lane order T has.
template <class T>
struct Tail {
  T x[kPair];
  T valid[kPair];
  float bias[kPair];

  Tail(const T* row, const float* row_bias, int n) {
    for (int i = 0; i < kPair; ++i) {
      const int j = i < n ? i : n - 1;
      x[i] = row[j];
      valid[i] = i < n ? one<T>() : T{};
      bias[i] = row_bias ? row_bias[j] : 0.0f;
    }
  }
};

}  // namespace
