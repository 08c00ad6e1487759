// Raw logit x and bias -> y, as policies that the row kernels inline. `slope` is dy/dx up to the constant `slope0`.
#pragma once

namespace {

// y = x.
struct Identity {
  static constexpr bool kBias = false;
  float slope0;

  explicit Identity(const cpo::LogitTransform& t) : slope0(t.slope) {}
  Vec apply(const Vec& x, const Vec&) const { return x; }
  Vec slope(const Vec&) const { return set1(1.0f); }
};

// y = x * mult.
struct Scaled {
  static constexpr bool kBias = false;
  Vec mult;
  float slope0;

  explicit Scaled(const cpo::LogitTransform& t) : mult(set1(t.mult)), slope0(t.slope) {}
  Vec apply(const Vec& x, const Vec&) const { return x * mult; }
  Vec slope(const Vec&) const { return set1(1.0f); }
};

// y = (x + bias) * mult, or cap * tanh of that.
template <bool kCap>
struct General {
  static constexpr bool kBias = true;
  Vec mult;
  Vec cap;
  Vec inverse_cap;
  float slope0;

  explicit General(const cpo::LogitTransform& t)
      : mult(set1(t.mult)), cap(set1(t.cap)), inverse_cap(set1(1.0f / t.cap)), slope0(t.slope) {}
  Vec apply(const Vec& x, const Vec& bias) const {
    const Vec u = (x + bias) * mult;
    return kCap ? cap * tanh(u) : u;
  }
  Vec slope(const Vec& y) const {
    if (!kCap) return set1(1.0f);
    const Vec tanh_u = y * inverse_cap;
    return set1(1.0f) - tanh_u * tanh_u;
  }
};

// Calls run(policy) with the cheapest policy that does what is asked.
template <class Run>
inline void with_transform(const cpo::RowBatch& batch, const cpo::LogitTransform& t, Run run) {
  if (t.cap != 0.0f) {
    run(General<true>(t));
  } else if (batch.bias) {
    run(General<false>(t));
  } else if (t.mult != 1.0f) {
    run(Scaled(t));
  } else {
    run(Identity(t));
  }
}

// kPair numbers of type T in the lane order of Order, which is T itself unless T is float.
template <class Order, class T>
inline void load_for(const T* x, Vec& a, Vec& b) {
  if constexpr (sizeof(T) > sizeof(Order)) {
    match2(x, a, b, Order{});
  } else {
    load2(x, a, b);
  }
}

// y of kPair columns, in the lane order of Order. Always inlined: a call would pass vectors through memory.
template <class Order, class T, class P>
[[gnu::always_inline]] inline void load_y(const T* x, const float* bias, const P& p, Vec& a, Vec& b) {
  load_for<Order>(x, a, b);
  Vec bias_a = set1(0.0f), bias_b = set1(0.0f);
  if (P::kBias && bias) match2(bias, bias_a, bias_b, Order{});
  a = p.apply(a, bias_a);
  b = p.apply(b, bias_b);
}

// y of one column in every lane, by the same arithmetic as in the rows.
template <class T, class P>
inline Vec column_y(const T* x, const float* bias, int64_t column, const P& p) {
  const Tail<T> copies(x + column, bias ? bias + column : nullptr, 1);
  Vec a, b;
  load_y<T>(copies.x, copies.bias, p, a, b);
  return a;
}

struct TokenRange {
  int64_t begin, end;
};

inline TokenRange tokens_of(const cpo::RowBatch& batch, int64_t row) {
  if (batch.row_starts) return {batch.row_starts[row], batch.row_starts[row + 1]};
  return {row, row + 1};
}

}  // namespace
