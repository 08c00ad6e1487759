// The contrast of a group: the sums of its segments, the slopes of the ranked contrast, the coefficient of every token.
//
// For each candidate i with a strictly lower-ranked present candidate,
//   d_i = s_i - logsumexp({s_j : rank_j > rank_i}),   coef_i += f'(d_i),   coef_j -= f'(d_i) * softmax_j.
// First warps find d_i, each of its own candidates i; then threads add up coef_j, each of its own candidates j, over i in order. All
// but the input and the outputs is float64. A score of -inf is a candidate that is impossible: d_i is +inf where all below i are, and
// -inf where i itself is.
#pragma once

#include <limits>

#include "common/preference.h"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"

namespace cpo {

constexpr std::int64_t kAbsentRank = std::numeric_limits<std::int64_t>::min();  // nothing is preferred to an absent candidate

constexpr double kInfinite = std::numeric_limits<double>::infinity();
constexpr double kNotANumber = std::numeric_limits<double>::quiet_NaN();

// What the threads of a block share about the candidates of its group, in contrast_shared_bytes.
struct Candidates {
  double* score;  // later the coefficient
  double* top;    // of a winner: largest score of the candidates below it
  double* slope;  // f'(d), 0 for those that win over nobody
  double* share;  // slope / sum_j exp(s_j - top)
  std::int64_t* rank;

