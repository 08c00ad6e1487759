// Statistics, log-probabilities and unit gradient of a row in one read and one write.
//
// Where all tokens of a row that count have one target, the gradient by its logits is (onehot - softmax) * slope times the sum of
// their coefs. This unit gradient is written before any coef is known; row_backward finishes the other rows.
//
// A cluster takes a row. Each of its blocks keeps a slice of it in shared memory while the softmax is summed, and the first one the
// columns off the vectors as well. After the barrier in the middle nothing of the row is read any more, so that the gradient may lie
// over it, narrow or not.
#pragma once

#include "cuda/cluster.h"
#include "cuda/row_backward.cuh"

namespace cpo {

constexpr int kMaxEdges = 16;

// At the front of a block's shared memory; its slice comes after it.
struct alignas(16) SliceHeader {
  Partials partials;
  float max, sum;          // of this block's part of the row
  float edges[kMaxEdges];  // raw logits before and after the vectors
};

// Vectors [begin, end) of the span, held by this block.
template <class T>
struct Slice {
  Span span;
  int rank;
  int size;  // of a block's slice, the last ones may have less
  int begin, end;

  CPO_DEVICE Slice(const T* x, int vocab) : span(find_span(x, vocab)), rank(simt::cluster_rank()) {
    size = (span.vectors + simt::cluster_size() - 1) / simt::cluster_size();
    begin = rank * size < span.vectors ? rank * size : span.vectors;
    end = begin + size < span.vectors ? begin + size : span.vectors;
  }

  // Found anew each time: as a member, its address would be one that may lie anywhere.
  static CPO_DEVICE SliceHeader& header() { return simt::shared_memory<SliceHeader>(); }
  static CPO_DEVICE simt::Words4* vectors() { return reinterpret_cast<simt::Words4*>(&header() + 1); }

  CPO_DEVICE bool is_edge(int column) const { return column < span.lead || column >= span.tail; }

  CPO_DEVICE bool holds(int column) const {
    if (is_edge(column)) return rank == 0;
    const int i = (column - span.lead) / kVectorSize<T>;
    return i >= begin && i < end;
  }

