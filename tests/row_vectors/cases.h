// The grid of problems on which instruction sets are compared, made from integers alone: the same bits on every machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cpu/row_args.h"

namespace vectors {

using cpo::bf16;
using cpo::DType;
using cpo::f16;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline std::int64_t size_of(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }
inline const char* name_of(DType dtype) { return dtype == DType::kF32 ? "float32" : dtype == DType::kBF16 ? "bfloat16" : "float16"; }

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float float16_value(std::uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const float size = exponent == 31  ? (fraction ? kNaN : kInfinity)
                     : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                     : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return bits & 0x8000 ? -size : size;
}

// What a stored number stands for; every 16-bit number is a float32.
inline float value_of(const std::uint8_t* p, DType dtype) {
  if (dtype == DType::kF32) {
    float x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  std::uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  if (dtype == DType::kBF16) return bits_as<float>(static_cast<std::uint32_t>(bits) << 16);
  static const std::vector<float> kFloat16 = [] {
    std::vector<float> values;
    for (int i = 0; i < 65536; ++i) values.push_back(float16_value(static_cast<std::uint16_t>(i)));
    return values;
  }();
  return kFloat16[bits];
}

// The nearest number of a dtype, ties to even, found in float64: the spacing of the numbers around x is a power of two.
inline void store_value(double x, DType dtype, std::uint8_t* p) {
  if (dtype == DType::kF32) {
    const float rounded = static_cast<float>(x);
    std::memcpy(p, &rounded, 4);
    return;
  }
  const int digits = dtype == DType::kBF16 ? 8 : 11, least = dtype == DType::kBF16 ? -133 : -24, bias = dtype == DType::kBF16 ? 127 : 15;
  const int infinity = ((2 * bias + 1) << (digits - 1));
  int magnitude;
  if (x != x) {
    magnitude = infinity | 1 << (digits - 2);
  } else if (x == 0.0) {
    magnitude = 0;
  } else if (std::isinf(x)) {
    magnitude = infinity;
  } else {
    int exponent = 0;
    std::frexp(x, &exponent);
    const int spacing = exponent - digits > least ? exponent - digits : least;
    const double units = std::nearbyint(std::ldexp(std::fabs(x), -spacing));  // at most 2^digits, in units of the spacing
    magnitude = static_cast<int>(units) + ((spacing - least) << (digits - 1));
    if (magnitude > infinity) magnitude = infinity;
  }
  const std::uint16_t bits = static_cast<std::uint16_t>(magnitude | (std::signbit(x) && x == x ? 0x8000 : 0));
  std::memcpy(p, &bits, sizeof bits);
}

// Numbers that look random and are the same everywhere.
class Numbers {
 public:
  explicit Numbers(std::uint64_t seed) : state_(seed) {}
  std::uint32_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::uint32_t>(state_ >> 33);
  }
  std::int64_t below(std::int64_t limit) { return static_cast<std::int64_t>(next()) % limit; }
  // In (-1, 1), more often near 0.
  double centred() { return (static_cast<double>(next()) - static_cast<double>(next())) * 0x1p-31; }

 private:
  std::uint64_t state_;
};

struct Head {
  const char* name;
  cpo::LogitTransform transform;
  bool bias;
};

// cap and mult as cpo_kernels/kernels/cpu/rows.py makes them of logit_scale, softcap and temperature.
inline const Head kHeads[] = {
    {"plain", {1.0f, 0.0f, 1.0f}, false},
    {"scale 1.7, temperature 0.6", {1.7f / 0.6f, 0.0f, 1.7f / 0.6f}, false},
    {"negative scale", {-0.8f, 0.0f, -0.8f}, false},
    {"zero scale", {0.0f, 0.0f, 0.0f}, false},
    {"bias", {1.0f, 0.0f, 1.0f}, true},
    {"softcap 3", {1.0f / 3.0f, 3.0f, 1.0f}, false},
    {"bias, scale 1.3, softcap 30, temperature 0.7", {1.3f / 30.0f, 30.0f / 0.7f, 1.3f / 0.7f}, true},
};

enum class Content { kUsual, kLarge, kSubnormal, kNaN, kInfinity, kMinusInfinity, kImpossible };
inline const char* const kContents[] = {"usual logits", "logits of +-1e4", "subnormal logits", "a NaN", "a +inf", "a -inf", "only -inf"};

struct Case {
  DType dtype;
  std::int64_t vocab;
  const Head* head;
  Content content;
  bool strided;  // columns between the rows, and a first logit that no vector's alignment fits

