#include "cpu/contrast.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace cpo {
namespace {

constexpr std::int64_t kAbsentRank = std::numeric_limits<std::int64_t>::min();  // nothing is preferred to an absent candidate
constexpr double kInfinite = std::numeric_limits<double>::infinity();
constexpr double kNotANumber = std::numeric_limits<double>::quiet_NaN();

// log(1 + exp(x)) for any x.
double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }

// The loss whose derivative is Preference::slope; a term of weight 0 is left out.
double preference_loss(const Preference& preference, double d) {
  if (preference.loss == Loss::kHinge) return std::max(1.0 - d, 0.0);
  if (preference.loss == Loss::kIpo) return (d - 0.5) * (d - 0.5) / (preference.beta * preference.beta);
  const double flipped = preference.label_smoothing > 0.0 ? preference.label_smoothing * softplus(d) : 0.0;
  return flipped + (1.0 - preference.label_smoothing) * softplus(-d);
}

// A winner and the candidates that rank below it, at least one.
struct Comparison {
  double difference;  // s_winner - logsumexp of theirs: +inf where all of them are impossible, -inf where the winner is
  double centre;      // their largest score, 0 where all are impossible
  double total;       // sum of exp(s_j - centre)
};

// One group: its candidates with their scores.
struct Group {
  std::int64_t first = 0, count = 0;
  bool poisoned = false;  // a present candidate's score is NaN or +inf
  std::vector<std::int64_t> rank;
  std::vector<double> logp, reward, score;

  void resize(std::int64_t most) {
    rank.resize(most);
    logp.resize(most);
    reward.resize(most);
    score.resize(most);
  }

  // Fills the group from the sums of its candidates.
  void find_scores(const GroupArgs& args, const double* sums) {
    poisoned = false;
    for (std::int64_t c = 0; c < count; ++c) {
      const std::int64_t segment = first + c, length = args.lengths[segment];
      const std::int64_t given = args.ranks ? args.ranks[segment] : (c > 0 ? 1 : 0);
      const double divisor = args.length_normalized && length > 1 ? static_cast<double>(length) : 1.0;
      double over = sums[c];
      if (args.ref_logps && over != -kInfinite) over -= args.ref_logps[segment];
      logp[c] = sums[c] / divisor;
      reward[c] = over / divisor;
      const double value = reward[c] * args.preference.beta + (given > 0 ? args.margin : 0.0);
      const bool defined = value < kInfinite;
      poisoned |= length > 0 && !defined;
      score[c] = defined ? value : 0.0;
      rank[c] = length > 0 ? given : kAbsentRank;
    }
  }

  // How many candidates may win: without ranks the first one alone.
  std::int64_t winners(const GroupArgs& args) const { return args.ranks ? count : std::min<std::int64_t>(count, 1); }

  bool wins(std::int64_t i, std::int64_t worst) const { return rank[i] != kAbsentRank && worst > rank[i]; }

  std::int64_t worst_rank() const { return *std::max_element(rank.begin(), rank.begin() + count); }

  Comparison compare(std::int64_t i) const {
    double top = -kInfinite, total = 0.0;
    for (std::int64_t j = 0; j < count; ++j) top = rank[j] > rank[i] ? std::max(top, score[j]) : top;
    const double centre = top == -kInfinite ? 0.0 : top;
    for (std::int64_t j = 0; j < count; ++j) total += rank[j] > rank[i] ? std::exp(score[j] - centre) : 0.0;
    return {score[i] == -kInfinite ? score[i] : score[i] - centre - std::log(total), centre, total};
  }
};

// Calls use(group) for every group, after checking that the starts count the segments.
template <class Use>
void for_groups(const GroupArgs& args, Use use) {
  Group group;
  group.resize(args.max_candidates);
  std::int64_t next = 0;
  for (std::int64_t g = 0; g < args.groups; ++g) {
    group.first = next;
    group.count = args.segment_starts ? args.segment_starts[g + 1] - args.segment_starts[g] : args.max_candidates;
    next += group.count;
    if (group.count < 0 || group.count > args.max_candidates || next > args.segments) {
      throw std::invalid_argument("group " + std::to_string(g) + " has " + std::to_string(group.count) + " of " +
                                  std::to_string(args.segments) + " segments; expected 0 to " + std::to_string(args.max_candidates));
    }
    use(group);
  }
  if (next != args.segments) {
    throw std::invalid_argument("the groups have " + std::to_string(next) + " of " + std::to_string(args.segments) + " segments");
  }
}

// Derivatives of the group's loss by the scores.
void add_slopes(const GroupArgs& args, const Group& group, double* slopes) {
  std::fill_n(slopes, group.count, 0.0);
  if (group.count == 0) return;
  const std::int64_t worst = group.worst_rank();
  for (std::int64_t i = 0; i < group.winners(args); ++i) {
    if (!group.wins(i, worst)) continue;
    const Comparison compared = group.compare(i);
    const double slope = args.preference.slope(compared.difference);
    slopes[i] += slope;
    if (compared.total == 0.0) continue;
    for (std::int64_t j = 0; j < group.count; ++j) {
      if (group.rank[j] > group.rank[i]) slopes[j] -= slope * std::exp(group.score[j] - compared.centre) / compared.total;
    }
  }
}