  CPO_DEVICE Candidates(double* memory, int capacity)
      : score(memory),
        top(memory + capacity),
        slope(memory + 2 * capacity),
        share(memory + 3 * capacity),
        rank(reinterpret_cast<std::int64_t*>(memory + 4 * capacity)) {}
};

struct Group {
  std::int64_t first;  // segment
  int count;
};

CPO_DEVICE Group find_group(const ContrastArgs& args, std::int64_t group) {
  if (!args.segment_starts) return {group * args.max_candidates, args.max_candidates};
  const std::int64_t first = simt::load(args.segment_starts + group);
  const std::int64_t count = simt::load(args.segment_starts + group + 1) - first;
  return {first - simt::load(args.segment_starts), static_cast<int>(count)};
}

struct Slots {
  std::int64_t begin, end;
};

CPO_DEVICE Slots find_slots(const ContrastArgs& args, std::int64_t segment) {
  const std::int64_t zero = simt::load(args.token_starts);
  return {simt::load(args.token_starts + segment) - zero, simt::load(args.token_starts + segment + 1) - zero};
}

// Sums of the segments, a warp each.
CPO_DEVICE void sum_segments(const ContrastArgs& args, const Group& group, const Candidates& shared) {
  for (int c = warp_index(); c < group.count; c += warp_count()) {
    const Slots slots = find_slots(args, group.first + c);
    double sum = 0.0;
    for (std::int64_t n = slots.begin + lane_index(); n < slots.end; n += kWarpSize) sum += simt::load(args.logps + n);
    sum = warp_reduce(sum, Add());
    if (lane_index() == 0) {
      shared.score[c] = sum;
      simt::store(args.sums + group.first + c, static_cast<float>(sum));
    }
  }
}

CPO_DEVICE double divisor(const ContrastArgs& args, std::int64_t length) {
  return args.length_normalized && length > 1 ? static_cast<double>(length) : 1.0;
}

// Sums to scores, and ranks; whether a score of this thread's candidates is NaN or +inf.
CPO_DEVICE bool find_scores(const ContrastArgs& args, const Group& group, const Candidates& shared) {
  bool bad = false;
  for (int c = simt::thread_index(); c < group.count; c += simt::thread_count()) {
    const std::int64_t segment = group.first + c, length = simt::load(args.lengths + segment);
    const std::int64_t rank = args.ranks ? simt::load(args.ranks + segment) : (c > 0 ? 1 : 0);
    double reward = shared.score[c];
    if (args.ref_logps && reward != -kInfinite) reward -= simt::load(args.ref_logps + segment);
    reward /= divisor(args, length);
    const double score = reward * args.preference.beta + (rank > 0 ? args.margin : 0.0);
    const bool defined = score < kInfinite;
    bad |= length > 0 && !defined;
    shared.score[c] = defined ? score : 0.0;
    shared.rank[c] = length > 0 ? rank : kAbsentRank;
  }
  return bad;
}

// The preference of each candidate that wins over another, a warp each.
CPO_DEVICE void find_preferences(const ContrastArgs& args, const Group& group, int winners, const Candidates& shared) {
  for (int i = warp_index(); i < winners; i += warp_count()) {
    const std::int64_t rank = shared.rank[i];
    double top = -kInfinite;
    std::int64_t worst = rank;
    for (int j = lane_index(); j < group.count; j += kWarpSize) {
      top = shared.rank[j] > rank ? fmax(top, shared.score[j]) : top;
      worst = Max()(worst, shared.rank[j]);
    }
    top = warp_reduce(top, Max());
    worst = warp_reduce(worst, Max());
    const double centre = top == -kInfinite ? 0.0 : top;  // where nothing below is possible, the difference would be NaN
    double total = 0.0;
    for (int j = lane_index(); j < group.count; j += kWarpSize) total += shared.rank[j] > rank ? exp(shared.score[j] - centre) : 0.0;
    total = warp_reduce(total, Add());
    if (lane_index() != 0) continue;
    const bool wins = rank != kAbsentRank && worst > rank;
    const double score = shared.score[i];
    const double difference = score == -kInfinite ? score : score - centre - log(total);
    const double slope = wins ? args.preference.slope(difference) : 0.0;
    shared.top[i] = centre;
    shared.slope[i] = slope;
    shared.share[i] = wins && total > 0.0 ? slope / total : 0.0;
  }
}

// Derivative of the group's loss by the score of candidate j.
CPO_DEVICE double score_slope(const Candidates& shared, int winners, int j) {
  double slope = j < winners ? shared.slope[j] : 0.0;
  for (int i = 0; i < winners; ++i) {
    if (shared.rank[i] < shared.rank[j] && shared.share[i] != 0.0) slope -= exp(shared.score[j] - shared.top[i]) * shared.share[i];
  }
  return slope;
}

// One score that is NaN or +inf makes NaN of every coefficient of its group, unless the contrast has no weight.
CPO_DEVICE void find_coefficients(const ContrastArgs& args, const Group& group, int winners, bool poisoned, const Candidates& shared) {
  const double mle_scale = args.num_target_tokens ? args.mle_scale / simt::load(args.num_target_tokens) : args.mle_scale;
  for (int c = simt::thread_index(); c < group.count; c += simt::thread_count()) {
    const std::int64_t length = simt::load(args.lengths + group.first + c);
    double coef = 0.0;
    if (shared.rank[c] != kAbsentRank) {
      coef = score_slope(shared, winners, c) * args.preference.beta * args.contrast_scale / divisor(args, length);
      coef -= shared.rank[c] == 0 ? mle_scale : 0.0;
      coef = poisoned && args.contrast_scale != 0.0 ? kNotANumber : coef;
    }
    shared.score[c] = coef;  // which no other thread reads before the barrier
  }
}

CPO_DEVICE void store_coefficients(const ContrastArgs& args, const Group& group, const Candidates& shared) {
  for (int c = warp_index(); c < group.count; c += warp_count()) {
    const Slots slots = find_slots(args, group.first + c);
    const float coef = static_cast<float>(shared.score[c]);
    for (std::int64_t n = slots.begin + lane_index(); n < slots.end; n += kWarpSize) simt::store(args.coef + n, coef);
  }
}

CPO_DEVICE void contrast_group(const ContrastArgs& args, std::int64_t index, const Candidates& shared) {
  const Group group = find_group(args, index);
  const int winners = args.ranks ? group.count : 1;
  sum_segments(args, group, shared);
  simt::block_barrier();
  const bool poisoned = simt::block_any(find_scores(args, group, shared));
  find_preferences(args, group, winners, shared);
  simt::block_barrier();
  find_coefficients(args, group, winners, poisoned, shared);
  simt::block_barrier();
  store_coefficients(args, group, shared);
}

}  // namespace cpo
