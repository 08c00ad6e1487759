// Softmax gradient of a row: one read and one write of its logits, over them or not. A block takes a row.
//
// A gradient narrower than the logits may lie over them, at the front of each row: column j is written over bytes of columns up to j.
// So every column of a tile is loaded before any of its gradient is stored, by a barrier between, and the tiles go from left to right.
#pragma once

#include "cuda/row_forward.cuh"

namespace cpo {

// The gradient of a row's columns, and of those that its tokens name.
template <class Head>
struct LogitGradient {
  const Head& head;
  float max;
  float inverse_sum;  // 1 / sum_j exp(y_j - max)
  float slope;        // dy/dx at y = 0
  float factor;       // -(sum of coefs) * slope * inverse_sum

  CPO_DEVICE float operator()(float x, float b) const { return factor * exp_approx(head.logit(x, b) - max) * head.slope(x, b); }

  // With `own` the sum of the coefs of the tokens at this column, and `others` that of the rest: exactly 0 where all tokens have one
  // target and that all the probability.
  CPO_DEVICE float of_target(float x, float b, float own, float others) const {
    const float p = exp_approx(head.logit(x, b) - max) * inverse_sum;
    return (own * (1.0f - p) - others * p) * slope * head.slope(x, b);
  }
};

// Where a gradient goes; `aligned`: vectors of the row's span begin at boundaries of what they are stored by.
template <class Out>
struct Target {
  Out* row;
  bool aligned;
};

template <bool kWhole, bool kNarrow, class T, class Out, class Head>
CPO_DEVICE void store_tile(const Target<Out>& out, const T* x, const Span& span, const LogitGradient<Head>& gradient,
                           int first) {
  constexpr int K = kVectorSize<T>;
  simt::Words4 v[kLoadsInFlight] = {};
  CPO_UNROLL
  for (int u = 0; u < kLoadsInFlight; ++u) {
    const int i = first + u * simt::thread_count();
    if (kWhole || i < span.vectors) v[u] = simt::load(reinterpret_cast<const simt::Words4*>(x + span.lead) + i);
  }
  if (kNarrow) simt::block_barrier();
  CPO_UNROLL
  for (int u = 0; u < kLoadsInFlight; ++u) {
    const int i = first + u * simt::thread_count();
    if (!kWhole && i >= span.vectors) continue;
    const int column = span.lead + i * K;
    float b[K], g[K];
    gradient.head.load_bias(column, b);
    unpack(v[u], g, T{});
    CPO_UNROLL
    for (int k = 0; k < K; ++k) g[k] = gradient(g[k], b[k]);
    store_columns(out.row + column, g, out.aligned);
  }
}

// The columns [first, last), fewer than a vector has.
template <bool kNarrow, class T, class Out, class Head>
CPO_DEVICE void store_edge(Out* out, const T* x, const LogitGradient<Head>& gradient, int first, int last) {
  const int column = first + simt::thread_index();
  const bool exists = column < last;
  const float raw = exists ? to_float(simt::load(x + column)) : 0.0f;
  if (kNarrow) simt::block_barrier();
  if (exists) store_rounded(out + column, gradient(raw, gradient.head.bias_of(column)));
}

template <class T, class Out, class Head>
CPO_DEVICE void store_gradient(Out* out_row, const T* x, const Span& span, const LogitGradient<Head>& gradient, int vocab) {
  constexpr bool kNarrow = sizeof(Out) < sizeof(T);
  const Target<Out> out{out_row, is_aligned(out_row + span.lead, kStoreBytes<Out, kVectorSize<T>>)};
  const int tile = kLoadsInFlight * simt::thread_count();
  const int whole = span.vectors / tile * tile;
  store_edge<kNarrow>(out_row, x, gradient, 0, span.lead);
  for (int first = 0; first < whole; first += tile) {
    store_tile<true, kNarrow>(out, x, span, gradient, first + simt::thread_index());
  }
  if (whole < span.vectors) store_tile<false, kNarrow>(out, x, span, gradient, whole + simt::thread_index());
  store_edge<kNarrow>(out_row, x, gradient, span.tail, vocab);
}

// By `blocks` blocks together, of which this is number `rank`.
template <class Out>
CPO_DEVICE void store_zeros(Out* row, int vocab, int rank = 0, int blocks = 1) {
  constexpr int K = kVectorSize<Out>;
  const Span span = find_span(row, vocab);
  const float zeros[K] = {};
  const int t = simt::thread_index(), threads = simt::thread_count();
  for (int i = rank * threads + t; i < span.vectors; i += blocks * threads) store_vector(row + span.lead + i * K, zeros);
  const int column = t < span.lead ? t : span.tail + t - span.lead;
  if (rank == 0 && column < vocab) store_rounded(row + column, 0.0f);
}

// Whether store_gradient has this thread store a column.
template <class T>
CPO_DEVICE bool stores_column(const Span& span, int column) {
  int owner = column;
  if (column >= span.lead) owner = column < span.tail ? (column - span.lead) / kVectorSize<T> % simt::thread_count() : column - span.tail;
  return owner == simt::thread_index();
}

// The token of a row of one, for the thread that stores its column: that thread keeps the logit and stores the column once more.
template <class T>
struct OwnToken {
  int column;  // or -1: none, or another thread's
  T raw;       // converted when it is used: a conversion would wait for it
  float bias;

