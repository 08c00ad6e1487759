// When a result counts as right: the rule of tests/support/tolerance.py, and equality where arithmetic leaves no choice.
#pragma once

#include <algorithm>
#include <cstdio>

#include "cases.h"

namespace vectors {

// Four roundings of float32 arithmetic; for what is stored in 16 bits, the one rounding of storing it.
inline double floor_of(DType dtype) {
  return dtype == DType::kF32 ? 4 * 0x1p-23 : dtype == DType::kBF16 ? 0x1p-8 : 0x1p-11;
}

inline bool same_number(float a, float b) { return a == b || (a != a && b != b); }

class Verdict {
 public:
  void fail(const std::string& what, const std::string& why) {
    if (++failures_ <= 20) std::printf("  FAILED %s: %s\n", what.c_str(), why.c_str());
  }
  void require(bool holds, const std::string& what, const char* why) {
    ++checks_;
    if (!holds) fail(what, why);
  }

  // err(result) <= 2 err(baseline) + floor over the numbers that are finite in the oracle; NaN and infinities are where the
  // baseline has them. The floor is relative to `terms`, the sizes of what each number is the sum of: a result that cancels to
  // nothing keeps the roundings of its terms. The baseline must be near the oracle, or twice its error would allow anything.
  template <class Result, class Baseline>
  void accurate(const std::string& what, const Result& result, const Baseline& baseline, const std::vector<double>& oracle,
                const std::vector<double>& terms, DType dtype) {
    double scale = 0.0, error = 0.0, baseline_error = 0.0;
    for (std::size_t i = 0; i < oracle.size(); ++i) {
      const float a = result(i), b = baseline(i);
      if (!std::isfinite(a) || !std::isfinite(b)) {
        const std::string difference = std::to_string(a) + ", in the vectors " + std::to_string(b);
        if (!same_number(a, b)) return fail(what, "element " + std::to_string(i) + " is " + difference);
      } else if (std::isfinite(oracle[i])) {
        scale += terms[i] * terms[i];
        error += (a - oracle[i]) * (a - oracle[i]);
        baseline_error += (b - oracle[i]) * (b - oracle[i]);
        ++numbers_;
      }
    }
    ++checks_;
    const double floor = floor_of(dtype) * std::sqrt(scale);
    error = std::sqrt(error);
    baseline_error = std::sqrt(baseline_error);
    const double allowed = 2 * baseline_error + floor;
    if (baseline_error > 16 * floor) fail(what, "the vectors' own error is " + std::to_string(baseline_error));
    if (!(error <= allowed)) {
      char text[96];
      std::snprintf(text, sizeof text, "error %.3g exceeds %.3g", error, allowed);
      fail(what, text);
    }
    if (allowed > 0.0) largest_share_ = std::max(largest_share_, error / allowed);
  }

  bool report(const char* of) const {
    std::printf("%-8s %lld checks, %lld numbers against float64, at most %.2f of the error allowed, %lld failures\n", of, checks_, numbers_,
                largest_share_, failures_);
    return failures_ == 0 && checks_ > 0 && numbers_ > 0;
  }

 private:
  long long checks_ = 0, numbers_ = 0, failures_ = 0;
  double largest_share_ = 0.0;
};

}  // namespace vectors
