// Raw logit x (and bias b) -> y, as policies that the row kernels inline.
//
// `key` is what the running maximum is taken of, `value` turns one key into y, and `shifted` gives y - ref, exact to one
// rounding even where y and ref are +-1e4. `slope` is dy/dx up to the constant `slope0`.
#pragma once

namespace {

// y = x * mult with mult > 0: the maximum is taken of x itself, and the subtraction is fused with the product.
struct ScaleOnly {
  static constexpr bool kBias = false;
  Vec mult;
  float scalar_mult;
  float slope0;

  explicit ScaleOnly(const cpo::LogitTransform& t) : mult(set1(t.mult)), scalar_mult(t.mult), slope0(t.slope) {}
  Vec key(const Vec& x, const Vec&) const { return x; }
  float value(float key) const { return key * scalar_mult; }
  Vec shifted(const Vec& key, const Vec& minus_ref) const { return fma(key, mult, minus_ref); }
  Vec slope(const Vec&) const { return set1(1.0f); }
};

// y = (x + bias) * mult, or cap * tanh of it.
template <bool kCap>
struct General {
  static constexpr bool kBias = true;
  Vec mult;
  Vec cap;
  Vec inverse_cap;
  float slope0;

  explicit General(const cpo::LogitTransform& t)
      : mult(set1(t.mult)), cap(set1(t.cap)), inverse_cap(set1(1.0f / t.cap)), slope0(t.slope) {}
  Vec key(const Vec& x, const Vec& bias) const {
    const Vec u = (x + bias) * mult;
    return kCap ? cap * tanh(u) : u;
  }
  float value(float key) const { return key; }
  Vec shifted(const Vec& key, const Vec& minus_ref) const { return key + minus_ref; }
  Vec slope(const Vec& key) const {
    if (!kCap) return set1(1.0f);
    const Vec tanh_u = key * inverse_cap;
    return set1(1.0f) - tanh_u * tanh_u;
  }
};

inline bool scale_only(const cpo::RowBatch& batch, const cpo::LogitTransform& t) {
  return batch.bias == nullptr && t.cap == 0.0f && t.mult > 0.0f;
}

// Reads the keys of kPair columns.
template <class T, class P>
inline void load_keys(const T* x, const float* bias, const P& p, Vec& a, Vec& b) {
  load2(x, a, b);
  Vec bias_a = set1(0.0f), bias_b = set1(0.0f);
  if (P::kBias && bias) match2(bias, bias_a, bias_b, T{});
  a = p.key(a, bias_a);
  b = p.key(b, bias_b);
}

// The key of one column, by the same arithmetic as in the rows.
template <class T, class P>
inline Vec column_key(const T* x, const float* bias, int64_t column, const P& p) {
  const Tail<T> copies(x + column, bias ? bias + column : nullptr, 1);
  Vec a, b;
  load_keys(copies.x, copies.bias, p, a, b);
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
