#include "cpu/accumulate_pair.h"

#include <cstring>

namespace cpo {
namespace {

inline float widen(std::uint16_t x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen(float x) { return x; }

// Round to nearest even; NaN stays NaN.
inline std::uint16_t narrow(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>(x != x ? 0x7fc0u : rounded);
}

template <class Term>
void accumulate(std::uint16_t* high, std::uint16_t* low, const Term* term, std::int64_t n, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
  for (std::int64_t i = 0; i < n; ++i) {
    const float total = (widen(term[i]) + widen(low[i])) + widen(high[i]);
    const std::uint16_t top = narrow(total);
    high[i] = top;
    low[i] = narrow(total - widen(top));
  }
}

}  // namespace

void accumulate_pair(std::uint16_t* high, std::uint16_t* low, const void* term, bool term_is_bf16, std::int64_t n, int threads) {
  if (term_is_bf16) {
    accumulate(high, low, static_cast<const std::uint16_t*>(term), n, threads);
  } else {
    accumulate(high, low, static_cast<const float*>(term), n, threads);
  }
}

}  // namespace cpo
