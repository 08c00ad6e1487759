#include "cpu/row_dispatch.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/parallel.h"
#include "cpu/row_tokens.h"

namespace cpo {
namespace {

// Fewer logits than this for each thread are not worth waking it.
constexpr std::int64_t kMinLogitsPerThread = 16384;
// Several shares a thread, handed out as threads become free: rows without tokens cost nothing, and cores may be busy.
constexpr std::int64_t kSharesPerThread = 8;

int team_for(std::int64_t logits, std::int64_t shares, int threads) {
  return static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>({threads, logits / kMinLogitsPerThread, shares})));
}

template <class Work>
void for_shares(std::int64_t count, int team, const Work& work) {
  const auto task = [](const void* context, std::int64_t i) { (*static_cast<const Work*>(context))(i); };
  parallel_for(count, team, task, &work);
}

void check_indices(const char* what, const std::int64_t* indices, std::int64_t count, std::int64_t size) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (indices[i] < 0 || indices[i] >= size) {
      throw std::invalid_argument(std::string(what) + " " + std::to_string(indices[i]) + " is not in [0, " + std::to_string(size) + ")");
    }
  }
}

template <class Args>
void for_rows(void (*kernel)(const Args&, std::int64_t, std::int64_t), const Args& args, int threads) {
  for_row_shares(args.batch, threads, [&](std::int64_t begin, std::int64_t end) { kernel(args, begin, end); });
}

}  // namespace

void for_row_shares(const RowBatch& batch, int threads, const std::function<void(std::int64_t, std::int64_t)>& work) {
  const std::int64_t rows = batch.rows;
  const int team = team_for(rows * batch.vocab, rows, threads);
  if (team == 1) return work(0, rows);
  const std::int64_t share = std::max<std::int64_t>(1, rows / (team * kSharesPerThread));
  const std::int64_t shares = (rows + share - 1) / share;
  for_shares(shares, team, [&](std::int64_t i) { work(i * share, std::min(rows, (i + 1) * share)); });
}

void row_forward(Isa isa, DType dtype, const ForwardArgs& args, int threads) {
  check_tokens(args.batch);
  for_rows(row_kernels(isa).forward[static_cast<int>(dtype)], args, threads);
}

void row_backward(Isa isa, DType dtype, DType out_dtype, const BackwardArgs& args, float* coef_sum, int threads) {
  const auto kernel = row_kernels(isa).backward[static_cast<int>(dtype)][static_cast<int>(out_dtype)];
  if (!kernel) {
    throw std::invalid_argument("no gradient of dtype code " + std::to_string(static_cast<int>(out_dtype)) +
                                " for logits of dtype code " + std::to_string(static_cast<int>(dtype)));
  }
  check_tokens(args.batch);
  sum_coefs(args.batch, args.coef, coef_sum, args.token_grad);
  for_rows(kernel, args, threads);
}

void column_stats(Isa isa, DType dtype, const ColumnArgs& args, int threads) {
  const auto kernel = row_kernels(isa).column_stats[static_cast<int>(dtype)];
  const std::int64_t shares = (args.vocab + kColumnsAtOnce - 1) / kColumnsAtOnce;
  const int team = team_for(args.rows * args.vocab, shares, threads);
  for_shares(shares, team, [&](std::int64_t i) {
    kernel(args, i * kColumnsAtOnce, std::min(args.vocab, (i + 1) * kColumnsAtOnce));
  });
}

void take_columns(Isa isa, DType dtype, const TakeArgs& args, int threads) {
  check_indices("row", args.row_indices, args.num_rows, args.rows);
  check_indices("column", args.columns, args.count, args.vocab);
  const auto kernel = row_kernels(isa).take_columns[static_cast<int>(dtype)];
  const int team = team_for(args.num_rows * args.vocab, args.num_rows, threads);
  for_shares(args.num_rows, team, [&](std::int64_t i) { kernel(args, i, i + 1); });
}

}  // namespace cpo
