// What lies between a raw logit x and the softmax: y = (x + bias) * mult, or cap * tanh((x + bias) * mult).
#pragma once

#include "cuda/simt.h"
#include "cuda/vectors.cuh"

namespace cpo {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLowest = -3.402823466e38f;  // finite, so that kLowest - kLowest and -inf - kLowest are no NaN

// e^x, 0 below -87. Subtract a maximum from x, not from x * kLog2E, whose rounding is an error of 1e-3 at logits of 1e4.
CPO_DEVICE float exp_approx(float x) { return simt::exp2_approx(x * kLog2E); }

// 1 / (1 + e^(2u)); the square of a root is half the price of a division.
CPO_DEVICE float sigmoid_of_minus_twice(float u) {
  const float r = simt::rsqrt_approx(1.0f + simt::exp2_approx(u * (2.0f * kLog2E)));
  return r * r;
}

// An odd polynomial near 0, where 1 - 2 / (1 + e^(2u)) would cancel.
CPO_DEVICE float tanh_near(float u) {
  const float z = u * u;
  float p = -5.717045e-3f * z + 2.0650588e-2f;
  p = p * z - 5.3743497e-2f;
  p = p * z + 1.3331491e-1f;
  p = p * z - 3.3333284e-1f;
  return u * z * p + u;
}

CPO_DEVICE float tanh_far(float u) { return copysignf(1.0f - 2.0f * sigmoid_of_minus_twice(fabsf(u)), u); }

// Relative error below 8 * 2^-23. Both are computed: as operands of the choice itself they become a branch for every element.
CPO_DEVICE float tanh_approx(float u) {
  const float near = tanh_near(u), far = tanh_far(u);
  return fabsf(u) < 0.625f ? near : far;
}

// The same number by a branch, for kernels without registers to spare.
CPO_DEVICE float tanh_by_branch(float u) { return fabsf(u) < 0.625f ? tanh_near(u) : tanh_far(u); }

// 1 - tanh(u)^2. Of |u|, so that its sigmoid is the smaller one: the difference from 1 does not cancel, however steep the cap.
CPO_DEVICE float tanh_slope(float u) {
  const float s = sigmoid_of_minus_twice(fabsf(u));
  return 4.0f * s * (1.0f - s);
}

// What the flags leave out is not computed: a bias, a factor other than 1, a softcap.
template <bool kBias, bool kScaled, bool kCapped>
struct Head {
  // Threads of a block at most, and blocks on a multiprocessor: 64 registers a thread, or 85 for what a bias or a softcap adds.
  static constexpr int kThreads = kBias || kCapped ? 256 : 512;
  static constexpr int kBlocks = kBias || kCapped ? 3 : 2;

  const float* bias;  // (V,)
  float mult;
  float cap;

  CPO_DEVICE float scaled(float x, float b) const {
    if (kBias) x += b;
    return kScaled ? x * mult : x;
  }

  CPO_DEVICE float logit(float x, float b) const {
    const float u = scaled(x, b);
    return kCapped ? cap * tanh_approx(u) : u;
  }

  // dy/dx in units of its value at y = 0.
  CPO_DEVICE float slope(float x, float b) const { return kCapped ? tanh_slope(scaled(x, b)) : 1.0f; }

  CPO_DEVICE float bias_of(int column) const { return kBias ? simt::load(bias + column) : 0.0f; }

  // Of K columns from one on.
  template <int K>
  CPO_DEVICE void load_bias(int column, float (&b)[K]) const {
    if (kBias && is_aligned(bias + column, kVectorBytes)) {
      CPO_UNROLL
      for (int k = 0; k < K; k += 4) {
        const simt::Words4 v = simt::load(reinterpret_cast<const simt::Words4*>(bias + column + k));
        CPO_UNROLL
        for (int i = 0; i < 4; ++i) b[k + i] = simt::float_of_bits(v.word[i]);
      }
    } else {
      CPO_UNROLL
      for (int k = 0; k < K; ++k) b[k] = bias_of(column + k);
    }
  }
};

// Calls run(head) with the cheapest head that does what is asked; cap 0 means none.
template <class Run>
inline void with_head(const float* bias, float mult, float cap, Run run) {
  if (cap != 0.0f) {
    if (bias) {
      run(Head<true, true, true>{bias, mult, cap});
    } else {
      run(Head<false, true, true>{bias, mult, cap});
    }
  } else if (bias) {
    run(Head<true, true, false>{bias, mult, cap});
  } else if (mult != 1.0f) {
    run(Head<false, true, false>{bias, mult, cap});
  } else {
    run(Head<false, false, false>{bias, mult, cap});
  }
}

}  // namespace cpo
