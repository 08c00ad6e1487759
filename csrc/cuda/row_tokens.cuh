// The tokens of a row, as the threads of its block see them together.
#pragma once

#include "cuda/launch.h"
#include "cuda/reduce.cuh"

namespace cpo {

struct TokenRange {
  std::int64_t begin, end;
};

CPO_DEVICE TokenRange token_range(const RowBatch& batch, std::int64_t row) {
  if (!batch.row_starts) return {row, row + 1};
  return {simt::load(batch.row_starts + row), simt::load(batch.row_starts + row + 1)};
}

CPO_DEVICE bool is_word(std::int64_t target, int vocab) { return target >= 0 && target < vocab; }

// 0 where there is no token, whatever stands there.
CPO_DEVICE float token_coef(const std::int64_t* targets, const float* coef, std::int64_t n) {
  return simt::load(targets + n) == kNoToken ? 0.0f : simt::load(coef + n);
}

// The target of the first token of a row that counts; kNoToken where the row predicts nothing.
CPO_DEVICE std::int64_t first_target(const RowBatch& batch, TokenRange tokens) {
  std::int64_t target = kNoToken;
  for (std::int64_t n = tokens.begin; n < tokens.end && target == kNoToken; ++n) target = simt::load(batch.targets + n);
  return target;
}

// Whether all tokens of a row that count have the target of the first one.
CPO_DEVICE bool have_one_target(const RowBatch& batch, TokenRange tokens, std::int64_t first) {
  if (!batch.row_starts) return true;
  bool another = false;
  for (std::int64_t n = tokens.begin + simt::thread_index(); n < tokens.end; n += simt::thread_count()) {
    const std::int64_t target = simt::load(batch.targets + n);
    another |= target != kNoToken && target != first;
  }
  return !simt::block_any(another);
}

struct RowCoef {
  float sum;
  bool active;  // whether any is not 0; NaN is not
};

CPO_DEVICE RowCoef sum_coefs(const RowBatch& batch, const float* coef, TokenRange tokens, Partials& partials) {
  if (!batch.row_starts) {
    const float given = simt::load(coef + tokens.begin);  // without a look at the target, whose latency passes meanwhile
    const float c = simt::load(batch.targets + tokens.begin) == kNoToken ? 0.0f : given;
    return {c, c != 0.0f};
  }
  float sum = 0.0f;
  bool active = false;
  for (std::int64_t n = tokens.begin + simt::thread_index(); n < tokens.end; n += simt::thread_count()) {
    const float c = token_coef(batch.targets, coef, n);
    sum += c;
    active |= c != 0.0f;
  }
  sum = block_reduce(sum, 0.0f, partials, Add());
  return {sum, simt::block_any(active)};
}

// Raw logit of a target and its bias; 0 for a target that no word has.
template <class T, class Head>
CPO_DEVICE float load_logit(const T* x, const Head& head, std::int64_t target, int vocab, float& bias) {
  const bool inside = is_word(target, vocab);
  bias = inside ? head.bias_of(static_cast<int>(target)) : 0.0f;
  return inside ? to_float(simt::load(x + target)) : 0.0f;
}

}  // namespace cpo