  template <class Head>
  static CPO_DEVICE OwnToken find(const T* x, const Head& head, const Span& span, std::int64_t target, int vocab) {
    if (!is_word(target, vocab) || !stores_column<T>(span, static_cast<int>(target))) return {-1, T{}, 0.0f};
    const int column = static_cast<int>(target);
    return {column, simt::load(x + column), head.bias_of(column)};
  }
};

// Sums of the coefs of a row's tokens: of those with a target, and of the others.
struct TargetCoefs {
  float own, others;
};

CPO_DEVICE TargetCoefs sum_target_coefs(const std::int64_t* targets, const float* coef, TokenRange tokens, std::int64_t target) {
  TargetCoefs sums{0.0f, 0.0f};
  for (std::int64_t m = tokens.begin; m < tokens.end; ++m) {
    (simt::load(targets + m) == target ? sums.own : sums.others) += token_coef(targets, coef, m);
  }
  return sums;
}

// The gradient at each token's own column to token_grad; tokens of equal targets get the same bits.
template <class T, class Head>
CPO_DEVICE void find_token_gradients(const BackwardArgs& args, const T* x, const LogitGradient<Head>& gradient, TokenRange tokens) {
  const RowBatch& batch = args.batch;
  for (std::int64_t n = tokens.begin + simt::thread_index(); n < tokens.end; n += simt::thread_count()) {
    const std::int64_t target = simt::load(batch.targets + n);
    if (!is_word(target, batch.vocab)) continue;
    const TargetCoefs sums = sum_target_coefs(batch.targets, args.coef, tokens, target);
    float b;
    const float raw = load_logit(x, gradient.head, target, batch.vocab, b);
    simt::store(args.token_grad + n, gradient.of_target(raw, b, sums.own, sums.others));
  }
}

template <class Out>
CPO_DEVICE void store_token_gradients(const BackwardArgs& args, Out* out_row, TokenRange tokens) {
  for (std::int64_t n = tokens.begin + simt::thread_index(); n < tokens.end; n += simt::thread_count()) {
    const std::int64_t target = simt::load(args.batch.targets + n);
    if (is_word(target, args.batch.vocab)) store_rounded(out_row + target, simt::load(args.token_grad + n));
  }
}

template <class T, class Out, class Head>
CPO_DEVICE void backward_row(const BackwardArgs& args, const Head& head, std::int64_t row, Partials& partials) {
  const RowBatch& batch = args.batch;
  const T* x = static_cast<const T*>(batch.logits) + row * batch.row_stride;
  Out* out_row = static_cast<Out*>(args.out) + row * args.out_stride;
  // Before the coefs, so that their latencies pass together.
  const float max = simt::load(args.stats.max + row), log_sum = simt::load(args.stats.log_sum + row);
  const TokenRange tokens = token_range(batch, row);
  const RowCoef coef = sum_coefs(batch, args.coef, tokens, partials);
  if (args.scale) {
    const std::int64_t target = first_target(batch, tokens);
    const bool unit = have_one_target(batch, tokens, target);
    if (simt::thread_index() == 0) {
      const float several = coef.active ? 1.0f : 0.0f;
      simt::store(args.scale + row, unit ? sum_target_coefs(batch.targets, args.coef, tokens, target).own : several);
    }
    if (unit && coef.active) return;
  }
  if (!coef.active) {
    store_zeros(out_row, batch.vocab);
    return;
  }
  const float inverse_sum = exp_approx(-log_sum);
  const LogitGradient<Head> gradient{head, max, inverse_sum, batch.slope, -coef.sum * batch.slope * inverse_sum};
  const Span span = find_span(x, batch.vocab);
  OwnToken<T> own{-1, T{}, 0.0f};
  if (batch.row_starts) {
    find_token_gradients(args, x, gradient, tokens);
    simt::block_barrier();  // the logits of the targets are read before any is overwritten
  } else {
    own = OwnToken<T>::find(x, head, span, simt::load(batch.targets + row), batch.vocab);
  }
  store_gradient(out_row, x, span, gradient, batch.vocab);
  if (own.column >= 0) store_rounded(out_row + own.column, gradient.of_target(to_float(own.raw), own.bias, coef.sum, 0.0f));
  if (batch.row_starts) {
    simt::block_barrier();  // what other threads wrote to these columns comes first
    store_token_gradients(args, out_row, tokens);
  }
}

}  // namespace cpo
