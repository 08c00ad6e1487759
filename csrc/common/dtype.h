// Storage types of logits; arithmetic is always float32.
#pragma once

#include <cstdint>

namespace cpo {

struct bf16 {
  std::uint16_t bits;
};

struct f16 {
  std::uint16_t bits;
};

// The codes are part of the bindings: cpo_kernels/kernels/checks.py has them.
enum class DType : int { kF32 = 0, kBF16 = 1, kF16 = 2 };
constexpr int kNumDTypes = 3;

}  // namespace cpo
