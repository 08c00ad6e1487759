// What one instruction set must do whatever the others do: conversions exactly, functions within their stated errors.
#pragma once

#include "policy.h"
#include "results.h"

namespace vectors {

// Rows of one column each, whose maximum is the number itself or cap * tanh of it.
inline std::vector<float> through_forward(cpo::Isa isa, DType dtype, const std::vector<std::uint8_t>& stored,
                                          cpo::LogitTransform transform) {
  const std::int64_t rows = static_cast<std::int64_t>(stored.size()) / size_of(dtype);
  const std::vector<std::int64_t> targets(static_cast<std::size_t>(rows), 0);
  std::vector<float> max(targets.size()), logsum(targets.size()), logps(targets.size());
  const cpo::RowBatch batch{stored.data(), rows, 1, 1, targets.data(), nullptr, rows, nullptr};
  cpo::row_forward(isa, dtype, {batch, transform, max.data(), logsum.data(), logps.data()}, kThreads);
  return max;
}

// factor * e^x for each x, as a gradient of this dtype: that of other columns at a maximum of 0, a log-sum of 0, a coef of -factor.
inline std::vector<std::uint8_t> through_backward(cpo::Isa isa, const std::vector<float>& x, float factor, DType out_dtype) {
  std::vector<float> logits{0.0f};
  logits.insert(logits.end(), x.begin(), x.end());
  const std::int64_t target = 0, vocab = static_cast<std::int64_t>(logits.size());
  const float zero = 0.0f, coef = -factor;
  float coef_sum = 0.0f, token_grad = 0.0f;
  std::vector<std::uint8_t> out(logits.size() * static_cast<std::size_t>(size_of(out_dtype)));
  const cpo::RowBatch batch{logits.data(), 1, vocab, vocab, &target, nullptr, 1, nullptr};
  const cpo::BackwardArgs args{batch, {1.0f, 0.0f, 1.0f}, &zero, &zero, &coef, &coef_sum, &token_grad, out.data(), vocab};
  cpo::row_backward(isa, DType::kF32, out_dtype, args, &coef_sum, kThreads);
  return {out.begin() + size_of(out_dtype), out.end()};
}

inline std::vector<std::uint8_t> bytes_of(const std::vector<float>& x) {
  std::vector<std::uint8_t> bytes(x.size() * sizeof(float));
  std::memcpy(bytes.data(), x.data(), bytes.size());
  return bytes;
}

// The spacing of float32 at x.
inline double ulp_of(double x) {
  int exponent = 0;
  std::frexp(x, &exponent);
  return std::ldexp(1.0, std::max(exponent - 24, -149));
}

inline void check_every_half_is_widened_exactly(cpo::Isa isa, Verdict& verdict) {
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    std::vector<std::uint8_t> stored;
    for (int bits = 0; bits < 65536; ++bits) {
      for (const int byte : {bits & 255, bits >> 8}) stored.push_back(static_cast<std::uint8_t>(byte));
    }
    const std::vector<float> found = through_forward(isa, dtype, stored, {1.0f, 0.0f, 1.0f});
    std::int64_t wrong = 0;
    for (std::size_t i = 0; i < found.size(); ++i) wrong += !same_number(found[i], value_of(&stored[2 * i], dtype));
    verdict.require(wrong == 0, name_of(dtype), "a stored number is widened to another one");
  }
}

inline void check_gradients_are_rounded_once(cpo::Isa isa, Verdict& verdict) {
  // NaN that rounding as if it were a number would carry into the sign, and out of it.
  std::vector<float> x{kNaN, bits_as<float>(0x7fffffffu), bits_as<float>(0xffffffffu), -kInfinity, -90.0f};
  Numbers numbers(7);
  for (int i = 0; i < 50000; ++i) x.push_back(static_cast<float>(-44.0 * (numbers.centred() + 1.0)));
  // Up to overflow of float16, and down to its subnormals; to those of bfloat16, and back to overflow of bfloat16.
  for (const float factor : {1.0f, -1e-3f, 3e5f, -1e-30f, 3e38f}) {
    const std::vector<std::uint8_t> single = through_backward(isa, x, factor, DType::kF32);
    for (const DType dtype : {DType::kBF16, DType::kF16}) {
      const std::vector<std::uint8_t> found = through_backward(isa, x, factor, dtype);
      std::int64_t wrong = 0;
      for (std::size_t i = 0; i < x.size(); ++i) {
        std::uint8_t rounded[4];  // of which a 16-bit dtype takes two
        store_value(value_of(&single[4 * i], DType::kF32), dtype, rounded);
        const bool nan = x[i] != x[i];
        const float value = value_of(&found[2 * i], dtype);
        wrong += nan ? value == value : std::memcmp(rounded, &found[2 * i], 2) != 0;
      }
      verdict.require(wrong == 0, name_of(dtype), "a gradient is not the float32 gradient rounded to nearest, ties to even");
    }
  }
}

inline void check_exponential(cpo::Isa isa, Verdict& verdict) {
  std::vector<float> x;
  for (int i = 0; i <= 200000; ++i) x.push_back(static_cast<float>(-87.33 * i / 200000));
  for (int i = 0; i < 2000; ++i) x.push_back(-std::ldexp(1.0f + static_cast<float>(i % 50) / 50.0f, i / 50 - 34));
  const std::vector<std::uint8_t> found = through_backward(isa, x, 1.0f, DType::kF32);
  double worst = 0.0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double exact = std::exp(static_cast<double>(x[i]));
    worst = std::max(worst, std::fabs(value_of(&found[4 * i], DType::kF32) - exact) / ulp_of(exact));
  }
  verdict.require(worst <= 2.0, "exp", "further than 2 ulp from e^x");
  const std::vector<float> tiny{-87.4f, -88.0f, -104.0f, -1e4f, -1e30f, -3e38f, -kInfinity};
  const std::vector<std::uint8_t> zeros = through_backward(isa, tiny, 1.0f, DType::kF32);
  for (std::size_t i = 0; i < tiny.size(); ++i) {
    verdict.require(value_of(&zeros[4 * i], DType::kF32) == 0.0f, "exp", "not 0 where e^x is no normal float");
  }
}

inline void check_tanh(cpo::Isa isa, Verdict& verdict) {
  std::vector<float> x{0.0f, 0.625f, -0.625f, 20.0f, -1e4f, 1e30f, kInfinity, -kInfinity, kNaN};
  for (int i = -100000; i <= 100000; ++i) x.push_back(static_cast<float>(i) * 1e-4f);
  for (int i = 0; i < 40; ++i) x.push_back(std::ldexp(-1.5f, -i));
  const std::vector<float> found = through_forward(isa, DType::kF32, bytes_of(x), {1.0f, 1.0f, 1.0f});
  double worst = 0.0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double exact = std::tanh(static_cast<double>(x[i]));
    if (x[i] != x[i]) {
      verdict.require(found[i] != found[i], "tanh", "a number for NaN");
    } else {
      worst = std::max(worst, std::fabs(found[i] - exact) / ulp_of(exact));
    }
  }
  verdict.require(worst <= 4.0, "tanh", "further than 4 ulp from tanh(x)");
}

inline void check_properties(cpo::Isa isa, Verdict& verdict) {
  check_every_half_is_widened_exactly(isa, verdict);
  check_gradients_are_rounded_once(isa, verdict);
  check_exponential(isa, verdict);
  check_tanh(isa, verdict);
}

}  // namespace vectors
