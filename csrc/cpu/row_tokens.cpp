#include "cpu/row_tokens.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace cpo {
namespace {

// Up to this many tokens in a row, comparing all pairs is faster than sorting.
constexpr std::int64_t kMaxPairwise = 32;

void merge_pairwise(const std::int64_t* targets, const float* coef, std::int64_t count, float* token_coef) {
  for (std::int64_t n = 0; n < count; ++n) {
    double total = 0.0;
    for (std::int64_t m = 0; m < count; ++m) total += targets[m] == targets[n] ? static_cast<double>(coef[m]) : 0.0;
    token_coef[n] = static_cast<float>(total);
  }
}

void merge_sorted(const std::int64_t* targets, const float* coef, std::int64_t count, float* token_coef) {
  std::vector<std::int64_t> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), std::int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return targets[a] < targets[b]; });
  for (auto first = order.begin(); first != order.end();) {
    auto last = first;
    double total = 0.0;
    for (; last != order.end() && targets[*last] == targets[*first]; ++last) total += static_cast<double>(coef[*last]);
    for (; first != last; ++first) token_coef[*first] = static_cast<float>(total);
  }
}

}  // namespace

void check_tokens(const RowBatch& batch) {
  const std::int64_t* starts = batch.row_starts;
  if (starts) {
    if (starts[0] != 0 || starts[batch.rows] != batch.tokens) {
      throw std::invalid_argument("row_starts goes from " + std::to_string(starts[0]) + " to " +
                                  std::to_string(starts[batch.rows]) + "; expected 0 to N = " + std::to_string(batch.tokens));
    }
    for (std::int64_t row = 0; row < batch.rows; ++row) {
      if (starts[row] > starts[row + 1]) {
        throw std::invalid_argument("row_starts[" + std::to_string(row + 1) + "] = " + std::to_string(starts[row + 1]) +
                                    " is less than row_starts[" + std::to_string(row) + "] = " + std::to_string(starts[row]));
      }
    }
  }
  for (std::int64_t n = 0; n < batch.tokens; ++n) {
    const std::int64_t target = batch.targets[n];
    if (target != kNoToken && (target < 0 || target >= batch.vocab)) {
      throw std::invalid_argument("targets[" + std::to_string(n) + "] = " + std::to_string(target) + "; expected 0 <= target < V = " +
                                  std::to_string(batch.vocab) + ", or -100 for no token");
    }
  }
}

void sum_coefs(const RowBatch& batch, const float* coef, float* coef_sum, float* token_coef) {
  for (std::int64_t row = 0; row < batch.rows; ++row) {
    const std::int64_t begin = batch.row_starts ? batch.row_starts[row] : row;
    const std::int64_t end = batch.row_starts ? batch.row_starts[row + 1] : row + 1;
    const std::int64_t count = end - begin;
    double total = 0.0;
    for (std::int64_t n = begin; n < end; ++n) total += batch.targets[n] == kNoToken ? 0.0 : static_cast<double>(coef[n]);
    coef_sum[row] = static_cast<float>(total);
    const auto merge = count <= kMaxPairwise ? merge_pairwise : merge_sorted;
    merge(batch.targets + begin, coef + begin, count, token_coef + begin);
  }
}

}  // namespace cpo
