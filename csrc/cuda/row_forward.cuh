// One read of a row of logits: its maximum, its log-sum-exp, and the log-probabilities of its tokens. A block takes a row.
#pragma once

#include <limits>

#include "cuda/head.cuh"
#include "cuda/reduce.cuh"
#include "cuda/row_tokens.cuh"
#include "cuda/vectors.cuh"

namespace cpo {

constexpr int kLoadsInFlight = 4;  // of 16 bytes, per thread

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// The maximum of some numbers y, and the sum of exp(y - maximum).
struct OnlineSoftmax {
  float max = kLowest;
  float sum = 0.0f;

  // One exponential a number, and one for them all.
  template <int N, int K>
  CPO_DEVICE void add(const float (&y)[N][K]) {
    float new_max = max;
    CPO_UNROLL
    for (int n = 0; n < N; ++n) {
      CPO_UNROLL
      for (int k = 0; k < K; ++k) new_max = fmaxf(new_max, y[n][k]);
    }
    float total = sum * exp_approx(max - new_max);
    CPO_UNROLL
    for (int n = 0; n < N; ++n) {
      float part = 0.0f;
      CPO_UNROLL
      for (int k = 0; k < K; ++k) part += exp_approx(y[n][k] - new_max);
      total += part;
    }
    max = new_max;
    sum = total;
  }
};

// That of the numbers of all threads.
CPO_DEVICE OnlineSoftmax block_softmax(const OnlineSoftmax& mine, Partials& partials) {
  OnlineSoftmax whole;
  whole.max = block_reduce(mine.max, kLowest, partials, Max());
  whole.sum = block_reduce(mine.sum * exp_approx(mine.max - whole.max), 0.0f, partials, Add());
  return whole;
}

// What else is done with the vectors of a row as they are read: nothing.
struct KeepNothing {
  CPO_DEVICE void operator()(int, const simt::Words4&) const {}
};

// kLoadsInFlight vectors of each thread; without kWhole, some may not lie before `end`.
template <bool kWhole, class T, class Head, class Keep>
CPO_DEVICE void add_tile(OnlineSoftmax& softmax, const T* x, const Span& span, const Head& head, int first, int end, const Keep& keep) {
  constexpr int K = kVectorSize<T>;
  simt::Words4 v[kLoadsInFlight] = {};
  CPO_UNROLL
  for (int u = 0; u < kLoadsInFlight; ++u) {
    const int i = first + u * simt::thread_count();
    if (kWhole || i < end) v[u] = simt::load(reinterpret_cast<const simt::Words4*>(x + span.lead) + i);
  }
  float y[kLoadsInFlight][K];
  CPO_UNROLL
  for (int u = 0; u < kLoadsInFlight; ++u) {
    const int i = first + u * simt::thread_count();
    const bool exists = kWhole || i < end;
    float b[K] = {};
    if (exists) head.load_bias(span.lead + i * K, b);
    if (exists) keep(i, v[u]);
    unpack(v[u], y[u], T{});
    CPO_UNROLL
    for (int k = 0; k < K; ++k) y[u][k] = exists ? head.logit(y[u][k], b[k]) : kMinusInfinity;
  }
  softmax.add(y);
}

// The columns before and after the vectors, fewer than a warp's lanes.
template <class T, class Head>
CPO_DEVICE void add_edges(OnlineSoftmax& softmax, const T* x, const Span& span, const Head& head, int vocab) {
  const int t = simt::thread_index();
  const int column = t < span.lead ? t : span.tail + t - span.lead;
  if (column >= vocab) return;
  const float y[1][1] = {{head.logit(to_float(simt::load(x + column)), head.bias_of(column))}};
  softmax.add(y);
}

// The vectors [begin, end) of the span.
template <class T, class Head, class Keep>
CPO_DEVICE void add_vectors(OnlineSoftmax& softmax, const T* x, const Span& span, const Head& head, int begin, int end, const Keep& keep) {
  const int tile = kLoadsInFlight * simt::thread_count();
  int first = begin;
  for (; first + tile <= end; first += tile) add_tile<true>(softmax, x, span, head, first + simt::thread_index(), end, keep);
  if (first < end) add_tile<false>(softmax, x, span, head, first + simt::thread_index(), end, keep);
}

template <class T, class Head>
CPO_DEVICE OnlineSoftmax row_softmax(const T* x, const Head& head, int vocab, Partials& partials) {
  const Span span = find_span(x, vocab);
  OnlineSoftmax mine;
  add_vectors(mine, x, span, head, 0, span.vectors, KeepNothing());
  add_edges(mine, x, span, head, vocab);
  return block_softmax(mine, partials);
}

// What memory holds of a token's logit, converted when it is used: a conversion would wait for it.
template <class T>
struct TargetLogit {
  T raw;
  float bias;
  bool is_word;

  template <class Head>
  static CPO_DEVICE TargetLogit load(const RowBatch& batch, const T* x, const Head& head, std::int64_t n) {
    const std::int64_t target = simt::load(batch.targets + n);
    if (!cpo::is_word(target, batch.vocab)) return {T{}, 0.0f, false};
    return {simt::load(x + target), head.bias_of(static_cast<int>(target)), true};
  }

  // NaN for a target that no word has.
  template <class Head>
  CPO_DEVICE float value(const Head& head) const {
    return is_word ? head.logit(to_float(raw), bias) : kNan;
  }
};

template <class T, class Head>
CPO_DEVICE void forward_row(const ForwardArgs& args, const Head& head, std::int64_t row, Partials& partials) {
  const RowBatch& batch = args.batch;
  const T* x = static_cast<const T*>(batch.logits) + row * batch.row_stride;
  const TokenRange tokens = token_range(batch, row);
  const std::int64_t mine = tokens.begin + simt::thread_index();
  // Asked for now, so that its latency passes during the sum.
  TargetLogit<T> target{T{}, 0.0f, false};
  if (mine < tokens.end) target = TargetLogit<T>::load(batch, x, head, mine);

  float row_max = 0.0f, log_sum = 0.0f;
  if (first_target(batch, tokens) != kNoToken) {
    const OnlineSoftmax softmax = row_softmax(x, head, batch.vocab, partials);
    row_max = softmax.max;
    log_sum = logf(softmax.sum);
  }
  if (simt::thread_index() == 0) {
    simt::store(args.stats.max + row, row_max);
    simt::store(args.stats.log_sum + row, log_sum);
  }
  for (std::int64_t n = mine; n < tokens.end; n += simt::thread_count()) {
    if (n != mine) target = TargetLogit<T>::load(batch, x, head, n);
    const bool present = simt::load(batch.targets + n) != kNoToken;
    simt::store(args.logps + n, present ? target.value(head) - row_max - log_sum : 0.0f);
  }
}

}  // namespace cpo
