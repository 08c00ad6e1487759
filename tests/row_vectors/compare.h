// One instruction set's results of a problem against those of the vectors.
#pragma once

#include "oracle.h"
#include "policy.h"

namespace vectors {

inline auto elements(const std::vector<float>& values) {
  return [&values](std::size_t i) { return values[i]; };
}

inline void compare_gradients(const Problem& p, const Gradient& found, const Gradient& expected, const Oracle& oracle, Verdict& verdict) {
  const std::string what = p.spec.name() + ", gradient in " + name_of(found.dtype);
  const std::size_t V = static_cast<std::size_t>(p.spec.vocab);
  const auto elements_of = [V](const Gradient& g) {
    return [&g, V](std::size_t i) { return g.at(static_cast<std::int64_t>(i / V), static_cast<std::int64_t>(i % V)); };
  };
  verdict.accurate(what, elements_of(found), elements_of(expected), oracle.grad, oracle.grad_terms, found.dtype);

  const std::int64_t size = size_of(p.spec.dtype), bytes = static_cast<std::int64_t>(p.buffer.size());
  const auto all = [&](std::int64_t begin, std::int64_t end, std::uint8_t byte) {
    return std::all_of(found.buffer.begin() + begin, found.buffer.begin() + end, [byte](std::uint8_t b) { return b == byte; });
  };
  bool outside_unchanged = all(0, p.first * size, kGuard), ignored_zero = true;
  for (std::int64_t row = 0; row < p.rows; ++row) {
    const std::int64_t begin = p.element(row, 0) * size, end = p.element(row, p.spec.vocab) * size;
    outside_unchanged &= all(end, row + 1 < p.rows ? p.element(row + 1, 0) * size : bytes, kGuard);
    if (!p.row_is_active(row)) ignored_zero &= all(begin, begin + p.spec.vocab * size_of(found.dtype), 0);
  }
  verdict.require(outside_unchanged, what, "memory outside the rows was written");
  verdict.require(ignored_zero, what, "a row that predicts nothing has a gradient");
}

inline void compare_columns(const Problem& p, const Results& found, const Results& expected, const Oracle& oracle, Verdict& verdict) {
  const std::string name = p.spec.name();
  bool same = true;
  for (std::size_t j = 0; j < found.columns.total.size(); ++j) {
    same &= same_number(found.columns.largest[j], expected.columns.largest[j]);
    same &= same_number(found.columns.total[j], expected.columns.total[j]);
  }
  verdict.require(same, name, "column statistics differ");

  const std::size_t size = static_cast<std::size_t>(size_of(p.spec.dtype)), count = found.taken.columns.size();
  for (std::size_t k = 0; k < found.taken.rows.size(); ++k) {
    verdict.require(!std::memcmp(found.taken.at(p, k, 0), expected.taken.at(p, k, 0), count * size), name, "columns taken out differ");
    const float sum = value_of(found.taken.at(p, k, count), p.spec.dtype);
    const float scalar_sum = value_of(expected.taken.at(p, k, count), p.spec.dtype);
    const double exact = oracle.rest[k];
    // A sum that cancels is held to its summands, by the rule's floor.
    const double allowed = 2 * std::fabs(scalar_sum - exact) + floor_of(p.spec.dtype) * oracle.mass[k];
    const bool finite = std::isfinite(sum) && std::isfinite(scalar_sum);
    const bool right = finite ? std::fabs(sum - exact) <= allowed : same_number(sum, scalar_sum);
    verdict.require(right, name, "the sum of the other columns differs");
  }
}

inline void compare(const Problem& p, const Results& found, const Results& expected, const Oracle& oracle, Verdict& verdict) {
  const std::string name = p.spec.name();
  const auto forward = [&](const char* what, std::vector<float> Forward::*values, const std::vector<double>& exact, double least_term) {
    std::vector<double> terms;
    for (const double x : exact) terms.push_back(std::max(std::fabs(x), least_term));
    verdict.accurate(name + ", " + what, elements(found.forward.*values), elements(expected.forward.*values), exact, terms, DType::kF32);
  };
  forward("max", &Forward::max, oracle.max, 0.0);
  forward("logsum", &Forward::logsum, oracle.logsum, 1.0);  // the logarithm of a sum that is rounded and at least 1
  forward("logps", &Forward::logps, oracle.logps, 1.0);
  for (std::size_t i = 0; i < found.gradients.size(); ++i) compare_gradients(p, found.gradients[i], expected.gradients[i], oracle, verdict);
  compare_columns(p, found, expected, oracle, verdict);
}

}  // namespace vectors
