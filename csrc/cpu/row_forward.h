// Row maximum, exp-sum and target gather with one read of the logits.
//
// Each block of columns is summed relative to `ref`, a maximum met earlier, while its own maximum is found; only if that
// exceeds ref by more than kHeadroom is the block, still in the L1 cache, summed again. So memory streams without a pause
// between a pass for the maximum and one for the sum.
#pragma once

namespace {

constexpr int64_t kBlock = 4096;
constexpr int64_t kFirstLook = 512;  // columns whose maximum is the first ref
constexpr float kHeadroom = 32.0f;  // kBlock * e^32 is far from overflow

struct Block {
  float max;
  double sum;  // of exp(y - ref)
};

template <class T, class P>
inline float block_max(const T* x, const float* bias, int64_t n, const P& p) {
  Vec max_a = set1(-INFINITY), max_b = max_a, a, b;
  int64_t j = 0;
  for (; j + kPair <= n; j += kPair) {
    load_y<T>(x + j, bias ? bias + j : nullptr, p, a, b);
    max_a = max(a, max_a);
    max_b = max(b, max_b);
  }
  if (j < n) {
    const Tail<T> tail(x + j, bias ? bias + j : nullptr, static_cast<int>(n - j));
    load_y<T>(tail.x, tail.bias, p, a, b);
    max_a = max(a, max_a);
    max_b = max(b, max_b);
  }
  return reduce_max(max(max_a, max_b));
}

template <class T, class P>
inline Block sum_block(const T* x, const float* bias, int64_t n, const P& p, float ref) {
  const Vec minus_ref = set1(-ref);
  Vec max_a = set1(-INFINITY), max_b = max_a, sum_a = set1(0.0f), sum_b = sum_a, a, b;
  int64_t j = 0;
  for (; j + kPair <= n; j += kPair) {
    prefetch_ahead(x + j);
    load_y<T>(x + j, bias ? bias + j : nullptr, p, a, b);
    max_a = max(a, max_a);
    max_b = max(b, max_b);
    sum_a = sum_a + exp(a + minus_ref);
    sum_b = sum_b + exp(b + minus_ref);
  }
  if (j < n) {
    const Tail<T> tail(x + j, bias ? bias + j : nullptr, static_cast<int>(n - j));
    Vec valid_a, valid_b;
    load_y<T>(tail.x, tail.bias, p, a, b);
    load2(tail.valid, valid_a, valid_b);
    max_a = max(a, max_a);
    max_b = max(b, max_b);
    sum_a = fma(exp(a + minus_ref), valid_a, sum_a);
    sum_b = fma(exp(b + minus_ref), valid_b, sum_b);
  }
  return {reduce_max(max(max_a, max_b)), sum(sum_a, sum_b)};
}

// A row that starts with -inf only has no reference yet; 0 keeps -inf - ref from being NaN.
inline float usable(float ref) { return ref == -INFINITY ? 0.0f : ref; }

struct RowStats {
  float max;
  double logsum;
};

template <class T, class P>
inline RowStats row_stats(const T* x, const float* bias, int64_t vocab, const P& p) {
  float top = block_max(x, bias, vocab < kFirstLook ? vocab : kFirstLook, p);
  float ref = top;
  double total = 0.0;
  for (int64_t j = 0; j < vocab; j += kBlock) {
    const int64_t n = vocab - j < kBlock ? vocab - j : kBlock;
    const float* block_bias = bias ? bias + j : nullptr;
    Block block = sum_block(x + j, block_bias, n, p, usable(ref));
    top = block.max > top ? block.max : top;
    if (top > ref + kHeadroom) {
      total *= ::exp(static_cast<double>(ref) - static_cast<double>(top));
      ref = top;
      block = sum_block(x + j, block_bias, n, p, ref);
    }
    total += block.sum;
  }
  // NaN is ignored by the maximum but not by the sum.
  const float reported = total != total && top < INFINITY ? NAN : top;
  return {reported, ::log(total) + (static_cast<double>(ref) - static_cast<double>(top))};
}

template <class T, class P>
void forward_rows(const cpo::ForwardArgs& args, const P& p, int64_t begin, int64_t end) {
  const cpo::RowBatch& batch = args.batch;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(batch.logits) + row * batch.row_stride;
    const RowStats stats = row_stats(x, batch.bias, batch.vocab, p);
    args.max[row] = stats.max;
    args.logsum[row] = static_cast<float>(stats.logsum);
    const TokenRange tokens = tokens_of(batch, row);
    for (int64_t n = tokens.begin; n < tokens.end; ++n) {
      const int64_t target = batch.targets[n];
      float logp = 0.0f;
      if (target != cpo::kNoToken) {
        const Vec shifted = column_y(x, batch.bias, target, p) - set1(stats.max);
        logp = static_cast<float>(static_cast<double>(first_lane(shifted)) - stats.logsum);
      }
      args.logps[n] = logp;
    }
  }
}

template <class T>
void forward(const cpo::ForwardArgs& args, int64_t begin, int64_t end) {
  with_transform(args.batch, args.transform, [&](const auto& p) { forward_rows<T>(args, p, begin, end); });
}

}  // namespace
