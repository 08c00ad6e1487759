// Softmax gradient of each row: one read and one write of the logits, in place or not.
//
// A gradient narrower than the logits (Out of T) may be written over them as well: row r's begins where its logits begin. Columns
// are taken in ascending order and kPair are loaded before their gradient is stored, which lies at or before them: no logit is
// overwritten before it is read. That needs loads and stores of different types to keep their order (-fno-strict-aliasing).
#pragma once

namespace {

template <class T>
inline void zero_row(T* out, int64_t vocab) {
  __builtin_memset(static_cast<void*>(out), 0, static_cast<size_t>(vocab) * sizeof(T));
}

// Whether any token of the row has a gradient; NaN is one.
inline bool row_is_active(const cpo::BackwardArgs& args, TokenRange tokens) {
  for (int64_t n = tokens.begin; n < tokens.end; ++n) {
    if (args.batch.targets[n] != cpo::kNoToken && args.coef[n] != 0.0f) return true;
  }
  return false;
}

template <class P>
struct RowGradient {
  const P& p;
  Vec max;
  Vec factor;  // -(sum of coefs) * slope0 / sum_j exp(y_j - max): what exp(y - max) * slope is multiplied by

  // Always inlined, like what else the loops over columns call: a call would pass vectors through memory.
  [[gnu::always_inline]] Vec operator()(const Vec& y) const { return exp(y - max) * p.slope(y) * factor; }
};

// The gradient at each token's own column, before an in-place pass overwrites it. Kept in float32 until it is rounded once.
template <class T, class P>
inline void token_gradients(const cpo::BackwardArgs& args, const T* x, TokenRange tokens, const RowGradient<P>& gradient) {
  for (int64_t n = tokens.begin; n < tokens.end; ++n) {
    const int64_t target = args.batch.targets[n];
    if (target == cpo::kNoToken) continue;
    const Vec y = column_y(x, args.batch.bias, target, gradient.p);
    const Vec own = set1(args.token_grad[n] * gradient.p.slope0) * gradient.p.slope(y);
    args.token_grad[n] = first_lane(own + gradient(y));
  }
}

template <class Out>
inline void store_column(Out* column, float value) {
  Out rounded[kPair];
  store2(rounded, set1(value), set1(value));
  *column = rounded[0];
}

template <class T, class Out, class P>
inline void gradient_row(const T* x, Out* out, const float* bias, int64_t vocab, const RowGradient<P>& gradient) {
  Vec a, b;
  int64_t j = 0;
  for (; j + kPair <= vocab; j += kPair) {
    prefetch_ahead(x + j);
    load_y<Out>(x + j, bias ? bias + j : nullptr, gradient.p, a, b);
    store2(out + j, gradient(a), gradient(b));
  }
  if (j < vocab) {
    const int n = static_cast<int>(vocab - j);
    const Tail<T> tail(x + j, bias ? bias + j : nullptr, n);
    Out rounded[kPair];
    load_y<Out>(tail.x, tail.bias, gradient.p, a, b);
    store2(rounded, gradient(a), gradient(b));
    for (int i = 0; i < n; ++i) out[j + i] = rounded[i];
  }
}

template <class T, class Out, class P>
void backward_rows(const cpo::BackwardArgs& args, const P& p, int64_t begin, int64_t end) {
  const cpo::RowBatch& batch = args.batch;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(batch.logits) + row * batch.row_stride;
    Out* out = static_cast<Out*>(args.out) + row * args.out_stride;
    const TokenRange tokens = tokens_of(batch, row);
    if (!row_is_active(args, tokens)) {
      zero_row(out, batch.vocab);
      continue;
    }
    const double coef = static_cast<double>(args.coef_sum[row]) * static_cast<double>(p.slope0);
    const double factor = -coef * ::exp(-static_cast<double>(args.logsum[row]));
    const RowGradient<P> gradient{p, set1(args.max[row]), set1(static_cast<float>(factor))};
    token_gradients(args, x, tokens, gradient);
    gradient_row(x, out, batch.bias, batch.vocab, gradient);
    for (int64_t n = tokens.begin; n < tokens.end; ++n) {
      if (batch.targets[n] != cpo::kNoToken) store_column(out + batch.targets[n], args.token_grad[n]);
    }
  }
}

template <class T, class Out>
void backward(const cpo::BackwardArgs& args, int64_t begin, int64_t end) {
  with_transform(args.batch, args.transform, [&](const auto& p) { backward_rows<T, Out>(args, p, begin, end); });
}

}  // namespace
