#include "cpu/row_dispatch.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/row_tokens.h"

namespace cpo {
namespace {

// Fewer logits than this for each thread are not worth waking it.
constexpr std::int64_t kMinLogitsPerThread = 16384;
// Several shares a thread, handed out as threads become free: rows without tokens cost nothing, and cores may be busy.
constexpr std::int64_t kSharesPerThread = 8;

template <class Args>
void for_rows(void (*kernel)(const Args&, std::int64_t, std::int64_t), const Args& args, int threads) {
  const std::int64_t rows = args.batch.rows;
  const std::int64_t useful = rows * args.batch.vocab / kMinLogitsPerThread;
  const int team = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>({threads, useful, rows})));
  if (team == 1) return kernel(args, 0, rows);
  const std::int64_t share = std::max<std::int64_t>(1, rows / (team * kSharesPerThread));
  const std::int64_t shares = (rows + share - 1) / share;
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
  for (std::int64_t i = 0; i < shares; ++i) kernel(args, i * share, std::min(rows, (i + 1) * share));
}

}  // namespace

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

}  // namespace cpo
