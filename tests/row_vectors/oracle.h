// What the row kernels should make of a problem: the definition, in float64.
#pragma once

#include "results.h"

namespace vectors {

struct Oracle {
  std::vector<double> max, logsum, logps, grad;  // (R,), (R,), (N,), (R, V)
  std::vector<double> grad_terms;                // the gradient's two terms, added without their signs
  std::vector<double> rest, mass;                // of each row taken: the sum of the columns left out; of all sizes

  // Room for it.
  explicit Oracle(const Problem& p)
      : max(static_cast<std::size_t>(p.rows)), logsum(max), logps(p.targets.size()),
        grad(static_cast<std::size_t>(p.rows * p.spec.vocab)), grad_terms(grad), rest(Taken(p).rows.size()), mass(rest) {}

  void compute(const Problem& p) {
    for (std::int64_t row = 0; row < p.rows; ++row) compute_row(p, row);
    const Taken taken(p);
    for (std::size_t k = 0; k < taken.rows.size(); ++k) {
      for (std::int64_t j = 0; j < p.spec.vocab; ++j) {
        const double x = p.logit(taken.rows[k], j);
        if ((p.spec.vocab - 1 - j) % 3 != 0) rest[k] += x;
        mass[k] += std::fabs(x);
      }
    }
  }

 private:
  void compute_row(const Problem& p, std::int64_t row) {
    const cpo::LogitTransform& t = p.spec.head->transform;
    const double cap = t.cap;
    const std::int64_t V = p.spec.vocab;
    std::vector<double> y(static_cast<std::size_t>(V)), slope(y), own(y);
    double top = -INFINITY, total = 0.0, coef_sum = 0.0;
    for (std::int64_t j = 0; j < V; ++j) {
      const double u = (static_cast<double>(p.logit(row, j)) + (p.bias.empty() ? 0.0 : p.bias[j])) * t.mult;
      y[j] = cap != 0.0 ? cap * std::tanh(u) : u;
      slope[j] = cap != 0.0 ? t.slope * (1.0 - std::tanh(u) * std::tanh(u)) : t.slope;
      top = y[j] > top || y[j] != y[j] ? y[j] : top;
    }
    for (const double value : y) total += std::exp(value - top);
    max[row] = top;
    logsum[row] = std::log(total);
    for (std::int64_t n = p.row_starts[row]; n < p.row_starts[row + 1]; ++n) {
      const std::int64_t target = p.targets[n];
      if (target == cpo::kNoToken) continue;
      logps[n] = y[target] - top - logsum[row];
      coef_sum += p.coef[n];
      own[target] += p.coef[n];
    }
    for (std::int64_t j = 0; p.row_is_active(row) && j < V; ++j) {
      const double others = coef_sum * std::exp(y[j] - top - logsum[row]);
      grad[row * V + j] = (own[j] - others) * slope[j];
      grad_terms[row * V + j] = (std::fabs(own[j]) + std::fabs(others)) * std::fabs(slope[j]);
    }
  }
};

}  // namespace vectors