  std::string name() const {
    return std::string(name_of(dtype)) + ", V = " + std::to_string(vocab) + ", " + head->name + ", " +
           kContents[static_cast<int>(content)] + (strided ? ", strided" : "");
  }
};

inline std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const bool strided : {false, true}) {
      // Around one, two and four vectors of any width; a prime; beyond the columns that the forward looks at first.
      for (const std::int64_t vocab : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 127, 521}) {
        for (const Head& head : kHeads) cases.push_back({dtype, vocab, &head, Content::kUsual, strided});
      }
      for (const Head* head : {&kHeads[0], &kHeads[1], &kHeads[6]}) {
        // One block of the forward, one and a tail, a prime of several blocks that threads share.
        for (const std::int64_t vocab : {4096, 4099, 8209}) cases.push_back({dtype, vocab, head, Content::kUsual, strided});
        for (int content = 1; content <= static_cast<int>(Content::kImpossible); ++content) {
          for (const std::int64_t vocab : {1, 2, 17, 127, 4099}) {
            cases.push_back({dtype, vocab, head, static_cast<Content>(content), strided});
          }
        }
      }
    }
  }
  return cases;
}

constexpr std::uint8_t kGuard = 0xa5;  // what lies around and between the rows

// The tensors of one case. Row 2 has no tokens, row 4 only absent ones, the token of row 6 a coef of 0.
struct Problem {
  Case spec;
  std::int64_t rows = 8;
  std::int64_t row_stride = 0;       // elements
  std::int64_t first = 0;            // elements before the first logit
  std::vector<std::uint8_t> buffer;  // logits with guards around them
  std::vector<std::int64_t> targets, row_starts;
  std::vector<float> coef, bias;

  explicit Problem(const Case& c, std::uint64_t seed) : spec(c) {
    Numbers numbers(seed);
    row_stride = c.vocab + (c.strided ? 9 : 0);
    first = c.strided ? 1 : 0;
    buffer.assign(static_cast<std::size_t>((first + rows * row_stride) * size_of(c.dtype)), kGuard);
    fill_logits(numbers);
    row_starts = {0, 1, 4, 4, 9, 10, 12, 13, 14};
    for (std::int64_t n = 0; n < row_starts.back(); ++n) {
      targets.push_back(n % 5 == 3 || n == 9 ? cpo::kNoToken : numbers.below(c.vocab));
      coef.push_back(n == 12 ? 0.0f : static_cast<float>(numbers.centred()));
    }
    targets[5] = targets[4];  // one word twice in a row
    for (std::int64_t j = 0; c.head->bias && j < c.vocab; ++j) bias.push_back(static_cast<float>(numbers.centred()));
  }

  bool row_is_active(std::int64_t row) const {
    for (std::int64_t n = row_starts[row]; n < row_starts[row + 1]; ++n) {
      if (targets[n] != cpo::kNoToken && coef[n] != 0.0f) return true;
    }
    return false;
  }

  std::int64_t element(std::int64_t row, std::int64_t column) const { return first + row * row_stride + column; }
  float logit(std::int64_t row, std::int64_t column) const {
    return value_of(buffer.data() + element(row, column) * size_of(spec.dtype), spec.dtype);
  }

  cpo::RowBatch batch(const std::uint8_t* logits) const {
    return {logits + first * size_of(spec.dtype), rows, spec.vocab, row_stride, targets.data(), row_starts.data(),
            row_starts.back(), bias.empty() ? nullptr : bias.data()};
  }

 private:
  void set(std::int64_t row, std::int64_t column, double x) {
    store_value(x, spec.dtype, buffer.data() + element(row, column) * size_of(spec.dtype));
  }

  void fill_logits(Numbers& numbers) {
    const double scale = spec.content == Content::kLarge ? 1e4 : spec.content == Content::kSubnormal ? 0x1p-127 : 8.0;
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t j = 0; j < spec.vocab; ++j) {
        double x = scale * numbers.centred();
        if (spec.content == Content::kLarge) x = x < 0 ? -scale : scale;
        if (spec.content == Content::kSubnormal && spec.dtype == DType::kF16) x *= 0x1p+112;
        if (spec.content == Content::kImpossible && row % 3 == 1) x = -INFINITY;
        set(row, j, x);
      }
      const double special = spec.content == Content::kNaN             ? NAN
                             : spec.content == Content::kInfinity      ? INFINITY
                             : spec.content == Content::kMinusInfinity ? -INFINITY
                                                                       : 0.0;
      if (special != 0.0 && row != 1) set(row, numbers.below(spec.vocab), special);
    }
  }
};

}  // namespace vectors