double group_loss(const GroupArgs& args, const Group& group) {
  if (group.count == 0) return 0.0;
  const std::int64_t worst = group.worst_rank();
  double loss = group.poisoned ? kNotANumber : 0.0;
  for (std::int64_t i = 0; i < group.winners(args); ++i) {
    if (group.wins(i, worst)) loss += preference_loss(args.preference, group.compare(i).difference);
  }
  return loss;
}

// The rewards of candidates of rank 0, or of the others.
struct Rewards {
  double sum = 0.0, smallest = kInfinite, largest = -kInfinite;
  std::int64_t count = 0;

  void add(double reward) {
    sum += reward;
    smallest = std::min(smallest, reward);
    largest = std::max(largest, reward);
    ++count;
  }
  double mean() const { return sum / static_cast<double>(count); }
};

}  // namespace

void contrast(const GroupArgs& groups, const ContrastArgs& args) {
  const std::int64_t zero = args.token_starts[0];
  for (std::int64_t s = 0; s < groups.segments; ++s) {
    const std::int64_t begin = args.token_starts[s], end = args.token_starts[s + 1];
    if (begin > end || end - zero > args.slots) {
      throw std::invalid_argument("segment " + std::to_string(s) + " has the slots " + std::to_string(begin - zero) + " to " +
                                  std::to_string(end - zero) + " of " + std::to_string(args.slots));
    }
  }
  std::vector<double> sums(groups.max_candidates), slopes(groups.max_candidates);
  for_groups(groups, [&](Group& group) {
    const std::int64_t* starts = args.token_starts + group.first;
    for (std::int64_t c = 0; c < group.count; ++c) {
      double sum = 0.0;
      for (std::int64_t n = starts[c] - zero; n < starts[c + 1] - zero; ++n) sum += args.logps[n];
      sums[c] = sum;
      args.sums[group.first + c] = static_cast<float>(sum);
    }
    group.find_scores(groups, sums.data());
    add_slopes(groups, group, slopes.data());
    const bool undefined = group.poisoned && args.contrast_scale != 0.0;
    for (std::int64_t c = 0; c < group.count; ++c) {
      double coef = 0.0;
      if (group.rank[c] != kAbsentRank) {
        const std::int64_t length = groups.length_normalized ? groups.lengths[group.first + c] : 1;
        coef = slopes[c] * groups.preference.beta * args.contrast_scale / static_cast<double>(length);
        coef -= group.rank[c] == 0 ? args.mle_scale : 0.0;
        coef = undefined ? kNotANumber : coef;
      }
      std::fill(args.coef + starts[c] - zero, args.coef + starts[c + 1] - zero, static_cast<float>(coef));
    }
  });
}

std::int64_t count_targets(const GroupArgs& groups, bool contrasts) {
  std::int64_t tokens = 0;
  bool sound = true;
  for_groups(groups, [&](const Group& group) {
    bool best = false, behind = false;
    for (std::int64_t c = 0; c < group.count; ++c) {
      const std::int64_t length = groups.lengths[group.first + c];
      if (length <= 0) continue;
      const std::int64_t rank = groups.ranks ? groups.ranks[group.first + c] : (c > 0 ? 1 : 0);
      sound &= rank >= 0;
      best |= rank == 0;
      behind |= rank > 0;
      tokens += rank == 0 ? length : 0;
    }
    sound &= best && (behind || !contrasts);
  });
  return sound ? tokens : -1;
}

void summarize(const GroupArgs& groups, const SummaryArgs& args) {
  std::vector<double> sums(groups.max_candidates);
  double contrastive = 0.0, likelihood = 0.0, wins = 0.0, counted = 0.0, margin = 0.0, tokens = 0.0;
  for_groups(groups, [&](Group& group) {
    std::copy_n(args.sums + group.first, group.count, sums.begin());
    group.find_scores(groups, sums.data());
    contrastive += group_loss(groups, group);
    Rewards best, others;
    bool known = true;
    for (std::int64_t c = 0; c < group.count; ++c) {
      const bool present = group.rank[c] != kAbsentRank;
      const double reward = group.reward[c];
      args.logps[group.first + c] = static_cast<float>(group.logp[c]);
      args.rewards[group.first + c] = present ? static_cast<float>(groups.preference.beta * reward) : 0.0f;
      if (!present) continue;
      known &= reward == reward;
      if (group.rank[c] == 0) {
        best.add(reward);
        likelihood += sums[c];
        tokens += static_cast<double>(groups.lengths[group.first + c]);
      } else if (group.rank[c] > 0) {
        others.add(reward);
      }
    }
    if (best.count == 0 || others.count == 0) return;
    counted += 1.0;
    wins += known && best.smallest > others.largest ? 1.0 : 0.0;
    margin += (best.mean() - others.mean()) * groups.preference.beta;
  });
  const double contrastive_loss = contrastive / args.num_groups;
  const double divisor = args.num_target_tokens > 0.0 ? args.num_target_tokens : std::max(tokens, 1.0);
  const double nll = -likelihood / divisor;
  // A term of weight 0 is left out: 0 * inf is NaN.
  double loss = args.contrast_weight != 0.0 ? args.contrast_weight * contrastive_loss : 0.0;
  loss += args.mle_weight != 0.0 ? args.mle_weight * nll : 0.0;
  const double numbers[] = {loss, contrastive_loss, nll, wins / counted, margin / counted};
  std::transform(std::begin(numbers), std::end(numbers), args.numbers, [](double x) { return static_cast<float>(x); });
}

}  // namespace cpo
