// One preference is a winner over the candidates that rank below it. This is the slope of its loss by the difference of scores
//   d = s_winner - logsumexp({s_j : rank_j > rank_winner}),
// in float64, because these are a few hundred numbers.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace cpo {

// The losses of cpo_kernels/loss_table.py that the kernels have, with their codes there: kPlackettLuce is its "plackett_luce".
// tests/kernels/cuda/test_cuda_contrast.py reads this line and holds it against the table.
enum class Loss : int { kPlackettLuce = 0, kHinge = 1, kIpo = 2 };
constexpr int kNumLosses = 3;

struct Preference {
  Loss loss;
  double beta;
  double label_smoothing;

  // Computes 1 / (1 + exp(-x)) for any x, with neither overflow nor cancellation.
  static CPO_HOST_DEVICE double sigmoid(double x) {
    const double small = exp(-fabs(x));
    return (x < 0 ? small : 1.0) / (1.0 + small);
  }

  // At an infinite d the limit, or 0 where that is infinite.
  CPO_HOST_DEVICE double slope(double d) const {
    if (loss == Loss::kHinge) return d < 1.0 ? -1.0 : 0.0;
    if (loss == Loss::kIpo) return fabs(d) < HUGE_VAL ? 2.0 * (d - 0.5) / (beta * beta) : 0.0;
    return label_smoothing * sigmoid(d) - (1.0 - label_smoothing) * sigmoid(-d);
  }
};

}  // namespace cpo