  // Raw logit of a column that the slice holds.
  CPO_DEVICE float at(int column) const {
    if (is_edge(column)) return header().edges[column < span.lead ? column : column - span.tail + span.lead];
    return to_float(reinterpret_cast<const T*>(vectors())[column - span.lead - begin * kVectorSize<T>]);
  }
};

template <class T>
struct KeepInSlice {
  const Slice<T>& slice;
  CPO_DEVICE void operator()(int i, const simt::Words4& v) const { slice.vectors()[i - slice.begin] = v; }
};

// Reads the row into the cluster's shared memory; its softmax. Ends with the barrier after which the row may be overwritten.
template <class T, class Head>
CPO_DEVICE OnlineSoftmax read_row(const Slice<T>& slice, const T* x, const Head& head, int vocab) {
  OnlineSoftmax mine;
  add_vectors(mine, x, slice.span, head, slice.begin, slice.end, KeepInSlice<T>{slice});
  if (slice.rank == 0) {
    add_edges(mine, x, slice.span, head, vocab);
    const int t = simt::thread_index();
    const int column = t < slice.span.lead ? t : slice.span.tail + t - slice.span.lead;
    if (column < vocab) slice.header().edges[t] = to_float(simt::load(x + column));
  }
  const OnlineSoftmax part = block_softmax(mine, slice.header().partials);
  if (simt::thread_index() == 0) {
    slice.header().max = part.max;
    slice.header().sum = part.sum;
  }
  simt::cluster_barrier();
  OnlineSoftmax whole;
  for (int rank = 0; rank < simt::cluster_size(); ++rank) whole.max = fmaxf(whole.max, simt::load_remote(&slice.header().max, rank));
  for (int rank = 0; rank < simt::cluster_size(); ++rank) {
    whole.sum += simt::load_remote(&slice.header().sum, rank) * exp_approx(simt::load_remote(&slice.header().max, rank) - whole.max);
  }
  return whole;
}

// Each by the block that holds its target; those without a word, by the first.
template <class T, class Head>
CPO_DEVICE void store_logps(const ForwardArgs& args, const Slice<T>& slice, const Head& head, TokenRange tokens, float max, float log_sum) {
  for (std::int64_t n = tokens.begin + simt::thread_index(); n < tokens.end; n += simt::thread_count()) {
    const std::int64_t target = simt::load(args.batch.targets + n);
    if (!is_word(target, args.batch.vocab)) {
      if (slice.rank == 0) simt::store(args.logps + n, target == kNoToken ? 0.0f : kNan);
    } else if (slice.holds(static_cast<int>(target))) {
      const int column = static_cast<int>(target);
      simt::store(args.logps + n, head.logit(slice.at(column), head.bias_of(column)) - max - log_sum);
    }
  }
}

template <class T, class Out, class Head>
CPO_DEVICE void store_slice(const Slice<T>& slice, Out* out_row, const LogitGradient<Head>& gradient, int vocab) {
  constexpr int K = kVectorSize<T>;
  const bool aligned = is_aligned(out_row + slice.span.lead, kStoreBytes<Out, K>);
  for (int i = slice.begin + simt::thread_index(); i < slice.end; i += simt::thread_count()) {
    const int column = slice.span.lead + i * K;
    float b[K], g[K];
    gradient.head.load_bias(column, b);
    unpack(slice.vectors()[i - slice.begin], g, T{});
    CPO_UNROLL
    for (int k = 0; k < K; ++k) g[k] = gradient(g[k], b[k]);
    store_columns(out_row + column, g, aligned);
  }
  if (slice.rank != 0) return;
  const int t = simt::thread_index();
  const int column = t < slice.span.lead ? t : slice.span.tail + t - slice.span.lead;
  if (column < vocab) store_rounded(out_row + column, gradient(slice.at(column), gradient.head.bias_of(column)));
}

template <class T, class Out, class Head>
CPO_DEVICE void unit_row(const UnitArgs& args, const Head& head) {
  const RowBatch& batch = args.forward.batch;
  const std::int64_t row = simt::block_index() / simt::cluster_size();
  const T* x = static_cast<const T*>(batch.logits) + row * batch.row_stride;
  Out* out_row = static_cast<Out*>(args.out) + row * args.out_stride;
  const TokenRange tokens = token_range(batch, row);
  const std::int64_t target = first_target(batch, tokens);
  const Slice<T> slice(x, batch.vocab);

  float max = 0.0f, log_sum = 0.0f;
  if (target != kNoToken) {
    const OnlineSoftmax softmax = read_row(slice, x, head, batch.vocab);
    max = softmax.max;
    log_sum = logf(softmax.sum);
  }
  if (slice.rank == 0 && simt::thread_index() == 0) {
    simt::store(args.forward.stats.max + row, max);
    simt::store(args.forward.stats.log_sum + row, log_sum);
  }
  store_logps(args.forward, slice, head, tokens, max, log_sum);
  if (target == kNoToken) {
    store_zeros(out_row, batch.vocab, slice.rank, simt::cluster_size());
    return;
  }
  if (have_one_target(batch, tokens, target)) {
    const float inverse_sum = exp_approx(-log_sum);
    const LogitGradient<Head> gradient{head, max, inverse_sum, batch.slope, -batch.slope * inverse_sum};
    store_slice(slice, out_row, gradient, batch.vocab);
    simt::block_barrier();  // what another thread wrote to the column of the target comes first
    if (simt::thread_index() == 0 && is_word(target, batch.vocab) && slice.holds(static_cast<int>(target))) {
      const int column = static_cast<int>(target);
      store_rounded(out_row + column, gradient.of_target(slice.at(column), gradient.head.bias_of(column), 1.0f, 0.0f));
    }
  }
  simt::cluster_meet();  // the other blocks have read this one's part of the sum
}

}  // namespace cpo
