// The contrast of groups of candidates, and the loss and metrics made of it: what cpo_kernels/objective.py computes, in float64 loops
// over the few numbers that there are. csrc/cuda/contrast.cuh has the same formulas.
#pragma once

#include <cstdint>

#include "common/preference.h"

namespace cpo {

// S segments in G groups; ref_logps and ranks may be null, and so may segment_starts, where every group has max_candidates.
struct GroupArgs {
  const std::int64_t* segment_starts;  // (G + 1,), counted from the first of them
  const std::int64_t* lengths;         // (S,) tokens present in each segment; 0: an absent candidate
  const float* ref_logps;              // (S,) sums
  const std::int64_t* ranks;           // (S,); null: 0, 1, ..., 1 in each group
  std::int64_t segments, groups, max_candidates;
  Preference preference;
  double margin;
  bool length_normalized;
};

struct ContrastArgs {
  const float* logps;                // (n,) in segment order, 0 in slots without a token
  const std::int64_t* token_starts;  // (S + 1,), counted from the first of them
  std::int64_t slots;                // n
  double contrast_scale, mle_scale;  // factors of the two terms' derivatives
  float* sums;                       // (S,) out
  float* coef;                       // (n,) out
};

struct SummaryArgs {
  const float* sums;  // (S,)
  double contrast_weight, mle_weight, num_groups;
  double num_target_tokens;  // 0: the tokens of the candidates of rank 0
  float* logps;              // (S,) out
  float* rewards;            // (S,) out
  float* numbers;            // (5,) out: loss, contrastive loss, negative log-likelihood, accuracy, margin
};

// The tokens of the candidates of rank 0; -1 if a present candidate has a rank below 0, or a group has no present one of rank 0, or,
// if it `contrasts`, none behind. Of the groups it reads the starts, lengths and ranks.
std::int64_t count_targets(const GroupArgs& groups, bool contrasts);

// All throw std::invalid_argument for starts that do not count the segments and slots.
void contrast(const GroupArgs& groups, const ContrastArgs& args);
void summarize(const GroupArgs& groups, const SummaryArgs& args);

}  // namespace cpo
